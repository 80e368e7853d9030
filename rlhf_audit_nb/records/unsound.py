"""The errors of who is given a record that does not hold, with the exit codes of its verdict. Floor 3."""

from __future__ import annotations

from typing import ClassVar

from rlhf_audit_nb.errors import RecordError
from rlhf_audit_nb.trail import Level, Verdict

__all__ = ["DivergedRecordError", "InvalidRecordError", "refuse_unsound"]


class InvalidRecordError(RecordError):
    """A record that something was to be done with does not verify."""

    code: ClassVar[str] = "invalid-record"
    exit_code: ClassVar[int] = Level.INVALID.exit_code


class DivergedRecordError(RecordError):
    """A record that something was to be done with contradicts a history that was seen here."""

    code: ClassVar[str] = "diverged-record"
    exit_code: ClassVar[int] = Level.DIVERGED.exit_code


def refuse_unsound(verdict: Verdict, message: str, *, next_step: str, code: str | None = None) -> None:
    """Nothing where the record holds.

    Raises:
        InvalidRecordError, DivergedRecordError: with ``message`` and the first reason.
    """
    error = {Level.INVALID: InvalidRecordError, Level.DIVERGED: DivergedRecordError}.get(verdict.level)
    if error is None:
        return
    first = verdict.reasons[0]
    raise error(f"{message}: {first.where}: {first.message}", next_step=next_step, code=code)
