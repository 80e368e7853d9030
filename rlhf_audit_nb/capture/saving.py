"""Saves that no trainer makes: ``model.save_pretrained(...)`` and ``model.push_to_hub(...)`` inside a run. Floor 2.

Trainers save their models through ``save_pretrained`` too; those saves are signed when the folder is complete
(`attach`, `callback`), so `inside_trainer` marks them and they are not recorded twice. ``push_to_hub`` saves into a
folder of its own, which is signed, adds a ``README.md`` and uploads both: the check names that file as added. With
``save_pretrained(..., push_to_hub=True)`` the upload is over before the folder is signed: the signature stays here.

What writes weights without either (``torch.save``, safetensors' own ``save_file``) is not seen.

A save tells of a step only where it saves what the run's last training trains. Any other model that is saved while a
run is open has no step: it is signed and recorded, and nothing is said of where it learnt.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.capture.run import Run, current_run
from rlhf_audit_nb.events import WeightsSaved, decode_body

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import TrailReader

__all__ = [
    "LastTraining",
    "find_saved",
    "inside_trainer",
    "is_saving",
    "saving_classes",
    "step_of",
    "wrap_save_pretrained",
]

_saving: ContextVar[bool] = ContextVar("rlhf_audit_saving", default=False)


@contextmanager
def inside_trainer() -> Iterator[None]:
    """Whatever is saved meanwhile is somebody else's to record."""
    token = _saving.set(True)
    try:
        yield
    finally:
        _saving.reset(token)


def is_saving() -> bool:
    """Whether a save is going on here that somebody records."""
    return _saving.get()


def saving_classes() -> list[type]:
    """The classes whose ``save_pretrained`` writes weights."""
    from transformers import PreTrainedModel

    found: list[type] = [PreTrainedModel]
    try:
        from peft import PeftModel
    except ImportError:
        return found
    return [*found, PeftModel]


def wrap_save_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    """``save_pretrained`` that also signs the folder and records it, where a run is open."""
    shape = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        run = None if _saving.get() else current_run()
        if run is None:
            return original(self, save_directory, *args, **kwargs)
        with inside_trainer():  # a model that saves parts of itself does so through here again
            result = original(self, save_directory, *args, **kwargs)
        folder = Path(save_directory)
        given = shape.bind(self, save_directory, *args, **kwargs).arguments
        if folder.is_dir() and given.get("is_main_process", True):
            run.weights_saved(folder, _step(run, self))
        return result

    return save_pretrained


class LastTraining:
    """Which trainer trains in a run, or did last, and which model; neither is kept alive.

    Args:
        trainer: the trainer.
    """

    def __init__(self, trainer: Any) -> None:
        model = getattr(trainer, "model", None)  # which may have been taken away to free its memory
        self._trainer = weakref.ref(trainer)
        self._model: Callable[[], Any] = weakref.ref(model) if model is not None else lambda: None

    def is_of(self, trainer: Any) -> bool:
        """Whether it is this trainer's."""
        return self._trainer() is trainer

    def trains(self, model: Any) -> bool:
        """Whether ``model`` is what it trains, or a part of that."""
        trainer = self._trainer()
        own = getattr(trainer, "model", None) if trainer is not None else self._model()
        return own is not None and any(part is model for part in own.modules())


def step_of(run: Run, trainer: Any) -> int | None:
    """The optimizer step that the trainer's weights are of; ``None`` where the run's last training is another's."""
    ours = run.last_training is not None and run.last_training.is_of(trainer)
    return int(trainer.state.global_step) or None if ours else None


def _step(run: Run, model: Any) -> int | None:
    """The same of a model that is saved by itself; where the run has a loop of its own and no trainer, the loop's."""
    if run.training is not None and run.last_training is not None and run.last_training.trains(model):
        return int(run.training.state.global_step) or None
    if run.last_training is None or run.last_training.trains(model):
        return run.steps or None
    return None


def find_saved(reader: TrailReader, digest: str) -> tuple[int, str | None] | None:
    """The newest entry that saved a folder of this digest, and its run; ``None`` where no entry did.

    ``digest`` is that of `folders.digest_folder` over the folder as it is now.
    """
    found: tuple[int, str | None] | None = None
    for entry in reader.entries(type=WeightsSaved.TYPE):
        event = decode_body(entry.type, entry.body)
        if isinstance(event, WeightsSaved) and event.digest == digest:
            found = entry.index, entry.run
    return found
