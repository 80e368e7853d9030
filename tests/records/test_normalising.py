"""Outputs in one form: each rule evens out what it names and nothing else, and says how often it did."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.records.normalising import (
    TOOL_RULES,
    Identity,
    OutputsCompared,
    compare_outputs,
    declared_rules,
    numbers_close,
    read_rules,
)


def stream(text: str, name: str = "stdout") -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": text}


def display(**data: Any) -> dict[str, Any]:
    bundle = {mime.replace("_", "/", 1): value for mime, value in data.items()}
    return {"output_type": "display_data", "data": bundle, "metadata": {}}


def notebook(*cells: list[dict[str, Any]], tags: tuple[str, ...] = ()) -> dict[str, Any]:
    made = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {"tags": list(tags)}, "outputs": outputs}
        for i, outputs in enumerate(cells)
    ]
    return {"metadata": {}, "cells": made}


def compared(then: list[dict[str, Any]], now: list[dict[str, Any]], **settings: Any) -> OutputsCompared:
    return compare_outputs(notebook(then), notebook(now), **settings)


def times(result: OutputsCompared, rule: str) -> int:
    (found,) = [item.applied for item, _ in result.rules if item.rule == rule]
    return found


EVENED = {
    "memory addresses": ("<object at 0x7f4b2c1a9d30>", "<object at 0x7f4b2c1aaaa0>", "<object at 0x7f4b>"),
    "cell files": (
        "/tmp/ipykernel_81/1203.py:3: UserWarning: x",
        "/var/t/ipykernel_9/77.py:3: UserWarning: x",
        "/tmp/ipykernel_9/77.py:4: UserWarning: x",
    ),
    "progress bars": (
        "100%|##| 5/5 [00:01<00:00,  4.10it/s]",
        "100%|##| 5/5 [1:02:01<00:00,  4.99s/it, loss=1]",
        "100%|##| 6/6 [00:01<00:00,  4.10it/s]",
    ),
    "trainer times": (
        "{'train_runtime': 1.5, 'train_loss': 0.5, 'eval_samples_per_second': '3e+02'}",
        "{'train_runtime': 9.25, 'train_loss': 0.5, 'eval_samples_per_second': '4.5'}",
        "{'train_runtime': 1.5, 'train_loss': 0.6, 'eval_samples_per_second': '3e+02'}",
    ),
    "widget ids": ("IPY_MODEL_" + "a" * 32, "IPY_MODEL_" + "b" * 32, "IPY_MODEL_" + "b" * 31),
}


@pytest.mark.parametrize("rule", EVENED)
def test_a_rule_evens_out_what_it_names_and_counts_it_and_nothing_else(rule: str) -> None:
    then, now, other = EVENED[rule]
    result = compared([stream(then)], [stream(now)])
    assert result.differences == ()
    assert times(result, rule) >= 2
    assert [item.rule for item, _ in result.rules if item.applied] == [rule]
    assert len(compared([stream(then)], [stream(other)]).differences) == 1


def test_a_trainers_bar_is_evened_out_too() -> None:
    result = compared([stream("[5/5 00:01 < 00:00, 4.1 it/s, Epoch 1/1]")], [stream("[5/5 00:09, Epoch 1/1]")])
    assert result.differences == ()
    assert times(result, "progress bars") == 2
    assert compared([stream("[5/5 00:01, Epoch 1/1]")], [stream("[5/5 00:01, Epoch 1/2]")]).differences


def test_every_rule_is_listed_whether_it_applied_or_not() -> None:
    result = compared([stream("a")], [stream("a")])
    assert [item.rule for item, _ in result.rules] == list(TOOL_RULES)
    assert all(item.applied == 0 for item, _ in result.rules)
    assert all(len(sentence) > 20 for sentence in TOOL_RULES.values())


def test_widgets_are_numbered_in_order_so_that_two_that_change_places_are_seen() -> None:
    one, two = "IPY_MODEL_" + "1" * 32, "IPY_MODEL_" + "2" * 32
    new = {one: "IPY_MODEL_" + "8" * 32, two: "IPY_MODEL_" + "9" * 32}
    assert not compared([stream(f"{one} {two} {one}")], [stream(f"{new[one]} {new[two]} {new[one]}")]).differences
    assert compared([stream(f"{one} {two} {one}")], [stream(f"{new[one]} {new[two]} {new[two]}")]).differences


def test_streams_may_alternate_in_another_way_and_must_say_the_same() -> None:
    then = [stream("a\n"), stream("w\n", "stderr"), stream("b\n")]
    now = [stream("w\n", "stderr"), stream("a\nb\n")]
    result = compared(then, now)
    assert result.differences == ()
    assert times(result, "streams") == 1
    (found,) = compared(then, [stream("w\n", "stderr"), stream("b\na\n")]).differences
    assert found.place == "cells[0].outputs[0].text"
    assert (found.expected, found.found) == ("a\nb\n", "b\na\n")


def test_a_picture_is_compared_byte_by_byte_and_shown_as_no_text() -> None:
    one, other = (base64.b64encode(data).decode() for data in (b"\x89PNG1", b"\x89PNG2"))
    assert compared([display(image_png=one)], [display(image_png=one)]).differences == ()
    (found,) = compared([display(image_png=one)], [display(image_png=other)]).differences
    assert found.place == "cells[0].outputs[0].data.image/png"
    assert found.expected is None
    assert found.found is None


def test_json_is_compared_as_json() -> None:
    then, now = {"b": 1.0, "a": [1, 2]}, {"a": [1, 2], "b": 1}
    assert compared([display(application_json=then)], [display(application_json=now)]).differences == ()
    assert compared([display(application_json=then)], [display(application_json={**now, "a": [2, 1]})]).differences


def test_of_an_error_name_and_words_count_and_the_frames_do_not() -> None:
    error = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": ["/home/a/x.py"]}
    result = compared([error], [{**error, "traceback": ["elsewhere"]}])
    assert result.differences == ()
    assert times(result, "tracebacks") == 2
    assert compared([error], [{**error, "evalue": "yes"}]).differences


def test_the_names_of_trails_runs_and_records_are_evened_out_where_they_are_known() -> None:
    then, now = Identity("o.local/aaa", ("1" * 32,), ("2" * 32,)), Identity("o.local/bbb", ("3" * 32,), ())
    roots = ("A" * 43 + "=", "B" * 43 + "=")
    before = f"o.local/aaa: 28 entries, root {roots[0]}, run {'1' * 8} at 2026-01-01 10:00:00 UTC"
    after = f"o.local/bbb: 23 entries, root {roots[1]}, run {'3' * 8} at 2026-01-02 11:00:00 UTC"
    result = compared([display(text_plain=before)], [display(text_plain=after)], identities=(then, now))
    assert result.differences == ()
    assert times(result, "trail") == 10
    # An output that does not name the trail keeps its numbers.
    plain = compared([display(text_plain="28 entries")], [display(text_plain="23 entries")], identities=(then, now))
    assert len(plain.differences) == 1


def test_other_outputs_than_there_were_are_told_by_their_kinds() -> None:
    (found,) = compared([stream("a"), display(text_plain="1")], [stream("a")]).differences
    assert found.place == "cells[0].outputs"
    assert found.what == "Cell 1 (id c0) left other outputs than it had: stdout, display_data and stdout"


def test_numbers_in_texts_may_differ_within_a_tolerance_that_was_stated_and_whole_ones_never() -> None:
    then, near, far = "loss 0.5000001 step 3", "loss 0.5000002 step 3", "loss 0.51 step 3"
    assert compared([stream(then)], [stream(near)]).differences
    result = compared([stream(then)], [stream(near)], tolerance=1e-6)
    assert result.differences == ()
    assert result.tolerated == 1
    assert compared([stream(then)], [stream(far)], tolerance=1e-6).differences
    assert compared([stream("1000000 rows")], [stream("1000001 rows")], tolerance=1e-3).differences
    assert compared([stream("loss nan")], [stream("loss 0.5")], tolerance=1e-3).differences


def test_a_number_that_is_none_is_close_to_itself_alone() -> None:
    assert numbers_close(float("nan"), float("nan"), 1e-6)
    assert not numbers_close(float("nan"), 0.0, 1e-6)
    assert not numbers_close(float("inf"), 1e308, 1e-6)
    assert numbers_close(1e-9, -1e-9, 1e-6)
    assert not numbers_close(100.0, 100.001, 1e-6)


def test_a_cell_that_is_tagged_is_left_out_and_that_is_counted() -> None:
    then, now = notebook([stream("a")], tags=("nbval-ignore-output",)), notebook([stream("b")])
    result = compare_outputs(then, now)
    assert result.differences == ()
    assert result.compared == 0
    assert times(result, "ignored cells") == 1


# --- declared rules --------------------------------------------------------------------------------------------------


def test_rules_of_a_file_and_of_the_notebook_apply_and_say_where_they_are_from(tmp_path: Path) -> None:
    file = tmp_path / "rules.cfg"
    file.write_text(
        "[dates]\nregex: \\d{4}-\\d\\d-\\d\\d\nreplace: DATE\n\n[percent]\nregex = %(\\d)\nreplace = P\\1\n"
    )
    declaring = notebook([stream("x")])
    declaring["metadata"]["reproduce"] = {"normalise": [{"name": "host", "regex": "node-\\d+", "replace": "NODE"}]}
    rules = (*read_rules(file), *declared_rules(declaring))
    result = compared([stream("2026-01-01 node-1 %5")], [stream("2026-02-02 node-7 %5")], rules=rules)
    assert result.differences == ()
    listed = [(item.rule, item.origin, item.applied, item.pattern) for item, _ in result.rules[:3]]
    assert listed == [
        ("dates", "file", 2, "\\d{4}-\\d\\d-\\d\\d"),
        ("percent", "file", 2, "%(\\d)"),
        ("host", "record", 2, "node-\\d+"),
    ]
    assert compared([stream("2026-01-01 node-1 x")], [stream("2026-02-02 node-7 y")], rules=rules).differences


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[a]\nregex: (\nreplace: x\n", "is no regular expression"),
        ("[a]\nregex: a\nreplace: \\9\n", "is no regular expression"),
        ("[a]\nreplace: x\n", "has no name, regex and replace"),
        ("regex: a\n", "holds no rules"),
        (f"[a]\nregex: {'a' * 1001}\n", "1000 are the most"),
    ],
)
def test_a_rule_that_is_none_is_named_before_anything_runs(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "rules.cfg"
    file.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_rules(file)


def test_rules_that_a_notebook_declares_in_another_form_are_refused() -> None:
    for declared in ({"normalise": "x"}, ["x"], {"normalise": [{"name": "a", "regex": 3}]}, {"normalise": ["x"]}):
        made = notebook([])
        made["metadata"]["reproduce"] = declared
        with pytest.raises(ConfigError, match="notebook"):
            declared_rules(made)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rules("/nowhere/rules.cfg")
