"""Makes the golden file of sealed randomness from its description alone: Python's standard library and OpenSSL.

    python tests/vectors/privacy/make.py [FILE]

Nothing of the package is used, nor NumPy: AES-256-CTR is the command ``openssl enc``, the rest is here.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("sealed_random.json")
DOMAIN = b"rlhf-audit/sealed-random/v1"
SEEDS = (bytes(range(32)), bytes(32), hashlib.sha256(b"rlhf-audit").digest())


def key_of(seed: bytes, purpose: str, step: int, index: int) -> bytes:
    """The key of one draw."""
    message = DOMAIN + b"\0" + purpose.encode("ascii") + b"\0" + struct.pack(">QQ", step, index)
    return hmac.new(seed, message, hashlib.sha256).digest()


def words_of(key: bytes, count: int) -> list[int]:
    """The first words of a draw's stream: AES-256-CTR over zeros, little-endian."""
    asked = ["openssl", "enc", "-aes-256-ctr", "-K", key.hex(), "-iv", "0" * 32]
    stream = subprocess.run(asked, input=bytes(8 * count), capture_output=True, check=True).stdout
    return list(struct.unpack(f"<{count}Q", stream))


def uniform(word: int) -> float:
    """A word as a number in [0, 1)."""
    return math.ldexp(word >> 11, -53)


def below(words: list[int], chance: float) -> list[int]:
    """Who is in: those whose number is below the chance."""
    return [place for place, word in enumerate(words) if uniform(word) < chance]


def least(words: list[int], size: int) -> list[int]:
    """The places of the least words, rising."""
    return sorted(sorted(range(len(words)), key=lambda place: (words[place], place))[:size])


def normals(words: list[int], count: int) -> list[float]:
    """Box-Muller, two from two."""
    out: list[float] = []
    for one, two in zip(words[0::2], words[1::2], strict=True):
        radius, angle = math.sqrt(-2.0 * math.log1p(-uniform(one))), 2.0 * math.pi * uniform(two)
        out += [radius * math.cos(angle), radius * math.sin(angle)]
    return out[:count]


def cases(seed: bytes) -> list[dict[str, Any]]:
    """One seed's draws, of each purpose."""
    made = []

    def case(purpose: str, step: int, index: int, many: int, /, **rest: Any) -> list[int]:
        key = key_of(seed, purpose, step, index)
        words = words_of(key, many)
        said = {"purpose": purpose, "step": step, "index": index, "key": key.hex()}
        made.append({**said, "words": [f"{word:016x}" for word in words], **rest})
        return words

    for step, rate in ((0, 0.25), (7, 0.5), (2**40, 0.125)):
        words = case("sample", step, 0, 24, rate=rate)
        made[-1]["sampled"] = below(words, rate)
    words = case("label", 0, 0, 24, probability=0.3)
    made[-1]["flipped"] = below(words, 0.3)
    for purpose, step, unit in (("choice", 3, 5), ("keep", 0, 5)):
        words = case(purpose, step, unit, 9, size=4)
        made[-1]["chosen"] = least(words, 4)
    for step, tensor, count in ((0, 0, 8), (3, 2, 7)):
        words = case("noise", step, tensor, count + count % 2, count=count)
        made[-1]["normals"] = [number.hex() for number in normals(words, count)]
    words = case("loss", 6, 0, 2, count=1)
    made[-1]["normals"] = [number.hex() for number in normals(words, 1)]
    words = case("canary", 0, 0, 24)
    made[-1]["included"] = below(words, 0.5)
    words = case("coordinate", 0, 0, 12, size=20, count=6)
    made[-1]["coordinates"] = list(dict.fromkeys(word % 20 for word in words))[:6]
    words = case("dropout", 4, 11, 1)
    made[-1]["torch_seed"] = words[0] >> 1
    return made


def build() -> dict[str, Any]:
    """The whole file."""
    return {
        "about": "Sealed randomness, rlhf-audit/sealed-random/v1: seeds (hex), and draws of each purpose. Words are "
        "64-bit, in hex; normals are C99 hex floats, to be met within 4 units in the last place, since logarithm, "
        "sine and cosine differ in their last bit from library to library. All else is exact.",
        "seeds": [{"seed": seed.hex(), "draws": cases(seed)} for seed in SEEDS],
    }


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    target.write_text(json.dumps(build(), indent=1) + "\n", encoding="utf-8")
