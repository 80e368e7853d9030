"""Where the templates lie: inside an installed package, or beside it in a checkout. Floor 3."""

from __future__ import annotations

from pathlib import Path

from rlhf_audit_nb.errors import ReportError

__all__ = ["template_path"]

_PACKAGE = Path(__file__).resolve().parent.parent


def template_path(*parts: str) -> Path:
    """The file or folder ``parts`` under ``templates/``.

    Raises:
        ReportError: it is in neither place, so the installation is not whole.
    """
    for root in (_PACKAGE / "templates", _PACKAGE.parent / "templates"):
        path = root.joinpath(*parts)
        if path.exists():
            return path
    raise ReportError(
        f"The template {'/'.join(parts)!r} is missing from this installation.",
        next_step="Install rlhf-audit-trail again.",
        code="missing-template",
    )
