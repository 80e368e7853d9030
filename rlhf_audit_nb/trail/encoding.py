"""How the C2SP text formats write names, numbers and bytes: each in exactly one way. Floor 0."""

from __future__ import annotations

import base64
import binascii
import re

from rlhf_audit_nb.errors import FormatError

__all__ = ["check_name", "decode_base64", "encode_base64", "parse_size"]

_SIZE = re.compile("0|[1-9][0-9]{0,18}")


def encode_base64(data: bytes) -> str:
    """``data`` in standard base64 with padding."""
    return base64.b64encode(data).decode()


def decode_base64(text: str, what: str) -> bytes:
    """The bytes of canonical standard base64; ``what`` names it in the `FormatError` otherwise."""
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise FormatError(f"The {what} is not base64: {error}.", code="base64") from error
    if encode_base64(raw) != text:
        raise FormatError(f"The {what} is not in canonical base64.", code="base64")
    return raw


def check_name(name: str, what: str = "key name") -> str:
    """``name`` if it can name a key: UTF-8, not empty, no space, no plus, no control character."""
    if not name or "+" in name or any(char.isspace() or char < " " or "\ud800" <= char <= "\udfff" for char in name):
        raise FormatError(f"The {what} {name!r} is empty or holds a space, a plus or a control character.", code="name")
    return name


def parse_size(text: str, what: str) -> int:
    """A decimal number below 2^63 without sign, space or leading zero; ``what`` names it in the error."""
    if not _SIZE.fullmatch(text) or int(text) >= 1 << 63:
        raise FormatError(f"The {what} {text[:40]!r} is not a plain decimal number.", code="number")
    return int(text)
