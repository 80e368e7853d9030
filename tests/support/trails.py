"""Reading a trail in tests: typed events by kind, and the private half that a commitment covers.

`without_cross_checks` is for tests about something else than accounting: the epsilon stays what it is, only the two
accountants that check it (seconds of work each time) are left out, which is recorded like any failed check.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rlhf_audit_nb.events import decode_body, decode_private

__all__ = ["events", "kinds", "private_half", "without_cross_checks"]


def kinds(trail: Any, run: str | None = None) -> list[str]:
    """The types of a run's entries in order."""
    return [entry.type for entry in trail.reader().entries(run=run)]


def events(trail: Any, kind: Any, run: str | None = None) -> list[Any]:
    """All events of one type, decoded."""
    return [decode_body(entry.type, entry.body) for entry in trail.reader().entries(type=kind.TYPE, run=run)]


def private_half(trail: Any, entry: Any) -> Any:
    """What the vault holds for an entry."""
    payload = trail.vault.half(entry).payload
    return decode_private(entry.type, payload)


@contextmanager
def without_cross_checks() -> Iterator[None]:
    """Neither PRV nor RDP is computed inside."""
    from dp_accounting.rdp import RdpAccountant
    from opacus.accountants import PRVAccountant

    def left_out(*_: Any, **__: Any) -> float:
        raise ValueError("left out in this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PRVAccountant, "get_epsilon", left_out)
        patch.setattr(RdpAccountant, "compose", left_out)
        yield
