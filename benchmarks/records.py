"""What it costs to seal and to verify a large record: 100 cells with pictures and text, 20 MB."""

from __future__ import annotations

import base64
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure

__all__ = ["large_notebook", "measure"]

CELLS = 100
PICTURE = 75_000
LINES = 2_900
SECONDS = 1.0


def large_notebook() -> Any:
    """A notebook as if executed: each cell shows a picture and a long text of its own."""
    from nbformat.v4 import new_code_cell, new_notebook, new_output

    picture = base64.b64encode(os.urandom(PICTURE)).decode()
    text = "\n".join(f"step {number} loss {number / 7:.6f}" for number in range(LINES))
    cells = []
    for number in range(CELLS):
        shown = new_output("display_data", data={"image/png": picture[number:], "text/plain": "figure"})
        printed = new_output("stream", name="stdout", text=f"{number}\n{text}")
        cells.append(new_code_cell(f"train({number})", id=f"cell-{number}", outputs=[shown, printed]))
    return new_notebook(cells=cells)


def _once(folder: Path) -> tuple[float, float, int]:
    """Seconds to seal and to verify, and the record's bytes."""
    import nbformat

    from rlhf_audit_nb.records import verify_record
    from rlhf_audit_nb.records.session import Outcome, RecordSession
    from rlhf_audit_nb.trail import Level

    notebook = large_notebook()
    session = RecordSession.begin(notebook, {"name": "k", "language": "r", "display_name": "K"}, folder / "audit")
    try:
        started = time.perf_counter()
        session.seal(notebook, Outcome("completed"))
        sealing = time.perf_counter() - started
    finally:
        session.close()
    path = folder / "record.ipynb"
    path.write_text(nbformat.writes(notebook), encoding="utf-8")
    started = time.perf_counter()
    level = verify_record(path).level
    verifying = time.perf_counter() - started
    assert level is Level.UNANCHORED, level
    return sealing, verifying, path.stat().st_size


def measure(folder: Path, *, quick: bool) -> Iterator[Figure]:
    """The figures; the first round, which imports what is needed, is not counted."""
    folder.mkdir(parents=True)
    rounds = [_once(folder) for _ in range(2 if quick else 6)][1:]
    size = rounds[0][2] / 1e6
    how = f"{CELLS} cells, {size:.1f} MB, median of {len(rounds)}"
    sealing, verifying = (statistics.median(times) for times in list(zip(*rounds, strict=True))[:2])
    yield Figure("sealing a large record, its copy included", sealing, "s", SECONDS, how=how)
    yield Figure("verifying a large record", verifying, "s", SECONDS, how=how)
