from __future__ import annotations

import msgspec
import pytest
import report_story as story

from rlhf_audit_nb import events as ev
from rlhf_audit_nb.compliance import State, assess, load_framework
from rlhf_audit_nb.compliance.framework import Framework
from rlhf_audit_nb.errors import ReportError

FRAMEWORK = load_framework("eu_ai_act")

# What each query needs: the requirement that asks it, and the event type without which it must find nothing.
NEEDS = [
    ("AIA-A4-1c", "environment.captured"),
    ("AIA-A4-2a", "trainer.attached"),
    ("AIA-A4-2a", "train.step"),
    ("AIA-A4-2a", "data.bound"),
    ("AIA-A4-2a", "run.finished"),
    ("AIA-A4-2a", "model.bound"),
    ("AIA-A4-6", "model.bound"),
    ("AIA-15-5a", "weights.saved"),
    ("AIA-15-5a", "data.bound"),
    ("AIA-A11-1-1d", "model.bound"),
    ("AIA-A11-1-2c-iii", "data.bound"),
    ("AIA-A11-2-2", "trainer.attached"),
    ("AIA-A11-2-2", "train.step"),
    ("AIA-A12-1e", "environment.captured"),
    ("AIA-A12-1f", "model.bound"),
]


def line(assessment, name):
    return next(line for line in assessment.lines if line.requirement.id == name)


@pytest.mark.parametrize(("requirement", "kind"), NEEDS)
def test_a_requirement_is_evidenced_with_its_entries_and_missing_without_them(requirement, kind):
    whole = story.evidence(private=False)
    found = line(assess(whole, FRAMEWORK), requirement)
    assert found.state is State.EVIDENCED
    assert found.words
    assert found.entries
    assert any(whole.items[index].kind == kind for index in found.entries) or kind in {"train.step", "run.finished"}
    without = line(assess(story.evidence(private=False, leave_out=(kind,)), FRAMEWORK), requirement)
    assert without.state is State.MISSING
    assert without.entries == ()
    assert without.words


def test_every_evidenced_line_names_entries_that_exist_and_says_what_it_does_not_show():
    evidence = story.evidence()
    assessment = assess(evidence, FRAMEWORK)
    shown = [line for line in assessment.lines if line.state is State.EVIDENCED]
    assert len(shown) >= 7
    for one in shown:
        assert one.entries
        assert all(0 <= index < len(evidence.entries) for index in one.entries)
        assert one.not_shown


def test_weights_without_a_signature_do_not_evidence_integrity():
    teller = story.Teller()
    story.created(teller)
    story.train(teller, leave_out=("weights.saved",))
    teller.tell(ev.WeightsSaved(step=40, name="model", digest="d", files=1, bytes=1), story.RUN)
    assert line(assess(story.told(teller), FRAMEWORK), "AIA-15-5a").state is State.MISSING


def test_weights_that_did_not_change_are_no_change():
    teller = story.Teller()
    story.created(teller)
    story.train(teller, leave_out=("model.bound",))
    for role in ("base", "final"):
        teller.tell(
            ev.ModelBound(
                role=role, architecture="A", parameters=1, trainable=1, weights_digest="same", config_digest="c"
            ),
            story.RUN,
        )
    assert line(assess(story.told(teller), FRAMEWORK), "AIA-A4-6").state is State.MISSING


def test_the_number_of_rows_is_missing_while_it_is_sealed_and_stands_where_the_unit_is_a_pair():
    by_annotator = line(assess(story.evidence(), FRAMEWORK), "AIA-A11-1-2c-iii")
    assert by_annotator.state is State.MISSING
    assert "sealed" in by_annotator.words
    by_pair = line(assess(story.evidence(unit="pair"), FRAMEWORK), "AIA-A11-1-2c-iii")
    assert by_pair.state is State.EVIDENCED
    assert "99,173" in by_pair.words


def test_documentation_is_current_only_while_the_report_is_newer_than_the_training():
    teller = story.Teller()
    story.created(teller)
    story.train(teller, private=False)
    assert line(assess(story.told(teller), FRAMEWORK), "AIA-11-1b").state is State.MISSING
    teller.tell(ev.ReportCreated(format="html", digest="d", size=len(teller.entries), root="r"))
    found = line(assess(story.told(teller), FRAMEWORK), "AIA-11-1b")
    assert found.state is State.EVIDENCED
    assert found.entries == (len(teller.entries) - 1,)
    story.train(teller, run="second", private=False)
    assert line(assess(story.told(teller), FRAMEWORK), "AIA-11-1b").state is State.MISSING


@pytest.mark.parametrize("level", ["INVALID", "DIVERGED"])
def test_nothing_is_evidenced_by_a_trail_that_does_not_verify(level):
    assessment = assess(story.evidence(level=level), FRAMEWORK)
    assert assessment.count(State.EVIDENCED) == 0
    assert not any(one.entries or one.material for one in assessment.lines)
    assert "does not verify" in line(assessment, "AIA-A4-2a").words


@pytest.mark.parametrize("level", ["UNANCHORED", "TIMESTAMPED", "COSIGNED"])
def test_a_trail_that_verifies_evidences_the_same_whatever_its_level(level):
    assert assess(story.evidence(level=level), FRAMEWORK).lines == assess(story.evidence(), FRAMEWORK).lines


def test_the_same_evidence_gives_the_same_assessment():
    first, second = (assess(story.evidence(), FRAMEWORK).to_dict() for _ in range(2))
    assert msgspec.json.encode(first) == msgspec.json.encode(second)


def test_an_empty_trail_evidences_nothing_and_every_line_says_why():
    teller = story.Teller()
    story.created(teller)
    assessment = assess(story.told(teller), FRAMEWORK)
    assert assessment.count(State.EVIDENCED) == 0
    assert assessment.count(State.ATTESTED) == 0
    assert all(one.words for one in assessment.lines)


def test_material_that_helps_a_person_leaves_the_line_missing():
    found = line(assess(story.evidence(), FRAMEWORK), "AIA-10-2b")
    assert found.state is State.MISSING
    assert found.material
    assert found.entries == ()


def test_states_add_up_and_no_line_is_called_compliant():
    assessment = assess(story.evidence(), FRAMEWORK)
    counts = assessment.to_dict()["counts"]
    assert sum(counts.values()) == 197
    assert set(counts) == {"evidenced", "attested", "missing", "not applicable"}
    assert not any("compliant" in f"{one.words} {one.not_shown}".lower() for one in assessment.lines)


def test_a_framework_that_asks_for_a_query_we_do_not_have_is_refused():
    row = msgspec.structs.replace(FRAMEWORK.requirements[0], mode="automatic", query="telepathy", reason="r")
    other = Framework(id="x", title="x", law="", text_version="", text_date="", traps=[], requirements=[row])
    with pytest.raises(ReportError, match="telepathy"):
        assess(story.evidence(), other)


def test_a_run_that_was_interrupted_before_its_end_does_not_show_the_whole_development():
    evidence = story.evidence(status=None, settle=False)
    assert line(assess(evidence, FRAMEWORK), "AIA-A4-2a").state is State.MISSING
