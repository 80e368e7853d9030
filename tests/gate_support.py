"""What the tests of the gate share: records that are made without a kernel, and folders of weights beside them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from records_support import policy_of
from safetensors.numpy import save_file

from rlhf_audit_nb import events as ev
from rlhf_audit_nb.capture.folders import digest_and_list, sign_folder
from rlhf_audit_nb.events import Event, encode_body
from rlhf_audit_nb.gate.model import open_model
from rlhf_audit_nb.records.session import Outcome, RecordSession
from rlhf_audit_nb.trail import Trail

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlhf_audit_nb.trail import TrustPolicy

RUN = "f" * 32
BASE = "cd" * 32
KERNEL = {"name": "python3", "language": "python", "display_name": "Python 3"}
EPSILON, DELTA = 2.0, 1e-5

WHOLE = {
    "level": "UNANCHORED",
    "fresh": "{record: 1 day}",
    "outcome": "completed",
    "failed_cells": "refuse",
    "changed_outputs": "refuse",
    "git": "clean",
    "weights": "final",
    "base_models": f"[{BASE}]",
    "privacy": "{epsilon: 2.0, delta: 1e-5, units: [annotator]}",
    "evaluations": "{metrics: [accuracy], thresholds: before training}",
    "evidence": "{framework: eu_ai_act, requirements: [AIA-A4-2a]}",
}
"""A policy that asks for everything that needs no other person, by its keys."""


@dataclass(frozen=True)
class Place:
    """A folder with a trail, a model and its record."""

    folder: Path
    weights: ev.WeightsSaved
    record: Path
    trust: TrustPolicy

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def trail(self) -> Path:
        return self.folder / "audit"


@dataclass
class Story:
    """What is told of one training; tests change a part of it.

    ``cells`` are the statuses of the code cells; ``after`` changes an output once its cell has run.
    """

    run: str = RUN
    cells: Sequence[str] = ("ok",)
    outcome: Outcome = field(default_factory=lambda: Outcome("completed"))
    git: tuple[str | None, bool | None] | None = ("a" * 40, False)
    private: bool = True
    epsilon: Any = EPSILON
    reserved: dict[str, Any] = field(default_factory=dict)
    settled: dict[str, Any] | None = field(default_factory=dict)
    canaries: ev.PrivacyAudited | None = None
    threshold: ev.ThresholdSealed | None = field(
        default_factory=lambda: ev.ThresholdSealed(metric="accuracy", relation=">=", bound=0.7)
    )
    accuracy: float | str | None = 0.9
    late_threshold: bool = False
    threshold_between: bool = False
    ended: str | None = "completed"
    trained: bool = True
    saved_step: int | None = 3
    saved: bool = True
    changed_after: bool = False
    base: str = BASE
    final: str | None = None
    listed: bool = True
    experiment: str = "small"
    inherited: ev.PrivacyInherited | None = None


def reservation(epsilon: Any = EPSILON, **other: Any) -> ev.PrivacyReserved:
    told: dict[str, Any] = {
        "reservation": "1" * 32, "unit": "annotator", "adjacency": "zero-out", "mechanism": "gaussian",
        "engine": "loop", "generator": "chacha20", "units": 100, "clipping_norm": 1.0, "noise_multiplier": 4.0,
        "sampling_rate": 0.1, "steps": 3, "steps_asked": 3, "max_pairs_per_unit": 8, "delta": DELTA,
        "epsilon_budget": 8.0, "epsilon_before": 0.0, "epsilon_planned": epsilon, "accountants": {"pld": epsilon},
        "column": "annotator_id",
    }  # fmt: skip
    return ev.PrivacyReserved(**{**told, **other})


def audited(**other: Any) -> ev.PrivacyAudited:
    told: dict[str, Any] = {
        "reservation": "1" * 32, "outcome": "not contradicted", "canaries": 100, "steps": 3, "guesses": 10, "right": 6,
        "delta": DELTA, "epsilon_claimed": 2.0, "epsilon_lower": 0.1, "epsilon_gaussian": 0.2, "confidence": 0.95,
        "ceiling": 3.0,
    }  # fmt: skip
    return ev.PrivacyAudited(**{**told, **other})


def write_model(folder: Path, value: float = 1.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"layer.{i}.weight": np.full((2, 3), value + i, dtype=np.float32) for i in range(3)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def _before(story: Story) -> list[Event]:
    if story.inherited is not None:
        return [story.inherited]
    return [reservation(story.epsilon, **story.reserved)] if story.private else []


def _after(story: Story) -> list[Event]:
    found: list[Event] = []
    if story.private and story.settled is not None:
        told = {"reservation": "1" * 32, "steps": 3, "epsilon_run": story.epsilon, "epsilon_total": story.epsilon}
        found.append(ev.PrivacySettled(**{**told, **story.settled}))
    if story.canaries is not None:
        found.append(story.canaries)
    return found


def tell(trail: Trail, story: Story, model: Path, record: str | None) -> ev.WeightsSaved:
    """A training's entries, as a run appends them; what was saved."""
    weights = open_model(model).weights_digest()
    run = story.run

    def add(event: Event) -> None:
        trail.append(event.TYPE, encode_body(event), run=run).wait()

    def judge(event: Event) -> None:
        trail.append(event.TYPE, encode_body(event)).wait()

    if story.threshold is not None and not story.late_threshold and not story.threshold_between:
        judge(replace_event(story.threshold, record=record))
    privacy = {"epsilon": 8.0} if story.private else None
    add(ev.RunStarted(experiment=story.experiment, entry_point="cell", tool="t/1", record=record, privacy=privacy))
    if story.git is not None:
        commit, dirty = story.git
        add(ev.EnvironmentCaptured(
            python="3.12", implementation="CPython", platform="Linux", packages={"torch": "2"}, hardware={"cores": 2},
            git_commit=commit, git_dirty=dirty,
        ))  # fmt: skip
    if story.trained:
        add(ev.TrainerAttached(trainer="DPOTrainer", loss="sigmoid", max_steps=3, seed=1, hyperparameters={}))
        add(ev.DataBound(role="train", columns=["prompt"], digest=None if story.private else "ab" * 32, rows=3))
        add(ev.ModelBound(role="base", architecture="Llama", parameters=9, trainable=3, weights_digest=story.base,
                          config_digest="ef" * 32))  # fmt: skip
        for event in _before(story):
            add(event)
        for step in (1, 2, 3):
            add(ev.Step(step=step))
        left = story.final or weights or ""
        add(ev.ModelBound(role="final", architecture="Llama", parameters=9, trainable=3, weights_digest=left,
                          config_digest="ef" * 32))  # fmt: skip
        for event in _after(story):
            add(event)
    saved = _save(trail, model, story)
    if story.saved:
        add(saved)
    if story.ended is not None:
        add(ev.RunFinished(status=story.ended, steps=3, trained=True))
    if story.threshold is not None and story.threshold_between:
        judge(replace_event(story.threshold, record=record))
    if story.accuracy is not None:
        judge(ev.EvaluationRecorded(
            metrics={"accuracy": story.accuracy}, identified="folder", folder_digest=saved.digest,
            weights_digest=weights, record=record,
        ))  # fmt: skip
    if story.threshold is not None and story.late_threshold:
        judge(replace_event(story.threshold, record=record))
    return saved


def replace_event(event: Any, **changes: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(event, **changes)


def _save(trail: Trail, model: Path, story: Story) -> ev.WeightsSaved:
    signed = sign_folder(model, trail.keys.model)
    _, listed = digest_and_list(model)
    return ev.WeightsSaved(
        step=story.saved_step, name="model", digest=signed.digest, files=signed.files, bytes=signed.bytes,
        signature_digest=signed.signature_digest, listed=listed if story.listed else None,
    )  # fmt: skip


def make_record(
    folder: Path,
    story: Story | None = None,
    *,
    name: str = "record.ipynb",
    model: str = "model",
    keep: bool = False,
    before: Story | None = None,
) -> Place:
    """A model, trained as the story tells, and its record; everything in ``folder``."""
    story = story or Story()
    place = folder / model
    if not place.exists():
        write_model(place)
    cells = [nbformat.v4.new_code_cell(f"{i}", id=f"cell-{i}", execution_count=1) for i in range(len(story.cells))]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL})
    session = RecordSession.begin(notebook, KERNEL, folder / "audit", keep=keep)
    try:
        with Trail.open(folder / "audit") as trail:
            if before is not None:
                tell(trail, before, place, session.record)
            saved = tell(trail, story, place, session.record)
        for i, (cell, status) in enumerate(zip(notebook["cells"], story.cells, strict=True)):
            cell["outputs"] = [nbformat.v4.new_output("stream", text="done\n")]
            session.cell_executed(cell, i, status)
        if story.changed_after:
            notebook["cells"][0]["outputs"] = [nbformat.v4.new_output("stream", text="better\n")]
        session.seal(notebook, story.outcome)
    finally:
        session.close()
    path = folder / name
    path.write_text(nbformat.writes(notebook), encoding="utf-8")
    trust = policy_of(folder / "audit")
    (folder / "trust.policy").write_text(trust.format())
    return Place(folder, saved, path, trust)


def changed(story: Story, **changes: Any) -> Story:
    return replace(story, **changes)


def write_policy(folder: Path, *lines: str, name: str = "policy.yaml") -> Path:
    """A policy that trusts the trail of ``folder`` and asks for what the lines say."""
    path = folder / name
    path.write_text("\n".join(["version: 1", "trust: trust.policy", *lines]) + "\n")
    return path


def person(folder: Path) -> str:
    """Somebody whom a policy names; the key's private half is nobody's."""
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    (folder / "officer.pub").write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return "[{name: Name of the officer, roles: [officer], keys: [officer.pub]}]"
