"""What a statement of the second version says went in and came out. Floor 3.

Records are signed with exactly this, and are verified by deriving it again: what is to be said differently needs a
version of its own.

=================================  ====================================================================================
``internalParameters``             ``environments``, one for each that was captured: Python, platform, hardware,
                                   threads, determinism, drivers
``resolvedDependencies``           ``packages`` (installed, with the digest of each one's files), ``tool`` (this tool's
                                   own source), ``code`` (git commit), ``code:diff`` (what was not committed),
                                   ``code:modules`` (local files that were imported), ``code:cell`` (the cell that
                                   opened a run), ``data:ROLE``, ``data-read:ROLE`` (what was read of a stream),
                                   ``model:ROLE`` (base, reference, reward), ``tokenizer:ROLE``,
                                   ``chat-template:ROLE``, ``reference``, ``teacher``, ``function:ROLE`` (reward
                                   functions and others that a trainer calls), ``checkpoint`` (resumed from)
``runDetails.byproducts``          ``cells`` (the entries of the cells as they ran), ``model:final``,
                                   ``weights:NAME`` (saved folders), ``weights-signature:NAME`` (the OpenSSF model
                                   signature of such a folder)
=================================  ====================================================================================

Each has the entry that shows it, and its run. Where there is no digest of the thing itself, because differential
privacy keeps it sealed or because it was nowhere to be had, the digest is that of the entry (``committed`` and
``described`` in the annotations say which).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.events import (
    CellAudited,
    CellExecuted,
    CodeBound,
    CodeFiles,
    DataBound,
    DataRead,
    EnvironmentCaptured,
    Event,
    FunctionBound,
    ModelBound,
    ReferenceUsed,
    RunResumed,
    WeightsSaved,
    decode_body,
)
from rlhf_audit_nb.records.normal_form import canonical_json
from rlhf_audit_nb.records.resources import checkpoint_resource, data_resource, event_of, leaf, resource

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rlhf_audit_nb.trail.entry import Entry

__all__ = ["BUILD_TYPE", "dependencies", "environments", "results"]

BUILD_TYPE = "urn:rlhf-audit:notebook-record:v2"

_ENVIRONMENT = ("python", "implementation", "platform", "hardware", "threads", "determinism", "drivers")


def environments(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Where each run happened."""
    found = []
    for entry in entries:
        if entry.type == EnvironmentCaptured.TYPE:
            event = event_of(entry, EnvironmentCaptured)
            said = {name: getattr(event, name) for name in _ENVIRONMENT}
            found.append({"entry": entry.index, "run": entry.run, **said})
    return found


def _at(entry: Entry) -> dict[str, Any]:
    return {"run": entry.run, "entry": entry.index}


def _known(entry: Entry, name: str, digest: str | None, **notes: Any) -> dict[str, Any]:
    """A resource by its digest; by the entry that tells of it where it has none."""
    if digest is not None:
        return resource(name, digest, **_at(entry), **notes)
    return resource(name, leaf(entry), **_at(entry), **notes, described=True)


def _modules(entry: Entry, code: CodeFiles) -> dict[str, Any]:
    notes = {"project": code.project, "count": code.count, "changed": code.changed or None}
    elsewhere = {"leftOut": code.left_out or None, "elsewhere": code.elsewhere or None}
    return resource("code:modules", code.digest, **_at(entry), **notes, **elsewhere)


def _environment(entry: Entry, event: EnvironmentCaptured) -> list[dict[str, Any]]:
    listed = hashlib.sha256(canonical_json(event.packages)).hexdigest()
    packages = event.packages_digest or listed
    found = [resource("packages", packages, **_at(entry), count=len(event.packages), versions=listed)]
    if event.tool_digest is not None:
        found.append(resource("tool", event.tool_digest, **_at(entry)))
    if event.git_commit:
        notes = {**_at(entry), "uncommittedChanges": bool(event.git_dirty)}
        found.append({"name": "code", "digest": {"gitCommit": event.git_commit}, "annotations": notes})
    if event.git_diff is not None:
        found.append(resource("code:diff", event.git_diff, **_at(entry)))
    if event.code is not None:
        found.append(_modules(entry, event.code))
    return found


def _cell(entry: Entry, event: CellAudited) -> list[dict[str, Any]]:
    return [resource("code:cell", event.source_digest, **_at(entry), cell=event.cell, executed=event.execution_count)]


def _data(entry: Entry, event: DataBound) -> list[dict[str, Any]]:
    files = event.files.digest if event.files is not None else None
    # As it was declared, and what the library calls it: absent where differential privacy seals it.
    notes = {"provenance": event.provenance, "revision": event.revision, "fingerprint": event.fingerprint}
    return [data_resource(entry, event, **notes, files=files)]


def _read(entry: Entry, event: DataRead) -> list[dict[str, Any]]:
    return [resource(f"data-read:{event.role}", event.digest, **_at(entry), rows=event.rows, batches=event.batches)]


def _model(entry: Entry, event: ModelBound) -> dict[str, Any]:
    files = event.files.digest if event.files is not None else None
    return resource(
        f"model:{event.role}",
        event.weights_digest,
        **_at(entry),
        architecture=event.architecture,
        model=event.name,
        configuration=event.config_digest,
        generation=event.generation_digest,
        trainable=event.trainable_digest,
        revision=event.revision,
        files=files,
    )


def _shown(entry: Entry, event: ModelBound) -> list[dict[str, Any]]:
    found = [] if event.role == "final" else [_model(entry, event)]
    if event.role != "final" and event.tokenizer_digest is not None:
        found.append(resource(f"tokenizer:{event.role}", event.tokenizer_digest, **_at(entry)))
    if event.role != "final" and event.chat_template_digest is not None:
        found.append(resource(f"chat-template:{event.role}", event.chat_template_digest, **_at(entry)))
    return found


def _reference(entry: Entry, event: ReferenceUsed) -> list[dict[str, Any]]:
    return [_known(entry, event.role, event.weights_digest, how=event.how, sameAsBase=event.same_as_base)]


def _function(entry: Entry, event: FunctionBound) -> list[dict[str, Any]]:
    digest = event.source_digest or event.weights_digest or event.code_digest
    notes = {"function": event.name, "kind": event.kind, "position": event.position, "base": event.base_digest}
    return [_known(entry, f"function:{event.role}", digest, **notes)]


_GONE_IN: dict[type[Event], Callable[..., list[dict[str, Any]]]] = {
    EnvironmentCaptured: _environment,
    CodeBound: lambda entry, event: [_modules(entry, event.code)],
    CellAudited: _cell,
    DataBound: _data,
    DataRead: _read,
    ModelBound: _shown,
    ReferenceUsed: _reference,
    FunctionBound: _function,
    RunResumed: checkpoint_resource,
}
_TYPES = {kind.TYPE: make for kind, make in _GONE_IN.items()}


def dependencies(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """What the runs of a record started from, in the order of their entries."""
    return [
        item
        for entry in entries
        if entry.type in _TYPES
        for item in _TYPES[entry.type](entry, decode_body(entry.type, entry.body))
    ]


def _saved(entry: Entry, event: WeightsSaved) -> list[dict[str, Any]]:
    notes = {"step": event.step, "files": event.files, "listed": event.listed}
    found = [resource(f"weights:{event.name}", event.digest, **_at(entry), **notes)]
    if event.signature_digest is not None:
        found.append(resource(f"weights-signature:{event.name}", event.signature_digest, **_at(entry)))
    return found


def results(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The cells as they ran, and what the runs left."""
    ran = [entry for entry in entries if entry.type == CellExecuted.TYPE]
    hashes = hashlib.sha256(b"".join(bytes.fromhex(leaf(entry)) for entry in ran)).hexdigest()
    bad = sum(event_of(entry, CellExecuted).status != "ok" for entry in ran)
    found = [resource("cells", hashes, count=len(ran), notOk=bad)]
    for entry in entries:
        if entry.type == WeightsSaved.TYPE:
            found += _saved(entry, event_of(entry, WeightsSaved))
        elif entry.type == ModelBound.TYPE and event_of(entry, ModelBound).role == "final":
            found.append(_model(entry, event_of(entry, ModelBound)))
    return found
