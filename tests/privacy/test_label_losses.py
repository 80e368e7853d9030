"""Losses on flipped labels: right on average over all flips, by brute force in float64, and put back afterwards."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.tiny import dpo_trainer, kto_trainer, perturb, reward_trainer, sft_trainer, synthetic_pairs

from benchmarks.labels import held_out
from rlhf_audit_nb.errors import PrivacyError, UnsupportedTrainerError
from rlhf_audit_nb.privacy.label_losses import (
    DEBIASED_BRADLEY_TERRY,
    check_flip_probability,
    check_label_trainer,
    debiased,
    trained_as,
)

CHANCE = 0.2689
PAIRS = 3
TOLERANCE = 1e-11
INSIDE_TOLERANCE = 1e-5  # TRL's fused language head and Llama's norms compute in float32 whatever the weights are in


def ready(trainer: Any) -> Any:
    perturb(trainer.model, 0.2)
    trainer.model.double()
    if getattr(trainer, "ref_model", None) is not None:
        trainer.ref_model.double()
    trainer.model.train()
    return trainer


def dpo(folder: Any, **args: Any) -> Any:
    return ready(dpo_trainer(synthetic_pairs(PAIRS, 1), folder, gradient_checkpointing=False, **args))


def reward(folder: Any, **args: Any) -> Any:
    return ready(reward_trainer(synthetic_pairs(PAIRS, 1), folder, gradient_checkpointing=False, **args))


def loss_and_gradient(trainer: Any, flips: tuple[bool, ...]) -> tuple[float, torch.Tensor]:
    """The trainer's loss over its rows, those in ``flips`` with their responses exchanged, and its gradient."""
    rows = []
    for row, flip in zip(trainer.train_dataset, flips, strict=True):
        pair = (row["rejected_ids"], row["chosen_ids"]) if flip else (row["chosen_ids"], row["rejected_ids"])
        rows.append({**row, "chosen_ids": pair[0], "rejected_ids": pair[1]})
    trainer.model.zero_grad(set_to_none=True)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    found = [parameter.grad for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert all(gradient is not None for gradient in found)
    gradient = torch.cat([gradient.flatten() for gradient in found if gradient is not None])
    assert gradient.dtype == torch.float64
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0
    return float(loss.detach()), gradient


def mean_over_flips(trainer: Any, chance: float) -> tuple[float, torch.Tensor]:
    loss, gradient = 0.0, torch.zeros(())
    for flips in itertools.product((False, True), repeat=PAIRS):
        weight = chance ** sum(flips) * (1 - chance) ** (PAIRS - sum(flips))
        one, slope = loss_and_gradient(trainer, flips)
        loss, gradient = loss + weight * one, gradient + weight * slope
    return loss, gradient


def apart(first: tuple[float, torch.Tensor], second: tuple[float, torch.Tensor]) -> float:
    """The larger of the two relative differences: of the losses, and of the gradients."""
    loss = abs(first[0] - second[0]) / abs(second[0])
    return max(loss, float((first[1] - second[1]).norm() / second[1].norm()))


CLEAN = (False,) * PAIRS


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"beta": 0.7},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.4},
        {"use_weighting": True},
        {"ld_alpha": 0.3},
        {"loss_weights": [0.5]},
        {"peft": None},
    ],
    ids=str,
)
def test_the_mean_of_the_debiased_dpo_loss_over_all_flips_is_the_clean_loss_and_so_is_its_gradient(tmp_path, args):
    trainer = dpo(tmp_path, **args)
    clean = loss_and_gradient(trainer, CLEAN)
    with debiased(trainer, CHANCE):
        mean = mean_over_flips(trainer, CHANCE)
    assert apart(mean, clean) < INSIDE_TOLERANCE
    # The negative control: without it the flips are learnt.
    assert apart(mean_over_flips(trainer, CHANCE), clean) > 0.01


@pytest.mark.parametrize("args", [{}, {"center_rewards_coefficient": 0.1}, {"peft": "lora"}], ids=str)
def test_the_mean_of_the_debiased_reward_loss_over_all_flips_is_the_clean_loss_and_so_is_its_gradient(tmp_path, args):
    trainer = reward(tmp_path, **args)
    clean = loss_and_gradient(trainer, CLEAN)
    with debiased(trainer, CHANCE):
        mean = mean_over_flips(trainer, CHANCE)
    assert abs(mean[0] - clean[0]) < TOLERANCE
    assert apart(mean, clean) < INSIDE_TOLERANCE
    assert apart(mean_over_flips(trainer, CHANCE), clean) > 0.01


def test_a_wrong_flip_probability_leaves_a_bias(tmp_path):
    trainer = reward(tmp_path)
    clean = loss_and_gradient(trainer, CLEAN)
    with debiased(trainer, CHANCE / 2):
        assert apart(mean_over_flips(trainer, CHANCE), clean) > 0.01


def test_without_flips_the_debiased_loss_is_the_clean_one(tmp_path):
    for trainer, tolerance in ((dpo(tmp_path / "a"), INSIDE_TOLERANCE), (reward(tmp_path / "b"), TOLERANCE)):
        clean = loss_and_gradient(trainer, CLEAN)
        with debiased(trainer, 0.0):
            assert apart(loss_and_gradient(trainer, CLEAN), clean) < tolerance


def test_everything_is_put_back_also_where_training_fails(tmp_path):
    one, other = dpo(tmp_path / "a", loss_type="robust"), reward(tmp_path / "b")
    before = one.loss_types, one.label_smoothing, type(other), set(vars(other))
    with pytest.raises(KeyboardInterrupt), debiased(one, CHANCE), debiased(other, CHANCE):
        assert (one.loss_types, one.label_smoothing) == (["robust"], CHANCE)
        assert type(other).__name__ == "DebiasedRewardTrainer"
        raise KeyboardInterrupt
    assert (one.loss_types, one.label_smoothing, type(other), set(vars(other))) == before


def test_with_outputs_the_reward_loss_is_the_same(tmp_path):
    trainer = reward(tmp_path)
    with debiased(trainer, CHANCE):
        loss, _ = loss_and_gradient(trainer, CLEAN)
        again, outputs = trainer.compute_loss(
            trainer.model, trainer.data_collator(list(trainer.train_dataset)), return_outputs=True
        )
    assert float(again.detach()) == pytest.approx(loss, abs=1e-12)
    assert outputs.logits.shape == (2 * PAIRS, 1)


def test_what_really_runs_is_said(tmp_path):
    assert trained_as(dpo(tmp_path / "a"), CHANCE) == {"loss_type": ["robust"], "label_smoothing": CHANCE}
    assert trained_as(reward(tmp_path / "b"), CHANCE)["loss_type"] == DEBIASED_BRADLEY_TERRY


@pytest.mark.parametrize("chance", [0.5, 0.7, 1.0, -0.1, float("nan")])
def test_a_flip_probability_that_leaves_nothing_to_learn_is_refused(tmp_path, chance):
    with pytest.raises(PrivacyError, match="tell nothing") as refused:
        check_flip_probability(dpo(tmp_path), chance)
    assert refused.value.reason == "flip-probability"


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda folder: sft_trainer(synthetic_pairs(2), folder), "learns from the chosen responses alone"),
        (lambda folder: kto_trainer(synthetic_pairs(2), folder), "two rows whose labels were flipped together"),
        (lambda folder: dpo(folder, loss_type="ipo"), "The DPO loss 'ipo' has no debiased form"),
        (lambda folder: dpo(folder, loss_type=["sigmoid", "sft"]), "The DPO loss 'sigmoid', 'sft'"),
        (lambda folder: dpo(folder, precompute_ref_log_probs=True), "Reference log-probabilities computed ahead"),
    ],
    ids=["sft", "kto", "ipo", "mixed", "precomputed"],
)
def test_a_trainer_that_would_learn_the_flips_is_refused(tmp_path, make, complaint):
    with pytest.raises(UnsupportedTrainerError, match=complaint):
        check_label_trainer(make(tmp_path))


def test_a_trainer_that_was_changed_is_refused(tmp_path):
    trainer = reward(tmp_path)
    check_label_trainer(trainer)
    trainer.compute_loss = lambda *_: None
    with pytest.raises(UnsupportedTrainerError, match="compute_loss of this trainer was replaced"):
        check_label_trainer(trainer)
    del trainer.compute_loss
    trainer.data_collator = list
    with pytest.raises(UnsupportedTrainerError, match="the data collator of this trainer was replaced"):
        check_label_trainer(trainer)

    trainer = reward(tmp_path)
    trainer.__class__ = type("Mine", (type(trainer),), {})
    with pytest.raises(UnsupportedTrainerError, match="Mine cannot be trained on released labels"):
        check_label_trainer(trainer)
    trainer = reward(tmp_path)
    trainer.eval_dataset = trainer.train_dataset
    with pytest.raises(UnsupportedTrainerError, match="An evaluation set has labels of its own"):
        check_label_trainer(trainer)


def test_another_smoothing_than_the_flips_is_refused(tmp_path):
    trainer = dpo(tmp_path, loss_type="robust", label_smoothing=0.1)
    with pytest.raises(UnsupportedTrainerError, match=r"label_smoothing is 0\.1, and these labels were flipped with"):
        check_flip_probability(trainer, CHANCE)
    check_flip_probability(trainer, 0.1)


@pytest.mark.slow
def test_debiasing_is_worth_something_at_epsilon_one(tmp_path):
    """The figure of docs/privacy/labels.md on one seed; the flips, the model and the batches are all seeded."""
    accuracy, loss = held_out(tmp_path / "debiased", 1, debias=True)
    _, undebiased = held_out(tmp_path / "not", 1, debias=False)
    assert accuracy > 0.9
    assert loss < 0.6 * undebiased
    assert undebiased > 0.27  # it learns how often labels were flipped: log(1 + 1/e) = 0.313 is where it would end
