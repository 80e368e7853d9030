"""A ring's passphrase and its backup: all of it or none, and nothing that is there is lost."""

from __future__ import annotations

import base64
import json
import os
import shutil
from contextlib import suppress

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.dying import in_child

from rlhf_audit_nb.errors import KeyFileError
from rlhf_audit_nb.trail import Trail
from rlhf_audit_nb.trail.home import keys_folder
from rlhf_audit_nb.trail.key_care import backup_keys, encrypt_keys, list_keys, restore_keys
from rlhf_audit_nb.trail.key_files import ROTATED, Change, RingFolder
from rlhf_audit_nb.trail.keys import create_keys, encode_private, load_keys, settle_ring
from rlhf_audit_nb.trail.rotation import rotate_key
from rlhf_audit_nb.trail.signers import HeldKey

ORIGIN = "example.org/care"
OLD, NEW = "five random words here", "another passphrase"


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "lock" not in path.name
    }


@pytest.fixture
def ring(home):
    """A ring of four private keys, one of which was replaced before, and its folder."""
    with Trail.open(home.parent / "audit", origin=ORIGIN, home=home) as trail:
        rotate_key(trail, "log")
        rotate_key(trail, "mldsa")
    return keys_folder(home, ORIGIN)


def secrets_of(home, passphrase):
    keys = load_keys(home, ORIGIN, passphrase)
    files = [encode_private(key, None) for key in (keys.log.key, keys.record.key, keys.model, keys.mldsa)]
    return files, keys.master.newest


def test_a_passphrase_is_set_changed_and_taken_away_and_the_keys_stay(home, ring):
    before = secrets_of(home, None)
    times = {path.name: path.stat().st_mtime_ns for path in ring.glob("*.pem")}
    for old, new in ((None, OLD), (OLD, NEW), (NEW, None)):
        encrypt_keys(home, ORIGIN, new, old)
        sealed = [b"ENCRYPTED" in path.read_bytes() for path in ring.glob("*.pem")]
        assert sealed == [new is not None] * 4
        assert (b"scrypt" in (ring / "vault.key").read_bytes()) == (new is not None)
        assert secrets_of(home, new) == before
        assert {path.name: path.stat().st_mtime_ns for path in ring.glob("*.pem")} == times
        assert not RingFolder(ring).is_changing
        assert all(path.stat().st_mode & 0o077 == 0 for path in ring.rglob("*") if path.is_file())
    with Trail.open(home.parent / "audit") as trail:
        trail.append("note.taken", b"{}").wait()


@pytest.mark.parametrize(("old", "new"), [("wrong passphrase", NEW), (OLD, "short"), (None, NEW)])
def test_a_refused_change_changes_nothing(home, ring, old, new):
    encrypt_keys(home, ORIGIN, OLD, None)
    before = contents(ring)
    with pytest.raises(KeyFileError) as refused:
        encrypt_keys(home, ORIGIN, new, old)
    assert refused.value.reason == "passphrase"
    assert contents(ring) == before


def is_sealed(ring) -> bool:
    """Whether all of a ring's files are encrypted, or none is."""
    sealed = {b"ENCRYPTED" in path.read_bytes() for path in ring.glob("*.pem")}
    sealed.add(b"scrypt" in (ring / "vault.key").read_bytes())
    assert len(sealed) == 1
    return sealed.pop()


def opener(home, *words):
    """The one of these passphrases that opens the ring."""
    opens = []
    for word in words:
        with suppress(KeyFileError):
            load_keys(home, ORIGIN, word)
            opens.append(word)
    assert len(opens) == 1
    return opens[0]


@pytest.mark.parametrize(
    ("old", "new", "stride"), [(None, NEW, 1), pytest.param(OLD, NEW, 4, marks=pytest.mark.slow), (OLD, None, 5)]
)
def test_a_change_that_is_killed_at_any_call_is_done_or_not_begun(home, ring, tmp_path, old, new, stride):
    before = secrets_of(home, None)
    if old is not None:
        encrypt_keys(home, ORIGIN, old, None)
    shutil.copytree(ring, tmp_path / "kept")
    found = set()
    at, finished = 1 - stride, False
    while not finished:
        at += stride
        shutil.rmtree(ring)
        shutil.copytree(tmp_path / "kept", ring)
        finished = in_child(lambda: encrypt_keys(home, ORIGIN, new, old), at)
        settle_ring(RingFolder(ring))
        now = opener(home, old, new) if is_sealed(ring) else None
        found.add(now)
        assert secrets_of(home, now) == before, at
        assert not RingFolder(ring).is_changing, at
        assert not any("next" in path.name for path in ring.rglob("*")), at
    assert found == {old, new}
    assert at > 20


def test_what_a_crash_leaves_of_private_keys_is_swept_away_by_the_next_change(home, ring):
    leftover = ring / ".next-log.pem.0123456789ab"
    leftover.write_bytes(b"half a key")
    load_keys(home, ORIGIN)
    assert not leftover.exists()


def test_keys_that_are_being_rotated_are_neither_encrypted_nor_backed_up(home, ring):
    folder = RingFolder(ring)
    with folder.locked():
        folder.stage(Change(kind=ROTATED, files=("log.pem",), new="unknown"), {"log.pem": b"x"})
    for call in (lambda: encrypt_keys(home, ORIGIN, NEW, None), lambda: backup_keys(home, ORIGIN, NEW)):
        with pytest.raises(KeyFileError) as refused:
            call()
        assert refused.value.reason == "rotating"
    with Trail.open(home.parent / "audit") as trail:
        trail.append("note.taken", b"{}").wait()
    encrypt_keys(home, ORIGIN, NEW, None)


def test_a_change_whose_list_is_damaged_is_told(home, ring):
    (ring / "next.json").write_text("{")
    with pytest.raises(KeyFileError, match=r"next\.json"):
        load_keys(home, ORIGIN)


# -- backups --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [None, OLD])
def test_a_backup_holds_the_whole_ring_and_shows_nothing_of_it(home, ring, tmp_path, sealed):
    if sealed:
        encrypt_keys(home, ORIGIN, sealed, None)
    before = contents(ring)
    data = backup_keys(home, ORIGIN, NEW)
    for content in before.values():
        assert content not in data
        assert base64.b64encode(content)[:60] not in data
    assert ORIGIN.encode() not in data
    other = tmp_path / "other"
    assert restore_keys(other, data, NEW) == ORIGIN
    assert contents(keys_folder(other, ORIGIN)) == before
    assert all(path.stat().st_mode & 0o077 == 0 for path in (other / "keys").rglob("*"))
    assert secrets_of(other, sealed) == secrets_of(home, sealed)


def test_two_backups_of_one_ring_have_nothing_in_common(home, ring):
    one, other = (json.loads(backup_keys(home, ORIGIN, NEW)) for _ in range(2))
    assert one["scrypt"]["salt"] != other["scrypt"]["salt"]
    assert one["sealed"][:200] != other["sealed"][:200]


def test_a_changed_backup_a_wrong_passphrase_and_no_backup_are_refused(home, ring, tmp_path):
    data = backup_keys(home, ORIGIN, NEW)
    form = json.loads(data)
    sealed = bytearray(base64.b64decode(form["sealed"]))
    sealed[len(sealed) // 2] ^= 1
    flipped = json.dumps({**form, "sealed": base64.b64encode(bytes(sealed)).decode()}).encode()
    tries = [
        (data, OLD, "passphrase"),
        (flipped, NEW, "passphrase"),
        (data[:-20], NEW, "backup"),
        (b"{}", NEW, "backup"),
    ]
    tries.append((json.dumps({**form, "version": 9}).encode(), NEW, "backup"))
    for content, passphrase, code in tries:
        with pytest.raises(KeyFileError) as refused:
            restore_keys(tmp_path / "other", content, passphrase)
        assert refused.value.reason == code
        assert not (tmp_path / "other" / "keys").exists()


def test_a_restore_puts_back_what_is_missing_and_nothing_else(home, ring):
    data = backup_keys(home, ORIGIN, NEW)
    before = contents(ring)
    for name in ("record.pem", "model.pub", "vault.key"):
        (ring / name).unlink()
    shutil.rmtree(ring / "retired")
    restore_keys(home, data, NEW)
    assert contents(ring) == before


def test_a_restore_over_other_keys_changes_nothing(home, ring):
    data = backup_keys(home, ORIGIN, NEW)
    with Trail.open(home.parent / "audit") as trail:
        rotate_key(trail, "record")
    before = contents(ring)
    with pytest.raises(KeyFileError) as refused:
        restore_keys(home, data, NEW)
    assert refused.value.reason == "keys-exist"
    assert contents(ring) == before


@pytest.mark.slow
def test_a_restore_that_is_killed_leaves_no_half_ring(home, ring, tmp_path):
    data = backup_keys(home, ORIGIN, NEW)
    other = tmp_path / "other"
    at, finished = 0, False
    while not finished:
        at += 1
        shutil.rmtree(other, ignore_errors=True)
        finished = in_child(lambda: restore_keys(other, data, NEW), at)
        if keys_folder(other, ORIGIN).exists():
            assert contents(keys_folder(other, ORIGIN)) == contents(ring), at
    assert at > 15
    assert finished


def test_a_folder_that_cannot_be_written_is_said(home, ring, tmp_path):
    if os.geteuid() == 0:
        (tmp_path / "file").write_text("")
        with pytest.raises(KeyFileError, match="cannot be written"):
            restore_keys(tmp_path / "file", backup_keys(home, ORIGIN, NEW), NEW)
    else:
        ring.chmod(0o500)
        with pytest.raises(KeyFileError, match="cannot be changed"):
            encrypt_keys(home, ORIGIN, NEW, None)


# -- what is told ---------------------------------------------------------------------------------------------------


def test_a_list_tells_where_each_key_is_and_what_became_of_the_old_ones(home, ring):
    with Trail.open(home.parent / "audit") as trail:
        other = Ed25519PrivateKey.generate()
        (home.parent / "held.pem").write_bytes(encode_private(other, None))
        held = HeldKey(f"file2:{home.parent}/held.pem", other.public_key())
        rotate_key(trail, "record", new=held)
    encrypt_keys(home, ORIGIN, OLD, None)
    told = {(info.role, info.status): info for info in list_keys(home, ORIGIN)}
    assert told["record", "in force"].where == held.uri
    assert told["log", "in force"].encrypted
    assert told["log", "retired"].until == 2
    assert told["mldsa", "in force"].kind == "ML-DSA-44"
    assert {len(info.id) for info in told.values()} == {8, 16}
    with pytest.raises(KeyFileError):
        list_keys(home, "example.org/none")


def test_a_ring_of_an_earlier_version_has_the_logs_public_half_alone_and_serves(home):
    create_keys(home, ORIGIN)
    ring = keys_folder(home, ORIGIN)
    for name in ("record.pub", "model.pub"):
        (ring / name).unlink()
    assert load_keys(home, ORIGIN).record_spki
    assert {info.role: info.id for info in list_keys(home, ORIGIN)}["record"] == "-"
    with Trail.open(home.parent / "audit", origin=ORIGIN) as trail:
        rotate_key(trail, "record")
    assert (ring / "record.pub").exists()
