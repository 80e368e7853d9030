"""Evidence: two signed heads contradict each other, or not, or nobody can tell; nothing is made up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.witnesses import Log, tree

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.evidence import Outcome, compare_heads, signed_head
from rlhf_audit_nb.trail.note import parse_vkey

LOG = Log("example.com/log").grow(60)


class Tree:
    """A trail at hand."""

    def __init__(self, log: Log) -> None:
        self.log = log

    @property
    def size(self) -> int:
        return len(self.log.leaves)

    def root(self, size: int) -> bytes:
        return tree(self.log.leaves[:size])

    def consistency_proof(self, first: int, second: int) -> list[bytes]:
        return self.log.proof(first, second)


def seen(note: str, log: Log = LOG):
    return signed_head(note, lambda _: [parse_vkey(log.vkey)])


def outcome(first: str, second: str, at_hand: Log | None = None) -> Outcome:
    one, other = seen(first), seen(second)
    there = None if at_hand is None else Tree(at_hand)
    found = compare_heads(one, other, there)
    assert compare_heads(other, one, there) == found
    return found.outcome


def test_two_roots_of_one_size_contradict_each_other_without_the_trail():
    assert outcome(LOG.head(9), LOG.forked(3).head(9)) is Outcome.CONTRADICTORY
    assert outcome(LOG.head(9), LOG.head(9)) is Outcome.CONSISTENT
    assert outcome(LOG.head(0), LOG.head(9)) is Outcome.CONSISTENT


def test_two_sizes_need_the_trail():
    fork = LOG.forked(3)
    assert outcome(LOG.head(9), fork.head(20)) is Outcome.UNDECIDED
    assert outcome(LOG.head(9), LOG.head(20)) is Outcome.UNDECIDED
    assert outcome(LOG.head(9), LOG.head(20), LOG) is Outcome.CONSISTENT
    assert outcome(LOG.head(9), fork.head(20), fork) is Outcome.CONTRADICTORY
    assert outcome(fork.head(9), LOG.head(20), LOG) is Outcome.CONTRADICTORY


def test_a_trail_that_neither_is_of_and_a_shorter_one_decide_nothing():
    fork = LOG.forked(3)
    assert outcome(LOG.head(9), LOG.head(20), fork) is Outcome.UNDECIDED
    assert outcome(LOG.head(9), fork.head(20), LOG) is Outcome.UNDECIDED
    assert outcome(LOG.head(9), LOG.head(20), Log(LOG.origin, LOG.leaves[:19], LOG.key)) is Outcome.UNDECIDED


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_with_the_larger_ones_trail_the_answer_is_the_truth(first, second, parted):
    small, large = sorted((first, second))
    fork = LOG.forked(parted)
    truth = tree(LOG.leaves[:small]) == tree(fork.leaves[:small])
    expected = Outcome.CONSISTENT if truth else Outcome.CONTRADICTORY
    assert outcome(LOG.head(small), fork.head(large), fork) is expected


class Liar(Tree):
    """A trail at hand whose keeper wants heads to seem to contradict each other."""

    def root(self, size: int) -> bytes:
        return b"\7" * 32

    def consistency_proof(self, first: int, second: int) -> list[bytes]:
        return [b"\7" * 32] * len(super().consistency_proof(first, second))


def test_a_keeper_of_the_trail_cannot_make_a_contradiction_up():
    for first in range(1, 20):
        found = compare_heads(seen(LOG.head(first)), seen(LOG.head(20)), Liar(LOG))
        assert found.outcome is Outcome.UNDECIDED


def test_what_the_log_has_not_signed_is_evidence_of_nothing():
    forged = Log(LOG.origin, list(LOG.leaves)).forked(3)
    with pytest.raises(FormatError):
        seen(forged.head(9))
    with pytest.raises(FormatError):
        seen(LOG.head(9).replace("\n9\n", "\n8\n"))
    with pytest.raises(FormatError) as caught:
        signed_head(LOG.head(9), lambda _: [])
    assert caught.value.reason == "untrusted-log"


def test_heads_of_two_logs_are_not_compared():
    other = Log("example.com/other").grow(9)
    with pytest.raises(FormatError) as caught:
        compare_heads(seen(LOG.head(9)), seen(other.head(), other))
    assert caught.value.reason == "origin"
