"""Verifier keys (C2SP signed-note v1.0.0): who signs, with which kind of key, and whether it holds. Floor 0.

A verifier key is written ``name+hash+key``: the key id in hex and the base64 of ``type || public key``. The types:

====  =========================================================================================================
0x01  Ed25519 over the note's text: a log. 32 bytes.
0x02  ECDSA over P-256 with SHA-256 of the text: a log whose key is in a cloud's or a machine's keeping. DER
      SubjectPublicKeyInfo; the key id is of that alone, without the name.
0x04  Ed25519 cosignature with a time: a witness (`statement`). 32 bytes.
0x06  ML-DSA-44 cosignature with a time: a witness, or a log's own second signature (`statement`). 1312 bytes.
====  =========================================================================================================

A key is taken in its one encoding only, and only where a signature by it means something: no point of small order,
under which anyone could sign, and no point that is off the curve.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.checkpoint import parse_checkpoint
from rlhf_audit_nb.trail.encoding import check_name, decode_base64, encode_base64
from rlhf_audit_nb.trail.statement import ed25519_message, mldsa44_message, parse_timestamped

__all__ = ["COSIGNATURE", "ECDSA", "ED25519", "MLDSA44", "Verifier", "format_vkey", "parse_vkey"]

ED25519 = 0x01
ECDSA = 0x02
COSIGNATURE = 0x04
MLDSA44 = 0x06

_KEY_ID_BYTES = 4
_ED25519_BYTES, _ED25519_SIGNATURE = 32, 64
_MLDSA44_BYTES, _MLDSA44_SIGNATURE = 1312, 2420
_MLDSA44_NAME_BYTES = 255  # the signed message gives the name's length in one byte

_P = 2**255 - 19
_D = -121665 * pow(121666, -1, _P) % _P

# A key of small order makes signatures that hold for any message; these are all encodings of such points.
_SMALL_ORDER = frozenset(
    bytes.fromhex(text)
    for text in (
        "0100000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000080",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0000000000000000000000000000000000000000000000000000000000000080",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    )
)


@lru_cache(maxsize=1024)
def _is_on_curve(public: bytes) -> bool:
    """Whether some x goes with the y of an Ed25519 key: x² = (y² - 1) / (dy² + 1) (RFC 8032, section 5.1.3)."""
    y = int.from_bytes(public, "little") & ((1 << 255) - 1)
    square = (y * y - 1) * (_D * y * y + 1) % _P  # a square exactly where the quotient is one
    return pow(square, (_P - 1) // 2, _P) in {0, 1}


def _sound_ed25519(name: str, public: bytes) -> None:
    if len(public) != _ED25519_BYTES:
        raise FormatError(f"The key {name} has {len(public)} bytes, not {_ED25519_BYTES}.", code="key-length")
    if public in _SMALL_ORDER:
        raise FormatError(f"The key {name} is a point of small order; anyone can sign for it.", code="key-weak")
    if int.from_bytes(public, "little") & ((1 << 255) - 1) >= _P:
        raise FormatError(f"The key {name} is not in the one encoding of its point.", code="key-encoding")
    if not _is_on_curve(public):
        raise FormatError(f"The key {name} is not a point of the curve.", code="key-encoding")


def _sound_ecdsa(name: str, public: bytes) -> None:
    try:
        key = load_der_public_key(public)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FormatError(f"The key {name} is not a DER SubjectPublicKeyInfo.", code="key-encoding") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise FormatError(f"The key {name} is not on the curve P-256.", code="key-type")
    if key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != public:
        raise FormatError(f"The key {name} is not in the one DER encoding of its point.", code="key-encoding")


def _sound_mldsa44(name: str, public: bytes) -> None:
    if len(public) != _MLDSA44_BYTES:
        raise FormatError(f"The key {name} has {len(public)} bytes, not {_MLDSA44_BYTES}.", code="key-length")
    if len(name.encode()) > _MLDSA44_NAME_BYTES:
        raise FormatError(f"The name of the ML-DSA key {name[:60]}… is over 255 bytes.", code="name")


def _plain_ed25519(key: Verifier, text: str, signature: bytes) -> int:
    Ed25519PublicKey.from_public_bytes(key.public).verify(signature, text.encode())
    return 0


def _plain_ecdsa(key: Verifier, text: str, signature: bytes) -> int:
    public = load_der_public_key(key.public)
    assert isinstance(public, ec.EllipticCurvePublicKey)  # what _sound_ecdsa has seen to
    public.verify(signature, text.encode(), ec.ECDSA(SHA256()))
    return 0


def _timed_ed25519(key: Verifier, text: str, data: bytes) -> int:
    when, signature = parse_timestamped(data, _ED25519_SIGNATURE)
    if when == 0:
        raise ValueError("an Ed25519 cosignature must say its time")
    Ed25519PublicKey.from_public_bytes(key.public).verify(signature, ed25519_message(text, when))
    return when


def _timed_mldsa44(key: Verifier, text: str, data: bytes) -> int:
    when, signature = parse_timestamped(data, _MLDSA44_SIGNATURE)
    message = mldsa44_message(key.name, parse_checkpoint(text), when)
    MLDSA44PublicKey.from_public_bytes(key.public).verify(signature, message)
    return when


class _Kind(NamedTuple):
    """What differs by the type of a key."""

    sound: Callable[[str, bytes], None]
    """Raises `FormatError` where these bytes cannot be the key of this name."""
    check: Callable[[Verifier, str, bytes], int]
    """The time that a signature says (0 where none); raises `InvalidSignature` or `ValueError` where it fails."""


_KINDS: Mapping[int, _Kind] = {
    ED25519: _Kind(_sound_ed25519, _plain_ed25519),
    ECDSA: _Kind(_sound_ecdsa, _plain_ecdsa),
    COSIGNATURE: _Kind(_sound_ed25519, _timed_ed25519),
    MLDSA44: _Kind(_sound_mldsa44, _timed_mldsa44),
}


@dataclass(frozen=True)
class Verifier:
    """A public key with the name and the kind of signature that it stands for.

    Raises:
        FormatError: ``name``, ``key-type`` for a type that is not known, ``key-length``, ``key-encoding`` for a key
            that is not in its one encoding, ``key-weak`` for one of small order.
    """

    name: str
    algorithm: int
    public: bytes

    def __post_init__(self) -> None:
        check_name(self.name)
        kind = _KINDS.get(self.algorithm)
        if kind is None:
            raise FormatError(
                f"The key {self.name} is of type {self.algorithm:#04x}, which is not known here.",
                next_step="Use a log's key of type 0x01, 0x02 or 0x06, or a witness's of type 0x04 or 0x06.",
                code="key-type",
            )
        kind.sound(self.name, self.public)

    @cached_property
    def key_id(self) -> bytes:
        """The four bytes by which a signature line names the key."""
        named = self.name.encode() + b"\n" + bytes([self.algorithm])
        return hashlib.sha256((b"" if self.algorithm == ECDSA else named) + self.public).digest()[:_KEY_ID_BYTES]

    def check(self, text: str, signature: bytes) -> int | None:
        """The time in seconds of a cosignature that holds (0 for a plain signature); ``None`` where it does not."""
        try:
            return _KINDS[self.algorithm].check(self, text, signature)
        except (InvalidSignature, FormatError, ValueError):
            return None


def parse_vkey(text: str) -> Verifier:
    """The verifier key written ``name+hash+key``.

    Raises:
        FormatError: it is malformed, its hash is not the key's, or the key is one that `Verifier` refuses.
    """
    parts = text.split("+", 2)
    if len(parts) != 3 or not re.fullmatch("[0-9a-f]{8}", parts[1]):  # noqa: PLR2004
        raise FormatError(
            f"The key {text[:80]!r} is not a verifier key.",
            next_step="Write it as NAME+HASH+KEY, in one line, as `rlhf-audit` prints it.",
            code="vkey",
        )
    name, key_hash, encoded = check_name(parts[0]), parts[1], parts[2]
    raw = decode_base64(encoded, f"key {name}")
    if not raw:
        raise FormatError(f"The key {name} is empty.", code="vkey")
    verifier = Verifier(name, raw[0], raw[1:])
    if verifier.key_id.hex() != key_hash:
        raise FormatError(f"The key {name} does not hash to {key_hash}; it was changed or cut.", code="vkey")
    return verifier


def format_vkey(verifier: Verifier) -> str:
    """The verifier key in its written form."""
    encoded = encode_base64(bytes([verifier.algorithm]) + verifier.public)
    return f"{verifier.name}+{verifier.key_id.hex()}+{encoded}"
