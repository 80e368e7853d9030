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
its first statement (`sqlite`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert as upsert

from rlhf_audit_nb.errors import FormatError, StoreError
from rlhf_audit_nb.trail.merkle import HASH_BYTES, node_hash
from rlhf_audit_nb.trail.sqlite import Database, Session, Statement, Writing, reading, store_errors

__all__ = [
    "BUNDLE",
    "Bundle",
    "Head",
    "Store",
    "StoreHashes",
    "StreamState",
    "Transaction",
    "pack_entries",
    "store_errors",
    "unpack_entries",
]

BUNDLE = 256
SCHEMA_VERSION = 1
APPLICATION_ID = 0x524C4854  # "RLHT"

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

_first: sa.BindParameter[int] = sa.bindparam("first")
_stop: sa.BindParameter[int] = sa.bindparam("stop")
_level: sa.BindParameter[int] = sa.bindparam("level")
_number: sa.BindParameter[int] = sa.bindparam("number")
_STATE = ("size", "time", "note", "frontier", "kept_size", "kept_time")

_SELECT_SIZE = Statement(sa.select(_head.c.size))
_SELECT_HEAD = Statement(sa.select(_head))
_INSERT_HEAD = Statement(_head.insert())
_UPDATE_HEAD = Statement(_head.update(), _STATE)
_INSERT_BUNDLE = Statement(_bundles.insert())
_SELECT_START = Statement(sa.select(sa.func.max(_bundles.c.first)).where(_bundles.c.first <= _first))
_SELECT_LEAVES = Statement(
    sa.select(_bundles.c.hashes).where(_bundles.c.first >= _first, _bundles.c.first < _stop).order_by(_bundles.c.first)
)
_INSERT_NODE = Statement(_nodes.insert())
_SELECT_NODE = Statement(sa.select(_nodes.c.hash).where(_nodes.c.level == _level, _nodes.c.number == _number))
_SELECT_NODES = Statement(
    sa.select(_nodes.c.hash)
    .where(_nodes.c.level == _level, _nodes.c.number >= _first, _nodes.c.number < _stop)
    .order_by(_nodes.c.number)
)
_COUNT_NODES = Statement(sa.select(sa.func.count()).select_from(_nodes))
_INSERT_CHECKPOINT = Statement(_checkpoints.insert())
_SELECT_CHECKPOINTS = Statement(sa.select(_checkpoints.c.size, _checkpoints.c.note).order_by(_checkpoints.c.size))
_INSERT_TERM = Statement(_terms.insert())
_SELECT_TERMS = Statement(sa.select(_terms))
_SELECT_STREAM = Statement(
    sa.select(_streams.c.next, _streams.c.time).where(_streams.c.stream == sa.bindparam("stream"))
)
_SELECT_STREAMS = Statement(sa.select(_streams))
_stream_insert = upsert(_streams)
_UPSERT_STREAM = Statement(
    _stream_insert.on_conflict_do_update(
        index_elements=["stream"],
        set_={"next": _stream_insert.excluded.next, "time": _stream_insert.excluded.time},
    )
)
_SELECT_OPEN = Statement(sa.select(_open_runs))
_INSERT_OPEN = Statement(upsert(_open_runs).on_conflict_do_nothing())
_DELETE_OPEN = Statement(_open_runs.delete().where(_open_runs.c.run == sa.bindparam("run")))
_CLEAR_DERIVED = tuple(Statement(table.delete()) for table in (_streams, _terms, _open_runs))


@lru_cache(maxsize=8)
def _select_bundles(terms: int, *, limited: bool) -> Statement:
    """The rows of a range, only those that hold so many terms."""
    query = sa.select(_bundles).where(_bundles.c.first >= _first, _bundles.c.first < _stop)
    for number in range(terms):
        having = sa.select(_terms.c.first).where(_terms.c.term == sa.bindparam(f"term{number}"))
        query = query.where(_bundles.c.first.in_(having))
    query = query.order_by(_bundles.c.first)
    return Statement(query.limit(sa.bindparam("most", type_=sa.Integer)) if limited else query)


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


class StoreHashes:
    """The complete subtrees of a store, as a `HashReader`: at most three range reads for a proof at 1 M entries."""

    def __init__(self, session: Session) -> None:
        self._session = session
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
        rows = self._session.execute(_SELECT_LEAVES, {"first": number * BUNDLE, "stop": (number + 1) * BUNDLE})
        return _cut(b"".join([hashes for (hashes,) in rows]))

    def _inner(self, level: int, number: int) -> list[bytes]:
        values = {"level": level, "first": number * BUNDLE, "stop": (number + 1) * BUNDLE}
        return [node for (node,) in self._session.execute(_SELECT_NODES, values)]


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

    def __init__(self, session: Session) -> None:
        self._session = session
        self.hashes = StoreHashes(session)

    def layout(self) -> tuple[int, int]:
        """The file's application id and layout version."""
        return self._session.pragma("application_id"), self._session.pragma("user_version")

    def strange(self) -> list[str]:
        """What the file holds beside its tables: a view, a trigger or an index answers as whoever made it likes."""
        rows = self._session.raw.execute(
            "SELECT type, name FROM sqlite_master WHERE name NOT LIKE 'sqlite!_%' ESCAPE '!'"
        )
        return sorted(f"{kind} {name}" for kind, name in rows if kind != "table" or name not in _metadata.tables)

    def has_head(self) -> bool:
        """Whether the trail was made completely."""
        return self._session.execute(_SELECT_SIZE).fetchone() is not None

    def size(self) -> int:
        """How many entries the head covers.

        Raises:
            StoreError: there is no head.
        """
        row = self._session.execute(_SELECT_SIZE).fetchone()
        if row is None:
            raise StoreError("The store has no head.", code="malformed")
        return int(_typed(row, int)[0])

    def head(self) -> Head:
        """The newest state.

        Raises:
            StoreError: there is none, or not exactly one.
        """
        rows = self._session.execute(_SELECT_HEAD).fetchall()
        if len(rows) != 1:
            raise StoreError(f"The store has {len(rows)} heads, not one.", code="malformed")
        _, origin, size, time, note, frontier, *kept = _typed(rows[0], int, str, int, int, str, bytes, int, int)
        return Head(origin, size, time, note, tuple(_cut(frontier)), *kept)

    def stream(self, name: str) -> StreamState:
        """Where a stream stands."""
        row = self._session.execute(_SELECT_STREAM, {"stream": name}).fetchone()
        return StreamState() if row is None else StreamState(*_typed(row, int, int))

    def streams(self) -> dict[str, StreamState]:
        """Where every stream stands."""
        rows = (_typed(row, str, int, int) for row in self._session.execute(_SELECT_STREAMS))
        return {name: StreamState(following, time) for name, following, time in rows}

    def open_runs(self) -> dict[str, str]:
        """Runs that were started and not ended, with the writer that started them."""
        return dict(_typed(row, str, str) for row in self._session.execute(_SELECT_OPEN))

    def checkpoints(self) -> Iterator[tuple[int, str]]:
        """The history: size and signed note, the smallest first."""
        for row in self._session.execute(_SELECT_CHECKPOINTS):
            size, note = _typed(row, int, str)
            yield size, note

    def node(self, level: int, number: int) -> bytes | None:
        """One stored subtree."""
        row = self._session.execute(_SELECT_NODE, {"level": level, "number": number}).fetchone()
        return None if row is None else bytes(_typed(row, bytes)[0])

    def leaf(self, index: int) -> bytes | None:
        """One leaf hash."""
        row = self.hashes.tile(0, index // BUNDLE)[index % BUNDLE :]
        return row[0] if row else None

    def count_nodes(self) -> int:
        """How many subtrees are stored."""
        return int(self._session.execute(_COUNT_NODES).fetchone()[0])

    def terms(self) -> Iterator[tuple[str, int]]:
        """The whole query index."""
        for row in self._session.execute(_SELECT_TERMS):
            term, first = _typed(row, str, int)
            yield term, first

    def bundles(self, start: int, stop: int, terms: Sequence[str] = (), limit: int | None = None) -> Iterator[Bundle]:
        """The rows that begin in ``[start, stop)``, in order; with ``terms`` only rows that hold all of them."""
        values: dict[str, int | str | None] = {"first": start, "stop": stop, "most": limit}
        values |= {f"term{number}": term for number, term in enumerate(terms)}
        for row in self._session.execute(_select_bundles(len(terms), limited=limit is not None), values):
            first, count, hashes, data = _typed(row, int, int, bytes, bytes)
            yield Bundle(first, count, hashes, data)

    def bundle_start(self, index: int) -> int:
        """Where the row begins that holds the entry ``index``."""
        return int(self._session.execute(_SELECT_START, {"first": index}).fetchone()[0] or 0)

    def add_bundles(self, rows: Iterable[Bundle]) -> None:
        """Insert rows of entries."""
        self._session.execute_many(_INSERT_BUNDLE, [vars(row) for row in rows])

    def add_nodes(self, nodes: Sequence[tuple[int, int, bytes]]) -> None:
        """Insert complete subtrees."""
        if nodes:
            self._session.execute_many(_INSERT_NODE, [{"level": a, "number": b, "hash": c} for a, b, c in nodes])

    def add_terms(self, terms: Iterable[tuple[str, int]]) -> None:
        """Insert into the query index."""
        for term, first in terms:
            self._session.execute(_INSERT_TERM, {"term": term, "first": first})

    def put_streams(self, states: Mapping[str, StreamState]) -> None:
        """Write where streams stand now."""
        for name, state in states.items():
            self._session.execute(_UPSERT_STREAM, {"stream": name, "next": state.next, "time": state.time})

    def start_run(self, run: str, writer: str) -> None:
        """Note that a run is open."""
        self._session.execute(_INSERT_OPEN, {"run": run, "writer": writer})

    def end_run(self, run: str) -> None:
        """Note that a run has ended."""
        self._session.execute(_DELETE_OPEN, {"run": run})

    def put_head(self, head: Head) -> None:
        """Write the new state."""
        self._session.execute(_UPDATE_HEAD, {**vars(head), "frontier": b"".join(head.frontier)})

    def add_head(self, head: Head) -> None:
        """Write the first state of a new trail."""
        self._session.execute(_INSERT_HEAD, {**vars(head), "id": 1, "frontier": b"".join(head.frontier)})

    def keep_checkpoint(self, size: int, time: int, note: str) -> None:
        """Add a checkpoint to the history."""
        self._session.execute(_INSERT_CHECKPOINT, {"size": size, "time": time, "note": note})

    def replace_derived(
        self, streams: Mapping[str, StreamState], terms: Iterable[tuple[str, int]], open_runs: Mapping[str, str]
    ) -> None:
        """Write the derived tables anew."""
        for clear in _CLEAR_DERIVED:
            self._session.execute(clear)
        self.put_streams(streams)
        self.add_terms(terms)
        for run, writer in open_runs.items():
            self.start_run(run, writer)


class Store:
    """One trail's database file."""

    def __init__(self, path: Path, *, write: bool) -> None:
        self.path = path
        self._write = write
        self._database = Database(path)
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
        with self._database.transaction() as session:
            version = session.pragma("user_version")
            if version == 0:
                if not session.is_empty():
                    raise StoreError(f"The store {self.path} is a database, but not a trail's.", code="malformed")
                session.create(_metadata)
                session.set_pragma("application_id", APPLICATION_ID)
                session.set_pragma("user_version", SCHEMA_VERSION)
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

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        """One consistent state of the store, on a connection of its own: safe from any thread.

        Refuses a file that is no trail, or one of another layout.
        """
        with reading(self.path) as session:
            transaction = Transaction(session)
            if not self._checked:
                self._check_layout(*transaction.layout())
                self._checked = True
            yield transaction

    def transaction(self) -> Writing[Transaction]:
        """One transaction: committed at the end, rolled back on any exception. Not for two threads at once.

        Raises:
            ValueError: the store was opened for reading.
        """
        if not self._write:
            raise ValueError(f"{self.path} was opened for reading only")
        return Writing(self._database, Transaction)

    def roll_back(self) -> None:
        """Let go of the write lock, where an interrupt left it taken."""
        self._database.roll_back()

    def abandon(self) -> object:
        """Forget the connection without closing it: after a fork it is the parent's. Returns what must stay alive."""
        return self._database.abandon()

    def close(self) -> None:
        """Close the connection."""
        self._database.close()
