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

import base64
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_audit_nb.notebook.panels.sources import PrivacyLike, StateLike, StatusLike, VerdictLike

__all__ = [
    "CURVE_POINTS",
    "NO_PRIVACY",
    "PUBLIC_SERIES",
    "SEALED_LOSS",
    "SERIES_POINTS",
    "Check",
    "PanelModel",
    "Thinned",
    "build_view",
    "merge",
    "patch",
    "say_bound",
    "say_number",
    "say_root",
    "say_seconds",
    "say_time",
]

PUBLIC_SERIES = ("gradient_norm", "update_norm", "learning_rate")
"""Series that may be shown of a private run: what follows from the privatised gradient, and the schedule."""

NO_PRIVACY = "No differential privacy: this run gives no bound"
SEALED_LOSS = "The exact loss is sealed in the vault, because it is a function of private data."

SERIES_POINTS = 240
CURVE_POINTS = 240
_NEW_POINTS = 64  # most new points of one series in one update
_PACE_WINDOW = 30.0  # seconds over which the pace is taken

View = dict[str, Any]
Point = tuple[float, float]


@dataclass(frozen=True)
class Check:
    """One finished verification: its verdict, or the sentence that says why there is none; ``at`` is Unix time."""

    at: float
    verdict: VerdictLike | None = None
    error: str | None = None


# words -------------------------------------------------------------------------------------------------------------

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

_STATUS: dict[str, tuple[str, str]] = {
    "open": ("waiting for a trainer", "na"),
    "training": ("training", "live"),
    "completed": ("completed", "ok"),
    "failed": ("failed", "bad"),
    "interrupted": ("interrupted", "warn"),
    "stopped-by-budget": ("stopped by the budget", "warn"),
}

_LEVELS: dict[str, tuple[str, str]] = {
    "INVALID": ("bad", "What is stored is not what was signed. Nothing that is read from this trail can be relied on."),
    "DIVERGED": ("bad", "This trail contradicts an earlier state of itself that was seen before."),
    "UNANCHORED": ("warn", "Signed and consistent. Nobody outside has seen it yet."),
    "TIMESTAMPED": ("attest", "Signed, consistent, and its time is attested from outside."),
    "COSIGNED": ("ok", "Signed, consistent, and countersigned by a witness."),
}

_UNITS: dict[str, str] = {"annotator": "all answers of one together", "pair": "one preference", "label": "one bit"}

_LABELS: dict[str, str] = {
    "gradient_norm": "gradient norm",
    "update_norm": "update norm",
    "learning_rate": "learning rate",
}

_FIRST = ("loss", "eval_loss", "gradient_norm", "update_norm", "learning_rate")


def say_bound(value: float) -> str:
    """An upper bound, rounded up: two decimals, below 0.1 three digits, to a millionth."""
    if math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return "∞"
    decimals = 2
    if 0 < value < 0.1:  # noqa: PLR2004 - two decimals would leave nothing
        decimals = min(2 - math.floor(math.log10(value)), 6)
    scale = 10.0**decimals
    return f"{math.ceil(value * scale * (1 - 1e-9)) / scale:.{decimals}f}"


def say_number(value: float, *, full: bool = False) -> str:
    """A number with three digits: ``0.693``, ``5e-5``, ``12,400``; ``full`` keeps zeros at the end (``0.500``)."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size >= 1000:  # noqa: PLR2004
        return f"{value:,.0f}" if size < 1e9 else f"{value:.2e}".replace("e+0", "e").replace("e+", "e")  # noqa: PLR2004
    if size == 0 or size >= 0.001:  # noqa: PLR2004
        text = f"{value:#.3g}" if full else f"{value:.3g}"
        return text.rstrip(".").replace("-", "−") if size else "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−", 1 if value < 0 else 0)


def say_delta(delta: float) -> str:
    """δ as a power of ten: ``10⁻⁵``, ``2·10⁻⁶``."""
    mantissa, exponent = f"{delta:.2e}".split("e")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
    mantissa = mantissa.rstrip("0").rstrip(".")
    return power if mantissa == "1" else f"{mantissa}·{power}"


def say_root(root: bytes) -> str:
    """A root hash as base64 shortened in its middle: ``kYsc7GTz…otaw=``."""
    return _middle(base64.b64encode(root).decode(), 8, 6)


def _say_signer(vkey: str) -> str:
    """Name and key hash of a C2SP verifier key (``name+hash+key``), shortened: ``example.…+8a488eff``."""
    return _middle("+".join(vkey.split("+")[:2]), 8, 9)


def _middle(text: str, head: int, tail: int) -> str:
    """The text without its middle, where that saves anything."""
    return f"{text[:head]}…{text[-tail:]}" if len(text) > head + tail + 2 else text


def say_seconds(seconds: float) -> str:
    """A length of time in at most two units: ``2 min 14 s``."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{left} s"


def say_time(unix: float) -> str:
    """A moment, to the second, in UTC."""
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


# series ------------------------------------------------------------------------------------------------------------


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


def _few(points: Sequence[Point], most: int) -> list[Point]:
    """At most ``most`` of the points, evenly, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    last = len(points) - 1
    return [points[round(i * last / (most - 1))] for i in range(most)]


def _curve(privacy: PrivacyLike) -> list[list[float]]:
    curve = privacy.curve
    points = [(t, float(curve[t])) for t in _few_indices(len(curve), CURVE_POINTS)]
    return [[t, value] for t, value in points if math.isfinite(value)]


def _few_indices(length: int, most: int) -> list[int]:
    return [int(x) for x, _ in _few([(i, 0.0) for i in range(length)], most)] if length else []


# view --------------------------------------------------------------------------------------------------------------


def _spent(state: StateLike, privacy: PrivacyLike) -> float:
    """The composed ε after the steps that were taken; the state's own series stands before the planned curve."""
    known = state.series.get("epsilon")
    if known:
        return float(known[-1][1])
    curve = privacy.curve
    if not curve:
        return float(privacy.before)
    return float(curve[min(max(state.step, 0), len(curve) - 1)])


def _share(value: float, whole: float) -> float:
    if not whole > 0 or math.isnan(value):
        return 0.0
    return 1.0 if math.isinf(value) else round(min(1.0, max(0.0, value / whole)), 4)


def _privacy_view(state: StateLike) -> View:
    if not state.private:
        return {
            "heading": "Privacy",
            "bounded": False,
            "big": NO_PRIVACY,
            "of": "",
            "note": "What the trained model gives away about any one annotator is not limited. "
            "A privacy budget (epsilon) for the run would limit it.",
            "label": f"{NO_PRIVACY}.",
        }
    privacy = state.privacy
    if privacy is None:
        return {
            "heading": "Privacy spent",
            "bounded": True,
            "big": "ε planned later",
            "of": "",
            "note": "The plan is made, and reserved in the trail, when a trainer starts to train.",
            "label": "Differential privacy is on; its plan is made when a trainer starts to train.",
        }
    return _plan_view(state, privacy)


def _plan_view(state: StateLike, privacy: PrivacyLike) -> View:
    spent = _spent(state, privacy)
    now, budget = say_bound(spent), say_bound(privacy.budget)
    before, planned = say_bound(privacy.before), say_bound(privacy.planned)
    whole = max(privacy.budget, privacy.planned)
    unit = _UNITS.get(privacy.unit)
    each = f"each {privacy.unit}" + (f" ({unit})" if unit else "")
    sentence = (
        f"ε composed over all runs: {before} before this run, {now} now, {planned} at the planned end, "
        f"of a budget of {budget}, at δ {say_delta(privacy.delta)}, for each {privacy.unit}."
    )
    return {
        "heading": "Privacy spent",
        "bounded": True,
        "big": f"ε {now}",
        "of": f"of {budget}, δ {say_delta(privacy.delta)}",
        "bar": {
            "before": _share(privacy.before, whole),
            "now": _share(spent, whole),
            "planned": _share(privacy.planned, whole),
            "budget": _share(privacy.budget, whole),
        },
        "keys": [
            {"kind": "before", "text": f"before {before}"},
            {"kind": "now", "text": f"now {now}"},
            {"kind": "planned", "text": f"planned {planned}"},
        ],
        "chart": _chart_view(state, privacy, spent),
        "note": f"Protects {each}, {privacy.units:,} of them. {privacy.adjacency.capitalize()} adjacency. "
        "Composed over all runs, not added.",
        "label": sentence,
    }


def _chart_view(state: StateLike, privacy: PrivacyLike, spent: float) -> View:
    """The ε curve's frame: where the run stands on it, how high it reaches, and what its axis says."""
    steps = max(len(privacy.curve) - 1, 0)
    step = _position(state.step, spent, privacy.curve)
    now, planned, budget = say_bound(spent), say_bound(privacy.planned), say_bound(privacy.budget)
    reach = max(value for value in (privacy.planned, spent, privacy.before, 0.0) if math.isfinite(value))
    # A budget far above the plan would press the curve to the floor: then it is named, not drawn.
    drawn = reach >= privacy.budget / 4
    top = 1.04 * max(privacy.budget if drawn else 1.2 * reach, reach) or 1.0
    ticks = [{"at": 0, "text": "0"}]
    for value in (privacy.planned, privacy.before):
        if math.isfinite(value) and all(abs(value - tick["at"]) > top / 6 for tick in ticks):  # type: ignore[operator]
            ticks.append({"at": value, "text": say_bound(value)})
    return {
        "step": step,
        "steps": steps,
        "spent": spent if math.isfinite(spent) else None,
        "top": top,
        "limit": {"at": privacy.budget if drawn else None, "text": f"budget {budget}" + ("" if drawn else " above")},
        "ticks": ticks,
        "label": f"ε over the steps of this run: {now} at step {step:,}, {planned} at step {steps:,}, budget {budget}.",
    }


def _position(step: int, spent: float, curve: Sequence[float]) -> int:
    """The step of the plan at which the run stands; a run of several trainings counts its steps on and on."""
    last = max(len(curve) - 1, 0)
    if 0 <= step <= last and (not curve or math.isclose(curve[step], spent, rel_tol=1e-6, abs_tol=1e-9)):
        return step
    return min(max(bisect_right(curve, spent * (1 + 1e-9)) - 1, 0), last)


def _latest(state: StateLike) -> dict[str, float]:
    names = [name for name in list(state.series) if name != "epsilon"]
    if state.private:
        names = [name for name in PUBLIC_SERIES if name in names]
    ordered = [name for name in _FIRST if name in names] + sorted(set(names) - set(_FIRST))
    return {name: float(state.series[name][-1][1]) for name in ordered if state.series[name]}


def _metric_label(name: str, *, private: bool) -> str:
    if private and name == "gradient_norm":
        return "privatised gradient norm"
    return _LABELS.get(name, name)


def _training_view(state: StateLike) -> View:
    latest = _latest(state)
    most = state.max_steps or 0
    privacy = state.privacy if state.private else None
    if privacy is not None and privacy.curve:
        most = min(most, len(privacy.curve) - 1) if most else len(privacy.curve) - 1
    if state.step > most:  # several trainings in one run: the plan of the last one is no measure for all steps
        most = 0
    metrics = [
        {"name": name, "label": _metric_label(name, private=state.private), "value": say_number(value, full=True)}
        for name, value in latest.items()
    ]
    facts = []
    if privacy is not None:
        facts = [
            {"term": "noise σ", "text": say_number(privacy.noise_multiplier)},
            {"term": "sampling q", "text": say_number(privacy.sampling_rate)},
            {"term": "clipping C", "text": say_number(privacy.clipping_norm)},
        ]
    if state.private:
        note = f"{SEALED_LOSS} Shown is what is public."
    else:
        note = "Loss and metrics are plain: exact, unprotected, and recorded as such."
    of = f"of {_count(most, 'step')}" if most else "steps"
    said = ", ".join(f"{item['label']} {item['value']}" for item in metrics)
    return {
        "heading": "Training",
        "big": f"{state.step:,}",
        "of": of,
        "most": most or None,
        "progress": _share(state.step, most) if most else None,
        "metrics": metrics,
        "facts": facts,
        "note": note,
        "label": f"Step {state.step:,}{f' of {most:,}' if most else ''}." + (f" Latest: {said}." if said else ""),
    }


def _integrity_view(status: StatusLike | None, check: Check | None) -> View:
    rows: list[View] = []
    if status is not None:
        whole = base64.b64encode(status.root).decode()
        rows = [
            {"key": "root", "term": "root", "text": say_root(status.root), "copy": whole, "mono": True},
            {
                "key": "signer",
                "term": "signed by",
                "text": _say_signer(status.signer),
                "copy": status.signer,
                "mono": True,
            },
        ]
        if status.last_commit_time_us is not None:
            commit = status.last_commit_time_us / 1e6
            rows.append({"key": "commit", "term": "last commit", "text": say_time(commit), "time": round(commit, 3)})
        rows.append({"key": "unsynced", "term": "not yet synced", "text": f"{status.unsynced:,}"})
    rows.append(_verified_row(check))
    size = status.size if status is not None else 0
    entries = "entry" if size == 1 else "entries"
    return {
        "heading": "Integrity",
        "big": f"{size:,}",
        "of": entries,
        "rows": rows,
        "note": _level(check)["meaning"],
        "label": f"The trail holds {size:,} {entries}. " + _level(check)["sentence"],
    }


def _verified_row(check: Check | None) -> View:
    row: View = {"key": "verified", "term": "verified", "text": "not yet"}
    if check is None:
        return row
    if check.verdict is None:
        return {**row, "text": "could not be", "detail": check.error or ""}
    held = _count(check.verdict.size, "entry", "entries")
    return {**row, "text": say_time(check.at), "time": round(check.at, 3), "detail": held}


def _level(check: Check | None) -> View:
    if check is None:
        return {
            "word": "not verified yet",
            "tone": "na",
            "meaning": "Nothing was checked yet; no level is claimed.",
            "sentence": "It was not verified yet.",
        }
    if check.verdict is None:
        return {
            "word": "not verified",
            "tone": "na",
            "meaning": f"No level is claimed. {check.error or ''}".rstrip(),
            "sentence": "It could not be verified.",
        }
    word = check.verdict.level.name
    tone, meaning = _LEVELS.get(word, ("na", ""))
    return {"word": word, "tone": tone, "meaning": meaning, "sentence": f"Level {word}. {meaning}"}


def _alert(check: Check | None) -> View | None:
    if check is None or check.verdict is None or check.verdict.level.name not in {"INVALID", "DIVERGED"}:
        return None
    altered = check.verdict.level.name == "INVALID"
    reasons = list(check.verdict.reasons)
    return {
        "title": "The trail does not hold" if altered else "The trail contradicts its past",
        "reasons": [{"where": str(reason.where), "text": reason.message} for reason in reasons[:3]],
        "more": f"and {_count(len(reasons) - 3, 'more reason')}" if len(reasons) > 3 else "",  # noqa: PLR2004
        "command": "rlhf-audit verify",
    }


def build_view(
    state: StateLike, status: StatusLike | None, check: Check | None = None, *, frozen: bool = False
) -> View:
    """The view of one moment, without its points. The same arguments give the same view.

    Args:
        state: the run; under differential privacy only its public series are read.
        status: where the trail stands; ``None`` where that is not known.
        check: the last finished verification; ``None`` shows "not verified yet", never a level.
        frozen: no further update will come: times stand as times, not as ages.
    """
    word, tone = _STATUS.get(state.status, (state.status, "na"))
    training = _training_view(state)
    level = _level(check)
    where = f"step {training['big']} of {training['most']:,}" if training["most"] else ""
    text = " · ".join(part for part in (word, where) if part)
    return {
        "title": state.experiment,
        "run": state.run_id,
        "private": bool(state.private),
        "frozen": frozen,
        "status": {"word": word, "tone": tone, "text": text},
        "level": {key: level[key] for key in ("word", "tone", "meaning")},
        "alert": _alert(check),
        "privacy": _privacy_view(state),
        "training": training,
        "integrity": _integrity_view(status, check),
        "warnings": [str(item) for item in list(state.warnings)[-3:]],
        "label": f"Audit of run {state.experiment}: {text}. {level['sentence']}",
    }


# deltas ------------------------------------------------------------------------------------------------------------


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


class _Pace:
    """Steps per second over the last half minute, from what the poller saw."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def see(self, now: float, step: int) -> None:
        if not self._seen or step != self._seen[-1][1]:
            self._seen.append((now, step))
        while len(self._seen) > 2 and now - self._seen[0][0] > _PACE_WINDOW:  # noqa: PLR2004 - a pace needs two
            self._seen.popleft()

    def rate(self) -> float | None:
        if len(self._seen) < 2:  # noqa: PLR2004 - a pace needs two
            return None
        (first, low), (last, high) = self._seen[0], self._seen[-1]
        return (high - low) / (last - first) if last > first and high > low else None


class PanelModel:
    """Follows one run: keeps the last view, the thinned series and the sequence number of the updates."""

    def __init__(self, state: StateLike) -> None:
        self._state = state
        self._view: View = {}
        self._curve: list[list[float]] = []
        self._planned: Sequence[float] | None = None
        self._series: dict[str, Thinned] = {}
        self._read: dict[str, int] = {}
        self._pace = _Pace()
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
        for name in _latest(self._state):
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
                found[name] = [list(point) for point in _few(drawn, _NEW_POINTS)]
        return found

    def _pace_words(self) -> View:
        rate = self._pace.rate()
        if rate is None or self._state.status != "training":
            return {}
        training = self._view["training"]
        words: View = {"rate": _say_rate(rate)}
        if training.get("most"):
            left = max(training["most"] - self._state.step, 0)
            words["left"] = f"{say_seconds(_coarse(left / rate))} left"
        return words


def _say_rate(rate: float) -> str:
    return f"{rate:.2g} steps/s" if rate >= 0.1 else f"{1 / rate:.2g} s a step"  # noqa: PLR2004


def _coarse(seconds: float) -> float:
    """Time left is a guess: to the second below a minute, then to 5 s, then to the minute."""
    if seconds < 60:  # noqa: PLR2004
        return seconds
    unit = 5 if seconds < 600 else 60  # noqa: PLR2004
    return round(seconds / unit) * unit
