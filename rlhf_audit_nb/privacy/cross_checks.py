"""The same spend by accountants that share nothing with the authority. Floor 2.

Opacus' PRV and dp-accounting's RDP for the plain mechanism. Neither has a mixture of Gaussians, which pair sampling
is: there PRV is left out in words, and the Renyi divergences are integrated here (the integrands are sums of Gaussians
or nearly so, for which the trapezoidal rule is exact to float64) and converted by dp-accounting.

What cannot be computed is recorded in words: PRV fails with an infinite epsilon, with ``MemoryError`` and with
minutes of work where epsilon or the steps are many; RDP leaves out orders that do not converge. A PRV *above* the
authority by more than 0.02 + 0.002 epsilon is an error, since it would mean that the authority understates. A bound
that is below it only means that the authority is the looser one there, and is said in a note.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rlhf_audit_nb.errors import PrivacyError
from rlhf_audit_nb.privacy.mechanisms import Composable, Mechanism

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


__all__ = ["compare", "prv", "rdp", "renyi_divergences"]

_PRV_MAX_EPSILON = 50.0
_PRV_MAX_STEPS = 200_000
_PRV_MAX_MECHANISMS = 16
_PRV_MANY_POINTS = 1.5e6
_PRV_ERROR = 0.01
_ORDERS = (*(1 + tenth / 10 for tenth in range(1, 100)), *range(11, 65), 128, 256)
_RENYI_MOST = 6_000_000
_DEVIATIONS = 12.0
_PROMISED = "not computed: a part was only promised to be (epsilon, delta)-DP, which this accountant cannot compose"
_NO_MIXTURE = "not computed: Opacus' PRV accountant has no mixture of Gaussians, which sampling pairs one by one is"


def _attempt(work: Callable[[], float]) -> float | str:
    """The figure, or why there is none: a cross-check that fails is recorded, and never takes the authority's place."""
    try:
        value = float(work())
    except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        return f"failed: {type(error).__name__}: {str(error)[:120]}"
    return value if math.isfinite(value) else f"failed: returned {value}"


def rdp(ran: tuple[Composable, ...], delta: float) -> tuple[float | str, tuple[str, ...]]:
    """An RDP bound, and a note where orders that did not converge were left out (which loosens it)."""
    left_out = 0
    sampled = _sampled(ran)
    if sampled is None:
        return _PROMISED, ()

    def work() -> float:
        nonlocal left_out
        if any(item.pairs > 1 for item in sampled):
            return _integrated_rdp(sampled, delta)
        value, left_out = _dp_accounting_rdp(sampled, delta)
        return value

    value = _attempt(work)
    if not left_out:
        return value, ()
    return value, (f"RDP cross-check: {left_out} orders did not converge and were left out, so it is looser",)


class _Counter(logging.Filter):
    """Counts the accountant's own warnings instead of printing dozens of lines."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def filter(self, _record: logging.LogRecord) -> bool:
        self.seen += 1
        return False


@functools.lru_cache(maxsize=64)
def _dp_accounting_rdp(ran: tuple[Mechanism, ...], delta: float) -> tuple[float, int]:
    """The bound, and how many orders were left out."""
    import dp_accounting
    from dp_accounting import rdp

    counter = _Counter()
    logger = logging.getLogger("absl")
    logger.addFilter(counter)
    try:
        accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
        for mechanism in ran:
            gaussian = dp_accounting.GaussianDpEvent(mechanism.noise_multiplier)
            accountant.compose(dp_accounting.PoissonSampledDpEvent(mechanism.sampling_rate, gaussian), mechanism.steps)
        return float(accountant.get_epsilon(delta)), counter.seen
    finally:
        logger.removeFilter(counter)


@functools.lru_cache(maxsize=64)
def _integrated_rdp(ran: tuple[Mechanism, ...], delta: float) -> float:
    import numpy as np
    from dp_accounting.rdp import compute_epsilon

    orders = [order for order in _ORDERS if all(_renyi_work(item, order) <= _RENYI_MOST for item in ran)]
    if not orders:
        raise ValueError("the integral over so many pairs at so little noise takes minutes")
    total = sum(
        item.steps * renyi_divergences(item.noise_multiplier, item.sampling_rate, item.pairs, orders) for item in ran
    )
    return float(compute_epsilon(np.asarray(orders), total, delta)[0])


def _renyi_work(item: Mechanism, order: float) -> float:
    """How many terms the integral has whose largest order is ``order``."""
    reach, step = _renyi_line(item.noise_multiplier, item.pairs, order)
    return 2 * reach / step * (item.pairs + 1)


def _renyi_line(sigma: float, pairs: int, order: float) -> tuple[float, float]:
    """How far the integrand reaches to both sides, and how finely it must be seen."""
    return order * pairs + _DEVIATIONS * sigma, min(0.1 * sigma, 0.25 * sigma**2 / pairs)


def renyi_divergences(sigma: float, rate: float, pairs: int, orders: Sequence[float]) -> npt.NDArray[np.float64]:
    """The Renyi divergence of one step at each of ``orders`` (above 1), in the direction in which it is larger.

    Integrated numerically over the one dimension that the mechanism has at worst.
    """
    import numpy as np
    from scipy.special import logsumexp
    from scipy.stats import binom

    counts = np.arange(pairs + 1, dtype=np.float64)
    chances = binom.logpmf(counts, pairs, rate)
    counts, chances = counts[np.isfinite(chances)], chances[np.isfinite(chances)]
    reach, step = _renyi_line(sigma, pairs, max(orders))
    x = np.linspace(-reach, reach, int(2 * reach / step) + 2)
    loss = np.full_like(x, -np.inf)
    for count, chance in zip(counts, chances, strict=True):
        np.logaddexp(loss, chance - (2 * count * x + count**2) / (2 * sigma**2), out=loss)
    weight = -(x**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi)) + math.log(x[1] - x[0])
    found = []
    for order in orders:
        remove, add = logsumexp(order * loss + weight), logsumexp((1 - order) * loss + weight)
        found.append(max(remove, add, 0.0) / (order - 1))
    return np.asarray(found)


def _sampled(ran: tuple[Composable, ...]) -> tuple[Mechanism, ...] | None:
    """What ran; ``None`` where a part of it was only promised."""
    sampled = tuple(item for item in ran if isinstance(item, Mechanism))
    return sampled if len(sampled) == len(ran) else None


def prv(ran: tuple[Composable, ...], delta: float, epsilon: float) -> float | str:
    """Opacus' upper bound, where it can be had in seconds and without gigabytes."""
    sampled = _sampled(ran)
    if sampled is None:
        return _PROMISED
    if any(item.pairs > 1 for item in sampled):
        return _NO_MIXTURE
    steps = sum(item.steps for item in sampled)
    if epsilon > _PRV_MAX_EPSILON or steps > _PRV_MAX_STEPS or len(sampled) > _PRV_MAX_MECHANISMS:
        return "not computed: the accountant needs gigabytes of memory or minutes for such settings"
    # The accountant's own choice of its grid, about: where that has millions of points, half as many are asked for,
    # which leaves the bound up to 0.02 above the truth instead of 0.01.
    mesh = _PRV_ERROR / math.sqrt(steps * math.log(12_000 / delta) / 2)
    many = 2 * (1.3 * epsilon + 3) / mesh > _PRV_MANY_POINTS
    return _attempt(lambda: _opacus_prv(sampled, delta, 2 * _PRV_ERROR if many else _PRV_ERROR))


@functools.lru_cache(maxsize=64)
def _opacus_prv(ran: tuple[Mechanism, ...], delta: float, error: float) -> float:
    import warnings

    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(item.noise_multiplier, item.sampling_rate, item.steps) for item in ran]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta, eps_error=error))


def compare(epsilon: float, prv: float | str, rdp: float | str) -> tuple[str, ...]:
    """What a reader should know of how the cross-checks stand to the authority's ``epsilon``.

    Raises:
        PrivacyError: code ``accountants-disagree``: PRV is above it by more than 0.02 + 0.002 epsilon.
    """
    notes = []
    tolerance = 0.02 + 0.002 * epsilon
    if isinstance(prv, str):
        notes.append(f"PRV cross-check: {prv}")
    elif prv - epsilon > tolerance:
        raise PrivacyError(
            f"Two accountants disagree: PRV says epsilon {prv:.4f}, the privacy loss distribution {epsilon:.4f}.",
            next_step="Choose other settings (noise multiplier, sampling rate, steps) and report these.",
            code="accountants-disagree",
        )
    elif epsilon - prv > tolerance:
        notes.append(f"PRV cross-check: {prv:.4f} is below the figure used by more than {tolerance:.4f}")
    if isinstance(rdp, str):
        notes.append(f"RDP cross-check: {rdp}")
    elif epsilon > rdp + tolerance:
        notes.append(f"RDP cross-check: {rdp:.4f} is below the figure used by more than {tolerance:.4f}")
    return tuple(notes)
