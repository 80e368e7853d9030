"""Annotations in the trail: private but for their number, whole or announced as not, each annotator's own to erase."""

from __future__ import annotations

import base64
import csv
import gzip
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from support.tiny import shared_folder
from support.trails import events, kinds

from rlhf_audit_nb import AuditableRLHF, AuditConfig, PrivacyConfig
from rlhf_audit_nb.capture.annotations import DAY_US, import_owner, read_annotations
from rlhf_audit_nb.errors import AuditError, ConfigError, DataError, StoreError
from rlhf_audit_nb.events import Annotation, AnnotationRecorded, AnnotationsImported, Step, StepPrivate
from rlhf_audit_nb.trail import TrailReader, Vault, verify_trail
from rlhf_audit_nb.trail.erasure import erase

PAIR = ("one answer", "another answer")
VOTES = {
    "prompts": ["question one", "question two", "question three"],
    "responses": [PAIR, PAIR, PAIR],
    "choices": ["first", "second", "tie"],
    "annotator_ids": ["worker-17", "worker-23", "worker-17"],
}


@pytest.fixture
def auditor(tmp_path):
    return AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "audit")))


def public_bytes(held):
    return b"".join(entry.data for entry in held.trail.reader().entries())


def recorded(held, run=None):
    return list(held.trail.reader().entries(type=AnnotationRecorded.TYPE, run=run))


# --- writing ---------------------------------------------------------------------------------------------------------


def test_what_was_logged_comes_back_in_its_order(auditor):
    done = auditor.log_annotations(**VOTES, guideline="v3", made_at=["t1", "t2", "t3"])
    assert (done.rows, done.last - done.first) == (3, 2)
    found = list(auditor.annotations(done.import_id))
    assert [item.index for item in found] == [done.first, done.first + 1, done.last]
    assert found[1].annotation == Annotation(
        prompt="question two",
        responses=list(PAIR),
        choice=1,
        guideline="v3",
        made_at="t2",
        annotator="worker-23",
    )
    assert [item.annotation.annotator for item in found] == VOTES["annotator_ids"]
    assert verify_trail(auditor.trail.location).level.name == "UNANCHORED"


def test_an_entry_in_the_open_names_its_import_and_says_nothing_else(auditor):
    done = auditor.log_annotations(
        **VOTES, made_at=["2016-01-31", "2016-02-01", "2016-02-02"], extra={"why": ["xyz"] * 3}
    )
    for entry in recorded(auditor):
        assert json.loads(entry.body) == {"import_id": done.import_id}
        assert len(base64.b64decode(entry.envelope.sealed)) == 32
    assert len({entry.envelope.sealed for entry in recorded(auditor)}) == 3
    seen = public_bytes(auditor)
    for word in (b"question", b"answer", b"worker", b"2016", b"xyz", b"tie", b"first"):
        assert word not in seen
    stored = (auditor.trail.location / "vault.sqlite").read_bytes()
    for word in (b"question", b"another answer", b"worker-17"):
        assert word not in stored


def test_equal_annotations_have_commitments_that_differ(auditor):
    auditor.log_annotations(responses=[PAIR] * 2, choices=["tie"] * 2, annotator_ids=["u", "u"])
    first, second = recorded(auditor)
    assert first.envelope.sealed != second.envelope.sealed


def test_the_length_of_what_was_said_does_not_show(auditor):
    auditor.log_annotations(responses=["a", "a" * 5000], rewards=[1, 1], annotator_ids=["u", "v"])
    first, second = recorded(auditor)
    assert len(first.data) == len(second.data)


def test_entries_tell_the_day_and_not_the_hour(tmp_path, auditor):
    auditor.log_annotations(**VOTES)
    stream = {entry.stream: entry.time for entry in auditor.trail.reader().entries(0, 1)}
    for entry in recorded(auditor):
        assert entry.time % DAY_US == 0 or entry.time == stream[entry.stream]


def test_all_of_them_are_in_the_trail_when_the_call_returns(auditor):
    auditor.trail.flush()
    done = auditor.log_annotations(**VOTES)
    assert TrailReader.open(auditor.trail.location).size == done.last + 1


def test_a_bad_row_leaves_nothing_behind(auditor):
    before = auditor.trail.status().size
    with pytest.raises(DataError, match="Row 2: the annotator id is missing"):
        auditor.log_annotations(**{**VOTES, "annotator_ids": ["a", None, "b"]})
    auditor.trail.flush()
    assert auditor.trail.status().size == before
    assert recorded(auditor) == []


def test_one_by_one_they_belong_to_one_import_that_does_not_say_how_many_come(auditor):
    done = [
        auditor.log_annotations(prompts="p", responses=PAIR, choices="first", annotator_ids=f"w{n % 2}", guideline="v3")
        for n in range(5)
    ]
    (header,) = events(auditor.trail, AnnotationsImported)
    assert header.rows is None
    assert {item.import_id for item in done} == {header.import_id}
    assert len(recorded(auditor)) == 5
    auditor.log_annotations(prompts="p", responses=PAIR, choices="first", annotator_ids="w1", guideline="v4")
    assert [item.guideline for item in events(auditor.trail, AnnotationsImported)] == ["v3", "v4"]


def test_inside_a_run_they_are_the_runs_and_outside_the_trails(auditor):
    outside = auditor.log_annotations(**VOTES)
    with auditor.track_training("feedback") as run:
        inside = auditor.log_annotations(**VOTES)
    assert inside.import_id != outside.import_id
    assert kinds(auditor.trail, run.id)[2:6] == ["annotations.imported", *["annotation.recorded"] * 3]
    assert [entry.index for entry in recorded(auditor, run.id)] == [*range(inside.first, inside.last + 1)]
    assert [item.run for item in auditor.annotations()] == [None] * 3 + [run.id] * 3
    assert [item.index for item in auditor.annotations(run=run.id)] == [*range(inside.first, inside.last + 1)]
    verdict = auditor.verify()
    assert (verdict.level.name, [found.run for found in verdict.runs]) == ("UNANCHORED", [run.id])


def test_a_run_on_another_trail_does_not_take_them(auditor, tmp_path):
    other = AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "other")))
    with other.track_training("elsewhere"):
        auditor.log_annotations(**VOTES)
    assert [entry.run for entry in recorded(auditor)] == [None] * 3
    assert recorded(other) == []


# --- sources ---------------------------------------------------------------------------------------------------------


def test_a_file_and_a_data_set_come_in_with_their_number_and_a_private_digest(auditor, tmp_path):
    rows = [
        {"prompt": p, "chosen": "a", "rejected": "b", "annotator_id": w}
        for p, w in zip(VOTES["prompts"], VOTES["annotator_ids"], strict=True)
    ]
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from_file = auditor.log_annotations(path)
    from_data = auditor.log_annotations(Dataset.from_list(rows))
    one, two = ([item.annotation for item in auditor.annotations(done.import_id)] for done in (from_file, from_data))
    assert one == two
    assert len(one) == 3
    headers = events(auditor.trail, AnnotationsImported)
    assert [(header.form, header.rows, header.digests) for header in headers] == [("jsonl", 3, []), ("dataset", 3, [])]
    entry = next(iter(auditor.trail.reader().entries(type=AnnotationsImported.TYPE)))
    payload = auditor.trail.vault.half(entry).payload
    assert json.loads(payload)["names"] == ["votes.jsonl"]
    assert json.loads(payload)["digests"][0].encode() not in public_bytes(auditor)


def test_dicts_of_a_program_need_their_columns_named(auditor):
    rows = [{"q": "p", "answer": "a", "stars": 4, "who": "u"}]
    columns = {"prompt": "q", "response": "answer", "reward": "stars", "annotator_id": "who"}
    auditor.log_annotations(rows, columns=columns)
    (item,) = auditor.annotations()
    assert events(auditor.trail, AnnotationsImported)[0].rows is None
    auditor.log_annotations(rows, columns=columns, drawn_from=__file__)
    assert events(auditor.trail, AnnotationsImported)[1].rows == 1
    assert item.annotation == Annotation(prompt="p", responses=["a"], reward=4, annotator="u")
    assert item.to_dict()["annotation"]["reward"] == 4


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"responses": [PAIR], "choices": ["tie"]}, "annotator_ids is missing"),
        ({**VOTES, "columns": {"prompt": "p"}}, "columns is given"),
        ({"data": [{"a": 1}], "prompts": ["p"]}, "prompts is given beside a source"),
        ({"data": [{"a": 1}], "annotator_ids": ["p"]}, "annotator_ids is given beside a source"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(auditor, arguments, complaint):
    with pytest.raises(ConfigError, match=complaint):
        auditor.log_annotations(**arguments)
    assert recorded(auditor) == []


def test_that_nobody_knows_the_annotators_is_said_and_recorded(auditor):
    done = auditor.log_annotations(
        [{"chosen": "a", "rejected": "b", "annotator_id": "somebody"}], annotator_ids=None, shown="first"
    )
    (header,) = events(auditor.trail, AnnotationsImported)
    assert header.provenance == {
        "annotator": "unknown",
        "choice": "recorded",
        "guideline": "unknown",
        "made_at": "unknown",
        "prompt": "unknown",
        "responses": "recorded",
        "shown": "stated",
    }
    assert erase(auditor.trail, import_owner(done.import_id), reason="request").openings == 1


def test_a_private_auditor_publishes_no_digest_of_its_data(tmp_path):
    held = AuditableRLHF(
        privacy_config=PrivacyConfig(epsilon=1.0), audit_config=AuditConfig(trail=str(tmp_path / "audit"))
    )
    rows = Dataset.from_list([{"chosen": "a", "rejected": "b", "annotator_id": "u"}])
    with pytest.raises(ConfigError, match="public_digest"):
        held.log_annotations(rows, public_digest=True)
    held.log_annotations(rows)
    assert events(held.trail, AnnotationsImported)[0].digests == []


# --- reading ---------------------------------------------------------------------------------------------------------


def test_an_erased_annotator_is_gone_and_the_others_stay(auditor):
    auditor.log_annotations(**VOTES)
    erase(auditor.trail, "worker-17", reason="withdrawn")
    found = list(auditor.annotations())
    assert [item.state for item in found] == ["erased", "open", "erased"]
    assert [item.annotation.annotator for item in found if item.annotation] == ["worker-23"]
    verdict = verify_trail(auditor.trail.location)
    assert (verdict.level.name, verdict.reasons) == ("UNANCHORED", ())
    assert verdict.openings is not None
    assert (verdict.openings["erased"], verdict.openings["missing"]) == (2, 0)


def test_an_opening_that_is_lost_is_missing_and_not_erased(auditor):
    import sqlite3

    auditor.log_annotations(**VOTES)
    lost = base64.b64decode(recorded(auditor)[1].envelope.sealed)
    with sqlite3.connect(auditor.trail.location / "vault.sqlite") as vault:
        vault.execute("DELETE FROM openings WHERE commitment = ?", (lost,))
    vault.close()
    assert [item.state for item in auditor.annotations()] == ["open", "missing", "open"]
    assert "opening-missing" in [reason.code for reason in auditor.verify().reasons]


def test_without_a_vault_all_are_missing_and_none_is_made(auditor):
    auditor.log_annotations(**VOTES)
    auditor.trail.close()
    for file in auditor.trail.location.glob("vault.sqlite*"):
        file.unlink()
    reader, gone = TrailReader.open(auditor.trail.location), Vault(auditor.trail.vault.path, auditor.trail.keys.master)
    assert [item.state for item in read_annotations(reader, gone)] == ["missing"] * 3
    assert not list(auditor.trail.location.glob("vault.sqlite*"))


def test_they_can_be_read_while_a_run_goes_on_sealing(auditor):
    auditor.log_annotations(**VOTES)
    with auditor.track_training("meanwhile") as run:
        for number in range(200):
            run.record(Step(step=number), StepPrivate(metrics={"loss": 0.5}))
            if number % 20 == 0:
                assert [item.state for item in auditor.annotations()] == ["open"] * 3
    assert auditor.verify().level.name == "UNANCHORED"


def test_showing_an_annotation_does_not_say_what_it_says(auditor):
    auditor.log_annotations(**VOTES)
    item = next(iter(auditor.annotations()))
    assert "question" not in repr(item)
    assert "question one" in json.dumps(item.to_dict())


def test_imports_are_counted_without_a_key(auditor):
    done = auditor.log_annotations(**VOTES, guideline="v3")
    (summary,) = auditor.annotation_imports()
    assert (summary.import_id, summary.recorded, summary.rows, summary.complete) == (done.import_id, 3, None, True)
    assert (summary.kind, summary.form, summary.guideline) == ("comparison", "values", "v3")
    assert json.dumps(summary.to_dict())


def test_an_import_that_was_cut_short_shows_as_not_complete(auditor, monkeypatch):
    rows = Dataset.from_list([{"chosen": "a", "rejected": "b", "annotator_id": "u"}] * 4)
    whole = auditor.trail.append_many

    def half(drafts):
        whole(draft for _, draft in zip(range(3), drafts, strict=False))
        raise StoreError("The disk is full.", code="full")

    monkeypatch.setattr(auditor.trail, "append_many", half)
    with pytest.raises(StoreError):
        auditor.log_annotations(rows)
    (summary,) = auditor.annotation_imports()
    assert (summary.rows, summary.recorded, summary.complete) == (4, 2, False)


CHILD = """
import sys
from rlhf_audit_nb import AuditableRLHF, AuditConfig

held = AuditableRLHF(audit_config=AuditConfig(trail=sys.argv[1]))
rows = 60_000
held.log_annotations(
    responses=[("a", "b")] * rows, choices=["tie"] * rows, annotator_ids=[f"w{n % 50}" for n in range(rows)],
    drawn_from=sys.argv[2],
)
"""


@pytest.mark.slow
def test_an_import_that_is_killed_leaves_whole_groups_and_says_how_many_there_are(tmp_path):
    folder = tmp_path / "audit"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder), __file__], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "trail.sqlite").exists() or not size_of(folder) > 2:
            assert child.poll() is None, "the import ended before it could be killed"
            assert time.monotonic() < deadline, "the import wrote nothing"
            time.sleep(0.002)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    held = AuditableRLHF(audit_config=AuditConfig(trail=str(folder)))
    (summary,) = held.annotation_imports()
    assert summary.rows == 60_000
    assert 0 < summary.recorded < 60_000
    assert not summary.complete
    assert held.verify().level.name == "UNANCHORED"
    assert {item.state for item in held.annotations()} == {"open"}
    again = held.log_annotations(responses=[PAIR], choices=["tie"], annotator_ids=["w1"])
    assert again.first >= summary.recorded + 2


def size_of(folder):
    try:
        return TrailReader.open(folder).size
    except AuditError:
        return 0  # the trail is being made


# --- the real thing --------------------------------------------------------------------------------------------------


def read_csv(path: Path) -> dict[str, list[str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    return {name: list(column) for name, column in zip(header, zip(*rows, strict=True), strict=True)}


@pytest.fixture(scope="module")
def votes():
    """All votes of UKPConvArg1 with the texts that they compare."""
    folder = shared_folder() / "data" / "ukpconvarg1"
    arguments, judgments = (read_csv(folder / f"{name}.csv.gz") for name in ("arguments", "judgments"))
    texts = dict(zip(arguments["arg_id"], arguments["text"], strict=True))
    prompts = {
        name: f"Debate: {title}\nArgue for: {stance}"
        for name, title, stance in zip(arguments["arg_id"], arguments["debate_title"], arguments["stance"], strict=True)
    }
    given = {
        "prompts": [prompts[name] for name in judgments["arg1"]],
        "responses": [(texts[a], texts[b]) for a, b in zip(judgments["arg1"], judgments["arg2"], strict=True)],
        "choices": judgments["value"],
        "annotator_ids": judgments["annotator_id"],
        "made_at": judgments["submitted_at"],
        "extra": {"reason": judgments["reason"], "row_id": judgments["row_id"]},
        "words": {"a1": "first", "a2": "second", "equal": "tie"},
        "drawn_from": [folder / "judgments.csv.gz", folder / "arguments.csv.gz"],
    }
    return judgments, given


@pytest.mark.slow
def test_all_84445_votes_can_be_replayed_and_every_one_opens(votes, tmp_path):
    judgments, given = votes
    held = AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "audit")))
    done = held.log_annotations(**given)
    assert done.rows == len(judgments["value"]) == 84_445
    verdict = held.verify()
    assert (verdict.level.name, verdict.size) == ("UNANCHORED", 84_447)
    found = list(held.annotations())
    assert {item.state for item in found} == {"open"}  # each was checked against its commitment
    assert [item.index for item in found] == [*range(done.first, done.last + 1)]
    opened = [item.annotation for item in found]
    choices = {"a1": 0, "a2": 1, "equal": "tie"}
    assert [half.choice for half in opened] == [choices[value] for value in judgments["value"]]
    assert Counter(half.annotator for half in opened) == Counter(judgments["annotator_id"])
    assert Counter(half.choice for half in opened) == {0: 32_849, 1: 32_491, "tie": 19_105}
    for place in (0, 1, 40_000, 84_444):
        assert opened[place] == Annotation(
            prompt=given["prompts"][place],
            responses=list(given["responses"][place]),
            choice=choices[judgments["value"][place]],
            made_at=judgments["submitted_at"][place],
            annotator=judgments["annotator_id"][place],
            extra={"reason": judgments["reason"][place], "row_id": judgments["row_id"][place]},
        )
    (header,) = events(held.trail, AnnotationsImported)
    assert (header.rows, header.provenance["shown"], header.provenance["guideline"]) == (84_445, "unknown", "unknown")
    seen = public_bytes(held)
    for worker in sorted(set(judgments["annotator_id"]))[::400]:
        assert worker.encode() not in seen
