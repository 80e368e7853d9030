"""What a report says of one run: how it went, on what it ran, and what went in and came out. Floor 4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_audit_nb.compliance import words
from rlhf_audit_nb.compliance.evidence import cite
from rlhf_audit_nb.compliance.inputs import (
    code_note,
    code_text,
    commit_text,
    digest_texts,
    files_note,
    files_text,
)
from rlhf_audit_nb.reports.parts import Fact, Group, RunPart
from rlhf_audit_nb.reports.privacy import guarantee_fact

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlhf_audit_nb.compliance.evidence import Cite, Item
    from rlhf_audit_nb.compliance.facts import RunFacts
    from rlhf_audit_nb.events import (
        CellAudited,
        CodeFiles,
        DataBound,
        DataRead,
        EnvironmentCaptured,
        InputFiles,
        ModelBound,
        RunFailure,
        TrainerAttached,
        WeightsSaved,
    )

__all__ = ["lineage_group", "run_part", "run_sentence"]

KEY_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "opacus", "dp-accounting",
                "rlhf-audit-trail", "numpy")  # fmt: skip
EVALUATION = "evaluation"  # what a step's entry is noted as that a trainer's own evaluation left: no warning


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


def run_part(run: RunFacts, *, trusted: bool, earlier: Sequence[RunFacts] = ()) -> RunPart:
    """All that is said of a run and where it ran; what is the same as in an ``earlier`` run is not told twice."""
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
    facts += _step_notes(run)
    state = {"completed": "ok", "stopped-by-budget": "ok", "failed": "bad", "interrupted": "warn"}.get(run.status, "na")
    return RunPart(started.experiment, run.run, run.status, state, tuple(facts), _environment(run, earlier))


def _step_notes(run: RunFacts) -> list[Fact]:
    """The trainer's own evaluations, and what the steps warn of."""
    facts = []
    evaluated = [item.index for item, step in run.steps if EVALUATION in step.notes]
    if evaluated:
        times = words.plural(len(evaluated), "time")
        facts.append(Fact("Evaluated in training", f"{times}, by the trainer", cite(evaluated)))
    warned = [(item.index, note) for item, step in run.steps for note in step.notes if note != EVALUATION]
    if warned:
        said = "; ".join(sorted({note for _, note in warned}))
        facts.append(Fact("Warnings", said, cite({index for index, _ in warned})))
    return facts


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


def _environment(run: RunFacts, earlier: Sequence[RunFacts]) -> tuple[Fact, ...]:
    """The machine and the code of a run."""
    facts: list[Fact] = []
    for item, event in run.environments:
        same = next((one for other in earlier for one in other.environments if one[1] == event), None)
        facts += _environment_facts(item, event) if same is None else [_as_before(item, same[0], earlier)]
    if run.started.cell_digest:
        at = cite([run.item.index])
        facts.append(Fact("Code of the cell", f"sha256 {run.started.cell_digest}", at, mono=True))
    facts += [_code_fact("Imported or changed later", event.code, cite([item.index])) for item, event in run.code]
    return tuple(facts)


def _as_before(item: Item, same: Item, earlier: Sequence[RunFacts]) -> Fact:
    name = next(run.started.experiment for run in earlier if run.run == same.run)
    return Fact("Machine and code", f"in every field as recorded for {name}", cite([same.index, item.index]))


def _environment_facts(item: Item, event: EnvironmentCaptured) -> list[Fact]:
    at = cite([item.index])
    packages = event.packages
    key = [f"{name} {packages[name]}" for name in KEY_PACKAGES if name in packages]
    rest = len(packages) - len(key)
    more = f" and {words.plural(rest, 'other')}, each by version in the entry" if rest else ""
    threads = f"; threads: {event.threads}" if event.threads is not None else ""
    listed = f"their list, with a digest of each, sha256 {event.packages_digest}" if event.packages_digest else ""
    tool = f"this tool's own source sha256 {event.tool_digest}" if event.tool_digest else ""
    facts = [
        Fact("Interpreter", f"{event.implementation} {event.python} on {event.platform}", at),
        Fact("Packages", (", ".join(key) or "none of the usual ones") + more, at,
             note="; ".join(filter(None, (listed, tool)))),
        Fact("Hardware", words.hardware_text(event.hardware) + threads, at),
        _commit_fact(event, at),
    ]  # fmt: skip
    if event.code is not None:
        facts.append(_code_fact("Imported local code", event.code, at))
    for label, settings in (
        ("Drivers", event.drivers),
        ("Determinism", event.determinism),
        ("Variables", event.variables),
    ):
        if settings:
            said = ", ".join(f"{k}={words.plain_text(v)}" for k, v in sorted(settings.items()))
            facts.append(Fact(label, said, at, mono=True))
    return facts


def _commit_fact(event: EnvironmentCaptured, at: tuple[Cite, ...]) -> Fact:
    commit = event.git_commit
    if commit is None:
        folder = event.code is not None and event.code.project == "folder"
        return Fact("Code version", "in no repository" if folder else "not recorded", at)
    note = f"changes (git diff HEAD) sha256 {event.git_diff}" if event.git_diff else ""
    return Fact("Code version", commit + (" with uncommitted changes" if event.git_dirty else ""), at, True, note)


def _code_fact(label: str, code: CodeFiles, at: tuple[Cite, ...]) -> Fact:
    return Fact(label, code_text(code), at, note=code_note(code))


def lineage_group(run: RunFacts) -> Group:
    """The data, models and weights of a run."""
    facts = [fact for item, event in run.data for fact in _data_facts(item, event)]
    facts += [_read_fact(item, event) for item, event in run.reads]
    told: set[str] = set()
    facts += [fact for item, event in run.models for fact in _model_facts(item, event, told)]
    facts += [_weights_fact(item, event) for item, event in run.weights]
    return Group(run.started.experiment, tuple(facts))


def _data_facts(item: Item, event: DataBound) -> list[Fact]:
    if event.rows is not None:
        amount = words.plural(event.rows, "row")
    elif event.units is not None:
        amount = f"{words.plural(event.units, event.unit or 'unit')}, number of rows sealed"
    else:
        amount = "number of rows not stated"
    sealed = "digest sealed in the vault" if item.sealed else "no digest"
    digest = f"sha256 {event.digest}" if event.digest else sealed
    value = f"{event.source or 'source not stated'}: {amount}; columns {', '.join(event.columns)}"
    library = f"fingerprint {event.fingerprint}" if event.fingerprint else ""
    parts = (digest, f"provenance {event.provenance}", commit_text(event.revision), library)
    facts = [Fact(f"Data, {event.role}", value, cite([item.index]), note="; ".join(filter(None, parts)))]
    return facts + _files_fact(f"Data, {event.role}: read from", item, event.files)


def _read_fact(item: Item, event: DataRead) -> Fact:
    value = f"{words.plural(event.batches, 'batch', 'batches')} of the stream, {words.plural(event.rows, 'row')}"
    return Fact(f"Data, {event.role}: as trained on", value, cite([item.index]), note=f"sha256 {event.digest}")


def _files_fact(label: str, item: Item, files: InputFiles | None, weights: str | None = None) -> list[Fact]:
    if files is None:
        return []
    return [Fact(label, files_text(files), cite([item.index]), note=files_note(files, weights))]


def _model_facts(item: Item, event: ModelBound, told: set[str]) -> list[Fact]:
    """A model, what it was loaded from, and those of its digests that are not ``told`` of an earlier one."""
    at = cite([item.index])
    value = f"{event.name or 'no name recorded'}: {event.architecture}, {words.count(event.parameters)} parameters"
    adapter = f"adapter {words.adapter_text(event.adapter)}" if event.adapter else ""
    packed = f"quantized: {words.plain_text(event.quantization)}" if event.quantization else ""
    parts = (f"weights sha256 {event.weights_digest}", commit_text(event.revision), adapter, packed)
    facts = [Fact(f"Model, {event.role}", value, at, note="; ".join(filter(None, parts)))]
    facts += _files_fact(f"Model, {event.role}: loaded from", item, event.files, event.weights_digest)
    new = [text for text in digest_texts(event) if text not in told]
    told.update(new)
    if new:
        facts.append(Fact(f"Model, {event.role}: tokenizer and settings", "; ".join(new), at, mono=True))
    return facts


def _weights_fact(item: Item, event: WeightsSaved) -> Fact:
    signed = "not signed"
    if event.signature_digest:
        signed = f"OpenSSF model signature sha256 {event.signature_digest}"
    after = f" after step {words.count(event.step)}" if event.step is not None else ""
    value = f"{event.name}{after}: {words.plural(event.files, 'file')}, {words.size_text(event.bytes)}"
    return Fact("Weights saved", value, cite([item.index]), note=f"sha256 {event.digest}; {signed}")
