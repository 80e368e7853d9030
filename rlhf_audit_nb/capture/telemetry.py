"""Telemetry of the training libraries: off while a run is open, unless the user turned it on. Floor 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from rlhf_audit_nb.counted import Counted

__all__ = ["no_telemetry"]

TELEMETRY = "HF_HUB_DISABLE_TELEMETRY"


def no_telemetry() -> AbstractContextManager[None]:
    """Telemetry off for as long as the block, or another one beside it, runs; a user's own setting stands."""
    return _off.held()


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


_off = Counted(_turned_off)
