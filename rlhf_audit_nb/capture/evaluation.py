"""Thresholds and evaluations on their way into the trail: checked, known by digests, and sealed where need be. Floor 2.

A threshold is written down before a test (`append_threshold`), a result after it (`append_evaluation`); which came
first is the trail's own order, and `rlhf_audit_nb.compliance.thresholds` reads it. The model is known by what it is: a
live one by the digest of its weights, a folder by the digest of its files, and where only a digest is handed in, that
is said. Data is known by the digest of its rows (`digest_rows`).

Figures on data of protected people are functions of that data. On a trail that protects anybody, and on any while a
private run is open in this process, they stand in the open
only where a named person declared the data to hold nothing of them (`declare_public_data`); else figures, size and
digest are the private half of the entry, and the open part says which metrics there are.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.capture.data import bind_data, digest_prompts
from rlhf_audit_nb.capture.folders import digest_folder
from rlhf_audit_nb.capture.run import COARSE_US, ENV_RECORD, current_run, open_private_runs
from rlhf_audit_nb.capture.secrets import Scrubber
from rlhf_audit_nb.capture.weights import (
    base_tensors,
    digest_tensors,
    final_tensors,
    has_one_adapter,
    loaded_from,
)
from rlhf_audit_nb.errors import ConfigError, DataError
from rlhf_audit_nb.events import (
    EvaluationPrivate,
    EvaluationRecorded,
    Event,
    LabelsReleased,
    Number,
    PrivacyReserved,
    Private,
    PublicDeclared,
    RunStarted,
    ThresholdPrivate,
    ThresholdSealed,
    decode_body,
    encode_body,
    encode_private,
    number,
)

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import Trail, TrailReader

__all__ = ["OWNER", "EvaluatedData", "LoggedEvaluation", "append_evaluation", "append_threshold", "known_data"]

OWNER = "evaluations"
"""Whose the private halves are in the vault."""

RELATIONS = (">=", "<=", ">", "<")
_SIGNS = {"≥": ">=", "≤": "<="}
_CONDITION = re.compile(r"(>=|<=|>|<|≥|≤)\s*(\S+)")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST = 200
_MOST_METRICS = 500
_MOST_SEEDS = 1000


@dataclass(frozen=True, kw_only=True)
class LoggedEvaluation:
    """An evaluation that is in the trail: its entry, its figures, and whether they are sealed there."""

    entry: int
    metrics: dict[str, Number]
    sealed: bool

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return {"entry": self.entry, "metrics": dict(self.metrics), "sealed": self.sealed}

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value}" for name, value in self.metrics.items())
        return f"Evaluation #{self.entry}: {figures}{' (sealed in the vault)' if self.sealed else ''}"

    __repr__ = __str__


@dataclass(frozen=True)
class EvaluatedData:
    """What data is known by: the digest of its rows, their number, a public name; and the digest of its prompts."""

    digest: str | None = None
    rows: int | None = None
    name: str | None = None
    prompts: str | None = None


# --- thresholds ------------------------------------------------------------------------------------------------------


def append_threshold(
    trail: Trail,
    metric: str,
    condition: str,
    *,
    data: EvaluatedData,
    experiment: str | None,
    reason: str | None,
    by: str | None,
    protects: bool,
) -> int:
    """Write down what a test must reach; durable on return.

    Args:
        trail: where to.
        metric: what it is called in the evaluation that follows.
        condition: such as ``>= 0.7``.
        data: what it is for (`known_data`).
        experiment: of the runs whose model it is for; ``None`` for any.
        reason: why this much, in one line.
        by: who says so.
        protects: whether whoever calls protects people, whatever the trail says.

    Returns:
        The index of the entry.

    Raises:
        ConfigError: the condition is none, or a name is no name; nothing was written.
        StoreError: the append failed.
    """
    relation, bound = _condition(condition)
    sealed = data.digest is not None and _public_entry(trail, data.digest, protects=protects) is _SEALED
    event = ThresholdSealed(
        metric=_line("metric", metric),
        relation=relation,
        bound=bound,
        data=None if sealed else data.digest,
        data_name=data.name,
        experiment=_maybe("experiment", experiment),
        reason=_maybe("reason", reason),
        by=_maybe("by", by),
        record=os.environ.get(ENV_RECORD),
    )
    return _append(trail, event, ThresholdPrivate(data=data.digest) if sealed and data.digest else None)


def _condition(text: object) -> tuple[str, float]:
    found = _CONDITION.fullmatch(text.strip()) if isinstance(text, str) else None
    try:
        bound = float(found.group(2)) if found is not None else math.nan
    except ValueError:
        bound = math.nan
    if found is None or not math.isfinite(bound):
        raise ConfigError(
            f"The threshold is {text!r}, which is not a condition with a number.",
            next_step=f'Write one of {", ".join(RELATIONS)} and a number, such as ">= 0.7".',
            code="threshold",
        )
    return _SIGNS.get(found.group(1), found.group(1)), bound


# --- evaluations -----------------------------------------------------------------------------------------------------


def append_evaluation(
    trail: Trail,
    metrics: Mapping[str, Any],
    *,
    model: Any,
    data: EvaluatedData,
    experiment: str | None,
    evaluator: str | None,
    seeds: Iterable[int],
    samples: int | None,
    protects: bool,
    protected: frozenset[str],
) -> LoggedEvaluation:
    """Write down what a test found; durable on return.

    Args:
        trail: where to.
        metrics: figures by name; what is not finite is recorded as such and passes no threshold.
        model: a model in memory, the folder of a saved one, or a digest (64 hex characters).
        data: what it was tested on (`known_data`).
        experiment: whose model it is said to be; the trail is asked whether that is so.
        evaluator: the tool, with its version.
        seeds: those that the test was run with.
        samples: how many were tested; without it the number of rows.
        protects: whether whoever calls protects people, whatever the trail says.
        protected: digests of rows and of sets of prompts that private trainings of the trail read.

    Raises:
        ConfigError: an argument cannot stand; nothing was written.
        DataError: the data was declared public, and a private training of this trail read it; nothing was written.
        StoreError: the append failed.
    """
    figures = _figures(metrics)
    public = _public_entry(trail, data.digest, protects=protects)
    sealed = public is _SEALED
    if not sealed and protected & {data.digest, data.prompts}:
        raise DataError(
            "This data, or its prompts, are those of a private run of this trail, and it is declared public: figures "
            "on it would tell of the people whom that run protects. Nothing was written.",
            next_step="Evaluate on data that nobody protected gave.",
            code="protected-data",
        )
    counted = _samples(samples, data.rows)
    event = EvaluationRecorded(
        metrics={name: None if sealed else value for name, value in figures.items()},
        data=None if sealed else data.digest,
        data_name=data.name,
        data_public=public if isinstance(public, int) else None,
        experiment=_maybe("experiment", experiment),
        evaluator=_maybe("evaluator", evaluator),
        seeds=_seeds(seeds),
        samples=None if sealed else counted,
        record=os.environ.get(ENV_RECORD),
        **_model(model),
    )
    half = EvaluationPrivate(metrics=figures, data=data.digest, samples=counted) if sealed else None
    return LoggedEvaluation(entry=_append(trail, event, half), metrics=figures, sealed=sealed)


def known_data(data: Any) -> EvaluatedData:
    """What a data set, a list of rows or a digest (64 hex characters) is known by; ``None`` is any data.

    Raises:
        ConfigError: it is none of these, or a stream, whose rows are gone once they are read.
    """
    if data is None:
        return EvaluatedData()
    if isinstance(data, str):
        if _DIGEST.fullmatch(data):
            return EvaluatedData(digest=data)
    elif not isinstance(data, bytes | Mapping | Path):
        bound, _ = bind_data(data, "evaluation")
        if bound.digest is not None and bound.rows:
            return EvaluatedData(bound.digest, bound.rows, bound.source, digest_prompts(data))
    raise ConfigError(
        f"data is {f'the text {data[:40]!r}' if isinstance(data, str) else f'a {type(data).__name__}'}, which has no "
        "rows to know it by.",
        next_step="Hand in a datasets.Dataset, a list of rows, or the digest of the rows (64 hex characters).",
        code="data",
    )


def _figures(metrics: Any) -> dict[str, Number]:
    if not isinstance(metrics, Mapping) or not metrics or len(metrics) > _MOST_METRICS:
        raise ConfigError(
            f"metrics is {metrics!r:.60}; it must name 1 to {_MOST_METRICS} figures.",
            next_step='Write {"accuracy": 0.71}.',
            code="metrics",
        )
    return {_line("metric", name): _figure(name, value) for name, value in metrics.items()}


def _figure(name: str, value: Any) -> Number:
    try:
        plain = value.item() if hasattr(value, "item") else value  # of numpy and torch
    except (ValueError, RuntimeError):
        plain = None  # several numbers
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        raise ConfigError(
            f"The metric {name!r} is {value!r:.60}, which is not one number.",
            next_step="Hand in one number for each metric.",
            code="metrics",
        )
    return number(plain)


def _samples(samples: Any, rows: int | None) -> int | None:
    if samples is None:
        return rows
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ConfigError(
            f"samples is {samples!r}; it is how many were tested.", next_step="Write a number from 1.", code="samples"
        )
    return samples


def _seeds(seeds: Any) -> list[int]:
    found = [seeds] if isinstance(seeds, int) else list(seeds)
    if len(found) > _MOST_SEEDS or any(isinstance(seed, bool) or not isinstance(seed, int) for seed in found):
        raise ConfigError(
            f"seeds is {seeds!r:.60}; it is the whole numbers that the test was run with.",
            next_step="Write seeds=[0, 1, 2].",
            code="seeds",
        )
    return found


# --- the model -------------------------------------------------------------------------------------------------------


def _model(model: Any) -> dict[str, Any]:
    """How the model is known, as fields of the event."""
    if isinstance(model, str) and _DIGEST.fullmatch(model):
        return {"identified": "stated", "stated_digest": model}
    if isinstance(model, str | Path):
        return _folder(Path(model))
    if not hasattr(model, "state_dict"):
        raise _no_model(f"a {type(model).__name__}")
    if not has_one_adapter(model):
        raise ConfigError(
            "The model has several adapters, of which the trail can know one only.",
            next_step="Load it with the one adapter that was evaluated.",
            code="model",
        )
    final, base = digest_tensors(final_tensors(model)), digest_tensors(base_tensors(model))
    return {
        "identified": "live",
        "weights_digest": final,
        "base_digest": base if base != final else None,
        "folder_digest": loaded_from(model),
        "model_name": type(model.get_base_model() if base != final else model).__name__,
    }


def _folder(folder: Path) -> dict[str, Any]:
    """A saved model by its files, and by its weights where they are safetensors."""
    if not folder.is_dir() or not any(folder.iterdir()):
        raise _no_model(f"{folder.name!r}, which is no folder with files in it")
    stored = _stored(folder)
    return {
        "identified": "folder",
        "folder_digest": digest_folder(folder),
        "weights_digest": digest_tensors(stored) if stored else None,
        "model_name": folder.resolve().name,
    }


def _stored(folder: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        files = sorted(folder.glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise _no_model(f"{folder.name!r}, whose weights cannot be read ({error})") from error


def _no_model(what: str) -> ConfigError:
    return ConfigError(
        f"model is {what}; nothing can be said of which model was evaluated.",
        next_step="Hand in the model, the folder that it was saved in, or its digest (64 hex characters).",
        code="model",
    )


# --- what is private -------------------------------------------------------------------------------------------------


class _Sealed:
    """That something belongs into the private half."""


_SEALED = _Sealed()


def _public_entry(trail: Trail, digest: str | None, *, protects: bool) -> int | _Sealed | None:
    """The entry that declares data public, ``None`` where nobody is protected here, else that it is to be sealed."""
    reader = trail.reader()
    if digest is not None:
        for entry in reader.entries(type=PublicDeclared.TYPE):
            claim = decode_body(entry.type, entry.body)
            if isinstance(claim, PublicDeclared) and claim.kind == "data" and claim.digest == digest:
                return entry.index
    return _SEALED if protects or open_private_runs() or _protects(reader) else None


def _protects(reader: TrailReader) -> bool:
    """Whether the trail protects anybody: something was charged on it, or a run asked for privacy."""
    if any(True for kind in (PrivacyReserved, LabelsReleased) for _ in reader.entries(type=kind.TYPE)):
        return True
    started = (decode_body(entry.type, entry.body) for entry in reader.entries(type=RunStarted.TYPE))
    return any(isinstance(event, RunStarted) and event.privacy is not None for event in started)


def _append(trail: Trail, event: Event, private: Private | None) -> int:
    run = current_run()
    inside = run if run is not None and run.trail is trail else None
    return trail.append(
        event.TYPE,
        encode_body(Scrubber().event(event)),
        run=inside.id if inside is not None else None,
        private=encode_private(private) if private is not None else None,
        owner=OWNER if private is not None else None,
        resolution_us=max(inside.resolution_us if inside is not None else 1, COARSE_US if private is not None else 1),
    ).wait()


# --- words -----------------------------------------------------------------------------------------------------------


def _maybe(name: str, text: object) -> str | None:
    return None if text is None else _line(name, text)


def _line(name: str, text: object) -> str:
    said = text.strip() if isinstance(text, str) else ""
    if not said or len(said) > _MOST or not said.isprintable():
        raise ConfigError(
            f"{name} is {text!r:.60}; it must be one line of 1 to {_MOST} characters.",
            next_step=f'Write {name}="...".',
            code=name,
        )
    return said
