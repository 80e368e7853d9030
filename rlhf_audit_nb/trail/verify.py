"""Verification: read everything, hash everything again, and say how far the proof reaches. Floor 0.

`verify_trail` streams one consistent state of a store: it hashes every entry from its bytes, grows the tree from
those hashes alone, and compares with it whatever was stored beside them (leaf hashes, subtrees, frontier, every signed
checkpoint of the history, the newest one, the query index). Then it asks the last-seen heads whether this is the
history that was seen before. Every fault is a `Reason` that names its place; the `Level` follows from them (`verdict`).
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from heapq import merge
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from rlhf_audit_nb.errors import AuditError, FormatError, StoreError
from rlhf_audit_nb.trail.anchors import COSIGNATURE_ANCHOR, AnchorFolder, anchored_level, quorum_reached, read_anchors
from rlhf_audit_nb.trail.checkpoint import Checkpoint, checkpoint_of
from rlhf_audit_nb.trail.entry import Entry
from rlhf_audit_nb.trail.heads import Heads
from rlhf_audit_nb.trail.keys import home_folder, load_keys, local_policy
from rlhf_audit_nb.trail.liveness import is_alive
from rlhf_audit_nb.trail.merkle import HASH_BYTES, Frontier, leaf_hash
from rlhf_audit_nb.trail.proof import parse_proof
from rlhf_audit_nb.trail.sqlite import reading
from rlhf_audit_nb.trail.store import Bundle, Head, Store, StreamState, Transaction, unpack_entries
from rlhf_audit_nb.trail.succession import KEY_TYPES, KeySuccession, known_limits
from rlhf_audit_nb.trail.vault import VAULT_ERASED, OpeningsCheck
from rlhf_audit_nb.trail.verdict import Level, Reason, RunSummary, Verdict, level_of
from rlhf_audit_nb.trail.writer import RUN_FINISHED, RUN_INTERRUPTED, RUN_STARTED

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.policy import CheckedCheckpoint, TrustPolicy
    from rlhf_audit_nb.trail.verdict import Anchor

__all__ = [
    "CLOCK_SLACK_US",
    "MAX_REASONS",
    "EntryChecker",
    "Progress",
    "check_entries",
    "compare_with_seen",
    "conclude",
    "store_path",
    "verify_proof",
    "verify_trail",
]

MAX_REASONS = 100
TRIES = 5
ERASING_SECONDS = 2.0
POLL_SECONDS = 0.02
CLOCK_SLACK_US = 60_000_000
"""How far a clock may have been set back between an entry and its commit; further, and a time filter may miss it."""
OPEN = "open"
NEWEST = "newest checkpoint"
LAST_SEEN = "last-seen head"

Progress = Callable[[int, int], None]


class _Finished(msgspec.Struct):
    status: str


class _Interrupted(msgspec.Struct):
    run: str


_finished = msgspec.json.Decoder(_Finished)
_interrupted = msgspec.json.Decoder(_Interrupted)


@dataclass
class _Run:
    status: str
    entries: int
    first: int
    last: int
    writer: str = ""


class EntryChecker:
    """What must hold between entries, fed one by one in the order of the trail.

    It remembers one state for each stream and each run, none for an entry, and the first `MAX_REASONS` faults.

    Args:
        whole: the entries are a whole trail. Otherwise they are a choice of one (a record): streams of runs must still
            be gapless from 0, those of writers need only go forward.
    """

    def __init__(self, *, whole: bool = True) -> None:
        self._whole = whole
        self._streams: dict[str, StreamState] = {}
        self._runs: dict[str, _Run] = {}
        self._last = -1
        self.latest = 0
        self.reasons: list[Reason] = []

    @property
    def streams(self) -> dict[str, StreamState]:
        """Where every stream stands after the entries so far."""
        return self._streams

    def open_runs(self) -> dict[str, str]:
        """Runs that were started and not ended, with their writer."""
        return {run: state.writer for run, state in self._runs.items() if state.writer and state.status == OPEN}

    def _fault(self, code: str, index: int, message: str) -> None:
        if len(self.reasons) < MAX_REASONS:
            self.reasons.append(Reason(code, f"entry {index}", message))

    def add(self, entry: Entry) -> None:
        """Check the next entry."""
        envelope, index = entry.envelope, entry.index
        run, seq, when = envelope.run, envelope.seq, envelope.time
        stream = run if run is not None else "writer:" + envelope.writer
        if index <= self._last:
            self._fault("order", index, f"It stands after entry {self._last}.")
        self._last = index
        state = self._streams.get(stream)
        if state is None:
            state = self._streams[stream] = StreamState()
            if not self._whole and run is None:
                state.next = seq
        if seq != state.next and not (seq > state.next and not self._whole and run is None):
            self._fault("sequence", index, f"Stream {stream} should go on with number {state.next} and has {seq}.")
        if seq >= state.next:
            state.next = seq + 1
        if when < state.time:
            self._fault("time", index, f"Its time {when} is before {state.time}, the last of stream {stream}.")
        else:
            state.time = when
            if when > self.latest:  # noqa: PLR1730 (a third of the cost of max, for every entry)
                self.latest = when
        if run is not None:
            self._count(run, entry)
        elif envelope.type == RUN_INTERRUPTED:
            self._interrupt(entry)

    def _count(self, run: str, entry: Entry) -> None:
        index, kind = entry.index, entry.envelope.type
        state = self._runs.get(run)
        if state is None:
            state = self._runs[run] = _Run(OPEN, 0, index, index)
        state.entries += 1
        state.last = index
        if kind == RUN_STARTED:
            state.writer = entry.envelope.writer
        elif kind == RUN_FINISHED:
            try:
                state.status = _finished.decode(entry.body).status
            except msgspec.MsgspecError:
                state.status = "finished"
                self._fault("body", index, "A run's end has no status.")

    def _interrupt(self, entry: Entry) -> None:
        try:
            run = _interrupted.decode(entry.body).run
        except msgspec.MsgspecError:
            self._fault("body", entry.index, "An interruption names no run.")
            return
        state = self._runs.get(run)
        if state is not None and state.status == OPEN:
            state.status = "interrupted"
        elif state is None and self._whole:
            self._fault("body", entry.index, f"An interruption names the run {run}, which has no entries.")

    def runs(self) -> tuple[RunSummary, ...]:
        """Every run so far, in the order of their first entries."""
        return tuple(
            RunSummary(run, state.status, state.entries, state.first, state.last) for run, state in self._runs.items()
        )

    def unended(self, alive: Callable[[str], bool | None] | None = None) -> Iterator[Reason]:
        """Why runs that were started have no end (code ``run-open``); none for one whose writer lives.

        Args:
            alive: whether the writer of that id lives, ``None`` where that cannot be known; so without this function.
        """
        for run, writer in self.open_runs().items():
            lives = alive(writer) if alive is not None else None
            if not lives:
                why = (
                    "Whether it still runs cannot be known here"
                    if lives is None
                    else "The process that wrote it is gone"
                )
                state = self._runs[run]
                message = f"It was never closed. {why}; entry {state.last} is its last."
                yield Reason("run-open", f"run {run}", message)


def check_entries(entries: Iterable[Entry], *, whole: bool = True) -> tuple[tuple[Reason, ...], tuple[RunSummary, ...]]:
    """What does not hold between ``entries`` (codes ``order``, ``sequence``, ``time``, ``body``), and their runs.

    A run without an end is no fault here: its summary's status is ``open``. ``whole`` as in `EntryChecker`.
    """
    checker = EntryChecker(whole=whole)
    for entry in entries:
        checker.add(entry)
    return tuple(checker.reasons), checker.runs()


def store_path(location: Path | str) -> Path:
    """The database file of the trail in the folder ``location`` (or that file itself)."""
    path = Path(location).expanduser()
    return path if path.suffix == ".sqlite" else path / "trail.sqlite"


@dataclass
class _Sum:
    """An order-free sum over index terms: two sides that hold the same terms have the same sum."""

    count: int = 0
    total: int = 0

    def add(self, term: str, first: int) -> None:
        self.count += 1
        self.total = (self.total + hash((term, first))) & (1 << 128) - 1


@dataclass(frozen=True)
class _Expected:
    """A root that must be found at a size: of a checkpoint, of the last-seen head, or of an anchor."""

    size: int
    root: bytes
    where: str
    anchor: Anchor | None = None


@dataclass
class _Audit:
    """One verification of one state of a store. What it remembers does not grow with the number of entries."""

    transaction: Transaction
    head: Head
    policy: TrustPolicy
    keys: KeySuccession
    seen: Checkpoint | None
    claimed: Sequence[Anchor] = ()
    progress: Progress | None = None
    openings: OpeningsCheck | None = None
    reasons: list[Reason] = field(default_factory=list)
    frontier: Frontier = field(default_factory=Frontier)
    checker: EntryChecker = field(default_factory=EntryChecker)
    terms: _Sum = field(default_factory=_Sum)
    nodes: int = 0
    legible: bool = True
    seen_root: bytes | None = None
    anchors: list[Anchor] = field(default_factory=list)
    forks: list[Anchor] = field(default_factory=list)
    good: int = 0
    wrong_root: bool = False
    unsaid: int = 0
    summary: Mapping[str, Any] | None = None
    commits: Iterator[tuple[int, int]] = field(default_factory=lambda: iter(()))
    late: int | None = None
    _commit: tuple[int, int] | None = (-1, 0)
    _expected: Iterator[_Expected] = field(default_factory=lambda: iter(()))
    _next: _Expected | None = None

    def fault(self, code: str, where: str, message: str) -> None:
        if len(self.reasons) < MAX_REASONS:
            self.reasons.append(Reason(code, where, message))
        else:
            self.unsaid += 1

    def run(self) -> tuple[CheckedCheckpoint | None, Checkpoint | None]:
        checked = self._signed(self.head.note, NEWEST)
        newest = checked.checkpoint if checked else self._unsigned()
        if newest is not None and newest.size != self.head.size:
            self.fault("checkpoint", NEWEST, f"It is of size {newest.size}, the head of {self.head.size}.")
        self._expect(newest)
        for bundle in self.transaction.bundles(-(1 << 63), (1 << 63) - 1):
            self._bundle(bundle)
            self._commit_times()
            if self.progress is not None:
                self.progress(self.frontier.size, self.head.size)
        self._end(newest)
        return checked, newest

    def _signed(self, note: str, where: str) -> CheckedCheckpoint | None:
        try:
            check = self.keys.check_newest if where == NEWEST else self.keys.check
            checked = check(self.policy, note)
        except FormatError as error:
            # An older checkpoint by a key that was revoked is no evidence, and no fault of a history that goes on.
            if error.reason != "revoked-key" or where == NEWEST:
                self.fault(error.reason, where, error.message)
            return None
        if checked.checkpoint.origin != self.head.origin:
            self.fault("origin", where, f"It is of {checked.checkpoint.origin}, not of {self.head.origin}.")
            return None
        return checked

    def _unsigned(self) -> Checkpoint | None:
        try:
            return checkpoint_of(self.head.note)
        except FormatError:
            return None

    def _expect(self, newest: Checkpoint | None) -> None:
        others = [_Expected(item.size, item.root, item.where, item) for item in self.claimed]
        if newest is not None:
            others.append(_Expected(newest.size, newest.root, NEWEST))
        if self.seen is not None:
            others.append(_Expected(self.seen.size, b"", LAST_SEEN))
        others.sort(key=_size_of)
        # Merged as they are read: the history alone is one checkpoint in every 256 entries.
        self._expected = merge(self._history(), others, key=_size_of)
        self._next = next(self._expected, None)
        self._compare_roots()

    def _history(self) -> Iterator[_Expected]:
        for size, note in self.transaction.checkpoints():
            where = f"checkpoint {size}"
            checked = self._signed(note, where)
            if checked is None:
                continue
            if checked.checkpoint.size != size or size > self.head.size:
                message = f"It says size {checked.checkpoint.size}; the head has {self.head.size}."
                self.fault("checkpoint", where, message)
                continue
            yield _Expected(size, checked.checkpoint.root, where)

    def _bundle(self, bundle: Bundle) -> None:
        start, where = self.frontier.size, f"bundle {bundle.first}"
        if bundle.first != start:
            self.fault("bundle", where, f"It begins at entry {bundle.first}; entry {start} should follow.")
            self.legible = False
        hashes = bundle.hashes
        stored = [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]
        try:
            entries = unpack_entries(bundle.data, bundle.count)
        except FormatError as error:
            self._broken_bundle(bundle, stored, where, error)
            return
        digest = sha256
        leaves = [digest(b"\0" + data).digest() for data in entries]
        if leaves != stored:
            self._name_leaves(bundle, leaves, stored)
        for term in self._entries(bundle.first, entries):
            self.terms.add(term, bundle.first)
        self._grow(leaves)

    def _commit_times(self) -> None:
        """Whether entries are as old as the checkpoints above them, by which a query by time finds its beginning."""
        while self._commit is not None and self._commit[0] <= self.frontier.size:
            size, when = self._commit
            if type(when) is not int:  # SQLite lets any value stand in any column
                raise StoreError("A commit time in the store is not a number; the file is damaged.", code="malformed")
            if size == self.frontier.size and self.checker.latest > when + CLOCK_SLACK_US:
                self.late = self.late or size
            self._commit = next(self.commits, None)

    def _entries(self, first: int, entries: list[bytes]) -> set[str]:
        """Look at the entries of a row; the index terms that it should have."""
        types: set[str] = set()
        runs: set[str | None] = set()
        decode, check, openings = Entry.decode, self.checker.add, self.openings
        for index, data in enumerate(entries, first):
            try:
                entry = decode(index, data)
            except FormatError as error:
                self.fault(error.reason, f"entry {index}", error.message)
                self.legible = False
                continue
            check(entry)
            envelope = entry.envelope
            types.add(envelope.type)
            runs.add(envelope.run)
            if openings is not None and (envelope.sealed is not None or envelope.type == VAULT_ERASED):
                openings.add(entry)
        return {"t:" + kind for kind in types} | {"r:" + run for run in runs if run is not None}

    def _broken_bundle(self, bundle: Bundle, stored: list[bytes], where: str, error: FormatError) -> None:
        """Name the first entry that does not fit its lengths, and go on with the stored hashes."""
        self.legible = False
        index = bundle.first + _legible_prefix(bundle, stored)
        self.fault("bundle", where, f"From entry {index} on it cannot be read: {error.message}")
        self._grow([item for item in stored if len(item) == HASH_BYTES])

    def _name_leaves(self, bundle: Bundle, leaves: list[bytes], stored: list[bytes]) -> None:
        if len(leaves) != len(stored) or any(len(item) != HASH_BYTES for item in stored):
            message = f"It holds {len(leaves)} entries and {len(bundle.hashes)} bytes of leaf hashes."
            self.fault("leaf-hash", f"bundle {bundle.first}", message)
        for index, (leaf, kept) in enumerate(zip(leaves, stored, strict=False), bundle.first):
            if leaf != kept:
                self.fault("leaf-hash", f"entry {index}", "Its bytes do not hash to the leaf hash stored with them.")

    def _grow(self, leaves: list[bytes]) -> None:
        at = 0
        while at < len(leaves):
            stop = len(leaves)
            if self._next is not None:
                stop = min(stop, at + max(0, self._next.size - self.frontier.size))
            for level, number, node in self.frontier.extend(leaves[at:stop]):
                self.nodes += 1
                if self.transaction.node(level, number) != node:
                    span = 256**level
                    where = f"entries {number * span} to {(number + 1) * span - 1}"
                    self.fault("node", where, f"The stored subtree {level}/{number} is not what they hash to.")
            at = stop
            self._compare_roots()

    def _compare_roots(self) -> None:
        size, root = self.frontier.size, None
        while self._next is not None and self._next.size <= size:
            item, self._next = self._next, next(self._expected, None)
            if item.size == size and root is None:
                root = self.frontier.root()
            self._compare(item, root if item.size == size and root is not None else b"")

    def _compare(self, item: _Expected, root: bytes) -> None:
        if item.where == LAST_SEEN:
            self.seen_root = root
        elif item.anchor is not None:
            (self.anchors if root == item.root else self.forks).append(item.anchor)
        elif root == item.root:
            self.good = item.size
        elif not self.wrong_root:
            self.wrong_root = True
            span = f"entries {self.good} to {item.size - 1}"
            self.fault("root", item.where, f"Its root is not that of the entries; the first fault is in {span}.")

    def _end(self, newest: Checkpoint | None) -> None:
        size = self.frontier.size
        left = [self._next, *self._expected] if self._next is not None else []
        self.forks += [item.anchor for item in left if item is not None and item.anchor is not None]
        if size != self.head.size:
            message = f"The head says {self.head.size} entries and the store holds {size}."
            self.fault("size", f"entry {min(size, self.head.size)}", message)
        if newest is not None and self.head.frontier != self.frontier.nodes:
            self.fault("frontier", "head", "The stored frontier is not that of the entries.")
        if self.transaction.count_nodes() != self.nodes:
            self.fault("node", "nodes", f"The store holds {self.transaction.count_nodes()} subtrees, not {self.nodes}.")
        summary = None if self.openings is None else self.openings.finish()
        self.summary = summary.to_dict() if summary is not None and (summary.checked or summary.commitments) else None
        found = () if self.openings is None else self.openings.reasons
        for reason in (*self.keys.reasons, *self.checker.reasons, *found):
            self.fault(reason.code, reason.where, reason.message)
        for name in self.transaction.strange():
            self.fault("store", str(name), "It is no part of a trail, and could answer for what is.")
        if self.legible:
            self._derived()
        if self.unsaid:
            self.reasons.append(
                Reason("more", "the trail", f"{self.unsaid} more faults were found and are not listed.")
            )

    def _derived(self) -> None:
        stored = _Sum()
        for term, first in self.transaction.terms():
            stored.add(term, first)
        wrong = [
            name
            for name, holds in (
                ("terms", stored == self.terms),
                ("streams", self.transaction.streams() == self.checker.streams),
                ("open_runs", self.transaction.open_runs() == self.checker.open_runs()),
            )
            if not holds
        ]
        for name in wrong:
            self.fault("index", name, "The stored index is not what the entries say; a query could miss some of them.")


def _size_of(item: _Expected) -> int:
    return item.size


def _first_of(row: Bundle) -> int:
    return row.first


def _legible_prefix(bundle: Bundle, stored: list[bytes]) -> int:
    """How many entries at the front of a broken bundle still hash to what is stored with them."""
    at, count = 0, 0
    for kept in stored:
        start = at + 2
        stop = start + int.from_bytes(bundle.data[at:start], "big")
        if stop > len(bundle.data) or sha256(b"\0" + bundle.data[start:stop]).digest() != kept:
            break
        at, count = stop, count + 1
    return count


def compare_with_seen(heads: Heads, note: str | None, found: str, root_at_seen: bytes | None) -> Reason | None:
    """Whether the signed checkpoint ``found`` continues the last-seen head; where not, the evidence is kept.

    Args:
        heads: the last-seen heads.
        note: the last-seen one, which must have been read *before* the store was: another process may be appending.
        found: the newest signed checkpoint, its signature verified.
        root_at_seen: the root that the found history has at the last-seen size; ``None`` where it is shorter.
    """
    now = checkpoint_of(found)
    if note is None:
        return None
    seen = checkpoint_of(note)
    if seen.size > now.size:
        what = f"It has {now.size} entries; {seen.size} were seen before: entries were taken away, or this copy lags."
    elif root_at_seen != seen.root:
        what = f"At size {seen.size} its root is not the one seen before, so its history was rewritten."
    else:
        return None
    folder = heads.keep_evidence(now.origin, note, found)
    code = "rollback" if seen.size > now.size else "fork"
    return Reason(code, f"last-seen head {seen.size}", f"{what} Both signed heads are kept in {folder}.")


def verify_trail(
    location: Path | str,
    *,
    policy: TrustPolicy | None = None,
    home: Path | None = None,
    tsa_roots: Sequence[bytes] | None = None,
    openings: bool = False,
    progress: Progress | None = None,
) -> Verdict:
    """Verify the trail in the folder ``location``.

    Memory does not grow with the number of entries; it does, by some hundred bytes each, with that of runs, of writers
    and of anchors.

    Args:
        location: the trail's folder.
        policy: whose signatures count; ``None`` trusts the user's own key for the trail's origin.
        home: the folder of keys and last-seen heads; ``None`` takes ``RLHF_AUDIT_HOME`` or the user's own.
        tsa_roots: certificates (PEM) of the timestamping authorities that are trusted; ``None`` takes ``HOME/tsa``.
        openings: decrypt every private half with the user's own keys too, and compare it with its commitment.
        progress: called now and then with how many entries were checked, and how many there are.

    Raises:
        StoreError: there is no trail there, or it cannot be read.
        KeyFileError: no policy was given and the user has no key for this origin, or none to open the vault with.
        VaultError: the vault is of another layout, or (with ``openings``) does not open with the user's key.
    """
    store = Store(store_path(location), write=False)
    home = home_folder(home)
    if not store.exists():
        raise StoreError(
            f"There is no trail at {store.path}.",
            next_step="Name the folder that holds trail.sqlite, with --trail or trail=.",
            code="no-trail",
        )
    job = _Job(store, home, policy, tsa_roots, openings, progress)
    try:
        return job.verdict()
    except StoreError as error:
        if error.reason not in ("malformed", "missing-node"):
            raise
        return Verdict(Level.INVALID, job.origin, 0, "", reasons=(Reason("store", str(store.path), error.message),))


@dataclass
class _Job:
    """What one call of `verify_trail` was asked for."""

    store: Store
    home: Path
    policy: TrustPolicy | None
    tsa_roots: Sequence[bytes] | None
    openings: bool
    progress: Progress | None
    origin: str = ""

    def verdict(self) -> Verdict:
        """The verdict; looked at again where an erasure came between the trail's state and the vault's."""
        for _ in range(TRIES - 1):
            verdict = self._once()
            codes = {reason.code for reason in verdict.reasons}
            # An erasure that is under way ends with an entry, which is awaited; one that was stopped has none coming.
            patience = ERASING_SECONDS if "erasure-unfinished" in codes else 0.0
            if "opening-missing" not in codes or not self._goes_on(verdict.size, patience):
                return verdict
        return self._once()

    def _goes_on(self, size: int, patience: float) -> bool:
        """Whether the trail has other than ``size`` entries, or gets them within ``patience`` seconds."""
        deadline = time.monotonic() + patience
        while True:
            with self.store.reading() as transaction:
                if transaction.size() != size:
                    return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)

    def _once(self) -> Verdict:
        # What lies beside the store is read before it: another process may be appending, and whatever was seen or
        # anchored before must be in what is read afterwards.
        with self.store.reading() as transaction:
            self.origin = transaction.head().origin
            keys = self._keys(transaction)
        policy = self.policy or local_policy(self.home, self.origin)
        heads = Heads(self.home)
        seen = heads.note(self.origin)
        claimed, said = self._anchors(policy, keys)
        master = load_keys(self.home, self.origin, None).master if self.openings else None
        before = None if seen is None else checkpoint_of(seen)
        vault = self.store.path.parent / "vault.sqlite"
        with self.store.reading() as transaction:
            head = transaction.head()
            # At once after the trail's state: what is erased between the two has no entry in it yet.
            with closing(OpeningsCheck(vault, master, most=MAX_REASONS)) as check, reading(self.store.path) as session:
                keys = self._keys(transaction)
                audit = _Audit(transaction, head, policy, keys, before, claimed, self.progress, check)
                # Of a later state perhaps; the rows of this one stay as they are.
                audit.commits = session.raw.execute("SELECT size, time FROM checkpoints ORDER BY size")
                checked, newest = audit.run()
        reasons = audit.reasons
        if checked is not None and not reasons:
            reasons += self._forks(audit, heads)
        level = conclude(checked, reasons, policy, heads, seen, head.note, audit.seen_root, audit.anchors)
        reasons += chain(said[:MAX_REASONS], self._unended(audit.checker), _late(audit))
        size = newest.size if newest else audit.frontier.size
        root = base64.b64encode(newest.root if newest else audit.frontier.root()).decode()
        signers = checked.signers if checked else ()
        runs, anchors = audit.checker.runs(), tuple(audit.anchors)
        return Verdict(level, head.origin, size, root, signers, runs, tuple(reasons), anchors, audit.summary)

    def _keys(self, transaction: Transaction) -> KeySuccession:
        """The keys over time, from the rows that the type index names; the index itself is checked at the end."""
        keys = KeySuccession(self.origin, known_limits(self.home, self.origin))
        rows = [transaction.bundles(-(1 << 63), (1 << 63) - 1, ["t:" + kind]) for kind in KEY_TYPES]
        last = None
        for row in merge(*rows, key=_first_of):
            if row.first != last:
                last = row.first
                for entry in _legible_entries(row):
                    keys.add(entry)
        return keys

    def _anchors(self, policy: TrustPolicy, keys: KeySuccession) -> tuple[Sequence[Anchor], Sequence[Reason]]:
        folder = AnchorFolder(self.store.path.parent)
        names = folder.names()
        trusted = [key for key in policy.logs if key.name == self.origin]
        return read_anchors(
            folder.read,
            names,
            policy,
            self.origin,
            self._roots() if any(name.endswith(".tsr") for name in names) else (),
            logs=lambda size: keys.log_verifiers(trusted, size),
        )

    def _roots(self) -> Sequence[bytes]:
        # Imported where there is a timestamp to look at: certificates cost a fifth of all that a short command loads.
        from rlhf_audit_nb.trail.timestamp import trusted_authorities

        return trusted_authorities(self.home) if self.tsa_roots is None else self.tsa_roots

    def _forks(self, audit: _Audit, heads: Heads) -> Iterator[Reason]:
        """The anchors that this history does not continue; the signed heads that contradict each other are kept."""
        folder, size = AnchorFolder(self.store.path.parent), audit.frontier.size
        for anchor in audit.forks[:MAX_REASONS]:
            plain = anchor.kind != COSIGNATURE_ANCHOR
            note = folder.read(f"{anchor.size}.checkpoint" if plain else Path(anchor.where).name)
            kept = heads.keep_evidence(self.origin, (note or b"").decode(), audit.head.note)
            if anchor.size > size:
                code, what = (
                    "rollback",
                    f"It covers {anchor.size} entries; there are {size}, so entries were taken away.",
                )
            else:
                code, what = "anchor-fork", f"At size {anchor.size} its root is another one, so history was rewritten."
            message = f"{anchor.by} has vouched for another history. {what} Both signed heads are kept in {kept}."
            yield Reason(code, anchor.where, message)

    def _unended(self, checker: EntryChecker) -> Iterator[Reason]:
        """Runs without an end; those that ended while this was looking, or whose writer lives, are none."""
        found = list(islice(checker.unended(partial(_lives, self.store.path.parent)), MAX_REASONS))
        if found:
            with self.store.reading() as transaction:
                still = {f"run {run}" for run in transaction.open_runs()}
            yield from (reason for reason in found if reason.where in still)


def _late(audit: _Audit) -> Iterator[Reason]:
    if audit.late is not None:
        message = "Entries below it are later than its commit time says; a query by time could miss them."
        yield Reason("commit-time", f"checkpoint {audit.late}", message)


def _lives(folder: Path, writer: str) -> bool | None:
    try:
        return is_alive(folder, writer)
    except OSError:
        return None


def _legible_entries(row: Bundle) -> Iterator[Entry]:
    try:
        entries = unpack_entries(row.data, row.count)
    except FormatError:
        return
    for index, data in enumerate(entries, row.first):
        with suppress(FormatError):
            yield Entry.decode(index, data)


def conclude(
    checked: CheckedCheckpoint | None,
    reasons: list[Reason],
    policy: TrustPolicy,
    heads: Heads,
    seen: str | None,
    note: str,
    root_at_seen: bytes | None,
    anchors: Sequence[Anchor] = (),
) -> Level:
    """The level of a history whose faults are ``reasons``; to these is added what its anchors say.

    Args:
        checked: the newest checkpoint as the policy sees it, ``None`` where its signature does not count.
        reasons: the faults found in the history; a quorum that is not reached and a divergence are appended.
        policy: whose signatures count.
        heads: the last-seen heads, which go forward to ``note`` where all holds.
        seen: the last-seen head, read before the history was.
        note: the newest checkpoint as it was found.
        root_at_seen: as in `compare_with_seen`.
        anchors: what others have said of this history; the caller has compared their roots with its own.
    """
    forced = level_of(reasons)
    if checked is None or forced is Level.INVALID:
        return Level.INVALID
    head = checked.checkpoint
    reached = Level.COSIGNED if checked.cosigned else anchored_level(policy, anchors, head.size, head.root)
    diverged = compare_with_seen(heads, seen, note, root_at_seen)
    if diverged is not None:
        reasons.append(diverged)
    if policy.quorum != "none" and reached is not Level.COSIGNED:
        reasons.append(Reason("quorum", NEWEST, _quorum_words(policy, anchors, head.size)))
    if diverged is not None or forced is not None:
        return Level.DIVERGED
    if reached is Level.COSIGNED and policy.split_view_unsafe:
        said = (
            f"Two sets of witnesses without a common member can each reach its quorum {policy.quorum}: two histories "
        )
        reasons.append(
            Reason("split-view", "trust policy", said + "could both be cosigned, and no witness would know.")
        )
    reasons += _remember(heads, head.origin, note)
    return reached


def _quorum_words(policy: TrustPolicy, anchors: Sequence[Anchor], size: int) -> str:
    said = f"The policy's quorum {policy.quorum} has not cosigned it."
    earlier = {(item.size, item.root) for item in anchors if item.size < size}
    reached = max((at for at, root in earlier if quorum_reached(policy, anchors, at, root)), default=0)
    if not reached:
        return said
    return f"{said} It did so up to entry {reached - 1}; what came after rests on the log's key alone."


def _remember(heads: Heads, origin: str, note: str) -> Iterator[Reason]:
    try:
        heads.advance(origin, note)
    except AuditError as error:
        yield Reason("last-seen", str(heads.path(origin)), f"{error.message} A later rollback could go unseen.")


def verify_proof(
    data: bytes | str, entry: bytes, *, policy: TrustPolicy | None = None, home: Path | None = None
) -> Verdict:
    """Verify that the bytes ``entry`` stand in a log, with a proof file (C2SP tlog-proof) and nothing else.

    The verdict speaks of the proof's checkpoint; it says nothing about the other entries.

    Args:
        data: the proof file.
        entry: the entry's bytes, as they are hashed.
        policy: whose signatures count; ``None`` trusts the user's own key for the checkpoint's origin.
        home: as in `verify_trail`.

    Raises:
        FormatError: ``data`` is not a proof file.
        KeyFileError: no policy was given and the user has no key for this origin.
    """
    proof = parse_proof(data)
    head, home = proof.head(), home_folder(home)
    trusted = policy or local_policy(home, head.origin)
    heads = Heads(home)
    reasons: list[Reason] = []
    checked = None
    try:
        checked = KeySuccession(head.origin, known_limits(home, head.origin)).check(trusted, proof.checkpoint)
    except FormatError as error:
        reasons.append(Reason(error.reason, "checkpoint of the proof", error.message))
    if not proof.check(leaf_hash(entry)):
        message = f"These {len(entry)} bytes are not the entry {proof.index} under the proof's checkpoint."
        reasons.append(Reason("inclusion", f"entry {proof.index}", message))
    seen = heads.note(head.origin)
    level = Level.INVALID
    if checked is not None and not reasons:
        # A larger or smaller head that was seen can only be compared where the whole history is at hand.
        same = seen if seen is not None and checkpoint_of(seen).size == head.size else None
        diverged = compare_with_seen(heads, same, proof.checkpoint, head.root)
        reasons += [] if diverged is None else [diverged]
        level = Level.COSIGNED if checked.cosigned else Level.UNANCHORED
        if trusted.quorum != "none" and not checked.cosigned:
            reasons.append(Reason("quorum", "checkpoint of the proof", _quorum_words(trusted, (), head.size)))
        level = level if diverged is None else Level.DIVERGED
    signers = checked.signers if checked else ()
    return Verdict(level, head.origin, head.size, head.root_base64, signers, reasons=tuple(reasons))
