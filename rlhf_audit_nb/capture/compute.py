"""The compute of a training, counted from outside: which passes, over how many tokens, for how long. Floor 2.

Hooks on the models of a trainer see the shape of every forward pass and whether a gradient is wanted; nothing is
computed twice and no device is waited for. From the shapes follows a band of FLOP for each pass:

*high*  2 P D + 4 W S L for a forward pass: P all parameters, D all positions (padding too), W the width of attention,
        S the pairs of positions that it compares, L the layers. An update is three times that, which with the first
        term alone is the usual 6 P D.
*low*   2 P' D' for a forward pass: P' the parameters of matrices that every token passes, without the tables of tokens
        at either end (the last one may be applied to a part of the positions), D' the positions that are not padding,
        and nothing for attention. An update adds 2 D' for each of those parameters behind the first block that learns
        (gradients of activations), and 2 D' for each that learns. For an adapter 6 P D is therefore the upper end.

What gradient checkpointing computes again is in neither (paragraph 119 of the Commission's guidelines leaves it out).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from rlhf_audit_nb.capture.energy import EnergyMeter, nvml_counters, rapl_counters
from rlhf_audit_nb.capture.flop import forward_band, update_band
from rlhf_audit_nb.events import ComputeRecorded, ComputeRecordedPrivate, ModelShape, Passes

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.run import Run

__all__ = ["PassMeter", "measuring", "model_shape"]

_BLOCK = re.compile(r"\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.")


# --- shapes and bands ------------------------------------------------------------------------------------------------


def model_shape(model: Any) -> ModelShape:
    """What of ``model`` decides how many operations a token takes."""
    config = _text_config(getattr(model, "config", None))
    tables = [id(table.weight) for table in _token_tables(model)]
    ends, entrance = set(tables), tables[0] if tables else None
    share = _expert_share(config)
    order = [(name, parameter, _size(parameter)) for name, parameter in model.named_parameters()]
    first = next((_block(name) if id(parameter) not in ends else None
                  for name, parameter, _ in order if parameter.requires_grad), None)  # fmt: skip
    opens = any(parameter.requires_grad and id(parameter) == entrance for _, parameter, _ in order)
    dense = backward = learning = 0.0
    for name, parameter, size in order:
        if id(parameter) in ends or parameter.dim() < 2:  # noqa: PLR2004 (a matrix, or several)
            continue
        passed = size * share if _EXPERT.search(name) else float(size)
        dense += passed
        learning += passed if parameter.requires_grad else 0
        here = _block(name)
        backward += passed if opens or (first is not None and here is not None and here > first) else 0
    return ModelShape(
        parameters=sum(size for *_, size in order),
        trainable=sum(size for _, parameter, size in order if parameter.requires_grad),
        dense=int(dense),
        backward=int(backward),
        learning=int(learning),
        layers=int(getattr(config, "num_hidden_layers", 0) or 0),
        width=_width(config),
    )


def _size(parameter: Any) -> int:
    """How many numbers a parameter holds, also where it is packed or spread over processes."""
    spread = getattr(parameter, "ds_numel", None)
    if spread is not None:
        return int(spread)
    if type(parameter).__name__ == "Params4bit":
        return int(parameter.numel() * 2 * parameter.element_size())
    return int(parameter.numel())


def _token_tables(model: Any) -> Iterator[Any]:
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            table = getattr(model, name)()
        except (AttributeError, NotImplementedError):
            continue
        if getattr(table, "weight", None) is not None:
            yield table


def _block(name: str) -> int | None:
    found = _BLOCK.search(name)
    return int(found[1]) if found else None


def _text_config(config: Any) -> Any:
    getter = getattr(config, "get_text_config", None)
    return getter() if getter is not None else config


def _expert_share(config: Any) -> float:
    """Which share of its experts a token is sent to."""
    chosen = getattr(config, "num_experts_per_tok", None)
    all_of_them = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return min(1.0, chosen / all_of_them) if chosen and all_of_them else 1.0


def _width(config: Any) -> int:
    hidden, heads = getattr(config, "hidden_size", 0) or 0, getattr(config, "num_attention_heads", 0) or 0
    size = getattr(config, "head_dim", None)
    return int(heads * size) if heads and size else int(hidden)


# --- counting --------------------------------------------------------------------------------------------------------


@dataclass
class _Count:
    """What one kind of pass has come to; the tokens stand on the device until they are asked for."""

    shape: ModelShape
    passes: int = 0
    positions: int = 0
    scores: int = 0
    masked: Any = 0
    unmasked: int = 0

    def add(self, rows: int, length: int, seen: int, tokens: Any) -> None:
        self.passes += 1
        self.positions += rows * length
        self.scores += rows * length * seen
        if tokens is None:
            self.unmasked += rows * length
        else:
            self.masked = self.masked + tokens


class PassMeter:
    """Counts the forward passes of models by what they are for.

    Args:
        look: whether masks may be looked at; else only shapes are, and padding counts as tokens.
    """

    def __init__(self, *, look: bool = True) -> None:
        self._look = look
        self._counts: dict[str, _Count] = {}
        self._on_pass: list[Any] = []

    def on_pass(self, listener: Any) -> None:
        """Call ``listener()`` at every pass."""
        self._on_pass.append(listener)

    @contextmanager
    def watching(self, model: Any, kind: str, shape: ModelShape | None = None) -> Iterator[None]:
        """Count the passes of ``model``: as ``kind``, or where that is ``policy`` by what each of them is for."""
        shape = shape or model_shape(model)
        handle = _inner(model).register_forward_pre_hook(
            lambda module, args, kwargs: self._saw(module, args, kwargs, kind, shape), with_kwargs=True
        )
        try:
            yield
        finally:
            handle.remove()

    def columns(self) -> dict[str, Passes]:
        """The counts so far, by column, with their bands of FLOP."""
        found = {}
        for name, count in self._counts.items():
            tokens = int(count.masked) + count.unmasked if self._look else None
            band = update_band if name == "update" else forward_band
            low, high = band(count.shape, count.positions, tokens, count.scores)
            found[name] = Passes(
                passes=count.passes,
                positions=count.positions,
                scores=count.scores,
                tokens=tokens,
                low=low,
                high=high,
            )
        return found

    def _saw(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], kind: str, shape: ModelShape) -> None:
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        inputs = args[0] if inputs is None and args else inputs
        if not isinstance(inputs, torch.Tensor) or inputs.dim() < 2:  # noqa: PLR2004 (rows and positions)
            return
        rows, length = int(inputs.shape[0]), int(inputs.shape[1])
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, torch.Tensor) else None
        seen = int(mask.shape[-1]) if mask is not None else length
        flat = self._look and mask is not None and mask.shape == inputs.shape[:2]
        name = _column(module, kwargs) if kind == "policy" else kind
        count = self._counts.setdefault(name, _Count(shape))
        count.add(rows, length, seen, mask.detach().sum() if flat and mask is not None else None)
        for listener in self._on_pass:
            listener()


def _column(module: Any, kwargs: dict[str, Any]) -> str:
    """What a pass of the model that is trained is for."""
    if torch.is_grad_enabled():
        return "update"
    if not module.training:
        return "evaluation"
    # Sampling hands the cache of what came before to every pass; nothing else does.
    return "generation" if kwargs.get("past_key_values") is not None else "scoring"


def _inner(model: Any) -> Any:
    """The module that every way through a model passes once: below heads, adapters and wrappers."""
    plain = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    return getattr(plain, "base_model", plain)


# --- one training ----------------------------------------------------------------------------------------------------


@contextmanager
def measuring(run: Run, trainer: Any, *, private: bool) -> Iterator[None]:
    """Measure what ``trainer`` does meanwhile, and record it in ``run`` however it ends."""
    shape = model_shape(trainer.model)
    notes: list[str] = []
    uncounted: list[str] = []
    meter, energy = PassMeter(look=not private), EnergyMeter([*rapl_counters(), *nvml_counters()])
    meter.on_pass(energy.sample)
    name = type(trainer).__name__
    with ExitStack() as stack:
        if getattr(trainer.args, "torch_compile", False):
            notes.append("the model was compiled, so its passes were not counted")
        else:
            for model, kind in _models(trainer):
                stack.enter_context(meter.watching(model, kind, shape if kind == "policy" else None))
        if getattr(trainer, "use_vllm", False):
            notes.append("sampling ran in vLLM and was not counted")
            uncounted.append("generation")
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            measured = ComputeRecordedPrivate(
                columns=meter.columns(),
                seconds=seconds,
                energy=energy.joules(),
                transformers_flos=float(getattr(trainer.state, "total_flos", 0) or 0) or None,
            )
            event = ComputeRecorded(
                trainer=name,
                shape=shape,
                device=str(trainer.args.device.type),
                processes=int(trainer.args.world_size),
                devices=int(trainer.args.world_size) * max(1, int(trainer.args.n_gpu)),
                notes=notes,
                uncounted=uncounted,
                **({} if private else msgspec.structs.asdict(measured)),
            )
            run.record(event, measured if private else None)


def _models(trainer: Any) -> Iterator[tuple[Any, str]]:
    """The models of a trainer with what their passes are: each module once."""
    named = [(trainer.model, "policy"), (getattr(trainer, "ref_model", None), "reference")]
    named += [(getattr(trainer, "teacher_model", None), "reference")]
    rewards = getattr(trainer, "reward_funcs", None)
    named += [(reward, "reward") for reward in (rewards if isinstance(rewards, list | tuple) else [])]
    seen: set[int] = set()
    for model, kind in named:
        if isinstance(model, torch.nn.Module) and id(_inner(model)) not in seen:
            seen.add(id(_inner(model)))
            yield model, kind
