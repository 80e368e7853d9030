"""What every model of a trail descends from, folded from the trail's own entries. Floor 2.

A training uses data and models and leaves a model. Models are known by the digests of their weights: what one training
left is what another began from, was rewarded by, or held as its reference. So each training has an *exposure*: the
spends through which protected people's data reached it, and the trainings without a bound through which anything may
have. Both are found by walking from a training to those that left what it used.

Weights that changed outside of a recorded training (merged, cast to another type, pruned) have another digest. Where
they were loaded from the files of a model that is known, they descend from it all the same; else nothing here knows
where they come from. Everything in this module is a pure function of the entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlhf_audit_nb.events import (
    DataBound,
    Event,
    ModelBound,
    PrivacyInherited,
    PrivacyReserved,
    PublicDeclared,
    RunResumed,
    TrainerAttached,
    WeightsSaved,
    decode_body,
)

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import TrailReader

__all__ = ["DATA", "FUNCTION", "MODEL", "Descent", "Exposure", "Told", "Training", "read_descent"]

FUNCTION, MODEL, DATA = "reward-function", "model", "data"
"""What a person can declare to hold nothing of protected people."""

Told = tuple[int, str | None, Event]
"""An entry's place, its run, and what it says."""

_KINDS: tuple[type[Event], ...] = (
    TrainerAttached,
    RunResumed,
    DataBound,
    ModelBound,
    PrivacyReserved,
    PrivacyInherited,
    PublicDeclared,
    WeightsSaved,
)
_TAKEN = ("base", "reference", "reward")
_RECORDED_ONLY = frozenset({"Trainer", "SFTTrainer", "RewardTrainer", "DPOTrainer", "KTOTrainer"})
"""Trainers that learn from nothing but the data and the models that the trail records of them."""


@dataclass(frozen=True, slots=True)
class Exposure:
    """How protected people's data may have reached a model.

    Attributes:
        spends: the entries that charged for it: reservations, and releases of labels.
        unbounded: the trainings without a bound that it descends from, by the entry of their trainer.
    """

    spends: frozenset[int] = frozenset()
    unbounded: frozenset[int] = frozenset()

    def __or__(self, other: Exposure) -> Exposure:
        return Exposure(self.spends | other.spends, self.unbounded | other.unbounded)


@dataclass(slots=True)
class Training:
    """One training: from the entry of its trainer to that of the next one in its run.

    Attributes:
        index: the entry that says which trainer it was.
        run: the run that it belongs to.
        trainer: the trainer's class.
        data: what it read.
        models: what it began from, used and left, by their roles.
        reserved: the entries that reserved its spend.
        inherited: what it inherited, where it charged nothing of its own.
        saved: the folders that its own weights were saved in.
        resumed: the entry that says so where it went on from a checkpoint, and the entry of that checkpoint (``None``
            where this trail does not know it).
    """

    index: int
    run: str
    trainer: str
    data: list[tuple[int, DataBound]] = field(default_factory=list)
    models: list[tuple[int, ModelBound]] = field(default_factory=list)
    reserved: list[int] = field(default_factory=list)
    inherited: tuple[int, PrivacyInherited] | None = None
    saved: list[tuple[int, WeightsSaved]] = field(default_factory=list)
    resumed: tuple[int, int | None] | None = None

    def of_role(self, role: str) -> list[tuple[int, ModelBound]]:
        """Its models in that role."""
        return [item for item in self.models if item[1].role == role]


class Descent:
    """The trainings of a trail and what each of them descends from.

    Args:
        told: the trail's entries in order; kinds that do not matter here are passed over.
    """

    def __init__(self, told: Iterable[Told]) -> None:
        self.trainings: list[Training] = []
        self.declared: dict[tuple[str, str], int] = {}
        self._by_entry: dict[int, Training] = {}
        self._left: dict[str, list[Training]] = {}
        self._saved: dict[str, list[Training]] = {}
        self._known: dict[int, Exposure] = {}
        open_now: dict[str, Training] = {}
        for index, run, event in told:
            if isinstance(event, PublicDeclared):
                self.declared.setdefault((event.kind, event.digest), index)
            elif run is None:
                continue
            elif isinstance(event, TrainerAttached):
                open_now[run] = Training(index, run, event.trainer)
                self.trainings.append(open_now[run])
                self._by_entry[index] = open_now[run]
            elif run in open_now:
                self._add(open_now[run], index, event)

    def _add(self, training: Training, index: int, event: Event) -> None:
        if isinstance(event, DataBound):
            training.data.append((index, event))
        elif isinstance(event, ModelBound):
            training.models.append((index, event))
            if event.role == "final":
                for digest in {event.weights_digest, event.trainable_digest} - {None}:
                    self._left.setdefault(str(digest), []).append(training)
        elif isinstance(event, PrivacyReserved):
            training.reserved.append(index)
        elif isinstance(event, RunResumed):
            training.resumed = (index, event.entry)
        elif isinstance(event, PrivacyInherited):
            training.inherited = (index, event)
        elif isinstance(event, WeightsSaved):
            if event.step is None:
                return  # nobody says that it is what this training trained
            training.saved.append((index, event))
            self._saved.setdefault(event.digest, []).append(training)
        else:
            return
        self._by_entry[index] = training

    def left(self, digest: str, *, before: int | None = None) -> list[Training]:
        """The trainings that ended with these weights, of those whose trainer's entry stands before ``before``."""
        return [item for item in self._left.get(digest, ()) if before is None or item.index < before]

    def saved(self, digest: str) -> list[Training]:
        """The trainings that wrote this folder of weights."""
        return list(self._saved.get(digest, ()))

    def at(self, index: int) -> Training | None:
        """The training that an entry belongs to."""
        return self._by_entry.get(index)

    def inputs(self, training: Training) -> Iterator[tuple[str, int, Training]]:
        """The earlier trainings that it took a model from: the model's role, the entry that names it, the training."""
        for role in _TAKEN:
            for index, model in training.of_role(role):
                for earlier in self._leaving(model, training):
                    yield role, index, earlier
        if training.resumed is not None:
            index, entry = training.resumed
            saving = self._by_entry.get(entry) if entry is not None else None
            if saving is not None and saving.index < training.index:
                yield "checkpoint", index, saving
        if training.inherited is not None:
            index, inherited = training.inherited
            for source in inherited.sources:
                rewarding = self._by_entry.get(source.get("entry", -1)) if source.get("role") == "reward" else None
                if rewarding is not None and rewarding.index < training.index:
                    yield "reward", index, rewarding

    def loaded(self, training: Training) -> Iterator[tuple[str, int, Training]]:
        """As `inputs`, of models that were loaded from the files of an earlier training's and have other weights since.

        They were cast to another type, merged or trained elsewhere: what they descend from is known, not what they are.
        """
        for role in _TAKEN:
            for index, model in training.of_role(role):
                if model.files is not None and model.files.tensors and not self._leaving(model, training):
                    for earlier in self.left(model.files.tensors, before=training.index):
                        yield role, index, earlier

    def _leaving(self, model: ModelBound, training: Training) -> list[Training]:
        """The earlier trainings that left this model, or the adapter on it."""
        digests = sorted({digest for digest in (model.weights_digest, model.trainable_digest) if digest is not None})
        return _unique(self.left(digest, before=training.index) for digest in digests)

    def exposure(self, training: Training) -> Exposure:
        """What ``training`` descends from, itself included."""
        known = self._known.get(training.index)
        if known is None:
            known = self._own(training)
            inputs = [*self.inputs(training), *self.loaded(training)]
            if training.resumed is not None and not any(role == "checkpoint" for role, _, _ in inputs):
                known |= Exposure(unbounded=frozenset({training.index}))  # nobody knows what that one had learnt
            for _, _, earlier in inputs:  # each is earlier than this one: the walk ends
                known |= self.exposure(earlier)
            self._known[training.index] = known
        return known

    def of(self, trainings: Iterable[Training]) -> Exposure:
        """What these trainings descend from together."""
        found = Exposure()
        for training in trainings:
            found |= self.exposure(training)
        return found

    def own_data_is_public(self, training: Training) -> bool:
        """Whether a person declared all that a training without privacy learnt from to be public."""
        declared = [event.digest is not None and (DATA, event.digest) in self.declared for _, event in training.data]
        return training.trainer in _RECORDED_ONLY and bool(declared) and all(declared)

    def _own(self, training: Training) -> Exposure:
        if training.inherited is not None:
            found = Exposure()
            for source in training.inherited[1].sources:
                found |= self._source(int(source.get("entry", training.index)), training)
            return found
        if training.reserved:
            return Exposure(spends=frozenset(training.reserved))
        if self.own_data_is_public(training):
            return Exposure()
        return Exposure(unbounded=frozenset({training.index}))

    def _source(self, entry: int, training: Training) -> Exposure:
        if entry in self.declared.values():
            return Exposure()
        source = self._by_entry.get(entry)
        if source is not None and source.index < training.index:
            return self.exposure(source)
        return Exposure(spends=frozenset({entry}))  # what was released and charged outside of a training


def read_descent(reader: TrailReader) -> Descent:
    """The descent of a trail as ``reader`` sees it; steps are not read.

    Raises:
        FormatError, StoreError: the trail cannot be read.
        EntryError: an entry is malformed.
    """
    found = [
        (entry.index, entry.run, decode_body(entry.type, entry.body))
        for kind in _KINDS
        for entry in reader.entries(type=kind.TYPE)
    ]
    return Descent(sorted(found, key=lambda item: item[0]))


def _unique(groups: Iterable[list[Training]]) -> list[Training]:
    return list({item.index: item for group in groups for item in group}.values())
