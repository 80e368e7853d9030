"""Another name for `rlhf_audit_nb`, after the distribution: ``from rlhf_audit_trail import AuditableRLHF``.

It only re-exports; it owns nothing and stands on no floor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import rlhf_audit_nb as _house

if TYPE_CHECKING:
    from rlhf_audit_nb import *  # noqa: F403 - type checkers see every name; at run time `__getattr__` stays lazy

__all__ = list(_house.__all__)


def __getattr__(name: str) -> Any:
    return getattr(_house, name)


def __dir__() -> list[str]:
    return dir(_house)
