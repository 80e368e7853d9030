"""``rlhf-audit gate``, and ``rlhf-audit verify`` of a record by a policy."""

from __future__ import annotations

import json
import shutil

import pytest
from gate_support import Story, make_record, write_policy

from rlhf_audit_nb import events as ev
from rlhf_audit_nb.trail import TrailReader

PRIVACY = "privacy: {epsilon: %s, delta: 1e-5, units: [annotator]}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    made = make_record(tmp_path_factory.mktemp("gating"), Story())
    write_policy(made.folder, "outcome: completed", PRIVACY % 2, name="good.yaml")
    write_policy(made.folder, "outcome: completed", PRIVACY % 1, name="strict.yaml")
    return made


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHF_AUDIT_TRAIL", raising=False)


def test_a_gate_says_yes_or_no_with_its_reasons(run, place):
    code, out, _ = run("gate", place.model, "--policy", place.folder / "good.yaml")
    assert code == 0
    assert out.startswith("PASSED  model (folder digest ")
    assert "meets the policy" in " ".join(out.split())
    assert "trail: The trail goes on from the record" in out  # the one beside it, whose log the policy trusts
    assert "not asked: " in out
    code, out, _ = run("gate", place.model, "--policy", place.folder / "strict.yaml")
    assert code == 3
    assert out.startswith("REFUSED  model")
    assert "NOT MET  privacy.epsilon: ε is 2.00; at most 1 is asked for." in out


def test_a_machine_reads_what_was_found(run, place):
    code, out, err = run("gate", place.model, "--policy", place.folder / "strict.yaml", "--json")
    told = json.loads(out)
    assert code == told["exit_code"] == 3
    assert told["decision"] == "refused"
    assert told["model"] == place.weights.digest
    unmet = [one for one in told["records"][0]["findings"] if not one["met"]]
    assert [one["id"] for one in unmet] == ["privacy.epsilon"]
    assert set(unmet[0]) == {"id", "met", "reason", "entries", "where", "tampering"}
    assert unmet[0]["entries"]
    assert "NOT MET" in err


def test_a_changed_model_ends_with_the_code_of_invalid(run, place, tmp_path):
    shutil.copytree(place.model, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{ }")
    code, out, _ = run(
        "gate", tmp_path / "model", "--policy", place.folder / "good.yaml", "--records", place.record, "--json"
    )
    assert code == 40
    findings = json.loads(out)["records"][0]["findings"]
    assert [one["where"] for one in findings if one["tampering"]] == ["config.json"]


def test_the_example_is_printed_and_can_be_used(run, place):
    code, out, _ = run("gate", "--example")
    assert code == 0
    (place.folder / "example.yaml").write_text(out)
    code, out, _ = run("gate", "--policy", place.folder / "example.yaml")
    assert code == 0
    assert "asks differential privacy" in out
    assert "does not ask signatures of people" in out
    assert run("gate", place.model, "--policy", place.folder / "example.yaml")[0] in (0, 3)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["model"], "A gate needs a policy"),
        (["model", "--policy", "nowhere.yaml"], "The policy nowhere.yaml cannot be read"),
        (["model", "--policy", "trust.policy"], "a trust policy is named in it, after trust:"),
        (["nowhere", "--policy", "good.yaml"], "nowhere is not a folder with weights"),
        (["model", "--policy", "good.yaml", "--records", "gone"], "There are no records at gone"),
        (["model", "--policy", "good.yaml", "--record"], "does not take '--record'. Did you mean '--records'"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(run, place, monkeypatch, asked, said):
    monkeypatch.chdir(place.folder)
    code, out, err = run("gate", *asked)
    assert (code, out) == (2, "")
    assert said in err
    assert "Next step: " in err


def test_a_decision_is_written_into_the_trail_where_that_is_asked(run, tmp_path):
    made = make_record(tmp_path, Story())
    policy = write_policy(tmp_path, PRIVACY % 1)
    before = TrailReader.open(made.trail).size
    assert run("gate", made.model, "--policy", policy)[0] == 3
    assert TrailReader.open(made.trail).size == before
    code, out, _ = run("gate", made.model, "--policy", policy, "--record-decision", "--json")
    assert code == 3
    (entry,) = TrailReader.open(made.trail).entries(before, before + 1)
    assert json.loads(out)["entry"] == before
    assert ev.decode_body(entry.type, entry.body).unmet == ["privacy.epsilon"]
    assert run("verify", made.trail)[0] == 0


# --- verify ----------------------------------------------------------------------------------------------------------


def test_a_record_is_verified_by_a_policy_of_either_kind(run, place):
    assert run("verify", place.record, "--policy", place.folder / "trust.policy")[0] == 0
    code, out, _ = run("verify", place.record, "--policy", place.folder / "good.yaml")
    assert code == 0
    assert out.startswith("PASSED  record.ipynb")
    code, out, _ = run("verify", place.record, "--policy", place.folder / "strict.yaml", "--json")
    told = json.loads(out)
    assert (code, told["level"], told["policy"]["decision"]) == (3, "UNANCHORED", "refused")
    code, out, _ = run("verify", place.record, "--policy", place.folder / "good.yaml", "--trail", place.trail)
    assert code == 0
    assert "The trail goes on from the record" in out
    code, out, _ = run("verify", place.record, "--policy", place.folder / "good.yaml", "--require", "COSIGNED")
    assert code == 10
    assert "Required was COSIGNED: refused." in out


@pytest.mark.parametrize("name", ["record.bundle.zip", "a folder"])
def test_a_bundle_is_held_to_a_policy_like_its_record(run, place, tmp_path, name):
    bundle = tmp_path / name
    code, out, err = run("bundle", place.record, "--policy", place.folder / "trust.policy", "-o", bundle)
    assert code == 0, err
    assert "with the log's tiles" in out
    assert run("verify", bundle, "--policy", place.folder / "good.yaml")[0] == 0
    code, out, _ = run("verify", bundle, "--policy", place.folder / "strict.yaml")
    assert code == 3
    assert "NOT MET  privacy.epsilon" in out


def test_a_record_that_does_not_hold_keeps_its_code_under_a_policy(run, place, tmp_path):
    notebook = json.loads(place.record.read_text())
    notebook["cells"][0]["outputs"] = []
    (tmp_path / "record.ipynb").write_text(json.dumps(notebook))
    code, out, _ = run("verify", tmp_path / "record.ipynb", "--policy", place.folder / "good.yaml")
    assert code == 40
    assert "cells[0].outputs" in out
    assert out.startswith("DOES NOT HOLD")


@pytest.mark.parametrize("target", ["audit", "model"])
def test_a_policy_for_records_is_refused_for_anything_else(run, place, target):
    asked = ["verify", place.folder / target, "--policy", place.folder / "good.yaml"]
    code, _, err = run(*asked)
    assert code == 2
    assert "good.yaml" in err
    assert "trust:" in err


def test_other_commands_say_which_policy_they_take(run, place):
    code, _, err = run("attest", place.record, "--enter", "--policy", place.folder / "good.yaml")
    assert code == 2
    assert "is a policy for records and gates" in err
