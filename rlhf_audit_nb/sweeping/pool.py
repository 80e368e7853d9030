"""Workers on this machine: processes that live longer than a run, so that imports are paid once for many. Floor 5.

A worker that dies takes its run with it and nothing else: its pipe closes, the run is told as ``died``, and the next
task gets a new process. After `RECYCLED` runs a worker is replaced, so that what libraries keep does not add up.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

from rlhf_audit_nb.sweeping.task import Task

__all__ = ["RECYCLED", "Finished", "LocalPool", "Pool"]

RECYCLED = 50
Finished = tuple[Task, dict[str, Any]]
"""A task, and what `rlhf_audit_nb.sweeping.task.run_task` said of it."""


class Pool(Protocol):
    """Whoever carries out tasks."""

    where: str

    @property
    def capacity(self) -> int:
        """How many tasks it can run at once."""

    def start(self, task: Task) -> None:
        """Begin a task; there is room for it."""

    def finished(self, timeout: float) -> list[Finished]:
        """What came to an end, after waiting for at most ``timeout`` seconds."""

    def interrupt(self) -> None:
        """Have everything that runs sealed as it stands; `finished` tells of it."""

    def close(self) -> None:
        """Let go of the workers."""


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    answers: IO[bytes]
    tasks: IO[bytes]
    task: Task | None = None
    served: int = 0
    read: bytearray = field(default_factory=bytearray)


class LocalPool:
    """Up to ``workers`` processes, started as they are needed."""

    where = "local"

    def __init__(self, workers: int) -> None:
        self._most = workers
        self._workers: list[_Worker] = []
        self._ready = selectors.DefaultSelector()

    @property
    def capacity(self) -> int:
        """How many tasks it can run at once."""
        return self._most

    def start(self, task: Task) -> None:
        """Begin a task; there is room for it."""
        worker = next((one for one in self._workers if one.task is None), None) or self._hired()
        worker.task = task
        try:
            worker.tasks.write(json.dumps(task.to_dict()).encode() + b"\n")
            worker.tasks.flush()
        except BrokenPipeError:
            pass  # it is gone already: its closed pipe says so, as of any other

    def _hired(self) -> _Worker:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_audit_nb.sweeping.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert process.stdout is not None
        assert process.stdin is not None
        worker = _Worker(process, process.stdout, process.stdin)
        self._workers.append(worker)
        self._ready.register(worker.answers, selectors.EVENT_READ, worker)
        return worker

    def finished(self, timeout: float) -> list[Finished]:
        """What came to an end, after waiting for at most ``timeout`` seconds."""
        found: list[Finished] = []
        for key, _ in self._ready.select(timeout):
            worker: _Worker = key.data
            data = os.read(worker.answers.fileno(), 1 << 16)
            worker.read += data
            line, newline, rest = worker.read.partition(b"\n")
            if newline:
                worker.read = bytearray(rest)
                found += self._answered(worker, json.loads(line))
            elif not data:
                found += self._answered(worker, {"outcome": "died", "message": self._end_of(worker), "seconds": 0.0})
                self._let_go(worker)
        return found

    def _answered(self, worker: _Worker, said: dict[str, Any]) -> list[Finished]:
        task, worker.task = worker.task, None
        worker.served += 1
        if worker.served >= RECYCLED:
            self._let_go(worker)
        return [] if task is None else [(task, said)]

    @staticmethod
    def _end_of(worker: _Worker) -> str:
        status = worker.process.wait()
        how = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return f"The process that ran it ended {how}."

    def _let_go(self, worker: _Worker) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
            self._ready.unregister(worker.answers)
            worker.answers.close()
            with suppress(BrokenPipeError):
                worker.tasks.close()
            worker.process.wait()

    def interrupt(self) -> None:
        """Have everything that runs sealed as it stands; `finished` tells of it."""
        for worker in self._workers:
            if worker.task is not None:
                worker.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        """Let go of the workers; one that still has a run ends after it, and is not waited for."""
        for worker in list(self._workers):
            if worker.task is None:
                self._let_go(worker)
            else:
                self._workers.remove(worker)
                self._ready.unregister(worker.answers)
                worker.answers.close()
                worker.tasks.close()
        self._ready.close()
