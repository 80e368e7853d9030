"""Which trainers, losses and options the engine can make private; everything else is refused with a reason. Floor 2.

This is an allow-list. A trainer that is not on it is refused, even where it might be safe: under a privacy
configuration nothing is ever trained without privacy in silence. The reasons fall into a few kinds: what couples
units (one unit's gradient would depend on another's data), what would take a step or not because of the data, what
prints or publishes functions of the data, and what was not verified yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rlhf_audit_nb.errors import UnsupportedTrainerError
from rlhf_audit_nb.privacy.hooks import check_hooks

__all__ = [
    "DPO_LOSSES",
    "REFUSED_DPO_LOSSES",
    "REFUSED_TRAINERS",
    "check_supported",
    "check_unit",
    "refused_options",
    "replaced_methods",
    "token_normaliser",
]

DPO_LOSSES = frozenset(
    {
        "apo_down",
        "apo_zero",
        "bco_pair",
        "discopop",
        "exo_pair",
        "hinge",
        "ipo",
        "nca_pair",
        "robust",
        "sigmoid",
        "sigmoid_norm",
        "sppo_hard",
    }
)
"""DPO losses that are means over pairs, each pair's term depending on that pair alone."""

REFUSED_DPO_LOSSES = {
    "aot": "it sorts all pairs of a batch against each other",
    "aot_unpaired": "it sorts all pairs of a batch against each other",
    "sft": "it is a mean over all tokens of a batch",
}
"""TRL's other DPO losses, and why they are refused."""

_DPO, _REWARD, _SFT, _KTO = (f"trl.trainer.{name}_trainer" for name in ("dpo", "reward", "sft", "kto"))
_TRAINERS = {
    (_DPO, "DPOTrainer"): _DPO,
    (_REWARD, "RewardTrainer"): _REWARD,
    (_SFT, "SFTTrainer"): _SFT,
    (_KTO, "KTOTrainer"): _KTO,
}
_NAMES = ", ".join(name for _, name in _TRAINERS)
_COLLATORS = {
    _DPO: "DataCollatorForPreference",
    _REWARD: "DataCollatorForPreference",
    _SFT: "DataCollatorForLanguageModeling",
    _KTO: "DataCollatorForUnpairedPreference",
}

_GROUPS = "its advantages and normalisers are taken over groups and batches, which mixes units"
_TOKENS = "its likelihood term is a mean over all tokens of a batch, so one unit's length weighs the others' terms"
_TAUGHT = (
    "it learns from answers that a model gives to batches of prompts, and from a teacher or judge of which nothing is "
    "known; its loss was not verified with per-unit gradients"
)
REFUSED_TRAINERS = {
    "GRPOTrainer": _GROUPS,
    "RLOOTrainer": "its baseline is taken over the other samples of a group, which mixes units",
    "PPOTrainer": "its rollouts, advantages and value updates mix units",
    "A2POTrainer": "it weighs answers by values that it estimates from groups of them",
    "AsyncGRPOTrainer": _GROUPS,
    "GMPOTrainer": _GROUPS,
    "CPOTrainer": _TOKENS,
    "ORPOTrainer": _TOKENS,
    "TPOTrainer": "its loss over three answers was not verified with per-unit gradients",
    "DistillationTrainer": _TAUGHT,
    "AsyncDistillationTrainer": _TAUGHT,
    "ServerDistillationTrainer": _TAUGHT,
    "GKDTrainer": _TAUGHT,
    "GOLDTrainer": _TAUGHT,
    "IWOPDTrainer": _TAUGHT,
    "OnlineDPOTrainer": _TAUGHT,
    "SDFTTrainer": _TAUGHT,
    "SDPOTrainer": _TAUGHT,
}
"""TRL's other trainers by name, and why the engine does not make them private."""

_METHODS = (
    "compute_loss",
    "_compute_loss",
    "training_step",
    "get_train_dataloader",
    "_clip_grad_norm",
    "_get_grad_norm",
    "create_optimizer",
    "log",
    "_inner_training_loop",
    "_run_epoch",
    "_prepare_inputs",
    "compute_ref_log_probs",
)


@dataclass(frozen=True, slots=True)
class _Rule:
    """An option that is refused: ``broken`` finds it, ``why`` says why, ``instead`` what to write."""

    broken: Callable[[Any], bool]
    why: str
    instead: str


def _arg(name: str, *allowed: Any) -> Callable[[Any], bool]:
    def broken(trainer: Any) -> bool:
        value = getattr(trainer.args, name, allowed[0])
        return getattr(value, "value", value) not in allowed

    return broken


def _orders_batches(trainer: Any) -> bool:
    """Whether an order of batches was asked for that is neither random nor the trainer's own default."""
    own = getattr(type(trainer.args), "train_sampling_strategy", "random")
    return _arg("train_sampling_strategy", "random", getattr(own, "value", own))(trainer)


_RULES = (
    _Rule(
        _arg("eval_strategy", "no"),
        "evaluation during training would show losses of data that may be protected",
        'Write eval_strategy="no" and evaluate on unprotected data after the run.',
    ),
    _Rule(
        _arg("eval_on_start", False),
        "evaluation during training would show losses of data that may be protected",
        "Write eval_on_start=False and evaluate on unprotected data after the run.",
    ),
    _Rule(
        _arg("load_best_model_at_end", False, None),
        "choosing among checkpoints by a metric of the data is not covered by the privacy accounting",
        "Write load_best_model_at_end=False.",
    ),
    _Rule(
        _arg("save_strategy", "no", "steps", "epoch"),
        "choosing among checkpoints by a metric of the data is not covered by the privacy accounting",
        'Write save_strategy="steps", "epoch" or "no".',
    ),
    _Rule(
        _arg("fp16", False),
        "its gradient scaler skips steps depending on the data",
        "Write fp16=False (bf16=True or full precision).",
    ),
    _Rule(
        _arg("auto_find_batch_size", False),
        "it repeats steps after running out of memory, which would not be accounted for",
        "Write auto_find_batch_size=False.",
    ),
    _Rule(
        _arg("include_num_input_tokens_seen", "no", False),
        "token counts are a function of private data",
        'Write include_num_input_tokens_seen="no".',
    ),
    _Rule(
        _orders_batches,
        "batches are drawn by Poisson sampling, which the accounting is for",
        'Leave out train_sampling_strategy (or write "random").',
    ),
    _Rule(
        _arg("group_by_length", False),
        "batches are drawn by Poisson sampling, which the accounting is for",
        "Write group_by_length=False.",
    ),
    _Rule(
        _arg("dataloader_drop_last", False),
        "batches are drawn by Poisson sampling, which has no last batch",
        "Write dataloader_drop_last=False.",
    ),
    _Rule(
        _arg("use_liger_kernel", False),
        "the replaced kernels were not verified with per-unit gradients",
        "Write use_liger_kernel=False.",
    ),
    _Rule(
        _arg("torch_compile", False),
        "compiled models were not verified with per-unit gradients",
        "Write torch_compile=False.",
    ),
    _Rule(
        _arg("activation_offloading", False),
        "activation offloading was not verified with per-unit gradients",
        "Write activation_offloading=False.",
    ),
    _Rule(lambda trainer: bool(getattr(trainer.args, "debug", None)), "it prints activations", "Leave out debug."),
    _Rule(
        lambda trainer: (
            str(getattr(trainer.args.lr_scheduler_type, "value", trainer.args.lr_scheduler_type))
            in ("reduce_lr_on_plateau", "greedy")
        ),
        "that learning rate schedule follows a metric of the data",
        'Write lr_scheduler_type="linear", "cosine" or "constant".',
    ),
    _Rule(
        lambda trainer: any(
            part in str(getattr(trainer.args.optim, "value", trainer.args.optim)) for part in ("lomo", "layerwise")
        ),
        "that optimizer updates weights inside the backward pass, before noise is added",
        'Write optim="adamw_torch".',
    ),
    _Rule(
        lambda trainer: trainer.accelerator.num_processes > 1 or trainer.args.n_gpu > 1,
        "training over several processes or GPUs is not supported yet",
        "Train in one process with one GPU (CUDA_VISIBLE_DEVICES=0).",
    ),
    _Rule(
        lambda trainer: bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled),
        "DeepSpeed and FSDP shard the gradients that have to be clipped as one",
        "Train without them.",
    ),
    _Rule(
        lambda trainer: getattr(trainer.accelerator, "scaler", None) is not None,
        "a gradient scaler skips steps depending on the data",
        "Train in bf16 or full precision.",
    ),
    _Rule(
        lambda trainer: getattr(trainer, "model_init", None) is not None,
        "a model_init makes another model than the one that was planned for",
        "Pass the model itself.",
    ),
    _Rule(
        lambda trainer: getattr(trainer, "compute_loss_func", None) is not None,
        "a loss function of your own cannot be shown to keep units apart",
        "Leave out compute_loss_func.",
    ),
    _Rule(
        lambda trainer: any(
            kind.__name__ == "LogCompletionsCallback"
            for callback in trainer.callback_handler.callbacks
            for kind in type(callback).__mro__
        ),
        "LogCompletionsCallback sends prompts of the evaluation data away, which may be protected",
        "Leave it out and look at completions of unprotected prompts after the run.",
    ),
    _Rule(
        lambda trainer: _watched_by_wandb(trainer.args),
        "WANDB_WATCH hooks the gradients before they are clipped and sends them away",
        "Unset WANDB_WATCH, or set it to 'false'.",
    ),
)

_NO_BALANCING = _Rule(
    lambda trainer: bool(getattr(trainer, "aux_loss_enabled", False)),
    "the mixture-of-experts balancing loss is a statistic over the batch",
    "Write router_aux_loss_coef=0.0.",
)
_NO_PADDING_FREE = _Rule(
    lambda trainer: bool(trainer.args.padding_free or getattr(trainer, "padding_free", False)),
    "padding-free batches join records into one sequence",
    "Write padding_free=False.",
)
_NO_PRECOMPUTING = _Rule(
    _arg("precompute_ref_log_probs", False),
    "reference log-probabilities computed ahead are made in batches that mix units and are cached with the data",
    "Write precompute_ref_log_probs=False.",
)
_NO_VISION = _Rule(
    lambda trainer: bool(getattr(trainer, "_is_vision_dataset", False)),
    "vision data was not verified with per-unit gradients",
    "Train on text.",
)

_DPO_RULES = (
    _NO_BALANCING,
    _NO_PADDING_FREE,
    _NO_PRECOMPUTING,
    _NO_VISION,
    _Rule(
        _arg("sync_ref_model", False),
        "a reference model that moves with the policy was not verified",
        "Write sync_ref_model=False.",
    ),
    _Rule(
        lambda trainer: "robust" in trainer.loss_types and not 0 <= trainer.label_smoothing < 0.5,  # noqa: PLR2004
        "with the robust loss, label_smoothing is a flip probability and must lie in [0, 0.5)",
        "Write label_smoothing=0.1, or what your flips are.",
    ),
)

_SFT_RULES = (
    _NO_BALANCING,
    _Rule(_arg("packing", False), "packing joins records into one sequence", "Write packing=False."),
    _NO_PADDING_FREE,
    _NO_VISION,
    _Rule(
        _arg("loss_type", "nll", "dft"),
        "that loss was not verified with per-unit gradients",
        'Write loss_type="nll" or "dft".',
    ),
    _Rule(
        lambda trainer: getattr(trainer, "label_smoother", None) is not None,
        "the smoothed loss is divided by the number of tokens in the batch, which depends on everyone's data",
        "Write label_smoothing_factor=0.0.",
    ),
    _Rule(
        _arg("assistant_only_loss", False),
        "a row without an assistant's turn would end the preparation, which tells of it",
        "Write assistant_only_loss=False, and prompt and completion as columns of their own.",
    ),
    _Rule(
        lambda trainer: not trainer.args.max_length,
        "the sum over tokens is divided by max_length, a public number, and there is none",
        "Write max_length=1024, or how long your rows may be.",
    ),
)

_KTO_RULES = (
    _NO_BALANCING,
    _NO_PRECOMPUTING,
    _NO_VISION,
    _Rule(
        _arg("loss_type", "apo_zero_unpaired"),
        "its KL term is a mean over the batch and its KL completions come from neighbouring records, so one "
        "annotator's gradient depends on the others' data",
        'Write loss_type="apo_zero_unpaired".',
    ),
    _Rule(
        _arg("sync_ref_model", False),
        "a reference model that moves with the policy was not verified",
        "Write sync_ref_model=False.",
    ),
)

_OWN_RULES = {_DPO: _DPO_RULES, _REWARD: (), _SFT: _SFT_RULES, _KTO: _KTO_RULES}


def check_supported(trainer: Any) -> None:
    """Refuse a trainer that the engine cannot make private.

    Raises:
        UnsupportedTrainerError: with the reason and what to change.
    """
    module = _check_class(trainer)
    _check_overrides(trainer)
    if module == _DPO:
        _check_dpo_losses(trainer)
    for rule in (*_RULES, *_OWN_RULES[module]):
        if rule.broken(trainer):
            raise _refusal(
                f"{type(trainer).__name__} cannot be made private as it is set up: {rule.why}.", rule.instead
            )
    _check_collator(trainer, module)
    check_hooks(trainer)
    _check_model(trainer.model)


def check_unit(trainer: Any, unit: str) -> None:
    """Refuse a unit that the trainer's rows do not stand for.

    Raises:
        UnsupportedTrainerError: ``pair`` with KTO, which takes a pair apart into two rows.
    """
    if unit == "pair" and _check_class(trainer) == _KTO:
        raise _refusal(
            "KTOTrainer takes a pair apart into two rows, and each row would be protected as if it stood alone.",
            'Write unit="annotator", and leave out sampled="pairs".',
        )


def refused_options() -> list[tuple[str, str, str]]:
    """Every option that is refused: the trainer (``all`` for all of them), why, and what to write instead."""
    named = dict(_TRAINERS.keys())  # its keys are pairs of module and name
    common = [("all", rule.why, rule.instead) for rule in _RULES]
    return common + [(named[module], rule.why, rule.instead) for module, rules in _OWN_RULES.items() for rule in rules]


def token_normaliser(trainer: Any) -> int | None:
    """What a sum over tokens is divided by: a public constant; ``None`` where the loss is a mean over rows.

    TRL divides SFT's sum by the number of tokens in the batch, which is a function of everybody's data; here it is
    ``max_length``.
    """
    return int(trainer.args.max_length) if _check_class(trainer) == _SFT else None


def _refusal(message: str, instead: str) -> UnsupportedTrainerError:
    return UnsupportedTrainerError(message, next_step=instead)


def _check_class(trainer: Any) -> str:
    kind = type(trainer)
    module = _TRAINERS.get((kind.__module__, kind.__qualname__))
    if module is not None:
        return module
    known = next((base.__name__ for base in kind.__mro__ if base.__name__ in REFUSED_TRAINERS), None)
    if known is not None:
        raise _refusal(
            f"{kind.__name__} cannot be trained with differential privacy: {REFUSED_TRAINERS[known]}.",
            f"Use one of {_NAMES}, or train without a privacy configuration.",
        )
    base = next((item.__name__ for item in kind.__mro__ if (item.__module__, item.__qualname__) in _TRAINERS), None)
    if base is not None:
        raise _refusal(
            f"{kind.__name__} is a subclass of {base}; what it overrides cannot be shown to keep units apart.",
            f"Use {base} itself, or train without a privacy configuration.",
        )
    raise _refusal(
        f"{kind.__name__} is not among the trainers that can be made private ({_NAMES}).",
        "Use one of these, or train without a privacy configuration.",
    )


def replaced_methods(trainer: Any, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are not TRL's or transformers' own methods on this trainer, sorted."""
    return sorted(name for name in names if name in vars(trainer) or _patched(type(trainer), name))


def _check_overrides(trainer: Any) -> None:
    replaced = replaced_methods(trainer, _METHODS)
    if replaced:
        raise _refusal(
            f"{', '.join(replaced)} of this trainer was replaced; it cannot be shown to keep units apart any more.",
            "Use the trainer as TRL made it.",
        )


def _patched(kind: type, name: str) -> bool:
    """Whether the class's method is not TRL's or transformers' own, or is wrapped in something that is not."""
    method = getattr(kind, name, None)
    while method is not None:
        # Where the code was written: `functools.wraps` gives a wrapper the name of what it wraps.
        module = getattr(method, "__globals__", {}).get("__name__", "")
        if module.split(".")[0] not in ("trl", "transformers"):
            return True
        method = getattr(method, "__wrapped__", None)
    return False


def _check_dpo_losses(trainer: Any) -> None:
    for loss in trainer.loss_types:
        if loss not in DPO_LOSSES:
            why = REFUSED_DPO_LOSSES.get(loss, "it is not known to keep pairs apart")
            raise _refusal(
                f"The DPO loss {loss!r} cannot be made private: {why}.",
                f"Use one of {', '.join(sorted(DPO_LOSSES))}.",
            )


def _check_collator(trainer: Any, module: str) -> None:
    kind = type(trainer.data_collator)
    if (kind.__module__, kind.__qualname__) != (module, _COLLATORS[module]):
        raise _refusal(
            f"The data collator {kind.__name__} is not TRL's own; it cannot be shown to keep units apart.",
            "Leave out data_collator.",
        )
    if "torch_call" in vars(trainer.data_collator) or _patched(kind, "torch_call"):
        raise _refusal(
            f"torch_call of {kind.__name__} was replaced; it cannot be shown to keep units apart any more.",
            "Use the data collator as TRL made it.",
        )


def _check_model(model: Any) -> None:
    from torch import nn

    batch_norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    for name, module in model.named_modules():
        if isinstance(module, batch_norms) or getattr(module, "track_running_stats", False):
            raise _refusal(
                f"The model's layer {name!r} ({type(module).__name__}) keeps statistics of the data.",
                "Use a model without batch normalisation.",
            )
    for name in _rope_types(model):
        if name in ("dynamic", "longrope"):
            raise _refusal(
                f"The model's rotary embedding ({name}) changes with the longest sequence seen, which couples units.",
                "Use a model with another rope_type.",
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise _refusal("The model has no trainable parameter.", "Unfreeze some, or pass a peft_config.")


def _rope_types(model: Any) -> Iterator[str]:
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str):
            yield kind
        elif isinstance(kind, dict):
            yield from (item for item in kind.values() if isinstance(item, str))


def _watched_by_wandb(args: Any) -> bool:
    reports = getattr(args, "report_to", None) or []
    return "wandb" in reports and os.environ.get("WANDB_WATCH", "false").lower() in ("gradients", "all")
