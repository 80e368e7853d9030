"""The doctor: is everything that the next audited run, and the next audit, will need as it should be. Floor 4.

`examine` asks fourteen questions about one trail, each apart from the others (`CHECKS`), and changes nothing: no file
is made or written, no key, no trail, no memory of a head. One question that cannot be answered does not keep the
others from being asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_audit_nb.errors import AuditError, ConfigError
from rlhf_audit_nb.health.custody import (
    check_anchors,
    check_backup,
    check_budget,
    check_keys,
    check_policy,
    check_published,
)
from rlhf_audit_nb.health.evidence import (
    check_clock,
    check_runs,
    check_seen,
    check_trail,
    check_vault,
    check_writers,
)
from rlhf_audit_nb.health.finding import Examination, Finding
from rlhf_audit_nb.health.machine import check_disk, check_versions
from rlhf_audit_nb.health.place import Place, UnknownError
from rlhf_audit_nb.trail.home import home_folder
from rlhf_audit_nb.trail.liveness import living_writers
from rlhf_audit_nb.trail.sqlite import leaving_no_trace

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import Trail

__all__ = ["CHECKS", "Examination", "Finding", "examine"]

CHECKS: Mapping[str, Callable[[Place], Finding]] = {
    "trail": check_trail,
    "seen": check_seen,
    "keys": check_keys,
    "backup": check_backup,
    "vault": check_vault,
    "runs": check_runs,
    "writers": check_writers,
    "clock": check_clock,
    "disk": check_disk,
    "versions": check_versions,
    "policy": check_policy,
    "anchors": check_anchors,
    "published": check_published,
    "budget": check_budget,
}
"""Every check by its name, in the order in which they are told."""

_BUG = "This is no fault of the trail's: report it, with `rlhf-audit doctor --json`."


def examine(
    location: Path | str,
    *,
    home: Path | None = None,
    policy: Path | str | None = None,
    published: str | None = None,
    full: bool = False,
    trail: Trail | None = None,
    now: float | None = None,
) -> Examination:
    """Look at the trail in the folder ``location``, and at what it needs.

    Args:
        location: the trail's folder; where there is none, that is what is found.
        home: the folder of keys and last-seen heads; ``None`` takes ``RLHF_AUDIT_HOME`` or the user's own.
        policy: a trust policy's file; ``None`` looks for ``trust.policy`` in the trail's folder and beside it.
        published: the folder or address of a published copy, to tell how far it lags.
        full: verify every entry, not only the newest.
        trail: the trail as this process has it open, to tell what of it is not on the disk yet.
        now: POSIX seconds; ``None`` asks the clock.

    Raises:
        ConfigError: the policy that was named is not there.
    """
    named = None if policy is None else Path(policy)
    if named is not None and not named.is_file():
        raise ConfigError(f"There is no trust policy at {named}.", next_step="Check the path.", code="policy")
    when = time.time() if now is None else now
    place = Place(Path(location).expanduser().absolute(), home_folder(home), when, named, published, full, trail)
    with _without_trace(place):
        findings = tuple(_looked(name, place) for name in CHECKS)
        try:
            origin = place.origin
        except UnknownError:
            origin = ""
    return Examination(origin=origin, time=when, findings=findings)


def _without_trace(place: Place) -> AbstractContextManager[None]:
    """Reading leaves no file behind; while somebody writes, it takes locks, in files that are there already."""
    if place.trail is not None:
        return nullcontext()
    try:
        return nullcontext() if living_writers(place.folder) else leaving_no_trace()
    except OSError:  # a lock that may not be opened says nothing
        return leaving_no_trace()


def _looked(name: str, place: Place) -> Finding:
    """One check, apart from all others."""
    try:
        found = CHECKS[name](place)
    except UnknownError as error:
        return Finding(check=name, status="warn", message=f"Not known: {error}.")
    except AuditError as error:
        message, step = place.plain(error.message), place.plain(error.next_step)
        return Finding(check=name, status="fail", message=message, next_step=step, facts={"code": error.reason})
    except OSError as error:
        what = Path(error.filename).name if isinstance(error.filename, str) else "A file"
        message = f"{what} cannot be read: {error.strerror or error}."
        return Finding(check=name, status="fail", message=message, next_step="Check its permissions and the disk.")
    except Exception as error:  # whatever a damaged file does to a reader
        message = f"The check itself failed: {type(error).__name__}: {place.plain(str(error))}."
        return Finding(check=name, status="fail", message=message, next_step=_BUG)
    return Finding(
        check=name,
        status=found.status,
        message=place.plain(found.message),
        next_step=place.plain(found.next_step),
        facts=found.facts,
    )
