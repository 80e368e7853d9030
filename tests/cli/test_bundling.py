"""``rlhf-audit bundle`` and ``verify`` of a bundle: what a person and a program are told."""

from __future__ import annotations

import json

import pytest
from records_support import FIXTURES

PLAIN = FIXTURES / "seal-1" / "plain.ipynb"
POLICY = FIXTURES / "seal-1" / "trust.policy"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "run.ipynb"
    path.write_bytes(PLAIN.read_bytes())
    return path


def test_a_bundle_is_made_beside_the_record_and_verifies(run, record, tmp_path):
    code, out, err = run("bundle", record, "--policy", POLICY)
    assert (code, err) == (0, "")
    assert f"bundle   {tmp_path}/run.bundle.zip: " in out
    assert "without the log's tiles: no trail of it was at hand" in out
    assert "it holds no trust.policy" in out
    code, out, _ = run("verify", tmp_path / "run.bundle.zip", "--policy", POLICY, "--json")
    said = json.loads(out)
    assert (code, said["level"], said["reasons"]) == (0, "UNANCHORED", [])
    code, of_record, _ = run("verify", record, "--policy", POLICY, "--json")
    assert json.loads(of_record) == said


def test_a_bundle_in_a_folder_answers_in_json_and_a_second_one_leaves_it(run, record, tmp_path):
    code, out, _ = run("bundle", record, "--policy", POLICY, "-o", tmp_path / "out", "--json")
    said = json.loads(out)
    assert code == 0
    assert (said["bundle"], said["level"], said["tiles"]) == (str(tmp_path / "out"), "UNANCHORED", False)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert (said["files"], said["bytes"]) == (len(files), sum(path.stat().st_size for path in files))
    code, _, err = run("bundle", record, "--policy", POLICY, "-o", tmp_path / "out")
    assert code == 2
    assert "the folder is not empty" in err
    assert run("verify", tmp_path / "out", "--policy", POLICY)[0] == 0
    (tmp_path / "out" / "keys" / "log.pem").write_text("-----BEGIN PUBLIC KEY-----\n")
    code, out, _ = run("verify", tmp_path / "out", "--policy", POLICY)
    assert code == 40
    assert "keys/log.pem: This file is not what the record in the bundle gives." in out


def test_an_invalid_record_gets_no_bundle_and_the_verdicts_exit_code(run, record, tmp_path):
    record.write_bytes(record.read_bytes().replace(b'"cell_type": "code"', b'"cell_type": "raw"', 1))
    code, out, err = run("bundle", record, "--policy", POLICY, "-o", tmp_path / "out.zip")
    assert code == 40
    assert out.startswith("INVALID")
    assert "No bundle was made of it." in err
    assert not (tmp_path / "out.zip").exists()


def test_a_policy_for_records_is_held_to_the_record_in_a_bundle(run, record, tmp_path):
    run("bundle", record, "--policy", POLICY, "-o", tmp_path / "out.zip")
    for level, code in (("UNANCHORED", 0), ("COSIGNED", 3)):
        (tmp_path / "gate.yaml").write_text(f"version: 1\ntrust: {POLICY}\nlevel: {level}\n")
        assert run("verify", tmp_path / "out.zip", "--policy", tmp_path / "gate.yaml")[0] == code


def test_bad_input_is_one_sentence_and_leaves_nothing(run, record, tmp_path):
    for words, said in [
        (("bundle", tmp_path / "none.ipynb", "--policy", POLICY), "cannot be read"),
        (("bundle", record), "No key for"),
        (("bundle", record, "--policy", POLICY, "--trail", tmp_path / "none"), "There is no trail at"),
        (("bundle", record, "--policy", POLICY, "-o", record), "there is a file of that name"),
        (("verify", record, "--policy", POLICY, "--openings"), "--openings"),
    ]:
        code, _, err = run(*words)
        assert code == 2, words
        assert said in err
        assert "Next step: " in err
    assert {path.name for path in tmp_path.iterdir()} == {"run.ipynb", "home"}
    assert record.read_bytes() == PLAIN.read_bytes()
