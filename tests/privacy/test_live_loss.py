"""The private live loss: what it costs, that it is what it says, and that one unit moves it by no more than B/2."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from scipy import stats
from support.tiny import dpo_trainer, kto_trainer, perturb, preferences, reward_trainer, sft_trainer, synthetic_pairs
from support.trails import events, without_cross_checks

from rlhf_audit_nb.auditor import AuditableRLHF
from rlhf_audit_nb.capture.state import Smoothed, smoothed_deviation
from rlhf_audit_nb.config import AuditConfig, PrivacyConfig
from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.events import PrivacyReserved, Step
from rlhf_audit_nb.privacy import SealedRandom, plan_training, private_training, reserve_event
from rlhf_audit_nb.privacy.accountant import compose
from rlhf_audit_nb.privacy.live_loss import LiveLoss, effective_noise, live_loss, usual_bound
from rlhf_audit_nb.privacy.reservation import read_ledger
from rlhf_audit_nb.privacy.supported import DPO_LOSSES

SEED = bytes(range(32))
STILL = {"learning_rate": 0.0, "weight_decay": 0.0}


class Listens:
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.metrics: list[dict[str, Any]] = []

    def on_private_loss(self, step: int, loss: float) -> None:
        assert step == len(self.losses) + 1
        self.losses.append(loss)

    def on_private_step(self, step: int, epsilon: float, metrics: dict[str, Any]) -> None:
        self.metrics.append(metrics)


def train(trainer: Any, seed: bytes = SEED, **config: Any) -> tuple[Any, Listens]:
    observer = Listens()
    plan = plan_training(trainer, PrivacyConfig(**{"epsilon": 200.0, "noise_multiplier": 1.0, **config}))
    with private_training(trainer, plan, SealedRandom(seed), observer):
        trainer.train()
    return plan, observer


# -- what it costs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gradient", "ratio"), [(1.0, 10.0), (0.7, 1.0), (3.0, 5.0), (1.0, 20.0)])
def test_the_effective_noise_is_that_of_two_gaussians_on_one_sample(gradient: float, ratio: float) -> None:
    both = dp_accounting.ComposedDpEvent(
        [dp_accounting.GaussianDpEvent(gradient), dp_accounting.GaussianDpEvent(ratio * gradient)]
    )
    neighbours = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    joint = dp_accounting.rdp.RdpAccountant(neighboring_relation=neighbours)
    joint.compose(dp_accounting.PoissonSampledDpEvent(0.1, both), 200)
    single = dp_accounting.rdp.RdpAccountant(neighboring_relation=neighbours)
    noise = effective_noise(gradient, ratio * gradient)
    single.compose(dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(noise)), 200)
    assert single.get_epsilon(1e-4) == pytest.approx(joint.get_epsilon(1e-4), rel=1e-9)
    assert noise < gradient


def test_and_no_less_by_brute_force_over_both_coordinates() -> None:
    """The hockey-stick divergence of one sampled release of two numbers, summed on a grid, against one number's."""
    gradient, loss, rate, epsilon = 1.0, 3.0, 0.3, 0.4
    axis = np.linspace(-14, 15, 1401)
    cell = (axis[1] - axis[0]) ** 2
    x, y = np.meshgrid(axis, axis)
    without = stats.norm.pdf(x) * stats.norm.pdf(y)
    taking_part = (1 - rate) * without + rate * stats.norm.pdf(x - 1 / gradient) * stats.norm.pdf(y - 1 / loss)
    two = float(np.maximum(taking_part - math.exp(epsilon) * without, 0).sum() * cell)
    axis = np.linspace(-14, 15, 400_001)
    none = stats.norm.pdf(axis)
    mixed = (1 - rate) * none + rate * stats.norm.pdf(axis - 1 / effective_noise(gradient, loss))
    one = float(np.maximum(mixed - math.exp(epsilon) * none, 0).sum() * (axis[1] - axis[0]))
    assert two == pytest.approx(one, rel=1e-3)
    mixed = (1 - rate) * none + rate * stats.norm.pdf(axis - 1 / gradient)  # the gradient alone would say too little
    alone = float(np.maximum(mixed - math.exp(epsilon) * none, 0).sum() * (axis[1] - axis[0]))
    assert alone < 0.97 * two


def test_a_figure_of_the_literature_is_met() -> None:
    """q=.1, T=200, sigma_g=1, delta=1e-4: 8.607 without, 8.688 with sigma_m=10, 8.933 with sigma_m=5."""
    trainer_free = {"epsilon": 1000.0, "delta": 1e-4, "noise_multiplier": 1.0}
    from rlhf_audit_nb.privacy.plan import plan_units
    from rlhf_audit_nb.privacy.units import build_units

    found = [
        plan_units(
            PrivacyConfig(loss_noise=ratio, **trainer_free), build_units(None, 500, "pair"), 0.1, 200, 10
        ).epsilon
        for ratio in (None, 10.0, 5.0)
    ]
    assert found == pytest.approx([8.607, 8.688, 8.933], abs=0.012)


def test_a_calibrated_plan_keeps_to_its_budget_and_the_ledger_reads_the_same(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(20), tmp_path)
    config = PrivacyConfig(epsilon=3.0, delta=1e-3, sampling_rate=0.3)
    plan = plan_training(trainer, config)
    event = reserve_event(plan, "r")
    assert plan.epsilon <= 3.0
    assert plan.live_loss is not None
    assert event.loss_noise_multiplier == pytest.approx(10 * event.noise_multiplier)
    assert event.loss_bound == pytest.approx(2 * math.log(2))
    assert plan.mechanism.noise_multiplier == effective_noise(event.noise_multiplier, event.loss_noise_multiplier)
    assert plan.mechanism.noise_multiplier < plan.noise_multiplier == event.noise_multiplier
    without = plan_training(trainer, PrivacyConfig(epsilon=3.0, delta=1e-3, sampling_rate=0.3, loss_noise=None))
    assert without.noise_multiplier == without.mechanism.noise_multiplier
    assert plan.noise_multiplier == pytest.approx(without.noise_multiplier * math.sqrt(1.01), rel=1e-3)
    assert reserve_event(without, "r").loss_bound is None


# -- what is released ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "args"), [(dpo_trainer, {}), (reward_trainer, {}), (sft_trainer, {})], ids=["dpo", "reward", "sft"]
)
def test_it_is_the_clipped_mean_of_brute_force_and_the_sealed_noise(tmp_path: Path, make: Any, args: Any) -> None:
    trainer = make(preferences(24, 40), tmp_path, **STILL, max_steps=3, max_length=256, **args)
    perturb(trainer.model)
    rate, bound = 0.6, 0.9
    exact = copy.deepcopy(trainer.model).double()
    plan, observer = train(trainer, sampling_rate=rate, loss_bound=bound, max_pairs_per_unit=3)
    sealed, members = SealedRandom(SEED), plan.units.members
    rows = trainer._remove_unused_columns(trainer.train_dataset)
    for step, released in enumerate(observer.losses):
        total = 0.0
        for unit in sealed.bernoulli_mask(step, rate, len(members)).nonzero()[0]:
            drawn = sealed.choice(step, int(unit), 3, len(members[unit]))
            batch = trainer.data_collator([rows[members[unit][place]] for place in drawn])
            extra = {"num_items_in_batch": 256 * len(drawn)} if make is sft_trainer else {}
            with torch.no_grad():
                loss = float(trainer.compute_loss(exact, trainer._prepare_inputs(batch), **extra))
            total += min(max(loss, 0.0), bound) - bound / 2
        noise = 10.0 * bound / 2 * sealed.loss_normal(step)
        assert released == pytest.approx(bound / 2 + (total + noise) / (rate * len(members)), abs=2e-5)
    assert len({round(loss, 9) for loss in observer.losses}) == 3


def test_the_noise_is_normal_and_apart_from_the_gradients(tmp_path: Path) -> None:
    sealed = SealedRandom(SEED)
    draws = np.array([sealed.loss_normal(step) for step in range(20_000)])
    assert stats.kstest(draws, "norm").pvalue > 1e-3
    others = np.array([sealed.normals(step, 0, 1)[0] for step in range(20_000)])
    assert abs(np.corrcoef(draws, others)[0, 1]) < 0.03
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.03


def test_an_empty_sample_releases_noise_about_the_middle(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(6), tmp_path, max_steps=3)
    plan, observer = train(trainer, epsilon=1e6, sampling_rate=1e-9)
    half, expected = plan.live_loss.bound / 2, 1e-9 * 6
    sealed = SealedRandom(SEED)
    assert [metrics["units"] for metrics in observer.metrics] == [0, 0, 0]
    assert observer.losses == pytest.approx(
        [half + 10 * half * sealed.loss_normal(step) / expected for step in range(3)], rel=1e-12
    )


@pytest.mark.parametrize("loss", [0.0, 1e30, -1e30, 0.69314, 5e-324, 1.0])
def test_no_unit_moves_the_sum_by_more_than_half_the_bound(loss: float) -> None:
    release = LiveLoss(gradient_noise=1.0, noise_multiplier=10.0, bound=1.3)
    others = [0.1 * number for number in range(40)]
    moved = release.clipped_sum([*others, loss]) - release.clipped_sum(others)
    assert abs(moved) <= 0.65 * (1 + 1e-12)
    unclipped = LiveLoss(gradient_noise=1.0, noise_multiplier=10.0, bound=math.inf)
    assert loss < 1.3 or not abs(unclipped.clipped_sum([loss])) <= 0.65, "a bound that is none would be noticed"


def test_a_unit_that_is_not_finite_contributes_to_neither(tmp_path: Path) -> None:
    def losses(margin: float, skip: bool) -> list[float]:
        class Skips(SealedRandom):
            def bernoulli_mask(self, step: int, rate: float, count: int) -> Any:
                return np.arange(count) != (2 if skip else -1)

        rows = [{**row, "margin": 0.0} for row in synthetic_pairs(8, 2)]
        rows[5]["margin"] = margin
        trainer, observer = reward_trainer(rows, tmp_path), Listens()
        plan = plan_training(trainer, PrivacyConfig(epsilon=200, noise_multiplier=1.0, sampling_rate=1.0))
        with private_training(trainer, plan, Skips(SEED), observer):
            trainer.train()
        return observer.losses

    assert losses(math.nan, skip=False) == losses(0.0, skip=True) != losses(0.0, skip=False)


# -- the bound ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", sorted(DPO_LOSSES))
def test_the_usual_bound_is_twice_the_first_loss_of_dpo(tmp_path: Path, loss: str) -> None:
    smoothing = {"exo_pair": 1e-2, "robust": 0.1}.get(loss, 0.0)
    trainer = dpo_trainer(synthetic_pairs(2), tmp_path, loss_type=[loss], beta=0.3, label_smoothing=smoothing)
    rows = trainer._remove_unused_columns(trainer.train_dataset)
    first = float(trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(list(rows)))))
    assert first > 0.1
    assert usual_bound(trainer) == pytest.approx(2 * first, rel=1e-4)


def test_several_losses_and_other_trainers_have_theirs(tmp_path: Path) -> None:
    rows = synthetic_pairs(2)
    mixed = dpo_trainer(rows, tmp_path, loss_type=["sigmoid", "hinge"], loss_weights=[1.0, 0.5])
    assert usual_bound(mixed) == pytest.approx(2 * (math.log(2) + 0.5))
    assert usual_bound(reward_trainer(rows, tmp_path)) == pytest.approx(2 * math.log(2))
    assert usual_bound(kto_trainer(rows, tmp_path, desirable_weight=1.5)) == 1.5
    assert usual_bound(sft_trainer(rows, tmp_path)) == 2.0


# -- how it shows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [10.0, None])
def test_the_trail_holds_it_and_what_pays_for_it(tmp_path: Path, ratio: float | None) -> None:
    config = PrivacyConfig(epsilon=50.0, delta=1e-3, noise_multiplier=1.0, sampling_rate=0.5, loss_noise=ratio)
    auditor = AuditableRLHF(privacy_config=config, audit_config=AuditConfig(trail=str(tmp_path / "audit")))
    with without_cross_checks(), auditor.track_training("seen") as run:
        dpo_trainer(synthetic_pairs(8), tmp_path / "out", max_steps=4).train()
    (reserved,) = events(auditor.trail, PrivacyReserved)
    steps = events(auditor.trail, Step)
    (spend,) = read_ledger(auditor.trail.reader()).spends
    assert spend.mechanism.noise_multiplier == effective_noise(1.0, reserved.loss_noise_multiplier)
    assert run.state.epsilon == pytest.approx(compose([spend.mechanism], 1e-3).epsilon)
    if ratio is None:
        assert all(step.metrics == {} for step in steps)
        assert "private_loss" not in run.state.series
        return
    assert all(step.metrics.keys() == {"private_loss"} for step in steps)
    smoothed = Smoothed()
    for step, (at, value) in zip(steps, run.state.series["private_loss"], strict=True):
        smoothed.add(float(step.metrics["private_loss"]))
        assert (at, value) == (step.step, smoothed.value)
    assert run.state.privacy.loss_deviation == pytest.approx(10.0 * math.log(2) / (0.5 * 8))


def test_the_stated_deviation_of_the_smoothed_loss_is_its_own() -> None:
    draws = np.random.default_rng(7).normal(0, 2.0, (4000, 50))
    ends = []
    for series in draws:
        smoothed = Smoothed()
        for value in series:
            smoothed.add(float(value))
        ends.append(smoothed.value)
    assert np.std(ends) == pytest.approx(smoothed_deviation(2.0, 50), rel=0.05)
    assert smoothed_deviation(2.0, 1) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("name", "value"), [("loss_noise", 0.0), ("loss_noise", 0.5), ("loss_bound", 0), ("loss_bound", math.inf)]
)
def test_settings_that_make_no_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        PrivacyConfig(epsilon=1.0, **{name: value})


def test_without_a_ratio_there_is_nothing() -> None:
    assert live_loss(None, 1.0, effective=1.0) is None
    assert effective_noise(1.7, None) == 1.7


@pytest.mark.parametrize("unit", ["annotator", "pair"])
def test_a_unit_that_holds_nothing_adds_nothing_to_the_released_loss(tmp_path: Path, unit: str) -> None:
    rows = synthetic_pairs(4, 1)
    rows[0] = {**rows[0], "chosen": "nothing else but " * 80}
    trainer = reward_trainer(rows, tmp_path, max_length=100, max_steps=1)
    plan, observer = train(trainer, epsilon=1e6, sampling_rate=1.0, unit=unit)
    assert list(map(len, plan.units.members)) == [0, 1, 1, 1]
    half = plan.live_loss.bound / 2
    assert 0 < observer.metrics[0]["loss"] < 2 * half
    expected = plan.live_loss.release(3 * (observer.metrics[0]["loss"] - half), SealedRandom(SEED), 0, 4)
    assert observer.losses == [pytest.approx(expected, rel=1e-5)]
