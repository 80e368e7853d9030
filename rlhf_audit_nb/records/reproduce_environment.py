"""A fresh environment from the packages that a record names: what can be had, made, and compared. Floor 3.

A run's environment entry names every installed package with its version. From that list, and with nothing that pip
would add (``--no-deps``: the list is whole), a virtual environment is made in a folder; nothing is registered anywhere
else. Before anything runs, what cannot be had is named: working copies, packages from a repository, and whatever the
indexes that pip is configured for do not have. Where the trail's own list is at hand (``artifacts/DIGEST.json``, by the
digest in the entry), what was installed is held against the digests of the packages' own lists of files.

This tool itself, where it cannot be had in the version that was recorded, is copied from where it runs; that is told.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_audit_nb.capture.packages import list_packages
from rlhf_audit_nb.capture.secrets import scrub_values
from rlhf_audit_nb.errors import RecordError
from rlhf_audit_nb.records.rerun import environment_of

if TYPE_CHECKING:
    from rlhf_audit_nb.events import EnvironmentCaptured
    from rlhf_audit_nb.records.record import OpenedRecord

__all__ = [
    "EnvironmentRefusedError",
    "FreshEnvironment",
    "Wanted",
    "make_environment",
    "requirement_lines",
    "wanted_packages",
]

TOOL = "rlhf-audit-trail"
MARK = "rlhf-audit-environment.json"
KERNEL = "ipykernel"
_MOST_MISSING = 25
_MOST_NAMED = 12
_PIP_SECONDS = 3600
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
_VERSION = re.compile(r"\d[A-Za-z0-9.+!_-]*")
_MISSING = re.compile(r"No matching distribution found for ([A-Za-z0-9._-]+)==")
_OWN_INTERPRETER = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")

Tell = Callable[[str], None]


class EnvironmentRefusedError(RecordError):
    """The environment cannot be made; nothing of the record was run."""

    code: ClassVar[str] = "environment-refused"
    exit_code: ClassVar[int] = 3


@dataclass(frozen=True)
class Wanted:
    """One package as the record's environment had it.

    Attributes:
        name: normalised.
        version: as installed.
        record: digest of its list of files, where it is known.
        obstacle: why no index can have it; empty where one may.
    """

    name: str
    version: str
    record: str | None = None
    obstacle: str = ""


@dataclass(frozen=True)
class FreshEnvironment:
    """An environment that was made.

    Attributes:
        python: its interpreter.
        notes: in what it is not the recorded one, as sentences.
    """

    python: Path
    notes: tuple[str, ...] = field(default=())


# --- what is wanted --------------------------------------------------------------------------------------------------


def wanted_packages(opened: OpenedRecord, artifacts: Path | None = None) -> tuple[str, tuple[Wanted, ...]]:
    """The version of Python and the packages of a verified record's first run.

    Args:
        opened: the record.
        artifacts: the folder beside its trail with the lists that are too long for entries; ``None`` where it is not
            at hand: then builds cannot be compared.

    Raises:
        EnvironmentRefusedError: no run has recorded its environment, or not all of it.
    """
    captured = environment_of(opened.entries)
    if captured is None:
        raise EnvironmentRefusedError(
            "The record names no packages: no run in it has recorded its environment.",
            next_step="Leave --fresh-environment out, and run it in an environment that you make.",
        )
    if opened.started is not None and opened.started.kernel.get("language", "python").lower() != "python":
        raise EnvironmentRefusedError(
            "The record's kernel is not Python's.", next_step="Leave --fresh-environment out."
        )
    listed = _listed(captured, artifacts)
    if listed is None and "*" in captured.packages:
        raise EnvironmentRefusedError(
            "The record names its main packages alone; the whole list lies beside its trail.",
            next_step="Name that trail with --trail.",
        )
    facts = listed or {name: {"version": version} for name, version in captured.packages.items()}
    return captured.python, tuple(_wanted(name, facts[name]) for name in sorted(facts))


def _listed(captured: EnvironmentCaptured, artifacts: Path | None) -> dict[str, dict[str, Any]] | None:
    if artifacts is None or captured.packages_digest is None:
        return None
    try:
        content = (artifacts / f"{captured.packages_digest}.json").read_bytes()
    except OSError:
        return None  # another trail's folder, or a copy without it: builds are then not compared, which is told
    if hashlib.sha256(content).hexdigest() != captured.packages_digest:
        raise EnvironmentRefusedError(
            "The list of packages beside the trail is not the one that the record names.",
            next_step="Restore the trail's artifacts from a copy.",
        )
    listed: dict[str, dict[str, Any]] = json.loads(content)
    return listed


def _wanted(name: str, facts: dict[str, Any]) -> Wanted:
    obstacle = ""
    if facts.get("editable"):
        obstacle = "a working copy (editable)"
    elif facts.get("commit"):
        obstacle = f"from a repository, commit {str(facts['commit'])[:12]}"
    elif not _NAME.fullmatch(name) or not _VERSION.fullmatch(facts["version"]):
        obstacle = "its version is not known"  # nor is it an option of pip
    return Wanted(name, facts["version"], facts.get("record"), obstacle)


def requirement_lines(wanted: Sequence[Wanted], without: Collection[str] = ()) -> list[str]:
    """What pip is asked for: each package that may be had, in its very version."""
    return sorted(f"{item.name}=={item.version}" for item in wanted if not item.obstacle and item.name not in without)


# --- making it -------------------------------------------------------------------------------------------------------


def make_environment(
    folder: Path,
    wanted: Sequence[Wanted],
    *,
    python: str,
    without: Collection[str] = (),
    tell: Tell = lambda _: None,
) -> FreshEnvironment:
    """Make a virtual environment with these packages, or use the one that was made in ``folder`` for the same ones.

    Args:
        folder: new, or empty, or made by this function.
        wanted: the packages.
        python: the version of Python that was recorded.
        without: packages to leave out, normalised names; the caller's own word.
        tell: is told what goes on.

    Raises:
        EnvironmentRefusedError: Python of that version is not here, the folder holds something else, a package cannot
            be had, or pip failed.
    """
    interpreter = _interpreter(python)
    left_out = tuple(sorted({item.name for item in wanted} & set(without)))
    if KERNEL not in {item.name for item in wanted if item.name not in left_out}:
        raise EnvironmentRefusedError(
            f"Without {KERNEL}, which is not among the packages, no notebook runs in an environment.",
            next_step="Leave --fresh-environment out.",
        )
    lines = requirement_lines(wanted, without)
    mark = {"python": python, "requirements": hashlib.sha256("\n".join(lines).encode()).hexdigest()}
    inside = _inside(folder)
    if not _is_made(folder, mark):
        _refuse_obstacles(wanted, without)
        try:
            yanked = _make(folder, interpreter, wanted, lines, tell)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # half of an environment is none
            raise
        (folder / MARK).write_text(json.dumps({**mark, "yanked": yanked}), encoding="utf-8")
    yanked = json.loads((folder / MARK).read_text(encoding="utf-8"))["yanked"]
    notes = [
        *([f"Left out as asked: {_named(left_out)}."] if left_out else []),
        *([f"Withdrawn from the index (yanked), and had all the same: {_named(yanked)}."] if yanked else []),
        *([f"Python {python} was recorded, and {_version(inside)} is here."] if _version(inside) != python else []),
        *_compared(wanted, left_out, _packages_of(inside)),
    ]
    return FreshEnvironment(inside, tuple(notes))


def _make(folder: Path, interpreter: str, wanted: Sequence[Wanted], lines: list[str], tell: Tell) -> list[str]:
    """Make it; the packages among them that their index has withdrawn."""
    inside = _inside(folder)
    tell(f"making an environment of {len(lines)} packages in {folder}")
    _run([interpreter, "-m", "venv", "--without-pip", str(folder)])
    missing, yanked = _look(inside, lines)
    tell("installing")
    left = [line for line in lines if line.partition("==")[0] not in missing]
    _pip(inside, ["install", "--no-deps", "--quiet", "-r"], left)
    if missing or any(item.name == TOOL and item.obstacle for item in wanted):
        _copy_tool(_packages_of(inside))
    return yanked


def _interpreter(version: str) -> str:
    short = ".".join(version.split(".")[:2])
    if short == ".".join(platform.python_version_tuple()[:2]):
        return sys.executable
    found = shutil.which(f"python{short}")
    if found is None:
        raise EnvironmentRefusedError(
            f"The record ran on Python {version}, and there is no python{short} here.",
            next_step=f"Install Python {short}, or leave --fresh-environment out.",
        )
    return found


def _inside(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _is_made(folder: Path, mark: dict[str, str]) -> bool:
    """Whether the folder is an environment that was made here for the very same packages."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    try:
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    if {name: found.get(name) for name in mark} == mark:
        return True
    raise EnvironmentRefusedError(
        f"{folder} holds something else than an environment of these packages.",
        next_step="Name a folder that is new or empty.",
    )


def _refuse_obstacles(wanted: Sequence[Wanted], without: Collection[str]) -> None:
    found = [item for item in wanted if item.obstacle and item.name not in {*without, TOOL}]
    if found:
        named = ", ".join(f"{item.name} {item.version} ({item.obstacle})" for item in found[:_MOST_NAMED])
        raise _cannot(named, found[0].name)


def _cannot(named: str, first: str) -> EnvironmentRefusedError:
    return EnvironmentRefusedError(
        f"These packages cannot be had, so nothing was run: {named}.",
        next_step="Let pip find them (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL), or leave each one out that the notebook "
        f"does not need: --without {first}.",
    )


def _look(python: Path, lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """Which packages the indexes do not have (this tool alone may be missing), and which they have withdrawn."""
    left, missing = list(lines), list[str]()
    with tempfile.TemporaryDirectory(prefix="rlhf-audit-") as scratch:
        report = Path(scratch) / "report.json"
        asked = ["install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", str(report), "-r"]
        for _ in range(_MOST_MISSING):
            found = _MISSING.search(_pip(python, asked, left, may_miss=True))
            if found is None:
                break
            missing.append(found[1])
            left = [line for line in left if line.partition("==")[0] != found[1]]
        others = [name for name in missing if name != TOOL]
        if others:
            wanted = dict(line.split("==", 1) for line in lines)
            named = ", ".join(f"{name} {wanted.get(name, '')}".strip() for name in others)
            raise _cannot(named, others[0])
        installed = json.loads(report.read_text(encoding="utf-8")).get("install", [])
    yanked = sorted(item["metadata"]["name"] for item in installed if item.get("is_yanked"))
    return missing, yanked


def _pip(python: Path, asked: Sequence[str], lines: Sequence[str], *, may_miss: bool = False) -> str:
    """What pip complains of; ``asked`` ends where the file of requirements is named."""
    with tempfile.TemporaryDirectory(prefix="rlhf-audit-") as scratch:
        listed = Path(scratch) / "requirements.txt"
        listed.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return _run([sys.executable, "-m", "pip", "--python", str(python), *asked, str(listed)], may_miss=may_miss)


def _run(command: Sequence[str], *, may_miss: bool = False) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in _OWN_INTERPRETER}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=_PIP_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentRefusedError("pip took longer than an hour.", next_step="See to the network.") from error
    if done.returncode == 0 or (may_miss and _MISSING.search(done.stderr)):
        return done.stderr
    last = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
    (said,) = scrub_values([last[-1]])
    raise EnvironmentRefusedError(
        f"The environment could not be made: {said}", next_step="Run pip by hand to see all that it says."
    )


def _packages_of(python: Path) -> Path:
    return Path(_asked(python, "import sysconfig; print(sysconfig.get_paths()['purelib'])"))


def _version(python: Path) -> str:
    return _asked(python, "import platform; print(platform.python_version())")


def _asked(python: Path, code: str) -> str:
    # Isolated: what lies in the working directory, and PYTHONPATH, are no part of the environment.
    done = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def _copy_tool(folder: Path) -> None:
    """Put this tool, as it runs here, into an environment."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(__file__).parents[1], folder / "rlhf_audit_nb", ignore=ignored, dirs_exist_ok=True)
    alias = importlib.util.find_spec("rlhf_audit_trail")
    if alias is not None and alias.origin is not None:
        shutil.copy2(alias.origin, folder)
    here = importlib.metadata.distribution(TOOL)
    told = folder / f"{TOOL.replace('-', '_')}-{here.version}.dist-info"
    told.mkdir(exist_ok=True)
    for name in ("METADATA", "entry_points.txt"):
        (told / name).write_text(here.read_text(name) or "", encoding="utf-8")


# --- comparing -------------------------------------------------------------------------------------------------------


def _compared(wanted: Sequence[Wanted], left_out: Collection[str], folder: Path) -> list[str]:
    """In what the installed packages are not those that were recorded, as sentences."""
    there = list_packages(folder)
    expected = [item for item in wanted if item.name not in left_out]
    notes = []
    tool = next((item for item in expected if item.name == TOOL), None)
    if tool is not None and "record" not in there.get(TOOL, {}):
        version = there.get(TOOL, {}).get("version", "none")
        notes.append(
            f"This tool could not be had in version {tool.version}; the one that runs here ({version}) was copied."
        )
    rest = [item for item in expected if item.name != TOOL]
    wrong = [item.name for item in rest if there.get(item.name, {}).get("version") != item.version]
    if wrong:
        notes.append(f"Not in the recorded version: {_named(wrong)}.")
    builds = [
        item.name
        for item in rest
        if item.name not in wrong and item.record is not None and there[item.name].get("record") != item.record
    ]
    if builds:
        notes.append(f"Other builds of the recorded version (their lists of files differ): {_named(builds)}.")
    if not any(item.record for item in wanted):
        notes.append("Builds could not be compared: the digests of the packages lie beside the record's trail.")
    return notes


def _named(names: Collection[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _MOST_NAMED} more" if len(listed) > _MOST_NAMED else ""
    return f"{', '.join(listed[:_MOST_NAMED])}{more}"
