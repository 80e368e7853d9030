"""``rlhf-audit evaluations``: sentences, JSON, and an exit code for a pipeline."""

from __future__ import annotations

import json

import pytest

from rlhf_audit_nb import events as ev
from rlhf_audit_nb.events import encode_body
from rlhf_audit_nb.trail import Trail

WEIGHTS = "02" * 32


def told(folder, value, *, sealed=True):
    threshold = ev.ThresholdSealed(metric="accuracy", relation=">=", bound=0.7)
    final = {"architecture": "Llama", "parameters": 1, "trainable": 1, "config_digest": "00"}
    run = (
        ev.RunStarted(experiment="first", entry_point="cell", tool="t"),
        ev.TrainerAttached(trainer="SFTTrainer", loss=None, max_steps=1, seed=1, hyperparameters={}),
        ev.Step(step=1),
        ev.ModelBound(role="final", weights_digest=WEIGHTS, **final),
        ev.RunFinished(status="completed", steps=1, trained=True),
    )
    result = ev.EvaluationRecorded(metrics={"accuracy": value}, identified="stated", stated_digest=WEIGHTS)
    with Trail.open(folder) as opened:
        if sealed:
            opened.append(threshold.TYPE, encode_body(threshold)).wait()
        for event in run:
            opened.append(event.TYPE, encode_body(event), run="a" * 32).wait()
        opened.append(result.TYPE, encode_body(result)).wait()
    return folder


@pytest.mark.parametrize(
    ("value", "sealed", "code"), [(0.8, True, 0), (0.6, True, 3), (0.8, False, 3), ("NaN", True, 3)]
)
def test_a_pipeline_goes_on_only_where_what_was_set_before_is_reached(run, tmp_path, value, sealed, code):
    trail = told(tmp_path / "audit", value, sealed=sealed)
    assert run("evaluations", trail)[0] == 0
    found, _, err = run("evaluations", trail, "--require-passed")
    assert found == code
    assert ("Not every threshold" in err) is (code == 3)


def test_it_says_it_in_sentences_and_as_json(run, tmp_path):
    trail = told(tmp_path / "audit", 0.8)
    _, out, _ = run("evaluations", trail)
    assert "accuracy 0.8: ≥ 0.7 met (set in #1, before the training's first step)" in " ".join(out.split())
    said = json.loads(run("evaluations", trail, "--json")[1])
    assert said["passed"] is True
    assert said["evaluations"][0]["judgements"][0]["order"] == "before training"
    assert run("evaluations", trail, "-o", tmp_path / "e.json")[0] == 0
    assert json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))["level"] == "UNANCHORED"


def test_a_trail_without_evaluations_says_so(run, tmp_path):
    with Trail.open(tmp_path / "empty"):
        pass
    code, out, _ = run("evaluations", tmp_path / "empty")
    assert code == 0
    assert "No evaluation is recorded" in out
    assert run("evaluations", tmp_path / "empty", "--require-passed")[0] == 3
