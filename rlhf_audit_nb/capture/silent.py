"""The trail of a process that writes none: everything is taken, nothing is kept. Floor 2.

Of several processes that train one model, one writes. The others run the same code, so they get an object that takes
what a `Trail` takes. It makes no folder, no key and no file (what is written beside an entry goes into a temporary
folder that ends with the process); what it cannot do it refuses in a sentence.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_audit_nb.errors import RunError
from rlhf_audit_nb.trail import Draft, Pending, TrailStatus

__all__ = ["SilentTrail"]


class SilentTrail:
    """Stands in for a trail in the process of ``rank`` of ``world_size``.

    Attributes:
        origin: the name of no trail.
        taken: how many entries of each type were appended to it, and not written.
    """

    origin = ""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self.taken: dict[str, int] = {}

    def append(self, type: str, body: bytes, **said: Any) -> Pending:  # noqa: A002  as in `Trail.append`
        """Take an entry; it counts as done and has no place (-1)."""
        self.taken[type] = self.taken.get(type, 0) + 1
        now = time.time_ns() // 1000
        pending = Pending(None, type, body, said.get("run"), None, None, said.get("resolution_us", 1), now)
        pending.settle(-1)
        return pending

    def append_many(self, drafts: Iterable[Draft]) -> list[int]:
        """Take many; they have no places (-1 each)."""
        return [self.append(draft.type, draft.body).wait() for draft in drafts]

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""

    def reader(self) -> _NoEntries:
        """No entries."""
        return _NoEntries()

    def status(self) -> TrailStatus:
        """An empty trail's, signed by nobody."""
        return TrailStatus(0, bytes(32), "", 0, 0, "")

    @cached_property
    def _temporary(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="rlhf-audit-")

    @property
    def artifacts(self) -> Path:
        """A temporary folder."""
        return Path(self._temporary.name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise RunError(
            f"Process {self._rank} of {self._world_size} keeps no trail, so it has no {name} of one: rank 0 writes it.",
            next_step="Do this in the process of rank 0, or after the training in one process.",
            code="silent-rank",
        )


class _NoEntries:
    """The reader of a trail without entries."""

    size = 0

    def entries(self, *_: Any, **__: Any) -> Iterator[Any]:
        """None."""
        return iter(())
