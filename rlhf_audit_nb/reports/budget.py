"""A trail's privacy budget as people see it: spent, reserved and left, training by training. Floor 4."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.compliance.words import delta_text, epsilon_text, short
from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.privacy.accountant import composed_epsilon

if TYPE_CHECKING:
    from rlhf_audit_nb.privacy.ledger import Ledger, Spend

__all__ = ["Budget", "BudgetRun"]


@dataclass(frozen=True, kw_only=True)
class BudgetRun:
    """One private training in the budget: ``steps`` that it took, or that it reserved while ``settled`` is false.

    ``epsilon`` is what the training costs alone; these do not add up to the total, which is composed.
    """

    run: str | None
    entry: int
    settled: bool
    noise_multiplier: float
    sampling_rate: float
    steps: int
    epsilon: float

    def cells(self) -> tuple[str, ...]:
        """The fields as a table shows them."""
        state = "spent" if self.settled else "reserved"
        noise, rate = f"{self.noise_multiplier:.5g}", f"{self.sampling_rate:.5g}"
        return (
            short(self.run or ""),
            f"#{self.entry}",
            state,
            str(self.steps),
            noise,
            rate,
            epsilon_text(self.epsilon),
        )


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A population's privacy budget on one trail; every epsilon is composed, at ``delta``.

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
        spent, total = ledger.spent(at)
        return cls(
            unit=ledger.unit,
            delta=at,
            spent=spent,
            budget=limit[0] if limit is not None else None,
            left=max(limit[0] - total, 0.0) if limit is not None else None,
            trainings=len(ledger.spends),
            unsettled=sum(not spend.settled for spend in ledger.spends),
            reserved=total - spent,
            set_in=chosen.index if chosen is not None else None,
            set_by=chosen.by if chosen is not None else None,
            runs=tuple(_budget_run(spend, at) for spend in ledger.spends),
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

    def __str__(self) -> str:
        set_by = f", set by {self.set_by} in entry {self.set_in}" if self.set_by is not None else ""
        of = f" of {self.budget:g} ({_down(self.left or 0.0)} left{set_by})" if self.budget is not None else ""
        if not self.trainings:
            none = "No training under differential privacy is recorded in this trail."
            return f"{none} The budget is {self.budget:g}{set_by}." if self.set_by is not None else none
        open_ones = f", {self.unsettled} of them not settled" if self.unsettled else ""
        reserved = f" (spent {epsilon_text(self.spent)}, reserved {epsilon_text(self.reserved)})"
        return (
            f"ε {epsilon_text(self.total)}{reserved if self.unsettled else ''}{of}, δ {delta_text(self.delta)}, "
            f"unit {self.unit}, {self.trainings} private training{'s' if self.trainings != 1 else ''}{open_ones}."
        )

    def _repr_html_(self) -> str:
        words = f"<p><b>Privacy budget.</b> {escape(str(self))}</p>"
        if not self.runs:
            return words
        heads = ("run", "entry", "state", "steps", "noise multiplier", "sampling rate", "ε alone")
        rows = [heads, *(one.cells() for one in self.runs)]
        lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return f"{words}<table>{lines}</table><p>All runs are composed; their ε do not add up.</p>"


def _budget_run(spend: Spend, delta: float) -> BudgetRun:
    return BudgetRun(
        run=spend.run,
        entry=spend.asked.index,
        settled=spend.settled,
        noise_multiplier=spend.mechanism.noise_multiplier,
        sampling_rate=spend.mechanism.sampling_rate,
        steps=spend.steps,
        epsilon=composed_epsilon([spend.mechanism], delta),
    )


def _down(value: float, digits: int = 2) -> str:
    """What is left, rounded against us: downwards."""
    return f"{math.floor(value * 10**digits) / 10**digits:.{digits}f}"
