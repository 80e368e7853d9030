"""Trainings that are not the plain case: streams, early ends, second calls, trainers and callbacks of one's own."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny import dpo_trainer, synthetic_pairs
from support.trails import events
from transformers import (
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from rlhf_audit_nb.capture.run import Run
from rlhf_audit_nb.events import (
    DataBound,
    FunctionBound,
    ModelBound,
    RunFinished,
    RunResumed,
    Step,
    TrainerAttached,
    TrainerLogged,
)
from rlhf_audit_nb.trail import Trail

SIZE = 12


class Line(torch.nn.Module):
    """A model without a config."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x, labels=None):
        scores = x @ self.weight
        return {"loss": torch.nn.functional.mse_loss(scores, labels), "logits": scores}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return {"x": torch.tensor([1.0, index / SIZE]), "labels": torch.tensor(index / 2)}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return (Rows()[index] for index in range(SIZE))


@pytest.fixture
def trail(tmp_path):
    with Trail.open(tmp_path / "audit") as opened:
        yield opened


def trainer_of(folder, kind=Trainer, args=TrainingArguments, data=None, more=None, **settings):
    given = {
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "learning_rate": 0.1,
        "max_steps": 3,
        "disable_tqdm": True,
    }
    arguments = args(output_dir=str(folder / "out"), **{**given, **settings})
    return kind(model=Line(), args=arguments, train_dataset=data or Rows(), **(more or {}))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_plain_trainer_of_a_model_without_a_config_is_recorded(trail, tmp_path):
    with Run(trail, "plain"):
        trainer = trainer_of(tmp_path)
        trainer.train()
    (attached,) = events(trail, TrainerAttached)
    assert (attached.trainer, attached.loss) == ("Trainer", None)
    assert [step.metrics["loss"] for step in events(trail, Step)] == pytest.approx(losses(trainer), rel=1e-5)
    assert [model.architecture for model in events(trail, ModelBound)] == ["Line", "Line"]
    base, final = events(trail, ModelBound)
    assert base.weights_digest != final.weights_digest


def test_a_seq2seq_trainer_is_recorded(trail, tmp_path):
    with Run(trail, "seq2seq"):
        trainer_of(tmp_path, Seq2SeqTrainer, Seq2SeqTrainingArguments, generation_max_length=7).train()
    (attached,) = events(trail, TrainerAttached)
    assert (attached.trainer, attached.hyperparameters["generation_max_length"]) == ("Seq2SeqTrainer", 7)
    assert len(events(trail, Step)) == 3


def test_epochs_give_as_many_steps_as_were_planned(trail, tmp_path):
    with Run(trail, "epochs"):
        trainer_of(tmp_path, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2).train()
    (attached,) = events(trail, TrainerAttached)
    assert attached.max_steps == len(events(trail, Step)) == 4  # 3 batches an epoch, two to a step


def test_a_stream_has_no_rows_that_could_be_told_beforehand(trail, tmp_path):
    with Run(trail, "stream"):
        trainer_of(tmp_path, data=Stream()).train()
    (data,) = events(trail, DataBound)
    assert (data.rows, data.digest) == (None, None)
    assert len(events(trail, Step)) == 3


def test_a_callback_that_stops_the_training_is_followed(trail, tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    with Run(trail, "stopped"):
        trainer_of(tmp_path, more={"callbacks": [Stops()]}).train()
    assert [step.step for step in events(trail, Step)] == [1, 2]
    (finished,) = events(trail, RunFinished)
    assert (finished.status, finished.steps) == ("completed", 2)
    assert events(trail, TrainerAttached)[0].max_steps == 3


def test_early_stopping_and_metrics_of_ones_own_are_recorded(trail, tmp_path):
    def never_better(predicted):
        return {"quality": float(-len(predicted.predictions))}

    trainer = trainer_of(
        tmp_path,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="quality",
        more={
            "eval_dataset": Rows(),
            "compute_metrics": never_better,
            "callbacks": [EarlyStoppingCallback(early_stopping_patience=2)],
        },
    )
    with Run(trail, "early"):
        trainer.train()
    steps = events(trail, Step)
    assert [step.step for step in steps if not step.notes] == [1, 2, 3]
    evaluated = [step.metrics["eval_quality"] for step in steps if step.notes == ["evaluation"]]
    assert evaluated == [-SIZE] * 3
    assert [item.name.rpartition(".")[2] for item in events(trail, FunctionBound)] == ["never_better"]
    assert events(trail, TrainerAttached)[0].hyperparameters["metric_for_best_model"] == "quality"


def test_a_training_step_that_returns_several_values_is_borne(trail, tmp_path):
    class Several(tuple):
        """Transformers adds what it is given to its total."""

        __slots__ = ()

        def __radd__(self, other):
            return other + self[0]

        @property
        def device(self):
            return self[0].device

    class Mine(Trainer):
        def training_step(self, *args, **kwargs):
            return Several((super().training_step(*args, **kwargs), "more"))

    with Run(trail, "several"):
        trainer = trainer_of(tmp_path, Mine, logging_nan_inf_filter=False)
        trainer.train()
    assert [step.metrics["loss"] for step in events(trail, Step)] == pytest.approx(losses(trainer), rel=1e-5)


def test_outputs_beside_the_loss_are_borne(trail, tmp_path):
    class Mine(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            return (loss * 2, outputs) if return_outputs else loss * 2

    with Run(trail, "outputs"):
        trainer = trainer_of(tmp_path, Mine)
        trainer.train()
    assert [step.metrics["loss"] for step in events(trail, Step)] == pytest.approx(losses(trainer), rel=1e-5)


def test_what_a_trainer_of_ones_own_logs_is_recorded_beside_its_steps(trail, tmp_path):
    class Mine(Trainer):
        def log(self, logs, *args, **kwargs):
            super().log({**logs, "my_margin": 0.25, "words": "none"}, *args, **kwargs)

    with Run(trail, "own log"):
        trainer_of(tmp_path, Mine, logging_steps=2, max_steps=4).train()
    logged = events(trail, TrainerLogged)
    assert [(item.step, item.metrics) for item in logged][:2] == [(2, {"my_margin": 0.25}), (4, {"my_margin": 0.25})]
    assert [step.step for step in events(trail, Step)] == [1, 2, 3, 4]


def test_training_twice_is_recorded_as_two_trainings(trail, tmp_path):
    with Run(trail, "twice") as run:
        trainer = trainer_of(tmp_path)
        trainer.train()
        trainer.train()
    assert [step.step for step in events(trail, Step)] == [1, 2, 3, 1, 2, 3]
    assert len(events(trail, TrainerAttached)) == 2
    base, final, again, last = events(trail, ModelBound)
    assert final.weights_digest == again.weights_digest != last.weights_digest != base.weights_digest
    assert run.state.step == 6


def test_a_resumed_training_names_its_checkpoint(trail, tmp_path):
    with Run(trail, "first"):
        trainer_of(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    with Run(trail, "second") as run:
        trainer_of(tmp_path, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    (resumed,) = events(trail, RunResumed, run.id)
    assert (resumed.step, resumed.from_run is not None) == (2, True)
    assert [step.step for step in events(trail, Step, run.id)] == [3, 4]


@pytest.mark.parametrize("moment", ["on_train_begin", "on_step_begin", "on_step_end", "on_log", "on_train_end"])
def test_a_callback_that_fails_leaves_the_steps_that_were_taken(trail, tmp_path, moment):
    class Fails(TrainerCallback):
        pass

    def fails(self, args, state, control, **kwargs):
        if state.global_step or moment == "on_train_begin":
            raise ValueError("a callback of one's own")

    setattr(Fails, moment, fails)
    trainer = trainer_of(tmp_path, more={"callbacks": [Fails()]})
    with pytest.raises(ValueError, match="of one's own"), Run(trail, moment):
        trainer.train()
    (finished,) = events(trail, RunFinished)
    assert finished.status == "failed"
    assert len(events(trail, TrainerAttached)) == 1
    assert len(events(trail, Step)) == finished.steps == trainer.state.global_step
    assert "training_step" not in vars(trainer)


def test_a_loss_that_is_no_number_in_one_step_alone_is_noted_there(trail, tmp_path):
    class Breaks(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 2 else loss

    with Run(trail, "nan") as run, pytest.warns(match="not a finite number"):
        trainer_of(tmp_path, Breaks).train()
    assert [step.metrics["loss"] == "NaN" for step in events(trail, Step)] == [False, False, True]
    assert [bool(step.notes) for step in events(trail, Step)] == [False, False, True]
    assert math.isnan(run.state.series["loss"][-1][1])


def test_accumulated_batches_are_one_step_with_their_mean_loss(trail, tmp_path):
    trainer = dpo_trainer(synthetic_pairs(4), tmp_path / "out", max_steps=1, gradient_accumulation_steps=4)
    with Run(trail, "accumulated"):
        trainer.train()
    (step,) = events(trail, Step)
    assert step.metrics["loss"] == pytest.approx(losses(trainer)[0], rel=1e-5)
