"""What the run panel says, as data: state in, view out. Floor 6.

Pure: no widget, no thread, no clock, no torch. The model reads three things that others own, by the protocols below:
the run's state, the trail's status, and the outcome of the last verification. It returns a *view*: a plain JSON object
with every number already put into words, so that the live widget, the frozen picture and the text say the same.

``PanelModel.observe`` returns an update for the view's readers: a JSON merge patch (RFC 7396) against the view before
it, the new points of each series, and a sequence number, so that a reader who misses one knows. ``PanelModel.full``
returns the whole view, with series thinned to a fixed number of points, so that its size does not grow with the run.

Under differential privacy only the series named in ``PUBLIC_SERIES`` are read at all, and pace (steps per second, time
left) is part of the live updates only, never of the view that is kept: the time a step takes depends on private data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.notebook.panels.series import Pace, Thinned, few
from rlhf_audit_nb.notebook.panels.view import Check, View, build_view, latest
from rlhf_audit_nb.notebook.panels.words import say_left, say_rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlhf_audit_nb.notebook.panels.sources import PrivacyLike, StateLike, StatusLike

__all__ = ["PanelModel", "merge", "patch"]

_CURVE_POINTS = 240
_NEW_POINTS = 64  # most new points of one series in one update


def _curve(privacy: PrivacyLike) -> list[list[float]]:
    """The planned ε by step, at few enough steps to draw; its two ends are among them."""
    curve = privacy.curve
    points = [(step, float(curve[step])) for step in few(range(len(curve)), _CURVE_POINTS)]
    return [[step, epsilon] for step, epsilon in points if math.isfinite(epsilon)]


def patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> View:
    """The JSON merge patch (RFC 7396) that turns ``old`` into ``new``; empty where nothing changed."""
    changes: View = {key: None for key in old if key not in new}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            inner = patch(before, value)
            if inner:
                changes[key] = inner
        elif key not in old or before != value:
            changes[key] = value
    return changes


def merge(target: Mapping[str, Any], change: Mapping[str, Any]) -> View:
    """``target`` with a JSON merge patch applied; what a reader of updates does."""
    result = dict(target)
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            inner = result.get(key)
            result[key] = merge(inner if isinstance(inner, Mapping) else {}, value)
        else:
            result[key] = value
    return result


def _without_none(value: Any) -> Any:
    """Absent and null mean the same in a merge patch, so a view holds no null."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


class PanelModel:
    """Follows one run: keeps the last view, the thinned series and the sequence number of the updates."""

    def __init__(self, state: StateLike) -> None:
        self._state = state
        self._view: View = {}
        self._curve: list[list[float]] = []
        self._planned: Sequence[float] | None = None
        self._series: dict[str, Thinned] = {}
        self._read: dict[str, int] = {}
        self._pace = Pace()
        self._sequence = 0

    @property
    def sequence(self) -> int:
        """The number of the last update."""
        return self._sequence

    def observe(
        self, now: float, status: StatusLike | None, check: Check | None = None, *, frozen: bool = False
    ) -> View | None:
        """The update since the last call, or ``None`` where nothing changed but the clock.

        Args:
            now: Unix time at which the state is read.
            status: where the trail stands.
            check: the last finished verification.
            frozen: this is the last update.
        """
        view = _without_none(build_view(self._state, status, check, frozen=frozen))
        points = self._new_points()
        change = patch(self._view, view)
        privacy = self._state.privacy if self._state.private else None
        curve = privacy is not None and self._curve_changed(privacy)
        if privacy is not None and curve:
            self._curve = _curve(privacy)
        self._view = view
        self._pace.see(now, self._state.step)
        if not change and not points and not curve:
            return None
        self._sequence += 1
        update: View = {"seq": self._sequence, "view": change, "points": points}
        if curve:
            update["curve"] = self._curve
        if not frozen:
            update["live"] = {"now": round(now, 3), **self._pace_words()}
        return update

    def full(self) -> View:
        """The whole view as it stands after the last update, with its curve and thinned series."""
        series = {name: [list(point) for point in item.points()] for name, item in self._series.items()}
        strides = {name: item.stride for name, item in self._series.items()}
        return {"seq": self._sequence, "view": self._view, "curve": self._curve, "series": series, "strides": strides}

    def _curve_changed(self, privacy: PrivacyLike) -> bool:
        """A curve never changes in place: another plan is another list."""
        changed = privacy.curve is not self._planned
        self._planned = privacy.curve
        return changed

    def _new_points(self) -> dict[str, list[list[float]]]:
        found: dict[str, list[list[float]]] = {}
        for name in latest(self._state):
            series = self._state.series[name]
            start, stop = self._read.get(name, 0), len(series)
            if stop <= start:
                continue
            fresh = [(float(x), float(y)) for x, y in series[start:stop]]
            self._read[name] = stop
            thinned = self._series.setdefault(name, Thinned())
            for x, y in fresh:
                thinned.add(x, y)
            drawn = [point for point in fresh if math.isfinite(point[1])]
            if drawn:
                found[name] = [list(point) for point in few(drawn, _NEW_POINTS)]
        return found

    def _pace_words(self) -> View:
        rate = self._pace.rate()
        if rate is None or self._state.status != "training":
            return {}
        training = self._view["training"]
        words: View = {"rate": say_rate(rate)}
        if training.get("most"):
            left = max(training["most"] - self._state.step, 0)
            words["left"] = say_left(left / rate)
        return words
