"""A comparison of records for people: lines for a terminal, one HTML page, a view for notebooks. Floor 4.

What is compared is in `records.diff`; here its values become text. Numbers are shown in full, since two that differ
must not look the same, and of long texts the part is shown in which they differ. Whatever stands in a record is shown
as text: characters that a terminal would obey are written out, and the page holds no markup but its own.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.compliance import words
from rlhf_audit_nb.compliance.templates import template_path
from rlhf_audit_nb.errors import ReportError
from rlhf_audit_nb.records.diff import DIFFERENT, RecordDiff, RecordTable, Row, SeriesPair, Side, TableRow
from rlhf_audit_nb.records.diff_facts import SECTIONS
from rlhf_audit_nb.reports.figures import Figure, svg_of
from rlhf_audit_nb.reports.html import GENERATOR, page_style

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rlhf_audit_nb.records.cell_diff import Line

__all__ = ["DiffView", "diff_words", "line_words", "pair_text", "render_diff", "table_words", "value_text"]

NOT_THERE = "—"
SEALED = "sealed"
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MOST = 160
_BEFORE = 24
_PLACE = 34
_WIDTH = 100
_MOST_LINES = 40
_MOST_FIGURES = 8
_MOST_POINTS = 320
_FIGURE = 320
_FIRST = ("epsilon", "loss", "private_loss")
_SIGNS = {"changed": "~", "added": "+", "removed": "-", "moved": "↕", "sealed": "?", "expected": "·", "same": "="}
_STATES = {"changed": "live", "added": "ok", "removed": "bad", "moved": "attest", "sealed": "na", "expected": "na",
           "same": "na"}  # fmt: skip
_KIND_WORDS = {"expected": "of each execution", "same": "equal", "sealed": "cannot be compared"}


# -- values -----------------------------------------------------------------------------------------------------------


def value_text(value: Any, *, short: bool = True) -> str:
    """A recorded value as one line of text, numbers in full; digests shortened in the middle where ``short``."""
    return " ".join(words.visible(_plain(value, short=short)).split("\n"))


def _plain(value: Any, *, short: bool) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return words.short(value) if short and _DIGEST.fullmatch(value) else value
    if isinstance(value, dict) and "last" in value and "values" in value:
        return _series_text(value, short=short)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item, short=short)}" for name, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item, short=short) for item in value) or "none"
    return repr(value)


def _series_text(value: dict[str, Any], *, short: bool) -> str:
    said = _plain(value["last"], short=short)
    if value.get("step") is not None:
        said += f" at step {value['step']}"
    if "lowest" in value and value["lowest"] != value["highest"]:
        said += f" (from {words.number_text(value['lowest'])} to {words.number_text(value['highest'])})"
    return said


def pair_text(left: Any, right: Any, *, most: int = _MOST) -> tuple[str, str]:
    """Two values as text that differs where they do; each at most about ``most`` characters."""
    one, other = value_text(left), value_text(right)
    if one == other and left != right:
        one, other = value_text(left, short=False), value_text(right, short=False)
    if len(one) <= most and len(other) <= most:
        return one, other
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, at - _BEFORE) if one != other and at > most - _BEFORE else 0
    return _window(one, start, most), _window(other, start, most)


def _window(text: str, start: int, most: int) -> str:
    part = text[start : start + most]
    more = len(text) - start - len(part)
    return ("…" if start else "") + part + (f"… ({words.count(more)} more characters)" if more > 0 else "")


@dataclass(frozen=True)
class _Shown:
    """A row as it is shown."""

    place: str
    kind: str
    left: str
    right: str
    note: str
    lines: tuple[Line, ...]


def _shown(row: Row, *, runs: bool) -> _Shown:
    left, right = pair_text(*(_without_range(row, value) for value in (row.left, row.right)))
    if row.kind == "sealed":
        left, right = (SEALED if value is None else text for value, text in ((row.left, left), (row.right, right)))
    else:
        left = NOT_THERE if row.kind == "added" else left
        right = NOT_THERE if row.kind == "removed" else right
    if row.section == "code" or (row.lines and row.section == "outputs"):
        left = right = ""
    place = f"{row.run}: {row.place}" if runs and row.run and row.place != "run" else row.place
    return _Shown(words.visible(place), row.kind, left, right, words.visible(row.note), row.lines)


def _without_range(row: Row, value: Any) -> Any:
    """An ε is shown in full, or not at all: its last value is its largest, and a range is rounded."""
    if row.place != "epsilon" or not isinstance(value, dict):
        return value
    return {name: item for name, item in value.items() if name not in ("lowest", "highest")}


def _has_runs(diff: RecordDiff) -> bool:
    """Whether there are several runs, so that each row must say whose it is."""
    return len({row.run for row in diff.rows if row.run}) > 1


# -- a terminal -------------------------------------------------------------------------------------------------------


def diff_words(diff: RecordDiff, *, everything: bool = False) -> list[str]:
    """The comparison as lines for a terminal: differences alone, or all that was compared."""
    lines = [*_side_words("left", diff.left), *_side_words("right", diff.right)]
    runs = _has_runs(diff)
    for name, title in SECTIONS.items():
        rows = [_shown(row, runs=runs) for row in diff.shown(everything=everything) if row.section == name]
        if not rows:
            continue
        lines += ["", title]
        for row in rows:
            if row.kind != "sealed":
                lines += _row_words(row, everything=everything)
        lines += _sealed_words([row.place for row in rows if row.kind == "sealed"])
    return [*lines, "", *_sum_words(diff, everything=everything)]


def _side_words(which: str, side: Side) -> Iterator[str]:
    when = f", {words.time_text(side.finished)}" if side.finished is not None else ""
    record = f", record {words.short(side.record)}" if side.record else ""
    yield f"{which:<7}{words.visible(side.name)}  {side.level}{record}{when}"
    if side.claimed:
        yield "       It does not verify: what follows is only what the file claims, and no evidence."
        yield from (f"       {words.visible(reason)}" for reason in side.reasons[:3])


def _row_words(row: _Shown, *, everything: bool) -> Iterator[str]:
    sign = _SIGNS[row.kind]
    note = f"  ({row.note})" if row.note else ""
    if row.kind == "same" and not row.lines:
        yield f"  {sign} {row.place}" + (f"  {row.left}" if row.left else "") + note
        return
    if row.kind in ("added", "removed") and (row.left or row.right):
        value = row.right if row.kind == "added" else row.left
        line = f"  {sign} {row.place:<{_PLACE}}  {value}{note}"
        yield from (line,) if len(line) <= _WIDTH else (f"  {sign} {row.place}{note}", f"      {value}")
        yield from (f"      {text}" for text in line_words(row.lines, most=None if everything else _MOST_LINES))
        return
    if not row.left and not row.right:
        yield f"  {sign} {row.place} {row.kind}{note}"
    else:
        line = f"  {sign} {row.place:<{_PLACE}}  {row.left} → {row.right}{note}"
        if len(line) <= _WIDTH:
            yield line
        else:
            yield f"  {sign} {row.place}{note}"
            yield f"      {row.left}"
            yield f"    → {row.right}"
    yield from (f"      {line}" for line in line_words(row.lines, most=None if everything else _MOST_LINES))


def line_words(lines: Sequence[Line], *, most: int | None = _MOST_LINES) -> Iterator[str]:
    """The lines of a text's comparison, each with its sign, at most ``most`` of them."""
    kept = lines if most is None or len(lines) <= most else lines[:most]
    for line in kept:
        yield words.visible(f"{line.sign} {line.text}".rstrip()).replace("\t", "    ")
    if len(lines) > len(kept):
        yield f"… {len(lines) - len(kept)} more lines"


def _sealed_words(places: Sequence[str]) -> list[str]:
    if not places:
        return []
    return _wrapped(f"? sealed, cannot be compared: {', '.join(_gathered(places))}", "  ", "    ")


def _gathered(places: Sequence[str]) -> list[str]:
    """Places, those that share all but their last part as one."""
    groups: dict[str, list[str]] = {}
    for place in places:
        start, dot, _ = place.rpartition(".")
        groups.setdefault(start + dot if start.count(".") else place, []).append(place)
    return [found[0] if len(found) == 1 else f"{start}* ({len(found)})" for start, found in groups.items()]


def _wrapped(text: str, first: str = "", others: str = "") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def _sum_words(diff: RecordDiff, *, everything: bool) -> list[str]:
    counts = diff.counts()
    equal = counts.get("same", 0)
    differing = len(diff.differences)
    said = words.plural(differing, "difference") if differing else "No difference"
    said += f"; {words.plural(equal, 'thing is', 'things are')} equal"
    if counts.get("sealed"):
        said += f", {words.plural(counts['sealed'], 'is', 'are')} sealed and cannot be compared"
    if counts.get("expected"):
        said += f", {words.plural(counts['expected'], 'differs', 'differ')} between any two executions"
    return _wrapped(said + ("." if everything else " (--all shows them)."))


def table_words(table: RecordTable, *, everything: bool = False) -> list[str]:
    """Several records as lines for a terminal: each by its number, then what differs, one line for each value."""
    lines: list[str] = []
    for number, side in enumerate(table.sides, 1):
        lines += _side_words(str(number), side)
    runs = len({row.run for row in table.rows if row.run}) > 1
    rows = table.shown(everything=everything)
    for name, title in SECTIONS.items():
        found = [row for row in rows if row.section == name]
        if not found:
            continue
        lines += ["", title]
        for row in found:
            place = words.visible(f"{row.run}: {row.place}" if runs and row.run else row.place)
            lines += _values_words(place, row)
    differing = sum(row.kind == "changed" for row in table.rows)
    said = f"{words.plural(differing, 'thing')} not the same in all of them" if differing else "No difference"
    sealed = sum(row.kind == "sealed" for row in table.rows)
    more = f"; {words.plural(sealed, 'thing')} sealed, which cannot be compared" if sealed else ""
    return [*lines, "", *_wrapped(f"{said}{more}" + ("." if everything else " (--all shows everything)."))]


def _values_words(place: str, row: TableRow) -> Iterator[str]:
    texts = [
        SEALED if sealed else _window(value_text(value), 0, _MOST) if value is not None else NOT_THERE
        for value, sealed in zip(row.values, row.sealed, strict=True)
    ]
    line = f"  {place:<{_PLACE}}  {' | '.join(texts)}"
    if len(line) <= _WIDTH:
        yield line
        return
    yield f"  {place}"
    yield from (f"      {number}  {text}" for number, text in enumerate(texts, 1))


# -- a page -----------------------------------------------------------------------------------------------------------


def render_diff(diff: RecordDiff) -> str:
    """The comparison as one HTML page: no link out, no script, the same bytes for the same comparison."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder, look = template_path("diff"), template_path("nbconvert", "audit-html")
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = "".join(
        path.read_text(encoding="utf-8") for path in (look / "tokens.css", look / "report.css", folder / "diff.css")
    )
    footer = f"{diff.left.name} and {diff.right.name}"
    page = environment.get_template("index.html.j2").render(
        d=_page(diff),
        # The style sheet is ours; what it quotes is escaped for CSS in page_style.
        css=Markup(css + page_style(footer)),  # noqa: S704
        generator=GENERATOR,
        title=f"What differs: {words.visible(footer)}",
    )
    return page + "\n"


def _page(diff: RecordDiff) -> dict[str, Any]:
    counts = diff.counts()
    return {
        "sides": [_side(diff.left), _side(diff.right)],
        "tiles": [
            (words.count(len(diff.differences)), "differences", "warn" if diff.differs else ""),
            (words.count(counts.get("same", 0)), "equal things", ""),
            (words.count(counts.get("sealed", 0)), "sealed, cannot be compared", ""),
            (words.count(counts.get("expected", 0)), "that differ between any two executions", ""),
        ],
        "claimed": diff.claimed,
        "differs": diff.differs,
        "sections": [part for name, title in SECTIONS.items() if (part := _part(diff, name, title)) is not None],
    }


def _side(side: Side) -> dict[str, Any]:
    level = words.level_words(side.level)
    return {
        "name": words.visible(side.name),
        "level": side.level,
        "state": level.state,
        "shows": level.shows,
        "reasons": [words.visible(reason) for reason in side.reasons] if side.claimed else [],
        "record": side.record,
        "trail": words.visible(side.origin),
        "finished": words.time_text(side.finished) if side.finished is not None else "not sealed",
    }


def _part(diff: RecordDiff, name: str, title: str) -> dict[str, Any] | None:
    runs = _has_runs(diff)
    rows = [_shown(row, runs=runs) for row in diff.rows if row.section == name]
    if not rows:
        return None
    told = [row for row in rows if row.kind in DIFFERENT]
    return {
        "id": name,
        "title": title,
        "rows": [_cells(row) for row in told if not row.lines],
        "texts": [{**_cells(row), "pairs": _side_by_side(row.lines)} for row in told if row.lines],
        "sealed": _gathered([row.place for row in rows if row.kind == "sealed"]),
        "equal": [_cells(row) for row in rows if row.kind in ("same", "expected")],
        "figures": _figures(diff) if name == "metrics" else [],
    }


def _cells(row: _Shown) -> dict[str, Any]:
    return {
        "place": row.place,
        "left": row.left,
        "right": row.right,
        "note": row.note,
        "kind": _KIND_WORDS.get(row.kind, row.kind),
        "state": _STATES[row.kind],
    }


def _side_by_side(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Lines in two columns: what was replaced stands beside what replaced it."""
    pairs: list[dict[str, Any]] = []
    gone: list[Line] = []
    come: list[Line] = []

    def close() -> None:
        for i in range(max(len(gone), len(come))):
            one, other = (part[i] if i < len(part) else None for part in (gone, come))
            pairs.append({"kind": "change", "left": _numbered(one), "right": _numbered(other)})
        gone.clear()
        come.clear()

    for line in lines:
        if line.sign == "-":
            gone.append(line)
        elif line.sign == "+":
            come.append(line)
        else:
            close()
            kind = "gap" if line.sign == "…" else "equal"
            text = words.visible(line.text)
            pairs.append({"kind": kind, "left": (line.left, text), "right": (line.right, text)})
    close()
    return pairs


def _numbered(line: Line | None) -> tuple[int | None, str] | None:
    return None if line is None else (line.left or line.right, words.visible(line.text))


def _figures(diff: RecordDiff) -> list[Figure]:
    parted = [pair for pair in diff.series if pair.parted is not None and _drawn(pair) is not None]
    parted.sort(key=lambda pair: (pair.run, _FIRST.index(pair.name) if pair.name in _FIRST else len(_FIRST)))
    runs = _has_runs(diff)
    return [_figure(pair, f"diff{i}", runs=runs) for i, pair in enumerate(parted[:_MOST_FIGURES])]


Points = list[dict[str, Any]]


def _drawn(pair: SeriesPair) -> tuple[Points, Points] | None:
    """Both sides' points as they are drawn; ``None`` where a side has fewer than two numbers."""
    sides = []
    for name, points in (("left", pair.left), ("right", pair.right)):
        numbers = [
            {"step": step, "value": value, "side": name}
            for step, value in points
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        if len(numbers) < 2:  # noqa: PLR2004  a line has two ends
            return None
        last = len(numbers) - 1
        kept = range(len(numbers)) if last < _MOST_POINTS else [
            round(i * last / (_MOST_POINTS - 1)) for i in range(_MOST_POINTS)
        ]  # fmt: skip
        sides.append([numbers[i] for i in kept])
    return sides[0], sides[1]


def _figure(pair: SeriesPair, key: str, *, runs: bool) -> Figure:
    import altair as alt

    drawn = _drawn(pair)
    assert drawn is not None  # the callers chose those that can be drawn
    name = words.visible(pair.name)
    span = max(points[-1]["step"] for points in drawn) - min(points[0]["step"] for points in drawn)
    lines = []
    for points, colour, dash in ((drawn[0], "#0f5e7a", [1, 0]), (drawn[1], "#8f5200", [5, 3])):
        base = alt.Chart(alt.Data(values=points)).encode(
            x=alt.X(
                "step:Q",
                title="optimizer step",
                axis=alt.Axis(grid=False, tickCount=max(1, min(6, span)), tickMinStep=1, format="~d"),
            ),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4, format="~g")),
        )
        lines.append(base.mark_line(color=colour, strokeDash=dash, strokeWidth=1.8))
        end = alt.Chart(alt.Data(values=points[-1:])).mark_text(align="left", dx=5, color=colour)
        lines.append(end.encode(x="step:Q", y="value:Q", text="side:N"))
    chart = alt.layer(*lines).properties(width=_FIGURE, height=140)
    title = f"{pair.run}: {name}" if runs else name
    ends = [points[-1]["value"] for points in drawn]
    said = (
        f"{title} ends at {ends[0]!r} on the left (solid) and at {ends[1]!r} on the right (dashed); "
        f"they part at step {pair.parted}."
    )
    return Figure(key, words.visible(title), svg_of(chart, key), words.visible(said), ())


class DiffView:
    """A comparison that shows itself in a notebook and saves itself as HTML or JSON."""

    def __init__(self, diff: RecordDiff) -> None:
        self.diff = diff

    @property
    def differs(self) -> bool:
        """Whether there is any difference."""
        return self.diff.differs

    def words(self, *, everything: bool = False) -> list[str]:
        """The comparison as lines for people."""
        return diff_words(self.diff, everything=everything)

    def html(self) -> str:
        """The comparison as one HTML page."""
        return render_diff(self.diff)

    def to_dict(self, *, everything: bool = False) -> dict[str, Any]:
        """Plain values."""
        return self.diff.to_dict(everything=everything)

    def save(self, path: Path | str) -> Path:
        """Write the page; a file's path is returned.

        Raises:
            ReportError: the name does not end in ``.html``, or it cannot be written.
        """
        target = Path(path)
        if target.suffix.lower() not in (".html", ".htm"):
            raise ReportError(f"{target} is no HTML file's name.", next_step="Name a file that ends in .html.")
        try:
            target.write_text(self.html(), encoding="utf-8")
        except OSError as error:
            raise ReportError(
                f"{target} cannot be written: {error.strerror or error}.", next_step="Name another file.", code="output"
            ) from error
        return target

    def __repr__(self) -> str:
        return "\n".join(self.words())
