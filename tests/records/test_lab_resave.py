"""A person opens a record in JupyterLab, and it is saved: unchanged is unchanged, edited is INVALID."""

from __future__ import annotations

import shutil

import pytest
from records_support import policy_of
from support.lab import browser, lab

from rlhf_audit_nb.records import open_record
from rlhf_audit_nb.trail import Level

__all__ = ["browser", "lab"]

pytestmark = [pytest.mark.slow, pytest.mark.browser]

EDIT = """() => {
  const cell = jupyterapp.shell.currentWidget.content.widgets[0];
  cell.model.sharedModel.setSource(cell.model.sharedModel.getSource() + "!");
}"""
# A save is asked for only where something is to be saved.
TOUCH = "() => { jupyterapp.shell.currentWidget.content.model.dirty = true; }"


def test_jupyterlab_saves_a_record_without_changing_it(made, lab, browser):
    path = lab.root / "record.ipynb"
    shutil.copy(made.path, path)
    notebook = lab.open(browser, "record.ipynb")
    notebook.page.evaluate(TOUCH)
    notebook.save()
    assert path.read_bytes() != made.data, "JupyterLab did not write the file"
    opened = open_record(path, policy=policy_of(made.result.trail), home=lab.root.parent / "verifier")
    assert (opened.verdict.level, opened.verdict.reasons) == (Level.UNANCHORED, ())

    notebook.page.evaluate(EDIT)
    notebook.save()
    verdict = open_record(path, policy=policy_of(made.result.trail), home=lab.root.parent / "verifier").verdict
    assert [reason.where for reason in verdict.reasons] == ["cells[0].source"]
    notebook.page.close()
