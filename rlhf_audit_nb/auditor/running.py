"""Running other notebooks into records. Floor 5."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.auditor.base import AuditorBase
from rlhf_audit_nb.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_audit_nb.records import RunResult

__all__ = ["Running"]


class Running(AuditorBase):
    """Running other notebooks into records."""

    def run_notebook(
        self,
        notebook: Path | str,
        output: Path | str | None = None,
        parameters: Mapping[str, Any] | None = None,
        *,
        kernel_name: str | None = None,
        cwd: Path | str | None = None,
        cell_timeout: int | None = None,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> RunResult:
        """Execute a notebook into a signed record on this auditor's trail.

        Args:
            notebook: a file, an address that papermill can read, or ``-``.
            output: the record; ``None`` writes ``NOTEBOOK.record.ipynb`` beside a notebook that is a file.
            parameters: values for the cell tagged ``parameters``, checked against its names and types.
            kernel_name: another kernel than the notebook names.
            cwd: working directory of the kernel; ``None`` keeps this process's.
            cell_timeout: seconds that one cell may take; ``None`` sets no bound.
            progress: called with a code cell's position (from 0), the number of cells and its state.

        Raises:
            ConfigError: it is not known where the record should go.
            RecordError: something is wrong before anything ran, or the record could not be written to its place.
            NotebookFailedError: a cell failed; the record is sealed and says so.
        """
        from rlhf_audit_nb.records import run_notebook
        from rlhf_audit_nb.records.places import is_file, shown

        if output is None:
            if not is_file(notebook):
                raise ConfigError(
                    f"{shown(notebook)} is no file, so it is not known where the record should go.",
                    next_step='Name it: output="record.ipynb", or an address.',
                    code="output",
                )
            output = Path(notebook).with_suffix(".record.ipynb")
        return run_notebook(
            notebook,
            output,
            parameters,
            trail=self.trail.location,
            config=self.audit_config,
            progress=progress,
            kernel_name=kernel_name,
            cwd=cwd,
            cell_timeout=cell_timeout,
        )
