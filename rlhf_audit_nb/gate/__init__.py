"""The gate: whether a model may be used, by its record and a policy. Floor 4.

`policy` reads what is asked, `search` finds records by a model's digest, `model` holds the folder to its record,
`rules` holds the record to the policy, `judging` puts them together, and `finding` is what comes out. None of these
needs a private key, and nothing is changed; `deciding` writes what was decided into the trail, where that is asked.
"""

from __future__ import annotations

from rlhf_audit_nb.gate.deciding import append_decision, example_policy, record_decision
from rlhf_audit_nb.gate.finding import Decision, Finding, Judgement
from rlhf_audit_nb.gate.judging import gate, judge_opened, judge_record, trail_beside
from rlhf_audit_nb.gate.policy import GatePolicy, load_policy, parse_policy

__all__ = [
    "Decision",
    "Finding",
    "GatePolicy",
    "Judgement",
    "append_decision",
    "example_policy",
    "gate",
    "judge_opened",
    "judge_record",
    "load_policy",
    "parse_policy",
    "record_decision",
    "trail_beside",
]
