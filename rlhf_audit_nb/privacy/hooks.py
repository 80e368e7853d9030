"""The methods of transformers and TRL that a private training stands on, and whether they are still what they were.
Floor 2.

A private training overrides some methods of the trainer and calls others. A release that renames one, or that hands it
other arguments, would leave an override that nobody calls; so each is held against the signature that was verified,
before anything is spent. What a signature cannot show (that a hook is called, and when) is held by the guard in front
of the optimizer's steps, and by tests against the real trainers.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from typing import Any

from rlhf_audit_nb.errors import UnsupportedTrainerError

__all__ = ["HOOKS", "check_classes", "check_hooks"]

HOOKS: dict[str, tuple[str, ...]] = {
    "_clip_grad_norm": ("model",),
    "_evaluate": ("trial", "ignore_keys_for_eval", "skip_scheduler"),
    "_get_grad_norm": ("model", "grad_norm"),
    "_inner_training_loop": ("batch_size", "args", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_rng_state": ("checkpoint",),
    "_prepare_inputs": ("inputs",),
    "_remove_unused_columns": ("dataset", "description"),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "compute_loss_context_manager": (),
    "create_optimizer": ("model",),
    "get_train_dataloader": (),
    "log": ("logs", "start_time"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
}
"""What is overridden or called of a trainer, with the arguments it takes beside ``self``."""

_LIBRARIES = ("transformers", "trl", "accelerate", "peft")
_ANY = ("args", "kwargs")


def check_hooks(trainer: Any) -> None:
    """Refuse a trainer one of whose hooks is missing or takes other arguments than those that were verified.

    Raises:
        UnsupportedTrainerError: it names the hook and the versions of the libraries.
    """
    _check_methods(type(trainer))
    for name in ("_metrics", "_total_train_tokens", "callback_handler", "data_collator"):
        if not hasattr(trainer, name):
            raise _refusal(f"{type(trainer).__name__}.{name} does not exist")
    if "train" not in trainer._metrics:  # noqa: SLF001 - what TRL measures, which must not be logged
        raise _refusal(f'{type(trainer).__name__}._metrics has no "train"')
    if not callable(getattr(trainer.data_collator, "torch_call", None)):
        raise _refusal(f"{type(trainer.data_collator).__name__}.torch_call does not exist")


def check_classes() -> None:
    """Hold the methods of the installed trainers that can be made private against those that were verified.

    What only a built trainer shows is left to `check_hooks`. Loads transformers and TRL.

    Raises:
        UnsupportedTrainerError: it names the hook and the versions of the libraries.
    """
    from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer

    for kind in (DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer):
        _check_methods(kind)


def _check_methods(trainer: type) -> None:
    for name, expected in HOOKS.items():
        owners = [kind for kind in trainer.__mro__ if name in vars(kind)]
        if not owners:
            raise _refusal(f"{trainer.__name__}.{name} does not exist")
        for owner in owners:
            found = tuple(inspect.signature(vars(owner)[name]).parameters)[1:]
            if found not in (expected, _ANY):
                raise _refusal(f"{owner.__name__}.{name} takes ({', '.join(found)}) and not ({', '.join(expected)})")


def _refusal(what: str) -> UnsupportedTrainerError:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)
    return UnsupportedTrainerError(
        f"{what}: the private training was written for another release. Installed: {versions}.",
        next_step="Install releases that the package was tested with (see its dependencies), or train without a "
        "privacy configuration.",
        code="hook",
    )
