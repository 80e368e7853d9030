"""Who enters a step: whole units, or the pairs of units one by one; drawn by sealed randomness. Floor 2.

``units``
    each unit is in the sample of a step with chance q, independently; of a sampled unit at most k pairs are drawn
    anew in each step, and their gradient is clipped as one.
``pairs``
    of each unit at most k pairs are kept, chosen once for the whole training; the others are never looked at. Each
    unit has k places, filled or not; each place is in the sample with chance q, independently, and the pair in it is
    clipped alone. How many places are filled is private, so the places are drawn for everybody alike, and the sum is
    divided by q k N.

Canaries (`canaries`) are drawn like units, after them. Nothing that one unit holds changes what is drawn of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from rlhf_audit_nb.privacy.sampling import SealedRandom

__all__ = ["Drawn", "Draws"]


@dataclass(frozen=True, slots=True)
class Drawn:
    """What is clipped as one.

    Attributes:
        rows: of the data set.
        index: its place in the roster (of the unit, or of the pair's place): what its dropout masks are seeded by.
    """

    rows: tuple[int, ...]
    index: int


class Draws:
    """The samples of one training.

    Args:
        randomness: the sealed seed.
        members: for each unit the rows that it holds.
        rate: q, the chance of each unit, or of each place.
        most: k.
        pairs: whether pairs are sampled one by one.
        canaries: how many canaries are numbered after the units; each has all of its places filled.
    """

    def __init__(
        self,
        randomness: SealedRandom,
        members: Sequence[Sequence[int]],
        rate: float,
        most: int,
        *,
        pairs: bool = False,
        canaries: int = 0,
    ) -> None:
        self._random = randomness
        self._members = members
        self._rate = rate
        self._most = most
        self._pairs = pairs
        self._canaries = canaries
        self._kept: dict[int, tuple[int, ...]] = {}

    def sample(self, step: int) -> list[Drawn]:
        """Who is in the sample of ``step`` (from 0), in the order of the roster."""
        return self._places(step) if self._pairs else self._units(step)

    def canaries(self, step: int) -> npt.NDArray[np.int64]:
        """(m,), how often each canary is in the sample of ``step``: at most once, or once for each of its places."""
        mask = self._mask(step)[-self._canaries * self._places_each :] if self._canaries else np.zeros(0, bool)
        counts: npt.NDArray[np.int64] = mask.reshape(-1, self._places_each).sum(1, dtype=np.int64)
        return counts

    @property
    def _places_each(self) -> int:
        return self._most if self._pairs else 1

    def _mask(self, step: int) -> npt.NDArray[np.bool_]:
        """One draw for units and canaries together: what is wrong with it is wrong for both."""
        count = (len(self._members) + self._canaries) * self._places_each
        return self._random.bernoulli_mask(step, self._rate, count)

    def _units(self, step: int) -> list[Drawn]:
        mask = self._mask(step)[: len(self._members)]
        # A unit that holds nothing is left out: counted as a loss of 0, it would move the released loss by B/2.
        return [self._unit(step, unit) for unit in map(int, mask.nonzero()[0]) if self._members[unit]]

    def _unit(self, step: int, unit: int) -> Drawn:
        held = self._members[unit]
        return Drawn(tuple(held[place] for place in self._random.choice(step, unit, self._most, len(held))), unit)

    def _places(self, step: int) -> list[Drawn]:
        mask = self._mask(step)[: len(self._members) * self._most]
        drawn = []
        for index in map(int, mask.nonzero()[0]):
            unit, place = divmod(index, self._most)
            kept = self._keep(unit)
            if place < len(kept):
                drawn.append(Drawn((kept[place],), index))
        return drawn

    def _keep(self, unit: int) -> tuple[int, ...]:
        if unit not in self._kept:
            held = self._members[unit]
            self._kept[unit] = tuple(held[place] for place in self._random.kept(unit, self._most, len(held)))
        return self._kept[unit]
