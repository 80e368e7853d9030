"""Statistics about annotators that may be passed on: no figure is about fewer than k of them. Floor 2.

Annotators are grouped by how many annotations they gave, in fixed bands; neighbouring bands are merged until each
group has at least k annotators. A figure of a group is a mean over its annotators, each counting the same (so that a
diligent one does not dominate), rounded, and only where at least k of them have a value. No smallest or largest
value is given, and a group is named by its bands, never by what is in it. The figure of all annotators is left out
where taking the shown groups from it would leave a mean over fewer than k.

This is k-anonymity and not differential privacy: who knows all but one of a group can work out the last one's figure,
and two releases that differ in one annotator show hers. Everything here is a pure function of numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_audit_nb.errors import ConfigError

__all__ = ["BANDS", "LEAST_K", "ReleasedGroup", "ReleasedStatistics", "check_k", "release"]

BANDS = (1, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Where a band begins; the last one is open."""

LEAST_K = 5
_DIGITS = 2


@dataclass(frozen=True, kw_only=True)
class ReleasedGroup:
    """A group of at least k annotators.

    Attributes:
        band: how many annotations each of them gave, as a fixed band such as ``5 to 19``.
        annotators: how many they are.
        means: of each figure the mean over them; ``None`` where it is suppressed.
    """

    band: str
    annotators: int
    means: dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class ReleasedStatistics:
    """What may be passed on.

    Attributes:
        k: no figure is about fewer annotators.
        groups: from those with the fewest annotations to those with the most; none where there are fewer than k.
        overall: of each figure the mean over all annotators; ``None`` where it is suppressed.
        suppressed: what is left out, as sentences.
    """

    k: int
    groups: tuple[ReleasedGroup, ...]
    overall: dict[str, float | None]
    suppressed: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)

    def words(self) -> Iterator[str]:
        """All of it as lines."""
        names = list(self.overall)
        if self.groups:
            yield "  ".join(
                [f"{'annotations':<13}", f"{'annotators':>10}", *(f"{name:>{len(name)}}" for name in names)]
            )
            for group in self.groups:
                yield self._line(group.band, str(group.annotators), group.means)
            yield self._line("all", str(sum(group.annotators for group in self.groups)), self.overall)
        yield f"No figure is about fewer than {self.k} annotators; each of them counts the same in a mean."
        yield from self.suppressed

    def _line(self, band: str, count: str, means: Mapping[str, float | None]) -> str:
        cells = [f"{'–' if mean is None else format(mean, '.2f'):>{len(name)}}" for name, mean in means.items()]
        return "  ".join([f"{band:<13}", f"{count:>10}", *cells])

    def __str__(self) -> str:
        return "\n".join(self.words())

    __repr__ = __str__


def check_k(k: object) -> int:
    """``k`` if it can be one.

    Raises:
        ConfigError: it is no whole number of at least 2.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 2:  # noqa: PLR2004
        raise ConfigError(
            f"k is {k!r}; it must be a whole number of at least 2.",
            next_step=f"Write k={LEAST_K}, or more where the annotators know each other.",
            code="k",
        )
    return k


def release(
    amounts: Sequence[int], figures: Mapping[str, Sequence[float | None]], k: int = LEAST_K
) -> ReleasedStatistics:
    """Statistics of annotators, none of which is about fewer than ``k``.

    Args:
        amounts: how many annotations each annotator gave (at least 1).
        figures: by name, one value for each annotator; ``None`` where it is not known of one.
        k: the least number of annotators that any figure is about.

    Raises:
        ConfigError: ``k`` is no whole number of at least 2.
    """
    check_k(k)
    names = list(figures)
    if len(amounts) < k:
        told = (f"Everything is left out: there are fewer than {k} annotators.",)
        return ReleasedStatistics(k=k, groups=(), overall=dict.fromkeys(names), suppressed=told)
    groups, suppressed = [], []
    overall: dict[str, float | None] = {}
    merged = _merged(amounts, k)
    shown = {name: [_mean(figures[name], members, k) for _, members in merged] for name in names}
    for at, (band, members) in enumerate(merged):
        means = {name: shown[name][at] for name in names}
        groups.append(ReleasedGroup(band=band, annotators=len(members), means=means))
    for name in names:
        known = [sum(figures[name][one] is not None for one in members) for _, members in merged]
        hidden = sum(count for count, mean in zip(known, shown[name], strict=True) if mean is None)
        everyone = range(len(amounts))
        overall[name] = None if 0 < hidden < k else _mean(figures[name], everyone, k)
        left = [band for (band, _), mean in zip(merged, shown[name], strict=True) if mean is None]
        if left or overall[name] is None:
            suppressed.append(_told(name, left, k, everywhere=overall[name] is None))
    return ReleasedStatistics(k=k, groups=tuple(groups), overall=overall, suppressed=tuple(suppressed))


def _merged(amounts: Sequence[int], k: int) -> list[tuple[str, list[int]]]:
    """Bands merged from below until each holds k (of at least k); what is left over at the top goes to the last."""
    bands: list[list[int]] = [[] for _ in BANDS]
    for one, amount in enumerate(amounts):
        bands[sum(amount >= start for start in BANDS) - 1].append(one)
    found: list[tuple[int, int, list[int]]] = []
    first = 0
    members: list[int] = []
    for at, band in enumerate(bands):
        members = members + band
        if len(members) >= k:
            found.append((first, at, members))
            first, members = at + 1, []
    start, _, before = found.pop()  # the last one is open: nobody's largest amount shows
    found.append((start, len(BANDS) - 1, before + members))
    return [(_name(start, stop), inside) for start, stop, inside in found]


def _name(first: int, last: int) -> str:
    if last + 1 >= len(BANDS):
        return f"{BANDS[first]} or more"
    return f"{BANDS[first]} to {BANDS[last + 1] - 1}"


def _mean(values: Sequence[float | None], members: Sequence[int], k: int) -> float | None:
    known = [value for value in (values[one] for one in members) if value is not None]
    return round(sum(known) / len(known), _DIGITS) if len(known) >= k else None


def _told(name: str, left: Sequence[str], k: int, *, everywhere: bool) -> str:
    where = f" for those with {', '.join(left)} annotations" if left else ""
    both = f"{where} and for all" if where and everywhere else where or " for all"
    return f"{name} is left out{both}: known of fewer than {k} annotators there, or what is left would be."
