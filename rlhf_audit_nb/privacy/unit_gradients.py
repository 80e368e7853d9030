"""How each unit's clipped gradient comes into the sums: what any gradient engine keeps, and the loop. Floor 2.

A `GradientEngine` is handed the sampled rows of a step, in groups that are each clipped as one, and adds to the
`Sums` every group's gradient, scaled as a whole to an L2 norm of at most C. `LoopEngine` is the reference: it computes
the trainer's own loss over one group after the other, in chunks of the per-device batch size, which is exact because
the loss is a mean over rows, or for SFT a sum over tokens divided by a public constant (`token_normaliser`).

A sum in float64 keeps one unit's influence on it at C to 1e-9 of C whatever else is in the sample; in float32 the
rounding of the sum would depend on everybody. A group whose loss or gradient is not finite contributes nothing, and
neither does one whose loss cannot be computed at all: that a training ends would tell of her rows as surely as a
printed loss. What is at fault in the set-up, and not in somebody's rows, is found before by a row that is made up
(`probe`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rlhf_audit_nb.errors import AuditError, UnsupportedTrainerError
from rlhf_audit_nb.privacy.engine_choice import LOOP

__all__ = [
    "Buffer",
    "GradientEngine",
    "LoopEngine",
    "Sampled",
    "Seen",
    "Sums",
    "clip_into",
    "clip_units_into",
    "own_generators",
    "probe",
    "refuse_gradient_hooks",
    "refuse_moved_buffers",
    "watch_buffers",
]

_MARGIN = 1 - 2.0**-22  # so that rounding cannot lift a clipped gradient above C


@dataclass(frozen=True, slots=True)
class Sampled:
    """What is clipped as one: rows of the prepared data, and the seed of their dropout masks."""

    rows: tuple[int, ...]
    seed: int


class GradientEngine(Protocol):
    """Computes the gradients of what a step sampled; it neither samples nor adds noise."""

    @property
    def name(self) -> str:
        """How the reservation and the report call it."""

    def add(self, trainer: Any, model: torch.nn.Module, sampled: Sequence[Sampled], sums: Sums, seen: Seen) -> None:
        """Add to ``sums``, which are zero, the clipped gradient of each of ``sampled``, and tell ``seen`` of it.

        It runs inside `own_generators`, and may use ``.grad`` as it likes; the caller clears it.
        """


class Sums:
    """The clipped gradients' sum over a step, float64, one tensor for each trainable parameter.

    Args:
        parameters: all that is trained.
        bound: C, the L2 norm of the most that one addition can weigh.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], bound: float) -> None:
        self.parameters = parameters
        self.bound = bound
        self.tensors = [torch.zeros(p.shape, dtype=torch.float64, device=_sum_device(p)) for p in parameters]

    def zero(self) -> None:
        """Begin a step."""
        for total in self.tensors:
            total.zero_()

    def add_grad(self) -> float:
        """Clip what stands in ``.grad`` and add it; the norm before clipping is returned (see `clip_into`)."""
        return clip_into(self.parameters, self.tensors, self.bound)


class Seen:
    """What a step saw of its units: private, every number of it."""

    def __init__(self) -> None:
        self.notes: dict[str, float | int | str] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the units, not the notes: they are computed again."""
        self.pairs: list[int] = []
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.clipped = 0
        self.failed = 0
        self.first_error: str | None = None

    def fail(self, pairs: int, error: Exception) -> None:
        """A unit whose loss could not be computed, which contributes nothing; the error's text may quote its rows.

        Raises:
            Exception: ``error`` itself where it is not about a unit's rows: ours, or the machine's memory.
        """
        if isinstance(error, AuditError | MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise error
        self.pairs.append(pairs)
        self.failed += 1
        self.first_error = self.first_error or f"{type(error).__name__}: {error}"

    def add(self, pairs: int, loss: float, norm: float, bound: float) -> None:
        """One more unit: its rows, its loss, its gradient's norm before clipping to ``bound``."""
        self.pairs.append(pairs)
        if math.isfinite(norm):
            self.losses.append(loss)
            self.norms.append(norm)
            self.clipped += norm > bound

    def summary(self) -> dict[str, float | int | str]:
        """The step's private metrics."""
        finite = len(self.norms)
        out: dict[str, float | int | str] = {
            "units": len(self.pairs),
            "pairs": sum(self.pairs),
            "non_finite_units": len(self.pairs) - finite - self.failed,
            **self.notes,
        }
        if self.first_error is not None:
            out |= {"failed_units": self.failed, "unit_error": self.first_error}
        if finite:
            out |= {
                "loss": sum(self.losses) / finite,
                "unit_norm_mean": sum(self.norms) / finite,
                "unit_norm_max": max(self.norms),
                "clipped_fraction": self.clipped / finite,
            }
        return out


class LoopEngine:
    """The reference: one unit after the other, by the trainer's own loss.

    Args:
        data: the prepared rows, by number.
        tokens: what a loss that sums over tokens is divided by; ``None`` for one that is a mean over rows.
        micro_batch: rows of the data that go through the model at once.
    """

    name = LOOP

    def __init__(self, data: Any, tokens: int | None, micro_batch: int) -> None:
        self._data = data
        self._tokens = tokens
        self._micro_batch = micro_batch

    def add(self, trainer: Any, model: torch.nn.Module, sampled: Sequence[Sampled], sums: Sums, seen: Seen) -> None:
        """See `GradientEngine.add`."""
        for item in sampled:
            for parameter in sums.parameters:
                parameter.grad = None
            torch.manual_seed(item.seed)
            try:
                loss = self.gradient(trainer, model, item.rows)
            except Exception as error:
                seen.fail(len(item.rows), error)
                continue
            norm = sums.add_grad() if math.isfinite(loss) else math.nan
            seen.add(len(item.rows), loss, norm, sums.bound)

    def gradient(self, trainer: Any, model: torch.nn.Module, rows: Sequence[int]) -> float:
        """Leave the gradient of the mean loss over ``rows`` in ``.grad``; returns that loss (private)."""
        public = {} if self._tokens is None else {"num_items_in_batch": self._tokens}
        mean = 0.0
        for start in range(0, len(rows), self._micro_batch):
            part = rows[start : start + self._micro_batch]
            inputs = trainer._prepare_inputs(trainer.data_collator([self._data[row] for row in part]))  # noqa: SLF001
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, inputs, **public)
            share = loss * ((len(part) if self._tokens is None else 1) / len(rows))
            share.backward()
            mean += float(share.detach())
        return mean


def clip_into(parameters: list[torch.nn.Parameter], sums: list[torch.Tensor], bound: float) -> float:
    """Add the gradient that stands in ``.grad``, scaled as a whole to an L2 norm of at most ``bound``, to ``sums``.

    Returns:
        The norm before clipping. Where it is not finite, nothing is added.
    """
    norms = [
        torch.linalg.vector_norm(parameter.grad.detach().to(total.device), dtype=torch.float64).to(sums[0].device)
        for parameter, total in zip(parameters, sums, strict=True)
        if parameter.grad is not None
    ]
    norm = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
    if not math.isfinite(norm):
        return norm
    scale = 1.0 if norm <= bound * _MARGIN else bound * _MARGIN / norm
    for parameter, total in zip(parameters, sums, strict=True):
        if parameter.grad is not None:  # not scaled in float32, which has no exact number below 1e-38 for the factor
            total.add_(parameter.grad.detach().to(total.device), alpha=scale)
    return norm


def clip_units_into(gradients: Mapping[int, torch.Tensor], sums: Sums, finite: Sequence[bool]) -> list[float]:
    """As `clip_into`, for many units at once.

    Args:
        gradients: by the parameter's place among ``sums.parameters``: (units, *shape); a place may be absent.
        sums: where they are added.
        finite: for each unit, whether its loss is; the others add nothing.

    Returns:
        Each unit's norm before clipping, in order.
    """
    device = sums.tensors[0].device
    squares = torch.zeros(len(finite), dtype=torch.float64, device=device)
    for gradient in gradients.values():
        squares += torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64).to(device).square()
    norms = [norm if good else math.nan for norm, good in zip(squares.sqrt().tolist(), finite, strict=True)]
    limit = sums.bound * _MARGIN
    kept = [unit for unit, norm in enumerate(norms) if math.isfinite(norm)]
    factors = torch.tensor([min(1.0, limit / max(norms[unit], limit)) for unit in kept], dtype=torch.float64)
    for place, gradient in gradients.items():
        total = sums.tensors[place]
        part = (gradient if len(kept) == len(norms) else gradient[kept]).flatten(1).to(total.device)
        total.view(-1).addmv_(part.double().t(), factors.to(total.device))
    return norms


def probe(trainer: Any, model: torch.nn.Module, data: Any, tokens: int | None) -> None:
    """Compute the loss and the gradient of one made-up row, so that a broken set-up is told before any real row is.

    It has the columns of ``data`` and the tokenizer's last token in it. Leaves ``.grad`` cleared; run it inside
    `own_generators`.

    Raises:
        UnsupportedTrainerError: it cannot be computed; with the library's own words, which quote nobody's data.
    """
    last = len(trainer.processing_class) - 1
    row = {name: _made_up(name, feature, last) for name, feature in data.features.items()}
    try:
        LoopEngine([row], tokens, 1).gradient(trainer, model, [0])
    except (AuditError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedTrainerError(
            f"The loss of a made-up row cannot be computed ({type(error).__name__}: {error}); nothing was trained.",
            next_step=f"Mend the set-up: do the model's embeddings hold all {last + 1} tokens of the tokenizer, and do "
            "the trainer, the model and the data's columns belong together?",
            code="set-up",
        ) from error
    finally:
        model.zero_grad(set_to_none=True)


def _made_up(name: str, feature: Any, last: int) -> Any:
    """A value of a column's type that is nobody's: a few tokens, zero, true, or an empty text."""
    if not hasattr(feature, "dtype") or hasattr(feature, "feature"):
        return [1] * 4 if name.endswith("mask") else [1, last, 1, last]
    kind = str(feature.dtype)
    return {"bool": True, "string": ""}.get(kind, 0.0 if kind.startswith("float") else 1)


def refuse_gradient_hooks(parameters: list[torch.nn.Parameter]) -> None:
    """Refuse parameters whose raw gradients somebody watches."""
    for parameter in parameters:
        if getattr(parameter, "_backward_hooks", None) or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise UnsupportedTrainerError(
                "A hook on a parameter sees gradients before they are clipped and noised; nothing was trained.",
                next_step="Remove it (an optimizer that works inside the backward pass, a gradient watcher).",
                code="gradient-hook",
            )


def _sum_device(parameter: torch.nn.Parameter) -> torch.device:
    """Where the float64 sum lives: with the parameter, or on the CPU where the device has no float64."""
    return torch.device("cpu") if parameter.device.type == "mps" else parameter.device


@dataclass(frozen=True, slots=True)
class Buffer:
    """A buffer of the model as it was: where it is, the tensor, and how often that was written to."""

    module: torch.nn.Module
    name: str
    tensor: torch.Tensor
    version: int


def watch_buffers(model: torch.nn.Module) -> list[Buffer]:
    """The model's buffers as they are, for `refuse_moved_buffers`."""
    return [
        Buffer(module, name, tensor, tensor._version)  # noqa: SLF001 - torch's own count of writes
        for module in model.modules()
        for name, tensor in module.named_buffers(recurse=False)
    ]


def refuse_moved_buffers(buffers: list[Buffer]) -> None:
    """A buffer that a forward pass changes carries data from one unit to the next, and into the saved model."""
    for item in buffers:
        now = getattr(item.module, item.name)
        if now is not item.tensor or now._version != item.version:  # noqa: SLF001
            raise UnsupportedTrainerError(
                f"The model's buffer {item.name!r} ({type(item.module).__name__}) changes with the data that passes "
                "through it, which would carry data from one unit to the next; training was aborted.",
                next_step="Use a model without running statistics.",
                code="moving-buffer",
            )


@contextlib.contextmanager
def own_generators() -> Iterator[None]:
    """Seed torch freely inside; its global generators are as before afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        yield
