"""Sealed records kept beside their trail, in its folder ``records/``. Floor 3.

A record is a file that its owner moves, renames and sends away; the copy ``records/<record id>.ipynb`` is found by the
trail alone. It is the notebook as it was sealed, written before the file that was asked for: what papermill or an
editor does to that one later does not touch it; of what is added to that one later (`additions`), what people have
signed is put into the copy as well where its trail is at hand (`attesting`). A copy proves nothing by itself: it is
verified like any record.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rlhf_audit_nb.errors import StoreError
from rlhf_audit_nb.trail.durable import write_durably
from rlhf_audit_nb.trail.verify import store_path

__all__ = ["FOLDER", "keep_record", "kept_record", "kept_records"]

FOLDER = "records"
_NAME = re.compile(r"([0-9a-f]{32})\.ipynb")


def _folder(location: Path | str) -> Path:
    return store_path(location).parent / FOLDER


def keep_record(location: Path | str, record: str, data: bytes) -> Path:
    """Keeps a sealed notebook's bytes beside the trail at ``location``; the file, durable and whole.

    Raises:
        StoreError: it cannot be written.
    """
    folder = _folder(location)
    path = folder / f"{record}.ipynb"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        write_durably(path, data)
    except OSError as error:
        raise StoreError(
            f"The copy of the record cannot be kept in {folder}: {error.strerror or error}.",
            next_step="Make room or the folder writable, and keep the record itself safe: there is no other copy.",
        ) from error
    return path


def kept_record(location: Path | str, record: str) -> Path | None:
    """The copy of the record with this id (32 hexadecimal digits), ``None`` where there is none."""
    path = _folder(location) / f"{record}.ipynb"
    return path if _NAME.fullmatch(path.name) and path.is_file() else None


def kept_records(location: Path | str) -> Iterator[Path]:
    """All copies beside a trail, by name; none where the trail has no such folder."""
    folder = _folder(location)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return (folder / name for name in names if _NAME.fullmatch(name) and (folder / name).is_file())
