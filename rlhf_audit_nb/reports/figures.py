"""The figures of a report: declared in Altair, frozen to SVG by vl-convert, each with a sentence that says it. Floor 4.

Colours are the light theme's; `themed` lets a page restyle them for the dark. Long series are thinned to the points
that a reader can tell apart, always keeping both ends.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.compliance.assess import State
from rlhf_audit_nb.compliance.evidence import Cite, cite
from rlhf_audit_nb.compliance.templates import template_path
from rlhf_audit_nb.compliance.words import count, epsilon_text, number_text, plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlhf_audit_nb.compliance.assess import Assessment
    from rlhf_audit_nb.compliance.facts import RunFacts

__all__ = ["INK", "INK_2", "LINE", "Figure", "epsilon_figure", "series_figure", "states_figure", "svg_of"]

INK, INK_2, LINE, ACCENT = "#1b2430", "#4d5a6a", "#dfe4ea", "#0f5e7a"
STATE_COLOURS = {State.EVIDENCED: "#17704f", State.ATTESTED: "#3150b4", State.MISSING: "#8f5200",
                 State.NOT_APPLICABLE: "#66707c"}  # fmt: skip
WIDTH = 600
MAX_POINTS = 320
SERIES = (
    ("loss", "loss"),
    ("update_norm", "norm of the parameter update"),
    ("gradient_norm", "norm of the gradient"),
    ("learning_rate", "learning rate"),
)
Point = tuple[int, float]


@dataclass(frozen=True)
class Figure:
    """One picture: its SVG, the sentence that says the same, and the entries that it was drawn from."""

    key: str
    title: str
    svg: str
    alt: str
    cites: tuple[Cite, ...]


def _config(paper: str, padding: int | None) -> dict[str, Any]:
    text = {"labelFont": "Inter", "titleFont": "Inter", "labelFontSize": 11, "titleFontSize": 11}
    axis = {**text, "labelColor": INK_2, "titleColor": INK_2, "titleFontWeight": "normal", "gridColor": LINE,
            "domainColor": INK_2, "tickColor": INK_2}  # fmt: skip
    return {
        "background": paper,
        **({} if padding is None else {"padding": padding}),
        "view": {"stroke": None},
        "axis": axis,
        "text": {"font": "Inter", "fontSize": 11, "color": INK},
        "title": {
            "font": "Inter",
            "subtitleFont": "Inter",
            "fontSize": 12,
            "color": INK,
            "anchor": "start",
            "fontWeight": 600,
        },
    }


_fonts: list[str] = []


def svg_of(chart: Any, key: str, *, paper: str = "transparent", padding: int | None = None) -> str:
    """An Altair chart as SVG in the look of all figures; ``key`` keeps its names apart from those of others."""
    import vl_convert

    folder = str(template_path("nbconvert", "audit-pdf", "fonts"))
    if folder not in _fonts:  # the converter measures labels with the font that the PDF is set in
        vl_convert.register_font_directory(folder)
        _fonts.append(folder)
    svg = vl_convert.vegalite_to_svg(chart.configure(**_config(paper, padding)).to_dict(validate=False))
    # Several figures stand in one page: names inside an SVG must not meet.
    return re.sub(r'(id="|url\(#)([A-Za-z]+\d+)', rf"\g<1>{key}-\g<2>", svg)


def _thinned(points: Sequence[Point]) -> list[Point]:
    if len(points) <= MAX_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(i * last / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def _rows(points: Sequence[Point]) -> list[dict[str, float]]:
    return [{"step": step, "value": value} for step, value in _thinned(points)]


def _finite(value: Any) -> float | None:
    """The number, or ``None`` for anything that cannot be drawn."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def epsilon_figure(run: RunFacts, key: str) -> Figure | None:
    """The composed ε after each recorded step, with the plan and the budget; ``None`` without a private run."""
    import altair as alt

    found = [(item.index, step.step, value) for item, step in run.steps if (value := _finite(step.epsilon)) is not None]
    if not run.spends or not found:
        return None
    reserved = run.spends[-1].reserved
    points = [(step, value) for _, step, value in found]
    base = alt.Chart(alt.Data(values=_rows(points)))
    line = base.mark_line(color=ACCENT, strokeWidth=2).encode(
        x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(grid=False, tickCount=8, tickMinStep=1, format="~d")),
        y=alt.Y("value:Q", title="composed ε", scale=alt.Scale(zero=True)),
    )
    marks = [{"value": reserved.epsilon_budget, "text": f"budget {number_text(reserved.epsilon_budget)}"}]
    planned = _finite(reserved.epsilon_planned)
    if planned is not None and planned < 0.94 * reserved.epsilon_budget:  # closer, the two labels would meet
        marks.append({"value": planned,
                      "text": f"planned {epsilon_text(reserved.epsilon_planned)}"})  # fmt: skip
    rules = alt.Chart(alt.Data(values=marks))
    rule = rules.mark_rule(color=INK_2, strokeDash=[4, 3]).encode(y="value:Q")
    text = rules.mark_text(align="right", dy=-7, color=INK_2).encode(
        y="value:Q", x=alt.value(WIDTH), text="text:N"
    )  # fmt: skip
    last_step, last = points[-1]
    return Figure(
        key,
        f"Privacy loss of {run.started.experiment}",
        svg_of(alt.layer(line, rule, text).properties(width=WIDTH, height=190), key),
        f"The composed ε per {reserved.unit} rises from {epsilon_text(points[0][1])} after step {points[0][0]} to "
        f"{epsilon_text(last)} after step {last_step}; planned {epsilon_text(reserved.epsilon_planned)}, "
        f"budget {number_text(reserved.epsilon_budget)}, δ {number_text(reserved.delta)}.",
        cite([index for index, _, _ in found]),
    )


def series_figure(run: RunFacts, key: str) -> Figure | None:
    """The public series of a run's steps, one panel each; ``None`` where no step shows a number."""
    import altair as alt

    panels: list[Any] = []
    said: list[str] = []
    used: set[int] = set()
    for name, plain_title in SERIES:
        # Under differential privacy the gradient that is recorded is the clipped and noised one.
        title = "norm of the privatised gradient" if run.spends and name == "gradient_norm" else plain_title
        found = [
            (item.index, step.step, value)
            for item, step in run.steps
            if (value := _finite(step.metrics.get(name, getattr(step, name, None)))) is not None
        ]
        if len(found) < 2:  # noqa: PLR2004
            continue
        points = [(step, value) for _, step, value in found]
        used.update(index for index, _, _ in found)
        said.append(f"{title} from {number_text(points[0][1])} to {number_text(points[-1][1])}")
        panels.append(
            alt.Chart(alt.Data(values=_rows(points)), title=title)
            .mark_line(color=ACCENT, strokeWidth=1.5)
            .encode(
                x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(grid=False, tickCount=4, format="~d")),
                y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4, format="~g")),
            )
            .properties(width=WIDTH // 2 - 60, height=120)
        )
    if not panels:
        return None
    return Figure(
        key,
        f"Public step figures of {run.started.experiment}",
        svg_of(alt.concat(*panels, columns=2, spacing=24), key),
        f"Over {plural(len(run.steps), 'recorded step')}: {'; '.join(said)}.",
        cite(used),
    )


def states_figure(assessment: Assessment, key: str) -> Figure:
    """How many requirements are in which state, as one bar."""
    import altair as alt

    rows, start = [], 0
    for state in State:
        number = assessment.count(state)
        if number:
            rows.append({"state": state.value, "from": start, "to": start + number, "label": count(number),
                         "colour": STATE_COLOURS[state]})  # fmt: skip
        start += number
    base = alt.Chart(alt.Data(values=rows))
    bar = base.mark_bar(height=22).encode(
        x=alt.X("from:Q", title="requirements", axis=alt.Axis(grid=False), scale=alt.Scale(domain=[0, start])),
        x2="to:Q",
        color=alt.Color("colour:N", scale=None),
    )
    said = ", ".join(f"{row['label']} {row['state']}" for row in rows)
    return Figure(
        key,
        f"{plural(start, 'requirement')} by state",
        svg_of(bar.properties(width=WIDTH, height=30), key),
        f"Of {plural(start, 'requirement')}: {said}.",
        (),
    )
