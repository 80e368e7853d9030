"""Keys from the command line: what a person sees, and that a mistake changes nothing."""

from __future__ import annotations

import getpass
import json
import shutil
import stat
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from rlhf_audit_nb.trail import Level, Trail, TrustPolicy, verify_trail
from rlhf_audit_nb.trail.keys import load_keys

ORIGIN = "example.org/team"
SECRET = "five random words here"


@pytest.fixture
def ask(run):
    """The answer of a command that must succeed."""

    def call(*argv):
        code, out, err = run(*argv, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    for name in ("RLHF_AUDIT_PASSPHRASE", "RLHF_AUDIT_NEW_PASSPHRASE", "RLHF_AUDIT_TRAIL", "RLHF_AUDIT_SIGNER_PIN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def trail(place):
    with Trail.open("audit", origin=ORIGIN) as made:
        made.append("note.taken", b"{}")
    return place / "audit"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_keys_are_made_before_the_first_run_and_used_by_it(ask, place, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_PASSPHRASE", SECRET)
    made = ask("keys", "create", ORIGIN)
    assert {key["role"] for key in made["keys"]} == {"log", "record", "model"}
    assert all(key["encrypted"] for key in made["keys"])
    log = next(key for key in made["keys"] if key["role"] == "log")
    with Trail.open("audit", origin=ORIGIN) as trail:
        assert trail.log_vkey == log["key"]
    for path in Path(made["folder"]).iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_making_keys_needs_a_passphrase_or_the_word_that_there_is_none(run, ask, place):
    code, _, err = run("keys", "create", ORIGIN)
    assert (code, "RLHF_AUDIT_NEW_PASSPHRASE" in err) == (2, True)
    assert not (place / "home" / "keys").exists()
    assert not any(key["encrypted"] for key in ask("keys", "create", ORIGIN, "--no-passphrase")["keys"])
    code, _, err = run("keys", "create", ORIGIN, "--no-passphrase")
    assert (code, "already" in err) == (2, True)


def test_a_passphrase_is_asked_for_twice_on_a_terminal(run, place, monkeypatch):
    answers = [SECRET, "something else", SECRET, SECRET]
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(getpass, "getpass", lambda _prompt: answers.pop(0))
    code, _, err = run("keys", "create", ORIGIN)
    assert (code, "not the same" in err) == (2, True)
    assert not (place / "home" / "keys").exists()
    assert run("keys", "create", ORIGIN)[0] == 0
    assert load_keys(place / "home", ORIGIN, SECRET).origin == ORIGIN


def test_a_list_and_a_show_tell_the_keys_without_a_passphrase(run, ask, trail, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_NEW_PASSPHRASE", SECRET)
    assert ask("keys", "encrypt")["encrypted"] is True
    code, out, _ = run("keys", "list")
    assert code == 0
    assert f"{ORIGIN}   log key " in out
    shown = ask("keys", "show", "--origin", ORIGIN)
    assert [(key["role"], key["kind"], key["status"]) for key in shown["keys"]] == [
        ("log", "Ed25519", "in force"),
        ("record", "Ed25519", "in force"),
        ("model", "ECDSA P-256", "in force"),
    ]
    assert shown == ask("keys", "show", "--trail", trail)


def test_whose_keys_are_meant_is_asked_where_it_is_not_clear(run, ask):
    code, _, err = run("keys", "show")
    assert (code, "There are no keys in" in err) == (2, True)
    for name in ("example.org/a", "example.org/b"):
        ask("keys", "create", name, "--no-passphrase")
    code, _, err = run("keys", "show")
    assert (code, "example.org/a, example.org/b" in err) == (2, True)
    code, _, err = run("keys", "show", "--origin", "example.org/c")
    assert (code, "no keys for example.org/c" in err) == (2, True)


def test_encrypting_changes_all_files_and_a_wrong_passphrase_none(run, ask, trail, place, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_NEW_PASSPHRASE", SECRET)
    ask("keys", "encrypt")
    before = snapshot(place / "home" / "keys")
    monkeypatch.setenv("RLHF_AUDIT_PASSPHRASE", "not the one that it is")
    monkeypatch.setenv("RLHF_AUDIT_NEW_PASSPHRASE", "another passphrase")
    code, _, err = run("keys", "encrypt")
    assert (code, "nothing was changed" in err) == (2, True)
    monkeypatch.setenv("RLHF_AUDIT_PASSPHRASE", SECRET)
    monkeypatch.setenv("RLHF_AUDIT_NEW_PASSPHRASE", "short")
    code, _, err = run("keys", "encrypt")
    assert (code, "at least 8" in err) == (2, True)
    after = snapshot(place / "home" / "keys")
    assert {k: v for k, v in after.items() if "lock" not in k} == {k: v for k, v in before.items() if "lock" not in k}
    assert ask("keys", "encrypt", "--remove")["encrypted"] is False
    monkeypatch.delenv("RLHF_AUDIT_PASSPHRASE")
    with Trail.open(trail) as opened:
        opened.append("note.taken", b"{}").wait()


def test_a_rotation_an_endorsing_key_and_a_policy_for_those_who_verify(run, ask, trail, place):
    first = ask("keys", "show")["keys"][0]["key"]
    done = ask("keys", "rotate", "--reason", "a year has passed")
    assert done["old"] == first
    added = ask("keys", "add-mldsa")
    assert added["old"] is None
    code, _, err = run("keys", "add-mldsa")
    assert (code, "already" in err) == (2, True)
    assert ask("keys", "rotate", "record")["role"] == "record"
    exported = ask("keys", "export", "-o", place / "trust.policy")
    policy = TrustPolicy.parse((place / "trust.policy").read_text())
    assert policy.format() == exported["policy"]
    assert set(policy.log_keys) == {first, done["new"], added["new"]}
    newest = TrustPolicy.parse(ask("keys", "export", "--newest")["policy"])
    assert set(newest.log_keys) == {done["new"], added["new"]}
    for trusted in (policy, newest, TrustPolicy.of(first)):
        assert verify_trail(trail, policy=trusted, home=place / "elsewhere").level is Level.UNANCHORED


def test_a_rotation_needs_a_trail_and_says_so(run):
    code, _, err = run("keys", "rotate", "--trail", "nowhere")
    assert (code, "There is no trail at" in err) == (2, True)
    code, _, err = run("keys", "rotate", "cook")
    assert (code, "log" in err) == (2, True)


def test_a_stolen_key_is_revoked_and_its_fork_refused_where_the_statement_is_known(run, ask, trail, place, monkeypatch):
    shutil.copytree(trail, place / "fork")
    shutil.copytree(place / "home", place / "thief")
    old = ask("keys", "show")["keys"][0]["key"]
    done = ask("keys", "revoke", "-o", place / "stolen.txt", "--reason", "the laptop was stolen")
    assert (done["key"], done["statement"]) == (old, str(place / "stolen.txt"))
    shown = {key["key"]: key["status"] for key in ask("keys", "show")["keys"]}
    assert shown[old] == "revoked"
    assert old not in ask("keys", "export")["policy"]
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(place / "thief"))
    for _ in range(4):
        with Trail.open(place / "fork") as forked:
            forked.append("note.taken", b"{}").wait()
    (place / "old.policy").write_text(f"log {old}\nquorum none\n")
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(place / "auditor"))
    assert run("verify", place / "fork", "--policy", place / "old.policy")[0] == 0
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(place / "warned"))
    assert ask("keys", "import", place / "stolen.txt")["signers"] == [old]
    assert run("verify", trail, "--policy", place / "old.policy")[0] == 0
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(place / "warned2"))
    assert run("keys", "import", place / "stolen.txt")[0] == 0
    code, out, _ = run("verify", place / "fork", "--policy", place / "old.policy")
    assert (code, "[revoked-key]" in out) == (40, True)


def test_a_statement_that_nobody_trusted_has_signed_is_not_kept(run, ask, trail, place, monkeypatch):
    old = ask("keys", "show")["keys"][0]
    ask("keys", "rotate")
    ask("keys", "revoke", "--key", old["id"][:6], "--since", "1", "-o", place / "late.txt")
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(place / "auditor"))
    code, _, err = run("keys", "import", place / "late.txt")
    assert (code, "--policy" in err) == (2, True)
    assert not (place / "auditor" / "revoked").exists()
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(place / "home"))
    ask("keys", "export", "-o", place / "trust.policy")
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(place / "auditor"))
    assert ask("keys", "import", place / "late.txt", "--policy", place / "trust.policy")["since"] == 1
    for wrong in (place / "trust.policy", place / "nothing.txt"):
        assert run("keys", "import", wrong)[0] == 2


def test_revoking_a_key_that_is_not_there_says_so(run, trail):
    code, _, err = run("keys", "revoke", "--key", "ffffffff")
    assert (code, "is the id of no log key" in err) == (2, True)


def test_a_key_that_is_held_elsewhere_takes_the_logs_place(run, ask, trail, place):
    private = Ed25519PrivateKey.generate()
    (place / "elsewhere.pem").write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    uri = f"file2:{place}/elsewhere.pem"
    assert ask("keys", "use", uri)["uri"] == uri
    assert ask("keys", "show")["keys"][0]["where"] == uri
    assert run("verify", trail)[0] == 0
    for command in ("rotate", "revoke"):
        code, _, err = run("keys", command)
        assert (code, "keys use URI" in err) == (2, True)
    assert ask("keys", "show")["keys"][0]["where"] == uri
    assert ask("keys", "rotate", "record")["role"] == "record"
    ask("keys", "rotate", "--in-file")
    assert ask("keys", "show")["keys"][0]["where"] == "file"
    made = ask("keys", "create", "example.org/other", "--signer", uri, "--no-passphrase")
    assert made["keys"][0]["where"] == uri
    for wrong, said in (
        ("no-uri", "is not the URI"),
        ("gcpkms:x", "must be told"),
        ("file2:/none.pem", "cannot be read"),
    ):
        code, _, err = run("keys", "use", wrong)
        assert (code, said in err) == (2, True), err


def test_a_backup_brings_the_keys_back_and_replaces_nothing(run, ask, trail, place, monkeypatch):
    ask("keys", "rotate")
    code, _, err = run("keys", "backup", place / "keys.backup")
    assert (code, "RLHF_AUDIT_NEW_PASSPHRASE" in err) == (2, True)
    monkeypatch.setenv("RLHF_AUDIT_NEW_PASSPHRASE", SECRET)
    ask("keys", "backup", place / "keys.backup")
    assert b"PRIVATE KEY" not in (place / "keys.backup").read_bytes()
    assert stat.S_IMODE((place / "keys.backup").stat().st_mode) == 0o600
    code, _, err = run("keys", "backup", place / "keys.backup")
    assert (code, "exists already" in err) == (2, True)
    before = {k: v for k, v in snapshot(place / "home" / "keys").items() if "lock" not in k}
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(place / "new"))
    monkeypatch.setenv("RLHF_AUDIT_PASSPHRASE", "not the one that it is")
    code, _, err = run("keys", "restore", place / "keys.backup")
    assert (code, "nothing was changed" in err) == (2, True)
    monkeypatch.setenv("RLHF_AUDIT_PASSPHRASE", SECRET)
    assert ask("keys", "restore", place / "keys.backup")["origin"] == ORIGIN
    assert snapshot(place / "new" / "keys") == before
    monkeypatch.delenv("RLHF_AUDIT_PASSPHRASE")
    with Trail.open(trail) as opened:
        opened.append("note.taken", b"{}").wait()
    next((place / "new" / "keys").rglob("record.pem")).unlink()
    monkeypatch.setenv("RLHF_AUDIT_PASSPHRASE", SECRET)
    ask("keys", "restore", place / "keys.backup")
    monkeypatch.delenv("RLHF_AUDIT_PASSPHRASE")
    ask("keys", "rotate")
    monkeypatch.setenv("RLHF_AUDIT_PASSPHRASE", SECRET)
    code, _, err = run("keys", "restore", place / "keys.backup")
    assert (code, "rotated since" in err) == (2, True)
    code, _, err = run("keys", "restore", place / "home" / "keys")
    assert code == 2
