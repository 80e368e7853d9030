"""One real training: its checkpoints, its saves without a trainer, and the path of its weights."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import causal_model, sft_trainer, synthetic_pairs

from rlhf_audit_nb import AuditableRLHF, AuditConfig
from rlhf_audit_nb.capture import weights_path
from rlhf_audit_nb.capture.folders import digest_folder
from rlhf_audit_nb.capture.saving import find_saved
from rlhf_audit_nb.capture.weights import digest_tensors
from rlhf_audit_nb.capture.weights_path import WeightsPath
from rlhf_audit_nb.events import ModelBound, Step, WeightsSaved, decode_body


class Trained:
    """The folders and the events of the one training."""

    def __init__(self, place, auditor):
        self.place, self.auditor = place, auditor

    def of(self, kind):
        """All events of one type."""
        return [decode_body(entry.type, entry.body) for entry in self.auditor.trail.reader().entries(type=kind.TYPE)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("trained")
    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(place / "audit"), weights_every=2))
    with auditor.track_training(experiment_name="saves"):
        trainer = sft_trainer(
            synthetic_pairs(4), place / "out", peft=None, save_strategy="steps", save_steps=2, max_steps=3
        )
        trainer.train()
        trainer.save_model()
        trainer.model.save_pretrained(place / "plain")
        causal_model(seed=3).save_pretrained(place / "not-mine", is_main_process=False)
        causal_model(seed=4).save_pretrained(place / "another")
    auditor.trail.flush()
    causal_model().save_pretrained(place / "later")
    return Trained(place, auditor)


def test_a_save_without_a_trainer_is_signed_and_recorded_once(trained):
    saved = [event.name for event in trained.of(WeightsSaved)]
    assert sorted(saved) == ["another", "checkpoint-2", "checkpoint-3", "out", "plain"]
    assert (trained.place / "plain" / "model.sig").is_file()
    assert not (trained.place / "later" / "model.sig").exists()


def test_a_model_that_the_run_did_not_train_is_no_step_of_it(trained):
    steps = {event.name: event.step for event in trained.of(WeightsSaved)}
    assert steps == {"checkpoint-2": 2, "checkpoint-3": 3, "out": 3, "plain": 3, "another": None}
    folders = {folder.name for node in trained.auditor.lineage().graph.nodes for folder in node.folders}
    assert folders == {"checkpoint-3", "out", "plain"}
    trained.auditor.log_evaluation({"accuracy": 0.9}, model=trained.place / "another")
    assert trained.auditor.evaluations().found.done[-1].model.as_ == "unknown"


def test_of_two_trainings_of_a_run_each_ones_folder_is_its_own(tmp_path):
    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "audit")))
    with auditor.track_training(experiment_name="both"):
        first, second = (
            sft_trainer(synthetic_pairs(2), tmp_path / name, peft=None, max_steps=1) for name in ("first", "second")
        )
        first.train()
        second.train()
        first.save_model(str(tmp_path / "of-first"))
        second.save_model(str(tmp_path / "of-second"))
    models = auditor.lineage().graph.of("model")
    assert [[folder.name for folder in node.folders] for node in models if node.folders] == [["of-second"]]


def test_the_digest_of_a_folder_leads_to_its_entry(trained):
    reader = trained.auditor.trail.reader()
    entry, run = find_saved(reader, digest_folder(trained.place / "plain"))
    body = next(reader.entries(entry, entry + 1))
    assert decode_body(body.type, body.body).name == "plain"
    assert body.run == run
    assert find_saved(reader, digest_folder(trained.place / "later")) is None


def test_the_reference_accepts_what_was_saved_and_so_do_we(trained):
    folder = trained.place / "out" / "checkpoint-2"
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder)]
    command += ["--signature", str(folder / "model.sig"), "--public_key", str(folder / "model.pub")]
    assert subprocess.run(command, check=False, capture_output=True, timeout=60).returncode == 0
    found = trained.auditor.verify_model(folder)
    assert found.intact
    assert found.level.name == "UNANCHORED"
    assert (found.saved.name, found.saved.step, found.saved.experiment) == ("checkpoint-2", 2, "saves")


def test_a_changed_tensor_is_named(trained, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "plain"
    shutil.copytree(trained.place / "plain", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = trained.auditor.verify_model(folder)
    assert not found.intact
    assert [change.name for change in found.changes] == ["model.safetensors"]
    assert found.tensors == ("model.norm.weight",)
    assert "model.norm.weight" in str(found)


def test_the_path_leads_from_the_base_to_what_was_left(trained):
    base = next(event for event in trained.of(ModelBound) if event.role == "base")
    links = [event for event in trained.of(Step) if event.weights_digest is not None]
    stored = [load_file(trained.place / "out" / f"checkpoint-{step}" / "model.safetensors") for step in (2, 3)]
    start = {name: value.detach() for name, value in causal_model().named_parameters()}
    assert base.trainable_digest == digest_tensors(start)
    assert [link.step for link in links] == [2, 3]
    assert [link.weights_digest for link in links] == [digest_tensors(tensors) for tensors in stored]
    for before, after, link in zip([start, stored[0]], stored, links, strict=True):
        square = sum(float((after[name].double() - before[name].double()).square().sum()) for name in after)
        assert link.weights_moved == pytest.approx(math.sqrt(square), rel=1e-9)
        assert link.weights_moved > 0
    assert links[-1].learning_rate is None


def test_too_large_a_copy_is_not_kept_and_the_digest_is(monkeypatch):
    model = torch.nn.Linear(4, 4)
    monkeypatch.setattr(weights_path, "MOST_KEPT", 10)
    link = WeightsPath(model).link()
    assert link.moved is None
    assert link.digest == digest_tensors(dict(model.named_parameters()))


def test_a_link_says_whether_it_is_the_one_before():
    model = torch.nn.Linear(4, 4)
    path = WeightsPath(model)
    assert (path.link().moved, path.link().known) == (0.0, True)
    with torch.no_grad():
        model.bias += 2
    link = path.link()
    assert link.moved == pytest.approx(4.0)
    assert not link.known
