"""Two notebooks cell by cell: which cells are the same, changed, moved, added or removed, and in which lines. Floor 3.

Pure: notebooks go in as plain JSON values. Cells are matched by id, then by content, then by their place between cells
that match, so that a notebook whose ids were written anew is not one in which everything was replaced. Text is compared
line by line; what is long is cut where it is shown, and the cut is counted.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import hashlib
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_audit_nb.records.normal_form import INJECTED_TAG, canonical_json, without_markers

__all__ = [
    "CellChange",
    "Line",
    "OutputChange",
    "cell_text",
    "compare_cells",
    "compare_outputs",
    "compare_text",
]

Kind = Literal["same", "changed", "moved", "added", "removed"]

CONTEXT = 2
MOST_LINES = 400
"""Lines of one comparison that are kept."""
MOST_CHARACTERS = 400
"""Characters of one line that are kept."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
"""A terminal's colours, in which IPython writes tracebacks."""
_MOST_MATCHED = 4_000
_MOST_PAIRS = 40_000
"""Lines, and pairs of equal ones, up to which texts are matched line by line: no text may keep a reader waiting."""


@dataclass(frozen=True)
class Line:
    """One line of a comparison.

    Attributes:
        sign: ``" "`` in both, ``"-"`` on the left alone, ``"+"`` on the right alone, ``"…"`` where lines are left out
            (``text`` then says how many).
        left: its number on the left, from 1; ``None`` where it is not there.
        right: its number on the right.
        text: the line without its end.
    """

    sign: str
    text: str
    left: int | None = None
    right: int | None = None


@dataclass(frozen=True, kw_only=True)
class CellChange:
    """One cell on two sides.

    Attributes:
        kind: ``moved`` only where nothing else changed; a changed cell that moved is ``changed``.
        id: of the cell on the right, or of the one that was removed.
        type: ``code``, ``markdown`` or ``raw``, likewise.
        left: its place on the left, from 0; ``None`` where it was added.
        right: its place on the right.
        moved: whether it stands in another order among the cells that both have.
        what: what is not the same: ``source``, ``type``, ``tags``, ``attachments``.
        lines: how its source differs.
    """

    kind: Kind
    id: str
    type: str
    left: int | None
    right: int | None
    moved: bool = False
    what: tuple[str, ...] = ()
    lines: tuple[Line, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OutputChange:
    """One output on two sides.

    Attributes:
        number: its place among the cell's outputs, from 0.
        kind: ``changed``, ``added`` or ``removed``.
        left: in words what it was: its type, and of what is no text the size and the SHA-256.
        right: what it is.
        lines: how it differs, where both are text.
    """

    number: int
    kind: Kind
    left: str
    right: str
    lines: tuple[Line, ...] = ()


# -- text -----------------------------------------------------------------------------------------------------------


def compare_text(left: str, right: str, *, most: int = MOST_LINES) -> tuple[Line, ...]:
    """How two texts differ, with `CONTEXT` lines round each difference; nothing where they are equal."""
    if left == right:
        return ()
    before, after = _lines(left), _lines(right)
    found = [*(_grouped(before, after) if _is_cheap(before, after) else _around(before, after))]
    if len(found) <= most:
        return tuple(found)
    return (*found[:most], Line("…", f"{len(found) - most} more lines of this comparison"))


def _lines(text: str) -> list[str]:
    """Lines by line feed alone: other separators are characters of a line, and are shown as such."""
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
        return lines
    return [*lines[:-1], lines[-1] + _NO_END] if lines else lines


def _is_cheap(before: Sequence[str], after: Sequence[str]) -> bool:
    if len(before) + len(after) > _MOST_MATCHED:
        return False
    counts = Counter(after)
    return sum(counts[line] for line in before) <= _MOST_PAIRS


_NO_END = "\u241e"  # marks, for comparing alone, a last line without a line feed
_END_WORDS = " (no line feed at the end)"


def _cut(line: str, *, told: bool) -> str:
    text = line.removesuffix(_NO_END)
    end = _END_WORDS if told and line != text else ""
    if len(text) > MOST_CHARACTERS:
        text = f"{text[:MOST_CHARACTERS]}… ({len(text) - MOST_CHARACTERS} more characters)"
    return text + end


def _grouped(before: Sequence[str], after: Sequence[str]) -> Iterator[Line]:
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    # Only a difference in the line feed itself needs words for it.
    told = [line.removesuffix(_NO_END) for line in before[-1:]] == [line.removesuffix(_NO_END) for line in after[-1:]]
    end = 0
    for group in matcher.get_grouped_opcodes(CONTEXT):
        start = group[0][1]
        if start > end:
            yield Line("…", f"{start - end} equal {'line' if start - end == 1 else 'lines'}")
        for tag, i1, i2, j1, j2 in group:
            if tag == "equal":
                for offset in range(i2 - i1):
                    yield Line(" ", _cut(before[i1 + offset], told=False), i1 + offset + 1, j1 + offset + 1)
                continue
            for i in range(i1, i2):
                yield Line("-", _cut(before[i], told=told), i + 1, None)
            for j in range(j1, j2):
                yield Line("+", _cut(after[j], told=told), None, j + 1)
        end = group[-1][2]
    if len(before) > end:
        yield Line("…", f"{len(before) - end} equal {'line' if len(before) - end == 1 else 'lines'}")


def _around(before: Sequence[str], after: Sequence[str]) -> Iterator[Line]:
    """What is too long to be matched line by line: all between the first and the last line that differ."""
    start = next((i for i, (one, other) in enumerate(zip(before, after, strict=False)) if one != other), None)
    first = min(len(before), len(after)) if start is None else start
    last = 0
    while last < min(len(before), len(after)) - first and before[-1 - last] == after[-1 - last]:
        last += 1
    if first:
        yield Line("…", f"{first} equal lines")
    for i in range(first, len(before) - last):
        yield Line("-", _cut(before[i], told=False), i + 1, None)
    for j in range(first, len(after) - last):
        yield Line("+", _cut(after[j], told=False), None, j + 1)
    if last:
        yield Line("…", f"{last} equal lines")


# -- cells ----------------------------------------------------------------------------------------------------------


def cell_text(cell: Mapping[str, Any]) -> str:
    """A cell's source, given as text or as a list of lines."""
    return _text(cell.get("source", ""))


def _text(value: Any) -> str:
    return "".join(map(str, value)) if isinstance(value, list) else str(value)


def _tags(cell: Mapping[str, Any]) -> list[str]:
    metadata = cell.get("metadata")
    tags = metadata.get("tags") if isinstance(metadata, dict) else None
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


Cells = list[tuple[int, Mapping[str, Any]]]
Pairs = list[tuple[int, int]]
"""Places in two lists of cells that belong together."""


def compare_cells(left: Mapping[str, Any], right: Mapping[str, Any], *, injected: bool = False) -> list[CellChange]:
    """All cells of two notebooks, in the order of the right one, those that were removed where they stood.

    Args:
        left: a notebook, as plain JSON.
        right: another.
        injected: also the cell with the injected parameters, which follows from the parameters.
    """
    before, after = _counted(left, injected=injected), _counted(right, injected=injected)
    pairs = _matched(before, after)
    kept = _in_order(pairs)
    partner = {j: i for i, j in pairs}
    found = [
        _compare_cell(before[partner[j]], cell, moved=(partner[j], j) not in kept)
        if j in partner
        else _alone("added", cell)
        for j, cell in enumerate(after)
    ]
    matched = {i for i, _ in pairs}
    for i in range(len(before)):
        if i not in matched:
            found.insert(_place_of_removed(before[i][0], found), _alone("removed", before[i]))
    return found


def _counted(notebook: Mapping[str, Any], *, injected: bool) -> Cells:
    """The cells with their places, without papermill's error markers, which stand for no cell of the notebook."""
    return [(i, cell) for i, cell in without_markers(notebook["cells"]) if injected or INJECTED_TAG not in _tags(cell)]


def _content(cell: Mapping[str, Any]) -> tuple[str, str]:
    return str(cell.get("cell_type")), cell_text(cell)


def _matched(before: Cells, after: Cells) -> Pairs:
    """By id, by content, and by place between the cells that match."""
    pairs = _by(lambda item: item[1].get("id"), before, after, [])
    pairs = _by(lambda item: _content(item[1]), before, after, pairs)
    return _by_gap(before, after, pairs)


def _by(key: Any, before: Cells, after: Cells, pairs: Pairs) -> Pairs:
    taken, given = {i for i, _ in pairs}, {j for _, j in pairs}
    waiting: dict[Any, list[int]] = {}
    for i, item in enumerate(before):
        if i not in taken and (name := key(item)) is not None:
            waiting.setdefault(name, []).append(i)
    more = []
    for j, item in enumerate(after):
        found = waiting.get(key(item)) if j not in given else None
        if found:
            more.append((found.pop(0), j))
    return [*pairs, *more]


def _by_gap(before: Cells, after: Cells, pairs: Pairs) -> Pairs:
    """Cells of one type that stand alone, as many on either side, between the same neighbours."""
    order = sorted(_in_order(pairs))
    taken, given = {i for i, _ in pairs}, {j for _, j in pairs}
    more: Pairs = []
    start = (-1, -1)
    for end in [*order, (len(before), len(after))]:
        ones = [i for i in range(start[0] + 1, end[0]) if i not in taken]
        others = [j for j in range(start[1] + 1, end[1]) if j not in given]
        types = [
            [str(side[k][1].get("cell_type")) for k in places] for side, places in ((before, ones), (after, others))
        ]
        if types[0] == types[1]:
            more += zip(ones, others, strict=True)
        start = end
    return [*pairs, *more]


def _in_order(pairs: Pairs) -> set[tuple[int, int]]:
    """The longest run of pairs that stand in one order on both sides; the others moved."""
    ordered = sorted(pairs, key=lambda pair: pair[1])
    tails: list[int] = []
    at: list[int] = []
    back: list[int | None] = []
    for k, (i, _) in enumerate(ordered):
        place = bisect_left(tails, i)
        back.append(at[place - 1] if place else None)
        tails[place : place + 1] = [i]
        at[place : place + 1] = [k]
    found: set[tuple[int, int]] = set()
    k_: int | None = at[-1] if at else None
    while k_ is not None:
        found.add(ordered[k_])
        k_ = back[k_]
    return found


def _compare_cell(before: tuple[int, Any], after: tuple[int, Any], *, moved: bool) -> CellChange:
    (i, one), (j, other) = before, after
    what = []
    if cell_text(one) != cell_text(other):
        what.append("source")
    if one.get("cell_type") != other.get("cell_type"):
        what.append("type")
    if _tags(one) != _tags(other):
        what.append("tags")
    if canonical_json(one.get("attachments") or {}) != canonical_json(other.get("attachments") or {}):
        what.append("attachments")
    kind: Kind = "changed" if what else "moved" if moved else "same"
    lines = compare_text(cell_text(one), cell_text(other)) if "source" in what else ()
    return CellChange(
        kind=kind,
        id=str(other.get("id", "")),
        type=str(other.get("cell_type", "")),
        left=i,
        right=j,
        moved=moved,
        what=tuple(what),
        lines=lines,
    )


def _alone(kind: Literal["added", "removed"], item: tuple[int, Any]) -> CellChange:
    place, cell = item
    text = cell_text(cell)
    return CellChange(
        kind=kind,
        id=str(cell.get("id", "")),
        type=str(cell.get("cell_type", "")),
        left=place if kind == "removed" else None,
        right=place if kind == "added" else None,
        lines=compare_text("", text) if kind == "added" else compare_text(text, ""),
    )


def _place_of_removed(place: int, found: Sequence[CellChange]) -> int:
    """Behind the last cell that stood before it on the left and has not moved."""
    behind = [k for k, item in enumerate(found) if item.left is not None and item.left < place and not item.moved]
    return behind[-1] + 1 if behind else 0


# -- outputs --------------------------------------------------------------------------------------------------------


def compare_outputs(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[OutputChange]:
    """The outputs of one cell on two sides that are not the same; a count of executions is no difference."""
    before, after = _outputs(left), _outputs(right)
    found = []
    for number in range(max(len(before), len(after))):
        one = before[number] if number < len(before) else None
        other = after[number] if number < len(after) else None
        if one is None and other is not None:
            found.append(OutputChange(number=number, kind="added", left="", right=_described(other)))
        elif one is not None and other is None:
            found.append(OutputChange(number=number, kind="removed", left=_described(one), right=""))
        elif one is not None and other is not None and _plain(one) != _plain(other):
            lines = _compare_shown(_shown_text(one) or "", _shown_text(other) or "")
            found.append(
                OutputChange(number=number, kind="changed", left=_described(one), right=_described(other), lines=lines)
            )
    return found


def _compare_shown(before: str, after: str) -> tuple[Line, ...]:
    """Lines of two outputs without the colours of a terminal, unless these are all that differs."""
    plain, other = _COLOUR.sub("", before), _COLOUR.sub("", after)
    return compare_text(before, after) if plain == other else compare_text(plain, other)


def _outputs(cell: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    outputs = cell.get("outputs")
    return [item for item in outputs if isinstance(item, dict)] if isinstance(outputs, list) else []


def _plain(output: Mapping[str, Any]) -> bytes:
    """What of an output is compared: all but the count, lists of lines joined."""
    plain = {name: value for name, value in output.items() if name != "execution_count"}
    if isinstance(plain.get("data"), dict):
        plain["data"] = {mime: _joined(value) for mime, value in plain["data"].items()}
    return canonical_json({name: _joined(value) for name, value in plain.items()})


def _joined(value: Any) -> Any:
    return (
        "".join(value) if isinstance(value, list) and value and all(isinstance(item, str) for item in value) else value
    )


def _shown_text(output: Mapping[str, Any]) -> str | None:
    """An output's text, ``None`` where it has none."""
    kind = output.get("output_type")
    if kind == "stream":
        return _text(output.get("text", ""))
    if kind == "error":
        trace = output.get("traceback")
        return (
            "\n".join(map(str, trace))
            if isinstance(trace, list) and trace
            else f"{output.get('ename')}: {output.get('evalue')}"
        )
    data = output.get("data")
    if not isinstance(data, dict):
        return None
    for mime in ("text/plain", "text/markdown", "text/html"):
        if mime in data:
            return _text(data[mime])
    return None


def _described(output: Mapping[str, Any]) -> str:
    """An output in words: a stream or an error by name, a bundle by its types, pictures by size and digest."""
    kind = output.get("output_type")
    if kind == "stream":
        return f"{output.get('name', 'stream')}, {_characters(output.get('text', ''))}"
    if kind == "error":
        return f"error {output.get('ename', '')}"
    data = output.get("data")
    if not isinstance(data, dict) or not data:
        return str(kind)
    return "; ".join(_of_mime(mime, value) for mime, value in sorted(data.items()))


def _characters(value: Any) -> str:
    count = len(_text(value))
    return f"{count:,} {'character' if count == 1 else 'characters'}"


def _of_mime(mime: str, value: Any) -> str:
    if mime.startswith("text/"):
        return f"{mime}, {_characters(value)}"
    data = _bytes(value)
    return f"{mime}, {len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()}"


def _bytes(value: Any) -> bytes:
    """What a bundle holds under one type: base64 decoded where it is, so that the digest is that of the picture."""
    joined = _joined(value)
    if not isinstance(joined, str):
        return canonical_json(joined)
    try:
        return base64.b64decode("".join(joined.split()), validate=True)
    except (binascii.Error, ValueError):
        return joined.encode("utf-8", "surrogatepass")
