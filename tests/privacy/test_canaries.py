"""Canaries in a private training: what they bring in, what they show, and that a broken mechanism is told by them."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import report_story as story
import torch
from support.tiny import (
    causal_model,
    dpo_trainer,
    kto_trainer,
    reward_model,
    reward_trainer,
    sft_trainer,
    synthetic_pairs,
)
from support.trails import events, kinds, without_cross_checks
from transformers import TrainerCallback

from rlhf_audit_nb.auditor import AuditableRLHF
from rlhf_audit_nb.capture.run import AuditWarning
from rlhf_audit_nb.cards import build_card
from rlhf_audit_nb.cli import main
from rlhf_audit_nb.cli.checking import verdict_of
from rlhf_audit_nb.config import AuditConfig, PrivacyConfig
from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.events import (
    PrivacyAudited,
    PrivacyReserved,
    PrivacySettled,
    RunFinished,
    decode_body,
    encode_body,
)
from rlhf_audit_nb.notebook.panels.view import build_view
from rlhf_audit_nb.privacy import SealedRandom, plan_training, private_training
from rlhf_audit_nb.privacy.accountant import Mechanism, composed_epsilon
from rlhf_audit_nb.privacy.canaries import Canaries
from rlhf_audit_nb.privacy.draws import Draws
from rlhf_audit_nb.privacy.lower_bounds import CONFIDENCE, SHARES, bound_from_scores, ceiling, epsilon_bound
from rlhf_audit_nb.reports import build_compliance_report

SEED = bytes(range(32))
M = 40
RATE = 0.6
C = 0.25
STILL = {"learning_rate": 0.0, "weight_decay": 0.0, "max_steps": 2, "max_grad_norm": 0.0}

normals, mask = SealedRandom.normals, SealedRandom.bernoulli_mask


@pytest.fixture(scope="module", autouse=True)
def quick_accounting():
    with without_cross_checks():
        yield


@pytest.fixture(autouse=True)
def one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound may exceed the claim by chance, if seldom: not in a test."""
    monkeypatch.setattr(SealedRandom, "from_system", classmethod(lambda cls: cls(SEED)))


# --- what they bring in ----------------------------------------------------------------------------------------------


class Keeps(TrainerCallback):
    """Keeps what the optimizer is handed, and what is released of the loss."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []
        self.losses: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        self.gradients.append(torch.cat([one.flatten().double() for one in found]))

    def on_private_step(self, step: int, epsilon: float, metrics: Any) -> None:
        pass

    def on_private_loss(self, step: int, loss: float) -> None:
        self.losses.append(loss)


def train(trainer: Any, **config: Any) -> tuple[Any, Any, Keeps]:
    keeps = Keeps()
    trainer.add_callback(keeps)
    asked = {"epsilon": 1e4, "noise_multiplier": 1.0, "sampling_rate": RATE, "clipping_norm": C, **config}
    plan = plan_training(trainer, PrivacyConfig(**asked))
    with private_training(trainer, plan, SealedRandom(SEED), keeps) as training:
        trainer.train()
    trainer.remove_callback(keeps)
    return plan, training, keeps


def brought_in(step: int, units: int, size: int, places: int = 1) -> torch.Tensor:
    """By the description: who is in, who is sampled after the units, and C at a coordinate of each one's own."""
    random = SealedRandom(SEED)
    words = random._words
    included = [(int(word) >> 11) * 2.0**-53 < 0.5 for word in words("canary", 0, 0, M)]
    at: list[int] = []
    for word in words("coordinate", 0, 0, 50 * M):
        if int(word) % size not in at and len(at) < M:
            at.append(int(word) % size)
    drawn = [(int(word) >> 11) * 2.0**-53 < RATE for word in words("sample", step, 0, (units + M) * places)]
    total = torch.zeros(size, dtype=torch.float64)
    for canary in range(M):
        first = (units + canary) * places
        total[at[canary]] = C * included[canary] * sum(drawn[first : first + places])
    return total


CASES = {
    "dpo": (dpo_trainer, causal_model, {"engine": "loop"}),
    "dpo in rows": (dpo_trainer, causal_model, {"engine": "rows"}),
    "reward": (reward_trainer, reward_model, {"unit": "pair"}),
    "reward in pairs": (reward_trainer, reward_model, {"sampled": "pairs", "max_pairs_per_unit": 2}),
    "sft": (sft_trainer, causal_model, {}),
    "kto": (kto_trainer, causal_model, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_they_are_in_the_sum_as_units_are_and_in_the_divisor(tmp_path: Path, case: str) -> None:
    """In float64, against a training without them from the same seed, and so with the same sample and noise."""
    make, model, config = CASES[case]
    trainer = make(synthetic_pairs(5), tmp_path, model=model().double(), **STILL)
    plain = train(trainer, **config)
    plan, training, keeps = train(trainer, canaries=M, **config)
    assert "rows" in plan.engine.engine or case != "dpo in rows"
    units, places = len(plan.units), 2 if case == "reward in pairs" else 1
    assert plan.divisor == pytest.approx(RATE * places * (units + M), rel=1e-12)
    assert plan.expected_units == plain[0].expected_units == plain[0].divisor
    assert (plan.curve, plan.epsilon, plan.loss_deviation) == (
        plain[0].curve,
        plain[0].epsilon,
        plain[0].loss_deviation,
    )
    assert keeps.losses == plain[2].losses
    scores = torch.zeros_like(keeps.gradients[0])
    for step, (gradient, without) in enumerate(zip(keeps.gradients, plain[2].gradients, strict=True)):
        expected = brought_in(step, units, len(gradient), places)
        assert 0 < int((expected > 0).sum()) < M
        found = gradient * plan.divisor - without * plan.expected_units
        assert torch.allclose(found, expected, rtol=0, atol=1e-11), (found - expected).abs().max()
        scores += gradient
    every = sum(brought_in(step, units, len(scores), places) for step in range(200))
    assert int((every > 0).sum()) == int(training.canaries.included.sum())
    assert np.isin(training.canaries.scores, scores.numpy()).all(), "scores are what was released at their places"
    assert training.canaries.steps == 2


def test_they_are_drawn_apart_half_of_them_are_in_and_each_has_a_place_of_its_own() -> None:
    random = SealedRandom(SEED)
    assert abs(int(random.canaries(20_000).sum()) - 10_000) < 6 * math.sqrt(5_000)
    at = random.coordinates(500, 520)
    assert len(set(at.tolist())) == 500
    assert (at.min() >= 0, at.max() < 520) == (True, True)
    assert random.coordinates(3, 10**12).tolist() == random.coordinates(7, 10**12).tolist()[:3]
    drawn = Draws(random, [(0,)] * 7, 0.25, 4, canaries=4000)
    counts = np.array([drawn.canaries(step) for step in range(20)])
    assert set(counts.flat) == {0, 1}
    assert abs(counts.mean() - 0.25) < 6 * math.sqrt(0.25 * 0.75 / counts.size)
    pairs = Draws(random, [(0,)] * 7, 0.25, 4, pairs=True, canaries=4000)
    assert abs(np.mean([pairs.canaries(step) for step in range(5)]) - 1.0) < 0.05
    assert Draws(random, [(0,)], 0.25, 4).canaries(0).tolist() == []
    assert [one.index for one in Draws(random, [(0,)] * 7, 0.25, 4).sample(1)] == [one.index for one in drawn.sample(1)]


# --- what they show --------------------------------------------------------------------------------------------------


def attacked(
    seed: int, noise: float, *, steps: int = 20, rate: float = 0.5, claimed: float = 4.0, m: int = 1000
) -> Any:
    """The bound of a training whose noise is ``noise`` where ``claimed`` is claimed, and the claimed epsilon."""
    random = SealedRandom(seed.to_bytes(32, "big"))
    weights = torch.nn.Parameter(torch.zeros(4 * m))
    canaries = Canaries(random, Draws(random, [], rate, 1, canaries=m), [weights], C, m)
    for step in range(steps):
        total = torch.zeros(4 * m, dtype=torch.float64)
        canaries.add(step, [total])
        total += noise * C * torch.from_numpy(random.normals(step, 0, 4 * m))
        weights.grad = (total / 77).float()
        canaries.look([weights])
    epsilon = composed_epsilon([Mechanism(claimed, rate, steps)], 1e-5)
    return bound_from_scores(canaries.scores, canaries.included, 1e-5), epsilon


@pytest.mark.parametrize(("rate", "sigma"), [(0.5, 4.0), (1.0, 10.0)])
def test_the_bound_of_a_right_mechanism_stays_under_the_claim_whatever_the_seed(rate: float, sigma: float) -> None:
    for seed in range(5):
        bound, claimed = attacked(seed, sigma, rate=rate, claimed=sigma)
        assert bound.epsilon < claimed / 2, seed
        assert bound.epsilon <= bound.gaussian < claimed, seed


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_noise_that_is_missing_or_four_times_too_small_crosses_the_claim(share: float) -> None:
    for seed in range(3):
        bound, claimed = attacked(seed, share * 4.0)
        assert claimed < bound.epsilon <= bound.ceiling, seed


def auditor(folder: Path, **privacy: Any) -> AuditableRLHF:
    asked = {"epsilon": 50.0, "delta": 1e-5, "noise_multiplier": 4.0, "sampling_rate": 0.5, "canaries": 400, **privacy}
    return AuditableRLHF(
        privacy_config=PrivacyConfig(**asked),
        audit_config=AuditConfig(trail=str(folder / "audit"), weights_every=1),
    )


def trained(folder: Path, **args: Any) -> Any:
    trainer = reward_trainer(synthetic_pairs(12), folder / "out", **{"max_steps": 20, "max_length": 64, **args})
    trainer.train()
    return trainer


def test_a_training_tells_what_its_canaries_show_beside_what_it_claims(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = auditor(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with held.track_training("audited") as run:
            trained(tmp_path)
    (reserved,), (settled,) = events(held.trail, PrivacyReserved), events(held.trail, PrivacySettled)
    (found,) = events(held.trail, PrivacyAudited)
    assert (reserved.canaries, reserved.units) == (400, 12)
    assert decode_body(found.TYPE, encode_body(found)) == found
    assert (found.outcome, found.contradicts) == ("not contradicted", False)
    assert (found.canaries, found.steps, found.delta, found.confidence) == (400, 20, 1e-5, CONFIDENCE)
    assert found.reservation == reserved.reservation
    assert found.epsilon_claimed == settled.epsilon_run == pytest.approx(2.41, abs=0.02)
    assert found.epsilon_lower < found.epsilon_claimed / 2
    each = 1 - (1 - CONFIDENCE) / len(SHARES)
    assert found.ceiling == pytest.approx(ceiling(400, 1e-5, each))
    again = epsilon_bound(found.canaries, found.guesses, found.right, found.delta, each)
    assert found.epsilon_lower == pytest.approx(again), "whoever reads the entry can work it out"
    written = kinds(held.trail, run.id)
    assert written.index("privacy.settled") < written.index(found.TYPE)
    assert not [said for said in run.state.warnings if "canaries" in said]
    shown = build_view(run.state, held.trail.status())["privacy"]["note"]
    assert "400 canaries show ε ≥ " in shown
    assert "2.42 claimed for this training" in shown
    assert "contradicts" not in shown
    main(["verify", str(tmp_path / "audit")])
    assert "contradict" not in capsys.readouterr().out


def test_a_training_without_noise_says_loudly_that_its_claim_is_contradicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SealedRandom, "normals", lambda self, step, tensor, count: np.zeros(count))
    held = auditor(tmp_path)
    with pytest.warns(AuditWarning, match="canaries of this training contradict"), held.track_training("bad") as run:
        trained(tmp_path)
    (found,) = events(held.trail, PrivacyAudited)
    assert (found.outcome, found.contradicts) == ("failed", True)
    assert found.epsilon_claimed < found.epsilon_lower <= found.ceiling
    assert "contradicts the claim" in build_view(run.state, held.trail.status())["privacy"]["note"]
    assert main(["verify", str(tmp_path / "audit")]) == 0, "the trail itself is whole"
    out = capsys.readouterr().out
    assert "canaries of this training contradict its privacy" in " ".join(out.split())


def test_without_canaries_nothing_is_said_of_any(tmp_path: Path) -> None:
    held = auditor(tmp_path, canaries=None)
    with held.track_training("plain") as run:
        trained(tmp_path, max_steps=1)
    assert events(held.trail, PrivacyAudited) == []
    assert events(held.trail, PrivacyReserved)[0].canaries is None
    assert run.state.privacy.audited is None


class Breaks(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise RuntimeError("the machine fell over")


def test_a_training_that_breaks_off_and_one_that_goes_on_are_each_audited_for_their_own_steps(tmp_path: Path) -> None:
    held = auditor(tmp_path, canaries=30)
    saving = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="fell over"), held.track_training("broken") as first:
            trainer = reward_trainer(synthetic_pairs(6), tmp_path / "out", **saving)
            trainer.add_callback(Breaks())
            trainer.train()
        trainer = reward_trainer(synthetic_pairs(6), tmp_path / "out", **{**saving, "max_steps": 3})
        with held.track_training("whole"):
            trainer.train()
        again = reward_trainer(synthetic_pairs(6), tmp_path / "out", **saving)
        with held.track_training("resumed") as resumed:
            again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    (one,) = events(held.trail, PrivacyAudited, first.id)
    (other,) = events(held.trail, PrivacyAudited, resumed.id)
    (finished,) = events(held.trail, RunFinished, first.id)
    (settled,) = events(held.trail, PrivacySettled, resumed.id)
    assert (one.steps, finished.status) == (2, "failed")
    assert (other.steps, other.epsilon_claimed) == (3, settled.epsilon_run)
    assert other.epsilon_claimed == pytest.approx(composed_epsilon([settled_mechanism(3)], 1e-5), rel=1e-6)
    with held.replay(resumed.id) as replay:
        again = reward_trainer(synthetic_pairs(6), tmp_path / "again", **saving)
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert replay.result.equal, str(replay.result)


def settled_mechanism(steps: int) -> Mechanism:
    from rlhf_audit_nb.privacy.live_loss import effective_noise

    return Mechanism(effective_noise(4.0, 40.0), 0.5, steps)


def test_a_replay_repeats_them_and_notices_where_there_were_others(tmp_path: Path) -> None:
    held = auditor(tmp_path, canaries=25)
    with held.track_training("first") as run:
        trained(tmp_path, max_steps=2)
    with held.replay(run.id) as replay:
        trained(tmp_path, max_steps=2)
    assert replay.result.equal, str(replay.result)
    held.privacy_config = PrivacyConfig(**{**held.privacy_config.to_dict(), "canaries": 26})
    with held.replay(run.id) as other:
        trained(tmp_path, max_steps=2)
    assert not other.result.equal
    assert "canaries" in {item.what for item in other.result.comparison.differences}


# --- how it is asked for, and how it shows ---------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0, 1, -3, 2.5, True, 10**6])
def test_numbers_that_cannot_be_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="canaries"):
        PrivacyConfig(epsilon=1.0, canaries=wrong)


def test_labels_have_none() -> None:
    with pytest.raises(ConfigError, match='unit="label"'):
        PrivacyConfig(epsilon=1.0, unit="label", canaries=100)


def test_more_of_them_than_trained_numbers_are_refused_before_anything_is_reserved(tmp_path: Path) -> None:
    held = auditor(tmp_path, canaries=100_000)
    with pytest.raises(ConfigError, match="each canary needs one to itself"), held.track_training("too many"):
        trained(tmp_path)
    assert events(held.trail, PrivacyReserved) == []


def audited(reservation: str, **changes: Any) -> PrivacyAudited:
    values: dict[str, Any] = {
        "reservation": reservation,
        "outcome": "not contradicted",
        "canaries": 1000,
        "steps": 24,
        "guesses": 100,
        "right": 80,
        "delta": 1e-5,
        "epsilon_claimed": 3.84,
        "epsilon_lower": 0.83,
        "epsilon_gaussian": 1.12,
        "confidence": 0.95,
        "ceiling": 5.27,
    }
    return PrivacyAudited(**{**values, **changes})


def evidence(**changes: Any) -> Any:
    teller = story.Teller()
    story.created(teller)
    story.train(teller)
    entry = next(entry for entry in teller.entries if entry.type == PrivacyReserved.TYPE)
    reserved = decode_body(entry.type, entry.body)
    teller.tell(audited(reserved.reservation, **changes), run=entry.run)
    return story.told(teller)


def test_report_and_card_show_the_bound_beside_the_claim_with_its_ceiling() -> None:
    found = evidence()
    parts = build_compliance_report(found).to_dict()["privacy"]
    (part,) = [item for item in parts if "canaries" in item["words"]]
    assert part["state"] == "ok"
    assert "show ε ≥ 0.83 with 95 % of confidence, of the 3.84 claimed for it alone" in part["words"]
    assert "so many can show 5.27 at most. A low bound is no proof of privacy." in part["words"]
    facts = {fact["label"]: fact["value"] for fact in part["facts"]}
    assert facts["ε shown by canaries"].startswith("not contradicted: at least 0.83 of the 3.84")
    assert "show ε ≥ 0.83" in build_card(found, "huggingface").text
    low = build_compliance_report(evidence(ceiling=3.0)).to_dict()["privacy"]
    assert any("so they could not have contradicted it" in item["words"] for item in low)


@pytest.mark.parametrize("changes", [{"outcome": "failed", "epsilon_lower": 4.4}, {"epsilon_lower": 4.4}])
def test_a_contradicted_claim_is_bad_wherever_it_is_read(changes: dict[str, Any]) -> None:
    found = evidence(**changes)
    report = build_compliance_report(found).to_dict()
    (part,) = [item for item in report["privacy"] if "canaries" in item["words"]]
    assert (part["state"], part["headline"]) == ("bad", "contradicted by canaries")
    assert report["privacy_state"] == "bad"
    assert "Canaries of a training contradict the ε that it claims" in report["privacy_words"]
    assert "cannot be relied on" in build_card(found, "huggingface").text


@pytest.mark.parametrize(("level", "told"), [("UNANCHORED", 1), ("INVALID", 0)])
def test_a_record_that_holds_one_is_told_of_where_it_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, told: int
) -> None:
    found = evidence(outcome="failed", epsilon_lower=4.4)
    opened = SimpleNamespace(verdict=story.verdict(found.entries, level), notes=(), entries=found.entries)
    monkeypatch.setattr("rlhf_audit_nb.records.open_record", lambda *_, **__: opened)
    record = tmp_path / "record.ipynb"
    record.write_text("{}")
    _, notes = verdict_of(str(record), None)
    assert [note.code for note in notes] == ["contradicted-by-canaries"] * told
