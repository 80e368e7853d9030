"""PNG, smaller: a drawing of few colours stored with a palette. Floor 6.

A panel's picture has some hundred colours, but comes as 8-bit RGBA, fast and large; a notebook that holds many runs
should not grow by half a megabyte with each. `shrink` keeps the 256 most frequent colours, gives each other pixel (all
of them shades at the edges of letters) the nearest of these, and compresses well. Format: W3C PNG (third edition).
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

from rlhf_audit_nb.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

__all__ = ["shrink"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGBA = (8, 6, 0, 0, 0)  # bit depth, colour type, compression, filter method, interlace
_INDEXED = (8, 3, 0, 0, 0)
_COLORS = 256
_SUB, _UP = 1, 2


def shrink(png: bytes) -> bytes:
    """The same picture with a palette.

    Args:
        png: an 8-bit RGBA picture whose rows are filtered by None, Sub or Up.

    Raises:
        FormatError: it is no such picture.
    """
    chunks = list(_chunks(png))
    width, height, *kind = struct.unpack(">IIBBBBB", chunks[0][1])
    if tuple(kind) != _RGBA:
        raise FormatError("The picture is not 8-bit RGBA.", code="png")
    rows = _unfilter(zlib.decompress(b"".join(data for name, data in chunks if name == b"IDAT")), width, height)
    colors, indices = np.unique(rows.reshape(-1, 4).view("<u4").ravel(), return_inverse=True)
    keep, index = _palette(colors, np.bincount(indices))
    lines = np.zeros((height, width + 1), np.uint8)
    lines[:, 1:] = index[indices].reshape(height, width)
    palette = keep.astype("<u4").view(np.uint8).reshape(-1, 4)
    return b"".join(
        [
            _SIGNATURE,
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, *_INDEXED)),
            *(_chunk(name, data) for name, data in chunks if name == b"pHYs"),
            _chunk(b"PLTE", palette[:, :3].tobytes()),
            _chunk(b"tRNS", palette[:, 3].tobytes()),
            _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
            _chunk(b"IEND", b""),
        ]
    )


def _palette(colors: NDArray[np.uint32], counts: NDArray[np.int64]) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """The colours to keep (ascending), and for every colour the position of its nearest kept one."""
    order = np.lexsort((colors, -counts))[:_COLORS]
    keep = np.sort(colors[order])
    kept = keep.astype("<u4").view(np.uint8).reshape(-1, 4).astype(np.int32)
    every = colors.astype("<u4").view(np.uint8).reshape(-1, 4).astype(np.int32)
    index = np.empty(len(colors), np.uint8)
    for start in range(0, len(colors), 1024):  # bounds the memory of the table of distances
        part = every[start : start + 1024]
        index[start : start + 1024] = np.abs(part[:, None, :] - kept[None]).sum(axis=2).argmin(axis=1)
    return keep, index


def _unfilter(data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    """Pixels of shape (height, width, 4)."""
    lines = np.frombuffer(data, np.uint8).reshape(height, 1 + 4 * width)
    pixels = lines[:, 1:].reshape(height, width, 4).copy()
    for row in range(height):
        kind = lines[row, 0]
        if kind == _SUB:
            pixels[row] = np.cumsum(pixels[row], axis=0, dtype=np.uint8)
        elif kind == _UP and row:
            pixels[row] += pixels[row - 1]
        elif kind > _UP:
            raise FormatError(f"A row of the picture has filter {kind}, which is not read here.", code="png")
    return pixels


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    if png[:8] != _SIGNATURE:
        raise FormatError("The picture is not a PNG.", code="png")
    at = len(_SIGNATURE)
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        yield png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        at += 12 + length


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
