from __future__ import annotations

import report_story as story

from rlhf_audit_nb.compliance import Evidence
from rlhf_audit_nb.events import KeyRevoked, KeyRotated
from rlhf_audit_nb.reports.integrity import integrity_facts
from rlhf_audit_nb.trail import Anchor

WITNESS = "witness.example/one+0a0b0c0d+BA=="
TSA = "CN=Time stamps,O=Example"


def told(*events, anchors=()):
    teller = story.Teller()
    story.created(teller)
    for event in events:
        teller.tell(event)
    verdict = story.verdict(teller.entries)
    verdict.anchors = anchors
    return Evidence(verdict, tuple(teller.entries))


def facts(evidence, label):
    return [fact for fact in integrity_facts(evidence) if fact.label == label]


def rotated(new):
    return KeyRotated(
        role="log", old="example.com/rlhf-audit+1c2b3a4d+AQ==", new=new, reason="yearly", signature="cw=="
    )


def test_a_trail_without_changes_has_one_key_and_nobody_who_vouches():
    found = [fact.label for fact in integrity_facts(told())]
    assert found == ["Origin", "Size", "Root", "Signed by", "Log key"]


def test_a_new_key_is_told_with_its_entry_and_its_reason():
    evidence = told(rotated("example.com/rlhf-audit+22222222+AQI="))
    (fact,) = facts(evidence, "New key")
    assert fact.value == "example.com/rlhf-audit+22222222+AQI="
    assert fact.cites[0].text == "#1"
    assert fact.note.endswith("the log key, which signs the trail, was replaced; yearly")


def test_a_signature_by_a_new_key_is_the_trails_own():
    new = "example.com/rlhf-audit+22222222+AQI="
    for events, said in (((rotated(new),), "the trail's own log key"), ((), new)):
        evidence = told(*events)
        evidence.verdict.signers = (new,)
        assert facts(evidence, "Signed by")[0].value == said


def test_a_revoked_key_is_told_with_how_far_it_counts():
    gone = KeyRevoked(role="record", key="cmVjb3Jk", since=7, reason="laptop stolen", signature="cw==")
    (fact,) = facts(told(gone), "Revoked key")
    assert fact.note == "counts for the first 7 entries only; laptop stolen"


def test_who_vouched_is_told_with_the_reach_and_the_rest():
    root = bytes(32)
    seen = (
        Anchor("cosignature", 1, root, 1_795_359_000, WITNESS, "anchors/1.cosigned"),
        Anchor("cosignature", 2, root, 1_795_359_060, WITNESS, "anchors/2.cosigned"),
        Anchor("timestamp", 3, root, 1_795_359_120, TSA, "anchors/3.tsa.tsr"),
    )
    evidence = told(rotated("example.com/rlhf-audit+22222222+AQI="), rotated("x"), anchors=seen)
    (cosigned,), (stamped,) = facts(evidence, "Cosigned by"), facts(evidence, "Timestamped by")
    assert cosigned.value == WITNESS
    assert cosigned.note.startswith("entries #0 to #1, at ")
    assert cosigned.note.endswith("; the newest entry is not covered")
    assert stamped.value == TSA
    assert stamped.note.startswith("all of it, at ")
    assert "not covered" not in stamped.note


def test_a_key_of_many_lines_is_told_by_its_name_and_id():
    long = "example.com/rlhf-audit+33333333+" + "Qm" * 800
    evidence = told(KeyRotated(role="mldsa", old=None, new=long, reason="", signature="cw=="))
    (fact,) = facts(evidence, "New key")
    assert fact.value == "example.com/rlhf-audit+33333333+…"
    assert fact.note.endswith("the second (ML-DSA-44) key was added")
