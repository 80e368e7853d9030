"""The live picture of a run: append-only, readable while it is written, plain values."""

from __future__ import annotations

import json
import subprocess
import sys

from rlhf_audit_nb.capture.state import KEPT, PrivacyView, RunState


def view(**changes):
    settings = {
        "unit": "annotator",
        "units": 10,
        "adjacency": "zero-out",
        "delta": 1e-5,
        "budget": 8.0,
        "before": 0.5,
        "planned": 2.0,
        "noise_multiplier": 1.0,
        "sampling_rate": 0.1,
        "clipping_norm": 1.0,
        "curve": [0.5, 1.0, 1.5, 2.0],
    }
    return PrivacyView(**{**settings, **changes})


def test_a_reader_that_keeps_its_cursor_sees_every_point_once():
    state = RunState(experiment="e", run_id="r")
    state.add("loss", 1, 0.7)
    loss = state.series["loss"]
    seen = loss[0:]
    state.add("loss", 2, 0.6)
    later = loss[len(seen) :]
    assert seen == [(1, 0.7)]
    assert later == [(2, 0.6)]


def test_a_cursor_holds_and_memory_does_not_grow_however_long_the_run_is():
    state = RunState(experiment="e", run_id="r")
    seen = []
    for step in range(5 * KEPT):
        state.add("loss", step, float(step))
        if step % 997 == 0:
            seen += state.series["loss"][len(seen) :]
    loss = state.series["loss"]
    seen += loss[len(seen) :]
    assert seen == [(step, float(step)) for step in range(5 * KEPT)]
    assert len(loss) == 5 * KEPT
    assert KEPT <= len(list(loss)) <= 2 * KEPT
    assert loss[-1] == loss[5 * KEPT - 1] == (5 * KEPT - 1, 5 * KEPT - 1.0)
    assert loss[:10] == []  # what is gone is not given as something else
    assert len(state.snapshot()["series"]["loss"]) <= 2 * KEPT


def test_a_snapshot_does_not_change_when_the_run_goes_on():
    state = RunState(experiment="e", run_id="r", private=True, privacy=view())
    state.add("epsilon", 1, 1.0)
    before = state.snapshot()
    state.add("epsilon", 2, 1.5)
    state.warnings.append("look")
    assert before["series"] == {"epsilon": [(1, 1.0)]}
    assert before["warnings"] == []
    assert before["epsilon"] == 1.0
    assert json.loads(json.dumps(before))["privacy"]["curve"] == [0.5, 1.0, 1.5, 2.0]


def test_epsilon_is_what_was_spent_before_until_a_step_is_taken():
    state = RunState(experiment="e", run_id="r", private=True, privacy=view())
    assert state.epsilon == 0.5
    state.add("epsilon", 1, 1.0)
    assert state.epsilon == 1.0
    assert RunState(experiment="e", run_id="r").epsilon is None


def test_a_run_is_finished_only_with_an_outcome():
    state = RunState(experiment="e", run_id="r")
    assert not state.finished
    state.status = "training"
    assert not state.finished
    state.status = "stopped-by-budget"
    assert state.finished


def test_a_panel_can_import_the_state_without_torch():
    code = "import sys, rlhf_audit_nb.capture.state; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
