"""A report as one HTML file: no link out, no script, the same bytes for the same input. Floor 4.

The template is ``templates/nbconvert/audit-html/index.html.j2``; everything that comes from a trail or a notebook is
escaped by Jinja's autoescape. Only the figures' SVG goes in as it is: it was drawn here.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb import __version__
from rlhf_audit_nb.compliance.templates import template_path

if TYPE_CHECKING:
    from rlhf_audit_nb.reports.model import ReportModel

__all__ = ["GENERATOR", "page_style", "render_html"]

GENERATOR = f"rlhf-audit-trail {__version__}"


def render_html(report: ReportModel) -> str:
    """The report's page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = template_path("nbconvert", "audit-html")
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    data = report.to_dict()
    for cell in data["cells"]:
        for output in cell["outputs"]:
            output["uri"] = _data_uri(output)
    css = (folder / "tokens.css").read_text(encoding="utf-8") + (folder / "report.css").read_text(encoding="utf-8")
    page = environment.get_template("index.html.j2").render(
        # The style sheet is ours; what it quotes from the trail is escaped for CSS in page_style.
        r=data, css=Markup(css + page_style(data["footer"])), generator=GENERATOR  # noqa: S704
    )  # fmt: skip
    return page + "\n"


def _data_uri(output: dict[str, Any]) -> str:
    if output["kind"] != "picture":
        return ""
    data = output["data"]
    if output["mime"] == "image/svg+xml":
        data = base64.b64encode(data.encode()).decode()
    return f"data:{output['mime']};base64,{''.join(data.split())}"


def page_style(footer: str) -> str:
    """The printed page's footer: trail, size, root, and the page's number."""
    quoted = "".join(c if c.isascii() and c.isalnum() else f"\\{ord(c):06x}" for c in footer)
    return (
        "\n@page{size:A4;margin:18mm 16mm 20mm;"
        f'@bottom-left{{content:"{quoted}";font:8pt system-ui,sans-serif;color:#5c6878}}'
        '@bottom-right{content:counter(page) " / " counter(pages);font:8pt system-ui,sans-serif;color:#5c6878}}\n'
    )
