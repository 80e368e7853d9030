"""Per-unit gradients of Linear layers out of one pass over many rows. Floor 2.

While `collecting` is open, the covered layers' ``forward`` is one of our own: the same product, with a backward that
hands the layer's input ``x`` (rows, time, in) and the gradient of its output ``g`` (rows, time, out) to a
`UnitGradients` and none to the parameters. The gradient of a weight by row ``r`` alone is ``g_r^T x_r`` (of a bias, the
sum of ``g_r`` over time), and a unit's is the sum over its rows.

``x`` is kept by autograd's own ``save_for_backward``, so that gradient checkpointing of either kind frees it and
computes it again as it does for any layer, and nothing is left on the module. A parameter that is used in any other way
than by calling its layer (a fused or tied language head) gets an ordinary gradient beside: whoever collects has to look
for that and to refuse it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

__all__ = ["Layer", "RowsLostError", "UnitGradients", "collecting", "covering_layers", "dropout_of"]

_SEQUENCES = 3  # dimensions of what a layer is given: rows, time, features


class RowsLostError(Exception):
    """A layer was not given one row of the batch after the other, so that its gradient cannot be told apart."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A Linear layer that is trained; the numbers are places among the trainable parameters, ``None``: not trained."""

    module: torch.nn.Linear
    weight: int | None
    bias: int | None


class UnitGradients:
    """The gradients of a batch's units, gathered layer by layer: for each parameter (units, *shape), float32.

    Args:
        groups: for each row of the model's batch, the number of its unit.
        units: how many units there are.
    """

    def __init__(self, groups: torch.Tensor, units: int) -> None:
        self.by_parameter: dict[int, torch.Tensor] = {}
        self._groups = groups
        self._rows = len(groups)
        self._units = units
        self._blocks = _blocks(groups.tolist(), units)

    def take(self, layer: Layer, x: torch.Tensor, g: torch.Tensor) -> None:
        """One call of a layer went backward.

        Raises:
            RowsLostError: its input is not (rows, time, features).
        """
        if x.dim() != _SEQUENCES or g.dim() != _SEQUENCES or len(x) != self._rows or len(g) != self._rows:
            raise RowsLostError(f"a layer was given a tensor of shape {tuple(x.shape)} for {self._rows} rows")
        if layer.weight is not None:
            self._add(layer.weight, self._weights(x, g))
        if layer.bias is not None:
            self._add(layer.bias, self._summed(g.sum(1, dtype=torch.float32)))

    def _add(self, parameter: int, gradients: torch.Tensor) -> None:
        before = self.by_parameter.get(parameter)
        if before is None:
            self.by_parameter[parameter] = gradients.float()
        else:  # a layer that is called more than once in a forward pass
            before.add_(gradients)

    def _weights(self, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        g = g.to(x.dtype).transpose(1, 2)
        if self._blocks is None:
            return self._summed(torch.bmm(g, x).float())
        (first, *others) = self._blocks
        out = torch.bmm(g[first], x[first]).float()
        for block in others:
            out += torch.bmm(g[block], x[block])
        return out

    def _summed(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.new_zeros(self._units, *rows.shape[1:]).index_add_(0, self._groups, rows)


def _blocks(groups: list[int], units: int) -> list[slice] | None:
    """Slices of the rows in which every unit stands once and in order, if the rows are made of such; else nothing."""
    if len(groups) % units or groups != list(range(units)) * (len(groups) // units):
        return None
    return [slice(start, start + units) for start in range(0, len(groups), units)]


class _UnitLinear(torch.autograd.Function):
    """``x W^T + b`` whose backward tells the unit gradients and gives the parameters none."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        layer: Layer,
        gradients: UnitGradients,
    ) -> torch.Tensor:
        del anchor  # only makes the result need a gradient where the layer's input needs none
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.gradients = layer, gradients
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        ctx.gradients.take(ctx.layer, x, g)
        grad = g.matmul(weight) if ctx.needs_input_grad[1] else None
        return None, grad, None, None, None, None


def covering_layers(model: torch.nn.Module) -> list[Layer]:
    """The Linear layers that hold all of the model's trainable parameters, places counted in `parameters()`'s order.

    Raises:
        RowsLostError: one is elsewhere, is shared by two layers, or is multiplied with outside of its layer's call.
    """
    places = {id(p): place for place, p in enumerate(p for p in model.parameters() if p.requires_grad)}
    names = {id(p): name for name, p in model.named_parameters()}
    heads = _heads(model)
    found: list[Layer] = []
    taken: set[int] = set()
    for module in model.modules():
        own = {id(p) for p in module.parameters(recurse=False)} & places.keys()
        if not own:
            continue
        name = names[next(iter(own))]
        if type(module) is not torch.nn.Linear or "forward" in vars(module):
            raise RowsLostError(f"{name} is not a plain Linear layer's ({type(module).__name__})")
        if own & taken:
            raise RowsLostError(f"{name} is tied to another layer")
        if id(module) in heads:
            raise RowsLostError(f"{name} is the language head's, which TRL multiplies with outside of its layer")
        taken |= own
        found.append(Layer(module, places.get(id(module.weight)), places.get(id(module.bias))))
    if taken != places.keys():
        raise RowsLostError("a trainable parameter is in no layer")
    return found


def _heads(model: torch.nn.Module) -> set[int]:
    """The output embeddings; nothing where the model has none (a model with a score instead)."""
    find = getattr(model, "get_output_embeddings", None)
    return {id(find())} if callable(find) and find() is not None else set()


def dropout_of(model: torch.nn.Module) -> str | None:
    """Where the model draws at random while it trains, if it does."""
    for name, module in model.named_modules():
        for setting, value in vars(module).items():
            is_rate = "drop" in setting or (setting == "p" and "Dropout" in type(module).__name__)
            if is_rate and isinstance(value, float) and math.isfinite(value) and value > 0:
                return name or type(module).__name__
    return None


@contextlib.contextmanager
def collecting(layers: Sequence[Layer], gradients: UnitGradients) -> Iterator[None]:
    """While inside, what goes backward through ``layers`` goes to ``gradients``, and their parameters get nothing."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            layer.module.forward = _forward(layer, gradients)  # type: ignore[method-assign]
            stack.callback(vars(layer.module).pop, "forward")
        yield


def _forward(layer: Layer, gradients: UnitGradients) -> Any:
    module = layer.module
    anchor = torch.zeros((), device=module.weight.device, requires_grad=True)

    def forward(input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name that Linear.forward has
        weight = module.weight.detach()
        bias = None if module.bias is None else module.bias.detach()
        x = input
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x, weight = (item.to(torch.get_autocast_dtype(kind)) for item in (x, weight))
            bias = None if bias is None else bias.to(x.dtype)
        if not torch.is_grad_enabled():
            return functional.linear(x, weight, bias)
        out: torch.Tensor = _UnitLinear.apply(anchor, x, weight, bias, layer, gradients)  # type: ignore[no-untyped-call]
        return out

    return forward
