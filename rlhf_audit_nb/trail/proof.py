"""The offline evidence file (C2SP tlog-proof, extension ``.tlog-proof``), and the proof checks. Floor 0.

::

    c2sp.org/tlog-proof@v1
    extra BASE64            (optional; authenticated by nothing)
    index N
    BASE64                  (the inclusion proof, one hash a line, the sibling of the leaf first)
                            (an empty line)
    the checkpoint, verbatim, with all its signatures

The entry is not in it: whoever verifies has it, hashes it, and checks origin, signature and inclusion.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.checkpoint import Checkpoint, checkpoint_of
from rlhf_audit_nb.trail.encoding import decode_base64, encode_base64, parse_size
from rlhf_audit_nb.trail.frame import MAX_NOTE
from rlhf_audit_nb.trail.merkle import HASH_BYTES, check_consistency, check_inclusion

__all__ = ["HEADER", "InclusionProof", "check_consistency", "check_inclusion", "format_proof", "parse_proof"]

HEADER = "c2sp.org/tlog-proof@v1"
_MAX_HASHES = 63


@dataclass(frozen=True)
class InclusionProof:
    """That an entry stands at ``index`` under ``checkpoint`` (a signed note); ``extra`` is authenticated by nothing."""

    index: int
    hashes: tuple[bytes, ...]
    checkpoint: str
    extra: bytes | None = None

    def head(self) -> Checkpoint:
        """The checkpoint, its signatures not verified."""
        return checkpoint_of(self.checkpoint)

    def check(self, leaf: bytes) -> bool:
        """Whether the leaf hash ``leaf`` is included; says nothing about the checkpoint's signatures."""
        head = self.head()
        return check_inclusion(leaf, self.index, head.size, self.hashes, head.root)


def format_proof(proof: InclusionProof) -> str:
    """The evidence file."""
    lines = [HEADER]
    if proof.extra is not None:
        lines.append("extra " + encode_base64(proof.extra))
    lines.append(f"index {proof.index}")
    lines += [encode_base64(node) for node in proof.hashes]
    return "\n".join(lines) + "\n\n" + proof.checkpoint


def parse_proof(data: bytes | str) -> InclusionProof:
    """The evidence file in ``data``, strictly; nothing in it is verified yet.

    Raises:
        FormatError: any part is not in its one form, or the index is not below the checkpoint's size.
    """
    head, checkpoint = _parts(data)
    lines = head.split("\n")
    if lines.pop(0) != HEADER:
        raise FormatError(f"A proof file does not begin with {HEADER}.", code="proof")
    extra = None
    if lines and lines[0].startswith("extra "):
        extra = decode_base64(lines.pop(0).removeprefix("extra "), "extra data of a proof")
    if not lines or not lines[0].startswith("index "):
        raise FormatError("A proof file has no index line.", code="proof")
    index = parse_size(lines.pop(0).removeprefix("index "), "index")
    hashes = tuple(decode_base64(line, "hash of a proof") for line in lines)
    if len(hashes) > _MAX_HASHES or any(len(node) != HASH_BYTES for node in hashes):
        raise FormatError("A proof file holds a hash that is not 32 bytes, or over 63 of them.", code="proof")
    if index >= checkpoint_of(checkpoint).size:
        raise FormatError(f"The index {index} of a proof is not below its checkpoint's size.", code="proof")
    return InclusionProof(index, hashes, checkpoint, extra)


def _parts(data: bytes | str) -> tuple[str, str]:
    try:
        raw = data.encode() if isinstance(data, str) else data
        text = raw.decode()
    except UnicodeError as error:
        raise FormatError(f"A proof file is not UTF-8: {error}.", code="proof") from error
    if len(raw) > 2 * MAX_NOTE:
        raise FormatError(f"A proof file of {len(raw)} bytes is too large.", code="proof")
    head, gap, checkpoint = text.partition("\n\n")
    if not gap:
        raise FormatError("A proof file has no empty line before its checkpoint.", code="proof")
    return head, checkpoint
