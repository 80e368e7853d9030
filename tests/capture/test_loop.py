"""Training loops written by hand: what they tell, what is measured by itself, and what nobody recorded."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from support.tiny import causal_model, dpo_trainer, lora, reward_model, synthetic_pairs, tokenizer
from support.trails import events, kinds

from rlhf_audit_nb.auditor import AuditableRLHF
from rlhf_audit_nb.capture.loop import digest_batch
from rlhf_audit_nb.capture.run import AuditWarning
from rlhf_audit_nb.capture.weights import describe_model, digest_tensors, final_tensors
from rlhf_audit_nb.compliance.lineage import lineage
from rlhf_audit_nb.config import AuditConfig, PrivacyConfig
from rlhf_audit_nb.errors import AuditError, ConfigError, DataError, RunError, UnsupportedTrainerError
from rlhf_audit_nb.events import (
    CheckpointRecorded,
    DataBound,
    MetricsLogged,
    ModelBound,
    RunFinished,
    Step,
    TrainerAttached,
    WeightsSaved,
)
from rlhf_audit_nb.privacy.descent import read_descent

ROWS = synthetic_pairs(3)
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def auditor(tmp_path):
    return AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "audit")))


@pytest.fixture
def trail(auditor):
    return auditor.trail


class Small(torch.nn.Module):
    """Two layers, one of which is not trained."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)
        self.second.requires_grad_(requires_grad=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))).sum()


def small(seed=0, **settings):
    torch.manual_seed(seed)
    model = Small()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **{"lr": 0.1, **settings})


def update(model, optimizer, batch=None):
    optimizer.zero_grad()
    loss = model(torch.ones(2, 3) if batch is None else batch)
    loss.backward()
    optimizer.step()
    return loss


def distance(before, after):
    return math.sqrt(sum(float((before[name] - after[name]).double().square().sum()) for name in before))


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- steps -----------------------------------------------------------------------------------------------------------


def test_an_update_is_recorded_with_what_the_optimizer_showed(auditor, trail):
    model, optimizer = small()
    rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    seen, base = [], weights(model)
    with auditor.track_training("loop") as run:
        for number in range(3):
            batch = torch.full((2, 3), float(number))
            before = weights(model)
            loss = update(model, optimizer, batch)
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.first.parameters()))
            auditor.track_policy_update(model=model, optimizer=optimizer, batch=batch, metrics={"loss": loss})
            seen.append((loss.item(), norm, distance(before, weights(model)), digest_batch(batch)))
            rates.step()
    steps = events(trail, Step)
    assert [step.step for step in steps] == [1, 2, 3]
    for step, (loss, gradient, moved, digest) in zip(steps, seen, strict=True):
        assert step.metrics == {"loss": pytest.approx(loss)}
        assert step.gradient_norm == pytest.approx(gradient, rel=1e-5)
        assert step.update_norm == pytest.approx(moved, rel=1e-4)
        assert moved > 0
        assert step.batch_digest == digest
        assert step.notes == []
    assert [step.learning_rate for step in steps] == [0.1, 0.05, 0.025]
    first, last = events(trail, ModelBound)
    assert first.weights_digest == digest_tensors(base)
    assert last.weights_digest == digest_tensors(final_tensors(model)) != first.weights_digest
    assert (first.role, last.role, first.trainable, first.parameters) == ("base", "final", 16, 21)
    (attached,) = events(trail, TrainerAttached)
    assert (attached.trainer, attached.seed) == ("PlainLoop", 0)
    (settings,) = attached.hyperparameters["optimizers"]
    assert (settings["optimizer"], settings["betas"]) == ("AdamW", [0.9, 0.999])
    expected = ["trainer.attached", "model.bound", *["train.step"] * 3, "model.bound", "run.finished"]
    assert [kind for kind in kinds(trail, run.id) if kind in expected] == expected
    (finished,) = events(trail, RunFinished)
    assert (finished.steps, finished.trained, finished.unrecorded_steps, finished.status) == (3, True, 0, "completed")
    assert [value for _, value in run.state.series["loss"]] == pytest.approx([loss for loss, *_ in seen])


def test_a_step_that_is_recorded_raises_no_warning_and_one_that_is_not_does(auditor, trail):
    model, optimizer = small()
    with warnings.catch_warnings(), auditor.track_training("recorded") as run:
        warnings.simplefilter("error", AuditWarning)
        update(model, optimizer)
        run.step(model=model)
    assert run.state.warnings == []
    with auditor.track_training("silent") as run:
        update(model, optimizer)
        with pytest.warns(AuditWarning, match="outside a recorded trainer"):
            update(model, optimizer)
        update(model, optimizer)
    assert len(run.state.warnings) == 1
    with pytest.warns(AuditWarning, match="outside a recorded trainer"), auditor.track_training("once"):
        update(model, optimizer)
    assert [event.unrecorded_steps for event in events(trail, RunFinished)] == [0, 3, 1]
    assert len(events(trail, Step)) == 1
    update(model, optimizer)  # outside a run nobody minds


def test_steps_between_two_that_are_recorded_are_told_in_the_second(auditor, trail):
    model, optimizer = small()
    with warnings.catch_warnings(record=True) as told, auditor.track_training("sparse") as run:
        warnings.simplefilter("always")
        for number in range(1, 8):
            update(model, optimizer)
            if number % 3 == 1:
                run.step({"loss": number}, step=number, model=model, optimizer=optimizer)
    assert sum("outside a recorded trainer" in str(warning.message) for warning in told) == 1
    assert [(step.step, step.notes) for step in events(trail, Step)] == [
        (1, []),
        (4, ["optimizer steps before this one that were not recorded: 2"]),
        (7, ["optimizer steps before this one that were not recorded: 2"]),
    ]
    (finished,) = events(trail, RunFinished)
    assert (finished.steps, finished.unrecorded_steps) == (3, 4)


def test_two_optimizers_are_recorded_apart_or_together(auditor, trail):
    (policy, first), (value, second) = small(1, lr=0.5), small(2)
    with auditor.track_training("two") as run:
        update(policy, first)
        update(value, second)
        run.step({"of": 1}, model=policy, optimizer=first)
        run.step({"of": 2}, optimizer=second)
        before = {**{f"p{k}": v for k, v in weights(policy).items()}, **{f"v{k}": v for k, v in weights(value).items()}}
        update(policy, first)
        update(value, second)
        after = {**{f"p{k}": v for k, v in weights(policy).items()}, **{f"v{k}": v for k, v in weights(value).items()}}
        run.step({"of": 3})
    one, two, both = events(trail, Step)
    assert (one.learning_rate, two.learning_rate) == (0.5, 0.1)
    assert both.update_norm == pytest.approx(distance(before, after), rel=1e-4)
    assert events(trail, RunFinished)[0].unrecorded_steps == 0


def test_a_record_without_a_step_says_so(auditor, trail):
    model, optimizer = small()
    with auditor.track_training("skipped"):
        auditor.track_policy_update(model=model, optimizer=optimizer)
    (step,) = events(trail, Step)
    assert step.notes == ["no optimizer step was seen before this entry"]
    assert (step.update_norm, step.learning_rate) == (None, None)


def test_a_loss_that_is_no_number_is_recorded_and_warned_of(auditor, trail):
    model, optimizer = small()
    with auditor.track_training("nan") as run:
        update(model, optimizer)
        with pytest.warns(AuditWarning, match="not a finite number"):
            run.step({"loss": float("nan")}, model=model)
    (step,) = events(trail, Step)
    assert (step.metrics, step.notes) == ({"loss": "NaN"}, ["the loss was not finite"])


def test_recording_changes_no_weight(tmp_path, auditor):
    def trained(record):
        model, optimizer = small(4)
        for _ in range(3):
            loss = update(model, optimizer)
            if record:
                auditor.track_policy_update(model=model, optimizer=optimizer, batch=IDS, metrics={"loss": loss})
        return digest_tensors(model.state_dict())

    plain = trained(record=False)
    with auditor.track_training("same"):
        assert trained(record=True) == plain


def test_a_real_model_with_an_adapter_is_known_as_a_trainer_would_know_it(auditor, trail):
    from peft import get_peft_model

    base = causal_model()
    model = get_peft_model(causal_model(), lora())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    expected = describe_model(model, "base", tokenizer())
    with auditor.track_training("adapter") as run:
        run.bind_model(model, processing_class=tokenizer())
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            run.step(model=model, optimizer=optimizer)
    first, last = events(trail, ModelBound)
    told = ("weights_digest", "trainable_digest", "config_digest", "tokenizer_digest", "adapter", "parameters")
    assert [getattr(first, name) for name in told] == [getattr(expected, name) for name in told]
    assert first.weights_digest == digest_tensors(dict(base.state_dict()))
    assert last.weights_digest == digest_tensors(final_tensors(model))
    assert last.tokenizer_digest == first.tokenizer_digest is not None


def test_a_base_that_was_not_seen_is_told_and_not_guessed(auditor, trail):
    model, optimizer = small()
    with warnings.catch_warnings(), auditor.track_training("late") as run:
        warnings.simplefilter("ignore", AuditWarning)
        update(model, optimizer)
        update(model, optimizer)
        run.step(model=model, optimizer=optimizer)
    assert any("bind_model" in sentence for sentence in run.state.warnings)
    assert [event.role for event in events(trail, ModelBound)] == ["final"]


def test_weights_are_digested_every_n_steps(tmp_path):
    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "audit"), weights_every=2))
    model, optimizer = small()
    with auditor.track_training("digests") as run:
        for _ in range(4):
            update(model, optimizer)
            run.step(model=model)
    assert [step.weights_digest is not None for step in events(auditor.trail, Step)] == [False, True, False, True]


# --- what it uses ----------------------------------------------------------------------------------------------------


def test_the_lineage_knows_a_loop(auditor, trail):
    """A reward model out of one loop is used by the next, which trains on what the first one read."""
    reward, optimizer = reward_model(), None
    optimizer = torch.optim.SGD(reward.parameters(), lr=0.1)
    with auditor.track_training("reward") as run:
        run.bind_data(ROWS)
        reward(input_ids=IDS).logits.sum().backward()
        optimizer.step()
        run.step(model=reward)
    policy, optimizer = small()
    with auditor.track_training("policy") as run:
        run.bind_model(reward, role="reward")
        run.bind_data(torch.utils.data.DataLoader(ROWS, batch_size=2), role="evaluation")
        run.bind_data(ROWS)
        update(policy, optimizer)
        run.step(model=policy)
    descent = read_descent(trail.reader())
    first, second = descent.trainings
    assert [training.trainer for training in descent.trainings] == ["PlainLoop", "PlainLoop"]
    ((_, used),) = second.of_role("reward")
    assert [training.run for training in descent.left(used.weights_digest)] == [first.run]
    assert [event.digest for event in events(trail, DataBound)] == [events(trail, DataBound)[0].digest] * 3
    assert [event.rows for event in events(trail, DataBound)] == [len(ROWS)] * 3
    assert [node.label for node in lineage(auditor._evidence(None)).of("training")] == ["PlainLoop", "PlainLoop"]


def test_what_was_bound_and_never_trained_is_recorded_all_the_same(auditor, trail):
    with auditor.track_training("only looked") as run:
        run.bind_data(ROWS)
    assert [event.role for event in events(trail, DataBound)] == ["train"]
    assert events(trail, RunFinished)[0].trained is False


def test_a_trainer_after_a_loop_is_a_training_of_its_own(auditor, trail, tmp_path):
    model, optimizer = small()
    with auditor.track_training("both") as run:
        update(model, optimizer)
        run.step(model=model)
        dpo_trainer(ROWS, tmp_path / "out", max_steps=1).train()
        update(model, optimizer)
        run.step(model=model)
    descent = read_descent(trail.reader())
    assert [training.trainer for training in descent.trainings] == ["PlainLoop", "DPOTrainer", "PlainLoop"]
    assert [len(training.of_role("final")) for training in descent.trainings] == [1, 1, 1]
    assert events(trail, RunFinished)[0].steps == 3


# --- metrics and checkpoints -----------------------------------------------------------------------------------------


def test_metrics_have_an_entry_of_their_own(auditor, trail):
    with auditor.track_training("metrics") as run:
        run.log_metrics({"reward/mean": np.float32(0.5), "count": torch.tensor([3]), "gap": math.inf}, step=7)
        run.log_metrics({"kl": 0.1})
    assert events(trail, MetricsLogged) == [
        MetricsLogged(metrics={"reward/mean": 0.5, "count": 3, "gap": "Infinity"}, step=7),
        MetricsLogged(metrics={"kl": 0.1}),
    ]
    assert events(trail, Step) == []


def test_a_checkpoint_is_saved_signed_and_recorded(auditor, trail, tmp_path):
    model, optimizer = small()
    with auditor.track_training("checkpoints") as run:
        update(model, optimizer)
        run.step(model=model)
        told = auditor.checkpoint(epoch=1, metrics={"reward": 0.7})
        saved = auditor.checkpoint(model=model, folder=tmp_path / "plain", epoch=2)
        real = auditor.checkpoint(
            model=causal_model(), folder=str(tmp_path / "real"), epoch=2.5, processing_class=tokenizer()
        )
        (tmp_path / "mine").mkdir()
        torch.save(model.state_dict(), tmp_path / "mine" / "weights.pt")
        mine = auditor.checkpoint(folder=tmp_path / "mine")
    assert [event.step for event in events(trail, CheckpointRecorded)] == [1, 1, 1, 1]
    assert events(trail, CheckpointRecorded) == [told, saved, real, mine]
    assert (told.epoch, told.metrics, told.folder_digest) == (1, {"reward": 0.7}, None)
    assert told.weights_digest == saved.weights_digest == digest_tensors(dict(model.state_dict()))
    assert mine.weights_digest is None
    folders = events(trail, WeightsSaved)
    assert [item.name for item in folders] == ["plain", "real", "mine"]
    assert [item.digest for item in folders] == [saved.folder_digest, real.folder_digest, mine.folder_digest]
    assert {path.name for path in (tmp_path / "real").iterdir()} >= {"model.safetensors", "tokenizer.json", "model.sig"}
    from safetensors.torch import load_file

    assert digest_tensors(load_file(tmp_path / "plain" / "model.safetensors")) == saved.weights_digest


def test_its_signature_is_one_that_model_signing_accepts_until_a_file_changes(auditor, tmp_path):
    folder = tmp_path / "plain"
    with auditor.track_training("signed"):
        auditor.checkpoint(model=Small(), folder=folder)
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder), "--signature",
               str(folder / "model.sig"), "--public_key", str(folder / "model.pub")]  # fmt: skip
    assert subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert subprocess.run(command, capture_output=True, timeout=120, check=False).returncode != 0


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batchs_digest_depends_on_every_value_and_not_on_the_order_of_keys():
    batch = {"ids": torch.tensor([[1, 2]]), "text": ["a", "b"], "weight": 0.5, "nested": {"x": (1, None, True)}}
    same = {name: batch[name] for name in reversed(batch)}
    assert digest_batch(batch) == digest_batch(same)
    others = [
        {**batch, "ids": torch.tensor([[1, 3]])},
        {**batch, "ids": torch.tensor([[1, 2]], dtype=torch.int32)},
        {**batch, "ids": torch.tensor([1, 2])},
        {**batch, "text": ["b", "a"]},
        {**batch, "text": ["a"]},
        {**batch, "weight": "0.5"},
        {**batch, "nested": {"x": (1, None, False)}},
        {**batch, "nested": {"x/0": (1, None, True)}},
    ]
    assert len({digest_batch(one) for one in [batch, *others]}) == 1 + len(others)
    assert digest_batch(np.ones(2)) == digest_batch(torch.ones(2, dtype=torch.float64))


def test_a_batchs_digest_is_what_the_page_says():
    assert digest_batch("a") == hashlib.sha256(b' "a"\n').hexdigest()
    lines = [" mapping 1", '/"a" sequence 2', f'/"a"/0 {json.dumps(1)}', '/"a"/1 null']
    assert digest_batch({"a": [1, None]}) == hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


# --- what cannot be used ---------------------------------------------------------------------------------------------

WRONG = {
    "a metric that is text": (lambda run: run.step({"loss": "low"}), ConfigError, "'loss' is a str, not a number"),
    "a metric of many numbers": (lambda run: run.step({"loss": torch.ones(2)}), ConfigError, "'loss' is a Tensor"),
    "metrics that are no dict": (lambda run: run.log_metrics([1.0]), ConfigError, "metrics is a list"),
    "a metric without a name": (lambda run: run.log_metrics({"": 1}), ConfigError, "A metric is called ''"),
    "a step below 0": (lambda run: run.step(step=-1), ConfigError, "step is -1"),
    "a model that is none": (lambda run: run.step(model="gpt2"), ConfigError, "model is a str"),
    "a batch of objects": (lambda run: run.step(batch={"x": object()}), DataError, 'a object at /"x"'),
    "a role that is none": (lambda run: run.bind_data(ROWS, role="test"), ConfigError, "role is 'test'"),
    "a model's role that is none": (lambda run: run.bind_model(Small(), role="final"), ConfigError, "role is 'final'"),
    "an epoch that is none": (lambda run: run.checkpoint(epoch="two"), ConfigError, "epoch is 'two'"),
    "a folder with nothing in it": (lambda run: run.checkpoint(folder="nowhere"), ConfigError, "folder 'nowhere'"),
}


def test_what_cannot_be_used_gets_a_sentence_and_changes_nothing(auditor):
    with auditor.track_training("wrong") as run:
        size = run.trail.reader().size
        for work, kind, says in WRONG.values():
            with pytest.raises(kind) as refused:
                work(run)
            assert says in str(refused.value)
            assert refused.value.next_step
        assert run.trail.reader().size == size


def test_outside_a_run_and_on_another_trail_it_is_refused(auditor, tmp_path):
    with pytest.raises(RunError, match="no run is open here"):
        auditor.checkpoint(epoch=1)
    other = AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "other")))
    with other.track_training("elsewhere"), pytest.raises(RunError, match="on another trail"):
        auditor.track_policy_update(model=Small(), optimizer=None)
    with other.track_training("closed") as run:
        pass
    with pytest.raises(RunError, match="'closed' is not open"):
        run.step()


def test_while_a_trainer_trains_its_own_steps_are_recorded_once(auditor, trail, tmp_path):
    from transformers import TrainerCallback

    class Tells(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            run.log_metrics({"mine": 1.0})
            with pytest.raises(RunError, match="records its own steps"):
                run.step({"loss": 0.0})

    trainer = dpo_trainer(ROWS, tmp_path / "out", max_steps=1)
    trainer.add_callback(Tells())
    with auditor.track_training("beside") as run:
        trainer.train()
    assert len(events(trail, Step)) == len(events(trail, MetricsLogged)) == 1


CALLS = {
    "step": lambda auditor, run: run.step({"loss": 1.0}),
    "log_metrics": lambda auditor, run: run.log_metrics({"loss": 1.0}),
    "bind_model": lambda auditor, run: run.bind_model(Small()),
    "bind_data": lambda auditor, run: run.bind_data(ROWS),
    "track_policy_update": lambda auditor, run: auditor.track_policy_update(model=Small(), optimizer=None, batch=ROWS),
    "checkpoint": lambda auditor, run: auditor.checkpoint(epoch=1, metrics={"loss": 1.0}),
}


def test_a_private_run_has_no_loop_of_ones_own(tmp_path):
    auditor = AuditableRLHF(
        privacy_config=PrivacyConfig(epsilon=1.0), audit_config=AuditConfig(trail=str(tmp_path / "audit"))
    )
    model, optimizer = small()
    with auditor.track_training("private") as run:
        size = auditor.trail.reader().size
        for call in CALLS.values():
            with pytest.raises(UnsupportedTrainerError, match="cannot be made private") as refused:
                call(auditor, run)
            assert isinstance(refused.value, AuditError)
            assert refused.value.reason == "loop-in-private-run"
        model(torch.ones(2, 3)).backward()
        with pytest.raises(UnsupportedTrainerError, match="outside a trainer"):
            optimizer.step()
        assert auditor.trail.reader().size == size
