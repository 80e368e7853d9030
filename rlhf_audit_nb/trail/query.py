"""Looking into a trail: entries by place, the last few, those that match, and new ones as they come. Floor 0.

Nothing is verified here but this: an entry whose bytes are not those that were hashed when it was appended, or that
cannot be decoded, comes as `Damaged` and says why; whether the trail holds is for `verify` to say. Private halves
stay closed: an entry shows that it has one, never what it is.

A query is quick at a million entries because rows are found by the index of types and runs; the commit times of the
signed checkpoints bound where a time can begin; and an entry that does not match is told by its first bytes, which are
in one form (`entry`), without decoding it.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from heapq import merge
from itertools import pairwise
from pathlib import Path

import msgspec

from rlhf_audit_nb.errors import FormatError, StoreError
from rlhf_audit_nb.trail.anchors import AnchorFolder
from rlhf_audit_nb.trail.checkpoint import checkpoint_of
from rlhf_audit_nb.trail.entry import Entry
from rlhf_audit_nb.trail.merkle import leaf_hash, prove_inclusion
from rlhf_audit_nb.trail.proof import InclusionProof
from rlhf_audit_nb.trail.sqlite import reading
from rlhf_audit_nb.trail.store import Bundle, Store, unpack_entries
from rlhf_audit_nb.trail.verify import CLOCK_SLACK_US, store_path
from rlhf_audit_nb.trail.writer import RUN_STARTED

__all__ = ["Damaged", "Filter", "Item", "Look", "parse_range", "parse_time"]

ROWS = 32
POLL_SECONDS = 0.25

_FRONT = re.compile(
    rb'\{"v":1,"type":"([a-z0-9._-]+)","time":([0-9]+),"run":(?:null|"([A-Za-z0-9._-]+)"),"seq":[0-9]+,"writer":"'
)
_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_RANGE = re.compile(r"(-?[0-9]+)?(:)?(-?[0-9]+)?")
_AGO = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_LEAST_PREFIX = 8


@dataclass(frozen=True)
class Damaged:
    """An entry that cannot be shown, and why."""

    index: int
    why: str


Item = Entry | Damaged


@dataclass(frozen=True)
class Filter:
    """What an entry must be to be shown; every part that is not ``None`` must hold.

    Attributes:
        run: its run.
        type: its type.
        experiment: the name that its run's start gives.
        since: the earliest time (µs since 1970-01-01 UTC), itself included.
        until: the time (µs) before which it is.
    """

    run: str | None = None
    type: str | None = None
    experiment: str | None = None
    since: int | None = None
    until: int | None = None


class _Started(msgspec.Struct):
    experiment: str | None = None


_started = msgspec.json.Decoder(_Started)


def parse_range(text: str, size: int) -> range:
    """The places that ``7``, ``-1`` (the last), ``5:10`` (10 not included), ``5:`` or ``-10:`` name among ``size``.

    Raises:
        StoreError: it names none of them, or is no such thing.
    """
    match = _RANGE.fullmatch(text.strip())
    if match is None or not text.strip() or (not match[2] and match[3] is not None):
        raise StoreError(
            f"{text[:40]!r} names no entry.",
            next_step="Write an index such as 7, -1 for the last, or a range such as 5:10 (10 not included).",
            code="range",
        )
    first, colon, stop = match.groups()
    if colon:
        chosen = range(size)[slice(None if first is None else int(first), None if stop is None else int(stop))]
    else:
        at = int(first)
        at = at + size if at < 0 else at
        chosen = range(at, at + 1) if 0 <= at < size else range(0)
    if not chosen:
        raise StoreError(
            f"The trail has {size} entries, 0 to {size - 1}; {text.strip()} names none of them.",
            next_step="Name one of these; -1 is the last.",
            code="range",
        )
    return chosen


def parse_time(text: str, now: float | None = None) -> int:
    """A time in microseconds: ``2026-11-22``, ``2026-11-22T14:00``, with or without an offset (else UTC), or ``2h``.

    ``30s``, ``15m``, ``2h``, ``3d`` and ``1w`` are that long before ``now`` (POSIX seconds, by default the clock's).

    Raises:
        FormatError: it is none of these.
    """
    ago = _AGO.fullmatch(text.strip())
    try:
        if ago:
            when = (time.time() if now is None else now) - float(ago[1]) * _SECONDS[ago[2]]
            return round(when * 1e6)
        given = datetime.fromisoformat(text.strip())
        given = given if given.tzinfo is not None else given.replace(tzinfo=UTC)
        return (given - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    except (ValueError, OverflowError) as error:
        raise FormatError(
            f"{text[:40]!r} is not a time.",
            next_step="Write a date (2026-11-22), a time (2026-11-22T14:00+01:00; UTC without an offset), or 2h, 3d.",
            code="time",
        ) from error


class Look:
    """One trail, looked into; needs no keys. What is appended later is seen by the next call.

    Raises:
        StoreError: there is no trail, or it cannot be read.
    """

    def __init__(self, location: Path | str) -> None:
        self._store = Store(store_path(location), write=False)
        if not self._store.exists():
            raise StoreError(
                f"There is no trail at {self._store.path}.",
                next_step="Name the folder that holds trail.sqlite, with --trail or RLHF_AUDIT_TRAIL.",
                code="no-trail",
            )
        with self._store.reading() as transaction:
            self.origin = transaction.head().origin

    def size(self) -> int:
        """How many entries there are now."""
        with self._store.reading() as transaction:
            return transaction.size()

    def runs(self) -> list[str]:
        """The ids of all runs, in alphabetical order, from the index."""
        return self._names("r:", "r;")

    def types(self) -> list[str]:
        """All types, in alphabetical order, from the index."""
        return self._names("t:", "t;")

    def _names(self, start: str, stop: str) -> list[str]:
        """The names behind the prefix ``start``; what can be no name, in an index that was changed, is left out."""
        # A step for each term, not a row: each search begins behind the last one found.
        query = "SELECT min(term) FROM terms WHERE term > :after AND term < :stop"
        found: list[str] = []
        with reading(self._store.path) as session:
            at = start
            while (term := session.raw.execute(query, {"after": at, "stop": stop}).fetchone()[0]) is not None:
                at = str(term)
                found.append(at.removeprefix(start))
        return [name for name in found if _NAME.fullmatch(name)]

    def run_named(self, given: str) -> str:
        """The run whose id is ``given`` or begins with it.

        Raises:
            StoreError: no run's does, or several do.
        """
        found = [run for run in self.runs() if run.startswith(given)]
        if given in found:
            return given
        if len(found) == 1:
            return found[0]
        if found:
            some = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")  # noqa: PLR2004 (a line's worth)
            raise StoreError(
                f"{len(found)} runs begin with {given}: {some}.", next_step="Write more of it.", code="run"
            )
        raise StoreError(
            f"No run of this trail begins with {given[:140]!r}.",
            next_step="`rlhf-audit trail query --type run.started` lists the runs.",
            code="run",
        )

    def short_runs(self) -> dict[str, str]:
        """Every run's id by its shortest beginning, of at least 8 characters, that no other run shares."""
        runs = self.runs()
        shared = [_common(a, b) for a, b in pairwise(runs)]
        return {
            run: run[: max(_LEAST_PREFIX, before + 1, after + 1)]
            for run, before, after in zip(runs, [0, *shared], [*shared, 0], strict=False)
        }

    def entries(self, places: range) -> Iterator[Item]:
        """The entries at ``places``, a range that `parse_range` gave; one that the store lacks is `Damaged`."""
        wanted = places.start
        for item in self._scan(places.start, places.stop, [], None):
            yield from (Damaged(index, "It is missing.") for index in range(wanted, item.index))
            wanted = item.index + 1
            yield item
        yield from (Damaged(index, "It is missing.") for index in range(wanted, places.stop))

    def tail(self, count: int, chosen: Filter | None = None) -> list[Item]:
        """The last ``count`` entries that match, in their order."""
        size = self.size()
        if chosen is None or chosen == Filter():
            return list(self.entries(range(max(0, size - count), size))) if count > 0 else []
        return list(deque(self.query(chosen, stop=size), maxlen=max(0, count)))

    def query(self, chosen: Filter, *, start: int = 0, stop: int | None = None) -> Iterator[Item]:
        """The entries of ``[start, stop)`` that match, in order; damaged ones on the way as well.

        Rows are found by the index; `verify` shows whether it is complete.
        """
        stop = self.size() if stop is None else stop
        test = _Test(chosen)
        if chosen.since is not None:
            start = max(start, self._before(chosen.since))
        terms = [] if chosen.type is None else ["t:" + chosen.type]
        if chosen.run is not None:
            terms.append("r:" + chosen.run)
        if chosen.experiment is None:
            yield from self._scan(start, stop, terms, test)
            return
        test.runs = self._of_experiment(chosen.experiment, stop)
        found = [self._rows(start, stop, [*terms, "r:" + run]) for run in sorted(test.runs)]
        yield from self._look(merge(*found, key=_first_of), start, stop, test)

    def follow(
        self, chosen: Filter, start: int, wait: Callable[[float], object] = time.sleep, *, poll: float = POLL_SECONDS
    ) -> Iterator[Item]:
        """The entries from ``start`` on that match, and then those that come, until ``wait`` raises."""
        while True:
            size = self.size()
            if size > start:
                yield from self.query(chosen, start=start, stop=size)
                start = size
            wait(poll)

    def proof(self, index: int) -> InclusionProof:
        """That the entry at ``index`` stands under the newest checkpoint, with its cosignatures where there are any.

        Raises:
            StoreError: there is no such entry, or the store cannot be read.
        """
        with self._store.reading() as transaction:
            head = transaction.head()
            if not 0 <= index < head.size:
                raise StoreError(f"There is no entry {index} in a trail of {head.size}.", code="range")
            hashes = tuple(prove_inclusion(index, head.size, transaction.hashes))
        return InclusionProof(index, hashes, self._cosigned(head.size, head.note))

    def _cosigned(self, size: int, note: str) -> str:
        """The checkpoint ``note`` with the cosignatures that were collected for it."""
        try:
            found = AnchorFolder(self._store.path.parent).cosigned(size)
            return found if found is not None and checkpoint_of(found) == checkpoint_of(note) else note
        except (FormatError, StoreError):
            return note

    def _of_experiment(self, name: str, stop: int) -> frozenset[str]:
        found = set()
        for item in self.query(Filter(type=RUN_STARTED), stop=stop):
            if isinstance(item, Entry) and item.run is not None:
                try:
                    if _started.decode(item.body).experiment == name:
                        found.add(item.run)
                except msgspec.MsgspecError:
                    continue
        return frozenset(found)

    def _before(self, since: int) -> int:
        """A place before which every entry is older than ``since``: the last checkpoint that was committed before."""
        query = "SELECT max(size) FROM checkpoints WHERE time < :since"
        with reading(self._store.path) as session:
            (size,) = session.raw.execute(query, {"since": since - CLOCK_SLACK_US}).fetchone()
        return int(size or 0)

    def _scan(self, start: int, stop: int, terms: list[str], test: _Test | None) -> Iterator[Item]:
        return self._look(self._rows(start, stop, terms), start, stop, test)

    def _rows(self, start: int, stop: int, terms: list[str]) -> Iterator[Bundle]:
        # In portions, each read at once: whoever reads slowly must not hold an old state of the database.
        if start >= stop:
            return
        with self._store.reading() as transaction:
            at = transaction.bundle_start(start)
        while True:
            with self._store.reading() as transaction:
                rows = list(transaction.bundles(at, stop, terms, ROWS))
            yield from rows
            if len(rows) < ROWS:
                return
            at = rows[-1].first + 1

    @staticmethod
    def _look(rows: Iterable[Bundle], start: int, stop: int, test: _Test | None) -> Iterator[Item]:
        last = -1
        for row in rows:
            if row.first <= last:
                continue
            last = row.first
            try:
                entries = unpack_entries(row.data, row.count)
            except FormatError as error:
                places = range(max(start, row.first), min(stop, row.first + max(1, row.count)))
                why = f"The row of {row.count} entries from {row.first} on cannot be read: {error.message}"
                yield from (Damaged(index, why) for index in (places if test is None else places[:1]))
                continue
            for index, data in enumerate(entries, row.first):
                if start <= index < stop and (test is None or test.may_match(data)):
                    yield _decoded(index, data, row)


def _decoded(index: int, data: bytes, row: Bundle) -> Item:
    at = 32 * (index - row.first)
    if leaf_hash(data) != row.hashes[at : at + 32]:
        return Damaged(index, "Its bytes are not those that were hashed when it was appended.")
    try:
        return Entry.decode(index, data)
    except FormatError as error:
        return Damaged(index, error.message)


def _first_of(row: Bundle) -> int:
    return row.first


def _common(one: str, other: str) -> int:
    """How many characters two ids share at their beginnings."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class _Test:
    """A filter over the bytes of an entry."""

    def __init__(self, chosen: Filter) -> None:
        self._type = None if chosen.type is None else chosen.type.encode()
        self._run = None if chosen.run is None else chosen.run.encode()
        self._since = chosen.since if chosen.since is not None else -1
        self._until = chosen.until if chosen.until is not None else 1 << 63
        self._runs: frozenset[bytes] | None = None

    @property
    def runs(self) -> frozenset[str]:
        """The runs of which it must be one."""
        return frozenset(run.decode() for run in self._runs or ())

    @runs.setter
    def runs(self, names: frozenset[str]) -> None:
        self._runs = frozenset(name.encode() for name in names)

    def may_match(self, data: bytes) -> bool:
        """Whether the entry matches, or begins as no entry does: then it is damaged, which must be seen."""
        front = _FRONT.match(data)
        if front is None:
            return True
        kind, when, run = front.groups()
        return (
            (self._type is None or kind == self._type)
            and (self._run is None or run == self._run)
            and (self._runs is None or run in self._runs)
            and self._since <= int(when) < self._until
        )
