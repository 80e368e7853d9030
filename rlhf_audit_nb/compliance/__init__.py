"""Compliance: what a verified trail shows about the demands of a law or standard. Floor 3.

`Evidence` is the input, a `Framework` is data, `assess` is a pure function of the two.
"""

from __future__ import annotations

from rlhf_audit_nb.compliance.assess import Assessment, Line, State, assess
from rlhf_audit_nb.compliance.evidence import Cite, Evidence, Item, cite
from rlhf_audit_nb.compliance.framework import MODES, Framework, Requirement, load_framework

__all__ = [
    "MODES",
    "Assessment",
    "Cite",
    "Evidence",
    "Framework",
    "Item",
    "Line",
    "Requirement",
    "State",
    "assess",
    "cite",
    "load_framework",
]
