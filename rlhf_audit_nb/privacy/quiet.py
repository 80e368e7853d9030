"""Keeping libraries from telling about private rows while data is prepared and trained on. Floor 2.

Libraries report what they do: `datasets` shows how many rows it maps and how many it keeps, tokenizers print the
length of a sequence that is too long, TRL quotes the end of a prompt that does not tokenise as a prefix, and for KTO it
advises on weights from how many answers were liked. Under differential privacy these are functions of private data,
and in a notebook they would stand in its outputs.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

__all__ = ["quiet_preparation"]

_TELLING = (
    "tokenized prompt is not a prefix",
    "Token indices sequence length",
    "Mismatch between tokenized prompt",
    "different amounts of desirable",
)
_LIBRARIES = ("trl", "transformers", "datasets", "accelerate")
_NOWHERE = -1  # below every handler's level, NOTSET included


@contextlib.contextmanager
def quiet_preparation() -> Iterator[None]:
    """While inside, no row count, length or text of the data is printed by the libraries that prepare it.

    Progress bars of `datasets` are off, and a warning that quotes data is not heard at all: a sentence in its place
    would still tell that the data holds what it warns of. Everything else is heard. All of it is put back
    afterwards. Enter it around the cell in which a private trainer is built.
    """
    with _without_progress_bars(), _without_telling_logs():
        yield


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            enable_progress_bars()


@contextlib.contextmanager
def _without_telling_logs() -> Iterator[None]:
    """Where records are made, and not in a handler: libraries add loggers and handlers whenever they like."""
    make = logging.getLogRecordFactory()

    def make_without_data(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if record.name.startswith(_LIBRARIES) and any(phrase in str(record.msg) for phrase in _TELLING):
            record.msg, record.args, record.levelno = "", (), _NOWHERE
        return record

    logging.setLogRecordFactory(make_without_data)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
