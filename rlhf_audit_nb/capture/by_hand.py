"""What a person's own code tells an open run: steps, metrics, models, data, checkpoints. Floor 2.

These are `Run`'s methods for training loops that are written by hand; what they do is `loop`'s, which loads torch and
is imported when the first of them is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rlhf_audit_nb.capture.opened import current_run
from rlhf_audit_nb.errors import RunError, UnsupportedTrainerError

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.loop import Loop
    from rlhf_audit_nb.capture.run import Run
    from rlhf_audit_nb.events import CheckpointRecorded

__all__ = ["ByHand"]


class ByHand:
    """The part of a run that a hand-written loop talks to."""

    _loop: Loop | None = None
    _unrecorded: int = 0

    def step(
        self,
        metrics: Mapping[str, Any] | None = None,
        *,
        step: int | None = None,
        learning_rate: float | None = None,
        model: Any = None,
        optimizer: Any = None,
        batch: Any = None,
    ) -> None:
        """Record one optimizer step of your own loop; call it after ``optimizer.step()``.

        What the optimizer shows is measured by itself: learning rate, norm of the gradient as the optimizer got it
        (after any clipping), norm of the update::

            loss.backward()
            optimizer.step()
            run.step({"loss": loss.item()}, model=policy)

        Args:
            metrics: numbers of this step, by name; they stand in the open.
            step: its number, where you count yourself; else the loop's steps are counted from 1.
            learning_rate: instead of the one that the optimizer had.
            model: the model that is trained: the run then names its weights before the first step and at the end.
            optimizer: whose step it was; without it, all that stepped since the last call are meant.
            batch: what was trained on: tensors, text, numbers, or dicts and lists of them; its digest stands in the
                open (`rlhf_audit_nb.capture.loop.digest_batch`).

        Raises:
            ConfigError: an argument cannot be used.
            DataError: the batch holds something that has no digest.
            RunError: the run is closed, or a trainer of it is training and records its own steps.
            UnsupportedTrainerError: the run is private.
        """
        loop = self._by_hand("A training loop written by hand cannot be made private")
        if self._run.training is not None:
            raise RunError(
                "A trainer of this run is training, and records its own steps.",
                next_step="Hand further numbers to run.log_metrics(...).",
                code="training-beside",
            )
        loop.step(metrics, step=step, learning_rate=learning_rate, model=model, optimizer=optimizer, batch=batch)

    def log_metrics(self, metrics: Mapping[str, Any], *, step: int | None = None) -> None:
        """Record numbers of your own, such as an evaluation's, in an entry of their own.

        Raises:
            ConfigError: a metric is no number.
            RunError: the run is closed.
            UnsupportedTrainerError: the run is private: whether they tell of protected people cannot be known.
        """
        self._by_hand("Numbers that code of your own hands in cannot be made private").log_metrics(metrics, step)

    def bind_model(self, model: Any, *, role: str = "base", processing_class: Any = None) -> None:
        """Name a model of your own loop by the digest of its weights as they are now.

        Args:
            model: a torch module.
            role: ``base`` (what is trained, before its first step), ``reference`` or ``reward``.
            processing_class: its tokenizer.

        Raises:
            ConfigError: an argument cannot be used.
            RunError: the run is closed, or a weight has no bytes (meta device).
            UnsupportedTrainerError: the run is private.
        """
        self._by_hand("A training loop written by hand cannot be made private").bind_model(
            model, role, processing_class
        )

    def bind_data(self, dataset: Any, *, role: str = "train") -> None:
        """Name a data set of your own loop by the digest of its rows; of a ``DataLoader``, what it loads.

        Args:
            dataset: a `datasets.Dataset`, a map-style torch data set, a list of dicts, or a stream (without digest).
            role: ``train`` or ``evaluation``.

        Raises:
            ConfigError: the role is not known.
            RunError: the run is closed.
            UnsupportedTrainerError: the run is private.
        """
        self._by_hand("A training loop written by hand cannot be made private").bind_data(dataset, role)

    def checkpoint(
        self,
        *,
        model: Any = None,
        folder: Path | str | None = None,
        epoch: float | None = None,
        metrics: Mapping[str, Any] | None = None,
        processing_class: Any = None,
    ) -> CheckpointRecorded:
        """Record this moment as a checkpoint, and save and sign what is given.

        Args:
            model: the model; without it, and without a folder, the one that the loop trains. Its weights' digest is
                recorded.
            folder: with ``model``: where it is saved (``save_pretrained``, or one safetensors file for a plain
                module). Alone: a folder that you have saved. It is signed (OpenSSF model signature) and recorded.
            epoch: which epoch it is, as you count.
            metrics: numbers that belong to it, by name.
            processing_class: a tokenizer, saved beside the model.

        Returns:
            What was recorded.

        Raises:
            ConfigError: an argument cannot be used, or there is nothing in the folder.
            RunError: the run is closed, or the folder cannot be written or signed.
            UnsupportedTrainerError: the run is private: its trainer saves and its checkpoints are recorded by itself.
        """
        loop = self._by_hand("A checkpoint of a loop written by hand cannot be made private")
        return loop.checkpoint(model, None if folder is None else Path(folder), epoch, metrics, processing_class)

    # --- for the run itself, and for the hooks -----------------------------------------------------------------------

    @property
    def loop(self) -> Loop:
        """The loop that runs now, made when it is first asked for."""
        if self._loop is None:
            from rlhf_audit_nb.capture.loop import Loop

            self._loop = Loop(self._run)
        return self._loop

    @property
    def has_loop(self) -> bool:
        """Whether anything was heard of a loop."""
        return self._loop is not None

    @property
    def unrecorded_steps(self) -> int:
        """Optimizer steps that were seen outside of a trainer and that nobody recorded."""
        return self._unrecorded + (self._loop.unrecorded if self._loop is not None else 0)

    def close_loop(self, *, whole: bool = True) -> None:
        """What the loop trained is as it is now; a later one is another training."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.close(whole=whole)
            self._unrecorded += loop.unrecorded

    @property
    def _run(self) -> Run:
        return cast("Run", self)

    def _by_hand(self, why_not: str) -> Loop:
        here = current_run()
        if self._run.private or (here is not None and here.private):
            which = "this run" if self._run.private or here is None else f"the run {here.experiment!r}, open here,"
            raise UnsupportedTrainerError(
                f"{why_not}, and {which} is under differential privacy; nothing was recorded.",
                next_step="Train with a TRL trainer, or open a run without privacy for data that protects nobody.",
                code="loop-in-private-run",
            )
        if not self._run.is_open:
            raise RunError(
                f"The run of experiment {self._run.experiment!r} is not open; nothing can be added to it.",
                next_step="Write it inside `with auditor.track_training(...)`.",
                code="run-closed",
            )
        return self.loop
