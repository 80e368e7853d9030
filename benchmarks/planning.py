"""What planning costs before a private training: calibration, accounting with its cross-checks, and the curve."""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks.figures import Figure

__all__ = ["SETTINGS", "measure"]

# epsilon, sampling rate, steps, separately sampled pairs of a unit
SETTINGS = (
    (8.0, 0.073, 200, 1),
    (1.0, 0.1, 300, 1),
    (4.0, 0.01, 10_000, 1),
    (1.0, 0.001, 100_000, 1),
    (8.0, 0.001, 100_000, 1),
    (3.0, 0.2, 100_000, 1),
    (8.0, 0.05, 300, 8),
    (1.0, 0.01, 10_000, 4),
    (8.0, 0.001, 100_000, 16),
)
DELTA = 1e-5


def _on_top(runs: int) -> Figure:
    """A run planned on top of a ledger of ``runs`` others, each with a noise multiplier of its own."""
    from rlhf_audit_nb.privacy.accountant import Mechanism, calibrate, compose, composed_epsilon, epsilon_curve

    started = time.process_time()
    prior = [Mechanism(3 + 0.01 * number, 0.05, 100) for number in range(runs)]
    before = composed_epsilon(prior, DELTA)
    mechanism = Mechanism(calibrate(before + 1, DELTA, 0.05, 100, prior), 0.05, 100)
    compose([*prior, mechanism], DELTA)
    epsilon_curve(mechanism, DELTA, prior)
    how = f"ε {before:.4f} before, {before + 1:.4f} after"
    return Figure(f"planning on top of {runs} runs", time.process_time() - started, "s", 3.0, how=how)


def measure(*, quick: bool = False) -> Iterator[Figure]:
    """CPU seconds of each, imports and caches aside (no two settings share a computation)."""
    from rlhf_audit_nb.privacy.accountant import Mechanism, calibrate, compose, epsilon_curve

    compose([Mechanism(2.0, 0.1, 2), Mechanism(2.0, 0.1, 2, 2)], DELTA)  # imports
    yield _on_top(6 if quick else 30)
    for epsilon, rate, steps, pairs in SETTINGS[:: 4 if quick else 1]:
        started = time.process_time()
        mechanism = Mechanism(calibrate(epsilon, DELTA, rate, steps, pairs=pairs), rate, steps, pairs)
        accounted = compose([mechanism], DELTA)
        epsilon_curve(mechanism, DELTA)
        taken = time.process_time() - started
        of = f", {pairs} pairs of a unit one by one" if pairs > 1 else ""
        how = f"noise multiplier {mechanism.noise_multiplier:.3f}, ε {accounted.epsilon:.4f}"
        yield Figure(f"planning ε {epsilon:g}, q {rate:g}, {steps:,} steps{of}", taken, "s", 3.0, how=how)
