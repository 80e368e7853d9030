"""The budget, folded from the trail: what a population has spent or reserved over all runs. Floor 2.

A training reserves its whole plan in one entry (``privacy.reserved``) before its first step; the entry that settles it
(``privacy.settled``) puts the steps that really ran in its place. A reservation that was never settled, because the
process died, counts in full for ever. Mechanisms are kept, not epsilons, and are composed again each time.

One trail holds one population under one unit. Runs that count annotators and runs that count pairs cannot be added
up, so a trail with both is refused; so is one whose runs tell annotators apart by different columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rlhf_audit_nb.errors import PrivacyError
from rlhf_audit_nb.events import PrivacyReserved, PrivacySettled, decode_body
from rlhf_audit_nb.privacy.accountant import Accounted, Mechanism, compose

if TYPE_CHECKING:
    from rlhf_audit_nb.config import PrivacyConfig

__all__ = ["Ledger", "Spend", "fold"]


class LedgerEntry(Protocol):
    """What the ledger reads of a trail's entry."""

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
class Spend:
    """One training's place in the ledger.

    Attributes:
        reservation: its id.
        run: the run that reserved it.
        mechanism: sigma, q and the steps that count: those that ran once settled, all that were planned before.
        settled: whether the actual steps are known.
        steps: the steps that count (``mechanism.steps``).
    """

    reservation: str
    run: str | None
    mechanism: Mechanism
    settled: bool
    steps: int


@dataclass(frozen=True, slots=True)
class Ledger:
    """What was spent on one trail; ``unit`` is ``None`` while nothing was, ``column`` also where each row is a unit."""

    unit: str | None
    column: str | None
    spends: tuple[Spend, ...]

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
        if self.unit is not None and column != self.column:
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


def fold(entries: Iterable[LedgerEntry]) -> Ledger:
    """The ledger of a trail, from its entries in order (others than the ledger's own are passed over).

    Raises:
        PrivacyError: reservations of two units or by two columns; a settlement of an unknown or settled reservation, or
            of more steps.
        EntryError: an entry of the ledger is malformed.
    """
    spends: dict[str, Spend] = {}
    first: PrivacyReserved | None = None
    for entry in entries:
        if entry.type == PrivacyReserved.TYPE:
            reserved = decode_body(entry.type, entry.body)
            assert isinstance(reserved, PrivacyReserved)  # for the type checker; decode_body checked it
            first = first or reserved
            _check_same_population(first, reserved)
            _reserve(spends, reserved, entry.run)
        elif entry.type == PrivacySettled.TYPE:
            settled = decode_body(entry.type, entry.body)
            assert isinstance(settled, PrivacySettled)  # for the type checker; decode_body checked it
            _settle(spends, settled)
    if first is None:
        return Ledger(None, None, ())
    return Ledger(first.unit, first.column, tuple(spends.values()))


def _check_same_population(first: PrivacyReserved, other: PrivacyReserved) -> None:
    if other.unit != first.unit:
        raise PrivacyError(
            f"The trail holds reservations for {first.unit}s and for {other.unit}s; they cannot be added up.",
            next_step="Keep one trail for each privacy unit.",
            code="mixed-units",
        )
    if other.column != first.column:
        raise PrivacyError(
            f"The trail holds reservations for {first.unit}s of {_column_words(first.column)} and of "
            f"{_column_words(other.column)}; they cannot be added up.",
            next_step="Keep one trail for each annotator column.",
            code="mixed-columns",
        )


def _column_words(column: str | None) -> str:
    return f"the column {column!r}" if column else "a column that is not recorded"


def _reserve(spends: dict[str, Spend], event: PrivacyReserved, run: str | None) -> None:
    if event.reservation in spends:
        raise PrivacyError(f"Reservation {event.reservation} stands twice in the trail.", code="ledger")
    mechanism = Mechanism(event.noise_multiplier, event.sampling_rate, event.steps)
    spends[event.reservation] = Spend(event.reservation, run, mechanism, settled=False, steps=event.steps)


def _settle(spends: dict[str, Spend], event: PrivacySettled) -> None:
    spend = spends.get(event.reservation)
    if spend is None or spend.settled or not 0 <= event.steps <= spend.steps:
        raise PrivacyError(
            f"The settlement of reservation {event.reservation} does not fit what was reserved.",
            next_step="Verify the trail; the ledger cannot be trusted.",
            code="ledger",
        )
    mechanism = spend.mechanism.with_steps(event.steps)
    spends[event.reservation] = Spend(spend.reservation, spend.run, mechanism, settled=True, steps=event.steps)
