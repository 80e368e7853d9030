"""What is recorded of a data set: its columns, its size, a digest of its rows. Floor 2.

The digest is SHA-256 over the rows in order, each as one line of JSON with sorted keys. Token ids are left out where
text stands beside them, so the digest does not change with the tokenizer. Under differential privacy the size and the
digest of the rows are functions of private data (an attacker could try guesses against a plain hash), so they go into
the private half of the event and only a commitment stands in the trail; and so does all else that follows from rows:
types of the columns (which are read off the rows), the fingerprint, the hub's revision, the files.

The files are those that a `datasets` object keeps its rows in (its cache, or the folder that it was loaded from), each
by its name and digest, and what it was made from where the library kept that (``download_checksums``). What happened to
the rows between a file and the training is told by the fingerprint alone: who repeats the same steps with the same
version of the library on the same files gets the same one. A stream is told as far as it was read (`streams`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from rlhf_audit_nb.capture.code import keep_list
from rlhf_audit_nb.events import DataBound, DataPrivate, InputFile, InputFiles

__all__ = [
    "RowDigests",
    "bind_data",
    "column_names",
    "count_rows",
    "digest_prompts",
    "digest_rows",
    "digest_shards",
    "recorded_columns",
]

BATCH = 1024
SHARD_ROWS = 65_536
MAX_SHARDS = 256
MAX_FEATURE = 200
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
    artifacts: Path | None = None,
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
        artifacts: where a list of files too long for an entry is kept; not used under privacy.
    """
    columns = column_names(dataset)
    rows = count_rows(dataset)
    digests = digest_shards(dataset, rows) if rows is not None else None
    digest = digests.digest if digests is not None else None
    facts: dict[str, Any] = {
        "shards": list(digests.shards) if digests is not None and len(digests.shards) > 1 else None,
        "shard_rows": digests.shard_rows if digests is not None and len(digests.shards) > 1 else None,
        "features": _features(dataset),
        "fingerprint": _fingerprint(dataset),
        "revision": _revision(dataset),
        "files": _files(dataset, None if private else artifacts),
    }
    common: dict[str, Any] = {
        "role": role,
        "columns": columns,
        "provenance": _provenance(dataset),
        "source": _source(dataset),
    }
    if not private:
        return DataBound(rows=rows, digest=digest, **common, **facts), None
    half = DataPrivate(
        rows=rows or 0,
        digest=digest or "",
        annotators=_annotators(dataset, annotator_column),
        prompts=digest_prompts(dataset),
        **facts,
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
    return digest_shards(dataset, len(dataset)).digest


class RowDigests(msgspec.Struct, frozen=True):
    """The digest of all rows, and in order those of every ``shard_rows`` rows, each of the same form."""

    digest: str
    shards: tuple[str, ...]
    shard_rows: int


def digest_shards(dataset: Any, rows: int) -> RowDigests:
    """The digests of a map-style data set of ``rows`` rows; shards are a power of two long, at most 256 of them."""
    shard_rows = SHARD_ROWS
    while rows > shard_rows * MAX_SHARDS:
        shard_rows *= 2
    whole, part = hashlib.sha256(), hashlib.sha256()
    shards, held = [], 0
    for row in _rows(dataset):
        line = _encoder.encode(row) + b"\n"
        whole.update(line)
        if rows > shard_rows:  # else the one shard is the whole
            part.update(line)
            held += 1
            if held == shard_rows:
                shards.append(part.hexdigest())
                part, held = hashlib.sha256(), 0
    if held:
        shards.append(part.hexdigest())
    return RowDigests(whole.hexdigest(), tuple(shards) or (whole.hexdigest(),), shard_rows)


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


# --- where it came from ----------------------------------------------------------------------------------------------

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_FILE = re.compile(r"hf://datasets/[^@]+@(?P<commit>[0-9a-f]{40})/(?P<name>.+)")


def _features(dataset: Any) -> dict[str, str] | None:
    """Each column's type in the library's own words, cut where it is long (a class label lists its names)."""
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping):
        return None
    return {str(name): str(kind)[:MAX_FEATURE] for name, kind in features.items()}


def _fingerprint(dataset: Any) -> str | None:
    found = getattr(dataset, "_fingerprint", None)
    return found if isinstance(found, str) else None


def _revision(dataset: Any) -> str | None:
    """The hub's commit: from the addresses it was downloaded from, or the library's cache, which lies under it."""
    for address in _checksums(dataset):
        match = _HUB_FILE.fullmatch(address)
        if match is not None:
            return match["commit"]
    folders = {path.parent.name for path in _cache_files(dataset)}
    commits = {name for name in folders if _COMMIT.fullmatch(name)}
    return next(iter(commits)) if len(commits) == 1 else None


def _checksums(dataset: Any) -> Mapping[str, Any]:
    found = getattr(_info(dataset), "download_checksums", None)
    return found if isinstance(found, Mapping) else {}


def _cache_files(dataset: Any) -> list[Path]:
    listed = getattr(dataset, "cache_files", None)
    if not isinstance(listed, list):
        return []
    names = [item.get("filename") for item in listed if isinstance(item, Mapping)]
    return [Path(name) for name in dict.fromkeys(names) if isinstance(name, str)]


def _files(dataset: Any, artifacts: Path | None) -> InputFiles | None:
    """The files that hold the rows, and those they were made from where the library kept their digests."""
    paths = [path for path in _cache_files(dataset) if path.is_file()]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        listed = [*pool.map(_file, paths), *_downloaded(dataset)]
    if not listed:
        return None
    listed.sort(key=lambda file: (file.name, file.digest))
    digest, is_short = keep_list(listed, len(listed), artifacts)
    size = sum(file.bytes for file in listed)
    return InputFiles(count=len(listed), bytes=size, digest=digest, files=listed if is_short else [])


def _file(path: Path) -> InputFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return InputFile(name=path.name, bytes=path.stat().st_size, digest=digest)


def _downloaded(dataset: Any) -> list[InputFile]:
    found = []
    for address, facts in _checksums(dataset).items():
        checksum = facts.get("checksum") if isinstance(facts, Mapping) else None
        if isinstance(checksum, str) and checksum:
            match = _HUB_FILE.fullmatch(address)
            name = match["name"] if match is not None else PurePosixPath(address.partition("?")[0]).name
            found.append(InputFile(name=name, bytes=int(facts.get("num_bytes") or 0), digest=checksum))
    return found
