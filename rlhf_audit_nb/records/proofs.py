"""Inclusion proofs of many entries of one trail, at the price of a few. Floor 3.

Entries of a record stand close together. For a stretch ``[first, last]`` of a tree (RFC 6962) every hash that the
proofs of its entries need is inside the stretch, or is a sibling on the path of ``first`` or of ``last``, or is made of
such hashes. So two proofs are asked of the store and the rest is hashed from the entries themselves; small gaps between
the wanted entries are read along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_audit_nb.trail.merkle import leaf_hash, node_hash

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rlhf_audit_nb.trail import TrailReader

__all__ = ["prove_all"]

# Entries that may lie between two wanted ones of a stretch: reading them costs about as much as two proofs.
GAP = 1024


def _stretches(indices: Sequence[int]) -> Iterable[tuple[int, int]]:
    first = last = indices[0]
    for index in indices[1:]:
        if index - last > GAP:
            yield first, last
            first = index
        last = index
    yield first, last


def _siblings(index: int, size: int) -> list[tuple[int, int]]:
    """The stretches ``[start, stop)`` whose hashes are the inclusion proof of ``index``, the leaf's sibling first."""
    start, stop, found = 0, size, []
    while stop - start > 1:
        middle = start + (1 << (stop - start - 1).bit_length() - 1)
        if index < middle:
            found.append((middle, stop))
            stop = middle
        else:
            found.append((start, middle))
            start = middle
    return found[::-1]


def _hash(known: dict[tuple[int, int], bytes], start: int, stop: int) -> bytes:
    if (start, stop) not in known:
        middle = start + (1 << (stop - start - 1).bit_length() - 1)
        known[start, stop] = node_hash(_hash(known, start, middle), _hash(known, middle, stop))
    return known[start, stop]


def prove_all(reader: TrailReader, indices: Sequence[int]) -> list[tuple[bytes, ...]]:
    """The inclusion proofs of the entries at ``indices`` (ascending) in the whole tree of ``reader``."""
    known: dict[tuple[int, int], bytes] = {}
    for first, last in _stretches(indices) if indices else ():
        for entry in reader.entries(first, last + 1):
            known[entry.index, entry.index + 1] = leaf_hash(entry.data)
        for end in (first, last):
            known.update(zip(_siblings(end, reader.size), reader.inclusion_proof(end), strict=True))
    return [tuple(_hash(known, *sibling) for sibling in _siblings(index, reader.size)) for index in indices]
