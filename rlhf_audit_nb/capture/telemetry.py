"""Telemetry of the training libraries: off while a run is open, unless the user turned it on. Floor 2."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

__all__ = ["no_telemetry"]

TELEMETRY = "HF_HUB_DISABLE_TELEMETRY"

_lock = threading.Lock()
_users = 0
_off = ExitStack()


@contextmanager
def no_telemetry() -> Iterator[None]:
    """Telemetry off for as long as the block, or another one beside it, runs; a user's own setting stands."""
    global _users, _off  # noqa: PLW0603  one setting for the whole process, counted
    with _lock:
        if _users == 0:
            _off = _turn_off()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _off.close()


def _turn_off() -> ExitStack:
    with ExitStack() as stack:
        stack.enter_context(_turned_off())
        return stack.pop_all()


@contextmanager
def _turned_off() -> Iterator[None]:
    if TELEMETRY in os.environ:
        yield
        return
    # The hub library reads the variable once, when it is imported.
    constants = sys.modules.get("huggingface_hub.constants")
    before = getattr(constants, TELEMETRY, None)
    os.environ[TELEMETRY] = "1"
    if constants is not None and before is not None:
        setattr(constants, TELEMETRY, True)
    try:
        yield
    finally:
        os.environ.pop(TELEMETRY, None)
        if constants is not None and before is not None:
            setattr(constants, TELEMETRY, before)
