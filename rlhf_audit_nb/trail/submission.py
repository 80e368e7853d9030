"""What a witness is asked: the body of add-checkpoint (C2SP tlog-witness v1.0.0), also as a file. Floor 0.

::

    old N
    BASE64            (the consistency proof from N to the checkpoint's size, one hash a line, at most 63)
                      (an empty line)
    the checkpoint, verbatim

The signed note is kept as it came; whether anybody signed it is for the witness to find out.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.checkpoint import checkpoint_of, parse_size
from rlhf_audit_nb.trail.merkle import HASH_BYTES
from rlhf_audit_nb.trail.note import Note, decode_base64, parse_note

__all__ = ["MAX_SUBMISSION", "Submission", "format_submission", "parse_submission", "submission_of"]

# A note of 16 ML-DSA-44 signatures is 55 kB; proofs add 3 kB.
MAX_SUBMISSION = 256 << 10
_MAX_HASHES = 63


@dataclass(frozen=True)
class Submission:
    """A checkpoint and the proof that it continues the head of size ``old``; nothing in it is verified."""

    old: int
    proof: tuple[bytes, ...]
    note: Note


def submission_of(note: str, old: int, prove: Callable[[int, int], Sequence[bytes]]) -> Submission:
    """The request to cosign ``note`` for a witness that has last cosigned size ``old``.

    Args:
        note: the signed checkpoint.
        old: the witness's size, 0 where it has seen nothing.
        prove: gives the consistency proof between two sizes.

    Raises:
        FormatError: ``old`` is larger than the checkpoint.
    """
    size = checkpoint_of(note).size
    if not 0 <= old <= size:
        raise FormatError(f"A checkpoint of {size} entries cannot continue one of {old}.", code="submission")
    proof = prove(old, size) if 0 < old < size else ()
    return Submission(old, tuple(proof), parse_note(note))


def format_submission(submission: Submission) -> bytes:
    """The body."""
    lines = [f"old {submission.old}", *(base64.b64encode(node).decode() for node in submission.proof)]
    return ("\n".join(lines) + "\n\n" + submission.note.format()).encode()


def parse_submission(data: bytes) -> Submission:
    """The submission in ``data``, strictly in its form.

    Raises:
        FormatError: any part is not in its one form.
    """
    if len(data) > MAX_SUBMISSION:
        raise _malformed(f"it has {len(data)} bytes; at most {MAX_SUBMISSION} are read")
    try:
        head, gap, note = data.decode().partition("\n\n")
    except UnicodeDecodeError as error:
        raise _malformed(f"it is not UTF-8: {error}") from error
    if not gap:
        raise _malformed("it has no empty line before its checkpoint")
    first, *rest = head.split("\n")
    if not first.startswith("old "):
        raise _malformed("it does not begin with an old size")
    if len(rest) > _MAX_HASHES:
        raise _malformed(f"it has over {_MAX_HASHES} proof lines")
    proof = tuple(decode_base64(line, "hash of a consistency proof") for line in rest)
    if any(len(node) != HASH_BYTES for node in proof):
        raise _malformed("a hash of its proof is not 32 bytes")
    return Submission(parse_size(first.removeprefix("old "), "old size"), proof, parse_note(note))


def _malformed(what: str) -> FormatError:
    return FormatError(f"The request to a witness is malformed: {what}.", code="submission")
