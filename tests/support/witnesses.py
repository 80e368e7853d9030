"""A log and a witness's client that share no code with the package: built from the texts of C2SP and RFC 6962 alone."""

from __future__ import annotations

import base64
import hashlib
import struct
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


def digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def split(count: int) -> int:
    """RFC 6962 2.1: the largest power of two smaller than n."""
    k = 1
    while k * 2 < count:
        k *= 2
    return k


def tree(leaves: list[bytes]) -> bytes:
    """RFC 6962 2.1, MTH."""
    if not leaves:
        return digest()
    if len(leaves) == 1:
        return digest(b"\0", leaves[0])
    k = split(len(leaves))
    return digest(b"\1", tree(leaves[:k]), tree(leaves[k:]))


def consistency(first: int, leaves: list[bytes], *, whole: bool = True) -> list[bytes]:
    """RFC 6962 2.1.2, SUBPROOF(m, D[n], b)."""
    if first == len(leaves):
        return [] if whole else [tree(leaves)]
    k = split(len(leaves))
    if first <= k:
        return [*consistency(first, leaves[:k], whole=whole), tree(leaves[k:])]
    return [*consistency(first - k, leaves[k:], whole=False), tree(leaves[:k])]


def key_id(name: str, kind: int, public: bytes) -> bytes:
    return digest(name.encode(), b"\n", bytes([kind]), public)[:4]


@dataclass
class Log:
    """A log that signs whatever heads it is asked to."""

    origin: str
    leaves: list[bytes] = field(default_factory=list)
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    @property
    def public(self) -> bytes:
        return self.key.public_key().public_bytes_raw()

    @property
    def vkey(self) -> str:
        return f"{self.origin}+{key_id(self.origin, 1, self.public).hex()}+{b64(bytes([1]) + self.public)}"

    def grow(self, size: int, what: str = "entry") -> Log:
        self.leaves += [f"{what}-{number}".encode() for number in range(len(self.leaves), size)]
        return self

    def forked(self, size: int, what: str = "other") -> Log:
        """Another history of the same log after ``size`` entries."""
        return Log(self.origin, self.leaves[:size], self.key).grow(len(self.leaves), what)

    def signed(self, text: str) -> str:
        line = b64(key_id(self.origin, 1, self.public) + self.key.sign(text.encode()))
        return f"{text}\n— {self.origin} {line}\n"

    def head(self, size: int | None = None) -> str:
        size = len(self.leaves) if size is None else size
        return self.signed(f"{self.origin}\n{size}\n{b64(tree(self.leaves[:size]))}\n")

    def proof(self, old: int, size: int | None = None) -> list[bytes]:
        size = len(self.leaves) if size is None else size
        return consistency(old, self.leaves[:size]) if 0 < old < size else []

    def body(self, old: int, size: int | None = None) -> bytes:
        """tlog-witness: old size, proof lines, an empty line, the checkpoint."""
        proof = "".join(b64(node) + "\n" for node in self.proof(old, size))
        return f"old {old}\n{proof}\n{self.head(size)}".encode()


def check_cosignature(line: str, text: str, vkey: str) -> int:
    """tlog-cosignature v1: the time of a cosignature line that holds under ``vkey``; raises where it does not."""
    name, hexid, encoded = vkey.split("+", 2)
    raw = base64.b64decode(encoded, validate=True)
    assert raw[0] == 4
    mark, signer, data = line.split(" ")
    assert (mark, signer) == ("—", name)
    blob = base64.b64decode(data, validate=True)
    assert blob[:4] == key_id(name, 4, raw[1:]) == bytes.fromhex(hexid)
    assert len(blob) == 76
    (when,) = struct.unpack(">Q", blob[4:12])
    Ed25519PublicKey.from_public_bytes(raw[1:]).verify(blob[12:], f"cosignature/v1\ntime {when}\n{text}".encode())
    return when
