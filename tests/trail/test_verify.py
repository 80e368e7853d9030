"""Every change of what is stored is found, and its place is named."""

from __future__ import annotations

import base64
import json
import random
import shutil
import sqlite3

import pytest

from rlhf_audit_nb.errors import AuditError, KeyFileError, StoreError
from rlhf_audit_nb.trail import Level, Trail, TrailReader, TrustPolicy, Verdict, check_entries, verify_trail
from rlhf_audit_nb.trail.entry import Entry
from rlhf_audit_nb.trail.note import COSIGNATURE, Signer, cosign_note, format_vkey, parse_note
from rlhf_audit_nb.trail.verify import Reason


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
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

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
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

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
