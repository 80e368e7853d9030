"""The keys of a trail: key rings in the user's home folder. Floor 0.

A trail's keys lie outside its folder, in ``HOME/keys/ORIGIN/`` (the origin percent-encoded), all of mode 0600:

=================  ==================================================================================
``log.pem``        Ed25519, signs checkpoints (PKCS #8, encrypted where a passphrase was given)
``record.pem``     Ed25519, signs records
``model.pem``      P-256, signs model folders (OpenSSF model signing takes no Ed25519)
``mldsa.pem``      ML-DSA-44, made on demand: a second signature on what is meant to last
``ROLE.signer``    in the place of ``log.pem`` or ``record.pem``: where the private half is held (`signers`)
``vault.key``      the master key of the vault, in its newest generation (`vault_key`)
``log.vkey`` …     the public halves (``mldsa.vkey``, ``record.pub``, ``model.pub``): checking needs no passphrase
``retired/``       the public halves of keys that were replaced
``next…``          a change that is under way (`key_files`)
=================  ==================================================================================

Whose signatures count is said by a trust policy (`policy`); the user's own keys are those that are trusted where none
is named. Keys change by `rotation`; `key_care` encrypts and backs up a ring.
"""

from __future__ import annotations

import base64
import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
)

from rlhf_audit_nb.config import ENV_PASSPHRASE
from rlhf_audit_nb.errors import FormatError, KeyFileError
from rlhf_audit_nb.trail.cosignature import CosignerMLDSA44
from rlhf_audit_nb.trail.durable import sync_folder, write_durably
from rlhf_audit_nb.trail.home import folder_name, home_folder, keys_folder, retired_folder
from rlhf_audit_nb.trail.key_files import Change, RingFolder, read_retired
from rlhf_audit_nb.trail.note import NoteSigner, Signer, format_vkey, parse_note, parse_vkey
from rlhf_audit_nb.trail.policy import TrustPolicy
from rlhf_audit_nb.trail.signers import FileKey, HeldKey, LogSigner, SigningKey
from rlhf_audit_nb.trail.vault_key import MasterKey, locked_keys, unusable_keys, wrong_passphrase

__all__ = [
    "VAULT_KEY",
    "KeyRing",
    "create_keys",
    "encode_private",
    "folder_name",
    "have_keys",
    "home_folder",
    "load_keys",
    "local_policy",
    "log_signer",
    "no_ring",
    "open_ring",
    "private_files",
    "public_files",
    "ring_not_written",
    "ring_origins",
    "settle_ring",
]

VAULT_KEY = "vault.key"


@dataclass
class KeyRing:
    """The private keys that act for one origin; a rotation changes them in place.

    Attributes:
        origin: the trail's name.
        log: signs checkpoints, through `signer`.
        record: signs records.
        model: signs model folders; always a key in a file.
        master: the vault's master key.
        mldsa: the second signature on what is meant to last, ``None`` where the ring has none.
        folder: the ring's files.
        secret: what they are encrypted with, ``None`` where they are not.
    """

    origin: str
    log: SigningKey = field(repr=False)
    record: SigningKey = field(repr=False)
    model: ec.EllipticCurvePrivateKey = field(repr=False)
    master: MasterKey = field(repr=False)
    folder: RingFolder = field(repr=False)
    mldsa: MLDSA44PrivateKey | None = field(default=None, repr=False)
    secret: bytes | None = field(default=None, repr=False)

    @property
    def signer(self) -> NoteSigner:
        """What signs checkpoints."""
        return log_signer(self.origin, self.log)

    @property
    def log_vkey(self) -> str:
        """The log's verifier key."""
        return format_vkey(self.signer.verifier())

    @property
    def record_spki(self) -> bytes:
        """The record key's public half, DER SubjectPublicKeyInfo."""
        return self.record.spki

    @property
    def model_spki(self) -> bytes:
        """The model key's public half, DER SubjectPublicKeyInfo."""
        return FileKey(self.model).spki

    @property
    def mldsa_vkey(self) -> str | None:
        """The verifier key (type 0x06) of the second signature, under the log's own name."""
        return None if self.mldsa is None else format_vkey(CosignerMLDSA44(self.origin, self.mldsa).verifier())

    @property
    def record_signers(self) -> tuple[SigningKey, ...]:
        """What signs a record: the record key, and the ML-DSA-44 key where the ring has one."""
        return (self.record,) if self.mldsa is None else (self.record, FileKey(self.mldsa))

    def public(self, role: str) -> str | None:
        """A key's public half as it stands in the trail's entries; ``None`` where the ring has no such key."""
        if role in ("log", "mldsa"):
            return self.log_vkey if role == "log" else self.mldsa_vkey
        spki = self.record_spki if role == "record" else self.model_spki
        return base64.b64encode(spki).decode()

    def endorse(self, note: str, when: int | None = None) -> str:
        """A signed checkpoint with the log's own ML-DSA-44 line added, where the ring has that key.

        It is for checkpoints that are meant to last: of a record, of what is published or anchored. A note that has
        the line already is returned as it is.

        Args:
            note: a checkpoint, signed.
            when: POSIX seconds that the line says; ``None`` takes the time now.

        Raises:
            FormatError: the note is no checkpoint.
        """
        if self.mldsa is None:
            return note
        cosigner, parsed = CosignerMLDSA44(self.origin, self.mldsa), parse_note(note)
        ident = (self.origin, cosigner.verifier().key_id)
        if any((line.name, line.key_id) == ident for line in parsed.signatures):
            return note
        return parsed.plus(cosigner.cosign(parsed, int(time.time()) if when is None else when)).format()


def log_signer(origin: str, key: SigningKey) -> NoteSigner:
    """What signs checkpoints with ``key``."""
    if isinstance(key, FileKey) and isinstance(key.key, Ed25519PrivateKey):
        return Signer(origin, key.key)
    return LogSigner(origin, key)


def _passphrase(given: str | None) -> bytes | None:
    chosen = given if given is not None else os.environ.get(ENV_PASSPHRASE)
    return chosen.encode() if chosen else None


def have_keys(home: Path, origin: str) -> bool:
    """Whether the home folder holds keys for ``origin``."""
    return keys_folder(home, origin).is_dir()


def ring_origins(home: Path) -> tuple[str, ...]:
    """The origins that the home folder holds keys for."""
    return tuple(sorted(unquote(path.name) for path in (home / "keys").glob("[!.]*") if path.is_dir()))


# -- making and loading ---------------------------------------------------------------------------------------------


def create_keys(
    home: Path,
    origin: str,
    passphrase: str | None = None,
    *,
    log: HeldKey | None = None,
    record: HeldKey | None = None,
) -> KeyRing:
    """Make the keys of a new origin; they are on the disk, all or none, before this returns.

    Args:
        home: the folder of keys and last-seen heads.
        origin: the trail's name.
        passphrase: what the files are encrypted with; ``None`` takes ``RLHF_AUDIT_PASSPHRASE``, else they are not.
        log: a key that is held elsewhere, in the place of a new ``log.pem``.
        record: likewise for records.

    Raises:
        KeyFileError: the folder cannot be written, or the origin has keys already.
    """
    secret = _passphrase(passphrase)
    folder = keys_folder(home, origin)
    ring = KeyRing(
        origin,
        log or FileKey(Ed25519PrivateKey.generate()),
        record or FileKey(Ed25519PrivateKey.generate()),
        ec.generate_private_key(ec.SECP256R1()),
        MasterKey.create(folder / VAULT_KEY, secret),
        RingFolder(folder),
        secret=secret,
    )
    making = folder.with_name(f".{secrets.token_hex(8)}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        making.mkdir(mode=0o700)
        for name, data in _all_files(ring).items():
            write_durably(making / name, data)
        making.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(making, ignore_errors=True)
        raise ring_not_written(origin, folder, error) from error
    return ring


def no_ring(folder: Path, origin: str) -> KeyFileError:
    """There are no keys of that origin."""
    return KeyFileError(
        f"There are no keys for {origin} in {folder.parent}.",
        next_step="Set RLHF_AUDIT_HOME to the folder that holds them, or read the trail without appending to it.",
        code="no-key",
    )


def ring_not_written(origin: str, folder: Path, error: OSError) -> KeyFileError:
    """A new ring could not be put in its place."""
    if folder.is_dir():
        return KeyFileError(
            f"There are keys for {origin} already, in {folder}.",
            next_step="Use them, or choose another origin; `rlhf-audit keys rotate` makes new ones for a trail.",
            code="keys-exist",
        )
    return KeyFileError(
        f"The keys of {origin} cannot be written to {folder}: {error.strerror or error}.",
        next_step="Make the folder writable, free some space, or set RLHF_AUDIT_HOME to another one.",
    )


def encode_private(key: object, secret: bytes | None) -> bytes:
    """A private key as it stands in its file: PKCS #8, PEM, encrypted where there is a passphrase."""
    sealing: KeySerializationEncryption = BestAvailableEncryption(secret) if secret else NoEncryption()
    assert isinstance(key, Ed25519PrivateKey | ec.EllipticCurvePrivateKey | MLDSA44PrivateKey)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, sealing)


def private_files(ring: KeyRing, secret: bytes | None) -> dict[str, bytes]:
    """The files of a ring's private keys, those that are here, encrypted with ``secret``."""
    keys: dict[str, object] = {"model": ring.model}
    for role, key in (("log", ring.log), ("record", ring.record)):
        if isinstance(key, FileKey):
            keys[role] = key.key
    if ring.mldsa is not None:
        keys["mldsa"] = ring.mldsa
    return {f"{role}.pem": encode_private(key, secret) for role, key in keys.items()}


def public_files(role: str, key: str) -> dict[str, bytes]:
    """The file of a key's public half, given as it stands in the trail's entries."""
    if role in ("log", "mldsa"):
        return {f"{role}.vkey": key.encode() + b"\n"}
    public = load_der_public_key(base64.b64decode(key))
    return {f"{role}.pub": public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)}


def _all_files(ring: KeyRing) -> dict[str, bytes]:
    files = private_files(ring, ring.secret)
    for role, key in (("log", ring.log), ("record", ring.record)):
        if isinstance(key, HeldKey):
            files[f"{role}.signer"] = key.encode()
    for role in ("log", "record", "model", "mldsa"):
        public = ring.public(role) if role != "mldsa" or ring.mldsa is not None else None
        if public is not None:
            files.update(public_files(role, public))
    return {**files, VAULT_KEY: ring.master.encode()}


def load_keys(
    home: Path, origin: str, passphrase: str | None = None, *, named: Callable[[str], bool] | None = None
) -> KeyRing:
    """The keys of ``origin``. A change of them that a crash has cut short is finished or dropped first.

    Args:
        home: the folder of keys and last-seen heads.
        origin: the trail's name.
        passphrase: what they are encrypted with; ``None`` takes ``RLHF_AUDIT_PASSPHRASE``.
        named: whether the trail names a key as one that took another's place; ``None`` where the trail is not at
            hand, which leaves a rotation that is under way to who has it.

    Raises:
        KeyFileError: there are none, they are encrypted, the passphrase is wrong, or a file is damaged.
    """
    folder = RingFolder(keys_folder(home, origin))
    if not folder.exists:
        raise no_ring(folder.path, origin)
    settle_ring(folder, named)
    return open_ring(folder, origin, _passphrase(passphrase))


def settle_ring(folder: RingFolder, named: Callable[[str], bool] | None = None) -> None:
    """Finish or drop a change that a crash has cut short; arguments as `load_keys`."""
    if not folder.is_changing:
        return

    def counts(change: Change) -> bool | None:
        return None if named is None else named(change.new or "")

    with folder.locked():
        folder.settle(counts)


def open_ring(folder: RingFolder, origin: str, secret: bytes | None) -> KeyRing:
    """The keys in a ring's folder, which nobody changes meanwhile; errors as `load_keys`."""
    log, record = (_load_signing(folder, role, secret) for role in ("log", "record"))
    model = _load_pem(folder, "model", secret)
    if b"ENCRYPTED" not in folder.read("model.pem"):
        secret = None  # a passphrase that is not this ring's must not encrypt what is written into it later
    mldsa = _load_pem(folder, "mldsa", secret) if folder.has("mldsa.pem") else None
    if not isinstance(model, ec.EllipticCurvePrivateKey):
        raise unusable_keys(folder.path, ValueError("model.pem must hold a P-256 key"))
    if mldsa is not None and not isinstance(mldsa, MLDSA44PrivateKey):
        raise unusable_keys(folder.path, ValueError("mldsa.pem must hold an ML-DSA-44 key"))
    try:
        master = MasterKey.load(folder.path / VAULT_KEY, secret)
        ring = KeyRing(origin, log, record, model, master, folder, mldsa, secret)
        _check_public(ring)
    except (OSError, ValueError, KeyError, TypeError, FormatError) as error:
        raise unusable_keys(folder.path, error) from error
    return ring


def _check_public(ring: KeyRing) -> None:
    for role in ("log", "record", "model", *(["mldsa"] if ring.mldsa is not None else [])):
        for name, data in public_files(role, ring.public(role) or "").items():
            # Rings of earlier versions have the log's public half alone.
            if (role == "log" or ring.folder.has(name)) and ring.folder.read(name).strip() != data.strip():
                raise ValueError(f"{name} is not the public half of the {role} key")


def _load_signing(folder: RingFolder, role: str, secret: bytes | None) -> SigningKey:
    if folder.has(f"{role}.signer"):
        try:
            held = HeldKey.decode(folder.read(f"{role}.signer"))
        except (OSError, FormatError) as error:
            raise unusable_keys(folder.path, error) from error
        return held
    key = _load_pem(folder, role, secret)
    if not isinstance(key, Ed25519PrivateKey):
        raise unusable_keys(folder.path, ValueError(f"{role}.pem must hold an Ed25519 key"))
    return FileKey(key)


def _load_pem(folder: RingFolder, name: str, secret: bytes | None) -> object:
    try:
        data = folder.read(f"{name}.pem")
        encrypted = b"ENCRYPTED" in data
        if encrypted and secret is None:
            raise locked_keys(folder.path)
        return load_pem_private_key(data, secret if encrypted else None)
    except ValueError as error:
        if b"BEGIN ENCRYPTED PRIVATE KEY" in data:
            raise wrong_passphrase(folder.path) from error
        raise unusable_keys(folder.path, error) from error
    except OSError as error:
        raise unusable_keys(folder.path, error) from error


def local_policy(home: Path, origin: str) -> TrustPolicy:
    """Trust in the user's own keys for ``origin`` alone: those in force, and those they replaced.

    How far those count that were replaced or revoked is known apart from the policy (`succession.known_limits`).

    Raises:
        KeyFileError: the home folder has no key for it.
    """
    folder = RingFolder(keys_folder(home, origin))
    try:
        keys = [folder.read("log.vkey").decode().strip()]
        keys += [folder.read("mldsa.vkey").decode().strip()] if folder.has("mldsa.vkey") else []
        keys += [item.key for item in read_retired(retired_folder(home, origin)) if item.role in ("log", "mldsa")]
        return TrustPolicy(tuple(parse_vkey(key) for key in dict.fromkeys(keys)))
    except FileNotFoundError as error:
        raise KeyFileError(
            f"No key for {origin} is known here, so nothing says whose signature to trust.",
            next_step="Get the policy file from the key-holder, by another way than what is checked, and pass it: "
            "--policy trust.policy (or policy= in Python).",
            code="no-key",
        ) from error
    except (OSError, UnicodeDecodeError, FormatError) as error:
        raise unusable_keys(folder.path, error) from error
