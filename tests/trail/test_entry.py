"""The entry's one encoding, and what is refused."""

from __future__ import annotations

import json

import pytest

from rlhf_audit_nb.errors import EntryError, FormatError
from rlhf_audit_nb.trail.entry import MAX_DEPTH, MAX_ENTRY, Entry, check_body, check_run, check_type, decode_envelope
from rlhf_audit_nb.trail.entry import encode_envelope as encode
from rlhf_audit_nb.trail.merkle import leaf_hash

GOOD = {"v": 1, "type": "train.step", "time": 5, "run": "r", "seq": 0, "writer": "w", "body": {"a": 1}}


def entry(**changes) -> bytes:
    return json.dumps({**GOOD, **changes}, separators=(",", ":")).encode()


def test_the_golden_entries_are_read_and_written_to_the_byte(vectors):
    for item in vectors("entries")["entries"]:
        data = item["data"].encode()
        assert encode(decode_envelope(data)) == data
        assert leaf_hash(data).hex() == item["leaf_hash"]


def test_an_entry_gives_its_parts():
    item = Entry.decode(7, entry(run=None))
    assert (item.index, item.type, item.time, item.run, item.seq) == (7, "train.step", 5, None, 0)
    assert item.stream == "writer:w"
    assert item.body == b'{"a":1}'


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        entry()[:-1],
        entry() + b" ",
        entry() + b"{}",
        b" " + entry(),
        entry().replace(b":", b": ", 1),
        entry(extra=1),
        entry(time=-1),
        entry(time=1.0),
        entry(time=1 << 63),
        entry(seq=True),
        entry(seq=-1),
        entry(type="Train Step"),
        entry(type=""),
        entry(run="a b"),
        entry(run="writer:w"),
        entry(writer=""),
        entry(body=[]),
        entry(body="x"),
        entry(body=None),
        entry(sealed="AAAA"),
        entry(sealed="x"),
        entry(sealed=None),
        entry().replace(b'"a"', b'"\xff"'),
        entry().replace(b'{"a":1}', b'{"a":01}'),
        entry().replace(b'{"a":1}', b'{"a":}'),
        entry().replace(b'"v":1', b'"v":1,"v":1'),
        json.dumps(dict(reversed(GOOD.items())), separators=(",", ":")).encode(),
        entry().replace(b'"train.step"', b'"train.\\u0073tep"'),
        entry(body={"a": "x" * MAX_ENTRY}),
    ],
)
def test_bytes_that_are_not_in_the_one_encoding_are_refused(data):
    with pytest.raises(FormatError) as caught:
        decode_envelope(data)
    assert caught.value.reason in {"malformed-entry", "base64"}


@pytest.mark.parametrize("data", [entry(v=2), entry(v=2, more="fields"), entry(v=0)])
def test_an_unknown_version_is_said_not_guessed(data):
    with pytest.raises(FormatError) as caught:
        decode_envelope(data)
    assert caught.value.reason == "unknown-version"


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b" {}", b"{} ", b"{}{}", b'{"a":\xff}', b'{"a":"\xff"}', b"{'a':1}"]
)
def test_a_body_that_is_not_one_json_object_is_refused(body):
    with pytest.raises(EntryError) as caught:
        check_body(body)
    assert caught.value.reason == "entry-body"


def test_names_are_checked():
    assert check_type("run.started") == "run.started"
    assert check_run("0a-b_c.d") == "0a-b_c.d"
    for bad in ("", "A", "a b", "a..b", "a" * 65, ".a", "é", "a\n"):
        with pytest.raises(EntryError):
            check_type(bad)
    for bad in ("", "a b", "a/b", "a" * 129, "a:b", "a\n"):
        with pytest.raises(EntryError):
            check_run(bad)


def nested(deep: int, opening: bytes, closing: bytes, inside: bytes = b"1") -> bytes:
    """A body that nests ``deep``, its own braces included."""
    return b'{"a":' + opening * (deep - 1) + inside + closing * (deep - 1) + b"}"


BRACKETS = {"arrays": (b"[", b"]"), "objects": (b'{"a":', b"}")}


@pytest.mark.parametrize("kind", BRACKETS)
@pytest.mark.parametrize(("deep", "holds"), [(1, True), (MAX_DEPTH, True), (MAX_DEPTH + 1, False), (10_000, False)])
def test_a_body_nests_to_a_bound_whatever_the_stack_of_its_reader(kind, deep, holds):
    body = nested(deep, *BRACKETS[kind])
    data = entry(body={}).replace(b'"body":{}', b'"body":' + body)
    for depth_of_stack in (0, 500):
        if holds:
            assert bytes(below(depth_of_stack, lambda: decode_envelope(data)).body) == body
            assert below(depth_of_stack, lambda: check_body(body)) == body
            continue
        with pytest.raises(FormatError) as caught:
            below(depth_of_stack, lambda: decode_envelope(data))
        assert caught.value.reason == "malformed-entry"
        with pytest.raises(EntryError):
            below(depth_of_stack, lambda: check_body(body))


def below(frames: int, call):
    """What ``call`` gives with that many frames above it on the stack."""
    return call() if frames == 0 else below(frames - 1, call)


@pytest.mark.parametrize(
    "inside",
    [
        b'"' + b"[" * 500 + b'"',
        b'"' + b'\\"[{' * 500 + b'"',
        b'"' + b"\\\\" * 500 + b'"',
        b",".join([b"[{}]"] * 500),
        b'{"b":[' + b",".join([b'{"c":"]}"}'] * 500) + b"]}",
    ],
)
def test_brackets_within_strings_and_side_by_side_do_not_nest(inside):
    for deep, holds in ((5, True), (MAX_DEPTH + 1, False)):
        body = nested(deep, b"[", b"]", inside)
        if holds:
            assert check_body(body) == body
            continue
        with pytest.raises(EntryError, match="nests more than 100 deep"):
            check_body(body)


@pytest.mark.parametrize(
    "body", [b'{"a":' + b"[" * 60_000 + b"}", b'{"a":"' + b"[" * 60_000 + b"}", b"{" * 9_000 + b"}"]
)
def test_what_never_closes_is_refused(body):
    with pytest.raises(EntryError):
        check_body(body)
    with pytest.raises(FormatError):
        decode_envelope(entry(body={}).replace(b'"body":{}', b'"body":' + body)[:MAX_ENTRY])
