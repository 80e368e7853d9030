"""From which checkpoint a training goes on, and who left it there. Floor 2.

A checkpoint is known to the trail where a ``weights.saved`` entry has the digest of its folder as it is now. Which run
left it decides what its weights had learnt: under differential privacy only those of a private run of this trail are
covered by the ledger.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.capture.folders import digest_folder
from rlhf_audit_nb.capture.saving import find_saved
from rlhf_audit_nb.errors import RunError
from rlhf_audit_nb.events import RunResumed, RunStarted, WeightsSaved, decode_body

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.run import Run
    from rlhf_audit_nb.trail import TrailReader

__all__ = ["Resumption", "find_resumption"]


@dataclass(frozen=True)
class Resumption:
    """What is resumed.

    Attributes:
        event: what the trail is told of it.
        covered: whether a private run of this trail left the checkpoint.
    """

    event: RunResumed
    covered: bool

    @property
    def step(self) -> int:
        """The optimizer steps that lie behind it."""
        return self.event.step

    @property
    def warning(self) -> str | None:
        """The sentence for a private run that goes on from a checkpoint which the ledger does not cover."""
        if self.covered:
            return None
        known = "no run" if self.event.from_run is None else "no private run"
        return (
            f"This training goes on from a checkpoint that {known} of this trail left as it is now: what its weights "
            "learnt before is not covered by this run's epsilon. Resume from a checkpoint of a private run of this "
            "trail, or start from a model that has not seen the data."
        )


def find_resumption(run: Run, trainer: Any, asked: Any) -> Resumption | None:
    """The checkpoint that ``train(resume_from_checkpoint=asked)`` is about to load; ``None`` where it loads none.

    Args:
        run: the open run.
        trainer: the trainer that is asked to resume.
        asked: what the user wrote: a path, ``True`` for the last one in the output folder, or nothing.

    Raises:
        RunError: the run is private and there is no such checkpoint, or it is not complete; without privacy the trainer
            says so itself.
    """
    if asked is None or asked is False:
        return None
    folder = _folder(trainer, asked)
    step = _step(folder)
    if folder is None or step is None:
        if run.private:
            raise _no_checkpoint(trainer, asked, folder)
        return None
    digest = _digest(folder)
    run.trail.flush()  # what an earlier training of this run saved counts
    saved = _saved(run.trail.reader(), digest) if digest is not None else None
    entry, origin, covered = saved or (None, None, False)
    return Resumption(RunResumed(step=step, checkpoint=digest, from_run=origin, entry=entry), covered)


def _folder(trainer: Any, asked: Any) -> Path | None:
    if asked is not True:
        return Path(asked)
    from transformers.trainer_utils import get_last_checkpoint

    output = Path(trainer.args.output_dir)
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    return Path(last) if last is not None else None


def _step(folder: Path | None) -> int | None:
    """The step count in the checkpoint's own state, or ``None`` where that cannot be read."""
    if folder is None:
        return None
    try:
        step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) and step >= 0 else None


def _digest(folder: Path) -> str | None:
    try:
        return digest_folder(folder)
    except (RunError, OSError):
        return None  # a symbolic link, a file that cannot be read: then nobody can say where it comes from


def _saved(reader: TrailReader, digest: str) -> tuple[int, str | None, bool] | None:
    """The newest entry that saved a folder of this digest: its index, its run, and whether a private run trained it."""
    found = find_saved(reader, digest)
    if found is None:
        return None
    index, run = found
    told = next(reader.entries(index, index + 1))
    event = decode_body(told.type, told.body)
    trained = isinstance(event, WeightsSaved) and event.step is not None  # else the run did no more than save it
    return index, run, trained and run is not None and _was_private(reader, run)


def _was_private(reader: TrailReader, run: str) -> bool:
    started = [decode_body(entry.type, entry.body) for entry in reader.entries(type=RunStarted.TYPE, run=run)]
    return any(isinstance(event, RunStarted) and event.privacy is not None for event in started)


def _no_checkpoint(trainer: Any, asked: Any, folder: Path | None) -> RunError:
    if folder is None:
        where = Path(trainer.args.output_dir).name
        return RunError(
            f"There is no checkpoint in the output folder {where!r} to resume from; nothing was reserved or trained.",
            next_step="Train without resume_from_checkpoint, or name the checkpoint's folder.",
            code="no-checkpoint",
        )
    return RunError(
        f"{str(asked) if asked is not True else folder.name!r} is not a whole checkpoint: it has no trainer_state.json "
        "that can be read; nothing was reserved or trained.",
        next_step="Name a checkpoint-N folder that a trainer has finished saving.",
        code="no-checkpoint",
    )
