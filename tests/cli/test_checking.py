"""``rlhf-audit verify``: what it can be given, what it says, and with which exit code."""

from __future__ import annotations

import base64
import json
import shutil
import sqlite3

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rlhf_audit_nb.cli import checking
from rlhf_audit_nb.trail import Level, Trail, TrailReader, Verdict
from rlhf_audit_nb.trail.anchors import AnchorFolder
from rlhf_audit_nb.trail.note import COSIGNATURE, Signer, cosign_note, format_vkey, parse_note
from rlhf_audit_nb.trail.tiles import publish_tiles
from rlhf_audit_nb.trail.verdict import Anchor, Reason, RunSummary

WITNESS = Signer("witness.example/one", Ed25519PrivateKey.generate())


@pytest.fixture
def trail(tmp_path, monkeypatch):
    """Four entries, one with a private half."""
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RLHF_AUDIT_PASSPHRASE", raising=False)
    with Trail.open(tmp_path / "audit") as opened:
        opened.append("run.started", b"{}", run="r").wait()
        opened.append("a.b", b"{}", run="r", private=b'{"choice":"kiwi"}').wait()
        opened.append("run.finished", b'{"status":"completed"}', run="r").wait()
    return tmp_path / "audit"


@pytest.fixture
def policy(trail, tmp_path):
    vkey = next((tmp_path / "home" / "keys").rglob("log.vkey")).read_text().strip()
    path = tmp_path / "trust.policy"
    path.write_text(f"log {vkey}\nwitness one {format_vkey(WITNESS.verifier(COSIGNATURE))}\nquorum one\n")
    return path


def cosign(trail) -> None:
    note = TrailReader.open(trail).checkpoint()
    AnchorFolder(trail).cosign(cosign_note(parse_note(note), WITNESS, 1_795_305_600).format())


def change(path, statement: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        assert connection.execute(statement).rowcount
    connection.close()


def test_the_exit_code_is_the_levels_and_what_is_required_is_said(run, trail, policy):
    assert run("verify", trail)[0] == 0
    code, out, _ = run("verify", trail, "--require", "timestamped")
    assert code == 10
    assert "Required was TIMESTAMPED: refused." in out
    assert run("verify", trail, "--policy", policy)[0] == 10
    cosign(trail)
    code, out, _ = run("verify", trail, "--policy", policy, "--require", "cosigned")
    assert code == 0
    assert out.startswith("COSIGNED  ")
    assert "  cosigned by witness.example/one at 2026-11-22 00:00:00 UTC, up to entry 3\n" in out
    assert "Required" not in out
    change(trail / "trail.sqlite", "UPDATE streams SET next = next + 1")
    code, out, _ = run("verify", trail, "--policy", policy, "--json")
    assert (code, json.loads(out)["reasons"][0]["code"]) == (40, "index")


def test_an_older_anchor_is_told_with_how_much_it_leaves_out(run, trail, policy):
    cosign(trail)
    with Trail.open(trail) as opened:
        opened.append("a.b", b"{}").wait()
    code, out, _ = run("verify", trail, "--policy", policy)
    assert code == 10
    assert "up to entry 3; the one after that is not" in out
    assert "It did so up to entry 3; what came after rests on the log's key alone. [quorum]" in " ".join(out.split())


def test_json_holds_the_whole_verdict_and_words_go_to_stderr(run, trail):
    code, out, err = run("verify", trail, "--json")
    assert code == 0
    found = json.loads(out)
    assert list(found) == ["level", "origin", "size", "root", "signers", "runs", "reasons", "anchors", "openings"]
    assert found["openings"]["openings"] == 1
    assert err.startswith("UNANCHORED  ")


def test_private_halves_are_counted_opened_on_demand_and_named_where_they_are_gone(run, trail):
    assert "1 private halves: 1 in the vault\n" in run("verify", trail)[1]
    opened = run("verify", trail, "--openings")[1]
    assert "1 private halves: 1 in the vault, each of them opened and compared\n" in opened
    change(trail / "vault.sqlite", "UPDATE openings SET sealed = zeroblob(90)")
    assert run("verify", trail)[0] == 0
    code, out, _ = run("verify", trail, "--openings")
    assert code == 40
    assert "entry 2: What the vault has for it does not open it. [opening-wrong]" in out
    (trail / "vault.sqlite").unlink()
    for path in trail.glob("vault.sqlite-*"):
        path.unlink()
    code, out, _ = run("verify", trail)
    assert code == 0
    assert "there is no vault here, so none was looked for" in out


def test_a_proof_file_is_checked_with_the_entry_and_a_policy_alone(run, trail, policy, tmp_path, monkeypatch):
    proof, entry = tmp_path / "p.tlog-proof", tmp_path / "entry"
    assert run("trail", "show", "2", "--trail", trail, "--proof", proof, "--entry", entry)[0] == 0
    shutil.rmtree(trail)
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "auditor"))
    code, out, _ = run("verify", proof, "--entry", entry, "--policy", policy, "--json")
    assert (code, json.loads(out)["level"], json.loads(out)["size"]) == (10, "UNANCHORED", 4)
    entry.write_bytes(entry.read_bytes().replace(b'"a.b"', b'"a.c"'))
    code, out, _ = run("verify", proof, "--entry", entry, "--policy", policy)
    assert code == 40
    assert "[inclusion]" in out
    plain = tmp_path / "evidence"
    shutil.move(proof, plain)
    assert run("verify", plain, "--entry", entry, "--policy", policy)[0] == 40
    plain.write_text(plain.read_text().replace("index 2", "index 02"))
    code, _, err = run("verify", plain, "--entry", entry, "--policy", policy)
    assert code == 2
    assert "evidence is not a proof file." in err


def test_a_disclosure_is_checked_and_its_private_half_shown(run, trail, policy, tmp_path, monkeypatch):
    from rlhf_audit_nb.trail.disclosure import disclose

    path = tmp_path / "one.opening"
    with Trail.open(trail) as opened:
        path.write_bytes(disclose(opened, 2).encode())
    shutil.rmtree(trail)
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "auditor"))
    code, out, _ = run("verify", path, "--policy", policy)
    assert code == 10
    assert '    {\n      "choice": "kiwi"\n    }' in out
    path.write_bytes(path.read_bytes().replace(b'"a.b', b'"a.c'))
    code, out, err = run("verify", path, "--policy", policy)
    assert code in (2, 40)
    assert "kiwi" not in out + err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{trail}", "--entry", "x"], "--entry goes with a proof file"),
        (["{proof}"], "the entry is not in it"),
        (["{proof}", "--entry", "nowhere"], "The entry nowhere cannot be read"),
        (["{proof}", "--entry", "{proof}", "--openings"], "--openings says nothing about a proof file"),
        (["{record}", "--tsa-ca", "nowhere.pem"], "nowhere.pem"),
        (["{record}", "--openings"], "--openings says nothing about a record"),
        (["{trail}", "--tsa-ca", "nowhere.pem"], "nowhere.pem"),
        (["nowhere.tlog-proof"], "There is no record or trail at nowhere.tlog-proof"),
        (["{www}", "--openings"], "is a published trail, which holds no private halves"),
        (["{trail}", "--require", "INVALID"], "INVALID"),
    ],
)
def test_a_check_that_was_asked_for_is_never_left_out_unsaid(run, trail, tmp_path, argv, said):
    proof, www, record = tmp_path / "p.tlog-proof", tmp_path / "www", tmp_path / "r.ipynb"
    run("trail", "show", "2", "--trail", trail, "--proof", proof)
    run("publish", www, "--trail", trail)
    record.write_text("{}")
    words = [word.format(trail=trail, proof=proof, www=www, record=record) for word in argv]
    code, out, err = run("verify", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_long_work_tells_how_far_it_is(run, trail, monkeypatch):
    monkeypatch.setattr(checking, "QUIET_SECONDS", 0.0)
    code, out, err = run("verify", trail)
    assert code == 0
    assert "checked 4 of 4 entries\n" in err
    assert "checked" not in out


def test_what_is_worth_knowing_is_told_apart_from_faults_and_long_lists_are_cut():
    runs = tuple(RunSummary(f"run-{n}", "completed", 1, n, n) for n in range(40))
    reasons = (Reason("run-open", "run x", "It was never closed."), Reason("root", "checkpoint 5", "It is another."))
    anchors = (
        Anchor("timestamp", 3, b"", 1_795_305_600, "CN=One", "anchors/3.one.tsr"),
        Anchor("timestamp", 5, b"", 1_795_305_601, "CN=One", "anchors/5.one.tsr"),
    )
    verdict = Verdict(Level.INVALID, "example.com/a", 9, "cm9vdA==", ("k",), runs, reasons, anchors)
    words = checking.verdict_words(verdict, ())
    assert "  worth knowing: run x: It was never closed. [run-open]" in words
    assert "  checkpoint 5: It is another. [root]" in words
    assert "  timestamped by CN=One at 2026-11-22 00:00:01 UTC, up to entry 4; the 4 after that are not" in words
    assert "  28 earlier runs (--json lists them all), and" in words
    assert sum(word.startswith("  run run-") for word in words) == 12
    assert all(len(word) <= 100 for word in words)


HOSTILE = "x\x1b[2J\x9b31m\u202e\x7f\nCOSIGNED  All is well."


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_whoever_wrote_a_trail_cannot_write_the_verdict(tmp_path, monkeypatch, run, options):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    origin = "example.org/\u202egro\x9b31m\x7f"
    with Trail.open(tmp_path / "audit", origin=origin) as trail:
        said = json.dumps({"status": HOSTILE}, ensure_ascii=False).encode()
        trail.append("run.started", b"{}", run="r").wait()
        trail.append("run.finished", said, run="r").wait()
        body = json.dumps({"role": "log", "key": HOSTILE, "since": 1, "reason": "", "signature": "AAAA"})
        trail.append("key.revoked", body.encode()).wait()
    publish_tiles(tmp_path / "audit", tmp_path / "www")
    (tmp_path / "www" / "tile" / HOSTILE).write_bytes(b"")
    for target in ("audit", "www"):
        code, out, err = run("verify", tmp_path / target, *options)
        assert code == 40
        assert "[U+202E]" in (err if options else out)
        assert all(char.isprintable() or char == "\n" for char in out + err)
        assert not any(line.startswith("COSIGNED") for line in (out + err).splitlines())
        if options:
            verdict = json.loads(out)
            assert (verdict["origin"], verdict["runs"][0]["status"]) == (origin, HOSTILE)


def test_an_error_that_quotes_a_file_is_no_command_to_the_terminal(tmp_path, monkeypatch, run):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    (tmp_path / "www").mkdir()
    root = base64.b64encode(bytes(32)).decode()
    (tmp_path / "www" / "checkpoint").write_text(f"a\x9b31m\u202e\n1\n{root}\n\n\u2014 a\u202e AAAAAAAA\n")
    code, out, err = run("verify", tmp_path / "www")
    assert code == 2
    assert "[U+009B]31m[U+202E]" in err
    assert all(char.isprintable() or char == "\n" for char in out + err)
