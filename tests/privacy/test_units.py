"""Grouping rows into units, and every way in which data can fail to name them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_audit_nb.errors import DataError
from rlhf_audit_nb.privacy.units import build_units, read_ids


def test_rows_are_grouped_by_annotator_in_order_of_appearance() -> None:
    units = build_units(["b", "a", "b", "c", "a"], 5, "annotator")
    assert units.members == ((0, 2), (1, 4), (3,))
    assert len(units) == 3


@given(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=60))
def test_every_row_is_in_exactly_one_unit_with_its_own_annotator(ids: list[str]) -> None:
    units = build_units(ids, len(ids), "annotator")
    assert sorted(row for unit in units.members for row in unit) == list(range(len(ids)))
    assert all(len({ids[row] for row in unit}) == 1 for unit in units.members)
    assert len(units) == len(set(ids))


def test_no_name_is_kept() -> None:
    assert "alice-secret" not in repr(build_units(["alice-secret", "bob"], 2, "annotator"))


def test_pairs_are_units_of_one_row_even_where_rows_are_equal() -> None:
    assert build_units(None, 3, "pair").members == ((0,), (1,), (2,))


@pytest.mark.parametrize("missing", [None, "", math.nan])
def test_a_row_without_an_id_is_named(missing: object) -> None:
    with pytest.raises(DataError, match=r"Row 1 .* no annotator id"):
        build_units(["a", missing, "b"], 3, "annotator")


def test_an_id_that_is_no_plain_value_is_refused() -> None:
    with pytest.raises(DataError, match="type list"):
        build_units([["a"]], 1, "annotator")


def test_ids_are_told_apart_as_rosters_tell_them_apart() -> None:
    assert build_units(["w1", " w1", "W-01", "w2"], 4, "annotator").members == ((0, 1, 2), (3,))
    assert build_units(["1", "01", "1.0", "2"], 4, "annotator").members == ((0, 1, 2), (3,))


def test_a_number_that_has_lost_its_last_digits_is_refused() -> None:
    assert len(build_units([2**53, 2**53 + 1], 2, "annotator")) == 2
    with pytest.raises(DataError, match="last digits are lost"):
        build_units([1.0, float(2**53 + 1)], 2, "annotator")


@pytest.mark.parametrize("unit", ["annotator", "pair"])
def test_empty_data_is_refused(unit: str) -> None:
    with pytest.raises(DataError, match="no rows"):
        build_units([], 0, unit)


def test_ids_for_other_rows_are_refused() -> None:
    with pytest.raises(DataError, match="2 annotator ids for 3 rows"):
        build_units(["a", "b"], 3, "annotator")


def test_a_missing_column_is_named_with_those_there_are_and_a_guess() -> None:
    with pytest.raises(DataError, match="'annotator_id'; it has anotator_id, chosen, prompt") as caught:
        read_ids(["prompt", "chosen", "anotator_id"], "annotator_id", lambda _: [])
    assert 'annotator_column="anotator_id"' in str(caught.value)
