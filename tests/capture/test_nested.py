"""Runs inside runs and beside each other: what is recorded goes to the one that is meant, and nothing is mixed."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import threading
import warnings
from contextlib import nullcontext

import pytest
from support.loops import run_loop
from support.tiny import dpo_trainer, synthetic_pairs
from support.trails import events

from rlhf_audit_nb import AuditableRLHF, AuditConfig
from rlhf_audit_nb.capture.run import COARSE_US, AuditWarning, Run, current_run
from rlhf_audit_nb.capture.telemetry import TELEMETRY, no_telemetry
from rlhf_audit_nb.errors import RunError, UnsupportedTrainerError
from rlhf_audit_nb.events import FailurePrivate, MetricsLogged, RunFailure, RunFinished, RunStarted, Step, decode_body
from rlhf_audit_nb.privacy.quiet import quiet_preparation
from rlhf_audit_nb.trail import Level, Trail, TrailReader, verify_trail

PAIRS = synthetic_pairs(6)


class Protects:
    """A privatiser that plans nothing: enough for a run to be private."""

    def quiet(self):
        return nullcontext()

    def inherit(self, trainer):
        raise AssertionError(trainer)

    def plan(self, trainer, *, done=0):
        raise UnsupportedTrainerError("not in this test")


@pytest.fixture
def trail(tmp_path):
    with Trail.open(tmp_path / "audit") as opened:
        yield opened


def started(trail):
    """The runs' parents, by experiment; parents named by their experiments too."""
    reader = trail.reader()
    ids = {entry.run: entry for entry in reader.entries(type=RunStarted.TYPE)}
    named = dict(zip(ids, events(trail, RunStarted), strict=True))
    return {event.experiment: named[event.parent].experiment if event.parent else None for event in named.values()}


def steps(trail, run):
    return [step.step for step in events(trail, Step, run.id)]


def in_threads(*works):
    """Each in a thread with a context of its own; raises what one of them raised."""
    failed: list[BaseException] = []

    def guarded(work):
        try:
            contextvars.Context().run(work)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    if failed:
        raise failed[0]


# --- inside ----------------------------------------------------------------------------------------------------------


def test_a_run_inside_a_run_is_its_child_and_the_outer_one_goes_on_after_it(trail, tmp_path):
    with Run(trail, "outer") as outer:
        dpo_trainer(PAIRS, tmp_path / "a", max_steps=1).train()
        with Run(trail, "inner") as inner:
            assert current_run() is inner
            dpo_trainer(PAIRS, tmp_path / "b", max_steps=2).train()
        assert current_run() is outer
        dpo_trainer(PAIRS, tmp_path / "c", max_steps=3).train()
    assert current_run() is None
    assert started(trail) == {"outer": None, "inner": "outer"}
    assert steps(trail, outer) == [1, 1, 2, 3]
    assert steps(trail, inner) == [1, 2]
    assert [event.steps for event in events(trail, RunFinished)] == [2, 4]
    assert verify_trail(trail.location).level.name == "UNANCHORED"


def test_a_run_that_is_closed_before_its_child_leaves_the_child_open(trail):
    outer, inner = Run(trail, "outer"), Run(trail, "inner")
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert current_run() is inner
    inner.__exit__(None, None, None)
    assert current_run() is None
    with Run(trail, "later") as later:
        assert later.outer is None


def test_a_failure_that_passes_through_two_runs_stands_in_both(trail):
    with pytest.raises(LookupError), Run(trail, "outer"), Run(trail, "inner"):
        raise LookupError
    assert [event.status for event in events(trail, RunFinished)] == ["failed", "failed"]
    assert [event.kind for event in events(trail, RunFailure)] == ["LookupError", "LookupError"]


def test_a_failure_that_the_outer_run_survives_does_not_mark_it(trail):
    with Run(trail, "outer"), pytest.raises(LookupError), Run(trail, "inner"):
        raise LookupError
    assert [event.status for event in events(trail, RunFinished)] == ["failed", "completed"]


def test_a_run_on_another_trail_names_no_parent_that_this_trail_does_not_have(trail, tmp_path):
    with Run(trail, "here"), Trail.open(tmp_path / "other") as other, Run(other, "there") as inner:
        assert inner.outer is not None
    with Trail.open(tmp_path / "other") as other:
        assert started(other) == {"there": None}


def test_a_run_inside_a_trainings_callback_does_not_take_that_trainings_steps(trail, tmp_path):
    from transformers import TrainerCallback

    class OpensARun(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.run = Run(trail, "inner").__enter__()

        def on_train_end(self, args, state, control, **kwargs):
            self.run.__exit__(None, None, None)

    trainer, opens = dpo_trainer(PAIRS, tmp_path / "a", max_steps=2), OpensARun()
    trainer.add_callback(opens)
    with warnings.catch_warnings(), Run(trail, "outer") as outer:
        warnings.simplefilter("error", AuditWarning)
        trainer.train()
    assert steps(trail, outer) == [1, 2]
    assert steps(trail, opens.run) == []


# --- privacy ---------------------------------------------------------------------------------------------------------


def test_a_run_without_privacy_inside_a_private_one_is_refused_and_writes_nothing(trail):
    with Run(trail, "private", privatiser=Protects()) as outer:
        size = trail.reader().size
        with pytest.raises(RunError, match="'private', which is open here, is private") as refused:
            Run(trail, "open").__enter__()
        assert refused.value.reason == "unprotected-inside"
        assert current_run() is outer
        assert trail.reader().size == size


def test_also_in_a_thread_that_was_started_inside_it(trail):
    with (
        Run(trail, "private", privatiser=Protects()),
        pytest.raises(RunError, match="is private"),
    ):
        in_threads(lambda: Run(trail, "open").__enter__())


def test_a_private_run_inside_another_one_is_its_child_whatever_that_is(trail):
    with Run(trail, "open"), Run(trail, "private", privatiser=Protects()), Run(trail, "in", privatiser=Protects()):
        pass
    assert started(trail) == {"open": None, "private": "open", "in": "private"}


def test_what_went_wrong_in_a_private_child_is_not_told_by_the_run_around_it(trail):
    def fails(**more):
        with pytest.raises(LookupError), Run(trail, "outer"), Run(trail, "inner", **more):
            raise LookupError("the row of person-3")

    fails(privatiser=Protects())
    assert [event.frames for event in events(trail, RunFailure)] == [[], []]
    fails()
    assert all(event.frames for event in events(trail, RunFailure)[2:])
    assert not any(b"person-3" in entry.data for entry in trail.reader().entries())
    assert FailurePrivate(message="x").frames == []


def test_what_a_private_child_does_is_not_told_by_hand_to_the_run_around_it(trail):
    with Run(trail, "outer") as outer:
        with Run(trail, "inner", privatiser=Protects()):
            for tell in (outer.log_metrics, outer.step):
                with pytest.raises(UnsupportedTrainerError, match="the run 'inner', open here, is under"):
                    tell({"loss": 0.5})
            with pytest.raises(UnsupportedTrainerError):
                outer.bind_data([{"a": 1}])
        outer.log_metrics({"loss": 0.25})
    assert [event.metrics for event in events(trail, MetricsLogged)] == [{"loss": 0.25}]
    assert not events(trail, Step)


def test_how_long_a_private_child_takes_is_not_told_by_the_run_around_it_on_another_trail(trail, tmp_path):
    with Trail.open(tmp_path / "other") as other:
        with Run(other, "outer") as outer:
            outer.record(Step(step=1))
            with Run(trail, "inner", privatiser=Protects()):
                pass
            outer.record(Step(step=2))
        other.flush()
        assert verify_trail(other.location).level is Level.UNANCHORED
        *_, before, step, finished = list(other.reader().entries(run=outer.id))
    # Whole minutes, or no later than what was told before: times never run back.
    assert all(entry.time == before.time or not entry.time % COARSE_US for entry in (step, finished))


def test_nor_by_the_times_of_a_training_in_whose_callback_it_was_opened(trail, monkeypatch):
    with Run(trail, "outer") as outer, Run(trail, "inner", privatiser=Protects()):
        monkeypatch.setattr(outer.overhead, "to_dict", lambda: {"seconds": 12.3})
    assert [event.overhead for event in events(trail, RunFinished)] == [None, None]
    assert b"12.3" not in b"".join(entry.data for entry in trail.reader().entries())


def test_an_evaluation_inside_a_private_run_is_sealed_on_whatever_trail(trail, tmp_path):
    beside = AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "beside")))
    with Run(trail, "private", privatiser=Protects()):
        assert beside.log_evaluation({"accuracy": 0.5}, model="ab" * 32, data=[{"a": 1}]).sealed
    assert not beside.log_evaluation({"accuracy": 0.5}, model="ab" * 32, data=[{"a": 1}]).sealed


# --- beside ----------------------------------------------------------------------------------------------------------


def test_runs_in_threads_are_not_mixed(trail, tmp_path):
    """Each finds its own run, and trains in it while the other does."""
    runs, both = {}, threading.Barrier(2, timeout=60)

    def work(name, count):
        trainer = dpo_trainer(PAIRS, tmp_path / name, max_steps=count)

        def trains():
            with Run(trail, name) as run:
                runs[name] = run
                both.wait()
                trainer.train()
                both.wait()
                assert current_run() is run

        return trains

    in_threads(work("a", 2), work("b", 3))
    assert started(trail) == {"a": None, "b": None}
    assert (steps(trail, runs["a"]), steps(trail, runs["b"])) == ([1, 2], [1, 2, 3])
    assert {event.steps for event in events(trail, RunFinished)} == {2, 3}


def test_runs_in_threads_inside_a_run_are_its_children(trail):
    both = threading.Barrier(2, timeout=60)

    def work(name):
        with Run(trail, name) as run:
            both.wait()
            assert current_run() is run
            both.wait()

    with Run(trail, "outer") as outer:
        in_threads(lambda: work("a"), lambda: work("b"))
        assert current_run() is outer
    assert started(trail) == {"outer": None, "a": "outer", "b": "outer"}


def test_a_thread_started_inside_nested_runs_belongs_to_the_innermost(trail):
    found = []
    with Run(trail, "outer"), Run(trail, "inner") as inner:
        in_threads(lambda: found.append(current_run()))
    assert found == [inner]


def test_a_thread_belongs_to_the_run_of_whoever_started_it(trail):
    """Whatever else is open in the process at that time."""
    opened, close, found = threading.Event(), threading.Event(), []

    def beside():
        with Run(trail, "beside"):
            opened.set()
            assert close.wait(60)

    def elsewhere():
        in_threads(lambda: found.append(current_run()))

    older = threading.Thread(target=beside)
    older.start()
    assert opened.wait(60)
    elsewhere()
    with Run(trail, "here") as run:
        elsewhere()
    close.set()
    older.join(60)
    assert found == [None, run]
    assert started(trail) == {"beside": None, "here": None}


def test_starting_threads_is_as_it_was_afterwards(trail):
    before = threading.Thread.start
    with Run(trail, "a"), Run(trail, "b"):
        assert threading.Thread.start is not before
    assert threading.Thread.start is before


def test_runs_in_asyncio_tasks_are_not_mixed(trail):
    async def task(name):
        with Run(trail, name) as run:
            for number in range(1, 4):
                await asyncio.sleep(0)
                assert current_run() is run
                current_run().record(Step(step=number, notes=[name]))
        return run

    async def both():
        return await asyncio.gather(task("a"), task("b"))

    async def inside():
        with Run(trail, "outer") as outer:
            found = await asyncio.gather(task("c"), task("d"))
            assert current_run() is outer
        return found

    for run in [*run_loop(both()), *run_loop(inside())]:
        assert [step.notes for step in events(trail, Step, run.id)] == [[run.experiment]] * 3
    assert started(trail) == {"a": None, "b": None, "outer": None, "c": "outer", "d": "outer"}


PROCESS = """
import os, sys, time
from rlhf_audit_nb import AuditableRLHF, AuditConfig
from rlhf_audit_nb.events import Step
auditor = AuditableRLHF(audit_config=AuditConfig(trail=sys.argv[1]))
name = sys.stdin.readline()
with auditor.track_training(name) as run:
    print("open", flush=True)
    while not os.path.exists(sys.argv[1] + "/../go"):
        time.sleep(0.01)
    for number in range(1, 101):
        run.record(Step(step=number, notes=[name]))
"""


def test_runs_in_processes_on_one_trail_are_not_mixed(zygote, tmp_path):
    folder = tmp_path / "audit"
    Trail.open(folder).close()
    children = [zygote.start(PROCESS, folder, said=name) for name in ("a", "b")]
    for child in children:
        child.until("open")
    (tmp_path / "go").touch()
    assert [child.wait() for child in children] == [0, 0]
    verdict = verify_trail(folder)
    assert [(run.status, run.entries) for run in verdict.runs] == [("completed", 103)] * 2
    reader = TrailReader.open(folder)
    for run in verdict.runs:
        notes = [decode_body(entry.type, entry.body).notes for entry in reader.entries(run=run.run, type=Step.TYPE)]
        assert len(notes) == 100
        assert notes == [notes[0]] * 100


# --- a fork ----------------------------------------------------------------------------------------------------------


def in_child(work):
    """The status of a forked child that does ``work`` and ends as a script does, with its `atexit` functions."""
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            work()
            code = 0
        finally:
            from rlhf_audit_nb.trail import ending

            ending._close_all()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_does_not_close_its_parents_run(trail):
    with Run(trail, "forks") as run:
        assert in_child(lambda: run.__exit__(None, None, None)) == 0
        assert in_child(lambda: None) == 0
        assert events(trail, RunFinished) == []
        run.record(Step(step=1))
    assert [event.status for event in events(trail, RunFinished)] == ["completed"]
    assert [entry.type for entry in trail.reader().entries(run=run.id)][-1] == "run.finished"


def test_a_run_that_a_forked_child_opens_is_a_child_of_its_parents(trail):
    def opens():
        with Run(trail, "child") as run:
            run.record(Step(step=7))

    with Run(trail, "parent") as run:
        assert in_child(opens) == 0
        run.record(Step(step=1))
    assert started(trail) == {"parent": None, "child": "parent"}
    assert steps(trail, run) == [1]


# --- what is changed in the process ----------------------------------------------------------------------------------


def test_what_is_quiet_stays_quiet_until_the_last_private_run_is_closed():
    factory, show = logging.getLogRecordFactory(), warnings.showwarning
    first, second = quiet_preparation(), quiet_preparation()
    first.__enter__()
    hushed = logging.getLogRecordFactory()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logging.getLogRecordFactory() is hushed is not factory
    second.__exit__(None, None, None)
    assert (logging.getLogRecordFactory(), warnings.showwarning) == (factory, show)


def test_telemetry_stays_off_until_the_last_run_is_closed(monkeypatch):
    monkeypatch.delenv(TELEMETRY, raising=False)
    first, second = no_telemetry(), no_telemetry()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert os.environ[TELEMETRY] == "1"
    second.__exit__(None, None, None)
    assert TELEMETRY not in os.environ
