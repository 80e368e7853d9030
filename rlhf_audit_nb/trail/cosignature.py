"""Cosigners (C2SP tlog-cosignature v1.1.0): who signs that at some time they saw this checkpoint. Floor 0.

A witness cosigns the checkpoints of other people's logs; a log can add a signature of its own that stands against
quantum computers. The bytes that are signed are `statement`'s; `Verifier` checks them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.checkpoint import parse_checkpoint
from rlhf_audit_nb.trail.frame import Note, Signature
from rlhf_audit_nb.trail.statement import ed25519_message, format_timestamped, mldsa44_message
from rlhf_audit_nb.trail.vkey import COSIGNATURE, MLDSA44, Verifier

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey

__all__ = ["Cosigner", "CosignerEd25519", "CosignerMLDSA44", "cosign_note"]


class Cosigner(Protocol):
    """What cosigns checkpoints: a witness, or a log with a second key of its own."""

    @property
    def name(self) -> str:
        """The name that stands in its signature lines."""

    def verifier(self) -> Verifier:
        """The public half."""

    def cosign(self, note: Note, when: int) -> Signature:
        """The signature line over a checkpoint, made at ``when`` (POSIX seconds)."""


@dataclass(frozen=True)
class CosignerEd25519:
    """An Ed25519 key that cosigns checkpoints (type 0x04)."""

    name: str
    key: Ed25519PrivateKey = field(repr=False)

    def verifier(self) -> Verifier:
        """The public half."""
        return Verifier(self.name, COSIGNATURE, self.key.public_key().public_bytes_raw())

    def cosign(self, note: Note, when: int) -> Signature:
        """The signature line over a checkpoint, made at ``when`` (POSIX seconds, not 0)."""
        _check_time(when)
        data = format_timestamped(when, self.key.sign(ed25519_message(note.text, when)))
        return Signature(self.name, self.verifier().key_id, data)

    def sign_line(self, text: str) -> Signature:
        """The signature line over a checkpoint's text, made now."""
        return self.cosign(Note(text, ()), int(time.time()))


@dataclass(frozen=True)
class CosignerMLDSA44:
    """An ML-DSA-44 key that cosigns checkpoints (type 0x06)."""

    name: str
    key: MLDSA44PrivateKey = field(repr=False)

    def verifier(self) -> Verifier:
        """The public half."""
        return Verifier(self.name, MLDSA44, self.key.public_key().public_bytes_raw())

    def cosign(self, note: Note, when: int) -> Signature:
        """The signature line over a checkpoint, made at ``when`` (POSIX seconds, not 0)."""
        _check_time(when)
        message = mldsa44_message(self.name, parse_checkpoint(note.text), when)
        return Signature(self.name, self.verifier().key_id, format_timestamped(when, self.key.sign(message)))

    def sign_line(self, text: str) -> Signature:
        """The signature line over a checkpoint's text, made now."""
        return self.cosign(Note(text, ()), int(time.time()))


def _check_time(when: int) -> None:
    if when == 0:  # it would claim no more than consistency
        raise FormatError("A cosignature cannot be made at time 0.", code="cosignature")


class _HasEd25519(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def key(self) -> Ed25519PrivateKey: ...


def cosign_note(note: Note, signer: _HasEd25519, when: int) -> Note:
    """The note with an Ed25519 cosignature by ``signer`` added, made at ``when`` (POSIX seconds, not 0)."""
    return note.plus(CosignerEd25519(signer.name, signer.key).cosign(note, when))
