"""The parts that a report is made of, as data. Floor 4."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_audit_nb.compliance.evidence import Cite

__all__ = ["Cites", "EvidenceRow", "Fact", "Group", "PrivacyPart", "RunPart", "Tile"]

Cites = tuple[Cite, ...]


@dataclass(frozen=True)
class Fact:
    """One thing and what stands for it; ``mono`` marks digests and names of code."""

    label: str
    value: str
    cites: Cites = ()
    mono: bool = False
    note: str = ""


@dataclass(frozen=True)
class Tile:
    """A number large, its meaning under it."""

    value: str
    label: str
    state: str = ""
    cites: Cites = ()


@dataclass(frozen=True)
class Group:
    """A table of facts under a heading; ``mark`` stands beside the heading in the colour of ``state``."""

    title: str
    facts: tuple[Fact, ...]
    words: str = ""
    mark: str = ""
    state: str = ""


@dataclass(frozen=True)
class PrivacyPart:
    """The privacy statement of one run: in words, and figure by figure."""

    title: str
    state: str
    headline: str
    words: str
    cites: Cites
    facts: tuple[Fact, ...] = ()


@dataclass(frozen=True)
class RunPart:
    """One run: what it was, on what, with what result."""

    title: str
    run: str
    status: str
    state: str
    facts: tuple[Fact, ...]
    environment: tuple[Fact, ...]


@dataclass(frozen=True)
class EvidenceRow:
    """One cited entry."""

    index: int
    kind: str
    time: str
    run: str
    leaf_hash: str
    sealed: bool
    stretch: str = ""
