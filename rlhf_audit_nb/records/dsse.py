"""DSSE envelopes with one Ed25519 signature. Floor 3.

A Dead Simple Signing Envelope (secure-systems-lab/dsse, v1.0.2) is the JSON object
``{"payloadType", "payload", "signatures": [{"keyid", "sig"}]}``; payload and signature are standard base64. The
signature is over the pre-authentication encoding `pae`: ``DSSEv1 SP len(type) SP type SP len(body) SP body`` with
decimal byte lengths. The key id is the SHA-256 (hex) of the key's DER SubjectPublicKeyInfo. The payload is kept and
verified as the bytes that were signed; it is never serialised anew to verify.
"""

from __future__ import annotations

import base64
import hashlib

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from rlhf_audit_nb.errors import FormatError

__all__ = [
    "PAYLOAD_TYPE",
    "DsseEnvelope",
    "DsseSignature",
    "check_signature",
    "encode_base64",
    "key_id",
    "load_record_key",
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


def key_id(key: Ed25519PublicKey) -> str:
    """SHA-256 (hex) of the key's DER SubjectPublicKeyInfo."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def load_record_key(spki: bytes) -> Ed25519PublicKey:
    """The Ed25519 key in a DER SubjectPublicKeyInfo.

    Raises:
        FormatError: it is no key, or a key of another kind.
    """
    try:
        key = load_der_public_key(spki)
    except (ValueError, TypeError) as error:
        raise FormatError("The record key is not a DER public key.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise FormatError("The record key is not an Ed25519 key.")
    return key


def sign_envelope(payload: bytes, key: Ed25519PrivateKey) -> DsseEnvelope:
    """The payload in an envelope with one signature."""
    signature = DsseSignature(keyid=key_id(key.public_key()), sig=encode_base64(key.sign(pae(PAYLOAD_TYPE, payload))))
    return DsseEnvelope(payloadType=PAYLOAD_TYPE, payload=encode_base64(payload), signatures=(signature,))


def check_signature(envelope: DsseEnvelope, signature: bytes, payload: bytes, key: Ed25519PublicKey) -> bool:
    """Whether ``signature`` is the key's over this payload with this payload type."""
    try:
        key.verify(signature, pae(envelope.payloadType, payload))
    except InvalidSignature:
        return False
    return True
