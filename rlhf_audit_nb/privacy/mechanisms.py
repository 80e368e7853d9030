"""What ran: releases of a sampled Gaussian mechanism, as numbers that can be composed; and promises. Floor 2.

One release samples the rows of everybody, clips what each sampled row contributes to C, adds the contributions up and
adds N(0, (sigma C)^2) to every coordinate. What a *unit* costs depends on how many rows of it are drawn and clipped
one by one:

``pairs = 1``
    the unit is drawn as a whole with chance q and its whole contribution is clipped once: the Poisson-subsampled
    Gaussian. How much data the unit holds does not enter.
``pairs = k``
    each of at most k pairs of the unit is drawn with chance q, independently, and clipped alone. With j of them in the
    sum the unit moves it by up to j C, and j is Binomial(k, q): a mixture of Gaussians (Charles et al. 2024,
    arXiv:2407.07737; the reduction to one dimension is Corollary 4.7 of arXiv:2310.15526).

Neighbouring data sets differ by *zero-out*: the data of one unit against nothing in its place, where the roster of
units is public. One of the two contributes to the sum and the other does not, so the loss is that of add-or-remove,
in both directions.

Of what has yet to run it may be known only that it will be (epsilon, delta)-DP: a `Guarantee`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlhf_audit_nb.config import MAX_SAMPLED_PAIRS, MIN_DELTA
from rlhf_audit_nb.errors import PrivacyError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["MAX_PAIRS", "Composable", "Guarantee", "Mechanism", "check_delta", "drawn_pairs", "merged"]

MAX_PAIRS = MAX_SAMPLED_PAIRS

_UNDRAWN = 1e-20  # chance, per step, of so many pairs that they are counted as a certain failure instead


@dataclass(frozen=True, slots=True)
class Mechanism:
    """``steps`` releases of a Poisson-subsampled Gaussian mechanism of sensitivity 1 (in units of C).

    Args:
        noise_multiplier: sigma, standard deviation of the noise in units of the clipping norm (> 0).
        sampling_rate: q in (0, 1], the chance per step of each unit, or of each pair where ``pairs`` is above 1.
        steps: how often it ran (>= 0).
        pairs: how many separately sampled and separately clipped rows one unit has (1 to 1,000); 1 is the plain
            mechanism, whose unit is drawn and clipped as a whole.

    Raises:
        PrivacyError: a number outside these ranges.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int
    pairs: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise PrivacyError(f"A noise multiplier of {self.noise_multiplier!r} gives no privacy; it must be above 0.")
        if not 0 < self.sampling_rate <= 1:
            raise PrivacyError(f"A sampling rate of {self.sampling_rate!r} is not a probability above 0.")
        if self.steps < 0:
            raise PrivacyError(f"A mechanism cannot have run {self.steps!r} times.")
        if not 1 <= self.pairs <= MAX_PAIRS:
            raise PrivacyError(
                f"{self.pairs!r} separately sampled pairs of one unit cannot be accounted for; 1 to {MAX_PAIRS} can.",
                next_step="Sample whole units, or keep fewer pairs of each.",
                code="pairs",
            )

    def with_steps(self, steps: int) -> Mechanism:
        """The same mechanism, run ``steps`` times."""
        return replace(self, steps=steps)

    @property
    def contribution(self) -> float:
        """The mean square of what one unit adds to a step's sum, in units of C squared, at most."""
        mean = self.sampling_rate * self.pairs
        return mean * (1 - self.sampling_rate) + mean**2


@dataclass(frozen=True, slots=True)
class Guarantee:
    """``steps`` mechanisms of which nothing is known but that each is (``epsilon``, ``delta``)-DP.

    Each is composed as the one pair of outputs that dominates every such mechanism, in both directions (Kairouz, Oh
    and Viswanath 2015, arXiv:1311.0776): much looser than the mechanism itself, which may be chosen later.

    Args:
        epsilon: above 0.
        delta: in (1e-10, 1).
        steps: how many (>= 0).

    Raises:
        PrivacyError: a number outside these ranges.
    """

    epsilon: float
    delta: float
    steps: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise PrivacyError(f"An epsilon of {self.epsilon!r} cannot be promised; it must be a number above 0.")
        check_delta(self.delta)
        if self.steps < 0:
            raise PrivacyError(f"A promise cannot be given {self.steps!r} times.")

    def with_steps(self, steps: int) -> Guarantee:
        """The same promise, given ``steps`` times."""
        return replace(self, steps=steps)


Composable = Mechanism | Guarantee
"""What can be composed."""


def merged(mechanisms: Sequence[Composable]) -> tuple[Composable, ...]:
    """Those that differ in nothing but their steps added up, none of zero steps, in a fixed order."""
    steps: dict[tuple[float, float, int], int] = {}
    promised: dict[tuple[float, float], int] = {}
    for item in mechanisms:
        if isinstance(item, Guarantee):
            promised[item.epsilon, item.delta] = promised.get((item.epsilon, item.delta), 0) + item.steps
        else:
            key = (item.noise_multiplier, item.sampling_rate, item.pairs)
            steps[key] = steps.get(key, 0) + item.steps
    ran = [Mechanism(sigma, rate, count, pairs) for (sigma, rate, pairs), count in sorted(steps.items()) if count]
    return (*ran, *(Guarantee(*promise, count) for promise, count in sorted(promised.items()) if count))


def check_delta(delta: float) -> None:
    """Refuse a delta for which no accountant's figure can be trusted.

    Raises:
        PrivacyError: it is not in (1e-10, 1). Below that, what float64 loses in a composition is as large as delta.
    """
    if not MIN_DELTA < delta < 1:
        raise PrivacyError(
            f"delta is {delta!r}; it must lie between 1e-10 and 1 (both excluded).",
            next_step="Write delta=1e-5, or less than 1 / number of units.",
            code="delta",
        )


@functools.lru_cache(maxsize=64)
def drawn_pairs(sampling_rate: float, pairs: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float]:
    """How many of a unit's ``pairs`` are in a sample, and with what chances: Binomial(pairs, sampling_rate).

    Returns:
        The counts j, rising; their chances; and the chance, below 1e-20, of the largest counts, which are left out so
        that a unit of very many pairs does not make the loss endless. Who composes must count it as a failure.
    """
    import numpy as np
    from scipy.stats import binom

    counts = np.arange(pairs + 1, dtype=np.float64)
    chances = binom.pmf(counts, pairs, sampling_rate)
    beyond = binom.sf(counts, pairs, sampling_rate)
    last = int(np.argmax(beyond <= _UNDRAWN))
    kept = (counts <= last) & (chances > 0)
    return counts[kept], chances[kept], float(beyond[last])
