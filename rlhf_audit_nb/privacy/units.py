"""Privacy units: which rows of the data stand or fall together. Floor 2.

A unit is what two neighbouring data sets differ in: all pairs of one annotator, or one pair. A `Units` knows row
numbers only, never a name: the ids are read once, used to group, and forgotten. Units are numbered by their first row.

Under zero-out adjacency the roster (how many units there are) is public and what each of them holds is not. Trainers
drop rows while they tokenise, such as those longer than ``max_length``; which ones is a function of their texts. So the
roster is that of the rows *before* the dropping: a unit all of whose rows were dropped stays on it, holds nothing, is
sampled like any other, and contributes nothing.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_audit_nb.errors import DataError
from rlhf_audit_nb.privacy.populations import canonical

__all__ = ["Units", "build_units", "read_ids"]

_EXACT = 2.0**53  # from here on float64 skips whole numbers


@dataclass(frozen=True, slots=True)
class Units:
    """The roster: for each unit the rows of the data set that belong to it, rising.

    Attributes:
        unit: ``annotator`` or ``pair``.
        members: one tuple of row numbers for each unit, empty where none is left; every row is in exactly one.
    """

    unit: str
    members: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.members)


def build_units(ids: Iterable[Any] | None, rows: int, unit: str, kept: Sequence[int] | None = None) -> Units:
    """Group ``rows`` rows into units, and say which rows of the prepared data each of them holds.

    Args:
        ids: the annotator of each row, in order, compared as rosters are (`canonical`): ``"w1"`` and ``" W1"`` are one
            unit; not looked at for ``unit="pair"``.
        rows: how many rows the data had before the trainer dropped any.
        unit: ``annotator`` or ``pair``.
        kept: for each row of the prepared data, which of the ``rows`` it is; ``None`` where nothing was dropped.

    Raises:
        DataError: no rows; no ids, or not one for each row; an id that is missing (None, NaN, empty) or no plain value.
    """
    if rows < 1:
        raise DataError(
            "The training data has no rows.",
            next_step="Load data with at least one pair.",
            code="empty-data",
        )
    if unit == "pair":
        return Units("pair", _held([(row,) for row in range(rows)], kept))
    if ids is None:
        raise DataError('unit="annotator" needs the annotator\'s id of each row.', code="missing-column")
    groups: dict[str, list[int]] = {}
    names: dict[Any, str] = {}  # each id is brought into its form once
    count = 0
    for row, identity in enumerate(ids):
        checked = _checked(identity, row)
        name = names.get(checked) or names.setdefault(checked, canonical(checked))
        groups.setdefault(name, []).append(row)
        count += 1
    if count != rows:
        raise DataError(f"There are {count} annotator ids for {rows} rows.", code="ids-mismatch")
    return Units("annotator", _held(groups.values(), kept))


def _held(groups: Iterable[Sequence[int]], kept: Sequence[int] | None) -> tuple[tuple[int, ...], ...]:
    """Each group's rows by their numbers in the prepared data."""
    if kept is None:
        return tuple(tuple(group) for group in groups)
    places: dict[int, list[int]] = {}
    for place, row in enumerate(kept):
        places.setdefault(row, []).append(place)
    return tuple(tuple(sorted(place for row in group for place in places.get(row, ()))) for group in groups)


def read_ids(columns: Sequence[str], column: str, read: Any) -> list[Any]:
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
    return list(read(column))


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
    if isinstance(identity, float) and abs(identity) >= _EXACT:
        raise DataError(
            f"Row {row} of the training data has an annotator id that is too large for a floating-point number: its "
            "last digits are lost.",
            next_step="Load the ids as whole numbers or as text.",
            code="bad-id",
        )
    return identity
