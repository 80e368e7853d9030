"""What was changed in a record since it was sealed, as lines for a terminal. Floor 4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_audit_nb.compliance import words
from rlhf_audit_nb.reports.diff import line_words, pair_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlhf_audit_nb.records.cell_diff import CellChange
    from rlhf_audit_nb.records.original import OutputsOf, ParameterChange, SinceSealed

__all__ = ["since_sealed_words"]

MOST_LINES = 20
MOST_THINGS = 12


def since_sealed_words(found: SinceSealed) -> list[str]:
    """What was changed, cell by cell with its lines, at most twelve things; or why that cannot be told."""
    if found.copy is None:
        return [f"  {words.visible(found.why)}"]
    parts = [
        *(_parameter(item) for item in found.parameters),
        *(_cell(item) for item in found.cells),
        *(_output(item) for item in found.outputs),
    ]
    head = f"  against the copy that was kept when it was sealed ({words.visible(str(found.copy))}):"
    if not parts:
        return [head, "    neither a parameter, nor the text of a cell, nor an output was changed"]
    lines = [head, *(line for part in parts[:MOST_THINGS] for line in part)]
    more = len(parts) - MOST_THINGS
    return [*lines, *([f"    and {words.plural(more, 'more change')} (--json has them all)"] if more > 0 else [])]


def _parameter(item: ParameterChange) -> list[str]:
    before, now = pair_text(item.before, item.now)
    before, now = (text if there else "not there" for text, there in zip((before, now), item.there, strict=True))
    return [f"    parameter {words.visible(item.name)}: {before} → {now}"]


def _cell(item: CellChange) -> list[str]:
    place = item.right if item.right is not None else item.left
    what = f" ({', '.join(item.what)})" if item.what else ""
    moved = f", it stood at {item.left + 1}" if item.moved and item.left is not None else ""
    head = f"    cell {(place or 0) + 1} (id {words.visible(item.id)}) {item.kind}{what}{moved}"
    return [head, *_indented(line_words(item.lines, most=MOST_LINES))]


def _output(item: OutputsOf) -> list[str]:
    lines = []
    for change in item.changes:
        head = f"    cell {item.cell + 1} (id {words.visible(item.id)}), output {change.number + 1} {change.kind}"
        if change.lines:
            lines += [head, *_indented(line_words(change.lines, most=MOST_LINES))]
        else:
            lines.append(f"{head}: {words.visible(change.left or 'none')} → {words.visible(change.right or 'none')}")
    return lines


def _indented(lines: Iterator[str]) -> list[str]:
    return [f"      {line}" for line in lines]
