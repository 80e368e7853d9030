"""What others say of a sealed record, signed and put into its seal: attestations, reproductions. Floor 3.

An addition is a DSSE envelope with one signature. Its payload is the canonical JSON of an in-toto Statement v1 ::

    {"_type": "https://in-toto.io/Statement/v1",
     "subject": [{"name": "notebook",  "digest": {"sha256": the record's digest, as record.sealed has it}},
                 {"name": "statement", "digest": {"sha256": SHA-256 of the payload of the record's own statement}}],
     "predicateType": what kind of addition it is,
     "predicate": {"key": PEM of the signer's public key,
                   "time": the signer's clock, RFC 3339 UTC in whole seconds,
                   "previous": SHA-256 of the canonical JSON of the envelope before this one, null for the first,
                   ...}}

The second subject names one record alone, so that none fits another record. ``previous`` chains them: one that is
taken out, moved or put between others is seen; that the last ones were taken out only a trail or a policy shows. The
key says who has signed, and not that they may: whose key counts is for a policy to say.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from rlhf_audit_nb.config import DEFAULT_TRAIL
from rlhf_audit_nb.errors import FormatError, RecordError
from rlhf_audit_nb.records.dsse import check_signature, key_id, sign_envelope
from rlhf_audit_nb.records.normal_form import SEAL_KEY, NormalFormError, canonical_json, parse_json
from rlhf_audit_nb.records.rewriting import replace_seal, rewrite_record
from rlhf_audit_nb.records.seal import MOST_ADDITIONS, with_addition
from rlhf_audit_nb.records.unsound import refuse_unsound
from rlhf_audit_nb.trail import Reason
from rlhf_audit_nb.trail.encoding import decode_base64
from rlhf_audit_nb.trail.signers import PublicKey, load_public, read_public, spki_of

if TYPE_CHECKING:
    from rlhf_audit_nb.records.dsse import DsseEnvelope
    from rlhf_audit_nb.records.record import OpenedRecord
    from rlhf_audit_nb.records.seal import Seal, SealedAddition
    from rlhf_audit_nb.trail import TrustPolicy
    from rlhf_audit_nb.trail.signers import SigningKey

__all__ = [
    "ATTESTATION",
    "REPRODUCTION",
    "Addition",
    "add_to_record",
    "check_additions",
    "envelope_digest",
    "subject_of",
]

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
ATTESTATION = "urn:rlhf-audit:attestation:v1"
REPRODUCTION = "urn:rlhf-audit:reproduction:v1"
KNOWN = frozenset({ATTESTATION, REPRODUCTION})

_OWN = ("key", "time", "previous")
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z", re.ASCII)
_PLACE = f"metadata.{SEAL_KEY}.additions"


@dataclass(frozen=True)
class Addition:
    """One addition whose signature, subject and place in the chain hold.

    Args:
        index: its place in ``additions``, from 0.
        predicate_type: what kind it is.
        predicate: what it says; ``key``, ``time`` and ``previous`` are in it.
        key_id: SHA-256 (hex) of the signer's DER SubjectPublicKeyInfo.
        payload: the signed bytes.
    """

    index: int
    predicate_type: str
    predicate: dict[str, Any] = field(hash=False)
    key_id: str
    payload: bytes = field(repr=False)

    @property
    def time(self) -> datetime:
        """The signer's clock."""
        return datetime.fromisoformat(self.predicate["time"])

    @property
    def key(self) -> PublicKey:
        """The signer's public key."""
        return read_public(self.predicate["key"].encode())


def subject_of(notebook_digest: str, payload: bytes) -> list[dict[str, Any]]:
    """What every addition to a record is about: its notebook, and its own statement (``payload``)."""
    statement = hashlib.sha256(payload).hexdigest()
    return [
        {"name": "notebook", "digest": {"sha256": notebook_digest}},
        {"name": "statement", "digest": {"sha256": statement}},
    ]


def envelope_digest(envelope: dict[str, Any]) -> str:
    """By what the next addition names this one: SHA-256 (hex) of the envelope's canonical JSON, signature and all."""
    return hashlib.sha256(canonical_json(envelope)).hexdigest()


def _pem(key: PublicKey) -> str:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


# -- verifying --------------------------------------------------------------------------------------------------


class _WrongError(Exception):
    """What is wrong with an addition: a code, a path inside it, a sentence."""

    def __init__(self, code: str, where: str, message: str) -> None:
        super().__init__(message)
        self.reason = (code, where, message)


def _statement(payload: bytes) -> dict[str, Any]:
    try:
        value = parse_json(payload)
        canonical = canonical_json(value)
    except NormalFormError as error:
        raise _WrongError("addition", "payload", f"It is malformed. {error.message}") from error
    wanted = {"_type", "subject", "predicateType", "predicate"}
    if not isinstance(value, dict) or set(value) != wanted or value["_type"] != STATEMENT_TYPE:
        raise _WrongError("addition", "payload", "It is no in-toto Statement v1.")
    if canonical != payload:
        raise _WrongError("addition", "payload", "It is not in its one spelling.")
    if not isinstance(value["predicateType"], str) or not isinstance(value["predicate"], dict):
        raise _WrongError("addition", "payload", "Its predicate is no object, or of no type.")
    return value


def _signer(predicate: dict[str, Any]) -> PublicKey:
    text = predicate.get("key")
    try:
        key = read_public(text.encode()) if isinstance(text, str) else None
    except (FormatError, UnicodeEncodeError) as error:
        raise _WrongError("addition", "payload", f"Its key cannot be read. {error}") from error
    if key is None or _pem(key) != text:
        raise _WrongError("addition", "payload", "Its key is not a public key in its one PEM form.")
    return key


def _check_time(text: Any) -> None:
    try:
        datetime.fromisoformat(text if isinstance(text, str) and _TIME.fullmatch(text) else "")
    except ValueError as error:
        raise _WrongError("addition", "payload", "Its time is not RFC 3339 UTC in whole seconds.") from error


def _checked(item: SealedAddition, index: int, subject: list[dict[str, Any]], previous: str | None) -> Addition:
    statement = _statement(item.payload)
    predicate = statement["predicate"]
    key = _signer(predicate)
    named = key_id(spki_of(key))
    if item.envelope.signatures[0].keyid != named:
        raise _WrongError("addition-key", "signatures[0].keyid", "Its key id is not that of the key that it names.")
    if not check_signature(item.envelope, item.signature, item.payload, key):
        raise _WrongError("addition-signature", "signatures[0].sig", "Its signature does not hold under its key.")
    if statement["subject"] != subject:
        raise _WrongError("addition-subject", "payload", "It is about another record.")
    if "previous" not in predicate or predicate["previous"] != previous:
        message = "It does not follow the one before it: one was taken out, moved, put in, or added at the same time."
        raise _WrongError("addition-order", "payload", message)
    _check_time(predicate.get("time"))
    return Addition(index, statement["predicateType"], predicate, named, item.payload)


def _form_of(envelope: DsseEnvelope) -> dict[str, Any]:
    return {
        "payloadType": envelope.payloadType,
        "payload": envelope.payload,
        "signatures": [{"keyid": item.keyid, "sig": item.sig} for item in envelope.signatures],
    }


def check_additions(seal: Seal, notebook_digest: str) -> tuple[tuple[Addition, ...], list[Reason], list[Reason]]:
    """The additions of a seal that hold, what is wrong with the others, and notes of kinds that are not known here.

    Args:
        seal: the seal, decoded.
        notebook_digest: of the record, as its entry ``record.sealed`` has it.
    """
    subject = subject_of(notebook_digest, seal.payload)
    found: list[Addition] = []
    reasons: list[Reason] = []
    notes: list[Reason] = []
    previous: str | None = None
    for index, item in enumerate(seal.additions):
        try:
            addition = _checked(item, index, subject, previous)
        except _WrongError as error:
            code, inside, message = error.reason
            reasons.append(Reason(code, f"{_PLACE}[{index}].{inside}", f"Addition {index + 1}: {message}"))
        else:
            found.append(addition)
            if addition.predicate_type not in KNOWN:
                message = f"Addition {index + 1} is of a kind that is not known here: {addition.predicate_type}."
                notes.append(Reason("addition-unknown", f"{_PLACE}[{index}].payload", message))
        previous = envelope_digest(_form_of(item.envelope))
    return tuple(found), reasons, notes


# -- adding -----------------------------------------------------------------------------------------------------


def _refuse(opened: OpenedRecord, path: Path | str) -> None:
    refuse_unsound(
        opened.verdict,
        f"Nothing is added to {path}, which is {opened.verdict.level.name}",
        next_step="`rlhf-audit verify` says all that is wrong with it.",
        code="not-valid",
    )


def _signed(opened: OpenedRecord, predicate_type: str, predicate: dict[str, Any], signer: SigningKey) -> DsseEnvelope:
    raw = opened.metadata
    assert raw is not None
    assert opened.sealed is not None
    there = raw.get("additions", [])
    if len(there) >= MOST_ADDITIONS:
        raise RecordError(f"The record has {len(there):,} additions, and can have no more.", code="addition")
    own = {
        "key": _pem(load_public(signer.spki)),
        "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "previous": envelope_digest(there[-1]) if there else None,
    }
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": subject_of(opened.sealed.digest, decode_base64(raw["statement"]["payload"], "payload")),
        "predicateType": predicate_type,
        "predicate": {**predicate, **own},
    }
    return sign_envelope(canonical_json(statement), [signer])


def add_to_record(
    path: Path | str,
    predicate_type: str,
    predicate: dict[str, Any],
    signer: SigningKey,
    *,
    policy: TrustPolicy | None = None,
    home: Path | None = None,
) -> Addition:
    """Signs a statement about a record and puts it at the end of the record's additions.

    The record is verified first, and again as it will be written; the file is then replaced whole, and nothing else in
    it changes.

    Args:
        path: the record.
        predicate_type: `ATTESTATION`, `REPRODUCTION`, or a URI of your own.
        predicate: what is said, as JSON values, without ``key``, ``time`` and ``previous``.
        signer: the key that signs.
        policy: whose signatures count on the record, as in `record.open_record`.
        home: the folder of keys and last-seen heads, likewise.

    Raises:
        InvalidRecordError, DivergedRecordError: the record does not hold (``not-valid``); nothing was changed.
        RecordError: the file cannot be read or written, or the predicate cannot stand in JSON, names what is not its
            own, or is too large (``addition``).
        KeyFileError: there is no policy and no key of the user's own for this trail, or the signer cannot sign.
    """
    from rlhf_audit_nb.records.record import read_record

    taken = [name for name in _OWN if name in predicate]
    if taken:
        raise RecordError(f"The predicate has a {taken[0]!r} of its own; that is written here.", code="addition")
    beside = (Path(path).parent / DEFAULT_TRAIL,)
    added: list[Addition] = []

    def change(data: bytes) -> bytes:
        opened = read_record(data, policy=policy, home=home, trails=beside)
        _refuse(opened, path)
        assert opened.metadata is not None
        after = replace_seal(data, with_addition(opened.metadata, _signed(opened, predicate_type, predicate, signer)))
        again = read_record(after, policy=policy, home=home, trails=beside)
        if not again.additions or len(again.additions) == len(opened.additions):
            first = again.verdict.reasons[0]
            raise RecordError(f"This cannot be added to {path}: {first.message}", code="addition")
        added.append(again.additions[-1])
        return after

    rewrite_record(path, change)
    return added[0]
