"""The one hierarchy of errors that this package raises on purpose. Floor 0.

Every error carries a machine-readable ``code``, one clear sentence for a person (which names the thing that is
wrong) and the next step. In a notebook it shows as that sentence, not as forty frames (IPython calls
``_render_traceback_``), and the cell still ends with status *error*. Faces map ``exit_code`` to the process status:
2 usage, 3 refused, 10/30/40 verdicts.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AnchorError",
    "AuditError",
    "BudgetExceededError",
    "ConfigError",
    "DataError",
    "EntryError",
    "FormatError",
    "GateError",
    "KeyFileError",
    "PrivacyError",
    "RecordError",
    "ReportError",
    "RunError",
    "StoreError",
    "TrailError",
    "UnsupportedTrainerError",
    "VaultError",
]


class AuditError(Exception):
    """Base of all errors of this package.

    Args:
        message: one sentence that names the thing and what is wrong with it.
        next_step: what the person does now; empty where nothing can be done.
        code: overrides the class's machine-readable reason.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, *, next_step: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step
        self.reason = code or self.code

    def __str__(self) -> str:
        return f"{self.message} {self.next_step}".rstrip()

    def _render_traceback_(self) -> list[str]:
        lines = [f"{type(self).__name__} [{self.reason}]: {self.message}"]
        if self.next_step:
            lines.append(f"Next step: {self.next_step}")
        return lines


class ConfigError(AuditError):
    """A setting has a value that cannot be used; the message says what to write instead."""

    code = "config"


class TrailError(AuditError):
    """Something about the trail itself."""

    code = "trail"


class FormatError(TrailError):
    """Bytes that should follow a published format (note, checkpoint, proof, policy, entry) do not."""

    code = "format"


class EntryError(TrailError):
    """An entry cannot be appended: too large, not JSON, or of a closed run."""

    code = "entry"


class StoreError(TrailError):
    """The store could not be read or written (full disk, read-only, locked, not a trail)."""

    code = "store"


class KeyFileError(TrailError):
    """A key cannot be created, found, decrypted, or is not the one that the trail names."""

    code = "key"


class VaultError(TrailError):
    """A private payload cannot be sealed or opened."""

    code = "vault"


class AnchorError(TrailError):
    """A witness or a timestamping authority has not given what was asked of it."""

    code = "anchor"
    exit_code = 3


class DataError(AuditError):
    """The data set cannot serve: a missing column, no rows, an id that is None."""

    code = "data"


class PrivacyError(AuditError):
    """The privacy guarantee cannot be given; nothing was trained."""

    code = "privacy"
    exit_code = 3


class UnsupportedTrainerError(PrivacyError):
    """A trainer, loss or option that the engine cannot make private."""

    code = "unsupported-trainer"


class BudgetExceededError(PrivacyError):
    """The population's budget does not allow another step."""

    code = "budget-exceeded"


class RunError(AuditError):
    """A run was opened, closed or used in the wrong order."""

    code = "run"


class RecordError(AuditError):
    """A record cannot be made or read."""

    code = "record"


class ReportError(AuditError):
    """A report or card cannot be made."""

    code = "report"


class GateError(AuditError):
    """A model may not be used: its record does not meet the policy."""

    code = "gate"
    exit_code = 3
