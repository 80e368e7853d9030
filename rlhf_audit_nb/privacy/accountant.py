"""What a sequence of mechanisms costs: epsilon from privacy loss distributions, with two cross-checks. Floor 2.

The mechanism is the Poisson-subsampled Gaussian under *zero-out* adjacency (a unit's data against nothing in its
place, the roster being public), which dp-accounting calls ``REPLACE_SPECIAL``; its privacy loss is that of
add-or-remove. The authority is the pessimistic (upper-bounding) privacy loss distribution of dp-accounting on a grid
of 1e-4, of 1e-5 where epsilon is below 0.1, and coarser where epsilon is in the hundreds (a coarser grid only makes
the bound looser, never wrong). Opacus' PRV and dp-accounting's RDP are computed beside it; what they cannot compute
is recorded in words, and a PRV above the authority by more than 0.02 + 0.002 epsilon is an error, since it would mean
that the authority understates.

Everything here is a pure function of numbers.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_audit_nb.errors import PrivacyError

__all__ = ["Accounted", "Mechanism", "calibrate", "compose", "composed_epsilon", "epsilon_curve", "max_steps"]

FINE_GRID = 1e-5
GRID = 1e-4
COARSE_GRID = 1e-3
MIN_NOISE_MULTIPLIER = 2.0**-6
MAX_NOISE_MULTIPLIER = 1e4
MAX_LOSS = 1e6
_CHEAP_LOSS = 1e3
_FINE_BELOW = 0.1
_PRV_MAX_EPSILON = 50.0
_PRV_MAX_STEPS = 200_000
_PRV_MAX_MECHANISMS = 16
_WIDE_SIGNAL = 25.0
_WIDE_NOISE = 0.4
_CURVE_FIRST = 16
_CURVE_REST = 40
_SIGMA_MARGIN = 1e-4
_SLACK = 1e-3  # how much of the budget a calibrated run may leave unused
_ROUGH_SLACK = 5e-4
_SLOPE = 1.2  # epsilon falls about as 1 / sigma where it is small, and faster where it is large
_MOST_TURNS = 40
_STAGED_FROM = 200_000  # steps
_SMALL_LOSS = 5e-4
_FINE_BELOW_MANY = 5.0
_TAIL = 1e-15  # dp-accounting's own

_Point = tuple[float, float]  # logarithms of the noise and of epsilon over its target
_Reached = tuple[int, float]  # steps, and what they cost


@dataclass(frozen=True, slots=True)
class Mechanism:
    """``steps`` releases of a Poisson-subsampled Gaussian mechanism of sensitivity 1 (in units of C).

    Args:
        noise_multiplier: sigma, standard deviation of the noise in units of the clipping norm (> 0).
        sampling_rate: q in (0, 1], the chance of each unit per step.
        steps: how often it ran (>= 0).

    Raises:
        PrivacyError: a number outside these ranges.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise PrivacyError(f"A noise multiplier of {self.noise_multiplier!r} gives no privacy; it must be above 0.")
        if not 0 < self.sampling_rate <= 1:
            raise PrivacyError(f"A sampling rate of {self.sampling_rate!r} is not a probability above 0.")
        if self.steps < 0:
            raise PrivacyError(f"A mechanism cannot have run {self.steps!r} times.")

    def with_steps(self, steps: int) -> Mechanism:
        """The same mechanism, run ``steps`` times."""
        return Mechanism(self.noise_multiplier, self.sampling_rate, steps)


@dataclass(frozen=True, slots=True)
class Accounted:
    """The composed cost, and what each accountant says of it.

    Attributes:
        epsilon: the authority's figure: an upper bound from the privacy loss distribution.
        prv: Opacus' PRV upper bound, or why there is none.
        rdp: dp-accounting's RDP bound, or why there is none.
        grid: the discretisation of the privacy loss that ``epsilon`` was computed with.
        notes: what a reader of these figures should know (never empty silence about a failed cross-check).
    """

    epsilon: float
    prv: float | str
    rdp: float | str
    grid: float
    notes: tuple[str, ...] = ()


def compose(mechanisms: Sequence[Mechanism], delta: float) -> Accounted:
    """The composed epsilon of all ``mechanisms`` at ``delta``, cross-checked.

    Raises:
        PrivacyError: PRV is above the authority by more than 0.02 + 0.002 epsilon.
    """
    ran = _merged(mechanisms)
    if not ran:
        return Accounted(0.0, 0.0, 0.0, GRID)
    epsilon, grid = _authority(ran, delta)
    prv = _prv(ran, delta, epsilon)
    rdp, left_out = _rdp(ran, delta)
    return Accounted(epsilon, prv, rdp, grid, (*_cross_check(epsilon, prv, rdp), *left_out))


def epsilon_curve(mechanism: Mechanism, delta: float, prior: Sequence[Mechanism] = ()) -> list[float]:
    """Composed total after 0, 1, ... ``mechanism.steps`` steps on top of ``prior``.

    It never understates: upper bounds stand on at most 57 points (the first 16 steps and 40 evenly spread), a step
    between two of them takes the later one's bound, and no point exceeds the end's own bound (epsilon cannot fall as
    steps are added). The last value is the authority's figure of the whole.
    """
    before = composed_epsilon(prior, delta)
    steps = mechanism.steps
    if steps == 0:
        return [before]
    end = composed_epsilon([*prior, mechanism], delta)
    grid = _pick_curve_grid(end)
    start = _composed(_merged(prior), grid)
    base = _base(mechanism.noise_multiplier, mechanism.sampling_rate, grid)
    curve = [before] * (steps + 1)
    reached, level, total = 0, before, start
    strides: dict[int, Any] = {}
    for point in _curve_points(steps):
        if point == steps:
            level = end
        else:
            total = total.compose(_repeated(base, point - reached, strides))
            level = min(max(level, float(total.get_epsilon_for_delta(delta))), end)
        curve[reached + 1 : point + 1] = [level] * (point - reached)
        reached = point
    return curve


def calibrate(epsilon: float, delta: float, sampling_rate: float, steps: int, prior: Sequence[Mechanism] = ()) -> float:
    """The least noise multiplier (to about a thousandth, rounded up) whose composed total stays within ``epsilon``.

    A coarse grid, where the bound is looser and a tenth as dear, says where to look; what is returned was accepted by
    the authority itself.

    Raises:
        PrivacyError: code ``no-noise-fits``: not even a noise multiplier of 10,000 stays within the budget; code
            ``too-dear``: the settings cannot be accounted for in reasonable time.
    """

    def rough(sigma: float) -> float:
        grid = COARSE_GRID if epsilon >= _FINE_BELOW else GRID
        return _on_grid(_merged([*prior, Mechanism(sigma, sampling_rate, steps)]), grid, delta)

    def cost(sigma: float) -> float:
        return composed_epsilon([*prior, Mechanism(sigma, sampling_rate, steps)], delta)

    room = max(epsilon - composed_epsilon(prior, delta), 0.05 * epsilon)
    sigma, slope = _first_guess(room, delta, sampling_rate, steps), _SLOPE
    # Where the grid is coarser than a step's own loss, the rough bound says little: then the authority's is as cheap.
    if sampling_rate * math.sqrt(math.expm1(min(1 / sigma**2, 50.0))) > COARSE_GRID:
        sigma, slope = _search(rough, epsilon, sigma, slope, _ROUGH_SLACK)
    return _search(cost, epsilon, sigma, slope, _SLACK)[0]


def max_steps(
    epsilon: float,
    delta: float,
    noise_multiplier: float,
    sampling_rate: float,
    prior: Sequence[Mechanism] = (),
    at_most: int = 100_000,
) -> int:
    """How many steps (0 to ``at_most``) of the mechanism fit into ``epsilon`` on top of ``prior``.

    The search comes from below, so that settings that cost far too much are never composed in full.
    """

    def ran(steps: int) -> list[Mechanism]:
        return [*prior, Mechanism(noise_multiplier, sampling_rate, steps)]

    def cost(steps: int) -> float:
        return composed_epsilon(ran(steps), delta) if _loss(_merged(ran(steps))) <= MAX_LOSS else math.inf

    if at_most < 1:
        return 0
    good: _Reached = (0, composed_epsilon(prior, delta))
    before, bad = good, (at_most + 1, math.inf)
    steps = at_most if _loss(_merged(ran(at_most))) <= _CHEAP_LOSS else 1
    turn = 0
    while bad[0] - good[0] > 1:
        here = (steps, cost(steps))
        if here[1] <= epsilon:
            before, good = good, here
        else:
            bad = here
        turn += 1
        steps = _next_steps(epsilon, before, good, bad, turn)
    return good[0]


def _next_steps(epsilon: float, before: _Reached, good: _Reached, bad: _Reached, turn: int) -> int:
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


# -- the authority ------------------------------------------------------------------------------------------------


def _merged(mechanisms: Sequence[Mechanism]) -> tuple[Mechanism, ...]:
    """The mechanisms with equal noise and rate added up, none of zero steps, in a fixed order."""
    steps: dict[tuple[float, float], int] = {}
    for mechanism in mechanisms:
        key = (mechanism.noise_multiplier, mechanism.sampling_rate)
        steps[key] = steps.get(key, 0) + mechanism.steps
    return tuple(Mechanism(sigma, rate, count) for (sigma, rate), count in sorted(steps.items()) if count)


def composed_epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """The authority's figure alone, without cross-checks (for what was cross-checked when it was planned)."""
    ran = _merged(mechanisms)
    return _authority(ran, delta)[0] if ran else 0.0


def _authority(ran: tuple[Mechanism, ...], delta: float) -> tuple[float, float]:
    """Epsilon and the grid it was computed on: a coarse one where the loss is so wide that a fine one costs minutes.

    Raises:
        PrivacyError: code ``too-dear``.
    """
    if _loss(ran) > MAX_LOSS:
        raise PrivacyError(
            "These settings would cost an epsilon of many thousands, which protects nobody and takes minutes to "
            "compute.",
            next_step="Choose more noise (a larger noise_multiplier), a smaller sampling_rate or fewer steps.",
            code="too-dear",
        )
    if _wide(ran):
        for grid, coarse_enough_above in ((10 * COARSE_GRID, 1000.0), (COARSE_GRID, 100.0)):
            epsilon = _on_grid(ran, grid, delta)
            if epsilon > coarse_enough_above:
                return epsilon, grid
    epsilon = _on_grid(ran, GRID, delta)
    if epsilon < _FINE_BELOW or (epsilon < _FINE_BELOW_MANY and _many_small(ran)):
        return _on_grid(ran, FINE_GRID, delta), FINE_GRID
    return epsilon, GRID


def _many_small(ran: tuple[Mechanism, ...]) -> bool:
    """Whether the grid's rounding of each step's loss adds up to percents: very many steps, each of next to no loss."""
    return any(item.steps >= _STAGED_FROM and item.sampling_rate < _SMALL_LOSS * item.noise_multiplier for item in ran)


def _loss(ran: tuple[Mechanism, ...]) -> float:
    """About twice the epsilon to come, from above: memory and time grow with it."""
    return sum(
        (1 + item.steps * (item.sampling_rate if item.noise_multiplier < 1 else item.sampling_rate**2))
        / item.noise_multiplier
        / item.noise_multiplier
        for item in ran
    )


def _wide(ran: tuple[Mechanism, ...]) -> bool:
    """Whether epsilon may be in the hundreds (a guess that only decides what is tried first)."""
    signal = sum(item.steps * (item.sampling_rate / item.noise_multiplier) ** 2 for item in ran)
    return signal > _WIDE_SIGNAL or any(item.noise_multiplier < _WIDE_NOISE for item in ran)


@functools.lru_cache(maxsize=512)
def _on_grid(ran: tuple[Mechanism, ...], grid: float, delta: float) -> float:
    return max(float(_composed(ran, grid).get_epsilon_for_delta(delta)), 0.0)


@functools.lru_cache(maxsize=8)
def _base(noise_multiplier: float, sampling_rate: float, grid: float) -> Any:
    """The privacy loss distribution of one step."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier,
        value_discretization_interval=grid,
        sampling_prob=sampling_rate,
        neighboring_relation=NeighboringRelation.REPLACE_SPECIAL,
    )


@functools.lru_cache(maxsize=8)
def _composed(ran: tuple[Mechanism, ...], grid: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    total = privacy_loss_distribution.identity(value_discretization_interval=grid)
    for mechanism in ran:
        base = _base(mechanism.noise_multiplier, mechanism.sampling_rate, grid)
        total = total.compose(_self_composed(base, mechanism.steps))
    return total


def _self_composed(base: Any, steps: int) -> Any:
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


def _repeated(base: Any, count: int, known: dict[int, Any]) -> Any:
    """``base`` composed with itself ``count`` times, each count computed once."""
    if count not in known:
        known[count] = _self_composed(base, count)
    return known[count]


def _pick_curve_grid(end: float) -> float:
    """A grid ten times coarser than the authority's: still an upper bound, a tenth of the time."""
    if end < _FINE_BELOW:
        return GRID
    return COARSE_GRID if end <= 100 else 10 * COARSE_GRID  # noqa: PLR2004


def _curve_points(steps: int) -> list[int]:
    """About 56 step counts, rising, the last being ``steps``: each of the first 16, then evenly spread ones."""
    first = min(steps, _CURVE_FIRST)
    stride = max(1, math.ceil((steps - first) / _CURVE_REST))
    return [*range(1, first + 1), *range(first + stride, steps, stride), *([steps] if steps > first else [])]


# -- searching ----------------------------------------------------------------------------------------------------


def _first_guess(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The noise multiplier by the central limit: mu = q sqrt(T (exp(1 / sigma^2) - 1)); only where a search begins."""

    def exceeded(mu: float) -> float:
        upper, lower = epsilon / mu - mu / 2, epsilon / mu + mu / 2
        return _tail(upper) - math.exp(min(epsilon, 700.0)) * _tail(lower)

    low, high = 1e-6, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if exceeded(middle) > delta else (middle, high)
    sigma = 1 / math.sqrt(math.log1p(low**2 / (sampling_rate**2 * max(steps, 1))))
    return min(max(sigma, MIN_NOISE_MULTIPLIER), MAX_NOISE_MULTIPLIER)


def _tail(value: float) -> float:
    return 0.5 * math.erfc(value / math.sqrt(2))


def _search(
    cost: Callable[[float], float], epsilon: float, sigma: float, slope: float, slack: float
) -> tuple[float, float]:
    """The least noise multiplier that fits, to ``slack`` of epsilon, and how steeply ``cost`` falls there.

    Secants between the logarithms of both, kept within what is known: ``low`` does not fit, ``high`` does.
    """
    low: _Point | None = None
    high: _Point | None = None
    for turn in range(_MOST_TURNS):
        here = (math.log(sigma), math.log(max(cost(sigma), 1e-12) / epsilon))
        if here[1] <= 0:
            high = here
            if here[1] >= math.log1p(-slack) or sigma <= MIN_NOISE_MULTIPLIER:
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
        sigma = min(max(sigma, MIN_NOISE_MULTIPLIER), MAX_NOISE_MULTIPLIER)
    if high is None:  # for the type checker; far fewer turns reach the largest noise
        raise PrivacyError("The search for a noise multiplier did not end.", code="no-noise-fits")
    return math.exp(high[0]), slope


def _next_noise(here: _Point, low: _Point | None, high: _Point | None, slope: float, slack: float, turn: int) -> float:
    aim = math.log1p(-slack / 2)
    if low is None or high is None:
        # Steps grow until both sides are known: what was spent before may leave no noise that fits.
        least = math.ldexp(0.02, turn)
        step = max((here[1] - aim) / slope, least) if low is not None else min((here[1] - aim) / slope, -least)
        return here[0] + min(max(step, -math.log(4)), math.log(4))
    middle = (low[0] + high[0]) / 2
    if turn % 4 == 3:  # noqa: PLR2004  a secant may creep up from one side; now and then the interval is halved
        return middle
    share = (low[1] - aim) / (low[1] - high[1])
    return low[0] + min(max(share, 0.02), 0.98) * (high[0] - low[0])


# -- the cross-checks ---------------------------------------------------------------------------------------------


def _attempt(work: Callable[[], float]) -> float | str:
    """The figure, or why there is none: a cross-check that fails is recorded, and never takes the authority's place."""
    try:
        value = float(work())
    except (ArithmeticError, MemoryError, ValueError, RuntimeError) as error:
        return f"failed: {type(error).__name__}: {str(error)[:120]}"
    return value if math.isfinite(value) else f"failed: returned {value}"


def _rdp(ran: tuple[Mechanism, ...], delta: float) -> tuple[float | str, tuple[str, ...]]:
    """dp-accounting's RDP bound, and a note where it left out orders that did not converge (which loosens it)."""
    left_out = 0

    def work() -> float:
        nonlocal left_out
        value, left_out = _dp_accounting_rdp(ran, delta)
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


def _prv(ran: tuple[Mechanism, ...], delta: float, epsilon: float) -> float | str:
    """Opacus' upper bound, where it can be had in seconds and without gigabytes."""
    steps = sum(mechanism.steps for mechanism in ran)
    if epsilon > _PRV_MAX_EPSILON or steps > _PRV_MAX_STEPS or len(ran) > _PRV_MAX_MECHANISMS:
        return "not computed: the accountant needs gigabytes of memory or minutes for such settings"
    return _attempt(lambda: _opacus_prv(ran, delta))


@functools.lru_cache(maxsize=64)
def _opacus_prv(ran: tuple[Mechanism, ...], delta: float) -> float:
    import warnings

    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(item.noise_multiplier, item.sampling_rate, item.steps) for item in ran]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta))


def _cross_check(epsilon: float, prv: float | str, rdp: float | str) -> tuple[str, ...]:
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
