"""What an attack shows: lower bounds on epsilon from guesses about canaries, in one run. Floor 2.

Each of m canaries is in the data with chance 1/2, independently. An attacker who sees what was released guesses of r
of them whether they are in, and is right v times. If the mechanism is (epsilon, delta)-DP, so many right guesses are
unlikely for a small epsilon; the largest epsilon that is rejected at the chosen confidence is a lower bound on the true
one.

`epsilon_bound` makes no assumption on the mechanism: Steinke, Nasr and Jagielski, "Privacy auditing with one (1)
training run", 2023 (arXiv 2305.08846), Theorem 5.2. `gaussian_bound` is tighter and assumes that the mechanism's
trade-off function is that of a Gaussian mechanism: Mahloujifar, Melis and Chaudhuri, "Auditing f-differential privacy
in one run", 2024 (arXiv 2410.22235).

A low bound is no proof of privacy: it says what *this* attack found. With m canaries no bound can exceed `ceiling`.
Everything here is a pure function of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_audit_nb.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "CONFIDENCE",
    "SHARES",
    "LowerBound",
    "bound_from_scores",
    "ceiling",
    "claim_p_value",
    "epsilon_bound",
    "gaussian_bound",
    "gaussian_epsilon",
    "p_value",
]

CONFIDENCE = 0.95
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Which shares of the canaries are guessed about: fixed before anything is seen, and paid for by Bonferroni."""

_MOST_EPSILON = 60.0
_MOST_MU = 40.0
_TURNS = 50
_SMALL = 1e-9
_LEAST_CANARIES = 2


@dataclass(frozen=True, kw_only=True)
class LowerBound:
    """What the guesses show.

    Attributes:
        epsilon: the lower bound at ``confidence`` and ``delta``, whatever the mechanism is.
        gaussian: the same under the assumption that the mechanism is a Gaussian one.
        delta: of the bound.
        confidence: the chance that a bound made this way is not above the true epsilon.
        canaries: m.
        guesses: r, of the share of canaries that gave the best bound.
        right: v of them.
        ceiling: the bound that all right guesses would have given.
    """

    epsilon: float
    gaussian: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    right: int
    ceiling: float


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """At most the chance of ``right`` or more right guesses of ``guesses`` if the mechanism is (epsilon, delta)-DP.

    Raises:
        ConfigError: counts that cannot be.
    """
    import numpy as np
    from scipy import stats

    _check_counts(canaries, guesses, right)
    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(right - 1, guesses, chance))
    if delta == 0 or right == 0:
        return min(tail, 1.0)
    below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, chance))
    slope = float((below / np.arange(1, right + 1)).max())
    return min(tail + 2 * canaries * delta * slope, 1.0)


def epsilon_bound(canaries: int, guesses: int, right: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The largest epsilon that so many right guesses reject; 0 where they reject none.

    Raises:
        ConfigError: counts that cannot be, or a confidence outside (0, 1).
    """
    level = _level(confidence)
    return _largest(lambda epsilon: p_value(canaries, guesses, right, epsilon, delta) <= level, _MOST_EPSILON)


def gaussian_bound(canaries: int, guesses: int, right: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The same, if the mechanism is mu-GDP for some mu: the epsilon at ``delta`` of the largest mu that is rejected.

    Raises:
        ConfigError: counts that cannot be, or a confidence outside (0, 1).
    """
    _check_counts(canaries, guesses, right)
    level = _level(confidence)
    mu = _largest(lambda mu: _gaussian_rejected(mu, canaries, guesses, right, level), _MOST_MU)
    return gaussian_epsilon(mu, delta)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The exact epsilon at ``delta`` of one Gaussian mechanism of sensitivity ``mu`` and standard deviation 1."""
    from scipy.special import log_ndtr, ndtr

    def exceeded(epsilon: float) -> bool:
        loss = float(ndtr(mu / 2 - epsilon / mu)) - math.exp(epsilon + float(log_ndtr(-mu / 2 - epsilon / mu)))
        return loss > delta

    return _largest(exceeded, 1e4) if mu > 0 else 0.0


def ceiling(canaries: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The bound if all guesses were right: no audit with so many canaries can show more."""
    return epsilon_bound(canaries, canaries, canaries, delta, confidence)


def bound_from_scores(
    scores: npt.NDArray[np.float64], included: npt.NDArray[np.bool_], delta: float, confidence: float = CONFIDENCE
) -> LowerBound:
    """The best bound over `SHARES`: the highest scores are guessed to be in, as many of the lowest to be out.

    Args:
        scores: one for each canary; high where it looks included.
        included: which ones were.
        delta: of the bound.
        confidence: of the bound, all shares together.

    Raises:
        ConfigError: fewer than two canaries, or not one bit for each score, or scores that are not finite.
    """
    found, count = _guesses(scores, included), len(scores)
    each = 1 - (1 - confidence) / len(SHARES)
    bounds = [epsilon_bound(count, guesses, right, delta, each) for guesses, right in found]
    best = max(range(len(SHARES)), key=lambda at: (bounds[at], found[at][1]))
    return LowerBound(
        epsilon=bounds[best],
        gaussian=max(gaussian_bound(count, guesses, right, delta, each) for guesses, right in found),
        delta=delta,
        confidence=confidence,
        canaries=count,
        guesses=found[best][0],
        right=found[best][1],
        ceiling=ceiling(count, delta, each),
    )


def claim_p_value(
    scores: npt.NDArray[np.float64], included: npt.NDArray[np.bool_], epsilon: float, delta: float
) -> float:
    """At most the chance of guesses so good, or better, if the mechanism is (epsilon, delta)-DP; all `SHARES` together.

    Raises:
        ConfigError: as `bound_from_scores`.
    """
    found = _guesses(scores, included)
    values = [p_value(len(scores), guesses, right, epsilon, delta) for guesses, right in found]
    return min(1.0, len(SHARES) * min(values))


def _guesses(scores: npt.NDArray[np.float64], included: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """For each share how many guesses were made and how many were right."""
    import numpy as np

    if len(scores) < _LEAST_CANARIES or included.shape != scores.shape or not np.isfinite(scores).all():
        raise ConfigError("A bound takes at least two canaries, each with a finite score and a bit.", code="canaries")
    order, found = np.argsort(scores, kind="stable"), []
    for share in SHARES:
        half = max(1, int(len(order) * share / 2))
        right = int(included[order[-half:]].sum()) + int((~included[order[:half]]).sum())
        found.append((2 * half, right))
    return found


def _gaussian_rejected(mu: float, canaries: int, guesses: int, right: int, level: float) -> bool:
    """Whether mu-GDP is rejected: followed back from ``right`` guesses, its probabilities would exceed what there is.

    ``ahead`` and ``behind`` are the masses of the events that at least i guesses are right and the next one is right,
    or wrong; the trade-off function bounds the second by the first.
    """
    from scipy.special import ndtr, ndtri

    share = guesses / canaries
    ahead, behind = level * right / canaries, level * (guesses - right) / canaries
    for count in range(right - 1, -1, -1):
        least = float(ndtr(ndtri(min(ahead, 1.0)) - mu))
        more = max(behind, least)
        ahead += count / (guesses - count) * (more - behind)
        behind = more
        if ahead + behind > share:
            return True
    return False


def _largest(holds: Callable[[float], bool], most: float) -> float:
    """The largest number up to ``most`` for which ``holds`` (which holds below some point), rounded down."""
    if not holds(_SMALL):
        return 0.0
    low, high = 0.0, most
    for _ in range(_TURNS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _level(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ConfigError(f"A confidence of {confidence!r} is not between 0 and 1.", code="confidence")
    return 1 - confidence


def _check_counts(canaries: int, guesses: int, right: int) -> None:
    if not 0 <= right <= guesses <= canaries or guesses < 1:
        raise ConfigError(f"{right} right of {guesses} guesses about {canaries} canaries cannot be.", code="canaries")
