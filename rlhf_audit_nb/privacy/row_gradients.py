"""The vectorised engine: many units' gradients out of one pass over all their rows. Floor 2.

Units are packed whole until ``micro_batch`` rows are together. The model runs once over these rows, forward and
backward, with the covered layers handing out each unit's gradient (`row_layers`); then every unit is clipped by itself
and added to the float64 sums, as the loop does. A unit with more rows than ``micro_batch``, and one that would be alone
in its pass, is left to the loop, which computes it in chunks.

The loss is never taken over the batch. The trainer's own ``compute_loss`` runs once over all rows to call the model,
and then once for each unit with the model's outputs for that unit's rows put in the place of the model's calls
(`_Calls`). So a unit's loss and the gradient of its outputs are a function of its own rows by construction, whatever a
trainer divides by, and a loss that is not finite touches nobody else; what remains to be shown is that the model keeps
rows apart, and that the layers hand out all of their gradient: the comparison with the loop before the first step is
for that (`engine_choice`).

One thing differs from the loop: rows are padded to the longest of the pass, so how a unit's gradient is *rounded*
depends on who else is in it, by about 1e-7 of it in float32. Dropout masks cannot be kept apart in a batch, so a model
with dropout is left to the loop.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from rlhf_audit_nb.errors import AuditError
from rlhf_audit_nb.privacy.engine_choice import ROWS
from rlhf_audit_nb.privacy.row_layers import Layer, RowsLostError, UnitGradients, collecting
from rlhf_audit_nb.privacy.unit_gradients import LoopEngine, Sampled, Seen, Sums, clip_units_into

__all__ = ["RowsEngine"]


class RowsEngine:
    """See the module's text.

    Args:
        data: the prepared rows, by number.
        tokens: what a loss that sums over tokens is divided by; ``None`` for one that is a mean over rows.
        micro_batch: rows of the data that go through the model at once.
        layers: the layers that hold all that is trained, and nothing else.
    """

    name = ROWS

    def __init__(self, data: Any, tokens: int | None, micro_batch: int, layers: Sequence[Layer]) -> None:
        self._data = data
        self._tokens = tokens
        self._micro_batch = micro_batch
        self._layers = layers
        self._loop = LoopEngine(data, tokens, micro_batch)

    def add(self, trainer: Any, model: torch.nn.Module, sampled: Sequence[Sampled], sums: Sums, seen: Seen) -> None:
        """See `GradientEngine.add`.

        Raises:
            RowsLostError: a layer does not keep rows apart, or a parameter is used outside of its layer.
        """
        for units in _packed(sampled, self._micro_batch):
            if len(units) == 1:
                self._loop.add(trainer, model, units, sums, seen)
            else:
                self._try_together(trainer, model, units, sums, seen)

    def _try_together(
        self, trainer: Any, model: torch.nn.Module, units: Sequence[Sampled], sums: Sums, seen: Seen
    ) -> None:
        try:
            gradients, losses = self._together(trainer, model, units, sums)
        except (AuditError, RowsLostError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:
            self._loop.add(trainer, model, units, sums, seen)
            return
        # Out of the `try`: what fails while it is added must not be added once more by the loop.
        norms = clip_units_into(gradients.by_parameter, sums, [math.isfinite(loss) for loss in losses])
        for unit, loss, norm in zip(units, losses, norms, strict=True):
            seen.add(len(unit.rows), loss, norm, sums.bound)

    def _together(
        self, trainer: Any, model: torch.nn.Module, units: Sequence[Sampled], sums: Sums
    ) -> tuple[UnitGradients, list[float]]:
        """The units' gradients and losses out of one pass; ``sums`` only names the parameters."""
        for parameter in sums.parameters:
            parameter.grad = None
        rows = [row for unit in units for row in unit.rows]
        inputs = trainer._prepare_inputs(trainer.data_collator([self._data[row] for row in rows]))  # noqa: SLF001
        batch = _Batch(inputs, [len(unit.rows) for unit in units])
        gradients = UnitGradients(batch.groups, len(units))
        with collecting(self._layers, gradients):
            losses = self._backward(trainer, model, batch)
        if any(parameter.grad is not None for parameter in sums.parameters):
            raise RowsLostError("a parameter is used outside of its layer")
        return gradients, losses

    def _backward(self, trainer: Any, model: torch.nn.Module, batch: _Batch) -> list[float]:
        """Each unit's loss; the model has gone backward from the sum of those that are finite."""
        public = {} if self._tokens is None else {"num_items_in_batch": self._tokens}

        def compute(inputs: dict[str, Any]) -> torch.Tensor:
            with trainer.compute_loss_context_manager():
                loss: torch.Tensor = trainer.compute_loss(model, inputs, **public)
            return loss

        with _calls(trainer, model, batch) as calls:
            with _forgotten_metrics(trainer):
                compute(dict(batch.inputs))
            losses = [self._unit_loss(compute, calls, batch, unit) for unit in range(len(batch.sizes))]
        calls.backward()
        return losses

    def _unit_loss(self, compute: Callable[..., torch.Tensor], calls: _Calls, batch: _Batch, unit: int) -> float:
        calls.replay(batch.rows(unit))
        loss = compute(batch.part(unit))
        if self._tokens is not None:  # a sum over tokens: the mean over the unit's rows
            loss = loss / batch.sizes[unit]
        value = float(loss.detach())
        if math.isfinite(value):
            loss.backward()  # type: ignore[no-untyped-call]
            calls.keep(batch.rows(unit))
        return value


def _packed(sampled: Sequence[Sampled], limit: int) -> Iterator[list[Sampled]]:
    """Whole units, in order, with at most ``limit`` rows together; a larger unit, or one without rows, alone."""
    pack: list[Sampled] = []
    room = limit
    for unit in sampled:
        size = len(unit.rows)
        if size > room or not size:
            if pack:
                yield pack
            pack, room = [], limit
        if size > limit or not size:
            yield [unit]
            continue
        pack.append(unit)
        room -= size
    if pack:
        yield pack


class _Batch:
    """Prepared inputs of many rows, and which of the model's rows and of the data's rows belong to which unit.

    The model may be given several rows for one of the data: all first ones, then all second ones (chosen, rejected).
    """

    def __init__(self, inputs: dict[str, Any], sizes: Sequence[int]) -> None:
        self.inputs = inputs
        self.sizes = sizes
        self._count = sum(sizes)
        self._model_count = len(inputs["input_ids"])
        if self._model_count % self._count:
            raise RowsLostError("the rows of a batch are not those that were put in")
        self._starts = [sum(sizes[:unit]) for unit in range(len(sizes))]
        owners = [unit for unit, size in enumerate(sizes) for _ in range(size)]
        repeats = self._model_count // self._count
        self.groups = torch.tensor(owners * repeats, device=inputs["input_ids"].device)

    def rows(self, unit: int) -> torch.Tensor:
        """Places among the model's rows."""
        own = torch.arange(self._starts[unit], self._starts[unit] + self.sizes[unit], device=self.groups.device)
        return torch.cat([own + start for start in range(0, self._model_count, self._count)])

    def part(self, unit: int) -> dict[str, Any]:
        """The inputs of one unit."""
        rows = self.rows(unit)
        return {name: self._of(value, rows, unit) for name, value in self.inputs.items()}

    def _of(self, value: Any, rows: torch.Tensor, unit: int) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        if len(value) == self._model_count:
            return value[rows.to(value.device)]
        if len(value) == self._count:
            return value[self._starts[unit] : self._starts[unit] + self.sizes[unit]]
        raise RowsLostError("an input of the batch has not one entry for each row")


class _Calls:
    """What a trainer's models answered to a batch, in order, to be answered again for some of its rows."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._outputs: list[tuple[int, Any]] = []
        self._leaves: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._gradients: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._chosen: torch.Tensor | None = None
        self._next = 0

    def call(self, model: torch.nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands for a model's ``forward``."""
        if self._chosen is None:
            output = forward(*args, **kwargs)
            self._outputs.append((id(model), output))
            return output
        if self._next >= len(self._outputs) or self._outputs[self._next][0] != id(model):
            raise RowsLostError("the loss calls its models differently for some of the rows")
        output = self._outputs[self._next][1]
        self._next += 1
        return type(output)(**{name: self._part(value) for name, value in output.items()})

    def replay(self, rows: torch.Tensor) -> None:
        """From here on the calls are answered for these rows, from the first one again."""
        if self._chosen is not None and self._next != len(self._outputs):
            raise RowsLostError("the loss calls its models differently for some of the rows")
        self._chosen, self._next, self._leaves = rows, 0, []

    def keep(self, rows: torch.Tensor) -> None:
        """Take over the gradients of the outputs that the last replay led to."""
        for whole, leaf in self._leaves:
            if leaf.grad is not None:
                _, gradient = self._gradients.setdefault(id(whole), (whole, torch.zeros_like(whole)))
                gradient[rows] = leaf.grad
        self._leaves = []

    def backward(self) -> None:
        """Go backward through the model from all that was kept."""
        if self._gradients:
            outputs, gradients = zip(*self._gradients.values(), strict=True)
            torch.autograd.backward(outputs, gradients)

    def _part(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value.detach() if isinstance(value, torch.Tensor) else value
        if len(value) != self._rows:
            raise RowsLostError("an output of the model has not one entry for each row")
        assert self._chosen is not None
        part = value.detach()[self._chosen.to(value.device)]
        if value.requires_grad:
            self._leaves.append((value, part.requires_grad_()))
        return part


@contextlib.contextmanager
def _calls(trainer: Any, model: torch.nn.Module, batch: _Batch) -> Iterator[_Calls]:
    """While inside, the models that the trainer's loss calls are answered by the `_Calls`."""
    calls = _Calls(len(batch.groups))
    with contextlib.ExitStack() as stack:
        for item in {id(item): item for item in (model, trainer.model, getattr(trainer, "ref_model", None))}.values():
            if item is not None:
                stack.enter_context(_answered(item, calls))
        yield calls


@contextlib.contextmanager
def _answered(model: torch.nn.Module, calls: _Calls) -> Iterator[None]:
    own = vars(model).get("forward")  # accelerate and TRL put theirs on the instance
    forward = model.forward
    model.forward = lambda *args, **kwargs: calls.call(model, forward, *args, **kwargs)
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


@contextlib.contextmanager
def _forgotten_metrics(trainer: Any) -> Iterator[None]:
    """What the trainer measures inside is not kept: it is measured again for each unit."""
    gathered = trainer._metrics["train"]  # noqa: SLF001
    before = {name: len(values) for name, values in gathered.items()}
    yield
    for name, values in gathered.items():
        del values[before.get(name, 0) :]
