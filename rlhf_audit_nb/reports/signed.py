"""What a report says of the people who have signed: who, as what, what it means, and whether it counts. Floor 4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_audit_nb.compliance import words
from rlhf_audit_nb.compliance.evidence import cite
from rlhf_audit_nb.events import RecordAttested
from rlhf_audit_nb.records.attesting import NAMED, UNKNOWN, signed_by
from rlhf_audit_nb.records.signatures import REJECTED, WITHDRAWN, Attestation
from rlhf_audit_nb.reports.parts import Fact, Group

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.evidence import Evidence

__all__ = ["signed_groups", "signed_summary"]


def signed_summary(evidence: Evidence) -> list[Fact]:
    """Rejections that stand: what is read first."""
    return [
        Fact("Rejected", f"{item.in_words}: {item.statement} ({standing})")
        for item, standing in _signed(evidence)
        if item.meaning == REJECTED and item.replaced_by is None
    ]


def signed_groups(evidence: Evidence) -> tuple[Group, ...]:
    """A record's signatures one by one; of a trail, what it says of them: it holds neither names nor words."""
    if evidence.origin_kind == "record":
        return tuple(_group(item, standing) for item, standing in _signed(evidence))
    entered = evidence.of(RecordAttested) if evidence.trusted else ()
    facts = tuple(
        Fact(
            f"{event.meaning} as {event.role}",
            f"record {words.short(event.record)}, {words.time_text(item.time)}",
            cite([item.index]),
            note=f"key {words.short(event.key)}",
        )
        for item, event in entered
    )
    said = "The trail knows that these were signed; names, words and signatures stand in the records."
    return (Group("Entered into the trail", facts, said),) if facts else ()


def _signed(evidence: Evidence) -> tuple[tuple[Attestation, str], ...]:
    return signed_by(evidence, evidence.people) if evidence.trusted and evidence.origin_kind == "record" else ()


def _group(item: Attestation, standing: str) -> Group:
    facts = (
        Fact("Statement", item.statement),
        Fact("For", item.purpose or "any use"),
        Fact("Signed at", item.time, note="by the signer's own clock"),
        *(Fact("Not believed", f"{doubt}.") for doubt in item.doubts),
        Fact("Key", f"sha256 {item.key_id}", mono=True, note=standing),
    )
    mark = item.meaning if item.replaced_by is None else f"{item.meaning}; replaced by a later signature"
    return Group(f"{item.name}, {item.role}", facts, mark=mark, state=_state(item, standing))


def _state(item: Attestation, standing: str) -> str:
    """The colour: red for a refusal that stands, green only for a word that a policy knows."""
    if item.replaced_by is not None:
        return "na"
    if item.meaning == REJECTED:
        return "bad" if standing in (NAMED, UNKNOWN) else "warn"
    return "ok" if standing == NAMED and item.meaning != WITHDRAWN else "na"
