"""How long a private training took stands in no record: neither in its entries nor in papermill's own notes."""

from __future__ import annotations

import json

import papermill
import pytest
from records_support import write_notebook

from rlhf_audit_nb.events import CellExecuted, RecordSealed
from rlhf_audit_nb.records import open_record
from rlhf_audit_nb.trail import Level, TrailReader, verify_trail

pytestmark = pytest.mark.slow

CELL = """
import os
from rlhf_audit_nb.events import *
from rlhf_audit_nb.trail import Trail

with Trail.open(os.environ["RLHF_AUDIT_TRAIL"]) as trail:
    for event in (
        RunStarted(experiment="x", entry_point="cell", tool="t", privacy={privacy},
                   record=os.environ["RLHF_AUDIT_RECORD"]),
        RunFinished(status="completed", steps=0, trained=False),
    ):
        trail.append(event.TYPE, encode_body(event), run="r" * 32)
"""


@pytest.mark.parametrize("private", [True, False])
def test_times_are_in_whole_minutes_from_a_private_run_on(tmp_path, monkeypatch, private):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    cells = ["1", CELL.replace("{privacy}", '{"epsilon": 1.0}' if private else "None"), "2"]
    write_notebook(tmp_path / "in.ipynb", cells)
    papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", engine_name="audit", progress_bar=False)
    reader = TrailReader.open(tmp_path / "audit")
    later = [entry for kind in (CellExecuted, RecordSealed) for entry in reader.entries(type=kind.TYPE)][1:]
    streams = {entry.stream for entry in later}
    before = max(entry.time for entry in reader.entries(type="record.cell") if entry.seq == later[0].seq - 1)
    assert len(streams) == 1
    # An entry is never earlier than the one before it, whose time is exact: it keeps that time until the next minute.
    assert all(entry.time % 60_000_000 == 0 or entry.time == before for entry in later) is private
    notebook = json.loads((tmp_path / "out.ipynb").read_text())
    times = [part["metadata"]["papermill"] for part in (notebook, *notebook["cells"])]
    assert all(item["duration"] % 60 == 0 for item in times) is private
    assert all(item[name][17:19] == "00" for item in times for name in ("start_time", "end_time")) is private
    assert verify_trail(tmp_path / "audit").level is Level.UNANCHORED
    assert open_record(tmp_path / "out.ipynb").verdict.level is Level.UNANCHORED
