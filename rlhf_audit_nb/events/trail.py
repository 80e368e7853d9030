"""What the trail says of itself: its keys and what was erased beside it. Floor 1."""

from __future__ import annotations

from typing import ClassVar

from rlhf_audit_nb.events.base import Event

__all__ = [
    "KeyRevoked",
    "KeyRotated",
    "TrailCreated",
    "VaultErased",
]


class TrailCreated(Event, frozen=True, kw_only=True):
    """First entry of every trail: its name and the public keys that act for it.

    ``log_key`` is the C2SP vkey that signs checkpoints; ``record_key`` (Ed25519) signs records; ``model_key``
    (P-256) signs model folders. The last two are base64 of the DER SubjectPublicKeyInfo.
    """

    TYPE: ClassVar[str] = "trail.created"

    origin: str
    log_key: str
    record_key: str
    model_key: str
    tool: str


class KeyRotated(Event, frozen=True, kw_only=True):
    """A key took the place of another from the next entry on; ``old`` is ``None`` where the role had none.

    ``role`` is ``log`` or ``mldsa`` (keys are C2SP vkeys), ``record`` or ``model`` (base64 of the DER
    SubjectPublicKeyInfo). ``signature`` is by the log key that was in force, over `trail.succession.rotation_text`.
    """

    TYPE: ClassVar[str] = "key.rotated"

    role: str
    old: str | None
    new: str
    reason: str
    signature: str


class KeyRevoked(Event, frozen=True, kw_only=True):
    """What a key signed counts for the first ``since`` entries only; fields as `KeyRotated`."""

    TYPE: ClassVar[str] = "key.revoked"

    role: str
    key: str
    since: int
    reason: str
    signature: str


class VaultErased(Event, frozen=True, kw_only=True):
    """An annotator's private payloads were erased from the vault; neither who nor which entries.

    ``commitment`` (base64) is over the commitments that were erased, with a salt that only the vault has;
    ``generation`` is that of the vault's master key since then; ``reason`` is ``request``, ``retention`` or
    ``withdrawn``.
    """

    TYPE: ClassVar[str] = "vault.erased"

    erasure: str
    commitment: str
    generation: int
    reason: str
