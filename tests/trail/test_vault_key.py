"""The vault's key file: its generations, its seal, its copies."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_audit_nb.errors import KeyFileError
from rlhf_audit_nb.trail.vault_key import (
    Generation,
    MasterKey,
    backup_master,
    reseal_master,
    restore_master,
)

ROOT = Path(__file__).parents[2]


def made(path: Path, passphrase: bytes | None = None) -> MasterKey:
    master = MasterKey.create(path, passphrase)
    path.write_bytes(master.encode())
    return master


def numbers(path: Path) -> list[int]:
    return [row["number"] for row in json.loads(path.read_bytes())["generations"]]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "vault.key"


@pytest.mark.parametrize("passphrase", [None, b"right"])
def test_the_file_gives_back_what_was_put_in(path, passphrase):
    master = made(path, passphrase)
    after = master.newest.next()
    with master.exclusive():
        master.keep(master.newest, after)
    again = MasterKey.load(path, passphrase)
    assert again.newest == after
    assert again.generation(1) == master.generation(1)
    assert again.generation(3) is None
    assert not again.settled
    assert (base64.b64encode(after.master)[:40] in path.read_bytes()) is (passphrase is None)
    with again.exclusive():
        again.keep(after)
    assert numbers(path) == [2]
    assert path.stat().st_mode & 0o077 == 0
    assert list(path.parent.glob(".vault.key.*")) == []


def test_a_sealed_key_needs_its_passphrase(path):
    made(path, b"right")
    for passphrase in (b"wrong", None):
        with pytest.raises(KeyFileError) as caught:
            MasterKey.load(path, passphrase)
        assert caught.value.reason == "passphrase"


def test_a_sealed_generation_cannot_pass_for_another(path):
    made(path, b"right")
    fields = json.loads(path.read_bytes())
    fields["generations"][0]["number"] = 2
    path.write_text(json.dumps(fields))
    with pytest.raises(KeyFileError):
        MasterKey.load(path, b"right")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b'{"version":1,"key":"AA=="}',
        b'{"version":2,"generations":[]}',
        b'{"version":2,"generations":[{"number":0,"key":"AA=="}]}',
        b'{"version":2,"generations":[{"number":true,"key":"AA=="}]}',
        b'{"version":2,"generations":[{"number":1,"key":"AA=="}]}',
        b'{"version":2,"generations":[{"number":1}]}',
        b'{"version":2,"generations":[{"number":2,"key":"AA=="},{"number":1,"key":"AA=="}]}',
        b'{"version":2,"generations":[{"number":1},{"number":2},{"number":3}]}',
        b'{"version":2,"scrypt":{},"generations":[{"number":1,"sealed":"AA=="}]}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_file_is_said(path, data):
    path.write_bytes(data)
    with pytest.raises(KeyFileError) as caught:
        MasterKey.load(path, b"right")
    assert str(path.parent) in caught.value.message


def test_a_missing_file_is_said(path):
    with pytest.raises(KeyFileError):
        MasterKey.load(path)


def test_a_generation_is_read_from_the_file_where_it_is_not_known_yet(path):
    mine, other = made(path), MasterKey.load(path)
    after = mine.newest.next()
    with mine.exclusive():
        mine.keep(after)
    assert other.generation(2) == after
    assert other.generation(1) is None


def test_a_later_generation_does_not_tell_an_earlier_one():
    first = Generation.first()
    second, third = first.next(), first.next().next()
    assert len({item.master for item in (first, second, third, first.next())}) == 4
    # Who has the first can name the erasures that came later, and who has a later one cannot name the earlier.
    assert first.at(2).erasure("a:ann") == second.erasure("a:ann")
    assert first.at(3).erasure("a:ann") == third.erasure("a:ann")
    assert len({item.erasure("a:ann") for item in (first, second, third)}) == 3
    assert second.erasure("a:ann") != second.erasure("a:ben")
    assert repr(first.master) not in repr(first)
    assert repr(first.ratchet) not in repr(first)


def test_a_passphrase_can_be_changed_and_taken_off(path):
    master = made(path)
    for before, after in ((None, b"one"), (b"one", b"two"), (b"two", None)):
        reseal_master(path, before, after)
        assert MasterKey.load(path, after).newest == master.newest
    reseal_master(path, None, b"three")
    sealed = path.read_bytes()
    with pytest.raises(KeyFileError):
        reseal_master(path, b"wrong", None)
    assert path.read_bytes() == sealed


def test_a_file_in_the_clear_stays_so_though_a_passphrase_is_at_hand(path):
    made(path)
    master = MasterKey.load(path, b"not asked for")
    with master.exclusive():
        master.keep(master.newest.next())
    assert MasterKey.load(path, None).newest == master.newest


# --- copies ---


def test_a_copy_can_be_put_back_where_the_file_is_lost_or_damaged(path):
    made(path)
    copy = backup_master(path)
    for damage in (path.unlink, lambda: path.write_bytes(b"damaged")):
        damage()
        restore_master(path, copy)
        assert path.read_bytes() == copy


def test_a_copy_from_before_an_erasure_is_not_put_back(path):
    master = made(path)
    copy = backup_master(path)
    with master.exclusive():
        master.keep(master.newest.next())
    newer = path.read_bytes()
    with pytest.raises(KeyFileError) as caught:
        restore_master(path, copy)
    assert caught.value.reason == "newer-key"
    assert path.read_bytes() == newer
    restore_master(path, newer)


def test_what_is_no_key_file_is_not_put_back(path):
    made(path)
    kept = path.read_bytes()
    with pytest.raises(KeyFileError):
        restore_master(path, b"{}")
    assert path.read_bytes() == kept


def test_no_copy_is_made_while_an_erasure_is_under_way(path):
    master = made(path)
    with master.exclusive():
        master.keep(master.newest, master.newest.next())
    with pytest.raises(KeyFileError) as caught:
        backup_master(path)
    assert caught.value.reason == "erasing"


def test_only_one_process_at_a_time_changes_the_file(path):
    made(path)
    script = """
import sys
from pathlib import Path
from rlhf_audit_nb.trail.vault_key import MasterKey
master = MasterKey.load(Path(sys.argv[1]))
for _ in range(20):
    with master.exclusive():
        before = master.newest
        master.keep(before, before.next())
        master.keep(before.next())
"""
    runs = [subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT) for _ in range(3)]
    assert [run.wait(60) for run in runs] == [0, 0, 0]
    assert numbers(path) == [61]


def test_a_folder_that_cannot_be_written_leaves_the_file_as_it_is(path, monkeypatch):
    master = made(path)
    kept = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlhf_audit_nb.trail.vault_key.write_durably", full)
    with master.exclusive(), pytest.raises(KeyFileError) as caught:
        master.keep(master.newest.next())
    assert "No space left" in caught.value.message
    assert path.read_bytes() == kept
    assert master.newest.number == 1


def test_what_a_killed_write_left_behind_goes_with_the_next_one(path):
    master = made(path)
    left = path.with_name(".vault.key.0123456789ab")
    left.write_bytes(path.read_bytes())
    other = path.with_name("log.pem")
    other.write_bytes(b"another file")
    with master.exclusive():
        master.keep(master.newest.next())
    assert not left.exists()
    assert other.exists()
    assert numbers(path) == [2]
