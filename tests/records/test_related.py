"""A record cannot hide the thresholds and evaluations of another notebook of its trail on the same metrics."""

from __future__ import annotations

import json

import nbformat
import pytest
from records_support import policy_of, sealed_record

from rlhf_audit_nb.compliance.evidence import Evidence
from rlhf_audit_nb.compliance.thresholds import evaluations
from rlhf_audit_nb.events import EvaluationRecorded, ThresholdSealed, encode_body
from rlhf_audit_nb.records import read_record, session
from rlhf_audit_nb.records.session import Outcome, RecordSession, record_entries
from rlhf_audit_nb.trail import Level, Trail, TrailReader

MODEL = "ab" * 32


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHF_AUDIT_TRAIL", raising=False)
    with Trail.open(tmp_path / "audit"):
        pass
    return tmp_path / "audit"


def threshold(metric, bound, record=None):
    return ThresholdSealed(metric=metric, relation=">=", bound=bound, record=record)


def evaluation(record=None, **metrics):
    return EvaluationRecorded(metrics=metrics, identified="stated", stated_digest=MODEL, record=record)


def tell(folder, *events):
    with Trail.open(folder) as trail:
        return [trail.append(event.TYPE, encode_body(event)).wait() for event in events]


def record(folder, *events):
    """A record whose notebook wrote these events (callables that take the record's id)."""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("text", id="a")])
    making = RecordSession.begin(nb, {"name": "k", "language": "r", "display_name": "K"}, folder)
    try:
        tell(folder, *(event(making.record) for event in events))
        making.seal(nb, Outcome("completed"))
    finally:
        making.close()
    return json.loads(nbformat.writes(nb))


def opened(folder, made, home="v"):
    data = json.dumps(made).encode()
    return read_record(data, policy=policy_of(folder), home=folder.parent / home)


def carried(made):
    return [item["index"] for item in made["metadata"]["rlhf_audit"]["entries"]]


def test_a_record_carries_what_others_said_of_its_metrics_before_and_while_it_ran(folder):
    first = record(folder, lambda r: threshold("accuracy", 0.9, r), lambda r: evaluation(r, accuracy=0.5, f1=0.1))
    outside = tell(folder, threshold("accuracy", 0.8), threshold("loss", 1.0), evaluation(f1=0.2))
    second = record(
        folder,
        lambda r: threshold("accuracy", 0.4, r),
        lambda _: evaluation(None, accuracy=0.7, other=1.0),
        lambda r: evaluation(r, accuracy=0.5),
    )
    after = tell(folder, threshold("accuracy", 0.1))
    found = opened(folder, second)
    assert (found.verdict.level, found.verdict.reasons) == (Level.UNANCHORED, ())
    told = [entry for entry in found.entries if entry.type.startswith("evaluation.")]
    assert [json.loads(entry.body).get("bound") or json.loads(entry.body)["metrics"] for entry in told] == [
        0.9,
        {"accuracy": 0.5, "f1": 0.1},
        0.8,
        0.4,
        {"accuracy": 0.7, "other": 1.0},
        {"accuracy": 0.5},
    ]
    assert outside[0] in carried(second)
    assert not {outside[1], outside[2], after[0]} & set(carried(second))
    assert (found.sealed.related, len(found.sealed.related_digest)) == (4, 64)
    assert opened(folder, first).sealed.related == 0


def test_a_record_that_evaluated_nothing_carries_nothing_of_others(folder):
    tell(folder, threshold("accuracy", 0.8))
    made = sealed_record(folder)
    assert opened(folder, made).sealed.related == 0
    assert len(carried(made)) == 3


def test_the_assessment_of_the_record_weighs_what_others_had_said(folder):
    """A lowered threshold is shown with the stricter one before it, and what was known before is known."""
    tell(folder, threshold("accuracy", 0.9))
    lowered = record(folder, lambda r: threshold("accuracy", 0.4, r), lambda r: evaluation(r, accuracy=0.5))
    (done,) = evaluations(Evidence.from_record(opened(folder, lowered))).done
    (judged,) = done.judgements
    assert (judged.threshold.bound, judged.outcome) == (0.4, "met")
    assert [(one.bound, reached) for one, reached in judged.changed] == [(0.9, False)]
    late = record(folder, lambda r: threshold("accuracy", 0.5, r), lambda r: evaluation(r, accuracy=0.5))
    found = evaluations(Evidence.from_record(opened(folder, late)))
    (done,) = found.done  # the other record's is weighed, and not told of by itself
    (judged,) = done.judgements
    assert (judged.order, judged.outcome, judged.known_since) == ("after result", "not judged", 4)
    assert found.unused == ()


# -- what a key-holder tries ------------------------------------------------------------------------------------


def test_what_a_key_holder_leaves_out_is_told_where_the_trail_is_at_hand(folder, monkeypatch, tmp_path):
    tell(folder, threshold("accuracy", 0.9))
    monkeypatch.setattr(session, "related_in", lambda *_: [])
    made = record(folder, lambda r: threshold("accuracy", 0.4, r), lambda r: evaluation(r, accuracy=0.5))
    monkeypatch.undo()
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path.parent)
    alone = opened(folder, made)
    assert (alone.verdict.level, alone.verdict.reasons) == (Level.UNANCHORED, ())
    monkeypatch.chdir(tmp_path)
    (reason,) = opened(folder, made).verdict.reasons
    assert (reason.code, reason.where) == ("related", "metadata.rlhf_audit.entries")
    assert "entry 1" in reason.message


def test_what_was_left_out_after_the_entry_of_the_seal_is_told_by_the_file_alone(folder, monkeypatch, tmp_path):
    """Whoever signs with the record key again, with one entry less, has the seal's own entry against him."""
    tell(folder, threshold("accuracy", 0.9), threshold("accuracy", 0.8))
    kept = session.record_entries

    def fewer(reader, record_id):
        return [entry for entry in kept(reader, record_id) if entry.index != 1]

    monkeypatch.setattr(session, "record_entries", fewer)
    made = record(folder, lambda r: threshold("accuracy", 0.4, r))
    monkeypatch.chdir(tmp_path.parent)
    (reason,) = opened(folder, made).verdict.reasons
    assert (reason.code, reason.where) == ("related", "metadata.rlhf_audit.entries")
    assert "counts 2 thresholds and evaluations of other notebooks" in reason.message


def test_a_threshold_on_another_metric_is_no_part_of_a_record(folder, monkeypatch, tmp_path):
    (index,) = tell(folder, threshold("loss", 0.9))
    kept = session.record_entries

    def more(reader, record_id):
        extra = list(reader.entries(index, index + 1))
        return sorted([*kept(reader, record_id), *extra], key=lambda entry: entry.index)

    monkeypatch.setattr(session, "record_entries", more)
    made = record(folder, lambda r: threshold("accuracy", 0.4, r))
    (reason,) = opened(folder, made).verdict.reasons
    assert (reason.code, reason.where) == ("foreign-entry", "metadata.rlhf_audit.entries[1]")


def test_what_a_record_carries_can_be_read_from_the_trail_later(folder):
    tell(folder, threshold("accuracy", 0.9))
    made = record(folder, lambda r: threshold("accuracy", 0.4, r))
    tell(folder, threshold("accuracy", 0.1))
    entries = record_entries(TrailReader.open(folder), made["metadata"]["rlhf_audit"]["record"])
    assert [entry.index for entry in entries] == carried(made)
