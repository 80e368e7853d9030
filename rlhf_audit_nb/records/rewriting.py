"""Putting a changed seal into a record's file, and changing nothing else in it. Floor 3.

What is added to a record later (``additions``, ``anchors``) stands in ``metadata.rlhf_audit``, and every other byte of
the file stays as it is: the value is found in the text and replaced there, the file is replaced whole, and who adds at
the same moment waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_audit_nb.errors import RecordError
from rlhf_audit_nb.records.normal_form import SEAL_KEY
from rlhf_audit_nb.trail.durable import write_durably

__all__ = ["replace_seal", "rewrite_record"]

_SPACE = " \t\r\n"
_decoder = json.JSONDecoder()


def _past_space(text: str, at: int) -> int:
    while text[at] in _SPACE:
        at += 1
    return at


def _value_of(text: str, at: int, name: str) -> tuple[int, int]:
    """Where the value of a key of the object at ``at`` begins and ends; the text is known to be JSON."""
    at = _past_space(text, at + 1)
    while text[at] == '"':
        key, at = _decoder.raw_decode(text, at)
        start = _past_space(text, _past_space(text, at) + 1)
        _, at = _decoder.raw_decode(text, start)
        if key == name:
            return start, at
        at = _past_space(text, at)
        at = _past_space(text, at + 1) if text[at] == "," else at
    raise KeyError(name)


def replace_seal(data: bytes, seal: dict[str, Any]) -> bytes:
    """A record's bytes with another seal, in the layout of the file; every other byte stays.

    The bytes are those of a notebook with a seal, as `normal_form.parse_json` reads it.
    """
    text = data.decode()
    metadata, _ = _value_of(text, _past_space(text, 0), "metadata")
    start, stop = _value_of(text, metadata, SEAL_KEY)
    line = text[text.rfind("\n", 0, start) + 1 : start]
    margin = line[: len(line) - len(line.lstrip())]
    if "\n" not in text[start:stop] or not margin:
        new = json.dumps(seal, ensure_ascii=False, separators=(",", ":"))
    else:
        # The seal is the value of a key of the second level: its margin is twice the file's indent.
        indent = margin[: len(margin) // 2] or " "
        new = json.dumps(seal, ensure_ascii=False, indent=indent, sort_keys=True).replace("\n", f"\n{margin}")
        new = new.replace("\n", "\r\n") if "\r\n" in text[start:stop] else new
    return (text[:start] + new + text[stop:]).encode()


@contextlib.contextmanager
def _held(path: Path) -> Any:
    """The file, held alone among those who rewrite it: whoever comes second sees what the first has written."""
    while True:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                yield
                return
        finally:
            os.close(descriptor)


def rewrite_record(path: Path | str, change: Callable[[bytes], bytes]) -> None:
    """Replaces a record by ``change`` of its bytes, whole or not at all; a change that raises leaves it as it is.

    Raises:
        RecordError: the file cannot be read or written.
    """
    # A link stays one: it is the file behind it that is replaced.
    target = Path(path).resolve()
    try:
        with _held(target):
            before = target.read_bytes()
            after = change(before)
            if after != before:
                write_durably(target, after, target.stat().st_mode & 0o777)
    except OSError as error:
        raise RecordError(
            f"The record {path} cannot be rewritten: {error.strerror or error}.",
            next_step="Name an executed notebook (.ipynb) that exists, in a folder that you may write to.",
            code="no-record",
        ) from error
