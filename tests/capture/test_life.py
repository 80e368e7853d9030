"""However a run comes to its end, the trail says so: each end is produced for real, most of them in a process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from support.loops import run_loop
from support.trails import events, private_half

from rlhf_audit_nb.capture.life import FIRST_FRAMES, LAST_FRAMES
from rlhf_audit_nb.capture.run import Run
from rlhf_audit_nb.errors import RunError
from rlhf_audit_nb.events import RunFailure, RunFinished, RunInterrupted, RunStarted, Step, decode_body
from rlhf_audit_nb.trail import Level, Trail, TrailReader, verify_trail

ROOT = Path(__file__).parents[2]

OPENED = """
import atexit, os, signal, sys, time
from rlhf_audit_nb import AuditableRLHF, AuditConfig
from rlhf_audit_nb.events import Step
auditor = AuditableRLHF(audit_config=AuditConfig(trail=sys.argv[1]))
def opened():
    return auditor.track_training("ends")
"""


@pytest.fixture
def end_of(zygote, folder):
    """How a process with the script ends, and its runs as the trail tells them: see `told`."""

    def ends(script, sent=None):
        child = zygote.start(OPENED + script, folder)
        if sent is not None:
            child.until("ready")
            os.kill(child.pid, sent)
        return child.wait(), child.err, told(folder)

    return ends


def told(folder):
    reader = TrailReader.open(folder)
    finished = [decode_body(entry.type, entry.body) for entry in reader.entries(type=RunFinished.TYPE)]
    failures = [decode_body(entry.type, entry.body) for entry in reader.entries(type=RunFailure.TYPE)]
    assert verify_trail(folder).level is Level.UNANCHORED
    return [(event.status, event.reason) for event in finished], [event.category for event in failures]


@pytest.fixture
def folder(tmp_path):
    Trail.open(tmp_path / "audit").close()
    return tmp_path / "audit"


@pytest.fixture
def trail(folder):
    with Trail.open(folder) as opened:
        yield opened


# --- the ends of a process -------------------------------------------------------------------------------------------

WAITS = "with opened() as run:\n    run.record(Step(step=1))\n    print('ready', flush=True)\n    time.sleep(60)\n"
DURABLE = WAITS.replace("print", "run.trail.flush()\n    print")
STEPS = """
with opened() as run:
    print("ready", flush=True)
    for number in range(1, 10**9):
        run.record(Step(step=number))
"""


@pytest.mark.parametrize("script", [WAITS, STEPS], ids=["waiting", "recording"])
def test_sigterm_closes_the_run_and_the_process_dies_of_it(end_of, folder, script):
    code, said, found = end_of(script, signal.SIGTERM)
    assert (code, said) == (-signal.SIGTERM, "")
    assert found == ([("interrupted", "SIGTERM")], [])
    assert list(TrailReader.open(folder).entries())[-1].type == RunFinished.TYPE


def test_sigint_is_recorded_as_an_interrupt_with_the_place(end_of):
    code, said, found = end_of(WAITS, signal.SIGINT)
    assert "KeyboardInterrupt" in said
    assert code != 0
    assert found == ([("interrupted", "KeyboardInterrupt")], ["interrupt"])


def test_after_sigkill_the_next_opening_says_interrupted(end_of, folder):
    code, _, found = end_of(DURABLE, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert found == ([], [])
    with Trail.open(folder) as trail:
        (started,) = trail.reader().entries(type=RunStarted.TYPE)
        (event,) = events(trail, RunInterrupted)
        assert event.run == started.run
        assert [run.run for run in trail.recovery.interrupted] == [started.run]
    assert verify_trail(folder).runs[-1].status == "interrupted"


ENDS = {
    "a run left open": ("run = opened().__enter__()", 0, ("interrupted", "interpreter-exit"), []),
    "what is recorded after the end": (
        "atexit.register(lambda: print('kept'))\nrun = opened().__enter__()\n",
        0,
        ("interrupted", "interpreter-exit"),
        [],
    ),
    "a generator left open": (
        "def trains():\n    with opened():\n        yield\n        yield\nrunning = trains()\nnext(running)\n",
        0,
        ("interrupted", None),
        None,
    ),
    "sys.exit()": ("with opened():\n    sys.exit()", 0, ("interrupted", "SystemExit"), ["exit"]),
    "sys.exit(3)": ("with opened():\n    sys.exit(3)", 3, ("failed", "SystemExit"), ["exit"]),
}


@pytest.mark.parametrize("case", ENDS)
def test_the_interpreters_end_closes_what_is_open(end_of, case):
    script, status, (outcome, reason), categories = ENDS[case]
    code, said, (finished, failures) = end_of(script)
    assert (code, said) == (status, "")
    assert [event[0] for event in finished] == [outcome]
    assert reason in (None, finished[0][1])
    assert categories in (None, failures)


# --- the ends of a block ---------------------------------------------------------------------------------------------


def ended(trail, work):
    """The failure of a run whose block did ``work``: its events, and its private half."""
    with pytest.raises(BaseException) as raised, Run(trail, "block"):
        work()
    failure, finished = events(trail, RunFailure)[-1], events(trail, RunFinished)[-1]
    entry = list(trail.reader().entries(type=RunFailure.TYPE))[-1]
    assert finished.reason == type(raised.value).__name__
    return failure, finished, private_half(trail, entry)


def test_memory_that_runs_out_is_told_apart(trail):
    for asks, kind in (
        (lambda: bytearray(2**62), "MemoryError"),
        (lambda: torch.empty(2**59), "RuntimeError"),  # the allocator of the CPU has no exception of its own
    ):
        failure, finished, _ = ended(trail, asks)
        assert (failure.kind, failure.category, finished.status) == (kind, "out-of-memory", "failed")

    def accelerator():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    failure, finished, _ = ended(trail, accelerator)
    assert (failure.kind, failure.category) == ("torch.OutOfMemoryError", "out-of-memory")


def test_another_error_is_not_taken_for_memory(trail):
    failure, finished, _ = ended(trail, lambda: torch.ones(2) @ torch.ones(3))
    assert (failure.kind, failure.category, finished.status) == ("RuntimeError", "exception", "failed")


def test_a_closed_generator_and_a_cancelled_task_are_interruptions(trail):
    import asyncio

    def trains():
        with Run(trail, "generator"):
            yield

    running = trains()
    next(running)
    running.close()

    async def task():
        with Run(trail, "task"):
            await asyncio.sleep(60)

    async def cancels():
        working = asyncio.create_task(task())
        await asyncio.sleep(0)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working

    run_loop(cancels())
    assert [(event.status, event.reason) for event in events(trail, RunFinished)] == [
        ("interrupted", "GeneratorExit"),
        ("interrupted", "CancelledError"),
    ]
    assert [event.category for event in events(trail, RunFailure)] == ["abandoned", "abandoned"]


def test_a_run_that_ends_by_itself_has_no_failure(trail):
    with Run(trail, "fine"):
        pass
    assert events(trail, RunFailure) == []


# --- the traceback ---------------------------------------------------------------------------------------------------

SECRET = "hf_" + "A1b2C3d4E5" * 3


def quotes(row):
    secret = SECRET
    raise ValueError(f"{row} {secret} {__file__}")


def test_a_traceback_names_places_and_nothing_else(trail):
    def chained():
        try:
            quotes("a row of person-3")
        except ValueError as error:
            raise LookupError("in between") from error

    failure, _, half = ended(trail, chained)
    assert (failure.kind, failure.caused_by) == ("LookupError", ["ValueError"])
    assert half.message == "in between"
    assert [(frame.role, frame.function.rpartition(".")[2]) for frame in failure.frames[:2]] == [
        ("module", "ended"),
        ("module", "chained"),
    ]
    assert all(frame.where == __name__ for frame in failure.frames)
    everything = b"".join(entry.data for entry in trail.reader().entries())
    for told in (b"person-3", SECRET.encode(), b"in between", str(ROOT).encode()):
        assert told not in everything
    (entry,) = trail.reader().entries(type=RunFailure.TYPE)
    assert b".py" not in entry.data
    assert b"raise" not in entry.data


def test_what_the_exception_said_is_in_the_private_half(trail):
    _, _, half = ended(trail, lambda: quotes("a row"))
    assert half.message.startswith("a row [removed: Hugging Face token] ")


def test_libraries_and_code_made_at_run_time_are_named_by_their_role(trail):
    def library():
        exec("import json\njson.loads('{')", {"__name__": "/home/somebody/x.py"})

    failure, _, _ = ended(trail, library)
    roles = {(frame.role, frame.where) for frame in failure.frames}
    assert ("library", "json.decoder") in roles
    assert ("module", "?") in roles
    assert not any(b"somebody" in entry.data for entry in trail.reader().entries())


def test_a_deep_traceback_is_cut_in_its_middle(trail):
    def deeper(left):
        return deeper(left - 1) if left else 1 / 0

    failure, _, _ = ended(trail, lambda: deeper(200))
    assert len(failure.frames) == FIRST_FRAMES + LAST_FRAMES
    assert failure.omitted == 203 - FIRST_FRAMES - LAST_FRAMES
    assert failure.frames[0].function.endswith("ended")


def test_an_exception_that_cannot_say_what_it_is_does_not_stop_the_recording(trail):
    class Broken(Exception):
        def __str__(self):
            raise KeyError

    def breaks():
        raise Broken

    failure, finished, half = ended(trail, breaks)
    assert failure.kind.endswith("Broken")
    assert finished.status == "failed"
    assert half.message == "(its text could not be had: KeyError)"


def test_steps_that_were_recorded_before_the_end_count(trail):
    with pytest.raises(LookupError), Run(trail, "steps") as run:
        run.record(Step(step=1))
        raise LookupError
    assert [entry.type for entry in trail.reader().entries(run=run.id)][-2:] == ["run.failure", "run.finished"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_that_cannot_be_signed_again_does_not_take_the_runs_end_with_it(trail, tmp_path, fails):
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError if fails else RunError) as told, Run(trail, "ends") as run:
        run.record(Step(step=1))
        run.weights_saved(saved, 1)
        (saved / "latest").symlink_to(saved / "model.safetensors")
        if fails:
            raise ValueError("of the user's own")
    (finished,) = events(trail, RunFinished)
    assert (finished.status, len(events(trail, RunFailure))) == (("failed", 1) if fails else ("completed", 0))
    assert not run.is_open
    said = str(told.value) if not fails else told.value.__notes__[0]
    assert "symbolic link" in said
