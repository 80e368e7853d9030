"""The machine and what is installed on it: the disk under the trail, and the versions of the libraries. Floor 4."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.version import Version

from rlhf_audit_nb.errors import UnsupportedTrainerError
from rlhf_audit_nb.health.finding import Finding, Findings
from rlhf_audit_nb.health.words import plural, size

if TYPE_CHECKING:
    from rlhf_audit_nb.health.place import Place

__all__ = ["TESTED", "check_disk", "check_versions"]

LEAST_FREE, LITTLE_FREE = 100 << 20, 1 << 30
SLOW_SYNC = 0.050
SYNCS = 5
DISTRIBUTION = "rlhf-audit-trail"

NETWORK_SYSTEMS = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs", "gfs2", "glusterfs", "gpfs"}
    | {"lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "smb3", "smbfs", "virtiofs"}
)
"""File systems over which SQLite's locks or its shared index may not hold."""

TESTED = {
    "SQLAlchemy": "2.1.9",
    "accelerate": "1.15.0",
    "cryptography": "50.0.2",
    "datasets": "5.2.0",
    "dp-accounting": "0.6.0",
    "peft": "0.21.2",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
}
"""The releases that this version was tested with, of the libraries that matter most (a test holds them to
``constraints.txt``, which has them all)."""

HOOKED = ("accelerate", "peft", "transformers", "trl")


def check_disk(place: Place) -> Finding:
    """Space, write permission, how long a sync takes, and no file system that SQLite cannot trust."""
    found = Findings()
    for name, folder in (("trail", place.folder), ("keys", place.home)):
        at = _existing(folder)
        free = shutil.disk_usage(at).free
        found.facts[f"{name}_free_bytes"] = free
        what = f"The disk under the {name}"
        if free < LITTLE_FREE:
            (found.fail if free < LEAST_FREE else found.warn)(f"{what} has {size(free)} left.", "Free some space.")
        system = file_system(at)
        if system in NETWORK_SYSTEMS and name == "trail":
            found.warn(
                f"The trail lies on a network file system ({system}), where SQLite's locks may not hold.",
                "Keep the trail on a local disk, and publish it to the shared one.",
            )
    said = _writes(place, found)
    return found.finding("disk", f"{size(found.facts['trail_free_bytes'])} free; {said}.")


def _existing(path: Path) -> Path:
    return next(part for part in (path, *path.parents) if part.exists())


def _writes(place: Place, found: Findings) -> str:
    """Whether the trail's folder and files can be written, and how long a sync takes; leaves nothing there."""
    folder = _existing(place.folder)
    stuck = [name for name in ("trail.sqlite", "vault.sqlite") if _locked(place.folder / name)]
    step = "Make the folder and its files writable, or name another folder with --trail or trail=."
    try:
        seconds = sync_seconds(folder)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            if not os.access(folder, os.W_OK):
                found.fail("The trail's folder cannot be written.", step)
            return "how long a sync takes cannot be measured here without leaving a file"
        found.fail(f"The trail's folder cannot be written: {error.strerror}.", step)
        return ""
    if stuck:
        found.fail(f"{', '.join(stuck)} cannot be written.", step)
    found.facts["sync_ms"] = round(1e3 * seconds, 3)
    if seconds > SLOW_SYNC:
        found.warn(
            f"A sync takes {1e3 * seconds:.0f} ms, so more than the 50 ms window can be lost at a crash.",
            "Put the trail on a faster disk.",
        )
    return f"it can be written, a sync takes {1e3 * seconds:.2g} ms"


def _locked(path: Path) -> bool:
    return path.exists() and not os.access(path, os.W_OK)


def sync_seconds(folder: Path) -> float:
    """The median time of writing and syncing 4 KiB, in a file without a name: it is never in the folder's list."""
    descriptor = os.open(folder, getattr(os, "O_TMPFILE", os.O_DIRECTORY) | os.O_RDWR, 0o600)
    try:
        taken = []
        for _ in range(SYNCS):
            began = time.perf_counter()
            os.write(descriptor, bytes(4096))
            os.fsync(descriptor)
            taken.append(time.perf_counter() - began)
    finally:
        os.close(descriptor)
    return statistics.median(taken)


def file_system(path: Path) -> str:
    """The type of the file system that holds ``path``; empty where the system does not tell."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    found, kind = -1, ""
    for line in mounts:
        _, point, name, *_ = line.split(" ")
        at = Path(point.encode().decode("unicode_escape"))
        if path.resolve().is_relative_to(at) and len(at.parts) >= found:
            found, kind = len(at.parts), name
    return kind


def check_versions(place: Place) -> Finding:  # noqa: ARG001 - every check is asked the same way
    """What is required is there; what was not tested is named, and looked at where private training stands on it."""
    found = Findings()
    installed = {name: _version(name) for name in TESTED}
    found.facts["installed"] = installed
    for name, needed in _required().items():
        version = _version(name)
        if version is None:
            found.fail(f"{name} is not installed.", f"Run `pip install {DISTRIBUTION}` again.")
        elif not needed.specifier.contains(version, prereleases=True):
            found.fail(f"{name} {version} is installed and {needed} is required.", f"Run `pip install '{needed}'`.")
    other = {name: version for name, version in installed.items() if version not in (None, *_same(name))}
    found.facts["untested"] = {name: version for name, version in other.items() if version is not None}
    if other:
        said = ", ".join(f"{name} {version} (tested: {TESTED[name]})" for name, version in sorted(other.items()))
        found.warn(f"Not tested with this version: {said}.", "Install what constraints.txt names where it matters.")
    if set(other) & set(HOOKED) or {"transformers", "trl"} <= set(sys.modules):
        _hooks(found)
    return found.finding("versions", f"{plural(len(TESTED), 'library', 'libraries')} as tested with this version.")


def _same(name: str) -> tuple[str, ...]:
    """The tested version as it may be written: a local part (``+cpu``) does not make another release."""
    version = _version(name)
    return (version,) if version is not None and Version(version).public == TESTED[name] else (TESTED[name],)


def _hooks(found: Findings) -> None:
    """Whether the methods that private training stands on are as they were verified."""
    from rlhf_audit_nb.privacy.hooks import check_classes

    try:
        check_classes()
    except UnsupportedTrainerError as error:
        found.fail(error.message, error.next_step)
    found.facts["hooks_checked"] = True


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _required() -> dict[str, Requirement]:
    """What the distribution itself requires, extras left out; nothing where it runs from a folder."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines]
    return {item.name: item for item in parsed if item.marker is None or item.marker.evaluate({"extra": ""})}
