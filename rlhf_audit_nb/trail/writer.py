"""The writer: a queue, whoever commits it in groups, and appends that must be atomic. Floor 0.

``submit`` takes the time, puts the entry into a queue and returns. Where entries are batched, one thread takes all that
is there after at most 20 ms or 500 entries, gives sequence numbers, hashes, signs one checkpoint and commits all in
one transaction; where each append waits for its own commit, the caller's thread does the same at once, and with its
entry commits what other threads have queued meanwhile. At most 1,000 entries are ever without a commit: then
``submit`` waits (it never drops). Several processes may write to one trail: each transaction takes SQLite's only write
lock first and reloads the tree where another process moved it.

Order of a commit: take the lock; seal the private payloads in the vault and commit that; insert the entries, the tree
and the signed checkpoint; commit. Where any of it fails, nothing of the group is in the trail as far as is known; the
error goes to each that waits, to the next ``submit`` and to ``close``, and this writer takes no more: whether a failed
commit reached the disk is only known by reading it again, so nothing is ever tried twice. Opening the trail anew does
read it again. An interrupt (Ctrl-C, a signal's handler that raises) in the middle of a commit is no failure: its
entries stay queued, and the next commit first looks whether they are in the trail already.

After ``fork`` the child has a writer id, a queue and connections of its own, made when it first appends.
"""

from __future__ import annotations

import base64
import os
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from rlhf_audit_nb.errors import AuditError, EntryError, FormatError, StoreError, TrailError
from rlhf_audit_nb.trail.checkpoint import Checkpoint, checkpoint_of
from rlhf_audit_nb.trail.ending import forget
from rlhf_audit_nb.trail.entry import ENVELOPE_VERSION, MAX_ENTRY, Entry, Envelope, encode_envelope, stream_name
from rlhf_audit_nb.trail.liveness import WriterLock
from rlhf_audit_nb.trail.merkle import Frontier
from rlhf_audit_nb.trail.note import NoteSigner, parse_note, sign_note, verify_note
from rlhf_audit_nb.trail.store import BUNDLE, Bundle, Head, Store, StreamState, Transaction, pack_entries
from rlhf_audit_nb.trail.vault import Opening, Sealed, Vault, commitment_of

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.heads import Heads

__all__ = [
    "RUN_FINISHED",
    "RUN_INTERRUPTED",
    "RUN_STARTED",
    "Committed",
    "Draft",
    "Pace",
    "Pending",
    "Writer",
    "append_in",
    "new_head",
    "too_large",
]

TRAIL_CREATED = "trail.created"
RUN_STARTED = "run.started"
RUN_FINISHED = "run.finished"
RUN_INTERRUPTED = "run.interrupted"

MAX_UNSYNCED = 1_000
GROUP = 500
LINGER_SECONDS = 0.020
KEEP_CHECKPOINT_US = 60_000_000
REMEMBER_HEAD_SECONDS = 2.0
ROW_BYTES = 1 << 20
KEY_BYTES = 32
BULK = 16_384
BULK_BYTES = 32 << 20


class Draft(msgspec.Struct, frozen=True):
    """An entry that is to be appended with many others (`Writer.append_many`).

    Attributes:
        type: the event's type.
        body: its public JSON object.
        run: the run that it belongs to; ``None`` for an entry of the trail itself.
        private: its private payload.
        owner: whose payload that is; ``None`` takes the run.
        resolution_us: the entry's time is floored to a multiple of this (µs), or of what an earlier entry asked for.
    """

    type: str
    body: bytes
    run: str | None = None
    private: bytes | None = None
    owner: str | None = None
    resolution_us: int = 1


@dataclass(frozen=True)
class Pace:
    """When entries are committed.

    Attributes:
        always: at once; else a group is waited for.
        waits: whether who appends waits for the commit. With ``always``, who appends also makes it.
    """

    always: bool
    waits: bool


class Pending:
    """An entry on its way into the trail."""

    __slots__ = (
        "_done",
        "_error",
        "_index",
        "_writer",
        "body",
        "owner",
        "private",
        "resolution",
        "run",
        "time",
        "type",
    )

    def __init__(
        self,
        writer: Writer | None,
        kind: str,
        body: bytes,
        run: str | None,
        private: bytes | None,
        owner: str | None,
        resolution: int,
        now: int,
    ) -> None:
        self._writer = writer
        self._index = -1
        self._done = False
        self._error: AuditError | None = None
        self.type = kind
        self.body = body
        self.run = run
        self.private = private
        self.owner = owner
        self.resolution = resolution
        self.time = now

    @property
    def index(self) -> int | None:
        """The entry's place in the trail once it is durable; ``None`` before."""
        return self._index if self._done and self._error is None else None

    @property
    def done(self) -> bool:
        """Whether its commit has succeeded or failed."""
        return self._done

    @property
    def refusal(self) -> AuditError | None:
        """Why it is not in the trail, once that is known."""
        return self._error

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the entry is durable, and return its place in the trail.

        Raises:
            StoreError: the commit failed; the entry is not in the trail as far as is known.
            EntryError: the entry is over 65,535 bytes.
            TimeoutError: it took longer than ``timeout`` seconds; the entry stays queued.
        """
        if not self._done and self._writer is not None:
            self._writer.wait_for(self, timeout)
        if self._error is not None:
            raise self._error
        return self._index

    def settle(self, index: int, error: AuditError | None = None) -> None:
        """Say how it went (for the writer)."""
        self._index, self._error, self._done = index, error, True


@dataclass(frozen=True)
class Committed:
    """The newest commit that this writer knows of."""

    head: Head
    checkpoint: Checkpoint


@dataclass
class _Tree:
    """The state that one transaction hands to the next."""

    state: Committed
    frontier: Frontier
    streams: dict[str, StreamState] = field(default_factory=dict)


@dataclass
class _Group:
    """Entries that were encoded and hashed, not yet inserted."""

    first: int
    items: list[Pending] = field(default_factory=list)
    data: list[bytes] = field(default_factory=list)
    leaves: list[bytes] = field(default_factory=list)
    sealed: list[Sealed] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)


class _InterruptedBody(msgspec.Struct):
    run: str


_interrupted = msgspec.json.Decoder(_InterruptedBody)


_Prepare = Callable[[Transaction, Head], list[Pending]]


class _Refused(BaseException):
    """Carries an exception of the caller's own body out of the transaction, past the translation of database errors."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def _shielded(prepare: _Prepare) -> _Prepare:
    def call(transaction: Transaction, head: Head) -> list[Pending]:
        try:
            return prepare(transaction, head)
        except Exception as error:
            raise _Refused(error) from error

    return call


def new_head(origin: str, signers: Sequence[NoteSigner]) -> Head:
    """The head of a trail without entries."""
    return _signed(origin, Frontier(), signers, 0, None).head


def _signed(
    origin: str,
    frontier: Frontier,
    signers: Sequence[NoteSigner],
    now: int,
    before: Head | None,
    *,
    coarse: bool = False,
) -> Committed:
    """The new head. The history keeps a checkpoint in every 256 entries, and one a minute unless times are coarse."""
    checkpoint = Checkpoint(origin, frontier.size, frontier.root())
    note = sign_note(checkpoint.format(), signers)
    kept_size, kept_time = (before.kept_size, before.kept_time) if before else (0, 0)
    late = now - kept_time >= KEEP_CHECKPOINT_US and not coarse
    if frontier.size // BUNDLE != kept_size // BUNDLE or kept_size == 0 or late:
        kept_size, kept_time = frontier.size, now
    return Committed(Head(origin, frontier.size, now, note, frontier.nodes, kept_size, kept_time), checkpoint)


def _load(transaction: Transaction, signers: Sequence[NoteSigner]) -> _Tree:
    """The state in the store, which must hang together before anything is built on it."""
    head = transaction.head()
    try:
        frontier = Frontier(head.size, head.frontier)
        checkpoint = checkpoint_of(head.note)
        verify_note(parse_note(head.note), [signer.verifier() for signer in signers])
        holds = (checkpoint.origin, checkpoint.size, checkpoint.root) == (head.origin, head.size, frontier.root())
    except (ValueError, TrailError) as error:
        if isinstance(error, FormatError) and error.reason == "unsigned":
            raise _rotated() from error
        raise _damaged(str(error)) from error
    if not holds:
        raise _damaged("the newest checkpoint is not of the newest state")
    return _Tree(Committed(head, checkpoint), frontier)


def _rotated() -> StoreError:
    return StoreError(
        "The log key was changed by another process.",
        next_step="Open the trail again; nothing was appended.",
        code="rotated",
    )


def _damaged(what: str) -> StoreError:
    return StoreError(
        f"The trail's newest state does not hang together: {what}.",
        next_step="Run `rlhf-audit verify` on it to see what holds; nothing was appended.",
        code="damaged",
    )


def _build(transaction: Transaction, tree: _Tree, items: Sequence[Pending], writer: str, *, vault: bool) -> _Group:
    """Give each entry its sequence number and time, encode it and hash it."""
    group = _Group(tree.frontier.size)
    streams, digest = tree.streams, sha256
    for item in items:
        stream = stream_name(item.run, writer)
        state = streams.get(stream)
        if state is None:
            state = streams[stream] = transaction.stream(stream)
        now = max(item.time - item.time % item.resolution, state.time)
        commitment = None
        if item.private is not None and vault:
            opening = Opening(os.urandom(KEY_BYTES), item.private)
            commitment = commitment_of(item.type, stream, state.next, opening)
        envelope = Envelope(
            v=ENVELOPE_VERSION,
            type=item.type,
            time=now,
            run=item.run,
            seq=state.next,
            writer=writer,
            body=msgspec.Raw(item.body),
            sealed=None if commitment is None else base64.b64encode(commitment).decode(),
        )
        data = encode_envelope(envelope)
        if len(data) > MAX_ENTRY:
            item.settle(-1, too_large(item.type, len(data)))
            continue
        if commitment is not None:
            group.sealed.append(Sealed(commitment, item.owner, item.type, stream, state.next, opening))
        state.next += 1
        state.time = now
        group.touched.add(stream)
        group.items.append(item)
        group.data.append(data)
        group.leaves.append(digest(b"\0" + data).digest())
    return group


def too_large(kind: str, size: int) -> EntryError:
    """The refusal of an entry that does not fit."""
    return EntryError(
        f"An entry of type {kind} has {size} bytes; at most {MAX_ENTRY} fit.",
        next_step="Put the payload into an artifact and its digest into the entry.",
        code="entry-too-large",
    )


def _rows(group: _Group) -> tuple[list[Bundle], list[tuple[str, int]]]:
    """The rows of entries (none across a multiple of 256, none much over 1 MiB) and their index terms."""
    rows, terms = [], []
    start, total = 0, len(group.data)
    while start < total:
        stop = min(total, start + BUNDLE - (group.first + start) % BUNDLE)
        if any(item.resolution > 1 for item in group.items[start:stop]):
            stop = start + 1  # what was committed together tells how fast it came, and coarse times are to hide that
        size = 0
        for at in range(start, stop):
            size += len(group.data[at])
            if size > ROW_BYTES and at > start:
                stop = at
                break
        first = group.first + start
        hashes = b"".join(group.leaves[start:stop])
        rows.append(Bundle(first, stop - start, hashes, pack_entries(group.data[start:stop])))
        found = {"t:" + item.type for item in group.items[start:stop]}
        found |= {"r:" + item.run for item in group.items[start:stop] if item.run is not None}
        terms += [(term, first) for term in sorted(found)]
        start = stop
    return rows, terms


def append_in(
    transaction: Transaction,
    tree: _Tree,
    items: Sequence[Pending],
    writer: str,
    signers: Sequence[NoteSigner],
    vault: Vault | None,
) -> _Group:
    """Append ``items`` within an open transaction; ``tree`` becomes the new state."""
    group = _build(transaction, tree, items, writer, vault=vault is not None)
    if not group.data:
        return group
    if group.sealed and vault is not None:
        vault.seal(group.sealed)
    rows, terms = _rows(group)
    transaction.add_bundles(rows)
    transaction.add_terms(terms)
    transaction.add_nodes(tree.frontier.extend(group.leaves))
    transaction.put_streams({name: tree.streams[name] for name in group.touched})
    for item in group.items:
        if item.type == RUN_STARTED and item.run is not None:
            transaction.start_run(item.run, writer)
        elif item.type == RUN_FINISHED and item.run is not None:
            transaction.end_run(item.run)
        elif item.type == RUN_INTERRUPTED:
            transaction.end_run(_interrupted.decode(item.body).run)
    before, now = tree.state.head, time.time_ns() // 1000
    resolution = max(item.resolution for item in group.items)
    now = max(now - now % resolution, before.time)
    tree.state = _signed(before.origin, tree.frontier, signers, now, before, coarse=resolution > 1)
    head = tree.state.head
    transaction.put_head(head)
    if head.kept_size == head.size:
        transaction.keep_checkpoint(head.size, head.time, head.note)
    return group


class Writer:
    """Appends to one trail from this process; safe for threads and across forks.

    Args:
        folder: the trail's folder, which holds the writers' lock files.
        store: the database, for writing.
        vault: where private payloads go.
        signers: the keys that sign checkpoints, all of them each time; `use` replaces them.
        heads: the last-seen heads, advanced as the trail grows.
        pace: when to commit, and who waits for it.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        vault: Vault,
        signers: Sequence[NoteSigner],
        heads: Heads,
        pace: Pace,
    ) -> None:
        self._folder = folder
        self._store = store
        self._vault = vault
        self._signers = tuple(signers)
        self._heads = heads
        self.pace = pace
        self._leads = pace.always and pace.waits
        self._tree: _Tree | None = None
        self._committed: Committed | None = None
        self._reset()
        _LIVE.add(self)

    def _reset(self) -> None:
        self.id = uuid.uuid4().hex
        self._commit_lock = threading.RLock()
        self._state = threading.RLock()
        self._work = threading.Condition(self._state)
        self._settled = threading.Condition(self._state)
        self._queue: deque[Pending] = deque()
        self._doubt: _Group | None = None
        self._waiting = 0
        self._closing = False
        self._closed = False
        self._failure: AuditError | None = None
        self._thread: threading.Thread | None = None
        self._lock: WriterLock | None = None
        self._inside = False
        self._remembered = (0, 0.0)
        self._resolution = 1

    @property
    def vault(self) -> Vault:
        """Where private payloads go."""
        return self._vault

    @property
    def signers(self) -> tuple[NoteSigner, ...]:
        """The keys that sign checkpoints."""
        return self._signers

    def use(self, signers: Sequence[NoteSigner]) -> None:
        """Sign the next commits with these keys; what was handed in before is committed under the old ones first.

        Raises:
            ValueError: there is none.
            StoreError: a commit failed.
        """
        if not signers:
            raise ValueError("a trail needs at least one key to sign its checkpoints")
        self.flush()
        with self._commit_lock:
            self._signers = tuple(signers)

    @property
    def committed(self) -> Committed | None:
        """The newest commit that this writer knows of."""
        return self._committed

    @property
    def unsynced(self) -> int:
        """How many entries were handed in and are not durable yet."""
        return len(self._queue)

    @property
    def failure(self) -> AuditError | None:
        """The commit that failed, after which this writer takes no more."""
        return self._failure

    def submit(self, item: Pending) -> None:
        """Queue an entry; waits only while 1,000 are not durable yet.

        Raises:
            StoreError: an earlier commit failed, or the trail is closed.
        """
        with self._state:
            if self._thread is None or self._failure is not None or self._closing or self._inside:
                self._prepare()
            while len(self._queue) >= MAX_UNSYNCED:
                self._work.notify()
                self._settled.wait()
                self._check()
            self._queue.append(item)
            queued = len(self._queue)
            if queued == 1 or queued == GROUP:  # noqa: PLR1714 (half the cost of a tuple's test, on the caller's thread)
                self._work.notify()

    def settle(self, item: Pending) -> int:
        """See a submitted item through to its commit without hurrying a group along; its place in the trail.

        Raises:
            StoreError, EntryError: as `Pending.wait`.
        """
        if self._leads:
            self._lead(item)
        else:
            with self._state:
                while not item.done:
                    self._settled.wait()
        return item.wait()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closing:
            raise StoreError("The trail is closed.", next_step="Open it again to append to it.", code="closed")

    def _prepare(self) -> None:
        self._check()
        self._refuse_nested()
        self._take_lock()
        if self._thread is None and not self._leads:
            self._thread = threading.Thread(target=self._run, name="rlhf-audit-writer", daemon=True)
            self._thread.start()

    def _refuse_nested(self) -> None:
        if self._inside and self._commit_lock.acquire(blocking=False):
            held_here = self._inside
            self._commit_lock.release()
            if held_here:
                raise EntryError(
                    "An append may not begin within another one: in a guarded append's body, or in a signal's handler.",
                    next_step="Append before it or after it.",
                    code="nested-append",
                )

    def _take_lock(self) -> None:
        if self._lock is None:
            try:
                self._lock = WriterLock(self._folder, self.id)
            except OSError as error:
                raise StoreError(
                    f"The folder {self._folder} cannot be written: {error.strerror or error}.",
                    next_step="Make it writable, or name another folder with --trail or trail=.",
                    code="read-only",
                ) from error

    def wait_for(self, item: Pending, timeout: float | None) -> None:
        """Wait until ``item`` is settled."""
        if self._leads:
            self._lead(item)
        with self._state:
            self._wait(lambda: item.done, timeout)

    def flush(self) -> None:
        """Wait until all that was handed in before is durable.

        Raises:
            StoreError: a commit failed.
        """
        with self._state:
            self._refuse_nested()
            last = self._queue[-1] if self._queue else None
        if last is not None:
            self.wait_for(last, None)
        if self._failure is not None:
            raise self._failure

    def _wait(self, ready: Callable[[], bool], timeout: float | None) -> None:
        if ready():
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        self._waiting += 1
        try:
            self._work.notify()
            while not ready():
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError("the entry is not durable yet; it stays queued")
                self._settled.wait(left)
        finally:
            self._waiting -= 1

    def create(self, head: Head, body: bytes) -> None:
        """Give a new trail its head and its first entry, in one transaction."""
        item = Pending(None, TRAIL_CREATED, body, None, None, None, 1, time.time_ns() // 1000)
        self._take_lock()
        with self._commit_lock, self._store.transaction() as transaction:
            transaction.add_head(head)
            tree = _Tree(Committed(head, checkpoint_of(head.note)), Frontier())
            append_in(transaction, tree, [item], self.id, self._signers, None)

    def guarded(self, prepare: _Prepare) -> list[Entry]:
        """Append what ``prepare`` makes, from the state that its own transaction sees; nothing where it raises.

        Waits first for what was queued before. The entries are durable when this returns.
        """
        with self._state:
            self._refuse_nested()
            self._check()
            self._take_lock()
        self.flush()
        group = self._commit_guarded(_shielded(prepare))
        _settle(group)
        return [Entry.decode(index, data) for index, data in enumerate(group.data, group.first)]

    def _commit_guarded(self, prepare: _Prepare) -> _Group:
        with self._commit_lock:
            self._check()
            self._inside = True
            try:
                return self._commit(prepare, whole=True)
            except _Refused as refused:
                raise refused.error from refused.error.__cause__
            finally:
                self._inside = False

    def append_many(self, drafts: Iterable[Draft]) -> Sequence[int]:
        """Append many entries in large groups; they are durable when this returns.

        Waits first for what was queued before. A group of which anything fails is not in the trail, nor is any after.

        Returns:
            The entries' indexes: a ``range`` where nobody else appended in between.

        Raises:
            EntryError: an entry of a group is too large.
            StoreError: a commit failed; this writer takes no more.
        """
        with self._state:
            self._refuse_nested()
            self._check()
            self._take_lock()
        self.flush()
        pieces: list[range] = []
        try:
            for group in _bulks(drafts):
                self._append_bulk(group, pieces)
        except AuditError as error:
            raise _partly(error, pieces) from error
        if len(pieces) <= 1:
            return pieces[0] if pieces else range(0)
        return [index for piece in pieces for index in piece]

    def _append_bulk(self, drafts: Sequence[Draft], pieces: list[range]) -> None:
        now = time.time_ns() // 1000
        items = [Pending(None, d.type, d.body, d.run, d.private, d.owner, d.resolution_us, now) for d in drafts]
        try:
            group = self._commit_guarded(lambda _transaction, _head: items)
        except StoreError as error:
            with self._state:
                self._failure = self._failure or error
            raise
        done = range(group.first, group.first + len(group.items))
        if pieces and pieces[-1].stop == done.start:
            pieces[-1] = range(pieces[-1].start, done.stop)
        else:
            pieces.append(done)
        self._remember_sometimes()

    def _commit(self, prepare: Callable[[Transaction, Head], Sequence[Pending]], *, whole: bool) -> _Group:
        # Forgotten first: whatever goes wrong, the next transaction reads the state from the disk.
        tree, self._tree = self._tree, None
        with self._store.transaction() as transaction:
            if tree is None or transaction.size() != tree.frontier.size:
                tree = _load(transaction, self._signers)
            if self._doubt is not None:
                self._resolve(self._doubt, transaction)
            items = prepare(transaction, tree.state.head)
            self._coarsen(items)
            group = append_in(transaction, tree, items, self.id, self._signers, self._vault)
            if whole and len(group.items) != len(items):
                raise next(item.refusal for item in items if item.refusal is not None)
            self._doubt = group
        self._tree = tree
        self._committed = tree.state
        return group

    def _coarsen(self, items: Sequence[Pending]) -> None:
        """Times never become finer again: that of what comes after a coarse entry tells how long it took."""
        for item in items:
            if item.resolution > self._resolution:
                self._resolution = item.resolution
            elif item.resolution < self._resolution:
                item.resolution = self._resolution

    def _resolve(self, group: _Group, transaction: Transaction) -> None:
        """Settle what an interrupted commit did write; what it did not is still in the queue."""
        if group.items and transaction.leaf(group.first) == group.leaves[0]:
            _settle(group)
        self._doubt = None

    def _run(self) -> None:
        while self._await_work():
            with self._commit_lock:
                self._commit_queue()

    def _lead(self, item: Pending) -> None:
        """Commit in the caller's own thread until ``item`` is settled."""
        with self._commit_lock:
            while not item.done:
                self._refuse_nested()
                self._inside = True
                try:
                    self._commit_queue()
                finally:
                    self._inside = False

    def _await_work(self) -> bool:
        """Wait for a group worth committing; ``False`` when the writer is closed and nothing is left."""
        with self._state:
            while not self._queue and not self._closing:
                self._work.wait()
            deadline = time.monotonic() + LINGER_SECONDS
            while len(self._queue) < GROUP and not self._closing and not self._waiting and not self.pace.always:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._work.wait(left)
            return bool(self._queue)

    def _commit_queue(self) -> None:
        """Commit what is queued. An item leaves the queue when it is settled, so that no interrupt can lose it."""
        with self._state:
            batch = list(islice(self._queue, MAX_UNSYNCED))
        try:
            group = self._commit(lambda _transaction, head: self._next(batch, head.size), whole=False)
        except AuditError as error:
            self._fail(error)
        except BaseException as error:
            if self._leads and not isinstance(error, Exception):
                self._store.roll_back()
                raise
            failure = StoreError(f"The commit failed: {type(error).__name__}: {error}.", code="commit")
            failure.__cause__ = error
            self._fail(failure)
        else:
            _settle(group)
            self._doubt = None
            with self._state:
                while self._queue and self._queue[0].done:
                    self._queue.popleft()
                self._settled.notify_all()
            self._remember_sometimes()

    def _next(self, batch: list[Pending], size: int) -> list[Pending]:
        """What of the batch to commit now: all of it; where times are coarse, up to the next multiple of 256.

        The history keeps the first checkpoint at or after each multiple; that it is always at one tells no time.
        """
        left = [item for item in batch if not item.done]
        coarse = self._resolution > 1 or any(item.resolution > 1 for item in left)
        return left[: BUNDLE - size % BUNDLE] if coarse else left

    def _fail(self, error: AuditError) -> None:
        with self._state:
            lost = [item for item in self._queue if not item.done]
            self._failure = _lost(error, len(lost))
            for item in lost:
                item.settle(-1, self._failure)
            self._queue.clear()
            self._doubt = None
            self._settled.notify_all()

    def _remember_sometimes(self) -> None:
        if time.monotonic() - self._remembered[1] >= REMEMBER_HEAD_SECONDS:
            try:
                self.remember()
            except AuditError as error:
                with self._state:
                    self._failure = self._failure or error

    def remember(self) -> None:
        """Make the newest commit the last-seen head."""
        committed = self._committed
        if committed is not None and committed.head.size > self._remembered[0]:
            self._heads.advance(committed.head.origin, committed.head.note)
            self._remembered = (committed.head.size, time.monotonic())

    def close(self) -> None:
        """Make everything durable and let go; raises the failure that lost entries, if one did."""
        with self._state:
            if self._closed:
                return
            self._refuse_nested()
            self._closing = True
            self._work.notify()
            last = self._queue[-1] if self._queue else None
        if self._thread is not None:
            self._thread.join()
        elif last is not None:
            self._lead(last)
        with self._commit_lock:
            self._closed = True
            _LIVE.discard(self)
            forget(self)
            try:
                if self._failure is None:
                    self.remember()
            finally:
                self._store.close()
                self._vault.close()
                if self._lock is not None:
                    self._lock.release()
        if self._failure is not None:
            raise self._failure

    def abort(self) -> None:
        """Let go of a writer whose opening failed before anything was submitted."""
        _LIVE.discard(self)
        self._closing = self._closed = True
        self._vault.close()
        if self._lock is not None:
            self._lock.release()

    # The three steps of a fork. The locks are held across it, so that no thread is inside SQLite, whose own locks
    # would stay taken in the child for ever.

    def before_fork(self) -> None:
        """Keep every thread out of SQLite."""
        self._commit_lock.acquire()
        self._state.acquire()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._state.release()
        self._commit_lock.release()

    def after_fork_in_child(self) -> None:
        """Become another writer; the parent's connections and lock are left as they are, and never closed."""
        _ABANDONED.append((self._store.abandon(), self._vault.abandon()))
        if self._lock is not None:
            self._lock.leave()
        closed, inherited = self._closed, self._queue
        self._tree = None
        self._reset()
        self._closed = self._closing = closed
        for item in inherited:
            item.settle(-1, _parents())


def _bulks(drafts: Iterable[Draft]) -> Iterator[list[Draft]]:
    """The drafts in groups that a commit and the memory can hold."""
    rest = iter(drafts)
    group: list[Draft] = []
    size = 0
    for draft in rest:
        group.append(draft)
        size += len(draft.body) + len(draft.private or b"")
        if len(group) == BULK or size >= BULK_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _partly(error: AuditError, pieces: Sequence[range]) -> AuditError:
    """The failure of a bulk, saying how far it came."""
    done = sum(map(len, pieces))
    said = f"{done:,} entries before it are in the trail." if done else "None of the entries is in the trail."
    return type(error)(f"{error.message} {said}", next_step=error.next_step, code=error.reason)


def _settle(group: _Group) -> None:
    for index, item in enumerate(group.items, group.first):
        item.settle(index)


def _parents() -> StoreError:
    return StoreError(
        "The entry was appended before the process forked; the parent process writes it.",
        next_step="Wait for it there.",
        code="forked",
    )


def _lost(error: AuditError, count: int) -> AuditError:
    step = error.next_step or "Open the trail again."
    return StoreError(
        f"{error.message} {count} entries were not written.",
        next_step=f"{step} This opening takes no more entries.",
        code=error.reason,
    )


_LIVE: weakref.WeakSet[Writer] = weakref.WeakSet()
_ABANDONED: list[object] = []
_FORKING: list[Writer] = []


def _before_fork() -> None:
    _FORKING[:] = sorted(_LIVE, key=id)
    for writer in _FORKING:
        writer.before_fork()


def _after_fork_in_parent() -> None:
    for writer in reversed(_FORKING):
        writer.after_fork_in_parent()
    _FORKING.clear()


def _after_fork_in_child() -> None:
    for writer in _FORKING:
        writer.after_fork_in_child()
    _FORKING.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
