"""The life of one record: begun, cell by cell, sealed. Floor 3.

A `RecordSession` holds the trail open for the process that executes the notebook and appends ``record.started``,
one ``record.cell`` for each executed code cell, and ``record.sealed``: entries of the trail itself, of no run, whose
events name the record. The kernel opens the same trail on its own: it is told where by
``RLHF_AUDIT_TRAIL`` and for which record by ``RLHF_AUDIT_RECORD`` (`RecordSession.environment`).

Sealing: the notebook is frozen (`normal_form`), ``record.sealed`` is appended with its digest, and under the
checkpoint that covers that entry the statement is derived and signed. The trail's entry comes first: a crash in
between leaves a trail that knows of a seal and a notebook that has none, never the reverse. Then a copy is kept beside
the trail (`kept`); where that fails, the record is whole all the same, and a line in the log says what is missing.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

import msgspec
import nbformat

from rlhf_audit_nb.capture.secrets import find_secret, scrub_values
from rlhf_audit_nb.config import ENV_PERSON_PASSPHRASE, ENV_TRAIL
from rlhf_audit_nb.errors import RecordError, StoreError
from rlhf_audit_nb.events import (
    CellExecuted,
    EvaluationRecorded,
    Event,
    KeyRevoked,
    KeyRotated,
    RecordSealed,
    RecordStarted,
    RunFinished,
    RunInterrupted,
    RunStarted,
    ThresholdSealed,
    encode_body,
)
from rlhf_audit_nb.records.dsse import key_id, sign_envelope
from rlhf_audit_nb.records.kept import keep_record
from rlhf_audit_nb.records.normal_form import (
    SEAL_KEY,
    canonical_json,
    freeze,
    frozen_outputs_digest,
    manifest_digest,
    manifest_of,
    parse_json,
    source_digest,
    text_digest,
    without_markers,
)
from rlhf_audit_nb.records.proofs import prove_all
from rlhf_audit_nb.records.related import related_in
from rlhf_audit_nb.records.resources import event_of
from rlhf_audit_nb.records.seal import ProvenEntry, format_seal
from rlhf_audit_nb.records.statement import (
    BUILD_TYPE,
    build_statement,
    encode_statement,
    entries_digest,
    record_of,
)
from rlhf_audit_nb.trail import Trail

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rlhf_audit_nb.trail import Entry, Pending, TrailReader

__all__ = [
    "COARSE_SECONDS",
    "ENV_RECORD",
    "Outcome",
    "RecordSession",
    "coarsen_times",
    "record_entries",
    "refuse_secrets",
]

_log = logging.getLogger(__name__)

ENV_RECORD = "RLHF_AUDIT_RECORD"
DISTRIBUTION = "rlhf-audit-trail"
COARSE_SECONDS = 60
"""Times in a record that holds a private run, as in the entries of that run."""


@dataclass(frozen=True)
class Outcome:
    """How an execution ended.

    Args:
        status: ``completed``; ``failed`` (a cell raised); ``aborted`` (a time-out, a dead kernel, an interruption of
            the process that executes).
        reason: the name of what was raised; ``None`` where all went well.
        cell: id of the cell in which it happened.
        position: that cell's place in the notebook, from 0.
    """

    status: str
    reason: str | None = None
    cell: str | None = None
    position: int | None = None


def coarsen_times(notebook: dict[str, Any]) -> None:
    """Leave papermill's times of the notebook and its cells in whole minutes, and nbclient's not at all (in place)."""
    for part in (notebook, *notebook["cells"]):
        part["metadata"].pop("execution", None)
        times = part["metadata"].get("papermill", {})
        for name in ("start_time", "end_time"):
            if isinstance(times.get(name), str):
                times[name] = datetime.fromisoformat(times[name]).replace(second=0, microsecond=0).isoformat()
        if isinstance(times.get("duration"), int | float):
            times["duration"] = times["duration"] // COARSE_SECONDS * COARSE_SECONDS


def record_entries(reader: TrailReader, record: str) -> list[Entry]:
    """The entries that a record carries (see `seal`), in their order."""
    found = {entry.index: entry for entry in reader.entries(0, 1)}
    for change in (KeyRotated.TYPE, KeyRevoked.TYPE):
        found.update({entry.index: entry for entry in reader.entries(type=change)})
    for kind in (RecordStarted, CellExecuted, RecordSealed, ThresholdSealed, EvaluationRecorded):
        entries = reader.entries(type=kind.TYPE)
        found.update({entry.index: entry for entry in entries if record_of(entry) == record})
    runs = _runs(reader, record)
    for run in runs:
        found.update({entry.index: entry for entry in reader.entries(run=run)})
    interruptions = reader.entries(type=RunInterrupted.TYPE)
    found.update({entry.index: entry for entry in interruptions if event_of(entry, RunInterrupted).run in runs})
    sealed = [index for index, entry in found.items() if entry.type == RecordSealed.TYPE]
    for index in sealed:
        found.update({entry.index: entry for entry in related_in(reader, record, index)})
    return [found[index] for index in sorted(found)]


def refuse_secrets(notebook: dict[str, Any], parameters: Mapping[str, Any]) -> None:
    """A record keeps every cell and parameter as it is, and goes to others: no token may stand in it.

    Raises:
        RecordError: one does; the message names the cell or the parameter, and not the secret.
    """
    for number, cell in enumerate(notebook["cells"], start=1):
        kind = find_secret(cell["source"])
        if kind is not None:
            raise _secret(f"Cell {number} holds a secret ({kind})")
    for name, value in parameters.items():
        kind = find_secret(value, name) if isinstance(value, str) else None
        if kind is not None:
            raise _secret(f"The parameter {name!r} is a secret ({kind})")


def _secret(what: str) -> RecordError:
    return RecordError(
        f"{what}, and a record keeps every cell and parameter as it is.",
        next_step="Take it out, let the notebook read it from the environment, and replace it where it was shared.",
        code="secret",
    )


def _runs(reader: TrailReader, record: str) -> list[str]:
    started = reader.entries(type=RunStarted.TYPE)
    return [entry.run for entry in started if entry.run and event_of(entry, RunStarted).record == record]


class RecordSession:
    """One record being made."""

    def __init__(self, trail: Trail, record: str, *, keep: bool = True) -> None:
        self._trail = trail
        self.record = record
        self._keep = keep
        self._coarse = False
        self._looked = 0

    @classmethod
    def begin(cls, notebook: dict[str, Any], kernel: dict[str, str], location: Path, *, keep: bool = True) -> Self:
        """Opens the trail and appends ``record.started``.

        An earlier seal leaves the notebook, and its kernel specification becomes that of the kernel that runs it.

        Args:
            notebook: as it is about to run, with the parameters injected by papermill.
            kernel: the kernel specification's ``name``, ``language`` and ``display_name``.
            location: the trail's folder.
            keep: whether a copy of the sealed notebook is kept beside the trail.

        Raises:
            StoreError, KeyFileError: the trail cannot be opened.
            NormalFormError: a parameter or a cell cannot stand in JSON.
            RecordError: a cell or a parameter holds a token or a key.
        """
        parameters = notebook["metadata"].get("papermill", {}).get("parameters", {})
        refuse_secrets(notebook, parameters)
        notebook["metadata"].pop(SEAL_KEY, None)
        notebook["metadata"]["kernelspec"] = dict(kernel)
        started = RecordStarted(
            record=uuid4().hex,
            notebook_digest=source_digest(notebook),
            parameters=parse_json(canonical_json(parameters)),
            tool=f"{DISTRIBUTION}/{importlib.metadata.version(DISTRIBUTION)}",
            kernel=kernel,
        )
        session = cls(Trail.open(location), started.record, keep=keep)
        session._append(started).wait()
        return session

    def _append(self, event: Event) -> Pending:
        return self._trail.append(event.TYPE, encode_body(event), resolution_us=self._resolution())

    def _append_sealed(self, event: RecordSealed) -> None:
        """Appends the seal's entry with what it says of other notebooks' thresholds; nobody appends in between."""

        def body(reader: TrailReader) -> bytes:
            related = related_in(reader, self.record, reader.size)
            return encode_body(
                msgspec.structs.replace(event, related=len(related), related_digest=entries_digest(related))
            )

        self._trail.append_guarded(event.TYPE, body, resolution_us=self._resolution())

    def _resolution(self) -> int:
        return COARSE_SECONDS * 1_000_000 if self._is_coarse() else 1

    def _is_coarse(self) -> bool:
        """Whether the record holds a run under differential privacy: how long a cell took then depends on its data."""
        if not self._coarse:
            reader = self._trail.reader()
            runs = (event_of(entry, RunStarted) for entry in reader.entries(self._looked, type=RunStarted.TYPE))
            self._coarse = any(run.record == self.record and run.privacy is not None for run in runs)
            self._looked = reader.size  # asked before each entry, of a trail that may hold thousands of runs
        return self._coarse

    def environment(self) -> dict[str, str]:
        """The kernel's environment: this process's own, and where the trail and the record are.

        Not a person's passphrase: what trains must not be able to sign as somebody who judges it.
        """
        location = str(self._trail.location)
        own = {name: value for name, value in os.environ.items() if name != ENV_PERSON_PASSPHRASE}
        return {**own, ENV_TRAIL: location, ENV_RECORD: self.record}

    def cell_executed(self, cell: dict[str, Any], position: int, status: str) -> None:
        """Appends ``record.cell``: what this cell was and what it showed at this moment.

        Args:
            cell: the executed code cell.
            position: its place in the notebook, from 0.
            status: ``ok``, ``error``, or ``aborted`` where the kernel never answered.

        Secrets that the outputs show are taken out of them, in place: a record is made to be shared.
        """
        scrubbed = scrub_values(cell["outputs"])
        if scrubbed is not cell["outputs"]:
            cell["outputs"] = [nbformat.from_dict(output) for output in scrubbed]
        event = CellExecuted(
            record=self.record,
            cell=cell["id"],
            position=position,
            source_digest=text_digest(cell["source"]),
            outputs_digest=frozen_outputs_digest(cell["outputs"]),
            status=status,
        )
        self._append(event)

    def seal(self, notebook: dict[str, Any], outcome: Outcome) -> None:
        """Freezes the notebook, appends ``record.sealed`` and puts the seal into ``metadata.rlhf_audit``.

        Raises:
            StoreError: the trail could not be written; the notebook then has no seal.
        """
        self._settle_runs()
        notebook["cells"] = [cell for _, cell in without_markers(notebook["cells"])]
        if self._is_coarse():
            coarsen_times(notebook)
        freeze(notebook)
        manifest = manifest_of(notebook)
        sealed = RecordSealed(
            record=self.record,
            digest=manifest_digest(manifest),
            status=outcome.status,
            cells=len(manifest["cells"]),
            reason=outcome.reason,
            cell=outcome.cell,
            keys=[key_id(key.spki) for key in self._trail.keys.record_signers],
            build_type=BUILD_TYPE,
        )
        self._append_sealed(sealed)
        notebook["metadata"][SEAL_KEY] = self._sealed(manifest)
        if self._keep:
            self._keep_copy(notebook)

    def _keep_copy(self, notebook: dict[str, Any]) -> None:
        try:
            keep_record(self._trail.location, self.record, nbformat.writes(nbformat.from_dict(notebook)).encode())
        except StoreError as error:
            # The record is what was asked for and is sealed: it must be written although its copy could not be.
            _log.warning("%s", error)

    def _sealed(self, manifest: dict[str, Any]) -> dict[str, Any]:
        reader = self._trail.reader()
        keys = self._trail.keys
        checkpoint, entries = keys.endorse(reader.checkpoint()), record_entries(reader, self.record)
        payload = encode_statement(build_statement(self.record, checkpoint, entries))
        proofs = prove_all(reader, [entry.index for entry in entries])
        proven = [ProvenEntry(entry, proof) for entry, proof in zip(entries, proofs, strict=True)]
        envelope = sign_envelope(payload, keys.record_signers)
        return format_seal(self.record, envelope, checkpoint, proven, manifest)

    def _settle_runs(self) -> None:
        """Opens the trail anew where a run of this record was left open, so that it is marked interrupted."""
        reader = self._trail.reader()
        closed = {entry.run for entry in reader.entries(type=RunFinished.TYPE)}
        if all(run in closed for run in _runs(reader, self.record)):
            return
        location = self._trail.location
        self._trail.close()
        self._trail = Trail.open(location)

    def close(self) -> None:
        """Closes the trail."""
        self._trail.close()
