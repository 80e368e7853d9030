"""What a report says of evaluations and the thresholds set for them, and the view that users hold. Floor 4."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.compliance import words
from rlhf_audit_nb.compliance.evidence import cite
from rlhf_audit_nb.compliance.thresholds import evaluations
from rlhf_audit_nb.errors import ReportError
from rlhf_audit_nb.reports.parts import Fact, Group

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.evidence import Evidence
    from rlhf_audit_nb.compliance.thresholds import Evaluated, Evaluations, Threshold

__all__ = ["EvaluationsView", "evaluation_groups", "evaluation_summary", "evaluation_words"]

AS_HANDED_IN = "The figures are as they were handed in; the trail shows when, and of which model."
NEVER_HELD = "set, and no evaluation was ever held to it"


class EvaluationsView:
    """Evaluations that show themselves in a notebook and save themselves as JSON.

    Args:
        found: the evaluations.
        level: the level of the verdict that they were read under.
    """

    def __init__(self, found: Evaluations, level: str) -> None:
        self.found = found
        self.level = level

    @property
    def passed(self) -> bool:
        """Whether every evaluation reached every threshold that was set before it, and every threshold was used."""
        done = self.found.done
        return bool(done) and not self.found.unused and all(one.passed for one in done)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the verdict's level, evaluations and thresholds."""
        return {"level": self.level, "passed": self.passed, **self.found.to_dict()}

    def save(self, path: Path | str) -> Path:
        """Write all of it as JSON.

        Raises:
            ReportError: the name does not end in .json, or the file cannot be written.
        """
        target = Path(path)
        if target.suffix.lower() != ".json":
            raise ReportError(
                f"Evaluations are not written as {target.suffix or 'a file without a suffix'!r}.",
                next_step="Name a file that ends in .json; `rlhf-audit report` writes them into an HTML or PDF.",
                code="unknown-format",
            )
        try:
            target.write_text(json.dumps(self.to_dict(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ReportError(
                f"The evaluations cannot be written to {target}: {error.strerror or error}.",
                next_step="Name a file in a folder that exists and can be written.",
                code="unwritable",
            ) from error
        return target

    def __str__(self) -> str:
        return "\n".join(evaluation_words(self.found)) or "No evaluation is recorded in this trail."

    def __repr__(self) -> str:
        done = self.found.done
        reached = sum(one.passed for one in done)
        return f"<Evaluations, {self.level}: {words.plural(len(done), 'evaluation')}, {reached} passed>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: FBT001 - IPython's own signature
        """As text in a notebook: what a report shows of the cell."""
        del cycle
        printer.text(str(self))

    def _repr_html_(self) -> str:
        said = "".join(f"<li>{escape(sentence)}</li>" for sentence in evaluation_words(self.found))
        return f"<div><b>Evaluations</b> ({escape(self.level)})<ul>{said or '<li>none is recorded</li>'}</ul></div>"


def evaluation_words(found: Evaluations) -> list[str]:
    """Each evaluation in a sentence, then the thresholds that nothing was held to."""
    said = [f"#{one.entry}, {one.model.words}: {_found(one)}." for one in found.done]
    said += [f"#{one.entry}: {one.words}{_whose(one)} was {NEVER_HELD}." for one in found.unused]
    return [words.visible(sentence) for sentence in said]


def _found(one: Evaluated) -> str:
    parts = []
    for name in one.event.metrics:
        judged = [item.words for item in one.judgements if item.metric == name]
        parts.append(f"{one.figure(name)}: {'; '.join(judged)}" if judged else f"{one.figure(name)}, no threshold")
    return "; ".join([*parts, *one.problems])


def evaluation_summary(evidence: Evidence) -> Fact | None:
    """One sentence on all evaluations and thresholds; ``None`` where there are none."""
    found = evaluations(evidence)
    if not found.done and not found.unused:
        return None
    judged = [item for one in found.done for item in one.judgements]
    held = [item for item in judged if item.outcome != "not judged"]
    met = sum(item.passed for item in held)
    said = [words.plural(len(found.done), "evaluation")]
    if held:
        said.append(f"of {words.plural(len(held), 'threshold')} set before the result, {met} reached")
    if len(judged) > len(held):
        said.append(f"{words.plural(len(judged) - len(held), 'threshold')} that judged nothing")
    if found.unused:
        said.append(f"{words.plural(len(found.unused), 'threshold')} that no evaluation was held to")
    where = {one.entry for one in found.done} | {one.entry for one in found.unused}
    where |= {item.threshold.entry for item in judged}
    return Fact("Evaluations", f"{'; '.join(said)}.", cite(where))


def evaluation_groups(evidence: Evidence) -> tuple[Group, ...]:
    """The report's tables: one for each evaluation, and one for thresholds that nothing was held to."""
    found = evaluations(evidence)
    groups = [_group(one) for one in found.done]
    if found.unused:
        facts = tuple(Fact(one.words, NEVER_HELD, cite([one.entry]), note=_about(one)) for one in found.unused)
        groups.append(Group("Thresholds without an evaluation", facts))
    return tuple(groups)


def _group(one: Evaluated) -> Group:
    event, at = one.event, cite([one.entry])
    title = f"{one.model.experiment or event.experiment or event.model_name or 'A model'}, #{one.entry}"
    facts = [Fact("Evaluated", one.model.words, cite({one.entry, *one.model.entries}), note=_digest(one))]
    for name in event.metrics:
        judged = [item for item in one.judgements if item.metric == name]
        facts.append(Fact(name, one.figure(name).removeprefix(f"{name} "), at, note="" if judged else "no threshold"))
        for item in judged:
            where = {item.threshold.entry, *(old.entry for old, _ in item.changed), *(new.entry for new in item.later)}
            facts.append(Fact(f"{name}, threshold", item.words, cite(where), note=_about(item.threshold)))
    facts += [Fact("To note", problem, at) for problem in one.problems]
    facts.append(Fact("Data", _data(one), at, note=f"sha256 {event.data}" if event.data else ""))
    if event.evaluator:
        facts.append(Fact("Evaluator, as stated", event.evaluator, at))
    if event.seeds:
        facts.append(Fact("Seeds, as stated", ", ".join(map(str, event.seeds)), at))
    return Group(title, tuple(facts), AS_HANDED_IN)


def _digest(one: Evaluated) -> str:
    event = one.event
    how = {"live": "its weights, digested in memory", "folder": "its files, digested"}.get(
        event.identified, "only a digest was stated"
    )
    digest = event.folder_digest if event.identified == "folder" else event.weights_digest or event.stated_digest
    return f"sha256 {digest} ({how})"


def _data(one: Evaluated) -> str:
    event = one.event
    if one.sealed:
        return "sealed in the vault with the figures, since this trail protects people"
    if event.data is None:
        return "not stated"
    amount = words.plural(event.samples, "sample") if event.samples is not None else "number of samples not stated"
    public = f"; declared to hold nothing of protected people (#{event.data_public})" if event.data_public else ""
    return f"{event.data_name or 'no name recorded'}: {amount}{public}"


def _about(one: Threshold) -> str:
    name = f" {one.data_name}" if one.data_name else ""
    data = f"for data{name} sha256 {words.short(one.data)}" if one.data else "for any data"
    parts = ["for data that is sealed" if one.data_sealed else data, f"set {words.time_text(one.time)}"]
    if one.by or one.reason:
        parts.append(": ".join(part for part in (one.by, one.reason) if part))
    return "; ".join([*parts, *([f"for {one.experiment}"] if one.experiment else [])])


def _whose(one: Threshold) -> str:
    return f" for {one.experiment}" if one.experiment else ""
