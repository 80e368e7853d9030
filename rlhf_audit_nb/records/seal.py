"""The seal: what stands in a record's ``metadata.rlhf_audit``. Floor 3.

::

    {"version": 2,
     "record": ID,                                   32 hex digits
     "statement": {"payloadType", "payload", "signatures": [{"keyid", "sig"}]},        DSSE, one signature or two
     "checkpoint": NOTE,                             C2SP signed tree head of the trail, as text
     "entries": [{"index": N, "data": BASE64, "proof": [BASE64, ...]}, ...],           ascending by index
     "manifest": {...},                              digests of every part of the notebook (normal_form.py)
     "additions": [{"payloadType", "payload", "signatures": [{"keyid", "sig"}]}, ...],   what others say of the record
     "anchors": [{"checkpoint": NOTE, "consistency": [BASE64, ...], "timestamps": [BASE64, ...],
                  "keys": [{"index", "data", "proof"}, ...]}, ...]}                      who has seen the trail since

The entries are ``trail.created``, those that changed the trail's keys since (``key.rotated``, ``key.revoked``), those
that name the record (``record.started``, ``record.cell``, ``record.sealed``, and of what its notebook wrote
``evaluation.threshold`` and ``evaluation.recorded``), the thresholds and evaluations of other notebooks on the same
metrics (`related`), every entry of the runs that were opened inside the record, and what the trail itself says of those
runs (``run.interrupted``). Parsing is strict: no unknown
key, no missing one, base64 and entries in their one form.

The last two keys, and an anchor's ``keys``, are there where there is something in them. They are all that may be added
to a seal later (`with_addition`, `with_anchors`); ``additions`` and ``anchoring`` say what is in them. Version 1 is
version 2 without them: a seal of version 1 stays as it is until something is added to it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec

from rlhf_audit_nb.errors import FormatError, RecordError
from rlhf_audit_nb.records.dsse import PAYLOAD_TYPE, DsseEnvelope, encode_base64
from rlhf_audit_nb.records.normal_form import FORMAT
from rlhf_audit_nb.trail.entry import Entry
from rlhf_audit_nb.trail.merkle import HASH_BYTES
from rlhf_audit_nb.trail.note import decode_base64

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "MOST_ADDITIONS",
    "MOST_ANCHORS",
    "SEAL_VERSION",
    "ProvenEntry",
    "Seal",
    "SealError",
    "SealedAddition",
    "SealedAnchor",
    "SealedEntry",
    "format_seal",
    "parse_seal",
    "with_addition",
    "with_anchors",
]

SEAL_VERSION = 2
FIRST_VERSION = 1
"""The version whose seals nothing was added to."""

MOST_ADDITIONS = 1000
MOST_ANCHORS = 100

_PLACE = re.compile(r" - at `\$(.*)`$", re.DOTALL)
_RECORD_ID = re.compile("[0-9a-f]{32}")
_MOST_SIGNATURES = 2
_MOST_SIGNATURE_BYTES = 4096
_MOST_ADDITION_CHARACTERS = 1 << 20
_MOST_TIMESTAMPS = 16
_MOST_KEYS = 1000


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


class _AnchorForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    checkpoint: str
    consistency: tuple[str, ...]
    timestamps: tuple[str, ...]
    keys: tuple[SealedEntry, ...] = ()


class _SealForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    version: int
    record: str
    statement: DsseEnvelope
    checkpoint: str
    entries: tuple[SealedEntry, ...]
    manifest: dict[str, Any]
    additions: tuple[DsseEnvelope, ...] = ()
    anchors: tuple[_AnchorForm, ...] = ()


class SealedAddition(msgspec.Struct, frozen=True):
    """What somebody says of the record, with its one signature; neither is verified."""

    envelope: DsseEnvelope
    payload: bytes
    signature: bytes


class ProvenEntry(msgspec.Struct, frozen=True):
    """An entry with its inclusion proof (sibling hashes, leaf first); the proof is not checked yet."""

    entry: Entry
    proof: tuple[bytes, ...]


class SealedAnchor(msgspec.Struct, frozen=True, kw_only=True):
    """A later checkpoint of the record's trail, or the record's own, with what others said of it; none is verified.

    ``consistency`` leads from the record's checkpoint to it, ``timestamps`` are RFC 3161 answers (DER) for the note
    with the log's own lines alone, ``keys`` the entries between the two that change the trail's keys.
    """

    checkpoint: str
    consistency: tuple[bytes, ...]
    timestamps: tuple[bytes, ...] = ()
    keys: tuple[ProvenEntry, ...] = ()


class Seal(msgspec.Struct, frozen=True, kw_only=True):
    """A seal with everything in it decoded, and nothing in it verified."""

    version: int
    record: str
    envelope: DsseEnvelope
    payload: bytes
    signatures: tuple[bytes, ...]
    checkpoint: str
    entries: tuple[ProvenEntry, ...]
    manifest: dict[str, Any]
    additions: tuple[SealedAddition, ...] = ()
    anchors: tuple[SealedAnchor, ...] = ()


def _plain(form: msgspec.Struct) -> dict[str, Any]:
    # Lists, not tuples: nbformat validates the notebook before it writes it.
    listed: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(form))
    return listed


def _listed(item: ProvenEntry) -> SealedEntry:
    proof = tuple(encode_base64(node) for node in item.proof)
    return SealedEntry(index=item.entry.index, data=encode_base64(item.entry.data), proof=proof)


def format_seal(
    record: str, envelope: DsseEnvelope, checkpoint: str, entries: list[ProvenEntry], manifest: dict[str, Any]
) -> dict[str, Any]:
    """The seal as it is written, in plain JSON values."""
    form = _SealForm(
        version=SEAL_VERSION,
        record=record,
        statement=envelope,
        checkpoint=checkpoint,
        entries=tuple(map(_listed, entries)),
        manifest=manifest,
    )
    return _plain(form)


def with_addition(raw: dict[str, Any], envelope: DsseEnvelope) -> dict[str, Any]:
    """The seal, as it stands in the file, with one more addition at the end."""
    return {**raw, "version": SEAL_VERSION, "additions": [*raw.get("additions", ()), _plain(envelope)]}


def with_anchors(raw: dict[str, Any], anchors: Sequence[SealedAnchor]) -> dict[str, Any]:
    """The seal, as it stands in the file, with these anchors, the smallest first, in the place of those it had."""
    forms = [
        _AnchorForm(
            checkpoint=anchor.checkpoint,
            consistency=tuple(map(encode_base64, anchor.consistency)),
            timestamps=tuple(map(encode_base64, anchor.timestamps)),
            keys=tuple(map(_listed, anchor.keys)),
        )
        for anchor in anchors
    ]
    return {**raw, "version": SEAL_VERSION, "anchors": list(map(_plain, forms))}


def _decode(text: str, where: str) -> bytes:
    try:
        return decode_base64(text, where)
    except FormatError as error:
        raise SealError(f"{where} is not in canonical base64.", where=where) from error


def _hashes(texts: tuple[str, ...], where: str) -> tuple[bytes, ...]:
    found = tuple(_decode(text, f"{where}[{i}]") for i, text in enumerate(texts))
    for i, node in enumerate(found):
        if len(node) != HASH_BYTES:
            raise SealError(f"Hash {i} of the proof has {len(node)} bytes, not 32.", where=f"{where}[{i}]")
    return found


def _entry(item: SealedEntry, where: str) -> ProvenEntry:
    data = _decode(item.data, f"{where}.data")
    proof = _hashes(item.proof, f"{where}.proof")
    if item.index < 0:
        raise SealError(f"The index {item.index} is negative.", where=f"{where}.index")
    try:
        return ProvenEntry(Entry.decode(item.index, data), proof)
    except FormatError as error:
        raise SealError(error.message, where=f"{where}.data", code=error.reason) from error


def _enveloped(envelope: DsseEnvelope, where: str, most: int) -> tuple[bytes, tuple[bytes, ...]]:
    if envelope.payloadType != PAYLOAD_TYPE:
        raise SealError(f"The payload type is not {PAYLOAD_TYPE}.", where=f"{where}.payloadType")
    if not 0 < len(envelope.signatures) <= most:
        wanted = "one or two" if most == _MOST_SIGNATURES else "one"
        raise SealError(
            f"The statement has {len(envelope.signatures)} signatures, not {wanted}.", where=f"{where}.signatures"
        )
    payload = _decode(envelope.payload, f"{where}.payload")
    signatures = enumerate(envelope.signatures)
    return payload, tuple(_signature(item.sig, f"{where}.signatures[{i}].sig") for i, item in signatures)


def _signature(text: str, where: str) -> bytes:
    signature = _decode(text, where)
    if not 0 < len(signature) <= _MOST_SIGNATURE_BYTES:
        raise SealError(f"The signature has {len(signature)} bytes.", where=where)
    return signature


def _at_most(count: int, most: int, where: str) -> None:
    if count > most:
        raise SealError(f"There are {count:,} of these; at most {most:,} are read.", where=where)


def _addition(envelope: DsseEnvelope, where: str) -> SealedAddition:
    if len(envelope.payload) > _MOST_ADDITION_CHARACTERS:
        raise SealError(f"It is longer than {_MOST_ADDITION_CHARACTERS:,} characters.", where=f"{where}.payload")
    payload, (signature,) = _enveloped(envelope, where, 1)
    return SealedAddition(envelope, payload, signature)


def _anchor(form: _AnchorForm, where: str) -> SealedAnchor:
    _at_most(len(form.timestamps), _MOST_TIMESTAMPS, f"{where}.timestamps")
    _at_most(len(form.keys), _MOST_KEYS, f"{where}.keys")
    return SealedAnchor(
        checkpoint=form.checkpoint,
        consistency=_hashes(form.consistency, f"{where}.consistency"),
        timestamps=tuple(_decode(text, f"{where}.timestamps[{i}]") for i, text in enumerate(form.timestamps)),
        keys=tuple(_entry(item, f"{where}.keys[{i}]") for i, item in enumerate(form.keys)),
    )


def _check_added(value: dict[str, Any], form: _SealForm) -> None:
    """Raise `SealError` where the parts that may be added are not in their one form."""
    for name in ("additions", "anchors"):
        if name in value and form.version == FIRST_VERSION:
            raise SealError(f"A seal of version {FIRST_VERSION} has no {name}.", where=name)
        if name in value and not value[name]:
            raise SealError(f"An empty list of {name} is left out of a seal.", where=name)
    _at_most(len(form.additions), MOST_ADDITIONS, "additions")
    _at_most(len(form.anchors), MOST_ANCHORS, "anchors")
    for i, anchor in enumerate(form.anchors):
        if "keys" in value["anchors"][i] and not anchor.keys:
            raise SealError("An empty list of keys is left out of an anchor.", where=f"anchors[{i}].keys")


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
    if form.version not in (FIRST_VERSION, SEAL_VERSION):
        raise SealError(f"The seal's version is {form.version}, which is not known.", where="version")
    if not _RECORD_ID.fullmatch(form.record):
        raise SealError("The record's id is not 32 hexadecimal digits.", where="record")
    _check_added(value, form)
    payload, signatures = _enveloped(form.statement, "statement", _MOST_SIGNATURES)
    return Seal(
        version=form.version,
        record=form.record,
        envelope=form.statement,
        payload=payload,
        signatures=signatures,
        checkpoint=form.checkpoint,
        entries=tuple(_entry(item, f"entries[{i}]") for i, item in enumerate(form.entries)),
        manifest=form.manifest,
        additions=tuple(_addition(item, f"additions[{i}]") for i, item in enumerate(form.additions)),
        anchors=tuple(_anchor(item, f"anchors[{i}]") for i, item in enumerate(form.anchors)),
    )
