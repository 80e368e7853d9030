"""How a run came to its end where it did not end by itself. Floor 1."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from rlhf_audit_nb.events.base import Event, Private

__all__ = ["FailurePrivate", "Frame", "RunFailure"]


class Frame(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of a redacted traceback: no source text, no values, no path.

    ``role`` is ``cell`` (then ``where`` is ``In[n]``), ``script`` (the program itself), ``module`` (code of the
    user's own), ``library`` (what is installed) or ``audit`` (this package); ``where`` else is the module's name.
    """

    role: str
    where: str
    function: str
    line: int


class FailurePrivate(Private, frozen=True, kw_only=True):
    """What an exception said, which may quote data; under differential privacy also where it came from."""

    message: str
    frames: list[Frame] = []
    caused_by: list[str] = []


class RunFailure(Event, frozen=True, kw_only=True):
    """The exception that ended a run, redacted: its type, what kind of end it is, and where it came from.

    ``category`` is ``exception``, ``out-of-memory``, ``interrupt``, ``exit`` (``sys.exit``) or ``abandoned`` (a
    generator was closed, a task cancelled). ``frames`` are the outermost first, ``omitted`` says how many in their
    middle are left out; ``caused_by`` are the types of the exceptions before it, the nearest first. Under differential
    privacy frames and causes are in the private half. What it said is always there.
    """

    TYPE: ClassVar[str] = "run.failure"
    PRIVATE: ClassVar[type[Private] | None] = FailurePrivate

    kind: str
    category: str
    frames: list[Frame] = []
    omitted: int = 0
    caused_by: list[str] = []
