"""A run made up for panels: the real state object and plain stand-ins for the trail's status and verdict."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from rlhf_audit_nb.capture.state import PrivacyView, RunState
from rlhf_audit_nb.trail import Level, Reason, TrailStatus, Verdict

__all__ = ["SECRET", "advance", "made_up_run", "made_up_status", "made_up_verdict"]

SECRET = 0.693147  # stands for a value that must not be shown of a private run


@dataclass(frozen=True)
class _Plan:
    before: float = 1.1
    planned: float = 5.4


def made_up_run(*, private: bool = True, steps: int = 300, status: str = "training") -> RunState:
    """A run before its first step."""
    plan = _Plan()
    state = RunState(experiment="safety_alignment", run_id="8f3a" * 8, private=private, max_steps=steps)
    state.status = status
    if private:
        rise = plan.planned - plan.before
        state.privacy = PrivacyView(
            unit="annotator",
            units=124,
            adjacency="zero-out",
            delta=1e-5,
            budget=8.0,
            before=plan.before,
            planned=plan.planned,
            noise_multiplier=1.85,
            sampling_rate=0.1,
            clipping_norm=0.5,
            curve=[plan.before + rise * math.sqrt(t / steps) for t in range(steps + 1)],
        )
    return state


def advance(state: RunState, to: int) -> RunState:
    """Take the steps up to ``to``; the same steps give the same numbers."""
    for step in range(state.step + 1, to + 1):
        wave = 43758.5453 * math.sin(12.9898 * step) % 1
        if state.privacy is not None:
            state.add("epsilon", step, state.privacy.curve[step])
        else:
            state.add("loss", step, 0.69 * math.exp(-step / 400) + 0.05 * (wave - 0.5))
            state.add("rewards/margins", step, 0.002 * step + 0.1 * wave)
        state.add("gradient_norm", step, 0.31 + 0.05 * wave)
        state.add("update_norm", step, 0.0031 + 0.0004 * wave)
        state.add("learning_rate", step, 5e-5 * (1 - step / max(state.max_steps, 1)))
        state.step = step
    return state


def made_up_status(size: int = 1284) -> TrailStatus:
    """A trail of that size."""
    root = hashlib.sha256(str(size).encode()).digest()
    return TrailStatus(size, root, "", 1_795_359_731_250_000, 0, "example.com/alignment+8a488eff+AZ3Bq+x/")


def made_up_verdict(level: Level = Level.UNANCHORED, *reasons: Reason) -> Verdict:
    """A verdict of that level."""
    return Verdict(level, "example.com/alignment", 1284, "", ("example.com/alignment",), (), reasons)
