"""What a record says, as flat facts that can be laid side by side. Floor 3.

Pure: a verified record's entries go in, `RecordFacts` come out: each fact under its section, its run and its place,
such as ``privacy``, ``policy``, ``noise_multiplier``. What differs between any two executions of one notebook (ids,
clocks, folders that hold times) is marked as `Fact.expected`; what lies in the vault is marked as `Fact.sealed` and has
no value. `SHOWN` says for every kind of entry where its fields go; `NOT_SHOWN` why a kind has no place here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from rlhf_audit_nb.events import (
    BaseComputeDeclared,
    CellAudited,
    CellExecuted,
    CheckpointRecorded,
    CodeBound,
    ComputeRecorded,
    DataBound,
    DataRead,
    EnvironmentCaptured,
    EvaluationRecorded,
    Event,
    FunctionBound,
    MetricsLogged,
    ModelBound,
    PrivacyAudited,
    PrivacyEngine,
    PrivacyInherited,
    PrivacyReserved,
    PrivacySettled,
    PublicDeclared,
    RankReported,
    RanksFormed,
    RecordSealed,
    RecordStarted,
    ReferenceUsed,
    RunFailure,
    RunFinished,
    RunInterrupted,
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
from rlhf_audit_nb.records.comparison import NOT_COMPARED, is_timing
from rlhf_audit_nb.trail.entry import decode_envelope

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.entry import Entry

__all__ = ["NOT_SHOWN", "SECTIONS", "SHOWN", "Fact", "Key", "RecordFacts", "Series", "Shown", "facts_of"]

SECTIONS: Mapping[str, str] = MappingProxyType(
    {
        "verification": "Verification and signatures",
        "outcome": "Outcome",
        "parameters": "Parameters",
        "code": "Code",
        "outputs": "Outputs",
        "runs": "Runs",
        "data": "Data",
        "models": "Models",
        "settings": "Training settings",
        "privacy": "Privacy",
        "metrics": "Metrics",
        "evaluations": "Evaluations and thresholds",
        "weights": "Weights",
        "compute": "Compute",
        "environment": "Environment",
    }
)
"""The sections of a comparison in their order, with their titles."""

Key = tuple[str, str, str]
"""Section, run (empty outside of one), place."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing that a record says.

    Attributes:
        value: as plain JSON; ``None`` where it is sealed.
        sealed: it lies in the vault.
        expected: two executions of one notebook differ in it.
        token: what tells that a sealed thing is the very same one (the commitment to it, a name on one trail).
    """

    value: Any = None
    sealed: bool = False
    expected: bool = False
    token: str | None = None


@dataclass(frozen=True, kw_only=True)
class Series:
    """The values of one name over the steps of a run, in their order.

    ``replayed``: the noise of the run was drawn from a seed that was known beforehand, as a replay's is.
    """

    name: str
    points: tuple[tuple[int, Any], ...]
    private: bool = False
    replayed: bool = False


@dataclass
class RecordFacts:
    """All that a record says, flat.

    Attributes:
        facts: by section, run and place, in the order of the entries.
        series: by run and name.
        sealed: section, run and beginning of a place under which there may be more, which is sealed.
        runs: the labels of the runs in their order, each with the run's id.
    """

    facts: dict[Key, Fact] = field(default_factory=dict)
    series: dict[tuple[str, str], Series] = field(default_factory=dict)
    sealed: dict[Key, str] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Where the fields of a kind of entry go.

    Attributes:
        section: the section.
        prefix: what stands before the field's name; ``{role}`` and other fields are filled in.
        left_out: fields that say nothing of the execution (ids within the trail) or are told elsewhere.
        expected: fields in which two executions of one notebook differ.
        flat: maps whose keys stand for themselves, without the field's name before them.
        moved: fields that go to another section.
    """

    section: str
    prefix: str = ""
    left_out: frozenset[str] = frozenset()
    expected: frozenset[str] = frozenset()
    flat: frozenset[str] = frozenset()
    moved: Mapping[str, str] = field(default_factory=dict)


def _names(*names: str) -> frozenset[str]:
    return frozenset(names)


SHOWN: Mapping[type[Event], Shown] = MappingProxyType(
    {
        RecordStarted: Shown(
            section="environment", left_out=_names("record", "notebook_digest", "parameters"), flat=_names()
        ),
        RunStarted: Shown(
            section="settings",
            left_out=_names("record", "parent", "cell_digest"),
            moved={"privacy": "privacy", "tool": "environment", "declared_model": "models"},
        ),
        EnvironmentCaptured: Shown(section="environment"),
        CodeBound: Shown(section="environment", prefix="imported later."),
        RanksFormed: Shown(section="settings", prefix="processes."),
        RankReported: Shown(
            section="compute",
            prefix="rank {rank}.",
            left_out=_names("rank", "world_size", "entries"),
            expected=_names("heard", "peak_memory_bytes", "peak_device_memory_bytes", "seconds", "more"),
        ),
        TrainerAttached: Shown(section="settings", flat=_names("hyperparameters", "defaults")),
        RunResumed: Shown(
            section="settings",
            prefix="resumed.",
            left_out=_names("from_run", "entry"),
            expected=_names("checkpoint"),
        ),
        DataBound: Shown(section="data", prefix="{role}.", left_out=_names("role"), expected=_names("fingerprint")),
        DataRead: Shown(section="data", prefix="{role} stream.", left_out=_names("role")),
        ModelBound: Shown(section="models", prefix="{role}.", left_out=_names("role")),
        FunctionBound: Shown(section="models", prefix="{role} {position}.", left_out=_names("role", "position")),
        ReferenceUsed: Shown(section="models", prefix="{role} used.", left_out=_names("role")),
        PrivacyReserved: Shown(section="privacy", left_out=_names("reservation")),
        PrivacyEngine: Shown(section="privacy", prefix="instead.", left_out=_names("reservation")),
        PrivacyInherited: Shown(section="privacy", prefix="inherited.", left_out=_names("sources")),
        PrivacySettled: Shown(section="privacy", prefix="spent.", left_out=_names("reservation")),
        PrivacyAudited: Shown(section="privacy", prefix="canaries.", left_out=_names("reservation")),
        PublicDeclared: Shown(section="privacy", prefix="declared {kind} {name}.", left_out=_names("kind", "name")),
        CheckpointRecorded: Shown(
            section="weights", prefix="checkpoint at step {step}.", expected=_names("folder_digest")
        ),
        WeightsSaved: Shown(
            section="weights",
            prefix="saved {name}.",
            left_out=_names("name"),
            expected=_names("digest", "bytes", "signature_digest", "listed"),
        ),
        ComputeRecorded: Shown(section="compute", expected=_names("seconds", "energy")),
        BaseComputeDeclared: Shown(section="compute", prefix="declared {model}.", left_out=_names("model")),
        ThresholdSealed: Shown(
            section="evaluations",
            prefix="threshold {metric} {relation}{on}.",
            left_out=_names("record", "metric", "relation", "data_name"),
        ),
        EvaluationRecorded: Shown(
            section="evaluations",
            prefix="evaluation{on}.",
            left_out=_names("record", "data_public", "data_name"),
            expected=_names("folder_digest", "stated_digest"),
        ),
        RunFailure: Shown(section="outcome", prefix="failure.", left_out=_names("omitted")),
        RunFinished: Shown(section="outcome", prefix="run.", expected=_names("overhead")),
        RunInterrupted: Shown(section="outcome", prefix="interrupted.", left_out=_names("run")),
        RecordSealed: Shown(section="outcome", left_out=_names("record", "digest", "keys", "cell")),
        # These have a walk of their own: numbers over steps, and the cells that did not end well.
        Step: Shown(section="metrics"),
        SamplesDrawn: Shown(section="metrics", prefix="samples.", left_out=_names("draw", "part", "parts", "first")),
        TrainerLogged: Shown(section="metrics", prefix="logged."),
        MetricsLogged: Shown(section="metrics", prefix="handed in."),
        CellExecuted: Shown(section="outcome"),
    }
)
"""Where each kind of entry is shown."""

NOT_SHOWN: Mapping[type[Event], str] = MappingProxyType(
    {CellAudited: "the cells are compared as cells"}
    | {kind: reason for kind, reason in NOT_COMPARED.items() if kind not in SHOWN}
)
"""The kinds of entries that are not shown, and why."""

_SERIES = (Step, SamplesDrawn, TrainerLogged, MetricsLogged)
_STEP_NUMBERS = ("learning_rate", "epsilon", "gradient_norm", "update_norm", "weights_digest", "batch_digest")
_MEASURED = ("evaluations", "compute", "weights")
_OF_THE_RECORD = "variables.RLHF_AUDIT_RECORD"
_REPLAYED = "known beforehand"


def facts_of(entries: Iterable[Entry]) -> RecordFacts:
    """The facts in a record's entries, which must be proven: nothing is verified here."""
    reading = _Reading()
    for entry in entries:
        reading.read(entry)
    return reading.finish()


class _Reading:
    """One pass over the entries of a record."""

    def __init__(self) -> None:
        self._told = RecordFacts()
        self._labels: dict[str, str] = {}
        self._seen: dict[Key, int] = {}
        self._points: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        self._private: set[str] = set()
        self._replayed: set[str] = set()
        self._raised: list[str] = []

    def read(self, entry: Entry) -> None:
        """Take in one entry."""
        event = decode_body(entry.type, entry.body)
        if isinstance(event, RunStarted) and entry.run:
            self._begin(entry.run, event)
        run = self._labels.get(entry.run or getattr(event, "run", "") or "", "")
        if type(event) in NOT_SHOWN:
            return
        if isinstance(event, PrivacyReserved):
            self._private.add(run)
            if _REPLAYED in event.generator:
                self._replayed.add(run)
        sealed = decode_envelope(entry.data).sealed
        if isinstance(event, _SERIES):
            self._series(run, event, sealed)
        elif isinstance(event, CellExecuted):
            if event.status != "ok":
                self._raised.append(f"cell {event.position + 1}: {event.status}")
        else:
            self._fields(run, event, sealed)

    def finish(self) -> RecordFacts:
        """What was taken in."""
        told = self._told
        for (run, name), points in self._points.items():
            told.series[run, name] = Series(
                name=name, points=tuple(points), private=run in self._private, replayed=run in self._replayed
            )
        told.facts["outcome", "", "cells that did not end well"] = Fact(value=self._raised)
        return told

    def _begin(self, run: str, started: RunStarted) -> None:
        same = sum(label.split(" #")[0] == started.experiment for label in self._told.runs)
        label = started.experiment + (f" #{same + 1}" if same else "")
        self._labels[run] = label
        self._told.runs[label] = run

    def _series(self, run: str, event: Event, sealed: str | None) -> None:
        prefix = SHOWN[type(event)].prefix
        plain = msgspec.to_builtins(event)
        if isinstance(event, Step):
            numbers = plain["metrics"] | {name: plain[name] for name in _STEP_NUMBERS if plain[name] is not None}
            if sealed is not None:
                self._told.sealed.setdefault(("metrics", run, ""), sealed)
            if "evaluation" in event.notes:
                prefix = "evaluation."
        elif isinstance(event, SamplesDrawn):
            numbers = plain["statistics"] | {name: plain[name] for name in ("samples", "group_means") if plain[name]}
        else:
            numbers = plain["metrics"]
        step = plain.get("step")
        for name, value in numbers.items():
            self._points.setdefault((run, prefix + name), []).append((-1 if step is None else step, value))

    def _fields(self, run: str, event: Event, sealed: str | None) -> None:
        shown = SHOWN[type(event)]
        plain = msgspec.to_builtins(event)
        prefix = self._prefix(run, event, shown, plain)
        if isinstance(event, RecordStarted):
            for name, value in plain["parameters"].items():
                self._put("parameters", run, name, Fact(value=value))
        private = _private_fields(event, plain) if sealed is not None else frozenset()
        for name, value in plain.items():
            if name in shown.left_out:
                continue
            section = shown.moved.get(name, _section(event, shown))
            start = prefix + ("asked." if name == "privacy" else f"{name}.")
            expected = name in shown.expected
            if name in private:
                self._seal(section, run, prefix + name, value, sealed, expected=expected)
            elif isinstance(value, dict):
                start = prefix if name in shown.flat else start
                for place, item in _flat(value):
                    self._put(section, run, start + place, _fact(section, start + place, item, expected=expected))
            elif name == "population" and value is not None:
                self._put(section, run, prefix + name, Fact(sealed=True, token=str(value)))
            elif value is not None:
                self._put(section, run, prefix + name, _fact(section, prefix + name, value, expected=expected))

    def _prefix(self, run: str, event: Event, shown: Shown, plain: dict[str, Any]) -> str:
        prefix = shown.prefix.format(**{**plain, "on": f" on {plain['data_name']}" if plain.get("data_name") else ""})
        section = _section(event, shown)
        number = self._seen[section, run, event.TYPE + prefix] = (
            self._seen.get((section, run, event.TYPE + prefix), 0) + 1
        )
        return prefix if number == 1 else f"{prefix}#{number} "

    def _seal(self, section: str, run: str, place: str, value: Any, sealed: str | None, *, expected: bool) -> None:
        for name in value if isinstance(value, dict) else ():
            self._put(section, run, f"{place}.{name}", Fact(sealed=True, expected=expected, token=sealed))
        if not expected and sealed is not None:
            self._told.sealed[section, run, f"{place}."] = sealed
        if not isinstance(value, dict):
            self._put(section, run, place, Fact(sealed=True, expected=expected, token=sealed))

    def _put(self, section: str, run: str, place: str, fact: Fact) -> None:
        self._told.facts[section, run, place] = fact


def _fact(section: str, place: str, value: Any, *, expected: bool) -> Fact:
    clocked = section in _MEASURED and is_timing(place)
    return Fact(value=value, expected=expected or clocked or place == _OF_THE_RECORD)


def _section(event: Event, shown: Shown) -> str:
    return "weights" if isinstance(event, ModelBound) and event.role == "final" else shown.section


def _private_fields(event: Event, plain: dict[str, Any]) -> frozenset[str]:
    """The fields that an entry has for what lies in its private half: empty in the open."""
    private = type(event).PRIVATE
    if private is None:
        return frozenset()
    return frozenset(
        name
        for name in private.__struct_fields__
        if name in plain and (not plain[name] or (isinstance(plain[name], dict) and not any(_known(plain[name]))))
    )


def _known(values: Mapping[str, Any]) -> Iterator[bool]:
    return (value is not None for value in values.values())


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A map's leaves by their dotted names; a list of named files as its files."""
    for name, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flat(item, f"{prefix}{name}.")
        elif name == "files" and isinstance(item, list):
            for file in item:
                yield f"{prefix}file {file['name']}", file["digest"]
        elif item is not None and item != {}:
            yield prefix + name, item
