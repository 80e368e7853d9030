"""``%audit run`` executes another notebook into a record, and never the one that it stands in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from records_support import write_notebook

from rlhf_audit_nb import AuditableRLHF, AuditConfig
from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.notebook.running import refuse_itself
from rlhf_audit_nb.records import open_record, run_notebook


def test_a_notebook_is_not_run_by_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    refuse_itself("own.ipynb", {})
    for said in (str(tmp_path / "own.ipynb"), f"{tmp_path.name}/own.ipynb"):
        monkeypatch.setenv("JPY_SESSION_NAME", said)
        with pytest.raises(ConfigError, match=r"own\.ipynb is the notebook that this cell is in"):
            refuse_itself("own.ipynb", {})
        refuse_itself("other.ipynb", {})
    monkeypatch.delenv("JPY_SESSION_NAME")
    with pytest.raises(ConfigError, match="is the notebook that this cell is in"):
        refuse_itself("./own.ipynb", {"__vsc_ipynb_file__": str(tmp_path / "own.ipynb")})


@pytest.mark.slow
def test_a_cell_runs_another_notebook_and_ends_with_the_verdict(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_notebook(tmp_path / "inner.ipynb", [("rate = 0.5", {"tags": ["parameters"]}), "print(rate)"])
    write_notebook(tmp_path / "fails.ipynb", ["raise ValueError('told in words')"])
    raises = {"tags": ["raises-exception"]}
    cells = [
        "%load_ext rlhf_audit_nb",
        "%audit run inner.ipynb -p rate 2 -o inner.record.ipynb",
        ("%audit run inner.ipynb -p rat 2", raises),
        ("%audit run fails.ipynb", raises),
        ("%audit run outer.ipynb", raises),
        ("%audit run", raises),
        ("%audit status inner.ipynb", raises),
    ]
    write_notebook(tmp_path / "outer.ipynb", cells)
    run_notebook("outer.ipynb", "outer.record.ipynb")
    outer = open_record("outer.record.ipynb")
    assert outer.verdict.reasons == ()
    _, told, unknown, failed, itself, nothing, misplaced = (cell.outputs for cell in outer.notebook.cells)
    assert "cell 2 of 3: ok" not in json.dumps(told), "the line is replaced"
    shown = json.dumps(told)
    assert "cell 3 of 3: ok" in shown
    assert "Record inner.record.ipynb" in shown
    assert "UNANCHORED" in told[-1].data["text/plain"]
    errors = [outputs[-1].evalue for outputs in (unknown, failed, itself, nothing, misplaced)]
    expected = (
        "Did you mean 'rate'",
        "raised ValueError",
        "would run itself",
        "run takes a notebook",
        "takes no 'inner",
    )
    for said, words in zip(errors, expected, strict=True):
        assert words in said
    assert "told in words" in json.dumps(failed)
    inner = open_record("inner.record.ipynb")
    assert (inner.verdict.reasons, inner.started.parameters) == ((), {"rate": 2.0})
    assert open_record("fails.record.ipynb").sealed.status == "failed"
    assert inner.verdict.origin == outer.verdict.origin


@pytest.mark.slow
def test_an_auditor_runs_a_notebook_on_its_own_trail(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_notebook(tmp_path / "n.ipynb", [("a = 1", {"tags": ["parameters"]})])
    config = AuditConfig(trail=str(tmp_path / "own"), origin="example.com/own", keep_records=False)
    auditor = AuditableRLHF(audit_config=config)
    result = auditor.run_notebook("n.ipynb", parameters={"a": 3})
    assert result.path == Path("n.record.ipynb")
    opened = open_record(result.path)
    assert (opened.verdict.origin, opened.started.parameters) == ("example.com/own", {"a": 3})
    assert not (tmp_path / "own" / "records").exists()
    assert auditor.verify().reasons == ()
    auditor.trail.close()
    with pytest.raises(ConfigError, match="it is not known where the record should go"):
        auditor.run_notebook("s3://bucket/n.ipynb")
