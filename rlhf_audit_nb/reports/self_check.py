"""What a report says of the mechanism's check of itself: the last one recorded, with its limits. Floor 4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_audit_nb.compliance import words
from rlhf_audit_nb.compliance.evidence import cite
from rlhf_audit_nb.events import PrivacyChecked
from rlhf_audit_nb.privacy.self_audit import LIMITS, TESTED
from rlhf_audit_nb.reports.parts import Fact, PrivacyPart

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.evidence import Evidence

__all__ = ["check_part"]

TITLE = "The mechanism's check of itself"


def check_part(evidence: Evidence) -> tuple[PrivacyPart, ...]:
    """The last check that was recorded; nothing where there is none."""
    found = evidence.of(PrivacyChecked)
    if not found:
        return ()
    item, event = found[-1]
    at = cite([item.index])
    failed = [name for name, outcome in event.tested.items() if outcome != "passed"]
    state, headline = ("ok", "passed") if event.outcome == "passed" and not failed else ("bad", "did not pass")
    if not evidence.trusted:
        state, headline = "bad", "not verified"
    facts = [
        Fact("Recorded", words.time_text(item.time), at),
        Fact("Engine", f"{event.engine} on {event.device}; {event.generator}", at),
        Fact("Run with", f"σ {words.number_text(event.noise_multiplier)}, q {words.number_text(event.sampling_rate)}, "
             f"{words.plural(event.steps, 'step')}", at),
        Fact("ε claimed", f"{words.epsilon_text(event.epsilon_claimed)} at δ {words.delta_text(event.delta)}", at),
        Fact("ε shown by an attack", _shown(event), at),
        Fact("Software", ", ".join(f"{name} {version}" for name, version in event.versions.items()), at),
        *(Fact(f"Failed: {name}", TESTED.get(name, ""), at) for name in failed),
    ]  # fmt: skip
    return (PrivacyPart(TITLE, state, headline, _words(event), at, tuple(facts)),)


def _words(event: PrivacyChecked) -> str:
    tested = words.plural(len(event.tested), "hypothesis", "hypotheses")
    said = (
        f"The installed mechanism was run over phantom annotators, and {tested} about what it released were tested, "
        f"with a chance of at most {event.false_alarm:g} that a right one fails. "
    )
    if event.outcome != "passed":
        said += "It did not pass: the ε of trainings with this installation cannot be relied on. "
    return said + " ".join(LIMITS)


def _shown(event: PrivacyChecked) -> str:
    if not event.canaries:
        return "not attacked"
    canaries = words.plural(event.canaries, "canary", "canaries")
    return (
        f"at least {words.number_text(event.epsilon_lower)} with {100 * event.confidence:g} % of confidence, from "
        f"{canaries} that can show {words.number_text(event.ceiling)} at most; a low bound is no proof of privacy"
    )
