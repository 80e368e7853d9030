"""Sealed randomness: who is sampled and what noise is added, from one secret seed. Floor 2.

The seed is 32 bytes of the operating system's randomness; `set_seed` and torch's generators neither change nor show
it. Every draw has its own keystream, so that any part of a run can be recomputed alone and none can collide:

    key    = HMAC-SHA256(seed, "rlhf-audit/sealed-random/v1" 0x00 purpose 0x00 u64be(step) u64be(index))
    stream = AES-256-CTR(key, counter 0) over zeros, read as little-endian 64-bit words

    uniform    u = (word >> 11) * 2^-53, in [0, 1)
    Bernoulli  unit i is in the sample of a step when u_i < q                     purpose "sample", index 0
               (pairs sampled one by one: place p of the k places of unit i, when u_(ik+p) < q;
               canaries are numbered after the units)
    canary     canary i is in the training when u_i < 1/2                         purpose "canary", step and index 0
    coordinate of canary i: word mod d, where that stands for no earlier one;     purpose "coordinate", step and
               else the same of the next word                                     index 0
    flip       label i of a release is flipped when u_i < p                       purpose "label", step and index 0
    choice     the k rows with the least words of a unit's n rows                 purpose "choice", index = the unit
               (pairs sampled one by one: once for all steps)                     purpose "keep", step 0
    loss       the first normal variate of a stream of its own                    purpose "loss", index 0
    normal     Box-Muller on (u_2j, u_2j+1) of a block of words:                  purpose "noise", index = the tensor
               r = sqrt(-2 ln(1 - u_2j)); z_2j = r cos(2 pi u_2j+1), z_2j+1 = r sin(2 pi u_2j+1), in float64
    dropout    torch's generator is seeded with the word >> 1 for a unit          purpose "dropout", index = the unit

``tests/vectors/privacy`` has golden values of each, made without this module.

The normal variates reach 8.57 standard deviations. The noise is added in float64 and the sum is rounded to the
parameters' own precision before anyone sees it, which blunts the known attacks on the low bits of floating-point
noise; it is not a proof against them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from rlhf_audit_nb.errors import PrivacyError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["GENERATOR", "SEED_BYTES", "SealedRandom"]

GENERATOR = "AES-256-CTR keyed by HMAC-SHA256 per step and tensor, Box-Muller in float64"
_FROM_GIVEN = f"{GENERATOR}; from a seed that was known beforehand"
SEED_BYTES = 32
_DOMAIN = b"rlhf-audit/sealed-random/v1"
_BLOCK = 1 << 18  # normals made at once: bounds the scratch memory, and does not change what comes out


class SealedRandom:
    """All randomness of one training, drawn from one secret seed.

    Args:
        seed: 32 bytes. Take `from_system` for a new training; give a seed only to replay one from its opening.

    Raises:
        PrivacyError: the seed is not 32 bytes.
    """

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise PrivacyError(f"A sealed seed has {SEED_BYTES} bytes, not {len(seed)}.", code="seed")
        self._seed = bytes(seed)
        self._claimed = False
        self._given = True

    @classmethod
    def from_system(cls) -> SealedRandom:
        """A fresh seed from the operating system."""
        fresh = cls(os.urandom(SEED_BYTES))
        fresh._given = False
        return fresh

    def __repr__(self) -> str:
        return "SealedRandom(<secret>)"

    @property
    def generator(self) -> str:
        """What a reservation says of its randomness: the generator, and whether its seed was known beforehand."""
        return _FROM_GIVEN if self._given else GENERATOR

    @property
    def seed(self) -> bytes:
        """The secret: for the vault, and for nothing else."""
        return self._seed

    def claim(self) -> None:
        """Take it for one training. Noise that is used twice can be subtracted, so a second claim is refused.

        Raises:
            PrivacyError: it was taken before.
        """
        if self._claimed:
            raise PrivacyError(
                "This sealed seed has already served a training; its noise must not be used again.",
                next_step="Draw a new one: SealedRandom.from_system().",
                code="seed-reused",
            )
        self._claimed = True

    def bernoulli_mask(self, step: int, rate: float, count: int) -> npt.NDArray[np.bool_]:
        """For each of ``count`` units, whether it is in the sample of ``step`` (independently, chance ``rate``)."""
        uniforms: npt.NDArray[np.bool_] = _uniforms(self._words("sample", step, 0, count)) < rate
        return uniforms

    def flips(self, probability: float, count: int) -> npt.NDArray[np.bool_]:
        """For each of ``count`` labels, whether it is flipped (independently).

        The chance is ``probability`` rounded up to a multiple of 2^-53, so never less than what was asked for.
        """
        flipped: npt.NDArray[np.bool_] = _uniforms(self._words("label", 0, 0, count)) < probability
        return flipped

    def canaries(self, count: int) -> npt.NDArray[np.bool_]:
        """For each of ``count`` canaries, whether it is in the training (independently, chance 1/2)."""
        included: npt.NDArray[np.bool_] = _uniforms(self._words("canary", 0, 0, count)) < 0.5  # noqa: PLR2004
        return included

    def coordinates(self, count: int, size: int) -> npt.NDArray[np.int64]:
        """``count`` different ones of ``range(size)``, every such sequence equally likely (to size / 2^64)."""
        chosen: dict[int, None] = {}
        stream = self._stream("coordinate", 0, 0)
        while len(chosen) < count:
            chosen.setdefault(int(_next_words(stream, 1)[0]) % size)
        return np.fromiter(chosen, np.int64, count)

    def choice(self, step: int, unit: int, size: int, count: int) -> tuple[int, ...]:
        """``size`` of ``range(count)``, every such set equally likely, in rising order; all where they are no more."""
        return self._chosen("choice", step, unit, size, count)

    def kept(self, unit: int, size: int, count: int) -> tuple[int, ...]:
        """`choice`, once for all steps."""
        return self._chosen("keep", 0, unit, size, count)

    def _chosen(self, purpose: str, step: int, unit: int, size: int, count: int) -> tuple[int, ...]:
        if count <= size:
            return tuple(range(count))
        order = np.argsort(self._words(purpose, step, unit, count), kind="stable")
        return tuple(sorted(int(index) for index in order[:size]))

    def normals(self, step: int, tensor: int, count: int) -> npt.NDArray[np.float64]:
        """``count`` standard normal variates (float64) for one tensor of one step."""
        out = np.empty(count, dtype=np.float64)
        stream = self._stream("noise", step, tensor)
        for start in range(0, count, _BLOCK):
            size = min(_BLOCK, count - start)
            out[start : start + size] = _box_muller(_next_words(stream, size + size % 2))[:size]
        return out

    def loss_normal(self, step: int) -> float:
        """A standard normal variate for the released loss of a step."""
        return float(_box_muller(self._words("loss", step, 0, 2))[0])

    def torch_seed(self, step: int, unit: int) -> int:
        """A 63-bit seed for the dropout masks of one unit in one step, apart from everyone else's data."""
        return int(self._words("dropout", step, unit, 1)[0]) >> 1

    def _words(self, purpose: str, step: int, index: int, count: int) -> npt.NDArray[np.uint64]:
        return _next_words(self._stream(purpose, step, index), count)

    def _stream(self, purpose: str, step: int, index: int) -> Any:
        message = b"\0".join((_DOMAIN, purpose.encode(), struct.pack(">QQ", step, index)))
        key = hmac.new(self._seed, message, hashlib.sha256).digest()
        return Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()


def _next_words(stream: Any, count: int) -> npt.NDArray[np.uint64]:
    return np.frombuffer(stream.update(bytes(8 * count)), dtype="<u8")


def _uniforms(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _box_muller(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    uniforms = _uniforms(words)
    radius = np.sqrt(-2.0 * np.log1p(-uniforms[0::2]))
    angle = (2.0 * np.pi) * uniforms[1::2]
    out = np.empty(words.size, dtype=np.float64)
    np.multiply(radius, np.cos(angle), out=out[0::2])
    np.multiply(radius, np.sin(angle), out=out[1::2])
    return out
