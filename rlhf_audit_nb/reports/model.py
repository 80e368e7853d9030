"""What a report says, as data: the one model that the HTML and the PDF template draw. Floor 4.

`build_report` is a pure function of `Evidence`: no clock, no path, no vault. Every claim carries the entries that it
rests on (`Cite`); `ReportModel.evidence` lists each of them with its leaf hash. What the trail does not hold is said
to be missing, and nothing is made up in its place.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.compliance import words
from rlhf_audit_nb.compliance.assess import Assessment, Line, State, assess
from rlhf_audit_nb.compliance.evidence import Cite, cite
from rlhf_audit_nb.compliance.facts import composed_privacy, run_facts
from rlhf_audit_nb.compliance.framework import load_framework
from rlhf_audit_nb.compliance.lineage import lineage
from rlhf_audit_nb.events import BudgetSet, LabelsReleased, PrivacyPopulation, RecordSealed
from rlhf_audit_nb.reports import figures
from rlhf_audit_nb.reports.cells import Cell, cells_of
from rlhf_audit_nb.reports.compute import compute_groups
from rlhf_audit_nb.reports.evaluations import evaluation_groups, evaluation_summary
from rlhf_audit_nb.reports.integrity import integrity_facts
from rlhf_audit_nb.reports.lineage import lineage_figure
from rlhf_audit_nb.reports.parts import Cites, EvidenceRow, Fact, Group, PrivacyPart, RunPart, Tile
from rlhf_audit_nb.reports.privacy import THREATS, THREATS_WITHOUT, composed_state, composed_words, privacy_part
from rlhf_audit_nb.reports.runs import lineage_group, run_part, run_sentence
from rlhf_audit_nb.reports.self_check import check_part
from rlhf_audit_nb.reports.signed import signed_groups, signed_summary

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.evidence import Evidence, Item
    from rlhf_audit_nb.reports.figures import Figure

__all__ = ["ReportModel", "build_report"]

MAX_FIGURE_RUNS = 3
MINUTE = 60_000_000  # in the trail's microseconds


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
    signed: tuple[Group, ...]
    privacy_words: str
    privacy_state: str
    privacy_cites: Cites
    privacy: tuple[PrivacyPart, ...]
    runs: tuple[RunPart, ...]
    evaluations: tuple[Group, ...]
    lineage: tuple[Group, ...]
    compute: tuple[Group, ...]
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
        self.composed = composed_privacy(
            self.runs, evidence.of(BudgetSet), evidence.of(PrivacyPopulation), evidence.of(LabelsReleased)
        )
        self.level = words.level_words(evidence.level)
        self.by_index = {item.index: item for item in evidence.items}

    def build(self) -> ReportModel:
        evidence, verdict = self.evidence, self.evidence.verdict
        newest = max((item.time for item in evidence.items), default=0)
        framework = self.assessment.framework
        privacy = tuple(privacy_part(run, trusted=evidence.trusted) for run in self.runs) + check_part(evidence)
        runs = tuple(
            run_part(run, trusted=evidence.trusted, earlier=self.runs[:number]) for number, run in enumerate(self.runs)
        )
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
            integrity=integrity_facts(evidence),
            tiles=self._tiles(),
            summary=self._summary(),
            signed=signed_groups(evidence),
            privacy_words=composed_words(self.composed, trusted=evidence.trusted),
            privacy_state=composed_state(self.composed, trusted=evidence.trusted),
            privacy_cites=cite(self.composed.indices),
            privacy=privacy,
            runs=runs,
            evaluations=evaluation_groups(evidence),
            lineage=self._lineage(),
            compute=compute_groups(evidence),
            figures=drawn,
            assessment=self.assessment,
            cells=cells,
            threats=THREATS if self.composed.total is not None else THREATS_WITHOUT,
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

    def _tiles(self) -> tuple[Tile, ...]:
        counts = self.assessment
        total = len(counts.lines)
        evidenced = counts.count(State.EVIDENCED)
        part = f", {counts.partial} of them in part" if counts.partial else ""
        said = "" if self.evidence.trusted else ", as the file says"
        steps = sum(run.steps_done for run in self.runs)
        lasted = sum(run.last_time - run.item.time for run in self.runs)
        duration = words.duration_text(lasted)
        if any(run.started.privacy is not None for run in self.runs):  # their entries have the minute only
            duration = f"about {duration}" if lasted >= MINUTE else "under 2\u00a0min"
        return (
            self._privacy_tile(),
            self._data_tile(said),
            Tile(words.count(steps), f"optimizer {'step' if steps == 1 else 'steps'} in "
                 f"{words.plural(len(self.runs), 'run')}, {duration}{said}"),
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
            inherited = [event for run in self.runs if run.guarantee == "inherited" for _, event in run.inherited]
            if inherited and not asked and not composed.unbounded_runs:
                last = inherited[-1]
                return Tile(
                    f"ε {words.epsilon_text(last.epsilon)}",
                    f"inherited, per {last.unit}, δ {words.delta_text(last.delta)}; nothing was charged here",
                )
            if asked:
                return Tile("no bound", "differential privacy was asked for, but no spend is recorded", "bad")
            return Tile("no bound" if trained else "nothing trained",
                        words.NO_BOUND if trained else "no run trained a model", "warn" if trained else "")  # fmt: skip
        label = f"per {composed.unit} ({composed.adjacency}), δ {words.delta_text(composed.delta or 0)}, budget "
        label += f"{words.number_text(composed.budget)}, "
        label += f"of {composed.whose}" if composed.whose else "all private runs composed"
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
            newest = f" in the newest of {len(self.runs)} runs" if len(set(rows)) > 1 else ""
            return Tile(words.count(rows[-1]), f"rows of training data{newest}{said}")
        return Tile("not stated", "how much data was used")

    def _summary(self) -> tuple[Fact, ...]:
        facts = [run_sentence(run) for run in self.runs]
        tested = evaluation_summary(self.evidence)
        facts = [
            *signed_summary(self.evidence),
            *self._record_outcome(),
            *facts,
            *([tested] if tested is not None else []),
        ]
        if not self.evidence.trusted:
            facts.insert(0, Fact("Not verified", "What follows is only what the file says."))
        if not self.runs:
            facts.append(Fact("", "No run was opened in this trail."))
        return tuple(facts)

    def _record_outcome(self) -> list[Fact]:
        """A notebook that did not run to its end is said first, not only in a table."""
        return [
            Fact(
                "The notebook",
                f"did not run to its end ({event.status}{f': {event.reason}' if event.reason else ''}). "
                "What follows was recorded until then.",
                cite([item.index]),
            )
            for item, event in self.evidence.of(RecordSealed)
            if event.status != "completed"
        ]

    def _lineage(self) -> tuple[Group, ...]:
        return tuple(lineage_group(run) for run in self.runs if run.data or run.models or run.weights)

    def _figures(self) -> tuple[Figure, ...]:
        found: list[Figure] = [figures.states_figure(self.assessment, "states")]
        if not self.evidence.trusted:
            return tuple(found)
        graph = lineage_figure(lineage(self.evidence))
        found += [graph] if graph is not None else []
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
        if evidence.origin_kind == "record" and evidence.trusted and not evidence.additions:
            found.append("No person has signed this record.")
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
