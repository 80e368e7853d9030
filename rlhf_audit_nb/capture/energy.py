"""Energy from the counters that a machine has, or none at all: it is never guessed. Floor 2.

``rapl``  Linux' powercap: the energy of the processors' packages (``/sys/class/powercap/intel-rapl:N``, also on AMD).
          The counter is small and starts again at its range, so `EnergyMeter.sample` must be called every few minutes.
          Usually only the superuser may read it.
``nvml``  NVIDIA's own total of each GPU that torch sees, through ``pynvml`` where that is installed.

Both count whole packages and boards: what other processes do there is in it, and memory, fans and cooling are not.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["POWERCAP", "Counter", "EnergyMeter", "nvml_counters", "rapl_counters"]

POWERCAP = Path("/sys/class/powercap")
SAMPLE_SECONDS = 10.0

_PACKAGE = re.compile(r"intel-rapl:\d+")


class Counter:
    """One counter, in joules; what it has counted since it was made, over as many restarts as were sampled.

    Args:
        source: ``rapl`` or ``nvml``.
        read: gives the joules that the counter shows.
        span: at which it starts again from 0; ``None`` where it does not.
    """

    def __init__(self, source: str, read: Callable[[], float], span: float | None = None) -> None:
        self.source = source
        self.joules = 0.0
        self._read, self._span = read, span
        self._last = read()

    def sample(self) -> None:
        """Take the counter's value now."""
        now = self._read()
        more = now - self._last
        if more < 0 and self._span is not None:
            more += self._span
        self.joules += max(0.0, more)
        self._last = now


class EnergyMeter:
    """All counters of this machine from now on.

    Where a counter fails on the way, its whole source is left out: a sum without one of the packages or boards would be
    too small and look whole.
    """

    def __init__(self, counters: list[Counter]) -> None:
        self._counters = counters
        self._next = time.monotonic() + SAMPLE_SECONDS

    def sample(self, *, now: bool = False) -> None:
        """Read the counters, every ten seconds at most unless ``now``."""
        if not self._counters:
            return
        clock = time.monotonic()
        if clock < self._next and not now:
            return
        self._next = clock + SAMPLE_SECONDS
        failed = {counter.source for counter in self._counters if not _sampled(counter)}
        self._counters = [counter for counter in self._counters if counter.source not in failed]

    def joules(self) -> dict[str, float]:
        """What was counted, by source; empty without counters."""
        self.sample(now=True)
        found: dict[str, float] = {}
        for counter in self._counters:
            found[counter.source] = found.get(counter.source, 0.0) + counter.joules
        return found


def _sampled(counter: Counter) -> bool:
    try:
        counter.sample()
    except Exception:
        return False
    return True


def rapl_counters(folder: Path = POWERCAP) -> list[Counter]:
    """The packages' counters that may be read here."""
    found = []
    for domain in sorted(folder.glob("intel-rapl:*")):
        if not _PACKAGE.fullmatch(domain.name):
            continue  # a part of a package, which is in the package's own
        try:
            if (domain / "name").read_text().strip() == "psys":
                continue  # the whole platform: the packages are in it
            span = int((domain / "max_energy_range_uj").read_text()) / 1e6
            found.append(Counter("rapl", partial(_microjoules, domain / "energy_uj"), span))
        except (OSError, ValueError):
            continue
    return found


def _microjoules(path: Path) -> float:
    return int(path.read_text()) / 1e6


def _millijoules(library: Any, handle: Any) -> float:
    return float(library.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3


def nvml_counters() -> list[Counter]:
    """The counters of the GPUs that torch sees; none where ``pynvml`` or a GPU is missing."""
    import torch

    if not torch.cuda.is_available():
        return []
    try:
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        names = [f"GPU-{torch.cuda.get_device_properties(at).uuid}" for at in range(torch.cuda.device_count())]
        handles = [pynvml.nvmlDeviceGetHandleByUUID(name) for name in names]
        return [Counter("nvml", partial(_millijoules, pynvml, handle)) for handle in handles]
    except Exception:
        return []
