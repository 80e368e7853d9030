"""What a statement of the first version says went in and came out. Floor 3.

Records were signed with exactly this, and are verified by deriving it again: it never changes.

=================================  ====================================================================================
``resolvedDependencies``           per run: data (role), models (base, reference), the checkpoint that a training was
                                   resumed from, git commit
``runDetails.byproducts``          final models and saved weights
=================================  ====================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.events import DataBound, EnvironmentCaptured, ModelBound, RunResumed, WeightsSaved
from rlhf_audit_nb.records.resources import checkpoint_resource, data_resource, event_of, resource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlhf_audit_nb.trail.entry import Entry

__all__ = ["BUILD_TYPE", "dependencies", "results"]

BUILD_TYPE = "urn:rlhf-audit:notebook-record:v1"


def _model(entry: Entry, event: ModelBound) -> dict[str, Any]:
    notes = {"run": entry.run, "entry": entry.index, "architecture": event.architecture, "model": event.name}
    return resource(f"model:{event.role}", event.weights_digest, **notes)


def dependencies(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """What the runs of a record started from."""
    found = []
    for entry in entries:
        if entry.type == DataBound.TYPE:
            found.append(data_resource(entry, event_of(entry, DataBound)))
        elif entry.type == ModelBound.TYPE and event_of(entry, ModelBound).role != "final":
            found.append(_model(entry, event_of(entry, ModelBound)))
        elif entry.type == RunResumed.TYPE:
            found += checkpoint_resource(entry, event_of(entry, RunResumed))
        elif entry.type == EnvironmentCaptured.TYPE:
            code = event_of(entry, EnvironmentCaptured)
            if code.git_commit:
                notes = {"entry": entry.index, "uncommittedChanges": bool(code.git_dirty)}
                found.append({"name": "code", "digest": {"gitCommit": code.git_commit}, "annotations": notes})
    return found


def results(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """What they left."""
    found = []
    for entry in entries:
        if entry.type == WeightsSaved.TYPE:
            saved = event_of(entry, WeightsSaved)
            notes = {"run": entry.run, "entry": entry.index, "step": saved.step, "files": saved.files}
            found.append(resource(f"weights:{saved.name}", saved.digest, **notes))
        elif entry.type == ModelBound.TYPE and event_of(entry, ModelBound).role == "final":
            found.append(_model(entry, event_of(entry, ModelBound)))
    return found
