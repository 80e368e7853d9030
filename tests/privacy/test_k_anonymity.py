"""What is released about annotators is never about fewer than k of them, also not by subtraction."""

from __future__ import annotations

import itertools
import random

import pytest

from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.privacy.k_anonymity import BANDS, release


def members_of(band: str, amounts: list[int]) -> list[int]:
    """Who is in a released group, told from its name alone."""
    if band.endswith("or more"):
        return [one for one, amount in enumerate(amounts) if amount >= int(band.split(maxsplit=1)[0])]
    first, _, last = band.split()
    return [one for one, amount in enumerate(amounts) if int(first) <= amount <= int(last)]


def population(seed: int) -> tuple[list[int], dict[str, list[float | None]]]:
    """Annotators with amounts over all bands, and figures that are not known of everybody."""
    drawn = random.Random(seed)
    count = drawn.randrange(0, 60)
    amounts = [int(2 ** drawn.uniform(0, 11)) or 1 for _ in range(count)]
    figures: dict[str, list[float | None]] = {
        name: [drawn.random() if drawn.random() < known else None for _ in range(count)]
        for name, known in (("agreement", 0.9), ("ties", 0.4), ("rating", 0.1))
    }
    return amounts, figures


@pytest.mark.parametrize("k", [2, 5, 8])
def test_no_figure_is_about_fewer_than_k_also_not_by_subtraction(k: int):
    shown = 0
    for seed in range(300):
        amounts, figures = population(seed)
        found = release(amounts, figures, k)
        groups = [members_of(group.band, amounts) for group in found.groups]
        assert sorted(itertools.chain(*groups)) == (list(range(len(amounts))) if found.groups else [])
        assert all(len(inside) == group.annotators >= k for inside, group in zip(groups, found.groups, strict=True))
        for name, values in figures.items():
            known = [{one for one in inside if values[one] is not None} for inside in groups]
            told = [one for one, group in zip(known, found.groups, strict=True) if group.means[name] is not None]
            sets = [*told, set().union(*known)] if found.overall[name] is not None else told
            # Whoever has the means and how many stand behind them can take any shown ones from the one of all.
            for size in range(len(told) + 1):
                for taken in itertools.combinations(told, size):
                    for whole in sets:
                        rest = whole.difference(*taken) if taken else whole
                        assert len(rest) == 0 or len(rest) >= k, (seed, name)
            shown += len(told)
    assert shown > 100


def test_the_means_are_those_of_the_annotators_each_counting_the_same():
    amounts = [1] * 5 + [1000] * 5
    found = release(amounts, {"agreement": [0.1] * 5 + [0.2, 0.4, 0.6, 0.8, 1.0]}, 5)
    assert [(group.band, group.annotators, group.means) for group in found.groups] == [
        ("1 to 4", 5, {"agreement": 0.1}),
        ("5 or more", 5, {"agreement": 0.6}),
    ]
    assert found.overall == {"agreement": 0.35}
    assert found.suppressed == ()


def test_one_who_stands_alone_is_merged_with_the_next_and_no_smallest_or_largest_is_told():
    amounts = [3, 3, 3, 3, 3, 7, 777]
    (group,) = release(amounts, {"agreement": [0.5] * 7}, 5).groups
    assert (group.band, group.annotators) == ("1 or more", 7)
    assert "777" not in str(release(amounts, {"agreement": [0.5] * 7}, 5))


def test_a_single_hidden_figure_hides_that_of_all_too():
    """Five groups' means and that of all would tell the one that is left out."""
    amounts = [1] * 5 + [10] * 5
    found = release(amounts, {"rating": [0.5] * 5 + [0.9, None, None, None, None]}, 5)
    assert [group.means["rating"] for group in found.groups] == [0.5, None]
    assert found.overall["rating"] is None
    (told,) = found.suppressed
    assert told.startswith("rating is left out for those with 5 or more annotations and for all: known of fewer than 5")


def test_fewer_than_k_annotators_give_nothing():
    found = release([5, 6, 7, 8], {"ties": [0.1, 0.2, 0.3, 0.4]}, 5)
    assert (found.groups, found.overall) == ((), {"ties": None})
    assert "fewer than 5 annotators" in str(found)
    assert "0.1" not in str(found)


def test_all_that_is_told_stands_in_its_words():
    words = str(release([1, 2, 3, 20, 30, 40], {"ties": [0.25] * 6}, 3))
    assert "1 to 4 " in words
    assert "5 or more" in words
    assert "0.25" in words
    assert "No figure is about fewer than 3 annotators" in words


@pytest.mark.parametrize("k", [1, 0, -3, True, 2.5, "5", None])
def test_a_k_that_protects_nobody_is_refused(k):
    with pytest.raises(ConfigError, match="k is"):
        release([1] * 9, {}, k)


def test_bands_rise():
    assert list(BANDS) == sorted(set(BANDS))
    assert BANDS[0] == 1
