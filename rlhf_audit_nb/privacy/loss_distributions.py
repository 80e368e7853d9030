"""Privacy loss distributions: of one step, composed, and on which grid. Floor 2.

Those of the plain mechanism (``pairs = 1``) are dp-accounting's own. Those of pair sampling are built here, by
dp-accounting's "connect the dots" from the hockey-stick divergences of the mixture of Gaussians in both directions:

    remove   P = sum_j w_j N(-j, sigma^2)  against  Q = N(0, sigma^2)
    add      Q                             against  P
    loss     l(x) = ln P(x) / Q(x) = ln sum_j w_j exp(-(2 j x + j^2) / (2 sigma^2)), falling in x
    remove   divergence at e:  P(X <= c) - exp(e) Q(X <= c),    l(c) = e
    add      divergence at e:  Q(X > c) - exp(e) P(X > c),      l(c) = -e

dp-accounting has the same distribution (``from_mixture_gaussian_mechanism``), with which ours is compared in the tests;
it looks for each c by bisection in Python, which takes 20 s for 8 pairs where this takes a third of one. With
``pairs = 1`` the same construction is the plain mechanism, equal to dp-accounting's to a billionth: ``quick`` asks for
it, where a figure only guides a search and where more than four different mechanisms are composed.

All are pessimistic: what is rounded is rounded up, what is cut off counts as an infinite loss. Everything here is a
pure function of numbers.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.errors import PrivacyError
from rlhf_audit_nb.privacy.mechanisms import Composable, Guarantee, Mechanism, drawn_pairs

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    _Array = npt.NDArray[np.float64]

__all__ = [
    "COARSE_GRID",
    "FINE_BELOW",
    "FINE_GRID",
    "GRID",
    "MAX_LOSS",
    "affordable",
    "authority",
    "coarse_will_do",
    "composed",
    "curve_grid",
    "expected_loss",
    "on_grid",
    "one_step",
    "promise",
    "self_composed",
    "usual_grid",
]

FINE_GRID = 1e-5
GRID = 1e-4
COARSE_GRID = 1e-3
FINE_BELOW = 0.1
MAX_LOSS = 1e6

_WIDE_SIGNAL = 25.0
_WIDE_NOISE = 0.4
_STAGED_FROM = 200_000  # steps
_SMALL_LOSS = 5e-4
_FINE_BELOW_MANY = 5.0
_COARSE_ABOVE = 100.0
_MIXED_COARSE_ABOVE = 4.0
_MIXED_COARSE_STEPS = 2000
_TAIL = 1e-15  # dp-accounting's own
_OWN_FROM = 4  # different mechanisms; dp-accounting's own construction takes up to half a second for each
_CUT_OFF = 1e-22  # chance of a single step's losses beyond the grid
_MOST_WORK = 2.5e7  # points of a single step's grid, times the counts in its mixture
_PYTHON = 15  # what a point of dp-accounting's own takes in these terms
_CHUNK = 1 << 15
_MOST_NODES = 200_000
_NEWTON_TURNS = 60
_CLOSE = 1e-10


def authority(ran: tuple[Composable, ...], delta: float) -> tuple[float, float]:
    """Epsilon and the grid it was computed on: a coarse one where the loss is so wide that a fine one costs minutes.

    Args:
        ran: as `merged` gives them, not empty.
        delta: of the bound.

    Raises:
        PrivacyError: code ``too-dear``.
    """
    if expected_loss(ran) > MAX_LOSS:
        raise _too_dear()
    if _wide(ran):
        for wide, coarse_enough_above in ((10 * COARSE_GRID, 10 * _COARSE_ABOVE), (COARSE_GRID, _COARSE_ABOVE)):
            grid = affordable(ran, wide)
            epsilon = on_grid(ran, grid, delta)
            if epsilon > coarse_enough_above:
                return epsilon, grid
    if coarse_will_do(ran):
        epsilon = on_grid(ran, affordable(ran, COARSE_GRID), delta)
        if epsilon > _MIXED_COARSE_ABOVE:
            return epsilon, affordable(ran, COARSE_GRID)
    grid = affordable(ran, GRID)
    epsilon = on_grid(ran, grid, delta)
    small = epsilon < FINE_BELOW or (epsilon < _FINE_BELOW_MANY and _many_small(ran))
    if small and affordable(ran, FINE_GRID) < grid:
        grid = affordable(ran, FINE_GRID)
        epsilon = on_grid(ran, grid, delta)
    return epsilon, grid


def affordable(ran: tuple[Composable, ...], grid: float, *, quick: bool = False) -> float:
    """``grid``, or the next coarser one on which the losses of a single step can be tabulated in seconds."""
    while grid < 10 * COARSE_GRID and sum(_work(item, grid, quick=quick) for item in _sampled(ran)) > _MOST_WORK:
        grid *= 10
    return grid


def _work(item: Mechanism, grid: float, *, quick: bool) -> float:
    """Points of the grid, from above, times what each of them takes."""
    counts = drawn_pairs(item.sampling_rate, item.pairs)[0]
    most, sigma = float(counts[-1]), item.noise_multiplier
    reach = most * (most / 2 - sigma * _normal_quantile(_CUT_OFF)) / sigma**2
    return reach / grid * (len(counts) if quick or item.pairs > 1 else _PYTHON)


def coarse_will_do(ran: tuple[Composable, ...]) -> bool:
    """Whether a mixture is so wide and composed so seldom that the coarse grid adds less than a ten-thousandth."""
    return any(item.pairs > 1 for item in _sampled(ran)) and sum(item.steps for item in ran) <= _MIXED_COARSE_STEPS


def usual_grid(ran: tuple[Composable, ...], epsilon: float) -> float:
    """The grid on which the authority's figure stands where it comes out at about ``epsilon``."""
    if epsilon < FINE_BELOW:
        return FINE_GRID
    return COARSE_GRID if epsilon > (_MIXED_COARSE_ABOVE if coarse_will_do(ran) else _COARSE_ABOVE) else GRID


def curve_grid(end: float) -> float:
    """A grid ten times coarser than the authority's where ``end`` is epsilon: still an upper bound, a tenth as dear."""
    if end < FINE_BELOW:
        return GRID
    return COARSE_GRID if end <= _COARSE_ABOVE else 10 * COARSE_GRID


def _too_dear() -> PrivacyError:
    return PrivacyError(
        "These settings would cost an epsilon of many thousands, which protects nobody and takes minutes to compute.",
        next_step="Choose more noise (a larger noise_multiplier), a smaller sampling_rate or fewer steps.",
        code="too-dear",
    )


def _many_small(ran: tuple[Composable, ...]) -> bool:
    """Whether the grid's rounding of each step's loss adds up to percents: very many steps, each of next to no loss."""
    return any(
        item.steps >= _STAGED_FROM and item.sampling_rate * item.pairs < _SMALL_LOSS * item.noise_multiplier
        for item in _sampled(ran)
    )


def expected_loss(ran: tuple[Composable, ...]) -> float:
    """About twice the epsilon to come, from above: memory and time grow with it."""
    total = 2 * _promised(ran)
    for item in _sampled(ran):
        if item.pairs == 1:
            once, each = 1.0, item.sampling_rate if item.noise_multiplier < 1 else item.sampling_rate**2
        else:
            once, each = float(drawn_pairs(item.sampling_rate, item.pairs)[0][-1]) ** 2, item.contribution
        total += (once + item.steps * each) / item.noise_multiplier / item.noise_multiplier
    return total


def _wide(ran: tuple[Composable, ...]) -> bool:
    """Whether epsilon may be in the hundreds (a guess that only decides what is tried first)."""
    if _promised(ran) > _COARSE_ABOVE:
        return True
    sampled = _sampled(ran)
    signal = sum(item.steps * (item.sampling_rate * item.pairs / item.noise_multiplier) ** 2 for item in sampled)
    return signal > _WIDE_SIGNAL or any(item.noise_multiplier < _WIDE_NOISE * item.pairs for item in sampled)


def _sampled(ran: tuple[Composable, ...]) -> list[Mechanism]:
    """What ran, without what was only promised."""
    return [item for item in ran if isinstance(item, Mechanism)]


def _promised(ran: tuple[Composable, ...]) -> float:
    """The sum of what was only promised, which its composition does not exceed by much."""
    return sum(item.steps * item.epsilon for item in ran if isinstance(item, Guarantee))


@functools.lru_cache(maxsize=512)
def on_grid(ran: tuple[Composable, ...], grid: float, delta: float, *, quick: bool = False) -> float:
    """The upper bound that the grid gives; never below 0."""
    total = composed(ran, grid, quick=quick or len(ran) > _OWN_FROM)
    return max(float(total.get_epsilon_for_delta(delta)), 0.0)


@functools.lru_cache(maxsize=8)
def one_step(noise_multiplier: float, sampling_rate: float, pairs: int, grid: float, *, quick: bool = False) -> Any:
    """The privacy loss distribution of one step; ``quick`` takes this module's own for the plain mechanism too."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    if pairs > 1 or quick:
        return _mixture(noise_multiplier, sampling_rate, pairs, grid)
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier,
        value_discretization_interval=grid,
        sampling_prob=sampling_rate,
        neighboring_relation=NeighboringRelation.REPLACE_SPECIAL,
    )


def promise(epsilon: float, delta: float, grid: float) -> Any:
    """The privacy loss distribution that dominates every (epsilon, delta)-DP mechanism, epsilon rounded up."""
    from dp_accounting.pld import privacy_loss_distribution
    from dp_accounting.pld.common import DifferentialPrivacyParameters

    return privacy_loss_distribution.from_privacy_parameters(
        DifferentialPrivacyParameters(epsilon, delta), value_discretization_interval=grid
    )


@functools.lru_cache(maxsize=32)
def composed(ran: tuple[Composable, ...], grid: float, *, quick: bool = False) -> Any:
    """The privacy loss distribution of everything that ran.

    Composed as a tree, each node of which is kept for a while: where one of many mechanisms changes, as in a search on
    top of a long ledger, only the path to it is composed anew.
    """
    from dp_accounting.pld import privacy_loss_distribution

    nothing = privacy_loss_distribution.identity(value_discretization_interval=grid)
    if not ran:
        return nothing
    if len(ran) == 1:
        (item,) = ran
        if isinstance(item, Guarantee):
            base = promise(item.epsilon, item.delta, grid)
        else:
            base = one_step(item.noise_multiplier, item.sampling_rate, item.pairs, grid, quick=quick)
        return nothing.compose(self_composed(base, item.steps))  # as dp-accounting's accountant does it
    middle = len(ran) // 2
    one, other = (composed(half, grid, quick=quick) for half in (ran[:middle], ran[middle:]))
    return one.compose(other)


def self_composed(base: Any, steps: int) -> Any:
    """``base`` composed with itself, in two stages where the steps are very many.

    dp-accounting bounds where a composition may be cut off with moments of fixed orders, which are far too high for
    very many narrow steps: its transforms are then ten times too long. The sum of the first stage has a width for
    which they are right. What each stage cuts off counts as infinite loss, so the bound stays one.
    """
    if steps < _STAGED_FROM:
        return base.self_compose(steps)
    inner = math.isqrt(steps)
    outer, rest = divmod(steps, inner)
    stage = base.self_compose(inner, tail_mass_truncation=_TAIL / outer)
    total = stage.self_compose(outer)
    return total.compose(base.self_compose(rest)) if rest else total


# -- the mixture of Gaussians -------------------------------------------------------------------------------------


def _mixture(sigma: float, rate: float, pairs: int, grid: float) -> Any:
    from dp_accounting.pld import pld_pmf, privacy_loss_distribution

    mixture = _Mixture(sigma, rate, pairs)
    low, high = mixture.bounds()
    if (high - low) / grid * len(mixture.counts) > 2 * _MOST_WORK:
        raise _too_dear()
    pmfs = []
    for least, most, divergences in ((low, high, mixture.remove), (-high, -low, mixture.add)):
        first, last = math.floor(least / grid), math.ceil(most / grid)
        deltas = divergences(first, last, grid)
        pmfs.append(pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(grid, first, last, deltas))
    return privacy_loss_distribution.PrivacyLossDistribution(*pmfs)


class _Mixture:
    """The two outputs that the mechanism has at worst, and the divergences between them.

    Counts that are next to never drawn are left out of P, which then has a little less than all mass. Neither
    direction understates for that: what is missing is added to each divergence of P against Q, and Q against less
    than P diverges more.
    """

    def __init__(self, sigma: float, rate: float, pairs: int) -> None:
        import numpy as np

        self.sigma = sigma
        self.counts, self.chances, self.beyond = drawn_pairs(rate, pairs)
        self._slopes = self.counts / sigma**2
        self._constants = np.log(self.chances) - self.counts**2 / (2 * sigma**2)
        self._reach = -sigma * _normal_quantile(_CUT_OFF)
        most = float(self.counts[-1])
        step = min(0.05 * sigma**2 / most, 0.05 * sigma)
        self._left, self._right = -self._reach - most, self._reach + most
        nodes = int(min((self._right - self._left) / step, _MOST_NODES)) + 2
        self._nodes = np.linspace(self._left, self._right, nodes)
        self._losses = np.concatenate(
            [self._loss(part)[0] for part in np.array_split(self._nodes, nodes // _CHUNK + 1)]
        )

    def bounds(self) -> tuple[float, float]:
        """The least and the largest loss that the grid must hold; beyond them lies a mass of 1e-22 at most."""
        import numpy as np
        from scipy.special import ndtr

        mass = sum(
            chance * ndtr((self._nodes + count) / self.sigma)
            for count, chance in zip(self.counts, self.chances, strict=True)
        )
        left = max(int(np.searchsorted(mass, _CUT_OFF)) - 1, 0)
        right = int(np.searchsorted(self._nodes, self._reach))
        return float(self._losses[right]), float(self._losses[left])

    def remove(self, first: int, last: int, grid: float) -> _Array:
        """Divergences of P against Q at the grid's points from ``first`` to ``last``."""
        import numpy as np
        from scipy.special import log_ndtr, ndtr

        def divergence(losses: _Array) -> _Array:
            cut = self._where(losses)
            total = sum(
                chance * ndtr((cut + count) / self.sigma)
                for count, chance in zip(self.counts, self.chances, strict=True)
            )
            found: _Array = total + self.beyond - np.exp(losses + log_ndtr(cut / self.sigma))
            return found

        return self._falling(divergence, first, last, grid)

    def add(self, first: int, last: int, grid: float) -> _Array:
        """Divergences of Q against P, likewise."""
        import numpy as np
        from scipy.special import log_ndtr, ndtr

        def divergence(losses: _Array) -> _Array:
            cut = self._where(-losses)
            found: _Array = ndtr(-cut / self.sigma)
            for count, chance in zip(self.counts, self.chances, strict=True):
                found = found - np.exp(losses + math.log(chance) + log_ndtr(-(cut + count) / self.sigma))
            return found

        return self._falling(divergence, first, last, grid)

    def _falling(self, divergence: Any, first: int, last: int, grid: float) -> _Array:
        import numpy as np

        points = np.arange(first, last + 1, dtype=np.float64) * grid
        parts = [divergence(points[start : start + _CHUNK]) for start in range(0, points.size, _CHUNK)]
        # A divergence is at least that of everything, and falls; float64 may say otherwise in its last digits.
        deltas = np.clip(np.maximum(np.concatenate(parts), -np.expm1(np.minimum(points, 0.0))), 0.0, 1.0)
        falling: _Array = np.maximum.accumulate(deltas[::-1])[::-1]
        return falling

    def _loss(self, x: _Array) -> tuple[_Array, _Array]:
        """The loss at x, and how it changes there."""
        import numpy as np

        terms = self._constants[:, None] - self._slopes[:, None] * x
        top = terms.max(axis=0)
        np.exp(terms - top, out=terms)
        total = terms.sum(axis=0)
        return top + np.log(total), -(self._slopes @ terms) / total

    def _where(self, losses: _Array) -> _Array:
        """Where the loss is ``losses``: Newton's method on a falling convex function, from interpolated beginnings.

        Beyond the nodes, the ends: there the cut may lie anywhere without the divergence being told it apart.
        """
        import numpy as np

        x = np.interp(losses, self._losses[::-1], self._nodes[::-1])
        inside = (losses < self._losses[0]) & (losses > self._losses[-1])
        for _ in range(_NEWTON_TURNS):
            value, slope = self._loss(x)
            with np.errstate(divide="ignore", invalid="ignore"):
                step = np.where(inside & (slope < 0), (losses - value) / slope, 0.0)
            step = np.clip(step, -self.sigma, self.sigma)
            x = np.clip(x + step, self._left, self._right)
            if float(np.abs(step).max(initial=0.0)) < _CLOSE * self.sigma:
                break
        return x


def _normal_quantile(mass: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(mass))
