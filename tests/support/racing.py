"""Processes that race for one budget: each plans from the trail's ledger and reserves what it planned, for good.

A worker is a process of its own that opens the trail by its folder, as a kernel on the same machine would. Nothing of
the ledger, the trail or the reservation is replaced; no trainer is needed, since the roster is handed in, and the two
accountants that only check the third are left out, which would take most of the time. With ``rosters`` the racers are
divided among annotators of these names, who are disjoint, in the place of pairs; with ``slots`` among these slots of a
sweep, ``None`` being none. ``faulty`` plants the fault that the
race is there to find: the check is made before the append, and not within it.
"""

from __future__ import annotations

import multiprocessing
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from support.processes import startable
from support.trails import without_cross_checks

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import BudgetExceededError, PrivacyError
from rlhf_audit_nb.privacy.accountant import Mechanism, compose
from rlhf_audit_nb.privacy.plan import plan_units
from rlhf_audit_nb.privacy.populations import Roster
from rlhf_audit_nb.privacy.reservation import read_ledger, reserve
from rlhf_audit_nb.privacy.sampling import SealedRandom
from rlhf_audit_nb.privacy.units import Units, build_units
from rlhf_audit_nb.trail import Trail

__all__ = ["DELTA", "ONE", "racers"]

DELTA = 1e-5
ONE = Mechanism(2.0, 0.2, 3)
_UNITS = Units("pair", tuple((row,) for row in range(20)))
_PATIENCE = 300.0


def _reserved_once(folder: Path, epsilon: float, name: str | None = None, slot: str | None = None) -> str:
    ids = [f"{name}-{number}" for number in range(len(_UNITS))]
    units = _UNITS if name is None else build_units(ids, len(ids), "annotator")
    roster = None if name is None else Roster.of(ids, len(ids))
    config = PrivacyConfig(
        epsilon=epsilon,
        delta=DELTA,
        unit="pair" if name is None else "annotator",
        noise_multiplier=ONE.noise_multiplier,
        sampling_rate=ONE.sampling_rate,
        loss_noise=None,
    )
    with Trail.open(folder) as trail:
        try:
            ledger = read_ledger(trail.reader(), trail)
            prior = ledger.mechanisms(config.unit, config.unit_column, roster, drawing=slot)
            draw = ledger.draw(slot) if slot is not None else None
            plan = replace(plan_units(config, units, ONE.sampling_rate, ONE.steps, 5, prior, draw=draw), roster=roster)
            plan = reserve(trail, plan, SealedRandom.from_system(), reservation=uuid.uuid4().hex, run=uuid.uuid4().hex)
        except BudgetExceededError:
            return "refused"
        except PrivacyError as error:
            return error.reason
    return "got it" if plan.steps == ONE.steps else f"got {plan.steps} steps"


def _checked_before(trail: Trail, kind: str, body_fn: Any, **given: Any) -> Any:
    """The planted fault: the ledger is looked at, and the entry appended a moment later."""
    body = body_fn(trail.reader())
    return _append_guarded(trail, kind, lambda _reader: body, **given)


_append_guarded = Trail.append_guarded


def _work(pipe: Any, start: Any) -> None:
    with without_cross_checks():
        _race(pipe, start)


def _race(pipe: Any, start: Any) -> None:
    compose([ONE], DELTA)  # imports and first tables, before the first race
    pipe.send("ready")
    while (round_ := pipe.recv()) is not None:
        folder, epsilon, faulty, name, slot = round_
        start.wait(_PATIENCE)
        try:
            if faulty:
                with patch.object(Trail, "append_guarded", _checked_before):
                    pipe.send(_reserved_once(folder, epsilon, name, slot))
            else:
                pipe.send(_reserved_once(folder, epsilon, name, slot))
        except Exception as error:  # told to the test, which fails with it
            pipe.send(f"{type(error).__name__}: {error}")


@contextmanager
def racers(count: int) -> Iterator[Any]:
    """``count`` processes; what comes back starts a race, and gives what each said."""
    context = multiprocessing.get_context("forkserver")
    # What takes seconds to import is imported once, for all of them.
    context.set_forkserver_preload([__name__, "opacus.accountants", "dp_accounting.rdp", "dp_accounting.pld"])
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

    def race(
        folder: Path,
        epsilon: float,
        *,
        faulty: bool = False,
        rosters: Sequence[str | None] = (None,),
        slots: Sequence[str | None] = (None,),
    ) -> list[str]:
        for number, pipe in enumerate(pipes):
            pipe.send((folder, epsilon, faulty, rosters[number % len(rosters)], slots[number % len(slots)]))
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
