"""Sweeps: many runs of one notebook, and the budget that is held for them. Floor 1."""

from __future__ import annotations

from typing import Any, ClassVar

from rlhf_audit_nb.events.base import Event, Number

__all__ = ["SlotsReleased", "SlotsReserved", "SweepFinished", "SweepStarted"]


class SlotsReserved(Event, frozen=True, kw_only=True):
    """Budget is held for trainings to come: so many slots, each for one training of the sweep.

    Each of ``slots`` has ``ids`` and what a training in one of them may cost at most: ``epsilon`` and ``delta`` (it is
    (epsilon, delta)-DP, whatever it is), or ``noise_multiplier``, ``sampling_rate``, ``steps`` and ``pairs`` (it has
    no less noise, no higher rate, no more steps). A slot counts as spent until a reservation names it and takes its
    place (`PrivacyReserved`), or it is released. ``epsilon_budget`` and ``delta`` bound the composed total of the
    population of ``unit`` and ``column``; ``epsilon_before`` and ``epsilon_reserved`` are that total without and with
    these slots. Slots of this sweep that are still open are released by this entry, unless it ``added`` to them.
    """

    TYPE: ClassVar[str] = "privacy.slots"

    sweep: str
    unit: str
    adjacency: str
    epsilon_budget: float
    delta: float
    slots: list[dict[str, Any]]
    epsilon_before: Number
    epsilon_reserved: Number
    column: str | None = None
    added: bool = False


class SlotsReleased(Event, frozen=True, kw_only=True):
    """The slots of a sweep that nobody used are given back; no training can take their place any more."""

    TYPE: ClassVar[str] = "privacy.slots_released"

    sweep: str
    slots: list[str]


class SweepStarted(Event, frozen=True, kw_only=True):
    """A sweep began, or went on: so many runs of one notebook, each with parameters of its own.

    ``notebook_digest`` is that of `RecordStarted`, ``grid_digest`` the SHA-256 of the grid in its canonical form;
    ``points`` are the runs' ids in their order (of each the first 16 digits of the SHA-256 of its parameters), and
    ``found`` is how many of them had a valid record already. ``workers`` run at once, ``where`` is ``local`` or
    ``cluster``.
    """

    TYPE: ClassVar[str] = "sweep.started"

    sweep: str
    notebook_digest: str
    grid_digest: str
    runs: int
    points: list[str]
    found: int
    workers: int
    where: str
    private: bool = False


class SweepFinished(Event, frozen=True, kw_only=True):
    """A sweep ended, whole (``finished``) or not (``interrupted``, ``failed``).

    ``outcomes`` counts the points by outcome: ``completed``, ``failed``, ``refused``, ``aborted``, ``died``,
    ``not-affordable``, ``missing``. ``records`` names the record of each point that has a valid one.
    """

    TYPE: ClassVar[str] = "sweep.finished"

    sweep: str
    status: str
    outcomes: dict[str, int]
    records: dict[str, str]
