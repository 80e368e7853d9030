"""The trainer's callback: one `Step` event per optimizer step, and one per save and evaluation. Floor 2.

Without differential privacy a step's metrics are public: the loss, what TRL measured in the step, the norms. With it,
what is a function of private data comes from the engine (`on_private_step`) and goes into the event's private half;
public are epsilon, the learning rate, the norm of the update and of the privatised gradient, which follow from
released weights, and the loss that was released through the mechanism (``private_loss``), if one is. A panel shows
that loss smoothed (`Smoothed`), since one step's is mostly noise.

The norm of the update needs a copy of the trainable parameters. It is taken at every step for up to `NORM_EVERY_STEP`
of them, less often above (so that its share of the time stays the same), and never above `NORM_NEVER`, where the copy
could cost the training its memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from rlhf_audit_nb.capture.state import PRIVATE_LOSS, Smoothed
from rlhf_audit_nb.capture.weights_path import Link, WeightsPath
from rlhf_audit_nb.events import Number, Step, StepPrivate, TrainerLogged, number

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.run import Run

__all__ = ["NORM_EVERY_STEP", "NORM_NEVER", "StepRecorder", "UpdateNorm"]

NORM_EVERY_STEP = 20_000_000
NORM_NEVER = 500_000_000

_LOGGED_ANYWAY = frozenset({"loss", "grad_norm", "learning_rate", "epoch", "step", "total_flos"})
"""What transformers logs of every step; the step's entry has it, or it follows."""


class UpdateNorm:
    """L2 norm of what an optimizer step changed, over all trainable parameters.

    Args:
        parameters: the parameters to watch.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        size = sum(parameter.numel() for parameter in parameters)
        self.every = 0 if not size or size > NORM_NEVER else math.ceil(size / NORM_EVERY_STEP)
        self._before: list[torch.Tensor] = []

    def before_step(self, step: int) -> None:
        """Keep the parameters as they are before the optimizer step ``step`` (from 1), if it is to be measured."""
        if not self.every or step % self.every:
            self._before = []
            return
        self._before = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def after_step(self) -> torch.Tensor | None:
        """The norm as a scalar tensor, or ``None`` where this step is not measured."""
        if not self._before:
            return None
        differences, self._before = self._before, []
        # torch's documented foreach family: one kernel launch for many small tensors.
        parameters: list[torch.Tensor] = [*self._parameters]
        torch._foreach_sub_(differences, parameters)
        return _total_norm(differences)


class StepRecorder(TrainerCallback):
    """Records one training of an open run.

    Args:
        run: the open run.
        trainer: the trainer that trains.
        opening: called once when training begins, with the number of planned steps.
        first_step: the run's steps before this training.
        private: whether what this training measures is private; also in a private run it is not where it inherits.
    """

    def __init__(
        self, run: Run, trainer: Any, opening: Callable[[int], None], first_step: int, *, private: bool
    ) -> None:
        self._run = run
        self._trainer = trainer
        self._opening = opening
        self._first_step = first_step
        self._private = private
        self._norm: UpdateNorm | None = None
        self._path: WeightsPath | None = None
        self._losses: list[torch.Tensor] = []
        self._gradient_norm: torch.Tensor | float | None = None
        self._update_norm: torch.Tensor | None = None
        self._learning_rate: float | None = None
        self._epsilon: float | None = None
        self._marks: dict[str, int] = {}
        self._covered: list[dict[str, Number]] = []
        self._released: list[float] = []
        self._smoothed = Smoothed()
        self._last: _Scalars | None = None
        self._resumed_at = 0
        self._overhead = run.overhead
        self._recording, self._norming = run.overhead.part("recorder"), run.overhead.part("update norm")
        self._told: set[str] = set()

    @property
    def run(self) -> Run:
        """The run that is recorded into."""
        return self._run

    # --- what the wrapped trainer tells it ---------------------------------------------------------------------------

    def saw_loss(self, loss: Any) -> None:
        """A micro-batch's loss, already divided by the number of micro-batches; of several values the first is it."""
        with self._recording:
            if isinstance(loss, tuple | list) and loss:
                loss = loss[0]
            if isinstance(loss, torch.Tensor):
                self._losses.append(loss.detach().mean())
            elif isinstance(loss, int | float):
                self._losses.append(torch.tensor(float(loss)))

    def saw_gradient_norm(self, norm: torch.Tensor | float | None) -> None:
        """The gradient's norm before clipping; under privacy, of the privatised gradient."""
        self._gradient_norm = norm

    def on_private_step(self, step: int, epsilon: float, metrics: dict[str, Number]) -> None:
        """What the engine measured in a private step; the gradient that stands in the parameters now is private.

        A step that failed is told here with its error, which may quote private rows: it is recorded at once, sealed.
        """
        self._epsilon = epsilon
        if "error" in metrics:
            event = Step(step=self._resumed_at + step, epsilon=number(epsilon), notes=["the step failed"])
            self._run.record(event, StepPrivate(metrics=dict(metrics)))
            return
        self._gradient_norm = _gradient_norm(self._trainer.model)
        self._covered.append(dict(metrics))

    def on_private_loss(self, step: int, loss: float) -> None:  # noqa: ARG002 - the step that ends next
        """The loss that the mechanism released for the step: public."""
        self._released.append(loss)
        self._smoothed.add(loss)

    # --- what transformers tells it ----------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """The plan is known and nothing was trained yet."""
        with self._overhead.part("inputs"):
            self._opening(int(state.max_steps))
        self._resumed_at = int(state.global_step)
        self._run.state.max_steps = self._first_step + int(state.max_steps) - self._resumed_at
        self._run.state.status = "training"
        if not (self._trainer.is_deepspeed_enabled or self._trainer.is_fsdp_enabled):  # sharded: no whole norm here
            self._norm = UpdateNorm([p for p in self._trainer.model.parameters() if p.requires_grad])
        if self._run.audit.weights_every:
            self._path = WeightsPath(self._trainer.model, measured=self._norm is not None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Remember how much TRL has measured before this step."""
        self._overhead.step_begins()
        if not self._private:
            with self._recording:
                self._marks = {name: len(values) for name, values in self._measured().items()}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Keep what the step is about to change."""
        self._learning_rate = float(kwargs["optimizer"].param_groups[0]["lr"])
        if self._norm is not None:
            with self._norming:
                self._norm.before_step(int(state.global_step) + 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Measure what it changed."""
        with self._norming:
            self._update_norm = self._norm.after_step() if self._norm is not None else None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """One optimizer step is done."""
        with self._recording:
            step = int(state.global_step)
            self._run.state.step = self._run_step(step)
            scalars = self._scalars(step)
            if not self._private:
                self._covered.append({**scalars.losses, **self._fresh_metrics()})
                self._told.update(self._covered[-1])
            self._show(scalars)
            self._last = scalars
            if step % self._run.audit.every_steps == 0:
                self.flush()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        """What the trainer logs of itself beside what its steps were seen to measure."""
        if self._private or not state.global_step:
            return
        found = {
            name: value
            for name, value in _numbers(logs or {}).items()
            if name not in self._told and name not in _LOGGED_ANYWAY and not name.startswith(("eval_", "train_"))
        }
        if found:
            self.flush()
            self._run.record(TrainerLogged(step=int(state.global_step), metrics=found))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:  # noqa: ARG002
        """An evaluation inside the training; its data may be private too."""
        found = _numbers(metrics or {})
        half = StepPrivate(metrics=found) if self._private else None
        event = Step(step=int(state.global_step), metrics={} if self._private else found, notes=["evaluation"])
        self._run.record(event, half)
        if not self._private:
            for name, value in found.items():
                self._run.state.add(name, self._run.state.step, _float(value))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """A checkpoint was written."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir() and state.is_world_process_zero:
            with self._overhead.part("checkpoints"):
                self._run.weights_saved(folder, int(state.global_step))

    # --- one event ---------------------------------------------------------------------------------------------------

    def flush(self, *, ending: bool = False) -> None:
        """Record the steps since the last event, if there are any; the metrics are their means."""
        last, self._last = self._last, None
        if last is None:
            return
        covered, self._covered = self._covered, []
        metrics = _means(covered)
        notes = [] if self._private else self._anomalies(covered, last.step)
        released, self._released = self._released, []
        public = {PRIVATE_LOSS: number(sum(released) / len(released))} if released else {}
        every = self._run.audit.weights_every
        wanted = every and (ending or last.step % every == 0)
        link = self._link(self._path) if self._path is not None and wanted else None
        event = Step(
            step=last.step,
            metrics=public if self._private else metrics,
            learning_rate=last.learning_rate,
            epsilon=number(last.epsilon) if last.epsilon is not None else None,
            gradient_norm=number(last.gradient_norm) if last.gradient_norm is not None else None,
            update_norm=number(last.update_norm) if last.update_norm is not None else None,
            weights_digest=link.digest if link is not None else None,
            weights_moved=number(link.moved) if link is not None and link.moved is not None else None,
            notes=notes,
        )
        self._run.record(event, StepPrivate(metrics=metrics) if self._private else None)
        if not self._private:
            with self._overhead.part("panel"):
                for name, value in metrics.items():
                    if name != "loss":
                        self._run.state.add(name, self._run_step(last.step), _float(value))

    def _link(self, path: WeightsPath) -> Link:
        with self._overhead.part("weights digest"):
            return path.link()

    def finish(self) -> None:
        """The training came to its end: record the steps since the last event, and the last link of the weights' path.

        What follows the last step (such as loading the best checkpoint again) is part of the path.
        """
        self.flush(ending=True)
        if self._path is None or not self._trainer.state.global_step:
            return
        link, self._path = self._link(self._path), None
        if not link.known:  # else the last step's own link is the last one
            step = int(self._trainer.state.global_step)
            moved = number(link.moved) if link.moved is not None else None
            self._run.record(Step(step=step, weights_digest=link.digest, weights_moved=moved))

    def _run_step(self, step: int) -> int:
        return self._first_step + step - self._resumed_at

    def _scalars(self, step: int) -> _Scalars:
        """The step's numbers; read from the device together, so that it is waited for once."""
        tensors = {"update_norm": self._update_norm, "gradient_norm": self._gradient_norm}
        if self._losses:
            tensors["loss"] = torch.stack([loss.float() for loss in self._losses]).sum()
        self._losses = []
        with self._overhead.part("device"):
            values = _read(tensors)
        losses = {"loss": values["loss"]} if "loss" in values else {}
        return _Scalars(
            step=step,
            losses=losses,
            learning_rate=self._learning_rate,
            epsilon=self._epsilon,
            gradient_norm=values.get("gradient_norm"),
            update_norm=values.get("update_norm"),
        )

    def _show(self, scalars: _Scalars) -> None:
        at, state = self._run_step(scalars.step), self._run.state
        series = {
            **scalars.losses,
            "epsilon": scalars.epsilon,
            PRIVATE_LOSS: self._smoothed.value,
            "learning_rate": scalars.learning_rate,
            "gradient_norm": scalars.gradient_norm,
            "update_norm": scalars.update_norm,
        }
        with self._overhead.part("panel"):
            for name, value in series.items():
                if value is not None:
                    state.add(name, at, value)

    def _measured(self) -> Mapping[str, list[Any]]:
        """What TRL has measured since its last log: values by name, or nothing for a plain trainer.

        Most of its trainers keep that by mode in ``_metrics``, older ones in ``_stored_metrics`` or flat in ``stats``.
        """
        for attribute in ("_metrics", "_stored_metrics", "stats"):
            kept = getattr(self._trainer, attribute, None)
            measured = kept.get("train", kept) if isinstance(kept, Mapping) else None
            if isinstance(measured, Mapping) and all(isinstance(values, list) for values in measured.values()):
                return measured
        return {}

    def _fresh_metrics(self) -> dict[str, float]:
        found = {}
        for name, values in self._measured().items():
            # A running total is kept as a list of one value, replaced in place.
            fresh = values[self._marks.get(name, 0) :] or values[-1:]
            numeric = [float(value) for value in fresh if isinstance(value, int | float)]
            if numeric:
                found[name] = sum(numeric) / len(numeric)
        return found

    def _anomalies(self, covered: list[dict[str, Number]], step: int) -> list[str]:
        if all(math.isfinite(float(values.get("loss", 0.0))) for values in covered):
            return []
        self._run.warn(f"The loss was not a finite number at or before step {step}; the weights may be spoilt.")
        return ["the loss was not finite"]


class _Scalars:
    """The numbers of one step."""

    __slots__ = ("epsilon", "gradient_norm", "learning_rate", "losses", "step", "update_norm")

    def __init__(
        self,
        *,
        step: int,
        losses: dict[str, float],
        learning_rate: float | None,
        epsilon: float | None,
        gradient_norm: float | None,
        update_norm: float | None,
    ) -> None:
        self.step = step
        self.losses = losses
        self.learning_rate = learning_rate
        self.epsilon = epsilon
        self.gradient_norm = gradient_norm
        self.update_norm = update_norm


def _read(tensors: Mapping[str, torch.Tensor | float | None]) -> dict[str, float]:
    values = {name: float(value) for name, value in tensors.items() if isinstance(value, int | float)}
    waiting = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    if waiting:
        device = next(iter(waiting.values())).device
        together = torch.stack([value.detach().float().reshape(()).to(device) for value in waiting.values()])
        values.update(zip(waiting, together.tolist(), strict=True))
    return values


def _means(covered: list[dict[str, Number]]) -> dict[str, Number]:
    """The mean of each metric over the steps in which it was measured; of texts, the last."""
    means: dict[str, Number] = {}
    for name in dict.fromkeys(name for values in covered for name in values):
        present = [values[name] for values in covered if name in values]
        numeric = [value for value in present if isinstance(value, int | float)]
        means[name] = number(sum(numeric) / len(numeric)) if len(numeric) == len(present) else present[-1]
    return means


def _gradient_norm(model: Any) -> torch.Tensor | None:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return _total_norm(gradients) if gradients else None


@torch.no_grad()
def _total_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """L2 norm over all of them together, in float32."""
    norms = torch._foreach_norm(tensors, 2.0, torch.float32)  # noqa: SLF001  documented, in spite of its name
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return total


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Number]:
    return {name: number(value) for name, value in metrics.items() if isinstance(value, int | float)}


def _float(value: Number) -> float:
    return float(value)  # "NaN" and "Infinity" are what float() reads
