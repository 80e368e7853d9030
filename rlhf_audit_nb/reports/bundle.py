"""The evidence itself, to stand beside a report: every entry byte for byte, the verdict, the checkpoint. Floor 4."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.evidence import Evidence

__all__ = ["evidence_bundle"]


def evidence_bundle(evidence: Evidence) -> bytes:
    """The evidence itself as JSON, to stand beside a report: the verdict, the checkpoint and every entry's bytes.

    ``data`` is base64 of the exact bytes of the leaf; SHA-256 over a zero byte and them gives ``leaf_hash``.
    """
    bundle = {
        "format": "rlhf-audit-evidence/1",
        "verdict": evidence.verdict.to_dict(),
        "checkpoint": evidence.checkpoint,
        "entries": [
            {"index": item.index, "leaf_hash": item.leaf_hash, "data": base64.b64encode(item.entry.data).decode()}
            for item in evidence.items
        ],
    }
    return json.dumps(bundle, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
