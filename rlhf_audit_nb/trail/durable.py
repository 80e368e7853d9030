"""Files that are whole or not there, whenever the machine stops, and locks that end with their process. Floor 0."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["destroy_file", "locked", "sync_folder", "write_durably"]

_CHUNK = 1 << 20


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace ``path`` so that after a crash it holds either the old bytes or the new."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a folder's names durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def destroy_file(path: Path) -> None:
    """Overwrite a file's bytes with random ones, make that durable, and take its name away, durably.

    What this cannot reach: blocks that a flash drive, a copy-on-write file system, a snapshot or a backup keeps.

    Raises:
        OSError: it is no plain file with one name (a link to it would go on holding it), or cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise OSError(errno.EINVAL, "it is not a plain file with one name", str(path))
        left = status.st_size
        while left:
            left -= os.write(descriptor, os.urandom(min(left, _CHUNK)))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    path.unlink()
    sync_folder(path.parent)


@contextlib.contextmanager
def locked(path: Path, mode: int = 0o600) -> Iterator[None]:
    """Hold the lock file ``path``, made where it is missing, alone among all processes; waits for whoever holds it.

    Raises:
        OSError: the file cannot be opened, or the system has no such lock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Said outright: a child forked meanwhile has a copy of the descriptor, which would go on holding it.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
