"""Opening, appending, reading, proofs, the vault and recovery."""

from __future__ import annotations

import base64
import json
import os
import sqlite3
import threading
from contextlib import closing

import metamorphic_log
import pytest

from rlhf_audit_nb.errors import EntryError, KeyFileError, StoreError
from rlhf_audit_nb.trail import Level, Trail, TrailReader, verify_trail
from rlhf_audit_nb.trail.merkle import Frontier, check_consistency, check_inclusion, leaf_hash


def fill(trail: Trail, count: int, run: str = "r") -> None:
    for number in range(count):
        trail.append("train.step", b'{"step":%d}' % number, run=run)
    trail.flush()


def test_a_new_trail_begins_with_its_name_and_its_keys(folder, home):
    with Trail.open(folder) as trail:
        (first,) = trail.reader().entries()
        body = json.loads(first.body)
        assert first.type == "trail.created"
        assert first.seq == 0
        assert body["origin"] == trail.origin
        assert body["log_key"] == trail.log_vkey
        assert base64.b64decode(body["record_key"]) == trail.keys.record_spki
        assert base64.b64decode(body["model_key"]) == trail.keys.model_spki
        assert list(body) == ["origin", "log_key", "record_key", "model_key", "tool"]
        assert trail.origin.startswith("rlhf-audit.local/")
    assert not list(folder.rglob("*.pem"))
    for path in (home / "keys").rglob("*.*"):
        if path.is_file():
            assert path.stat().st_mode & 0o077 == 0


def test_entries_come_back_in_order_with_gapless_numbers_and_times(folder):
    with Trail.open(folder) as trail:
        handles = [trail.append("a.b", b'{"n":%d}' % n, run="r" if n % 3 else None) for n in range(700)]
        trail.flush()
        assert [handle.index for handle in handles] == list(range(1, 701))
        entries = list(trail.reader().entries())
    assert [entry.index for entry in entries] == list(range(701))
    assert [json.loads(entry.body)["n"] for entry in entries[1:]] == list(range(700))
    for stream in {entry.stream for entry in entries}:
        own = [entry for entry in entries if entry.stream == stream]
        assert [entry.seq for entry in own] == list(range(len(own)))
        assert [entry.time for entry in own] == sorted(entry.time for entry in own)
    assert {entry.stream for entry in entries if entry.run is None} == {f"writer:{entries[0].envelope.writer}"}


def test_a_handle_has_no_index_before_the_entry_is_durable_and_wait_gives_it(folder):
    with Trail.open(folder) as trail:
        handle = trail.append("a.b", b"{}")
        assert handle.wait(10) == 1
        assert handle.index == 1
        assert trail.status().unsynced == 0


def test_always_is_durable_when_append_returns(folder):
    with Trail.open(folder, durability="always") as trail:
        for number in range(1, 5):
            assert trail.append("a.b", b"{}").index == number
            assert TrailReader.open(folder).size == number + 1


def test_the_window_closes_by_itself(folder):
    with Trail.open(folder) as trail:
        handle = trail.append("a.b", b"{}")
        for _ in range(200):
            if handle.done:
                break
            threading.Event().wait(0.01)
        assert handle.index == 1


def test_queries_find_by_type_and_by_run_and_from_a_place(folder):
    with Trail.open(folder) as trail:
        for number in range(1200):
            trail.append(f"t.{number % 3}", b"{}", run=f"r{number % 2}")
            if number % 100 == 0:
                trail.flush()
        reader = trail.reader()
    everything = list(reader.entries())
    assert list(reader.entries(type="t.1")) == [entry for entry in everything if entry.type == "t.1"]
    assert list(reader.entries(run="r1")) == [entry for entry in everything if entry.run == "r1"]
    both = [entry for entry in everything if entry.run == "r1" and entry.type == "t.2"]
    assert list(reader.entries(type="t.2", run="r1")) == both
    assert list(reader.entries(500, 510)) == everything[500:510]
    assert list(reader.entries(300, 900, type="t.0")) == [e for e in everything[300:900] if e.type == "t.0"]
    assert list(reader.entries(type="no.such")) == []
    assert list(reader.entries(5000)) == []


def test_a_reader_keeps_the_state_that_it_was_opened_at(folder):
    with Trail.open(folder) as trail:
        fill(trail, 10)
        reader = trail.reader()
        fill(trail, 10)
        assert reader.size == 11
        assert len(list(reader.entries())) == 11
        assert trail.reader().size == 21


def test_proofs_from_the_store_hold_under_the_signed_checkpoint_and_for_others(folder):
    with Trail.open(folder) as trail:
        for count in (1, 253, 1, 1, 1, 300, 255):
            fill(trail, count)
        reader, vkey = trail.reader(), trail.log_vkey
    leaves = [leaf_hash(entry.data) for entry in reader.entries()]
    note = reader.checkpoint()
    head = metamorphic_log.checkpoint_verify(note, [vkey])
    assert head.size == reader.size == len(leaves) == 813
    roots = {}
    frontier = Frontier()
    for size, leaf in enumerate(leaves, 1):
        frontier.extend([leaf])
        roots[size] = frontier.root()
    for index in (0, 1, 254, 255, 256, 257, 511, 512, 811, 812):
        proof = reader.inclusion_proof(index)
        assert check_inclusion(leaves[index], index, 813, proof, roots[813])
        metamorphic_log.checkpoint_verify_inclusion(note, [vkey], index, leaves[index], proof)
        for size in {index + 1, 600, 768}:
            if index < size:
                assert check_inclusion(leaves[index], index, size, reader.inclusion_proof(index, size), roots[size])
    for first in (0, 1, 2, 255, 256, 257, 512, 700, 813):
        proof = reader.consistency_proof(first)
        assert check_consistency(first, 813, proof, roots[first] if first else Frontier().root(), roots[813])
        assert reader.root(first) == (roots[first] if first else Frontier().root())
    with pytest.raises(StoreError):
        reader.inclusion_proof(813)
    with pytest.raises(StoreError):
        reader.consistency_proof(2, 900)


def exact(size: int, trail: Trail) -> bytes:
    """A body that makes the next entry of the run ``edge`` exactly ``size`` bytes."""
    probe = trail.append("a.b", b"{}", run="edge")
    probe.wait()
    (entry,) = trail.reader().entries(probe.index)
    return b'{"x":"' + b"y" * (size - len(entry.data) - 6) + b'"}'


def test_an_entry_of_65535_bytes_fits_and_one_of_65536_is_refused_and_leaves_no_gap(folder):
    with Trail.open(folder) as trail:
        body = exact(65_535, trail)
        index = trail.append("a.b", body, run="edge").wait()
        assert len(next(trail.reader().entries(index)).data) == 65_535
        with pytest.raises(EntryError) as caught:
            trail.append("a.b", body[:-2] + b'y"}', run="edge")
        assert caught.value.reason == "entry-too-large"
        with pytest.raises(EntryError):
            trail.append("a.b", b'{"x":"' + b"y" * 70_000 + b'"}')
        with pytest.raises(EntryError):
            trail.append_guarded("a.b", lambda _reader: body[:-2] + b'y"}', run="edge")
        trail.append("a.b", b"{}", run="edge").wait()
    assert verify_trail(folder).level is Level.UNANCHORED


def test_what_cannot_stand_in_an_entry_is_refused_before_anything_is_queued(folder):
    with Trail.open(folder) as trail:
        for kind, body, run in (("A", b"{}", None), ("a", b"[]", None), ("a", b"{", None), ("a", b"{}", "a b")):
            with pytest.raises(EntryError):
                trail.append(kind, body, run=run)
        assert trail.reader().size == 1


def test_times_are_floored_from_the_first_coarse_one_on_and_never_run_back_within_a_stream(folder, monkeypatch):
    clock = iter([5_000_000_123_000, 5_000_000_999_000, 4_000_000_000_000, 5_000_000_500_000] + [9 * 10**18] * 99)
    with Trail.open(folder) as trail:
        monkeypatch.setattr("rlhf_audit_nb.trail.trail.time.time_ns", lambda: next(clock))
        for _ in range(2):
            trail.append("a.b", b"{}", run="r", resolution_us=1000)
        for _ in range(2):  # an exact time after a coarse one would tell how long that took
            trail.append("a.b", b"{}", run="r")
        monkeypatch.undo()
        times = [entry.time for entry in trail.reader().entries(run="r")]
    assert times == [5_000_000_000] * 4


@pytest.mark.parametrize("coarse", [True, False])
def test_coarse_times_leave_no_trace_of_what_was_committed_together(folder, coarse):
    """Rows, times of commits and the history of checkpoints are the same however fast entries come."""

    def stored(name: str, pauses: set[int]) -> list[list[tuple[int, ...]]]:
        with Trail.open(folder / name, origin=f"example.com/{name}") as trail:
            opened = trail.status().last_commit_time_us
            for number in range(300):
                trail.append("a.b", b"{}", run="r", resolution_us=10**15 if coarse else 1)
                if number in pauses:
                    trail.flush()
            trail.flush()
            assert (trail.status().last_commit_time_us == opened) is coarse
            with closing(sqlite3.connect(folder / name / "trail.sqlite")) as store:
                rows = store.execute("SELECT first, count FROM bundles ORDER BY first").fetchall()
                kept = store.execute("SELECT size FROM checkpoints WHERE size > 1 ORDER BY size").fetchall()
        return [rows, kept]

    first, second = stored("one", {3, 10, 200, 290}), stored("two", {50, 100, 150, 256, 298})
    assert (first == second) is coarse
    if coarse:
        assert first == [[(index, 1) for index in range(301)], [(256,)]]


def test_a_guarded_append_sees_the_trail_and_appends_nothing_where_its_body_raises(folder):
    with Trail.open(folder) as trail:
        trail.append("a.b", b"{}", run="r")
        entry = trail.append_guarded("g.g", lambda reader: b'{"size":%d}' % reader.size, run="r")
        assert (entry.index, json.loads(entry.body), entry.seq) == (2, {"size": 2}, 1)

        def refuse(reader: TrailReader) -> bytes:
            assert [item.type for item in reader.entries()] == ["trail.created", "a.b", "g.g"]
            assert len(reader.inclusion_proof(2)) == 1
            raise LookupError("no budget")

        with pytest.raises(LookupError, match="no budget"):
            trail.append_guarded("g.g", refuse, run="r")

        def fail(_reader: TrailReader) -> bytes:
            raise sqlite3.OperationalError("a database of the caller's own is full")

        with pytest.raises(sqlite3.OperationalError, match="caller's own"):
            trail.append_guarded("g.g", fail, run="r")
        trail.append("a.b", b"{}", run="r").wait()
        assert trail.reader().size == 4
    assert verify_trail(folder).reasons == ()


def test_a_guarded_append_may_not_append_within_itself(folder):
    with Trail.open(folder) as trail:
        for inner in (
            lambda: trail.append("a.b", b"{}"),
            lambda: trail.append_guarded("a.b", lambda _reader: b"{}"),
            trail.flush,
        ):

            def body(_reader, inner=inner):
                inner()
                return b"{}"

            with pytest.raises(EntryError) as caught:
                trail.append_guarded("g.g", body)
            assert caught.value.reason == "nested-append"
        assert trail.append("a.b", b"{}").wait() == 1


def test_many_threads_append_without_a_gap(folder):
    def work(name: str) -> None:
        for _ in range(200):
            trail.append("a.b", b"{}", run=name)

    with Trail.open(folder) as trail:
        threads = [threading.Thread(target=work, args=(f"r{number}",)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert trail.reader().size == 1201
    assert verify_trail(folder).reasons == ()


def test_the_queue_is_bounded(folder):
    with Trail.open(folder) as trail:
        most = 0
        for _ in range(5000):
            trail.append("a.b", b"{}")
            most = max(most, trail.status().unsynced)
        assert 0 < most <= 1000


def test_status_tells_the_newest_commit(folder):
    with Trail.open(folder) as trail:
        fill(trail, 5)
        status = trail.status()
        assert (status.size, status.unsynced, status.signer) == (6, 0, trail.log_vkey)
        assert status.root == trail.reader().root()
        assert status.note == trail.reader().checkpoint()
        assert status.last_commit_time_us > 0


def test_a_closed_trail_refuses_and_opens_again_where_it_was(folder):
    trail = Trail.open(folder)
    trail.append("a.b", b"{}", run="r")
    trail.close()
    trail.close()
    with pytest.raises(StoreError) as caught:
        trail.append("a.b", b"{}")
    assert caught.value.reason == "closed"
    with Trail.open(folder) as again:
        assert again.origin == trail.origin
        assert again.append("a.b", b"{}", run="r").wait() == 2
        assert [entry.seq for entry in again.reader().entries(run="r")] == [0, 1]
    assert not list((folder / "writers").glob("*.lock"))


# --- keys and opening ---


def test_keys_are_encrypted_under_a_passphrase_and_a_wrong_one_is_said(folder, home):
    with Trail.open(folder, passphrase="right") as trail:
        origin = trail.origin
    assert b"ENCRYPTED" in next((home / "keys").rglob("log.pem")).read_bytes()
    assert verify_trail(folder).level is Level.UNANCHORED
    for passphrase in ("wrong", None):
        with pytest.raises(KeyFileError) as caught:
            Trail.open(folder, passphrase=passphrase)
        assert caught.value.reason == "passphrase"
    os.environ["RLHF_AUDIT_PASSPHRASE"] = "right"
    try:
        with Trail.open(folder) as trail:
            assert trail.origin == origin
            trail.append("a.b", b"{}", private=b"x").wait()
    finally:
        del os.environ["RLHF_AUDIT_PASSPHRASE"]


def test_a_trail_without_its_keys_can_be_read_but_not_appended_to(folder, home, tmp_path):
    with Trail.open(folder) as trail:
        fill(trail, 3)
    with pytest.raises(KeyFileError) as caught:
        Trail.open(folder, home=tmp_path / "elsewhere")
    assert caught.value.reason == "no-key"
    assert TrailReader.open(folder).size == 4
    with pytest.raises(KeyFileError) as caught:
        verify_trail(folder, home=tmp_path / "elsewhere")
    assert caught.value.reason == "no-key"
    # A policy that lies beside what it vouches for vouches for nothing.
    assert "by another way" in caught.value.next_step


@pytest.mark.parametrize("name", ["log.pem", "record.pem", "model.pem", "vault.key", "log.vkey"])
def test_a_damaged_key_file_is_said(folder, home, name):
    Trail.open(folder).close()
    path = next((home / "keys").rglob(name))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(KeyFileError):
        Trail.open(folder)


def test_an_origin_is_kept_and_another_is_refused(folder):
    with Trail.open(folder, origin="example.com/mine") as trail:
        assert trail.origin == "example.com/mine"
    Trail.open(folder, origin="example.com/mine").close()
    with pytest.raises(StoreError) as caught:
        Trail.open(folder, origin="example.com/yours")
    assert caught.value.reason == "origin"


def test_a_second_trail_of_an_origin_that_was_seen_is_refused(folder, tmp_path):
    Trail.open(folder, origin="example.com/mine").close()
    with pytest.raises(StoreError) as caught:
        Trail.open(tmp_path / "other", origin="example.com/mine")
    assert caught.value.reason == "diverged"


def test_no_trail_is_made_where_none_is_asked_for(tmp_path, home):
    for call in (
        lambda: Trail.open(tmp_path / "none", create=False),
        lambda: TrailReader.open(tmp_path / "none"),
        lambda: verify_trail(tmp_path / "none"),
    ):
        with pytest.raises(StoreError) as caught:
            call()
        assert caught.value.reason == "no-trail"
    assert not (tmp_path / "none").exists()


def test_the_environment_names_the_trail(tmp_path, home, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_TRAIL", str(tmp_path / "named"))
    with Trail.open() as trail:
        assert trail.location == tmp_path / "named"
    with pytest.raises(StoreError, match="database URL"):
        Trail.open("postgresql+psycopg://host/db")


def test_the_names_of_new_folders_are_on_the_disk_before_anything_is_promised_in_them(tmp_path, home, monkeypatch):
    synced = []
    monkeypatch.setattr("rlhf_audit_nb.trail.trail.sync_folder", synced.append)
    Trail.open(tmp_path / "a" / "b" / "audit").close()
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    Trail.open(tmp_path / "a" / "b" / "audit").close()
    assert len(synced) == 3


def test_a_link_in_place_of_the_store_is_refused(folder, tmp_path):
    Trail.open(folder).close()
    (folder / "trail.sqlite").rename(tmp_path / "real.sqlite")
    (folder / "trail.sqlite").symlink_to(tmp_path / "real.sqlite")
    for call in (lambda: verify_trail(folder), lambda: Trail.open(folder), lambda: TrailReader.open(folder)):
        with pytest.raises(StoreError) as caught:
            call()
        assert caught.value.reason == "link"


def test_runs_that_live_in_this_process_are_not_marked_by_a_second_opening(folder):
    with Trail.open(folder) as first:
        first.append("run.started", b"{}", run="r").wait()
        with Trail.open(folder) as second:
            assert second.recovery.interrupted == ()
        first.append("run.finished", b'{"status":"completed"}', run="r").wait()
    with Trail.open(folder) as third:
        assert third.recovery.interrupted == ()
    (run,) = verify_trail(folder).runs
    assert (run.run, run.status, run.entries) == ("r", "completed", 2)


def test_a_run_left_open_is_marked_once_with_its_last_number(folder):
    with Trail.open(folder) as trail:
        trail.append("run.started", b"{}", run="r")
        fill(trail, 4)
    assert verify_trail(folder).runs[0].status == "open"
    with Trail.open(folder) as trail:
        (found,) = trail.recovery.interrupted
        assert (found.run, found.last_sequence) == ("r", 4)
        (entry,) = trail.reader().entries(type="run.interrupted")
        assert (json.loads(entry.body), entry.run) == ({"run": "r", "last_sequence": 4}, None)
    with Trail.open(folder) as trail:
        assert trail.recovery.interrupted == ()
    assert verify_trail(folder).runs[0].status == "interrupted"
