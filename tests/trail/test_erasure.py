"""Erasing an annotator: gone from every byte, told in the trail, finished after any crash, and never undone."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_audit_nb.errors import KeyFileError, StoreError, VaultError
from rlhf_audit_nb.trail import Level, Trail, TrailReader, verify_trail
from rlhf_audit_nb.trail.erasure import erase, finish_erasures
from rlhf_audit_nb.trail.vault import VAULT_ERASED, OpeningsCheck, Vault
from rlhf_audit_nb.trail.vault_file import Wrapping

ROOT = Path(__file__).parents[2]
ANN, BEN = "ann-7f3a@example.com", "ben-19c2@example.com"
SECRET = b"prefers the second answer of pair 4711"


def filled(folder: Path, *owners: str | None, entries: int = 4) -> list[bytes]:
    """A trail with private payloads of each owner; their commitments."""
    with Trail.open(folder) as trail:
        for number in range(entries):
            for owner in owners or (ANN, BEN, None):
                body = SECRET + b" %d" % number + (owner or "the run").encode(errors="replace")
                trail.append("a.b", b"{}", run="r", private=body, owner=owner)
    return commitments(folder)


def commitments(folder: Path) -> list[bytes]:
    entries = TrailReader.open(folder).entries(type="a.b")
    return [base64.b64decode(entry.envelope.sealed) for entry in entries]


def look(folder: Path):
    looked = OpeningsCheck(folder / "vault.sqlite")
    for entry in TrailReader.open(folder).entries():
        looked.add(entry)
    return looked.finish(), {reason.code for reason in looked.reasons}


def erasures(folder: Path) -> list[dict[str, object]]:
    return [json.loads(entry.body) for entry in TrailReader.open(folder).entries(type=VAULT_ERASED)]


def every_byte(*folders: Path) -> bytes:
    # By another process: a file that is opened and closed in this one loses the locks that SQLite holds on it here.
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    assert files
    return subprocess.run(["cat", *files], capture_output=True, check=True).stdout


def secrets_of(folder: Path, owner: str) -> dict[str, bytes]:
    """All that is of an owner in the vault, and what only they could be read with."""
    with Trail.open(folder) as trail:
        vault, master = trail.vault, trail.keys.master.newest
        wrapping = Wrapping(master)
        tag = wrapping.tag("a:" + owner)
        raw = sqlite3.connect(folder / "vault.sqlite")
        number, wrapped = raw.execute("SELECT id, wrapped FROM owners WHERE tag = ?", (tag,)).fetchone()
        found = {"tag": tag, "wrapped key": wrapped, "key": wrapping.unwrap(wrapped, tag)[0], "id": owner.encode()}
        places = {base64.b64decode(entry.envelope.sealed): entry for entry in trail.reader().entries(type="a.b")}
        rows = raw.execute("SELECT commitment, sealed FROM openings WHERE owner = ? ORDER BY id", (number,)).fetchall()
        for commitment, sealed in rows:
            entry = places[commitment]
            opening = vault.opening("a.b", entry.stream, entry.seq, commitment)
            seq = entry.seq
            found |= {f"sealed {seq}": sealed, f"plain {seq}": opening.payload, f"opening key {seq}": opening.key}
        raw.close()
        found |= {"old master": master.master, "old master, base64": base64.b64encode(master.master)[:40]}
    return found


def test_an_erased_annotator_is_in_no_byte_of_trail_and_home(folder, home):
    filled(folder, entries=200)
    theirs, others = secrets_of(folder, ANN), secrets_of(folder, BEN)
    before = every_byte(folder, home)
    assert theirs["tag"] in before
    assert theirs["wrapped key"] in before
    assert theirs["sealed 0"] in before
    assert theirs["old master, base64"] in before
    # What they said and who they are was in the clear nowhere, even before.
    assert [name for name in theirs if name == "id" or name.split()[0] in ("key", "plain", "opening")]
    assert [
        name for name in theirs if name.split()[0] in ("id", "key", "plain", "opening") and theirs[name] in before
    ] == []
    with Trail.open(folder) as trail:
        for number in range(3):  # pages that only the write-ahead log holds
            trail.append("a.b", b"{}", run="r", private=b"late %d" % number, owner=ANN).wait()
        done = erase(trail, ANN, reason="request")
        now = every_byte(folder, home)
    assert done.openings == 203
    for when in (now, every_byte(folder, home)):
        assert [name for name, data in theirs.items() if data in when] == []
        assert others["sealed 1"] in when
        assert others["wrapped key"] not in when  # wrapped anew, so that the old key opens nothing
        assert others["tag"] not in when
    assert others["key"] not in before


@pytest.mark.parametrize("seed", range(3))
def test_pages_that_were_split_and_joined_keep_nothing(folder, home, seed):
    chance = random.Random(seed)
    owners = [f"annotator {n}" for n in range(6)]
    with Trail.open(folder) as trail:
        for _ in range(400):
            private = chance.randbytes(chance.choice((20, 200, 1_000, 4_000, 12_000)))
            trail.append("a.b", b"{}", run="r", private=private, owner=chance.choice(owners))
    theirs: dict[str, bytes] = {}
    for owner in owners[:4]:
        theirs |= {f"{owner}: {name}": data for name, data in secrets_of(folder, owner).items()}
        with Trail.open(folder) as trail:
            erase(trail, owner, reason="request")
            for _ in range(20):
                trail.append("a.b", b"{}", run="r", private=chance.randbytes(300), owner=chance.choice(owners[4:]))
        left = every_byte(folder, home)
        assert [name for name, data in theirs.items() if data[-24:] in left or data[:24] in left] == []
    assert look(folder)[1] == set()


@pytest.mark.parametrize("size", [10, 300, 3_900, 9_000])
def test_payloads_of_any_size_leave_nothing_behind(folder, home, size):
    with Trail.open(folder) as trail:
        for number in range(60):
            for owner in (ANN, BEN):
                private = b"%06d" % number + os.urandom(size)
                trail.append("a.b", b"{}", run="r", private=private, owner=owner)
    theirs = secrets_of(folder, ANN)
    parts = {(name, at): data[at : at + 16] for name, data in theirs.items() for at in range(0, len(data) - 15, 1_000)}
    before = every_byte(folder, home)
    assert sum(part in before for (name, _), part in parts.items() if name.startswith("sealed")) >= 60
    with Trail.open(folder) as trail:
        erase(trail, ANN, reason="retention")
    left = every_byte(folder, home)
    assert [where for where, part in parts.items() if part in left] == []
    assert look(folder)[0].openings == 60


def test_the_trail_tells_of_the_erasure_and_not_of_whom(folder, home):
    sealed = filled(folder)
    with Trail.open(folder) as trail:
        done = erase(trail, ANN, reason="request")
        assert trail.vault.opening("a.b", "r", 1, sealed[1]).payload.startswith(SECRET)
        assert trail.vault.opening("a.b", "r", 2, sealed[2]).payload.startswith(SECRET)
        with pytest.raises(VaultError) as caught:
            trail.vault.opening("a.b", "r", 0, sealed[0])
        assert caught.value.reason == "erased"
    (said,) = erasures(folder)
    assert said.keys() == {"erasure", "commitment", "generation", "reason"}
    assert (said["erasure"], said["generation"], said["reason"]) == (done.erasure, 2, "request")
    assert done.openings == 4
    assert not done.finished
    summary, codes = look(folder)
    assert (summary.commitments, summary.openings, summary.erased, summary.missing) == (12, 8, 4, 0)
    assert codes == set()
    assert verify_trail(folder).level is Level.UNANCHORED


def test_who_is_unknown_is_not_erased_and_nothing_is_changed(folder, home):
    filled(folder)
    with Trail.open(folder) as trail:
        before = every_byte(home), trail.reader().size
        for owner in ("somebody", "r", ""):
            with pytest.raises(VaultError) as caught:
                erase(trail, owner, reason="request")
            assert caught.value.reason == "unknown-owner"
        with pytest.raises(VaultError) as caught:
            erase(trail, ANN, reason="because")
        assert caught.value.reason == "reason"
        assert (every_byte(home), trail.reader().size) == before
    assert look(folder)[0].openings == 12


def test_what_a_run_holds_of_its_own_can_be_erased_too(folder, home):
    sealed = filled(folder)
    with Trail.open(folder) as trail:
        assert erase(trail, run="r", reason="retention").openings == 4
        with pytest.raises(VaultError) as caught:
            trail.vault.opening("a.b", "r", 2, sealed[2])
        assert caught.value.reason == "erased"
        assert trail.vault.opening("a.b", "r", 0, sealed[0]).payload
        with pytest.raises(VaultError) as caught:
            erase(trail, run="r", reason="retention")
        assert caught.value.reason == "unknown-owner"
        for wrong in ({}, {"owner": ANN, "run": "r"}):
            with pytest.raises(ValueError, match="either"):
                erase(trail, reason="request", **wrong)
    assert look(folder)[0].erased == 4
    assert look(folder)[1] == set()


@pytest.mark.parametrize("owner", ["", " ", "Zsófia\n", "\udcff\ud800", "\0", "x" * 70_000, "a:r", "s:r"])
def test_an_id_is_whatever_somebody_wrote(folder, owner):
    filled(folder, owner, BEN, None)
    with Trail.open(folder) as trail:
        assert erase(trail, BEN, reason="request").openings == 4  # wraps the others anew
        assert erase(trail, owner, reason="request").openings == 4
    assert look(folder)[1] == set()


def test_nobody_is_known_where_nothing_was_ever_sealed(folder):
    with Trail.open(folder) as trail:
        with pytest.raises(VaultError) as caught:
            erase(trail, ANN, reason="request")
        assert caught.value.reason == "unknown-owner"
    assert not (folder / "vault.sqlite").exists()


def test_the_same_annotator_can_come_back_and_be_erased_again(folder):
    filled(folder, ANN)
    for generation in (2, 3, 4):
        with Trail.open(folder) as trail:
            assert erase(trail, ANN, reason="withdrawn").generation == generation
            trail.append("a.b", b"{}", run="r", private=b"anew", owner=ANN).wait()
    assert len({said["erasure"] for said in erasures(folder)}) == 3
    summary, codes = look(folder)
    assert (summary.openings, summary.erased, summary.missing) == (1, 6, 0)
    assert codes == set()


def test_a_passphrase_stays_on_the_key_through_an_erasure(folder, home):
    with Trail.open(folder, passphrase="right") as trail:
        trail.append("a.b", b"{}", run="r", private=b"x", owner=ANN)
        trail.append("a.b", b"{}", run="r", private=b"y", owner=BEN)
        erase(trail, ANN, reason="request")
    with pytest.raises(KeyFileError):
        Trail.open(folder, passphrase="wrong")
    with Trail.open(folder, passphrase="right") as trail:
        assert trail.vault.opening("a.b", "r", 1, commitments(folder)[1]).payload == b"y"


# --- what the check tells apart ---


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM openings WHERE erasure = 1 AND id = 1",
        "DELETE FROM erasures",
        "UPDATE erasures SET salt = zeroblob(32)",
        "UPDATE openings SET owner = NULL, sealed = NULL, erasure = 1 WHERE id = 2",
        "UPDATE openings SET owner = NULL, sealed = NULL, erasure = 2 WHERE id = 2",
    ],
)
def test_what_somebody_took_out_does_not_pass_for_erased(folder, change):
    filled(folder)
    with Trail.open(folder) as trail:
        erase(trail, ANN, reason="request")
    with sqlite3.connect(folder / "vault.sqlite") as raw:
        raw.execute(change)
    raw.close()
    summary, codes = look(folder)
    assert "opening-missing" in codes
    assert summary.missing >= 1


def test_an_erasure_that_the_trail_does_not_tell_of_yet_is_said(folder):
    filled(folder)
    with Trail.open(folder) as trail:
        vault = Vault(folder / "vault.sqlite", trail.keys.master)
        with trail.keys.master.exclusive():
            vault.erase(ANN, "request")
        vault.close()
        summary, codes = look(folder)
        assert codes == {"erasure-unfinished", "opening-missing"}
        assert summary.missing == 4
        (done,) = finish_erasures(trail)
        assert done.finished
        assert finish_erasures(trail) == ()
    assert look(folder)[1] == set()


@pytest.mark.parametrize("seal", ["zeroblob(32)", "x'00'"])
def test_who_has_only_the_file_cannot_make_an_erasure_that_the_trail_would_tell_of(folder, seal):
    filled(folder)
    with sqlite3.connect(folder / "vault.sqlite") as raw:
        raw.execute("UPDATE openings SET owner = NULL, sealed = NULL, erasure = 1 WHERE owner = 1")
        raw.execute(
            "INSERT INTO erasures VALUES (1, '00112233445566778899aabbccddeeff', zeroblob(32), zeroblob(32), 1,"
            f" 'request', 4, 0, {seal})"
        )
    raw.close()
    assert look(folder)[1] == {"erasure-unfinished", "opening-missing"}
    with pytest.raises(VaultError) as caught:
        Trail.open(folder)
    assert caught.value.reason == "vault-changed"
    assert erasures(folder) == []


# --- stopped half-way ---

# Erases in each of the folders, in a child of its own that stops before the n-th call that could change a file
# (0: never); says how many there were.
STOPPED = """
import os, sys
from rlhf_audit_nb.trail import Trail
from rlhf_audit_nb.trail.erasure import erase

CHANGING = {"execute", "executemany", "open", "write", "fsync", "replace", "unlink", "close"}
count = 0

def stopped(place, when):
    def watch(frame, event, called):
        global count
        if event == "c_call" and called.__name__ in CHANGING:
            count += 1
            if count == when:
                os._exit(9)

    os.environ["RLHF_AUDIT_HOME"] = place + "/home"
    trail = Trail.open(place + "/audit")
    sys.setprofile(watch)
    erase(trail, sys.argv[1], reason="request")
    sys.setprofile(None)
    trail.close()
    print(count, flush=True)
    os._exit(0)

for case in sys.argv[2:]:
    place, when = case.split(":")
    child = os.fork()
    if child == 0:
        stopped(place, int(when))
    expected = 9 if int(when) else 0
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == expected, case
"""


def run(script: str, *arguments: object, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)


@pytest.fixture
def case(tmp_path, monkeypatch):
    """Copies of a trail in which there is something to erase, each with its home; and what is theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "begun" / "home"))
        filled(tmp_path / "begun" / "audit", entries=30)
        theirs = secrets_of(tmp_path / "begun" / "audit", ANN)

    def copy(name: object) -> Path:
        place = tmp_path / str(name)
        shutil.copytree(tmp_path / "begun", place)
        monkeypatch.setenv("RLHF_AUDIT_HOME", str(place / "home"))
        return place

    return copy, theirs


def check_whole(place: Path, theirs: dict[str, bytes]) -> bool:
    """The trail opens, and is either as it was before the erasure or as it is after; which?"""
    folder, home = place / "audit", place / "home"
    Trail.open(folder, home=home).close()
    summary, codes = look(folder)
    assert codes == set()
    assert verify_trail(folder, home=home).level is Level.UNANCHORED
    assert summary.missing == 0
    said = erasures(folder)
    assert len(json.loads(next((place / "home").rglob("vault.key")).read_bytes())["generations"]) == 1
    left = {name for name, data in theirs.items() if data in every_byte(place)}
    if said:
        assert (len(said), summary.openings, summary.erased) == (1, 60, 30)
        assert left == set()
    else:
        assert (summary.openings, summary.erased) == (90, 0)
        assert {"tag", "wrapped key", "sealed 0"} <= left
    with Trail.open(folder, home=home) as trail:
        assert trail.vault.opening("a.b", "r", 1, commitments(folder)[1]).payload.startswith(SECRET)
        trail.append("a.b", b"{}", run="r", private=b"goes on", owner=BEN).wait()
    return bool(said)


def stop(*cases: tuple[Path, int]) -> str:
    done = run(STOPPED, ANN, *(f"{place}:{when}" for place, when in cases))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_erasure_that_is_stopped_anywhere_is_whole_or_not_begun(case):
    copy, theirs = case
    calls = int(stop((copy("whole"), 0)))
    assert calls > 40
    places = [(copy(when), when) for when in range(1, calls + 1, 2)]
    stop(*places)
    outcomes = [check_whole(place, theirs) for place, _ in places]
    for place, _ in [item for item, erased in zip(places, outcomes, strict=True) if not erased]:
        with Trail.open(place / "audit", home=place / "home") as trail:
            erase(trail, ANN, reason="request")
        assert [name for name, data in theirs.items() if data in every_byte(place)] == []
    # Not begun up to one call, whole from there on: nothing in between, and both were seen.
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "when", "fault"),
    [
        *((call, when, "signal=KILL") for call, when in (("fsync", 1), ("fsync", 3), ("rename", 2), ("ftruncate", 1))),
        *((call, when, "signal=KILL") for call, when in (("fdatasync", 3), ("fdatasync", 5), ("pwrite64", 20))),
        *((call, when, "error=EIO") for call, when in (("fsync", 1), ("fdatasync", 4), ("rename", 2))),
        *(("pwrite64", when, "error=ENOSPC") for when in (12, 20)),
    ],
)
def test_an_erasure_that_fails_at_a_system_call_is_whole_or_not_begun(case, call, when, fault):
    strace = shutil.which("strace")
    if strace is None or subprocess.run([strace, "-o", os.devnull, "true"], capture_output=True).returncode != 0:
        pytest.skip("strace is not here or may not trace")
    copy, theirs = case
    place = copy("killed")
    inject = ("-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={when}")
    done = run(STOPPED, ANN, f"{place}:0", before=(strace, "-f", "-qq", "-o", os.devnull, *inject))
    if done.returncode and "error" in fault:
        assert re.search("(StoreError|KeyFileError|VaultError): ", done.stderr), done.stderr
    check_whole(place, theirs)


@pytest.mark.parametrize("step", ["_bury", "_rewrap", "settle"])
def test_a_full_disk_in_an_erasure_is_said_and_leaves_it_whole_or_not_begun(case, monkeypatch, step):
    copy, theirs = case
    place = copy("full")

    def full(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with Trail.open(place / "audit") as trail, monkeypatch.context() as patch:
        patch.setattr(Vault, step, full)
        with pytest.raises((StoreError, sqlite3.OperationalError)):
            erase(trail, ANN, reason="request")
    assert not check_whole(place, theirs)


# --- others at work meanwhile ---

HOLDER = """
import sys
from rlhf_audit_nb.trail import Trail
with Trail.open(sys.argv[1]) as trail:
    for line in sys.stdin:
        private = b"from the other process"
        print(trail.append("a.b", b"{}", run="other", private=private, owner=line.strip()).wait(), flush=True)
"""


def test_another_process_that_has_the_vault_open_brings_nobody_back(folder, home):
    filled(folder)
    theirs = secrets_of(folder, ANN)
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:

        def append(owner: str) -> int:
            other.stdin.write(owner + "\n")
            other.stdin.flush()
            return int(other.stdout.readline())

        try:
            append(ANN)
            append(BEN)
            theirs |= {"tag": secrets_of(folder, ANN)["tag"]}
            with Trail.open(folder) as trail:
                assert erase(trail, ANN, reason="request").openings == 5
                # It had the old master key and Ann's key in its memory, and takes the new ones from the disk.
                late = [append(BEN), append(ANN)]
                (entry,) = trail.reader().entries(late[1], late[1] + 1)
                commitment = base64.b64decode(entry.envelope.sealed)
                assert trail.vault.opening("a.b", "other", entry.seq, commitment).payload == b"from the other process"
                done = erase(trail, ANN, reason="request")
                assert (done.openings, done.generation) == (1, 3)
        finally:
            other.stdin.close()
            other.wait(20)
    assert [name for name, data in theirs.items() if data in every_byte(folder, home)] == []
    summary, codes = look(folder)
    assert (summary.openings, summary.erased, summary.missing) == (10, 6, 0)
    assert codes == set()


def test_many_writers_and_erasures_at_once_lose_nothing(folder, home):
    filled(folder)
    script = """
import sys
from rlhf_audit_nb.errors import VaultError
from rlhf_audit_nb.trail import Trail
from rlhf_audit_nb.trail.erasure import erase
mine = sys.argv[2]
with Trail.open(sys.argv[1]) as trail:
    for number in range(12):
        for owner in (mine, "shared"):
            trail.append("a.b", b"{}", run=mine, private=b"%d" % number, owner=owner)
        trail.flush()
        if number % 4 == 3:
            for owner in (mine, "shared"):
                try:
                    erase(trail, owner, reason="request")
                except VaultError as error:
                    assert error.reason == "unknown-owner", error
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", script, str(folder), name], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for name in ("one", "two", "three")
    ]
    assert [(process.communicate(timeout=120)[1], process.returncode) for process in runs] == [("", 0)] * 3
    summary, codes = look(folder)
    assert codes == set()
    assert summary.commitments == 12 + 3 * 24
    assert summary.missing == 0
    assert summary.erased >= 36
    assert len(erasures(folder)) >= 9
    assert verify_trail(folder).level is Level.UNANCHORED


def test_a_reader_of_the_vault_delays_the_clearing_and_nothing_else(folder, home, monkeypatch):
    filled(folder)
    theirs = secrets_of(folder, ANN)
    monkeypatch.setattr("rlhf_audit_nb.trail.sqlite.BUSY_SECONDS", 0.2)
    with Trail.open(folder) as trail:
        raw = sqlite3.connect(folder / "vault.sqlite", isolation_level=None)
        raw.execute("BEGIN")
        raw.execute("SELECT count(*) FROM openings").fetchone()
        with pytest.raises(VaultError) as caught:
            erase(trail, ANN, reason="request")
        assert caught.value.reason == "vault-busy"
        with Trail.open(folder) as second:  # opening is not kept waiting for ever either
            assert second.append("a.b", b"{}", run="r").wait()
        assert erasures(folder) == []
        raw.close()
    Trail.open(folder).close()
    assert len(erasures(folder)) == 1
    assert look(folder)[1] == set()
    assert [name for name, data in theirs.items() if data in every_byte(folder, home)] == []


# --- what was put back ---


def keep(source: Path, to: Path) -> None:
    """A copy of a vault with its log."""
    to.mkdir()
    for name in ("vault.sqlite", "vault.sqlite-wal"):
        if (source / name).exists():
            shutil.copy(source / name, to / name)


def put_back(kept: Path, folder: Path) -> None:
    for path in folder.glob("vault.sqlite*"):
        path.unlink()
    for path in kept.iterdir():
        shutil.copy(path, folder / path.name)


def test_an_old_copy_of_the_vault_does_not_open_and_is_named(folder, home, tmp_path):
    sealed = filled(folder)
    keep(folder, tmp_path / "kept")
    with Trail.open(folder) as trail:
        erase(trail, ANN, reason="request")
        master = trail.keys.master
    put_back(tmp_path / "kept", folder)
    with pytest.raises(VaultError) as caught:
        Trail.open(folder)
    assert caught.value.reason == "vault-old"
    vault = Vault(folder / "vault.sqlite", master)
    for seq, commitment in enumerate(sealed):
        with pytest.raises(VaultError) as caught:
            vault.opening("a.b", "r", seq, commitment)
        assert caught.value.reason == "vault-old"
    vault.close()
    assert look(folder)[1] == {"vault-old"}


def test_an_old_copy_of_the_key_does_not_open_the_vault(folder, home, tmp_path):
    filled(folder)
    key = next(home.rglob("vault.key"))
    old = key.read_bytes()
    with Trail.open(folder) as trail:
        erase(trail, ANN, reason="request")
    new = key.read_bytes()
    key.write_bytes(old)
    with pytest.raises(VaultError) as caught:
        Trail.open(folder)
    assert caught.value.reason == "key-old"
    key.write_bytes(new)
    Trail.open(folder).close()


@pytest.mark.parametrize("later", [0, 2])
def test_who_comes_back_with_old_copies_of_vault_and_key_is_erased_again(folder, home, tmp_path, later):
    owners = [ANN, BEN, *(f"later {n}" for n in range(later))]
    sealed = filled(folder, *owners)
    keep(folder, tmp_path / "kept")
    key = next(home.rglob("vault.key"))
    old = key.read_bytes()
    with Trail.open(folder) as trail:
        erased = [erase(trail, owner, reason="request") for owner in owners if owner != BEN]
    theirs = {name: secrets_of(folder, BEN)[name] for name in ("tag", "wrapped key")}
    put_back(tmp_path / "kept", folder)
    key.write_bytes(old)
    assert look(folder)[1] == {"vault-old"}
    theirs |= {"old master": base64.b64encode(base64.b64decode(json.loads(old)["generations"][0]["key"]))[:40]}
    with Trail.open(folder) as trail:
        for seq, commitment in enumerate(sealed):
            if owners[seq % len(owners)] == BEN:
                assert trail.vault.opening("a.b", "r", seq, commitment).payload.startswith(SECRET)
            else:
                with pytest.raises(VaultError) as caught:
                    trail.vault.opening("a.b", "r", seq, commitment)
                assert caught.value.reason == "erased"
        assert trail.keys.master.newest.number == erased[-1].generation
    assert theirs["old master"] not in every_byte(folder, home)
    summary, codes = look(folder)
    assert codes == set()
    assert (summary.openings, summary.erased) == (4, 4 * (1 + later))
    assert len(erasures(folder)) == 1 + later
    with Trail.open(folder) as trail:
        assert erase(trail, BEN, reason="request").generation == erased[-1].generation + 1


def test_erasing_again_finishes_what_was_stopped(folder, home, monkeypatch):
    filled(folder)
    theirs = secrets_of(folder, ANN)
    with Trail.open(folder) as trail:
        with monkeypatch.context() as patch:
            patch.setattr(Vault, "settle", lambda _: 1 / 0 if trail.vault.erasures() else None)
            with pytest.raises(ZeroDivisionError):
                erase(trail, ANN, reason="request")
        assert erasures(folder) == []
        assert len(json.loads(next(home.rglob("vault.key")).read_bytes())["generations"]) == 2
        done = erase(trail, ANN, reason="request")
        assert (done.finished, done.openings) == (True, 4)
        with pytest.raises(VaultError) as caught:
            erase(trail, ANN, reason="request")
        assert caught.value.reason == "unknown-owner"
    assert look(folder)[1] == set()
    assert [name for name, data in theirs.items() if data in every_byte(folder, home)] == []


def test_old_copies_from_long_before_bring_nobody_back_and_what_they_lack_is_said(folder, home, tmp_path):
    filled(folder, ANN, BEN)
    keep(folder, tmp_path / "kept")
    key = next(home.rglob("vault.key"))
    old = key.read_bytes()
    with Trail.open(folder) as trail:
        for owner in (ANN, BEN, "joined later"):
            trail.append("a.b", b"{}", run="r", private=SECRET + b" late", owner=owner)
        for owner in (ANN, "joined later"):
            erase(trail, owner, reason="request")
    put_back(tmp_path / "kept", folder)
    key.write_bytes(old)
    for _ in range(2):  # the second opening finds nothing more to do
        with Trail.open(folder) as trail:
            assert trail.keys.master.newest.number == 3
            states = []
            for seq, commitment in enumerate(commitments(folder)):
                try:
                    states.append(bool(trail.vault.opening("a.b", "r", seq, commitment).payload))
                except VaultError as error:
                    states.append(error.reason)
        assert states == ["erased", True] * 4 + ["opening-missing"] * 3
    summary, codes = look(folder)
    assert "opening-missing" in codes
    assert summary.openings == 4
    assert verify_trail(folder).level is Level.INVALID
    assert len(erasures(folder)) == 2


def test_what_was_handed_in_and_is_not_durable_yet_is_erased_too(folder):
    with Trail.open(folder) as trail:
        for number in range(700):
            trail.append("a.b", b"{}", run="r", private=b"%d" % number, owner=ANN)
        assert erase(trail, ANN, reason="request").openings == 700
    assert look(folder)[0].erased == 700
