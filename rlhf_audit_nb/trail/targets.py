"""Where a trail is published to, and where a published one is read: a folder, or any address of fsspec's. Floor 0.

A published trail is a set of files, of which only a few may ever change. A `Target` holds them, under names like
``tile/0/000``:

* a **folder** (a path, or ``file://``): written to a temporary file, made durable, then renamed into its place, so that
  a name holds a whole file or none whenever the machine stops. Nothing is ever reached through a link. Files that
  never change are of mode 0444. One publisher at a time: the folder itself is locked (flock), so no lock can be stale.
* an **address** (``s3://``, ``gs://``, ``abfs://``, ``sftp://``, ``memory://`` ...) through fsspec and the package that
  serves it. Stores of objects put a file whole or not at all; elsewhere a file is put beside and then moved.
  One publisher at a time on this machine: the trail's folder is locked.
* ``http://`` and ``https://``: to be read only.

``.publishing/`` at the target holds what is not finished. It is gone when a publish ends; where it is found, one was
cut off. An address is shown without what may be secret in it: user, password and query.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import secrets
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

from rlhf_audit_nb.errors import StoreError
from rlhf_audit_nb.trail.durable import sync_folder

__all__ = ["Target", "is_url", "open_target", "put_all", "read_ahead"]

UNFINISHED = ".publishing"
_PARALLEL = 16
_ATTEMPTS = 3
_PATIENCE, _LEAST_RATE = 30.0, 64 << 10  # seconds for any file, and bytes a second beyond
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NOT_A_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EISDIR)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_FOLDER = (errno.EEXIST, errno.ENOENT, errno.ENOTDIR)
_NO_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOTSUP)
_GONE = (403, 404, 410)  # a static store answers 403 for a missing file where it does not let its files be listed
# Stores of objects: what is put is there whole or not at all. Elsewhere a file could be seen half written.
_WHOLE = frozenset({"memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "tos", "hf"})
_CONTENT_TYPE = {"s3": "ContentType", "s3a": "ContentType", "gs": "content_type", "gcs": "content_type"}
_TEXT, _BYTES = "text/plain; charset=utf-8", "application/octet-stream"
_CONTAINER = frozenset({"abfs", "abfss", "wasb", "wasbs"})  # written container@account: not a user

_T = TypeVar("_T")


class Target(Protocol):
    """The files of one published trail."""

    name: str
    """What it is called in a sentence, without secrets."""
    lists: bool
    """Whether `files` can tell what there is."""
    parallel: int
    """How many files may well be on their way at once."""

    def read(self, name: str, most: int) -> bytes | None:
        """A file's bytes; ``None`` where it is missing, a link, no file, or larger than ``most``."""

    def put_new(self, name: str, data: bytes) -> bool:
        """Write a file that never changes; ``False`` where it is there already, of the same content.

        Raises:
            StoreError: ``diverged`` where another content is there, ``link``, or it cannot be written.
        """

    def replace(self, name: str, data: bytes) -> None:
        """Write a file that may change, once all that was put before is durable."""

    def remove(self, name: str) -> None:
        """Take a file away, if it is there."""

    def files(self, folder: str) -> Iterator[str]:
        """The names of all files below ``folder``, links included, in no order."""

    def settle(self) -> None:
        """Make all that was put durable."""

    def publishing(self, trail: Path) -> AbstractContextManager[bool]:
        """Be the only one to write until this ends; whether an earlier publish was cut off.

        Raises:
            StoreError: ``in-use`` where somebody else is publishing there, ``read-only`` where nothing can be written.
        """


def is_url(location: str | Path) -> bool:
    """Whether a target is an address and not a path."""
    return isinstance(location, str) and "://" in location


def open_target(location: str | Path) -> Target:
    """The target of this path or address; nothing is written yet.

    Raises:
        StoreError: ``url`` where the address cannot be used, ``unsupported`` where a package for it is missing,
            ``unreachable`` where it does not answer.
    """
    if not is_url(location):
        return _Folder(Path(location).expanduser().absolute())
    url = str(location)
    if url.startswith(("file://", "local://")):
        return _Folder(Path(url.partition("://")[2]).absolute())
    return _open_remote(url)


def put_all(target: Target, items: Iterable[tuple[str, bytes]]) -> int:
    """Put new files, several at once where the target gains by it; how many were not there before."""
    if target.parallel == 1:
        return sum(target.put_new(name, data) for name, data in items)
    return sum(_ahead(target.parallel, (partial(target.put_new, *item) for item in items)))


def read_ahead(target: Target, wanted: Iterable[tuple[str, int]]) -> Iterator[bytes | None]:
    """`Target.read` of each name with its most bytes, in order; a few ahead where the target gains by it."""
    if target.parallel == 1:
        return (target.read(name, most) for name, most in wanted)
    return _ahead(target.parallel, (partial(target.read, *item) for item in wanted))


def _ahead(parallel: int, calls: Iterable[Callable[[], _T]]) -> Iterator[_T]:
    waiting: deque[Future[_T]] = deque()
    with ThreadPoolExecutor(parallel, thread_name_prefix="rlhf-audit-files") as pool:
        try:
            for call in calls:
                waiting.append(pool.submit(call))
                if len(waiting) >= 2 * parallel:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _diverged(target: str, name: str) -> StoreError:
    return StoreError(
        f"{target}/{name} is not what this trail has there: it was changed, or published from another history.",
        next_step="Keep it as evidence. Where `rlhf-audit verify` finds nothing else wrong there, take that file away "
        "and run `rlhf-audit publish --all`; else publish to another place.",
        code="diverged",
    )


def _in_use(target: str) -> StoreError:
    return StoreError(
        f"Another publish to {target} is going on.", next_step="Wait until it ends, then publish again.", code="in-use"
    )


def _linked(path: str) -> StoreError:
    return StoreError(f"{path} is a symbolic link.", next_step="Publish into a folder without links.", code="link")


@dataclass
class _Folder:
    """A folder on this machine."""

    folder: Path
    name: str = ""
    lists: bool = True
    parallel: int = 1
    touched: set[tuple[str, ...]] = field(default_factory=set)
    base: int | None = None

    def __post_init__(self) -> None:
        self.name = str(self.folder)

    def read(self, name: str, most: int) -> bytes | None:
        *folders, last = name.split("/")
        with self._errors(name, reading=True):
            try:
                with self._opened(folders) as parent:
                    return _read(last, parent, most)
            except OSError as error:
                if error.errno in _NOT_A_FILE:
                    return None
                raise

    def put_new(self, name: str, data: bytes) -> bool:
        *folders, last = name.split("/")
        with self._errors(name), self._opened(folders, make=True) as parent:
            # Also where it is there: whoever put it may have been cut off before the name was durable.
            self._touch(folders)
            try:
                there = _read(last, parent, len(data))
            except FileNotFoundError:
                self._write(last, parent, data, 0o444)
                return True
            if there != data:
                raise _diverged(self.name, name)
        return False

    def replace(self, name: str, data: bytes) -> None:
        self.settle()
        *folders, last = name.split("/")
        with self._errors(name), self._opened(folders, make=True) as parent:
            self._touch(folders)
            self._write(last, parent, data, 0o644)
        self.settle()

    def remove(self, name: str) -> None:
        *folders, last = name.split("/")
        with self._errors(name), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            with self._opened(folders) as parent:
                os.unlink(last, dir_fd=parent)
            if folders:
                self._remove_empty(folders)

    def _remove_empty(self, folders: Sequence[str]) -> None:
        with self._opened(folders[:-1]) as above:
            try:
                os.rmdir(folders[-1], dir_fd=above)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise

    def files(self, folder: str) -> Iterator[str]:
        waiting = [folder]
        while waiting:
            at = waiting.pop()
            for name, is_folder in self._list(at):
                if is_folder:
                    waiting.append(f"{at}/{name}")
                else:
                    yield f"{at}/{name}"

    def _list(self, folder: str) -> list[tuple[str, bool]]:
        with self._errors(folder, reading=True):
            try:
                with self._opened(folder.split("/")) as opened, os.scandir(opened) as found:
                    return [(item.name, item.is_dir(follow_symlinks=False)) for item in found]
            except (FileNotFoundError, NotADirectoryError):
                return []

    def settle(self) -> None:
        """The folders, the deepest first; the files were made durable before they got their names."""
        with self._errors(""):
            for folders in sorted(self.touched, key=len, reverse=True):
                with self._opened(folders) as opened:
                    _sync(opened)
            self.touched.clear()

    @contextmanager
    def publishing(self, trail: Path) -> Iterator[bool]:  # noqa: ARG002 (the folder itself is locked)
        with self._errors(""):
            self._make()
            self.base = os.open(self.folder, _FOLDER)
        try:
            with self._errors(""):
                if not _lock(self.base):
                    raise _in_use(self.name)
                cut_off = self._sweep()
            yield cut_off
            with self._errors(""), contextlib.suppress(FileNotFoundError):
                os.rmdir(UNFINISHED, dir_fd=self.base)
        finally:
            base, self.base = self.base, None
            _unlock(base)

    def _make(self) -> None:
        """The folder, and the names of those above that had to be made."""
        missing = []
        path = self.folder
        while not path.exists():
            missing.append(path)
            path = path.parent
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            sync_folder(path.parent)

    def _sweep(self) -> bool:
        """Remove what a publish that was cut off has left unfinished; whether there was one."""
        try:
            with self._opened([UNFINISHED]) as opened:
                for name in os.listdir(opened):  # noqa: PTH208 (of a descriptor)
                    os.unlink(name, dir_fd=opened)
        except FileNotFoundError:
            return False
        return True

    def _write(self, name: str, parent: int, data: bytes, mode: int) -> None:
        with self._opened([UNFINISHED], make=True) as unfinished:
            temporary = secrets.token_hex(8)
            descriptor = os.open(temporary, _CREATE, mode, dir_fd=unfinished)
            try:
                try:
                    _write_all(descriptor, data)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                os.rename(temporary, name, src_dir_fd=unfinished, dst_dir_fd=parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=unfinished)
                raise

    def _touch(self, folders: Sequence[str]) -> None:
        self.touched.update(tuple(folders[:count]) for count in range(len(folders) + 1))

    @contextmanager
    def _opened(self, folders: Sequence[str], *, make: bool = False) -> Iterator[int]:
        """A folder below this one, no step of the way a link."""
        at = os.open(self.folder, _FOLDER) if self.base is None else os.dup(self.base)
        try:
            for part in folders:
                try:
                    following = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=at)
                except FileNotFoundError:
                    if not make:
                        raise
                    os.mkdir(part, dir_fd=at)
                    following = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=at)
                at, above = following, at
                os.close(above)
            yield at
        finally:
            os.close(at)

    @contextmanager
    def _errors(self, name: str, *, reading: bool = False) -> Iterator[None]:
        """Turn the system's refusals into one sentence that says what to do."""
        path = f"{self.name}/{name}" if name else self.name
        try:
            yield
        except OSError as error:
            link = self._link(name)
            if link is not None and error.errno in _NOT_A_FILE and not reading:
                raise _linked(str(link)) from error
            reason = error.strerror or str(error)
            if reading:
                raise StoreError(
                    f"{path} cannot be read: {reason}.", next_step="Make it readable.", code="unreadable"
                ) from error
            if error.errno in _FULL:
                raise StoreError(
                    f"{path} cannot be written: the disk is full.",
                    next_step="Free some space, then publish again: it goes on where it stopped.",
                    code="disk-full",
                ) from error
            refused = error.errno in _REFUSED
            if error.errno in _NO_FOLDER and not name:
                reason, step = "no folder can be made there", "Name another one."
            else:
                step = "Make it writable, or name another one." if refused else "Check the disk."
            raise StoreError(
                f"{path} cannot be written: {reason}.",
                next_step=f"{step} Then publish again: it goes on where it stopped.",
                code="read-only" if refused else "publish",
            ) from error

    def _link(self, name: str) -> Path | None:
        """The first link on the way to a name."""
        path = self.folder
        for part in name.split("/"):
            path /= part
            if path.is_symlink():
                return path
        return None


def _read(name: str, parent: int, most: int) -> bytes | None:
    """A file's bytes; ``None`` where it is no file, or larger than ``most``. A link raises ``ELOOP``."""
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        parts, size = [], 0
        while size <= most and (part := os.read(descriptor, most + 1 - size)):
            parts.append(part)
            size += len(part)
    finally:
        os.close(descriptor)
    return b"".join(parts) if size <= most else None


def _sync(folder: int) -> None:
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot do this for a folder
            raise


def _write_all(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def _lock(descriptor: int) -> bool:
    """Lock an opened folder; ``False`` where another process holds it. Where there are no locks, nobody is asked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _unlock(descriptor: int) -> None:
    # Said outright: a child forked meanwhile has a copy of the descriptor, which would go on holding it.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _shown(url: str) -> tuple[str, tuple[str, ...]]:
    """An address without what may be secret, and that, the longest first."""
    try:
        parts = urlsplit(url)
        user, at, host = parts.netloc.rpartition("@")
        password = parts.password or ""
        parts.port  # noqa: B018 (raises where it is no number)
    except ValueError as error:
        raise StoreError(
            "The target is not an address.", next_step="Write it as SCHEME://PLACE/FOLDER.", code="url"
        ) from error
    if parts.scheme.lower() in _CONTAINER and ":" not in user:
        host, user = user + at + host, ""
    hidden = {user, password, parts.query, parts.fragment, *(value for _, value in parse_qsl(parts.query))}
    hidden |= {unquote(text) for text in hidden}
    shown = urlunsplit((parts.scheme, host, parts.path, "", ""))
    return shown.rstrip("/") or shown, tuple(sorted(hidden - {""}, key=len, reverse=True))


def _open_remote(url: str) -> Target:
    shown, hidden = _shown(url)
    scheme = url.partition("://")[0].lower()
    if "::" in url or any(char <= " " for char in url):
        raise StoreError(
            f"{scheme}:// with :: or spaces in it is not an address that can be used.",
            next_step="Write it as SCHEME://PLACE/FOLDER, with %20 for a space.",
            code="url",
        )
    try:
        from fsspec.core import url_to_fs

        options = _http_options() if scheme in ("http", "https") else {}
        files, root = url_to_fs(url, **options)
    except ImportError as error:
        raise StoreError(
            f"{scheme}:// needs a package that is not installed: {error}.",
            next_step="Install it beside this one, for example `pip install s3fs` (s3://), gcsfs (gs://), adlfs "
            "(abfs://) or paramiko (sftp://).",
            code="unsupported",
        ) from error
    except ValueError as error:
        raise StoreError(
            f"{shown} is not an address that is known here: {_scrub(str(error), hidden)}.",
            next_step="Name a folder, or an address like s3://BUCKET/FOLDER.",
            code="url",
        ) from None
    except Exception as error:
        raise _unreachable(shown, "cannot be reached", error, hidden) from None
    if scheme in ("http", "https"):
        return _Web(shown, hidden, files, url)
    return _Remote(shown, hidden, files, root.rstrip("/"), scheme)


def _http_options() -> dict[str, Any]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=15, sock_read=30)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}}


def _scrub(text: str, hidden: Sequence[str]) -> str:
    for secret in hidden:
        text = text.replace(secret, "***")
    return text


def _unreachable(where: str, what: str, error: Exception, hidden: Sequence[str]) -> StoreError:
    said = _scrub(str(error) or type(error).__name__, hidden).rstrip(".")
    full = isinstance(error, OSError) and error.errno in _FULL
    return StoreError(
        f"{where} {what}: {'the disk is full' if full else said}.",
        next_step="Check the address, your rights there and the network, then run the same command again: "
        "it goes on where it stopped.",
        code="disk-full" if full else "unreachable",
    )


@dataclass
class _Remote:
    """An address that fsspec serves."""

    name: str
    hidden: tuple[str, ...]
    system: Any
    root: str
    scheme: str
    lists: bool = True
    parallel: int = 1
    begun: bool = False

    def __post_init__(self) -> None:
        if getattr(self.system, "async_impl", False):
            self.parallel = _PARALLEL

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str, most: int) -> bytes | None:
        with self._errors(name, "cannot be read"):
            try:
                data: bytes = self.system.cat_file(self._path(name), start=0, end=most + 1)
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                return None
        return data if len(data) <= most else None

    def put_new(self, name: str, data: bytes) -> bool:
        there = self._there(name, len(data))
        if there is None:
            self._begin()
            with self._errors(name, "cannot be written"):
                if self._create(name, data):
                    return True
            there = self._there(name, len(data))
        if there != data:
            raise _diverged(self.name, name)
        return False

    def _there(self, name: str, size: int) -> bytes | None:
        """What stands at a name, if anything does; cut after one byte more than ``size``."""
        with self._errors(name, "cannot be read"):
            try:
                data: bytes = self.system.cat_file(self._path(name), start=0, end=size + 1)
            except FileNotFoundError:
                return None
            return data

    def _create(self, name: str, data: bytes) -> bool:
        """Put a file that is not there yet; ``False`` where somebody else did meanwhile."""
        if self.scheme not in _WHOLE:
            self._move_in(name, data)
            return True
        try:
            self.system.pipe_file(self._path(name), data, mode="create", **self._kind(_BYTES))
        except FileExistsError:
            return False
        except (NotImplementedError, OSError) as error:
            # A store that has no conditional put; that nothing was there was seen a moment ago.
            if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.ENOTSUP):
                raise
            self.system.pipe_file(self._path(name), data, **self._kind(_BYTES))
        return True

    def _kind(self, content: str) -> dict[str, str]:
        """How a store is told what kind of content a file has."""
        option = _CONTENT_TYPE.get(self.scheme)
        return {option: content} if option else {}

    def _move_in(self, name: str, data: bytes) -> None:
        temporary = self._path(f"{UNFINISHED}/{secrets.token_hex(8)}")
        self.system.pipe_file(temporary, data)
        self.system.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
        self.system.mv(temporary, self._path(name))

    def replace(self, name: str, data: bytes) -> None:
        self._begin()
        with self._errors(name, "cannot be written"):
            if self.scheme not in _WHOLE:
                self._move_in(name, data)
                return
            self.system.pipe_file(self._path(name), data, **self._kind(_BYTES if name.endswith(".tsr") else _TEXT))

    def remove(self, name: str) -> None:
        with self._errors(name, "cannot be removed"), contextlib.suppress(FileNotFoundError):
            self.system.rm_file(self._path(name))

    def files(self, folder: str) -> Iterator[str]:
        with self._errors(folder, "cannot be listed"):
            self.system.invalidate_cache()
            try:
                found = self.system.find(self._path(folder))
            except FileNotFoundError:
                found = []
        start = len(self.root) + 1
        yield from (name[start:] for name in found)

    def settle(self) -> None:
        """Nothing: what was put is kept by the other side."""

    @contextmanager
    def publishing(self, trail: Path) -> Iterator[bool]:
        try:
            lock = os.open(trail, _FOLDER)
        except OSError as error:
            raise StoreError(
                f"The trail's folder {trail} cannot be read: {error.strerror or error}.",
                next_step="Make it readable.",
                code="unreadable",
            ) from error
        try:
            if not _lock(lock):
                raise _in_use(self.name)
            self.begun = self.read(f"{UNFINISHED}/begun", 64) is not None
            yield self.begun
            if self.begun:
                self._end()
        finally:
            _unlock(lock)

    def _begin(self) -> None:
        """Before the first file: the mark by which it is seen that a publish was cut off."""
        if not self.begun:
            with self._errors(UNFINISHED, "cannot be written"):
                if (
                    self.scheme not in _WHOLE
                ):  # a store of objects has no folders, and would make a bucket of a wrong name
                    self.system.makedirs(self._path(UNFINISHED), exist_ok=True)
                self.system.pipe_file(self._path(f"{UNFINISHED}/begun"), b"A publish is going on, or was cut off.\n")
            self.begun = True

    def _end(self) -> None:
        names = sorted(self.files(UNFINISHED), key=lambda name: name.endswith("/begun"))
        for name in names:
            self.remove(name)
        with contextlib.suppress(Exception):  # stores of objects have no folders
            self.system.rmdir(self._path(UNFINISHED))
        self.begun = False

    @contextmanager
    def _errors(self, name: str, what: str) -> Iterator[None]:
        """Whatever a file system raises, as one sentence without secrets."""
        try:
            yield
        except Exception as error:
            where = f"{self.name}/{name}"
            failed = _unreachable(where, what, error, self.hidden)
            if self.hidden:
                raise failed from None
            raise failed from error


@dataclass
class _Web:
    """A web server's folder, read-only."""

    name: str
    hidden: tuple[str, ...]
    system: Any
    url: str
    lists: bool = False
    parallel: int = _PARALLEL

    def read(self, name: str, most: int) -> bytes | None:
        from fsspec.asyn import sync

        parts = urlsplit(self.url)
        url = urlunsplit((parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/{name}", parts.query, ""))
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                found: bytes | None = sync(self.system.loop, self._get, url, most)
            except Exception as error:
                if attempt < _ATTEMPTS:
                    time.sleep(0.2 * attempt)
                    continue
                failed = _unreachable(f"{self.name}/{name}", "cannot be read", error, self.hidden)
                raise failed from (None if self.hidden else error)
            break
        return found

    async def _get(self, url: str, most: int) -> bytes | None:
        session = await self.system.set_session()
        # Of the whole file: a server that sends a byte now and then would be waited for as long as it likes.
        patience = asyncio.timeout(_PATIENCE + most / _LEAST_RATE)
        async with patience, session.get(self.system.encode_url(url)) as answer:
            if answer.status in _GONE:
                return None
            answer.raise_for_status()
            parts: list[bytes] = []
            size = 0
            async for part in answer.content.iter_chunked(1 << 16):
                parts.append(part)
                size += len(part)
                if size > most:
                    return None
        return b"".join(parts)

    def put_new(self, name: str, data: bytes) -> bool:  # noqa: ARG002 (nothing is written)
        raise self._read_only()

    def replace(self, name: str, data: bytes) -> None:  # noqa: ARG002 (nothing is written)
        raise self._read_only()

    def remove(self, name: str) -> None:  # noqa: ARG002 (nothing is written)
        raise self._read_only()

    def files(self, folder: str) -> Iterator[str]:  # noqa: ARG002 (a web server tells nobody)
        return iter(())

    def settle(self) -> None:
        """Nothing was put."""

    def publishing(self, trail: Path) -> AbstractContextManager[bool]:  # noqa: ARG002 (nothing is written)
        raise self._read_only()

    def _read_only(self) -> StoreError:
        return StoreError(
            f"{self.name} can only be read.",
            next_step="Publish into the folder or the store that is behind it.",
            code="read-only",
        )
