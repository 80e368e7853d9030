"""What a training computed: operations by what they were for, time and energy; what a base model took. Floor 1."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from rlhf_audit_nb.events.base import Event, Private

__all__ = [
    "BaseComputeDeclared",
    "ComputeRecorded",
    "ComputeRecordedPrivate",
    "ModelShape",
    "Passes",
]


class ModelShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of a model decides how many operations a token takes.

    ``parameters`` are all, ``trainable`` those that training changes. ``dense`` are those of matrices that every token
    passes: without the tables of tokens at either end, and of experts only as many as a token is sent to.
    ``backward`` are those among them behind the first block that learns, where gradients of the activations must be
    worked out; ``learning`` those that are trainable. ``width`` is the width of attention (heads times their size).
    """

    parameters: int
    trainable: int
    dense: int
    backward: int
    learning: int
    layers: int
    width: int


class Passes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Forward passes of one kind: how many, over how many positions, and the band of their FLOP.

    ``positions`` count padding, ``tokens`` do not (``None`` where no mask was seen). ``scores`` are the pairs of
    positions that attention compares in one layer, sequence by sequence. An update's FLOP hold its backward pass.
    """

    passes: int
    positions: int
    scores: int
    low: float
    high: float
    tokens: int | None = None


class ComputeRecordedPrivate(Private, frozen=True, kw_only=True):
    """What was measured of a training under differential privacy: all of it follows from the rows that were drawn."""

    columns: dict[str, Passes]
    seconds: float | None = None
    energy: dict[str, float] = {}
    transformers_flos: float | None = None


class ComputeRecorded(Event, frozen=True, kw_only=True):
    """One training's compute, as one process saw it; ``processes`` of them worked side by side.

    ``columns`` are ``update`` (passes with a gradient), ``generation`` (sampling from the model that is trained),
    ``scoring`` (the same model without a gradient: log-probabilities of an earlier or a reference policy),
    ``reference`` and ``reward`` (other models), and ``evaluation``. ``seconds`` are those of this training on a clock
    that only goes forward; ``devices`` how many devices all processes had. ``energy`` holds joules by the counter that
    was read; without one it is empty. ``transformers_flos`` is the trainer's own estimate. ``uncounted`` names
    columns that are not in ``columns`` though something was computed: it ran where its passes could not be seen.

    Under differential privacy the measured fields are in the private half, and ``shape`` alone stands in the open.
    """

    TYPE: ClassVar[str] = "compute.recorded"
    PRIVATE: ClassVar[type[Private] | None] = ComputeRecordedPrivate

    trainer: str
    shape: ModelShape
    device: str
    processes: int = 1
    devices: int = 1
    columns: dict[str, Passes] = {}
    seconds: float | None = None
    energy: dict[str, float] = {}
    transformers_flos: float | None = None
    notes: list[str] = []
    uncounted: list[str] = []


class BaseComputeDeclared(Event, frozen=True, kw_only=True):
    """Somebody states the training compute (FLOP) of the model that trainings on this trail began with.

    ``source`` says where the figure is from, ``by`` who states it; ``systemic`` whether the model is one with systemic
    risk. ``flop`` is ``None`` where only that is stated.
    """

    TYPE: ClassVar[str] = "compute.declared"

    model: str
    source: str
    by: str
    flop: float | None = None
    systemic: bool = False
