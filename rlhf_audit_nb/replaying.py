"""Repeating a run's private trainings in this process, on scratch paper. Floor 4.

What `rlhf_audit_nb.records.replay` does for a record's notebook, for code that builds its trainer itself: the run's
seeds are opened, a run is opened on a scratch trail whose trainings draw from them, and at its end both are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_audit_nb.config import AuditConfig, PrivacyConfig
from rlhf_audit_nb.events import RunStarted, decode_body
from rlhf_audit_nb.records.replay import (
    ReplayRefusedError,
    ReplayResult,
    compare_with_replay,
    open_own_seeds,
    open_seeds,
    scratch_trail,
)
from rlhf_audit_nb.trail import Trail

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import Entry, TrustPolicy

__all__ = ["Replay", "replay_run"]


@dataclass
class Replay:
    """A replay that goes on; ``result`` is there when its block has ended."""

    run: str
    result: ReplayResult | None = None


@contextmanager
def replay_run(
    trail: Trail,
    run: str,
    openings: Sequence[Path | str],
    *,
    privacy: PrivacyConfig | None = None,
    policy: TrustPolicy | None = None,
) -> Iterator[Replay]:
    """See `rlhf_audit_nb.auditor.AuditableRLHF.replay`; without ``privacy`` the run's own configuration counts."""
    from rlhf_audit_nb.capture.run import Run
    from rlhf_audit_nb.privatiser import TrailPrivatiser

    trail.flush()
    reader = trail.reader()
    entries = list(reader.entries(run=run))
    started = _started(entries, run)
    if openings:
        seeds = open_seeds(entries, openings, origin=trail.origin, policy=policy)
    else:
        seeds = open_own_seeds(trail, run)
    config = privacy or PrivacyConfig(**(started.privacy or {}))
    replay = Replay(run)
    with scratch_trail(seeds) as (location, home), Trail.open(location, home=home) as scratch:
        with Run(
            scratch,
            started.experiment,
            privatiser=TrailPrivatiser(config, scratch, seeds),
            privacy=config.to_dict(),
            audit=AuditConfig(**started.audit),
            declared_model=started.declared_model,
            compliance_mode=started.compliance_mode,
        ):
            yield replay
        replay.result = compare_with_replay(entries, scratch.reader(), seeds)


def _started(entries: Sequence[Entry], run: str) -> RunStarted:
    for entry in entries:
        event = decode_body(entry.type, entry.body)
        if isinstance(event, RunStarted) and event.privacy is not None:
            return event
    raise ReplayRefusedError(
        f"There is no private run {run} on this trail, so there is nothing to replay.",
        next_step="`rlhf-audit trail query --type privacy.reserved` shows the runs that trained with privacy.",
    )
