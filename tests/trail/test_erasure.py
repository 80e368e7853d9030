"""Erasing an annotator: gone from every byte, told in the trail, finished after any crash, and never undone."""

from __future__ import annotations

import base64
import json
import os
import sqlite3
from pathlib import Path

import pytest

from rlhf_audit_nb.errors import KeyFileError, VaultError
from rlhf_audit_nb.trail import Level, Trail, TrailReader, verify_trail
from rlhf_audit_nb.trail.erasure import erase, finish_erasures
from rlhf_audit_nb.trail.vault import VAULT_ERASED, OpeningsCheck, Vault

ANN, BEN = "ann-7f3a@example.com", "ben-19c2@example.com"
SECRET = b"prefers the second answer of pair 4711"


def filled(folder: Path, *owners: str | None, entries: int = 4) -> list[bytes]:
    """A trail with private payloads of each owner; their commitments."""
    with Trail.open(folder) as trail:
        for number in range(entries):
            for owner in owners or (ANN, BEN, None):
                body = SECRET + b" %d" % number + (owner or "the run").encode()
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
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    assert files
    return b"".join(path.read_bytes() for path in files)


def secrets_of(folder: Path, owner: str) -> dict[str, bytes]:
    """All that is of an owner in the vault, and what only they could be read with."""
    with Trail.open(folder) as trail:
        vault, master = trail.vault, trail.keys.master.newest
        wrapping = vault._wrapping_now.__globals__["_Wrapping"](master)
        tag = wrapping.tag("a:" + owner)
        raw = sqlite3.connect(folder / "vault.sqlite")
        number, wrapped = raw.execute("SELECT id, wrapped FROM owners WHERE tag = ?", (tag,)).fetchone()
        found = {"tag": tag, "wrapped key": wrapped, "key": wrapping.unwrap(wrapped, tag)[0], "id": owner.encode()}
        for seq, commitment, sealed in raw.execute(
            "SELECT id - 1, commitment, sealed FROM openings WHERE owner = ? ORDER BY id", (number,)
        ).fetchall():
            opening = vault.opening("a.b", "r", seq, commitment)
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


@pytest.mark.parametrize("size", [10, 300, 3_900, 9_000])
def test_payloads_of_any_size_leave_nothing_behind(folder, home, size):
    with Trail.open(folder) as trail:
        for number in range(60):
            for owner in (ANN, BEN):
                private = b"%06d" % number + os.urandom(size)
                trail.append("a.b", b"{}", run="r", private=private, owner=owner)
    theirs = secrets_of(folder, ANN)
    assert theirs["sealed 118"][-40:] in every_byte(folder)
    with Trail.open(folder) as trail:
        erase(trail, ANN, reason="retention")
    left = every_byte(folder, home)
    parts = {
        name: [data[at : at + 16] for at in range(0, max(1, len(data) - 15), 1_000)] for name, data in theirs.items()
    }
    assert [name for name, each in parts.items() if any(part in left for part in each)] == []
    assert look(folder)[0].openings == 60


def test_the_trail_tells_of_the_erasure_and_not_of_whom(folder, home):
    sealed = filled(folder)
    with Trail.open(folder) as trail:
        done = erase(trail, ANN, reason="request")
        assert trail.vault.open_payload("r", 1, sealed[1]).startswith(SECRET)
        assert trail.vault.open_payload("r", 2, sealed[2]).startswith(SECRET)
        with pytest.raises(VaultError) as caught:
            trail.vault.open_payload("r", 0, sealed[0])
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
        assert trail.vault.open_payload("r", 1, commitments(folder)[1]) == b"y"


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
