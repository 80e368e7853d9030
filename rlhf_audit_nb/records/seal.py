"""The seal: what stands in a record's ``metadata.rlhf_audit``. Floor 3.

::

    {"version": 1,
     "record": ID,                                   32 hex digits
     "statement": {"payloadType", "payload", "signatures": [{"keyid", "sig"}]},        DSSE, one signature or two
     "checkpoint": NOTE,                             C2SP signed tree head of the trail, as text
     "entries": [{"index": N, "data": BASE64, "proof": [BASE64, ...]}, ...],           ascending by index
     "manifest": {...}}                              digests of every part of the notebook (normal_form.py)

The entries are ``trail.created``, those that changed the trail's keys since (``key.rotated``, ``key.revoked``), those
that name the record (``record.started``, ``record.cell``, ``record.sealed``, and of what its notebook wrote
``evaluation.threshold`` and ``evaluation.recorded``), every entry of the runs that were opened
inside the record, and what the trail itself says of those runs (``run.interrupted``). Parsing is strict: no unknown
key, no missing one, base64 and entries in their one form.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from rlhf_audit_nb.errors import FormatError, RecordError
from rlhf_audit_nb.records.dsse import PAYLOAD_TYPE, DsseEnvelope, encode_base64
from rlhf_audit_nb.records.normal_form import FORMAT
from rlhf_audit_nb.trail.entry import Entry
from rlhf_audit_nb.trail.merkle import HASH_BYTES
from rlhf_audit_nb.trail.note import decode_base64

__all__ = ["SEAL_VERSION", "ProvenEntry", "Seal", "SealError", "SealedEntry", "format_seal", "parse_seal"]

SEAL_VERSION = 1

_PLACE = re.compile(r" - at `\$(.*)`$", re.DOTALL)
_RECORD_ID = re.compile("[0-9a-f]{32}")
_MOST_SIGNATURES = 2
_MOST_SIGNATURE_BYTES = 4096


class SealError(RecordError):
    """The seal is not in its form; ``where`` is the path inside it."""

    code = "malformed-seal"

    def __init__(self, message: str, *, where: str = "", code: str | None = None, next_step: str = "") -> None:
        super().__init__(message, code=code, next_step=next_step)
        self.where = where


class SealedEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry as it stands in the seal."""

    index: int
    data: str
    proof: tuple[str, ...]


class CellManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Digests of one cell's parts, as `normal_form.manifest_of` makes them."""

    id: str
    type: str
    source: str
    metadata: dict[str, str]
    other: dict[str, str]
    outputs: tuple[str, ...] = ()
    attachments: dict[str, str] = {}


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Digests of every part of a notebook."""

    format: str
    metadata: dict[str, str]
    other: dict[str, str]
    cells: tuple[CellManifest, ...]


class _SealForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int
    record: str
    statement: DsseEnvelope
    checkpoint: str
    entries: tuple[SealedEntry, ...]
    manifest: dict[str, Any]


class ProvenEntry(msgspec.Struct, frozen=True):
    """An entry with its inclusion proof (sibling hashes, leaf first); the proof is not checked yet."""

    entry: Entry
    proof: tuple[bytes, ...]


class Seal(msgspec.Struct, frozen=True, kw_only=True):
    """A seal with everything in it decoded, and nothing in it verified."""

    record: str
    envelope: DsseEnvelope
    payload: bytes
    signatures: tuple[bytes, ...]
    checkpoint: str
    entries: tuple[ProvenEntry, ...]
    manifest: dict[str, Any]


def format_seal(
    record: str, envelope: DsseEnvelope, checkpoint: str, entries: list[ProvenEntry], manifest: dict[str, Any]
) -> dict[str, Any]:
    """The seal as it is written, in plain JSON values."""
    form = _SealForm(
        version=SEAL_VERSION,
        record=record,
        statement=envelope,
        checkpoint=checkpoint,
        entries=tuple(
            SealedEntry(
                index=item.entry.index,
                data=encode_base64(item.entry.data),
                proof=tuple(encode_base64(node) for node in item.proof),
            )
            for item in entries
        ),
        manifest=manifest,
    )
    plain = msgspec.to_builtins(form)
    assert isinstance(plain, dict)
    # Lists, not tuples: nbformat validates the notebook before it writes it.
    listed: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(plain))
    return listed


def _decode(text: str, where: str) -> bytes:
    try:
        return decode_base64(text, where)
    except FormatError as error:
        raise SealError(f"{where} is not in canonical base64.", where=where) from error


def _entry(item: SealedEntry, where: str) -> ProvenEntry:
    data = _decode(item.data, f"{where}.data")
    proof = tuple(_decode(node, f"{where}.proof[{i}]") for i, node in enumerate(item.proof))
    for i, node in enumerate(proof):
        if len(node) != HASH_BYTES:
            raise SealError(f"Hash {i} of the proof has {len(node)} bytes, not 32.", where=f"{where}.proof[{i}]")
    if item.index < 0:
        raise SealError(f"The index {item.index} is negative.", where=f"{where}.index")
    try:
        return ProvenEntry(Entry.decode(item.index, data), proof)
    except FormatError as error:
        raise SealError(error.message, where=f"{where}.data", code=error.reason) from error


def _statement(envelope: DsseEnvelope) -> tuple[bytes, tuple[bytes, ...]]:
    if envelope.payloadType != PAYLOAD_TYPE:
        raise SealError(f"The payload type is not {PAYLOAD_TYPE}.", where="statement.payloadType")
    if not 0 < len(envelope.signatures) <= _MOST_SIGNATURES:
        raise SealError(
            f"The statement has {len(envelope.signatures)} signatures, not one or two.", where="statement.signatures"
        )
    payload = _decode(envelope.payload, "statement.payload")
    return payload, tuple(_signature(item.sig, i) for i, item in enumerate(envelope.signatures))


def _signature(text: str, at: int) -> bytes:
    where = f"statement.signatures[{at}].sig"
    signature = _decode(text, where)
    if not 0 < len(signature) <= _MOST_SIGNATURE_BYTES:
        raise SealError(f"The signature has {len(signature)} bytes.", where=where)
    return signature


def _malformed(error: msgspec.ValidationError, prefix: str) -> SealError:
    text = str(error)
    place = _PLACE.search(text)
    where = (prefix + (place[1] if place else "")).lstrip(".")
    return SealError(f"The seal is malformed: {_PLACE.sub('', text)}.", where=where)


def _check_manifest(manifest: dict[str, Any]) -> None:
    try:
        form = msgspec.convert(manifest, Manifest)
    except msgspec.ValidationError as error:
        raise _malformed(error, "manifest") from error
    if form.format != FORMAT:
        raise SealError(f"The normal form {form.format!r} is not known.", where="manifest.format")


def parse_seal(value: Any) -> Seal:
    """The seal in ``metadata.rlhf_audit``, decoded strictly; nothing in it is verified.

    Raises:
        SealError: what is malformed, and where.
    """
    version = value.get("version") if isinstance(value, dict) else None
    if isinstance(version, int) and version > SEAL_VERSION:
        raise SealError(
            f"The seal is of version {version}; this version reads {SEAL_VERSION}.",
            where="version",
            code="unknown-version",
            next_step="Verify the record with the version that wrote it, or a later one.",
        )
    try:
        form = msgspec.convert(value, _SealForm)
    except msgspec.ValidationError as error:
        raise _malformed(error, "") from error
    _check_manifest(form.manifest)
    if form.version != SEAL_VERSION:
        raise SealError(f"The seal's version is {form.version}, which is not known.", where="version")
    if not _RECORD_ID.fullmatch(form.record):
        raise SealError("The record's id is not 32 hexadecimal digits.", where="record")
    payload, signatures = _statement(form.statement)
    return Seal(
        record=form.record,
        envelope=form.statement,
        payload=payload,
        signatures=signatures,
        checkpoint=form.checkpoint,
        entries=tuple(_entry(item, f"entries[{i}]") for i, item in enumerate(form.entries)),
        manifest=form.manifest,
    )
