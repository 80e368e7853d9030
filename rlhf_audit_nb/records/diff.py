"""What differs between records: parameters, code, data, privacy, metrics and all else that they say. Floor 3.

Pure data: verified records go in, a `RecordDiff` comes out (`diff_records` for files, `compare_records` for what was
opened). A record that does not verify is refused; asked to, its own claims are compared as such, with its level beside
them. What two executions of one notebook always differ in (ids, clocks, saved folders) is no difference; what lies in
the vault cannot be compared, and is said to be so: commitments are made under fresh keys, so they show neither that
two sealed things are equal nor that they are not, unless they are one and the same entry.

In runs whose noise came from a seed that was known beforehand, as a replay's, what the steps left is named and not
shown: beside another run with the same noise, its difference would show what the noise had covered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_audit_nb.errors import RecordError
from rlhf_audit_nb.records.additions import ATTESTATION, REPRODUCTION
from rlhf_audit_nb.records.cell_diff import CellChange, Line, compare_cells, compare_outputs
from rlhf_audit_nb.records.comparison import is_timing
from rlhf_audit_nb.records.diff_facts import SECTIONS, Fact, Key, RecordFacts, Series, facts_of
from rlhf_audit_nb.records.normal_form import canonical_json
from rlhf_audit_nb.records.seal import SealError, parse_seal
from rlhf_audit_nb.records.unsound import DivergedRecordError, InvalidRecordError
from rlhf_audit_nb.trail import Level

if TYPE_CHECKING:
    from rlhf_audit_nb.records.record import OpenedRecord
    from rlhf_audit_nb.trail import TrustPolicy
    from rlhf_audit_nb.trail.entry import Entry

__all__ = [
    "DIFFERENT",
    "DivergedRecordError",
    "InvalidRecordError",
    "Kind",
    "RecordDiff",
    "RecordTable",
    "Row",
    "SeriesPair",
    "Side",
    "TableRow",
    "compare_records",
    "diff_records",
    "open_records",
    "refuse_unproven",
    "tabulate_records",
]

Kind = Literal["same", "changed", "added", "removed", "moved", "sealed", "expected"]

DIFFERENT: tuple[Kind, ...] = ("changed", "added", "removed", "moved")
"""The kinds of rows that are differences."""

_OF_THE_PLAN = frozenset({"epsilon", "learning_rate"})
"""Numbers of a private run's steps that were fixed before its first step."""
_ELSEWHERE = {"weights_digest": "weights", "batch_digest": "data"}
_ADDITIONS = {ATTESTATION: "attestation", REPRODUCTION: "reproduction"}
_OF_THE_ADDITION = frozenset({"key", "time", "previous"})
# What a reproduction repeats of the record, and how it came to its verdict: `verify --json` and the record have it all.
_OF_THE_REPRODUCTION = frozenset(
    {"record", "statement", "digest", "entry", "origin", "seeds", "normalisation", "not_compared", "times_left_out"}
    | {"tool", "fresh"}
)
_PUBLIC_NAMES = frozenset({"learning_rate", "epsilon", "gradient_norm", "update_norm", "weights_digest"})


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the records.

    Attributes:
        name: the file's name, without its folder.
        level: how far its verification reaches.
        reasons: what does not hold, as sentences.
        record: its id.
        origin: the trail.
        size: entries under its checkpoint.
        started: microseconds since 1970 (UTC), of ``record.started``.
        finished: of ``record.sealed``.
        claimed: whether what stands here is only what the file claims.
    """

    name: str
    level: str
    reasons: tuple[str, ...] = ()
    record: str = ""
    origin: str = ""
    size: int = 0
    started: int | None = None
    finished: int | None = None
    claimed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "reasons": list(self.reasons)}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing on both sides.

    Attributes:
        section: one of `SECTIONS`.
        run: the run's label, empty outside of one.
        place: what it is, such as ``noise_multiplier`` or ``cell 3``.
        kind: ``same``, ``changed``, ``added``, ``removed``, ``moved``; ``sealed``: it cannot be compared;
            ``expected``: any two executions differ in it.
        left: plain JSON, ``None`` where it is not there or may not be shown.
        right: likewise.
        note: what else is to be said.
        lines: of text, how it differs.
    """

    section: str
    place: str
    kind: Kind
    run: str = ""
    left: Any = None
    right: Any = None
    note: str = ""
    lines: tuple[Line, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values; without lines or a note where there are none."""
        plain = {
            "section": self.section,
            "run": self.run,
            "place": self.place,
            "kind": self.kind,
            "left": self.left,
            "right": self.right,
        }
        if self.note:
            plain["note"] = self.note
        if self.lines:
            plain["lines"] = [vars(line) for line in self.lines]
        return plain


@dataclass(frozen=True, kw_only=True)
class SeriesPair:
    """A name over the steps of a run that both records show in the open.

    ``parted`` is the step at which they are not the same any more, ``None`` where they are.
    """

    run: str
    name: str
    left: tuple[tuple[int, Any], ...]
    right: tuple[tuple[int, Any], ...]
    parted: int | None


@dataclass(frozen=True, kw_only=True)
class RecordDiff:
    """Two records side by side.

    Attributes:
        left: the first.
        right: the second.
        rows: everything that was compared, section by section; equal things too.
        series: what can be drawn.
    """

    left: Side
    right: Side
    rows: tuple[Row, ...]
    series: tuple[SeriesPair, ...] = field(default=(), repr=False)

    @property
    def differences(self) -> tuple[Row, ...]:
        """The rows that are not equal on both sides, without those that could not be compared."""
        return tuple(row for row in self.rows if row.kind in DIFFERENT)

    @property
    def differs(self) -> bool:
        """Whether there is any difference."""
        return bool(self.differences)

    @property
    def claimed(self) -> bool:
        """Whether one of the two proves nothing."""
        return self.left.claimed or self.right.claimed

    def counts(self) -> dict[str, int]:
        """How many rows are of each kind."""
        return dict(Counter(row.kind for row in self.rows))

    def shown(self, *, everything: bool = False) -> tuple[Row, ...]:
        """The rows for a reader: differences and what is sealed, or all."""
        return self.rows if everything else tuple(row for row in self.rows if row.kind in (*DIFFERENT, "sealed"))

    def to_dict(self, *, everything: bool = False) -> dict[str, Any]:
        """Plain values: both sides, the rows by section, and how many there are of each kind."""
        rows = self.shown(everything=everything)
        return {
            "left": self.left.to_dict(),
            "right": self.right.to_dict(),
            "differs": self.differs,
            "counts": self.counts(),
            "sections": [
                {"section": name, "title": title, "rows": [row.to_dict() for row in rows if row.section == name]}
                for name, title in SECTIONS.items()
                if any(row.section == name for row in rows)
            ],
        }


# -- files ------------------------------------------------------------------------------------------------------------


def diff_records(
    left: Path | str,
    right: Path | str,
    *,
    policy: TrustPolicy | None = None,
    home: Path | None = None,
    outputs: bool = False,
    claimed: bool = False,
) -> RecordDiff:
    """What differs between two records, both of which are verified first.

    Args:
        left: an executed notebook that was sealed.
        right: another.
        policy: whose signatures count; ``None`` trusts the user's own keys.
        home: the folder of keys and last-seen heads; ``None`` takes the usual one.
        outputs: also what the cells gave out.
        claimed: compare also what does not verify, as what it claims.

    Raises:
        RecordError: a file cannot be read, or is no notebook.
        InvalidRecordError, DivergedRecordError: a record does not verify, and ``claimed`` was not asked for.
    """
    opened = open_records((left, right), policy=policy, home=home)
    if not claimed:
        refuse_unproven(opened)
    return compare_records(*opened, outputs=outputs)


Named = tuple[str, "OpenedRecord"]
"""A file's name and the record in it."""


def open_records(
    paths: Sequence[Path | str], *, policy: TrustPolicy | None = None, home: Path | None = None
) -> tuple[Named, ...]:
    """Each record, verified, by the name of its file.

    Raises:
        RecordError: a file cannot be read, or is no notebook.
    """
    from rlhf_audit_nb.records.record import open_record

    found = []
    for path in paths:
        opened = open_record(path, policy=policy, home=home)
        if opened.content is None:
            why = opened.verdict.reasons[0].message if opened.verdict.reasons else ""
            raise RecordError(
                f"{path} is no notebook that can be compared. {why}".rstrip(),
                next_step="Name an executed notebook (.ipynb) that was sealed.",
                code="no-record",
            )
        found.append((Path(path).name, opened))
    return tuple(found)


def refuse_unproven(opened: Sequence[Named]) -> None:
    """Refuse records that prove nothing.

    Raises:
        InvalidRecordError, DivergedRecordError: naming the first of the worst level.
    """
    for level, error in ((Level.INVALID, InvalidRecordError), (Level.DIVERGED, DivergedRecordError)):
        for name, record in opened:
            if record.verdict.level is level:
                why = record.verdict.reasons[0].message if record.verdict.reasons else "It proves nothing."
                raise error(
                    f"{name} is {level.name}, so a comparison with it would prove nothing: {why}",
                    next_step=f"See rlhf-audit verify {name}, or compare what it claims with --claimed.",
                )


# -- comparing --------------------------------------------------------------------------------------------------------


def compare_records(left: Named, right: Named, *, outputs: bool = False) -> RecordDiff:
    """What differs between two records that were opened (`open_records`); nothing is verified here."""
    before, after = facts_of(_entries(left[1])), facts_of(_entries(right[1]))
    _tell_verification(left[1], before)
    _tell_verification(right[1], after)
    joined = _Joined(before, after)
    rows = [*joined.rows(), *_code_rows(left[1], right[1], outputs=outputs)]
    order = list(SECTIONS)
    return RecordDiff(
        left=_side(left),
        right=_side(right),
        rows=tuple(sorted(rows, key=lambda row: order.index(row.section))),
        series=tuple(joined.series),
    )


def _is_proven(opened: OpenedRecord) -> bool:
    return opened.verdict.level not in (Level.INVALID, Level.DIVERGED)


def _entries(opened: OpenedRecord) -> tuple[Entry, ...]:
    """The proven entries; of a record that is not proven, those that it claims."""
    if opened.entries or _is_proven(opened):
        return opened.entries
    try:
        return tuple(item.entry for item in parse_seal(opened.metadata).entries)
    except SealError:
        return ()  # then it claims nothing that could be read


def _side(named: Named) -> Side:
    name, opened = named
    entries = _entries(opened)
    times = {entry.type: entry.time for entry in entries}
    return Side(
        name=name,
        level=opened.verdict.level.name,
        reasons=tuple(reason.message for reason in opened.verdict.reasons),
        record=opened.sealed.record if opened.sealed is not None else "",
        origin=opened.verdict.origin,
        size=opened.verdict.size,
        started=times.get("record.started"),
        finished=times.get("record.sealed"),
        claimed=not _is_proven(opened),
    )


def _tell_verification(opened: OpenedRecord, told: RecordFacts) -> None:
    """Level, trail and signers, as facts like the others."""
    found = {
        "level": opened.verdict.level.name,
        "trail": opened.verdict.origin,
        "log signed by": list(opened.verdict.signers),
        "record signed by": _signers(opened),
        "anchored by": sorted({f"{anchor.kind} by {anchor.by}" for anchor in opened.verdict.anchors}),
    }
    for addition in opened.additions:
        kind = _ADDITIONS.get(addition.predicate_type, addition.predicate_type)
        start = f"addition {addition.index + 1} ({kind})."
        found[f"{start}signed by"] = addition.key_id
        left_out = _OF_THE_ADDITION | (_OF_THE_REPRODUCTION if addition.predicate_type == REPRODUCTION else frozenset())
        said = {name: value for name, value in addition.predicate.items() if name not in left_out}
        found |= {start + name: value for name, value in said.items() if value not in (None, [], {})}
    for place, value in found.items():
        told.facts["verification", "", place] = Fact(value=value)


def _signers(opened: OpenedRecord) -> list[str]:
    """The ids of the keys that signed the statement."""
    try:
        return [item.keyid for item in parse_seal(opened.metadata).envelope.signatures]
    except SealError:
        return []  # of a record that is not proven; its reasons say what is wrong with the seal


class _Joined:
    """The facts of two records, laid side by side."""

    def __init__(self, left: RecordFacts, right: RecordFacts) -> None:
        self._left = left
        self.series: list[SeriesPair] = []
        self._names, self._run_rows = _matched_runs(left, right)
        self._right = _renamed(right, self._names)
        self._alone = {row.run for row in self._run_rows if row.kind in ("added", "removed")}

    def rows(self) -> Iterator[Row]:
        """Everything, in the order in which the left one says it, what only the right one has behind that."""
        yield from self._run_rows
        left, right = self._left.facts, self._right.facts
        for key in [*left, *(key for key in right if key not in left)]:
            if key[1] not in self._alone:
                yield self._row(key, left.get(key), right.get(key))
        for run, name in {**self._left.series, **self._right.series}:
            if run not in self._alone:
                yield self._series_row(run, name)
        for key, token in self._left.sealed.items():
            other = self._right.sealed.get(key)
            told_apart = (key[0], key[1], key[2].removesuffix(".")) in self._left.facts
            if other is not None and other != token and not told_apart:
                place = f"{key[2]}*" if key[2] else "what was measured in the steps"
                yield Row(section=key[0], run=key[1], place=place, kind="sealed")

    def _row(self, key: Key, one: Fact | None, other: Fact | None) -> Row:
        section, run, place = key
        row = Row(
            section=section,
            run=run,
            place=place,
            kind="same",
            left=one.value if one is not None else None,
            right=other.value if other is not None else None,
        )
        if any(fact is not None and fact.expected for fact in (one, other)):
            return replace(row, kind="expected" if one != other else "same")
        if one is None or other is None:
            there = self._left if one is None else self._right
            if _is_sealed(there, key) or any(fact is not None and fact.sealed for fact in (one, other)):
                return replace(row, kind="sealed")
            return replace(row, kind="added" if one is None else "removed")
        if one.sealed or other.sealed:
            same = one.token is not None and one.token == other.token and self._one_trail()
            return replace(row, kind="same" if same else "sealed")
        return replace(row, kind="same" if _same(one.value, other.value) else "changed")

    def _one_trail(self) -> bool:
        key = ("verification", "", "trail")
        return self._left.facts[key] == self._right.facts[key]

    def _series_row(self, run: str, name: str) -> Row:
        one, other = self._left.series.get((run, name)), self._right.series.get((run, name))
        row = Row(section=_ELSEWHERE.get(name, "metrics"), run=run, place=name, kind="same")
        hidden = any(item is not None and item.replayed for item in (one, other)) and name not in _OF_THE_PLAN
        if not hidden:
            row = replace(row, left=_summary(one), right=_summary(other))
        if is_timing(name.rpartition(".")[2]):
            return replace(row, kind="expected")
        if one is None or other is None:
            there = self._left if one is None else self._right
            if name not in _PUBLIC_NAMES and _is_sealed(there, ("metrics", run, name)):
                return replace(row, kind="sealed")
            return replace(row, kind="added" if one is None else "removed")
        parted = _parted(one, other)
        if not hidden:
            pair = SeriesPair(run=run, name=name, left=one.points, right=other.points, parted=parted)
            self.series.append(pair)
        if parted is None:
            return row
        return replace(row, kind="changed", note=_parted_words(one, other, parted))


def _matched_runs(left: RecordFacts, right: RecordFacts) -> tuple[dict[str, str], list[Row]]:
    """Runs by their experiment's name, what is left in the order of the records; the rows that say so."""
    names = {label: label for label in right.runs if label in left.runs}
    rows = []
    spare = [label for label in left.runs if label not in names]
    for label in right.runs:
        if label in names:
            continue
        if spare:
            names[label] = spare.pop(0)
        else:
            names[label] = label
            rows.append(Row(section="runs", run=label, place="run", kind="added", right=label))
    rows += [Row(section="runs", run=label, place="run", kind="removed", left=label) for label in spare]
    return names, rows


def _renamed(right: RecordFacts, names: Mapping[str, str]) -> RecordFacts:
    """The right one's facts under the labels of the runs that they are compared with."""
    return RecordFacts(
        facts={(section, names.get(run, run), place): fact for (section, run, place), fact in right.facts.items()},
        series={(names.get(run, run), name): series for (run, name), series in right.series.items()},
        sealed={(section, names.get(run, run), place): token for (section, run, place), token in right.sealed.items()},
        runs={names[label]: run for label, run in right.runs.items()},
    )


def _is_sealed(told: RecordFacts, key: Key) -> bool:
    section, run, place = key
    return any(section == one and run == of and place.startswith(start) for one, of, start in told.sealed)


def _same(one: Any, other: Any) -> bool:
    if type(one) is type(other) and one == other and not isinstance(one, (dict, list)):
        return True
    return canonical_json(one) == canonical_json(other)


def _parted(one: Series, other: Series) -> int | None:
    """The first step at which two series are not the same."""
    for (step, value), (at, found) in zip(one.points, other.points, strict=False):
        if step != at or not _same(value, found):
            return min(step, at)
    longer = max(one.points, other.points, key=len)
    shorter = min(len(one.points), len(other.points))
    return longer[shorter][0] if len(longer) > shorter else None


def _parted_words(one: Series, other: Series, parted: int) -> str:
    counts = (len(one.points), len(other.points))
    steps = "" if counts[0] == counts[1] else f"; {counts[0]} against {counts[1]} values"
    at = f"they part at step {parted}" if parted >= 0 else "they are not the same"
    return at + steps


def _summary(series: Series | None) -> dict[str, Any] | None:
    """A series in figures: its last value and step, how many, and the lowest and highest where they are numbers."""
    if series is None:
        return None
    step, last = series.points[-1]
    found = {"last": last, "step": step if step >= 0 else None, "values": len(series.points)}
    numbers = [value for _, value in series.points if isinstance(value, int | float) and not isinstance(value, bool)]
    if numbers:
        found |= {"lowest": min(numbers), "highest": max(numbers)}
    return found


# -- many -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One thing in every record; ``sealed`` says in which of them it cannot be seen."""

    section: str
    run: str
    place: str
    values: tuple[Any, ...]
    sealed: tuple[bool, ...]
    kind: Kind

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "values": list(self.values), "sealed": list(self.sealed)}


@dataclass(frozen=True, kw_only=True)
class RecordTable:
    """Several records side by side, a column for each."""

    sides: tuple[Side, ...]
    rows: tuple[TableRow, ...]

    @property
    def differs(self) -> bool:
        """Whether any two of them differ in anything."""
        return any(row.kind == "changed" for row in self.rows)

    def shown(self, *, everything: bool = False) -> tuple[TableRow, ...]:
        """The rows in which they differ, or all."""
        return self.rows if everything else tuple(row for row in self.rows if row.kind == "changed")

    def to_dict(self, *, everything: bool = False) -> dict[str, Any]:
        """Plain values."""
        return {
            "records": [side.to_dict() for side in self.sides],
            "differs": self.differs,
            "rows": [row.to_dict() for row in self.shown(everything=everything)],
        }


def tabulate_records(opened: Sequence[Named]) -> RecordTable:
    """Several records that were opened (`open_records`), each against the first; of code only whether it is the same.

    A series stands in the table by its last value.
    """
    told = [facts_of(_entries(record)) for _, record in opened]
    for (_, record), facts in zip(opened, told, strict=True):
        _tell_verification(record, facts)
        if record.started is not None:
            facts.facts["code", "", "source of all cells"] = Fact(value=record.started.notebook_digest)
    first = told[0]
    told = [first, *(_renamed(other, _matched_runs(first, other)[0]) for other in told[1:])]
    rows = [_runs_row(label, told) for label in {label: None for facts in told for label in facts.runs}]
    in_all = {row.run for row in rows if row.kind == "same"} | {""}
    for key in {key: None for facts in told for key in facts.facts if key[1] in in_all}:
        found = [facts.facts.get(key) or (Fact(sealed=True) if _is_sealed(facts, key) else None) for facts in told]
        rows.append(_table_row(key, found))
    for run, name in {name: None for facts in told for name in facts.series if name[0] in in_all}:
        rows.append(
            _table_row((_ELSEWHERE.get(name, "metrics"), run, name), [_last(facts, run, name) for facts in told])
        )
    order = list(SECTIONS)
    rows.sort(key=lambda row: order.index(row.section))
    return RecordTable(sides=tuple(_side(named) for named in opened), rows=tuple(rows))


def _runs_row(label: str, told: Sequence[RecordFacts]) -> TableRow:
    row = _table_row(("runs", label, "run"), [Fact(value=label) if label in facts.runs else None for facts in told])
    return row if row.kind == "same" else replace(row, place=label)


def _last(facts: RecordFacts, run: str, name: str) -> Fact | None:
    series = facts.series.get((run, name))
    if series is None:
        hidden = name not in _PUBLIC_NAMES and _is_sealed(facts, ("metrics", run, name))
        return Fact(sealed=True) if hidden else None
    if series.replayed and name not in _OF_THE_PLAN:
        return Fact(sealed=True)
    return Fact(value=series.points[-1][1], expected=is_timing(name.rpartition(".")[2]))


def _table_row(key: Key, facts: Sequence[Fact | None]) -> TableRow:
    section, run, place = key
    sealed = tuple(fact is not None and fact.sealed for fact in facts)
    values = tuple(fact.value if fact is not None else None for fact in facts)
    kind: Kind = "same"
    if any(fact is not None and fact.expected for fact in facts):
        kind = "expected"
    elif any(sealed):
        kind = "sealed"
    elif any(
        (fact is None) != (facts[0] is None) or not _same(value, values[0])
        for fact, value in zip(facts, values, strict=True)
    ):
        kind = "changed"
    return TableRow(section=section, run=run, place=place, values=values, sealed=sealed, kind=kind)


# -- cells ------------------------------------------------------------------------------------------------------------


def _code_rows(left: OpenedRecord, right: OpenedRecord, *, outputs: bool) -> Iterator[Row]:
    before, after = left.content or {"cells": []}, right.content or {"cells": []}
    for change in compare_cells(before, after):
        yield _cell_row(change)
        if outputs and change.type == "code" and change.left is not None and change.right is not None:
            yield from _output_rows(change, before["cells"][change.left], after["cells"][change.right])


def _cell_row(change: CellChange) -> Row:
    place = change.right if change.right is not None else change.left
    assert place is not None
    note = ", ".join(change.what) if change.what not in ((), ("source",)) else ""
    if change.moved and change.left is not None:
        note = "; ".join(filter(None, (note, f"it stood at {change.left + 1}")))
    return Row(
        section="code",
        place=f"cell {place + 1} ({change.type})",
        kind=change.kind,
        left=None if change.left is None else {"cell": change.left + 1},
        right=None if change.right is None else {"cell": change.right + 1, "id": change.id},
        note=note,
        lines=change.lines,
    )


def _output_rows(change: CellChange, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Row]:
    assert change.right is not None
    for item in compare_outputs(before, after):
        yield Row(
            section="outputs",
            place=f"cell {change.right + 1}, output {item.number + 1}",
            kind=item.kind,
            left=item.left or None,
            right=item.right or None,
            lines=item.lines,
        )
