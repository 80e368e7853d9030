"""Records, and what is written for people: reports and cards. Floor 1."""

from __future__ import annotations

from typing import Any, ClassVar

from rlhf_audit_nb.events.base import Event

__all__ = [
    "CardCreated",
    "CellExecuted",
    "RecordSealed",
    "RecordStarted",
    "ReportCreated",
]


class RecordStarted(Event, frozen=True, kw_only=True):
    """A notebook began to be executed into a record.

    ``notebook_digest`` covers type, tags and source of every cell but the injected parameters; ``kernel`` holds the
    kernel specification's ``name``, ``language`` and ``display_name``.
    """

    TYPE: ClassVar[str] = "record.started"

    record: str
    notebook_digest: str
    parameters: dict[str, Any]
    tool: str
    kernel: dict[str, str] = {}


class CellExecuted(Event, frozen=True, kw_only=True):
    """One cell of a record was executed: digests of its source and its outputs at that moment."""

    TYPE: ClassVar[str] = "record.cell"

    record: str
    cell: str
    position: int
    source_digest: str
    outputs_digest: str
    status: str


class RecordSealed(Event, frozen=True, kw_only=True):
    """A record was sealed: the digest of its normal form and its outcome (``completed``, ``failed``, ``aborted``).

    ``cell`` is the id of the cell in which it failed or was aborted; ``keys`` are the ids of the keys that sign the
    record's statement, so that no choice of entries can name others; ``build_type`` is the form of that statement, so
    that it cannot be told in an older one. ``related`` counts the thresholds and evaluations of the same metrics that
    were in the trail before this entry and are not of this record, and ``related_digest`` is SHA-256 over their leaf
    hashes: the record carries them all. These four are ``None`` in records of earlier versions.
    """

    TYPE: ClassVar[str] = "record.sealed"

    record: str
    digest: str
    status: str
    cells: int
    reason: str | None = None
    cell: str | None = None
    keys: list[str] | None = None
    build_type: str | None = None
    related: int | None = None
    related_digest: str | None = None


class ReportCreated(Event, frozen=True, kw_only=True):
    """A report was written: the digest of its bytes and of what it was drawn from (trail size and root)."""

    TYPE: ClassVar[str] = "report.created"

    format: str
    digest: str
    size: int
    root: str


class CardCreated(Event, frozen=True, kw_only=True):
    """A model card was written."""

    TYPE: ClassVar[str] = "card.created"

    format: str
    digest: str
    size: int
    root: str
