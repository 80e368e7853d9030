"""A record's cells as a report shows them: source, how it ended, and outputs as text or picture. Floor 4.

HTML outputs are never shown as HTML: a report is one page without anyone else's markup. What is long is cut, and the
cut is said; the whole stands in the record.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.compliance.evidence import Cite, cite
from rlhf_audit_nb.events import CellExecuted

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.evidence import Evidence

__all__ = ["Block", "Cell", "Output", "cells_of"]

MAX_LINES = 120
MAX_CHARS = 12_000
MAX_ALT = 600

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_REPR = re.compile(r"^<[^\n]*>$")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$")
_ITEM = re.compile(r"^\s*(?:[-*+]|\d+[.)])\s+(.*)$")
_PICTURES = ("image/png", "image/jpeg", "image/svg+xml")


@dataclass(frozen=True)
class Block:
    """A part of a Markdown cell: ``heading``, ``text``, ``item`` or ``code``, with its lines as they were written."""

    kind: str
    text: str


@dataclass(frozen=True)
class Output:
    """One output: ``text``, ``error`` or ``picture`` (``data`` is base64, or the SVG itself, and ``text`` its alt)."""

    kind: str
    text: str
    mime: str = ""
    data: str = ""
    cut: int = 0


@dataclass(frozen=True)
class Cell:
    """One cell: its place (from 1), kind, source, how its execution ended, and the entries that recorded it."""

    position: int
    kind: str
    label: str
    source: str
    status: str
    outputs: tuple[Output, ...]
    blocks: tuple[Block, ...]
    cites: tuple[Cite, ...]


def cells_of(evidence: Evidence) -> tuple[Cell, ...]:
    """The cells of the evidence's notebook; none where it has no notebook."""
    notebook = evidence.notebook
    if notebook is None:
        return ()
    # The last execution of a cell is the one whose outputs stand in the notebook.
    executed = {event.cell: (item.index, event.status) for item, event in evidence.of(CellExecuted)}
    return tuple(
        _cell(position, cell, executed.get(str(cell.get("id", ""))))
        for position, cell in enumerate(notebook["cells"], 1)
    )


def _cell(position: int, cell: Any, executed: tuple[int, str] | None) -> Cell:
    kind = str(cell.get("cell_type", "raw"))
    tags = (cell.get("metadata") or {}).get("tags") or []
    label = "parameters of this execution" if "injected-parameters" in tags else ""
    label = "default parameters" if not label and "parameters" in tags else label
    outputs = cell.get("outputs") or [] if kind == "code" else []
    status = "" if kind != "code" else executed[1] if executed else "execution not recorded"
    source = _joined(cell.get("source", ""))
    return Cell(
        position=position,
        kind=kind,
        label=label,
        source=source,
        blocks=_blocks(source) if kind == "markdown" else (),
        status=status,
        outputs=tuple(shown for output in outputs if (shown := _output(output, position)) is not None),
        cites=cite([executed[0]]) if executed else (),
    )


def _blocks(source: str) -> tuple[Block, ...]:
    """A Markdown source's paragraphs, headings, list items and fenced code, each on its own."""
    blocks: list[Block] = []
    lines: list[str] = []
    kind = "text"

    def close(following: str) -> str:
        text = "\n".join(lines) if kind == "code" else " ".join(line.strip() for line in lines)
        if text.strip():
            blocks.append(Block(kind, text))
        lines.clear()
        return following

    for line in source.splitlines():
        if line.lstrip().startswith("```"):
            kind = close("text" if kind == "code" else "code")
        elif kind == "code":
            lines.append(line)
        elif not line.strip():
            kind = close("text")
        elif heading := _HEADING.match(line):
            kind = close("text")
            blocks.append(Block("heading", heading.group(1)))
        elif item := _ITEM.match(line):
            kind = close("item")
            lines.append(item.group(1))
        else:
            lines.append(line)
    close("text")
    return tuple(blocks)


def _joined(value: Any) -> str:
    return "".join(str(part) for part in value) if isinstance(value, list) else str(value)


def _output(output: Any, position: int) -> Output | None:
    kind = output.get("output_type")
    if kind == "stream":
        return _text("text", _joined(output.get("text", "")))
    if kind == "error":
        lines = [_joined(line) for line in output.get("traceback") or []]
        return _text("error", "\n".join(lines) or f"{output.get('ename', '')}: {output.get('evalue', '')}")
    data = output.get("data") or {}
    plain = _joined(data.get("text/plain", ""))
    for mime in _PICTURES:
        if mime in data:
            metadata = output.get("metadata") or {}
            alt = metadata.get("alt") or (metadata.get(mime) or {}).get("alt") or plain
            alt = _clean(str(alt)).strip()
            if not alt or _REPR.match(alt):
                alt = f"A picture that cell {position} gave out, without a description of its own."
            return Output("picture", alt[:MAX_ALT], mime, _joined(data[mime]).strip())
    if plain and not _REPR.match(plain.strip()):
        return _text("text", plain)
    if data:
        return Output("text", f"[an output of type {', '.join(sorted(map(str, data)))}, not shown here]")
    return None


def _clean(text: str) -> str:
    """Without terminal colours, and with each line as a terminal would leave it after carriage returns."""
    plain = _ANSI.sub("", text).replace("\r\n", "\n")
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in plain.split("\n"))


def _text(kind: str, text: str) -> Output | None:
    lines = _clean(text).rstrip("\n").split("\n")
    kept = lines[:MAX_LINES]
    shown = "\n".join(kept)[:MAX_CHARS]
    if not shown.strip():
        return None
    return Output(kind, shown, cut=len(lines) - (shown.count("\n") + 1))
