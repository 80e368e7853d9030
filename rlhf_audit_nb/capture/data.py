"""What is recorded of a data set: its columns, its size, a digest of its rows. Floor 2.

The digest is SHA-256 over the rows in order, each as one line of JSON with sorted keys. Token ids are left out where
text stands beside them, so the digest does not change with the tokenizer. Under differential privacy the size and the
digest of the rows are functions of private data (an attacker could try guesses against a plain hash), so they go into
the private half of the event and only a commitment stands in the trail.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from rlhf_audit_nb.events import DataBound, DataPrivate

__all__ = ["bind_data", "column_names", "count_rows", "digest_prompts", "digest_rows", "recorded_columns"]

BATCH = 1024
PROMPT = "prompt"


def _plain(value: Any) -> Any:
    """A value that JSON does not have, as one that it has: arrays and tensors as lists, the rest by name."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


_encoder = msgspec.json.Encoder(order="deterministic", enc_hook=_plain)


def bind_data(
    dataset: Any,
    role: str,
    *,
    private: bool = False,
    unit: str | None = None,
    units: int | None = None,
    annotator_column: str | None = None,
) -> tuple[DataBound, DataPrivate | None]:
    """The event for ``dataset`` in its ``role`` (``train``, ``evaluation``), and its private half under privacy.

    Args:
        dataset: a `datasets.Dataset`, a map-style torch data set, or an iterable one (then neither size nor digest
            is known before it is used up, and none is recorded).
        role: what the run does with it.
        private: whether size and digest are private.
        unit: the privacy unit, where there is one.
        units: the number of units, public under the zero-out adjacency.
        annotator_column: the column whose distinct values are counted for the private half.
    """
    columns = column_names(dataset)
    rows = count_rows(dataset)
    digest = digest_rows(dataset) if rows is not None else None
    common: dict[str, Any] = {
        "role": role,
        "columns": columns,
        "provenance": _provenance(dataset),
        "source": _source(dataset),
    }
    if not private:
        return DataBound(rows=rows, digest=digest, **common), None
    half = DataPrivate(
        rows=rows or 0,
        digest=digest or "",
        annotators=_annotators(dataset, annotator_column),
        prompts=digest_prompts(dataset),
    )
    return DataBound(unit=unit, units=units, **common), half


def column_names(dataset: Any) -> list[str]:
    """The data set's columns, in its own order; empty where it names none."""
    names = getattr(dataset, "column_names", None)
    return [str(name) for name in names] if isinstance(names, list | tuple) else []


def count_rows(dataset: Any) -> int | None:
    """The number of rows, or ``None`` for a stream."""
    try:
        return len(dataset)
    except TypeError:
        return None


def recorded_columns(dataset: Any) -> list[str]:
    """The columns that the digest covers: all but lists of integers, where others stand beside them."""
    names = column_names(dataset)
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping):
        return names
    kept = [name for name in names if not _is_token_ids(features.get(name))]
    return kept or names


def digest_rows(dataset: Any) -> str:
    """Hex SHA-256 over the rows of a map-style data set (see the module's first lines)."""
    hasher = hashlib.sha256()
    for row in _rows(dataset):
        hasher.update(_encoder.encode(row))
        hasher.update(b"\n")
    return hasher.hexdigest()


def digest_prompts(dataset: Any) -> str | None:
    """Hex SHA-256 over the distinct values of the column ``prompt``, sorted; ``None`` where there is no such column."""
    if PROMPT not in column_names(dataset) or not hasattr(dataset, "with_format") or count_rows(dataset) is None:
        return None
    prompts = {_encoder.encode(prompt) for prompt in dataset.with_format(None)[PROMPT]}
    return hashlib.sha256(b"\n".join(sorted(prompts))).hexdigest()


def _is_token_ids(feature: Any) -> bool:
    inner = getattr(feature, "feature", None)
    return str(getattr(inner, "dtype", "")).startswith(("int", "uint"))


def _rows(dataset: Any) -> Iterator[Any]:
    if hasattr(dataset, "select_columns") and hasattr(dataset, "with_format"):
        plain = dataset.with_format(None).select_columns(recorded_columns(dataset))
        for batch in plain.iter(batch_size=BATCH):
            names = list(batch)
            yield from (dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True))
        return
    yield from (dataset[index] for index in range(len(dataset)))


def _annotators(dataset: Any, column: str | None) -> int | None:
    if column is None or column not in column_names(dataset):
        return None
    values: Iterable[Any] = dataset.with_format(None)[column] if hasattr(dataset, "with_format") else dataset[column]
    return len(set(values))


def _info(dataset: Any) -> Any:
    return getattr(dataset, "info", None)


def _provenance(dataset: Any) -> str:
    """``simulated`` where the data set says so of itself, else ``unknown``: a person attests the rest."""
    description = str(getattr(_info(dataset), "description", "") or "")
    return "simulated" if description.strip().lower().startswith("simulated") else "unknown"


def _source(dataset: Any) -> str | None:
    """The data set's public name, never a path."""
    info = _info(dataset)
    name = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)
    return str(name) if name else None
