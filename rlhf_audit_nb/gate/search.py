"""Finding the records of a model by its digests, in folders of notebooks. Floor 4.

A notebook is read as bytes, and looked at further only where the digest stands in it: a seal holds its entries in
base64, in which the same text has one of three forms. So a folder of thousands is looked through at the disk's speed,
and nothing of a file is believed for being found. The search is bounded, and says what it left out.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MOST_BYTES", "MOST_FILES", "Search", "find_records"]

MOST_FILES = 20_000
MOST_BYTES = 512 << 20
MOST_DEPTH = 8
SUFFIX = ".ipynb"
_HIDDEN = (".ipynb_checkpoints", ".git", "node_modules", ".venv")


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        found: the notebooks that hold one of the digests, in the order of the places and of their names.
        files: how many notebooks were looked at.
        left: what was not looked at, and why, one sentence each.
    """

    found: tuple[Path, ...]
    files: int
    left: tuple[str, ...]


def find_records(
    digests: Iterable[str],
    places: Sequence[tuple[Path, bool]],
    progress: Callable[[int], None] | None = None,
) -> Search:
    """The notebooks in ``places`` that hold one of ``digests``.

    Args:
        digests: SHA-256 in lower-case hex.
        places: files, or folders with whether those below them are looked through as well. Links to folders are not
            followed.
        progress: told how many notebooks were looked at.
    """
    needles = [needle for digest in digests for needle in _in_base64(digest)]
    seen: set[Path] = set()
    found: list[Path] = []
    left: list[str] = []
    for place, deep in places:
        for path in _notebooks(place, deep, left):
            real = path.resolve()
            if real in seen:
                continue
            if len(seen) == MOST_FILES:
                left.append(f"Only the first {MOST_FILES:,} notebooks were looked at: name narrower folders.")
                return Search(tuple(found), len(seen), tuple(left))
            seen.add(real)
            if progress is not None:
                progress(len(seen))
            try:
                if path.stat().st_size > MOST_BYTES:
                    left.append(f"{path} is over {MOST_BYTES >> 20} MiB and was not read.")
                elif _holds(path, needles):
                    found.append(path)
            except OSError as error:
                left.append(f"{path} cannot be read: {error.strerror or error}.")
    return Search(tuple(found), len(seen), tuple(left))


def _in_base64(digest: str) -> Iterator[bytes]:
    """How ``digest`` looks in base64 where it begins at any place: only the characters that no neighbour changes."""
    for before in range(3):
        text = base64.b64encode(b"\0" * before + digest.encode())
        # Six bits a character: those that also hold bits of what stands before or after are cut off.
        first = -(-before * 8 // 6)
        last = (before + len(digest)) * 8 // 6
        yield text[first:last]


def _holds(path: Path, needles: Sequence[bytes]) -> bool:
    data = path.read_bytes()
    return any(needle in data for needle in needles)


def _notebooks(place: Path, deep: bool, left: list[str]) -> Iterator[Path]:  # noqa: FBT001
    if place.is_file():
        yield place
        return
    top = len(place.parts)

    def unreadable(error: OSError) -> None:
        left.append(f"{error.filename} cannot be looked through: {error.strerror or error}.")

    for folder, below, names in os.walk(place, onerror=unreadable):
        here = Path(folder)
        yield from (here / name for name in sorted(names) if name.endswith(SUFFIX) and (here / name).is_file())
        if len(here.parts) - top >= MOST_DEPTH and below:
            left.append(f"What lies below {here} was not looked through: name it to have it looked at.")
            below.clear()
        below[:] = sorted(name for name in below if name not in _HIDDEN) if deep else []
