"""The summary of a sweep: a table and a picture of its runs, from records that are verified as it is made. Floor 5.

It is a record itself: a small notebook, executed and sealed by the engine, whose cells read the sweep's entries in the
trail and verify each record that they name (`Summary.read`) before they show what is in it. The same rows go to
``sweep.csv`` and ``sweep.json`` beside it, for programs.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.compliance.words import epsilon_text, number_text, plural, short, visible
from rlhf_audit_nb.config import AuditConfig
from rlhf_audit_nb.errors import RecordError
from rlhf_audit_nb.events import SweepFinished, SweepStarted, decode_body
from rlhf_audit_nb.records.record import open_record
from rlhf_audit_nb.sweeping.state import Found, found_of, record_path
from rlhf_audit_nb.trail import Level, TrailReader

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Summary", "figure_of", "rows_of", "write_notebook", "write_tables"]

_MOST_METRICS = 6


def rows_of(points: Sequence[str], found: dict[str, Found], outcomes: dict[str, str]) -> list[dict[str, Any]]:
    """One row a point, in their order: what its record says, or that it has none."""
    rows = []
    for point in points:
        one = found.get(point)
        rows.append(asdict(one) if one is not None else {"point": point, "outcome": outcomes.get(point, "missing")})
    return rows


def _names(rows: Iterable[dict[str, Any]], part: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.get(part, {})))


def write_tables(folder: Path, rows: Sequence[dict[str, Any]], whole: dict[str, Any]) -> None:
    """``sweep.csv`` (one line a run) and ``sweep.json`` (the same, with ``whole`` around it), each replaced whole."""
    parameters, metrics = _names(rows, "parameters"), _names(rows, "metrics")
    own = ["point", "outcome", "reason", "record", "digest", "level", "epsilon", "delta"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*own, *(f"parameter.{name}" for name in parameters), *(f"metric.{name}" for name in metrics)])
    for row in rows:
        values = [row.get(name) for name in own]
        values += [row.get("parameters", {}).get(name) for name in parameters]
        values += [row.get("metrics", {}).get(name) for name in metrics]
        writer.writerow(["" if value is None else value for value in values])
    _replace(folder / "sweep.csv", text.getvalue())
    _replace(folder / "sweep.json", json.dumps({**whole, "points": list(rows)}, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


@dataclass(frozen=True, repr=False)
class Summary:
    """A sweep as its trail and its records show it; shows itself as a table.

    Attributes:
        sweep: its id.
        status: ``finished``, ``interrupted`` or ``failed``.
        rows: one a point (see `rows_of`).
    """

    sweep: str
    status: str
    rows: tuple[dict[str, Any], ...]

    @classmethod
    def read(cls, folder: Path | str, sweep: str) -> Summary:
        """Read a sweep's last ``sweep.finished`` entry, and verify every record that it names.

        Raises:
            RecordError: the trail tells of no such sweep, or a record is missing, does not verify or is another one:
                code ``sweep-record``.
        """
        reader = TrailReader.open(AuditConfig().trail_location())
        started = [event for event in _events(reader, SweepStarted) if event.sweep == sweep]
        finished = [event for event in _events(reader, SweepFinished) if event.sweep == sweep]
        if not started or not finished:
            raise RecordError(f"The trail tells of no finished sweep {sweep!r}.", code="sweep-record")
        named = finished[-1].records
        found = {point: _verified(Path(folder), point, named[point]) for point in started[-1].points if point in named}
        return cls(sweep, finished[-1].status, tuple(rows_of(started[-1].points, found, {})))

    def __str__(self) -> str:
        head, *lines = self._table()
        widths = [max(len(line[at]) for line in (head, *lines)) for at in range(len(head))]
        table = [
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in (head, *lines)
        ]
        return "\n".join([self.headline, *(line.rstrip() for line in table)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *lines = self._table()
        cells = "".join(f"<th>{escape(text)}</th>" for text in head)
        body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>" for line in lines)
        return f"<p>{escape(self.headline)}</p><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"

    @property
    def headline(self) -> str:
        """The sweep in a sentence."""
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
        said = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        return f"Sweep {self.sweep}, {self.status}: {plural(len(self.rows), 'run')} ({said}); each record was verified."

    def _table(self) -> list[tuple[str, ...]]:
        parameters, metrics = _names(self.rows, "parameters"), _names(self.rows, "metrics")[:_MOST_METRICS]
        private = any(row.get("epsilon") is not None for row in self.rows)
        head = ("run", *parameters, "outcome", *(["ε alone"] if private else []), *metrics, "SHA-256 of the record")
        return [
            tuple(map(visible, head)),
            *(self._line(row, parameters, metrics, private=private) for row in self.rows),
        ]

    @staticmethod
    def _line(row: dict[str, Any], parameters: list[str], metrics: list[str], *, private: bool) -> tuple[str, ...]:
        outcome = row["outcome"] + (f" ({row['reason']})" if row.get("reason") else "")
        spent = row.get("epsilon")
        values = [
            row["point"],
            *(_text(row.get("parameters", {}).get(name)) for name in parameters),
            outcome,
            *([epsilon_text(spent) if spent is not None else ""] if private else []),
            *(_text(row.get("metrics", {}).get(name)) for name in metrics),
            short(row.get("digest") or "", 8),
        ]
        return tuple(map(visible, values))

    def digests(self) -> str:
        """The whole digest of every record, as lines: run, record, SHA-256 of the notebook's normal form."""
        return "\n".join(f"{row['point']}  {row['record']}  {row['digest']}" for row in self.rows if "record" in row)

    def figure(self) -> SweepFigure:
        """The picture."""
        return SweepFigure(*figure_of(self.rows))


@dataclass(frozen=True)
class SweepFigure:
    """A picture that a notebook keeps, with the sentence that says the same."""

    svg: str
    alt: str

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        del include, exclude
        return {"image/svg+xml": self.svg, "text/plain": self.alt}


def _text(value: Any) -> str:
    if value is None:
        return ""
    return number_text(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _events(reader: TrailReader, kind: Any) -> list[Any]:
    return [decode_body(entry.type, entry.body) for entry in reader.entries(type=kind.TYPE)]


def _verified(folder: Path, point: str, record: str) -> Found:
    opened = open_record(record_path(folder, point))
    if opened.verdict.level <= Level.DIVERGED or opened.sealed is None or opened.sealed.record != record:
        reason = opened.verdict.reasons[0].message if opened.verdict.reasons else "It is another record."
        raise RecordError(f"The record of run {point} does not hold: {reason}", code="sweep-record")
    return found_of(point, opened)


# -- the picture --------------------------------------------------------------------------------------------------


def figure_of(rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """One metric over the parameter that varies, as SVG and as a sentence; without one, how the runs ended.

    The metric is the first that at least two runs have a number of, the parameter the first number that varies; a
    second one that varies gives the colours.
    """
    import altair as alt

    from rlhf_audit_nb.reports.figures import svg_of

    metric = next((name for name in _names(rows, "metrics") if len(_numbers(rows, "metrics", name)) > 1), None)
    varying = [name for name in _names(rows, "parameters") if len(_values(rows, name)) > 1]
    across = next((name for name in varying if len(_numbers(rows, "parameters", name)) > 1), None)
    if metric is None or across is None:
        counts = {
            name: sum(row["outcome"] == name for row in rows) for name in sorted({row["outcome"] for row in rows})
        }
        data = [{"outcome": name, "runs": count} for name, count in counts.items()]
        chart = alt.Chart(alt.Data(values=data)).mark_bar(color="#0f5e7a").encode(
            x=alt.X("runs:Q", title="runs", axis=alt.Axis(tickMinStep=1)), y=alt.Y("outcome:N", title=None)
        )  # fmt: skip
        said = ", ".join(f"{count} {name}" for name, count in counts.items())
        return svg_of(chart.properties(width=480), "sweep"), f"How the runs ended: {said}."
    colour = next((name for name in varying if name != across), None)
    data = [
        {
            "x": row["parameters"][across],
            "y": row["metrics"][metric],
            **({} if colour is None else {"c": _text(row["parameters"].get(colour))}),
        }
        for row in rows
        if _is_number(row.get("parameters", {}).get(across)) and _is_number(row.get("metrics", {}).get(metric))
    ]
    encoding: dict[str, Any] = {
        "x": alt.X("x:Q", title=across, scale=alt.Scale(zero=False)),
        "y": alt.Y("y:Q", title=metric, scale=alt.Scale(zero=False)),
    }
    if colour is not None:
        encoding["color"] = alt.Color("c:N", title=colour)
    chart = alt.Chart(alt.Data(values=data)).mark_circle(size=60).encode(**encoding).properties(width=480, height=260)
    lowest, highest = min(item["y"] for item in data), max(item["y"] for item in data)
    by = f", by {colour}" if colour is not None else ""
    alt_text = (
        f"{metric} over {across}{by}, {plural(len(data), 'run')}: from {number_text(lowest)} to {number_text(highest)}."
    )
    return svg_of(chart, "sweep"), visible(alt_text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(rows: Sequence[dict[str, Any]], part: str, name: str) -> list[float]:
    values = (row.get(part, {}).get(name) for row in rows)
    return [value for value in values if _is_number(value)]


def _values(rows: Sequence[dict[str, Any]], name: str) -> set[str]:
    return {json.dumps(row["parameters"].get(name)) for row in rows if "parameters" in row}


# -- the notebook -------------------------------------------------------------------------------------------------

_TITLE = """# A sweep

One notebook, run once for each point of a grid. Every run is a record of its own; the cells below verify each of them
and show what it says. ε alone is what the trainings of one run cost; what all runs cost together is the trail's
(`rlhf-audit budget show`)."""


def write_notebook(path: Path) -> Path:
    """The source of the summary, which is the same for every sweep."""
    import nbformat

    cell: Any = nbformat.v4.new_code_cell
    markdown: Any = nbformat.v4.new_markdown_cell
    cells = [
        markdown(_TITLE, id="sweep-title"),
        cell('sweep = ""  # the sweep\'s id', id="sweep-parameters", metadata={"tags": ["parameters"]}),
        cell(
            "from rlhf_audit_nb.sweeping.summary import Summary\n\n"
            'summary = Summary.read(".", sweep)  # verifies every record\nsummary',
            id="sweep-table",
        ),
        cell("summary.figure()", id="sweep-figure"),
        cell("print(summary.digests())", id="sweep-digests"),
    ]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    new: Any = nbformat.v4.new_notebook
    node = new(cells=cells, metadata={"kernelspec": spec})
    path.write_text(nbformat.writes(node), encoding="utf-8")
    return path
