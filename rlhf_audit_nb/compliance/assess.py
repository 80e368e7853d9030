"""The assessment: what a verified trail shows about each demand of a framework. Floor 3.

A pure, deterministic function of `Evidence` and `Framework`. A tool cannot certify: a line is *evidenced*, *attested*,
*missing* or *not applicable*, never more. Under a verdict of INVALID or DIVERGED nothing is evidenced. This version's
vocabulary has no statements by people yet, so no line comes out *attested*.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.compliance.queries import QUERIES
from rlhf_audit_nb.errors import ReportError

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.evidence import Evidence
    from rlhf_audit_nb.compliance.framework import Framework, Requirement
    from rlhf_audit_nb.compliance.queries import Finding

__all__ = ["Assessment", "Line", "State", "assess"]

MUST_STATE = "A person must state this."
NOT_VERIFIED = "The trail does not verify, so nothing in it is evidence."


class State(StrEnum):
    """What stands for a requirement."""

    EVIDENCED = "evidenced"
    ATTESTED = "attested"
    MISSING = "missing"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True)
class Line:
    """One requirement and what stands for it.

    ``words`` says what the evidence is, or why there is none; ``not_shown`` what it leaves open. ``whole`` is false
    where only a part of what is asked is evidenced. ``material`` are entries that help a person to answer.
    """

    requirement: Requirement
    state: State
    words: str
    not_shown: str = ""
    entries: tuple[int, ...] = ()
    whole: bool = True
    material: tuple[int, ...] = ()
    material_words: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The line as plain values."""
        requirement = self.requirement
        return {
            "id": requirement.id,
            "article": requirement.article,
            "part": requirement.part,
            "requirement": requirement.requirement,
            "who": requirement.who,
            "applies_from": requirement.applies_from,
            "text": requirement.text,
            "mode": requirement.mode,
            "state": self.state.value,
            "whole": self.whole,
            "words": self.words,
            "not_shown": self.not_shown,
            "entries": list(self.entries),
            "material": list(self.material),
        }


@dataclass(frozen=True)
class Assessment:
    """All lines of one framework, in the framework's order."""

    framework: Framework
    level: str
    lines: tuple[Line, ...]

    def count(self, state: State) -> int:
        """How many lines are in a state."""
        return sum(line.state is state for line in self.lines)

    @property
    def partial(self) -> int:
        """How many evidenced lines cover only a part of what is asked."""
        return sum(line.state is State.EVIDENCED and not line.whole for line in self.lines)

    def to_dict(self) -> dict[str, Any]:
        """The assessment as plain values."""
        framework = self.framework
        return {
            "framework": framework.id,
            "title": framework.title,
            "law": framework.law,
            "text_version": framework.text_version,
            "framework_digest": framework.digest,
            "level": self.level,
            "counts": {state.value: self.count(state) for state in State},
            "evidenced_in_part": self.partial,
            "traps": list(framework.traps),
            "lines": [line.to_dict() for line in self.lines],
        }


def assess(evidence: Evidence, framework: Framework) -> Assessment:
    """What ``evidence`` shows about each requirement of ``framework``.

    Raises:
        ReportError: the framework names a query that this version does not have.
    """
    names = {name for row in framework.requirements for name in (row.query, row.material) if name}
    unknown = sorted(names - set(QUERIES))
    if unknown:
        raise ReportError(
            f"Framework {framework.id!r} asks for evidence queries that this version does not have: "
            f"{', '.join(unknown)}.",
            next_step=f"Known queries: {', '.join(QUERIES)}.",
            code="unknown-query",
        )
    # Each query runs once, however many rows ask it; over a broken trail none runs at all.
    found = {name: QUERIES[name](evidence) for name in sorted(names)} if evidence.trusted else {}
    lines = tuple(_line(row, found, trusted=evidence.trusted) for row in framework.requirements)
    return Assessment(framework, evidence.level, lines)


def _line(row: Requirement, found: dict[str, Finding | None], *, trusted: bool) -> Line:
    if row.mode == "n-a":
        return Line(row, State.NOT_APPLICABLE, row.reason or "")
    if not trusted:
        return Line(row, State.MISSING, NOT_VERIFIED if row.mode == "automatic" else MUST_STATE)
    help_ = found.get(row.material) if row.material else None
    material, material_words = (help_.entries, help_.words) if help_ else ((), "")
    if row.mode == "attest":
        return Line(row, State.MISSING, MUST_STATE, material=material, material_words=material_words)
    finding = found.get(row.query) if row.query else None
    if finding is None:
        return Line(row, State.MISSING, row.reason or "", material=material, material_words=material_words)
    return Line(row, State.EVIDENCED, finding.words, finding.not_shown, finding.entries, whole=finding.whole)
