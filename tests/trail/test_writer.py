"""When entries are committed and who waits, interrupts in the middle of a commit, bulk appends, and who may sign."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import threading
import time
from itertools import pairwise

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rlhf_audit_nb.errors import EntryError, StoreError
from rlhf_audit_nb.trail import Draft, Level, Trail, TrailReader, verify_trail
from rlhf_audit_nb.trail import writer as writing
from rlhf_audit_nb.trail.note import Signer, parse_note
from rlhf_audit_nb.trail.sqlite import Session
from rlhf_audit_nb.trail.store import Transaction

PACES = [("always", None), ("always", True), ("batched", None), ("batched", False)]


def numbers(folder) -> list[int]:
    return [json.loads(entry.body)["n"] for entry in TrailReader.open(folder).entries(type="a.b")]


def body(number: int) -> bytes:
    return b'{"n":%d}' % number


@pytest.fixture
def slow(monkeypatch):
    """Commits of a quarter of a second."""
    whole = Transaction.put_head

    def put_head(self, head):
        time.sleep(0.25)
        whole(self, head)

    def begin() -> None:
        monkeypatch.setattr(Transaction, "put_head", put_head)

    return begin


# --- when, and who waits ---


@pytest.mark.parametrize(("durability", "asynchronous"), PACES)
def test_an_append_waits_for_its_commit_where_it_was_asked_to(folder, slow, durability, asynchronous):
    with Trail.open(folder, durability=durability, asynchronous=asynchronous) as trail:
        trail.append("a.b", body(0)).wait()
        slow()
        began = time.perf_counter()
        handle = trail.append("a.b", body(1))
        taken = time.perf_counter() - began
        waits = durability == "always" if asynchronous is None else not asynchronous
        assert (handle.index is not None) is waits
        assert (taken >= 0.25) is waits
        assert handle.wait() == 2
    assert numbers(folder) == [0, 1]


def test_durable_entries_are_committed_at_once_also_where_nobody_waits(folder, monkeypatch):
    monkeypatch.setattr(writing, "LINGER_SECONDS", 1000)
    with Trail.open(folder, durability="always", asynchronous=True) as trail:
        handle = trail.append("a.b", body(0))
        for _ in range(500):
            if handle.done:
                break
            time.sleep(0.01)
        assert handle.index == 1


def test_threads_that_wait_for_batched_commits_share_them(folder):
    with Trail.open(folder, asynchronous=False) as trail:
        before = trail.status().size

        def work() -> None:
            for number in range(10):
                assert trail.append("a.b", body(number)).index is not None

        threads = [threading.Thread(target=work) for _ in range(8)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken = time.perf_counter() - began
        assert trail.status().size == before + 80
    # Each of the ten rounds waits for a window of 20 ms, and the eight threads wait together.
    assert taken > 10 * 0.9 * writing.LINGER_SECONDS


def test_threads_that_append_durably_share_commits_and_lose_nothing(folder, monkeypatch):
    commits = []
    whole = Transaction.put_head
    monkeypatch.setattr(Transaction, "put_head", lambda self, head: (commits.append(head.size), whole(self, head)))
    with Trail.open(folder, durability="always") as trail:
        commits.clear()
        found: list[int] = []

        def work(name: int) -> None:
            for number in range(50):
                index = trail.append("a.b", body(number), run=f"r{name}").index
                assert index is not None
                found.append(index)

        threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(found) == list(range(1, 401))
    assert len(commits) <= 400
    assert all(earlier < later for earlier, later in pairwise(commits))
    verdict = verify_trail(folder)
    assert (verdict.level, verdict.size) == (Level.UNANCHORED, 401)


@pytest.mark.parametrize(("durability", "asynchronous"), PACES)
def test_a_full_disk_is_told_to_whoever_waits_or_to_the_next_and_nothing_is_half_there(
    folder, durability, asynchronous
):
    trail = Trail.open(folder, durability=durability, asynchronous=asynchronous)
    kept = 0
    for kept in range(1, 4):
        trail.append("a.b", body(kept - 1)).wait()
    raw = trail._writer._store._database.opened()
    raw.execute(f"PRAGMA max_page_count={raw.execute('PRAGMA page_count').fetchone()[0]}")
    large = b'{"n":3,"x":"%s"}' % (b"y" * 30_000)
    if trail._writer.pace.waits:
        with pytest.raises(StoreError) as caught:
            trail.append("a.b", large)
    else:
        trail.append("a.b", large)
        with pytest.raises(StoreError) as caught:
            trail.flush()
    assert (caught.value.reason, "1 entries were not written" in caught.value.message) == ("disk-full", True)
    for refuse in (lambda: trail.append("a.b", b"{}"), trail.flush, trail.close):
        with pytest.raises(StoreError):
            refuse()
    assert numbers(folder) == list(range(kept))
    with Trail.open(folder) as again:
        again.append("a.b", body(kept)).wait()
    assert numbers(folder) == list(range(kept + 1))


# --- interrupts ---


def interrupting(place: str):
    """A KeyboardInterrupt at one place of the next commit: before it, within it, or when it is done."""
    execute = Session.execute

    def before(self, statement, values=()):
        if "head" in statement.sql and statement.sql.startswith("UPDATE") == (place == "within"):
            raise KeyboardInterrupt
        return execute(self, statement, values)

    return before


@pytest.mark.parametrize("place", ["before", "within"])
def test_an_interrupt_in_a_durable_append_neither_loses_nor_doubles_and_the_trail_goes_on(folder, monkeypatch, place):
    with Trail.open(folder, durability="always") as trail:
        trail.append("a.b", body(0))
        with monkeypatch.context() as patch:
            patch.setattr(Session, "execute", interrupting(place))
            with pytest.raises(KeyboardInterrupt):
                trail.append("a.b", body(1))
        assert trail.status().unsynced == 1
        assert trail.append("a.b", body(2)).index == 3
        assert trail.status().unsynced == 0
    assert numbers(folder) == [0, 1, 2]


@pytest.mark.parametrize("then", ["append", "flush", "close", "guarded"])
def test_an_interrupt_after_the_commit_does_not_write_the_entry_twice(folder, monkeypatch, then):
    with Trail.open(folder, durability="always") as trail:
        trail.append("a.b", body(0))
        with monkeypatch.context() as patch:

            def interrupt(_group):
                raise KeyboardInterrupt

            patch.setattr(writing, "_settle", interrupt)
            with pytest.raises(KeyboardInterrupt):
                trail.append("a.b", body(1))
        assert numbers(folder) == [0, 1]
        assert trail.status().unsynced == 1
        if then == "append":
            assert trail.append("a.b", body(2)).index == 3
        elif then == "flush":
            trail.flush()
        elif then == "guarded":
            assert trail.append_guarded("a.b", lambda reader: body(reader.size)).index == 3
    assert numbers(folder)[:2] == [0, 1]
    assert len(numbers(folder)) == (3 if then in {"append", "guarded"} else 2)


def test_interrupts_at_any_moment_neither_lose_nor_double(folder):
    """Real ones: a signal whose handler raises, again and again, in the middle of durable appends."""

    class Interrupt(BaseException):
        pass

    def interrupt(*_args):
        raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    handed_in = interrupted = 0
    try:
        with Trail.open(folder, durability="always") as trail:
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0002 + (handed_in % 37) * 0.00002)
                    while True:
                        trail.append("a.b", body(handed_in), run="r", private=b"x" if handed_in % 5 == 0 else None)
                        handed_in += 1
                except Interrupt:
                    interrupted += 1
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    trail.flush()
                    # Whether the interrupted one was handed in is seen from what is there.
                    handed_in = trail.status().size - 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 50
    assert numbers(folder) == list(range(handed_in))
    verdict = verify_trail(folder)
    assert (verdict.level, verdict.reasons) == (Level.UNANCHORED, ())


def test_a_signals_handler_may_not_append_in_the_middle_of_a_commit_of_its_own_thread(folder, monkeypatch):
    refused = []
    with Trail.open(folder, durability="always") as trail:

        def handler(*_args):
            try:
                trail.append("a.b", body(9))
            except EntryError as error:
                refused.append(error.reason)

        whole = Transaction.put_head

        def put_head(self, head):
            signal.raise_signal(signal.SIGUSR1)
            whole(self, head)

        before = signal.signal(signal.SIGUSR1, handler)
        try:
            monkeypatch.setattr(Transaction, "put_head", put_head)
            assert trail.append("a.b", body(0)).index == 1
        finally:
            signal.signal(signal.SIGUSR1, before)
        monkeypatch.undo()
    assert refused == ["nested-append"]


def test_a_handle_of_the_parent_does_not_hang_in_a_forked_child(folder, slow):
    with Trail.open(folder) as trail:
        trail.append("a.b", body(0)).wait()
        handle = trail.append("a.b", body(1))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                handle.wait(20)
            except StoreError as error:
                status = 0 if error.reason == "forked" else 2
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert handle.wait() == 2


# --- many at once ---


def test_a_bulk_is_durable_when_it_returns_and_gives_the_indexes(folder, monkeypatch):
    monkeypatch.setattr(writing, "BULK", 100)
    with Trail.open(folder) as trail:
        trail.append("a.b", body(0), run="r")
        drafts = (
            Draft("a.b", body(n), run="r", private=b"x" if n % 50 == 0 else None, owner="o") for n in range(1, 1001)
        )
        assert trail.append_many(drafts) == range(2, 1002)
        assert TrailReader.open(folder).size == 1002
        assert trail.append_many([]) == range(0)
        assert trail.append("a.b", body(1001), run="r").wait() == 1002
    assert numbers(folder) == list(range(1002))
    assert verify_trail(folder).reasons == ()


def test_what_others_append_in_between_shows_in_a_bulks_indexes(folder, monkeypatch):
    monkeypatch.setattr(writing, "BULK", 2)

    def drafts():
        for number in range(4):
            if number == 2:
                yield Draft("a.b", body(number))
                other.append("a.c", b"{}").wait()
            else:
                yield Draft("a.b", body(number))

    with Trail.open(folder) as trail, Trail.open(folder) as other:
        assert list(trail.append_many(drafts())) == [1, 2, 4, 5]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Draft("Not a type", b"{}"), "entry-type"),
        (Draft("a.b", b"[]"), "entry-body"),
        (Draft("a.b", b"{}", run="no name"), "entry-run"),
        (Draft("a.b", b'{"x":"' + b"y" * 70_000 + b'"}'), "entry-too-large"),
        (Draft("a.b", b'{"x":"' + b"y" * 65_500 + b'"}'), "entry-too-large"),
    ],
)
def test_a_bulk_writes_nothing_of_the_group_in_which_one_is_refused_and_says_so(folder, monkeypatch, bad, reason):
    monkeypatch.setattr(writing, "BULK", 10)
    with Trail.open(folder) as trail:
        with pytest.raises(EntryError, match="10 entries before it are in the trail") as caught:
            trail.append_many([*(Draft("a.b", body(n)) for n in range(15)), bad, Draft("a.b", body(99))])
        assert caught.value.reason == reason
        assert numbers(folder) == list(range(10))
        with pytest.raises(EntryError, match="None of the entries is in the trail"):
            trail.append_many([bad])
        assert trail.append("a.b", body(10)).wait() == 11


def test_a_bulk_that_the_disk_refuses_is_not_in_the_trail_and_no_more_is_taken(folder, monkeypatch):
    def broken(*_args):
        raise sqlite3.OperationalError("database or disk is full")

    trail = Trail.open(folder)
    trail.append("a.b", body(0))
    with monkeypatch.context() as patch:
        patch.setattr(Transaction, "put_head", lambda *_: None)
        patch.setattr(Transaction, "add_terms", broken)
        trail._writer._queue.clear()
        with pytest.raises(StoreError) as caught:
            trail.append_many([Draft("a.b", body(1))])
        assert caught.value.reason == "disk-full"
    with pytest.raises(StoreError):
        trail.append("a.b", body(2))
    with pytest.raises(StoreError):
        trail.close()
    with Trail.open(folder) as again:
        again.append("a.b", body(1)).wait()


def test_a_bulk_may_not_be_appended_within_a_guarded_append(folder):
    with Trail.open(folder) as trail:

        def inner(_reader):
            trail.append_many([Draft("a.b", b"{}")])
            return b"{}"

        with pytest.raises(EntryError) as caught:
            trail.append_guarded("a.b", inner)
        assert caught.value.reason == "nested-append"


# --- sizes at the limits ---


def exact(trail: Trail, size: int) -> bytes:
    """A body with which the next entry of the run ``edge`` has exactly ``size`` bytes."""
    index = trail.append("a.b", b"{}", run="edge").wait()
    (entry,) = trail.reader().entries(index)
    return b'{"x":"' + b"y" * (size - len(entry.data) - 6) + b'"}'


@pytest.mark.parametrize(("durability", "asynchronous"), PACES)
def test_an_empty_body_and_65535_bytes_fit_and_65536_do_not(folder, durability, asynchronous):
    with Trail.open(folder, durability=durability, asynchronous=asynchronous) as trail:
        assert trail.append("a.b", b"{}", run="edge").wait() == 1
        largest = exact(trail, 65_535)
        index = trail.append("a.b", largest, run="edge").wait()
        (entry,) = trail.reader().entries(index)
        assert len(entry.data) == 65_535
        over = largest[:-2] + b'y"}'
        for refuse in (
            lambda: trail.append("a.b", over, run="edge"),
            lambda: trail.append_many([Draft("a.b", over, run="edge")]),
            lambda: trail.append_guarded("a.b", lambda _reader: over, run="edge"),
        ):
            with pytest.raises(EntryError, match="has 65536 bytes; at most 65535 fit") as caught:
                refuse()
            assert caught.value.reason == "entry-too-large"
        assert trail.append_many([Draft("a.b", largest, run="edge")]) == range(index + 1, index + 2)
    verdict = verify_trail(folder)
    assert (verdict.level, verdict.reasons, verdict.size) == (Level.UNANCHORED, (), index + 2)


# --- who signs, and who else is here ---


def test_the_next_commits_are_signed_by_whoever_is_named(folder):
    with Trail.open(folder) as trail:
        (old,) = trail.signers
        new = Signer(trail.origin, Ed25519PrivateKey.generate())
        trail.append("a.b", body(0))
        trail.use_signers([old, new])
        assert trail.append("a.b", body(1)).wait() == 2
        both = {line.key_id for line in parse_note(trail.reader().checkpoint()).signatures}
        assert both == {old.verifier().key_id, new.verifier().key_id}
        trail.use_signers([new])
        trail.append("a.b", body(2)).wait()
        (line,) = parse_note(trail.reader().checkpoint()).signatures
        assert line.key_id == new.verifier().key_id
        assert trail.log_vkey.split("+")[1] == new.verifier().key_id.hex()
        assert trail.status().signer == trail.log_vkey
        with pytest.raises(ValueError, match="at least one"):
            trail.use_signers([])


def test_a_writer_with_the_old_key_is_refused_at_its_next_commit(folder):
    with Trail.open(folder) as trail:
        old = Trail.open(folder)
        old.append("a.b", body(0)).wait()
        new = Signer(trail.origin, Ed25519PrivateKey.generate())
        trail.use_signers([*trail.signers, new])
        trail.append("a.b", body(1)).wait()
        trail.use_signers([new])
        trail.append("a.b", body(2)).wait()
        with pytest.raises(StoreError) as caught:
            old.append("a.b", body(3)).wait()
        assert caught.value.reason == "rotated"
        assert "Open the trail again" in str(caught.value)
        with pytest.raises(StoreError):
            old.close()
    assert numbers(folder) == [0, 1, 2]


def test_a_trail_is_held_alone_only_where_nobody_else_has_it_open(folder):
    with Trail.open(folder) as trail:
        with trail.exclusive():
            assert trail.append("a.b", body(0)).wait() == 1
        with Trail.open(folder), pytest.raises(StoreError) as caught, trail.exclusive():
            pass
        assert caught.value.reason == "in-use"
        assert "1 other place" in str(caught.value)
        with trail.exclusive():
            pass


def test_nobody_opens_a_trail_that_is_held_alone(folder):
    opened = threading.Event()

    def other() -> None:
        with Trail.open(folder):
            opened.set()

    with Trail.open(folder) as trail:
        thread = threading.Thread(target=other)
        with trail.exclusive():
            thread.start()
            assert not opened.wait(0.3)
        assert opened.wait(10)
        thread.join()
