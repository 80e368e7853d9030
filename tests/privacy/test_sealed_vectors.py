"""Sealed randomness against its golden file, and the golden file against OpenSSL and the standard library."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rlhf_audit_nb.privacy import sampling
from rlhf_audit_nb.privacy.sampling import SealedRandom

FOLDER = Path(__file__).parents[1] / "vectors" / "privacy"
GOLDEN = json.loads((FOLDER / "sealed_random.json").read_text(encoding="utf-8"))
DRAWS = [(one["seed"], draw) for one in GOLDEN["seeds"] for draw in one["draws"]]
NAMED = ("sampled", "flipped", "chosen", "included", "coordinates", "torch_seed")
NAMES = [f"{seed[:4]}-{draw['purpose']}-{draw['step']}-{draw['index']}" for seed, draw in DRAWS]


def drawn(random: SealedRandom, draw: dict[str, Any]) -> Any:
    """What the package draws, in the golden file's form."""
    step, index, count = draw["step"], draw["index"], len(draw["words"])
    match draw["purpose"]:
        case "sample":
            return random.bernoulli_mask(step, draw["rate"], count).nonzero()[0].tolist()
        case "label":
            return random.flips(draw["probability"], count).nonzero()[0].tolist()
        case "choice":
            return list(random.choice(step, index, draw["size"], count))
        case "keep":
            return list(random.kept(index, draw["size"], count))
        case "noise":
            return random.normals(step, index, draw["count"]).tolist()
        case "loss":
            return [random.loss_normal(step)]
        case "canary":
            return random.canaries(count).nonzero()[0].tolist()
        case "coordinate":
            return random.coordinates(draw["count"], draw["size"]).tolist()
        case "dropout":
            return random.torch_seed(step, index)
    raise AssertionError(draw["purpose"])


@pytest.mark.parametrize(("seed", "draw"), DRAWS, ids=NAMES)
def test_each_purpose_draws_what_the_golden_file_says(seed: str, draw: dict[str, Any]) -> None:
    found = drawn(SealedRandom(bytes.fromhex(seed)), draw)
    if "normals" not in draw:
        (expected,) = (draw[name] for name in NAMED if name in draw)
        assert found == expected
        assert found not in ([], None)
        return
    expected = [float.fromhex(text) for text in draw["normals"]]
    assert len(found) == len(expected) == draw["count"]
    for one, other in zip(found, expected, strict=True):
        assert abs(one - other) <= 4 * math.ulp(other)


def test_the_golden_file_has_every_purpose_that_the_package_draws_for() -> None:
    source = Path(sampling.__file__).read_text(encoding="utf-8")
    purposes = set(re.findall(r'self\._(?:words|stream|chosen)\(\s*"(\w+)"', source))
    assert purposes == {draw["purpose"] for _, draw in DRAWS}


def test_another_seed_step_index_or_purpose_has_another_key() -> None:
    keys = [draw["key"] for _, draw in DRAWS]
    assert len(set(keys)) == len(keys) == len(DRAWS)


def test_the_search_for_a_difference_would_find_one() -> None:
    seed, draw = next(item for item in DRAWS if item[1]["purpose"] == "choice")
    other = bytearray(bytes.fromhex(seed))
    other[31] ^= 1
    words = [drawn(SealedRandom(bytes(other)), {**draw, "step": step}) for step in range(20)]
    assert words != [drawn(SealedRandom(bytes.fromhex(seed)), {**draw, "step": step}) for step in range(20)]


@pytest.fixture(scope="module")
def made() -> ModuleType:
    """The independent implementation: the standard library, and AES from the command line of OpenSSL."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the command openssl")
    spec = importlib.util.spec_from_file_location("make_sealed_vectors", FOLDER / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_golden_file_is_what_openssl_and_the_standard_library_make(made: ModuleType) -> None:
    built = json.loads(json.dumps(made.build()))
    for one, other in zip(built["seeds"], GOLDEN["seeds"], strict=True):
        for draw, kept in zip(one["draws"], other["draws"], strict=True):
            numbers, known = draw.pop("normals", []), dict(kept)
            expected = known.pop("normals", [])
            assert draw == known
            for found, golden in zip(numbers, expected, strict=True):
                value = float.fromhex(golden)
                assert abs(float.fromhex(found) - value) <= 4 * math.ulp(value)


def test_a_long_draw_does_not_depend_on_the_blocks_in_which_it_is_made(made: ModuleType) -> None:
    count = (1 << 18) + 3  # over one block of the package, and odd
    seed = bytes(range(32))
    found = SealedRandom(seed).normals(1, 2, count)
    words = made.words_of(made.key_of(seed, "noise", 1, 2), count + 1)
    tail = made.normals(words[(1 << 18) - 2 :], 5)
    np.testing.assert_allclose(found[-5:], tail, rtol=1e-14)
