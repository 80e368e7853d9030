"""What a gate found: one finding for each thing that was checked, and the decision over all of them. Floor 4.

A finding has a machine-readable id, whether it is met, a sentence, and where in the evidence it stands: entries of the
trail, and a place in the record (a cell, an addition). Ids that a policy asks for begin with the policy's own key
(``privacy.epsilon``, ``attestations[0]``); those that every gate checks begin with ``model``, ``record`` or ``trail``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.compliance.words import plural, short, visible

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rlhf_audit_nb.trail import Verdict

__all__ = ["REFUSED", "Decision", "Finding", "Judgement", "Looked"]

REFUSED, DIVERGED, INVALID = 3, 30, 40
"""Process statuses: the record holds and the policy refuses, or a verdict's own."""

_TOLD = 12


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        id: what, by the policy's own words.
        met: whether it holds.
        reason: one sentence: what was found.
        entries: the entries of the trail that show it.
        where: a place in the record or in the model's folder, empty where there is none.
        tampering: whether it shows that something was changed, and not only that something is lacking.
    """

    id: str
    met: bool
    reason: str
    entries: tuple[int, ...] = ()
    where: str = ""
    tampering: bool = False

    @property
    def words(self) -> str:
        """The finding in a line."""
        at = ", ".join(f"#{index}" for index in self.entries[:_TOLD]) + (", …" if len(self.entries) > _TOLD else "")
        place = " ".join(part for part in (self.where, at) if part)
        return f"{'met' if self.met else 'NOT MET'}  {self.id}: {self.reason}" + (f" ({place})" if place else "")


@dataclass(frozen=True)
class Looked:
    """What was looked through for records.

    Attributes:
        files: how many notebooks were read.
        places: the folders and files that were named or found.
        left: what was not looked at, and why; empty where everything was.
        near: the records or runs that come nearest to a model that no record knows, one sentence each.
    """

    files: int = 0
    places: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    near: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The search in a sentence."""
        return f"Looked through {plural(self.files, 'notebook')} in {', '.join(self.places) or 'no folder'}."


@dataclass(frozen=True)
class Judgement:
    """One record under a policy.

    Attributes:
        record: its id, empty where the file does not say.
        source: the file.
        verdict: the verdict on the record.
        findings: everything that was checked of it.
        speaks_against: those findings that stand against the model whichever record is taken: a training without the
            privacy that is asked for, a test that was failed, a rejection.
    """

    record: str
    source: str
    verdict: Verdict
    findings: tuple[Finding, ...]
    speaks_against: tuple[Finding, ...] = ()

    @property
    def unmet(self) -> tuple[Finding, ...]:
        """What is not met."""
        return tuple(one for one in self.findings if not one.met)

    @property
    def met(self) -> bool:
        """Whether the record holds and all that the policy asks is met."""
        return not self.unmet

    @property
    def exit_code(self) -> int:
        """0, 3, or 30 and 40 where something was changed."""
        if self.met:
            return 0
        changed = [one for one in self.unmet if one.tampering]
        if not changed:
            return REFUSED
        # Another history is told apart from a change; where both are shown, the change says more.
        return DIVERGED if all(one.id == "trail.history" for one in changed) else INVALID

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "record": self.record,
            "source": self.source,
            "level": self.verdict.level.name,
            "origin": self.verdict.origin,
            "met": self.met,
            "findings": [asdict(one) for one in self.findings],
            "speaks_against": [one.id for one in self.speaks_against],
        }


@dataclass(frozen=True, repr=False)
class Decision:
    """The answer of a gate.

    Attributes:
        subject: the model's folder or the record's file, by its name.
        policy: SHA-256 of the policy's file.
        resolved: SHA-256 of all that the policy asks, the files that it names included.
        model: the digest of the model's folder; ``None`` where a record alone was judged.
        records: every record that fits, judged.
        findings: what concerns no single record: the folder, that no record was found.
        not_asked: what the policy does not ask, in words.
        looked: what was looked through for records.
    """

    subject: str
    policy: str
    resolved: str
    model: str | None
    records: tuple[Judgement, ...]
    findings: tuple[Finding, ...] = ()
    not_asked: tuple[str, ...] = ()
    looked: Looked | None = None

    @property
    def passed(self) -> bool:
        """Whether one record meets everything, and nothing speaks against it."""
        return self.chosen is not None and all(one.met for one in self.findings)

    @property
    def chosen(self) -> Judgement | None:
        """The record that meets everything; ``None`` where none does."""
        return next((one for one in self.records if one.met), None)

    @property
    def exit_code(self) -> int:
        """0 passed, 3 refused, 30 or 40 where something was changed."""
        if self.passed:
            return 0
        codes = [one.exit_code for one in self.records if not one.met]
        codes += [INVALID for one in self.findings if one.tampering]
        return max([REFUSED, *codes])

    @property
    def unmet(self) -> tuple[Finding, ...]:
        """What stands in the way: of the record that comes nearest, where several fit."""
        nearest = min(self.records, key=lambda one: len(one.unmet), default=None)
        own = nearest.unmet if nearest is not None and self.chosen is None else ()
        return (*(one for one in self.findings if not one.met), *own)

    @property
    def words(self) -> list[str]:
        """The answer, line by line, with the places that were looked through."""
        looked = self.looked if not self.passed else None
        told = () if looked is None else (looked.words, *looked.left, *looked.near)
        return self._lines(lambda source: source, told)

    def _lines(self, shown: Callable[[str], str], looked: Sequence[str]) -> list[str]:
        head = "PASSED" if self.passed else "REFUSED" if self.exit_code == REFUSED else "DOES NOT HOLD"
        what = f" (folder digest {short(self.model)})" if self.model else ""
        lines = [f"{head}  {self.subject}{what}"]
        lines += [f"  {one.words}" for one in self.findings]
        for one in self.records:
            lines.append(
                f"  record {short(one.record) if one.record else 'without an id'} in {shown(one.source)}: "
                f"{one.verdict.level.name}, {'meets the policy' if one.met else 'does not meet the policy'}"
            )
            lines += [f"    {finding.words}" for finding in one.findings]
        lines += [f"  {text}" for text in looked]
        if self.not_asked:
            lines.append(f"  not asked: {'; '.join(self.not_asked)}")
        # What a trail says must not begin a line of its own.
        return [visible(line).replace("\n", " ") for line in lines]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        chosen = self.chosen
        return {
            "decision": "passed" if self.passed else "refused",
            "exit_code": self.exit_code,
            "subject": self.subject,
            "policy": self.policy,
            "resolved": self.resolved,
            "model": self.model,
            "record": chosen.record if chosen is not None and self.passed else None,
            "records": [one.to_dict() for one in self.records],
            "findings": [asdict(one) for one in self.findings],
            "not_asked": list(self.not_asked),
            "looked": None if self.looked is None else asdict(self.looked),
        }

    def __str__(self) -> str:
        # A notebook is passed on; where something lay on whose machine is not.
        looked = self.looked if not self.passed else None
        told = () if looked is None else (f"{plural(looked.files, 'notebook')} looked at", *looked.near)
        return "\n".join(self._lines(lambda source: source.rsplit("/", 1)[-1], told))

    __repr__ = __str__  # what a report shows of a notebook's cell

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"
