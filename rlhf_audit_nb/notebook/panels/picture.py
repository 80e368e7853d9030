"""The frozen panel as a picture: the view drawn as SVG, set as PNG. Floor 6.

The same view gives the same bytes: no clock, no random ids, and one font (Liberation Sans), which vl-convert brings
along, so that text is set alike on every machine. Widths of its characters stand below, because chips and line breaks
need them. `frame_epsilon` and `frame_series` say what a chart shows; `draw_chart` draws it, alone or in the picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape

from rlhf_audit_nb.notebook.panels.png import shrink
from rlhf_audit_nb.notebook.panels.words import say_number

__all__ = [
    "DARK",
    "LIGHT",
    "Frame",
    "Theme",
    "chart_svg",
    "frame_epsilon",
    "frame_series",
    "panel_svg",
    "say_means",
    "to_png",
]

View = Mapping[str, Any]
Pair = tuple[float, float]

SCALE = 2.0  # device pixels to a unit
CHART = (320, 122)  # a chart that stands alone, in units
_FONT = "Liberation Sans"
_WIDTH = 980.0
_COLUMNS = (0.0, 345.0, 690.0, _WIDTH)
_PAD = 18.0


@dataclass(frozen=True)
class Theme:
    """The colours of the look, for light or for dark paper; ``tones`` are text and wash of the five states."""

    ink: str
    ink2: str
    ink3: str
    line: str
    paper: str
    wash: str
    accent: str
    plan: str
    tint: str
    tones: Mapping[str, tuple[str, str]]


LIGHT = Theme(
    ink="#1b2430",
    ink2="#4d5a6a",
    ink3="#5f6b7a",
    line="#dfe4ea",
    paper="#ffffff",
    wash="#f5f7f9",
    accent="#0f5e7a",
    plan="#a9cad6",
    tint="#ecf3f5",
    tones={
        "live": ("#0f5e7a", "#e4f1f5"),
        "ok": ("#17704f", "#e3f3ec"),
        "attest": ("#3150b4", "#e8ecfa"),
        "warn": ("#8f5200", "#fcf0de"),
        "bad": ("#b3261e", "#fbe9e7"),
        "na": ("#5f6975", "#eceff2"),
    },
)
DARK = Theme(
    ink="#e8edf2",
    ink2="#b3bfcb",
    ink3="#9aa7b5",
    line="#424c57",
    paper="#161c23",
    wash="#1d252e",
    accent="#6cc0dc",
    plan="#2c5a6b",
    tint="#1b2a33",
    tones={
        "live": ("#6cc0dc", "#163441"),
        "ok": ("#63c69b", "#15362a"),
        "attest": ("#9db2f5", "#222c4d"),
        "warn": ("#e9b063", "#3b2c14"),
        "bad": ("#f2938b", "#43201d"),
        "na": ("#a3adb8", "#28313a"),
    },
)


# text --------------------------------------------------------------------------------------------------------------

# Advance widths of U+0020 to U+007E in thousandths of the size, then of the few others that the words use.
_ASCII = {
    False: "278 "
    "278 355 556 556 889 667 191 333 333 389 584 278 333 278 278 556 556 556 556 556 556 556 556 556 556 278 "
    "278 584 584 584 556 1015 667 667 722 722 667 611 778 722 278 500 667 556 833 722 778 667 778 722 667 611 722 667 "
    "944 667 667 611 278 278 278 469 556 333 556 556 500 556 556 278 556 556 222 222 500 222 833 556 556 556 556 333 "
    "500 278 556 500 722 500 500 500 334 260 334 584",
    True: "278 333 474 556 556 889 722 238 333 333 389 584 278 333 278 278 556 556 556 556 556 556 556 556 556 556 333 "
    "333 584 584 584 611 975 722 722 722 722 667 611 778 722 278 556 722 611 833 722 778 667 778 722 667 611 722 667 "
    "944 667 667 611 333 278 333 584 556 333 556 611 556 611 556 333 611 611 278 278 556 278 889 611 611 611 611 389 "
    "556 333 611 556 778 556 556 500 389 280 389 584",
}
_OTHERS = {"ε": 475, "δ": 606, "σ": 684, "…": 1000, "·": 278, "−": 584, "–": 556, "∞": 713}
_ADVANCE = {
    bold: {**_OTHERS, **{chr(32 + i): int(width) for i, width in enumerate(widths.split())}}
    for bold, widths in _ASCII.items()
}
_RAISED = dict(zip("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "−0123456789", strict=True))
_RAISED_SIZE = 0.68


def _measure(text: str, size: float, *, bold: bool = False) -> float:
    """Width of a line in units; a character that is not in the table counts as a wide one."""
    table = _ADVANCE[bold]
    total = 0.0
    for char in text:
        raised = _RAISED.get(char)
        total += table.get(raised, 600) * _RAISED_SIZE if raised else table.get(char, 700)
    return total * size / 1000


def _wrap(text: str, width: float, size: float) -> list[str]:
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if line and _measure(longer, size) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line] if line else lines


def _cut(text: str, width: float, size: float, *, bold: bool = False) -> str:
    """The text, shortened in its middle until it fits."""
    if _measure(text, size, bold=bold) <= width:
        return text
    keep = len(text)
    while keep > 2:  # noqa: PLR2004 - one character on each side of the ellipsis
        keep -= 1
        short = f"{text[: (keep + 1) // 2]}…{text[len(text) - keep // 2 :]}"
        if _measure(short, size, bold=bold) <= width:
            return short
    return "…"


def _raise(text: str, size: float) -> str:
    """Markup of a line; superscripts, which the font lacks in part, are set as small raised digits."""
    parts: list[str] = []
    run = ""
    for char in [*text, ""]:
        if char and char in _RAISED:
            run += _RAISED[char]
            continue
        if run:
            up, small = round(size * 0.36, 2), round(size * _RAISED_SIZE, 2)
            parts.append(f'<tspan dy="-{up}" font-size="{small}">{run}</tspan><tspan dy="{up}">\u200b</tspan>')
            run = ""
        parts.append(escape(char))
    return "".join(parts)


@dataclass
class _Sheet:
    """SVG in the making."""

    theme: Theme
    parts: list[str] = field(default_factory=list)

    def text(
        self, x: float, y: float, text: str, size: float, *, color: str = "", bold: bool = False, anchor: str = "start"
    ) -> float:
        """A line of text on the baseline ``y``; returns its width."""
        weight = ' font-weight="bold"' if bold else ""
        side = f' text-anchor="{anchor}"' if anchor != "start" else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{color or self.theme.ink}"{weight}{side}>'
            f"{_raise(text, size)}</text>"
        )
        return _measure(text, size, bold=bold)

    def rect(self, x: float, y: float, width: float, height: float, fill: str, *, radius: float = 0) -> None:
        """A filled box."""
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius:g}" fill="{fill}"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, color: str, extra: str = "") -> None:
        """A thin line."""
        self.parts.append(f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{color}" fill="none"{extra}/>')

    def path(self, points: Sequence[Pair], extra: str) -> None:
        """A line through the points."""
        if len(points) > 1:
            steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            self.parts.append(
                f'<path d="M{steps}" fill="none" stroke-linejoin="round" stroke-linecap="round" {extra}/>'
            )

    def chip(self, x: float, y: float, text: str, tone: str, *, right: bool = False) -> float:
        """A pill centred on ``y``, from ``x`` on or ending there; returns its width."""
        color, wash = self.theme.tones.get(tone, self.theme.tones["na"])
        width = _measure(text, 12, bold=True) + 20
        left = x - width if right else x
        self.rect(left, y - 11, width, 22, wash, radius=11)
        self.text(left + 10, y + 4.2, text, 12, color=color, bold=True)
        return width

    def svg(self, width: float, height: float, *, paper: str | None) -> str:
        """The whole document."""
        back = f'<rect width="{width:g}" height="{height:g}" fill="{paper}"/>' if paper else ""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
            f'viewBox="0 0 {width:g} {height:g}" font-family="{_FONT}">{back}{"".join(self.parts)}</svg>'
        )


# charts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """What a chart shows: the line so far, the line ahead, the point between, a limit, and the words on the axes."""

    label: str
    x: Pair
    y: Pair
    behind: Sequence[Pair] = ()
    ahead: Sequence[Pair] = ()
    point: Pair | None = None
    limit: tuple[float | None, str] | None = None
    ticks_x: Sequence[tuple[float, str]] = ()
    ticks_y: Sequence[tuple[float, str]] = ()
    wait: str = ""


def frame_epsilon(view: View, curve: Sequence[Sequence[float]]) -> Frame | None:
    """The chart of ε over the steps; ``None`` where the run has no plan."""
    chart = view["privacy"].get("chart")
    if chart is None:
        return None
    step, steps = chart["step"], chart["steps"]
    here = (float(step), float(chart["spent"])) if chart.get("spent") is not None else None
    mid = [here] if here else []
    ends = [(0.0, "step 0"), (float(step), f"{step:,}"), (float(steps), f"{steps:,}")]
    return Frame(
        label=chart["label"],
        x=(0.0, float(max(steps, 1))),
        y=(0.0, float(chart["top"])),
        behind=[*((t, e) for t, e in curve if t < step), *mid],
        ahead=[*mid, *((t, e) for t, e in curve if t > step)],
        point=here,
        limit=(chart["limit"].get("at"), chart["limit"]["text"]),
        ticks_x=ends,
        ticks_y=[(tick["at"], tick["text"]) for tick in chart["ticks"]],
    )


def frame_series(view: View, series: Mapping[str, Sequence[Sequence[float]]], strides: Mapping[str, int]) -> Frame:
    """The chart of the run's first series (the loss; of a private run, the privatised gradient's norm)."""
    metrics = view["training"].get("metrics") or []
    name = metrics[0]["name"] if metrics else ""
    points = [(float(x), float(y)) for x, y in series.get(name, ())]
    if not points:
        return Frame(label="No series to draw: nothing was recorded.", x=(0, 1), y=(0, 1), wait="nothing was recorded")
    low, high = min(y for _, y in points), max(y for _, y in points)
    pad = (high - low or abs(high) or 1.0) * 0.08
    (x0, y0), (x1, y1) = points[0], points[-1]
    stride = strides.get(name, 1)
    means = f" Each point is the mean of {stride} steps." if stride > 1 else ""
    return Frame(
        label=f"{metrics[0]['label']} from step {x0:,.0f} to {x1:,.0f}: {say_number(y0)} at first, {say_number(y1)} at "
        f"last, between {say_number(low)} and {say_number(high)}.{means}",
        x=(min(x0, x1), max(x1, x0 + 1)),
        y=(low - pad, high + pad),
        behind=points,
        point=points[-1],
        ticks_x=[(x0, f"step {x0:,.0f}"), (x1, f"{x1:,.0f}")][: len(points)],
        ticks_y=[(high, say_number(high)), (low, say_number(low))] if high > low else [(high, say_number(high))],
    )


def say_means(full: View) -> str:
    """What stands beside a chart whose points are means of several steps; empty where each point is one step."""
    metrics = full["view"]["training"].get("metrics") or []
    stride = full["strides"].get(metrics[0]["name"], 1) if metrics else 1
    return f", drawn as means of {stride} steps" if stride > 1 else ""


def _draw_chart(sheet: _Sheet, frame: Frame, x: float, y: float, width: float, height: float) -> None:
    theme = sheet.theme
    left, right, top, floor = x + 40, x + width - 6, y + 16, y + height - 18
    span_x, span_y = (frame.x[1] - frame.x[0]) or 1.0, (frame.y[1] - frame.y[0]) or 1.0

    def place(point: Pair) -> Pair:
        return (
            left + (point[0] - frame.x[0]) / span_x * (right - left),
            floor - (point[1] - frame.y[0]) / span_y * (floor - top),
        )

    behind = [place(point) for point in frame.behind]
    sheet.line(left, floor + 0.5, right, floor + 0.5, theme.line)
    if len(behind) > 1:
        area = "L".join(f"{px:.1f} {py:.1f}" for px, py in behind)
        sheet.parts.append(
            f'<path d="M{area}L{behind[-1][0]:.1f} {floor:.1f}L{behind[0][0]:.1f} {floor:.1f}Z" fill="{theme.tint}"/>'
        )
    _draw_limit(sheet, frame, left, right, top, place)
    sheet.path(
        [place(point) for point in frame.ahead], f'stroke="{theme.accent}" stroke-width="1.5" stroke-dasharray="1.5 4"'
    )
    sheet.path(behind, f'stroke="{theme.accent}" stroke-width="2"')
    if frame.point is not None:
        px, py = place(frame.point)
        sheet.parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{theme.accent}"/>')
    if frame.wait:
        sheet.text((left + right) / 2, (top + floor) / 2, frame.wait, 11, color=theme.ink3, anchor="middle")
    for at, text in frame.ticks_y:
        sheet.text(left - 6, place((0, at))[1] + 3.5, text, 10.5, color=theme.ink3, anchor="end")
    _draw_steps(sheet, frame, left, right, floor, place)


def _draw_limit(sheet: _Sheet, frame: Frame, left: float, right: float, top: float, place: Any) -> None:
    if frame.limit is None:
        return
    at, text = frame.limit
    red = sheet.theme.tones["bad"][0]
    height = top - 2 if at is None else place((0, at))[1]
    if at is not None:
        sheet.line(left, height, right, height, red, ' stroke-dasharray="4 3"')
    sheet.text(right, height - 4.5, text, 10.5, color=red, anchor="end")


def _draw_steps(sheet: _Sheet, frame: Frame, left: float, right: float, floor: float, place: Any) -> None:
    room = (right - left) * 0.16
    last = len(frame.ticks_x) - 1
    for index, (at, text) in enumerate(frame.ticks_x):
        px = place((at, 0))[0]
        if 0 < index < last and (px - left < room or right - px < room):
            continue
        anchor = "start" if index == 0 else "end" if index == last else "middle"
        sheet.text(px, floor + 14, text, 10.5, color=sheet.theme.ink3, anchor=anchor)


def chart_svg(frame: Frame, theme: Theme) -> str:
    """The chart alone, without paper, to stand on the page's own."""
    sheet = _Sheet(theme)
    _draw_chart(sheet, frame, 0, 0, *CHART)
    return sheet.svg(*CHART, paper=None)


# the whole picture -------------------------------------------------------------------------------------------------


def panel_svg(full: View, theme: Theme = LIGHT) -> str:
    """The whole panel (`PanelModel.full`) as one picture."""
    view = full["view"]
    sheet = _Sheet(theme)
    top = _draw_head(sheet, view)
    top = _draw_alert(sheet, view, top)
    ends = [
        _draw_privacy(sheet, view, full["curve"], top),
        _draw_training(sheet, view, full, top),
        _draw_integrity(sheet, view, top),
    ]
    bottom = max(ends) + 14
    for x in _COLUMNS[1:-1]:
        sheet.line(x + 0.5, top, x + 0.5, bottom, theme.line)
    height = _draw_foot(sheet, view, bottom)
    sheet.parts.append(
        f'<rect x="0.5" y="0.5" width="{_WIDTH - 1:g}" height="{height - 1:.1f}" rx="10" fill="none" '
        f'stroke="{theme.line}"/>'
    )
    return sheet.svg(_WIDTH, math.ceil(height), paper=theme.paper)


def _draw_head(sheet: _Sheet, view: View) -> float:
    level = sheet.chip(_WIDTH - _PAD, 24, view["level"]["word"], view["level"]["tone"], right=True)
    status = view["status"]
    room = _WIDTH - 3 * _PAD - level - _measure(status["text"], 12, bold=True) - 40
    width = sheet.text(_PAD, 29, _cut(view["title"], room, 15, bold=True), 15, bold=True)
    sheet.chip(_PAD + width + 12, 24, status["text"], status["tone"])
    sheet.line(0, 48.5, _WIDTH, 48.5, sheet.theme.line)
    return 49


def _draw_alert(sheet: _Sheet, view: View, top: float) -> float:
    alert = view.get("alert")
    if not alert:
        return top
    color, wash = sheet.theme.tones["bad"]
    lines: list[tuple[str, bool]] = [(alert["title"], True)]
    for reason in alert["reasons"]:
        said = f"{reason['where']}: {reason['text']}" if reason["where"] else reason["text"]
        lines += [(line, False) for line in _wrap(said, _WIDTH - 2 * _PAD, 13)]
    lines.append((f"{alert['more']}. To look closer: {alert['command']}".lstrip(". "), False))
    height = 18 * len(lines) + 18
    sheet.rect(0, top, _WIDTH, height, wash)
    sheet.rect(0, top, 4, height, color)
    for index, (line, bold) in enumerate(lines):
        y = top + 22 + 18 * index
        sheet.text(_PAD, y, line, 13, bold=bold, color=color if bold else sheet.theme.ink)
    return top + height


def _draw_opening(sheet: _Sheet, card: View, column: int, top: float) -> float:
    """Heading and the large number of a card; returns where the rest begins."""
    left = _COLUMNS[column] + _PAD
    sheet.text(left, top + 25, card["heading"].upper(), 10.5, bold=True, color=sheet.theme.ink3)
    width = sheet.text(left, top + 58, card["big"], 29, bold=True)
    if card["of"]:
        sheet.text(left + width + 8, top + 58, card["of"], 14, color=sheet.theme.ink2)
    return top + 70


def _draw_note(sheet: _Sheet, text: str, column: int, y: float) -> float:
    left, width = _COLUMNS[column] + _PAD, _COLUMNS[column + 1] - _COLUMNS[column] - 2 * _PAD
    for line in _wrap(text, width, 12):
        y += 17
        sheet.text(left, y, line, 12, color=sheet.theme.ink3)
    return y


def _draw_bar(sheet: _Sheet, left: float, y: float, width: float, parts: Sequence[tuple[float, str]]) -> None:
    """A track with marks on it, the longest first."""
    sheet.parts.append(
        f'<rect x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="10" rx="5" fill="{sheet.theme.wash}" '
        f'stroke="{sheet.theme.line}"/>'
    )
    for share, color in parts:
        if share > 0:
            sheet.rect(left, y, max(width * share, 3), 10, color, radius=5 if share > 0.04 else 1.5)  # noqa: PLR2004


def _draw_privacy(sheet: _Sheet, view: View, curve: Sequence[Sequence[float]], top: float) -> float:
    card, theme = view["privacy"], sheet.theme
    left, width = _COLUMNS[0] + _PAD, _COLUMNS[1] - _COLUMNS[0] - 2 * _PAD
    frame = frame_epsilon(view, curve)
    if frame is None:
        sheet.text(left, top + 25, card["heading"].upper(), 10.5, bold=True, color=theme.ink3)
        y = top + 33.0
        for line in _wrap(card["big"], width * 0.92, 19):
            y += 24
            sheet.text(left, y, line, 19, bold=True)
        return _draw_note(sheet, card["note"], 0, y + 6)
    y = _draw_opening(sheet, card, 0, top)
    bar = card["bar"]
    _draw_bar(
        sheet, left, y, width, [(bar["planned"], theme.plan), (bar["now"], theme.accent), (bar["before"], theme.ink3)]
    )
    y += 26
    x = left
    colors = {"before": theme.ink3, "now": theme.accent, "planned": theme.plan}
    for key in card["keys"]:
        taken = 14 + _measure(key["text"], 12)
        if x + taken > left + width and x > left:
            x, y = left, y + 17
        sheet.rect(x, y - 8.5, 9, 9, colors[key["kind"]], radius=2)
        sheet.text(x + 14, y, key["text"], 12, color=theme.ink2)
        x += taken + 12
    _draw_chart(sheet, frame, left, y + 8, width, CHART[1])
    return _draw_note(sheet, card["note"], 0, y + 8 + CHART[1] + 2)


def _draw_training(sheet: _Sheet, view: View, full: View, top: float) -> float:
    card, theme = view["training"], sheet.theme
    left, width = _COLUMNS[1] + _PAD, _COLUMNS[2] - _COLUMNS[1] - 2 * _PAD
    y = _draw_opening(sheet, card, 1, top)
    if card.get("progress") is not None:
        _draw_bar(sheet, left, y, width, [(card["progress"], theme.accent)])
        y += 20
    metrics = card.get("metrics") or []
    if metrics:
        said = f"{metrics[0]['label']} {metrics[0]['value']}{say_means(full)}"
        sheet.text(left, y + 6, said, 12, color=theme.ink2)
    _draw_chart(sheet, frame_series(view, full["series"], full["strides"]), left, y + 8, width, CHART[1])
    y += 8 + CHART[1]
    words = [f"{item['label']} {item['value']}" for item in metrics[1:7]]
    words += [f"{item['term']} {item['text']}" for item in card.get("facts") or []]
    x = left
    y += 17
    for word in words:
        taken = _measure(word, 12)
        if x + taken > left + width and x > left:
            x, y = left, y + 17
        sheet.text(x, y, word, 12, color=theme.ink2)
        x += taken + 14
    return _draw_note(sheet, card["note"], 1, y + 3 if words else y - 17)


def _draw_integrity(sheet: _Sheet, view: View, top: float) -> float:
    card, theme = view["integrity"], sheet.theme
    left, right = _COLUMNS[2] + _PAD, _COLUMNS[3] - _PAD
    y = _draw_opening(sheet, card, 2, top) + 6
    for row in card["rows"]:
        y += 21
        term = sheet.text(left, y, row["term"], 13, color=theme.ink3)
        sheet.text(right, y, _cut(row["text"], right - left - term - 14, 13), 13, anchor="end")
        if row.get("detail"):
            for line in _wrap(row["detail"], right - left, 12):
                y += 16
                sheet.text(right, y, line, 12, color=theme.ink3, anchor="end")
    return _draw_note(sheet, card["note"], 2, y + 6)


def _draw_foot(sheet: _Sheet, view: View, top: float) -> float:
    warnings = [
        line for text in view.get("warnings") or [] for line in _wrap(f"Warning: {text}", _WIDTH - 2 * _PAD, 12.5)
    ]
    if not warnings:
        return top
    color, wash = sheet.theme.tones["warn"]
    height = 18 * len(warnings) + 16
    sheet.rect(1, top, _WIDTH - 2, height - 1, wash)
    for index, line in enumerate(warnings):
        sheet.text(_PAD, top + 22 + 18 * index, line, 12.5, color=color)
    return top + height


def to_png(svg: str) -> bytes:
    """The picture as PNG, at two device pixels to a unit."""
    import vl_convert

    return shrink(vl_convert.svg_to_png(svg, scale=SCALE))
