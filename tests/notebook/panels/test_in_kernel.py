"""The panel in a real kernel without a page: what a record and an exported notebook hold."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter

pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parents[2]
SOURCE = """
import sys
sys.path.insert(0, {tests!r})
from support.runs import advance, made_up_run, made_up_status, made_up_verdict
from rlhf_audit_nb.notebook.panels import RunPanel

state = made_up_run()
panel = RunPanel(state, made_up_status, made_up_verdict).start()
advance(state, 300)
state.status = "completed"
_ = panel.finish()
"""


def execute():
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SOURCE.format(tests=str(TESTS)).strip())])
    NotebookClient(book, kernel_name="python3", timeout=60).execute()
    return book


def test_a_record_holds_the_static_output_alone(monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_RECORD", "r1")
    book = execute()
    (output,) = book.cells[0].outputs
    assert set(output.data) == {"text/html", "image/png", "text/plain"}
    assert "widgets" not in book.metadata


def test_a_notebook_executed_without_a_page_ends_with_the_static_output_too(monkeypatch):
    monkeypatch.delenv("RLHF_AUDIT_RECORD", raising=False)
    (output,) = execute().cells[0].outputs
    assert set(output.data) == {"text/html", "image/png", "text/plain"}
    assert "ε 5.40 of 8.00" in output.data["text/plain"]


def test_the_stock_export_shows_the_page_and_asks_for_no_widget_code(monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_RECORD", "r1")
    html, _ = HTMLExporter().from_notebook_node(execute())
    assert 'class="raps"' in html
    assert "ε 5.40" in html
    assert "widget-view" not in html
