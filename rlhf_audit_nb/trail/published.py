"""Verifying a published trail: the files of C2SP tlog-tiles alone, without the store. Floor 0.

Everything is read once, in the order of the trail, and hashed again: each entry bundle must give the tile of leaf
hashes beside it, these the tiles above, and all of them the root of the signed checkpoint; the entries must go
together as in a store. What does not hold is named by the file or the entry. The verdict is the one that the store
itself would get (`verify`), the last-seen heads included. Memory holds one tile of each level.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_audit_nb.errors import FormatError, StoreError
from rlhf_audit_nb.trail.checkpoint import Checkpoint, checkpoint_of
from rlhf_audit_nb.trail.entry import Entry
from rlhf_audit_nb.trail.heads import Heads
from rlhf_audit_nb.trail.keys import home_folder, local_policy
from rlhf_audit_nb.trail.merkle import Frontier, leaf_hash
from rlhf_audit_nb.trail.store import BUNDLE, unpack_entries
from rlhf_audit_nb.trail.tiles import tile_path
from rlhf_audit_nb.trail.verdict import Level, Reason, Verdict
from rlhf_audit_nb.trail.verify import MAX_REASONS, EntryChecker, conclude

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.policy import CheckedCheckpoint, TrustPolicy

__all__ = ["is_published", "verify_published"]

CHECKPOINT = "checkpoint"
MAX_CHECKPOINT_BYTES = 1 << 20
MAX_TILE_BYTES = BUNDLE * (2 + 65_535)


def is_published(folder: Path | str) -> bool:
    """Whether ``folder`` looks like a published trail: it has a checkpoint and no store."""
    path = Path(folder).expanduser()
    return (path / CHECKPOINT).is_file() and not (path / "trail.sqlite").exists()


def verify_published(folder: Path | str, *, policy: TrustPolicy | None = None, home: Path | None = None) -> Verdict:
    """Verify the trail that was published into ``folder``.

    Args:
        folder: where ``checkpoint`` and ``tile/`` lie.
        policy: whose signatures count; ``None`` trusts the user's own key for the trail's origin.
        home: the folder of keys and last-seen heads; ``None`` takes ``RLHF_AUDIT_HOME`` or the user's own.

    Raises:
        StoreError: there is no published trail there, or a file cannot be read.
        KeyFileError: no policy was given and the user has no key for this origin.
    """
    files = _Files(Path(folder).expanduser())
    data = files.read(CHECKPOINT, MAX_CHECKPOINT_BYTES)
    if data is None:
        raise StoreError(
            f"There is no published trail in {files.folder}.",
            next_step="Name the folder that holds the file checkpoint.",
            code="no-trail",
        )
    try:
        head = checkpoint_of(data)
        note = data.decode()
    except (FormatError, UnicodeDecodeError) as error:
        message = error.message if isinstance(error, FormatError) else "It is not UTF-8."
        return Verdict(Level.INVALID, "", 0, "", reasons=(Reason("checkpoint", CHECKPOINT, message),))
    home = home_folder(home)
    trusted = policy or local_policy(home, head.origin)
    heads = Heads(home)
    seen = heads.note(head.origin)
    audit = _Tiles(files, head, None if seen is None else checkpoint_of(seen))
    checked = audit.signed(trusted, note)
    audit.run()
    level = conclude(checked, audit.reasons, trusted, heads, seen, note, audit.seen_root)
    signers = checked.signers if checked else ()
    root = base64.b64encode(head.root).decode()
    return Verdict(level, head.origin, head.size, root, signers, audit.checker.runs(), tuple(audit.reasons))


@dataclass(frozen=True)
class _Files:
    """The published files: read whole, never through a link."""

    folder: Path

    def read(self, name: str, most: int) -> bytes | None:
        """A file's bytes; ``None`` where it is missing, a link, no file, or larger than ``most``."""
        path = self.folder / name
        if any(parent.is_symlink() for parent in (path, *path.parents[: name.count("/")])):
            return None
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(
                f"{path} cannot be read: {error.strerror}.", next_step="Make it readable.", code="unreadable"
            ) from error
        with os.fdopen(descriptor, "rb") as file:
            try:
                data = file.read(most + 1)
            except IsADirectoryError:
                return None
        return data if len(data) <= most else None


@dataclass
class _Tiles:
    """One verification of one published trail."""

    files: _Files
    head: Checkpoint
    seen: Checkpoint | None
    reasons: list[Reason] = field(default_factory=list)
    frontier: Frontier = field(default_factory=Frontier)
    checker: EntryChecker = field(default_factory=EntryChecker)
    seen_root: bytes | None = None
    rows: dict[int, list[bytes]] = field(default_factory=dict)

    def fault(self, code: str, where: str, message: str) -> None:
        if len(self.reasons) < MAX_REASONS:
            self.reasons.append(Reason(code, where, message))

    def signed(self, policy: TrustPolicy, note: str) -> CheckedCheckpoint | None:
        try:
            return policy.check(note, self.head.origin)
        except FormatError as error:
            self.fault(error.reason, CHECKPOINT, error.message)
            return None

    def run(self) -> None:
        self._compare_seen()
        for number in range(-(-self.head.size // BUNDLE)):
            width = min(BUNDLE, self.head.size - number * BUNDLE)
            if not self._bundle(number, width):
                return
        for level, row in sorted(self.rows.items()):
            if row:
                total = self.head.size // BUNDLE**level
                self._compare_tile(level, total // BUNDLE, row)
        if self.frontier.root() != self.head.root:
            self.fault("root", CHECKPOINT, "Its root is not that of the entries.")
        for reason in self.checker.reasons:
            self.fault(reason.code, reason.where, reason.message)
        for stray in sorted(self.files.folder.glob("tile/**/*.p/0")):
            name = stray.relative_to(self.files.folder).as_posix()
            self.fault("tile", name, "A tile of width 0 must not exist.")

    def _bundle(self, number: int, width: int) -> bool:
        """One bundle of entries and the tiles that it completes; whether the next one can be looked at."""
        name = tile_path("entries", number, width)
        data = self.files.read(name, MAX_TILE_BYTES)
        if data is None:
            self.fault("missing", name, "It is missing, a link, or too large; nothing after it could be checked.")
            return False
        try:
            entries = unpack_entries(data, width)
        except FormatError as error:
            self.fault(error.reason, name, f"{error.message} Nothing after it could be checked.")
            return False
        for index, entry in enumerate(entries, number * BUNDLE):
            self._entry(index, entry)
        leaves = [leaf_hash(entry) for entry in entries]
        self._compare_tile(0, number, leaves)
        self._grow(leaves)
        return True

    def _entry(self, index: int, data: bytes) -> None:
        try:
            self.checker.add(Entry.decode(index, data))
        except FormatError as error:
            self.fault(error.reason, f"entry {index}", error.message)

    def _grow(self, leaves: list[bytes]) -> None:
        split = 0 if self.seen is None else min(max(self.seen.size - self.frontier.size, 0), len(leaves))
        for part in (leaves[:split], leaves[split:]):
            for level, number, node in self.frontier.extend(part):
                row = self.rows.setdefault(level, [])
                row.append(node)
                if len(row) == BUNDLE:
                    self._compare_tile(level, number // BUNDLE, row)
                    self.rows[level] = []
            self._compare_seen()

    def _compare_seen(self) -> None:
        if self.seen is not None and self.seen.size == self.frontier.size:
            self.seen_root = self.frontier.root()

    def _compare_tile(self, level: int, number: int, row: list[bytes]) -> None:
        name = tile_path(level, number, len(row))
        data = self.files.read(name, MAX_TILE_BYTES)
        if data is None:
            self.fault("missing", name, "It is missing, a link, or too large.")
        elif data != b"".join(row):
            first = next((i for i, node in enumerate(row) if data[32 * i : 32 * i + 32] != node), len(row))
            what = f"entry {number * BUNDLE + first}" if level == 0 else f"its hash {first}"
            self.fault("tile", name, f"It is not what the entries hash to, from {what} on.")
