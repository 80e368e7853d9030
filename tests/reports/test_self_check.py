"""The last check of the mechanism stands in report and card, with what it cannot show."""

from __future__ import annotations

from typing import Any

import report_story as story

from rlhf_audit_nb.cards import build_card
from rlhf_audit_nb.events import PrivacyChecked
from rlhf_audit_nb.privacy.self_audit import LIMITS
from rlhf_audit_nb.reports import build_compliance_report

TITLE = "The mechanism's check of itself"


def checked(**changes: Any) -> PrivacyChecked:
    values: dict[str, Any] = {
        "outcome": "passed",
        "tested": {"noise-level": "passed", "guarded": "passed"},
        "versions": {"trl": "1.16.0"},
        "engine": "loop",
        "device": "cpu",
        "generator": "AES",
        "noise_multiplier": 1.0,
        "sampling_rate": 0.1,
        "steps": 24,
        "delta": 1e-5,
        "false_alarm": 1e-7,
        "canaries": 1000,
        "epsilon_claimed": 3.84,
        "epsilon_lower": 0.83,
        "epsilon_gaussian": 1.12,
        "confidence": 0.95,
        "ceiling": 5.27,
    }
    return PrivacyChecked(**{**values, **changes})


def told(*events: PrivacyChecked, level: str = "UNANCHORED") -> Any:
    teller = story.Teller()
    story.created(teller)
    story.train(teller)
    for event in events:
        teller.tell(event)
    return story.told(teller, level=level)


def part(evidence: Any) -> dict[str, Any] | None:
    parts = build_compliance_report(evidence).to_dict()["privacy"]
    return next((item for item in parts if item["title"] == TITLE), None)


def test_without_a_check_nothing_is_said_of_one():
    assert part(told()) is None
    assert TITLE not in build_compliance_report(told()).html


def test_the_last_one_stands_with_its_bound_and_its_limits():
    failed = checked(outcome="failed", tested={"noise-level": "failed", "guarded": "passed"})
    said = part(told(failed, checked()))
    assert (said["state"], said["headline"]) == ("ok", "passed")
    assert all(limit in said["words"] for limit in LIMITS)
    facts = {fact["label"]: fact["value"] for fact in said["facts"]}
    assert facts["ε claimed"].startswith("3.84")
    assert facts["ε shown by an attack"].startswith("at least 0.83 with 95 % of confidence, from 1,000 canaries")
    assert "no proof of privacy" in facts["ε shown by an attack"]


def test_one_that_failed_is_named_and_is_bad():
    said = part(told(checked(), checked(outcome="failed", tested={"noise-level": "failed", "guarded": "passed"})))
    assert said["state"] == "bad"
    assert "cannot be relied on" in said["words"]
    assert [fact["label"] for fact in said["facts"] if fact["label"].startswith("Failed")] == ["Failed: noise-level"]


def test_a_pass_that_its_own_tests_contradict_is_none():
    assert part(told(checked(tested={"noise-level": "not tested"})))["state"] == "bad"


def test_a_trail_that_does_not_verify_vouches_for_no_check():
    assert part(told(checked(), level="INVALID"))["headline"] == "not verified"


def test_a_card_names_it():
    fields = [f for s in build_card(told(checked())).to_dict()["sections"] for f in s["fields"]]
    (found,) = [field for field in fields if field["label"] == "Check of the mechanism"]
    assert found["value"].startswith("passed; an attack showed at least ε 0.83 of the 3.84")
    assert "no proof of privacy" in found["value"]
