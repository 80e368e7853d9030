from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbconvert.exporters import get_export_names, get_exporter
from records_support import TRAINING, policy_of, write_notebook

from rlhf_audit_nb.compliance import Evidence
from rlhf_audit_nb.records import open_record, run_notebook
from rlhf_audit_nb.reports import build_compliance_report
from rlhf_audit_nb.reports.exporters import AuditHTMLExporter, AuditPDFExporter


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A record of a small notebook, and the home whose keys sealed it."""
    folder = tmp_path_factory.mktemp("exporters")
    source = write_notebook(
        folder / "small.ipynb",
        [("epsilon = 8.0", {"tags": ["parameters"]}), TRAINING, "training('f' * 32).close()", "print('<b>done</b>')"],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_AUDIT_HOME", str(folder / "home"))
        run_notebook(source, folder / "record.ipynb", {"epsilon": 2.0}, trail=folder / "audit")
    return folder / "record.ipynb"


@pytest.fixture
def home(record, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(record.parent / "home"))


def test_both_exporters_are_found_by_name_and_listing_them_raises_nothing():
    names = get_export_names()
    assert {"audit-html", "audit-pdf"} <= set(names)
    assert get_exporter("audit-html") is AuditHTMLExporter
    assert get_exporter("audit-pdf") is AuditPDFExporter


def test_the_exporters_module_brings_in_nothing_heavy():
    heavy = ["torch", "transformers", "altair", "typst", "vl_convert", "papermill"]
    code = (
        "import sys, json; from rlhf_audit_nb.reports.exporters import AuditHTMLExporter, AuditPDFExporter; "
        f"AuditHTMLExporter(); AuditPDFExporter(); print(json.dumps([n for n in {heavy} if n in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_an_exporter_gives_the_same_bytes_as_the_report(record, home):
    report = build_compliance_report(Evidence.from_record(open_record(record)))
    assert report.level == "UNANCHORED"
    page, resources = AuditHTMLExporter().from_filename(str(record))
    assert page == report.html
    assert resources["output_extension"] == ".html"
    pdf, resources = AuditPDFExporter().from_filename(str(record))
    assert pdf == report.pdf
    assert resources["output_extension"] == ".pdf"


def test_a_notebook_that_was_read_before_gives_the_same_page(record, home):
    exporter = AuditHTMLExporter()
    page, _ = exporter.from_filename(str(record))
    node = nbformat.read(record, as_version=4)
    assert exporter.from_notebook_node(node)[0] == page
    with record.open(encoding="utf-8") as stream:
        assert exporter.from_file(stream)[0] == page


def test_a_report_on_a_record_shows_its_cells_and_their_entries(record, home):
    report = build_compliance_report(Evidence.from_record(open_record(record)))
    code = [cell for cell in report.model.cells if cell.kind == "code"]
    assert all(cell.cites and cell.status not in {"", "execution not recorded"} for cell in code)
    assert "trained without differential privacy: no bound" in report.html
    assert "&lt;b&gt;done&lt;/b&gt;" in report.html


def test_a_record_with_one_changed_cell_gives_a_report_of_which_nothing_is_evidence(record, home, tmp_path):
    changed = json.loads(record.read_text(encoding="utf-8"))
    changed["cells"][-1]["source"] = "print('undone')"
    path = tmp_path / "changed.ipynb"
    path.write_text(json.dumps(changed), encoding="utf-8")
    page, _ = AuditHTMLExporter().from_filename(str(path))
    assert "Nothing in this report is evidence." in page
    assert "✓</span>evidenced" not in page


def test_a_notebook_that_is_no_record_gives_a_report_that_says_so(home, tmp_path):
    plain = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
    page, _ = AuditHTMLExporter().from_notebook_node(plain)
    assert "INVALID" in page
    assert "Nothing in this report is evidence." in page


def test_an_exporter_takes_its_trust_from_a_policy_file(record, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "another"))
    path = tmp_path / "trust.policy"
    path.write_text(policy_of(record.parent / "audit").format(), encoding="utf-8")
    page, _ = AuditHTMLExporter(policy=str(path)).from_filename(str(record))
    assert "UNANCHORED" in page


def test_the_command_jupyter_nbconvert_writes_the_report(record, home, tmp_path):
    jupyter = Path(sys.executable).parent / "jupyter"
    subprocess.run(
        [str(jupyter), "nbconvert", "--to", "audit-pdf", str(record), "--output-dir", str(tmp_path), "--output", "r"],
        check=True, capture_output=True,
    )  # fmt: skip
    expected = build_compliance_report(Evidence.from_record(open_record(record))).pdf
    assert (tmp_path / "r.pdf").read_bytes() == expected
