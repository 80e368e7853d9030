"""``rlhf-audit disclose`` and ``erase``: what a person sees, what a program gets, and what is refused."""

from __future__ import annotations

import io
import json

import pytest

from rlhf_audit_nb.trail import Trail, TrailReader, TrustPolicy
from rlhf_audit_nb.trail.vault import VAULT_ERASED, Vault


@pytest.fixture
def trail(tmp_path, monkeypatch):
    """Three annotations of one person, two of another, and one private payload of a run."""
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLHF_AUDIT_TRAIL", str(tmp_path / "audit"))
    monkeypatch.delenv("RLHF_AUDIT_PASSPHRASE", raising=False)
    monkeypatch.chdir(tmp_path)
    with Trail.open(tmp_path / "audit") as opened:
        for number in range(5):
            owner = ("w-ann", "w-ben")[number % 2]
            opened.append("annotation.recorded", b"{}", private=b'{"choice":"kiwi %d"}' % number, owner=owner)
        opened.append("train.step", b'{"step":1}', run="run-1", private=b'{"metrics":{"loss":0.5}}')
        (tmp_path / "trust.policy").write_text(TrustPolicy.of(opened.log_vkey).format())
    return tmp_path / "audit"


def erased(folder):
    return [json.loads(entry.body) for entry in TrailReader.open(folder).entries(type=VAULT_ERASED)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


# --- disclose ---


def test_a_disclosure_is_one_file_that_verify_reads(run, trail, tmp_path, monkeypatch):
    code, out, err = run("disclose", 2, "-o", "to the auditor/two.opening")
    assert (code, err) == (0, "")
    assert out.startswith(
        "disclosed   entry 2 in to the auditor/two.opening, proved under the checkpoint of 7 entries\n"
    )
    path = tmp_path / "to the auditor" / "two.opening"
    assert path.stat().st_mode & 0o077 == 0
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "of the auditor"))
    code, out, err = run("verify", path, "--policy", "trust.policy")
    assert code == 0
    assert out.startswith("UNANCHORED")
    assert "kiwi 1" in out
    assert "kiwi 2" not in out


def test_a_program_gets_where_the_disclosure_is(run, trail, tmp_path):
    code, out, err = run("disclose", 1, "--json")
    said = json.loads(out)
    assert (code, said["file"], said["entry"], said["size"]) == (0, "entry-1.opening", 1, 7)
    assert (tmp_path / "entry-1.opening").exists()
    assert "disclosed" in err


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (("0",), "Entry 0 (trail.created) has no private half"),
        (("70",), "There is no entry 70 in a trail of 7."),
        (("two",), "invalid int value: 'two'"),
        (("1", "--trail", "nowhere"), "There is no trail at"),
        (("1", "-o", "."), "it is a folder"),
    ],
)
def test_what_cannot_be_disclosed_gets_one_sentence(run, trail, tmp_path, asked, sentence):
    code, out, err = run("disclose", *asked)
    assert (code, out) == (2, "")
    assert sentence in err
    assert "Next step:" in err
    assert not list(tmp_path.glob("*.opening"))


# --- erase ---


def test_an_annotator_is_erased_and_nobody_can_disclose_them(run, trail):
    code, out, err = run("erase", "w-ann", "--reason", "request", "--yes")
    assert (code, err) == (0, "")
    assert out.startswith("erased      3 private payloads; entry 7 of the trail says so, and not whose\n")
    assert "w-ann" not in out
    assert [said["reason"] for said in erased(trail)] == ["request"]
    code, out, err = run("disclose", 1)
    assert (code, "was erased" in err) == (2, True)
    assert run("disclose", 2)[0] == 0
    assert "6 private halves" in run("verify", trail)[1]
    code, out, err = run("erase", "w-ann", "--reason", "request", "--yes")
    assert (code, out) == (2, "")
    assert "holds nothing under that name" in err
    assert len(erased(trail)) == 1


def test_a_program_gets_what_was_erased(run, trail):
    code, out, _err = run("erase", "w-ben", "--reason", "retention", "--yes", "--json")
    said = json.loads(out)
    assert code == 0
    assert (said["openings"], said["entry"], said["generation"], said["reason"]) == (2, 7, 2, "retention")
    assert said["erasure"] == erased(trail)[0]["erasure"]
    code, out, _err = run("erase", "nobody", "--reason", "retention", "--yes", "--json")
    assert json.loads(out)["error"]["code"] == "unknown-owner"


def test_a_person_is_asked_first(run, trail, monkeypatch):
    for answer in ("", "n\n", "what?\n"):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        code, out, err = run("erase", "w-ann", "--reason", "request")
        assert (code, out, erased(trail)) == (2, "", [])
        assert "This takes 3 private payloads of that annotator out of the vault" in err
        assert "Nothing was erased." in err
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    code, out, err = run("erase", "w-ann", "--reason", "request")
    assert (code, erased(trail)) == (2, [])
    assert "Add --yes" in err
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert run("erase", "w-ann", "--reason", "request")[0] == 0
    assert len(erased(trail)) == 1


def test_the_id_need_not_stand_on_the_command_line(run, trail, tmp_path, monkeypatch):
    (tmp_path / "whom").write_text("w-ann\n")
    assert run("erase", "--from-file", "whom", "--reason", "request", "--yes")[0] == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("w-ben\n"))
    assert run("erase", "-", "--reason", "withdrawn", "--yes")[0] == 0
    assert [said["reason"] for said in erased(trail)] == ["request", "withdrawn"]


def test_an_id_and_the_answer_can_both_be_typed(run, trail, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal("w-ann\ny\n"))
    assert run("erase", "-", "--reason", "request")[0] == 0
    assert len(erased(trail)) == 1


def test_what_a_run_holds_can_be_erased(run, trail):
    code, out, _err = run("erase", "--run", "run-1", "--reason", "retention", "--yes")
    assert (code, out.startswith("erased      1 private payload;")) == (0, True)
    assert run("erase", "--run", "w-ann", "--reason", "retention", "--yes")[0] == 2


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (("--reason", "request", "--yes"), "Name one annotator"),
        (("w-ann", "--from-file", "whom", "--reason", "request", "--yes"), "Name one annotator"),
        (("w-ann", "--run", "r", "--reason", "request", "--yes"), "Name one annotator"),
        (("w-ann", "--yes"), "--reason"),
        (("w-ann", "--reason", "because", "--yes"), "invalid choice: 'because'"),
        (("--from-file", "nowhere", "--reason", "request", "--yes"), "The id cannot be read"),
        (("--from-file", "two", "--reason", "request", "--yes"), "exactly one annotator's id"),
        (("--from-file", "none", "--reason", "request", "--yes"), "exactly one annotator's id"),
        (("w-ann", "--reason", "request", "--yes", "--trail", "nowhere"), "There is no trail at"),
    ],
)
def test_a_mistake_gets_one_sentence_and_erases_nobody(run, trail, tmp_path, asked, sentence):
    (tmp_path / "whom").write_text("w-ann")
    (tmp_path / "two").write_text("w-ann\nw-ben\n")
    (tmp_path / "none").write_text("")
    code, out, err = run("erase", *asked)
    assert (code, out) == (2, "")
    assert sentence in err
    assert erased(trail) == []


def test_an_erasure_that_was_stopped_is_told_as_finished(run, trail, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Vault, "mark_logged", lambda *_: 1 / 0)
        patch.setattr(Trail, "append_guarded", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("erase", "w-ann", "--reason", "request", "--yes")
    assert erased(trail) == []
    code, out, _err = run("erase", "w-ann", "--reason", "request", "--yes")
    assert code == 0
    assert "3 private payloads (that erasure had been stopped half-way and is now finished); entry 7" in out
    assert len(erased(trail)) == 1
