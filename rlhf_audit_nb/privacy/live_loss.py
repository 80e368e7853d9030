"""The private live loss: what a panel may show of the training loss while it trains, and what that costs. Floor 2.

Of every sampled unit its own mean loss l (the one that its gradient is of), clipped to [0, B] and centred, goes into a
sum over the same Poisson sample; noise is added once, and the expected number of units divides it:

    released = B/2 + (sum of (clip(l) - B/2) + N(0, (sigma_m B/2)^2)) / (q N)

A unit that does not take part contributes 0, so the sum moves by at most B/2 when one unit is emptied. A unit whose
loss or gradient is not finite, or cannot be computed, contributes nothing, here as to the gradient.

What it costs. Take the unit's contributions to both sums in units of their noise, as one vector: its gradient over
sigma_g C has a norm of at most 1/sigma_g, its loss over sigma_m B/2 is at most 1/sigma_m, so both together have at most
(sigma_g^-2 + sigma_m^-2)^(1/2), and the noise on all coordinates is N(0, 1), independent. Both sums are of the same
sample. That is one Poisson-subsampled Gaussian mechanism with noise multiplier (sigma_g^-2 + sigma_m^-2)^(-1/2)
(`effective_noise`), which is what is accounted for; what is then made of the two results is post-processing.

The centre matters: with B/2 at the loss of a model that has learnt nothing, how many units happen to be in a sample
hardly moves the result. That is what `usual_bound` is for: a public constant of the trainer's loss, never of the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from rlhf_audit_nb.privacy.sampling import SealedRandom

__all__ = ["LiveLoss", "LossObserver", "effective_noise", "live_loss", "usual_bound"]

LN2 = math.log(2)
FALLBACK = 2 * LN2
_SFT_BOUND = 2.0
_UP = 1 + 1e-12  # so that rounding never leaves less noise than was calibrated


@runtime_checkable
class LossObserver(Protocol):
    """Who is told the released loss; it is public."""

    def on_private_loss(self, step: int, loss: float) -> None:
        """The loss that step ``step`` (from 1) released."""


@dataclass(frozen=True, kw_only=True)
class LiveLoss:
    """How the loss of one training is released.

    Attributes:
        gradient_noise: sigma_g, the gradient's noise in units of the clipping norm.
        noise_multiplier: sigma_m, the loss's noise in units of B/2.
        bound: B, what a unit's loss is clipped to.
    """

    gradient_noise: float
    noise_multiplier: float
    bound: float

    @property
    def effective(self) -> float:
        """The noise multiplier of both releases together."""
        return effective_noise(self.gradient_noise, self.noise_multiplier)

    def deviation(self, expected_units: float) -> float:
        """The standard deviation of the noise in one released loss; public."""
        return self.noise_multiplier * self.bound / 2 / expected_units

    def clipped_sum(self, losses: Iterable[float]) -> float:
        """The sum of clipped and centred losses: private."""
        half = self.bound / 2
        return math.fsum(min(max(loss, 0.0), self.bound) - half for loss in losses)

    def release(self, total: float, randomness: SealedRandom, step: int, expected_units: float) -> float:
        """What may be seen of ``total`` (see `clipped_sum`) in ``step``, from 0."""
        half = self.bound / 2
        noisy = total + self.noise_multiplier * half * randomness.loss_normal(step)
        return half + noisy / expected_units


def effective_noise(gradient_noise: float, loss_noise: float | None) -> float:
    """The noise multiplier of the gradient and, where there is one, the loss together (see the module's text).

    Args:
        gradient_noise: sigma_g.
        loss_noise: sigma_m; ``None`` where no loss is released.
    """
    if loss_noise is None:
        return gradient_noise
    return 1 / math.hypot(1 / gradient_noise, 1 / loss_noise)


def live_loss(
    ratio: float | None, bound: float | None, *, effective: float | None = None, gradient: float | None = None
) -> LiveLoss | None:
    """The release with ``sigma_m = ratio * sigma_g``, from one of the two noises; ``None`` where there is none.

    Args:
        ratio: how much more noise the loss gets than the gradient; ``None`` releases no loss.
        bound: B; ``None`` takes that of a logistic loss.
        effective: the noise multiplier of both together (at least).
        gradient: sigma_g itself.
    """
    if ratio is None:
        return None
    if gradient is None:
        assert effective is not None
        gradient = effective * math.hypot(1, 1 / ratio) * _UP
    return LiveLoss(gradient_noise=gradient, noise_multiplier=ratio * gradient, bound=bound or FALLBACK)


def usual_bound(trainer: Any) -> float:
    """B for a trainer: twice the loss of a model that has learnt nothing yet, from its settings alone.

    DPO (whose policy begins as its reference): twice the sum of its losses at equal rewards, by their weights. A reward
    model: 2 ln 2, twice that of a coin. KTO: twice half of the larger weight. SFT, whose loss is a sum over tokens by
    ``max_length``: 2.
    """
    kinds = {kind.__name__ for kind in type(trainer).__mro__}
    if "DPOTrainer" in kinds:
        weights = trainer.loss_weights or [1.0] * len(trainer.loss_types)
        start = sum(
            weight * _dpo_start(name, trainer) for name, weight in zip(trainer.loss_types, weights, strict=True)
        )
        return 2 * start if start > 0 else FALLBACK
    if "KTOTrainer" in kinds:
        return float(max(trainer.desirable_weight, trainer.undesirable_weight)) or 1.0
    return _SFT_BOUND if "SFTTrainer" in kinds else FALLBACK


def _dpo_start(loss: str, trainer: Any) -> float:
    """The loss of a pair while the policy is the reference."""
    beta = float(trainer.beta)
    smoothing = float(trainer.label_smoothing) or 1e-3  # what TRL takes for exo_pair where it is 0
    return {
        "hinge": 1.0,
        "ipo": 1 / (4 * beta**2),
        "exo_pair": -LN2 - (math.log(1 - smoothing) + math.log(smoothing)) / 2,
        "nca_pair": 2 * LN2,
        "bco_pair": 2 * LN2,
        "sppo_hard": 1 / (2 * beta**2),
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "discopop": (LN2 + 1) / 2,
    }.get(loss, LN2)
