"""People's keys: their own, encrypted, never a trail's; an HSM may hold them."""

from __future__ import annotations

import base64
import stat
import subprocess

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from rlhf_audit_nb.errors import KeyFileError
from rlhf_audit_nb.trail.keys import create_keys, encode_private
from rlhf_audit_nb.trail.people import (
    create_person_key,
    key_from_file,
    load_person_key,
    people_here,
    person_name,
    refuse_trail_key,
    spki_of_vkey,
)
from rlhf_audit_nb.trail.signers import FileKey, HeldKey, check_bytes, load_public

NAME, SECRET = "Name of the Officer", "five random words here"


@pytest.fixture(autouse=True)
def no_passphrase(monkeypatch):
    monkeypatch.delenv("RLHF_AUDIT_PERSON_PASSPHRASE", raising=False)


@pytest.mark.parametrize(("kind", "words"), [("p256", "ECDSA P-256"), ("ed25519", "Ed25519")])
def test_a_person_has_a_key_that_signs_and_lies_encrypted(tmp_path, kind, words):
    made = create_person_key(tmp_path, NAME, SECRET, kind=kind)
    assert (made.name, made.kind, made.encrypted, made.where) == (NAME, words, True, "file")
    assert people_here(tmp_path) == (made,)
    private = made.folder / "person.pem"
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in private.read_bytes()
    assert {stat.S_IMODE(path.stat().st_mode) for path in made.folder.iterdir()} == {0o600}
    person, key = load_person_key(tmp_path, NAME, SECRET)
    assert person == made
    assert check_bytes(load_public(key.spki), key.sign(b"words"), b"words")
    assert not check_bytes(load_public(key.spki), key.sign(b"words"), b"other words")
    # openssl reads what others are given, and its digest is the id.
    der = subprocess.run(
        ["openssl", "pkey", "-pubin", "-outform", "DER"], input=made.pem.encode(), capture_output=True, check=True
    ).stdout
    said = subprocess.run(["openssl", "dgst", "-sha256", "-r"], input=der, capture_output=True, check=True).stdout
    assert said.split()[0].decode() == made.id


def test_a_wrong_passphrase_or_none_signs_nothing(tmp_path, monkeypatch):
    create_person_key(tmp_path, NAME, SECRET)
    for given in (None, "another one here"):
        with pytest.raises(KeyFileError) as refused:
            load_person_key(tmp_path, NAME, given)
        assert refused.value.reason == "passphrase"
    monkeypatch.setenv("RLHF_AUDIT_PASSPHRASE", SECRET)  # that of the trail's keys is not a person's
    with pytest.raises(KeyFileError):
        load_person_key(tmp_path, NAME)
    monkeypatch.setenv("RLHF_AUDIT_PERSON_PASSPHRASE", SECRET)
    assert load_person_key(tmp_path, NAME)[0].name == NAME


def test_unencrypted_only_where_it_was_asked_for(tmp_path):
    with pytest.raises(KeyFileError, match="at least 8"):
        create_person_key(tmp_path, NAME, "")
    assert people_here(tmp_path) == ()
    plain = create_person_key(tmp_path, NAME, None)
    assert not plain.encrypted
    assert b"BEGIN PRIVATE KEY" in (plain.folder / "person.pem").read_bytes()


def test_a_key_is_never_replaced(tmp_path):
    made = create_person_key(tmp_path, NAME, SECRET)
    before = {path.name: path.read_bytes() for path in made.folder.iterdir()}
    with pytest.raises(KeyFileError) as refused:
        create_person_key(tmp_path, f" {NAME}  ", SECRET)
    assert refused.value.reason == "keys-exist"
    assert {path.name: path.read_bytes() for path in made.folder.iterdir()} == before
    assert list(made.folder.parent.iterdir()) == [made.folder]


@pytest.mark.parametrize("name", ["../../x", ".", "..", ".hidden", "Zoë Ünal", "a/b", "100 %", "李 明"])
def test_any_printed_name_has_a_folder_of_its_own(tmp_path, name):
    made = create_person_key(tmp_path, name, None)
    assert made.folder.parent == tmp_path / "people"
    assert made.folder.name not in (".", "..")
    assert [person.name for person in people_here(tmp_path)] == [name]


@pytest.mark.parametrize("name", ["", "  ", "x" * 201, "a\x00b", "a\u202eb", "a\u200bb", "李" * 30])
def test_what_cannot_be_printed_is_no_name(name):
    with pytest.raises(KeyFileError) as refused:
        person_name(name)
    assert refused.value.reason == "name"


def test_a_trails_keys_are_nobodys(tmp_path):
    ring = create_keys(tmp_path, "example.org/team", None)
    for role, spki in (("log", ring.log.spki), ("record", ring.record_spki), ("model", ring.model_spki)):
        with pytest.raises(KeyFileError, match=f"This is the {role} key of the trail example.org/team") as refused:
            refuse_trail_key(tmp_path, spki)
        assert refused.value.reason == "trail-key"
    assert spki_of_vkey(ring.log_vkey) == ring.log.spki
    refuse_trail_key(tmp_path, FileKey(ec.generate_private_key(ec.SECP256R1())).spki)
    path = tmp_path / "record.pem"
    path.write_bytes((ring.folder.path / "record.pem").read_bytes())
    held = HeldKey(f"file2:{path}", load_public(ring.record_spki))
    with pytest.raises(KeyFileError, match="shows no person"):
        create_person_key(tmp_path, NAME, None, held=held)
    assert people_here(tmp_path) == ()


def test_keys_in_files_of_the_persons_own(tmp_path):
    path = tmp_path / "mine.pem"
    path.write_bytes(encode_private(ec.generate_private_key(ec.SECP256R1()), SECRET.encode()))
    assert key_from_file(path, SECRET).spki == FileKey(load_pem_private_key(path.read_bytes(), SECRET.encode())).spki
    for other in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)):
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        with pytest.raises(KeyFileError):
            key_from_file(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(KeyFileError, match="no private key"):
        key_from_file(path)
    with pytest.raises(KeyFileError, match="cannot be read"):
        key_from_file(tmp_path / "none.pem")


def test_a_damaged_folder_is_named(tmp_path):
    made = create_person_key(tmp_path, NAME, None)
    other = create_person_key(tmp_path, "Name of Another", None)
    (made.folder / "person.pub").write_bytes((other.folder / "person.pub").read_bytes())
    with pytest.raises(KeyFileError, match="not its public half"):
        load_person_key(tmp_path, NAME)
    (made.folder / "person.pub").unlink()
    with pytest.raises(KeyFileError, match="cannot be read"):
        people_here(tmp_path)
    with pytest.raises(KeyFileError, match="There is no key of Somebody"):
        load_person_key(tmp_path / "empty", "Somebody")


def test_a_key_that_is_held_elsewhere_signs_for_a_person(tmp_path):
    private = ec.generate_private_key(ec.SECP256R1())
    path = tmp_path / "held.pem"
    path.write_bytes(encode_private(private, None))
    held = HeldKey(f"file2:{path}", private.public_key())
    made = create_person_key(tmp_path, NAME, None, held=held)
    assert (made.where, made.encrypted) == (f"file2:{path}", False)
    assert sorted(path.name for path in made.folder.iterdir()) == ["person.pub", "person.signer"]
    _, key = load_person_key(tmp_path, NAME)
    assert check_bytes(held.public, key.sign(b"x"), b"x")
    assert base64.b64encode(key.spki) == base64.b64encode(held.spki)
