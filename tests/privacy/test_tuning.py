"""Choosing among several runs: known figures, and an exact computation where one is possible."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm, poisson

from rlhf_audit_nb.errors import PrivacyError
from rlhf_audit_nb.privacy.accountant import Mechanism, composed_epsilon
from rlhf_audit_nb.privacy.tuning import RunsDistribution, plan_tuning

BASE = Mechanism(1.0, 0.02, 500)


@pytest.mark.parametrize(
    ("runs", "distribution", "known"),
    [(5, "geometric", 5.26), (20, "geometric", 6.37), (20, "logarithmic", 5.43), (20, "poisson", 9.17)],
)
def test_the_known_figures_come_out(runs: int, distribution: RunsDistribution, known: float) -> None:
    found = plan_tuning(BASE, 1e-5, runs, distribution)
    assert found.selected == pytest.approx(known, abs=0.006)
    assert found.once == composed_epsilon([BASE], 1e-5) < found.selected
    assert found.composed == composed_epsilon([BASE] * runs, 1e-5)


def test_twenty_composed_runs_cost_far_more_than_one_that_is_selected() -> None:
    found = plan_tuning(BASE, 1e-5, 20)
    assert found.composed > 2 * found.selected
    once = plan_tuning(BASE, 1e-5, 1)
    assert once.composed == once.once


def best_of(distribution: str, runs: int, location: float, sigma: float, x: np.ndarray) -> np.ndarray:
    """The density of the largest of a random number of draws from N(location, sigma^2): f G'(F)."""
    density, below = norm.pdf(x, location, sigma), norm.cdf(x, location, sigma)
    if distribution == "geometric":
        chance = 1 / runs
        return np.asarray(density * chance / (1 - (1 - chance) * below) ** 2)
    return np.asarray(density * runs * np.exp(runs * (below - 1)))  # Poisson; with none, no value at all


@pytest.mark.parametrize("distribution", ["geometric", "poisson"])
@pytest.mark.parametrize(("sigma", "runs"), [(2.0, 5), (1.0, 20), (4.0, 100)])
def test_the_bound_is_never_below_the_exact_cost_of_the_largest_of_several_draws(
    distribution: RunsDistribution, sigma: float, runs: int
) -> None:
    delta = 1e-5
    bound = plan_tuning(Mechanism(sigma, 1.0, 1), delta, runs, distribution).selected
    x = np.linspace(-12 * sigma, 12 * sigma + 1, 400_001)
    one, other = (best_of(distribution, runs, location, sigma, x) for location in (0.0, 1.0))
    none = poisson.pmf(0, runs) if distribution == "poisson" else 0.0

    def divergence(epsilon: float) -> float:
        step = x[1] - x[0]
        both = (np.maximum(a - math.exp(epsilon) * b, 0).sum() * step for a, b in ((one, other), (other, one)))
        return float(max(both))

    assert float(one.sum() * (x[1] - x[0])) + none == pytest.approx(1.0, abs=1e-6)
    assert divergence(bound) <= delta
    assert divergence(composed_epsilon([Mechanism(sigma, 1.0, 1)], delta)) > delta, "selecting is not free"


def test_what_cannot_be_planned_is_refused() -> None:
    for runs in (0, -1, 10_001):
        with pytest.raises(PrivacyError, match="runs cannot be planned"):
            plan_tuning(BASE, 1e-5, runs)
    with pytest.raises(PrivacyError, match="number of runs"):
        plan_tuning(BASE, 1e-5, 5, "fixed")  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="one by one"):
        plan_tuning(Mechanism(1.0, 0.02, 50, 4), 1e-5, 5)
    with pytest.raises(PrivacyError, match="delta"):
        plan_tuning(BASE, 1e-12, 5)
