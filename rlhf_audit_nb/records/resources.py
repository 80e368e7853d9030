"""What statements are made of: an entry's event, and an in-toto resource descriptor. Floor 3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_audit_nb.events import DataBound, Event, RunResumed, decode_body
from rlhf_audit_nb.trail.merkle import leaf_hash

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.entry import Entry

__all__ = ["checkpoint_resource", "data_resource", "event_of", "leaf", "resource"]

EventT = TypeVar("EventT", bound=Event)


def event_of(entry: Entry, kind: type[EventT]) -> EventT:
    """The entry's event, which is of type ``kind``."""
    event = decode_body(entry.type, entry.body)
    assert isinstance(event, kind)
    return event


def leaf(entry: Entry) -> str:
    """By what a statement names an entry: its RFC 6962 leaf hash, hex."""
    return leaf_hash(entry.data).hex()


def resource(name: str, sha256: str, **annotations: Any) -> dict[str, Any]:
    """A resource descriptor; annotations that are ``None`` are left out."""
    kept = {key: value for key, value in annotations.items() if value is not None}
    found: dict[str, Any] = {"name": name, "digest": {"sha256": sha256}}
    return {**found, "annotations": kept} if kept else found


def data_resource(entry: Entry, event: DataBound, **more: Any) -> dict[str, Any]:
    """A data set by its digest; where differential privacy seals that, by the entry that holds the commitment."""
    notes = {"run": entry.run, "entry": entry.index, "source": event.source, **more}
    if event.digest is not None:
        return resource(f"data:{event.role}", event.digest, **notes)
    return resource(f"data:{event.role}", leaf(entry), **notes, committed=True)


def checkpoint_resource(entry: Entry, event: RunResumed) -> list[dict[str, Any]]:
    """The checkpoint that a training was resumed from, where its digest is known."""
    if event.checkpoint is None:
        return []
    notes = {"run": entry.run, "entry": entry.index, "step": event.step, "fromRun": event.from_run}
    return [resource("checkpoint", event.checkpoint, **notes)]
