"""Evidence queries: which entries answer a requirement, what they show, and what they do not. Floor 3.

A query is a pure function of a verified `Evidence`. It gives a `Finding` where the trail really holds what is asked
for, else ``None``; a finding that covers only a part of what is asked says so (``whole`` is false) and says which part
is left. Queries named by ``material`` point a person at entries that help her to answer; they evidence nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_audit_nb.compliance.compute import compute_ledger
from rlhf_audit_nb.compliance.facts import run_facts
from rlhf_audit_nb.compliance.thresholds import evaluations as read_evaluations
from rlhf_audit_nb.compliance.words import count, plural, short
from rlhf_audit_nb.events import (
    AnnotationRecorded,
    AnnotationsImported,
    CardCreated,
    DataBound,
    LabelsReleased,
    RecordSealed,
    ReportCreated,
)

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.evidence import Evidence, Item
    from rlhf_audit_nb.compliance.facts import RunFacts
    from rlhf_audit_nb.events import ModelBound

__all__ = ["QUERIES", "Finding", "Query"]


@dataclass(frozen=True)
class Finding:
    """What entries show: their indices, words, what they do not show, and whether all that is asked is covered."""

    entries: tuple[int, ...]
    words: str
    not_shown: str
    whole: bool = False


Query = Callable[["Evidence"], "Finding | None"]


def _indices(*groups: tuple[tuple[Item, object], ...]) -> tuple[int, ...]:
    return tuple(sorted({item.index for group in groups for item, _ in group}))


def _trained(run: RunFacts) -> bool:
    return bool(run.trainers and run.steps)


def _names(values: list[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def software_versions(evidence: Evidence) -> Finding | None:
    """The environments that runs captured, by interpreter and package version."""
    found = [pair for run in run_facts(evidence) for pair in run.environments if pair[1].packages]
    if not found:
        return None
    environment = found[-1][1]
    known = [f"{name} {environment.packages[name]}" for name in ("torch", "transformers", "trl", "peft", "datasets")
             if name in environment.packages]  # fmt: skip
    words = f"{environment.implementation} {environment.python} and {plural(len(environment.packages), 'package')} "
    words += "by name and version" + (f", among them {', '.join(known)}" if known else "")
    return Finding(
        tuple(item.index for item, _ in found),
        words + ".",
        "The versions of the system in use, and what its updates need.",
    )


def development_steps(evidence: Evidence) -> Finding | None:
    """Runs that show a base model, a trainer, the data, each recorded step, and an end."""
    runs = [run for run in run_facts(evidence)
            if _trained(run) and run.model("base") and run.data and run.finished]  # fmt: skip
    if not runs:
        return None
    groups = [(run.trainers, run.models, run.data, run.environments, run.steps, run.weights) for run in runs]
    entries = _indices(*(group for many in groups for group in many))
    steps = sum(run.steps_done for run in runs)
    trainers = _names([event.trainer for run in runs for _, event in run.trainers])
    base = _names([short(event.weights_digest) for run in runs for _, event in run.models if event.role == "base"])
    words = (
        f"{plural(len(runs), 'run')} with {trainers}: base weights sha256 {base}, {plural(steps, 'optimizer step')}, "
        f"{plural(sum(len(run.data) for run in runs), 'data set')} bound, settings and environment captured."
    )
    return Finding(
        tuple(sorted({*entries, *(run.item.index for run in runs), *_ends(runs)})),
        words,
        "What was done outside these runs, how the base model itself was made, and the reasons for the choices.",
    )


def _ends(runs: list[RunFacts]) -> list[int]:
    return [run.finished[0].index for run in runs if run.finished]


def model_changes(evidence: Evidence) -> Finding | None:
    """Runs whose weights stand by digest before and after, and differ."""
    changed: list[tuple[tuple[Item, ModelBound], tuple[Item, ModelBound]]] = []
    for run in run_facts(evidence):
        base, final = run.model("base"), run.model("final")
        if base and final and base[1].weights_digest != final[1].weights_digest:
            changed.append((base, final))
    if not changed:
        return None
    before, after = (short(pair[1].weights_digest) for pair in changed[-1])
    return Finding(
        tuple(sorted({item.index for pair in changed for item, _ in pair})),
        f"{plural(len(changed), 'change')} of the weights by digest before and after; the last sha256 "
        f"{before} to {after}.",
        "Changes made outside this trail, and everything after release.",
    )


def integrity(evidence: Evidence) -> Finding | None:
    """Signed weights, and data by digest or commitment, in a trail that verifies."""
    runs = run_facts(evidence)
    signed = tuple(pair for run in runs for pair in run.weights if pair[1].signature_digest)
    data = tuple(pair for run in runs for pair in run.data if pair[1].digest or pair[0].sealed)
    if not signed or not data:
        return None
    return Finding(
        _indices(signed, data),
        f"{plural(len(signed), 'signed folder')} of weights, {plural(len(data), 'data set')} by digest or commitment, "
        "and a log whose hashes and signatures hold: a change of any of them would be noticed.",
        "It detects alteration, it does not prevent it; nothing is shown about the system in use.",
    )


def architecture(evidence: Evidence) -> Finding | None:
    """The architecture and the number of parameters of the models that trainers showed."""
    models = [pair for run in run_facts(evidence) for pair in run.models]
    if not models:
        return None
    last = next((pair for pair in reversed(models) if pair[1].role == "final"), models[-1])[1]
    return Finding(
        tuple(item.index for item, _ in models),
        f"{last.architecture} with {count(last.parameters)} parameters, {count(last.trainable)} of them trained.",
        "It is read from the model that was trained, not from the one that is offered.",
        whole=True,
    )


def data_points(evidence: Evidence) -> Finding | None:
    """The number of data points, where it stands in the open."""
    found = [
        (item, event) for item, event in evidence.of(DataBound)
        if event.rows is not None or (event.unit == "pair" and event.units is not None)
    ]  # fmt: skip
    if not found:
        return None
    parts = [f"{event.role}: {count(event.rows if event.rows is not None else event.units or 0)} rows of "
             f"{', '.join(event.columns)}" for _, event in found]  # fmt: skip
    return Finding(
        tuple(item.index for item, _ in found),
        "; ".join(dict.fromkeys(parts)) + ".",
        "The scope and main characteristics of the data.",
    )


def adaptation(evidence: Evidence) -> Finding | None:
    """Trainings that adapted a model, with their settings."""
    runs = [run for run in run_facts(evidence) if _trained(run)]
    if not runs:
        return None
    trainers = _names([event.trainer + (f" (loss {event.loss})" if event.loss else "")
                       for run in runs for _, event in run.trainers])  # fmt: skip
    return Finding(
        _indices(*(run.trainers for run in runs), *(run.steps for run in runs)),
        f"Alignment by {trainers}, with all recorded settings and {plural(sum(r.steps_done for r in runs), 'step')}.",
        "Adversarial testing, which a person must describe.",
    )


def documentation_current(evidence: Evidence) -> Finding | None:
    """A report that was drawn from a trail which already held everything that was trained."""
    newest = max(
        (index for run in run_facts(evidence)
         for index in (*_indices(run.models, run.weights, run.steps), *_ends([run]))), default=None,
    )  # fmt: skip
    reports = [
        (item, event) for item, event in evidence.of(ReportCreated) if newest is not None and event.size > newest
    ]
    if not reports:
        return None
    item, event = reports[-1]
    return Finding(
        (item.index,),
        f"The newest {event.format} report was drawn from {count(event.size)} entries, all trainings included.",
        "Whether the rest of the technical documentation is complete and up to date.",
    )


def data_sets(evidence: Evidence) -> Finding | None:
    """The data sets that entered runs."""
    found = evidence.of(DataBound)
    if not found:
        return None
    sources = _names([f"{event.role} ({event.provenance})" for _, event in found])
    return Finding(_indices(found), f"Data sets with columns and fingerprints: {sources}.", "")


def human_feedback(evidence: Evidence) -> Finding | None:
    """Human feedback that was recorded, annotation by annotation, and what is known of how it was gathered."""
    imports, found = evidence.of(AnnotationsImported), evidence.of(AnnotationRecorded)
    if not found:
        return None
    guidelines = _names([_guideline(event) for _, event in imports if event.guideline or event.guideline_digest])
    unknown = {name for _, event in imports for name, how in event.provenance.items() if how == "unknown"}
    words = (
        f"{plural(len(found), 'annotation')} in {plural(len(imports), 'import')}, each by a commitment of its own: "
        "what was compared, what was chosen and by whom stands in the vault."
    )
    gaps = ", ".join(words for name, words in _UNKNOWN.items() if name in unknown)
    return Finding(
        _indices(imports, found),
        words + (f" Guideline: {guidelines}." if guidelines else ""),
        "Cleaning, updating and combining afterwards, and whether a model was trained on just these"
        + (f"; not known of all of them: {gaps}." if gaps else "."),
    )


_UNKNOWN = {
    "annotator": "who gave them",
    "prompt": "the prompt",
    "shown": "the order in which responses were shown",
    "guideline": "the guideline",
    "made_at": "when they were made",
}


def _guideline(event: AnnotationsImported) -> str:
    digest = f"sha256 {short(event.guideline_digest)}" if event.guideline_digest else ""
    return " ".join(part for part in (event.guideline or "", digest) if part)


def configuration(evidence: Evidence) -> Finding | None:
    """Trainer, loss and settings."""
    found = tuple(pair for run in run_facts(evidence) for pair in run.trainers)
    if not found:
        return None
    return Finding(_indices(found), f"Settings of {_names([e.trainer for _, e in found])}.", "")


def models(evidence: Evidence) -> Finding | None:
    """Models and weights by digest."""
    runs = run_facts(evidence)
    entries = _indices(*(run.models for run in runs), *(run.weights for run in runs))
    return Finding(entries, "Base and final weights by digest.", "") if entries else None


def hardware(evidence: Evidence) -> Finding | None:
    """Hardware and times of runs."""
    runs = [run for run in run_facts(evidence) if run.environments]
    if not runs:
        return None
    entries = {*_indices(*(run.environments for run in runs)), *(run.item.index for run in runs), *_ends(runs)}
    return Finding(tuple(sorted(entries)), "Hardware seen in training, and when the runs began and ended.", "")


def compute(evidence: Evidence) -> Finding | None:
    """FLOP of trainings, counted or bounded, and device hours."""
    found = [one for one in compute_ledger(evidence).trainings if one.basis != "none"]
    if not found:
        return None
    timed = sum(one.device_hours is not None for one in found)
    bounded = sum(one.basis == "settings" for one in found)
    words = f"FLOP of {plural(len(found), 'training')} by column, with a band; device hours of {timed}."
    words += f" {bounded} bounded from public settings." if bounded else ""
    entries = tuple(sorted({index for one in found for index in one.entries}))
    return Finding(entries, words, "What was computed outside of this trail, such as the base model's own training.")


def energy(evidence: Evidence) -> Finding | None:
    """Energy that was read from counters."""
    found = [one for one in compute_ledger(evidence).trainings if one.kilowatt_hours]
    if not found:
        return None
    sources = _names([name for one in found for name in one.kilowatt_hours])
    return Finding(
        tuple(sorted(one.entry for one in found)),
        f"Energy of {plural(len(found), 'training')}, read from {sources}.",
        "Memory, fans and cooling, and what was used outside of this trail; other processes' share is in it.",
    )


def base_model(evidence: Evidence) -> Finding | None:
    """The base model by digest."""
    found = tuple(pair for run in run_facts(evidence) for pair in run.models if pair[1].role == "base")
    return Finding(_indices(found), "The base model's weights by digest.", "") if found else None


def privacy_bound(evidence: Evidence) -> Finding | None:
    """Differential privacy of training."""
    entries = sorted(i for run in run_facts(evidence) for spend in run.spends for i in spend.indices)
    released = sorted(item.index for item, _ in evidence.of(LabelsReleased))
    if not entries and released:
        return Finding(
            tuple(released), "A bound on what can be told of one preference label; texts are not bounded.", ""
        )
    if not entries:
        return None
    return Finding(tuple(entries), "A bound on what the model can reveal of one annotator or pair.", "")


def inventory(evidence: Evidence) -> Finding | None:
    """Digests of records, reports, cards and weights."""
    weights = tuple(pair for run in run_facts(evidence) for pair in run.weights)
    entries = _indices(evidence.of(RecordSealed), evidence.of(ReportCreated), evidence.of(CardCreated), weights)
    return Finding(entries, "Digests of records, reports, cards and weights.", "") if entries else None


def pseudonyms(evidence: Evidence) -> Finding | None:
    """Runs that were set to keep annotators' ids out of everything but the vault."""
    found = [run.item.index for run in run_facts(evidence)
             if run.spends and (run.started.privacy or {}).get("anonymize_annotators") is True]  # fmt: skip
    return Finding(tuple(found), "Annotators' ids were kept out of the trail.", "") if found else None


def evaluations(evidence: Evidence) -> Finding | None:
    """Evaluations of models that trainings of this trail left, with figures in the open."""
    done = [
        one for one in read_evaluations(evidence).done if not one.sealed and one.model.as_ in ("final", "checkpoint")
    ]
    if not done:
        return None
    metrics = _names([name for one in done for name in one.event.metrics])
    tools = _names([one.event.evaluator for one in done if one.event.evaluator])
    on_data = sum(one.event.data is not None for one in done)
    return Finding(
        tuple(sorted({index for one in done for index in one.entries})),
        f"{plural(len(done), 'evaluation')} of trained models, known by digest, with {metrics}; {on_data} of them on "
        f"data known by digest{f'; with {tools}' if tools else ''}.",
        "That these are all the tests that were made, how the figures came about, and why these metrics.",
    )


def thresholds_before(evidence: Evidence) -> Finding | None:
    """Figures that were held to a threshold which the trail holds from before they were known."""
    found = read_evaluations(evidence)
    judged = [(one, item) for one in found.done for item in one.judgements
              if item.outcome != "not judged" and item.order != "after result"
              and one.model.as_ in ("final", "checkpoint")]  # fmt: skip
    if not judged:
        return None
    met = sum(item.outcome == "met" for _, item in judged)
    first = sum(item.order == "before training" for _, item in judged)
    changed = sum(bool(item.changed) for _, item in judged)
    words = (
        f"{plural(len(judged), 'figure')} held to a threshold that an earlier entry sets: {met} met, "
        f"{len(judged) - met} not met; {first} of the thresholds set before the training's first step."
    )
    words += f" {changed} of them had been changed before." if changed else ""
    words += f" {plural(len(found.unused), 'threshold')} without an evaluation." if found.unused else ""
    return Finding(
        tuple(sorted({index for one, _ in judged for index in one.entries} | {one.entry for one in found.unused})),
        words,
        "That the thresholds suit the purpose, and that no other test was made.",
    )


QUERIES: dict[str, Query] = {
    query.__name__: query
    for query in (
        adaptation,
        architecture,
        base_model,
        compute,
        configuration,
        data_points,
        data_sets,
        development_steps,
        documentation_current,
        energy,
        evaluations,
        hardware,
        human_feedback,
        integrity,
        inventory,
        model_changes,
        models,
        privacy_bound,
        pseudonyms,
        software_versions,
        thresholds_before,
    )
}
"""Every evidence query by its name."""
