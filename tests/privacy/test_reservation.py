"""Reserving: as many runs get the budget as fit into it, whoever races for it."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
from support.racing import DELTA, ONE, racers

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import BudgetExceededError, ConfigError, PrivacyError
from rlhf_audit_nb.events import (
    BudgetSet,
    PrivacyReserved,
    PrivacySealed,
    PrivacySettled,
    decode_body,
    decode_private,
    encode_body,
)
from rlhf_audit_nb.privacy import reservation as module
from rlhf_audit_nb.privacy.accountant import composed_epsilon
from rlhf_audit_nb.privacy.plan import Plan, plan_units
from rlhf_audit_nb.privacy.reservation import RACES, read_ledger, reserve, set_budget
from rlhf_audit_nb.privacy.sampling import SealedRandom
from rlhf_audit_nb.privacy.units import Units
from rlhf_audit_nb.trail import Trail, TrailReader

RACERS = 8
ROUNDS = 200
FIT = 3
BUDGET = composed_epsilon([ONE.with_steps(FIT * ONE.steps)], DELTA) * 1.0001
UNITS = Units("pair", tuple((row,) for row in range(20)))


def planned(trail: Trail, epsilon: float = BUDGET) -> Plan:
    config = PrivacyConfig(
        epsilon=epsilon,
        delta=DELTA,
        unit="pair",
        noise_multiplier=ONE.noise_multiplier,
        sampling_rate=ONE.sampling_rate,
        loss_noise=None,
    )
    prior = read_ledger(trail.reader()).mechanisms("pair")
    return plan_units(config, UNITS, ONE.sampling_rate, ONE.steps, 5, prior)


def taken(trail: Trail, plan: Plan) -> Plan:
    return reserve(trail, plan, SealedRandom(bytes(range(32))), reservation=uuid.uuid4().hex, run=uuid.uuid4().hex)


def spent(folder: Path) -> tuple[int, float]:
    """How many reservations stand on the trail, and what they cost together."""
    spends = read_ledger(TrailReader.open(folder)).spends
    return len(spends), composed_epsilon([spend.mechanism for spend in spends], DELTA)


def fresh(folder: Path) -> Path:
    Trail.open(folder).close()
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_of_eight_processes_exactly_as_many_reserve_as_fit_and_a_check_outside_of_the_append_is_caught(
    tmp_path: Path,
) -> None:
    with racers(RACERS) as race:
        for number in range(ROUNDS):
            folder = fresh(tmp_path / f"round-{number}")
            said = race(folder, BUDGET)
            assert sorted(said) == ["got it"] * FIT + ["refused"] * (RACERS - FIT), number
            count, epsilon = spent(folder)
            assert count == FIT, number
            assert epsilon <= BUDGET, number
        # The negative control: the same race, with the check made before the append and not within it.
        caught = False
        for number in range(20):
            folder = fresh(tmp_path / f"faulty-{number}")
            said = race(folder, BUDGET, faulty=True)
            count, epsilon = spent(folder)
            assert count == said.count("got it")
            caught = count > FIT and epsilon > BUDGET
            if caught:
                break
        assert caught, "the race does not find a check that is made outside of the append"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_of_eight_processes_with_disjoint_annotators_as_many_of_each_population_reserve_as_fit(tmp_path: Path) -> None:
    with racers(RACERS) as race:
        for number in range(25):
            folder = fresh(tmp_path / f"round-{number}")
            said = race(folder, BUDGET, rosters=("north", "south"))
            for population in (said[::2], said[1::2]):
                assert sorted(population) == ["got it"] * FIT + ["refused"] * (RACERS // 2 - FIT), (number, said)
            with Trail.open(folder) as trail:
                groups = read_ledger(trail.reader(), trail).groups
                assert [len(group.spends) for group in groups] == [FIT, FIT]
                assert all(group.spent(DELTA)[1] <= BUDGET for group in groups)


def test_what_is_reserved_is_the_plan_and_its_seed_is_sealed(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        plan = planned(trail)
        assert taken(trail, plan) is plan
        (entry,) = trail.reader().entries(type=PrivacyReserved.TYPE)
        (spend,) = read_ledger(trail.reader()).spends
        assert (spend.mechanism, spend.run, spend.settled) == (ONE, entry.run, False)
        assert b'"seed"' not in entry.data

        assert entry.envelope.sealed is not None
        payload = trail.vault.half(entry).payload
        assert decode_private(entry.type, payload) == PrivacySealed(seed=bytes(range(32)).hex())


def test_a_plan_that_others_overtook_is_made_anew_on_top_of_theirs(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        first, second = planned(trail), planned(trail)
        taken(trail, first)
        again = taken(trail, second)
        assert (again.prior, again.before) == ((ONE,), first.epsilon)
        assert again.epsilon == composed_epsilon([ONE.with_steps(2 * ONE.steps)], DELTA)


def test_the_last_one_gets_the_steps_that_are_left(tmp_path: Path) -> None:
    room = composed_epsilon([ONE.with_steps(2 * ONE.steps - 1)], DELTA) * 1.0001
    with Trail.open(tmp_path / "audit") as trail:
        first, second = planned(trail, room), planned(trail, room)
        taken(trail, first)
        assert taken(trail, second).steps == ONE.steps - 1


def test_who_comes_too_late_is_refused_and_nothing_is_appended(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        plans = [planned(trail) for _ in range(FIT + 1)]
        for plan in plans[:FIT]:
            taken(trail, plan)
        size = trail.reader().size
        with pytest.raises(BudgetExceededError, match="none of the 3 steps fits"):
            taken(trail, plans[FIT])
        assert trail.reader().size == size


def test_what_a_settled_run_did_not_use_is_there_for_the_next(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        plans = [planned(trail) for _ in range(FIT + 1)]
        for plan in plans[:FIT]:
            taken(trail, plan)
        unused = read_ledger(trail.reader()).spends[0]
        settled = PrivacySettled(reservation=unused.reservation, steps=0, epsilon_run=0.0, epsilon_total=0.0)
        trail.append(settled.TYPE, encode_body(settled), run=unused.run).wait()
        assert taken(trail, plans[FIT]).steps == ONE.steps


def test_a_run_that_is_always_overtaken_ends_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        plan = planned(trail, 50.0)
        replanned, tries = Plan.replanned, []

        def overtaken(self: Plan, prior: tuple[object, ...], draw: object = None) -> Plan:
            tries.append(len(prior))
            found = replanned(self, prior)  # type: ignore[arg-type]
            with monkeypatch.context() as once:
                once.setattr(Plan, "replanned", replanned)
                taken(trail, planned(trail, 50.0))
            return found

        taken(trail, planned(trail, 50.0))
        monkeypatch.setattr(Plan, "replanned", overtaken)
        with pytest.raises(PrivacyError, match="8 times") as refused:
            taken(trail, plan)
        assert refused.value.reason == "reservation-race"
        assert tries == list(range(1, RACES + 1))
        assert module.RACES == RACES


def test_a_budget_is_set_in_an_entry_with_its_reason_and_name(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        index = set_budget(trail, 4, reason=" the board agreed ", by="A. Keeper")
        (entry,) = trail.reader().entries(type=BudgetSet.TYPE)
        assert entry.index == index
        assert decode_body(entry.type, entry.body) == BudgetSet(
            unit="annotator", epsilon=4.0, delta=1e-5, reason="the board agreed", by="A. Keeper"
        )


def test_a_budget_takes_over_what_the_trail_says_already(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        taken(trail, planned(trail))
        set_budget(trail, 4.0, reason="r", by="b")
        set_budget(trail, 5.0, reason="r", by="b", delta=1e-6)
        set_budget(trail, 6.0, reason="r", by="b")
        budgets = read_ledger(trail.reader()).budgets
    assert [(one.unit, one.epsilon, one.delta) for one in budgets] == [
        ("pair", 4.0, DELTA),
        ("pair", 5.0, 1e-6),
        ("pair", 6.0, 1e-6),
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"delta": 1.0}, "delta is 1.0"),
        ({"unit": "person"}, "unit is 'person'"),
        ({"reason": "  "}, "reason is empty"),
        ({"by": ""}, "by is empty"),
        ({"by": "A\nB"}, "by is not one line"),
        ({"reason": "x" * 501}, "reason is too long"),
    ],
)
def test_a_budget_that_cannot_be_set_changes_nothing(tmp_path: Path, given: dict[str, object], said: str) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        size = trail.reader().size
        arguments = {"epsilon": 4.0, "reason": "r", "by": "b", **given}
        with pytest.raises(ConfigError, match=said):
            set_budget(trail, arguments.pop("epsilon"), **arguments)  # type: ignore[arg-type]
        assert trail.reader().size == size


def test_a_budget_of_another_unit_is_refused(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        taken(trail, planned(trail))
        with pytest.raises(PrivacyError, match="keeps the privacy budget of pairs") as refused:
            set_budget(trail, 4.0, reason="r", by="b", unit="annotator")
        assert refused.value.reason == "mixed-units"


def test_a_smaller_budget_that_is_set_between_plan_and_reservation_counts(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        plan = planned(trail)
        set_budget(trail, BUDGET / 2, reason="halved", by="A. Keeper", unit="pair")
        with pytest.raises(BudgetExceededError, match=r"A\. Keeper set it"):
            taken(trail, plan)
        assert read_ledger(trail.reader()).spends == ()


def test_nothing_of_the_seed_is_in_the_trails_folder_in_the_open(tmp_path: Path) -> None:
    with Trail.open(tmp_path / "audit") as trail:
        taken(trail, planned(trail))
    seed = bytes(range(32))
    for folder, _, names in os.walk(tmp_path / "audit"):
        for name in names:
            data = (Path(folder) / name).read_bytes()
            assert seed not in data
            assert seed.hex().encode() not in data
