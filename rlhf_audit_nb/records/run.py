"""Running a notebook into a record from Python or the command line. Floor 3.

`run_notebook` checks everything that can be checked before the first cell runs (the notebook, its parameters, the
output path, the kernel), executes through the engine `audit`, and says in which cell it failed. A failed execution
leaves a sealed record as well; the error that is raised carries its `RunResult`.

Notebook and record may lie wherever papermill can read and write (`places`). Papermill itself is handed the notebook
and no path at all: the record is written once, when it is sealed.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from rlhf_audit_nb.config import AuditConfig
from rlhf_audit_nb.errors import AuditError, RecordError
from rlhf_audit_nb.records.normal_form import SEAL_KEY
from rlhf_audit_nb.records.parameters import Parameter, check_values, parameters_of, typed_values
from rlhf_audit_nb.records.places import Place, check_output, is_file, load_notebook, shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlhf_audit_nb.records.session import Outcome

__all__ = [
    "NotebookFailedError",
    "NotebookRefusedError",
    "RunResult",
    "Terminated",
    "check_parameters",
    "notebook_parameters",
    "read_parameters",
    "run_notebook",
]

# Raised inside a cell by this package where a budget, a gate or a guarantee says no.
REFUSALS = frozenset({"BudgetExceededError", "PrivacyError", "UnsupportedTrainerError"})


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Args:
        path: the record: a file, or the address where it was written.
        record: its id.
        status: ``completed``, ``failed`` or ``aborted``.
        reason: name of what was raised, or ``None``.
        cell: id of the cell in which it failed.
        position: that cell's place in the notebook, from 0.
        trail: the trail's folder.
    """

    path: Place
    record: str
    status: str
    reason: str | None
    cell: str | None
    position: int | None
    trail: Path


class NotebookFailedError(RecordError):
    """A cell failed or the execution was cut short; the record is sealed and says so (``result``).

    ``said`` is what was raised in the cell, by name and in its own words, as the record holds it; empty where the
    cell has no such output.
    """

    code: ClassVar[str] = "notebook-failed"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, result: RunResult, next_step: str = "", said: str = "") -> None:
        super().__init__(message, next_step=next_step)
        self.result = result
        self.said = said


class NotebookRefusedError(NotebookFailedError):
    """A cell was refused by the privacy budget or by the engine's own limits."""

    code: ClassVar[str] = "notebook-refused"
    exit_code: ClassVar[int] = 3


# -- before anything runs ---------------------------------------------------------------------------------------


def notebook_parameters(notebook: Place) -> dict[str, Parameter] | None:
    """The assignments of the cell tagged ``parameters``, by name; ``None`` where no cell has that tag.

    Raises:
        RecordError: the notebook cannot be read, or its parameters cell cannot.
    """
    return parameters_of(load_notebook(notebook))


def check_parameters(notebook: Place, parameters: Mapping[str, Any]) -> None:
    """Checks values against the notebook's parameters cell.

    Raises:
        RecordError: there is no such cell, a name is not assigned in it (with the closest one that is), or a value is
            of another type than the default or its annotation.
    """
    if parameters:
        check_values(shown(notebook), notebook_parameters(notebook), parameters)


def read_parameters(notebook: Place, pairs: Mapping[str, str]) -> dict[str, Any]:
    """Values typed on a command line, read as the types that the notebook's parameters have.

    ``1`` becomes text where the default is text, a float where it is a float; lists and dictionaries are JSON or
    Python literals. Where the notebook does not say, numbers, ``true``, ``false`` and ``none`` are read as such.

    Raises:
        RecordError: as `check_parameters`.
    """
    return typed_values(shown(notebook), notebook_parameters(notebook), pairs) if pairs else {}


class Terminated(SystemExit):
    """SIGTERM came (a batch system ends the job): seals like an interruption, then ends the process."""


@contextlib.contextmanager
def _sealing_on_sigterm() -> Iterator[None]:
    """While it lasts, SIGTERM raises `Terminated` where Python's default would end the process without a seal."""
    from rlhf_audit_nb.trail.ending import on_sigterm

    ours = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    if not ours or before not in (signal.SIG_DFL, on_sigterm):  # the trail's own flush comes with the seal's
        yield
        return

    def terminate(_signal: int, _frame: object) -> None:
        raise Terminated(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -- running ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sealed:
    """What the engine told when it had sealed; papermill puts its markers into the same notebook afterwards."""

    record: str
    outcome: Outcome
    sealed: bool
    cells: int
    ran: bool
    said: str

    @classmethod
    def of(cls, record: str, outcome: Outcome, notebook: Mapping[str, Any]) -> Self:
        cells = notebook["cells"]
        ran = any(cell.get("execution_count") for cell in cells)
        sealed = SEAL_KEY in notebook["metadata"]
        return cls(record, outcome, sealed, len(cells), ran, _said(cells, outcome.cell))


def _said(cells: Sequence[Mapping[str, Any]], cell: str | None) -> str:
    """What was raised in a cell, from its last error output: the name, and the error's own words."""
    found = [output for one in cells if one.get("id") == cell for output in one.get("outputs", ())]
    errors = [output for output in found if output["output_type"] == "error"]
    return f"{errors[-1]['ename']}: {errors[-1]['evalue']}".rstrip(": \n") if errors else ""


def _failure(result: RunResult, told: _Sealed, error: BaseException | None) -> NotebookFailedError:
    kind = NotebookRefusedError if result.reason in REFUSALS else NotebookFailedError
    step, said = "Open the record to see the cell's output.", told.said
    if result.position is not None:
        words = {"failed": "raised", "aborted": "was cut short by"}[result.status]
        what = f"Cell {result.position + 1} of {told.cells} (id {result.cell}) {words} {result.reason}"
    else:
        what = (
            f"The run was cut short by {result.reason} {'outside its cells' if told.ran else 'before the first cell'}"
        )
        step = "Check that the kernel starts: `jupyter kernelspec list` shows where it is described."
        said = f"{result.reason}: {error}" if error is not None else ""
    message = f"{what}; the record {shown(result.path)} is sealed with status {result.status!r}."
    return kind(message, result=result, next_step=step, said=said)


def run_notebook(
    notebook: Place,
    output: Place,
    parameters: Mapping[str, Any] | None = None,
    *,
    trail: Path | str | None = None,
    config: AuditConfig | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    kernel_name: str | None = None,
    cwd: Path | str | None = None,
    cell_timeout: int | None = None,
) -> RunResult:
    """Executes a notebook into a signed record.

    Args:
        notebook: what to run: a file, an address such as ``s3://bucket/n.ipynb``, or ``-`` for standard input.
        output: where the record goes, likewise (``-`` is standard output); an address must not be that of
            ``notebook``. A file there holds the unfinished notebook, without a seal, while it runs; at an address
            nothing is written before the sealed record.
        parameters: values for the cell tagged ``parameters``; checked against its names and types.
        trail: the trail's folder; ``None`` takes the configuration's, else ``RLHF_AUDIT_TRAIL``, else ``audit`` in the
            working directory.
        config: whether a copy of the record is kept beside the trail.
        progress: called with a code cell's position (from 0), the number of cells and its state: ``running``, ``ok``,
            ``error`` or ``aborted``.
        kernel_name: another kernel than the notebook names.
        cwd: working directory of the kernel; ``None`` keeps this process's.
        cell_timeout: seconds that one cell may take; ``None`` sets no bound.

    Raises:
        RecordError: something is wrong before anything ran; or the record could not be written to its place, and the
            message says where it is.
        NotebookFailedError, NotebookRefusedError: a cell failed; the record is sealed, its ``result`` says where.
        KeyboardInterrupt, Terminated: this process was interrupted or told to end; the record is sealed as aborted.
    """
    from rlhf_audit_nb.records.kernels import kernel_named
    from rlhf_audit_nb.records.session import refuse_secrets

    node = load_notebook(notebook)
    kernel = kernel_named(kernel_name or _own_kernel(node, notebook))
    values = {name: _plain(value) for name, value in (parameters or {}).items()}
    if values:
        check_values(shown(notebook), parameters_of(node, kernel["language"]), values)
    refuse_secrets(node, values)
    check_output(notebook, output)
    folder = _working_folder(cwd)
    config = config or AuditConfig()
    location = (Path(trail) if trail is not None else config.trail_location()).absolute()
    settings = {
        "kernel_name": kernel["name"],
        "language": kernel["language"],
        "cwd": str(folder) if folder is not None else None,
        "execution_timeout": cell_timeout,
        "audit_trail": location,
        "audit_config": config,
        "audit_progress": progress,
        "audit_source": _settled(notebook),
        "audit_output": _settled(output),
    }
    return _execute(node, values, settings, output if not is_file(output) else Path(output), location)


def _own_kernel(node: Any, notebook: Place) -> str:
    name = node.metadata.get("kernelspec", {}).get("name")
    if not name:
        raise RecordError(
            f"{shown(notebook)} names no kernel, so it is not known what should run it.",
            next_step="Name one with --kernel, such as --kernel python3.",
            code="no-kernel",
        )
    return str(name)


def _plain(value: Any) -> Any:
    """JSON has lists where Python has tuples."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _working_folder(cwd: Path | str | None) -> Path | None:
    if cwd is None or Path(cwd).is_dir():
        return None if cwd is None else Path(cwd)
    raise RecordError(f"There is no folder {cwd} to run in.", next_step="Name a folder that exists.", code="cwd")


def _settled(place: Place) -> Place:
    """A file by its whole path, since the kernel's folder may be another one."""
    return Path(place).absolute() if is_file(place) else place


def _execute(node: Any, values: dict[str, Any], settings: dict[str, Any], output: Place, location: Path) -> RunResult:
    import papermill
    from papermill.engines import papermill_engines

    from rlhf_audit_nb.records.engine import ENGINE, AuditEngine

    # Registered here as well as by entry point, so that a source tree that is not installed runs too.
    papermill_engines.register(ENGINE, AuditEngine)
    told: list[_Sealed] = []
    raised: Exception | None = None
    try:
        with _sealing_on_sigterm():
            papermill.execute_notebook(
                node,
                None,
                values,
                engine_name=ENGINE,
                progress_bar=False,
                audit_outcome=lambda *what: told.append(_Sealed.of(*what)),
                **settings,
            )
    except AuditError:
        raise
    except Exception as error:
        # A failed cell, a time-out, a dead kernel: sealed, and told below by the outcome. Anything that kept the
        # record from being sealed goes on as it is.
        if not told or not told[0].sealed:
            raise
        raised = error
    record, outcome = told[0].record, told[0].outcome
    result = RunResult(output, record, outcome.status, outcome.reason, outcome.cell, outcome.position, location)
    if outcome.status != "completed":
        raise _failure(result, told[0], raised)
    return result
