"""One SQLite file: transactions, compiled statements, and errors that say what to do."""

from __future__ import annotations

import sqlite3

import pytest
import sqlalchemy as sa

from rlhf_audit_nb.errors import StoreError
from rlhf_audit_nb.trail.sqlite import Database, Statement, reading, store_errors

metadata = sa.MetaData()
things = sa.Table(
    "things",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, index=True),
    sa.Column("data", sa.LargeBinary),
)
INSERT = Statement(things.insert(), ["name", "data"])
ALL = Statement(sa.select(things.c.name, things.c.data).order_by(things.c.id))
NAMED = Statement(sa.select(things.c.id).where(things.c.name == sa.bindparam("wanted"), things.c.id > 0).limit(1))


@pytest.fixture
def database(tmp_path):
    made = Database(tmp_path / "a ?#%20 name.sqlite")
    with made.transaction() as session:
        session.create(metadata)
    yield made
    made.close()


def names(database: Database) -> list[str]:
    with reading(database.path) as session:
        return [name for name, _ in session.execute(ALL)]


def test_a_transaction_commits_at_its_end(database):
    with database.transaction() as session:
        session.execute(INSERT, {"name": "one", "data": b"\0\xff"})
        session.execute_many(INSERT, [{"name": "two", "data": None}, {"name": "three", "data": b""}])
        assert names(database) == []
    with reading(database.path) as session:
        assert list(session.execute(ALL)) == [("one", b"\0\xff"), ("two", None), ("three", b"")]


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt, GeneratorExit])
def test_any_exception_rolls_back_and_the_next_transaction_works(database, error):
    with pytest.raises(error), database.transaction() as session:
        session.execute(INSERT, {"name": "lost", "data": None})
        raise error
    with database.transaction() as session:
        session.execute(INSERT, {"name": "kept", "data": None})
    assert names(database) == ["kept"]


def test_a_lock_that_an_interrupt_left_taken_is_let_go(database, tmp_path):
    database.opened().execute("BEGIN IMMEDIATE")
    database.roll_back()
    with Database(database.path).transaction() as session:
        session.execute(INSERT, {"name": "other", "data": None})
    database.opened().execute("BEGIN IMMEDIATE")
    with database.transaction() as session:
        session.execute(INSERT, {"name": "one", "data": None})
    assert names(database) == ["other", "one"]


def test_values_that_stand_in_a_statement_are_kept(database):
    with database.transaction() as session:
        session.execute_many(INSERT, [{"name": "x", "data": None}, {"name": "x", "data": None}])
        assert session.execute(NAMED, {"wanted": "x"}).fetchall() == [(1,)]
        assert session.execute(NAMED, {"wanted": "y"}).fetchall() == []
        assert session.select(sa.select(things.c.id).where(things.c.id == 2)).fetchall() == [(2,)]


def test_tables_and_indexes_are_made_once(database):
    with database.transaction() as session:
        session.create(metadata)
        found = session.raw.execute("SELECT name FROM sqlite_master ORDER BY name").fetchall()
    assert found == [("ix_things_name",), ("things",)]


def test_each_commit_is_synced_to_the_log(database):
    raw = database.opened()
    assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert raw.execute("PRAGMA synchronous").fetchone() == (2,)


def test_the_log_is_folded_into_the_file_unless_somebody_reads(database):
    with database.transaction() as session:
        session.execute(INSERT, {"name": "one", "data": b"x" * 10_000})
    log = database.path.with_name(database.path.name + "-wal")
    with reading(database.path) as session:
        session.execute(ALL).fetchall()
        database.opened().execute("PRAGMA busy_timeout=50")
        with pytest.raises(StoreError) as caught:
            database.fold()
        assert caught.value.reason == "locked"
    database.fold()
    assert log.stat().st_size == 0
    assert b"x" * 1000 in database.path.read_bytes()


def test_what_is_abandoned_is_not_closed_and_a_new_connection_is_made(database):
    kept = database.abandon()
    assert isinstance(kept, sqlite3.Connection)
    with database.transaction() as session:
        session.execute(INSERT, {"name": "after", "data": None})
    assert kept.execute("SELECT count(*) FROM things").fetchone() == (1,)
    kept.close()


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("database or disk is full", "disk-full"),
        ("attempt to write a readonly database", "read-only"),
        ("unable to open database file", "unreadable"),
        ("database is locked", "locked"),
        ("database disk image is malformed", "malformed"),
        ("no such table: head", "malformed"),
        ("file is not a database", "malformed"),
        ("disk I/O error", "io"),
        ("something new", "store"),
    ],
)
def test_what_sqlite_says_becomes_one_sentence_that_names_the_file_and_a_next_step(tmp_path, said, code):
    with pytest.raises(StoreError) as caught, store_errors(tmp_path / "x.sqlite"):
        raise sqlite3.OperationalError(said)
    assert caught.value.reason == code
    assert str(tmp_path / "x.sqlite") in caught.value.message
    assert caught.value.next_step


def test_an_error_that_is_not_the_databases_passes_as_it_is(tmp_path):
    with pytest.raises(LookupError), store_errors(tmp_path / "x.sqlite"):
        raise LookupError


def test_a_file_that_is_not_there_is_not_made_by_reading_it(tmp_path):
    with pytest.raises(StoreError) as caught, reading(tmp_path / "none.sqlite"):
        pass
    assert caught.value.reason == "unreadable"
    assert not (tmp_path / "none.sqlite").exists()
