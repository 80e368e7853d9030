"""A cell that is run twice, out of order, or edited in between: the trail shows each, and every cell before it."""

from __future__ import annotations

import json

import pytest
from IPython.core.interactiveshell import InteractiveShell
from support.trails import events, private_half

from rlhf_audit_nb.auditor import AuditableRLHF
from rlhf_audit_nb.capture.cells import MAX_EXECUTED, CellContext, audited_cell
from rlhf_audit_nb.compliance import Evidence
from rlhf_audit_nb.compliance.facts import run_facts
from rlhf_audit_nb.config import AuditConfig
from rlhf_audit_nb.events import CellAudited, ExecutedCell, RunFailure, encode_body
from rlhf_audit_nb.records.normal_form import text_digest
from rlhf_audit_nb.reports.runs import run_part
from rlhf_audit_nb.trail import Trail

AUDITED = "%%audit_train --experiment cells\npass"
EDITED = "%%audit_train --experiment cells\npass  # edited"


@pytest.fixture(scope="module")
def session():
    shell = InteractiveShell.instance(colors="nocolor")
    yield shell
    InteractiveShell.clear_instance()


@pytest.fixture
def shell(session, tmp_path, monkeypatch):
    """A shell in which a cell ran before the extension was loaded."""
    monkeypatch.chdir(tmp_path)
    session.reset(new_session=True)
    run(session, "before = 1", "cell-a")
    run(session, "%load_ext rlhf_audit_nb", "cell-b")
    yield session
    session.run_cell("%unload_ext rlhf_audit_nb")


@pytest.fixture
def trail(shell, tmp_path):
    return AuditableRLHF(audit_config=AuditConfig(trail=str(tmp_path / "audit"))).trail


def run(shell, source, cell=None):
    return shell.run_cell(source, store_history=True, cell_id=cell)


def told(event):
    return [(one.count, one.cell, one.status) for one in event.executed]


def test_a_cell_names_itself_and_every_cell_before_it(shell, trail):
    run(shell, "x = 1", "cell-c")
    run(shell, "1 / 0", "cell-d")
    run(shell, AUDITED, "cell-e")
    (event,) = events(trail, CellAudited)
    assert (event.cell, event.execution_count, event.seen, event.seen_in) == ("cell-e", 5, "first", None)
    assert told(event) == [
        (1, None, "unknown"),
        (2, "cell-b", "ok"),
        (3, "cell-c", "ok"),
        (4, "cell-d", "error"),
    ]
    sources = ["before = 1", "%load_ext rlhf_audit_nb", "x = 1", "1 / 0"]
    assert [one.source_digest for one in event.executed] == [text_digest(source) for source in sources]
    assert event.source_digest == text_digest(AUDITED)
    assert event.executed_total == 4


def test_running_it_twice_out_of_order_and_edited_is_visible(shell, trail):
    run(shell, AUDITED, "cell-e")
    run(shell, "x = 2", "cell-c")
    run(shell, AUDITED, "cell-e")
    run(shell, "x = 1", "cell-c")  # edited, and above in the notebook
    run(shell, EDITED, "cell-e")
    run(shell, EDITED, "cell-f")
    first, again, edited, other = events(trail, CellAudited)
    entries = [entry.index for entry in trail.reader().entries(type=CellAudited.TYPE)]
    assert [event.seen for event in (first, again, edited, other)] == ["first", "rerun", "edited", "first"]
    assert [event.seen_in for event in (again, edited, other)] == [entries[0], entries[1], None]
    assert [event.audited_before for event in (first, again, edited, other)] == [0, 1, 2, 0]
    changed = [one.source_digest for one in edited.executed if one.cell == "cell-c"]
    assert changed == [text_digest("x = 2"), text_digest("x = 1")]
    assert [one.count for one in edited.executed] == list(range(1, 7))


def test_without_ids_only_the_same_source_counts_as_the_same_cell(shell, trail):
    for source in (AUDITED, EDITED, AUDITED):
        run(shell, source)
    assert [event.seen for event in events(trail, CellAudited)] == ["first", "first", "rerun"]
    assert {event.cell for event in events(trail, CellAudited)} == {None}


def test_an_id_that_is_an_address_is_not_told(shell, trail):
    run(shell, AUDITED, "vscode-notebook-cell:/home/somebody/x.ipynb#W0")
    (event,) = events(trail, CellAudited)
    assert event.cell is None
    assert not any(b"somebody" in entry.data for entry in trail.reader().entries())


def test_a_private_run_seals_what_ran_before(shell, trail):
    run(shell, "votes = ['the only vote of person-3']", "cell-c")
    run(shell, AUDITED.replace("cells", "private --epsilon 5"), "cell-e")
    (event,) = events(trail, CellAudited)
    (entry,) = trail.reader().entries(type=CellAudited.TYPE)
    assert (event.cell, event.seen, event.executed, event.executed_total) == ("cell-e", "first", [], 0)
    assert event.executed_digest is None
    half = private_half(trail, entry)
    assert [one.cell for one in half.executed][-1] == "cell-c"
    digest = text_digest("votes = ['the only vote of person-3']").encode()
    assert not any(digest in entry.data for entry in trail.reader().entries())


def test_a_long_history_lies_beside_the_trail_by_its_digest(tmp_path):
    ran = tuple(ExecutedCell(count=n, source_digest=text_digest(str(n)), cell="c" * 64) for n in range(1, 1001))
    with Trail.open(tmp_path / "audit") as trail:
        event, half = audited_cell(trail, CellContext("0" * 64, "x", 1001, ran), private=False)
        listed = json.loads((trail.artifacts / f"{event.executed_digest}.json").read_bytes())
    assert half is None
    assert (event.executed_total, len(event.executed), event.executed[-1].count) == (1000, MAX_EXECUTED, 1000)
    assert [one["count"] for one in listed] == list(range(1, 1001))
    assert len(encode_body(event)) < 60_000


def test_a_traceback_names_the_cells_of_the_notebook(shell, trail):
    run(shell, "def fails():\n    raise LookupError('a row')", "cell-c")
    run(shell, "%%audit_train --experiment cells\nfails()", "cell-e")
    (failure,) = events(trail, RunFailure)
    places = [(frame.role, frame.where, frame.function, frame.line) for frame in failure.frames]
    assert places[-2:] == [("cell", "In[4]", "<module>", 1), ("cell", "In[3]", "fails", 2)]
    assert all(role == "audit" for role, *_ in places[:-2])


def test_the_report_says_how_the_cell_came_to_run_and_what_ended_it(shell, trail, tmp_path):
    run(shell, AUDITED, "cell-e")
    run(shell, EDITED + "\nraise LookupError", "cell-e")
    facts = run_facts(Evidence.from_trail(tmp_path / "audit"))
    first, second = [{fact.label: fact for fact in run_part(one, trusted=True).facts} for one in facts]
    assert first["Cell"].value == "In [3]: audited for the first time"
    assert "Ended by" not in first
    assert second["Cell"].value.startswith("In [4]: edited since it was audited in #")
    assert second["Cell"].note == "id cell-e; 3 cells before it in this kernel"
    assert second["Ended by"].value == "LookupError in In[4], line 2, in <module>"
