"""The store: a trail's rows in SQLite (WAL, synchronous=FULL), through SQLAlchemy Core. Floor 0.

=============== =====================================================================================================
``head``        one row: origin, size, the newest signed checkpoint, the frontier of the tree, the time of the commit
``bundles``     entries as they are hashed, a C2SP entry bundle a row (u16 length, bytes), with their leaf hashes
                beside them; a row never crosses a multiple of 256, so the rows of one tile lie together
``nodes``       roots of the complete subtrees of height 8, 16, ...: with a tile's leaf hashes, a proof's few reads
``checkpoints`` the history of signed checkpoints: at least one in every 256 entries and in every minute of work
``streams``     next sequence number and last time of every stream      (derived, can be rebuilt)
``terms``       which rows hold a type or a run: the query index        (derived, can be rebuilt)
``open_runs``   runs that were started and not ended, with their writer (derived, can be rebuilt)
=============== =====================================================================================================

Entries, the new tree state and the signed checkpoint commit in one transaction that holds the only write lock from
its first statement (``BEGIN IMMEDIATE``). A database error becomes one `StoreError` that names the file and what to do.
"""

from __future__ import annotations

import os
import sqlite3
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from rlhf_audit_nb.errors import FormatError, StoreError
from rlhf_audit_nb.trail.merkle import HASH_BYTES, node_hash

__all__ = [
    "BUNDLE",
    "Bundle",
    "Head",
    "Store",
    "StoreHashes",
    "StreamState",
    "Transaction",
    "connect",
    "pack_entries",
    "store_errors",
    "unpack_entries",
]

BUNDLE = 256
SCHEMA_VERSION = 1
APPLICATION_ID = 0x524C4854  # "RLHT"
BUSY_SECONDS = 60.0

_metadata = sa.MetaData()
_head = sa.Table(
    "head",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("origin", sa.Text, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("time", sa.BigInteger, nullable=False),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("frontier", sa.LargeBinary, nullable=False),
    sa.Column("kept_size", sa.BigInteger, nullable=False),
    sa.Column("kept_time", sa.BigInteger, nullable=False),
)
_bundles = sa.Table(
    "bundles",
    _metadata,
    sa.Column("first", sa.Integer, primary_key=True),
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("hashes", sa.LargeBinary, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
)
_nodes = sa.Table(
    "nodes",
    _metadata,
    sa.Column("level", sa.Integer, primary_key=True),
    sa.Column("number", sa.BigInteger, primary_key=True),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)
_checkpoints = sa.Table(
    "checkpoints",
    _metadata,
    sa.Column("size", sa.Integer, primary_key=True),
    sa.Column("time", sa.BigInteger, nullable=False),
    sa.Column("note", sa.Text, nullable=False),
)
_streams = sa.Table(
    "streams",
    _metadata,
    sa.Column("stream", sa.Text, primary_key=True),
    sa.Column("next", sa.BigInteger, nullable=False),
    sa.Column("time", sa.BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
_terms = sa.Table(
    "terms",
    _metadata,
    sa.Column("term", sa.Text, primary_key=True),
    sa.Column("first", sa.BigInteger, primary_key=True),
    sqlite_with_rowid=False,
)
_open_runs = sa.Table(
    "open_runs",
    _metadata,
    sa.Column("run", sa.Text, primary_key=True),
    sa.Column("writer", sa.Text, nullable=False),
    sqlite_with_rowid=False,
)

# Built once: the statements of the append path, so that only their cached form is looked up.
_SELECT_SIZE = sa.select(_head.c.size)
_SELECT_HEAD = sa.select(_head)
_UPDATE_HEAD = _head.update()
_INSERT_BUNDLE = _bundles.insert()
_INSERT_NODE = _nodes.insert()
_INSERT_CHECKPOINT = _checkpoints.insert()
_INSERT_TERM = _terms.insert()
_SELECT_STREAM = sa.select(_streams.c.next, _streams.c.time).where(_streams.c.stream == sa.bindparam("name"))
_stream_insert = upsert(_streams)
_UPSERT_STREAM = _stream_insert.on_conflict_do_update(
    index_elements=["stream"],
    set_={"next": _stream_insert.excluded.next, "time": _stream_insert.excluded.time},
)


@dataclass(frozen=True)
class Head:
    """The newest state: what the ``head`` row says."""

    origin: str
    size: int
    time: int
    note: str
    frontier: tuple[bytes, ...]
    kept_size: int
    kept_time: int


@dataclass(frozen=True)
class Bundle:
    """A row of entries: the index of the first, their leaf hashes joined, their bytes with lengths."""

    first: int
    count: int
    hashes: bytes
    data: bytes


@dataclass
class StreamState:
    """Where a stream stands: its next sequence number and its last time (µs)."""

    next: int = 0
    time: int = 0


def pack_entries(entries: Iterable[bytes]) -> bytes:
    """A C2SP entry bundle: each entry after its length in two bytes, big-endian."""
    pack = struct.Struct(">H").pack
    return b"".join([part for entry in entries for part in (pack(len(entry)), entry)])


def unpack_entries(data: bytes, count: int) -> list[bytes]:
    """The entries of a bundle of exactly ``count``.

    Raises:
        FormatError: it holds fewer or more, or is cut short.
    """
    entries: list[bytes] = []
    at, end = 0, len(data)
    for _ in range(count):
        start = at + 2
        stop = start + (data[at] << 8 | data[at + 1]) if start <= end else end + 1
        if stop > end:
            raise FormatError(f"an entry bundle is cut short after {len(entries)} entries.", code="bundle")
        entries.append(data[start:stop])
        at = stop
    if at != end:
        raise FormatError(f"an entry bundle has {end - at} bytes after its {count} entries.", code="bundle")
    return entries


_FREE = "Free some space, then open the trail again."
_ALLOW = "Make the file and its folder writable, or name another folder with trail=."
_RESTORE = "Restore it from a copy; `rlhf-audit verify` tells what holds."
# What SQLite says, the machine-readable reason, what that means, and what to do.
_ADVICE = (
    ("full", "disk-full", "the disk is full", _FREE),
    ("readonly", "read-only", "it cannot be written", _ALLOW),
    ("unable to open", "unreadable", "it cannot be opened", "Check that it exists and that you may read and write it."),
    ("locked", "locked", "another process kept it locked", "Wait for that process, then open the trail again."),
    ("malformed", "malformed", "the file is damaged", _RESTORE),
    ("codec can't decode", "malformed", "the file is damaged", _RESTORE),
    ("Could not decode", "malformed", "the file is damaged", _RESTORE),
    ("no such", "malformed", "a part of it is missing", _RESTORE),
    ("not a database", "malformed", "it is not a trail's database", "Name the folder that holds the trail."),
    ("disk I/O", "io", "the disk gave an error", "Check the disk, then open the trail again."),
)


def _advice(path: Path, error: BaseException) -> StoreError:
    text = str(getattr(error, "orig", None) or error)
    for mark, code, what, step in _ADVICE:
        if mark in text:
            return StoreError(f"The store {path}: {what} ({text}).", next_step=step, code=code)
    return StoreError(f"The store {path} failed: {text}.", next_step="Check the file and its disk, then open it again.")


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Turn database and file errors on ``path`` into one `StoreError` that says what to do."""
    try:
        yield
    except (DBAPIError, sqlite3.Error, UnicodeDecodeError) as error:
        raise _advice(path, error) from error


def connect(path: Path, *, write: bool, secure_delete: bool = False) -> sa.Engine:
    """An engine on one SQLite file; each connection is a fresh one, and a writing one begins by taking the lock."""

    def create() -> sqlite3.Connection:
        uri = f"file:{quote(str(path))}?{'mode=rwc' if write else _reading_mode(path)}"
        raw = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        if write:
            raw.execute("PRAGMA journal_mode=WAL")
            raw.execute("PRAGMA synchronous=FULL")
            raw.execute(f"PRAGMA secure_delete={'ON' if secure_delete else 'OFF'}")
            raw.execute("PRAGMA cache_size=-8000")
        raw.execute("PRAGMA cell_size_check=ON")
        return raw

    engine = sa.create_engine("sqlite://", creator=create, poolclass=NullPool)
    begin = "BEGIN IMMEDIATE" if write else "BEGIN"
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
    return engine


@lru_cache(maxsize=16)
def _reading_engine(path: Path) -> sa.Engine:
    # Holds no connection, only the compiled statements, which cost more than a short read.
    return connect(path, write=False)


def _reading_mode(path: Path) -> str:
    # SQLite cannot make the shared-memory file of a WAL database in a folder that cannot be written. Without a
    # log to read, the file itself is all there is, and it may be read as one that nobody changes.
    log = path.with_name(path.name + "-wal")
    if not os.access(path.parent, os.W_OK) and (not log.exists() or log.stat().st_size == 0):
        return "mode=ro&immutable=1"
    return "mode=ro"


class StoreHashes:
    """The complete subtrees of a store, as a `HashReader`: at most three range reads for a proof at 1 M entries."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self._tiles: dict[tuple[int, int], list[bytes]] = {}

    def node(self, level: int, index: int) -> bytes:
        """The root of one complete subtree."""
        tile_level, height = divmod(level, 8)
        first = index << height
        tile = self.tile(tile_level, first // BUNDLE)
        row = tile[first % BUNDLE : first % BUNDLE + (1 << height)]
        if len(row) != 1 << height:
            raise StoreError(f"The subtree {level}/{index} is missing from the store.", code="missing-node")
        while len(row) > 1:
            row = [node_hash(row[i], row[i + 1]) for i in range(0, len(row), 2)]
        return row[0]

    def tile(self, level: int, number: int) -> list[bytes]:
        """The hashes of one tile (C2SP tlog-tiles: level and number), as many as there are, at most 256."""
        key = (level, number)
        if key not in self._tiles:
            if len(self._tiles) > 64:  # noqa: PLR2004 (a proof needs few; a long walk must not grow)
                self._tiles.clear()
            self._tiles[key] = self._leaves(number) if level == 0 else self._inner(level, number)
        return self._tiles[key]

    def _leaves(self, number: int) -> list[bytes]:
        first = number * BUNDLE
        query = (
            sa.select(_bundles.c.hashes)
            .where(_bundles.c.first >= first, _bundles.c.first < first + BUNDLE)
            .order_by(_bundles.c.first)
        )
        return _cut(b"".join(self._connection.scalars(query)))

    def _inner(self, level: int, number: int) -> list[bytes]:
        first = number * BUNDLE
        query = (
            sa.select(_nodes.c.hash)
            .where(_nodes.c.level == level, _nodes.c.number >= first, _nodes.c.number < first + BUNDLE)
            .order_by(_nodes.c.number)
        )
        return list(self._connection.scalars(query))


def _typed(row: Sequence[Any], *types: type) -> tuple[Any, ...]:
    """The row's values, which must be of these types: SQLite itself lets any value stand in any column."""
    values = tuple(row)
    if any(type(value) is not kind for value, kind in zip(values, types, strict=True)):
        raise StoreError("A row of the store holds a value of the wrong type; the file is damaged.", code="malformed")
    return values


def _cut(joined: bytes) -> list[bytes]:
    return [joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES)]


class Transaction:
    """One transaction, or one reading connection: typed reads, and the writes of an append."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self.hashes = StoreHashes(connection)

    def layout(self) -> tuple[int, int]:
        """The file's application id and layout version."""
        application = self._connection.exec_driver_sql("PRAGMA application_id").scalar()
        version = self._connection.exec_driver_sql("PRAGMA user_version").scalar()
        return int(application or 0), int(version or 0)

    def has_head(self) -> bool:
        """Whether the trail was made completely."""
        return self._connection.execute(_SELECT_SIZE).first() is not None

    def size(self) -> int:
        """How many entries the head covers."""
        return int(_typed(self._connection.execute(_SELECT_SIZE).one(), int)[0])

    def head(self) -> Head:
        """The newest state.

        Raises:
            StoreError: there is none, or not exactly one.
        """
        rows = self._connection.execute(_SELECT_HEAD).all()
        if len(rows) != 1:
            raise StoreError(f"The store has {len(rows)} heads, not one.", code="malformed")
        _, origin, size, time, note, frontier, *kept = _typed(rows[0], int, str, int, int, str, bytes, int, int)
        return Head(origin, size, time, note, tuple(_cut(frontier)), *kept)

    def stream(self, name: str) -> StreamState:
        """Where a stream stands."""
        row = self._connection.execute(_SELECT_STREAM, {"name": name}).first()
        return StreamState() if row is None else StreamState(*_typed(row, int, int))

    def streams(self) -> dict[str, StreamState]:
        """Where every stream stands."""
        rows = (_typed(row, str, int, int) for row in self._connection.execute(sa.select(_streams)))
        return {name: StreamState(following, time) for name, following, time in rows}

    def open_runs(self) -> dict[str, str]:
        """Runs that were started and not ended, with the writer that started them."""
        return {row.run: row.writer for row in self._connection.execute(sa.select(_open_runs))}

    def checkpoints(self) -> Iterator[tuple[int, str]]:
        """The history: size and signed note, the smallest first."""
        query = sa.select(_checkpoints.c.size, _checkpoints.c.note).order_by(_checkpoints.c.size)
        for row in self._connection.execute(query):
            size, note = _typed(row, int, str)
            yield size, note

    def node(self, level: int, number: int) -> bytes | None:
        """One stored subtree."""
        query = sa.select(_nodes.c.hash).where(_nodes.c.level == level, _nodes.c.number == number)
        return self._connection.scalar(query)

    def count_nodes(self) -> int:
        """How many subtrees are stored."""
        return int(self._connection.scalar(sa.select(sa.func.count()).select_from(_nodes)) or 0)

    def terms(self) -> Iterator[tuple[str, int]]:
        """The whole query index."""
        for row in self._connection.execute(sa.select(_terms)):
            term, first = _typed(row, str, int)
            yield term, first

    def bundles(self, start: int, stop: int, terms: Sequence[str] = (), limit: int | None = None) -> Iterator[Bundle]:
        """The rows that begin in ``[start, stop)``, in order; with ``terms`` only rows that hold all of them."""
        query = sa.select(_bundles).where(_bundles.c.first >= start, _bundles.c.first < stop)
        for term in terms:
            having = sa.select(_terms.c.first).where(_terms.c.term == term)
            query = query.where(_bundles.c.first.in_(having))
        for row in self._connection.execute(query.order_by(_bundles.c.first).limit(limit)):
            first, count, hashes, data = _typed(row, int, int, bytes, bytes)
            yield Bundle(first, count, hashes, data)

    def bundle_start(self, index: int) -> int:
        """Where the row begins that holds the entry ``index``."""
        query = sa.select(sa.func.max(_bundles.c.first)).where(_bundles.c.first <= index)
        return int(self._connection.scalar(query) or 0)

    def add_bundles(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Insert rows of entries."""
        self._connection.execute(_INSERT_BUNDLE, rows)

    def add_nodes(self, nodes: Sequence[tuple[int, int, bytes]]) -> None:
        """Insert complete subtrees."""
        if nodes:
            self._connection.execute(_INSERT_NODE, [{"level": a, "number": b, "hash": c} for a, b, c in nodes])

    def add_terms(self, terms: Iterable[tuple[str, int]]) -> None:
        """Insert into the query index."""
        rows = [{"term": term, "first": first} for term, first in terms]
        if rows:
            self._connection.execute(_INSERT_TERM, rows)

    def put_streams(self, states: Mapping[str, StreamState]) -> None:
        """Write where streams stand now."""
        rows = [{"stream": name, "next": state.next, "time": state.time} for name, state in states.items()]
        self._connection.execute(_UPSERT_STREAM, rows)

    def start_run(self, run: str, writer: str) -> None:
        """Note that a run is open."""
        self._connection.execute(upsert(_open_runs).on_conflict_do_nothing(), {"run": run, "writer": writer})

    def end_run(self, run: str) -> None:
        """Note that a run has ended."""
        self._connection.execute(_open_runs.delete().where(_open_runs.c.run == run))

    def put_head(self, head: Head) -> None:
        """Write the new state."""
        values = {
            "size": head.size,
            "time": head.time,
            "note": head.note,
            "frontier": b"".join(head.frontier),
            "kept_size": head.kept_size,
            "kept_time": head.kept_time,
        }
        self._connection.execute(_UPDATE_HEAD, values)

    def add_head(self, head: Head) -> None:
        """Write the first state of a new trail."""
        values = {"id": 1, "origin": head.origin, "frontier": b"".join(head.frontier)}
        for name in ("size", "time", "note", "kept_size", "kept_time"):
            values[name] = getattr(head, name)
        self._connection.execute(_head.insert(), values)

    def keep_checkpoint(self, size: int, time: int, note: str) -> None:
        """Add a checkpoint to the history."""
        self._connection.execute(_INSERT_CHECKPOINT, {"size": size, "time": time, "note": note})

    def replace_derived(
        self, streams: Mapping[str, StreamState], terms: Iterable[tuple[str, int]], open_runs: Mapping[str, str]
    ) -> None:
        """Write the derived tables anew."""
        for table in (_streams, _terms, _open_runs):
            self._connection.execute(table.delete())
        if streams:
            self.put_streams(streams)
        self.add_terms(terms)
        for run, writer in open_runs.items():
            self.start_run(run, writer)


class Store:
    """One trail's database file."""

    def __init__(self, path: Path, *, write: bool) -> None:
        self.path = path
        self._write = write
        self._engine: sa.Engine | None = None
        self._connection: sa.Connection | None = None
        self._checked = False

    def exists(self) -> bool:
        """Whether the file is there (a link counts as something else and is refused)."""
        if self.path.is_symlink():
            raise StoreError(
                f"The store {self.path} is a symbolic link.",
                next_step="Name the folder that really holds the trail.",
                code="link",
            )
        return self.path.is_file()

    def create_tables(self) -> None:
        """Make the tables where they are missing; an existing trail of another layout is refused."""
        with store_errors(self.path), self._connected().begin():
            connection = self._connected()
            version = connection.exec_driver_sql("PRAGMA user_version").scalar()
            if version == 0:
                if connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar():
                    raise StoreError(f"The store {self.path} is a database, but not a trail's.", code="malformed")
                _metadata.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
                connection.exec_driver_sql(f"PRAGMA user_version={SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                raise self._unknown_layout(version)

    def _check_layout(self, application: int, version: int) -> None:
        if application != APPLICATION_ID:
            raise StoreError(
                f"The store {self.path} is a database, but not a trail's.",
                next_step="Name the folder that holds the trail.",
                code="malformed",
            )
        if version != SCHEMA_VERSION:
            raise self._unknown_layout(version)

    def _unknown_layout(self, version: object) -> StoreError:
        return StoreError(
            f"The store {self.path} is of layout {version}; this version reads {SCHEMA_VERSION}.",
            next_step="Open it with the version that wrote it, or a later one.",
            code="unknown-layout",
        )

    def _connected(self) -> sa.Connection:
        if self._connection is None:
            self._engine = connect(self.path, write=self._write)
            self._connection = self._engine.connect()
        return self._connection

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        """One consistent state of the store, on a connection of its own: safe from any thread.

        Refuses a file that is no trail, or one of another layout.
        """
        with store_errors(self.path), _reading_engine(self.path).connect() as connection, connection.begin():
            transaction = Transaction(connection)
            if not self._checked:
                self._check_layout(*transaction.layout())
                self._checked = True
            yield transaction

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """One transaction: committed at the end, rolled back on any exception. Not for two threads at once."""
        with store_errors(self.path):
            connection = self._connected()
            with connection.begin():
                yield Transaction(connection)

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
