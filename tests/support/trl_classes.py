"""Every trainer and every config class that the installed TRL exposes, stable and experimental. Nothing is trained."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from functools import lru_cache
from typing import Any

__all__ = ["config_classes", "trainer_classes"]


def _is_public(name: str) -> bool:
    return name.endswith(("Trainer", "Config")) and not name.startswith("_")


@lru_cache(maxsize=1)
def _public() -> dict[str, Any]:
    """The classes by their public path, such as ``trl.DPOTrainer`` and ``trl.experimental.gkd.GKDTrainer``."""
    import trl
    import trl.experimental

    found = {f"trl.{name}": getattr(trl, name) for name in dir(trl) if _is_public(name)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in pkgutil.iter_modules(trl.experimental.__path__, "trl.experimental."):
            if module.ispkg:
                loaded = importlib.import_module(module.name)
                named = {name: getattr(loaded, name) for name in dir(loaded) if _is_public(name)}
                found |= {f"{module.name}.{name}": one for name, one in named.items()}
    return {path: one for path, one in found.items() if inspect.isclass(one)}


def trainer_classes() -> dict[str, Any]:
    """The trainers by their public path."""
    from transformers import Trainer

    return {path: one for path, one in _public().items() if issubclass(one, Trainer)}


def config_classes() -> dict[str, Any]:
    """The classes of their arguments by public path, transformers' own two included."""
    from transformers import Seq2SeqTrainingArguments, TrainingArguments

    own = {f"transformers.{one.__name__}": one for one in (TrainingArguments, Seq2SeqTrainingArguments)}
    return own | {path: one for path, one in _public().items() if issubclass(one, TrainingArguments)}
