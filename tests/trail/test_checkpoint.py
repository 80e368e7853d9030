"""Checkpoints: one form, strictly, and what another implementation says of ours."""

from __future__ import annotations

import base64

import metamorphic_log
import pytest
from support.notes import CHECKPOINT, LEAVES, ORIGIN, SIGNED, VKEY

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.checkpoint import Checkpoint, checkpoint_of, parse_checkpoint
from rlhf_audit_nb.trail.merkle import EMPTY_ROOT, LeafHashes, prove_inclusion

ROOT = base64.b64encode(CHECKPOINT.root).decode()


def test_a_checkpoint_survives_parsing_and_formatting():
    assert checkpoint_of(SIGNED) == CHECKPOINT
    assert parse_checkpoint(CHECKPOINT.format()).format() == CHECKPOINT.format()


def test_another_implementation_accepts_our_checkpoint_and_its_proof():
    head = metamorphic_log.checkpoint_verify(SIGNED, [VKEY])
    assert (head.origin, head.size) == (ORIGIN, 10)
    proof = prove_inclusion(4, 10, LeafHashes(LEAVES))
    metamorphic_log.checkpoint_verify_inclusion(SIGNED, [VKEY], 4, LEAVES[4], proof)
    with pytest.raises(metamorphic_log.VerifyError):
        metamorphic_log.checkpoint_verify(SIGNED.replace("\n10\n", "\n11\n"), [VKEY])


BROKEN_CHECKPOINTS = {
    "a sign": f"{ORIGIN}\n+1\n{ROOT}\n",
    "an underscore": f"{ORIGIN}\n1_0\n{ROOT}\n",
    "a leading zero": f"{ORIGIN}\n010\n{ROOT}\n",
    "a space": f"{ORIGIN}\n 10\n{ROOT}\n",
    "a negative size": f"{ORIGIN}\n-1\n{ROOT}\n",
    "another script's digits": f"{ORIGIN}\n١٠\n{ROOT}\n",
    "a size of 2^63": f"{ORIGIN}\n{1 << 63}\n{ROOT}\n",
    "a root of 31 bytes": f"{ORIGIN}\n10\n{base64.b64encode(b'x' * 31).decode()}\n",
    "a root in hex": f"{ORIGIN}\n10\n{CHECKPOINT.root.hex()}\n",
    "no root": f"{ORIGIN}\n10\n",
    "no origin": f"\n10\n{ROOT}\n",
    "an empty extension": f"{ORIGIN}\n10\n{ROOT}\n\nx\n",
    "no newline": f"{ORIGIN}\n10\n{ROOT}",
    "size 0 with another root": f"{ORIGIN}\n0\n{ROOT}\n",
}


@pytest.mark.parametrize("name", BROKEN_CHECKPOINTS)
def test_a_broken_checkpoint_is_refused(name):
    with pytest.raises(FormatError):
        parse_checkpoint(BROKEN_CHECKPOINTS[name])


def test_the_largest_size_and_the_empty_tree_are_read():
    assert parse_checkpoint(f"{ORIGIN}\n{(1 << 63) - 1}\n{ROOT}\n").size == (1 << 63) - 1
    assert parse_checkpoint(Checkpoint(ORIGIN, 0, EMPTY_ROOT).format()).size == 0


def test_extensions_are_kept():
    text = CHECKPOINT.format() + "extension line\n"
    assert parse_checkpoint(text).extensions == ("extension line",)
    assert parse_checkpoint(text).format() == text
