"""What a record says of its reproductions, read from its additions. Floor 3.

Light: whoever verifies a record reads this, and needs nothing of what runs one (`reproduce`, `reproduce_keeping`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from rlhf_audit_nb.events import RecordReproduced
from rlhf_audit_nb.records.additions import REPRODUCTION
from rlhf_audit_nb.trail import Reason

if TYPE_CHECKING:
    from rlhf_audit_nb.events import RecordSealed
    from rlhf_audit_nb.records.additions import Addition
    from rlhf_audit_nb.records.record import OpenedRecord

__all__ = ["DIFFERENT", "EQUAL", "IDENTICAL", "Reproduced", "reproduction_notes", "reproductions_of"]

IDENTICAL = "identical"
EQUAL = "equal within tolerance"
DIFFERENT = "different"

_NOT_THE_EVENTS = ("key", "time", "previous", "entry")


@dataclass(frozen=True)
class Reproduced:
    """What an addition to a record says of a reproduction; whose key counts is for a policy to say.

    Attributes:
        index: its place among the additions, from 0.
        verdict: ``identical``, ``equal within tolerance`` or ``different``; ``unreadable`` where it says none of these.
        key_id: of the key that signed it.
        time: the signer's clock, RFC 3339.
        own: whether the key is one that signed the record itself.
        event: all that it says, ``None`` where it is unreadable.
    """

    index: int
    verdict: str
    key_id: str
    time: str
    own: bool
    event: RecordReproduced | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "verdict": self.verdict,
            "key_id": self.key_id,
            "time": self.time,
            "own_key": self.own,
            "first": self.event.first if self.event else None,
            "tolerance": self.event.tolerance if self.event else {},
            "environment": self.event.environment if self.event else "unknown",
        }

    def __str__(self) -> str:
        whose = "the record's own key" if self.own else "key"
        more = ""
        if self.event is not None:
            stated = ", ".join(f"{name}={value}" for name, value in self.event.tolerance.items())
            more += f" ({stated})" if self.verdict == EQUAL else ""
            more += f", first in {self.event.first}" if self.verdict == DIFFERENT else ""
            more += "; another environment" if self.event.environment == "other" else ""
        return f"reproduced: {self.verdict}{more}, by {whose} {self.key_id[:16]}, {self.time}"


def reproductions_of(opened: OpenedRecord) -> list[Reproduced]:
    """What a verified record's additions say of reproductions, in their order."""
    return _all(opened.additions, opened.sealed)


def reproduction_notes(additions: Sequence[Addition], sealed: RecordSealed | None) -> list[Reason]:
    """The same as what is worth knowing beside a verdict."""
    return [
        Reason("reproduced", f"metadata.rlhf_audit.additions[{said.index}]", f"{said}.")
        for said in _all(additions, sealed)
    ]


def _all(additions: Sequence[Addition], sealed: RecordSealed | None) -> list[Reproduced]:
    own = tuple(sealed.keys or ()) if sealed is not None else ()
    return [_said(item, own) for item in additions if item.predicate_type == REPRODUCTION]


def _said(addition: Addition, own: Sequence[str]) -> Reproduced:
    body = {name: value for name, value in addition.predicate.items() if name not in _NOT_THE_EVENTS}
    time, mine = str(addition.predicate["time"]), addition.key_id in own
    try:
        event = msgspec.convert(body, RecordReproduced)
    except msgspec.ValidationError:
        event = None
    if event is None or event.verdict not in (IDENTICAL, EQUAL, DIFFERENT):
        return Reproduced(addition.index, "unreadable", addition.key_id, time, mine)
    return Reproduced(addition.index, event.verdict, addition.key_id, time, mine, event)
