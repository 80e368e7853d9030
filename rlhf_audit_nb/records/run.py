"""Running a notebook into a record from Python or the command line. Floor 3.

`run_notebook` checks everything that can be checked before the first cell runs (the notebook, its parameters, the
output path, the kernel), executes through the engine `audit`, and says in which cell it failed. A failed execution
leaves a sealed record as well; the error that is raised carries its `RunResult`.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import json
import math
import os
import signal
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import nbformat

from rlhf_audit_nb.config import AuditConfig
from rlhf_audit_nb.errors import AuditError, RecordError
from rlhf_audit_nb.records.normal_form import NormalFormError, canonical_json, parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from rlhf_audit_nb.records.session import Outcome

__all__ = [
    "NotebookFailedError",
    "NotebookRefusedError",
    "Parameter",
    "RunResult",
    "Terminated",
    "check_parameters",
    "notebook_parameters",
    "read_parameters",
    "run_notebook",
]

PARAMETERS_TAG = "parameters"
# Raised inside a cell by this package where a budget, a gate or a guarantee says no.
REFUSALS = frozenset({"BudgetExceededError", "PrivacyError", "UnsupportedTrainerError"})


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Args:
        path: the record.
        record: its id.
        status: ``completed``, ``failed`` or ``aborted``.
        reason: name of what was raised, or ``None``.
        cell: id of the cell in which it failed.
        position: that cell's place in the notebook, from 0.
        trail: the trail's folder.
    """

    path: Path
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


@dataclass(frozen=True)
class Parameter:
    """One assignment of a notebook's parameters cell.

    Args:
        name: the variable.
        annotation: its type as annotated, such as ``int | None``; empty where there is none.
        default: its value, or the source text of it where it is no literal (``literal`` is then false).
        literal: whether ``default`` is a value.
        help: the comment beside it.
    """

    name: str
    annotation: str
    default: Any
    literal: bool
    help: str


# -- before anything runs ---------------------------------------------------------------------------------------


_NO_NOTEBOOK = "Name a whole .ipynb file; if this one was a notebook, restore it from a copy."


def _load(notebook: Path) -> Any:
    try:
        data = notebook.read_bytes()
    except OSError as error:
        raise RecordError(
            f"The notebook {notebook} cannot be read: {error.strerror or error}.",
            next_step="Name an .ipynb file that exists.",
            code="no-notebook",
        ) from error
    try:
        value = parse_json(data)
        with warnings.catch_warnings():
            # Old notebooks have cells without ids; papermill gives them some.
            warnings.simplefilter("ignore", nbformat.warnings.MissingIDFieldWarning)
            nbformat.validate(value)
        return nbformat.reads(data.decode(), as_version=4)
    except NormalFormError as error:
        raise RecordError(
            f"{notebook} is not a notebook. {error.message}", next_step=_NO_NOTEBOOK, code="not-a-notebook"
        ) from error
    except (nbformat.ValidationError, nbformat.reader.NotJSONError, AttributeError, KeyError, TypeError) as error:
        line = str(error).splitlines()[0]
        raise RecordError(
            f"{notebook} is not a notebook: {line}", next_step=_NO_NOTEBOOK, code="not-a-notebook"
        ) from error


def notebook_parameters(notebook: Path | str) -> dict[str, Parameter] | None:
    """The assignments of the cell tagged ``parameters``, by name; ``None`` where no cell has that tag.

    Raises:
        RecordError: the file is not a notebook.
    """
    node = _load(Path(notebook))
    cells = [cell for cell in node.cells if PARAMETERS_TAG in cell.metadata.get("tags", [])]
    if not cells:
        return None
    try:
        return {found.name: found for found in _python_parameters(cells[0].source)}
    except SyntaxError:
        # Another language, which papermill may know.
        from papermill import inspect_notebook

        return {name: _foreign_parameter(entry) for name, entry in inspect_notebook(node).items()}


def _value(text: str) -> tuple[Any, bool]:
    try:
        return ast.literal_eval(text), True
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text, False


def _python_parameters(source: str) -> Iterator[Parameter]:
    """Every ``name = value`` and ``name: type = value`` of the cell; papermill itself overlooks ``int | None``."""
    lines = ["" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()]
    for node in ast.parse("\n".join(lines)).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(target, ast.Name) or node.value is None:
            continue
        annotation = "" if isinstance(node, ast.Assign) else _annotation(node.annotation)
        default, literal = _value(ast.unparse(node.value))
        beside = lines[(node.end_lineno or node.lineno) - 1].encode()[node.end_col_offset or 0 :].decode()
        yield Parameter(target.id, annotation, default, literal, beside.partition("#")[2].strip())


def _annotation(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ast.unparse(node)


def _foreign_parameter(entry: Mapping[str, str]) -> Parameter:
    annotation = "" if entry["inferred_type_name"] == "None" else entry["inferred_type_name"]
    default, literal = _value(entry["default"])
    return Parameter(entry["name"], annotation, default, literal, entry["help"])


_KINDS: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "list": (list,),
    "dict": (dict,),
}
_NONE = type(None)


def _allowed(parameter: Parameter) -> tuple[type, ...] | None:
    """The types that a value may have; ``None`` where the notebook does not say."""
    text = parameter.annotation.replace("Optional[", "None | ").rstrip("]")
    names = [name.strip().split("[")[0].lower() for name in text.split("|") if name.strip()]
    if names:
        if any(name not in _KINDS and name != "none" for name in names):
            return None
        return tuple(kind for name in names for kind in _KINDS.get(name, (_NONE,)))
    if not parameter.literal or parameter.default is None:
        return None
    return _KINDS.get(type(parameter.default).__name__)


def _fits(value: Any, allowed: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in allowed
    return isinstance(value, allowed)


def _wanted(allowed: tuple[type, ...]) -> str:
    names = [kind.__name__ for kind in allowed if kind is not _NONE]
    return "float" if names == ["int", "float"] else " or ".join(names)


def _no_cell(notebook: Path | str, names: list[str]) -> RecordError:
    return RecordError(
        f"{notebook} has no cell tagged {PARAMETERS_TAG!r}, so {names[0]!r} cannot be set.",
        next_step=f"Tag the cell that assigns the defaults with {PARAMETERS_TAG!r}, or run without parameters.",
        code="no-parameters-cell",
    )


def _unknown(name: str, known: Mapping[str, Parameter]) -> RecordError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return RecordError(
        f"The notebook has no parameter {name!r}.",
        next_step=f"{hint}It has: {', '.join(sorted(known)) or 'none'}.",
        code="unknown-parameter",
    )


def check_parameters(notebook: Path | str, parameters: Mapping[str, Any]) -> None:
    """Checks values against the notebook's parameters cell.

    Raises:
        RecordError: there is no such cell, a name is not assigned in it (with the closest one that is), or a value is
            of another type than the default or its annotation.
    """
    if not parameters:
        return
    known = notebook_parameters(notebook)
    if known is None:
        raise _no_cell(notebook, list(parameters))
    for name, value in parameters.items():
        if name not in known:
            raise _unknown(name, known)
        allowed = _allowed(known[name])
        if allowed is not None and not _fits(value, allowed):
            raise RecordError(
                f"Parameter {name!r} is {value!r}; the notebook takes {_wanted(allowed)} there.",
                next_step=f"Its default is {known[name].default!r}.",
                code="parameter-type",
            )
        _check_json(name, value)


def _check_json(name: str, value: Any) -> None:
    try:
        canonical_json(value)
    except NormalFormError as error:
        raise RecordError(
            f"Parameter {name!r} is {value!r}, which a record cannot hold: {error.message}",
            next_step="Use text, finite numbers, true or false, null, lists and dictionaries of these.",
            code="parameter-type",
        ) from error


def _as_text(text: str) -> Any:
    for word, value in (("true", True), ("false", False), ("none", None), ("null", None)):
        if text.lower() == word:
            return value
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            number = kind(text)
            return number if math.isfinite(number) else text
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(text)
        if isinstance(value, (list, dict)):
            return value
    return text


def read_parameters(notebook: Path | str, pairs: Mapping[str, str]) -> dict[str, Any]:
    """Values typed on a command line, read as the types that the notebook's parameters have.

    ``1`` becomes text where the default is text, a float where it is a float; lists and dictionaries are Python
    literals. Where the notebook does not say, numbers, ``true``, ``false`` and ``none`` are read as such.

    Raises:
        RecordError: as `check_parameters`.
    """
    known = notebook_parameters(notebook) if pairs else {}
    if known is None:
        raise _no_cell(notebook, list(pairs))
    values: dict[str, Any] = {}
    for name, text in pairs.items():
        if name not in known:
            raise _unknown(name, known)
        allowed = _allowed(known[name])
        value = _as_text(text)
        if allowed is not None and str in allowed and not _fits(value, allowed):
            value = text
        elif allowed is not None and isinstance(value, int) and not isinstance(value, bool) and float in allowed:
            value = float(value)
        values[name] = value
    check_parameters(notebook, values)
    return values


def _check_output(notebook: Path, output: Path) -> None:
    if output.suffix != ".ipynb":
        raise RecordError(
            f"The record {output} would not end in .ipynb.",
            next_step=f"Write -o {output.with_suffix('.ipynb')}.",
            code="output",
        )
    if output.exists() and output.resolve() == notebook.resolve():
        raise RecordError(
            f"The record would overwrite the notebook {notebook}.",
            next_step="Name another file with -o.",
            code="output",
        )
    try:
        if output.exists():
            with output.open("ab"):
                pass
        else:
            with tempfile.NamedTemporaryFile(dir=output.parent, prefix=".rlhf-audit-"):
                pass
    except OSError as error:
        raise RecordError(
            f"The record {output} cannot be written: {error.strerror or error}.",
            next_step="Name a file in a folder that exists and that you may write to, with -o.",
            code="output",
        ) from error


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


def _write_sealed(path: Path, text: str) -> None:
    """Replaces the file whole: a reader sees the old bytes or the new ones."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(path.stat().st_mode if path.exists() else 0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _said(record: str, cell: str | None) -> str:
    """What was raised in a cell, from its last error output: the name, and the error's own words."""
    cells = [found for found in json.loads(record)["cells"] if found.get("id") == cell]
    errors = [out for found in cells for out in found.get("outputs", ()) if out["output_type"] == "error"]
    return f"{errors[-1]['ename']}: {errors[-1]['evalue']}".rstrip(": \n") if errors else ""


def _failure(result: RunResult, cells: int, record: str) -> NotebookFailedError:
    kind = NotebookRefusedError if result.reason in REFUSALS else NotebookFailedError
    words = {"failed": "raised", "aborted": "was cut short by"}[result.status]
    where = f"Cell {result.position + 1} of {cells} (id {result.cell})" if result.position is not None else "The run"
    return kind(
        f"{where} {words} {result.reason}; the record {result.path} is sealed with status {result.status!r}.",
        result=result,
        next_step="Open the record to see the cell's output.",
        said=_said(record, result.cell),
    )


def run_notebook(
    notebook: Path | str,
    output: Path | str,
    parameters: Mapping[str, Any] | None = None,
    *,
    trail: Path | str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    kernel_name: str | None = None,
    cwd: Path | str | None = None,
    cell_timeout: int | None = None,
) -> RunResult:
    """Executes a notebook into a record.

    Args:
        notebook: the source; it is not changed.
        output: the record, an ``.ipynb`` in a folder that exists.
        parameters: values for the notebook's parameters cell.
        trail: the trail's folder; ``None`` takes ``RLHF_AUDIT_TRAIL``, else ``audit`` in the working directory.
        progress: called with a code cell's position (from 0), the number of cells and its state: ``running``, ``ok``,
            ``error`` or ``aborted``.
        kernel_name: another kernel than the notebook names.
        cwd: working directory of the kernel; ``None`` keeps this process's.
        cell_timeout: seconds that one cell may take; ``None`` sets no bound.

    Raises:
        RecordError: something is wrong before anything ran.
        NotebookFailedError, NotebookRefusedError: a cell failed; the record is sealed, its ``result`` says where.
        KeyboardInterrupt, Terminated: this process was interrupted or told to end; the record is sealed as aborted.
    """
    from rlhf_audit_nb.records.session import refuse_secrets

    source, target = Path(notebook), Path(output)
    node = _load(source)
    values = dict(parameters or {})
    check_parameters(source, values)
    refuse_secrets(node, values)
    _check_output(source, target)
    location = Path(trail) if trail is not None else AuditConfig().trail_location()
    return _execute(node, source, target, values, location.absolute(), progress, kernel_name, cwd, cell_timeout)


def _execute(
    node: Any,
    source: Path,
    target: Path,
    parameters: dict[str, Any],
    location: Path,
    progress: Callable[[int, int, str], None] | None,
    kernel_name: str | None,
    cwd: Path | str | None,
    cell_timeout: int | None,
) -> RunResult:
    import papermill
    from papermill.engines import papermill_engines

    from rlhf_audit_nb.records.engine import ENGINE, AuditEngine

    # Registered here as well as by entry point, so that a source tree that is not installed runs too.
    papermill_engines.register(ENGINE, AuditEngine)
    ended: list[tuple[str, Outcome]] = []
    sealed: list[str] = []

    def remember(record: str, outcome: Outcome) -> None:
        ended.append((record, outcome))
        sealed.append(target.read_text(encoding="utf-8"))

    try:
        with _sealing_on_sigterm():
            papermill.execute_notebook(
                _unformatted(source),
                _unformatted(target.absolute()),
                parameters,
                engine_name=ENGINE,
                kernel_name=kernel_name,
                progress_bar=False,
                cwd=str(cwd) if cwd is not None else None,
                execution_timeout=cell_timeout,
                audit_trail=location,
                audit_progress=progress,
                audit_outcome=remember,
            )
    except AuditError:
        raise
    except Exception:
        # A failed cell, a time-out, a dead kernel: sealed, and told below by the outcome. Anything that kept the
        # record from being sealed goes on as it is.
        if not sealed:
            raise
    record, outcome = ended[0]
    # Papermill adds two marker cells to a failed notebook after the engine has sealed it: put the sealed one back.
    _write_sealed(target, sealed[0])
    result = RunResult(target, record, outcome.status, outcome.reason, outcome.cell, outcome.position, location)
    if outcome.status != "completed":
        raise _failure(result, len(node.cells), sealed[0])
    return result


def _unformatted(path: Path) -> str:
    """The path with its braces doubled, since papermill fills them in as a format string."""
    return str(path).replace("{", "{{").replace("}", "}}")
