"""The words of a verification: how far a verdict reaches, why, and what stands behind it. Floor 0.

============ ==== =========================================================================================
INVALID       40  something does not hang together, or is not signed by whom the policy trusts
DIVERGED      30  it does, but it is not (a continuation of) the history that was seen before
UNANCHORED    10  it does, and nobody but the key's holder has witnessed it
TIMESTAMPED    5  a timestamp bounds when it was written
COSIGNED       0  the policy's quorum of witnesses has cosigned it
============ ==== =========================================================================================

A level follows from the codes of the reasons alone: `ADVISORY` ones leave it as it is, `DIVERGING` ones make it
DIVERGED, and every other code, also one that is not known here, makes it INVALID. The page docs/trail/verdicts.md
tells of each code what it means and what to do.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any

__all__ = ["ADVISORY", "DIVERGING", "Anchor", "Level", "Reason", "RunSummary", "Verdict", "level_of"]

ADVISORY = frozenset(
    {
        "anchor",
        "anchor-time",
        "anchor-unknown",
        "commit-time",
        "erasure-unfinished",
        "last-seen",
        "quorum",
        "run-open",
        "split-view",
        "tsa-unknown",
        "vault-old",
    }
)
"""Codes of reasons that are worth knowing and leave the level as it is."""

DIVERGING = frozenset({"anchor-fork", "fork", "rollback"})
"""Codes of reasons that show another history than this one, every hash and signature of both holding."""

_LONG_KEY = 512


class Level(IntEnum):
    """How far a verdict reaches, the least first."""

    INVALID = 0
    DIVERGED = 1
    UNANCHORED = 2
    TIMESTAMPED = 3
    COSIGNED = 4

    @property
    def exit_code(self) -> int:
        """The level's process status."""
        return (40, 30, 10, 5, 0)[self]


@dataclass(frozen=True)
class Reason:
    """One thing found: a machine-readable code, the place, and a sentence."""

    code: str
    where: str
    message: str

    @property
    def advisory(self) -> bool:
        """Whether it leaves the level as it is."""
        return self.code in ADVISORY


def level_of(reasons: Iterable[Reason]) -> Level | None:
    """The level that ``reasons`` force; ``None`` where all of them are advisory, or there are none."""
    codes = {reason.code for reason in reasons} - ADVISORY
    if not codes:
        return None
    return Level.DIVERGED if codes <= DIVERGING else Level.INVALID


@dataclass(frozen=True)
class RunSummary:
    """One run: its status (``open`` where no end was recorded), its entries, the first's and the last's index."""

    run: str
    status: str
    entries: int
    first: int
    last: int


@dataclass(frozen=True)
class Anchor:
    """What somebody else has said of the trail's first ``size`` entries.

    Attributes:
        kind: ``cosignature`` (a witness saw this as the largest consistent head) or ``timestamp`` (it existed then).
        size: how many entries it covers.
        root: the root over them (32 bytes).
        time: POSIX seconds that the witness or the timestamping authority gives.
        by: the witness's verifier key, or the authority's subject name.
        where: the file that holds it.
    """

    kind: str
    size: int
    root: bytes
    time: int
    by: str
    where: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "root": base64.b64encode(self.root).decode()}


@dataclass(frozen=True)
class Verdict:
    """What a verification found.

    Attributes:
        level: how far it reaches.
        origin: the trail's name.
        size: how many entries the newest checkpoint covers.
        root: base64 of the root over them.
        signers: verifier keys whose signatures on the newest checkpoint hold and count.
        runs: every run, in the order of their first entries.
        reasons: what was found; empty where all holds and nothing is worth knowing.
        anchors: what others have said of this history, the oldest first; each of them fits it.
        openings: of the private halves, how many are there, erased and missing; ``None`` where that was not looked at.
    """

    level: Level
    origin: str
    size: int
    root: str
    signers: tuple[str, ...] = ()
    runs: tuple[RunSummary, ...] = ()
    reasons: tuple[Reason, ...] = ()
    anchors: tuple[Anchor, ...] = ()
    openings: Mapping[str, Any] | None = field(default=None, hash=False)

    def exit_code(self, require: Level | None = None) -> int:
        """The process status: 0 where the level is enough, else the level's own code.

        Without ``require`` UNANCHORED and above are enough, unless the policy asked for witnesses that are missing.
        """
        least = Level.UNANCHORED if require is None else require
        if require is None and any(reason.code == "quorum" for reason in self.reasons):
            least = Level.COSIGNED
        return 0 if self.level >= least else self.level.exit_code

    @property
    def signed_by(self) -> str:
        """The signers for a person: their verifier keys, the long ones of ML-DSA-44 by name and id; may be empty."""
        shown = (key if len(key) <= _LONG_KEY else "+".join(key.split("+")[:2]) + "+…" for key in self.signers)
        return ", ".join(shown)

    def __str__(self) -> str:
        signers = self.signed_by or "nobody that is trusted"
        head = f"{self.level.name}: {self.origin}, {self.size} entries, root {self.root}, signed by {signers}"
        return "\n".join([head, *(f"  {reason.where}: {reason.message} [{reason.code}]" for reason in self.reasons)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `verify --json` prints them."""
        return {
            "level": self.level.name,
            "origin": self.origin,
            "size": self.size,
            "root": self.root,
            "signers": list(self.signers),
            "runs": [asdict(run) for run in self.runs],
            "reasons": [asdict(reason) for reason in self.reasons],
            "anchors": [anchor.to_dict() for anchor in self.anchors],
            "openings": None if self.openings is None else dict(self.openings),
        }
