"""Units' gradients twice: as an engine contributes them, and from the written formula in float64.

The engine is driven through ``trainer.train()`` on real TRL trainers, with a sealed generator that gives no noise and
a learning rate of 0, so that weights stay and the private gradient of a step can be read. The loop is read one unit a
step. The rows engine is shown all units but one in each step, and a unit's contribution follows by subtraction: alone
in a step, a unit would be left to the loop.

The truth is computed pair by pair, without padding, in float64, from the formula of the loss and a fresh copy of the
model. It shares no code with the engine or with TRL.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.tiny import causal_model, dpo_trainer, lora, perturb, preferences
from torch.nn import functional
from transformers import TrainerCallback

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.privacy import SealedRandom, plan_training, private_training
from rlhf_audit_nb.privacy.engine_choice import LOOP, ROWS

SIZES = (1, 2, 5)
TOLERANCE = 1e-5


class OneUnitPerStep(SealedRandom):
    """Step t samples unit t alone, takes all its pairs, and adds no noise."""

    def bernoulli_mask(self, step: int, rate: float, count: int) -> Any:
        return np.arange(count) == step

    def normals(self, step: int, tensor: int, count: int) -> Any:
        return np.zeros(count)


class AllButOnePerStep(OneUnitPerStep):
    """Step t samples all units but unit t."""

    def bernoulli_mask(self, step: int, rate: float, count: int) -> Any:
        return np.arange(count) != step


class Watches:
    """An observer that keeps the private metrics."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, Any]] = []

    def on_private_step(self, step: int, epsilon: float, metrics: dict[str, Any]) -> None:
        self.metrics.append(metrics)


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


def clipped_by_engine(trainer: Any, bound: float, engine: str = "loop", **config: Any) -> list[dict[str, torch.Tensor]]:
    """Each unit's contribution as it stands in ``.grad``, times the expected number of units."""
    settings = {"epsilon": 1e6, "noise_multiplier": 1.0, "sampling_rate": 1.0, "clipping_norm": bound, **config}
    plan = plan_training(trainer, PrivacyConfig(engine=engine, **settings))
    keeps, watches = Keeps(), Watches()
    trainer.add_callback(keeps)
    random = OneUnitPerStep(bytes(32)) if engine == "loop" else AllButOnePerStep(bytes(32))
    try:
        with private_training(trainer, plan, random, watches, fell_back=_not_allowed):
            trainer.train()
    finally:
        trainer.remove_callback(keeps)
    assert plan.engine.engine == {"loop": LOOP, "rows": ROWS}[engine]
    assert not any("engine" in metrics for metrics in watches.metrics)
    assert len(keeps.gradients) == len(plan.units)
    seen = [{name: grad * plan.expected_units for name, grad in gradients.items()} for gradients in keeps.gradients]
    return seen if engine == "loop" else _left_out(seen)


def _left_out(seen: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """What each of the sums lacks, out of sums that each leave one unit out."""
    total = {name: sum(part[name] for part in seen) / (len(seen) - 1) for name in seen[0]}
    return [{name: total[name] - part[name] for name in total} for part in seen]


def _not_allowed(engine: str, reason: str) -> None:
    raise AssertionError(f"fell back to the {engine}: {reason}")


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


@dataclass(frozen=True)
class Pair:
    """What a DPO loss is made of: log-ratios of policy to reference, and lengths in tokens, of both answers."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_length: int
    rejected_length: int

    @property
    def delta(self) -> torch.Tensor:
        return self.chosen - self.rejected

    @property
    def average(self) -> torch.Tensor:
        return self.chosen / self.chosen_length - self.rejected / self.rejected_length


def _discopop(pair: Pair, beta: float, _: float) -> torch.Tensor:
    logits = beta * pair.delta
    share = torch.sigmoid(logits / 0.05)
    return (1 - share) * -log_sigmoid(logits) + share * torch.exp(-logits)


def _exo(pair: Pair, beta: float, flips: float) -> torch.Tensor:
    chance, other = torch.sigmoid(beta * pair.delta), torch.sigmoid(-beta * pair.delta)
    return chance * torch.log(chance / (1 - flips)) + other * torch.log(other / flips)


log_sigmoid = functional.logsigmoid
DPO_FORMULAS: dict[str, Callable[[Pair, float, float], torch.Tensor]] = {
    "sigmoid": lambda pair, beta, _: -log_sigmoid(beta * pair.delta),
    "sigmoid_norm": lambda pair, beta, _: -log_sigmoid(beta * pair.average),
    "hinge": lambda pair, beta, _: torch.relu(1 - beta * pair.delta),
    "ipo": lambda pair, beta, _: (pair.average - 1 / (2 * beta)) ** 2,
    "robust": lambda pair, beta, flips: (
        (flips * log_sigmoid(-beta * pair.delta) - (1 - flips) * log_sigmoid(beta * pair.delta)) / (1 - 2 * flips)
    ),
    "exo_pair": _exo,
    "nca_pair": lambda pair, beta, _: (
        -log_sigmoid(beta * pair.chosen) - 0.5 * (log_sigmoid(-beta * pair.chosen) + log_sigmoid(-beta * pair.rejected))
    ),
    "bco_pair": lambda pair, beta, _: -log_sigmoid(beta * pair.chosen) - log_sigmoid(-beta * pair.rejected),
    "sppo_hard": lambda pair, beta, _: (pair.chosen - 0.5 / beta) ** 2 + (pair.rejected + 0.5 / beta) ** 2,
    "apo_zero": lambda pair, beta, _: 1 - torch.sigmoid(beta * pair.chosen) + torch.sigmoid(beta * pair.rejected),
    "apo_down": lambda pair, beta, _: torch.sigmoid(beta * pair.chosen) + 1 - torch.sigmoid(beta * pair.delta),
    "discopop": _discopop,
}
"""Each DPO loss as its paper has it: of a pair, beta, and the label smoothing."""


def dpo_truth(
    model: Any,
    reference: Any,
    rows: list[Any],
    beta: float,
    length: int,
    loss: str = "sigmoid",
    flips: float = 0.0,
) -> dict[str, torch.Tensor]:
    """The gradient of the mean DPO loss over ``rows``, from the formula."""
    model.zero_grad()
    for row in rows:
        prompt = row["prompt_ids"]
        answers = [row[key][: length - len(prompt)] for key in ("chosen_ids", "rejected_ids")]
        ratios = []
        for answer in answers:
            with torch.no_grad():
                base = log_probability(reference, prompt, answer)
            ratios.append(log_probability(model, prompt, answer) - base)
        pair = Pair(*ratios, *(len(answer) for answer in answers))
        (DPO_FORMULAS[loss](pair, beta, flips) / len(rows)).backward()
    return gradients_of(model)


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    """Copies of what stands in ``.grad`` of all that is trained."""
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


def dpo_truths(trainer: Any, rotate: int = 0, **formula: Any) -> list[dict[str, torch.Tensor]]:
    """The truth of each unit of a trainer of `dpo_with_units`; with ``rotate``, of its neighbours' rows."""
    model = copied(causal_model(), trainer)
    reference = causal_model().double().eval()
    length = trainer.args.max_length
    return [dpo_truth(model, reference, rows, trainer.beta, length, **formula) for rows in unit_rows(trainer, rotate)]
