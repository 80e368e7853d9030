"""The plan of one training: who is a unit, how much noise, how many steps, and what it will have cost. Floor 2.

A plan is made before the data is touched by training, from what the ledger already holds; it is everything that the
reservation in the trail needs, and everything that the engine follows. The epsilon in it is computed from the very
numbers that the engine samples with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.errors import BudgetExceededError, DataError, PrivacyError
from rlhf_audit_nb.events import PrivacyReserved, PrivacySealed, PrivacySettled, number
from rlhf_audit_nb.privacy.accountant import (
    Accounted,
    Composable,
    Mechanism,
    calibrate,
    compose,
    composed_epsilon,
    epsilon_curve,
    max_steps,
)
from rlhf_audit_nb.privacy.canaries import check_room
from rlhf_audit_nb.privacy.draws import Draws
from rlhf_audit_nb.privacy.engine_choice import LOOP, Choice, choose_engine
from rlhf_audit_nb.privacy.live_loss import LiveLoss, effective_noise, live_loss, usual_bound
from rlhf_audit_nb.privacy.populations import Roster
from rlhf_audit_nb.privacy.sampling import GENERATOR
from rlhf_audit_nb.privacy.slots import Draw, check_covered, within_slot
from rlhf_audit_nb.privacy.supported import check_supported, check_unit
from rlhf_audit_nb.privacy.units import Units, build_units, read_ids

if TYPE_CHECKING:
    from rlhf_audit_nb.config import PrivacyConfig
    from rlhf_audit_nb.privacy.sampling import SealedRandom

__all__ = [
    "MECHANISM",
    "PAIR_MECHANISM",
    "Plan",
    "check_supported",
    "plan_training",
    "plan_units",
    "reserve_event",
    "sealed_event",
    "settle_event",
]

MECHANISM = "Poisson-subsampled Gaussian"
PAIR_MECHANISM = "Gaussian over Poisson-sampled pairs, accounted for all pairs of a unit together"
_NOT_CHOSEN = Choice(LOOP, "the trainer was not looked at")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one training will do and cost; every number in it but the rows is public under zero-out adjacency.

    Attributes:
        config: what was asked for.
        units: the roster (row numbers; not public).
        mechanism: what is accounted for: the effective noise multiplier, q and the steps that may be taken.
        steps_asked: the steps that the trainer was set up for; more than ``mechanism.steps`` where the budget is short.
        steps_per_epoch: ceil(1 / q): how often an epoch samples, so that each unit is expected once.
        prior: what the ledger held before.
        before: composed epsilon of ``prior``.
        limit: the composed epsilon that this training may reach.
        accounted: the composed total at the planned end, by each accountant.
        curve: composed total after 0, 1, ... steps; never understates.
        warnings: what a person should know about these settings, as sentences.
        fingerprint: of the prepared data set, to notice that it was changed between plan and training.
        roster: whom the units are; ``None`` where that is not known, as of pairs.
        engine: which gradient engine computes it, and why.
        live_loss: how each step's loss is released; ``None`` where none is.
        draw: the budget that a sweep holds for it, whose place it takes; ``None`` where it reserves for itself.
    """

    config: PrivacyConfig
    units: Units
    mechanism: Mechanism
    steps_asked: int
    steps_per_epoch: int
    prior: tuple[Composable, ...]
    before: float
    limit: float
    accounted: Accounted
    curve: tuple[float, ...]
    warnings: tuple[str, ...]
    fingerprint: str
    roster: Roster | None = None
    engine: Choice = _NOT_CHOSEN
    live_loss: LiveLoss | None = None
    draw: Draw | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps that may be taken."""
        return self.mechanism.steps

    @property
    def noise_multiplier(self) -> float:
        """Sigma: the standard deviation of the gradient's noise in units of the clipping norm."""
        return self.mechanism.noise_multiplier if self.live_loss is None else self.live_loss.gradient_noise

    @property
    def loss_deviation(self) -> float | None:
        """The standard deviation of the noise in one released loss; ``None`` where none is released."""
        return self.live_loss.deviation(self.expected_units) if self.live_loss is not None else None

    @property
    def sampling_rate(self) -> float:
        """q: the chance of each unit in each step."""
        return self.mechanism.sampling_rate

    @property
    def clipping_norm(self) -> float:
        """C: the bound on one unit's contribution (L2)."""
        return self.config.clipping_norm

    @property
    def expected_units(self) -> float:
        """Expected sample size q N, whatever was sampled: what the noisy sum of losses is divided by in every step.

        Where pairs are sampled one by one it is q k N, as if every unit had k pairs: how many it has is private.
        """
        return self.sampling_rate * places(self.config, len(self.units))

    @property
    def canaries(self) -> int:
        """m: how many canaries take part in it with chance 1/2."""
        return self.config.canaries or 0

    @property
    def divisor(self) -> float:
        """What the noisy sum of gradients is divided by in every step: q (N + m), with canaries counted as units."""
        return self.expected_units + self.sampling_rate * places(self.config, self.canaries)

    @property
    def epsilon(self) -> float:
        """The composed total at the planned end."""
        return self.accounted.epsilon

    @property
    def cut_by_budget(self) -> bool:
        """Whether fewer steps fit than were asked for."""
        return self.steps < self.steps_asked

    @property
    def notice(self) -> str | None:
        """The sentence to show where the budget allows fewer steps than were asked for."""
        if not self.cut_by_budget:
            return None
        return (
            f"The privacy budget allows {self.steps} of the {self.steps_asked} steps asked for at noise multiplier "
            f"{self.noise_multiplier:g}: training will stop after step {self.steps}, at epsilon "
            f"{self.epsilon:.3f} of {self.limit:g}, and save."
        )

    def draws(self, randomness: SealedRandom) -> Draws:
        """The samples of the training, from its sealed seed."""
        return Draws(
            randomness,
            self.units.members,
            self.sampling_rate,
            self.config.max_pairs_per_unit,
            pairs=self.config.sampled == "pairs",
            canaries=self.canaries,
        )

    def replanned(self, prior: Sequence[Composable], draw: Draw | None = None) -> Plan:
        """The same training on top of another ledger, without looking at the trainer again.

        ``draw`` is its claim to budget that is held for it, as that ledger has it.

        Raises:
            BudgetExceededError: nothing fits any more.
        """
        if tuple(prior) == self.prior:
            return self
        plan = plan_units(
            self.config,
            self.units,
            self.sampling_rate,
            self.steps_asked,
            self.steps_per_epoch,
            prior,
            self.fingerprint,
            draw=draw,
        )
        return replace(plan, roster=self.roster, engine=self.engine)


def plan_training(
    trainer: Any,
    config: PrivacyConfig,
    prior: Sequence[Composable] = (),
    prior_of: Callable[[Roster], Sequence[Composable]] | None = None,
    *,
    done: int = 0,
    draw: Draw | None = None,
) -> Plan:
    """Plan the training that ``trainer`` is set up for, on top of what was spent before.

    Nothing is trained and no row's content is read; only the annotator column is.

    Args:
        trainer: the trainer, set up.
        config: what is asked for.
        prior: what counts whoever is on the roster: where that leaves nothing, not even the roster is read.
        prior_of: what counts for those who are on it, once it is known; without it, ``prior`` is all.
        done: the steps that lie behind a training which is resumed from a checkpoint: the plan is for what remains.
        draw: the budget that a sweep holds for it; ``prior`` is then what counts beside that.

    Raises:
        UnsupportedTrainerError: the trainer, its loss or an option cannot be made private.
        DataError: the data has no rows, no such column, or a row without an id.
        ConfigError: more canaries than trained numbers.
        BudgetExceededError: not a single step fits.
        PrivacyError: the accountants disagree, no step remains (``no-steps-left``), or the training would cost more
            than is held for it (``slot-exceeded``).
    """
    check_supported(trainer)
    check_unit(trainer, config.unit)
    if config.sampled == "pairs":
        check_unit(trainer, "pair")
    engine = choose_engine(trainer, config)
    if config.canaries is not None:
        check_room(trainer, config.canaries)
    if composed_epsilon(prior, config.delta) >= config.epsilon:  # said before even the roster is read
        raise _exhausted(config, composed_epsilon(prior, config.delta))
    dataset = _dataset(trainer)
    units, roster = _units(dataset, config)
    if prior_of is not None and roster is not None:
        prior = prior_of(roster)
    rate = config.sampling_rate or _default_rate(trainer.args, places(config, len(units)))
    per_epoch = max(1, math.ceil(1 / rate - 1e-9))
    asked = trainer.args.max_steps
    if asked <= 0:
        asked = math.ceil(trainer.args.num_train_epochs * per_epoch)
    if done >= asked > 0:
        raise PrivacyError(
            f"The checkpoint is at step {done} of {asked}: no step is left to train, and nothing was reserved.",
            next_step="Ask for more steps (max_steps, num_train_epochs), or take the checkpoint's model as it is.",
            code="no-steps-left",
        )
    if config.loss_bound is None:
        config = replace(config, loss_bound=usual_bound(trainer))
    plan = plan_units(config, units, rate, asked - done, per_epoch, prior, data_fingerprint(dataset), draw=draw)
    return replace(plan, roster=roster, engine=engine)


def plan_units(
    config: PrivacyConfig,
    units: Units,
    rate: float,
    asked: int,
    per_epoch: int,
    prior: Sequence[Composable] = (),
    fingerprint: str = "",
    *,
    draw: Draw | None = None,
) -> Plan:
    """Plan ``asked`` steps over a roster that is known, each unit (or each kept pair) sampled with chance ``rate``.

    Raises:
        BudgetExceededError: not a single step fits; with ``draw``: not all of them do.
        PrivacyError: the accountants disagree; the training would cost more than is held for it (``slot-exceeded``).
    """
    before = composed_epsilon(prior, config.delta)
    limit = config.epsilon if config.run_epsilon is None else min(config.epsilon, before + config.run_epsilon)
    if draw is not None:
        mechanism = within_slot(draw.slot, config, rate, asked)
    else:
        mechanism = _mechanism(config, rate, asked, prior, before, limit)
    loss = live_loss(
        config.loss_noise, config.loss_bound, effective=mechanism.noise_multiplier, gradient=config.noise_multiplier
    )
    if loss is not None:
        mechanism = replace(mechanism, noise_multiplier=loss.effective)
    if draw is not None:
        check_covered(draw.slot, mechanism)
    accounted = compose([*prior, mechanism], config.delta)
    if draw is not None and accounted.epsilon > limit:
        raise _exhausted(config, before, asked)
    return Plan(
        config=config,
        units=units,
        mechanism=mechanism,
        steps_asked=asked,
        steps_per_epoch=per_epoch,
        prior=tuple(prior),
        before=before,
        limit=limit,
        accounted=accounted,
        curve=tuple(epsilon_curve(mechanism, config.delta, prior)),
        warnings=(*_warnings(config, len(units), mechanism), *accounted.notes),
        fingerprint=fingerprint,
        live_loss=loss,
        draw=draw,
    )


def places(config: PrivacyConfig, units: int) -> int:
    """What a step draws from: the units, or the k places of every unit; a public number."""
    return units * config.max_pairs_per_unit if config.sampled == "pairs" else units


def data_fingerprint(dataset: Any) -> str:
    """What tells one prepared data set from another within a process; stays in memory."""
    return f"{getattr(dataset, '_fingerprint', id(dataset))}:{len(dataset)}"


def reserve_event(
    plan: Plan, reservation: str, population: str | None = None, *, generator: str = GENERATOR
) -> PrivacyReserved:
    """The public description of the plan: the event that reserves its whole spend, for the roster ``population``."""
    accounted = plan.accounted
    return PrivacyReserved(
        reservation=reservation,
        unit=plan.units.unit,
        adjacency=plan.config.adjacency,
        mechanism=PAIR_MECHANISM if plan.config.sampled == "pairs" else MECHANISM,
        engine=plan.engine.engine,
        generator=generator,
        units=len(plan.units),
        clipping_norm=plan.clipping_norm,
        noise_multiplier=plan.noise_multiplier,
        loss_noise_multiplier=plan.live_loss.noise_multiplier if plan.live_loss is not None else None,
        loss_bound=plan.live_loss.bound if plan.live_loss is not None else None,
        sampling_rate=plan.sampling_rate,
        steps=plan.steps,
        steps_asked=plan.steps_asked,
        max_pairs_per_unit=plan.config.max_pairs_per_unit,
        delta=plan.config.delta,
        epsilon_budget=plan.config.epsilon,
        epsilon_before=number(plan.before),
        epsilon_planned=number(plan.epsilon),
        accountants={
            "pld": number(accounted.epsilon),
            "pld_grid": accounted.grid,
            "prv": accounted.prv if isinstance(accounted.prv, str) else number(accounted.prv),
            "rdp": accounted.rdp if isinstance(accounted.rdp, str) else number(accounted.rdp),
        },
        column=plan.config.unit_column,
        sampled=plan.config.sampled,
        population=population,
        canaries=plan.config.canaries,
        slot=plan.draw.slot.id if plan.draw is not None else None,
    )


def sealed_event(randomness: SealedRandom) -> PrivacySealed:
    """The private half of the reservation: the seed, for the vault."""
    return PrivacySealed(seed=randomness.seed.hex())


def settle_event(plan: Plan, reservation: str, steps: int, *, stopped_by_budget: bool = False) -> PrivacySettled:
    """The event that puts the ``steps`` that ran in the reservation's place; its epsilons are composed anew.

    Raises:
        PrivacyError: more steps than were planned.
    """
    if not 0 <= steps <= plan.steps:
        raise PrivacyError(f"{steps} steps cannot settle a plan of {plan.steps}.", code="ledger")
    ran = plan.mechanism.with_steps(steps)
    return PrivacySettled(
        reservation=reservation,
        steps=steps,
        epsilon_run=number(composed_epsilon([ran], plan.config.delta)),
        epsilon_total=number(composed_epsilon([*plan.prior, ran], plan.config.delta)),
        stopped_by_budget=stopped_by_budget,
    )


def _dataset(trainer: Any) -> Any:
    dataset = trainer.train_dataset
    if dataset is None or not hasattr(dataset, "column_names") or not hasattr(dataset, "__len__"):
        raise DataError(
            "The training data is a stream or not a data set of `datasets`; units cannot be sampled from it.",
            next_step="Pass a datasets.Dataset (for a stream: Dataset.from_generator, or load it without streaming).",
            code="streaming-data",
        )
    if (getattr(dataset, "format", None) or {}).get("type") == "custom":
        raise DataError(
            "The training data has a transform of its own, which runs whenever a row is read; it cannot be shown to "
            "keep units apart, and what it makes is not what is recorded.",
            next_step="Apply it before the trainer is made: dataset.map(...).",
            code="data-transform",
        )
    return dataset


def _units(dataset: Any, config: PrivacyConfig) -> tuple[Units, Roster | None]:
    """The units, and who they are where they have names."""
    rows, kept = _before_dropping(dataset)
    ids = None
    if config.unit == "annotator" and rows:
        whole = kept is not None
        ids = read_ids(
            dataset.column_names,
            config.annotator_column,
            lambda column: dataset.data.column(column).to_pylist() if whole else dataset[column],
        )
    units = build_units(ids, rows, config.unit, kept)
    return units, None if ids is None else Roster.of(ids, len(units))


def _before_dropping(dataset: Any) -> tuple[int, list[int] | None]:
    """How many rows there were before the trainer dropped any, and which of these the prepared rows are.

    `datasets` drops rows by a list of those that stay, over a table that still holds all of them. (A selection of the
    user's own is not in that table any more: trainers map their data first, which writes a new one.)
    """
    chosen = getattr(dataset, "_indices", None)
    if chosen is None:
        return len(dataset), None
    return dataset.data.num_rows, chosen.column(0).to_pylist()


def _default_rate(args: Any, places: int) -> float:
    return float(min(1.0, args.per_device_train_batch_size * args.gradient_accumulation_steps / places))


def _mechanism(
    config: PrivacyConfig, rate: float, asked: int, prior: Sequence[Composable], before: float, limit: float
) -> Mechanism:
    if before >= limit:
        raise _exhausted(config, before, asked)
    pairs = config.max_pairs_per_unit if config.sampled == "pairs" else 1
    if config.noise_multiplier is None:
        try:
            return Mechanism(calibrate(limit, config.delta, rate, asked, prior, pairs=pairs), rate, asked, pairs)
        except PrivacyError as error:
            if error.reason != "no-noise-fits":
                raise
            raise _exhausted(config, before, asked) from error
    ratio = config.loss_noise
    noise = effective_noise(config.noise_multiplier, ratio and ratio * config.noise_multiplier)
    steps = max_steps(limit, config.delta, noise, rate, prior, at_most=asked, pairs=pairs)
    if steps == 0:
        raise _exhausted(config, before, asked)
    return Mechanism(noise, rate, steps, pairs)


def _exhausted(config: PrivacyConfig, before: float, asked: int | None = None) -> BudgetExceededError:
    left = max(config.epsilon - before, 0.0)
    noise = "" if config.noise_multiplier is None else f" at noise multiplier {config.noise_multiplier:g}"
    this_run = "" if config.run_epsilon is None else f" (this run may add {config.run_epsilon:g})"
    none_fits = "not a single step fits" if asked is None else f"none of the {asked} steps fits"
    return BudgetExceededError(
        f"The privacy budget does not allow this run: epsilon {before:.4g} of {config.epsilon:g} is spent or reserved, "
        f"{left:.4g} is left{this_run}, and {none_fits}{noise}.",
        next_step="Choose fewer steps, more noise (a larger noise_multiplier or a smaller sampling_rate), or a larger "
        "budget (epsilon; where the trail's was set, `rlhf-audit budget set`); nothing was trained.",
    )


def _warnings(config: PrivacyConfig, units: int, mechanism: Mechanism) -> tuple[str, ...]:
    found = []
    if config.delta >= 1 / units:
        found.append(
            f"delta is {config.delta:g}, not below 1 / {units} {config.unit}s: with that chance a unit's data may be "
            f"exposed altogether. Write delta={10 ** math.floor(math.log10(1 / units) - 1):g} or less."
        )
    expected = mechanism.sampling_rate * places(config, units)
    if mechanism.noise_multiplier > expected:
        what = "pair" if config.sampled == "pairs" else config.unit
        found.append(
            f"The noise (multiplier {mechanism.noise_multiplier:.3g}) is larger than all of an expected sample "
            f"({expected:.3g} {what}s) can weigh: little can be learnt. Use more data, "
            f"a larger batch, fewer steps or a larger epsilon."
        )
    return tuple(found)
