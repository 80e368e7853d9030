"""What can be wrong before the first cell runs is said then, in one sentence, and nothing is touched."""

from __future__ import annotations

import json
import math

import nbformat
import pytest
from records_support import write_notebook

from rlhf_audit_nb.errors import RecordError
from rlhf_audit_nb.records import open_record, read_parameters, run_notebook
from rlhf_audit_nb.records.run import check_parameters, notebook_parameters

PARAMETERS = """
epsilon = 8.0  # the budget
steps = 10
unit = "annotator"
fast = False
columns = ["prompt"]
seed: int = 3
model: str | None = None
limit: "Optional[int]" = None
size = 2 * 8
""".strip()


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    marker = f"open({str(tmp_path / 'ran')!r}, 'w').close()"
    return write_notebook(tmp_path / "in.ipynb", [(PARAMETERS, {"tags": ["parameters"]}), marker])


GOOD = [
    {"epsilon": 1},
    {"epsilon": 1.5, "steps": 2, "unit": "pair", "fast": True, "columns": [], "seed": 0},
    {"model": None, "limit": None},
    {"model": "m", "limit": 4},
    {"size": "anything, since the notebook computes it"},
    {},
]

BAD = [
    ({"epsilom": 1.0}, "no parameter 'epsilom'", "Did you mean 'epsilon'?"),
    ({"zzz": 1.0}, "no parameter 'zzz'", "It has: columns, epsilon"),
    ({"epsilon": "one"}, "'epsilon' is 'one'; the notebook takes float", "default is 8.0"),
    ({"epsilon": True}, "takes float", ""),
    ({"steps": 2.5}, "'steps' is 2.5; the notebook takes int", ""),
    ({"unit": 3}, "takes str", ""),
    ({"fast": 1}, "takes bool", ""),
    ({"columns": "prompt"}, "takes list", ""),
    ({"seed": "1"}, "takes int", ""),
    ({"model": 3}, "takes str", ""),
    ({"epsilon": math.inf}, "a record cannot hold", ""),
    ({"epsilon": math.nan}, "a record cannot hold", ""),
    ({"size": {1, 2}}, "a record cannot hold", ""),
]


@pytest.mark.parametrize("parameters", GOOD)
def test_values_of_the_notebooks_types_are_taken(source, parameters):
    check_parameters(source, parameters)


@pytest.mark.parametrize(("parameters", "words", "step"), BAD)
def test_a_wrong_parameter_is_named_before_anything_runs(source, tmp_path, parameters, words, step):
    with pytest.raises(RecordError) as caught:
        run_notebook(source, tmp_path / "out.ipynb", parameters)
    assert words in caught.value.message
    assert step in caught.value.next_step
    assert [path.name for path in tmp_path.iterdir()] == ["in.ipynb"]


def test_the_parameters_cell_is_read_with_types_defaults_and_comments(source):
    found = notebook_parameters(source)
    assert list(found) == ["epsilon", "steps", "unit", "fast", "columns", "seed", "model", "limit", "size"]
    assert (found["epsilon"].default, found["epsilon"].help) == (8.0, "the budget")
    assert (found["model"].annotation, found["model"].default) == ("str | None", None)
    assert (found["size"].default, found["size"].literal) == ("2 * 8", False)


def test_parameters_for_a_notebook_that_takes_none_are_refused(tmp_path):
    plain = write_notebook(tmp_path / "plain.ipynb", ["1"])
    assert notebook_parameters(plain) is None
    with pytest.raises(RecordError, match="no cell tagged 'parameters'"):
        run_notebook(plain, tmp_path / "out.ipynb", {"epsilon": 1.0})
    with pytest.raises(RecordError, match="no cell tagged 'parameters'"):
        read_parameters(plain, {"epsilon": "1.0"})


def test_values_typed_on_a_command_line_become_what_the_notebook_takes(source):
    typed = {"epsilon": "1", "steps": "2", "unit": "3", "fast": "true", "columns": "['a', 'b']", "model": "none"}
    values = read_parameters(source, typed)
    expected = {"epsilon": 1.0, "steps": 2, "unit": "3", "fast": True, "columns": ["a", "b"], "model": None}
    assert values == expected
    assert type(values["epsilon"]) is float
    assert read_parameters(source, {"size": "1e3", "limit": "7"}) == {"size": 1000.0, "limit": 7}
    with pytest.raises(RecordError, match="takes int"):
        read_parameters(source, {"steps": "many"})
    with pytest.raises(RecordError, match="Did you mean 'steps'"):
        read_parameters(source, {"step": "1"})


OUTPUTS = {
    "missing/out.ipynb": "cannot be written",
    "out.txt": "would not end in .ipynb",
    "in.ipynb": "would overwrite the notebook",
    "./nested/../in.ipynb": "would overwrite the notebook",
    "folder.ipynb": "cannot be written",
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_that_cannot_be_is_named_before_anything_runs(source, tmp_path, output):
    (tmp_path / "nested").mkdir()
    (tmp_path / "folder.ipynb").mkdir()
    before = source.read_bytes()
    with pytest.raises(RecordError, match=OUTPUTS[output]) as caught:
        run_notebook(source, tmp_path / output)
    assert caught.value.next_step
    assert source.read_bytes() == before
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "audit").exists()


def test_a_folder_in_which_nobody_may_write_is_named(source):
    with pytest.raises(RecordError, match="cannot be written"):
        run_notebook(source, "/proc/out.ipynb")


NOTEBOOKS = {
    "missing": (None, "cannot be read"),
    "empty": (b"", "is not a notebook"),
    "truncated": (b'{"cells": [{"cell_type": "code"', "ends too early"),
    "another JSON": (b'{"a": 1}', "is not a notebook"),
    "a list": (b"[1]", "is not a notebook"),
    "binary": (b"\x00\xff", "not UTF-8"),
    "a cell of no kind": (
        b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type": "x"}]}',
        "is not a notebook",
    ),
}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_no_notebook_is_named(tmp_path, name):
    data, words = NOTEBOOKS[name]
    if data is not None:
        (tmp_path / "in.ipynb").write_bytes(data)
    with pytest.raises(RecordError, match=words) as refused:
        run_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb")
    assert refused.value.next_step
    assert not (tmp_path / "out.ipynb").exists()


@pytest.mark.slow
def test_a_path_with_braces_is_a_path(source, tmp_path):
    folder = tmp_path / "{epsilon} run"
    folder.mkdir()
    result = run_notebook(source, folder / "{x}.ipynb", {"epsilon": 1.0}, trail=tmp_path / "audit")
    assert result.path == folder / "{x}.ipynb"
    assert open_record(result.path).verdict.exit_code() == 0
    assert (tmp_path / "ran").exists()


@pytest.mark.slow
def test_an_old_notebook_without_cell_ids_becomes_a_record(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    node = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
    node["metadata"]["kernelspec"] = {"name": "python3", "display_name": "P"}
    node["nbformat_minor"] = 2
    del node["cells"][0]["id"]
    (tmp_path / "in.ipynb").write_text(json.dumps(node))
    result = run_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", trail=tmp_path / "audit")
    assert open_record(result.path).verdict.reasons == ()
