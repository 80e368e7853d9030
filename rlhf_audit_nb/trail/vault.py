"""The vault: private payloads outside the trail, and the commitments that stand in their place. Floor 0.

The trail holds ``HMAC-SHA256(key, message)`` under a fresh 32-byte key, where the message is ::

    "rlhf-audit/commitment/v1" 00 || u32 len(type) || type || u32 len(stream) || stream || u64 seq
    || u32 len(payload) || payload || zeros up to the length bucket (256, 512, 1024, ... bytes)

(numbers big-endian). Key and payload, the *opening*, lie here under AES-256-GCM with the key of their *owner*: an
annotator, or the run where no annotator is concerned. Each owner's key is wrapped by the master key of the home folder
and named by a keyed hash, so that this file alone tells neither payloads nor who is in it. Deleting an owner's key
erases all that is hers: what remains says ``erased``, which is not ``missing``.

The vault commits before the trail does: a commitment in the trail always has its opening; the reverse (an opening
that no entry names, after a crash between the two) is harmless.
"""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from rlhf_audit_nb.errors import VaultError
from rlhf_audit_nb.trail.store import connect, store_errors

__all__ = ["Opening", "Sealed", "Vault", "check_opening", "commitment_of"]

_DOMAIN = b"rlhf-audit/commitment/v1\0"
_KEY_BYTES = 32
_NONCE_BYTES = 12
_LEAST_BUCKET = 256

_metadata = sa.MetaData()
_owners = sa.Table(
    "owners",
    _metadata,
    sa.Column("tag", sa.LargeBinary, primary_key=True),
    sa.Column("wrapped", sa.LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)
_openings = sa.Table(
    "openings",
    _metadata,
    sa.Column("commitment", sa.LargeBinary, primary_key=True),
    sa.Column("owner", sa.LargeBinary, index=True),
    sa.Column("sealed", sa.LargeBinary),
    sqlite_with_rowid=False,
)


@dataclass(frozen=True)
class Opening:
    """What shows a commitment's content: the 32-byte key and the payload."""

    key: bytes
    payload: bytes


@dataclass(frozen=True)
class Sealed:
    """An opening on its way into the vault, with where it belongs and whose it is."""

    commitment: bytes
    owner: str
    type: str
    stream: str
    seq: int
    opening: Opening


def _bucket(length: int) -> int:
    return max(_LEAST_BUCKET, 1 << (length - 1).bit_length()) if length else _LEAST_BUCKET


def _place(kind: str, stream: str, seq: int) -> bytes:
    kind_bytes, stream_bytes = kind.encode(), stream.encode()
    head = struct.pack(">I", len(kind_bytes)) + kind_bytes + struct.pack(">I", len(stream_bytes)) + stream_bytes
    return head + struct.pack(">Q", seq)


def commitment_of(kind: str, stream: str, seq: int, opening: Opening) -> bytes:
    """The 32-byte commitment to ``opening`` as the private half of the entry at that place."""
    payload = opening.payload
    padded = payload.ljust(_bucket(len(payload)), b"\0")
    message = _DOMAIN + _place(kind, stream, seq) + struct.pack(">I", len(payload)) + padded
    return hmac.digest(opening.key, message, "sha256")


def check_opening(commitment: bytes, kind: str, stream: str, seq: int, opening: Opening) -> bool:
    """Whether ``opening`` opens ``commitment`` at that place."""
    return len(opening.key) == _KEY_BYTES and hmac.compare_digest(commitment_of(kind, stream, seq, opening), commitment)


class Vault:
    """The vault of one trail. Not for two threads at once where it writes."""

    def __init__(self, path: Path, master: bytes) -> None:
        self.path = path
        self._wrapping = AESGCM(master)
        self._tag_key = hmac.digest(master, b"rlhf-audit/owner-tag/v1", "sha256")
        self._engine: sa.Engine | None = None
        self._connection: sa.Connection | None = None

    def _connected(self) -> sa.Connection:
        if self._connection is None:
            self._make_file()
            with store_errors(self.path):
                self._engine = connect(self.path, write=True, secure_delete=True)
                self._connection = self._engine.connect()
                with self._connection.begin():
                    _metadata.create_all(self._connection)
        return self._connection

    def _make_file(self) -> None:
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        except OSError as error:
            raise VaultError(
                f"The vault {self.path} cannot be written: {error.strerror or error}.",
                next_step="Make the file and its folder writable, or name another folder with trail=.",
                code="read-only",
            ) from error

    def _tag(self, owner: str) -> bytes:
        return hmac.digest(self._tag_key, owner.encode(), "sha256")

    def seal(self, items: Sequence[Sealed]) -> None:
        """Store openings durably, in one transaction.

        Raises:
            StoreError: the vault cannot be written.
        """
        connection = self._connected()
        with store_errors(self.path), connection.begin():
            ciphers = {owner: self._owner_cipher(connection, self._tag(owner)) for owner in {i.owner for i in items}}
            rows = []
            for item in items:
                nonce = os.urandom(_NONCE_BYTES)
                place = _place(item.type, item.stream, item.seq)
                plain = item.opening.key + struct.pack(">I", len(place)) + place + item.opening.payload
                sealed = nonce + ciphers[item.owner].encrypt(nonce, plain, item.commitment)
                rows.append({"commitment": item.commitment, "owner": self._tag(item.owner), "sealed": sealed})
            connection.execute(_openings.insert(), rows)

    def _owner_cipher(self, connection: sa.Connection, tag: bytes) -> AESGCM:
        # Read each time: another process may have erased this owner, and nothing may be sealed under a dead key.
        wrapped = connection.scalar(sa.select(_owners.c.wrapped).where(_owners.c.tag == tag))
        if wrapped is None:
            key, nonce = AESGCM.generate_key(256), os.urandom(_NONCE_BYTES)
            wrapped = nonce + self._wrapping.encrypt(nonce, key, tag)
            connection.execute(_owners.insert(), {"tag": tag, "wrapped": wrapped})
            return AESGCM(key)
        return AESGCM(self._decrypt(self._wrapping, wrapped, tag))

    def _decrypt(self, cipher: AESGCM, sealed: bytes, associated: bytes) -> bytes:
        try:
            return cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], associated)
        except InvalidTag as error:
            raise VaultError(
                f"The vault {self.path} does not open with this key, or was changed.",
                next_step="Check that RLHF_AUDIT_HOME is the home folder that this trail was written with.",
                code="vault-key",
            ) from error

    def opening(self, kind: str, stream: str, seq: int, commitment: bytes) -> Opening:
        """The opening of a commitment, checked against it.

        Raises:
            VaultError: ``erased``, ``opening-missing``, ``vault-key``, or ``opening-wrong`` where it does not open it.
        """
        opening, place = self._read(commitment)
        if place != _place(kind, stream, seq) or not check_opening(commitment, kind, stream, seq, opening):
            raise VaultError(f"The opening in the vault {self.path} is not the commitment's.", code="opening-wrong")
        return opening

    def open_payload(self, stream: str, seq: int, commitment: bytes) -> bytes:
        """The private payload of the entry ``seq`` of ``stream``, checked against its commitment.

        Raises:
            VaultError: as `opening`.
        """
        opening, place = self._read(commitment)
        size = int.from_bytes(place[:4], "big")
        kind = place[4 : 4 + size].decode(errors="replace")
        if place != _place(kind, stream, seq) or not check_opening(commitment, kind, stream, seq, opening):
            raise VaultError(f"The opening in the vault {self.path} is not the commitment's.", code="opening-wrong")
        return opening.payload

    def _read(self, commitment: bytes) -> tuple[Opening, bytes]:
        connection = self._connected()
        with store_errors(self.path), connection.begin():
            query = sa.select(_openings).where(_openings.c.commitment == commitment)
            row = connection.execute(query).first()
            if row is None:
                raise VaultError(
                    f"The vault {self.path} has no opening for this commitment.",
                    next_step="Restore the vault that belongs to this trail.",
                    code="opening-missing",
                )
            if row.sealed is None:
                raise VaultError("The content of this commitment was erased.", code="erased")
            cipher = self._owner_cipher(connection, row.owner)
        plain = self._decrypt(cipher, row.sealed, commitment)
        start = _KEY_BYTES + 4
        stop = start + int.from_bytes(plain[_KEY_BYTES:start], "big")
        return Opening(plain[:_KEY_BYTES], plain[stop:]), plain[start:stop]

    def erase(self, owner: str) -> int:
        """Delete an owner's key and payloads; returns how many payloads that were. They cannot be had back."""
        tag = self._tag(owner)
        connection = self._connected()
        with store_errors(self.path):
            with connection.begin():
                connection.execute(_owners.delete().where(_owners.c.tag == tag))
                erased = _openings.update().where(_openings.c.owner == tag).values(owner=None, sealed=None)
                count = connection.execute(erased).rowcount
            # The write-ahead log still holds the old pages: fold it into the file and cut it.
            raw = connection.connection.dbapi_connection
            if raw is not None:
                raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return int(count)

    def abandon(self) -> object:
        """Forget the connection without closing it: after a fork it is the parent's. Returns what must stay alive."""
        kept = (self._engine, self._connection)
        self._engine = self._connection = None
        return kept

    def close(self) -> None:
        """Close the connection."""
        connection, engine = self._connection, self._engine
        self._connection = self._engine = None
        with store_errors(self.path):
            if connection is not None:
                connection.close()
            if engine is not None:
                engine.dispose()
