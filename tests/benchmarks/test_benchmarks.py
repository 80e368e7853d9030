"""The benchmarks run and print what they measured; the trainings that they compare really take turns."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks import planning
from benchmarks.figures import Figure, quantile, table

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_figure_says_whether_its_target_was_met():
    assert Figure("a", 1.0, target=1.05).met is True
    assert Figure("a", 1.1, target=1.05).met is False
    assert Figure("rate", 10, target=20, at_most=False).met is False
    assert Figure("a", 1.0).met is None


def test_the_table_marks_what_was_missed():
    text = table([Figure("step", 1.2, target=1.05), Figure("rate", 123456.0, "entries/s", 1e5, at_most=False)])
    assert "| step | 1.2  | ≤ 1.05 ✗ |" in text
    assert "| rate | 123,456 entries/s | ≥ 100,000 entries/s ✓ |" in text


def test_a_quantile_is_a_value_that_occurred():
    assert [quantile([3, 1, 2], share) for share in (0, 0.5, 0.99, 1)] == [1, 2, 3, 3]


def test_planning_is_measured():
    figures = list(planning.measure(quick=True))
    assert [figure.what[:10] for figure in figures] == ["planning o", *["planning ε"] * 3]
    assert all(figure.value > 0 and figure.target == 3.0 for figure in figures)


@pytest.mark.slow
def test_startup_and_trail_are_measured_in_one_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--only", "trail", "--json", tmp_path / "f.json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    assert all(figure["value"] > 0 for figure in figures)
    assert all(figure["what"] in done.stdout for figure in figures)


@pytest.mark.slow
def test_two_trainings_take_turns_and_a_slower_one_shows(tmp_path):
    from benchmarks import training
    from rlhf_audit_nb import AuditableRLHF, AuditConfig

    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "audit")))
    plain, audited = training._side_by_side(tmp_path, 3, (nullcontext, lambda: auditor.track_training("x")))
    assert len(plain) == len(audited) == 3
    verdict = auditor.verify()
    assert [run.status for run in verdict.runs] == ["completed"]


def test_whoever_waits_for_a_turn_is_let_go_when_the_other_leaves():
    from benchmarks.training import _Baton

    baton = _Baton()
    baton.give(0)
    baton.leave(1)
    began = time.monotonic()
    baton.take(0)
    assert time.monotonic() - began < 1
