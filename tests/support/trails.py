"""Reading a trail in tests: typed events by kind, and the private half that a commitment covers."""

from __future__ import annotations

import base64
from typing import Any

from rlhf_audit_nb.events import decode_body, decode_private

__all__ = ["events", "kinds", "private_half"]


def kinds(trail: Any, run: str | None = None) -> list[str]:
    """The types of a run's entries in order."""
    return [entry.type for entry in trail.reader().entries(run=run)]


def events(trail: Any, kind: Any, run: str | None = None) -> list[Any]:
    """All events of one type, decoded."""
    return [decode_body(entry.type, entry.body) for entry in trail.reader().entries(type=kind.TYPE, run=run)]


def private_half(trail: Any, entry: Any) -> Any:
    """What the vault holds for an entry."""
    payload = trail.vault.open_payload(entry.run, entry.seq, base64.b64decode(entry.envelope.sealed))
    return decode_private(entry.type, payload)
