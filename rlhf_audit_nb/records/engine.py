"""The papermill engine ``audit``: executes a notebook into a record. Floor 3.

``papermill --engine audit IN.ipynb OUT.ipynb`` (or `run.run_notebook`) runs as papermill's own engine does, and at
the end, however it ends, writes the notebook with its seal. The trail is the keyword ``audit_trail``, else
``RLHF_AUDIT_TRAIL``, else ``audit`` in the working directory.

Why the whole of ``execute_notebook`` is wrapped: papermill completes its own metadata after the managed execution
returns, and a seal must come after the last change. What papermill does later (its error markers around a failed
cell) is in the normal form's list of exceptions, word for word. Papermill's own statuses are not used: after a
time-out or a dead kernel they call cells completed that never ran. The outcome is derived from what the hooks saw.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
from nbclient.exceptions import CellExecutionError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine
from papermill.iorw import write_ipynb
from papermill.log import logger
from papermill.utils import merge_kwargs, remove_args
from traitlets.config import Config

from rlhf_audit_nb.config import AuditConfig
from rlhf_audit_nb.errors import RecordError
from rlhf_audit_nb.records.session import Outcome, RecordSession

if TYPE_CHECKING:
    from collections.abc import Callable

    Progress = Callable[[int, int, str], None]

__all__ = ["ENGINE", "AuditEngine", "AuditedClient"]

ENGINE = "audit"

_SOCKET_PATH = 103  # sun_path of the BSDs, less its final zero; Linux has 107


class _Watch:
    """What happened to the cells: which one runs, and in which one it stopped."""

    def __init__(self, session: RecordSession, progress: Progress | None, cells: int) -> None:
        self._session = session
        self._progress = progress
        self._cells = cells
        self._running: tuple[dict[str, Any], int] | None = None
        self.failed: Outcome | None = None

    def _tell(self, position: int, state: str) -> None:
        if self._progress is not None:
            self._progress(position, self._cells, state)

    def _ended(self, cell: dict[str, Any], position: int, status: str) -> None:
        self._running = None
        self._session.cell_executed(cell, position, status)
        self._tell(position, status)

    def execute(self, cell: dict[str, Any], cell_index: int) -> None:
        """Hook: the cell is about to be sent to the kernel."""
        self._running = (cell, cell_index)
        self._tell(cell_index, "running")

    def executed(self, cell: dict[str, Any], cell_index: int, execute_reply: dict[str, Any] | None) -> None:
        """Hook: the kernel has answered and all outputs are there (no answer: it was interrupted by a time-out)."""
        answer = execute_reply["content"]["status"] if execute_reply else "aborted"
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


class AuditedClient(PapermillNotebookClient):
    """Papermill's client, with an environment for the kernel and an eye on where the execution stops."""

    def __init__(self, nb_man: Any, *, environment: dict[str, str], watch: _Watch, **settings: Any) -> None:
        hooks = {"on_cell_execute": watch.execute, "on_cell_executed": watch.executed}
        super().__init__(nb_man, **settings, **hooks)
        self._environment = environment
        self._watch = watch

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


def _kernel(kernel_name: str) -> dict[str, str]:
    try:
        spec = KernelSpecManager().get_kernel_spec(kernel_name)
    except NoSuchKernel as error:
        raise RecordError(
            f"No kernel named {kernel_name!r} is installed here, so the notebook cannot run.",
            next_step="Install it (for Python: python -m ipykernel install --user), or name another with --kernel.",
            code="no-kernel",
        ) from error
    return {"name": kernel_name, "language": spec.language, "display_name": spec.display_name}


class AuditEngine(NBClientEngine):
    """Papermill engine that leaves a record."""

    @classmethod
    def execute_notebook(
        cls,
        nb: Any,
        kernel_name: str,
        output_path: str | None = None,
        *,
        audit_trail: Path | str | None = None,
        audit_progress: Progress | None = None,
        audit_outcome: Callable[[str, Outcome], None] | None = None,
        audit_config: AuditConfig | None = None,
        **settings: Any,
    ) -> Any:
        """Executes and seals; called by papermill.

        Args:
            nb: the notebook, parameters injected.
            kernel_name: name of the kernel specification.
            output_path: where papermill keeps the notebook while it runs, and where the sealed one is written.
            audit_trail: the trail's folder.
            audit_progress: called with position, number of cells and state (``running``, ``ok``, ``error``,
                ``aborted``) of each code cell.
            audit_outcome: called once after sealing, with the record's id and the outcome.
            audit_config: where the trail is, unless ``audit_trail`` says it, and whether a copy of the record is kept.
            settings: papermill's and nbclient's own.
        """
        kernel = _kernel(kernel_name)
        config = audit_config or AuditConfig()
        location = Path(audit_trail) if audit_trail is not None else config.trail_location()
        session = RecordSession.begin(nb, kernel, location, keep=config.keep_records)
        watch = _Watch(session, audit_progress, len(nb["cells"]))
        outcome = Outcome("aborted", reason="unknown")
        try:
            nb = super().execute_notebook(
                nb, kernel_name, output_path=output_path, audit_session=session, audit_watch=watch, **settings
            )
            outcome = watch.failed or Outcome("completed")
        except BaseException as error:
            outcome = watch.aborted(error)
            raise
        finally:
            # Also after a time-out, a dead kernel or an interruption: what was executed is sealed as it stands.
            try:
                session.seal(nb, outcome)
            finally:
                session.close()
            if output_path is not None:
                write_ipynb(nb, output_path)
            if audit_outcome is not None:
                audit_outcome(session.record, outcome)
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
            environment = audit_session.environment()
            client = AuditedClient(nb_man, environment=environment, watch=audit_watch, **{**sockets, **final})
            return client.execute()
