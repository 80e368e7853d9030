"""Which runs are open in this process, and which of them is meant here. Floor 2.

A run is found through a context variable: what was opened in a thread or an asyncio task is seen there and in the tasks
that it starts. A run that is opened while another one is open here is its child: what is recorded goes to the inner
one while it is open, and to the outer one again afterwards. A new thread inherits no context; it belongs to the run of
whoever started it (``Thread.start`` is wrapped while a run is open). A thread that was not started by Python belongs to
the innermost of the runs that are open, where these stand one inside the other, else to none.

When the process ends with runs open (SIGTERM, the end of the interpreter), each is closed as interrupted, with the
reason. A forked child finds the runs of its parent open, but they are not its to close.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextvars import ContextVar
from itertools import pairwise
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from rlhf_audit_nb.trail.ending import before_ending

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.run import Run

__all__ = ["current_run", "enter", "leave", "open_private_runs"]

_current: ContextVar[Run | None] = ContextVar("rlhf_audit_run", default=None)
_open: list[Run] = []
_lock = threading.Lock()
_starters: WeakKeyDictionary[threading.Thread, Run | None] = WeakKeyDictionary()
_unwrap: list[Callable[[], None]] = []


def current_run() -> Run | None:
    """The run that is open here, or ``None``."""
    run = _still_open(_current.get())
    return run if run is not None else _of_thread(threading.current_thread())


def _still_open(run: Run | None) -> Run | None:
    while run is not None and not run.is_open:  # closed before what was opened inside of it, or in another context
        run = run.outer
    return run


def _of_thread(thread: threading.Thread) -> Run | None:
    with _lock:
        if thread in _starters:
            return _still_open(_starters[thread])
        runs = [run for run in _open if not run.began_after(thread)]
    nested = all(inner.outer is outer for outer, inner in pairwise(runs))
    return runs[-1] if runs and nested else None


def _remember_starters() -> None:
    """Wrap ``Thread.start``, so that a new thread is known to belong to the run of whoever starts it."""
    start = threading.Thread.start

    def remembering(self: threading.Thread) -> None:
        run = current_run()
        with _lock:
            _starters[self] = run
        start(self)

    def put_back() -> None:
        if threading.Thread.start is remembering:  # who wrapped it again after us keeps theirs
            threading.Thread.start = start  # type: ignore[method-assign]

    threading.Thread.start = remembering  # type: ignore[method-assign]
    _unwrap.append(put_back)


def open_private_runs() -> list[Run]:
    """All runs under differential privacy that are open in this process, whichever thread opened them."""
    with _lock:
        return [run for run in _open if run.private]


def enter(run: Run) -> None:
    """``run`` is the one that is meant here from now on."""
    _current.set(run)
    with _lock:
        if not _open:
            _remember_starters()
        _open.append(run)


def leave(run: Run) -> None:
    """``run`` is not meant any more; the one around it is."""
    with _lock:
        if run in _open:
            _open.remove(run)
            if not _open:
                _unwrap.pop()()
    if _current.get() is run:
        _current.set(run.outer)


def _close_all(reason: str) -> None:
    with _lock:
        runs = _open[::-1]  # the inner ones first
    for run in runs:
        run.end_with_process(reason)


def _in_child() -> None:
    global _lock  # noqa: PLW0603  another thread of the parent may have held it
    _lock = threading.Lock()
    for run in _open:
        run.forked()


before_ending(_close_all)
os.register_at_fork(after_in_child=_in_child)
