"""A gate's decision as an entry of the trail, and the policy to begin with. Floor 4.

The entry names no person, path or figure: digests, the ids of records, and the ids of what was asked.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from rlhf_audit_nb import __version__
from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.events import GateDecided, encode_body
from rlhf_audit_nb.gate.finding import REFUSED
from rlhf_audit_nb.trail import Trail

if TYPE_CHECKING:
    from pathlib import Path

    from rlhf_audit_nb.gate.finding import Decision

__all__ = ["append_decision", "decision_event", "example_policy", "record_decision"]


def example_policy() -> str:
    """A policy to begin with, each key explained."""
    return resources.files("rlhf_audit_nb.gate").joinpath("policy.example.yaml").read_text(encoding="utf-8")


def decision_event(decision: Decision) -> GateDecided:
    """The decision as an event."""
    chosen = decision.chosen or min(decision.records, key=lambda one: len(one.unmet), default=None)
    findings = (*decision.findings, *(chosen.findings if chosen is not None else ()))
    unmet = sorted({one.id for one in findings if not one.met})
    word = "passed" if decision.passed else "refused" if decision.exit_code == REFUSED else "does-not-hold"
    return GateDecided(
        decision=word,
        policy=decision.policy,
        resolved=decision.resolved,
        model=decision.model,
        record=chosen.record if decision.passed and chosen is not None else None,
        judged=sorted({one.record for one in decision.records if one.record}),
        met=sorted({one.id for one in findings} - set(unmet)),
        unmet=unmet,
        tool=f"rlhf_audit_nb/{__version__}",
    )


def append_decision(trail: Trail, decision: Decision) -> int:
    """Writes the decision into an open trail; the entry's index.

    Raises:
        StoreError: the append failed.
    """
    event = decision_event(decision)
    return trail.append(event.TYPE, encode_body(event)).wait()


def record_decision(location: Path, decision: Decision) -> int:
    """Writes the decision into the trail in a folder; the entry's index.

    Raises:
        ConfigError: there is no trail there.
        StoreError, KeyFileError: it cannot be written, or its keys are not here.
    """
    if not (location / "trail.sqlite").is_file():
        raise ConfigError(
            f"There is no trail at {location} to write the decision into.",
            next_step="Name the trail's folder with --trail.",
            code="no-trail",
        )
    with Trail.open(location, create=False) as trail:
        return append_decision(trail, decision)
