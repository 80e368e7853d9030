"""One run of a sweep: claimed once, stopped at the end of a cell where that is asked, told and never raised."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from records_support import write_notebook

from rlhf_audit_nb.config import ENV_SLOT
from rlhf_audit_nb.records import open_record
from rlhf_audit_nb.sweeping.task import Task, claimed, run_task, stop_file
from rlhf_audit_nb.trail import Level, Trail

STOPS = """
import os, pathlib
print("slot", os.environ.get("RLHF_AUDIT_SLOT"))
pathlib.Path(stop).touch()
""".strip()


def test_a_run_is_sealed_at_the_end_of_the_cell_in_which_the_sweep_is_told_to_end(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "attempts").mkdir(parents=True)
    Trail.open(tmp_path / "audit").close()
    stop = stop_file(folder, "sweep")
    cells = ['stop = ""', STOPS, "print('never')"]
    source = write_notebook(tmp_path / "in.ipynb", [(cells[0], {"tags": ["parameters"]}), *cells[1:]])
    task = Task(
        point="a" * 16,
        attempt=1,
        sweep="sweep",
        notebook=str(source),
        folder=str(folder),
        trail=str(tmp_path / "audit"),
        cwd=str(tmp_path),
        parameters={"stop": str(stop)},
        slot="b" * 16,
    )
    assert run_task(task)["outcome"] == "interrupted"
    opened = open_record(task.path)
    assert opened.verdict.level == Level.UNANCHORED
    assert opened.sealed is not None
    assert opened.sealed.status == "aborted"
    shown = [output["text"] for cell in opened.notebook.cells for output in cell.get("outputs", [])]
    assert shown == [f"slot {'b' * 16}\n"], "the second cell ran, the third did not"
    assert ENV_SLOT not in os.environ
    assert not (folder / f"{task.point}.ipynb").exists(), "what was cut short has not the run's name"

    assert claimed(folder, task.point) == 1
    assert run_task(replace(task, attempt=2))["outcome"] == "stopped"
    assert claimed(folder, task.point) == 1
    stop.unlink()
    # A scheduler that starts the same attempt elsewhere, because the first worker is gone, is told so.
    assert run_task(task)["outcome"] == "died"
    wrong = run_task(replace(task, attempt=2, notebook=str(tmp_path / "gone.ipynb")))
    assert wrong["outcome"] == "error"
    assert "gone.ipynb" in wrong["message"]
