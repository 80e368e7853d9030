"""RLHF training that can be proved. The public face; nothing heavy is imported before it is used.

    from rlhf_audit_nb import AuditableRLHF, PrivacyConfig

    auditor = AuditableRLHF(privacy_config=PrivacyConfig(epsilon=1.0))
    with auditor.track_training(experiment_name="safety_alignment"):
        trainer.train()          # any TRL trainer; nothing else changes

In a notebook, ``%load_ext rlhf_audit_nb`` gives ``%%audit_train`` and ``%audit``.

This module owns only names: each is fetched from its room when it is first asked for, so that
``import rlhf_audit_nb`` costs no torch, no transformers and no altair. Floor 6.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from rlhf_audit_nb.auditor import AuditableRLHF
    from rlhf_audit_nb.config import AuditConfig, PrivacyConfig
    from rlhf_audit_nb.errors import (
        AuditError,
        BudgetExceededError,
        ConfigError,
        DataError,
        EntryError,
        FormatError,
        KeyFileError,
        PrivacyError,
        RecordError,
        ReportError,
        RunError,
        StoreError,
        TrailError,
        UnsupportedTrainerError,
        VaultError,
    )

__version__ = "0.1.0"

__all__ = [
    "AuditConfig",
    "AuditError",
    "AuditableRLHF",
    "BudgetExceededError",
    "ConfigError",
    "DataError",
    "EntryError",
    "FormatError",
    "KeyFileError",
    "PrivacyConfig",
    "PrivacyError",
    "RecordError",
    "ReportError",
    "RunError",
    "StoreError",
    "TrailError",
    "UnsupportedTrainerError",
    "VaultError",
    "__version__",
    "load_ipython_extension",
    "unload_ipython_extension",
]

_ROOMS = {"AuditableRLHF": "auditor", "AuditConfig": "config", "PrivacyConfig": "config"}


def __getattr__(name: str) -> Any:
    if name in _ROOMS or (name in __all__ and name.endswith("Error")):
        value = getattr(import_module(f"{__name__}.{_ROOMS.get(name, 'errors')}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(shell: InteractiveShell) -> None:
    """``%load_ext rlhf_audit_nb``: registers ``%%audit_train`` and ``%audit``."""
    import_module(f"{__name__}.notebook.magics").load_ipython_extension(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """``%unload_ext rlhf_audit_nb``: takes the magics away again."""
    import_module(f"{__name__}.notebook.magics").unload_ipython_extension(shell)
