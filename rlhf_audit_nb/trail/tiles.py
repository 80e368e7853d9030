"""Publishing: a trail as static files in the layout of C2SP tlog-tiles v0.1.0. Floor 0.

::

    checkpoint                     the newest signed checkpoint, with cosignatures where there are some
    tile/L/N[.p/W]                 up to 256 hashes of tile level L; level 0 holds leaf hashes, only full tiles roll up
    tile/entries/N[.p/W]           up to 256 entries, each after its length in two bytes
    anchors/                       what others have said of the trail (`anchors`)
    anchors/index                  the digests and names of these files, as sha256sum writes them

``N`` is written in groups of three digits, all but the last after an ``x`` (1234067 is ``x001/x234/067``). A partial
tile of ``W`` hashes stands under ``.p/W``, and none of width 0 exists. A tile never changes.

Publishing again costs what is new. The checkpoint that is there already must be of this history: the store's own
subtrees, with the last partial tile hashed from its bytes, must give its root. What comes after it is hashed from the
bytes and must give the root of the trail's own checkpoint *before* anything is written: a wrong tile could not be taken
back. Then, in this order: entries and tiles; the checkpoint, once these are durable; anchors, of which none may be
larger than the checkpoint beside it; then partial tiles that have become full are dropped, which no reader of the new
checkpoint asks for. So the files hold together at every moment, and a publish that was cut off is run again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from rlhf_audit_nb.errors import FormatError, StoreError
from rlhf_audit_nb.trail.anchors import FOLDER as ANCHORS
from rlhf_audit_nb.trail.anchors import AnchorFolder
from rlhf_audit_nb.trail.checkpoint import Checkpoint, checkpoint_of
from rlhf_audit_nb.trail.merkle import Frontier, leaf_hash
from rlhf_audit_nb.trail.note import Note, parse_note
from rlhf_audit_nb.trail.store import BUNDLE, Bundle, Head, Store, Transaction, pack_entries, unpack_entries
from rlhf_audit_nb.trail.targets import Target, is_url, open_target, put_all
from rlhf_audit_nb.trail.verify import store_path

__all__ = [
    "ANCHOR_INDEX",
    "CHECKPOINT",
    "ENTRIES",
    "MAX_CHECKPOINT_BYTES",
    "MAX_INDEX_BYTES",
    "MAX_TILE_BYTES",
    "TILES",
    "Endorse",
    "Progress",
    "Published",
    "TileName",
    "parse_index",
    "parse_tile_path",
    "publish_tiles",
    "tile_path",
]

CHECKPOINT = "checkpoint"
TILES = "tile"
ENTRIES = "entries"
ANCHOR_INDEX = f"{ANCHORS}/index"
MAX_CHECKPOINT_BYTES = 1 << 20
MAX_INDEX_BYTES = 1 << 24
MAX_TILE_BYTES = BUNDLE * (2 + 65_535)

_PORTION = 16 * BUNDLE
_TILE_PATH = re.compile(r"tile/(entries|0|[1-9][0-9]?)/((?:x[0-9]{3}/){0,6}[0-9]{3})(?:\.p/([1-9][0-9]{0,2}))?")
_INDEX_LINE = re.compile(r"([0-9a-f]{64})  ([0-9]{1,19}\.[A-Za-z0-9._-]{1,104})")
_MAX_LEVEL = 63

Progress = Callable[[str, int, int], None]
"""Called as a publish goes on: ``checked`` or ``written``, how many entries, of how many."""
Endorse = Callable[[str], str]
"""Adds a signature to a checkpoint (a signed note)."""


@dataclass(frozen=True)
class Published:
    """What a publish did.

    Attributes:
        target: the folder or address, without secrets.
        size: how many entries are published now, and
        before: how many were before.
        written: how many files had to be written, and
        removed: how many partial tiles were dropped because their full ones are there.
    """

    target: str
    size: int
    before: int
    written: int
    removed: int


@dataclass(frozen=True)
class TileName:
    """One tile: its level (or ``entries``), its number and how many items it holds."""

    level: int | str
    number: int
    width: int = BUNDLE

    @property
    def first(self) -> int:
        """The index of its first item among all of its level."""
        return self.number * BUNDLE

    @property
    def path(self) -> str:
        """Where it stands."""
        return tile_path(self.level, self.number, self.width)

    def available(self, size: int) -> int:
        """How many items the whole tile of this number has in a trail of ``size`` entries (0 to 256)."""
        total = size if self.level == ENTRIES else size // BUNDLE ** int(self.level)
        return min(max(total - self.first, 0), BUNDLE)


def tile_path(level: int | str, number: int, width: int = BUNDLE) -> str:
    """The path of tile ``number`` of a level (or of ``entries``) with ``width`` (1 to 256) items."""
    groups = [f"{number % 1000:03d}"]
    while number := number // 1000:
        groups.insert(0, f"x{number % 1000:03d}")
    path = f"{TILES}/{level}/" + "/".join(groups)
    return path if width == BUNDLE else f"{path}.p/{width}"


def parse_tile_path(path: str) -> TileName | None:
    """The tile that stands at ``path``; ``None`` where no tile may stand there. The inverse of `tile_path`."""
    match = _TILE_PATH.fullmatch(path)
    if match is None:
        return None
    level = match[1] if match[1] == ENTRIES else int(match[1])
    number = int(match[2].replace("x", "").replace("/", ""))
    found = TileName(level, number, int(match[3] or BUNDLE))
    whole = match[3] is None or found.width < BUNDLE
    return found if whole and (level == ENTRIES or int(level) <= _MAX_LEVEL) and found.path == path else None


def parse_index(data: bytes | None) -> dict[str, str]:
    """The names in ``anchors/index``, which `sha256sum` could have written, with their digests; the rest is ignored."""
    lines = (data or b"").decode("ascii", "replace").split("\n")
    return {match[2]: match[1] for line in lines if (match := _INDEX_LINE.fullmatch(line))}


def publish_tiles(
    location: Path | str,
    target: Path | str,
    *,
    progress: Progress | None = None,
    everything: bool = False,
    endorse: Endorse | None = None,
) -> Published:
    """Publish the trail in the folder ``location`` to ``target``, or bring that up to date.

    Args:
        location: the trail's folder.
        target: a folder, or an address that fsspec can write to (``s3://BUCKET/FOLDER``).
        progress: called as it goes on.
        everything: look at every tile that is there, not only at the checkpoint, and write what is missing.
        endorse: adds the log's second signature to the checkpoint that is published (`KeyRing.endorse`).

    Raises:
        StoreError: the trail cannot be read or does not hang together (``damaged``); the target cannot be written
            (``disk-full``, ``read-only``, ``unreachable``), holds a link (``link``), is being published to by somebody
            else (``in-use``), or was published from another history or a longer one (``diverged``). What was published
            before still holds.
    """
    store = Store(store_path(location), write=False)
    try:
        there = store.exists()
        inside = not is_url(target) and store_path(target).exists()
    except OSError as error:
        raise StoreError(
            f"{error.filename or store.path} cannot be read: {error.strerror or error}.",
            next_step="Make it readable.",
            code="unreadable",
        ) from error
    if not there:
        raise StoreError(f"There is no trail at {store.path}.", next_step="Name its folder.", code="no-trail")
    if inside:
        raise StoreError(
            f"{target} is the folder of a trail itself.",
            next_step="Publish into a folder of its own: what is published is for everybody.",
            code="target",
        )
    opened = open_target(target)
    with opened.publishing(store.path.parent.absolute()) as cut_off:
        publish = _Publish(store, opened, progress or _silent, endorse or _as_it_is, everything)
        return publish.run(cut_off=cut_off)


def _silent(_what: str, _done: int, _all: int) -> None:
    """No progress is told."""


def _as_it_is(note: str) -> str:
    return note


def _damaged(what: str) -> StoreError:
    return StoreError(
        f"The trail does not hang together: {what}. Nothing was published.",
        next_step="Run `rlhf-audit verify` on it to see what is wrong.",
        code="damaged",
    )


@dataclass
class _Publish:
    """One publish."""

    store: Store
    target: Target
    progress: Progress
    endorse: Endorse
    everything: bool
    written: int = 0
    seen: Checkpoint | None = None
    start: int = 0
    rows: dict[int, list[bytes]] = field(default_factory=dict)
    digests: list[bytes] = field(default_factory=list)

    def run(self, *, cut_off: bool) -> Published:
        there = self.target.read(CHECKPOINT, MAX_CHECKPOINT_BYTES)
        self.seen = None if there is None else self._parse(there)
        with self.store.reading() as transaction:
            head = transaction.head()
            before = self._before(head)
            frontier = self._begin(transaction, before)
        self._check(head, frontier)
        if self.everything or head.size > before:
            self.written += put_all(self.target, self._tiles(head, 0 if self.everything else before))
        note = self._checkpoint(head, there)
        if there is None or there != note.encode():
            self._put_checkpoint(there, note)
        self._put_anchors(head.size)
        removed = self._drop(before, head.size, sweep=cut_off or self.everything)
        return Published(self.target.name, head.size, before, self.written, removed)

    def _parse(self, note: bytes) -> Checkpoint:
        try:
            return checkpoint_of(note)
        except FormatError as error:
            raise self._other(f"its checkpoint cannot be read ({error.message.rstrip('.')})") from error

    def _other(self, what: str) -> StoreError:
        return StoreError(
            f"{self.target.name} was published from another history: {what}.",
            next_step="Keep it as evidence and publish elsewhere, after `rlhf-audit verify` of both.",
            code="diverged",
        )

    def _before(self, head: Head) -> int:
        """How many entries are published; refused where they cannot be this trail's first ones."""
        if self.seen is None:
            return 0
        if self.seen.origin != head.origin:
            raise self._other(f"it is of {self.seen.origin}, this trail is {head.origin}")
        if self.seen.size > head.size:
            raise self._other(f"it has {self.seen.size} entries and the trail {head.size}")
        return self.seen.size

    def _begin(self, transaction: Transaction, before: int) -> Frontier:
        """The tree up to the last full tile that is published, from the stored subtrees; its right edge is kept."""
        self.start = 0 if self.everything else before - before % BUNDLE
        try:
            level = 1
            while count := self.start // BUNDLE**level:
                width = count % BUNDLE
                self.rows[level] = transaction.hashes.tile(level, count // BUNDLE)[:width] if width else []
                level += 1
            bits = [bit for bit in range(self.start.bit_length() - 1, -1, -1) if self.start >> bit & 1]
            nodes = [transaction.hashes.node(bit, (self.start >> bit) - 1) for bit in bits]
            return Frontier(self.start, nodes)
        except (StoreError, ValueError) as error:
            raise _damaged("subtrees of it are missing or cut") from error

    def _check(self, head: Head, frontier: Frontier) -> None:
        """Refuse entries that are not the checkpoint's, and a target that holds another history."""
        seen = self.seen
        differs = seen is not None and seen.size == frontier.size and seen.root != frontier.root()
        for number, entries, _ in self._bundles(head.size):
            leaves = [leaf_hash(entry) for entry in entries]
            self.digests.append(sha256(b"".join(leaves)).digest())
            split = 0 if seen is None else min(max(seen.size - frontier.size, 0), len(leaves))
            self._grow(frontier, leaves[:split])
            differs |= seen is not None and seen.size == frontier.size and seen.root != frontier.root()
            self._grow(frontier, leaves[split:])
            self.progress("checked", number * BUNDLE + len(entries), head.size)
        try:
            checkpoint = checkpoint_of(head.note)
        except FormatError as error:
            raise _damaged(f"its newest checkpoint is none ({error.message.rstrip('.')})") from error
        if (checkpoint.size, checkpoint.root) != (frontier.size, frontier.root()):
            raise _damaged("its entries are not those of its newest checkpoint")
        if differs:
            assert seen is not None
            raise self._other(f"its root at size {seen.size} is not this trail's")

    def _grow(self, frontier: Frontier, leaves: Sequence[bytes]) -> None:
        for level, _, node in frontier.extend(leaves):
            self.rows.setdefault(level, []).append(node)

    def _tiles(self, head: Head, before: int) -> Iterator[tuple[str, bytes]]:
        """Every file that a trail of ``before`` entries does not have."""
        for digest, (number, entries, packed) in zip(self.digests, self._bundles(head.size), strict=True):
            joined = b"".join([leaf_hash(entry) for entry in entries])
            if sha256(joined).digest() != digest:
                raise _damaged(f"entries from {number * BUNDLE} on changed while they were read")
            yield tile_path(ENTRIES, number, len(entries)), packed
            yield tile_path(0, number, len(entries)), joined
            self.progress("written", number * BUNDLE + len(entries), head.size)
        for level, row in sorted(self.rows.items()):
            if head.size // BUNDLE**level == before // BUNDLE**level:
                continue
            first = self.start // BUNDLE**level // BUNDLE
            for at in range(0, len(row), BUNDLE):
                tile = row[at : at + BUNDLE]
                yield tile_path(level, first + at // BUNDLE, len(tile)), b"".join(tile)

    def _bundles(self, size: int) -> Iterator[tuple[int, list[bytes], bytes]]:
        """Each tile's number, entries and entry bundle, read in portions: a long publish must not hold an old state."""
        for first in range(self.start, size, _PORTION):
            stop = min(first + _PORTION, size)
            with self.store.reading() as transaction:
                rows = list(transaction.bundles(first, stop))
            for at in range(first, stop, BUNDLE):
                number, width = at // BUNDLE, min(BUNDLE, size - at)
                yield (number, *_join([row for row in rows if row.first // BUNDLE == number], at, width))

    def _checkpoint(self, head: Head, there: bytes | None) -> str:
        """The note to publish: the trail's newest, with all that was signed of this very size."""
        folder = AnchorFolder(self.store.path.parent)
        note = parse_note(head.note)
        for kind in ("checkpoint", "cosigned"):
            note = _joined(note, folder.read(f"{head.size}.{kind}"))
        published = _parsed(there)
        if published is not None and published.text == note.text and not self.everything:
            # Others may have signed it since; it stays where it says all that this one says.
            note = published if set(note.signatures) <= set(published.signatures) else note
        return self.endorse(note.format())

    def _put_checkpoint(self, there: bytes | None, note: str) -> None:
        self.target.settle()
        if self.target.read(CHECKPOINT, MAX_CHECKPOINT_BYTES) != there:
            raise StoreError(
                f"Somebody else has published to {self.target.name} meanwhile.",
                next_step="Publish again: it goes on from what is there now.",
                code="in-use",
            )
        self.target.replace(CHECKPOINT, note.encode())
        self.written += 1

    def _put_anchors(self, size: int) -> None:
        """Copy what others have said, only of what is published and only what is new; their index last."""
        folder = AnchorFolder(self.store.path.parent)
        there = self.target.read(ANCHOR_INDEX, MAX_INDEX_BYTES)
        index = parse_index(there)
        # The checkpoint of a size before the tokens over it.
        for name in sorted(folder.names(), key=lambda name: (name.endswith(".tsr"), name)):
            data = folder.read(name)
            if data is None or int(name.partition(".")[0]) > size:
                continue
            digest = sha256(data).hexdigest()
            if self.everything or index.get(name) != digest:
                self._update(f"{ANCHORS}/{name}", self.target.read(f"{ANCHORS}/{name}", MAX_CHECKPOINT_BYTES), data)
            index[name] = digest
        if index:
            text = "".join(f"{digest}  {name}\n" for name, digest in sorted(index.items()))
            self._update(ANCHOR_INDEX, there, text.encode())

    def _update(self, name: str, there: bytes | None, data: bytes) -> None:
        if there != data:
            self.target.replace(name, data)
            self.written += 1

    def _drop(self, before: int, size: int, *, sweep: bool) -> int:
        """Remove partial tiles whose full ones are published; how many."""
        if sweep:
            found = list(self.target.files(TILES))
        else:
            found = [name for edge in _edges(before) for name in self._partials(edge, size)]
        removed = 0
        for name in found:
            tile = parse_tile_path(name)
            if tile is not None and tile.width < BUNDLE and tile.available(size) == BUNDLE:
                self.target.remove(name)
                removed += 1
        return removed

    def _partials(self, edge: TileName, size: int) -> Iterator[str]:
        return (
            self.target.files(f"{tile_path(edge.level, edge.number)}.p") if edge.available(size) == BUNDLE else iter(())
        )


def _edges(size: int) -> Iterator[TileName]:
    """The partial tiles of a trail of ``size`` entries."""
    level, count = 0, size
    if count % BUNDLE:
        yield TileName(ENTRIES, count // BUNDLE, count % BUNDLE)
    while count:
        if count % BUNDLE:
            yield TileName(level, count // BUNDLE, count % BUNDLE)
        level, count = level + 1, count // BUNDLE


def _join(rows: Sequence[Bundle], first: int, width: int) -> tuple[list[bytes], bytes]:
    """The entries of one tile from its rows, and their bundle."""
    entries: list[bytes] = []
    try:
        for row in rows:
            if row.first != first + len(entries):
                raise FormatError(f"entries from {first + len(entries)} on are missing", code="bundle")
            entries += unpack_entries(row.data, row.count)
    except FormatError as error:
        raise _damaged(f"the tile of entries from {first} on: {error.message.rstrip('.')}") from error
    if len(entries) < width:
        raise _damaged(f"entries from {first + len(entries)} on are missing")
    if len(entries) == width:
        return entries, b"".join([row.data for row in rows])
    return entries[:width], pack_entries(entries[:width])


def _parsed(note: bytes | None) -> Note | None:
    """A signed note; ``None`` where there is none, or whoever wrote it did not write one."""
    try:
        return None if note is None else parse_note(note)
    except FormatError:
        return None


def _joined(own: Note, said: bytes | None) -> Note:
    """A note with the lines of another over the same text after its own; of one key the first."""
    other = _parsed(said)
    if other is None or other.text != own.text:
        return own
    known = {(line.name, line.key_id) for line in own.signatures}
    return own.plus(*[line for line in other.signatures if (line.name, line.key_id) not in known])
