"""A witness: what it cosigns, what it refuses, and that it never forgets."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import metamorphic_log
import pytest
from cryptography.exceptions import InvalidSignature
from support.processes import startable
from support.witnesses import Log, check_cosignature, tree

from rlhf_audit_nb.errors import FormatError, KeyFileError, StoreError
from rlhf_audit_nb.trail import Trail
from rlhf_audit_nb.trail.note import parse_note, parse_vkey, verify_note
from rlhf_audit_nb.trail.submission import format_submission, submission_of
from rlhf_audit_nb.trail.witness import Witness

ROOT = Path(__file__).parents[2]


@pytest.fixture
def witness(tmp_path):
    return Witness.create(tmp_path / "witness", "witness.example/alice", mldsa=False)


@pytest.fixture
def log(witness):
    made = Log("log.example/a").grow(600)
    assert witness.add_log(made.vkey)
    return made


def status(witness: Witness, body: bytes) -> int:
    return witness.add_checkpoint(body).status


def test_it_cosigns_a_growing_log_and_its_cosignatures_hold_for_others(witness, log):
    for old, size in ((0, 0), (0, 1), (1, 255), (255, 257), (257, 257), (257, 600)):
        before = int(time.time())
        reply = witness.add_checkpoint(log.body(old, size))
        assert (reply.status, reply.origin, reply.size) == (200, log.origin, size)
        (line,) = reply.body.decode().splitlines()
        text = parse_note(log.head(size)).text
        assert before <= check_cosignature(line, text, witness.vkeys[0]) <= time.time()
        with pytest.raises(InvalidSignature):
            check_cosignature(line, text.replace("log", "lag", 1), witness.vkeys[0])
        assert witness.size(log.origin) == size


def test_a_witness_with_two_keys_gives_two_lines_that_hold(tmp_path):
    witness = Witness.create(tmp_path / "w", "witness.example/pq", mldsa=True)
    log = Log("log.example/a").grow(3)
    witness.add_log(log.vkey)
    lines = witness.add_checkpoint(log.body(0)).body.decode()
    assert lines.count("\n") == len(witness.vkeys) == 2
    note = parse_note(log.head() + lines)
    held = verify_note(note, [parse_vkey(vkey) for vkey in witness.vkeys])
    assert [item.verifier.algorithm for item in held] == [4, 6]
    assert len({item.time for item in held}) == 1
    head = metamorphic_log.checkpoint_verify(log.head() + lines, [log.vkey])  # others read past the lines
    assert (head.origin, head.size, head.root) == (log.origin, 3, tree(log.leaves))
    again = Witness.open(tmp_path / "w")
    assert again.vkeys == witness.vkeys


REFUSALS = {
    "an unknown log": (404, lambda log: Log("log.example/b").grow(5).body(0)),
    "another key under its name": (403, lambda log: Log(log.origin).grow(5).body(0)),
    "an old size over the checkpoint's": (400, lambda log: log.body(0, 5).replace(b"old 0\n", b"old 6\n")),
    "an old size that is not the last": (409, lambda log: log.body(4, 20)),
    "an old size of 0 after the first": (409, lambda log: log.body(0, 20)),
    "no proof": (422, lambda log: b"old 10\n\n" + log.head(20).encode()),
    "another log's proof": (
        422,
        lambda log: log.forked(3).body(10, 20).split(b"\n\n")[0] + b"\n\n" + log.head(20).encode(),
    ),
    "a forked history": (422, lambda log: log.forked(9).body(10, 20)),
    "the same size with another root": (422, lambda log: log.forked(9).body(10, 10)),
    "the same size with a proof": (422, lambda log: b"old 10\n" + b"A" * 43 + b"=\n\n" + log.head(10).encode()),
    "a proof of 64 lines": (400, lambda log: b"old 10\n" + (b"A" * 43 + b"=\n") * 64 + b"\n" + log.head(20).encode()),
    "no old line": (400, lambda log: b"\n" + log.head(20).encode()),
    "an old size with a zero before it": (400, lambda log: log.body(10, 20).replace(b"old 10", b"old 010")),
    "an old size with a plus": (400, lambda log: log.body(10, 20).replace(b"old 10", b"old +10")),
    "a proof that is not base64": (400, lambda log: b"old 10\n!!!!\n\n" + log.head(20).encode()),
    "a hash of 31 bytes": (400, lambda log: b"old 10\n" + b"A" * 42 + b"==\n\n" + log.head(20).encode()),
    "no empty line": (400, lambda log: log.body(10, 20).replace(b"\n\n", b"\n")),
    "no checkpoint": (400, lambda log: b"old 10\n\n"),
    "nothing": (400, lambda log: b""),
    "bytes that are no text": (400, lambda log: b"old 10\n\n\xff\xfe"),
    "too much": (400, lambda log: log.body(10, 20) + b"x" * (300 << 10)),
    "a size of 2 to the 63": (
        400,
        lambda log: b"old 10\n\n" + log.signed(f"{log.origin}\n{1 << 63}\n{'A' * 43}=\n").encode(),
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_it_refuses_and_with_which_status(witness, log, case):
    expected, body = REFUSALS[case]
    assert status(witness, log.body(0, 10)) == 200
    before = witness.logs()
    reply = witness.add_checkpoint(body(log))
    assert reply.status == expected, reply.said
    assert "—" not in reply.body.decode()
    assert witness.logs() == before
    assert status(witness, log.body(10, 20)) == 200


def test_a_stale_request_is_told_the_size(witness, log):
    witness.add_checkpoint(log.body(0, 10))
    reply = witness.add_checkpoint(log.body(4, 20))
    assert (reply.status, reply.kind, reply.body) == (409, "text/x.tlog.size", b"10\n")
    fresh = Log("log.example/c").grow(9)
    witness.add_log(fresh.vkey)
    assert witness.add_checkpoint(fresh.body(4, 9)).body == b"0\n"


def test_an_empty_tree_with_another_root_and_a_proof_from_nothing_are_refused(witness, log):
    wrong = log.signed(log.origin + "\n0\n" + "A" * 43 + "=\n")
    assert status(witness, b"old 0\n\n" + wrong.encode()) == 422
    assert status(witness, b"old 0\n" + b"A" * 43 + b"=\n\n" + log.head(5).encode()) == 422
    assert status(witness, b"old 0\n\n" + log.head(0).encode()) == 200
    assert status(witness, log.body(0, 5)) == 200


def test_signatures_of_strangers_beside_the_logs_are_ignored(witness, log):
    stranger = Log("stranger.example", key=Log("x").key)
    line = stranger.signed(parse_note(log.head(5)).text).splitlines()[-1]
    body = log.body(0, 5) + (line + "\n").encode()
    assert status(witness, body) == 200
    with sqlite(witness) as state:
        (note,) = state.execute("SELECT note FROM heads").fetchone()
    assert note == log.head(5)


def sqlite(witness: Witness):
    import sqlite3
    from contextlib import closing

    return closing(sqlite3.connect(witness.folder / "state.sqlite"))


def test_a_log_that_rotated_its_key_goes_on_where_it_was(witness, log):
    witness.add_checkpoint(log.body(0, 10))
    after = Log(log.origin, list(log.leaves))
    assert status(witness, after.body(10, 20)) == 403
    assert witness.add_log(after.vkey)
    assert not witness.add_log(after.vkey)
    assert witness.size(log.origin) == 10
    assert status(witness, after.body(0, 20)) == 409
    assert status(witness, after.body(10, 20)) == 200


def test_adding_a_log_again_forgets_nothing(witness, log):
    witness.add_checkpoint(log.body(0, 10))
    assert not witness.add_log(log.vkey)
    assert status(witness, log.forked(3).body(0, 20)) == 409


def test_a_witness_key_is_no_log(witness, tmp_path):
    other = Witness.create(tmp_path / "other", "witness.example/bob")
    with pytest.raises(FormatError) as caught:
        witness.add_log(other.vkeys[0])
    assert caught.value.reason == "key-type"


def test_two_heads_of_one_size_are_kept_as_evidence_also_when_the_request_is_stale(witness, log):
    witness.add_checkpoint(log.body(0, 10))
    fork = log.forked(9)
    said = witness.add_checkpoint(fork.body(10, 10)).said
    assert "another root of size 10" in said
    assert "kept in" in said
    assert {path.read_text() for path in witness.evidence()} == {log.head(10), fork.head(10)}
    witness.add_checkpoint(log.body(10, 20))
    other = log.forked(8, "third")
    stale = witness.add_checkpoint(other.body(0, 10))
    assert (stale.status, stale.kind, stale.body) == (409, "text/x.tlog.size", b"20\n")
    assert {path.read_text() for path in witness.evidence()} == {log.head(10), fork.head(10), other.head(10)}


def test_a_head_that_no_proof_connects_is_kept_and_a_stale_one_is_not(witness, log):
    witness.add_checkpoint(log.body(0, 10))
    witness.add_checkpoint(log.body(4, 20))
    assert witness.evidence() == ()
    fork = log.forked(9)
    witness.add_checkpoint(fork.body(10, 20))
    assert {path.read_text() for path in witness.evidence()} == {log.head(10), fork.head(20)}


def test_what_nobody_signed_is_never_kept(witness, log):
    witness.add_checkpoint(log.body(0, 10))
    assert status(witness, Log(log.origin).grow(10, "x").body(10, 10)) == 403
    assert witness.evidence() == ()


def test_evidence_cannot_fill_a_disk(witness, log, monkeypatch):
    monkeypatch.setattr("rlhf_audit_nb.trail.heads.MAX_EVIDENCE", 6)
    witness.add_checkpoint(log.body(0, 10))
    for number in range(12):
        witness.add_checkpoint(log.forked(5, f"fork{number}").body(10, 10))
    kept = {path.read_text() for path in witness.evidence()}
    assert len(kept) == 6
    assert {log.head(10), log.forked(5, "fork0").head(10)} <= kept


def test_the_last_cosigned_checkpoint_is_shown_with_its_cosignature(witness, log):
    from hashlib import sha256

    name = sha256(log.origin.encode()).hexdigest()
    assert witness.checkpoint(name) is None
    assert witness.checkpoint("0" * 64) is None
    body = witness.add_checkpoint(log.body(0, 10)).body.decode()
    assert witness.checkpoint(name) == log.head(10) + body


def test_cosignatures_never_go_back_in_time(witness, log):
    assert status(witness, log.body(0, 10)) == 200
    now = time.time()
    reply = witness.add_checkpoint(log.body(10, 20), clock=lambda: now - 200)
    assert check_cosignature(reply.body.decode().strip(), parse_note(log.head(20)).text, witness.vkeys[0]) >= int(now)
    with pytest.raises(StoreError) as caught:
        witness.add_checkpoint(log.body(20, 30), clock=lambda: now - 4000)
    assert caught.value.reason == "clock"
    assert witness.size(log.origin) == 20


def test_of_many_threads_with_one_old_size_exactly_one_is_first(witness, log):
    witness.add_checkpoint(log.body(0, 10))
    bodies = [log.body(10, size) for size in range(11, 31)]
    replies, barrier = {}, threading.Barrier(len(bodies))

    def ask(number: int) -> None:
        barrier.wait()
        replies[number] = Witness.open(witness.folder).add_checkpoint(bodies[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [number for number, reply in replies.items() if reply.status == 200]
    assert len(won) == 1
    assert {reply.status for number, reply in replies.items() if number not in won} == {409}
    assert witness.size(log.origin) == 11 + won[0]


def _climb(folder, leaves, key, seed, out):
    """Ask for checkpoints of two forks in turn, as fast as one can, as a process of its own."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    drawn = random.Random(seed)
    witness = Witness.open(folder)
    signer = Ed25519PrivateKey.from_private_bytes(key)
    histories = [Log("log.example/a", items, signer) for items in leaves]
    given = []
    for _ in range(25):
        history = drawn.choice(histories)
        old = witness.size("log.example/a")
        size = min(len(history.leaves), old + drawn.randrange(1, 4))
        if witness.add_checkpoint(history.body(old, size)).status == 200:
            given.append(history.head(size))
    out.put(given)


def test_processes_that_race_with_two_histories_get_only_one_of_them_cosigned(witness, log):
    log.leaves = log.leaves[:120]
    fork = log.forked(2)
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    arguments = (str(witness.folder), (log.leaves, fork.leaves), log.key.private_bytes_raw())
    workers = [context.Process(target=_climb, args=(*arguments, seed, out)) for seed in range(3)]
    with startable():
        for worker in workers:
            worker.start()
    notes = [note for _ in workers for note in out.get(timeout=120)]
    for worker in workers:
        worker.join(30)
    heads = {int(note.split("\n")[1]): note for note in notes}
    assert len(notes) > 10
    # Whatever was cosigned beyond the point where they part is of one and the same history.
    beyond = [size for size in heads if size > 2]
    won, lost = (log, fork) if heads[beyond[0]] == log.head(beyond[0]) else (fork, log)
    assert {note for note in notes if int(note.split("\n")[1]) > 2} == {won.head(size) for size in beyond}
    assert witness.add_checkpoint(lost.body(max(heads), 120)).status == 422
    assert witness.add_checkpoint(won.body(max(heads), 120)).status == 200


COSIGN = """
import sys
from pathlib import Path
from rlhf_audit_nb.trail.witness import Witness
reply = Witness.open(sys.argv[1]).add_checkpoint(Path(sys.argv[2]).read_bytes())
print(reply.status, flush=True)
"""


@pytest.fixture(scope="module")
def strace():
    found = shutil.which("strace")
    if found is None or subprocess.run([found, "-o", os.devnull, "true"], capture_output=True).returncode != 0:
        pytest.skip("strace is not here or may not trace")
    return found


def traced(strace, witness, body: Path, *options: str):
    command = [strace, "-f", "-qq", *options, sys.executable, "-c", COSIGN, str(witness.folder), str(body)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "calls"),
    [
        ("signal=KILL", ("pwrite64", "fsync", "fdatasync", "unlink")),
        ("error=EIO", ("fsync", "fdatasync")),
        ("error=ENOSPC", ("pwrite64",)),
    ],
    ids=["killed", "disk error", "disk full"],
)
def test_stopped_at_any_system_call_of_its_memory_it_has_signed_nothing_that_it_forgot(
    tmp_path, witness, log, strace, fault, calls
):
    witness.add_checkpoint(log.body(0, 10))
    body, seen = tmp_path / "body", tmp_path / "trace"
    body.write_bytes(log.body(10, 20))
    shutil.copytree(witness.folder, tmp_path / "kept")
    assert traced(strace, witness, body, "-o", str(seen), "-e", "trace=" + ",".join(calls)).stdout == "200\n"
    made = {name: sum(f"{name}(" in line for line in seen.read_text().splitlines()) for name in calls}
    assert sum(made.values()) >= 3
    points = [(name, when) for name, count in made.items() for when in range(1, count + 1)]
    outcomes = set()
    for name, when in points:
        shutil.rmtree(witness.folder)
        shutil.copytree(tmp_path / "kept", witness.folder)
        inject = f"inject={name}:{fault}:when={when}"
        done = traced(strace, witness, body, "-o", os.devnull, "-e", f"trace={name}", "-e", inject)
        after = Witness.open(witness.folder)
        size = after.size(log.origin)
        assert size in (10, 20)
        if done.stdout == "200\n":
            assert size == 20
        elif "error" in fault and done.returncode:
            assert "StoreError" in done.stderr, done.stderr
        assert status(after, log.forked(5).body(size, 30)) == 422
        assert status(after, log.body(size, 30)) == 200
        outcomes.add((done.stdout, size))
    assert ("", 10) in outcomes


def test_a_witness_without_its_memory_does_not_go_on(witness):
    (witness.folder / "state.sqlite").unlink()
    with pytest.raises(StoreError) as caught:
        Witness.open(witness.folder)
    assert caught.value.reason == "no-memory"
    with pytest.raises(StoreError):
        witness.add_checkpoint(Log("log.example/a").grow(3).body(0))
    assert not (witness.folder / "state.sqlite").exists()


def test_a_damaged_memory_is_one_sentence_and_nothing_is_signed(witness, log):
    path = witness.folder / "state.sqlite"
    path.write_bytes(b"x" * 4096)
    with pytest.raises(StoreError) as caught:
        witness.add_checkpoint(log.body(0, 5))
    assert "state.sqlite" in caught.value.message
    assert "older copy" in caught.value.next_step


def test_a_witness_is_made_in_a_new_folder_only(witness, tmp_path):
    for place in (witness.folder, tmp_path):
        with pytest.raises(KeyFileError) as caught:
            Witness.create(place, "witness.example/alice")
        assert caught.value.reason == "not-empty"
    assert Witness.open(witness.folder).vkeys == witness.vkeys


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\nb"])
def test_a_name_that_cannot_sign_is_refused_and_makes_nothing(tmp_path, name):
    with pytest.raises(FormatError):
        Witness.create(tmp_path / "w", name)
    assert not (tmp_path / "w").exists()


def test_its_keys_can_be_encrypted_and_are_nobody_elses_to_read(tmp_path, monkeypatch):
    monkeypatch.delenv("RLHF_AUDIT_PASSPHRASE", raising=False)
    made = Witness.create(tmp_path / "w", "witness.example/alice", passphrase="open sesame", mldsa=True)
    for name in ("ed25519.pem", "mldsa44.pem", "state.sqlite", "witness.json"):
        assert (made.folder / name).stat().st_mode & 0o077 == 0
    assert b"ENCRYPTED" in (made.folder / "ed25519.pem").read_bytes()
    for passphrase in (None, "wrong"):
        with pytest.raises(KeyFileError) as caught:
            Witness.open(made.folder, passphrase=passphrase)
        assert caught.value.reason == "passphrase"
    told = Witness.open(made.folder, cosign=False)
    assert told.vkeys == made.vkeys
    log = Log("log.example/a").grow(3)
    assert told.add_log(log.vkey)
    with pytest.raises(KeyFileError):
        told.add_checkpoint(log.body(0))
    assert made.size(log.origin) == 0
    monkeypatch.setenv("RLHF_AUDIT_PASSPHRASE", "open sesame")
    assert Witness.open(made.folder).vkeys == made.vkeys


@pytest.mark.parametrize("name", ["witness.json", "ed25519.pem"])
def test_a_broken_folder_is_one_sentence(witness, name):
    (witness.folder / name).write_text("nonsense")
    with pytest.raises(KeyFileError, match="witness in"):
        Witness.open(witness.folder)
    with pytest.raises(KeyFileError) as caught:
        Witness.open(witness.folder / "nowhere")
    assert caught.value.reason == "no-witness"


def test_it_says_what_it_knows(witness, log):
    (known,) = witness.logs()
    assert (known.origin, known.vkeys, known.size, known.root, known.time) == (
        log.origin,
        (log.vkey,),
        None,
        None,
        None,
    )
    witness.add_checkpoint(log.body(0, 7))
    (known,) = witness.logs()
    assert (known.size, known.root) == (7, tree(log.leaves[:7]))
    assert abs(known.time - time.time()) < 60
    assert json.loads((witness.folder / "witness.json").read_bytes())["name"] == witness.name


def test_it_cosigns_a_real_trail_as_it_grows(folder, witness):
    with Trail.open(folder) as trail:
        witness.add_log(trail.log_vkey)
        for size in (3, 255, 257):
            for _ in range(size - trail.reader().size):
                trail.append("a.b", b"{}")
            reader = trail.reader()
            note = reader.checkpoint()
            asked = submission_of(note, witness.size(reader.origin), reader.consistency_proof)
            reply = witness.add_checkpoint(format_submission(asked))
            assert (reply.status, reply.size) == (200, size), reply.said
