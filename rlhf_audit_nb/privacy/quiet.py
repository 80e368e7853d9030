"""Keeping libraries from telling about private rows while data is prepared and trained on. Floor 2.

Libraries report what they do: `datasets` shows how many rows it maps and how many bytes it wrote, tokenizers print the
length of a sequence that is too long, TRL quotes the end of a prompt that does not tokenise as a prefix, and for KTO it
advises on weights from how many answers were liked. Under differential privacy these are functions of private data,
and in a notebook they would stand in its outputs. Whether a message comes at all may be one, too.

So it is not looked at what a message says, but at where it is made: what is logged or warned of while rows go through
`datasets`, or while a unit's gradient is computed (`unheard`), is not heard, at any level. Some messages that libraries
make of the data afterwards are known by their words.

Exceptions are told apart in the same way. One that was raised while a library handled rows may quote them, as Arrow
does with a value that has not its column's type; `concealed_errors` has a sentence shown in its place.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any

from rlhf_audit_nb.counted import Counted
from rlhf_audit_nb.errors import AuditError, PrivacyError

__all__ = ["concealed_errors", "quiet_preparation", "unheard"]

_TELLING = (
    "tokenized prompt is not a prefix",
    "Token indices sequence length",
    "Mismatch between tokenized prompt",
    "different amounts of desirable",
)
_LIBRARIES = ("trl", "transformers", "accelerate")
_OF_ROWS = ("datasets", "filelock", "fsspec")
"""Libraries whose every message is about data: their row counts, sizes, and the hashes in their files' names."""
_ROWS_PASS = "datasets.arrow_dataset"
_HANDLE_ROWS = ("datasets", "pyarrow", "tokenizers", "trl.data_utils", "transformers.tokenization")
"""Modules, or what their names begin with, whose errors may quote what they were given."""
_NOWHERE = -1  # below every handler's level, NOTSET included

_unheard = threading.local()


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """While inside, nothing that this thread logs or warns of is heard, where `quiet_preparation` is in force.

    For what is done with private rows themselves.
    """
    before = getattr(_unheard, "on", False)
    _unheard.on = True
    try:
        yield
    finally:
        _unheard.on = before


def quiet_preparation() -> contextlib.AbstractContextManager[None]:
    """While inside, no row count, length or text of the data is told by the libraries that prepare it.

    Progress bars of `datasets` and `transformers` are off, and a message that is made of data, or while data is
    handled, is not heard at all: a sentence in its place would still tell that the data holds what it warns of.
    Everything else is heard. All of it is put back afterwards, by the last to leave where several are inside at a time.
    Enter it around the cell in which a private trainer is built.
    """
    return _hushed.held()


def _hush() -> contextlib.ExitStack:
    with contextlib.ExitStack() as stack:
        for hushing in (_without_progress_bars, _without_telling_logs, _without_telling_warnings):
            stack.enter_context(hushing())
        return stack.pop_all()


_hushed = Counted(_hush)


@contextlib.contextmanager
def concealed_errors() -> Iterator[None]:
    """An exception that leaves it, and was raised while a library handled rows, leaves as a sentence without its words.

    Enter it around what a private run shows; whoever is to keep the exception has to see it before.

    Raises:
        PrivacyError: in that exception's place, which is not shown with it (code ``private-rows``).
    """
    try:
        yield
    except AuditError:  # ours quote nobody
        raise
    except Exception as error:
        if not _raised_over_rows(error):
            raise
        raise PrivacyError(
            f"A library could not handle the data ({type(error).__name__}). What it says may quote private rows, so it "
            "is not shown.",
            next_step="To see it in full, prepare the data outside of the private run, where nothing is recorded: what "
            "is shown there is shown to you alone.",
            code="private-rows",
        ) from None


def _raised_over_rows(error: BaseException) -> bool:
    """Whether one of the exceptions that led to ``error``, or itself, passed through a library that handles rows."""
    pending, seen = [error], set[int]()
    while pending:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        pending += [other for other in (one.__cause__, one.__context__) if other is not None]
        for frame, _ in traceback.walk_tb(one.__traceback__):
            name = str(frame.f_globals.get("__name__", ""))
            if any(name == module or name.startswith((f"{module}.", f"{module}_")) for module in _HANDLE_ROWS):
                return True
    return False


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """`datasets` counts rows on its bars; those of `transformers` tell times, which are nobody's to know either."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as bars

    were_off, were_shown = are_progress_bars_disabled(), bars.is_progress_bar_enabled()
    disable_progress_bars()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if not were_off:
            enable_progress_bars()
        if were_shown:
            bars.enable_progress_bar()


@contextlib.contextmanager
def _without_telling_logs() -> Iterator[None]:
    """Where records are made, and not in a handler: libraries add loggers and handlers whenever they like."""
    make = logging.getLogRecordFactory()

    def make_without_data(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if _is_of_rows(record) or _handles_rows():
            record.msg, record.args, record.levelno = "", (), _NOWHERE
            record.exc_info = record.exc_text = record.stack_info = None
        return record

    logging.setLogRecordFactory(make_without_data)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)


@contextlib.contextmanager
def _without_telling_warnings() -> Iterator[None]:
    """Where warnings are shown: the filters before that are the user's, and are left as they are."""
    show = warnings.showwarning

    def show_without_data(*args: Any, **kwargs: Any) -> None:
        if not _handles_rows():
            show(*args, **kwargs)

    warnings.showwarning = show_without_data
    try:
        yield
    finally:
        warnings.showwarning = show


def _is_of_rows(record: logging.LogRecord) -> bool:
    if record.name.partition(".")[0] in _OF_ROWS:
        return True
    return record.name.startswith(_LIBRARIES) and any(phrase in str(record.msg) for phrase in _TELLING)


def _handles_rows() -> bool:
    """Whether this thread computes with private rows: it said so, or `datasets` is handing them to a function."""
    if getattr(_unheard, "on", False):
        return True
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - documented; `inspect` would read source files
    while frame is not None:
        if frame.f_globals.get("__name__") == _ROWS_PASS:
            return True
        frame = frame.f_back
    return False
