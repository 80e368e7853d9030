"""How a trainer that knows nothing of auditing comes to be recorded. Floor 2.

While at least one run is open, ``transformers.Trainer.train`` and ``save_model`` are wrapped, so a trainer counts
whether it was built before the run or inside, and whatever its class; ``evaluate`` and ``predict`` too, which a private
run refuses. A training inside the run gets the recorder as a callback and, for as long as it trains, two methods that
also tell the recorder what they return. A hook on every torch optimizer notices steps outside a recorded training:
without privacy a loop of one's own may claim them (`loop`), else that is a warning; under privacy it is refused (and so
is, while a trainer trains, a step of any other optimizer), since nothing may be trained without it in silence. All of
it is put back afterwards, on exceptions too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from rlhf_audit_nb.capture.compute import measuring
from rlhf_audit_nb.capture.data import bind_data
from rlhf_audit_nb.capture.models import with_origin
from rlhf_audit_nb.capture.ranks import training_in_ranks
from rlhf_audit_nb.capture.resume import Resumption, find_resumption
from rlhf_audit_nb.capture.rewards import describe_company
from rlhf_audit_nb.capture.run import InheritedPlan, PrivatePlan, Run, current_run, open_private_runs
from rlhf_audit_nb.capture.saving import (
    LastTraining,
    inside_trainer,
    is_saving,
    saving_classes,
    step_of,
    wrap_save_pretrained,
)
from rlhf_audit_nb.capture.settings import generators, hyperparameters, unchanged
from rlhf_audit_nb.capture.weights import describe_model, digest_tensors, final_tensors
from rlhf_audit_nb.counted import Counted
from rlhf_audit_nb.errors import RunError, UnsupportedTrainerError
from rlhf_audit_nb.events import DataBound, ModelBound, PublicDeclared, RunStarted, TrainerAttached, decode_body

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import TrailReader

__all__ = ["attach_trainers"]

_ALL_BARS = ("ProgressCallback", "PrinterCallback", "NotebookProgressCallback", "RichProgressCallback")
_QUIET_BARS = ("RichProgressCallback",)
"""The others are exchanged by the engine for a bar that tells steps and no times."""
_MISSING = object()

_private_states: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""The state that each trainer's last private training left; `Trainer.train` makes a new one every time."""


def attach_trainers() -> AbstractContextManager[None]:
    """Wrap the trainers' methods for as long as any run needs it."""
    return _wrapped.held()


def _install() -> ExitStack:
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
    from transformers import Trainer

    with ExitStack() as stack:
        stack.enter_context(_replaced(Trainer, "train", _wrap_train))
        stack.enter_context(_replaced(Trainer, "save_model", _wrap_save_model))
        stack.enter_context(_replaced(Trainer, "evaluate", _wrap_evaluation))
        stack.enter_context(_replaced(Trainer, "predict", _wrap_evaluation))
        for kind in saving_classes():
            stack.enter_context(_replaced(kind, "save_pretrained", wrap_save_pretrained))
        stack.callback(register_optimizer_step_pre_hook(_check_optimizer).remove)
        stack.callback(register_optimizer_step_post_hook(_after_optimizer).remove)
        return stack.pop_all()


_wrapped = Counted(_install)


@contextmanager
def _replaced(owner: type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    original = owner.__dict__[name]
    wrapper = wrap(original)
    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        # Who wrapped it again after us keeps theirs; ours lets everything through when no run is open.
        if owner.__dict__.get(name) is wrapper:
            setattr(owner, name, original)


def _wrap_train(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = current_run()
        if run is None:
            _tell_private_runs()
        if run is None or any(one.training is self for one in run.outwards()) or _trains_beside(run):
            return original(self, *args, **kwargs)
        asked = args[0] if args else kwargs.get("resume_from_checkpoint")
        return _train_in_run(run, self, functools.partial(original, self, *args, **kwargs), asked)

    return train


def _tell_private_runs() -> None:
    """Something trains in a thread that belongs to no run: who asked for privacy is told that this has none."""
    for run in open_private_runs():
        run.warn(
            "Something trained while this run was open, in a thread that does not belong to it: that training is "
            "neither private nor in the trail. Train in the thread that opened the run, or in one started inside it."
        )


def _trains_beside(run: Run) -> bool:
    """Whether another trainer of the run trains at this moment: its steps could not be told apart.

    Raises:
        RunError: the run is private, where nothing may be trained without privacy.
    """
    if run.training is None:
        return False
    if run.private:
        raise RunError(
            "Another trainer of this private run is training at this moment.",
            next_step="Train one after the other, or in runs of their own.",
            code="training-beside",
        )
    run.warn("A second trainer trained while another one was training; its steps are not in the trail.")
    return True


def _wrap_save_model(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_model(self: Any, output_dir: Any = None, _internal_call: bool = False) -> Any:  # noqa: FBT001, FBT002
        # Checkpoints save themselves through here and are signed when they are complete; `push_to_hub` names no folder.
        ours = not is_saving() and (not _internal_call or output_dir is None)
        with inside_trainer():
            result = original(self, output_dir, _internal_call)
        run = current_run()
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if run is not None and ours and self.args.should_save and folder.is_dir():
            run.weights_saved(folder, step_of(run, self))
        return result

    return save_model


def _wrap_evaluation(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse evaluation in a private run, of whatever data: looking at the rows to decide would itself tell of them."""

    @functools.wraps(original)
    def evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = current_run()
        if run is not None and run.private and run.training is None:  # while it trains, the engine refuses
            raise UnsupportedTrainerError(
                "An evaluation inside a private run would show exact figures of data that may be protected.",
                next_step="Evaluate after the run (in another cell), on data that nobody protected gave.",
                code="evaluation-in-private-run",
            )
        return original(self, *args, **kwargs)

    return evaluate


def _check_optimizer(optimizer: Any, *_: Any) -> None:
    run = current_run()
    if run is None:
        _tell_private_runs()
        return
    for one in run.outwards():
        # A private run lets only trainers' own optimizers step, also where one of a run around it trains.
        if one.training is not None and not (run.private and _is_foreign(optimizer, one.training)):
            return
    if run.private:
        raise UnsupportedTrainerError(
            "An optimizer steps outside a trainer that can be made private, in a run under differential privacy.",
            next_step="Train with TRL's DPOTrainer, RewardTrainer, SFTTrainer or KTOTrainer, or open the run without "
            "privacy.",
            code="unrecorded-training",
        )
    run.loop.before_step(optimizer)


def _after_optimizer(optimizer: Any, *_: Any) -> None:
    run = current_run()
    if run is not None and run.has_loop and all(one.training is None for one in run.outwards()):
        run.loop.after_step(optimizer)


def _is_foreign(optimizer: Any, trainer: Any) -> bool:
    """Whether ``optimizer`` is neither the trainer's own nor one that its own is wrapped around."""
    own = trainer.optimizer
    while own is not None and own is not optimizer:
        own = getattr(own, "optimizer", None)
    return own is None


# --- one training ----------------------------------------------------------------------------------------------------


def _train_in_run(run: Run, trainer: Any, train: Callable[[], Any], checkpoint: Any) -> Any:
    """Train ``trainer`` inside ``run``, from ``checkpoint`` where one was named, and record it."""
    run.close_loop()
    run.training, run.last_training = trainer, LastTraining(trainer)
    run.training_ended(None)
    try:
        return _record_training(run, trainer, train, checkpoint)
    except BaseException as error:
        run.training_ended(error)
        raise
    finally:
        run.training, run.last_training = None, LastTraining(trainer)  # of a model that was made when it began, too
        if run.state.status == "training":
            run.state.status = "open"


def _record_training(run: Run, trainer: Any, train: Callable[[], Any], checkpoint: Any) -> Any:
    from rlhf_audit_nb.capture.callback import StepRecorder
    from rlhf_audit_nb.capture.streams import reading_stream

    opening = _Opening(run, trainer)
    with ExitStack() as stack:
        resumed = bool(checkpoint or trainer.args.resume_from_checkpoint)
        stack.enter_context(training_in_ranks(run, trainer, resumed=resumed))
        stack.callback(opening.record_trainer, max(int(trainer.args.max_steps), 0))
        inherited = run.privatiser.inherit(trainer) if run.privatiser is not None else None
        if inherited is not None:
            _refuse_resuming(trainer, checkpoint)
            opening.inherited = inherited
            _show_inherited(run, inherited)
        opening.resumed = find_resumption(run, trainer, checkpoint)
        done = opening.resumed.step if opening.resumed is not None else 0
        plan = run.privatiser.plan(trainer, done=done) if run.privatiser is not None and inherited is None else None
        recorder = StepRecorder(run, trainer, opening.record, run.state.step, private=plan is not None)
        if plan is not None:
            stack.enter_context(run.overhead.training())  # what is digested before it begins is recording, too
            with run.overhead.part("inputs"):
                opening.announce(done + plan.steps, plan)
            _show_plan(run, plan)
            stack.callback(_remember_private_training, trainer, trainer.state)
        stack.enter_context(measuring(run, trainer, private=plan is not None))
        stack.enter_context(_with_callback(trainer, recorder))
        if plan is None:
            stack.enter_context(_listening(trainer, recorder))
            if inherited is None or inherited.units is None:  # of released rows nothing more than what is sealed
                stack.enter_context(reading_stream(run, trainer))
        else:  # what a private step measures is the engine's to tell, and only to the recorder
            stack.enter_context(_without_bars(run, trainer))
        stack.enter_context(run.overhead.training())
        try:
            with _around(run, trainer, recorder, plan, inherited):
                if plan is not None:
                    _show_plan(run, plan)
                result = train()
            recorder.finish()
        finally:
            recorder.flush()
        with run.overhead.part("inputs"):
            run.record(describe_model(trainer.model, "final", trainer.processing_class, artifacts=run.trail.artifacts))
    return result


def _around(
    run: Run, trainer: Any, recorder: Any, plan: PrivatePlan | None, inherited: InheritedPlan | None
) -> AbstractContextManager[Any]:
    if plan is not None:
        return plan.training(run, trainer, recorder)
    return inherited.training(trainer) if inherited is not None else nullcontext()


class _Opening:
    """The entries that say what is about to be trained; each is written once."""

    def __init__(self, run: Run, trainer: Any) -> None:
        self._run = run
        self._trainer = trainer
        self._kind = type(trainer).__name__  # while it trains, its class may be another one
        self._trainer_recorded = False
        self._data_recorded = False
        self._recorded = False
        self.inherited: InheritedPlan | None = None
        self.resumed: Resumption | None = None

    def record_trainer(self, max_steps: int) -> None:
        """The trainer; called again at the end for trainings that failed before they began."""
        if self._trainer_recorded:
            return
        self._trainer_recorded = True
        args = self._trainer.args
        instead = self.inherited.trained_as if self.inherited is not None else {}
        self._run.record(
            TrainerAttached(
                trainer=self._kind,
                loss=_loss_name(instead.get("loss_type", getattr(args, "loss_type", None))),
                max_steps=max_steps,
                seed=getattr(args, "seed", None),
                hyperparameters={**hyperparameters(args), **instead},
                defaults={name: value for name, value in unchanged(args).items() if name not in instead},
                # What was drawn before may depend on private rows, and a private training's own seeds are secret.
                generators={} if self._run.private else generators(getattr(args, "seed", None)),
            )
        )
        if self.resumed is not None:
            self._run.record(self.resumed.event)

    def announce(self, max_steps: int, plan: PrivatePlan) -> None:
        """Before a private training: the plan knows the steps; what a trainer would count from its rows is private."""
        self._record_data(max_steps, plan)
        if self.resumed is None:  # else the model's weights are still to be loaded
            self.record(max_steps)

    def record(self, max_steps: int) -> None:
        """The trainer, its data and its model as it is when training begins."""
        if self._recorded:
            return
        self._recorded = True
        self._record_data(max_steps, None)
        lists = self._run.trail.artifacts
        base = describe_model(self._trainer.model, "base", self._trainer.processing_class, artifacts=lists)
        self._run.record(self._with_origin(base, self._trainer.model, self._trainer.processing_class))
        begun = _begun_from(self._trainer.model, base)
        for event in describe_company(self._trainer, base, self._with_origin):
            self._run.record(event)
            if isinstance(event, ModelBound) and event.role == "reference":
                begun.add(event.weights_digest)
        if self.inherited is not None:
            self._run.record(self.inherited.event())
        elif self._run.private:
            _warn_of_open_training(self._run, self._trainer, begun, self.resumed)

    def _with_origin(self, model: ModelBound, shown: Any, processing_class: Any = None) -> ModelBound:
        return with_origin(model, shown, processing_class, artifacts=self._run.trail.artifacts)

    def _record_data(self, max_steps: int, plan: PrivatePlan | None) -> None:
        self.record_trainer(max_steps)
        if self._data_recorded:
            return
        self._data_recorded = True
        for dataset, role in self._datasets():
            self._run.record(*_bind(dataset, role, plan, self.inherited, self._run.trail.artifacts))

    def _datasets(self) -> Iterator[tuple[Any, str]]:
        if self._trainer.train_dataset is not None:
            yield self._trainer.train_dataset, "train"
        held_out = self._trainer.eval_dataset
        for dataset in held_out.values() if isinstance(held_out, dict) else [held_out]:
            if dataset is not None:
                yield dataset, "evaluation"


def _bind(
    dataset: Any, role: str, plan: PrivatePlan | None, inherited: InheritedPlan | None, artifacts: Path
) -> tuple[Any, Any]:
    if inherited is not None and inherited.units is not None:
        # Of released rows the texts are not protected, and are nobody's business either.
        return bind_data(dataset, role, private=True, unit=inherited.view.unit, units=inherited.units)
    if plan is None:
        return bind_data(dataset, role, artifacts=artifacts)
    is_train = role == "train"
    return bind_data(
        dataset,
        role,
        private=True,
        unit=plan.view.unit if is_train else None,
        units=plan.view.units if is_train else None,
        annotator_column=plan.annotator_column,
    )


def _show_plan(run: Run, plan: PrivatePlan) -> None:
    """Let panels see the guarantee; a second training of the run goes on where the first one stopped."""
    before = run.state.privacy
    view = plan.view
    if before is not None:
        view = replace(view, before=before.before, curve=[*before.curve[: run.state.step], *view.curve])
    run.state.privacy = view
    run.state.private = True
    for sentence in plan.warnings:
        run.warn(sentence)


def _refuse_resuming(trainer: Any, asked: Any) -> None:
    """A checkpoint's weights are not the ones whose descent was looked at."""
    if asked or trainer.args.resume_from_checkpoint:
        raise UnsupportedTrainerError(
            "A training that inherits its privacy cannot be resumed: where a checkpoint's weights come from is not "
            "checked.",
            next_step="Start it anew; it charges nothing.",
            code="not-post-processing",
        )


def _show_inherited(run: Run, inherited: InheritedPlan) -> None:
    """Let panels see what comes with the models; what such a training measures is public."""
    run.state.inherited = inherited.view
    if run.state.privacy is None:
        run.state.private = False


def _warn_of_open_training(run: Run, trainer: Any, begun: set[str], resumed: Resumption | None) -> None:
    """Weights that were trained without privacy hand what they learnt to the private training."""
    if resumed is not None and resumed.warning is not None:
        run.warn(resumed.warning)
    elif resumed is None and trainer.state.global_step and _private_states.get(trainer) is not trainer.state:
        run.warn(
            "This trainer has trained before, without differential privacy: what its model learnt then is not covered "
            "by this run's epsilon. Start from a model that has not seen the data."
        )
    elif _left_open(run) & begun:
        run.warn(
            "This training begins from weights that a run without differential privacy left on this trail: what they "
            "learnt then is not covered by this run's epsilon. Start from a model that has not seen the data."
        )


def _left_open(run: Run) -> set[str]:
    """The digests of the weights that runs without privacy left, on data that nobody declared public."""
    reader = run.trail.reader()
    found: set[str] = set()
    unprotected: set[str | None] = set()
    for entry in reader.entries(type=RunStarted.TYPE):
        started = decode_body(entry.type, entry.body)
        if isinstance(started, RunStarted) and started.privacy is None:
            unprotected.add(entry.run)
    unprotected -= _on_public_data(reader)
    for entry in reader.entries(type=ModelBound.TYPE):
        model = decode_body(entry.type, entry.body)
        if isinstance(model, ModelBound) and model.role == "final" and entry.run in unprotected:
            found.add(model.weights_digest)
    return found


def _on_public_data(reader: TrailReader) -> set[str | None]:
    """The runs all of whose data somebody declared to hold nothing of protected people."""
    claims = (decode_body(entry.type, entry.body) for entry in reader.entries(type=PublicDeclared.TYPE))
    declared = {claim.digest for claim in claims if isinstance(claim, PublicDeclared) and claim.kind == "data"}
    if not declared:
        return set()
    read: dict[str | None, set[str | None]] = {}
    for entry in reader.entries(type=DataBound.TYPE):
        data = decode_body(entry.type, entry.body)
        if isinstance(data, DataBound):
            read.setdefault(entry.run, set()).add(data.digest)
    return {run for run, digests in read.items() if digests <= declared}


def _begun_from(model: Any, base: ModelBound) -> set[str]:
    """The digests of what a training begins from, in the form of a final one: the base, and an adapter on it."""
    adapter = {digest_tensors(final_tensors(model))} if base.adapter is not None else set()
    return {base.weights_digest, *adapter}


def _remember_private_training(trainer: Any, before: Any) -> None:
    if trainer.state is not before:  # else it failed before its first step
        _private_states[trainer] = trainer.state


def _loss_name(loss: Any) -> str | None:
    if isinstance(loss, list | tuple):
        return ",".join(str(item) for item in loss)
    return str(loss) if loss is not None else None


# --- what is changed on the trainer while it trains ------------------------------------------------------------------


@contextmanager
def _with_callback(trainer: Any, callback: Any) -> Iterator[None]:
    # First in line: a step that was taken is recorded even where a later callback fails.
    trainer.callback_handler.callbacks.insert(0, callback)
    try:
        yield
    finally:
        trainer.remove_callback(callback)


@contextmanager
def _listening(trainer: Any, recorder: Any) -> Iterator[None]:
    """Let the recorder hear what the trainer's own methods return."""
    from rlhf_audit_nb.capture.completions import SampleRecorder

    with ExitStack() as stack:
        heard = [
            ("training_step", lambda result, *_: recorder.saw_loss(result)),
            ("_get_grad_norm", lambda result, *_: recorder.saw_gradient_norm(result)),
            *SampleRecorder(recorder.run, trainer).listeners(),
        ]
        for name, listener in heard:
            stack.enter_context(_heard(trainer, name, listener))
        yield


@contextmanager
def _heard(trainer: Any, name: str, listener: Callable[..., None]) -> Iterator[None]:
    if not hasattr(trainer, name):  # another version of transformers: go without this number
        yield
        return
    before = vars(trainer).get(name, _MISSING)

    def method(*args: Any, **kwargs: Any) -> Any:
        # Found anew at each call: under privacy the trainer's class changes while it trains.
        kind = type(trainer)
        bound = before if before is not _MISSING else inspect.getattr_static(kind, name).__get__(trainer, kind)
        result = bound(*args, **kwargs)
        listener(result, args, kwargs)
        return result

    setattr(trainer, name, method)
    try:
        yield
    finally:
        if before is _MISSING:
            vars(trainer).pop(name, None)
        else:
            setattr(trainer, name, before)


@contextmanager
def _without_bars(run: Run, trainer: Any) -> Iterator[None]:
    """Take away what would tell times, which depend on private data: displays, which a panel replaces, and trackers."""
    handler = trainer.callback_handler
    unwanted = _QUIET_BARS if run.show_progress else _ALL_BARS
    trackers = sorted(type(item).__name__.removesuffix("Callback") for item in handler.callbacks if _tracks(item))
    if trackers:
        run.warn(
            f"Nothing of this private training is reported to {', '.join(trackers)}: trackers keep the exact time of "
            "each step and measure the machine, and both depend on private data. The trail holds what may be shown."
        )
    taken = [
        (place, item) for place, item in enumerate(handler.callbacks) if _is_one_of(item, unwanted) or _tracks(item)
    ]
    handler.callbacks = [item for item in handler.callbacks if not any(item is other for _, other in taken)]
    try:
        yield
    finally:
        for place, item in taken:
            handler.callbacks.insert(min(place, len(handler.callbacks)), item)


def _tracks(callback: Any) -> bool:
    """Whether it reports to an experiment tracker (what ``report_to`` adds)."""
    return any(kind.__module__.startswith("transformers.integrations") for kind in type(callback).__mro__)


def _is_one_of(callback: Any, names: tuple[str, ...]) -> bool:
    return any(kind.__name__ in names for kind in type(callback).__mro__)
