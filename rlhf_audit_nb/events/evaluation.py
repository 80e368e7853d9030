"""Thresholds that are set before a test, and the tests themselves. Floor 1."""

from __future__ import annotations

from typing import ClassVar

from rlhf_audit_nb.events.base import Event, Number, Private

__all__ = [
    "EvaluationPrivate",
    "EvaluationRecorded",
    "ThresholdPrivate",
    "ThresholdSealed",
]


class ThresholdPrivate(Private, frozen=True, kw_only=True):
    """The digest of the data that a threshold is for, where that data may be protected."""

    data: str


class ThresholdSealed(Event, frozen=True, kw_only=True):
    """What a test must reach, written down before it.

    ``metric relation bound`` is what must hold, such as ``accuracy >= 0.7``. ``record`` is the record in whose notebook
    it was written, if any. ``data`` is the digest of the rows that it
    is for, ``None`` where it is for any data (or sealed: then the entry has a private half); ``experiment`` is that of
    the runs whose model it is for, ``None`` for any.
    """

    TYPE: ClassVar[str] = "evaluation.threshold"
    PRIVATE: ClassVar[type[Private] | None] = ThresholdPrivate

    metric: str
    relation: str
    bound: float
    data: str | None = None
    data_name: str | None = None
    experiment: str | None = None
    reason: str | None = None
    by: str | None = None
    record: str | None = None


class EvaluationPrivate(Private, frozen=True, kw_only=True):
    """What an evaluation on data that may be protected found: its figures, and what is known of the data."""

    metrics: dict[str, Number]
    data: str | None = None
    samples: int | None = None


class EvaluationRecorded(Event, frozen=True, kw_only=True):
    """Somebody says what a test of a model found; the model is known by digests.

    ``metrics`` holds the figures by name, ``None`` for those that are in the private half. ``identified`` says how the
    model was known: ``live`` (its weights were digested in memory), ``folder`` (its files were), or ``stated`` (only a
    digest was handed in). ``weights_digest`` has the form of a final model's, of an adapter alone where there is one;
    ``base_digest`` is then that of the weights under it. ``folder_digest`` is that of a saved folder. ``data`` is the
    digest of the rows; ``data_public`` the entry that declares them to hold nothing of protected people. ``record`` is
    the record in whose notebook it was written, if any.
    """

    TYPE: ClassVar[str] = "evaluation.recorded"
    PRIVATE: ClassVar[type[Private] | None] = EvaluationPrivate

    metrics: dict[str, Number | None]
    identified: str
    weights_digest: str | None = None
    base_digest: str | None = None
    folder_digest: str | None = None
    stated_digest: str | None = None
    model_name: str | None = None
    data: str | None = None
    data_name: str | None = None
    data_public: int | None = None
    experiment: str | None = None
    evaluator: str | None = None
    seeds: list[int] = []
    samples: int | None = None
    record: str | None = None
