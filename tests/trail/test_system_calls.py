"""One writer, killed or refused at one system call after another around the 254 to 257 boundary of a tile.

Whatever happens: what was promised is there, nothing is there twice, and the trail opens and goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_audit_nb.trail import Level, Trail, TrailReader, verify_trail

ROOT = Path(__file__).parents[2]
START = 253

WRITER = """
import sys
from rlhf_audit_nb.trail import Trail
with Trail.open(sys.argv[1]) as trail:
    trail.append("run.started", b"{}", run="live")
    for number in range(253, 259):
        print(trail.append("a.b", b'{"n":%d}' % number, run="r", private=b"x").wait(), flush=True)
"""

# Counted within a thread; the writer's thread does most of them. The numbers reach from the first commit to the last;
# with another SQLite a late one may not be reached, and then nothing fails.
FAULTS = [
    *(("fdatasync", when, "signal=KILL") for when in (5, 11, 15)),
    *(("pwrite64", when, "signal=KILL") for when in (17, 90)),
    ("fsync", 1, "signal=KILL"),
    ("rename", 1, "signal=KILL"),
    ("fdatasync", 12, "error=EIO"),
    ("pwrite64", 60, "error=EIO"),
    ("pwrite64", 80, "error=ENOSPC"),
]


@pytest.fixture(scope="module")
def strace() -> str:
    found = shutil.which("strace")
    if found is None or subprocess.run([found, "-o", os.devnull, "true"], capture_output=True).returncode != 0:
        pytest.skip("strace is not here or may not trace")
    return found


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A trail of 253 entries, and its home, to be copied for each fault."""
    place = tmp_path_factory.mktemp("begun")
    with Trail.open(place / "audit", home=place / "home") as trail:
        for number in range(1, START):
            trail.append("a.b", b'{"n":%d}' % number, run="r")
    return place


@pytest.mark.parametrize(("call", "when", "fault"), FAULTS, ids=str)
def test_a_writer_stopped_at_a_system_call_loses_nothing_that_it_promised(tmp_path, begun, strace, call, when, fault):
    shutil.copytree(begun, tmp_path / "case")
    folder, home = tmp_path / "case" / "audit", tmp_path / "case" / "home"
    command = [strace, "-f", "-qq", "-o", os.devnull, "-e", f"trace={call}"]
    command += ["-e", f"inject={call}:{fault}:when={when}", sys.executable, "-c", WRITER, str(folder)]
    environment = {**os.environ, "RLHF_AUDIT_HOME": str(home)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment)
    promised = [int(line) for line in done.stdout.split()]
    if done.returncode == 0:
        assert len(promised) == 6
    elif "error" in fault:
        assert "AuditError" in done.stderr or "StoreError" in done.stderr or "KeyFileError" in done.stderr, done.stderr

    before = verify_trail(folder, home=home)
    assert before.level is Level.UNANCHORED
    assert {reason.code for reason in before.reasons} <= {"run-open"}
    assert before.size > max(promised, default=START - 1)
    with Trail.open(folder, home=home) as trail:
        found = [json.loads(entry.body)["n"] for entry in trail.reader().entries(type="a.b")]
        assert found == list(range(1, 1 + len(found)))
        trail.append("a.b", b'{"n":%d}' % (len(found) + 1), run="r", private=b"y").wait()
    after = verify_trail(folder, home=home)
    assert (after.level, after.reasons) == (Level.UNANCHORED, ())
    assert {run.status for run in after.runs if run.run == "live"} <= {"interrupted"}
    assert TrailReader.open(folder).size == after.size
