"""``rlhf-audit anchor`` and ``witness``: from one person's trail to another person's word for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from contextlib import contextmanager

import pytest
from support.tsa import Authority, serve
from support.witnesses import Log

from rlhf_audit_nb.trail import Trail
from rlhf_audit_nb.trail.tiles import publish_tiles
from rlhf_audit_nb.trail.witness import Witness
from rlhf_audit_nb.trail.witness_server import WitnessServer


@pytest.fixture
def asked(run):
    def call(*argv):
        code, out, _ = run(*argv, "--json")
        return code, json.loads(out)

    return call


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to be in, with a trail of 6 entries, its policy, and a witness that knows it."""
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    for name in ("RLHF_AUDIT_TRAIL", "RLHF_AUDIT_PASSPHRASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    vkey = grow(tmp_path / "audit", 6)
    (tmp_path / "log.policy").write_text(f"log {vkey}\nquorum none\n")
    witness = Witness.create(tmp_path / "alice", "witness.example/alice")
    witness.add_log(vkey)
    name_witness(tmp_path, vkey, witness.vkeys[0])
    return tmp_path


def grow(folder, size: int) -> str:
    with Trail.open(folder, origin="example.com/team") as trail:
        for number in range(trail.reader().size, size):
            trail.append("a.b", b'{"n":%d}' % number)
        trail.flush()
        return trail.log_vkey


def name_witness(place, log: str, witness: str, url: str = "") -> None:
    (place / "trust.policy").write_text(f"log {log}\nwitness alice {witness} {url}\nquorum alice\n")


@contextmanager
def listening(place):
    witness = Witness.open(place / "alice")
    server = WitnessServer(witness)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        log = (place / "log.policy").read_text().split()[1]
        name_witness(place, log, witness.vkeys[0], server.url)
        yield server.url
    finally:
        server.stop()
        thread.join(20)


def test_a_witness_is_made_and_shown(run, asked, place):
    code, out, _ = run("witness", "init", "bob", "--name", "witness.example/bob", "--ml-dsa")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert [words[1] for words in lines if words[0] == "witness" and len(words) == 3] == ["bob", "bob-ml-dsa"]
    assert "not encrypted" in out
    code, shown = asked("witness", "show", "bob")
    assert (code, shown["name"], shown["logs"], shown["evidence"]) == (0, "witness.example/bob", [], [])
    assert out.count(shown["vkeys"][0]) == out.count(shown["vkeys"][1]) == 1
    assert run("witness", "init", "bob", "--name", "witness.example/bob")[0] == 2
    assert asked("witness", "show", "bob") == (0, shown)


def test_a_log_is_added_by_its_policy_or_its_key_once(run, asked, place):
    run("witness", "init", "bob", "--name", "witness.example/bob")
    vkey = (place / "log.policy").read_text().split()[1]
    assert asked("witness", "add-log", "bob", "log.policy") == (0, {"added": [vkey], "known": []})
    assert asked("witness", "add-log", "bob", vkey) == (0, {"added": [], "known": [vkey]})
    for wrong in (
        "nowhere.policy",
        "alice/witness.json",
        (place / "alice" / "witness.vkey").read_text().strip(),
        "a+b+c",
    ):
        code, _, err = run("witness", "add-log", "bob", wrong)
        assert code == 2
        assert err.startswith("error: ")
        assert "Traceback" not in err
    assert len(asked("witness", "show", "bob")[1]["logs"]) == 1


@pytest.mark.parametrize("target", ["audit", "www", "checkpoint.request"])
def test_a_witness_cosigns_a_trail_a_published_one_and_a_request(run, asked, place, target):
    for size in (6, 300):
        grow(place / "audit", size)
        publish_tiles("audit", "www")
        assert run("witness", "request", "--name", "witness.example/alice")[0] == 0
        code, out, _ = run("witness", "cosign", "alice", target, "-o", "given")
        assert (code, out.splitlines()[0]) == (0, f"cosigned  example.com/team: {size} entries")
        code, answer = asked("anchor", "--add", "given", "--policy", "trust.policy")
        assert (code, answer["added"][0]["outcome"]) == (0, "given")
        assert asked("verify", "audit", "--policy", "trust.policy")[1]["level"] == "COSIGNED"
    assert asked("witness", "show", "alice")[1]["logs"][0]["size"] == 300


def test_what_a_witness_refuses_is_a_sentence_with_the_next_step(run, asked, place):
    run("witness", "cosign", "alice", "audit", "-o", "first")
    grow(place / "audit", 9)
    run("witness", "request", "--old", "3")
    code, _, err = run("witness", "cosign", "alice", "checkpoint.request", "-o", "second")
    assert code == 3
    assert "witness request --old 6" in err
    assert not (place / "second").exists()
    stranger = Log("example.com/other").grow(4)
    (place / "stranger").write_bytes(stranger.body(0))
    assert asked("witness", "cosign", "alice", "stranger")[1]["error"]["code"] == "unknown-log"
    (place / "forger").write_bytes(Log("example.com/team").grow(8).body(6))
    assert asked("witness", "cosign", "alice", "forger")[1]["error"]["code"] == "unsigned"
    (place / "nonsense").write_bytes(b"nonsense")
    assert asked("witness", "cosign", "alice", "nonsense")[1]["error"]["code"] == "malformed"
    assert asked("witness", "cosign", "alice", "nowhere")[1]["error"]["code"] == "unreadable"
    (place / "empty").mkdir()
    assert asked("witness", "cosign", "alice", "empty")[1]["error"]["code"] == "no-trail"
    assert asked("witness", "cosign", "nobody", "audit")[1]["error"]["code"] == "no-witness"
    assert run("witness", "request", "--old", "99")[0] == 2


def test_a_trail_that_went_back_or_another_way_is_not_cosigned(run, asked, place):
    shutil.copytree(place / "audit", place / "older")
    grow(place / "audit", 9)
    run("witness", "cosign", "alice", "audit", "-o", "first")
    assert asked("witness", "cosign", "alice", "older")[1]["error"]["code"] == "rollback"
    shutil.rmtree(place / "audit")
    shutil.rmtree(place / "home" / "heads")
    grow(place / "audit", 12)
    code, answer = asked("witness", "cosign", "alice", "audit")
    assert (code, answer["error"]["code"]) == (3, "inconsistent")
    kept = asked("witness", "show", "alice")[1]["evidence"]
    assert len(kept) == 2
    publish_tiles("audit", "www")
    for place_of_tree in ("audit", "www"):
        assert asked("witness", "evidence", *kept, "--trail", place_of_tree)[1]["outcome"] == "contradictory"
    assert asked("witness", "evidence", *kept, "--trail", "nowhere")[1]["error"]["code"] == "no-trail"


def test_a_trail_is_anchored_and_verifies_so(run, asked, place):
    authority = Authority.make(place / "tsa")
    authority.certify()
    with listening(place) as url, serve(authority.answer) as stamping:
        words = ("anchor", "--policy", "trust.policy", "--tsa", stamping.url, "--tsa-ca", authority.ca)
        code, out, _ = run(*words)
        assert code == 0
        assert out.splitlines()[0].startswith("COSIGNED  example.com/team: 6 entries")
        assert [line.split()[:3] for line in out.splitlines()[1:] if line.startswith("  ok")] == [
            ["ok", "cosignature", url + ":"],
            ["ok", "timestamp", stamping.url + ":"],
        ]
        code, answer = asked(*words)
        assert [item["outcome"] for item in answer["asked"]] == ["kept", "kept"]
    assert len(stamping.asked) == 1
    code, verdict = asked("verify", "audit", "--policy", "trust.policy", "--tsa-ca", authority.ca)
    assert (code, verdict["level"]) == (0, "COSIGNED")
    assert {anchor["kind"] for anchor in verdict["anchors"]} == {"cosignature", "timestamp"}
    (token,) = (place / "audit" / "anchors").glob("6.*.tsr")
    said = subprocess.run(
        ["openssl", "ts", "-verify", "-data", token.with_name("6.checkpoint"), "-in", token, "-CAfile", authority.ca],
        capture_output=True,
        text=True,
    )
    assert "Verification: OK" in said.stdout + said.stderr


def test_a_quorum_that_was_not_reached_is_said_and_exits_with_3(run, place):
    with listening(place) as url:
        pass
    code, out, _ = run("anchor", "--policy", "trust.policy", "--timeout", "2")
    assert code == 3
    assert "FAILED" in out
    assert url in out
    assert "quorum of the trust policy was not reached" in " ".join(out.split())
    assert all(len(line) <= 100 for line in out.splitlines())


def test_a_witness_that_saw_another_history_ends_with_30_and_names_the_evidence(run, asked, place):
    with listening(place):
        assert run("anchor", "--policy", "trust.policy")[0] == 0
        shutil.rmtree(place / "audit")
        shutil.rmtree(place / "home" / "heads")
        grow(place / "audit", 6)
        code, out, _ = run("anchor", "--policy", "trust.policy")
    assert code == 30
    assert out.startswith("DIVERGED")
    assert "[fork]" in out
    kept = sorted((place / "home" / "heads").glob("*.diverged/*"))
    assert asked("witness", "evidence", *kept) == (
        30,
        {
            "outcome": "contradictory",
            "message": "The key of example.com/team has signed two roots of size 6: it has shown two histories.",
            "origin": "example.com/team",
            "sizes": [6, 6],
        },
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["anchor"],
        ["anchor", "--trail", "nowhere"],
        ["anchor", "--witness", "alice"],
        ["anchor", "--tsa", "tsa.example"],
        ["anchor", "--tsa", "http://127.0.0.1:9/"],
        ["anchor", "--tsa-ca", "nowhere.pem", "--tsa", "http://127.0.0.1:9/"],
        ["anchor", "--add", "nowhere"],
        ["anchor", "--policy", "nowhere"],
        ["anchor", "--timeout", "0", "--tsa", "http://127.0.0.1:9/"],
        ["witness"],
        ["witness", "init", "x"],
        ["witness", "init", "x", "--name", "a b"],
        ["witness", "serve", "alice", "--port", "70000"],
        ["witness", "evidence", "log.policy", "log.policy", "--log", "nonsense"],
    ],
    ids=" ".join,
)
def test_bad_input_is_one_sentence_and_exits_with_2(run, place, argv):
    def files():  # but those that SQLite makes when a trail is read
        return sorted(path for path in place.rglob("*") if not path.name.endswith(("-shm", "-wal")))

    before = files()
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert files() == before


def test_an_anchor_says_what_the_log_signs_to_last(run, asked, place, monkeypatch):
    from rlhf_audit_nb.trail.keys import KeyRing

    monkeypatch.setattr(KeyRing, "endorse", lambda _self, note: note + "— example.com/team AAAAAAAA\n")
    keys = place / "home" / "keys" / "example.com%2Fteam"
    with listening(place):
        (keys / "mldsa.vkey").touch()
        code, answer = asked("anchor", "--policy", "trust.policy")
    assert (code, answer["level"]) == (0, "COSIGNED")
    assert (place / "audit" / "anchors" / "6.checkpoint").read_text().endswith("AAAAAAAA\n")
