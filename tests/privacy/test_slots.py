"""Slots: what a sweep holds nobody else gets, each is used once, and the total never grows by using one."""

from __future__ import annotations

import math
import uuid
from pathlib import Path

import pytest
from support.racing import DELTA, ONE, racers
from support.trails import events, without_cross_checks

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import BudgetExceededError, PrivacyError
from rlhf_audit_nb.events import PrivacyReserved, SlotsReleased, SlotsReserved, encode_body
from rlhf_audit_nb.privacy.accountant import Composable, Guarantee, Mechanism, compose, composed_epsilon
from rlhf_audit_nb.privacy.plan import Plan, plan_units
from rlhf_audit_nb.privacy.reservation import read_ledger, release_slots, reserve, reserve_slots
from rlhf_audit_nb.privacy.sampling import SealedRandom
from rlhf_audit_nb.privacy.units import Units
from rlhf_audit_nb.reports.budget import Budget
from rlhf_audit_nb.trail import Trail, TrailReader

UNITS = Units("pair", tuple((row,) for row in range(20)))
SMALL = 1e-6
ALONE = composed_epsilon([ONE], SMALL)
HELD = Guarantee(ALONE * 1.0001, SMALL)
FOUR = composed_epsilon([HELD.with_steps(4)], DELTA) * 1.0001


def config(epsilon: float = FOUR, noise: float | None = ONE.noise_multiplier) -> PrivacyConfig:
    return PrivacyConfig(
        epsilon=epsilon,
        delta=DELTA,
        unit="pair",
        noise_multiplier=noise,
        sampling_rate=ONE.sampling_rate,
        loss_noise=None,
    )


def planned(trail: Trail, slot: str | None, settings: PrivacyConfig | None = None, steps: int = ONE.steps) -> Plan:
    settings = settings or config()
    ledger = read_ledger(trail.reader())
    prior = ledger.mechanisms("pair", drawing=slot)
    draw = ledger.draw(slot) if slot is not None else None
    return plan_units(settings, UNITS, ONE.sampling_rate, steps, 5, prior, draw=draw)


def taken(trail: Trail, plan: Plan) -> Plan:
    return reserve(trail, plan, SealedRandom(bytes(range(32))), reservation=uuid.uuid4().hex, run=uuid.uuid4().hex)


def hold(trail: Trail, count: int, held: Composable = HELD, sweep: str = "sweep", **given: bool) -> list[str]:
    names = [uuid.uuid4().hex[:16] for _ in range(count)]
    reserve_slots(trail, sweep, [(name, held) for name in names], config(), **given)
    return names


def total(folder: Path) -> float:
    """The composed epsilon of everything on the trail, by another way than the ledger's own: entry by entry."""
    found: dict[str, Composable] = {}
    for entry in TrailReader.open(folder).entries():
        if entry.type not in {PrivacyReserved.TYPE, SlotsReserved.TYPE, SlotsReleased.TYPE}:
            continue
        event = decoded(entry)
        if isinstance(event, SlotsReserved):
            for group in event.slots:
                numbers = {name: value for name, value in group.items() if name != "ids"}
                kind = Guarantee if "epsilon" in numbers else Mechanism
                found.update({name: kind(**numbers) for name in group["ids"]})
        elif isinstance(event, SlotsReleased):
            for name in event.slots:
                found.pop(name)
        else:
            found.pop(event.slot or "", None)
            found[event.reservation] = Mechanism(event.noise_multiplier, event.sampling_rate, event.steps)
    return composed_epsilon(list(found.values()), DELTA)


def by_dp_accounting(folder: Path) -> float:
    """What all reservations cost together, by dp-accounting's own accountant from its own events."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    for entry in TrailReader.open(folder).entries(type=PrivacyReserved.TYPE):
        event = decoded(entry)
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(event.sampling_rate, gaussian), event.steps)
    return accountant.get_epsilon(DELTA)


def decoded(entry):
    from rlhf_audit_nb.events import decode_body

    return decode_body(entry.type, entry.body)


def optimal(epsilon: float, delta: float, count: int, total_delta: float) -> float:
    """The least epsilon of ``count`` (epsilon, delta)-DP mechanisms together: Kairouz, Oh, Viswanath, theorem 3.3."""
    best = math.inf
    for i in range(count // 2 + 1):
        share = (
            sum(
                math.comb(count, j) * (math.exp((count - j) * epsilon) - math.exp((count - 2 * i + j) * epsilon))
                for j in range(i)
            )
            / (1 + math.exp(epsilon)) ** count
        )
        if 1 - (1 - delta) ** count * (1 - share) <= total_delta:
            best = min(best, (count - 2 * i) * epsilon)
    return best


@pytest.mark.parametrize(("epsilon", "count"), [(0.5, 1), (0.5, 8), (0.1, 60), (0.02, 150)])
def test_promises_compose_as_the_optimal_composition_theorem_says_and_never_below(epsilon: float, count: int) -> None:
    delta = DELTA / (2 * count)
    ours = composed_epsilon([Guarantee(epsilon, delta, count)], DELTA)
    # The theorem's own figures stand on multiples of epsilon; between two of them ours may be the tighter one.
    assert optimal(epsilon, delta, count, DELTA) - 2 * epsilon <= ours
    assert ours <= optimal(epsilon, delta, count, DELTA) + 1e-4 * count + 1e-6


@pytest.mark.parametrize("ran", [ONE, Mechanism(0.7, 0.01, 200), Mechanism(4.0, 1.0, 5), Mechanism(3.0, 0.1, 10, 4)])
def test_what_takes_a_promise_s_place_makes_the_total_no_larger(ran: Mechanism) -> None:
    promise = Guarantee(composed_epsilon([ran], SMALL), SMALL)
    for others in ([promise], [promise.with_steps(3)], [Mechanism(1.0, 0.05, 50)], [ran, promise]):
        assert composed_epsilon([*others, ran], DELTA) <= composed_epsilon([*others, promise], DELTA)


def test_accountants_that_cannot_compose_a_promise_say_so() -> None:
    accounted = compose([ONE, HELD], DELTA)
    assert accounted.epsilon > 0
    assert str(accounted.prv).startswith("not computed: a part was only promised")
    assert accounted.rdp == accounted.prv


@pytest.mark.parametrize(
    "wrong", [{"epsilon": 0.0}, {"epsilon": math.inf}, {"delta": 0.0}, {"delta": 1.0}, {"steps": -1}]
)
def test_a_promise_of_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PrivacyError):
        Guarantee(**{"epsilon": 1.0, "delta": 1e-6, **wrong})


def test_what_is_held_counts_until_it_is_used_or_given_back_and_nobody_else_gets_it(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        first, second, *_ = hold(trail, 4)
        (event,) = events(trail, SlotsReserved)
        assert float(event.epsilon_reserved) == total(tmp_path / "audit") <= FOUR
        with pytest.raises(BudgetExceededError):
            planned(trail, None, config(noise=None))
        with pytest.raises(BudgetExceededError):
            taken(trail, planned(trail, None))

        before = total(tmp_path / "audit")
        plan = taken(trail, planned(trail, first))
        assert plan.mechanism == ONE
        (reserved,) = events(trail, PrivacyReserved)
        assert reserved.slot == first
        after = total(tmp_path / "audit")
        assert after < before
        ledger = read_ledger(trail.reader())
        assert {slot.id for slot in ledger.slots} & {first} == set()
        assert ledger.spent(DELTA)[1] == after
        assert "3 trainings to come" in " ".join(Budget.of(ledger).notes())

        assert len(release_slots(trail, "sweep")) == 3
        assert release_slots(trail, "sweep") == ()
        assert (
            total(tmp_path / "audit") == composed_epsilon([ONE], DELTA) == read_ledger(trail.reader()).spent(DELTA)[1]
        )
        with pytest.raises(PrivacyError, match="given back") as refused:
            planned(trail, second)
        assert refused.value.reason == "slot-unknown"


def test_a_slot_is_used_once_also_by_a_plan_that_was_made_before(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        (slot,) = hold(trail, 1)
        plans = [planned(trail, slot), planned(trail, slot)]
        taken(trail, plans[0])
        size = trail.reader().size
        for _ in range(2):
            with pytest.raises(PrivacyError, match="reserved already, by entry") as refused:
                taken(trail, plans[1])
            assert refused.value.reason == "slot-used"
        assert trail.reader().size == size


def test_a_plan_in_a_slot_stands_while_others_use_theirs_and_is_made_anew_where_something_is_added(
    tmp_path: Path,
) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        slots = hold(trail, 2)
        early = planned(trail, slots[0])
        taken(trail, planned(trail, slots[1]))
        assert taken(trail, early) is early, "its figures are upper bounds still"
    with Trail.open(tmp_path / "other") as trail:
        (slot,) = hold(trail, 1)
        early = planned(trail, slot)
        taken(trail, planned(trail, None))
        again = taken(trail, early)
        assert again is not early
        assert again.before > early.before


def test_a_training_that_costs_more_than_its_slot_is_refused_by_name(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        (slot,) = hold(trail, 1)
        with pytest.raises(PrivacyError, match=r"may spend epsilon .* and its training takes 4 steps") as refused:
            planned(trail, slot, steps=ONE.steps + 1)
        assert refused.value.reason == "slot-exceeded"
        assert [slot] == [one.id for one in read_ledger(trail.reader()).slots]


def test_noise_that_nobody_chose_follows_from_the_slot(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        (slot,) = hold(trail, 1)
        plan = planned(trail, slot, config(noise=None), steps=30)
        assert 0.98 * HELD.epsilon < composed_epsilon([plan.mechanism], SMALL) <= HELD.epsilon
        assert plan.mechanism.steps == 30
        assert taken(trail, plan) is plan


@pytest.mark.parametrize(
    ("ran", "fits"),
    [
        ({}, True),
        ({"noise_multiplier": 2.5}, True),
        ({"sampling_rate": 0.1, "steps": 2}, True),
        ({"noise_multiplier": 1.999}, False),
        ({"sampling_rate": 0.21}, False),
        ({"steps": 4}, False),
        ({"pairs": 2}, False),
    ],
)
def test_a_slot_that_says_what_runs_in_it_covers_what_costs_no_more(ran: dict[str, float], fits: bool) -> None:
    from rlhf_audit_nb.privacy.slots import Slot

    mechanism = Mechanism(**{"noise_multiplier": 2.0, "sampling_rate": 0.2, "steps": 3, **ran})
    assert Slot("a", "s", 1, ONE).covers(mechanism) is fits
    if fits:
        assert composed_epsilon([mechanism], DELTA) <= composed_epsilon([ONE], DELTA)


def test_mechanisms_that_are_known_hold_far_less_than_promises(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        first, *_ = hold(trail, 8, ONE)
        assert composed_epsilon([HELD.with_steps(8)], DELTA) > 2 * total(tmp_path / "audit")
        plan = taken(trail, planned(trail, first, config(noise=None)))
        assert plan.mechanism.noise_multiplier == pytest.approx(ONE.noise_multiplier, rel=1e-8)


def test_a_sweep_that_does_not_fit_holds_nothing_and_one_that_goes_on_gives_back_what_it_held(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        size = trail.reader().size
        with pytest.raises(BudgetExceededError, match="The 5 runs of the sweep do not fit") as refused:
            hold(trail, 5)
        assert (refused.value.reason, trail.reader().size) == ("sweep-budget", size)
        old = hold(trail, 4)
        with pytest.raises(BudgetExceededError):
            hold(trail, 1, sweep="another")
        with pytest.raises(BudgetExceededError, match="The run does not fit"):
            hold(trail, 1, added=True)
        new = hold(trail, 3)
        assert {slot.id for slot in read_ledger(trail.reader()).slots} == set(new)
        with pytest.raises(PrivacyError, match="given back"):
            planned(trail, old[0])
        more = hold(trail, 1, added=True)
        assert {slot.id for slot in read_ledger(trail.reader()).slots} == {*new, *more}


def test_a_reservation_that_names_no_open_slot_counts_in_full(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        (slot,) = hold(trail, 1)
        taken(trail, planned(trail, slot))
        (event,) = events(trail, PrivacyReserved)
        forged = type(event)(**{name: getattr(event, name) for name in event.__struct_fields__} | {"reservation": "f"})
        trail.append(PrivacyReserved.TYPE, encode_body(forged), run="f" * 32).wait()
        ledger = read_ledger(trail.reader())
        assert [spend.mechanism for spend in ledger.spends] == [ONE, ONE]
        assert ledger.spent(DELTA)[1] == composed_epsilon([ONE.with_steps(2 * ONE.steps)], DELTA)


def test_of_six_processes_each_slot_is_had_by_one_and_what_is_held_by_no_other_and_a_faulty_check_is_caught(
    tmp_path: Path,
) -> None:
    with racers(6) as race:
        for number in range(3):
            folder = tmp_path / f"round-{number}"
            with Trail.open(folder) as trail:
                slots = hold(trail, 4)
            # Four draw on two slots, and two have none.
            said = race(folder, FOUR, slots=(slots[0], slots[1], None))
            assert sorted(said[0::3]) == sorted(said[1::3]) == ["got it", "slot-used"], (number, said)
            # Where a slot was used, what it held beyond its training's cost is free again: at most that is taken.
            assert total(folder) <= FOUR, number
            with Trail.open(folder) as trail:
                ledger = read_ledger(trail.reader())
                assert {slot.id for slot in ledger.slots} == set(slots[2:])
                for slot in slots[2:]:
                    taken(trail, planned(trail, slot))
            assert total(folder) <= FOUR, number
            assert 0 < by_dp_accounting(folder) <= FOUR, number
        caught = False
        for number in range(20):
            folder = tmp_path / f"faulty-{number}"
            with Trail.open(folder) as trail:
                slots = hold(trail, 1)
            said = race(folder, FOUR, slots=(slots[0],), faulty=True)
            caught = said.count("got it") > 1
            if caught:
                break
        assert caught, "the race does not find a check that is made outside of the append"


def test_a_training_that_a_sweep_started_draws_on_its_slot_and_a_second_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.tiny import dpo_trainer, synthetic_pairs

    from rlhf_audit_nb.auditor import AuditableRLHF
    from rlhf_audit_nb.config import AuditConfig

    held = Guarantee(1.5, SMALL)
    settings = PrivacyConfig(epsilon=4.0, delta=DELTA, sampling_rate=0.5)
    auditor = AuditableRLHF("tiny", privacy_config=settings, audit_config=AuditConfig(trail=str(tmp_path / "audit")))
    names = ["a" * 16, "b" * 16]
    reserve_slots(auditor.trail, "sweep", [(name, held) for name in names], settings)
    monkeypatch.setenv("RLHF_AUDIT_SLOT", names[0])
    rows = synthetic_pairs(8)
    with without_cross_checks():
        with auditor.track_training("swept"):
            dpo_trainer(rows, tmp_path / "first", max_steps=2).train()
        with pytest.raises(PrivacyError, match="a run trains privately once"), auditor.track_training("again"):
            dpo_trainer(rows, tmp_path / "second", max_steps=2).train()
    (reserved,) = events(auditor.trail, PrivacyReserved)
    assert (reserved.slot, reserved.steps) == (names[0], 2)
    ledger = read_ledger(auditor.trail.reader(), auditor.trail)
    (spend,) = ledger.spends
    assert spend.settled
    alone = composed_epsilon([spend.mechanism], SMALL)
    assert 0.9 * held.epsilon < alone <= held.epsilon, "with the live loss that is released beside the gradient"
    assert [slot.id for slot in ledger.slots] == [names[1]]
