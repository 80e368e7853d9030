"""Whether every commitment of a trail has its opening in the vault, or was erased. Floor 0."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.commitment import check_opening, place_of
from rlhf_audit_nb.trail.sqlite import Session, reading, store_errors
from rlhf_audit_nb.trail.vault_file import (
    ERASED_BY,
    FIND,
    FIND_READING,
    OWNER_OF_ID,
    VAULT_ERASED,
    WALK,
    WALK_READING,
    Erased,
    Wrapping,
    decode_erased,
    erasure_commitment,
    erasures_of,
    generation_of,
    has_tables,
    open_sealed,
    other_generation,
    stream_number,
)
from rlhf_audit_nb.trail.verdict import Reason

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.entry import Entry
    from rlhf_audit_nb.trail.vault_key import MasterKey

__all__ = ["OpeningSummary", "OpeningsCheck"]

_MOST_CIPHERS = 4096


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
        self._find_row, self._walk = (FIND, WALK) if master is None else (FIND_READING, WALK_READING)
        self._ciphers: dict[int, AESGCM | None] = {}
        self._wrapping: Wrapping | None = None
        self._decrypts = master is not None
        self._rows: Iterator[Any] = iter(())
        self._session: Session | None = None
        self._stack = ExitStack()
        self._checked = path.is_file()
        if self._checked:
            with ExitStack() as undo:
                undo.callback(self.close)
                with store_errors(path):
                    self._open(master)
                undo.pop_all()

    def _open(self, master: MasterKey | None) -> None:
        session = self._stack.enter_context(reading(self.path))
        if has_tables(session, self.path):
            self._session = session
            self._rows = session.execute(self._walk, {"after": 0})
            if master is not None:
                self._wrapping = self._wraps(session, master)

    def _wraps(self, session: Session, master: MasterKey) -> Wrapping:
        number = generation_of(session, self.path)
        generation = master.generation(number)
        if generation is None:
            raise other_generation(self.path, number, master)
        return Wrapping(generation)

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
            row = self._find(entry, commitment)
        if row is None or not (row[2] or row[3]):
            self._missing += 1
            self._fault("opening-missing", f"entry {entry.index}", "The vault has no opening for its private half.")
        elif row[2]:
            self._openings += 1
            if self._wrapping is not None and not self._opens(self._wrapping, entry, commitment, row[4], row[5]):
                self._openings -= 1
                self._missing += 1
                self._fault("opening-wrong", f"entry {entry.index}", "What the vault has for it does not open it.")
        else:
            found = self._tombstones.setdefault(row[3], _Tombstones(0, entry.index))
            found.count += 1

    def _find(self, entry: Entry, commitment: bytes) -> Any:
        """The commitment's row by the index; the walk goes on after it."""
        session = self._session
        if session is None:
            return None
        place = {"in_stream": stream_number(entry.stream), "at": entry.seq}
        rows = session.execute(self._find_row, place).fetchall()
        row = next((row for row in rows if row[1] == commitment), None)
        if row is not None:
            self._rows = session.execute(self._walk, {"after": row[0]})
        return row

    def _opens(self, wrapping: Wrapping, entry: Entry, commitment: bytes, owner: int, sealed: bytes) -> bool:
        if owner not in self._ciphers:
            if len(self._ciphers) >= _MOST_CIPHERS:
                self._ciphers.clear()
            self._ciphers[owner] = self._cipher(wrapping, owner)
        cipher = self._ciphers[owner]
        if cipher is None:
            return False
        try:
            opening, place = open_sealed(cipher, commitment, sealed)
        except InvalidTag:
            return False
        if place != place_of(entry.type, entry.stream, entry.seq):
            return False
        return check_opening(commitment, entry.type, entry.stream, entry.seq, opening)

    def _cipher(self, wrapping: Wrapping, owner: int) -> AESGCM | None:
        assert self._session is not None
        row = self._session.execute(OWNER_OF_ID, {"of": owner}).fetchone()
        try:
            return None if row is None else AESGCM(wrapping.unwrap(row[1], row[0])[0])
        except InvalidTag:
            return None

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
        decrypted = self._checked and self._decrypts
        return OpeningSummary(self._checked, self._commitments, self._openings, erased, self._missing, decrypted)

    def _unaccounted(self, found: _Tombstones) -> None:
        what = f"It and {found.count - 1} more" if found.count > 1 else "It"
        message = f"{what} had an opening in the vault, which was taken out by no erasure that the trail tells of."
        self._fault("opening-missing", f"entry {found.first}", message)

    def _accounted(self, session: Session) -> set[int]:
        """The erasures in the vault that the trail has an entry of, each being what the entry commits to."""
        accounted, names = set(), set()
        for number, salt, erasure in erasures_of(session, self.path):
            name = erasure.name
            names.add(name)
            said = self._said.get(name)
            if said is None:
                if not erasure.logged:
                    message = (
                        f"The erasure {name} was begun and the trail does not tell of it yet; open the trail once."
                    )
                    self._fault("erasure-unfinished", "vault", message)
                continue
            rows = session.execute(ERASED_BY, {"of": number})
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
        self._rows, self._session = iter(()), None
        self._stack.close()
