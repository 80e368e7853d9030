"""``rlhf-audit replay``: what it passes on, what it says, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_audit_nb.records.comparison import Comparison, Difference
from rlhf_audit_nb.records.replay import ReplayFailedError, ReplayResult

EQUAL = Comparison(differences=(), trainings=1, steps=4, digests=5, runs=1, compared=9)
STEP = Difference(run="a" * 32, entry=9, where="step 3", what="gradient_norm", step=3)
OTHER = Comparison(differences=(STEP,), trainings=1, steps=4, digests=5, runs=1, compared=9)


@pytest.fixture
def replay(run, monkeypatch):
    """The command, with a replay that finds what it is told to find."""

    def call(found, *argv):
        asked = {}

        def replay_record(path, openings, **settings):
            asked.update(path=path, openings=openings, **settings)
            if isinstance(found, Exception):
                raise found
            return ReplayResult(comparison=found, warnings=("Torch differs: 1 then, 2 now.",), entries=(7,))

        monkeypatch.setattr("rlhf_audit_nb.records.replay.replay_record", replay_record)
        return *run("replay", "record.ipynb", *argv), asked

    return call


def test_equal_is_0_and_differs_is_1_with_the_place(replay):
    code, out, err, asked = replay(EQUAL, "--opening", "a.opening", "--opening", "b.opening", "--files", "votes.csv")
    assert code == 0, err
    assert out.startswith("equal     bit for bit: 1 private training(s), 4 step(s), 5 weights digest(s)")
    assert "note: Torch differs" in out
    assert (asked["openings"], asked["files"], asked["cwd"]) == (["a.opening", "b.opening"], ["votes.csv"], None)
    code, out, _, _ = replay(OTHER, "--opening", "a.opening")
    assert code == 1
    assert out.startswith("differs   step 3: gradient_norm (entry 9)")
    assert "first step that differs is 3" in out


def test_json_holds_all_of_it(replay):
    code, out, err, _ = replay(OTHER, "--opening", "a.opening", "--json")
    answer = json.loads(out)
    assert (code, answer["equal"], answer["first_step"], answer["reservations"]) == (1, False, 3, [7])
    assert answer["differences"][0]["what"] == "gradient_norm"
    assert answer["warnings"] == ["Torch differs: 1 then, 2 now."]
    assert "differs" in err


def test_nothing_compared_is_no_equality(replay):
    code, out, _, _ = replay(Comparison(differences=(), trainings=0, steps=0, digests=0), "--opening", "a.opening")
    assert code == 1
    assert "nothing to compare" in out


def test_a_cell_that_raises_is_quoted_and_is_1(replay):
    failed = ReplayFailedError("Cell 2 of 4 raised KeyError in the replay.", next_step="Look.", said="KeyError: 'x'")
    code, _, err, _ = replay(failed, "--opening", "a.opening")
    assert code == 1
    assert "KeyError: 'x'" in err


def test_a_missing_opening_and_two_places_to_run_are_usage(replay):
    code, _, err, asked = replay(EQUAL)
    assert (code, asked) == (2, {})
    assert "--opening" in err
    code, _, err, asked = replay(EQUAL, "--opening", "a", "--cwd", ".", "--files", "votes.csv")
    assert (code, asked) == (2, {})
    assert "one of the two" in err


def test_a_trail_that_is_not_there_is_not_made(replay, tmp_path: Path):
    code, _, err, asked = replay(EQUAL, "--trail", tmp_path / "nowhere")
    assert (code, asked) == (2, {})
    assert "no trail" in err
    assert not (tmp_path / "nowhere").exists()
