"""Randomised response on a bit: how often it lies, and what many of them cost the person they belong to. Floor 2.

A label is released by flipping it with chance p = 1 / (1 + exp(epsilon)); that is (epsilon, 0)-private for the label.
An annotator who gave k labels is described by all of them together. The worst two data sets differ in each of her k
labels, and the loss of the composition is then epsilon (k - 2 B), B ~ Binomial(k, p): an exact, discrete distribution,
which `composed_response` turns into epsilon at a delta without rounding to a grid.

dp-accounting's ``PLDAccountant`` (0.6.0) composes a ``RandomizedResponseDpEvent`` once whatever count it is given; so
it is not used here. Labels of different epsilons are composed from its privacy loss distributions themselves.

Everything here is a pure function of numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_audit_nb.config import MIN_DELTA
from rlhf_audit_nb.errors import PrivacyError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    _Array = npt.NDArray[np.float64]

__all__ = ["MAX_LABELS", "composed_response", "flip_probability", "label_epsilon", "response_for"]

MAX_LABELS = 1_000_000
"""How many labels of one annotator are composed at most."""

_MAX_EPSILON = 100.0  # per label; exp(-100) is no chance that anybody could tell from none
_ROUNDING = 1e-9  # what float64 may lose in a binomial of a million, many times over
_GRID = 1e-4
_FINE_GRID = 1e-5
_TURNS = 60


def flip_probability(epsilon: float) -> float:
    """The chance 1 / (1 + exp(epsilon)) with which a bit is flipped so that it is ``epsilon``-private.

    Raises:
        PrivacyError: epsilon is not a number above 0.
    """
    return 1.0 / (1.0 + math.exp(_checked(epsilon)))


def composed_response(epsilon: float, count: int, delta: float) -> float:
    """What ``count`` labels of one annotator, each released with ``epsilon``, cost her at ``delta``: exact.

    Never more than ``count * epsilon``, and never less than the truth (it is rounded up by 1e-9 of itself).

    Args:
        epsilon: of each single label (> 0).
        count: how many labels she gave (0 to a million).
        delta: in (1e-10, 1), or 0 for the pure bound ``count * epsilon``.

    Raises:
        PrivacyError: a number outside these ranges.
    """
    epsilon, count = _checked(epsilon), _checked_count(count)
    _check_delta(delta)
    if count == 0:
        return 0.0
    if delta == 0:
        return count * epsilon
    losses, mass, other = _response_losses(epsilon, count)
    return min(_least_epsilon(losses, mass, other, delta) * (1 + _ROUNDING), count * epsilon)


def label_epsilon(epsilons: Sequence[float], delta: float) -> float:
    """What labels released with ``epsilons`` (one for each label of the annotator) cost her at ``delta``.

    Exact where all are equal; otherwise the upper bound of a privacy loss distribution on a grid of 1e-4 (1e-5 where
    it is below 0.1).

    Raises:
        PrivacyError: a number outside of the ranges that `composed_response` names.
    """
    counts = Counter(_checked(epsilon) for epsilon in epsilons)
    if len(counts) <= 1:
        return composed_response(*next(iter(counts.items())), delta) if counts else 0.0
    _checked_count(len(epsilons))
    _check_delta(delta)
    most = math.fsum(epsilons)
    if delta == 0:
        return most
    bound = _on_grid(counts, delta, _GRID)
    return min(bound if bound >= 0.1 else _on_grid(counts, delta, _FINE_GRID), most)  # noqa: PLR2004


def response_for(total: float, count: int, delta: float) -> float:
    """The largest epsilon of each of ``count`` labels whose composition costs the annotator at most ``total``.

    Rounded down (to about 1e-9 of itself), so that `composed_response` of it stays within ``total``.

    Raises:
        PrivacyError: a number outside of the ranges that `composed_response` names; ``count`` is 0.
    """
    total = _checked(total)
    if _checked_count(count) == 0:
        raise PrivacyError("There is no label to share the budget among.", code="labels")
    low, high = total / count, min(total, _MAX_EPSILON)
    if composed_response(high, count, delta) <= total:
        return high
    for _ in range(_TURNS):
        middle = (low + high) / 2
        low, high = (middle, high) if composed_response(middle, count, delta) <= total else (low, middle)
    return low


def _checked(epsilon: float) -> float:
    if not (math.isfinite(epsilon) and 0 < epsilon <= _MAX_EPSILON):
        raise PrivacyError(
            f"An epsilon of {epsilon!r} is not one that randomised response can have.",
            next_step=f"Write a number above 0 and at most {_MAX_EPSILON:g}, such as 1.0.",
            code="epsilon",
        )
    return float(epsilon)


def _checked_count(count: int) -> int:
    if not 0 <= count <= MAX_LABELS:
        raise PrivacyError(
            f"{count!r} labels of one annotator cannot be composed; it must be 0 to {MAX_LABELS:,}.", code="labels"
        )
    return count


def _check_delta(delta: float) -> None:
    if delta != 0 and not MIN_DELTA < delta < 1:
        raise PrivacyError(
            f"delta is {delta!r}; it must lie between 1e-10 and 1 (both excluded), or be 0.",
            next_step="Write delta=1e-5, or less than 1 / number of annotators.",
            code="delta",
        )


def _response_losses(epsilon: float, count: int) -> tuple[_Array, _Array, _Array]:
    """The losses in falling order, and the logarithms of their chances under the one data set and under the other."""
    import numpy as np
    from scipy.special import gammaln

    flips = np.arange(count + 1, dtype=np.float64)
    ways = gammaln(count + 1) - gammaln(flips + 1) - gammaln(count - flips + 1)
    kept = -math.log1p(math.exp(-epsilon))  # log(1 - p); log(p) is that less epsilon
    mass = ways + count * kept - flips * epsilon
    return epsilon * (count - 2 * flips), mass, mass[::-1]


def _least_epsilon(losses: _Array, mass: _Array, other: _Array, delta: float) -> float:
    """The epsilon at which the sum over losses above it of (mass - exp(epsilon) other) is delta: exact.

    Between two losses that sum is linear in exp(epsilon), so that it is solved and not searched.
    """
    import numpy as np

    above, other_above = np.logaddexp.accumulate(mass), np.logaddexp.accumulate(other)
    # The divergence at each loss itself, which only the losses above it enter.
    at_loss = np.exp(above[:-1]) - np.exp(np.minimum(other_above[:-1] + losses[1:], 700.0))
    over = np.nonzero(at_loss > delta)[0]
    reached = int(over[0]) if over.size else len(losses) - 1
    room = math.exp(above[reached]) - delta
    return max(math.log(room) - float(other_above[reached]), 0.0) if room > 0 else 0.0


def _on_grid(counts: Counter[float], delta: float, grid: float) -> float:
    from dp_accounting.pld import common, privacy_loss_distribution

    total = privacy_loss_distribution.identity(value_discretization_interval=grid)
    for epsilon, count in sorted(counts.items()):
        # A pure epsilon is dominated by randomised response, so the two have one privacy loss distribution.
        one = privacy_loss_distribution.from_privacy_parameters(
            common.DifferentialPrivacyParameters(epsilon, 0.0), value_discretization_interval=grid
        )
        total = total.compose(one.self_compose(count))
    return max(float(total.get_epsilon_for_delta(delta)), 0.0)
