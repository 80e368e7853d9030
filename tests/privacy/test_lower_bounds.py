"""Lower bounds on epsilon: closed forms, brute force, published figures, and how often they are wrong."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy.stats import norm

from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.privacy.lower_bounds import (
    bound_from_scores,
    ceiling,
    epsilon_bound,
    gaussian_bound,
    gaussian_epsilon,
    p_value,
)

DELTA = 1e-5
MU_OF_EPSILON = {1.0: 0.2679, 4.0: 0.92495, 8.0: 1.6661}


def binomial_tail(guesses: int, right: int, chance: float) -> float:
    return sum(math.comb(guesses, i) * chance**i * (1 - chance) ** (guesses - i) for i in range(right, guesses + 1))


def ideal(mu: float, canaries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The best attack on a Gaussian mechanism: one standard normal score a canary, moved by mu where it is in."""
    generator = np.random.default_rng(seed)
    included = generator.random(canaries) < 0.5
    return included * mu + generator.normal(size=canaries), included


@pytest.mark.parametrize(("guesses", "right", "epsilon"), [(10, 10, 0.5), (40, 31, 1.0), (100, 55, 0.0)])
def test_without_delta_the_p_value_is_the_binomial_tail(guesses, right, epsilon):
    expected = binomial_tail(guesses, right, 1 / (1 + math.exp(-epsilon)))
    assert p_value(200, guesses, right, epsilon, 0.0) == pytest.approx(expected, rel=1e-9)


def test_with_delta_the_p_value_is_that_of_the_theorem():
    m, r, v, epsilon, delta = 50, 30, 24, 0.7, 1e-3
    chance = 1 / (1 + math.exp(-epsilon))
    beta = binomial_tail(r, v, chance)
    alpha = max((binomial_tail(r, v - i, chance) - beta) / i for i in range(1, v + 1))
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(beta + 2 * m * delta * alpha, rel=1e-9)


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 2.5])
def test_the_p_value_of_randomised_response_is_exact(epsilon):
    """Enumerated: each canary's bit is released, flipped with chance 1 / (1 + e^epsilon); every guess is the bit."""
    m, keep = 8, math.exp(epsilon) / (1 + math.exp(epsilon))
    for right in range(m + 1):
        tail = 0.0
        for flips in itertools.product((0, 1), repeat=m):
            if m - sum(flips) >= right:
                tail += math.prod(keep if not flip else 1 - keep for flip in flips)
        assert p_value(m, m, right, epsilon, 0.0) == pytest.approx(tail, rel=1e-9)


@pytest.mark.parametrize(("canaries", "published"), [(100, 3.49), (300, 4.59), (1000, 5.78), (5000, 7.28)])
def test_the_ceilings_are_the_known_ones(canaries, published):
    assert ceiling(canaries, DELTA) == pytest.approx(published, abs=0.006)
    closed = math.log(0.05 ** (1 / canaries) / (1 - 0.05 ** (1 / canaries)))
    assert ceiling(canaries, 0.0) == pytest.approx(closed, abs=1e-6)


@pytest.mark.parametrize("mu", [0.05, 0.3, 0.9254, 2.0, 5.0])
def test_the_epsilon_of_a_gaussian_mechanism_is_the_accountants(mu):
    loss = privacy_loss_distribution.from_gaussian_mechanism(1 / mu, value_discretization_interval=1e-4)
    assert gaussian_epsilon(mu, DELTA) == pytest.approx(loss.get_epsilon_for_delta(DELTA), abs=2e-3)
    found = gaussian_epsilon(mu, DELTA)
    closed = norm.cdf(mu / 2 - found / mu) - math.exp(found) * norm.cdf(-mu / 2 - found / mu)
    assert closed == pytest.approx(DELTA, rel=1e-6)


def test_no_signal_gives_no_bound():
    assert epsilon_bound(1000, 1000, 500, DELTA) == 0
    assert gaussian_bound(1000, 1000, 500, DELTA) == 0
    assert gaussian_epsilon(0.0, DELTA) == 0


def test_more_right_guesses_give_a_larger_bound():
    bounds = [epsilon_bound(300, 100, right, DELTA) for right in range(50, 101, 5)]
    gaussian = [gaussian_bound(300, 100, right, DELTA) for right in range(50, 101, 5)]
    assert bounds == sorted(bounds)
    assert gaussian == sorted(gaussian)
    assert bounds[-1] > 2.5
    assert all(one >= other for one, other in zip(gaussian, bounds, strict=True))


@pytest.mark.parametrize(("epsilon", "canaries", "low", "high"), [(4.0, 1000, 1.2, 1.7), (8.0, 1000, 2.3, 2.9)])
def test_the_best_attack_on_a_gaussian_mechanism_shows_what_is_known_of_it(epsilon, canaries, low, high):
    mu = MU_OF_EPSILON[epsilon]
    assert gaussian_epsilon(mu, DELTA) == pytest.approx(epsilon, abs=6e-3)
    found = [bound_from_scores(*ideal(mu, canaries, seed), DELTA) for seed in range(12)]
    assert low < np.mean([bound.epsilon for bound in found]) < high
    assert np.mean([bound.epsilon for bound in found]) < np.mean([bound.gaussian for bound in found]) < epsilon


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.5])
def test_a_bound_is_wrong_at_most_as_often_as_it_says(mu):
    """150 fixed experiments: at 95 % of confidence, 18 wrong ones would have a chance below 1e-3."""
    truth = gaussian_epsilon(mu, DELTA)
    found = [bound_from_scores(*ideal(mu, 120, seed), DELTA) for seed in range(150)]
    assert sum(bound.epsilon > truth for bound in found) < 18
    assert sum(bound.gaussian > truth for bound in found) < 18


def test_noise_five_times_too_small_is_flagged_with_a_thousand_canaries_and_not_with_a_hundred():
    mu = 5 * MU_OF_EPSILON[4.0]
    many, few = (bound_from_scores(*ideal(mu, canaries, 2), DELTA) for canaries in (1000, 100))
    assert many.epsilon > 4.0
    assert few.epsilon < few.ceiling < 4.0


def test_guesses_turned_round_show_nothing():
    scores, included = ideal(3.0, 400, 1)
    assert bound_from_scores(scores, included, DELTA).epsilon > 2
    assert bound_from_scores(-scores, included, DELTA).epsilon == 0


@pytest.mark.parametrize(("canaries", "guesses", "right"), [(10, 11, 5), (10, 5, 6), (10, 0, 0), (10, 5, -1)])
def test_counts_that_cannot_be_are_refused(canaries, guesses, right):
    with pytest.raises(ConfigError):
        p_value(canaries, guesses, right, 1.0, DELTA)


def test_scores_that_cannot_be_are_refused():
    for scores, included in (
        ([1.0], [True]),
        ([1.0, 2.0], [True]),
        ([1.0, math.nan], [True, False]),
    ):
        with pytest.raises(ConfigError):
            bound_from_scores(np.array(scores), np.array(included), DELTA)
    with pytest.raises(ConfigError):
        epsilon_bound(10, 10, 5, DELTA, confidence=1.0)
