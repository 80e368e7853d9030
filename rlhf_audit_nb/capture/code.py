"""Which code ran: the commit, what was changed since, and every local source file that was imported. Floor 2.

What is installed is told by its package; what a person wrote beside the notebook is told here, file by file. *Local*
is a module's file that lies below the project (git's work tree, else the working directory) and not among the
installed packages. Its name is the path below the project, never a path of the machine; the repository's remote is
not recorded, since it names a host, often a person, and sometimes a token, and the commit says more. The tool's own
source is digested as a whole (`tool_digest`).

A file is digested as it lies on disk. Whether it is still what was imported is told as far as Python knows: the
compiled file beside it keeps the size and time of the source that it was made of. All bounds are on numbers of files
and bytes, not on time, so that what is recorded does not depend on how fast the machine was.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from rlhf_audit_nb.events import CodeBound, CodeFiles

__all__ = [
    "LISTED",
    "CodeSeen",
    "GitState",
    "code_since",
    "git_state",
    "keep_list",
    "local_code",
    "look_at_code",
    "tool_digest",
]

GIT_TIMEOUT_S = 10.0
MAX_FILES = 2_000
MAX_BYTES = 64 << 20
LISTED = 64
"""Lists of up to so many files stand in the entry itself."""
_INSTALLED = ("site-packages", "dist-packages")
_DIFF = ("-c", "diff.noprefix=false", "-c", "diff.mnemonicPrefix=false", "-c", "core.quotePath=true", "diff", "HEAD",
         "--binary", "--full-index", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", "-U3",
         "--diff-algorithm=myers", "--submodule=short")  # fmt: skip
"""However the person's git is set up, the same changes give the same bytes."""


@dataclass(frozen=True)
class GitState:
    """The commit, whether tracked files are changed, and the digest of the changes; ``None`` where it is not known."""

    commit: str | None = None
    dirty: bool | None = None
    diff: str | None = None


@dataclass(frozen=True)
class CodeSeen:
    """The local code at one moment.

    Args:
        folder: the working directory then.
        project: ``git`` or ``folder``.
        files: the digest of each file by its path below the project.
        changed: those that are another now than when they were imported.
        left_out: how many were not digested, being above the bounds.
        elsewhere: how many imported files lie neither below the project nor among what is installed.
    """

    folder: Path
    project: str
    files: dict[str, str]
    changed: tuple[str, ...] = ()
    left_out: int = 0
    elsewhere: int = 0


# --- git -------------------------------------------------------------------------------------------------------------


def git_state(folder: Path, *, diff: bool = True) -> GitState:
    """What git says of ``folder``; with ``diff``, also the digest of the changes to tracked files."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return GitState()
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    dirty = None if changes is None else bool(changes.strip())
    changed = _git(folder, *_DIFF) if dirty and diff else None
    return GitState(
        commit=commit.decode("ascii", "replace").strip(),
        dirty=dirty,
        diff=hashlib.sha256(changed).hexdigest() if changed is not None else None,
    )


def _git(folder: Path, *arguments: str) -> bytes | None:
    """What git answers, or ``None`` where there is no git, no repository or no answer in time."""
    try:
        answer = subprocess.run(
            ["git", "-C", os.fspath(folder), *arguments],
            capture_output=True,
            check=True,
            timeout=GIT_TIMEOUT_S,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout


def _project(folder: Path) -> tuple[str, Path]:
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is not None and top.strip():
        return "git", Path(os.fsdecode(top.rstrip(b"\n"))).resolve()
    return "folder", folder.resolve()


# --- imported files --------------------------------------------------------------------------------------------------


def look_at_code(folder: Path) -> CodeSeen:
    """The local source files that are imported now, digested; ``folder`` is the working directory."""
    kind, root = _project(folder)
    roots = (root, folder.resolve())
    found: dict[str, Path] = {}
    elsewhere = 0
    for path in sorted(_imported_files()):
        base = next((base for base in roots if path.is_relative_to(base)), None)
        if base is None:
            elsewhere += 1
        else:
            found.setdefault(path.relative_to(base).as_posix(), path)
    return _digested(folder, kind, found, elsewhere)


def _digested(folder: Path, kind: str, found: dict[str, Path], elsewhere: int) -> CodeSeen:
    files: dict[str, str] = {}
    changed = []
    left_out, budget = 0, MAX_BYTES
    for name, path in found.items():
        try:
            size = path.stat().st_size
            if len(files) >= MAX_FILES or size > budget:
                left_out += 1
                continue
            files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            if _was_another(path):
                changed.append(name)
        except OSError:  # gone, or not to be read: it cannot be told, so it counts as left out
            left_out += 1
            continue
        budget -= size
    return CodeSeen(folder, kind, files, tuple(changed), left_out, elsewhere)


def _imported_files() -> set[Path]:
    """The files of all modules that are neither Python's own nor installed, nor this tool's."""
    found = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and name.partition(".")[0] != __name__.partition(".")[0] and not _is_installed(file):
            found.add(Path(file).resolve())
    # Some modules name a file that never was.
    return {path for path in found if not _is_installed(os.fspath(path)) and path.is_file()}


@lru_cache(maxsize=16_384)
def _is_installed(file: str) -> bool:
    path = Path(file)
    if not path.is_absolute() or any(part in _INSTALLED for part in path.parts):
        return path.is_absolute()
    return any(path.is_relative_to(folder) for folder in _installed_folders()) or path.parent in _script_folders()


@lru_cache(maxsize=1)
def _installed_folders() -> tuple[Path, ...]:
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return tuple({Path(path) for path in paths if path} | {Path(path).resolve() for path in paths if path})


@lru_cache(maxsize=1)
def _script_folders() -> tuple[Path, ...]:
    scripts = sysconfig.get_path("scripts")
    return (Path(scripts), Path(sys.executable).parent) if scripts else (Path(sys.executable).parent,)


def _was_another(path: Path) -> bool:
    """Whether the compiled file beside a source was made of another one than lies there now."""
    from importlib.util import cache_from_source

    try:
        with Path(cache_from_source(os.fspath(path))).open("rb") as file:
            header = file.read(16)
    except (OSError, NotImplementedError):
        return False
    if len(header) < 16 or header[4:8] != b"\0\0\0\0":  # noqa: PLR2004 - PEP 552: a pyc of a hash, which has no time
        return False
    state = path.stat()
    mask = 0xFFFFFFFF
    return int.from_bytes(header[8:12], "little") != int(state.st_mtime) & mask or (
        int.from_bytes(header[12:16], "little") != state.st_size & mask
    )


# --- as it stands in the trail ---------------------------------------------------------------------------------------


def keep_list(listed: Any, count: int, artifacts: Path | None) -> tuple[str, bool]:
    """The digest of a list as JSON, and whether it is short enough for the entry; a longer one is kept beside it."""
    content = msgspec.json.encode(listed, order="sorted")
    digest = hashlib.sha256(content).hexdigest()
    if count <= LISTED:
        return digest, True
    if artifacts is not None:
        (artifacts / f"{digest}.json").write_bytes(content)
    return digest, False


def local_code(seen: CodeSeen, artifacts: Path | None = None) -> CodeFiles:
    """What was seen, as it stands in an entry; a long list goes into the folder ``artifacts`` beside the trail."""
    digest, is_short = keep_list(seen.files, len(seen.files), artifacts)
    return CodeFiles(
        project=seen.project,
        count=len(seen.files),
        digest=digest,
        files=seen.files if is_short else {},
        changed=list(seen.changed),
        left_out=seen.left_out,
        elsewhere=seen.elsewhere,
    )


def code_since(before: CodeSeen, artifacts: Path | None = None) -> CodeBound | None:
    """The event for what was imported, or changed on disk, since ``before``; ``None`` where nothing was."""
    now = look_at_code(before.folder)
    files = {name: digest for name, digest in now.files.items() if before.files.get(name) != digest}
    changed = {name for name in now.changed if name not in before.changed} | (files.keys() & before.files.keys())
    if not files and not changed:
        return None
    more = CodeSeen(now.folder, now.project, files, tuple(sorted(changed)), now.left_out, now.elsewhere)
    return CodeBound(code=local_code(more, artifacts))


@lru_cache(maxsize=1)
def tool_digest() -> str:
    """SHA-256 over this tool's own source: for each file, in order, ``path NUL hex SHA-256 LF``; once a process."""
    root = Path(__file__).resolve().parents[1]
    lines = hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.update(f"{path.relative_to(root).as_posix()}\0{digest}\n".encode())
    return lines.hexdigest()
