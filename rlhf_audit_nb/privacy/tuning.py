"""What choosing among several trainings costs: as this tool does it, and if only the best were released. Floor 2.

*Composed* is what happens here: every run stands in the ledger, the composition is adaptive, and so all of their
weights may be looked at, compared on unprotected data, and kept or thrown away.

*Selected* is a what-if. Where the number of runs is drawn at random from a declared distribution, nothing of any run
is shown but the weights of the best one, and the best is told by what is private itself or by unprotected data, the
whole costs two to three times one run however many there are (Papernot and Steinke, arXiv:2110.03620; dp-accounting's
``RepeatAndSelectDpEvent``, by RDP). No run of this tool keeps to that, since each shows its own steps and weights; so
the ledger never charges the smaller figure, and nobody should.

Everything here is a pure function of numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from rlhf_audit_nb.errors import PrivacyError
from rlhf_audit_nb.privacy.accountant import composed_epsilon
from rlhf_audit_nb.privacy.mechanisms import Mechanism, check_delta

__all__ = ["MOST_RUNS", "RunsDistribution", "Tuning", "plan_tuning"]

RunsDistribution = Literal["geometric", "logarithmic", "poisson"]
MOST_RUNS = 10_000

_SHAPES: dict[str, float] = {"geometric": 1.0, "logarithmic": 0.0, "poisson": math.inf}


@dataclass(frozen=True, slots=True)
class Tuning:
    """The cost of finding the best of several equal runs.

    Attributes:
        distribution: of the number of runs, where only the best is released.
        runs: its mean; as many runs are composed.
        once: epsilon of a single run (privacy loss distribution).
        composed: epsilon of all runs (likewise): what the ledger counts.
        selected: epsilon where only the best of a random number of runs were released (RDP).
    """

    distribution: RunsDistribution
    runs: int
    once: float
    composed: float
    selected: float


def plan_tuning(mechanism: Mechanism, delta: float, runs: int, distribution: RunsDistribution = "geometric") -> Tuning:
    """What ``runs`` trainings with ``mechanism`` cost together, and what releasing only the best would.

    Args:
        mechanism: of each run; the plain one (``pairs=1``), since dp-accounting selects no mixtures.
        delta: of the bounds.
        runs: how many: exactly so many are composed; on the average so many where their number is random.
        distribution: ``geometric``, ``logarithmic`` (both of at least one run) or ``poisson`` (which may be none).

    Raises:
        PrivacyError: a number out of range, an unknown distribution, or pairs sampled one by one.
    """
    check_delta(delta)
    if distribution not in get_args(RunsDistribution):
        wanted = ", ".join(get_args(RunsDistribution))
        raise PrivacyError(
            f"The number of runs cannot be {distribution!r}.", next_step=f"Choose one of {wanted}.", code="tuning"
        )
    if not 1 <= runs <= MOST_RUNS:
        raise PrivacyError(f"{runs!r} runs cannot be planned; 1 to {MOST_RUNS:,} can.", code="tuning")
    if mechanism.pairs > 1:
        raise PrivacyError(
            "What selecting the best run costs is not known for pairs sampled one by one.",
            next_step="Plan it for sampled units, or compose the runs: budget plan with so many times the steps.",
            code="tuning",
        )
    return Tuning(
        distribution=distribution,
        runs=runs,
        once=composed_epsilon([mechanism], delta),
        composed=composed_epsilon([replace(mechanism, steps=mechanism.steps * runs)], delta),
        selected=_selected(mechanism, delta, runs, distribution),
    )


def _selected(mechanism: Mechanism, delta: float, runs: int, distribution: RunsDistribution) -> float:
    import dp_accounting
    from dp_accounting import dp_event, rdp

    gaussian = dp_accounting.GaussianDpEvent(mechanism.noise_multiplier)
    step = dp_accounting.PoissonSampledDpEvent(mechanism.sampling_rate, gaussian)
    run = dp_accounting.SelfComposedDpEvent(step, mechanism.steps)
    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(dp_event.RepeatAndSelectDpEvent(run, float(runs), _SHAPES[distribution]))
    return float(accountant.get_epsilon(delta))
