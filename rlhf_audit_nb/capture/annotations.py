"""Annotations: what people said of responses, sealed into the trail and read back. Floor 2.

Each annotation becomes one ``annotation.recorded`` entry whose open part names its import and nothing else. The pair,
the order shown, the choice or reward, the guideline, the time, the annotator and whatever else the source holds are
the private half: a commitment in the trail, the opening in the vault under the annotator's own key, so that erasing
her erases them. Before the first comes ``annotations.imported``: the form of the source, which field is recorded row by
row, stated for all, or unknown, and how many rows there are. `annotation_rows` checks and encodes; this module writes
and reads.

What is open to all who see the trail: how many annotations there are, the order in which they were handed in, the day
on which each was (`DAY_US`; what stands before and after it, and checkpoints, may narrow that down), and what the
import's own entry says. Who gave which, and how many each gave, is not.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, MutableMapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import msgspec

from rlhf_audit_nb.capture.run import COARSE_US
from rlhf_audit_nb.events import (
    Annotation,
    AnnotationRecorded,
    AnnotationsImported,
    decode_body,
    decode_private,
    encode_body,
    encode_private,
)
from rlhf_audit_nb.trail import Draft

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.annotation_rows import Prepared
    from rlhf_audit_nb.trail import Entry, HalfState, Trail, TrailReader, Vault

__all__ = [
    "DAY_US",
    "AnnotationImport",
    "Headers",
    "ImportSummary",
    "OpenedAnnotation",
    "append_annotations",
    "import_owner",
    "read_annotations",
    "summarize_annotations",
]

DAY_US = 86_400_000_000
"""Of its own time an entry of an annotation tells the day and no more: when a person worked is hers."""

Headers = MutableMapping[tuple[str, str | None, bytes], str]
"""Imports that more may be added to, by trail, run and what their header says."""


@dataclass(frozen=True, kw_only=True)
class AnnotationImport:
    """Annotations that are in the trail: their import, how many, and the first and the last entry."""

    import_id: str
    rows: int
    first: int
    last: int

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        if self.rows == 1:
            return f"1 annotation: entry {self.first} (import {self.import_id})."
        return f"{self.rows:,} annotations: entries {self.first} to {self.last} (import {self.import_id})."

    __repr__ = __str__


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What is open about one import, and how many of its annotations are in the trail.

    ``rows`` is what the import said would follow, ``None`` where it may grow. ``index`` is its own entry, ``time`` when
    that was made (UTC microseconds). The rest is as in `rlhf_audit_nb.events.AnnotationsImported`.
    """

    import_id: str
    index: int
    time: int
    run: str | None
    form: str
    kind: str
    rows: int | None
    recorded: int
    provenance: dict[str, str]
    guideline: str | None
    guideline_digest: str | None
    digests: list[str]

    @property
    def complete(self) -> bool:
        """Whether all that were announced are there; one that may grow always is."""
        return self.rows is None or self.recorded == self.rows

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return {**asdict(self), "complete": self.complete}


@dataclass(frozen=True, kw_only=True)
class OpenedAnnotation:
    """One annotation as the vault shows it; ``annotation`` is ``None`` where ``state`` is not ``open``."""

    index: int
    import_id: str
    run: str | None
    state: HalfState
    annotation: Annotation | None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found

    def __repr__(self) -> str:
        # Without what it says: a notebook is passed on with all that it showed.
        return f"<annotation {self.index} of import {self.import_id}: {self.state}>"


def import_owner(import_id: str) -> str:
    """Whose the private half of an import is in the vault, and those of its annotations that have no annotator."""
    return f"import:{import_id}"


def append_annotations(
    trail: Trail, prepared: Prepared, *, run: str | None = None, headers: Headers | None = None
) -> AnnotationImport:
    """Write annotations that were checked; they are durable when this returns.

    Args:
        trail: where to.
        prepared: what `annotation_rows` made.
        run: the open run that they belong to.
        headers: imports that may grow are remembered here, so that the next call adds to the same one.

    Raises:
        StoreError: a commit failed. What was committed before stays, and shows as an import that is not complete.
    """
    key = (trail.origin, run, encode_body(prepared.header))
    known = headers.get(key) if headers is not None and prepared.header.rows is None else None
    import_id = known or uuid.uuid4().hex[:16]
    announced = [] if known else [_header(prepared, import_id, run)]
    indexes = trail.append_many(chain(announced, _drafts(prepared, import_id, run)))
    if headers is not None and prepared.header.rows is None:
        headers[key] = import_id
    return AnnotationImport(
        import_id=import_id, rows=len(prepared.payloads), first=indexes[len(announced)], last=indexes[-1]
    )


def _header(prepared: Prepared, import_id: str, run: str | None) -> Draft:
    event = msgspec.structs.replace(prepared.header, import_id=import_id)
    private = None if prepared.private is None else encode_private(prepared.private)
    return Draft(event.TYPE, encode_body(event), run, private, import_owner(import_id), COARSE_US)


def _drafts(prepared: Prepared, import_id: str, run: str | None) -> Iterator[Draft]:
    kind, body = AnnotationRecorded.TYPE, encode_body(AnnotationRecorded(import_id=import_id))
    if prepared.owners is None:
        owner = import_owner(import_id)
        for payload in prepared.payloads:
            yield Draft(kind, body, run, payload, owner, DAY_US)
        return
    for payload, owner in zip(prepared.payloads, prepared.owners, strict=True):
        yield Draft(kind, body, run, payload, owner, DAY_US)


def read_annotations(
    reader: TrailReader, vault: Vault, *, import_id: str | None = None, run: str | None = None
) -> Iterator[OpenedAnnotation]:
    """The annotations in the trail's order, each opened and checked against its commitment.

    Args:
        reader: the state of the trail.
        vault: its vault, with the key that opens it.
        import_id: only those of one import.
        run: only those of one run.

    Raises:
        VaultError: the vault's key is not this one, or an opening is not its commitment's.
    """
    for entry in reader.entries(type=AnnotationRecorded.TYPE, run=run):
        event = decode_body(entry.type, entry.body)
        assert isinstance(event, AnnotationRecorded)  # for the type checker; decode_body checked it
        if import_id is None or event.import_id == import_id:
            half = vault.half(entry)
            yield OpenedAnnotation(
                index=entry.index,
                import_id=event.import_id,
                run=entry.run,
                state=half.state,
                annotation=None if half.payload is None else _annotation(half.payload),
            )


def _annotation(payload: bytes) -> Annotation:
    half = decode_private(AnnotationRecorded.TYPE, payload)
    assert isinstance(half, Annotation)  # for the type checker; decode_private checked it
    return half


def summarize_annotations(reader: TrailReader) -> tuple[ImportSummary, ...]:
    """Every import and how many of its annotations are in the trail, from what is open; needs no key."""
    counted: dict[str, int] = {}
    for entry in reader.entries(type=AnnotationRecorded.TYPE):
        event = decode_body(entry.type, entry.body)
        assert isinstance(event, AnnotationRecorded)  # for the type checker; decode_body checked it
        counted[event.import_id] = counted.get(event.import_id, 0) + 1
    return tuple(_summary(entry, counted) for entry in reader.entries(type=AnnotationsImported.TYPE))


def _summary(entry: Entry, counted: dict[str, int]) -> ImportSummary:
    event = decode_body(entry.type, entry.body)
    assert isinstance(event, AnnotationsImported)  # for the type checker; decode_body checked it
    return ImportSummary(
        import_id=event.import_id,
        index=entry.index,
        time=entry.time,
        run=entry.run,
        form=event.form,
        kind=event.kind,
        rows=event.rows,
        recorded=counted.get(event.import_id, 0),
        provenance=event.provenance,
        guideline=event.guideline,
        guideline_digest=event.guideline_digest,
        digests=event.digests,
    )
