"""One training step made private: sampling, the clipped gradients' sum, noise, and the guard. Floor 2.

`private_training` swaps the class of an unmodified TRL trainer for a subclass of it while it trains, and puts
everything back afterwards. One optimizer step is then

1. sample (`draws`): each unit is in with chance q, by sealed randomness; of a unit at most k pairs are drawn. Where
   pairs are sampled one by one, each pair that was kept is in with chance q and stands below for a unit;
2. a gradient engine (`unit_gradients`) adds to a sum in float64 the gradient of the trainer's own loss over each
   sampled unit's pairs, over all trainable parameters, scaled as a whole to an L2 norm of at most C. A unit whose loss
   or gradient is not finite, or cannot be computed at all, contributes nothing;
3. canaries, where there are any, add what they bring in (`canaries`);
4. once: N(0, (sigma C)^2) is added to each coordinate of every trainable parameter, and the result is divided by the
   *expected* number of units q N (of places q k N), canaries counted among them, and written to ``.grad``. An empty
   sample gives noise alone. The sample's loss is released beside it, clipped and noised as well (`live_loss`), unless
   that was turned off.

Dropout (of LoRA, for instance) draws from torch's generator, which is seeded apart for every unit and step from the
sealed seed, so that one unit's masks do not depend on which units came before it; torch's global generator is neither
used nor moved.

A training may go on from a checkpoint: it is a training of its own, with a plan for the steps that remain and a seed of
its own. The checkpoint gives weights, optimizer, schedule and step count, all of which the mechanism has released;
``rng_state.pth`` is not read, since nothing is drawn from it.

What the trainer would log about the data is taken away from it (`quiet_training`) and goes to the observer, who keeps
it in the vault.

Nothing steps the optimizer without noise: a hook in front of the optimizer's own ``step`` aborts the training
unless the mechanism ran for exactly this step, and only over parameters that it covered.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback

from rlhf_audit_nb.errors import AuditError, PrivacyError, UnsupportedTrainerError
from rlhf_audit_nb.privacy.canaries import Canaries
from rlhf_audit_nb.privacy.engine_check import CheckedRows, FellBack
from rlhf_audit_nb.privacy.engine_choice import ROWS
from rlhf_audit_nb.privacy.live_loss import LossObserver
from rlhf_audit_nb.privacy.plan import data_fingerprint
from rlhf_audit_nb.privacy.quiet import quiet_preparation, unheard
from rlhf_audit_nb.privacy.quiet_training import (
    PUBLIC_LOGS,
    clear_metrics,
    kept_counters,
    quiet_callbacks,
    trainer_metrics,
    without_private_results,
)
from rlhf_audit_nb.privacy.supported import check_supported, check_unit, token_normaliser
from rlhf_audit_nb.privacy.unit_gradients import (
    Buffer,
    GradientEngine,
    LoopEngine,
    Sampled,
    Seen,
    Sums,
    own_generators,
    probe,
    refuse_gradient_hooks,
    refuse_moved_buffers,
    watch_buffers,
)

if TYPE_CHECKING:
    from rlhf_audit_nb.privacy.plan import Plan
    from rlhf_audit_nb.privacy.sampling import SealedRandom

__all__ = ["PrivacyObserver", "PrivateTraining", "private_training"]

_ENGINE = "_rlhf_audit_engine"


class PrivacyObserver(Protocol):
    """Who is told about each step, in private."""

    def on_private_step(self, step: int, epsilon: float, metrics: dict[str, float | int | str]) -> None:
        """A step's mechanism ran: ``step`` counts from 1, ``epsilon`` is public, ``metrics`` belong in the vault."""


class PrivateTraining:
    """The state of one private training; the value of the ``with private_training(...)`` block.

    Attributes:
        plan: what it follows.
        steps: steps whose sampling has begun; these count as spent, even where one was cut short.
        stopped_by_budget: whether training ended because the next step would have crossed the budget.
        guarded: whether the guard stands in front of an optimizer's steps.
        canaries: the canaries that take part; ``None`` before the first step, and where there are none.
    """

    def __init__(
        self,
        plan: Plan,
        randomness: SealedRandom,
        observer: PrivacyObserver | None,
        tokens: int | None = None,
        fell_back: FellBack | None = None,
    ) -> None:
        self.plan = plan
        self._tokens = tokens
        self._fell_back = fell_back
        self.steps = 0
        self.stopped_by_budget = False
        self._random = randomness
        self._draws = plan.draws(randomness)
        self._observer = observer
        self._sums: Sums | None = None
        self._gradients: GradientEngine | None = None
        self._rows: Any = None
        self._buffers: list[Buffer] = []
        self._pending = False
        self._noised = False
        self._started = False
        self.guarded = False
        self.canaries: Canaries | None = None
        self._metrics: dict[str, float | int | str] = {}
        self._loss_sum = 0.0

    @property
    def epsilon(self) -> float:
        """The composed total after the steps so far."""
        return self.plan.curve[self.steps]

    def begin(self, trainer: Any) -> None:
        """Fix what is trained: called once, when the training loop starts.

        Raises:
            PrivacyError: a second training with the same plan, or data or options that changed since it was made.
        """
        if self._started:
            raise PrivacyError(
                "A plan serves one training.", next_step="Call trainer.train() once per plan.", code="plan-reused"
            )
        if data_fingerprint(trainer.train_dataset) != self.plan.fingerprint:
            raise PrivacyError(
                "The training data was changed after the privacy plan was made.",
                next_step="Set the data before training starts.",
                code="data-changed",
            )
        self._started = True
        rows = trainer._remove_unused_columns(trainer.train_dataset)  # noqa: SLF001 - as Trainer does itself
        self._rows = rows
        micro_batch = self.plan.config.micro_batch or max(1, trainer.args.per_device_train_batch_size)
        if self.plan.engine.engine == ROWS:
            self._gradients = CheckedRows(rows, self._tokens, micro_batch, self._fell_back)
        else:
            self._gradients = LoopEngine(rows, self._tokens, micro_batch)

    def cover(self, model: torch.nn.Module) -> Sums:
        """Take all trainable parameters of the model under the mechanism."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        refuse_gradient_hooks(parameters)
        self._buffers = watch_buffers(model)
        self._sums = Sums(parameters, self.plan.clipping_norm)
        if self.plan.canaries:
            self.canaries = Canaries(self._random, self._draws, parameters, self.plan.clipping_norm, self.plan.canaries)
        return self._sums

    def _prepare(self, trainer: Any, model: torch.nn.Module) -> Sums:
        """Before the first step: what is trained, and whether it can be at all; no real row is looked at."""
        sums = self.cover(model)
        with own_generators():
            probe(trainer, model, self._rows, self._tokens)
            if isinstance(self._gradients, CheckedRows):
                self._gradients.prepare(trainer, model, sums)
                model.zero_grad(set_to_none=True)
        refuse_moved_buffers(self._buffers)
        clear_metrics(trainer)
        return sums

    def step(self, trainer: Any, model: torch.nn.Module) -> None:
        """Sample units and sum their clipped gradients; the noise is still to come.

        Raises:
            PrivacyError: the plan allows no further step, or the last one was not finished.
        """
        if self._pending:
            raise PrivacyError("The last step was not finished; training was aborted.", code="unfinished-step")
        if self.steps >= self.plan.steps:
            raise PrivacyError(
                f"The privacy plan allows no step after step {self.plan.steps}; training was aborted.",
                next_step="Plan again: the next run needs a reservation of its own.",
                code="plan-exhausted",
            )
        sums = self._sums or self._prepare(trainer, model)
        index, self.steps, self._pending = self.steps, self.steps + 1, True
        started = time.perf_counter()
        sums.zero()
        seen = Seen()
        with own_generators(), unheard():
            self._add_gradients(trainer, model, self._sample(index), sums, seen)
        if self.canaries is not None:
            self.canaries.add(index, sums.tensors)
        refuse_moved_buffers(self._buffers)
        model.zero_grad(set_to_none=True)
        self._loss_sum = self.plan.live_loss.clipped_sum(seen.losses) if self.plan.live_loss is not None else 0.0
        self._metrics = {**seen.summary(), **trainer_metrics(trainer), "seconds": time.perf_counter() - started}

    def privatise(self) -> None:
        """Add the step's noise and write the private gradient to ``.grad``; once per step, later calls do nothing."""
        if not self._pending or self._sums is None:
            return
        plan = self.plan
        deviation = plan.noise_multiplier * plan.clipping_norm
        for index, (parameter, total) in enumerate(zip(self._sums.parameters, self._sums.tensors, strict=True)):
            noise = torch.from_numpy(self._random.normals(self.steps - 1, index, total.numel()))
            total.add_(noise.view(total.shape).to(total.device), alpha=deviation).div_(plan.divisor)
            parameter.grad = total.to(device=parameter.device, dtype=parameter.dtype, copy=True)
            total.zero_()
        self._pending, self._noised = False, True
        if self.canaries is not None:
            self.canaries.look(self._sums.parameters)
        self._release_loss()
        if self._observer is not None:
            self._observer.on_private_step(self.steps, self.epsilon, self._metrics)
        self._metrics = {}

    def _release_loss(self) -> None:
        plan, observer = self.plan, cast("object", self._observer)
        if plan.live_loss is not None and isinstance(observer, LossObserver):
            loss = plan.live_loss.release(self._loss_sum, self._random, self.steps - 1, plan.expected_units)
            observer.on_private_loss(self.steps, loss)
        self._loss_sum = 0.0

    def guard(self, optimizer: Any, *_: Any) -> None:
        """In front of every optimizer step: abort unless what is about to be applied is private.

        Raises:
            PrivacyError: no noise was added for this step, or a gradient is not one that the mechanism covers.
        """
        if not self._noised:
            raise PrivacyError(
                "An optimizer step was about to be taken without its noise; training was aborted.",
                next_step="Do not step the optimizer yourself during a private training.",
                code="no-noise",
            )
        covered = {id(parameter) for parameter in self._parameters()}
        for group in optimizer.param_groups:
            if any(item.grad is not None and id(item) not in covered for item in group["params"]):
                raise PrivacyError(
                    "The optimizer holds a gradient that the privacy mechanism does not cover; training was aborted.",
                    next_step="Do not add or unfreeze parameters during a private training.",
                    code="uncovered-parameter",
                )
        self._noised = False

    def close(self) -> None:
        """Forget sums and gradients, so that nothing unprotected is left behind."""
        self._metrics, self._loss_sum = {}, 0.0
        for parameter in self._parameters():
            parameter.grad = None
        self._sums = self._gradients = self._rows = None

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [] if self._sums is None else self._sums.parameters

    def _sample(self, step: int) -> list[Sampled]:
        return [Sampled(one.rows, self._random.torch_seed(step, one.index)) for one in self._draws.sample(step)]

    def _add_gradients(
        self, trainer: Any, model: torch.nn.Module, sampled: list[Sampled], sums: Sums, seen: Seen
    ) -> None:
        if self._gradients is None:
            raise PrivacyError("The training was not begun; training was aborted.", code="not-begun")
        try:
            self._gradients.add(trainer, model, sampled, sums, seen)
        except (AuditError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise self._private_failure(error) from None

    def _private_failure(self, error: Exception) -> PrivacyError:
        """An error while private rows were computed with: its text may quote them, so it goes to the vault alone."""
        if self._observer is not None:
            told = {"error": f"{type(error).__name__}: {error}"}
            self._observer.on_private_step(self.steps, self.epsilon, cast("dict[str, float | int | str]", told))
        return PrivacyError(
            f"The gradients of a step could not be computed ({type(error).__name__}); training was aborted.",
            next_step="The details may quote private data, so they are kept in the vault. Where memory ran out: a "
            "smaller per_device_train_batch_size or max_length.",
            code="unit-failed",
        )


@contextlib.contextmanager
def private_training(
    trainer: Any,
    plan: Plan,
    randomness: SealedRandom,
    observer: PrivacyObserver | None = None,
    *,
    fell_back: FellBack | None = None,
) -> Iterator[PrivateTraining]:
    """While inside, one ``train()`` of ``trainer`` is private as ``plan`` says; afterwards all is as it was.

    ::

        with private_training(trainer, plan, SealedRandom.from_system(), observer) as training:
            original_train(trainer)
        training.steps, training.stopped_by_budget

    Args:
        trainer: a TRL trainer that `check_supported` accepts.
        plan: what `plan_training` made for this trainer.
        randomness: a sealed seed that has served no other training.
        observer: is given each step's private metrics.
        fell_back: is told, before the first step, that another engine runs than the plan names: which, and why.

    Raises:
        PrivacyError: the trainer changed since the plan was made, or the seed has been used.
    """
    check_supported(trainer)
    check_unit(trainer, "pair" if plan.config.sampled == "pairs" else plan.config.unit)
    randomness.claim()
    engine = PrivateTraining(plan, randomness, observer, token_normaliser(trainer), fell_back)
    with contextlib.ExitStack() as stack:
        stack.callback(engine.close)
        stack.enter_context(_swapped_class(trainer, engine))
        stack.enter_context(quiet_callbacks(trainer, _StopsInTime(engine)))
        stack.enter_context(kept_counters(trainer))
        stack.enter_context(quiet_preparation())
        yield engine


class PrivateTrainerMixin:
    """Stands in front of a TRL trainer's class while it trains: what a step is, and what may be said about it."""

    def get_train_dataloader(self) -> Any:
        """One item per micro-step, without data: the units are fetched and collated when their step comes."""
        trainer, engine = _both(self)
        return _micro_steps(engine.plan.steps_per_epoch, trainer.args.gradient_accumulation_steps)

    def create_optimizer(self, model: Any = None) -> Any:
        """The trainer's own optimizer, with the guard in front of its steps."""
        trainer, engine = _both(self)
        optimizer = super().create_optimizer(model)  # type: ignore[misc]
        _guard_optimizer(trainer, engine, optimizer)
        return optimizer

    def training_step(self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """On the first micro-step, the whole logical batch of units; on the others nothing. The loss is not told."""
        del num_items_in_batch
        trainer, engine = _both(self)
        if inputs["micro_step"] == 0:
            model.train()
            if callable(getattr(trainer.optimizer, "train", None)):
                trainer.optimizer.train()
            engine.step(trainer, model)
        return torch.zeros((), device=trainer.args.device)

    def _clip_grad_norm(self, model: Any) -> Any:
        _both(self)[1].privatise()
        return super()._clip_grad_norm(model)  # type: ignore[misc]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        _both(self)[1].privatise()
        return super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep what is public of ``logs`` (in place: ``train()`` returns the same dict), and add epsilon."""
        trainer, engine = _both(self)
        del start_time  # the time since then depends on the sampled data
        for name in [name for name in logs if name not in PUBLIC_LOGS]:
            del logs[name]
        clear_metrics(trainer)
        if trainer.state.epoch is not None:
            logs["epoch"] = trainer.state.epoch
        logs["epsilon"] = engine.epsilon
        trainer.state.log_history.append({**logs, "step": trainer.state.global_step})
        trainer.control = trainer.callback_handler.on_log(trainer.args, trainer.state, trainer.control, logs)

    def _inner_training_loop(
        self,
        batch_size: Any = None,
        args: Any = None,
        resume_from_checkpoint: Any = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
    ) -> Any:
        trainer, engine = _both(self)
        if trial is not None:
            raise _cannot_search()
        check_supported_options(trainer)
        engine.begin(trainer)
        output = super()._inner_training_loop(  # type: ignore[misc]
            batch_size=batch_size,
            args=args,
            resume_from_checkpoint=resume_from_checkpoint,
            ignore_keys_for_eval=ignore_keys_for_eval,
        )
        return without_private_results(output)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The checkpoint's own, and of its log what a private training would have left in it."""
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        trainer, _ = _both(self)
        trainer.state.log_history = [
            {name: value for name, value in logs.items() if name in PUBLIC_LOGS or name == "step"}
            for logs in trainer.state.log_history
        ]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: whatever is drawn in a private training comes from its sealed seed."""

    def _evaluate(self, *_: Any, **__: Any) -> Any:
        raise UnsupportedTrainerError(
            "Evaluation during a private training would show losses of data that may be protected.",
            next_step="Evaluate on unprotected data after the run.",
        )


class _MicroSteps(Dataset[dict[str, int]]):
    """An epoch's micro-steps, which hold no data; made when they are asked for, since a small q makes epochs long."""

    def __init__(self, steps: int, accumulation: int) -> None:
        self._count = steps * accumulation
        self._accumulation = accumulation

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, item: int) -> dict[str, int]:
        return {"micro_step": item % self._accumulation}


def _micro_steps(steps: int, accumulation: int) -> DataLoader[dict[str, int]]:
    """The data loader of a private training: torch's own, which accelerate can take apart where an epoch is resumed."""
    # A generator of its own: starting an epoch would otherwise draw from torch's global one.
    return DataLoader(
        _MicroSteps(steps, accumulation), batch_size=1, collate_fn=itemgetter(0), generator=torch.Generator()
    )


class _StopsInTime(TrainerCallback):
    """Ends the training after the last step that the plan allows."""

    def __init__(self, engine: PrivateTraining) -> None:
        self._engine = engine

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A release that makes its optimizer in another way would go unguarded."""
        del args, state, control
        if not self._engine.guarded:
            raise PrivacyError(
                "Training was about to begin with an optimizer whose steps are not guarded; nothing was trained.",
                next_step="Install the releases of transformers and TRL that the package was tested with.",
                code="unguarded",
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        engine = self._engine
        if engine.steps >= engine.plan.steps and state.global_step < state.max_steps:
            engine.stopped_by_budget = True
            control.should_training_stop = True
            if str(getattr(args.save_strategy, "value", args.save_strategy)) != "no":
                control.should_save = True
        return control


def _both(mixed: Any) -> tuple[Any, PrivateTraining]:
    return mixed, cast("PrivateTraining", vars(mixed)[_ENGINE])


def check_supported_options(trainer: Any) -> None:
    """`check_supported` for a trainer whose class is already swapped: its options may have changed meanwhile."""
    mixed = type(trainer)
    trainer.__class__ = mixed.__mro__[2]
    try:
        check_supported(trainer)
    finally:
        trainer.__class__ = mixed


def _cannot_search() -> UnsupportedTrainerError:
    return UnsupportedTrainerError(
        "A hyperparameter search trains many times on the same data, and choosing among the results costs privacy.",
        next_step="Train once with settings chosen on unprotected data.",
        code="search",
    )


def _guard_optimizer(trainer: Any, engine: PrivateTraining, optimizer: Any) -> None:
    """Put the guard in front of the innermost optimizer's steps, once."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UnsupportedTrainerError(
            f"{type(optimizer).__name__} is not a torch optimizer; its steps cannot be guarded.",
            next_step='Write optim="adamw_torch".',
        )
    stack: contextlib.ExitStack = vars(trainer)[f"{_ENGINE}_hooks"]
    stack.callback(optimizer.register_step_pre_hook(engine.guard).remove)
    engine.guarded = True


@contextlib.contextmanager
def _swapped_class(trainer: Any, engine: PrivateTraining) -> Iterator[None]:
    original = type(trainer)
    mixed = type(f"Private{original.__name__}", (PrivateTrainerMixin, original), {"__module__": __name__})
    with contextlib.ExitStack() as hooks:
        vars(trainer)[_ENGINE] = engine
        vars(trainer)[f"{_ENGINE}_hooks"] = hooks
        trainer.__class__ = mixed
        try:
            yield
        finally:
            trainer.__class__ = original
            del vars(trainer)[_ENGINE], vars(trainer)[f"{_ENGINE}_hooks"]
