"""Cards: short descriptions of one model for those who use it, drawn from a verified trail or record. Floor 4."""

from __future__ import annotations

from rlhf_audit_nb.cards.model_card import FORMATS, ModelCard, build_card

__all__ = ["FORMATS", "ModelCard", "build_card"]
