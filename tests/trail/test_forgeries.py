"""A store that was changed anywhere, by anyone: with and without care, with and without the key.

A forger without the key rewrites entries and all that follows from them (leaf hashes, subtrees, frontier, index), and
only the signed roots are out of reach. The key-holder can sign all of it again: that is caught by the last-seen head,
and by nothing where nobody remembers and nobody has vouched for the first history.
"""

from __future__ import annotations

import shutil
import sqlite3
from itertools import combinations

import msgspec
import pytest

from rlhf_audit_nb.errors import AuditError
from rlhf_audit_nb.trail import Level, Trail, TrailReader, Verdict, verify_trail
from rlhf_audit_nb.trail.checkpoint import Checkpoint
from rlhf_audit_nb.trail.entry import Entry, encode_envelope
from rlhf_audit_nb.trail.keys import load_keys
from rlhf_audit_nb.trail.merkle import Frontier, leaf_hash
from rlhf_audit_nb.trail.note import sign_note
from rlhf_audit_nb.trail.store import pack_entries
from rlhf_audit_nb.trail.verify import EntryChecker

# What a trail says. The rest is the writer's bookkeeping: when it committed, and when it last kept a checkpoint.
CONTENT = {
    "head": "origin, size, note, frontier",
    "bundles": "first, count, hashes, data",
    "nodes": "level, number, hash",
    "checkpoints": "size, note",
    "streams": "stream, next, time",
    "terms": "term, first",
    "open_runs": "run, writer",
}


@pytest.fixture
def trail(folder):
    """Twelve entries in a few rows, of two runs."""
    with Trail.open(folder) as opened:
        for run in ("r", "s"):
            opened.append("run.started", b"{}", run=run).wait()
            for number in range(3):
                opened.append("train.step", b'{"step":%d}' % number, run=run)
            opened.append("run.finished", b'{"status":"completed"}', run=run).wait()
        opened.append("note.made", b'{"by":"hand"}').wait()
    return folder


@pytest.fixture
def tall(folder):
    """Over two full tiles."""
    with Trail.open(folder) as opened:
        for number in range(520):
            opened.append("train.step", b'{"step":%d}' % number, run="r")
    return folder


def outcome(folder) -> Verdict | AuditError:
    try:
        return verify_trail(folder)
    except AuditError as error:
        return error


def caught(found: Verdict | AuditError) -> bool:
    return isinstance(found, AuditError) or found.level is Level.INVALID


def entries_of(folder) -> list[bytes]:
    return [entry.data for entry in TrailReader.open(folder).entries()]


def rewrite(folder, entries: list[bytes], signer=None) -> None:
    """Put ``entries`` in the place of the trail's own, with all that follows from them; signed anew by ``signer``."""
    store = sqlite3.connect(folder / "trail.sqlite")
    frontier, nodes, roots, checker = Frontier(), [], {}, EntryChecker()
    for index, data in enumerate(entries):
        nodes += frontier.extend([leaf_hash(data)])
        roots[index + 1] = frontier.root()
        checker.add(Entry.decode(index, data))
    with store:
        spans = [(first, count) for first, count in store.execute("SELECT first, count FROM bundles ORDER BY first")]
        for table in ("bundles", "nodes", "terms", "streams", "open_runs"):
            store.execute(f"DELETE FROM {table}")
        for first, count in spans:
            part = entries[first : first + count]
            if first + count == sum(spans[-1]):
                part = entries[first:]
            if not part:
                continue
            leaves = b"".join(map(leaf_hash, part))
            row = (first, len(part), leaves, pack_entries(part))
            store.execute("INSERT INTO bundles (first, count, hashes, data) VALUES (?, ?, ?, ?)", row)
            for entry in (Entry.decode(first, data) for data in part):
                terms = ["t:" + entry.type, *(["r:" + entry.run] if entry.run else [])]
                store.executemany("INSERT OR IGNORE INTO terms VALUES (?, ?)", [(term, first) for term in terms])
        store.executemany("INSERT INTO nodes VALUES (?, ?, ?)", nodes)
        rows = [(name, state.next, state.time) for name, state in checker.streams.items()]
        store.executemany("INSERT INTO streams VALUES (?, ?, ?)", rows)
        store.executemany("INSERT INTO open_runs VALUES (?, ?)", checker.open_runs().items())
        store.execute("UPDATE head SET size=?, frontier=?", (len(entries), b"".join(frontier.nodes)))
        if signer is not None:
            origin = signer.name
            sizes = [size for (size,) in store.execute("SELECT size FROM checkpoints")]
            for size in sizes:
                if size > len(entries):
                    store.execute("DELETE FROM checkpoints WHERE size=?", (size,))
                else:
                    note = sign_note(Checkpoint(origin, size, roots[size]).format(), [signer])
                    store.execute("UPDATE checkpoints SET note=? WHERE size=?", (note, size))
            newest = sign_note(Checkpoint(origin, len(entries), frontier.root()).format(), [signer])
            store.execute("UPDATE head SET note=?, kept_size=min(kept_size, size)", (newest,))
    store.close()


def with_content_of(data: bytes, other: bytes) -> bytes:
    """The entry ``data`` with the type and body of ``other``, in its own place of its own stream."""
    mine, theirs = Entry.decode(0, data).envelope, Entry.decode(0, other).envelope
    return encode_envelope(msgspec.structs.replace(mine, type=theirs.type, body=theirs.body))


def signer_of(folder, home):
    return load_keys(home, TrailReader.open(folder).origin, None).signer


def forget(home) -> None:
    shutil.rmtree(home / "heads")


# The forger without the key.


def test_a_rewriting_that_changes_nothing_is_no_forgery(trail):
    """The control: `rewrite` is so good that only a changed entry can be what is found below."""
    rewrite(trail, entries_of(trail))
    assert verify_trail(trail).reasons == ()
    assert verify_trail(trail).level is Level.UNANCHORED


def test_every_pair_of_entries_that_is_swapped_with_all_that_follows_is_found(trail):
    entries = entries_of(trail)
    assert len(entries) == 12
    for one, other in combinations(range(len(entries)), 2):
        for change in (swapped_whole, swapped_in_content):
            forged = change(entries, one, other)
            rewrite(trail, forged)
            verdict = verify_trail(trail)
            if forged == entries:
                assert verdict.level is Level.UNANCHORED
                continue
            assert verdict.level is Level.INVALID
            assert "root" in {reason.code for reason in verdict.reasons}, (one, other)
    rewrite(trail, entries)
    assert verify_trail(trail).level is Level.UNANCHORED


def swapped_whole(entries: list[bytes], one: int, other: int) -> list[bytes]:
    forged = list(entries)
    forged[one], forged[other] = forged[other], forged[one]
    return forged


def swapped_in_content(entries: list[bytes], one: int, other: int) -> list[bytes]:
    """Sequence numbers and times go on as they should, so that nothing but the roots can show it."""
    forged = list(entries)
    forged[one] = with_content_of(entries[one], entries[other])
    forged[other] = with_content_of(entries[other], entries[one])
    return forged


@pytest.mark.parametrize("pair", [(0, 1), (1, 519), (254, 255), (255, 256), (256, 257), (511, 512), (519, 520)])
def test_swaps_across_tiles_are_found_and_their_span_is_named(tall, pair):
    entries = entries_of(tall)
    rewrite(tall, swapped_in_content(entries, *pair))
    verdict = verify_trail(tall)
    assert verdict.level is Level.INVALID
    (root,) = [reason for reason in verdict.reasons if reason.code == "root"]
    first, last = (int(word.rstrip(".")) for word in root.message.split("entries ")[1].split(" to "))
    assert first <= pair[0] <= last


@pytest.mark.parametrize("index", range(12))
def test_an_entry_that_is_taken_out_or_put_in_with_all_that_follows_is_found(trail, index):
    entries = entries_of(trail)
    for forged in (entries[:index] + entries[index + 1 :], [*entries[:index], entries[index], *entries[index:]]):
        rewrite(trail, forged)
        assert verify_trail(trail).level is Level.INVALID


# The key-holder.


@pytest.mark.parametrize("index", range(1, 12))
def test_a_whole_trail_that_is_rebuilt_and_signed_again_is_caught_by_the_last_seen_head_alone(trail, home, index):
    entries = entries_of(trail)
    forged = list(entries)
    forged[index] = with_content_of(entries[index], entries[11 if index < 11 else 2])
    forged[index] = forged[index].replace(b'"step"', b'"stop"')
    if forged == entries:
        forged[index] = entries[index].replace(b"{}", b'{"x":1}')
    assert forged != entries
    rewrite(trail, forged, signer_of(trail, home))
    verdict = verify_trail(trail)
    assert (verdict.level, verdict.reasons[0].code) == (Level.DIVERGED, "fork")
    forget(home)
    # Plainly: without a memory, a witness or a timestamp, nothing shows it.
    assert verify_trail(trail).level is Level.UNANCHORED


def test_a_trail_that_is_cut_or_prolonged_by_its_key_holder_is_caught_too(trail, home):
    entries, signer = entries_of(trail), signer_of(trail, home)
    for size in range(1, len(entries)):
        rewrite(trail, entries[:size], signer)
        verdict = verify_trail(trail)
        assert (verdict.level, verdict.reasons[0].code) == (Level.DIVERGED, "rollback")
    changed = [*entries[:11], entries[11].replace(b'"hand"', b'"foot"')]
    more = Entry.decode(11, entries[11]).envelope
    longer = encode_envelope(msgspec.structs.replace(more, seq=more.seq + 1))
    rewrite(trail, [*changed, longer], signer)
    assert verify_trail(trail).reasons[0].code == "fork"
    rewrite(trail, [*entries, longer], signer)
    assert verify_trail(trail).level is Level.UNANCHORED


# Every byte of the file.


def content(raw: bytes) -> dict[str, object]:
    """What SQLite reads of each table; ``None`` where it cannot."""
    connection = sqlite3.connect(":memory:")
    found: dict[str, object] = {}
    try:
        # Format 1 in place of 2 (a write-ahead log), which a database in memory cannot have.
        connection.deserialize(raw[:18] + b"\1\1" + raw[20:])
        for table, columns in CONTENT.items():
            try:
                found[table] = connection.execute(f"SELECT {columns} FROM {table}").fetchall()
            except (sqlite3.Error, UnicodeDecodeError):
                found[table] = None
    finally:
        connection.close()
    return found


@pytest.fixture
def least(folder):
    """The least trail: two entries, its file alone."""
    with Trail.open(folder) as opened:
        opened.append("run.started", b"{}", run="r").wait()
    assert not (folder / "trail.sqlite-wal").exists()
    return folder


def put(folder, raw: bytes) -> None:
    for name in ("trail.sqlite-wal", "trail.sqlite-shm"):
        (folder / name).unlink(missing_ok=True)
    (folder / "trail.sqlite").write_bytes(raw)


@pytest.mark.slow
def test_every_byte_of_the_file_that_is_flipped_is_found_or_changes_nothing(least):
    """A flip is either found, or every row that SQLite reads is as it was: then it is in space that nothing uses."""
    raw = (least / "trail.sqlite").read_bytes()
    whole = content(raw)
    assert None not in whole.values()
    entries = entries_of(least)
    found = unread = 0
    for at in range(len(raw)):
        changed = raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :]
        seen = content(changed)
        if at >= 100 and seen == whole:
            unread += 1
            continue
        put(least, changed)
        verdict = outcome(least)
        if caught(verdict):
            found += 1
            continue
        # Not found: only where the file's header, or the definition of a table without rows, is all that changed.
        assert entries_of(least) == entries, at
        assert all(rows == whole[table] or (rows is None and not whole[table]) for table, rows in seen.items()), at
    assert found > 2000
    assert unread > 10_000
    put(least, raw)
    assert verify_trail(least).level is Level.UNANCHORED


@pytest.mark.slow
def test_every_truncation_of_the_file_is_found(least):
    raw = (least / "trail.sqlite").read_bytes()
    for length in range(len(raw)):
        put(least, raw[:length])
        assert caught(outcome(least)), length
    put(least, raw)
    assert verify_trail(least).level is Level.UNANCHORED


def test_the_log_beside_the_file_cannot_be_cut_or_changed_without_a_trace(folder, tmp_path, home):
    """The write-ahead log of a writer that was killed: each cut or flip loses whole commits; the memory shows it."""
    opened = Trail.open(folder)
    for number in range(6):
        opened.append("a.b", b'{"n":%d}' % number).wait()
    entries = [entry.data for entry in opened.reader().entries()]
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(folder / "trail.sqlite", copy)
    log = (folder / "trail.sqlite-wal").read_bytes()
    opened.close()
    levels = []
    cuts = [log[:length] for length in range(0, len(log) + 1, 997)]
    flips = [log[:at] + bytes([log[at] ^ (1 << at % 8)]) + log[at + 1 :] for at in range(0, len(log), 499)]
    for changed in (*cuts, *flips):
        for name in ("trail.sqlite-shm", "trail.sqlite-wal"):
            (copy / name).unlink(missing_ok=True)
        (copy / "trail.sqlite-wal").write_bytes(changed)
        verdict = outcome(copy)
        if isinstance(verdict, Verdict) and verdict.level is Level.UNANCHORED:
            assert entries_of(copy) == entries
        elif not caught(verdict):
            assert (verdict.level, verdict.reasons[0].code) == (Level.DIVERGED, "rollback")
            kept = entries_of(copy)
            assert kept == entries[: len(kept)]
        levels.append(verdict.level if isinstance(verdict, Verdict) else None)
    assert Level.DIVERGED in levels


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE VIEW terms AS SELECT * FROM kept WHERE strftime('%Y') < '2100'",
        "CREATE TABLE terms AS SELECT * FROM kept; CREATE INDEX odd ON terms (term)",
        "CREATE TRIGGER odd AFTER INSERT ON bundles BEGIN DELETE FROM open_runs; END; ALTER TABLE kept RENAME TO terms",
    ],
)
def test_a_file_that_can_answer_otherwise_later_is_refused(trail, statement):
    """A view that lets everything through today says what its maker likes to whoever asks tomorrow."""
    store = sqlite3.connect(trail / "trail.sqlite")
    store.executescript(f"ALTER TABLE terms RENAME TO kept; {statement}")
    store.close()
    verdict = verify_trail(trail)
    assert verdict.level is Level.INVALID
    assert {reason.code for reason in verdict.reasons} == {"store"}
