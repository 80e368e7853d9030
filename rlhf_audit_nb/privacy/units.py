"""Privacy units: which rows of the data stand or fall together. Floor 2.

A unit is what two neighbouring data sets differ in: all pairs of one annotator, or one pair. A `Units` knows row
numbers only, never a name: the ids are read once, used to group, and forgotten. Units are numbered by their first row.

Under zero-out adjacency the roster (how many units there are) is public and what each of them holds is not. The
roster is that of the data set as the trainer prepared it: rows that a trainer drops while it tokenises (those longer
than ``max_length``) are gone before the guarantee begins, and an annotator all of whose rows were dropped is not on
the roster.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_audit_nb.errors import DataError

__all__ = ["Units", "build_units", "read_ids"]


@dataclass(frozen=True, slots=True)
class Units:
    """The roster: for each unit the rows of the data set that belong to it, rising.

    Attributes:
        unit: ``annotator`` or ``pair``.
        members: one tuple of row numbers for each unit; every row is in exactly one.
    """

    unit: str
    members: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.members)


def build_units(ids: Iterable[Any] | None, rows: int, unit: str) -> Units:
    """Group ``rows`` rows into units.

    Args:
        ids: the annotator of each row, in order; not looked at for ``unit="pair"``.
        rows: how many rows the data set has.
        unit: ``annotator`` or ``pair``.

    Raises:
        DataError: no rows; no ids, or not one for each row; an id that is missing (None, NaN, empty) or no plain value.
    """
    if rows < 1:
        raise DataError(
            "The training data has no rows (a trainer may have dropped those longer than its max_length).",
            next_step="Load data with at least one pair, or raise max_length.",
            code="empty-data",
        )
    if unit == "pair":
        return Units("pair", tuple((row,) for row in range(rows)))
    if ids is None:
        raise DataError('unit="annotator" needs the annotator\'s id of each row.', code="missing-column")
    groups: dict[Any, list[int]] = {}
    count = 0
    for row, identity in enumerate(ids):
        groups.setdefault(_checked(identity, row), []).append(row)
        count += 1
    if count != rows:
        raise DataError(f"There are {count} annotator ids for {rows} rows.", code="ids-mismatch")
    return Units("annotator", tuple(tuple(group) for group in groups.values()))


def read_ids(columns: Sequence[str], column: str, read: Any) -> Iterable[Any]:
    """The annotator ids of a data set.

    Args:
        columns: the columns there are.
        column: the one that holds the ids.
        read: gives the values of a column by its name.

    Raises:
        DataError: there is no such column; the message names those there are.
    """
    if column not in columns:
        close = difflib.get_close_matches(column, columns, n=1)
        guess = f'annotator_column="{close[0]}"' if close else 'annotator_column="..." with the right name'
        raise DataError(
            f"The training data has no column {column!r}; it has {', '.join(sorted(columns))}.",
            next_step=f'Write {guess} in the privacy configuration, or unit="pair" to protect single pairs.',
            code="missing-column",
        )
    ids: Iterable[Any] = read(column)
    return ids


def _checked(identity: Any, row: int) -> Any:
    missing = identity is None or identity == "" or (isinstance(identity, float) and math.isnan(identity))
    if missing:
        raise DataError(
            f"Row {row} of the training data has no annotator id.",
            next_step="Give every row an id, or leave out the rows without one; privacy counts annotators.",
            code="missing-id",
        )
    if not isinstance(identity, str | int | float):
        raise DataError(
            f"Row {row} of the training data has an annotator id of type {type(identity).__name__}.",
            next_step="Use strings or whole numbers as ids.",
            code="bad-id",
        )
    return identity
