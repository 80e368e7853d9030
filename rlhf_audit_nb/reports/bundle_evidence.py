"""The evidence in a record's seal as files, each in the form in which other tools read it. Floor 4.

::

    record.ipynb                          the record, byte for byte
    checkpoint                            the signed tree head (C2SP signed note)
    entries/N.json  entries/N.tlog-proof  each entry, the exact bytes that are hashed, and its inclusion proof
    statement.json                        the statement: the payload of the DSSE envelope
    statement.dsse.json  statement.K.sig  the envelope as canonical JSON, and each signature in bytes
    keys/log.vkey .pem                    the key that signed the checkpoint; log-K those before it
    keys/record.pem                       the key that signed the statement
    keys/lasting.vkey .pem                the ML-DSA-44 key of the second signatures
    keys/witness-K.vkey .pem              witnesses' keys that are known by a policy
    additions/N.dsse.json .json .1.sig    what others have added, likewise, and
    additions/N.pem                       the key that each of them names
    anchors/N.checkpoint .consistency     later checkpoints with the proof from the record's own (base64 lines)
    anchors/N.K.tsr  anchors/N.keys       RFC 3161 answers; entries that changed keys since, as in the seal

All but the witnesses' keys is a function of the record alone: whoever has the package derives it again and compares.
"""

from __future__ import annotations

import base64
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PublicKey

from rlhf_audit_nb.errors import RecordError
from rlhf_audit_nb.events import RecordSealed
from rlhf_audit_nb.records.checks import succession
from rlhf_audit_nb.records.normal_form import canonical_json
from rlhf_audit_nb.records.seal import parse_seal
from rlhf_audit_nb.records.statement import event_of
from rlhf_audit_nb.trail.anchors import COSIGNATURE_ANCHOR
from rlhf_audit_nb.trail.encoding import decode_base64, encode_base64
from rlhf_audit_nb.trail.note import ECDSA, MLDSA44, Verifier, format_vkey, parse_note, parse_vkey
from rlhf_audit_nb.trail.proof import InclusionProof, format_proof
from rlhf_audit_nb.trail.signers import load_public, spki_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rlhf_audit_nb.records import OpenedRecord
    from rlhf_audit_nb.records.dsse import DsseEnvelope
    from rlhf_audit_nb.records.seal import Seal, SealedAnchor
    from rlhf_audit_nb.trail import Entry, Verdict
    from rlhf_audit_nb.trail.succession import KeySuccession

__all__ = ["EvidenceFiles", "NamedKey", "digest_option", "evidence_files", "pem_of"]

_DIGITS = 6
_DIGESTS = {"secp384r1": " -digest sha384", "secp521r1": " -digest sha512"}


@dataclass(frozen=True)
class NamedKey:
    """A key that signed something in the bundle: its file's name under ``keys/``, and its DER SubjectPublicKeyInfo."""

    file: str
    spki: bytes
    verifier: Verifier | None = None

    @property
    def lasting(self) -> bool:
        """Whether it is an ML-DSA-44 key, which only newer tools can check."""
        return isinstance(load_public(self.spki), MLDSA44PublicKey)

    def files(self) -> dict[str, bytes]:
        """Its files: PEM, and the verifier key where it signs notes."""
        found = {f"keys/{self.file}.pem": pem_of(self.spki)}
        if self.verifier is not None:
            found[f"keys/{self.file}.vkey"] = f"{format_vkey(self.verifier)}\n".encode()
        return found


@dataclass(frozen=True)
class EvidenceFiles:
    """A record's evidence as files, and what a page about them must know.

    Attributes:
        files: contents by path.
        seal: what they were made from.
        signers: the known keys that signed the checkpoint: the log's first, then its lasting one, then witnesses'.
        anchor_signers: likewise of each anchor's checkpoint; the log's is missing where a later key signed it.
        statement_keys: the keys that signed the statement, in their order.
        turns: the log's keys before the one that signed, each of which signed its successor.
    """

    files: dict[str, bytes]
    seal: Seal
    signers: tuple[NamedKey, ...]
    anchor_signers: tuple[tuple[NamedKey, ...], ...]
    statement_keys: tuple[NamedKey, ...]
    turns: tuple[NamedKey, ...]


def pem_of(spki: bytes) -> bytes:
    """A DER SubjectPublicKeyInfo in PEM, as ``openssl`` writes it."""
    lines = textwrap.wrap(base64.b64encode(spki).decode(), 64)
    return "\n".join(["-----BEGIN PUBLIC KEY-----", *lines, "-----END PUBLIC KEY-----", ""]).encode()


def digest_option(spki: bytes) -> str:
    """What ``openssl pkeyutl`` must be told of the digest that goes with a key; empty where its own choice is right."""
    key = load_public(spki)
    return _DIGESTS.get(key.curve.name, "") if isinstance(key, ec.EllipticCurvePublicKey) else ""


def evidence_files(data: bytes, opened: OpenedRecord) -> EvidenceFiles:
    """The files of a record that was verified.

    Args:
        data: the record, byte for byte.
        opened: what verifying these bytes found; neither INVALID nor DIVERGED.

    Raises:
        RecordError: ``old-record`` where an earlier version made it, in a form that plain tools cannot follow.
    """
    seal = parse_seal(opened.metadata)
    entries = [item.entry for item in seal.entries]
    keys = succession(entries, opened.verdict.origin, {})
    sealed_at = next(entry.index for entry in entries if _is_seal_of(entry, opened))
    known, turns = _note_keys(keys, seal, opened.verdict)
    statement_keys = _statement_keys(keys, sealed_at, opened)
    files = {"record.ipynb": data, "checkpoint": seal.checkpoint.encode()}
    files |= _entry_files(seal)
    files |= _envelope_files("statement", seal.envelope)
    for number, addition in enumerate(opened.additions, 1):
        files |= _envelope_files(f"additions/{number}", seal.additions[number - 1].envelope)
        files[f"additions/{number}.pem"] = addition.predicate["key"].encode()
    for number, anchor in enumerate(seal.anchors, 1):
        files |= _anchor_files(f"anchors/{number}", anchor)
    for key in (*statement_keys, *turns, *known):
        files |= key.files()
    anchors = tuple(_signing(known, anchor.checkpoint) for anchor in seal.anchors)
    return EvidenceFiles(files, seal, _signing(known, seal.checkpoint), anchors, statement_keys, turns)


def _is_seal_of(entry: Entry, opened: OpenedRecord) -> bool:
    return entry.type == RecordSealed.TYPE and event_of(entry, RecordSealed) == opened.sealed


def _entry_files(seal: Seal) -> dict[str, bytes]:
    width = max(_DIGITS, *(len(str(item.entry.index)) for item in seal.entries))
    files = {}
    for item in seal.entries:
        name = f"entries/{item.entry.index:0{width}d}"
        files[f"{name}.json"] = item.entry.data
        files[f"{name}.tlog-proof"] = format_proof(
            InclusionProof(item.entry.index, item.proof, seal.checkpoint)
        ).encode()
    return files


def _envelope_files(name: str, envelope: DsseEnvelope) -> dict[str, bytes]:
    """A DSSE envelope, its payload and its signatures, each by itself."""
    files = {
        f"{name}.dsse.json": canonical_json(msgspec.to_builtins(envelope)),
        f"{name}.json": base64.b64decode(envelope.payload),
    }
    for number, signature in enumerate(envelope.signatures, 1):
        files[f"{name}.{number}.sig"] = base64.b64decode(signature.sig)
    return files


def _anchor_files(name: str, anchor: SealedAnchor) -> dict[str, bytes]:
    files = {
        f"{name}.checkpoint": anchor.checkpoint.encode(),
        f"{name}.consistency": "".join(f"{encode_base64(node)}\n" for node in anchor.consistency).encode(),
    }
    for number, answer in enumerate(anchor.timestamps, 1):
        files[f"{name}.{number}.tsr"] = answer
    if anchor.keys:
        listed = [
            {
                "index": item.entry.index,
                "data": encode_base64(item.entry.data),
                "proof": [encode_base64(node) for node in item.proof],
            }
            for item in anchor.keys
        ]
        files[f"{name}.keys"] = canonical_json(listed)
    return files


# -- keys -----------------------------------------------------------------------------------------------------------


def _spki(verifier: Verifier) -> bytes:
    if verifier.algorithm == ECDSA:
        return verifier.public
    kind = MLDSA44PublicKey if verifier.algorithm == MLDSA44 else Ed25519PublicKey
    return spki_of(kind.from_public_bytes(verifier.public))


def _named(file: str, verifier: Verifier) -> NamedKey:
    return NamedKey(file, _spki(verifier), verifier)


def _lines(checkpoint: str) -> set[tuple[str, bytes]]:
    return {(line.name, line.key_id) for line in parse_note(checkpoint).signatures}


def _signing(known: Iterable[NamedKey], checkpoint: str) -> tuple[NamedKey, ...]:
    """Those keys that have a line on a checkpoint."""
    lines = _lines(checkpoint)
    return tuple(key for key in known if key.verifier and (key.verifier.name, key.verifier.key_id) in lines)


def _note_keys(keys: KeySuccession, seal: Seal, verdict: Verdict) -> tuple[tuple[NamedKey, ...], tuple[NamedKey, ...]]:
    """The known keys that signed the checkpoint or an anchor, and the log's keys before the one that did."""
    lines = _lines(seal.checkpoint)
    chain = [parse_vkey(span.key) for span in keys.spans("log")]
    signers = [parse_vkey(text) for text in verdict.signers]
    of_log = [*chain, *(parse_vkey(span.key) for span in keys.spans("mldsa")), *signers]
    signed = [key for key in of_log if key.name == keys.origin and (key.name, key.key_id) in lines]
    log = next(key for key in reversed(signed) if key.algorithm != MLDSA44)
    lasting = [key for key in signed if key.algorithm == MLDSA44][-1:]
    cosigned = [parse_vkey(anchor.by) for anchor in verdict.anchors if anchor.kind == COSIGNATURE_ANCHOR]
    witnesses = sorted({format_vkey(key) for key in (*signers, *cosigned) if key.name != keys.origin})
    found = [_named("log", log), *(_named("lasting", key) for key in lasting)]
    found += [_named(f"witness-{number}", parse_vkey(key)) for number, key in enumerate(witnesses, 1)]
    before = chain[: chain.index(log)] if log in chain else []
    return tuple(found), tuple(_named(f"log-{number}", key) for number, key in enumerate(before, 1))


def _statement_keys(keys: KeySuccession, sealed_at: int, opened: OpenedRecord) -> tuple[NamedKey, ...]:
    record, mldsa = (keys.key_at(role, sealed_at) for role in ("record", "mldsa"))
    assert record is not None  # or the record would be INVALID
    found = [NamedKey("record", decode_base64(record.key, "record key"))]
    if mldsa is None:
        return tuple(found)
    if opened.sealed is None or opened.sealed.keys is None:
        raise RecordError(
            "The record was made by an earlier version, which did not name in its entry the two keys that sign it.",
            next_step="Check it with `rlhf-audit verify`, or run the notebook again.",
            code="old-record",
        )
    return (*found, _named("lasting", parse_vkey(mldsa.key)))
