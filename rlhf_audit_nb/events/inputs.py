"""What a training starts from: data, models, the trainer and its settings. Floor 1."""

from __future__ import annotations

from typing import Any, ClassVar

from rlhf_audit_nb.events.base import Event, Private

__all__ = [
    "DataBound",
    "DataPrivate",
    "ModelBound",
    "TrainerAttached",
]


class DataPrivate(Private, frozen=True, kw_only=True):
    """What is private about a data set under differential privacy: counts and digests of its rows.

    ``prompts`` is the digest of the set of its prompts, whatever their order and number: it recognises them elsewhere.
    """

    rows: int
    digest: str
    annotators: int | None = None
    prompts: str | None = None


class DataBound(Event, frozen=True, kw_only=True):
    """A data set entered the run.

    Without differential privacy ``rows`` and ``digest`` stand in the open; with it they are in the private half, and
    only what the adjacency makes public (columns, the number of units) stands here.
    """

    TYPE: ClassVar[str] = "data.bound"
    PRIVATE: ClassVar[type[Private] | None] = DataPrivate

    role: str
    columns: list[str]
    provenance: str = "unknown"
    source: str | None = None
    unit: str | None = None
    units: int | None = None
    rows: int | None = None
    digest: str | None = None


class ModelBound(Event, frozen=True, kw_only=True):
    """The model that a trainer showed: ``role`` is ``base``, ``reference`` or ``final``.

    The base's ``weights_digest`` leaves an adapter out. ``trainable_digest`` is the digest of the trainable tensors,
    an adapter's too, as they were when training began (role ``base``, where there are any): it tells a fresh adapter
    from one that had learnt before. It compares with a step's weights digest, which has the same form, and with that
    of a final adapter, which has one too; a final weights digest has the names that a save writes.
    """

    TYPE: ClassVar[str] = "model.bound"

    role: str
    architecture: str
    parameters: int
    trainable: int
    weights_digest: str
    config_digest: str
    name: str | None = None
    tokenizer_digest: str | None = None
    adapter: dict[str, Any] | None = None
    trainable_digest: str | None = None


class TrainerAttached(Event, frozen=True, kw_only=True):
    """A trainer started to train inside the run: its class, loss and public hyperparameters.

    ``hyperparameters`` are those that matter most and all that are not their config class's default; ``defaults`` are
    the other settings of the method, at their defaults. ``generators`` tells of Python's, numpy's and torch's
    generators of random numbers when training begins: the digest of each one's state, and its seed where that is known;
    empty in a run under differential privacy.
    """

    TYPE: ClassVar[str] = "trainer.attached"

    trainer: str
    loss: str | None
    max_steps: int
    seed: int | None
    hyperparameters: dict[str, Any]
    defaults: dict[str, Any] = {}
    generators: dict[str, Any] = {}
