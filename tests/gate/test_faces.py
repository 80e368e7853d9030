"""The gate from Python and from a notebook."""

from __future__ import annotations

import pytest
from gate_support import Story, make_record, write_policy
from IPython.core.interactiveshell import InteractiveShell

from rlhf_audit_nb import AuditableRLHF, AuditConfig
from rlhf_audit_nb.errors import ConfigError, GateError
from rlhf_audit_nb.trail import TrailReader

PRIVACY = "privacy: {epsilon: %s, delta: 1e-5, units: [annotator]}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    made = make_record(tmp_path_factory.mktemp("faces"), Story())
    write_policy(made.folder, PRIVACY % 2, name="good.yaml")
    write_policy(made.folder, PRIVACY % 1, name="strict.yaml")
    return made


@pytest.fixture(scope="module")
def shell():
    shell = InteractiveShell.instance(colors="nocolor")
    shell.run_cell("%load_ext rlhf_audit_nb")
    yield shell
    shell.run_cell("%unload_ext rlhf_audit_nb")
    InteractiveShell.clear_instance()


def test_an_auditor_says_whether_a_model_may_be_used(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(place.trail)))
    size = TrailReader.open(place.trail).size
    assert auditor.gate(place.model, place.folder / "good.yaml").passed
    decision = auditor.gate(place.model, place.folder / "strict.yaml", record_decision=True)
    assert [one.id for one in decision.unmet] == ["privacy.epsilon"]
    assert [entry.type for entry in TrailReader.open(place.trail).entries(size, size + 1)] == ["gate.decided"]
    with pytest.raises(ConfigError, match="cannot be read"):
        auditor.gate(place.model, "nowhere.yaml")


def test_asking_makes_no_trail(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHF_AUDIT_TRAIL", raising=False)
    assert AuditableRLHF().gate(place.model, place.folder / "good.yaml", records=[place.record]).passed
    assert list(tmp_path.iterdir()) == []


def test_a_cell_goes_on_only_where_the_model_may_be_used(place, shell, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = shell.run_cell(f"%audit gate {place.model} --policy {place.folder / 'good.yaml'}")
    assert good.success
    assert good.result.passed
    refused = shell.run_cell(
        f"%audit gate {place.model} --policy {place.folder / 'strict.yaml'} --records {place.folder}"
    )
    assert isinstance(refused.error_in_exec, GateError)
    assert "may not be used: ε is 2.00; at most 1 is asked for" in str(refused.error_in_exec)
    assert "NOT MET  privacy.epsilon" in capsys.readouterr().out
    wrong = shell.run_cell("%audit gate")
    assert "gate takes a model's folder and --policy" in str(wrong.error_in_exec)
