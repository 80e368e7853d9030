"""The frame of a signed note (C2SP signed-note v1.0.0): its text and its signature lines, none verified. Floor 0.

A note is ``text`` (ending in a newline), an empty line, and one or more signature lines ::

    U+2014 SP name SP base64(key id (4 bytes) || signature) LF

The text ends at the *last* empty line. The note is UTF-8 without control characters other than LF. Parsing is strict,
and formatting what was parsed gives the same bytes. What the signatures say is the business of `note`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.encoding import check_name, decode_base64, encode_base64

__all__ = ["MAX_NOTE", "MAX_SIGNATURES", "Note", "Signature", "check_text", "parse_note"]

MAX_NOTE = 1 << 20
MAX_SIGNATURES = 100

_KEY_ID_BYTES = 4
_SIGNATURE_LINE = re.compile("— ([^ ]+) ([A-Za-z0-9+/=]+)")
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f]")


@dataclass(frozen=True)
class Signature:
    """One signature line, not yet verified."""

    name: str
    key_id: bytes
    data: bytes

    def format(self) -> str:
        """The line, without its newline."""
        return f"— {self.name} {encode_base64(self.key_id + self.data)}"


@dataclass(frozen=True)
class Note:
    """A parsed note: its text and its signatures, none of them verified."""

    text: str
    signatures: tuple[Signature, ...]

    def format(self) -> str:
        """The whole note."""
        return self.text + "\n" + "".join(line.format() + "\n" for line in self.signatures)

    def plus(self, *signatures: Signature) -> Note:
        """The note with more signature lines at its end."""
        return Note(self.text, (*self.signatures, *signatures))


def check_text(text: str) -> str:
    """``text`` if a note can hold it; raises `FormatError` where it lacks its newline or holds a control character."""
    if not text.endswith("\n") or _CONTROL.search(text):
        raise FormatError("The text of a note must end in a newline and hold no control character.", code="note")
    return text


def parse_note(data: bytes | str) -> Note:
    """The note in ``data``, its signatures not verified.

    Raises:
        FormatError: the framing is broken anywhere.
    """
    text = _note_text(data)
    cut = text.rfind("\n\n")
    if cut < 0 or not text.endswith("\n"):
        raise FormatError(
            "A signed note has no empty line before its signatures, or no newline at its end.", code="note"
        )
    lines = text[cut + 2 : -1].split("\n")
    if len(lines) > MAX_SIGNATURES:
        raise FormatError(f"A signed note has {len(lines)} signatures; at most {MAX_SIGNATURES} are read.", code="note")
    return Note(text[: cut + 1], tuple(_parse_signature(line) for line in lines))


def _note_text(data: bytes | str) -> str:
    try:
        raw = data.encode() if isinstance(data, str) else data
        text = raw.decode()
    except UnicodeError as error:
        raise FormatError(f"A signed note is not UTF-8: {error}.", code="note") from error
    if len(raw) > MAX_NOTE:
        raise FormatError(f"A signed note of {len(raw)} bytes is over {MAX_NOTE}.", code="note")
    if _CONTROL.search(text):
        raise FormatError("A signed note holds a control character.", code="note")
    return text


def _parse_signature(line: str) -> Signature:
    match = _SIGNATURE_LINE.fullmatch(line)
    if match is None:
        raise FormatError(f"A signature line is malformed: {line[:60]!r}.", code="note")
    name = check_name(match[1], "signer's name")
    raw = decode_base64(match[2], f"signature of {name}")
    if len(raw) <= _KEY_ID_BYTES:
        raise FormatError(f"The signature of {name} is too short.", code="note")
    return Signature(name, raw[:_KEY_ID_BYTES], raw[_KEY_ID_BYTES:])
