"""The entry: one leaf's exact bytes, and the envelope that the trail puts around an event. Floor 0.

An entry is the UTF-8 JSON object ::

    {"v":1,"type":T,"time":MICROSECONDS,"run":RUN or null,"seq":N,"writer":W,"body":{...}[,"sealed":COMMITMENT]}

with the keys in this order and no space between them. It is encoded once and never re-encoded: what is hashed is
what is stored. ``seq`` counts from 0 without a gap within the entry's *stream*, which is its run, or
``writer:<writer>`` where it belongs to no run; ``time`` never runs back within a stream. ``sealed`` is the base64 of
the 32-byte commitment to the event's private half and is left out where there is none. An entry has at most
65,535 bytes, because the published form (C2SP tlog-tiles) gives its length in two, and a body nests at most 100 deep,
so that whether an entry can be read does not hang on how deep its reader's own stack is.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated

import msgspec

from rlhf_audit_nb.errors import EntryError, FormatError
from rlhf_audit_nb.trail.encoding import decode_base64

__all__ = [
    "ENVELOPE_VERSION",
    "MAX_DEPTH",
    "MAX_ENTRY",
    "Entry",
    "Envelope",
    "check_body",
    "check_run",
    "check_type",
    "decode_envelope",
    "encode_envelope",
    "stream_name",
]

ENVELOPE_VERSION = 1
MAX_ENTRY = 65_535
MAX_DEPTH = 100

_TYPE = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_INNERMOST = re.compile(rb"\{\}|\[\]")
_NO_BRACKET = bytes(set(range(256)) - set(b"{}[]"))
_COMMITMENT_BYTES = 32

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Envelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The trail's own part of an entry.

    Attributes:
        v: version of the envelope, 1.
        type: the event's type, such as ``train.step``.
        time: microseconds since 1970-01-01 UTC, never running back within a stream.
        run: the run's id, or ``None`` for an entry of the trail itself.
        seq: place within the stream, gapless from 0.
        writer: the id of the writer that appended it.
        body: the event's public JSON object, byte for byte.
        sealed: base64 of the commitment to the private half; ``None`` where there is none.
    """

    v: int
    type: str
    time: _Count
    run: str | None
    seq: _Count
    writer: str
    body: msgspec.Raw
    sealed: str | None = None


class Entry(msgspec.Struct, frozen=True):
    """One leaf of the trail, with its envelope decoded.

    Attributes:
        index: place in the tree, from 0.
        data: the exact bytes that are hashed.
        envelope: what they say.
    """

    index: int
    data: bytes
    envelope: Envelope

    @classmethod
    def decode(cls, index: int, data: bytes) -> Entry:
        """The entry whose bytes are ``data``; raises `FormatError` where they are not an entry."""
        return cls(index, data, decode_envelope(data))

    @property
    def type(self) -> str:
        """The event's type."""
        return self.envelope.type

    @property
    def run(self) -> str | None:
        """The run's id, or ``None``."""
        return self.envelope.run

    @property
    def seq(self) -> int:
        """Place within the stream."""
        return self.envelope.seq

    @property
    def time(self) -> int:
        """Microseconds since 1970-01-01 UTC."""
        return self.envelope.time

    @property
    def stream(self) -> str:
        """The stream that ``seq`` counts in."""
        return stream_name(self.envelope.run, self.envelope.writer)

    @property
    def body(self) -> bytes:
        """The event's public JSON, byte for byte."""
        return bytes(self.envelope.body)


class _Version(msgspec.Struct):
    v: int


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Envelope)
_version_decoder = msgspec.json.Decoder(_Version)
_raw_decoder = msgspec.json.Decoder(msgspec.Raw)

encode_envelope = _encoder.encode
"""The envelope's bytes: the entry. (The encoder itself: it stands in the writer's inner loop.)"""


def stream_name(run: str | None, writer: str) -> str:
    """The stream of an entry of ``run`` (or of none) by ``writer``."""
    return run if run is not None else "writer:" + writer


def _nests_within(data: bytes, most: int) -> bool:
    """Whether JSON nests at most ``most`` deep; of what is no JSON, whether it is worth handing to the decoder.

    The decoder recurses: without a bound of our own, it would end in a `RecursionError` wherever the stack does.
    """
    if data.count(b"{") + data.count(b"[") <= most:
        return True
    left = _STRING.sub(b"", data).translate(None, _NO_BRACKET)
    for _ in range(most):  # each turn takes away the innermost level
        shorter = _INNERMOST.sub(b"", left)
        if len(shorter) == len(left):
            break
        left = shorter
    return not left


@lru_cache(maxsize=4096)
def _is_type(value: str) -> bool:
    return len(value) <= 64 and _TYPE.fullmatch(value) is not None  # noqa: PLR2004


@lru_cache(maxsize=4096)
def _is_name(value: str) -> bool:
    return _NAME.fullmatch(value) is not None


def check_type(value: str) -> str:
    """``value`` if it can be an entry's type; raises `EntryError` otherwise."""
    if isinstance(value, str) and _is_type(value):
        return value
    raise EntryError(
        f"Entry type {value!r} cannot be used.",
        next_step='Write lower-case words joined by dots, such as "train.step" (at most 64 characters).',
        code="entry-type",
    )


def check_run(value: str) -> str:
    """``value`` if it can be a run's id; raises `EntryError` otherwise."""
    if isinstance(value, str) and _is_name(value):
        return value
    raise EntryError(
        f"Run id {value!r} cannot be used.",
        next_step="Write 1 to 128 letters, digits, dots, dashes or underscores.",
        code="entry-run",
    )


def check_body(body: bytes) -> bytes:
    """``body`` if it is one JSON object in UTF-8 without space around it; raises `EntryError` otherwise."""
    try:
        if body[:1] != b"{" or body[-1:] != b"}":
            reason = "it does not begin with { and end with }"
        elif not _nests_within(body, MAX_DEPTH):
            reason = f"it is not closed, or nests more than {MAX_DEPTH} deep"
        else:
            str(body, "utf-8")
            _raw_decoder.decode(body)
            return body
    except (UnicodeDecodeError, msgspec.DecodeError) as error:
        reason = str(error)
    raise EntryError(
        f"An entry's body is not a JSON object: {reason}.",
        next_step="Hand in the bytes of one JSON object, such as events.encode_body gives.",
        code="entry-body",
    )


def decode_envelope(data: bytes) -> Envelope:
    """The envelope in an entry's bytes, strictly: known fields in their order, and nothing around them.

    Raises:
        FormatError: ``unknown-version`` for a version that this code does not know, else ``malformed-entry``.
    """
    if len(data) > MAX_ENTRY:
        raise FormatError(f"An entry of {len(data)} bytes is over {MAX_ENTRY}.", code="malformed-entry")
    if not _nests_within(data, MAX_DEPTH + 1):
        raise FormatError(f"An entry is not closed, or its body nests over {MAX_DEPTH} deep.", code="malformed-entry")
    try:
        envelope = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        _refuse_unknown_version(data)
        raise FormatError(f"An entry is malformed: {error}.", code="malformed-entry") from error
    if envelope.v != ENVELOPE_VERSION:
        _refuse_unknown_version(data)
    if encode_envelope(envelope) != data:
        raise FormatError("An entry's bytes are not in their one encoding.", code="malformed-entry")
    _check_fields(envelope)
    return envelope


def _check_fields(envelope: Envelope) -> None:
    names_hold = _is_type(envelope.type) and _is_name(envelope.writer)
    if not names_hold or (envelope.run is not None and not _is_name(envelope.run)):
        raise FormatError("An entry's type, run or writer is not a name.", code="malformed-entry")
    body = bytes(envelope.body)
    if body[:1] != b"{":
        raise FormatError("An entry's body is not a JSON object.", code="malformed-entry")
    try:
        str(body, "utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"An entry's body is not UTF-8: {error}.", code="malformed-entry") from error
    if envelope.sealed is not None and len(decode_base64(envelope.sealed, "commitment")) != _COMMITMENT_BYTES:
        raise FormatError("An entry's commitment is not 32 bytes.", code="malformed-entry")


def _refuse_unknown_version(data: bytes) -> None:
    try:
        version = _version_decoder.decode(data).v
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    if version != ENVELOPE_VERSION:
        raise FormatError(
            f"An entry is of version {version}; this version reads {ENVELOPE_VERSION}.",
            next_step="Read the trail with the version that wrote it, or a later one.",
            code="unknown-version",
        )
