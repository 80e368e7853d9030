"""The checkpoint: a signed tree head (C2SP tlog-checkpoint v1.0.0). Floor 0.

The text of a signed note whose lines are the origin, the size in decimal without leading zeros, the base64 of the
32-byte root, and optional extension lines, which are kept and never written here. It holds no time: time comes from
cosignatures and timestamps.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.encoding import check_name, decode_base64, encode_base64, parse_size
from rlhf_audit_nb.trail.frame import parse_note
from rlhf_audit_nb.trail.merkle import EMPTY_ROOT, HASH_BYTES

__all__ = ["Checkpoint", "checkpoint_of", "parse_checkpoint", "parse_size"]

_LEAST_LINES = 3


@dataclass(frozen=True)
class Checkpoint:
    """What a signed tree head says: the log's name, how many entries, and the root over them (32 bytes)."""

    origin: str
    size: int
    root: bytes
    extensions: tuple[str, ...] = ()

    def format(self) -> str:
        """The text that is signed."""
        head = f"{self.origin}\n{self.size}\n{self.root_base64}\n"
        return head + "".join(line + "\n" for line in self.extensions)

    @property
    def root_base64(self) -> str:
        """The root as it is written."""
        return encode_base64(self.root)


def parse_checkpoint(text: str) -> Checkpoint:
    """The checkpoint in a note's text.

    Raises:
        FormatError: fewer than three lines, an empty line, or an origin, size or root that is not in its one form.
    """
    if not text.endswith("\n"):
        raise FormatError("A checkpoint does not end in a newline.", code="checkpoint")
    lines = text[:-1].split("\n")
    if len(lines) < _LEAST_LINES or not all(lines):
        raise FormatError("A checkpoint has fewer than three lines, or an empty one.", code="checkpoint")
    origin, size, root = (
        check_name(lines[0], "origin"),
        parse_size(lines[1], "tree size"),
        decode_base64(lines[2], "root"),
    )
    if len(root) != HASH_BYTES:
        raise FormatError(f"The root of a checkpoint has {len(root)} bytes, not 32.", code="checkpoint")
    if size == 0 and root != EMPTY_ROOT:
        raise FormatError("A checkpoint of size 0 does not have the empty tree's root.", code="checkpoint")
    return Checkpoint(origin, size, root, tuple(lines[3:]))


def checkpoint_of(note: bytes | str) -> Checkpoint:
    """The checkpoint in a signed note, whose signatures are *not* verified here."""
    return parse_checkpoint(parse_note(note).text)
