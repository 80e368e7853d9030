"""What was changed since a record was sealed: told with the copy where one can be relied on, and only then."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from signing_support import seal_text

from rlhf_audit_nb import cli
from rlhf_audit_nb.records import open_record
from rlhf_audit_nb.records.original import SinceSealed, since_sealed
from rlhf_audit_nb.reports.original import since_sealed_words
from rlhf_audit_nb.trail import Level, Trail

if TYPE_CHECKING:
    from pathlib import Path

    from records_support import Made


def cell(notebook: dict[str, Any], name: str) -> dict[str, Any]:
    return next(item for item in notebook["cells"] if item["id"] == name)


@pytest.fixture
def told(made: Made, tmp_path: Path) -> Any:
    """What is told of the record after a change to it; its verdict names one as well."""

    def call(change: Any, trail: Path | None = None) -> SinceSealed | None:
        notebook = copy.deepcopy(made.notebook)
        change(notebook)
        path = tmp_path / "changed.ipynb"
        path.write_text(json.dumps(notebook), encoding="utf-8")
        opened = open_record(path, policy=made.policy, home=made.home)
        assert opened.verdict.level is Level.INVALID
        location = trail or made.path.parent / "audit"
        return since_sealed(opened, [tmp_path / "none", location], policy=made.policy, home=made.home)

    return call


def test_the_copy_of_the_fixture_is_there(made: Made) -> None:
    assert (made.path.parent / "audit" / "records" / f"{made.result.record}.ipynb").is_file()


def test_a_changed_source_is_told_line_by_line(told: Any) -> None:
    found = told(lambda notebook: cell(notebook, "cell-9").update(source="1 / 1"))
    assert [(item.kind, item.id, item.what) for item in found.cells] == [("changed", "cell-9", ("source",))]
    assert [(line.sign, line.text) for line in found.cells[0].lines] == [
        ("-", "1 / 0"),
        ("+", "1 / 1"),
    ]
    assert (found.parameters, found.outputs, found.why) == ((), (), "")
    text = "\n".join(since_sealed_words(found))
    assert "(id cell-9) changed (source)" in text
    assert "      - 1 / 0" in text
    assert "      + 1 / 1" in text


def test_a_changed_output_is_told_as_text_and_a_picture_by_its_digest(told: Any) -> None:
    def other_text(notebook: dict[str, Any]) -> None:
        stream = next(item for item in cell(notebook, "cell-5")["outputs"] if item.get("name") == "stdout")
        stream["text"] = ["won\n"]

    found = told(other_text)
    ((outputs),) = found.outputs
    (change,) = outputs.changes
    assert (outputs.id, change.kind) == ("cell-5", "changed")
    assert [(line.sign, line.text) for line in change.lines] == [("-", "one"), ("+", "won")]
    assert found.cells == ()

    def other_picture(notebook: dict[str, Any]) -> None:
        picture = next(item for item in cell(notebook, "cell-8")["outputs"] if "image/png" in item.get("data", {}))
        picture["data"]["image/png"] = "QUJD"

    ((outputs),) = told(other_picture).outputs
    (change,) = outputs.changes
    assert hashlib.sha256(b"ABC").hexdigest() in change.right
    assert "→" in "\n".join(since_sealed_words(told(other_picture)))


def test_a_changed_parameter_is_told_as_it_was_and_is(told: Any) -> None:
    def change(notebook: dict[str, Any]) -> None:
        notebook["metadata"]["papermill"]["parameters"].update(epsilon=99.0, more=1)

    found = told(change)
    assert [(item.name, item.before, item.now, item.there) for item in found.parameters] == [
        ("epsilon", 2.5, 99.0, (True, True)),
        ("more", None, 1, (False, True)),
    ]
    assert since_sealed_words(found)[1:] == ["    parameter epsilon: 2.5 → 99.0", "    parameter more: not there → 1"]


def test_cells_that_were_added_taken_out_and_moved_are_told(told: Any) -> None:
    def change(notebook: dict[str, Any]) -> None:
        cells = notebook["cells"]
        cells.insert(0, cells.pop(-2))
        cells.remove(cell(notebook, "raw"))

    found = told(change)
    assert {(item.id, item.kind) for item in found.cells} == {("picture", "moved"), ("raw", "removed")}
    injected = told(lambda notebook: notebook["cells"].pop(2))
    assert [item.kind for item in injected.cells] == ["removed"]


def test_hostile_text_is_written_out_and_long_text_is_cut(told: Any) -> None:
    found = told(lambda notebook: cell(notebook, "cell-9").update(source="\x1b[2J\u202e\n" + "x\n" * 500, id="\x1b[1m"))
    lines = since_sealed_words(found)
    assert all(line.isprintable() for line in lines)
    assert len(lines) < 60
    assert any("more lines" in line for line in lines)


def test_a_seal_that_was_taken_away_leaves_nothing_to_look_for(told: Any) -> None:
    found = told(lambda notebook: notebook["metadata"].pop("rlhf_audit"))
    assert (found.record, found.copy) == ("", None)
    assert "does not say which record it was" in found.why


def test_what_is_no_change_of_the_notebook_is_not_looked_for(told: Any, made: Made) -> None:
    assert told(lambda notebook: notebook["metadata"]["rlhf_audit"]["entries"].pop()) is None
    valid = open_record(made.path, policy=made.policy, home=made.home)
    assert since_sealed(valid, [made.path.parent / "audit"], policy=made.policy, home=made.home) is None


def test_without_a_copy_it_is_said_where_one_would_lie(told: Any, tmp_path: Path, made: Made) -> None:
    found = told(lambda notebook: cell(notebook, "cell-9").update(source="x"), tmp_path / "elsewhere")
    assert found.copy is None
    assert f"records/{made.result.record}.ipynb" in found.why
    assert since_sealed_words(found) == [f"  {found.why}"]


@pytest.mark.parametrize("kind", ["changed", "another", "broken"])
def test_a_copy_that_does_not_verify_or_is_another_record_is_not_used(
    told: Any, made: Made, tmp_path: Path, kind: str
) -> None:
    trail = tmp_path / "audit"
    (trail / "records").mkdir(parents=True)
    place = trail / "records" / f"{made.result.record}.ipynb"
    shutil.copy(made.path.parent / "audit" / "records" / place.name, place)
    if kind == "changed":
        place.write_bytes(place.read_bytes().replace(b"1 / 0", b"1 / 2"))
    elif kind == "broken":
        place.write_bytes(b"{")
    else:
        notebook = json.loads(place.read_bytes())
        notebook["metadata"]["rlhf_audit"]["record"] = "f" * 32
        place.write_text(json.dumps(notebook))
    found = told(lambda notebook: cell(notebook, "cell-9").update(source="x"), trail)
    assert found.copy is None
    assert "is of no use" in found.why
    assert (found.cells, found.outputs, found.parameters) == ((), (), ())


def test_only_the_very_record_is_held_against_the_changed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    trail = tmp_path / "audit"
    with Trail.open(trail, origin="example.org/original"):
        pass
    for name in ("one", "two"):
        seal_text(trail, tmp_path / f"{name}.ipynb", f"text of {name}")
    one, two = (json.loads((tmp_path / f"{name}.ipynb").read_bytes()) for name in ("one", "two"))
    place = trail / "records" / f"{one['metadata']['rlhf_audit']['record']}.ipynb"
    place.parent.mkdir(exist_ok=True)
    one["cells"][0]["source"] = "changed"
    (tmp_path / "changed.ipynb").write_text(json.dumps(one))
    changed = open_record(tmp_path / "changed.ipynb")

    place.write_text(json.dumps(two))
    found = since_sealed(changed, [trail])
    assert found is not None
    assert (found.copy, "it is another record" in found.why) == (None, True)

    shutil.copy(tmp_path / "one.ipynb", place)
    found = since_sealed(changed, [trail])
    assert found is not None
    assert found.copy == place

    assert changed.sealed is not None
    elsewhere = replace(changed, sealed=msgspec.structs.replace(changed.sealed, digest="0" * 64))
    found = since_sealed(elsewhere, [trail])
    assert found is not None
    assert (found.copy, "its digest is not the one that was sealed" in found.why) == (None, True)


def test_verify_shows_it(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(made.home))
    path = tmp_path / "changed.ipynb"
    path.write_bytes(made.data.replace(b'"1 / 0"', b'"1 / 3"'))
    assert cli.main(["verify", str(path), "--trail", str(made.path.parent / "audit")]) == 40
    out = capsys.readouterr().out
    assert "against the copy that was kept" in out
    assert "      + 1 / 3" in out
    monkeypatch.setenv("RLHF_AUDIT_TRAIL", str(made.path.parent / "audit"))
    assert cli.main(["verify", str(path), "--json"]) == 40
    said = json.loads(capsys.readouterr().out)
    assert said["since_sealed"]["cells"][0]["id"] == "cell-9"
    assert said["since_sealed"]["record"] == made.result.record
    assert cli.main(["verify", str(made.path), "--json"]) == 0
    assert "since_sealed" not in json.loads(capsys.readouterr().out)
