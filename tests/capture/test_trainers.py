"""Every trainer of TRL that runs here, two steps each in one run: nothing that it measures or uses goes unrecorded."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from support.trails import events
from support.trainers import BUILDERS, build
from support.trl_classes import trainer_classes

from rlhf_audit_nb.capture.run import Run
from rlhf_audit_nb.capture.weights import digest_tensors, final_tensors
from rlhf_audit_nb.events import (
    DataBound,
    FunctionBound,
    ModelBound,
    ReferenceUsed,
    SamplesDrawn,
    Step,
    TrainerAttached,
    TrainerLogged,
)
from rlhf_audit_nb.trail import Trail

PAGE = Path(__file__).resolve().parents[2] / "docs" / "capture" / "trainers.md"

REFERENCES = {  # of each trainer: role and how, where it has any
    "trl.DPOTrainer": ("reference", "adapter-disabled"),
    "trl.KTOTrainer": ("reference", "adapter-disabled"),
    "trl.GRPOTrainer": ("reference", "none"),  # beta is 0
    "trl.RLOOTrainer": ("reference", "adapter-disabled"),
    "trl.DistillationTrainer": ("teacher", "model"),
    "trl.experimental.distillation.DistillationTrainer": ("teacher", "model"),
    "trl.experimental.kto.KTOTrainer": ("reference", "model"),
    "trl.experimental.a2po.A2POTrainer": ("reference", "model"),
    "trl.experimental.bema_for_ref_model.DPOTrainer": ("reference", "model"),
    "trl.experimental.gkd.GKDTrainer": ("teacher", "model"),
    "trl.experimental.gold.GOLDTrainer": ("teacher", "model"),
    "trl.experimental.gmpo.GMPOTrainer": ("reference", "none"),
    "trl.experimental.iw_opd.IWOPDTrainer": ("teacher", "model"),
    "trl.experimental.online_dpo.OnlineDPOTrainer": ("reference", "model"),
    "trl.experimental.sdft.SDFTTrainer": ("teacher", "model"),
    "trl.experimental.sdpo.SDPOTrainer": ("teacher", "model"),
}
REWARDED = {path for path in BUILDERS if re.search(r"GRPO|RLOO|A2PO|GMPO|OnlineDPO|SDPO", path)}
SAMPLING = REWARDED | {path for path in BUILDERS if re.search(r"Distillation|GKD|GOLD|IWOPD|SDFT", path)}


@pytest.fixture(scope="module")
def trail(tmp_path_factory):
    with Trail.open(tmp_path_factory.mktemp("trainers") / "audit") as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("path", BUILDERS)
def test_a_trainer_is_recorded_without_a_changed_line(trail, folder, path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    before = build(path, folder) if list(BUILDERS).index(path) % 2 else None  # built before the run, or inside
    with Run(trail, path) as run:
        trainer = before if before is not None else build(path, folder)
        trainer.train()

    (attached,) = events(trail, TrainerAttached, run.id)
    assert attached.trainer == path.rpartition(".")[2]
    assert {"temperature", "beta", "learning_rate"} & attached.hyperparameters.keys()
    assert attached.seed == 42
    assert [data.role for data in events(trail, DataBound, run.id)] == ["train"]

    steps = events(trail, Step, run.id)
    assert [step.step for step in steps] == [1, 2]
    for step in steps:
        for value in (step.metrics["loss"], step.learning_rate, step.gradient_norm, step.update_norm):
            assert isinstance(value, float)
            assert math.isfinite(value)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    told = [step.metrics.keys() | logged for step, logged in zip(steps, logged_beside(trail, run, steps), strict=True)]
    for step, log, names in zip(steps, logs, told, strict=True):
        assert step.metrics["loss"] == pytest.approx(log["loss"], abs=1e-4)  # some of them round what they log
        assert log.keys() - names <= {"grad_norm", "learning_rate", "epoch", "step"}

    models = {model.role: model for model in events(trail, ModelBound, run.id)}
    references = [(item.role, item.how) for item in events(trail, ReferenceUsed, run.id)]
    assert references == ([REFERENCES[path]] if path in REFERENCES else [])
    assert {role for role, how in references if how == "model"} <= models.keys()
    assert models["final"].weights_digest == digest_tensors(final_tensors(trainer.model))
    assert ("reward" in models) == (path == "trl.GRPOTrainer")  # the one that is built with a reward model

    rewards = [item for item in events(trail, FunctionBound, run.id) if item.role == "reward"]
    assert bool(rewards) == (path in REWARDED)
    draws = events(trail, SamplesDrawn, run.id)
    assert [draw.step for draw in draws] == ([1, 2] if path in SAMPLING else [])
    for draw in draws:
        assert draw.samples == draw.statistics["samples"] > 0
        assert ("reward/mean" in draw.statistics) == (path in REWARDED)
    assert run.state.warnings == []


def logged_beside(trail, run, steps):
    """The names that each step's log brought beside its metrics."""
    logged = events(trail, TrainerLogged, run.id)
    return [{name for item in logged if item.step == step.step for name in item.metrics} for step in steps]


def rows_of_page():
    """The page's table of trainers: path, what is said of it."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\| `(trl\.[\w.]+)` \| (.+?) \|", line):
            found[match[1]] = match[2]
    return found


def test_the_page_has_every_trainer_of_trl_and_says_which_are_run_here():
    rows = rows_of_page()
    assert rows.keys() == trainer_classes().keys()
    assert {path for path, said in rows.items() if said == "yes"} == BUILDERS.keys()
    assert all(said == "yes" or said.startswith("not run here: ") for said in rows.values())
