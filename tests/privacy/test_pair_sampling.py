"""Pairs sampled one by one: who is drawn, what a step adds up, and what plan, ledger and trail say of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from support.tiny import (
    dpo_trainer,
    kto_trainer,
    lora,
    perturb,
    preferences,
    reward_model,
    reward_trainer,
    synthetic_pairs,
)
from torch.nn import functional
from transformers import TrainerCallback

from rlhf_audit_nb.auditor import AuditableRLHF
from rlhf_audit_nb.config import AuditConfig, PrivacyConfig
from rlhf_audit_nb.errors import ConfigError, PrivacyError, UnsupportedTrainerError
from rlhf_audit_nb.events import PrivacyReserved, decode_body, encode_body
from rlhf_audit_nb.privacy import SealedRandom, plan_training, private_training, reserve_event
from rlhf_audit_nb.privacy.accountant import Mechanism, composed_epsilon
from rlhf_audit_nb.privacy.draws import Draws
from rlhf_audit_nb.privacy.ledger import fold

SIZES = (1, 3, 12)
STEPS = 6000
RATE = 0.3
MOST = 4


def roster(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    starts = np.cumsum((0, *sizes))
    return [tuple(range(start, start + size)) for start, size in zip(starts, sizes, strict=False)]


def counts_of_units(draws: Draws, sizes: tuple[int, ...]) -> tuple[list[list[int]], list[dict[int, int]]]:
    """For each unit how many of its rows each step drew, and how often each row was drawn."""
    owner = {row: unit for unit, rows in enumerate(roster(sizes)) for row in rows}
    drawn: list[list[int]] = [[] for _ in sizes]
    rows: list[dict[int, int]] = [{} for _ in sizes]
    for step in range(STEPS):
        here = [0] * len(sizes)
        for one in draws.sample(step):
            for row in one.rows:
                here[owner[row]] += 1
                rows[owner[row]][row] = rows[owner[row]].get(row, 0) + 1
        for unit, count in enumerate(here):
            drawn[unit].append(count)
    return drawn, rows


def binomial_error(found: list[int], pairs: int, rate: float) -> float:
    """The largest deviation of the histogram from Binomial(pairs, rate), in standard deviations."""
    seen = np.bincount(found, minlength=MOST + 1)
    chances = binom.pmf(np.arange(len(seen)), pairs, rate)
    return float(np.max(np.abs(seen - STEPS * chances) / np.sqrt(STEPS * chances * (1 - chances) + 1e-9)))


def test_each_kept_pair_is_drawn_with_its_chance_and_independently() -> None:
    draws = Draws(SealedRandom(bytes(range(32))), roster(SIZES), RATE, MOST, pairs=True)
    drawn, rows = counts_of_units(draws, SIZES)
    for unit, size in enumerate(SIZES):
        kept = min(size, MOST)
        assert len(rows[unit]) == kept, "the pairs that are kept stay the same for the whole training"
        assert max(drawn[unit]) <= kept
        assert binomial_error(drawn[unit], kept, RATE) < 6
        for often in rows[unit].values():
            assert abs(often - STEPS * RATE) < 6 * math.sqrt(STEPS * RATE * (1 - RATE))
    first, second = (np.asarray(drawn[unit]) - np.mean(drawn[unit]) for unit in (1, 2))
    assert abs(float(np.mean(first * second))) < 6 * float(first.std() * second.std()) / math.sqrt(STEPS)


def test_the_comparison_notices_units_that_are_drawn_as_a_whole() -> None:
    drawn, _ = counts_of_units(Draws(SealedRandom(bytes(range(32))), roster(SIZES), RATE, MOST), SIZES)
    assert binomial_error(drawn[2], MOST, RATE) > 20
    assert set(drawn[2]) == {0, MOST}


def test_what_one_annotator_holds_changes_nobody_elses_draws() -> None:
    """Zero-out adjacency: her data against none in its place."""
    with_her, without = roster(SIZES), [(0,), (), tuple(range(4, 16))]
    for pairs in (True, False):
        one, other = (
            Draws(SealedRandom(bytes(range(1, 33))), members, RATE, MOST, pairs=pairs)
            for members in (with_her, without)
        )
        for step in range(50):
            mine = [drawn for drawn in one.sample(step) if not set(drawn.rows) & {1, 2, 3}]
            assert mine == [drawn for drawn in other.sample(step) if drawn.rows]


def test_every_pair_is_as_likely_to_be_kept() -> None:
    often = [0] * 6
    for number in range(2000):
        randomness = SealedRandom(number.to_bytes(32, "big"))
        for place in randomness.kept(5, 2, 6):
            often[place] += 1
    assert all(abs(count - 2000 / 3) < 6 * math.sqrt(2000 * 2 / 9) for count in often)
    assert SealedRandom(bytes(32)).kept(5, 2, 60) != SealedRandom(bytes(32)).choice(0, 5, 2, 60)
    assert SealedRandom(bytes(32)).kept(0, 4, 3) == (0, 1, 2)


class Everything(SealedRandom):
    """Each step samples every place, and adds no noise."""

    def bernoulli_mask(self, step: int, rate: float, count: int) -> Any:
        del step, rate
        return np.ones(count, dtype=bool)

    def normals(self, step: int, tensor: int, count: int) -> Any:
        del step, tensor
        return np.zeros(count)


class Only(Everything):
    """Each step samples the places of the first unit alone."""

    def bernoulli_mask(self, step: int, rate: float, count: int) -> Any:
        del step, rate
        return np.arange(count) < 2


class Keeps(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients.append(
            {name: p.grad.double().clone() for name, p in model.named_parameters() if p.requires_grad}
        )


OWNERS = ("a", "a", "a", "b", "c", "c", "c", "c")
STILL = {"learning_rate": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0, "max_steps": 1}


def trained(
    trainer: Any, randomness: SealedRandom, bound: float, engine: str = "loop"
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The plan, and the sum that one step makes: what stands in ``.grad`` times what it was divided by."""
    config = PrivacyConfig(
        epsilon=1e6, noise_multiplier=1.0, sampling_rate=1.0, clipping_norm=bound, sampled="pairs", max_pairs_per_unit=2
    )
    plan = plan_training(trainer, replace(config, engine=engine))
    keeps = Keeps()
    trainer.add_callback(keeps)
    fell_back: list[Any] = []
    with private_training(trainer, plan, randomness, fell_back=lambda *told: fell_back.append(told)):
        trainer.train()
    assert fell_back == []
    (gradient,) = keeps.gradients
    return plan, {name: grad * plan.expected_units for name, grad in gradient.items()}


def norm_of(gradient: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(grad.square().sum()) for grad in gradient.values()))


def reward_gradients(trainer: Any) -> list[dict[str, torch.Tensor]]:
    """Of each pair alone the gradient of the Bradley-Terry loss, from the formula, in float64."""
    from peft import get_peft_model

    model = get_peft_model(reward_model(), lora(task_type="SEQ_CLS"))
    model.load_state_dict(trainer.model.state_dict())
    model.double().eval()
    found = []
    for row in trainer.train_dataset:
        model.zero_grad()
        chosen, rejected = (
            model(input_ids=torch.tensor([row[key]])).logits[0, 0] for key in ("chosen_ids", "rejected_ids")
        )
        (-functional.logsigmoid(chosen - rejected)).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    return found


@pytest.mark.parametrize("engine", ["loop", "rows"])
def test_a_step_adds_up_the_pairs_that_are_kept_each_clipped_alone(tmp_path: Path, engine: str) -> None:
    rows = [{**row, "annotator_id": owner} for row, owner in zip(preferences(24)[::3], OWNERS, strict=True)]
    trainer = reward_trainer(rows, tmp_path, peft="lora", **STILL)
    perturb(trainer.model)
    truths = reward_gradients(trainer)
    bound = sorted(norm_of(truth) for truth in truths)[3]  # some pairs are clipped, some are not
    randomness = Everything(bytes(32))
    plan, found = trained(trainer, randomness, bound, engine)
    assert plan.expected_units == 1.0 * 2 * 3  # q k N: as if everyone had two
    kept = [(0, 1, 2)[place] for place in randomness.kept(0, 2, 3)] + [3]
    kept += [(4, 5, 6, 7)[place] for place in randomness.kept(2, 2, 4)]
    assert len(kept) == 5
    total = {
        name: sum(truths[row][name] * min(1.0, bound / norm_of(truths[row])) for row in kept) for name in truths[0]
    }
    assert norm_of(total) > 1e-3
    assert norm_of({name: found[name] - total[name] for name in total}) / norm_of(total) < 1e-5
    other = {name: sum(truth[name] for truth in truths) for name in truths[0]}
    assert norm_of({name: found[name] - other[name] for name in other}) / norm_of(other) > 0.05


def test_an_annotator_moves_the_sum_by_no_more_than_k_clipping_norms(tmp_path: Path) -> None:
    """Even one whose pairs are all the same and whose gradients are far above the bound."""
    same = [{**preferences(1)[0], "annotator_id": "a"} for _ in range(6)]
    trainer = reward_trainer([*same, {**preferences(9)[8], "annotator_id": "b"}], tmp_path, **STILL)
    _, found = trained(trainer, Only(bytes(32)), 1e-3)
    assert 2e-3 * (1 - 1e-4) <= norm_of(found) <= 2e-3 * (1 + 1e-6)


def test_the_plan_counts_all_pairs_of_an_annotator_together(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(50, 3), tmp_path, max_steps=10, per_device_train_batch_size=10)
    config = PrivacyConfig(epsilon=8.0, sampled="pairs", max_pairs_per_unit=4)
    plan = plan_training(trainer, config)
    assert plan.sampling_rate == pytest.approx(10 / (4 * 50))
    assert plan.expected_units == pytest.approx(10)
    assert plan.steps_per_epoch == 20
    assert plan.mechanism.pairs == 4
    assert 7.9 < plan.epsilon <= 8.0
    one_pair = Mechanism(plan.noise_multiplier, plan.sampling_rate, plan.steps)
    assert composed_epsilon([one_pair], 1e-5) < plan.epsilon / 2
    given = plan_training(trainer, PrivacyConfig(epsilon=2.0, sampled="pairs", noise_multiplier=3.0))
    assert given.mechanism.pairs == 8
    assert given.curve[-1] == given.epsilon <= 2.0


def test_the_trail_says_so_and_the_ledger_composes_it(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(20, 3), tmp_path, max_steps=5, per_device_train_batch_size=5)
    plan = plan_training(trainer, PrivacyConfig(epsilon=8.0, sampled="pairs", max_pairs_per_unit=3))
    event = reserve_event(plan, "r1")
    assert (event.sampled, event.max_pairs_per_unit) == ("pairs", 3)
    assert "all pairs of a unit together" in event.mechanism
    assert fold([Line(encode_body(event))]).mechanisms("annotator", "annotator_id") == (plan.mechanism,)


class Line:
    type, run, index = PrivacyReserved.TYPE, "run-1", 0

    def __init__(self, body: bytes) -> None:
        self.body = body


def test_a_reservation_of_an_earlier_version_sampled_units_and_an_unknown_way_is_not_guessed(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(20, 3), tmp_path, max_steps=5, per_device_train_batch_size=5)
    event = reserve_event(plan_training(trainer, PrivacyConfig(epsilon=8.0)), "r1")
    body = encode_body(event)
    old = body.replace(b',"sampled":"units"', b"").replace(b'"sampled":"units",', b"")
    assert old != body
    assert decode_body(PrivacyReserved.TYPE, old) == event
    assert fold([Line(old)]).spends[0].mechanism.pairs == 1
    with pytest.raises(PrivacyError, match="cannot account for"):
        fold([Line(body.replace(b'"sampled":"units"', b'"sampled":"shuffled"'))])


def test_a_run_says_everywhere_that_pairs_were_sampled_one_by_one(tmp_path: Path) -> None:
    auditor = AuditableRLHF(
        privacy_config=PrivacyConfig(
            epsilon=50.0,
            delta=1e-3,
            noise_multiplier=3.0,
            sampled="pairs",
            max_pairs_per_unit=3,
            sampling_rate=0.1,
            loss_noise=None,
        ),
        audit_config=AuditConfig(trail=str(tmp_path / "audit")),
    )
    trainer = dpo_trainer(synthetic_pairs(12, 4), tmp_path / "model", max_steps=2)
    with auditor.track_training("pairs"):
        trainer.train()
    budget = auditor.budget()
    assert budget.total == composed_epsilon([Mechanism(3.0, 0.1, 2, 3)], 1e-3)
    assert budget.runs[0].rate == "0.1 of each of 3 pairs"
    assert "0.1 of each of 3 pairs" in budget.runs[0].cells()
    report = auditor.generate_compliance_report(format="json")
    report.save(tmp_path / "report.json")
    said = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert "Of every annotator at most 3 pairs were kept for the whole training" in said
    assert "accounted for are all pairs of one annotator together" in said
    card = auditor.generate_model_card().text
    assert "at most 3 pairs of a unit kept, sampled one by one" in card


def test_kto_rows_are_no_pairs(tmp_path: Path) -> None:
    trainer = kto_trainer(preferences(12), tmp_path)
    with pytest.raises(UnsupportedTrainerError, match="takes a pair apart") as refused:
        plan_training(trainer, PrivacyConfig(epsilon=8.0, sampled="pairs"))
    assert "sampled" in refused.value.next_step


def test_pairs_can_be_sampled_one_by_one_of_annotators_only() -> None:
    with pytest.raises(ConfigError, match="sampled="):
        PrivacyConfig(epsilon=1.0, unit="pair", sampled="pairs")
    with pytest.raises(ConfigError, match="at most 1000"):
        PrivacyConfig(epsilon=1.0, sampled="pairs", max_pairs_per_unit=1001)
    with pytest.raises(ConfigError, match="not known"):
        PrivacyConfig(epsilon=1.0, sampled="rows")  # type: ignore[arg-type]
    assert PrivacyConfig(epsilon=1.0, max_pairs_per_unit=5000).sampled == "units"
