"""One training in several processes: which one this is, who writes, and what the others tell it. Floor 2.

torchrun, ``accelerate launch`` and ``notebook_launcher`` start the same code once for each device. The process of rank
0 writes the run. The others open the same run over a `SilentTrail`: they do all that rank 0 does (digests of sharded
weights are collectives, so everybody must take part) and keep what they saw as `Evidence`, which they tell rank 0
through the store of torch's process group: now and then on the way, and at their end. Rank 0 compares weights as it
goes and, at its own end, waits for the last words: as long as a process lives, but never longer than `WAIT_S` (or
`WAIT_FAILED_S` where its own run failed, since the others may then be stuck in a collective). It records one
``run.rank`` for each, also for those that never said anything.

When a run is opened the process group is often not there yet (a trainer's arguments make it); who one is then says the
launcher's environment, and the exchange begins as soon as there is a store. Nothing here initialises a group, takes
part in a collective of its own, or imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import msgspec

from rlhf_audit_nb.capture.environment import capture_environment
from rlhf_audit_nb.capture.rank_evidence import Comparison, Evidence, Word, compare, hear_rows, spread
from rlhf_audit_nb.capture.rank_exchange import Exchange, default_store
from rlhf_audit_nb.capture.silent import SilentTrail
from rlhf_audit_nb.errors import UnsupportedTrainerError
from rlhf_audit_nb.events import Event, RankReported, RanksFormed, Step, decode_body

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.run import Run
    from rlhf_audit_nb.trail import Trail

__all__ = [
    "ENV_WAIT",
    "WAIT_FAILED_S",
    "WAIT_S",
    "Birth",
    "Place",
    "Ranks",
    "count_children",
    "find_place",
    "refuse_private_ranks",
    "silent_trail",
    "training_in_ranks",
]

ENV_WAIT = "RLHF_AUDIT_RANKS_WAIT"
"""Seconds that rank 0 waits at most for the last words of the others, instead of `WAIT_S` and `WAIT_FAILED_S`."""
WAIT_S = 60.0
WAIT_FAILED_S = 5.0
WAIT_OPENING_S = 30.0
POLL_S = 0.05
TELL_S = 1.0
"""The least time between two words on the way."""
_ENVIRONMENTS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
)
"""What launchers set, in the order in which accelerate reads it."""

_silent: dict[tuple[int, int], SilentTrail] = {}
_opened: dict[str, int] = {}
_forks = 0


def _count_fork() -> None:
    global _forks  # noqa: PLW0603  the process's own count
    _forks += 1


os.register_at_fork(after_in_parent=_count_fork)


# --- who am I --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """This process among those of one training: ``rank`` of ``world_size`` (> 1); ``local_rank`` on its machine."""

    rank: int
    world_size: int
    local_rank: int | None

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes the trail."""
        return self.rank == 0


def find_place() -> Place | None:
    """Which of several processes this one is; ``None`` for a process that trains alone, as far as can be known now.

    Asked are torch's process group and accelerate's state, where they are there already, then the environment.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return _place(distributed.get_rank(), distributed.get_world_size(), _local_rank())
    state = getattr(sys.modules.get("accelerate.state"), "PartialState", None)
    shared = getattr(state, "_shared_state", None)  # asking PartialState() itself would initialise it
    if shared and shared.get("num_processes", 1) > 1:
        return _place(shared["process_index"], shared["num_processes"], _local_rank())
    for names in _ENVIRONMENTS:
        rank, world_size, local_rank = map(_whole, names)
        if rank is not None and world_size is not None:
            return _place(rank, world_size, local_rank)
    return None


def _place(rank: int, world_size: int, local_rank: int | None) -> Place | None:
    return Place(rank, world_size, local_rank) if 0 <= rank < world_size and world_size > 1 else None


def _local_rank() -> int | None:
    return next((value for names in _ENVIRONMENTS if (value := _whole(names[2])) is not None), None)


def _whole(name: str) -> int | None:
    value = os.environ.get(name, "")
    return int(value) if value.isascii() and value.isdigit() else None


def silent_trail(place: Place) -> Trail:
    """What stands in for the trail in a process that does not write; one for the whole process."""
    trail = _silent.setdefault((place.rank, place.world_size), SilentTrail(place.rank, place.world_size))
    return cast("Trail", trail)


def refuse_private_ranks(place: Place | None) -> None:
    """Refuse a run under differential privacy in one of several processes, before anything is opened or read.

    Raises:
        UnsupportedTrainerError: this process is one of several.
    """
    if place is not None:
        raise UnsupportedTrainerError(
            f"This process is rank {place.rank} of {place.world_size}, and training over several processes cannot be "
            "made private yet: each would sample and add noise on its own.",
            next_step="Train in one process with one GPU, or open the run without privacy. Nothing was trained.",
            code="several-processes",
        )


@dataclass(frozen=True)
class Birth:
    """In which process a run was made, and how often that had been forked by then."""

    process: int
    forks: int

    @classmethod
    def now(cls) -> Birth:
        """Here and now."""
        return cls(os.getpid(), _forks)

    @property
    def elsewhere(self) -> bool:
        """Whether this process is a child that was forked since, so that it has a copy of the run."""
        return self.process != os.getpid()

    @property
    def may_have_children(self) -> bool:
        """Whether this process was forked since."""
        return not self.elsewhere and self.forks != _forks


# --- one run ---------------------------------------------------------------------------------------------------------


class Ranks:
    """The processes of one run, as one of them sees them.

    Args:
        place: which one this is.
        experiment: the run's experiment; with how many runs of it were opened here it tells this run from others.
        trail: what the run is written to from here.
        late: the run was opened before this process could know that it is one of several.
        forked: this is a child of the process that opened the run, and will end without a word.
    """

    def __init__(
        self, place: Place, experiment: str, trail: Trail, *, late: bool = False, forked: bool = False
    ) -> None:
        self.place = place
        self.evidence = Evidence()
        self.forked = forked
        self._late = late
        _opened[experiment] = _opened.get(experiment, 0) + 1
        name = hashlib.sha256(experiment.encode()).hexdigest()[:16]
        self._key = f"{name}/{_opened[experiment]}"
        self._exchange: Exchange | None = None
        self._told_at = 0.0
        self._looked_at = 0.0
        self._diverged: dict[int, str] = {}
        self._formed = False
        self._ended = False
        self._reported = False
        self._lock = threading.Lock()
        self._before = dict(getattr(trail, "taken", {}))

    @property
    def writes(self) -> bool:
        """Whether the run's entries go into the trail from here."""
        return self.place.writes or self._late

    def must_wait(self, run: Run) -> bool:
        """Whether an entry must be on the disk before the run goes on.

        A child ends without its exit handlers, so nothing is flushed there but at the end of a training.
        """
        return self.forked and run.training is None

    def add(self, name: str, values: dict[str, Any]) -> None:
        """Plain values that this process's ``run.rank`` shows under ``more``, such as its part of a compute ledger."""
        self.evidence.more[name] = values

    # --- the run's life ----------------------------------------------------------------------------------------------

    def opened(self, run: Run) -> None:
        """The run is open: where the process group is there already, all of them take the id of rank 0's."""
        self._connect(run)

    def saw(self, run: Run, event: Event) -> None:
        """The run recorded ``event``, here or into nothing."""
        self.evidence.saw(event)
        if not isinstance(event, Step):
            return
        self._connect(run)  # a loop that is written by hand may form the group at any time
        if self._exchange is None:
            return
        now = time.monotonic()
        if not self.place.writes and now - self._told_at >= TELL_S:
            self._told_at = now
            self._tell(self._word(run))
        elif self.place.writes and event.weights_digest is not None and now - self._looked_at >= TELL_S:
            self._looked_at = now
            self._look(run)

    @contextlib.contextmanager
    def training(self, run: Run, trainer: Any, *, resumed: bool) -> Iterator[None]:
        """While it lasts ``trainer`` trains in all of the processes."""
        self.evidence.device = str(trainer.args.device.type)
        self.evidence.strategy = spread(trainer)
        self._connect(run)
        self._form(run)
        with self.evidence.training(), hear_rows(trainer, self.evidence, resumed=resumed):
            yield

    def ended(self, run: Run, status: str, failure: BaseException | None) -> None:
        """The run ends here: tell rank 0; in its process, hear the others and record what each of them told."""
        if self._ended:
            return
        self._ended = True
        self._connect(run)
        wait = _wait(WAIT_S if failure is None else WAIT_FAILED_S)
        self._end(run, status, type(failure).__name__ if failure is not None else None, wait)

    def process_ends(self, run: Run, reason: str) -> None:
        """The process ends for ``reason``, at once: what was heard until now has to do. Called in any thread."""
        self._end(run, "interrupted", reason, 0.0)

    def _end(self, run: Run, status: str, reason: str | None, wait: float) -> None:
        self._form(run)
        word = self._word(run, final=True)
        word.status, word.reason = status, reason
        if not self.place.writes:
            if not self._tell(word):
                run.warn(
                    f"What rank {self.place.rank} saw of this training could not be told to rank 0 "
                    f"({self._exchange.failure if self._exchange else 'there is no process group'}); the trail says so."
                )
            return
        words = self._gather(wait)
        with self._lock:
            if self._reported:
                return
            self._reported = True
        for event in self._reports(word, words):
            run.record(event)
            if event.diverged_at is not None:
                run.warn(_diverged(event.rank, event.diverged_at))

    # --- the exchange ------------------------------------------------------------------------------------------------

    def _connect(self, run: Run) -> None:
        """Begin the exchange where there is a store by now."""
        if self._exchange is not None:
            return
        store = default_store()
        if store is None:
            return
        self._exchange = exchange = Exchange(store, self._key)
        if self.place.writes:
            exchange.put("run", run.id.encode())
            return
        self._tell(self._word(run))
        if self._late:
            return
        deadline = time.monotonic() + WAIT_OPENING_S
        while (found := exchange.get("run")) is None and exchange.failure is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if found is not None:
            run.id = run.state.run_id = found.decode()
        else:
            run.warn("Rank 0 has opened no run of this experiment, so nothing of what this process sees is recorded.")

    def _form(self, run: Run) -> None:
        """Record that the run is trained by several processes, once."""
        if self._formed:
            return
        self._formed = True
        strategy = self.evidence.strategy
        run.record(
            RanksFormed(
                world_size=self.place.world_size,
                rank=self.place.rank,
                backend=_backend(),
                strategy=strategy,
                loss=f"rank {self.place.rank}" if strategy is not None else None,
                launcher="torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else None,
                late=self._late,
            )
        )
        if self._late:
            run.warn(
                f"This run was opened before its process could know that it is rank {self.place.rank} of "
                f"{self.place.world_size}: every rank has opened one of its own. Open it after the process group is "
                "initialised, or start the processes with torchrun."
            )

    def _word(self, run: Run, *, final: bool = False) -> Word:
        word = self.evidence.word(self.place.rank, self.place.local_rank, run.steps, final=final)
        taken = getattr(run.trail, "taken", None)
        if taken is not None:  # also what did not go through the run, such as annotations
            counts = {kind: count - self._before.get(kind, 0) for kind, count in sorted(taken.items())}
            word.entries = {kind: count for kind, count in counts.items() if count and kind != RanksFormed.TYPE}
        return word

    def _tell(self, word: Word) -> bool:
        return self._exchange is not None and self._exchange.put(str(word.rank), msgspec.json.encode(word))

    def _heard(self, rank: int) -> Word | None:
        """The newest word of ``rank``."""
        said = self._exchange.get(str(rank)) if self._exchange is not None else None
        try:
            return msgspec.json.decode(said, type=Word) if said is not None else None
        except msgspec.MsgspecError:  # another version's: as if it had said nothing
            return None

    def _others(self) -> list[int]:
        return [rank for rank in range(self.place.world_size) if rank != self.place.rank]

    def _look(self, run: Run) -> None:
        """Compare weights on the way."""
        mine = self._word(run, final=True)
        for rank in self._others():
            word = self._heard(rank)
            found = compare(mine, word) if word is not None else None
            if found is not None and found.diverged_at is not None and rank not in self._diverged:
                self._diverged[rank] = found.diverged_at
                run.warn(_diverged(rank, found.diverged_at))

    def _gather(self, seconds: float) -> dict[int, Word]:
        """The newest words of the others, each the last one, or of a process that is gone, or of when time is up."""
        words: dict[int, Word] = {}
        waiting = self._others() if self._exchange is not None else []
        deadline = time.monotonic() + seconds
        while waiting:
            for rank in waiting:
                gone = rank in words and words[rank].identity.is_gone()  # asked first: its last word may come meanwhile
                word = self._heard(rank) or words.get(rank)
                if word is not None:
                    words[rank] = word
                if gone or (word is not None and word.final):
                    waiting = [other for other in waiting if other != rank]
            if time.monotonic() >= deadline or (self._exchange is not None and self._exchange.failure is not None):
                break
            if waiting:
                time.sleep(POLL_S)
        return words

    # --- what is recorded --------------------------------------------------------------------------------------------

    def _reports(self, mine: Word, words: dict[int, Word]) -> Iterator[RankReported]:
        machines = [mine.identity.machine]
        machines += [word.identity.machine for _, word in sorted(words.items())]
        nodes = list(dict.fromkeys(machines))
        yield self._report(mine, Comparison("reference", len(mine.points), None, []), "reported", nodes)
        for rank in self._others():
            word = words.get(rank)
            if word is None:
                yield RankReported(rank=rank, world_size=self.place.world_size, heard="never")
                continue
            heard = "reported" if word.final else "lost" if word.identity.is_gone() else "late"
            found, before = compare(mine, word), self._diverged.get(rank)
            if before is not None:  # seen on the way; what differed first may not be among the newest any more
                found = Comparison("diverged", max(found.compared, 1), before, found.differs)
            yield self._report(word, found, heard, nodes)

    def _report(self, word: Word, compared: Comparison, heard: str, nodes: list[str]) -> RankReported:
        same: tuple[str, ...] = (
            "rank",
            "status",
            "reason",
            "local_rank",
            "device",
            "hardware",
            "steps",
            "batches",
            "rows",
        )
        same += ("rows_digest", "final_weights", "entries", "loss", "peak_memory_bytes", "peak_device_memory_bytes")
        return RankReported(
            world_size=self.place.world_size,
            heard=heard,
            node=nodes.index(word.identity.machine) if word.identity.machine else None,
            weights=compared.weights,
            compared=compared.compared,
            diverged_at=compared.diverged_at,
            differs=compared.differs,
            seconds=word.seconds,
            more=word.more,
            **{name: getattr(word, name) for name in same},
        )


def _diverged(rank: int, at: str) -> str:
    return f"The weights of rank {rank} are not those of rank 0 any more ({at}): the processes train different models."


def _wait(usual: float) -> float:
    try:
        asked = float(os.environ[ENV_WAIT])
    except (KeyError, ValueError):
        return usual
    return asked if 0 <= asked < 3600 else usual  # noqa: PLR2004  an hour; not NaN


def _backend() -> str | None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return str(distributed.get_backend())


# --- children of the process that opened the run ---------------------------------------------------------------------


@contextlib.contextmanager
def training_in_ranks(run: Run, trainer: Any, *, resumed: bool) -> Iterator[None]:
    """While it lasts ``trainer`` trains, in one of several processes where there are several; else nothing is done.

    A process that was forked while the run was open (``notebook_launcher`` in an audited cell) has only this training:
    it becomes one of the run's processes here, and is done when the training ends.

    Raises:
        UnsupportedTrainerError: there are several, and the run is under differential privacy.
    """
    place = find_place()
    if run.private:
        refuse_private_ranks(place)
    child = run.birth.elsewhere
    if place is not None and (run.ranks is None or (child and run.ranks.forked)):
        if child and not place.writes:
            run.trail = silent_trail(place)
        run.ranks = Ranks(place, run.experiment, run.trail, late=not child, forked=child)
        run.ranks.evidence.runs_on(capture_environment())
        run.ranks.opened(run)
    ranks = run.ranks
    if ranks is None:
        yield
        return
    if not ranks.forked:
        with ranks.training(run, trainer, resumed=resumed):
            yield
        return
    failure: BaseException | None = None
    try:
        with ranks.training(run, trainer, resumed=resumed):
            yield
    except BaseException as error:
        failure = error
        raise
    finally:
        ranks.ended(run, "failed" if failure is not None else "completed", failure)
        run.trail.flush()  # a child that was forked ends without its exit handlers


def count_children(run: Run) -> None:
    """Let a run that others trained, in processes forked from this one, know how many steps they recorded."""
    if run.steps or not run.birth.may_have_children:
        return
    run.trail.flush()
    reader = run.trail.reader()
    formed = [decode_body(entry.type, entry.body) for entry in reader.entries(type=RanksFormed.TYPE, run=run.id)]
    if not formed:
        return
    for entry in reader.entries(type=Step.TYPE, run=run.id):
        step = decode_body(entry.type, entry.body)
        if isinstance(step, Step):
            run.state.step = max(run.state.step, step.step)
