"""Several processes on one trail, forks, and processes that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from rlhf_audit_nb.trail import Level, Trail, TrailReader, verify_trail

ROOT = Path(__file__).parents[2]

APPENDER = """
import sys
from rlhf_audit_nb.trail import Trail
folder, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
with Trail.open(folder) as trail:
    for number in range(count):
        trail.append("a.b", b'{"n":%d}' % number, run=name, private=b"x" if number % 10 == 0 else None)
        trail.append("a.c", b'{"n":%d}' % number, run="both")
        if number % 50 == 0:
            trail.flush()
"""

RESERVER = """
import json, sys
from rlhf_audit_nb.trail import Trail

class Refused(Exception):
    pass

def body(reader):
    taken = sum(1 for _ in reader.entries(type="budget.taken"))
    if taken >= 3:
        raise Refused
    return json.dumps({"taken": taken}).encode()

got = 0
with Trail.open(sys.argv[1]) as trail:
    for _ in range(3):
        try:
            trail.append_guarded("budget.taken", body)
            got += 1
        except Refused:
            pass
print(got)
"""

VICTIM = """
import sys
from rlhf_audit_nb.trail import Trail
trail = Trail.open(sys.argv[1])
trail.append("run.started", b'{}', run="victim").wait()
number = 0
while True:
    handle = trail.append("a.b", b'{"n":%d}' % number, run="victim", private=b"secret")
    number += 1
    if number % 7 == 0:
        print(handle.wait(), flush=True)
"""


def start(script: str, *args: object) -> subprocess.Popen:
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


def test_two_processes_append_at_once_without_a_gap_or_a_double(folder):
    Trail.open(folder).close()
    both = [start(APPENDER, folder, name, 400) for name in ("one", "two")]
    for process in both:
        finish(process)
    verdict = verify_trail(folder)
    assert (verdict.level, verdict.reasons, verdict.size) == (Level.UNANCHORED, (), 1601)
    entries = list(TrailReader.open(folder).entries())
    for name in ("one", "two"):
        assert [json.loads(e.body)["n"] for e in entries if e.run == name] == list(range(400))
    shared = [entry for entry in entries if entry.run == "both"]
    assert [entry.seq for entry in shared] == list(range(800))
    assert Counter(json.loads(entry.body)["n"] for entry in shared) == dict.fromkeys(range(400), 2)
    writers = {entry.envelope.writer for entry in shared}
    assert len(writers) == 2


MIXED = """
import sys, threading
from rlhf_audit_nb.trail import Draft, Trail
folder, name, durability, asynchronous = sys.argv[1:]
asynchronous = {"None": None, "True": True, "False": False}[asynchronous]
trail = Trail.open(folder, durability=durability, asynchronous=asynchronous)
def work(thread):
    for number in range(60):
        private = b"x" if number % 20 == 0 else None
        trail.append("a.b", b'{"n":%d}' % number, run=f"{name}.{thread}", private=private)
        trail.append("a.c", b'{"n":%d}' % number, run="all")
    trail.append_many(Draft("a.b", b'{"n":%d}' % number, run=f"{name}.{thread}") for number in range(60, 100))
threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
trail.append("a.d", b"{}")
"""


def test_processes_and_threads_of_every_pace_append_at_once_without_a_gap_or_a_double(folder):
    Trail.open(folder).close()
    paces = [("always", None), ("always", True), ("batched", None), ("batched", False)]
    every = [start(MIXED, folder, f"p{number}", *pace) for number, pace in enumerate(paces)]
    for process in every:
        finish(process)
    entries = list(TrailReader.open(folder).entries())
    for name in (f"p{number}.{thread}" for number in range(4) for thread in range(3)):
        own = [entry for entry in entries if entry.run == name]
        assert [(entry.seq, json.loads(entry.body)["n"]) for entry in own] == [(n, n) for n in range(100)]
    shared = [entry for entry in entries if entry.run == "all"]
    assert [entry.seq for entry in shared] == list(range(720))
    assert Counter(json.loads(entry.body)["n"] for entry in shared) == dict.fromkeys(range(60), 12)
    assert sum(entry.type == "a.d" for entry in entries) == 4
    verdict = verify_trail(folder)
    assert (verdict.level, verdict.reasons, verdict.size) == (Level.UNANCHORED, (), 1 + 1200 + 720 + 4)


def test_four_processes_race_for_three_and_exactly_three_are_taken(folder):
    Trail.open(folder).close()
    got = [int(finish(process)) for process in [start(RESERVER, folder) for _ in range(4)]]
    assert sum(got) == 3
    taken = [json.loads(entry.body)["taken"] for entry in TrailReader.open(folder).entries(type="budget.taken")]
    assert taken == [0, 1, 2]


def test_four_processes_that_make_one_trail_make_one(folder):
    for process in [start(APPENDER, folder, f"p{number}", 5) for number in range(4)]:
        finish(process)
    verdict = verify_trail(folder)
    assert (verdict.reasons, verdict.size) == ((), 41)
    assert len(list(TrailReader.open(folder).entries(type="trail.created"))) == 1


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.15])
def test_after_kill_nothing_durable_is_lost_and_the_run_is_interrupted(folder, delay):
    victim = start(VICTIM, folder)
    promised = int(victim.stdout.readline())
    time.sleep(delay)
    victim.send_signal(signal.SIGKILL)
    rest, _ = victim.communicate(timeout=30)
    promised = max([promised, *(int(line) for line in rest.splitlines() if line.strip())])
    before = verify_trail(folder)
    assert [reason.code for reason in before.reasons] == ["run-open"]
    assert (before.level, before.size > promised) == (Level.UNANCHORED, True)
    with Trail.open(folder) as trail:
        (found,) = trail.recovery.interrupted
        entries = list(trail.reader().entries(run="victim"))
        assert (found.run, found.last_sequence) == ("victim", entries[-1].seq)
        assert [json.loads(entry.body)["n"] for entry in entries[1:]] == list(range(len(entries) - 1))
        trail.append("a.b", b'{"n":-1}').wait()
    after = verify_trail(folder)
    assert (after.level, after.reasons) == (Level.UNANCHORED, ())
    assert after.runs[0].status == "interrupted"
    with Trail.open(folder) as trail:
        assert trail.recovery.interrupted == ()


TOLD = """
import os, sys
from rlhf_audit_nb.trail import Trail
folder, durability, asynchronous = sys.argv[1:]
asynchronous = {"None": None, "True": True, "False": False}[asynchronous]
trail = Trail.open(folder, durability=durability, asynchronous=asynchronous)
number = 0
while True:
    trail.append("a.b", b'{"n":%d}' % number, run="r")
    os.write(1, b"%d\\n" % number)  # recording it has returned
    number += 1
"""


@pytest.mark.parametrize(
    ("durability", "asynchronous", "most"),
    [("always", None, 0), ("batched", False, 0), ("always", True, 1000), ("batched", None, 1000)],
)
def test_kill_takes_nothing_that_was_waited_for_and_at_most_the_window_of_the_rest(
    folder, durability, asynchronous, most
):
    Trail.open(folder).close()
    victim = start(TOLD, folder, durability, asynchronous)
    victim.stdout.readline()
    time.sleep(0.3)
    victim.kill()
    returned = 1 + max(int(line) for line in victim.communicate(timeout=30)[0].split())
    found = [json.loads(entry.body)["n"] for entry in TrailReader.open(folder).entries(type="a.b")]
    assert found == list(range(len(found)))
    assert len(found) >= returned - most
    assert verify_trail(folder).level is Level.UNANCHORED


def test_a_run_of_a_living_process_is_left_alone(folder):
    victim = start(VICTIM, folder)
    victim.stdout.readline()
    try:
        with Trail.open(folder) as trail:
            assert trail.recovery.interrupted == ()
            assert trail.append("a.b", b'{"n":0}').wait() > 0
    finally:
        victim.kill()
        victim.communicate(timeout=30)
    with Trail.open(folder) as trail:
        assert [run.run for run in trail.recovery.interrupted] == ["victim"]


def test_what_was_appended_is_durable_when_the_interpreter_ends_without_close(folder):
    script = """
import sys
from rlhf_audit_nb.trail import Trail
trail = Trail.open(sys.argv[1])
for number in range(300):
    trail.append("a.b", b'{"n":%d}' % number, run="r")
"""
    finish(start(script, folder))
    assert TrailReader.open(folder).size == 301
    raising = script + "raise SystemExit('on purpose')\n"
    process = start(raising, folder)
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert TrailReader.open(folder).size == 601


def test_a_forked_child_appends_as_another_writer_and_the_parent_goes_on(folder):
    with Trail.open(folder) as trail:
        trail.append("run.started", b"{}", run="r").wait()
        trail.append("a.b", b'{"who":"parent"}', run="r")
        child = os.fork()
        if child == 0:
            try:
                for _ in range(50):
                    trail.append("a.b", b'{"who":"child"}', run="r", private=b"x")
                trail.flush()
                trail.close()
                os._exit(0)
            except BaseException:
                os._exit(1)
        for _ in range(50):
            trail.append("a.b", b'{"who":"parent"}', run="r", private=b"x")
        trail.flush()
        assert os.waitpid(child, 0)[1] == 0
        trail.append("a.b", b'{"who":"parent"}', run="r").wait()
        entries = list(trail.reader().entries(run="r"))
    assert Counter(json.loads(entry.body).get("who") for entry in entries) == {None: 1, "parent": 52, "child": 50}
    assert len({entry.envelope.writer for entry in entries}) == 2
    assert {reason.code for reason in verify_trail(folder).reasons} == {"run-open"}


def test_forks_in_the_middle_of_appends_neither_hang_nor_break(folder):
    with Trail.open(folder) as trail:
        children = []
        for round_ in range(8):
            for number in range(40):
                trail.append("a.b", b'{"n":%d}' % number, run="r")
            child = os.fork()
            if child == 0:
                try:
                    if round_ % 2:
                        trail.append("a.b", b'{"n":0}', run="child").wait(20)
                    os._exit(0)
                except BaseException:
                    os._exit(1)
            children.append(child)
        for child in children:
            assert os.waitpid(child, 0)[1] == 0
        trail.flush()
        assert len(list(trail.reader().entries(run="r"))) == 320
        assert len(list(trail.reader().entries(run="child"))) == 4
    assert verify_trail(folder).reasons == ()


def test_a_sleeping_child_does_not_keep_a_dead_parents_run_alive(folder):
    script = """
import os, sys, time
from rlhf_audit_nb.trail import Trail
trail = Trail.open(sys.argv[1])
trail.append("run.started", b'{}', run="r").wait()
child = os.fork()
if child == 0:
    os.close(1); os.close(2)
    time.sleep(20)
    os._exit(0)
print(child, flush=True)
os._exit(9)
"""
    process = start(script, folder)
    child = int(process.stdout.readline())
    process.communicate(timeout=30)
    try:
        with Trail.open(folder) as trail:
            assert [run.run for run in trail.recovery.interrupted] == ["r"]
    finally:
        os.kill(child, signal.SIGKILL)
