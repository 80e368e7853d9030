"""Sealing and opening, and whether every commitment has its opening."""

from __future__ import annotations

import base64
import random
import sqlite3
from contextlib import closing

import pytest

from rlhf_audit_nb.errors import AuditError, VaultError
from rlhf_audit_nb.trail import Opening, Trail, TrailReader, check_opening
from rlhf_audit_nb.trail.erasure import erase
from rlhf_audit_nb.trail.vault import OpeningsCheck, Sealed, Vault, commitment_of
from rlhf_audit_nb.trail.vault_key import MasterKey


def test_the_commitment_has_its_golden_value(vectors):
    golden = vectors("commitment")
    opening = Opening(bytes.fromhex(golden["key"]), golden["payload"].encode())
    found = commitment_of(golden["type"], golden["stream"], golden["seq"], opening)
    assert found.hex() == golden["commitment"]
    assert check_opening(found, "train.step", "run-1", 7, opening)
    assert not check_opening(found, "train.step", "run-1", 8, opening)
    assert not check_opening(found, "train.other", "run-1", 7, opening)
    assert not check_opening(found, "train.step", "run-1", 7, Opening(opening.key, opening.payload + b"\0"))


def test_private_payloads_stand_only_in_the_vault_and_open_under_the_key(folder, home):
    secret = b'{"loss":0.123456789,"annotator":"Zsofia"}'
    with Trail.open(folder) as trail:
        index = trail.append("train.step", b"{}", run="r", private=secret, owner="Zsofia").wait()
        (entry,) = trail.reader().entries(index)
        commitment = base64.b64decode(entry.envelope.sealed)
        assert trail.vault.opening("train.step", "r", 0, commitment).payload == secret
        assert check_opening(commitment, "train.step", "r", 0, trail.vault.opening("train.step", "r", 0, commitment))
        with pytest.raises(VaultError) as caught:
            trail.vault.opening("a.b", "r", 1, commitment)
        assert caught.value.reason == "opening-missing"
        with pytest.raises(VaultError) as caught:
            trail.vault.opening("a.b", "r", 0, bytes(32))
        assert caught.value.reason == "opening-missing"
    for path in folder.iterdir():
        if path.is_file():
            assert b"Zsofia" not in path.read_bytes()
            assert b"0.123456789" not in path.read_bytes()
    assert (folder / "vault.sqlite").stat().st_mode & 0o077 == 0
    with pytest.raises(VaultError) as caught:
        Vault(folder / "vault.sqlite", MasterKey.create(folder / "other.key")).opening("a.b", "r", 0, commitment)
    assert caught.value.reason == "vault-key"


def test_equal_payloads_have_different_commitments(folder):
    with Trail.open(folder) as trail:
        for _ in range(2):
            trail.append("a.b", b"{}", run="r", private=b"same")
        sealed = {entry.envelope.sealed for entry in trail.reader().entries(run="r")}
    assert len(sealed) == 2


def sealed(number: int, owner: str | None, payload: bytes = b"a payload") -> Sealed:
    opening = Opening(number.to_bytes(32, "big"), payload)
    return Sealed(commitment_of("a.b", "r", number, opening), owner, "a.b", "r", number, opening)


@pytest.fixture
def vault(tmp_path):
    master = MasterKey.create(tmp_path / "vault.key")
    master.path.write_bytes(master.encode())
    made = Vault(tmp_path / "vault.sqlite", master)
    yield made
    made.close()


def test_many_owners_in_one_go_open_each_for_itself(vault):
    items = [sealed(n, f"annotator {n % 7}" if n % 8 else None, b"payload %d" % n) for n in range(300)]
    vault.seal(items[:100])
    vault.seal(items[100:])
    for item in items:
        assert vault.opening("a.b", "r", item.seq, item.commitment).payload == item.opening.payload


def test_an_annotator_who_is_called_like_a_run_is_not_that_run(vault):
    vault.seal([sealed(0, None), sealed(1, "r")])
    with vault._master.exclusive():
        assert vault.erase("r", "request").openings == 1
    assert vault.opening("a.b", "r", 0, sealed(0, None).commitment).payload == b"a payload"


def test_openings_of_one_place_are_told_apart(vault):
    # A commit that failed after the vault's own leaves an opening behind, and the place is taken by another entry.
    items = [sealed(3, "ann", b"payload %d" % n) for n in range(3)]
    vault.seal(items[:2])
    vault.seal(items[2:])
    for item in items:
        assert vault.opening("a.b", "r", 3, item.commitment).payload == item.opening.payload


def test_an_opening_that_is_not_the_commitments_is_refused(vault):
    vault.seal([Sealed(bytes(32), "ann", "a.b", "r", 0, Opening(bytes(32), b""))])
    with pytest.raises(VaultError) as caught:
        vault.opening("a.b", "r", 0, bytes(32))
    assert caught.value.reason == "opening-wrong"


def check(folder, master=None):
    looked = OpeningsCheck(folder / "vault.sqlite", master)
    for entry in TrailReader.open(folder).entries():
        looked.add(entry)
    return looked.finish(), [reason.code for reason in looked.reasons], looked.reasons


def test_every_commitment_is_looked_up_in_the_vault(folder):
    with Trail.open(folder) as trail:
        for number in range(20):
            trail.append("a.b", b"{}", run="r", private=b"one", owner=f"annotator {number % 3}")
        trail.append("a.b", b"{}", run="r")
        trail.flush()
        summary, codes, _ = check(folder)
        assert (summary.checked, summary.decrypted) == (True, False)
        summary, codes, _ = check(folder, trail.keys.master)
        assert (summary.commitments, summary.openings, summary.erased, summary.missing) == (20, 20, 0, 0)
        assert summary.decrypted
        assert codes == []


def test_without_a_vault_nothing_is_looked_up_and_that_is_said(folder):
    with Trail.open(folder) as trail:
        trail.append("a.b", b"{}", run="r", private=b"one")
    (folder / "vault.sqlite").unlink()
    summary, codes, _ = check(folder)
    assert (summary.checked, summary.commitments, summary.missing) == (False, 1, 0)
    assert codes == []


def test_openings_that_no_entry_names_do_no_harm(folder):
    with Trail.open(folder) as trail:
        for number in range(30):
            if number in (0, 7, 8, 29):
                trail.vault.seal([sealed(number, "ann")])
            trail.append("a.b", b"{}", run="r", private=b"one").wait()
    summary, codes, _ = check(folder)
    assert (summary.commitments, summary.openings, summary.missing) == (30, 30, 0)
    assert codes == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("DELETE FROM openings WHERE id = 3", "opening-missing"),
        ("UPDATE openings SET sealed = NULL WHERE id = 3", "opening-missing"),
        ("UPDATE openings SET sealed = NULL, owner = NULL, erasure = 1 WHERE id = 3", "opening-missing"),
        ("UPDATE openings SET commitment = zeroblob(32) WHERE id = 3", "opening-missing"),
        ("DELETE FROM openings", "opening-missing"),
        ("UPDATE openings SET sealed = zeroblob(length(sealed)) WHERE id = 3", "opening-wrong"),
        ("UPDATE openings SET sealed = (SELECT sealed FROM openings WHERE id = 4) WHERE id = 3", "opening-wrong"),
        ("DELETE FROM owners", "opening-wrong"),
    ],
)
def test_an_opening_that_was_taken_out_or_changed_is_named(folder, change, code):
    with Trail.open(folder) as trail:
        for _ in range(5):
            trail.append("a.b", b"{}", run="r", private=b"one", owner="ann")
        trail.flush()
        master = trail.keys.master
    with sqlite3.connect(folder / "vault.sqlite") as raw:
        raw.execute(change)
    raw.close()
    summary, codes, reasons = check(folder, master)
    assert set(codes) == {code}
    assert summary.missing == len(codes) == (5 if "WHERE" not in change else 1)
    assert reasons[0].where == ("entry 1" if "WHERE" not in change else "entry 3")
    assert summary.openings + summary.missing == summary.commitments == 5


def test_a_vault_of_another_layout_is_refused(folder):
    with Trail.open(folder) as trail:
        trail.append("a.b", b"{}", private=b"x")
    with sqlite3.connect(folder / "vault.sqlite") as raw:
        raw.execute("PRAGMA user_version=9")
    raw.close()
    with pytest.raises(VaultError) as caught:
        check(folder)
    assert caught.value.reason == "unknown-layout"


@pytest.fixture
def erased_from(folder):
    """A trail of 12 private payloads, of which an erasure took four; the key."""
    with Trail.open(folder) as trail:
        for number in range(12):
            trail.append("a.b", b"{}", run="r", private=b"x" * 40 * number, owner=f"w{number % 3}")
        erase(trail, "w1", reason="request")
        return folder, trail.keys.master


def faults(folder, master):
    """What every use of the vault says; nothing where it is whole. Anything but a sentence of ours is a failure."""
    try:
        return every_use(folder, master)
    except AuditError as error:
        return {error.reason}


def every_use(folder, master):
    said = set()
    for key in (None, master):
        looked = OpeningsCheck(folder / "vault.sqlite", key)
        with closing(looked):
            for entry in TrailReader.open(folder).entries():
                looked.add(entry)
            looked.finish()
        said |= {reason.code for reason in looked.reasons}
    with closing(Vault(folder / "vault.sqlite", master)) as vault:
        vault.settled()
        vault.erasures()
        vault.unlogged()
        vault.count("w0")
        for entry in TrailReader.open(folder).entries(type="a.b"):
            if entry.seq % 3 != 1:
                vault.opening("a.b", "r", entry.seq, base64.b64decode(entry.envelope.sealed))
    return said


@pytest.mark.slow
def test_a_damaged_vault_gets_a_sentence_whatever_is_damaged(erased_from):
    folder, master = erased_from
    path = folder / "vault.sqlite"
    assert faults(folder, master) == set()
    whole, chance, said = path.read_bytes(), random.Random(1), set()
    for at in range(0, len(whole), 61):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << chance.randrange(8)
        for left in folder.glob("vault.sqlite-*"):
            left.unlink()
        path.write_bytes(damaged)
        said |= faults(folder, master)
    assert {"malformed", "vault-key"} <= said


@pytest.mark.parametrize("value", ["NULL", "7", "2.5", "'text'", "x'00'", "x''"])
@pytest.mark.parametrize(
    ("table", "column"),
    [
        ("state", "generation"),
        ("owners", "tag"),
        ("owners", "wrapped"),
        ("openings", "stream"),
        ("openings", "seq"),
        ("openings", "commitment"),
        ("openings", "owner"),
        ("openings", "erasure"),
        ("openings", "sealed"),
        ("erasures", "name"),
        ("erasures", "salt"),
    ],
)
def test_a_value_of_the_wrong_kind_gets_a_sentence(erased_from, table, column, value):
    folder, master = erased_from
    where = "WHERE id = 1" if table == "owners" else ""
    with closing(sqlite3.connect(folder / "vault.sqlite", isolation_level=None)) as raw:
        taken = True
        try:
            raw.execute(f"UPDATE {table} SET {column} = {value} {where}")
        except sqlite3.IntegrityError:
            taken = False  # SQLite itself keeps this out
    assert taken or value == "NULL"
    assert bool(faults(folder, master)) is taken
