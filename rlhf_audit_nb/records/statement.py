"""What a record claims: an in-toto Statement with SLSA provenance, derived from the trail alone. Floor 3.

The statement (in-toto Statement v1, predicate SLSA Provenance v1) says: the notebook with this digest came out of
executing this source with these parameters, from these inputs, with these results. Every value in it is a function
of the record's entries and its checkpoint, so a verifier derives it again and compares: a statement cannot say more
than the trail does, and a difference is named by its path.

=================================  ====================================================================================
``subject``                        the notebook: digest of its normal form (``normal_form.py``)
``buildDefinition.buildType``      `BUILD_TYPE`: a notebook executed by papermill with the engine ``audit``
``externalParameters``             ``parameters``, as they were injected
``internalParameters``             record id, the trail's origin, the normal form's name, the kernel specification
``resolvedDependencies``           the notebook's source; per run: data (role), models (base, reference), the checkpoint
                                   that a training was resumed from, git commit
``runDetails.builder``             `BUILDER_ID` and the tool's version
``runDetails.metadata``            record id; times of ``record.started`` and ``record.sealed``
``runDetails.byproducts``          the checkpoint (SHA-256 of the note; origin, size, root), all entries of the record
                                   (SHA-256 over their leaf hashes in order; count), the outcome (the
                                   ``record.sealed`` entry), final models and saved weights
=================================  ====================================================================================

Where differential privacy keeps a data set's digest in the vault, the dependency's digest is that of the entry that
holds the commitment, and its annotations say so. A digest of an entry is its RFC 6962 leaf hash.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_audit_nb.errors import RecordError
from rlhf_audit_nb.events import (
    CellExecuted,
    DataBound,
    EnvironmentCaptured,
    EvaluationRecorded,
    Event,
    ModelBound,
    RecordSealed,
    RecordStarted,
    RunResumed,
    ThresholdSealed,
    TrailCreated,
    WeightsSaved,
    decode_body,
)
from rlhf_audit_nb.records.normal_form import FORMAT, canonical_json
from rlhf_audit_nb.trail.checkpoint import checkpoint_of
from rlhf_audit_nb.trail.merkle import leaf_hash

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rlhf_audit_nb.trail.entry import Entry

__all__ = [
    "BUILDER_ID",
    "BUILD_TYPE",
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
BUILD_TYPE = "urn:rlhf-audit:notebook-record:v1"
BUILDER_ID = "urn:rlhf-audit:papermill-engine-audit:v1"

_OF_RECORDS = (RecordStarted, CellExecuted, RecordSealed, ThresholdSealed, EvaluationRecorded)

EventT = TypeVar("EventT", bound=Event)


def event_of(entry: Entry, kind: type[EventT]) -> EventT:
    """The entry's event, which is of type ``kind``."""
    event = decode_body(entry.type, entry.body)
    assert isinstance(event, kind)
    return event


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
    moment = datetime.fromtimestamp(microseconds // 1_000_000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{microseconds % 1_000_000:06d}Z"


def _resource(name: str, sha256: str, **annotations: Any) -> dict[str, Any]:
    kept = {key: value for key, value in annotations.items() if value is not None}
    resource: dict[str, Any] = {"name": name, "digest": {"sha256": sha256}}
    return {**resource, "annotations": kept} if kept else resource


def _data(entry: Entry, event: DataBound) -> dict[str, Any]:
    if event.digest is not None:
        return _resource(f"data:{event.role}", event.digest, run=entry.run, entry=entry.index, source=event.source)
    # Under differential privacy the data's own digest is sealed; the entry holds the commitment to it.
    leaf = leaf_hash(entry.data).hex()
    return _resource(f"data:{event.role}", leaf, run=entry.run, entry=entry.index, source=event.source, committed=True)


def _model(entry: Entry, event: ModelBound) -> dict[str, Any]:
    notes = {"run": entry.run, "entry": entry.index, "architecture": event.architecture, "model": event.name}
    return _resource(f"model:{event.role}", event.weights_digest, **notes)


def _checkpoint(entry: Entry, event: RunResumed) -> list[dict[str, Any]]:
    if event.checkpoint is None:
        return []
    notes = {"run": entry.run, "entry": entry.index, "step": event.step, "fromRun": event.from_run}
    return [_resource("checkpoint", event.checkpoint, **notes)]


def _inputs(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    found = []
    for entry in entries:
        if entry.type == DataBound.TYPE:
            found.append(_data(entry, event_of(entry, DataBound)))
        elif entry.type == ModelBound.TYPE and event_of(entry, ModelBound).role != "final":
            found.append(_model(entry, event_of(entry, ModelBound)))
        elif entry.type == RunResumed.TYPE:
            found += _checkpoint(entry, event_of(entry, RunResumed))
        elif entry.type == EnvironmentCaptured.TYPE:
            code = event_of(entry, EnvironmentCaptured)
            if code.git_commit:
                notes = {"entry": entry.index, "uncommittedChanges": bool(code.git_dirty)}
                found.append({"name": "code", "digest": {"gitCommit": code.git_commit}, "annotations": notes})
    return found


def _results(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    found = []
    for entry in entries:
        if entry.type == WeightsSaved.TYPE:
            saved = event_of(entry, WeightsSaved)
            notes = {"run": entry.run, "entry": entry.index, "step": saved.step, "files": saved.files}
            found.append(_resource(f"weights:{saved.name}", saved.digest, **notes))
        elif entry.type == ModelBound.TYPE and event_of(entry, ModelBound).role == "final":
            found.append(_model(entry, event_of(entry, ModelBound)))
    return found


def build_statement(record: str, checkpoint: str, entries: Sequence[Entry]) -> dict[str, Any]:
    """The statement of a record, from its checkpoint (a signed note) and its entries in their order.

    Raises:
        RecordError: an entry that every record has is missing or stands twice.
        EntryError, FormatError: an entry or the checkpoint is malformed.
    """
    head = checkpoint_of(checkpoint)
    _, created = only(entries, TrailCreated)
    started_at, started = only(entries, RecordStarted, record)
    sealed_at, sealed = only(entries, RecordSealed, record)
    tool, _, version = started.tool.partition("/")
    note = checkpoint.encode()
    byproducts = [
        _resource(
            "checkpoint",
            hashlib.sha256(note).hexdigest(),
            origin=head.origin,
            size=head.size,
            root=head.root_base64,
            bytes=len(note),
        ),
        _resource("entries", entries_digest(entries), count=len(entries)),
        _resource(
            "outcome",
            leaf_hash(sealed_at.data).hex(),
            status=sealed.status,
            reason=sealed.reason,
            cell=sealed.cell,
            entry=sealed_at.index,
        ),
        *_results(entries),
    ]
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": "notebook", "digest": {"sha256": sealed.digest}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"parameters": started.parameters},
                "internalParameters": {
                    "kernel": started.kernel,
                    "normalForm": FORMAT,
                    "origin": created.origin,
                    "record": record,
                },
                "resolvedDependencies": [
                    _resource("notebook-source", started.notebook_digest, entry=started_at.index),
                    *_inputs(entries),
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
