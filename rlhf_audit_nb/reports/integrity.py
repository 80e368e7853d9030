"""What a report says of the trail itself: name and head, who signed, its keys over time, who vouches. Floor 4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_audit_nb.compliance import words
from rlhf_audit_nb.compliance.evidence import cite
from rlhf_audit_nb.compliance.facts import origin_of
from rlhf_audit_nb.events import KeyRevoked, KeyRotated, RecordReproduced, RecordSealed, RecordStarted
from rlhf_audit_nb.reports.parts import Fact

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rlhf_audit_nb.compliance.evidence import Evidence
    from rlhf_audit_nb.trail import Anchor

__all__ = ["integrity_facts"]

_ROLES = {
    "log": "the log key, which signs the trail,",
    "record": "the record key",
    "model": "the model key",
    "mldsa": "the second (ML-DSA-44) key",
}
_LONG = 200
_VOUCHED = {"cosignature": "Cosigned by", "timestamp": "Timestamped by"}


def integrity_facts(evidence: Evidence) -> tuple[Fact, ...]:
    """All of it, in the order in which it is read."""
    return (
        *_head(evidence),
        *_keys(evidence),
        *_vouched(evidence),
        *(Fact("Worth knowing", str(note.message), note=str(note.where)) for note in evidence.notes),
        *_records(evidence),
    )


def _head(evidence: Evidence) -> Iterator[Fact]:
    verdict, created = evidence.verdict, origin_of(evidence)
    yield Fact("Origin", verdict.origin or "not stated", cite([created[0].index]) if created else ())
    yield Fact("Size", words.plural(verdict.size, "entry", "entries"))
    yield Fact("Root", verdict.root or "none", mono=True)
    own = {created[1].log_key} if created else set()
    own |= {event.new for _, event in evidence.of(KeyRotated) if event.role in ("log", "mldsa")}
    others = [signer for signer in verdict.signers if signer not in own]
    by = (["the trail's own log key"] if len(others) < len(verdict.signers) else []) + [_key(key) for key in others]
    yield Fact("Signed by", ", ".join(by) or "nobody whose key is trusted here", mono=bool(others))


def _key(text: str) -> str:
    """A verifier key as a page can hold it: an ML-DSA-44 key, 1,750 characters, by its name and id."""
    return text if len(text) <= _LONG else "+".join(text.split("+")[:2]) + "+…"


def _keys(evidence: Evidence) -> Iterator[Fact]:
    created = origin_of(evidence)
    if created:
        yield Fact("Log key", created[1].log_key, cite([created[0].index]), mono=True)
    for item, event in evidence.of(KeyRotated):
        role = _ROLES.get(event.role, event.role)
        what = f"{role} was replaced" if event.old is not None else f"{role} was added"
        because = f"; {event.reason}" if event.reason else ""
        when = words.time_text(item.time)
        yield Fact("New key", _key(event.new), cite([item.index]), mono=True, note=f"{when}: {what}{because}")
    for item, gone in evidence.of(KeyRevoked):
        reach = f"counts for the first {words.plural(gone.since, 'entry', 'entries')} only"
        because = f"; {gone.reason}" if gone.reason else ""
        yield Fact("Revoked key", _key(gone.key), cite([item.index]), mono=True, note=reach + because)


def _vouched(evidence: Evidence) -> Iterator[Fact]:
    for anchor in _newest(evidence.verdict.anchors):
        size = evidence.verdict.size
        reach = "all of it" if anchor.size == size else f"entries #0 to #{anchor.size - 1}"
        left = size - anchor.size
        note = f"{reach}, at {words.time_text(anchor.time * 1_000_000)}"
        if left:
            newer = "the newest entry is" if left == 1 else f"the newest {words.count(left)} are"
            note += f"; {newer} not covered"
        yield Fact(_VOUCHED.get(anchor.kind, anchor.kind), _key(anchor.by), mono=True, note=note)


def _newest(anchors: Iterable[Anchor]) -> list[Anchor]:
    """Of each who vouched, what reaches furthest; the earliest where several reach as far."""
    found: dict[tuple[str, str], Anchor] = {}
    for anchor in anchors:
        before = found.get((anchor.kind, anchor.by))
        if before is None or (anchor.size, -anchor.time) > (before.size, -before.time):
            found[anchor.kind, anchor.by] = anchor
    return list(found.values())


def _records(evidence: Evidence) -> Iterator[Fact]:
    for item, started in evidence.of(RecordStarted):
        yield Fact("Record", started.record, cite([item.index]), mono=True, note=f"made with {started.tool}")
    for item, sealed in evidence.of(RecordSealed):
        reason = f"; {sealed.reason}" if sealed.reason else ""
        note = f"{sealed.status}; {words.plural(sealed.cells, 'cell')}{reason}"
        yield Fact("Record sealed", f"sha256 {sealed.digest}", cite([item.index]), mono=True, note=note)
    for item, again in evidence.of(RecordReproduced):
        yield Fact("Record reproduced", again.record, cite([item.index]), mono=True, note=_again(again))


def _again(event: RecordReproduced) -> str:
    """How a record came out when whoever keeps this trail ran it again."""
    stated = ", ".join(f"{name}={value}" for name, value in event.tolerance.items())
    where = {"same": "the same environment", "other": "another environment"}.get(event.environment, "")
    parts = [
        event.verdict,
        f"tolerance {stated}" if stated else "",
        f"first in {event.first}" if event.first else "",
        where,
    ]
    return "; ".join(part for part in parts if part)
