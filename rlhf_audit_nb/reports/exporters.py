"""The nbconvert exporters ``audit-html`` and ``audit-pdf``. Floor 4.

``jupyter nbconvert --to audit-html RECORD.ipynb`` gives the same bytes as ``rlhf-audit report RECORD.ipynb``. Jupyter
makes one of each exporter whenever it lists the formats, so nothing heavy is imported before a notebook is handed in,
and nothing here raises until then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import nbformat
from nbconvert.exporters import Exporter
from traitlets import Unicode, default

if TYPE_CHECKING:
    from rlhf_audit_nb.records import OpenedRecord
    from rlhf_audit_nb.trail import TrustPolicy

__all__ = ["AuditHTMLExporter", "AuditPDFExporter"]


class _AuditExporter(Exporter):
    """Opens a record, verifies it, and gives its report in one format."""

    format = "html"

    mode = Unicode("eu_ai_act", help="The compliance mode (framework) to assess against.").tag(config=True)
    policy = Unicode(
        "", help="A trust policy file whose keys count; empty takes your own key for the record's trail."
    ).tag(config=True)

    def from_filename(self, filename: str, resources: dict[str, Any] | None = None, **_kw: Any) -> tuple[Any, Any]:
        """Converts the record in a file, from its very bytes."""
        from rlhf_audit_nb.records import open_record

        opened = open_record(filename, policy=self._policy())
        return self._converted(opened, self._resources(resources))

    def from_file(self, file_stream: Any, resources: dict[str, Any] | None = None, **_kw: Any) -> tuple[Any, Any]:
        """Converts a record from an open file."""
        data = file_stream.read()
        return self._from_bytes(data.encode() if isinstance(data, str) else data, resources)

    def from_notebook_node(self, nb: Any, resources: dict[str, Any] | None = None, **_kw: Any) -> tuple[Any, Any]:
        """Converts a record that nbformat has read: how its cells and outputs are laid out does not matter."""
        return self._from_bytes(nbformat.writes(nb).encode(), resources)

    def _from_bytes(self, data: bytes, resources: dict[str, Any] | None) -> tuple[Any, Any]:
        from rlhf_audit_nb.records.record import read_record

        return self._converted(read_record(data, policy=self._policy()), self._resources(resources))

    def _policy(self) -> TrustPolicy | None:
        if not self.policy:
            return None
        from pathlib import Path

        from rlhf_audit_nb.errors import KeyFileError
        from rlhf_audit_nb.trail import TrustPolicy

        try:
            text = Path(self.policy).read_text(encoding="utf-8")
        except OSError as error:
            raise KeyFileError(
                f"The policy {self.policy} cannot be read: {error.strerror or error}.",
                next_step="Name a policy file that exists.",
            ) from error
        return TrustPolicy.parse(text)

    def _resources(self, resources: dict[str, Any] | None) -> dict[str, Any]:
        found = dict(resources or {})
        found.setdefault("metadata", {})
        found["output_extension"] = self.file_extension
        return found

    def _converted(self, opened: OpenedRecord, resources: dict[str, Any]) -> tuple[Any, Any]:
        from rlhf_audit_nb.compliance import Evidence
        from rlhf_audit_nb.reports.report import build_compliance_report

        report = build_compliance_report(Evidence.from_record(opened), self.mode, self.format)
        return (report.html if self.format == "html" else report.content()), resources


class AuditHTMLExporter(_AuditExporter):
    """The audit report as one HTML file."""

    format = "html"
    export_from_notebook = "Audit report (HTML)"
    output_mimetype = "text/html"

    @default("file_extension")
    def _file_extension_default(self) -> str:
        return ".html"


class AuditPDFExporter(_AuditExporter):
    """The audit report as PDF/A-3a and PDF/UA-1."""

    format = "pdf"
    export_from_notebook = "Audit report (PDF)"
    output_mimetype = "application/pdf"

    @default("file_extension")
    def _file_extension_default(self) -> str:
        return ".pdf"
