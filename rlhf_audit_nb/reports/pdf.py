"""A report as one PDF file: PDF/A-3a and PDF/UA-1, tagged, with its evidence attached. Floor 4.

Typst sets ``templates/nbconvert/audit-pdf/report.typ`` from the report's data; nothing that comes from a trail or a
notebook is ever read as typst code. Fonts are our own (Inter) and typst's embedded ones, never the machine's, and the
date is the newest entry's, so that the same input gives the same bytes. The file *declares* both standards; typst
checks what it can while writing, and nothing here proves more.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.compliance.templates import template_path
from rlhf_audit_nb.errors import ReportError
from rlhf_audit_nb.reports.html import GENERATOR

if TYPE_CHECKING:
    from rlhf_audit_nb.reports.model import ReportModel

__all__ = ["render_pdf"]

STANDARDS = ("a-3a", "ua-1")
_ENDINGS = {"image/png": "png", "image/jpeg": "jpg", "image/svg+xml": "svg"}
_VERBATIM = frozenset({"svg", "data", "file", "key"})


def render_pdf(report: ReportModel, evidence: bytes) -> bytes:
    """The report's PDF with ``evidence`` (see `evidence_bundle`) attached as ``evidence.json``.

    Raises:
        ReportError: typst could not set the report.
    """
    import typst

    data = report.to_dict()
    data["generator"] = GENERATOR
    try:
        return _compile(data, evidence)
    except typst.TypstError as error:
        # A notebook may hold a picture that no PDF can carry; the report then says so in its place.
        if not _without_pictures(data):
            raise _failed(error) from error
    try:
        return _compile(data, evidence)
    except typst.TypstError as error:
        raise _failed(error) from error


def _failed(error: Exception) -> ReportError:
    return ReportError(
        f"The report cannot be set as PDF: {str(error).strip()}.",
        next_step="Write it as HTML (--format html), which shows the same.",
        code="pdf",
    )


def _compile(data: dict[str, Any], evidence: bytes) -> bytes:
    import typst

    set_pages: Any = typst.compile  # its overloads ask for invariant lists of one type
    folder = template_path("nbconvert", "audit-pdf")
    with tempfile.TemporaryDirectory(prefix="rlhf-audit-pdf-") as name:
        root = Path(name)
        (root / "report.typ").write_bytes((folder / "report.typ").read_bytes())
        (root / "evidence.json").write_bytes(evidence)
        shown = _shown(_with_files(data, root))
        (root / "report.json").write_text(json.dumps(shown, ensure_ascii=False), encoding="utf-8")
        pdf: bytes = set_pages(
            str(root / "report.typ"),
            root=str(root),
            font_paths=[str(folder / "fonts")],
            ignore_system_fonts=True,
            format="pdf",
            pdf_standards=list(STANDARDS),
            timestamp=data["timestamp"],
        )
    return pdf


def _with_files(data: dict[str, Any], root: Path) -> dict[str, Any]:
    """``data`` with each picture written beside the template and named by its file."""
    drawn = []
    for figure in data["figures"]:
        file = f"figure-{figure['key']}.svg"
        (root / file).write_text(figure["svg"], encoding="utf-8")
        drawn.append({**figure, "file": file, "svg": ""})
    cells = []
    for cell in data["cells"]:
        outputs = []
        for number, output in enumerate(cell["outputs"]):
            file = ""
            if output["kind"] == "picture":
                file = f"cell-{cell['position']}-{number}.{_ENDINGS[output['mime']]}"
                (root / file).write_bytes(_picture(output))
            outputs.append({**output, "file": file, "data": ""})
        cells.append({**cell, "outputs": outputs})
    return {**data, "figures": drawn, "cells": cells}


def _picture(output: dict[str, Any]) -> bytes:
    if output["mime"] == "image/svg+xml":
        return str(output["data"]).encode()
    try:
        return base64.b64decode("".join(output["data"].split()), validate=True)
    except (binascii.Error, ValueError):
        return b""  # no picture: typst refuses it, and the report says so in its place


def _without_pictures(data: dict[str, Any]) -> bool:
    found = False
    for cell in data["cells"]:
        for output in cell["outputs"]:
            if output["kind"] == "picture":
                found = True
                output.update(kind="text", text=f"[a picture that this file cannot carry: {output['text']}]")
    return found


@cache
def _hidden() -> re.Pattern[str]:
    """Matches every character that none of the fonts can show: a PDF/A file may hold none of them."""
    text = template_path("nbconvert", "audit-pdf", "fonts", "coverage.txt").read_text(encoding="utf-8")
    ranges = [line.split("-") for line in text.splitlines() if line and not line.startswith("#")]
    kept = "".join(f"\\U{int(low, 16):08x}-\\U{int(high, 16):08x}" for low, high in ranges)
    return re.compile(f"[^\n\t{kept}]")


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return _hidden().sub(lambda found: f"[U+{ord(found.group()):04X}]", value)
    if isinstance(value, dict):
        return {key: part if key in _VERBATIM else _shown(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_shown(part) for part in value]
    return value
