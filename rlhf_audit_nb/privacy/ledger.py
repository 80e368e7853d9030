"""The budget, folded from the trail: what a population has spent or reserved over all runs. Floor 2.

A training reserves its whole plan in one entry (``privacy.reserved``) before its first step; the entry that settles it
(``privacy.settled``) puts the steps that really ran in its place. A reservation that was never settled, because the
process died, counts in full for ever. Mechanisms are kept, not epsilons, and are composed again each time.

What a run may plan with is its own configuration's epsilon, until somebody sets the trail's budget in an entry
(``privacy.budget``): from then on no run may ask for more than the newest such entry says.

Labels that were released (``privacy.labels``) are charged for good when they are; training on them costs nothing more.

One trail holds one population under one unit. Runs that count annotators and runs that count pairs cannot be added
up, so a trail with both is refused; so is one whose runs tell annotators apart by different columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import BudgetExceededError, PrivacyError
from rlhf_audit_nb.events import BudgetSet, LabelsReleased, PrivacyReserved, PrivacySettled, decode_body
from rlhf_audit_nb.privacy.accountant import Accounted, Mechanism, compose, composed_epsilon

__all__ = ["LabelSpend", "Ledger", "Limit", "Spend", "fold"]

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
    """

    reservation: str
    run: str | None
    mechanism: Mechanism
    settled: bool
    steps: int
    asked: Limit


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
    """

    unit: str | None
    column: str | None
    spends: tuple[Spend, ...]
    budgets: tuple[Limit, ...] = ()
    releases: tuple[LabelSpend, ...] = ()

    @property
    def label_total(self) -> float:
        """What all releases together cost the label that they cost most; 0 where none was released. Pure: delta 0."""
        return self.releases[-1].total if self.releases else 0.0

    @property
    def limit(self) -> Limit | None:
        """The budget in force: the one that was set last; while none was, the one that the last run named."""
        if self.budgets:
            return self.budgets[-1]
        last = self.spends or self.releases
        return last[-1].asked if last else None

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

    def mechanisms(self, unit: str, column: str | None = None) -> tuple[Mechanism, ...]:
        """What counts against the budget of the population that ``unit`` and ``column`` tell apart.

        Raises:
            PrivacyError: the trail's budget is kept for another unit, or by another column.
        """
        if self.unit is not None and unit != self.unit:
            raise PrivacyError(
                f"This trail keeps the privacy budget of {self.unit}s; a run with unit={unit!r} cannot be added to it.",
                next_step=f'Use unit="{self.unit}", or another trail (trail="...") for the other unit.',
                code="mixed-units",
            )
        if self.spends and column != self.column:
            same = f'Use annotator_column="{self.column}", or' if self.column else "Use"
            raise PrivacyError(
                f"This trail keeps the privacy budget of {self.unit}s by {_column_words(self.column)}; a run by "
                f"{_column_words(column)} cannot be added to it.",
                next_step=f'{same} another trail (trail="...") for the other column.',
                code="mixed-columns",
            )
        return tuple(spend.mechanism for spend in self.spends if spend.steps)

    def composed(self, delta: float) -> Accounted:
        """The total of all spends at ``delta``."""
        return compose([spend.mechanism for spend in self.spends], delta)

    def left(self, config: PrivacyConfig) -> float:
        """What is left of the configured budget, never below 0."""
        return max(config.epsilon - self.composed(config.delta).epsilon, 0.0)

    def spent(self, delta: float) -> tuple[float, float]:
        """Composed epsilon of what was settled, and of that with all that is still reserved."""
        settled = composed_epsilon([spend.mechanism for spend in self.spends if spend.settled], delta)
        if all(spend.settled for spend in self.spends):
            return settled, settled
        # Bounds on grids of their own may cross where the reservation is next to nothing.
        return settled, max(composed_epsilon([spend.mechanism for spend in self.spends], delta), settled)


def fold(entries: Iterable[LedgerEntry]) -> Ledger:
    """The ledger of a trail, from its entries in order (others than the ledger's own are passed over).

    Raises:
        PrivacyError: reservations or budgets of two units, reservations by two columns; a settlement of an unknown or
            settled reservation, or of more steps.
        EntryError: an entry of the ledger is malformed.
    """
    spends: dict[str, Spend] = {}
    first: PrivacyReserved | None = None
    budgets: list[Limit] = []
    releases: dict[str, LabelSpend] = {}
    for entry in entries:
        if entry.type == PrivacyReserved.TYPE:
            reserved = decode_body(entry.type, entry.body)
            assert isinstance(reserved, PrivacyReserved)  # for the type checker; decode_body checked it
            first = first or reserved
            _check_same_population(first, reserved)
            _reserve(spends, reserved, entry)
        elif entry.type == PrivacySettled.TYPE:
            settled = decode_body(entry.type, entry.body)
            assert isinstance(settled, PrivacySettled)  # for the type checker; decode_body checked it
            _settle(spends, settled)
        elif entry.type == LabelsReleased.TYPE:
            released = decode_body(entry.type, entry.body)
            assert isinstance(released, LabelsReleased)  # for the type checker; decode_body checked it
            _release(releases, released, entry)
        elif entry.type == BudgetSet.TYPE:
            chosen = decode_body(entry.type, entry.body)
            assert isinstance(chosen, BudgetSet)  # for the type checker; decode_body checked it
            budgets.append(
                Limit(entry.index, chosen.unit, chosen.epsilon, chosen.delta, reason=chosen.reason, by=chosen.by)
            )
    units = {budget.unit for budget in budgets} | ({first.unit} if first is not None else set())
    if releases:
        units.add("label")
    if len(units) > 1:
        raise _mixed_units(*sorted(units))
    unit = next(iter(units), None)
    column = None if first is None else first.column
    return Ledger(unit, column, tuple(spends.values()), tuple(budgets), tuple(releases.values()))


def _check_same_population(first: PrivacyReserved, other: PrivacyReserved) -> None:
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
    mechanism = _mechanism(event)
    asked = Limit(entry.index, event.unit, event.epsilon_budget, event.delta)
    spends[event.reservation] = Spend(
        event.reservation, entry.run, mechanism, settled=False, steps=event.steps, asked=asked
    )


def _mechanism(event: PrivacyReserved) -> Mechanism:
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
    return Mechanism(event.noise_multiplier, event.sampling_rate, event.steps, pairs)


def _settle(spends: dict[str, Spend], event: PrivacySettled) -> None:
    spend = spends.get(event.reservation)
    if spend is None or spend.settled or not 0 <= event.steps <= spend.steps:
        raise PrivacyError(
            f"The settlement of reservation {event.reservation} does not fit what was reserved.",
            next_step="Verify the trail; the ledger cannot be trusted.",
            code="ledger",
        )
    mechanism = spend.mechanism.with_steps(event.steps)
    spends[event.reservation] = replace(spend, mechanism=mechanism, settled=True, steps=event.steps)


def _release(releases: dict[str, LabelSpend], event: LabelsReleased, entry: LedgerEntry) -> None:
    """Add a release; its stated total must lie between what it must cost at least and at most."""
    before = next(reversed(releases.values())).total if releases else 0.0
    total = float(event.epsilon_total)
    least, most = max(before, event.epsilon), before + event.epsilon
    if event.release in releases or not least - _SLACK <= total <= most + _SLACK:
        raise PrivacyError(
            f"The release of labels {event.release} does not add up with those before it.",
            next_step="Verify the trail; the ledger cannot be trusted.",
            code="ledger",
        )
    asked = Limit(entry.index, "label", event.epsilon_budget, PrivacyConfig.delta)
    releases[event.release] = LabelSpend(
        event.release, entry.index, event.labels, event.epsilon, event.flip_probability, total, asked
    )
