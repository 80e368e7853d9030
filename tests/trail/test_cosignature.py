"""Cosignatures: the bytes that are signed, and what another implementation makes of them."""

from __future__ import annotations

import struct
import time

import metamorphic_log
import pytest
from cryptography.exceptions import InvalidSignature
from hypothesis import given, settings
from hypothesis import strategies as st
from support.notes import CHECKPOINT, LOG, LOG_MLDSA, ORIGIN, SIGNED, VKEY, WHEN, WITNESSES, key
from witness_log import WitnessService

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.checkpoint import Checkpoint
from rlhf_audit_nb.trail.cosignature import CosignerEd25519, CosignerMLDSA44
from rlhf_audit_nb.trail.encoding import encode_base64
from rlhf_audit_nb.trail.merkle import LeafHashes, leaf_hash, prove_consistency, tree_root
from rlhf_audit_nb.trail.note import (
    Note,
    Signer,
    cosign_note,
    parse_note,
    parse_vkey,
    sign_note,
    verify_note,
)
from rlhf_audit_nb.trail.statement import ed25519_message, format_timestamped, mldsa44_message, parse_timestamped

NOTE = parse_note(SIGNED)
ED25519, MLDSA44 = WITNESSES[0], WITNESSES[3]
COSIGNERS = {"ed25519": ED25519, "mldsa44": MLDSA44}


def test_what_an_ed25519_cosigner_signs_is_the_specifications_text():
    """The example of the specification, written out."""
    text = "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"
    assert ed25519_message(text, 1679315147) == b"cosignature/v1\ntime 1679315147\n" + text.encode()
    line = ED25519.cosign(Note(text, ()), 1679315147)
    when, signature = parse_timestamped(line.data, 64)
    assert (when, len(line.key_id + line.data)) == (1679315147, 76)
    ED25519.key.public_key().verify(signature, b"cosignature/v1\ntime 1679315147\n" + text.encode())


def test_what_an_mldsa_cosigner_signs_is_the_specifications_structure():
    """Each field by hand; the library verifies the signature over these bytes, not over ours."""
    name = MLDSA44.name.encode()
    by_hand = (
        b"subtree/v1\n\0"
        + bytes([len(name)])
        + name
        + struct.pack(">Q", WHEN)
        + bytes([len(ORIGIN)])
        + ORIGIN.encode()
        + bytes(8)
        + struct.pack(">Q", 10)
        + CHECKPOINT.root
    )
    assert mldsa44_message(MLDSA44.name, CHECKPOINT, WHEN) == by_hand
    data = MLDSA44.cosign(NOTE, WHEN).data
    assert data[:8] == struct.pack(">Q", WHEN)
    assert len(data) == 8 + 2420
    MLDSA44.key.public_key().verify(data[8:], by_hand)
    with pytest.raises(InvalidSignature):
        MLDSA44.key.public_key().verify(data[8:], by_hand, b"a context")


@pytest.mark.parametrize("kind", COSIGNERS)
def test_a_cosignature_holds_and_says_its_time(kind):
    cosigner = COSIGNERS[kind]
    note = parse_note(NOTE.plus(cosigner.cosign(NOTE, WHEN)).format())
    assert [item.time for item in verify_note(note, [LOG.verifier(), cosigner.verifier()])] == [0, WHEN]
    before = int(time.time())
    (now,) = verify_note(parse_note(sign_note(NOTE.text, [cosigner])), [cosigner.verifier()])
    assert before <= now.time <= time.time()


@pytest.mark.parametrize("kind", COSIGNERS)
def test_a_cosignature_covers_its_time(kind):
    cosigner = COSIGNERS[kind]
    line = cosigner.cosign(NOTE, WHEN)
    for other in (WHEN - 1, WHEN + 1, 0, (1 << 63) - 1):
        assert cosigner.verifier().check(NOTE.text, format_timestamped(other, line.data[8:])) is None
    assert cosigner.verifier().check(NOTE.text, (1 << 63).to_bytes(8, "big") + line.data[8:]) is None


@pytest.mark.parametrize("kind", COSIGNERS)
@pytest.mark.parametrize("when", [0, -1, 1 << 63, 1 << 64])
def test_a_cosigner_signs_no_time_that_cannot_be(kind, when):
    with pytest.raises(FormatError) as caught:
        COSIGNERS[kind].cosign(NOTE, when)
    assert caught.value.reason == "cosignature"


@pytest.mark.parametrize("kind", COSIGNERS)
def test_a_cosigner_signs_the_first_and_the_last_second(kind):
    for when in (1, (1 << 63) - 1):
        line = COSIGNERS[kind].cosign(NOTE, when)
        assert COSIGNERS[kind].verifier().check(NOTE.text, line.data) == when


def test_time_zero_claims_consistency_alone_and_only_mldsa_can_say_it():
    message = mldsa44_message(MLDSA44.name, CHECKPOINT, 0)
    assert MLDSA44.verifier().check(NOTE.text, format_timestamped(0, MLDSA44.key.sign(message))) == 0
    signed = ED25519.key.sign(ed25519_message(NOTE.text, 0))
    assert ED25519.verifier().check(NOTE.text, format_timestamped(0, signed)) is None


def test_an_mldsa_cosignature_covers_the_cosigners_name_and_an_ed25519_one_does_not():
    twin = CosignerMLDSA44("another.example", MLDSA44.key)
    assert twin.verifier().check(NOTE.text, MLDSA44.cosign(NOTE, WHEN).data) is None
    twin_ed25519 = CosignerEd25519("another.example", ED25519.key)
    assert twin_ed25519.verifier().check(NOTE.text, ED25519.cosign(NOTE, WHEN).data) == WHEN


def test_extension_lines_are_covered_by_ed25519_and_not_by_mldsa():
    extended = NOTE.text + "an extension\n"
    assert ED25519.verifier().check(extended, ED25519.cosign(NOTE, WHEN).data) is None
    assert MLDSA44.verifier().check(extended, MLDSA44.cosign(NOTE, WHEN).data) == WHEN


def test_only_a_checkpoint_can_be_cosigned_by_mldsa():
    with pytest.raises(FormatError):
        MLDSA44.cosign(Note("no checkpoint\n", ()), WHEN)
    assert MLDSA44.verifier().check("no checkpoint\n", MLDSA44.cosign(NOTE, WHEN).data) is None


def test_an_origin_that_the_structure_cannot_hold_is_refused():
    for origin, holds in (("x" * 255, True), ("x" * 256, False), ("é" * 128, False)):
        checkpoint = Checkpoint(origin, 10, CHECKPOINT.root)
        if holds:
            assert MLDSA44.cosign(Note(checkpoint.format(), ()), WHEN).data
            continue
        with pytest.raises(FormatError, match="255 bytes"):
            MLDSA44.cosign(Note(checkpoint.format(), ()), WHEN)


def test_a_log_signs_a_second_time_against_quantum_computers():
    note = parse_note(sign_note(CHECKPOINT.format(), [LOG, LOG_MLDSA]))
    plain, second = verify_note(note, [LOG.verifier(), LOG_MLDSA.verifier()])
    assert (plain.time, second.verifier.name) == (0, ORIGIN)
    assert verify_note(note, [LOG_MLDSA.verifier()])
    assert metamorphic_log.verify_signed_note(note.format(), [VKEY]) == 1


def test_a_signature_of_one_type_is_none_of_another():
    """The key id differs by type, and so do the signed bytes: a plain signature never stands for a cosignature."""
    plain = LOG.sign_line(NOTE.text)
    same_key = CosignerEd25519(ORIGIN, LOG.key)
    assert same_key.verifier().key_id != plain.key_id
    assert same_key.verifier().check(NOTE.text, format_timestamped(WHEN, plain.data)) is None
    assert LOG.verifier().check(NOTE.text, same_key.cosign(NOTE, WHEN).data[8:]) is None


def test_a_note_is_cosigned_with_a_signers_key():
    signer = Signer("witness.example/plain", key(7))
    note = cosign_note(NOTE, signer, WHEN)
    assert note.signatures[:-1] == NOTE.signatures
    cosigner = CosignerEd25519(signer.name, signer.key)
    assert [item.time for item in verify_note(note, [cosigner.verifier()])] == [WHEN]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100), st.integers(0, 80))
def test_the_bytes_of_a_cosignature_are_read_in_one_form_or_refused(data, length):
    try:
        when, signature = parse_timestamped(data, length)
    except FormatError:
        assert len(data) != 8 + length or data[0] >= 0x80
        return
    assert len(signature) == length
    assert format_timestamped(when, signature) == data


def test_the_witness_of_another_implementation_signs_what_we_verify_and_refuses_what_we_refuse():
    """Its cosignatures over our checkpoints hold for our verifier at the time that it says, from 0 to 255 to 257."""
    service = WitnessService.new("witness.example/w1", b"w" * 32)
    assert service.add_log(ORIGIN, VKEY)
    leaves = [leaf_hash(b"entry-%d" % number) for number in range(257)]
    reader = LeafHashes(leaves)
    old = 0
    for size in (255, 257):
        note = sign_note(Checkpoint(ORIGIN, size, tree_root(size, reader)).format(), [LOG])
        proof = [encode_base64(node) + "\n" for node in prove_consistency(old, size, reader)]
        status, answer = service.handle_add_checkpoint(f"old {old}\n{''.join(proof)}\n{note}", WHEN + size)
        assert status == 200, answer
        (verified,) = verify_note(parse_note(note + answer), [parse_vkey(service.vkey())])
        assert verified.time == WHEN + size
        old = size
    forged = sign_note(Checkpoint(ORIGIN, 257, bytes(32)).format(), [Signer(ORIGIN, key(9))])
    status, _ = service.handle_add_checkpoint(f"old 257\n\n{forged}", WHEN)
    assert status == 403
