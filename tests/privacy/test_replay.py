"""Opened seeds: how they travel, and that nothing new can be trained with them in silence."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from support.tiny import dpo_trainer, synthetic_pairs
from support.trails import events, without_cross_checks

from rlhf_audit_nb.auditor import AuditableRLHF
from rlhf_audit_nb.config import AuditConfig, PrivacyConfig
from rlhf_audit_nb.errors import PrivacyError, StoreError
from rlhf_audit_nb.events import PrivacyReserved, ReplayStarted
from rlhf_audit_nb.privacy import SealedRandom, plan_training
from rlhf_audit_nb.privacy.replay import OpenedSeed, ReplaySeeds, given_seeds, start_replay, write_seeds
from rlhf_audit_nb.privacy.reservation import reserve
from rlhf_audit_nb.privacy.sampling import GENERATOR
from rlhf_audit_nb.privatiser import TrailPrivatiser
from rlhf_audit_nb.trail import Trail

PAIRS = synthetic_pairs(8)
CONFIG = PrivacyConfig(epsilon=50.0, delta=1e-3, noise_multiplier=1.0, sampling_rate=0.4)
SEED = bytes(range(32))


@pytest.fixture(scope="module", autouse=True)
def quick_accounting():
    with without_cross_checks():
        yield


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> ReplaySeeds:
    folder = tmp_path_factory.mktemp("reserved")
    with Trail.open(folder / "audit", home=folder / "home") as trail:
        plan = plan_training(dpo_trainer(PAIRS, folder, max_steps=2), CONFIG)
        reserve(trail, plan, SealedRandom.from_system(), reservation="a" * 32, run="b" * 32)
        (reserved,) = events(trail, PrivacyReserved)
    return ReplaySeeds("example.com/trail", [OpenedSeed(7, reserved, SEED)])


def held(folder: Path) -> AuditableRLHF:
    return AuditableRLHF(privacy_config=CONFIG, audit_config=AuditConfig(trail=str(folder / "audit")))


def test_the_file_is_for_this_user_alone_and_gone_once_read(
    seeds: ReplaySeeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "seeds"
    write_seeds(path, seeds)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        write_seeds(path, seeds)
    monkeypatch.setenv("RLHF_AUDIT_REPLAY", str(path))
    with Trail.open(tmp_path / "scratch", home=tmp_path / "home") as trail:
        start_replay(trail, seeds)
        given = given_seeds(trail)
        assert given is given_seeds(trail), "one order of seeds for the whole process"
    assert given is not None
    assert given.seeds == seeds.seeds
    assert not path.exists()


def test_a_seed_is_not_shown(seeds: ReplaySeeds) -> None:
    assert SEED.hex() not in repr(seeds.seeds)
    assert repr(SEED) not in repr(seeds.seeds)


def test_an_ordinary_trail_takes_no_opened_seed(
    seeds: ReplaySeeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary = held(tmp_path)
    with ordinary.track_training("ordinary"):
        dpo_trainer(PAIRS, tmp_path / "out", max_steps=1).train()
    size = ordinary.trail.reader().size
    write_seeds(tmp_path / "seeds", seeds)
    monkeypatch.setenv("RLHF_AUDIT_REPLAY", str(tmp_path / "seeds"))
    trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=1)
    with pytest.raises(PrivacyError, match="not that of the replay") as refused, ordinary.track_training("known seed"):
        trainer.train()
    assert refused.value.reason == "replay"
    assert trainer.state.global_step == 0
    assert len(events(ordinary.trail, PrivacyReserved)) == 1
    assert ordinary.trail.reader().size > size, "the attempt itself is recorded"
    with pytest.raises(PrivacyError, match="not that of the replay"):
        TrailPrivatiser(CONFIG, ordinary.trail, seeds).plan(trainer)
    with pytest.raises(PrivacyError, match="Only a new trail"):
        start_replay(ordinary.trail, seeds)


def test_a_variable_that_names_nothing_refuses_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = held(tmp_path)
    assert ordinary.trail.reader().size == 1
    monkeypatch.setenv("RLHF_AUDIT_REPLAY", str(tmp_path / "nothing"))
    trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=1)
    with pytest.raises(PrivacyError, match="Unset RLHF_AUDIT_REPLAY"), ordinary.track_training("x"):
        trainer.train()


def test_while_replaying_the_trail_that_the_code_names_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_AUDIT_REPLAY", str(tmp_path / "seeds"))
    monkeypatch.setenv("RLHF_AUDIT_TRAIL", str(tmp_path / "scratch"))
    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "mine"), origin="example.com/mine"))
    with pytest.raises(StoreError):
        auditor.trail  # noqa: B018 - a scratch trail is made by whoever replays, and by nobody else
    assert not (tmp_path / "mine").exists()
    with Trail.open(tmp_path / "scratch"):
        pass
    assert auditor.trail.location == tmp_path / "scratch"


def test_a_reservation_says_that_its_seed_was_known(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit", home=tmp_path / "home") as trail:
        for number, randomness in enumerate((SealedRandom.from_system(), SealedRandom(os.urandom(32)))):
            plan = plan_training(dpo_trainer(PAIRS, tmp_path, max_steps=1), CONFIG, _prior(trail))
            reserve(trail, plan, randomness, reservation=str(number) * 32)
        fresh, known = events(trail, PrivacyReserved)
    assert fresh.generator == GENERATOR
    assert "known beforehand" in known.generator


def _prior(trail: Any) -> Any:
    from rlhf_audit_nb.privacy.reservation import read_ledger

    return read_ledger(trail.reader()).mechanisms("annotator", "annotator_id")


def test_a_replays_trail_names_what_it_replays(seeds: ReplaySeeds, tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit", home=tmp_path / "home") as trail:
        start_replay(trail, seeds)
        (marked,) = events(trail, ReplayStarted)
    assert marked == ReplayStarted(origin="example.com/trail", reservations=[7])
