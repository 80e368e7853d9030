"""The trail: what users of this room hold. Opening and recovery, appending, reading. Floor 0.

A trail is a folder: ``trail.sqlite`` (entries, tree, signed checkpoints), ``vault.sqlite`` (private payloads,
encrypted), ``artifacts/`` (payloads too large for an entry), ``writers/`` (lock files of those who write). Its keys
and the memory of its last-seen head lie elsewhere, in the user's home folder (`keys`, `heads`).
"""

from __future__ import annotations

import base64
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from rlhf_audit_nb.config import DEFAULT_TRAIL, ENV_TRAIL, Durability
from rlhf_audit_nb.errors import AuditError, FormatError, StoreError
from rlhf_audit_nb.trail.checkpoint import checkpoint_of
from rlhf_audit_nb.trail.durable import locked, sync_folder
from rlhf_audit_nb.trail.ending import watch
from rlhf_audit_nb.trail.entry import MAX_ENTRY, Entry, check_body, check_run, check_type
from rlhf_audit_nb.trail.erasure import finish_erasures
from rlhf_audit_nb.trail.heads import Heads
from rlhf_audit_nb.trail.keys import KeyRing, create_keys, have_keys, home_folder, load_keys
from rlhf_audit_nb.trail.liveness import is_alive, living_writers, sweep
from rlhf_audit_nb.trail.merkle import prove_consistency, prove_inclusion, tree_root
from rlhf_audit_nb.trail.note import NoteSigner, format_vkey
from rlhf_audit_nb.trail.store import Bundle, Head, Store, Transaction, store_errors, unpack_entries
from rlhf_audit_nb.trail.succession import names_key
from rlhf_audit_nb.trail.vault import Vault
from rlhf_audit_nb.trail.verify import compare_with_seen, store_path
from rlhf_audit_nb.trail.writer import RUN_INTERRUPTED, Draft, Pace, Pending, Writer, new_head, too_large

__all__ = ["Draft", "InterruptedRun", "Recovery", "Trail", "TrailReader", "TrailStatus"]

_READ_ROWS = 16
# The longest that an envelope can be around its body: names of at most 64, 128 and 128 characters, two numbers of
# 19 digits, a commitment. Bodies nearer to the limit than this are measured exactly, by the writer.
_ENVELOPE_ROOM = 512


@dataclass(frozen=True)
class TrailStatus:
    """The newest state that this process knows of.

    ``root`` is 32 bytes, ``note`` the signed checkpoint, ``unsynced`` the entries handed in and not durable yet,
    ``signer`` the verifier key of whoever signed.
    """

    size: int
    root: bytes
    note: str
    last_commit_time_us: int
    unsynced: int
    signer: str


@dataclass(frozen=True)
class InterruptedRun:
    """A run whose process was gone: its last durable sequence number."""

    run: str
    last_sequence: int


@dataclass(frozen=True)
class Recovery:
    """What opening found: the runs that it had to mark as interrupted, and how many entries were durable."""

    interrupted: tuple[InterruptedRun, ...]
    size: int


class TrailReader:
    """One state of a trail, read-only: the entries below `size`, and proofs about them.

    What is appended later is not seen. Safe for several threads.
    """

    def __init__(self, reading: Callable[[], AbstractContextManager[Transaction]], head: Head) -> None:
        self._reading = reading
        self._head = head

    @classmethod
    def open(cls, location: Path | str) -> TrailReader:
        """The newest state of the trail in the folder ``location``; needs no keys and verifies no signature.

        Raises:
            StoreError: there is no trail, or it cannot be read.
        """
        store = Store(store_path(location), write=False)
        if not store.exists():
            raise _no_trail(store.path)
        return cls.of(store)

    @classmethod
    def of(cls, store: Store) -> TrailReader:
        """The newest state of an opened store."""
        with store.reading() as transaction:
            head = transaction.head()
        return cls(store.reading, head)

    @classmethod
    def within(cls, transaction: Transaction, head: Head, path: Path) -> TrailReader:
        """The state that an open transaction on the store ``path`` sees; good only while it is open."""

        @contextmanager
        def reading() -> Iterator[Transaction]:
            with store_errors(path):
                yield transaction

        return cls(reading, head)

    @property
    def origin(self) -> str:
        """The trail's name."""
        return self._head.origin

    @property
    def size(self) -> int:
        """How many entries there are."""
        return self._head.size

    def checkpoint(self) -> str:
        """The signed checkpoint over exactly these entries (a note)."""
        return self._head.note

    def entries(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        type: str | None = None,  # noqa: A002
        run: str | None = None,
    ) -> Iterator[Entry]:
        """The entries of ``[start, stop)`` in order; with ``type`` or ``run`` only those.

        Raises:
            FormatError: an entry is malformed; its index stands in the message.
            StoreError: the store cannot be read.
        """
        stop = self.size if stop is None else min(stop, self.size)
        terms = [prefix + value for prefix, value in (("t:", type), ("r:", run)) if value is not None]
        for bundle in self._bundles(max(0, start), stop, terms):
            for index, data in enumerate(unpack_entries(bundle.data, bundle.count), bundle.first):
                if start <= index < stop:
                    entry = _decode(index, data)
                    if (type is None or entry.type == type) and (run is None or entry.run == run):
                        yield entry

    def _bundles(self, start: int, stop: int, terms: list[str]) -> Iterator[Bundle]:
        # In portions, each read at once: a reader that is slow must not hold an old state of the database.
        if start >= stop:
            return
        with self._reading() as transaction:
            at = transaction.bundle_start(start)
        while True:
            with self._reading() as transaction:
                rows = list(transaction.bundles(at, stop, terms, _READ_ROWS))
            yield from rows
            if len(rows) < _READ_ROWS:
                return
            at = rows[-1].first + 1

    def inclusion_proof(self, index: int, size: int | None = None) -> list[bytes]:
        """The inclusion proof of entry ``index`` in the tree of ``size`` (default: all) entries."""
        size = self.size if size is None else size
        self._check_within(size)
        if not 0 <= index < size:
            raise StoreError(f"There is no entry {index} in a trail of {size}.", code="range")
        with self._reading() as transaction:
            return prove_inclusion(index, size, transaction.hashes)

    def consistency_proof(self, first: int, second: int | None = None) -> list[bytes]:
        """The proof that the tree of ``first`` entries is a prefix of that of ``second`` (default: all)."""
        second = self.size if second is None else second
        self._check_within(second)
        if not 0 <= first <= second:
            raise StoreError(f"A trail of {first} entries is not a prefix of one of {second}.", code="range")
        with self._reading() as transaction:
            return prove_consistency(first, second, transaction.hashes)

    def tile(self, level: int, number: int) -> bytes:
        """The hashes of one tile (C2SP tlog-tiles), as many as there are, at most 256 of 32 bytes."""
        with self._reading() as transaction:
            return b"".join(transaction.hashes.tile(level, number))

    def root(self, size: int | None = None) -> bytes:
        """The root over the first ``size`` (default: all) entries, from the stored hashes."""
        size = self.size if size is None else size
        self._check_within(size)
        with self._reading() as transaction:
            return tree_root(size, transaction.hashes)

    def _check_within(self, size: int) -> None:
        if not 0 <= size <= self.size:
            raise StoreError(f"The trail has {self.size} entries, not {size}.", code="range")


def _decode(index: int, data: bytes) -> Entry:
    try:
        return Entry.decode(index, data)
    except FormatError as error:
        raise FormatError(f"Entry {index}: {error.message}", next_step=error.next_step, code=error.reason) from error


def _no_trail(path: Path) -> StoreError:
    return StoreError(
        f"There is no trail at {path}.",
        next_step="Name the folder that holds trail.sqlite, with --trail, trail= or RLHF_AUDIT_TRAIL.",
        code="no-trail",
    )


def _tool() -> str:
    try:
        return "rlhf-audit-trail/" + version("rlhf-audit-trail")
    except PackageNotFoundError:
        return "rlhf-audit-trail/0"


class Trail:
    """An opened trail, to append to. Made by `Trail.open`; use it as a context manager, or call `close`."""

    def __init__(
        self, location: Path, home: Path, store: Store, writer: Writer, keys: KeyRing, recovery: Recovery
    ) -> None:
        self._location = location
        self._home = home
        self._store = store
        self._writer = writer
        self._keys = keys
        self._vkey = keys.log_vkey
        self._recovery = recovery
        self._waits = writer.pace.waits
        watch(writer)

    @classmethod
    def open(
        cls,
        location: Path | str | None = None,
        *,
        origin: str | None = None,
        durability: Durability = "batched",
        asynchronous: bool | None = None,
        passphrase: str | None = None,
        create: bool = True,
        home: Path | None = None,
    ) -> Trail:
        """Open the trail in the folder ``location``, or make it; mark the runs of dead processes as interrupted.

        Args:
            location: the folder; ``None`` takes ``RLHF_AUDIT_TRAIL``, else ``audit``.
            origin: the trail's name; ``None`` keeps the trail's own, or makes a random local one.
            durability: ``"always"``: each entry is committed at once; ``"batched"``: within 50 ms or 1,000 entries.
            asynchronous: whether `append` returns before the commit; ``None``: only where entries are batched.
            passphrase: of the keys; ``None`` takes ``RLHF_AUDIT_PASSPHRASE``, else new keys are not encrypted.
            create: make the trail where there is none.
            home: the folder of keys and last-seen heads; ``None`` takes ``RLHF_AUDIT_HOME`` or the user's own.

        Raises:
            StoreError: the folder cannot be read or written, is no trail, or its history is not the one seen before.
            KeyFileError: the trail's keys are not here, or the passphrase is wrong.
        """
        folder = _folder(location)
        home = home_folder(home)
        always = durability == "always"
        pace = Pace(always, waits=always if asynchronous is None else not asynchronous)
        store = Store(folder / "trail.sqlite", write=True)
        if not store.exists() and not create:
            raise _no_trail(store.path)
        try:
            with _opening(folder):
                return _settled(cls._open(folder, store, home, origin, passphrase, pace))
        except OSError as error:
            raise StoreError(
                f"The trail's folder {folder} cannot be used: {error.strerror or error}.",
                next_step="Make it writable, free some space, or name another folder with --trail or trail=.",
                code="read-only",
            ) from error

    @classmethod
    def _open(
        cls, folder: Path, store: Store, home: Path, origin: str | None, passphrase: str | None, pace: Pace
    ) -> Trail:
        heads = Heads(home)
        with ExitStack() as undo:
            undo.callback(store.close)
            store.create_tables()
            with store.transaction() as transaction:
                head = transaction.head() if transaction.has_head() else None
            if head is None:
                keys = _new_keys(home, heads, origin, passphrase)
            else:
                _check_origin(head, origin, store.path)
                keys = load_keys(home, head.origin, passphrase, named=partial(_names_key, store.path))
                _check_seen(store, head.origin, heads)
            vault = Vault(folder / "vault.sqlite", keys.master)
            writer = Writer(folder, store, vault, [keys.signer], heads, pace)
            undo.callback(writer.abort)
            if head is None:
                writer.create(new_head(keys.origin, [keys.signer]), _created_body(keys))
            recovery = _recover(folder, writer)
            undo.pop_all()
        return cls(folder, home, store, writer, keys, recovery)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def origin(self) -> str:
        """The trail's name."""
        return self._keys.origin

    @property
    def location(self) -> Path:
        """The trail's folder, absolute."""
        return self._location

    @property
    def artifacts(self) -> Path:
        """The folder of payloads that are too large for an entry."""
        return self._location / "artifacts"

    @property
    def log_vkey(self) -> str:
        """The verifier key of the key that signs checkpoints."""
        return self._vkey

    @property
    def home(self) -> Path:
        """The folder of keys and last-seen heads."""
        return self._home

    @property
    def signers(self) -> tuple[NoteSigner, ...]:
        """What signs the checkpoints of the next commits."""
        return self._writer.signers

    def use_signers(self, signers: Sequence[NoteSigner]) -> None:
        """Sign the next commits with these keys; what was appended before is committed under the old ones first.

        `log_vkey` is that of the first from then on. Other processes that write to this trail meanwhile are refused
        at their next commit (`StoreError`, code ``rotated``): change keys within `exclusive`.

        Raises:
            ValueError: there is none.
            StoreError: a commit failed.
        """
        self._writer.use(signers)
        self._vkey = format_vkey(self._writer.signers[0].verifier())

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """While it lasts nobody else opens this trail; refused while anybody else has it open to append.

        No trail of this folder may be opened within it by this process either: that would wait for ever.

        Raises:
            StoreError: ``in-use`` where another writer lives.
        """
        with _opening(self._location):
            others = [writer for writer in living_writers(self._location) if writer != self._writer.id]
            if others:
                raise StoreError(
                    f"The trail {self._location} is open in {len(others)} other place{'s' * (len(others) > 1)}.",
                    next_step="Close it there (end the run, or shut the notebook's kernel down), then try again.",
                    code="in-use",
                )
            yield

    @property
    def keys(self) -> KeyRing:
        """The private keys that act for this trail."""
        return self._keys

    @property
    def vault(self) -> Vault:
        """Where the private payloads are: the writer's own, which may be sealing on another thread at any moment."""
        return self._writer.vault

    @contextmanager
    def reading_vault(self) -> Iterator[Vault]:
        """The vault, opened anew for who reads or erases beside the writer."""
        with closing(Vault(self.vault.path, self.keys.master)) as vault:
            yield vault

    @property
    def writer(self) -> str:
        """This process's id as a writer; another one after a fork."""
        return self._writer.id

    @property
    def recovery(self) -> Recovery:
        """What opening found."""
        return self._recovery

    def append(
        self,
        type: str,  # noqa: A002
        body: bytes,
        *,
        run: str | None = None,
        private: bytes | None = None,
        owner: str | None = None,
        resolution_us: int = 1,
    ) -> Pending:
        """Queue an entry; it is durable within the window, or before this returns where the trail is not asynchronous.

        Args:
            type: the event's type.
            body: its public JSON object.
            run: the run that it belongs to; ``None`` for an entry of the trail itself.
            private: its private payload: a commitment goes into the entry, the payload into the vault.
            owner: whose payload that is (an annotator); ``None`` takes the run.
            resolution_us: the entry's time is floored to a multiple of this (µs), and so are those of all entries
                that this opening appends afterwards.

        Returns:
            A handle whose ``wait()`` gives the entry's index once it is durable.

        Raises:
            EntryError: the type, run or body cannot stand in an entry, or it is over 65,535 bytes.
            StoreError: an earlier commit failed (its entries are not in the trail), or the trail is closed.
        """
        check_type(type)
        if run is not None:
            check_run(run)
        check_body(body)
        size = len(body)
        if size > MAX_ENTRY:
            raise too_large(type, size)
        item = Pending(self._writer, type, body, run, private, owner, resolution_us, time.time_ns() // 1000)
        self._writer.submit(item)
        if self._waits:
            self._writer.settle(item)
        elif size > MAX_ENTRY - _ENVELOPE_ROOM:
            item.wait()
        return item

    def append_many(self, drafts: Iterable[Draft]) -> Sequence[int]:
        """Append many entries at the speed of the disk: large groups, each one commit; durable when this returns.

        Args:
            drafts: what to append, in order; an iterable is read as it is needed.

        Returns:
            The entries' indexes: a ``range`` where nobody else appended in between.

        Raises:
            EntryError: one of them cannot stand in an entry. Nothing of its group of at most 16,384 is in the trail;
                the groups before it are, and the message says how many entries that is.
            StoreError: a commit failed, likewise; or the trail is closed.
        """
        return self._writer.append_many(map(_checked, drafts))

    def append_guarded(
        self,
        type: str,  # noqa: A002
        body_fn: Callable[[TrailReader], bytes],
        *,
        run: str | None = None,
        private: bytes | None = None,
        owner: str | None = None,
        resolution_us: int = 1,
    ) -> Entry:
        """Append an entry whose body depends on the trail, with nobody able to append in between.

        ``body_fn`` gets a reader of the state within the append's own transaction and returns the body; where it
        raises, nothing is appended. It must not append. The entry is durable when this returns.
        """
        check_type(type)
        if run is not None:
            check_run(run)

        def prepare(transaction: Transaction, head: Head) -> list[Pending]:
            body = check_body(body_fn(TrailReader.within(transaction, head, self._store.path)))
            if len(body) > MAX_ENTRY:
                raise too_large(type, len(body))
            return [Pending(None, type, body, run, private, owner, resolution_us, time.time_ns() // 1000)]

        return self._writer.guarded(prepare)[0]

    def flush(self) -> None:
        """Wait until all that was appended is durable; raises the `StoreError` of a failed commit."""
        self._writer.flush()

    def reader(self) -> TrailReader:
        """The state with all that was appended so far (it is flushed first)."""
        self.flush()
        return TrailReader.of(Store(self._store.path, write=False))

    def status(self) -> TrailStatus:
        """The newest state that this process knows of; costs no read."""
        writer = self._writer
        committed = writer.committed
        if committed is None:
            raise StoreError("The trail has no state yet.", code="closed")
        head, root = committed.head, committed.checkpoint.root
        return TrailStatus(head.size, root, head.note, head.time, writer.unsynced, self._vkey)

    @property
    def failure(self) -> AuditError | None:
        """The commit that failed, after which nothing more can be appended here; ``None`` while all is well."""
        return self._writer.failure

    def close(self) -> None:
        """Make everything durable and let go. Raises the `StoreError` of a failed commit."""
        self._writer.close()


def _checked(draft: Draft) -> Draft:
    check_type(draft.type)
    if draft.run is not None:
        check_run(draft.run)
    check_body(draft.body)
    if len(draft.body) > MAX_ENTRY:
        raise too_large(draft.type, len(draft.body))
    return draft


def _folder(location: Path | str | None) -> Path:
    chosen = location or os.environ.get(ENV_TRAIL) or DEFAULT_TRAIL
    if isinstance(chosen, str) and "://" in chosen:
        raise StoreError(
            f"The trail {chosen!r} is a database URL, which this version does not serve.",
            next_step="Name a folder.",
            code="unsupported",
        )
    return Path(chosen).expanduser().absolute()


@contextmanager
def _opening(folder: Path) -> Iterator[None]:
    """One opening at a time: two processes must not both make the trail, or both mark a run."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    (folder / "artifacts").mkdir(parents=True, exist_ok=True)
    (folder / "writers").mkdir(exist_ok=True)
    for part in reversed(missing):  # else what is durable in a new folder could go with the folder's name
        sync_folder(part.parent)
    with locked(folder / "writers" / ".opening", 0o644):
        yield


def _new_keys(home: Path, heads: Heads, origin: str | None, passphrase: str | None) -> KeyRing:
    if origin is None:
        return create_keys(home, "rlhf-audit.local/" + secrets.token_hex(8), passphrase)
    seen = heads.head(origin)
    if seen is not None:
        raise StoreError(
            f"A trail {origin} with {seen.size} entries was seen before; a new one would contradict it.",
            next_step="Name its folder, or choose another origin for the new trail.",
            code="diverged",
        )
    return load_keys(home, origin, passphrase) if have_keys(home, origin) else create_keys(home, origin, passphrase)


def _names_key(path: Path, key: str) -> bool:
    return names_key(TrailReader.of(Store(path, write=False)), key)


def _check_origin(head: Head, origin: str | None, path: Path) -> None:
    if origin is not None and origin != head.origin:
        raise StoreError(
            f"The trail {path} is {head.origin}, not {origin}.",
            next_step="Leave the origin out, or name another folder for a new trail.",
            code="origin",
        )


def _check_seen(store: Store, origin: str, heads: Heads) -> None:
    """Refuse to build on a history that is not the one seen before: it would make the fork final."""
    note = heads.note(origin)
    if note is None:
        return
    seen = checkpoint_of(note)
    with store.transaction() as transaction:
        head = transaction.head()
        root = tree_root(seen.size, transaction.hashes) if seen.size <= head.size else None
    reason = compare_with_seen(heads, note, head.note, root)
    if reason is not None:
        raise StoreError(
            f"The trail {store.path} has diverged. {reason.message}",
            next_step="Restore the newer copy of the trail; `rlhf-audit verify` tells more.",
            code="diverged",
        )


class _Created(msgspec.Struct):
    origin: str
    log_key: str
    record_key: str
    model_key: str
    tool: str


def _created_body(keys: KeyRing) -> bytes:
    record, model = (base64.b64encode(spki).decode() for spki in (keys.record_spki, keys.model_spki))
    return msgspec.json.encode(_Created(keys.origin, keys.log_vkey, record, model, _tool()))


class _Interruption(msgspec.Struct):
    run: str
    last_sequence: int


def _recover(folder: Path, writer: Writer) -> Recovery:
    """Append ``run.interrupted`` for each run that is open and whose writer is gone."""
    found: list[InterruptedRun] = []
    size = 0

    def prepare(transaction: Transaction, head: Head) -> list[Pending]:
        nonlocal size
        size = head.size
        for run, owner in sorted(transaction.open_runs().items()):
            if not is_alive(folder, owner):
                found.append(InterruptedRun(run, transaction.stream(run).next - 1))
        now = time.time_ns() // 1000
        bodies = [msgspec.json.encode(_Interruption(item.run, item.last_sequence)) for item in found]
        return [Pending(None, RUN_INTERRUPTED, body, None, None, None, 1, now) for body in bodies]

    writer.guarded(prepare)
    writer.remember()
    sweep(folder)
    return Recovery(tuple(found), size)


def _settled(trail: Trail) -> Trail:
    """The trail, where an erasure that was begun has been brought to its end."""
    with ExitStack() as undo:
        undo.callback(trail.close)
        finish_erasures(trail)
        undo.pop_all()
    return trail
