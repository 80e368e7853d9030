"""Every change of what is stored is found, and its place is named."""

from __future__ import annotations

import base64
import contextlib
import gc
import itertools
import json
import os
import random
import shutil
import sqlite3
import time
import tracemalloc

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rlhf_audit_nb.errors import AuditError, KeyFileError, StoreError
from rlhf_audit_nb.trail import Level, Trail, TrailReader, TrustPolicy, Verdict, check_entries, verify_trail
from rlhf_audit_nb.trail.anchors import AnchorFolder
from rlhf_audit_nb.trail.checkpoint import checkpoint_of
from rlhf_audit_nb.trail.entry import Entry
from rlhf_audit_nb.trail.erasure import erase
from rlhf_audit_nb.trail.note import COSIGNATURE, Signer, cosign_note, format_vkey, parse_note, sign_note
from rlhf_audit_nb.trail.proof import InclusionProof, format_proof
from rlhf_audit_nb.trail.rotation import rotate_key
from rlhf_audit_nb.trail.verdict import Reason
from rlhf_audit_nb.trail.verify import EntryChecker, verify_proof
from rlhf_audit_nb.trail.writer import Draft


@pytest.fixture
def small(folder):
    """A trail of 5 entries in 4 rows, closed."""
    with Trail.open(folder) as trail:
        trail.append("run.started", b"{}", run="r").wait()
        for number in range(2):
            trail.append("train.step", b'{"step":%d}' % number, run="r")
        trail.flush()
        trail.append("run.finished", b'{"status":"completed"}', run="r").wait()
    return folder


@pytest.fixture
def tall(folder):
    """A trail that reaches over two full tiles."""
    with Trail.open(folder) as trail:
        for number in range(600):
            trail.append("train.step", b'{"step":%d}' % number, run="r")
    return folder


def change(folder, statement: str, *values) -> None:
    connection = sqlite3.connect(folder / "trail.sqlite")
    connection.execute("PRAGMA synchronous=OFF")
    with connection:
        assert connection.execute(statement, values).rowcount != 0
    connection.close()


def select(folder, statement: str, *values):
    connection = sqlite3.connect(folder / "trail.sqlite")
    rows = connection.execute(statement, values).fetchall()
    connection.close()
    return rows


def forget(home) -> None:
    shutil.rmtree(home / "heads")


def outcome(folder) -> Verdict | AuditError:
    try:
        return verify_trail(folder)
    except AuditError as error:
        return error


def codes(verdict: Verdict) -> set[str]:
    return {reason.code for reason in verdict.reasons}


def test_a_whole_trail_is_unanchored_and_says_how_far_that_reaches(small):
    verdict = verify_trail(small)
    assert verdict.level is Level.UNANCHORED
    assert verdict.exit_code() == 0
    assert verdict.exit_code(Level.COSIGNED) == 10
    data = verdict.to_dict()
    assert list(data) == ["level", "origin", "size", "root", "signers", "runs", "reasons", "anchors", "openings"]
    assert (data["level"], data["size"], data["reasons"]) == ("UNANCHORED", 5, [])
    assert len(base64.b64decode(data["root"])) == 32
    assert data["runs"] == [{"run": "r", "status": "completed", "entries": 4, "first": 1, "last": 4}]
    assert json.loads(json.dumps(data)) == data


def test_a_printed_verdict_begins_with_its_level_and_names_every_fault():
    whole = Verdict(Level.UNANCHORED, "example.com/a", 3, "cm9vdA==", ("example.com/a+1+k",))
    assert str(whole) == "UNANCHORED: example.com/a, 3 entries, root cm9vdA==, signed by example.com/a+1+k"
    broken = Verdict(Level.INVALID, "example.com/a", 3, "", reasons=(Reason("leaf", "entry 2", "It was changed."),))
    assert str(broken).splitlines()[1] == "  entry 2: It was changed. [leaf]"
    assert "signed by nobody that is trusted" in str(broken)


def test_the_exit_codes_are_those_of_the_levels():
    assert [level.exit_code for level in Level] == [40, 30, 10, 5, 0]


def flips(value: bytes | str):
    raw = value.encode() if isinstance(value, str) else value
    for at in range(len(raw)):
        yield at, raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def test_a_flip_of_any_byte_of_any_entry_is_found_and_its_entry_named(small):
    home_rows = select(small, "SELECT first, count, data FROM bundles")
    for first, count, data in home_rows:
        owner, at = {}, 0
        for number in range(count):
            length = int.from_bytes(data[at : at + 2], "big")
            owner.update(dict.fromkeys(range(at, at + 2 + length), first + number))
            at += 2 + length
        for at, changed in flips(data):
            change(small, "UPDATE bundles SET data=? WHERE first=?", changed, first)
            verdict = verify_trail(small)
            assert verdict.level is Level.INVALID
            assert verdict.exit_code() == 40
            assert any(f"entry {owner[at]}" in f"{reason.where} {reason.message}" for reason in verdict.reasons)
        change(small, "UPDATE bundles SET data=? WHERE first=?", data, first)
    assert verify_trail(small).level is Level.UNANCHORED


def test_a_flip_of_any_byte_of_the_leaf_hashes_is_found_and_its_entry_named(small):
    for first, hashes in select(small, "SELECT first, hashes FROM bundles"):
        for at, changed in flips(hashes):
            change(small, "UPDATE bundles SET hashes=? WHERE first=?", changed, first)
            (reason,) = verify_trail(small).reasons
            assert (reason.code, reason.where) == ("leaf-hash", f"entry {first + at // 32}")
        change(small, "UPDATE bundles SET hashes=? WHERE first=?", hashes, first)


def test_a_flip_of_any_byte_of_a_checkpoint_is_found_and_the_checkpoint_named(small):
    (note,) = select(small, "SELECT note FROM head")[0]
    for _at, changed in flips(note):
        change(small, "UPDATE head SET note=CAST(? AS TEXT)", changed)
        assert verify_trail(small).level is Level.INVALID
    change(small, "UPDATE head SET note=?", note)
    for size, note in select(small, "SELECT size, note FROM checkpoints"):
        for _at, changed in flips(note):
            change(small, "UPDATE checkpoints SET note=CAST(? AS TEXT) WHERE size=?", changed, size)
            verdict = verify_trail(small)
            assert verdict.level is Level.INVALID
            assert any(r.where == f"checkpoint {size}" or r.code == "store" for r in verdict.reasons)
        change(small, "UPDATE checkpoints SET note=? WHERE size=?", note, size)
    assert verify_trail(small).level is Level.UNANCHORED


def test_a_flip_in_a_stored_subtree_or_the_frontier_is_found(tall):
    for level, number, value in select(tall, "SELECT level, number, hash FROM nodes"):
        for _at, changed in list(flips(value))[::5]:
            change(tall, "UPDATE nodes SET hash=? WHERE level=? AND number=?", changed, level, number)
            (reason,) = verify_trail(tall).reasons
            assert (reason.code, reason.where) == ("node", f"entries {number * 256} to {number * 256 + 255}")
        change(tall, "UPDATE nodes SET hash=? WHERE level=? AND number=?", value, level, number)
    (frontier,) = select(tall, "SELECT frontier FROM head")[0]
    for _at, changed in list(flips(frontier))[::7]:
        change(tall, "UPDATE head SET frontier=?", changed)
        assert codes(verify_trail(tall)) == {"frontier"}


def test_an_entry_rewritten_together_with_its_leaf_hash_is_found_by_the_signed_roots(tall):
    from rlhf_audit_nb.trail.merkle import leaf_hash
    from rlhf_audit_nb.trail.store import pack_entries, unpack_entries

    first, count, hashes, data = select(tall, "SELECT * FROM bundles WHERE first >= 256 ORDER BY first")[0]
    entries = unpack_entries(data, count)
    entries[1] = entries[1].replace(b'"step":', b'"stop":')
    changed = hashes[:32] + leaf_hash(entries[1]) + hashes[64:]
    change(tall, "UPDATE bundles SET data=?, hashes=? WHERE first=?", pack_entries(entries), changed, first)
    verdict = verify_trail(tall)
    assert verdict.level is Level.INVALID
    assert {"root", "node"} <= codes(verdict)
    assert Reason("node", "entries 256 to 511", verdict.reasons[0].message) == verdict.reasons[0]


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ("DELETE FROM bundles WHERE first = (SELECT max(first) FROM bundles)", "size"),
        ("DELETE FROM bundles WHERE first = 0", "bundle"),
        ("DELETE FROM head", "store"),
        ("DELETE FROM nodes WHERE number = 1", "node"),
        ("INSERT INTO nodes SELECT 1, 77, hash FROM nodes WHERE number = 1", "node"),
        ("UPDATE head SET size = size - 1", "checkpoint"),
        ("UPDATE head SET size = 'many'", "store"),
        ("UPDATE head SET origin = 'example.com/other'", "no-key"),
        ("UPDATE bundles SET count = count - 1 WHERE first = 0", "bundle"),
        ("UPDATE bundles SET data = 'text' WHERE first = 0", "store"),
        ("UPDATE bundles SET first = 100000 WHERE first = 0", "bundle"),
        ("INSERT INTO bundles SELECT -5, count, hashes, data FROM bundles WHERE first = 0", "bundle"),
        ("INSERT INTO bundles SELECT 1 << 62, count, hashes, data FROM bundles WHERE first = 0", "bundle"),
        ("DELETE FROM terms WHERE term = 't:trail.created'", "index"),
        ("UPDATE terms SET term = 't:other' WHERE term = 't:trail.created'", "index"),
        ("UPDATE streams SET next = next + 1", "index"),
        ("INSERT INTO open_runs VALUES ('r', 'w')", "index"),
        ("UPDATE checkpoints SET size = 999999 WHERE size = (SELECT max(size) FROM checkpoints)", "checkpoint"),
        ("UPDATE checkpoints SET time = 'soon'", "store"),
        ("DROP TABLE nodes", "store"),
        ("PRAGMA user_version = 99", "unknown-layout"),
        ("PRAGMA application_id = 99", "store"),
    ],
)
def test_rows_taken_away_put_in_or_changed_are_found(tall, statement, code):
    connection = sqlite3.connect(tall / "trail.sqlite")
    with connection:
        connection.execute(statement)
    connection.close()
    found = outcome(tall)
    assert isinstance(found, AuditError) or found.level is Level.INVALID
    assert code in ({found.reason} if isinstance(found, AuditError) else codes(found))


def test_flips_anywhere_in_the_file_never_pass_for_another_content(small, home):
    path = small / "trail.sqlite"
    raw = path.read_bytes()
    content = [entry.data for entry in TrailReader.open(small).entries()]
    chance = random.Random(7)
    found = 0
    for _ in range(250):
        at = chance.randrange(len(raw))
        path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << chance.randrange(8))]) + raw[at + 1 :])
        for name in ("trail.sqlite-wal", "trail.sqlite-shm"):
            (small / name).unlink(missing_ok=True)
        verdict = outcome(small)
        if isinstance(verdict, Verdict) and verdict.level is Level.UNANCHORED:
            assert [entry.data for entry in TrailReader.open(small).entries()] == content
        else:
            found += 1
    assert found > 20


@pytest.mark.parametrize("size", [0, 10, 100, 5000])
def test_a_cut_file_is_no_trail_or_invalid(small, size):
    path = small / "trail.sqlite"
    path.write_bytes(path.read_bytes()[:size])
    for name in ("trail.sqlite-wal", "trail.sqlite-shm"):
        (small / name).unlink(missing_ok=True)
    found = outcome(small)
    assert isinstance(found, StoreError) or found.level is Level.INVALID
    assert str(path) in str(found)


def test_a_wrong_key_and_an_unknown_log_are_said(small, tmp_path, home):
    origin = verify_trail(small).origin
    for name, code in ((origin, "unsigned"), ("example.com/other", "untrusted-log")):
        stranger = TrustPolicy.of(format_vkey(Signer(name, Ed25519PrivateKey.generate()).verifier()))
        verdict = verify_trail(small, policy=stranger)
        assert verdict.level is Level.INVALID
        assert codes(verdict) == {code}
    with pytest.raises(KeyFileError) as caught:
        verify_trail(small, home=tmp_path / "nobody")
    assert "--policy" in caught.value.next_step


def test_a_policy_serves_where_there_are_no_keys(small, tmp_path, home):
    vkey = next((home / "keys").rglob("log.vkey")).read_text().strip()
    policy = TrustPolicy.parse(TrustPolicy.of(vkey).format())
    verdict = verify_trail(small, policy=policy, home=tmp_path / "auditor")
    assert (verdict.level, verdict.signers) == (Level.UNANCHORED, (vkey,))


def test_the_quorum_of_the_policy_makes_it_cosigned(small, home):
    witness = Signer("witness.example/one", Ed25519PrivateKey.generate())
    vkey = next((home / "keys").rglob("log.vkey")).read_text().strip()
    text = f"log {vkey}\nwitness one {format_vkey(witness.verifier(COSIGNATURE))}\nquorum one\n"
    policy = TrustPolicy.parse(text)
    missing = verify_trail(small, policy=policy)
    assert (missing.level, codes(missing), missing.exit_code()) == (Level.UNANCHORED, {"quorum"}, 10)
    (note,) = select(small, "SELECT note FROM head")[0]
    change(small, "UPDATE head SET note=?", cosign_note(parse_note(note), witness, 1_700_000_000).format())
    cosigned = verify_trail(small, policy=policy)
    assert (cosigned.level, cosigned.reasons, cosigned.exit_code(Level.COSIGNED)) == (Level.COSIGNED, (), 0)


def test_a_quorum_that_can_be_reached_twice_is_told(small, home):
    one, two = (Signer(f"witness.example/{name}", Ed25519PrivateKey.generate()) for name in ("one", "two"))
    vkey = next((home / "keys").rglob("log.vkey")).read_text().strip()
    keys = "".join(f"witness {w.name[-3:]} {format_vkey(w.verifier(COSIGNATURE))}\n" for w in (one, two))
    (note,) = select(small, "SELECT note FROM head")[0]
    signed = cosign_note(cosign_note(parse_note(note), one, 1_700_000_000), two, 1_700_000_001)
    change(small, "UPDATE head SET note=?", signed.format())
    for threshold, said in (("any", {"split-view"}), ("all", set())):
        policy = TrustPolicy.parse(f"log {vkey}\n{keys}group both {threshold} one two\nquorum both\n")
        verdict = verify_trail(small, policy=policy)
        assert (verdict.level, codes(verdict), verdict.exit_code()) == (Level.COSIGNED, said, 0)


def test_an_older_copy_of_the_store_diverges_and_the_evidence_is_kept(small, home, tmp_path):
    old = tmp_path / "old.sqlite"
    shutil.copy(small / "trail.sqlite", old)
    with Trail.open(small) as trail:
        trail.append("a.b", b"{}").wait()
        newer = trail.reader().checkpoint()
    shutil.copy(old, small / "trail.sqlite")
    verdict = verify_trail(small)
    assert verdict.level is Level.DIVERGED
    assert verdict.exit_code() == 30
    assert codes(verdict) == {"rollback"}
    kept = {path.read_text() for path in (home / "heads").glob("*.diverged/*.checkpoint")}
    assert newer in kept
    assert len(kept) == 2
    assert verify_trail(small).level is Level.DIVERGED
    asked = verify_trail(small, policy=witnessed(home))
    assert [reason.code for reason in asked.reasons] == ["rollback", "quorum"]  # what matters most comes first
    with pytest.raises(StoreError) as caught:
        Trail.open(small)
    assert caught.value.reason == "diverged"
    forget(home)
    assert verify_trail(small).level is Level.UNANCHORED


def test_another_history_of_the_same_key_diverges(small, home, tmp_path):
    old = tmp_path / "old.sqlite"
    shutil.copy(small / "trail.sqlite", old)
    with Trail.open(small) as trail:
        trail.append("a.b", b'{"told":1}').wait()
    memory = tmp_path / "memory"
    shutil.copytree(home / "heads", memory)
    shutil.copy(old, small / "trail.sqlite")
    forget(home)
    with Trail.open(small) as trail:
        for _ in range(3):
            trail.append("a.b", b'{"told":2}').wait()
    forget(home)
    assert verify_trail(small).level is Level.UNANCHORED
    forget(home)
    shutil.copytree(memory, home / "heads")
    verdict = verify_trail(small)
    assert (verdict.level, codes(verdict)) == (Level.DIVERGED, {"fork"})
    with pytest.raises(StoreError) as caught:
        Trail.open(small)
    assert caught.value.reason == "diverged"


def test_a_damaged_memory_of_the_head_is_said(small, home):
    path = next((home / "heads").glob("*.checkpoint"))
    path.write_text("nonsense")
    with pytest.raises(StoreError) as caught:
        verify_trail(small)
    assert caught.value.reason == "last-seen"
    assert str(path) in caught.value.message


def made(index: int, **changes) -> Entry:
    fields = {"v": 1, "type": "a.b", "time": 10 + index, "run": "r", "seq": index, "writer": "w", "body": {}, **changes}
    return Entry.decode(index, json.dumps(fields, separators=(",", ":")).encode())


def test_gaps_and_times_that_run_back_are_named():
    good = [made(0), made(1), made(2)]
    assert check_entries(good)[0] == ()
    reasons, runs = check_entries([made(0), made(2), made(3, seq=2), made(4, seq=3, time=5)])
    assert [(reason.code, reason.where) for reason in reasons] == [
        ("sequence", "entry 2"),
        ("sequence", "entry 3"),
        ("time", "entry 4"),
    ]
    assert (runs[0].status, runs[0].entries, runs[0].first, runs[0].last) == ("open", 4, 0, 4)
    assert check_entries([made(1, seq=0), made(0, seq=1)])[0][0].code == "order"
    assert check_entries([made(0, seq=1)])[0][0].code == "sequence"


def test_a_choice_of_entries_may_leave_out_others_of_a_writer_but_none_of_a_run():
    loose = [made(5, run=None, seq=3), made(9, run=None, seq=8), made(10, seq=0), made(11, seq=1)]
    assert check_entries(loose, whole=False)[0] == ()
    assert {reason.code for reason in check_entries(loose)[0]} == {"sequence"}
    assert check_entries([*loose, made(12, seq=3)], whole=False)[0][0].where == "entry 12"
    assert check_entries([made(5, run=None, seq=3), made(9, run=None, seq=3)], whole=False)[0][0].code == "sequence"


def test_runs_take_their_status_from_their_end():
    ends = [
        made(0, type="run.started"),
        made(1, type="run.finished", body={"status": "failed"}),
        made(2, run="s", seq=0, type="run.started"),
        made(3, run=None, seq=0, type="run.interrupted", body={"run": "s", "last_sequence": 0}),
        made(4, run="t", seq=0, type="run.started"),
    ]
    reasons, runs = check_entries(ends)
    assert reasons == ()
    assert [(run.run, run.status) for run in runs] == [("r", "failed"), ("s", "interrupted"), ("t", "open")]


# What was not closed.


def test_a_run_that_was_never_closed_is_said_and_costs_no_level(folder, tmp_path):
    trail = Trail.open(folder)
    trail.append("run.started", b"{}", run="r").wait()
    alive = verify_trail(folder)
    assert (alive.level, alive.reasons, alive.runs[0].status) == (Level.UNANCHORED, (), "open")
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(folder / "trail.sqlite", copy)
    shutil.copy(folder / "trail.sqlite-wal", copy)
    gone = verify_trail(copy)
    assert (gone.level, gone.exit_code()) == (Level.UNANCHORED, 0)
    (reason,) = gone.reasons
    assert (reason.code, reason.where, reason.advisory) == ("run-open", "run r", True)
    assert "The process that wrote it is gone; entry 1 is its last." in reason.message
    trail.append("run.finished", b'{"status":"completed"}', run="r").wait()
    trail.close()
    assert verify_trail(folder).reasons == ()


def test_whether_a_run_still_goes_on_is_not_guessed_where_it_cannot_be_known():
    checker = EntryChecker()
    checker.add(made(0, type="run.started"))
    assert "cannot be known" in next(checker.unended()).message
    assert "cannot be known" in next(checker.unended(lambda _writer: None)).message
    assert "is gone" in next(checker.unended(lambda _writer: False)).message
    assert list(checker.unended(lambda _writer: True)) == []


def test_a_commit_time_that_would_hide_entries_from_a_query_is_said(tall):
    assert verify_trail(tall).reasons == ()
    change(tall, "UPDATE checkpoints SET time = time - 120000000 WHERE size = (SELECT max(size) FROM checkpoints)")
    verdict = verify_trail(tall)
    assert (verdict.level, codes(verdict)) == (Level.UNANCHORED, {"commit-time"})


# What others have said.

WITNESS = Signer("witness.example/one", Ed25519PrivateKey.generate())


def witnessed(home) -> TrustPolicy:
    vkey = next((home / "keys").rglob("log.vkey")).read_text().strip()
    return TrustPolicy.parse(f"log {vkey}\nwitness one {format_vkey(WITNESS.verifier(COSIGNATURE))}\nquorum one\n")


def cosign(folder, when: int = 1_700_000_000) -> int:
    """The witness cosigns the newest checkpoint; its size."""
    note = TrailReader.open(folder).checkpoint()
    AnchorFolder(folder).keep(note)
    AnchorFolder(folder).cosign(cosign_note(parse_note(note), WITNESS, when).format())
    return checkpoint_of(note).size


def test_a_quorum_beside_the_newest_checkpoint_counts_and_one_that_is_older_is_told(small, home):
    policy = witnessed(home)
    size = cosign(small)
    verdict = verify_trail(small, policy=policy)
    assert (verdict.level, verdict.reasons) == (Level.COSIGNED, ())
    assert [(a.kind, a.size, a.time, a.where) for a in verdict.anchors] == [
        ("cosignature", size, 1_700_000_000, f"anchors/{size}.cosigned")
    ]
    assert base64.b64encode(verdict.anchors[0].root).decode() == verdict.root
    with Trail.open(small) as trail:
        for _ in range(3):
            trail.append("a.b", b"{}").wait()
    later = verify_trail(small, policy=policy)
    assert (later.level, later.exit_code(), codes(later)) == (Level.UNANCHORED, 10, {"quorum"})
    assert "It did so up to entry 4; what came after rests on the log's key alone." in later.reasons[0].message
    assert later.anchors == verdict.anchors
    plain = verify_trail(small)
    assert (plain.level, codes(plain)) == (Level.UNANCHORED, {"anchor-unknown"})


def test_a_trail_that_was_anchored_and_rewritten_has_diverged_although_nobody_remembers_its_head(small, home, tmp_path):
    policy = witnessed(home)
    old = tmp_path / "old.sqlite"
    shutil.copy(small / "trail.sqlite", old)
    with Trail.open(small) as trail:
        trail.append("a.b", b'{"told":1}').wait()
    size = cosign(small)
    shutil.copy(old, small / "trail.sqlite")
    forget(home)
    shorter = verify_trail(small, policy=policy)
    assert (shorter.level, shorter.exit_code(), codes(shorter)) == (Level.DIVERGED, 30, {"rollback", "quorum"})
    assert shorter.reasons[0].where == f"anchors/{size}.cosigned"
    with Trail.open(small) as trail:
        for _ in range(3):
            trail.append("a.b", b'{"told":2}').wait()
    rewritten = verify_trail(small, policy=policy)
    assert (rewritten.level, codes(rewritten)) == (Level.DIVERGED, {"anchor-fork", "quorum"})
    assert rewritten.anchors == ()
    kept = [checkpoint_of(path.read_text()) for path in (home / "heads").glob("*.diverged/*.checkpoint")]
    at = {head.root for head in kept if head.size == size}
    assert at
    assert base64.b64decode(rewritten.root) in {head.root for head in kept}
    (small / "anchors" / f"{size}.cosigned").unlink()
    assert verify_trail(small, policy=policy).level is Level.UNANCHORED


def test_files_that_anybody_could_have_put_beside_a_trail_lower_nothing_and_hide_nothing(tall, home):
    anchors = tall / "anchors"
    anchors.mkdir()
    for size in range(300):
        (anchors / f"{size}.cosigned").write_text("nonsense")
    verdict = verify_trail(tall)
    assert (verdict.level, verdict.exit_code(), codes(verdict)) == (Level.UNANCHORED, 0, {"anchor"})
    assert len(verdict.reasons) <= 100
    change(tall, "UPDATE streams SET next = next + 1")
    broken = verify_trail(tall)
    assert (broken.level, broken.reasons[0].code) == (Level.INVALID, "index")


# Private halves.


@pytest.fixture
def private(folder):
    """Six entries with private halves of two owners."""
    with Trail.open(folder) as trail:
        for number in range(6):
            trail.append("a.b", b"{}", private=b'{"n":%d}' % number, owner=f"owner-{number % 2}").wait()
    return folder


def vault(folder, statement: str, *values) -> None:
    connection = sqlite3.connect(folder / "vault.sqlite")
    with connection:
        assert connection.execute(statement, values).rowcount
    connection.close()


def test_a_missing_opening_is_invalid_and_its_entry_named(private):
    whole = verify_trail(private)
    assert whole.level is Level.UNANCHORED
    assert whole.openings == {
        "checked": True, "commitments": 6, "openings": 6, "erased": 0, "missing": 0, "decrypted": False,
    }  # fmt: skip
    vault(private, "DELETE FROM openings WHERE id = 3")
    verdict = verify_trail(private)
    assert (verdict.level, verdict.openings["missing"]) == (Level.INVALID, 1)
    assert [(reason.code, reason.where) for reason in verdict.reasons] == [("opening-missing", "entry 3")]


def test_a_trail_without_its_vault_still_verifies_and_says_that_it_was_not_looked_for(private):
    for path in private.glob("vault.sqlite*"):
        path.unlink()
    verdict = verify_trail(private)
    assert (verdict.level, verdict.reasons) == (Level.UNANCHORED, ())
    assert (verdict.openings["checked"], verdict.openings["commitments"]) == (False, 6)


def test_openings_are_opened_where_that_is_asked(private):
    verdict = verify_trail(private, openings=True)
    assert (verdict.level, verdict.openings["decrypted"]) == (Level.UNANCHORED, True)
    vault(private, "UPDATE openings SET sealed = (SELECT sealed FROM openings WHERE id = 2) WHERE id = 4")
    assert verify_trail(private).level is Level.UNANCHORED
    swapped = verify_trail(private, openings=True)
    assert (swapped.level, [(r.code, r.where) for r in swapped.reasons]) == (
        Level.INVALID,
        [("opening-wrong", "entry 4")],
    )


# Memory and proof files.


def test_memory_does_not_grow_with_the_trail(tmp_path, home):
    """Peak memory of verifying 6,000 and 60,000 entries; checkpoints, rows and index terms grow tenfold with them."""
    peaks = []
    for number in (6_000, 60_000):
        folder = tmp_path / f"of-{number}"
        with Trail.open(folder) as trail:
            for start in range(0, number, 200):
                trail.append_many(
                    Draft(type="train.step", body=b'{"step":%d}' % n, run="r") for n in range(start, start + 200)
                )
        with sqlite3.connect(folder / "trail.sqlite") as connection:
            assert connection.execute("SELECT count(*) FROM checkpoints").fetchone()[0] >= number // 256
        gc.collect()
        verify_trail(folder)  # fills the interpreter's lists of free objects, which are no use of memory
        gc.disable()  # a collection would empty them
        tracemalloc.start()
        try:
            assert verify_trail(folder).size == number + 1
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
            gc.enable()
    # Nothing for each of the 54,000 entries more; a list of the 270 checkpoints more would already be too much.
    assert peaks[1] < peaks[0] + 65_536, peaks


def test_a_proof_file_and_the_entry_are_enough(small, home, tmp_path):
    policy = witnessed(home)
    reader = TrailReader.open(small)
    entries = list(reader.entries())
    proof = format_proof(InclusionProof(2, tuple(reader.inclusion_proof(2)), reader.checkpoint()))
    auditor = tmp_path / "auditor"
    verdict = verify_proof(proof, entries[2].data, policy=policy, home=auditor)
    assert (verdict.level, codes(verdict), verdict.size) == (Level.UNANCHORED, {"quorum"}, 5)
    assert verify_proof(proof, entries[2].data).reasons == ()
    wrong = verify_proof(proof, entries[3].data)
    assert (wrong.level, [(r.code, r.where) for r in wrong.reasons]) == (Level.INVALID, [("inclusion", "entry 2")])
    for at in range(len(entries[2].data)):
        changed = bytearray(entries[2].data)
        changed[at] ^= 1
        assert verify_proof(proof, bytes(changed)).level is Level.INVALID
    with_witness = cosign_note(parse_note(reader.checkpoint()), WITNESS, 1_700_000_000).format()
    cosigned = format_proof(InclusionProof(2, tuple(reader.inclusion_proof(2)), with_witness))
    assert verify_proof(cosigned, entries[2].data, policy=policy, home=auditor).level is Level.COSIGNED
    stranger = TrustPolicy.of(format_vkey(Signer(reader.origin, Ed25519PrivateKey.generate()).verifier()))
    assert codes(verify_proof(proof, entries[2].data, policy=stranger, home=auditor)) == {"unsigned"}


def test_a_proof_from_another_history_of_the_same_size_diverges(small, home, tmp_path):
    reader = TrailReader.open(small)
    entry = next(reader.entries())
    proof = format_proof(InclusionProof(0, tuple(reader.inclusion_proof(0)), reader.checkpoint()))
    forget(home)
    other = tmp_path / "other"
    with Trail.open(other, origin=reader.origin) as trail:
        for number in range(4):
            trail.append("a.b", b'{"n":%d}' % number).wait()
    verdict = verify_proof(proof, entry.data)
    assert (verdict.level, codes(verdict)) == (Level.DIVERGED, {"fork"})


# Keys over time, and a trail that goes on while it is looked at.


def test_who_trusts_any_key_of_a_trail_follows_its_changes_of_keys(folder, home):
    with Trail.open(folder) as trail:
        trust = [TrustPolicy.of(trail.log_vkey)]
        for _ in range(2):
            trail.append("a.b", b"{}").wait()
            rotate_key(trail, "log", reason="planned")
            trust.append(TrustPolicy.of(trail.log_vkey))
        trail.append("a.b", b"{}").wait()
    for policy in trust:
        verdict = verify_trail(folder, policy=policy)
        assert (verdict.level, verdict.reasons) == (Level.UNANCHORED, ()), policy
    change(folder, "DELETE FROM terms WHERE term = 't:key.rotated'")
    for policy in trust:
        verdict = verify_trail(folder, policy=policy)
        assert (verdict.level, "index" in codes(verdict)) == (Level.INVALID, True)


def test_a_head_that_is_signed_by_a_key_that_was_replaced_is_invalid(folder, home):
    with Trail.open(folder) as trail:
        before, policy = trail.keys.signer, TrustPolicy.of(trail.log_vkey)
        rotate_key(trail, "log", reason="planned")
        trail.append("a.b", b"{}").wait()
    assert verify_trail(folder, policy=policy).level is Level.UNANCHORED
    (note,) = select(folder, "SELECT note FROM head")[0]
    change(folder, "UPDATE head SET note=?", sign_note(parse_note(note).text, [before]))
    verdict = verify_trail(folder, policy=policy)
    assert (verdict.level, verdict.reasons[0].code, verdict.reasons[0].where) == (
        Level.INVALID,
        "retired-key",
        "newest checkpoint",
    )


def test_a_trail_that_goes_on_and_loses_annotators_while_it_is_verified_holds_at_every_look(folder, home):
    Trail.open(folder).close()
    child = os.fork()
    if child == 0:
        failed = True
        with contextlib.suppress(BaseException), Trail.open(folder) as trail:
            until = time.monotonic() + 2.5
            for turn in itertools.count():
                for owner in ("ann", "bob"):
                    for _ in range(5):
                        trail.append("a.b", b"{}", private=b"{}", owner=owner)
                trail.flush()
                erase(trail, ("ann", "bob")[turn % 2], reason="request")
                if turn % 5 == 0:
                    rotate_key(trail, "log", reason="planned")
                if time.monotonic() > until:
                    failed = False
                    break
        os._exit(failed)
    looks, ended = 0, (0, 0)
    while ended == (0, 0):
        verdict = verify_trail(folder)
        assert (verdict.level, verdict.reasons) == (Level.UNANCHORED, ())
        looks += 1
        ended = os.waitpid(child, os.WNOHANG)
    assert ended == (child, 0)
    assert looks > 3
    assert verify_trail(folder).openings["missing"] == 0


def test_an_erasure_that_was_stopped_half_way_is_said_and_is_not_waited_for_for_ever(private, monkeypatch):
    monkeypatch.setattr("rlhf_audit_nb.trail.verify.ERASING_SECONDS", 0.1)
    with Trail.open(private) as trail:
        erase(trail, "owner-0", reason="request")
    vault(private, "UPDATE erasures SET logged = 0, name = 'f' || substr(name, 2)")
    verdict = verify_trail(private)
    assert verdict.level is Level.INVALID
    assert {"erasure-unfinished", "opening-missing"} <= codes(verdict)


@pytest.mark.slow
def test_a_timestamp_of_the_newest_checkpoint_makes_it_timestamped_where_its_authority_is_trusted(
    small, home, tmp_path
):
    from support.tsa import Authority

    authority = Authority.make(tmp_path / "tsa")
    authority.certify()
    kept = AnchorFolder(small).keep(TrailReader.open(small).checkpoint())
    AnchorFolder(small).stamp(5, "local", authority.stamp(kept))
    unknown = verify_trail(small)
    assert (unknown.level, codes(unknown), unknown.exit_code()) == (Level.UNANCHORED, {"tsa-unknown"}, 0)
    root = authority.ca.read_bytes()
    stamped = verify_trail(small, tsa_roots=[root])
    assert (stamped.level, stamped.reasons, stamped.exit_code(Level.TIMESTAMPED)) == (Level.TIMESTAMPED, (), 0)
    assert stamped.exit_code(Level.COSIGNED) == 5
    (home / "tsa").mkdir()
    shutil.copy(authority.ca, home / "tsa" / "local.pem")
    assert verify_trail(small) == stamped
    both = verify_trail(small, policy=witnessed(home))
    assert (both.level, both.exit_code(), codes(both)) == (Level.TIMESTAMPED, 5, {"quorum"})
    with Trail.open(small) as trail:
        trail.append("a.b", b"{}").wait()
    later = verify_trail(small)
    assert (later.level, later.anchors) == (Level.UNANCHORED, stamped.anchors)
    rewritten = entries_rewritten(small)
    assert rewritten.level is Level.INVALID


def entries_rewritten(folder) -> Verdict:
    change(folder, "UPDATE bundles SET data = replace(data, 'step', 'stop') WHERE first = 2")
    return verify_trail(folder)
