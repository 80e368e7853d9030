"""A measured figure and the table of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Figure", "quantile", "table"]


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Args:
        what: what was measured.
        value: the measurement.
        unit: its unit; empty for a ratio.
        target: the bound to keep, as a number in the same unit; ``None`` where there is none.
        at_most: whether the target is an upper bound.
        how: how it was measured, shortly.
    """

    what: str
    value: float
    unit: str = ""
    target: float | None = None
    at_most: bool = True
    how: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target was met; ``None`` without one."""
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def to_dict(self) -> dict[str, Any]:
        """All fields and whether the target was met."""
        return {**asdict(self), "met": self.met}


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def table(figures: Sequence[Figure]) -> str:
    """The figures as a Markdown table."""
    lines = ["| what | measured | target | how |", "|---|---|---|---|"]
    for figure in figures:
        target = ""
        if figure.target is not None:
            sign = "≤" if figure.at_most else "≥"
            target = f"{sign} {_number(figure.target)} {figure.unit}".strip() + (" ✓" if figure.met else " ✗")
        lines.append(f"| {figure.what} | {_number(figure.value)} {figure.unit} | {target} | {figure.how} |")
    return "\n".join(lines)
