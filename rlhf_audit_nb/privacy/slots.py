"""Slots: budget that is held for a training before it is known which. Floor 2.

A sweep reserves one slot for each of its runs before any of them starts (``privacy.slots``). Until it is used, a slot
is composed with everything else as what it may cost at most. The reservation of the training that draws on it takes
its place, and may cost at most what the slot held:

``Guarantee(epsilon, delta)``
    the training alone is (epsilon, delta)-DP, by the accountant. It is composed as the pair of outputs that dominates
    every such mechanism, so whatever takes its place can only make the total smaller.
``Mechanism(sigma, q, steps, pairs)``
    the training has as many sampled pairs, no less noise, no higher rate and no more steps. Each of these only makes
    the divergence smaller, in both directions.

So the total of a ledger falls, or stays, when a slot is used, when it is released and when a training is settled; it
grows only with a reservation of its own or with new slots. A slot is used once, whoever names it, because the entry
that uses it is made within its own append (`reservation.reserve`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.config import ENV_SLOT
from rlhf_audit_nb.errors import PrivacyError
from rlhf_audit_nb.privacy.accountant import Composable, Guarantee, Mechanism, calibrate, composed_epsilon
from rlhf_audit_nb.privacy.live_loss import effective_noise

if TYPE_CHECKING:
    from rlhf_audit_nb.config import PrivacyConfig
    from rlhf_audit_nb.events import SlotsReserved

__all__ = ["Draw", "Slot", "check_covered", "given_slot", "grouped", "slots_of", "within_slot"]

_ROUNDING = 1e-12
_ABOVE = 1 + 1e-9  # so that what a live loss does to the last digit of a noise multiplier stays above the slot's


@dataclass(frozen=True, slots=True)
class Slot:
    """Budget that is held for one training.

    Attributes:
        id: its name; whoever names it first uses it.
        sweep: the sweep that it belongs to.
        index: the entry that holds it.
        holds: what that training may cost at most.
    """

    id: str
    sweep: str
    index: int
    holds: Composable

    def covers(self, mechanism: Mechanism) -> bool:
        """Whether ``mechanism`` costs at most what the slot holds, whatever it is composed with."""
        held = self.holds
        if isinstance(held, Guarantee):
            return composed_epsilon([mechanism], held.delta) <= held.epsilon
        return (
            mechanism.noise_multiplier >= held.noise_multiplier * (1 - _ROUNDING)
            and mechanism.sampling_rate <= held.sampling_rate
            and mechanism.steps <= held.steps
            and mechanism.pairs == held.pairs
        )

    @property
    def words(self) -> str:
        """What it holds, for people."""
        held = self.holds
        if isinstance(held, Guarantee):
            return f"epsilon {held.epsilon:g} at delta {held.delta:g}"
        pairs = f" of each of {held.pairs} pairs" if held.pairs > 1 else ""
        return (
            f"{held.steps} steps at noise multiplier {held.noise_multiplier:g} and sampling rate "
            f"{held.sampling_rate:g}{pairs}"
        )


@dataclass(frozen=True, slots=True)
class Draw:
    """A training's claim to a slot, as the ledger stood when it was planned.

    Attributes:
        slot: what it draws on.
        committed: everything that can have made the total grow until then (`Ledger.committed`): as long as nothing
            is added to it, the total planned with is an upper bound of the total there is.
    """

    slot: Slot
    committed: frozenset[str]


def given_slot() -> str | None:
    """The slot that the sweep which started this process handed over (``RLHF_AUDIT_SLOT``)."""
    return os.environ.get(ENV_SLOT) or None


def slots_of(event: SlotsReserved, index: int) -> Iterator[Slot]:
    """The slots of an entry.

    Raises:
        PrivacyError: a slot says what cannot be composed: code ``ledger``.
    """
    for group in event.slots:
        held = _held(group, index)
        for name in _ids(group, index):
            yield Slot(name, event.sweep, index, held)


def _ids(group: Mapping[str, Any], index: int) -> list[str]:
    ids = group.get("ids")
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise _malformed(index)
    return ids


def _held(group: Mapping[str, Any], index: int) -> Composable:
    said = {name: value for name, value in group.items() if name != "ids"}
    try:
        return Guarantee(**said) if "epsilon" in said else Mechanism(**said)
    except (TypeError, PrivacyError) as error:
        raise _malformed(index) from error


def _malformed(index: int) -> PrivacyError:
    return PrivacyError(
        f"Entry {index} holds budget in a way that this version cannot account for.",
        next_step="Read the trail with the version that wrote it, or verify it.",
        code="ledger",
    )


def grouped(slots: Iterable[tuple[str, Composable]]) -> list[dict[str, Any]]:
    """Slots as an event holds them: those that hold the same together."""
    groups: dict[Composable, list[str]] = {}
    for name, held in slots:
        groups.setdefault(held, []).append(name)
    return [{"ids": names, **_numbers(held)} for held, names in groups.items()]


def _numbers(held: Composable) -> dict[str, Any]:
    if isinstance(held, Guarantee):
        return {"epsilon": held.epsilon, "delta": held.delta}
    return {
        "noise_multiplier": held.noise_multiplier,
        "sampling_rate": held.sampling_rate,
        "steps": held.steps,
        "pairs": held.pairs,
    }


def within_slot(slot: Slot, config: PrivacyConfig, rate: float, asked: int) -> Mechanism:
    """What ``asked`` steps are to be accounted as: the configured noise, else the least that the slot covers.

    Raises:
        PrivacyError: no noise multiplier keeps so many steps within the slot: code ``no-noise-fits``.
    """
    pairs = config.max_pairs_per_unit if config.sampled == "pairs" else 1
    held = slot.holds
    if config.noise_multiplier is not None:
        ratio = config.loss_noise
        noise = effective_noise(config.noise_multiplier, ratio and ratio * config.noise_multiplier)
    elif isinstance(held, Guarantee):
        noise = calibrate(held.epsilon, held.delta, rate, asked, pairs=pairs)
    else:
        noise = held.noise_multiplier * _ABOVE
    return Mechanism(noise, rate, asked, pairs)


def check_covered(slot: Slot, mechanism: Mechanism) -> None:
    """Refuse a training that costs more than its slot holds.

    Raises:
        PrivacyError: code ``slot-exceeded``.
    """
    if slot.covers(mechanism):
        return
    asked = Slot("", "", -1, mechanism).words
    cost = ""
    if isinstance(slot.holds, Guarantee):
        cost = f", which is epsilon {composed_epsilon([mechanism], slot.holds.delta):.4g} at its delta"
    raise PrivacyError(
        f"This run of the sweep may spend {slot.words}, and its training takes {asked}{cost}; nothing was trained.",
        next_step="Leave noise_multiplier out of the notebook's PrivacyConfig, so that it follows from what the run "
        "may spend, take fewer steps, or hold more for each run in the grid.",
        code="slot-exceeded",
    )
