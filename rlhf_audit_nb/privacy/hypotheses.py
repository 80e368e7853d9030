"""What a right mechanism releases over phantom units, as hypotheses with p-values. Floor 2.

A `Reading` holds what was released, step by step, in units of the clipping norm and before the division: a sum of the
sampled units' vectors and normal noise of deviation sigma. Where no unit has anything, it is noise alone; along a
unit's own direction it is the unit's share plus noise, so with little noise it can be read off who was sampled.

Every p-value is exact or an upper bound (binomial, normal and chi-squared laws that hold for any sample size, the
Dvoretzky-Kiefer-Wolfowitz inequality, Bonferroni over all that is looked at), so that the chance of a false alarm is
known. What is not a number, and noise that is zero throughout, fails. Everything here is a pure function of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]

__all__ = ["Finding", "Reading", "examine_loss", "examine_noise", "examine_sampling", "same_noise", "same_sample"]

_FLOAT32_CHANCE = 2.0**-20  # that a float64 drawn at random lies within 2^-45 of itself of one in float32
_FLOAT32_REACH = 2.0**-45


@dataclass(frozen=True)
class Finding:
    """One hypothesis, and how likely what was seen is if it holds.

    Attributes:
        name: of the hypothesis.
        p: at most the chance of what was seen, or of anything further off.
        wrong: what is wrong where it does not hold.
    """

    name: str
    p: float
    wrong: str


@dataclass(frozen=True)
class Reading:
    """What one training over phantoms released.

    Attributes:
        released: (steps, coordinates), in units of C, times the expected number of units.
        silent: the coordinates of each tensor that no unit has anything in; the last tensor is in float32.
        directions: (units, loud coordinates), orthonormal rows.
        expected: what each unit contributes where it is sampled, in units of C.
        noise_multiplier: sigma.
        sampling_rate: q.
    """

    released: Array
    silent: Sequence[slice]
    directions: Array
    expected: Array
    noise_multiplier: float
    sampling_rate: float

    def noise(self) -> list[Array]:
        """For each tensor the silent coordinates of all steps, standard normal if all is right."""
        return [self.released[:, place] / self.noise_multiplier for place in self.silent]

    def shares(self) -> Array:
        """(steps, units): what lies along each unit's own direction."""
        shares: Array = self.released[:, : self.directions.shape[1]] @ self.directions.T
        return shares

    def finite(self) -> Finding:
        """Nothing but numbers was released."""
        return Finding(
            "finite",
            1.0 if np.isfinite(self.released).all() else 0.0,
            "A released gradient is not finite: a unit got in whose gradient is not finite or not clipped, or a step "
            "was divided by zero.",
        )


def examine_noise(reading: Reading) -> Iterator[Finding]:
    """The noise: there, of the right size, normal, drawn precisely, and never the same twice."""
    noise = reading.noise()
    every = np.concatenate([item.ravel() for item in noise])
    sigma = math.sqrt(float(np.mean(every**2)))
    yield Finding(
        "noise-level",
        _chi_squared(every),
        f"The noise is {sigma:.4g} times what the noise multiplier says: with that, the epsilon is another one.",
    )
    blocks = [_chi_squared(row) for item in noise for row in item]
    columns = [_chi_squared(column) for item in noise for column in item.T]
    yield Finding(
        "noise-everywhere",
        _least([*blocks, *columns]),
        "In some step, tensor or coordinate the noise is missing, or not of the right size.",
    )
    yield Finding("noise-shape", _normal(every), "The noise is not normally distributed.")
    yield Finding(
        "noise-precision",
        _precision(noise[:-1], reading.noise_multiplier),
        "The noise was drawn or scaled in float32 or less: its low bits tell the sum apart from it.",
    )
    yield Finding(
        "noise-independent",
        _independence(noise),
        "The noise of one step, tensor or coordinate was used again in another: it can be subtracted.",
    )


def examine_sampling(reading: Reading) -> Iterator[Finding]:
    """Who was sampled and what each brought in; takes a reading with a noise multiplier far below 1."""
    known = reading.expected > 0
    shares, expected, q = reading.shares(), reading.expected[known], reading.sampling_rate
    seen = shares[:, known] > expected / 2
    steps, units = seen.shape
    yield Finding(
        "sampling-rate",
        _binomial(int(seen.sum()), steps * units, q),
        f"Units were sampled with a rate of {seen.mean():.4g} instead of {q:g}: the epsilon is another one.",
    )
    yield Finding(
        "sampling-each",
        _least([_binomial(int(count), steps, q) for count in seen.sum(0)]),
        "Some unit is sampled far more or less often than the others.",
    )
    yield Finding(
        "sampling-independent",
        _sampled_apart(seen, q),
        "Units are not sampled independently of each other and of the step before, which the accounting is for.",
    )
    yield from _contributions(reading, shares, seen, known)


def _contributions(
    reading: Reading, shares: Array, seen: npt.NDArray[np.bool_], known: npt.NDArray[np.bool_]
) -> Iterator[Finding]:
    sigma, expected = reading.noise_multiplier, reading.expected[known]
    amount, counts = np.where(seen, shares[:, known], 0.0), seen.sum(0)
    there = counts > 0
    mean = amount.sum(0)[there] / counts[there]
    off = (mean - expected[there]) * np.sqrt(counts[there]) / sigma
    whole = (mean - 1.0) * np.sqrt(counts[there]) / sigma
    yield Finding(
        "contribution-bounded",
        _normal_tail(whole, two_sided=False),
        f"A unit brought in {mean.max():.4g} times the clipping norm: its whole gradient is not clipped to it.",
    )
    yield Finding(
        "contribution-exact",
        _normal_tail(off),
        "A unit's contribution is not its gradient scaled as a whole to the clipping norm at most.",
    )
    loud = reading.released[:, : reading.directions.shape[1]]
    beside = loud - shares @ reading.directions
    spare = reading.directions.shape[1] - len(reading.directions)
    yield Finding(
        "nothing-beside",
        _chi_squared(beside / sigma, degrees=len(loud) * spare),
        "Something came in that no unit has, or the noise there is not what it should be.",
    )
    broken = shares[:, ~known]
    yield Finding(
        "non-finite-excluded",
        _chi_squared(broken / sigma) if broken.size else 1.0,
        "A unit whose gradient is not finite brought something in.",
    )
    full = expected == 1.0
    units = seen[:, full].sum(1)
    by_step = amount[:, full].sum(1)[units > 0] / units[units > 0]
    yield Finding(
        "divisor",
        _normal_tail((by_step - 1.0) * np.sqrt(units[units > 0]) / sigma),
        "A step is not divided by the expected number of units: what was divided by tells of the sample.",
    )


def examine_loss(reading: Reading, losses: Array, expected: Array, noise_multiplier: float) -> Iterator[Finding]:
    """The released loss; takes a reading with a noise multiplier far below 1, which shows who was sampled.

    Args:
        reading: the gradients that were released beside it.
        losses: (steps,), in units of B/2, about the middle and times the expected number of units.
        expected: what each unit contributes to it where it is sampled, in units of B/2.
        noise_multiplier: sigma_m.
    """
    known = reading.expected > 0
    seen, expected = reading.shares()[:, known] > reading.expected[known] / 2, expected[known]
    if not np.isfinite(losses).all() or len(losses) != len(seen):
        yield Finding("loss-bounded", 0.0, "A released loss is missing or not finite: some unit's was not clipped.")
        return
    beside = (losses - seen @ expected) / noise_multiplier
    yield Finding(
        "loss-noise",
        _chi_squared(beside),
        f"The released loss has {math.sqrt(float(np.mean(beside**2))):.4g} times the noise that it is charged with.",
    )
    noise = np.concatenate([item[: len(beside)] for item in reading.noise()], axis=1)
    even, odd = beside[: len(beside) - len(beside) % 2 : 2], beside[1::2]
    with np.errstate(invalid="ignore", divide="ignore"):
        of_gradient = _normal_tail((beside @ noise) / np.linalg.norm(noise, axis=0))
    yield Finding(
        "loss-noise-own",
        _least([of_gradient, _normal_tail(np.array([_alike(even, odd)])) if even.any() else 1.0]),
        "The noise of the released loss is that of the gradient, or of another step: it can be subtracted.",
    )
    counts = seen.sum(0)
    there = counts > 0
    by_unit = (beside @ seen)[there] / np.sqrt(counts[there])
    yield Finding(
        "loss-bounded",
        _normal_tail(by_unit[np.abs(expected[there]) == 1.0], two_sided=False),
        "A unit moves the released loss by more than half of its bound.",
    )
    yield Finding(
        "loss-exact",
        _normal_tail(np.concatenate([by_unit, beside])),
        "The released loss is not the sum of clipped losses, divided by the expected number of units.",
    )


def same_noise(first: Reading, second: Reading) -> float:
    """The p-value of the noise in two trainings being independent."""
    pairs = [
        (one[: len(other)].ravel(), other[: len(one)].ravel())
        for one, other in zip(first.noise(), second.noise(), strict=True)
    ]
    return _normal_tail(np.array([_alike(one, other) for one, other in pairs]))


def same_sample(first: Reading, second: Reading) -> float:
    """The p-value of the samples of two trainings over the same units being independent."""
    known, q = first.expected > 0, first.sampling_rate
    both = [reading.shares()[:, known] > reading.expected[known] / 2 for reading in (first, second)]
    steps = min(len(seen) for seen in both)
    equal = both[0][:steps] == both[1][:steps]
    return _binomial(int(equal.sum()), equal.size, q * q + (1 - q) * (1 - q))


def _sampled_apart(seen: npt.NDArray[np.bool_], q: float) -> float:
    steps, units = seen.shape
    found = []
    for gap in (1, max(1, units // 2)):
        pairs = seen[:, : units - gap : 2 * gap] & seen[:, gap :: 2 * gap][:, : len(range(0, units - gap, 2 * gap))]
        found.append(_binomial(int(pairs.sum()), pairs.size, q * q))
    after = seen[: steps - steps % 2 : 2] & seen[1::2]
    found.append(_binomial(int(after.sum()), after.size, q * q))
    found.extend(_spread(seen.sum(1), units, q, width) for width in (0.2, 0.6745))
    return _least(found)


def _spread(counts: npt.NDArray[np.int_], units: int, q: float, width: float) -> float:
    """Whether samples are of as different sizes as they should be: how many lie within ``width`` deviations."""
    from scipy import stats

    middle, reach = units * q, max(0.5, width * math.sqrt(units * q * (1 - q)))
    low, high = math.ceil(middle - reach), math.floor(middle + reach)
    chance = float(stats.binom.cdf(high, units, q) - stats.binom.cdf(low - 1, units, q))
    inside = int(((counts >= low) & (counts <= high)).sum())
    return _binomial(inside, len(counts), min(max(chance, 0.0), 1.0))


def _independence(noise: Sequence[Array]) -> float:
    width = min(item.shape[1] for item in noise)
    rows = np.concatenate([item[:, :width] for item in noise])
    lengths = np.linalg.norm(rows, axis=1)
    first, second = np.triu_indices(len(rows), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        pairs = (rows @ rows.T)[first, second] / lengths[first]
    found = [_normal_tail(pairs)]
    for item in noise:
        steps, count = item.shape
        found.extend(
            _normal_tail(np.array([_alike(one.ravel(), other.ravel())]))
            for one, other in (
                (item[: steps - steps % 2 : 2], item[1::2]),
                (item[:, : count - count % 2 : 2], item[:, 1::2]),
                (item[:, : count // 2], item[:, count - count // 2 :]),
            )
            if one.size
        )
    return _least(found)


def _alike(one: Array, other: Array) -> float:
    """Standard normal if ``other`` is, whatever ``one`` is; not a number where ``one`` is nothing."""
    length = float(np.linalg.norm(one))
    return float(one @ other) / length if length > 0 else math.nan


def _precision(noise: Sequence[Array], sigma: float) -> float:
    """Whether the values lie too close to numbers of float32, scaled by sigma or not."""
    every = np.concatenate([item.ravel() for item in noise])
    found = []
    for values in (every, every * sigma):
        near = np.abs(values - values.astype(np.float32)) <= _FLOAT32_REACH * np.abs(values)
        found.append(_binomial(int(near.sum()), near.size, _FLOAT32_CHANCE, two_sided=False))
    return _least(found)


def _normal(values: Array) -> float:
    """An upper bound on the chance of an empirical distribution so far from the normal one (DKW)."""
    from scipy.special import ndtr

    ordered = ndtr(np.sort(values))
    steps = np.arange(len(values) + 1) / len(values)
    distance = max(float((steps[1:] - ordered).max()), float((ordered - steps[:-1]).max()))
    return _number(min(1.0, 2 * math.exp(-2 * len(values) * distance**2)))


def _chi_squared(values: Array, degrees: int | None = None) -> float:
    from scipy import stats

    total, degrees = float(np.sum(values**2)), degrees or values.size
    return _two_sided(float(stats.chi2.cdf(total, degrees)), float(stats.chi2.sf(total, degrees)))


def _binomial(count: int, trials: int, chance: float, *, two_sided: bool = True) -> float:
    from scipy import stats

    if trials == 0:
        return 1.0
    above = float(stats.binom.sf(count - 1, trials, chance))
    return _two_sided(float(stats.binom.cdf(count, trials, chance)), above) if two_sided else _number(above)


def _normal_tail(scores: Any, *, two_sided: bool = True) -> float:
    """The p-value of the largest of standard normal scores, Bonferroni over all of them."""
    from scipy.special import ndtr

    if not len(scores):
        return 1.0
    most = float(np.max(np.abs(scores) if two_sided else scores))
    return _number(min(1.0, (2 if two_sided else 1) * len(scores) * float(ndtr(-most))))


def _two_sided(below: float, above: float) -> float:
    return _number(min(1.0, 2 * min(below, above)))


def _least(found: Sequence[float]) -> float:
    """The p-value of the most extreme of several, Bonferroni."""
    return _number(min(1.0, len(found) * min(found))) if all(map(math.isfinite, found)) else 0.0


def _number(p: float) -> float:
    """What is not a number fails."""
    return p if math.isfinite(p) else 0.0
