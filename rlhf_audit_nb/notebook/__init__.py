"""The notebook's face: magics and live panels. Floor 6.

``%load_ext rlhf_audit_nb`` registers the magics; nothing here imports torch before a cell is audited.
"""

from __future__ import annotations
