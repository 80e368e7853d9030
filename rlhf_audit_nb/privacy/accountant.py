"""What a sequence of mechanisms costs: epsilon from privacy loss distributions, with two cross-checks. Floor 2.

The mechanism is the Poisson-subsampled Gaussian, or its mixture where the pairs of a unit are sampled one by one
(`mechanisms`), under *zero-out* adjacency (a unit's data against nothing in its place, the roster being public), which
dp-accounting calls ``REPLACE_SPECIAL``; its privacy loss is that of add-or-remove. The authority is the pessimistic
(upper-bounding) privacy loss distribution (`loss_distributions`) on a grid of 1e-4, of 1e-5 where epsilon is below
0.1, and coarser where epsilon is in the hundreds (a coarser grid only makes the bound looser, never wrong). PRV and
RDP are computed beside it (`cross_checks`); what they cannot compute is recorded in words, and a PRV above the
authority by more than 0.02 + 0.002 epsilon is an error, since it would mean that the authority understates.

No figure is given for a delta of 1e-10 or less: there all accountants are noise. Everything here is a pure function of
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_audit_nb.privacy.cross_checks import compare, prv, rdp
from rlhf_audit_nb.privacy.loss_distributions import (
    COARSE_GRID,
    FINE_BELOW,
    GRID,
    MAX_LOSS,
    affordable,
    authority,
    composed,
    curve_grid,
    expected_loss,
    on_grid,
    one_step,
    self_composed,
    usual_grid,
)
from rlhf_audit_nb.privacy.mechanisms import Composable, Guarantee, Mechanism, check_delta, merged
from rlhf_audit_nb.privacy.noise_search import MIN_NOISE_MULTIPLIER, SLOPE, Reached, first_guess, next_steps, search

__all__ = [
    "Accounted",
    "Composable",
    "Guarantee",
    "Mechanism",
    "calibrate",
    "compose",
    "composed_epsilon",
    "epsilon_curve",
    "max_steps",
]

_CHEAP_LOSS = 1e3
_CURVE_FIRST = 16
_CURVE_REST = 40
_SLACK = 1e-3  # how much of the budget a calibrated run may leave unused
_ROUGH_SLACK = 5e-4


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


def compose(mechanisms: Sequence[Composable], delta: float) -> Accounted:
    """The composed epsilon of all ``mechanisms`` at ``delta``, cross-checked.

    Raises:
        PrivacyError: a delta of 1e-10 or less, or of 1 or more; code ``too-dear``: the settings cannot be accounted
            for in reasonable time; code ``accountants-disagree``: PRV is above the authority by more than
            0.02 + 0.002 epsilon.
    """
    check_delta(delta)
    ran = merged(mechanisms)
    if not ran:
        return Accounted(0.0, 0.0, 0.0, GRID)
    epsilon, grid = authority(ran, delta)
    by_prv = prv(ran, delta, epsilon)
    by_rdp, left_out = rdp(ran, delta)
    return Accounted(epsilon, by_prv, by_rdp, grid, (*compare(epsilon, by_prv, by_rdp), *left_out))


def composed_epsilon(mechanisms: Sequence[Composable], delta: float) -> float:
    """The authority's figure alone, without cross-checks (for what was cross-checked when it was planned).

    Raises:
        PrivacyError: a delta of 1e-10 or less, or of 1 or more; code ``too-dear``.
    """
    check_delta(delta)
    ran = merged(mechanisms)
    return authority(ran, delta)[0] if ran else 0.0


def epsilon_curve(mechanism: Mechanism, delta: float, prior: Sequence[Composable] = ()) -> list[float]:
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
    grid = affordable(merged([*prior, mechanism]), curve_grid(end), quick=True)
    start = composed(merged(prior), grid, quick=True)
    base = one_step(mechanism.noise_multiplier, mechanism.sampling_rate, mechanism.pairs, grid, quick=True)
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


def _repeated(base: Any, count: int, known: dict[int, Any]) -> Any:
    """``base`` composed with itself ``count`` times, each count computed once."""
    if count not in known:
        known[count] = self_composed(base, count)
    return known[count]


def _curve_points(steps: int) -> list[int]:
    """About 56 step counts, rising, the last being ``steps``: each of the first 16, then evenly spread ones."""
    first = min(steps, _CURVE_FIRST)
    stride = max(1, math.ceil((steps - first) / _CURVE_REST))
    return [*range(1, first + 1), *range(first + stride, steps, stride), *([steps] if steps > first else [])]


def calibrate(
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    prior: Sequence[Composable] = (),
    *,
    pairs: int = 1,
) -> float:
    """The least noise multiplier (to about a thousandth, rounded up) whose composed total stays within ``epsilon``.

    A coarse grid, where the bound is looser and a tenth as dear, says where to look, then the authority's own grid by
    a quicker construction; what is returned was accepted by the authority itself.

    Raises:
        PrivacyError: code ``no-noise-fits``: not even a noise multiplier of 10,000 stays within the budget; code
            ``too-dear``: the settings cannot be accounted for in reasonable time; a delta out of range.
    """
    check_delta(delta)
    asked = Mechanism(1.0, sampling_rate, steps, pairs)

    def with_noise(sigma: float) -> list[Composable]:
        return [*prior, replace(asked, noise_multiplier=sigma)]

    def quick(grid: float) -> Callable[[float], float]:
        def look(sigma: float) -> float:
            ran = merged(with_noise(sigma))
            return on_grid(ran, affordable(ran, grid, quick=True), delta, quick=True)

        return look

    def cost(sigma: float) -> float:
        return composed_epsilon(with_noise(sigma), delta)

    room = max(epsilon - composed_epsilon(prior, delta), 0.05 * epsilon)
    sigma, slope, least = first_guess(room, delta, asked), SLOPE, MIN_NOISE_MULTIPLIER * pairs
    own = usual_grid(merged(with_noise(sigma)), epsilon)
    coarse = COARSE_GRID if epsilon >= FINE_BELOW else GRID
    # Where the grid is coarser than a step's own loss, its bound says little.
    if coarse > own and sampling_rate * pairs * math.sqrt(math.expm1(min(1 / sigma**2, 50.0))) > coarse:
        sigma, slope = search(quick(coarse), epsilon, sigma, slope, _ROUGH_SLACK, least)
    sigma, slope = search(quick(own), epsilon, sigma, slope, _ROUGH_SLACK, least)
    return search(cost, epsilon, sigma, slope, _SLACK, least)[0]


def max_steps(
    epsilon: float,
    delta: float,
    noise_multiplier: float,
    sampling_rate: float,
    prior: Sequence[Composable] = (),
    at_most: int = 100_000,
    *,
    pairs: int = 1,
) -> int:
    """How many steps (0 to ``at_most``) of the mechanism fit into ``epsilon`` on top of ``prior``.

    The search comes from below, so that settings that cost far too much are never composed in full.

    Raises:
        PrivacyError: a delta of 1e-10 or less, or of 1 or more.
    """
    check_delta(delta)
    once = Mechanism(noise_multiplier, sampling_rate, 1, pairs)

    def ran(steps: int) -> list[Composable]:
        return [*prior, once.with_steps(steps)]

    def cost(steps: int) -> float:
        return composed_epsilon(ran(steps), delta) if expected_loss(merged(ran(steps))) <= MAX_LOSS else math.inf

    if at_most < 1:
        return 0
    good: Reached = (0, composed_epsilon(prior, delta))
    before, bad = good, (at_most + 1, math.inf)
    steps = at_most if expected_loss(merged(ran(at_most))) <= _CHEAP_LOSS else 1
    turn = 0
    while bad[0] - good[0] > 1:
        here = (steps, cost(steps))
        if here[1] <= epsilon:
            before, good = good, here
        else:
            bad = here
        turn += 1
        steps = next_steps(epsilon, before, good, bad, turn)
    return good[0]
