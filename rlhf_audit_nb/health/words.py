"""Counts and times in words. Floor 4."""

from __future__ import annotations

__all__ = ["ago", "plural", "size"]

_UNITS = ((86_400.0, "day"), (3_600.0, "hour"), (60.0, "minute"))


def plural(count: int, one: str, many: str | None = None) -> str:
    """``count`` things."""
    more = many or (one[:-1] + "ies" if one.endswith("ry") else one + "s")
    return f"{count:,} {one if count == 1 else more}"


def ago(seconds: float) -> str:
    """A length of time in its largest whole unit."""
    for length, unit in _UNITS:
        if seconds >= length:
            return plural(int(seconds / length), unit)
    return plural(max(int(seconds), 0), "second")


def size(count: float) -> str:
    """So many bytes."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:  # noqa: PLR2004
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
