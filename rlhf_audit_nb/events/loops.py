"""What a hand-written training loop tells of itself beside its steps. Floor 1."""

from __future__ import annotations

from typing import ClassVar

from rlhf_audit_nb.events.base import Event, Number

__all__ = ["CheckpointRecorded", "MetricsLogged"]


class MetricsLogged(Event, frozen=True, kw_only=True):
    """Numbers that a person's own code handed in, ``step`` as it counts them (``None`` where it said none)."""

    TYPE: ClassVar[str] = "metrics.logged"

    metrics: dict[str, Number]
    step: int | None = None


class CheckpointRecorded(Event, frozen=True, kw_only=True):
    """A person's own code called this moment a checkpoint.

    ``step`` is the number of optimizer steps that the run had recorded, ``epoch`` and ``metrics`` are what was handed
    in. ``weights_digest`` is the digest of the model's weights in memory, in the form of a final model's (``None``
    where no model was shown); ``folder_digest`` that of the folder which the ``weights.saved`` entry before this one
    signed (``None`` where nothing was saved).
    """

    TYPE: ClassVar[str] = "train.checkpoint"

    step: int
    epoch: int | float | None = None
    metrics: dict[str, Number] = {}
    weights_digest: str | None = None
    folder_digest: str | None = None
