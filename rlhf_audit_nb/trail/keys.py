"""The keys of a trail, and whom to trust: key rings in the user's home folder, and trust policies. Floor 0.

A trail's keys lie outside its folder, in ``HOME/keys/ORIGIN/`` (the origin percent-encoded), all of mode 0600:

=============  ======================================================================================
``log.pem``    Ed25519, signs checkpoints (PKCS #8, encrypted where a passphrase was given)
``record.pem`` Ed25519, signs records
``model.pem``  P-256, signs model folders (OpenSSF model signing takes no Ed25519)
``vault.key``  the 32-byte master key of the vault: JSON, ``{"version":1,"key":...}``, or sealed by scrypt + AES-256-GCM
``log.vkey``   the public half of the log key as a C2SP verifier key, so that checking needs no passphrase
=============  ======================================================================================

A trust policy is the C2SP tlog-policy text: ``log VKEY [URL]``, ``witness NAME VKEY [URL]``,
``group NAME all|any|K MEMBER...``, and exactly one ``quorum NAME|none``; names are defined before they are used.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import platformdirs
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
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
from rlhf_audit_nb.trail.checkpoint import Checkpoint, parse_checkpoint
from rlhf_audit_nb.trail.note import (
    COSIGNATURE,
    ED25519,
    Signer,
    Verifier,
    check_name,
    decode_base64,
    format_vkey,
    parse_note,
    parse_vkey,
    verify_note,
)

__all__ = [
    "CheckedCheckpoint",
    "Group",
    "KeyRing",
    "TrustPolicy",
    "create_keys",
    "folder_name",
    "have_keys",
    "home_folder",
    "load_keys",
    "local_policy",
    "sync_folder",
    "write_durably",
]

_SCRYPT = {"n": 1 << 15, "r": 8, "p": 1}
_MASTER_BYTES = 32
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


def write_durably(path: Path, data: bytes) -> None:
    """Replace ``path`` (mode 0600) so that after a crash it holds either the old bytes or the new."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a folder's names durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class KeyRing:
    """The private keys that act for one origin."""

    origin: str
    log: Ed25519PrivateKey = field(repr=False)
    record: Ed25519PrivateKey = field(repr=False)
    model: ec.EllipticCurvePrivateKey = field(repr=False)
    master: bytes = field(repr=False)

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


def _seal_master(master: bytes, passphrase: bytes | None) -> bytes:
    fields: dict[str, object] = {"version": 1}
    if passphrase is None:
        fields["key"] = base64.b64encode(master).decode()
    else:
        salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
        sealed = AESGCM(_stretch(passphrase, salt)).encrypt(nonce, master, b"rlhf-audit/master/v1")
        fields["scrypt"] = {"salt": base64.b64encode(salt).decode(), **_SCRYPT}
        fields["sealed"] = base64.b64encode(nonce + sealed).decode()
    return json.dumps(fields).encode() + b"\n"


def _stretch(passphrase: bytes, salt: bytes) -> bytes:
    return Scrypt(salt=salt, length=32, **_SCRYPT).derive(passphrase)


def _open_master(path: Path, passphrase: bytes | None) -> bytes:
    fields = json.loads(path.read_bytes())
    if "key" in fields:
        master = decode_base64(fields["key"], "master key")
    else:
        if passphrase is None:
            raise _locked(path.parent)
        raw = decode_base64(fields["sealed"], "master key")
        salt = decode_base64(fields["scrypt"]["salt"], "salt of the master key")
        try:
            master = AESGCM(_stretch(passphrase, salt)).decrypt(raw[:12], raw[12:], b"rlhf-audit/master/v1")
        except InvalidTag as error:
            raise _wrong_passphrase(path.parent) from error
    if len(master) != _MASTER_BYTES:
        raise ValueError("the master key is not 32 bytes")
    return master


def _locked(folder: Path) -> KeyFileError:
    return KeyFileError(
        f"The keys in {folder} are encrypted and no passphrase was given.",
        next_step=f"Set {ENV_PASSPHRASE}, or pass passphrase=.",
        code="passphrase",
    )


def _wrong_passphrase(folder: Path) -> KeyFileError:
    return KeyFileError(
        f"The passphrase does not open the keys in {folder}.",
        next_step=f"Check {ENV_PASSPHRASE} or passphrase=; nothing was changed.",
        code="passphrase",
    )


def _unusable(folder: Path, error: Exception) -> KeyFileError:
    return KeyFileError(
        f"The keys in {folder} cannot be used: {error}.",
        next_step="Restore the folder from a backup, or point RLHF_AUDIT_HOME at the one that has the keys.",
    )


def create_keys(home: Path, origin: str, passphrase: str | None = None) -> KeyRing:
    """Make the keys of a new origin; they are on the disk, all or none, before this returns.

    Raises:
        KeyFileError: the folder cannot be written, or the origin has keys already.
    """
    ring = KeyRing(
        origin,
        Ed25519PrivateKey.generate(),
        Ed25519PrivateKey.generate(),
        ec.generate_private_key(ec.SECP256R1()),
        secrets.token_bytes(_MASTER_BYTES),
    )
    secret = _passphrase(passphrase)
    folder = _keys_folder(home, origin)
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
    write_durably(folder / "vault.key", _seal_master(ring.master, secret))
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
        raise _unusable(folder, ValueError("log.pem and record.pem must hold Ed25519 keys"))
    if not isinstance(model, ec.EllipticCurvePrivateKey):
        raise _unusable(folder, ValueError("model.pem must hold a P-256 key"))
    try:
        master = _open_master(folder / "vault.key", secret)
        ring = KeyRing(origin, log, record, model, master)
        if (folder / "log.vkey").read_text().strip() != ring.log_vkey:
            raise ValueError("log.vkey is not the public half of log.pem")
    except (OSError, ValueError, KeyError, TypeError, FormatError) as error:
        raise _unusable(folder, error) from error
    return ring


def _load_pem(folder: Path, name: str, secret: bytes | None) -> object:
    try:
        data = (folder / f"{name}.pem").read_bytes()
        encrypted = b"ENCRYPTED" in data
        if encrypted and secret is None:
            raise _locked(folder)
        return load_pem_private_key(data, secret if encrypted else None)
    except ValueError as error:
        if b"BEGIN ENCRYPTED PRIVATE KEY" in data:
            raise _wrong_passphrase(folder) from error
        raise _unusable(folder, error) from error
    except OSError as error:
        raise _unusable(folder, error) from error


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
        raise _unusable(path.parent, error) from error


@dataclass(frozen=True)
class Group:
    """A threshold over witnesses and groups: at least ``threshold`` of ``members`` hold."""

    name: str
    threshold: int
    members: tuple[str, ...]
    keyword: str


@dataclass(frozen=True)
class CheckedCheckpoint:
    """A checkpoint whose signatures hold under a policy."""

    checkpoint: Checkpoint
    signers: tuple[str, ...]
    cosigned: bool


@dataclass(frozen=True)
class TrustPolicy:
    """Whose signatures count (C2SP tlog-policy).

    Attributes:
        logs: verifier keys of logs, each name being the origin it signs for.
        witnesses: verifier keys of witnesses by the policy's own names for them.
        groups: thresholds, each defined before it is used.
        quorum: the witness or group that must hold for a checkpoint to count as cosigned, or ``none``.
    """

    logs: tuple[Verifier, ...]
    witnesses: Mapping[str, Verifier] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)
    quorum: str = "none"
    urls: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, log_vkey: str) -> TrustPolicy:
        """Trust in one log key, without witnesses."""
        verifier = parse_vkey(log_vkey)
        if verifier.algorithm != ED25519:
            raise FormatError(f"The key {verifier.name} is a witness's, not a log's.", code="key-type")
        return cls((verifier,))

    @classmethod
    def parse(cls, text: str | bytes) -> TrustPolicy:
        """The policy in ``text``, strictly.

        Raises:
            FormatError: naming the line.
        """
        return _PolicyParser().parse(text)

    @property
    def log_keys(self) -> tuple[str, ...]:
        """The logs' verifier keys as text."""
        return tuple(format_vkey(verifier) for verifier in self.logs)

    def format(self) -> str:
        """The policy as text; parsing it gives an equal policy."""
        lines = [self._line("log", key) for key in self.log_keys]
        lines += [self._line(f"witness {name}", format_vkey(key)) for name, key in self.witnesses.items()]
        lines += [f"group {group.name} {group.keyword} {' '.join(group.members)}" for group in self.groups.values()]
        return "\n".join([*lines, f"quorum {self.quorum}"]) + "\n"

    def _line(self, head: str, vkey: str) -> str:
        url = self.urls.get(vkey)
        return f"{head} {vkey}" + (f" {url}" if url else "")

    def check(self, note: str | bytes, origin: str | None = None) -> CheckedCheckpoint:
        """The checkpoint in a signed note, its signatures verified.

        Raises:
            FormatError: ``untrusted-log`` where the policy has no key for its origin, ``origin`` where it is not the
                expected one, ``signature`` or ``unsigned`` where the signatures do not hold, else a format's code.
        """
        parsed = parse_note(note)
        checkpoint = parse_checkpoint(parsed.text)
        if origin is not None and checkpoint.origin != origin:
            raise FormatError(f"The checkpoint is of {checkpoint.origin}, not of {origin}.", code="origin")
        logs = [key for key in self.logs if key.name == checkpoint.origin]
        if not logs:
            raise FormatError(f"The policy trusts no key for {checkpoint.origin}.", code="untrusted-log")
        verified = verify_note(parsed, [*logs, *self.witnesses.values()])
        keys = [item.verifier for item in verified]
        if not any(key in logs for key in keys):
            raise FormatError(f"The checkpoint is not signed by {checkpoint.origin}'s key.", code="unsigned")
        held = {name for name, key in self.witnesses.items() if key in keys}
        signers = tuple(format_vkey(key) for key in keys)
        return CheckedCheckpoint(checkpoint, signers, self.quorum != "none" and self._holds(self.quorum, held))

    def _holds(self, name: str, held: set[str]) -> bool:
        group = self.groups.get(name)
        if group is None:
            return name in held
        return sum(self._holds(member, held) for member in group.members) >= group.threshold


class _PolicyParser:
    """One pass over the lines of a policy."""

    def __init__(self) -> None:
        self._logs: list[Verifier] = []
        self._witnesses: dict[str, Verifier] = {}
        self._groups: dict[str, Group] = {}
        self._quorum: str | None = None
        self._urls: dict[str, str] = {}
        self._members: set[str] = set()

    def parse(self, text: str | bytes) -> TrustPolicy:
        raw = text.encode() if isinstance(text, str) else text
        if re.search(rb"[^\x09\x0a\x20-\x7e\x80-\xff]", raw):
            raise FormatError("A trust policy holds a control character.", code="policy")
        try:
            lines = raw.decode().split("\n")
        except UnicodeDecodeError as error:
            raise FormatError(f"A trust policy is not UTF-8: {error}.", code="policy") from error
        for number, line in enumerate(lines, 1):
            words = re.split("[ \t]+", line.strip(" \t"))
            if words == [""] or words[0].startswith("#"):
                continue
            try:
                self._line(words)
            except FormatError as error:
                raise FormatError(f"Line {number} of the policy: {error.message}", code="policy") from error
        if self._quorum is None or not self._logs:
            raise FormatError("A trust policy needs a log line and exactly one quorum line.", code="policy")
        return TrustPolicy(tuple(self._logs), self._witnesses, self._groups, self._quorum, self._urls)

    def _line(self, words: list[str]) -> None:
        rules: Mapping[str, tuple[int, int]] = {
            "log": (2, 3),
            "witness": (3, 4),
            "group": (4, 1 << 16),
            "quorum": (2, 2),
        }
        least, most = rules.get(words[0], (0, 0))
        if not least <= len(words) <= most:
            raise FormatError(f"{' '.join(words)[:60]!r} is not a log, witness, group or quorum line.")
        {"log": self._log, "witness": self._witness, "group": self._group, "quorum": self._set_quorum}[words[0]](words)

    def _key(self, text: str, algorithm: int, url: Iterable[str]) -> Verifier:
        verifier = parse_vkey(text)
        if verifier.algorithm != algorithm:
            raise FormatError(f"the key {verifier.name} is of the wrong type {verifier.algorithm:#04x} for its line.")
        if any(verifier.public == other.public for other in (*self._logs, *self._witnesses.values())):
            raise FormatError(f"the key {verifier.name} stands twice.")
        self._urls.update((text, word) for word in url)
        return verifier

    def _new_name(self, name: str) -> str:
        if name == "none" or name in self._witnesses or name in self._groups:
            raise FormatError(f"the name {name!r} is taken.")
        return name

    def _log(self, words: list[str]) -> None:
        self._logs.append(self._key(words[1], ED25519, words[2:]))

    def _witness(self, words: list[str]) -> None:
        name = self._new_name(words[1])
        self._witnesses[name] = self._key(words[2], COSIGNATURE, words[3:])

    def _group(self, words: list[str]) -> None:
        name, keyword, members = self._new_name(words[1]), words[2], words[3:]
        for member in members:
            if member not in self._witnesses and member not in self._groups:
                raise FormatError(f"the member {member!r} is not defined before it is used.")
            if member in self._members:
                raise FormatError(f"{member!r} is a member twice.")
            self._members.add(member)
        self._groups[name] = Group(name, self._threshold(keyword, len(members)), tuple(members), keyword)

    @staticmethod
    def _threshold(keyword: str, count: int) -> int:
        if keyword in ("all", "any"):
            return count if keyword == "all" else 1
        if not re.fullmatch("[1-9][0-9]{0,4}", keyword) or int(keyword) > count:
            raise FormatError(f"the threshold {keyword!r} is not all, any or a number from 1 to {count}.")
        return int(keyword)

    def _set_quorum(self, words: list[str]) -> None:
        if self._quorum is not None:
            raise FormatError("a second quorum line.")
        if words[1] != "none" and words[1] not in self._witnesses and words[1] not in self._groups:
            raise FormatError(f"the quorum {words[1]!r} is not defined before it is used.")
        self._quorum = words[1]
