"""Replaying a record from the openings of its seeds, and saying whether it comes out the same. Floor 3.

The record is verified, each opening is verified against the commitment in the record's own ``privacy.reserved`` entry,
and the notebook's cells, parameters included, run once more: in a fresh kernel, in a scratch folder, with a scratch
trail and a scratch home, so that the trail, the vault and the keys of whoever replays are not touched. What is compared
is in `comparison`. Whoever replays needs the data, runs the notebook's code, and holds what the seed protects.
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

from rlhf_audit_nb.config import ENV_HOME, ENV_REPLAY, ENV_TRAIL
from rlhf_audit_nb.errors import AuditError, RecordError
from rlhf_audit_nb.events import (
    EnvironmentCaptured,
    PrivacyReserved,
    PrivacySealed,
    decode_body,
    decode_private,
)
from rlhf_audit_nb.privacy.replay import OpenedSeed, ReplaySeeds, start_replay, write_seeds
from rlhf_audit_nb.records.comparison import Comparison, compare_environments, compare_runs, private_runs
from rlhf_audit_nb.trail import Level, Trail, TrailReader
from rlhf_audit_nb.trail.disclosure import Disclosure, disclose, parse_disclosure, verify_disclosure
from rlhf_audit_nb.trail.proof import parse_proof

if TYPE_CHECKING:
    from rlhf_audit_nb.records.record import OpenedRecord
    from rlhf_audit_nb.trail import TrustPolicy
    from rlhf_audit_nb.trail.entry import Entry

__all__ = [
    "ReplayFailedError",
    "ReplayRefusedError",
    "ReplayResult",
    "compare_with_replay",
    "open_own_seeds",
    "open_seeds",
    "replay_record",
    "scratch_trail",
]

_RECORD = "RLHF_AUDIT_RECORD"
_FLAGS = ("PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
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


@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """What a replay found.

    Attributes:
        comparison: what was compared, and where it differs.
        warnings: what differs in the environment, as sentences; no difference of the runs by itself.
        entries: the ``privacy.reserved`` entries whose seeds were used.
    """

    comparison: Comparison
    warnings: tuple[str, ...]
    entries: tuple[int, ...]

    @property
    def equal(self) -> bool:
        """Whether the replay came out the same, bit for bit."""
        return self.comparison.equal

    @property
    def exit_code(self) -> int:
        """0 where it is equal, 1 where it differs."""
        return 0 if self.equal else 1

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**self.comparison.to_dict(), "warnings": list(self.warnings), "reservations": list(self.entries)}

    def words(self) -> list[str]:
        """All of it as lines for people."""
        found = self.comparison
        compared = f"{found.trainings} private training(s), {found.steps} step(s), {found.digests} weights digest(s)"
        if self.equal:
            lines = [f"equal     bit for bit: {compared}"]
        else:
            lines = [f"differs   {found.first or 'there was nothing to compare'}"]
            if found.first_step is not None:
                lines.append(f"  the first step that differs is {found.first_step}")
            lines.append(f"  compared: {compared}")
        return [*lines, *(f"  note: {sentence}" for sentence in self.warnings)]

    def __str__(self) -> str:
        return "\n".join(self.words())

    __repr__ = __str__


# --- openings --------------------------------------------------------------------------------------------------------


def open_seeds(
    entries: Sequence[Entry],
    openings: Sequence[Path | str],
    *,
    origin: str,
    policy: TrustPolicy | None = None,
    home: Path | None = None,
    missing_from: Trail | None = None,
) -> ReplaySeeds:
    """The seeds of all private trainings among ``entries``, from disclosure files that are verified first.

    Args:
        entries: of the runs that are to be replayed, verified.
        openings: the files that ``rlhf-audit disclose`` wrote, in any order.
        origin: the trail that the entries are of.
        policy: whose signatures count; ``None`` trusts the user's own key.
        home: the folder of keys; ``None`` takes the usual one.
        missing_from: a trail of one's own, whose vault is asked for those that no file opens.

    Raises:
        ReplayRefusedError: there is no private training; a file does not verify, or is of another trail, run or kind of
            entry; a training has no opening.
        VaultError: ``missing_from`` has the seed no more (``erased``, ``opening-missing``).
    """
    reserved = {entry.index: entry for entry in entries if entry.type == PrivacyReserved.TYPE}
    if not reserved:
        raise ReplayRefusedError(
            "No private training is recorded there, so no seed was sealed and there is nothing to replay.",
            next_step="Replay a run that trained under differential privacy.",
        )
    found: dict[int, OpenedSeed] = {}
    for path in openings:
        opened = _verified(Path(path), reserved, origin, policy, home)
        found[opened.entry] = opened
    for index in sorted(set(reserved) - set(found)):
        if missing_from is None:
            continue
        found[index] = _opened(disclose(missing_from, index), reserved[index])
    missing = sorted(set(reserved) - set(found))
    if missing:
        raise ReplayRefusedError(
            f"The seed of {_entries(missing)} is not opened; without it the noise of that training cannot be drawn "
            "again.",
            next_step=f"Have whoever keeps the vault write it: rlhf-audit disclose {missing[0]}. A seed that was "
            "erased from the vault is gone for good, and that training can never be replayed.",
        )
    return ReplaySeeds(origin, list(found.values()))


def open_own_seeds(trail: Trail, run: str) -> ReplaySeeds:
    """The seeds of one run's trainings, from the trail's own vault.

    Raises:
        ReplayRefusedError: the run has no private training.
        VaultError: a seed was erased, or its opening is missing.
    """
    entries = list(trail.reader().entries(run=run))
    return open_seeds(entries, (), origin=trail.origin, missing_from=trail)


def _entries(indices: Sequence[int]) -> str:
    return f"{'entry' if len(indices) == 1 else 'entries'} {', '.join(map(str, indices))}"


def _verified(
    path: Path, reserved: dict[int, Entry], origin: str, policy: TrustPolicy | None, home: Path | None
) -> OpenedSeed:
    verdict, payload = verify_disclosure(path, policy=policy, home=home)
    if verdict.level in (Level.INVALID, Level.DIVERGED) or not payload:
        why = verdict.reasons[0].message if verdict.reasons else "It proves nothing."
        raise ReplayRefusedError(
            f"The opening {path.name} does not verify: {why}",
            next_step="Have it written again: rlhf-audit disclose INDEX.",
        )
    disclosure = parse_disclosure(path.read_bytes())
    index = parse_proof(disclosure.proof).index
    entry = reserved.get(index)
    if verdict.origin != origin or entry is None or entry.data != disclosure.entry.encode():
        of = f"entry {index} of {verdict.origin}"
        raise ReplayRefusedError(
            f"The opening {path.name} is of {of}, which reserves none of the trainings to be replayed; those are "
            f"reserved in {_entries(sorted(reserved))} of {origin}.",
            next_step="Name the openings of these entries.",
        )
    return _opened(disclosure, entry)


def _opened(disclosure: Disclosure, entry: Entry) -> OpenedSeed:
    from rlhf_audit_nb.trail.encoding import decode_base64

    event = decode_body(entry.type, entry.body)
    sealed = decode_private(entry.type, decode_base64(disclosure.payload, "payload"))
    assert isinstance(event, PrivacyReserved)  # for the type checker; the callers chose these entries
    assert isinstance(sealed, PrivacySealed)
    return OpenedSeed(entry.index, event, bytes.fromhex(sealed.seed))


# --- scratch ---------------------------------------------------------------------------------------------------------


@contextmanager
def scratch_trail(seeds: ReplaySeeds) -> Iterator[tuple[Path, Path]]:
    """A new trail that is marked as the replay of these seeds, and its home; both are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="rlhf-audit-replay-") as folder:  # mode 0700
        location, home = Path(folder) / "audit", Path(folder) / "home"
        with Trail.open(location, home=home) as trail:
            start_replay(trail, seeds)
        yield location, home


def compare_with_replay(entries: Sequence[Entry], replayed: TrailReader, seeds: ReplaySeeds) -> ReplayResult:
    """Compare the runs in ``entries`` with those on the replay's trail."""
    then, now = private_runs(entries), private_runs(replayed.entries())
    warnings: tuple[str, ...] = ()
    for (_, before), (_, after) in zip(then, now, strict=False):
        old, new = _environment(before), _environment(after)
        if old is not None and new is not None:
            warnings += tuple(item for item in compare_environments(old, new) if item not in warnings)
    return ReplayResult(comparison=compare_runs(then, now), warnings=warnings, entries=tuple(seeds.entries))


def _environment(entries: Sequence[Entry]) -> EnvironmentCaptured | None:
    for entry in entries:
        if entry.type == EnvironmentCaptured.TYPE:
            event = decode_body(entry.type, entry.body)
            return event if isinstance(event, EnvironmentCaptured) else None
    return None


# --- a record --------------------------------------------------------------------------------------------------------


def replay_record(
    path: Path | str,
    openings: Sequence[Path | str] = (),
    *,
    policy: TrustPolicy | None = None,
    home: Path | None = None,
    trail: Trail | None = None,
    files: Sequence[Path | str] = (),
    cwd: Path | str | None = None,
    output: Path | str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> ReplayResult:
    """Run a record's notebook again with the seeds of its private trainings, and compare.

    Args:
        path: the record.
        openings: the disclosure files of its ``privacy.reserved`` entries.
        policy: whose signatures count, for record and openings; ``None`` trusts the user's own key.
        home: the folder of keys and last-seen heads; ``None`` takes the usual one.
        trail: the record's own trail, where the vault is one's own: seeds that no file opens come from it.
        files: files and folders that the notebook reads by relative paths, copied into the scratch folder under the
            same paths (relative to the working directory; from elsewhere under their names).
        cwd: run in this folder instead of a scratch one; what the notebook writes is then written there.
        output: where the replayed notebook is left; ``None`` leaves nothing.
        progress: called with a code cell's position (from 0), the number of cells and its state.

    Raises:
        RecordError: the record cannot be read.
        ReplayRefusedError: the record or an opening does not hold, or a seed is missing; nothing was run.
        ReplayFailedError: a cell raised that had not raised before.
        VaultError: ``trail`` has a seed no more.
    """
    from rlhf_audit_nb.records.record import open_record

    opened = open_record(path, policy=policy, home=home)
    if opened.verdict.level in (Level.INVALID, Level.DIVERGED) or opened.notebook is None:
        why = opened.verdict.reasons[0].message if opened.verdict.reasons else "It holds no notebook."
        raise ReplayRefusedError(
            f"The record {path} does not verify, so it is not run: {why}",
            next_step=f"See rlhf-audit verify {path}.",
        )
    seeds = open_seeds(
        opened.entries, openings, origin=opened.verdict.origin, policy=policy, home=home, missing_from=trail
    )
    with scratch_trail(seeds) as (location, scratch_home):
        work = Path(cwd) if cwd is not None else _working_folder(location.parent, files)
        handed = location.parent / "seeds"
        write_seeds(handed, seeds)
        environment = {
            **{name: value for name, value in os.environ.items() if name != _RECORD},
            **_determined(opened.entries),
            ENV_TRAIL: str(location),
            ENV_HOME: str(scratch_home),
            ENV_REPLAY: str(handed),
        }
        try:
            notebook = _executed(opened, environment, location.parent, work, progress)
        finally:
            handed.unlink(missing_ok=True)
        if output is not None:
            _write(notebook, Path(output))
        return compare_with_replay(opened.entries, TrailReader.open(location), seeds)


def _determined(entries: Sequence[Entry]) -> dict[str, str]:
    """The settings of the process that decide bits and can be set from outside, as they were."""
    captured = next((found for _, run in private_runs(entries) if (found := _environment(run)) is not None), None)
    if captured is None:
        return {}
    settings = {name: str(captured.determinism[name]) for name in _FLAGS if name in captured.determinism}
    if captured.threads is not None:
        settings |= dict.fromkeys(_THREADS, str(captured.threads))
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
                f"{item} cannot be copied for the replay: {error.strerror or error}.",
                next_step="Check the path and the space left on the disk.",
                code="files",
            ) from error
    return work


def _executed(
    opened: OpenedRecord,
    environment: dict[str, str],
    scratch: Path,
    work: Path,
    progress: Callable[[int, int, str], None] | None,
) -> Any:
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
    )
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        _refuse_new_failure(opened, notebook, error)
    except DeadKernelError as error:
        raise ReplayFailedError(
            "The kernel died while the notebook was replayed, so there is nothing whole to compare.",
            next_step="Replay it where there is as much memory as there was.",
        ) from error
    return notebook


def _private_sockets(scratch: Path) -> dict[str, Any]:
    """Messages carry the notebook's data: keep them on sockets in the scratch folder, which only this user can open."""
    from traitlets.config import Config

    address = scratch / "socket"
    if os.name != "posix" or len(os.fsencode(address)) + len("-5") > _SOCKET_PATH:
        return {}
    return {"config": Config({"ConnectionFileMixin": {"transport": "ipc", "ip": str(address)}})}


def _refuse_new_failure(opened: OpenedRecord, notebook: Any, error: Any) -> None:
    """A cell that raised when the record was made may raise again; another one ends the replay."""
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
        f"{where} raised {error.ename} in the replay, which it had not when the record was made.",
        next_step="Give the replay what the notebook reads: --files PATH copies files and folders into its scratch "
        "folder, --cwd DIR runs it in a folder of yours.",
        said=f"{error.ename}: {error.evalue}",
    ) from None


def _write(notebook: Any, output: Path) -> None:
    import nbformat

    try:
        output.write_text(nbformat.writes(notebook), encoding="utf-8")
    except OSError as error:
        raise AuditError(
            f"The replayed notebook {output} cannot be written: {error.strerror or error}.",
            next_step="Name another file with -o.",
            code="output",
        ) from error
