"""A sweep: every run a valid record, what is done is not done twice, and what dies is run again or told."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rlhf_audit_nb.cli import main
from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import BudgetExceededError, ConfigError, RecordError
from rlhf_audit_nb.events import (
    PrivacyReserved,
    RecordStarted,
    SlotsReserved,
    SweepFinished,
    SweepStarted,
    decode_body,
)
from rlhf_audit_nb.privacy.accountant import Mechanism, composed_epsilon
from rlhf_audit_nb.privacy.reservation import read_ledger, reserve_slots
from rlhf_audit_nb.records import open_record
from rlhf_audit_nb.sweeping import SweepResult, run_sweep
from rlhf_audit_nb.sweeping import sweep as sweep_module
from rlhf_audit_nb.sweeping.summary import Summary
from rlhf_audit_nb.sweeping.task import working
from rlhf_audit_nb.trail import Level, Trail, TrailReader

ONE = Mechanism(2.0, 0.2, 3)
PATIENCE = 120.0


def grid(folder: Path, text: str) -> Path:
    path = folder / "grid.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def found(trail: Path, kind):
    return [decode_body(entry.type, entry.body) for entry in TrailReader.open(trail).entries(type=kind.TYPE)]


def runs_of(trail: Path, parameters) -> int:
    """How often a notebook with these parameters was begun on a trail."""
    return sum(event.parameters == parameters for event in found(trail, RecordStarted))


def until(happened, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, f"{what} within {PATIENCE:.0f} s"
        time.sleep(0.05)


@pytest.fixture
def _unsummarised(monkeypatch: pytest.MonkeyPatch) -> None:
    """No summary is executed where a test is about something else: it takes as long as three runs."""
    monkeypatch.setattr(sweep_module._Sweep, "_summarised", lambda self, _pool: self.folder / "left out")


@pytest.fixture(scope="module")
def swept(source: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """Eight runs, one of which fails; two at once."""
    folder = tmp_path_factory.mktemp("swept")
    path = grid(folder, "parameters:\n  x: [1, 2, 3, 4]\n  lr: [0.5]\ninclude:\n  - {x: 5}\n  - {x: 6}\n")
    return run_sweep(source, path, folder / "out", trail=folder / "audit", workers=2)


def test_every_run_is_a_record_that_verifies_and_a_failing_one_is_reported_and_sealed(swept: SweepResult) -> None:
    assert (swept.status, swept.runs, swept.outcomes, swept.exit_code) == (
        "finished",
        6,
        {"completed": 5, "failed": 1},
        1,
    )
    for row in swept.rows:
        opened = open_record(swept.folder / f"{row['point']}.ipynb")
        assert opened.verdict.level == Level.UNANCHORED
        assert opened.started is not None
        assert opened.sealed is not None
        assert opened.started.parameters == row["parameters"]
        assert (opened.sealed.record, opened.sealed.digest) == (row["record"], row["digest"])
    (failed,) = [row for row in swept.rows if row["outcome"] == "failed"]
    assert (failed["parameters"]["x"], failed["reason"]) == (3, "ValueError")
    assert "ValueError: three is not taken" in "\n".join(swept.words())


def test_the_trail_tells_of_the_sweep_and_names_every_record(swept: SweepResult) -> None:
    (started,), (finished,) = found(swept.trail, SweepStarted), found(swept.trail, SweepFinished)
    assert started.sweep == finished.sweep == swept.sweep
    assert (started.runs, started.found, started.where, started.private) == (6, 0, "local", False)
    assert started.points == [row["point"] for row in swept.rows]
    assert finished.records == {row["point"]: row["record"] for row in swept.rows}
    assert (finished.status, finished.outcomes) == ("finished", swept.outcomes)
    assert started.notebook_digest == found(swept.trail, RecordStarted)[0].notebook_digest


def test_the_summary_is_a_record_whose_table_comes_from_the_verified_records(
    swept: SweepResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert swept.summary is not None
    opened = open_record(swept.summary)
    assert opened.verdict.level == Level.UNANCHORED
    assert opened.sealed is not None
    assert opened.sealed.status == "completed"
    outputs = [output for cell in opened.notebook.cells for output in cell.get("outputs", [])]
    text = json.dumps(outputs)
    for row in swept.rows:
        assert row["digest"] in text
        assert row["record"] in text
    assert "<table>" in text
    assert any("image/svg+xml" in output.get("data", {}) for output in outputs)
    assert str(swept.folder) not in text

    monkeypatch.setenv("RLHF_AUDIT_TRAIL", str(swept.trail))
    assert [row["digest"] for row in Summary.read(swept.folder, swept.sweep).rows] == [
        row["digest"] for row in swept.rows
    ]
    # A record that was changed, or stands in another's place, makes no table.
    first, second = (row["point"] for row in swept.rows[:2])
    for point in (row["point"] for row in swept.rows):
        (tmp_path / f"{point}.ipynb").write_bytes((swept.folder / f"{point}.ipynb").read_bytes())
    (tmp_path / f"{first}.ipynb").write_bytes((tmp_path / f"{second}.ipynb").read_bytes())
    with pytest.raises(RecordError, match=f"run {first} does not hold: It is another record"):
        Summary.read(tmp_path, swept.sweep)


def test_the_tables_for_programs_say_the_same(swept: SweepResult) -> None:
    with (swept.folder / "sweep.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    whole = json.loads((swept.folder / "sweep.json").read_text(encoding="utf-8"))
    assert [line["digest"] for line in lines] == [row["digest"] for row in whole["points"]]
    assert [line["parameter.x"] for line in lines] == ["1", "2", "3", "4", "5", "6"]
    assert [line["parameter.lr"] for line in lines] == ["0.5"] * 4 + [""] * 2
    assert whole["outcomes"] == swept.outcomes


@pytest.mark.usefixtures("_unsummarised")
def test_running_it_again_does_nothing_and_a_record_that_does_not_hold_is_run_again_and_kept(
    swept: SweepResult, source: Path
) -> None:
    path, trail = swept.folder.parent / "grid.yaml", swept.trail
    size = TrailReader.open(trail).size
    again = run_sweep(source, path, swept.folder, trail=trail, resume=True)
    assert (again.found, again.outcomes, again.sweep) == (6, swept.outcomes, swept.sweep)
    assert TrailReader.open(trail).size == size

    points = [row["point"] for row in swept.rows]
    before = {point: (swept.folder / f"{point}.ipynb").read_bytes() for point in points}
    (swept.folder / f"{points[0]}.ipynb").write_bytes(before[points[0]].replace(b'"0.5\\n"', b'"0.9\\n"'))
    (swept.folder / f"{points[1]}.ipynb").write_bytes(before[points[1]][:2000])
    (swept.folder / f"{points[3]}.ipynb").write_bytes(before[points[4]])
    said: list[str] = []
    mended = run_sweep(source, path, swept.folder, trail=trail, workers=1, progress=said.append)
    assert (mended.found, mended.outcomes) == (3, swept.outcomes)
    assert sum("does not count" in line for line in said) == 3
    assert (swept.folder / "attempts" / f"{points[0]}.rejected-1.ipynb").exists()
    for point in points:
        now = (swept.folder / f"{point}.ipynb").read_bytes()
        assert (now == before[point]) is (point not in {points[0], points[1], points[3]})
        assert open_record(swept.folder / f"{point}.ipynb").verdict.level == Level.UNANCHORED
    assert found(trail, SweepFinished)[-1].records == {row["point"]: row["record"] for row in mended.rows}


@pytest.mark.slow
@pytest.mark.usefixtures("_unsummarised")
def test_a_run_whose_process_is_killed_is_run_again_and_reported_where_that_does_not_help(
    source: Path, tmp_path: Path
) -> None:
    once, never = tmp_path / "once", "always"
    path = grid(tmp_path, f"runs:\n  - {{x: 1, die: {once}}}\n  - {{x: 2, die: {never}}}\n")
    said: list[str] = []
    result = run_sweep(
        source, path, tmp_path / "out", trail=tmp_path / "audit", workers=1, retries=1, progress=said.append
    )
    assert result.outcomes == {"completed": 1, "died": 1}
    asked = ({"x": 1, "die": str(once)}, {"x": 2, "die": str(never)})
    assert [runs_of(tmp_path / "audit", parameters) for parameters in asked] == [2, 2]
    assert result.rows[1] == {"point": result.rows[1]["point"], "outcome": "died"}
    assert "ended by signal SIGKILL" in "\n".join(result.words())
    assert sum("it is run again" in line for line in said) == 2


def command(source: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    words = ["sweep", source, "--grid", folder / "grid.yaml", "-o", folder / "out", "--trail", folder / "audit"]
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_audit_nb.cli", *map(str, words), *more], stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.usefixtures("_unsummarised")
def test_a_sweep_that_is_killed_goes_on_where_it_was_and_ctrl_c_seals_what_runs(source: Path, tmp_path: Path) -> None:
    waits = tmp_path / "waits"
    grid(tmp_path, f"runs:\n  - {{x: 1}}\n  - {{x: 2, wait: {waits}}}\n  - {{x: 4}}\n")
    out, trail = tmp_path / "out", tmp_path / "audit"

    # Ctrl-C: what runs is sealed as it stands, and the exit code says so.
    first = command(source, tmp_path, "--workers", "1")
    until(waits.exists, "the second run begins")
    first.send_signal(signal.SIGINT)
    assert "interrupted" in first.communicate(timeout=PATIENCE)[1]
    assert first.returncode == 130
    assert found(trail, SweepFinished)[-1].outcomes == {"completed": 1, "missing": 2}
    (cut,) = (out / "attempts").glob("*.1.ipynb")
    opened = open_record(cut)
    assert opened.verdict.level == Level.UNANCHORED
    assert opened.sealed is not None
    assert opened.sealed.status == "aborted"

    # SIGKILL: its worker goes on with the run that it has; who comes next would wait for it. It is killed as well.
    waits.unlink()
    second = command(source, tmp_path, "--workers", "1", "--resume")
    until(waits.exists, "the second run begins again")
    workers = psutil.Process(second.pid).children()
    second.kill()
    second.communicate(timeout=PATIENCE)
    with working(out, alone=True, wait=False) as free:
        assert not free
    assert len(workers) == 1
    workers[0].kill()

    done = run_sweep(source, tmp_path / "grid.yaml", out, trail=trail, workers=1, resume=True)
    assert (done.outcomes, done.found) == ({"completed": 3}, 1)
    assert [runs_of(trail, {"x": x}) for x in (1, 4)] == [1, 1]


# -- the budget ---------------------------------------------------------------------------------------------------

EACH = "each: {noise_multiplier: 2.0, sampling_rate: 0.2, steps: 3, loss_noise: null}"


def priced(count: int) -> float:
    return composed_epsilon([ONE.with_steps(count * ONE.steps)], 1e-5) * 1.0001


def private_grid(folder: Path, runs: str, epsilon: float) -> Path:
    return grid(folder, f"{runs}\nprivacy: {{epsilon: {epsilon}, unit: pair, {EACH}}}\n")


def test_runs_that_do_not_fit_together_are_refused_before_any_is_started(
    private: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = private_grid(tmp_path, "parameters:\n  seed: [1, 2, 3, 4]", priced(3))
    with pytest.raises(BudgetExceededError, match="The 4 runs of the sweep do not fit"):
        run_sweep(private, path, tmp_path / "out", trail=tmp_path / "audit")
    assert TrailReader.open(tmp_path / "audit").size == 1
    words = ["sweep", private, "--grid", path, "-o", tmp_path / "out", "--trail", tmp_path / "audit", "--json"]
    assert main([str(word) for word in words]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "sweep-budget"


@pytest.mark.slow
@pytest.mark.usefixtures("_unsummarised")
def test_what_runs_that_died_had_reserved_counts_and_a_run_that_asks_for_more_than_its_place_is_refused(
    private: Path, tmp_path: Path
) -> None:
    budget, trail = priced(4), tmp_path / "audit"
    runs = (
        f"runs:\n  - {{seed: 1, budget: {budget}, die: '{tmp_path / 'first'}'}}\n"
        f"  - {{seed: 2, budget: {budget}, die: '{tmp_path / 'second'}'}}\n"
        f"  - {{seed: 3, budget: {budget}, sigma: 1.9}}\n"
    )
    path = private_grid(tmp_path, runs, budget)
    result = run_sweep(private, path, tmp_path / "out", trail=trail, workers=1)
    # Two died, which counts; there was room for one more attempt besides what the third one held and did not use.
    assert [row["outcome"] for row in result.rows] == ["completed", "not-affordable", "refused"]
    said = "\n".join(result.words())
    assert "had reserved what it may spend, which counts" in said
    assert "may spend 3 steps at noise multiplier 2" in said
    held = found(trail, SlotsReserved)
    assert [len(group["ids"]) for event in held for group in event.slots] == [3, 1]
    reserved = found(trail, PrivacyReserved)
    assert len({event.slot for event in reserved} - {None}) == len(reserved) == 3
    ran = [Mechanism(event.noise_multiplier, event.sampling_rate, event.steps) for event in reserved]
    ledger = read_ledger(TrailReader.open(trail))
    assert not ledger.slots
    assert ledger.spent(1e-5)[1] == composed_epsilon(ran, 1e-5) <= budget
    assert result.rows[0]["epsilon"] == pytest.approx(composed_epsilon([ONE], 1e-5))


def test_what_a_sweep_that_was_killed_still_holds_is_given_back_on_request(
    private: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "attempts").mkdir(parents=True)
    (tmp_path / "out" / "attempts" / "sweep.id").write_text("b" * 32)
    settings = PrivacyConfig(epsilon=priced(3), unit="pair")
    with Trail.open(tmp_path / "audit") as trail:
        for sweep, names in (("b" * 32, ("1" * 16, "2" * 16)), ("c" * 32, ("3" * 16,))):
            reserve_slots(trail, sweep, [(name, ONE) for name in names], settings)
    words = ["sweep", private, "--grid", tmp_path / "grid.yaml", "-o", tmp_path / "out", "--trail", tmp_path / "audit"]
    assert main([*map(str, words), "--release", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"released": 2}
    assert [slot.id for slot in read_ledger(TrailReader.open(tmp_path / "audit")).slots] == ["3" * 16]


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"workers": 0}, "workers is 0"), ({"retries": -1}, "retries is -1"), ({"resume": True}, "There is no sweep in")],
)
def test_settings_that_cannot_be_are_refused(source: Path, tmp_path: Path, settings, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_sweep(source, grid(tmp_path, "runs:\n  - {x: 1}"), tmp_path / "out", trail=tmp_path / "audit", **settings)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "audit").exists()


def test_a_folder_of_something_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"):
        run_sweep(source, grid(tmp_path, "runs:\n  - {x: 1}"), tmp_path / "out", trail=tmp_path / "audit")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_runs_of_a_changed_notebook_do_not_go_into_the_same_folder(
    swept: SweepResult, source: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "in.ipynb"
    changed.write_text(source.read_text().replace("print(x * lr)", "print(x + lr)"))
    with pytest.raises(ConfigError, match="record of another notebook"):
        run_sweep(changed, swept.folder.parent / "grid.yaml", swept.folder, trail=swept.trail)


def test_what_was_left_is_told_with_how_to_go_on(tmp_path: Path) -> None:
    rows = ({"point": "a", "outcome": "completed"}, {"point": "b", "outcome": "missing"})
    cut = SweepResult(
        folder=tmp_path,
        sweep="s",
        status="interrupted",
        runs=2,
        outcomes={"completed": 1, "missing": 1},
        rows=rows,
        found=0,
        seconds=1.0,
        trail=tmp_path,
    )
    assert cut.words()[-2:] == ["  b  missing", "go on    with the same command: it does what is missing"]
    assert "go on" not in "\n".join(replace(cut, outcomes={"completed": 2}, rows=rows[:1]).words())
