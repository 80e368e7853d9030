"""The care of a key ring: its passphrase, its backup, and what it tells without its passphrase. Floor 0."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from rlhf_audit_nb.errors import FormatError, KeyFileError
from rlhf_audit_nb.trail.durable import sync_folder, write_durably
from rlhf_audit_nb.trail.encoding import decode_base64
from rlhf_audit_nb.trail.home import folder_name, keys_folder
from rlhf_audit_nb.trail.key_files import RESEALED, Change, RingFolder, read_retired
from rlhf_audit_nb.trail.keys import VAULT_KEY, KeyRing, load_keys, no_ring, open_ring, private_files, ring_not_written
from rlhf_audit_nb.trail.note import ECDSA, ED25519, MLDSA44, parse_vkey
from rlhf_audit_nb.trail.signers import HeldKey, kind_of, load_public, read_public, spki_of
from rlhf_audit_nb.trail.succession import Limit, known_limits
from rlhf_audit_nb.trail.vault_key import backup_master, reseal_master, restore_master, unusable_keys

__all__ = [
    "KeyInfo",
    "backup_keys",
    "changed_since_backup",
    "check_passphrase",
    "encrypt_keys",
    "key_id",
    "last_backup",
    "list_keys",
    "note_backup",
    "restore_keys",
]

_BACKUP_VERSION = 1
_BACKUP_SCRYPT = {"n": 1 << 16, "r": 8, "p": 1}
_BACKUP_CONTEXT = b"rlhf-audit/keys-backup/v1"
_SALT_BYTES, _NONCE_BYTES = 16, 12
_LEAST_PASSPHRASE = 8
_NAMES = {ED25519: "Ed25519", ECDSA: "ECDSA P-256", MLDSA44: "ML-DSA-44"}


# -- the passphrase -------------------------------------------------------------------------------------------------


def check_passphrase(text: str) -> bytes:
    """A new passphrase, if it can be one.

    Raises:
        KeyFileError: it is shorter than 8 characters.
    """
    if len(text) < _LEAST_PASSPHRASE:
        raise KeyFileError(
            f"The new passphrase has {len(text)} characters; it needs at least {_LEAST_PASSPHRASE}.",
            next_step="Choose a longer one, such as five random words.",
            code="passphrase",
        )
    return text.encode()


def encrypt_keys(home: Path, origin: str, new: str | None, passphrase: str | None = None) -> None:
    """Encrypt a ring's files with another passphrase: all of them or none, whenever the machine stops.

    Args:
        home: the folder of keys and last-seen heads.
        origin: the trail's name.
        new: the new passphrase; ``None`` takes it away.
        passphrase: the one until now; ``None`` takes ``RLHF_AUDIT_PASSPHRASE``.

    Raises:
        KeyFileError: as `load_keys`, or the new passphrase is too short; then nothing was changed.
    """
    sealing = None if new is None else check_passphrase(new)
    ring = load_keys(home, origin, passphrase)
    with ring.folder.locked(), ring.master.exclusive():
        _refuse_unfinished(ring.folder)
        ring = open_ring(ring.folder, origin, ring.secret)
        files = {**private_files(ring, sealing), VAULT_KEY: _resealed_master(ring, sealing)}
        ring.folder.stage(Change(kind=RESEALED, files=tuple(files)), files)
        ring.folder.settle()


def _resealed_master(ring: KeyRing, sealing: bytes | None) -> bytes:
    """The vault's key file under another passphrase, made on a copy."""
    with tempfile.TemporaryDirectory(dir=ring.folder.path.parent, prefix=".") as name:
        copy = Path(name) / VAULT_KEY
        write_durably(copy, ring.folder.read(VAULT_KEY))
        reseal_master(copy, ring.secret, sealing)
        return copy.read_bytes()


def _refuse_unfinished(folder: RingFolder) -> None:
    if folder.settle() is None and folder.pending() is not None:
        raise KeyFileError(
            f"A rotation of the keys in {folder.path} was cut short and is not finished.",
            next_step="Open the trail once to append (any run does), which finishes it; then try again.",
            code="rotating",
        )


# -- backups --------------------------------------------------------------------------------------------------------


def _stretched(passphrase: bytes, salt: bytes) -> AESGCM:
    return AESGCM(Scrypt(salt=salt, length=32, **_BACKUP_SCRYPT).derive(passphrase))


@contextmanager
def _reading(folder: RingFolder) -> Iterator[None]:
    try:
        with folder.locked():
            _refuse_unfinished(folder)
            yield
    except OSError as error:
        raise unusable_keys(folder.path, error) from error


def backup_keys(home: Path, origin: str, passphrase: str) -> bytes:
    """A whole ring as one encrypted file; what is encrypted in the ring stays so inside it.

    Args:
        home: the folder of keys and last-seen heads.
        origin: the trail's name.
        passphrase: of the backup, at least 8 characters; it may be another than the ring's.

    Raises:
        KeyFileError: there is no ring, it cannot be read, it is being changed, or the passphrase is too short.
    """
    secret = check_passphrase(passphrase)
    folder = RingFolder(keys_folder(home, origin))
    if not folder.exists:
        raise no_ring(folder.path, origin)
    with _reading(folder):
        files = {path.relative_to(folder.path).as_posix(): path.read_bytes() for path in _kept(folder.path)}
        files[VAULT_KEY] = backup_master(folder.path / VAULT_KEY)
    content = {"origin": origin, "files": {name: base64.b64encode(data).decode() for name, data in files.items()}}
    salt, nonce = secrets.token_bytes(_SALT_BYTES), secrets.token_bytes(_NONCE_BYTES)
    sealed = nonce + _stretched(secret, salt).encrypt(nonce, json.dumps(content).encode(), _BACKUP_CONTEXT)
    form = {
        "version": _BACKUP_VERSION,
        "scrypt": {"salt": base64.b64encode(salt).decode(), **_BACKUP_SCRYPT},
        "sealed": base64.b64encode(sealed).decode(),
    }
    return json.dumps(form).encode() + b"\n"


def note_backup(home: Path, origin: str) -> None:
    """Remember in ``HOME/backups/`` that a backup of the ring, as it is now, was written: when, and files' digests.

    Raises:
        KeyFileError: it cannot be written.
    """
    path = _noted_path(home, origin)
    noted = {"time": time.time(), "files": _digests(keys_folder(home, origin))}
    try:
        path.parent.mkdir(exist_ok=True, mode=0o700)
        write_durably(path, json.dumps(noted).encode() + b"\n")
    except OSError as error:
        raise unusable_keys(path.parent, error) from error


def last_backup(home: Path, origin: str) -> float | None:
    """When the last backup of the ring was made (POSIX seconds); ``None`` where none is known of.

    Raises:
        KeyFileError: what is remembered of it cannot be read.
    """
    noted = _noted(home, origin)
    return None if noted is None else float(noted["time"])


def changed_since_backup(home: Path, origin: str) -> tuple[str, ...]:
    """The files of the ring that are not as they were in its last backup; errors as `last_backup`."""
    before, now = (_noted(home, origin) or {"files": {}})["files"], _digests(keys_folder(home, origin))
    return tuple(sorted(name for name in {*before, *now} if before.get(name) != now.get(name)))


def _noted_path(home: Path, origin: str) -> Path:
    return home / "backups" / f"{folder_name(origin)}.json"


def _noted(home: Path, origin: str) -> dict[str, Any] | None:
    path = _noted_path(home, origin)
    try:
        noted: dict[str, Any] = json.loads(path.read_bytes())
        return {"time": float(noted["time"]), "files": dict(noted["files"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KeyFileError(
            f"{path}, which says when the keys were backed up, cannot be read.",
            next_step="Make a new backup: `rlhf-audit keys backup FILE`.",
            code="backup",
        ) from error


def _digests(ring: Path) -> dict[str, str]:
    paths = [*_kept(ring), ring / VAULT_KEY]
    return {path.relative_to(ring).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _kept(folder: Path) -> list[Path]:
    found = [path for path in (*folder.glob("[!.]*"), *folder.glob("retired/*.json")) if path.is_file()]
    return sorted(path for path in found if path.name != VAULT_KEY)


def _opened(data: bytes, passphrase: str) -> tuple[str, dict[str, bytes]]:
    damaged = "Name a file that `rlhf-audit keys backup` has written."
    try:
        form = json.loads(data)
        version = form["version"]
        salt, sealed = base64.b64decode(form["scrypt"]["salt"]), base64.b64decode(form["sealed"])
    except (ValueError, KeyError, TypeError) as error:
        raise KeyFileError("The file is not a backup of keys.", next_step=damaged, code="backup") from error
    if version != _BACKUP_VERSION:
        raise KeyFileError(f"The backup is of version {version!r}.", next_step=damaged, code="backup")
    try:
        plain = _stretched(passphrase.encode(), salt).decrypt(
            sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _BACKUP_CONTEXT
        )
    except InvalidTag as error:
        raise KeyFileError(
            "The passphrase does not open the backup, or the file was damaged.",
            next_step="Give the passphrase that the backup was made with; nothing was changed.",
            code="passphrase",
        ) from error
    content = json.loads(plain)
    return content["origin"], {name: decode_base64(text, name) for name, text in content["files"].items()}


def restore_keys(home: Path, data: bytes, passphrase: str) -> str:
    """Put a ring back from a backup: the whole of it, or what is missing of it; nothing that is there is replaced.

    Returns:
        The origin whose keys these are.

    Raises:
        KeyFileError: the file is no backup, the passphrase is wrong, the keys that are there are others (code
            ``keys-exist``), or the vault's key that is there is newer (``newer-key``); nothing was changed.
    """
    origin, files = _opened(data, passphrase)
    folder = RingFolder(keys_folder(home, origin))
    if folder.exists:
        _complete(folder, origin, files)
        return origin
    making = folder.path.with_name(f".{secrets.token_hex(8)}")
    try:
        folder.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        making.mkdir(mode=0o700)
        (making / "retired").mkdir(mode=0o700)
        for name, content in files.items():
            write_durably(making / name, content)
        making.rename(folder.path)
        sync_folder(folder.path.parent)
    except OSError as error:
        shutil.rmtree(making, ignore_errors=True)
        raise ring_not_written(origin, folder.path, error) from error
    return origin


def _complete(folder: RingFolder, origin: str, files: Mapping[str, bytes]) -> None:
    with _reading(folder):
        public = [name for name in files if name.endswith((".vkey", ".pub"))]
        others = [name for name in public if folder.has(name) and folder.read(name) != files[name]]
        if others:
            raise KeyFileError(
                f"The keys of {origin} in {folder.path} are others than the backup's ({', '.join(others)} differs).",
                next_step="They were rotated since, or are of another trail. Move the folder away to restore it anew.",
                code="keys-exist",
            )
        restore_master(folder.path / VAULT_KEY, files[VAULT_KEY])
        (folder.path / "retired").mkdir(exist_ok=True, mode=0o700)
        for name, content in files.items():
            if not folder.has(name):
                write_durably(folder.path / name, content)


# -- what is known without a passphrase -----------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyInfo:
    """What a ring tells of one key without its passphrase.

    Attributes:
        role: what it is for.
        kind: what kind of key; empty where the ring does not tell it.
        key: the public half as it stands in the trail's entries; empty where the ring does not tell it.
        where: ``file``, or the URI of its holder.
        encrypted: whether its file is.
        since: when it was made, as UTC text.
        status: ``in force``, ``retired`` (replaced) or ``revoked``.
        until: for a retired or revoked key, how many entries it counts for at most.
    """

    role: str
    kind: str
    key: str
    where: str
    encrypted: bool
    since: str
    status: str = "in force"
    until: int | None = None

    @property
    def id(self) -> str:
        """The short name by which a person tells keys apart."""
        return key_id(self.role, self.key)


def key_id(role: str, key: str) -> str:
    """A key's short name: its verifier key's id, or the beginning of its DSSE key id; ``-`` where it is not known."""
    if not key:
        return "-"
    if role in ("log", "mldsa"):
        return parse_vkey(key).key_id.hex()
    return hashlib.sha256(base64.b64decode(key)).hexdigest()[:16]


def _when(path: Path) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(path.stat().st_mtime))


def _kind(role: str, key: str) -> str:
    if not key:
        return ""
    if role in ("log", "mldsa"):
        return _NAMES[parse_vkey(key).algorithm]
    return kind_of(load_public(base64.b64decode(key)))


def _public_text(folder: RingFolder, role: str) -> str:
    if role in ("log", "mldsa"):
        return folder.read(f"{role}.vkey").decode().strip() if folder.has(f"{role}.vkey") else ""
    if not folder.has(f"{role}.pub"):
        return ""
    return base64.b64encode(spki_of(read_public(folder.read(f"{role}.pub")))).decode()


def list_keys(home: Path, origin: str) -> tuple[KeyInfo, ...]:
    """The keys of a ring, those that were replaced among them; needs no passphrase.

    Raises:
        KeyFileError: there is no ring, or a file of it cannot be read.
    """
    folder = RingFolder(keys_folder(home, origin))
    if not folder.exists:
        raise no_ring(folder.path, origin)
    try:
        found = [_info(folder, role) for role in ("log", "record", "model", "mldsa")]
        limits = known_limits(home, origin)
        retired = read_retired(folder.path / "retired")
        replaced = {item.successor: item.time for item in retired}
        infos = [item for item in found if item is not None]
        for old in retired:
            since = replaced.get(old.key, "")
            infos.append(
                KeyInfo(old.role, _kind(old.role, old.key), old.key, "", False, since, "retired", old.index + 1)
            )
    except (OSError, ValueError, FormatError) as error:
        raise unusable_keys(folder.path, error) from error
    return tuple(_revoked(item, limits.get(item.key)) for item in infos)


def _revoked(info: KeyInfo, limit: Limit | None) -> KeyInfo:
    if limit is None or not limit.revoked:
        return info
    return replace(info, status="revoked", until=limit.since)


def _info(folder: RingFolder, role: str) -> KeyInfo | None:
    held, file = folder.has(f"{role}.signer"), f"{role}.pem"
    if not held and not folder.has(file):
        return None
    key = _public_text(folder, role)
    if held:
        where, encrypted = HeldKey.decode(folder.read(f"{role}.signer")).uri, False
        return KeyInfo(role, _kind(role, key), key, where, encrypted, _when(folder.path / f"{role}.signer"))
    encrypted = b"ENCRYPTED" in folder.read(file)
    return KeyInfo(role, _kind(role, key), key, "file", encrypted, _when(folder.path / file))
