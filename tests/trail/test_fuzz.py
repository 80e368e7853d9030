"""Whatever bytes they get, the parsers refuse them with the one error they name, or give back the same bytes.

Inputs are random bytes, and the golden files with pieces cut, put in, doubled, exchanged and flipped. A second set of
tests takes one file of each format, changes it at every byte, and looks for a change that is still believed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.notes import CHECKPOINT, LEAVES, LOG, LOG_ECDSA, LOG_MLDSA, ORIGIN, WHEN, WITNESS_KEYS, WITNESSES

from rlhf_audit_nb.errors import EntryError, FormatError
from rlhf_audit_nb.trail.checkpoint import Checkpoint, checkpoint_of, parse_checkpoint
from rlhf_audit_nb.trail.encoding import check_name, decode_base64, encode_base64, parse_size
from rlhf_audit_nb.trail.entry import Entry, check_body, decode_envelope, encode_envelope
from rlhf_audit_nb.trail.merkle import LeafHashes, leaf_hash, prove_inclusion
from rlhf_audit_nb.trail.note import Note, format_vkey, parse_note, parse_vkey, sign_note
from rlhf_audit_nb.trail.policy import TrustPolicy
from rlhf_audit_nb.trail.proof import InclusionProof, format_proof, parse_proof
from rlhf_audit_nb.trail.statement import format_timestamped, parse_timestamped
from rlhf_audit_nb.trail.store import pack_entries, unpack_entries
from rlhf_audit_nb.trail.tiles import parse_tile_path, tile_path
from rlhf_audit_nb.trail.vkey import ECDSA

VECTORS = Path(__file__).parents[1] / "vectors" / "trail"
FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def golden(form: str, name: str) -> list[bytes]:
    """The files of this name in all golden cases of a format; long ones (ML-DSA) only where nothing else is there."""
    files = [path.read_bytes() for path in sorted((VECTORS / form).glob(f"*/{name}"))]
    return [data for data in files if len(data) < 2000] or files[:3]


PIECES = [
    *(b"\n", b"\n\n", b" ", b"\t", b"\r", b"\0", b"+", b"=", b"==", b"/", b"-", b"0", b"1", b"00", b"9" * 20),
    *(
        b"\xff",
        b"\xed\xa0\x80",
        b"\xc2\xa0",
        b"\xe2\x80\x94",
        b"\xe2\x80\x94 ",
        b"\x7f",
        b"\xc2\x85",
        b"AA==",
        b"x",
        b".p/",
    ),
    *(b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b"null", b"-1", b"1e5", b"\xd9\xa1", b"extra AA==\n", b"none"),
    *(b"quorum none\n", b"group g any w0\n", b"index 0\n", b"#"),
]


@st.composite
def mutants(draw: st.DrawFn, files: list[bytes]) -> bytes:
    """One of the files, changed in one to four places; or bytes of no origin at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    data = draw(st.sampled_from(files))
    for _ in range(draw(st.integers(1, 4))):
        at, to = (draw(st.integers(0, len(data))) for _ in range(2))
        kind = draw(st.sampled_from(["put", "cut", "flip", "double", "line", "swap"]))
        lines = data.split(b"\n")
        if kind == "put":
            data = data[:at] + draw(st.sampled_from(PIECES)) + data[at:]
        elif kind == "cut":
            data = data[: min(at, to)] + data[min(max(at, to), min(at, to) + draw(st.integers(1, 20))) :]
        elif kind == "flip" and data:
            place = min(at, len(data) - 1)
            data = data[:place] + bytes([data[place] ^ 1 << draw(st.integers(0, 7))]) + data[place + 1 :]
        elif kind == "double":
            data = data[:to] + data[min(at, to) : to] + data[to:]
        elif kind == "line":
            line = draw(st.integers(0, len(lines) - 1))
            data = b"\n".join(lines[:line] + lines[line : line + 1] * draw(st.sampled_from([0, 2])) + lines[line + 1 :])
        elif kind == "swap":
            one, two = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
            lines[one], lines[two] = lines[two], lines[one]
            data = b"\n".join(lines)
    return data


class Parser(NamedTuple):
    """A parser, what writes its value again, and files to begin with."""

    parse: Callable[[bytes], Any]
    back: Callable[[Any], bytes]
    files: list[bytes]
    error: type[Exception] = FormatError


def text_of(data: bytes) -> str:
    """As text, with every byte kept: parsers of text must take half a surrogate pair, too."""
    return data.decode(errors="surrogateescape")


GOOD_ENTRY = encode_envelope(
    decode_envelope(
        b'{"v":1,"type":"a.b","time":5,"run":"r","seq":0,"writer":"w","body":{"a":[1,{"b":"\\u00e9"}]},"sealed":"%b"}'
        % base64.b64encode(bytes(32))
    )
)
ENTRIES = [item["data"].encode() for item in json.loads((VECTORS / "entries.json").read_text())["entries"]] + [
    GOOD_ENTRY
]

PARSERS = {
    "note": Parser(parse_note, lambda note: note.format().encode(), golden("note", "note")),
    "note of text": Parser(
        lambda data: parse_note(text_of(data)), lambda note: note.format().encode(), golden("note", "note")
    ),
    "cosigned note": Parser(parse_note, lambda note: note.format().encode(), golden("cosignature", "note")),
    "checkpoint": Parser(
        lambda data: parse_checkpoint(text_of(data)),
        lambda head: head.format().encode(errors="surrogateescape"),
        golden("checkpoint", "checkpoint"),
    ),
    "proof": Parser(parse_proof, lambda proof: format_proof(proof).encode(), golden("proof", "evidence.tlog-proof")),
    "proof of text": Parser(
        lambda data: parse_proof(text_of(data)),
        lambda proof: format_proof(proof).encode(),
        golden("proof", "evidence.tlog-proof"),
    ),
    "vkey": Parser(
        lambda data: parse_vkey(text_of(data)), lambda key: format_vkey(key).encode(), golden("vkey", "vkey")
    ),
    "entry": Parser(lambda data: Entry.decode(0, data), lambda entry: encode_envelope(entry.envelope), ENTRIES),
    "body": Parser(check_body, bytes, [json.dumps(json.loads(data)["body"]).encode() for data in ENTRIES], EntryError),
    "base64": Parser(
        lambda data: decode_base64(text_of(data), "thing"),
        lambda raw: encode_base64(raw).encode(),
        [base64.b64encode(bytes(range(size))) for size in range(6)],
    ),
    "number": Parser(
        lambda data: parse_size(text_of(data), "thing"), lambda size: b"%d" % size, [b"0", b"1", b"9223372036854775807"]
    ),
    "name": Parser(
        lambda data: check_name(text_of(data)), lambda name: name.encode(), [b"example.com/log", "Ü/é".encode()]
    ),
    "timestamped signature": Parser(
        lambda data: parse_timestamped(data, 4),
        lambda value: format_timestamped(*value),
        [bytes(12), b"\x7f" + b"\xff" * 11],
    ),
}


@pytest.mark.parametrize("form", PARSERS)
@FUZZ
@given(st.data())
def test_any_bytes_are_refused_by_the_named_error_or_come_back_as_they_were(form, data):
    parser = PARSERS[form]
    raw = data.draw(mutants(parser.files))
    try:
        value = parser.parse(raw)
    except parser.error:
        return
    assert parser.back(value) == raw


def accepted(parser: Parser) -> int:
    """How many of a parser's own files it takes."""
    found = 0
    for data in parser.files:
        try:
            found += parser.back(parser.parse(data)) == data
        except parser.error:
            continue
    return found


@pytest.mark.parametrize("form", PARSERS)
def test_every_parser_takes_some_of_what_the_changes_begin_with(form):
    assert accepted(PARSERS[form]) >= 1


@FUZZ
@given(mutants(golden("policy", "policy")))
def test_any_policy_is_refused_or_means_the_same_when_written_again(raw):
    """Comments and white space are free, so the bytes may differ; what the policy says does not."""
    for given_as in (raw, text_of(raw)):
        try:
            policy = TrustPolicy.parse(given_as)
        except FormatError:
            continue
        written = policy.format()
        assert TrustPolicy.parse(written) == policy
        assert TrustPolicy.parse(written.encode(errors="surrogateescape")).format() == written
        assert policy.split_view_unsafe in {True, False}


@FUZZ
@given(st.lists(st.binary(max_size=70), max_size=8), st.data())
def test_a_bundle_is_refused_or_holds_exactly_these_entries(entries, data):
    packed = pack_entries(entries)
    assert unpack_entries(packed, len(entries)) == entries
    raw, count = data.draw(mutants([packed])), data.draw(st.integers(0, 10))
    try:
        found = unpack_entries(raw, count)
    except FormatError:
        return
    assert len(found) == count
    assert pack_entries(found) == raw


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_a_tile_path_names_one_tile_or_none(data):
    level = data.draw(st.one_of(st.integers(0, 63), st.just("entries")))
    number, width = data.draw(st.integers(0, 2**55)), data.draw(st.integers(1, 256))
    path = tile_path(level, number, width)
    tile = parse_tile_path(path)
    assert tile is not None
    assert (tile.level, tile.number, tile.width, tile.path) == (level, number, width, path)
    changed = text_of(data.draw(mutants([path.encode(), b"tile/0/x001/x234/067.p/255", b"tile/entries/000"])))
    other = parse_tile_path(changed)
    assert other is None or other.path == changed


BODIES = [b'{"a":[1,2.5e-3,-0,"x\\u00e9",null,true,{"b":{}}],"c":"\xc3\xa9"}', b'{"k":"\\ud83d\\ude00"}', b"{}"]


@FUZZ
@given(mutants(BODIES))
def test_what_is_taken_for_an_entrys_body_is_a_json_object_to_others_too(body):
    """And what the standard library takes is taken, but for half a surrogate pair, which is no text."""
    try:
        loaded = json.loads(body.decode(), parse_constant=refuse)
        others = isinstance(loaded, dict) and body[:1] == b"{" and body[-1:] == b"}"
    except ValueError:
        others = False
    try:
        ours = check_body(body) == body
    except EntryError:
        ours = False
    assert ours == others or (others and b"\\ud" in body.lower())


def refuse(_constant: str) -> None:
    raise ValueError("NaN and Infinity are no JSON")


PLAIN = sign_note(CHECKPOINT.format(), [LOG])
COSIGNED = parse_note(PLAIN).plus(WITNESSES[0].cosign(parse_note(PLAIN), WHEN)).format()
LONG = sign_note(CHECKPOINT.format(), [LOG_MLDSA])
FOREIGN = sign_note(CHECKPOINT.format(), [LOG_ECDSA])
POLICY = TrustPolicy.parse(
    f"log {format_vkey(LOG.verifier())}\nlog {format_vkey(LOG_MLDSA.verifier())}\n"
    f"log {format_vkey(LOG_ECDSA.verifier())}\nwitness w {WITNESS_KEYS[0]}\nquorum w\n"
)
SIGNED = {"Ed25519": PLAIN, "Ed25519 and a witness": COSIGNED, "ECDSA": FOREIGN, "ML-DSA-44": LONG}


def changes(data: bytes, step: int = 1) -> list[bytes]:
    """The data with one byte flipped, replaced, cut or doubled, at every ``step``-th place."""
    found = []
    for at in range(0, len(data), step):
        head, tail = data[:at], data[at + 1 :]
        found += [head + bytes([data[at] ^ 1 << bit]) + tail for bit in (0, 1, 5, 7)]
        found += [head + tail, head + data[at : at + 1] * 2 + tail]
    return found


@pytest.mark.parametrize("kind", SIGNED)
def test_no_change_of_one_byte_leaves_a_signed_note_as_good_as_it_was(kind):
    """What is still accepted says the same checkpoint, and says less of who signed: a name that nobody knows."""
    data = SIGNED[kind].encode()
    whole = POLICY.check(data)
    for changed in changes(data, 1 if len(data) < 1000 else 17):
        try:
            checked = POLICY.check(changed)
        except FormatError:
            continue
        assert checked.checkpoint == CHECKPOINT
        assert len(checked.signers) < len(whole.signers)
        assert not checked.cosigned


def test_no_change_of_one_byte_leaves_a_proof_that_shows_anything_else():
    """Bytes that nothing authenticates are the extra data; everything else is refused, or does not verify."""
    proof = InclusionProof(4, tuple(prove_inclusion(4, 10, LeafHashes(LEAVES))), PLAIN)
    data = format_proof(proof).encode()
    assert shows(data)
    assert not [changed for changed in changes(data) if shows(changed)]
    extra = format_proof(InclusionProof(proof.index, proof.hashes, PLAIN, b"some extra data")).encode()
    line = slice(extra.index(b"extra "), extra.index(b"index "))
    for changed in changes(extra):
        if shows(changed):
            assert changed.startswith(extra[: line.start])
            assert changed.endswith(extra[line.stop :])


def shows(data: bytes) -> bool:
    try:
        proof = parse_proof(data)
        head = POLICY.check(proof.checkpoint, ORIGIN).checkpoint
    except FormatError:
        return False
    return head == proof.head() and proof.check(LEAVES[4])


@pytest.mark.parametrize("signer", [LOG, LOG_MLDSA, LOG_ECDSA, WITNESSES[0]], ids=["01", "06", "02", "04"])
def test_no_change_of_one_byte_leaves_a_key_readable_but_in_an_ecdsa_keys_name(signer):
    text = format_vkey(signer.verifier())
    for changed in changes(text.encode(), 1 if len(text) < 300 else 7):
        try:
            key = parse_vkey(text_of(changed))
        except FormatError:
            continue
        assert key.algorithm == ECDSA
        assert (key.public, key.name != signer.name) == (signer.verifier().public, True)


def test_no_change_of_one_byte_brings_a_key_into_a_policy():
    """A changed policy may say another quorum or name; whom it trusts is bound by each key's own hash."""
    data = (
        f"log {format_vkey(LOG.verifier())} https://example.com\nwitness w0 {WITNESS_KEYS[0]}\n"
        f"witness w1 {WITNESS_KEYS[1]}\ngroup g 2 w0 w1\nquorum g\n"
    ).encode()
    whole = TrustPolicy.parse(data)
    keys = {*whole.logs, *whole.witnesses.values()}
    read = 0
    for changed in changes(data):
        try:
            policy = TrustPolicy.parse(changed)
        except FormatError:
            continue
        read += 1
        assert {*policy.logs, *policy.witnesses.values()} <= keys
        assert policy.logs == whole.logs
    assert read > 10


def test_no_change_of_one_byte_leaves_a_bundle_with_the_same_leaves():
    entries = [b"", b"a", b'{"v":1}', bytes(300)]
    packed = pack_entries(entries)
    leaves = [leaf_hash(entry) for entry in entries]
    for changed in changes(packed):
        try:
            found = unpack_entries(changed, len(entries))
        except FormatError:
            continue
        assert [leaf_hash(entry) for entry in found] != leaves or changed == packed


def test_no_change_of_one_byte_leaves_an_entry_with_the_same_bytes():
    """An entry that is still one is another, with another leaf hash: it has no second encoding."""
    for data in ENTRIES:
        for changed in changes(data):
            try:
                entry = Entry.decode(0, changed)
            except FormatError:
                continue
            assert changed != data
            assert encode_envelope(entry.envelope) == changed
            assert leaf_hash(changed) != leaf_hash(data)


@FUZZ
@given(mutants([PLAIN.encode(), COSIGNED.encode(), FOREIGN.encode()]))
def test_no_changed_note_is_believed_to_say_another_checkpoint(raw):
    try:
        checked = POLICY.check(raw)
    except FormatError:
        return
    assert checked.checkpoint == CHECKPOINT
    assert parse_note(raw).format().encode() == raw
    assert checkpoint_of(raw) == CHECKPOINT


@FUZZ
@given(
    st.text(max_size=60),
    st.integers(0, 2**63 - 1),
    st.binary(min_size=32, max_size=32),
    st.lists(st.text(max_size=20), max_size=3),
)
def test_a_checkpoint_of_any_words_is_read_as_it_was_written_or_not_at_all(origin, size, root, extensions):
    head = Checkpoint(origin, size, root, tuple(extensions))
    try:
        found = parse_checkpoint(head.format())
    except FormatError:
        return
    assert found.format() == head.format()
    assert (found.size, found.root) == (size, root)


@FUZZ
@given(st.text(max_size=200))
def test_a_note_of_any_text_is_signed_and_read_again_or_refused(text):
    try:
        signed = sign_note(text, [LOG])
    except FormatError:
        return
    assert parse_note(signed) == Note(text, (LOG.sign_line(text),))
