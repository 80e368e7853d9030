"""Running a record's notebook once more, on scratch paper. Floor 3.

The cells of a verified record, parameters included, run in a fresh kernel: in a scratch folder, with a scratch trail
and a scratch home, so that the trail, the vault, the keys and the ledger of whoever runs it are not touched, also where
the notebook names its trail. The scratch trail is marked as the replay of the seeds that were opened, which may be none
at all: a private training for which there is no opened seed is then refused, so nothing is spent with fresh noise.

`replay` and `reproduce` compare what comes of it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_audit_nb.capture.secrets import scrub_values
from rlhf_audit_nb.config import ENV_HOME, ENV_PASSPHRASE, ENV_PERSON_PASSPHRASE, ENV_REPLAY, ENV_SLOT, ENV_TRAIL
from rlhf_audit_nb.errors import AuditError, RecordError
from rlhf_audit_nb.events import EnvironmentCaptured, decode_body
from rlhf_audit_nb.privacy.replay import ReplaySeeds, start_replay, write_seeds
from rlhf_audit_nb.records.unsound import refuse_unsound
from rlhf_audit_nb.trail import Trail, TrailReader

if TYPE_CHECKING:
    from rlhf_audit_nb.records.record import OpenedRecord
    from rlhf_audit_nb.trail import TrustPolicy
    from rlhf_audit_nb.trail.entry import Entry

__all__ = [
    "Progress",
    "ReplayFailedError",
    "ReplayRefusedError",
    "Rerun",
    "environment_of",
    "open_sound_record",
    "rerun_notebook",
    "scratch_trail",
    "write_notebook",
]

Progress = Callable[[int, int, str], None]

# What whoever runs somebody else's notebook does not hand over: their passphrases, and what a sweep of theirs holds.
_NOT_THEIRS = ("RLHF_AUDIT_RECORD", ENV_PASSPHRASE, ENV_PERSON_PASSPHRASE, "RLHF_AUDIT_NEW_PASSPHRASE", ENV_SLOT)
_FLAGS = ("PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_OWN_INTERPRETER = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
_SOCKET_PATH = 103  # sun_path of the BSDs, less its final zero; Linux has 107


class ReplayRefusedError(RecordError):
    """The record or an opening does not hold, or a seed is missing; nothing was run."""

    code: ClassVar[str] = "replay-refused"
    exit_code: ClassVar[int] = 3


class ReplayFailedError(RecordError):
    """A cell raised that had not raised before, so there is nothing whole to compare; ``said`` is what it said."""

    code: ClassVar[str] = "replay-failed"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, next_step: str = "", said: str = "") -> None:
        super().__init__(message, next_step=next_step)
        self.said = said


@dataclass(frozen=True)
class Rerun:
    """A notebook that has run again, while its scratch trail is still there.

    Attributes:
        notebook: nbformat's node with the new outputs, secrets taken out.
        reader: the scratch trail.
        raised: whether the cell that had ended the record's execution ended this one too, by the same error.
    """

    notebook: Any
    reader: TrailReader
    raised: bool


def open_sound_record(path: Path | str, *, policy: TrustPolicy | None, home: Path | None) -> OpenedRecord:
    """The record, verified.

    Raises:
        RecordError: it cannot be read.
        InvalidRecordError, DivergedRecordError: it does not verify, so it is not run.
    """
    from rlhf_audit_nb.records.record import open_record

    opened = open_record(path, policy=policy, home=home)
    refuse_unsound(
        opened.verdict,
        f"The record {path} does not verify, so it is not run",
        next_step=f"See rlhf-audit verify {path}.",
    )
    if opened.notebook is None:
        raise ReplayRefusedError(f"The record {path} holds no notebook that can be run.")
    return opened


@contextmanager
def scratch_trail(seeds: ReplaySeeds) -> Iterator[tuple[Path, Path]]:
    """A new trail that is marked as the replay of these seeds, and its home; both are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="rlhf-audit-replay-") as folder:  # mode 0700
        location, home = Path(folder) / "audit", Path(folder) / "home"
        # No passphrase: the notebook gets none, and all of this is gone with the folder, which is this user's alone.
        with Trail.open(location, home=home, passphrase="") as trail:
            start_replay(trail, seeds)
        yield location, home


def environment_of(entries: Sequence[Entry]) -> EnvironmentCaptured | None:
    """The first environment that ``entries`` hold."""
    for entry in entries:
        if entry.type == EnvironmentCaptured.TYPE:
            event = decode_body(entry.type, entry.body)
            return event if isinstance(event, EnvironmentCaptured) else None
    return None


@contextmanager
def rerun_notebook(
    opened: OpenedRecord,
    seeds: ReplaySeeds,
    *,
    files: Sequence[Path | str] = (),
    cwd: Path | str | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
    python: Path | None = None,
) -> Iterator[Rerun]:
    """Run the notebook of a verified record again.

    Args:
        opened: the record.
        seeds: those of its private trainings.
        files: what it reads by relative paths, copied into the scratch folder.
        cwd: run in this folder instead.
        progress: called with a code cell's position (from 0), the number of cells and its state.
        threads: for the arithmetic; ``None`` takes as many as there were.
        python: the interpreter of another environment; ``None`` takes the kernel that the record names.

    Raises:
        ReplayFailedError: a cell raised that had not raised before, or the kernel died.
        RecordError: a file cannot be copied.
    """
    with scratch_trail(seeds) as (location, scratch_home):
        work = Path(cwd) if cwd is not None else _working_folder(location.parent, files)
        handed = location.parent / "seeds"
        write_seeds(handed, seeds)
        away = {*_NOT_THEIRS, *(_OWN_INTERPRETER if python is not None else ())}
        environment = {
            **{name: value for name, value in os.environ.items() if name not in away},
            **_determined(opened.entries, threads),
            ENV_TRAIL: str(location),
            ENV_HOME: str(scratch_home),
            ENV_REPLAY: str(handed),
        }
        try:
            notebook, raised = execute(opened, environment, location.parent, work, progress, python)
        finally:
            handed.unlink(missing_ok=True)
        _scrub(notebook)
        yield Rerun(notebook, TrailReader.open(location), raised)


def _determined(entries: Sequence[Entry], threads: int | None) -> dict[str, str]:
    """The settings of the process that decide bits and can be set from outside, as they were."""
    captured = environment_of(entries)
    if captured is None:
        return {} if threads is None else dict.fromkeys(_THREADS, str(threads))
    settings = {name: str(captured.determinism[name]) for name in _FLAGS if name in captured.determinism}
    wanted = captured.threads if threads is None else threads
    if wanted is not None:
        settings |= dict.fromkeys(_THREADS, str(wanted))
    return settings


def _working_folder(scratch: Path, files: Sequence[Path | str]) -> Path:
    work = scratch / "work"
    work.mkdir()
    here = Path.cwd()
    for item in files:
        source = Path(item).resolve()
        relative = source.relative_to(here) if source.is_relative_to(here) else Path(source.name)
        target = work / relative
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copy2(source, target)
        except OSError as error:
            raise RecordError(
                f"{item} cannot be copied for the new run: {error.strerror or error}.",
                next_step="Check the path and the space left on the disk.",
                code="files",
            ) from error
    return work


def _scrub(notebook: Any) -> None:
    """As when a record is made: secrets that the outputs show are taken out of them."""
    import nbformat

    for cell in notebook.cells:
        outputs = cell.get("outputs")
        scrubbed = scrub_values(outputs) if outputs else outputs
        if scrubbed is not outputs:
            cell["outputs"] = [nbformat.from_dict(output) for output in scrubbed]


def execute(
    opened: OpenedRecord,
    environment: dict[str, str],
    scratch: Path,
    work: Path,
    progress: Progress | None,
    python: Path | None,
) -> tuple[Any, bool]:
    """The record's notebook with new outputs, and whether it ended where the record's execution had."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    notebook = opened.notebook
    notebook.metadata.pop("rlhf_audit", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    cells = len(notebook.cells)

    def tell(state: str) -> Callable[..., None]:
        def told(cell_index: int, **_: Any) -> None:
            if progress is not None:
                progress(cell_index, cells, state)

        return told

    kernel = opened.started.kernel.get("name", "python3") if opened.started is not None else "python3"
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name=kernel,
        resources={"metadata": {"path": str(work)}},
        on_cell_execute=tell("running"),
        **_private_sockets(scratch),
        **_other_interpreter(python),
    )
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        _refuse_new_failure(opened, notebook, error)
        return notebook, True
    except DeadKernelError as error:
        raise ReplayFailedError(
            "The kernel died while the notebook ran again, so there is nothing whole to compare.",
            next_step="Run it where there is as much memory as there was.",
        ) from error
    return notebook, False


def _private_sockets(scratch: Path) -> dict[str, Any]:
    """Messages carry the notebook's data: keep them on sockets in the scratch folder, which only this user can open."""
    from traitlets.config import Config

    address = scratch / "socket"
    if os.name != "posix" or len(os.fsencode(address)) + len("-5") > _SOCKET_PATH:
        return {}
    return {"config": Config({"ConnectionFileMixin": {"transport": "ipc", "ip": str(address)}})}


def _other_interpreter(python: Path | None) -> dict[str, Any]:
    """A kernel of that interpreter, which is registered nowhere."""
    if python is None:
        return {}
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]

    class OneKernel(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(argv=argv, display_name="Python", language="python")

    return {"kernel_manager_class": OneKernel}


def _refuse_new_failure(opened: OpenedRecord, notebook: Any, error: Any) -> None:
    """A cell that raised when the record was made may raise again; another one ends the new run."""
    raised = [
        place
        for place, cell in enumerate(notebook.cells)
        if any(item.output_type == "error" for item in cell.get("outputs", []))
    ]
    place = raised[-1] if raised else None
    sealed = opened.sealed
    known = (sealed.cell, sealed.reason) if sealed is not None and sealed.status == "failed" else None
    if place is not None and known == (notebook.cells[place].get("id"), error.ename):
        return
    where = f"Cell {place + 1} of {len(notebook.cells)}" if place is not None else "The notebook"
    raise ReplayFailedError(
        f"{where} raised {error.ename} when it ran again, which it had not when the record was made.",
        next_step="Give it what the notebook reads: --files PATH copies files and folders into its scratch folder, "
        "--cwd DIR runs it in a folder of yours.",
        said=f"{error.ename}: {error.evalue}",
    ) from None


def write_notebook(notebook: Any, output: Path) -> None:
    """Leave the notebook that ran again, without a seal.

    Raises:
        AuditError: it cannot be written.
    """
    import nbformat

    try:
        output.write_text(nbformat.writes(notebook), encoding="utf-8")
    except OSError as error:
        raise AuditError(
            f"The notebook {output} cannot be written: {error.strerror or error}.",
            next_step="Name another file with -o.",
            code="output",
        ) from error
