"""Series of any length in a fixed number of points, and the pace of a run. Floor 6."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["SERIES_POINTS", "Pace", "Point", "Thinned", "few"]

SERIES_POINTS = 240
_PACE_WINDOW = 30.0  # seconds over which the pace is taken

Point = tuple[float, float]
Item = TypeVar("Item")


class Thinned:
    """A series of any length held in at most ``capacity`` points, each the mean of ``stride`` neighbours.

    Adding costs the same at any length. Points that are no finite numbers are left out (they cannot be drawn).
    """

    def __init__(self, capacity: int = SERIES_POINTS) -> None:
        self.stride = 1
        self._capacity = capacity
        self._points: list[Point] = []
        self._open: list[Point] = []

    def add(self, x: float, y: float) -> None:
        """One more point."""
        if not math.isfinite(y):
            return
        self._open.append((x, y))
        if len(self._open) < self.stride:
            return
        self._points.append(_mean(self._open))
        self._open = []
        if len(self._points) >= self._capacity:
            halves = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [_mean(pair) for pair in halves]
            self.stride *= 2

    def points(self) -> list[Point]:
        """The points to draw; the newest is always among them."""
        return [*self._points, self._open[-1]] if self._open else list(self._points)


def _mean(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def few(items: Sequence[Item], most: int) -> list[Item]:
    """At most ``most`` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    last = len(items) - 1
    return [items[round(i * last / (most - 1))] for i in range(most)]


class Pace:
    """Steps per second over the last half minute, from what the poller saw."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def see(self, now: float, step: int) -> None:
        """The run stood at ``step`` at the time ``now``."""
        if not self._seen or step != self._seen[-1][1]:
            self._seen.append((now, step))
        while len(self._seen) > 2 and now - self._seen[0][0] > _PACE_WINDOW:  # noqa: PLR2004 - a pace needs two
            self._seen.popleft()

    def rate(self) -> float | None:
        """Steps per second, or ``None`` while that cannot be said."""
        if len(self._seen) < 2:  # noqa: PLR2004 - a pace needs two
            return None
        (first, low), (last, high) = self._seen[0], self._seen[-1]
        return (high - low) / (last - first) if last > first and high > low else None
