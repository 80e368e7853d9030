"""The master key of a trail's vault: its file, and its generations. Floor 0.

``HOME/keys/ORIGIN/vault.key`` is JSON, in the clear or with each secret sealed by scrypt + AES-256-GCM::

    {"version":2,"generations":[{"number":N,"key":BASE64}]}
    {"version":2,"scrypt":{"salt":BASE64,"n":32768,"r":8,"p":1},"generations":[{"number":N,"sealed":BASE64}]}

A *generation* is 64 secret bytes: the master that wraps the owners' keys, and the ratchet from which erasures get
their names. Each erasure makes a new generation and forgets the old one, so that an old copy of the vault does not open
with the key of today, nor the vault of today with an old copy of the key. Only while an erasure is under way does the
file hold two. The new master is fresh; the new ratchet is the hash of the old one: whoever still has an old
generation can tell which of its owners were erased later (and must erase them again), and nobody else can.

The file is replaced under a lock beside it (``.vault.lock``), whole or not at all.
"""

from __future__ import annotations

import base64
import hmac
import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from rlhf_audit_nb.config import ENV_PASSPHRASE
from rlhf_audit_nb.errors import FormatError, KeyFileError
from rlhf_audit_nb.trail.durable import locked, sync_folder, write_durably
from rlhf_audit_nb.trail.note import decode_base64

__all__ = [
    "Generation",
    "MasterKey",
    "backup_master",
    "locked_keys",
    "reseal_master",
    "restore_master",
    "unusable_keys",
    "wrong_passphrase",
]

_VERSION = 2
_SCRYPT = {"n": 1 << 15, "r": 8, "p": 1}
_SECRET_BYTES = 32
_NONCE_BYTES = 12
_MOST_GENERATIONS = 2


@dataclass(frozen=True)
class Generation:
    """One generation of a vault's master key.

    Attributes:
        number: counts from 1, one more with each erasure.
        master: wraps the owners' keys (32 bytes).
        ratchet: names the erasure that ends this generation (32 bytes).
    """

    number: int
    master: bytes = field(repr=False)
    ratchet: bytes = field(repr=False)

    @classmethod
    def first(cls) -> Generation:
        """The generation of a new vault."""
        return cls(1, secrets.token_bytes(_SECRET_BYTES), secrets.token_bytes(_SECRET_BYTES))

    def next(self, number: int | None = None) -> Generation:
        """The generation after this one, or that of a later ``number``, with a master that nobody had before."""
        then = self.at(self.number + 1 if number is None else number)
        return Generation(then.number, secrets.token_bytes(_SECRET_BYTES), then.ratchet)

    def at(self, number: int) -> Generation:
        """A later generation as far as this one tells it: its ratchet, and not its master."""
        ratchet = self.ratchet
        for _ in range(number - self.number):
            ratchet = sha256(b"rlhf-audit/ratchet/v1\0" + ratchet).digest()
        return Generation(number, b"", ratchet)

    def erasure(self, owner: str) -> tuple[str, bytes]:
        """The name and the salt of the erasure of ``owner`` that ends this generation."""
        name = hmac.digest(
            self.ratchet, b"rlhf-audit/erasure-name/v1\0" + owner.encode(errors="surrogatepass"), "sha256"
        )[:16].hex()
        return name, self.salt(name)

    def salt(self, erasure: str) -> bytes:
        """The salt of the erasure of that name."""
        return hmac.digest(self.ratchet, b"rlhf-audit/erasure-salt/v1\0" + erasure.encode(), "sha256")


class MasterKey:
    """The master key of one vault: what its file holds, read again where the vault has gone on.

    Args:
        path: the file.
        generations: what it holds, the oldest first.
        passphrase: what it is sealed with.
        sealed: whether it is; a file in the clear stays so, also where a passphrase is at hand.
    """

    def __init__(
        self, path: Path, generations: Sequence[Generation], passphrase: bytes | None = None, *, sealed: bool
    ) -> None:
        self.path = path
        self._generations = tuple(generations)
        self._passphrase = passphrase
        self._sealed = sealed

    @classmethod
    def create(cls, path: Path, passphrase: bytes | None = None) -> MasterKey:
        """A new master key, whose bytes (`encode`) are not written yet."""
        return cls(path, [Generation.first()], passphrase, sealed=passphrase is not None)

    @classmethod
    def load(cls, path: Path, passphrase: bytes | None = None) -> MasterKey:
        """The master key in ``path``.

        Raises:
            KeyFileError: it is missing, damaged, sealed and no passphrase was given, or the passphrase is wrong.
        """
        generations, sealed = _read(path, passphrase)
        return cls(path, generations, passphrase, sealed=sealed)

    @property
    def newest(self) -> Generation:
        """The newest generation that is known here."""
        return self._generations[-1]

    @property
    def settled(self) -> bool:
        """Whether one generation alone is known: no erasure was under way when the file was read."""
        return len(self._generations) == 1

    def encode(self) -> bytes:
        """The file's bytes."""
        return _encode(self._generations, self._passphrase if self._sealed else None)

    def generation(self, number: int) -> Generation | None:
        """The generation of that number, read from the file where it is not known yet; ``None`` where it has none.

        Raises:
            KeyFileError: the file cannot be used.
        """
        found = self._known(number)
        if found is None and self.path.is_file():
            self.reload()
            found = self._known(number)
        return found

    def _known(self, number: int) -> Generation | None:
        return next((item for item in self._generations if item.number == number), None)

    def reload(self) -> None:
        """Read the file again.

        Raises:
            KeyFileError: it cannot be used.
        """
        self._generations, self._sealed = _read(self.path, self._passphrase)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Nobody else changes the file meanwhile; what it holds now is known afterwards.

        Raises:
            KeyFileError: it cannot be used, or the folder cannot be written.
        """
        with _exclusive(self.path):
            self.reload()
            yield

    def keep(self, *generations: Generation) -> None:
        """Make the file hold these generations and no others; only within `exclusive`.

        Raises:
            KeyFileError: it cannot be written; then it is as it was.
        """
        if generations != self._generations:
            _write(self.path, _encode(generations, self._passphrase if self._sealed else None))
            self._generations = generations
        _sweep(self.path)


def backup_master(path: Path) -> bytes:
    """The bytes of a vault's key file, for a backup; as sealed or as open as the file is.

    Raises:
        KeyFileError: it cannot be read, or an erasure is under way (code ``erasing``).
    """
    with _exclusive(path):
        data = _bytes(path)
        if len(_numbers(data, path)) != 1:
            raise KeyFileError(
                f"An erasure is not finished, so {path} still holds the old key beside the new one.",
                next_step="Open the trail once, which finishes it, then make the backup.",
                code="erasing",
            )
        return data


def restore_master(path: Path, data: bytes) -> None:
    """Put a vault's key file back from a backup, where it is missing, damaged, or of the same generation.

    Raises:
        KeyFileError: the backup is no key file, the folder cannot be written, or the file that is there is newer
            (code ``newer-key``): putting an older one in its place would lose the vault and bring back who was erased.
    """
    number = max(_numbers(data, path))
    with _exclusive(path):
        try:
            there = max(_numbers(_bytes(path), path))
        except KeyFileError:
            there = 0
        if there > number:
            raise KeyFileError(
                f"{path} is of generation {there} and the backup of generation {number}: somebody was erased since.",
                next_step="Keep the file that is there; the backup no longer opens this vault.",
                code="newer-key",
            )
        _write(path, data)


def reseal_master(path: Path, passphrase: bytes | None, new: bytes | None) -> None:
    """Seal a vault's key file with another passphrase (``None``: in the clear).

    Raises:
        KeyFileError: it cannot be used or written, or the passphrase is wrong.
    """
    with _exclusive(path):
        _write(path, _encode(_read(path, passphrase)[0], new))


def locked_keys(folder: Path) -> KeyFileError:
    """The keys are encrypted and no passphrase was given."""
    return KeyFileError(
        f"The keys in {folder} are encrypted and no passphrase was given.",
        next_step=f"Set {ENV_PASSPHRASE}, or pass passphrase=.",
        code="passphrase",
    )


def wrong_passphrase(folder: Path) -> KeyFileError:
    """The passphrase is not theirs."""
    return KeyFileError(
        f"The passphrase does not open the keys in {folder}.",
        next_step=f"Check {ENV_PASSPHRASE} or passphrase=; nothing was changed.",
        code="passphrase",
    )


def unusable_keys(folder: Path, error: Exception) -> KeyFileError:
    """A file is missing or damaged."""
    return KeyFileError(
        f"The keys in {folder} cannot be used: {error}.",
        next_step="Restore the folder from a backup, or point RLHF_AUDIT_HOME at the one that has the keys.",
    )


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with ExitStack() as held:
        try:
            held.enter_context(locked(path.with_name(".vault.lock")))
        except OSError as error:
            raise _unwritable(path, error) from error
        yield


def _unwritable(path: Path, error: OSError) -> KeyFileError:
    return KeyFileError(
        f"The vault's key {path} cannot be written: {error.strerror or error}.",
        next_step="Make its folder writable and free some space; the file is as it was.",
    )


def _write(path: Path, data: bytes) -> None:
    try:
        write_durably(path, data)
    except OSError as error:
        raise _unwritable(path, error) from error


def _sweep(path: Path) -> None:
    """Remove what writes that were killed have left beside the file: it may hold a generation that is to be gone."""
    try:
        left = list(path.parent.glob(f".{path.name}.*"))
        for temporary in left:
            temporary.unlink(missing_ok=True)
        if left:
            sync_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unusable_keys(path.parent, error) from error


def _associated(number: int) -> bytes:
    return b"rlhf-audit/master/v2\0" + number.to_bytes(8, "big")


def _stretch(passphrase: bytes, salt: bytes) -> bytes:
    return Scrypt(salt=salt, length=32, **_SCRYPT).derive(passphrase)


def _encode(generations: Sequence[Generation], passphrase: bytes | None) -> bytes:
    fields: dict[str, object] = {"version": _VERSION}
    cipher = None
    if passphrase is not None:
        salt = secrets.token_bytes(16)
        fields["scrypt"] = {"salt": base64.b64encode(salt).decode(), **_SCRYPT}
        cipher = AESGCM(_stretch(passphrase, salt))
    rows = []
    for item in generations:
        secret, name = item.master + item.ratchet, "key"
        if cipher is not None:
            nonce = secrets.token_bytes(_NONCE_BYTES)
            secret, name = nonce + cipher.encrypt(nonce, secret, _associated(item.number)), "sealed"
        rows.append({"number": item.number, name: base64.b64encode(secret).decode()})
    fields["generations"] = rows
    return json.dumps(fields).encode() + b"\n"


def _fields(data: bytes, path: Path) -> dict[str, Any]:
    """The file's fields, of a version that is known, with one or two generations in their order."""
    try:
        fields = json.loads(data)
        if fields["version"] != _VERSION:
            raise ValueError(f"vault.key is of version {fields['version']!r}, and this version reads {_VERSION}")
        numbers = [row["number"] for row in fields["generations"]]
        whole = all(type(number) is int and number > 0 for number in numbers)
        if not whole or not 0 < len(numbers) <= _MOST_GENERATIONS or numbers != sorted(set(numbers)):
            raise ValueError("vault.key does not hold one generation, or two")
    except (ValueError, KeyError, TypeError) as error:
        raise unusable_keys(path.parent, error) from error
    return dict(fields)


def _numbers(data: bytes, path: Path) -> list[int]:
    return [row["number"] for row in _fields(data, path)["generations"]]


def _read(path: Path, passphrase: bytes | None) -> tuple[tuple[Generation, ...], bool]:
    """What the file holds, and whether it is sealed."""
    fields = _fields(_bytes(path), path)
    try:
        cipher = None
        if "scrypt" in fields:
            if passphrase is None:
                raise locked_keys(path.parent)
            cipher = AESGCM(_stretch(passphrase, decode_base64(fields["scrypt"]["salt"], "salt of the master key")))
        return tuple(_generation(row, cipher) for row in fields["generations"]), cipher is not None
    except InvalidTag as error:
        raise wrong_passphrase(path.parent) from error
    except (ValueError, KeyError, TypeError, FormatError) as error:
        raise unusable_keys(path.parent, error) from error


def _generation(row: dict[str, Any], cipher: AESGCM | None) -> Generation:
    secret = decode_base64(row["sealed" if cipher else "key"], "master key")
    if cipher is not None:
        secret = cipher.decrypt(secret[:_NONCE_BYTES], secret[_NONCE_BYTES:], _associated(row["number"]))
    if len(secret) != 2 * _SECRET_BYTES:
        raise ValueError("the master key is not 64 bytes")
    return Generation(row["number"], secret[:_SECRET_BYTES], secret[_SECRET_BYTES:])
