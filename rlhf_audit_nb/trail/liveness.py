"""Who still writes: one lock file per writer, held as long as its process lives. Floor 0.

``TRAIL/writers/WRITER.lock`` is held with ``flock``, which the system releases when the process ends in whatever way.
A process number would prove nothing: it is used again, and it means nothing on another host or in a container.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

__all__ = ["WriterLock", "is_alive", "living_writers", "sweep"]


class WriterLock:
    """This process's own lock as a writer."""

    def __init__(self, folder: Path, writer: str) -> None:
        """Take the lock of ``writer`` under the trail's ``folder``; raises `OSError` where that cannot be written."""
        self._path = _lock_path(folder, writer)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = -1
        while self._descriptor < 0:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # A sweep may have removed the file between the two calls; a lock on a removed file protects nothing.
            if _same_file(descriptor, self._path):
                self._descriptor = descriptor
            else:
                os.close(descriptor)

    def leave(self) -> None:
        """Close this process's copy only: in a forked child, where the parent's hold must not end."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            with contextlib.suppress(OSError):  # the descriptor is gone all the same; nothing was written to it
                os.close(descriptor)

    def release(self) -> None:
        """Give the lock up and remove its file."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):  # a leftover file is swept by the next opening
                self._path.unlink()
            self.leave()


def _lock_path(folder: Path, writer: str) -> Path:
    return folder / "writers" / f"{writer}.lock"


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        mine, named = os.fstat(descriptor), path.stat()
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (named.st_dev, named.st_ino)


def is_alive(folder: Path, writer: str) -> bool:
    """Whether the writer's process still lives."""
    try:
        descriptor = os.open(_lock_path(folder, writer), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def living_writers(folder: Path) -> list[str]:
    """The ids of all writers whose processes live."""
    found = sorted(path.name.removesuffix(".lock") for path in (folder / "writers").glob("*.lock"))
    return [writer for writer in found if is_alive(folder, writer)]


def sweep(folder: Path) -> None:
    """Remove the lock files of writers that are gone."""
    for path in (folder / "writers").glob("*.lock"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)
