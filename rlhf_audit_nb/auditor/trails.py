"""One trail is opened once in a process, however many auditors share it. Floor 5."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_audit_nb.config import ENV_REPLAY, AuditConfig
from rlhf_audit_nb.errors import AuditError, StoreError

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import Trail

__all__ = ["shared_trail", "trail_if_open"]

_trails: dict[Path, Trail] = {}
_openers: dict[Path, int] = {}
"""In which process each was opened: a child that was forked later has a copy of it."""
_lock = threading.Lock()


def shared_trail(config: AuditConfig) -> Trail:
    """The trail that the configuration names, opened where it is not open yet.

    Raises:
        TrailError: it cannot be opened, or has another origin.
    """
    from rlhf_audit_nb.capture.ranks import find_place, silent_trail
    from rlhf_audit_nb.trail import Trail

    location = config.trail_location().absolute()
    replaying = bool(os.environ.get(ENV_REPLAY))  # then the trail is the replay's own, whatever the code calls it
    origin = None if replaying else config.origin
    place = find_place()
    with _lock:
        trail = _trails.get(location)
        if place is not None and not place.writes and (trail is None or _openers[location] != os.getpid()):
            return silent_trail(place)
        if trail is not None and not location.is_dir():
            # The folder was deleted under us: what is still open there is nobody's trail any more.
            _close(_trails.pop(location))
            trail = None
        if trail is None:
            trail = Trail.open(
                location,
                origin=origin,
                durability=config.durability,
                asynchronous=config.asynchronous,
                create=not replaying,
            )
            _trails[location], _openers[location] = trail, os.getpid()
    if origin not in (None, trail.origin):
        raise StoreError(
            f"The trail {config.trail_location()} is {trail.origin}, not {origin}.",
            next_step="Leave the origin out, or name another folder for a new trail.",
            code="origin",
        )
    return trail


def trail_if_open(config: AuditConfig) -> Trail | None:
    """The trail that the configuration names, where this process has it open."""
    with _lock:
        return _trails.get(config.trail_location().absolute())


def _close(trail: Trail) -> None:
    with suppress(AuditError):
        trail.close()
