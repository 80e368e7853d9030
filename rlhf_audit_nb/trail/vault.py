"""The vault: private payloads outside the trail, and the commitments that stand in their place. Floor 0.

The trail holds a commitment to each private payload (`commitment`). The payload and the key that shows it, the
*opening*, lie here, encrypted with the key of their *owner*: an annotator, or the stream (the run) where no annotator
is concerned (`vault_file`).

The vault commits before the trail does: a commitment in the trail always has its opening; the reverse (an opening
that no entry names, after a crash between the two) is harmless. `openings` checks that.

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
from base64 import b64decode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from rlhf_audit_nb.errors import StoreError, VaultError
from rlhf_audit_nb.trail.commitment import Opening, check_opening, commitment_of, place_of
from rlhf_audit_nb.trail.openings import OpeningsCheck, OpeningSummary
from rlhf_audit_nb.trail.sqlite import Database, Session, reading
from rlhf_audit_nb.trail.vault_file import (
    ADD_ERASURE,
    ADD_OPENING,
    ADD_OWNER,
    ADD_STATE,
    ALL_OWNERS,
    BLANK,
    BURY,
    CLEAR_OWNERS,
    LAYOUT,
    LOGGED,
    METADATA,
    NONCE_BYTES,
    OPENING,
    OWNED_BY,
    OWNER_OF_ID,
    OWNER_OF_TAG,
    PUT_OWNER,
    SET_GENERATION,
    UNLOGGED,
    VAULT_ERASED,
    Erased,
    Erasure,
    Wrapping,
    decode_erased,
    erasure_commitment,
    erasures_of,
    generation_of,
    has_tables,
    name_of,
    open_sealed,
    other_generation,
    seal_opening,
    stream_number,
)

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.entry import Entry
    from rlhf_audit_nb.trail.vault_key import Generation, MasterKey

__all__ = [
    "VAULT_ERASED",
    "Erased",
    "Erasure",
    "Half",
    "HalfState",
    "Opening",
    "OpeningSummary",
    "OpeningsCheck",
    "Sealed",
    "Vault",
    "check_opening",
    "commitment_of",
    "decode_erased",
]


class Sealed(msgspec.Struct, frozen=True):
    """An opening on its way into the vault, with where it belongs and whose it is (``None``: the stream's)."""

    commitment: bytes
    owner: str | None
    type: str
    stream: str
    seq: int
    opening: Opening


HalfState = Literal["open", "erased", "missing"]

_GONE: dict[str, HalfState] = {"erased": "erased", "opening-missing": "missing"}


@dataclass(frozen=True, slots=True)
class Half:
    """The private half of an entry: its opening where the vault still has it, else what became of it.

    ``missing`` are also the halves of entries that never had one, and all where there is no vault.
    """

    state: HalfState
    opening: Opening | None = None

    @property
    def payload(self) -> bytes | None:
        """The bytes that the commitment covers, where they can be had."""
        return None if self.opening is None else self.opening.payload


class Vault:
    """The vault of one trail. Not for two threads at once.

    Args:
        path: its file, which is made when something is first sealed.
        master: the master key, from the key ring.
    """

    def __init__(self, path: Path, master: MasterKey) -> None:
        self.path = path
        self._master = master
        self._wrapping: Wrapping | None = None
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
            return has_tables(session, self.path)

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
                next_step="Make the file and its folder writable, or name another folder with --trail or trail=.",
                code="read-only",
            ) from error

    def _make_tables(self, session: Session) -> None:
        if not has_tables(session, self.path):
            session.create(METADATA)
            session.execute(ADD_STATE, {"id": 1, "generation": self._master.newest.number})
            session.set_pragma("user_version", LAYOUT)

    # --- keys ---

    def _wrapping_now(self, session: Session) -> Wrapping:
        """The wrapping of the generation that this transaction sees: another process may have erased somebody."""
        number = generation_of(session, self.path)
        if self._wrapping is None or self._wrapping.number != number:
            generation = self._master.generation(number)
            if generation is None:
                raise other_generation(self.path, number, self._master)
            self._wrapping = Wrapping(generation)
        return self._wrapping

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
        row = session.execute(OWNER_OF_TAG, {"of": tag}).fetchone()
        if row is not None:
            return row[0], AESGCM(self._unwrap(wrapping, row[1], tag)[0])
        key = AESGCM.generate_key(256)
        made = session.execute(ADD_OWNER, {"tag": tag, "wrapped": wrapping.wrap(key, name, tag)})
        return int(made.lastrowid or 0), AESGCM(key)

    def _unwrap(self, wrapping: Wrapping, wrapped: bytes, tag: bytes) -> tuple[bytes, str]:
        try:
            return wrapping.unwrap(wrapped, tag)
        except InvalidTag as error:
            raise self._wrong_key() from error

    def check_key(self) -> None:
        """Look whether the key opens this file, on one owner's key; changes nothing.

        Raises:
            StoreError: the file cannot be read.
            VaultError: ``vault-key``, ``vault-old`` or ``key-old`` where it does not.
        """
        with reading(self.path) as session:
            row = session.execute(ALL_OWNERS).fetchone()
            wrapping = self._wrapping_now(session)
            if row is not None:
                self._unwrap(wrapping, row[2], row[1])

    # --- sealing and opening ---

    def seal(self, items: Sequence[Sealed]) -> None:
        """Store openings durably, in one transaction.

        Raises:
            StoreError: the vault cannot be written.
            VaultError: it is of a generation that the key is not of.
        """
        owners: dict[str, tuple[int, AESGCM]] = {}
        nonces = os.urandom(NONCE_BYTES * len(items))
        rows = []
        with self._transaction() as session:
            for at, item in enumerate(items):
                name = name_of(item.owner, item.stream)
                found = owners.get(name)
                if found is None:
                    found = owners[name] = self._owner(session, name)
                owner, cipher = found
                commitment, place = item.commitment, place_of(item.type, item.stream, item.seq)
                nonce = nonces[NONCE_BYTES * at : NONCE_BYTES * at + NONCE_BYTES]
                sealed = seal_opening(cipher, nonce, commitment, place, item.opening)
                rows.append(
                    {
                        "stream": stream_number(item.stream),
                        "seq": item.seq,
                        "commitment": commitment,
                        "owner": owner,
                        "sealed": sealed,
                    }
                )
            session.execute_many(ADD_OPENING, rows)

    def opening(self, kind: str, stream: str, seq: int, commitment: bytes) -> Opening:
        """The opening of a commitment, checked against it.

        Raises:
            VaultError: ``erased``, ``opening-missing``, ``opening-wrong`` where it does not open it, or the vault's key
                is not at hand (``vault-key``, ``vault-old``, ``key-old``).
        """
        opening, place = self._read(stream, seq, commitment)
        if place != place_of(kind, stream, seq) or not check_opening(commitment, kind, stream, seq, opening):
            raise self._wrong_opening()
        return opening

    def _wrong_opening(self) -> VaultError:
        return VaultError(f"The opening in the vault {self.path} is not the commitment's.", code="opening-wrong")

    def half(self, entry: Entry) -> Half:
        """The private half of an entry, checked against its commitment, or what became of it.

        Raises:
            StoreError: the vault cannot be read.
            VaultError: as `opening`, but for what was erased or is missing.
        """
        if entry.envelope.sealed is None or not self.path.is_file():  # looking into a vault that is gone would make one
            return Half("missing")
        try:
            opening = self.opening(entry.type, entry.stream, entry.seq, b64decode(entry.envelope.sealed))
        except VaultError as error:
            if error.reason not in _GONE:
                raise
            return Half(_GONE[error.reason])
        return Half("open", opening)

    def _read(self, stream: str, seq: int, commitment: bytes) -> tuple[Opening, bytes]:
        with self._transaction() as session:
            rows = session.execute(OPENING, {"in_stream": stream_number(stream), "at": seq})
            row = next((row[1:] for row in rows if row[0] == commitment), (None, None, None))
            key, sealed = self._sealed(session, *row)
        try:
            return open_sealed(AESGCM(key), commitment, sealed)
        except InvalidTag as error:
            raise self._wrong_key() from error

    def _sealed(
        self, session: Session, owner: int | None, erasure: int | None, sealed: bytes | None
    ) -> tuple[bytes, bytes]:
        """The owner's key and the sealed opening."""
        if sealed is None and erasure is not None:
            raise VaultError("The content of this commitment was erased.", code="erased")
        if sealed is None:
            raise VaultError(
                f"The vault {self.path} has no opening for this commitment.",
                next_step="Restore the vault that belongs to this trail.",
                code="opening-missing",
            )
        wrapping = self._wrapping_now(session)
        found = session.execute(OWNER_OF_ID, {"of": owner}).fetchone()
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
        whose = name_of(owner, stream)
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
            wrapping, names = Wrapping(before), {}
            for number, tag, wrapped in session.execute(ALL_OWNERS).fetchall():
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
        number = generation_of(session, self.path)
        if number != before.number:
            raise other_generation(self.path, number, self._master)

    def count(self, owner: str | None, *, stream: str = "") -> int:
        """How many openings of an annotator (``None``: of a stream itself) there are.

        Raises:
            VaultError: ``unknown-owner`` where the vault holds nothing of theirs.
        """
        if not self.exists():
            raise self.unknown_owner()
        with self._transaction() as session:
            number = self._owner_id(session, self._generation(session), name_of(owner, stream))
            return sum(1 for _ in session.execute(OWNED_BY, {"of": number}))

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
        number = generation_of(session, self.path)
        generation = self._master.generation(number)
        if generation is None:
            raise other_generation(self.path, number, self._master)
        return generation

    def _owner_id(self, session: Session, generation: Generation, name: str) -> int:
        row = session.execute(OWNER_OF_TAG, {"of": Wrapping(generation).tag(name)}).fetchone()
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
        rows = session.execute(OWNED_BY, {"of": owner})
        commitment, count = erasure_commitment(salt, erasure.name, (row[0] for row in rows))
        erasure = replace(erasure, commitment=commitment, openings=count)
        seal = Wrapping(after).seal(erasure)
        made = session.execute(ADD_ERASURE, {**asdict(erasure), "salt": salt, "seal": seal})
        session.execute(BLANK, {"of": owner})
        session.execute(BURY, {"of": owner, "by": made.lastrowid})
        return erasure

    def _rewrap(self, session: Session, before: Generation, after: Generation, gone: set[int | None]) -> None:
        old, new, rows = Wrapping(before), Wrapping(after), []
        for number, tag, wrapped in session.execute(ALL_OWNERS).fetchall():
            if number not in gone:
                key, name = self._unwrap(old, wrapped, tag)
                rows.append({"id": number, "tag": new.tag(name), "wrapped": new.wrap(key, name, new.tag(name))})
        # All at once: that frees, and so overwrites, every page that held any of them.
        session.execute(CLEAR_OWNERS)
        session.execute_many(PUT_OWNER, rows)
        session.execute(SET_GENERATION, {"generation": after.number})

    def settled(self) -> bool:
        """Whether no erasure is half-way: the key file holds the vault's generation alone, the trail has every entry.

        Raises:
            VaultError: ``vault-old`` or ``key-old``.
        """
        with reading(self.path) as session:
            number = generation_of(session, self.path)
            if self._master.generation(number) is None:
                raise other_generation(self.path, number, self._master)
            return self._master.settled and not session.execute(UNLOGGED).fetchone()

    def generation(self) -> int:
        """The generation of the master key that the vault is of."""
        with reading(self.path) as session:
            return generation_of(session, self.path)

    def erasures(self) -> tuple[Erasure, ...]:
        """Every erasure, in their order."""
        with reading(self.path) as session:
            return tuple(erasure for _, _, erasure in erasures_of(session, self.path))

    def unlogged(self) -> tuple[Erasure, ...]:
        """The erasures that the trail has no entry of yet.

        Raises:
            VaultError: ``vault-changed`` where somebody who has not the key put one there.
        """
        with self._transaction() as session:
            wrapping, found = self._wrapping_now(session), []
            for *fields, seal in session.execute(UNLOGGED).fetchall():
                erasure = Erasure(*fields)
                if type(seal) is not bytes or not hmac.compare_digest(wrapping.seal(erasure), seal):
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
            session.execute(LOGGED, {"of": name})

    # --- life ---

    def abandon(self) -> object:
        """Forget the connection without closing it: after a fork it is the parent's. Returns what must stay alive."""
        return self._database.abandon()

    def close(self) -> None:
        """Close the connection."""
        self._database.close()
