"""Sealed randomness: statistics of what it draws, and that nothing but the seed decides it."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import struct

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from rlhf_audit_nb.errors import PrivacyError
from rlhf_audit_nb.privacy.sampling import SealedRandom

SEED = bytes(range(32))


def words(purpose: bytes, step: int, index: int, count: int) -> np.ndarray:
    """The documented keystream, written down a second time."""
    message = b"rlhf-audit/sealed-random/v1\0" + purpose + b"\0" + struct.pack(">QQ", step, index)
    key = hmac.new(SEED, message, hashlib.sha256).digest()
    stream = Cipher(algorithms.AES(key), modes.CTR(b"\0" * 16)).encryptor().update(b"\0" * 8 * count)
    return np.frombuffer(stream, "<u8")


def test_normals_are_the_documented_function_of_the_seed() -> None:
    uniform = (words(b"noise", 3, 7, 10) >> np.uint64(11)) / 2.0**53
    radius = np.sqrt(-2 * np.log(1 - uniform[0::2]))
    expected = np.stack([radius * np.cos(2 * np.pi * uniform[1::2]), radius * np.sin(2 * np.pi * uniform[1::2])], 1)
    np.testing.assert_allclose(SealedRandom(SEED).normals(3, 7, 9), expected.ravel()[:9], rtol=1e-12)


def test_the_sample_is_the_documented_function_of_the_seed() -> None:
    uniform = (words(b"sample", 5, 0, 1000) >> np.uint64(11)) / 2.0**53
    np.testing.assert_array_equal(SealedRandom(SEED).bernoulli_mask(5, 0.3, 1000), uniform < 0.3)


def test_normals_are_standard_normal() -> None:
    draws = np.concatenate([SealedRandom(SEED).normals(step, 0, 1_000_000) for step in range(2)])
    assert abs(draws.std() - 1) < 2e-3
    assert abs(draws.mean()) < 3e-3
    assert stats.kstest(draws, "norm").pvalue > 1e-3
    assert abs(stats.skew(draws)) < 0.01
    assert abs(stats.kurtosis(draws)) < 0.02
    assert np.mean(np.abs(draws) > 3) == pytest.approx(2 * stats.norm.sf(3), rel=0.05)
    assert np.unique(draws).size == draws.size


def test_neighbouring_draws_steps_and_tensors_are_uncorrelated() -> None:
    random = SealedRandom(SEED)
    base = random.normals(0, 0, 200_000)
    assert abs(np.corrcoef(base[:-1], base[1:])[0, 1]) < 0.01
    for step, tensor in ((1, 0), (0, 1)):
        assert abs(np.corrcoef(base, random.normals(step, tensor, 200_000))[0, 1]) < 0.01


def test_any_part_can_be_drawn_again_alone_and_a_longer_draw_begins_the_same() -> None:
    random = SealedRandom(SEED)
    first = random.normals(4, 2, 300_001)
    np.testing.assert_array_equal(SealedRandom(SEED).normals(4, 2, 300_001), first)
    np.testing.assert_array_equal(SealedRandom(SEED).normals(4, 2, 1001), first[:1001])


def test_each_unit_is_sampled_at_the_rate_independently() -> None:
    random = SealedRandom(SEED)
    rate, units, steps = 0.13, 400, 600
    masks = np.stack([random.bernoulli_mask(step, rate, units) for step in range(steps)])
    spread = np.sqrt(rate * (1 - rate))
    assert abs(masks.mean() - rate) < 4 * spread / np.sqrt(masks.size)
    sizes = masks.sum(axis=1)
    assert sizes.var() == pytest.approx(units * rate * (1 - rate), rel=0.25)
    per_unit = stats.chisquare(masks.sum(axis=0), np.full(units, masks.sum() / units))
    assert per_unit.pvalue > 1e-3
    pairs = np.corrcoef(masks[:, :40].T.astype(float))
    assert np.abs(pairs[~np.eye(40, dtype=bool)]).max() < 5 / np.sqrt(steps)


def test_rate_one_takes_everyone() -> None:
    assert SealedRandom(SEED).bernoulli_mask(0, 1.0, 1000).all()


def test_every_choice_of_rows_is_equally_likely() -> None:
    random = SealedRandom(SEED)
    seen = dict.fromkeys(itertools.combinations(range(5), 2), 0)
    for step in range(4000):
        seen[random.choice(step, 9, 2, 5)] += 1
    assert stats.chisquare(list(seen.values())).pvalue > 1e-3


def test_a_unit_with_few_rows_gives_all_of_them() -> None:
    assert SealedRandom(SEED).choice(0, 0, 8, 3) == (0, 1, 2)


def test_torch_and_numpy_seeds_change_nothing_and_are_not_moved() -> None:
    def draw() -> np.ndarray:
        return SealedRandom(SEED).normals(0, 0, 100)

    torch.manual_seed(42)
    np.random.seed(42)  # noqa: NPY002 - the legacy global state is what must not matter
    before, state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = draw()
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    torch.manual_seed(7)
    np.testing.assert_array_equal(first, draw())


def test_two_seeds_from_the_system_differ() -> None:
    torch.manual_seed(42)
    first = SealedRandom.from_system().seed
    torch.manual_seed(42)
    assert SealedRandom.from_system().seed != first


def test_a_seed_serves_one_training_and_does_not_show_itself() -> None:
    random = SealedRandom(SEED)
    assert SEED.hex() not in repr(random)
    assert repr(SEED) not in repr(random)
    random.claim()
    with pytest.raises(PrivacyError, match="already served"):
        random.claim()


def test_a_seed_of_another_length_is_refused() -> None:
    with pytest.raises(PrivacyError, match="32 bytes"):
        SealedRandom(b"short")
