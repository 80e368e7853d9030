"""Records of earlier versions verify for ever, and a changed byte in them is still named."""

from __future__ import annotations

import hashlib
import json
import random
from typing import TYPE_CHECKING, Any

import pytest
from records_support import FIXTURES

from rlhf_audit_nb.records import OpenedRecord, read_record
from rlhf_audit_nb.trail import Level, TrustPolicy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RECORDS = sorted(path for path in FIXTURES.glob("*/*.ipynb") if path.stem != "added")
NAMES = [str(path.relative_to(FIXTURES)) for path in RECORDS]
STATUS = {"plain": "completed", "private": "completed", "failed": "failed", "two-signatures": "completed"}


def opened(path: Path, data: bytes, home: Path) -> OpenedRecord:
    return read_record(data, policy=TrustPolicy.parse((path.parent / "trust.policy").read_bytes()), home=home)


def test_no_set_and_no_record_was_lost():
    assert {path.parent.name for path in RECORDS} >= {"seal-1", "seal-2"}
    for folder in {path.parent for path in RECORDS}:
        assert {path.stem for path in folder.glob("*.ipynb")} - {"added"} == set(STATUS)


@pytest.mark.parametrize("name", NAMES)
def test_a_record_of_an_earlier_version_is_as_it_was_made_and_verifies(name, tmp_path):
    path = FIXTURES / name
    data = path.read_bytes()
    sums = dict(reversed(line.split()) for line in (path.parent / "SHA256SUMS").read_text().splitlines())
    assert hashlib.sha256(data).hexdigest() == sums[path.name]
    assert hashlib.sha256((path.parent / "trust.policy").read_bytes()).hexdigest() == sums["trust.policy"]
    found = opened(path, data, tmp_path)
    assert (found.verdict.level, found.verdict.reasons, found.notes) == (Level.UNANCHORED, (), ())
    assert found.sealed.status == STATUS[path.stem]
    assert len(found.entries) == len(found.metadata["entries"])
    trained = path.stem in {"plain", "private"}
    assert [run.status for run in found.verdict.runs] == ["completed"] * trained


@pytest.mark.parametrize("name", ["seal-2"])
def test_what_was_added_to_a_record_of_an_earlier_version_still_holds(name, tmp_path):
    folder = FIXTURES / name
    policy = TrustPolicy.parse((folder / "witnessed.policy").read_bytes())
    found = read_record((folder / "added.ipynb").read_bytes(), policy=policy, home=tmp_path)
    assert (found.verdict.level, found.verdict.reasons, found.notes) == (Level.COSIGNED, (), ())
    assert [item.predicate["statement"] for item in found.additions] == ["A fixture."] * 2
    assert [anchor.kind for anchor in found.verdict.anchors] == ["cosignature"]


def leaves(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all strings, numbers and flags of a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if children is None:
        yield keys
        return
    for key, child in children:
        yield from leaves(child, (*keys, key))


def spelled(keys: tuple[Any, ...]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")


def changed(value: Any, drawn: random.Random) -> Any:
    if not isinstance(value, str) or not value:
        return [value]
    at = drawn.randrange(len(value))
    return value[:at] + ("a" if value[at] != "a" else "b") + value[at + 1 :]


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_byte_in_a_record_of_an_earlier_version_is_named(name, tmp_path):
    path = FIXTURES / name
    before = json.loads(path.read_bytes())
    parts: dict[str, list[tuple[Any, ...]]] = {}
    for keys in leaves(before):
        parts.setdefault(".".join(map(str, keys[: 3 if keys[:2] == ("metadata", "rlhf_audit") else 1])), []).append(
            keys
        )
    assert {"cells", "metadata.rlhf_audit.statement", "metadata.rlhf_audit.manifest"} < set(parts)
    drawn = random.Random(7)
    for found in parts.values():
        for keys in drawn.sample(found, min(4, len(found))):
            nb = json.loads(path.read_bytes())
            target = nb
            for key in keys[:-1]:
                target = target[key]
            target[keys[-1]] = changed(target[keys[-1]], drawn)
            where, verdict = spelled(keys), opened(path, json.dumps(nb).encode(), tmp_path).verdict
            assert verdict.level is Level.INVALID, where
            named = [reason.where for reason in verdict.reasons]
            # A cell's source and text stand in a file as lists of lines, and are named whole.
            assert any(where.startswith(place) or place.startswith(where) for place in named), (where, named)
