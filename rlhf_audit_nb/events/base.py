"""What every event is made of. Floor 1."""

from __future__ import annotations

import math
from typing import ClassVar

import msgspec

__all__ = ["Event", "Number", "Private", "number"]

Number = float | int | str
"""A number as it can stand in an event (see `number`)."""


class Private(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The private half of an event: payload of a commitment, kept in the vault."""


class Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The public body of an entry."""

    TYPE: ClassVar[str] = ""
    PRIVATE: ClassVar[type[Private] | None] = None


def number(value: float) -> Number:
    """The value as it can stand in an event: itself, or its name where JSON has no such number."""
    if isinstance(value, int) or math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"
