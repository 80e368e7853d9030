"""What is refused under a privacy configuration, and that each refusal says why and what to do."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from support.tiny import dpo_trainer, kto_trainer, reward_trainer, sft_trainer, synthetic_pairs
from transformers import Trainer
from trl import LogCompletionsCallback

from rlhf_audit_nb.errors import UnsupportedTrainerError
from rlhf_audit_nb.privacy.supported import DPO_LOSSES, check_supported, check_unit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainers")


@pytest.fixture
def trainer(folder: Path) -> Any:
    return dpo_trainer(synthetic_pairs(3), folder)


def refused(trainer: Any, why: str) -> None:
    with pytest.raises(UnsupportedTrainerError, match=why) as caught:
        check_supported(trainer)
    assert caught.value.next_step
    assert caught.value.exit_code == 3


def test_the_four_trainers_are_accepted(trainer: Any, folder: Path) -> None:
    check_supported(trainer)
    for make in (reward_trainer, sft_trainer, kto_trainer):
        check_supported(make(synthetic_pairs(3), folder))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"packing": True, "packing_strategy": "wrapped"}, "packing joins records"),
        ({"padding_free": True, "max_length": None}, "join records"),
        ({"max_length": None}, "there is none"),
        ({"label_smoothing_factor": 0.1}, "number of tokens in the batch"),
    ],
)
def test_options_of_sft_that_couple_units_are_refused(folder: Path, changes: dict[str, Any], why: str) -> None:
    refused(sft_trainer(synthetic_pairs(3), folder, **changes), why)


def test_ktos_own_loss_is_refused_for_its_kl_term(folder: Path) -> None:
    trainer = kto_trainer(synthetic_pairs(3), folder, loss_type="kto", train_sampling_strategy="sequential")
    trainer.args.train_sampling_strategy = "random"
    refused(trainer, "neighbouring records")


def test_pairs_that_kto_takes_apart_cannot_be_units(folder: Path) -> None:
    trainer = kto_trainer(synthetic_pairs(3), folder)
    check_unit(trainer, "annotator")
    with pytest.raises(UnsupportedTrainerError, match="takes a pair apart"):
        check_unit(trainer, "pair")
    check_unit(sft_trainer(synthetic_pairs(3), folder), "pair")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("GRPOTrainer", "groups"),
        ("RLOOTrainer", "baseline"),
    ],
)
def test_trainers_that_couple_units_are_refused_with_the_reason(name: str, why: str) -> None:
    kind = getattr(trl, name)
    refused(kind.__new__(kind), why)


def test_unknown_trainers_and_subclasses_are_refused(trainer: Any) -> None:
    refused(Trainer.__new__(Trainer), "not among the trainers")

    class Mine(trl.DPOTrainer):  # type: ignore[misc, name-defined]
        pass

    refused(Mine.__new__(Mine), "subclass of DPOTrainer")

    class DPOTrainer:
        pass

    refused(DPOTrainer(), "not among the trainers")


def test_a_replaced_method_is_refused(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer.compute_loss = lambda *_: torch.zeros(())
    refused(trainer, "compute_loss of this trainer was replaced")
    del trainer.compute_loss
    check_supported(trainer)
    monkeypatch.setattr(trl.DPOTrainer, "_compute_loss", lambda *_: torch.zeros(()))
    refused(trainer, "_compute_loss of this trainer was replaced")


def test_a_method_that_was_wrapped_under_its_own_name_is_refused(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = trl.DPOTrainer.compute_loss

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    monkeypatch.setattr(trl.DPOTrainer, "compute_loss", wrapped)
    refused(trainer, "compute_loss of this trainer was replaced")


def test_a_data_collator_whose_work_was_replaced_is_refused(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer.data_collator.torch_call = lambda rows: rows
    refused(trainer, "torch_call of DataCollatorForPreference was replaced")
    del trainer.data_collator.torch_call
    check_supported(trainer)
    monkeypatch.setattr(type(trainer.data_collator), "torch_call", lambda _, rows: rows)
    refused(trainer, "torch_call of DataCollatorForPreference was replaced")


def test_a_callback_that_sends_prompts_away_is_refused(trainer: Any) -> None:
    trainer.eval_dataset = trainer.train_dataset
    trainer.add_callback(LogCompletionsCallback(trainer, freq=1))
    refused(trainer, "LogCompletionsCallback sends prompts")


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "sft", "no_such_loss"])
def test_losses_that_couple_pairs_are_refused(trainer: Any, loss: str) -> None:
    trainer.loss_types = ["sigmoid", loss]
    refused(trainer, f"loss '{loss}' cannot be made private")


@pytest.mark.parametrize("loss", sorted(DPO_LOSSES))
def test_losses_that_keep_pairs_apart_are_accepted(trainer: Any, loss: str) -> None:
    trainer.loss_types = [loss]
    check_supported(trainer)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("eval_strategy", "steps", "evaluation"),
        ("eval_on_start", True, "evaluation"),
        ("load_best_model_at_end", True, "checkpoints"),
        ("save_strategy", "best", "checkpoints"),
        ("fp16", True, "scaler"),
        ("auto_find_batch_size", True, "repeats steps"),
        ("include_num_input_tokens_seen", "all", "token counts"),
        ("train_sampling_strategy", "group_by_length", "Poisson"),
        ("dataloader_drop_last", True, "Poisson"),
        ("use_liger_kernel", True, "kernels"),
        ("torch_compile", True, "compiled"),
        ("activation_offloading", True, "offloading"),
        ("debug", "underflow_overflow", "activations"),
        ("lr_scheduler_type", "reduce_lr_on_plateau", "follows a metric"),
        ("lr_scheduler_type", "greedy", "follows a metric"),
        ("optim", "lomo", "inside the backward"),
        ("optim", "galore_adamw_layerwise", "inside the backward"),
        ("padding_free", True, "one sequence"),
        ("sync_ref_model", True, "reference model"),
        ("precompute_ref_log_probs", True, "mix units"),
    ],
)
def test_options_are_refused_with_the_reason(trainer: Any, name: str, value: object, why: str) -> None:
    assert hasattr(trainer.args, name)
    setattr(trainer.args, name, value)
    refused(trainer, why)


def test_a_flip_probability_that_makes_no_sense_is_refused(trainer: Any) -> None:
    trainer.loss_types = ["robust"]
    trainer.label_smoothing = 0.5
    refused(trainer, "flip probability")


def test_a_balancing_loss_is_refused(trainer: Any) -> None:
    trainer.aux_loss_enabled = True
    refused(trainer, "mixture-of-experts")


def test_ones_own_collator_or_loss_is_refused(trainer: Any) -> None:
    trainer.compute_loss_func = lambda *_: 0
    refused(trainer, "loss function of your own")
    trainer.compute_loss_func = None
    trainer.data_collator = lambda rows: rows
    refused(trainer, "data collator")


def test_models_that_keep_statistics_of_the_data_are_refused(trainer: Any) -> None:
    trainer.model.add_module("norm_extra", torch.nn.BatchNorm1d(3))
    refused(trainer, "keeps statistics")


def test_rotary_embeddings_that_follow_the_longest_sequence_are_refused(trainer: Any) -> None:
    trainer.model.get_base_model().model.rotary_emb.rope_type = "dynamic"
    refused(trainer, "longest sequence")


def test_a_frozen_model_is_refused(trainer: Any) -> None:
    trainer.model.requires_grad_(requires_grad=False)
    refused(trainer, "no trainable parameter")


def test_watching_gradients_from_outside_is_refused(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer.args.report_to = ["wandb"]
    check_supported(trainer)
    monkeypatch.setenv("WANDB_WATCH", "gradients")
    refused(trainer, "WANDB_WATCH")
