"""Full and read-only disks, failed commits at every write, and clocks: nothing is lost in silence or written twice."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sqlite3
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlhf_audit_nb.errors import AuditError, KeyFileError, StoreError
from rlhf_audit_nb.trail import Level, Trail, TrailReader, verify_trail
from rlhf_audit_nb.trail.store import Store, Transaction
from rlhf_audit_nb.trail.vault import Vault

# add_nodes is called at every commit, also where no subtree became complete.
WRITES = ["add_bundles", "add_terms", "add_nodes", "put_streams", "put_head", "keep_checkpoint"]


def numbers(folder) -> list[int]:
    return [json.loads(entry.body)["n"] for entry in TrailReader.open(folder).entries(type="a.b")]


def append(trail: Trail, start: int, count: int) -> list:
    return [trail.append("a.b", b'{"n":%d}' % number, run="r", private=b"x") for number in range(start, start + count)]


def broken(*_args, **_kwargs):
    raise sqlite3.OperationalError("disk I/O error")


@pytest.mark.parametrize("size", [3, 255, 256])
@pytest.mark.parametrize("write", WRITES)
def test_a_failed_write_fails_all_that_wait_and_the_next_and_writes_nothing(folder, monkeypatch, write, size):
    trail = Trail.open(folder)
    append(trail, 0, size - 1)
    trail.flush()
    with monkeypatch.context() as patch:
        patch.setattr("rlhf_audit_nb.trail.writer.KEEP_CHECKPOINT_US", -1)
        patch.setattr(Transaction, write, broken)
        handles = append(trail, size - 1, 3)
        for handle in handles:
            with pytest.raises(StoreError) as caught:
                handle.wait(10)
            assert caught.value.reason == "io"
            assert handle.index is None
        with pytest.raises(StoreError):
            trail.append("a.b", b"{}")
        with pytest.raises(StoreError):
            trail.flush()
    with pytest.raises(StoreError):
        trail.append("a.b", b"{}")
    with pytest.raises(StoreError):
        trail.close()
    assert numbers(folder) == list(range(size - 1))
    with Trail.open(folder) as again:
        append(again, size - 1, 4)
    assert numbers(folder) == list(range(size + 3))
    assert verify_trail(folder).reasons == ()


def test_a_failure_of_the_vault_leaves_the_trail_as_it_was(folder, monkeypatch):
    trail = Trail.open(folder)
    append(trail, 0, 2)
    trail.flush()
    with monkeypatch.context() as patch:
        patch.setattr(Vault, "seal", broken)
        with pytest.raises(StoreError):
            append(trail, 2, 1)[0].wait()
    with pytest.raises(StoreError):
        trail.close()
    assert numbers(folder) == [0, 1]


@pytest.mark.parametrize("size", [3, 255, 256])
def test_a_commit_that_failed_but_reached_the_disk_is_not_written_twice(folder, monkeypatch, size):
    trail = Trail.open(folder)
    append(trail, 0, size - 1)
    trail.flush()
    whole = Store.transaction

    @contextmanager
    def commits_and_fails(self):
        with whole(self) as transaction:
            yield transaction
        raise StoreError("the disk gave an error", code="io")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "transaction", commits_and_fails)
        handle = append(trail, size - 1, 1)[0]
        with pytest.raises(StoreError):
            handle.wait(10)
    with pytest.raises(StoreError):
        trail.append("a.b", b"{}")
    with pytest.raises(StoreError):
        trail.close()
    assert numbers(folder) == list(range(size))
    with Trail.open(folder) as again:
        append(again, size, 2)
    assert numbers(folder) == list(range(size + 2))
    assert verify_trail(folder).reasons == ()


def test_an_error_of_any_other_kind_in_the_commit_reaches_the_waiter(folder, monkeypatch):
    trail = Trail.open(folder)

    def explode(*_args):
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(Transaction, "put_head", explode)
    with pytest.raises(StoreError, match="surprise"):
        trail.append("a.b", b"{}").wait(10)
    with pytest.raises(StoreError):
        trail.close()


def test_a_full_disk_is_one_clear_sentence_and_the_trail_goes_on_after_it(folder):
    trail = Trail.open(folder)
    append(trail, 0, 5)
    trail.flush()
    raw = trail._store._database.opened()
    pages = raw.execute("PRAGMA page_count").fetchone()[0]
    raw.execute(f"PRAGMA max_page_count={pages}")
    handles = [trail.append("a.b", b'{"n":5,"x":"%s"}' % (b"y" * 30_000), run="r") for _ in range(3)]
    with pytest.raises(StoreError) as caught:
        handles[-1].wait(10)
    assert caught.value.reason == "disk-full"
    assert str(folder / "trail.sqlite") in caught.value.message
    assert "Free some space" in caught.value.next_step
    assert "3 entries were not written" in caught.value.message
    with pytest.raises(StoreError):
        trail.close()
    with Trail.open(folder) as again:
        append(again, 5, 1)
    assert numbers(folder) == list(range(6))
    assert verify_trail(folder).level is Level.UNANCHORED


def in_child(work) -> str:
    """What ``work`` prints into a pipe from a forked child, which may give up its rights."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writing, work().encode())
            status = 0
        except BaseException as error:
            os.write(writing, f"FAILED {type(error).__name__}: {error}".encode())
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def test_a_file_that_may_not_grow_is_a_clear_error(folder):
    def work() -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        trail = Trail.open(folder)
        append(trail, 0, 3)
        trail.flush()
        limit = (folder / "trail.sqlite-wal").stat().st_size + 5000
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            for number in range(3, 1000):
                trail.append("a.b", b'{"n":%d,"x":"%s"}' % (number, b"y" * 9000), run="r")
            trail.flush()
        except StoreError as error:
            return f"{error.reason} {error.message}"
        return "nothing was refused"

    said = in_child(work)
    assert said.split()[0] in {"io", "disk-full"}
    assert "trail.sqlite" in said
    assert numbers(folder)[:3] == [0, 1, 2]
    assert verify_trail(folder).reasons == ()


@pytest.fixture
def open_folder():
    """A folder that another user can reach (the usual temporary ones are closed to others)."""
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    path.chmod(0o755)
    yield path
    path.chmod(0o755)
    shutil.rmtree(path)


def powerless() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def test_a_read_only_folder_is_refused_for_writing_and_read_all_the_same(open_folder):
    folder, home = open_folder / "audit", open_folder / "home"
    with Trail.open(folder, home=home) as trail:
        append(trail, 0, 3)
        vkey = trail.log_vkey
    for path in [home, *home.rglob("*"), *folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)

    def attempt(what) -> str:
        def work() -> str:
            powerless()
            try:
                return str(what())
            except AuditError as error:
                return f"{error.reason} {error}"

        return in_child(work)

    refused = attempt(lambda: Trail.open(folder, home=home))
    assert refused.startswith("read-only ")
    assert str(folder) in refused
    fresh = attempt(lambda: Trail.open(open_folder / "new", home=home))
    assert fresh.startswith("read-only ")
    assert str(open_folder / "new") in fresh
    assert attempt(lambda: TrailReader.open(folder).size) == "4"
    verdict = attempt(lambda: verify_trail(folder, home=home).to_dict())
    assert "'level': 'UNANCHORED'" in verdict
    assert "'reasons': []" in verdict
    for path in (home / "heads").iterdir():
        path.unlink()
    forgetful = attempt(lambda: verify_trail(folder, home=home).to_dict())
    assert "'level': 'UNANCHORED'" in forgetful
    assert "'code': 'last-seen'" in forgetful
    for path in [folder, home, *home.rglob("*")]:
        path.chmod(0o755)
    assert vkey


def test_a_home_that_cannot_be_written_is_said(open_folder):
    (open_folder / "home").mkdir(mode=0o555)
    (open_folder / "work").mkdir()
    (open_folder / "work").chmod(0o777)

    def work() -> str:
        powerless()
        try:
            Trail.open(open_folder / "work" / "audit", home=open_folder / "home")
        except KeyFileError as error:
            return str(error)
        return "opened"

    said = in_child(work)
    assert str(open_folder / "home") in said
    assert "RLHF_AUDIT_HOME" in said


@pytest.mark.parametrize("content", [b"", b"not a database, but a text of some length" * 50])
def test_a_file_that_is_no_trail_is_not_touched(folder, content):
    folder.mkdir()
    (folder / "trail.sqlite").write_bytes(content)
    verdict = verify_trail(folder)
    assert (verdict.level, verdict.reasons[0].where) == (Level.INVALID, str(folder / "trail.sqlite"))
    if content:
        with pytest.raises(StoreError) as caught:
            Trail.open(folder)
        assert caught.value.reason == "malformed"
        assert (folder / "trail.sqlite").read_bytes() == content


def test_another_programs_database_is_not_touched(folder):
    folder.mkdir()
    connection = sqlite3.connect(folder / "trail.sqlite")
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.raises(StoreError, match="not a trail"):
        Trail.open(folder)
    assert verify_trail(folder).level is Level.INVALID
    connection = sqlite3.connect(folder / "trail.sqlite")
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]


def test_a_locked_store_is_said_after_the_wait(folder, monkeypatch):
    trail = Trail.open(folder)
    trail._store._database.opened().execute("PRAGMA busy_timeout=50")
    other = sqlite3.connect(folder / "trail.sqlite")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError) as caught:
        trail.append("a.b", b"{}").wait(10)
    assert caught.value.reason == "locked"
    other.rollback()
    other.close()
    with pytest.raises(StoreError):
        trail.close()


def test_opening_a_damaged_newest_state_builds_nothing_on_it(folder):
    Trail.open(folder).close()
    connection = sqlite3.connect(folder / "trail.sqlite")
    with connection:
        connection.execute("UPDATE head SET frontier = zeroblob(32)")
    connection.close()
    with pytest.raises(StoreError) as caught:
        Trail.open(folder)
    assert caught.value.reason == "damaged"


def test_an_append_does_not_wait_for_the_disk(folder, monkeypatch):
    with Trail.open(folder) as trail:
        slow = Transaction.put_head

        def put_head(self, head):
            time.sleep(0.3)
            slow(self, head)

        trail.append("a.b", b"{}").wait()
        monkeypatch.setattr(Transaction, "put_head", put_head)
        start = time.perf_counter()
        trail.append("a.b", b"{}")
        assert time.perf_counter() - start < 0.2
        trail.flush()
        assert time.perf_counter() - start > 0.3
