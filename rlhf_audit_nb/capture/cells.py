"""Which cell opened a run, whether it was audited before, and what had run before it in its kernel. Floor 2.

A notebook's cells can be run twice, out of order, or edited in between; the file that is saved afterwards shows none of
it. The trail does: each audited cell names itself and, by digest, every cell that had run since its kernel began. What
runs the notebook (`CellContext`) is handed in; here it is compared with what the trail holds.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from rlhf_audit_nb.events import CellAudited, CellPrivate, ExecutedCell, decode_body

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import Trail

__all__ = ["MAX_EXECUTED", "CellContext", "audited_cell"]

MAX_EXECUTED = 200
"""So many cells before it stand in the entry itself; a longer list lies beside the trail, named by its digest."""
_encoder = msgspec.json.Encoder(order="deterministic")


@dataclass(frozen=True)
class CellContext:
    """A cell that is about to run.

    Attributes:
        source_digest: of its source, in the form of a record's cells.
        cell: its id in the notebook, where the front end tells it.
        execution_count: the number that it gets.
        executed: what has run in this kernel before, in order.
    """

    source_digest: str
    cell: str | None = None
    execution_count: int | None = None
    executed: tuple[ExecutedCell, ...] = ()


def audited_cell(trail: Trail, context: CellContext, *, private: bool) -> tuple[CellAudited, CellPrivate | None]:
    """The event for the cell that opened a run of ``trail``, and its private half under privacy."""
    before = [
        (index, event)
        for index, event in _audited(trail)
        if (event.cell == context.cell if context.cell is not None else event.source_digest == context.source_digest)
    ]
    seen = "first"
    if before:
        seen = "rerun" if before[-1][1].source_digest == context.source_digest else "edited"
    listed = _encoder.encode(context.executed)
    digest = hashlib.sha256(listed).hexdigest()
    history = CellPrivate(
        executed=list(context.executed[-MAX_EXECUTED:]), executed_total=len(context.executed), executed_digest=digest
    )
    if len(context.executed) > MAX_EXECUTED and not private:
        (trail.artifacts / f"{digest}.json").write_bytes(listed)
    event = CellAudited(
        cell=context.cell,
        execution_count=context.execution_count,
        source_digest=context.source_digest,
        seen=seen,
        seen_in=before[-1][0] if before else None,
        audited_before=len(before),
    )
    if private:
        return event, history
    return (
        msgspec.structs.replace(event, **{name: getattr(history, name) for name in history.__struct_fields__}),
        None,
    )


def _audited(trail: Trail) -> list[tuple[int, CellAudited]]:
    found = []
    for entry in trail.reader().entries(type=CellAudited.TYPE):
        event = decode_body(entry.type, entry.body)
        if isinstance(event, CellAudited):
            found.append((entry.index, event))
    return found
