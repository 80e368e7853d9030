"""What a record claims: an in-toto Statement with SLSA provenance, derived from the trail alone. Floor 3.

The statement (in-toto Statement v1, predicate SLSA Provenance v1) says: the notebook with this digest came out of
executing this source with these parameters, from these inputs, with these results. Every value in it is a function
of the record's entries and its checkpoint, so a verifier derives it again and compares: a statement cannot say more
than the trail does, and a difference is named by its path.

=================================  ====================================================================================
``subject``                        the notebook: digest of its normal form (``normal_form.py``)
``buildDefinition.buildType``      a notebook executed by papermill with the engine ``audit``, in one of `BUILD_TYPES`
``externalParameters``             ``parameters``, as they were injected
``internalParameters``             record id, the trail's origin, the normal form's name, the kernel specification
``resolvedDependencies``           the notebook's source; what its runs started from (`statement_v2`)
``runDetails.builder``             `BUILDER_ID` and the tool's version
``runDetails.metadata``            record id; times of ``record.started`` and ``record.sealed``
``runDetails.byproducts``          the checkpoint (SHA-256 of the note; origin, size, root), all entries of the record
                                   (SHA-256 over their leaf hashes in order; count), the outcome (the
                                   ``record.sealed`` entry), and what its runs left (`statement_v2`)
=================================  ====================================================================================

The entry ``record.sealed`` says which version of the statement the record has; those that say none were sealed before
there was a second one, and are derived by the first (`statement_v1`) for ever. A statement cannot choose: one that
claims another version than its entry differs from what is derived.

Where differential privacy keeps a data set's digest in the vault, the dependency's digest is that of the entry that
holds the commitment, and its annotations say so. A digest of an entry is its RFC 6962 leaf hash.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_audit_nb.errors import FormatError, RecordError
from rlhf_audit_nb.events import (
    CellExecuted,
    EvaluationRecorded,
    Event,
    RecordSealed,
    RecordStarted,
    ThresholdSealed,
    TrailCreated,
    decode_body,
)
from rlhf_audit_nb.records import statement_v1, statement_v2
from rlhf_audit_nb.records.normal_form import FORMAT, canonical_json
from rlhf_audit_nb.records.resources import event_of, leaf, resource
from rlhf_audit_nb.trail.checkpoint import checkpoint_of
from rlhf_audit_nb.trail.merkle import leaf_hash

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rlhf_audit_nb.trail.entry import Entry

__all__ = [
    "BUILDER_ID",
    "BUILD_TYPE",
    "BUILD_TYPES",
    "PREDICATE_TYPE",
    "STATEMENT_TYPE",
    "build_statement",
    "encode_statement",
    "entries_digest",
    "event_of",
    "first_difference",
    "only",
    "record_of",
]

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = statement_v2.BUILD_TYPE
"""What new records are signed with."""

BUILD_TYPES = (statement_v1.BUILD_TYPE, statement_v2.BUILD_TYPE)
BUILDER_ID = "urn:rlhf-audit:papermill-engine-audit:v1"

_OF_RECORDS = (RecordStarted, CellExecuted, RecordSealed, ThresholdSealed, EvaluationRecorded)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

EventT = TypeVar("EventT", bound=Event)


def record_of(entry: Entry) -> str | None:
    """The record that the entry says something of, ``None`` where it is of another kind."""
    if entry.type not in {kind.TYPE for kind in _OF_RECORDS}:
        return None
    event = decode_body(entry.type, entry.body)
    assert isinstance(event, _OF_RECORDS)
    return event.record


def only(entries: Iterable[Entry], kind: type[EventT], record: str | None = None) -> tuple[Entry, EventT]:
    """The one entry of this kind (of this record, where one is named) and its event.

    Raises:
        RecordError: there is none, or more than one.
    """
    of_kind = [entry for entry in entries if entry.type == kind.TYPE]
    found = [(entry, event_of(entry, kind)) for entry in of_kind if record is None or record_of(entry) == record]
    if len(found) != 1:
        raise RecordError(
            f"The record holds {len(found)} {kind.TYPE} entries of its own, not one.", code="missing-entry"
        )
    return found[0]


def entries_digest(entries: Iterable[Entry]) -> str:
    """SHA-256 (hex) over the leaf hashes of the entries in their order."""
    return hashlib.sha256(b"".join(leaf_hash(entry.data) for entry in entries)).hexdigest()


def _when(microseconds: int) -> str:
    try:
        moment = _EPOCH + timedelta(seconds=microseconds // 1_000_000)
    except OverflowError as error:
        raise FormatError(f"An entry's time is after the year 9999 ({microseconds}).", code="time") from error
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{microseconds % 1_000_000:06d}Z"


def build_statement(record: str, checkpoint: str, entries: Sequence[Entry]) -> dict[str, Any]:
    """The statement of a record, from its checkpoint (a signed note) and its entries in their order.

    Raises:
        RecordError: an entry that every record has is missing or stands twice, or the record is of a version that is
            not known here (``unknown-version``).
        EntryError, FormatError: an entry or the checkpoint is malformed.
    """
    head = checkpoint_of(checkpoint)
    _, created = only(entries, TrailCreated)
    started_at, started = only(entries, RecordStarted, record)
    sealed_at, sealed = only(entries, RecordSealed, record)
    build_type = sealed.build_type or statement_v1.BUILD_TYPE
    if build_type not in BUILD_TYPES:
        raise RecordError(
            f"The record's statement is of the form {build_type}, which is not known here.",
            next_step="Verify the record with the version that wrote it, or a later one.",
            code="unknown-version",
        )
    second = build_type == statement_v2.BUILD_TYPE
    derived = statement_v2 if second else statement_v1
    environments = {"environments": statement_v2.environments(entries)} if second else {}
    tool, _, version = started.tool.partition("/")
    note = checkpoint.encode()
    byproducts = [
        resource(
            "checkpoint",
            hashlib.sha256(note).hexdigest(),
            origin=head.origin,
            size=head.size,
            root=head.root_base64,
            bytes=len(note),
        ),
        resource("entries", entries_digest(entries), count=len(entries)),
        resource(
            "outcome",
            leaf(sealed_at),
            status=sealed.status,
            reason=sealed.reason,
            cell=sealed.cell,
            entry=sealed_at.index,
        ),
        *derived.results(entries),
    ]
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": "notebook", "digest": {"sha256": sealed.digest}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": build_type,
                "externalParameters": {"parameters": started.parameters},
                "internalParameters": {
                    **environments,
                    "kernel": started.kernel,
                    "normalForm": FORMAT,
                    "origin": created.origin,
                    "record": record,
                },
                "resolvedDependencies": [
                    resource("notebook-source", started.notebook_digest, entry=started_at.index),
                    *derived.dependencies(entries),
                ],
            },
            "runDetails": {
                "builder": {"id": BUILDER_ID, "version": {tool: version}},
                "metadata": {
                    "invocationId": record,
                    "startedOn": _when(started_at.time),
                    "finishedOn": _when(sealed_at.time),
                },
                "byproducts": byproducts,
            },
        },
    }


def encode_statement(statement: dict[str, Any]) -> bytes:
    """The payload that is signed: canonical JSON."""
    return canonical_json(statement)


def first_difference(expected: Any, found: Any, where: str = "") -> str | None:
    """The path of the first place in which two JSON values differ; ``None`` where they are equal."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}):
            place = f"{where}.{key}".lstrip(".")
            if key not in expected or key not in found:
                return place
            deeper = first_difference(expected[key], found[key], place)
            if deeper is not None:
                return deeper
        return None
    if isinstance(expected, list) and isinstance(found, list):
        for i, (one, other) in enumerate(zip(expected, found, strict=False)):
            deeper = first_difference(one, other, f"{where}[{i}]")
            if deeper is not None:
                return deeper
        return None if len(expected) == len(found) else where
    return None if canonical_json(expected) == canonical_json(found) else where
