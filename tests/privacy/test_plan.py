"""Planning: rates and steps from the trainer, the budget, and what the trail is told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from support.tiny import dpo_trainer, reward_trainer, synthetic_pairs

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import BudgetExceededError, DataError, PrivacyError
from rlhf_audit_nb.events import (
    PrivacyReserved,
    PrivacySealed,
    decode_body,
    decode_private,
    encode_body,
    encode_private,
)
from rlhf_audit_nb.privacy import (
    Mechanism,
    SealedRandom,
    compose,
    plan_training,
    reserve_event,
    sealed_event,
    settle_event,
)


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    return dpo_trainer(
        synthetic_pairs(40, 2), tmp_path, max_steps=12, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )


def config(**changes: Any) -> PrivacyConfig:
    return PrivacyConfig(**{"epsilon": 8.0, "delta": 1e-5, **changes})


def test_the_rate_is_the_batch_over_the_units_and_the_noise_fits_the_budget(trainer: Any) -> None:
    plan = plan_training(trainer, config())
    assert len(plan.units) == 40
    assert plan.sampling_rate == pytest.approx(4 / 40)
    assert plan.expected_units == pytest.approx(4)
    assert plan.steps == plan.steps_asked == 12
    assert plan.steps_per_epoch == 10
    assert 7.98 < plan.epsilon <= 8.0
    assert plan.epsilon == compose([plan.mechanism], 1e-5).epsilon == plan.curve[-1]
    assert plan.curve[0] == plan.before == 0


def test_pairs_as_units_count_rows(trainer: Any) -> None:
    plan = plan_training(trainer, config(unit="pair", noise_multiplier=2.0))
    assert len(plan.units) == 80
    assert plan.sampling_rate == pytest.approx(4 / 80)


def test_a_batch_larger_than_the_roster_samples_everyone(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(5), tmp_path, per_device_train_batch_size=64)
    assert plan_training(trainer, config(noise_multiplier=5.0)).sampling_rate == 1


def test_epochs_become_steps_by_the_rate(tmp_path: Path) -> None:
    trainer = dpo_trainer(
        synthetic_pairs(10), tmp_path, max_steps=-1, num_train_epochs=3, per_device_train_batch_size=4
    )
    plan = plan_training(trainer, config(noise_multiplier=5.0))
    assert plan.steps_per_epoch == 3
    assert plan.steps == 9
    half = plan_training(trainer, config(noise_multiplier=5.0, sampling_rate=0.05))
    assert half.steps == 60


def test_a_given_noise_multiplier_cuts_the_steps_to_what_fits(trainer: Any) -> None:
    plan = plan_training(trainer, config(epsilon=3.0, noise_multiplier=0.9))
    assert 0 < plan.steps < 12
    assert plan.cut_by_budget
    assert plan.notice is not None
    assert f"{plan.steps} of the 12 steps" in plan.notice
    assert compose([plan.mechanism], 1e-5).epsilon <= 3.0
    assert compose([plan.mechanism.with_steps(plan.steps + 1)], 1e-5).epsilon > 3.0
    assert len(plan.curve) == plan.steps + 1


def test_a_budget_in_which_no_step_fits_names_what_is_spent_left_and_to_do(trainer: Any) -> None:
    prior = [Mechanism(0.9, 0.1, 12)]
    spent = compose(prior, 1e-5).epsilon
    with pytest.raises(BudgetExceededError) as caught:
        plan_training(trainer, config(epsilon=spent + 0.01, noise_multiplier=0.9), prior)
    text = str(caught.value)
    assert f"{spent:.4g} of {spent + 0.01:g}" in text
    assert "0.01 is left" in text
    for choice in ("fewer steps", "more noise", "larger budget"):
        assert choice in text
    assert caught.value.exit_code == 3


def test_a_budget_that_is_gone_refuses_calibration_too(trainer: Any) -> None:
    prior = [Mechanism(0.9, 0.1, 12)]
    with pytest.raises(BudgetExceededError, match="0 is left"):
        plan_training(trainer, config(epsilon=compose(prior, 1e-5).epsilon * 0.5), prior)


def test_a_run_may_be_given_a_part_of_the_budget(trainer: Any) -> None:
    prior = [Mechanism(1.5, 0.1, 30)]
    before = compose(prior, 1e-5).epsilon
    plan = plan_training(trainer, config(run_epsilon=1.0), prior)
    assert plan.limit == pytest.approx(before + 1.0)
    assert before + 0.95 < plan.epsilon <= before + 1.0
    assert plan.before == before


def test_replanning_on_another_ledger_needs_no_trainer(trainer: Any) -> None:
    plan = plan_training(trainer, config())
    assert plan.replanned(()) is plan
    later = plan.replanned([Mechanism(1.5, 0.1, 30)])
    assert later.noise_multiplier > plan.noise_multiplier
    assert later.epsilon <= 8.0
    assert later.units is plan.units
    with pytest.raises(BudgetExceededError):
        plan.replanned([Mechanism(0.5, 0.5, 100)])


def test_a_delta_that_is_no_protection_is_warned_of(trainer: Any) -> None:
    plan = plan_training(trainer, config(delta=0.05, noise_multiplier=1.0))
    assert any("delta is 0.05" in text and "40 annotators" in text for text in plan.warnings)
    assert not any("delta" in text for text in plan_training(trainer, config(noise_multiplier=1.0)).warnings)


def test_noise_that_drowns_the_sample_is_warned_of(trainer: Any) -> None:
    assert any(
        "little can be learnt" in text for text in plan_training(trainer, config(noise_multiplier=30.0)).warnings
    )


def test_a_misspelt_column_and_missing_ids_are_refused_before_training(tmp_path: Path) -> None:
    rows: list[Any] = synthetic_pairs(4)
    trainer = dpo_trainer(rows, tmp_path)
    with pytest.raises(DataError, match="no column 'worker'"):
        plan_training(trainer, config(annotator_column="worker"))
    assert plan_training(trainer, config(annotator_column="worker", unit="pair", noise_multiplier=5.0)).steps == 3
    rows[3] = {**rows[3], "annotator_id": None}
    with pytest.raises(DataError, match=r"Row 3 .* no annotator id"):
        plan_training(dpo_trainer(rows, tmp_path), config())


def test_that_the_trainer_dropped_every_row_is_not_told_by_a_refusal(tmp_path: Path) -> None:
    units = plan_training(reward_trainer(synthetic_pairs(3, 2), tmp_path, max_length=1), config()).units
    assert units.members == ((), (), ())


def test_streams_are_refused(tmp_path: Path) -> None:
    streaming = dpo_trainer(synthetic_pairs(3), tmp_path)
    streaming.train_dataset = streaming.train_dataset.to_iterable_dataset()
    with pytest.raises(DataError, match="stream"):
        plan_training(streaming, config())


def test_data_with_a_transform_of_its_own_is_refused(trainer: Any) -> None:
    trainer.train_dataset.set_transform(lambda rows: rows)
    with pytest.raises(DataError, match="transform") as caught:
        plan_training(trainer, config())
    assert "map" in str(caught.value.next_step)


def test_the_reservation_says_what_the_plan_is_and_nothing_of_the_rows(trainer: Any) -> None:
    plan = plan_training(trainer, config(noise_multiplier=1.0))
    event = reserve_event(plan, "reservation-1")
    body = encode_body(event)
    assert decode_body(PrivacyReserved.TYPE, body) == event
    assert event.units == 40
    assert event.column == "annotator_id"
    assert event.steps == 12
    assert event.epsilon_planned == plan.epsilon
    assert event.accountants["pld"] == plan.epsilon
    assert {"pld", "pld_grid", "prv", "rdp"} == set(event.accountants)
    assert b"person" not in body
    assert b"80" not in body.replace(b"0.80", b"")


def test_the_reservation_names_no_column_where_rows_are_the_units(trainer: Any) -> None:
    plan = plan_training(trainer, config(unit="pair", noise_multiplier=2.0))
    assert reserve_event(plan, "reservation-1").column is None


def test_the_seed_is_in_the_private_half_alone(trainer: Any) -> None:
    sealed = SealedRandom(bytes(range(32)))
    private = sealed_event(sealed)
    assert decode_private(PrivacyReserved.TYPE, encode_private(private)) == PrivacySealed(seed=bytes(range(32)).hex())
    assert bytes(range(32)).hex().encode() not in encode_body(
        reserve_event(plan_training(trainer, config(noise_multiplier=1.0)), "r")
    )


def test_settling_composes_what_ran(trainer: Any) -> None:
    prior = [Mechanism(2.0, 0.1, 10)]
    plan = plan_training(trainer, config(noise_multiplier=1.0), prior)
    event = settle_event(plan, "r", 5, stopped_by_budget=True)
    assert event.steps == 5
    assert event.stopped_by_budget
    assert event.epsilon_run == compose([plan.mechanism.with_steps(5)], 1e-5).epsilon
    assert event.epsilon_total == compose([*prior, plan.mechanism.with_steps(5)], 1e-5).epsilon
    assert settle_event(plan, "r", 0).epsilon_run == 0
    assert not math.isnan(float(event.epsilon_total))
    with pytest.raises(PrivacyError):
        settle_event(plan, "r", 13)
