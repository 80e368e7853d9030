"""The main job through the command line, on the simulated set and on real votes: what it leaves, and that it holds."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rlhf_audit_nb import showcase
from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.events import CellAudited, CellExecuted, decode_body
from rlhf_audit_nb.trail import TrailReader

pytestmark = pytest.mark.slow

ELSEWHERE = {"RLHF_AUDIT_HOME": "/nonexistent/keys"}


@pytest.fixture
def call(command, tmp_path):
    def run(*argv, cwd=tmp_path, **environment):
        asked = [*command, *map(str, argv)]
        return subprocess.run(
            asked, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900, check=False
        )

    return run


def test_it_leaves_all_that_it_names(demo):
    out = demo / "out" / "demo"
    assert {p.name for p in out.iterdir()} == {*showcase.MADE, showcase.MARK}
    assert {p.name for p in (out / "audit").iterdir()} >= {"trail.sqlite", "vault.sqlite"}
    assert {p.name for p in (out / "model").iterdir()} >= {"adapter_model.safetensors", "model.sig"}
    assert (out / "model.pub").read_text().startswith("-----BEGIN PUBLIC KEY-----")


def test_it_says_where_everything_is_with_the_verdict_and_epsilon(demo):
    said = json.loads((demo / "said.json").read_text())
    assert said["verdict"]["level"] == "UNANCHORED"
    assert said["verdict"]["reasons"] == []
    assert all((demo / path).exists() for path in said["files"].values())
    privacy = said["privacy"]
    assert 0 < privacy["epsilon"] <= privacy["budget"] == 8.0
    assert (privacy["delta"], privacy["unit"], privacy["units"], privacy["adjacency"]) == (
        1e-5,
        "annotator",
        48,
        "zero-out",
    )
    assert "simulated" in said["data"]


def test_its_run_names_the_records_cell_that_opened_it(demo):
    reader = TrailReader.open(demo / "out" / "demo" / "audit")
    (cell,) = [decode_body(entry.type, entry.body) for entry in reader.entries(type=CellAudited.TYPE)]
    executed = [decode_body(entry.type, entry.body) for entry in reader.entries(type=CellExecuted.TYPE)]
    (opening,) = [event for event in executed if event.cell == cell.cell]
    assert opening.source_digest == cell.source_digest
    assert cell.execution_count == 1 + [event.cell for event in executed].index(cell.cell)
    assert (cell.seen, cell.executed) == ("first", [])  # the run is private: what ran before it is sealed


def test_the_record_verifies_elsewhere_with_only_itself_and_the_policy(demo, call, tmp_path):
    for name in ("record.ipynb", "trust.policy"):
        shutil.copy(demo / "out" / "demo" / name, tmp_path)
    done = call("verify", "record.ipynb", "--policy", "trust.policy", "--json", **ELSEWHERE)
    assert done.returncode == 0
    verdict = json.loads(done.stdout)
    checked = {"level", "origin", "size", "root", "signers", "runs", "reasons", "anchors", "openings"}
    assert set(verdict) == checked | {"record"}
    assert verdict["level"] == "UNANCHORED"
    assert verdict["reasons"] == []
    required = call("verify", "record.ipynb", "--policy", "trust.policy", "--require", "COSIGNED", **ELSEWHERE)
    assert required.returncode == 10
    assert "COSIGNED" in required.stdout
    without = call("verify", "record.ipynb", **ELSEWHERE)
    assert without.returncode == 2
    assert "--policy" in without.stderr


def test_a_changed_parameter_is_caught_and_its_cell_is_named(demo, call, tmp_path):
    text = (demo / "out" / "demo" / "record.ipynb").read_text()
    assert text.count("delta = 1e-5") == 1
    (tmp_path / "record.ipynb").write_text(text.replace("delta = 1e-5", "delta = 1e-9"))
    done = call("verify", "record.ipynb", "--policy", demo / "out" / "demo" / "trust.policy", "--json", **ELSEWHERE)
    assert done.returncode == 40
    reasons = json.loads(done.stdout)["reasons"]
    assert [reason["code"] for reason in reasons] == ["cell-source-changed"]
    assert "id parameters" in reasons[0]["message"]


def test_the_trail_verifies_and_its_budget_is_the_one_that_was_said(demo, call):
    out = demo / "out" / "demo"
    assert call("verify", out / "audit", "--policy", out / "trust.policy").returncode == 0
    shown = json.loads(call("budget", "show", "--trail", out / "audit", "--json").stdout)
    said = json.loads((demo / "said.json").read_text())["privacy"]
    assert shown["epsilon"] == pytest.approx(said["epsilon"], abs=1e-6)
    assert shown["unit"] == "annotator"


def test_the_saved_model_loads_and_speaks(demo, monkeypatch):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    monkeypatch.chdir(demo)
    model = AutoPeftModelForCausalLM.from_pretrained("out/demo/model")
    tokenizer = AutoTokenizer.from_pretrained("out/demo/model")
    prompt = tokenizer("How long can I keep cooked rice?", return_tensors="pt")
    spoken = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert spoken.shape[1] == prompt["input_ids"].shape[1] + 4


def test_the_reports_stand_alone_and_say_what_they_must(demo):
    out = demo / "out" / "demo"
    html = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", html)
    pdf = subprocess.run(["pdftotext", out / "report.pdf", "-"], capture_output=True, text=True, check=True).stdout
    card = (out / "model_card.md").read_text(encoding="utf-8")
    for text in (html, pdf, card):
        assert "UNANCHORED" in text
        assert "annotator" in text
        assert "compliant" not in text.lower().replace("non-compliant", "")


def test_nothing_private_of_the_run_is_in_what_is_handed_on(demo):
    out = demo / "out" / "demo"
    handed = [out / "record.ipynb", out / "report.html", out / "model_card.md"]
    for path in handed:
        text = path.read_text(encoding="utf-8")
        assert "rewards/accuracies" not in text, path
        assert "'train_loss'" not in text, path
        assert "simulated-0" not in text, path


def test_a_second_showing_starts_over_and_leaves_what_is_not_its_own(call, tmp_path):
    first = call("demo", "--steps", "2", "--json")
    assert first.returncode == 0, first.stderr
    out = tmp_path / "out" / "demo"
    (out / "notes.txt").write_text("mine")
    second = call("demo", "--steps", "2", "--json")
    assert second.returncode == 0, second.stderr
    assert "starting over" in second.stderr
    assert (out / "notes.txt").read_text() == "mine"
    origins = [json.loads(done.stdout)["verdict"]["origin"] for done in (first, second)]
    assert origins[0] != origins[1]


def test_a_folder_that_no_demo_made_is_refused_untouched(call, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "model").mkdir()
    (tmp_path / "thesis" / "model" / "mine").touch()
    done = call("demo", "-o", "thesis")
    assert done.returncode == 2
    assert "no earlier demo put it there" in done.stderr
    assert [p.name for p in (tmp_path / "thesis").rglob("*")] == ["model", "mine"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--data", "votes.jsonl"], "Did you mean 'annotator'?"),
        (["--data", "votes.jsonl", "--columns", "annotator_id=annotators"], "Did you mean 'annotator'?"),
        (["--data", "empty.jsonl"], "has no rows"),
        (["--data", "none.jsonl"], "does not exist"),
    ],
)
def test_wrong_data_costs_nothing(call, tmp_path, argv, said):
    vote = {"prompt": "p", "chosen": "a", "rejected": "b", "annotator": "w"}
    (tmp_path / "votes.jsonl").write_text(json.dumps(vote))
    (tmp_path / "empty.jsonl").touch()
    done = call("demo", *argv)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"delta": 1.0}, "delta is 1.0"),
        ({"delta": 1e-11}, "delta is 1e-11"),
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_a_setting_out_of_range_is_refused_before_the_earlier_demo_goes(tmp_path, settings, said):
    for name in (showcase.MARK, "record.ipynb"):
        (tmp_path / name).write_text("earlier")
    with pytest.raises(ConfigError, match=said) as refused:
        showcase.run_demo(tmp_path, settings, print)
    assert refused.value.next_step
    assert (tmp_path / "record.ipynb").read_text() == "earlier"


def test_an_impossible_epsilon_is_refused_in_the_cell_and_the_record_says_so(call, tmp_path, repository):
    notebook = repository / "example_notebooks" / showcase.NOTEBOOK
    done = call("run", notebook, "-p", "epsilon", "-1", "-p", "output_dir", tmp_path / "model", "-o", "r.ipynb")
    assert done.returncode in (1, 2, 3)
    assert "Traceback" not in done.stderr
    assert "Cell" in done.stderr
    assert "greater than 0" in (tmp_path / "r.ipynb").read_text()
    assert call("verify", "r.ipynb").returncode == 0


def test_a_misspelt_parameter_does_not_train_with_the_default(call, repository):
    done = call("run", repository / "example_notebooks" / showcase.NOTEBOOK, "-p", "epsilom", "1")
    assert done.returncode == 2
    assert "Did you mean 'epsilon'?" in done.stderr


def test_real_human_votes_make_the_same_journey(call, llmfao, tmp_path):
    done = call("demo", "--data", llmfao / "mini.jsonl.gz", "--steps", "3", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["verdict"]["level"] == "UNANCHORED"
    assert said["privacy"]["units"] == 8
    assert Path(tmp_path / said["files"]["report.pdf"]).stat().st_size > 10_000
    record = (tmp_path / said["files"]["record.ipynb"]).read_text()
    assert "llmfao-w" not in record
