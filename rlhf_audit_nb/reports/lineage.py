"""The picture of a lineage, and the object that users hold of one. Floor 4.

The picture is laid out in layers from top to bottom: what went in stands above the training, what came out below.
Edges that skip a layer keep a place of their own in it, and each layer is ordered by where its neighbours stand, so
that few lines cross. Colours are those of the other figures, so a page restyles them alike.

A large graph is *condensed* before it is drawn: first what one box alone uses and nothing here made is written into
that box, then models and evaluations into the box of their training, so that what is left are the trainings and what
went from one to the next. Beyond `MOST_EVER` boxes only the nearest ancestors of the newest training are drawn, and the
title says so.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.compliance import words
from rlhf_audit_nb.compliance.evidence import cite
from rlhf_audit_nb.errors import ReportError
from rlhf_audit_nb.reports.figures import Figure

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.lineage import Edge, Folder, Lineage, Node

__all__ = ["MOST_DRAWN", "MOST_EVER", "LineageView", "condensed", "draw", "drawable", "lineage_figure", "lineage_words"]

MOST_DRAWN = 24
"""Larger graphs are condensed before they are drawn."""
MOST_EVER = 48
"""Of a graph that is larger still, the nearest ancestors of the newest model are drawn."""

_WIDE, _GAP, _BETWEEN, _EDGE = 214, 22, 42, 14
_HEAD, _LINE, _MARK = 46, 14, 13
_LEGEND = 24
_MOST_MARKS = 8
_DUMMY = 26
_INK, _INK_2 = "#1b2430", "#4d5a6a"
_COLOURS = {"own": "#17704f", "inherited": "#0f5e7a", "public": "#3150b4", "protected": "#1b2430", "none": "#8f5200",
            "unknown": "#66707c", "open": "#4d5a6a"}  # fmt: skip
_ROLES = {"evaluation": "eval"}  # as it is written beside a line, where room is short
_ASKED = {"data": "on"}  # in a sentence on an evaluation
_BOUNDED = ("own", "inherited", "protected")
_STATES = {"met": "#17704f", "not met": "#b3261e", "": "#66707c"}
_LEGENDS = {
    "own": "private, with an ε of its own", "inherited": "inherits an ε", "public": "declared public",
    "protected": "protected data", "none": "no bound", "unknown": "not known to this trail",
    "open": "no differential privacy: no bound",
}  # fmt: skip
_KINDS = {"data": "data", "model": "model", "training": "training", "evaluation": "evaluation"}
_PORT, _BESIDE = 16, 5  # between two ends of lines; from a line to its label
_LETTER = 5.6  # width of a letter at size 10.5, on average
_WIDEST = 0.63  # the same in the widest of the usual fonts, at size 1: a page draws with the font that it has


class LineageView:
    """A lineage that shows itself in a notebook and saves itself as SVG or JSON.

    Args:
        graph: the lineage.
        level: the level of the verdict that it was drawn under.
    """

    def __init__(self, graph: Lineage, level: str) -> None:
        self.graph = graph
        self.level = level

    @cached_property
    def svg(self) -> str | None:
        """The picture; ``None`` where nothing was trained."""
        shown = drawable(self.graph)
        return draw(shown) if shown is not None else None

    @property
    def prov(self) -> str:
        """W3C PROV-JSON."""
        return json.dumps(self.graph.to_prov(), ensure_ascii=False, indent=2) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the verdict's level, nodes and edges, and the graph as PROV-JSON under ``prov``."""
        return {"level": self.level, **self.graph.to_dict(), "prov": self.graph.to_prov()}

    def save(self, path: Path | str) -> Path:
        """Write the picture (``.svg``) or PROV-JSON (``.json``).

        Raises:
            ReportError: another suffix, nothing to draw, or the file cannot be written.
        """
        target = Path(path)
        if target.suffix.lower() not in (".svg", ".json"):
            raise ReportError(
                f"A lineage is not written as {target.suffix or 'a file without a suffix'!r}.",
                next_step="Name a file that ends in .svg or .json.",
                code="unknown-format",
            )
        text = self.prov if target.suffix.lower() == ".json" else self.svg
        if text is None:
            raise ReportError(
                "There is no lineage to draw: no training is recorded.",
                next_step="Save it as .json, which holds all of it.",
                code="nothing-to-draw",
            )
        try:
            target.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ReportError(
                f"The lineage cannot be written to {target}: {error.strerror or error}.",
                next_step="Name a file in a folder that exists and can be written.",
                code="unwritable",
            ) from error
        return target

    def __str__(self) -> str:
        return "\n".join(lineage_words(self.graph)) or "No training is recorded in this trail."

    def __repr__(self) -> str:
        graph = self.graph
        kinds = ("training", "model", *(("evaluation",) if graph.of("evaluation") else ()))
        counts = ", ".join(words.plural(len(graph.of(kind)), _KINDS[kind]) for kind in kinds)
        return f"<Lineage of {graph.origin}, {self.level}: {counts}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: FBT001 - IPython's own signature
        """As text in a notebook: what a report shows of the cell."""
        del cycle
        printer.text(str(self))

    def _repr_html_(self) -> str:
        said = "".join(f"<li>{escape(sentence)}</li>" for sentence in lineage_words(self.graph))
        picture = f'<div style="max-width:760px;background:#fff;padding:8px">{self.svg}</div>' if self.svg else ""
        return f"<div><b>Lineage</b> ({escape(self.level)}){picture}<ul>{said}</ul></div>"


def lineage_words(graph: Lineage) -> list[str]:
    """The graph in sentences, one for each training and each evaluation."""
    names = {node.id: node for node in graph.nodes}
    found = []
    for training in graph.of("training"):
        took = [f"{edge.role} {_named(names[edge.source])}" for edge in graph.into(training.id)]
        took += training.lines
        left = [_named(names[edge.target]) for edge in graph.edges if edge.source == training.id]
        outcome = f"left {', '.join(left)}" if left else "left no model"
        said = (
            f"{training.detail}: {training.label} (#{training.entries[0]}, {training.bound.words}) took "
            f"{', '.join(took) or 'nothing that was recorded'} and {outcome}."
        )
        found.append(words.visible(said))
    for evaluation in graph.of("evaluation"):
        took = [
            f"{_ASKED.get(edge.role, edge.role)} {_named(names[edge.source])}" for edge in graph.into(evaluation.id)
        ]
        said = f"{evaluation.label} (#{evaluation.entries[0]}) tested {', '.join(took)}: {'; '.join(evaluation.lines)}."
        found.append(words.visible(said))
    return found


def _named(node: Node) -> str:
    signed = "".join(f"; saved as {one.name}, {_signed(one)}" for one in node.folders)
    return f"{node.label} #{node.entries[0]} ({node.bound.words}{signed})"


def _signed(folder: Folder) -> str:
    return f"signed #{folder.entry}" if folder.signature else f"not signed #{folder.entry}"


# --- what is drawn of a large graph ----------------------------------------------------------------------------------


def drawable(graph: Lineage) -> Lineage | None:
    """What a picture shows of the graph: all of it while that can be read, else condensed, else its newest part."""
    if not graph.of("training"):
        return None
    for level in (0, 1, 2):
        shown = condensed(graph, level)
        if len(shown.nodes) <= MOST_DRAWN:
            return shown
    return _newest(shown) if len(shown.nodes) > MOST_EVER else shown


def condensed(graph: Lineage, level: int) -> Lineage:
    """The graph with fewer boxes and the same facts in them.

    Args:
        graph: the whole.
        level: 0: as it is; 1: data sets and unknown models that only one box uses are told in that box; 2: models and
            evaluations are told in the box of the training that they came from.
    """
    if level >= 1:
        graph = _absorbed(graph)
    return _trainings_only(graph) if level > 1 else graph


def _absorbed(graph: Lineage) -> Lineage:
    """What nothing made and one box alone uses becomes a line of that box."""
    lines: dict[str, list[str]] = {}
    gone: set[str] = set()
    for node in graph.nodes:
        uses = [edge for edge in graph.edges if edge.source == node.id]
        made = bool(graph.into(node.id))
        if len({edge.target for edge in uses}) == 1 and not made and node.kind in ("data", "model"):
            gone.add(node.id)
            said = f"{uses[0].role}: {node.label}{f', {node.detail}' if node.kind == 'data' and node.detail else ''}"
            lines.setdefault(uses[0].target, []).append(said)
    return replace(
        graph,
        nodes=tuple(
            replace(node, lines=(*lines.get(node.id, ()), *node.lines)) for node in graph.nodes if node.id not in gone
        ),
        edges=tuple(edge for edge in graph.edges if edge.source not in gone),
    )


def _trainings_only(graph: Lineage) -> Lineage:
    """Models and evaluations become lines of the training that left them."""
    names = {node.id: node for node in graph.nodes}
    maker: dict[str, str] = {}
    for edge in graph.edges:
        if names[edge.source].kind == "training":
            maker.setdefault(edge.target, edge.source)  # weights that two trainings left are told with the first
    for edge in graph.edges:
        if names[edge.target].kind == "evaluation" and edge.source in maker:
            maker[edge.target] = maker[edge.source]
    lines: dict[str, list[str]] = {}
    for name, training in maker.items():
        node = names[name]
        told = list(node.lines) if node.kind == "evaluation" else [_folder_line(one) for one in node.folders]
        lines.setdefault(training, []).extend(told)
    edges = [
        replace(edge, source=maker.get(edge.source, edge.source))
        for edge in graph.edges
        if edge.target not in maker
    ]  # fmt: skip
    used = {name for edge in edges for name in (edge.source, edge.target)}
    kept = [node for node in graph.nodes if node.id not in maker and (node.id in used or node.kind == "training")]
    return replace(
        graph,
        nodes=tuple(replace(node, lines=(*node.lines, *lines.get(node.id, ()))) for node in kept),
        edges=tuple(edge for edge in edges if edge.source != edge.target),
    )


def _newest(graph: Lineage) -> Lineage:
    """The newest training and its nearest ancestors, as many as can be drawn."""
    kept: list[str] = []
    waiting = [graph.of("training")[-1].id]
    while waiting and len(kept) < MOST_EVER:
        here = waiting.pop(0)
        if here not in kept:
            kept.append(here)
            waiting += [edge.source for edge in graph.into(here)]
    return replace(
        graph,
        nodes=tuple(node for node in graph.nodes if node.id in kept),
        edges=tuple(edge for edge in graph.edges if edge.source in kept and edge.target in kept),
    )


def lineage_figure(graph: Lineage, key: str = "lineage") -> Figure | None:
    """The figure for a report; ``None`` where there is nothing to draw."""
    shown = drawable(graph)
    if shown is None:
        return None
    missing = len(graph.of("training")) - len(shown.of("training"))
    part = f" of the newest model; {words.plural(missing, 'training')} not drawn" if missing else ""
    entries = {entry for node in graph.nodes for entry in (*node.entries, *node.bound.entries)}
    entries |= {folder.entry for node in graph.nodes for folder in node.folders}
    return Figure(key, f"Lineage{part}", draw(shown), " ".join(lineage_words(graph)), cite(entries))


# --- layout ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Place:
    """A node's place, or that of an edge passing a layer (``node`` is ``None``)."""

    name: str
    node: Node | None
    layer: int
    x: float = 0.0
    top: float = 0.0
    row: int = 0
    quiet: bool = False

    @property
    def wide(self) -> int:
        return _WIDE if self.node is not None else _DUMMY

    @property
    def open(self) -> bool:
        """Whether it has no bound in a graph where nothing has one: said once, under the picture."""
        return self.quiet and self.node is not None and self.node.bound.how == "none"

    @property
    def bound_lines(self) -> list[str]:
        """The bound as it is written in the box; an evaluation's is its model's."""
        if self.node is None or self.node.kind == "evaluation" or self.open:
            return []
        return _wrapped(_short_bound(self.node))

    @property
    def high(self) -> int:
        """Of the box; an edge that passes takes the height of its layer."""
        if self.node is None:
            return self.row
        bound = len(self.bound_lines)
        return _HEAD + _LINE * bound + _MARK * len(_marks(self.node)) - (0 if bound else 4)


def _layers(graph: Lineage) -> dict[str, int]:
    """The layer of each node: below all that went into it; what nothing made stands right above its first use.

    Nodes stand in the order in which the trail shows them. An edge back to an earlier one, where a training left
    weights that were there before, is drawn upwards and moves nothing.
    """
    shown = {node.id: number for number, node in enumerate(graph.nodes)}
    onwards = [edge for edge in graph.edges if shown[edge.source] < shown[edge.target]]
    order = {node.id: 0 for node in graph.nodes}
    for node in graph.nodes:
        above = [order[edge.source] for edge in onwards if edge.target == node.id]
        order[node.id] = max(above, default=-1) + 1
    for node in graph.nodes:
        uses = [order[edge.target] for edge in onwards if edge.source == node.id]
        if uses and not graph.into(node.id):
            order[node.id] = min(uses) - 1
    used = {layer: number for number, layer in enumerate(sorted(set(order.values())))}
    return {name: used[layer] for name, layer in order.items()}


def _placed(graph: Lineage) -> tuple[list[list[_Place]], list[tuple[Edge, list[_Place]]]]:
    """The layers with everything in them, and each edge with the places that it runs through."""
    order = _layers(graph)
    rows: list[list[_Place]] = [[] for _ in range(max(order.values()) + 1)]
    quiet = not any(node.bound.how in _BOUNDED for node in graph.nodes)
    places = {node.id: _Place(node.id, node, order[node.id], quiet=quiet) for node in graph.nodes}
    for place in places.values():
        rows[place.layer].append(place)
    routes = []
    for number, edge in enumerate(graph.edges):
        start, end = places[edge.source], places[edge.target]
        route = [start]
        for layer in range(start.layer + 1, end.layer):
            passing = _Place(f"pass-{number}-{layer}", None, layer)
            rows[layer].append(passing)
            route.append(passing)
        routes.append((edge, [*route, end]))
    _arrange(rows, routes)
    top = float(_EDGE)
    for row in rows:
        high = max(place.high for place in row)
        for place in row:
            place.top, place.row = top, high
        top += high + _BETWEEN
    return rows, routes


def _arrange(rows: list[list[_Place]], routes: Sequence[tuple[Edge, list[_Place]]]) -> None:
    """Order each layer by the mean place of its neighbours, downwards and upwards a few times; then centre it."""
    near: dict[str, dict[int, list[_Place]]] = {}
    for _, route in routes:
        for above, below in pairwise(route):
            near.setdefault(below.name, {}).setdefault(-1, []).append(above)
            near.setdefault(above.name, {}).setdefault(1, []).append(below)
    most = max(sum(place.wide + _GAP for place in row) - _GAP for row in rows)
    for row in rows:
        _spread(row, most)
    for turn in range(6):
        side = -1 if turn % 2 == 0 else 1
        for row in rows if side < 0 else reversed(rows):
            means = {}
            for place in row:
                others = near.get(place.name, {}).get(side, [])
                means[place.name] = sum(other.x for other in others) / len(others) if others else place.x
            row.sort(key=lambda place: (means[place.name], place.name))
            _spread(row, most)


def _spread(row: list[_Place], most: float) -> None:
    x = (most - (sum(place.wide + _GAP for place in row) - _GAP)) / 2
    for place in row:
        place.x = x + place.wide / 2
        x += place.wide + _GAP


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw(graph: Lineage) -> str:
    """The graph as an SVG with a title and a description; it needs nothing from outside."""
    rows, routes = _placed(graph)
    wide = max(max(place.x + place.wide / 2 for place in row) for row in rows) + 2 * _EDGE
    foot = max(place.top + place.high for place in rows[-1]) + _LEGEND
    shown = [place for row in rows for place in row if place.node is not None and place.node.kind != "evaluation"]
    used = {"open" if place.open else place.node.bound.how for place in shown if place.node is not None}
    legend, high = _legend(used, wide, foot)
    alt = escape(" ".join(lineage_words(graph)))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:.0f} {high:.0f}" width="{wide:.0f}" '
        f'height="{high:.0f}" role="img" aria-labelledby="lineage-t lineage-d" font-family="Inter, sans-serif">'
        f'<title id="lineage-t">Lineage of {escape(words.visible(graph.origin))}</title>'
        f'<desc id="lineage-d">{alt}</desc>'
        f'<defs><marker id="lineage-arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0,0.8L7.4,4L0,7.2z" fill="{_INK_2}"/></marker></defs>'
    )
    ports = _ports(routes)
    parts, labels = [head], []
    for number, (edge, route) in enumerate(routes):
        path, label = _edge(edge, route, *ports[number])
        parts.append(path)
        labels.append(label)
    parts += [_box(place) for row in rows for place in row if place.node is not None]
    return "".join([*parts, *labels, legend, "</svg>"])


def _legend(used: set[str], wide: float, top: float) -> tuple[str, float]:
    """What the colours mean, as far as they are used, and where it ends."""
    found, x, y = [], float(_EDGE), top
    for how, said in _LEGENDS.items():
        if how not in used:
            continue
        step = 24 + len(said) * 5.2
        if x + step > wide and x > _EDGE:
            x, y = float(_EDGE), y + 15
        dash = ' stroke-dasharray="4 3"' if how in ("none", "unknown") else ""
        found.append(
            f'<path d="M{x:.1f},{y - 3:.1f}h14" stroke="{_COLOURS[how]}" stroke-width="2"{dash}/>'
            f'<text x="{x + 18:.1f}" y="{y:.1f}" font-size="9.5" fill="{_INK_2}">{said}</text>'
        )
        x += step
    return f'<g class="legend">{"".join(found)}</g>', y + _EDGE


def _ports(routes: Sequence[tuple[Edge, list[_Place]]]) -> list[tuple[float, int]]:
    """Where on its target's upper side each edge ends, and on which side of its end its label stands.

    Ends are side by side in the order of where their edges come from. A label is beside the line where it does not
    come from (1: right, -1: left), and two neighbours are as far apart as the labels between them are long.
    """
    found = [(0.0, 1)] * len(routes)
    for target in {route[-1].name: route[-1] for _, route in routes}.values():
        into = sorted(
            (number for number, (_, route) in enumerate(routes) if route[-1] is target),
            key=lambda number: (routes[number][1][-2].x, number),
        )
        step = min(72.0, (_WIDE - 80) / max(len(into) - 1, 1))
        even = [target.x + (place - (len(into) - 1) / 2) * step for place in range(len(into))]
        sides = [-1 if routes[number][1][-2].x > x else 1 for number, x in zip(into, even, strict=True)]
        rooms = [_room(routes[number][0]) for number in into]
        gaps = [
            max(_PORT, left * (side > 0) + right * (other < 0))
            for (left, side), (right, other) in pairwise(zip(rooms, sides, strict=True))
        ]
        whole = min(max(sum(gaps), step * len(gaps)), _WIDE - 2 * _EDGE)
        x = target.x - whole / 2
        for number, side, gap in zip(into, sides, [*gaps, 0.0], strict=True):
            found[number] = (x, side)
            x += gap * whole / (sum(gaps) or 1)
    return found


def _label(edge: Edge) -> str:
    """What is written beside an edge; nothing where a training left it."""
    return "" if edge.role == "final" else _ROLES.get(edge.role, edge.role)


def _room(edge: Edge) -> float:
    """How wide an edge's label is, with what keeps it apart."""
    return len(_label(edge)) * _WIDEST * 9.5 + _BESIDE + 3


def _edge(edge: Edge, route: Sequence[_Place], port: float, side: int) -> tuple[str, str]:
    x, y = route[0].x + _EDGE, route[0].top + route[0].high
    path = f"M{x:.1f},{y:.1f}"
    if y < route[0].top + route[0].row:  # a low box in a high layer: straight down to the layer's end
        y = route[0].top + route[0].row
        path += f"V{y:.1f}"
    for place in route[1:]:
        last = place is route[-1]
        to_x, to_y = (port if last else place.x) + _EDGE, place.top
        middle = (y + to_y) / 2
        path += f"C{x:.1f},{middle:.1f} {to_x:.1f},{middle:.1f} {to_x:.1f},{to_y - (1.5 if last else 0):.1f}"
        if not last:
            path += f"V{to_y + place.row:.1f}"
        x, y = to_x, to_y + place.row
    label = (
        f'<text x="{port + _EDGE + _BESIDE * side:.1f}" y="{route[-1].top - 4:.1f}" font-size="9.5" '
        f'text-anchor="{"start" if side > 0 else "end"}" fill="{_INK_2}">{escape(_label(edge))}</text>'
    )
    line = f'<path d="{path}" fill="none" stroke="{_INK_2}" stroke-width="1.2" marker-end="url(#lineage-arrow)"/>'
    return line, label if _label(edge) else ""


def _box(place: _Place) -> str:
    node = place.node
    assert node is not None  # for the type checker: an edge's own place has no box
    left, top = place.x - _WIDE / 2 + _EDGE, place.top
    evaluation = node.kind == "evaluation"
    colour = _STATES[node.state] if evaluation else _COLOURS["open" if place.open else node.bound.how]
    corner = {"training": 14, "evaluation": 0}.get(node.kind, 4)
    dashed = node.bound.how in ("none", "unknown") and not evaluation and not place.open
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    head = " · ".join(part for part in (_KINDS[node.kind], _where(node)) if part)
    lines = [
        _text(left + 12, top + 17, head, 9.5, _INK_2),
        _text(left + 12, top + 33, node.label, 12, _INK, weight=600),
    ]
    y = top + 49
    for line in place.bound_lines:
        lines.append(_text(left + 12, y, line, 10.5, colour))
        y += _LINE
    for line in _marks(node):
        lines.append(_text(left + 12, y, line, 9.5, colour if evaluation else _INK_2))
        y += _MARK
    told = "; ".join((*node.lines, *(_folder_line(one) for one in node.folders)))
    whole = escape(words.visible(f"{node.label} {node.detail}: {node.bound.words}{f'; {told}' if told else ''}"))
    return (
        f"<g><title>{whole}</title>"
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{_WIDE}" height="{place.high}" rx="{corner}" fill="none" '
        f'stroke="{colour}" stroke-width="1.4"{dash}/>{"".join(lines)}</g>'
    )


def _marks(node: Node) -> list[str]:
    """The small lines of a box: what was told in it, then its folders; the last says how many more there are."""
    found = [*node.lines, *(_folder_line(one) for one in node.folders)]
    return (
        found if len(found) <= _MOST_MARKS else [*found[: _MOST_MARKS - 1], f"and {len(found) - _MOST_MARKS + 1} more"]
    )


def _folder_line(folder: Folder) -> str:
    if folder.signature is None:
        return f"saved as {folder.name}, not signed"
    return f"{folder.name}: signed {words.short(folder.signature, 4)} #{folder.entry}"


def _where(node: Node) -> str:
    return " · ".join(part for part in (words.visible(node.detail), f"#{node.entries[0]}") if part)


def _short_bound(node: Node) -> str:
    if node.kind == "training" and node.bound.how == "own":
        return f"private: {node.bound.words}"
    if node.kind == "training" and node.bound.how in ("none", "public"):
        return words.NO_BOUND if node.bound.how == "none" else "on data declared public"
    return node.bound.words


def _wrapped(text: str, most: int = 2) -> list[str]:
    lines = textwrap.wrap(text, width=int((_WIDE - 24) / _LETTER), break_long_words=False)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " …"]
    return lines


def _text(x: float, y: float, text: str, size: float, colour: str, weight: int = 400) -> str:
    most = int((_WIDE - 22) / (_LETTER * size / 10.5 * (1.06 if weight > 400 else 1.0)))  # noqa: PLR2004
    text = words.visible(text)
    shown = text if len(text) <= most else text[: most - 1] + "…"
    look = f' font-weight="{weight}"' if weight != 400 else ""  # noqa: PLR2004
    if len(shown) * _WIDEST * size * (1.1 if weight > 400 else 1.0) > _WIDE - 22:  # noqa: PLR2004
        look += f' textLength="{_WIDE - 24}" lengthAdjust="spacingAndGlyphs"'  # it fits in whatever font
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}"{look} fill="{colour}">{escape(shown)}</text>'
