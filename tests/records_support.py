"""What the tests of records share: notebooks to execute, and what is kept of a record that was made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat

from rlhf_audit_nb.records.session import Outcome, RecordSession
from rlhf_audit_nb.trail import TrailReader, TrustPolicy
from rlhf_audit_nb.trail.checkpoint import checkpoint_of

if TYPE_CHECKING:
    from rlhf_audit_nb.records import RunResult

FIXTURES = Path(__file__).resolve().parent / "vectors" / "records"
"""Sets of records that were made by earlier versions and are kept for good."""

# What %%audit_train does in a kernel, in little: it appends a run's events to the trail that the engine names.
TRAINING = """
import os
from rlhf_audit_nb.events import *
from rlhf_audit_nb.trail import Trail

def training(run, steps=3, finish=True):
    trail = Trail.open(os.environ["RLHF_AUDIT_TRAIL"])
    def add(event):
        trail.append(event.TYPE, encode_body(event), run=run)
    add(RunStarted(experiment="small", entry_point="cell", tool="t/1", record=os.environ["RLHF_AUDIT_RECORD"]))
    add(DataBound(role="train", columns=["prompt"], digest="ab" * 32, rows=3, source="d.jsonl"))
    add(ModelBound(role="base", architecture="Llama", parameters=9, trainable=3, weights_digest="cd" * 32,
                   config_digest="ef" * 32))
    for step in range(steps):
        add(Step(step=step, metrics={"loss": 1.5 / (step + 1)}))
    add(WeightsSaved(step=steps, name="model", digest="12" * 32, files=2, bytes=10))
    if finish:
        add(RunFinished(status="completed", steps=steps, trained=True))
    trail.flush()
    return trail
""".strip()


@dataclass(frozen=True)
class Made:
    """A record and where it came from."""

    path: Path
    home: Path
    policy: TrustPolicy
    result: RunResult

    @property
    def data(self) -> bytes:
        return self.path.read_bytes()

    @property
    def notebook(self) -> dict[str, Any]:
        return json.loads(self.data)


def _cell(i: int, cell: Any) -> Any:
    source, metadata = (cell, {}) if isinstance(cell, str) else cell if isinstance(cell, tuple) else (None, {})
    return cell if source is None else nbformat.v4.new_code_cell(source, metadata=metadata, id=f"cell-{i}")


def write_notebook(path: Path, cells: list[Any], metadata: dict[str, Any] | None = None) -> Path:
    """A notebook of code sources (text), or of (source, cell metadata) pairs, or of cells."""
    made = [_cell(i, cell) for i, cell in enumerate(cells)]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    node = nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": spec, **(metadata or {})})
    path.write_text(nbformat.writes(node), encoding="utf-8")
    return path


def sealed_record(folder: Path, text: str = "text") -> dict[str, Any]:
    """A record of one markdown cell, made without a kernel, as JSON values."""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text, id="a")])
    session = RecordSession.begin(nb, {"name": "k", "language": "r", "display_name": "K"}, folder)
    try:
        session.seal(nb, Outcome("completed"))
    finally:
        session.close()
    return json.loads(nbformat.writes(nb))


def policy_of(trail: Path) -> TrustPolicy:
    """Trust in the log key that the trail's own first entry names (as a person would be given it)."""
    reader = TrailReader.open(trail)
    (created,) = reader.entries(0, 1)
    assert checkpoint_of(reader.checkpoint()).size == reader.size
    return TrustPolicy.of(json.loads(created.body)["log_key"])


# A training without a trainer: what one leaves on the trail, from a file and a package that it reads.
HAND = """
import hashlib, os, platform
from pathlib import Path
from rlhf_audit_nb.events import *
from rlhf_audit_nb.trail import Trail
import stub

rows = Path("rows.txt").read_bytes()
losses = [rate * stub.SCALE / (step + 1) for step in range(3)]

def add(event):
    trail.append(event.TYPE, encode_body(event), run="f" * 32)

with Trail.open(os.environ["RLHF_AUDIT_TRAIL"]) as trail:
    add(RunStarted(experiment="hand", entry_point="cell", tool="t/1", record=os.environ.get("RLHF_AUDIT_RECORD")))
    add(EnvironmentCaptured(python=platform.python_version(), implementation="C", platform="x", hardware={},
                            packages=stub.PACKAGES))
    add(DataBound(role="train", columns=["a"], digest=hashlib.sha256(rows).hexdigest(), rows=len(rows)))
    for step, loss in enumerate(losses):
        add(Step(step=step, metrics={"loss": loss, "step_time": 0.1},
                 weights_digest=hashlib.sha256(repr(loss).encode()).hexdigest()))
    add(RunFinished(status="completed", steps=3, trained=True))
print("last loss", losses[-1], object())
""".strip()


def hand_files(
    folder: Path, *, rows: str = "a\nb\n", scale: float = 1.0, packages: dict[str, str] | None = None
) -> list[Path]:
    """What `HAND` reads: rows, and a package that computes and says which packages there are."""
    (folder / "rows.txt").write_text(rows)
    (folder / "stub.py").write_text(stub_source(scale, packages or {"stub": "1.0"}))
    return [folder / "rows.txt", folder / "stub.py"]


def stub_source(scale: float, packages: dict[str, str]) -> str:
    """The source of the package ``stub``."""
    return f"SCALE = {scale!r}\nPACKAGES = {packages!r}\n"


# A public training, and two private ones of which the second goes on from a checkpoint of the first.
PRIVATELY = [
    ('rows = "votes.jsonl"\nrate = 1e-3', {"tags": ["parameters"]}),
    f"""
import json, sys, warnings
from pathlib import Path

sys.path.insert(0, {str(Path(__file__).parent)!r})
warnings.simplefilter("ignore")
from support.tiny import dpo_trainer, sft_trainer
from support.trails import without_cross_checks

from rlhf_audit_nb import AuditableRLHF, PrivacyConfig
from rlhf_audit_nb.config import AuditConfig

quick = without_cross_checks()
quick.__enter__()
votes = [json.loads(line) for line in Path(rows).read_text().splitlines()]
every = AuditConfig(weights_every=1)
auditor = AuditableRLHF(
    privacy_config=PrivacyConfig(epsilon=50.0, delta=1e-3, sampling_rate=0.5), audit_config=every
)
settings = dict(max_steps=3, save_strategy="steps", save_steps=2, learning_rate=rate)
""".strip(),
    """
with AuditableRLHF(audit_config=every).track_training("public"):
    done = sft_trainer(votes[:4], Path("sft"), max_steps=2).train()
done.training_loss
""".strip(),
    """
with auditor.track_training("first"):
    dpo_trainer(votes, Path("out"), **settings).train()
""".strip(),
    """
with auditor.track_training("resumed"):
    dpo_trainer(votes, Path("out"), **settings).train(resume_from_checkpoint="out/checkpoint-2")
""".strip(),
]


@dataclass(frozen=True)
class Trained:
    """A record of `PRIVATELY`, made elsewhere, with the openings of its seeds."""

    folder: Path
    record: Path
    policy: TrustPolicy
    openings: tuple[Path, ...]

    @property
    def votes(self) -> Path:
        return self.folder / "votes.jsonl"
