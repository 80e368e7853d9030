"""What makes a training run private: units, sampling, plan, engine, accountant, ledger. Floor 2.

The walk: `plan_training` turns a `PrivacyConfig`, a trainer and what the ledger already holds into a `Plan`;
`reserve_event` says it to the trail; `private_training` trains with it; `settle_event` says what was really spent.
Importing this package does not import torch: the engine is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.privacy.accountant import Accounted, Mechanism, calibrate, compose, epsilon_curve, max_steps
from rlhf_audit_nb.privacy.ledger import Ledger, Spend, fold
from rlhf_audit_nb.privacy.plan import (
    Plan,
    check_supported,
    plan_training,
    reserve_event,
    sealed_event,
    settle_event,
)
from rlhf_audit_nb.privacy.quiet import quiet_preparation
from rlhf_audit_nb.privacy.sampling import SealedRandom
from rlhf_audit_nb.privacy.units import Units, build_units

if TYPE_CHECKING:
    from rlhf_audit_nb.privacy.engine import PrivacyObserver, PrivateTraining, private_training

__all__ = [
    "Accounted",
    "Ledger",
    "Mechanism",
    "Plan",
    "PrivacyObserver",
    "PrivateTraining",
    "SealedRandom",
    "Spend",
    "Units",
    "build_units",
    "calibrate",
    "check_supported",
    "compose",
    "epsilon_curve",
    "fold",
    "max_steps",
    "plan_training",
    "private_training",
    "quiet_preparation",
    "reserve_event",
    "sealed_event",
    "settle_event",
]

_ENGINE = frozenset({"PrivacyObserver", "PrivateTraining", "private_training"})


def __getattr__(name: str) -> Any:
    if name in _ENGINE:
        from rlhf_audit_nb.privacy import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
