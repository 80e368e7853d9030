"""The report object that users hold: it shows itself in a notebook and saves itself as HTML, PDF or JSON. Floor 4."""

from __future__ import annotations

import json
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from rlhf_audit_nb.compliance.assess import State
from rlhf_audit_nb.errors import ReportError
from rlhf_audit_nb.reports.bundle import evidence_bundle
from rlhf_audit_nb.reports.html import GENERATOR, render_html
from rlhf_audit_nb.reports.model import build_report
from rlhf_audit_nb.reports.pdf import render_pdf

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.evidence import Evidence
    from rlhf_audit_nb.reports.model import ReportModel

__all__ = ["FORMATS", "ComplianceReport", "Format", "build_compliance_report"]

Format = Literal["html", "pdf", "json"]
FORMATS: tuple[str, ...] = get_args(Format)


class ComplianceReport:
    """A report over verified evidence.

    The same evidence gives the same bytes in every format. `save` chooses by the file's suffix, or by ``format``
    where the name has none.

    Args:
        model: what the report says.
        evidence: what it was drawn from; its entries go into the PDF and the JSON.
        format: the format of `content`.
    """

    def __init__(self, model: ReportModel, evidence: Evidence, format: str = "html") -> None:  # noqa: A002
        if format not in FORMATS:
            raise _unknown_format(format)
        self.model = model
        self.format = format
        self._evidence = evidence

    @cached_property
    def html(self) -> str:
        """The report as one HTML page without links out and without script."""
        return render_html(self.model)

    @cached_property
    def pdf(self) -> bytes:
        """The report as PDF/A-3a and PDF/UA-1, with its evidence attached."""
        return render_pdf(self.model, evidence_bundle(self._evidence))

    @property
    def json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=2) + "\n"

    @property
    def level(self) -> str:
        """The verdict's level."""
        return self.model.level

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain values: ``verdict``, ``privacy``, ``assessment``, ``evidence`` and the rest."""
        said = self.model.to_dict()
        figures = [{name: figure[name] for name in ("key", "title", "alt", "cites")} for figure in said.pop("figures")]
        return {
            "format": "rlhf-audit-report/1",
            "tool": GENERATOR,
            "verdict": self._evidence.verdict.to_dict(),
            **said,
            "figures": figures,
        }

    def content(self, format: str | None = None) -> bytes:  # noqa: A002
        """The report's bytes in ``format``.

        Raises:
            ReportError: the format is not known, or the PDF cannot be made.
        """
        wanted = self.format if format is None else format
        if wanted == "html":
            return self.html.encode()
        if wanted == "pdf":
            return self.pdf
        if wanted == "json":
            return self.json.encode()
        raise _unknown_format(wanted)

    def save(self, path: Path | str) -> Path:
        """Writes the report to ``path`` in the format of its suffix (.html, .pdf or .json).

        Raises:
            ReportError: the suffix is not known, or the file cannot be written.
        """
        target = Path(path)
        suffix = target.suffix.lower().lstrip(".")
        data = self.content({"htm": "html"}.get(suffix, suffix) if suffix else self.format)
        try:
            target.write_bytes(data)
        except OSError as error:
            raise ReportError(
                f"The report cannot be written to {target}: {error.strerror or error}.",
                next_step="Name a file in a folder that exists and can be written.",
                code="unwritable",
            ) from error
        return target

    def __repr__(self) -> str:
        counts = self.model.assessment
        return (
            f"<ComplianceReport {self.model.level}: {counts.count(State.EVIDENCED)} of {len(counts.lines)} "
            f"{counts.framework.title} requirements evidenced, {counts.count(State.MISSING)} missing; "
            f"{self._privacy()}>"
        )

    def _privacy(self) -> str:
        tile = self.model.tiles[0]
        return tile.label if tile.value in tile.label else f"{tile.value} {tile.label}"

    def _repr_html_(self) -> str:
        return _summary(self.model)


def build_compliance_report(
    evidence: Evidence,
    mode: str = "eu_ai_act",
    format: str = "html",  # noqa: A002
) -> ComplianceReport:
    """The report on ``evidence`` under a compliance mode.

    Raises:
        ReportError: the mode or the format is not known; the message lists those there are.
    """
    if format not in FORMATS:
        raise _unknown_format(format)
    return ComplianceReport(build_report(evidence, mode), evidence, format)


def _unknown_format(name: str) -> ReportError:
    return ReportError(
        f"The report format {name!r} is not known.",
        next_step=f"Write one of: {', '.join(FORMATS)}.",
        code="unknown-format",
    )


# In a notebook the report shows a summary that uses JupyterLab's own colours and only inline styles: nothing of it
# reaches another output, and a notebook that is not trusted shows it too.
_COLOURS = {"ok": "#17704f", "attest": "#3150b4", "warn": "#8f5200", "bad": "#b3261e", "na": "#66707c"}
_INK = "var(--jp-ui-font-color1, #1b2430)"
_INK_2 = "var(--jp-ui-font-color2, #4d5a6a)"
_LINE = "var(--jp-border-color2, #dfe4ea)"


def _summary(model: ReportModel) -> str:
    said = model.to_dict()
    colour = _COLOURS.get(said["level_state"], _COLOURS["na"])
    tiles = "".join(
        f'<div style="flex:1 1 130px;padding:8px 12px;border-left:1px solid {_LINE}">'
        f'<div style="font-size:17px;font-weight:600">{escape(tile["value"])}</div>'
        f'<div style="font-size:11.5px;color:{_INK_2}">{escape(tile["label"])}</div></div>'
        for tile in said["tiles"]
    )
    lines = [line for line in said["assessment"]["lines"] if line["state"] == "evidenced"]
    rows = "".join(
        f'<li style="margin:0 0 3px"><b>{escape(line["article"])}</b> {escape(line["requirement"])}'
        f'<span style="color:{_INK_2}">{"" if line["whole"] else " (in part)"} '
        f"{escape(' '.join(cite['text'] for cite in line['cites']))}</span></li>"
        for line in lines
    )
    warning = "" if said["trusted"] else "<p><b>Nothing in this report is evidence.</b></p>"
    shown = f'<ul style="margin:4px 0 0;padding-left:18px;font-size:12px">{rows}</ul>' if rows else ""
    return (
        f'<div role="group" aria-label="Compliance report" style="max-width:860px;color:{_INK};line-height:1.45;'
        f'border:1px solid {_LINE};border-left:5px solid {colour};border-radius:6px;padding:12px 16px;font-size:13px">'
        f'<div style="font-size:16px;font-weight:600">{escape(said["title"])}</div>'
        f'<div style="margin:2px 0 6px"><b style="color:{colour}">{escape(said["level"])}</b> '
        f'{escape(said["shows"])} <span style="color:{_INK_2}">{escape(said["not_shown"])}</span></div>{warning}'
        f'<div style="display:flex;flex-wrap:wrap;margin:6px 0">{tiles}</div>'
        f'<p style="margin:6px 0 0">{escape(said["privacy_words"])}</p>{shown}'
        f'<p style="margin:8px 0 0;font-size:12px;color:{_INK_2}">{escape(said["footer"])}. The whole report: '
        f'<code>.save("report.html")</code> or <code>.save("report.pdf")</code>.</p></div>'
    )
