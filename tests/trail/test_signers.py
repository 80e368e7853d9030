"""Keys that are held elsewhere sign as keys in a file do, and nothing they sign wrongly reaches a trail."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import ClassVar

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Key, SecretsHandler, Signature, Signer
from support.softhsm import make_token

from rlhf_audit_nb.errors import FormatError, KeyFileError, StoreError
from rlhf_audit_nb.trail import Level, Trail, TrustPolicy, verify_trail
from rlhf_audit_nb.trail.keys import create_keys, load_keys
from rlhf_audit_nb.trail.note import ECDSA, ED25519, parse_vkey
from rlhf_audit_nb.trail.rotation import rotate_key
from rlhf_audit_nb.trail.signers import (
    FileKey,
    HeldKey,
    LogSigner,
    check_bytes,
    kind_of,
    load_public,
    public_of,
    read_public,
    spki_of,
)

ORIGIN = "example.org/held"


def written(path: Path, key) -> str:
    """A private key in a file, and its URI."""
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return f"file2:{path}"


def held(path: Path, key) -> HeldKey:
    return HeldKey(written(path, key), key.public_key())


def pem_of(public) -> bytes:
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


class StubService(Signer):
    """A key service behind securesystemslib's own interface: keys by name, and what can go wrong with a service."""

    SCHEME = "stubkms"
    keys: ClassVar[dict[str, CryptoSigner]] = {}
    fault: str = ""
    asked: ClassVar[list[str]] = []

    def __init__(self, name: str, public: Key) -> None:
        self._name = name
        self._public = public

    @classmethod
    def from_priv_key_uri(cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None):
        name = priv_key_uri.removeprefix(f"{cls.SCHEME}:")
        if cls.fault == "asks":
            cls.asked.append(secrets_handler("pin"))
        if name not in cls.keys:
            raise ValueError(f"no key {name}")
        return cls(name, public_key)

    @property
    def public_key(self) -> Key:
        return self._public

    def sign(self, payload: bytes) -> Signature:
        if self.fault == "down":
            raise ConnectionError("the service does not answer")
        if self.fault == "other":
            payload += b"!"
        return self.keys[self._name].sign(payload)


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setitem(SIGNER_FOR_URI_SCHEME, StubService.SCHEME, StubService)
    monkeypatch.setattr(StubService, "keys", {})
    monkeypatch.setattr(StubService, "fault", "")
    monkeypatch.setattr(StubService, "asked", [])
    return StubService


def in_service(service, name: str, private) -> HeldKey:
    service.keys[name] = CryptoSigner(private)
    return HeldKey(f"stubkms:{name}", private.public_key())


KINDS = {
    "Ed25519": Ed25519PrivateKey.generate,
    "ECDSA P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ECDSA P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ECDSA P-521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "ML-DSA-44": MLDSA44PrivateKey.generate,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_signs_alike_from_a_file_and_from_its_holder(kind, tmp_path):
    private = KINDS[kind]()
    public = private.public_key()
    assert kind_of(load_public(spki_of(public))) == kind
    with pytest.raises(FormatError, match="cannot be held elsewhere"):
        HeldKey("file2:x", MLDSA44PrivateKey.generate().public_key())
    holders = [FileKey(private)]
    if kind != "ML-DSA-44":
        holders.append(held(tmp_path / "key.pem", private))
    for key in holders:
        assert key.spki == spki_of(public)
        signature = key.sign(b"what is signed")
        assert check_bytes(public, signature, b"what is signed")
        assert not check_bytes(public, signature, b"what is signee")
        assert not check_bytes(KINDS[kind]().public_key(), signature, b"what is signed")
        assert not check_bytes(public, signature[:-1], b"what is signed")


def test_a_signer_file_holds_nothing_secret_and_comes_back(tmp_path):
    private = Ed25519PrivateKey.generate()
    key = held(tmp_path / "key.pem", private)
    again = HeldKey.decode(key.encode())
    assert (again.uri, again.spki) == (key.uri, key.spki)
    secret = private.private_bytes_raw()
    assert base64.b64encode(secret) not in key.encode()
    assert secret.hex().encode() not in key.encode()


@pytest.mark.parametrize(
    "data", [b"", b"{}", b'{"version":2,"uri":"x:","public":""}', b'{"version":1,"uri":"x:","public":"AAAA"}']
)
def test_a_file_that_is_no_signer_file_is_refused(data):
    with pytest.raises(FormatError):
        HeldKey.decode(data)


def test_keys_of_other_kinds_are_refused():
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    for call, data in ((load_public, spki_of(other)), (read_public, pem_of(other)), (read_public, b"not a key")):
        with pytest.raises(FormatError) as refused:
            call(data)
        assert refused.value.reason == "key-type"
    with pytest.raises(FormatError, match="ECDSA P-384 key cannot sign checkpoints"):
        LogSigner(ORIGIN, FileKey(ec.generate_private_key(ec.SECP384R1())))


@pytest.mark.parametrize(("kind", "algorithm"), [("Ed25519", ED25519), ("ECDSA P-256", ECDSA)])
def test_a_trail_whose_log_and_record_keys_are_held_elsewhere(folder, home, tmp_path, service, kind, algorithm):
    log, record = in_service(service, "log", KINDS[kind]()), held(tmp_path / "record.pem", KINDS[kind]())
    create_keys(home, ORIGIN, log=log, record=record)
    with Trail.open(folder, origin=ORIGIN) as trail:
        assert parse_vkey(trail.log_vkey).algorithm == algorithm
        assert trail.keys.record_spki == record.spki
        for _ in range(5):
            trail.append("note.taken", b"{}")
        key = trail.log_vkey
    with Trail.open(folder) as trail:
        trail.append("note.taken", b"{}").wait()
    assert verify_trail(folder).level is Level.UNANCHORED
    policy = TrustPolicy.parse(f"log {key}\nquorum none\n")
    assert verify_trail(folder, policy=policy).signers == (key,)
    ring = next((home / "keys").glob("[!.]*"))
    assert not (ring / "log.pem").exists()
    assert not (ring / "record.pem").exists()


def test_a_key_in_a_file_gives_way_to_one_that_is_held_and_back(folder, home, service):
    with Trail.open(folder, origin=ORIGIN) as trail:
        first = trail.log_vkey
        away = rotate_key(trail, "log", new=in_service(service, "log", KINDS["ECDSA P-256"]()))
        trail.append("note.taken", b"{}").wait()
        rotate_key(trail, "record", new=in_service(service, "record", KINDS["ECDSA P-384"]()))
    ring = next((home / "keys").glob("[!.]*"))
    assert (ring / "log.signer").exists()
    assert not (ring / "log.pem").exists()
    with Trail.open(folder) as trail:
        assert trail.log_vkey == away.new
        assert kind_of(load_public(trail.keys.record_spki)) == "ECDSA P-384"
        back = rotate_key(trail, "log")
        trail.append("note.taken", b"{}").wait()
    assert (ring / "log.pem").exists()
    assert not (ring / "log.signer").exists()
    for key in (first, away.new, back.new):
        policy = TrustPolicy.parse(f"log {key}\nquorum none\n")
        assert verify_trail(folder, policy=policy).level is Level.UNANCHORED


@pytest.mark.parametrize(("fault", "said"), [("down", "does not answer"), ("other", "not by the key")])
def test_a_service_that_fails_or_signs_something_else_loses_nothing(folder, home, service, fault, said):
    create_keys(home, ORIGIN, log=in_service(service, "log", KINDS["Ed25519"]()))
    with Trail.open(folder, origin=ORIGIN) as trail:
        trail.append("note.taken", b'{"n":1}').wait()
        size = trail.status().size
        service.fault = fault
        with pytest.raises(KeyFileError, match=said) as refused:
            trail.append_guarded("note.taken", lambda _reader: b'{"n":2}')
        assert refused.value.reason == "signer"
        service.fault = ""
        trail.append("note.taken", b'{"n":3}').wait()
        assert trail.status().size == size + 1
    assert verify_trail(folder).level is Level.UNANCHORED


def test_a_service_that_is_away_while_entries_are_queued_is_said_to_whoever_appends(folder, home, service):
    create_keys(home, ORIGIN, log=in_service(service, "log", KINDS["ECDSA P-256"]()))
    trail = Trail.open(folder, origin=ORIGIN)
    trail.append("note.taken", b'{"n":1}').wait()
    service.fault = "down"
    with pytest.raises(StoreError, match="does not answer") as refused:
        trail.append("note.taken", b'{"n":2}').wait()
    assert refused.value.reason == "signer"
    service.fault = ""
    with pytest.raises(StoreError, match="does not answer"):
        trail.close()
    with Trail.open(folder) as again:
        again.append("note.taken", b'{"n":3}').wait()
        told = [json.loads(entry.body)["n"] for entry in again.reader().entries(type="note.taken")]
    assert told == [1, 3]
    assert verify_trail(folder).level is Level.UNANCHORED


@pytest.mark.parametrize(("fault", "name"), [("down", "new"), ("other", "new"), ("", "missing")])
def test_a_rotation_to_a_key_that_cannot_sign_changes_nothing(folder, home, service, fault, name):
    with Trail.open(folder, origin=ORIGIN) as trail:
        before, size = trail.log_vkey, trail.status().size
        service.keys["new"] = CryptoSigner(Ed25519PrivateKey.generate())
        service.fault = fault
        with pytest.raises(KeyFileError):
            rotate_key(trail, "log", new=HeldKey(f"stubkms:{name}", Ed25519PrivateKey.generate().public_key()))
        service.fault = ""
        assert (trail.log_vkey, trail.status().size) == (before, size)
        trail.append("note.taken", b"{}").wait()
    assert load_keys(home, ORIGIN).log_vkey == before


@pytest.mark.parametrize("role", ["model", "mldsa"])
def test_roles_that_need_the_key_itself_say_so(folder, home, service, role):
    key = in_service(service, "new", KINDS["ECDSA P-256"]())
    with Trail.open(folder, origin=ORIGIN) as trail, pytest.raises(KeyFileError, match="needs the key itself"):
        rotate_key(trail, role, new=key)


def test_a_pin_comes_from_the_environment_or_its_lack_is_said(service, monkeypatch):
    monkeypatch.delenv("RLHF_AUDIT_SIGNER_PIN", raising=False)
    service.fault = "asks"
    with pytest.raises(KeyFileError, match="asks for its pin") as refused:
        in_service(service, "log", KINDS["Ed25519"]()).sign(b"x")
    assert refused.value.reason == "passphrase"
    monkeypatch.setenv("RLHF_AUDIT_SIGNER_PIN", "1234")
    in_service(service, "log", KINDS["Ed25519"]()).sign(b"x")
    assert service.asked == ["1234"]


def test_the_public_half_is_read_where_its_holder_tells_it_and_asked_for_elsewhere(tmp_path):
    private = Ed25519PrivateKey.generate()
    assert spki_of(public_of(written(tmp_path / "key.pem", private))) == spki_of(private.public_key())
    for uri in ("gcpkms:projects/p/key", f"file2:{tmp_path}/none.pem", "hsm:2?label=none"):
        with pytest.raises(KeyFileError, match=r"(must be told|cannot be read)") as refused:
            public_of(uri)
        assert "--public" in refused.value.next_step


def test_a_forked_child_connects_on_its_own(service):
    key = in_service(service, "log", KINDS["Ed25519"]())
    key.sign(b"x")
    before = key._signer
    pid = os.fork()
    if pid == 0:
        key.sign(b"y")
        os._exit(0 if key._signer[0] == os.getpid() and key._signer[1] is not before[1] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.fixture
def token(tmp_path, monkeypatch):
    """A PKCS #11 token with an ECDSA P-256 key of id 2: its URI."""
    return make_token(tmp_path, monkeypatch)


def test_an_hsm_signs_a_trail(folder, home, token, monkeypatch):
    key = HeldKey(token, public_of(token))
    with Trail.open(folder, origin=ORIGIN) as trail:
        rotation = rotate_key(trail, "log", new=key)
        trail.append("note.taken", b"{}").wait()
    assert parse_vkey(rotation.new).algorithm == ECDSA
    assert parse_vkey(rotation.new).key_id == hashlib.sha256(key.spki).digest()[:4]
    assert (
        verify_trail(folder, policy=TrustPolicy.parse(f"log {rotation.new}\nquorum none\n")).level is Level.UNANCHORED
    )
    monkeypatch.setenv("RLHF_AUDIT_SIGNER_PIN", "000000")
    with pytest.raises(KeyFileError) as refused, Trail.open(folder) as trail:
        trail.append_guarded("note.taken", lambda _reader: b"{}")
    assert refused.value.reason == "signer"
