from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess

import pikepdf
import pytest
import report_story as story

from rlhf_audit_nb.reports import build_compliance_report

HOSTILE = '#panic("x") $x$ *b* _i_ `c` <e1> \\ // [a](b) 数据 🎉 \u202e'


@pytest.fixture(scope="module")
def record_pdf() -> bytes:
    return build_compliance_report(story.evidence(with_notebook=True)).pdf


def text_of(pdf: bytes, tmp_path) -> str:
    if shutil.which("pdftotext") is None:
        pytest.skip("pdftotext (poppler-utils) is not installed")
    path = tmp_path / "report.pdf"
    path.write_bytes(pdf)
    return subprocess.run(["pdftotext", str(path), "-"], capture_output=True, check=True, text=True).stdout


def test_the_file_declares_pdf_a_3a_and_pdf_ua_1_and_is_tagged(record_pdf):
    with pikepdf.open(io.BytesIO(record_pdf)) as pdf:
        metadata = pdf.open_metadata()
        assert metadata["pdfaid:part"] == "3"
        assert metadata["pdfaid:conformance"] == "A"
        assert metadata["pdfuaid:part"] == "1"
        assert bool(pdf.Root.MarkInfo.Marked)
        assert "/StructTreeRoot" in pdf.Root
        assert str(pdf.Root.Lang).startswith("en")
        assert pdf.Root.ViewerPreferences.DisplayDocTitle
        assert pdf.Root.OutputIntents


def test_every_figure_of_the_tagged_tree_has_an_alternative_text(record_pdf):
    with pikepdf.open(io.BytesIO(record_pdf)) as pdf:
        figures = [item for item in pdf.objects if isinstance(item, pikepdf.Dictionary) and item.get("/S") == "/Figure"]
        assert len(figures) >= 4
        assert all(str(item.get("/Alt", "")) for item in figures)


def test_the_file_has_bookmarks_for_its_parts(record_pdf):
    with pikepdf.open(io.BytesIO(record_pdf)) as pdf, pdf.open_outline() as outline:
        titles = [item.title for item in outline.root]
    assert titles[:4] == ["Summary", "Contents", "Privacy, in words", "Requirements"]
    assert titles[-1] == "Evidence"


def test_the_evidence_is_attached_byte_for_byte():
    evidence = story.evidence()
    with pikepdf.open(io.BytesIO(build_compliance_report(evidence).pdf)) as pdf:
        attached = pdf.attachments["evidence.json"]
        bundle = json.loads(attached.get_file().read_bytes())
        assert pdf.Root.AF[0].AFRelationship == "/Data"
    assert bundle["checkpoint"] == evidence.checkpoint
    assert [base64.b64decode(entry["data"]) for entry in bundle["entries"]] == [e.data for e in evidence.entries]
    first = bundle["entries"][0]
    assert first["leaf_hash"] == hashlib.sha256(b"\0" + base64.b64decode(first["data"])).hexdigest()


def test_the_same_evidence_gives_the_same_bytes(record_pdf):
    assert build_compliance_report(story.evidence(with_notebook=True)).pdf == record_pdf


def test_another_checker_finds_no_fault_in_the_file(record_pdf, tmp_path):
    if shutil.which("qpdf") is None:
        pytest.skip("qpdf is not installed")
    (tmp_path / "report.pdf").write_bytes(record_pdf)
    done = subprocess.run(["qpdf", "--check", str(tmp_path / "report.pdf")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_text_reads_in_order_and_each_page_names_trail_size_and_root(record_pdf, tmp_path):
    said = text_of(record_pdf, tmp_path)
    places = [said.index(part) for part in ("UNANCHORED", "Summary", "Privacy, in words", "Who could still learn")]
    assert places == sorted(places)
    pages = said.split("\f")[:-1]
    footers = [re.search(r"trail example\.com/rlhf-audit · size 57 · root \S+", part) for part in pages]
    assert all(footers)
    assert f"1 / {len(pages)}" in pages[0]
    assert f"{len(pages)} / {len(pages)}" in pages[-1]


def test_the_html_and_the_pdf_say_the_same_of_every_requirement(record_pdf, tmp_path):
    said = " ".join(text_of(record_pdf, tmp_path).split())
    assert said.count("✓ evidenced") == 8
    assert "CELEX 02024R1689-20260727" in said
    assert not re.search(r"\bcompliant\b", said)


def test_names_are_text_and_never_typst_code(tmp_path):
    evidence = story.evidence(with_notebook=True, experiment=HOSTILE)
    evidence.notebook.cells[1].source = HOSTILE
    said = text_of(build_compliance_report(evidence).pdf, tmp_path)
    assert '#panic("x") $x$ *b* _i_' in " ".join(said.split())
    assert "[U+202E]" in said
    assert "[U+1F389]" in said


def test_a_picture_that_no_pdf_can_carry_is_said_and_not_silently_dropped(tmp_path):
    evidence = story.evidence(with_notebook=True)
    evidence.notebook.cells[3].outputs[1]["data"]["image/png"] = base64.b64encode(b"not a picture").decode()
    said = text_of(build_compliance_report(evidence).pdf, tmp_path)
    assert "a picture that this file cannot carry" in " ".join(said.split())


def test_a_run_without_privacy_says_so_in_the_pdf(tmp_path):
    said = " ".join(text_of(build_compliance_report(story.evidence(private=False)).pdf, tmp_path).split())
    assert said.count("trained without differential privacy: no bound") >= 4
    assert "ε" not in said


def test_a_trail_that_does_not_verify_says_so_on_the_first_page(tmp_path):
    evidence = story.evidence(level="INVALID", reasons=[story.reason()])
    first = text_of(build_compliance_report(evidence).pdf, tmp_path).split("\f")[0]
    assert "Nothing in this report is evidence." in first
    assert "0 of 197" in first


def test_the_machines_own_fonts_are_never_used(record_pdf):
    with pikepdf.open(io.BytesIO(record_pdf)) as pdf:
        fonts = {str(item.BaseFont) for item in pdf.objects
                 if isinstance(item, pikepdf.Dictionary) and item.get("/Type") == "/Font"}  # fmt: skip
    names = {name.split("+")[-1] for name in fonts}
    assert all(name.startswith(("Inter", "DejaVuSansMono")) for name in names), names
