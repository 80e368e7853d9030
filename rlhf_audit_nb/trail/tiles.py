"""Publishing: a trail as static files in the layout of C2SP tlog-tiles v0.1.0. Floor 0.

::

    checkpoint                     the newest signed checkpoint, written last
    tile/L/N[.p/W]                 up to 256 hashes of tile level L; level 0 holds leaf hashes, only full tiles roll up
    tile/entries/N[.p/W]           up to 256 entries, each after its length in two bytes

``N`` is written in groups of three digits, all but the last after an ``x`` (1234067 is ``x001/x234/067``). A partial
tile of ``W`` hashes stands under ``.p/W``, and none of width 0 exists. Everything but ``checkpoint`` never changes:
what is there is compared and never overwritten, and a folder that was published from more entries, or from others, is
refused. The hashes are made anew from the entries, and the root is compared with the checkpoint before anything is
written: a wrong tile could not be taken back.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_audit_nb.errors import StoreError
from rlhf_audit_nb.trail.checkpoint import checkpoint_of
from rlhf_audit_nb.trail.durable import sync_folder
from rlhf_audit_nb.trail.merkle import Frontier, leaf_hash, node_hash
from rlhf_audit_nb.trail.store import BUNDLE, Bundle, Head, Store, Transaction, unpack_entries
from rlhf_audit_nb.trail.verify import store_path

__all__ = ["Published", "publish_tiles", "tile_path"]


@dataclass(frozen=True)
class Published:
    """What was published: the folder, the trail's size, and how many files had to be written."""

    folder: Path
    size: int
    written: int


def tile_path(level: int | str, number: int, width: int = BUNDLE) -> str:
    """The path of tile ``number`` of a level (or of ``entries``) with ``width`` (1 to 256) items."""
    groups = [f"{number % 1000:03d}"]
    while number := number // 1000:
        groups.insert(0, f"x{number % 1000:03d}")
    path = f"tile/{level}/" + "/".join(groups)
    return path if width == BUNDLE else f"{path}.p/{width}"


@dataclass
class _Target:
    """The folder that is published into."""

    folder: Path
    written: int = 0
    touched: set[Path] = field(default_factory=set)

    def put(self, name: str, data: bytes) -> None:
        """Write a file that never changes; one that is there must be the same."""
        path = self.folder / name
        if path.is_symlink():
            raise StoreError(
                f"{path} is a symbolic link.", next_step="Publish into a folder without links.", code="link"
            )
        if path.exists():
            if path.read_bytes() != data:
                raise self._other(f"{name} there has another content")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write(path, data)

    def replace(self, name: str, data: bytes) -> None:
        """Write a file that may change, after everything else is durable."""
        for folder in sorted(self.touched):
            sync_folder(folder)
        self._write(self.folder / name, data)
        sync_folder(self.folder)

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self.written += 1
        folder = path.parent
        while folder != self.folder.parent:
            self.touched.add(folder)
            folder = folder.parent

    def seen(self) -> tuple[int, bytes] | None:
        """Size and root of what was published here before."""
        path = self.folder / "checkpoint"
        if not path.exists():
            return None
        head = checkpoint_of(path.read_bytes())
        return head.size, head.root

    def _other(self, what: str) -> StoreError:
        return StoreError(
            f"The folder {self.folder} was published from another history: {what}.",
            next_step="Keep it as evidence and publish into another folder, after `rlhf-audit verify`.",
            code="diverged",
        )

    def check_continues(self, seen: tuple[int, bytes] | None, frontier: Frontier) -> None:
        """Compare the tree so far with what was published before, where that is of this size."""
        if seen is not None and seen[0] == frontier.size and seen[1] != frontier.root():
            raise self._other(f"its root at size {seen[0]} is not this trail's")

    def check_not_larger(self, seen: tuple[int, bytes] | None, size: int) -> int:
        """The size that was published before; refused where it is more than ``size``."""
        if seen is not None and seen[0] > size:
            raise self._other(f"it has {seen[0]} entries and the trail {size}")
        return seen[0] if seen is not None else 0


def publish_tiles(location: Path | str, target: Path | str) -> Published:
    """Publish the trail in the folder ``location`` into the folder ``target``, or bring that up to date.

    Raises:
        StoreError: the trail cannot be read or does not hang together (``damaged``), or the folder cannot be written,
            holds a link, or was published from another history (``diverged``).
    """
    store = Store(store_path(location), write=False)
    if not store.exists():
        raise StoreError(f"There is no trail at {store.path}.", next_step="Name its folder.", code="no-trail")
    folder = Path(target).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with store.reading() as transaction:
            return _publish(transaction, _Target(folder))
    except OSError as error:
        raise StoreError(
            f"The folder {folder} cannot be written: {error.strerror or error}.",
            next_step="Make it writable, free some space, or name another one.",
            code="publish",
        ) from error


def _publish(transaction: Transaction, target: _Target) -> Published:
    head = transaction.head()
    _check(transaction, head, target)
    levels: list[list[bytes]] = []
    for number, entries, packed in _tiles(transaction, head.size):
        leaves = [leaf_hash(entry) for entry in entries]
        target.put(tile_path("entries", number, len(leaves)), packed)
        _roll_up(target, levels, leaves, number)
    for level, hashes in enumerate(levels[1:], 1):
        if len(hashes) % BUNDLE:
            start = len(hashes) - len(hashes) % BUNDLE
            target.put(tile_path(level, start // BUNDLE, len(hashes) - start), b"".join(hashes[start:]))
    target.replace("checkpoint", head.note.encode())
    return Published(target.folder, head.size, target.written)


def _check(transaction: Transaction, head: Head, target: _Target) -> None:
    """Refuse entries that are not the checkpoint's, and a target that holds another history."""
    seen = target.seen()
    before = target.check_not_larger(seen, head.size)
    frontier = Frontier()
    for _number, entries, _packed in _tiles(transaction, head.size):
        leaves = [leaf_hash(entry) for entry in entries]
        split = min(max(before - frontier.size, 0), len(leaves))
        frontier.extend(leaves[:split])
        target.check_continues(seen, frontier)
        frontier.extend(leaves[split:])
    checkpoint = checkpoint_of(head.note)
    if (checkpoint.size, checkpoint.root) != (frontier.size, frontier.root()):
        raise StoreError(
            "The trail's entries are not those of its newest checkpoint; it was not published.",
            next_step="Run `rlhf-audit verify` on it to see what is wrong.",
            code="damaged",
        )


def _roll_up(target: _Target, levels: list[list[bytes]], leaves: list[bytes], number: int) -> None:
    """Write one tile of leaf hashes, and each tile above it that became full."""
    target.put(tile_path(0, number, len(leaves)), b"".join(leaves))
    if not levels:
        levels.append([])
    tile, level = leaves, 0
    while len(tile) == BUNDLE:
        level += 1
        if level == len(levels):
            levels.append([])
        levels[level].append(_root(tile))
        if len(levels[level]) % BUNDLE:
            return
        tile = levels[level][-BUNDLE:]
        target.put(tile_path(level, len(levels[level]) // BUNDLE - 1), b"".join(tile))


def _root(row: list[bytes]) -> bytes:
    while len(row) > 1:
        row = [node_hash(row[i], row[i + 1]) for i in range(0, len(row), 2)]
    return row[0]


def _tiles(transaction: Transaction, size: int) -> Iterator[tuple[int, list[bytes], bytes]]:
    """Each tile's number, its entries and its entry bundle: the rows between two multiples of 256, joined."""
    rows: list[Bundle] = []
    for row in transaction.bundles(0, size):
        if rows and row.first // BUNDLE != rows[0].first // BUNDLE:
            yield _join(rows)
            rows = []
        rows.append(row)
    if rows:
        yield _join(rows)


def _join(rows: list[Bundle]) -> tuple[int, list[bytes], bytes]:
    packed = b"".join(row.data for row in rows)
    return rows[0].first // BUNDLE, unpack_entries(packed, sum(row.count for row in rows)), packed
