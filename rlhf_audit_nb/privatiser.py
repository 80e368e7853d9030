"""Privacy wired into a run: ledger, plan, reservation, engine, settlement, in that order. Floor 3.

`rlhf_audit_nb.capture` knows runs and `rlhf_audit_nb.privacy` knows mechanisms; neither knows the other. This is where
they meet: what a run hands its trainers to, and what it learns of them.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.run import Run, RunObserver
    from rlhf_audit_nb.capture.state import PrivacyView
    from rlhf_audit_nb.config import PrivacyConfig
    from rlhf_audit_nb.privacy.ledger import Ledger
    from rlhf_audit_nb.privacy.plan import Plan
    from rlhf_audit_nb.trail import Trail

__all__ = ["PlannedTraining", "TrailPrivatiser"]


class TrailPrivatiser:
    """Makes trainers private on one trail; see `rlhf_audit_nb.capture.run.Privatiser`."""

    def __init__(self, config: PrivacyConfig, trail: Trail) -> None:
        self.config = config
        self.trail = trail

    def quiet(self) -> AbstractContextManager[Any]:
        """Keeps libraries from telling about private rows."""
        from rlhf_audit_nb.privacy.quiet import quiet_preparation

        return quiet_preparation()

    def plan(self, trainer: Any) -> PlannedTraining:
        """The plan for ``trainer`` on top of what the trail holds; see `plan_training` for what is refused."""
        from rlhf_audit_nb.privacy.plan import plan_training
        from rlhf_audit_nb.privacy.reservation import read_ledger

        ledger = read_ledger(self.trail.reader())
        prior = ledger.mechanisms(self.config.unit, self.config.unit_column)
        ledger.check(self.config)
        return PlannedTraining(self.trail, plan_training(trainer, self.config, prior), _raised(ledger, self.config))


class PlannedTraining:
    """One private training: what `rlhf_audit_nb.capture.run.PrivatePlan` asks for."""

    def __init__(self, trail: Trail, plan: Plan, raised: str = "") -> None:
        self._trail = trail
        self._plan = plan
        self._raised = raised

    @property
    def view(self) -> PrivacyView:
        """The guarantee, for people."""
        from rlhf_audit_nb.capture.state import PrivacyView

        plan = self._plan
        return PrivacyView(
            unit=plan.config.unit,
            units=len(plan.units),
            adjacency=plan.config.adjacency,
            delta=plan.config.delta,
            budget=plan.config.epsilon,
            before=plan.before,
            planned=plan.epsilon,
            noise_multiplier=plan.noise_multiplier,
            sampling_rate=plan.sampling_rate,
            clipping_norm=plan.clipping_norm,
            curve=list(plan.curve),
        )

    @property
    def steps(self) -> int:
        """Optimizer steps that may be taken."""
        return self._plan.steps

    @property
    def annotator_column(self) -> str | None:
        """The column that holds the annotator's id, where that is the unit."""
        return self._plan.config.unit_column

    @property
    def warnings(self) -> list[str]:
        """What a person should know about these settings, as sentences."""
        plan = self._plan
        # What the accountants note of each other is for the report; here it would only alarm.
        said = [sentence for sentence in plan.warnings if sentence not in plan.accounted.notes]
        return [*said, *(sentence for sentence in (plan.notice, self._raised) if sentence)]

    @contextmanager
    def training(self, run: Run, trainer: Any, observer: RunObserver) -> Iterator[None]:
        """Reserves the plan, makes ``trainer`` private while it lasts, and settles at the end, however it comes."""
        from rlhf_audit_nb.privacy.engine import private_training
        from rlhf_audit_nb.privacy.plan import settle_event
        from rlhf_audit_nb.privacy.reservation import reserve
        from rlhf_audit_nb.privacy.sampling import SealedRandom

        randomness = SealedRandom.from_system()
        reservation = uuid.uuid4().hex
        self._plan = reserve(
            self._trail,
            self._plan,
            randomness,
            reservation=reservation,
            run=run.id,
            resolution_us=run.resolution_us,
        )
        steps, stopped = 0, False
        try:
            with private_training(trainer, self._plan, randomness, observer) as engine:
                try:
                    yield
                finally:
                    steps, stopped = engine.steps, engine.stopped_by_budget
        finally:
            # A process that dies before this never settles: then the whole reservation counts.
            run.stopped_by_budget = stopped
            settled = settle_event(self._plan, reservation, steps, stopped_by_budget=stopped)
            run.record(settled)
            total = float(settled.epsilon_total)
            if total > (run.state.epsilon or 0.0):  # a step that was cut short is paid for, though it does not count
                run.state.add("epsilon", run.state.step, total)


def _raised(ledger: Ledger, config: PrivacyConfig) -> str:
    """A sentence where the configuration asks for a larger budget than the trail's last reservation; else nothing."""
    if not ledger.spends or ledger.budgets:
        return ""
    before = ledger.spends[-1].asked.epsilon
    if config.epsilon <= before:
        return ""
    return (
        f"This run raises the trail's budget from {before:g} to {config.epsilon:g}; "
        "the trail keeps both, and reports name the raise."
    )
