from __future__ import annotations

import hashlib

import msgspec
import pytest
import report_story as story

from rlhf_audit_nb import events as ev
from rlhf_audit_nb.compliance import Cite, Evidence, cite
from rlhf_audit_nb.compliance.facts import composed_privacy, run_facts
from rlhf_audit_nb.errors import ReportError
from rlhf_audit_nb.trail import Trail
from rlhf_audit_nb.trail.entry import Entry, Envelope, encode_envelope


def test_entries_that_follow_each_other_are_cited_as_one_stretch():
    assert cite([7]) == (Cite(7, 7),)
    assert cite([5, 4, 3, 2, 9]) == (Cite(2, 5, 4), Cite(9, 9))
    assert [one.text for one in cite([1, 2, 3])] == ["#1", "#2", "#3"]
    assert cite(range(10, 10_010))[0].text == "#10 to #10009 (10,000 entries)"


def test_scattered_entries_are_cited_by_their_ends_and_their_number():
    assert cite(range(0, 100, 2)) == (Cite(0, 98, 50),)


def test_a_leaf_hash_is_sha256_over_a_zero_byte_and_the_entry():
    item = story.evidence().items[3]
    assert item.leaf_hash == hashlib.sha256(b"\0" + item.entry.data).hexdigest()


def test_an_entry_of_an_unknown_type_is_reported_and_not_guessed():
    teller = story.Teller()
    story.created(teller)
    envelope = Envelope(v=1, type="future.event", time=1, run=None, seq=1, writer="w1", body=msgspec.Raw(b'{"a":1}'))
    teller.entries.append(Entry.decode(1, encode_envelope(envelope)))
    evidence = story.told(teller)
    assert [item.index for item in evidence.unknown] == [1]
    assert "future.event" in evidence.unknown[0].problem


def fill(trail: Trail, source: Evidence) -> None:
    for entry in source.entries[1:]:
        trail.append(entry.type, entry.body, run=entry.run, private=b'{"x":1}' if entry.envelope.sealed else None)
    trail.flush()


def test_evidence_of_a_real_trail_holds_its_verified_entries_and_checkpoint(tmp_path):
    with Trail.open(tmp_path / "audit", origin="example.com/t", home=tmp_path / "home") as trail:
        fill(trail, story.evidence(steps=5))
    evidence = Evidence.from_trail(tmp_path / "audit", home=tmp_path / "home")
    assert evidence.level == "UNANCHORED"
    assert evidence.trusted
    assert len(evidence.entries) == evidence.verdict.size
    assert evidence.checkpoint.startswith("example.com/t\n")
    assert run_facts(evidence)[0].started.experiment == "safety_alignment"


def test_evidence_of_a_trail_that_was_changed_is_not_trusted(tmp_path):
    import sqlite3

    with Trail.open(tmp_path / "audit", origin="example.com/t", home=tmp_path / "home") as trail:
        fill(trail, story.evidence(steps=5))
    store = sqlite3.connect(tmp_path / "audit" / "trail.sqlite")
    for (table,) in store.execute("select name from sqlite_master where type = 'table'").fetchall():
        for _, column, kind, *_ in store.execute(f"pragma table_info({table})").fetchall():
            if kind.upper() in {"BLOB", "LARGEBINARY"}:
                store.execute(
                    f"update {table} set {column} = replace({column}, cast('DPOTrainer' as blob), "
                    f"cast('KTOTrainer' as blob)) where instr({column}, cast('DPOTrainer' as blob)) > 0"
                )
    store.commit()
    store.close()
    evidence = Evidence.from_trail(tmp_path / "audit", home=tmp_path / "home")
    assert evidence.level == "INVALID"
    assert not evidence.trusted


def test_entries_other_than_the_verified_ones_are_refused(tmp_path, monkeypatch):
    with Trail.open(tmp_path / "audit", origin="example.com/t", home=tmp_path / "home") as trail:
        fill(trail, story.evidence(steps=5))
    from rlhf_audit_nb.trail import TrailReader

    real = TrailReader.entries
    monkeypatch.setattr(TrailReader, "entries", lambda self, *a, **k: list(real(self, *a, **k))[:-1])
    with pytest.raises(ReportError, match="changed while"):
        Evidence.from_trail(tmp_path / "audit", home=tmp_path / "home")


def composed(*runs):
    teller = story.Teller()
    story.created(teller)
    for number, settings in enumerate(runs):
        story.train(teller, run=f"run{number}-{number:028d}", **settings)
    facts = run_facts(story.told(teller))
    return facts, composed_privacy(facts)


def test_the_composed_total_is_the_newest_and_never_a_sum():
    _, total = composed({"spent": 3.0}, {"before": 3.0, "spent": 1.5})
    assert total.total == 4.5
    assert total.settled
    assert total.private_runs == 2


def test_a_reservation_that_was_never_settled_counts_in_full():
    facts, total = composed({"settle": False, "status": None, "spent": 1.0})
    assert total.total == 6.2041
    assert not total.settled
    assert facts[0].status == "open"


def test_a_run_without_privacy_is_covered_by_no_bound():
    facts, total = composed({}, {"private": False})
    assert [run.guarantee for run in facts] == ["bound", "none"]
    assert total.unbounded_runs == 1


def test_privacy_that_was_asked_for_but_never_reserved_gives_no_bound():
    facts, total = composed({"leave_out": ("privacy.reserved", "privacy.settled")})
    assert facts[0].guarantee == "asked"
    assert total.total is None
    assert total.unbounded_runs == 1


def test_figures_at_another_delta_are_not_compared():
    _, total = composed({"spent": 6.0, "delta": 1e-6}, {"spent": 2.0, "delta": 1e-5})
    assert total.delta == 1e-5
    assert total.total == 2.0
    assert total.other_deltas == (1e-6,)


def test_a_run_in_which_nothing_was_trained_spends_nothing():
    facts, total = composed({"leave_out": tuple(set(ev.EVENTS) - {"run.started", "run.finished"})})
    assert facts[0].guarantee == "untrained"
    assert total.total is None
    assert total.unbounded_runs == 0


def test_an_interrupted_run_is_said_to_be():
    teller = story.Teller()
    story.created(teller)
    story.train(teller, status=None, settle=False)
    teller.tell(ev.RunInterrupted(run=story.RUN, last_sequence=3))
    assert run_facts(story.told(teller))[0].status == "interrupted"
