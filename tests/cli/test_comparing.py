"""``rlhf-audit diff``: what it says, where it writes, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[1] / "vectors" / "records" / "seal-1"
PLAIN, PRIVATE, FAILED = (FIXTURES / f"{name}.ipynb" for name in ("plain", "private", "failed"))


@pytest.fixture
def diff(run, monkeypatch, tmp_path):
    """The command, with the fixtures' policy and a home of its own."""
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    return lambda *argv: run("diff", *argv, "--policy", FIXTURES / "trust.policy")


def test_differences_are_shown_and_no_failure_unless_that_is_asked_for(diff):
    code, out, err = diff(PLAIN, PRIVATE)
    assert (code, err) == (0, "")
    assert "left   plain.ipynb  UNANCHORED" in out
    assert "~ rows" in out
    assert "sealed, cannot be compared" in out
    assert diff(PLAIN, PRIVATE, "--exit-code")[0] == 1
    assert diff(PLAIN, PLAIN, "--exit-code")[0] == 0
    assert "No difference" in diff(PLAIN, PLAIN)[1]


def test_verify_says_how_the_notebook_of_a_record_ended(run, monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    policy = ("--policy", FIXTURES / "trust.policy")
    code, out, _ = run("verify", FAILED, *policy)
    said = json.loads(run("verify", FAILED, *policy, "--json")[1])["record"]
    assert (code, said["status"]) == (0, "failed")
    ids = [cell["id"] for cell in json.loads(FAILED.read_bytes())["cells"]]
    place = f"cell {ids.index(said['cell']) + 1} (id {said['cell']})"
    assert f"the notebook failed in {place}: {said['reason']}" in " ".join(out.split())
    assert "the notebook completed" in run("verify", PLAIN, *policy)[1]


def test_with_json_stdout_holds_one_object(diff):
    code, out, _ = diff(PLAIN, PRIVATE, "--json")
    said = json.loads(out)
    assert code == 0
    assert said["differs"] is True
    assert said["left"]["level"] == "UNANCHORED"
    rows = {row["place"]: row for part in said["sections"] for row in part["rows"]}
    assert (rows["rows"]["left"], rows["rows"]["right"]) == (8, 24)
    assert any(line["sign"] == "+" for line in rows["cell 6 (code)"]["lines"])
    more = json.loads(diff(PLAIN, PRIVATE, "--json", "--all", "--outputs")[1])
    assert sum(len(part["rows"]) for part in more["sections"]) > sum(len(part["rows"]) for part in said["sections"])


def test_a_page_is_written_where_it_is_asked_for(diff, tmp_path):
    page = tmp_path / "diff.html"
    code, out, _ = diff(PLAIN, FAILED, "--html", page)
    assert code == 0
    assert str(page) in out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert diff(PLAIN, FAILED, "--html", tmp_path / "diff.txt")[0] == 2


def test_a_record_that_does_not_verify_is_refused_with_its_own_code(diff, tmp_path):
    changed = tmp_path / "changed.ipynb"
    changed.write_bytes(PLAIN.read_bytes().replace(b"# plain", b"# other"))
    code, out, err = diff(PLAIN, changed)
    assert (code, out) == (40, "")
    assert "changed.ipynb: INVALID" in err
    assert "--claimed" in err
    code, out, _ = diff(PLAIN, changed, "--claimed")
    assert code == 40
    assert "no evidence" in out
    assert "+ # other" in out
    assert json.loads(diff(PLAIN, changed, "--json")[1])["error"]["code"] == "invalid-record"


def test_more_than_two_records_are_a_table(diff):
    code, out, _ = diff(PLAIN, PRIVATE, FAILED, "--exit-code")
    assert code == 1
    assert "8 | 24 | 8" in out
    said = json.loads(diff(PLAIN, PRIVATE, FAILED, "--json")[1])
    assert [side["name"] for side in said["records"]] == ["plain.ipynb", "private.ipynb", "failed.ipynb"]
    code, _, err = diff(PLAIN, PRIVATE, FAILED, "--html", "x.html")
    assert code == 2
    assert "--html compares two records" in err


def test_what_cannot_be_compared_is_said_in_one_sentence(diff, tmp_path):
    assert "takes two" in diff(PLAIN)[2]
    code, _, err = diff(PLAIN, tmp_path / "none.ipynb")
    assert code == 2
    assert "cannot be read" in err
    (tmp_path / "text.ipynb").write_text("hello")
    code, _, err = diff(PLAIN, tmp_path / "text.ipynb", "--claimed")
    assert code == 2
    assert "no notebook" in err
