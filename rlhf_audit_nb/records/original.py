"""What was changed in a record since it was sealed, against the copy that was kept beside its trail. Floor 3.

A verdict names the places that do not hold; with the copy (`kept`) it can be said what stood there. The copy is used
only where it verifies as a record itself, has the same id, and, where the changed file still proves the digest that was
sealed, has that digest: a copy proves nothing by lying there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.errors import AuditError
from rlhf_audit_nb.records.cell_diff import CellChange, OutputChange, compare_cells, compare_outputs
from rlhf_audit_nb.records.kept import FOLDER, kept_record
from rlhf_audit_nb.records.normal_form import canonical_json
from rlhf_audit_nb.records.record import OpenedRecord, read_record
from rlhf_audit_nb.trail import Level

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import TrustPolicy

__all__ = ["CODES", "OutputsOf", "ParameterChange", "SinceSealed", "since_sealed"]

CODES = frozenset(
    {
        "cell-added",
        "cell-changed",
        "cell-entry",
        "cell-id-changed",
        "cell-metadata-changed",
        "cell-moved",
        "cell-output-changed",
        "cell-removed",
        "cell-source-changed",
        "cell-type-changed",
        "digest",
        "manifest",
        "no-seal",
        "notebook-changed",
        "notebook-metadata-changed",
        "parameter-changed",
        "source",
    }
)
"""Reasons of a verdict that say that the notebook is not what was sealed."""

_RECORD_ID = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class ParameterChange:
    """A parameter that is not what it was; ``there`` says on which sides it is at all."""

    name: str
    before: Any
    now: Any
    there: tuple[bool, bool]


@dataclass(frozen=True, kw_only=True)
class OutputsOf:
    """The outputs of one cell that are not what they were: its place from 0, its id."""

    cell: int
    id: str
    changes: tuple[OutputChange, ...]


@dataclass(frozen=True, kw_only=True)
class SinceSealed:
    """What was changed, or why that cannot be told.

    Attributes:
        record: the record's id; empty where the file names none.
        copy: the copy that it was compared with; ``None`` where there is none that can be relied on.
        why: why there is none, in a sentence.
        parameters: those in the notebook's metadata.
        cells: that were changed, added, removed or moved; the injected parameters too.
        outputs: of cells that both have.
    """

    record: str
    copy: Path | None = None
    why: str = ""
    parameters: tuple[ParameterChange, ...] = ()
    cells: tuple[CellChange, ...] = ()
    outputs: tuple[OutputsOf, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "record": self.record,
            "copy": None if self.copy is None else str(self.copy),
            "why": self.why,
            "parameters": [
                {"name": item.name, "before": item.before, "now": item.now, "there": list(item.there)}
                for item in self.parameters
            ],
            "cells": [
                {**vars(item), "what": list(item.what), "lines": [vars(line) for line in item.lines]}
                for item in self.cells
            ],
            "outputs": [
                {
                    "cell": item.cell,
                    "id": item.id,
                    "changes": [{**vars(one), "lines": [vars(line) for line in one.lines]} for one in item.changes],
                }
                for item in self.outputs
            ],
        }


def since_sealed(
    opened: OpenedRecord, trails: Sequence[Path], *, policy: TrustPolicy | None = None, home: Path | None = None
) -> SinceSealed | None:
    """What was changed in a record since it was sealed; ``None`` where its verdict names no change of the notebook.

    Args:
        opened: a record that does not verify.
        trails: folders of trails beside which a copy may lie, tried in their order.
        policy: whose signatures count on the copy; ``None`` trusts the user's own key.
        home: the folder of keys and last-seen heads; ``None`` takes the usual one.
    """
    named = any(reason.code in CODES for reason in opened.verdict.reasons)
    if opened.verdict.level is not Level.INVALID or opened.content is None or not named:
        return None
    record = _record_id(opened)
    if not record:
        return SinceSealed(record="", why="The file does not say which record it was, so no copy can be looked for.")
    why = ""
    for location in trails:
        path = kept_record(location, record)
        if path is None:
            continue
        original, problem = _original(path, opened, record, policy, home)
        if original is not None:
            return _compared(record, path, original, opened.content)
        why = why or f"The copy {path} is of no use: {problem}"
    place = f"{FOLDER}/{record}.ipynb"
    return SinceSealed(
        record=record, why=why or f"No copy of what was sealed is here; it lies beside the trail, as {place}."
    )


def _record_id(opened: OpenedRecord) -> str:
    found = opened.sealed.record if opened.sealed is not None else (opened.metadata or {}).get("record")
    return found if isinstance(found, str) and _RECORD_ID.fullmatch(found) else ""


def _original(
    path: Path, opened: OpenedRecord, record: str, policy: TrustPolicy | None, home: Path | None
) -> tuple[OpenedRecord | None, str]:
    """The copy, where it can be relied on, else why it cannot."""
    try:
        found = read_record(path.read_bytes(), policy=policy, home=home, trails=(path.parent.parent,))
    except OSError as error:
        return None, f"it cannot be read ({error.strerror or error})."
    except AuditError as error:  # no key to verify it with
        return None, error.message
    if found.verdict.level in (Level.INVALID, Level.DIVERGED):
        why = found.verdict.reasons[0].message if found.verdict.reasons else ""
        return None, f"it is {found.verdict.level.name} itself. {why}".rstrip()
    if found.sealed is None or found.sealed.record != record:
        return None, "it is another record."
    if opened.entries and opened.sealed is not None and opened.sealed.digest != found.sealed.digest:
        return None, "its digest is not the one that was sealed."
    return found, ""


def _compared(record: str, path: Path, original: OpenedRecord, now: Mapping[str, Any]) -> SinceSealed:
    before = original.content or {"cells": [], "metadata": {}}
    cells = compare_cells(before, now, injected=True)
    outputs = []
    for change in cells:
        if change.left is None or change.right is None:
            continue
        found = compare_outputs(before["cells"][change.left], now["cells"][change.right])
        if found:
            outputs.append(OutputsOf(cell=change.right, id=change.id, changes=tuple(found)))
    return SinceSealed(
        record=record,
        copy=path,
        parameters=tuple(_parameters(before, now)),
        cells=tuple(change for change in cells if change.kind != "same"),
        outputs=tuple(outputs),
    )


def _parameters(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[ParameterChange]:
    one, other = _stated(before), _stated(now)
    for name in sorted({*one, *other}):
        there = (name in one, name in other)
        if all(there) and canonical_json(one[name]) == canonical_json(other[name]):
            continue
        yield ParameterChange(name=name, before=one.get(name), now=other.get(name), there=there)


def _stated(notebook: Mapping[str, Any]) -> dict[str, Any]:
    papermill = notebook["metadata"].get("papermill")
    found = papermill.get("parameters") if isinstance(papermill, dict) else None
    return found if isinstance(found, dict) else {}
