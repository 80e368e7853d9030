"""``rlhf-audit publish``: what a person and a program are told."""

from __future__ import annotations

import fcntl
import json
import os

import pytest

from rlhf_audit_nb.cli import publishing
from rlhf_audit_nb.trail import Trail
from rlhf_audit_nb.trail.note import parse_note
from rlhf_audit_nb.trail.rotation import rotate_key


@pytest.fixture
def trail(tmp_path, monkeypatch):
    """A trail of 300 entries."""
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RLHF_AUDIT_PASSPHRASE", raising=False)
    monkeypatch.setenv("RLHF_AUDIT_TRAIL", str(tmp_path / "audit"))
    with Trail.open(tmp_path / "audit") as opened:
        grow(opened, 300)
    return tmp_path / "audit"


def grow(trail: Trail, size: int) -> None:
    for number in range(trail.reader().size, size):
        trail.append("a.b", b'{"n":%d}' % number, run="r")


def test_what_was_published_is_told_and_so_is_that_nothing_was_new(run, trail, tmp_path):
    code, out, err = run("publish", tmp_path / "www")
    assert (code, err) == (0, "")
    assert out == f"published   {tmp_path}/www: 300 entries; 300 of them new, 6 files written\n"
    code, out, _ = run("publish", tmp_path / "www")
    assert (code, out) == (0, f"published   {tmp_path}/www: 300 entries; nothing was new\n")
    with Trail.open(trail) as opened:
        grow(opened, 310)
    code, out, _ = run("publish", tmp_path / "www", "--json")
    assert (code, json.loads(out)) == (
        0,
        {"target": f"{tmp_path}/www", "size": 310, "before": 300, "written": 3, "removed": 0},
    )


def test_what_takes_long_is_told_on_the_way(run, trail, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "_PATIENCE", 0.0)
    code, out, err = run("publish", tmp_path / "www", "--json")
    assert code == 0
    assert json.loads(out)["written"] == 6
    assert err.splitlines()[:2] == ["checked 256 of 300 entries", "checked 300 of 300 entries"]
    assert err.splitlines()[-2] == "written 300 of 300 entries"


def test_what_was_lost_is_added_where_it_is_asked_for(run, trail, tmp_path):
    run("publish", tmp_path / "www")
    (tmp_path / "www/tile/0/000").unlink()
    assert run("verify", tmp_path / "www")[0] == 40
    assert "nothing was new" in run("publish", tmp_path / "www")[1]
    assert "1 file written" in run("publish", tmp_path / "www", "--all")[1]
    assert run("verify", tmp_path / "www")[0] == 0


def test_an_address_is_published_to_and_verified(run, trail):
    assert run("publish", "memory://cli/trail")[0] == 0
    code, out, _ = run("verify", "memory://cli/trail", "--json")
    assert (code, json.loads(out)["size"]) == (0, 300)
    code, out, err = run("verify", "memory://cli/nothing")
    assert (code, out) == (2, "")
    assert "There is no published trail at memory://cli/nothing" in err


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nonsense://place/trail", "not an address that is known here"),
        ("https://user:s3cret@example.com/trail?sig=t0ken", "https://example.com/trail can only be read"),
        ("/dev/null", "no folder can be made there"),
        ("/dev/null/below", "no folder can be made there"),
    ],
)
def test_a_target_that_cannot_be_is_one_sentence_and_the_next_step(run, trail, target, words):
    code, out, err = run("publish", target)
    assert (code, out) == (2, "")
    first, second = err.splitlines()
    assert words in first
    assert second.startswith("Next step: ")
    assert "s3cret" not in err
    assert "t0ken" not in err


def test_another_publish_that_is_going_on_is_one_sentence(run, trail, tmp_path):
    (tmp_path / "www").mkdir()
    held = os.open(tmp_path / "www", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    code, _, err = run("publish", tmp_path / "www")
    assert code == 2
    assert err.startswith(f"error: Another publish to {tmp_path}/www is going on.")
    os.close(held)
    assert run("publish", tmp_path / "www")[0] == 0


def test_another_history_is_refused_with_a_machine_readable_reason(run, trail, tmp_path):
    run("publish", tmp_path / "www")
    with Trail.open(tmp_path / "other") as opened:
        grow(opened, 400)
    code, out, _ = run("publish", tmp_path / "www", "--trail", tmp_path / "other", "--json")
    assert (code, json.loads(out)["error"]["code"]) == (2, "diverged")


def test_the_second_signature_is_added_where_the_key_is_at_hand(run, trail, tmp_path, monkeypatch):
    with Trail.open(trail) as opened:
        rotate_key(opened, "mldsa")
    run("publish", tmp_path / "www")
    assert len(parse_note((tmp_path / "www/checkpoint").read_bytes()).signatures) == 2
    code, out, _ = run("verify", tmp_path / "www", "--json")
    assert (code, len(json.loads(out)["signers"])) == (0, 2)
    for path in (tmp_path / "home/keys").rglob("*.pem"):
        path.unlink()
    code, _, err = run("publish", tmp_path / "elsewhere")
    assert code == 0
    assert "left without the log's ML-DSA-44 signature" in err
    assert len(parse_note((tmp_path / "elsewhere/checkpoint").read_bytes()).signatures) == 1
