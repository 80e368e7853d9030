"""Processes that race for one budget: each plans from the trail's ledger and reserves what it planned, for good.

A worker is a process of its own that opens the trail by its folder, as a kernel on the same machine would. Nothing of
the ledger, the trail or the reservation is replaced; no trainer is needed, since the roster is handed in. ``faulty``
plants the fault that the race is there to find: the check is made before the append, and not within it.
"""

from __future__ import annotations

import multiprocessing
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from support.processes import startable

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import BudgetExceededError
from rlhf_audit_nb.privacy.accountant import Mechanism, compose
from rlhf_audit_nb.privacy.plan import plan_units
from rlhf_audit_nb.privacy.reservation import read_ledger, reserve
from rlhf_audit_nb.privacy.sampling import SealedRandom
from rlhf_audit_nb.privacy.units import Units
from rlhf_audit_nb.trail import Trail

__all__ = ["DELTA", "ONE", "racers"]

DELTA = 1e-5
ONE = Mechanism(2.0, 0.2, 3)
_UNITS = Units("pair", tuple((row,) for row in range(20)))
_PATIENCE = 120.0


def _reserved_once(folder: Path, epsilon: float) -> str:
    config = PrivacyConfig(
        epsilon=epsilon,
        delta=DELTA,
        unit="pair",
        noise_multiplier=ONE.noise_multiplier,
        sampling_rate=ONE.sampling_rate,
    )
    with Trail.open(folder) as trail:
        try:
            prior = read_ledger(trail.reader()).mechanisms("pair")
            plan = plan_units(config, _UNITS, ONE.sampling_rate, ONE.steps, 5, prior)
            plan = reserve(trail, plan, SealedRandom.from_system(), reservation=uuid.uuid4().hex, run=uuid.uuid4().hex)
        except BudgetExceededError:
            return "refused"
    return "got it" if plan.steps == ONE.steps else f"got {plan.steps} steps"


def _checked_before(trail: Trail, kind: str, body_fn: Any, **given: Any) -> Any:
    """The planted fault: the ledger is looked at, and the entry appended a moment later."""
    body = body_fn(trail.reader())
    return _append_guarded(trail, kind, lambda _reader: body, **given)


_append_guarded = Trail.append_guarded


def _work(pipe: Any, start: Any) -> None:
    compose([ONE], DELTA)  # imports and first tables, before the first race
    pipe.send("ready")
    while (round_ := pipe.recv()) is not None:
        folder, epsilon, faulty = round_
        start.wait(_PATIENCE)
        try:
            if faulty:
                with patch.object(Trail, "append_guarded", _checked_before):
                    pipe.send(_reserved_once(folder, epsilon))
            else:
                pipe.send(_reserved_once(folder, epsilon))
        except Exception as error:  # told to the test, which fails with it
            pipe.send(f"{type(error).__name__}: {error}")


@contextmanager
def racers(count: int) -> Iterator[Any]:
    """``count`` processes; what comes back starts a race, and gives what each said."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    start = context.Barrier(count)
    pipes, processes = [], []
    for _ in range(count):
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, start), daemon=True)
        with startable():
            process.start()
        pipes.append(ours)
        processes.append(process)

    def answers() -> list[str]:
        found = []
        for pipe in pipes:
            assert pipe.poll(_PATIENCE), "a racer does not answer"
            found.append(pipe.recv())
        return found

    def race(folder: Path, epsilon: float, *, faulty: bool = False) -> list[str]:
        for pipe in pipes:
            pipe.send((folder, epsilon, faulty))
        return answers()

    try:
        assert answers() == ["ready"] * count
        yield race
    finally:
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
