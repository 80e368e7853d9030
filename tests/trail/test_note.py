"""Notes, checkpoints, proofs and policies: golden vectors, strict parsers, other implementations."""

from __future__ import annotations

import base64

import metamorphic_log
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.checkpoint import Checkpoint, checkpoint_of, parse_checkpoint
from rlhf_audit_nb.trail.merkle import EMPTY_ROOT, LeafHashes, leaf_hash, prove_inclusion, tree_root
from rlhf_audit_nb.trail.note import (
    COSIGNATURE,
    MAX_SIGNATURES,
    Note,
    Signature,
    Signer,
    Verifier,
    cosign_note,
    format_vkey,
    parse_note,
    parse_vkey,
    sign_note,
    verify_note,
)
from rlhf_audit_nb.trail.policy import TrustPolicy
from rlhf_audit_nb.trail.proof import InclusionProof, format_proof, parse_proof

ORIGIN = "example.com/rlhf-audit"


def key(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)


LOG = Signer(ORIGIN, key(1))
LEAVES = [leaf_hash(b"entry-%d" % number) for number in range(10)]
CHECKPOINT = Checkpoint(ORIGIN, 10, tree_root(10, LeafHashes(LEAVES)))
SIGNED = sign_note(CHECKPOINT.format(), [LOG])
VKEY = format_vkey(LOG.verifier())


def test_the_specifications_example_verifies(vectors):
    spec = vectors("note")["spec"]
    note = parse_note(f"{spec['text']}\n— example.com/foo {spec['signature']}\n")
    (verified,) = verify_note(note, [parse_vkey(spec["vkey"])])
    assert verified.verifier.name == "example.com/foo"
    assert format_vkey(verified.verifier) == spec["vkey"]


def test_our_own_key_has_the_golden_verifier_form(vectors):
    own = vectors("note")["own"]
    signer = Signer(own["name"], Ed25519PrivateKey.from_private_bytes(bytes.fromhex(own["seed"])))
    assert format_vkey(signer.verifier()) == own["vkey"]
    assert parse_vkey(own["vkey"]) == signer.verifier()


def test_another_implementation_accepts_our_checkpoint_and_its_proof():
    head = metamorphic_log.checkpoint_verify(SIGNED, [VKEY])
    assert (head.origin, head.size) == (ORIGIN, 10)
    proof = prove_inclusion(4, 10, LeafHashes(LEAVES))
    metamorphic_log.checkpoint_verify_inclusion(SIGNED, [VKEY], 4, LEAVES[4], proof)
    with pytest.raises(metamorphic_log.VerifyError):
        metamorphic_log.checkpoint_verify(SIGNED.replace("\n10\n", "\n11\n"), [VKEY])


def test_a_note_survives_parsing_and_formatting():
    assert parse_note(SIGNED).format() == SIGNED
    assert checkpoint_of(SIGNED) == CHECKPOINT
    assert parse_checkpoint(CHECKPOINT.format()).format() == CHECKPOINT.format()


def test_the_text_ends_at_the_last_empty_line():
    signed = sign_note("one\n\ntwo\n", [LOG])
    note = parse_note(signed)
    assert note.text == "one\n\ntwo\n"
    assert verify_note(note, [LOG.verifier()])


SIGNATURE = SIGNED.splitlines()[-1]
BROKEN_NOTES = {
    "no newline at the end": SIGNED[:-1],
    "no empty line": SIGNED.replace("\n\n", "\n"),
    "no signature": CHECKPOINT.format() + "\n",
    "a hyphen for the dash": SIGNED.replace("—", "-"),
    "two spaces": SIGNED.replace("— ", "—  "),
    "a tab": SIGNED.replace("— ", "—\t"),
    "a carriage return": SIGNED.replace("\n", "\r\n"),
    "a NUL": SIGNED.replace("example", "exam\0ple", 1),
    "a plus in the name": SIGNED.replace(f"— {ORIGIN}", "— a+b"),
    "base64 that is not canonical": SIGNED.replace(SIGNATURE, SIGNATURE[:-2] + chr(ord(SIGNATURE[-2]) + 1) + "="),
    "base64 without its padding": SIGNED.replace("=\n", "\n") if SIGNATURE.endswith("=") else SIGNED[:-2] + "\n",
    "trailing words": SIGNED[:-1] + " x\n",
    "a signature of four bytes": f"text\n\n— {ORIGIN} AAAAAA==\n",
    "too many signatures": SIGNED + (SIGNATURE + "\n") * MAX_SIGNATURES,
    "bytes that are not UTF-8": SIGNED.encode() + b"\xff\n",
    "nothing": "",
}


@pytest.mark.parametrize("name", BROKEN_NOTES)
def test_a_broken_note_is_refused(name):
    with pytest.raises(FormatError):
        parse_note(BROKEN_NOTES[name])


def test_unknown_signatures_are_ignored_and_known_ones_must_hold():
    grease = Signature("example.com/other", b"\1\2\3\4", b"x" * 64)
    note = parse_note(SIGNED)
    assert verify_note(Note(note.text, (grease, *note.signatures)), [LOG.verifier()])
    broken = Signature(ORIGIN, note.signatures[0].key_id, b"\0" * 64)
    with pytest.raises(FormatError, match="does not hold") as caught:
        verify_note(Note(note.text, (broken, *note.signatures)), [LOG.verifier()])
    assert caught.value.reason == "signature"
    with pytest.raises(FormatError, match="signed the note twice"):
        verify_note(Note(note.text, note.signatures * 2), [LOG.verifier()])
    with pytest.raises(FormatError) as caught:
        verify_note(note, [Signer(ORIGIN, key(2)).verifier()])
    assert caught.value.reason == "unsigned"


def test_a_changed_text_breaks_the_signature():
    note = parse_note(SIGNED)
    for at in range(len(note.text) - 1):
        changed = note.text[:at] + ("x" if note.text[at] != "x" else "y") + note.text[at + 1 :]
        with pytest.raises(FormatError):
            verify_note(Note(changed, note.signatures), [LOG.verifier()])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "example.com",
        VKEY[:-4],
        VKEY.replace("+", "-"),
        VKEY.replace(ORIGIN, "example.com/other"),
        VKEY.split("+")[0] + "+ZZZZZZZZ+" + VKEY.split("+", 2)[2],
        VKEY.upper(),
        VKEY + "A",
        VKEY + "\n",
        " " + VKEY,
    ],
)
def test_a_broken_verifier_key_is_refused(text):
    with pytest.raises(FormatError):
        parse_vkey(text)


def test_every_changed_character_of_a_verifier_key_is_noticed():
    for at, char in enumerate(VKEY):
        changed = VKEY[:at] + ("A" if char != "A" else "B") + VKEY[at + 1 :]
        with pytest.raises(FormatError):
            parse_vkey(changed)


def test_keys_of_small_order_are_refused():
    for text in ("01" + "00" * 31, "ec" + "ff" * 30 + "7f", "00" * 32, "ed" + "ff" * 30 + "7f"):
        with pytest.raises(FormatError, match="small order"):
            Verifier(ORIGIN, 1, bytes.fromhex(text))


ROOT = base64.b64encode(CHECKPOINT.root).decode()
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


def test_extensions_are_kept():
    text = CHECKPOINT.format() + "extension line\n"
    assert parse_checkpoint(text).extensions == ("extension line",)
    assert parse_checkpoint(text).format() == text


def test_the_empty_checkpoint_is_read():
    assert parse_checkpoint(Checkpoint(ORIGIN, 0, EMPTY_ROOT).format()).size == 0


PROOF = InclusionProof(4, tuple(prove_inclusion(4, 10, LeafHashes(LEAVES))), SIGNED)


def test_a_proof_file_survives_and_proves():
    for proof in (PROOF, InclusionProof(PROOF.index, PROOF.hashes, SIGNED, b"extra bytes")):
        assert parse_proof(format_proof(proof)) == proof
        assert parse_proof(format_proof(proof).encode()).check(LEAVES[4])
    assert not PROOF.check(LEAVES[5])
    assert not InclusionProof(5, PROOF.hashes, SIGNED).check(LEAVES[4])


def test_a_broken_proof_file_is_refused():
    text = format_proof(PROOF)
    for broken in (
        text.replace("@v1", "@v2"),
        text.replace("index 4", "index 04"),
        text.replace("index 4", "index 10"),
        text.replace("index 4", "extra\nindex 4"),
        text.replace("index 4\n", ""),
        text.replace("\n\n", "\n"),
        text.replace("=\n", "\n", 1),
        text[:-1],
        text.replace("index 4\n", "index 4\n" + "\n".join([ROOT] * 64) + "\n"),
        "",
    ):
        with pytest.raises(FormatError):
            parse_proof(broken)


WITNESSES = [Signer(f"witness.example/{number}", key(10 + number)) for number in range(4)]
WITNESS_KEYS = [format_vkey(signer.verifier(COSIGNATURE)) for signer in WITNESSES]
POLICY = "\n".join(
    [
        "# who is trusted",
        f"log {VKEY} https://example.com/log",
        *(f"witness w{number} {vkey}" for number, vkey in enumerate(WITNESS_KEYS)),
        "group own any w0 w1",
        "group both 2 own w2 w3",
        "quorum both",
        "",
    ]
)


def test_a_policy_survives_parsing_and_formatting():
    policy = TrustPolicy.parse(POLICY)
    assert TrustPolicy.parse(policy.format()) == policy
    assert policy.log_keys == (VKEY,)
    assert TrustPolicy.parse(TrustPolicy.of(VKEY).format()) == TrustPolicy.of(VKEY)


def cosigned(*numbers: int) -> str:
    note = parse_note(SIGNED)
    for number in numbers:
        note = cosign_note(note, WITNESSES[number], 1_700_000_000)
    return note.format()


@pytest.mark.parametrize(
    ("numbers", "holds"),
    [((), False), ((0,), False), ((0, 1), False), ((0, 2), True), ((2, 3), True), ((1, 3), True), ((0, 1, 2, 3), True)],
)
def test_the_quorum_is_counted_over_groups(numbers, holds):
    assert TrustPolicy.parse(POLICY).check(cosigned(*numbers)).cosigned is holds


def test_a_cosignature_covers_its_time():
    note = parse_note(cosigned(2))
    line = note.signatures[-1]
    earlier = Signature(
        line.name, line.key_id, bytes([line.data[0], *line.data[1:7], line.data[7] ^ 1]) + line.data[8:]
    )
    with pytest.raises(FormatError, match="does not hold"):
        TrustPolicy.parse(POLICY).check(Note(note.text, (*note.signatures[:-1], earlier)).format())
    metamorphic_log.checkpoint_verify(note.format(), [VKEY])


def test_a_witness_alone_does_not_stand_for_the_log():
    note = cosign_note(parse_note(SIGNED), WITNESSES[0], 5)
    only = Note(note.text, note.signatures[1:]).format()
    with pytest.raises(FormatError) as caught:
        TrustPolicy.parse(POLICY).check(only)
    assert caught.value.reason == "unsigned"


def test_a_policy_that_knows_another_log_says_so():
    with pytest.raises(FormatError) as caught:
        TrustPolicy.of(format_vkey(Signer("example.com/else", key(3)).verifier())).check(SIGNED)
    assert caught.value.reason == "untrusted-log"


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"log {VKEY}\n",
        "quorum none\n",
        f"log {VKEY}\nquorum none\nquorum none\n",
        f"log {VKEY}\nlog {VKEY}\nquorum none\n",
        f"log {WITNESS_KEYS[0]}\nquorum none\n",
        f"log {VKEY}\nwitness w {VKEY}\nquorum none\n",
        f"log {VKEY}\nquorum w\n",
        f"log {VKEY}\ngroup g any w\nwitness w {WITNESS_KEYS[0]}\nquorum g\n",
        f"log {VKEY}\nwitness w {WITNESS_KEYS[0]}\nwitness w {WITNESS_KEYS[1]}\nquorum w\n",
        f"log {VKEY}\nwitness w {WITNESS_KEYS[0]}\nwitness v {WITNESS_KEYS[0]}\nquorum w\n",
        f"log {VKEY}\nwitness none {WITNESS_KEYS[0]}\nquorum none\n",
        f"log {VKEY}\nwitness w {WITNESS_KEYS[0]}\ngroup g 2 w\nquorum g\n",
        f"log {VKEY}\nwitness w {WITNESS_KEYS[0]}\ngroup g 0 w\nquorum g\n",
        f"log {VKEY}\nwitness w {WITNESS_KEYS[0]}\ngroup g any w w\nquorum g\n",
        f"log {VKEY}\nwitness w {WITNESS_KEYS[0]}\ngroup g any w\ngroup h any w\nquorum h\n",
        f"log {VKEY}\nwitness w {WITNESS_KEYS[0]}\ngroup g any\nquorum g\n",
        f"log {VKEY}\nwitnesses w\nquorum none\n",
        f"log {VKEY}\r\nquorum none\r\n",
        f"log {VKEY} url more\nquorum none\n",
    ],
)
def test_a_broken_policy_is_refused(text):
    with pytest.raises(FormatError):
        TrustPolicy.parse(text)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_parsed_or_refused_and_what_is_parsed_comes_back(text):
    for parse, back in ((parse_note, Note.format), (parse_checkpoint, Checkpoint.format), (parse_proof, format_proof)):
        try:
            value = parse(text)
        except FormatError:
            continue
        assert back(value) == text


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_note_with_any_edit_is_refused_or_comes_back(data):
    at = data.draw(st.integers(0, len(SIGNED)))
    put = data.draw(st.text(alphabet="\n —+=AZ0\t\r\0é", max_size=3))
    cut = data.draw(st.integers(0, 3))
    changed = SIGNED[:at] + put + SIGNED[at + cut :]
    try:
        policy = TrustPolicy.of(VKEY).check(changed)
    except FormatError:
        return
    assert policy.checkpoint == CHECKPOINT
    assert parse_note(changed).format() == changed
