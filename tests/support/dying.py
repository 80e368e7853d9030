"""A child process that dies without a word at the n-th call that changes a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

CALLS = ("open", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "write", "utime")
KILLED = 9


def _die_at(at: int) -> None:
    left = [at]

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os._exit(KILLED)
            return real(*args, **keywords)

        return call

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))


def in_child(work: Callable[[], object], at: int) -> bool:
    """Whether ``work`` came to its end in a child that dies at the ``at``-th of `CALLS`."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _die_at(at)
            work()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, KILLED), f"call {at}: exit code {code}"
    return code == 0
