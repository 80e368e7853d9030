"""The budget, folded from the trail: what each population has spent or reserved over all runs. Floor 2.

A training reserves its whole plan in one entry (``privacy.reserved``) before its first step; the entry that settles it
(``privacy.settled``) puts the steps that really ran in its place. A reservation that was never settled, because the
process died, counts in full for ever. Mechanisms are kept, not epsilons, and are composed again each time.

A settlement needs its evidence in the trail. One that stands in another run than its reservation, or that says fewer
steps than the entries of that training show (the ``train.step`` entries, one of every n under an audit frequency of n,
and the steps that the run counted when it closed) is not believed: the whole reservation counts, and the ledger says
why (`Spend.doubt`). Whoever can sign entries could also leave steps out of the trail; that is not found here.

What a run may plan with is its own configuration's epsilon, until somebody sets the trail's budget in an entry
(``privacy.budget``): from then on no run may ask for more than the newest such entry says.

Budget may be held for trainings to come (``privacy.slots``, see `slots`): a slot counts as what it may cost at most,
until the reservation that names it takes its place or it is released. While slots are open, everything is composed with
them: nobody knows yet whom they will be used for.

Labels that were released (``privacy.labels``) are charged for good when they are; training on them costs nothing more.

Trainings are composed in parallel, each against the whole budget, only where the trail proves that their annotators are
disjoint (`populations`); everything else is composed. The trail's figure is that of the population that spent most.

One trail keeps one unit. Runs that count annotators and runs that count pairs cannot be added up, so a trail with both
is refused; so is one whose runs tell annotators apart by different columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import BudgetExceededError, PrivacyError
from rlhf_audit_nb.events import (
    BudgetSet,
    LabelsReleased,
    PrivacyReserved,
    PrivacySettled,
    RunFinished,
    RunResumed,
    RunStarted,
    SlotsReleased,
    SlotsReserved,
    Step,
    TrainerAttached,
    decode_body,
)
from rlhf_audit_nb.privacy.accountant import Accounted, Composable, Mechanism, compose, composed_epsilon
from rlhf_audit_nb.privacy.live_loss import effective_noise
from rlhf_audit_nb.privacy.populations import NOTHING_KNOWN, Registry, Roster
from rlhf_audit_nb.privacy.slots import Draw, Slot, slots_of

__all__ = ["EVIDENCE", "KINDS", "Group", "LabelSpend", "Ledger", "Limit", "Spend", "fold", "mechanism_of"]

KINDS = (
    PrivacyReserved.TYPE,
    PrivacySettled.TYPE,
    BudgetSet.TYPE,
    LabelsReleased.TYPE,
    SlotsReserved.TYPE,
    SlotsReleased.TYPE,
)
"""The ledger's own entries."""

EVIDENCE = (RunStarted.TYPE, TrainerAttached.TYPE, RunResumed.TYPE, Step.TYPE, RunFinished.TYPE)
"""What `fold` needs besides of the runs that reserved: what their settlements are held against."""

_SLACK = 1e-9  # what sums of epsilons may lose in float64


class LedgerEntry(Protocol):
    """What the ledger reads of a trail's entry."""

    @property
    def index(self) -> int:
        """Its place in the trail."""

    @property
    def type(self) -> str:
        """The event's type."""

    @property
    def run(self) -> str | None:
        """The run that it belongs to."""

    @property
    def body(self) -> bytes:
        """The event's public body."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A budget, and the entry that says so.

    Attributes:
        index: that entry.
        unit: the privacy unit that it counts.
        epsilon: what all runs together may cost,
        delta: at this delta.
        reason: why it was set; ``None`` where it is only what a run's configuration named.
        by: who set it, likewise.
    """

    index: int
    unit: str
    epsilon: float
    delta: float
    reason: str | None = None
    by: str | None = None


@dataclass(frozen=True, slots=True)
class Spend:
    """One training's place in the ledger.

    Attributes:
        reservation: its id.
        run: the run that reserved it.
        mechanism: sigma, q and the steps that count: those that ran once settled, all that were planned before.
        settled: whether the actual steps are known.
        steps: the steps that count (``mechanism.steps``).
        asked: the budget that the run's configuration named.
        population: the roster that it trained on; ``None`` where none was recorded.
        units: how many units were on it; ``None`` where that is not known.
        reserved_steps: the steps that were planned.
        settled_in: the entry that settles it, believed or not.
        doubt: why that settlement is not believed, as a sentence; then the whole reservation counts.
        experiment: the name of the run's experiment; ``None`` where the run's start was not read.
        planned: the composed total that the reservation recorded.
        total: the composed total that was recorded of what counts; only a picture uses it, nothing is decided by it.
    """

    reservation: str
    run: str | None
    mechanism: Mechanism
    settled: bool
    steps: int
    asked: Limit
    population: str | None = None
    units: int | None = None
    reserved_steps: int = 0
    settled_in: int | None = None
    doubt: str | None = None
    experiment: str | None = None
    planned: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class Group:
    """Trainings that are composed with each other: those of one population, or of several that may share somebody.

    Attributes:
        populations: the rosters' names; ``None`` among them where one was not recorded.
        spends: the trainings, in the order of their reservations.
        slots: the open slots, which count for whoever there is.
    """

    populations: frozenset[str | None]
    spends: tuple[Spend, ...]
    slots: tuple[Slot, ...] = ()

    @property
    def mechanisms(self) -> tuple[Composable, ...]:
        """What counts."""
        return (
            *(spend.mechanism for spend in self.spends if spend.steps),
            *(slot.holds for slot in self.slots),
        )

    @property
    def proven(self) -> bool:
        """Whether its roster is known, so that others can be told apart from it."""
        return None not in self.populations

    @property
    def units(self) -> int | None:
        """How many annotators are on its largest roster; ``None`` where no roster is known."""
        return max((spend.units for spend in self.spends if spend.units is not None), default=None)

    def spent(self, delta: float) -> tuple[float, float]:
        """Composed epsilon of what was settled, and of that with all that is still reserved."""
        settled = composed_epsilon([spend.mechanism for spend in self.spends if spend.settled], delta)
        if all(spend.settled for spend in self.spends) and not self.slots:
            return settled, settled
        # Bounds on grids of their own may cross where the reservation is next to nothing.
        return settled, max(composed_epsilon(self.mechanisms, delta), settled)


@dataclass(frozen=True, slots=True)
class LabelSpend:
    """One release of labels in the ledger.

    Attributes:
        release: its id.
        index: its entry.
        labels: how many it released.
        epsilon: what it cost each of them.
        flip_probability: the chance with which each was flipped.
        total: what all releases up to it cost the label that they cost most.
        asked: the budget that it was released under.
    """

    release: str
    index: int
    labels: int
    epsilon: float
    flip_probability: float
    total: float
    asked: Limit


@dataclass(frozen=True, slots=True)
class Ledger:
    """What was spent on one trail.

    Attributes:
        unit: whose budget it is; ``None`` while nothing was spent and no budget was set.
        column: the column that tells units apart; ``None`` also where each row is one.
        spends: the trainings, in the order of their reservations.
        budgets: the budgets that were set, in order; the last one is in force.
        releases: the releases of labels, in order; only where the unit is ``label``.
        registry: the populations, as far as their rosters can be shown.
        slots: the budget that is held for trainings to come, slot by slot.
        committed: names of everything that made the total grow: slots that were ever reserved, and reservations that
            took no slot's place. While nothing is added to it, the total does not grow.
        slot_limit: the budget that the last slots were reserved under.
        drawn: the slots that were used, with the entry that did.
    """

    unit: str | None
    column: str | None
    spends: tuple[Spend, ...]
    budgets: tuple[Limit, ...] = ()
    releases: tuple[LabelSpend, ...] = ()
    registry: Registry = NOTHING_KNOWN
    slots: tuple[Slot, ...] = ()
    committed: frozenset[str] = frozenset()
    slot_limit: Limit | None = None
    drawn: Mapping[str, int] = field(default_factory=dict)

    @property
    def label_total(self) -> float:
        """What all releases together cost the label that they cost most; 0 where none was released. Pure: delta 0."""
        return self.releases[-1].total if self.releases else 0.0

    @property
    def groups(self) -> tuple[Group, ...]:
        """The trainings by population, those of rosters that are not proven disjoint together; oldest first."""
        if self.slots:
            return (Group(frozenset({None, *(spend.population for spend in self.spends)}), self.spends, self.slots),)
        return tuple(
            Group(names, tuple(spend for spend in self.spends if spend.population in names))
            for names in self.registry.groups(spend.population for spend in self.spends)
        )

    def doubts(self) -> tuple[Spend, ...]:
        """The trainings whose settlement is not believed."""
        return tuple(spend for spend in self.spends if spend.doubt is not None)

    @property
    def limit(self) -> Limit | None:
        """The budget in force: the one that was set last; while none was, the one that the last run named."""
        if self.budgets:
            return self.budgets[-1]
        last = self.spends or self.releases
        return last[-1].asked if last else self.slot_limit

    def draw(self, name: str) -> Draw:
        """The claim to an open slot.

        Raises:
            PrivacyError: ``slot-used``: a training took its place already; ``slot-unknown``: the trail holds no such
                slot, or it was released.
        """
        slot = next((one for one in self.slots if one.id == name), None)
        if slot is not None:
            return Draw(slot, self.committed)
        if name in self.drawn:
            raise PrivacyError(
                f"What this run of the sweep may spend is reserved already, by entry {self.drawn[name]}: a run trains "
                "privately once. Nothing was trained.",
                next_step="Train once in a notebook of a private sweep; let the sweep start a run that died again.",
                code="slot-used",
            )
        raise PrivacyError(
            f"This trail holds no budget for {name}, the place in a sweep that this run was started with, or it was "
            "given back. Nothing was trained.",
            next_step="Start the run again through the sweep, or without RLHF_AUDIT_SLOT.",
            code="slot-unknown",
        )

    def check(self, config: PrivacyConfig) -> None:
        """Whether a run may ask for what ``config`` asks for, now that the trail's budget was set (if it was).

        Raises:
            BudgetExceededError: it asks for a larger epsilon, or a larger delta, than the budget that was set.
        """
        limit = self.budgets[-1] if self.budgets else None
        if limit is None or (config.epsilon <= limit.epsilon and config.delta <= limit.delta):
            return
        asked = f"epsilon {config.epsilon:g}" if config.epsilon > limit.epsilon else f"delta {config.delta:g}"
        raised = f"--epsilon {max(config.epsilon, limit.epsilon):g} --delta {max(config.delta, limit.delta):g}"
        raise BudgetExceededError(
            f"This run asks for a budget of {asked}, and this trail's is epsilon {limit.epsilon:g} at delta "
            f"{limit.delta:g}: {limit.by} set it in entry {limit.index}.",
            next_step="Ask for no more than that, or have it raised, which is recorded: rlhf-audit budget set "
            f"{raised} --reason TEXT --by NAME. Nothing was trained.",
            code="budget-set",
        )

    def check_unit(self, unit: str) -> None:
        """Whether ``unit`` is what this trail counts, where it counts anything yet.

        Raises:
            PrivacyError: it counts another one.
        """
        if self.unit is not None and unit != self.unit:
            raise PrivacyError(
                f"This trail keeps the privacy budget of {self.unit}s; what counts {unit}s cannot be added to it.",
                next_step=f'Use unit="{self.unit}", or another trail (trail="...") for the other unit.',
                code="mixed-units",
            )

    def mechanisms(
        self, unit: str, column: str | None = None, roster: Roster | None = None, *, drawing: str | None = None
    ) -> tuple[Composable, ...]:
        """What counts against the budget of those who are on ``roster``.

        Args:
            unit: what a unit is.
            column: the data column that tells units apart.
            roster: whom the run is about to train on; without one, whoever that may be: everything counts.
            drawing: the slot that the run draws on, which is left out.

        Raises:
            PrivacyError: the trail's budget is kept for another unit, or by another column.
        """
        self.check_unit(unit)
        if (self.spends or self.slots) and column != self.column:
            same = f'Use annotator_column="{self.column}", or' if self.column else "Use"
            raise PrivacyError(
                f"This trail keeps the privacy budget of {self.unit}s by {_column_words(self.column)}; a run by "
                f"{_column_words(column)} cannot be added to it.",
                next_step=f'{same} another trail (trail="...") for the other column.',
                code="mixed-columns",
            )
        if roster is None or self.slots:
            held = (slot.holds for slot in self.slots if slot.id != drawing)
            return (*(spend.mechanism for spend in self.spends if spend.steps), *held)
        meets = self.registry.sharing((spend.population for spend in self.spends), roster)
        near = frozenset[str | None]().union(*(group.populations for group in self.groups if group.populations & meets))
        return tuple(spend.mechanism for spend in self.spends if spend.steps and spend.population in near)

    def certain(self, unit: str, column: str | None = None, *, drawing: str | None = None) -> tuple[Composable, ...]:
        """What counts whoever is on the roster: everything, unless a roster could be proven to share nobody with any.

        Raises:
            PrivacyError: as `mechanisms`.
        """
        everything = self.mechanisms(unit, column, drawing=drawing)
        if self.slots:
            return everything
        known = unit == "annotator" and self.registry.can_tell_apart(spend.population for spend in self.spends)
        return () if known else everything

    def largest(self, delta: float) -> Group | None:
        """The group that has spent or reserved most; ``None`` where nothing was."""
        return max(self.groups, key=lambda group: group.spent(delta)[1], default=None)

    def composed(self, delta: float) -> Accounted:
        """The trail's total at ``delta``: that of the population that spent or reserved most."""
        group = self.largest(delta)
        return compose(group.mechanisms if group is not None else (), delta)

    def left(self, config: PrivacyConfig) -> float:
        """What is left of the configured budget to the population that spent most, never below 0."""
        return max(config.epsilon - self.composed(config.delta).epsilon, 0.0)

    def spent(self, delta: float) -> tuple[float, float]:
        """What that population's settled trainings cost together, and what they cost with all that is reserved."""
        group = self.largest(delta)
        return group.spent(delta) if group is not None else (0.0, 0.0)


def mechanism_of(event: PrivacyReserved) -> Mechanism:
    """What is composed for a reservation.

    Raises:
        PrivacyError: it was sampled in a way that is not known here: what that costs is not guessed.
    """
    if event.sampled not in ("units", "pairs"):
        raise PrivacyError(
            f"Reservation {event.reservation} sampled {event.sampled!r}, which this version cannot account for.",
            next_step="Read the trail with the version that wrote it, or a newer one.",
            code="ledger",
        )
    pairs = event.max_pairs_per_unit if event.sampled == "pairs" else 1
    noise = effective_noise(event.noise_multiplier, event.loss_noise_multiplier)
    return Mechanism(noise, event.sampling_rate, event.steps, pairs)


def fold(entries: Iterable[LedgerEntry], registry: Registry = NOTHING_KNOWN) -> Ledger:
    """The ledger of a trail, from its entries in order.

    Args:
        entries: the entries; those that are neither of `KINDS` nor of `EVIDENCE` are passed over. Without those of
            `EVIDENCE` settlements cannot be held against anything.
        registry: the populations as far as they can be shown; without it nothing is composed in parallel.

    Raises:
        PrivacyError: reservations or budgets of two units, reservations by two columns; a settlement of an unknown or
            settled reservation, or of more steps.
        EntryError: an entry of the ledger is malformed.
    """
    folding = _Folding()
    for entry in entries:
        folding.add(entry)
    return folding.ledger(registry)


class _Folding:
    """One pass over a trail."""

    def __init__(self) -> None:
        self._first: PrivacyReserved | SlotsReserved | None = None
        self._slots: dict[str, Slot] = {}
        self._drawn: dict[str, int] = {}
        self._committed: set[str] = set()
        self._slot_limit: Limit | None = None
        self._spends: dict[str, Spend] = {}
        self._budgets: list[Limit] = []
        self._releases: dict[str, LabelSpend] = {}
        self._evidence: dict[str, _RunEvidence] = {}

    def add(self, entry: LedgerEntry) -> None:
        """Take the next entry in."""
        if entry.type not in KINDS and entry.type not in EVIDENCE:
            return
        event = decode_body(entry.type, entry.body)
        if isinstance(event, PrivacyReserved):
            self._first = self._first or event
            _check_same_population(self._first, event)
            _reserve(self._spends, event, entry)
            self._drawing(event, entry)
            self._of(entry).reserved(event.reservation)
        elif isinstance(event, PrivacySettled):
            _settle(self._spends, event, entry)
            self._of(entry).settled(event.reservation)
        elif isinstance(event, SlotsReserved):
            self._first = self._first or event
            _check_same_population(self._first, event)
            self._hold(event, entry)
        elif isinstance(event, SlotsReleased):
            self._give_back(event.sweep)
        elif isinstance(event, LabelsReleased):
            _release(self._releases, event, entry)
        elif isinstance(event, BudgetSet):
            self._budgets.append(
                Limit(entry.index, event.unit, event.epsilon, event.delta, reason=event.reason, by=event.by)
            )
        elif isinstance(event, Step):
            self._of(entry).step(event, entry.index)
        elif isinstance(event, RunStarted):
            self._of(entry).started(event)
        elif isinstance(event, TrainerAttached):
            self._of(entry).attached()
        elif isinstance(event, RunResumed):
            self._of(entry).resumed(event.step)
        elif isinstance(event, RunFinished):
            self._of(entry).finished(event.steps, entry.index)

    def _drawing(self, event: PrivacyReserved, entry: LedgerEntry) -> None:
        """Let a reservation take the place of the slot that it names; it counts in full whether there is one or not."""
        slot = self._slots.pop(event.slot, None) if event.slot is not None else None
        if slot is None:
            self._committed.add(f"reservation {event.reservation}")
            return
        self._drawn[slot.id] = entry.index

    def _hold(self, event: SlotsReserved, entry: LedgerEntry) -> None:
        if not event.added:
            self._give_back(event.sweep)
        for slot in slots_of(event, entry.index):
            if f"slot {slot.id}" in self._committed:
                raise PrivacyError(f"Slot {slot.id} stands twice in the trail.", code="ledger")
            self._committed.add(f"slot {slot.id}")
            self._slots[slot.id] = slot
        self._slot_limit = Limit(entry.index, event.unit, event.epsilon_budget, event.delta)

    def _give_back(self, sweep: str) -> None:
        self._slots = {name: slot for name, slot in self._slots.items() if slot.sweep != sweep}

    def _of(self, entry: LedgerEntry) -> _RunEvidence:
        return self._evidence.setdefault(entry.run or "", _RunEvidence())

    def ledger(self, registry: Registry) -> Ledger:
        """What it comes to."""
        units = {budget.unit for budget in self._budgets} | ({self._first.unit} if self._first is not None else set())
        if self._releases:
            units.add("label")
        if len(units) > 1:
            raise _mixed_units(*sorted(units))
        for run, evidence in self._evidence.items():
            self._hold_against(run, evidence)
        for name, spend in self._spends.items():
            self._spends[name] = replace(spend, experiment=self._evidence[spend.run or ""].experiment)
        column = None if self._first is None else self._first.column
        return Ledger(
            next(iter(units), None),
            column,
            tuple(self._spends.values()),
            tuple(self._budgets),
            tuple(self._releases.values()),
            registry,
            tuple(self._slots.values()),
            frozenset(self._committed),
            self._slot_limit,
            self._drawn,
        )

    def _hold_against(self, run: str, evidence: _RunEvidence) -> None:
        """Take back the settlements of a run that its own entries contradict."""
        of_run = [self._spends[name] for name in evidence.trainings if name in self._spends]
        for spend in of_run:
            shown, index = evidence.shown(spend.reservation)
            if spend.settled and shown > spend.steps:
                said = f"and entry {index} shows that {_steps(shown)} ran"
                self._disbelieve(spend, said)
        counted = sum(self._spends[spend.reservation].steps for spend in of_run)
        closed = evidence.closed_with()
        if closed is not None and counted < closed[0]:
            steps, index = closed
            for spend in of_run:
                if self._spends[spend.reservation].settled:
                    said = f"and entry {index} closes the run with {_steps(steps)}, of which {counted} are paid for"
                    self._disbelieve(spend, said)
        for spend in [self._spends[name] for name in evidence.settlements]:
            if spend.settled and (spend.run or "") != run:
                self._disbelieve(spend, "and stands in another run than its reservation")

    def _disbelieve(self, spend: Spend, why: str) -> None:
        full = spend.reserved_steps
        self._spends[spend.reservation] = replace(
            spend,
            mechanism=spend.mechanism.with_steps(full),
            steps=full,
            settled=False,
            total=spend.planned,
            doubt=f"Entry {spend.settled_in} settles {_steps(spend.steps)} {why}: it is not believed, and all "
            f"{_steps(full)} that entry {spend.asked.index} reserved count.",
        )


class _RunEvidence:
    """What the entries of one run show of its trainings."""

    def __init__(self) -> None:
        self.experiment: str | None = None
        self.trainings: list[str] = []
        self.settlements: set[str] = set()
        self._trainers = 0
        self._finished: tuple[int, int] | None = None
        self._open: set[str] = set()
        self._last: str | None = None
        self._resumed_at = 0
        self._began_at: dict[str, int] = {}
        self._seen: dict[str, tuple[int, int, int]] = {}  # first step, last step, the entry that shows it

    def started(self, event: RunStarted) -> None:
        """The run's first entry."""
        self.experiment = event.experiment

    def attached(self) -> None:
        """A trainer begins: it has yet to reserve, if it does."""
        self._trainers += 1
        self._last, self._resumed_at = None, 0

    def resumed(self, step: int) -> None:
        """The trainer goes on from a checkpoint of that step."""
        self._resumed_at = step

    def reserved(self, name: str) -> None:
        """A training of this run reserved."""
        self.trainings.append(name)
        self._open.add(name)
        self._last = name
        self._began_at[name] = self._resumed_at

    def settled(self, name: str) -> None:
        """A settlement stands in this run."""
        self.settlements.add(name)
        self._open.discard(name)

    def step(self, event: Step, index: int) -> None:
        """A step: of every training that is not settled yet, and of the last one, whose last entry may come after."""
        if event.notes and not _NO_STEP.isdisjoint(event.notes):
            return
        for name in {*self._open, *([self._last] if self._last is not None else [])}:
            first, last, at = self._seen.get(name, (event.step, event.step, index))
            self._seen[name] = (min(first, event.step), *max((last, at), (event.step, index), key=lambda pair: pair[0]))

    def finished(self, steps: int, index: int) -> None:
        """The run was closed."""
        self._finished = (steps, index)

    def closed_with(self) -> tuple[int, int] | None:
        """How many steps the run was closed with, and the entry; ``None`` where not all of them were reserved for."""
        return self._finished if self._trainers <= len(self.trainings) else None

    def shown(self, name: str) -> tuple[int, int]:
        """How many steps of a training these entries show at least, and the entry that does.

        Steps are counted from 1, or on from the checkpoint that the training was resumed from.
        """
        if name not in self._seen:
            return 0, -1
        first, last, index = self._seen[name]
        return max(last - self._began_at[name], last - first + 1), index


_NO_STEP = frozenset({"evaluation", "the step failed"})
"""Notes on entries that tell of something else than a step that was taken."""


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"


def _check_same_population(first: PrivacyReserved | SlotsReserved, other: PrivacyReserved | SlotsReserved) -> None:
    if other.unit != first.unit:
        raise _mixed_units(first.unit, other.unit)
    if other.column != first.column:
        raise PrivacyError(
            f"The trail holds reservations for {first.unit}s of {_column_words(first.column)} and of "
            f"{_column_words(other.column)}; they cannot be added up.",
            next_step="Keep one trail for each annotator column.",
            code="mixed-columns",
        )


def _mixed_units(first: str, second: str) -> PrivacyError:
    return PrivacyError(
        f"The trail holds budgets for {first}s and for {second}s; they cannot be added up.",
        next_step="Keep one trail for each privacy unit.",
        code="mixed-units",
    )


def _column_words(column: str | None) -> str:
    return f"the column {column!r}" if column else "a column that is not recorded"


def _reserve(spends: dict[str, Spend], event: PrivacyReserved, entry: LedgerEntry) -> None:
    if event.reservation in spends:
        raise PrivacyError(f"Reservation {event.reservation} stands twice in the trail.", code="ledger")
    asked = Limit(entry.index, event.unit, event.epsilon_budget, event.delta)
    spends[event.reservation] = Spend(
        event.reservation,
        entry.run,
        mechanism_of(event),
        settled=False,
        steps=event.steps,
        asked=asked,
        population=event.population,
        units=event.units,
        reserved_steps=event.steps,
        planned=float(event.epsilon_planned),
        total=float(event.epsilon_planned),
    )


def _settle(spends: dict[str, Spend], event: PrivacySettled, entry: LedgerEntry) -> None:
    spend = spends.get(event.reservation)
    if spend is None or spend.settled or not 0 <= event.steps <= spend.steps:
        raise PrivacyError(
            f"The settlement of reservation {event.reservation} does not fit what was reserved.",
            next_step="Verify the trail; the ledger cannot be trusted.",
            code="ledger",
        )
    mechanism = spend.mechanism.with_steps(event.steps)
    spends[event.reservation] = replace(
        spend,
        mechanism=mechanism,
        settled=True,
        steps=event.steps,
        settled_in=entry.index,
        total=float(event.epsilon_total),
    )


def _release(releases: dict[str, LabelSpend], event: LabelsReleased, entry: LedgerEntry) -> None:
    """Add a release; its stated total must lie between what it must cost at least and at most."""
    before = next(reversed(releases.values())).total if releases else 0.0
    total = float(event.epsilon_total)
    least, most = max(before, event.epsilon), before + event.epsilon
    follows = abs(float(event.epsilon_before) - before) <= _SLACK
    if event.release in releases or not (follows and least - _SLACK <= total <= most + _SLACK):
        raise PrivacyError(
            f"The release of labels {event.release} does not add up with those before it.",
            next_step="Verify the trail; the ledger cannot be trusted.",
            code="ledger",
        )
    asked = Limit(entry.index, "label", event.epsilon_budget, PrivacyConfig.delta)
    releases[event.release] = LabelSpend(
        event.release, entry.index, event.labels, event.epsilon, event.flip_probability, total, asked
    )
