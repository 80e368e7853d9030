"""Repeating a run in this process: equal bit for bit, and where anything was changed it says what and at which step."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from support.tiny import causal_model, dpo_trainer, lora, synthetic_pairs
from support.trails import events, without_cross_checks

from rlhf_audit_nb.auditor import AuditableRLHF
from rlhf_audit_nb.config import AuditConfig, PrivacyConfig
from rlhf_audit_nb.errors import VaultError
from rlhf_audit_nb.events import PrivacyReserved
from rlhf_audit_nb.privacy.replay import OpenedSeed, ReplaySeeds
from rlhf_audit_nb.records.replay import ReplayRefusedError
from rlhf_audit_nb.trail.erasure import erase

PAIRS = synthetic_pairs(12)
NOISY = {"epsilon": 50.0, "delta": 1e-3, "sampling_rate": 0.4}


@pytest.fixture(scope="module", autouse=True)
def quick_accounting():
    with without_cross_checks():
        yield


def build(folder: Path, rows: Any = PAIRS, **changes: Any) -> Any:
    settings = {"max_steps": 4, "disable_dropout": False, "peft": lora(lora_dropout=0.1), **changes}
    return dpo_trainer(rows, folder / "out", **settings)


class Story:
    """A trail with one run of two private trainings (the second goes on from a checkpoint) and their openings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.auditor = AuditableRLHF(
            privacy_config=PrivacyConfig(**NOISY),
            audit_config=AuditConfig(trail=str(folder / "audit"), weights_every=1),
        )
        # A budget that other runs have used before: the noise follows from what was left, which a replay cannot know.
        with self.auditor.track_training("before"):
            build(folder, max_steps=2).train()
        with self.auditor.track_training("replayed") as run:
            build(folder, save_strategy="steps", save_steps=2, learning_rate=2e-3).train()
        self.run = run.id
        (self.entry,) = (e.index for e in self.trail.reader().entries(type=PrivacyReserved.TYPE, run=self.run))
        self.opening = self.auditor.disclose(self.entry, folder / "seed.opening")

    @property
    def trail(self) -> Any:
        return self.auditor.trail


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("story")
        patch.setenv("RLHF_AUDIT_HOME", str(folder / "home"))
        return Story(folder)


@pytest.fixture(autouse=True)
def home(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(story.folder / "home"))


def again(story: Story, folder: Path, rows: Any = PAIRS, opening: Any = None, **changes: Any) -> Any:
    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 2e-3, **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with story.auditor.replay(story.run, opening=opening) as replay:
            build(folder, rows, **settings).train()
    return replay.result


@pytest.mark.parametrize("own", [False, True])
def test_a_replay_comes_out_the_same_bit_for_bit_and_touches_nothing(story: Story, tmp_path: Path, own: bool) -> None:
    before = sorted((p.name, p.stat().st_size) for p in story.trail.location.rglob("*"))
    size = story.trail.reader().size
    result = again(story, tmp_path, opening=None if own else story.opening)
    assert result.equal, str(result)
    assert (result.exit_code, result.warnings) == (0, ())
    assert (result.comparison.trainings, result.comparison.steps, result.comparison.digests) == (1, 4, 5)
    assert result.entries == (story.entry,)
    assert "bit for bit" in str(result)
    assert story.trail.reader().size == size
    assert sorted((p.name, p.stat().st_size) for p in story.trail.location.rglob("*")) == before


def changed_letter() -> list[dict[str, str]]:
    """One letter of every annotator's first answer: whoever is sampled first, it shows at once."""
    return [{**row, "chosen": row["chosen"] + "z"} if i % 2 == 0 else row for i, row in enumerate(PAIRS)]


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"rows": changed_letter()}, "step 1", "gradient_norm"),
        ({"learning_rate": 2.0000002e-3}, "trainer.attached", "hyperparameters.learning_rate"),
        ({"beta": 0.1000001}, "trainer.attached", "hyperparameters.beta"),
        ({"model": causal_model(seed=1)}, "base model", "weights_digest"),
        ({"rows": PAIRS[:-2]}, "data.bound", "units"),
        ({"max_steps": 3}, "trainer.attached", "max_steps"),
    ],
    ids=["a letter of data", "learning rate", "beta", "base model", "an annotator", "steps"],
)
def test_what_was_changed_is_named_with_the_first_step_that_differs(
    story: Story, tmp_path: Path, changes: dict[str, Any], where: str, what: str
) -> None:
    result = again(story, tmp_path, **changes)
    assert not result.equal
    assert result.exit_code == 1
    first = result.comparison.first
    assert (first.where, first.what) == (where, what)
    assert result.comparison.first_step is not None
    if where != "trainer.attached":
        assert result.comparison.first_step == 1
    assert f"first step that differs is {result.comparison.first_step}" in str(result)


def test_a_difference_of_steps_tells_no_value(story: Story, tmp_path: Path) -> None:
    result = again(story, tmp_path, rows=changed_letter())
    steps = [item for item in result.comparison.differences if item.step is not None or item.where == "final model"]
    assert {"gradient_norm", "update_norm", "weights_digest"} <= {item.what for item in steps}
    assert all(item.expected is None and item.found is None for item in steps)
    assert json.dumps(result.to_dict())


def test_code_that_changes_what_no_setting_shows_differs_at_its_first_step(story: Story, tmp_path: Path) -> None:
    with story.auditor.replay(story.run) as replay:
        trainer = build(tmp_path, save_strategy="steps", save_steps=2, learning_rate=2e-3)
        assert trainer.beta == trainer.args.beta
        trainer.beta *= 1.001
        trainer.train()
    assert not replay.result.equal
    assert replay.result.comparison.first_step == 1


def test_without_the_seed_the_noise_cannot_be_repeated(story: Story, tmp_path: Path, monkeypatch: Any) -> None:
    def another(*_: Any) -> ReplaySeeds:
        (reserved,) = events(story.trail, PrivacyReserved, story.run)
        return ReplaySeeds(story.trail.origin, [OpenedSeed(story.entry, reserved, os.urandom(32))])

    monkeypatch.setattr("rlhf_audit_nb.replaying.open_own_seeds", another)
    result = again(story, tmp_path)
    assert not result.equal
    assert (result.comparison.first.where, result.comparison.first_step) == ("step 1", 1)


def test_nothing_trained_or_one_training_too_many_is_no_replay(story: Story, tmp_path: Path) -> None:
    from rlhf_audit_nb.errors import PrivacyError

    with story.auditor.replay(story.run) as replay:
        pass
    assert not replay.result.equal
    with pytest.raises(PrivacyError, match="another private training") as refused, story.auditor.replay(story.run):
        build(tmp_path).train()
        build(tmp_path).train()
    assert refused.value.reason == "replay-seeds"


def test_openings_that_are_forged_or_of_another_run_or_missing_are_refused(story: Story, tmp_path: Path) -> None:
    entry = next(e.index for e in story.trail.reader().entries(type=PrivacyReserved.TYPE) if e.run != story.run)
    other = story.auditor.disclose(entry, tmp_path / "other.opening")
    with (
        pytest.raises(ReplayRefusedError, match=f"of entry {entry} of"),
        story.auditor.replay(story.run, opening=other),
    ):
        pass
    data = json.loads(story.opening.read_text())
    data["payload"] = data["payload"][:-8] + "AAAAAAA="
    forged = tmp_path / "forged.opening"
    forged.write_text(json.dumps(data, separators=(",", ":")) + "\n")
    with pytest.raises(ReplayRefusedError, match="does not verify"), story.auditor.replay(story.run, opening=forged):
        pass
    with pytest.raises(ReplayRefusedError, match="no private run"), story.auditor.replay("0" * 32):
        pass


def test_a_seed_that_was_erased_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    held = AuditableRLHF(
        privacy_config=PrivacyConfig(**NOISY, noise_multiplier=1.0),
        audit_config=AuditConfig(trail=str(tmp_path / "audit")),
    )
    with held.track_training("erased") as run:
        build(tmp_path, max_steps=1).train()
    erase(held.trail, None, reason="retention", run=run.id)
    with pytest.raises(VaultError, match="was erased") as refused, held.replay(run.id):
        pass
    assert refused.value.reason == "erased"


@pytest.mark.parametrize(
    "config",
    [
        {"sampled": "pairs", "max_pairs_per_unit": 2},
        {"unit": "pair"},
        {"noise_multiplier": 2.0},
        {"loss_noise": None},
    ],
    ids=str,
)
def test_every_way_to_sample_can_be_replayed(tmp_path: Path, config: dict[str, Any]) -> None:
    held = AuditableRLHF(
        privacy_config=PrivacyConfig(**{**NOISY, "epsilon": 2.0, "sampling_rate": 0.3, **config}),
        audit_config=AuditConfig(trail=str(tmp_path / "audit")),
    )
    with held.track_training("first") as run:
        build(tmp_path, max_steps=2).train()
    with held.replay(run.id) as replay:
        build(tmp_path, max_steps=2).train()
    assert replay.result.equal, str(replay.result)
