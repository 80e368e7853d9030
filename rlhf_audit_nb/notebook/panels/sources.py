"""What the panel reads, by shape: the run, the trail's status, a verdict. Floor 6.

Protocols, so that the panel needs neither torch nor a trail to be tested; `capture.state.RunState`, the trail's status
and `trail.Verdict` fit them as they are.
"""

# ruff: noqa: D102 - the classes say what their members are

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

__all__ = ["InheritedLike", "LevelLike", "PrivacyLike", "ReasonLike", "StateLike", "StatusLike", "VerdictLike"]

Point = tuple[float, float]


class PrivacyLike(Protocol):
    """The plan of a private run; ``curve[t]`` is the composed ε after t steps, over all runs of the population."""

    @property
    def unit(self) -> str: ...
    @property
    def units(self) -> int: ...
    @property
    def adjacency(self) -> str: ...
    @property
    def delta(self) -> float: ...
    @property
    def budget(self) -> float: ...
    @property
    def before(self) -> float: ...
    @property
    def planned(self) -> float: ...
    @property
    def noise_multiplier(self) -> float: ...
    @property
    def sampling_rate(self) -> float: ...
    @property
    def clipping_norm(self) -> float: ...
    @property
    def sampled(self) -> str: ...
    @property
    def curve(self) -> Sequence[float]: ...


class InheritedLike(Protocol):
    """What a training inherits that charges nothing: the composed ε of ``runs``."""

    @property
    def unit(self) -> str: ...
    @property
    def epsilon(self) -> float: ...
    @property
    def delta(self) -> float: ...
    @property
    def runs(self) -> Sequence[str]: ...


class StateLike(Protocol):
    """The open run as a reader sees it: lists only ever grow, and reading needs no lock."""

    @property
    def experiment(self) -> str: ...
    @property
    def run_id(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def max_steps(self) -> int | None: ...
    @property
    def private(self) -> bool: ...
    @property
    def privacy(self) -> PrivacyLike | None: ...
    @property
    def inherited(self) -> InheritedLike | None: ...
    @property
    def series(self) -> Mapping[str, Sequence[Point]]: ...
    @property
    def warnings(self) -> Sequence[str]: ...


class StatusLike(Protocol):
    """Where the trail stands: tree size, root hash, signer's name, time of the last commit (µs), entries unsynced."""

    @property
    def size(self) -> int: ...
    @property
    def root(self) -> bytes: ...
    @property
    def signer(self) -> str: ...
    @property
    def last_commit_time_us(self) -> int | None: ...
    @property
    def unsynced(self) -> int: ...


class ReasonLike(Protocol):
    """One thing that a verification found."""

    @property
    def code(self) -> str: ...
    @property
    def where(self) -> str: ...
    @property
    def message(self) -> str: ...


class LevelLike(Protocol):
    """A level of verification, known by its name."""

    @property
    def name(self) -> str: ...


class VerdictLike(Protocol):
    """What a verification came to."""

    @property
    def level(self) -> LevelLike: ...
    @property
    def size(self) -> int: ...
    @property
    def reasons(self) -> Sequence[ReasonLike]: ...
