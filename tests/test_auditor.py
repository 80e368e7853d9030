"""The object that users hold: the guide's blocks, private runs end to end, the budget, and deaths of a process."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from support.tiny import dpo_trainer, kto_trainer, lora, reward_trainer, sft_trainer, synthetic_pairs, tokenizer
from support.trails import events, kinds, private_half, without_cross_checks
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from rlhf_audit_nb.auditor import AuditableRLHF
from rlhf_audit_nb.capture.run import AuditWarning
from rlhf_audit_nb.config import AuditConfig, PrivacyConfig
from rlhf_audit_nb.errors import (
    BudgetExceededError,
    ConfigError,
    DataError,
    PrivacyError,
    StoreError,
    UnsupportedTrainerError,
    VaultError,
)
from rlhf_audit_nb.events import (
    DataBound,
    DataPrivate,
    PrivacyPopulation,
    PrivacyReserved,
    PrivacySealed,
    PrivacySettled,
    RunFinished,
    Step,
    StepPrivate,
    TrainerAttached,
    decode_body,
)
from rlhf_audit_nb.privacy.accountant import Mechanism, composed_epsilon
from rlhf_audit_nb.privacy.ledger import Ledger, Limit, Spend
from rlhf_audit_nb.reports.budget import Budget
from rlhf_audit_nb.trail import TrailReader, verify_trail
from rlhf_audit_nb.trail.erasure import erase

PAIRS = synthetic_pairs(20)
NOISY = {"epsilon": 50.0, "delta": 1e-3, "noise_multiplier": 1.0, "sampling_rate": 0.3}


@pytest.fixture(scope="module", autouse=True)
def quick_accounting():
    with without_cross_checks():
        yield


def auditor(folder, *, every_steps=1, **privacy):
    config = PrivacyConfig(**{**NOISY, **privacy})
    return AuditableRLHF(
        privacy_config=config, audit_config=AuditConfig(trail=str(folder / "audit"), every_steps=every_steps)
    )


class FailsAt(TrainerCallback):
    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


# --- the guide -------------------------------------------------------------------------------------------------------


def test_the_guides_blocks_run_as_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    training = """
        from rlhf_audit_trail import AuditableRLHF, PrivacyConfig
        auditor = AuditableRLHF(model_name="meta-llama/Llama-2-7b-chat-hf", privacy_config=PrivacyConfig(epsilon=1.0), compliance_mode="eu_ai_act")
        with auditor.track_training(experiment_name="safety_alignment"):
            ...   # any TRL trainer built or trained here is attached; nothing else changes
    """  # noqa: E501  the guide's own lines
    report = """
        auditor = AuditableRLHF(compliance_mode="eu_ai_act")          # model_name may be left out
        compliance_report = auditor.generate_compliance_report()
    """
    card = """
        privacy_config = PrivacyConfig(epsilon=1.0, delta=1e-5, anonymize_annotators=True)
        model_card = auditor.generate_model_card(include_provenance=True, format="eu_standard")
    """
    for block in (training, report, card):
        exec(textwrap.dedent(block), space)
    reader = TrailReader.open(tmp_path / "audit")
    assert [entry.type for entry in reader.entries()] == [
        "trail.created",
        "run.started",
        "environment.captured",
        "run.finished",
    ]
    report_made, card_made = space["compliance_report"], space["model_card"]
    assert report_made.to_dict()["verdict"]["level"] == "UNANCHORED"
    assert report_made.save(tmp_path / "report.html").stat().st_size > 1000
    assert card_made.save(tmp_path / "card.md").stat().st_size > 100
    assert report_made._repr_html_()
    assert card_made._repr_markdown_()
    assert json.dumps(card_made.to_dict())


def test_a_report_on_a_trail_in_which_nothing_happened_is_honest(tmp_path):
    report = AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "new"))).generate_compliance_report()
    said = report.to_dict()
    assert said["verdict"]["level"] == "UNANCHORED"
    assert said["verdict"]["runs"] == []
    assert "evidenced" not in {line["state"] for line in said["assessment"]["lines"] if "run" in line["id"]}


def test_a_cell_without_privacy_says_so(tmp_path):
    plain = AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "audit")))
    with plain.track_training("plain") as run:
        dpo_trainer(PAIRS[:8], tmp_path / "out", max_steps=1).train()
    assert "trained without differential privacy" in plain.closing_line(run)
    assert "UNANCHORED" in plain.closing_line(run)
    assert str(plain.budget()) == "No training under differential privacy is recorded in this trail."


# --- a private run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    """One private run that saves a checkpoint, with what it printed."""
    folder = tmp_path_factory.mktemp("private")
    held = auditor(folder)
    trainer = dpo_trainer(PAIRS, folder / "out", max_steps=3, save_strategy="steps", save_steps=3)
    with held.track_training("private") as run:
        output = trainer.train()
    return held, run, trainer, output, folder


@pytest.mark.parametrize("make", [sft_trainer, kto_trainer], ids=["sft", "kto"])
def test_other_trainers_are_recorded_as_private_runs_too(make, tmp_path):
    held = auditor(tmp_path)
    with held.track_training("other") as run:
        trainer = make(PAIRS, tmp_path / "out", max_steps=2)
        before = weights(trainer)
        trainer.train()
    assert not unchanged(trainer, before)
    assert run.state.status == "completed"
    reserved, settled = events(held.trail, PrivacyReserved), events(held.trail, PrivacySettled)
    assert (reserved[0].units, settled[0].steps) == (20, 2)
    assert all(event.metrics.keys() == {"private_loss"} for event in events(held.trail, Step))
    assert events(held.trail, TrainerAttached)[0].trainer.endswith(type(trainer).__name__)
    assert held.verify().reasons == ()


def test_a_private_run_reserves_before_its_first_step_and_settles_after_its_last(private):
    held, run, *_ = private
    found = kinds(held.trail, run.id)
    assert found.index("privacy.reserved") < found.index("train.step")
    assert found.index("privacy.settled") > len(found) - 1 - found[::-1].index("train.step")
    (reserved,) = events(held.trail, PrivacyReserved)
    (settled,) = events(held.trail, PrivacySettled)
    assert (reserved.steps, settled.steps, settled.reservation) == (3, 3, reserved.reservation)
    assert reserved.units == 20
    assert settled.epsilon_total == pytest.approx(reserved.epsilon_planned)
    assert verify_trail(held.trail.location).level.name == "UNANCHORED"


def test_epsilon_in_the_steps_and_on_the_panel_is_the_planned_curve(private):
    held, run, *_ = private
    steps = events(held.trail, Step)
    assert [step.epsilon for step in steps] == run.state.privacy.curve[1:]
    assert [value for _, value in run.state.series["epsilon"]] == run.state.privacy.curve[1:]
    assert run.state.privacy.units == 20


def test_private_metrics_are_in_the_vault_and_nowhere_else(private):
    held, run, *_ = private
    entries = list(held.trail.reader().entries(type=Step.TYPE))
    for entry in entries:
        half = private_half(held.trail, entry)
        assert isinstance(half, StepPrivate)
        assert {"loss", "units", "pairs"} <= set(half.metrics)
        assert json.loads(entry.body)["metrics"].keys() == {"private_loss"}
    allowed = {"private_loss", "epsilon", "learning_rate", "gradient_norm", "update_norm"}
    assert set(run.state.series) == allowed
    public = b"".join(entry.data for entry in held.trail.reader().entries())
    loss = private_half(held.trail, entries[0]).metrics["loss"]
    assert repr(loss).encode() not in public


def test_rows_and_digest_of_private_data_are_in_the_vault(private):
    held, *_ = private
    (entry,) = held.trail.reader().entries(type=DataBound.TYPE)
    (event,) = events(held.trail, DataBound)
    half = private_half(held.trail, entry)
    assert isinstance(half, DataPrivate)
    assert (half.rows, half.annotators) == (len(PAIRS), 20)
    assert (event.rows, event.digest, event.units, event.unit) == (None, None, 20, "annotator")
    public = b"".join(item.data for item in held.trail.reader().entries())
    assert half.digest.encode() not in public
    assert b"person-3" not in public


def test_the_seed_is_sealed_and_of_full_length(private):
    held, *_ = private
    (entry,) = held.trail.reader().entries(type=PrivacyReserved.TYPE)
    half = private_half(held.trail, entry)
    assert isinstance(half, PrivacySealed)
    assert len(bytes.fromhex(half.seed)) == 32
    assert half.seed.encode() not in b"".join(item.data for item in held.trail.reader().entries())


def test_times_are_coarse_from_the_moment_that_data_can_be_read(private):
    held, run, *_ = private
    entries = list(held.trail.reader().entries(run=run.id))
    assert [entry.type for entry in entries[:3]] == ["run.started", "environment.captured", "trainer.attached"]
    opened = entries[1].time
    assert opened % 60_000_000 != 0
    for entry in entries[2:]:
        assert entry.time == opened or entry.time % 60_000_000 == 0


def test_what_the_trainer_returns_and_saves_tells_no_loss(private):
    held, _, trainer, output, folder = private
    losses = {private_half(held.trail, e).metrics["loss"] for e in held.trail.reader().entries(type=Step.TYPE)}
    assert output.training_loss != output.training_loss  # nan: not told
    assert not set(output.metrics) & {"train_loss", "train_runtime", "train_samples_per_second"}
    saved = (folder / "out" / "checkpoint-3" / "trainer_state.json").read_text()
    assert "loss" not in saved
    assert not any(repr(loss)[:8] in saved for loss in losses)
    assert type(trainer).__name__ == "DPOTrainer"


def test_the_cells_output_tells_neither_metrics_nor_times_nor_rows(tmp_path, capfd):
    held = auditor(tmp_path)
    with held.open_run("quiet", show_progress=False):
        trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=2)
        trainer.add_callback(PrinterCallback)
        before = [type(item).__name__ for item in trainer.callback_handler.callbacks]
        trainer.train()
    printed = "".join(capfd.readouterr())
    for word in ("loss", "reward", "margin", "it/s", "s/it", "examples", f"{len(PAIRS)}/", "runtime"):
        assert word not in printed, printed
    assert [type(item).__name__ for item in trainer.callback_handler.callbacks] == before


def test_without_a_panel_a_bar_of_steps_is_shown(tmp_path, capfd):
    with auditor(tmp_path).track_training("bar"):
        dpo_trainer(PAIRS, tmp_path / "out", max_steps=2).train()
    printed = "".join(capfd.readouterr())
    assert "2/2" in printed
    assert "it/s" not in printed


def test_a_nan_in_a_private_loss_tells_the_public_nothing(tmp_path, recwarn):
    held = auditor(tmp_path)
    trainer = reward_trainer(PAIRS, tmp_path / "out", max_steps=2)
    trainer.model.score.weight.data.fill_(float("inf"))  # every loss is nan
    trainer.model.score.weight.requires_grad_(False)
    with held.track_training("nan") as run:
        trainer.train()
    steps = events(held.trail, Step)
    assert [step.notes for step in steps] == [[], []]
    assert run.state.status == "completed"
    assert not any("finite" in str(item.message) for item in recwarn)
    halves = [private_half(held.trail, entry).metrics for entry in held.trail.reader().entries(type=Step.TYPE)]
    assert any(half["non_finite_units"] > 0 for half in halves)


def test_a_second_private_training_of_a_run_is_paid_for_apart(tmp_path):
    held = auditor(tmp_path)
    with held.track_training("twice") as run:
        dpo_trainer(PAIRS, tmp_path / "a", max_steps=2).train()
        dpo_trainer(PAIRS, tmp_path / "b", max_steps=2).train()
    first, second = events(held.trail, PrivacyReserved)
    assert second.epsilon_before == pytest.approx(first.epsilon_planned)
    curve = run.state.privacy.curve
    assert len(curve) == 5
    assert curve == sorted(curve)
    assert [value for _, value in run.state.series["epsilon"]] == curve[1:]
    budget = held.budget()
    assert (budget.trainings, budget.unsettled, budget.unit) == (2, 0, "annotator")
    assert budget.spent == pytest.approx(second.epsilon_planned)


# --- annotations -----------------------------------------------------------------------------------------------------


def test_a_report_names_the_annotations_and_tells_nothing_of_them(tmp_path):
    held = AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "audit")))
    before = held.generate_compliance_report().to_dict()
    pairs = [(row["chosen"], row["rejected"]) for row in PAIRS[:6]]
    done = held.log_annotations(
        responses=pairs,
        choices=["first"] * 6,
        annotator_ids=[f"person-{n}" for n in range(6)],
        guideline="house rules 3",
    )
    report = held.generate_compliance_report()
    lines = [{line["id"]: line for line in said["assessment"]["lines"]} for said in (before, report.to_dict())]
    assert [found["AIA-10-2c"]["state"] for found in lines] == ["missing", "evidenced"]
    line = lines[1]["AIA-10-2c"]
    assert line["words"].startswith("6 annotations in 1 import")
    assert "house rules 3" in line["words"]
    assert "the order in which responses were shown" in line["not_shown"]
    assert lines[1]["AIA-10-2d"]["state"] == "missing"  # a person still has to say what a preference means
    page = report.save(tmp_path / "report.html").read_text()
    assert f"#{done.last}" in page
    for secret in ("person-3", *pairs[0]):
        assert secret not in page
    assert held.verify().level.name == "UNANCHORED"


def test_annotations_can_be_given_within_a_private_run(tmp_path):
    held = auditor(tmp_path)
    with held.track_training("feedback") as run:
        held.log_annotations(responses=[("a", "b")], choices=["tie"], annotator_ids=["person-3"])
        dpo_trainer(PAIRS, tmp_path / "out", max_steps=1).train()
    assert [item.annotation.annotator for item in held.annotations(run=run.id)] == ["person-3"]
    assert b"person-3" not in b"".join(entry.data for entry in held.trail.reader().entries())
    assert held.verify().level.name == "UNANCHORED"


# --- refusals --------------------------------------------------------------------------------------------------------


def weights(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def unchanged(trainer, before):
    return all(bool((a == b).all()) for a, b in zip(trainer.model.parameters(), before, strict=True))


def test_a_run_over_an_exhausted_budget_is_refused_before_data_is_touched(tmp_path):
    held = auditor(tmp_path)
    with held.track_training("first"):
        dpo_trainer(PAIRS, tmp_path / "a", max_steps=2).train()
    spent = held.budget().spent
    smaller = auditor(tmp_path, epsilon=spent)
    trainer = dpo_trainer(PAIRS, tmp_path / "b", max_steps=4)
    before = weights(trainer)
    with pytest.raises(BudgetExceededError, match="does not allow this run"), smaller.track_training("second") as run:
        trainer.train()
    assert unchanged(trainer, before)
    assert len(events(held.trail, PrivacyReserved)) == 1
    assert kinds(held.trail, run.id)[-1] == "run.finished"
    assert not events(held.trail, DataBound, run.id)
    finished = events(held.trail, RunFinished, run.id)[0]
    assert (finished.status, finished.trained, finished.reason) == ("failed", False, "BudgetExceededError")


def test_a_run_that_would_cross_the_budget_stops_before_and_says_so(private, tmp_path):
    curve = private[1].state.privacy.curve
    held = auditor(tmp_path, epsilon=(curve[2] + curve[3]) / 2)
    trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=4, save_strategy="steps", save_steps=100)
    with held.track_training("stops") as run, pytest.warns(UserWarning, match="allows 2 of the 4 steps"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert run.state.status == "stopped-by-budget"
    assert events(held.trail, RunFinished)[0].status == "stopped-by-budget"
    assert events(held.trail, PrivacySettled)[0].stopped_by_budget is True
    assert (tmp_path / "out" / "checkpoint-2" / "model.sig").is_file()


def test_a_trainer_that_cannot_be_private_is_refused_and_not_trained(tmp_path):
    class Other(Trainer):
        pass

    from datasets import Dataset
    from support.tiny import causal_model
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path / "o"), max_steps=1, use_cpu=True, report_to=[])
    trainer = Other(model=causal_model(), args=arguments, train_dataset=Dataset.from_list(PAIRS))
    held = auditor(tmp_path)
    with pytest.raises(UnsupportedTrainerError, match="Other"), held.track_training("other"):
        trainer.train()
    assert [item.trainer for item in events(held.trail, TrainerAttached)] == ["Other"]
    assert not events(held.trail, Step)


def test_a_kto_trainer_is_refused_under_privacy(tmp_path):
    from datasets import Dataset
    from support.tiny import causal_model
    from trl import KTOConfig, KTOTrainer

    rows = [{"prompt": "a", "completion": f" b{n}", "label": n % 2 == 0, "annotator_id": str(n)} for n in range(8)]
    settings = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": [], "per_device_train_batch_size": 4}
    trainer = KTOTrainer(
        model=causal_model(),
        args=KTOConfig(output_dir=str(tmp_path / "o"), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=lora(),
    )
    with pytest.raises(UnsupportedTrainerError, match="KTOTrainer"), auditor(tmp_path).track_training("kto"):
        trainer.train()


def test_a_missing_annotator_column_names_the_columns_there_are(tmp_path):
    held = auditor(tmp_path, annotator_column="worker")
    trainer = dpo_trainer(PAIRS, tmp_path / "out")
    with pytest.raises(DataError, match="annotator_id"), held.track_training("column"):
        trainer.train()


def test_a_training_loop_of_ones_own_is_refused_under_privacy(tmp_path):
    import torch

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.sum().backward()
    with pytest.raises(UnsupportedTrainerError, match="outside a trainer"), auditor(tmp_path).track_training("own"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(2))


def test_a_training_loop_beside_a_private_training_is_refused(tmp_path):
    import torch

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.sum().backward()

    class TrainsBeside(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            optimizer.step()

    trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=2)
    trainer.add_callback(TrainsBeside())
    with pytest.raises(UnsupportedTrainerError, match="outside a trainer"), auditor(tmp_path).track_training("beside"):
        trainer.train()
    assert torch.equal(weight, torch.ones(2))


def test_a_training_in_a_thread_that_is_older_than_a_private_run_is_told_to_the_run(tmp_path):
    trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=1)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # the thread is there before the run
        told = pytest.warns(AuditWarning, match="neither private nor in the trail")
        with told, auditor(tmp_path).track_training("pool") as run:
            pool.submit(trainer.train).result()
    assert len(run.state.warnings) == 1


def test_a_trainer_that_has_trained_without_privacy_before_is_warned_of(tmp_path):
    held = auditor(tmp_path)
    trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=1)
    with held.track_training("first") as run:
        trainer.train()
        trainer.train()  # what a private training left is paid for
    assert not any("has trained before" in sentence for sentence in run.state.warnings)
    trainer.train()
    with pytest.warns(AuditWarning, match="not covered by this run's epsilon"), held.track_training("second"):
        trainer.train()


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_going_on_from_what_a_run_without_privacy_saved_is_warned_of(tmp_path, adapter):
    from peft import PeftModel
    from support.tiny import reward_model
    from transformers import AutoModelForSequenceClassification

    def trained(name, privately, **given):
        held = (
            auditor(tmp_path) if privately else AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "audit")))
        )
        trainer = reward_trainer(PAIRS, tmp_path / name, max_steps=1, learning_rate=0.1, **given)
        with held.track_training(name) as run:
            trainer.train()
        trainer.save_model(tmp_path / name)
        return run.state.warnings

    def loaded(name):
        if adapter is None:
            return AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        return PeftModel.from_pretrained(reward_model(), tmp_path / name, is_trainable=True)

    trained("open", privately=False, peft=adapter)
    assert not any("begins from weights" in said for said in trained("fresh", privately=True, peft=adapter))
    with pytest.warns(AuditWarning, match="begins from weights that a run without differential privacy left"):
        trained("onwards", privately=True, model=loaded("open"))
    assert not any("begins from weights" in said for said in trained("paid", privately=True, model=loaded("fresh")))


def test_a_run_that_asks_for_a_larger_budget_than_the_trails_last_one_is_warned_of(tmp_path):
    def trained(name, epsilon):
        trainer = reward_trainer(PAIRS, tmp_path / name, max_steps=1)
        with auditor(tmp_path, epsilon=epsilon).track_training(name) as run:
            trainer.train()
        return [said for said in run.state.warnings if "raises" in said]

    with without_cross_checks():
        assert trained("first", 400.0) == []
        assert trained("same", 400.0) == []
        with pytest.warns(AuditWarning, match="raises the trail's budget from 400 to 900"):
            trained("more", 900.0)
        assert trained("less", 800.0) == []


def test_once_a_budget_was_set_a_run_that_asks_for_more_is_refused_before_data_is_touched(tmp_path):
    held = auditor(tmp_path, epsilon=900.0)
    index = held.set_budget(400.0, reason="two studies", by="A. Keeper")
    trainer = reward_trainer(PAIRS, tmp_path / "more", max_steps=1)
    before = weights(trainer)
    refused = pytest.raises(BudgetExceededError, match=rf"A\. Keeper set it in entry {index}")
    with refused as caught, held.track_training("more") as run:
        trainer.train()
    assert caught.value.reason == "budget-set"
    assert unchanged(trainer, before)
    assert not events(held.trail, PrivacyReserved)
    assert not events(held.trail, DataBound, run.id)
    with auditor(tmp_path, epsilon=300.0).track_training("less"):
        reward_trainer(PAIRS, tmp_path / "less", max_steps=1).train()
    held.set_budget(900.0, reason="a third study", by="A. Keeper")
    with held.track_training("raised") as run:
        trainer.train()
    assert not [said for said in run.state.warnings if "raises" in said]
    said = held.generate_compliance_report().to_dict()["privacy_words"]
    assert "set to ε = 400 (δ = 0.001) by A. Keeper" in said
    assert "“a third study”" in said


class Untouchable:
    """A data set of which only the outside may be looked at, and the columns that are named."""

    def __init__(self, real, readable=()):
        self.column_names, self.features, self._real, self._readable = real.column_names, real.features, real, readable
        self.read = []

    def __len__(self):
        return len(self._real)

    def __getitem__(self, key):
        self.read.append(key)
        assert key in self._readable, f"{key} was read"
        return self._real[key]

    def __iter__(self):
        raise AssertionError("rows were read")


CHOICES = ("fewer steps", "more noise", "a larger budget", "rlhf-audit budget set")


@pytest.mark.parametrize("unit", ["pair", "annotator"])
def test_an_exhausted_budget_is_named_with_the_choices_before_the_data_is_read(tmp_path, unit):
    with auditor(tmp_path, unit=unit).track_training("first"):
        reward_trainer(PAIRS, tmp_path / "a", max_steps=1).train()
    trainer = reward_trainer(PAIRS, tmp_path / "b", max_steps=1)
    # Another roster could have a budget of its own, so annotators' ids are read; nothing else is.
    trainer.train_dataset = Untouchable(trainer.train_dataset, ["annotator_id"] if unit == "annotator" else [])
    held = auditor(tmp_path, unit=unit, epsilon=auditor(tmp_path, unit=unit).budget().spent)
    with pytest.raises(BudgetExceededError, match=r"(not a single step|none of the 1 steps) fits") as refused:  # noqa: SIM117
        with held.track_training("second") as run:
            trainer.train()
    for choice in CHOICES:
        assert choice in refused.value.next_step
    assert refused.value.exit_code == 3
    assert trainer.train_dataset.read == (["annotator_id"] if unit == "annotator" else [])
    assert not events(held.trail, DataBound, run.id)
    with (
        pytest.raises(AssertionError, match=r"w(as|ere) read"),
        auditor(tmp_path, unit=unit).track_training("reads"),
    ):
        trainer.train()  # with budget left the rows are read: the data set above does notice


def test_where_no_roster_could_help_an_exhausted_budget_is_named_before_even_the_roster_is_read(tmp_path):
    with auditor(tmp_path).track_training("first"):
        reward_trainer(PAIRS, tmp_path / "a", max_steps=1).train()
    spent = auditor(tmp_path).budget().spent
    erase(auditor(tmp_path).trail, run=next(population_entries(tmp_path)).stream, reason="request")
    trainer = reward_trainer(PAIRS, tmp_path / "b", max_steps=1)
    trainer.train_dataset = Untouchable(trainer.train_dataset)
    held = auditor(tmp_path, epsilon=spent)
    with pytest.raises(BudgetExceededError, match="not a single step fits") as refused, held.track_training("second"):
        trainer.train()
    assert all(choice in refused.value.next_step for choice in CHOICES)
    assert trainer.train_dataset.read == []


def population_entries(tmp_path):
    return auditor(tmp_path).trail.reader().entries(type=PrivacyPopulation.TYPE)


def test_other_annotators_have_a_budget_of_their_own(tmp_path):
    others = [{**row, "annotator_id": f"other-{row['annotator_id']}"} for row in PAIRS]
    mixed = [*PAIRS[:10], *others[10:]]
    with without_cross_checks():
        held = auditor(tmp_path)
        with held.track_training("ours"):
            reward_trainer(PAIRS, tmp_path / "a", max_steps=2).train()
        alone = held.budget().spent
        held = auditor(tmp_path, epsilon=alone)
        with held.track_training("theirs") as run:
            reward_trainer(others, tmp_path / "b", max_steps=2).train()
        assert run.state.privacy.before == 0.0
        assert held.budget().spent == pytest.approx(alone)
        for name, rows in (("ours again", PAIRS), ("theirs again", others), ("both", mixed)):
            with pytest.raises(BudgetExceededError), held.track_training(name):
                reward_trainer(rows, tmp_path / "c", max_steps=2).train()
    reserved = events(held.trail, PrivacyReserved)
    assert [event.epsilon_before for event in reserved] == [0.0, 0.0]
    assert [event.population for event in reserved] == [
        decode_body(entry.type, entry.body).population for entry in population_entries(tmp_path)
    ]
    assert held.verify().level.name == "UNANCHORED"


def test_a_settlement_that_was_forged_with_the_trails_own_key_is_not_believed(tmp_path):
    held = auditor(tmp_path)
    trail = held.trail
    with held.track_training("forged") as run:
        real = run.record

        def record(event, private=None):
            if isinstance(event, PrivacySettled):
                event = msgspec.structs.replace(event, steps=1, epsilon_total=0.0)
            real(event, private)

        run.record = record
        reward_trainer(PAIRS, tmp_path / "a", max_steps=3).train()
    (reserved,) = events(trail, PrivacyReserved)
    assert held.verify().level.name == "UNANCHORED"  # every signature holds
    budget = held.budget()
    assert (budget.spent, budget.unsettled) == (0.0, 1)
    assert budget.reserved == pytest.approx(reserved.epsilon_planned)
    (doubt,) = budget.doubts
    assert "settles 1 step and entry" in doubt
    assert "shows that 3 steps ran" in doubt
    assert doubt in str(budget)
    assert "is not believed" in budget._repr_html_()
    with held.track_training("after"):
        reward_trainer(PAIRS, tmp_path / "b", max_steps=1).train()
    assert events(trail, PrivacyReserved)[1].epsilon_before == pytest.approx(reserved.epsilon_planned)


def test_evaluation_in_a_private_run_is_refused_and_free_again_after_it(tmp_path):
    trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=1)
    with auditor(tmp_path).track_training("private"):
        trainer.train()
        for look in (trainer.evaluate, trainer.predict):
            with pytest.raises(UnsupportedTrainerError, match="exact figures"):
                look(trainer.train_dataset)
        assert not [line for line in trainer.state.log_history if "eval_loss" in line]
    assert "eval_loss" in trainer.evaluate(trainer.train_dataset)


def test_evaluation_in_a_run_without_privacy_is_left_alone(tmp_path):
    trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=1)
    with AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "audit"))).track_training("plain"):
        trainer.train()
        assert "eval_loss" in trainer.evaluate(trainer.train_dataset)


def test_two_units_on_one_trail_are_refused(tmp_path):
    with auditor(tmp_path).track_training("annotators"):
        dpo_trainer(PAIRS, tmp_path / "a", max_steps=1).train()
    with pytest.raises(PrivacyError, match="budget of annotators"), auditor(tmp_path, unit="pair").track_training("p"):
        dpo_trainer(PAIRS, tmp_path / "b", max_steps=1).train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_name": " "}, "model_name"),
        ({"model_name": 7}, "model_name"),
        ({"privacy_config": {"epsilon": 1}}, "PrivacyConfig"),
        ({"compliance_mode": "eu"}, "compliance_mode"),
    ],
)
def test_an_argument_that_cannot_be_used_says_what_to_write(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        AuditableRLHF(**arguments)
    assert caught.value.next_step


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    held = AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "file")))
    with pytest.raises(StoreError, match="file"):
        held.track_training("x")


# --- races, interruptions, deaths ------------------------------------------------------------------------------------


class Rival:
    """Lets another run reserve between a run's plan and its reservation."""

    def __init__(self, privatiser, enter):
        self._inner, self._enter, self.quiet, self.inherit = privatiser, enter, privatiser.quiet, privatiser.inherit

    def plan(self, trainer, *, done=0):
        plan = self._inner.plan(trainer, done=done)
        other = threading.Thread(target=self._enter)
        other.start()
        other.join()
        return plan


def test_of_two_runs_for_the_last_of_the_budget_one_gets_it(private, tmp_path):
    (reserved,) = events(private[0].trail, PrivacyReserved)
    held = auditor(tmp_path, epsilon=reserved.epsilon_planned * 1.01)
    first, second = (dpo_trainer(PAIRS, tmp_path / name, max_steps=3) for name in "ab")

    def rival():
        with held.track_training("rival"):
            second.train()

    with pytest.raises(BudgetExceededError), held.track_training("planned first") as run:
        run.privatiser = Rival(run.privatiser, rival)
        first.train()
    assert len(events(held.trail, PrivacyReserved)) == 1
    assert (first.state.global_step, second.state.global_step) == (0, 3)
    assert [item.status for item in events(held.trail, RunFinished)] == ["completed", "failed"]


def test_an_interrupted_private_training_settles_what_it_took(tmp_path):
    held = auditor(tmp_path)
    trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=4)
    trainer.add_callback(FailsAt(2, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt), held.track_training("interrupted") as run:
        trainer.train()
    assert events(held.trail, PrivacySettled)[0].steps == 2
    finished = events(held.trail, RunFinished)[0]
    assert (finished.status, finished.steps) == ("interrupted", 2)
    assert held.budget().spent == pytest.approx(run.state.privacy.curve[2])
    assert type(trainer).__name__ == "DPOTrainer"


def test_a_step_that_was_cut_short_is_paid_for_and_shown(tmp_path):
    class CutsShort(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise KeyboardInterrupt

    held = auditor(tmp_path)
    trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=4)
    trainer.add_callback(CutsShort())
    with pytest.raises(KeyboardInterrupt), held.track_training("cut short") as run:
        trainer.train()
    assert events(held.trail, RunFinished)[0].steps == 1
    assert events(held.trail, PrivacySettled)[0].steps == 2
    assert run.state.epsilon == pytest.approx(held.budget().spent) == pytest.approx(run.state.privacy.curve[2])


def test_a_failed_private_training_names_its_class_and_nothing_of_its_data(tmp_path):
    held = auditor(tmp_path)
    trainer = dpo_trainer(PAIRS, tmp_path / "out", max_steps=4)
    trainer.add_callback(FailsAt(1, ValueError("Question 3 1?")))
    with pytest.raises(ValueError, match="Question"), held.track_training("failed"):
        trainer.train()
    assert events(held.trail, RunFinished)[0].reason == "ValueError"
    assert b"Question" not in b"".join(entry.data for entry in held.trail.reader().entries())


CHILD = """
import sys, time
from pathlib import Path
from rlhf_audit_nb import AuditableRLHF, AuditConfig, PrivacyConfig
from support.tiny import dpo_trainer, synthetic_pairs
from transformers import TrainerCallback

folder = Path(sys.argv[1])

class Dies(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            held.trail.flush()
            (folder / "durable").write_text(str(held.trail.status().size))
            time.sleep(60)

held = AuditableRLHF(
    privacy_config=PrivacyConfig(epsilon=50.0, delta=1e-3, noise_multiplier=1.0, sampling_rate=0.3),
    audit_config=AuditConfig(trail=str(folder / "audit")),
)
trainer = dpo_trainer(synthetic_pairs(20), folder / "out", max_steps=6)
with held.track_training("dies"):
    trainer.add_callback(Dies())
    trainer.train()
"""


@pytest.mark.slow
def test_after_kill_9_nothing_durable_is_lost_and_the_reservation_counts(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "durable").exists():
            assert child.poll() is None, "the training ended before it could be killed"
            assert time.monotonic() < deadline, "the training did not reach its third step"
            time.sleep(0.05)
        time.sleep(0.1)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    held = auditor(tmp_path)
    durable = int((tmp_path / "durable").read_text())
    verdict = held.verify()
    assert verdict.level.name == "UNANCHORED"
    assert verdict.size >= durable + 1  # and the entry that says interrupted
    assert [run.status for run in verdict.runs] == ["interrupted"]
    assert len(held.recovered()) == 1
    assert "interrupted" in held.recovered()[0]
    budget = held.budget()
    (reserved,) = events(held.trail, PrivacyReserved)
    assert (budget.trainings, budget.unsettled) == (1, 1)
    assert (budget.spent, budget.reserved) == (0.0, pytest.approx(reserved.epsilon_planned))
    with held.track_training("after"):  # the budget goes on from there
        dpo_trainer(PAIRS, tmp_path / "again", max_steps=1).train()
    assert events(held.trail, PrivacyReserved)[1].epsilon_before == pytest.approx(reserved.epsilon_planned)


# --- how things show -------------------------------------------------------------------------------------------------


def test_what_comes_back_shows_itself_converts_and_saves(private, tmp_path):
    held, run, *_ = private
    for item in (held, held.status(), held.budget()):
        assert item._repr_html_()
        assert json.dumps(item.to_dict())
    assert "private" in run._repr_markdown_()
    assert json.loads(held.budget().save(tmp_path / "budget.json").read_text())["unit"] == "annotator"
    assert base64.b64decode(held.status().root) == held.trail.status().root


def test_markup_in_a_name_stays_text(tmp_path):
    shown = AuditableRLHF(model_name="<b>x</b>", audit_config=AuditConfig(trail=str(tmp_path / "<i>")))._repr_html_()
    assert "<b>" not in shown
    assert "<i>" not in shown


def test_the_budget_of_an_untouched_trail_is_empty(tmp_path):
    budget = auditor(tmp_path).budget()
    assert budget == Budget(unit=None, delta=1e-3, spent=0.0, budget=50.0, left=50.0, trainings=0, unsettled=0)


def test_a_budget_that_was_set_is_what_is_left_of_whatever_a_configuration_says(tmp_path):
    held = auditor(tmp_path)
    entry = held.set_budget(20.0, reason="r", by="A. <b>Keeper</b>")
    budget = held.budget()
    assert (budget.budget, budget.left, budget.set_in, budget.set_by) == (20.0, 20.0, entry, "A. <b>Keeper</b>")
    assert (budget.unit, budget.delta) == ("annotator", 1e-3)
    assert f"The budget is 20, set by A. <b>Keeper</b> in entry {entry}." in str(budget)
    assert "<b>Keeper" not in budget._repr_html_()
    assert AuditableRLHF(audit_config=held.audit_config).budget() == budget


def test_spent_reserved_and_left_are_told_apart_by_run():
    def spend(name, index, settled):
        asked = Limit(index, "pair", 8.0, 1e-5)
        return Spend(name, name * 32, Mechanism(2.0, 0.2, 10), settled=settled, steps=10, asked=asked)

    budget = Budget.of(Ledger("pair", None, (spend("a", 3, settled=True), spend("b", 9, settled=False))))
    alone = composed_epsilon([Mechanism(2.0, 0.2, 10)], 1e-5)
    both = composed_epsilon([Mechanism(2.0, 0.2, 20)], 1e-5)
    assert (budget.spent, budget.total) == (alone, pytest.approx(both))
    assert budget.reserved == pytest.approx(both - alone)
    assert budget.left == pytest.approx(8.0 - both)
    assert [(one.entry, one.settled, one.steps, one.epsilon) for one in budget.runs] == [
        (3, True, 10, alone),
        (9, False, 10, alone),
    ]
    assert "spent" in str(budget)
    assert budget._repr_html_().count("<tr>") == 3
    other = Budget.of(Ledger("pair", None, (spend("a", 3, settled=True),)), delta=1e-6)
    assert (other.budget, other.left, other.delta) == (None, None, 1e-6)


def test_two_auditors_share_one_trail_and_a_deleted_one_is_made_anew(tmp_path):
    import shutil

    one, other = auditor(tmp_path), auditor(tmp_path)
    assert one.trail is other.trail
    first = one.trail.origin
    shutil.rmtree(tmp_path / "audit")
    assert one.trail.origin != first


def test_making_an_auditor_opens_nothing(tmp_path):
    auditor(tmp_path)
    assert not (tmp_path / "audit").exists()


def test_an_open_trail_of_another_name_is_refused(tmp_path):
    settings = AuditConfig(trail=str(tmp_path / "audit"), origin="example.com/one")
    assert AuditableRLHF(audit_config=settings).trail.origin == "example.com/one"
    other = AuditConfig(trail=str(tmp_path / "audit"), origin="example.com/two")
    with pytest.raises(StoreError, match=r"is example\.com/one, not example\.com/two"):
        _ = AuditableRLHF(audit_config=other).trail


def test_each_entry_of_an_always_durable_run_is_committed_when_it_is_recorded(tmp_path):
    auditor(tmp_path).trail.flush()
    settings = AuditConfig(trail=str(tmp_path / "audit"), durability="always")
    with AuditableRLHF(audit_config=settings).track_training("durable") as run:
        size = run.trail.status().size
        run.record(Step(step=1))
        assert run.trail.status().size == size + 1


# --- the vault ---


def test_one_annotation_is_disclosed_and_an_annotator_is_erased(tmp_path):
    from rlhf_audit_nb.trail.disclosure import verify_disclosure

    holder = auditor(tmp_path)
    done = holder.log_annotations(
        prompts=["Why?", "How?"], responses=[("a", "b"), ("c", "d")], choices=[0, 1], annotator_ids=["w17", "w23"]
    )
    first = next(item.index for item in holder.annotations(done.import_id))
    verdict, payload = verify_disclosure(holder.disclose(first, tmp_path / "one.opening"))
    assert verdict.level.name == "UNANCHORED"
    assert json.loads(payload)["annotator"] == "w17"
    with pytest.raises(VaultError, match="under that name"):
        holder.erase("w99", reason="request")
    assert holder.erase("w17", reason="request").openings == 1
    assert [item.state for item in holder.annotations(done.import_id)] == ["erased", "open"]
    with pytest.raises(VaultError, match="was erased"):
        holder.disclose(first, tmp_path / "again.opening")
    assert not (tmp_path / "again.opening").exists()
    assert holder.verify().openings["erased"] == 1
