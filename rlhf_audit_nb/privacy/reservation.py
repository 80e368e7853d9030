"""Writing to the ledger: it is read and what is reserved, or set, is appended in one transaction. Floor 2.

Of any number of runs, in any number of processes, that want the last of a budget, as many get it as fit: the
reservation's body is made within the append's own transaction, from the ledger as it stands there. Where another run
was quicker, the plan is made anew on top of it and tried again.

A sweep reserves slots for all of its runs in one entry (`reserve_slots`), and gives back what was not used
(`release_slots`). A run that draws on a slot checks within its append that the slot is still open and covers it; it
plans anew only where something was added to the ledger meanwhile, since everything else makes the total smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import BudgetExceededError, ConfigError, PrivacyError
from rlhf_audit_nb.events import (
    BudgetSet,
    PrivacyPopulation,
    PrivacyReserved,
    SlotsReleased,
    SlotsReserved,
    encode_body,
    encode_private,
    number,
)
from rlhf_audit_nb.privacy.accountant import composed_epsilon
from rlhf_audit_nb.privacy.ledger import EVIDENCE, KINDS, Ledger, fold
from rlhf_audit_nb.privacy.plan import Plan, reserve_event, sealed_event
from rlhf_audit_nb.privacy.populations import Registry, VaultAt, read_registry, record_population
from rlhf_audit_nb.privacy.slots import check_covered, grouped

if TYPE_CHECKING:
    from rlhf_audit_nb.privacy.accountant import Composable
    from rlhf_audit_nb.privacy.sampling import SealedRandom
    from rlhf_audit_nb.privacy.slots import Draw
    from rlhf_audit_nb.trail import Trail, TrailReader

__all__ = ["RACES", "read_ledger", "release_slots", "reserve", "reserve_slots", "set_budget"]

RACES = 8
"""How often a reservation is planned anew when other runs reserve at the same time."""

_READINGS = 64  # how often the rosters are read again because others record theirs at the same time
_HEADROOM = 1 + 1e-6  # what figures on other grids may differ by when a slot is used
_LONGEST = 500  # characters of a reason or a name


def read_ledger(
    reader: TrailReader, vault: Trail | VaultAt | None = None, *, registry: Registry | None = None
) -> Ledger:
    """The ledger of a trail as ``reader`` sees it.

    Only the ledger's own entries are read, and what the runs that reserved recorded of their steps.

    Args:
        reader: the state that is read.
        vault: the open trail, or where its vault lies, which shows which populations share nobody; without it nothing
            is proven, and all that was spent is composed.
        registry: what that came to before, in the place of ``vault``.

    Raises:
        PrivacyError: the entries do not add up; see `fold`.
    """
    found = [entry for kind in KINDS for entry in reader.entries(type=kind)]
    runs = {entry.run for entry in found if entry.run is not None and entry.type != BudgetSet.TYPE}
    found += [entry for run in runs for entry in reader.entries(run=run) if entry.type in EVIDENCE]
    if registry is None:
        registry = read_registry(reader, vault if isinstance(vault, VaultAt | None) else VaultAt.of(vault))
    return fold(sorted(found, key=lambda entry: entry.index), registry)


def reserve(
    trail: Trail,
    plan: Plan,
    randomness: SealedRandom,
    *,
    reservation: str,
    run: str | None = None,
    resolution_us: int = 1,
) -> Plan:
    """Reserve the whole of ``plan`` in one append, with the seed sealed beside it.

    A roster that is new to the trail is recorded first, in an entry of its own (`record_population`).

    Returns:
        The plan that was reserved: ``plan`` itself, or what was planned anew where other runs had reserved meanwhile.

    Raises:
        BudgetExceededError: other runs took the budget, or a smaller one was set; nothing was reserved.
        PrivacyError: code ``reservation-race``: others reserved each time while this one was planned.
        StoreError: the append failed.
    """
    population = None
    if plan.roster is not None:
        population = record_population(trail, plan.roster, resolution_us=resolution_us)
    races = 0
    for _ in range(_READINGS):
        registry = read_registry(trail.reader(), VaultAt.of(trail))

        def body(reader: TrailReader, plan: Plan = plan, registry: Registry = registry) -> bytes:
            if sum(1 for _ in reader.entries(type=PrivacyPopulation.TYPE)) != len(registry.populations):
                raise _LedgerMovedError(None)
            ledger = read_ledger(reader, registry=registry)
            ledger.check(plan.config)
            slot = plan.draw.slot.id if plan.draw is not None else None
            prior = ledger.mechanisms(plan.config.unit, plan.config.unit_column, plan.roster, drawing=slot)
            draw = ledger.draw(slot) if slot is not None else None
            if draw is not None:
                check_covered(draw.slot, plan.mechanism)
            if prior != plan.prior and (draw is None or plan.draw is None or draw.committed != plan.draw.committed):
                raise _LedgerMovedError(prior, draw)
            return encode_body(reserve_event(plan, reservation, population, generator=randomness.generator))

        try:
            trail.append_guarded(
                PrivacyReserved.TYPE,
                body,
                run=run,
                private=encode_private(sealed_event(randomness)),
                resolution_us=resolution_us,
            )
        except _LedgerMovedError as moved:
            if moved.prior is None:
                continue  # somebody recorded another roster, which may or may not meet this one
            # Outside of the transaction: planning takes seconds, and others may append meanwhile.
            plan = plan.replanned(moved.prior, moved.draw)
            races += 1
            if races == RACES:
                break
        else:
            return plan
    raise PrivacyError(
        f"Other runs reserved budget on this trail {max(races, 1)} times while this one was planned; nothing was "
        "trained.",
        next_step="Start the run again when the others have begun.",
        code="reservation-race",
    )


def reserve_slots(
    trail: Trail, sweep: str, slots: Sequence[tuple[str, Composable]], config: PrivacyConfig, *, added: bool = False
) -> SlotsReserved:
    """Hold budget for trainings to come, all of it in one append or none.

    From then on nobody can reserve what these take; each is used by the one training whose reservation names it.

    Args:
        trail: the population's trail.
        sweep: whose slots they are. Those that it still has open are given back in the same entry,
        slots: names, new to the trail, and what a training in each may cost at most.
        config: the budget (``epsilon``, ``delta``) and the unit.
        added: unless it is to keep them.

    Raises:
        BudgetExceededError: they do not all fit beside what is spent and reserved; nothing was reserved.
        PrivacyError: the trail keeps the budget of another unit.
        StoreError: the append failed.
    """

    def event(reader: TrailReader) -> SlotsReserved:
        # Nothing is told apart by its roster: whom the slots will be used for is not known.
        ledger = read_ledger(reader)
        ledger.check(config)
        ledger.mechanisms(config.unit, config.unit_column)  # refuses another unit or column
        kept = [slot.holds for slot in ledger.slots if added or slot.sweep != sweep]
        prior = [*(spend.mechanism for spend in ledger.spends if spend.steps), *kept]
        before = composed_epsilon(prior, config.delta)
        total = composed_epsilon([*prior, *(held for _, held in slots)], config.delta)
        if total * _HEADROOM > config.epsilon:
            raise _do_not_fit(len(slots), before, total, config)
        return SlotsReserved(
            sweep=sweep,
            unit=config.unit,
            adjacency=config.adjacency,
            epsilon_budget=float(config.epsilon),
            delta=float(config.delta),
            slots=grouped(slots),
            epsilon_before=number(before),
            epsilon_reserved=number(total),
            column=config.unit_column,
            added=added,
        )

    event(trail.reader())  # what takes seconds is composed, and kept, before the append; most refusals come here
    made: list[SlotsReserved] = []

    def body(reader: TrailReader) -> bytes:
        made.append(event(reader))
        return encode_body(made[-1])

    trail.append_guarded(SlotsReserved.TYPE, body)
    return made[-1]


def release_slots(trail: Trail, sweep: str) -> tuple[str, ...]:
    """Give back what a sweep still holds; nothing is appended where that is nothing.

    Returns:
        The slots that nobody used, and nobody can use any more.
    """
    if not _open_slots(trail.reader(), sweep):
        return ()
    released: list[str] = []

    def body(reader: TrailReader) -> bytes:
        released[:] = _open_slots(reader, sweep)
        return encode_body(SlotsReleased(sweep=sweep, slots=released))

    trail.append_guarded(SlotsReleased.TYPE, body)
    return tuple(released)


def _open_slots(reader: TrailReader, sweep: str) -> list[str]:
    return [slot.id for slot in read_ledger(reader).slots if slot.sweep == sweep]


def _do_not_fit(count: int, before: float, total: float, config: PrivacyConfig) -> BudgetExceededError:
    runs = "The run does" if count == 1 else f"The {count} runs of the sweep do"
    return BudgetExceededError(
        f"{runs} not fit into the privacy budget: epsilon {before:.4g} of {config.epsilon:g} is spent or reserved, and "
        f"with what each run may spend it would be {total:.4g}. Nothing was reserved.",
        next_step="Let each run spend less, or say what it runs (noise_multiplier, sampling_rate and steps compose "
        "much more tightly than epsilon and delta); take fewer runs, or a larger budget.",
        code="sweep-budget",
    )


def set_budget(
    trail: Trail, epsilon: float, *, reason: str, by: str, delta: float | None = None, unit: str | None = None
) -> int:
    """Set the budget of a trail's population: no run may ask for more from here on, larger or smaller than before.

    Args:
        trail: the population's trail.
        epsilon: what all runs together may cost, those included that have spent already.
        reason: why, in one line that stands in the open.
        by: who decides, as they are to be named in the open.
        delta: of the bound; without it that of the budget in force, else 1e-5.
        unit: ``annotator``, ``pair`` or ``label``; without it the one that the trail counts already, else
            ``annotator``.

    Returns:
        The index of the entry.

    Raises:
        ConfigError: a number out of range; no reason or no name.
        PrivacyError: the trail keeps the budget of another unit.
        StoreError: the append failed.
    """
    said = {"reason": _one_line("reason", reason), "by": _one_line("by", by)}

    def body(reader: TrailReader) -> bytes:
        ledger = read_ledger(reader)
        limit = ledger.limit
        known = {
            "delta": delta if delta is not None else limit.delta if limit is not None else None,
            "unit": unit or ledger.unit,
        }
        config = PrivacyConfig(
            epsilon=epsilon,
            **{name: value for name, value in known.items() if value is not None},  # type: ignore[arg-type]
        )
        if ledger.unit not in (None, config.unit):
            raise PrivacyError(
                f"This trail keeps the privacy budget of {ledger.unit}s; one of {config.unit}s cannot be set on it.",
                next_step=f'Set it with unit "{ledger.unit}", or on the trail of the other unit.',
                code="mixed-units",
            )
        return encode_body(
            BudgetSet(unit=config.unit, epsilon=float(config.epsilon), delta=float(config.delta), **said)
        )

    return trail.append_guarded(BudgetSet.TYPE, body).index


def _one_line(name: str, text: str) -> str:
    said = text.strip() if isinstance(text, str) else ""
    if not said or len(said) > _LONGEST or not said.isprintable():
        found = "empty" if not said else "too long" if len(said) > _LONGEST else "not one line of text"
        raise ConfigError(
            f"{name} is {found}; a budget is set with a reason and a name, which stand in the trail.",
            next_step=f'Write {name}="...", one line of at most {_LONGEST} characters.',
            code=name,
        )
    return said


class _LedgerMovedError(Exception):
    """Another run reserved between plan and reservation; without ``prior``: it recorded a roster."""

    def __init__(self, prior: tuple[Composable, ...] | None, draw: Draw | None = None) -> None:
        super().__init__()
        self.prior = prior
        self.draw = draw
