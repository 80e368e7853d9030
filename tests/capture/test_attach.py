"""Real trainers in an open run, without privacy: what is recorded, and that nothing is left behind."""

from __future__ import annotations

import contextvars
import hashlib
import math
import threading
import warnings
from pathlib import Path

import pytest
from support.tiny import causal_model, dpo_trainer, reward_trainer, synthetic_pairs
from support.trails import events, kinds
from transformers import Trainer, TrainerCallback
from trl import DPOTrainer

from rlhf_audit_nb.capture.run import AuditWarning, Run, current_run
from rlhf_audit_nb.capture.weights import digest_tensors, final_tensors
from rlhf_audit_nb.config import AuditConfig
from rlhf_audit_nb.errors import ConfigError, RunError, StoreError
from rlhf_audit_nb.events import (
    DataBound,
    EnvironmentCaptured,
    ModelBound,
    RunFinished,
    RunStarted,
    Step,
    TrainerAttached,
    WeightsSaved,
)
from rlhf_audit_nb.trail import Trail, verify_trail

PAIRS = synthetic_pairs(6)
UNTOUCHED = (Trainer.train, Trainer.save_model)


@pytest.fixture
def trail(tmp_path):
    with Trail.open(tmp_path / "audit") as opened:
        yield opened


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    assert (Trainer.train, Trainer.save_model) == UNTOUCHED
    assert current_run() is None


def traces(trainer):
    """What attachment could have left on a trainer."""
    names = {type(item).__name__ for item in trainer.callback_handler.callbacks}
    return {"StepRecorder"} & names, {"training_step", "_get_grad_norm"} & set(vars(trainer))


class FailsAt(TrainerCallback):
    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


def test_a_trainer_built_before_the_run_is_recorded(trail, tmp_path):
    trainer = dpo_trainer(PAIRS, tmp_path / "out")
    with Run(trail, "before") as run:
        trainer.train()
    assert kinds(trail, run.id) == [
        "run.started",
        "environment.captured",
        "trainer.attached",
        "data.bound",
        "model.bound",
        "reference.used",
        "train.step",
        "train.step",
        "train.step",
        "model.bound",
        "compute.recorded",
        "run.finished",
    ]
    assert traces(trainer) == (set(), set())
    assert verify_trail(trail.location).level.name == "UNANCHORED"


def test_what_is_recorded_is_what_happened(trail, tmp_path):
    with Run(trail, "inside", declared_model="example/model", compliance_mode="eu_ai_act") as run:
        trainer = dpo_trainer(PAIRS, tmp_path / "out", num_train_epochs=2, max_steps=-1, beta=0.25)
        base = causal_model()
        output = trainer.train()
    (started,) = events(trail, RunStarted)
    (attached,) = events(trail, TrainerAttached)
    (data,) = events(trail, DataBound)
    first, final = events(trail, ModelBound)
    steps = events(trail, Step)
    (finished,) = events(trail, RunFinished)
    assert (started.experiment, started.declared_model, started.privacy) == ("inside", "example/model", None)
    assert (attached.trainer, attached.loss, attached.seed) == ("DPOTrainer", "sigmoid", 42)
    assert attached.max_steps == len(steps) == output.global_step == 4
    assert attached.hyperparameters["beta"] == 0.25
    assert not any("dir" in name or "token" in name for name in attached.hyperparameters)
    assert (data.role, data.rows) == ("train", len(PAIRS))
    assert first.weights_digest == digest_tensors(dict(base.state_dict()))
    assert final.weights_digest == digest_tensors(final_tensors(trainer.model))
    assert [step.step for step in steps] == [1, 2, 3, 4]
    assert (finished.status, finished.steps, finished.trained, finished.reason) == ("completed", 4, True, None)
    assert len(events(trail, EnvironmentCaptured)) == 1
    assert run.state.max_steps == run.state.step == 4


def test_steps_agree_with_the_trainers_own_log(trail, tmp_path):
    with Run(trail, "log") as run:
        trainer = dpo_trainer(PAIRS, tmp_path / "out", gradient_accumulation_steps=2, per_device_train_batch_size=2)
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    steps = events(trail, Step)
    assert len(logged) == len(steps) == 3
    for entry, step in zip(logged, steps, strict=True):
        assert step.metrics["loss"] == pytest.approx(entry["loss"], rel=1e-5)
        assert step.metrics["rewards/margins"] == pytest.approx(entry["rewards/margins"], abs=1e-6)
        assert step.metrics["num_tokens"] == entry["num_tokens"]
        assert step.gradient_norm == pytest.approx(entry["grad_norm"], rel=1e-5)
        assert step.learning_rate == pytest.approx(entry["learning_rate"])
    assert [value for _, value in run.state.series["loss"]] == [step.metrics["loss"] for step in steps]


def test_the_update_norm_is_the_distance_between_the_weights(trail, tmp_path):
    seen = []

    class Watches(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.append([p.detach().clone() for p in model.parameters() if p.requires_grad])

    trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=2)
    trainer.add_callback(Watches())
    with Run(trail, "norm"):
        trainer.train()
    seen.append([p.detach() for p in trainer.model.parameters() if p.requires_grad])
    for step, before, after in zip(events(trail, Step), seen[:-1], seen[1:], strict=True):
        distance = math.sqrt(sum(float((a - b).double().square().sum()) for a, b in zip(after, before, strict=True)))
        assert step.update_norm == pytest.approx(distance, rel=1e-5)
        assert distance > 0


def test_recording_changes_no_weight(trail, tmp_path):
    plain = dpo_trainer(PAIRS, tmp_path / "a")
    plain.train()
    audited = dpo_trainer(PAIRS, tmp_path / "b")
    with Run(trail, "same", audit=AuditConfig(weights_every=1)):
        audited.train()
    assert digest_tensors(final_tensors(plain.model)) == digest_tensors(final_tensors(audited.model))


def test_every_n_steps_means_so_and_nothing_is_dropped(trail, tmp_path):
    trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=5)
    with Run(trail, "sparse", audit=AuditConfig(every_steps=2, weights_every=2)):
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = events(trail, Step)
    assert [step.step for step in steps] == [2, 4, 5]
    assert steps[0].metrics["loss"] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-5)
    assert steps[2].metrics["loss"] == pytest.approx(losses[4], rel=1e-5)
    assert [step.weights_digest is not None for step in steps] == [True, True, True]
    assert steps[0].weights_digest != steps[1].weights_digest


def test_a_reward_trainer_is_recorded_too(trail, tmp_path):
    with Run(trail, "reward"):
        reward_trainer(PAIRS, tmp_path / "out", max_steps=2).train()
    assert events(trail, TrainerAttached)[0].trainer == "RewardTrainer"
    assert len(events(trail, Step)) == 2


def test_two_trainings_of_one_run_follow_each_other(trail, tmp_path):
    with Run(trail, "twice") as run:
        dpo_trainer(PAIRS, tmp_path / "a", max_steps=2).train()
        dpo_trainer(PAIRS, tmp_path / "b", max_steps=3).train()
    assert [step.step for step in events(trail, Step)] == [1, 2, 1, 2, 3]
    assert [step for step, _ in run.state.series["loss"]] == [1, 2, 3, 4, 5]
    assert events(trail, RunFinished)[0].steps == 5


def test_a_resumed_training_goes_on_counting_where_it_was(trail, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    with Run(trail, "first"):
        dpo_trainer(PAIRS, tmp_path / "out", **settings).train()
    with Run(trail, "resumed") as run:
        dpo_trainer(PAIRS, tmp_path / "out", **settings).train(
            resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2")
        )
    assert [step.step for step in events(trail, Step, run.id)] == [3, 4]
    assert events(trail, RunFinished, run.id)[0].steps == 2
    assert run.state.max_steps == run.state.step == 2


def test_saved_folders_are_signed_and_recorded(trail, tmp_path):
    with Run(trail, "save"):
        trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1)
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
    saved = events(trail, WeightsSaved)
    assert [(item.name, item.step) for item in saved] == [("checkpoint-1", 1), ("checkpoint-2", 2), ("final", 2)]
    for item in saved:
        folder = tmp_path / ("final" if item.name == "final" else f"out/{item.name}")
        assert (folder / "model.sig").is_file()
        assert item.files == sum(path.is_file() for path in folder.rglob("*")) - 1


def test_what_is_added_to_a_saved_folder_is_signed_at_the_end(trail, tmp_path):
    with Run(trail, "late"):
        trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=1)
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        (tmp_path / "final" / "CARD.md").write_text("a card", encoding="utf-8")
    first, second = events(trail, WeightsSaved)
    assert second.files == first.files + 1
    assert second.digest != first.digest


def test_a_run_in_which_nothing_was_trained_says_so(trail):
    with Run(trail, "empty") as run:
        pass
    (finished,) = events(trail, RunFinished)
    assert (finished.status, finished.trained, finished.steps) == ("completed", False, 0)
    assert "nothing was trained" in run.summary()


def test_a_failing_training_is_recorded_and_everything_is_put_back(trail, tmp_path):
    trainer = dpo_trainer(PAIRS, tmp_path / "out")
    trainer.add_callback(FailsAt(2, ValueError("a secret row")))
    callbacks = list(trainer.callback_handler.callbacks)
    with pytest.raises(ValueError, match="a secret row"), Run(trail, "fails") as run:
        trainer.train()
    (finished,) = events(trail, RunFinished)
    assert (finished.status, finished.steps, finished.reason) == ("failed", 2, "ValueError")
    assert len(events(trail, Step)) == 2
    assert run.state.status == "failed"
    assert trainer.callback_handler.callbacks == callbacks
    assert traces(trainer) == (set(), set())
    assert not any(b"a secret row" in entry.data for entry in trail.reader().entries())


def test_a_training_that_fails_before_it_begins_names_its_trainer(trail, tmp_path):
    trainer = dpo_trainer(PAIRS, tmp_path / "out")
    with pytest.raises(ValueError, match="checkpoint"), Run(trail, "early"):
        trainer.train(resume_from_checkpoint=True)
    assert [item.trainer for item in events(trail, TrainerAttached)] == ["DPOTrainer"]
    assert events(trail, RunFinished)[0].status == "failed"


def test_a_failure_that_the_cell_swallows_still_marks_the_run(trail, tmp_path):
    trainer = dpo_trainer(PAIRS, tmp_path / "out")
    trainer.add_callback(FailsAt(1, ValueError("x")))
    with Run(trail, "swallowed"), pytest.raises(ValueError, match="x"):
        trainer.train()
    assert events(trail, RunFinished)[0].status == "failed"


def test_a_second_attempt_that_succeeds_clears_the_first_ones_failure(trail, tmp_path):
    trainer = dpo_trainer(PAIRS, tmp_path / "out")
    trainer.add_callback(FailsAt(1, ValueError("x")))
    with Run(trail, "retry"):
        with pytest.raises(ValueError, match="x"):
            trainer.train()
        dpo_trainer(PAIRS, tmp_path / "again", max_steps=1).train()
    assert events(trail, RunFinished)[0].status == "completed"


def test_an_interrupted_training_is_recorded_as_interrupted_and_raised_on(trail, tmp_path):
    trainer = dpo_trainer(PAIRS, tmp_path / "out")
    trainer.add_callback(FailsAt(2, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt), Run(trail, "interrupted"):
        trainer.train()
    (finished,) = events(trail, RunFinished)
    assert (finished.status, finished.steps) == ("interrupted", 2)
    assert traces(trainer) == (set(), set())


def test_a_loss_that_is_not_a_number_is_recorded_and_warned_of(trail, tmp_path):
    trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=2)
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: compute(*args, **kwargs) * float("nan")
    with Run(trail, "nan") as run, pytest.warns(AuditWarning, match="not a finite number"):
        trainer.train()
    steps = events(trail, Step)
    assert [step.metrics["loss"] for step in steps] == ["NaN", "NaN"]
    assert steps[0].notes == ["the loss was not finite"]
    assert any("not a finite number" in sentence for sentence in run.state.warnings)
    assert math.isnan(run.state.series["loss"][0][1])


def test_a_finite_loss_raises_no_warning(trail, tmp_path):
    with warnings.catch_warnings(), Run(trail, "fine") as run:
        warnings.simplefilter("error", AuditWarning)
        dpo_trainer(PAIRS, tmp_path / "out", max_steps=1).train()
    assert run.state.warnings == []
    assert events(trail, Step)[0].notes == []


def test_training_in_a_thread_is_recorded(trail, tmp_path):
    trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=1)
    with Run(trail, "thread"):
        thread = threading.Thread(target=contextvars.Context().run, args=(trainer.train,))
        thread.start()
        thread.join()
    assert len(events(trail, Step)) == 1


def test_a_thread_that_is_older_than_the_run_is_not_part_of_it(trail, tmp_path):
    trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=1)
    opened, done = threading.Event(), threading.Event()

    def trains_when_told():
        opened.wait(60)
        trainer.train()
        done.set()

    thread = threading.Thread(target=trains_when_told)
    thread.start()
    with Run(trail, "older"):
        opened.set()
        assert done.wait(60)
    thread.join()
    assert trainer.state.global_step == 1
    assert events(trail, Step) == []


def test_a_trainer_beside_another_one_is_not_mixed_up_with_it(trail, tmp_path):
    inner = dpo_trainer(PAIRS, tmp_path / "inner", max_steps=1)

    class TrainsAnother(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            inner.train()

    outer = dpo_trainer(PAIRS, tmp_path / "outer", max_steps=1)
    outer.add_callback(TrainsAnother())
    with Run(trail, "beside"), pytest.warns(AuditWarning, match="second trainer"):
        outer.train()
    assert len(events(trail, Step)) == len(events(trail, TrainerAttached)) == 1
    assert inner.state.global_step == 1


def test_a_subclass_with_a_train_of_its_own_is_recorded_once(trail, tmp_path):
    class Mine(DPOTrainer):
        def train(self, *args, **kwargs):
            return super().train(*args, **kwargs)

    trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=1)
    trainer.__class__ = Mine
    with Run(trail, "subclass"):
        trainer.train()
    assert [item.trainer for item in events(trail, TrainerAttached)] == ["Mine"]
    assert len(events(trail, Step)) == 1


def test_after_the_run_training_is_not_recorded(trail, tmp_path):
    trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=1)
    with Run(trail, "closed"):
        pass
    size = trail.reader().size
    trainer.train()
    assert trail.reader().size == size


def test_evaluation_inside_a_training_is_recorded(trail, tmp_path):
    trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=1)
    trainer.eval_dataset = trainer.train_dataset.select(range(2))
    trainer.args.eval_strategy = trainer.args.eval_strategy.__class__("steps")
    trainer.args.eval_steps = trainer.state.eval_steps = 1
    with Run(trail, "evaluation"):
        trainer.train()
    assert [item.role for item in events(trail, DataBound)] == ["train", "evaluation"]
    (evaluated,) = [step for step in events(trail, Step) if step.notes == ["evaluation"]]
    assert "eval_loss" in evaluated.metrics


def test_a_closed_run_takes_nothing_more_and_is_not_opened_again(trail):
    with Run(trail, "once") as run:
        pass
    with pytest.raises(RunError, match="closed"):
        run.record(RunFinished(status="completed", steps=0, trained=False))
    with pytest.raises(RunError, match="used once"), run:
        pass


@pytest.mark.parametrize("name", ["", "  ", None, 3, "two\nlines", "x" * 201])
def test_a_name_that_is_no_name_is_refused(trail, name):
    with pytest.raises(ConfigError, match="experiment's name"):
        Run(trail, name)


def test_a_trail_that_cannot_be_written_stops_the_training_and_keeps_the_first_error(trail, tmp_path, monkeypatch):
    trainer = dpo_trainer(PAIRS, tmp_path / "out")
    full = StoreError("The disk is full.", code="full")

    def fails(*args, **kwargs):
        raise full

    class Fills(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            monkeypatch.setattr(trail, "append", fails)

    trainer.add_callback(Fills())
    with pytest.raises(StoreError, match="disk is full") as caught, Run(trail, "full"):
        trainer.train()
    assert any("could not be recorded" in note for note in caught.value.__notes__)
    assert traces(trainer) == (set(), set())


def test_a_run_that_cannot_be_opened_leaves_nothing_behind(trail, monkeypatch):
    def fails(*args, **kwargs):
        raise StoreError("The disk is full.", code="full")

    monkeypatch.setattr(trail, "append", fails)
    run = Run(trail, "full")
    with pytest.raises(StoreError), run:
        pytest.fail("the body must not run")
    assert not run.is_open


def test_a_long_list_of_packages_lies_beside_the_trail(trail, monkeypatch):
    from rlhf_audit_nb.capture import environment as module

    monkeypatch.setattr(module, "MAX_ENVIRONMENT", 500)
    with Run(trail, "long"):
        pass
    (captured,) = events(trail, EnvironmentCaptured)
    assert "torch" in captured.packages
    name = captured.packages["*"].rsplit("/", 1)[1]
    listed = (trail.artifacts / name).read_bytes()
    assert hashlib.sha256(listed).hexdigest() == name.removesuffix(".json")
    assert b'"msgspec"' in listed


def test_telemetry_is_off_while_a_run_is_open_and_put_back(trail, monkeypatch):
    import os

    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    with Run(trail, "quiet"):
        assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
        assert constants.HF_HUB_DISABLE_TELEMETRY is True
    assert "HF_HUB_DISABLE_TELEMETRY" not in os.environ
    assert constants.HF_HUB_DISABLE_TELEMETRY is False


def test_a_users_own_telemetry_setting_stands(trail, monkeypatch):
    import os

    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    with Run(trail, "own"):
        assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"


def test_a_folder_that_cannot_be_signed_is_said_so(trail, tmp_path):
    with Run(trail, "link"):
        trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=1)
        trainer.train()
        (tmp_path / "final").mkdir()
        (tmp_path / "final" / "link").symlink_to(Path(__file__))
        with pytest.raises(RunError, match="symbolic link"):
            trainer.save_model(str(tmp_path / "final"))
