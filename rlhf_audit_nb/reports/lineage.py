"""The picture of a lineage, and the object that users hold of one. Floor 4.

The picture is laid out in layers from top to bottom: what went in stands above the training, what came out below.
Edges that skip a layer keep a place of their own in it, and each layer is ordered by where its neighbours stand, so
that few lines cross. Colours are those of the other figures, so a page restyles them alike.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
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
    from rlhf_audit_nb.compliance.lineage import Edge, Lineage, Node

__all__ = ["MOST_DRAWN", "LineageView", "draw", "drawable", "lineage_figure", "lineage_words"]

MOST_DRAWN = 24
"""Larger graphs are drawn only as far as the newest model descends from them."""
_MOST_EVER = 48

_WIDE, _HIGH, _GAP, _BETWEEN, _EDGE = 214, 74, 22, 42, 14
_DUMMY = 26
_INK, _INK_2 = "#1b2430", "#4d5a6a"
_COLOURS = {"own": "#17704f", "inherited": "#0f5e7a", "public": "#3150b4", "protected": "#1b2430", "none": "#8f5200",
            "unknown": "#66707c"}  # fmt: skip
_KINDS = {"data": "data", "model": "model", "training": "training"}
_LETTER = 5.6  # width of a letter at size 10.5, on average


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
        """The picture; ``None`` where nothing was trained, or the graph is too large to be read as one."""
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
                "There is no lineage to draw: no training is recorded, or the graph is too large to be read.",
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
        counts = ", ".join(words.plural(len(graph.of(kind)), _KINDS[kind]) for kind in ("training", "model"))
        return f"<Lineage of {graph.origin}, {self.level}: {counts}>"

    def _repr_html_(self) -> str:
        said = "".join(f"<li>{escape(sentence)}</li>" for sentence in lineage_words(self.graph))
        picture = f'<div style="max-width:760px;background:#fff;padding:8px">{self.svg}</div>' if self.svg else ""
        return f"<div><b>Lineage</b> ({escape(self.level)}){picture}<ul>{said}</ul></div>"


def lineage_words(graph: Lineage) -> list[str]:
    """The graph in sentences, one a training."""
    names = {node.id: node for node in graph.nodes}
    found = []
    for training in graph.of("training"):
        took = [f"{edge.role} {_named(names[edge.source])}" for edge in graph.into(training.id)]
        left = [_named(names[edge.target]) for edge in graph.edges if edge.source == training.id]
        outcome = f"left {', '.join(left)}" if left else "left no model"
        said = (
            f"{training.detail}: {training.label} (#{training.entries[0]}, {training.bound.words}) took "
            f"{', '.join(took) or 'nothing that was recorded'} and {outcome}."
        )
        found.append(words.visible(said))
    return found


def _named(node: Node) -> str:
    return f"{node.label} #{node.entries[0]} ({node.bound.words})"


def drawable(graph: Lineage) -> Lineage | None:
    """The part of the graph that a picture can show: all of it, or what the newest model descends from."""
    if not graph.of("training"):
        return None
    if len(graph.nodes) > MOST_DRAWN:
        made = [edge.target for edge in graph.edges if edge.role == "final"]
        if not made:
            return None
        graph = graph.ancestors(made[-1])
    return graph if len(graph.nodes) <= _MOST_EVER else None


def lineage_figure(graph: Lineage, key: str = "lineage") -> Figure | None:
    """The figure for a report; ``None`` where there is nothing to draw."""
    shown = drawable(graph)
    if shown is None:
        return None
    part = "" if len(shown.nodes) == len(graph.nodes) else " of the newest model"
    entries = {entry for node in shown.nodes for entry in (*node.entries, *node.bound.entries)}
    return Figure(key, f"Lineage{part}", draw(shown), " ".join(lineage_words(shown)), cite(entries))


# --- layout ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Place:
    """A node's place, or that of an edge passing a layer (``node`` is ``None``)."""

    name: str
    node: Node | None
    layer: int
    x: float = 0.0

    @property
    def wide(self) -> int:
        return _WIDE if self.node is not None else _DUMMY


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
    places = {node.id: _Place(node.id, node, order[node.id]) for node in graph.nodes}
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
    high = len(rows) * _HIGH + (len(rows) - 1) * _BETWEEN + 2 * _EDGE
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
        path, label = _edge(edge, route, ports[number])
        parts.append(path)
        labels.append(label)
    parts += [_box(place) for row in rows for place in row if place.node is not None]
    return "".join([*parts, *labels, "</svg>"])


def _ports(routes: Sequence[tuple[Edge, list[_Place]]]) -> list[float]:
    """Where on its target's upper side each edge ends: side by side, in the order of where they come from."""
    found = [0.0] * len(routes)
    for target in {route[-1].name: route[-1] for _, route in routes}.values():
        into = sorted(
            (number for number, (_, route) in enumerate(routes) if route[-1] is target),
            key=lambda number: (routes[number][1][-2].x, number),
        )
        step = min(64.0, (_WIDE - 40) / max(len(into), 1))
        for place, number in enumerate(into):
            found[number] = target.x + (place - (len(into) - 1) / 2) * step
    return found


def _top(place: _Place) -> float:
    return _EDGE + place.layer * (_HIGH + _BETWEEN)


def _edge(edge: Edge, route: Sequence[_Place], port: float) -> tuple[str, str]:
    x, y = route[0].x + _EDGE, _top(route[0]) + _HIGH
    path = f"M{x:.1f},{y:.1f}"
    for place in route[1:]:
        last = place is route[-1]
        to_x, to_y = (port if last else place.x) + _EDGE, _top(place)
        middle = (y + to_y) / 2
        path += f"C{x:.1f},{middle:.1f} {to_x:.1f},{middle:.1f} {to_x:.1f},{to_y - (1.5 if last else 0):.1f}"
        if not last:
            path += f"V{to_y + _HIGH:.1f}"
        x, y = to_x, to_y + _HIGH
    side, anchor = (-5, "end") if route[-2].x > port else (5, "start")  # beside the line, where it does not come from
    label = (
        f'<text x="{port + _EDGE + side:.1f}" y="{_top(route[-1]) - 4:.1f}" font-size="9.5" text-anchor="{anchor}" '
        f'fill="{_INK_2}">{escape(edge.role)}</text>'
    )
    line = f'<path d="{path}" fill="none" stroke="{_INK_2}" stroke-width="1.2" marker-end="url(#lineage-arrow)"/>'
    return line, "" if edge.role == "final" else label


def _box(place: _Place) -> str:
    node = place.node
    assert node is not None  # for the type checker: an edge's own place has no box
    left, top = place.x - _WIDE / 2 + _EDGE, _top(place)
    colour = _COLOURS[node.bound.how]
    corner = 14 if node.kind == "training" else 4
    dash = ' stroke-dasharray="4 3"' if node.bound.how in ("none", "unknown") else ""
    head = " · ".join(part for part in (_KINDS[node.kind], _where(node)) if part)
    lines = [
        _text(left + 12, top + 17, head, 9.5, _INK_2),
        _text(left + 12, top + 33, node.label, 12, _INK, weight=600),
        *(
            _text(left + 12, top + 49 + 14 * number, line, 10.5, colour)
            for number, line in enumerate(_wrapped(_short_bound(node)))
        ),
    ]
    whole = escape(words.visible(f"{node.label} {node.detail}: {node.bound.words}"))
    return (
        f"<g><title>{whole}</title>"
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{_WIDE}" height="{_HIGH}" rx="{corner}" fill="none" '
        f'stroke="{colour}" stroke-width="1.4"{dash}/>{"".join(lines)}</g>'
    )


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
    bold = f' font-weight="{weight}"' if weight != 400 else ""  # noqa: PLR2004
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}"{bold} fill="{colour}">{escape(shown)}</text>'
