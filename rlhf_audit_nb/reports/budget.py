"""A trail's privacy budget as people see it: spent, reserved and left, by population and by run. Floor 4."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.compliance.words import count, delta_text, epsilon_text, plural, short
from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.privacy.accountant import composed_epsilon

if TYPE_CHECKING:
    from rlhf_audit_nb.privacy.ledger import Group, Ledger, Spend

__all__ = ["Budget", "BudgetPopulation", "BudgetRun", "down"]


@dataclass(frozen=True, kw_only=True)
class BudgetRun:
    """One private training in the budget: ``steps`` that it took, or that it reserved while ``settled`` is false.

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

    def cells(self) -> tuple[str, ...]:
        """The fields as a table shows them."""
        state = "spent" if self.settled else "reserved"
        noise, rate = f"{self.noise_multiplier:.5g}", f"{self.sampling_rate:.5g}"
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
        left = f", {down(self.left)} left" if self.left is not None else ""
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
        )

    @property
    def total(self) -> float:
        """What is spent and reserved together."""
        return self.spent + self.reserved

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)

    def save(self, path: Path | str) -> Path:
        """Write the fields as JSON."""
        target = Path(path)
        target.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return target

    def _headline(self) -> str:
        set_by = f", set by {self.set_by} in entry {self.set_in}" if self.set_by is not None else ""
        of = f" of {self.budget:g} ({down(self.left or 0.0)} left{set_by})" if self.budget is not None else ""
        if self.labels:
            return f"ε {epsilon_text(self.total)}{of}, unit label, {plural(self.labels, 'label')} released."
        if not self.trainings:
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

    def notes(self) -> tuple[str, ...]:
        """What belongs to the figures, as sentences: the populations where there are several, and what is in doubt."""
        several = self.populations if len(self.populations) > 1 else ()
        said = [f"P{one.words(self.unit)[1:]}." for one in several]
        if self.unproven and len(self.runs) > 1:
            said.append(
                f"The rosters of {plural(self.unproven, 'training')} cannot be shown here, so that they count as "
                "sharing somebody with every other."
            )
        return (*said, *self.doubts)

    def __str__(self) -> str:
        return "\n".join((self._headline(), *self.notes()))

    def _repr_html_(self) -> str:
        words = f"<p><b>Privacy budget.</b> {escape(self._headline())}</p>"
        words += "".join(f"<p>{escape(note)}</p>" for note in self.notes())
        if not self.runs:
            return words
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
        steps=spend.steps,
        epsilon=composed_epsilon([spend.mechanism], delta),
        population=population,
        experiment=spend.experiment,
        units=spend.units,
    )


def down(value: float, digits: int = 2) -> str:
    """What is left, rounded against us: downwards."""
    return f"{math.floor(value * 10**digits) / 10**digits:.{digits}f}"
