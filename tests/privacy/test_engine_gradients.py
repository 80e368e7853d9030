"""What one unit contributes, against a float64 computation that shares no code with the engine.

The engine is driven through ``trainer.train()`` on real TRL trainers. A sealed generator that gives no noise and
samples one unit per step (learning rate 0, so that weights stay) lets the private gradient of a step be read as one
unit's clipped gradient. The truth is computed pair by pair, without padding, in float64, from the written formula of
the loss and a fresh copy of the model.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
from torch.nn import functional
from transformers import TrainerCallback

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.privacy import SealedRandom, plan_training, private_training
from rlhf_audit_nb.privacy.supported import DPO_LOSSES
from rlhf_audit_nb.privacy.unit_gradients import clip_into

SIZES = (1, 2, 5)
TOLERANCE = 1e-5


class OneUnitPerStep(SealedRandom):
    """Step t samples unit t alone, takes all its pairs, and adds no noise."""

    def bernoulli_mask(self, step: int, rate: float, count: int) -> Any:
        return np.arange(count) == step

    def normals(self, step: int, tensor: int, count: int) -> Any:
        return np.zeros(count)


class Keeps(TrainerCallback):
    """Keeps the gradients that the optimizer is about to see."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients.append(
            {name: p.grad.double().clone() for name, p in model.named_parameters() if p.requires_grad}
        )


def rows_of_units() -> list[dict[str, str]]:
    """Real pairs, the annotators of which have 1, 2 and 5 of them."""
    owners = [f"unit-{unit}" for unit, size in enumerate(SIZES) for _ in range(size)]
    rows = preferences(len(owners) * 3)[::3]
    return [{**row, "annotator_id": owner} for row, owner in zip(rows, owners, strict=True)]


def clipped_by_engine(trainer: Any, bound: float, **config: Any) -> list[dict[str, torch.Tensor]]:
    """Each unit's contribution as it stands in ``.grad``, times the expected number of units."""
    settings = {"epsilon": 1e6, "noise_multiplier": 1.0, "sampling_rate": 1.0, "clipping_norm": bound, **config}
    plan = plan_training(trainer, PrivacyConfig(**settings))
    keeps = Keeps()
    trainer.add_callback(keeps)
    with private_training(trainer, plan, OneUnitPerStep(bytes(32))):
        trainer.train()
    assert len(keeps.gradients) == len(plan.units)
    return [{name: grad * plan.expected_units for name, grad in gradients.items()} for gradients in keeps.gradients]


def clip(gradient: dict[str, torch.Tensor], bound: float) -> dict[str, torch.Tensor]:
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in gradient.values()))
    return {name: grad * min(1.0, bound / norm) for name, grad in gradient.items()}


def norm_of(gradient: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(grad.square().sum()) for grad in gradient.values()))


def error(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance; NaN, an absent tensor or an all-zero truth is a failure and never a zero."""
    assert found.keys() == truth.keys()
    assert all(torch.isfinite(grad).all() for grad in [*found.values(), *truth.values()])
    assert norm_of(truth) > 1e-6
    return norm_of({name: found[name] - truth[name] for name in truth}) / norm_of(truth)


def log_probability(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    tokens = torch.tensor([prompt + completion])
    logits = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
    picked = logits.gather(-1, tokens[0, 1:, None])[:, 0]
    return picked[len(prompt) - 1 :].sum()


def dpo_truth(model: Any, reference: Any, rows: list[Any], beta: float, length: int) -> dict[str, torch.Tensor]:
    """The gradient of the mean sigmoid DPO loss over ``rows``, from the formula."""
    model.zero_grad()
    for row in rows:
        prompt = row["prompt_ids"]
        chosen, rejected = (row[key][: length - len(prompt)] for key in ("chosen_ids", "rejected_ids"))
        margin = log_probability(model, prompt, chosen) - log_probability(model, prompt, rejected)
        with torch.no_grad():
            base = log_probability(reference, prompt, chosen) - log_probability(reference, prompt, rejected)
        (-functional.logsigmoid(beta * (margin - base)) / len(rows)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def reward_truth(model: Any, rows: list[Any]) -> dict[str, torch.Tensor]:
    """The gradient of the mean Bradley-Terry loss over ``rows``, from the formula."""
    model.zero_grad()
    for row in rows:
        chosen, rejected = (
            model(input_ids=torch.tensor([row[key]])).logits[0, 0] for key in ("chosen_ids", "rejected_ids")
        )
        (-functional.logsigmoid(chosen - rejected) / len(rows)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def sft_truth(model: Any, rows: list[Any], tokens: int, *, dft: bool = False) -> dict[str, torch.Tensor]:
    """The gradient of the mean over ``rows`` of (sum of the completion's token losses) / ``tokens``."""
    model.zero_grad()
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        found = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        kept = labels != -100
        picked = found[kept].gather(-1, labels[kept][:, None])[:, 0]
        losses = -picked * picked.exp().detach() if dft else -picked
        (losses.sum() / tokens / len(rows)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def kto_truth(model: Any, reference: Any, rows: list[Any], beta: float, length: int) -> dict[str, torch.Tensor]:
    """The gradient of the mean unpaired APO-zero loss over ``rows``, from the formula."""
    model.zero_grad()
    for row in rows:
        prompt = row["prompt_ids"]
        completion = row["completion_ids"][: length - len(prompt)]
        with torch.no_grad():
            base = log_probability(reference, prompt, completion)
        chance = torch.sigmoid(beta * (log_probability(model, prompt, completion) - base))
        ((1 - chance if row["label"] else chance) / len(rows)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def rows_by_annotator(trainer: Any, rotate: int = 0) -> list[list[Any]]:
    """The prepared rows of each unit; with ``rotate``, every row under its neighbour's annotator."""
    rows = list(trainer.train_dataset)
    owners = [row["annotator_id"] for row in rows]
    units: dict[str, list[Any]] = {owner: [] for owner in owners}
    for owner, row in zip(owners, rows[rotate:] + rows[:rotate], strict=True):
        units[owner].append(row)
    return list(units.values())


def copied(model: Any, trainer: Any) -> Any:
    """A fresh model in float64 with the trainer's weights, without what TRL patched into it."""
    if hasattr(trainer.model, "peft_config"):
        from peft import get_peft_model

        model = get_peft_model(model, lora(task_type=trainer.model.peft_config["default"].task_type))
    model.load_state_dict(trainer.model.state_dict())
    frozen = {name for name, p in trainer.model.named_parameters() if not p.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return model.double().eval()


def unit_rows(trainer: Any, rotate: int = 0) -> list[list[Any]]:
    rows = list(trainer.train_dataset)
    rows = rows[rotate:] + rows[:rotate]
    bounds = np.cumsum((0, *SIZES))
    return [rows[start:stop] for start, stop in itertools.pairwise(bounds)]


STILL = {"learning_rate": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0, "max_steps": 3}


def dpo_with_units(folder: Path, **changes: Any) -> Any:
    trainer = dpo_trainer(rows_of_units(), folder, **{**STILL, **changes})
    perturb(trainer.model)
    return trainer


def dpo_truths(trainer: Any, rotate: int = 0) -> list[dict[str, torch.Tensor]]:
    model = copied(causal_model(), trainer)
    reference = causal_model().double().eval()
    length = trainer.args.max_length
    return [dpo_truth(model, reference, rows, trainer.beta, length) for rows in unit_rows(trainer, rotate)]


def test_dpo_unit_gradients_equal_float64_brute_force(tmp_path: Path) -> None:
    trainer = dpo_with_units(tmp_path)
    assert trainer.args.gradient_checkpointing
    truths = dpo_truths(trainer)
    norms = [norm_of(truth) for truth in truths]
    bound = sorted(norms)[1] * 0.9  # one unit stays below the bound, two are clipped
    found = clipped_by_engine(trainer, bound)
    for unit, truth in enumerate(truths):
        assert error(found[unit], clip(truth, bound)) <= TOLERANCE, f"unit of {SIZES[unit]} pairs"
        assert norm_of(found[unit]) <= bound * (1 + 1e-6)
    assert norm_of(found[int(np.argmin(norms))]) < bound * 0.999


def test_the_comparison_notices_rows_of_the_wrong_unit(tmp_path: Path) -> None:
    trainer = dpo_with_units(tmp_path)
    rotated = dpo_truths(trainer, rotate=1)
    found = clipped_by_engine(trainer, 1e6)
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


def test_reward_unit_gradients_equal_float64_brute_force(tmp_path: Path) -> None:
    trainer = reward_trainer(rows_of_units(), tmp_path, **STILL)
    perturb(trainer.model)
    model = copied(reward_model(), trainer)
    truths = [reward_truth(model, rows) for rows in unit_rows(trainer)]
    rotated = [reward_truth(model, rows) for rows in unit_rows(trainer, rotate=1)]
    bound = sorted(norm_of(truth) for truth in truths)[1] * 0.9
    found = clipped_by_engine(trainer, bound)
    for unit, truth in enumerate(truths):
        assert error(found[unit], clip(truth, bound)) <= TOLERANCE
        assert error(found[unit], clip(rotated[unit], bound)) > 0.05
        assert norm_of(found[unit]) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("chunk", [2, 8])
@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_sft_unit_gradients_equal_float64_brute_force(tmp_path: Path, chunk: int, loss: str) -> None:
    settings = {**STILL, "loss_type": loss, "per_device_train_batch_size": chunk, "max_length": 256}
    rows = [{**row, "chosen": row["chosen"][: 40 + 9 * at]} for at, row in enumerate(rows_of_units())]
    trainer = sft_trainer(rows, tmp_path, **settings)
    perturb(trainer.model)
    model, tokens = copied(causal_model(), trainer), trainer.args.max_length
    truths = [sft_truth(model, rows, tokens, dft=loss == "dft") for rows in rows_by_annotator(trainer)]
    rotated = [sft_truth(model, rows, tokens, dft=loss == "dft") for rows in rows_by_annotator(trainer, rotate=1)]
    bound = sorted(norm_of(truth) for truth in truths)[1] * 0.9
    found = clipped_by_engine(trainer, bound)
    for unit, truth in enumerate(truths):
        assert error(found[unit], clip(truth, bound)) <= TOLERANCE
        assert error(found[unit], clip(rotated[unit], bound)) > 0.05
        assert norm_of(found[unit]) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("chunk", [3, 16])
def test_kto_unit_gradients_equal_float64_brute_force(tmp_path: Path, chunk: int) -> None:
    trainer = kto_trainer(rows_of_units(), tmp_path, **STILL, per_device_train_batch_size=chunk)
    perturb(trainer.model)
    model, reference = copied(causal_model(), trainer), causal_model().double().eval()
    settings = (trainer.beta, trainer.args.max_length)
    truths = [kto_truth(model, reference, rows, *settings) for rows in rows_by_annotator(trainer)]
    rotated = [kto_truth(model, reference, rows, *settings) for rows in rows_by_annotator(trainer, rotate=1)]
    bound = sorted(norm_of(truth) for truth in truths)[1] * 0.9
    found = clipped_by_engine(trainer, bound, max_pairs_per_unit=2 * max(SIZES))
    for unit, truth in enumerate(truths):
        assert error(found[unit], clip(truth, bound)) <= TOLERANCE
        assert error(found[unit], clip(rotated[unit], bound)) > 0.05
        assert norm_of(found[unit]) <= bound * (1 + 1e-6)


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
    "changes",
    [
        {"bf16": True},
        {"peft": lora(use_dora=True)},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": False},
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        {"peft": lora(lora_dropout=0.3), "disable_dropout": False},
    ],
    ids=["bf16", "dora", "reentrant", "no-checkpointing", "robust", "dropout"],
)
def test_a_contribution_never_exceeds_the_bound(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = dpo_with_units(tmp_path, **changes)
    found = clipped_by_engine(trainer, 1e-3)
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


def test_half_of_the_data_weighs_no_more_than_one_pair(tmp_path: Path) -> None:
    rows = preferences(36)[::3]
    owners = ["big"] * 6 + [f"small-{number}" for number in range(6)]
    rows = [{**row, "annotator_id": owner} for row, owner in zip(rows, owners, strict=True)]
    trainer = dpo_trainer(rows, tmp_path, **{**STILL, "max_steps": 7})
    perturb(trainer.model)
    found = clipped_by_engine(trainer, 1e-4)
    assert len(found) == 7
    assert all(norm_of(gradient) <= 1e-4 * (1 + 1e-6) for gradient in found)


def test_the_same_pair_many_times_weighs_no_more_than_once(tmp_path: Path) -> None:
    pair = preferences(1)[0]
    rows = [{**pair, "annotator_id": "copies"} for _ in range(6)] + [{**pair, "annotator_id": "single"}]
    trainer = dpo_trainer(rows, tmp_path, **{**STILL, "max_steps": 2})
    perturb(trainer.model)
    copies, single = clipped_by_engine(trainer, 1e6)
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
