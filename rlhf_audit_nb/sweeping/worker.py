"""A worker process of a local sweep: tasks come in as lines of JSON, what became of them goes out. Floor 5.

``python -m rlhf_audit_nb.sweeping.worker`` is started by `pool` in a session of its own, so that Ctrl-C in a terminal
reaches the sweep and not the worker twice. SIGINT seals the run that is under way. It ends when its input does, after
the run that it has: also where the sweep itself was killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import TextIO

from rlhf_audit_nb.sweeping.task import Task, run_task

__all__ = ["main"]


def main() -> int:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with _answers() as answers:
        import papermill  # noqa: F401 here, once, and not in the first run

        while True:
            try:
                line = sys.stdin.readline()
            except KeyboardInterrupt:
                return 0
            if not line:
                return 0
            said = run_task(Task(**json.loads(line)))
            try:
                print(json.dumps(said), file=answers, flush=True)
            except BrokenPipeError:  # the sweep is gone; what was run is sealed and has its name
                return 0


def _answers() -> TextIO:
    """What was stdout, for us alone: neither a kernel nor a library may write into it, or keep it open."""
    mine = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return mine


if __name__ == "__main__":
    sys.exit(main())
