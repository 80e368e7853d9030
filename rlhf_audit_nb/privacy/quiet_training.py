"""Keeping a trainer from telling what a private step saw: progress bars, logs, counters. Floor 2.

What the trainer would log about the data (loss, rewards, margins, accuracies, token counts, run time) is taken out of
``log_history``, ``trainer_state.json``, what ``train()`` returns, and what progress bars print. What stays is public:
step, learning rate, the norm of the privatised gradient, the composed epsilon.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import TrainOutput

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = [
    "PUBLIC_LOGS",
    "clear_metrics",
    "kept_counters",
    "quiet_callbacks",
    "trainer_metrics",
    "without_private_results",
]

PUBLIC_LOGS = frozenset({"grad_norm", "learning_rate", "epoch", "epsilon"})
"""What may stay in a trainer's log under differential privacy."""


class _QuietProgress(ProgressCallback):
    """A progress bar that shows steps and nothing of the time they take, which depends on the sampled data."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                miniters=max(1, state.max_steps // 20),
                mininterval=0,
                maxinterval=math.inf,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}",
            )
        self.current_step = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Nothing: the steps are in the trail and on the panel."""

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, state, control
        self.close()

    def close(self) -> None:
        """Finish the bar, also where training failed."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


@contextlib.contextmanager
def quiet_callbacks(trainer: Any, *ours: TrainerCallback) -> Iterator[None]:
    """Exchange progress displays for one that tells nothing of the data, and add ``ours``; undo both afterwards."""
    handler = trainer.callback_handler
    before = list(handler.callbacks)
    progress = _QuietProgress()
    added_here: list[TrainerCallback] = [*ours]
    if any(isinstance(item, ProgressCallback) for item in before):
        added_here.append(progress)  # a notebook's own table is only taken away: there the panels show the progress
    handler.callbacks = [item for item in before if not _is_progress(item)] + added_here
    try:
        yield
    finally:
        progress.close()
        added = [item for item in handler.callbacks if item not in before and item not in added_here]
        removed = [item for item in before if not _is_progress(item) and item not in handler.callbacks]
        handler.callbacks = [item for item in before if item not in removed] + added


def _is_progress(callback: Any) -> bool:
    if isinstance(callback, ProgressCallback):
        return True
    return type(callback).__name__ == "NotebookProgressCallback"


@contextlib.contextmanager
def kept_counters(trainer: Any) -> Iterator[None]:
    """Token counts and metrics that TRL gathers on the trainer are not left on it."""
    tokens = trainer._total_train_tokens  # noqa: SLF001
    try:
        yield
    finally:
        trainer._total_train_tokens = tokens  # noqa: SLF001
        clear_metrics(trainer)


def trainer_metrics(trainer: Any) -> dict[str, float | int | str]:
    """What TRL gathered over the step's units, and forget it there."""
    gathered = {
        name: sum(values) / len(values)
        for name, values in trainer._metrics["train"].items()  # noqa: SLF001
        if values and name != "num_tokens"
    }
    clear_metrics(trainer)
    return dict(gathered)


def clear_metrics(trainer: Any) -> None:
    """Forget what TRL gathered about the data."""
    for gathered in trainer._metrics.values():  # noqa: SLF001
        gathered.clear()


def without_private_results(output: Any) -> TrainOutput:
    """What ``train()`` may return."""
    metrics = {name: value for name, value in output.metrics.items() if name in PUBLIC_LOGS}
    return TrainOutput(output.global_step, math.nan, metrics)
