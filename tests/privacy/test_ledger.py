"""The ledger: what counts, what does not, and what it refuses to add up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
from support.tiny import dpo_trainer, synthetic_pairs
from support.trails import events, without_cross_checks

from rlhf_audit_nb.auditor import AuditableRLHF
from rlhf_audit_nb.config import AuditConfig, PrivacyConfig
from rlhf_audit_nb.errors import BudgetExceededError, EntryError, PrivacyError
from rlhf_audit_nb.events import (
    BudgetSet,
    Event,
    PrivacyReserved,
    PrivacySettled,
    RunFinished,
    RunResumed,
    RunStarted,
    Step,
    TrainerAttached,
    encode_body,
)
from rlhf_audit_nb.privacy.accountant import Mechanism, compose
from rlhf_audit_nb.privacy.ledger import Limit, fold


@dataclass(frozen=True)
class Line:
    type: str
    run: str | None
    body: bytes
    index: int = 0


def line(event: Event, run: str = "run-1", index: int = 0) -> Line:
    return Line(event.TYPE, run, encode_body(event), index)


def budget(epsilon: float, delta: float = 1e-5, unit: str = "annotator", index: int = 7) -> Line:
    event = BudgetSet(unit=unit, epsilon=epsilon, delta=delta, reason="the board agreed", by="A. Keeper")
    return Line(event.TYPE, None, encode_body(event), index)


def reserved(
    name: str, steps: int = 10, unit: str = "annotator", sigma: float = 1.0, column: str | None = None
) -> PrivacyReserved:
    return PrivacyReserved(
        reservation=name,
        unit=unit,
        adjacency="zero-out",
        mechanism="m",
        engine="e",
        generator="g",
        units=50,
        clipping_norm=1.0,
        noise_multiplier=sigma,
        sampling_rate=0.1,
        steps=steps,
        steps_asked=steps,
        max_pairs_per_unit=8,
        delta=1e-5,
        epsilon_budget=8.0,
        epsilon_before=0.0,
        epsilon_planned=1.0,
        accountants={},
        column=column,
    )


def settled(name: str, steps: int) -> PrivacySettled:
    return PrivacySettled(reservation=name, steps=steps, epsilon_run=0.5, epsilon_total=0.5)


def test_an_empty_trail_has_spent_nothing() -> None:
    ledger = fold([line(RunFinished(status="completed", steps=0, trained=False))])
    assert ledger.unit is None
    assert ledger.mechanisms("annotator") == ()
    assert ledger.composed(1e-5).epsilon == 0


def test_a_reservation_counts_in_full_until_it_is_settled() -> None:
    ledger = fold([line(reserved("a", 10))])
    assert ledger.mechanisms("annotator") == (Mechanism(1.0, 0.1, 10),)
    assert not ledger.spends[0].settled
    ledger = fold([line(reserved("a", 10)), line(settled("a", 4))])
    assert ledger.mechanisms("annotator") == (Mechanism(1.0, 0.1, 4),)
    assert ledger.spends[0].settled
    assert ledger.spends[0].run == "run-1"


def test_a_run_that_spent_nothing_leaves_nothing() -> None:
    assert fold([line(reserved("a")), line(settled("a", 0))]).mechanisms("annotator") == ()


def test_runs_are_composed_over_the_whole_trail() -> None:
    ledger = fold([line(reserved("a", 10)), line(settled("a", 10)), line(reserved("b", 5, sigma=2.0), "run-2")])
    expected = compose([Mechanism(1.0, 0.1, 10), Mechanism(2.0, 0.1, 5)], 1e-5).epsilon
    assert ledger.composed(1e-5).epsilon == expected
    assert ledger.left(PrivacyConfig(epsilon=8.0)) == pytest.approx(8.0 - expected)
    assert ledger.left(PrivacyConfig(epsilon=expected / 2)) == 0


def test_two_units_in_one_trail_are_refused() -> None:
    with pytest.raises(PrivacyError, match="annotators and for pairs"):
        fold([line(reserved("a")), line(reserved("b", unit="pair"))])


def test_a_run_of_another_unit_is_refused_before_it_spends() -> None:
    with pytest.raises(PrivacyError, match="privacy budget of annotators"):
        fold([line(reserved("a"))]).mechanisms("pair")


def test_two_annotator_columns_in_one_trail_are_refused() -> None:
    with pytest.raises(PrivacyError, match="of the column 'annotator_id' and of the column 'team'") as refused:
        fold([line(reserved("a", column="annotator_id")), line(reserved("b", column="team"))])
    assert refused.value.reason == "mixed-columns"
    with pytest.raises(PrivacyError, match="of a column that is not recorded"):
        fold([line(reserved("a")), line(reserved("b", column="team"))])


def test_a_run_of_another_annotator_column_is_refused_before_it_spends() -> None:
    ledger = fold([line(reserved("a", column="annotator_id"))])
    assert ledger.mechanisms("annotator", "annotator_id") == (Mechanism(1.0, 0.1, 10),)
    with pytest.raises(PrivacyError, match="by the column 'annotator_id'") as refused:
        ledger.mechanisms("annotator", "team")
    assert refused.value.reason == "mixed-columns"
    assert 'annotator_column="annotator_id"' in refused.value.next_step
    with pytest.raises(PrivacyError, match="not recorded"):
        fold([line(reserved("a"))]).mechanisms("annotator", "team")


def test_a_training_by_another_annotator_column_is_refused_before_it_reserves(tmp_path: Path) -> None:
    rows = [{**row, "team": f"team-{number}"} for number, row in enumerate(synthetic_pairs(20))]

    def train(column: str) -> AuditableRLHF:
        privacy = PrivacyConfig(
            epsilon=50, delta=1e-3, noise_multiplier=1.0, sampling_rate=0.3, annotator_column=column
        )
        held = AuditableRLHF(privacy_config=privacy, audit_config=AuditConfig(trail=str(tmp_path / "audit")))
        with held.track_training(column):
            dpo_trainer(rows, tmp_path / column, max_steps=1).train()
        return held

    with without_cross_checks():
        held = train("annotator_id")
        with pytest.raises(PrivacyError, match="by the column 'annotator_id'"):
            train("team")
    assert [event.column for event in events(held.trail, PrivacyReserved)] == ["annotator_id"]


def test_without_a_budget_that_was_set_the_last_runs_own_stands_and_none_is_refused() -> None:
    assert fold([]).limit is None
    ledger = fold([line(reserved("a"), index=4), line(reserved("b"), index=9)])
    assert ledger.limit == Limit(9, "annotator", 8.0, 1e-5)
    ledger.check(PrivacyConfig(epsilon=1000.0, delta=0.1))


def test_a_budget_that_was_set_is_in_force_until_the_next_one() -> None:
    ledger = fold([budget(4.0, index=1), line(reserved("a"), index=2), budget(6.0, 1e-6, index=3)])
    assert ledger.limit == Limit(3, "annotator", 6.0, 1e-6, reason="the board agreed", by="A. Keeper")
    assert [one.epsilon for one in ledger.budgets] == [4.0, 6.0]
    assert ledger.mechanisms("annotator", None) == (Mechanism(1.0, 0.1, 10),)


@pytest.mark.parametrize(("epsilon", "delta"), [(4.0, 1e-5), (3.9, 1e-5), (4.0, 1e-6)])
def test_a_run_that_asks_for_no_more_than_the_budget_that_was_set_may_run(epsilon: float, delta: float) -> None:
    fold([budget(4.0)]).check(PrivacyConfig(epsilon=epsilon, delta=delta))


@pytest.mark.parametrize(
    ("epsilon", "delta", "asked", "raise_by"),
    [
        (4.1, 1e-5, "epsilon 4.1", "--epsilon 4.1 --delta 1e-05"),
        (3.0, 1e-4, "delta 0.0001", "--epsilon 4 --delta 0.0001"),
    ],
)
def test_a_run_that_asks_for_more_is_refused_and_told_who_set_it_and_how_it_is_raised(
    epsilon: float, delta: float, asked: str, raise_by: str
) -> None:
    with pytest.raises(BudgetExceededError, match=r"A\. Keeper set it in entry 7") as refused:
        fold([budget(4.0)]).check(PrivacyConfig(epsilon=epsilon, delta=delta))
    assert refused.value.reason == "budget-set"
    assert asked in str(refused.value)
    assert f"rlhf-audit budget set {raise_by} " in refused.value.next_step
    assert refused.value.exit_code == 3


def test_a_budget_says_whose_it_is_before_anything_was_spent() -> None:
    ledger = fold([budget(4.0, unit="pair")])
    assert (ledger.unit, ledger.column, ledger.mechanisms("pair")) == ("pair", None, ())
    with pytest.raises(PrivacyError, match="privacy budget of pairs"):
        ledger.mechanisms("annotator", "annotator_id")
    assert fold([budget(4.0)]).mechanisms("annotator", "whichever") == ()


def test_budgets_of_two_units_cannot_stand_on_one_trail() -> None:
    with pytest.raises(PrivacyError, match="annotators and for pairs"):
        fold([budget(4.0, unit="pair"), line(reserved("a"))])


def test_what_is_reserved_is_told_from_what_is_spent() -> None:
    lines = [line(reserved("a", 10)), line(settled("a", 10)), line(reserved("b", 5, sigma=2.0))]
    spent, both = fold(lines).spent(1e-5)
    assert spent == compose([Mechanism(1.0, 0.1, 10)], 1e-5).epsilon
    assert both == compose([Mechanism(1.0, 0.1, 10), Mechanism(2.0, 0.1, 5)], 1e-5).epsilon
    assert fold(lines[:2]).spent(1e-5) == (spent, spent)
    assert fold([]).spent(1e-5) == (0.0, 0.0)


@pytest.mark.parametrize(
    "lines",
    [
        [line(settled("never", 1))],
        [line(reserved("a", 10)), line(settled("a", 11))],
        [line(reserved("a", 10)), line(settled("a", -1))],
        [line(reserved("a", 10)), line(settled("a", 2)), line(settled("a", 1))],
        [line(reserved("a", 10)), line(reserved("a", 10))],
    ],
    ids=["unknown", "too-many", "negative", "twice", "reserved-twice"],
)
def test_a_settlement_that_does_not_fit_is_refused(lines: list[Line]) -> None:
    with pytest.raises(PrivacyError):
        fold(lines)


# --- a settlement needs its evidence ---------------------------------------------------------------------------------


def begun(every: int = 1) -> RunStarted:
    return RunStarted(experiment="e", entry_point="cell", tool="t", audit={"every_steps": every, "weights_every": 0})


def attached() -> TrainerAttached:
    return TrainerAttached(trainer="DPOTrainer", loss="sigmoid", max_steps=10, seed=1, hyperparameters={})


def closed(steps: int) -> RunFinished:
    return RunFinished(status="completed", steps=steps, trained=steps > 0)


def numbered(*found: Event, run: str = "run-1") -> list[Line]:
    return [line(event, run, index) for index, event in enumerate(found)]


def steps(*at: int) -> list[Step]:
    return [Step(step=number, epsilon=1.0) for number in at]


def test_a_settlement_that_the_steps_bear_out_is_believed() -> None:
    for last in (steps(7), []):
        ledger = fold(
            numbered(begun(), attached(), reserved("a", 10), *steps(*range(1, 7)), settled("a", 7), *last, closed(7))
        )
        (spend,) = ledger.spends
        assert (spend.steps, spend.settled, spend.doubt, ledger.doubts()) == (7, True, None, ())


def test_a_step_that_was_cut_short_may_be_paid_for_without_an_entry() -> None:
    ledger = fold(numbered(begun(), attached(), reserved("a", 10), *steps(1, 2), settled("a", 3), closed(2)))
    assert (ledger.spends[0].steps, ledger.doubts()) == (3, ())


@pytest.mark.parametrize(
    ("every", "shown", "said"),
    [
        (1, range(1, 8), 6),
        (1, [*range(1, 7), 7], 0),
        (3, [3, 6, 7], 6),
        (3, [3, 6], 5),
        (100, [7], 6),
    ],
)
def test_a_settlement_of_fewer_steps_than_the_trail_shows_is_not_believed_and_all_that_was_reserved_counts(
    every: int, shown: list[int], said: int
) -> None:
    lines = numbered(begun(every), attached(), reserved("a", 10), *steps(*shown), settled("a", said))
    (spend,) = fold(lines).spends
    assert (spend.steps, spend.settled, spend.mechanism) == (10, False, Mechanism(1.0, 0.1, 10))
    assert spend.doubt is not None
    assert f"settles {said} step" in spend.doubt
    assert f"shows that {max(shown)} steps ran" in spend.doubt
    assert "all 10 steps that entry 2 reserved count" in spend.doubt
    honest = numbered(begun(every), attached(), reserved("a", 10), *steps(*shown), settled("a", max(shown)))
    assert fold(honest).doubts() == ()


def test_a_step_that_comes_after_the_settlement_counts_as_evidence_and_another_trainers_do_not() -> None:
    first = [begun(3), attached(), reserved("a", 10), *steps(3), settled("a", 3), *steps(4)]
    assert len(fold(numbered(*first)).doubts()) == 1
    first = [begun(3), attached(), reserved("a", 10), *steps(3), settled("a", 4), *steps(4)]
    after = [attached(), *steps(3, 6, 9), closed(13)]  # post-processing: it reserves nothing
    assert fold(numbered(*first, *after)).doubts() == ()
    second = [attached(), reserved("b", 10), *steps(3, 6), settled("b", 6)]
    assert fold(numbered(*first, *second)).doubts() == ()
    assert [one.reservation for one in fold(numbered(*first, *second, *steps(7))).doubts()] == ["b"]


def test_a_training_that_went_on_from_a_checkpoint_is_held_against_its_own_steps() -> None:
    for every, shown in ((1, [5, 6, 7]), (3, [6, 7]), (100, [7])):
        lines = [begun(every), attached(), RunResumed(step=4), reserved("a", 10), *steps(*shown)]
        assert fold(numbered(*lines, settled("a", 3), closed(3))).doubts() == ()
        assert len(fold(numbered(*lines, settled("a", 2))).doubts()) == 1
        again = [attached(), reserved("b", 10), *steps(2), settled("b", 1)]  # not resumed: counted from 1
        assert [one.reservation for one in fold(numbered(*lines, settled("a", 3), *again)).doubts()] == ["b"]
    lied = [begun(), attached(), RunResumed(step=6), reserved("a", 10), *steps(5, 6, 7), settled("a", 1)]
    assert len(fold(numbered(*lied)).doubts()) == 1


def test_evaluations_and_failed_steps_are_no_steps() -> None:
    other = [
        Step(step=9, notes=["evaluation"]),
        Step(step=9, epsilon=1.0, notes=["the step failed"]),
    ]
    lines = [begun(), attached(), reserved("a", 10), *steps(1, 2), *other, settled("a", 2)]
    assert fold(numbered(*lines)).doubts() == ()


def test_a_run_that_closes_with_more_steps_than_were_settled_is_not_believed() -> None:
    ledger = fold(numbered(begun(), attached(), reserved("a", 10), settled("a", 2), closed(8)))
    assert ledger.spends[0].steps == 10
    assert "closes the run with 8 steps, of which 2 are paid for" in str(ledger.spends[0].doubt)
    both = [attached(), reserved("a", 10), settled("a", 2), attached(), reserved("b", 9), settled("b", 6), closed(8)]
    assert fold(numbered(begun(), *both)).doubts() == ()


def test_a_settlement_in_another_run_is_not_believed() -> None:
    lines = [line(reserved("a", 10), "run-1", 3), line(settled("a", 2), "run-2", 9)]
    (spend,) = fold(lines).spends
    assert (spend.steps, spend.settled) == (10, False)
    assert spend.doubt == (
        "Entry 9 settles 2 steps and stands in another run than its reservation: it is not believed, and all 10 steps "
        "that entry 3 reserved count."
    )


def test_a_malformed_entry_is_not_passed_over() -> None:
    good = line(reserved("a"))
    body = msgspec.json.decode(good.body)
    del body["noise_multiplier"]
    with pytest.raises(EntryError, match="malformed"):
        fold([replace(good, body=msgspec.json.encode(body))])
