"""What starting costs: importing the package, loading the extension."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from benchmarks.figures import Figure

__all__ = ["measure"]

REPEATS = 5

IMPORT = "import time; t = time.perf_counter(); import rlhf_audit_nb; print(time.perf_counter() - t)"
LOAD = """
import time
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
t = time.perf_counter()
shell.run_line_magic("load_ext", "rlhf_audit_nb")
print(time.perf_counter() - t)
"""


def _fastest(code: str) -> float:
    taken = []
    for _ in range(REPEATS):
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
        taken.append(float(done.stdout.split()[-1]))
    return min(taken)


def measure() -> Iterator[Figure]:
    """Both, each the fastest of several new processes."""
    how = f"fastest of {REPEATS} new processes"
    yield Figure("import rlhf_audit_nb", _fastest(IMPORT), "s", 0.3, how=how)
    yield Figure("%load_ext rlhf_audit_nb", _fastest(LOAD), "s", 0.5, how=how + ", IPython up")
