"""Signing and verifying notes (C2SP signed-note v1.0.0). Floor 0.

The form of a note is `frame`'s, of a key `vkey`'s, of a cosignature `statement`'s. Here is who can sign a note, and
the one rule by which signatures are judged: one by a key that nobody knows is ignored, one by a known key that does
not hold refuses the whole note, and without any by a known key nothing is accepted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.cosignature import cosign_note
from rlhf_audit_nb.trail.encoding import check_name, decode_base64
from rlhf_audit_nb.trail.frame import MAX_NOTE, MAX_SIGNATURES, Note, Signature, check_text, parse_note
from rlhf_audit_nb.trail.vkey import COSIGNATURE, ECDSA, ED25519, MLDSA44, Verifier, format_vkey, parse_vkey

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = [
    "COSIGNATURE",
    "ECDSA",
    "ED25519",
    "MAX_NOTE",
    "MAX_SIGNATURES",
    "MLDSA44",
    "Note",
    "NoteSigner",
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


class NoteSigner(Protocol):
    """What signs notes under a name: a key in memory, in a machine, in a cloud's keeping, or a cosigner."""

    @property
    def name(self) -> str:
        """The name that stands in its signature lines."""

    def verifier(self) -> Verifier:
        """The public half."""

    def sign_line(self, text: str) -> Signature:
        """The signature line over a note's text."""


@dataclass(frozen=True)
class Signer:
    """An Ed25519 key in memory that signs notes under a name (type 0x01)."""

    name: str
    key: Ed25519PrivateKey = field(repr=False)

    def verifier(self, algorithm: int = ED25519) -> Verifier:
        """The public half."""
        return Verifier(self.name, algorithm, self.key.public_key().public_bytes_raw())

    def sign_line(self, text: str) -> Signature:
        """The signature line over a note's text."""
        return Signature(self.name, self._key_id, self.key.sign(text.encode()))

    @cached_property
    def _key_id(self) -> bytes:
        return self.verifier().key_id


@dataclass(frozen=True)
class Verified:
    """A signature that holds: whose it is, and for a cosignature its time in POSIX seconds (else 0)."""

    verifier: Verifier
    time: int


def sign_note(text: str, signers: Sequence[NoteSigner]) -> str:
    """The note of ``text`` with one signature line by each signer, in their order."""
    check_text(text)
    return Note(text, tuple(signer.sign_line(text) for signer in signers)).format()


def verify_note(note: Note, verifiers: Iterable[Verifier]) -> tuple[Verified, ...]:
    """The signatures of known keys, all of which hold; at least one.

    Raises:
        FormatError: ``signature`` where a known key's signature does not hold or stands twice, ``unsigned`` where
            no known key has signed, ``ambiguous`` where two of the known keys have the same name and key id.
    """
    known = _by_ident(verifiers)
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


def _by_ident(verifiers: Iterable[Verifier]) -> dict[tuple[str, bytes], Verifier]:
    known: dict[tuple[str, bytes], Verifier] = {}
    for verifier in verifiers:
        if known.setdefault((verifier.name, verifier.key_id), verifier) != verifier:
            raise FormatError(f"Two keys of {verifier.name} have the same key id.", code="ambiguous")
    return known
