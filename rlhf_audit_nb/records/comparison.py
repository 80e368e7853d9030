"""Two runs side by side: whether a replay or a reproduction repeated the runs that it repeats. Floor 3.

Pure: entries go in, a `Comparison` comes out. `COMPARED` says of every kind of entry that tells of a training which
fields are left out, and why; all its others must be equal, floating-point numbers bit for bit. `NOT_COMPARED` says of
every other kind why it is not compared at all. A kind of entry that stands in neither is a mistake that a test finds.

Entries of one kind are compared in their order within each training, whatever came between them. Numbers that a clock
gave (`is_timing`) are never compared. Where an earlier version of this tool made the first of the two, what that
version did not record is not compared, and `Comparison.unknown` names it.

In a run under differential privacy a difference of anything that came out of the training names the place and no
value: with the noise being the same, the difference of two values would show what the noise had covered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from rlhf_audit_nb.events import (
    AnnotationRecorded,
    AnnotationsImported,
    AnnotatorReidentified,
    AnnotatorsTabulated,
    BaseComputeDeclared,
    BudgetSet,
    CardCreated,
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
    GateDecided,
    KeyRevoked,
    KeyRotated,
    LabelsReleased,
    LabelsWritten,
    MetricsLogged,
    ModelBound,
    PopulationKey,
    PrivacyAudited,
    PrivacyChecked,
    PrivacyEngine,
    PrivacyInherited,
    PrivacyPopulation,
    PrivacyReserved,
    PrivacySettled,
    PublicDeclared,
    RankReported,
    RanksFormed,
    RecordAttested,
    RecordReproduced,
    RecordSealed,
    RecordStarted,
    ReferenceUsed,
    ReplayStarted,
    ReportCreated,
    RunFailure,
    RunFinished,
    RunInterrupted,
    RunResumed,
    RunStarted,
    SamplesDrawn,
    SlotsReleased,
    SlotsReserved,
    Step,
    SweepFinished,
    SweepStarted,
    ThresholdSealed,
    TrailCreated,
    TrainerAttached,
    TrainerLogged,
    VaultErased,
    WeightsSaved,
    decode_body,
)

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import Entry

__all__ = [
    "COMPARED",
    "NOT_COMPARED",
    "Comparison",
    "Difference",
    "compare_environments",
    "compare_runs",
    "is_timing",
    "private_runs",
    "recorded_runs",
]

_CLOCK = "a clock gave it"
_PLACE = "it says where something lay or what it was called there"
_TRAIL = "it points into the trail that it stands on"
_LEDGER = "it follows from what the ledger held before"
_MACHINE = "it is of the machine, which is compared as the environment"
_TOOL = "it says how the run was opened, not what it did"
_SAVED = "a saved folder holds times and paths; the weights themselves are compared as they were in memory"
_FRONT_END = "the front end or what else the kernel and the trail knew decides it; the cells are compared as cells"

COMPARED: Mapping[type[Event], Mapping[str, str]] = MappingProxyType(
    {
        RunStarted: {
            "tool": _TOOL,
            "record": _TRAIL,
            "entry_point": _TOOL,
            "cell_digest": _FRONT_END,
            "compliance_mode": _TOOL,
            "parent": _TRAIL,
        },
        CellAudited: {
            "cell": _FRONT_END,
            "execution_count": _FRONT_END,
            "seen": _FRONT_END,
            "seen_in": _TRAIL,
            "audited_before": _FRONT_END,
            "executed": _FRONT_END,
            "executed_total": _FRONT_END,
            "executed_digest": _FRONT_END,
        },
        RanksFormed: {"launcher": _MACHINE},
        TrainerAttached: {},
        RunResumed: {"checkpoint": _SAVED, "from_run": _TRAIL, "entry": _TRAIL},
        DataBound: {
            "provenance": _PLACE,
            "source": _PLACE,
            "fingerprint": "it depends on how the rows were cached; their own digest is compared",
            "revision": _PLACE,
            "files": _PLACE,
        },
        DataRead: {},
        ModelBound: {"name": _PLACE, "revision": _PLACE, "files": _PLACE},
        FunctionBound: {"code_digest": "it holds for one version of Python; the source's is compared"},
        ReferenceUsed: {},
        PrivacyReserved: {
            "reservation": _TRAIL,
            "generator": "a replay draws from an opened seed and says so",
            "epsilon_budget": _LEDGER,
            "epsilon_before": _LEDGER,
            "epsilon_planned": _LEDGER,
            "accountants": _LEDGER,
            "population": _TRAIL,
            "slot": _TRAIL,
        },
        PrivacyEngine: {"reservation": _TRAIL, "reason": _MACHINE},
        PrivacyInherited: {"sources": _TRAIL, "epsilon": _LEDGER},
        Step: {"epsilon": _LEDGER},
        SamplesDrawn: {},
        TrainerLogged: {},
        MetricsLogged: {},
        CheckpointRecorded: {"folder_digest": _SAVED},
        PrivacySettled: {"reservation": _TRAIL, "epsilon_run": _LEDGER, "epsilon_total": _LEDGER},
        PrivacyAudited: {"reservation": _TRAIL, "epsilon_claimed": _LEDGER},
        ComputeRecorded: {
            "device": _MACHINE,
            "devices": _MACHINE,
            "seconds": _CLOCK,
            "energy": "a counter of the machine gave it",
            "notes": _MACHINE,
        },
        RankReported: {
            "heard": _CLOCK,
            "node": _MACHINE,
            "local_rank": _MACHINE,
            "device": _MACHINE,
            "hardware": _MACHINE,
            "differs": _MACHINE,
            "entries": "the entries themselves are compared",
            "peak_memory_bytes": _MACHINE,
            "peak_device_memory_bytes": _MACHINE,
            "seconds": _CLOCK,
            "more": _CLOCK,
        },
        ThresholdSealed: {"record": _TRAIL},
        EvaluationRecorded: {"record": _TRAIL, "data_public": _TRAIL, "folder_digest": _SAVED, "stated_digest": _SAVED},
        RunFailure: {},
        RunFinished: {"overhead": _CLOCK},
    }
)
"""The kinds of entries that are compared; of each the fields that are not, and why."""

_PEOPLE = "what people said is not repeated by running a notebook"
_NOTEBOOK = "it is of the notebook around the runs, which is compared as a notebook"
_LEDGERS = "it is of the ledger and its populations, not of a training"
_TRAILS = "it is of the trail itself"
_SWEEPS = "it is of a sweep, whose runs are records of their own"

NOT_COMPARED: Mapping[type[Event], str] = MappingProxyType(
    {
        EnvironmentCaptured: "what differs in it is told apart (`compare_environments`)",
        CodeBound: "local source files are told with the environment (`compare_environments`)",
        WeightsSaved: _SAVED,
        RunInterrupted: "the trail says it of a run that it found open; such a run has no run.finished, which is told",
        ReplayStarted: "it marks the trail of a replay",
        BaseComputeDeclared: _PEOPLE,
        PublicDeclared: _PEOPLE,
        AnnotationsImported: _PEOPLE,
        AnnotationRecorded: _PEOPLE,
        AnnotatorsTabulated: _PEOPLE,
        AnnotatorReidentified: _PEOPLE,
        RecordAttested: _PEOPLE,
        RecordStarted: _NOTEBOOK,
        CellExecuted: _NOTEBOOK,
        RecordSealed: _NOTEBOOK,
        RecordReproduced: _NOTEBOOK,
        ReportCreated: _NOTEBOOK,
        CardCreated: _NOTEBOOK,
        PrivacyPopulation: _LEDGERS,
        PopulationKey: _LEDGERS,
        PrivacyChecked: _LEDGERS,
        LabelsReleased: _LEDGERS,
        LabelsWritten: _LEDGERS,
        BudgetSet: _LEDGERS,
        SlotsReserved: _LEDGERS,
        SlotsReleased: _LEDGERS,
        SweepStarted: _SWEEPS,
        SweepFinished: _SWEEPS,
        GateDecided: "it says what was decided of a finished model",
        TrailCreated: _TRAILS,
        KeyRotated: _TRAILS,
        KeyRevoked: _TRAILS,
        VaultErased: _TRAILS,
    }
)
"""The kinds of entries that are not compared, and why."""

_BEFORE_TRAINING = (
    RunStarted,
    CellAudited,
    RanksFormed,
    TrainerAttached,
    RunResumed,
    DataBound,
    FunctionBound,
    ReferenceUsed,
    PrivacyReserved,
    PrivacyEngine,
    PrivacyInherited,
    PrivacySettled,
    ThresholdSealed,
    RunFailure,
    RunFinished,
)
"""Kinds whose values tell nothing of private data: settings, and how it ended, which stand in the open anyway."""

_MAX = 50
_TIMING = re.compile(
    r"(^|[/_ ])(run)?time($|[/_ ])|(^|[/_ ])(runtime|seconds|elapsed|duration|mfu|tps)$|per_sec(ond)?$|^profiling/"
)


def is_timing(name: str) -> bool:
    """Whether a metric of this name comes from a clock (``eval_runtime``, ``step_time``, ``tokens_per_second``)."""
    return _TIMING.search(name.lower()) is not None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing that is not as it was.

    Attributes:
        run: the run that was replayed.
        entry: the entry of that run that says otherwise; ``None`` where it has none.
        where: the kind of entry, such as ``privacy.reserved``, or ``step 3``.
        what: the field.
        expected: its value then, where showing it tells nothing of the data.
        found: its value in the replay, likewise.
        step: the optimizer step, where it is one's.
    """

    run: str
    entry: int | None
    where: str
    what: str
    expected: Any = None
    found: Any = None
    step: int | None = None

    def __str__(self) -> str:
        at = f" (entry {self.entry})" if self.entry is not None else ""
        values = f": {self.expected!r} then, {self.found!r} now" if self.expected != self.found else ""
        return f"{self.where}: {self.what}{at}{values}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two runs were compared in and where they differ.

    Attributes:
        differences: in the order of the replayed runs' entries.
        trainings: private trainings compared.
        steps: steps whose recorded numbers were compared.
        digests: weights digests that were compared, final ones included.
        runs: runs that were compared.
        compared: entries that were compared.
        unknown: what the earlier version of the tool did not record, as ``kind`` or ``kind.field``.
    """

    differences: tuple[Difference, ...]
    trainings: int
    steps: int
    digests: int
    runs: int = 0
    compared: int = 0
    unknown: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether everything compared is equal, and something was: of private trainings also a weights digest."""
        return not self.differences and self.compared > 0 and (self.digests > 0 or not self.trainings)

    @property
    def first(self) -> Difference | None:
        """The first difference."""
        return self.differences[0] if self.differences else None

    @property
    def first_step(self) -> int | None:
        """The first optimizer step that differs."""
        return next((item.step for item in self.differences if item.step is not None), None)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "equal": self.equal,
            "runs": self.runs,
            "trainings": self.trainings,
            "steps": self.steps,
            "digests": self.digests,
            "compared": self.compared,
            "unknown": list(self.unknown),
            "first_step": self.first_step,
            "differences": [asdict(item) for item in self.differences],
        }


Run = tuple[str, list["Entry"]]
Told = tuple[int, Event]
"""An entry's index, and its event."""
Place = tuple[str, int, str, int]
"""What an entry is compared with: its kind, the training of the run, its role, and its number among those."""


def recorded_runs(entries: Iterable[Entry]) -> list[Run]:
    """The runs among ``entries`` in their order, each with its entries.

    Thresholds and evaluations that were written outside of a run come last, under the run ``""``, where there are any.
    """
    runs: dict[str, list[Entry]] = {}
    outside: list[Entry] = []
    for entry in entries:
        if entry.run:
            runs.setdefault(entry.run, []).append(entry)
        elif entry.type in (ThresholdSealed.TYPE, EvaluationRecorded.TYPE):
            outside.append(entry)
    return [*runs.items(), *([("", outside)] if outside else [])]


def private_runs(entries: Iterable[Entry]) -> list[Run]:
    """The runs among ``entries`` that reserved privacy budget, in their order, each with its entries."""
    return [
        (run, found)
        for run, found in recorded_runs(entries)
        if run and any(entry.type == PrivacyReserved.TYPE for entry in found)
    ]


def compare_runs(expected: Sequence[Run], found: Sequence[Run], *, most: int | None = _MAX) -> Comparison:
    """Compare runs (`recorded_runs` or `private_runs`) with what their replay left, one by one in their order.

    ``most`` is how many differences are kept; ``None`` keeps all of them.
    """
    differences: list[Difference] = []
    unknown: set[str] = set()
    trainings = steps = digests = compared = 0
    # What is written outside of a run may be about a private one.
    private = any(entry.type == PrivacyReserved.TYPE for _, entries in (*expected, *found) for entry in entries)
    for place, (run, entries) in enumerate(expected):
        pair = _Pair(run, _events(entries), _events(found[place][1]) if place < len(found) else [], outside=private)
        differences += pair.compare()
        unknown |= pair.unknown
        events = [event for _, event in pair.then]
        compared += len(events)
        trainings += sum(isinstance(event, PrivacyReserved) for event in events)
        steps += sum(isinstance(event, Step) for event in events)
        digests += sum(isinstance(event, Step) and event.weights_digest is not None for event in events)
        digests += sum(isinstance(event, ModelBound) and event.role == "final" for event in events)
    differences += [
        Difference(run=run, entry=None, where="run", what="a run that was not there before")
        for run, _ in found[len(expected) :]
    ]
    return Comparison(
        differences=tuple(differences[:most]),
        trainings=trainings,
        steps=steps,
        digests=digests,
        runs=len(expected),
        compared=compared,
        unknown=tuple(sorted(unknown)),
    )


def _events(entries: Iterable[Entry]) -> list[Told]:
    kinds = {kind.TYPE for kind in COMPARED}
    return [(entry.index, decode_body(entry.type, entry.body)) for entry in entries if entry.type in kinds]


def _tool(told: Sequence[Told]) -> str | None:
    return next((event.tool for _, event in told if isinstance(event, RunStarted)), None)


def _placed(told: Sequence[Told]) -> dict[Place, Told]:
    """Each entry at what it is compared with."""
    placed: dict[Place, Told] = {}
    seen: dict[tuple[str, int, str], int] = {}
    training = 0
    for index, event in told:
        training += isinstance(event, TrainerAttached)
        # A shape of its own for each role: one that is missing must not put the others against each other.
        role = f"{getattr(event, 'role', '')}{getattr(event, 'rank', '')}"
        stream = (event.TYPE, training, role)
        number = seen[stream] = seen.get(stream, -1) + 1
        placed[(*stream, number)] = (index, event)
    return placed


class _Pair:
    """A run and its replay."""

    def __init__(self, run: str, then: list[Told], now: list[Told], *, outside: bool) -> None:
        self._run = run
        self.then = then
        self._now = now
        self._private = outside if not run else any(isinstance(event, PrivacyReserved) for _, event in (*then, *now))
        self._older = len({_tool(then), _tool(now), None}) > 2  # noqa: PLR2004  both say which version they are of
        self.unknown: set[str] = set()

    def compare(self) -> Iterator[Difference]:
        """Every difference, in the order of the run's entries; what is new in the replay comes last."""
        if self.then and not self._now:
            index, event = self.then[0]
            yield Difference(run=self._run, entry=index, where=_where(event), what="missing in the replay")
            return
        before, after = _placed(self.then), _placed(self._now)
        for place, (index, event) in before.items():
            other = after.get(place)
            if other is None:
                yield Difference(
                    run=self._run, entry=index, where=_where(event), what="missing in the replay", step=_step(event)
                )
            else:
                yield from self._compare_event(index, event, other[1])
        known = {event.TYPE for _, event in self.then}
        for place, (_, event) in after.items():
            if place in before:
                continue
            if self._older and event.TYPE not in known:
                self.unknown.add(event.TYPE)
                continue
            yield Difference(
                run=self._run, entry=None, where=_where(event), what="was not there before", step=_step(event)
            )

    def _compare_event(self, index: int, then: Event, now: Event) -> Iterator[Difference]:
        before, after = _values(then), _values(now)
        told = not self._private or isinstance(then, _BEFORE_TRAINING) or _is_start(then)
        for name in sorted({*before, *after}, key=[*before, *after].index):
            if before.get(name) == after.get(name) and (name in before) == (name in after):
                continue
            if self._older and self._is_unknown(then, name):
                continue
            yield Difference(
                run=self._run,
                entry=index,
                where=_where(then),
                what=name,
                expected=before.get(name) if told else None,
                found=after.get(name) if told else None,
                step=_step(then),
            )

    def _is_unknown(self, then: Event, name: str) -> bool:
        """Whether the earlier version may not have known this field: it stands at its default."""
        field = name.partition(".")[0]
        of = next(item for item in msgspec.structs.fields(then) if item.name == field)
        default = of.default_factory() if of.default_factory is not msgspec.NODEFAULT else of.default
        if default is msgspec.NODEFAULT or getattr(then, field) != default:
            return False
        self.unknown.add(f"{then.TYPE}.{field}")
        return True


def _values(event: Event) -> dict[str, Any]:
    """What is compared of an event, maps key by key (``metrics.loss``)."""
    left_out = COMPARED[type(event)]
    values: dict[str, Any] = {}
    for name, value in msgspec.to_builtins(event).items():
        if name in left_out:
            continue
        if not isinstance(value, dict):
            values[name] = value
        else:
            values |= {f"{name}.{key}": item for key, item in value.items() if not is_timing(key)}
    return values


def _is_start(event: Event) -> bool:
    return isinstance(event, ModelBound) and event.role != "final"


def _step(event: Event) -> int | None:
    return event.step if isinstance(event, Step) else None


def _where(event: Event) -> str:
    if isinstance(event, Step):
        return f"step {event.step}"
    if isinstance(event, ModelBound):
        return f"{event.role} model"
    return event.TYPE


_DECIDING = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "numpy", "safetensors")


def _common(then: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of both, the flags that both have: an older version knew fewer."""
    return {name: then[name] for name in then if name in now}, {name: now[name] for name in then if name in now}


def _source_files(then: EnvironmentCaptured, now: EnvironmentCaptured) -> list[tuple[str, Any, Any]]:
    """Local source files that both imported and that are not the same; in another folder others may be local."""
    if then.code is None or now.code is None:
        return []
    before, after = then.code.files, now.code.files
    return [(f"the source file {name}", before[name], after[name]) for name in sorted(before) if name in after]


def compare_environments(then: EnvironmentCaptured, now: EnvironmentCaptured) -> tuple[str, ...]:
    """What differs between two environments and may keep a replay from being equal, as sentences."""
    said = []
    pairs: list[tuple[str, Any, Any]] = [
        ("Python", then.python, now.python),
        ("the platform", then.platform.rpartition(" ")[2], now.platform.rpartition(" ")[2]),
        ("the processor", then.hardware.get("cpu"), now.hardware.get("cpu")),
        ("torch's threads", then.threads, now.threads),
        ("the determinism flags", *_common(then.determinism, now.determinism)),
    ]
    pairs += [(name, then.packages.get(name), now.packages.get(name)) for name in _DECIDING]
    pairs += _source_files(then, now)
    for name, before, after in pairs:
        if before != after:
            said.append(f"{name[:1].upper()}{name[1:]} differs: {before} then, {after} now.")
    if then.hardware.get("gpus") or now.hardware.get("gpus"):
        said.append("A GPU took part: its sums are not the same bit for bit from run to run, nor from card to card.")
    return tuple(said)
