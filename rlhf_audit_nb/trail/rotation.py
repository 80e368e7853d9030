"""Changing the keys of an opened trail: another key takes a key's place, or a key is revoked. Floor 0.

Nobody else may have the trail open meanwhile (`Trail.exclusive`). The new key is written beside the ring first
(`key_files`); then the entry is appended that names it, in a commit that the old log key and the new one both sign;
then the new key takes its place, and the old private key is gone. After a crash the next opening finds out from the
trail whether the entry was appended, and finishes or drops the change.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey

from rlhf_audit_nb.errors import AuditError, KeyFileError
from rlhf_audit_nb.trail.cosignature import CosignerMLDSA44
from rlhf_audit_nb.trail.encoding import encode_base64
from rlhf_audit_nb.trail.key_files import ROTATED, Change, Retired, now_text
from rlhf_audit_nb.trail.keys import encode_private, log_signer, public_files
from rlhf_audit_nb.trail.note import format_vkey, sign_note
from rlhf_audit_nb.trail.signers import FileKey, HeldKey, SigningKey
from rlhf_audit_nb.trail.succession import (
    KEY_REVOKED,
    KEY_ROTATED,
    ROLES,
    KeyRevokedBody,
    KeyRotatedBody,
    KeySpan,
    KeySuccession,
    Revocation,
    check_reason,
    keep_revocation,
    names_key,
    parse_revocation,
    revocation_text,
    rotation_text,
)

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.keys import KeyRing
    from rlhf_audit_nb.trail.note import NoteSigner
    from rlhf_audit_nb.trail.trail import Trail, TrailReader

__all__ = ["Rotation", "keys_over_time", "revoke_key", "rotate_key"]

_Private = SigningKey | MLDSA44PrivateKey | ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Rotation:
    """A key that took another's place: both as they stand in the entry, and the entry's index."""

    role: str
    old: str | None
    new: str
    index: int


def keys_over_time(reader: TrailReader) -> KeySuccession:
    """The keys of a trail as its own entries tell them."""
    keys = KeySuccession(reader.origin)
    entries = list(reader.entries(0, 1))
    entries += [entry for kind in (KEY_ROTATED, KEY_REVOKED) for entry in reader.entries(type=kind)]
    for entry in sorted(entries, key=lambda item: item.index):
        keys.add(entry)
    return keys


def _made(role: str) -> _Private:
    if role == "mldsa":
        return MLDSA44PrivateKey.generate()
    if role == "model":
        return ec.generate_private_key(ec.SECP256R1())
    return FileKey(Ed25519PrivateKey.generate())


def _text(origin: str, role: str, key: _Private) -> str:
    """A key as it stands in the entries."""
    if isinstance(key, MLDSA44PrivateKey):
        return format_vkey(CosignerMLDSA44(origin, key).verifier())
    signing = FileKey(key) if isinstance(key, ec.EllipticCurvePrivateKey) else key
    if role == "log":
        return format_vkey(log_signer(origin, signing).verifier())
    return encode_base64(signing.spki)


def _staged(ring: KeyRing, role: str, key: _Private, public: str) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The files that hold a new key, and those that go when it takes its place."""
    files = public_files(role, public)
    if isinstance(key, HeldKey):
        return {**files, f"{role}.signer": key.encode()}, (f"{role}.pem",)
    private = key.key if isinstance(key, FileKey) else key
    return {**files, f"{role}.pem": encode_private(private, ring.secret)}, (f"{role}.signer",)


def _install(trail: Trail, role: str, key: _Private) -> None:
    """Let this process go on with the new key."""
    setattr(trail.keys, role, key)
    if role == "log":
        trail.use_signers([trail.keys.signer])


def _signed(signer: NoteSigner, text: str) -> str:
    return encode_base64(signer.sign_line(text).data)


def rotate_key(trail: Trail, role: str, *, new: HeldKey | None = None, reason: str = "") -> Rotation:
    """Give a role another key, from the next entry on; the ring's own keys change with it.

    Args:
        trail: opened, by this process alone.
        role: ``log``, ``record``, ``model`` or ``mldsa`` (which a ring need not have had before).
        new: a key that is held elsewhere (``log`` and ``record`` only); ``None`` makes one in a file.
        reason: one line, for whoever reads the trail.

    Raises:
        StoreError: ``in-use`` where somebody else has the trail open, or the append failed.
        KeyFileError: the ring cannot be written, or the new key cannot sign; nothing was changed then.
        FormatError: the reason is more than a line.
    """
    check_reason(reason)
    if role not in ROLES:
        raise KeyFileError(f"There is no {role} key.", next_step=f"Name one of {', '.join(ROLES)}.", code="role")
    key = new or _made(role)
    if isinstance(new, HeldKey):
        _check_held(role, new)
    try:
        with trail.exclusive():
            return _rotate(trail, role, key, reason)
    except OSError as error:
        raise KeyFileError(
            f"The trail {trail.location} cannot be held alone: {error.strerror or error}.",
            next_step="Make its folder writable and free some space; the keys are as they were.",
        ) from error


def _check_held(role: str, key: HeldKey) -> None:
    if role not in ("log", "record"):
        raise KeyFileError(
            f"The {role} key cannot be held elsewhere: what uses it needs the key itself.",
            next_step="Use such a key for the log or for records.",
            code="key-type",
        )
    # Asked before anything is written: what cannot sign now must not be named as what signs from now on.
    key.sign(b"rlhf-audit: can this key sign?\n")


def _rotate(trail: Trail, role: str, key: _Private, reason: str) -> Rotation:
    ring, before = trail.keys, trail.signers
    old, named = ring.public(role), _text(trail.origin, role, key)
    if old == named:
        raise KeyFileError(f"This is the {role} key already.", next_step="Name another one.", code="same-key")
    index = -1

    def body(reader: TrailReader) -> bytes:
        nonlocal index
        index = reader.size
        files, gone = _staged(ring, role, key, named)
        retired = None if old is None else Retired(role=role, key=old, index=index, successor=named, time=now_text())
        change = Change(kind=ROTATED, files=tuple(files), gone=gone, retired=retired, new=named)
        ring.folder.stage(change, files)
        text = rotation_text(trail.origin, role, index, old, named, reason)
        signature = _signed(ring.signer, text)
        return msgspec.json.encode(KeyRotatedBody(role=role, old=old, new=named, reason=reason, signature=signature))

    with ring.folder.locked():
        _refuse_pending(ring)
        if role == "log":
            assert not isinstance(key, MLDSA44PrivateKey | ec.EllipticCurvePrivateKey)
            trail.use_signers([*before, log_signer(trail.origin, key)])
        try:
            trail.append_guarded(KEY_ROTATED, body)
        except BaseException:
            # Whether a failed commit reached the disk is only known by reading it again; where that fails too, the
            # next opening reads it.
            with suppress(AuditError, OSError):
                named_after_all = names_key(_reread(trail), named)
                if named_after_all:
                    _install(trail, role, key)
                else:
                    trail.use_signers(before)
                ring.folder.settle(lambda _change: named_after_all)
            raise
        _install(trail, role, key)
        ring.folder.settle(lambda _change: True)
    return Rotation(role, old, named, index)


def _refuse_pending(ring: KeyRing) -> None:
    if ring.folder.settle() is None and ring.folder.pending() is not None:
        raise KeyFileError(
            "Another rotation of these keys was cut short.",
            next_step="Close the trail and open it again, which finishes it; then try again.",
            code="rotating",
        )


def _reread(trail: Trail) -> TrailReader:
    from rlhf_audit_nb.trail.trail import TrailReader

    return TrailReader.open(trail.location)


def revoke_key(
    trail: Trail, role: str = "log", *, key: str | None = None, since: int | None = None, reason: str = ""
) -> tuple[Revocation, Rotation | None]:
    """Say that what a key signs no longer counts, in the trail and in a statement that goes without it.

    A key that is in force is replaced first. The statement is kept in ``HOME/revoked``; hand it to whoever verifies:
    a fork of the trail can leave the entry out, but not the statement.

    Args:
        trail: opened, by this process alone.
        role: what the key is for.
        key: the key as it stands in the entries; ``None`` takes the one in force.
        since: after how many entries its signatures no longer count; ``None``: after those that are there now (for a
            key that was replaced: after those of its own time).
        reason: one line.

    Returns:
        The statement, and the rotation where the key was in force.

    Raises:
        KeyFileError: the trail never had this key, or it is revoked already.
        StoreError, FormatError: as `rotate_key`.
    """
    check_reason(reason)
    reader = trail.reader()
    span = _span(keys_over_time(reader), role, key)
    if since is not None and not 0 <= since <= reader.size + 1:
        raise KeyFileError(
            f"The trail has {reader.size} entries, so a key cannot count for the first {since}.",
            next_step="Name the number of entries up to which the key is to count.",
            code="since",
        )
    old_signer, rotation = trail.keys.signer, None
    if span.last is None:
        rotation = rotate_key(trail, role, reason=reason)
    last = rotation.index if rotation is not None else span.last
    assert last is not None
    limit = last + 1 if since is None else since
    origin, signer = trail.origin, trail.keys.signer
    body = KeyRevokedBody(
        role=role,
        key=span.key,
        since=limit,
        reason=reason,
        signature=_signed(signer, revocation_text(origin, role, span.key, limit, reason)),
    )
    trail.append_guarded(KEY_REVOKED, lambda _reader: msgspec.json.encode(body))
    successor = rotation.new if rotation is not None else _successor(trail.reader(), role, span.key)
    text = revocation_text(origin, role, span.key, limit, reason, successor=successor)
    by_old = [old_signer] if role == "log" and rotation is not None else []
    statement = parse_revocation(sign_note(text, [*by_old, signer]))
    keep_revocation(trail.home, statement)
    return statement, rotation


def _span(keys: KeySuccession, role: str, key: str | None) -> KeySpan:
    spans = keys.spans(role)
    found = [span for span in spans if span.key == key] if key is not None else list(spans[-1:])
    if not found:
        raise KeyFileError(
            f"The trail names no such {role} key.",
            next_step="`rlhf-audit keys show` lists the keys and their ids.",
            code="no-key",
        )
    if found[0].since is not None:
        raise KeyFileError(
            f"This {role} key was revoked already: it counts for {found[0].since} entries.",
            next_step="Nothing needs to be done.",
            code="revoked-key",
        )
    return found[0]


def _successor(reader: TrailReader, role: str, key: str) -> str | None:
    spans = keys_over_time(reader).spans(role)
    return next((after.key for before, after in pairwise(spans) if before.key == key), None)
