"""A sweep from its beginning to its end: check, hold the budget, dispatch, seal what came of it. Floor 5.

Before the first run starts everything is known that can be: that the grid fits the notebook, what is done already, that
the workers can take part, and that all private runs fit into the budget together. How far a sweep came is nowhere
written down: it is what the records in its folder show (`state`), so the same command does what is missing, whatever
ended the one before.

A run that dies has no record, and what it had reserved counts in full; a further attempt draws on its slot where that
is still open, and otherwise needs another one, which there is room for or not.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.config import ENV_HOME, AuditConfig
from rlhf_audit_nb.errors import BudgetExceededError, ConfigError, RecordError
from rlhf_audit_nb.events import Event, SweepFinished, SweepStarted, decode_body, encode_body
from rlhf_audit_nb.privacy.reservation import read_ledger, release_slots, reserve_slots
from rlhf_audit_nb.records.normal_form import source_digest
from rlhf_audit_nb.records.places import load_notebook
from rlhf_audit_nb.records.record import open_record
from rlhf_audit_nb.records.run import Terminated
from rlhf_audit_nb.records.session import refuse_secrets
from rlhf_audit_nb.sweeping.grid import Grid, Point, read_grid
from rlhf_audit_nb.sweeping.pool import LocalPool, Pool
from rlhf_audit_nb.sweeping.state import Found, digests_of, look, set_aside
from rlhf_audit_nb.sweeping.summary import rows_of, write_notebook, write_tables
from rlhf_audit_nb.sweeping.task import ATTEMPTS, Task, claimed, stop_file, working
from rlhf_audit_nb.trail import Level, Trail
from rlhf_audit_nb.trail.ending import on_sigterm

if TYPE_CHECKING:
    from types import FrameType

    from rlhf_audit_nb.privacy.accountant import Composable

__all__ = ["SweepResult", "release_sweep", "run_sweep"]

Say = Callable[[str], None]

_ID = "sweep.id"
_NOTEBOOK = "notebook.ipynb"
_LOCK = "sweep.lock"
_SUMMARY = "summary.ipynb"
_OWN = frozenset({"completed", "failed", "refused"})
_AGAIN = frozenset({"died", "aborted", "interrupted"})
_KERNEL_GONE = 2.0  # seconds in which the kernel of a worker that died notices, and can draw on its slot no more
_EVERY = 1.0  # seconds between two lines of progress


@dataclass(frozen=True)
class SweepResult:
    """What a sweep left behind.

    Attributes:
        folder: the records by point, ``summary.ipynb``, ``sweep.csv`` and ``sweep.json``.
        sweep: its id.
        status: ``finished`` or ``interrupted``.
        runs: how many points there are.
        outcomes: how many of them ended how.
        rows: one a point, from its verified record.
        found: how many were done before.
        seconds: that it took.
        trail: the trail's folder.
        summary: the signed summary; ``None`` where the sweep was interrupted.
        held: the composed epsilon of the trail with everything that was held for the runs; ``None`` without privacy.
        messages: of points without a record, what is known.
    """

    folder: Path
    sweep: str
    status: str
    runs: int
    outcomes: dict[str, int]
    rows: tuple[dict[str, Any], ...]
    found: int
    seconds: float
    trail: Path
    summary: Path | None = None
    held: float | None = None
    messages: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 where every run completed, 130 after an interruption, else 1."""
        if self.status == "interrupted":
            return 130
        return 0 if self.outcomes == {"completed": self.runs} else 1

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        paths = {name: None if path is None else str(path) for name, path in self._paths()}
        return {**asdict(self), **paths, "rows": list(self.rows)}

    def _paths(self) -> tuple[tuple[str, Path | None], ...]:
        return (("folder", self.folder), ("trail", self.trail), ("summary", self.summary))

    def words(self) -> list[str]:
        """It in lines."""
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        lines = [f"runs     {self.runs}: {counts}" + (f"; {self.found} were done before" if self.found else "")]
        lines += [f"records  {self.folder}", f"trail    {self.trail}"]
        if self.summary is not None:
            lines.append(f"summary  {self.summary}")
        if self.held is not None:
            lines.append(
                f"held     epsilon {self.held:.4g} with everything else on the trail; what was not used is given back"
            )
        for row in self.rows:
            if row["outcome"] != "completed":
                why = self.messages.get(row["point"]) or row.get("reason") or ""
                lines.append(f"  {row['point']}  {row['outcome']}{': ' * bool(why)}{why}")
        if self.outcomes.get("missing"):
            lines.append("go on    with the same command: it does what is missing")
        return lines


def run_sweep(
    notebook: Path | str,
    grid: Path | str,
    out: Path | str | None = None,
    *,
    trail: Path | str | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    retries: int = 1,
    resume: bool = False,
    kernel_name: str | None = None,
    progress: Say | None = None,
) -> SweepResult:
    """Run a notebook once for each point of a grid; each run is a record. What is done already is not done again.

    Args:
        notebook: the source; it is copied once, so that changing it meanwhile changes no run.
        grid: a YAML file (`grid`).
        out: the folder of the records, made where it is missing; ``None`` takes ``NOTEBOOK.sweep``.
        trail: the trail's folder; ``None`` takes ``RLHF_AUDIT_TRAIL``, else ``audit`` in the working directory.
        workers: how many runs at once; ``None`` takes one a core, or every worker of the cluster.
        cluster: the address of a Dask scheduler; ``None`` uses processes of this machine.
        retries: how often a run is started again whose process died.
        resume: refuse to begin a new sweep: there must be one in ``out``.
        kernel_name: another kernel than the notebook names.
        progress: called with lines for people.

    Raises:
        ConfigError: the grid, the folder or the cluster; nothing was run.
        RecordError: the notebook, or a parameter; nothing was run.
        BudgetExceededError: the runs do not fit into the budget together; nothing was run, nothing reserved.
    """
    from rlhf_audit_nb.records.kernels import kernel_named

    for name, value, least in (("workers", workers, 1), ("retries", retries, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ConfigError(
                f"{name} is {value!r}; it must be a whole number of at least {least}.",
                next_step=f"Write {name}={max(least, 2)}.",
                code=name,
            )
    source = Path(notebook).absolute()
    read = read_grid(grid, source)
    node = load_notebook(source)
    kernel_named(kernel_name or node.metadata.get("kernelspec", {}).get("name", ""))
    for point in read.points:
        refuse_secrets(node, point.parameters)
    folder = Path(out).absolute() if out is not None else source.with_suffix(".sweep")
    location = (Path(trail) if trail is not None else AuditConfig().trail_location()).absolute()
    say = progress or (lambda _line: None)
    with ExitStack() as stack:
        sweep = stack.enter_context(_folder(folder, say, resume=resume))
        opened = stack.enter_context(closing(Trail.open(location)))
        shutil.copyfile(source, folder / ATTEMPTS / _NOTEBOOK)
        one = _Sweep(folder, sweep, read, source_digest(node), opened, kernel_name, retries, say)
        whole = one.look()
        if whole is not None:
            return whole
        pool = stack.enter_context(closing(_pool(one, location, workers, cluster)))
        return one.run(pool)


def release_sweep(out: Path | str, trail: Path | str | None = None) -> tuple[str, ...]:
    """Give back what an unfinished sweep in the folder ``out`` still holds of the budget.

    Raises:
        ConfigError: there is no sweep, or it is at work.
    """
    location = (Path(trail) if trail is not None else AuditConfig().trail_location()).absolute()
    with (
        _folder(Path(out).absolute(), lambda _line: None, resume=True) as sweep,
        closing(Trail.open(location, create=False)) as opened,
    ):
        return release_slots(opened, sweep)


def _cores() -> int:
    """How many this process may use; not every system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pool(one: _Sweep, location: Path, workers: int | None, cluster: str | None) -> Pool:
    if cluster is None:
        return LocalPool(max(min(workers or _cores(), one.missing), 1))
    from rlhf_audit_nb.sweeping.cluster import ClusterPool, Probe

    asked = Probe(one.folder, location, os.environ.get(ENV_HOME))
    try:
        asked.write()
        return ClusterPool(cluster, asked, workers)
    except BaseException:
        asked.clear()  # else the pool does, when it is closed: who joins later is probed as well
        raise


@contextmanager
def _folder(folder: Path, say: Say, *, resume: bool) -> Iterator[str]:
    """Hold the folder of a sweep, alone; gives the sweep's id."""
    begun = (folder / ATTEMPTS / _ID).exists()
    if not begun and resume:
        raise ConfigError(
            f"There is no sweep in {folder} to go on with.",
            next_step="Name its folder with -o, or leave --resume out to begin one.",
            code="no-sweep",
        )
    try:
        if not begun and folder.exists() and any(folder.iterdir()):
            raise ConfigError(
                f"The folder {folder} holds something else than a sweep.",
                next_step="Name a new folder with -o.",
                code="output",
            )
        (folder / ATTEMPTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be used: {error.strerror or error}.",
            next_step="Name a folder that you may write to, with -o.",
            code="output",
        ) from error
    descriptor = os.open(folder / ATTEMPTS / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"Another sweep is at work in {folder}.",
                next_step="Wait for it, interrupt it, or name another folder with -o.",
                code="sweep-running",
            ) from error
        _wait_for_workers(folder, say)
        name = folder / ATTEMPTS / _ID
        if not begun:
            name.write_text(uuid.uuid4().hex, encoding="ascii")
        yield name.read_text(encoding="ascii").strip()
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _wait_for_workers(folder: Path, say: Say) -> None:
    """Runs of a sweep that was killed go on to their end; until then nobody begins the same ones again."""
    with working(folder, alone=True, wait=False) as free:
        if free:
            return
    say("runs of an earlier sweep are still at work here; waiting for them to be sealed")
    with working(folder, alone=True):
        return


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """While it lasts, SIGTERM ends the sweep as Ctrl-C does, where nobody else has a use for it."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) not in {signal.SIG_DFL, on_sigterm}:
        yield
        return

    def terminate(_signal: int, _frame: FrameType | None) -> None:
        raise Terminated(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Sweep:
    """One sweep in its folder."""

    def __init__(
        self,
        folder: Path,
        sweep: str,
        grid: Grid,
        notebook_digest: str,
        trail: Trail,
        kernel: str | None,
        retries: int,
        say: Say,
    ) -> None:
        self.folder = folder
        self._sweep = sweep
        self._grid = grid
        self._digest = notebook_digest
        self._trail = trail
        self._kernel = kernel
        self._retries = retries
        self._say = say
        self._began = time.monotonic()
        self._points = {point.id: point for point in grid.points}
        self._found: dict[str, Found] = {}
        self._before = 0
        self._outcomes: dict[str, str] = {}
        self._messages: dict[str, str] = {}
        self._slots: dict[str, str] = {}
        self._attempts: dict[str, int] = {}
        self._todo: deque[tuple[float, Point]] = deque()
        self._running: dict[str, Task] = {}
        self._held: float | None = None
        self._said, self._told = 0.0, 0

    # -- before anything runs

    @property
    def missing(self) -> int:
        """How many points have no valid record."""
        return len(self._points) - len(self._found)

    def look(self) -> SweepResult | None:
        """Verify what is there; where that is everything, it is what this sweep came to."""
        sealed = digests_of(self._trail.reader())
        for point in self._grid.points:
            found, why = look(self.folder, point, self._digest, sealed)
            if found is not None:
                self._found[point.id] = found
            elif why:
                kept = set_aside(self.folder, point.id)
                self._say(f"{point.id}.ipynb does not count and is kept as {ATTEMPTS}/{kept.name}: {why}")
        self._before = self._told = len(self._found)
        if self._found:
            self._say(f"{self._before} of {len(self._points)} runs are done already; their records verify")
        return self._result("finished", self.folder / _SUMMARY) if not self.missing and self._is_whole() else None

    def _is_whole(self) -> bool:
        """Whether the sweep was ended, with these records, and its summary holds."""
        ended = [event for event in self._events(SweepFinished) if event.sweep == self._sweep]
        begun = [event for event in self._events(SweepStarted) if event.sweep == self._sweep]
        path = self.folder / _SUMMARY
        return (
            bool(ended and begun)
            and ended[-1].status == "finished"
            and ended[-1].records == self._records()
            and begun[-1].points == list(self._points)
            and path.exists()
            and open_record(path).verdict.level > Level.DIVERGED
        )

    def _events(self, kind: Any) -> list[Any]:
        return [decode_body(entry.type, entry.body) for entry in self._trail.reader().entries(type=kind.TYPE)]

    # -- the budget

    def _hold(self, points: list[Point], *, added: bool) -> None:
        """Hold what these runs may spend, all of it or none."""
        privacy = self._grid.privacy
        if privacy is None or not points:
            return
        slots: list[tuple[str, Composable]] = []
        for point in points:
            self._slots[point.id] = secrets.token_hex(8)
            slots.append((self._slots[point.id], privacy.each[point.id]))
        said = reserve_slots(self._trail, self._sweep, slots, privacy.config, added=added)
        self._held = float(said.epsilon_reserved)

    def _hold_again(self, point: Point) -> bool:
        """Whether a further attempt has something to spend: its own slot, if nobody drew on it, or another one."""
        if self._grid.privacy is None:
            return True
        if any(slot.id == self._slots[point.id] for slot in read_ledger(self._trail.reader()).slots):
            return True
        try:
            self._hold([point], added=True)
        except BudgetExceededError as error:
            self._messages[point.id] = (
                f"its process died after it had reserved what it may spend, which counts. {error.message}"
            )
            return False
        return True

    # -- the runs

    def run(self, pool: Pool) -> SweepResult:
        """Everything that is missing; then the end of it."""
        todo = [point for point in self._grid.points if point.id not in self._found]
        self._hold(todo, added=False)
        if self._held is not None:
            self._say(f"the {len(todo)} runs fit into the budget; it is held for them: epsilon {self._held:.4g} in all")
        stop_file(self.folder, self._sweep).unlink(missing_ok=True)
        self._todo.extend((0.0, point) for point in todo)
        self._append(
            SweepStarted(
                sweep=self._sweep,
                notebook_digest=self._digest,
                grid_digest=self._grid.digest,
                runs=len(self._points),
                points=list(self._points),
                found=self._before,
                workers=pool.capacity,
                where=pool.where,
                private=self._grid.privacy is not None,
            )
        )
        status = "failed"
        try:
            with _ending_on_sigterm():
                status = self._dispatched(pool)
        finally:
            release_slots(self._trail, self._sweep)
            self._append(
                SweepFinished(sweep=self._sweep, status=status, outcomes=self._counts(), records=self._records())
            )
        return self._ended(status, pool)

    def _dispatched(self, pool: Pool) -> str:
        try:
            while self._todo or self._running:
                self._begin(pool)
                self._tell()
                for task, said in pool.finished(0.2):
                    self._take(task, said)
            self._tell()
        except (KeyboardInterrupt, Terminated):
            self._say(f"interrupted: {len(self._running)} runs are sealed as they stand; again to leave them to it")
            self._stop(pool)
            return "interrupted"
        return "finished"

    def _stop(self, pool: Pool) -> None:
        self._todo.clear()
        pool.interrupt()
        try:
            while self._running:
                for task, said in pool.finished(0.2):
                    self._take(task, said, last=True)
        except (KeyboardInterrupt, Terminated):
            self._say("left; what runs seals itself, and the same command goes on from there")

    def _begin(self, pool: Pool) -> None:
        if not self._todo:
            return
        room = pool.capacity - len(self._running)
        now = time.monotonic()
        for _ in range(len(self._todo)):
            if room <= 0:
                return
            at, point = self._todo.popleft()
            if at > now:
                self._todo.append((at, point))
            elif self._attempts.get(point.id, 0) == 0 or self._hold_again(point):
                self._start(pool, point)
                room -= 1
            else:
                self._outcomes[point.id] = "not-affordable"

    def _start(self, pool: Pool, point: Point) -> None:
        self._attempts[point.id] = self._attempts.get(point.id, 0) + 1
        task = self._running[point.id] = self._task(point, slot=self._slots.get(point.id))
        pool.start(task)

    def _task(self, point: Point, *, slot: str | None) -> Task:
        return Task(
            point=point.id,
            attempt=claimed(self.folder, point.id) + 1,
            sweep=self._sweep,
            notebook=str(self.folder / ATTEMPTS / _NOTEBOOK),
            folder=str(self.folder),
            trail=str(self._trail.location),
            cwd=str(Path.cwd()),
            parameters=point.parameters,
            kernel=self._kernel,
            slot=slot,
            home=os.environ.get(ENV_HOME),
        )

    def _take(self, task: Task, said: dict[str, Any], *, last: bool = False) -> None:
        """What became of an attempt; a record counts once it verifies here."""
        self._running.pop(task.point, None)
        point, outcome = self._points[task.point], said["outcome"]
        # Also after a worker's death: it may have come after the record had its name.
        found, why = look(self.folder, point, self._digest, digests_of(self._trail.reader()))
        if found is not None:
            self._found[point.id] = found
            if found.outcome != "completed":
                self._messages[point.id] = said.get("message", "")
        else:
            if why:
                set_aside(self.folder, point.id)
            outcome = "died" if outcome in _OWN else outcome
            again = outcome in _AGAIN and not last and self._attempts[point.id] <= self._retries
            self._messages[point.id] = said.get("message", "") or why
            if again:
                self._say(f"{point.id}: {outcome}; it is run again. {self._messages[point.id]}")
                wait = _KERNEL_GONE if self._grid.privacy is not None else 0.0
                self._todo.append((time.monotonic() + wait, point))
            elif not (last and outcome in {"interrupted", "stopped"}):
                self._outcomes[point.id] = outcome

    def _tell(self) -> None:
        now = time.monotonic()
        done = len(self._found) + len(self._outcomes)
        here, left = done - self._before, len(self._points) - done
        if done == self._told or (left and now - self._said < _EVERY):
            return
        self._said, self._told = now, done
        bad = len(self._points) - left - sum(one.outcome == "completed" for one in self._found.values())
        minutes = (now - self._began) / here * left / 60
        rest = "" if not left else f", about {minutes:.0f} min left" if minutes >= 1 else ", less than a minute left"
        self._say(f"{done} of {len(self._points)} runs done, {bad} not completed, {len(self._running)} at work{rest}")

    # -- the end

    def _append(self, event: Event) -> None:
        self._trail.append(event.TYPE, encode_body(event)).wait()

    def _records(self) -> dict[str, str]:
        return {point: self._found[point].record for point in self._points if point in self._found}

    def _rows(self) -> list[dict[str, Any]]:
        return rows_of(list(self._points), self._found, self._outcomes)

    def _counts(self) -> dict[str, int]:
        outcomes = [row["outcome"] for row in self._rows()]
        return {name: outcomes.count(name) for name in sorted(set(outcomes))}

    def _ended(self, status: str, pool: Pool) -> SweepResult:
        whole = {
            "sweep": self._sweep,
            "status": status,
            "origin": self._trail.origin,
            "notebook_digest": self._digest,
            "grid_digest": self._grid.digest,
            "outcomes": self._counts(),
        }
        write_tables(self.folder, self._rows(), whole)
        if status != "finished":
            return self._result(status, None)
        return self._result(status, self._summarised(pool))

    def _summarised(self, pool: Pool) -> Path:
        """The summary, executed like any run."""
        name = Path(_SUMMARY).stem
        source = write_notebook(self.folder / ATTEMPTS / f"source-of-{_SUMMARY}")
        task = replace(
            self._task(Point(name, {"sweep": self._sweep}), slot=None), notebook=str(source), cwd=str(self.folder)
        )
        pool.start(task)
        while not (ended := pool.finished(0.2)):
            pass
        said = ended[0][1]
        if said["outcome"] != "completed":
            raise RecordError(
                f"The summary of the sweep could not be made: {said.get('message') or said['outcome']}",
                next_step="The records themselves are sealed; run the same command again to make it.",
                code="sweep-summary",
            )
        return self.folder / _SUMMARY

    def _result(self, status: str, summary: Path | None) -> SweepResult:
        return SweepResult(
            folder=self.folder,
            sweep=self._sweep,
            status=status,
            runs=len(self._points),
            outcomes=self._counts(),
            rows=tuple(self._rows()),
            found=self._before,
            seconds=time.monotonic() - self._began,
            trail=self._trail.location,
            summary=summary,
            held=self._held,
            messages={point: text for point, text in self._messages.items() if text},
        )
