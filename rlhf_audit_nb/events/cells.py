"""The notebook's cell that opened a run, and what had run before it. Floor 1."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from rlhf_audit_nb.events.base import Event, Private

__all__ = ["CellAudited", "CellPrivate", "ExecutedCell"]


class ExecutedCell(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A cell that ran in the kernel: ``status`` is ``ok``, ``error`` or ``unknown`` (it ran before anybody watched)."""

    count: int | None
    source_digest: str
    cell: str | None = None
    status: str = "unknown"


class CellPrivate(Private, frozen=True, kw_only=True):
    """Under differential privacy: what had run before, whose sources may hold data."""

    executed: list[ExecutedCell] = []
    executed_total: int = 0
    executed_digest: str | None = None


class CellAudited(Event, frozen=True, kw_only=True):
    """The cell that opened this run, as it ran.

    ``cell`` is the id that the notebook gives it (``None`` where the front end tells none), ``execution_count`` the
    number in ``In [n]``. ``seen`` says whether this trail has a run of the same cell already: ``first``, ``rerun``
    (with the same source) or ``edited`` (with another one); ``seen_in`` is that run's entry like this one, and
    ``audited_before`` how many there are. Without an id only the same source counts as the same cell.

    ``executed`` are the cells that had run in this kernel, in their order, at most the last 200 of ``executed_total``;
    ``executed_digest`` covers all of them, as the JSON list that lies in ``artifacts/`` where they are more. Under
    differential privacy these three are in the private half. Source digests have the form of a record's cells.
    """

    TYPE: ClassVar[str] = "run.cell"
    PRIVATE: ClassVar[type[Private] | None] = CellPrivate

    cell: str | None
    execution_count: int | None
    source_digest: str
    seen: str
    seen_in: int | None = None
    audited_before: int = 0
    executed: list[ExecutedCell] = []
    executed_total: int = 0
    executed_digest: str | None = None
