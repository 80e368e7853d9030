"""The benchmarks run and print what they measured; the trainings that they compare really take turns."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks import capture, planning
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
def test_three_trainings_take_turns_and_one_of_them_is_recorded(tmp_path):
    from benchmarks import training
    from rlhf_audit_nb import AuditableRLHF, AuditConfig

    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "audit")))
    plain = lambda _: nullcontext()  # noqa: E731
    taken = training._in_turns(tmp_path, 2, (plain, plain, lambda _: auditor.track_training("x")))
    assert [len(rounds) for rounds in taken] == [2, 2, 2]
    assert all(seconds > 0 and cpu > 0 for rounds in taken for seconds, cpu in rounds)
    verdict = auditor.verify()
    assert [run.status for run in verdict.runs] == ["completed"] * 2


def test_what_a_killed_process_lost_and_what_it_held_is_measured(tmp_path):
    lost_ms, lost = capture._kill_once(tmp_path, 0.2)
    assert 0 <= lost_ms < 1000
    assert 0 <= lost < 1000


def test_a_peer_that_is_not_installed_is_left_out_with_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(capture.ENV_PEERS, sys.executable)
    found = list(capture._peers(tmp_path, 10))
    said = capsys.readouterr().err
    assert len(found) == 4 * (len(capture.PEERS) - said.count("left out: "))
    assert said.count("left out: ") == said.count("No module named")
