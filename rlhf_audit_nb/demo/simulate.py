"""Makes the SIMULATED preference set, byte for byte: ``python -m rlhf_audit_nb.demo.simulate``. Floor 1.

No person voted here. 48 simulated annotators of five profiles choose between two answers to an everyday question;
what an answer is like (right, careful, long, warm) is known when it is made, and a profile says how much each of
these counts. The choice follows a Bradley-Terry model, so annotators disagree: between profiles by taste, within one
by chance. Every number comes from one `random.Random` with a fixed seed, of which only ``random()`` is used, because
that alone is promised to stay the same in later versions of Python.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from rlhf_audit_nb.demo.phrases import CLOSINGS, OPENINGS, TOPICS, Topic
from rlhf_audit_nb.demo.preferences import SIMULATED_FILE

__all__ = ["PROFILES", "SEED", "Profile", "render", "rows"]

SEED = 20260101
PAIRS_A_TOPIC = 9
FEWEST_PAIRS, MOST_PAIRS = 4, 16

Item = TypeVar("Item")


class Profile(NamedTuple):
    """How much each trait of an answer counts for an annotator, and how often she just takes the first one."""

    name: str
    annotators: int
    right: float
    careful: float
    long: float
    warm: float
    hurry: float = 0.0


PROFILES: tuple[Profile, ...] = (
    Profile("careful", 16, right=2.2, careful=1.6, long=0.3, warm=0.0),
    Profile("brisk", 12, right=1.2, careful=-0.3, long=-1.8, warm=-0.4),
    Profile("thorough", 10, right=1.4, careful=0.5, long=1.7, warm=0.0),
    Profile("warm", 6, right=0.8, careful=0.2, long=0.2, warm=1.9),
    Profile("hurried", 4, right=0.4, careful=0.0, long=-0.4, warm=0.2, hurry=0.7),
)


class Answer(NamedTuple):
    """An answer and what it is like; each trait is 0 or 1."""

    text: str
    right: int
    careful: int
    long: int
    warm: int


class Pair(NamedTuple):
    """Two different answers to one prompt."""

    prompt: str
    first: Answer
    second: Answer


def _pick(dice: random.Random, items: Sequence[Item]) -> Item:
    return items[int(dice.random() * len(items))]


def _answer(dice: random.Random, topic: Topic) -> Answer:
    right, careful, long, warm = (int(dice.random() < share) for share in (0.65, 0.45, 0.5, 0.4))
    parts = [topic.right if right else topic.sloppy]
    parts += topic.details if long else ()
    parts += (topic.caution,) if careful else ()
    text = " ".join(parts)
    if warm:
        text = _pick(dice, OPENINGS) + text + _pick(dice, CLOSINGS)
    return Answer(text, right, careful, long, warm)


def _pairs(dice: random.Random) -> Iterator[Pair]:
    for topic in TOPICS:
        for _ in range(PAIRS_A_TOPIC):
            first = second = _answer(dice, topic)
            while second[1:] == first[1:]:
                second = _answer(dice, topic)
            yield Pair(topic.prompt, first, second)


def _takes_first(dice: random.Random, profile: Profile, pair: Pair) -> bool:
    if dice.random() < profile.hurry:
        return True
    difference = sum(
        getattr(profile, trait) * (getattr(pair.first, trait) - getattr(pair.second, trait))
        for trait in ("right", "careful", "long", "warm")
    )
    return dice.random() < 1 / (1 + math.exp(-difference))


def _sample(dice: random.Random, pool: Sequence[Item], count: int) -> list[Item]:
    left = list(pool)
    return [left.pop(int(dice.random() * len(left))) for _ in range(count)]


def rows() -> Iterator[dict[str, str]]:
    """Every vote: ``prompt``, ``chosen``, ``rejected``, ``annotator_id``; always the same ones."""
    dice = random.Random(SEED)
    pool = list(_pairs(dice))
    kinds = _sample(dice, [p for p in PROFILES for _ in range(p.annotators)], sum(p.annotators for p in PROFILES))
    for number, profile in enumerate(kinds, start=1):
        count = FEWEST_PAIRS + int(dice.random() * (MOST_PAIRS - FEWEST_PAIRS + 1))
        for pair in _sample(dice, pool, count):
            first = _takes_first(dice, profile, pair)
            chosen, rejected = (pair.first, pair.second) if first else (pair.second, pair.first)
            yield {
                "prompt": pair.prompt,
                "chosen": chosen.text,
                "rejected": rejected.text,
                "annotator_id": f"simulated-{number:02d}",
            }


def render() -> bytes:
    """The file's bytes: one JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()).encode()


if __name__ == "__main__":
    SIMULATED_FILE.write_bytes(render())
    print(f"{SIMULATED_FILE}: {sum(1 for _ in rows())} simulated votes")
