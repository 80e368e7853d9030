"""A whole private training: its noise, what it leaves, what it tells, and what stops it."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets.utils import are_progress_bars_disabled
from scipy import stats
from support.tiny import (
    causal_model,
    dpo_trainer,
    kto_trainer,
    lora,
    perturb,
    preferences,
    reward_trainer,
    sft_trainer,
    synthetic_pairs,
)
from transformers import TrainerCallback, set_seed
from transformers.utils.notebook import NotebookProgressCallback

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import PrivacyError, UnsupportedTrainerError
from rlhf_audit_nb.privacy import PrivateTraining, SealedRandom, engine, plan_training, private_training, settle_event
from rlhf_audit_nb.privacy.accountant import compose
from rlhf_audit_nb.privacy.quiet import quiet_preparation
from rlhf_audit_nb.privacy.unit_gradients import Seen

SEED = bytes(range(32))
STILL = {"learning_rate": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0}


class Observer:
    def __init__(self) -> None:
        self.seen: list[tuple[int, float, dict[str, Any]]] = []

    def on_private_step(self, step: int, epsilon: float, metrics: dict[str, Any]) -> None:
        self.seen.append((step, epsilon, metrics))


class Keeps(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: list[list[torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])


def train(trainer: Any, seed: bytes = SEED, observer: Any = None, **config: Any) -> PrivateTraining:
    settings = {"epsilon": 200.0, "noise_multiplier": 1.0, **config}
    plan = plan_training(trainer, PrivacyConfig(**settings))
    with private_training(trainer, plan, SealedRandom(seed), observer) as training:
        trainer.train()
    return training


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in trainer.model.parameters() if p.requires_grad])


# -- noise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e30])
def test_the_noise_in_the_gradient_has_the_planned_deviation(tmp_path: Path, max_grad_norm: float) -> None:
    rows, bound, sigma, rate = synthetic_pairs(20, 1), 0.7, 2.5, 1e-12
    trainer = dpo_trainer(rows, tmp_path, peft=None, **{**STILL, "max_steps": 24, "max_grad_norm": max_grad_norm})
    keeps = Keeps()
    trainer.add_callback(keeps)
    train(trainer, epsilon=1e6, noise_multiplier=sigma, sampling_rate=rate, clipping_norm=bound)
    draws = np.concatenate([grad.double().flatten().numpy() for step in keeps.gradients for grad in step])
    draws *= rate * len(rows)  # samples are empty at this rate: the gradient is noise, divided by the expected number
    assert draws.size >= 1_000_000
    assert draws.std() == pytest.approx(sigma * bound, rel=0.01)
    assert abs(draws.mean()) < 5 * sigma * bound / math.sqrt(draws.size)
    assert stats.kstest(draws[::7] / (sigma * bound), "norm").pvalue > 1e-3
    first, second = (np.concatenate([g.double().flatten().numpy() for g in step]) for step in keeps.gradients[:2])
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    per_tensor = [grad.double().std().item() * rate * len(rows) for grad in keeps.gradients[0] if grad.numel() > 900]
    assert per_tensor == pytest.approx([sigma * bound] * len(per_tensor), rel=0.12)


def test_every_trainable_coordinate_gets_noise_and_no_other_moves(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(10), tmp_path, max_steps=1)
    trainer.model.register_parameter("unused", torch.nn.Parameter(torch.zeros(50)))
    before = copy.deepcopy(dict(trainer.model.named_parameters()))
    keeps = Keeps()
    trainer.add_callback(keeps)
    train(trainer, sampling_rate=0.5)
    assert all((grad != 0).all() for grad in keeps.gradients[0])
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert (trainer.model.unused != 0).all()


def test_an_empty_sample_trains_on_noise_alone(tmp_path: Path) -> None:
    observer = Observer()
    trainer = dpo_trainer(synthetic_pairs(6), tmp_path)
    before = weights(trainer)
    training = train(trainer, observer=observer, sampling_rate=1e-9)
    assert [metrics["units"] for _, _, metrics in observer.seen] == [0, 0, 0]
    assert "loss" not in observer.seen[0][2]
    assert training.steps == 3
    assert torch.isfinite(weights(trainer)).all()
    assert not torch.equal(before, weights(trainer))


def test_the_sum_is_divided_by_the_expected_number_and_not_the_realised_one(tmp_path: Path) -> None:
    class NoNoise(SealedRandom):
        def normals(self, step: int, tensor: int, count: int) -> Any:
            return np.zeros(count)

        def bernoulli_mask(self, step: int, rate: float, count: int) -> Any:
            return np.arange(count) < 2

    trainer = dpo_trainer(synthetic_pairs(8), tmp_path, **{**STILL, "max_steps": 1})
    perturb(trainer.model)
    keeps = Keeps()
    trainer.add_callback(keeps)
    bound, rate = 1e-4, 0.5
    plan = plan_training(
        trainer, PrivacyConfig(epsilon=1e6, noise_multiplier=1, sampling_rate=rate, clipping_norm=bound)
    )
    with private_training(trainer, plan, NoNoise(SEED)):
        trainer.train()
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in keeps.gradients[0]))
    assert norm <= 2 * bound / (rate * 8) * (1 + 1e-6)
    assert norm > bound / (rate * 8)


# -- randomness ---------------------------------------------------------------------------------------------------


def test_a_replay_with_the_opened_seed_is_bit_for_bit_the_same(tmp_path: Path) -> None:
    def run(seed: bytes, torch_seed: int) -> torch.Tensor:
        trainer = dpo_trainer(
            preferences(30), tmp_path, peft=lora(lora_dropout=0.2), disable_dropout=False, seed=torch_seed
        )
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_" in name:
                    parameter.fill_(0.01)
        set_seed(torch_seed)
        train(trainer, seed, sampling_rate=0.5)
        return weights(trainer)

    first = run(SEED, 42)
    assert torch.equal(first, run(SEED, 42))
    assert torch.equal(first, run(SEED, 7)), "set_seed must neither choose nor change the noise"
    assert not torch.equal(first, run(bytes(32), 42))


def test_torchs_own_generator_is_neither_used_nor_moved_by_a_step(tmp_path: Path) -> None:
    states: list[torch.Tensor] = []

    class Watches(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            states.append(torch.get_rng_state())

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            states.append(torch.get_rng_state())

    trainer = dpo_trainer(preferences(20), tmp_path, peft=lora(lora_dropout=0.2), disable_dropout=False)
    trainer.add_callback(Watches())
    train(trainer, sampling_rate=0.9)
    assert len(states) == 6
    assert all(torch.equal(state, states[0]) for state in states)


def test_a_seed_cannot_serve_two_trainings(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(6), tmp_path)
    sealed = SealedRandom(SEED)
    plan = plan_training(trainer, PrivacyConfig(epsilon=200, noise_multiplier=1.0))
    with private_training(trainer, plan, sealed):
        trainer.train()
    with pytest.raises(PrivacyError, match="already served"), private_training(trainer, plan, sealed):
        trainer.train()


# -- what is told -------------------------------------------------------------------------------------------------

PUBLIC = {"grad_norm", "learning_rate", "epoch", "epsilon", "step"}


def other_data(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same roster with quite other contents: fewer pairs, other lengths, preferences turned round."""
    kept = {row["annotator_id"]: row for row in rows}
    return [
        {"prompt": "Q", "chosen": row["rejected"] * 2, "rejected": row["chosen"][:5], "annotator_id": owner}
        for owner, row in kept.items()
    ]


def told(
    rows: list[dict[str, str]], folder: Path, capfd: Any, private: bool, make: Any = dpo_trainer, **args: Any
) -> str:
    """Everything that a training prints, logs, returns and saves about itself, but the privatised gradient's norm."""
    folder.mkdir()
    trainer = make(rows, folder, **{"max_steps": 4, "save_strategy": "steps", "save_steps": 4, **args})
    perturb(trainer.model)
    capfd.readouterr()
    if private:
        plan = plan_training(trainer, PrivacyConfig(epsilon=200, noise_multiplier=1.0, sampling_rate=0.5))
        with private_training(trainer, plan, SealedRandom(SEED)):
            output = trainer.train()
    else:
        output = trainer.train()
    printed = capfd.readouterr()
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    for entry in (*state["log_history"], *trainer.state.log_history):
        entry.pop("grad_norm", None)
    lines = [line for line in printed.out.splitlines() if "grad_norm" not in line]
    lines += [
        line
        for line in printed.err.replace("\r", "\n").splitlines()
        if "Warning" not in line and "warn" not in line and "Writing model shards" not in line  # the disk's speed
    ]
    return "\n".join([*lines, json.dumps(state), repr(trainer.state.log_history), repr(output), repr(trainer._metrics)])


@pytest.mark.parametrize("quiet", [False, True], ids=["progress-bar", "printed-logs"])
def test_two_data_sets_with_one_roster_leave_the_same_words(tmp_path: Path, capfd: Any, quiet: bool) -> None:
    rows = preferences(40)
    first = told(rows, tmp_path / "one", capfd, private=True, disable_tqdm=quiet)
    second = told(other_data(rows), tmp_path / "two", capfd, private=True, disable_tqdm=quiet)
    assert first == second.replace(str(tmp_path / "two"), str(tmp_path / "one"))


@pytest.mark.parametrize("make", [sft_trainer, kto_trainer, reward_trainer], ids=["sft", "kto", "reward"])
def test_other_trainers_tell_as_little(tmp_path: Path, capfd: Any, make: Any) -> None:
    rows = [{**row, "prompt": row["prompt"][:20]} for row in preferences(40)]
    first, second = (
        told(data, tmp_path / name, capfd, True, make, max_length=256).replace(str(tmp_path / name), "")
        for name, data in (("one", rows), ("two", other_data(rows)))
    )
    assert first == second


def test_what_kto_says_of_how_many_were_liked_is_not_heard_while_it_is_built(tmp_path: Path, caplog: Any) -> None:
    def build() -> None:
        rows = [{"prompt": "Q", "completion": f" a{n}", "label": n < 9, "annotator_id": f"p{n}"} for n in range(10)]
        with caplog.at_level(logging.WARNING):
            logging.getLogger("trl").propagate = True
            kto_trainer(rows, tmp_path)

    with quiet_preparation():
        build()
    assert "different amounts" not in caplog.text
    build()
    assert "different amounts" in caplog.text


def test_that_comparison_would_notice_a_leak(tmp_path: Path, capfd: Any) -> None:
    rows = preferences(40)
    first = told(rows, tmp_path / "one", capfd, private=False)
    second = told(other_data(rows), tmp_path / "two", capfd, private=False)
    assert first != second.replace(str(tmp_path / "two"), str(tmp_path / "one"))
    assert "rewards/margins" in first


def test_the_log_holds_public_names_only_and_train_returns_no_loss(tmp_path: Path) -> None:
    trainer = reward_trainer(preferences(30), tmp_path)
    plan = plan_training(trainer, PrivacyConfig(epsilon=200, noise_multiplier=1.0, sampling_rate=0.5))
    with private_training(trainer, plan, SealedRandom(SEED)) as training:
        output = trainer.train()
    assert len(trainer.state.log_history) == 4
    assert {name for entry in trainer.state.log_history for name in entry} == PUBLIC
    assert math.isnan(output.training_loss)
    assert set(output.metrics) <= PUBLIC
    assert trainer.state.total_flos == 0
    assert [entry["epsilon"] for entry in trainer.state.log_history[:3]] == list(training.plan.curve[1:])


def test_the_logged_gradient_norm_is_the_privatised_ones(tmp_path: Path) -> None:
    trainer = dpo_trainer(preferences(30), tmp_path)
    keeps = Keeps()
    trainer.add_callback(keeps)
    train(trainer, sampling_rate=0.5, noise_multiplier=5.0)
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    expected_noise = 5.0 / (0.5 * len({row["annotator_id"] for row in preferences(30)}))
    dimension = weights(trainer).numel()
    assert logged == pytest.approx([expected_noise * math.sqrt(dimension)] * 3, rel=0.1)


def test_the_observer_gets_what_is_taken_out(tmp_path: Path) -> None:
    observer = Observer()
    trainer = dpo_trainer(preferences(30), tmp_path)
    perturb(trainer.model)
    training = train(trainer, observer=observer, sampling_rate=0.7)
    steps, epsilons, metrics = zip(*observer.seen, strict=True)
    assert steps == (1, 2, 3)
    assert epsilons == training.plan.curve[1:]
    sealed = SealedRandom(SEED)
    for step, told_of in enumerate(metrics):
        assert told_of["units"] == int(sealed.bernoulli_mask(step, 0.7, len(training.plan.units)).sum())
        assert {"loss", "unit_norm_mean", "clipped_fraction", "rewards/margins", "seconds", "pairs"} <= set(told_of)


def test_a_notebooks_progress_table_is_not_shown_and_comes_back(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(6), tmp_path)
    notebook = NotebookProgressCallback()
    trainer.callback_handler.callbacks.append(notebook)
    train(trainer)
    assert notebook.training_tracker is None
    assert not hasattr(notebook, "training_loss")
    assert notebook in trainer.callback_handler.callbacks


def test_a_notebook_without_a_bar_gets_none(tmp_path: Path, capfd: Any) -> None:
    trainer = dpo_trainer(synthetic_pairs(6), tmp_path)
    handler = trainer.callback_handler
    handler.callbacks = [
        NotebookProgressCallback() if type(item).__name__ == "ProgressCallback" else item for item in handler.callbacks
    ]
    capfd.readouterr()
    train(trainer)
    assert "3/3" not in capfd.readouterr().err


def test_libraries_that_quote_data_are_silenced_and_only_while_private(tmp_path: Path, caplog: Any) -> None:
    def warn() -> None:
        logging.getLogger("trl.trainer.dpo_trainer").warning("The tokenized prompt is not a prefix: %r", "secret text")
        logging.getLogger("trl.other").warning("an ordinary warning")

    class Warns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            assert are_progress_bars_disabled()
            warn()

    trainer = dpo_trainer(synthetic_pairs(6), tmp_path)
    trainer.add_callback(Warns())
    bars = are_progress_bars_disabled()
    train(trainer)
    assert "secret text" not in caplog.text
    assert not [record for record in caplog.records if record.name == "trl.trainer.dpo_trainer"]
    assert "an ordinary warning" in caplog.text
    assert are_progress_bars_disabled() == bars
    warn()
    assert "secret text" in caplog.text


# -- data that misbehaves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [math.nan, math.inf])
def test_a_unit_whose_loss_is_not_finite_contributes_nothing_and_nothing_public_tells(
    tmp_path: Path, margin: float
) -> None:
    rows = synthetic_pairs(8, 2)

    def run(poisoned: bool, skip: bool) -> tuple[Any, Observer]:
        data = [{**row, "margin": 0.0} for row in rows]
        if poisoned:
            data[5]["margin"] = margin

        class Skips(SealedRandom):
            def bernoulli_mask(self, step: int, rate: float, count: int) -> Any:
                return np.arange(count) != (2 if skip else -1)

        trainer = reward_trainer(data, tmp_path)
        observer = Observer()
        plan = plan_training(trainer, PrivacyConfig(epsilon=200, noise_multiplier=1.0, sampling_rate=1.0))
        with private_training(trainer, plan, Skips(SEED), observer):
            trainer.train()
        return trainer, observer

    poisoned, observer = run(poisoned=True, skip=False)
    without, _ = run(poisoned=False, skip=True)
    assert torch.isfinite(weights(poisoned)).all()
    assert torch.equal(weights(poisoned), weights(without))
    assert [metrics["non_finite_units"] for _, _, metrics in observer.seen] == [1, 1, 1]
    assert poisoned.state.log_history == without.state.log_history


@pytest.mark.parametrize("kind", ["loop", "rows"])
def test_a_unit_whose_loss_cannot_be_computed_contributes_nothing_and_only_the_vault_is_told(
    tmp_path: Path, kind: Any
) -> None:
    class Skips(SealedRandom):
        def bernoulli_mask(self, step: int, rate: float, count: int) -> Any:
            return np.arange(count) != 2

    def run(make: Any, **sealed: Any) -> tuple[Any, Observer]:
        trainer = dpo_trainer(synthetic_pairs(6), tmp_path)
        if sealed:
            trainer.train_dataset = trainer.train_dataset.map(
                lambda row: {"chosen_ids": [91234] * (row["annotator_id"] == "person-2") + row["chosen_ids"]}
            )
        observer = Observer()
        config = PrivacyConfig(epsilon=200, noise_multiplier=1.0, sampling_rate=1.0, engine=kind)
        with private_training(trainer, plan_training(trainer, config), make(SEED), observer):
            trainer.train()
        return trainer, observer

    failing, observer = run(SealedRandom, spoilt=True)
    without, _ = run(Skips)
    if kind == "loop":  # in one pass rows are padded to the longest, which moves the last bits
        assert torch.equal(weights(failing), weights(without))
        assert failing.state.log_history == without.state.log_history
    assert torch.allclose(weights(failing), weights(without), atol=1e-5)
    assert [metrics["failed_units"] for _, _, metrics in observer.seen] == [1, 1, 1]
    assert [metrics["non_finite_units"] for _, _, metrics in observer.seen] == [0, 0, 0]
    assert "index out of range" in observer.seen[0][2]["unit_error"]


def test_a_set_up_that_cannot_work_is_told_in_full_before_a_row_is_looked_at(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(6), tmp_path, model=causal_model(vocab_size=300))
    observer = Observer()
    with pytest.raises(UnsupportedTrainerError, match=r"made-up row .*index out of range") as caught:
        train(trainer, observer=observer, sampling_rate=1.0)
    assert "320 tokens" in str(caught.value.next_step)
    assert not observer.seen


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        UnsupportedTrainerError("not of one unit's rows"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_matter_of_a_units_rows_ends_the_training(error: Exception) -> None:
    seen = Seen()
    with pytest.raises(type(error)):
        seen.fail(1, error)
    seen.fail(1, ValueError("her words"))
    assert seen.summary()["failed_units"] == 1


def test_an_annotator_whose_rows_a_trainer_drops_stays_on_the_roster(tmp_path: Path) -> None:
    rows = synthetic_pairs(6, 2)
    rows[2]["chosen"] *= 40
    rows[6]["chosen"] *= 40
    rows[7]["chosen"] *= 40
    trainer = reward_trainer(rows, tmp_path, max_length=100)
    config = PrivacyConfig(epsilon=200, noise_multiplier=1.0, sampling_rate=1.0)
    plan = plan_training(trainer, config)
    owners = trainer.train_dataset["annotator_id"]
    assert [{owners[row] for row in unit} for unit in plan.units.members] == [
        {"person-0"},
        {"person-1"},
        {"person-2"},
        set(),
        {"person-4"},
        {"person-5"},
    ]
    assert [len(unit) for unit in plan.units.members] == [2, 1, 2, 0, 2, 2]
    by_pair = plan_training(trainer, replace(config, unit="pair")).units
    assert [len(unit) for unit in by_pair.members] == [1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1]
    with private_training(trainer, plan, SealedRandom(SEED)) as training:
        trainer.train()
    assert training.steps == 3
    assert torch.isfinite(weights(trainer)).all()


# -- stopping -----------------------------------------------------------------------------------------------------


def test_a_run_that_would_cross_the_budget_stops_before_and_saves(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(10), tmp_path, max_steps=50, save_strategy="steps", save_steps=1000)
    training = train(trainer, epsilon=3.0, noise_multiplier=1.0, sampling_rate=0.3)
    plan = training.plan
    assert 0 < plan.steps < 50
    assert training.steps == plan.steps == trainer.state.global_step
    assert training.stopped_by_budget
    assert (tmp_path / f"checkpoint-{plan.steps}").is_dir()
    assert plan.notice is not None
    assert f"{plan.steps} of the 50 steps" in plan.notice
    assert training.epsilon <= 3.0
    assert compose([plan.mechanism.with_steps(plan.steps + 1)], 1e-5).epsilon > 3.0


def test_a_run_within_its_budget_is_not_called_stopped(tmp_path: Path) -> None:
    training = train(dpo_trainer(synthetic_pairs(6), tmp_path))
    assert not training.stopped_by_budget
    assert training.plan.notice is None


def test_not_even_a_callback_that_drives_on_gets_another_step(tmp_path: Path) -> None:
    class DrivesOn(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            control.should_training_stop = False
            return control

    trainer = dpo_trainer(synthetic_pairs(10), tmp_path, max_steps=50)
    plan = plan_training(trainer, PrivacyConfig(epsilon=3.0, noise_multiplier=1.0, sampling_rate=0.3))
    with private_training(trainer, plan, SealedRandom(SEED)) as training:
        trainer.callback_handler.callbacks.append(DrivesOn())
        with pytest.raises(PrivacyError, match=f"no step after step {plan.steps}"):
            trainer.train()
    assert training.steps == plan.steps


def test_an_interrupted_run_counts_the_step_that_was_begun(tmp_path: Path) -> None:
    class Interrupts(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                raise KeyboardInterrupt

    trainer = dpo_trainer(synthetic_pairs(6), tmp_path)
    trainer.add_callback(Interrupts())
    plan = plan_training(trainer, PrivacyConfig(epsilon=200, noise_multiplier=1.0))
    with pytest.raises(KeyboardInterrupt), private_training(trainer, plan, SealedRandom(SEED)) as training:
        trainer.train()
    assert training.steps == 2
    settled = settle_event(plan, "r", training.steps)
    assert settled.epsilon_total == compose([plan.mechanism.with_steps(2)], 1e-5).epsilon
    assert all(p.grad is None for p in trainer.model.parameters())


def test_accumulation_makes_one_logical_batch_and_epochs_count_expected_passes(tmp_path: Path) -> None:
    trainer = dpo_trainer(
        synthetic_pairs(12),
        tmp_path,
        max_steps=-1,
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
    )
    observer = Observer()
    training = train(trainer, observer=observer)
    assert training.plan.sampling_rate == pytest.approx(0.5)
    assert training.plan.steps == training.steps == trainer.state.global_step == 4
    assert trainer.state.epoch == 2
    assert len(observer.seen) == 4


# -- guards -------------------------------------------------------------------------------------------------------


def test_no_optimizer_step_is_taken_without_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = dpo_trainer(synthetic_pairs(6), tmp_path)
    before = weights(trainer)
    monkeypatch.setattr(engine.PrivateTraining, "privatise", lambda _: None)
    with pytest.raises(PrivacyError, match="without its noise"):
        train(trainer)
    assert torch.equal(before, weights(trainer))


def test_a_second_optimizer_step_in_one_step_is_refused(tmp_path: Path) -> None:
    class StepsAgain(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            optimizer.step()

    trainer = dpo_trainer(synthetic_pairs(6), tmp_path)
    trainer.add_callback(StepsAgain())
    with pytest.raises(PrivacyError, match="without its noise"):
        train(trainer)


def test_a_gradient_that_the_mechanism_does_not_cover_is_refused(tmp_path: Path) -> None:
    class Unfreezes(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            frozen = next(p for p in kwargs["model"].parameters() if not p.requires_grad)
            kwargs["optimizer"].param_groups[0]["params"].append(frozen.requires_grad_())
            frozen.grad = torch.ones_like(frozen)

    trainer = dpo_trainer(synthetic_pairs(6), tmp_path)
    trainer.add_callback(Unfreezes())
    with pytest.raises(PrivacyError, match="does not cover"):
        train(trainer)


def test_a_hook_that_would_see_raw_gradients_is_refused(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(6), tmp_path)
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    seen: list[torch.Tensor] = []
    parameter.register_hook(seen.append)
    with pytest.raises(UnsupportedTrainerError, match="hook on a parameter"):
        train(trainer)
    assert not seen


def test_a_model_that_remembers_data_in_a_buffer_is_refused(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(6), tmp_path)
    layer = trainer.model.get_base_model().model.norm
    layer.register_buffer("seen", torch.zeros(()))
    layer.register_forward_hook(lambda module, _, out: module.seen.add_(out.detach().mean()) and None)
    with pytest.raises(UnsupportedTrainerError, match="buffer 'seen'"):
        train(trainer, sampling_rate=1.0)


def test_a_plan_serves_one_training_on_the_data_it_was_made_for(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(6), tmp_path)
    plan = plan_training(trainer, PrivacyConfig(epsilon=200, noise_multiplier=1.0))
    with private_training(trainer, plan, SealedRandom(SEED)):
        trainer.train()
        with pytest.raises(PrivacyError, match="one training"):
            trainer.train()
    trainer.train_dataset = trainer.train_dataset.select(range(6))
    with pytest.raises(PrivacyError, match="changed after"), private_training(trainer, plan, SealedRandom(SEED)):
        trainer.train()


def test_evaluating_and_searching_are_refused(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(6), tmp_path, save_strategy="steps", save_steps=1)
    train(trainer)
    plan = plan_training(trainer, PrivacyConfig(epsilon=200, noise_multiplier=1.0))
    for attempt in (
        lambda: trainer._inner_training_loop(args=trainer.args, trial={}),
        lambda: trainer._evaluate(None, None),
    ):
        before = weights(trainer)
        with pytest.raises(UnsupportedTrainerError), private_training(trainer, plan, SealedRandom(SEED)):
            attempt()
        assert torch.equal(before, weights(trainer))


def test_an_option_changed_after_the_plan_is_noticed(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(6), tmp_path)
    plan = plan_training(trainer, PrivacyConfig(epsilon=200, noise_multiplier=1.0))
    with private_training(trainer, plan, SealedRandom(SEED)):
        trainer.loss_types = ["aot"]
        with pytest.raises(UnsupportedTrainerError, match="sorts"):
            trainer.train()


# -- afterwards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(tmp_path: Path, fails: bool) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if fails:
                raise OSError("disk full")

    trainer = dpo_trainer(synthetic_pairs(6), tmp_path)
    trainer.add_callback(Fails())
    kind, names, callbacks = type(trainer), set(vars(trainer)), list(trainer.callback_handler.callbacks)
    factory, tokens = logging.getLogRecordFactory(), trainer._total_train_tokens
    with contextlib.suppress(OSError) if fails else contextlib.nullcontext():
        train(trainer)
    assert type(trainer) is kind
    assert not [name for name in set(vars(trainer)) - names if "rlhf" in name]
    assert trainer.callback_handler.callbacks == callbacks
    assert logging.getLogRecordFactory() is factory
    assert trainer._total_train_tokens == tokens
    assert not any(trainer._metrics.values())
    assert all(p.grad is None for p in trainer.model.parameters())
    if not fails:
        assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks
        trainer.args.max_steps = 2
        assert trainer.train().training_loss > 0, "an ordinary training afterwards logs as it always did"
        assert "loss" in trainer.state.log_history[0]


def test_a_second_training_goes_on_from_the_ledger(tmp_path: Path) -> None:
    trainer = dpo_trainer(synthetic_pairs(10), tmp_path)
    first = train(trainer, sampling_rate=0.5)
    config = PrivacyConfig(epsilon=200, noise_multiplier=1.0, sampling_rate=0.5)
    plan = plan_training(trainer, config, [first.plan.mechanism])
    assert plan.before == first.epsilon
    assert first.epsilon < plan.epsilon < 2 * first.epsilon
    with private_training(trainer, plan, SealedRandom(bytes(32))) as training:
        trainer.train()
    assert training.epsilon == plan.epsilon


def test_an_adapter_that_was_trained_before_goes_on_against_its_own_copy(tmp_path: Path) -> None:
    from peft import get_peft_model
    from support.tiny import tokenizer
    from trl import DPOConfig, DPOTrainer

    model = get_peft_model(causal_model(), lora())
    perturb(model)
    args = DPOConfig(output_dir=str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to=[], save_strategy="no")
    trainer = DPOTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(preferences(20)), processing_class=tokenizer()
    )
    reference = {n: p.clone() for n, p in trainer.model.named_parameters() if ".ref." in n}
    assert reference
    observer = Observer()
    train(trainer, observer=observer, sampling_rate=1.0)
    assert observer.seen[0][2]["unit_norm_mean"] > 0
    assert all(torch.equal(p, reference[n]) for n, p in trainer.model.named_parameters() if n in reference)


def test_without_its_noise_the_private_step_goes_down_the_loss(tmp_path: Path) -> None:
    class NoNoise(SealedRandom):
        def normals(self, step: int, tensor: int, count: int) -> Any:
            return np.zeros(count)

    rows = [
        {"prompt": "Q:", "chosen": " good", "rejected": " bad", "annotator_id": f"p{number}"} for number in range(6)
    ]
    trainer = dpo_trainer(rows, tmp_path, max_steps=8, learning_rate=1e-2)
    observer = Observer()
    plan = plan_training(trainer, PrivacyConfig(epsilon=200, noise_multiplier=1.0, sampling_rate=1.0))
    with private_training(trainer, plan, NoNoise(SEED), observer):
        trainer.train()
    losses = [metrics["loss"] for _, _, metrics in observer.seen]
    assert losses[-1] < losses[0] - 0.05
