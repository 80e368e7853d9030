"""The offline evidence file."""

from __future__ import annotations

import base64

import pytest
from support.notes import CHECKPOINT, LEAVES, LOG_MLDSA, SIGNED

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.merkle import LeafHashes, prove_inclusion
from rlhf_audit_nb.trail.note import parse_note
from rlhf_audit_nb.trail.proof import InclusionProof, format_proof, parse_proof

ROOT = base64.b64encode(CHECKPOINT.root).decode()
PROOF = InclusionProof(4, tuple(prove_inclusion(4, 10, LeafHashes(LEAVES))), SIGNED)


def test_a_proof_file_survives_and_proves():
    endorsed = parse_note(SIGNED).plus(LOG_MLDSA.sign_line(CHECKPOINT.format())).format()
    for proof in (
        PROOF,
        InclusionProof(PROOF.index, PROOF.hashes, SIGNED, b"extra bytes"),
        InclusionProof(PROOF.index, PROOF.hashes, SIGNED, b""),
        InclusionProof(PROOF.index, PROOF.hashes, endorsed),
    ):
        assert parse_proof(format_proof(proof)) == proof
        assert parse_proof(format_proof(proof).encode()).check(LEAVES[4])
    assert not PROOF.check(LEAVES[5])
    assert not InclusionProof(5, PROOF.hashes, SIGNED).check(LEAVES[4])


TEXT = format_proof(PROOF)


@pytest.mark.parametrize(
    "broken",
    [
        TEXT.replace("@v1", "@v2"),
        TEXT.replace("index 4", "index 04"),
        TEXT.replace("index 4", "index 10"),
        TEXT.replace("index 4", "extra\nindex 4"),
        TEXT.replace("index 4", "extra AA==\nextra AA==\nindex 4"),
        TEXT.replace("index 4", "index 4\nextra AA=="),
        TEXT.replace("index 4\n", ""),
        TEXT.replace("\n\n", "\n"),
        TEXT.replace("=\n", "\n", 1),
        TEXT.replace("\n", "\r\n"),
        TEXT[:-1],
        TEXT.replace("index 4\n", "index 4\n" + "\n".join([ROOT] * 64) + "\n"),
        TEXT.replace("index 4\n", "index 4\n" + base64.b64encode(b"x" * 31).decode() + "\n"),
        "",
    ],
)
def test_a_broken_proof_file_is_refused(broken):
    with pytest.raises(FormatError):
        parse_proof(broken)
