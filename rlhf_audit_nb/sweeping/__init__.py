"""Sweeps: one notebook run many times over a grid of parameters, each run a record, one ledger over all. Floor 5.

`sweep.run_sweep` reads the grid (`grid`), looks at what is there already (`state`), holds the budget for what is
missing, has `pool` (processes of this machine) or `cluster` (Dask) carry out each run (`task`), and seals a summary
(`summary`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_audit_nb.sweeping.grid import Grid, Point, read_grid
    from rlhf_audit_nb.sweeping.sweep import SweepResult, run_sweep

__all__ = ["Grid", "Point", "SweepResult", "read_grid", "run_sweep"]

# The kernel that makes a summary needs a part of this room only, and starts sooner without the rest.
_MODULES = {"Grid": "grid", "Point": "grid", "SweepResult": "sweep", "read_grid": "grid", "run_sweep": "sweep"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
