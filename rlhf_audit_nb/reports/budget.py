"""A trail's privacy budget as people see it: spent, reserved and left, by population and by run. Floor 4."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.compliance.words import count, delta_text, epsilon_text, plural, short
from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import ConfigError, ReportError
from rlhf_audit_nb.privacy.accountant import Composable, Mechanism, calibrate, composed_epsilon, max_steps
from rlhf_audit_nb.reports.budget_figure import BudgetFigure, budget_figure

if TYPE_CHECKING:
    from rlhf_audit_nb.privacy.ledger import Group, Ledger, Spend

__all__ = ["MOST_NOISE", "MOST_STEPS", "Budget", "BudgetLeft", "BudgetPopulation", "BudgetRun", "what_is_left"]

MOST_STEPS = 1_000_000
MOST_NOISE = 10_000
"""What is worked out: beyond it the accountant takes minutes, for figures of no use."""


@dataclass(frozen=True, kw_only=True)
class BudgetRun:
    """One private training in the budget: ``steps`` that it took, or that it reserved while ``settled`` is false.

    ``pairs`` is how many pairs of a unit were sampled one by one (1: units were sampled, ``sampling_rate`` is theirs).
    ``epsilon`` is what the training costs alone; these do not add up to the total, which is composed. ``population``
    is the number of the population that it counts for, from 1.
    """

    run: str | None
    entry: int
    settled: bool
    noise_multiplier: float
    sampling_rate: float
    steps: int
    epsilon: float
    population: int = 1
    experiment: str | None = None
    units: int | None = None
    pairs: int = 1

    @property
    def rate(self) -> str:
        """The sampling rate, and of what."""
        return f"{self.sampling_rate:.5g}" + (f" of each of {self.pairs} pairs" if self.pairs > 1 else "")

    def cells(self) -> tuple[str, ...]:
        """The fields as a table shows them."""
        state = "spent" if self.settled else "reserved"
        noise, rate = f"{self.noise_multiplier:.5g}", self.rate
        return (
            short(self.run or ""),
            self.experiment or "",
            f"#{self.entry}",
            state,
            str(self.steps),
            noise,
            rate,
            epsilon_text(self.epsilon),
        )


@dataclass(frozen=True, kw_only=True)
class BudgetPopulation:
    """What one population has spent: annotators that are proven to be on no roster of another one.

    Attributes:
        number: from 1, in the order in which they were first trained on.
        rosters: the names of its rosters in the trail; several where they may share somebody.
        units: how many are on the largest of them; ``None`` where none was recorded.
        spent: what its settled trainings cost together.
        reserved: what those that are not settled add to that.
        left: what is left of the budget; ``None`` where there is none.
        trainings: how many there are.
        unsettled: how many of them are not settled.
    """

    number: int
    rosters: tuple[str, ...]
    units: int | None
    spent: float
    reserved: float
    left: float | None
    trainings: int
    unsettled: int

    @property
    def total(self) -> float:
        """What is spent and reserved together."""
        return self.spent + self.reserved

    def words(self, unit: str | None) -> str:
        """The population in a line."""
        size = f"{plural(self.units, unit or 'unit')}, " if self.units is not None else ""
        meets = f" on {count(len(self.rosters))} rosters that may share somebody" if len(self.rosters) > 1 else ""
        left = f", {_down(self.left)} left" if self.left is not None else ""
        reserved = f" (of which {epsilon_text(self.reserved)} reserved)" if self.unsettled else ""
        return (
            f"population {self.number} ({size}{plural(self.trainings, 'training')}{meets}): "
            f"ε {epsilon_text(self.total)}{reserved}{left}"
        )


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The privacy budget on one trail; every epsilon is composed, at ``delta``.

    Where the trail proves that trainings had different annotators, each such population has the whole budget; `spent`,
    `reserved` and `left` are those of the population that spent or reserved most.

    Attributes:
        unit: whose budget it is; ``None`` while nothing was spent and none was set.
        delta: of the budget in force.
        spent: what the settled trainings cost together, by the steps that they took.
        reserved: what trainings that are not settled add to that, by all that they reserved.
        budget: the budget in force: the one that was set last, else the configuration's, else the last run's.
        left: what is left of it, with what is reserved counted; ``None`` where there is no budget.
        trainings: how many there are.
        unsettled: how many of them are not settled.
        set_in: the entry that set the budget; ``None`` where it is a configuration's.
        set_by: who set it.
        runs: the trainings one by one.
        populations: the populations one by one.
        doubts: settlements that are not believed, each as a sentence.
        labels: how many labels were released, where the unit is ``label``.
        unproven: how many rosters cannot be shown here, so that they count as sharing somebody with every other.
        ledger: what all this was made from.
        slots: how many trainings to come a sweep holds budget for; it is part of what is reserved.
    """

    unit: str | None
    delta: float
    spent: float
    budget: float | None
    left: float | None
    trainings: int
    unsettled: int
    reserved: float = 0.0
    set_in: int | None = None
    set_by: str | None = None
    runs: tuple[BudgetRun, ...] = ()
    populations: tuple[BudgetPopulation, ...] = ()
    doubts: tuple[str, ...] = ()
    labels: int = 0
    unproven: int = 0
    ledger: Ledger | None = field(default=None, repr=False, compare=False)
    slots: int = 0

    @classmethod
    def of(cls, ledger: Ledger, config: PrivacyConfig | None = None, *, delta: float | None = None) -> Budget:
        """The budget as the ledger shows it.

        ``delta`` is that of the budget in force; where another one is given, what is left of it is not known.
        """
        chosen = ledger.budgets[-1] if ledger.budgets else None
        if chosen is not None:
            limit: tuple[float, float] | None = (chosen.epsilon, chosen.delta)
        elif config is not None:
            limit = (config.epsilon, config.delta)
        else:
            limit = (ledger.limit.epsilon, ledger.limit.delta) if ledger.limit is not None else None
        if limit is not None and delta not in (None, limit[1]):
            limit, chosen = None, None
        at = delta if delta is not None else limit[1] if limit is not None else PrivacyConfig.delta
        epsilon = limit[0] if limit is not None else None
        groups = ledger.groups
        populations = tuple(_population(number, group, at, epsilon) for number, group in enumerate(groups, 1))
        most = max(populations, key=lambda one: one.total, default=None)
        spent = most.spent if most is not None else ledger.label_total
        total = most.total if most is not None else ledger.label_total
        numbers = {name: number for number, group in enumerate(groups, 1) for name in group.populations}
        return cls(
            unit=ledger.unit,
            delta=at,
            spent=spent,
            budget=epsilon,
            left=max(epsilon - total, 0.0) if epsilon is not None else None,
            trainings=len(ledger.spends),
            unsettled=sum(not spend.settled for spend in ledger.spends),
            reserved=total - spent,
            set_in=chosen.index if chosen is not None else None,
            set_by=chosen.by if chosen is not None else None,
            runs=tuple(_budget_run(spend, at, numbers[spend.population]) for spend in ledger.spends),
            populations=populations,
            doubts=tuple(spend.doubt for spend in ledger.doubts() if spend.doubt is not None),
            labels=sum(release.labels for release in ledger.releases),
            unproven=_unproven(ledger),
            ledger=ledger,
            slots=len(ledger.slots),
        )

    @property
    def total(self) -> float:
        """What is spent and reserved together."""
        return self.spent + self.reserved

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values; infinity by its name."""
        plain: dict[str, Any] = _named(asdict(replace(self, ledger=None)))
        del plain["ledger"]
        return plain

    def figure(self) -> BudgetFigure | None:
        """The picture of it: the composed ε after each training under the budget; ``None`` where nothing was spent."""
        return budget_figure(self.ledger, self) if self.ledger is not None else None

    def save(self, path: Path | str) -> Path:
        """Write the picture where the name ends in ``.svg`` or ``.png``, else the fields as JSON.

        Raises:
            ReportError: code ``nothing-spent``: there is nothing to draw.
            OSError: the file cannot be written.
        """
        target = Path(path)
        if target.suffix.lower() in (".svg", ".png"):
            figure = self.figure()
            if figure is None:
                raise ReportError(
                    "Nothing was spent on this trail, so there is no figure to draw.",
                    next_step="Train with differential privacy first; `budget show` without a figure says the rest.",
                    code="nothing-spent",
                )
            target.write_bytes(figure.png() if target.suffix.lower() == ".png" else figure.svg.encode())
            return target
        target.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return target

    def _headline(self) -> str:
        set_by = f", set by {self.set_by} in entry {self.set_in}" if self.set_by is not None else ""
        of = f" of {self.budget:g} ({_down(self.left or 0.0)} left{set_by})" if self.budget is not None else ""
        if self.labels:
            return f"ε {epsilon_text(self.total)}{of}, unit label, {plural(self.labels, 'label')} released."
        if not self.trainings and not self.slots:
            none = "No training under differential privacy is recorded in this trail."
            return f"{none} The budget is {self.budget:g}{set_by}." if self.set_by is not None else none
        open_ones = f", {self.unsettled} of them not settled" if self.unsettled else ""
        reserved = f" (spent {epsilon_text(self.spent)}, reserved {epsilon_text(self.reserved)})"
        among = f" on {len(self.populations)} populations that share nobody" if len(self.populations) > 1 else ""
        whose = ", of the population that spent most" if len(self.populations) > 1 else ""
        return (
            f"ε {epsilon_text(self.total)}{reserved if self.reserved else ''}{of}, δ {delta_text(self.delta)}, "
            f"unit {self.unit}{whose}, {plural(self.trainings, 'private training')}{among}{open_ones}."
        )

    def _picture(self) -> str:
        """The picture as a notebook keeps it; the words stand without it where it cannot be drawn."""
        try:
            figure = self.figure()
        except Exception as error:  # the numbers matter more than their picture, and the reason is told
            return f"<p>(The picture could not be drawn: {escape(str(error))})</p>"
        if figure is None:
            return ""
        data = base64.b64encode(figure.png()).decode()
        return (
            f'<p><img src="data:image/png;base64,{data}" alt="{escape(figure.alt, quote=True)}" '
            'style="max-width:100%;width:680px;border-radius:8px"></p>'
        )

    def notes(self) -> tuple[str, ...]:
        """What belongs to the figures, as sentences: the populations where there are several, and what is in doubt."""
        several = self.populations if len(self.populations) > 1 else ()
        said = [f"P{one.words(self.unit)[1:]}." for one in several]
        if self.unproven and len(self.runs) > 1:
            said.append(
                f"The rosters of {plural(self.unproven, 'training')} cannot be shown here, so that they count as "
                "sharing somebody with every other."
            )
        if self.slots:
            said.append(
                f"A sweep holds budget for {plural(self.slots, 'training')} to come; it counts as reserved, for "
                "everybody, until they have begun or the sweep gives it back."
            )
        return (*said, *self.doubts)

    def __str__(self) -> str:
        return "\n".join((self._headline(), *self.notes()))

    def _repr_html_(self) -> str:
        words = f"<p><b>Privacy budget.</b> {escape(self._headline())}</p>"
        words += "".join(f"<p>{escape(note)}</p>" for note in self.notes())
        if not self.runs:
            return words
        words += self._picture()
        heads: tuple[str, ...] = (
            "run",
            "experiment",
            "entry",
            "state",
            "steps",
            "noise multiplier",
            "sampling rate",
            "ε alone",
        )
        rows: list[tuple[str, ...]] = [one.cells() for one in self.runs]
        if len(self.populations) > 1:
            heads = (*heads, "population")
            rows = [(*cells, str(one.population)) for cells, one in zip(rows, self.runs, strict=True)]
        lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in (heads, *rows))
        return f"{words}<table>{lines}</table><p>Runs are composed; their ε do not add up.</p>"


@dataclass(frozen=True, kw_only=True)
class BudgetLeft:
    """What still fits into a budget: so many steps at a noise, or so much noise for as many steps.

    Attributes:
        steps: the steps that fit, or that were asked for.
        noise_multiplier: the noise that was asked for, or that as many steps need.
        sampling_rate: the chance of each unit per step.
        budget: the budget that they are to fit into.
        delta: of it.
        unit: whose it is.
        population: the number of the population that it was worked out for; 0 for one that is new to the trail.
        epsilon_before: what that population has spent or reserved.
        epsilon_after: what it would have after these steps.
        at_most: where the search for steps ends.
        asked: ``steps`` or ``noise``: what was looked for.
        pairs: how many pairs of a unit are sampled and clipped one by one; 1 where a unit is sampled whole.
    """

    steps: int
    noise_multiplier: float
    sampling_rate: float
    budget: float
    delta: float
    unit: str | None
    population: int
    epsilon_before: float
    epsilon_after: float
    at_most: int = MOST_STEPS
    asked: str = "steps"
    pairs: int = 1

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values; infinity by its name."""
        return dict(_named(asdict(self)))

    def lines(self) -> list[str]:
        """What is left, in words."""
        at = f"noise multiplier {self.noise_multiplier:.10g} and sampling rate {self.sampling_rate:g}"
        whose = "" if self.population == 1 else " of a new population" if self.population == 0 else (
            f" of population {self.population}")  # fmt: skip
        if self.asked == "noise":
            first = f"{plural(self.steps, 'step')} fit{'s' if self.steps == 1 else ''} from {at} on"
        else:
            more = f"at least {count(self.steps)} steps fit" if self.steps == self.at_most else (
                f"{plural(self.steps, 'step')} fit{'s' if self.steps == 1 else ''}")  # fmt: skip
            first = f"{more} at {at}"
        spent = (
            f"ε {epsilon_text(self.epsilon_before, 4)} of {self.budget:g}{whose} is spent or reserved at δ "
            f"{delta_text(self.delta)}"
        )
        these = "this step" if self.steps == 1 else "these steps"
        after = f"; after {these} it would be {epsilon_text(self.epsilon_after, 4)}" if self.steps else ""
        said = [first, spent + after]
        if not self.steps:
            said.append(
                "Choose more noise, a smaller sampling rate, or have the budget raised (rlhf-audit budget set)."
            )
        return said

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        first, *rest = map(escape, self.lines())
        return f"<p><b>{first}.</b></p>" + "".join(f"<p>{line.rstrip('.')}.</p>" for line in rest)


def what_is_left(
    budget: Budget,
    *,
    sampling_rate: float,
    noise_multiplier: float | None = None,
    steps: int | None = None,
    epsilon: float | None = None,
    population: int | None = None,
    pairs: int = 1,
) -> BudgetLeft:
    """How many steps at a noise are left of a budget, or which noise lets as many steps fit.

    Args:
        budget: the trail's budget.
        sampling_rate: the chance of each unit per step.
        noise_multiplier: the noise of these steps; what is looked for are the steps.
        steps: in its place: the steps; what is looked for is the least noise.
        epsilon: another budget than the one in force, to see what it would allow.
        population: the number of the population that the steps are for, as the budget shows it; 0 for annotators who
            are new to the trail; without it, the population that spent most.
        pairs: how many pairs of a unit are sampled and clipped one by one; 1 where a unit is sampled whole.

    Raises:
        ConfigError: a number out of range, no budget, no such population, or not exactly one of noise and steps.
        PrivacyError: code ``no-noise-fits``: no noise lets as many steps fit.
    """
    if (noise_multiplier is None) == (steps is None):
        raise ConfigError(
            "What is left is asked for with either a noise multiplier or a number of steps.",
            next_step="Give the noise multiplier to learn how many steps fit, or the steps to learn the noise.",
            code="usage",
        )
    _check_left(noise_multiplier, sampling_rate, steps, epsilon, pairs)
    if budget.unit == "label":
        raise ConfigError(
            "This trail counts labels: releasing them is charged, and no step of a training on them is.",
            next_step="See what a label has cost: rlhf-audit labels show.",
            code="label-budget",
        )
    if pairs > 1 and budget.unit not in (None, "annotator"):
        raise ConfigError(
            f"This trail keeps the privacy budget of {budget.unit}s; pairs are sampled one by one of annotators only.",
            next_step="Leave out --sampled pairs.",
            code="sampled",
        )
    if epsilon is None and budget.budget is None:
        raise ConfigError(
            "The trail has no budget yet: no run named one, and none was set.",
            next_step="Set one with rlhf-audit budget set, or plan without a trail: rlhf-audit budget plan.",
            code="no-budget",
        )
    limit = budget.budget if epsilon is None else epsilon
    assert limit is not None  # for the type checker; one of the two is
    number, before, prior = _population_asked(budget, population)
    if noise_multiplier is None:
        found = steps or 1
        noise = calibrate(limit, budget.delta, sampling_rate, found, prior, pairs=pairs)
    else:
        noise = noise_multiplier
        found = max_steps(limit, budget.delta, noise, sampling_rate, prior, at_most=MOST_STEPS, pairs=pairs)
    ran = Mechanism(noise, sampling_rate, found, pairs)
    return BudgetLeft(
        steps=found,
        noise_multiplier=noise,
        sampling_rate=sampling_rate,
        budget=limit,
        delta=budget.delta,
        unit=budget.unit,
        population=number,
        epsilon_before=before,
        epsilon_after=composed_epsilon([*prior, ran], budget.delta) if found else before,
        asked="steps" if noise_multiplier is not None else "noise",
        pairs=pairs,
    )


def _check_left(noise: float | None, rate: float, steps: int | None, epsilon: float | None, pairs: int) -> None:
    """The same bounds, and the same words, as a run's own configuration."""
    PrivacyConfig(
        epsilon=1.0 if epsilon is None else epsilon,
        noise_multiplier=noise,
        sampling_rate=rate,
        max_pairs_per_unit=pairs,
    )
    if noise is not None and noise > MOST_NOISE:
        raise ConfigError(
            f"noise_multiplier is {noise:g}; a plan is worked out for at most {MOST_NOISE:,}.",
            next_step="Write a smaller --noise-multiplier: nothing can be learned under so much noise.",
            code="noise_multiplier",
        )
    if steps is not None and not 1 <= steps <= MOST_STEPS:
        raise ConfigError(
            f"steps is {steps:,}; it must be from 1 to {MOST_STEPS:,}.", next_step="Write --steps 100.", code="steps"
        )


def _population_asked(budget: Budget, number: int | None) -> tuple[int, float, tuple[Composable, ...]]:
    """Its number, what it has spent or reserved, and by what."""
    groups = budget.ledger.groups if budget.ledger is not None else ()
    if number == 0 or (number is None and not groups):
        return number if number is not None else 1, 0.0, ()
    if number is None:
        number = max(budget.populations, key=lambda one: one.total).number
    if not 1 <= number <= len(groups):
        raise ConfigError(
            f"The trail has {plural(len(groups), 'population')}; there is no population {number}.",
            next_step="`rlhf-audit budget show` lists them by number; 0 is for annotators who are new to the trail.",
            code="population",
        )
    return number, budget.populations[number - 1].total, groups[number - 1].mechanisms


def _population(number: int, group: Group, delta: float, budget: float | None) -> BudgetPopulation:
    spent, total = group.spent(delta)
    return BudgetPopulation(
        number=number,
        rosters=tuple(sorted(name for name in group.populations if name is not None)),
        units=group.units,
        spent=spent,
        reserved=total - spent,
        left=max(budget - total, 0.0) if budget is not None else None,
        trainings=len(group.spends),
        unsettled=sum(not spend.settled for spend in group.spends),
    )


def _unproven(ledger: Ledger) -> int:
    """How many trainings name a roster that cannot be shown."""
    known = ledger.registry.populations
    return sum(
        spend.population is not None and (spend.population not in known or known[spend.population].tags is None)
        for spend in ledger.spends
    )


def _budget_run(spend: Spend, delta: float, population: int) -> BudgetRun:
    return BudgetRun(
        run=spend.run,
        entry=spend.asked.index,
        settled=spend.settled,
        noise_multiplier=spend.mechanism.noise_multiplier,
        sampling_rate=spend.mechanism.sampling_rate,
        pairs=spend.mechanism.pairs,
        steps=spend.steps,
        epsilon=composed_epsilon([spend.mechanism], delta),
        population=population,
        experiment=spend.experiment,
        units=spend.units,
    )


def _named(value: Any) -> Any:
    """The same, with a number that JSON lacks by its name."""
    if isinstance(value, dict):
        return {key: _named(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_named(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _down(value: float, digits: int = 2) -> str:
    """What is left, rounded against us: downwards."""
    return f"{math.floor(value * 10**digits) / 10**digits:.{digits}f}"
