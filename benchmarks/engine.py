"""What a record costs beside papermill's own engine, on the same notebook: time around ``execute_notebook``.

The two take turns, and a round gives one difference: audit - 1.01 × papermill's own, which is to stay within 50 ms. The
kernel's start is in both and varies by more than that, so the median over the rounds counts, and the processor time of
the executing process stands beside it: that is what the engine itself takes, whatever else the machine does.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, quantile

SHARE = 0.01
TARGET = 50.0
ENGINES = ("nbclient", "audit")
CODE = "print('line\\n' * 20)\n{'value': 1.5}"


def _notebook(path: Path, cells: int) -> Path:
    import nbformat

    made = [nbformat.v4.new_code_cell(CODE, id=f"cell-{i}") for i in range(cells)]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": spec})))
    return path


def _once(source: Path, engine: str) -> tuple[float, float]:
    """Milliseconds on the clock, and of this process's processor time."""
    import papermill

    settings: dict[str, Any] = {"audit_trail": source.parent / "audit"} if engine == "audit" else {}
    output = source.with_suffix(f".{engine}.ipynb")
    began, busy = time.perf_counter(), time.process_time()
    papermill.execute_notebook(source, output, engine_name=engine, progress_bar=False, **settings)
    return 1e3 * (time.perf_counter() - began), 1e3 * (time.process_time() - busy)


def _measured(folder: Path, cells: int, rounds: int) -> Iterator[Figure]:
    source = _notebook(folder / f"{cells}.ipynb", cells)
    for engine in ENGINES:
        _once(source, engine)  # imports, the trail and its keys
    taken: dict[str, list[tuple[float, float]]] = {engine: [] for engine in ENGINES}
    for number in range(rounds):
        for engine in ENGINES if number % 2 else ENGINES[::-1]:
            taken[engine].append(_once(source, engine))
    plain, audit = taken["nbclient"], taken["audit"]
    named = f"a notebook of {cells} cells"
    how = f"median of {rounds} rounds, load {os.getloadavg()[0]:.1f}"
    yield Figure(f"papermill's own engine, {named}", quantile([wall for wall, _ in plain], 0.5), "ms", how=how)
    yield Figure(f"engine audit, {named}", quantile([wall for wall, _ in audit], 0.5), "ms", how=how)
    for place, what in enumerate(("clock", "processor time of the executing process")):
        beyond = [ours[place] - (1 + SHARE) * theirs[place] for ours, theirs in zip(audit, plain, strict=True)]
        named_so = f"audit - 1.01 × papermill's own, {named}, {what}"
        yield Figure(named_so, quantile(beyond, 0.5), "ms", TARGET, how=how)


def measure(folder: Path, *, quick: bool) -> Iterator[Figure]:
    """A short notebook and one of a hundred cells, in a trail under ``folder``."""
    logging.getLogger("papermill").setLevel(logging.ERROR)
    folder.mkdir(parents=True)
    for cells in (5,) if quick else (5, 100):
        yield from _measured(folder, cells, 3 if quick else 11)
