"""However a notebook ends, and whatever it is made of, a sealed record says what happened, and verifies."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from records_support import write_notebook

from rlhf_audit_nb.cli import main
from rlhf_audit_nb.errors import RecordError
from rlhf_audit_nb.records import kept_record, open_record, run_notebook
from rlhf_audit_nb.records.places import replace_file
from rlhf_audit_nb.records.run import NotebookFailedError
from rlhf_audit_nb.trail import Level, TrailReader

pytestmark = pytest.mark.slow

# name: (the cell that ends it, settings, status, reason, words of the error)
ENDS = {
    "an error": ("1 / 0", {}, "failed", "ZeroDivisionError", r"Cell 2 of 3 \(id cell-1\) raised ZeroDivisionError"),
    "a time-out": (
        "import time; time.sleep(60)",
        {"cell_timeout": 1},
        "aborted",
        "CellTimeoutError",
        "was cut short by",
    ),
    "a dead kernel": ("import os; os._exit(1)", {}, "aborted", "DeadKernelError", "was cut short by DeadKernelError"),
    "sys.exit(0)": ("import sys; sys.exit(0)", {}, "failed", "SystemExit", "raised SystemExit"),
    "an interruption": ("raise KeyboardInterrupt", {}, "failed", "KeyboardInterrupt", "raised KeyboardInterrupt"),
    "no memory left": ("bytearray(10**18)", {}, "failed", "MemoryError", "raised MemoryError"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sealed(path):
    """What a record that verifies says of its end, its cells' statuses, and the record itself."""
    opened = open_record(path)
    assert (opened.verdict.level, opened.verdict.reasons) == (Level.UNANCHORED, ())
    bodies = [json.loads(entry.body) for entry in opened.entries if entry.type == "record.cell"]
    return (opened.sealed.status, opened.sealed.reason, opened.sealed.cell), [b["status"] for b in bodies], opened


@pytest.mark.parametrize("case", ENDS)
def test_through_our_own_door_every_end_is_told_and_sealed(folder, case):
    source, settings, status, reason, words = ENDS[case]
    write_notebook(folder / "in.ipynb", ["1", source, "2"])
    with pytest.raises(NotebookFailedError, match=words) as caught:
        run_notebook("in.ipynb", "out.ipynb", **settings)
    result = caught.value.result
    assert (result.status, result.reason, result.cell, result.position) == (status, reason, "cell-1", 1)
    end, statuses, opened = sealed("out.ipynb")
    assert end == (status, reason, "cell-1")
    assert statuses == ["ok", "aborted" if status == "aborted" else "error"]
    assert [cell["id"] for cell in opened.notebook.cells] == ["cell-0", "cell-1", "cell-2"], "no marker cells"
    assert opened.notebook.cells[2].execution_count is None


ODD = [
    "import ipywidgets\nfrom IPython.display import display\nhandle = display('first', display_id=True)",
    nbformat.v4.new_code_cell("", id="empty"),
    nbformat.v4.new_code_cell("  \n", id="blank"),
    """
out, later = ipywidgets.Output(), ipywidgets.Output()
display(ipywidgets.VBox([out, later]))
print("beside")
with out:
    print("captured")
    display(41 + 1)
with out:
    1 / 0
""",
    "handle.update('second')\nwith later:\n    print('captured later')",
    nbformat.v4.new_raw_cell("raw", id="raw"),
    nbformat.v4.new_markdown_cell("the end", id="last"),
]


def test_a_notebook_of_odd_cells_is_recorded_whole(folder):
    write_notebook(folder / "in.ipynb", ODD)
    assert run_notebook("in.ipynb", "out.ipynb").status == "completed"
    end, statuses, opened = sealed("out.ipynb")
    assert (end, statuses) == (("completed", None, None), ["ok"] * 3)
    cells = opened.notebook.cells
    assert [cell["id"] for cell in cells] == ["cell-0", "empty", "blank", "cell-3", "cell-4", "raw", "last"]
    assert cells[0].outputs[0].data["text/plain"] == "'second'"
    shown = "\n".join(str(output.get("text") or output.data["text/plain"]) for output in cells[3].outputs)
    assert "captured\n" in shown
    assert "42" in shown
    assert "ZeroDivisionError" in shown
    assert "captured later" in shown
    assert "beside" in shown
    assert cells[4].outputs == []
    updated = [note.where for note in opened.notes if note.code == "output-updated"]
    assert updated == ["cells[0].outputs", "cells[3].outputs"]
    # The same through papermill itself, which must not take the captured error for a failed cell.
    papermill.execute_notebook("in.ipynb", "pm.ipynb", engine_name="audit", progress_bar=False)
    assert sealed("pm.ipynb")[0] == ("completed", None, None)


def test_an_update_that_shows_a_secret_does_not_reach_the_record(folder):
    token = "aB3dE5fG7hJ9kL1mN3pQ5rS7tU9vW1xY3z"
    write_notebook(
        folder / "in.ipynb",
        ["handle = display('first', display_id=True)", f"handle.update('so hf' + '_' + {token!r})"],
    )
    run_notebook("in.ipynb", "out.ipynb")
    end, _, opened = sealed("out.ipynb")
    shown = opened.notebook.cells[0].outputs[0].data["text/plain"]
    assert "so " in shown
    assert token not in shown
    assert end[0] == "completed"


@pytest.mark.filterwarnings("ignore::nbformat.warnings.DuplicateCellId")
def test_one_cell_id_twice_is_mended_before_it_runs(folder):
    write_notebook(folder / "in.ipynb", [nbformat.v4.new_code_cell(source, id="same") for source in ("1", "2")])
    assert run_notebook("in.ipynb", "out.ipynb").status == "completed"
    _, statuses, opened = sealed("out.ipynb")
    first, second = (cell["id"] for cell in opened.notebook.cells)
    assert (first, statuses) == ("same", ["ok", "ok"])
    assert second != "same"


def test_a_notebook_without_cells_is_a_record_of_nothing(folder):
    write_notebook(folder / "in.ipynb", [])
    assert run_notebook("in.ipynb", "out.ipynb").status == "completed"
    assert sealed("out.ipynb")[:2] == (("completed", None, None), [])


def test_preparing_alone_is_no_execution_and_leaves_no_record(folder):
    write_notebook(folder / "in.ipynb", [("a = 1", {"tags": ["parameters"]})])
    papermill.execute_notebook("in.ipynb", "out.ipynb", {"a": 2}, engine_name="audit", prepare_only=True)
    assert [reason.code for reason in open_record("out.ipynb").verdict.reasons] == ["no-seal"]
    assert not (folder / "audit").exists()


# -- the kernel that does not come ------------------------------------------------------------------------------------


def install_kernel(folder, monkeypatch, *argv):
    """A kernel specification ``odd`` that this test alone sees."""
    where = folder / "jupyter" / "kernels" / "odd"
    where.mkdir(parents=True)
    spec = {"argv": list(argv), "display_name": "Odd", "language": "python"}
    (where / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))


KERNELS = {
    "dies before the first cell": (sys.executable, "-c", "raise SystemExit(3)"),
    "is not there": ("/nowhere/kernel", "-f", "{connection_file}"),
}


@pytest.mark.parametrize("case", KERNELS)
def test_a_kernel_that_does_not_start_is_told_and_sealed(folder, monkeypatch, capsys, case):
    install_kernel(folder, monkeypatch, *KERNELS[case])
    write_notebook(folder / "in.ipynb", ["1"])
    assert main(["run", "in.ipynb", "--kernel", "odd", "-o", "out.ipynb"]) == 1
    said = capsys.readouterr().err
    assert "before the first cell; the record out.ipynb is sealed with status 'aborted'" in said
    assert "jupyter kernelspec list" in said
    end, statuses, opened = sealed("out.ipynb")
    assert (end[0], end[2], statuses) == ("aborted", None, [])
    assert end[1] in said
    assert opened.notebook.cells[0].execution_count is None


def test_a_kernel_that_never_answers_is_given_up(folder, monkeypatch):
    install_kernel(folder, monkeypatch, sys.executable, "-c", "import time; time.sleep(60)")
    write_notebook(folder / "in.ipynb", ["1"])
    with pytest.raises(RuntimeError, match="respond in 1 seconds"):
        papermill.execute_notebook(
            "in.ipynb", "out.ipynb", kernel_name="odd", start_timeout=1, engine_name="audit", progress_bar=False
        )
    assert sealed("out.ipynb")[0] == ("aborted", "RuntimeError", None)


# -- the place that cannot be written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False], ids=["our own door", "papermill"])
def test_a_disk_that_is_full_in_the_end_loses_no_record(folder, monkeypatch, own):
    """The unfinished notebook cannot be kept either, and that does not end the run."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("rlhf_audit_nb.records.places.replace_file", full)
    monkeypatch.setattr("rlhf_audit_nb.records.engine.write_ipynb", full)
    write_notebook(folder / "in.ipynb", ["print('dear')"])
    with pytest.raises(RecordError, match="No space left on device; it is sealed, and lies at") as caught:
        if own:
            run_notebook("in.ipynb", "out.ipynb")
        else:
            papermill.execute_notebook("in.ipynb", "out.ipynb", engine_name="audit", progress_bar=False)
    kept = Path(caught.value.message.rpartition(" lies at ")[2].rstrip("."))
    assert kept_record("audit", kept.stem) == kept.relative_to(folder)
    end, statuses, opened = sealed(kept)
    assert (end[0], statuses, opened.notebook.cells[0].outputs[0].text) == ("completed", ["ok"], "dear\n")


def test_without_a_copy_beside_the_trail_the_record_is_left_in_the_temporary_folder(folder, monkeypatch):
    from rlhf_audit_nb.config import AuditConfig

    (folder / "tmp").mkdir()
    (folder / "gone").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder / "tmp"))
    write_notebook(folder / "in.ipynb", [f"import shutil; shutil.rmtree({str(folder / 'gone')!r})"])
    with pytest.raises(RecordError, match="No such file or directory; it is sealed, and lies at") as caught:
        run_notebook("in.ipynb", folder / "gone" / "out.ipynb", config=AuditConfig(keep_records=False))
    kept = Path(caught.value.message.rpartition(" lies at ")[2].rstrip("."))
    assert kept.parent == folder / "tmp"
    assert sealed(kept)[0] == ("completed", None, None)


def test_papermill_that_saves_nothing_itself_still_leaves_the_record_of_a_dead_kernel(folder):
    write_notebook(folder / "in.ipynb", ["import os; os._exit(1)"])
    with pytest.raises(Exception, match="Kernel died"):
        papermill.execute_notebook(
            "in.ipynb", "out.ipynb", engine_name="audit", request_save_on_cell_execute=False, progress_bar=False
        )
    assert sealed("out.ipynb")[0] == ("aborted", "DeadKernelError", "cell-0")


def test_a_file_is_replaced_whole_or_not_at_all_and_keeps_its_mode(tmp_path, monkeypatch):
    path = tmp_path / "r.ipynb"
    path.write_text("old")
    path.chmod(0o640)
    replace_file(path, "new")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o640)

    def full(_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        replace_file(path, "newer")
    assert path.read_text() == "new"
    assert [found.name for found in tmp_path.iterdir()] == ["r.ipynb"]


# -- a process that is killed -----------------------------------------------------------------------------------------


def test_a_killed_run_leaves_an_unsealed_notebook_and_a_trail_that_knows_the_cells(folder, command):
    write_notebook(folder / "in.ipynb", ["print('kept')", "import time; time.sleep(60)"])
    asked = [*command, "run", "in.ipynb", "-o", "out.ipynb"]
    with subprocess.Popen(asked, stderr=subprocess.PIPE, text=True) as process:
        while "cell 2 of 2: running" not in (line := process.stderr.readline()):
            assert line, shlex.join(asked)
        time.sleep(0.5)  # the trail syncs within 50 ms
        process.kill()
    assert [reason.code for reason in open_record("out.ipynb").verdict.reasons] == ["no-seal"]
    kinds = [entry.type for entry in TrailReader.open("audit").entries()]
    assert kinds == ["trail.created", "record.started", "record.cell"]
