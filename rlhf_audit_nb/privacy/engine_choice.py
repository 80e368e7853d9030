"""Which gradient engine a training gets, and why. Floor 2.

There are two. The loop computes one unit after the other; it serves every trainer that can be made private, and is
nearly free where a unit has several pairs. The other takes many units through the model at once and hands out each
one's gradient; it is for units of one pair, and needs everything that is trained to sit in Linear layers (LoRA does).

The choice is made from public numbers alone: the kind of unit, k, the batch size, ``max_length``, the shapes of the
parameters, the device. How many pairs the units really have is private and is not looked at. This module does not
import torch when it is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.errors import UnsupportedTrainerError

if TYPE_CHECKING:
    from rlhf_audit_nb.config import PrivacyConfig

__all__ = ["LOOP", "ROWS", "Choice", "Cost", "choose_engine", "estimate"]

LOOP = "loop over units"
ROWS = "rows summed to units"

_SINGLE = 4  # bytes of a float32
_SPARE_BYTES = 256 * 2**20
"""What the units' gradients may take beside a model of any size; beyond that, half of what its parameters take."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine by the name that the reservation gives it, and the reason, as half a sentence."""

    engine: str
    reason: str


@dataclass(frozen=True, slots=True)
class Cost:
    """The estimated time of a step by each engine, in plain steps, and the bytes of a pass's unit gradients."""

    loop: float
    rows: float
    gradient_bytes: int


def choose_engine(trainer: Any, config: PrivacyConfig) -> Choice:
    """The engine for ``trainer``.

    Raises:
        UnsupportedTrainerError: ``engine="rows"`` was asked for and cannot serve it.
    """
    if config.engine == "loop":
        return Choice(LOOP, "it was asked for")
    obstacle = _obstacle(trainer)
    if config.engine == "rows":
        if obstacle is not None:
            raise UnsupportedTrainerError(
                f'engine="rows" cannot compute this model\'s gradients: {obstacle}.',
                next_step='Write engine="loop", or leave it out.',
                code="engine",
            )
        return Choice(ROWS, "it was asked for")
    if obstacle is not None:
        return Choice(LOOP, obstacle)
    return _cheaper(trainer, config)


def estimate(*, rows_a_unit: int, micro_batch: int, trained: int, parameters: int, length: int) -> Cost:
    """What a step would cost, from public numbers.

    A rough estimate, with constants of small models on one CPU thread: a unit that goes through the model alone costs
    a good fifth of a row more than a row in a batch; handing out the units' gradients costs a tenth of a step, and each
    trained weight has to be written and read again for every unit, beside 6 ``length`` operations that it takes anyway.
    A GPU makes less of one row than of many, so there the loop is dearer than this says.

    Args:
        rows_a_unit: at most so many rows of the data are a unit's (1, or k).
        micro_batch: rows of the data in one pass.
        trained: how many parameters are trained.
        parameters: how many there are.
        length: tokens of a row, at most.
    """
    loop = 1 + 0.23 / rows_a_unit
    rows = 1.12 + 30 / length * trained / parameters
    return Cost(loop, rows, 4 * micro_batch * trained)


def _cheaper(trainer: Any, config: PrivacyConfig) -> Choice:
    whole = getattr(config, "sampled", "units") == "pairs" or config.unit != "annotator"
    rows_a_unit = 1 if whole else config.max_pairs_per_unit
    micro_batch = config.micro_batch or trainer.args.per_device_train_batch_size
    if micro_batch < 2 * rows_a_unit:
        return Choice(LOOP, f"a pass of {micro_batch} rows holds no two units of up to {rows_a_unit}")
    sizes = [(p.numel(), p.numel() * p.element_size(), p.requires_grad) for p in trainer.model.parameters()]
    cost = estimate(
        rows_a_unit=rows_a_unit,
        micro_batch=micro_batch,
        trained=sum(size for size, _, trains in sizes if trains),
        parameters=sum(size for size, _, _ in sizes),
        length=getattr(trainer.args, "max_length", None) or 1024,
    )
    if cost.gradient_bytes > max(_SPARE_BYTES, sum(taken for _, taken, _ in sizes) // 2):
        return Choice(LOOP, f"the gradients of {micro_batch} units would take {cost.gradient_bytes / 2**20:.0f} MiB")
    said = f"estimated {cost.rows:.2f} of a plain step, against {cost.loop:.2f} for the loop"
    if cost.rows < cost.loop:
        return Choice(ROWS, said)
    return Choice(LOOP, f"estimated {cost.loop:.2f} of a plain step, against {cost.rows:.2f} for rows")


def _obstacle(trainer: Any) -> str | None:
    """Why the rows engine cannot serve this trainer, if it cannot."""
    from rlhf_audit_nb.privacy.row_layers import RowsLostError, covering_layers, dropout_of

    short = any(p.element_size() < _SINGLE for p in trainer.model.parameters())
    if short or trainer.args.bf16 or _in_autocast(trainer):
        return "in half precision how a unit's gradient is rounded would depend on who else is in the batch"
    where = dropout_of(trainer.model)
    if where is not None:
        return f"the model has dropout ({where}), and a unit's masks would depend on who else is in the batch"
    try:
        covering_layers(trainer.model)
    except RowsLostError as lost:
        return str(lost)
    return None


def _in_autocast(trainer: Any) -> bool:
    """Whether the user's own code put the training into half precision."""
    import torch

    return torch.is_autocast_enabled(trainer.args.device.type)
