from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from rlhf_audit_nb.compliance.framework import MODES, load_framework, parse_framework
from rlhf_audit_nb.compliance.queries import QUERIES
from rlhf_audit_nb.errors import ReportError


def rows_of_the_table():
    shared = os.environ.get("RLHF_AUDIT_SHARED")
    folder = Path(shared) if shared else Path(__file__).resolve().parents[2].parent / "shared"
    path = folder / "compliance" / "requirements.csv"
    if not path.is_file():
        message = f"the table of requirements is not at {path}; set RLHF_AUDIT_SHARED"
        if os.environ.get("RLHF_AUDIT_NO_SKIP") == "1":
            pytest.fail(message)
        pytest.skip(message)
    with path.open(encoding="utf-8", newline="") as lines:
        return [row for row in csv.DictReader(lines) if row["framework"] == "EU AI Act"]


def test_every_row_of_the_eu_table_stands_in_the_framework_with_its_mode_and_dates():
    table = {row["id"]: row for row in rows_of_the_table()}
    framework = {row.id: row for row in load_framework("eu_ai_act").requirements}
    assert list(framework) == list(table)
    assert len(table) == 197
    for name, row in framework.items():
        assert row.mode == table[name]["mode"], name
        assert row.applies_from == table[name]["applies_from"], name
        assert row.who == table[name]["applies_to"], name


def test_the_text_of_the_law_is_named():
    framework = load_framework("eu_ai_act")
    assert "2026/1744" in framework.law
    assert framework.text_version == "CELEX 02024R1689-20260727"
    assert len(framework.digest) == 64


def test_no_query_answers_what_a_training_trail_cannot_show():
    rows = {row.id: row for row in load_framework("eu_ai_act").requirements}
    assert rows["AIA-12-1"].mode == "n-a"
    assert not any(row.query for row in rows.values() if row.article.startswith(("Art. 12", "Art. 14", "Art. 21(2)")))
    assert any("Art. 12" in trap for trap in load_framework("eu_ai_act").traps)
    assert any("Art. 14" in trap for trap in load_framework("eu_ai_act").traps)


def test_every_query_that_is_asked_for_exists_and_none_is_idle():
    asked = {name for row in load_framework("eu_ai_act").requirements for name in (row.query, row.material) if name}
    assert asked == set(QUERIES)


def test_an_unknown_mode_is_refused_with_the_list():
    with pytest.raises(ReportError, match="nist_draft") as refused:
        load_framework("nist_draft")
    assert all(mode in refused.value.next_step for mode in MODES)


GOOD = """
id: x
title: X
law: L
text_version: v
text_date: d
traps: []
requirements:
- {id: A, article: a, part: p, requirement: r, who: w, applies_from: f, text: '2026',
   mode: automatic, query: q, reason: z}
"""


def test_a_sound_framework_is_read():
    assert parse_framework(GOOD).requirements[0].query == "q"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("mode: automatic", "mode: certain"), "certain"),
        (("article: a, ", ""), "article"),
        (("who: w", "who: w, colour: red"), "colour"),
        ((", reason: z", ""), "reason"),
        (("mode: automatic", "mode: attest"), "attest"),
        (("title: X", "title: ["), "framework"),
    ],
)
def test_a_framework_with_a_fault_is_refused_and_the_fault_is_named(change, named):
    with pytest.raises(ReportError, match=named):
        parse_framework(GOOD.replace(*change))


def test_a_requirement_that_stands_twice_is_refused():
    with pytest.raises(ReportError, match="twice"):
        parse_framework(GOOD + "\n".join(GOOD.strip().splitlines()[-2:]))
