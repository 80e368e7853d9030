"""Keeping libraries from telling about private rows while data is prepared and trained on. Floor 2.

Libraries report what they do: `datasets` shows how many rows it maps and how many it keeps, tokenizers print the
length of a sequence that is too long, and TRL quotes the end of a prompt that does not tokenise as a prefix. Under
differential privacy these are functions of private data, and in a notebook they would stand in its outputs.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

__all__ = ["quiet_preparation"]

_TELLING = (
    "tokenized prompt is not a prefix",
    "Token indices sequence length",
    "sequence length is longer than",
    "Mismatch between tokenized prompt",
)
_LOGGERS = ("trl", "transformers", "datasets", "accelerate")


class _DropsTelling(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = str(record.msg)
        return not any(phrase in text for phrase in _TELLING)


@contextlib.contextmanager
def quiet_preparation() -> Iterator[None]:
    """While inside, no row count, length or text of the data is printed by the libraries that prepare it.

    Progress bars of `datasets` are off, and the warnings that quote data are dropped; everything else is still heard.
    All of it is put back afterwards. Enter it around the cell in which a private trainer is built.
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
    dropped = _DropsTelling()
    handlers = _handlers()
    for handler in handlers:
        handler.addFilter(dropped)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(dropped)


def _handlers() -> list[logging.Handler]:
    """Every handler that a record of these libraries can reach (a logger's own filter would miss its children)."""
    found: list[logging.Handler] = [*logging.getLogger().handlers]
    if logging.lastResort is not None:
        found.append(logging.lastResort)
    for name in (*_LOGGERS, *(known for known in logging.root.manager.loggerDict if known.startswith(_LOGGERS))):
        found.extend(logging.getLogger(name).handlers)
    return list(dict.fromkeys(found))
