"""One SQLite file: a connection's life, its transactions, its statements, and what its errors mean. Floor 0.

Write-ahead log, ``synchronous=FULL``: a transaction is on the disk (the log is fdatasynced) before ``COMMIT`` returns,
and a transaction that writes takes the file's only write lock with its first statement (``BEGIN IMMEDIATE``).

Statements are defined in SQLAlchemy Core, so that another database can be served, and each is compiled once into the
dialect's SQL. They run on the driver's own cursor: SQLAlchemy's way of running a statement costs several times what
SQLite needs for an append. An error becomes one `StoreError` that names the file and says what to do.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import quote

from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.schema import CreateIndex, CreateTable

from rlhf_audit_nb.errors import StoreError

if TYPE_CHECKING:
    import sqlalchemy as sa

__all__ = ["Database", "Session", "Statement", "Writing", "leaving_no_trace", "reading", "store_errors"]

BUSY_SECONDS = 60.0

_DIALECT = SQLiteDialect_pysqlite(paramstyle="named")
_NOTHING: Mapping[str, Any] = {}
_IMMUTABLE = "mode=ro&immutable=1"

_FREE = "Free some space, then open the trail again."
_ALLOW = "Make the file and its folder writable, or name another folder with --trail or trail=."
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
    text = str(error)
    for mark, code, what, step in _ADVICE:
        if mark in text:
            return StoreError(f"The store {path}: {what} ({text}).", next_step=step, code=code)
    return StoreError(f"The store {path} failed: {text}.", next_step="Check the file and its disk, then open it again.")


_TRANSLATED = (sqlite3.Error, UnicodeDecodeError)


class store_errors:  # noqa: N801 (a context that is used like a function)
    """Turn database and file errors on ``path`` into one `StoreError` that says what to do."""

    __slots__ = ("_path",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, _TRANSLATED):
            raise _advice(self._path, error) from error


class Statement:
    """A statement of SQLAlchemy Core, compiled once; its values are handed in by name.

    Args:
        clause: the statement. What varies in it is a ``bindparam`` without a value, or a column that is written; a
            value that stands in it stays as it is.
        columns: the columns that an insert or update writes; ``None`` for all.
    """

    def __init__(self, clause: sa.ClauseElement, columns: Sequence[str] | None = None) -> None:
        self._clause = clause
        self._columns = columns

    @cached_property
    def _compiled(self) -> tuple[str, dict[str, Any]]:
        compiled = self._clause.compile(dialect=_DIALECT, column_keys=self._columns)
        return str(compiled), {name: value for name, value in compiled.params.items() if value is not None}

    @cached_property
    def sql(self) -> str:
        """Its SQL in the dialect of the database."""
        return self._compiled[0]

    @cached_property
    def fixed(self) -> dict[str, Any]:
        """The values that stand in the statement itself."""
        return self._compiled[1]


class Session:
    """An open transaction, or a reading connection: runs statements and gives their rows."""

    __slots__ = ("raw",)

    def __init__(self, raw: sqlite3.Connection) -> None:
        self.raw = raw

    def execute(self, statement: Statement, values: Mapping[str, Any] = _NOTHING) -> sqlite3.Cursor:
        """Run one statement; the cursor gives its rows."""
        return self.raw.execute(statement.sql, {**statement.fixed, **values} if statement.fixed else values)

    def execute_many(self, statement: Statement, rows: Iterable[Mapping[str, Any]]) -> None:
        """Run one statement for each of ``rows``."""
        fixed = statement.fixed
        self.raw.executemany(statement.sql, [{**fixed, **row} for row in rows] if fixed else rows)

    def select(self, clause: sa.Select[Any]) -> sqlite3.Cursor:
        """Run a query that was made for this one time, with its values in it."""
        compiled = clause.compile(dialect=_DIALECT)
        return self.raw.execute(str(compiled), compiled.params)

    def pragma(self, name: str) -> int:
        """A number that SQLite keeps about the file."""
        return int(self.raw.execute(f"PRAGMA {name}").fetchone()[0])

    def set_pragma(self, name: str, value: int) -> None:
        """Set such a number."""
        self.raw.execute(f"PRAGMA {name}={value:d}")

    def create(self, metadata: sa.MetaData) -> None:
        """Make the tables and indexes that are missing."""
        for table in metadata.tables.values():
            self.raw.execute(str(CreateTable(table, if_not_exists=True).compile(dialect=_DIALECT)))
            for index in sorted(table.indexes, key=lambda item: str(item.name)):
                self.raw.execute(str(CreateIndex(index, if_not_exists=True).compile(dialect=_DIALECT)))

    def is_empty(self) -> bool:
        """Whether the database has no table, index or view at all."""
        return not self.raw.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]


class Database:
    """The writing connection to one file: made at its first use, for one thread at a time, given up at a fork.

    Args:
        path: the file; it is made where it is missing.
        secure_delete: overwrite with zeros what is deleted.
    """

    def __init__(self, path: Path, *, secure_delete: bool = False) -> None:
        self.path = path
        self._secure_delete = secure_delete
        self._raw: sqlite3.Connection | None = None

    def opened(self) -> sqlite3.Connection:
        """The connection, in autocommit mode; errors on it are the caller's to translate (`store_errors`)."""
        if self._raw is None:
            raw = _connect(self.path, "mode=rwc")
            try:
                raw.execute("PRAGMA journal_mode=WAL")
                raw.execute("PRAGMA synchronous=FULL")
                raw.execute(f"PRAGMA secure_delete={'ON' if self._secure_delete else 'OFF'}")
                raw.execute("PRAGMA cache_size=-8000")
            except BaseException:
                raw.close()
                raise
            self._raw = raw
        return self._raw

    def transaction(self) -> Writing[Session]:
        """One writing transaction: durable at the end, rolled back on any exception. Not within another.

        Raises:
            StoreError: the file cannot be opened, locked, read or written.
        """
        return Writing(self, _itself)

    def roll_back(self) -> None:
        """Let go of the write lock where an interrupt, in the one moment that no context sees, left it taken."""
        if self._raw is not None and self._raw.in_transaction:
            with suppress(sqlite3.Error):
                self._raw.execute("ROLLBACK")

    def fold(self) -> None:
        """Move what the write-ahead log holds into the file, and cut the log to nothing.

        Raises:
            StoreError: ``locked`` where another process reads or writes; nothing is lost, and it can be tried again.
        """
        with store_errors(self.path):
            busy, _, _ = self.opened().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise sqlite3.OperationalError("database is locked")

    def abandon(self) -> object:
        """Forget the connection without closing it: after a fork it is the parent's. Returns what must stay alive."""
        kept, self._raw = self._raw, None
        return kept

    def close(self) -> None:
        """Close the connection; it is made anew where it is used again."""
        raw, self._raw = self._raw, None
        if raw is not None:
            with store_errors(self.path):
                raw.close()


_Given = TypeVar("_Given")


def _itself(session: Session) -> Session:
    return session


class Writing(Generic[_Given]):
    """A writing transaction as a context (a class: as a generator it would cost more than its statements).

    Args:
        database: the file.
        give: makes of the session what the context gives.
    """

    __slots__ = ("_database", "_give", "_raw")

    def __init__(self, database: Database, give: Callable[[Session], _Given]) -> None:
        self._database = database
        self._give = give

    def __enter__(self) -> _Given:
        """Take the write lock."""
        with store_errors(self._database.path):
            raw = self._raw = self._database.opened()
            self._database.roll_back()
            try:
                raw.execute("BEGIN IMMEDIATE")
                return self._give(Session(raw))
            except BaseException:
                self._database.roll_back()
                raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Commit, or roll back."""
        path = self._database.path
        if error is None:
            try:
                self._raw.execute("COMMIT")
            except BaseException as failure:
                self._database.roll_back()
                if isinstance(failure, sqlite3.Error):
                    raise _advice(path, failure) from failure
                raise
            return
        self._database.roll_back()
        if isinstance(error, _TRANSLATED):
            raise _advice(path, error) from error


_no_trace: ContextVar[bool] = ContextVar("rlhf_audit_no_trace", default=False)


@contextmanager
def leaving_no_trace() -> Iterator[None]:
    """Inside, `reading` on this thread makes and changes no file at all, not even the log and its index beside it.

    Only where nobody writes meanwhile: it takes no locks, so that what another process commits could be half seen.
    """
    token = _no_trace.set(True)
    try:
        yield
    finally:
        _no_trace.reset(token)


@contextmanager
def reading(path: Path) -> Iterator[Session]:
    """One consistent state of the file, on a connection of its own: safe from any thread.

    Raises:
        StoreError: the file cannot be read.
    """
    untouched = _no_trace.get()
    with store_errors(path), closing(_connect(path, _untouching(path) if untouched else _reading_mode(path))) as raw:
        if untouched:
            raw.execute("PRAGMA locking_mode=EXCLUSIVE")  # the index of the log is then made in memory
        raw.execute("BEGIN")
        yield Session(raw)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"file:{quote(str(path))}?{mode}"
    raw = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    raw.execute("PRAGMA cell_size_check=ON")
    return raw


def _reading_mode(path: Path) -> str:
    # SQLite cannot make the shared-memory file of a WAL database in a folder that cannot be written. Without a
    # log to read, the file itself is all there is, and it may be read as one that nobody changes.
    return _IMMUTABLE if not os.access(path.parent, os.W_OK) and not _has_log(path) else "mode=ro"


def _untouching(path: Path) -> str:
    return "mode=ro&vfs=unix-none" if _has_log(path) else _IMMUTABLE


def _has_log(path: Path) -> bool:
    log = path.with_name(path.name + "-wal")
    return log.exists() and log.stat().st_size > 0
