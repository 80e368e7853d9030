"""What a report says of compute: the columns of each training, and the one-third rule over its lineage. Floor 4."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.compliance import words
from rlhf_audit_nb.compliance.compute import compute_ledger, flop_text
from rlhf_audit_nb.compliance.evidence import cite
from rlhf_audit_nb.reports.parts import Fact, Group

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.compute import Ledger, TrainingCompute
    from rlhf_audit_nb.compliance.evidence import Evidence

__all__ = ["ComputeView", "compute_groups", "compute_lines"]

_BASIS = {
    "measured": "counted pass by pass",
    "settings": "a bound from public settings",
    "none": "nothing was counted, and nothing bounds it",
}
_LAW = "Commission guidelines C(2025) 7719, not binding; paragraphs"


@dataclass(frozen=True, repr=False)
class ComputeView:
    """A ledger that shows itself in a notebook, with the level of the verdict that it was read under."""

    ledger: Ledger
    level: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the verdict's level, trainings and verdicts."""
        return {"level": self.level, **self.ledger.to_dict()}

    def __str__(self) -> str:
        return "\n".join([*compute_lines(self.ledger), f"over a trail that is {self.level}"])

    __repr__ = __str__  # what a report shows of a notebook's cell

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def compute_groups(evidence: Evidence) -> tuple[Group, ...]:
    """A group of facts for each training; none where no entry tells of compute."""
    if not evidence.trusted:
        return ()
    ledger = compute_ledger(evidence)
    return tuple(Group(f"{one.experiment}: {one.trainer}", tuple(_facts(one, ledger))) for one in ledger.trainings)


def compute_lines(ledger: Ledger) -> list[str]:
    """The ledger as lines of text."""
    lines = []
    for one in ledger.trainings:
        lines.append(f"{one.experiment}: {one.trainer} (#{one.entry})")
        for fact in _facts(one, ledger):
            note = f" ({fact.note})" if fact.note else ""
            lines.append(f"  {fact.label}: {fact.value}{note}")
    if ledger.missing:
        trainers = ", ".join(f"#{index}" for index in ledger.missing)
        lines.append(f"no entry tells of the compute of {words.plural(len(ledger.missing), 'training')}: {trainers}")
    return lines or ["No training on this trail has an entry on compute."]


def _facts(one: TrainingCompute, ledger: Ledger) -> list[Fact]:
    at = cite(one.entries)
    tokens = ""
    if one.tokens is not None and one.positions is not None:
        tokens = f"; {words.count(one.tokens)} tokens, {words.count(one.positions)} with padding"
    facts = [Fact("Update", f"{one.update.words} FLOP", at, note=_BASIS[one.basis] + tokens)]
    for label, band, note in (
        ("Generation", one.generation, "sampling from the model that is trained"),
        ("Scoring", one.scoring, "the trained model without a gradient; in the upper end of the comparison alone"),
        ("Excluded", one.excluded, "reward and reference models, evaluation (119)"),
    ):
        if band.high:
            facts.append(Fact(label, f"{band.words} FLOP", at, note=note))
    if one.device_hours is not None:
        facts.append(Fact("Device hours", f"{one.device_hours:.3g}", at, note="devices times hours on the clock"))
    for source, amount in one.kilowatt_hours.items():
        facts.append(Fact("Energy", f"{amount:.3g} kWh", at, note=f"{source}: whole packages or boards"))
    if one.notes:
        facts.append(Fact("Assumptions", "; ".join(one.notes), at))
    chain = ledger.lineage(one.entry)
    before = len(chain) - 1
    those = "training" if before == 1 else f"{before} trainings"
    with_it = f"with the {those} before it: " if before else ""
    for rule in ledger.verdicts[one.entry]:
        where = cite([*(entry for part in chain for entry in part.entries), *rule.entries])
        note = f"{_LAW} {rule.paragraphs}; threshold {flop_text(rule.threshold)}"
        facts.append(Fact("One-third rule", with_it + rule.words, where, note=note))
    return facts
