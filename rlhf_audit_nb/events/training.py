"""What a training leaves as it goes: its steps and the weights that were saved. Floor 1."""

from __future__ import annotations

from typing import ClassVar

from rlhf_audit_nb.events.base import Event, Number, Private

__all__ = [
    "Step",
    "StepPrivate",
    "WeightsSaved",
]


class StepPrivate(Private, frozen=True, kw_only=True):
    """A step's metrics that are functions of private data."""

    metrics: dict[str, Number]


class Step(Event, frozen=True, kw_only=True):
    """One optimizer step (or one of every n: the audit frequency).

    ``epsilon`` is the composed total after this step. ``update_norm`` is the L2 norm of the parameter update. Under
    privacy the public ``metrics`` hold the loss that was released for it (``private_loss``), if any, and nothing else.
    ``batch_digest`` is that of the batch which a hand-written loop showed.

    ``weights_digest`` is the weights digest of the trainable tensors after the step, ``weights_moved`` the L2 norm of
    their difference from where the digest before this one found them; the first one is measured from the tensors of
    the ``trainable_digest`` that training began with. A digest that stands alone in an entry is the last link: what
    training left.
    """

    TYPE: ClassVar[str] = "train.step"
    PRIVATE: ClassVar[type[Private] | None] = StepPrivate

    step: int
    metrics: dict[str, Number] = {}
    learning_rate: float | None = None
    epsilon: Number | None = None
    gradient_norm: Number | None = None
    update_norm: Number | None = None
    weights_digest: str | None = None
    weights_moved: Number | None = None
    notes: list[str] = []
    batch_digest: str | None = None


class WeightsSaved(Event, frozen=True, kw_only=True):
    """A folder of weights was saved: digest over its files, and its OpenSSF model signature's digest.

    ``step`` is that of the run's last training, whose weights they are; ``None`` where nobody knows whose they are.
    ``listed`` is the digest of the files' names with their digests (`rlhf_audit_nb.capture.folders`).
    """

    TYPE: ClassVar[str] = "weights.saved"

    step: int | None
    name: str
    digest: str
    files: int
    bytes: int
    signature_digest: str | None = None
    listed: str | None = None
