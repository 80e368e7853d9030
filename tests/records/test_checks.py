"""Single checks of the verifier, on values."""

from __future__ import annotations

import base64
import json
import time
from types import SimpleNamespace

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from papermill.translators import PythonTranslator
from records_support import policy_of, sealed_record

from rlhf_audit_nb.compliance.words import day_text, time_text
from rlhf_audit_nb.events import DataBound, DataPrivate, RecordStarted, RunStarted, encode_body, encode_private
from rlhf_audit_nb.records import read_record
from rlhf_audit_nb.records.checks import check_parameters
from rlhf_audit_nb.records.session import Outcome, RecordSession
from rlhf_audit_nb.trail import Level, Trail
from rlhf_audit_nb.trail.merkle import leaf_hash

TOO_DEEP = ("a = " + "-" * 5_000 + "1", "a = " + "not " * 50_000 + "1", "a = a" + ".a" * 100_000)
NO_PARAMETER = ("b'x'", "{1, 2}", "1e999", "1+2j", "...", "{1: 2}", "'\\ud800'")

NAMES = st.from_regex("[a-z]{1,5}", fullmatch=True).filter(
    lambda name: name not in {"if", "in", "is", "as", "or", "and"}
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=8)
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3))


def injected(parameters: dict, shown: dict | None = None) -> dict:
    """A notebook with parameters injected as papermill does it; ``shown`` are those in its metadata."""
    source = PythonTranslator.codify(parameters)
    cell = {"cell_type": "code", "id": "i", "metadata": {"tags": ["injected-parameters"]}, "source": source}
    return {"metadata": {"papermill": {"parameters": parameters if shown is None else shown}}, "cells": [cell]}


def started(parameters: dict) -> RecordStarted:
    kernel = {"name": "python3", "language": "python", "display_name": "Python"}
    return RecordStarted(record="r", notebook_digest="", parameters=parameters, tool="t/1", kernel=kernel)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAMES, VALUES, min_size=1, max_size=4))
def test_parameters_as_papermill_writes_them_are_read_back(parameters):
    assert check_parameters(injected(parameters), started(parameters)) == []


def test_the_changed_parameter_is_named_with_both_values():
    reasons = check_parameters(injected({"a": 1, "b": "y"}), started({"a": 1, "b": "x"}))
    assert [reason.where for reason in reasons] == ["metadata.papermill.parameters.b", "cells[0].source"]
    assert all("'b' was 'x'" in reason.message and "'y'" in reason.message for reason in reasons)


def test_a_parameter_in_the_metadata_alone_is_named():
    reasons = check_parameters(injected({"a": 1}, {"a": 1, "c": 3}), started({"a": 1}))
    assert [(reason.where, reason.code) for reason in reasons] == [
        ("metadata.papermill.parameters.c", "parameter-changed")
    ]


@pytest.mark.parametrize("source", [*TOO_DEEP, *(f"a = {value}" for value in NO_PARAMETER)], ids=range(10))
def test_whatever_is_written_into_the_injected_cell_is_named_and_stops_nobody(source):
    changed = injected({"a": 1})
    changed["cells"][0]["source"] = source
    (reason,) = check_parameters(changed, started({"a": 1}))
    assert (reason.code, reason.where) == ("parameter-changed", "cells[0].source")
    assert reason.message.endswith(".")


def test_a_record_of_the_year_10000_is_invalid_and_no_error(tmp_path, monkeypatch):
    late = 253_402_300_800_000_000
    clock = SimpleNamespace(**{**vars(time), "time_ns": lambda: late * 1000})
    monkeypatch.setattr("rlhf_audit_nb.trail.trail.time", clock)
    monkeypatch.setattr("rlhf_audit_nb.trail.writer.time", clock)
    with monkeypatch.context() as forging:
        forging.setattr("rlhf_audit_nb.records.statement._when", str)
        made = sealed_record(tmp_path / "audit")
    verdict = read_record(json.dumps(made).encode(), policy=policy_of(tmp_path / "audit")).verdict
    assert verdict.level is Level.INVALID
    assert [(reason.code, reason.message) for reason in verdict.reasons] == [
        ("time", f"An entry's time is after the year 9999 ({late}).")
    ]
    assert time_text(late) == day_text(late) == "after the year 9999"
    assert time_text(late - 1) == "9999-12-31 23:59:59 UTC"


def test_an_injected_cell_that_is_gone_or_computes_is_named():
    gone = injected({"a": 1})
    gone["cells"] = []
    assert [reason.where for reason in check_parameters(gone, started({"a": 1}))] == ["cells"]
    computes = injected({"a": 1})
    computes["cells"][0]["source"] = "a = int('1')"
    assert [reason.where for reason in check_parameters(computes, started({"a": 1}))] == ["cells[0].source"]


def test_data_under_differential_privacy_stand_in_the_statement_as_a_commitment(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("text", id="a")])
    session = RecordSession.begin(nb, {"name": "k", "language": "r", "display_name": "K"}, tmp_path / "audit")
    with Trail.open(tmp_path / "audit") as trail:
        run = RunStarted(experiment="e", entry_point="cell", tool="t/1", record=session.record)
        trail.append(run.TYPE, encode_body(run), run="a" * 32)
        data = DataBound(role="train", columns=["prompt"], units=5, unit="annotator")
        private = encode_private(DataPrivate(rows=20, digest="5" * 64))
        trail.append(data.TYPE, encode_body(data), run="a" * 32, private=private)
    session.seal(nb, Outcome("completed"))
    session.close()
    text = nbformat.writes(nb)
    opened = read_record(text.encode(), policy=policy_of(tmp_path / "audit"), home=tmp_path / "other")
    assert opened.verdict.level is Level.UNANCHORED
    assert [run.status for run in opened.verdict.runs] == ["interrupted"], "its writer left without ending it"
    (bound,) = [entry for entry in opened.entries if entry.type == "data.bound"]
    dependency = opened.statement["predicate"]["buildDefinition"]["resolvedDependencies"][1]
    assert dependency["digest"] == {"sha256": leaf_hash(bound.data).hex()}
    assert dependency["annotations"]["committed"] is True
    everything = text + "".join(
        base64.b64decode(e["data"]).decode() for e in json.loads(text)["metadata"]["rlhf_audit"]["entries"]
    )
    assert "5" * 64 not in everything
