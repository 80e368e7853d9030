"""Pairs sampled one by one: the mixture of Gaussians against integrals, a composition of our own, and dp-accounting."""

from __future__ import annotations

import itertools
import time

import dp_accounting
import numpy as np
import numpy.typing as npt
import pytest
from dp_accounting import pld
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from scipy.stats import binom, norm

from rlhf_audit_nb.errors import PrivacyError
from rlhf_audit_nb.privacy.accountant import (
    Mechanism,
    calibrate,
    compose,
    composed_epsilon,
    epsilon_curve,
    max_steps,
)
from rlhf_audit_nb.privacy.cross_checks import renyi_divergences
from rlhf_audit_nb.privacy.loss_distributions import one_step
from rlhf_audit_nb.privacy.mechanisms import MAX_PAIRS, drawn_pairs

Array = npt.NDArray[np.float64]


def densities(sigma: float, rate: float, pairs: int, step: float = 0.002) -> tuple[Array, Array, Array]:
    """A fine line, and the densities on it of the sum with and without the unit (all its pairs pulling one way)."""
    x = np.arange(-12 * sigma, pairs + 12 * sigma, step * sigma)
    weights = binom.pmf(np.arange(pairs + 1), pairs, rate)
    there = sum(weight * norm.pdf(x, loc=j, scale=sigma) for j, weight in enumerate(weights))
    return x, np.asarray(there), norm.pdf(x, scale=sigma)


def divergence(upper: Array, lower: Array, epsilon: float, step: float) -> float:
    """The hockey-stick divergence by the trapezoidal rule, without any discretised loss."""
    return float(np.maximum(upper - np.exp(epsilon) * lower, 0.0).sum() * step)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 2.0, 5.0])
@pytest.mark.parametrize(("sigma", "rate", "pairs"), [(1.0, 0.01, 4), (2.0, 0.3, 8), (0.7, 0.1, 2), (3.0, 1.0, 3)])
def test_one_step_is_the_integral_in_the_direction_that_is_worse(
    sigma: float, rate: float, pairs: int, epsilon: float
) -> None:
    x, there, gone = densities(sigma, rate, pairs)
    removed, added = (divergence(*two, epsilon, x[1] - x[0]) for two in ((there, gone), (gone, there)))
    found = float(one_step(sigma, rate, pairs, 1e-3).get_delta_for_epsilon(epsilon))
    assert found == pytest.approx(max(removed, added), abs=2e-9, rel=1e-5)
    if epsilon == 0.3 and rate == 0.01:
        assert removed > 2 * added  # each direction counts; here the one in which the unit is there


def test_two_steps_are_the_integral_over_the_plane() -> None:
    sigma, rate, pairs, delta = 1.0, 0.2, 3, 1e-4
    spent = composed_epsilon([Mechanism(sigma, rate, 2, pairs)], delta)
    x, there, gone = densities(sigma, rate, pairs, 0.01)
    area = (x[1] - x[0]) ** 2
    for epsilon, within in ((spent, True), (spent - 0.002, False)):
        found = max(
            sum(
                float(np.maximum(upper[i] * upper - np.exp(epsilon) * lower[i] * lower, 0.0).sum())
                for i in range(len(x))
            )
            for upper, lower in ((there, gone), (gone, there))
        )
        assert bool(found * area <= delta * 1.0001) is within


def composition(sigma: float, rate: float, pairs: int, steps: int, delta: float, grid: float, how: str) -> float:
    """Epsilon by a discretised loss of our own: ``floor`` never overstates, ``nearest`` is close to the truth."""
    x, there, gone = densities(sigma, rate, pairs, 0.001)
    step = x[1] - x[0]
    kept = (there > 1e-18) | (gone > 1e-18)
    found = []
    for upper, lower in ((there[kept], gone[kept]), (gone[kept], there[kept])):
        losses = np.log(upper) - np.log(np.maximum(lower, 1e-300))
        places = (np.floor if how == "floor" else np.rint)(losses / grid).astype(int)
        first = int(places.min())
        mass = np.bincount(places - first, weights=upper * step)
        size = 1 << (len(mass) * steps).bit_length()
        total = np.clip(np.fft.irfft(np.fft.rfft(mass, size) ** steps, size), 0.0, None)[: len(mass) * steps]
        where = (np.arange(len(total)) + first * steps) * grid

        def over(epsilon: float, where: Array = where, total: Array = total) -> float:
            return float((total * -np.expm1(np.minimum(epsilon - where, 0.0))).sum())

        low, high = 0.0, float(where[-1])
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if over(middle) <= delta else (middle, high)
        found.append(high)
    return max(found)


@pytest.mark.parametrize(
    ("sigma", "rate", "pairs", "steps", "delta"),
    [
        (1.0, 0.1, 4, 10, 1e-5),
        (2.0, 0.05, 8, 30, 1e-6),
        (4.0, 0.5, 16, 5, 1e-4),
        (1.5, 0.02, 2, 50, 1e-5),
        (1.0, 0.1, 1, 20, 1e-5),
    ],
)
def test_many_steps_are_what_a_composition_of_another_make_says(
    sigma: float, rate: float, pairs: int, steps: int, delta: float
) -> None:
    spent = composed_epsilon([Mechanism(sigma, rate, steps, pairs)], delta)
    assert spent >= composition(sigma, rate, pairs, steps, delta, 1e-3, "floor")
    assert spent == pytest.approx(composition(sigma, rate, pairs, steps, delta, 1e-3, "nearest"), abs=3e-3)


@pytest.mark.parametrize(("pairs", "known"), [(1, 1.204), (2, 2.584), (4, 5.613), (8, 12.57), (16, 29.76)])
def test_the_known_figures_for_400_steps_come_out(pairs: int, known: float) -> None:
    spent = composed_epsilon([Mechanism(1.0, 0.01, 400, pairs)], 1e-5)
    assert spent == pytest.approx(known, rel=5e-4)
    if pairs > 1:
        assert spent > pairs * 1.2036, "pairs times the figure of one pair is no bound, at the same delta"


@pytest.mark.parametrize(
    ("sigma", "rate", "pairs", "steps"), [(1.0, 0.01, 4, 400), (10.0, 0.1, 24, 100), (20.0, 0.5, 8, 10)]
)
def test_dp_accounting_says_the_same_at_its_leisure(sigma: float, rate: float, pairs: int, steps: int) -> None:
    weights = binom.pmf(np.arange(pairs + 1), pairs, rate)
    event = MixtureOfGaussiansDpEvent(sigma, list(range(pairs + 1)), list(weights))
    theirs = pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL, 1e-3)
    theirs.compose(event, steps)
    ours = one_step(sigma, rate, pairs, 1e-3).self_compose(steps).get_epsilon_for_delta(1e-5)
    assert ours == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-6)


def test_one_pair_is_the_plain_mechanism() -> None:
    quick = one_step(1.1, 0.02, 1, 1e-4, quick=True).self_compose(300).get_epsilon_for_delta(1e-5)
    assert quick == pytest.approx(composed_epsilon([Mechanism(1.1, 0.02, 300)], 1e-5), rel=1e-6)
    assert Mechanism(1.1, 0.02, 300) == Mechanism(1.1, 0.02, 300, 1)


@pytest.mark.parametrize(("sigma", "rate", "pairs", "steps"), [(2.0, 0.05, 4, 100), (6.0, 0.2, 8, 50)])
def test_the_cost_lies_between_one_pair_and_all_pairs_at_once(
    sigma: float, rate: float, pairs: int, steps: int
) -> None:
    spent = composed_epsilon([Mechanism(sigma, rate, steps, pairs)], 1e-5)
    any_of_them = 1 - (1 - rate) ** pairs
    assert composed_epsilon([Mechanism(sigma, any_of_them, steps)], 1e-5) < spent
    assert spent < composed_epsilon([Mechanism(sigma / pairs, any_of_them, steps)], 1e-5)


def test_pairs_that_pull_in_different_directions_cost_less() -> None:
    """The reduction to one dimension: two pairs at a right angle, integrated over the plane, stay below."""
    sigma, rate, epsilon = 1.0, 0.3, 1.0
    axis = np.arange(-9.0, 10.0, 0.02)
    x, y = np.meshgrid(axis, axis)

    def at(a: float, b: float) -> Array:
        return np.asarray(norm.pdf(x, a, sigma) * norm.pdf(y, b, sigma))

    neither, one, other, both = (1 - rate) ** 2, rate * (1 - rate), rate * (1 - rate), rate**2
    there, gone = neither * at(0, 0) + one * at(1, 0) + other * at(0, 1) + both * at(1, 1), at(0, 0)
    worst = float(one_step(sigma, rate, 2, 1e-3).get_delta_for_epsilon(epsilon))
    for upper, lower in ((there, gone), (gone, there)):
        assert divergence(upper, lower, epsilon, 0.02**2) < worst


def test_both_kinds_of_sampling_are_composed_together() -> None:
    plain, mixed = Mechanism(2.0, 0.1, 50), Mechanism(4.0, 0.05, 60, 4)
    together = composed_epsilon([plain, mixed], 1e-5)
    assert max(composed_epsilon([plain], 1e-5), composed_epsilon([mixed], 1e-5)) < together
    assert together < composed_epsilon([plain], 1e-5) + composed_epsilon([mixed], 1e-5)
    assert composed_epsilon([mixed, plain], 1e-5) == together
    assert composed_epsilon([Mechanism(4.0, 0.05, 60), mixed], 1e-5) != composed_epsilon(
        [Mechanism(4.0, 0.05, 120, 4)], 1e-5
    )


def test_what_the_cross_checks_can_and_cannot_say_is_said() -> None:
    accounted = compose([Mechanism(2.0, 0.05, 200, 4)], 1e-5)
    assert (
        accounted.prv
        == "not computed: Opacus' PRV accountant has no mixture of Gaussians, which sampling pairs " + ("one by one is")
    )
    assert any("no mixture of Gaussians" in note for note in accounted.notes)
    assert isinstance(accounted.rdp, float)
    assert accounted.epsilon < accounted.rdp < 1.3 * accounted.epsilon


@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.01), (3.0, 0.2), (0.8, 0.05)])
def test_renyi_divergences_by_integration_are_dp_accountings(sigma: float, rate: float) -> None:
    orders = [2.0, 5.0, 8.0, 32.0]  # at others dp-accounting gives an upper bound
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    for order, ours in zip(orders, renyi_divergences(sigma, rate, 1, orders), strict=True):
        theirs = dp_accounting.rdp.RdpAccountant(
            orders=[order], neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL
        )
        theirs.compose(event, 1000)
        said, _ = dp_accounting.rdp.compute_epsilon([order], [1000 * ours], 1e-5)
        assert said == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-5), order


def test_renyi_divergence_of_a_mixture_of_whole_order_is_its_sum() -> None:
    """For order 2 the divergence has a closed form: the sum over two independent counts of exp(i j / sigma^2)."""
    sigma, rate, pairs = 2.0, 0.1, 5
    weights = binom.pmf(np.arange(pairs + 1), pairs, rate)
    products = np.outer(np.arange(pairs + 1), np.arange(pairs + 1)) / sigma**2
    exact = float(np.log((np.outer(weights, weights) * np.exp(products)).sum()))
    assert renyi_divergences(sigma, rate, pairs, [2.0])[0] == pytest.approx(exact, rel=1e-9)


def test_an_integral_that_takes_minutes_is_left_out_in_words() -> None:
    accounted = compose([Mechanism(3.0, 0.0001, 100, 900)], 1e-5)
    assert isinstance(accounted.rdp, str)
    assert "takes minutes" in accounted.rdp
    assert accounted.epsilon > 0


def test_counts_that_are_next_to_never_drawn_are_counted_as_failure() -> None:
    counts, chances, beyond = drawn_pairs(0.001, 1000)
    assert len(counts) < 60
    assert 0 < beyond <= 1e-20
    assert float(chances.sum()) == pytest.approx(1.0, abs=1e-12)
    all_of_them = drawn_pairs(0.3, 12)
    assert list(all_of_them[0]) == list(range(13))
    assert all_of_them[2] == 0


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps", "pairs"),
    [(8.0, 0.05, 300, 8), (1.0, 0.05, 300, 8), (4.0, 0.01, 1000, 4), (3.0, 0.1, 50, 64), (0.05, 0.01, 100, 2)],
)
def test_the_calibrated_noise_is_enough_and_hardly_more(epsilon: float, rate: float, steps: int, pairs: int) -> None:
    begun = time.process_time()
    sigma = calibrate(epsilon, 1e-5, rate, steps, pairs=pairs)
    assert time.process_time() - begun < 6
    assert 0.997 * epsilon <= composed_epsilon([Mechanism(sigma, rate, steps, pairs)], 1e-5) <= epsilon


def test_as_many_steps_as_fit_and_not_one_more() -> None:
    steps = max_steps(5.0, 1e-5, 4.0, 0.05, (Mechanism(3.0, 0.1, 20),), at_most=5000, pairs=8)
    assert 0 < steps < 5000
    before = Mechanism(3.0, 0.1, 20)
    assert composed_epsilon([before, Mechanism(4.0, 0.05, steps, 8)], 1e-5) <= 5.0
    assert composed_epsilon([before, Mechanism(4.0, 0.05, steps + 1, 8)], 1e-5) > 5.0


def test_the_curve_rises_to_the_end_and_never_understates() -> None:
    mechanism = Mechanism(3.0, 0.05, 120, 4)
    curve = epsilon_curve(mechanism, 1e-5)
    assert len(curve) == 121
    assert all(before <= after for before, after in itertools.pairwise(curve))
    for step in (1, 7, 40, 119):
        assert curve[step] >= composed_epsilon([mechanism.with_steps(step)], 1e-5) - 1e-6
    assert curve[-1] == composed_epsilon([mechanism], 1e-5)


@pytest.mark.parametrize("pairs", [0, -1, MAX_PAIRS + 1])
def test_a_number_of_pairs_that_cannot_be_is_refused(pairs: int) -> None:
    with pytest.raises(PrivacyError, match="separately sampled pairs"):
        Mechanism(1.0, 0.1, 10, pairs)


def test_a_mixture_that_takes_minutes_is_refused_in_a_sentence() -> None:
    with pytest.raises(PrivacyError, match="protects nobody") as refused:
        composed_epsilon([Mechanism(0.1, 0.5, 100, 500)], 1e-5)
    assert refused.value.reason == "too-dear"
