"""What a report says, as data: the one model that the HTML and the PDF template draw. Floor 4.

`build_report` is a pure function of `Evidence`: no clock, no path, no vault. Every claim carries the entries that it
rests on (`Cite`); `ReportModel.evidence` lists each of them with its leaf hash. What the trail does not hold is said
to be missing, and nothing is made up in its place.
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.compliance import words
from rlhf_audit_nb.compliance.assess import Assessment, Line, State, assess
from rlhf_audit_nb.compliance.evidence import Cite, cite
from rlhf_audit_nb.compliance.facts import composed_privacy, origin_of, run_facts
from rlhf_audit_nb.compliance.framework import load_framework
from rlhf_audit_nb.events import RecordSealed, RecordStarted
from rlhf_audit_nb.reports import figures
from rlhf_audit_nb.reports.cells import Cell, cells_of

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.evidence import Evidence, Item
    from rlhf_audit_nb.compliance.facts import Composed, RunFacts, Spend
    from rlhf_audit_nb.events import DataBound, ModelBound, WeightsSaved
    from rlhf_audit_nb.reports.figures import Figure

__all__ = [
    "EvidenceRow",
    "Fact",
    "Group",
    "PrivacyPart",
    "ReportModel",
    "RunPart",
    "Tile",
    "build_report",
    "evidence_bundle",
]

MAX_FIGURE_RUNS = 3
KEY_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "opacus", "dp-accounting",
                "rlhf-audit-trail", "numpy")  # fmt: skip
Cites = tuple[Cite, ...]


@dataclass(frozen=True)
class Fact:
    """One thing and what stands for it; ``mono`` marks digests and names of code."""

    label: str
    value: str
    cites: Cites = ()
    mono: bool = False
    note: str = ""


@dataclass(frozen=True)
class Tile:
    """A number large, its meaning under it."""

    value: str
    label: str
    state: str = ""
    cites: Cites = ()


@dataclass(frozen=True)
class Group:
    """A table of facts under a heading."""

    title: str
    facts: tuple[Fact, ...]
    words: str = ""


@dataclass(frozen=True)
class PrivacyPart:
    """The privacy statement of one run: in words, and figure by figure."""

    title: str
    state: str
    headline: str
    words: str
    cites: Cites
    facts: tuple[Fact, ...] = ()


@dataclass(frozen=True)
class RunPart:
    """One run: what it was, on what, with what result."""

    title: str
    run: str
    status: str
    state: str
    facts: tuple[Fact, ...]
    environment: tuple[Fact, ...]


@dataclass(frozen=True)
class EvidenceRow:
    """One cited entry."""

    index: int
    kind: str
    time: str
    run: str
    leaf_hash: str
    sealed: bool
    stretch: str = ""


@dataclass(frozen=True)
class ReportModel:
    """Everything a report says. `to_dict` gives plain values, safe to print (see `words.visible`)."""

    title: str
    subtitle: str
    language: str
    dated: str
    timestamp: int
    law: str
    level: str
    level_state: str
    trusted: bool
    shows: str
    not_shown: str
    reasons: tuple[Fact, ...]
    integrity: tuple[Fact, ...]
    tiles: tuple[Tile, ...]
    summary: tuple[Fact, ...]
    privacy_words: str
    privacy_state: str
    privacy_cites: Cites
    privacy: tuple[PrivacyPart, ...]
    runs: tuple[RunPart, ...]
    lineage: tuple[Group, ...]
    figures: tuple[Figure, ...]
    assessment: Assessment
    cells: tuple[Cell, ...]
    threats: tuple[str, ...]
    limits: tuple[str, ...]
    evidence: tuple[EvidenceRow, ...]
    footer: str

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, with everything invisible or deceptive in its texts made visible."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "assessment"}
        plain = {name: _plain(value) for name, value in fields.items()}
        return {**plain, "assessment": _visible_all(_assessment_dict(self.assessment))}


_VERBATIM = frozenset({"svg", "data"})


def _visible_all(value: Any) -> Any:
    if isinstance(value, str):
        return words.visible(value)
    if isinstance(value, dict):
        return {str(k): v if k in _VERBATIM else _visible_all(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_visible_all(v) for v in value]
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Cite):
        return {**asdict(value), "text": value.text}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "__dataclass_fields__"):
        return {
            name: getattr(value, name) if name in _VERBATIM else _plain(getattr(value, name))
            for name in value.__dataclass_fields__
        }
    return _visible_all(value)


def _assessment_dict(assessment: Assessment) -> dict[str, Any]:
    plain = assessment.to_dict()
    for line, data in zip(assessment.lines, plain["lines"], strict=True):
        data["cites"] = _plain(cite(line.entries))
        data["material_words"] = line.material_words
        data["material_cites"] = _plain(cite(line.material))
    return plain


def build_report(evidence: Evidence, mode: str = "eu_ai_act") -> ReportModel:
    """What the report on ``evidence`` says under a compliance mode.

    Raises:
        ReportError: the mode is not known.
    """
    return _Builder(evidence, mode).build()


class _Builder:
    def __init__(self, evidence: Evidence, mode: str) -> None:
        self.evidence = evidence
        self.assessment = assess(evidence, load_framework(mode))
        self.runs = run_facts(evidence)
        self.composed = composed_privacy(self.runs)
        self.level = words.level_words(evidence.level)
        self.by_index = {item.index: item for item in evidence.items}

    def build(self) -> ReportModel:
        evidence, verdict = self.evidence, self.evidence.verdict
        newest = max((item.time for item in evidence.items), default=0)
        framework = self.assessment.framework
        privacy = tuple(_privacy_part(run, trusted=evidence.trusted) for run in self.runs)
        runs = tuple(_run_part(run, trusted=evidence.trusted) for run in self.runs)
        drawn = self._figures()
        cells = cells_of(evidence)
        model = ReportModel(
            title=self._title(),
            subtitle=self._subtitle(newest),
            language="en",
            dated=words.time_text(newest) if newest else "no entry",
            timestamp=newest // 1_000_000,
            law=f"{framework.title}: {framework.law}, text {framework.text_version}",
            level=evidence.level,
            level_state=self.level.state,
            trusted=evidence.trusted,
            shows=self.level.shows,
            not_shown=self.level.not_shown,
            reasons=tuple(Fact(str(r.where), str(r.message), note=str(r.code)) for r in verdict.reasons),
            integrity=self._integrity(),
            tiles=self._tiles(),
            summary=self._summary(),
            privacy_words=_composed_words(self.composed, trusted=evidence.trusted),
            privacy_state=_composed_state(self.composed, trusted=evidence.trusted),
            privacy_cites=cite(self.composed.indices),
            privacy=privacy,
            runs=runs,
            lineage=self._lineage(),
            figures=drawn,
            assessment=self.assessment,
            cells=cells,
            threats=_THREATS if self.composed.total is not None else _THREATS_WITHOUT,
            limits=self._limits(cells),
            evidence=(),
            footer=f"trail {verdict.origin or 'without a name'} · size {words.count(verdict.size)} · "
            f"root {words.short(verdict.root, 8) or 'none'}",
        )
        return _with_evidence(model, self.by_index)

    def _title(self) -> str:
        names = list(dict.fromkeys(run.started.experiment for run in self.runs))
        if not names:
            return "What this trail holds"
        if len(names) == 1:
            return f"What was done in {names[0]}"
        return f"What was done in {words.plural(len(names), 'experiment')}"

    def _subtitle(self, newest: int) -> str:
        sealed = self.evidence.of(RecordSealed)
        source = "record" if self.evidence.origin_kind == "record" else "trail"
        parts = [f"Audit report drawn from a {source}"]
        if newest:
            parts.append(f"newest entry {words.day_text(newest)}")
        if self.evidence.origin_kind == "record" and sealed:
            parts.append(f"sealed sha256 {words.short(sealed[-1][1].digest)}")
        framework = self.assessment.framework
        return " · ".join([*parts, f"{framework.title} as of {framework.text_date}"])

    def _integrity(self) -> tuple[Fact, ...]:
        verdict = self.evidence.verdict
        created = origin_of(self.evidence)
        facts = [
            Fact("Origin", verdict.origin or "not stated", cite([created[0].index]) if created else ()),
            Fact("Size", words.plural(verdict.size, "entry", "entries")),
            Fact("Root", verdict.root or "none", mono=True),
        ]
        own = created[1].log_key if created else ""
        others = [signer for signer in verdict.signers if signer != own]
        by = (["the trail's own log key"] if len(others) < len(verdict.signers) else []) + others
        facts.append(Fact("Signed by", ", ".join(by) or "nobody whose key is trusted here", mono=bool(others)))
        if created:
            facts.append(Fact("Log key", own, cite([created[0].index]), mono=True))
        facts += [Fact("Worth knowing", str(note.message), note=str(note.where)) for note in self.evidence.notes]
        started = self.evidence.of(RecordStarted)
        facts += [
            Fact("Record", event.record, cite([item.index]), mono=True, note=f"made with {event.tool}")
            for item, event in started
        ]
        for item, event in self.evidence.of(RecordSealed):
            note = f"{event.status}; {words.plural(event.cells, 'cell')}" + (
                f"; {event.reason}" if event.reason else ""
            )
            facts.append(Fact("Record sealed", f"sha256 {event.digest}", cite([item.index]), mono=True, note=note))
        return tuple(facts)

    def _tiles(self) -> tuple[Tile, ...]:
        counts = self.assessment
        total = len(counts.lines)
        evidenced = counts.count(State.EVIDENCED)
        part = f", {counts.partial} of them in part" if counts.partial else ""
        said = "" if self.evidence.trusted else ", as the file says"
        steps = sum(run.steps_done for run in self.runs)
        lasted = sum(run.last_time - run.item.time for run in self.runs)
        return (
            self._privacy_tile(),
            self._data_tile(said),
            Tile(words.count(steps), f"optimizer {'step' if steps == 1 else 'steps'} in "
                 f"{words.plural(len(self.runs), 'run')}, {words.duration_text(lasted)}{said}"),
            Tile(f"{evidenced} of {total}", f"{counts.framework.title} requirements evidenced{part}; "
                 f"{counts.count(State.MISSING)} missing"),
        )  # fmt: skip

    def _privacy_tile(self) -> Tile:
        composed = self.composed
        if not self.evidence.trusted:
            return Tile("not verified", "no privacy figure can be relied on", "bad")
        if composed.total is None:
            trained = any(run.guarantee != "untrained" for run in self.runs)
            asked = any(run.guarantee == "asked" for run in self.runs)
            if asked:
                return Tile("no bound", "differential privacy was asked for, but no spend is recorded", "bad")
            return Tile("no bound" if trained else "nothing trained",
                        words.NO_BOUND if trained else "no run trained a model", "warn" if trained else "")  # fmt: skip
        label = f"per {composed.unit} ({composed.adjacency}), δ {words.delta_text(composed.delta or 0)}, budget "
        label += f"{words.number_text(composed.budget)}, all private runs composed"
        if composed.unbounded_runs:
            label += f"; {words.plural(composed.unbounded_runs, 'other run')} {words.NO_BOUND}"
        state = "warn" if composed.unbounded_runs else ""
        return Tile(f"ε {words.epsilon_text(composed.total)}", label, state, cite(composed.indices))

    def _data_tile(self, said: str) -> Tile:
        if self.composed.units is not None:
            unit = self.composed.unit or "unit"
            return Tile(words.count(self.composed.units), f"{unit}s on the public roster{said}")
        rows = [event.rows for run in self.runs for _, event in run.data
                if event.role == "train" and event.rows is not None]  # fmt: skip
        if rows:
            return Tile(words.count(rows[-1]), f"rows of training data{said}")
        return Tile("not stated", "how much data was used")

    def _summary(self) -> tuple[Fact, ...]:
        facts = [_run_sentence(run) for run in self.runs]
        if not self.evidence.trusted:
            facts.insert(0, Fact("Not verified", "What follows is only what the file says."))
        if not self.runs:
            facts.append(Fact("", "No run was opened in this trail."))
        return tuple(facts)

    def _lineage(self) -> tuple[Group, ...]:
        return tuple(_lineage_group(run) for run in self.runs if run.data or run.models or run.weights)

    def _figures(self) -> tuple[Figure, ...]:
        found: list[Figure] = [figures.states_figure(self.assessment, "states")]
        if not self.evidence.trusted:
            return tuple(found)
        for number, run in enumerate(self.runs[-MAX_FIGURE_RUNS:], 1):
            drawn = (figures.epsilon_figure(run, f"eps{number}"), figures.series_figure(run, f"series{number}"))
            found += [figure for figure in drawn if figure is not None]
        return tuple(found)

    def _limits(self, cells: tuple[Cell, ...]) -> tuple[str, ...]:
        counts, evidence = self.assessment, self.evidence
        rows = counts.framework.requirements
        old = sum(row.text == "2024" for row in rows)
        second = sum(row.text == "secondary" for row in rows)
        people = sum(line.state is State.MISSING and line.requirement.mode == "attest" for line in counts.lines)
        found = [
            (
                f"{counts.count(State.MISSING)} of {len(rows)} requirements are missing; {people} of them only a person"
                f" can answer. {words.plural(counts.partial, 'evidenced line')} cover only a part of what is asked."
            ),
            *counts.framework.traps,
            (
                f"{old} rows of the {counts.framework.title} were read from the 2024 text, before its change, and "
                f"{second} from secondary sources; they are marked."
            ),
            (
                "The trail holds what was recorded in it. Data, models and documents are shown by digest; how they "
                "came about before is declared, not observed."
            ),
        ]
        unbounded = self.composed.unbounded_runs
        if unbounded:
            found.append(
                f"{words.plural(unbounded, 'run')} {words.NO_BOUND}. The bound of other runs says nothing of it."
            )
        if evidence.unknown:
            found.append(
                f"{words.plural(len(evidence.unknown), 'entry', 'entries')} could not be read by this version "
                f"({', '.join(c.text for c in cite(i.index for i in evidence.unknown))}) and are not part of any claim."
            )
        if cells:
            found.append(
                "Cells are shown as they ran. What the author's own code printed is outside the privacy statement."
            )
        if len(self.runs) > MAX_FIGURE_RUNS:
            found.append(f"Figures are drawn for the newest {MAX_FIGURE_RUNS} runs only.")
        open_runs = [run.started.experiment for run in self.runs if run.status == "open"]
        if open_runs:
            found.append(f"Not closed when this was drawn: {', '.join(open_runs)}.")
        return tuple(found)


_THREATS = (
    (
        "Covered: anyone who sees the published weights, this report, the record and the public trail, and who may "
        "know every other annotator's answers."
    ),
    (
        "Not covered: whoever can open the vault. It holds the private figures and the seed of the noise, and who "
        "knows the seed can take the noise away again."
    ),
    "Not covered: time. How long a training or a step took may depend on the data.",
    (
        "Not covered: choices that people made after looking at the data, such as settings, the selection of data or "
        "which model to keep."
    ),
    (
        "Not covered: the base model's own training data, and other uses of the same annotators' data outside this "
        "trail."
    ),
    (
        "Assumed: the software ran as recorded, and noise drawn in floating point behaves as noise drawn from the real "
        "line."
    ),
)

_THREATS_WITHOUT = (
    (
        "Nothing bounds what the model may reveal of the people in its data: whoever sees the weights or asks the "
        "model may learn what stood in single rows."
    ),
    (
        "The trail itself holds settings, metrics and digests. A digest of data that can be guessed shows whether a "
        "guess is right."
    ),
)


def _run_sentence(run: RunFacts) -> Fact:
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


def _protects(unit: str) -> str:
    if unit == "annotator":
        return (
            "Whoever sees the model, this report and the public trail can hardly tell what any one annotator answered, "
            "or whether her answers were used at all, counting all her answers together. That she is on the roster "
            "is public"
        )
    return (
        f"Whoever sees the model, this report and the public trail can hardly tell what stood in any one {unit}, or "
        f"whether it was used at all. That it is on the roster is public; several {unit}s of one person are not "
        "protected together"
    )


def _composed_state(composed: Composed, *, trusted: bool) -> str:
    if not trusted:
        return "bad"
    return "warn" if composed.total is None or composed.unbounded_runs else "ok"


def _composed_words(composed: Composed, *, trusted: bool) -> str:
    if not trusted:
        return "The trail does not verify. The figures below are what it says, and none of them can be relied on."
    if composed.total is None:
        if composed.unbounded_runs:
            return f"Every run here was {words.NO_BOUND} on what the model may reveal of the people in its data."
        return "Nothing was trained here, so nothing was spent."
    settled = "spent" if composed.settled else "spent or reserved (a reservation counts in full until it is settled)"
    said = (
        f"{_protects(composed.unit or 'unit')}. Her influence is bounded by " if composed.unit == "annotator"
        else f"{_protects(composed.unit or 'unit')}. The influence of each is bounded by "
    )  # fmt: skip
    bound = f"ε = {words.epsilon_text(composed.total)}", f"δ = {words.delta_text(composed.delta or 0)}"
    epsilon, delta = (figure.replace(" ", "\u00a0") for figure in bound)
    text = (
        f"{said}{epsilon} ({delta}), {settled} of "
        f"a budget of {words.number_text(composed.budget)}, "
        f"{words.plural(composed.private_runs, 'private run')} composed."
    )
    if composed.unbounded_runs:
        text += (
            f" This bound does not reach {words.plural(composed.unbounded_runs, 'other run')} of this trail, "
            f"{words.NO_BOUND}: where the same people's data were used there, they are not protected by it."
        )
    if composed.other_deltas:
        deltas = ", ".join(map(words.delta_text, composed.other_deltas))
        text += f" Earlier reservations at δ = {deltas} are composed into it; their own figures are not comparable."
    return text


def _privacy_part(run: RunFacts, *, trusted: bool) -> PrivacyPart:
    title = run.started.experiment
    if run.guarantee == "untrained":
        return PrivacyPart(title, "na", "nothing trained", "Nothing was trained in this run, so nothing was spent.",
                           cite([run.item.index]))  # fmt: skip
    if run.guarantee == "none":
        at = [run.item.index, *(item.index for item, _ in run.trainers)]
        return PrivacyPart(title, "warn", "no bound", f"This run was {words.NO_BOUND}.", cite(at))
    if run.guarantee == "asked" or not run.spends:
        return PrivacyPart(title, "bad", "no bound", "Differential privacy was asked for, but a training stands "
                           "without a recorded spend: no bound can be stated.", cite([run.item.index]))  # fmt: skip
    spend = run.spends[-1]
    facts = tuple(fact for number, one in enumerate(run.spends, 1) for fact in _spend_facts(one, number, run))
    state = "ok" if trusted else "bad"
    reserved = spend.reserved
    headline = (
        f"ε {words.epsilon_text(spend.total)} of {words.number_text(reserved.epsilon_budget)}, "
        f"δ {words.delta_text(reserved.delta)}, per {reserved.unit}, {reserved.adjacency}, composed"
    )
    headline = headline if trusted else "not verified"
    return PrivacyPart(title, state, headline, _spend_words(spend), cite(spend.indices), facts)


def _spend_words(spend: Spend) -> str:
    reserved, settled = spend.reserved, spend.settled
    rate = words.number_text(reserved.sampling_rate)
    text = (
        f"In each step every {reserved.unit} was drawn with probability {rate}; of each at most "
        f"{words.plural(reserved.max_pairs_per_unit, 'pair')} entered, their gradient clipped to "
        f"{words.number_text(reserved.clipping_norm)}, and Gaussian noise of standard deviation "
        f"{words.number_text(reserved.noise_multiplier * reserved.clipping_norm)} was added to the sum. "
    )
    if settled is None:
        return text + "The spend was reserved and never settled, so all of it counts."
    text += f"{words.plural(settled.steps, 'step')} ran"
    if settled.stopped_by_budget:
        return text + "; the run stopped before the step that would have crossed the budget."
    return text + "."


def _spend_facts(spend: Spend, number: int, run: RunFacts) -> tuple[Fact, ...]:
    reserved, settled = spend.reserved, spend.settled
    at = cite([spend.item.index])
    unit = f"{reserved.unit} (neighbouring data sets differ in all that one {reserved.unit} gave)"
    adjacency = f"{reserved.adjacency}: the roster is public, what each gave is not" if (
        reserved.adjacency == "zero-out") else reserved.adjacency  # fmt: skip
    accountants = words.accountants_text(reserved.accountants)
    seed = "sealed before the first step" if spend.item.sealed else "not sealed"
    facts = [
        Fact("Unit", unit, at),
        Fact("Adjacency", adjacency, at),
        Fact("Roster", words.plural(reserved.units, reserved.unit), at),
        Fact("Mechanism", f"{reserved.mechanism}; engine {reserved.engine}", at),
        Fact("Noise multiplier σ", words.number_text(reserved.noise_multiplier), at),
        Fact("Sampling rate q", words.number_text(reserved.sampling_rate), at),
        Fact("Steps T", f"{words.count(reserved.steps)} reserved of {words.count(reserved.steps_asked)} asked for"
             + (f"; {words.count(settled.steps)} ran" if settled else ""), cite(spend.indices)),
        Fact("Clipping norm C", words.number_text(reserved.clipping_norm), at),
        Fact("Pairs of a unit in a step k", f"at most {words.count(reserved.max_pairs_per_unit)}", at),
        Fact("δ", words.delta_text(reserved.delta), at),
        Fact("ε budget", words.number_text(reserved.epsilon_budget), at),
        Fact("ε before", _epsilon(reserved.epsilon_before), at),
        Fact("ε planned, composed", _epsilon(reserved.epsilon_planned), at),
    ]  # fmt: skip
    if settled is None or spend.settled_item is None:
        facts.append(Fact("ε spent, composed", f"not settled: {_epsilon(spend.total)} counts in full", at))
    else:
        alone = f"this training alone {_epsilon(settled.epsilon_run)}"
        there = cite([spend.settled_item.index])
        facts.append(Fact("ε spent, composed", _epsilon(settled.epsilon_total), there, note=alone))
    facts += [
        Fact("Accountants, planned total", accountants, at),
        Fact("Randomness", f"{reserved.generator}; seed {seed}", at),
    ]
    if len(run.spends) == 1:
        return tuple(facts)
    return tuple(Fact(f"Training {number}: {f.label}", f.value, f.cites, f.mono, f.note) for f in facts)


def _epsilon(value: Any) -> str:
    return words.epsilon_text(value, 4)


def _run_part(run: RunFacts, *, trusted: bool) -> RunPart:
    started, at = run.started, cite([run.item.index])
    facts = [
        Fact("Experiment", started.experiment, at),
        Fact("Opened", words.time_text(run.item.time), at, note=f"by a {started.entry_point}, with {started.tool}"),
    ]
    if run.finished:
        item, event = run.finished
        note = event.reason or ""
        facts.append(Fact("Closed", words.time_text(item.time), cite([item.index]), note=note))
    elif run.interrupted:
        facts.append(Fact("Found interrupted", words.time_text(run.interrupted[0].time),
                          cite([run.interrupted[0].index])))  # fmt: skip
    if started.declared_model:
        facts.append(Fact("Model, as declared", started.declared_model, at, note="a declaration, not an observation"))
    facts += _dp_fact(run, at, trusted=trusted)
    facts += [fact for item, event in run.trainers for fact in _trainer_facts(item, event)]
    notes = sorted({note for _, step in run.steps for note in step.notes})
    if notes:
        where = cite(item.index for item, step in run.steps if step.notes)
        facts.append(Fact("Warnings", "; ".join(notes), where))
    environment = tuple(fact for item, event in run.environments for fact in _environment_facts(item, event))
    state = {"completed": "ok", "stopped-by-budget": "ok", "failed": "bad", "interrupted": "warn"}.get(run.status, "na")
    return RunPart(started.experiment, run.run, run.status, state, tuple(facts), environment)


def _dp_fact(run: RunFacts, at: Cites, *, trusted: bool) -> list[Fact]:
    if not trusted:
        return [Fact("Differential privacy", "not verified", at)]
    if run.guarantee == "bound":
        spend = run.spends[-1]
        reserved = spend.reserved
        value = (
            f"ε {words.epsilon_text(spend.total)} per {reserved.unit}, δ {words.delta_text(reserved.delta)}, "
            f"budget {words.number_text(reserved.epsilon_budget)}, {reserved.adjacency}, composed"
        )
        return [Fact("Differential privacy", value, cite(spend.indices))]
    value = {"none": words.NO_BOUND, "asked": "asked for, but no bound can be stated"}.get(
        run.guarantee, "nothing was trained")  # fmt: skip
    return [Fact("Differential privacy", value, at)]


def _trainer_facts(item: Item, event: Any) -> list[Fact]:
    at = cite([item.index])
    loss = f", loss {event.loss}" if event.loss else ""
    settings = ", ".join(f"{k}={words.plain_text(v)}" for k, v in sorted(event.hyperparameters.items()))
    facts = [Fact("Trainer", f"{event.trainer}{loss}, {words.plural(event.max_steps, 'step')} planned", at,
                  note="" if event.seed is None else f"seed {event.seed}")]  # fmt: skip
    if settings:
        facts.append(Fact("Settings", settings, at, mono=True))
    return facts


def _environment_facts(item: Item, event: Any) -> list[Fact]:
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


def _lineage_group(run: RunFacts) -> Group:
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


def _with_evidence(model: ReportModel, by_index: dict[int, Item]) -> ReportModel:
    cites: set[Cite] = set()
    _collect({name: getattr(model, name) for name in model.__dataclass_fields__}, cites)
    for line in model.assessment.lines:
        cites.update(cite(line.entries))
        cites.update(cite(line.material))
    rows: dict[int, EvidenceRow] = {}
    stretches: dict[int, Cite] = {}
    for one in cites:
        if one.count > 1 and (one.first not in stretches or stretches[one.first].count < one.count):
            stretches[one.first] = one
        for index in (one.first, one.last):
            if index in by_index and index not in rows:
                rows[index] = _evidence_row(by_index[index])
    found = [
        EvidenceRow(**{**asdict(rows[i]), "stretch": stretches[i].text}) if i in stretches else rows[i]
        for i in sorted(rows)
    ]
    fields = {name: getattr(model, name) for name in model.__dataclass_fields__}
    return ReportModel(**{**fields, "evidence": tuple(found)})


def _collect(value: Any, cites: set[Cite]) -> None:
    if isinstance(value, Cite):
        cites.add(value)
    elif isinstance(value, dict):
        for part in value.values():
            _collect(part, cites)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _collect(part, cites)
    elif hasattr(value, "__dataclass_fields__") and not isinstance(value, (Assessment, Line)):
        for name in value.__dataclass_fields__:
            _collect(getattr(value, name), cites)


def _evidence_row(item: Item) -> EvidenceRow:
    return EvidenceRow(
        item.index, item.kind, words.time_text(item.time), words.short(item.run or "", 4), item.leaf_hash,
        sealed=item.sealed is not None,
    )  # fmt: skip


def evidence_bundle(evidence: Evidence) -> bytes:
    """The evidence itself as JSON, to stand beside a report: the verdict, the checkpoint and every entry's bytes.

    ``data`` is base64 of the exact bytes of the leaf; SHA-256 over a zero byte and them gives ``leaf_hash``.
    """
    bundle = {
        "format": "rlhf-audit-evidence/1",
        "verdict": evidence.verdict.to_dict(),
        "checkpoint": evidence.checkpoint,
        "entries": [
            {"index": item.index, "leaf_hash": item.leaf_hash, "data": base64.b64encode(item.entry.data).decode()}
            for item in evidence.items
        ],
    }
    return json.dumps(bundle, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
