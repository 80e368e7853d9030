"""``rlhf-audit verify`` of a folder of weights."""

from __future__ import annotations

import json

import pytest

from rlhf_audit_nb import events as ev
from rlhf_audit_nb.capture.folders import sign_folder
from rlhf_audit_nb.events import encode_body
from rlhf_audit_nb.trail import Trail


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"w" * 100)
    with Trail.open(tmp_path / "audit") as trail:
        signed = sign_folder(folder, trail.keys.model)
        for event in (
            ev.RunStarted(experiment="first", entry_point="cell", tool="t"),
            ev.WeightsSaved(
                step=3, name="model", digest=signed.digest, files=1, bytes=100, signature_digest=signed.signature_digest
            ),
            ev.RunFinished(status="completed", steps=3, trained=True),
        ):
            trail.append(event.TYPE, encode_body(event), run="a" * 32).wait()
    return tmp_path


def test_a_saved_folder_is_told_which_entry_it_is(run, place):
    code, out, _ = run("verify", place / "model", "--trail", place / "audit")
    assert code == 0
    assert out.startswith("UNANCHORED  model is, file by file, model of 'first'")
    assert "after step 3: entry 2" in out
    assert "does not show" in out


def test_the_trail_beside_it_is_found_without_being_named(run, place, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.delenv("RLHF_AUDIT_TRAIL", raising=False)
    assert run("verify", place / "model")[0] == 0
    (place / "audit" / "trail.sqlite").rename(place / "audit" / "gone.sqlite")
    code, _, err = run("verify", place / "model")
    assert code == 2
    assert "--trail" in err


def test_a_change_is_named_and_ends_with_the_code_of_invalid(run, place):
    (place / "model" / "extra.bin").write_bytes(b"x")
    said = run("verify", place / "model", "--trail", place / "audit")[1]
    assert "\n  extra.bin was added. [file-added]\n" in said
    assert said.endswith("It does not show who changed what, nor when.\n")
    (place / "model" / "model.safetensors").rename(place / "model" / "other.safetensors")
    code, out, _ = run("verify", place / "model", "--trail", place / "audit", "--json")
    said = json.loads(out)
    assert code == 40
    assert (said["level"], said["intact"]) == ("INVALID", False)
    assert [(one["kind"], one["name"], one["was"]) for one in said["changes"]] == [
        ("added", "extra.bin", None),
        ("renamed", "other.safetensors", "model.safetensors"),
    ]
    code, out, _ = run("verify", place / "model", "--trail", place / "audit")
    assert "model.safetensors was renamed to other.safetensors. [file-renamed]" in out


def test_a_level_can_be_required(run, place):
    code, out, _ = run("verify", place / "model", "--trail", place / "audit", "--require", "COSIGNED")
    assert code == 10
    assert "refused" in out


def test_options_that_say_nothing_here_are_refused(run, place):
    code, _, err = run("verify", place / "model", "--trail", place / "audit", "--openings")
    assert code == 2
    assert "says nothing about a folder of weights" in err
    code, _, err = run("verify", place / "audit", "--trail", place / "audit")
    assert code == 2
    assert "--trail goes with a folder of weights" in err
