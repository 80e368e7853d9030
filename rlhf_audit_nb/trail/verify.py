"""Verification: read everything, hash everything again, and say how far the proof reaches. Floor 0.

`verify_trail` streams one consistent state of a store: it hashes every entry from its bytes, grows the tree from
those hashes alone, and compares with it whatever was stored beside them (leaf hashes, subtrees, frontier, every signed
checkpoint of the history, the newest one, the query index). Then it asks the last-seen heads whether this is the
history that was seen before. Every fault is a `Reason` that names its place; the `Level` follows from them (`verdict`).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from rlhf_audit_nb.errors import AuditError, FormatError, StoreError
from rlhf_audit_nb.trail.checkpoint import Checkpoint, checkpoint_of
from rlhf_audit_nb.trail.entry import Entry
from rlhf_audit_nb.trail.heads import Heads
from rlhf_audit_nb.trail.keys import home_folder, local_policy
from rlhf_audit_nb.trail.merkle import HASH_BYTES, Frontier
from rlhf_audit_nb.trail.note import format_vkey
from rlhf_audit_nb.trail.store import Bundle, Head, Store, StreamState, Transaction, unpack_entries
from rlhf_audit_nb.trail.verdict import Level, Reason, RunSummary, Verdict, level_of
from rlhf_audit_nb.trail.writer import RUN_FINISHED, RUN_INTERRUPTED, RUN_STARTED

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.policy import CheckedCheckpoint, TrustPolicy
    from rlhf_audit_nb.trail.verdict import Anchor

__all__ = [
    "EntryChecker",
    "check_entries",
    "compare_with_seen",
    "conclude",
    "store_path",
    "verify_trail",
]

MAX_REASONS = 100
OPEN = "open"


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

    Args:
        whole: the entries are a whole trail. Otherwise they are a choice of one (a record): streams of runs must still
            be gapless from 0, those of writers need only go forward.
    """

    def __init__(self, *, whole: bool = True) -> None:
        self._whole = whole
        self._streams: dict[str, StreamState] = {}
        self._runs: dict[str, _Run] = {}
        self._last = -1
        self.reasons: list[Reason] = []

    @property
    def streams(self) -> dict[str, StreamState]:
        """Where every stream stands after the entries so far."""
        return self._streams

    def open_runs(self) -> dict[str, str]:
        """Runs that were started and not ended, with their writer."""
        return {run: state.writer for run, state in self._runs.items() if state.writer and state.status == OPEN}

    def add(self, entry: Entry) -> None:
        """Check the next entry."""
        envelope = entry.envelope
        run, where = envelope.run, f"entry {entry.index}"
        stream = run if run is not None else "writer:" + envelope.writer
        if entry.index <= self._last:
            self.reasons.append(Reason("order", where, f"It stands after entry {self._last}."))
        self._last = entry.index
        state = self._streams.get(stream)
        if state is None:
            state = self._streams[stream] = StreamState()
            if not self._whole and run is None:
                state.next = envelope.seq
        self._check_sequence(stream, state, envelope.seq, where, loose=not self._whole and run is None)
        if envelope.time < state.time:
            message = f"Its time {envelope.time} is before {state.time}, the last of stream {stream}."
            self.reasons.append(Reason("time", where, message))
        state.time = max(state.time, envelope.time)
        if run is not None:
            self._count(run, entry)
        elif envelope.type == RUN_INTERRUPTED:
            self._interrupt(entry, where)

    def _check_sequence(self, stream: str, state: StreamState, seq: int, where: str, *, loose: bool) -> None:
        if seq != state.next and not (loose and seq > state.next):
            message = f"Stream {stream} should go on with number {state.next} and has {seq}."
            self.reasons.append(Reason("sequence", where, message))
        state.next = max(state.next, seq + 1)

    def _count(self, run: str, entry: Entry) -> None:
        state = self._runs.get(run)
        if state is None:
            state = self._runs[run] = _Run(OPEN, 0, entry.index, entry.index)
        state.entries += 1
        state.last = entry.index
        if entry.type == RUN_STARTED:
            state.writer = entry.envelope.writer
        elif entry.type == RUN_FINISHED:
            try:
                state.status = _finished.decode(entry.body).status
            except msgspec.MsgspecError:
                state.status = "finished"
                self.reasons.append(Reason("body", f"entry {entry.index}", "A run's end has no status."))

    def _interrupt(self, entry: Entry, where: str) -> None:
        try:
            run = _interrupted.decode(entry.body).run
        except msgspec.MsgspecError:
            self.reasons.append(Reason("body", where, "An interruption names no run."))
            return
        state = self._runs.get(run)
        if state is not None and state.status == OPEN:
            state.status = "interrupted"
        elif state is None and self._whole:
            self.reasons.append(Reason("body", where, f"An interruption names the run {run}, which has no entries."))

    def runs(self) -> tuple[RunSummary, ...]:
        """Every run so far, in the order of their first entries."""
        return tuple(
            RunSummary(run, state.status, state.entries, state.first, state.last) for run, state in self._runs.items()
        )


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


@dataclass
class _Expected:
    """A root that must be found at a size: of a checkpoint in the history, the newest, or the last-seen one."""

    size: int
    root: bytes
    where: str


@dataclass
class _Audit:
    """One verification of one store."""

    transaction: Transaction
    head: Head
    policy: TrustPolicy
    seen: Checkpoint | None
    reasons: list[Reason] = field(default_factory=list)
    frontier: Frontier = field(default_factory=Frontier)
    checker: EntryChecker = field(default_factory=EntryChecker)
    terms: _Sum = field(default_factory=_Sum)
    nodes: int = 0
    legible: bool = True
    seen_root: bytes | None = None
    expected: list[_Expected] = field(default_factory=list)
    good: int = 0
    wrong_root: bool = False

    def fault(self, code: str, where: str, message: str) -> None:
        if len(self.reasons) < MAX_REASONS:
            self.reasons.append(Reason(code, where, message))

    def run(self) -> tuple[CheckedCheckpoint | None, Checkpoint | None]:
        checked = self._signed(self.head.note, "newest checkpoint")
        newest = checked.checkpoint if checked else self._unsigned()
        if newest is not None and newest.size != self.head.size:
            self.fault("checkpoint", "newest checkpoint", f"It is of size {newest.size}, the head of {self.head.size}.")
        self._expect(newest)
        for bundle in self.transaction.bundles(-(1 << 63), (1 << 63) - 1):
            self._bundle(bundle)
        self._end(newest)
        return checked, newest

    def _signed(self, note: str, where: str) -> CheckedCheckpoint | None:
        try:
            return self.policy.check(note, self.head.origin)
        except FormatError as error:
            self.fault(error.reason, where, error.message)
            return None

    def _unsigned(self) -> Checkpoint | None:
        try:
            return checkpoint_of(self.head.note)
        except FormatError:
            return None

    def _expect(self, newest: Checkpoint | None) -> None:
        for size, note in self.transaction.checkpoints():
            where = f"checkpoint {size}"
            checked = self._signed(note, where)
            if checked is None:
                continue
            if checked.checkpoint.size != size or size > self.head.size:
                self.fault(
                    "checkpoint", where, f"It says size {checked.checkpoint.size}; the head has {self.head.size}."
                )
                continue
            self.expected.append(_Expected(size, checked.checkpoint.root, where))
        if newest is not None:
            self.expected.append(_Expected(newest.size, newest.root, "newest checkpoint"))
        if self.seen is not None:
            self.expected.append(_Expected(self.seen.size, b"", "last-seen head"))
        self.expected.sort(key=lambda item: item.size, reverse=True)
        self._compare_roots()

    def _bundle(self, bundle: Bundle) -> None:
        start, where = self.frontier.size, f"bundle {bundle.first}"
        if bundle.first != start:
            self.fault("bundle", where, f"It begins at entry {bundle.first}; entry {start} should follow.")
            self.legible = False
        stored = [bundle.hashes[at : at + HASH_BYTES] for at in range(0, len(bundle.hashes), HASH_BYTES)]
        try:
            entries = unpack_entries(bundle.data, bundle.count)
        except FormatError as error:
            self._broken_bundle(bundle, stored, where, error)
            return
        leaves = [sha256(b"\0" + data).digest() for data in entries]
        if leaves != stored:
            self._name_leaves(bundle, leaves, stored)
        found: set[str] = set()
        for index, data in enumerate(entries, bundle.first):
            try:
                entry = Entry.decode(index, data)
            except FormatError as error:
                self.fault(error.reason, f"entry {index}", error.message)
                self.legible = False
                continue
            self.checker.add(entry)
            found.add("t:" + entry.envelope.type)
            if entry.envelope.run is not None:
                found.add("r:" + entry.envelope.run)
        for term in found:
            self.terms.add(term, bundle.first)
        self._grow(leaves)

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
            if self.expected:
                stop = min(stop, at + max(0, self.expected[-1].size - self.frontier.size))
            for level, number, node in self.frontier.extend(leaves[at:stop]):
                self.nodes += 1
                if self.transaction.node(level, number) != node:
                    span = 256**level
                    where = f"entries {number * span} to {(number + 1) * span - 1}"
                    self.fault("node", where, f"The stored subtree {level}/{number} is not what they hash to.")
            at = stop
            self._compare_roots()

    def _compare_roots(self) -> None:
        while self.expected and self.expected[-1].size <= self.frontier.size:
            item = self.expected.pop()
            root = self.frontier.root() if item.size == self.frontier.size else b""
            if item.where == "last-seen head":
                self.seen_root = root
            elif root == item.root:
                self.good = item.size
            elif not self.wrong_root:
                self.wrong_root = True
                span = f"entries {self.good} to {item.size - 1}"
                message = f"Its root is not that of the entries; the first fault is in {span}."
                self.fault("root", item.where, message)

    def _end(self, newest: Checkpoint | None) -> None:
        size = self.frontier.size
        if size != self.head.size:
            message = f"The head says {self.head.size} entries and the store holds {size}."
            self.fault("size", f"entry {min(size, self.head.size)}", message)
        if newest is not None and self.head.frontier != self.frontier.nodes:
            self.fault("frontier", "head", "The stored frontier is not that of the entries.")
        if self.transaction.count_nodes() != self.nodes:
            self.fault("node", "nodes", f"The store holds {self.transaction.count_nodes()} subtrees, not {self.nodes}.")
        for reason in self.checker.reasons:
            self.fault(reason.code, reason.where, reason.message)
        if self.legible:
            self._derived()

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
        what = f"It has {now.size} entries; {seen.size} were seen before, so entries were taken away."
    elif root_at_seen != seen.root:
        what = f"At size {seen.size} its root is not the one seen before, so its history was rewritten."
    else:
        return None
    folder = heads.keep_evidence(now.origin, note, found)
    code = "rollback" if seen.size > now.size else "fork"
    return Reason(code, f"last-seen head {seen.size}", f"{what} Both signed heads are kept in {folder}.")


def verify_trail(location: Path | str, *, policy: TrustPolicy | None = None, home: Path | None = None) -> Verdict:
    """Verify the trail in the folder ``location``.

    Args:
        location: the trail's folder.
        policy: whose signatures count; ``None`` trusts the user's own key for the trail's origin.
        home: the folder of keys and last-seen heads; ``None`` takes ``RLHF_AUDIT_HOME`` or the user's own.

    Raises:
        StoreError: there is no trail there, or it cannot be read.
        KeyFileError: no policy was given and the user has no key for this origin.
    """
    store = Store(store_path(location), write=False)
    home = home_folder(home)
    if not store.exists():
        raise StoreError(
            f"There is no trail at {store.path}.",
            next_step="Name the folder that holds trail.sqlite, with --trail or trail=.",
            code="no-trail",
        )
    origin = ""
    try:
        with store.reading() as transaction:
            origin = transaction.head().origin
        trusted = policy or local_policy(home, origin)
        heads = Heads(home)
        seen = heads.note(origin)
        with store.reading() as transaction:
            return _verify(transaction, trusted, heads, seen)
    except StoreError as error:
        if error.reason not in ("malformed", "missing-node"):
            raise
        return Verdict(Level.INVALID, origin, 0, "", reasons=(Reason("store", str(store.path), error.message),))


def _verify(transaction: Transaction, policy: TrustPolicy, heads: Heads, seen: str | None) -> Verdict:
    head = transaction.head()
    audit = _Audit(transaction, head, policy, None if seen is None else checkpoint_of(seen))
    checked, newest = audit.run()
    reasons = audit.reasons
    level = conclude(checked, reasons, policy, heads, seen, head.note, audit.seen_root)
    size = newest.size if newest else audit.frontier.size
    root = base64.b64encode(newest.root if newest else audit.frontier.root()).decode()
    signers = checked.signers if checked else ()
    return Verdict(level, head.origin, size, root, signers, audit.checker.runs(), tuple(reasons))


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
    fresh = [anchor for anchor in anchors if (anchor.size, anchor.root) == (head.size, head.root)]
    cosigned = checked.cosigned or _quorum_holds(policy, {a.by for a in fresh if a.kind == "cosignature"})
    if policy.quorum != "none" and not cosigned:
        reasons.append(Reason("quorum", "newest checkpoint", _quorum_words(policy, anchors, head.size)))
    diverged = compare_with_seen(heads, seen, note, root_at_seen)
    if diverged is not None:
        reasons.append(diverged)
    if diverged is not None or forced is not None:
        return Level.DIVERGED
    reasons += _remember(heads, head.origin, note)
    if cosigned:
        return Level.COSIGNED
    return Level.TIMESTAMPED if any(anchor.kind == "timestamp" for anchor in fresh) else Level.UNANCHORED


def _quorum_holds(policy: TrustPolicy, vkeys: set[str]) -> bool:
    """Whether the witnesses with these verifier keys make the policy's quorum."""

    def holds(name: str) -> bool:
        group = policy.groups.get(name)
        return name in held if group is None else sum(map(holds, group.members)) >= group.threshold

    held = {name for name, key in policy.witnesses.items() if format_vkey(key) in vkeys}
    return policy.quorum != "none" and holds(policy.quorum)


def _quorum_words(policy: TrustPolicy, anchors: Sequence[Anchor], size: int) -> str:
    said = f"The policy's quorum {policy.quorum} has not cosigned it."
    by_size: dict[int, set[str]] = {}
    for anchor in anchors:
        if anchor.kind == "cosignature":
            by_size.setdefault(anchor.size, set()).add(anchor.by)
    reached = [at for at, vkeys in by_size.items() if at < size and _quorum_holds(policy, vkeys)]
    if not reached:
        return said
    return (
        f"{said} It did so up to entry {max(reached) - 1}; the {size - max(reached)} after that rest on the key alone."
    )


def _remember(heads: Heads, origin: str, note: str) -> Iterator[Reason]:
    try:
        heads.advance(origin, note)
    except AuditError as error:
        yield Reason("last-seen", str(heads.path(origin)), f"{error.message} A later rollback could go unseen.")
