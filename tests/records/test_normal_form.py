"""What the digest of a notebook covers, what it does not, and that editors do not disturb it."""

from __future__ import annotations

import copy
import json
import math

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_audit_nb.records.normal_form import (
    NormalFormError,
    canonical_json,
    compare_manifests,
    freeze,
    frozen_outputs_digest,
    manifest_digest,
    manifest_of,
    outputs_digest,
    parse_json,
    source_digest,
    without_markers,
)

# RFC 8785, appendix B, the finite values that are no integers.
RFC8785_NUMBERS = [
    (0x0000000000000001, "5e-324"),
    (0x8000000000000001, "-5e-324"),
    (0x0010000000000000, "2.2250738585072014e-308"),
    (0x3EB0C6F7A0B5ED8D, "0.000001"),
    (0x3EB0C6F7A0B5ED8C, "9.999999999999997e-7"),
    (0x41B3DE4355555553, "333333333.3333332"),
    (0x41B3DE4355555554, "333333333.33333325"),
    (0x41B3DE4355555555, "333333333.3333333"),
    (0x41B3DE4355555556, "333333333.3333334"),
    (0x41B3DE4355555557, "333333333.33333343"),
    (0xBECBF647612F3696, "-0.0000033333333333333333"),
]


def notebook() -> dict:
    node = nbformat.v4.new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python", "version": "3.11.7", "codemirror_mode": {"name": "ipython"}},
            "papermill": {"parameters": {"epsilon": 1.0}},
        },
        cells=[
            nbformat.v4.new_markdown_cell("# Title\nText", id="title"),
            nbformat.v4.new_code_cell(
                "print(1)\nshow()",
                id="code",
                execution_count=1,
                outputs=[
                    nbformat.v4.new_output("stream", name="stdout", text="a\n"),
                    nbformat.v4.new_output("stream", name="stdout", text="b\n"),
                    nbformat.v4.new_output(
                        "display_data", data={"text/plain": "x\ny", "application/json": {"v": [1.0, 2.5, 10**20]}}
                    ),
                ],
            ),
            nbformat.v4.new_code_cell("2", id="last", execution_count=2, metadata={"tags": ["t"]}),
        ],
    )
    plain = json.loads(nbformat.writes(node))
    freeze(plain)
    return plain


def digest(value: dict) -> str:
    return manifest_digest(manifest_of(value))


@pytest.mark.parametrize(("bits", "text"), RFC8785_NUMBERS)
def test_numbers_are_written_as_rfc_8785_writes_them(bits, text):
    import struct

    assert canonical_json(struct.unpack(">d", bits.to_bytes(8, "big"))[0]).decode() == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_reads_back_as_itself(value):
    assert float(canonical_json(value)) == value


def test_keys_are_in_utf16_order_and_strings_as_rfc_8785_writes_them():
    value = {"\u20ac": 1, "\r": 2, "\ufb33": 3, "1": 4, "\U0001f600": 5, "\x80": 6, "ö": 7}
    assert list(json.loads(canonical_json(value)).values()) == [2, 4, 6, 7, 1, 5, 3]
    assert canonical_json('\u20ac$\x0f\nA\'B"\\\\"/') == b'"\xe2\x82\xac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"'


def test_an_integer_is_one_value_however_it_is_noted_and_every_digit_counts():
    assert canonical_json(1.0) == canonical_json(1) == b"1"
    assert canonical_json(1e22) == canonical_json(10**22)
    assert canonical_json(2**60) != canonical_json(2**60 + 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, "\ud800", {1: 2}, b"x"])
def test_what_is_no_json_is_refused(value):
    with pytest.raises(NormalFormError):
        canonical_json(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": [1, 2', "ends too early"),
        (b'{"a": "unfin', "ends too early"),
        (b'{"a": 1} x', "line 1, column 10"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
def test_json_is_read_strictly(text, words):
    with pytest.raises(NormalFormError, match=words):
        parse_json(text)


def _with_flags(nb: dict) -> dict:
    nb = copy.deepcopy(nb)
    nb["metadata"].update(signature="sha256:0", orig_nbformat=4, orig_nbformat_minor=2)
    for cell in nb["cells"]:
        cell["metadata"]["trusted"] = True
    return nb


def _refreshed(nb: dict) -> dict:
    nb = copy.deepcopy(nb)
    nb["metadata"]["language_info"].update(version="3.13.0", codemirror_mode={"name": "ipython", "version": 3})
    nb["metadata"]["kernelspec"]["display_name"] = "Python 3 (ipykernel)"
    return nb


RESAVES = {
    "nbformat": lambda nb: json.loads(nbformat.writes(nbformat.reads(json.dumps(nb), as_version=4))),
    "nbformat twice": lambda nb: RESAVES["nbformat"](RESAVES["nbformat"](nb)),
    "other indentation and key order": lambda nb: parse_json(
        json.dumps({k: nb[k] for k in reversed(list(nb))}, indent=7, ensure_ascii=True).encode()
    ),
    "sorted keys, no spaces": lambda nb: parse_json(json.dumps(nb, sort_keys=True, separators=(",", ":")).encode()),
    "integers for whole floats": lambda nb: json.loads(json.dumps(nb).replace("1.0", "1")),
    "trust flags and leftovers": _with_flags,
    "kernel refreshed": _refreshed,
    "widget state saved": lambda nb: {**nb, "metadata": {**nb["metadata"], "widgets": {"state": {}}}},
}


@pytest.mark.parametrize("name", RESAVES)
def test_an_unchanged_resave_keeps_the_digest(name):
    before = notebook()
    after = RESAVES[name](copy.deepcopy(before))
    assert digest(after) == digest(before)


def changes():
    def edit(path, value):
        def apply(nb):
            target = nb
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = value

        return apply

    return {
        "cells[0].source": edit(["cells", 0, "source"], "# Title\nText "),
        "cells[0].cell_type": edit(["cells", 0, "cell_type"], "raw"),
        "cells[1].outputs[0]": edit(["cells", 1, "outputs", 0, "text"], "a\nc\n"),
        "cells[1].outputs[1]": edit(["cells", 1, "outputs", 1, "data", "application/json", "v", 1], 2.50001),
        "cells[1].outputs": lambda nb: nb["cells"][1]["outputs"].pop(),
        "cells[1].execution_count": edit(["cells", 1, "execution_count"], 7),
        "cells[2].metadata.tags": edit(["cells", 2, "metadata", "tags"], ["u"]),
        "cells[2].metadata.new": edit(["cells", 2, "metadata", "new"], 1),
        "cells[2].id": edit(["cells", 2, "id"], "lost"),
        "metadata.papermill": edit(["metadata", "papermill", "parameters", "epsilon"], 2.0),
        "metadata.kernelspec": edit(["metadata", "kernelspec", "name"], "python4"),
        "metadata.language_info": edit(["metadata", "language_info", "name"], "julia"),
        "nbformat_minor": edit(["nbformat_minor"], 6),
        "cells[3]": lambda nb: nb["cells"].append({**nb["cells"][0], "id": "more"}),
    }


@pytest.mark.parametrize("where", changes())
def test_every_other_change_is_named(where):
    before, after = notebook(), notebook()
    changes()[where](after)
    found = compare_manifests(manifest_of(before), manifest_of(after), list(range(len(after["cells"]))))
    assert digest(before) != digest(after)
    assert [item.where for item in found] == [where]
    assert all(item.message for item in found)


def test_removed_and_moved_cells_are_named():
    before = notebook()
    without = notebook()
    del without["cells"][1]
    moved = notebook()
    moved["cells"].insert(0, moved["cells"].pop())
    of = manifest_of
    assert [d.code for d in compare_manifests(of(before), of(without), [0, 1])] == ["cell-removed"]
    assert {d.code for d in compare_manifests(of(before), of(moved), [0, 1, 2])} == {"cell-moved"}


def test_equal_manifests_have_no_difference():
    assert compare_manifests(manifest_of(notebook()), manifest_of(notebook()), [0, 1, 2]) == []


def test_freezing_twice_is_freezing_once():
    once = notebook()
    twice = copy.deepcopy(once)
    freeze(twice)
    assert twice == once


@pytest.mark.parametrize(
    ("texts", "frozen"),
    [
        (["  0%|  | 0/2\r", " 50%|# | 1/2\r", "100%|##| 2/2\n"], "100%|##| 2/2\n"),
        (["abc\rX"], "Xbc"),
        (["line\r\nnext\r\n"], "line\nnext\n"),
        (["abc\b\bX\n"], "aX\n"),
        (["\b\ba"], "a"),
        (["a\n\bb"], "a\nb"),
        (["plain\n"], "plain\n"),
    ],
)
def test_streams_are_joined_and_progress_bars_carried_out_as_jupyterlab_does(texts, frozen):
    outputs = [{"output_type": "stream", "name": "stderr", "text": text} for text in texts]
    nb = {"metadata": {}, "cells": [{"cell_type": "code", "metadata": {}, "outputs": copy.deepcopy(outputs)}]}
    freeze(nb)
    assert nb["cells"][0]["outputs"] == [{"output_type": "stream", "name": "stderr", "text": frozen}]
    assert frozen_outputs_digest(outputs) == outputs_digest(manifest_of(nb)["cells"][0]["outputs"])


def lab_stream(chunks: list[str]) -> str:
    """JupyterLab 4.6's `processText`, written from its source, over consecutive chunks."""
    text, index = "", 0
    for chunk in chunks:
        if not set(chunk) & set("\b\r\n"):
            text, index = text[:index] + chunk + text[index + len(chunk) :], index + len(chunk)
            continue
        at, last = index, 0
        while True:
            stop = next((i for i in range(last, len(chunk)) if chunk[i] in "\n\b\r"), -1)
            part = chunk[last : len(chunk) if stop == -1 else stop]
            text = text[:at] + part + text[at + len(part) :]
            last, at = stop + 1, at + len(part)
            if stop == -1:
                break
            if chunk[stop] == "\b":
                if at > 0 and text[at - 1] != "\n":
                    text, at = text[: at - 1] + text[at + 1 :], at - 1
            elif chunk[stop] == "\r":
                while at and text[at - 1] != "\n":
                    at -= 1
            else:
                text += "\n"
                at = len(text)
        index = at
    return text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(alphabet="ab\r\n\b", max_size=12), min_size=1, max_size=4))
def test_jupyterlab_leaves_a_frozen_stream_alone(chunks):
    nb = {"metadata": {}, "cells": [{"cell_type": "code", "metadata": {}, "outputs": []}]}
    nb["cells"][0]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": chunk} for chunk in chunks]
    freeze(nb)
    (output,) = nb["cells"][0]["outputs"]
    assert lab_stream([output["text"]]) == output["text"]


def test_live_widgets_leave_and_what_stands_beside_them_stays():
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "m"}}
    outputs = [
        {"output_type": "display_data", "metadata": {}, "data": {**view, "text/html": "<b>1</b>"}},
        {"output_type": "display_data", "metadata": {}, "data": dict(view)},
    ]
    nb = {"metadata": {"widgets": {}}, "cells": [{"cell_type": "code", "metadata": {}, "outputs": outputs}]}
    freeze(nb)
    assert "widgets" not in nb["metadata"]
    assert [list(output["data"]) for output in nb["cells"][0]["outputs"]] == [["text/html"], ["text/plain"]]
    added = copy.deepcopy(nb)
    added["cells"][0]["outputs"][0]["data"].update(view)
    assert digest(added) != digest(nb)


@pytest.mark.parametrize("metadata", [{"collapsed": True}, {"jupyter": {"outputs_hidden": True}}])
def test_hidden_outputs_are_noted_in_both_spellings_that_jupyterlab_writes(metadata):
    nb = {"metadata": {}, "cells": [{"cell_type": "code", "metadata": metadata, "outputs": []}]}
    freeze(nb)
    assert nb["cells"][0]["metadata"] == {"collapsed": True, "jupyter": {"outputs_hidden": True}}


def test_lone_surrogates_become_the_replacement_character():
    nb = notebook()
    nb["cells"][1]["outputs"][0]["text"] = "a\ud800b"
    freeze(nb)
    assert nb["cells"][1]["outputs"][0]["text"] == "a\ufffdb"


def failed_with_markers() -> dict:
    from papermill.exceptions import PapermillExecutionError
    from papermill.execute import raise_for_execution_errors

    nb = notebook()
    nb["cells"][1]["outputs"].append({"output_type": "error", "ename": "E", "evalue": "v", "traceback": []})
    node = nbformat.from_dict(nb)
    for cell in node.cells:
        cell.metadata.papermill = {}
    with pytest.raises(PapermillExecutionError):
        raise_for_execution_errors(node, None)
    return json.loads(json.dumps(node))


def test_papermills_own_error_markers_are_left_out():
    nb = failed_with_markers()
    assert [position for position, _ in without_markers(nb["cells"])] == [1, 3, 4]


def _reworded(cells):
    cells[0]["source"] = cells[0]["source"].replace("An", "No")
    return cells


def _with_metadata(cells):
    cells[2]["metadata"]["x"] = 1
    return cells


def _without_error(cells):
    del cells[3]["outputs"][-1]
    return cells


@pytest.mark.parametrize(
    "disguise",
    [
        _reworded,
        _with_metadata,
        _without_error,
        lambda cells: [cells[1], cells[0], *cells[2:]],
        lambda cells: [cells[0], cells[2], cells[1], *cells[3:]],
        lambda cells: [cells[0], *cells],
        lambda cells: cells[1:],
    ],
)
def test_a_cell_in_the_guise_of_a_marker_is_a_cell_like_any_other(disguise):
    cells = disguise(failed_with_markers()["cells"])
    assert "papermill-error-cell-tag" in json.dumps([cell for _, cell in without_markers(cells)])


def test_the_source_digest_knows_no_parameters_outputs_or_times():
    one, other = notebook(), notebook()
    injected = {"cell_type": "code", "id": "i", "metadata": {"tags": ["injected-parameters"]}, "source": "epsilon = 2"}
    other["cells"].insert(1, {**injected, "outputs": [], "execution_count": 1})
    other["cells"][2]["outputs"] = []
    assert source_digest(one) == source_digest(other)
    other["cells"][0]["source"] = "other"
    assert source_digest(one) != source_digest(other)
