"""People's signatures in reports and cards: who, as what, whether they count, and rejections first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import report_story as story
from cryptography.hazmat.primitives.asymmetric import ec
from signing_support import seal_text

from rlhf_audit_nb.cards import build_card
from rlhf_audit_nb.compliance import Evidence
from rlhf_audit_nb.events import RecordAttested
from rlhf_audit_nb.records import open_record
from rlhf_audit_nb.records.attesting import attest_record
from rlhf_audit_nb.records.dsse import key_id
from rlhf_audit_nb.records.signatures import Person
from rlhf_audit_nb.reports import build_compliance_report
from rlhf_audit_nb.reports.signed import signed_groups, signed_summary
from rlhf_audit_nb.trail import Level, Trail
from rlhf_audit_nb.trail.signers import FileKey

OFFICER, LEAD = "Name of the officer", "Name <b>of</b> the lead"
REFUSED = "The unit of privacy is not what was agreed."


@pytest.fixture(scope="module")
def keys():
    return [FileKey(ec.generate_private_key(ec.SECP256R1())) for _ in range(2)]


@pytest.fixture(scope="module")
def evidence(tmp_path_factory, keys):
    """A record that one person approved, and another first approved and then rejected."""
    folder = tmp_path_factory.mktemp("signed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_AUDIT_HOME", str(folder / "home"))
        with Trail.open(folder / "audit", origin="example.org/signed"):
            pass
        path = seal_text(folder / "audit", folder / "record.ipynb", "text")
        said = {"role": "compliance officer", "statement": "Read.", "home": folder / "home"}
        attest_record(path, keys[0], name=OFFICER, **said)
        attest_record(path, keys[1], name=LEAD, **{**said, "role": "lead"}, purpose="deployment")
        attest_record(path, keys[0], name=OFFICER, meaning="rejected", **{**said, "statement": REFUSED})
        return Evidence.from_record(open_record(path, home=folder / "home"))


def with_policy(evidence, keys):
    return replace(evidence, people=(Person(OFFICER, (key_id(keys[0].spki),), ("compliance officer",)),))


def test_a_rejection_is_read_first_and_each_signature_stands_by_itself(evidence):
    (first,) = signed_summary(evidence)
    assert first.label == "Rejected"
    assert REFUSED in first.value
    groups = signed_groups(evidence)
    assert [group.title for group in groups] == [f"{OFFICER}, compliance officer", f"{LEAD}, lead", groups[0].title]
    assert [(group.mark, group.state) for group in groups] == [
        ("approved; replaced by a later signature", "na"),
        ("approved", "na"),
        ("rejected", "bad"),
    ]
    facts = {fact.label: fact for fact in groups[1].facts}
    assert facts["For"].value == "deployment"
    assert "whose key this is, no file proves" in facts["Key"].note


def test_a_policy_says_whose_key_it_is(evidence, keys):
    notes = [{f.label: f for f in group.facts}["Key"].note for group in signed_groups(with_policy(evidence, keys))]
    assert notes[0] == notes[2] == "the policy names this key and this role"
    assert notes[1] == "it does not count: it is signed with a key that the policy does not name"
    assert [group.state for group in signed_groups(with_policy(evidence, keys))] == ["na", "na", "bad"]
    known = replace(evidence, people=(Person(LEAD, (key_id(keys[1].spki),), ("lead",)),))
    assert [group.state for group in signed_groups(known)] == ["na", "ok", "warn"]


@pytest.mark.parametrize("kind", ["html", "json"])
def test_every_format_shows_them_and_obeys_nothing_in_them(evidence, kind):
    text = build_compliance_report(evidence).content(kind).decode()
    assert REFUSED in text
    assert ("Name <b>of</b>" in text) is (kind == "json")
    assert build_compliance_report(evidence).content(kind).decode() == text
    assert "No person has signed this record." not in text


def test_the_pdf_is_made_with_them(evidence):
    assert build_compliance_report(evidence).content("pdf").startswith(b"%PDF")


def test_a_card_names_those_that_hold_now(evidence, keys):
    text = build_card(with_policy(evidence, keys)).text
    assert "Signed, rejected" in text
    assert f"rejected by {OFFICER} (compliance officer)" in text
    assert "a key that the policy does not name" in text
    assert text.count("Signed, approved") == 1  # the lead's; the officer's was replaced


def test_nothing_is_shown_of_what_does_not_hold(evidence):
    broken = replace(evidence, verdict=replace(evidence.verdict, level=Level.INVALID))
    assert signed_groups(broken) == ()
    assert signed_summary(broken) == []
    assert "Signed, " not in build_card(broken).text


def test_a_trails_report_tells_what_was_entered_without_names():
    teller = story.Teller()
    story.created(teller)
    teller.tell(
        RecordAttested(
            record="ab" * 16, digest="cd" * 32, payload="ef" * 32, meaning="rejected", role="lead", key="12" * 32
        )
    )
    (group,) = signed_groups(story.told(teller))
    assert [fact.label for fact in group.facts] == ["rejected as lead"]
    assert group.facts[0].cites[0].text == "#1"
    assert signed_groups(story.evidence()) == ()


def test_a_record_that_nobody_signed_says_so():
    model = build_compliance_report(story.evidence(with_notebook=True)).model
    assert "No person has signed this record." in model.limits
    assert model.signed == ()
