"""Verifying a published trail: the files of C2SP tlog-tiles alone, without the store. Floor 0.

Everything is read once, in the order of the trail, and hashed again: each entry bundle must give the tile of leaf
hashes beside it, these the tiles above, and all of them the root of the signed checkpoint; the entries must go
together as in a store, the keys follow from the key entries among them, and what others have said (``anchors/``) must
be of this history. What does not hold is named by the file or the entry. The verdict is the one that the store itself
would get (`verify`), the last-seen heads included. Memory holds one tile of each level, and of an address the few
files that are fetched ahead.

While somebody publishes, and after a publish was cut off, the files go together all the same: tiles ahead of the
checkpoint are nobody's promise yet and are left alone, and where a partial tile was dropped since the checkpoint was
read, the full one serves (as the specification asks of a reader). Where the files can be listed, one that no tile may
be is named, and a partial tile of an older checkpoint must be the beginning of the tile that is there now.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_audit_nb.errors import FormatError, StoreError
from rlhf_audit_nb.trail.anchors import COSIGNATURE_ANCHOR, read_anchors
from rlhf_audit_nb.trail.anchors import FOLDER as ANCHORS
from rlhf_audit_nb.trail.checkpoint import Checkpoint, checkpoint_of
from rlhf_audit_nb.trail.entry import Entry
from rlhf_audit_nb.trail.heads import Heads
from rlhf_audit_nb.trail.keys import home_folder, local_policy
from rlhf_audit_nb.trail.merkle import EMPTY_ROOT, HASH_BYTES, Frontier, leaf_hash
from rlhf_audit_nb.trail.store import BUNDLE, unpack_entries
from rlhf_audit_nb.trail.succession import KeySuccession, known_limits
from rlhf_audit_nb.trail.targets import Target, is_url, open_target, read_ahead
from rlhf_audit_nb.trail.tiles import (
    ANCHOR_INDEX,
    CHECKPOINT,
    ENTRIES,
    MAX_CHECKPOINT_BYTES,
    MAX_INDEX_BYTES,
    MAX_TILE_BYTES,
    TILES,
    TileName,
    parse_index,
    parse_tile_path,
)
from rlhf_audit_nb.trail.timestamp import trusted_authorities
from rlhf_audit_nb.trail.verdict import Anchor, Level, Reason, Verdict
from rlhf_audit_nb.trail.verify import MAX_REASONS, EntryChecker, conclude

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.policy import CheckedCheckpoint, TrustPolicy

__all__ = ["is_published", "verify_published"]

_ANCHOR_NAME = re.compile(r"([0-9]{1,19})\.[A-Za-z0-9._-]{1,104}")
_DATABASES = frozenset({"postgresql", "sqlite", "mysql"})
_NOT_THERE = "It is missing, a link, or too large"

Progress = Callable[[int, int], None]


def is_published(target: Path | str) -> bool:
    """Whether a target looks like a published trail: any address, or a folder with a checkpoint and no store."""
    if is_url(target) and not str(target).startswith(("file://", "local://")):
        return str(target).partition("://")[0].partition("+")[0].lower() not in _DATABASES
    path = Path(str(target).partition("://")[2]) if is_url(target) else Path(target).expanduser()
    return (path / CHECKPOINT).is_file() and not (path / "trail.sqlite").exists()


def verify_published(
    target: Path | str,
    *,
    policy: TrustPolicy | None = None,
    home: Path | None = None,
    tsa_roots: Sequence[bytes] | None = None,
    progress: Progress | None = None,
    entries: list[Entry] | None = None,
) -> Verdict:
    """Verify the trail that was published to ``target``.

    Args:
        target: the folder or address where ``checkpoint`` and ``tile/`` lie: a path, ``https://``, ``s3://`` ...
        policy: whose signatures count; ``None`` trusts the user's own key for the trail's origin.
        home: the folder of keys and last-seen heads; ``None`` takes ``RLHF_AUDIT_HOME`` or the user's own.
        tsa_roots: certificates (PEM) of the timestamping authorities that are trusted; ``None`` takes ``HOME/tsa``.
        progress: called now and then with how many entries were checked, and how many there are.
        entries: a list that takes the entries that were checked, in their order; the verdict says what they are worth.

    Raises:
        StoreError: there is no published trail there, or a file cannot be read.
        KeyFileError: no policy was given and the user has no key for this origin.
    """
    opened = open_target(target)
    home = home_folder(home)
    try:
        origin = checkpoint_of(_checkpoint(opened)).origin
        # Read before the checkpoint that counts: while somebody publishes, anchors come after the checkpoint that they
        # belong to, and whatever was seen before must be in it.
        names = _anchor_names(opened)
        trusted = policy or local_policy(home, origin)
        heads = Heads(home)
        seen = heads.note(origin)
        data = _checkpoint(opened)
        head, note = checkpoint_of(data), data.decode()
    except FormatError as error:
        return Verdict(Level.INVALID, "", 0, "", reasons=(Reason("checkpoint", CHECKPOINT, error.message),))
    before = None if seen is None else checkpoint_of(seen)
    audit = _Tiles(opened, head, KeySuccession(origin, known_limits(home, origin)), progress)
    audit.entries = entries
    audit.sizes = _sizes([*(int(name.partition(".")[0]) for name in names), before.size if before else 0])
    checked = audit.run(trusted, note)
    roots = trusted_authorities(home) if tsa_roots is None else tsa_roots
    anchors, said = audit.anchors(names, trusted, roots, heads, note)
    root_at_seen = audit.roots.get(before.size) if before else None
    level = conclude(checked, audit.reasons, trusted, heads, seen, note, root_at_seen, anchors)
    reasons = [*audit.reasons, *said[:MAX_REASONS], *islice(audit.checker.unended(), MAX_REASONS)]
    signers = checked.signers if checked else ()
    root = base64.b64encode(head.root).decode()
    return Verdict(level, origin, head.size, root, signers, audit.checker.runs(), tuple(reasons), tuple(anchors))


def _checkpoint(target: Target) -> bytes:
    data = target.read(CHECKPOINT, MAX_CHECKPOINT_BYTES)
    if data is None:
        raise StoreError(
            f"There is no published trail at {target.name}, or it may not be read.",
            next_step="Name the folder or the address that holds the file checkpoint, and check your rights there.",
            code="no-trail",
        )
    return data


def _anchor_names(target: Target) -> list[str]:
    """What ``anchors/`` holds, by listing it and by its index."""
    names = set(parse_index(target.read(ANCHOR_INDEX, MAX_INDEX_BYTES)))
    names |= {name.removeprefix(f"{ANCHORS}/") for name in target.files(ANCHORS)}
    return sorted((name for name in names if _ANCHOR_NAME.fullmatch(name)), key=_anchor_order)


def _anchor_order(name: str) -> tuple[int, bool, str]:
    """The order in which they are looked at, so that they can be fetched ahead."""
    return int(name.partition(".")[0]), name.endswith(".tsr"), name


def _sizes(sizes: Sequence[int]) -> list[int]:
    """Each size once, the largest first."""
    return sorted(set(sizes), reverse=True)


def _expected(size: int) -> Iterator[TileName]:
    """Every tile of a trail of ``size`` entries, each after those that it is made of."""
    for number in range(-(-size // BUNDLE)):
        width = min(BUNDLE, size - number * BUNDLE)
        yield TileName(ENTRIES, number, width)
        yield TileName(0, number, width)
        level, count = 1, number + 1
        while width == BUNDLE and count % BUNDLE == 0:
            yield TileName(level, count // BUNDLE - 1)
            level, count = level + 1, count // BUNDLE
    level, count = 1, size // BUNDLE
    while count:
        if count % BUNDLE:
            yield TileName(level, count // BUNDLE, count % BUNDLE)
        level, count = level + 1, count // BUNDLE


def _most(tile: TileName) -> int:
    return MAX_TILE_BYTES if tile.level == ENTRIES else tile.width * HASH_BYTES


def _cut(joined: bytes) -> list[bytes]:
    return [joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES)]


def _items(tile: TileName, data: bytes) -> list[bytes]:
    """The items of a tile.

    Raises:
        FormatError: it does not hold exactly as many as its name says.
    """
    if tile.level == ENTRIES:
        return unpack_entries(data, tile.width)
    if len(data) != tile.width * HASH_BYTES:
        raise FormatError(f"It has {len(data)} bytes, not {tile.width * HASH_BYTES}.", code="tile")
    return _cut(data)


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


@dataclass
class _Tiles:
    """One verification of one published trail."""

    target: Target
    head: Checkpoint
    keys: KeySuccession
    progress: Progress | None = None
    sizes: list[int] = field(default_factory=list)
    roots: dict[int, bytes] = field(default_factory=dict)
    reasons: list[Reason] = field(default_factory=list)
    frontier: Frontier = field(default_factory=Frontier)
    checker: EntryChecker = field(default_factory=EntryChecker)
    rows: dict[int, list[bytes]] = field(default_factory=dict)
    legible: bool = True
    unsaid: int = 0
    entries: list[Entry] | None = None

    def fault(self, code: str, where: str, message: str) -> None:
        if len(self.reasons) < MAX_REASONS:
            self.reasons.append(Reason(code, where, message))
        else:
            self.unsaid += 1

    def run(self, policy: TrustPolicy, note: str) -> CheckedCheckpoint | None:
        """Look at every file; the checkpoint as the policy sees it, ``None`` where its signature does not count."""
        self._note_root()
        whole = self._scan()
        checked = self._signed(policy, note)
        if whole and self.frontier.root() != self.head.root:
            self.fault("root", CHECKPOINT, "Its root is not that of the entries.")
        if self.legible:
            for reason in (*self.keys.reasons, *self.checker.reasons):
                self.fault(reason.code, reason.where, reason.message)
        self._strays()
        if self.unsaid:
            message = f"{self.unsaid} more faults were found and are not listed."
            self.reasons.append(Reason("more", "the published files", message))
        return checked

    def _signed(self, policy: TrustPolicy, note: str) -> CheckedCheckpoint | None:
        try:
            return self.keys.check_newest(policy, note)
        except FormatError as error:
            self.fault(error.reason, CHECKPOINT, error.message)
            return None

    def _scan(self) -> bool:
        """Read every tile; whether the tree could be grown to the end."""
        contents = read_ahead(self.target, ((tile.path, _most(tile)) for tile in _expected(self.head.size)))
        leaves: list[bytes] | None = None
        for tile, found in zip(_expected(self.head.size), contents, strict=True):
            data = self._from_full(tile) if found is None else found
            if tile.level == ENTRIES:
                leaves = self._bundle(tile, data)
            elif tile.level == 0:
                leaves = self._leaves(tile, data, leaves)
                if leaves is None:
                    self.legible = False
                    return False
                self._grow(leaves)
            else:
                row = self.rows.get(int(tile.level), [])
                self._compare(tile, data, row)
                row.clear()
        return True

    def _from_full(self, tile: TileName) -> bytes | None:
        """A partial tile out of the full one, where that has taken its place since the checkpoint was read."""
        if tile.width == BUNDLE:
            return None
        full = TileName(tile.level, tile.number)
        data = self.target.read(full.path, _most(full))
        if data is None:
            return None
        if tile.level != ENTRIES:
            return data[: tile.width * HASH_BYTES]
        end = 0
        for _ in range(tile.width):
            end += 2 + int.from_bytes(data[end : end + 2], "big")
        return data[:end]

    def _bundle(self, tile: TileName, data: bytes | None) -> list[bytes] | None:
        """The leaf hashes of one bundle of entries; ``None`` where it cannot be read."""
        try:
            if data is None:
                raise FormatError(f"{_NOT_THERE}.", code="missing")
            entries = unpack_entries(data, tile.width)
        except FormatError as error:
            self.fault(error.reason, tile.path, f"{error.message} Its entries could not be checked.")
            self.legible = False
            return None
        for index, entry in enumerate(entries, tile.first):
            self._entry(index, entry)
        if self.progress is not None:
            self.progress(tile.first + tile.width, self.head.size)
        return [leaf_hash(entry) for entry in entries]

    def _entry(self, index: int, data: bytes) -> None:
        try:
            entry = Entry.decode(index, data)
        except FormatError as error:
            self.fault(error.reason, f"entry {index}", error.message)
            return
        self.checker.add(entry)
        self.keys.add(entry)
        if self.entries is not None:
            self.entries.append(entry)

    def _leaves(self, tile: TileName, data: bytes | None, leaves: list[bytes] | None) -> list[bytes] | None:
        """The leaf hashes to go on with: those of the entries, else those of the tile."""
        if leaves is not None:
            self._compare(tile, data, leaves)
            return leaves
        if data is None or len(data) != tile.width * HASH_BYTES:
            self.fault("missing", tile.path, f"{_NOT_THERE}, or cut; nothing after it could be checked.")
            return None
        return _cut(data)

    def _grow(self, leaves: list[bytes]) -> None:
        at = 0
        while at < len(leaves):
            stop = len(leaves)
            if self.sizes:
                stop = min(stop, at + self.sizes[-1] - self.frontier.size)
            for level, _, node in self.frontier.extend(leaves[at:stop]):
                self.rows.setdefault(level, []).append(node)
            at = stop
            self._note_root()

    def _note_root(self) -> None:
        """Keep the root of a size that somebody has spoken of."""
        size = self.frontier.size
        while self.sizes and self.sizes[-1] <= size:
            self.roots[self.sizes.pop()] = self.frontier.root() if size else EMPTY_ROOT

    def _compare(self, tile: TileName, data: bytes | None, row: Sequence[bytes]) -> None:
        if data is None:
            self.fault("missing", tile.path, f"{_NOT_THERE}.")
        elif data != b"".join(row):
            first = next((i for i, node in enumerate(row) if data[32 * i : 32 * i + 32] != node), len(row))
            what = f"entry {tile.first + first}" if tile.level == 0 else f"its hash {first}"
            self.fault("tile", tile.path, f"It is not what the entries hash to, from {what} on.")

    def _strays(self) -> None:
        """Name what no tile may be, and older partial tiles that are not the beginning of those that are there now."""
        for name in self.target.files(TILES):
            tile = parse_tile_path(name)
            if tile is None:
                what = "A tile of width 0 must not exist." if name.endswith(".p/0") else "No tile stands at this name."
                self.fault("tile" if name.endswith(".p/0") else "stray", _printable(name), what)
                continue
            now = TileName(tile.level, tile.number, tile.available(self.head.size))
            if now.width not in (0, tile.width) and not self._agree(tile, now) and self._is_there(name):
                self.fault("tile", name, f"It does not agree with {now.path}, which is of the same tile.")

    def _is_there(self, name: str) -> bool:
        """Whether a file is still listed: a publisher may have dropped an older partial tile since it was."""
        return name in self.target.files(name.rpartition("/")[0])

    def _agree(self, tile: TileName, now: TileName) -> bool:
        """Whether of two tiles of one number the shorter is the beginning of the longer."""
        one, other = (self.target.read(item.path, _most(item)) for item in (tile, now))
        if other is None:
            other = self._from_full(now)
        if one is None or other is None:
            return False
        try:
            mine, yours = _items(tile, one), _items(now, other)
        except FormatError:
            return False
        return all(left == right for left, right in zip(mine, yours, strict=False))

    def anchors(
        self, names: Sequence[str], policy: TrustPolicy, tsa_roots: Sequence[bytes], heads: Heads, note: str
    ) -> tuple[list[Anchor], Sequence[Reason]]:
        """What others have said of this history; what they have said of another one becomes a reason."""
        origin = self.head.origin
        trusted = [key for key in policy.logs if key.name == origin]

        wanted = [(f"{ANCHORS}/{name}", MAX_CHECKPOINT_BYTES) for name in names]
        coming = zip(names, read_ahead(self.target, wanted), strict=True)
        came: dict[str, bytes | None] = {}

        def read(name: str) -> bytes | None:
            while name not in came:
                following, data = next(coming, (name, None))
                came[following] = data
            return came.pop(name)

        claimed, said = read_anchors(
            read, names, policy, origin, tsa_roots, logs=lambda size: self.keys.log_verifiers(trusted, size)
        )
        fitting = [anchor for anchor in claimed if self.roots.get(anchor.size) == anchor.root]
        if not self.reasons:
            for anchor in [anchor for anchor in claimed if anchor not in fitting][:MAX_REASONS]:
                self._fork(anchor, heads, note)
        return fitting, said

    def _fork(self, anchor: Anchor, heads: Heads, note: str) -> None:
        """Name an anchor of another history, and keep both signed heads."""
        plain = anchor.kind != COSIGNATURE_ANCHOR
        where = f"{ANCHORS}/{anchor.size}.checkpoint" if plain else anchor.where
        signed = self.target.read(where, MAX_CHECKPOINT_BYTES) or b""
        kept = heads.keep_evidence(self.head.origin, signed.decode(), note)
        if anchor.size > self.head.size:
            code = "rollback"
            what = f"It covers {anchor.size} entries; there are {self.head.size}, so entries were taken away."
        else:
            code = "anchor-fork"
            what = f"At size {anchor.size} its root is another one, so history was rewritten."
        message = f"{anchor.by} has vouched for another history. {what} Both signed heads are kept in {kept}."
        self.fault(code, anchor.where, message)
