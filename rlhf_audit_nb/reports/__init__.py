"""Reports: what people read, drawn from a verified trail or record. Floor 4.

`build_compliance_report` gives an object that shows itself in a notebook and saves itself as HTML, PDF or JSON.
"""

from __future__ import annotations

from rlhf_audit_nb.reports.model import ReportModel, build_report
from rlhf_audit_nb.reports.report import FORMATS, ComplianceReport, build_compliance_report

__all__ = ["FORMATS", "ComplianceReport", "ReportModel", "build_compliance_report", "build_report"]
