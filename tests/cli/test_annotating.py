"""``rlhf-audit annotations``: a file goes in, the open part is listed for all, the rest for who holds the key."""

from __future__ import annotations

import json

import pytest

from rlhf_audit_nb.trail import Trail, TrailReader
from rlhf_audit_nb.trail.erasure import erase

VOTES = """question,left,right,vote,worker,stars,why
What is it?,first answer,second answer,L,w1,4,clear
What is it?,first answer,second answer,R,w2,2,short
What is it?,"an answer, with a comma",\x1b[31mred,same,w1,3,
"""
COLUMNS = "prompt=question,first=left,second=right,choice=vote,annotator_id=worker"
WORDS = "L=first,R=second,same=tie"


@pytest.fixture
def votes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "votes.csv"
    path.write_text(VOTES)
    return path


@pytest.fixture
def imported(votes, run):
    code, out, _ = run("annotations", "import", votes, "--columns", COLUMNS, "--words", WORDS, "--json")
    assert code == 0
    return json.loads(out)


def test_an_import_says_what_was_written_and_what_nobody_knows(run, votes):
    code, out, err = run(
        "annotations", "import", votes, "--columns", COLUMNS, "--words", WORDS, "--guideline", "v3", "--extra", "why"
    )
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["written"] == "3 comparisons: entries 2 to 4"
    assert lines["recorded"] == "prompt, responses, choice, annotator"
    assert lines["stated"] == "guideline"
    assert lines["unknown"] == "shown, made_at"
    assert "writing 3 annotations" in err
    assert [entry.type for entry in TrailReader.open("audit").entries(1)] == [
        "annotations.imported",
        *["annotation.recorded"] * 3,
    ]


def test_a_bad_row_is_named_and_no_trail_is_made(run, votes, tmp_path):
    code, out, err = run("annotations", "import", votes, "--columns", COLUMNS, "--words", "L=first,R=second")
    assert (code, out) == (2, "")
    assert "votes.csv, row 3: the choice is none of the known words" in err
    assert not (tmp_path / "audit").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--columns", "prompt"], "--columns: 'prompt' is no pair with an '='"),
        (["--columns", COLUMNS + ",prompt=why"], "stands there twice"),
        (["--columns", COLUMNS, "--words", "L="], "'L' means ''"),
        (["--columns", COLUMNS, "--words", "L=frst"], "Did you mean 'first'?"),
        (["--columns", "anotator=worker"], "Did you mean 'annotator_id'?"),
        (["--columns", COLUMNS, "--words", WORDS, "--extra", "whY"], "has no column 'whY'"),
        (["--columns", COLUMNS, "--words", WORDS, "--guideline-file", "none.md"], "none.md cannot be read"),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_2(run, votes, tmp_path, options, said):
    code, out, err = run("annotations", "import", votes, *options)
    assert (code, out) == (2, "")
    assert said in err
    assert not (tmp_path / "audit").exists()


def test_what_is_open_is_shown_without_a_key(run, imported, monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "nobody"))
    code, out, _ = run("annotations", "show")
    assert code == 0
    assert f"import {imported['import_id']}" in out
    assert "3 comparisons from csv" in out
    assert "unknown   guideline, made_at, shown" in out
    assert "w1" not in out
    code, out, err = run("annotations", "show", "--open")
    assert (code, out) == (2, "")
    assert "key" in err


def test_whoever_holds_the_key_sees_what_they_say(run, imported):
    code, out, _ = run("annotations", "show", "--open")
    assert code == 0
    assert "2  w1, response 1 of 2" in out
    assert "3  w2, response 2 of 2" in out
    assert "4  w1, tie" in out
    assert "an answer, with a comma" in out
    assert "\x1b" not in out
    found = json.loads(run("annotations", "show", "--open", "--json")[1])
    assert [item["annotation"]["choice"] for item in found["annotations"]] == [0, 1, "tie"]
    assert found["imports"][0]["recorded"] == 3
    with Trail.open("audit") as trail:
        erase(trail, "w1", reason="request")
    assert "2  erased" in run("annotations", "show", "--open")[1]


def test_one_import_and_few_of_its_annotations_can_be_asked_for(run, imported, votes):
    run("annotations", "import", votes, "--columns", COLUMNS.replace("worker", "") + ",choice=", "--words", WORDS)
    assert len(json.loads(run("annotations", "show", "--json")[1])["imports"]) == 1  # that one says nothing at all
    ratings = "prompt=question,response=left,reward=stars,annotator_id="
    assert run("annotations", "import", votes, "--columns", ratings)[0] == 0
    both = json.loads(run("annotations", "show", "--open", "--limit", "0", "--json")[1])
    assert [item["kind"] for item in both["imports"]] == ["comparison", "rating"]
    assert len(both["annotations"]) == 6
    code, out, err = run("annotations", "show", "--import", imported["import_id"], "--open", "--limit", "2")
    assert code == 0
    assert "rating" not in out
    assert "1 more" in err
    assert run("annotations", "show", "--import", "none")[0] == 2
    assert run("annotations", "show", "--limit", "-1")[0] == 2


def test_a_trail_without_annotations_says_so(run, tmp_path):
    Trail.open(tmp_path / "new").close()
    code, out, _ = run("annotations", "show", "--trail", tmp_path / "new")
    assert (code, out.strip()) == (0, "No annotations are recorded in this trail.")
    assert run("annotations", "show", "--trail", tmp_path / "none")[0] == 2


MANY = "prompt,first,second,choice,annotator_id\n" + "".join(
    f"q{question},a,b,{'first' if person % 3 else 'second'},rare-worker-{person}\n"
    for person in range(6)
    for question in range(2)
)


@pytest.fixture
def many(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "many.csv").write_text(MANY)
    assert run("annotations", "import", "many.csv")[0] == 0


def test_statistics_tell_groups_and_nobody(run, many):
    code, out, err = run("annotations", "statistics")
    assert code == 0
    assert "No figure is about fewer than 5 annotators" in out
    assert "rare-worker" not in out + err
    code, out, _ = run("annotations", "statistics", "-k", "7", "--json")
    assert (code, json.loads(out)["released"]["groups"]) == (0, [])
    assert run("annotations", "statistics", "-k", "1")[0] == 2


def test_rows_stand_under_tokens_and_whose_one_is_is_told_on_the_record(run, many, tmp_path):
    code, out, err = run("annotations", "statistics", "--open", "--json", "-o", "out.json")
    assert code == 0
    assert "not for release" in err
    rows = json.loads(out)["rows"]
    assert len(rows) == 6
    written = (tmp_path / "out.json").read_text()
    assert "rare-worker" not in out + err + written
    assert not [row for row in rows if row["token"] in written]
    code, out, _ = run("annotations", "reidentify", rows[0]["token"], "--reason", "a complaint", "--by", "A. Keeper")
    assert code == 0
    assert out.strip().startswith("rare-worker-")
    (entry,) = TrailReader.open("audit").entries(type="vault.reidentified")
    assert b"A. Keeper" in entry.body
    assert b"rare-worker" not in entry.body
    code, out, err = run("annotations", "reidentify", "x", "--reason", "r", "--by", "b")
    assert (code, out) == (2, "")
    assert "No annotator in the vault has this token" in err


def test_under_a_budget_statistics_are_for_the_vault_s_holder_alone(run, many, tmp_path):
    assert run("budget", "set", "--epsilon", "1.0", "--reason", "a study", "--by", "A. Keeper")[0] == 0
    code, out, err = run("annotations", "statistics", "-o", "out.json")
    assert (code, out) == (3, "")
    assert "keeps a privacy budget" in err
    assert not (tmp_path / "out.json").exists()
    code, out, err = run("annotations", "statistics", "--open")
    assert (code, len(out.splitlines())) == (0, 6)
    assert "not for release" in err
