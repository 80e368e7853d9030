"""What recording costs the thread that trains, measured by the recorder itself while it records. Floor 2.

The clock is read where a part begins and where it ends (`Overhead.part`), which costs about a microsecond; what is kept
is a histogram for each part, so that memory does not grow with the steps and a quantile is right to one part in
twenty-five. What other threads do (the writer's commits, a live panel) is not in it, and not what a kernel that we have
queued costs a GPU: ``python -m benchmarks --only capture`` compares whole steps instead.

Times of a private training depend on private data: a run under differential privacy keeps its figures in the vault.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from html import escape
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.errors import DataError
from rlhf_audit_nb.events import RunFinished, RunFinishedPrivate, RunStarted, decode_body, decode_private

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import Entry, TrailReader
    from rlhf_audit_nb.trail.vault import Half

__all__ = ["PARTS", "STEP_PARTS", "Histogram", "Overhead", "RunOverhead", "read_overhead"]

STEP_PARTS: Mapping[str, str] = {
    "recorder": "metrics, encoding, and handing the entry to the writer",
    "update norm": "copying the trainable weights and measuring what the step changed",
    "weights digest": "hashing the trainable weights (weights_every)",
    "panel": "putting the step's numbers where panels read them",
    "device": "waiting until the device has computed them; on a GPU most of it is the training's own work",
}
PARTS: Mapping[str, str] = {
    **STEP_PARTS,
    "inputs": "digests of data and models, at the beginning and the end of each training",
    "checkpoints": "hashing and signing saved checkpoints",
}
"""The parts of the time, and what each is."""

_FINENESS = 16  # buckets in an octave: a quantile is right to 2 ** (1/16) - 1, about 4 %
_LEAST = 1e-7  # seconds; what is shorter is told as this


class Histogram:
    """How often something took how long; as large after a million times as after ten."""

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self.count = 0
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """It took so long once."""
        self._buckets[math.ceil(_FINENESS * math.log2(max(seconds, _LEAST) / _LEAST))] += 1
        self.count += 1
        self.total += seconds

    def quantile(self, share: float) -> float:
        """The seconds that ``share`` (0 to 1) of all times did not exceed, rounded up by 4 % at most; 0 of none."""
        left = math.ceil(share * self.count)
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                return _LEAST * math.exp2(bucket / _FINENESS)
        return 0.0


class Overhead:
    """The times of one run; parts may lie within each other, and an outer one does not count what an inner one does."""

    def __init__(self) -> None:
        self._training = 0.0
        self._sums = dict.fromkeys(PARTS, 0.0)
        self._step = dict.fromkeys(STEP_PARTS, 0.0)
        self._parts = {name: _Part(self, name) for name in PARTS}
        self._open: list[tuple[str, float]] = []
        self._inner: list[float] = []
        self._thread = 0
        self._all = {name: Histogram() for name in STEP_PARTS}
        self._whole, self._ours = Histogram(), Histogram()
        self._step_began: float | None = None

    def part(self, name: str) -> _Part:
        """A context in which time is counted to the part ``name``: only within `training`, and on its thread."""
        return self._parts[name]

    @contextmanager
    def training(self) -> Iterator[None]:
        """A training goes on, on this thread; a second one at the same time is not measured."""
        if self._thread:
            yield
            return
        self._thread = threading.get_ident()
        began = time.perf_counter()
        try:
            yield
        finally:
            self._training += time.perf_counter() - began
            self.step_ends()
            self._thread = 0
            self._open.clear()
            self._inner.clear()

    @property
    def measures_here(self) -> bool:
        """Whether a training is measured on the thread that asks."""
        return self._thread == threading.get_ident()

    def step_begins(self) -> None:
        """The next optimizer step begins; the one before, with all that came after it, has ended."""
        if self.measures_here:
            self.step_ends()
            self._step_began = time.perf_counter()

    def step_ends(self) -> None:
        """No further step begins."""
        if self._step_began is None or not self.measures_here:
            return
        self._whole.add(time.perf_counter() - self._step_began)
        self._ours.add(sum(self._step.values()))
        for name, seconds in self._step.items():
            if seconds:
                self._all[name].add(seconds)
                self._step[name] = 0.0
        self._step_began = None

    def begins(self, name: str) -> None:
        """The part ``name`` begins; `ends` ends it."""
        if self.measures_here:
            self._inner.append(0.0)
            self._open.append((name, time.perf_counter()))

    def ends(self) -> None:
        """The part that began last ends."""
        if not self._open or not self.measures_here:
            return
        ended = time.perf_counter()
        name, began = self._open.pop()
        seconds = ended - began - self._inner.pop()
        if self._inner:
            self._inner[-1] += ended - began
        self._sums[name] += seconds
        if name in self._step and self._step_began is not None:
            self._step[name] += seconds

    def to_dict(self) -> dict[str, Any] | None:
        """The figures as plain values, ``None`` where nothing was measured.

        ``seconds`` of training and how many ``steps``; ``share`` of all parts in it (0 to 1), and ``waiting``, that of
        the device alone; ``step_ms`` and ``recording_us`` (a step's own time, and what of it is ours) at p50 and p99;
        ``parts`` with each one's ``share``, and where it is a step's its p50 and p99 in µs over the steps that had it.
        """
        if not self._training:
            return None
        parts: dict[str, Any] = {}
        for name, seconds in self._sums.items():
            if seconds:
                parts[name] = {"share": _rounded(seconds / self._training)}
                if name in self._all and self._all[name].count:
                    parts[name] |= _quantiles(self._all[name], 1e6)
        return {
            "seconds": _rounded(self._training),
            "steps": self._whole.count,
            "share": _rounded(sum(self._sums.values()) / self._training),
            "waiting": _rounded(self._sums["device"] / self._training),
            "step_ms": _quantiles(self._whole, 1e3),
            "recording_us": _quantiles(self._ours, 1e6),
            "parts": parts,
        }


class _Part:
    """One part as a context: a class, because a generator would cost more than what it measures."""

    __slots__ = ("_name", "_overhead")

    def __init__(self, overhead: Overhead, name: str) -> None:
        self._overhead = overhead
        self._name = name

    def __enter__(self) -> None:
        self._overhead.begins(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._overhead.ends()


def _quantiles(times: Histogram, unit: float) -> dict[str, float]:
    return {"p50": _rounded(unit * times.quantile(0.5)), "p99": _rounded(unit * times.quantile(0.99))}


def _rounded(value: float) -> float:
    """Four digits: more would say what was not measured."""
    return float(f"{value:.4g}")


# --- what is told of it ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, repr=False)
class RunOverhead:
    """What recording cost one run.

    Attributes:
        run: its id.
        experiment: its experiment.
        private: whether the run was under differential privacy: these are times of a private training.
        figures: as `Overhead.to_dict` gives them.
    """

    run: str
    experiment: str
    private: bool
    figures: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """A line for each part, the dearest first: its name, its share of the training, p50 and p99 in a step."""
        parts = sorted(self.figures["parts"].items(), key=lambda item: -item[1]["share"])
        return [(name, f"{100 * part['share']:.3g} %", _us(part, "p50"), _us(part, "p99")) for name, part in parts]

    def headline(self) -> str:
        """The share in one sentence."""
        found = self.figures
        said = f"{self.experiment}: recording took {100 * found['share']:.3g} % of {found['seconds']:.3g} s of training"
        if found["waiting"] > found["share"] / 4:
            said += f", {100 * found['waiting']:.3g} % of it waiting for the device, which is mostly the training's own"
        steps = f"{found['steps']} step{'' if found['steps'] == 1 else 's'}"
        took = f"a step {_figure(found['step_ms']['p50'])} ms, of which ours {_figure(found['recording_us']['p50'])} µs"
        return f"{said}; {steps}, {took} (p50; p99 {_figure(found['recording_us']['p99'])} µs)."

    def notes(self) -> list[str]:
        """What a reader must know beside the figures."""
        if not self.private:
            return []
        return ["These are times of a private training, which depend on private data: keep them to yourself."]

    def __str__(self) -> str:
        table = [("part", "share", "p50", "p99"), *self.rows()]
        lines = [f"  {name:<16} {share:>9} {median:>11} {high:>11}" for name, share, median, high in table]
        return "\n".join([self.headline(), *lines, *self.notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def row(tag: str, cells: tuple[str, ...]) -> str:
            return (
                "<tr>" + "".join(f'<{tag} style="text-align:left">{escape(cell)}</{tag}>' for cell in cells) + "</tr>"
            )

        rows = [row("th", ("part", "share", "p50 a step", "p99 a step")), *(row("td", cells) for cells in self.rows())]
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes())
        return f"<p>{escape(self.headline())}</p><table>{''.join(rows)}</table>{notes}"


def _figure(value: float) -> str:
    """Three digits, and all that stand before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"  # noqa: PLR2004


def _us(part: Mapping[str, float], name: str) -> str:
    return f"{_figure(part[name])} µs" if name in part else ""


def read_overhead(reader: TrailReader, half: Callable[[Entry], Half], run: str | None = None) -> RunOverhead:
    """What recording cost a run, from the entry that closed it.

    Args:
        reader: the trail.
        half: gives the private half of an entry (`Vault.half`).
        run: the run's id, or its beginning; ``None`` takes the last one that trained.

    Raises:
        DataError: there is none, or a private run's figures are gone from the vault.
        VaultError: they cannot be opened.
    """
    found = None
    for entry in reader.entries(type=RunFinished.TYPE):
        if run is not None and not (entry.run or "").startswith(run):
            continue
        finished = decode_body(entry.type, entry.body)
        if isinstance(finished, RunFinished) and (finished.overhead is not None or entry.envelope.sealed is not None):
            found = (entry, finished)
    if found is None:
        which = "No run of this trail" if run is None else f"No run of this trail that begins with {run[:40]!r}"
        raise DataError(
            f"{which} has measured what recording cost: none was closed after a training.",
            next_step="Train inside %%audit_train or track_training, and ask again when the run has ended.",
            code="overhead",
        )
    entry, finished = found
    figures = finished.overhead
    if figures is None:
        opened = half(entry)
        if opened.payload is None:
            raise DataError(
                f"What recording cost the private run {entry.run} is {opened.state} in the vault.", code="overhead"
            )
        private = decode_private(entry.type, opened.payload)
        assert isinstance(private, RunFinishedPrivate)
        figures = private.overhead
    started = next(reader.entries(type=RunStarted.TYPE, run=entry.run), None)
    event = decode_body(started.type, started.body) if started is not None else None
    experiment = event.experiment if isinstance(event, RunStarted) else "unnamed"
    return RunOverhead(run=entry.run or "", experiment=experiment, private=finished.overhead is None, figures=figures)
