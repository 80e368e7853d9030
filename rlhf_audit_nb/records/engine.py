"""The papermill engine ``audit``: executes a notebook into a record. Floor 3.

``papermill --engine audit IN.ipynb OUT.ipynb`` (or `run.run_notebook`) runs as papermill's own engine does, and at
the end, however it ends, writes the notebook with its seal. The trail is the keyword ``audit_trail``, else
``RLHF_AUDIT_TRAIL``, else ``audit`` in the working directory.

Before the first cell, and before anything is written: the parameters that papermill was given are held against the
notebook's parameters cell, since papermill itself puts any name and any type into the notebook.

Why the whole of ``execute_notebook`` is ours: papermill completes its own metadata after the managed execution
returns, and a seal must come after the last change. What papermill does later (its error markers around a failed
cell) is in the normal form's list of exceptions, word for word. Papermill's own statuses are not used: after a
time-out or a dead kernel they call cells completed that never ran. The outcome is derived from what the hooks saw.

While it runs, the unfinished notebook (which has no seal) is kept at its place as it began and then from time to time
(`_Keeper`): papermill's own would write it twice a cell. At an address (``s3://`` and the like) nothing is written
before the sealed record, so that nothing there looks finished and is not.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import zmq
from nbclient.exceptions import CellExecutionError
from nbclient.output_widget import OutputWidget
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, NotebookExecutionManager
from papermill.iorw import write_ipynb
from papermill.log import logger
from papermill.utils import merge_kwargs, remove_args
from traitlets.config import Config

from rlhf_audit_nb.capture.secrets import scrub_values
from rlhf_audit_nb.config import AuditConfig
from rlhf_audit_nb.errors import RecordError
from rlhf_audit_nb.events import RecordStarted
from rlhf_audit_nb.records.checks import check_parameters
from rlhf_audit_nb.records.kept import kept_record
from rlhf_audit_nb.records.kernels import kernel_named
from rlhf_audit_nb.records.normal_form import SEAL_KEY
from rlhf_audit_nb.records.parameters import INJECTED_TAG, check_values, parameters_of
from rlhf_audit_nb.records.places import base_name, is_file, replace_file, shown, write_place
from rlhf_audit_nb.records.session import Outcome, RecordSession
from rlhf_audit_nb.records.widgets import with_captured

if TYPE_CHECKING:
    from collections.abc import Callable

    Progress = Callable[[int, int, str], None]

__all__ = ["ENGINE", "AuditEngine", "AuditedClient"]

ENGINE = "audit"
ENV_NOTEBOOK = "JPY_SESSION_NAME"
"""Where Jupyter's server tells a kernel the path of its notebook."""

_SOCKET_PATH = 103  # sun_path of the BSDs, less its final zero; Linux has 107
_SAVE_SECONDS = 10.0  # between two copies of the unfinished notebook, at least
_SAVE_SHARE = 0.01  # of the time, at most, for writing them
# What papermill's user may ask it to put in: they stand in no parameters cell.
_INJECTED_PATHS = frozenset({"PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH"})
_PAPERMILL_HINT = "For papermill -r NAME VALUE gives text, and -y YAML any other type."


class _EndAskedError(Exception):
    """Carries a wish to end out of a coroutine.

    An interrupt or exit that is raised within one ends the loop that runs it. Where that loop has a thread of its own,
    as in a notebook, whoever waits for its answer would wait for ever.
    """

    def __init__(self, wish: BaseException) -> None:
        super().__init__(wish)
        self.wish = wish


class _Watch:
    """What happened to the cells: which one runs, and in which one it stopped."""

    def __init__(self, session: RecordSession, progress: Progress | None, cells: int) -> None:
        self._session = session
        self._progress = progress
        self._cells = cells
        self._running: tuple[dict[str, Any], int] | None = None
        self.failed: Outcome | None = None
        self.shown: Callable[[list[Any]], list[Any]] = list

    def _tell(self, position: int, state: str) -> None:
        if self._progress is not None:
            self._progress(position, self._cells, state)

    def _ended(self, cell: dict[str, Any], position: int, status: str) -> None:
        self._running = None
        cell["outputs"] = _scrubbed(cell["outputs"])
        # Only as it is digested: what a widget captures may grow until the end, and is put in then.
        self._session.cell_executed({**cell, "outputs": self.shown(cell["outputs"])}, position, status)
        self._tell(position, status)

    def settle(self, nb: dict[str, Any]) -> None:
        """Puts what widgets captured into the cells that show them, and takes out secrets that came by an update."""
        for cell in nb["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = _scrubbed(self.shown(cell["outputs"]))

    def execute(self, cell: dict[str, Any], cell_index: int) -> None:
        """Hook: the cell is about to be sent to the kernel."""
        self._running = (cell, cell_index)
        with _carried():
            self._tell(cell_index, "running")

    def executed(self, cell: dict[str, Any], cell_index: int, execute_reply: dict[str, Any] | None) -> None:
        """Hook: the kernel has answered and all outputs are there (no answer: it was interrupted by a time-out)."""
        answer = execute_reply["content"]["status"] if execute_reply else "aborted"
        with _carried():
            self._ended(cell, cell_index, {"ok": "ok", "aborted": "aborted"}.get(answer, "error"))

    def stopped(self, cell: dict[str, Any], position: int, error: CellExecutionError) -> None:
        """The execution ends here: the cell raised, and nothing in it allows that."""
        self.failed = Outcome("failed", reason=error.ename, cell=cell["id"], position=position)

    def aborted(self, error: BaseException) -> Outcome:
        """The outcome where the execution itself was cut short."""
        name = type(error).__name__
        if self._running is None:
            return self.failed or Outcome("aborted", reason=name)
        cell, position = self._running
        self._ended(cell, position, "aborted")
        return Outcome("aborted", reason=name, cell=cell["id"], position=position)


@contextmanager
def _carried() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as wish:
        raise _EndAskedError(wish) from wish


def _scrubbed(outputs: list[Any]) -> list[Any]:
    return [nbformat.from_dict(output) for output in scrub_values(outputs)]


@contextmanager
def _private_sockets() -> Iterator[dict[str, Any]]:
    """Settings that keep a kernel's messages, which carry the notebook's data, off TCP, where they can be had.

    The sockets lie in a folder that only this user can enter. Their address has to be given: without one, Jupyter
    makes them in the working directory.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-audit-") as folder:
        address = os.path.join(folder, "kernel")  # noqa: PTH118 - its length in bytes is what counts
        if os.name != "posix" or len(os.fsencode(address)) + len("-5") > _SOCKET_PATH:
            yield {}
        else:
            yield {"config": Config({"ConnectionFileMixin": {"transport": "ipc", "ip": address}})}


class _Output(OutputWidget):
    """nbclient's stand-in for an ``Output`` widget, without its race.

    It sends on the very socket on which the cell's answer is awaited, past asyncio; an answer that comes at that
    moment would never be noticed, and the run would wait for ever. Asking for the socket's events makes asyncio look.
    """

    def send(self, *what: Any, **more: Any) -> None:
        """Sends the widget's state to the kernel."""
        super().send(*what, **more)
        self.kernel_client.shell_channel.socket.get(zmq.EVENTS)


class AuditedClient(PapermillNotebookClient):
    """Papermill's client, with an environment for the kernel and an eye on where the execution stops."""

    def __init__(self, nb_man: Any, *, environment: dict[str, str], watch: _Watch, **settings: Any) -> None:
        hooks = {"on_cell_execute": watch.execute, "on_cell_executed": watch.executed}
        super().__init__(nb_man, **settings, **hooks)
        self.widget_registry = {"@jupyter-widgets/output": {"OutputModel": _Output}}
        self._environment = environment
        self._watch = watch
        watch.shown = self._shown

    def _shown(self, outputs: list[Any]) -> list[Any]:
        """A cell's outputs with what the widgets in them captured."""
        held = {model: widget.outputs for model, widget in self.comm_objects.items() if hasattr(widget, "outputs")}
        return with_captured(outputs, self.widget_state, held)

    def execute(self, **settings: Any) -> Any:
        """Executes the notebook; the kernel starts with the audit's environment."""
        return super().execute(env=self._environment, **settings)

    def papermill_execute_cells(self) -> None:
        """Asks the kernel for its language before the first cell, so that an aborted record names it too."""
        reply = self.wait_for_reply(self.kc.kernel_info())
        self.nb.metadata["language_info"] = reply["content"]["language_info"]
        super().papermill_execute_cells()

    def execute_cell(self, cell: dict[str, Any], cell_index: int, **settings: Any) -> Any:
        """Executes one cell; notes the cell that ends the execution."""
        # As front ends do, so that a run which the cell opens knows it by its id.
        self.kc.session.metadata = {"cellId": cell["id"]}
        try:
            return super().execute_cell(cell, cell_index, **settings)
        except CellExecutionError as error:
            self._watch.stopped(cell, cell_index, error)
            raise
        except _EndAskedError as asked:
            raise asked.wish from None


class _Keeper(NotebookExecutionManager):
    """Papermill's bookkeeping, which keeps the unfinished notebook seldom enough to cost nothing.

    A copy that cannot be written (a full disk) is told of and tried again: it must not end the training that it is
    a copy of.
    """

    def __init__(self, nb: Any, output_path: str | None, **settings: Any) -> None:
        kept_at = output_path if output_path is not None and is_file(output_path) else None
        super().__init__(nb, output_path=kept_at, **settings)
        self._next = 0.0

    def save(self, **_: Any) -> None:
        """Writes the notebook as it stands, where the last time is long enough ago."""
        began = time.monotonic()
        if self.output_path is None or began < self._next:
            return
        try:
            write_ipynb(self.nb, self.output_path)
        except OSError as error:
            logger.warning("The unfinished notebook could not be kept at %s: %s", self.output_path, error)
        ended = time.monotonic()
        self._next = ended + max(_SAVE_SECONDS, (ended - began) / _SAVE_SHARE)
        self.last_save_time = self.now()


def _check_parameters(nb: Any, kernel: dict[str, str]) -> None:
    """Holds what papermill put in against the parameters cell; parameters that are in no cell are no parameters."""
    metadata = nb["metadata"]["papermill"]
    if not any(INJECTED_TAG in cell["metadata"].get("tags", []) for cell in nb["cells"]):
        metadata["parameters"] = {}  # of an earlier execution, whose cell is gone
    given = metadata.get("parameters") or {}
    named = {name: value for name, value in given.items() if name not in _INJECTED_PATHS}
    check_values("The notebook", parameters_of(nb, kernel["language"]), named, _PAPERMILL_HINT)
    # The verifier's own check: an injected cell of an earlier execution may have been edited since, and papermill
    # writes what is no JSON value (a tuple) into the cell as text.
    started = RecordStarted(record="", notebook_digest="", parameters=given, tool="", kernel=kernel)
    for reason in check_parameters(nb, started):
        raise RecordError(
            f"The cell tagged {INJECTED_TAG!r} does not hold the parameters that were given. {reason.message}",
            next_step="Delete that cell if it is of an earlier execution, and give the parameters as JSON values.",
            code="parameter-changed",
        )


def _name_places(metadata: dict[str, Any], source: object, output: Path | str | None) -> None:
    """Leaves file names where papermill puts paths: a record goes to others, and whose folder it was does not."""
    named = isinstance(source, Path) or (isinstance(source, str) and not source.lstrip().startswith("{"))
    metadata["input_path"] = base_name(source) if named else None  # type: ignore[arg-type]
    metadata["output_path"] = base_name(output) if output is not None else None


def _at_notebook(environment: dict[str, str], source: object) -> dict[str, str]:
    """The environment of a kernel that knows which notebook it serves, and not of one that this process serves."""
    kept = {name: value for name, value in environment.items() if name != ENV_NOTEBOOK}
    if isinstance(source, Path | str) and is_file(source) and Path(source).is_file():
        kept[ENV_NOTEBOOK] = str(Path(source).absolute())
    return kept


def _deliver(nb: Any, target: Path | str, record: str, location: Path, *, whole: bool) -> None:
    """Writes the record to its place, or elsewhere and says where.

    ``whole``: the place is ours to find, and a file there is replaced in one step. Papermill finds its own places.
    """
    try:
        if whole:
            write_place(target, nbformat.writes(nb))
        else:
            write_ipynb(nb, str(target))
    except Exception as error:  # whatever the package that serves the address raises
        why = getattr(error, "message", "") or getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        sealed = "it is sealed" if SEAL_KEY in nb["metadata"] else "it could not be sealed either"
        kept = _kept_elsewhere(nb, record, location)
        raise RecordError(
            f"The record could not be written to {shown(target)}: {str(why).rstrip('.')}; {sealed}, "
            + (f"and lies at {kept}." if kept else "and no copy of it could be kept: the trail holds its digests."),
            next_step="Copy it from there." if kept else "Make room, and run the notebook again.",
            code="output",
        ) from error


def _kept_elsewhere(nb: Any, record: str, location: Path) -> Path | None:
    beside = kept_record(location, record)
    if beside is not None:
        return beside.absolute()
    path = Path(tempfile.gettempdir()) / f"rlhf-audit-{record}.ipynb"
    try:
        replace_file(path, nbformat.writes(nb))
    except OSError as error:
        logger.warning("No copy could be kept at %s: %s", path, error)
        return None
    return path


class AuditEngine(NBClientEngine):
    """Papermill engine that leaves a record."""

    @classmethod
    def execute_notebook(
        cls,
        nb: Any,
        kernel_name: str,
        output_path: str | None = None,
        progress_bar: bool | dict[str, Any] = True,  # noqa: FBT001, FBT002 papermill's signature
        log_output: bool = False,  # noqa: FBT001, FBT002 papermill's signature
        autosave_cell_every: int = 30,
        *,
        audit_trail: Path | str | None = None,
        audit_progress: Progress | None = None,
        audit_outcome: Callable[[str, Outcome, Any], None] | None = None,
        audit_config: AuditConfig | None = None,
        audit_source: Path | str | None = None,
        audit_output: Path | str | None = None,
        **settings: Any,
    ) -> Any:
        """Executes and seals; called by papermill.

        Args:
            nb: the notebook, parameters injected.
            kernel_name: name of the kernel specification.
            output_path: where papermill keeps the notebook while it runs, and where the sealed one is written.
            progress_bar: papermill's own.
            log_output: papermill's own.
            autosave_cell_every: seconds between looks, within one long cell, at whether a copy is due; 0 for none.
            audit_trail: the trail's folder.
            audit_progress: called with position, number of cells and state (``running``, ``ok``, ``error``,
                ``aborted``) of each code cell.
            audit_outcome: called once after sealing and before writing, with the record's id, the outcome and the
                sealed notebook.
            audit_config: where the trail is, unless ``audit_trail`` says it, and whether a copy of the record is kept.
            audit_source: where the notebook came from, if papermill was not told.
            audit_output: where to keep and write it, instead of ``output_path``.
            settings: papermill's and nbclient's own.

        Raises:
            RecordError: a parameter or the kernel is not what the notebook takes, and nothing was run or written; or
                the record could not be written, and the message says where it is.
        """
        kernel = kernel_named(kernel_name)
        _check_parameters(nb, kernel)
        metadata = nb["metadata"]["papermill"]
        asked = metadata.get("output_path")
        target = audit_output or output_path
        source = audit_source or settings.get("input_path")
        _name_places(metadata, source, target or asked)
        config = audit_config or AuditConfig()
        location = Path(audit_trail) if audit_trail is not None else config.trail_location()
        session = RecordSession.begin(nb, kernel, location, keep=config.keep_records)
        watch = _Watch(session, audit_progress, len(nb["cells"]))
        outcome = Outcome("aborted", reason="unknown")
        try:
            keeper = _Keeper(
                nb,
                str(target) if target is not None else None,
                progress_bar=progress_bar,
                log_output=log_output,
                autosave_cell_every=autosave_cell_every,
            )
            keeper.notebook_start()
            try:
                cls.execute_managed_notebook(
                    keeper,
                    kernel_name,
                    log_output=log_output,
                    audit_session=session,
                    audit_watch=watch,
                    audit_source=source,
                    **settings,
                )
            finally:
                keeper.cleanup_pbar()
                keeper.notebook_complete()
            nb = keeper.nb
            outcome = watch.failed or Outcome("completed")
        except BaseException as error:
            outcome = watch.aborted(error)
            # Papermill writes nothing after an error that is not a cell's own.
            target = target or asked
            raise
        finally:
            # Also after a time-out, a dead kernel or an interruption: what was executed is sealed as it stands.
            try:
                watch.settle(nb)
                session.seal(nb, outcome)
            finally:
                session.close()
                if audit_outcome is not None:
                    audit_outcome(session.record, outcome, nb)
                if target is not None:
                    _deliver(nb, target, session.record, location, whole=audit_output is not None)
        return nb

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: Any,
        kernel_name: str,
        log_output: bool = False,  # noqa: FBT001, FBT002 papermill's signature
        stdout_file: Any = None,
        stderr_file: Any = None,
        start_timeout: int = 60,
        execution_timeout: int | None = None,
        *,
        audit_session: RecordSession,
        audit_watch: _Watch,
        audit_source: Path | str | None = None,
        **settings: Any,
    ) -> Any:
        """Papermill's managed execution with the audit's hooks and the kernel's environment."""
        passed = remove_args(["input_path", "timeout", "startup_timeout"], **settings)
        final = merge_kwargs(
            passed,
            timeout=execution_timeout or settings.get("timeout"),
            startup_timeout=start_timeout,
            kernel_name=kernel_name,
            log=logger,
            log_output=log_output,
            stdout_file=stdout_file,
            stderr_file=stderr_file,
        )
        with _private_sockets() as sockets:
            environment = _at_notebook(audit_session.environment(), audit_source)
            client = AuditedClient(nb_man, environment=environment, watch=audit_watch, **{**sockets, **final})
            return client.execute()
