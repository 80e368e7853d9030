"""Records steps with one peer and prints what a step cost; run by any interpreter that has the peer installed.

``python peers.py trackio|wandb|mlflow FOLDER STEPS PACE``: nothing leaves the machine.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


def _metrics(number: int) -> dict[str, float]:
    return {f"metric/{n}": 0.1 * n + number for n in range(7)} | {"learning_rate": 1e-4}


def _trackio(folder: Path) -> Callable[[int], object]:
    os.environ["TRACKIO_DIR"] = str(folder)
    import trackio

    run = trackio.init(project="bench", name="bench", embed=False)
    return lambda number: run.log(_metrics(number), step=number)


def _wandb(folder: Path) -> Callable[[int], object]:
    os.environ["WANDB_SILENT"] = "true"
    import wandb

    run = wandb.init(project="bench", mode="offline", dir=str(folder))
    return lambda number: run.log(_metrics(number), step=number)


def _mlflow(folder: Path) -> Callable[[int], object]:
    logging.disable(logging.WARNING)
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.sqlite'}")
    mlflow.start_run()
    return lambda number: mlflow.log_metrics(_metrics(number), step=number)


def main() -> None:
    """Opens the peer, warms it up, records, prints, and leaves without asking it to upload anything."""
    name, folder, steps, pace = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    log = {"trackio": _trackio, "wandb": _wandb, "mlflow": _mlflow}[name](folder)
    for number in range(1, 11):
        log(number)
    taken = []
    for number in range(11, steps + 11):
        began = time.perf_counter()
        log(number)
        taken.append(1e6 * (time.perf_counter() - began))
        time.sleep(pace)
    taken.sort()
    found = {f"p{share}": taken[min(len(taken) - 1, share * len(taken) // 100)] for share in (50, 99)}
    print(json.dumps({**found, "version": f"{name} {importlib.metadata.version(name)}"}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
