"""The picture of a budget: the composed ε after each training, population by population, under the budget. Floor 4.

The points between are those that the trail recorded when trainings were reserved and settled (each composes all that
came before it); where each line ends is composed anew. Trainings stand at even distances, in the order of their
reservations: what the picture shows is how the budget went, not when.

A picture that stands alone has a paper of its own: light, and as SVG dark where the reader's screen is.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.compliance.words import delta_text, epsilon_text, number_text, plural
from rlhf_audit_nb.reports.figures import INK, INK_2, LINE, svg_of

if TYPE_CHECKING:
    from rlhf_audit_nb.privacy.ledger import Ledger, Spend
    from rlhf_audit_nb.reports.budget import Budget

__all__ = ["BudgetFigure", "budget_changes", "budget_figure"]

WIDTH, HEIGHT = 560, 230
MOST_NAMED = 8
LETTER = 6.6  # width of a letter of a name, in units
MOST_LINES = 5
MOST_SAID = 3
PAPER = "#ffffff"
BAD = "#b3261e"
COLOURS = ("#0f5e7a", "#8f5200", "#3150b4", "#17704f", "#7a2f6f")
OTHERS = "#66707c"
DARK = {
    PAPER: "#161c23", INK: "#e8edf2", INK_2: "#b3bfcb", LINE: "#424c57", BAD: "#f2938b", OTHERS: "#a3adb8",
    "#0f5e7a": "#6cc0dc", "#8f5200": "#e9b063", "#3150b4": "#9db2f5", "#17704f": "#63c69b", "#7a2f6f": "#d99bd0",
}  # fmt: skip
"""The colours of the light picture, and what stands for each on dark paper."""


@dataclass(frozen=True)
class BudgetFigure:
    """The picture, and the sentence that says the same."""

    svg: str
    alt: str

    def png(self, scale: float = 2.0) -> bytes:
        """The picture on light paper, at ``scale`` device pixels to a unit."""
        import vl_convert

        return vl_convert.svg_to_png(re.sub(r"<style>.*?</style>", "", self.svg, flags=re.DOTALL), scale=scale)


@dataclass(frozen=True)
class _Line:
    """One population's way: its trainings (place, ε before, ε after, whether it is settled)."""

    number: int
    colour: str
    label: str
    points: tuple[tuple[int, float, float, bool], ...]

    @property
    def end(self) -> float:
        """What it comes to."""
        return self.points[-1][2]

    def way(self, last: int) -> list[dict[str, float]]:
        """The corners of the line: flat while others train, and to the right edge."""
        corners = [corner for at, before, after, _ in self.points for corner in ((at - 1, before), (at, after))]
        return [{"x": x, "y": y} for x, y in dict.fromkeys([*corners, (last, self.end)])]


def budget_changes(ledger: Ledger) -> list[dict[str, Any]]:
    """The ε budgets in order: those that were set, and those that runs named where they differ from the one before."""
    asked: list[dict[str, Any]] = [
        {"epsilon": spend.asked.epsilon, "entry": spend.asked.index, "run": spend.run} for spend in ledger.spends
    ]
    chosen: list[dict[str, Any]] = [
        {
            "epsilon": one.epsilon,
            "entry": one.index,
            "run": None,
            "delta": one.delta,
            "by": one.by,
            "reason": one.reason,
        }
        for one in ledger.budgets
    ]
    found: list[dict[str, Any]] = []
    for one in sorted(asked + chosen, key=lambda one: int(one["entry"])):
        if "by" in one or not found or found[-1]["epsilon"] != one["epsilon"]:
            found.append(one)
    return found


def budget_figure(ledger: Ledger, budget: Budget) -> BudgetFigure | None:
    """The picture of ``budget``, which was made from ``ledger``; ``None`` where nothing was spent."""
    import altair as alt

    if not ledger.spends:
        return None
    lines = _lines(ledger, budget)
    changes = _steps_of(ledger, budget)
    top = 1.12 * max([value for _, value, _ in changes] + [line.end for line in lines])
    last = len(ledger.spends)
    x = alt.X(
        "x:Q",
        title=None if last <= MOST_NAMED else "trainings, in the order of their reservations",
        scale=alt.Scale(domain=[0, last], nice=False),
        axis=_axis_x(ledger),
    )
    y = alt.Y(
        "y:Q",
        title="composed ε",
        scale=alt.Scale(domain=[0, top], nice=False),
        axis=alt.Axis(tickCount=5, domain=False, ticks=False, labelPadding=6),
    )
    layers = [*_budget_layers(changes, x, y, last), *_line_layers(lines, x, y, last, top)]
    chart = alt.layer(*layers).properties(
        width=WIDTH,
        height=HEIGHT,
        title=alt.TitleParams(
            f"Privacy budget: ε per {budget.unit}, all trainings composed",
            subtitle=_subtitle(budget),
            fontSize=15,
            subtitleFontSize=12,
            subtitleColor=INK_2,
            subtitlePadding=6,
            offset=16,
        ),
    )
    svg = svg_of(chart, "budget", paper=PAPER, padding=20)
    return BudgetFigure(_standing_alone(svg, alt_text := _alt(ledger, budget, lines)), alt_text)


def _lines(ledger: Ledger, budget: Budget) -> list[_Line]:
    place = {spend.reservation: at for at, spend in enumerate(ledger.spends, 1)}
    shown = sorted(budget.populations, key=lambda one: -one.total)
    colours = {one.number: COLOURS[at] if at < MOST_LINES else OTHERS for at, one in enumerate(shown)}
    found = []
    for group, one in zip(ledger.groups, budget.populations, strict=True):
        points: list[tuple[int, float, float, bool]] = []
        before = 0.0
        for spend in group.spends:
            # A later training that is composed anew shows what the earlier ones count for today.
            value = one.total if spend is group.spends[-1] else min(spend.total, one.total)
            points.append((place[spend.reservation], before, max(value, before), spend.settled))
            before = points[-1][2]
        size = f" · {plural(one.units, budget.unit or 'unit')}" if one.units is not None else ""
        label = f"population {one.number}{size}" if len(shown) > 1 else ""
        found.append(_Line(one.number, colours[one.number], label, tuple(points)))
    return found


def _steps_of(ledger: Ledger, budget: Budget) -> list[tuple[float, float, str]]:
    """From which training on which budget was in force, and what to say of it."""
    found: list[tuple[float, float, str]] = []
    for change in budget_changes(ledger):
        if found and ledger.budgets and "by" not in change and change["entry"] > ledger.budgets[0].index:
            continue  # what a run asks for under a budget that was set is no budget
        before = sum(spend.asked.index < change["entry"] for spend in ledger.spends)
        said = f"{number_text(change['epsilon'])} (#{change['entry']})"
        found.append((float(before), float(change["epsilon"]), said))
    if not found and budget.budget is not None:
        found.append((0.0, budget.budget, number_text(budget.budget)))
    return [(0.0 if at == 0 else where, *rest) for at, (where, *rest) in enumerate(found)]  # type: ignore[misc]


def _axis_x(ledger: Ledger) -> Any:
    import altair as alt

    room = max(9, int(WIDTH / len(ledger.spends) / LETTER))
    names = [_name(spend, at, room) for at, spend in enumerate(ledger.spends, 1)]
    if len(names) > MOST_NAMED:
        return alt.Axis(grid=False, format="~d", tickMinStep=1, tickCount=10)
    table = ",".join(f"[{', '.join(map(json.dumps, lines))}]" for lines in names)
    return alt.Axis(
        grid=False,
        values=list(range(1, len(names) + 1)),
        labelExpr=f"[{table}][datum.value - 1]",
        labelAlign="center" if len(names) > 1 else "right",
        labelLineHeight=14,
        labelPadding=6,
        labelLimit=400,
        labelOverlap=False,
    )


def _name(spend: Spend, at: int, room: int) -> tuple[str, ...]:
    text = spend.experiment or f"training {at}"
    text = text if len(text) <= room else text[: room - 1] + "…"
    state = "" if spend.settled else ("not believed" if spend.doubt is not None else "reserved")
    return (text, *((state,) if state else ()))


def _budget_layers(changes: list[tuple[float, float, str]], x: Any, y: Any, last: int) -> list[Any]:
    """The budget as a step line, with what it was raised or lowered to."""
    import altair as alt

    rows = [{"x": where, "y": value} for where, value, _ in changes] + [{"x": float(last), "y": changes[-1][1]}]
    line = alt.Chart(alt.Data(values=rows)).mark_line(
        color=BAD, strokeWidth=1.5, strokeDash=[5, 3], interpolate="step-after"
    )
    said = [{"x": where, "y": value, "text": ("budget " if at == 0 else "raised to " if value >= changes[at - 1][1]
             else "lowered to ") + text} for at, (where, value, text) in enumerate(changes)]  # fmt: skip
    if len(said) > MOST_SAID:
        said = [said[0], said[-1]]
    text = alt.Chart(alt.Data(values=said)).mark_text(color=BAD, align="left", dx=4, dy=-8, fontSize=11)
    return [line.encode(x=x, y=y), text.encode(x=x, y=y, text="text:N")]


def _line_layers(lines: list[_Line], x: Any, y: Any, last: int, top: float) -> list[Any]:
    import altair as alt

    layers: list[Any] = []
    for line in lines:
        data = alt.Chart(alt.Data(values=line.way(last)))
        if len(lines) == 1:
            layers.append(data.mark_area(color=line.colour, opacity=0.09).encode(x=x, y=y.copy(deep=True).stack(None)))
        layers.append(data.mark_line(color=line.colour, strokeWidth=2.25).encode(x=x, y=y))
        for settled in (True, False):
            points = [{"x": at, "y": after} for at, _, after, state in line.points if state is settled]
            layers.append(
                alt.Chart(alt.Data(values=points)).mark_point(
                    filled=True, fill=line.colour if settled else PAPER, stroke=line.colour, strokeWidth=2, size=56,
                    opacity=1,
                ).encode(x=x, y=y)
            )  # fmt: skip
    layers.append(_end_labels(lines, x, y, last, top))
    return layers


def _end_labels(lines: list[_Line], x: Any, y: Any, last: int, top: float) -> Any:
    """What each line ends at, to its right; those that would meet are moved apart."""
    import altair as alt

    named = [line for line in lines if line.colour != OTHERS or len(lines) <= MOST_LINES]
    named.sort(key=lambda line: -line.end)
    rows: list[dict[str, Any]] = []
    for line in named:
        text = [f"ε {epsilon_text(line.end)}", *([line.label] if line.label else [])]
        rows.append({"x": last, "y": line.end, "text": text, "colour": line.colour})
    gap = top / HEIGHT * (34 if len(named) > 1 and named[0].label else 18)
    for above, row in pairwise(rows):
        row["y"] = min(row["y"], above["y"] - gap)
    lowest = min((row["y"] for row in rows), default=0.0)
    for row in rows:  # not below the axis
        row["y"] -= min(lowest, 0.0)
    text = alt.Chart(alt.Data(values=rows)).mark_text(align="left", dx=12, fontSize=12, lineHeight=15, fontWeight=600)
    return text.encode(x=x, y=y, text="text:N", color=alt.Color("colour:N", scale=None))


def _subtitle(budget: Budget) -> str:
    of = f" of {number_text(budget.budget)}" if budget.budget is not None else ""
    left = f", {_floor(budget.left)} left" if budget.left is not None else ""
    most = " by the population that spent most" if len(budget.populations) > 1 else ""
    state = "spent or reserved" if budget.unsettled else "spent"
    return f"ε {epsilon_text(budget.total)}{of} {state}{most}{left}; δ = {delta_text(budget.delta)}, zero-out adjacency"


def _floor(value: float) -> str:
    return f"{int(value * 100) / 100:.2f}"


def _alt(ledger: Ledger, budget: Budget, lines: list[_Line]) -> str:
    def ends(line: _Line) -> str:
        size = f" ({line.label})" if line.label else ""
        return f"{epsilon_text(line.end)}{size}"

    budgets = " → ".join(f"{number_text(one[1])}" for one in _steps_of(ledger, budget))
    several = f" in {plural(len(lines), 'population')} that share nobody" if len(lines) > 1 else ""
    reserved = f"; {plural(budget.unsettled, 'training')} not settled, counted in full" if budget.unsettled else ""
    return (
        f"The composed ε per {budget.unit} over {plural(len(ledger.spends), 'training')}{several}: it ends at "
        f"{', '.join(map(ends, lines[:MOST_LINES]))}{' and others' if len(lines) > MOST_LINES else ''} under a budget "
        f"of {budgets}, δ = {delta_text(budget.delta)}{reserved}."
    )


def _standing_alone(svg: str, said: str) -> str:
    """With fonts that every reader has, a sentence for who does not see it, and colours for dark screens."""
    from html import escape

    rules = "".join(f'[fill="{one}"]{{fill:{dark}}}[stroke="{one}"]{{stroke:{dark}}}' for one, dark in DARK.items())
    style = f"<style>@media (prefers-color-scheme:dark){{{rules}}}</style>"
    svg = svg.replace('font-family="Inter"', 'font-family="Inter, system-ui, sans-serif"')
    head, rest = svg.split(">", 1)
    return f'{head} role="img" aria-label="{escape(said, quote=True)}"><title>{escape(said)}</title>{style}{rest}'
