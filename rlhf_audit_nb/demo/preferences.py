"""Reads preference data into the four columns that training needs. Floor 1.

    load_preferences("votes.jsonl.gz", columns={"prompt": "question", "annotator_id": "worker"})

What a release of labels wrote keeps the two columns that say so.

A source is a file (JSON lines or a JSON array, CSV, parquet; the first three also with ``.gz``), a folder written by
``Dataset.save_to_disk``, a name on the Hugging Face hub, or `SIMULATED`. Every complaint names the file, the row and
the column, and nothing is dropped or mended in silence: a vote that cannot be used is an error.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["COLUMNS", "SIMULATED", "SIMULATED_FILE", "load_preferences", "parse_columns"]

SIMULATED = "simulated"
"""The source that names the simulated preference set that ships with the package."""

SIMULATED_FILE = Path(__file__).with_name("simulated_preferences.jsonl")
"""Where it lies; ``SIMULATED.md`` beside it says what it is."""

COLUMNS = ("prompt", "chosen", "rejected", "annotator_id")

_TEXTS = COLUMNS[:3]
_RELEASED = ("label_release", "label_check")  # what `release_labels` puts beside its noisy rows
_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


def load_preferences(
    source: str | Path = SIMULATED,
    *,
    columns: Mapping[str, str | None] | str | None = None,
    split: str = "train",
) -> Dataset:
    """The votes of ``source`` as a `datasets.Dataset` with the columns ``prompt, chosen, rejected, annotator_id``.

    Rows that a release of labels wrote have no annotators, and keep its two columns ``label_release, label_check``.

    Args:
        source: a file, a folder of ``save_to_disk``, a hub name, or ``"simulated"``.
        columns: what the columns are called in the source, as ``{"prompt": "question"}`` or ``"prompt=question,…"``;
            ``{"annotator_id": None}`` (or ``"annotator_id="``) says that the data has no annotators.
        split: which split of a hub data set is read.

    Raises:
        DataError: the source cannot be read, has no rows or lacks a column, or a row has no text or no annotator.
    """
    names = _resolve(columns)
    rows = _read(source, split)
    if not rows:
        raise DataError(
            f"{source} has no rows.", next_step="Name a file or a split with at least one vote.", code="empty-data"
        )
    released = _RELEASED if all(name in row for row in rows for name in _RELEASED) else ()
    if released and not any("annotator_id" in row for row in rows):
        names["annotator_id"] = None
    _check_columns(rows, names, source)
    table = {ours: _column(rows, ours, theirs, source) for ours, theirs in names.items() if theirs is not None}
    table |= {name: _column(rows, name, name, source) for name in released}
    from datasets import Dataset

    return Dataset.from_dict(table)


def parse_columns(text: str) -> dict[str, str | None]:
    """``"prompt=question,annotator_id=worker"`` as a mapping; ``"annotator_id="`` says that there is none.

    Raises:
        DataError: a part is no ``ours=theirs``.
    """
    pairs: dict[str, str | None] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        ours, equals, theirs = part.partition("=")
        if not equals:
            raise DataError(
                f"The column renaming {part!r} has no '='.",
                next_step="Write ours=theirs, such as prompt=question,annotator_id=worker.",
                code="columns",
            )
        pairs[ours.strip()] = theirs.strip() or None
    return pairs


def _resolve(columns: Mapping[str, str | None] | str | None) -> dict[str, str | None]:
    given = parse_columns(columns) if isinstance(columns, str) else dict(columns or {})
    for name in given:
        if name not in COLUMNS:
            raise DataError(
                f"columns renames {name!r}, which is none of {', '.join(COLUMNS)}.{_close(name, COLUMNS)}",
                next_step='Write what each is called in your data, such as {"prompt": "question"}.',
                code="columns",
            )
        if given[name] is None and name in _TEXTS:
            raise DataError(
                f"columns says that there is no {name!r}, which training cannot do without.",
                next_step="Only annotator_id may be None.",
                code="columns",
            )
    return {name: given.get(name, name) for name in COLUMNS}


def _close(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def _check_columns(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str | None], source: object) -> None:
    there = list(dict.fromkeys(key for row in rows for key in row))
    for ours, theirs in names.items():
        if theirs is not None and theirs not in there:
            without = (
                ' If the data has no annotators, write columns={"annotator_id": None} (--columns annotator_id=) '
                "and --unit pair."
            )
            raise DataError(
                f"{source} has no column {theirs!r}; it has {', '.join(there)}.{_close(theirs, there)}",
                next_step=f'Name it with columns={{"{ours}": "…"}} (--columns {ours}=…).'
                + (without if ours == "annotator_id" else ""),
                code="missing-column",
            )


def _column(rows: Sequence[Mapping[str, Any]], ours: str, theirs: str, source: object) -> list[str]:
    values = [row.get(theirs) for row in rows]
    for number, value in enumerate(values, start=1):
        if value is None or (ours == "annotator_id" and value == ""):
            raise DataError(
                f"{source}, row {number}: {theirs} is {value!r}.",
                next_step="Give every vote its annotator, or leave such votes out."
                if ours == "annotator_id"
                else "Leave such votes out of the file.",
                code="missing-annotator" if ours == "annotator_id" else "missing-value",
            )
        if not isinstance(value, str) and (ours in _TEXTS or isinstance(value, (bool, float, list, dict))):
            raise DataError(
                f"{source}, row {number}: {theirs} is a {type(value).__name__}, not text.",
                next_step="Write plain text; apply a chat template to conversations first."
                if ours in _TEXTS
                else "Write an id as text or as a whole number.",
                code="wrong-type",
            )
    return [str(value) for value in values]


def _read(source: str | Path, split: str) -> list[dict[str, Any]]:
    if source == SIMULATED:
        return _parse(SIMULATED_FILE, SIMULATED_FILE.read_bytes(), ".jsonl")
    path = Path(source)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    kind = "".join(suffixes[-2:-1] if zipped else suffixes[-1:])
    if path.is_dir():
        return _from_datasets(lambda datasets: datasets.load_from_disk(str(path)), source, split)
    if not path.exists() and kind not in _FORMATS and not path.is_absolute() and not str(source).startswith("."):
        return _from_datasets(lambda datasets: datasets.load_dataset(str(source), split=split), source, split)
    if kind not in _FORMATS:
        raise DataError(
            f"{source} is of no known kind.",
            next_step=f"Use a file that ends in {', '.join(_FORMATS)} (the text ones also with .gz).",
            code="unknown-format",
        )
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if zipped else raw
    except FileNotFoundError:
        near = _close(path.name, [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise DataError(f"{source} does not exist.{near}", next_step="Check the path.", code="no-file") from None
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{source} cannot be read: {reason}.", next_step="Get the whole file again.", code="unreadable"
        ) from error
    return _parse(path, data, kind)


def _parse(path: Path, data: bytes, kind: str) -> list[dict[str, Any]]:
    if kind == ".parquet":
        return _parse_parquet(path, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}).", next_step="Save it as UTF-8.", code="unreadable"
        ) from error
    if kind == ".csv":
        return _parse_csv(path, text)
    if kind == ".json" and text.lstrip().startswith("["):
        return _objects(path, _json(path, text, 1))
    # Not splitlines(): a JSON text may hold line separators other than the line feed unescaped.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return _objects(path, [_json(path, line, number) for number, line in lines])


def _json(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {line + error.lineno - 1}: {error.msg} (column {error.colno}).",
            next_step="Write one JSON object a line; is the file whole?",
            code="malformed",
        ) from error


def _objects(path: Path, values: Sequence[Any]) -> list[dict[str, Any]]:
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise DataError(
                f"{path}, row {number} is a {type(value).__name__}, not an object.",
                next_step="Write one JSON object a vote.",
                code="malformed",
            )
    return list(values)


def _parse_csv(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{path}: {error}.", next_step="Is the file whole?", code="malformed") from error
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise DataError(
                f"{path}, row {number} has more fields than the header.", next_step="Quote the texts.", code="malformed"
            )
    return rows


def _parse_parquet(path: Path, data: bytes) -> list[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(pa.BufferReader(data)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no parquet file: {error}.", next_step="Is it whole?", code="malformed") from error
    return rows


def _from_datasets(load: Any, source: object, split: str) -> list[dict[str, Any]]:
    import datasets

    try:
        loaded = load(datasets)
        if isinstance(loaded, datasets.DatasetDict):
            loaded = loaded[split]
    except Exception as error:  # whatever the hub, the cache or the network raises
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(
            f"{source} is no file here, and `datasets` cannot load it: {first}.",
            next_step="Check the path or the name; without network a hub data set must be in the cache.",
            code="no-data-set",
        ) from error
    return [dict(row) for row in loaded]
