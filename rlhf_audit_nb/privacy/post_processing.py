"""Training that charges nothing because all it learns of protected people comes out of private models. Floor 2.

What is computed from the outcome of a private mechanism, and from nothing else that is protected, is as private as
that outcome (post-processing). So a policy that GRPO or RLOO trains on public prompts, rewarded by models that private
runs left, has the epsilon of those runs and spends none. That holds only if nothing else comes in, and where it cannot
be shown, `plan_inheritance` refuses: rewards must be known by their weights' digests to have come out of private
trainings of this trail, or be declared public by a named person; the prompts must be declared public; the policy must
not begin from weights that a training without a bound left.

The inherited epsilon is composed anew by the accountant over every spend that any of the models descends from: those
are mechanisms on the same people's data, so their epsilons are neither added nor is one of them enough.
"""

from __future__ import annotations

import hashlib
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.errors import ConfigError, DataError, PrivacyError, UnsupportedTrainerError
from rlhf_audit_nb.events import PrivacyInherited, PublicDeclared, encode_body, number
from rlhf_audit_nb.privacy.accountant import composed_epsilon
from rlhf_audit_nb.privacy.descent import FUNCTION, MODEL, Descent, Exposure, Training
from rlhf_audit_nb.privacy.supported import replaced_methods

if TYPE_CHECKING:
    from rlhf_audit_nb.config import PrivacyConfig
    from rlhf_audit_nb.privacy.ledger import Ledger
    from rlhf_audit_nb.trail import Trail

__all__ = [
    "POST_PROCESSING",
    "PROMPTS",
    "DataShown",
    "FunctionShown",
    "Inheritance",
    "Inputs",
    "ModelShown",
    "begun_from",
    "check_data",
    "check_trainer",
    "declare_public",
    "digest_function",
    "is_post_processing",
    "plan_inheritance",
]

POST_PROCESSING = {
    "GRPOTrainer": "trl.trainer.grpo_trainer",
    "RLOOTrainer": "trl.trainer.rloo_trainer",
}
"""The trainers whose whole input can be checked: prompts, rewards, the weights they begin from."""

PROMPTS = "declared public"
KIND = "private-model"

_METHODS = (
    "compute_loss",
    "_compute_loss",
    "training_step",
    "get_train_dataloader",
    "_prepare_inputs",
    "_calculate_rewards",
    "_generate",
    "_generate_and_score_completions",
    "_inner_training_loop",
    "log",
)
_UNSEEN = {
    "tools": "tools that the model calls may hand it protected data",
    "environment_factories": "an environment may hand the model protected data",
    "rollout_func": "a rollout function of your own may hand the model protected data",
}
_LIBRARIES = ("transformers", "peft", "transformers_modules")


# --- what is shown of a trainer --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelShown:
    """A model as it lies in memory, known by digests (hex SHA-256).

    Attributes:
        name: what it is called in a message.
        final: its weights as a save writes them: the adapter's alone where it has one.
        base: the weights under the adapter; ``None`` without an adapter.
        saved: the digest of the folder that it was loaded from, where its weights are that folder's.
    """

    name: str
    final: str
    base: str | None = None
    saved: str | None = None


@dataclass(frozen=True, slots=True)
class FunctionShown:
    """A reward function; ``digest`` is that of its source text, ``None`` where it has none."""

    name: str
    digest: str | None


@dataclass(frozen=True, slots=True)
class DataShown:
    """A data set: its columns, the digest of its rows and that of its set of prompts, where it has them."""

    role: str
    columns: tuple[str, ...]
    digest: str | None
    prompts: str | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that such a trainer learns from."""

    policy: ModelShown
    rewards: tuple[ModelShown | FunctionShown, ...]
    data: tuple[DataShown, ...]
    reference: ModelShown | None = None


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What a training inherits; ``sources`` say from which entries, and in what role."""

    unit: str
    epsilon: float
    delta: float
    sources: tuple[dict[str, Any], ...]
    note: str | None = None
    kind: str = KIND
    prompts: str | None = PROMPTS

    def event(self) -> PrivacyInherited:
        """The entry that says so."""
        return PrivacyInherited(
            kind=self.kind,
            sources=list(self.sources),
            unit=self.unit,
            epsilon=number(self.epsilon),
            delta=self.delta,
            prompts=self.prompts,
            note=self.note,
        )


# --- what is refused -------------------------------------------------------------------------------------------------


def is_post_processing(trainer: Any) -> bool:
    """Whether ``trainer`` is one of TRL's own that may inherit; a subclass of them is not."""
    kind = type(trainer)
    return POST_PROCESSING.get(kind.__qualname__) == kind.__module__


def check_trainer(trainer: Any, config: PrivacyConfig) -> None:
    """Refuse a trainer into which something may come that cannot be seen; nothing is touched.

    Raises:
        UnsupportedTrainerError: with the reason and what to change.
    """
    name = type(trainer).__name__
    if not config.public_prompts:
        raise _refusal(
            f"{name} cannot be made private: its groups mix units. It can inherit the epsilon of a private reward "
            "model, but only on prompts that no protected person wrote, and these were not declared public.",
            "Write PrivacyConfig(..., public_prompts=True) if that is so, or train without a privacy configuration.",
        )
    replaced = replaced_methods(trainer, _METHODS)
    if replaced:
        raise _refusal(
            f"{', '.join(replaced)} of this trainer was replaced; what comes into it cannot be shown any more.",
            "Use the trainer as TRL made it.",
        )
    for attribute, why in _UNSEEN.items():
        if getattr(trainer, attribute, None):
            said = attribute.replace("factories", "factory")
            raise _refusal(
                f"{name} cannot inherit a reward model's privacy as it is set up: {why}.", f"Leave out {said}."
            )
    if trainer.accelerator.num_processes > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise _refusal(
            "Weights that are spread over processes cannot be compared with those that the trail knows.",
            "Train in one process, without DeepSpeed and FSDP.",
        )
    for reward in trainer.reward_funcs:
        module = type(reward).__module__.partition(".")[0]
        if hasattr(reward, "state_dict") and module not in _LIBRARIES:
            raise _refusal(
                f"The reward model is a {type(reward).__name__}, a class of your own: what else it reads is not known.",
                "Use the model as transformers or peft loads it.",
            )


def check_data(dataset: Any, role: str) -> None:
    """Refuse a data set of which it cannot be seen beforehand what a trainer will read in it.

    Raises:
        DataError: it is a stream, or has a transform of its own.
    """
    if getattr(dataset, "column_names", None) is None or not hasattr(dataset, "__len__"):
        raise DataError(
            f"The {role} prompts are a stream or not a data set of `datasets`; they cannot be compared with protected "
            "ones.",
            next_step="Pass a datasets.Dataset (load it without streaming).",
            code="streaming-data",
        )
    if (getattr(dataset, "format", None) or {}).get("type") == "custom":
        raise DataError(
            f"The {role} prompts have a transform of their own, which runs whenever a row is read; what it adds is not "
            "what is recorded.",
            next_step="Apply it before the trainer is made: dataset.map(...).",
            code="data-transform",
        )


def digest_function(function: Any) -> str | None:
    """Hex SHA-256 over a plain function's name and source text; ``None`` where it has no text that says all of it.

    Callable objects, methods, partial functions and closures carry values that their text does not show.
    """
    if not inspect.isfunction(function) or function.__closure__:
        return None
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return None
    return hashlib.sha256(f"{function.__qualname__}\n{source}".encode()).hexdigest()


def plan_inheritance(
    inputs: Inputs, config: PrivacyConfig, descent: Descent, ledger: Ledger, protected: Iterable[str] = ()
) -> Inheritance:
    """What a training with ``inputs`` inherits.

    Args:
        inputs: what it learns from.
        config: what was asked for.
        descent: what the trail's models descend from.
        ledger: the trail's spends.
        protected: digests of rows, and of sets of prompts, that private trainings of the trail read.

    Raises:
        UnsupportedTrainerError: something comes in that is not known to be private or public.
        PrivacyError: it would inherit more than was asked for, or from spends that count another unit.
    """
    known = frozenset(protected)
    for data in inputs.data:
        _check_data(data, config, known)
    sources: list[dict[str, Any]] = []
    exposure = Exposure()
    for reward in inputs.rewards:
        source, found = _reward(reward, descent)
        sources.append(source)
        exposure |= found
    begun, found, note = begun_from(inputs.policy, inputs.reference, descent)
    sources += begun
    epsilon, unit = _composed(exposure | found, config, ledger)
    return Inheritance(unit, epsilon, config.delta, tuple(sources), note)


def begun_from(
    policy: ModelShown, reference: ModelShown | None, descent: Descent
) -> tuple[list[dict[str, Any]], Exposure, str | None]:
    """Where the weights come from that a training begins from: sources, what they descend from, and a note.

    Raises:
        UnsupportedTrainerError: a training without a bound left them, or they descend from one.
    """
    sources: list[dict[str, Any]] = []
    exposure, note = Exposure(), None
    for role, model in (("base", policy), ("reference", reference)):
        if model is None:
            continue
        begun, found = _beginning(role, model, descent)
        sources += begun
        exposure |= found
        if not begun and role == "base":
            note = "The policy began from weights that this trail does not know; they are taken for public."
    return sources, exposure, note


def _check_data(data: DataShown, config: PrivacyConfig, protected: frozenset[str]) -> None:
    if config.annotator_column in data.columns:
        raise _refusal(
            f"The {data.role} prompts have the column {config.annotator_column!r}, so they belong to annotators; their "
            "epsilon would not cover what is learnt from them here.",
            "Use prompts that no protected person wrote, and of which no choice depends on them.",
        )
    if {data.digest, data.prompts} & protected:
        raise _refusal(
            f"The {data.role} prompts are those of data that a private run of this trail protects.",
            "Use prompts that no protected person wrote.",
        )


def _reward(reward: ModelShown | FunctionShown, descent: Descent) -> tuple[dict[str, Any], Exposure]:
    if isinstance(reward, FunctionShown):
        return _function(reward, descent), Exposure()
    left = _left_by(reward, descent)
    if not left:
        declared = descent.declared.get((MODEL, reward.final)) if reward.base is None else None
        if declared is None:
            raise _refusal(
                f"The reward model {reward.name} has weights that no private run of this trail left (sha256 "
                f"{reward.final[:12]}…).",
                "Train it in a private run on this trail, and load it unchanged, in the precision it was saved in; a "
                "model that never saw protected data may be declared: auditor.declare_public_reward(model, ...).",
            )
        return {"entry": declared, "run": None, "digest": reward.final, "role": "reward"}, Exposure()
    exposure = descent.of(left)
    _check_bounded(f"The reward model {reward.name}", exposure, left, descent)
    return _source("reward", reward, left[-1], exposure), exposure


def _function(reward: FunctionShown, descent: Descent) -> dict[str, Any]:
    declared = descent.declared.get((FUNCTION, reward.digest)) if reward.digest is not None else None
    if declared is None:
        raise _refusal(
            f"The reward function {reward.name!r} may read protected data; nobody declared that it does not.",
            "If it reads none, say so by name: auditor.declare_public_reward(function, reason=..., by=...). When its "
            "text changes, declare it anew.",
        )
    return {"entry": declared, "run": None, "digest": reward.digest, "role": "reward"}


def _left_by(model: ModelShown, descent: Descent) -> list[Training]:
    """The trainings that left exactly this model: its adapter, and the base under it."""
    found = [*descent.left(model.final), *(descent.saved(model.saved) if model.saved is not None else ())]
    if model.base is None:
        return found
    return [
        training for training in found if any(base.weights_digest == model.base for _, base in training.of_role("base"))
    ]


def _beginning(role: str, model: ModelShown, descent: Descent) -> tuple[list[dict[str, Any]], Exposure]:
    """Where the weights that a training begins from come from; empty where the trail does not know them."""
    what = "The policy" if role == "base" else "The reference model"
    sources, exposure = [], Exposure()
    known = [*descent.left(model.final), *(descent.saved(model.saved) if model.saved is not None else ())]
    if model.base is not None:
        known += descent.left(model.base)
    for training in {item.index: item for item in known}.values():
        found = descent.exposure(training)
        _check_bounded(what, found, [training], descent)
        exposure |= found
        sources.append(_source(role, model, training, found))
    return sources, exposure


def _check_bounded(what: str, exposure: Exposure, left: list[Training], descent: Descent) -> None:
    if not exposure.unbounded:
        return
    at = min(exposure.unbounded)
    open_one = descent.at(at)
    run = open_one.run[:8] if open_one is not None else "unknown"
    itself = any(training.index == at for training in left)
    begins = "was left by" if itself else "descends from"
    raise _refusal(
        f"{what} {begins} a training without differential privacy (run {run}, entry {at}): what it learnt there is "
        "bounded by nothing.",
        "Train it in a private run. If that training read no protected data, say so: "
        "auditor.declare_public_data(...), and this holds again.",
    )


def _source(role: str, model: ModelShown, training: Training, exposure: Exposure) -> dict[str, Any]:
    """The entry that shows the model; its run is named where something of protected people came through it."""
    finals = [index for index, event in training.of_role("final") if event.weights_digest == model.final]
    saved = [index for index, event in training.saved if event.digest == model.saved]
    entry = (finals or saved or [index for index, _ in training.of_role("final")] or [training.index])[-1]
    digest = model.base if role != "reward" and not finals and model.base is not None else model.final
    return {"entry": entry, "run": training.run if exposure.spends else None, "digest": digest, "role": role}


def _composed(exposure: Exposure, config: PrivacyConfig, ledger: Ledger) -> tuple[float, str]:
    spends = [spend for spend in ledger.spends if spend.asked.index in exposure.spends]
    releases = [release for release in ledger.releases if release.index in exposure.spends]
    missing = exposure.spends - {spend.asked.index for spend in spends} - {release.index for release in releases}
    if missing or (spends and releases):
        raise PrivacyError(
            f"What entry {min(missing or exposure.spends)} charged cannot be composed from this trail's ledger.",
            next_step="Verify the trail.",
            code="ledger",
        )
    unit = ledger.unit if exposure.spends and ledger.unit is not None else config.unit
    if unit != config.unit:
        raise PrivacyError(
            f"The models that this run learns from protect {unit}s; it asks for unit={config.unit!r}.",
            next_step=f'Write unit="{unit}".',
            code="mixed-units",
        )
    if releases:  # pure, so it holds at any delta; each total covers the releases before it too
        epsilon = max(release.total for release in releases)
    else:
        # Whoever is on the rosters of several spends is in one group; no one is in two.
        groups = (
            [spend.mechanism for spend in group.spends if spend.steps and spend in spends] for group in ledger.groups
        )
        epsilon = max((composed_epsilon(group, config.delta) for group in groups), default=0.0)
    if epsilon > config.epsilon:
        raise PrivacyError(
            f"This run asks for epsilon {config.epsilon:g}, and what it learns from has spent {epsilon:.4g} (delta "
            f"{config.delta:g}): it would inherit more than it asks for.",
            next_step=f"Write epsilon={epsilon * 1.001:.3g} or more; inheriting charges nothing.",
            code="inherits-too-much",
        )
    return epsilon, unit


def declare_public(trail: Trail, kind: str, name: str, digest: str, *, reason: str, by: str) -> int:
    """Record that somebody declared something to hold nothing of protected people.

    Args:
        trail: where it is to be known.
        kind: ``FUNCTION``, ``MODEL`` or ``DATA`` of `rlhf_audit_nb.privacy.descent`.
        name: what it is called.
        digest: what it is known by.
        reason: why that is so, in one line that stands in the open.
        by: who says so, as they are to be named in the open.

    Returns:
        The index of the entry.

    Raises:
        ConfigError: no reason or no name.
        StoreError: the append failed.
    """
    event = PublicDeclared(
        kind=kind, name=name, digest=digest, reason=_one_line("reason", reason), by=_one_line("by", by)
    )
    return trail.append(event.TYPE, encode_body(event)).wait()


def _one_line(name: str, text: object, most: int = 500) -> str:
    said = text.strip() if isinstance(text, str) else ""
    if not said or len(said) > most or not said.isprintable():
        found = "empty" if not said else "too long" if len(said) > most else "not one line of text"
        raise ConfigError(
            f"{name} is {found}; what is declared stands in the trail with a reason and a name.",
            next_step=f'Write {name}="...", one line of at most {most} characters.',
            code=name,
        )
    return said


def _refusal(message: str, instead: str) -> UnsupportedTrainerError:
    return UnsupportedTrainerError(message, next_step=f"{instead} Nothing was trained.", code="not-post-processing")
