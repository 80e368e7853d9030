"""Privacy wired into a run: ledger, plan, reservation, engine, settlement, in that order. Floor 3.

`rlhf_audit_nb.capture` knows runs and `rlhf_audit_nb.privacy` knows mechanisms; neither knows the other. This is where
they meet: what a run hands its trainers to, and what it learns of them.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.errors import UnsupportedTrainerError

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.run import Run, RunObserver
    from rlhf_audit_nb.capture.state import InheritedView, PrivacyView
    from rlhf_audit_nb.config import PrivacyConfig
    from rlhf_audit_nb.events import DataBound, DataPrivate, PrivacyInherited, PrivacySettled
    from rlhf_audit_nb.privacy.accountant import Composable
    from rlhf_audit_nb.privacy.canaries import Canaries
    from rlhf_audit_nb.privacy.ledger import Ledger
    from rlhf_audit_nb.privacy.plan import Plan
    from rlhf_audit_nb.privacy.populations import Roster
    from rlhf_audit_nb.privacy.post_processing import FunctionShown, Inheritance, Inputs, ModelShown
    from rlhf_audit_nb.privacy.replay import ReplaySeeds
    from rlhf_audit_nb.trail import Trail

__all__ = [
    "InheritedTraining",
    "PlannedTraining",
    "TrailPrivatiser",
    "model_shown",
    "private_halves",
    "protected_digests",
]


class TrailPrivatiser:
    """Makes trainers private on one trail; see `rlhf_audit_nb.capture.run.Privatiser`.

    With ``seeds`` its trainings repeat others, and ``trail`` is the replay's own (`rlhf_audit_nb.privacy.replay`).
    """

    def __init__(self, config: PrivacyConfig, trail: Trail, seeds: ReplaySeeds | None = None) -> None:
        self.config = config
        self.trail = trail
        self._seeds = seeds

    def quiet(self) -> AbstractContextManager[Any]:
        """Keeps libraries from telling about private rows, in messages and in exceptions."""
        return _quiet()

    def inherit(self, trainer: Any) -> InheritedTraining | None:
        """What ``trainer`` inherits where it charges nothing, else ``None``; refusals as of `plan_inheritance`."""
        from rlhf_audit_nb.privacy.descent import read_descent
        from rlhf_audit_nb.privacy.post_processing import check_trainer, is_post_processing, plan_inheritance
        from rlhf_audit_nb.privacy.reservation import read_ledger

        if not is_post_processing(trainer):
            return None
        check_trainer(trainer, self.config)
        self.trail.flush()  # what an earlier training of this run left counts
        reader = self.trail.reader()
        descent, ledger = read_descent(reader), read_ledger(reader, self.trail)
        return InheritedTraining(
            plan_inheritance(_inputs_of(trainer), self.config, descent, ledger, protected_digests(self.trail))
        )

    def plan(self, trainer: Any, *, done: int = 0) -> PlannedTraining:
        """The plan for ``trainer`` on top of what the trail holds; see `plan_training` for what is refused."""
        from rlhf_audit_nb.privacy.plan import plan_training
        from rlhf_audit_nb.privacy.replay import check_replaying, given_seeds, plan_replay
        from rlhf_audit_nb.privacy.reservation import read_ledger
        from rlhf_audit_nb.privacy.slots import given_slot

        seeds = self._seeds or given_seeds(self.trail)
        ledger = read_ledger(self.trail.reader(), self.trail)
        unit, column = self.config.unit, self.config.unit_column
        slot = given_slot() if seeds is None else None
        certain = ledger.certain(unit, column, drawing=slot)
        ledger.check(self.config)
        draw = ledger.draw(slot) if slot is not None else None

        def prior_of(roster: Roster) -> Sequence[Composable]:
            return ledger.mechanisms(unit, column, roster, drawing=slot)

        if seeds is not None:
            check_replaying(self.trail.reader(), seeds)
            plan = plan_replay(trainer, self.config, certain, prior_of, seeds.peek().reserved, done=done)
            return PlannedTraining(self.trail, plan, seeds=seeds)
        plan = plan_training(trainer, self.config, certain, prior_of, done=done, draw=draw)
        return PlannedTraining(self.trail, plan, _raised(ledger, self.config))


@contextmanager
def _quiet() -> Iterator[None]:
    from rlhf_audit_nb.privacy.quiet import concealed_errors, quiet_preparation

    with concealed_errors(), quiet_preparation():
        yield


class PlannedTraining:
    """One private training: what `rlhf_audit_nb.capture.run.PrivatePlan` asks for."""

    def __init__(self, trail: Trail, plan: Plan, raised: str = "", seeds: ReplaySeeds | None = None) -> None:
        self._trail = trail
        self._plan = plan
        self._raised = raised
        self._seeds = seeds

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
            sampled=plan.config.sampled,
            loss_deviation=plan.loss_deviation,
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
        from rlhf_audit_nb.events import PrivacyEngine
        from rlhf_audit_nb.privacy.engine import private_training
        from rlhf_audit_nb.privacy.plan import settle_event
        from rlhf_audit_nb.privacy.reservation import reserve
        from rlhf_audit_nb.privacy.sampling import SealedRandom

        randomness = SealedRandom.from_system() if self._seeds is None else SealedRandom(self._seeds.take().seed)
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
        canaries: Canaries | None = None

        def fell_back(engine: str, reason: str) -> None:
            run.record(PrivacyEngine(reservation=reservation, engine=engine, reason=reason))
            run.warn(
                f"The gradient engine that was planned ({self._plan.engine.engine}) is not used: {reason}. "
                f"This training uses the {engine}, with the same guarantee; it may take longer."
            )

        try:
            with private_training(trainer, self._plan, randomness, observer, fell_back=fell_back) as engine:
                try:
                    yield
                finally:
                    steps, stopped, canaries = engine.steps, engine.stopped_by_budget, engine.canaries
        finally:
            # A process that dies before this never settles: then the whole reservation counts.
            run.stopped_by_budget = stopped
            settled = settle_event(self._plan, reservation, steps, stopped_by_budget=stopped)
            run.record(settled)
            total = float(settled.epsilon_total)
            if total > (run.state.epsilon or 0.0):  # a step that was cut short is paid for, though it does not count
                run.state.add("epsilon", run.state.step, total)
            if canaries is not None:
                _tell_canaries(run, canaries, settled, self._plan.config.delta)


class InheritedTraining:
    """One training that charges nothing: what `rlhf_audit_nb.capture.run.InheritedPlan` asks for."""

    def __init__(self, inheritance: Inheritance) -> None:
        self._inheritance = inheritance

    @property
    def view(self) -> InheritedView:
        """What it inherits, for people."""
        from rlhf_audit_nb.capture.state import InheritedView

        found = self._inheritance
        runs = sorted({source["run"] for source in found.sources if source["run"] is not None})
        return InheritedView(unit=found.unit, epsilon=found.epsilon, delta=found.delta, runs=runs)

    @property
    def units(self) -> int | None:
        """Nothing that is protected is read."""
        return None

    @property
    def trained_as(self) -> dict[str, Any]:
        """The trainer's own settings run."""
        return {}

    def event(self) -> PrivacyInherited:
        """The entry that says so."""
        return self._inheritance.event()

    def training(self, trainer: Any) -> AbstractContextManager[None]:
        """Nothing is changed on the trainer."""
        del trainer
        return nullcontext()


def _tell_canaries(run: Run, canaries: Canaries, settled: PrivacySettled, delta: float) -> None:
    """Record what the canaries of a training show, and say it loudly where that contradicts its epsilon."""
    from rlhf_audit_nb.capture.state import AuditedView
    from rlhf_audit_nb.privacy.canaries import audited_event, audited_words

    event = audited_event(canaries, settled, delta)
    if event is None:
        run.warn("Nothing can be said by the canaries of this training: no step ended, or a gradient was not finite.")
        return
    run.record(event)
    failed = event.contradicts
    if run.state.privacy is not None:
        view = AuditedView(
            canaries=event.canaries,
            epsilon_claimed=float(event.epsilon_claimed),
            epsilon_lower=float(event.epsilon_lower),
            ceiling=float(event.ceiling),
            confidence=event.confidence,
            failed=failed,
        )
        run.state.privacy = replace(run.state.privacy, audited=view)
    if failed:
        run.warn(audited_words(event))


def _inputs_of(trainer: Any) -> Inputs:
    """What a GRPOTrainer or RLOOTrainer learns from, with the digests that tell where it comes from."""
    from rlhf_audit_nb.capture.data import column_names, digest_prompts, digest_rows
    from rlhf_audit_nb.privacy.post_processing import DataShown, FunctionShown, Inputs, digest_function
    from rlhf_audit_nb.privacy.post_processing import check_data as check

    def data(dataset: Any, role: str) -> DataShown:
        check(dataset, role)
        return DataShown(role, tuple(column_names(dataset)), digest_rows(dataset), digest_prompts(dataset))

    def reward(one: Any, name: str) -> ModelShown | FunctionShown:
        if hasattr(one, "state_dict"):
            return model_shown(trainer.accelerator.unwrap_model(one), name)
        return FunctionShown(name, digest_function(one))

    held_out = trainer.eval_dataset
    sets = [("evaluation", one) for one in (held_out.values() if isinstance(held_out, dict) else [held_out])]
    return Inputs(
        policy=model_shown(trainer.accelerator.unwrap_model(trainer.model), "policy"),
        rewards=tuple(map(reward, trainer.reward_funcs, trainer.reward_func_names)),
        data=tuple(data(one, role) for role, one in [("training", trainer.train_dataset), *sets] if one is not None),
        reference=None if trainer.ref_model is None
        else model_shown(trainer.accelerator.unwrap_model(trainer.ref_model), "reference"),
    )  # fmt: skip


def model_shown(model: Any, name: str) -> ModelShown:
    """A model in memory, known by the digests of its weights."""
    from rlhf_audit_nb.capture.weights import base_tensors, digest_tensors, final_tensors, has_one_adapter, loaded_from
    from rlhf_audit_nb.privacy.post_processing import ModelShown

    if not has_one_adapter(model):
        raise UnsupportedTrainerError(
            f"The model that is the {name} has several adapters, of which the trail can know one only.",
            next_step="Load it with the one adapter that is meant. Nothing was trained.",
            code="not-post-processing",
        )
    final, base = digest_tensors(final_tensors(model)), digest_tensors(base_tensors(model))
    return ModelShown(name, final, base if base != final else None, loaded_from(model))


def protected_digests(trail: Trail) -> set[str]:
    """Digests of rows and of prompts that private trainings of the trail read, as far as the vault still has them.

    Those of released labels are left out: there the label alone is protected, and no prompt.
    """
    return {
        digest
        for _, bound, half in private_halves(trail)
        for digest in (half.digest, half.prompts)
        if digest and bound.unit != "label"
    }


def private_halves(trail: Trail) -> Iterator[tuple[int, DataBound, DataPrivate]]:
    """What the vault holds of the data sets that private trainings read: the index of the entry, and both halves.

    What was erased, or is lost, is left out.

    Raises:
        VaultError: the vault does not open with this trail's key, or an opening is not its commitment's.
    """
    from rlhf_audit_nb.events import DataBound, DataPrivate, decode_body, decode_private

    with trail.reading_vault() as vault:
        for entry in trail.reader().entries(type=DataBound.TYPE):
            payload = vault.half(entry).payload
            if payload is None:
                continue
            bound, half = decode_body(entry.type, entry.body), decode_private(entry.type, payload)
            if isinstance(bound, DataBound) and isinstance(half, DataPrivate):
                yield entry.index, bound, half


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
