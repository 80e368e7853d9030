"""The trail: an append-only, tamper-evident log with signed checkpoints. Floor 0.

Knows nothing of training, notebooks or reports. One module a format: `entry`, `merkle`, `encoding`, `frame`
and `vkey` (what a signed note and a key look like), `checkpoint`, `statement` and `cosignature` (what cosigners sign),
`note` (who signs, and what counts), `proof`, `policy`; `keys`, `key_files`, `key_care` and `signers` (key rings),
`succession` and `rotation` (which key counts when, and how keys change); `commitment`, `vault`, `vault_file`,
`vault_key`, `openings`, `erasure` and `disclosure` (what is private); `store`, `writer`, `heads` and `liveness` keep
it; `verify` checks it and `verdict` says how far that reaches, `query` looks into it; `trail` is what the floors above
hold.
"""

from __future__ import annotations

from rlhf_audit_nb.trail.entry import Entry, Envelope
from rlhf_audit_nb.trail.keys import KeyRing
from rlhf_audit_nb.trail.policy import TrustPolicy
from rlhf_audit_nb.trail.trail import InterruptedRun, Recovery, Trail, TrailReader, TrailStatus
from rlhf_audit_nb.trail.vault import Half, HalfState, Opening, Vault, check_opening
from rlhf_audit_nb.trail.verdict import Anchor, Level, Reason, RunSummary, Verdict
from rlhf_audit_nb.trail.verify import check_entries, verify_trail
from rlhf_audit_nb.trail.writer import Draft, Pending

__all__ = [
    "Anchor",
    "Draft",
    "Entry",
    "Envelope",
    "Half",
    "HalfState",
    "InterruptedRun",
    "KeyRing",
    "Level",
    "Opening",
    "Pending",
    "Reason",
    "Recovery",
    "RunSummary",
    "Trail",
    "TrailReader",
    "TrailStatus",
    "TrustPolicy",
    "Vault",
    "Verdict",
    "check_entries",
    "check_opening",
    "verify_trail",
]
