"""Rows from wherever they lie, as columns: a file, a `datasets.Dataset`, or any iterable of dicts. Floor 2.

A file is CSV, JSON lines, a JSON array (these three also with ``.gz``) or parquet. Columns are what an import checks
and encodes fast. Nothing is mended in silence: a row that does not fit its header, or is no object, is an error that
names the file and the row. Rows are counted from 1.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from rlhf_audit_nb.capture.data import column_names, digest_rows
from rlhf_audit_nb.errors import DataError

__all__ = ["Source", "Table", "close_to", "file_digest", "read_table"]

_FORMS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
_line_decoder = msgspec.json.Decoder()
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Source:
    """Something that rows were drawn from: its name (of a file the last part, never a path) and hex SHA-256."""

    name: str
    digest: str


@dataclass(frozen=True)
class Table:
    """Columns of equal length.

    Args:
        form: ``csv``, ``jsonl``, ``json``, ``parquet``, ``dataset`` or ``values``.
        columns: each column's values by its name.
        rows: how many there are.
        name: how complaints call it; empty where it has no name.
        sources: what it was drawn from, by digest.
    """

    form: str
    columns: Mapping[str, list[Any]]
    rows: int
    name: str = ""
    sources: tuple[Source, ...] = ()


def read_table(data: object) -> Table:
    """The rows of ``data``: the path of a file, a `datasets.Dataset`, or an iterable of dicts.

    Raises:
        DataError: it cannot be read, is of no known kind, or has no rows.
    """
    if isinstance(data, str | Path):
        table = _read_file(Path(data))
    elif column_names(data) and hasattr(data, "__len__"):
        table = _read_dataset(data)
    elif isinstance(data, Iterable) and not isinstance(data, Mapping | bytes):
        rows = list(data)
        table = Table("values", _columns_of(rows, "Row"), len(rows))
    else:
        raise DataError(
            f"The annotations are a {type(data).__name__}, which holds no rows.",
            next_step="Hand in a file's path, a data set's split, or a list of dicts.",
            code="unknown-source",
        )
    if not table.rows:
        raise DataError(
            f"{table.name or 'The source'} has no rows.",
            next_step="Name a file or a split with at least one annotation.",
            code="empty-data",
        )
    return table


def close_to(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` where something known is near ``name``, else nothing."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def file_digest(path: Path | str) -> Source:
    """The name and digest of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return Source(Path(path).name, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path | str, error: BaseException) -> DataError:
    return DataError(
        f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.",
        next_step="Check the path; is the file whole?",
        code="unreadable",
    )


def _malformed(place: str, what: str) -> DataError:
    return DataError(f"{place}: {what}.", next_step="Is the file whole?", code="malformed")


# --- files -----------------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> Table:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    form = _FORMS.get("".join(suffixes[-2:-1] if zipped else suffixes[-1:]))
    if form is None or (zipped and form == "parquet"):
        raise DataError(
            f"{path} is of no known kind.",
            next_step=f"Use a file that ends in {', '.join(_FORMS)} (the text ones also with .gz).",
            code="unknown-format",
        )
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if zipped else raw
    except FileNotFoundError:
        near = close_to(path.name, [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise DataError(f"{path} does not exist.{near}", next_step="Check the path.", code="no-file") from None
    except (OSError, EOFError) as error:
        raise _unreadable(path, error) from error
    columns = _parse_parquet(path, data) if form == "parquet" else _parse_text(path, data, form)
    rows = len(next(iter(columns.values()))) if columns else 0
    return Table(form, columns, rows, path.name, (Source(path.name, hashlib.sha256(raw).hexdigest()),))


def _parse_text(path: Path, data: bytes, form: str) -> dict[str, list[Any]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}).", next_step="Save it as UTF-8.", code="unreadable"
        ) from error
    if form == "csv":
        return _parse_csv(path, text)
    if form == "json":
        try:
            rows = msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise _malformed(str(path), str(error)) from error
        return _columns_of(rows if isinstance(rows, list) else [rows], f"{path}, row")
    return _columns_of(_parse_lines(path, text), f"{path}, row")


def _parse_lines(path: Path, text: str) -> list[Any]:
    rows: list[Any] = []
    # Not splitlines(): a JSON text may hold line separators other than the line feed unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(_line_decoder.decode(line))
            except msgspec.DecodeError as error:
                raise _malformed(f"{path}, line {number}", str(error)) from error
    return rows


def _columns_of(rows: Sequence[Any], where: str) -> dict[str, list[Any]]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(
                f"{where} {number} is a {type(row).__name__}, not an object with named fields.",
                next_step="Give each annotation as one object (in Python: one dict).",
                code="malformed",
            )
    names = dict.fromkeys(name for row in rows for name in row)
    return {str(name): [row.get(name) for row in rows] for name in names}


def _parse_csv(path: Path, text: str) -> dict[str, list[Any]]:
    limit = csv.field_size_limit(sys.maxsize)  # a response may be longer than the 128 KiB that a field has by default
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise _malformed(str(path), str(error)) from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        return {}
    header, body = rows[0], [row for row in rows[1:] if row]
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise _malformed(str(path), f"the header names {twice!r} twice")
    for number, row in enumerate(body, start=1):
        if len(row) != len(header):
            fields = f"{len(row)} field{'s' if len(row) != 1 else ''}"
            raise _malformed(f"{path}, row {number}", f"it has {fields}, and the header has {len(header)}")
    return {name: list(column) for name, column in zip(header, zip(*body, strict=True), strict=False)} if body else {}


def _parse_parquet(path: Path, data: bytes) -> dict[str, list[Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no parquet file: {error}.", next_step="Is it whole?", code="malformed") from error
    return {name: table.column(name).to_pylist() for name in table.column_names}


# --- data sets -------------------------------------------------------------------------------------------------------


def _read_dataset(dataset: Any) -> Table:
    plain = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
    columns = {name: list(plain[name]) for name in column_names(dataset)}
    info = getattr(dataset, "info", None)
    name = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None) or ""
    return Table("dataset", columns, len(plain), "", (Source(str(name), digest_rows(dataset)),))
