"""Two runs side by side: whether a replay repeated the private trainings of the run that it replays. Floor 3.

Pure: entries go in, a `Comparison` comes out. Compared is what must be equal where code, data, parameters and software
are: the trainer and its settings, the shape of the data, the model that training began from, the plan (sigma, q, T, C,
N), of every recorded step its number, learning rate, norms of the privatised gradient and of the update, what was
released of it and the weights' digest, the digest of the final weights, and the outcome. Floating-point numbers are
compared bit for bit.

Not compared: epsilon (it follows from what the ledger held before), times, identifiers, commitments, and the digests
of saved folders, which hold times and paths. Of steps and final weights a difference names the place and no value:
with the noise being the same, the difference of two values would show what the noise had covered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from rlhf_audit_nb.events import (
    DataBound,
    EnvironmentCaptured,
    Event,
    ModelBound,
    PrivacyAudited,
    PrivacyEngine,
    PrivacyReserved,
    PrivacySettled,
    RunFinished,
    RunResumed,
    RunStarted,
    Step,
    TrainerAttached,
    decode_body,
)

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import Entry

__all__ = ["Comparison", "Difference", "compare_environments", "compare_runs", "private_runs"]

_COMPARED: dict[type[Event], tuple[str, ...] | None] = {  # fields that are left out; the others are compared
    RunStarted: ("tool", "record", "entry_point", "cell_digest", "compliance_mode", "parent"),
    TrainerAttached: (),
    RunResumed: ("checkpoint", "from_run", "entry"),
    DataBound: (
        "provenance",
        "source",
        "digest",
        "rows",
        "shards",
        "shard_rows",
        "features",
        "fingerprint",
        "revision",
        "files",
    ),
    ModelBound: ("name", "revision", "files", "generation_digest", "chat_template_digest", "quantization"),
    PrivacyReserved: (
        "reservation",
        "generator",
        "epsilon_budget",
        "epsilon_before",
        "epsilon_planned",
        "accountants",
        "population",
    ),
    PrivacyEngine: (),
    Step: ("epsilon",),
    PrivacySettled: ("reservation", "epsilon_run", "epsilon_total"),
    PrivacyAudited: ("reservation", "epsilon_claimed"),
    RunFinished: (),
}
_MAX = 50


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
    """What two runs were compared in and where they differ; at most 50 differences are kept.

    Attributes:
        differences: in the order of the replayed run's entries.
        trainings: private trainings compared.
        steps: steps whose recorded numbers were compared.
        digests: weights digests that were compared, final ones included.
    """

    differences: tuple[Difference, ...]
    trainings: int
    steps: int
    digests: int

    @property
    def equal(self) -> bool:
        """Whether everything compared is equal, and something was."""
        return not self.differences and self.trainings > 0 and self.digests > 0

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
            "trainings": self.trainings,
            "steps": self.steps,
            "digests": self.digests,
            "first_step": self.first_step,
            "differences": [asdict(item) for item in self.differences],
        }


def private_runs(entries: Iterable[Entry]) -> list[tuple[str, list[Entry]]]:
    """The runs among ``entries`` that reserved privacy budget, in their order, each with its entries."""
    runs: dict[str, list[Entry]] = {}
    private: set[str] = set()
    for entry in entries:
        if entry.run:
            runs.setdefault(entry.run, []).append(entry)
            if entry.type == PrivacyReserved.TYPE:
                private.add(entry.run)
    return [(run, found) for run, found in runs.items() if run in private]


def compare_runs(expected: Sequence[tuple[str, list[Entry]]], found: Sequence[tuple[str, list[Entry]]]) -> Comparison:
    """Compare private runs (`private_runs`) with what their replay left, one by one in their order."""
    differences: list[Difference] = []
    trainings = steps = digests = 0
    for place, (run, entries) in enumerate(expected):
        then = _events(entries)
        now = _events(found[place][1]) if place < len(found) else []
        differences += _compare_run(run, then, now)
        events = [event for _, event in then]
        trainings += sum(isinstance(event, PrivacyReserved) for event in events)
        steps += sum(isinstance(event, Step) for event in events)
        digests += sum(isinstance(event, Step) and event.weights_digest is not None for event in events)
        digests += sum(isinstance(event, ModelBound) and event.role == "final" for event in events)
    differences += [
        Difference(run=run, entry=None, where="run", what="a run that was not there before")
        for run, _ in found[len(expected) :]
    ]
    return Comparison(differences=tuple(differences[:_MAX]), trainings=trainings, steps=steps, digests=digests)


def _events(entries: Iterable[Entry]) -> list[tuple[int, Event]]:
    kinds = {kind.TYPE for kind in _COMPARED}
    return [(entry.index, decode_body(entry.type, entry.body)) for entry in entries if entry.type in kinds]


def _compare_run(run: str, then: list[tuple[int, Event]], now: list[tuple[int, Event]]) -> list[Difference]:
    differences: list[Difference] = []
    for place, (index, event) in enumerate(then):
        if place >= len(now):
            return [*differences, Difference(run=run, entry=index, where=_where(event), what="missing in the replay")]
        other = now[place][1]
        if type(other) is not type(event):
            what = f"the replay has {_where(other)} in its place"
            return [*differences, Difference(run=run, entry=index, where=_where(event), what=what)]
        differences += _compare_event(run, index, event, other)
    for _, event in now[len(then) :]:
        differences.append(Difference(run=run, entry=None, where=_where(event), what="was not there before"))
    return differences


def _compare_event(run: str, index: int, then: Event, now: Event) -> list[Difference]:
    left_out = _COMPARED[type(then)] or ()
    before, after = msgspec.to_builtins(then), msgspec.to_builtins(now)
    telling = isinstance(then, Step) or (isinstance(then, ModelBound) and then.role == "final")
    step = then.step if isinstance(then, Step) else None
    return [
        Difference(
            run=run,
            entry=index,
            where=_where(then),
            what=name,
            expected=None if telling else before[name],
            found=None if telling else after[name],
            step=step,
        )
        for name in before
        if name not in left_out and before[name] != after[name]
    ]


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
    for name, before, after in pairs:
        if before != after:
            said.append(f"{name[:1].upper()}{name[1:]} differs: {before} then, {after} now.")
    if then.hardware.get("gpus") or now.hardware.get("gpus"):
        said.append("A GPU took part: its sums are not the same bit for bit from run to run, nor from card to card.")
    return tuple(said)
