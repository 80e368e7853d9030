"""The thresholds and evaluations of other notebooks that a record carries. Floor 3.

What a figure is worth depends on what was asked of it, and on who knew it, before: a threshold that another notebook
sealed and this one lowered, an evaluation that told the figure first. So a record carries, with its own, every
``evaluation.threshold`` and ``evaluation.recorded`` of its trail on the same metrics, from before its seal.
``record.sealed`` counts them and has their digest, taken in the transaction that appends it. Whoever holds the key that
seals could still leave some out of both: where the trail is at hand, the verifier looks there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_audit_nb.events import EvaluationRecorded, ThresholdSealed
from rlhf_audit_nb.records.resources import event_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rlhf_audit_nb.trail import Entry, TrailReader

__all__ = ["EVALUATION_TYPES", "related_entries", "related_in"]

EVALUATION_TYPES = (ThresholdSealed.TYPE, EvaluationRecorded.TYPE)


def _told(entry: Entry) -> tuple[str | None, set[str]]:
    """The record and the metrics that a threshold or an evaluation is of."""
    if entry.type == ThresholdSealed.TYPE:
        threshold = event_of(entry, ThresholdSealed)
        return threshold.record, {threshold.metric}
    evaluation = event_of(entry, EvaluationRecorded)
    return evaluation.record, set(evaluation.metrics)


def related_entries(entries: Iterable[Entry], record: str) -> list[Entry]:
    """Of these entries, the thresholds and evaluations on the record's metrics that are not its own, in their order."""
    told = [(entry, *_told(entry)) for entry in entries if entry.type in EVALUATION_TYPES]
    own: set[str] = set()
    for _, of, metrics in told:
        own |= metrics if of == record else set()
    found = [entry for entry, of, metrics in told if of != record and metrics & own]
    return sorted(found, key=lambda entry: entry.index)


def related_in(reader: TrailReader, record: str, stop: int) -> list[Entry]:
    """`related_entries` of a trail's first ``stop`` entries."""
    return related_entries((entry for kind in EVALUATION_TYPES for entry in reader.entries(0, stop, type=kind)), record)
