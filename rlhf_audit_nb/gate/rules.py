"""The rules of a gate: each asks one thing of a record, and answers with findings. Floor 4.

Pure: verified evidence and the policy in, findings out; who verifies and where records come from is `judging`'s. A rule
whose question the evidence cannot answer is not met: nothing passes because nothing is known. Where the whole trail is
at hand, rules read it, and so take account of what was written after the record was sealed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from rlhf_audit_nb.compliance.assess import State, assess
from rlhf_audit_nb.compliance.facts import run_facts
from rlhf_audit_nb.compliance.framework import load_framework
from rlhf_audit_nb.compliance.lineage import lineage
from rlhf_audit_nb.compliance.thresholds import evaluations
from rlhf_audit_nb.compliance.words import (
    delta_text,
    duration_text,
    epsilon_text,
    number_text,
    plural,
    short,
    time_text,
)
from rlhf_audit_nb.errors import AuditError
from rlhf_audit_nb.events import CellExecuted, PrivacyReserved, RecordAttested, RecordReproduced, RecordSealed
from rlhf_audit_nb.gate.finding import Finding
from rlhf_audit_nb.gate.policy import OWN_TRAIL
from rlhf_audit_nb.privacy.descent import Descent
from rlhf_audit_nb.privacy.ledger import fold, mechanism_of
from rlhf_audit_nb.records.attesting import attestations_of, trail_keys
from rlhf_audit_nb.records.reproductions import DIFFERENT, EQUAL, IDENTICAL, reproductions_of
from rlhf_audit_nb.records.signatures import TrailAttestation, count_attestations, missing_attestations
from rlhf_audit_nb.trail import Level

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.evidence import Evidence
    from rlhf_audit_nb.compliance.facts import RunFacts
    from rlhf_audit_nb.compliance.lineage import Bound
    from rlhf_audit_nb.compliance.thresholds import Evaluated, Judgement
    from rlhf_audit_nb.compliance.weights import SavedWeights
    from rlhf_audit_nb.gate.policy import GatePolicy, ReproducedAsked
    from rlhf_audit_nb.privacy.descent import Training
    from rlhf_audit_nb.records import OpenedRecord
    from rlhf_audit_nb.records.reproductions import Reproduced

__all__ = ["SPEAKS_AGAINST", "Subject", "check"]

SKEW = 300_000_000
"""Microseconds by which two machines' clocks may be apart."""

SPEAKS_AGAINST = frozenset(
    {
        "attestations.rejected",
        "evaluations.failed",
        "privacy",
        "privacy.canaries",
        "privacy.delta",
        "privacy.descent",
        "privacy.epsilon",
        "privacy.recomputed",
        "reproduced.different",
    }
)
"""Findings that stand against a model whichever of several records of it is taken."""

_ENDED = ("completed", "stopped-by-budget")
_SLACK = 1.001
_DAY = 86_400_000_000


@dataclass(frozen=True)
class Subject:
    """What is judged.

    Attributes:
        opened: the record, verified; it holds.
        record: its evidence.
        evidence: the trail's, where one is at hand and is of the record's own history; else the record's.
        saved: the entry that says that the model's folder was saved; ``None`` where a record alone is judged.
        weights_digest: of the tensors in the folder, in the form of a final model's; ``None`` where it cannot be had.
        now: UTC microseconds.
    """

    opened: OpenedRecord
    record: Evidence
    evidence: Evidence
    saved: SavedWeights | None
    weights_digest: str | None
    now: int

    @cached_property
    def runs(self) -> tuple[RunFacts, ...]:
        """The record's runs, as the evidence tells them."""
        own = {run.run for run in run_facts(self.record)}
        return tuple(run for run in run_facts(self.evidence) if run.run in own)

    @cached_property
    def descent(self) -> Descent:
        """What the models descend from."""
        told = ((item.index, item.run, item.event) for item in self.evidence.items if item.event is not None)
        return Descent(told)

    @cached_property
    def trainings(self) -> tuple[Training, ...]:
        """The record's trainings that left the model's files; where a record alone is judged, all of them."""
        own = {run.run for run in self.runs}
        of_record = (training for training in self.descent.trainings if training.run in own)
        if self.saved is None:
            return tuple(of_record)
        # A folder without a step is one of which nobody knows whose weights are in it.
        digest = self.saved.digest
        return tuple(
            training
            for training in of_record
            if any(event.digest == digest and event.step is not None for _, event in training.saved)
        )

    def run_of(self, training: Training) -> RunFacts:
        """The run that a training belongs to."""
        return next(run for run in run_facts(self.evidence) if run.run == training.run)


def check(policy: GatePolicy, subject: Subject) -> tuple[Finding, ...]:
    """All that ``policy`` asks of ``subject``, in the order of the policy's keys."""
    asked = {*policy.asked, *(("attestations",) if policy.people else ())}
    return tuple(finding for name, rule in _RULES.items() if name in asked for finding in rule(policy, subject))


# --- the record ------------------------------------------------------------------------------------------------------


def _level(policy: GatePolicy, subject: Subject) -> Iterator[Finding]:
    found, least = subject.opened.verdict.level, policy.level or Level.UNANCHORED
    yield Finding("level", found >= least, f"The record is {found.name}; {least.name} is asked for.")


def _fresh(policy: GatePolicy, subject: Subject) -> Iterator[Finding]:
    if policy.fresh.record is not None:
        (item, _), *_ = subject.record.of(RecordSealed)
        yield _age("fresh.record", "sealed", item.time, policy.fresh.record, subject.now, (item.index,))
    if policy.fresh.witnessed is not None:
        times = [anchor.time for anchor in subject.opened.verdict.anchors if anchor.time]
        if not times:
            yield Finding(
                "fresh.witnessed", False, "No witness and no timestamping authority that counts vouches for it."
            )
        else:
            yield _age("fresh.witnessed", "last witnessed", max(times) * 1_000_000, policy.fresh.witnessed, subject.now)


def _age(name: str, done: str, time: int, most: int, now: int, entries: tuple[int, ...] = ()) -> Finding:
    age = now - time
    if age < -SKEW:
        return Finding(name, False, f"It was {done} in the future: {time_text(time)}.", entries)
    said = f"It was {done} {_span(max(age, 0))} ago, and may be {_span(most * 1_000_000)} old."
    return Finding(name, age <= most * 1_000_000, said, entries)


def _span(microseconds: int) -> str:
    days = microseconds // _DAY
    return plural(days, "day") if days >= 2 else duration_text(microseconds)  # noqa: PLR2004 (hours say more of less)


def _outcome(policy: GatePolicy, subject: Subject) -> Iterator[Finding]:
    del policy
    (item, sealed), *_ = subject.record.of(RecordSealed)
    where = f"cell {sealed.cell}" if sealed.cell else ""
    why = f" ({sealed.reason})" if sealed.reason else ""
    yield Finding("outcome", sealed.status == "completed", f"The notebook {sealed.status}{why}.", (item.index,), where)
    for run in subject.runs:
        if run.status not in _ENDED:
            ends = [pair[0].index for pair in (run.finished, run.interrupted) if pair is not None]
            name = run.started.experiment
            yield Finding("outcome", False, f"The run {name!r} is {run.status}.", (run.item.index, *ends))


def _failed_cells(policy: GatePolicy, subject: Subject) -> Iterator[Finding]:
    del policy
    cells = subject.record.of(CellExecuted)
    failed = [(item, event) for item, event in cells if event.status != "ok"]
    for item, event in failed:
        said = f"Cell {event.position + 1} ended with {event.status}."
        yield Finding("failed_cells", False, said, (item.index,), f"cells[{event.position}]")
    if not failed:
        none = "No cell was run, so none can be said to have gone well."
        yield Finding("failed_cells", bool(cells), f"{plural(len(cells), 'cell')} ran, none failed." if cells else none)


def _changed_outputs(policy: GatePolicy, subject: Subject) -> Iterator[Finding]:
    del policy
    changed = [note for note in subject.opened.notes if note.code == "output-updated"]
    for note in changed:
        yield Finding("changed_outputs", False, note.message, where=note.where)
    if not changed:
        yield Finding("changed_outputs", True, "Every output is what it was when its cell had run.")


# --- what was trained, from what -------------------------------------------------------------------------------------


def _git(policy: GatePolicy, subject: Subject) -> Iterator[Finding]:
    if not subject.runs:
        yield Finding("git", False, "The record holds no run, so nothing says which code was run.")
    for run in subject.runs:
        name = f"run {run.started.experiment!r}"
        if not run.environments:
            yield Finding("git", False, f"The {name} has not recorded its code.", (run.item.index,))
        for item, event in run.environments:
            if not event.git_commit:
                met, said = False, f"The {name} was not in a git repository with a commit."
            elif policy.git == "clean" and event.git_dirty is not False:
                met, said = False, f"The {name} ran with changes that were not committed, on {event.git_commit[:12]}."
            else:
                met, said = True, f"The {name} ran at commit {event.git_commit[:12]}."
            yield Finding("git", met, said, (item.index,))


def _weights(policy: GatePolicy, subject: Subject) -> Iterator[Finding]:
    del policy
    finals = [(index, model) for training in subject.trainings for index, model in training.of_role("final")]
    if subject.saved is None:
        yield Finding("weights", bool(finals), "A record alone was judged; a folder of weights is held to it by `gate`."
                      if finals else "The record holds no training that ended with a model.",
                      tuple(index for index, _ in finals))  # fmt: skip
        return
    left = [index for index, model in finals if model.weights_digest == subject.weights_digest]
    if left:
        yield Finding("weights", True, "The tensors are, one by one, those that the training left.", tuple(left))
        return
    why = (
        "The folder's tensors cannot be read (only safetensors files can be)."
        if subject.weights_digest is None
        else f"The tensors ({short(subject.weights_digest)}) are not those that a training of the record left."
    )
    yield Finding("weights", False, why, tuple(index for index, _ in finals))


def _base_models(policy: GatePolicy, subject: Subject) -> Iterator[Finding]:
    bases = [(index, model) for training in subject.trainings for index, model in training.of_role("base")]
    if not bases:
        yield Finding("base_models", False, "Nothing says which model the training began from.")
    for index, model in bases:
        known = model.weights_digest in policy.base_models
        called = f"{model.name or model.architecture} ({short(model.weights_digest)})"
        said = f"It began from {called}{'' if known else ', which the policy does not name'}."
        yield Finding("base_models", known, said, (index,))


# --- privacy ---------------------------------------------------------------------------------------------------------


def _privacy(policy: GatePolicy, subject: Subject) -> Iterator[Finding]:
    if not subject.trainings:
        said = (
            "No training of the record is known to have left this model." if subject.saved else "Nothing was trained."
        )
        yield Finding("privacy.training", False, said, (subject.saved.entry,) if subject.saved else ())
        return
    bounds = {node.entries[0]: node.bound for node in lineage(subject.evidence).of("training")}
    for training in subject.trainings:
        yield from _bounded(policy, subject, training, bounds[training.index])
        yield from _canaries(subject, training)
    yield _ledger(subject)


def _bounded(policy: GatePolicy, subject: Subject, training: Training, bound: Bound) -> Iterator[Finding]:
    asked = policy.privacy
    assert asked is not None
    entries = tuple(sorted({training.index, *bound.entries}))
    run = subject.run_of(training)
    private = bound.how in ("own", "inherited") and run.guarantee in ("bound", "inherited")
    if not private or bound.epsilon is None or bound.delta is None or bound.unit is None:
        said = f"The training of {run.started.experiment!r} has no bound: {bound.words}."
        yield Finding("privacy", False, said, entries)
        return
    yield Finding("privacy", True, f"The training of {run.started.experiment!r} has a bound: {bound.words}.", entries)
    if bound.unbounded:
        said = "It descends from trainings without a bound, which no figure covers."
        yield Finding("privacy.descent", False, said, bound.unbounded)
    size = math.inf if isinstance(bound.epsilon, str) else float(bound.epsilon)
    # Written so that what is no number is refused.
    yield Finding(
        "privacy.epsilon",
        bool(0 <= size <= asked.epsilon),
        f"ε is {epsilon_text(bound.epsilon)}; at most {number_text(asked.epsilon)} is asked for.",
        entries,
    )
    said = f"δ is {delta_text(bound.delta)}; at most {delta_text(asked.delta)} is asked for."
    yield Finding("privacy.delta", bool(0 <= bound.delta <= asked.delta), said, entries)
    said = f"Bounded is the influence of one {bound.unit}; asked for is {' or '.join(asked.units)}."
    yield Finding("privacy.units", bound.unit in asked.units, said, entries)
    yield from _recomputed(subject, training, size)


def _recomputed(subject: Subject, training: Training, claimed: float) -> Iterator[Finding]:
    """The claim against the mechanism: no total is below what this training alone must cost."""
    # Here and not above: the accountants are slow to import, and most policies' other rules do not need them.
    from rlhf_audit_nb.privacy.accountant import composed_epsilon

    by_entry = {spend.item.index: spend for run in subject.runs for spend in run.spends}
    for index in training.reserved:
        spend = by_entry[index]
        mechanism = mechanism_of(spend.reserved).with_steps(spend.steps)
        least = composed_epsilon([mechanism], spend.reserved.delta) if spend.steps else 0.0
        if not least <= claimed * _SLACK + 1e-6:
            said = (
                f"The noise, the sampling and the steps that are recorded come to ε {epsilon_text(least)}, more than "
                f"the {epsilon_text(claimed)} that is claimed."
            )
            yield Finding("privacy.recomputed", False, said, spend.indices)
        else:
            yield Finding("privacy.recomputed", True, "The recorded mechanism agrees with the claim.", spend.indices)


def _canaries(subject: Subject, training: Training) -> Iterator[Finding]:
    spends = [spend for spend in subject.run_of(training).spends if spend.item.index in training.reserved]
    for spend in spends:
        if spend.contradicted and spend.audited is not None:
            said = "Canaries of this training show more than the ε that it claims."
            yield Finding("privacy.canaries", False, said, (*spend.indices, spend.audited[0].index))


def _ledger(subject: Subject) -> Finding:
    try:
        doubts = fold(subject.evidence.entries).doubts()
    except AuditError as error:
        return Finding("privacy.ledger", False, f"The ledger does not add up: {error.message}")
    if doubts:
        entries = tuple(spend.settled_in for spend in doubts if spend.settled_in is not None)
        return Finding("privacy.ledger", False, f"The ledger is not believed: {doubts[0].doubt}", entries)
    entries = tuple(item.index for item, _ in subject.evidence.of(PrivacyReserved))
    return Finding("privacy.ledger", True, "The ledger adds up.", entries)


# --- evaluations and evidence ----------------------------------------------------------------------------------------


def _evaluations(policy: GatePolicy, subject: Subject) -> Iterator[Finding]:
    asked = policy.evaluations
    assert asked is not None
    left = {training.index for training in subject.trainings}
    done = [
        one for one in evaluations(subject.evidence).done if one.model.as_ == "final" and one.model.training in left
    ]
    for metric in asked.metrics:
        yield _passed(metric, asked.before, done)
    for one in done:
        failed = [item for item in one.judgements if item.outcome == "not met"]
        if failed:
            said = "; ".join(f"{item.metric} {item.words}" for item in failed)
            yield Finding("evaluations.failed", False, f"A test did not reach its threshold: {said}.", one.entries)


def _passed(metric: str, before: str, done: list[Evaluated]) -> Finding:
    name = f"evaluations.{metric}"
    found = [(one, item) for one in done for item in one.judgements if item.metric == metric]
    good = [(one, item) for one, item in found if item.passed and not one.problems and _in_time(item, before)]
    if good:
        one, item = good[-1]
        return Finding(name, True, f"{one.figure(metric)}: {item.words}.", one.entries)
    if found:
        one, item = found[-1]
        problems = f"; {'; '.join(one.problems)}" if one.problems else ""
        late = f"; asked for is a threshold from {before}" if item.passed else ""
        return Finding(name, False, f"{one.figure(metric)}: {item.words}{problems}{late}.", one.entries)
    told = [one for one in done if metric in one.event.metrics]
    if told:
        return Finding(name, False, f"No threshold was set for {metric} before it was known.", told[-1].entries)
    return Finding(name, False, f"No test of this model tells its {metric}.")


def _in_time(judgement: Judgement, before: str) -> bool:
    return judgement.order == "before training" or (before == "before result" and judgement.order == "before result")


def _evidence(policy: GatePolicy, subject: Subject) -> Iterator[Finding]:
    asked = policy.evidence
    assert asked is not None
    lines = {line.requirement.id: line for line in assess(subject.record, load_framework(asked.framework)).lines}
    for name in asked.requirements:
        line = lines[name]
        met = line.state in (State.EVIDENCED, State.ATTESTED)
        part = "" if line.whole else ", in part"
        yield Finding(f"evidence.{name}", met, f"{line.state.value}{part if met else ''}: {line.words}", line.entries)


# --- people ----------------------------------------------------------------------------------------------------------


def _attestations(policy: GatePolicy, subject: Subject) -> Iterator[Finding]:
    """Who has signed the record, and that nobody whom the policy names has rejected it."""
    known = _known_attestations(subject)
    items = attestations_of(subject.opened, known)
    counted = count_attestations(
        items,
        policy.attestations,
        policy.people,
        trail_keys(subject.opened) | trail_keys(subject.evidence),
        missing=missing_attestations(items, known),
        now=subject.now / 1_000_000,
    )
    places = (f"[{i}]" for i in range(len(policy.attestations)))
    for one in counted:
        what = next(places) if one.code == "attested" else f".{one.code.removeprefix('attestation-')}"
        where = ", ".join(_addition(item.index) for item in one.by)
        entries = tuple(item.entry.index for item in one.by if item.entry is not None)
        yield Finding(f"attestations{what}", one.met, one.why, entries, where)


def _known_attestations(subject: Subject) -> tuple[TrailAttestation, ...]:
    """What the trail says of the record's signatures; nothing where it is not at hand."""
    sealed = subject.opened.sealed
    return tuple(
        TrailAttestation(item.index, item.time, event.payload, event.meaning, event.role, event.key)
        for item, event in subject.evidence.of(RecordAttested)
        if sealed is not None and event.record == sealed.record
    )


def _reproduced(policy: GatePolicy, subject: Subject) -> Iterator[Finding]:
    """Whether somebody whose word counts ran it again, and what each of them said last."""
    asked = policy.reproduced
    assert asked is not None
    keys = {key: person.name for person in policy.people if person.name in asked.by for key in person.keys}
    last: dict[str, Reproduced] = {}
    for said in reproductions_of(subject.opened):
        who = keys.get(said.key_id) or (OWN_TRAIL if said.own and OWN_TRAIL in asked.by else None)
        if who is not None:
            last[who] = said
    for who, said in last.items():
        if said.verdict == DIFFERENT:
            yield Finding("reproduced.different", False, f"By {who}: {said}.", where=_addition(said.index))
    yield from _different_in_trail(subject)
    good = [(who, said) for who, said in last.items() if _same_again(asked, said)]
    if good:
        who, said = good[-1]
        yield Finding("reproduced", True, f"By {who}: {said}.", where=_addition(said.index))
    else:
        told = "; ".join(f"by {who}: {said}" for who, said in last.items())
        none = "Nobody whose word counts has run it again"
        reason = f"No reproduction is {asked.verdict} as it is asked for ({told})." if told else f"{none}."
        yield Finding("reproduced", False, reason)


def _same_again(asked: ReproducedAsked, said: Reproduced) -> bool:
    if said.event is None or not any(said.event.compared.values()) or any(said.event.different.values()):
        return False
    if said.verdict == IDENTICAL:
        return True
    stated = said.event.tolerance.values()
    small = all(not isinstance(value, str) and 0 <= value <= asked.tolerance for value in stated)
    return asked.verdict == "equal" and said.verdict == EQUAL and small and not said.event.tolerated.get("weights")


def _different_in_trail(subject: Subject) -> Iterator[Finding]:
    """What the trail says last of a reproduction, also where it was not added to this copy or taken out of it."""
    sealed = subject.opened.sealed
    told = [(item, event) for item, event in subject.evidence.of(RecordReproduced)
            if sealed is not None and event.record == sealed.record]  # fmt: skip
    if told and told[-1][1].verdict == DIFFERENT:
        item, event = told[-1]
        said = f"The trail says that it came out different, first in {event.first}."
        yield Finding("reproduced.different", False, said, (item.index,))


def _addition(index: int) -> str:
    return f"metadata.rlhf_audit.additions[{index}]"


_RULES: dict[str, Callable[[GatePolicy, Subject], Iterator[Finding]]] = {
    "level": _level,
    "fresh": _fresh,
    "outcome": _outcome,
    "failed_cells": _failed_cells,
    "changed_outputs": _changed_outputs,
    "git": _git,
    "weights": _weights,
    "base_models": _base_models,
    "privacy": _privacy,
    "evaluations": _evaluations,
    "evidence": _evidence,
    "attestations": _attestations,
    "reproduced": _reproduced,
}
