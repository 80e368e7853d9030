"""The open run: its life, what it appends to the trail, and who may find it. Floor 2.

A run is opened by ``%%audit_train`` or ``track_training`` and closed with its outcome, whatever happens in between.
While it is open, `current_run` finds it (`opened`), trainers are attached (`attach`), and everything that this changed
in the process is put back when it closes. How an end is told is `life`'s to say.

How training is made private is not known here: a `Privatiser` is handed in.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import uuid
import warnings
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from rlhf_audit_nb.capture.by_hand import ByHand
from rlhf_audit_nb.capture.cells import CellContext, audited_cell
from rlhf_audit_nb.capture.code import CodeSeen, code_since, look_at_code
from rlhf_audit_nb.capture.environment import keep_environment
from rlhf_audit_nb.capture.folders import folder_state, sign_folder
from rlhf_audit_nb.capture.life import describe_failure, outcome_of
from rlhf_audit_nb.capture.opened import current_run, enter, leave, open_private_runs
from rlhf_audit_nb.capture.overhead import Overhead
from rlhf_audit_nb.capture.ranks import Birth, Place, Ranks, count_children
from rlhf_audit_nb.capture.secrets import Scrubber
from rlhf_audit_nb.capture.state import InheritedView, PrivacyView, RunState, Status
from rlhf_audit_nb.capture.telemetry import no_telemetry
from rlhf_audit_nb.config import AuditConfig
from rlhf_audit_nb.errors import AuditError, ConfigError, RunError
from rlhf_audit_nb.events import (
    Event,
    Number,
    Private,
    RunFinished,
    RunFinishedPrivate,
    RunStarted,
    Step,
    WeightsSaved,
    encode_body,
    encode_private,
)
from rlhf_audit_nb.trail.ending import SIGTERM

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.saving import LastTraining
    from rlhf_audit_nb.trail import Trail

__all__ = [
    "COARSE_US",
    "ENV_RECORD",
    "AuditWarning",
    "InheritedPlan",
    "PrivatePlan",
    "Privatiser",
    "Run",
    "RunObserver",
    "current_run",
    "open_private_runs",
]

ENV_RECORD = "RLHF_AUDIT_RECORD"
COARSE_US = 60_000_000
"""Under privacy, all entries after the environment carry a time in whole minutes: how long it takes to prepare, digest
and train on private data depends on them."""
TOOL = "rlhf-audit-trail"
MAX_NAME = 200
ROUNDING = 1e-7
LAST_WORD_SECONDS = 5.0
DYING_SECONDS = 15.0


class AuditWarning(UserWarning):
    """Something in the run deserves a look; the run's panel says it as well, but no entry of the trail does."""


class RunObserver(Protocol):
    """Who is told of each private step by the engine."""

    def on_private_step(self, step: int, epsilon: float, metrics: dict[str, Number]) -> None:
        """Step ``step`` (from 1) ended with the composed total ``epsilon``; ``metrics`` are private."""


class PrivatePlan(Protocol):
    """What one private training will do, worked out before it touches anything."""

    @property
    def view(self) -> PrivacyView:
        """The guarantee, for people."""

    @property
    def steps(self) -> int:
        """Optimizer steps that may be taken."""

    @property
    def annotator_column(self) -> str | None:
        """The column that holds the annotator's id, where that is the unit."""

    @property
    def warnings(self) -> list[str]:
        """What a person should know about these settings, as sentences; all of it is public."""

    def training(self, run: Run, trainer: Any, observer: RunObserver) -> AbstractContextManager[Any]:
        """Reserves the spend in the trail, makes ``trainer`` private, and settles at the end, however it comes."""


class InheritedPlan(Protocol):
    """What a training that charges nothing inherits, worked out before it touches anything."""

    @property
    def view(self) -> InheritedView:
        """What it inherits, for people."""

    @property
    def units(self) -> int | None:
        """How many protected units it reads as they were released; ``None`` where it reads nothing protected."""

    @property
    def trained_as(self) -> dict[str, Any]:
        """Settings that run in place of the trainer's own, for the record."""

    def event(self) -> Event:
        """The entry that says so."""

    def training(self, trainer: Any) -> AbstractContextManager[Any]:
        """What holds on ``trainer`` while it trains; all is as it was afterwards."""


class Privatiser(Protocol):
    """How training is made private."""

    def quiet(self) -> AbstractContextManager[Any]:
        """Keeps libraries from telling about private rows while trainers are built and trained."""

    def inherit(self, trainer: Any) -> InheritedPlan | None:
        """What ``trainer`` inherits, where it is one that learns of protected people through private models only.

        Raises:
            PrivacyError: it is of that kind, and something else comes into it.
        """

    def plan(self, trainer: Any, *, done: int = 0) -> PrivatePlan:
        """The plan for ``trainer``; ``done`` are the steps behind it where it is resumed from a checkpoint.

        Raises:
            PrivacyError: the trainer cannot be made private, or the budget allows no step.
            DataError: the data set cannot serve.
        """


_NOT_THE_USERS = ("rlhf_audit_nb", "transformers", "trl", "torch", "accelerate", "contextlib")


class Run(ByHand):
    """One run, from its first entry to its last; a context manager.

    Args:
        trail: the open trail that it is written to.
        experiment: the experiment's name.
        privatiser: how training is made private; ``None`` records training as it is, without privacy.
        privacy: the privacy configuration that was asked for, as plain values.
        audit: audit frequency and the like.
        declared_model: the model's name as the user declared it.
        compliance_mode: which framework the user works under.
        entry_point: ``cell`` or ``context``.
        cell_digest: hex SHA-256 of the cell's source.
        cell: which cell that is, and what ran before it.
        show_progress: whether a bar of steps may be printed under privacy; a cell has the panel instead.
        place: which of several processes that train together this one is; ``None`` where it trains alone.

    Attributes:
        outer: the run inside which it was opened, or ``None``.
        last_training: of a trainer, also when it is over; ``None`` before, and after a loop that was written by hand.
        holds_private: whether it, or a run that was opened inside it, is private.
    """

    def __init__(
        self,
        trail: Trail,
        experiment: str,
        *,
        privatiser: Privatiser | None = None,
        privacy: dict[str, Any] | None = None,
        audit: AuditConfig | None = None,
        declared_model: str | None = None,
        compliance_mode: str | None = None,
        entry_point: str = "context",
        cell_digest: str | None = None,
        cell: CellContext | None = None,
        show_progress: bool = True,
        place: Place | None = None,
    ) -> None:
        self.id = uuid.uuid4().hex
        self._scrubber = Scrubber()
        self.experiment = self._scrubber.text(_experiment_name(experiment))
        self.trail = trail
        self.privatiser = privatiser
        self.audit = audit or AuditConfig()
        self.show_progress = show_progress
        self.state = RunState(experiment=self.experiment, run_id=self.id, private=privatiser is not None)
        self.state.clean = self._scrubber.text
        self.stopped_by_budget = False
        self.training: Any = None
        self.last_training: LastTraining | None = None
        self.ranks = Ranks(place, self.experiment, trail) if place is not None else None
        self.birth = Birth.now()
        self.overhead = Overhead()
        self._started: dict[str, Any] = {
            "privacy": privacy,
            "declared_model": declared_model,
            "compliance_mode": compliance_mode,
            "entry_point": entry_point,
            "cell_digest": cell_digest,
        }
        self._resolution_us = 1
        self._open = False
        self._failure: BaseException | None = None
        self._saved: dict[Path, tuple[int | None, object]] = {}
        self._undo = ExitStack()
        self._code: CodeSeen | None = None
        self.outer: Run | None = None
        self._cell = cell
        self._used = False
        self._gate = threading.RLock()
        self._begun = False
        self._ended: str | None = None
        self.holds_private = self.private
        self._older_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

    # --- life --------------------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether entries may still be appended."""
        return self._open

    def began_after(self, thread: threading.Thread) -> bool:
        """Whether the run was opened when ``thread`` ran already."""
        return thread in self._older_threads

    @property
    def private(self) -> bool:
        """Whether the run trains under differential privacy."""
        return self.privatiser is not None

    def outwards(self) -> Iterator[Run]:
        """This run and those around it, the nearest first."""
        run: Run | None = self
        while run is not None:
            yield run
            run = run.outer

    @property
    def steps(self) -> int:
        """Optimizer steps taken in this run so far."""
        return self.state.step

    def __enter__(self) -> Self:
        """Open the run: first entries, attachment, and a quiet process.

        Raises:
            RunError: this one was closed; or it is without privacy and the run that is open here is private.
        """
        if self._used:
            raise RunError("This run was closed; a run is used once.", next_step="Open a new one.", code="run-closed")
        outer = current_run()
        if outer is not None and outer.private and not self.private:
            raise RunError(
                f"The run {outer.experiment!r}, which is open here, is private; a run without privacy inside it would "
                "train and show what it protects.",
                next_step="Open it with a privacy configuration, or after the private run was closed.",
                code="unprotected-inside",
            )
        self.outer, self._used = outer, True
        if self.private:
            for run in self.outwards():  # what went wrong in here may come out there
                run.holds_private = True
        self._enter()
        return self

    def _enter(self) -> None:
        from rlhf_audit_nb.capture.attach import attach_trainers

        with ExitStack() as undo:
            undo.enter_context(no_telemetry())
            if self.privatiser is not None:
                undo.enter_context(self.privatiser.quiet())
            undo.enter_context(attach_trainers())
            enter(self)
            undo.callback(leave, self)
            self._older_threads.update(threading.enumerate())
            self._open = True
            undo.callback(setattr, self, "_open", False)
            self.record(self._start_event())
            self._begun = True
            self._code = look_at_code(Path.cwd())
            self.record(keep_environment(self.trail.artifacts, self._code, private=self.private))
            if self.ranks is not None:
                self.ranks.opened(self)
            if self._cell is not None:
                self.record(*audited_cell(self.trail, self._cell, private=self.private))
            if self.private:
                for run in self.outwards():  # their next entries tell how long this one took
                    run._resolution_us = COARSE_US  # noqa: SLF001  a run's own
            self._undo = undo.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the run with the outcome that the exception, if any, says; in a forked child only let go of it."""
        if self._ended is not None:
            return  # its process ends, and what it changed there ends with it
        try:
            if self._open and not self.birth.elsewhere:
                self._close(error)
        except AuditError as late:
            if error is None:
                raise
            # What stopped the run matters more than that its end could not be written; say both.
            error.add_note(f"The run's end could not be recorded: {late}")
        finally:
            self._open = False
            self.state.finished_at = time.time()
            self._undo.__exit__(kind, error, trace)  # under privacy, an exception that may quote rows leaves as another

    def _close(self, error: BaseException | None) -> None:
        failure = error or self._failure
        status = outcome_of(failure, stopped_by_budget=self.stopped_by_budget)
        # From the last to the first: whatever cannot be told (a folder that cannot be signed any more), the rest is.
        with ExitStack() as telling:
            telling.callback(setattr, self.state, "status", status)
            telling.callback(self._finish, status, type(failure).__name__ if failure is not None else None)
            if failure is not None:
                told = describe_failure(failure, private=self.holds_private, scrub=self._scrubber.text)
                telling.callback(self.record, *told)
            if self.ranks is not None:
                telling.callback(self.ranks.ended, self, status, failure)
            else:
                telling.callback(count_children, self)
            telling.callback(self._record_new_code)
            telling.callback(self._sign_changed_folders)
            telling.callback(self.close_loop, whole=not isinstance(failure, Exception))

    def _record_new_code(self) -> None:
        """The local code that was imported or changed since the run was opened."""
        if self._code is not None and not self.private:
            event = code_since(self._code, self.trail.artifacts)
            if event is not None:
                self.record(event)

    def _finish(self, status: Status, reason: str | None) -> None:
        measured = self.overhead.to_dict()
        self.record(
            RunFinished(
                status=status,
                steps=self.steps,
                trained=self.steps > 0,
                reason=reason,
                unrecorded_steps=self.unrecorded_steps,
                overhead=None if self.holds_private else measured,
            ),
            RunFinishedPrivate(overhead=measured) if self.holds_private and measured is not None else None,
        )
        self.trail.flush()

    def end_with_process(self, reason: str) -> None:
        """Close the run as interrupted because its process ends, for ``reason``; called in any thread.

        Raises:
            TrailError: the trail cannot take it.
        """
        if not self._gate.acquire(timeout=LAST_WORD_SECONDS):
            return  # a commit hangs: the next opening of the trail says that the run was interrupted
        try:
            if self._open and self._begun and not self.birth.elsewhere:
                try:
                    if self.ranks is not None:
                        self.ranks.process_ends(self, reason)
                    self._finish("interrupted", reason)
                finally:
                    self._open, self._ended, self.state.status = False, reason, "interrupted"
        finally:
            self._gate.release()

    def forked(self) -> None:
        """This is a forked child now: the run stays its parent's to close."""
        self._gate = threading.RLock()

    def _start_event(self) -> RunStarted:
        from rlhf_audit_nb import __version__

        return RunStarted(
            experiment=self.experiment,
            tool=f"{TOOL}/{__version__}",
            record=os.environ.get(ENV_RECORD),
            audit={name: getattr(self.audit, name) for name in ("every_steps", "weights_every", "samples_every")},
            parent=self.outer.id if self.outer is not None and self.outer.trail is self.trail else None,
            **self._started,
        )

    # --- what others tell it -----------------------------------------------------------------------------------------

    def record(self, event: Event, private: Private | None = None) -> None:
        """Append one event of this run, without the secrets in its texts; ``private`` goes to the vault as it is.

        Raises:
            RunError: the run is closed.
            TrailError: the trail cannot take it.
        """
        with self._gate:
            self._append(event, private)

    def _append(self, event: Event, private: Private | None) -> None:
        if self._ended == SIGTERM:
            time.sleep(DYING_SECONDS)  # the process dies within this time; nothing may fail meanwhile
        if not self._open:
            raise RunError(
                f"The run of experiment {self.experiment!r} is closed; nothing can be added to it.",
                next_step="Open a new run.",
                code="run-closed",
            )
        if not isinstance(event, Step):  # a step has no time for it, and no text that was not seen before
            self._scrubber.refresh()
        pending = self.trail.append(
            event.TYPE,
            encode_body(self._scrubber.event(event)),
            run=self.id,
            private=encode_private(private) if private is not None else None,
            resolution_us=self._resolution_us,
        )
        if self.audit.waits or (self.ranks is not None and self.ranks.must_wait(self)):
            pending.wait()  # also where the trail was opened by somebody who asked for less
        if self.ranks is not None:
            self.ranks.saw(self, event)

    @property
    def resolution_us(self) -> int:
        """The resolution of the times of this run's entries, in microseconds."""
        return self._resolution_us

    def training_ended(self, failure: BaseException | None) -> None:
        """A training of this run ended; the last one's failure is the run's own even where the cell went on."""
        self._failure = failure

    def warn(self, sentence: str) -> None:
        """Show ``sentence`` in the panel and as a Python warning, once."""
        sentence = self._scrubber.text(sentence)
        if sentence not in self.state.warnings:
            self.state.warnings.append(sentence)
            _warn_user(sentence)

    def weights_saved(self, folder: Path, step: int | None) -> str | None:
        """Sign the folder that a trainer saved and record it; of several processes only the one that writes does.

        Returns:
            The folder's digest; ``None`` in a process that does not write.
        """
        if self.ranks is not None and not self.ranks.writes:
            return None
        digest = self._sign(folder, step)
        self._saved[folder] = (step, folder_state(folder))
        return digest

    def _sign(self, folder: Path, step: int | None) -> str:
        try:
            signed = sign_folder(folder, self.trail.keys.model)
        except OSError as error:
            raise RunError(
                f"The saved model in {folder.name!r} cannot be signed: {error.strerror or error}.",
                next_step="Save into a folder that can be written.",
                code="unwritable",
            ) from error
        self.record(
            WeightsSaved(
                step=step,
                name=folder.resolve().name,
                digest=signed.digest,
                listed=signed.listed,
                files=signed.files,
                bytes=signed.bytes,
                signature_digest=signed.signature_digest,
            )
        )
        return signed.digest

    def _sign_changed_folders(self) -> None:
        """Sign again what was added to a saved folder afterwards, such as a tokenizer or a card."""
        for folder, (step, before) in self._saved.items():
            if folder.is_dir() and folder_state(folder) != before:
                self._sign(folder, step)

    # --- how it shows ------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The run as plain values."""
        return {"run": self.id, **self.state.snapshot()}

    def summary(self) -> str:
        """One line: experiment, outcome, steps and what privacy cost."""
        state = self.state
        steps = f"{state.step} step{'' if state.step == 1 else 's'}" if state.step else "nothing was trained"
        return f"{self.experiment}: {state.status}, {steps}, {self._privacy_words()}"

    def _privacy_words(self) -> str:
        if not self.private:
            return "trained without differential privacy" if self.steps else "no differential privacy"
        view, inherited = self.state.privacy, self.state.inherited
        if view is None and inherited is not None:
            epsilon = math.ceil(inherited.epsilon * 100 - ROUNDING) / 100
            return f"inherits ε {epsilon:.2f} (δ {inherited.delta:g}, unit {inherited.unit}); nothing was charged"
        if view is None:
            return "no privacy spent"
        # Rounded up, so that no line says less than was spent; the slack keeps a whole 8 from reading 8.01.
        spent = math.ceil((self.state.epsilon or 0.0) * 100 - ROUNDING) / 100
        return f"ε {spent:.2f} of {view.budget:g} (δ {view.delta:g}, unit {view.unit}, {view.adjacency})"

    def _repr_markdown_(self) -> str:
        return f"**Run** {self.summary()} · `{self.id}`"

    def __repr__(self) -> str:
        return f"<Run {self.summary()}>"


def _warn_user(sentence: str) -> None:
    """A Python warning that points at the user's own line, not at ours or at a training library's."""
    frame = sys._getframe(1)  # noqa: SLF001  documented; `inspect` would read source files
    while frame.f_back is not None and _package(frame) in _NOT_THE_USERS:
        frame = frame.f_back
    warnings.warn_explicit(
        sentence,
        AuditWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _experiment_name(name: object) -> str:
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise ConfigError(
            f"The experiment's name is {name!r}; it must be one line of 1 to {MAX_NAME} characters.",
            next_step='Write a name such as "safety_alignment".',
            code="experiment",
        )
    return name.strip()
