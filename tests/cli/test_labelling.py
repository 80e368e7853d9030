"""``rlhf-audit labels``: votes go in, flipped ones come out once, and the trail says what that cost."""

from __future__ import annotations

import json

import pytest

from rlhf_audit_nb.privacy.label_release import release_owner
from rlhf_audit_nb.trail import Trail, TrailReader

VOTES = """question,left,right,vote,worker,stars
What is it?,first answer,second answer,L,w1,4
What is that?,one answer,another answer,R,w2,2
And this?,"an answer, with a comma",\x1b[31mred,L,w1,3
"""
OPTIONS = ("--columns", "prompt=question,first=left,second=right,choice=vote,annotator_id=worker", "--words", "L=first,R=second")  # fmt: skip  # noqa: E501


@pytest.fixture
def votes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "votes.csv"
    path.write_text(VOTES)
    return path


def release(run, votes, *more, epsilon="2", out="noisy.jsonl"):
    return run("labels", "release", votes, "--epsilon", epsilon, "-o", out, *OPTIONS, *more)


def test_a_release_says_what_it_cost_and_what_is_not_protected(run, votes):
    code, out, err = release(run, votes)
    assert code == 0, err
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["written"].startswith("noisy.jsonl: 3 labels, each flipped with chance 0.1192")
    assert lines["ε"] == "2.00 for each label; a label has cost at most 2.00 of 2"
    assert lines["annotator"].startswith("ε ")
    assert lines["annotator"].endswith("at δ 1e-05 for one who gave 2 labels")
    assert lines["original"] == "kept"
    assert out.splitlines()[-1] == "The texts and who annotated are not protected."
    assert "Left behind: worker, stars." in err
    rows = [json.loads(line) for line in (votes.parent / "noisy.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "chosen", "rejected", "label_release", "label_check"}] * 3
    assert {rows[0]["chosen"], rows[0]["rejected"]} == {"first answer", "second answer"}
    assert [entry.type for entry in TrailReader.open("audit").entries(1)] == [
        "privacy.labels",
        "privacy.labels_written",
    ]
    assert run("verify", "audit")[0] == 0


def test_what_json_says_can_be_read_by_a_program(run, votes):
    code, out, _ = release(run, votes, "--json", "--keep", "stars")
    done = json.loads(out)
    assert code == 0
    assert (done["labels"], done["epsilon"], done["originals"], done["entry"]) == (3, 2.0, "kept", 1)
    assert "rows" not in done
    code, out, _ = run("labels", "show", "--json")
    shown = json.loads(out)
    assert (code, shown["epsilon_total"], shown["budget"]) == (0, 2.0, 2.0)
    assert [one["release"] for one in shown["releases"]] == [done["release"]]


def test_the_same_votes_again_are_refused_until_the_budget_is_raised(run, votes):
    assert release(run, votes)[0] == 0
    code, _, err = release(run, votes, out="again.jsonl")
    assert code == 3
    assert "would cost a label 4 altogether, of a budget of 2" in err
    assert not (votes.parent / "again.jsonl").exists()
    assert run("budget", "set", "--unit", "label", "--epsilon", "4", "--reason", "more", "--by", "A. Keeper")[0] == 0
    code, out, _ = release(run, votes, out="again.jsonl")
    assert code == 0
    assert "a label has cost at most 4.00 of 4" in out
    assert "altogether" in run("labels", "show")[1]


def test_a_noisy_file_is_never_written_over(run, votes):
    (votes.parent / "noisy.jsonl").write_text("mine")
    code, _, err = release(run, votes)
    assert (code, (votes.parent / "noisy.jsonl").read_text()) == (2, "mine")
    assert "noisy.jsonl is there already" in err
    assert not (votes.parent / "audit").exists()


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--words", "L=first"), "row 2: the choice is neither the first nor the second response"),
        (("--columns", "prompt=questoin"), "has no column 'questoin'"),
        (("--keep", "moon"), "has no column 'moon' to keep"),
        (("--epsilon", "0"), "epsilon is 0.0"),
        (("--epsilon", "16"), "at most 15"),
        (("--epsilon", "nan"), "epsilon is nan"),
        (("-o", "noisy.csv"), "written as JSON lines"),
        (("-o", "nowhere/noisy.jsonl"), "its folder is missing"),
    ],
)
def test_bad_input_is_named_and_no_trail_is_made(run, votes, more, complaint):
    code, out, err = release(run, votes, *more)
    assert code in (2, 3)
    assert out == ""
    assert complaint in err
    assert not (votes.parent / "audit").exists()
    assert votes.read_text() == VOTES


def test_a_destroyed_original_is_gone_and_nothing_is_left_that_could_undo_the_flips(run, votes):
    code, out, err = release(run, votes, "--destroy-original")
    assert code == 0, err
    assert "original  destroyed" in out
    assert not votes.exists()
    assert len((votes.parent / "noisy.jsonl").read_text().splitlines()) == 3
    written = list(TrailReader.open("audit").entries(type="privacy.labels_written"))
    assert json.loads(written[0].body)["originals"] == "destroyed"


def test_a_file_with_another_name_is_not_destroyed_and_nothing_is_released(run, votes):
    (votes.parent / "twin.csv").hardlink_to(votes)
    code, _, err = release(run, votes, "--destroy-original")
    assert code == 2
    assert "has other names that would go on holding it" in err
    assert votes.read_text() == VOTES
    assert not (votes.parent / "audit").exists()
    assert not (votes.parent / "noisy.jsonl").exists()


def test_erasing_the_opening_of_a_release_is_possible_later(run, votes):
    assert release(run, votes)[0] == 0
    with Trail.open("audit") as trail:
        (entry,) = trail.reader().entries(type="privacy.labels")
        owner = release_owner(json.loads(entry.body)["release"])
    code, _, err = run("erase", owner, "--reason", "retention", "--yes")
    assert code == 0, err
    assert run("verify", "audit")[0] == 0
    # Whose rows they were cannot be shown any more, so other rows count as if they were the same.
    other = votes.parent / "other.csv"
    other.write_text("prompt,chosen,rejected\nNew?,yes,no\n")
    code, _, err = run("labels", "release", other, "--epsilon", "1", "-o", "other.jsonl")
    assert code == 3
    assert "would cost a label 3 altogether" in err


def test_the_budget_shows_releases_and_knows_that_steps_cost_none_of_it(run, votes):
    assert release(run, votes)[0] == 0
    code, out, _ = run("budget", "show")
    assert code == 0
    assert out.startswith("ε 2.0000 of each label (pure: at any δ); what one label's releases cost adds up\n")
    assert "left      0.0000 of 2" in out
    assert "(#1): 3 labels, ε 2.0000 each" in out
    shown = json.loads(run("budget", "show", "--json")[1])
    assert (shown["unit"], shown["epsilon"], shown["adjacency"]) == ("label", 2.0, "replace one label")
    assert [one["labels"] for one in shown["releases"]] == [3]
    code, out, err = run("budget", "left", "--noise-multiplier", "1", "--sampling-rate", "0.1")
    assert (code, out) == (2, "")
    assert "This trail counts labels" in err


def test_nothing_released_is_said(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Trail.open("audit").close()
    assert run("labels", "show") == (0, "No labels were released on this trail.\n", "")
