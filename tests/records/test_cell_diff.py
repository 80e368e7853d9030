"""Cells and texts side by side: what is said to differ is what differs, and putting it together gives both sides."""

from __future__ import annotations

import base64
import hashlib
import random
import time
from typing import Any

import pytest

from rlhf_audit_nb.records.cell_diff import CONTEXT, MOST_LINES, compare_cells, compare_outputs, compare_text


def notebook(*cells: Any) -> dict[str, Any]:
    return {"cells": [cell if isinstance(cell, dict) else code(cell) for cell in cells], "metadata": {}}


def code(source: str, name: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "id": name or f"id-{source}",
        "source": source,
        "metadata": {},
        "outputs": [],
        "execution_count": None,
        **more,
    }


def kinds(left: dict[str, Any], right: dict[str, Any]) -> list[tuple[str, int | None, int | None]]:
    return [(item.kind, item.left, item.right) for item in compare_cells(left, right)]


# -- text -----------------------------------------------------------------------------------------------------------


def side(text: str, lines: Any, sign: str) -> list[str]:
    """One side put together again from the other and from what is said to differ."""
    own = {getattr(line, "left" if sign == "-" else "right"): line.text for line in lines if line.sign == sign}
    numbered = dict(enumerate(text.split("\n")[: text.count("\n") + 1], 1))
    return [f"{number}:{line}" for number, line in own.items() if numbered[number] != line]


def test_a_text_that_did_not_change_has_no_lines() -> None:
    for text in ("", "a", "a\n", "a\nb"):
        assert compare_text(text, text) == ()


def test_every_line_that_is_said_to_differ_stands_at_its_number_and_nothing_else_differs() -> None:
    chooser = random.Random(6)
    for _ in range(300):
        before = [chooser.choice("abcdefgh") for _ in range(chooser.randrange(12))]
        after = [line for line in before if chooser.random() < 0.8]
        for _ in range(chooser.randrange(3)):
            after.insert(chooser.randrange(len(after) + 1), chooser.choice("xyz"))
        left, right = "".join(f"{line}\n" for line in before), "".join(f"{line}\n" for line in after)
        lines = compare_text(left, right)
        assert side(left, lines, "-") == []
        assert side(right, lines, "+") == []
        gone, come = (
            {getattr(line, one) for line in lines if line.sign == sign} for one, sign in (("left", "-"), ("right", "+"))
        )
        rest = [line for number, line in enumerate(before, 1) if number not in gone]
        assert rest == [line for number, line in enumerate(after, 1) if number not in come]
        assert bool(lines) == (before != after)
        shown = sum(line.sign != "…" for line in lines)
        assert shown <= len(gone) + len(come) + 2 * CONTEXT * (len(gone) + len(come))


def test_a_line_feed_at_the_end_is_a_difference_and_said_in_words() -> None:
    lines = compare_text("a\nb", "a\nb\n")
    assert [(line.sign, line.text) for line in lines if line.sign in "+-"] == [
        ("-", "b (no line feed at the end)"),
        ("+", "b"),
    ]
    assert all("line feed" not in line.text for line in compare_text("a\nb", "a\nc"))


def test_what_is_left_out_between_differences_is_counted() -> None:
    left = "".join(f"line {i}\n" for i in range(100))
    lines = compare_text(left, left.replace("line 50\n", "other\n"))
    assert [line.text for line in lines if line.sign == "…"] == ["48 equal lines", "47 equal lines"]
    assert [line.text for line in lines if line.sign in "+-"] == ["line 50", "other"]


def test_long_lines_and_long_texts_are_cut_and_the_cut_is_said() -> None:
    (line, *_) = compare_text("x" * 10_000, "")
    assert line.text.endswith("(9600 more characters)")
    lines = compare_text("", "".join(f"{i}\n" for i in range(5_000)))
    assert len(lines) == MOST_LINES + 1
    assert lines[-1].text == f"{5_000 - MOST_LINES} more lines of this comparison"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("a\n" * 50_000, "a\n" * 40_000 + "b\n"),
        ("".join(f"{i % 5}\n" for i in range(3_000)), "".join(f"{i % 7}\n" for i in range(3_000))),
        ("".join(f"{i}\n" for i in range(100_000)), "".join(f"{-i if i % 3 else i}\n" for i in range(100_000))),
    ],
    ids=["one line many times", "few lines many times", "many changes"],
)
def test_no_text_keeps_a_reader_waiting(left: str, right: str) -> None:
    before = time.process_time()
    lines = compare_text(left, right)
    assert time.process_time() - before < 2
    assert any(line.sign in "+-" for line in lines)


# -- cells ----------------------------------------------------------------------------------------------------------


def test_a_notebook_and_itself_are_the_same_cell_by_cell() -> None:
    one = notebook("a", "b", "b2", "c")
    assert kinds(one, one) == [("same", i, i) for i in range(4)]


@pytest.mark.parametrize(
    ("right", "expected"),
    [
        (notebook("a", "b", "c", "d"), [("same", 0, 0), ("same", 1, 1), ("same", 2, 2), ("added", None, 3)]),
        (notebook("n", "a", "b", "c"), [("added", None, 0), ("same", 0, 1), ("same", 1, 2), ("same", 2, 3)]),
        (notebook("a", "c"), [("same", 0, 0), ("removed", 1, None), ("same", 2, 1)]),
        (notebook("b", "c"), [("removed", 0, None), ("same", 1, 0), ("same", 2, 1)]),
        (notebook("c", "a", "b"), [("moved", 2, 0), ("same", 0, 1), ("same", 1, 2)]),
        (notebook("a", code("B", "id-b"), "c"), [("same", 0, 0), ("changed", 1, 1), ("same", 2, 2)]),
        (notebook("a", code("b", "new"), "c"), [("same", 0, 0), ("same", 1, 1), ("same", 2, 2)]),
        (notebook("a", code("B", "new"), "c"), [("same", 0, 0), ("changed", 1, 1), ("same", 2, 2)]),
        (notebook(), [("removed", 0, None), ("removed", 1, None), ("removed", 2, None)]),
    ],
    ids=["added", "first", "removed", "first removed", "moved", "changed", "id", "id and text", "all gone"],
)
def test_each_change_of_cells_is_named_and_no_other(right: Any, expected: Any) -> None:
    assert kinds(notebook("a", "b", "c"), right) == expected


def test_ids_that_are_all_new_make_no_difference() -> None:
    left, right = notebook("a", "b", "b", "c"), notebook(*(code(text, f"new-{i}") for i, text in enumerate("abbc")))
    assert [item.kind for item in compare_cells(left, right)] == ["same"] * 4


def test_a_cell_that_moved_and_changed_says_both() -> None:
    found = compare_cells(notebook("a", "b", "c", "d"), notebook(code("A", "id-a"), "c", "d", code("b!", "id-b")))
    assert [(item.kind, item.moved, item.what) for item in found] == [
        ("changed", False, ("source",)),
        ("same", False, ()),
        ("same", False, ()),
        ("changed", True, ("source",)),
    ]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"source": ["a", "b"]}, ("source",)),
        ({"cell_type": "raw"}, ("type",)),
        ({"metadata": {"tags": ["figure"]}}, ("tags",)),
        ({"attachments": {"a.png": {"image/png": "QQ=="}}}, ("attachments",)),
        ({"metadata": {"collapsed": True}}, ()),
        ({"execution_count": 7}, ()),
        ({"outputs": [{"output_type": "stream", "name": "stdout", "text": "x"}]}, ()),
        ({"source": ["a"]}, ()),
    ],
)
def test_what_of_a_cell_is_compared(change: dict[str, Any], what: tuple[str, ...]) -> None:
    (found,) = compare_cells(notebook(code("a", "x")), notebook({**code("a", "x"), **change}))
    assert found.what == what


def test_injected_parameters_are_no_code_unless_they_are_asked_for() -> None:
    left = notebook(code("a = 1", "p", metadata={"tags": ["injected-parameters"]}), "b")
    right = notebook(code("a = 2", "q", metadata={"tags": ["injected-parameters"]}), "b")
    assert kinds(left, right) == [("same", 1, 1)]
    assert [item.kind for item in compare_cells(left, right, injected=True)] == ["changed", "same"]


# -- outputs --------------------------------------------------------------------------------------------------------


def test_outputs_are_compared_by_what_they_show() -> None:
    stream = {"output_type": "stream", "name": "stdout", "text": "one\ntwo\n"}
    listed = {"output_type": "stream", "name": "stdout", "text": ["one\n", "two\n"]}
    assert compare_outputs(code("a", outputs=[stream]), code("a", outputs=[listed])) == []
    counted = {"output_type": "execute_result", "execution_count": 1, "data": {"text/plain": "1"}, "metadata": {}}
    assert compare_outputs(code("a", outputs=[counted]), code("a", outputs=[{**counted, "execution_count": 2}])) == []
    (found,) = compare_outputs(code("a", outputs=[stream]), code("a", outputs=[{**stream, "text": "one\nthree\n"}]))
    assert (found.number, found.kind) == (0, "changed")
    assert [(line.sign, line.text) for line in found.lines] == [(" ", "one"), ("-", "two"), ("+", "three")]


def test_a_picture_is_told_by_size_and_digest_as_sha256sum_gives_it() -> None:
    data = bytes(range(256))
    one = {"output_type": "display_data", "metadata": {}, "data": {"image/png": base64.b64encode(data).decode() + "\n"}}
    other = {"output_type": "display_data", "metadata": {}, "data": {"image/png": base64.b64encode(data[:-1]).decode()}}
    (found,) = compare_outputs(code("a", outputs=[one]), code("a", outputs=[other]))
    assert found.left == f"image/png, 256 bytes, sha256 {hashlib.sha256(data).hexdigest()}"
    assert found.right == f"image/png, 255 bytes, sha256 {hashlib.sha256(data[:-1]).hexdigest()}"
    assert found.lines == ()


def test_outputs_that_were_added_and_removed_are_told_as_such() -> None:
    error = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}
    stream = {"output_type": "stream", "name": "stderr", "text": "x"}
    (added,) = compare_outputs(code("a", outputs=[stream]), code("a", outputs=[stream, error]))
    assert (added.kind, added.number, added.left, added.right) == ("added", 1, "", "error ValueError")
    (removed,) = compare_outputs(code("a", outputs=[stream]), code("a"))
    assert (removed.kind, removed.left) == ("removed", "stderr, 1 character")


def test_tracebacks_are_shown_without_colours_unless_these_alone_differ() -> None:
    def raised(text: str) -> dict[str, Any]:
        return {"outputs": [{"output_type": "error", "ename": "E", "evalue": "", "traceback": [text]}]}

    (changed,) = compare_outputs(raised("\x1b[31mE\x1b[39m: one"), raised("\x1b[31mE\x1b[39m: two"))
    assert [(line.sign, line.text) for line in changed.lines] == [("-", "E: one"), ("+", "E: two")]
    (changed,) = compare_outputs(raised("\x1b[31mE\x1b[39m: one"), raised("\x1b[32mE\x1b[39m: one"))
    assert [line.text for line in changed.lines] == ["\x1b[31mE\x1b[39m: one", "\x1b[32mE\x1b[39m: one"]
