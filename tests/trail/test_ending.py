"""What is queued when the process ends is written: at exit, after an exception, on SIGTERM, at a kernel's restart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_audit_nb.trail import Level, Trail, TrailReader, verify_trail
from rlhf_audit_nb.trail import writer as writing

ROOT = Path(__file__).parents[2]

# The window never closes by itself here, so that what is on the disk afterwards was flushed by the ending.
OPENED = """
import os, signal, sys, threading, time
import rlhf_audit_nb.trail.writer as w
w.LINGER_SECONDS = 1000
from rlhf_audit_nb.trail import Trail
trail = Trail.open(sys.argv[1])
for number in range(300):
    trail.append("a.b", b'{"n":%d}' % number, run="r", private=b"x")
"""
WAITING = OPENED + "print('ready', flush=True)\n"


def run(script: str, *args: object, **more) -> subprocess.Popen:
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **more)


def terminated(script: str, folder: Path, sent: int = signal.SIGTERM) -> tuple[int, str]:
    process = run(script, folder)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    process.send_signal(sent)
    _, said = process.communicate(timeout=30)
    return process.returncode, said


def count(folder: Path) -> int:
    return len(list(TrailReader.open(folder).entries(type="a.b")))


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("", 0),
        ("raise LookupError", 1),
        ("sys.exit(3)", 3),
        ("threading.Thread(target=time.sleep, args=[0.1]).start()", 0),
    ],
)
def test_what_is_queued_is_written_when_the_interpreter_ends(folder, end, status):
    process = run(OPENED + end, folder)
    process.communicate(timeout=30)
    assert (process.returncode, count(folder)) == (status, 300)


def test_without_an_ending_the_queue_is_lost_which_is_what_these_tests_would_see(folder):
    process = run(OPENED + "os._exit(0)", folder)
    process.communicate(timeout=30)
    assert count(folder) == 0


@pytest.mark.parametrize(
    "waiting",
    ["time.sleep(60)", "threading.Event().wait(60)", "while True: pass"],
)
def test_sigterm_loses_nothing_and_the_process_still_dies_of_it(folder, waiting):
    status, said = terminated(WAITING + waiting, folder)
    assert (status, said, count(folder)) == (-signal.SIGTERM, "", 300)
    assert verify_trail(folder).level is Level.UNANCHORED


def test_sigterm_while_the_main_thread_appends_flushes_what_came_before_it_and_does_not_hang(folder):
    script = WAITING + 'while True: trail.append("a.c", b"{}")\n'
    for delay in (0.0, 0.003, 0.01):
        process = run(script, folder)
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == -signal.SIGTERM
    assert count(folder) == 900
    assert verify_trail(folder).level is Level.UNANCHORED


def test_sigterm_in_the_middle_of_durable_appends_loses_nothing_that_was_promised(folder):
    script = """
import sys
from rlhf_audit_nb.trail import Trail
with Trail.open(sys.argv[1], durability="always") as trail:
    print("ready", flush=True)
    while True:
        print(trail.append("a.b", b"{}", run="r").index, flush=True)
"""
    process = run(script, folder)
    process.stdout.readline()
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    promised = [int(line) for line in out.splitlines()]
    assert promised == list(range(1, 1 + len(promised)))
    assert len(promised) <= count(folder) <= len(promised) + 2


def test_a_second_sigterm_does_not_cut_the_flush_short(folder):
    slow = """
whole = w.Writer._commit
def slowly(self, *args, **more):
    time.sleep(0.5)
    return whole(self, *args, **more)
w.Writer._commit = slowly
print("ready", flush=True)
time.sleep(60)
"""
    process = run(OPENED + slow, folder)
    process.stdout.readline()
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    process.communicate(timeout=30)
    assert (process.returncode, count(folder)) == (-signal.SIGTERM, 300)


def test_a_flush_that_does_not_come_to_an_end_is_given_up_and_said(folder):
    stuck = """
from rlhf_audit_nb.trail import ending
ending.PATIENCE_SECONDS = 0.5
trail._writer._commit_lock.acquire()
print("ready", flush=True)
time.sleep(60)
"""
    status, said = terminated(OPENED + stuck, folder)
    assert status == -signal.SIGTERM
    assert "rlhf-audit: what was appended last could not be written within 0 s of SIGTERM" in said


def test_a_flush_that_fails_is_said(folder):
    broken = """
def broken(*_args):
    raise OSError("no such disk")
w.Writer._commit = broken
print("ready", flush=True)
time.sleep(60)
"""
    status, said = terminated(OPENED + broken, folder)
    assert status == -signal.SIGTERM
    assert "300 entries were not written" in said


def test_a_users_own_handler_is_left_alone(folder):
    own = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
    status, _ = terminated(own + WAITING + "time.sleep(60)", folder)
    assert (status, count(folder)) == (7, 300)


HANDLERS = """
import signal, sys
from rlhf_audit_nb.trail import Trail, ending
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
with Trail.open(sys.argv[1]):
    with Trail.open(sys.argv[1] + "-other"):
        assert signal.getsignal(signal.SIGTERM) is ending.on_sigterm
    assert signal.getsignal(signal.SIGTERM) is ending.on_sigterm
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
"""


def test_the_handler_is_there_only_while_a_trail_is_open(folder):
    # In a process of its own: here, another test may have left a trail open, as a notebook does.
    done = subprocess.run([sys.executable, "-c", HANDLERS, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_forked_child_dies_of_sigterm_too(folder):
    with Trail.open(folder) as trail:
        trail.append("a.b", b"{}").wait()
        child = os.fork()
        if child == 0:
            trail.append("a.b", b"{}")
            while True:
                time.sleep(1)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert len(list(trail.reader().entries(type="a.b"))) == 2


@pytest.mark.parametrize("failing", [False, True])
def test_a_runs_end_is_on_the_disk_when_its_context_is_left(folder, monkeypatch, failing):
    from rlhf_audit_nb import AuditableRLHF, AuditConfig
    from rlhf_audit_nb.events import Step

    monkeypatch.setattr(writing, "LINGER_SECONDS", 1000)
    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(folder)))

    def train() -> None:
        with auditor.track_training("ends") as run:
            for number in range(1, 51):
                run.record(Step(step=number, metrics={}))
            if failing:
                raise LookupError

    if failing:
        with pytest.raises(LookupError):
            train()
    else:
        train()
    assert auditor.trail.status().unsynced == 0
    entries = list(TrailReader.open(folder).entries(type="train.step"))
    assert len(entries) == 50
    (run,) = verify_trail(folder).runs
    assert run.status == ("failed" if failing else "completed")


# --- a kernel ---


@pytest.fixture
def kernel(tmp_path, home):
    from jupyter_client.manager import KernelManager

    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(ROOT), env={**os.environ, "RLHF_AUDIT_HOME": str(home)})
    yield manager
    manager.shutdown_kernel(now=True)


def execute(manager, code: str) -> str:
    """Run a cell; what it prints."""
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    said: list[str] = []

    def hear(message) -> None:
        if message["msg_type"] == "stream":
            said.append(message["content"]["text"])

    reply = client.execute_interactive(code, timeout=60, output_hook=hear)
    client.stop_channels()
    assert reply["content"]["status"] == "ok", reply["content"]
    return "".join(said)


CELL = """
from rlhf_audit_nb.trail import Trail
import rlhf_audit_nb.trail.writer as w
w.LINGER_SECONDS = {linger}
trail = Trail.open({folder!r})
trail.append("run.started", b"{{}}", run="r")
promised = trail.append("a.b", b'{{"n":0}}', run="r").wait()
for number in range(1, 300):
    trail.append("a.b", b'{{"n":%d}}' % number, run="r")
print(promised)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "least"), [("restart", 300), ("shutdown", 300), ("restart now", 1)])
def test_a_kernel_that_is_restarted_or_shut_down_writes_what_is_queued_first(folder, kernel, how, least):
    """A restart "now" is a kill: what is acknowledged is there, what is queued may be lost."""
    linger = 0.02 if how == "restart now" else 1000
    promised = int(execute(kernel, CELL.format(folder=str(folder), linger=linger)))
    if how == "shutdown":
        kernel.shutdown_kernel()
    else:
        kernel.restart_kernel(now=how == "restart now")
    found = TrailReader.open(folder)
    assert found.size > promised
    assert count(folder) >= least
    assert [reason.code for reason in verify_trail(folder).reasons] == ["run-open"]
    with Trail.open(folder) as trail:
        (run,) = trail.recovery.interrupted
        assert (run.run, run.last_sequence) == ("r", count(folder))
    (summary,) = verify_trail(folder).runs
    assert summary.status == "interrupted"


@pytest.mark.slow
def test_what_is_older_than_the_window_is_there_after_a_kernel_was_killed(folder, kernel):
    execute(kernel, CELL.format(folder=str(folder), linger=0.02) + "import time; time.sleep(0.2)")
    kernel.restart_kernel(now=True)
    assert count(folder) == 300


@pytest.mark.slow
def test_a_restarted_kernel_goes_on_where_the_trail_was(folder, kernel):
    execute(kernel, CELL.format(folder=str(folder), linger=1000))
    kernel.restart_kernel()
    opened = f"from rlhf_audit_nb.trail import Trail\ntrail = Trail.open({str(folder)!r})\n"
    said = execute(
        kernel, opened + 'print([run.run for run in trail.recovery.interrupted], trail.append("a.b", b"{}").wait())'
    )
    assert said == "['r'] 303\n"


@pytest.mark.slow
def test_a_kernel_that_is_restarted_in_the_middle_of_a_cell_writes_what_is_queued(folder, kernel):
    execute(kernel, CELL.format(folder=str(folder), linger=1000))
    client = kernel.blocking_client()
    client.start_channels()
    client.execute(
        "import time\nfor number in range(300, 400):\n    trail.append('a.b', b'{}', run='r')\ntime.sleep(60)"
    )
    time.sleep(1)
    client.stop_channels()
    kernel.restart_kernel()
    assert count(folder) == 400
