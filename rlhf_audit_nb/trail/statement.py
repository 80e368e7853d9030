r"""What a cosignature says, byte for byte (C2SP tlog-cosignature v1.1.0). Floor 0.

A cosignature is a note signature over a *checkpoint*. Its bytes are ::

    time (8 bytes, big-endian, POSIX seconds, below 2^63) || signature

and what is signed differs by the kind of key:

* Ed25519 (type 0x04): ``cosignature/v1\ntime SECONDS\n`` and the note's whole text. The cosigner's name is not in it,
  so a key must not serve two cosigners.
* ML-DSA-44 (type 0x06; FIPS 204 with an empty context), which stands against quantum computers::

      "subtree/v1\n\0" || len8 cosigner's name || time (8) || len8 origin || start (8) || end (8) || root (32)

  with start 0 and end the checkpoint's size; extension lines are not covered. Time 0 is allowed and claims nothing
  beyond consistency: not that the tree was the largest that the cosigner had seen.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from rlhf_audit_nb.errors import FormatError

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.checkpoint import Checkpoint

__all__ = ["ed25519_message", "format_timestamped", "mldsa44_message", "parse_timestamped"]

_MAX_TIME = (1 << 63) - 1
_MAX_NAME = 255
_TIME_BYTES = 8
_LABEL = b"subtree/v1\n\0"


def format_timestamped(when: int, signature: bytes) -> bytes:
    """The bytes of a signature line: the time (from 0, below 2^63) and the signature."""
    return struct.pack(">Q", _check_time(when)) + signature


def parse_timestamped(data: bytes, length: int) -> tuple[int, bytes]:
    """Time and signature in a signature line's bytes.

    Raises:
        FormatError: ``cosignature`` where the signature is not of ``length`` bytes or the time not below 2^63.
    """
    if len(data) != _TIME_BYTES + length:
        raise FormatError(f"A cosignature has {len(data)} bytes, not {_TIME_BYTES + length}.", code="cosignature")
    (when,) = struct.unpack_from(">Q", data)
    return _check_time(when), data[_TIME_BYTES:]


def ed25519_message(text: str, when: int) -> bytes:
    """What an Ed25519 cosigner signs of a note with this text."""
    return b"cosignature/v1\ntime %d\n%b" % (_check_time(when), text.encode())


def mldsa44_message(cosigner: str, checkpoint: Checkpoint, when: int) -> bytes:
    """What the ML-DSA-44 cosigner of this name signs of a checkpoint.

    Raises:
        FormatError: ``cosignature`` where a name is over 255 bytes, which this format cannot write.
    """
    message = _LABEL + _short(cosigner) + struct.pack(">Q", _check_time(when)) + _short(checkpoint.origin)
    return message + struct.pack(">QQ", 0, checkpoint.size) + checkpoint.root


def _short(name: str) -> bytes:
    raw = name.encode()
    if not 0 < len(raw) <= _MAX_NAME:
        raise FormatError(f"An ML-DSA cosignature cannot name {name[:60]!r}: over 255 bytes.", code="cosignature")
    return bytes([len(raw)]) + raw


def _check_time(when: int) -> int:
    if not 0 <= when <= _MAX_TIME:
        raise FormatError(f"A cosignature cannot be made at time {when}.", code="cosignature")
    return when
