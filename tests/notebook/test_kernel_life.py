"""A run in a real kernel: restarted, terminated, killed; and the cell's id as a front end sends it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from support.trails import events

from rlhf_audit_nb.events import CellAudited, RunFinished, RunInterrupted, decode_body
from rlhf_audit_nb.records.normal_form import text_digest
from rlhf_audit_nb.trail import Trail, TrailReader, verify_trail

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SECONDS = 90
WAITS = "%%audit_train --experiment waits\nprint('ready', flush=True)\nimport time\ntime.sleep(60)"


@pytest.fixture
def kernel(tmp_path):
    from jupyter_client.manager import KernelManager

    manager = KernelManager(kernel_name="python3")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RLHF_AUDIT_TRAIL": str(tmp_path / "audit")}
    manager.start_kernel(cwd=str(tmp_path), env=environment)
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.fixture
def client(kernel):
    client = kernel.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=SECONDS)
    yield client
    client.stop_channels()


def execute(client, source, cell=None):
    """Run a cell to its end, as a front end that knows its id does."""
    client.session.metadata = {"cellId": cell} if cell else {}
    return client.execute_interactive(source, timeout=SECONDS, output_hook=lambda _: None)["content"]


def begin(client, source, cell=None):
    """Begin a cell, and come back when it has printed ``ready``."""
    client.session.metadata = {"cellId": cell} if cell else {}
    client.execute(source)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        message = client.get_iopub_msg(timeout=SECONDS)
        if message["msg_type"] == "stream" and "ready" in message["content"]["text"]:
            return
    raise AssertionError("it is not ready")


def finished(folder):
    reader = TrailReader.open(folder)
    found = [decode_body(entry.type, entry.body) for entry in reader.entries(type=RunFinished.TYPE)]
    return [(event.status, event.reason) for event in found]


def until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_kernel_that_is_restarted_and_then_terminated_tells_both_and_knows_its_cells(kernel, client, tmp_path):
    folder = tmp_path / "audit"
    assert execute(client, "%load_ext rlhf_audit_nb", "cell-1")["status"] == "ok"
    assert execute(client, "%%audit_train --experiment quick\npass", "cell-2")["status"] == "ok"
    assert execute(client, "%%audit_train --experiment leaves\nimport sys\nsys.exit()", "cell-2")["status"] == "error"
    begin(client, WAITS, "cell-3")
    kernel.restart_kernel()
    client.wait_for_ready(timeout=SECONDS)
    expected = [("completed", None), ("interrupted", "SystemExit"), ("interrupted", "KeyboardInterrupt")]
    assert finished(folder) == expected
    execute(client, "%load_ext rlhf_audit_nb", "cell-1")
    begin(client, WAITS, "cell-3")
    os.kill(kernel.provisioner.pid, signal.SIGTERM)
    until(lambda: not kernel.is_alive())
    assert finished(folder) == [*expected, ("interrupted", "SIGTERM")]
    with Trail.open(folder) as trail:
        cells = events(trail, CellAudited)
    assert [(event.cell, event.execution_count, event.seen) for event in cells] == [
        ("cell-2", 2, "first"),
        ("cell-2", 3, "edited"),
        ("cell-3", 4, "first"),
        ("cell-3", 2, "rerun"),
    ]
    assert [one.cell for one in cells[2].executed] == ["cell-1", "cell-2", "cell-2"]
    assert [one.status for one in cells[2].executed] == ["ok", "ok", "error"]
    assert [one.cell for one in cells[3].executed] == ["cell-1"]  # the kernel began anew
    assert cells[3].source_digest == text_digest(WAITS)
    assert verify_trail(folder).level.name == "UNANCHORED"


def test_a_kernel_that_is_killed_is_told_of_by_the_next_opening(kernel, client, tmp_path):
    folder = tmp_path / "audit"
    execute(client, "%load_ext rlhf_audit_nb")
    begin(client, WAITS)
    os.kill(kernel.provisioner.pid, signal.SIGKILL)
    until(lambda: not kernel.is_alive())
    assert finished(folder) == []
    with Trail.open(folder) as trail:
        (found,) = trail.recovery.interrupted
        assert [event.run for event in events(trail, RunInterrupted)] == [found.run]
    assert [run.status for run in verify_trail(folder).runs] == ["interrupted"]
