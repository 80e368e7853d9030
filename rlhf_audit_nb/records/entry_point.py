"""What papermill finds under the name ``audit``. Floor 3.

Papermill loads the engines of all installed packages while it is imported itself. The engine's own module imports
papermill, so it cannot be the one that is named there: whoever imported it first would have papermill ask for a class
that is not defined yet. Nothing else imports this module.
"""

from __future__ import annotations

from typing import Any

from papermill.engines import Engine

__all__ = ["AuditEngine"]


class AuditEngine(Engine):
    """Stands for `engine.AuditEngine` until it is used."""

    @classmethod
    def execute_notebook(cls, *arguments: Any, **settings: Any) -> Any:
        """See `engine.AuditEngine.execute_notebook`."""
        from rlhf_audit_nb.records import engine

        return engine.AuditEngine.execute_notebook(*arguments, **settings)
