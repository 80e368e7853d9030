"""``rlhf-audit lineage``: sentences, a picture, PROV-JSON, and what it cannot do."""

from __future__ import annotations

import json

import pytest

from rlhf_audit_nb import events as ev
from rlhf_audit_nb.events import encode_body
from rlhf_audit_nb.trail import Trail


@pytest.fixture
def trail(tmp_path):
    told = (
        ev.RunStarted(experiment="first", entry_point="cell", tool="t"),
        ev.TrainerAttached(trainer="SFTTrainer", loss=None, max_steps=1, seed=1, hyperparameters={}),
        ev.DataBound(role="train", columns=["text"], rows=3, digest="ab" * 32, source="open/data"),
        *(
            ev.ModelBound(
                role=role,
                architecture="Llama",
                parameters=1,
                trainable=1,
                weights_digest=digest * 32,
                config_digest="00",
            )
            for role, digest in (("base", "01"), ("final", "02"))
        ),
        ev.RunFinished(status="completed", steps=1, trained=True),
    )
    with Trail.open(tmp_path / "audit") as opened:
        for event in told:
            opened.append(event.TYPE, encode_body(event), run="a" * 32).wait()
    return tmp_path / "audit"


def test_it_says_in_sentences_what_went_into_what(run, trail):
    code, out, _ = run("lineage", trail)
    assert code == 0
    assert "first: SFTTrainer (#2, no bound) took train open/data #3 (no bound)" in out
    assert "left Llama #5 (no bound)" in out


def test_it_gives_nodes_edges_and_prov_as_json(run, trail):
    code, out, _ = run("lineage", trail, "--json")
    said = json.loads(out)
    assert code == 0
    assert [node["kind"] for node in said["nodes"]] == ["data", "model", "training", "model"]
    assert [edge["role"] for edge in said["edges"]] == ["train", "base", "final"]
    assert len(said["prov"]["used"]) == 2
    assert said["level"] == "UNANCHORED"


def test_it_writes_a_picture_or_prov_and_refuses_another_format(run, trail, tmp_path):
    code, out, _ = run("lineage", trail, "-o", tmp_path / "l.svg")
    assert code == 0
    assert "l.svg" in out
    assert (tmp_path / "l.svg").read_text(encoding="utf-8").startswith("<svg")
    assert run("lineage", trail, "-o", tmp_path / "l.json")[0] == 0
    assert "prefix" in json.loads((tmp_path / "l.json").read_text(encoding="utf-8"))
    code, _, err = run("lineage", trail, "-o", tmp_path / "l.png")
    assert code == 2
    assert "ends in .svg or .json" in err


def test_a_trail_without_training_says_so(run, tmp_path):
    with Trail.open(tmp_path / "empty"):
        pass
    code, out, _ = run("lineage", tmp_path / "empty")
    assert code == 0
    assert "No training is recorded" in out
    code, _, err = run("lineage", tmp_path / "empty", "-o", tmp_path / "l.svg")
    assert code == 2
    assert "no lineage to draw" in err
