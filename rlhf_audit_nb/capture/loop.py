"""Training loops that are written by hand: what is recorded of them, and what is noticed by itself. Floor 2.

A loop says what it did after each optimizer step (`Loop.step`). What the optimizer itself shows (learning rate, norm of
the gradient, norm of the update) is measured where the step happens, by hooks that are there while a run is open; the
loop's word then claims what was measured. A step that nobody claims is counted, warned of, and told at the run's end.

The loop is a training of its run like a trainer's: it begins with ``trainer.attached``, names the data and models that
it was told of, and its model at the end, so that the lineage knows it. The base is the model as it was before the first
step; where the loop shows it only afterwards, the values before that step are taken from what the hook kept of them.

A batch's digest is SHA-256 over its values in order (`digest_batch`). All of this is in the open: a run under
differential privacy has no such loop, since nothing outside a trainer can be made private.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_audit_nb.capture.callback import UpdateNorm
from rlhf_audit_nb.capture.data import bind_data
from rlhf_audit_nb.capture.models import with_origin
from rlhf_audit_nb.capture.saving import inside_trainer
from rlhf_audit_nb.capture.weights import describe_model, digest_tensors, final_tensors, trainable_digest
from rlhf_audit_nb.errors import ConfigError, DataError, RunError
from rlhf_audit_nb.events import (
    CheckpointRecorded,
    Event,
    MetricsLogged,
    ModelBound,
    Number,
    Private,
    Step,
    TrainerAttached,
    number,
)

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.run import Run

__all__ = ["PLAIN_LOOP", "Loop", "digest_batch"]

PLAIN_LOOP = "PlainLoop"
"""The name that a hand-written loop has in the trail, where a trainer has its class."""
MAX_NAME = 200
MODEL_ROLES = ("base", "reference", "reward")
DATA_ROLES = ("train", "evaluation")
_SETTINGS = ("lr", "weight_decay", "betas", "momentum", "eps", "amsgrad", "nesterov", "dampening", "alpha")


class _Steps:
    """The steps of one optimizer that nobody has claimed yet, and what was measured of the last one."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer  # held, so that no other one gets its id meanwhile
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.taken = 0
        self.claimed = 0
        self.learning_rate: float | None = None
        self.gradient_norm: torch.Tensor | None = None
        self.update_norm: torch.Tensor | None = None
        self.first: list[torch.Tensor] = []
        self._norm = UpdateNorm([parameter for parameter in self.parameters if parameter.requires_grad])

    def before(self) -> None:
        """The optimizer is about to step."""
        self.gradient_norm = self.update_norm = None
        if self.taken and not self.claimed:
            self.first = []
            return  # a loop that records nothing: it is counted and costs no more
        self.learning_rate = float(self.optimizer.param_groups[0]["lr"])
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if gradients and not any(gradient.is_sparse for gradient in gradients):
            self.gradient_norm = torch.nn.utils.get_total_norm(gradients)
        self._norm.before_step(self.claimed)
        if not self.claimed and self._norm.every:
            self.first = [parameter.detach().clone() for parameter in self.parameters]

    def after(self) -> None:
        """It has stepped."""
        self.taken += 1
        self.update_norm = self._norm.after_step()

    def claim(self) -> int:
        """How many steps there were since the last claim."""
        taken, self.taken = self.taken, 0
        self.claimed += taken
        return taken


class Loop:
    """The hand-written loop of an open run; made when it first shows.

    Args:
        run: the open run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._optimizers: dict[int, _Steps] = {}
        self._waiting: list[tuple[Event, Private | None]] = []
        self._model: Any = None
        self._processing_class: Any = None
        self._base_known = False
        self._opened = False
        self._number = 0
        self._missed = 0

    @property
    def unrecorded(self) -> int:
        """Steps that were seen and not recorded."""
        return self._missed + sum(steps.taken for steps in self._optimizers.values())

    # --- what the hooks tell it --------------------------------------------------------------------------------------

    def before_step(self, optimizer: Any) -> None:
        """``optimizer`` is about to step."""
        steps = self._optimizers.get(id(optimizer))
        if steps is None:
            steps = self._optimizers[id(optimizer)] = _Steps(optimizer)
        if steps.taken == 1 and not steps.claimed:
            self._warn()
        steps.before()

    def after_step(self, optimizer: Any) -> None:
        """It has stepped."""
        steps = self._optimizers.get(id(optimizer))
        if steps is not None:
            steps.after()

    def _warn(self) -> None:
        self._run.warn(
            "An optimizer stepped outside a recorded trainer; those steps are not in the trail. A loop of your own "
            "records each of its steps with run.step(...)."
        )

    # --- what the loop says ------------------------------------------------------------------------------------------

    def bind_model(self, model: Any, role: str, processing_class: Any) -> None:
        """A model that the loop uses, as it is now."""
        if role not in MODEL_ROLES:
            raise _unknown("role", role, MODEL_ROLES)
        _check_model(model)
        if role == "base":
            self._model, self._processing_class, self._base_known = model, processing_class, True
        self._tell(self._origin(describe_model(model, role, processing_class), model, processing_class))

    def bind_data(self, dataset: Any, role: str) -> None:
        """A data set that the loop reads; of a loader, what it loads."""
        if role not in DATA_ROLES:
            raise _unknown("role", role, DATA_ROLES)
        if isinstance(dataset, torch.utils.data.DataLoader):
            dataset = dataset.dataset
        self._tell(*bind_data(dataset, role, artifacts=self._run.trail.artifacts))

    def step(
        self,
        metrics: Mapping[str, Any] | None,
        *,
        step: int | None,
        learning_rate: float | None,
        model: Any,
        optimizer: Any,
        batch: Any,
    ) -> None:
        """One optimizer step was taken; see `Run.step`."""
        numbers, digest = _numbers(metrics), None if batch is None else digest_batch(batch)
        if model is not None:
            _check_model(model)
        at = self._number + 1 if step is None else _whole("step", step)
        claimed = self._claim(optimizer)
        self._begin(model, claimed)
        last = claimed[-1][0] if claimed else None
        self._number = at
        self._run.state.step += 1
        self._run.state.status = "training"
        event = Step(
            step=self._number,
            metrics=numbers,
            learning_rate=learning_rate if learning_rate is not None or last is None else last.learning_rate,
            gradient_norm=_together(steps.gradient_norm for steps, _ in claimed),
            update_norm=_together(steps.update_norm for steps, _ in claimed),
            weights_digest=self._weights_digest(),
            notes=self._notes(claimed, numbers),
            batch_digest=digest,
        )
        self._run.record(event)
        self._show(numbers, event)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """Numbers that belong to no step of their own."""
        numbers = _numbers(metrics)
        self._run.record(MetricsLogged(metrics=numbers, step=None if step is None else _whole("step", step)))
        for name, value in numbers.items():
            self._run.state.add(name, self._run.state.step if step is None else step, float(value))

    def checkpoint(
        self, model: Any, folder: Path | None, epoch: float | None, metrics: Mapping[str, Any] | None, tokenizer: Any
    ) -> CheckpointRecorded:
        """See `Run.checkpoint`."""
        numbers = _numbers(metrics)
        if epoch is not None and (isinstance(epoch, bool) or not isinstance(epoch, int | float) or epoch < 0):
            raise _wrong(f"epoch is {epoch!r}, which counts no epochs.", "Write epoch=3, or leave it out.")
        if model is not None:
            _check_model(model)
        shown = model if model is not None else self._model if folder is None else None
        saved = None
        if folder is not None:
            if model is not None:
                _save(model, folder, tokenizer)
            elif not folder.is_dir() or not any(folder.iterdir()):
                raise _wrong(
                    f"There is nothing in the folder {folder.name!r}.",
                    "Save the model there first, or hand it in with model=.",
                )
            saved = self._run.weights_saved(folder, self._run.steps)
        event = CheckpointRecorded(
            step=self._run.steps,
            epoch=epoch,
            metrics=numbers,
            weights_digest=digest_tensors(final_tensors(shown)) if shown is not None else None,
            folder_digest=saved,
        )
        self._run.record(event)
        return event

    def close(self, *, whole: bool) -> None:
        """The loop is over: its model as it is now where it came to its end, and the steps that nobody recorded."""
        left = self.unrecorded - self._missed
        if left:
            self._warn()
        self._missed += left
        self._flush()
        if whole and self._opened and self._number and self._model is not None:
            self._run.record(describe_model(self._model, "final", self._processing_class))
        self._optimizers.clear()
        self._model = None

    # --- one step ----------------------------------------------------------------------------------------------------

    def _claim(self, optimizer: Any) -> list[tuple[_Steps, int]]:
        """What the optimizer (``None``: each) did since the last claim, with how many steps that was."""
        while optimizer is not None and id(optimizer) not in self._optimizers and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer  # what a library wraps around it has no steps of its own
        of = [
            steps
            for steps in self._optimizers.values()
            if steps.taken and (optimizer is None or steps.optimizer is optimizer)
        ]
        return [(steps, steps.claim()) for steps in of]

    def _notes(self, claimed: list[tuple[_Steps, int]], numbers: Mapping[str, Number]) -> list[str]:
        notes = []
        missed = sum(taken - 1 for _, taken in claimed)
        if missed:
            self._missed += missed
            self._warn()
            notes.append(f"optimizer steps before this one that were not recorded: {missed}")
        if not claimed:
            notes.append("no optimizer step was seen before this entry")
        if not math.isfinite(float(numbers.get("loss", 0.0))):
            self._run.warn(f"The loss was not a finite number at step {self._number}; the weights may be spoilt.")
            notes.append("the loss was not finite")
        return notes

    def _weights_digest(self) -> str | None:
        every = self._run.audit.weights_every
        due = every and self._number % every == 0 and self._model is not None
        return trainable_digest(self._model) if due else None

    def _show(self, numbers: Mapping[str, Number], event: Step) -> None:
        at, state = self._run.state.step, self._run.state
        measured = {"gradient_norm": event.gradient_norm, "update_norm": event.update_norm}
        for name, value in {**numbers, "learning_rate": event.learning_rate, **measured}.items():
            if value is not None:
                state.add(name, at, float(value))

    # --- the beginning -----------------------------------------------------------------------------------------------

    def _tell(self, event: Event, private: Private | None = None) -> None:
        """Record what the loop uses; before its first step that waits for the entry which opens the training."""
        if self._opened:
            self._run.record(event, private)
        else:
            self._waiting.append((event, private))

    def _begin(self, model: Any, claimed: list[tuple[_Steps, int]]) -> None:
        if not self._opened:
            self._open([steps.optimizer for steps, _ in claimed])
        if model is not None and not self._base_known:
            self._model, self._base_known = model, True
            base = _base(model, [steps for steps, _ in claimed])
            if base is not None:
                self._run.record(self._origin(base, model))
            else:
                self._run.warn(
                    "The model's weights before its first step were not seen, so what it began from is not in the "
                    "trail. Call run.bind_model(model) before the loop."
                )
        for steps, _ in claimed:
            steps.first = []

    def _origin(self, event: ModelBound, model: Any, processing_class: Any = None) -> ModelBound:
        """``event`` with where the model came from, which only those that have a configuration tell."""
        if getattr(model, "config", None) is None:
            return event
        return with_origin(event, model, processing_class, artifacts=self._run.trail.artifacts)

    def _open(self, optimizers: list[Any]) -> None:
        self._opened, self._run.last_training = True, None
        self._run.record(
            TrainerAttached(
                trainer=PLAIN_LOOP,
                loss=None,
                max_steps=0,
                seed=torch.initial_seed(),
                hyperparameters={
                    "optimizers": [_settings(optimizer) for optimizer in optimizers],
                    "random_state": _random_state(),
                },
            )
        )
        self._flush()

    def _flush(self) -> None:
        if self._waiting and not self._opened:
            self._open([])
        waiting, self._waiting = self._waiting, []
        for event, private in waiting:
            self._run.record(event, private)


def _base(model: Any, claimed: list[_Steps]) -> ModelBound | None:
    """The model as it was before its first step, from what was kept of its parameters; ``None`` where nothing was."""
    before: dict[int, torch.Tensor] = {}
    for steps in claimed:
        before.update((id(p), value) for p, value in zip(steps.parameters, steps.first, strict=False))
    stepped = {id(parameter) for steps in claimed for parameter in steps.parameters}
    mine = [parameter for parameter in model.parameters() if id(parameter) in stepped]
    if any(steps.claimed > 1 for steps in claimed) or not mine or any(id(one) not in before for one in mine):
        return None
    with _holding(mine, before):
        return describe_model(model, "base")


@contextmanager
def _holding(parameters: list[Any], values: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """While inside, the parameters hold these values."""
    now = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = values[id(parameter)]
    try:
        yield
    finally:
        for parameter, value in zip(parameters, now, strict=True):
            parameter.data = value


def _settings(optimizer: Any) -> dict[str, Any]:
    """What the optimizer is, and how it was set: numbers and flags of its first group of parameters."""
    group = optimizer.param_groups[0]
    plain = {name: group[name] for name in _SETTINGS if name in group}
    found = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in plain.items()
        if isinstance(value, bool | int | float | tuple)
    }
    return {"optimizer": type(optimizer).__name__, "groups": len(optimizer.param_groups), **found}


def _random_state() -> str:
    """Hex SHA-256 over the states of the generators of torch, Python and, where it is loaded, numpy."""
    hasher = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    hasher.update(repr(random.getstate()).encode())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        hasher.update(f"{name} {rest}".encode() + keys.tobytes())
    return hasher.hexdigest()


def _save(model: Any, folder: Path, tokenizer: Any) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if hasattr(model, "save_pretrained"):
            with inside_trainer():  # what is saved here is recorded as a checkpoint, once
                model.save_pretrained(folder)
        else:
            from safetensors.torch import save_model

            save_model(model, str(folder / "model.safetensors"))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except OSError as error:
        raise RunError(
            f"The checkpoint cannot be saved in {folder.name!r}: {error.strerror or error}.",
            next_step="Name a folder that can be written.",
            code="unwritable",
        ) from error


def _together(norms: Iterator[torch.Tensor | None]) -> Number | None:
    """The norm over all of them, where each was measured."""
    values = list(norms)
    if not values or any(value is None for value in values):
        return None
    return number(math.sqrt(sum(float(value) ** 2 for value in values if value is not None)))


# --- what is handed in -----------------------------------------------------------------------------------------------


def digest_batch(batch: Any) -> str:
    """Hex SHA-256 over a batch: tensors by dtype, shape and bytes, the rest as JSON; mappings in the order of keys.

    Args:
        batch: a tensor or an array, text, a number, or mappings and sequences of these.

    Raises:
        DataError: it holds something else.
    """
    hasher = hashlib.sha256()
    for line in _lines(batch, ""):
        hasher.update(line)
        hasher.update(b"\n")
    return hasher.hexdigest()


def _lines(value: Any, where: str) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield f"{where} tensor {digest_tensors({'': value})}".encode()
    elif value is None or isinstance(value, str | bool | int | float):
        yield f"{where} {json.dumps(value)}".encode()
    elif isinstance(value, Mapping):
        yield f"{where} mapping {len(value)}".encode()
        for key in sorted(value, key=str):
            yield from _lines(value[key], f"{where}/{json.dumps(str(key))}")
    elif isinstance(value, list | tuple):
        yield f"{where} sequence {len(value)}".encode()
        for place, item in enumerate(value):
            yield from _lines(item, f"{where}/{place}")
    elif hasattr(value, "__array__") and getattr(value, "dtype", None) is not None:
        yield from _lines(torch.as_tensor(value), where)
    else:
        raise DataError(
            f"The batch holds a {type(value).__name__}{f' at {where}' if where else ''}, whose digest nobody could "
            "repeat.",
            next_step="Hand in tensors, arrays, text and numbers, in dicts and lists; or leave batch out.",
            code="batch",
        )


def _numbers(metrics: Mapping[str, Any] | None) -> dict[str, Number]:
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise _wrong(f"metrics is a {type(metrics).__name__}, not a dict.", 'Write metrics={"loss": loss.item()}.')
    return {_metric_name(name): _metric(name, value) for name, value in metrics.items()}


def _metric_name(name: object) -> str:
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise _wrong(f"A metric is called {name!r}.", "Give it a name in one line, such as reward/mean.")
    return name


def _metric(name: str, value: Any) -> Number:
    one = getattr(value, "ndim", None) == 0 or (isinstance(value, torch.Tensor) and value.numel() == 1)
    plain = value.item() if one else value
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        raise _wrong(f"The metric {name!r} is a {type(value).__name__}, not a number.", "Hand in loss.item().")
    return number(plain)


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _wrong(f"{name} is {value!r}, which counts nothing.", f"Write a whole number, or leave {name} out.")
    return value


def _check_model(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise _wrong(f"model is a {type(model).__name__}, not a torch module.", "Hand in the model itself.")


def _unknown(name: str, value: object, known: tuple[str, ...]) -> ConfigError:
    wanted = " or ".join(f'{name}="{item}"' for item in known)
    return _wrong(f"{name} is {value!r}, which is not known.", f"Write {wanted}.")


def _wrong(message: str, next_step: str) -> ConfigError:
    return ConfigError(message, next_step=next_step, code="loop")
