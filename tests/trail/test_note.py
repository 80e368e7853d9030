"""Notes: their frame, who signs them, and the one rule by which signatures are judged."""

from __future__ import annotations

import random

import metamorphic_log
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.notes import CHECKPOINT, LOG, LOG_ECDSA, LOG_MLDSA, ORIGIN, SIGNED, VKEY, WITNESSES, EcdsaSigner, key

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.cosignature import CosignerEd25519
from rlhf_audit_nb.trail.note import (
    ED25519,
    MAX_SIGNATURES,
    Note,
    Signature,
    Signer,
    Verifier,
    format_vkey,
    parse_note,
    parse_vkey,
    sign_note,
    verify_note,
)

SIGNERS = {"ed25519": LOG, "ecdsa": LOG_ECDSA, "mldsa44": LOG_MLDSA, "cosigner": WITNESSES[0]}


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


def test_another_implementation_accepts_our_note_and_refuses_it_changed():
    assert metamorphic_log.verify_signed_note(SIGNED, [VKEY]) == 1
    with pytest.raises(metamorphic_log.VerifyError):
        metamorphic_log.verify_signed_note(SIGNED.replace("\n10\n", "\n11\n"), [VKEY])


def test_a_note_survives_parsing_and_formatting():
    assert parse_note(SIGNED).format() == SIGNED
    assert parse_note(SIGNED.encode()).format() == SIGNED


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
    "another space in the name": SIGNED.replace(f"— {ORIGIN}", "— a\u00a0b"),
    "base64 that is not canonical": SIGNED.replace(SIGNATURE, SIGNATURE[:-2] + chr(ord(SIGNATURE[-2]) + 1) + "="),
    "base64 without its padding": SIGNED.replace("=\n", "\n") if SIGNATURE.endswith("=") else SIGNED[:-2] + "\n",
    "trailing words": SIGNED[:-1] + " x\n",
    "a signature of four bytes": f"text\n\n— {ORIGIN} AAAAAA==\n",
    "too many signatures": SIGNED + (SIGNATURE + "\n") * MAX_SIGNATURES,
    "over a mebibyte": "x" * (1 << 20) + SIGNED,
    "bytes that are not UTF-8": SIGNED.encode() + b"\xff\n",
    "half a surrogate pair": SIGNED.replace("example", "\ud800", 1),
    "nothing": "",
}


@pytest.mark.parametrize("name", BROKEN_NOTES)
def test_a_broken_note_is_refused(name):
    with pytest.raises(FormatError):
        parse_note(BROKEN_NOTES[name])


@pytest.mark.parametrize("text", ["", "no newline", "a\rb\n", "a\0b\n", "a\tb\n"])
def test_a_text_that_no_note_can_hold_is_not_signed(text):
    with pytest.raises(FormatError):
        sign_note(text, [LOG])


@pytest.mark.parametrize("kind", SIGNERS)
def test_every_kind_of_signer_signs_a_checkpoint_and_each_bit_of_its_line_matters(kind):
    signer = SIGNERS[kind]
    note = parse_note(sign_note(CHECKPOINT.format(), [signer]))
    (verified,) = verify_note(note, [signer.verifier()])
    assert verified.verifier == signer.verifier()
    data = note.signatures[0].data
    for at in {*range(0, len(data), max(1, len(data) // 60)), len(data) - 1}:
        changed = bytearray(data)
        changed[at] ^= 1 << (at % 8)
        line = Signature(signer.name, note.signatures[0].key_id, bytes(changed))
        with pytest.raises(FormatError) as caught:
            verify_note(Note(note.text, (line,)), [signer.verifier()])
        assert caught.value.reason == "signature"


def test_several_signers_sign_one_note_in_their_order():
    note = parse_note(sign_note(CHECKPOINT.format(), list(SIGNERS.values())))
    verified = verify_note(note, [signer.verifier() for signer in SIGNERS.values()])
    assert [item.verifier for item in verified] == [signer.verifier() for signer in SIGNERS.values()]
    assert [bool(item.time) for item in verified] == [False, False, True, True]


@pytest.mark.parametrize("kind", SIGNERS)
def test_a_changed_text_breaks_every_kind_of_signature(kind):
    note = parse_note(sign_note(CHECKPOINT.format(), [SIGNERS[kind]]))
    for at in range(len(note.text) - 1):
        changed = note.text[:at] + ("x" if note.text[at] != "x" else "y") + note.text[at + 1 :]
        with pytest.raises(FormatError):
            verify_note(Note(changed, note.signatures), [SIGNERS[kind].verifier()])


@pytest.mark.parametrize("kind", SIGNERS)
def test_a_signature_holds_under_no_other_key_of_its_kind(kind):
    others = {
        "ed25519": Signer(ORIGIN, key(99)),
        "ecdsa": EcdsaSigner(ORIGIN, 54321),
        "mldsa44": WITNESSES[3],
        "cosigner": CosignerEd25519(WITNESSES[0].name, key(99)),
    }
    line = SIGNERS[kind].sign_line(CHECKPOINT.format())
    assert SIGNERS[kind].verifier().check(CHECKPOINT.format(), line.data) is not None
    assert others[kind].verifier().check(CHECKPOINT.format(), line.data) is None


def test_unknown_signatures_are_ignored_and_known_ones_must_hold():
    grease = Signature("example.com/other", b"\1\2\3\4", b"x" * 64)
    note = parse_note(SIGNED)
    assert verify_note(Note(note.text, (grease, *note.signatures)), [LOG.verifier()])
    broken = Signature(ORIGIN, note.signatures[0].key_id, b"\0" * 64)
    with pytest.raises(FormatError, match="does not hold") as caught:
        verify_note(Note(note.text, (broken, *note.signatures)), [LOG.verifier()])
    assert caught.value.reason == "signature"
    with pytest.raises(FormatError) as caught:
        verify_note(note, [Signer(ORIGIN, key(2)).verifier()])
    assert caught.value.reason == "unsigned"


def test_grease_lines_in_any_order_change_nothing():
    """Lines of unknown keys and kinds, some under the log's own name, stand anywhere among ours."""
    dice = random.Random(8032)
    mine = parse_note(sign_note(CHECKPOINT.format(), [LOG, LOG_MLDSA])).signatures
    known = [LOG.verifier(), LOG_MLDSA.verifier()]
    for _ in range(50):
        grease = [
            Signature(dice.choice([ORIGIN, "grease.example", "Ü—x"]), dice.randbytes(4), dice.randbytes(size))
            for size in dice.sample(range(1, 3000), dice.randint(1, 16))
        ]
        lines = [*mine, *grease]
        dice.shuffle(lines)
        note = Note(CHECKPOINT.format(), tuple(lines))
        assert parse_note(note.format()) == note
        found = verify_note(note, known)
        assert {item.verifier for item in found} == set(known)
        only_grease = Note(note.text, tuple(grease))
        with pytest.raises(FormatError) as caught:
            verify_note(only_grease, known)
        assert caught.value.reason == "unsigned"


@pytest.mark.parametrize("kind", SIGNERS)
def test_a_known_keys_line_must_not_stand_twice(kind):
    signer = SIGNERS[kind]
    first, second = signer.sign_line(CHECKPOINT.format()), signer.sign_line(CHECKPOINT.format())
    grease = Signature("grease.example", b"\1\2\3\4", b"x")
    for lines in ((first, first), (first, second), (first, grease, second)):
        with pytest.raises(FormatError, match="signed the note twice"):
            verify_note(Note(CHECKPOINT.format(), lines), [signer.verifier()])
    assert verify_note(Note(CHECKPOINT.format(), (first, grease, grease)), [signer.verifier()])


def test_two_known_keys_of_one_name_and_id_are_refused():
    """An id has four bytes; whoever makes two keys for one must not choose which of them checks a line."""
    twin = Verifier(ORIGIN, ED25519, LOG.verifier().public)
    assert verify_note(parse_note(SIGNED), [LOG.verifier(), twin])
    other = Signer(ORIGIN, key(2)).verifier()
    other.__dict__["key_id"] = twin.key_id
    with pytest.raises(FormatError) as caught:
        verify_note(parse_note(SIGNED), [twin, other])
    assert caught.value.reason == "ambiguous"


def test_private_keys_are_not_shown():
    for signer in (LOG, LOG_MLDSA, WITNESSES[0]):
        assert "key" not in repr(signer).lower().replace(ORIGIN, "")
