"""The example notebooks are kept as they should be: no outputs, stable ids, parameters, nothing private shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nbformat
import pytest
from support.folders import KINDS, change, reference

from rlhf_audit_nb import AuditableRLHF
from rlhf_audit_nb.cli import main
from rlhf_audit_nb.compliance import Evidence
from rlhf_audit_nb.compliance.lineage import lineage
from rlhf_audit_nb.compliance.thresholds import evaluations
from rlhf_audit_nb.records import open_record
from rlhf_audit_nb.trail import Level, verify_trail

NOTEBOOKS = sorted((Path(__file__).parents[1] / "example_notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.name)
def notebook(request):
    return nbformat.read(request.param, nbformat.NO_CONVERT)


def test_there_are_notebooks():
    assert [p.name for p in NOTEBOOKS] == [
        "01_dpo_private.ipynb",
        "02_privacy_utility.ipynb",
        "03_sft_reward_grpo.ipynb",
    ]


def test_a_notebook_is_valid_4_5_with_readable_ids(notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert all(id_.replace("-", "").isalpha() for id_ in ids)


def test_a_notebook_is_kept_without_outputs(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert "widgets" not in notebook.metadata


def test_a_notebook_has_one_parameters_cell_before_any_other_code(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [("parameters" in cell.metadata.get("tags", [])) for cell in code] == [True] + [False] * (len(code) - 1)


def test_the_training_cell_knows_nothing_of_auditing():
    notebook = nbformat.read(NOTEBOOKS[0], nbformat.NO_CONVERT)
    [cell] = [c for c in notebook.cells if c.source.startswith("%%audit_train")]
    body = cell.source.split("\n", 1)[1]
    compile(body, "cell", "exec")
    assert "audit" not in body
    assert "priva" not in body


@pytest.mark.slow
def test_the_notebook_on_utility_runs_into_a_record_and_every_run_of_it_keeps_its_budget(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = {"steps": "2", "epsilons": "[8.0]", "units": '["annotator"]'}
    options = [part for name, value in asked.items() for part in ("-p", name, value)]
    assert main(["run", str(NOTEBOOKS[1]), *options, "-o", "record.ipynb"]) == 0
    results = json.loads(Path("out/02_privacy_utility/results.json").read_text())
    assert sorted((row["task"], row["unit"]) for row in results) == [
        ("dpo", "annotator"),
        ("dpo", "nobody"),
        ("reward", "annotator"),
        ("reward", "nobody"),
    ]
    for row in results:
        assert 0.2 < row["accuracy"] < 0.9
        assert row["spent"] is None if row["unit"] == "nobody" else 7 < row["spent"] <= 8
    trails = sorted(Path("out/02_privacy_utility").glob("*/audit"))
    assert len(trails) == len(results)
    assert {verify_trail(trail).level for trail in trails} == {Level.UNANCHORED}
    outputs = json.dumps([cell.get("outputs") for cell in nbformat.read("record.ipynb", 4).cells])
    assert "image/png" in outputs
    assert "train_loss" not in outputs


@pytest.mark.slow
def test_the_notebook_from_sft_to_a_policy_runs_into_a_record_that_shows_its_lineage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(NOTEBOOKS[2]), "-p", "steps", "4", "-p", "policy_steps", "2", "-o", "record.ipynb"]) == 0
    assert main(["verify", "record.ipynb", "--json"]) == 0
    evidence = Evidence.from_record(open_record(Path("record.ipynb")))
    graph = lineage(evidence)
    sft, reward, policy = graph.of("training")
    assert [node.detail for node in (sft, reward, policy)] == ["sft", "reward", "policy"]
    assert sft.id in {node.id for node in graph.ancestors(policy.id).of("training")}
    left = {edge.source: graph.node(edge.target) for edge in graph.edges if edge.role == "final"}
    assert all(left[node.id].folders[0].signature for node in (sft, reward, policy))
    found = evaluations(evidence).done
    assert [one.model.experiment for one in found] == ["reward", "policy"]
    for one, metric in zip(found, ("accuracy", "reward gain"), strict=True):
        (judged,) = one.judgements
        assert (judged.metric, judged.order) == (metric, "before training")
        assert judged.outcome in ("met", "not met")
        assert one.model.as_ == "final"
        assert not one.problems
    outputs = json.dumps([cell.get("outputs") for cell in nbformat.read("record.ipynb", 4).cells])
    assert "<svg" in outputs
    for name in ("sft", "reward", "policy"):
        assert reference(Path("out/03_sft_reward_grpo") / name)
    check_changes(Path("out/03_sft_reward_grpo/policy"), tmp_path / "changed")


def check_changes(folder, place):
    """OpenSSF's implementation refuses the folder after each kind of change, and ours names what was changed."""
    auditor = AuditableRLHF()
    assert auditor.verify_model(folder).intact
    for kind, called in KINDS.items():
        copy = place / kind
        shutil.copytree(folder, copy)
        name, was = change(copy, kind)
        assert not reference(copy)
        found = auditor.verify_model(copy)
        assert not found.intact
        assert [(item.kind, item.name, item.was) for item in found.changes] == [(called, name, was)]
