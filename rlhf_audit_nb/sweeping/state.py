"""What is there already: the records of a sweep's folder, verified before they count. Floor 5.

Nothing else remembers how far a sweep came. A point is done where ``<point>.ipynb`` verifies, is a record of this trail
and of this notebook with the point's parameters, and came to an end of its own. A file of that name that does not hold
is moved to ``attempts/`` and kept; the point is run again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.errors import ConfigError, RecordError
from rlhf_audit_nb.events import EvaluationRecorded, RecordSealed, RunStarted, Step, decode_body
from rlhf_audit_nb.privacy.accountant import composed_epsilon
from rlhf_audit_nb.privacy.ledger import fold
from rlhf_audit_nb.records.record import open_record
from rlhf_audit_nb.sweeping.task import ATTEMPTS
from rlhf_audit_nb.trail import Level

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rlhf_audit_nb.records.record import OpenedRecord
    from rlhf_audit_nb.sweeping.grid import Point
    from rlhf_audit_nb.trail import Entry, TrailReader

__all__ = ["Found", "digests_of", "look", "record_path", "set_aside"]


@dataclass(frozen=True)
class Found:
    """A point's record, verified.

    Attributes:
        point: the run's id.
        record: the record's id.
        digest: of the notebook, as the record's statement names it (SHA-256 of its normal form).
        parameters: of the run.
        outcome: ``completed``, ``failed`` or ``refused`` (a cell said that a budget or a guarantee does not allow it).
        reason: the name of what was raised, else ``None``.
        level: how far the verdict on it reaches.
        epsilon: what its private trainings cost together, ``None`` where it has none; at ``delta``.
        delta: of their configuration.
        metrics: figures that stand in the open: of evaluations, and of the last step where no run was private.
    """

    point: str
    record: str
    digest: str
    parameters: dict[str, Any]
    outcome: str
    reason: str | None
    level: str
    epsilon: float | None
    delta: float | None
    metrics: dict[str, Any]


def record_path(folder: Path, point: str) -> Path:
    """Where the record of a point is."""
    return folder / f"{point}.ipynb"


def digests_of(reader: TrailReader) -> dict[str, str]:
    """The records that a trail has sealed, each with its notebook's digest."""
    events = (decode_body(entry.type, entry.body) for entry in reader.entries(type=RecordSealed.TYPE))
    return {event.record: event.digest for event in events if isinstance(event, RecordSealed)}


def look(folder: Path, point: Point, notebook_digest: str, sealed: dict[str, str]) -> tuple[Found | None, str]:
    """The record of a point, if it has one that holds; else why the file of that name is none (or nothing).

    Args:
        folder: of the sweep.
        point: the run.
        notebook_digest: of the notebook that is swept, as a record names it.
        sealed: what the trail has sealed (`digests_of`).

    Raises:
        ConfigError: it is the record of another notebook, or of an earlier version of this one: code ``sweep-folder``.
    """
    from rlhf_audit_nb.sweeping.grid import point_id  # here: the kernel of a summary starts sooner without it

    path = record_path(folder, point.id)
    if not path.exists():
        return None, ""
    try:
        opened = open_record(path)
    except RecordError as error:
        return None, error.message
    if opened.verdict.level <= Level.DIVERGED:
        return None, opened.verdict.reasons[0].message if opened.verdict.reasons else "It does not verify."
    assert opened.started is not None  # of a record that verifies, both are proven
    assert opened.sealed is not None
    if opened.started.notebook_digest != notebook_digest:
        raise ConfigError(
            f"{path} is a record of another notebook, or of this one before it was changed.",
            next_step="Name another folder with -o, so that the runs of a sweep are runs of one notebook.",
            code="sweep-folder",
        )
    if sealed.get(opened.sealed.record) != opened.sealed.digest:
        return None, "It was sealed in another trail."
    if point_id(opened.started.parameters) != point.id:  # which tells 1 from true, as == does not
        return None, "Its parameters are another point's."
    if opened.sealed.status == "aborted":
        return None, "It was cut short."
    return found_of(point.id, opened), ""


def set_aside(folder: Path, point: str) -> Path:
    """Move a file that is no valid record of its point out of the way; nothing is deleted."""
    number = 1
    while (kept := folder / ATTEMPTS / f"{point}.rejected-{number}.ipynb").exists():
        number += 1
    return record_path(folder, point).rename(kept)


def found_of(point: str, opened: OpenedRecord) -> Found:
    """What a verified record says, of which nothing is a function of private data."""
    assert opened.started is not None
    assert opened.sealed is not None
    sealed = opened.sealed
    epsilon, delta = _spent(opened.entries)
    return Found(
        point=point,
        record=sealed.record,
        digest=sealed.digest,
        parameters=dict(opened.started.parameters),
        outcome=_outcome(sealed),
        reason=sealed.reason,
        level=opened.verdict.level.name,
        epsilon=epsilon,
        delta=delta,
        metrics=_metrics(opened.entries),
    )


def _outcome(sealed: RecordSealed) -> str:
    if sealed.status != "failed":
        return sealed.status
    from rlhf_audit_nb.records.run import REFUSALS  # here: it takes a second to import

    return "refused" if sealed.reason in REFUSALS else "failed"


def _spent(entries: Iterable[Entry]) -> tuple[float | None, float | None]:
    ledger = fold(entries)
    limit = ledger.limit
    if not ledger.spends or limit is None:
        return None, None
    return composed_epsilon([spend.mechanism for spend in ledger.spends], limit.delta), limit.delta


def _metrics(entries: Iterable[Entry]) -> dict[str, Any]:
    events = [decode_body(entry.type, entry.body) for entry in entries if entry.type in _TELLING]
    private = any(isinstance(event, RunStarted) and event.privacy is not None for event in events)
    found: dict[str, Any] = {}
    for event in events:
        if isinstance(event, Step) and not private:  # of a private run even what it released belongs to its report
            found |= event.metrics
    for event in events:
        if isinstance(event, EvaluationRecorded):
            found |= {name: value for name, value in event.metrics.items() if value is not None}
    return found


_TELLING = frozenset({RunStarted.TYPE, Step.TYPE, EvaluationRecorded.TYPE})
