"""However an execution ends, the record is sealed, says how, and verifies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import papermill
import pytest
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError
from records_support import TRAINING, policy_of, write_notebook
from support.loops import run_loop

from rlhf_audit_nb.errors import RecordError, StoreError
from rlhf_audit_nb.records import open_record, run_notebook
from rlhf_audit_nb.records.run import NotebookFailedError, Terminated
from rlhf_audit_nb.trail import Level, TrailReader, verify_trail

pytestmark = pytest.mark.slow

# name: (cells, settings, raised by papermill, status, reason, failing cell, statuses of the cells that were recorded)
MATRIX = {
    "an error": (["1", "1 / 0", "2"], {}, PapermillExecutionError, "failed", "ZeroDivisionError", 1, ["ok", "error"]),
    "a time-out": (
        ["1", "import time; print('a', flush=True); time.sleep(60)", "2"],
        {"execution_timeout": 2},
        CellTimeoutError,
        "aborted",
        "CellTimeoutError",
        1,
        ["ok", "aborted"],
    ),
    "a dead kernel": (
        ["1", "import os; os._exit(1)", "2"],
        {},
        DeadKernelError,
        "aborted",
        "DeadKernelError",
        1,
        ["ok", "aborted"],
    ),
    "sys.exit(0)": (["1", "import sys; sys.exit(0)", "2"], {}, None, "failed", "SystemExit", 1, ["ok", "error"]),
    "an interruption": (
        ["1", "raise KeyboardInterrupt", "2"],
        {},
        PapermillExecutionError,
        "failed",
        "KeyboardInterrupt",
        1,
        ["ok", "error"],
    ),
    "an error that a tag expects": (
        ["1", ("1 / 0", {"tags": ["raises-exception"]}), "2"],
        {},
        PapermillExecutionError,
        "completed",
        None,
        None,
        ["ok", "error", "ok"],
    ),
    "nothing to run": ([nbformat.v4.new_markdown_cell("text", id="m")], {}, None, "completed", None, None, []),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def execute(folder, cells, **settings):
    """Executes with papermill itself, as `papermill --engine audit` does; what it raised."""
    write_notebook(folder / "in.ipynb", cells)
    try:
        papermill.execute_notebook(
            folder / "in.ipynb", folder / "out.ipynb", engine_name="audit", progress_bar=False, **settings
        )
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("case", MATRIX)
def test_every_end_leaves_a_sealed_record_that_says_which(folder, case):
    cells, settings, raised, status, reason, position, recorded = MATRIX[case]
    error = execute(folder, cells, **settings)
    assert type(error) is (raised or type(None))
    opened = open_record(folder / "out.ipynb")
    assert (opened.verdict.level, opened.verdict.reasons) == (Level.UNANCHORED, ())
    cell = None if position is None else f"cell-{position}"
    assert (opened.sealed.status, opened.sealed.reason, opened.sealed.cell) == (status, reason, cell)
    bodies = [json.loads(entry.body) for entry in opened.entries if entry.type == "record.cell"]
    assert [body["status"] for body in bodies] == recorded
    assert verify_trail(folder / "audit").level is Level.UNANCHORED


def test_papermills_error_markers_are_tolerated_in_their_own_words_alone(folder):
    execute(folder, ["1", "1 / 0"])
    nb = json.loads((folder / "out.ipynb").read_bytes())
    assert [cell["cell_type"] for cell in nb["cells"]] == ["markdown", "code", "markdown", "code"]
    assert open_record(folder / "out.ipynb").verdict.level is Level.UNANCHORED
    nb["cells"][0]["source"][0] = nb["cells"][0]["source"][0].replace("An Exception", "No Exception")
    (folder / "out.ipynb").write_text(json.dumps(nb))
    verdict = open_record(folder / "out.ipynb").verdict
    assert verdict.level is Level.INVALID
    assert "cells[0]" in [reason.where for reason in verdict.reasons]


def test_a_failed_run_through_our_own_door_has_no_markers_and_names_the_cell(folder):
    write_notebook(folder / "in.ipynb", ["1", "1 / 0", "2"])
    with pytest.raises(NotebookFailedError, match=r"Cell 2 of 3 \(id cell-1\) raised ZeroDivisionError") as caught:
        run_notebook("in.ipynb", "out.ipynb")
    assert caught.value.exit_code == 1
    assert caught.value.result.position == 1
    nb = json.loads((folder / "out.ipynb").read_bytes())
    assert [cell["id"] for cell in nb["cells"]] == ["cell-0", "cell-1", "cell-2"]
    assert open_record("out.ipynb").verdict.level is Level.UNANCHORED


def test_a_cell_that_the_budget_refused_is_told_apart(folder):
    write_notebook(folder / "in.ipynb", ["class BudgetExceededError(Exception): pass\nraise BudgetExceededError('no')"])
    with pytest.raises(NotebookFailedError) as caught:
        run_notebook("in.ipynb", "out.ipynb")
    assert caught.value.exit_code == 3


def test_an_expected_error_is_no_failure(folder):
    write_notebook(folder / "in.ipynb", [("1 / 0", {"tags": ["raises-exception"]}), "2"])
    assert run_notebook("in.ipynb", "out.ipynb").status == "completed"


def test_a_run_that_died_with_its_kernel_is_interrupted_in_the_record(folder):
    error = execute(folder, [TRAINING, "training('d' * 32, 2, finish=False)\nos._exit(9)"])
    assert type(error) is DeadKernelError
    opened = open_record(folder / "out.ipynb")
    assert opened.verdict.level is Level.UNANCHORED
    assert [(run.run, run.status) for run in opened.verdict.runs] == [("d" * 32, "interrupted")]
    assert [entry.type for entry in opened.entries][-3:] == ["record.cell", "run.interrupted", "record.sealed"]


def test_only_the_runs_of_this_record_are_in_it(folder):
    code = "training('{}' * 32, 1).close()"
    assert execute(folder, [TRAINING, code.format("a")]) is None
    first = (folder / "out.ipynb").read_bytes()
    assert execute(folder, [TRAINING, code.format("b")]) is None
    opened = open_record(folder / "out.ipynb")
    assert [run.run for run in opened.verdict.runs] == ["b" * 32]
    (folder / "out.ipynb").write_bytes(first)
    assert [run.run for run in open_record(folder / "out.ipynb").verdict.runs] == ["a" * 32]


def test_a_record_that_is_run_again_loses_its_old_seal(folder):
    assert execute(folder, ["1"]) is None
    old = json.loads((folder / "out.ipynb").read_bytes())["metadata"]["rlhf_audit"]["record"]
    papermill.execute_notebook(folder / "out.ipynb", folder / "again.ipynb", engine_name="audit", progress_bar=False)
    opened = open_record(folder / "again.ipynb")
    assert opened.verdict.level is Level.UNANCHORED
    assert opened.metadata["record"] != old


def test_widgets_and_progress_bars_are_frozen(folder):
    cells = [
        "import ipywidgets\nipywidgets.IntSlider()",
        "import sys\nfor i in range(3):\n    print(f'\\r{i}', end='', file=sys.stderr, flush=True)",
        "for i in range(3):\n    print(i, flush=True)",
    ]
    assert execute(folder, cells) is None
    nb = json.loads((folder / "out.ipynb").read_bytes())
    assert "widgets" not in nb["metadata"]
    assert list(nb["cells"][0]["outputs"][0]["data"]) == ["text/plain"]
    assert nb["cells"][1]["outputs"][0]["text"] == ["2"]
    assert [output["text"] for output in nb["cells"][2]["outputs"]] == [["0\n", "1\n", "2\n"]]
    opened = open_record(folder / "out.ipynb")
    assert (opened.verdict.level, opened.notes) == (Level.UNANCHORED, ())


def test_the_kernel_is_told_where_the_trail_is_and_talks_over_private_sockets(folder, monkeypatch):
    code = (
        "import json, os\nfrom ipykernel.connect import get_connection_info\n"
        "names = 'RLHF_AUDIT_TRAIL', 'RLHF_AUDIT_RECORD'\n"
        "said = json.loads(get_connection_info())\n"
        "print(json.dumps([*map(os.environ.get, names), said['transport'], said['ip'], os.listdir()]))"
    )
    assert execute(folder, [code], audit_trail="elsewhere") is None
    opened = open_record(folder / "out.ipynb")
    trail, record, transport, address, beside = json.loads(opened.notebook.cells[0].outputs[0].text)
    assert (trail, record) == (str(folder / "elsewhere"), opened.metadata["record"])
    assert transport == "ipc"
    assert Path(address).is_absolute()
    assert not Path(address).parent.exists(), "the sockets were left behind"
    assert [name for name in beside if "ipc" in name] == []
    # A folder whose sockets' paths would be too long for the system: the kernel still starts.
    long = folder / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    assert execute(folder, [code]) is None
    assert json.loads(open_record(folder / "out.ipynb").notebook.cells[0].outputs[0].text)[2] == "tcp"


def test_the_papermill_command_finds_the_engine(folder, monkeypatch):
    from click.testing import CliRunner
    from papermill.cli import papermill as command

    write_notebook(folder / "in.ipynb", [("alpha = 1", {"tags": ["parameters"]}), "alpha"])
    monkeypatch.setenv("RLHF_AUDIT_TRAIL", str(folder / "trail"))
    arguments = ["--engine", "audit", "--no-progress-bar", "in.ipynb", "o.ipynb", "-p", "alpha", "3"]
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    opened = open_record(folder / "o.ipynb", policy=policy_of(folder / "trail"))
    assert opened.verdict.level is Level.UNANCHORED
    assert opened.started.parameters == {"alpha": 3}


def test_a_kernel_that_is_not_installed_is_named_before_anything_is_recorded(folder):
    write_notebook(folder / "in.ipynb", ["1"])
    with pytest.raises(RecordError, match="No kernel named 'nope'"):
        run_notebook("in.ipynb", "out.ipynb", kernel_name="nope")
    assert not (folder / "audit").exists()


def test_a_trail_that_cannot_be_opened_stops_the_run_before_the_first_cell(folder):
    (folder / "audit").write_text("a file")
    write_notebook(folder / "in.ipynb", [f"open({str(folder / 'ran')!r}, 'w')"])
    with pytest.raises(StoreError):
        run_notebook("in.ipynb", "out.ipynb")
    assert not (folder / "ran").exists()


def test_a_trail_that_breaks_while_it_runs_stops_it_and_leaves_no_seal(folder, monkeypatch):
    from rlhf_audit_nb.records.session import RecordSession

    def full(*_):
        raise StoreError("No space is left on the device.")

    monkeypatch.setattr(RecordSession, "seal", full)
    write_notebook(folder / "in.ipynb", ["1"])
    with pytest.raises(StoreError, match="No space"):
        run_notebook("in.ipynb", "out.ipynb")
    assert open_record("out.ipynb").verdict.reasons[0].code == "no-seal"


def test_progress_is_told_cell_by_cell(folder):
    write_notebook(folder / "in.ipynb", ["1", nbformat.v4.new_markdown_cell("m", id="m"), "2"])
    told = []
    run_notebook("in.ipynb", "out.ipynb", progress=lambda *state: told.append(state))
    assert told == [(0, 3, "running"), (0, 3, "ok"), (2, 3, "running"), (2, 3, "ok")]


def test_the_trail_alone_says_what_was_run(folder):
    assert execute(folder, ["1", "2"]) is None
    reader = TrailReader.open(folder / "audit")
    assert [entry.type for entry in reader.entries()] == [
        "trail.created",
        "record.started",
        "record.cell",
        "record.cell",
        "record.sealed",
    ]
    assert {entry.run for entry in reader.entries()} == {None}


@pytest.fixture
def interruptible():
    """SIGINT as Python handles it: a process that a shell started in the background begins with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("sent", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_an_interrupted_process_seals_what_there_is(folder, sent, raised, interruptible):
    write_notebook(folder / "in.ipynb", ["1", "import time\ntime.sleep(60)", "2"])

    def interrupt(position, _cells, state):
        if (position, state) == (1, "running"):
            threading.Timer(0.5, os.kill, (os.getpid(), sent)).start()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(raised):
        run_notebook("in.ipynb", "out.ipynb", progress=interrupt)
    assert signal.getsignal(signal.SIGTERM) is before
    opened = open_record("out.ipynb")
    assert opened.verdict.level is Level.UNANCHORED
    assert (opened.sealed.status, opened.sealed.reason, opened.sealed.cell) == ("aborted", raised.__name__, "cell-1")


@pytest.mark.parametrize("at", ["running", "ok"])
@pytest.mark.parametrize("wish", [KeyboardInterrupt, SystemExit])
def test_who_follows_the_progress_may_end_it_also_beside_a_loop_that_runs(folder, at, wish):
    """As in a notebook, where nbclient's loop has a thread of its own, which such an error would end."""
    write_notebook(folder / "in.ipynb", ["1", "2", "3"])

    def told(position, _cells, state):
        if (position, state) == (1, at):
            raise wish

    async def cell():
        with pytest.raises(wish):
            run_notebook("in.ipynb", "out.ipynb", progress=told)

    run_loop(cell())
    opened = open_record("out.ipynb")
    assert opened.verdict.level is Level.UNANCHORED
    assert (opened.sealed.status, opened.sealed.reason) == ("aborted", wish.__name__)
    assert opened.sealed.cell == ("cell-1" if at == "running" else None)


def test_the_engine_can_be_imported_before_papermill_is():
    """Papermill asks for the engines of all packages while it is imported, the engine for papermill."""
    code = "import rlhf_audit_nb.records.engine; from papermill.engines import papermill_engines as known;"
    code += "print(known.get_engine('audit').__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("rlhf_audit_nb.records.entry_point", 0), done.stderr
