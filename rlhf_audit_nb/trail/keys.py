"""The keys of a trail: key rings in the user's home folder. Floor 0.

A trail's keys lie outside its folder, in ``HOME/keys/ORIGIN/`` (the origin percent-encoded), all of mode 0600:

=============  ======================================================================================
``log.pem``    Ed25519, signs checkpoints (PKCS #8, encrypted where a passphrase was given)
``record.pem`` Ed25519, signs records
``model.pem``  P-256, signs model folders (OpenSSF model signing takes no Ed25519)
``vault.key``  the master key of the vault, in its newest generation (`vault_key`)
``log.vkey``   the public half of the log key as a C2SP verifier key, so that checking needs no passphrase
=============  ======================================================================================

Whose signatures count is said by a trust policy (`policy`); the user's own key is the one that is trusted where none
is named.
"""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import platformdirs
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from rlhf_audit_nb.config import ENV_HOME, ENV_PASSPHRASE
from rlhf_audit_nb.errors import FormatError, KeyFileError
from rlhf_audit_nb.trail.durable import sync_folder, write_durably
from rlhf_audit_nb.trail.note import Signer, check_name, format_vkey
from rlhf_audit_nb.trail.policy import TrustPolicy
from rlhf_audit_nb.trail.vault_key import MasterKey, locked_keys, unusable_keys, wrong_passphrase

__all__ = [
    "KeyRing",
    "create_keys",
    "folder_name",
    "have_keys",
    "home_folder",
    "load_keys",
    "local_policy",
]

VAULT_KEY = "vault.key"
_NAME_BYTES = 180


def home_folder(home: Path | str | None = None) -> Path:
    """The folder of keys and last-seen heads: the argument, ``RLHF_AUDIT_HOME``, or the user's own."""
    chosen = home or os.environ.get(ENV_HOME) or platformdirs.user_config_dir("rlhf-audit", appauthor=False)
    return Path(chosen).expanduser()


def folder_name(origin: str) -> str:
    """The file name that stands for an origin."""
    name = quote(check_name(origin, "origin"), safe="")
    if len(name) > _NAME_BYTES or set(name) == {"."}:
        raise FormatError(f"The origin {origin[:60]!r} is too long or only dots.", code="name")
    return name


@dataclass(frozen=True)
class KeyRing:
    """The private keys that act for one origin."""

    origin: str
    log: Ed25519PrivateKey = field(repr=False)
    record: Ed25519PrivateKey = field(repr=False)
    model: ec.EllipticCurvePrivateKey = field(repr=False)
    master: MasterKey = field(repr=False)

    @property
    def signer(self) -> Signer:
        """What signs checkpoints."""
        return Signer(self.origin, self.log)

    @property
    def log_vkey(self) -> str:
        """The log's verifier key."""
        return format_vkey(self.signer.verifier())

    @property
    def record_spki(self) -> bytes:
        """The record key's public half, DER SubjectPublicKeyInfo."""
        return self.record.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    @property
    def model_spki(self) -> bytes:
        """The model key's public half, DER SubjectPublicKeyInfo."""
        return self.model.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _passphrase(given: str | None) -> bytes | None:
    chosen = given if given is not None else os.environ.get(ENV_PASSPHRASE)
    return chosen.encode() if chosen else None


def _keys_folder(home: Path, origin: str) -> Path:
    return home / "keys" / folder_name(origin)


def have_keys(home: Path, origin: str) -> bool:
    """Whether the home folder holds keys for ``origin``."""
    return _keys_folder(home, origin).is_dir()


def create_keys(home: Path, origin: str, passphrase: str | None = None) -> KeyRing:
    """Make the keys of a new origin; they are on the disk, all or none, before this returns.

    Raises:
        KeyFileError: the folder cannot be written, or the origin has keys already.
    """
    secret = _passphrase(passphrase)
    folder = _keys_folder(home, origin)
    ring = KeyRing(
        origin,
        Ed25519PrivateKey.generate(),
        Ed25519PrivateKey.generate(),
        ec.generate_private_key(ec.SECP256R1()),
        MasterKey.create(folder / VAULT_KEY, secret),
    )
    making = folder.with_name(f".{secrets.token_hex(8)}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        making.mkdir(mode=0o700)
        _write_ring(making, ring, secret)
        making.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(making, ignore_errors=True)
        raise KeyFileError(
            f"The keys of {origin} cannot be written to {folder}: {error.strerror or error}.",
            next_step="Make the folder writable, free some space, or set RLHF_AUDIT_HOME to another one.",
        ) from error
    return ring


def _write_ring(folder: Path, ring: KeyRing, secret: bytes | None) -> None:
    sealing: KeySerializationEncryption = BestAvailableEncryption(secret) if secret else NoEncryption()
    for name, key in (("log", ring.log), ("record", ring.record), ("model", ring.model)):
        write_durably(folder / f"{name}.pem", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, sealing))
    write_durably(folder / VAULT_KEY, ring.master.encode())
    write_durably(folder / "log.vkey", ring.log_vkey.encode() + b"\n")


def load_keys(home: Path, origin: str, passphrase: str | None = None) -> KeyRing:
    """The keys of ``origin``.

    Raises:
        KeyFileError: there are none, they are encrypted, the passphrase is wrong, or a file is damaged.
    """
    folder = _keys_folder(home, origin)
    if not folder.is_dir():
        raise KeyFileError(
            f"There are no keys for {origin} in {folder.parent}.",
            next_step="Set RLHF_AUDIT_HOME to the folder that holds them, or read the trail without appending to it.",
            code="no-key",
        )
    secret = _passphrase(passphrase)
    log, record = (_load_pem(folder, name, secret) for name in ("log", "record"))
    model = _load_pem(folder, "model", secret)
    if not isinstance(log, Ed25519PrivateKey) or not isinstance(record, Ed25519PrivateKey):
        raise unusable_keys(folder, ValueError("log.pem and record.pem must hold Ed25519 keys"))
    if not isinstance(model, ec.EllipticCurvePrivateKey):
        raise unusable_keys(folder, ValueError("model.pem must hold a P-256 key"))
    try:
        master = MasterKey.load(folder / VAULT_KEY, secret)
        ring = KeyRing(origin, log, record, model, master)
        if (folder / "log.vkey").read_text().strip() != ring.log_vkey:
            raise ValueError("log.vkey is not the public half of log.pem")
    except (OSError, ValueError, KeyError, TypeError, FormatError) as error:
        raise unusable_keys(folder, error) from error
    return ring


def _load_pem(folder: Path, name: str, secret: bytes | None) -> object:
    try:
        data = (folder / f"{name}.pem").read_bytes()
        encrypted = b"ENCRYPTED" in data
        if encrypted and secret is None:
            raise locked_keys(folder)
        return load_pem_private_key(data, secret if encrypted else None)
    except ValueError as error:
        if b"BEGIN ENCRYPTED PRIVATE KEY" in data:
            raise wrong_passphrase(folder) from error
        raise unusable_keys(folder, error) from error
    except OSError as error:
        raise unusable_keys(folder, error) from error


def local_policy(home: Path, origin: str) -> TrustPolicy:
    """Trust in the user's own key for ``origin`` alone.

    Raises:
        KeyFileError: the home folder has no key for it.
    """
    path = _keys_folder(home, origin) / "log.vkey"
    try:
        return TrustPolicy.of(path.read_text().strip())
    except FileNotFoundError as error:
        raise KeyFileError(
            f"No key for {origin} is known here, so nothing says whose signature to trust.",
            next_step="Get the policy file from the key-holder, by another way than what is checked, and pass it: "
            "--policy trust.policy (or policy= in Python).",
            code="no-key",
        ) from error
    except (OSError, UnicodeDecodeError, FormatError) as error:
        raise unusable_keys(path.parent, error) from error
