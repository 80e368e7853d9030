"""Where evidence comes from: a live trail, a published one or a record, whatever is named. Floor 4."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_audit_nb.compliance.evidence import Evidence

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import TrustPolicy

__all__ = ["evidence_of"]


def evidence_of(target: Path | str, policy: TrustPolicy | None = None) -> Evidence:
    """The verified evidence of a trail's folder, of a published trail (folder or address) or of a record.

    Raises:
        AuditError: there is nothing of that kind there, or no key to verify it with.
    """
    from rlhf_audit_nb.records import open_record
    from rlhf_audit_nb.trail.published import is_published

    if is_published(target):
        return Evidence.from_published(target, policy=policy)
    if Path(target).is_file() and Path(target).suffix != ".sqlite":
        return Evidence.from_record(open_record(Path(target), policy=policy))
    return Evidence.from_trail(Path(target), policy=policy)
