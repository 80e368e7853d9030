"""The files of a key ring, and how they change: the whole of a change is on the disk, or none of it. Floor 0.

A change is staged first: each new file as ``next-NAME``, and last ``next.json``, which lists them. Then it is
*settled*, once it is known to count: the files take their places, the public half of a key that was replaced goes to
``retired/``, ``next.json`` goes. A crash anywhere in between leaves enough to go on or to go back:

- new passphrase: counts as soon as ``next.json`` is there; whoever opens the ring next goes on;
- new key: counts where the trail's entry names it (the caller knows); else it is dropped;
- staged files without a ``next.json``: dropped.

Whether it counts is written into ``next.json`` before the first file moves, so that a ring that is half moved is never
taken for a whole one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from rlhf_audit_nb.errors import KeyFileError
from rlhf_audit_nb.trail.durable import locked, sync_folder, write_durably

__all__ = ["RESEALED", "ROTATED", "Change", "Retired", "RingFolder", "read_retired"]

RESEALED = "resealed"
ROTATED = "rotated"

_MARK = "next.json"
_PREFIX = "next-"
_LOCK = ".ring.lock"
_RETIRED = "retired"


class Retired(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The public half of a key that was replaced.

    Attributes:
        role: what it was for.
        key: as it stands in the trail's entries.
        index: the entry that replaced it: a checkpoint of more than ``index + 1`` entries is not its own.
        successor: the key that took its place.
        time: when, as UTC text.
    """

    role: str
    key: str
    index: int
    successor: str
    time: str


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A change of a ring that is under way.

    Attributes:
        kind: `RESEALED` or `ROTATED`.
        files: the names that get new content.
        gone: the names that go.
        retired: the key that was replaced, where one was.
        new: the key that takes its place; it counts where the trail names it.
        counts: that it does; set before the first file moves.
    """

    kind: str
    files: tuple[str, ...]
    gone: tuple[str, ...] = ()
    retired: Retired | None = None
    new: str | None = None
    counts: bool = False


_changes = msgspec.json.Decoder(Change)
_retireds = msgspec.json.Decoder(Retired)


def now_text() -> str:
    """The time now, as it stands in a ring's files."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def read_retired(folder: Path) -> tuple[Retired, ...]:
    """The keys that were replaced, from a ring's ``retired`` folder, in the order of their replacement.

    Raises:
        KeyFileError: a file there cannot be read.
    """
    found = []
    for path in folder.glob("*.json"):
        try:
            found.append(_retireds.decode(path.read_bytes()))
        except (OSError, msgspec.MsgspecError) as error:
            raise KeyFileError(
                f"{path} cannot be read: {error}.", next_step="Restore it from a backup of the keys."
            ) from error
    return tuple(sorted(found, key=lambda item: (item.index, item.role)))


class RingFolder:
    """The folder of one key ring."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        """Whether there is a ring."""
        return self.path.is_dir()

    def has(self, name: str) -> bool:
        """Whether the ring has this file."""
        return (self.path / name).is_file()

    def read(self, name: str) -> bytes:
        """The content of a file; raises `OSError`."""
        return (self.path / name).read_bytes()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes the ring meanwhile.

        Raises:
            KeyFileError: the folder cannot be written.
        """
        try:
            with locked(self.path / _LOCK):
                yield
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> KeyFileError:
        change = self.pending()
        counts = change is not None and (change.counts or change.kind == RESEALED)
        left = "the change counts, and is finished when the keys are opened next" if counts else "they are as they were"
        return KeyFileError(
            f"The keys in {self.path} cannot be changed: {error.strerror or error}.",
            next_step=f"Make the folder writable and free some space; {left}.",
        )

    def pending(self) -> Change | None:
        """The change that is under way, ``None`` where there is none.

        Raises:
            KeyFileError: its file is damaged.
        """
        try:
            return _changes.decode(self.read(_MARK))
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise KeyFileError(
                f"{self.path / _MARK}, which says what is being changed, cannot be read: {error}.",
                next_step="Restore the keys from a backup.",
            ) from error

    def stage(self, change: Change, files: Mapping[str, bytes]) -> None:
        """Write a change beside the ring; only within `locked`. The times of files that are sealed anew are kept.

        Raises:
            OSError: it cannot be written; the ring is as it was.
        """
        self._sweep()
        for name, data in files.items():
            staged = self.path / (_PREFIX + name)
            write_durably(staged, data)
            if change.kind == RESEALED:
                old = (self.path / name).stat()
                os.utime(staged, ns=(old.st_atime_ns, old.st_mtime_ns))
        write_durably(self.path / _MARK, msgspec.json.encode(change))

    def settle(self, counts: Callable[[Change], bool | None] | None = None) -> Change | None:
        """Finish the change that is under way, or drop it; only within `locked`.

        Args:
            counts: whether a new key counts; ``None`` where that is not known, which leaves the change alone.

        Returns:
            The change where it now stands.

        Raises:
            KeyFileError, OSError: a file cannot be read or written.
        """
        change = self.pending()
        if change is None:
            self._sweep()
            return None
        known = True if change.counts or change.kind == RESEALED else counts(change) if counts is not None else None
        if known is None:
            return None
        if not known:
            (self.path / _MARK).unlink()
            sync_folder(self.path)
            self._sweep()
            return None
        if not change.counts:
            write_durably(self.path / _MARK, msgspec.json.encode(msgspec.structs.replace(change, counts=True)))
        self._install(change)
        return change

    def _install(self, change: Change) -> None:
        if change.retired is not None:
            self._retire(change.retired)
        for name in change.files:
            staged = self.path / (_PREFIX + name)
            if staged.exists():
                staged.replace(self.path / name)
        for name in change.gone:
            (self.path / name).unlink(missing_ok=True)
        sync_folder(self.path)
        (self.path / _MARK).unlink()
        sync_folder(self.path)
        self._sweep()

    def _retire(self, retired: Retired) -> None:
        folder = self.path / _RETIRED
        folder.mkdir(exist_ok=True, mode=0o700)
        name = hashlib.sha256(retired.key.encode()).hexdigest()[:16]
        write_durably(folder / f"{retired.role}-{name}.json", msgspec.json.encode(retired) + b"\n")

    def _sweep(self) -> None:
        """Remove what a crash has left of a change that was never whole."""
        for path in [*self.path.glob(_PREFIX + "*"), *self.path.glob(f".{_PREFIX}*"), *self.path.glob(f".{_MARK}.*")]:
            with suppress(FileNotFoundError):
                path.unlink()

    @property
    def is_changing(self) -> bool:
        """Whether a change is under way, or left something behind."""
        return any(self.path.glob("next*")) or any(self.path.glob(".next*"))
