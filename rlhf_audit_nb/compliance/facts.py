"""What the entries say, run by run, as data: the facts that assessments, reports and cards share. Floor 3.

Nothing is computed here that the trail does not hold: an ε is one that was recorded, never one worked out again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, TypeVar

from rlhf_audit_nb.errors import AuditError
from rlhf_audit_nb.events import (
    BudgetSet,
    CellAudited,
    CodeBound,
    DataBound,
    DataRead,
    EnvironmentCaptured,
    Event,
    LabelsReleased,
    ModelBound,
    PrivacyAudited,
    PrivacyInherited,
    PrivacyPopulation,
    PrivacyReserved,
    PrivacySettled,
    RunFailure,
    RunFinished,
    RunInterrupted,
    RunStarted,
    Step,
    TrailCreated,
    TrainerAttached,
    WeightsSaved,
)
from rlhf_audit_nb.privacy.ledger import fold

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlhf_audit_nb.compliance.evidence import Evidence, Item
    from rlhf_audit_nb.events import Number

__all__ = [
    "Composed",
    "Raise",
    "RunFacts",
    "Spend",
    "Steps",
    "composed_privacy",
    "origin_of",
    "run_facts",
    "training_steps",
]

EventT = TypeVar("EventT", bound=Event)
Guarantee = Literal["bound", "inherited", "none", "asked", "untrained"]


@dataclass(frozen=True)
class Spend:
    """One private training: its reservation, and what it really spent once that was settled.

    ``doubt`` says why a settlement that stands in the trail is not believed; then it counts as not settled.
    ``audited`` is what its canaries showed.
    """

    item: Item
    reserved: PrivacyReserved
    settled_item: Item | None = None
    settled: PrivacySettled | None = None
    doubt: str | None = None
    audited: tuple[Item, PrivacyAudited] | None = None

    @property
    def contradicted(self) -> bool:
        """Whether its canaries show more than the epsilon that is claimed."""
        return self.audited is not None and self.audited[1].contradicts

    @property
    def total(self) -> Number:
        """The composed ε that stands: what was settled, else the whole reservation."""
        return self.reserved.epsilon_planned if self.settled is None else self.settled.epsilon_total

    @property
    def steps(self) -> int:
        """Steps that count: those that ran once settled, else all that were reserved."""
        return self.reserved.steps if self.settled is None else self.settled.steps

    @property
    def indices(self) -> tuple[int, ...]:
        """The entries that say so."""
        return (self.item.index,) + (() if self.settled_item is None else (self.settled_item.index,))


@dataclass(frozen=True)
class Steps:
    """The steps of one training: the entry of its first, and the number of its last."""

    first_entry: int
    last: int


@dataclass(frozen=True)
class RunFacts:
    """One run, from all entries that carry its id."""

    run: str
    item: Item
    started: RunStarted
    finished: tuple[Item, RunFinished] | None
    interrupted: tuple[Item, RunInterrupted] | None
    environments: tuple[tuple[Item, EnvironmentCaptured], ...]
    data: tuple[tuple[Item, DataBound], ...]
    models: tuple[tuple[Item, ModelBound], ...]
    trainers: tuple[tuple[Item, TrainerAttached], ...]
    weights: tuple[tuple[Item, WeightsSaved], ...]
    steps: tuple[tuple[Item, Step], ...]
    spends: tuple[Spend, ...]
    last_time: int
    inherited: tuple[tuple[Item, PrivacyInherited], ...] = ()
    cells: tuple[tuple[Item, CellAudited], ...] = ()
    failures: tuple[tuple[Item, RunFailure], ...] = ()
    reads: tuple[tuple[Item, DataRead], ...] = ()
    code: tuple[tuple[Item, CodeBound], ...] = ()

    @property
    def status(self) -> str:
        """How the run ended, or ``open``."""
        if self.finished is not None:
            return self.finished[1].status
        return "interrupted" if self.interrupted is not None else "open"

    @property
    def guarantee(self) -> Guarantee:
        """What can be said of differential privacy.

        ``bound``: every training reserved a spend, or inherits one; ``inherited``: all inherit and nothing was charged;
        ``none``: trained without; ``asked``: a configuration asked for it but a training stands without a reservation,
        so no bound can be stated; ``untrained``: nothing was trained.
        """
        if len(self.spends) + len(self.inherited) >= max(len(self.trainers), 1):
            return "bound" if self.spends else "inherited"
        if self.spends or self.inherited or (self.started.privacy is not None and self.trainers):
            return "asked"
        return "none" if self.trainers or self.steps else "untrained"

    @property
    def steps_done(self) -> int:
        """Optimizer steps: as closed, else the last one recorded."""
        if self.finished is not None:
            return self.finished[1].steps
        return max((step.step for _, step in self.steps), default=0)

    def model(self, role: str) -> tuple[Item, ModelBound] | None:
        """The last model of a role."""
        return next((pair for pair in reversed(self.models) if pair[1].role == role), None)


@dataclass(frozen=True)
class Raise:
    """A reservation under a larger ε budget than the reservation before it, and the entries of both."""

    before: float
    after: float
    before_index: int
    index: int


@dataclass(frozen=True)
class Composed:
    """The privacy loss of the population over all private runs, as the trail last recorded it.

    ``total`` is ``None`` where no run is private; ``unbounded_runs`` were trained without differential privacy (or
    without a recorded reservation) and are covered by no bound at all. ``set_budgets`` are those that somebody set,
    in an entry of their own. Where annotators of several populations were trained on, ``total`` and ``units`` are of
    the one that spent most, and ``trainings_of_most`` of all ``trainings`` are its own. ``releases`` are those of
    labels, on a trail that counts labels: there nothing is spent by trainings. ``inherited_runs`` charged nothing and
    took what they learnt from private models. ``contradicted`` are the entries of canaries that showed more than their
    training claims.
    """

    total: Number | None
    unit: str | None
    adjacency: str | None
    delta: float | None
    units: int | None
    budget: float | None
    settled: bool
    indices: tuple[int, ...]
    other_deltas: tuple[float, ...]
    private_runs: int
    unbounded_runs: int
    raises: tuple[Raise, ...] = ()
    set_budgets: tuple[tuple[Item, BudgetSet], ...] = ()
    populations: int = 1
    trainings_of_most: int = 0
    trainings: int = 0
    releases: tuple[tuple[Item, LabelsReleased], ...] = ()
    inherited_runs: int = 0
    contradicted: tuple[int, ...] = ()

    @property
    def whose(self) -> str:
        """Whose figure ``total`` is where there are several populations; else nothing."""
        if self.populations <= 1:
            return ""
        size = f"{self.units} {self.unit}s" if self.units is not None else f"{self.unit}s"
        return (
            f"the population that spent most ({size}, {self.trainings_of_most} of {self.trainings} private trainings; "
            f"by their recorded rosters the {self.populations} populations share nobody)"
        )


def run_facts(evidence: Evidence) -> tuple[RunFacts, ...]:
    """All runs in the order in which they were opened."""
    if "runs" not in evidence.memo:
        gone = {event.run: (item, event) for item, event in evidence.of(RunInterrupted)}
        grouped = _Grouped(evidence)
        evidence.memo["runs"] = tuple(
            grouped.facts(item, started, gone.get(item.run)) for item, started in evidence.of(RunStarted) if item.run
        )
    found: tuple[RunFacts, ...] = evidence.memo["runs"]
    return found


def training_steps(evidence: Evidence) -> dict[int, Steps]:
    """The steps of each training that took any, by the entry of its trainer."""
    if "steps" not in evidence.memo:
        found: dict[int, Steps] = {}
        now: dict[str | None, int] = {}
        for item in evidence.items:
            if isinstance(item.event, TrainerAttached):
                now[item.run] = item.index
            elif isinstance(item.event, Step) and item.run in now:
                before = found.get(now[item.run], Steps(item.index, 0))
                found[now[item.run]] = Steps(before.first_entry, max(before.last, item.event.step))
        evidence.memo["steps"] = found
    steps: dict[int, Steps] = evidence.memo["steps"]
    return steps


class _Grouped:
    """Entries by run, gathered in one pass over the evidence."""

    def __init__(self, evidence: Evidence) -> None:
        self._last: dict[str, int] = {}
        for item in evidence.items:
            if item.run:
                self._last[item.run] = max(item.time, self._last.get(item.run, item.time))
        self._environments = _by_run(evidence.of(EnvironmentCaptured))
        self._data = _by_run(evidence.of(DataBound))
        self._models = _by_run(evidence.of(ModelBound))
        self._trainers = _by_run(evidence.of(TrainerAttached))
        self._weights = _by_run(evidence.of(WeightsSaved))
        self._steps = _by_run(evidence.of(Step))
        self._reserved = _by_run(evidence.of(PrivacyReserved))
        self._inherited = _by_run(evidence.of(PrivacyInherited))
        self._settled = {event.reservation: (item, event) for item, event in evidence.of(PrivacySettled)}
        self._doubts = _doubts(evidence)
        self._audited = {event.reservation: (item, event) for item, event in evidence.of(PrivacyAudited)}
        self._finished = _by_run(evidence.of(RunFinished))
        self._cells = _by_run(evidence.of(CellAudited))
        self._failures = _by_run(evidence.of(RunFailure))
        self._reads = _by_run(evidence.of(DataRead))
        self._code = _by_run(evidence.of(CodeBound))

    def facts(self, item: Item, started: RunStarted, gone: tuple[Item, RunInterrupted] | None) -> RunFacts:
        run = item.run or ""
        finished = self._finished.get(run, ())
        return RunFacts(
            run=run,
            item=item,
            started=started,
            finished=finished[-1] if finished else None,
            interrupted=gone,
            environments=self._environments.get(run, ()),
            data=self._data.get(run, ()),
            models=self._models.get(run, ()),
            trainers=self._trainers.get(run, ()),
            weights=self._weights.get(run, ()),
            steps=self._steps.get(run, ()),
            spends=tuple(self._spend(at, reserved) for at, reserved in self._reserved.get(run, ())),
            last_time=self._last[run],
            inherited=self._inherited.get(run, ()),
            cells=self._cells.get(run, ()),
            failures=self._failures.get(run, ()),
            reads=self._reads.get(run, ()),
            code=self._code.get(run, ()),
        )

    def _spend(self, item: Item, reserved: PrivacyReserved) -> Spend:
        settled = self._settled.get(reserved.reservation)
        doubt = self._doubts.get(reserved.reservation)
        if doubt is not None:
            return Spend(item, reserved, doubt=doubt, audited=self._audited.get(reserved.reservation))
        if settled is None or settled[0].index < item.index:
            return Spend(item, reserved)
        return Spend(item, reserved, *settled, audited=self._audited.get(reserved.reservation))


def _doubts(evidence: Evidence) -> dict[str, str]:
    """Settlements that the ledger does not believe, by their reservation."""
    if not evidence.of(PrivacySettled):
        return {}
    try:
        ledger = fold(evidence.entries)
    except AuditError:  # a part of a trail, as a record holds it, may not add up; the trail's own ledger is checked
        return {}
    return {spend.reservation: spend.doubt for spend in ledger.doubts() if spend.doubt is not None}


def _by_run(pairs: tuple[tuple[Item, EventT], ...]) -> dict[str, tuple[tuple[Item, EventT], ...]]:
    found: dict[str, list[tuple[Item, EventT]]] = {}
    for item, event in pairs:
        if item.run:
            found.setdefault(item.run, []).append((item, event))
    return {run: tuple(events) for run, events in found.items()}


def composed_privacy(
    runs: tuple[RunFacts, ...],
    set_budgets: tuple[tuple[Item, BudgetSet], ...] = (),
    rosters: tuple[tuple[Item, PrivacyPopulation], ...] = (),
    releases: tuple[tuple[Item, LabelsReleased], ...] = (),
) -> Composed:
    """The composed privacy loss, from the totals that reservations and settlements recorded.

    Each total already composes what came before it for the same population; an unsettled reservation counts in full.
    So the figure that stands is the largest at the δ of the newest reservation. Which populations share nobody is what
    the entries of their ``rosters`` say.
    """
    spends = sorted((spend for run in runs for spend in run.spends), key=lambda spend: spend.item.index)
    unbounded = sum(run.guarantee in {"none", "asked"} for run in runs)
    private = sum(run.guarantee == "bound" for run in runs)
    inherited = sum(run.guarantee == "inherited" for run in runs)
    if not spends:
        indices = sorted(item.index for item, _ in (*releases, *(set_budgets if releases else ())))
        return Composed(None, None, None, None, None, None, settled=True, indices=tuple(indices), other_deltas=(),
                        private_runs=private, unbounded_runs=unbounded, set_budgets=set_budgets,
                        releases=releases, inherited_runs=inherited)  # fmt: skip
    newest = spends[-1].reserved
    same = [spend for spend in spends if spend.reserved.delta == newest.delta]
    others = tuple(sorted({spend.reserved.delta for spend in spends} - {newest.delta}))
    most = max(same, key=lambda spend: _size(spend.total))
    groups = _groups(spends, [event for _, event in rosters])
    whose = next(group for group in groups if most in group)
    return Composed(
        total=most.total,
        unit=newest.unit,
        adjacency=newest.adjacency,
        delta=newest.delta,
        units=most.reserved.units if len(groups) > 1 else newest.units,
        budget=newest.epsilon_budget,
        settled=all(spend.settled is not None for spend in spends),
        indices=tuple(
            sorted([*(index for one in spends for index in one.indices), *(item.index for item, _ in set_budgets)])
        ),
        other_deltas=others,
        private_runs=private,
        unbounded_runs=unbounded,
        raises=tuple(_raises(spends)),
        set_budgets=set_budgets,
        populations=len(groups),
        trainings_of_most=len(whose),
        trainings=len(spends),
        inherited_runs=inherited,
        contradicted=tuple(
            spend.audited[0].index for spend in spends if spend.audited is not None and spend.contradicted
        ),
    )


def _groups(spends: list[Spend], rosters: list[PrivacyPopulation]) -> list[list[Spend]]:
    """The trainings by population; those of rosters that are not said to share nobody are together."""
    apart = {(event.population, other) for event in rosters for other in event.disjoint_from}
    groups: list[list[Spend]] = []
    for spend in spends:
        name = spend.reserved.population
        near = [
            group
            for group in groups
            if name is None
            or any((name, one.reserved.population) not in apart and (one.reserved.population, name) not in apart
                   for one in group)
        ]  # fmt: skip
        groups = [group for group in groups if group not in near] + [[*(one for group in near for one in group), spend]]
    return groups


def _raises(spends: list[Spend]) -> Iterator[Raise]:
    for earlier, later in pairwise(spends):
        before, after = earlier.reserved.epsilon_budget, later.reserved.epsilon_budget
        if after > before:
            yield Raise(before, after, earlier.item.index, later.item.index)


def _size(value: Number) -> float:
    return math.inf if isinstance(value, str) else float(value)


def origin_of(evidence: Evidence) -> tuple[Item, TrailCreated] | None:
    """The entry that created the trail, with its public keys; ``None`` where the evidence does not hold it."""
    created = evidence.of(TrailCreated)
    return created[0] if created else None
