"""Randomised response against enumeration in exact fractions, dp-accounting's single steps, and known figures."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import dp_accounting
import pytest
from dp_accounting import pld
from dp_accounting.pld import privacy_loss_distribution as loss

from rlhf_audit_nb.errors import PrivacyError
from rlhf_audit_nb.privacy.randomised_response import (
    MAX_LABELS,
    composed_response,
    flip_probability,
    label_epsilon,
    response_for,
)


@pytest.mark.parametrize(
    ("epsilon", "flip"), [(0.5, 0.3775), (1.0, 0.2689), (2.0, 0.1192), (4.0, 0.01799), (8.0, 0.00034)]
)
def test_the_flip_probability_is_the_known_one(epsilon: float, flip: float) -> None:
    assert flip_probability(epsilon) == pytest.approx(flip, abs=5e-5)
    assert math.log((1 - flip_probability(epsilon)) / flip_probability(epsilon)) == pytest.approx(epsilon)


@pytest.mark.parametrize(
    ("count", "total", "each", "flip"),
    [(20, 4.0, 0.225, 0.444), (20, 8.0, 0.415, 0.398), (5, 4.0, 0.8, 0.310), (50, 8.0, 0.245, 0.439)],
)
def test_the_share_of_each_label_is_the_known_one(count: int, total: float, each: float, flip: float) -> None:
    share = response_for(total, count, 1e-5)
    assert share == pytest.approx(each, abs=0.006)
    assert flip_probability(share) == pytest.approx(flip, abs=0.0015)
    assert 0.999999 * total <= composed_response(share, count, 1e-5) <= total


def enumerated(odds: list[Fraction], epsilon: float) -> Fraction:
    """The hockey-stick divergence at ``epsilon`` between all labels as they are and all turned round, over 2^k outputs.

    ``odds`` holds (1 - p) / p of each label. Exact but for exp(epsilon), which is taken as a float's exact value.
    """
    scale, divergence = Fraction(math.exp(epsilon)), Fraction(0)
    for flips in itertools.product((False, True), repeat=len(odds)):
        here, there = Fraction(1), Fraction(1)
        for one, flipped in zip(odds, flips, strict=True):
            kept, turned = one / (1 + one), 1 / (1 + one)
            here *= turned if flipped else kept
            there *= kept if flipped else turned
        divergence += max(Fraction(0), here - scale * there)
    return divergence


@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2, 0.3])
@pytest.mark.parametrize(("odds", "count"), [(Fraction(3, 2), 1), (Fraction(3, 2), 10), (3, 5), (Fraction(9, 8), 9)])
def test_equal_labels_cost_what_the_enumeration_of_all_outputs_says(
    odds: Fraction | int, count: int, delta: float
) -> None:
    every = [Fraction(odds)] * count
    spent = composed_response(math.log(odds), count, delta)
    assert enumerated(every, spent) <= Fraction(delta) * Fraction(1 + 1e-9)
    if spent > 1e-6:
        assert enumerated(every, spent - 1e-6) > Fraction(delta)


@pytest.mark.parametrize("delta", [1e-8, 1e-5, 1e-2])
def test_different_labels_cost_hardly_more_than_the_enumeration_says(delta: float) -> None:
    odds = [Fraction(3, 2), Fraction(3, 2), Fraction(5, 2), Fraction(5, 2), Fraction(9, 8), Fraction(4)]
    spent = label_epsilon([math.log(one) for one in odds], delta)
    assert enumerated(odds, spent) <= Fraction(delta)
    assert enumerated(odds, spent - 2e-3) > Fraction(delta)


def test_equal_labels_in_a_list_are_counted_exactly() -> None:
    assert label_epsilon([0.4] * 12, 1e-5) == composed_response(0.4, 12, 1e-5)
    assert label_epsilon([], 1e-5) == 0
    assert composed_response(0.4, 0, 1e-5) == 0


def test_twenty_labels_are_not_counted_as_one_as_dp_accounting_does() -> None:
    event = dp_accounting.RandomizedResponseDpEvent(2 * flip_probability(1.0), 2)
    counted = pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_ONE)
    counted.compose(event, 20)
    single = pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_ONE)
    for _ in range(20):
        single.compose(event)
    assert counted.get_epsilon(1e-10) == pytest.approx(1.0, abs=1e-3), "dp-accounting was repaired: say so in the docs"
    assert composed_response(1.0, 20, 1.1e-10) == pytest.approx(single.get_epsilon(1.1e-10), abs=1e-3)
    assert composed_response(1.0, 20, 1.1e-10) > 15


@pytest.mark.parametrize(("epsilon", "count", "delta"), [(0.05, 5000, 1e-6), (0.3, 400, 1e-5), (2.0, 30, 1e-9)])
def test_many_labels_cost_what_the_privacy_loss_distribution_says(epsilon: float, count: int, delta: float) -> None:
    parameters = pld.common.DifferentialPrivacyParameters(epsilon, 0.0)
    bound = loss.from_privacy_parameters(parameters, 1e-5).self_compose(count).get_epsilon_for_delta(delta)
    assert composed_response(epsilon, count, delta) == pytest.approx(bound, rel=2e-3)


def test_the_cost_never_exceeds_the_sum_and_rises_with_every_label() -> None:
    costs = [composed_response(0.2, count, 1e-5) for count in range(1, 60)]
    assert all(before < after for before, after in itertools.pairwise(costs))
    assert all(cost <= 0.2 * count for count, cost in enumerate(costs, 1))
    assert composed_response(0.2, 7, 0.0) == pytest.approx(1.4)


def test_a_million_labels_are_counted_in_moderation() -> None:
    spent = composed_response(0.001, MAX_LABELS, 1e-5)
    gaussian = pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    gaussian.compose(dp_accounting.GaussianDpEvent(1.0))  # mu = sqrt(k) epsilon = 1: its limit
    assert spent == pytest.approx(gaussian.get_epsilon(1e-5), rel=1e-3)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf, 101.0])
def test_an_epsilon_that_cannot_be_is_refused(epsilon: float) -> None:
    for call in (
        lambda: flip_probability(epsilon),
        lambda: composed_response(epsilon, 3, 1e-5),
        lambda: label_epsilon([0.3, epsilon], 1e-5),
        lambda: response_for(epsilon, 3, 1e-5),
    ):
        with pytest.raises(PrivacyError, match="randomised response"):
            call()


@pytest.mark.parametrize("delta", [1e-10, 1e-12, -1e-5, 1.0, math.nan])
def test_a_delta_below_what_can_be_computed_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="delta"):
        composed_response(1.0, 3, delta)
    with pytest.raises(PrivacyError, match="delta"):
        label_epsilon([1.0, 2.0], delta)


def test_a_count_that_cannot_be_is_refused() -> None:
    with pytest.raises(PrivacyError, match="labels"):
        composed_response(1.0, -1, 1e-5)
    with pytest.raises(PrivacyError, match="labels"):
        composed_response(1.0, MAX_LABELS + 1, 1e-5)
    with pytest.raises(PrivacyError, match="no label"):
        response_for(1.0, 0, 1e-5)
