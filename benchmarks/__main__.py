"""``python -m benchmarks [--quick] [--json FILE] [--only NAME]``: prints one table."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.figures import Figure, table

QUIET = 0.02
"""How far the control may be from 1 before the ratios are called doubtful."""


def _figures(folder: Path, only: str | None, *, quick: bool) -> list[Figure]:
    from benchmarks import (
        annotations,
        capture,
        engine,
        hashing,
        labels,
        planning,
        records,
        startup,
        trails,
        training,
        verifying,
    )

    rooms: dict[str, Callable[[], Iterable[Figure]]] = {
        "startup": startup.measure,
        "trail": lambda: trails.measure(folder, quick=quick),
        "verifying": lambda: verifying.measure(folder / "verifying", quick=quick),
        "hashing": lambda: hashing.measure(folder / "hashing", quick=quick),
        "annotations": lambda: annotations.measure(folder, quick=quick),
        "planning": lambda: planning.measure(quick=quick),
        "engine": lambda: engine.measure(folder / "engine", quick=quick),
        "capture": lambda: capture.measure(folder / "capture", quick=quick),
        "training": lambda: training.measure(folder / "training", quick=quick),
        "labels": lambda: labels.measure(folder / "labels", quick=quick),
        "records": lambda: records.measure(folder / "records", quick=quick),
    }
    found = []
    for name, measure in rooms.items():
        if only in (None, name):
            print(f"measuring: {name}", file=sys.stderr, flush=True)
            with contextlib.redirect_stdout(sys.stderr):  # trainers print; stdout is for the table
                found += list(measure())
    return found


def _trust(figures: list[Figure]) -> str:
    """Whether the ratios of steps can be believed: two equal trainings must come out equal."""
    from benchmarks.training import CONTROL

    for figure in figures:
        if figure.what.startswith(CONTROL) and abs(figure.value - 1) > QUIET:
            return (
                f"\nA control is {figure.value:.3f}, not 1: the machine was not quiet; the ratio beside it says little."
            )
    return ""


def main() -> int:
    """Measures, prints, and writes JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats: shows that it runs, not what it costs")
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter that has trackio, wandb and mlflow")
    parser.add_argument(
        "--only",
        choices=(
            "startup",
            "trail",
            "verifying",
            "hashing",
            "annotations",
            "planning",
            "engine",
            "capture",
            "training",
            "labels",
            "records",
        ),
    )
    args = parser.parse_args()
    if args.peers:
        os.environ["RLHF_AUDIT_BENCH_PEERS"] = args.peers
    with tempfile.TemporaryDirectory(prefix="rlhf-audit-bench-") as name:
        os.environ["RLHF_AUDIT_HOME"] = str(Path(name) / "home")
        figures = _figures(Path(name), args.only, quick=args.quick)
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, load {load:.1f}\n")
    print(table(figures))
    print(_trust(figures))
    if args.json:
        Path(args.json).write_text(json.dumps([figure.to_dict() for figure in figures], indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
