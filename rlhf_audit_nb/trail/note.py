"""The signed note of C2SP (signed-note v1.0.0): parse, sign, verify. Floor 0.

A note is ``text`` (ending in a newline), an empty line, and one or more signature lines ::

    U+2014 SP name SP base64(key id (4 bytes) || signature) LF

The text ends at the *last* empty line. The note is UTF-8 without control characters other than LF. A verifier key is
written ``name+hash+key``: the key id in hex and the base64 of ``type || public key``. Types here: 0x01, Ed25519 over
the text; 0x04, a witness's cosignature (tlog-cosignature v1.0.1), Ed25519 over ``cosignature/v1``, a time and the text.

Parsing is strict, and formatting what was parsed gives the same bytes. A signature by a key that nobody knows is
ignored; one by a known key that does not hold refuses the whole note.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from rlhf_audit_nb.errors import FormatError

__all__ = [
    "COSIGNATURE",
    "ED25519",
    "MAX_NOTE",
    "MAX_SIGNATURES",
    "Note",
    "Signature",
    "Signer",
    "Verified",
    "Verifier",
    "check_name",
    "cosign_note",
    "decode_base64",
    "format_vkey",
    "parse_note",
    "parse_vkey",
    "sign_note",
    "verify_note",
]

ED25519 = 0x01
COSIGNATURE = 0x04
MAX_NOTE = 1 << 20
MAX_SIGNATURES = 100

_KEY_ID_BYTES = 4
_PUBLIC_KEY_BYTES = 32
_SIGNATURE_LINE = re.compile("— ([^ ]+) ([A-Za-z0-9+/=]+)")
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f]")
_MAX_TIME = (1 << 63) - 1

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


def decode_base64(text: str, what: str) -> bytes:
    """The bytes of canonical standard base64; ``what`` names it in the `FormatError` otherwise."""
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise FormatError(f"The {what} is not base64: {error}.", code="base64") from error
    if base64.b64encode(raw).decode() != text:
        raise FormatError(f"The {what} is not in canonical base64.", code="base64")
    return raw


def check_name(name: str, what: str = "key name") -> str:
    """``name`` if it can name a key: not empty, no space, no plus, no control character."""
    if not name or "+" in name or any(char.isspace() or char < " " for char in name):
        raise FormatError(f"The {what} {name!r} is empty or holds a space, a plus or a control character.", code="name")
    return name


def _key_id(name: str, algorithm: int, public: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + bytes([algorithm]) + public).digest()[:_KEY_ID_BYTES]


@dataclass(frozen=True)
class Verifier:
    """A public key with the name and the kind of signature that it stands for."""

    name: str
    algorithm: int
    public: bytes

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.algorithm not in (ED25519, COSIGNATURE):
            raise FormatError(
                f"The key {self.name} is of type {self.algorithm:#04x}, which is not known here.",
                next_step="Use an Ed25519 key (type 0x01 for a log, 0x04 for a witness).",
                code="key-type",
            )
        if len(self.public) != _PUBLIC_KEY_BYTES:
            raise FormatError(f"The key {self.name} has {len(self.public)} bytes, not 32.", code="key-length")
        if self.public in _SMALL_ORDER:
            raise FormatError(
                f"The key {self.name} is a point of small order; anyone can sign for it.", code="key-weak"
            )

    @property
    def key_id(self) -> bytes:
        """The first four bytes of the hash of name, type and key."""
        return _key_id(self.name, self.algorithm, self.public)

    def check(self, text: str, signature: bytes) -> int | None:
        """The time in seconds of a cosignature that holds (0 for a plain signature); ``None`` where it does not."""
        message, when = text.encode(), 0
        if self.algorithm == COSIGNATURE:
            if len(signature) != 72:  # noqa: PLR2004 (u64 time, 64-byte signature)
                return None
            (when,) = struct.unpack(">Q", signature[:8])
            if not 0 < when <= _MAX_TIME:
                return None
            message, signature = _cosigned(when, message), signature[8:]
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, message)
        except InvalidSignature:
            return None
        return when


@dataclass(frozen=True)
class Signer:
    """A private key that signs notes under a name."""

    name: str
    key: Ed25519PrivateKey

    def verifier(self, algorithm: int = ED25519) -> Verifier:
        """The public half."""
        return Verifier(self.name, algorithm, self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))


@dataclass(frozen=True)
class Signature:
    """One signature line, not yet verified."""

    name: str
    key_id: bytes
    data: bytes

    def format(self) -> str:
        """The line, without its newline."""
        return f"— {self.name} {base64.b64encode(self.key_id + self.data).decode()}"


@dataclass(frozen=True)
class Note:
    """A parsed note: its text and its signatures, none of them verified."""

    text: str
    signatures: tuple[Signature, ...]

    def format(self) -> str:
        """The whole note."""
        return self.text + "\n" + "".join(line.format() + "\n" for line in self.signatures)


@dataclass(frozen=True)
class Verified:
    """A signature that holds: whose it is, and for a cosignature its time in POSIX seconds (else 0)."""

    verifier: Verifier
    time: int


def parse_vkey(text: str) -> Verifier:
    """The verifier key written ``name+hash+key``.

    Raises:
        FormatError: it is malformed, its hash is not the key's, or the key is of an unknown type or small order.
    """
    parts = text.split("+", 2)
    if len(parts) != 3 or not re.fullmatch("[0-9a-f]{8}", parts[1]):  # noqa: PLR2004
        raise FormatError(
            f"The key {text[:80]!r} is not a verifier key.",
            next_step="Write it as NAME+HASH+KEY, in one line, as `rlhf-audit` prints it.",
            code="vkey",
        )
    name, key_hash, encoded = parts
    raw = decode_base64(encoded, f"key {name}")
    if not raw:
        raise FormatError(f"The key {name} is empty.", code="vkey")
    verifier = Verifier(name, raw[0], raw[1:])
    if verifier.key_id.hex() != key_hash:
        raise FormatError(f"The key {name} does not hash to {key_hash}; it was changed or cut.", code="vkey")
    return verifier


def format_vkey(verifier: Verifier) -> str:
    """The verifier key in its written form."""
    encoded = base64.b64encode(bytes([verifier.algorithm]) + verifier.public).decode()
    return f"{verifier.name}+{verifier.key_id.hex()}+{encoded}"


def parse_note(data: bytes | str) -> Note:
    """The note in ``data``, its signatures not verified.

    Raises:
        FormatError: the framing is broken anywhere.
    """
    text = _note_text(data)
    cut = text.rfind("\n\n")
    if cut < 0 or not text.endswith("\n"):
        raise FormatError(
            "A signed note has no empty line before its signatures, or no newline at its end.", code="note"
        )
    lines = text[cut + 2 : -1].split("\n")
    if len(lines) > MAX_SIGNATURES:
        raise FormatError(f"A signed note has {len(lines)} signatures; at most {MAX_SIGNATURES} are read.", code="note")
    return Note(text[: cut + 1], tuple(_parse_signature(line) for line in lines))


def _note_text(data: bytes | str) -> str:
    try:
        raw = data.encode() if isinstance(data, str) else data
        text = raw.decode()
    except UnicodeError as error:
        raise FormatError(f"A signed note is not UTF-8: {error}.", code="note") from error
    if len(raw) > MAX_NOTE:
        raise FormatError(f"A signed note of {len(raw)} bytes is over {MAX_NOTE}.", code="note")
    if _CONTROL.search(text):
        raise FormatError("A signed note holds a control character.", code="note")
    return text


def _parse_signature(line: str) -> Signature:
    match = _SIGNATURE_LINE.fullmatch(line)
    if match is None:
        raise FormatError(f"A signature line is malformed: {line[:60]!r}.", code="note")
    name = check_name(match[1], "signer's name")
    raw = decode_base64(match[2], f"signature of {name}")
    if len(raw) <= _KEY_ID_BYTES:
        raise FormatError(f"The signature of {name} is too short.", code="note")
    return Signature(name, raw[:_KEY_ID_BYTES], raw[_KEY_ID_BYTES:])


def _check_text(text: str) -> None:
    if not text.endswith("\n") or _CONTROL.search(text):
        raise FormatError("The text of a note must end in a newline and hold no control character.", code="note")


def sign_note(text: str, signers: Sequence[Signer]) -> str:
    """The note of ``text`` with one Ed25519 signature by each signer."""
    _check_text(text)
    lines = []
    for signer in signers:
        verifier = signer.verifier()
        lines.append(Signature(signer.name, verifier.key_id, signer.key.sign(text.encode())))
    return Note(text, tuple(lines)).format()


def _cosigned(when: int, text: bytes) -> bytes:
    return b"cosignature/v1\ntime %d\n%b" % (when, text)


def cosign_note(note: Note, signer: Signer, when: int) -> Note:
    """The note with a witness's cosignature added, made at ``when`` (POSIX seconds, not 0)."""
    if not 0 < when <= _MAX_TIME:
        raise FormatError(f"A cosignature cannot be made at time {when}.", code="cosignature")
    verifier = signer.verifier(COSIGNATURE)
    data = struct.pack(">Q", when) + signer.key.sign(_cosigned(when, note.text.encode()))
    return Note(note.text, (*note.signatures, Signature(signer.name, verifier.key_id, data)))


def verify_note(note: Note, verifiers: Iterable[Verifier]) -> tuple[Verified, ...]:
    """The signatures of known keys, all of which hold; at least one.

    Raises:
        FormatError: ``signature`` where a known key's signature does not hold or stands twice, ``unsigned`` where
            no known key has signed.
    """
    known = {(verifier.name, verifier.key_id): verifier for verifier in verifiers}
    found: dict[tuple[str, bytes], Verified] = {}
    for line in note.signatures:
        ident = (line.name, line.key_id)
        verifier = known.get(ident)
        if verifier is None:
            continue
        if ident in found:
            raise FormatError(f"{line.name} has signed the note twice.", code="signature")
        when = verifier.check(note.text, line.data)
        if when is None:
            raise FormatError(f"The signature of {line.name} does not hold.", code="signature")
        found[ident] = Verified(verifier, when)
    if not found:
        names = ", ".join(sorted({line.name for line in note.signatures}))
        raise FormatError(f"No trusted key has signed the note (signed by: {names}).", code="unsigned")
    return tuple(found.values())
