"""The vault: private payloads outside the trail, and the commitments that stand in their place. Floor 0.

The trail holds ``HMAC-SHA256(key, message)`` under a fresh 32-byte key, where the message is ::

    "rlhf-audit/commitment/v1" 00 || u32 len(type) || type || u32 len(stream) || stream || u64 seq
    || u32 len(payload) || payload || zeros up to the length bucket (256, 512, 1024, ... bytes)

(numbers big-endian). Key and payload, the *opening*, lie here under AES-256-GCM with the key of their *owner*: an
annotator, or the stream (the run) where no annotator is concerned.

============ ==========================================================================================================
``state``    one row: the generation of the master key (`vault_key`) that wraps the owners' keys
``owners``   each owner's key and name, wrapped by the master key; the row is found by a keyed hash of the name, so that
             this file alone tells neither payloads nor who is in it
``openings`` commitment and sealed opening; of an erased one the commitment stays, and names its erasure
``erasures`` each erasure: its name, the salt and the commitment over what it erased, whether the trail has its entry
============ ==========================================================================================================

The vault commits before the trail does: a commitment in the trail always has its opening; the reverse (an opening
that no entry names, after a crash between the two) is harmless.

Erasing an owner takes its key and its payloads out, and makes a new generation of the master key, under which the keys
of all others are wrapped anew, so that no older copy of this file opens any more. In this order, each step durable
before the next: the key file gets the new generation beside the old one; this file forgets the owner and goes over to
the new generation, in one transaction; the write-ahead log is emptied; the key file forgets the old generation; the
trail gets its ``vault.erased`` entry (`erasure`). A crash before the second step leaves everything as it was; after
it, `Vault.settle` does the rest.
"""

from __future__ import annotations

import errno
import hmac
import os
import struct
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from rlhf_audit_nb.errors import FormatError, StoreError, VaultError
from rlhf_audit_nb.trail.sqlite import Database, Session, Statement, reading, store_errors
from rlhf_audit_nb.trail.verdict import Reason

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.entry import Entry
    from rlhf_audit_nb.trail.vault_key import Generation, MasterKey

__all__ = [
    "VAULT_ERASED",
    "Erased",
    "Erasure",
    "Opening",
    "OpeningSummary",
    "OpeningsCheck",
    "Sealed",
    "Vault",
    "check_opening",
    "commitment_of",
    "decode_erased",
]

VAULT_ERASED = "vault.erased"

_DOMAIN = b"rlhf-audit/commitment/v1\0"
_KEY_BYTES = 32
_NONCE_BYTES = 12
_LEAST_BUCKET = 256
_NAME_BUCKET = 64
_LAYOUT = 2

_metadata = sa.MetaData()
_state = sa.Table(
    "state",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("generation", sa.Integer, nullable=False),
)
_owners = sa.Table(
    "owners",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("tag", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("wrapped", sa.LargeBinary, nullable=False),
)
# The index is on the commitment's first 64 bits: a third of the whole one's size, and it is not to be unique.
_openings = sa.Table(
    "openings",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("mark", sa.BigInteger, nullable=False, index=True),
    sa.Column("commitment", sa.LargeBinary, nullable=False),
    sa.Column("owner", sa.Integer, index=True),
    sa.Column("erasure", sa.Integer),
    sa.Column("sealed", sa.LargeBinary),
)
_erasures = sa.Table(
    "erasures",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("salt", sa.LargeBinary, nullable=False),
    sa.Column("commitment", sa.LargeBinary, nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("openings", sa.Integer, nullable=False),
    sa.Column("logged", sa.Boolean, nullable=False),
    sa.Column("seal", sa.LargeBinary, nullable=False),
)


_GENERATION = Statement(sa.select(_state.c.generation))
_SET_GENERATION = Statement(_state.update(), ["generation"])
_ADD_STATE = Statement(_state.insert())
_OWNER_OF_TAG = Statement(sa.select(_owners.c.id, _owners.c.wrapped).where(_owners.c.tag == sa.bindparam("of")))
_OWNER_OF_ID = Statement(sa.select(_owners.c.tag, _owners.c.wrapped).where(_owners.c.id == sa.bindparam("of")))
_ALL_OWNERS = Statement(sa.select(_owners.c.id, _owners.c.tag, _owners.c.wrapped).order_by(_owners.c.id))
_ADD_OWNER = Statement(_owners.insert(), ["tag", "wrapped"])
_PUT_OWNER = Statement(_owners.insert())
_CLEAR_OWNERS = Statement(_owners.delete())
_ADD_OPENING = Statement(_openings.insert(), ["mark", "commitment", "owner", "sealed"])
_OPENING = Statement(
    sa.select(_openings.c.commitment, _openings.c.owner, _openings.c.erasure, _openings.c.sealed).where(
        _openings.c.mark == sa.bindparam("of")
    )
)
# What a check needs of each row: its place, the commitment, whether there is an opening, which erasure took it.
_look = sa.select(_openings.c.id, _openings.c.commitment, _openings.c.sealed.is_not(None), _openings.c.erasure)
_WALK = Statement(_look.where(_openings.c.id > sa.bindparam("after")).order_by(_openings.c.id))
_FIND = Statement(_look.where(_openings.c.mark == sa.bindparam("of")))
_OWNED_BY = Statement(
    sa.select(_openings.c.commitment).where(_openings.c.owner == sa.bindparam("of")).order_by(_openings.c.commitment)
)
_ERASED_BY = Statement(
    sa.select(_openings.c.commitment).where(_openings.c.erasure == sa.bindparam("of")).order_by(_openings.c.commitment)
)
_ADD_ERASURE = Statement(
    _erasures.insert(), ["name", "salt", "commitment", "generation", "reason", "openings", "logged", "seal"]
)
_ERASURES = Statement(
    sa.select(
        _erasures.c.name,
        _erasures.c.commitment,
        _erasures.c.generation,
        _erasures.c.reason,
        _erasures.c.openings,
        _erasures.c.logged,
        _erasures.c.id,
        _erasures.c.salt,
    ).order_by(_erasures.c.id)
)
_UNLOGGED = Statement(
    sa.select(
        _erasures.c.name,
        _erasures.c.commitment,
        _erasures.c.generation,
        _erasures.c.reason,
        _erasures.c.openings,
        _erasures.c.seal,
    ).where(_erasures.c.logged.is_(sa.false()))
)
_LOGGED = Statement(_erasures.update().where(_erasures.c.name == sa.bindparam("of")).values(logged=sa.true()))
# Overwritten where it stands, with zeros of the same length, before the row shrinks: no page that is rearranged then
# can keep a copy of what is to go.
_BLANK = Statement(
    _openings.update()
    .where(_openings.c.owner == sa.bindparam("of"))
    .values(sealed=sa.func.zeroblob(sa.func.length(_openings.c.sealed)))
)
_BURY = Statement(
    _openings.update()
    .where(_openings.c.owner == sa.bindparam("of"))
    .values(sealed=sa.null(), owner=sa.null(), erasure=sa.bindparam("by"))
)


class Opening(msgspec.Struct, frozen=True):
    """What shows a commitment's content: the 32-byte key and the payload."""

    key: bytes
    payload: bytes


class Sealed(msgspec.Struct, frozen=True):
    """An opening on its way into the vault, with where it belongs and whose it is (``None``: the stream's)."""

    commitment: bytes
    owner: str | None
    type: str
    stream: str
    seq: int
    opening: Opening


class Erased(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a ``vault.erased`` entry: an erasure without a word on whose it was, or which entries it concerns.

    Attributes:
        erasure: its name in the vault, 32 hex digits.
        commitment: base64 of the HMAC over the commitments that were erased.
        generation: the generation of the vault's master key that it brought.
        reason: why: ``request``, ``retention`` or ``withdrawn``.
    """

    erasure: str
    commitment: str
    generation: int
    reason: str


@dataclass(frozen=True)
class Erasure:
    """One erasure, as the vault remembers it; nothing in it tells whose it was.

    Attributes:
        name: 32 hex digits, made from the owner's name with a secret that is gone.
        commitment: HMAC-SHA256 over the commitments that were erased, with a salt that only the vault has.
        generation: the generation of the master key that it brought.
        reason: why.
        openings: how many openings were erased.
        logged: whether the trail has its entry.
    """

    name: str
    commitment: bytes
    generation: int
    reason: str
    openings: int
    logged: bool = False


_erased = msgspec.json.Decoder(Erased)


def decode_erased(body: bytes) -> Erased:
    """The body of a ``vault.erased`` entry; raises `FormatError` (``body``) where it is none."""
    try:
        return _erased.decode(body)
    except msgspec.MsgspecError as error:
        raise FormatError(f"An erasure is malformed: {error}.", code="body") from error


def _bucket(length: int) -> int:
    return max(_LEAST_BUCKET, 1 << (length - 1).bit_length()) if length else _LEAST_BUCKET


@lru_cache(maxsize=1024)
def _place_head(kind: str, stream: str) -> bytes:
    kind_bytes, stream_bytes = kind.encode(), stream.encode()
    return struct.pack(">I", len(kind_bytes)) + kind_bytes + struct.pack(">I", len(stream_bytes)) + stream_bytes


_u32 = struct.Struct(">I").pack
_u64 = struct.Struct(">Q").pack


def _place(kind: str, stream: str, seq: int) -> bytes:
    return _place_head(kind, stream) + _u64(seq)


def commitment_of(kind: str, stream: str, seq: int, opening: Opening) -> bytes:
    """The 32-byte commitment to ``opening`` as the private half of the entry at that place."""
    payload = opening.payload
    padded = payload.ljust(_bucket(len(payload)), b"\0")
    message = b"".join((_DOMAIN, _place_head(kind, stream), _u64(seq), _u32(len(payload)), padded))
    return hmac.digest(opening.key, message, "sha256")


def check_opening(commitment: bytes, kind: str, stream: str, seq: int, opening: Opening) -> bool:
    """Whether ``opening`` opens ``commitment`` at that place."""
    return len(opening.key) == _KEY_BYTES and hmac.compare_digest(commitment_of(kind, stream, seq, opening), commitment)


def erasure_commitment(salt: bytes, name: str, commitments: Iterable[bytes]) -> tuple[bytes, int]:
    """What an erasure commits to: HMAC-SHA256 over its name and the sorted commitments; and how many these are."""
    count, mac = 0, hmac.new(salt, b"rlhf-audit/erasure/v1\0" + name.encode() + b"\0", "sha256")
    for commitment in commitments:
        count += 1
        mac.update(commitment)
    return mac.digest(), count


def _mark(commitment: bytes) -> int:
    return int.from_bytes(commitment[:8], "big", signed=True)


def _name_of(owner: str | None, stream: str = "") -> str:
    """The name that a key is kept under: an annotator called like a run is not that run."""
    return "s:" + stream if owner is None else "a:" + owner


def _has_tables(session: Session, path: Path) -> bool:
    """Whether the vault was made completely; a file of another layout is refused."""
    layout = session.pragma("user_version")
    if layout == _LAYOUT:
        return True
    if layout == 0 and session.is_empty():
        return False
    raise VaultError(
        f"The vault {path} is of layout {layout}; this version reads {_LAYOUT}.",
        next_step="Open it with the version that wrote it.",
        code="unknown-layout",
    )


class _Wrapping:
    """What one generation of the master key does: it finds, wraps and unwraps the owners' keys."""

    def __init__(self, generation: Generation) -> None:
        self.number = generation.number
        self._cipher = AESGCM(generation.master)
        self._tag_key = hmac.digest(generation.master, b"rlhf-audit/owner-tag/v2", "sha256")

    def tag(self, name: str) -> bytes:
        return hmac.digest(self._tag_key, name.encode(), "sha256")

    def wrap(self, key: bytes, name: str, tag: bytes) -> bytes:
        # The name goes with the key, padded: the next generation needs it to find the owner.
        text = name.encode()
        plain = key + _u32(len(text)) + text
        plain += bytes(-len(plain) % _NAME_BUCKET)
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, plain, tag)

    def seal(self, erasure: Erasure) -> bytes:
        """Shows, until the trail has its entry, that an erasure was made with the key and not with the file alone."""
        said = msgspec.json.encode(asdict(replace(erasure, logged=False)))
        return hmac.digest(self._tag_key, b"rlhf-audit/erasure-seal/v1\0" + said, "sha256")

    def unwrap(self, wrapped: bytes, tag: bytes) -> tuple[bytes, str]:
        plain = self._cipher.decrypt(wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:], tag)
        start = _KEY_BYTES + 4
        return plain[:_KEY_BYTES], plain[start : start + int.from_bytes(plain[_KEY_BYTES:start], "big")].decode()


class Vault:
    """The vault of one trail. Not for two threads at once.

    Args:
        path: its file, which is made when something is first sealed.
        master: the master key, from the key ring.
    """

    def __init__(self, path: Path, master: MasterKey) -> None:
        self.path = path
        self._master = master
        self._wrapping: _Wrapping | None = None
        self._database = Database(path, secure_delete=True)
        self._ready = False

    def exists(self) -> bool:
        """Whether anything was ever sealed.

        Raises:
            StoreError: the file cannot be read.
            VaultError: it is of another layout (``unknown-layout``).
        """
        if not self.path.is_file():
            return False
        with reading(self.path) as session:
            return _has_tables(session, self.path)

    # --- the file ---

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        if not self._ready:
            self._make_file()
        with self._database.transaction() as session:
            if not self._ready:
                self._make_tables(session)
            yield session
        self._ready = True

    def _make_file(self) -> None:
        # An existing file is never opened here: closing it again would drop the locks that SQLite holds on it elsewhere
        # in this process.
        try:
            if self.path.is_symlink():
                raise OSError(errno.ELOOP, "it is a symbolic link")
            if not self.path.exists():
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return  # another process was first
        except OSError as error:
            raise VaultError(
                f"The vault {self.path} cannot be written: {error.strerror or error}.",
                next_step="Make the file and its folder writable, or name another folder with trail=.",
                code="read-only",
            ) from error

    def _make_tables(self, session: Session) -> None:
        if not _has_tables(session, self.path):
            session.create(_metadata)
            session.execute(_ADD_STATE, {"id": 1, "generation": self._master.newest.number})
            session.set_pragma("user_version", _LAYOUT)

    # --- keys ---

    def _number(self, session: Session) -> int:
        rows = session.execute(_GENERATION).fetchall()
        if len(rows) != 1 or type(rows[0][0]) is not int:
            raise VaultError(f"The vault {self.path} does not say its key's generation.", code="malformed")
        return int(rows[0][0])

    def _wrapping_now(self, session: Session) -> _Wrapping:
        """The wrapping of the generation that this transaction sees: another process may have erased somebody."""
        number = self._number(session)
        if self._wrapping is None or self._wrapping.number != number:
            generation = self._master.generation(number)
            if generation is None:
                raise self._other_generation(number)
            self._wrapping = _Wrapping(generation)
        return self._wrapping

    def _other_generation(self, number: int) -> VaultError:
        newest = self._master.newest.number
        if number < newest:
            return VaultError(
                f"The vault {self.path} is a copy from before an erasure: it is of generation {number}, its key of "
                f"{newest}, and nothing in it opens any more.",
                next_step="Put the newest copy of the vault back; one from before an erasure cannot be used again.",
                code="vault-old",
            )
        return VaultError(
            f"The vault {self.path} is of generation {number}, and the key {self._master.path} of {newest}: somebody "
            "was erased with another copy of the key.",
            next_step="Put the vault.key back that was there when that was done; an older backup of it does not help.",
            code="key-old",
        )

    def _wrong_key(self) -> VaultError:
        return VaultError(
            f"The vault {self.path} does not open with this key, or was changed.",
            next_step="Check that RLHF_AUDIT_HOME is the home folder that this trail was written with.",
            code="vault-key",
        )

    def _owner(self, session: Session, name: str) -> tuple[int, AESGCM]:
        # Read in each transaction: another process may have erased this owner, and nothing may be sealed under a dead
        # key.
        wrapping = self._wrapping_now(session)
        tag = wrapping.tag(name)
        row = session.execute(_OWNER_OF_TAG, {"of": tag}).fetchone()
        if row is not None:
            return row[0], AESGCM(self._unwrap(wrapping, row[1], tag)[0])
        key = AESGCM.generate_key(256)
        made = session.execute(_ADD_OWNER, {"tag": tag, "wrapped": wrapping.wrap(key, name, tag)})
        return int(made.lastrowid or 0), AESGCM(key)

    def _unwrap(self, wrapping: _Wrapping, wrapped: bytes, tag: bytes) -> tuple[bytes, str]:
        try:
            return wrapping.unwrap(wrapped, tag)
        except InvalidTag as error:
            raise self._wrong_key() from error

    # --- sealing and opening ---

    def seal(self, items: Sequence[Sealed]) -> None:
        """Store openings durably, in one transaction.

        Raises:
            StoreError: the vault cannot be written.
            VaultError: it is of a generation that the key is not of.
        """
        owners: dict[str, tuple[int, AESGCM]] = {}
        nonces = os.urandom(_NONCE_BYTES * len(items))
        rows = []
        with self._transaction() as session:
            for at, item in enumerate(items):
                name = _name_of(item.owner, item.stream)
                found = owners.get(name)
                if found is None:
                    found = owners[name] = self._owner(session, name)
                owner, cipher = found
                opening, commitment = item.opening, item.commitment
                place = _place_head(item.type, item.stream) + _u64(item.seq)
                plain = b"".join((opening.key, _u32(len(place)), place, opening.payload))
                nonce = nonces[_NONCE_BYTES * at : _NONCE_BYTES * at + _NONCE_BYTES]
                sealed = nonce + cipher.encrypt(nonce, plain, commitment)
                rows.append({"mark": _mark(commitment), "commitment": commitment, "owner": owner, "sealed": sealed})
            session.execute_many(_ADD_OPENING, rows)

    def opening(self, kind: str, stream: str, seq: int, commitment: bytes) -> Opening:
        """The opening of a commitment, checked against it.

        Raises:
            VaultError: ``erased``, ``opening-missing``, ``opening-wrong`` where it does not open it, or the vault's key
                is not at hand (``vault-key``, ``vault-old``, ``key-old``).
        """
        opening, place = self._read(commitment)
        if place != _place(kind, stream, seq) or not check_opening(commitment, kind, stream, seq, opening):
            raise self._wrong_opening()
        return opening

    def _wrong_opening(self) -> VaultError:
        return VaultError(f"The opening in the vault {self.path} is not the commitment's.", code="opening-wrong")

    def open_payload(self, stream: str, seq: int, commitment: bytes) -> bytes:
        """The private payload of the entry ``seq`` of ``stream``, checked against its commitment.

        Raises:
            VaultError: as `opening`.
        """
        opening, place = self._read(commitment)
        size = int.from_bytes(place[:4], "big")
        kind = place[4 : 4 + size].decode(errors="replace")
        if place != _place(kind, stream, seq) or not check_opening(commitment, kind, stream, seq, opening):
            raise self._wrong_opening()
        return opening.payload

    def _read(self, commitment: bytes) -> tuple[Opening, bytes]:
        with self._transaction() as session:
            key, sealed = self._sealed(session, commitment)
        try:
            plain = AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], commitment)
        except InvalidTag as error:
            raise self._wrong_key() from error
        start = _KEY_BYTES + 4
        stop = start + int.from_bytes(plain[_KEY_BYTES:start], "big")
        return Opening(plain[:_KEY_BYTES], plain[stop:]), plain[start:stop]

    def _sealed(self, session: Session, commitment: bytes) -> tuple[bytes, bytes]:
        """The owner's key and the sealed opening."""
        rows = session.execute(_OPENING, {"of": _mark(commitment)})
        owner, erasure, sealed = next((row[1:] for row in rows if row[0] == commitment), (None, None, None))
        if sealed is None and erasure is not None:
            raise VaultError("The content of this commitment was erased.", code="erased")
        if sealed is None:
            raise VaultError(
                f"The vault {self.path} has no opening for this commitment.",
                next_step="Restore the vault that belongs to this trail.",
                code="opening-missing",
            )
        wrapping = self._wrapping_now(session)
        found = session.execute(_OWNER_OF_ID, {"of": owner}).fetchone()
        if found is None:
            raise self._wrong_key()
        tag, wrapped = found
        return self._unwrap(wrapping, wrapped, tag)[0], sealed

    # --- erasing; what changes anything, under the key's lock (`MasterKey.exclusive`) ---

    def erase(self, owner: str | None, reason: str, *, stream: str = "") -> Erasure:
        """Take the key and the payloads of an annotator (``None``: of a stream itself) out for good.

        The erasure has no entry in the trail yet.

        Raises:
            VaultError: ``unknown-owner`` where the vault holds nothing of theirs; nothing was changed. ``vault-busy``
                where another process reads it: the erasure holds, and `settle` clears the old pages.
            StoreError: the vault cannot be written; where nothing was erased, all is as it was.
        """
        whose = _name_of(owner, stream)
        with self._transaction() as session:
            before = self._generation(session)
            self._owner_id(session, before, whose)
        after = before.next()
        self._master.keep(before, after)
        with self._transaction() as session:
            self._check_number(session, before)
            number = self._owner_id(session, before, whose)
            name, salt = before.erasure(whose)
            erasure = self._bury(session, number, Erasure(name, b"", after.number, reason, 0), salt, after)
            self._rewrap(session, before, after, {number})
        self.settle()
        return erasure

    def erase_again(self, told: Sequence[Erased]) -> None:
        """Erase whom the trail tells of as erased, in a vault (and with a key) that were put back from before that.

        Raises:
            VaultError: as `erase`, but an owner who is not in this old vault is none to erase.
            StoreError: the vault cannot be written; where nothing was erased, all is as it was.
        """
        with self._transaction() as session:
            before = self._generation(session)
        after = before.next(max(said.generation for said in told))
        self._master.keep(before, after)
        with self._transaction() as session:
            self._check_number(session, before)
            wrapping, names = _Wrapping(before), {}
            for number, tag, wrapped in session.execute(_ALL_OWNERS).fetchall():
                names[self._unwrap(wrapping, wrapped, tag)[1]] = number
            gone = set()
            for said in told:
                then = before.at(said.generation - 1)
                number = next((names[name] for name in names if then.erasure(name)[0] == said.erasure), None)
                erasure = Erasure(said.erasure, b"", said.generation, said.reason, 0, logged=True)
                self._bury(session, number, erasure, then.salt(said.erasure), after)
                gone.add(number)
            self._rewrap(session, before, after, gone)
        self.settle()

    def _check_number(self, session: Session, before: Generation) -> None:
        number = self._number(session)
        if number != before.number:
            raise self._other_generation(number)

    def count(self, owner: str | None, *, stream: str = "") -> int:
        """How many openings of an annotator (``None``: of a stream itself) there are.

        Raises:
            VaultError: ``unknown-owner`` where the vault holds nothing of theirs.
        """
        if not self.exists():
            raise self.unknown_owner()
        with self._transaction() as session:
            number = self._owner_id(session, self._generation(session), _name_of(owner, stream))
            return sum(1 for _ in session.execute(_OWNED_BY, {"of": number}))

    def settle(self) -> None:
        """Bring an erasure that was begun to its end: empty the write-ahead log, forget the old key.

        Raises:
            VaultError: ``vault-busy``, ``vault-old``, ``key-old``.
        """
        with self._transaction() as session:
            generation = self._generation(session)
        try:
            self._database.fold()
        except StoreError as error:
            if error.reason != "locked":
                raise
            raise VaultError(
                f"The vault {self.path} is being read by another process, so its old pages could not be cleared yet.",
                next_step="Wait until that is done, then open the trail once: it finishes what is left.",
                code="vault-busy",
            ) from error
        self._master.keep(generation)

    def _generation(self, session: Session) -> Generation:
        number = self._number(session)
        generation = self._master.generation(number)
        if generation is None:
            raise self._other_generation(number)
        return generation

    def _owner_id(self, session: Session, generation: Generation, name: str) -> int:
        row = session.execute(_OWNER_OF_TAG, {"of": _Wrapping(generation).tag(name)}).fetchone()
        if row is None:
            raise self.unknown_owner()
        return int(row[0])

    def unknown_owner(self) -> VaultError:
        """The refusal to erase whom the vault does not know."""
        return VaultError(
            f"The vault {self.path} holds nothing under that name.",
            next_step="Check how the id is written; nothing was changed.",
            code="unknown-owner",
        )

    def _bury(self, session: Session, owner: int | None, erasure: Erasure, salt: bytes, after: Generation) -> Erasure:
        rows = session.execute(_OWNED_BY, {"of": owner})
        commitment, count = erasure_commitment(salt, erasure.name, (row[0] for row in rows))
        erasure = replace(erasure, commitment=commitment, openings=count)
        seal = _Wrapping(after).seal(erasure)
        made = session.execute(_ADD_ERASURE, {**asdict(erasure), "salt": salt, "seal": seal})
        session.execute(_BLANK, {"of": owner})
        session.execute(_BURY, {"of": owner, "by": made.lastrowid})
        return erasure

    def _rewrap(self, session: Session, before: Generation, after: Generation, gone: set[int | None]) -> None:
        old, new, rows = _Wrapping(before), _Wrapping(after), []
        for number, tag, wrapped in session.execute(_ALL_OWNERS).fetchall():
            if number not in gone:
                key, name = self._unwrap(old, wrapped, tag)
                rows.append({"id": number, "tag": new.tag(name), "wrapped": new.wrap(key, name, new.tag(name))})
        # All at once: that frees, and so overwrites, every page that held any of them.
        session.execute(_CLEAR_OWNERS)
        session.execute_many(_PUT_OWNER, rows)
        session.execute(_SET_GENERATION, {"generation": after.number})

    def settled(self) -> bool:
        """Whether no erasure is half-way: the key file holds the vault's generation alone, the trail has every entry.

        Raises:
            VaultError: ``vault-old`` or ``key-old``.
        """
        with reading(self.path) as session:
            number = self._number(session)
            if self._master.generation(number) is None:
                raise self._other_generation(number)
            return self._master.settled and not session.execute(_UNLOGGED).fetchone()

    def generation(self) -> int:
        """The generation of the master key that the vault is of."""
        with reading(self.path) as session:
            return self._number(session)

    def erasures(self) -> tuple[Erasure, ...]:
        """Every erasure, in their order."""
        with reading(self.path) as session:
            rows = session.execute(_ERASURES).fetchall()
        return tuple(
            Erasure(name, over, number, why, count, bool(logged)) for name, over, number, why, count, logged, *_ in rows
        )

    def unlogged(self) -> tuple[Erasure, ...]:
        """The erasures that the trail has no entry of yet.

        Raises:
            VaultError: ``vault-changed`` where somebody who has not the key put one there.
        """
        with self._transaction() as session:
            wrapping, found = self._wrapping_now(session), []
            for *fields, seal in session.execute(_UNLOGGED).fetchall():
                erasure = Erasure(*fields)
                if not hmac.compare_digest(wrapping.seal(erasure), seal):
                    raise VaultError(
                        f"The vault {self.path} holds an erasure that was not made with its key: the file was changed.",
                        next_step="Put a copy of the vault back from after the last erasure.",
                        code="vault-changed",
                    )
                found.append(erasure)
        return tuple(found)

    def mark_logged(self, name: str) -> None:
        """Note that the trail has the entry of an erasure."""
        with self._transaction() as session:
            session.execute(_LOGGED, {"of": name})

    # --- life ---

    def abandon(self) -> object:
        """Forget the connection without closing it: after a fork it is the parent's. Returns what must stay alive."""
        return self._database.abandon()

    def close(self) -> None:
        """Close the connection."""
        self._database.close()


@dataclass(frozen=True)
class OpeningSummary:
    """What became of a trail's private halves.

    Attributes:
        checked: whether there is a vault to look into.
        commitments: how many the trail holds.
        openings: how many of them have their opening in the vault.
        erased: how many were erased, each by an erasure that the trail tells of.
        missing: how many have neither.
        decrypted: whether each opening was also opened, and compared with its commitment.
    """

    checked: bool
    commitments: int
    openings: int
    erased: int
    missing: int
    decrypted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass
class _Tombstones:
    """The erased rows of one erasure that entries were found for."""

    count: int
    first: int


class OpeningsCheck:
    """Whether every commitment of a trail has its opening in the vault, or was erased and the trail says so.

    It is fed the trail's entries in their order, after the state that they are read from was fixed, and needs no key
    unless it is to decrypt. Memory does not grow with the trail: the vault is walked beside it.

    Args:
        path: the vault's file; where there is none, nothing is checked and `OpeningSummary.checked` says so.
        master: decrypt every opening with this key too, and compare it with its commitment.
        most: how many reasons are kept; further faults of their kind are counted in the summary only.

    Raises:
        StoreError: the vault cannot be read.
        VaultError: it is of another layout.
    """

    def __init__(self, path: Path, master: MasterKey | None = None, *, most: int = 100) -> None:
        self.path = path
        self.reasons: list[Reason] = []
        self._most = most
        self._commitments = self._openings = self._missing = 0
        self._said: dict[str, Erased] = {}
        self._tombstones: dict[int, _Tombstones] = {}
        self._vault = Vault(path, master) if master is not None else None
        self._rows: Iterator[Any] = iter(())
        self._session: Session | None = None
        self._stack = ExitStack()
        self._checked = path.is_file()
        if self._checked:
            session = self._stack.enter_context(reading(path))
            if _has_tables(session, path):
                self._session = session
                self._rows = session.execute(_WALK, {"after": 0})

    def add(self, entry: Entry) -> None:
        """Look the next entry up; only those with a private half and ``vault.erased`` ones matter."""
        envelope = entry.envelope
        if envelope.type == VAULT_ERASED:
            self._erasure(entry)
        if envelope.sealed is None:
            return
        self._commitments += 1
        if self._checked:
            with store_errors(self.path):
                self._commitment(entry, b64decode(envelope.sealed))

    def _erasure(self, entry: Entry) -> None:
        try:
            said = decode_erased(entry.body)
        except FormatError as error:
            self._fault("body", f"entry {entry.index}", error.message)
            return
        if said.erasure in self._said:
            self._fault("body", f"entry {entry.index}", f"The erasure {said.erasure} was entered before.")
        self._said[said.erasure] = said

    def _commitment(self, entry: Entry, commitment: bytes) -> None:
        row = next(self._rows, None)
        if row is None or row[1] != commitment:
            row = self._find(commitment)
        if row is None or not (row[2] or row[3]):
            self._missing += 1
            self._fault("opening-missing", f"entry {entry.index}", "The vault has no opening for its private half.")
        elif row[2]:
            self._openings += 1
            if self._vault is not None:
                self._decrypt(entry, commitment)
        else:
            found = self._tombstones.setdefault(row[3], _Tombstones(0, entry.index))
            found.count += 1

    def _find(self, commitment: bytes) -> Any:
        """The commitment's row by the index; the walk goes on after it."""
        session = self._session
        if session is None:
            return None
        rows = session.execute(_FIND, {"of": _mark(commitment)}).fetchall()
        row = next((row for row in rows if row[1] == commitment), None)
        if row is not None:
            self._rows = session.execute(_WALK, {"after": row[0]})
        return row

    def _decrypt(self, entry: Entry, commitment: bytes) -> None:
        assert self._vault is not None
        try:
            self._vault.opening(entry.type, entry.stream, entry.seq, commitment)
        except VaultError as error:
            if error.reason not in ("opening-wrong", "vault-key"):
                raise
            self._openings -= 1
            self._missing += 1
            self._fault("opening-wrong", f"entry {entry.index}", "What the vault has for it does not open it.")

    def _fault(self, code: str, where: str, message: str) -> None:
        if len(self.reasons) < self._most:
            self.reasons.append(Reason(code, where, message))

    def finish(self) -> OpeningSummary:
        """What was found; `reasons` is complete from then on, and the vault is let go."""
        erased = 0
        if self._session is not None:
            with store_errors(self.path):
                accounted = self._accounted(self._session)
            for number, found in self._tombstones.items():
                if number in accounted:
                    erased += found.count
                else:
                    self._missing += found.count
                    self._unaccounted(found)
        self.close()
        decrypted = self._checked and self._vault is not None
        return OpeningSummary(self._checked, self._commitments, self._openings, erased, self._missing, decrypted)

    def _unaccounted(self, found: _Tombstones) -> None:
        what = f"It and {found.count - 1} more" if found.count > 1 else "It"
        message = f"{what} had an opening in the vault, which was taken out by no erasure that the trail tells of."
        self._fault("opening-missing", f"entry {found.first}", message)

    def _accounted(self, session: Session) -> set[int]:
        """The erasures in the vault that the trail has an entry of, each being what the entry commits to."""
        accounted, names = set(), set()
        for name, _, _, _, _, logged, number, salt in session.execute(_ERASURES).fetchall():
            names.add(name)
            said = self._said.get(name)
            if said is None:
                if not logged:
                    message = (
                        f"The erasure {name} was begun and the trail does not tell of it yet; open the trail once."
                    )
                    self._fault("erasure-unfinished", "vault", message)
                continue
            rows = session.execute(_ERASED_BY, {"of": number})
            over, _ = erasure_commitment(salt, name, (row[0] for row in rows))
            if said.commitment == b64encode(over).decode():
                accounted.add(number)
            else:
                message = f"The vault does not hold what the erasure {name} left behind, as the trail tells it."
                self._fault("opening-missing", "vault", message)
        self._undone(said for name, said in self._said.items() if name not in names)
        return accounted

    def _undone(self, erasures: Iterable[Erased]) -> None:
        for said in erasures:
            message = (
                f"The trail tells of the erasure {said.erasure} (generation {said.generation}) and the vault does not: "
                "it is a copy from before that erasure, or not this trail's."
            )
            self._fault("vault-old", "vault", message)

    def close(self) -> None:
        """Let the vault go."""
        if self._vault is not None:
            self._vault.close()
        self._rows, self._session = iter(()), None
        self._stack.close()
