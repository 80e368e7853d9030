"""The Merkle tree of RFC 6962: hashes, the frontier that grows it, and its proofs. Floor 0.

``leaf = SHA256(0x00 || entry)``, ``node = SHA256(0x01 || left || right)``, and the empty tree is ``SHA256("")``. A tree
of n > 1 leaves splits at the largest power of two below n; no leaf is ever doubled.

A *complete subtree* is named by its height and its place: ``(level, index)`` covers the leaves
``[index << level, (index + 1) << level)``. Storage is handed in as a `HashReader` that knows the complete subtrees, so
that the proofs (RFC 9162, sections 2.1.3 and 2.1.4) can be made from a store, from published tiles or from a list.
Every prove has its check; a check takes values and returns a bool, and accepts exactly one length of proof.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Protocol

__all__ = [
    "EMPTY_ROOT",
    "HASH_BYTES",
    "Frontier",
    "HashReader",
    "LeafHashes",
    "check_consistency",
    "check_inclusion",
    "leaf_hash",
    "node_hash",
    "prove_consistency",
    "prove_inclusion",
    "subtree_root",
    "tree_root",
]

HASH_BYTES = 32
EMPTY_ROOT = sha256(b"").digest()
TILE_HEIGHT = 8


def leaf_hash(entry: bytes) -> bytes:
    """The leaf hash of an entry's bytes."""
    return sha256(b"\0" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of an inner node over its two 32-byte children."""
    return sha256(b"\1" + left + right).digest()


class HashReader(Protocol):
    """Where the proofs get the complete subtrees from."""

    def node(self, level: int, index: int) -> bytes:
        """The 32-byte root over the leaves ``[index << level, (index + 1) << level)``."""


class Frontier:
    """The complete subtrees that cover the leaves so far: all that is needed to append and to know the root.

    Holds one hash for each bit set in ``size``, the largest subtree first (at most 63).
    """

    __slots__ = ("_nodes", "_size")

    def __init__(self, size: int = 0, nodes: Sequence[bytes] = ()) -> None:
        """A frontier of ``size`` leaves from its ``nodes``; raises `ValueError` where they cannot belong together."""
        if size < 0 or len(nodes) != size.bit_count() or any(len(node) != HASH_BYTES for node in nodes):
            raise ValueError(f"{len(nodes)} hashes do not make a frontier of {size} leaves")
        self._size = size
        self._nodes = list(nodes)

    @property
    def size(self) -> int:
        """The number of leaves."""
        return self._size

    @property
    def nodes(self) -> tuple[bytes, ...]:
        """The hashes, the largest subtree first."""
        return tuple(self._nodes)

    def copy(self) -> Frontier:
        """An independent frontier of the same tree."""
        return Frontier(self._size, self._nodes)

    def extend(self, leaves: Iterable[bytes]) -> list[tuple[int, int, bytes]]:
        """Append leaf hashes; return the subtrees of height 8, 16, 24 ... that became complete.

        Each is ``(height / 8, index, hash)``: what a store keeps so that a proof needs few reads.
        """
        digest, nodes, size = sha256, self._nodes, self._size
        complete: list[tuple[int, int, bytes]] = []
        for leaf in leaves:
            node, rest, level = leaf, size, 0
            while rest & 1:
                node = digest(b"\1" + nodes.pop() + node).digest()
                rest >>= 1
                level += 1
                if not level & 7:
                    complete.append((level >> 3, rest, node))
            nodes.append(node)
            size += 1
        self._size = size
        return complete

    def root(self) -> bytes:
        """The tree's root."""
        if not self._nodes:
            return EMPTY_ROOT
        node = self._nodes[-1]
        for left in self._nodes[-2::-1]:
            node = node_hash(left, node)
        return node


class LeafHashes:
    """A `HashReader` over leaf hashes that are all in memory (small trees, tests, records)."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        self._leaves = leaves

    def node(self, level: int, index: int) -> bytes:
        """The root of one complete subtree."""
        row = list(self._leaves[index << level : (index + 1) << level])
        if len(row) != 1 << level:
            raise ValueError(f"subtree {level}/{index} is not complete")
        while len(row) > 1:
            row = [node_hash(row[i], row[i + 1]) for i in range(0, len(row), 2)]
        return row[0]


def subtree_root(start: int, stop: int, reader: HashReader) -> bytes:
    """The RFC 6962 hash over the leaves ``[start, stop)``, ``start`` being where the recursion can begin."""
    count = stop - start
    if count & (count - 1) == 0:
        return reader.node(count.bit_length() - 1, start >> (count.bit_length() - 1))
    split = start + _split(count)
    return node_hash(subtree_root(start, split, reader), subtree_root(split, stop, reader))


def tree_root(size: int, reader: HashReader) -> bytes:
    """The root of the first ``size`` leaves."""
    return EMPTY_ROOT if size == 0 else subtree_root(0, size, reader)


def _split(count: int) -> int:
    """The largest power of two below ``count`` (> 1)."""
    return 1 << ((count - 1).bit_length() - 1)


def prove_inclusion(index: int, size: int, reader: HashReader) -> list[bytes]:
    """The hashes beside the path from leaf ``index`` to the root of ``size`` leaves, the lowest first.

    Raises:
        ValueError: ``index`` is not below ``size``.
    """
    if not 0 <= index < size:
        raise ValueError(f"leaf {index} is not in a tree of {size}")
    proof: list[bytes] = []
    start, stop = 0, size
    while stop - start > 1:
        split = start + _split(stop - start)
        if index < split:
            proof.append(subtree_root(split, stop, reader))
            stop = split
        else:
            proof.append(subtree_root(start, split, reader))
            start = split
    return proof[::-1]


def check_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether ``leaf`` (a leaf hash) stands at ``index`` of the tree of ``size`` leaves with this ``root``."""
    if not 0 <= index < size or any(len(node) != HASH_BYTES for node in (leaf, root, *proof)):
        return False
    place, last, node = index, size - 1, leaf
    for beside in proof:
        if last == 0:
            return False
        if place & 1 or place == last:
            node = node_hash(beside, node)
            while place and not place & 1:
                place >>= 1
                last >>= 1
        else:
            node = node_hash(node, beside)
        place >>= 1
        last >>= 1
    return last == 0 and node == root


def prove_consistency(first: int, second: int, reader: HashReader) -> list[bytes]:
    """The hashes that show the tree of ``first`` leaves to be a prefix of the tree of ``second``.

    Empty where ``first`` is 0 or equals ``second``.

    Raises:
        ValueError: ``first`` is not in ``0 .. second``.
    """
    if not 0 <= first <= second:
        raise ValueError(f"a tree of {first} leaves is not a prefix of one of {second}")
    if first in (0, second):
        return []
    proof: list[bytes] = []
    start, stop, whole = 0, second, True
    while first != stop:
        split = start + _split(stop - start)
        if first <= split:
            proof.append(subtree_root(split, stop, reader))
            stop = split
        else:
            proof.append(subtree_root(start, split, reader))
            start, whole = split, False
    if not whole:
        proof.append(subtree_root(start, stop, reader))
    return proof[::-1]


def check_consistency(first: int, second: int, proof: Sequence[bytes], first_root: bytes, second_root: bytes) -> bool:
    """Whether the tree ``(first, first_root)`` is shown to be a prefix of ``(second, second_root)``."""
    if not 0 <= first <= second or any(len(node) != HASH_BYTES for node in (first_root, second_root, *proof)):
        return False
    if first == second:
        return not proof and first_root == second_root
    if first == 0:
        return not proof and first_root == EMPTY_ROOT
    path = list(proof)
    if first & (first - 1) == 0:
        path.insert(0, first_root)
    if not path:
        return False
    place, last = first - 1, second - 1
    while place & 1:
        place >>= 1
        last >>= 1
    old = new = path[0]
    for beside in path[1:]:
        if last == 0:
            return False
        if place & 1 or place == last:
            old, new = node_hash(beside, old), node_hash(beside, new)
            while place and not place & 1:
                place >>= 1
                last >>= 1
        else:
            new = node_hash(new, beside)
        place >>= 1
        last >>= 1
    return last == 0 and old == first_root and new == second_root
