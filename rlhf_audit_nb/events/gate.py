"""What gates decided about models. Floor 1."""

from __future__ import annotations

from typing import ClassVar

from rlhf_audit_nb.events.base import Event

__all__ = ["GateDecided"]


class GateDecided(Event, frozen=True, kw_only=True):
    """A model and its records were held to a policy: ``decision`` is ``passed``, ``refused`` or ``does-not-hold``.

    ``policy`` is the SHA-256 of the policy's file, ``resolved`` that of all it asks with the contents of the files that
    it names. ``model`` is the digest of the model's folder in the form of `WeightsSaved`, ``None`` where it has none
    (it holds a symbolic link). ``record`` is the id of the record that met everything, ``judged`` those of all records
    that were found. ``met`` and ``unmet`` are the ids of what was checked, of the record that came nearest where none
    met everything.
    """

    TYPE: ClassVar[str] = "gate.decided"

    decision: str
    policy: str
    resolved: str
    model: str | None = None
    record: str | None = None
    judged: list[str] = []
    met: list[str] = []
    unmet: list[str] = []
    tool: str = ""
