"""What an open run shows of itself while it trains: plain values that panels poll. Floor 2.

One thread writes (the one that trains), any number read. Nothing is ever changed in place: points are only appended,
and the scalar fields are replaced whole, so a reader needs no lock and sees at worst a slightly older value. Of each
series the newest points are kept (`Series`), so that memory does not grow with the run; the trail has all of them. No
torch, no transformers: a panel imports this module in milliseconds.

Only public values come here. Under differential privacy that leaves epsilon, the learning rate, the norm of the
privatised gradient, the norm of the parameter update, and the loss that was released through the mechanism.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, overload

__all__ = [
    "KEPT",
    "PRIVATE_LOSS",
    "SMOOTHING",
    "AuditedView",
    "InheritedView",
    "PrivacyView",
    "RunState",
    "Series",
    "Smoothed",
    "Status",
    "smoothed_deviation",
]

PRIVATE_LOSS = "private_loss"
"""The loss released under differential privacy: a step's metric in the trail, and smoothed a series of the state."""
KEPT = 10_000
"""How many points of each series are kept, at least."""
SMOOTHING = 20
"""Over how many steps a smoothed series reaches, about: the newest weighs 2 / (steps + 1)."""

Status = Literal["open", "training", "completed", "failed", "interrupted", "stopped-by-budget"]


class Series(Sequence[tuple[int, float]]):
    """Points ``(step, value)`` that are only appended; a value may be ``nan`` or infinite.

    Its length is how many there ever were, and a place keeps its meaning; the newest `KEPT` (at least) can be had.
    """

    def __init__(self) -> None:
        # Replaced together, so that a reader on another thread sees points and how many are gone as they belong.
        self._held: tuple[int, list[tuple[int, float]]] = (0, [])

    def append(self, step: int, value: float) -> None:
        """One more point."""
        gone, points = self._held
        points.append((step, value))
        if len(points) >= 2 * KEPT:
            self._held = (gone + len(points) - KEPT, points[-KEPT:])

    def __len__(self) -> int:
        gone, points = self._held
        return gone + len(points)

    @overload
    def __getitem__(self, place: int) -> tuple[int, float]: ...

    @overload
    def __getitem__(self, place: slice) -> list[tuple[int, float]]: ...

    def __getitem__(self, place: int | slice) -> tuple[int, float] | list[tuple[int, float]]:
        gone, points = self._held
        if isinstance(place, slice):
            start, stop, step = place.indices(gone + len(points))
            return points[max(start - gone, 0) : max(stop - gone, 0) : step]
        if 0 <= place < gone:
            raise IndexError(f"the point {place} is no longer kept")
        return points[place - gone if place >= 0 else place]

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return iter(list(self._held[1]))


class Smoothed:
    """An exponentially weighted mean, its weights scaled to 1 from the first value on."""

    def __init__(self, steps: int = SMOOTHING) -> None:
        self._keep = 1 - 2 / (steps + 1)
        self._sum = 0.0
        self._weight = 0.0

    def add(self, value: float) -> None:
        """The next value."""
        self._sum = self._keep * self._sum + value
        self._weight = self._keep * self._weight + 1

    @property
    def value(self) -> float | None:
        """The mean so far; ``None`` before the first value."""
        return self._sum / self._weight if self._weight else None


def smoothed_deviation(deviation: float, count: int, steps: int = SMOOTHING) -> float:
    """The standard deviation of `Smoothed` after ``count`` values, each with noise of ``deviation`` of its own."""
    keep = 1 - 2 / (steps + 1)
    squares = (1 - keep ** (2 * count)) / (1 - keep**2)
    return deviation * math.sqrt(squares) * (1 - keep) / (1 - keep**count)


@dataclass(frozen=True, kw_only=True)
class AuditedView:
    """What ``canaries`` phantom units in a training showed of its epsilon, with ``confidence``.

    ``ceiling`` is the most that so many can show; ``failed`` says that ``epsilon_lower`` exceeds ``epsilon_claimed``.
    """

    canaries: int
    epsilon_claimed: float
    epsilon_lower: float
    ceiling: float
    confidence: float
    failed: bool


@dataclass(frozen=True, kw_only=True)
class PrivacyView:
    """The guarantee of a private run, as a panel shows it.

    ``before`` is the composed epsilon of the population when the run reserved, ``planned`` the composed total at its
    planned end, ``budget`` what may not be crossed; ``curve[t]`` is the composed total after ``t`` steps.
    ``loss_deviation`` is the standard deviation of the noise in one step's released loss, ``None`` where none is;
    ``audited`` what its canaries showed, once the training has ended.
    """

    unit: str
    units: int
    adjacency: str
    delta: float
    budget: float
    before: float
    planned: float
    noise_multiplier: float
    sampling_rate: float
    clipping_norm: float
    curve: list[float]
    sampled: str = "units"
    loss_deviation: float | None = None
    audited: AuditedView | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class InheritedView:
    """What a training that charges nothing inherits: the composed ``epsilon`` of ``runs`` at ``delta``."""

    unit: str
    epsilon: float
    delta: float
    runs: list[str]

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)


@dataclass(kw_only=True)
class RunState:
    """The live picture of one run.

    Attributes:
        status: ``open`` until a trainer trains, then ``training``, then the run's outcome.
        started_at: ``time.time()`` when the run was opened.
        step: optimizer steps taken so far, over all trainings of the run.
        max_steps: steps planned by the training that goes on, 0 while unknown.
        private: whether the run trains under differential privacy; not where all it trains inherits.
        inherited: what the last training that charged nothing inherits.
        series: public series by name.
        warnings: sentences for a person.
        clean: what takes secrets out of a new series' name.
    """

    experiment: str
    run_id: str
    private: bool = False
    status: Status = "open"
    started_at: float = field(default_factory=time.time)
    finished_at: float | None = None
    step: int = 0
    max_steps: int = 0
    privacy: PrivacyView | None = None
    inherited: InheritedView | None = None
    series: dict[str, Series] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    clean: Callable[[str], str] = field(default=str, repr=False, compare=False)

    @property
    def finished(self) -> bool:
        """Whether the run is closed."""
        return self.status not in ("open", "training")

    @property
    def epsilon(self) -> float | None:
        """The composed epsilon so far, or ``None`` without differential privacy."""
        if self.privacy is None:
            return None
        spent = self.series.get("epsilon")
        return spent[-1][1] if spent else self.privacy.before

    def add(self, name: str, step: int, value: float) -> None:
        """Append one point of the public series ``name``."""
        series = self.series.get(name)
        if series is None:
            name = self.clean(name)
            series = self.series.setdefault(name, Series())
        series.append(step, value)

    def snapshot(self) -> dict[str, Any]:
        """Everything at this moment, as plain values that do not change; the newest points of each series."""
        return {
            "experiment": self.experiment,
            "run_id": self.run_id,
            "private": self.private,
            "status": self.status,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "step": self.step,
            "max_steps": self.max_steps,
            "epsilon": self.epsilon,
            "privacy": self.privacy.to_dict() if self.privacy else None,
            "inherited": self.inherited.to_dict() if self.inherited else None,
            "series": {name: list(points) for name, points in list(self.series.items())},
            "warnings": list(self.warnings),
        }
