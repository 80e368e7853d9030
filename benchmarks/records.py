"""What it costs to seal, verify, bundle and compare a large record: 100 cells with pictures and text, 20 MB."""

from __future__ import annotations

import base64
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure

__all__ = ["large_notebook", "measure"]

CELLS = 100
PICTURE = 75_000
LINES = 2_900
SECONDS = 1.0
BUNDLE_SECONDS = 2.0


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


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def _once(folder: Path) -> tuple[list[float], int]:
    """Seconds to seal, verify, bundle and compare, and the record's bytes."""
    import nbformat

    from rlhf_audit_nb.records import verify_record
    from rlhf_audit_nb.records.session import Outcome, RecordSession
    from rlhf_audit_nb.reports.record_bundle import bundle_record
    from rlhf_audit_nb.trail import Level

    notebook = large_notebook()
    session = RecordSession.begin(notebook, {"name": "k", "language": "r", "display_name": "K"}, folder / "audit")
    try:
        sealing, _ = _timed(lambda: session.seal(notebook, Outcome("completed")))
    finally:
        session.close()
    path = folder / "record.ipynb"
    path.write_text(nbformat.writes(notebook), encoding="utf-8")
    verifying, verdict = _timed(lambda: verify_record(path))
    assert verdict.level is Level.UNANCHORED, verdict
    bundling, _ = _timed(lambda: bundle_record(path).save(folder / f"{time.monotonic_ns()}.zip"))
    comparing, equal = _timed(lambda: _compared(json.loads(path.read_bytes()), notebook))
    assert equal
    return [sealing, verifying, bundling, comparing], path.stat().st_size


def _compared(then: Any, now: Any) -> bool:
    """Whether all outputs are the same, as a reproduction compares them."""
    from rlhf_audit_nb.records.normal_form import freeze
    from rlhf_audit_nb.records.normalising import compare_outputs

    plain = json.loads(json.dumps(now))
    for notebook in (then, plain):
        freeze(notebook)
    found = compare_outputs(then, plain)
    return found.compared >= CELLS and not found.differences


def measure(folder: Path, *, quick: bool) -> Iterator[Figure]:
    """The figures; the first round, which imports what is needed, is not counted."""
    folder.mkdir(parents=True)
    rounds = [_once(folder) for _ in range(2 if quick else 6)][1:]
    size = rounds[0][1] / 1e6
    how = f"{CELLS} cells, {size:.1f} MB, median of {len(rounds)}"
    medians = [statistics.median(times) for times in zip(*(seconds for seconds, _ in rounds), strict=True)]
    for what, target, seconds in zip(
        (
            "sealing a large record, its copy included",
            "verifying a large record",
            "bundling a large record, its report included",
            "comparing the outputs of a large record with a new run's",
        ),
        (SECONDS, SECONDS, BUNDLE_SECONDS, SECONDS),
        medians,
        strict=True,
    ):
        yield Figure(what, seconds, "s", target, how=how)
