"""The commitment to a private payload, and the opening that shows it. Floor 0.

The trail holds ``HMAC-SHA256(key, message)`` under a fresh 32-byte key, where the message is ::

    "rlhf-audit/commitment/v1" 00 || u32 len(type) || type || u32 len(stream) || stream || u64 seq
    || u32 len(payload) || payload || zeros up to the length bucket (256, 512, 1024, ... bytes)

(numbers big-endian). Key and payload are the *opening*. A commitment tells nothing of the payload, not even its length,
and binds it to its place in the trail; its key opens no other one.
"""

from __future__ import annotations

import hmac
import struct
from functools import lru_cache

import msgspec

__all__ = ["KEY_BYTES", "Opening", "check_opening", "commitment_of", "place_of"]

KEY_BYTES = 32

_DOMAIN = b"rlhf-audit/commitment/v1\0"
_LEAST_BUCKET = 256


class Opening(msgspec.Struct, frozen=True):
    """What shows a commitment's content: the 32-byte key and the payload."""

    key: bytes
    payload: bytes


def _bucket(length: int) -> int:
    return max(_LEAST_BUCKET, 1 << (length - 1).bit_length()) if length else _LEAST_BUCKET


@lru_cache(maxsize=1024)
def _place_head(kind: str, stream: str) -> bytes:
    kind_bytes, stream_bytes = kind.encode(), stream.encode()
    return struct.pack(">I", len(kind_bytes)) + kind_bytes + struct.pack(">I", len(stream_bytes)) + stream_bytes


_u32 = struct.Struct(">I").pack
_u64 = struct.Struct(">Q").pack


def place_of(kind: str, stream: str, seq: int) -> bytes:
    """The part of the message that says where the commitment stands."""
    return _place_head(kind, stream) + _u64(seq)


def commitment_of(kind: str, stream: str, seq: int, opening: Opening) -> bytes:
    """The 32-byte commitment to ``opening`` as the private half of the entry at that place."""
    payload = opening.payload
    padded = payload.ljust(_bucket(len(payload)), b"\0")
    message = b"".join((_DOMAIN, _place_head(kind, stream), _u64(seq), _u32(len(payload)), padded))
    return hmac.digest(opening.key, message, "sha256")


def check_opening(commitment: bytes, kind: str, stream: str, seq: int, opening: Opening) -> bool:
    """Whether ``opening`` opens ``commitment`` at that place."""
    return len(opening.key) == KEY_BYTES and hmac.compare_digest(commitment_of(kind, stream, seq, opening), commitment)
