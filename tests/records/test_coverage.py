"""Whatever is changed in a record is caught and named, or stands in the page's list of what is not covered."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from records_support import FIXTURES

from rlhf_audit_nb.records import OpenedRecord, read_record
from rlhf_audit_nb.trail import Level, TrustPolicy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "records" / "format.md"
SEAL = "metadata.rlhf_audit"
# A record after an editor has written into it what editors write.
WRITTEN = {
    "metadata.language_info.version": "3.11.0",
    "metadata.language_info.codemirror_mode": {"name": "ipython", "version": 3},
    "metadata.widgets": {"application/vnd.jupyter.widget-state+json": {"state": {}, "version_major": 2}},
    "metadata.signature": "sha256:00",
    "metadata.orig_nbformat": 4,
    "metadata.orig_nbformat_minor": 2,
}


def listed() -> list[str]:
    """The places that the page says are not covered: the one list, for people and for this test."""
    table = PAGE.read_text(encoding="utf-8").partition("<!-- not covered -->")[2].split("\n\n")[0]
    return re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)


def is_listed(path: str) -> bool:
    patterns = (re.escape(place).replace(r"\*", r"[^.\[\]]+") for place in listed())
    return any(re.match(rf"{pattern}($|[.\[])", path) for pattern in patterns)


def spelled(keys: tuple[Any, ...]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")


def leaves(value: Any, keys: tuple[Any, ...] = ()):
    """The paths of all values that hold no others, empty containers too."""
    children = list(value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else []))
    if not children:
        yield keys
    for key, child in children:
        yield from leaves(child, (*keys, key))


def put(nb: Any, keys: tuple[Any, ...], value: Any) -> None:
    for key in keys[:-1]:
        nb = nb[key]
    nb[keys[-1]] = value


def got(nb: Any, keys: tuple[Any, ...]) -> Any:
    for key in keys:
        nb = nb[key]
    return nb


def changes(value: Any, *, thorough: bool) -> list[Any]:
    """Other values in the place of this one; of a text, one other character at its start, middle and end."""
    if isinstance(value, str) and value:
        places = {0, len(value) // 2, len(value) - 1} if thorough else {len(value) // 2}
        return [value[:at] + ("B" if value[at] != "B" else "C") + value[at + 1 :] for at in sorted(places)]
    if isinstance(value, bool) or value is None:
        return [1]
    if isinstance(value, int | float):
        return [value * 2 + 1, str(value)]
    return ["x", [1], {"x": 1}]


class Record:
    """A record that others have added to and an editor has saved, as JSON text."""

    def __init__(self, name: str, policy: str, home: Path) -> None:
        self.policy = TrustPolicy.parse((FIXTURES / "seal-2" / policy).read_bytes())
        self.home = home
        nb = json.loads((FIXTURES / "seal-2" / name).read_bytes())
        for path, value in WRITTEN.items():
            put(nb, tuple(path.split(".")), value)
        for cell in nb["cells"]:
            cell["metadata"]["trusted"] = True
        self.text = json.dumps(nb)

    def opened(self, nb: Any) -> OpenedRecord:
        return read_record(json.dumps(nb).encode(), policy=self.policy, home=self.home)


@pytest.fixture(scope="module", params=[("added.ipynb", "witnessed.policy"), ("plain.ipynb", "trust.policy")])
def record(request, tmp_path_factory) -> Record:
    return Record(*request.param, tmp_path_factory.mktemp("verifier"))


def names(where: str, path: str) -> bool:
    """Whether a verdict's place is the changed one, its container, or, in a cell's text, the whole of it."""
    container = re.match(
        r"(cells\[\d+\]\.outputs\[\d+\]|cells\[\d+\]\.metadata\.\w+|cells\[\d+\]\.\w+"
        rf"|{re.escape(SEAL)}\.(additions|anchors|entries)\[\d+\]|{re.escape(SEAL)}\.\w+|metadata\.\w+|\w+)",
        path,
    )
    assert container is not None
    return where.startswith(container[0])


def test_the_record_itself_holds(record):
    found = record.opened(json.loads(record.text))
    assert (found.verdict.reasons, found.notes) == ((), ())
    assert found.verdict.level in {Level.COSIGNED, Level.UNANCHORED}


def test_every_value_is_caught_and_named_or_listed(record):
    whole = json.loads(record.text)
    before = record.opened(whole).verdict.level
    paths = list(leaves(whole))
    assert {path[:2] for path in paths} >= {("metadata", "rlhf_audit"), ("cells", 0)}
    for keys in paths:
        path = spelled(keys)
        for value in changes(got(whole, keys), thorough="anchors" in record.text):
            nb = json.loads(record.text)
            put(nb, keys, value)
            found = record.opened(nb)
            told = [*found.verdict.reasons, *found.notes]
            if is_listed(path):
                assert found.verdict.level is before, path
                continue
            # A signature line of nobody that is known counts for nothing: then the level falls, and a note says why.
            assert found.verdict.level < before, (path, value)
            assert any(names(item.where, path) for item in told), (path, value, told)


def test_every_key_is_caught_where_it_is_taken_away_or_listed(record):
    whole = json.loads(record.text)
    before = record.opened(whole).verdict.level
    for keys in list(leaves(whole)):
        if not isinstance(keys[-1], str):
            continue
        nb = json.loads(record.text)
        del got(nb, keys[:-1])[keys[-1]]
        found = record.opened(nb)
        if is_listed(spelled(keys)):
            assert found.verdict.level is before, spelled(keys)
        else:
            assert found.verdict.level < before, spelled(keys)


@pytest.mark.parametrize("place", [(), ("cells", 1), ("cells", 1, "metadata"), ("metadata", "papermill")])
def test_a_key_more_is_caught(record, place):
    nb = json.loads(record.text)
    got(nb, place)["more"] = 1
    assert record.opened(nb).verdict.level is Level.INVALID


@pytest.mark.parametrize(
    "place",
    [
        (),
        ("statement",),
        ("statement", "signatures", 0),
        ("entries", 0),
        ("manifest",),
        ("manifest", "cells", 0),
        ("additions", 0),
        ("additions", 0, "signatures", 0),
        ("anchors", 0),
    ],
)
def test_an_unknown_key_in_the_seal_is_refused_and_named(place, tmp_path):
    record = Record("added.ipynb", "witnessed.policy", tmp_path)
    nb = json.loads(record.text)
    got(nb, ("metadata", "rlhf_audit", *place))["more"] = 1
    (reason,) = record.opened(nb).verdict.reasons
    assert reason.code == "malformed-seal"
    assert reason.where.startswith(spelled(("metadata", "rlhf_audit", *place)))


def test_the_list_names_nothing_that_is_covered(record):
    """Each place of the list can be changed without the verdict noticing, so that it is not longer than it must be."""
    whole = json.loads(record.text)
    paths = [spelled(keys) for keys in leaves(whole)]
    assert len(listed()) == 8
    for place in listed():
        pattern = re.escape(place).replace(r"\*", r"\d+")
        assert any(re.match(pattern, path) for path in paths), place


def test_another_kernel_name_is_a_change_unless_an_editor_has_connected_it(record):
    nb = json.loads(record.text)
    nb["metadata"]["kernelspec"]["display_name"] = "Another"
    assert [note.code for note in record.opened(nb).notes] == ["kernel-name"]
    del nb["metadata"]["language_info"]["version"]
    (reason,) = record.opened(nb).verdict.reasons
    assert reason.where == "metadata.kernelspec.display_name"
