"""What is still queued when the process ends: it is flushed at exit and on SIGTERM. Floor 0.

*Exit* (also after an exception, at a kernel's shutdown, in a notebook's restart): `atexit` closes what is open.

*SIGTERM* ends a Python process at once, with nothing run any more. While a trail is open, and where the process has no
handler of its own, this module's handler has a thread of its own flush what is open (never the signal's own frame: the
code that it interrupted may hold the locks that a flush needs), within a bounded time; then the process dies of the
signal as it would have. A handler that the user has set is left alone: it may call `Trail.flush` from a thread, or
raise ``SystemExit``, after which the exit flushes.

Whoever has something to append before that says so with `before_ending`.
"""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from rlhf_audit_nb.errors import AuditError

__all__ = ["INTERPRETER_EXIT", "SIGTERM", "before_ending", "forget", "on_sigterm", "watch"]

PATIENCE_SECONDS = 10.0
SIGTERM, INTERPRETER_EXIT = "SIGTERM", "interpreter-exit"
"""Why a process ends, as `before_ending` tells it."""


class _Closable(Protocol):
    def flush(self) -> None:
        """Make all that is queued durable."""

    def close(self) -> None:
        """Make it durable, and let go."""


_OPEN: weakref.WeakSet[_Closable] = weakref.WeakSet()
_LAST_WORDS: list[Callable[[str], None]] = []


@dataclass
class _Sigterm:
    """What SIGTERM does next: begin to flush; nothing, while that lasts; end the process."""

    flushing: bool = False
    flushed: bool = False


_sigterm = _Sigterm()


def watch(writer: _Closable) -> None:
    """Flush ``writer`` when the process ends. In the main thread this also sees to SIGTERM."""
    _OPEN.add(writer)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, on_sigterm)


def before_ending(speak: Callable[[str], None]) -> None:
    """Call ``speak`` when the process ends, before anything is flushed: with `SIGTERM` or `INTERPRETER_EXIT`.

    It is called in another thread than the main one where the process was sent a signal.
    """
    _LAST_WORDS.append(speak)


def forget(writer: _Closable) -> None:
    """``writer`` was closed; after the last one SIGTERM does again what it did."""
    _OPEN.discard(writer)
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is on_sigterm
    if not _OPEN and ours:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def on_sigterm(_signal: int, _frame: object) -> None:
    """The handler: flush in another thread, then die of the signal."""
    if _OPEN and not _sigterm.flushing:
        _sigterm.flushing = True
        # Not threading.Thread, whose start takes locks that the interrupted code may hold.
        _thread.start_new_thread(_flush_and_signal, ())
    elif not _OPEN or _sigterm.flushed:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


def _flush_and_signal() -> None:
    try:
        flushing = threading.Thread(target=_flush_all, name="rlhf-audit-flush", daemon=True)
        flushing.start()
        flushing.join(PATIENCE_SECONDS)
        if flushing.is_alive():
            _say(f"what was appended last could not be written within {PATIENCE_SECONDS:.0f} s of SIGTERM")
    finally:
        _sigterm.flushed = True
        os.kill(os.getpid(), signal.SIGTERM)


def _flush_all() -> None:
    _speak(SIGTERM)
    for writer in list(_OPEN):
        try:
            writer.flush()
        except AuditError as error:
            _say(str(error))


def _say(sentence: str) -> None:
    # The process is about to die: straight to the descriptor, past buffers and locks.
    os.write(2, f"rlhf-audit: {sentence}\n".encode(errors="replace"))


@atexit.register
def _close_all() -> None:
    """What was appended and not closed becomes durable when the interpreter ends; no failure stops the others."""
    _speak(INTERPRETER_EXIT)
    with ExitStack() as closing:
        for writer in list(_OPEN):
            closing.callback(writer.close)


def _speak(why: str) -> None:
    for speak in _LAST_WORDS:
        try:
            speak(why)
        except AuditError as error:
            _say(str(error))


def _in_child() -> None:
    _sigterm.flushing = _sigterm.flushed = False


os.register_at_fork(after_in_child=_in_child)
