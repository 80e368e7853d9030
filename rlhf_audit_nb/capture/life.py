"""How a run ends, and what may be told of the exception that ended it. Floor 2.

A traceback is redacted to the roles of its files: module name or cell, function, line number. No source text, no
values, no paths. What the exception said may quote data, so it stands in the private half of the event alone; under
differential privacy so does everything but the exception's type.
"""

from __future__ import annotations

import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from itertools import islice
from types import FrameType
from typing import TYPE_CHECKING

from rlhf_audit_nb.events import FailurePrivate, Frame, RunFailure

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.state import Status

__all__ = ["describe_failure", "outcome_of"]

FIRST_FRAMES, LAST_FRAMES = 10, 30
MAX_CAUSES = 5
MAX_MESSAGE = 4_000
MAX_NAME = 200

_NAME = re.compile(r"[\w.<>]+|In\[(\d+|\?)\]")
_CELL = re.compile(r"<ipython-input-|[/\\]ipykernel_\d+[/\\]")
_LIBRARIES = ("site-packages", "dist-packages", "<frozen ")
_STANDARD = sysconfig.get_paths()["stdlib"]
_NO_MEMORY = ("can't allocate memory", "out of memory")
_OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")


def outcome_of(failure: BaseException | None, *, stopped_by_budget: bool) -> Status:
    """The outcome of a run that ``failure`` ended: leaving on purpose or being stopped is no failure."""
    if failure is None:
        return "stopped-by-budget" if stopped_by_budget else "completed"
    if isinstance(failure, SystemExit):
        return "interrupted" if failure.code in (None, 0) else "failed"
    return "failed" if _category(failure, private=True) in ("exception", "out-of-memory") else "interrupted"


def describe_failure(
    error: BaseException, *, private: bool, scrub: Callable[[str], str] = str
) -> tuple[RunFailure, FailurePrivate]:
    """The event for the exception that ended a run, and its private half.

    Args:
        error: the exception, with its traceback.
        private: whether where it came from may depend on private data.
        scrub: what takes secrets out of a text.
    """
    frames, omitted = _frames(error)
    causes = [_type_name(cause) for cause in islice(_causes(error), MAX_CAUSES)]
    half = FailurePrivate(
        message=scrub(_message(error)), frames=frames if private else [], caused_by=causes if private else []
    )
    event = RunFailure(
        kind=_type_name(error),
        category=_category(error, private=private),
        frames=[] if private else frames,
        omitted=0 if private else omitted,
        caused_by=[] if private else causes,
    )
    return event, half


def _category(error: BaseException, *, private: bool) -> str:
    """What kind of end it is; by what the exception says only where that may be told."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, KeyboardInterrupt):
        return "interrupt"
    if isinstance(error, SystemExit):
        return "exit"
    if isinstance(error, GeneratorExit) or "CancelledError" in names:
        return "abandoned"
    says_so = not private and any(words in _message(error) for words in _NO_MEMORY)
    return "out-of-memory" if names & set(_OUT_OF_MEMORY) or says_so else "exception"


def _message(error: BaseException) -> str:
    try:
        return str(error)[:MAX_MESSAGE]
    except Exception as broken:  # an exception's own __str__ can do anything
        return f"(its text could not be had: {type(broken).__name__})"


def _type_name(error: BaseException) -> str:
    kind = type(error)
    module = kind.__module__
    return _plain(kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen = {id(error)}
    while True:
        before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if before is None or id(before) in seen:
            return
        seen.add(id(before))
        yield before
        error = before


def _frames(error: BaseException) -> tuple[list[Frame], int]:
    """The frames from where the run was left open to where the exception was raised, and how many are left out."""
    walked = list(traceback.walk_tb(error.__traceback__))
    omitted = max(0, len(walked) - FIRST_FRAMES - LAST_FRAMES)
    kept = walked[:FIRST_FRAMES] + walked[FIRST_FRAMES + omitted :]
    return [_frame(frame, line) for frame, line in kept], omitted


def _frame(frame: FrameType, line: int) -> Frame:
    code, module = frame.f_code, str(frame.f_globals.get("__name__", "?"))
    cell = _cell(code.co_filename)
    if cell is not None:
        role, where = "cell", cell
    elif module.partition(".")[0] == "rlhf_audit_nb":
        role, where = "audit", module
    elif any(part in code.co_filename for part in _LIBRARIES) or code.co_filename.startswith(_STANDARD):
        role, where = "library", module
    else:
        role, where = ("script" if module in ("__main__", "__mp_main__") else "module"), module
    return Frame(role=role, where=_plain(where), function=_plain(code.co_qualname), line=line)


def _cell(filename: str) -> str | None:
    """``In[3]`` for code of a notebook's cell, as IPython itself calls it; ``None`` for a file."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    found = shell.compile.format_code_name(filename) if shell is not None else None
    if found is not None:
        return str(found[1])
    return "In[?]" if _CELL.search(filename) else None


def _plain(name: str) -> str:
    """A dotted name as Python makes them; what code that was put together at run time calls itself is not told."""
    return name if len(name) <= MAX_NAME and _NAME.fullmatch(name) else "?"
