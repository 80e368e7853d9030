"""Reserving on a trail: the ledger is read and the plan appended in one transaction. Floor 2.

Of any number of runs, in any number of processes, that want the last of a budget, as many get it as fit: the
reservation's body is made within the append's own transaction, from the ledger as it stands there. Where another run
was quicker, the plan is made anew on top of it and tried again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_audit_nb.errors import PrivacyError
from rlhf_audit_nb.events import PrivacyReserved, PrivacySettled, encode_body, encode_private
from rlhf_audit_nb.privacy.ledger import Ledger, fold
from rlhf_audit_nb.privacy.plan import Plan, reserve_event, sealed_event

if TYPE_CHECKING:
    from rlhf_audit_nb.privacy.accountant import Mechanism
    from rlhf_audit_nb.privacy.sampling import SealedRandom
    from rlhf_audit_nb.trail import Trail, TrailReader

__all__ = ["RACES", "read_ledger", "reserve"]

RACES = 8
"""How often a reservation is planned anew when other runs reserve at the same time."""

_KINDS = (PrivacyReserved.TYPE, PrivacySettled.TYPE)


def read_ledger(reader: TrailReader) -> Ledger:
    """The ledger of a trail as ``reader`` sees it; only the ledger's own entries are read.

    Raises:
        PrivacyError: the entries do not add up; see `fold`.
    """
    found = [entry for kind in _KINDS for entry in reader.entries(type=kind)]
    return fold(sorted(found, key=lambda entry: entry.index))


def reserve(
    trail: Trail,
    plan: Plan,
    randomness: SealedRandom,
    *,
    reservation: str,
    run: str | None = None,
    resolution_us: int = 1,
) -> Plan:
    """Reserve the whole of ``plan`` in one append, with the seed sealed beside it.

    Returns:
        The plan that was reserved: ``plan`` itself, or what was planned anew where other runs had reserved meanwhile.

    Raises:
        BudgetExceededError: other runs took the budget; nothing was appended.
        PrivacyError: code ``reservation-race``: others reserved each time while this one was planned.
        StoreError: the append failed.
    """
    for _ in range(RACES):

        def body(reader: TrailReader, plan: Plan = plan) -> bytes:
            prior = read_ledger(reader).mechanisms(plan.config.unit, plan.config.unit_column)
            if prior != plan.prior:
                raise _LedgerMovedError(prior)
            return encode_body(reserve_event(plan, reservation))

        try:
            trail.append_guarded(
                PrivacyReserved.TYPE,
                body,
                run=run,
                private=encode_private(sealed_event(randomness)),
                resolution_us=resolution_us,
            )
        except _LedgerMovedError as moved:
            # Outside of the transaction: planning takes seconds, and others may append meanwhile.
            plan = plan.replanned(moved.prior)
        else:
            return plan
    raise PrivacyError(
        f"Other runs reserved budget on this trail {RACES} times while this one was planned; nothing was trained.",
        next_step="Start the run again when the others have begun.",
        code="reservation-race",
    )


class _LedgerMovedError(Exception):
    """Another run reserved between plan and reservation."""

    def __init__(self, prior: tuple[Mechanism, ...]) -> None:
        super().__init__()
        self.prior = prior
