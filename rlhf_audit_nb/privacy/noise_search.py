"""Looking for the noise that reaches an epsilon, and for the steps that fit into one. Floor 2.

Each look costs a composition, so both searches interpolate between what they have seen instead of halving. Everything
here is a pure function of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from rlhf_audit_nb.errors import PrivacyError
from rlhf_audit_nb.privacy.mechanisms import Mechanism, drawn_pairs

__all__ = ["MAX_NOISE_MULTIPLIER", "MIN_NOISE_MULTIPLIER", "SLOPE", "Reached", "first_guess", "next_steps", "search"]

MIN_NOISE_MULTIPLIER = 2.0**-6
MAX_NOISE_MULTIPLIER = 1e4
SLOPE = 1.2
"""Epsilon falls about as 1 / sigma where it is small, and faster where it is large."""

_SIGMA_MARGIN = 1e-4
_MOST_TURNS = 40

_Point = tuple[float, float]  # logarithms of the noise and of epsilon over its target
Reached = tuple[int, float]
"""Steps, and what they cost."""


def first_guess(epsilon: float, delta: float, mechanism: Mechanism) -> float:
    """The noise multiplier by the central limit, mu^2 = T chi^2(sigma); only where a search begins.

    With weights w of the counts j and i of a unit's pairs in the sample, chi^2 = sum w_i w_j (exp(i j / sigma^2) - 1).
    """

    def exceeded(mu: float) -> float:
        upper, lower = epsilon / mu - mu / 2, epsilon / mu + mu / 2
        return _tail(upper) - math.exp(min(epsilon, 700.0)) * _tail(lower)

    low, high = 1e-6, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if exceeded(middle) > delta else (middle, high)
    rate, pairs, target = mechanism.sampling_rate, mechanism.pairs, low**2 / max(mechanism.steps, 1)
    sigma = 1 / math.sqrt(math.log1p(target / rate**2)) if pairs == 1 else _noise_for(target, rate, pairs)
    return min(max(sigma, MIN_NOISE_MULTIPLIER * pairs), MAX_NOISE_MULTIPLIER)


def _noise_for(target: float, rate: float, pairs: int) -> float:
    """The sigma whose chi^2 is ``target``, by bisection."""
    import numpy as np

    counts, chances, _ = drawn_pairs(rate, pairs)
    products, weights = np.outer(counts, counts), np.outer(chances, chances)
    low, high = MIN_NOISE_MULTIPLIER, MAX_NOISE_MULTIPLIER
    for _ in range(40):
        middle = math.sqrt(low * high)
        spread = float((weights * np.expm1(np.minimum(products / middle**2, 500.0))).sum())
        low, high = (middle, high) if spread > target else (low, middle)
    return high


def _tail(value: float) -> float:
    return 0.5 * math.erfc(value / math.sqrt(2))


def search(
    cost: Callable[[float], float],
    epsilon: float,
    sigma: float,
    slope: float,
    slack: float,
    least: float = MIN_NOISE_MULTIPLIER,
) -> tuple[float, float]:
    """The least noise multiplier that fits, to ``slack`` of epsilon, and how steeply ``cost`` falls there.

    Secants between the logarithms of both, kept within what is known: ``low`` does not fit, ``high`` does.

    Args:
        cost: epsilon at a noise multiplier.
        epsilon: what it may be.
        sigma: where to begin.
        slope: how steeply the logarithm of the cost falls with that of sigma, about.
        slack: how much of epsilon may be left unused.
        least: the smallest noise multiplier that is looked at.

    Raises:
        PrivacyError: code ``no-noise-fits``.
    """
    low: _Point | None = None
    high: _Point | None = None
    for turn in range(_MOST_TURNS):
        here = (math.log(sigma), math.log(max(cost(sigma), 1e-12) / epsilon))
        if here[1] <= 0:
            high = here
            if here[1] >= math.log1p(-slack) or sigma <= least:
                return sigma, slope
        else:
            low = here
            if sigma >= MAX_NOISE_MULTIPLIER:
                raise PrivacyError(
                    f"No noise multiplier up to {MAX_NOISE_MULTIPLIER:g} keeps the composed epsilon within "
                    f"{epsilon:g}.",
                    next_step="Ask for fewer steps, or give the population a larger budget.",
                    code="no-noise-fits",
                )
        if low is not None and high is not None:
            if high[0] - low[0] < _SIGMA_MARGIN:
                break
            slope = max((low[1] - high[1]) / (high[0] - low[0]), 0.1)
        sigma = math.exp(_next_noise(here, low, high, slope, slack, turn))
        sigma = min(max(sigma, least), MAX_NOISE_MULTIPLIER)
    if high is None:  # for the type checker; far fewer turns reach the largest noise
        raise PrivacyError("The search for a noise multiplier did not end.", code="no-noise-fits")
    return math.exp(high[0]), slope


def _next_noise(here: _Point, low: _Point | None, high: _Point | None, slope: float, slack: float, turn: int) -> float:
    aim = math.log1p(-slack / 2)
    if low is None or high is None:
        # Steps grow until both sides are known: what was spent before may leave no noise that fits.
        least = math.ldexp(0.002, 2 * turn)
        step = max((here[1] - aim) / slope, least) if low is not None else min((here[1] - aim) / slope, -least)
        return here[0] + min(max(step, -math.log(4)), math.log(4))
    middle = (low[0] + high[0]) / 2
    if turn % 4 == 3:  # noqa: PLR2004  a secant may creep up from one side; now and then the interval is halved
        return middle
    share = (low[1] - aim) / (low[1] - high[1])
    return low[0] + min(max(share, 0.02), 0.98) * (high[0] - low[0])


def next_steps(epsilon: float, before: Reached, good: Reached, bad: Reached, turn: int) -> int:
    """Where to look next, strictly between ``good`` and ``bad``; epsilon grows as a power of the steps (1/2 to 1)."""
    middle = math.isqrt(good[0] * bad[0]) if bad[0] > 4 * good[0] > 0 else (good[0] + bad[0]) // 2
    guess = middle
    if good[0] > 0 and 0 < good[1] < epsilon:
        if bad[1] < math.inf:
            power = math.log(bad[1] / good[1]) / math.log(bad[0] / good[0])
        else:
            seen = before[0] > 0 and 0 < before[1] < good[1]
            power = math.log(good[1] / before[1]) / math.log(good[0] / before[0]) if seen else 0.5
        reach = math.log(epsilon / good[1]) / max(power, 0.05)
        guess = int(good[0] * math.exp(min(reach, math.log(16))))
        if turn % 4 == 3 and bad[1] < math.inf:  # noqa: PLR2004  a secant may creep up from one side
            guess = middle
    elif good[0] == 0 and bad[1] < math.inf:
        guess = min(int(bad[0] * (epsilon / bad[1]) ** 1.4), bad[0] // 2)
    elif bad[1] == math.inf:
        guess = 16 * max(good[0], 1)
    return min(max(guess, good[0] + 1), max(bad[0] - 1, good[0] + 1))
