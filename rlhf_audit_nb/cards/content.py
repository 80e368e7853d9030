"""What a model card says, as data: sections of fields, each with the entries that it rests on. Floor 4.

A field whose value the trail does not hold is *not stated*: nothing is guessed, and nothing is taken from outside.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.compliance import words
from rlhf_audit_nb.compliance.assess import State, assess
from rlhf_audit_nb.compliance.compute import compute_ledger
from rlhf_audit_nb.compliance.evidence import Cite, cite
from rlhf_audit_nb.compliance.facts import composed_privacy, run_facts
from rlhf_audit_nb.compliance.framework import load_framework
from rlhf_audit_nb.compliance.inputs import code_text, commit_text, digest_texts, files_note, files_text
from rlhf_audit_nb.compliance.thresholds import evaluations
from rlhf_audit_nb.events import PrivacyChecked, PrivacyPopulation
from rlhf_audit_nb.records.attesting import signed_by

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlhf_audit_nb.compliance.assess import Assessment
    from rlhf_audit_nb.compliance.evidence import Evidence, Item
    from rlhf_audit_nb.compliance.facts import RunFacts, Spend
    from rlhf_audit_nb.compliance.thresholds import Evaluated
    from rlhf_audit_nb.events import EnvironmentCaptured, ModelBound, PrivacyInherited

__all__ = ["NOT_STATED", "CardContent", "Field", "Section", "card_content"]

NOT_STATED = "not stated"
KEY_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "rlhf-audit-trail")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9]")


@dataclass(frozen=True)
class Field:
    """One thing that a card says, and the entries that show it; ``where`` names the point of the law it answers."""

    label: str
    value: str
    cites: tuple[Cite, ...] = ()
    where: str = ""

    @property
    def stated(self) -> bool:
        """Whether the trail holds it."""
        return self.value != NOT_STATED

    def to_dict(self) -> dict[str, Any]:
        """Plain values; a field that is not stated has ``None`` for its value."""
        return {
            "label": self.label,
            "value": self.value if self.stated else None,
            "entries": [[one.first, one.last] for one in self.cites],
            "answers": self.where,
        }


@dataclass(frozen=True)
class Section:
    """A heading and its fields."""

    title: str
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class CardContent:
    """Everything a card may say, whatever its layout."""

    title: str
    level: str
    trusted: bool
    shows: str
    not_shown: str
    law: str
    framework_digest: str
    assessment: str
    general: Section
    development: Section
    data: Section
    privacy: Section
    evaluation: Section
    risks: Section
    provenance: Section
    run: str
    private: bool
    trainer: str
    adapter: bool
    base_model: str
    hub_base: str
    hub_datasets: tuple[str, ...]
    audit: dict[str, Any]

    def sections(self, *, include_provenance: bool) -> tuple[Section, ...]:
        """The sections in order."""
        always = (self.general, self.development, self.data, self.privacy, self.evaluation, self.risks)
        return (*always, self.provenance) if include_provenance else always


def card_content(evidence: Evidence) -> CardContent:
    """What the evidence lets a card say about the newest run that made a model."""
    runs = run_facts(evidence)
    run = _described(runs)
    assessment = assess(evidence, load_framework("eu_ai_act"))
    level = words.level_words(evidence.level)
    final = None if run is None else (run.model("final") or run.model("base"))
    base = None if run is None else run.model("base")
    name = base[1].name or "" if base else ""
    private = run is not None and run.guarantee == "bound"
    sources = [event.source for _, event in run.data if event.source] if run else []
    return CardContent(
        title=run.started.experiment if run else "No model",
        level=evidence.level,
        trusted=evidence.trusted,
        shows=level.shows,
        not_shown=level.not_shown,
        law=f"{assessment.framework.law}, text {assessment.framework.text_version}",
        framework_digest=assessment.framework.digest,
        assessment=_assessment_words(assessment),
        general=_general(evidence, run, final),
        development=_development(evidence, run),
        data=_data(run),
        privacy=_privacy(evidence, runs, run),
        evaluation=_evaluation(evidence, run),
        risks=_risks(),
        provenance=_provenance(evidence, run),
        run=run.run if run else "",
        private=private and evidence.trusted,
        trainer=run.trainers[-1][1].trainer if run and run.trainers else "",
        adapter=any(event.adapter for _, event in run.models) if run else False,
        base_model=name,
        hub_base=name if _HUB_NAME.fullmatch(name) else "",
        hub_datasets=tuple(dict.fromkeys(source for source in sources if _HUB_NAME.fullmatch(source))),
        audit=_audit(evidence, run),
    )


def _described(runs: tuple[RunFacts, ...]) -> RunFacts | None:
    """The newest run that made a model, else the newest that trained, else the newest."""
    made = [run for run in runs if run.model("final") or run.weights]
    trained = [run for run in runs if run.trainers]
    return next((some[-1] for some in (made, trained, list(runs)) if some), None)


def _assessment_words(assessment: Assessment) -> str:
    counts = {state: assessment.count(state) for state in State}
    return (
        f"{counts[State.EVIDENCED]} of {len(assessment.lines)} requirements evidenced ({assessment.partial} of them in "
        f"part), {counts[State.ATTESTED]} attested, {counts[State.MISSING]} missing, "
        f"{counts[State.NOT_APPLICABLE]} not applicable to a training trail"
    )


def _missing(*labels: tuple[str, str]) -> tuple[Field, ...]:
    return tuple(Field(label, NOT_STATED, where=where) for label, where in labels)


def _general(evidence: Evidence, run: RunFacts | None, final: tuple[Item, ModelBound] | None) -> Section:
    fields: list[Field] = []
    if run:
        fields.append(Field("Experiment", run.started.experiment, cite([run.item.index])))
        declared = run.started.declared_model or NOT_STATED
        fields.append(Field("Model, as declared", declared, cite([run.item.index]) if declared != NOT_STATED else ()))
    where = "Annex XI, Section 1, 1(d)"
    if final:
        item, event = final
        text = f"{event.architecture}, {words.count(event.parameters)} parameters"
        fields.append(Field("Architecture and parameters", text, cite([item.index]), where))
    else:
        fields.append(Field("Architecture and parameters", NOT_STATED, where=where))
    fields += _missing(
        ("Provider and contact", "Annex IV 1(a)"),
        ("Tasks and intended purpose", "Annex XI, Section 1, 1(a)"),
        ("Acceptable use", "Annex XI, Section 1, 1(b)"),
        ("Release date and distribution", "Annex XI, Section 1, 1(c)"),
        ("Input and output modalities", "Annex XI, Section 1, 1(e)"),
        ("Licence", "Annex XI, Section 1, 1(f)"),
    )
    if evidence.trusted and evidence.origin_kind == "record":
        fields += [
            Field(f"Signed, {item.meaning}", f"{item.in_words}; {standing}")
            for item, standing in signed_by(evidence, evidence.people)
            if item.replaced_by is None
        ]
    return Section("General description", tuple(fields))


def _development(evidence: Evidence, run: RunFacts | None) -> Section:
    fields: list[Field] = []
    where = "Annex IV 2(a); Annex XI, Section 1, 2(b)"
    base = run.model("base") if run else None
    if base:
        at, model = base
        commit = f", {commit_text(model.revision)}" if model.revision else ""
        text = f"{model.name or 'name not recorded'}{commit}, weights sha256 {model.weights_digest}"
        fields.append(Field("Base model", text, cite([at.index]), where))
        if model.files is not None:
            text = f"{files_text(model.files)}; {files_note(model.files, model.weights_digest)}"
            fields.append(Field("Files of the base model", text, cite([at.index]), where))
        fields.append(
            Field("Tokenizer and settings of the base model", "; ".join(digest_texts(model)), cite([at.index]), where)
        )
    for item, event in run.trainers if run else ():
        loss = f", loss {event.loss}" if event.loss else ""
        fields.append(Field("Method", f"{event.trainer}{loss}", cite([item.index]), where))
        settings = ", ".join(f"{key}={words.plain_text(value)}" for key, value in sorted(event.hyperparameters.items()))
        fields.append(Field("Settings", settings or NOT_STATED, cite([item.index]), where))
    if run and run.finished:
        steps = f"{words.plural(run.finished[1].steps, 'optimizer step')}; {run.status}"
        fields.append(Field("Steps", steps, cite([run.finished[0].index]), where))
    for item, env in run.environments if run else ():
        known = ", ".join(f"{name} {env.packages[name]}" for name in KEY_PACKAGES if name in env.packages)
        software = f"{env.implementation} {env.python}" + (f", {known}" if known else "")
        fields.append(Field("Software", software, cite([item.index]), "Annex IV 1(c)"))
        fields.append(Field("Code", _code(env), cite([item.index]), "Annex IV 1(c)"))
        fields.append(Field("Hardware of training", words.hardware_text(env.hardware), cite([item.index])))
    if not fields:
        fields += _missing(("Method and steps", where))
    fields += _missing(("Reasons for the choices", "Annex IV 2(b)"))
    return Section("Development", (*fields, *_compute(evidence, run)))


def _code(env: EnvironmentCaptured) -> str:
    """The commit and the imported local files."""
    commit = f"commit {env.git_commit}{' with uncommitted changes' if env.git_dirty else ''}" if env.git_commit else ""
    local = f"imported: {code_text(env.code)}" if env.code is not None else ""
    local += f"; list sha256 {env.code.digest}" if env.code is not None and env.code.count else ""
    return "; ".join(filter(None, (commit, local))) or NOT_STATED


def _compute(evidence: Evidence, run: RunFacts | None) -> Iterator[Field]:
    """FLOP, device hours and energy of the run's trainings."""
    where, of_energy = "Annex IV 2(c); Annex XI, Section 1, 2(d)", "Annex XI, Section 1, 2(e)"
    own = [one for one in compute_ledger(evidence).trainings if run is not None and one.run == run.run]
    for one in own:
        hours = f"; {one.device_hours:.3g} device hours" if one.device_hours is not None else ""
        sampled = f"; generation {one.generation.words} FLOP" if one.generation.high else ""
        text = f"{one.trainer}: update {one.update.words} FLOP{sampled}{hours}"
        yield Field("Compute", text if one.basis != "none" else NOT_STATED, cite(one.entries), where)
    used = [(one, source, amount) for one in own for source, amount in one.kilowatt_hours.items()]
    for one, source, amount in used:
        yield Field("Energy", f"{amount:.3g} kWh, read from {source}", cite([one.entry]), of_energy)
    if not own:
        yield Field("Compute", NOT_STATED, where=where)
    if not used:
        yield Field("Energy", NOT_STATED, where=of_energy)


def _data(run: RunFacts | None) -> Section:
    fields: list[Field] = []
    for item, event in run.data if run else ():
        if event.rows is not None:
            amount = words.plural(event.rows, "row")
        elif event.units is not None:
            amount = f"{words.plural(event.units, event.unit or 'unit')}, number of rows sealed"
        else:
            amount = "amount not stated"
        text = f"{event.source or 'source not stated'}; {amount}; columns {', '.join(event.columns)}; provenance "
        fields.append(
            Field(f"Data set, {event.role}", text + event.provenance, cite([item.index]), "Annex XI, Section 1, 2(c)")
        )
    if not fields:
        fields += _missing(("Data sets", "Annex XI, Section 1, 2(c)"))
    fields += _missing(
        ("How the data were obtained and selected", "Annex IV 2(d)"),
        ("Labelling: guidelines, annotators, pay", "Annex IV 2(d)"),
        ("Cleaning and filtering", "Annex IV 2(d)"),
        ("What the preferences are assumed to measure", "Art. 10(2)(d)"),
        ("Examination for bias", "Art. 10(2)(f)"),
    )
    return Section("Data", tuple(fields))


def _privacy(evidence: Evidence, runs: tuple[RunFacts, ...], run: RunFacts | None) -> Section:
    title = "Privacy of the people in the data"
    if run is None or run.guarantee == "untrained":
        return Section(title, (Field("Differential privacy", "nothing was trained"),))
    at = cite([run.item.index])
    if run.guarantee == "none":
        return Section(title, (Field("Differential privacy", words.NO_BOUND, at),))
    if run.guarantee == "inherited" and evidence.trusted:
        return Section(title, tuple(_inherited(item.index, event) for item, event in run.inherited))
    if run.guarantee == "asked":
        return Section(title, (Field("Differential privacy", "asked for, but no bound can be stated", at),))
    if not evidence.trusted:
        return Section(title, (Field("Differential privacy", "recorded, but the trail does not verify", at),))
    composed = composed_privacy(runs, rosters=evidence.of(PrivacyPopulation))
    fields = list(_spend(run.spends[-1], several=composed.populations > 1))
    if composed.whose:
        fields.append(Field("Populations", f"the trail's largest ε is that of {composed.whose}"))
    if composed.unbounded_runs:
        fields.append(
            Field("Other runs of this trail", f"{words.plural(composed.unbounded_runs, 'run')} {words.NO_BOUND}")
        )
    fields += [
        Field("Canaries", words.canary_words(event), cite([item.index]))
        for item, event in filter(None, (spend.audited for spend in run.spends))
    ]
    fields += [_checked(item.index, event) for item, event in evidence.of(PrivacyChecked)[-1:]]
    return Section(title, tuple(fields))


def _checked(index: int, event: PrivacyChecked) -> Field:
    """The mechanism's last check of itself, with what it cannot show."""
    lower, claimed = words.number_text(event.epsilon_lower), words.epsilon_text(event.epsilon_claimed)
    shown = (
        f"; an attack showed at least ε {lower} of the {claimed} claimed for what was attacked "
        f"({100 * event.confidence:g} % of confidence), which is no proof of privacy"
    )
    said = "passed" if event.outcome == "passed" else "did not pass"
    return Field("Check of the mechanism", f"{said}{shown if event.canaries else ''}", cite([index]))


def _inherited(index: int, event: PrivacyInherited) -> Field:
    runs = ", ".join(sorted({str(source["run"]) for source in event.sources if source.get("run")}))
    value = (
        f"inherits ε = {words.epsilon_text(event.epsilon)}, δ = {words.delta_text(event.delta)}, per {event.unit}"
        f"{f', from run {runs}' if runs else ''}; nothing was charged"
    )
    if event.kind == "released-labels" and event.note:
        value += f". {event.note}"
    return Field("Differential privacy", value, cite([index]))


def _spend(spend: Spend, *, several: bool) -> tuple[Field, ...]:
    reserved = spend.reserved
    at = cite(spend.indices)
    state = "spent" if spend.settled else "reserved in full, not settled"
    over = "all private runs of the same population so far" if several else "all private runs so far"
    bound = (
        f"ε = {words.epsilon_text(spend.total)} ({state}), δ = {words.delta_text(reserved.delta)}, budget "
        f"{words.number_text(reserved.epsilon_budget)}, per {reserved.unit}, {reserved.adjacency} adjacency, composed "
        f"over {over}"
    )
    mechanism = (
        f"{reserved.mechanism}: noise multiplier {words.number_text(reserved.noise_multiplier)}, sampling rate "
        f"{words.number_text(reserved.sampling_rate)}, {words.plural(spend.steps, 'step')}, clipping norm "
        f"{words.number_text(reserved.clipping_norm)}, at most {words.plural(reserved.max_pairs_per_unit, 'pair')} of "
        + ("a unit kept, sampled one by one" if reserved.sampled == "pairs" else "a unit in a step")
    )
    figures = ", ".join(
        f"{name} {words.epsilon_text(value, 4)}" for name, value in sorted(reserved.accountants.items())
    )
    roster = f"{words.plural(reserved.units, reserved.unit)}; the roster is public, what each gave is protected"
    return (
        Field("Differential privacy", bound, at),
        Field("Roster", roster, cite([spend.item.index])),
        Field("Mechanism", mechanism, at),
        Field("Accountants, planned total", figures, cite([spend.item.index])),
    )


def _evaluation(evidence: Evidence, run: RunFacts | None) -> Section:
    """What was tested of the model that the card is about, each figure with what was set for it before."""
    where = "Annex IV 2(g)"
    fields = [
        Field(f"{name}, on {_tested_on(one)}", _tested(one, name), cite(one.entries), where)
        for one in evaluations(evidence).done
        if run is not None and one.model.run == run.run and one.model.as_ == "final"
        for name in one.event.metrics
    ]
    return Section("Evaluation", tuple(fields) or (Field("Tests, metrics and results", NOT_STATED, where=where),))


def _tested_on(one: Evaluated) -> str:
    if one.sealed:
        return "data that is sealed"
    name = one.event.data_name or ("data without a name" if one.event.data else "data that is not stated")
    return f"{name} ({words.plural(one.event.samples, 'sample')})" if one.event.samples is not None else name


def _tested(one: Evaluated, name: str) -> str:
    value = one.figure(name).removeprefix(f"{name} ")
    judged = [item.words for item in one.judgements if item.metric == name] or ["no threshold"]
    return "; ".join([value, *judged, *one.problems])


def _risks() -> Section:
    return Section(
        "Limits, risks and oversight",
        _missing(
            ("Known limits and failure modes", "Annex IV 3(a)"),
            ("Foreseeable unintended outcomes", "Annex IV 3(b)"),
            ("Human oversight in use", "Art. 14; Annex IV 2(e)"),
            ("Cybersecurity", "Annex IV 2(h)"),
        ),
    )


def _provenance(evidence: Evidence, run: RunFacts | None) -> Section:
    verdict = evidence.verdict
    fields = [
        Field("Trail", f"{verdict.origin or NOT_STATED}, size {words.count(verdict.size)}"),
        Field("Root", verdict.root or NOT_STATED),
        Field("Verdict", evidence.level),
    ]
    if run is None:
        return Section("Provenance", tuple(fields))
    fields.append(Field("Run", run.run, cite([run.item.index])))
    for item, data in run.data:
        digest = f"sha256 {data.digest}" if data.digest else "sealed in the vault" if item.sealed else NOT_STATED
        fields.append(Field(f"Data digest, {data.role}", digest, cite([item.index])))
    for item, model in run.models:
        fields.append(Field(f"Weights digest, {model.role}", f"sha256 {model.weights_digest}", cite([item.index])))
    for item, saved in run.weights:
        signed = f"model signature sha256 {saved.signature_digest}" if saved.signature_digest else "not signed"
        fields.append(Field(f"Saved as {saved.name}", f"sha256 {saved.digest}; {signed}", cite([item.index])))
    if run.steps:
        fields.append(Field("Steps recorded", words.count(len(run.steps)), cite(item.index for item, _ in run.steps)))
    return Section("Provenance", tuple(fields))


def _audit(evidence: Evidence, run: RunFacts | None) -> dict[str, Any]:
    """The provenance as a small block of plain values, for metadata."""
    verdict = evidence.verdict
    block: dict[str, Any] = {
        "verdict": evidence.level,
        "trail": verdict.origin,
        "size": verdict.size,
        "root": verdict.root,
    }
    if run is None:
        return block
    block["run"] = run.run
    final = run.model("final")
    if final:
        block["weights_sha256"] = final[1].weights_digest
    if run.guarantee == "inherited" and evidence.trusted:
        item, event = run.inherited[-1]
        block["differential_privacy"] = {
            "inherited": True,
            "epsilon": event.epsilon,
            "delta": event.delta,
            "unit": event.unit,
            "entries": [item.index],
        }
        return block
    if run.guarantee != "bound" or not evidence.trusted:
        block["differential_privacy"] = {"none": words.NO_BOUND}.get(run.guarantee, "no bound can be stated")
        return block
    spend = run.spends[-1]
    block["differential_privacy"] = {
        "epsilon": spend.total,
        "delta": spend.reserved.delta,
        "unit": spend.reserved.unit,
        "adjacency": spend.reserved.adjacency,
        "settled": spend.settled is not None,
        "entries": list(spend.indices),
    }
    if any(one.contradicted for one in run.spends):
        block["differential_privacy"]["contradicted_by_canaries"] = True
    return block
