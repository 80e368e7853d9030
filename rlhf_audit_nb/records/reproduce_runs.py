"""The runs of a record beside those of its reproduction, number by number. Floor 3.

Pure: entries go in, `RunsCompared` comes out. A public run is compared in everything that must come out the same where
code, data, parameters and software are the same: data and models by their digests, the settings, every recorded number
and weights digest, how it ended. A private one is compared as `comparison` does it, bit for bit and without values of
its steps; a tolerance never holds for it.

Not compared: identifiers, measured times, the digests of saved folders (which hold times and paths), the states of
random generators (a cause and no result), and what a version of this tool may say in another way.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from rlhf_audit_nb.events import (
    CheckpointRecorded,
    DataBound,
    DataRead,
    EnvironmentCaptured,
    EvaluationRecorded,
    Event,
    FunctionBound,
    MetricsLogged,
    ModelBound,
    PrivacyInherited,
    PrivacyReserved,
    ReferenceUsed,
    RunFinished,
    RunResumed,
    RunStarted,
    SamplesDrawn,
    Step,
    ThresholdSealed,
    TrainerAttached,
    TrainerLogged,
    WeightsSaved,
    decode_body,
)
from rlhf_audit_nb.records.comparison import compare_environments, compare_runs
from rlhf_audit_nb.records.normalising import numbers_close

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.entry import Entry

__all__ = ["PARTS", "EnvironmentsCompared", "Found", "RunsCompared", "Tolerance", "compare_all_runs", "runs_of"]

PARTS = ("data", "models", "settings", "metrics", "weights", "evaluations", "private", "outputs", "outcome")
"""What is compared, in the order in which it is told."""

_LEFT_OUT: dict[type[Event], tuple[str, ...]] = {
    RunStarted: ("tool", "record", "entry_point", "cell_digest", "compliance_mode", "parent"),
    TrainerAttached: ("generators",),
    DataBound: ("provenance", "source", "fingerprint", "revision", "files"),
    DataRead: (),
    ModelBound: ("name", "revision", "files", "generation_digest", "chat_template_digest", "quantization"),
    FunctionBound: ("code_digest", "not_covered"),
    ReferenceUsed: (),
    RunResumed: ("checkpoint", "from_run", "entry"),
    PrivacyInherited: ("sources", "note"),
    Step: ("epsilon", "notes"),
    MetricsLogged: (),
    TrainerLogged: (),
    SamplesDrawn: (),
    CheckpointRecorded: ("folder_digest",),
    WeightsSaved: ("digest", "files", "bytes", "signature_digest", "listed"),
    RunFinished: ("overhead",),
}
_OF_RECORD: dict[type[Event], tuple[str, ...]] = {
    ThresholdSealed: ("record", "reason", "by"),
    EvaluationRecorded: ("record", "data_public", "folder_digest", "evaluator"),
}
_PART: dict[type[Event], str] = {
    DataBound: "data",
    DataRead: "data",
    ModelBound: "models",
    Step: "metrics",
    MetricsLogged: "metrics",
    TrainerLogged: "metrics",
    SamplesDrawn: "metrics",
    CheckpointRecorded: "metrics",
    WeightsSaved: "weights",
    RunFinished: "outcome",
    ThresholdSealed: "evaluations",
    EvaluationRecorded: "evaluations",
}
_TIMES = re.compile(r"(?:^|[_/])(?:runtime|\w+_per_second|seconds|time|duration)(?:_|$)")
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
        compared: values that were compared, by part.
        found: what is not as it was, in the order of the record's entries.
        times: metrics that are measured times and were left out.
        not_compared: what could not be compared, as sentences.
        environment: where both ran.
    """

    compared: Counter[str] = field(default_factory=Counter)
    found: list[Found] = field(default_factory=list)
    times: int = 0
    not_compared: list[str] = field(default_factory=list)
    environment: EnvironmentsCompared = field(default_factory=EnvironmentsCompared)


def runs_of(entries: Iterable[Entry]) -> list[tuple[str, list[Entry]]]:
    """The runs among ``entries`` in their order, each with its entries."""
    runs: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.run:
            runs.setdefault(entry.run, []).append(entry)
    return list(runs.items())


def compare_all_runs(then: Sequence[Entry], now: Sequence[Entry], tolerance: Tolerance) -> RunsCompared:
    """Compare the runs and evaluations of a record with those of its reproduction.

    Args:
        then: the record's entries.
        now: all entries of the scratch trail.
        tolerance: what may differ in public runs.
    """
    result = RunsCompared()
    before, after = runs_of(then), runs_of(now)
    for place, (run, entries) in enumerate(before):
        where = f"run {place + 1} ({run[:8]})"
        if place >= len(after):
            result.compared["outcome"] += 1
            result.found.append(Found(part="outcome", place=f"{where}: is missing in the reproduction"))
        elif is_private(entries):
            _compare_private(result, where, (run, entries), after[place])
        else:
            _compare_public(result, where, entries, after[place][1], tolerance)
    for place in range(len(before), len(after)):
        result.found.append(Found(part="outcome", place=f"run {place + 1}: was not there before"))
    _compare_kinds(result, "the record", then, now, _OF_RECORD, tolerance)
    _tell_what_is_sealed(result, then)
    result.environment = _compare_environments(before, after)
    return result


def is_private(entries: Iterable[Entry]) -> bool:
    """Whether a run's entries reserve privacy budget."""
    return any(entry.type == PrivacyReserved.TYPE for entry in entries)


# --- private runs ----------------------------------------------------------------------------------------------------


def _compare_private(
    result: RunsCompared, where: str, then: tuple[str, list[Entry]], now: tuple[str, list[Entry]]
) -> None:
    if not is_private(now[1]):
        result.found.append(Found(part="private", place=f"{where}: it reserved no privacy budget in the reproduction"))
        return
    compared = compare_runs([then], [now])
    result.compared["private"] += compared.trainings + compared.steps + compared.digests
    for difference in compared.differences:
        at = f" (entry {difference.entry})" if difference.entry is not None else ""
        result.found.append(
            Found(
                part="private",
                place=f"{where}: {difference.where}: {difference.what}{at}",
                expected=difference.expected,
                found=difference.found,
            )
        )


def _tell_what_is_sealed(result: RunsCompared, then: Sequence[Entry]) -> None:
    private = {run for run, entries in runs_of(then) if is_private(entries)}
    data = sum(entry.type == DataBound.TYPE and entry.run in private for entry in then)
    folders = sum(entry.type == WeightsSaved.TYPE for entry in then)
    sealed = sum(
        isinstance(event, EvaluationRecorded) and None in event.metrics.values()
        for event in (decode_body(entry.type, entry.body) for entry in then if entry.type == EvaluationRecorded.TYPE)
    )
    if data:
        result.not_compared.append("The digests of private data are sealed; the weights speak for them.")
    if folders:
        result.not_compared.append(
            "The digests of saved folders hold times and paths; the weights in memory are compared."
        )
    if sealed:
        result.not_compared.append("The figures of evaluations on protected data are sealed.")


# --- public runs -----------------------------------------------------------------------------------------------------


def _compare_public(
    result: RunsCompared, where: str, then: Sequence[Entry], now: Sequence[Entry], tolerance: Tolerance
) -> None:
    at = len(result.found)
    _compare_kinds(result, where, then, now, _LEFT_OUT, tolerance)
    # Kind by kind they were compared, and in the order of the entries they are told: the cause goes before the effect.
    told = sorted(result.found[at:], key=lambda item: _entry_of(item.place))
    result.found[at:] = told


def _entry_of(place: str) -> int:
    found = re.search(r"\(entry (\d+)\)$", place)
    return int(found[1]) if found else 1 << 62


def _compare_kinds(
    result: RunsCompared,
    where: str,
    then: Sequence[Entry],
    now: Sequence[Entry],
    kinds: dict[type[Event], tuple[str, ...]],
    tolerance: Tolerance,
) -> None:
    for kind, left_out in kinds.items():
        before = [entry for entry in then if entry.type == kind.TYPE]
        after = [entry for entry in now if entry.type == kind.TYPE]
        for place, entry in enumerate(before):
            event = decode_body(entry.type, entry.body)
            named = f"{where}: {_named(event)}"
            if place >= len(after):
                result.compared[_PART.get(kind, "settings")] += 1
                missing = f"{named}: is missing in the reproduction (entry {entry.index})"
                result.found.append(Found(part=_PART.get(kind, "settings"), place=missing))
                continue
            other = decode_body(after[place].type, after[place].body)
            _compare_fields(result, named, entry.index, (event, other), left_out, tolerance)
        for entry in after[len(before) :]:
            named = f"{where}: {_named(decode_body(entry.type, entry.body))}"
            result.found.append(Found(part=_PART.get(kind, "settings"), place=f"{named}: was not there before"))


def _named(event: Event) -> str:
    if isinstance(event, Step):
        return f"step {event.step}"
    if isinstance(event, ModelBound):
        return f"{event.role} model"
    return event.TYPE


def _compare_fields(
    result: RunsCompared,
    named: str,
    index: int,
    events: tuple[Event, Event],
    left_out: tuple[str, ...],
    tolerance: Tolerance,
) -> None:
    then, now = (dict(_flat(msgspec.to_builtins(event), left_out)) for event in events)
    for name in [*then, *(name for name in now if name not in then)]:
        if "." in name and _TIMES.search(name.partition(".")[2]):
            result.times += name in then
            continue
        part = _part_of(events[0], name)
        before, after = then.get(name), now.get(name)
        if before is None and after is None:
            continue
        result.compared[part] += 1
        if before == after:
            continue
        place = f"{named}: {name} (entry {index})"
        tolerated = _is_tolerated(part, before, after, tolerance)
        result.found.append(Found(part=part, place=place, expected=before, found=after, tolerated=tolerated))


def _flat(body: dict[str, Any], left_out: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The fields, each number of a map or a list of numbers by a name of its own."""
    for name, value in body.items():
        if name in left_out:
            continue
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", item) for key, item in value.items())
        elif name in ("group_means", "group_deviations"):
            yield from ((f"{name}.{place}", item) for place, item in enumerate(value))
        else:
            yield name, value


def _part_of(event: Event, name: str) -> str:
    if name == "weights_digest" and (not isinstance(event, ModelBound) or event.role == "final"):
        return "weights"
    if name == "batch_digest":
        return "data"
    return _PART.get(type(event), "settings")


def _is_tolerated(part: str, then: Any, now: Any, tolerance: Tolerance) -> bool:
    if part == "weights":
        return tolerance.weights and isinstance(then, str) and isinstance(now, str)
    if part not in ("metrics", "evaluations") or tolerance.metrics is None:
        return False
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (then, now))
    return numbers and numbers_close(then, now, tolerance.metrics)


# --- environments ----------------------------------------------------------------------------------------------------


def _compare_environments(
    then: list[tuple[str, list[Entry]]], now: list[tuple[str, list[Entry]]]
) -> EnvironmentsCompared:
    pairs = [
        (old, new)
        for (_, before), (_, after) in zip(then, now, strict=False)
        for old, new in [(_environment(before), _environment(after))]
        if old is not None and new is not None
    ]
    said = [sentence for old, new in pairs for sentence in (*compare_environments(old, new), *_further(old, new))]
    unique = tuple(dict.fromkeys(said))
    notes = tuple(sentence for sentence in unique if sentence.startswith("A GPU"))
    differs = tuple(sentence for sentence in unique if sentence not in notes)
    return EnvironmentsCompared(known=bool(pairs), differs=differs, notes=notes)


def _environment(entries: Iterable[Entry]) -> EnvironmentCaptured | None:
    for entry in entries:
        if entry.type == EnvironmentCaptured.TYPE:
            event = decode_body(entry.type, entry.body)
            return event if isinstance(event, EnvironmentCaptured) else None
    return None


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
        changed = sorted(path for path in then.code.files if now.code.files.get(path, "") != then.code.files[path])
        if changed:
            gone = all(path not in now.code.files for path in changed)
            what = "was not found where it lay" if gone else "is not what it was"
            yield f"Local code {what}: {', '.join(changed[:_MOST_NAMED])}."
