"""How the processes of one training tell each other what they saw: through the store of their process group. Floor 2.

torch's process group has a key-value store beside the collectives (of torchrun's agent, or of rank 0), and using it
takes no part of any other process: nothing here can wait for a collective that never comes. Each process keeps one
key of its own and overwrites it. Every call runs in a thread of its own and is given up after a bounded time; after
that the exchange is closed, so that no training waits twice.

Whether a process still lives is asked of the system where it runs on the same machine (its number, its start time and
its namespace, which stay in the store and never reach the trail); of another machine's nothing is known but its word.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

__all__ = ["Exchange", "Identity", "default_store", "started"]

PATIENCE_S = 5.0

ResultT = TypeVar("ResultT")


class Identity(msgspec.Struct, frozen=True):
    """Which process of which machine: enough to ask whether it still lives, where it is this machine's."""

    pid: int
    started: str
    machine: str
    namespace: str

    @classmethod
    def mine(cls) -> Identity:
        """This process's own."""
        return cls(os.getpid(), started(os.getpid()) or "", _machine(), _namespace())

    def is_gone(self) -> bool:
        """Whether the process has certainly ended: ``False`` also where that cannot be known."""
        if not self.started or self.machine != _machine() or self.namespace != _namespace():
            return False
        return started(self.pid) != self.started


def started(pid: int) -> str | None:
    """When process ``pid`` started, in the system's ticks; ``None`` where there is no such process that runs."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # after the command's name, which may hold anything
    return None if fields[0] in "ZX" else fields[19]


def _machine() -> str:
    with contextlib.suppress(OSError):
        return hashlib.sha256(Path("/proc/sys/kernel/random/boot_id").read_bytes()).hexdigest()
    return ""


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def default_store() -> Any:
    """The store of torch's default process group; ``None`` where none is initialised, or it has none."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    try:  # torch has no public name for it
        return distributed.distributed_c10d._get_default_store()  # noqa: SLF001
    except (AttributeError, ValueError):
        return None


class Exchange:
    """The keys of one run in a store.

    Args:
        store: a ``torch.distributed`` store.
        run: what tells this run's keys from another's; the same in all processes.
    """

    def __init__(self, store: Any, run: str) -> None:
        self._store = store
        self._prefix = f"rlhf-audit/{run}/"
        self.failure: str | None = None

    def put(self, key: str, value: bytes) -> bool:
        """Keep ``value`` under ``key``; whether that was done in time."""
        return self._bounded(lambda: self._put(key, value)) is True

    def get(self, key: str) -> bytes | None:
        """What stands under ``key`` now, or ``None``."""
        return self._bounded(lambda: self._get(key))

    def _put(self, key: str, value: bytes) -> bool:
        self._store.set(self._prefix + key, value)
        return True

    def _get(self, key: str) -> bytes | None:
        # Asked first: a store's own get waits for the key.
        found = self._store.check([self._prefix + key])
        return bytes(self._store.get(self._prefix + key)) if found else None

    def _bounded(self, call: Callable[[], ResultT | None]) -> ResultT | None:
        if self.failure is not None:
            return None
        answer: list[ResultT | None] = []

        def work() -> None:
            try:
                answer.append(call())
            except Exception as error:  # whatever a store's connection fails with; who called tells it
                self.failure = type(error).__name__

        thread = threading.Thread(target=work, name="rlhf-audit-ranks", daemon=True)
        thread.start()
        thread.join(PATIENCE_S)
        if thread.is_alive():
            self.failure = "no answer"
        return answer[0] if answer else None
