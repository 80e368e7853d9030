"""Losses that are right on average although labels were flipped. Floor 2.

A label is flipped with chance p. For a loss l of one pair, which is l' when the two responses change places,

    ((1 - p) l - p l') / (1 - 2 p)

has the mean l over the flips, and so has its gradient (Natarajan et al. 2013; for DPO Chowdhury et al. 2024). While a
trainer trains on released labels it is made to use that:

* `DPOTrainer`: TRL's ``robust`` loss with ``label_smoothing`` p, which is this for the sigmoid loss. A trainer that
  asks for ``sigmoid`` or ``robust`` gets it; other losses are refused.
* `RewardTrainer`: TRL has none. For the Bradley-Terry loss -log sigmoid(d) of the difference d of two rewards,
  l' = l + d, so that the debiased loss is l - d p / (1 - 2 p). What is symmetric in the two responses
  (``center_rewards_coefficient``) stays as it is.

The debiased loss has no lower bound: pairs that are learnt by heart pull their rewards apart for ever. Few epochs,
weight decay or a small adapter keep that in check.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rlhf_audit_nb.errors import PrivacyError, UnsupportedTrainerError
from rlhf_audit_nb.privacy.supported import replaced_methods

__all__ = ["DEBIASED_BRADLEY_TERRY", "check_flip_probability", "check_label_trainer", "debiased", "trained_as"]

DEBIASED_BRADLEY_TERRY = "debiased Bradley-Terry"

_DPO = ("trl.trainer.dpo_trainer", "DPOTrainer")
_REWARD = ("trl.trainer.reward_trainer", "RewardTrainer")
_FLIP = "_rlhf_audit_flip_probability"
_METHODS = (
    "compute_loss",
    "_compute_loss",
    "training_step",
    "get_train_dataloader",
    "_prepare_dataset",
    "_prepare_inputs",
)
_WHY_NOT = {
    "SFTTrainer": "it learns from the chosen responses alone, and a loss without the rejected ones cannot be debiased",
    "KTOTrainer": "it takes a pair apart into two rows whose labels were flipped together",
    "GRPOTrainer": "it learns from rewards and not from labels",
    "RLOOTrainer": "it learns from rewards and not from labels",
}


def check_label_trainer(trainer: Any) -> None:
    """Refuse a trainer whose loss cannot be debiased, or into which other labels may come; nothing is touched.

    Raises:
        UnsupportedTrainerError: with the reason and what to change.
    """
    kind = type(trainer)
    if (kind.__module__, kind.__qualname__) not in (_DPO, _REWARD):
        why = next((_WHY_NOT[base.__name__] for base in kind.__mro__ if base.__name__ in _WHY_NOT), None)
        raise _refusal(
            f"{kind.__name__} cannot be trained on released labels: {why or 'its loss is not known'}.",
            "Use TRL's DPOTrainer or RewardTrainer themselves, no subclass.",
        )
    replaced = replaced_methods(trainer, _METHODS)
    collator = type(trainer.data_collator)
    if collator.__name__ != "DataCollatorForPreference" or collator.__module__ != kind.__module__:
        replaced = [*replaced, "the data collator"]
    if replaced:
        raise _refusal(
            f"{', '.join(replaced)} of this trainer was replaced; what it learns from cannot be shown any more.",
            "Use the trainer as TRL made it.",
        )
    if trainer.eval_dataset is not None:
        raise _refusal(
            "An evaluation set has labels of its own, which were not released.",
            "Leave out eval_dataset, and evaluate after the run on labels that nobody protects.",
        )
    if getattr(trainer.args, "use_liger_kernel", False):
        raise _refusal("The replaced kernels compute the loss themselves.", "Write use_liger_kernel=False.")
    if kind.__name__ == _DPO[1]:
        _check_dpo(trainer)


def _check_dpo(trainer: Any) -> None:
    if list(trainer.loss_types) not in (["sigmoid"], ["robust"]):
        raise _refusal(
            f"The DPO loss {', '.join(map(repr, trainer.loss_types))} has no debiased form here: on flipped labels it "
            "would learn the flips.",
            'Write loss_type="sigmoid" (it is trained as "robust" with the flip probability).',
        )
    if trainer.args.precompute_ref_log_probs:
        raise _refusal(
            "Reference log-probabilities computed ahead are cached with the data, where they may be of other labels.",
            "Write precompute_ref_log_probs=False.",
        )


def check_flip_probability(trainer: Any, flip_probability: float) -> None:
    """Refuse a flip probability that the loss cannot be debiased for, or that the trainer contradicts.

    Raises:
        PrivacyError: it is not in [0, 0.5).
        UnsupportedTrainerError: the trainer's ``robust`` loss was set up for another one.
    """
    if not 0 <= flip_probability < 0.5:  # noqa: PLR2004  TRL only warns
        raise PrivacyError(
            f"Labels that were flipped with chance {flip_probability!r} tell nothing; a loss cannot be debiased.",
            code="flip-probability",
        )
    smoothing = float(getattr(trainer, "label_smoothing", 0.0) or 0.0)
    if smoothing and abs(smoothing - flip_probability) > 1e-6:  # noqa: PLR2004
        raise _refusal(
            f"label_smoothing is {smoothing:g}, and these labels were flipped with chance {flip_probability:.6g}.",
            "Leave label_smoothing out; it is set while it trains.",
        )


def trained_as(trainer: Any, flip_probability: float) -> dict[str, Any]:
    """The settings that really run in place of the trainer's own, for the record."""
    if type(trainer).__name__ == _DPO[1]:
        return {"loss_type": ["robust"], "label_smoothing": flip_probability}
    return {"loss_type": DEBIASED_BRADLEY_TERRY, "label_smoothing": flip_probability}


@contextlib.contextmanager
def debiased(trainer: Any, flip_probability: float) -> Iterator[None]:
    """While inside, ``trainer``, which `check_label_trainer` let through, computes the debiased loss.

    Afterwards it is as it was.

    Raises:
        UnsupportedTrainerError, PrivacyError: see `check_flip_probability`.
    """
    check_flip_probability(trainer, flip_probability)
    with (
        _robust(trainer, flip_probability) if type(trainer).__name__ == _DPO[1] else _swapped(trainer, flip_probability)
    ):
        yield


@contextlib.contextmanager
def _robust(trainer: Any, flip_probability: float) -> Iterator[None]:
    before = trainer.loss_types, trainer.label_smoothing
    trainer.loss_types, trainer.label_smoothing = ["robust"], flip_probability
    try:
        yield
    finally:
        trainer.loss_types, trainer.label_smoothing = before


class DebiasedRewardMixin:
    """Stands in front of RewardTrainer's class while it trains: takes the flips out of the Bradley-Terry loss."""

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,  # noqa: FBT001, FBT002  as TRL has it
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's own loss, less p / (1 - 2p) times the mean difference of the rewards."""
        import torch

        loss, outputs = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        chosen, rejected = torch.chunk(outputs.logits.squeeze(-1), chunks=2)
        chance = vars(self)[_FLIP]
        loss = loss - chance / (1 - 2 * chance) * (chosen - rejected).mean()
        return (loss, outputs) if return_outputs else loss


@contextlib.contextmanager
def _swapped(trainer: Any, flip_probability: float) -> Iterator[None]:
    original = type(trainer)
    mixed = type(f"Debiased{original.__name__}", (DebiasedRewardMixin, original), {"__module__": __name__})
    vars(trainer)[_FLIP] = flip_probability
    trainer.__class__ = mixed
    try:
        yield
    finally:
        trainer.__class__ = original
        del vars(trainer)[_FLIP]


def _refusal(message: str, instead: str) -> UnsupportedTrainerError:
    return UnsupportedTrainerError(message, next_step=f"{instead} Nothing was trained.", code="label-trainer")
