"""Tokens in the place of annotators: fresh in every table, undone by the vault alone, and on the record."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf_audit_nb.auditor import AuditableRLHF
from rlhf_audit_nb.config import AuditConfig, PrivacyConfig
from rlhf_audit_nb.errors import ConfigError, PrivacyError, StoreError, VaultError
from rlhf_audit_nb.events import AnnotatorReidentified, AnnotatorsTabulated, decode_body
from rlhf_audit_nb.privacy import pseudonyms
from rlhf_audit_nb.trail import Trail

PEOPLE = [f"annotator-{'qzxkvwjypf'[number]}-{number:03}" for number in range(8)]


@pytest.fixture
def auditor(tmp_path, monkeypatch) -> AuditableRLHF:
    """Eight people: each compared six answers, the first one the other way round; one answer twice as often."""
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    made = AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "audit")))
    rows = [(person, question) for question in range(6) for person in range(len(PEOPLE))]
    made.log_annotations(
        prompts=[f"Question {question}?" for _, question in rows],
        responses=[("yes", "no") for _ in rows],
        choices=["second" if person == 0 else "first" for person, _ in rows],
        shown=["first" if question < 3 else "second" for _, question in rows],
        annotator_ids=[PEOPLE[person] for person, _ in rows],
    )
    made.log_annotations(prompts=["Why?"], responses=["Because."], rewards=[4], annotator_ids=[PEOPLE[1]])
    made.log_annotations(prompts=["Who?"], responses=[("a", "b")], choices=["tie"], annotator_ids=None)
    return made


def by_person(auditor: AuditableRLHF, table: Any) -> dict[str, Any]:
    return {auditor.reidentify(row.token, reason="test", by="tester"): row for row in table.rows}


def test_a_row_a_person_with_what_she_did(auditor):
    table = auditor.annotator_statistics()
    assert (len(table.rows), table.unknown, table.erased, table.missing) == (8, 1, 0, 0)
    rows = by_person(auditor, table)
    odd, rater, other = rows[PEOPLE[0]], rows[PEOPLE[1]], rows[PEOPLE[2]]
    assert (odd.annotations, odd.comparisons, odd.agreement, odd.first_shown) == (6, 6, 0.0, 0.5)
    assert (rater.annotations, rater.comparisons, rater.rating) == (7, 6, 4.0)
    assert other.agreement == pytest.approx(6 / 7)
    assert (other.ties, other.undecided, other.rating) == (0.0, 0.0, None)


def test_agreement_does_not_depend_on_the_order_of_the_responses(auditor):
    for person, (pair, choice) in enumerate(((("left", "right"), "first"), (("right", "left"), "second"))):
        auditor.log_annotations(
            prompts=["Which?"], responses=[pair], choices=[choice], annotator_ids=[f"pair-{person}"]
        )
    rows = by_person(auditor, auditor.annotator_statistics())
    assert (rows["pair-0"].agreement, rows["pair-1"].agreement) == (1.0, 1.0)


def linked(first: Any, second: Any) -> bool:
    """Whether the rows of two tables can be put together by what they are called or how they are ordered."""
    codes = [{row.token.partition("-")[2] for row in table.rows} for table in (first, second)]
    return bool(codes[0] & codes[1]) or first.table == second.table


def test_two_tables_have_no_token_in_common(auditor):
    assert not linked(auditor.annotator_statistics(), auditor.annotator_statistics())


def test_a_token_that_stays_the_same_is_caught(auditor, monkeypatch):
    monkeypatch.setattr(pseudonyms.os, "urandom", bytes)
    assert linked(auditor.annotator_statistics(), auditor.annotator_statistics())


def test_whose_a_token_is_is_told_after_the_trail_says_who_asked(auditor):
    row = auditor.annotator_statistics().rows[0]
    assert auditor.reidentify(row.token, reason="a complaint", by="A. Keeper") in PEOPLE
    reader = auditor.trail.reader()
    (entry,) = reader.entries(type=AnnotatorReidentified.TYPE)
    event = decode_body(entry.type, entry.body)
    assert (event.reason, event.by) == ("a complaint", "A. Keeper")
    assert row.token.encode() not in entry.body
    assert auditor.verify().level.name == "UNANCHORED"


def order_of(auditor: AuditableRLHF, monkeypatch) -> list[str]:
    """What happens in a re-identification: the durable entry, and the answer."""
    seen: list[str] = []
    token = auditor.annotator_statistics().rows[0].token
    append = Trail.append

    def watched(self: Any, kind: str, *args: Any, **kwargs: Any) -> Any:
        pending = append(self, kind, *args, **kwargs)
        pending.wait()
        seen.append(kind)
        return pending

    monkeypatch.setattr(Trail, "append", watched)
    pseudonyms_answer = pseudonyms.reidentify(auditor.trail, token, reason="r", by="b")
    seen.append("answer")
    assert pseudonyms_answer in PEOPLE
    return seen


def test_the_entry_comes_before_the_answer(auditor, monkeypatch):
    assert order_of(auditor, monkeypatch) == [AnnotatorReidentified.TYPE, "answer"]


def refuses_without_the_entry(auditor: AuditableRLHF, monkeypatch) -> bool:
    token = auditor.annotator_statistics().rows[0].token

    class Fails:
        def wait(self) -> int:
            raise StoreError("The disk is full.", next_step="Free some space.")

    monkeypatch.setattr(Trail, "append", lambda self, *args, **kwargs: Fails())
    try:
        pseudonyms.reidentify(auditor.trail, token, reason="r", by="b")
    except StoreError:
        return True
    return False


def test_where_the_entry_cannot_be_written_there_is_no_answer(auditor, monkeypatch):
    assert refuses_without_the_entry(auditor, monkeypatch)


def test_an_answer_that_does_not_wait_for_its_entry_is_caught(auditor, monkeypatch):
    """A planted fault: the entry is queued, and the answer given at once."""

    def hasty(trail: Any, token: str, *, reason: str, by: str) -> str:
        reader = trail.reader()
        entry, event = next(pseudonyms._tables(reader, token))
        found = pseudonyms._owner_of(trail, reader, entry, event, token)
        trail.append(AnnotatorReidentified.TYPE, b"{}")
        return found

    monkeypatch.setattr(pseudonyms, "reidentify", hasty)
    assert not refuses_without_the_entry(auditor, monkeypatch)


def test_an_erased_annotator_has_no_row_and_her_token_means_nothing_any_more(auditor):
    before = by_person(auditor, auditor.annotator_statistics())
    token = before[PEOPLE[3]].token
    auditor.erase(PEOPLE[3], reason="request")
    with pytest.raises(VaultError) as refused:
        auditor.reidentify(token, reason="a complaint", by="A. Keeper")
    assert refused.value.reason == "unknown-token"
    assert PEOPLE[3] not in str(refused.value)
    table = auditor.annotator_statistics()
    assert (len(table.rows), table.erased) == (7, 6)
    assert auditor.reidentify(before[PEOPLE[4]].token, reason="a complaint", by="A. Keeper") == PEOPLE[4]


@pytest.mark.parametrize("token", ["", "nonsense", "00000000-aaaaaaaaaaaaaaaa"])
def test_an_unknown_token_is_one_sentence_and_writes_nothing(auditor, token):
    auditor.annotator_statistics()
    size = auditor.trail.reader().size
    with pytest.raises(VaultError, match="No annotator in the vault has this token"):
        auditor.reidentify(token, reason="r", by="b")
    assert auditor.trail.reader().size == size


@pytest.mark.parametrize("wrong", [{"reason": ""}, {"by": " "}, {"reason": "two\nlines"}, {"by": "x" * 501}])
def test_a_reason_and_a_name_are_needed(auditor, wrong):
    token = auditor.annotator_statistics().rows[0].token
    size = auditor.trail.reader().size
    with pytest.raises(ConfigError):
        auditor.reidentify(token, **{"reason": "r", "by": "b", **wrong})
    assert auditor.trail.reader().size == size


def test_the_table_of_an_import_has_only_its_annotators(auditor):
    done = auditor.log_annotations(
        prompts=["New?"], responses=[("a", "b")], choices=["first"], annotator_ids=["late"], guideline="v9"
    )
    table = auditor.annotator_statistics(done.import_id)
    assert list(by_person(auditor, table)) == ["late"]
    (*_, entry) = auditor.trail.reader().entries(type=AnnotatorsTabulated.TYPE)
    assert decode_body(entry.type, entry.body).import_id == done.import_id
    with pytest.raises(ConfigError, match="No import"):
        auditor.annotator_statistics("0" * 16)


def test_what_is_released_names_groups_and_what_shows_itself_has_no_row(auditor):
    table = auditor.annotator_statistics()
    released = table.release(5)
    assert [group.annotators for group in released.groups] == [8]
    assert released.overall["rating"] is None
    for row in table.rows:
        assert row.token not in repr(table) + str(released) + json.dumps(released.to_dict())


def test_under_a_privacy_budget_nothing_is_released(auditor, tmp_path):
    private = AuditableRLHF(privacy_config=PrivacyConfig(epsilon=1.0), audit_config=auditor.audit_config)
    table = private.annotator_statistics()
    assert len(table.rows) == 8
    with pytest.raises(PrivacyError) as refused:
        table.release()
    assert refused.value.reason == "not-for-release"
    assert auditor.annotator_statistics().release().groups
    auditor.set_budget(1.0, reason="a study", by="A. Keeper")
    with pytest.raises(PrivacyError):
        auditor.annotator_statistics().release()


def test_no_byte_of_the_public_side_holds_an_id_or_a_token(auditor, tmp_path):
    table = auditor.annotator_statistics()
    told = [auditor.reidentify(row.token, reason="a check", by="A. Keeper") for row in table.rows]
    assert sorted(told) == sorted(PEOPLE)
    report = tmp_path / "out" / "report.html"
    report.parent.mkdir()
    auditor.generate_compliance_report().save(report)
    shown = "".join((repr(table), str(table.release()), str(auditor.status()), repr(auditor), str(auditor.verify())))
    auditor.trail.flush()
    needles = [text.encode() for text in (*PEOPLE, *(row.token for row in table.rows))]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"trail.sqlite", "vault.sqlite", "report.html"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) > 50_000
    assert not [path for path in files for needle in needles if needle in path.read_bytes()]
    assert not [needle for needle in needles if needle in shown.encode()]
    files[0].write_bytes(files[0].read_bytes() + needles[0])  # the search finds what is there
    assert [path for path in files if needles[0] in path.read_bytes()] == [files[0]]
