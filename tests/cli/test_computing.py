"""``rlhf-audit compute``."""

from __future__ import annotations

import json

import pytest

from rlhf_audit_nb import events as ev
from rlhf_audit_nb.events import encode_body
from rlhf_audit_nb.trail import Trail

SHAPE = ev.ModelShape(parameters=10, trainable=4, dense=8, backward=4, learning=4, layers=1, width=2)


@pytest.fixture
def trail(tmp_path):
    columns = {"update": ev.Passes(passes=1, positions=9, scores=81, tokens=7, low=1e20, high=2e20)}
    told = (
        ev.RunStarted(experiment="first", entry_point="cell", tool="t"),
        ev.TrainerAttached(trainer="SFTTrainer", loss=None, max_steps=1, seed=1, hyperparameters={}),
        ev.ComputeRecorded(trainer="SFTTrainer", shape=SHAPE, device="cpu", columns=columns, seconds=7.2),
        ev.RunFinished(status="completed", steps=1, trained=True),
    )
    with Trail.open(tmp_path / "audit") as opened:
        for event in told:
            opened.append(event.TYPE, encode_body(event), run="a" * 32).wait()
    return tmp_path / "audit"


def test_it_says_the_columns_and_the_rule(run, trail):
    code, out, _ = run("compute", trail)
    said = " ".join(out.split())
    assert code == 0
    assert "first: SFTTrainer (#3)" in said
    assert "1.0e20 to 2.0e20 FLOP (counted pass by pass; 7 tokens, 9 with padding)" in said
    assert "Below one third" in said
    assert "paragraphs 61, 115, 119; threshold 3.3e22" in said
    assert "UNANCHORED" in said
    assert "Energy" not in said  # nothing was read, and nothing is guessed


def test_a_base_can_be_stated_and_json_holds_all(run, trail):
    code, out, _ = run("compute", trail, "--base-flop", "3e20", "--json")
    said = json.loads(out)
    (rule,) = said["verdicts"]["3"]
    assert code == 0
    assert rule["threshold"] == pytest.approx(1e20)
    assert rule["state"] == "open"
    assert said["trainings"][0]["kilowatt_hours"] == {}
    assert run("compute", trail, "--base-flop", "-1")[0] == 2


def test_a_trail_without_training_says_so(run, tmp_path):
    with Trail.open(tmp_path / "empty"):
        pass
    code, out, _ = run("compute", tmp_path / "empty")
    assert code == 0
    assert "No training on this trail" in out
