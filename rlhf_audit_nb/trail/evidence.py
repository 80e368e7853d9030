"""Evidence: whether two signed heads of one log contradict each other. Floor 0.

Two heads of one size with two roots, both signed by the log, need nothing else: the log has shown two histories. For
two sizes it takes the trail: a consistency proof shows which root the larger head has at the smaller size, and that
root is compared. The proof is checked against the signed heads, so whoever keeps the trail cannot make a contradiction
up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.checkpoint import Checkpoint, parse_checkpoint
from rlhf_audit_nb.trail.merkle import check_consistency
from rlhf_audit_nb.trail.note import Verifier, parse_note, verify_note

__all__ = ["Finding", "Outcome", "Tree", "compare_heads", "signed_head"]


class Outcome(Enum):
    """What is known of two heads."""

    CONTRADICTORY = "contradictory"
    CONSISTENT = "consistent"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Finding:
    """What is known of two heads, and why."""

    outcome: Outcome
    message: str


class Tree(Protocol):
    """A history at hand: what a `TrailReader` is."""

    @property
    def size(self) -> int:
        """How many entries there are."""

    def root(self, size: int) -> bytes:
        """The root over the first ``size``."""

    def consistency_proof(self, first: int, second: int) -> Sequence[bytes]:
        """The proof between two sizes."""


def signed_head(note: bytes | str, logs: Callable[[Checkpoint], Sequence[Verifier]]) -> Checkpoint:
    """The head in a note that is signed by one of the keys that ``logs`` names for it.

    Raises:
        FormatError: it is no signed checkpoint, or none of these keys has signed it: then it is evidence of nothing.
    """
    parsed = parse_note(note)
    head = parse_checkpoint(parsed.text)
    keys = [key for key in logs(head) if key.name == head.origin]
    if not keys:
        raise FormatError(f"No key of {head.origin} is known, so nothing shows who signed.", code="untrusted-log")
    verify_note(parsed, keys)
    return head


def compare_heads(first: Checkpoint, second: Checkpoint, tree: Tree | None = None) -> Finding:
    """Whether two heads, both signed by their log, can be of one history.

    Args:
        first: one head.
        second: the other one.
        tree: the history that one of them is of, where it is at hand.

    Raises:
        FormatError: they are of two logs.
    """
    if first.origin != second.origin:
        raise FormatError(f"One head is of {first.origin}, the other of {second.origin}.", code="origin")
    small, large = sorted((first, second), key=lambda head: head.size)
    if small.size == large.size:
        if small.root == large.root:
            return Finding(Outcome.CONSISTENT, f"Both say the same of {small.size} entries.")
        message = f"The key of {first.origin} has signed two roots of size {small.size}: it has shown two histories."
        return Finding(Outcome.CONTRADICTORY, message)
    if small.size == 0:
        return Finding(Outcome.CONSISTENT, "An empty trail goes before any other.")
    if tree is None or tree.size < large.size:
        what = "without the trail" if tree is None else f"with a trail of {tree.size} entries"
        return Finding(
            Outcome.UNDECIDED, f"Whether size {large.size} continues size {small.size} cannot be told {what}."
        )
    return _with_tree(small, large, tree)


def _with_tree(small: Checkpoint, large: Checkpoint, tree: Tree) -> Finding:
    proof, root = tree.consistency_proof(small.size, large.size), tree.root(small.size)
    if not check_consistency(small.size, large.size, proof, root, large.root):
        message = f"The head of size {large.size} is not of this trail, so the trail cannot tell what came before it."
        return Finding(Outcome.UNDECIDED, message)
    if root == small.root:
        return Finding(Outcome.CONSISTENT, f"Size {large.size} continues size {small.size}: a proof connects them.")
    message = (
        f"The key of {large.origin} has signed size {large.size}, whose first {small.size} entries have another root "
        f"than the one that it has signed for size {small.size}: it has shown two histories."
    )
    return Finding(Outcome.CONTRADICTORY, message)
