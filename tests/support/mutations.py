"""One-byte changes of a record's file, and whether a verdict names the place of one, by the tests' own reading."""

from __future__ import annotations

import json
import math
import random
import re
from typing import Any

__all__ = ["REGIONS", "finite", "leaves", "names", "one_byte_changes", "path_of_difference", "spelled"]


def path_of_difference(one: Any, other: Any, where: str = "") -> str:
    """Path of the first difference between two JSON values, by this test's own reading."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            if key not in one or key not in other:
                return f"{where}.{key}".lstrip(".")
            if one[key] != other[key]:
                return path_of_difference(one[key], other[key], f"{where}.{key}".lstrip("."))
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            if a != b:
                return path_of_difference(a, b, f"{where}[{i}]")
    return where


REGIONS = {
    "source": r"cells\[\d+\]\.source",
    "output": r"cells\[\d+\]\.outputs",
    "cell id or type or metadata": r"cells\[\d+\]\.(id|cell_type|metadata|execution_count)",
    "parameters": r"metadata\.papermill\.parameters",
    "notebook metadata": r"metadata\.(papermill|kernelspec|language_info)",
    "statement": r"metadata\.rlhf_audit\.statement\.payload$",
    "signature": r"metadata\.rlhf_audit\.statement\.signatures",
    "proof": r"metadata\.rlhf_audit\.entries\[\d+\]\.proof",
    "entry": r"metadata\.rlhf_audit\.entries\[\d+\]\.(data|index)",
    "checkpoint": r"metadata\.rlhf_audit\.checkpoint",
    "manifest": r"metadata\.rlhf_audit\.manifest",
    "addition": r"metadata\.rlhf_audit\.additions",
}


def generous(path: str) -> str:
    """The path at the depth at which a verdict names a place: an output, an entry, a key of metadata."""
    for pattern in (
        r"cells\[\d+\]\.outputs(\[\d+\])?",
        r"cells\[\d+\]\.\w+",
        r"metadata\.rlhf_audit\.(entries|additions)\[\d+\]",
        r"metadata\.rlhf_audit\.\w+",
        r"metadata\.\w+",
    ):
        match = re.match(pattern, path)
        if match:
            return match[0]
    return path


def names(where: str, path: str) -> bool:
    place = generous(path)
    return where.startswith(place) or (
        place.startswith(where) and where.startswith(("cells[", "metadata.", "nbformat"))
    )


def leaves(value: Any, path: tuple[Any, ...] = ()):
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))
    else:
        yield path, value


def spelled(path: tuple[Any, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def spots(data: bytes) -> dict[str, list[range]]:
    """For each region, where the values of it stand in the file."""
    found: dict[str, list[range]] = {name: [] for name in REGIONS}
    for path, value in leaves(json.loads(data)):
        text = json.dumps(value, ensure_ascii=False).encode()
        key = f'"{path[-1]}": '.encode() if isinstance(path[-1], str) else b""
        at = data.find(key + text)
        for name, pattern in REGIONS.items():
            if at >= 0 and re.match(pattern, spelled(path)):
                found[name].append(range(at, at + len(key + text)))
    return found


def one_byte_changes(data: bytes, seed: int, each: int, anywhere: int):
    """The file with one byte replaced by another, or by its neighbour in one bit: in each region, and anywhere."""
    chance = random.Random(seed)
    wanted = [chance.choice(chance.choice(places)) for places in spots(data).values() for _ in range(each)]
    wanted += [chance.randrange(len(data)) for _ in range(anywhere)]
    for position in wanted:
        new = chance.choice([chance.randrange(256), data[position] ^ 1 << chance.randrange(8)])
        if new != data[position]:
            yield position, data[:position] + bytes([new]) + data[position + 1 :]


def finite(text: str) -> float:
    """A number of JSON; one that is too large for a double, such as 9007199e54740992, is none."""
    if math.isinf(float(text)):
        raise ValueError(text)
    return float(text)
