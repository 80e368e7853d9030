"""What a report is drawn from: a verdict, the entries it covers, and the notebook where there is one. Floor 3.

`Evidence` is the one input of assessments, reports and cards. It comes from a live trail or from a record; either way
its entries are decoded to typed events once. It never opens the vault: what is private cannot reach a page.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rlhf_audit_nb.compliance.words import level_words
from rlhf_audit_nb.errors import AuditError, ReportError
from rlhf_audit_nb.events import Event, decode_body
from rlhf_audit_nb.trail.merkle import Frontier, leaf_hash

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from rlhf_audit_nb.trail import Entry, Reason, TrustPolicy, Verdict

__all__ = ["Cite", "Evidence", "Item", "cite"]

OriginKind = Literal["trail", "record"]
EventT = TypeVar("EventT", bound=Event)

_RANGE = 4
_MANY = 12


@dataclass(frozen=True)
class Item:
    """One entry with its event; ``event`` is ``None`` where its type or body is not known, and ``problem`` says why."""

    entry: Entry
    event: Event | None
    problem: str | None = None

    @property
    def index(self) -> int:
        """The leaf's number in the trail."""
        return self.entry.index

    @property
    def kind(self) -> str:
        """The entry's type."""
        return self.entry.envelope.type

    @property
    def time(self) -> int:
        """When it was recorded, UTC microseconds."""
        return self.entry.envelope.time

    @property
    def run(self) -> str | None:
        """The run that it belongs to."""
        return self.entry.envelope.run

    @property
    def sealed(self) -> str | None:
        """The commitment to its private half, base64; what it covers stays in the vault."""
        return self.entry.envelope.sealed

    @property
    def leaf_hash(self) -> str:
        """RFC 6962 leaf hash, lower-case hex."""
        return leaf_hash(self.entry.data).hex()


@dataclass(frozen=True)
class Cite:
    """One entry, or a stretch of ``count`` entries from ``first`` to ``last``, that a claim points at."""

    first: int
    last: int
    count: int = 1

    @property
    def text(self) -> str:
        """``#412``, or ``#12 to #9811 (9,800 entries)``."""
        return f"#{self.first}" if self.count == 1 else f"#{self.first} to #{self.last} ({self.count:,} entries)"


def cite(indices: Iterable[int]) -> tuple[Cite, ...]:
    """The shortest honest citation of entries: single numbers, and stretches where numbers follow each other."""
    ordered = sorted(set(indices))
    groups: list[list[int]] = []
    for index in ordered:
        if groups and index == groups[-1][-1] + 1:
            groups[-1].append(index)
        else:
            groups.append([index])
    cites: list[Cite] = []
    for group in groups:
        if len(group) >= _RANGE:
            cites.append(Cite(group[0], group[-1], len(group)))
        else:
            cites.extend(Cite(index, index) for index in group)
    if len(cites) > _MANY:
        return (Cite(ordered[0], ordered[-1], len(ordered)),)
    return tuple(cites)


@dataclass(frozen=True)
class Evidence:
    """A verdict and what it covers.

    Args:
        verdict: what verification found; nothing is evidenced under INVALID or DIVERGED.
        entries: the entries of the trail, or those that the record holds.
        notebook: the executed notebook of a record, as plain values or as nbformat's node; multi-line text may be in
            lists.
        origin_kind: where it comes from.
        checkpoint: the signed tree head that covers the entries, as its note's text.
        notes: what verifying a record found worth knowing and no fault.
        additions: what others have signed of a record (`rlhf_audit_nb.records.additions.Addition`).
        people: whose signatures count, by a policy (`rlhf_audit_nb.records.signatures.Person`); empty where none was
            given.
    """

    verdict: Verdict
    entries: tuple[Entry, ...]
    notebook: Any = None
    origin_kind: OriginKind = "trail"
    checkpoint: str | None = None
    notes: tuple[Reason, ...] = ()
    additions: tuple[Any, ...] = ()
    people: tuple[Any, ...] = ()

    @classmethod
    def from_trail(
        cls, location: Path | str, *, policy: TrustPolicy | None = None, home: Path | None = None
    ) -> Evidence:
        """Verifies the trail in a folder and takes all its entries.

        Raises:
            AuditError: there is no trail there, or no key to verify it with.
        """
        from rlhf_audit_nb.trail import TrailReader, verify_trail

        verdict = verify_trail(location, policy=policy, home=home)
        if not level_words(verdict.level.name).trusted:
            # The verdict has already said what is wrong; what can still be read is shown as such, never as evidence.
            return cls(verdict, _readable(location, verdict.size), origin_kind="trail")
        reader = TrailReader.open(location)
        entries = tuple(reader.entries(0, verdict.size))
        _check_same(entries, verdict)
        # A run may have appended since the verdict: then the newest checkpoint covers more than these entries.
        checkpoint = reader.checkpoint() if reader.size == verdict.size else None
        return cls(verdict, entries, origin_kind="trail", checkpoint=checkpoint)

    @classmethod
    def from_published(
        cls, target: Path | str, *, policy: TrustPolicy | None = None, home: Path | None = None
    ) -> Evidence:
        """Verifies a published trail (a folder or an address) and takes all its entries.

        Raises:
            AuditError: there is no published trail there, or no key to verify it with.
        """
        from rlhf_audit_nb.trail.published import verify_published

        entries: list[Entry] = []
        verdict = verify_published(target, policy=policy, home=home, entries=entries)
        if level_words(verdict.level.name).trusted:
            _check_same(tuple(entries), verdict)
        return cls(verdict, tuple(entries))

    @classmethod
    def from_record(cls, opened: Any) -> Evidence:
        """Takes a record that `rlhf_audit_nb.records.open_record` opened."""
        checkpoint = (opened.metadata or {}).get("checkpoint")
        # What holds has the shape of a notebook; nbformat, whose import takes longer than the report, sees to the rest.
        holds = level_words(opened.verdict.level.name).trusted
        return cls(
            opened.verdict,
            tuple(opened.entries),
            notebook=opened.content if holds else opened.notebook,
            origin_kind="record",
            checkpoint=checkpoint if isinstance(checkpoint, str) else None,
            notes=tuple(opened.notes),
            additions=tuple(opened.additions),
        )

    @property
    def level(self) -> str:
        """The verdict's level by name."""
        return str(self.verdict.level.name)

    @property
    def trusted(self) -> bool:
        """Whether anything here may be called evidence."""
        return level_words(self.level).trusted

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """The entries with their typed events, in order."""
        return tuple(_item(entry) for entry in self.entries)

    @cached_property
    def memo(self) -> dict[str, Any]:
        """What was worked out from these entries once and may be used again: they never change."""
        return {}

    @cached_property
    def _by_kind(self) -> dict[str, tuple[Item, ...]]:
        found: dict[str, list[Item]] = {}
        for item in self.items:
            if item.event is not None:
                found.setdefault(item.kind, []).append(item)
        return {kind: tuple(items) for kind, items in found.items()}

    def of(self, kind: type[EventT], run: str | None = None) -> tuple[tuple[Item, EventT], ...]:
        """All entries of one event type (of one run, where given) with their events."""
        return tuple(
            (item, item.event)
            for item in self._by_kind.get(kind.TYPE, ())
            if isinstance(item.event, kind) and (run is None or item.run == run)
        )

    @cached_property
    def unknown(self) -> tuple[Item, ...]:
        """Entries whose type or body this version cannot read."""
        return tuple(item for item in self.items if item.event is None)


def _item(entry: Entry) -> Item:
    try:
        return Item(entry, decode_body(entry.envelope.type, bytes(entry.envelope.body)))
    except AuditError as error:
        return Item(entry, None, problem=error.message)


def _check_same(entries: tuple[Entry, ...], verdict: Verdict) -> None:
    """What was read must be what was verified, or no claim may rest on it."""
    tree = Frontier()
    tree.extend(leaf_hash(entry.data) for entry in entries)
    if base64.b64encode(tree.root()).decode() != verdict.root:
        raise ReportError(
            "The trail changed while it was being read.",
            next_step="Verify it, and make the report again.",
            code="trail-changed",
        )


def _readable(location: Path | str, size: int) -> tuple[Entry, ...]:
    from rlhf_audit_nb.trail import TrailReader

    try:
        return tuple(TrailReader.open(location).entries(0, size))
    except (AuditError, ValueError, OSError):
        return ()  # a trail so broken that it cannot be read shows nothing; its verdict says so
