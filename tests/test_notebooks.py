"""The example notebooks are kept as they should be: no outputs, stable ids, parameters, nothing private shown."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "example_notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.name)
def notebook(request):
    return nbformat.read(request.param, nbformat.NO_CONVERT)


def test_there_are_notebooks():
    assert [p.name for p in NOTEBOOKS][:1] == ["01_dpo_private.ipynb"]


def test_a_notebook_is_valid_4_5_with_readable_ids(notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert all(id_.replace("-", "").isalpha() for id_ in ids)


def test_a_notebook_is_kept_without_outputs(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert "widgets" not in notebook.metadata


def test_a_notebook_has_one_parameters_cell_before_any_other_code(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [("parameters" in cell.metadata.get("tags", [])) for cell in code] == [True] + [False] * (len(code) - 1)


def test_the_training_cell_knows_nothing_of_auditing(notebook):
    [cell] = [c for c in notebook.cells if c.source.startswith("%%audit_train")]
    body = cell.source.split("\n", 1)[1]
    compile(body, "cell", "exec")
    assert "audit" not in body
    assert "priva" not in body
