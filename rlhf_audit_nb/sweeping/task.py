"""One run of a sweep, as whoever carries it out sees it: a process of this machine or a Dask worker. Floor 5.

`run_task` executes the notebook into ``attempts/<point>.<attempt>.ipynb``; where the run came to an end of its own
(completed, or failed in a cell) the sealed record takes its final name, ``<point>.ipynb``, in one step. So what has the
final name is whole, and what was cut short is kept beside it.

An attempt is claimed by a file that only one process can make. A scheduler that starts a task again, because the
worker that had it is gone, therefore does not run it twice: the second one finds the claim, and says that the first
died. The sweep then decides whether there is another attempt, and what it may spend.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_audit_nb.config import ENV_HOME, ENV_SLOT
from rlhf_audit_nb.errors import AuditError

__all__ = ["ATTEMPTS", "Task", "claimed", "run_task", "stop_file", "working"]

ATTEMPTS = "attempts"
_WORKERS = "workers.lock"
_STOP = "stop"
_LONGEST = 300  # characters of what a run said, for a table
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Task:
    """What a worker needs to know.

    Attributes:
        point: the run's id.
        attempt: from 1; each has a claim of its own.
        sweep: the sweep's id.
        notebook, folder, trail, cwd: absolute paths.
        parameters: of the run.
        kernel: another kernel than the notebook names.
        slot: the budget that is held for its private training.
        home: the folder of keys, where it is not the worker's own.
    """

    point: str
    attempt: int
    sweep: str
    notebook: str
    folder: str
    trail: str
    cwd: str
    parameters: dict[str, Any]
    kernel: str | None = None
    slot: str | None = None
    home: str | None = None

    @property
    def path(self) -> Path:
        """Where it writes while it runs."""
        return Path(self.folder) / ATTEMPTS / f"{self.point}.{self.attempt}.ipynb"

    @property
    def claim(self) -> Path:
        """The file that says that a worker has it."""
        return self.path.with_suffix(".claim")

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)


class _StoppedError(KeyboardInterrupt):
    """The sweep was told to end: what was executed until now is sealed."""


def claimed(folder: Path, point: str) -> int:
    """The highest attempt at a point that anybody has claimed; 0 where nobody has."""
    numbers = (path.name.split(".")[1] for path in (folder / ATTEMPTS).glob(f"{point}.*.claim"))
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def stop_file(folder: Path, sweep: str) -> Path:
    """While it is there, tasks of this sweep seal what they have at the end of a cell, and no other starts."""
    return folder / ATTEMPTS / f"{sweep}.{_STOP}"


@contextmanager
def working(folder: Path, *, alone: bool, wait: bool = True) -> Iterator[bool]:
    """Hold the folder as one who runs a task, or ``alone`` as who starts a sweep; gives whether it was had."""
    descriptor = os.open(folder / ATTEMPTS / _WORKERS, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        yield False
        return
    try:
        yield True
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def run_task(task: Task) -> dict[str, Any]:
    """Carry out one attempt; errors are told, not raised.

    Returns:
        ``outcome``: ``completed``, ``failed``, ``refused``, ``aborted`` (sealed, but cut short), ``interrupted`` (so
        was it, by who asked), ``died`` (another process had this attempt, and is gone), ``stopped`` (not begun), or
        ``error`` (nothing could be run); with ``record``, ``reason``, ``message`` and ``seconds``.
    """
    with _one_at_a_time, working(Path(task.folder), alone=False):
        if stop_file(Path(task.folder), task.sweep).exists():
            return {"outcome": "stopped", "seconds": 0.0}
        try:
            task.claim.touch(exist_ok=False)
        except FileExistsError:
            return {"outcome": "died", "message": "The process that ran it is gone.", "seconds": 0.0}
        began = time.monotonic()
        with _environment(task):
            said = _attempted(task)
        return {**said, "seconds": time.monotonic() - began}


@contextmanager
def _environment(task: Task) -> Iterator[None]:
    """The variables that the kernel inherits; put back afterwards."""
    wanted = {ENV_SLOT: task.slot, ENV_HOME: task.home or os.environ.get(ENV_HOME)}
    before = {name: os.environ.get(name) for name in wanted}
    try:
        _set(wanted)
        yield
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _attempted(task: Task) -> dict[str, Any]:
    from rlhf_audit_nb.records.run import NotebookFailedError, NotebookRefusedError, Terminated, run_notebook

    stop = stop_file(Path(task.folder), task.sweep)

    def told(_position: int, _cells: int, state: str) -> None:
        if state == "running" and stop.exists():
            raise _StoppedError

    try:
        result = run_notebook(
            task.notebook,
            task.path,
            task.parameters,
            trail=task.trail,
            kernel_name=task.kernel,
            cwd=task.cwd,
            progress=told,
        )
        said: dict[str, Any] = {"outcome": "completed", "record": result.record}
    except NotebookFailedError as error:
        result = error.result
        refused = isinstance(error, NotebookRefusedError)
        outcome = "aborted" if result.status == "aborted" else "refused" if refused else "failed"
        said = {
            "outcome": outcome,
            "record": result.record,
            "reason": result.reason,
            "message": _first_line(error.said) or error.message,
        }
    except (KeyboardInterrupt, Terminated):
        return {"outcome": "interrupted"}
    except AuditError as error:
        return {"outcome": "error", "reason": error.reason, "message": error.message}
    except Exception as error:
        # Told, so that one run's misfortune (a full disk, a broken library) leaves the others alone.
        return {"outcome": "error", "reason": type(error).__name__, "message": f"{type(error).__name__}: {error}"}
    if said["outcome"] != "aborted":  # its own end: the record takes its name
        task.path.replace(Path(task.folder) / f"{task.point}.ipynb")
    return said


def _first_line(said: str) -> str:
    return said.partition("\n")[0][:_LONGEST]
