"""Going on from a checkpoint under privacy: what is paid, what goes on, and that no seed is in it or comes from it."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import causal_model, dpo_trainer, lora, reward_trainer, synthetic_pairs
from support.trails import events, private_half, without_cross_checks
from transformers import TrainerCallback, set_seed

from rlhf_audit_nb.auditor import AuditableRLHF
from rlhf_audit_nb.capture.run import AuditWarning
from rlhf_audit_nb.config import AuditConfig, PrivacyConfig
from rlhf_audit_nb.errors import BudgetExceededError, PrivacyError, RunError
from rlhf_audit_nb.events import (
    ModelBound,
    PrivacyReserved,
    PrivacySettled,
    RunResumed,
    Step,
    TrainerAttached,
    WeightsSaved,
)
from rlhf_audit_nb.privacy import SealedRandom, plan_training, private_training
from rlhf_audit_nb.privacy.accountant import Mechanism, composed_epsilon
from rlhf_audit_nb.trail import TrailReader, verify_trail

SEED = bytes(range(32))
PAIRS = synthetic_pairs(20)
NOISY = {"epsilon": 50.0, "delta": 1e-3, "noise_multiplier": 1.0, "sampling_rate": 0.3, "loss_noise": None}
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


@pytest.fixture(scope="module", autouse=True)
def quick_accounting():
    with without_cross_checks():
        yield


def auditor(folder: Path, **privacy: Any) -> AuditableRLHF:
    config = PrivacyConfig(**{**NOISY, **privacy})
    return AuditableRLHF(privacy_config=config, audit_config=AuditConfig(trail=str(folder / "audit"), weights_every=1))


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in trainer.model.parameters() if p.requires_grad])


def first_run(folder: Path, **changes: Any) -> tuple[AuditableRLHF, Path]:
    """A private training of six steps with its checkpoints; the second of them is what tests resume from."""
    held = auditor(folder)
    trainer = dpo_trainer(PAIRS, folder / "out", **{**SAVING, **changes})
    with held.track_training("first"):
        trainer.train()
    return held, folder / "out" / "checkpoint-4"


# --- what goes on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full", "reward"])
def test_a_resumed_training_is_paid_for_on_its_own_and_goes_on_where_it_was(tmp_path: Path, kind: str) -> None:
    def build() -> Any:
        if kind == "reward":
            return reward_trainer(PAIRS, tmp_path / "out", **SAVING)
        return dpo_trainer(PAIRS, tmp_path / "out", peft="lora" if kind == "lora" else None, **SAVING)

    held = auditor(tmp_path)
    first = build()
    with held.track_training("first") as before:
        first.train()
    resumed = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error", AuditWarning)
        with held.track_training("resumed") as run:
            resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert resumed.state.global_step == 6
    assert not torch.equal(weights(first), weights(resumed)), "the last two steps had another seed"

    trail = held.trail
    rates = [step.learning_rate for step in events(trail, Step, before.id)]
    steps = events(trail, Step, run.id)
    assert [step.step for step in steps] == [5, 6]
    assert [step.learning_rate for step in steps] == rates[4:]
    assert rates[4] != rates[0]

    one, two = (events(trail, PrivacyReserved, item.id)[0] for item in (before, run))
    assert (one.steps, two.steps, two.steps_asked) == (6, 2, 2)
    assert [item.steps for item in events(trail, PrivacySettled)] == [6, 2]
    mechanisms = [Mechanism(1.0, 0.3, 6), Mechanism(1.0, 0.3, 2)]
    assert steps[-1].epsilon == pytest.approx(composed_epsilon(mechanisms, 1e-3), rel=1e-6)
    assert two.epsilon_before == pytest.approx(composed_epsilon(mechanisms[:1], 1e-3), rel=1e-6)
    assert held.budget().total == pytest.approx(composed_epsilon(mechanisms, 1e-3), rel=1e-6)
    assert (run.state.step, run.state.max_steps, run.steps) == (2, 2, 2)
    assert [value for _, value in run.state.series["epsilon"]][-1] == pytest.approx(run.state.privacy.curve[2])

    (said,) = events(trail, RunResumed, run.id)
    saved = [(entry.index, entry.run) for entry in trail.reader().entries(type=WeightsSaved.TYPE)]
    assert (said.step, said.from_run) == (4, before.id)
    assert (said.entry, said.from_run) in saved
    assert events(trail, TrainerAttached, run.id)[0].max_steps == 6
    fourth = events(trail, Step, before.id)[3]
    base = next(model for model in events(trail, ModelBound, run.id) if model.role == "base")
    assert base.trainable_digest == fourth.weights_digest, "the base is the model as the checkpoint has it"
    assert verify_trail(trail.location).reasons == ()


def test_both_seeds_are_sealed_and_differ(tmp_path: Path) -> None:
    held, checkpoint = first_run(tmp_path)
    with held.track_training("resumed"):
        dpo_trainer(PAIRS, tmp_path / "out", **SAVING).train(resume_from_checkpoint=str(checkpoint))
    reserved = list(held.trail.reader().entries(type=PrivacyReserved.TYPE))
    seeds = [private_half(held.trail, entry).seed for entry in reserved]
    assert len(set(seeds)) == len(seeds) == 2


def test_the_last_checkpoint_is_found_and_the_steps_of_a_partial_epoch_are_not_taken_again(tmp_path: Path) -> None:
    held = auditor(tmp_path, sampling_rate=0.15)  # seven steps an epoch
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": -1, "num_train_epochs": 2}

    class StopsAt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 9

    first = dpo_trainer(PAIRS, tmp_path / "out", gradient_accumulation_steps=2, **settings)
    first.add_callback(StopsAt())
    with held.track_training("first"):
        first.train()
    resumed = dpo_trainer(PAIRS, tmp_path / "out", gradient_accumulation_steps=2, **settings)
    with held.track_training("resumed") as run:
        resumed.train(resume_from_checkpoint=True)
    assert [step.step for step in events(held.trail, Step, run.id)] == [10, 11, 12, 13, 14]
    assert resumed.state.global_step == resumed.state.max_steps == 14
    assert resumed.state.epoch == pytest.approx(2.0)
    assert [item.steps for item in events(held.trail, PrivacyReserved)] == [14, 5]
    assert [item.steps for item in events(held.trail, PrivacySettled)] == [9, 5]


@pytest.mark.parametrize("skip", [False, True])
def test_skipping_what_an_epoch_has_behind_it_samples_nobody(tmp_path: Path, skip: bool) -> None:
    first_run(tmp_path)
    asked: list[int] = []

    class Watched(SealedRandom):
        def bernoulli_mask(self, step: int, rate: float, count: int) -> Any:
            asked.append(step)
            return super().bernoulli_mask(step, rate, count)

    trainer = dpo_trainer(PAIRS, tmp_path / "out", ignore_data_skip=skip, **SAVING)
    plan = plan_training(trainer, PrivacyConfig(**NOISY), done=4)
    with private_training(trainer, plan, Watched(SEED)) as training:
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert asked == [0, 1]
    assert training.steps == 2
    assert trainer.state.global_step == 6
    assert not training.stopped_by_budget


def test_another_plan_after_resuming_is_a_reservation_of_its_own(tmp_path: Path) -> None:
    held, checkpoint = first_run(tmp_path)
    other = auditor(tmp_path, noise_multiplier=2.0, sampling_rate=0.5)
    with other.track_training("resumed"):
        dpo_trainer(PAIRS, tmp_path / "out", **{**SAVING, "max_steps": 8}).train(resume_from_checkpoint=str(checkpoint))
    reserved = events(held.trail, PrivacyReserved)
    assert [(item.noise_multiplier, item.sampling_rate, item.steps) for item in reserved] == [
        (1.0, 0.3, 6),
        (2.0, 0.5, 4),
    ]
    assert held.budget().total == pytest.approx(
        composed_epsilon([Mechanism(1.0, 0.3, 6), Mechanism(2.0, 0.5, 4)], 1e-3), rel=1e-6
    )


def test_a_resumed_training_that_the_budget_cuts_stops_in_time_and_saves(tmp_path: Path) -> None:
    held, checkpoint = first_run(tmp_path)
    fits = composed_epsilon([Mechanism(1.0, 0.3, 6), Mechanism(1.0, 0.3, 3)], 1e-3) * 1.001
    short = auditor(tmp_path, epsilon=fits)
    trainer = dpo_trainer(PAIRS, tmp_path / "out", **{**SAVING, "max_steps": 12, "save_steps": 100})
    with pytest.warns(AuditWarning, match="3 of the 8 steps"), short.track_training("short"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 7
    settled = events(held.trail, PrivacySettled)[-1]
    assert (settled.steps, settled.stopped_by_budget) == (3, True)
    assert (tmp_path / "out" / "checkpoint-7").is_dir()


# --- what is refused, before anything is reserved --------------------------------------------------------------------


def test_an_exhausted_budget_refuses_a_resumption_by_name_and_reserves_nothing(tmp_path: Path) -> None:
    held, checkpoint = first_run(tmp_path)
    spent = held.budget().total
    poor = auditor(tmp_path, epsilon=spent)
    trainer = dpo_trainer(PAIRS, tmp_path / "out", **SAVING)
    before = weights(trainer)
    with pytest.raises(BudgetExceededError), poor.track_training("resumed"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert len(events(held.trail, PrivacyReserved)) == 1
    assert torch.equal(before, weights(trainer))


def test_a_training_that_was_finished_has_nothing_to_resume(tmp_path: Path) -> None:
    held, checkpoint = first_run(tmp_path)
    trainer = dpo_trainer(PAIRS, tmp_path / "out", **SAVING)
    with pytest.raises(PrivacyError, match="step 6 of 6") as refused, held.track_training("again"):
        trainer.train(resume_from_checkpoint=str(checkpoint.with_name("checkpoint-6")))
    assert refused.value.reason == "no-steps-left"
    assert len(events(held.trail, PrivacyReserved)) == 1


def test_a_checkpoint_that_is_missing_or_not_whole_is_named_and_nothing_is_reserved(tmp_path: Path) -> None:
    held, checkpoint = first_run(tmp_path)
    (checkpoint / "trainer_state.json").unlink()
    for asked, output, named in (
        (str(checkpoint), "out", "checkpoint-4"),
        (str(tmp_path / "nowhere"), "out", "nowhere"),
        (True, "empty", "empty"),
    ):
        trainer = dpo_trainer(PAIRS, tmp_path / output, **SAVING)
        with pytest.raises(RunError, match=named) as refused, held.track_training("again"):
            trainer.train(resume_from_checkpoint=asked)
        assert refused.value.reason == "no-checkpoint"
    assert len(events(held.trail, PrivacyReserved)) == 1


def test_the_argument_of_scripts_is_no_reason_to_refuse(tmp_path: Path) -> None:
    held, checkpoint = first_run(tmp_path)
    trainer = dpo_trainer(PAIRS, tmp_path / "out", resume_from_checkpoint=str(checkpoint), **SAVING)
    with held.track_training("resumed") as run:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    assert [step.step for step in events(held.trail, Step, run.id)] == [5, 6]


# --- where the checkpoint comes from ---------------------------------------------------------------------------------


def resume_with_warnings(held: AuditableRLHF, folder: Path, checkpoint: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AuditWarning)
        with held.track_training("resumed"):
            dpo_trainer(PAIRS, folder / "again", **SAVING).train(resume_from_checkpoint=str(checkpoint))
    return [str(item.message) for item in caught if issubclass(item.category, AuditWarning)]


def test_a_checkpoint_without_privacy_is_warned_of(tmp_path: Path) -> None:
    held = auditor(tmp_path)
    open_one = AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "audit")))
    with open_one.track_training("open") as run:
        dpo_trainer(PAIRS, tmp_path / "out", **SAVING).train()
    said = resume_with_warnings(held, tmp_path, tmp_path / "out" / "checkpoint-4")
    assert any("no private run of this trail left" in sentence for sentence in said)
    assert events(held.trail, RunResumed)[0].from_run == run.id
    left = json.loads((tmp_path / "again" / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert len(left) == 6
    assert not any("loss" in logs or "rewards/margins" in logs for logs in left)


def test_a_checkpoint_from_elsewhere_or_changed_since_is_warned_of(tmp_path: Path) -> None:
    dpo_trainer(PAIRS, tmp_path / "out", **SAVING).train()
    held = auditor(tmp_path)
    said = resume_with_warnings(held, tmp_path, tmp_path / "out" / "checkpoint-4")
    assert any("no run of this trail left" in sentence for sentence in said)
    assert events(held.trail, RunResumed)[0].from_run is None

    (tmp_path / "b").mkdir()
    ours, checkpoint = first_run(tmp_path / "b")
    (checkpoint / "notes.txt").write_text("added")
    said = resume_with_warnings(ours, tmp_path / "b", checkpoint)
    assert any("as it is now" in sentence for sentence in said)


def test_a_resumption_without_privacy_is_recorded_as_well(tmp_path: Path) -> None:
    held = AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "audit")))
    with held.track_training("first") as before:
        dpo_trainer(PAIRS, tmp_path / "out", **SAVING).train()
    with held.track_training("resumed") as run:
        dpo_trainer(PAIRS, tmp_path / "out", **SAVING).train(
            resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4")
        )
    (said,) = events(held.trail, RunResumed)
    assert (said.step, said.from_run) == (4, before.id)
    assert [step.step for step in events(held.trail, Step, run.id)] == [5, 6]


# --- randomness ------------------------------------------------------------------------------------------------------


def resumed_weights(folder: Path, seed: bytes, checkpoint: Path, *, torch_seed: int = 42, **args: Any) -> torch.Tensor:
    adapter = lora(lora_dropout=0.2)
    trainer = dpo_trainer(
        PAIRS, folder / "replayed", peft=adapter, disable_dropout=False, seed=torch_seed, max_steps=6, **args
    )
    plan = plan_training(trainer, PrivacyConfig(**NOISY), done=4)
    set_seed(torch_seed)
    with private_training(trainer, plan, SealedRandom(seed)):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    return weights(trainer)


def test_nothing_but_the_sealed_seed_decides_what_a_resumed_training_draws(tmp_path: Path) -> None:
    trainer = dpo_trainer(PAIRS, tmp_path / "out", peft=lora(lora_dropout=0.2), disable_dropout=False, **SAVING)
    with private_training(trainer, plan_training(trainer, PrivacyConfig(**NOISY)), SealedRandom(bytes(32))):
        trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-4"
    first = resumed_weights(tmp_path, SEED, checkpoint)
    assert torch.equal(first, resumed_weights(tmp_path, SEED, checkpoint, torch_seed=7, data_seed=11))
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002 - what a checkpoint keeps is the state of this one
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "cpu": torch.random.get_rng_state(),
    }
    torch.save(states, checkpoint / "rng_state.pth")
    assert torch.equal(first, resumed_weights(tmp_path, SEED, checkpoint))
    (checkpoint / "rng_state.pth").unlink()
    assert torch.equal(first, resumed_weights(tmp_path, SEED, checkpoint))
    assert not torch.equal(first, resumed_weights(tmp_path, bytes(31) + b"\1", checkpoint)), "the seed must count"


def test_no_file_of_a_checkpoint_holds_the_seed_or_a_key_that_follows_from_it(tmp_path: Path, monkeypatch: Any) -> None:
    import hmac

    derived: list[bytes] = []
    real = hmac.new

    def watching(key: Any, message: Any, digest: Any) -> Any:
        made = real(key, message, digest)
        if message.startswith(b"rlhf-audit/sealed-random"):
            derived.append(made.digest())
        return made

    monkeypatch.setattr("rlhf_audit_nb.privacy.sampling.hmac.new", watching)
    trainer = dpo_trainer(PAIRS, tmp_path / "out", **SAVING)
    with private_training(trainer, plan_training(trainer, PrivacyConfig(**NOISY)), SealedRandom(SEED)):
        trainer.train()
    assert len(set(derived)) > 50
    secrets = [SEED, *derived]
    forms = [form for secret in secrets for form in (secret, secret.hex().encode(), secret[::-1])]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"rng_state.pth", "optimizer.pt", "trainer_state.json"} <= {path.name for path in files}

    def holding() -> list[str]:
        return [path.name for path in files if any(form in path.read_bytes() for form in forms)]

    assert holding() == []
    with (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").open("ab") as planted:
        planted.write(derived[-1])
    assert holding() == ["optimizer.pt"], "the search must find what was planted"


def test_noise_for_bf16_parameters_is_drawn_and_added_in_float64(tmp_path: Path) -> None:
    given: list[np.dtype[Any]] = []

    class Watched(SealedRandom):
        def normals(self, step: int, tensor: int, count: int) -> Any:
            drawn = super().normals(step, tensor, count)
            given.append(drawn.dtype)
            return drawn

    gradients: list[torch.Tensor] = []

    class Keeps(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            gradients.extend(p.grad.clone() for p in model.parameters() if p.requires_grad)

    model = causal_model().to(torch.bfloat16)
    trainer = dpo_trainer(PAIRS, tmp_path / "out", model=model, peft=None, max_steps=1, max_grad_norm=0.0)
    trainer.add_callback(Keeps())
    tiny = {**NOISY, "epsilon": 1e6, "sampling_rate": 1e-12}  # nobody is sampled: the gradient is noise alone
    plan = plan_training(trainer, PrivacyConfig(**tiny))
    with private_training(trainer, plan, Watched(SEED)):
        trainer.train()
    assert set(given) == {np.dtype("float64")}
    expected = SealedRandom(SEED)
    for index, gradient in enumerate(gradients):
        assert gradient.dtype == torch.bfloat16
        wide = torch.from_numpy(expected.normals(0, index, gradient.numel())) / plan.expected_units
        assert torch.equal(gradient.flatten(), wide.to(torch.bfloat16)), "rounded once, from the float64 value"


# --- a death ---------------------------------------------------------------------------------------------------------

CHILD = """
import sys, time
from pathlib import Path

from support.tiny import dpo_trainer, synthetic_pairs
from transformers import TrainerCallback

from rlhf_audit_nb.auditor import AuditableRLHF
from rlhf_audit_nb.config import AuditConfig, PrivacyConfig

folder = Path(sys.argv[1])

class Dies(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            held.trail.flush()
            (folder / "durable").touch()
            time.sleep(60)

held = AuditableRLHF(
    privacy_config=PrivacyConfig(epsilon=50.0, delta=1e-3, noise_multiplier=1.0, sampling_rate=0.3, loss_noise=None),
    audit_config=AuditConfig(trail=str(folder / "audit")),
)
trainer = dpo_trainer(
    synthetic_pairs(20), folder / "out", max_steps=6, save_strategy="steps", save_steps=2
)
with held.track_training("dies"):
    trainer.add_callback(Dies())
    trainer.train()
"""


@pytest.mark.slow
def test_after_kill_9_the_whole_first_reservation_counts_and_the_resumed_steps_beside_it(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "durable").exists():
            assert child.poll() is None, "the training ended before it could be killed"
            assert time.monotonic() < deadline, "the training did not reach its fifth step"
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=30)
    held = auditor(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AuditWarning)
        with held.track_training("resumed") as run:
            trainer = dpo_trainer(PAIRS, tmp_path / "out", **SAVING)
            trainer.train(resume_from_checkpoint=True)
    reader = TrailReader.open(tmp_path / "audit")
    assert [item.steps for item in events(held.trail, PrivacyReserved)] == [6, 2]
    assert [item.steps for item in events(held.trail, PrivacySettled)] == [2], "the killed run never settled"
    assert [step.step for step in events(held.trail, Step, run.id)] == [5, 6]
    (said,) = events(held.trail, RunResumed)
    assert said.step == 4
    assert said.from_run == next(entry.run for entry in reader.entries(type=PrivacyReserved.TYPE))
    both = composed_epsilon([Mechanism(1.0, 0.3, 6), Mechanism(1.0, 0.3, 2)], 1e-3)
    assert held.budget().total == pytest.approx(both, rel=1e-6)
    assert math.isfinite(both)
