"""DSSE envelopes: a payload and the signatures over it. Floor 3.

A Dead Simple Signing Envelope (secure-systems-lab/dsse, v1.0.2) is the JSON object
``{"payloadType", "payload", "signatures": [{"keyid", "sig"}]}``; payload and signature are standard base64. The
signature is over the pre-authentication encoding `pae`: ``DSSEv1 SP len(type) SP type SP len(body) SP body`` with
decimal byte lengths. The key id is the SHA-256 (hex) of the key's DER SubjectPublicKeyInfo. The payload is kept and
verified as the bytes that were signed; it is never serialised anew to verify. Keys are of any kind that `signers`
knows: Ed25519 in a new ring, ECDSA where an HSM or a key service holds the key, ML-DSA-44 for the second signature.
"""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING

import msgspec

from rlhf_audit_nb.trail.signers import check_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlhf_audit_nb.trail.signers import PublicKey, SigningKey

__all__ = [
    "PAYLOAD_TYPE",
    "DsseEnvelope",
    "DsseSignature",
    "check_signature",
    "encode_base64",
    "key_id",
    "pae",
    "sign_envelope",
]

PAYLOAD_TYPE = "application/vnd.in-toto+json"


class DsseSignature(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A signature and the id of the key that made it."""

    keyid: str
    sig: str


class DsseEnvelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A signed payload."""

    payloadType: str  # noqa: N815 the format's own spelling
    payload: str
    signatures: tuple[DsseSignature, ...]


def encode_base64(data: bytes) -> str:
    """Standard base64 with padding."""
    return base64.b64encode(data).decode("ascii")


def pae(payload_type: str, payload: bytes) -> bytes:
    """The bytes that a DSSE signature is over."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def key_id(spki: bytes) -> str:
    """The id by which a signature names its key: SHA-256 (hex) of the DER SubjectPublicKeyInfo."""
    return hashlib.sha256(spki).hexdigest()


def sign_envelope(payload: bytes, keys: Sequence[SigningKey]) -> DsseEnvelope:
    """The payload in an envelope with one signature by each key, in their order."""
    message = pae(PAYLOAD_TYPE, payload)
    signatures = tuple(DsseSignature(keyid=key_id(key.spki), sig=encode_base64(key.sign(message))) for key in keys)
    return DsseEnvelope(payloadType=PAYLOAD_TYPE, payload=encode_base64(payload), signatures=signatures)


def check_signature(envelope: DsseEnvelope, signature: bytes, payload: bytes, key: PublicKey) -> bool:
    """Whether ``signature`` is the key's over this payload with this payload type."""
    return check_bytes(key, signature, pae(envelope.payloadType, payload))
