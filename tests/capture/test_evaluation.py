"""Thresholds and evaluations as they are written: known by digests, refused in a sentence, sealed where people are."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.tiny import reward_model, reward_trainer, synthetic_pairs
from support.trails import events, private_half, without_cross_checks

from rlhf_audit_nb import AuditableRLHF, PrivacyConfig
from rlhf_audit_nb import events as ev
from rlhf_audit_nb.capture.data import digest_rows
from rlhf_audit_nb.errors import AuditError, ConfigError, DataError, ReportError

PAIRS = synthetic_pairs(6)
HELD_OUT = [{"prompt": f"Public {number}?", "chosen": " yes", "rejected": " no"} for number in range(5)]
SECRET = 0.123456789


@pytest.fixture
def auditor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return AuditableRLHF()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A reward model trained without privacy, with a threshold before, its saved folder, and evaluations after."""
    here = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(here)
        auditor = AuditableRLHF()
        data = Dataset.from_list(HELD_OUT)
        first = auditor.seal_threshold("accuracy", "≥ 0.5", data=data, experiment="reward", by="A. Keeper")
        with auditor.track_training("reward"):
            trainer = reward_trainer(PAIRS, here / "reward", max_steps=2)
            trainer.train()
            trainer.save_model(str(here / "saved"))
        auditor.log_evaluation(
            {"accuracy": torch.tensor(0.75), "loss": np.float32(0.5)}, model=trainer.model, data=HELD_OUT, seeds=[1, 2]
        )
        auditor.log_evaluation({"accuracy": 0.25}, model=here / "saved", data=digest_rows(data), samples=5)
        auditor.log_evaluation({"accuracy": 1}, model=reward_model(), experiment="reward")
        yield auditor, first, auditor.evaluations()


def test_the_trail_proves_the_order_and_knows_the_model_in_memory_and_in_its_folder(trained):
    _, first, view = trained
    live, folder, begun = view.found.done
    assert [one.model.as_ for one in (live, folder, begun)] == ["final", "final", "base"]
    assert live.model.training == folder.model.training
    assert (live.judgements[0].threshold.entry, live.judgements[0].order) == (first, "before training")
    assert [one.judgements[0].outcome for one in (live, folder)] == ["met", "not met"]
    assert begun.judgements == ()
    assert any("no training of that experiment left it" in problem for problem in begun.problems)
    assert not view.passed


def test_rows_are_the_same_data_whether_they_come_as_a_list_a_data_set_or_a_digest(trained):
    live, folder, _ = trained[2].found.done
    assert live.event.data == folder.event.data == digest_rows(HELD_OUT)
    assert (live.event.samples, folder.event.samples) == (5, 5)
    assert live.event.seeds == [1, 2]
    assert live.event.metrics == {"accuracy": 0.75, "loss": 0.5}


def test_the_view_says_it_in_words_in_html_and_as_json(trained, tmp_path):
    view = trained[2]
    assert "accuracy 0.75: ≥ 0.5 met" in str(view)
    assert "0 passed" not in repr(view)
    assert "<li>" in view._repr_html_()
    assert view.save(tmp_path / "e.json").read_text(encoding="utf-8").count('"judgements"') == 3
    with pytest.raises(ReportError, match=r"\.pdf"):
        view.save(tmp_path / "e.pdf")
    assert not (tmp_path / "e.pdf").exists()


@pytest.mark.parametrize("condition", ["0.7", "== 0.7", ">= 70%", ">= nan", ">= inf", "", None, ">=", "=> 1"])
def test_what_is_no_condition_is_refused(auditor, condition):
    with pytest.raises(ConfigError) as refused:
        auditor.seal_threshold("accuracy", condition)
    assert refused.value.reason == "threshold"
    assert refused.value.next_step
    assert not events(auditor.trail, ev.ThresholdSealed)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"metrics": {}}, "metrics"),
        ({"metrics": {"accuracy": True}}, "metrics"),
        ({"metrics": {"accuracy": "0.7"}}, "metrics"),
        ({"metrics": {"accuracy": [0.1, 0.2]}}, "metrics"),
        ({"metrics": {"": 1.0}}, "metric"),
        ({"metrics": {"a\nb": 1.0}}, "metric"),
        ({"model": None}, "model"),
        ({"model": "no/such/folder"}, "model"),
        ({"model": "."}, "model"),
        ({"data": "votes.jsonl"}, "data"),
        ({"data": []}, "data"),
        ({"data": iter([1])}, "data"),
        ({"samples": 0}, "samples"),
        ({"seeds": ["x"]}, "seeds"),
        ({"evaluator": ""}, "evaluator"),
        ({"experiment": 3}, "experiment"),
    ],
)
def test_an_evaluation_that_cannot_stand_is_refused_and_nothing_is_written(auditor, tmp_path, changed, reason):
    (tmp_path / "empty").mkdir()
    given = {"metrics": {"accuracy": 0.5}, "model": "ab" * 32, **changed}
    if given["model"] == ".":
        given["model"] = tmp_path / "empty"
    with pytest.raises(ConfigError) as refused:
        auditor.log_evaluation(given.pop("metrics"), **given)
    assert refused.value.reason == reason
    assert refused.value.next_step
    assert not events(auditor.trail, ev.EvaluationRecorded)


def test_a_broken_weights_file_is_named(auditor, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="'broken', whose weights cannot be read"):
        auditor.log_evaluation({"accuracy": 0.5}, model=tmp_path / "broken")


def test_nan_is_recorded_by_its_name(auditor):
    auditor.log_evaluation({"accuracy": math.nan}, model="ab" * 32)
    assert events(auditor.trail, ev.EvaluationRecorded)[0].metrics == {"accuracy": "NaN"}


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    """A private reward model; evaluated on undeclared data, on declared data, and on what the run protects."""
    here = tmp_path_factory.mktemp("private")
    config = PrivacyConfig(epsilon=8.0, sampling_rate=0.5, noise_multiplier=2.0)
    with pytest.MonkeyPatch.context() as patch, without_cross_checks(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(here)
        held, plain = AuditableRLHF(privacy_config=config), AuditableRLHF()
        held.seal_threshold("accuracy", ">= 0.5", data=HELD_OUT)
        with held.track_training("reward"):
            trainer = reward_trainer(PAIRS, here / "reward", max_steps=2)
            trainer.train()
        undeclared = plain.log_evaluation({"accuracy": SECRET}, model=trainer.model, data=HELD_OUT)
        protected = plain.log_evaluation({"accuracy": SECRET}, model=trainer.model, data=trainer.train_dataset)
        claim = held.declare_public_data(Dataset.from_list(HELD_OUT), reason="written by us", by="A. Keeper")
        declared = held.log_evaluation({"accuracy": 0.75}, model=trainer.model, data=HELD_OUT)
        unstated = held.log_evaluation({"accuracy": SECRET}, model=trainer.model)
        yield held, trainer, claim, undeclared, protected, declared, unstated


def test_figures_on_data_that_nobody_declared_public_are_in_the_vault_alone(private):
    held, _, _, undeclared, protected, _, unstated = private
    entries = {entry.index: entry for entry in held.trail.reader().entries()}
    for logged in (undeclared, protected, unstated):
        entry = entries[logged.entry]
        assert logged.sealed
        assert str(SECRET).encode() not in entry.data
        assert digest_rows(HELD_OUT).encode() not in entry.data
        event = ev.decode_body(entry.type, entry.body)
        assert event.metrics == {"accuracy": None}
        assert (event.samples, event.data) == (None, None)
        assert private_half(held.trail, entry).metrics == {"accuracy": SECRET}
    threshold = next(entry for entry in entries.values() if entry.type == ev.ThresholdSealed.TYPE)
    assert threshold.envelope.sealed
    assert digest_rows(HELD_OUT).encode() not in threshold.data


def test_figures_on_declared_data_stand_in_the_open_with_the_claim(private):
    held, _, claim, _, _, declared, _ = private
    done = {one.entry: one for one in held.evaluations().found.done}
    assert not declared.sealed
    one = done[declared.entry]
    assert one.event.data_public == claim
    assert one.event.metrics == {"accuracy": 0.75}
    assert one.model.as_ == "final"
    # The threshold was sealed when nobody had declared the data: whether it is the same is not shown.
    assert one.judgements == ()
    assert "is not shown" in one.problems[0]


def test_declaring_protected_data_public_does_not_let_its_figures_out(private):
    held, trainer, *_ = private
    count = len(events(held.trail, ev.EvaluationRecorded))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_audit_nb.capture.evaluation._public_entry", lambda *_, **__: 0)
        with pytest.raises(DataError) as refused:
            held.log_evaluation({"accuracy": SECRET}, model=trainer.model, data=trainer.train_dataset)
    assert refused.value.reason == "protected-data"
    assert len(events(held.trail, ev.EvaluationRecorded)) == count


def test_a_report_of_such_a_trail_shows_no_sealed_figure(private):
    held = private[0]
    report = held.generate_compliance_report()
    assert str(SECRET)[:6] not in report.html
    assert "sealed" in report.html
    with pytest.raises(AuditError):
        held.log_evaluation({}, model="ab" * 32)


def test_a_secret_in_what_is_stated_does_not_reach_the_trail(auditor):
    planted = "ghp_" + "a1B2" * 9
    auditor.log_evaluation({"accuracy": 0.5}, model="ab" * 32, evaluator=f"tool --key {planted}")
    auditor.seal_threshold("accuracy", ">= 0.5", reason=f"see {planted}")
    entries = b"".join(entry.data for entry in auditor.trail.reader().entries())
    assert b"evaluation.recorded" in entries
    assert planted.encode() not in entries
