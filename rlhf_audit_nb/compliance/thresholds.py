"""Evaluations against the thresholds that were set for them: what was reached, and what came first. Floor 3.

`evaluations` reads the order out of verified evidence. A threshold is one of a *series*: all that were set for the same
metric, the same data (or any) and the same experiment (or any). For each evaluation and each series that it falls
under, the newest threshold before the result is in force; how early that one was set is its `order`:

- ``before training``: before the first step of the training that left the evaluated model; where several left the same
  weights, or it went on from a checkpoint, before the first step of the earliest;
- ``before result``: after that, or where this trail does not know the training, and before the result;
- ``after result``: when the figure was known: only after the evaluation, or after an earlier one of the same model
  and metric. Nothing is judged by such a threshold.

A record carries the thresholds and evaluations of other notebooks on its metrics; they are weighed here, and those of
models that the record does not know are not told of by themselves.

All others of the series are shown beside it. What is not a finite number reaches nothing. Figures that are sealed, and
data that is, are judged by nobody here. A pure function of the entries.
"""

from __future__ import annotations

import math
import operator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from rlhf_audit_nb.compliance.facts import training_steps
from rlhf_audit_nb.compliance.words import number_text
from rlhf_audit_nb.events import EvaluationRecorded, ModelBound, RecordStarted, RunStarted, ThresholdSealed
from rlhf_audit_nb.privacy.descent import Descent, Training

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlhf_audit_nb.compliance.evidence import Evidence
    from rlhf_audit_nb.events import Number

__all__ = ["Evaluated", "Evaluations", "Judgement", "Known", "Threshold", "evaluations"]

Order = Literal["before training", "before result", "after result"]
Outcome = Literal["met", "not met", "not judged"]

_RELATIONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_SHOWN = {">=": "≥", "<=": "≤", ">": ">", "<": "<"}


@dataclass(frozen=True)
class Threshold:
    """One threshold as its entry has it; ``data_sealed`` where the data that it is for is known to the vault alone."""

    entry: int
    time: int
    metric: str
    relation: str
    bound: float
    data: str | None = None
    data_name: str | None = None
    data_sealed: bool = False
    experiment: str | None = None
    reason: str | None = None
    by: str | None = None

    @property
    def words(self) -> str:
        """``accuracy ≥ 0.7``."""
        return f"{self.metric} {self.condition}"

    @property
    def condition(self) -> str:
        """``≥ 0.7``."""
        return f"{_SHOWN.get(self.relation, self.relation)} {number_text(self.bound)}"

    def met_by(self, value: Number | None) -> bool:
        """Whether a figure reaches it; what is no finite number never does."""
        compare = _RELATIONS.get(self.relation)
        if compare is None or value is None or isinstance(value, str) or not math.isfinite(value):
            return False
        return bool(compare(value, self.bound))


@dataclass(frozen=True)
class Judgement:
    """One figure under one series of thresholds.

    Attributes:
        metric: which figure.
        threshold: the one in force; of a series that was only set when the figure was known, the first of those.
        order: how early that was.
        outcome: whether it was reached; ``not judged`` under a threshold that came too late, or a sealed figure.
        changed: entries of the series that were in force before this one, and whether each would have been reached.
        later: entries of the series that came after the result.
        known_since: the entry of an earlier evaluation that had told the figure already.
    """

    metric: str
    threshold: Threshold
    order: Order
    outcome: Outcome
    changed: tuple[tuple[Threshold, bool], ...] = ()
    later: tuple[Threshold, ...] = ()
    known_since: int | None = None

    @property
    def words(self) -> str:
        """The judgement in a sentence's worth of words."""
        at = f"#{self.threshold.entry}"
        said = {
            "before training": f"set in {at}, before the training's first step",
            "before result": f"set in {at}, before the result",
            "after result": f"set in {at}, after the result was known",
        }[self.order]
        if self.known_since is not None:
            said += f" from #{self.known_since}"
        outcome = self.outcome if self.outcome != "not judged" else "not judged by it"
        parts = [f"{self.threshold.condition} {outcome} ({said})"]
        parts += [
            f"changed from {one.condition} (#{one.entry}), which {'was' if reached else 'was not'} reached"
            for one, reached in self.changed
        ]
        parts += [f"set again after the result: {one.condition} (#{one.entry})" for one in self.later]
        return "; ".join(parts)

    @property
    def passed(self) -> bool:
        """Whether the figure reached a threshold that was written down before it was known."""
        return self.outcome == "met" and self.order != "after result"


@dataclass(frozen=True)
class Known:
    """What the trail knows of an evaluated model.

    Attributes:
        as_: ``final`` (what a training left), ``checkpoint`` (a folder that one saved on its way), ``base`` (what one
            began from) or ``unknown``.
        entries: what shows it.
        training: the entry of the training's trainer.
        first_step: the first entry that may tell of the trained model; ``None`` where that was before this trail.
        run: of the training.
        experiment: of that run.
    """

    as_: Literal["final", "checkpoint", "base", "unknown"]
    entries: tuple[int, ...] = ()
    training: int | None = None
    first_step: int | None = None
    run: str | None = None
    experiment: str | None = None

    @property
    def left_by(self) -> str | None:
        """The experiment that the model came out of; ``None`` where no training here left it."""
        return self.experiment if self.as_ in ("final", "checkpoint") else None

    @property
    def words(self) -> str:
        """The model in a few words."""
        where = f"{self.experiment}, {', '.join(f'#{index}' for index in self.entries)}"
        return {
            "final": f"the model that a training left ({where})",
            "checkpoint": f"a checkpoint, not what its training left ({where})",
            "base": f"a model that a training began from ({where})",
            "unknown": "a model that is not known to this trail",
        }[self.as_]


@dataclass(frozen=True)
class Evaluated:
    """One evaluation: what the entry says, which model it is, how its figures stand, and what is amiss."""

    entry: int
    time: int
    event: EvaluationRecorded
    model: Known
    judgements: tuple[Judgement, ...]
    problems: tuple[str, ...] = ()
    sealed: bool = False

    @property
    def passed(self) -> bool:
        """Whether every threshold that it falls under was written down before and is reached, and nothing is amiss."""
        return bool(self.judgements) and all(one.passed for one in self.judgements) and not self.problems

    @property
    def entries(self) -> tuple[int, ...]:
        """All entries that show it."""
        found = {self.entry, *self.model.entries}
        for one in self.judgements:
            found |= {one.threshold.entry, *(old.entry for old, _ in one.changed), *(new.entry for new in one.later)}
            if one.known_since is not None:
                found.add(one.known_since)
        if self.event.data_public is not None:
            found.add(self.event.data_public)
        return tuple(sorted(found))

    def figure(self, name: str) -> str:
        """``accuracy 0.71``; sealed figures are said to be."""
        value = self.event.metrics[name]
        return f"{name} {'sealed' if value is None else number_text(value)}"


@dataclass(frozen=True)
class Evaluations:
    """All evaluations of a trail, and the thresholds that nothing was ever held to."""

    done: tuple[Evaluated, ...]
    thresholds: tuple[Threshold, ...]
    unused: tuple[Threshold, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "evaluations": [_plain(one) for one in self.done],
            "thresholds": [asdict(one) for one in self.thresholds],
            "unused": [one.entry for one in self.unused],
        }


def evaluations(evidence: Evidence) -> Evaluations:
    """What ``evidence`` shows of evaluations and thresholds."""
    if "evaluations" not in evidence.memo:
        evidence.memo["evaluations"] = _Reader(evidence).read()
    found: Evaluations = evidence.memo["evaluations"]
    return found


class _Reader:
    """The reading; one use."""

    def __init__(self, evidence: Evidence) -> None:
        self._told = [
            (item.index, item.time, event, item.sealed is not None) for item, event in evidence.of(EvaluationRecorded)
        ]
        self._thresholds = [
            Threshold(
                item.index, item.time, event.metric, event.relation, event.bound, event.data, event.data_name,
                item.sealed is not None, event.experiment, event.reason, event.by,
            )
            for item, event in evidence.of(ThresholdSealed)
        ]  # fmt: skip
        self._descent = Descent((item.index, item.run, item.event) for item in evidence.items if item.event is not None)
        self._experiments = {item.run: event.experiment for item, event in evidence.of(RunStarted)}
        self._steps = training_steps(evidence)
        self._models = {index: self._model(index, event) for index, _, event, _ in self._told}
        self._used: set[int] = set()
        self._foreign = _foreign(evidence)

    def read(self) -> Evaluations:
        known = [one for one in self._told if one[0] not in self._foreign or self._models[one[0]].as_ != "unknown"]
        done = tuple(self._evaluated(*one) for one in known)
        unused = tuple(one for one in self._thresholds if one.entry not in self._used | self._foreign)
        return Evaluations(done, tuple(self._thresholds), unused)

    def _evaluated(self, entry: int, time: int, event: EvaluationRecorded, sealed: bool) -> Evaluated:  # noqa: FBT001
        model = self._models[entry]
        judgements, problems = [], list(_problems(event, model))
        for metric in event.metrics:
            series = self._series(metric, event, model, sealed=sealed)
            judgements += [self._judged(metric, one, entry, event) for one in series]
            if not series:
                problems += self._other_data(metric, event, model, sealed=sealed)
        return Evaluated(entry, time, event, model, tuple(judgements), tuple(problems), sealed)

    # --- thresholds --------------------------------------------------------------------------------------------------

    def _of(self, metric: str, event: EvaluationRecorded, model: Known) -> list[Threshold]:
        """The thresholds for this metric of this model, whatever the data."""
        names = {None, model.left_by, event.experiment}
        return [one for one in self._thresholds if one.metric == metric and one.experiment in names]

    def _series(self, metric: str, event: EvaluationRecorded, model: Known, *, sealed: bool) -> list[list[Threshold]]:
        found: dict[Any, list[Threshold]] = {}
        for one in self._of(metric, event, model):
            same = one.data == event.data and one.data is not None
            anything = one.data is None and not one.data_sealed
            if anything or same or (sealed and one.data_sealed):
                found.setdefault((one.data, one.data_sealed, one.experiment), []).append(one)
        return list(found.values())

    def _judged(self, metric: str, series: list[Threshold], entry: int, event: EvaluationRecorded) -> Judgement:
        self._used |= {one.entry for one in series}
        value = event.metrics[metric]
        before, later = [one for one in series if one.entry < entry], [one for one in series if one.entry > entry]
        if not before:
            return Judgement(metric, later[0], "after result", "not judged", later=tuple(later[1:]))
        last, changed = before[-1], tuple((one, one.met_by(value)) for one in before[:-1])
        known = self._known_since(metric, entry, event)
        if known is not None and known < last.entry:
            return Judgement(metric, last, "after result", "not judged", changed, tuple(later), known)
        first_step = self._models[entry].first_step
        order: Order = "before training" if first_step is not None and last.entry < first_step else "before result"
        outcome: Outcome = "met" if last.met_by(value) else "not met" if value is not None else "not judged"
        return Judgement(metric, last, order, outcome, changed, tuple(later))

    def _known_since(self, metric: str, entry: int, event: EvaluationRecorded) -> int | None:
        """The first evaluation that had told this figure of this model before."""
        for index, _, earlier, _ in self._told:
            if index >= entry:
                return None
            same_data = earlier.data == event.data or None in (earlier.data, event.data)
            if metric in earlier.metrics and same_data and self._same_model(index, earlier, entry, event):
                return index
        return None

    def _same_model(self, index: int, earlier: EvaluationRecorded, entry: int, event: EvaluationRecorded) -> bool:
        one, other = self._models[index], self._models[entry]
        both_left = one.as_ == other.as_ == "final" and one.training == other.training
        return both_left or _are_one(earlier, event)

    def _other_data(self, metric: str, event: EvaluationRecorded, model: Known, *, sealed: bool) -> Iterator[str]:
        for one in self._of(metric, event, model):
            self._used.add(one.entry)
            if sealed or one.data_sealed:
                yield f"whether it is the data that {one.words} (#{one.entry}) was set for is not shown"
            else:
                what = "other data" if event.data is not None else "data that is not stated"
                yield f"evaluated on {what} than {one.words} (#{one.entry}) was set for"

    # --- models ------------------------------------------------------------------------------------------------------

    def _model(self, entry: int, event: EvaluationRecorded) -> Known:
        for found in (self._final(entry, event), self._folder(entry, event), self._base(entry, event)):
            if found is not None:
                return found
        return Known("unknown")

    def _final(self, entry: int, event: EvaluationRecorded) -> Known | None:
        found = [
            (training, index)
            for training in self._left(entry, event)
            for index, model in training.of_role("final")
            if index < entry and _is_it(model, event) and self._on_its_base(training, event)
        ]
        if not found:
            return None
        # The newest is named. But what the same weights came out of before was there before: trained again from the
        # same seed, a model is no newer than the first time.
        training, index = found[-1]
        firsts = [self._first_step(one) for one, _ in found]
        return replace(self._known("final", training, (index,)), first_step=_earliest(firsts))

    def _left(self, entry: int, event: EvaluationRecorded) -> list[Training]:
        return [item for digest in _weights(event) for item in self._descent.left(digest, before=entry)]

    def _on_its_base(self, training: Training, event: EvaluationRecorded) -> bool:
        """An adapter is the model that was trained only on the weights that it was trained on."""
        if event.base_digest is None:
            return True
        return any(base.weights_digest == event.base_digest for _, base in training.of_role("base"))

    def _folder(self, entry: int, event: EvaluationRecorded) -> Known | None:
        for digest in {event.folder_digest, event.stated_digest} - {None}:
            for training in reversed(self._descent.saved(str(digest))):
                for index, saved in reversed(training.saved):
                    if saved.digest == digest and index < entry:
                        steps = self._steps.get(training.index)
                        whole = saved.step is None or steps is None or saved.step >= steps.last
                        return self._known("final" if whole else "checkpoint", training, (index,))
        return None

    def _base(self, entry: int, event: EvaluationRecorded) -> Known | None:
        for training in self._descent.trainings:
            for role in ("base", "reference"):
                for index, model in training.of_role(role):
                    if index < entry and model.weights_digest in _weights(event):
                        return Known("base", (index,), run=training.run, experiment=self._experiments.get(training.run))
        return None

    def _known(self, as_: Any, training: Training, entries: tuple[int, ...]) -> Known:
        experiment = self._experiments.get(training.run)
        return Known(as_, entries, training.index, self._first_step(training), training.run, experiment)

    def _first_step(self, training: Training) -> int | None:
        """The first entry that may tell of what a training left, also of what it had learnt before it was resumed."""
        steps = self._steps.get(training.index)
        finals = [index for index, _ in training.of_role("final")]
        first = steps.first_entry if steps is not None else min([*finals, *(at for at, _ in training.saved)])
        if training.resumed is None:
            return first
        before = [self._first_step(one) for role, _, one in self._descent.inputs(training) if role == "checkpoint"]
        return _earliest([first, *before]) if before else None


def _foreign(evidence: Evidence) -> frozenset[int]:
    """In a record, the thresholds and evaluations that its own notebook did not write."""
    own = {event.record for _, event in evidence.of(RecordStarted)} if evidence.origin_kind == "record" else set()
    if not own:
        return frozenset()
    thresholds = {item.index for item, event in evidence.of(ThresholdSealed) if event.record not in own}
    return frozenset(thresholds | {i.index for i, event in evidence.of(EvaluationRecorded) if event.record not in own})


def _is_it(model: ModelBound, event: EvaluationRecorded) -> bool:
    return bool({model.weights_digest, model.trainable_digest} & _weights(event))


def _weights(event: EvaluationRecorded) -> set[str]:
    return {digest for digest in (event.weights_digest, event.stated_digest) if digest is not None}


def _earliest(entries: list[int | None]) -> int | None:
    """The smallest; ``None`` where one of them is not known to this trail."""
    known = [entry for entry in entries if entry is not None]
    return min(known) if len(known) == len(entries) else None


def _are_one(earlier: EvaluationRecorded, event: EvaluationRecorded) -> bool:
    """Whether both may be of one model: the same files, or the same weights unless they are on different bases.

    A folder does not say what its adapter is put on; an adapter is not known by itself.
    """
    if {earlier.folder_digest, earlier.stated_digest} & {event.folder_digest, event.stated_digest} - {None}:
        return True
    bases = {earlier.base_digest, event.base_digest} - {None}
    return bool(_weights(earlier) & _weights(event)) and len(bases) < 2  # noqa: PLR2004 (the same, or one not told)


def _problems(event: EvaluationRecorded, model: Known) -> Iterator[str]:
    if event.experiment is not None and model.left_by != event.experiment:
        yield f"said to be the model of {event.experiment}, but no training of that experiment left it"
    if model.as_ in ("unknown", "checkpoint", "base"):
        yield f"evaluated was {model.words}"
    for name, value in event.metrics.items():
        if isinstance(value, str):
            yield f"{name} is not a finite number, and reaches no threshold"


def _plain(one: Evaluated) -> dict[str, Any]:
    return {
        "entry": one.entry,
        "metrics": dict(one.event.metrics),
        "sealed": one.sealed,
        "model": {**{key.rstrip("_"): value for key, value in asdict(one.model).items()}, "words": one.model.words},
        "data": one.event.data,
        "evaluator": one.event.evaluator,
        "passed": one.passed,
        "judgements": [{**asdict(item), "words": item.words, "passed": item.passed} for item in one.judgements],
        "problems": list(one.problems),
    }
