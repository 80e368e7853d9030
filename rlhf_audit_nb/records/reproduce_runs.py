"""The runs of a record beside those of its reproduction: what was compared by part, and what may differ. Floor 3.

Pure: entries go in, `RunsCompared` comes out. What is compared, and what is not and why, is `comparison`'s; here each
difference gets its part, and a tolerance where whoever reproduces stated one. A tolerance holds for numbers of public
runs; a private run must come out bit for bit, and of its steps no value is told.

The states of random generators when a training began are told as a note and are no difference by themselves: they are
a cause, and where they had an effect, the effect is found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.events import (
    CheckpointRecorded,
    DataBound,
    DataRead,
    EnvironmentCaptured,
    EvaluationRecorded,
    MetricsLogged,
    ModelBound,
    RunFailure,
    RunFinished,
    SamplesDrawn,
    Step,
    ThresholdSealed,
    TrainerLogged,
    WeightsSaved,
    decode_body,
)
from rlhf_audit_nb.records.comparison import (
    COMPARED,
    Difference,
    compare_environments,
    compare_runs,
    is_timing,
    private_runs,
    recorded_runs,
)
from rlhf_audit_nb.records.normalising import numbers_close
from rlhf_audit_nb.records.rerun import environment_of

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.entry import Entry

__all__ = ["PARTS", "EnvironmentsCompared", "Found", "RunsCompared", "Tolerance", "compare_all_runs"]

PARTS = ("data", "models", "settings", "metrics", "weights", "evaluations", "private", "outputs", "outcome")
"""What is compared, in the order in which it is told."""

_PARTS: dict[str, str] = {
    DataBound.TYPE: "data",
    DataRead.TYPE: "data",
    ModelBound.TYPE: "models",
    Step.TYPE: "metrics",
    MetricsLogged.TYPE: "metrics",
    TrainerLogged.TYPE: "metrics",
    SamplesDrawn.TYPE: "metrics",
    CheckpointRecorded.TYPE: "metrics",
    RunFinished.TYPE: "outcome",
    RunFailure.TYPE: "outcome",
    ThresholdSealed.TYPE: "evaluations",
    EvaluationRecorded.TYPE: "evaluations",
}
_STATE = "hyperparameters.random_state"
_MOST_NAMED = 8


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What may differ, as whoever reproduces states it; nothing by itself.

    Attributes:
        metrics: for numbers of public runs and of evaluations, relative to the larger one and absolute around zero.
        outputs: likewise, for numbers in the texts of outputs.
        weights: whether the digests of weights that a public training left may differ; a digest cannot say by how much.
    """

    metrics: float | None = None
    outputs: float | None = None
    weights: bool = False

    def to_dict(self) -> dict[str, float | str]:
        """What was stated, by name."""
        stated: dict[str, float | str | None] = {
            "metrics": self.metrics,
            "outputs": self.outputs,
            "weights": "any" if self.weights else None,
        }
        return {name: value for name, value in stated.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Found:
    """One thing that is not as it was.

    Attributes:
        part: one of `PARTS`.
        place: where it stands: the run, the kind of entry, the field, the entry.
        expected: its value then; ``None`` where it is not to be shown.
        found: its value now, likewise.
        tolerated: whether it is within the tolerance.
    """

    part: str
    place: str
    expected: Any = None
    found: Any = None
    tolerated: bool = False

    def __str__(self) -> str:
        values = f": {self.expected!r} then, {self.found!r} now" if self.expected != self.found else ""
        return f"{self.place}{values}"


@dataclass(frozen=True, kw_only=True)
class EnvironmentsCompared:
    """Where both ran.

    Attributes:
        known: whether both say it.
        differs: in what they differ, as sentences.
        notes: what else may keep them from being equal.
    """

    known: bool = False
    differs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def word(self) -> str:
        """``same``, ``other`` or ``unknown``."""
        if not self.known:
            return "unknown"
        return "other" if self.differs else "same"


@dataclass
class RunsCompared:
    """What runs and evaluations were compared in, and where they differ.

    Attributes:
        compared: entries that were compared, by part; of weights, their digests.
        found: what is not as it was, in the order of the record's entries.
        times: metrics that are measured times and were left out.
        not_compared: what could not be compared, as sentences.
        environment: where both ran.
        private: whether a run is under differential privacy.
    """

    compared: Counter[str] = field(default_factory=Counter)
    found: list[Found] = field(default_factory=list)
    times: int = 0
    not_compared: list[str] = field(default_factory=list)
    environment: EnvironmentsCompared = field(default_factory=EnvironmentsCompared)
    private: bool = False


def compare_all_runs(then: Sequence[Entry], now: Sequence[Entry], tolerance: Tolerance) -> RunsCompared:
    """Compare the runs and evaluations of a record with those of its reproduction.

    Args:
        then: the record's entries.
        now: all entries of the scratch trail.
        tolerance: what may differ in public runs.
    """
    before, after = recorded_runs(then), recorded_runs(now)
    private = {run for run, _ in private_runs(then)}
    numbers = {run: f"run {place} ({run[:8]})" if run else "the record" for place, (run, _) in enumerate(before, 1)}
    comparison = compare_runs(before, after, most=None)
    result = RunsCompared(private=bool(private))
    for run, entries in before:
        for entry in entries:
            _count(result, entry, private=run in private)
    generators = [item for item in comparison.differences if _is_generator(item)]
    # A loop written by hand records as its seed what torch's generator began from, seeded or not.
    unseeded = {item.run for item in generators if item.what == _STATE}
    result.found = [
        _found(item, numbers, private, tolerance)
        for item in comparison.differences
        if item not in generators and not (item.run in unseeded and item.what == "seed")
    ]
    result.not_compared = [
        *_sealed(then, private),
        *(f"An earlier version did not record {name}." for name in comparison.unknown),
    ]
    result.environment = _compare_environments(before, after, generators)
    return result


def _is_generator(difference: Difference) -> bool:
    return difference.what.startswith("generators.") or difference.what == _STATE


def _count(result: RunsCompared, entry: Entry, *, private: bool) -> None:
    if entry.type not in {kind.TYPE for kind in COMPARED}:
        return
    event = decode_body(entry.type, entry.body)
    result.compared["private" if private else _PARTS.get(entry.type, "settings")] += 1
    weights = event.weights_digest if isinstance(event, Step | CheckpointRecorded) else None
    final = isinstance(event, ModelBound) and event.role == "final"
    if not private and (weights is not None or final):
        result.compared["weights"] += 1
    if isinstance(event, Step | MetricsLogged | TrainerLogged):
        result.times += sum(is_timing(name) for name in event.metrics)


def _found(difference: Difference, numbers: dict[str, str], private: set[str], tolerance: Tolerance) -> Found:
    part = "private" if difference.run in private else _part_of(difference)
    at = f" (entry {difference.entry})" if difference.entry is not None else ""
    run = numbers.get(difference.run, f"run {difference.run[:8]}")
    return Found(
        part=part,
        place=f"{run}: {difference.where}: {difference.what}{at}",
        expected=difference.expected,
        found=difference.found,
        tolerated=_is_tolerated(part, difference, tolerance),
    )


def _part_of(difference: Difference) -> str:
    kind = difference.where
    if difference.what == "weights_digest" and (
        difference.step is not None or kind in ("final model", "train.checkpoint")
    ):
        return "weights"
    if difference.what == "batch_digest":
        return "data"
    if difference.step is not None:
        return "metrics"
    if kind == "run":
        return "outcome"
    return "models" if kind.endswith(" model") else _PARTS.get(kind, "settings")


def _is_tolerated(part: str, difference: Difference, tolerance: Tolerance) -> bool:
    then, now = difference.expected, difference.found
    if part == "weights":
        return tolerance.weights and isinstance(then, str) and isinstance(now, str)
    if part not in ("metrics", "evaluations") or tolerance.metrics is None:
        return False
    return _close(then, now, tolerance.metrics)


def _close(then: Any, now: Any, tolerance: float) -> bool:
    """Whether two numbers, or two lists of them, are equal within the tolerance; whole numbers must be the same."""
    if isinstance(then, list) and isinstance(now, list):
        pairs = zip(then, now, strict=False)
        return len(then) == len(now) and all(one == other or _close(one, other, tolerance) for one, other in pairs)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in (then, now)):
        return False
    return not (isinstance(then, int) and isinstance(now, int)) and numbers_close(then, now, tolerance)


def _sealed(then: Sequence[Entry], private: set[str]) -> Iterator[str]:
    evaluations = (decode_body(entry.type, entry.body) for entry in then if entry.type == EvaluationRecorded.TYPE)
    if any(entry.type == DataBound.TYPE and entry.run in private for entry in then):
        yield "The digests of private data are sealed; the weights speak for them."
    if any(entry.type == WeightsSaved.TYPE for entry in then):
        yield "The digests of saved folders hold times and paths; the weights are compared as they were in memory."
    if any(isinstance(event, EvaluationRecorded) and None in event.metrics.values() for event in evaluations):
        yield "The figures of evaluations on protected data are sealed."


# --- environments ----------------------------------------------------------------------------------------------------


def _compare_environments(
    then: Sequence[tuple[str, list[Entry]]],
    now: Sequence[tuple[str, list[Entry]]],
    generators: Sequence[Difference],
) -> EnvironmentsCompared:
    pairs = [
        (old, new)
        for (_, before), (_, after) in zip(then, now, strict=False)
        for old, new in [(environment_of(before), environment_of(after))]
        if old is not None and new is not None
    ]
    said = [sentence for old, new in pairs for sentence in (*compare_environments(old, new), *_further(old, new))]
    unique = tuple(dict.fromkeys(said))
    notes = [sentence for sentence in unique if sentence.startswith("A GPU")]
    if generators:
        named = ", ".join(sorted({"torch" if item.what == _STATE else item.what.split(".")[1] for item in generators}))
        notes.append(f"The generators of random numbers began from other states ({named}): nothing seeds them.")
    differs = tuple(sentence for sentence in unique if sentence not in notes)
    return EnvironmentsCompared(known=bool(pairs), differs=differs, notes=tuple(notes))


def _further(then: EnvironmentCaptured, now: EnvironmentCaptured) -> Iterator[str]:
    names = sorted({*then.packages, *now.packages} - {"*"})
    other = [name for name in names if then.packages.get(name) != now.packages.get(name)]
    if other:
        shown = ", ".join(
            f"{name} {then.packages.get(name, 'none')} -> {now.packages.get(name, 'none')}"
            for name in other[:_MOST_NAMED]
        )
        more = f" and {len(other) - _MOST_NAMED} more" if len(other) > _MOST_NAMED else ""
        yield f"Packages differ: {shown}{more}."
    elif then.packages_digest != now.packages_digest:
        yield "Packages of the same versions are other builds: the digests of their lists of files differ."
    if then.tool_digest != now.tool_digest:
        yield "This tool's own source is not what it was."
    if then.code is not None and now.code is not None:
        gone = sorted(set(then.code.files) - set(now.code.files))
        if gone:
            yield f"Local code was not found where it lay: {', '.join(gone[:_MOST_NAMED])}."
