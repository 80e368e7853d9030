"""``rlhf-audit trail``: what a person sees, what a program gets, and what is refused."""

from __future__ import annotations

import json
import sqlite3

import pytest

from rlhf_audit_nb import cli
from rlhf_audit_nb.trail import Trail
from rlhf_audit_nb.trail.merkle import leaf_hash
from rlhf_audit_nb.trail.note import parse_vkey, verify_note
from rlhf_audit_nb.trail.proof import parse_proof


@pytest.fixture
def trail(tmp_path, monkeypatch):
    """Seven entries, one with a private half, one with characters that could deceive a reader."""
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLHF_AUDIT_TRAIL", str(tmp_path / "audit"))
    monkeypatch.delenv("RLHF_AUDIT_PASSPHRASE", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    with Trail.open(tmp_path / "audit") as opened:
        opened.append("run.started", b'{"experiment":"first","audit":{"frequency":5}}', run="3f2a81bc00112233")
        opened.append("train.step", b'{"step":1,"metrics":{"loss":0.5}}', run="3f2a81bc00112233")
        opened.append("annotation.recorded", b'{"set":"a"}', private=b'{"choice":"kiwi"}')
        opened.append("odd.name", json.dumps({"note": "a\u202eb\x1b[2J" + "x" * 300}, ensure_ascii=False).encode())
        opened.append("run.finished", b'{"status":"completed"}', run="3f2a81bc00112233")
        opened.append("vendor.unheard-of", b"{}").wait()
    return tmp_path / "audit"


def test_the_tail_is_a_table_that_fits_the_terminal(run, trail, monkeypatch):
    for columns in (80, 100, 160):
        monkeypatch.setenv("COLUMNS", str(columns))
        code, out, err = run("trail", "tail")
        lines = out.splitlines()
        assert (code, err, len(lines)) == (0, "", 8)
        assert all(len(line) <= columns for line in lines)
        assert lines[0].split() == ["#", "time", "(UTC)", "run", "type", "what"]
        assert "3f2a81bc  run.started" in lines[2]
        assert ("step=1 metrics={loss=0.5}" if columns > 80 else "step=1 metrics={") in lines[3]
        assert "vendor.unheard-of" in lines[7]
    assert len(run("trail", "tail", "-n", "2")[1].splitlines()) == 3


def test_a_private_half_shows_as_sealed_and_its_content_nowhere(run, trail):
    assert "[sealed] set=a" in run("trail", "tail")[1]
    for argv in (("show", "3"), ("show", "3", "--json"), ("query", "--type", "annotation.recorded", "--jsonl")):
        code, out, err = run("trail", *argv)
        assert code == 0
        assert "kiwi" not in out + err
        assert "sealed" in out


def test_nothing_in_an_entry_can_move_the_cursor_or_turn_the_text(run, trail):
    for argv in (("tail",), ("show", "4")):
        out = run("trail", *argv)[1]
        assert "\x1b" not in out
        assert "\u202e" not in out
        assert "[U+202E]" in out


def test_an_entry_is_shown_in_full_with_its_place_in_the_tree(run, trail):
    code, out, _ = run("trail", "show", "2")
    assert code == 0
    assert out.startswith("entry 2 of 7  train.step\n")
    assert "run       3f2a81bc00112233\n" in out
    assert "number 1 of its run" in out
    assert "stands under the checkpoint of 7 entries, root " in out
    assert '    {\n      "step": 1,\n' in out
    assert run("trail", "show", "-1")[1].startswith("entry 6 of 7  vendor.unheard-of\n")
    assert run("trail", "show", "1:3")[1].count("entry ") >= 2


def test_json_is_one_object_and_json_lines_one_an_entry(run, trail):
    code, out, err = run("trail", "query", "--run", "3f2", "--json")
    found = json.loads(out)
    assert (code, err, found["size"], len(found["entries"])) == (0, "", 7, 3)
    lines = [json.loads(line) for line in run("trail", "query", "--run", "3f2", "--jsonl")[1].splitlines()]
    assert lines == found["entries"]
    assert list(lines[0]) == ["index", "type", "time", "run", "seq", "writer", "body", "sealed", "leaf"]
    assert lines[0]["body"] == {"experiment": "first", "audit": {"frequency": 5}}


def test_a_query_takes_all_its_filters_and_says_where_nothing_matches(run, trail):
    assert len(run("trail", "query", "--experiment", "first", "--type", "train.step")[1].splitlines()) == 2
    assert len(run("trail", "query", "--since", "1h", "--limit", "2")[1].splitlines()) == 3
    assert run("trail", "query", "--until", "2020-01-01") == (0, "", "No entry matches.\n")
    code, out, err = run("trail", "query", "--type", "train.stp")
    assert (code, out) == (0, "")
    assert "No entry is of type train.stp. Types on this trail: annotation.recorded, odd.name, run.finished" in err


def test_the_proof_and_the_entry_that_are_written_go_together(run, trail, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("trail", "show", "2", "--proof", "p.tlog-proof", "--entry", "e.json")
    assert code == 0
    assert "rlhf-audit verify p.tlog-proof --entry e.json --policy FILE" in out
    proof = parse_proof((tmp_path / "p.tlog-proof").read_bytes())
    assert proof.check(leaf_hash((tmp_path / "e.json").read_bytes()))
    vkey = next((tmp_path / "home" / "keys").rglob("log.vkey")).read_text().strip()
    from rlhf_audit_nb.trail.note import parse_note

    assert verify_note(parse_note(proof.checkpoint), [parse_vkey(vkey)])


def test_a_damaged_entry_is_named_with_what_to_do(run, trail):
    connection = sqlite3.connect(trail / "trail.sqlite")
    first, data = connection.execute("SELECT first, data FROM bundles WHERE first > 0").fetchone()
    with connection:
        changed = data.replace(b'"loss":0.5', b'"loss":0.1')
        connection.execute("UPDATE bundles SET data=? WHERE first=?", (changed, first))
    connection.close()
    code, out, err = run("trail", "tail")
    assert code == 40
    assert "    2  DAMAGED  Its bytes are not those that were hashed" in out
    assert "1 of these is damaged: `rlhf-audit verify`" in err
    assert run("trail", "show", "2")[0] == 40
    assert json.loads(run("trail", "show", "2", "--jsonl")[1])["damaged"]
    assert run("trail", "show", "2", "--entry", trail.parent / "e")[0] == 40
    assert not (trail.parent / "e").exists()
    assert run("trail", "show", "3")[0] == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["show", "7"], "The trail has 7 entries, 0 to 6; 7 names none of them."),
        (["show", "x"], "'x' names no entry"),
        (["show", "1:3", "--proof", "p"], "1:3 names 2 entries"),
        (["tail", "-n", "-4"], "-n -4 is below 0"),
        (["tail", "--follow", "--json"], "Take --jsonl"),
        (["query", "--since", "soon"], "--since: 'soon' is not a time"),
        (["query", "--run", "zz"], "No run of this trail begins with 'zz'"),
        (["query", "--limit", "0"], "--limit 0 is below 1"),
        (["tail", "--trail", "nowhere"], "There is no trail at"),
        (["shw", "1"], "shw"),
        (["query", "--tpye", "x"], "Did you mean '--type'?"),
    ],
)
def test_a_mistake_gets_one_sentence(run, trail, argv, said):
    code, out, err = run("trail", *argv)
    assert code == 2
    assert out == "" or json.loads(out)["error"]["code"] == "usage"
    assert said in err
    assert err.count("\n") <= 2


def test_following_prints_what_comes_until_it_is_interrupted(run, trail, monkeypatch):
    from rlhf_audit_nb.trail import query

    def interrupt(_seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(query.Look.follow, "__defaults__", (interrupt,))
    code, out, _ = run("trail", "tail", "-n", "1", "--follow", "--jsonl")
    assert (code, [json.loads(line)["index"] for line in out.splitlines()]) == (0, [6])


@pytest.mark.parametrize("options", [["show", "1", "--json"], ["query", "--json"], ["query", "--jsonl"]])
def test_what_an_entry_says_is_json_and_no_command_to_the_terminal(tmp_path, monkeypatch, capsys, options):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    with Trail.open(tmp_path / "odd") as trail:
        trail.append("a.b", '{"far":1e999,"note":"\\u001b[2J\x9b\u202e\x7f\U000e0041é"}'.encode()).wait()
    assert cli.main(["trail", *options, "--trail", str(tmp_path / "odd")]) == 0
    out = capsys.readouterr().out
    assert all(char.isprintable() or char == "\n" for char in out)
    found = json.loads(out.splitlines()[-1])
    body = (found["entries"][-1] if "entries" in found else found)["body"]
    assert body == {"far": "inf", "note": "\x1b[2J\x9b\u202e\x7f\U000e0041é"}
