"""What one unit contributes, by either engine, against a float64 computation that shares no code with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.gradients import (
    DPO_FORMULAS,
    SIZES,
    STILL,
    TOLERANCE,
    Keeps,
    OneUnitPerStep,
    clip,
    clipped_by_engine,
    copied,
    dpo_truth,
    dpo_truths,
    dpo_with_units,
    error,
    kto_truth,
    norm_of,
    reward_truth,
    rows_by_annotator,
    rows_of_units,
    sft_truth,
    unit_rows,
)
from support.tiny import (
    causal_model,
    dpo_trainer,
    kto_trainer,
    lora,
    perturb,
    preferences,
    reward_model,
    reward_trainer,
    sft_trainer,
)
from support.trails import without_cross_checks

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.privacy import plan_training, private_training
from rlhf_audit_nb.privacy.supported import DPO_LOSSES
from rlhf_audit_nb.privacy.unit_gradients import clip_into

ENGINES = pytest.mark.parametrize("engine", ["loop", "rows"])


@pytest.fixture(scope="module", autouse=True)
def quick_accounting() -> Iterator[None]:
    with without_cross_checks():
        yield


@ENGINES
def test_dpo_unit_gradients_equal_float64_brute_force(tmp_path: Path, engine: str) -> None:
    trainer = dpo_with_units(tmp_path)
    assert trainer.args.gradient_checkpointing
    truths = dpo_truths(trainer)
    norms = [norm_of(truth) for truth in truths]
    bound = sorted(norms)[1] * 0.9  # one unit stays below the bound, two are clipped
    found = clipped_by_engine(trainer, bound, engine)
    for unit, truth in enumerate(truths):
        assert error(found[unit], clip(truth, bound)) <= TOLERANCE, f"unit of {SIZES[unit]} pairs"
        assert norm_of(found[unit]) <= bound * (1 + 1e-6)
    assert norm_of(found[int(np.argmin(norms))]) < bound * 0.999


@ENGINES
def test_the_comparison_notices_rows_of_the_wrong_unit(tmp_path: Path, engine: str) -> None:
    trainer = dpo_with_units(tmp_path)
    rotated = dpo_truths(trainer, rotate=1)
    found = clipped_by_engine(trainer, 1e6, engine)
    for unit, truth in enumerate(rotated):
        assert error(found[unit], truth) > 0.05, unit


def test_the_comparison_counts_missing_nan_and_zero_as_failure() -> None:
    good = {"a": torch.ones(3).double()}
    assert error(good, good) == 0
    for bad in ({"b": torch.ones(3)}, {"a": torch.tensor([1.0, math.nan, 1.0])}):
        with pytest.raises(AssertionError):
            error(bad, good)
    with pytest.raises(AssertionError):
        error(good, {"a": torch.zeros(3).double()})


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_a_unit_computed_in_chunks_has_the_same_gradient(tmp_path: Path, chunk: int) -> None:
    trainer = dpo_with_units(tmp_path, per_device_train_batch_size=chunk)
    truths = dpo_truths(trainer)
    found = clipped_by_engine(trainer, 1e6)
    for unit, truth in enumerate(truths):
        assert error(found[unit], truth) <= TOLERANCE


@pytest.mark.parametrize(("engine", "peft"), [("loop", None), ("rows", "lora"), ("loop", "lora")])
def test_reward_unit_gradients_equal_float64_brute_force(tmp_path: Path, engine: str, peft: Any) -> None:
    trainer = reward_trainer(rows_of_units(), tmp_path, peft=peft, **STILL)
    perturb(trainer.model)
    model = copied(reward_model(), trainer)
    truths = [reward_truth(model, rows) for rows in unit_rows(trainer)]
    rotated = [reward_truth(model, rows) for rows in unit_rows(trainer, rotate=1)]
    bound = sorted(norm_of(truth) for truth in truths)[1] * 0.9
    found = clipped_by_engine(trainer, bound, engine)
    for unit, truth in enumerate(truths):
        assert error(found[unit], clip(truth, bound)) <= TOLERANCE
        assert error(found[unit], clip(rotated[unit], bound)) > 0.05
        assert norm_of(found[unit]) <= bound * (1 + 1e-6)


@pytest.mark.parametrize(("engine", "chunk"), [("loop", 2), ("loop", 8), ("rows", 8)])
@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_sft_unit_gradients_equal_float64_brute_force(tmp_path: Path, engine: str, chunk: int, loss: str) -> None:
    settings = {**STILL, "loss_type": loss, "per_device_train_batch_size": chunk, "max_length": 256}
    rows = [{**row, "chosen": row["chosen"][: 40 + 9 * at]} for at, row in enumerate(rows_of_units())]
    trainer = sft_trainer(rows, tmp_path, **settings)
    perturb(trainer.model)
    model, tokens = copied(causal_model(), trainer), trainer.args.max_length
    truths = [sft_truth(model, rows, tokens, dft=loss == "dft") for rows in rows_by_annotator(trainer)]
    rotated = [sft_truth(model, rows, tokens, dft=loss == "dft") for rows in rows_by_annotator(trainer, rotate=1)]
    bound = sorted(norm_of(truth) for truth in truths)[1] * 0.9
    found = clipped_by_engine(trainer, bound, engine)
    for unit, truth in enumerate(truths):
        assert error(found[unit], clip(truth, bound)) <= TOLERANCE
        assert error(found[unit], clip(rotated[unit], bound)) > 0.05
        assert norm_of(found[unit]) <= bound * (1 + 1e-6)


@pytest.mark.parametrize(("engine", "chunk"), [("loop", 3), ("loop", 16), ("rows", 16)])
def test_kto_unit_gradients_equal_float64_brute_force(tmp_path: Path, engine: str, chunk: int) -> None:
    trainer = kto_trainer(rows_of_units(), tmp_path, **STILL, per_device_train_batch_size=chunk)
    perturb(trainer.model)
    model, reference = copied(causal_model(), trainer), causal_model().double().eval()
    settings = (trainer.beta, trainer.args.max_length)
    truths = [kto_truth(model, reference, rows, *settings) for rows in rows_by_annotator(trainer)]
    rotated = [kto_truth(model, reference, rows, *settings) for rows in rows_by_annotator(trainer, rotate=1)]
    bound = sorted(norm_of(truth) for truth in truths)[1] * 0.9
    found = clipped_by_engine(trainer, bound, engine, max_pairs_per_unit=2 * max(SIZES))
    for unit, truth in enumerate(truths):
        assert error(found[unit], clip(truth, bound)) <= TOLERANCE
        assert error(found[unit], clip(rotated[unit], bound)) > 0.05
        assert norm_of(found[unit]) <= bound * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("loss", sorted(DPO_LOSSES))
@ENGINES
def test_every_dpo_loss_has_the_gradient_of_its_formula(tmp_path: Path, engine: str, loss: str) -> None:
    smoothing = {"label_smoothing": 0.1} if loss in ("robust", "exo_pair") else {}
    trainer = dpo_with_units(tmp_path, loss_type=[loss], gradient_checkpointing=False, **smoothing)
    truths = dpo_truths(trainer, loss=loss, flips=0.1)
    bound = sorted(norm_of(truth) for truth in truths)[1] * 0.9
    found = clipped_by_engine(trainer, bound, engine)
    for unit, truth in enumerate(truths):
        assert error(found[unit], clip(truth, bound)) <= 10 * TOLERANCE, f"unit of {SIZES[unit]} pairs"
        assert norm_of(found[unit]) <= bound * (1 + 1e-6)


def test_there_is_a_formula_for_every_dpo_loss_that_is_accepted() -> None:
    assert set(DPO_FORMULAS) == DPO_LOSSES


def test_full_fine_tuning_with_tied_weights_keeps_the_bound_and_the_gradient(tmp_path: Path) -> None:
    trainer = dpo_with_units(tmp_path, model=causal_model(tie_word_embeddings=True), peft=None)
    model = copied(causal_model(tie_word_embeddings=True), trainer)
    truths = [dpo_truth(model, causal_model().double().eval(), rows, trainer.beta, 96) for rows in unit_rows(trainer)]
    bound = min(norm_of(truth) for truth in truths) * 0.5
    found = clipped_by_engine(trainer, bound)
    for unit, truth in enumerate(truths):
        assert error(found[unit], clip(truth, bound)) <= TOLERANCE
        assert norm_of(found[unit]) == pytest.approx(bound, rel=1e-6)
        assert norm_of(found[unit]) <= bound * (1 + 1e-6)


@pytest.mark.parametrize(
    ("engine", "changes"),
    [
        ("loop", {"bf16": True}),
        ("loop", {"peft": lora(use_dora=True)}),
        ("loop", {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        ("loop", {"gradient_checkpointing": False}),
        ("loop", {"loss_type": ["robust"], "label_smoothing": 0.1}),
        ("loop", {"peft": lora(lora_dropout=0.3), "disable_dropout": False}),
        ("rows", {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        ("rows", {"gradient_checkpointing": False}),
        ("rows", {"peft": lora(use_rslora=True, lora_bias=True)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_contribution_never_exceeds_the_bound(tmp_path: Path, engine: str, changes: dict[str, Any]) -> None:
    trainer = dpo_with_units(tmp_path, **changes)
    found = clipped_by_engine(trainer, 1e-3, engine)
    for gradient in found:
        assert norm_of(gradient) == pytest.approx(1e-3, rel=1e-6)
        assert norm_of(gradient) <= 1e-3 * (1 + 1e-6)


def test_a_gradient_near_the_end_of_float32_is_held_to_the_bound_too() -> None:
    weight = torch.nn.Parameter(torch.zeros(100_000))
    weight.grad = torch.full_like(weight, 3e38)
    total = torch.zeros(weight.shape, dtype=torch.float64)
    assert clip_into([weight], [total], 1e-3) > 1e40
    assert 0.999e-3 < float(total.norm()) <= 1e-3


def test_a_model_in_bfloat16_is_summed_and_noised_in_full_precision(tmp_path: Path) -> None:
    trainer = dpo_with_units(tmp_path, model=causal_model().to(torch.bfloat16), peft=None, bf16=True)
    found = clipped_by_engine(trainer, 1e-3)
    for gradient in found:
        assert norm_of(gradient) == pytest.approx(1e-3, rel=5e-3)  # rounded to bfloat16 only after the noise


def test_at_most_k_pairs_of_a_unit_enter_and_they_change_from_step_to_step(tmp_path: Path) -> None:
    rows = [{**row, "annotator_id": "one"} for row in preferences(24)[::3]]

    class SameUnit(OneUnitPerStep):
        def bernoulli_mask(self, step: int, rate: float, count: int) -> Any:
            return np.ones(count, dtype=bool)

    seen: list[Any] = []

    class Observer:
        def on_private_step(self, step: int, epsilon: float, metrics: dict[str, Any]) -> None:
            seen.append(metrics)

    trainer = dpo_trainer(rows, tmp_path, **{**STILL, "max_steps": 4})
    perturb(trainer.model)
    keeps = Keeps()
    trainer.add_callback(keeps)
    config = PrivacyConfig(epsilon=1e6, noise_multiplier=1.0, sampling_rate=1.0, max_pairs_per_unit=3)
    with private_training(trainer, plan_training(trainer, config), SameUnit(bytes(32)), Observer()):
        trainer.train()
    assert [metrics["pairs"] for metrics in seen] == [3, 3, 3, 3]
    assert len({round(norm_of(gradient), 9) for gradient in keeps.gradients}) > 1


@ENGINES
def test_half_of_the_data_weighs_no_more_than_one_pair(tmp_path: Path, engine: str) -> None:
    rows = preferences(36)[::3]
    owners = ["big"] * 6 + [f"small-{number}" for number in range(6)]
    rows = [{**row, "annotator_id": owner} for row, owner in zip(rows, owners, strict=True)]
    trainer = dpo_trainer(rows, tmp_path, **{**STILL, "max_steps": 7})
    perturb(trainer.model)
    found = clipped_by_engine(trainer, 1e-4, engine, micro_batch=6)
    assert len(found) == 7
    assert all(norm_of(gradient) <= 1e-4 * (1 + 1e-6) for gradient in found)


@ENGINES
def test_the_same_pair_many_times_weighs_no_more_than_once(tmp_path: Path, engine: str) -> None:
    pair = preferences(1)[0]
    rows = [{**pair, "annotator_id": "copies"} for _ in range(6)] + [{**pair, "annotator_id": "single"}]
    rows += [{**row, "annotator_id": "another"} for row in preferences(3)[2:]]
    trainer = dpo_trainer(rows, tmp_path, **STILL)
    perturb(trainer.model)
    copies, single, _ = clipped_by_engine(trainer, 1e6, engine)
    assert error(copies, single) <= TOLERANCE


def test_one_units_dropout_does_not_depend_on_who_came_before(tmp_path: Path) -> None:
    rows = rows_of_units()

    class OneStep(OneUnitPerStep):
        chosen: tuple[int, ...] = ()

        def bernoulli_mask(self, step: int, rate: float, count: int) -> Any:
            return np.isin(np.arange(count), self.chosen)

    def summed(*units: int) -> dict[str, torch.Tensor]:
        trainer = dpo_trainer(
            rows, tmp_path, peft=lora(lora_dropout=0.4), disable_dropout=False, **{**STILL, "max_steps": 1}
        )
        perturb(trainer.model)
        random = OneStep(bytes(32))
        random.chosen = units
        keeps = Keeps()
        trainer.add_callback(keeps)
        config = PrivacyConfig(epsilon=1e6, noise_multiplier=1.0, sampling_rate=1.0, clipping_norm=1e6)
        with private_training(trainer, plan_training(trainer, config), random):
            trainer.train()
        return {name: grad * len(SIZES) for name, grad in keeps.gradients[0].items()}

    first, last, both = summed(0), summed(2), summed(0, 2)
    parts = {name: first[name] + last[name] for name in both}
    assert error(both, parts) <= TOLERANCE


def test_every_accepted_dpo_loss_keeps_pairs_apart_and_the_refused_ones_do_not(tmp_path: Path) -> None:
    data = [
        {
            **row,
            "prompt": row["prompt"][:20],
            "chosen": row["chosen"][: 60 - 3 * (number % 4)],
            "rejected": row["rejected"][:60],
        }
        for number, row in enumerate(rows_of_units())
    ]
    trainer = dpo_trainer(data, tmp_path)
    perturb(trainer.model, scale=0.3)
    trainer.label_smoothing = 0.1
    rows = [trainer.train_dataset[row] for row in range(8)]

    def gradient(part: list[Any]) -> dict[str, torch.Tensor]:
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(part))).backward()
        return {n: p.grad.double().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    for loss in (*sorted(DPO_LOSSES), "aot", "aot_unpaired", "sft"):
        trainer.loss_types = [loss]
        alone = [gradient([row]) for row in rows]
        mean = {name: sum(item[name] for item in alone) / len(rows) for name in alone[0]}
        distance = error(gradient(rows), mean)
        if loss in DPO_LOSSES:
            assert distance <= TOLERANCE, loss
        else:
            assert distance > 1e-3, loss
