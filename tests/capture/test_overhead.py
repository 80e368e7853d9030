"""The recorder's own time: counted once, on the training thread alone, kept in bounds, and private where the run is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny import dpo_trainer, reward_trainer, synthetic_pairs
from support.trails import events, without_cross_checks

from rlhf_audit_nb import AuditableRLHF
from rlhf_audit_nb.capture import attach
from rlhf_audit_nb.capture.overhead import PARTS, STEP_PARTS, Histogram, Overhead, read_overhead
from rlhf_audit_nb.capture.run import Run
from rlhf_audit_nb.capture.weights_path import WeightsPath
from rlhf_audit_nb.config import AuditConfig, PrivacyConfig
from rlhf_audit_nb.errors import DataError
from rlhf_audit_nb.events import RunFinished, RunFinishedPrivate, RunStarted, encode_body, encode_private
from rlhf_audit_nb.trail import Trail


class Clock:
    """A clock that goes on only when it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", made)
    return made


def train(overhead: Overhead, clock: Clock, steps: int) -> None:
    with overhead.training():
        with overhead.part("inputs"):
            clock.work(1.0)
        for _ in range(steps):
            overhead.step_begins()
            clock.work(0.090)
            with overhead.part("recorder"):
                clock.work(0.002)
                with overhead.part("device"):
                    clock.work(0.007)
                clock.work(0.001)


def test_each_second_is_counted_once_and_to_the_innermost_part(clock: Clock) -> None:
    overhead = Overhead()
    train(overhead, clock, steps=10)
    found = overhead.to_dict()
    assert found is not None
    assert (found["steps"], found["seconds"]) == (10, 2.0)
    assert found["parts"]["recorder"]["share"] == pytest.approx(0.015)
    assert found["parts"]["device"]["share"] == found["waiting"] == pytest.approx(0.035)
    assert found["parts"]["inputs"] == {"share": 0.5}
    assert found["share"] == pytest.approx(0.55)


def test_a_step_has_its_quantiles_and_those_of_what_is_ours(clock: Clock) -> None:
    overhead = Overhead()
    train(overhead, clock, steps=10)
    found = overhead.to_dict() or {}
    assert found["step_ms"]["p50"] == pytest.approx(100, rel=0.05)
    assert found["recording_us"] == {"p50": pytest.approx(10_000, rel=0.05), "p99": pytest.approx(10_000, rel=0.05)}
    assert found["parts"]["recorder"]["p99"] == pytest.approx(3_000, rel=0.05)


def test_a_rare_dear_step_shows_in_the_high_quantile_alone() -> None:
    times = Histogram()
    for _ in range(980):
        times.add(0.001)
    for _ in range(20):
        times.add(0.5)
    assert times.quantile(0.5) == pytest.approx(0.001, rel=0.05)
    assert times.quantile(0.99) == pytest.approx(0.5, rel=0.05)
    assert times.total == pytest.approx(0.98 + 10)


def test_a_histogram_does_not_grow_with_the_steps() -> None:
    few, many = Histogram(), Histogram()
    for step in range(100_000):
        seconds = 1e-5 * (1 + step % 97)
        many.add(seconds)
        if step < 97:
            few.add(seconds)
    assert len(many._buckets) == len(few._buckets) < 200


def test_nothing_is_told_where_nothing_was_trained() -> None:
    overhead = Overhead()
    overhead.step_begins()
    with overhead.part("recorder"):
        pass
    assert overhead.to_dict() is None


def test_another_thread_is_not_counted_to_the_training(clock: Clock) -> None:
    overhead = Overhead()

    def elsewhere() -> None:
        with overhead.part("recorder"):
            clock.work(50.0)

    with overhead.training():
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
    assert (overhead.to_dict() or {})["parts"] == {}


def test_a_part_that_fails_is_closed(clock: Clock) -> None:
    overhead = Overhead()
    with overhead.training():
        with pytest.raises(ValueError), overhead.part("checkpoints"):
            clock.work(1.0)
            raise ValueError
        clock.work(1.0)
    assert (overhead.to_dict() or {})["parts"] == {"checkpoints": {"share": 0.5}}


def test_reading_the_clock_costs_microseconds() -> None:
    overhead = Overhead()
    best = float("inf")
    with overhead.training():
        part = overhead.part("recorder")
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(2_000):
                with part:
                    pass
            best = min(best, (time.perf_counter() - began) / 2_000)
    assert best < 20e-6


# --- a real training -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Trail, Run]]:
    """Four steps, of which every second has a digest of the weights; hashing them is made to take 20 ms."""
    folder = tmp_path_factory.mktemp("overhead")
    trainer = dpo_trainer(synthetic_pairs(4), folder / "out", max_steps=4)
    with pytest.MonkeyPatch.context() as patch, Trail.open(folder / "audit") as trail:
        link = WeightsPath.link

        def slow(path: WeightsPath) -> Any:
            time.sleep(0.02)
            return link(path)

        patch.setattr(WeightsPath, "link", slow)
        with Run(trail, "measured", audit=AuditConfig(weights_every=2)) as run:
            trainer.train()
        yield trail, run


def test_a_run_says_what_recording_cost_it(trained: tuple[Trail, Run]) -> None:
    trail, _ = trained
    (finished,) = events(trail, RunFinished)
    found = finished.overhead
    assert found["steps"] == 4
    assert set(found["parts"]) <= set(PARTS)
    assert {"recorder", "update norm", "weights digest", "panel", "inputs"} <= set(found["parts"])
    assert found["parts"]["weights digest"]["share"] * found["seconds"] * 1.001 >= 0.02 * 2
    assert found["parts"]["weights digest"]["p50"] >= 20_000
    assert 0 < found["share"] < 1
    assert found["recording_us"]["p99"] >= found["recording_us"]["p50"] > 0


def test_the_last_runs_overhead_is_found_and_told(trained: tuple[Trail, Run]) -> None:
    trail, run = trained
    found = read_overhead(trail.reader(), trail.vault.half)
    assert (found.run, found.experiment, found.private) == (run.id, "measured", False)
    assert "weights digest" in str(found)
    assert "measured: recording took" in str(found)
    assert "weights digest" in found._repr_html_()
    assert read_overhead(trail.reader(), trail.vault.half, run.id[:8]) == found


def test_a_trail_without_a_training_says_so(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        with Run(trail, "nothing"):
            pass
        with pytest.raises(DataError, match="none was closed after a training"):
            read_overhead(trail.reader(), trail.vault.half)


class Pretending:
    """Stands for a privatiser in a run in which nothing is trained."""

    def quiet(self) -> Any:
        from contextlib import nullcontext

        return nullcontext()


def test_a_private_runs_figures_lie_in_the_vault_alone(tmp_path: Path, clock: Clock) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        with Run(trail, "private", privatiser=Pretending()) as run:  # type: ignore[arg-type]
            train(run.overhead, clock, steps=3)
        (finished,) = events(trail, RunFinished, run.id)
        assert finished.overhead is None
        found = read_overhead(trail.reader(), trail.vault.half)
        assert found.private
        assert found.figures["steps"] == 3
        assert "keep them to yourself" in str(found)


def test_what_is_digested_before_a_private_training_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = attach.describe_model

    def slowly(*args: Any, **more: Any) -> Any:
        time.sleep(0.5)
        return describe(*args, **more)

    monkeypatch.setattr(attach, "describe_model", slowly)
    audit = AuditConfig(trail=str(tmp_path / "audit"))
    config = PrivacyConfig(epsilon=8.0, sampling_rate=0.5, noise_multiplier=2.0)
    held = AuditableRLHF(privacy_config=config, audit_config=audit)
    with without_cross_checks(), held.track_training("private"):
        reward_trainer(synthetic_pairs(8), tmp_path / "out", max_steps=1).train()
    found = held.overhead().figures
    assert found["parts"]["inputs"]["share"] * found["seconds"] >= 1.0  # before and after


def test_two_private_runs_that_took_other_times_leave_the_same_in_the_open(tmp_path: Path, clock: Clock) -> None:
    bodies = []
    with Trail.open(tmp_path / "audit") as trail:
        for steps in (3, 30):
            with Run(trail, "private", privatiser=Pretending()) as run:  # type: ignore[arg-type]
                train(run.overhead, clock, steps)
            bodies += [entry.body for entry in trail.reader().entries(type=RunFinished.TYPE, run=run.id)]
    assert bodies[0] == bodies[1]


def test_a_run_that_an_earlier_version_closed_is_read(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        body = encode_body(RunStarted(experiment="old", entry_point="cell", tool="rlhf-audit-trail/0.1.0"))
        trail.append(RunStarted.TYPE, body, run="r")
        trail.append(RunFinished.TYPE, b'{"status":"completed","steps":3,"trained":true,"reason":null}', run="r")
        half = encode_private(RunFinishedPrivate(overhead={}))
        assert half == b'{"overhead":{}}'
        assert events(trail, RunFinished)[0].overhead is None
        with pytest.raises(DataError):
            read_overhead(trail.reader(), trail.vault.half)


def test_every_part_is_told_of() -> None:
    assert set(STEP_PARTS) < set(PARTS)
    assert all(PARTS.values())
