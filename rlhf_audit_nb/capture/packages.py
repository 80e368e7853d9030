"""Which packages are installed, and whether they are what was released. Floor 2.

Each installed distribution comes with a RECORD that lists its files with their SHA-256. The digest of that list is the
same wherever the same wheel was installed (but for what the installer itself adds), and tells one build from another
of the same version. For a distribution from a repository its commit stands beside it; an editable one has no list of
its files, and says so. `check_packages` goes further and reads the files: where one is not what RECORD says, the
installation was changed afterwards. It takes seconds for a large package, so it is done when asked for, within a bound
of time.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["CORE_PACKAGES", "CheckedPackage", "check_packages", "installed_packages", "list_packages"]

CORE_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "opacus", "dp-accounting",
                 "rlhf-audit-trail")  # fmt: skip
"""The packages that a training's result hangs on most."""
_VOLATILE = (".pyc", "/RECORD", "/INSTALLER", "/REQUESTED", "/direct_url.json")
"""Lines of a RECORD that the installer writes, not the wheel: left out of its digest."""


def installed_packages() -> dict[str, str]:
    """Every installed distribution with its version, by normalised name."""
    return {name: facts["version"] for name, facts in list_packages().items()}


def list_packages(folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """Every installed distribution by normalised name: ``version``, ``record`` (the digest of its list of files, less
    the lines that an installer adds), ``commit`` (of the repository that it was installed from), ``editable``.

    ``folder`` is where another interpreter has its packages; ``None`` looks where this one does.
    """
    if folder is not None:
        return _facts_of(metadata.distributions(path=[str(folder)]))
    # What pip installs or removes changes the time of the folder.
    return _listed(tuple((path, _changed_at(path)) for path in sys.path))


def _changed_at(path: str) -> int:
    try:
        return Path(path or ".").stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=2)
def _listed(_: tuple[tuple[str, int], ...]) -> dict[str, dict[str, Any]]:
    return _facts_of(metadata.distributions())


def _facts_of(distributions: Iterable[metadata.Distribution]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for distribution in distributions:
        name = distribution.metadata["Name"]
        if name:  # a half-removed distribution has none
            # The first one on sys.path is the one that is imported.
            found.setdefault(_normalised(name), _facts(distribution))
    return dict(sorted(found.items()))


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _facts(distribution: metadata.Distribution) -> dict[str, Any]:
    facts: dict[str, Any] = {"version": distribution.version or "unknown"}
    record = distribution.read_text("RECORD")
    if record is not None:
        facts["record"] = _record_digest(record)
    try:
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    except ValueError:
        origin = {}
    commit = origin.get("vcs_info", {}).get("commit_id")
    if commit:
        facts["commit"] = str(commit)
    if origin.get("dir_info", {}).get("editable"):
        facts["editable"] = True
    return facts


def _record_digest(record: str) -> str:
    """SHA-256 over the lines of a RECORD that come from the wheel, sorted.

    Scripts are left out too: their first line names the interpreter's place.
    """
    lines = (line for line in record.splitlines() if line and not line.startswith(("../", "/")))
    kept = sorted(line for line in lines if not line.partition(",")[0].endswith(_VOLATILE))
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()


# --- on demand -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckedPackage:
    """How a package's files compare with its RECORD.

    Args:
        name: normalised.
        version: as installed; empty where it is not.
        state: ``intact``, ``altered``, ``unfinished`` (the time was up), ``editable`` or ``no-record`` (it has no list
            of files to compare with), or ``missing``.
        checked: how many files were compared.
        altered: files that are another, or gone; their names within the package.
    """

    name: str
    version: str
    state: str
    checked: int = 0
    altered: tuple[str, ...] = ()


def check_packages(names: Iterable[str] = CORE_PACKAGES, *, seconds: float = 20.0) -> list[CheckedPackage]:
    """Compare the files of installed packages with what their RECORDs say.

    Args:
        names: which packages.
        seconds: after which no further file is read, over all packages together.
    """
    until = time.monotonic() + seconds
    return [_check(_normalised(name), until) for name in names]


def _check(name: str, until: float) -> CheckedPackage:
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return CheckedPackage(name, "", "missing")
    version = distribution.version or "unknown"
    if _facts(distribution).get("editable"):
        return CheckedPackage(name, version, "editable")
    record = distribution.read_text("RECORD")
    if record is None:
        return CheckedPackage(name, version, "no-record")
    checked, altered = 0, list[str]()
    for row in csv.reader(io.StringIO(record)):
        if len(row) < 2 or not row[1].startswith("sha256="):  # noqa: PLR2004 - path, digest, size
            continue
        if time.monotonic() > until:
            return CheckedPackage(name, version, "altered" if altered else "unfinished", checked, tuple(altered))
        checked += 1
        if not _holds(Path(str(distribution.locate_file(row[0]))), row[1].removeprefix("sha256=")):
            altered.append(row[0])
    return CheckedPackage(name, version, "altered" if altered else "intact", checked, tuple(altered))


def _holds(path: Path, wanted: str) -> bool:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return False
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == wanted.rstrip("=")
