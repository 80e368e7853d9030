"""What a report says of one run: how it went, on what it ran, and what went in and came out. Floor 4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_audit_nb.compliance import words
from rlhf_audit_nb.compliance.evidence import cite
from rlhf_audit_nb.reports.parts import Fact, Group, RunPart
from rlhf_audit_nb.reports.privacy import guarantee_fact

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.evidence import Item
    from rlhf_audit_nb.compliance.facts import RunFacts
    from rlhf_audit_nb.events import (
        CellAudited,
        DataBound,
        EnvironmentCaptured,
        ModelBound,
        RunFailure,
        TrainerAttached,
        WeightsSaved,
    )

__all__ = ["lineage_group", "run_part", "run_sentence"]

KEY_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "opacus", "dp-accounting",
                "rlhf-audit-trail", "numpy")  # fmt: skip


def run_sentence(run: RunFacts) -> Fact:
    """One sentence on a run."""
    trained = run.trainers[-1] if run.trainers else None
    indices = [run.item.index]
    if trained is None:
        text = "nothing was trained"
    else:
        indices.append(trained[0].index)
        text = f"{trained[1].trainer} took {words.plural(run.steps_done, 'optimizer step')}"
        model = run.model("final") or run.model("base")
        if model:
            indices.append(model[0].index)
            text += f" on {model[1].architecture} ({words.count(model[1].trainable)} of "
            text += f"{words.count(model[1].parameters)} parameters)"
    if run.finished:
        indices.append(run.finished[0].index)
    if run.spends and run.guarantee == "bound":
        spend = run.spends[-1]
        indices += spend.indices
        text += f", with differential privacy per {spend.reserved.unit}"
    elif run.guarantee == "inherited":
        indices += [item.index for item, _ in run.inherited]
        text += "; it inherits the privacy of the models that it learnt from, and charged nothing"
    elif run.guarantee == "none":
        text += f", {words.NO_BOUND}"
    elif run.guarantee == "asked":
        text += ", differential privacy was asked for but no bound can be stated"
    return Fact(run.started.experiment, f"{text}. The run {_status_words(run)}.", cite(indices))


def _status_words(run: RunFacts) -> str:
    return {
        "completed": "was completed",
        "failed": "failed",
        "interrupted": "was interrupted",
        "stopped-by-budget": "was stopped before the step that would have crossed the privacy budget",
        "open": "was not closed when this was drawn",
    }.get(run.status, f"ended with status {run.status}")


def run_part(run: RunFacts, *, trusted: bool) -> RunPart:
    """All that is said of a run and where it ran."""
    started, at = run.started, cite([run.item.index])
    facts = [
        Fact("Experiment", started.experiment, at),
        Fact("Opened", words.time_text(run.item.time), at, note=f"by a {started.entry_point}, with {started.tool}"),
    ]
    if started.parent:
        facts.append(Fact("Opened inside", f"run {started.parent}", at))
    facts += [_cell_fact(item, event) for item, event in run.cells]
    if run.finished:
        item, event = run.finished
        note = event.reason or ""
        facts.append(Fact("Closed", words.time_text(item.time), cite([item.index]), note=note))
        if event.unrecorded_steps:
            seen = words.plural(event.unrecorded_steps, "optimizer step")
            facts.append(Fact("Not recorded", f"{seen} outside of a recorded training", cite([item.index])))
    elif run.interrupted:
        facts.append(Fact("Found interrupted", words.time_text(run.interrupted[0].time),
                          cite([run.interrupted[0].index])))  # fmt: skip
    facts += [_failure_fact(item, event) for item, event in run.failures]
    if started.declared_model:
        facts.append(Fact("Model, as declared", started.declared_model, at, note="a declaration, not an observation"))
    facts += guarantee_fact(run, at, trusted=trusted)
    facts += [fact for item, event in run.trainers for fact in _trainer_facts(item, event)]
    notes = sorted({note for _, step in run.steps for note in step.notes})
    if notes:
        where = cite(item.index for item, step in run.steps if step.notes)
        facts.append(Fact("Warnings", "; ".join(notes), where))
    environment = tuple(fact for item, event in run.environments for fact in _environment_facts(item, event))
    state = {"completed": "ok", "stopped-by-budget": "ok", "failed": "bad", "interrupted": "warn"}.get(run.status, "na")
    return RunPart(started.experiment, run.run, run.status, state, tuple(facts), environment)


def _cell_fact(item: Item, event: CellAudited) -> Fact:
    """Which cell opened the run, and what is worth knowing of how it came to run."""
    name = f"In [{event.execution_count}]" if event.execution_count is not None else "not numbered"
    said = {
        "first": "audited for the first time",
        "rerun": f"audited before with the same source, last in #{event.seen_in}",
        "edited": f"edited since it was audited in #{event.seen_in}",
    }.get(event.seen, event.seen)
    before = (
        "what ran before it is sealed" if item.sealed else f"{words.plural(event.executed_total, 'cell')} before it"
    )
    known = f"id {event.cell}; " if event.cell else ""
    return Fact("Cell", f"{name}: {said}", cite([item.index]), note=f"{known}{before} in this kernel")


def _failure_fact(item: Item, event: RunFailure) -> Fact:
    """The exception that ended the run, and the last place that is not a library's."""
    own = [frame for frame in event.frames if frame.role in ("cell", "script", "module")]
    place = f"{own[-1].where}, line {own[-1].line}, in {own[-1].function}" if own else ""
    sealed = "what it said is sealed" + ("" if event.frames else ", and so is where it came from")
    return Fact("Ended by", f"{event.kind}{f' in {place}' if place else ''}", cite([item.index]),
                note=f"{event.category}; {sealed}")  # fmt: skip


def _trainer_facts(item: Item, event: TrainerAttached) -> list[Fact]:
    at = cite([item.index])
    loss = f", loss {event.loss}" if event.loss else ""
    settings = ", ".join(f"{k}={words.plain_text(v)}" for k, v in sorted(event.hyperparameters.items()))
    planned = f", {words.plural(event.max_steps, 'step')} planned" if event.max_steps else ""
    facts = [Fact("Trainer", f"{event.trainer}{loss}{planned}", at,
                  note="" if event.seed is None else f"seed {event.seed}")]  # fmt: skip
    if settings:
        facts.append(Fact("Settings", settings, at, mono=True))
    return facts


def _environment_facts(item: Item, event: EnvironmentCaptured) -> list[Fact]:
    at = cite([item.index])
    packages = event.packages
    key = [f"{name} {packages[name]}" for name in KEY_PACKAGES if name in packages]
    rest = len(packages) - len(key)
    more = f" and {words.plural(rest, 'other')}, each by version in the entry" if rest else ""
    hardware = words.hardware_text(event.hardware)
    commit = event.git_commit or "not recorded"
    if event.git_commit and event.git_dirty:
        commit += " with uncommitted changes"
    facts = [
        Fact("Interpreter", f"{event.implementation} {event.python} on {event.platform}", at),
        Fact("Packages", (", ".join(key) or "none of the usual ones") + more, at),
        Fact("Hardware", hardware, at),
        Fact("Code version", commit, at, mono=bool(event.git_commit)),
    ]
    if event.determinism:
        settings = ", ".join(f"{k}={words.plain_text(v)}" for k, v in sorted(event.determinism.items()))
        facts.append(Fact("Determinism", settings, at, mono=True))
    return facts


def lineage_group(run: RunFacts) -> Group:
    """The data, models and weights of a run."""
    facts = [_data_fact(item, event) for item, event in run.data]
    facts += [_model_fact(item, event) for item, event in run.models]
    facts += [_weights_fact(item, event) for item, event in run.weights]
    return Group(run.started.experiment, tuple(facts))


def _data_fact(item: Item, event: DataBound) -> Fact:
    if event.rows is not None:
        amount = words.plural(event.rows, "row")
    elif event.units is not None:
        amount = f"{words.plural(event.units, event.unit or 'unit')}, number of rows sealed"
    else:
        amount = "number of rows not stated"
    sealed = "digest sealed in the vault" if item.sealed else "no digest"
    digest = f"sha256 {event.digest}" if event.digest else sealed
    value = f"{event.source or 'source not stated'}: {amount}; columns {', '.join(event.columns)}"
    note = f"{digest}; provenance {event.provenance}"
    return Fact(f"Data, {event.role}", value, cite([item.index]), note=note)


def _model_fact(item: Item, event: ModelBound) -> Fact:
    value = f"{event.name or 'no name recorded'}: {event.architecture}, {words.count(event.parameters)} parameters"
    adapter = f"; adapter {words.adapter_text(event.adapter)}" if event.adapter else ""
    note = f"weights sha256 {event.weights_digest}{adapter}"
    return Fact(f"Model, {event.role}", value, cite([item.index]), note=note)


def _weights_fact(item: Item, event: WeightsSaved) -> Fact:
    signed = "not signed"
    if event.signature_digest:
        signed = f"OpenSSF model signature sha256 {event.signature_digest}"
    after = f" after step {words.count(event.step)}" if event.step is not None else ""
    value = f"{event.name}{after}: {words.plural(event.files, 'file')}, {words.size_text(event.bytes)}"
    return Fact("Weights saved", value, cite([item.index]), note=f"sha256 {event.digest}; {signed}")
