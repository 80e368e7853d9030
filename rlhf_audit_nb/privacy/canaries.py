"""Canaries in a private training: phantom units that nobody gave, and what the training shows of them. Floor 2.

Each of m canaries is *in* with chance 1/2, decided once by the sealed seed, and has one coordinate of the trained
parameters to itself, drawn from the seed as well. One that is in is sampled as every unit is, by the same draw; where
it is sampled, C is added to its coordinate of the sum of clipped gradients: a gradient of norm exactly C in a known
direction, which is the most that any unit can bring in. Noise and division follow as for everybody.

An attacker who knows the coordinates looks at what was released, adds up over all steps what stands at each canary's
coordinate, and guesses from these scores which canaries were in. What so many right guesses rule out is a lower bound
on epsilon (`lower_bounds`), to stand beside the claimed one: the training audits itself.

It costs no epsilon. Whatever the seed decides about canaries is drawn without looking at data; for every such decision
what canaries add to a sum is a constant, and a Gaussian mechanism does not lose privacy by a constant. A real unit
still moves the sum by C at most. The scores, and all that is made of them, are a function of released gradients and of
that randomness: post-processing. The price is in utility: steps are divided by the expected number of units *and*
canaries, q (N + m), and m coordinates are disturbed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.events import PrivacyAudited, PrivacySettled, number
from rlhf_audit_nb.privacy.lower_bounds import bound_from_scores

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from rlhf_audit_nb.privacy.draws import Draws
    from rlhf_audit_nb.privacy.sampling import SealedRandom

__all__ = ["Canaries", "audited_event", "audited_words", "check_room"]


class Canaries:
    """The canaries of one training.

    Args:
        randomness: the sealed seed.
        draws: which of them are in a step's sample.
        parameters: all that is trained.
        bound: C.
        count: m.

    Attributes:
        included: (m,), which of them are in.
        steps: the releases that were looked at.
    """

    def __init__(
        self,
        randomness: SealedRandom,
        draws: Draws,
        parameters: Sequence[torch.nn.Parameter],
        bound: float,
        count: int,
    ) -> None:
        self._draws = draws
        self._bound = bound
        import torch

        sizes = [parameter.numel() for parameter in parameters]
        _check_room(count, sum(sizes))
        self.included: npt.NDArray[np.bool_] = randomness.canaries(count)
        self.steps = 0
        self._scores: npt.NDArray[np.float64] = np.zeros(count)
        at, ends = randomness.coordinates(count, sum(sizes)), np.cumsum(sizes)
        tensors = np.searchsorted(ends, at, side="right")
        self._places = [
            (tensor, torch.from_numpy(at[whose] - (ends[tensor] - sizes[tensor])), whose)
            for tensor in range(len(sizes))
            if len(whose := (tensors == tensor).nonzero()[0])
        ]

    def add(self, step: int, sums: Sequence[torch.Tensor]) -> None:
        """Add to the clipped gradients' sum of ``step`` (from 0) what the sampled canaries bring in."""
        import torch

        brought = self._draws.canaries(step) * self.included * self._bound
        for tensor, place, whose in self._places:
            total = sums[tensor]
            total.view(-1).index_add_(0, place.to(total.device), torch.from_numpy(brought[whose]).to(total))

    def look(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Add what was released, and stands in ``.grad``, to the scores."""
        self.steps += 1
        for tensor, place, whose in self._places:
            released = parameters[tensor].grad
            assert released is not None  # the mechanism has just written it
            self._scores[whose] += released.flatten()[place.to(released.device)].double().cpu().numpy()

    @property
    def scores(self) -> npt.NDArray[np.float64]:
        """(m,), for each canary what lay along its direction, over all releases so far."""
        return self._scores.copy()


def check_room(trainer: Any, count: int) -> None:
    """Refuse more canaries than the trainer's model has trained coordinates.

    Raises:
        ConfigError: the number, and how many there are.
    """
    _check_room(count, sum(item.numel() for item in trainer.model.parameters() if item.requires_grad))


def audited_event(canaries: Canaries, settled: PrivacySettled, delta: float) -> PrivacyAudited | None:
    """What the canaries of a training show; ``None`` where nothing was released or a release was not finite.

    Args:
        canaries: of the training, after its last step.
        settled: what the training is said to have spent.
        delta: of the claimed epsilon.
    """
    if not canaries.steps or not np.isfinite(canaries.scores).all():
        return None
    bound = bound_from_scores(canaries.scores, canaries.included, delta)
    return PrivacyAudited(
        reservation=settled.reservation,
        outcome="failed" if bound.epsilon > float(settled.epsilon_run) else "not contradicted",
        canaries=bound.canaries,
        steps=canaries.steps,
        guesses=bound.guesses,
        right=bound.right,
        delta=delta,
        epsilon_claimed=settled.epsilon_run,
        epsilon_lower=number(bound.epsilon),
        epsilon_gaussian=number(bound.gaussian),
        confidence=bound.confidence,
        ceiling=number(bound.ceiling),
    )


def audited_words(event: PrivacyAudited) -> str:
    """The sentence for a training whose canaries contradict its epsilon."""
    return (
        f"The canaries of this training contradict its privacy: they show an epsilon of at least "
        f"{float(event.epsilon_lower):.3g} with {100 * event.confidence:g} % of confidence, and "
        f"{float(event.epsilon_claimed):.3g} is claimed. Do not release the model; run `rlhf-audit privacy-check`."
    )


def _check_room(count: int, coordinates: int) -> None:
    if count > coordinates:
        raise ConfigError(
            f"canaries is {count}, and the model trains {coordinates} numbers: each canary needs one to itself.",
            next_step="Ask for fewer canaries.",
            code="canaries",
        )
