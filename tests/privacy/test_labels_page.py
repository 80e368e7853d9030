"""The page on label privacy: its figures are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf_audit_nb.privacy.labels import flip_chance
from rlhf_audit_nb.privacy.randomised_response import composed_response

PAGE = Path(__file__).resolve().parents[2] / "docs" / "privacy" / "labels.md"
ROW = re.compile(r"^\| ([\d.]+) \| ([\d.]+) % \| × ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)
LABELS = (5, 20, 50)
ROWS = [tuple(map(float, row)) for row in ROW.findall(PAGE.read_text(encoding="utf-8"))]


def test_the_table_has_its_rows():
    assert [row[0] for row in ROWS] == [0.5, 1, 2, 3, 4]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"epsilon {row[0]:g}")
def test_a_row_of_the_table_is_what_the_code_says(row):
    epsilon, flipped, variance, *annotator = row
    chance = flip_chance(epsilon)
    assert flipped == pytest.approx(100 * chance, abs=0.005)
    assert variance == pytest.approx(1 / (1 - 2 * chance) ** 2, abs=0.005)
    for count, figure in zip(LABELS, annotator, strict=True):
        assert figure == pytest.approx(composed_response(epsilon, count, 1e-5), abs=0.005)
