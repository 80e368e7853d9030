"""The tree of a published trail: its checkpoint, roots and proofs from the tiles alone (C2SP tlog-tiles). Floor 0.

Reads few tiles, and verifies nothing: a proof is checked by whoever gets it, against signed heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from rlhf_audit_nb.errors import FormatError, StoreError
from rlhf_audit_nb.trail.checkpoint import checkpoint_of
from rlhf_audit_nb.trail.merkle import HASH_BYTES, node_hash, prove_consistency, tree_root
from rlhf_audit_nb.trail.note import MAX_NOTE
from rlhf_audit_nb.trail.targets import Target, open_target
from rlhf_audit_nb.trail.tiles import tile_path

__all__ = ["PublishedTree", "needed_tiles"]

_WIDTH = 256


class _HasTiles(Protocol):
    def tile(self, level: int, number: int) -> bytes: ...


def needed_tiles(tree: _HasTiles, indices: Iterable[int], size: int) -> dict[str, bytes]:
    """The tiles of hashes, by their paths, that the inclusion proofs of these entries run through, and the right edge.

    They give the root of the first ``size`` entries, and show each of the entries under it.

    Args:
        tree: a trail or a published one, as large as ``size`` or larger.
        indices: the entries.
        size: of the checkpoint that they are to be shown under.
    """
    found: dict[str, bytes] = {}
    wanted, count, level = {index // _WIDTH for index in indices}, size, 0
    while count:
        edge = {count // _WIDTH} if count % _WIDTH else set()
        for number in sorted(wanted | edge):
            width = min(_WIDTH, count - number * _WIDTH)
            found[tile_path(level, number, width)] = tree.tile(level, number)[: width * HASH_BYTES]
        # A partial tile has no hash above it.
        wanted = {number // _WIDTH for number in wanted if (number + 1) * _WIDTH <= count}
        count, level = count // _WIDTH, level + 1
    return found


class PublishedTree:
    """The tree of the trail that was published at a target."""

    def __init__(self, target: Target, location: str, note: str) -> None:
        head = checkpoint_of(note)
        self._target = target
        self._location = location
        self._note = note
        self._tiles: dict[tuple[int, int], bytes] = {}
        self.origin = head.origin
        self.size = head.size

    @classmethod
    def open(cls, location: Path | str) -> PublishedTree:
        """The trail that was published at ``location``, a folder or an address.

        Raises:
            StoreError: there is none, or it cannot be read.
            FormatError: what is there is no checkpoint.
        """
        target = open_target(location)
        data = target.read("checkpoint", MAX_NOTE)
        if data is None:
            raise StoreError(
                f"There is neither a trail nor a published one at {location}.",
                next_step="Name the folder that holds trail.sqlite, or one that was published into.",
                code="no-trail",
            )
        try:
            return cls(target, str(location), data.decode())
        except UnicodeDecodeError as error:
            raise FormatError(f"The checkpoint at {location} is not UTF-8.", code="checkpoint") from error

    def checkpoint(self) -> str:
        """The published checkpoint (a note)."""
        return self._note

    def root(self, size: int) -> bytes:
        """The root over the first ``size`` entries, by the tiles."""
        return tree_root(size, self)

    def consistency_proof(self, first: int, second: int) -> list[bytes]:
        """The proof that the tree of ``first`` entries is a prefix of that of ``second``, by the tiles."""
        return prove_consistency(first, second, self)

    def node(self, level: int, index: int) -> bytes:
        """The root of one complete subtree (`HashReader`)."""
        tile_level, height = divmod(level, 8)
        first = index << height
        tile = self.tile(tile_level, first // _WIDTH)
        at = first % _WIDTH * HASH_BYTES
        row = [tile[place : place + HASH_BYTES] for place in range(at, at + (HASH_BYTES << height), HASH_BYTES)]
        while len(row) > 1:
            row = [node_hash(row[i], row[i + 1]) for i in range(0, len(row), 2)]
        return row[0]

    def tile(self, level: int, number: int) -> bytes:
        """The hashes of one tile, as many as there are, at most 256 of 32 bytes."""
        if (level, number) not in self._tiles:
            width = min(_WIDTH, (self.size >> 8 * level) - number * _WIDTH)
            name = tile_path(level, number, width)
            data = self._target.read(name, _WIDTH * HASH_BYTES)
            if data is None and width < _WIDTH:  # published further since; a partial tile may be gone by then
                data = (self._target.read(tile_path(level, number), _WIDTH * HASH_BYTES) or b"")[: width * HASH_BYTES]
            if data is None or len(data) != width * HASH_BYTES:
                raise StoreError(
                    f"The tile {name} of the trail published at {self._location} is missing or cut.",
                    next_step="Publish it again, or ask its holder; `rlhf-audit verify` names all that is wrong.",
                    code="missing-node",
                )
            self._tiles[level, number] = data
        return self._tiles[level, number]
