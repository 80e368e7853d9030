"""People sign a record: from outside with openssl, forged in every way, taken out with and without the trail."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sqlite3
import subprocess
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from signing_support import seal_text
from support.softhsm import make_token

from rlhf_audit_nb.auditor import AuditableRLHF
from rlhf_audit_nb.config import AuditConfig
from rlhf_audit_nb.errors import ConfigError, FormatError, KeyFileError, RecordError
from rlhf_audit_nb.events import RecordAttested, decode_body
from rlhf_audit_nb.records import attesting, open_record
from rlhf_audit_nb.records.additions import ATTESTATION, envelope_digest, subject_of
from rlhf_audit_nb.records.attesting import (
    ask_trail,
    attest_record,
    attestation_notes,
    attestations_of,
    carry_to_copy,
    enter_attestations,
    known_attestations,
    signed_by,
    trail_keys,
    trail_of,
)
from rlhf_audit_nb.records.dsse import key_id, sign_envelope
from rlhf_audit_nb.records.kept import kept_record
from rlhf_audit_nb.records.normal_form import canonical_json
from rlhf_audit_nb.records.session import RecordSession
from rlhf_audit_nb.records.signatures import Person, Requirement, count_attestations
from rlhf_audit_nb.trail import Level, Trail, TrailReader, verify_trail
from rlhf_audit_nb.trail.keys import load_keys
from rlhf_audit_nb.trail.people import create_person_key, load_person_key
from rlhf_audit_nb.trail.rotation import rotate_key
from rlhf_audit_nb.trail.signers import FileKey, HeldKey, public_of

ORIGIN = "example.org/attested"
OFFICER, ROLE = "Name of the officer", "compliance officer"
SAYS = {"name": OFFICER, "role": ROLE, "statement": "I have read the report of this record."}
PLACE = "metadata.rlhf_audit.additions"


@dataclass(frozen=True)
class Place:
    """A trail with keys, and records on it."""

    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def trail(self) -> Path:
        return self.folder / "audit"

    @property
    def record(self) -> Path:
        return self.folder / "record.ipynb"

    @property
    def other(self) -> Path:
        return self.folder / "other.ipynb"

    def opened(self, path: Path | None = None):
        return open_record(path or self.record, home=self.home)

    def attest(self, key, path: Path | None = None, **said):
        return attest_record(path or self.record, key, home=self.home, **{**SAYS, **said})

    def enter(self):
        with Trail.open(self.trail) as trail:
            return enter_attestations(trail, self.opened())

    def known(self):
        return known_attestations(self.trail, self.opened(), home=self.home)

    def cut(self, count: int = 1) -> None:
        """Take the last additions out of the file, as whoever has it can."""
        notebook = json.loads(self.record.read_bytes())
        seal = notebook["metadata"]["rlhf_audit"]
        del seal["additions"][-count:]
        if not seal["additions"]:
            del seal["additions"]
        self.record.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attested")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_AUDIT_HOME", str(folder / "home"))
        patch.delenv("RLHF_AUDIT_PASSPHRASE", raising=False)
        with Trail.open(folder / "audit", origin=ORIGIN):
            pass
        seal_text(folder / "audit", folder / "record.ipynb", "one")
        seal_text(folder / "audit", folder / "other.ipynb", "two")
    return folder


@pytest.fixture
def place(template, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    shutil.copytree(template, folder)
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(folder / "home"))
    monkeypatch.delenv("RLHF_AUDIT_TRAIL", raising=False)
    monkeypatch.chdir(tmp_path)
    return Place(folder)


@pytest.fixture
def key():
    return FileKey(ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def another():
    return FileKey(Ed25519PrivateKey.generate())


def policy_for(*keys, roles=(ROLE,)):
    return tuple(Person(OFFICER if not i else f"Person {i}", (key_id(k.spki),), roles) for i, k in enumerate(keys))


# -- signing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["p256", "ed25519"])
def test_openssl_verifies_the_signature_with_the_persons_public_key(place, tmp_path, key, another, kind):
    signer = key if kind == "p256" else another
    item = place.attest(signer, purpose="deployment")
    envelope = json.loads(place.record.read_bytes())["metadata"]["rlhf_audit"]["additions"][0]
    payload = base64.b64decode(envelope["payload"])
    (tmp_path / "key.pem").write_text(item.key, encoding="utf-8")
    (tmp_path / "signature").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))

    def openssl_says(data: bytes) -> int:
        (tmp_path / "signed").write_bytes(data)
        if kind == "p256":
            command = ["openssl", "dgst", "-sha256", "-verify", "key.pem", "-signature", "signature", "signed"]
        else:
            command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "key.pem", "-rawin"]
            command += ["-sigfile", "signature", "-in", "signed"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode

    signed = b"DSSEv1 %d %b %d %b" % (28, b"application/vnd.in-toto+json", len(payload), payload)
    assert openssl_says(signed) == 0
    assert openssl_says(signed.replace(b"approved", b"reviewed")) != 0
    said = json.loads(payload)["predicate"]
    assert {name: said[name] for name in ("name", "role", "meaning", "purpose", "statement")} == {
        **SAYS,
        "meaning": "approved",
        "purpose": "deployment",
    }


def test_an_attestation_changes_nothing_else_in_the_record(place, key):
    before = json.loads(place.record.read_bytes())
    level = place.opened().verdict.level
    item = place.attest(key)
    after = json.loads(place.record.read_bytes())
    opened = place.opened()
    assert opened.verdict.level is level is Level.UNANCHORED
    assert attestations_of(opened) == (item,)
    assert (item.name, item.role, item.meaning, item.purpose) == (OFFICER, ROLE, "approved", None)
    assert item.key_id == key_id(key.spki)
    seal = after["metadata"]["rlhf_audit"]
    del seal["additions"]
    assert {**seal, "version": 0} == {**before["metadata"]["rlhf_audit"], "version": 0}
    after["metadata"]["rlhf_audit"] = before["metadata"]["rlhf_audit"]
    assert after == before


def test_a_trails_key_is_no_persons(place):
    ring = load_keys(place.home, ORIGIN)
    before = place.record.read_bytes()
    for signer in (ring.log, ring.record, FileKey(ring.model)):
        with pytest.raises(KeyFileError) as refused:
            place.attest(signer)
        assert refused.value.reason == "trail-key"
    # Nor where the trail's private keys are not on this machine, nor after they were replaced.
    policy = place.opened() and load_policy(place)
    for signer in (ring.log, ring.record, FileKey(ring.model)):
        with pytest.raises(KeyFileError, match="the record's trail"):
            attest_record(place.record, signer, policy=policy, home=place.folder / "elsewhere", **SAYS)
    assert place.record.read_bytes() == before
    assert {key_id(key.spki) for key in (ring.log, ring.record, FileKey(ring.model))} == trail_keys(place.opened())


def load_policy(place):
    from rlhf_audit_nb.trail.keys import local_policy

    return local_policy(place.home, ORIGIN)


def test_keys_that_followed_are_the_trails_too(place):
    with Trail.open(place.trail) as trail:
        for role in ("log", "record", "model"):
            rotate_key(trail, role)
    seal_text(place.trail, place.record, "later")
    ring = load_keys(place.home, ORIGIN)
    assert trail_keys(place.opened()) >= {key_id(key.spki) for key in (ring.log, ring.record, FileKey(ring.model))}
    with pytest.raises(KeyFileError):
        place.attest(ring.record)


@pytest.mark.parametrize(
    "said",
    [
        {"name": " "},
        {"role": ""},
        {"role": "a\x00b"},
        {"statement": "  "},
        {"statement": "x" * 4001},
        {"statement": "\x1b[2J"},
        {"purpose": ""},
        {"purpose": "x" * 201},
        {"meaning": "nodded"},
        {"name": "a\u202eb"},
    ],
)
def test_what_cannot_be_printed_is_not_signed(place, key, said):
    before = place.record.read_bytes()
    with pytest.raises((ConfigError, KeyFileError)):
        place.attest(key, **said)
    assert place.record.read_bytes() == before


def test_nothing_is_signed_on_a_record_that_does_not_hold(place, key):
    text = place.record.read_text().replace('"one"', '"won"')
    place.record.write_text(text)
    with pytest.raises(RecordError, match="INVALID"):
        place.attest(key)
    assert place.record.read_text() == text


def test_a_key_signs_under_one_name(place, key):
    place.attest(key)
    with pytest.raises(ConfigError, match="has signed this record as Name of the officer"):
        place.attest(key, name="Somebody else")
    assert len(attestations_of(place.opened())) == 1


def test_the_same_key_replaces_what_it_signed_and_both_are_shown(place, key, another):
    first = place.attest(key, meaning="rejected", statement="Not like this.")
    place.attest(another, name="Person 1", role="lead", meaning="reviewed")
    assert [note.code for note in attestation_notes(place.opened())] == ["rejected"]
    place.attest(key, statement="Now it is well.")
    items = attestations_of(place.opened())
    assert [item.replaced_by for item in items] == [2, None, None]
    assert items[0].statement == first.statement
    assert attestation_notes(place.opened()) == ()
    # A word for one use takes the place of no word for another.
    place.attest(key, meaning="rejected", purpose="a hospital")
    assert [item.replaced_by for item in attestations_of(place.opened())] == [2, None, None, None]


# -- forging ----------------------------------------------------------------------------------------------------------


def forged(place, signer, change=lambda statement: statement, path=None):
    """An addition at the end, made by whoever has the file and a key of their own."""
    path = path or place.record
    notebook = json.loads(path.read_bytes())
    seal = notebook["metadata"]["rlhf_audit"]
    there = seal.get("additions", [])
    opened = place.opened(path)
    own = base64.b64decode(seal["statement"]["payload"])
    item = place_predicate(signer, envelope_digest(there[-1]) if there else None)
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": subject_of(opened.sealed.digest, own),
        "predicateType": ATTESTATION,
        "predicate": item,
    }
    envelope = sign_envelope(canonical_json(change(statement)), [signer])
    there.append(json.loads(json.dumps(plain(envelope))))
    seal.update(version=2, additions=there)
    path.write_text(json.dumps(notebook), encoding="utf-8")


def plain(envelope):
    signatures = [{"keyid": one.keyid, "sig": one.sig} for one in envelope.signatures]
    return {"payloadType": envelope.payloadType, "payload": envelope.payload, "signatures": signatures}


def place_predicate(signer, previous):
    from rlhf_audit_nb.trail.people import pem_of

    return {
        **SAYS,
        "meaning": "approved",
        "key": pem_of(signer.spki),
        "time": "2999-01-01T00:00:00Z",
        "previous": previous,
    }


def edited(place, change):
    """Rewrites the payload of the first addition without signing it anew."""
    notebook = json.loads(place.record.read_bytes())
    envelope = notebook["metadata"]["rlhf_audit"]["additions"][0]
    payload = base64.b64decode(envelope["payload"])
    after = change(payload)
    assert after != payload
    envelope["payload"] = base64.b64encode(after).decode()
    place.record.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"I have read", b"I have seen"),
        (b"compliance officer", b"compliance manager"),
        (b'"approved"', b'"reviewed"'),
        (b"Name of the officer", b"Name of an officer."),
        (b'"time":"2', b'"time":"1'),
    ],
)
def test_a_changed_word_makes_the_record_invalid_and_is_named(place, key, old, new):
    place.attest(key)
    edited(place, lambda payload: payload.replace(old, new))
    opened = place.opened()
    assert opened.verdict.level is Level.INVALID
    assert [reason.where.startswith(f"{PLACE}[0]") for reason in opened.verdict.reasons] == [True]


def test_an_attestation_fits_no_other_record(place, key):
    place.attest(key, path=place.other)
    borrowed = json.loads(place.other.read_bytes())["metadata"]["rlhf_audit"]["additions"]
    notebook = json.loads(place.record.read_bytes())
    notebook["metadata"]["rlhf_audit"].update(version=2, additions=borrowed)
    place.record.write_text(json.dumps(notebook), encoding="utf-8")
    opened = place.opened()
    assert opened.verdict.level is Level.INVALID
    assert [reason.where.startswith(f"{PLACE}[0]") for reason in opened.verdict.reasons] == [True]
    assert attestations_of(opened) == ()


def test_one_taken_out_of_the_middle_is_seen(place, key, another):
    place.attest(key, meaning="rejected")
    place.attest(another, name="Person 1")
    notebook = json.loads(place.record.read_bytes())
    del notebook["metadata"]["rlhf_audit"]["additions"][0]
    place.record.write_text(json.dumps(notebook), encoding="utf-8")
    assert place.opened().verdict.level is Level.INVALID


def test_anybody_can_sign_under_any_name_and_no_policy_counts_it(place, key, another):
    forged(place, another, at("now"))
    opened = place.opened()
    assert opened.verdict.level is Level.UNANCHORED
    (item,) = attestations_of(opened)
    assert item.name == OFFICER
    people = policy_for(key)
    finding, _ = count_attestations((item,), [Requirement(role=ROLE)], people, trail_keys(opened))
    assert not finding.met
    assert "a key that the policy does not name" in finding.why
    assert "it does not count" in signed_by(opened, people)[0][1]
    assert "whose key this is, no file proves" in signed_by(opened)[0][1]
    assert signed_by(opened, policy_for(another))[0][1] == "the policy names this key and this role"


def at(when):
    """A statement with another time: ``now`` or RFC 3339 text."""
    from datetime import UTC, datetime

    time = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}" if when == "now" else when

    def change(statement):
        return {**statement, "predicate": {**statement["predicate"], "time": time}}

    return change


def test_one_key_under_two_names_is_told(place, key):
    place.attest(key)
    forged(place, key, lambda s: {**s, "predicate": {**at("now")(s)["predicate"], "name": "Somebody else"}})
    assert [note.code for note in attestation_notes(place.opened())] == ["attestation-names"]
    findings = count_attestations(attestations_of(place.opened()), [Requirement(count=2)], policy_for(key))
    assert [finding.met for finding in findings] == [False, True]
    assert len(findings[0].by) == 1


def test_a_time_before_the_record_is_not_believed(place, key):
    forged(place, key, at("2020-01-01T00:00:00Z"))
    (item,) = attestations_of(place.opened())
    assert item.doubts == ("it is dated before the record was sealed",)
    assert [note.code for note in attestation_notes(place.opened())] == ["attestation-time"]
    findings = count_attestations((item,), [Requirement()], policy_for(key))
    assert [finding.met for finding in findings] == [False, True]


def test_only_the_trails_entry_bounds_a_time(place, key):
    forged(place, key)  # in the year 2999
    (item,) = attestations_of(place.opened())
    assert item.doubts == ()
    place.enter()
    (item,) = attestations_of(place.opened(), place.known())
    assert item.doubts == (f"it is dated after the trail took it in (entry {item.entry.index})",)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: {**p, "extra": 1},
        lambda p: {**p, "meaning": "nodded"},
        lambda p: {name: value for name, value in p.items() if name != "name"},
        lambda p: {**p, "role": "two\nlines"},
        lambda p: {**p, "statement": 3},
        lambda p: {**p, "purpose": ""},
    ],
)
def test_what_calls_itself_an_attestation_and_is_none_is_told(place, key, change):
    forged(place, key, lambda s: {**s, "predicate": change(at("now")(s)["predicate"])})
    opened = place.opened()
    assert attestations_of(opened) == ()
    assert [(note.code, note.where) for note in attestation_notes(opened)] == [("attestation", f"{PLACE}[0].payload")]


def tampered(place):
    """Writes over the kind of the trail's entries of signatures, as whoever has the file can."""
    with sqlite3.connect(place.trail / "trail.sqlite") as store:
        rows = store.execute("select rowid, data from bundles").fetchall()
        changed = [(data.replace(b"record.attested", b"record.attestex"), rowid) for rowid, data in rows]
        assert [after for after, _ in changed] != [data for _, data in rows]
        store.executemany("update bundles set data = ? where rowid = ?", changed)
    store.close()


# -- the trail --------------------------------------------------------------------------------------------------------


def test_a_rejection_taken_out_of_the_file_is_known_to_the_trail_alone(place, key):
    item = place.attest(key, meaning="rejected")
    (entered,) = place.enter()
    assert (entered.payload, entered.meaning, entered.key) == (item.digest, "rejected", item.key_id)
    assert attestations_of(place.opened(), place.known())[0].entry == entered
    assert place.enter() == ()
    place.cut()
    opened = place.opened()
    assert opened.verdict.level is Level.UNANCHORED
    assert attestation_notes(opened) == ()  # without the trail nobody misses it
    (note,) = attestation_notes(opened, place.known())
    assert note.code == "attestation-missing"
    assert "The trail knows an attestation that this copy lacks" in note.message


def test_the_trail_holds_no_name_and_no_words(place, key):
    place.attest(key, purpose="a hospital")
    (entered,) = place.enter()
    (entry,) = TrailReader.open(place.trail).entries(type=RecordAttested.TYPE)
    assert entry.index == entered.index
    event = decode_body(entry.type, entry.body)
    assert event.digest == place.opened().sealed.digest
    payload = json.loads(place.record.read_bytes())["metadata"]["rlhf_audit"]["additions"][0]["payload"]
    assert event.payload == hashlib.sha256(base64.b64decode(payload)).hexdigest()
    for text in (OFFICER, SAYS["statement"], "hospital"):
        assert text.encode() not in entry.data


def test_another_record_of_the_same_trail_misses_nothing(place, key):
    place.attest(key)
    place.enter()
    assert known_attestations(place.trail, place.opened(place.other), home=place.home) == ()
    assert len(place.known()) == 1


def test_an_entry_taken_out_of_the_trail_is_seen(place, key):
    place.attest(key, meaning="rejected")
    place.enter()
    tampered(place)
    with pytest.raises(FormatError, match="does not hold"):
        place.known()


def test_a_trail_of_another_history_tells_nothing(place, key, tmp_path, monkeypatch):
    place.attest(key)
    with Trail.open(tmp_path / "strange", origin="example.org/other"):
        pass
    with pytest.raises(RecordError, match=r"is example\.org/other") as refused:
        known_attestations(tmp_path / "strange", place.opened(), home=place.home)
    assert refused.value.reason == "other-trail"
    # The same name, made anew elsewhere.
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home2"))
    with Trail.open(tmp_path / "again", origin=ORIGIN) as trail:
        for _ in range(20):
            trail.append("note.taken", b"{}")
    with pytest.raises(RecordError, match="another history"):
        known_attestations(tmp_path / "again", place.opened(), home=place.home)
    with Trail.open(tmp_path / "young", origin="example.org/other2"):
        pass
    assert trail_of(place.opened(), place.record) == place.trail
    assert trail_of(place.opened(), tmp_path / "record.ipynb") is None


def test_a_trail_that_cannot_be_asked_is_a_note_unless_it_was_named(place, key, monkeypatch):
    place.attest(key)
    place.enter()
    opened = place.opened()
    assert ask_trail(opened, place.record, home=place.home) == (place.known(), ())
    assert ask_trail(opened, place.folder / "away" / "record.ipynb", home=place.home) == ((), ())
    monkeypatch.setattr(attesting, "MOST_UNASKED", 3)
    known, (note,) = ask_trail(opened, place.record, home=place.home)
    assert (known, note.code) == ((), "attestations-unchecked")
    assert ask_trail(opened, place.record, trail=place.trail, home=place.home) == (place.known(), ())
    monkeypatch.undo()
    tampered(place)
    (note,) = ask_trail(opened, place.record, home=place.home)[1]
    assert note.code == "attestations-unchecked"
    assert note.where == str(place.trail)
    with pytest.raises(FormatError):
        ask_trail(opened, place.record, trail=place.trail, home=place.home)


def test_a_trail_that_was_cut_back_is_not_asked(place, key, tmp_path):
    place.attest(key, meaning="rejected")
    shutil.copytree(place.trail, tmp_path / "before")
    place.enter()
    verify_trail(place.trail, home=place.home)
    with pytest.raises(RecordError, match="was seen on this machine") as refused:
        known_attestations(tmp_path / "before", place.opened(), home=place.home)
    assert refused.value.reason == "other-trail"
    assert len(place.known()) == 1


def test_what_does_not_hold_is_not_entered(place, key):
    place.attest(key)
    edited(place, lambda payload: payload.replace(b"approved", b"reviewed"))
    with pytest.raises(RecordError, match="INVALID"):
        place.enter()
    assert list(TrailReader.open(place.trail).entries(type=RecordAttested.TYPE)) == []


def test_the_copy_beside_the_trail_gets_the_signatures_too(place, key, another):
    copy = kept_record(place.trail, place.opened().sealed.record)
    before = copy.read_bytes()
    place.attest(key)
    assert carry_to_copy(place.trail, place.opened(), home=place.home) == copy
    assert attestations_of(place.opened(copy)) == attestations_of(place.opened())
    assert place.opened(copy).verdict.level is Level.UNANCHORED
    # What the record lacks is never taken out of the copy, and a copy that was changed is left alone.
    place.cut()
    place.attest(another)
    assert carry_to_copy(place.trail, place.opened(), home=place.home) is None
    assert [item.key_id for item in attestations_of(place.opened(copy))] == [key_id(key.spki)]
    copy.write_bytes(before.replace(b'"one"', b'"won"'))
    changed = copy.read_bytes()
    assert carry_to_copy(place.trail, place.opened(), home=place.home) is None
    assert copy.read_bytes() == changed != before
    copy.unlink()
    assert carry_to_copy(place.trail, place.opened(), home=place.home) is None


@pytest.mark.parametrize("kind", ["sign", "reject"])
def test_the_auditor_signs_and_enters(place, monkeypatch, kind):
    monkeypatch.setenv("RLHF_AUDIT_PERSON_PASSPHRASE", "five random words")
    create_person_key(place.home, OFFICER, "five random words")
    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(place.trail)))
    item = auditor.attest(place.record, role=ROLE, statement="Read.", reject=kind == "reject", purpose="tests")
    auditor.trail.close()
    assert (item.name, item.meaning) == (OFFICER, "rejected" if kind == "reject" else "approved")
    assert place.known() == (item.entry,)
    with pytest.raises(ConfigError, match="approved and reject"):
        auditor.attest(place.record, role=ROLE, statement="Read.", reject=True, meaning="approved")


def test_the_auditor_of_another_trail_enters_nothing(place, tmp_path):
    create_person_key(place.home, OFFICER, None)
    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "elsewhere")))
    assert auditor.attest(place.record, role=ROLE, statement="Read.").entry is None
    assert not (tmp_path / "elsewhere").exists()
    assert place.known() == ()


def test_a_token_signs_for_a_person(place, tmp_path, monkeypatch):
    uri = make_token(tmp_path, monkeypatch)
    person = create_person_key(place.home, OFFICER, None, held=HeldKey(uri, public_of(uri)))
    assert (person.where, person.kind) == (uri, "ECDSA P-256")
    item = place.attest(load_person_key(place.home, OFFICER)[1])
    assert item.key_id == person.id
    monkeypatch.setenv("RLHF_AUDIT_SIGNER_PIN", "000000")
    before = place.record.read_bytes()
    with pytest.raises(KeyFileError) as refused:
        place.attest(load_person_key(place.home, OFFICER)[1])
    assert refused.value.reason == "signer"
    assert place.record.read_bytes() == before


def test_a_kernel_is_not_given_the_passphrase_of_a_person(place, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_PERSON_PASSPHRASE", "five random words")
    monkeypatch.setenv("A_VARIABLE_OF_THE_USER", "kept")
    nb = nbformat.v4.new_notebook(cells=[])
    session = RecordSession.begin(nb, {"name": "k", "language": "r", "display_name": "K"}, place.trail)
    try:
        environment = session.environment()
    finally:
        session.close()
    assert environment["A_VARIABLE_OF_THE_USER"] == "kept"
    assert "five random words" not in environment.values()
