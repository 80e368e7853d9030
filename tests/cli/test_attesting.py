"""Signing a record on the command line: what a person types, reads, and gets wrong."""

from __future__ import annotations

import getpass
import json
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from signing_support import seal_text

from rlhf_audit_nb.events import RecordAttested
from rlhf_audit_nb.trail import Trail, TrailReader
from rlhf_audit_nb.trail.keys import encode_private, local_policy

ORIGIN, NAME, SECRET = "example.org/signed", "Name of the Officer", "five random words here"
SAYS = ("--role", "compliance officer", "--statement", "I have read the report of this record.")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The team's folder, and an officer's machine without the trail and its keys."""
    team = tmp_path / "team"
    team.mkdir()
    monkeypatch.chdir(team)
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(team / "home"))
    for name in ("PASSPHRASE", "NEW_PASSPHRASE", "PERSON_PASSPHRASE", "TRAIL", "SIGNER_PIN"):
        monkeypatch.delenv(f"RLHF_AUDIT_{name}", raising=False)
    with Trail.open("audit", origin=ORIGIN):
        pass
    seal_text(team / "audit", team / "record.ipynb", "one")
    (team / "trust.policy").write_text(local_policy(team / "home", ORIGIN).format(), encoding="utf-8")
    return team


@pytest.fixture
def ask(run):
    def call(*argv):
        code, out, err = run(*argv, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.fixture
def refused(run):
    """A command that must be refused: its reason, and what it told."""

    def call(*argv):
        code, out, err = run(*argv, "--json")
        assert code == 2, out
        return json.loads(out)["error"]["code"], err

    return call


@pytest.fixture
def officer(ask, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_NEW_PASSPHRASE", SECRET)
    monkeypatch.setenv("RLHF_AUDIT_PERSON_PASSPHRASE", SECRET)
    return ask("keys", "person", "--name", NAME)


def attested(folder="audit"):
    return [entry.index for entry in TrailReader.open(folder).entries(type=RecordAttested.TYPE)]


def test_a_person_makes_a_key_and_shows_it(run, officer, place):
    assert (officer["name"], officer["encrypted"], officer["made"]) == (NAME, True, True)
    code, out, _ = run("keys", "person", "--name", NAME, "-o", "mine.pub")
    assert code == 0
    assert (place / "mine.pub").read_text() == officer["public"]
    assert "hand it to whoever writes the policy" in out
    code, out, _ = run("keys", "person")
    assert f"key id  {officer['id']}" in out
    # A person's key is no trail's, and shows among none.
    assert ORIGIN in run("keys", "list")[1]
    assert NAME not in run("keys", "list")[1]


def test_a_key_is_asked_for_its_passphrase_and_never_made_without(run, ask, monkeypatch):
    code, _, err = run("keys", "person", "--name", NAME)
    assert code == 2
    assert "RLHF_AUDIT_NEW_PASSPHRASE" in err
    typed = iter([SECRET, SECRET, SECRET])
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda _: True})())
    monkeypatch.setattr(getpass, "getpass", lambda _prompt: next(typed))
    assert ask("keys", "person", "--name", NAME)["encrypted"]
    assert ask("attest", "record.ipynb", *SAYS)["name"] == NAME
    assert list(typed) == []
    assert not ask("keys", "person", "--name", "Name of Another", "--no-passphrase")["encrypted"]


def test_a_record_that_is_not_there_is_told_before_a_passphrase_is_asked_for(refused, officer, monkeypatch):
    monkeypatch.delenv("RLHF_AUDIT_PERSON_PASSPHRASE")
    assert "The record gone.ipynb cannot be read" in refused("attest", "gone.ipynb", *SAYS)[1]
    assert "There is no trail in gone" in refused("attest", "record.ipynb", *SAYS, "--trail", "gone")[1]


def test_signing_is_told_verified_and_entered(run, ask, officer):
    said = ask("attest", "record.ipynb", *SAYS, "--for", "deployment")
    assert (said["name"], said["meaning"], said["purpose"]) == (NAME, "approved", "deployment")
    assert [one["index"] for one in said["entered"]] == attested()
    code, out, _ = run("verify", "record.ipynb")
    assert code == 0
    assert f"approved for deployment by {NAME} (compliance officer)" in " ".join(out.split())
    assert f"entry {attested()[0]} of the trail" in " ".join(out.split())
    assert f"key {officer['id'][:16]}" in out
    found = ask("verify", "record.ipynb")["attestations"]
    assert [one["statement"] for one in found] == [SAYS[3]]


def test_a_rejection_stands_out_and_is_missed_where_it_was_taken_out(run, ask, officer, place):
    before = (place / "record.ipynb").read_bytes()
    ask("attest", "record.ipynb", *SAYS, "--reject")
    assert "[rejected]" in run("verify", "record.ipynb")[1]
    (place / "record.ipynb").write_bytes(before)
    code, out, _ = run("verify", "record.ipynb")
    assert code == 0
    assert "The trail knows an attestation that this copy lacks" in " ".join(out.split())
    assert "[attestation-missing]" in out
    # Away from the trail nobody can tell.
    (place / "audit").rename(place / "away")
    assert "attestation" not in run("verify", "record.ipynb")[1]
    assert "[attestation-missing]" in run("verify", "record.ipynb", "--trail", "away")[1]


def test_an_officer_signs_on_another_machine_and_the_team_enters_it(run, ask, place, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "hers"))
    monkeypatch.setenv("RLHF_AUDIT_NEW_PASSPHRASE", SECRET)
    monkeypatch.setenv("RLHF_AUDIT_PERSON_PASSPHRASE", SECRET)
    ask("keys", "person", "--name", NAME, "--kind", "ed25519")
    (place / "audit").rename(tmp_path / "audit")
    code, out, _ = run("attest", "record.ipynb", *SAYS, "--policy", "trust.policy")
    assert code == 0
    assert "not in the trail: the record's trail is not here" in out
    assert attested(tmp_path / "audit") == []
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(place / "home"))
    (tmp_path / "audit").rename(place / "audit")
    entered = ask("attest", "record.ipynb", "--enter")["entered"]
    assert [one["index"] for one in entered] == attested()
    assert ask("attest", "record.ipynb", "--enter")["entered"] == []


def test_a_key_in_a_file_of_ones_own(ask, refused, place):
    key = Ed25519PrivateKey.generate()
    (place / "mine.pem").write_bytes(encode_private(key, None))
    assert refused("attest", "record.ipynb", *SAYS, "--key", "mine.pem")[0] == "name"
    said = ask("attest", "record.ipynb", *SAYS, "--key", "mine.pem", "--name", NAME)
    assert said["name"] == NAME


def test_a_key_that_is_held_elsewhere(ask, refused, place):
    (place / "held.pem").write_bytes(encode_private(ec.generate_private_key(ec.SECP256R1()), None))
    uri = f"file2:{place}/held.pem"
    assert refused("attest", "record.ipynb", *SAYS, "--key", uri)[0] == "usage"
    first = ask("attest", "record.ipynb", *SAYS, "--key", uri, "--name", NAME)
    made = ask("keys", "person", "--name", NAME, "--signer", uri)
    assert (made["id"], made["where"]) == (first["key_id"], uri)
    assert ask("attest", "record.ipynb", *SAYS)["key_id"] == made["id"]


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (("record.ipynb", "--role", "x"), "usage", "--statement is missing"),
        (("record.ipynb", "--statement", "x"), "usage", "--role is missing"),
        (("none.ipynb", *SAYS), "no-record", "cannot be read"),
        (("record.ipynb", *SAYS, "--name", "Somebody"), "no-key", "There is no key of Somebody"),
        (("record.ipynb", *SAYS, "--key", NAME, "--name", "Somebody"), "name", "The key is Name of the Officer's"),
        (("record.ipynb", *SAYS, "--meaning", "nodded"), "usage", "invalid choice"),
        (("record.ipynb", *SAYS, "--reject", "--meaning", "approved"), "usage", "not allowed with"),
        (("record.ipynb", *SAYS, "--public", "x.pem"), "usage", "--public goes with"),
        (("record.ipynb", "--enter", "--reject"), "usage", "--enter signs nothing"),
        (("record.ipynb", "--role", " ", "--statement", "x"), "role", "not one line"),
    ],
)
def test_a_mistake_is_one_sentence_and_changes_nothing(refused, officer, place, argv, code, says):
    del officer
    before = (place / "record.ipynb").read_bytes()
    found, err = refused("attest", *argv)
    assert (found, says in err) == (code, True), err
    assert (place / "record.ipynb").read_bytes() == before
    assert attested() == []


def test_the_trails_own_key_does_not_sign_for_a_person(refused, place):
    ring = next((place / "home" / "keys").iterdir())
    code, err = refused("attest", "record.ipynb", *SAYS, "--key", ring / "record.pem", "--name", NAME)
    assert code == "trail-key"
    assert "the training's process holds" in err
    assert refused("attest", "record.ipynb", *SAYS)[0] == "no-key"


def test_a_trail_that_cannot_be_asked_is_told(run, officer, place):
    del officer
    (place / "trail2").mkdir()
    code, _, err = run("verify", "record.ipynb", "--trail", "trail2")
    assert code == 2
    assert "There is no trail" in err
    code, _, err = run("verify", "audit", "--trail", "audit")
    assert code == 2
    assert "--trail goes with" in err


def test_a_report_says_whose_keys_the_policy_names(run, ask, officer, place):
    (place / "officer.pub").write_text(officer["public"], encoding="utf-8")
    people = f"people:\n  - name: {NAME}\n    roles: [compliance officer]\n    keys: [officer.pub]\n"
    (place / "policy.yaml").write_text(f"version: 1\ntrust: trust.policy\n{people}", encoding="utf-8")
    ask("attest", "record.ipynb", *SAYS)
    for policy, said in (("policy.yaml", "the policy names this key"), ("trust.policy", "no policy that names people")):
        assert run("report", "record.ipynb", "--policy", policy, "-o", "report.html")[0] == 0
        assert said in (place / "report.html").read_text()
        assert said in run("card", "record.ipynb", "--policy", policy)[1]
