"""A witness's server on loopback, for as long as a test needs it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rlhf_audit_nb.trail.witness_server import WitnessServer

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.witness import Witness

__all__ = ["listening"]


@contextmanager
def listening(witness: Witness) -> Iterator[str]:
    """The address at which the witness answers."""
    server = WitnessServer(witness)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.stop()
        thread.join(20)
