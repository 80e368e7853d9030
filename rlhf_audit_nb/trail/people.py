"""The keys of people: a person signs with a key of their own, apart from every trail's keys. Floor 0.

A person's key lies in ``HOME/people/NAME/`` (the name percent-encoded), all files of mode 0600:

=================  ===========================================================================================
``person.pem``     ECDSA over P-256 or Ed25519 (PKCS #8, encrypted unless it was asked for otherwise)
``person.signer``  in its place: where the private half is held, an HSM or a key service (`signers.HeldKey`)
``person.pub``     the public half, PEM: what others put into their policy
=================  ===========================================================================================

Whoever trains holds the trail's keys, so none of them can be a person's: `refuse_trail_key` says so. That a key is a
person's is nothing that a file can prove: a policy says it, by whoever was handed the public half.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from rlhf_audit_nb.config import ENV_PERSON_PASSPHRASE
from rlhf_audit_nb.errors import FormatError, KeyFileError
from rlhf_audit_nb.trail.durable import sync_folder, write_durably
from rlhf_audit_nb.trail.key_care import check_passphrase, list_keys
from rlhf_audit_nb.trail.keys import encode_private, ring_origins
from rlhf_audit_nb.trail.signers import (
    FileKey,
    HeldKey,
    PublicKey,
    SigningKey,
    kind_of,
    load_public,
    read_public,
    spki_of,
)
from rlhf_audit_nb.trail.vkey import ECDSA, ED25519, parse_vkey

__all__ = [
    "PERSON_KINDS",
    "ChosenKey",
    "PersonKey",
    "choose_person_key",
    "create_person_key",
    "key_from_file",
    "load_person_key",
    "pem_of",
    "people_here",
    "person_name",
    "refuse_trail_key",
    "spki_of_vkey",
]

PERSON_KINDS = ("p256", "ed25519")

_PEM, _SIGNER, _PUBLIC = "person.pem", "person.signer", "person.pub"
_LONGEST_NAME = 200
_NAME_BYTES = 240
_INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


@dataclass(frozen=True)
class PersonKey:
    """What is known of a person's key without its passphrase.

    Attributes:
        name: whose it is.
        public: the public half.
        where: ``file``, or the URI of its holder.
        encrypted: whether its file is.
        folder: where its files lie.
    """

    name: str
    public: PublicKey = field(repr=False)
    where: str
    encrypted: bool
    folder: Path

    @property
    def id(self) -> str:
        """SHA-256 (hex) of its DER SubjectPublicKeyInfo: the id by which a policy and a signature name it."""
        return hashlib.sha256(spki_of(self.public)).hexdigest()

    @property
    def kind(self) -> str:
        """What kind of key it is, for a person."""
        return kind_of(self.public)

    @property
    def pem(self) -> str:
        """The public half as others are given it."""
        return pem_of(spki_of(self.public))


def pem_of(spki: bytes) -> str:
    """A public key in PEM form."""
    return load_public(spki).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def person_name(name: str) -> str:
    """A person's printed name, if it can be one: one line that shows what it is.

    Raises:
        KeyFileError: it is empty, too long, or holds characters that cannot be seen.
    """
    clean = " ".join(name.split())
    if not clean or len(clean) > _LONGEST_NAME or len(quote(clean, safe="")) > _NAME_BYTES or _INVISIBLE.search(name):
        raise KeyFileError(
            f"{name[:60]!r} cannot be a person's name: it is empty, too long, or holds characters that cannot be seen.",
            next_step="Write the name as it is to be printed.",
            code="name",
        )
    return clean


def _folder(home: Path, name: str) -> Path:
    encoded = quote(person_name(name), safe=" ")
    # A name that begins with a dot would be a hidden file, or a folder above.
    return home / "people" / (encoded.replace(".", "%2E", 1) if encoded.startswith(".") else encoded)


def create_person_key(
    home: Path, name: str, passphrase: str | None, *, kind: str = "p256", held: HeldKey | None = None
) -> PersonKey:
    """Make a person's key, or write down where it is held; the files are on the disk, all or none.

    Args:
        home: the folder of keys.
        name: the person's printed name.
        passphrase: what the private half is encrypted with, at least 8 characters; ``None`` leaves it as it is, which
            the person must have asked for.
        kind: ``p256`` or ``ed25519``; of a key that is made here.
        held: a key that an HSM or a key service holds.

    Raises:
        KeyFileError: the name or passphrase cannot be one, the person has a key here, the held key is one of a trail's
            or of another kind, or the folder cannot be written.
    """
    folder = _folder(home, name)
    if held is not None:
        _check_kind(held.public)
        refuse_trail_key(home, held.spki)
        key: SigningKey = held
        files = {_SIGNER: held.encode()}
    else:
        made = Ed25519PrivateKey.generate() if kind == "ed25519" else ec.generate_private_key(ec.SECP256R1())
        secret = None if passphrase is None else check_passphrase(passphrase)
        key, files = FileKey(made), {_PEM: encode_private(made, secret)}
    files[_PUBLIC] = pem_of(key.spki).encode()
    _install(folder, files, person_name(name))
    return _read(folder)


def _install(folder: Path, files: dict[str, bytes], name: str) -> None:
    making = folder.with_name(f".{secrets.token_hex(8)}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        making.mkdir(mode=0o700)
        for file, data in files.items():
            write_durably(making / file, data)
        making.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(making, ignore_errors=True)
        if folder.is_dir():
            raise KeyFileError(
                f"There is a key of {name} already, in {folder}.",
                next_step="Use it. To have a new one, move that folder away, keep it, and hand out the new public key.",
                code="keys-exist",
            ) from error
        raise KeyFileError(
            f"The key of {name} cannot be written to {folder}: {error.strerror or error}.",
            next_step="Make the folder writable, or set RLHF_AUDIT_HOME to another one.",
        ) from error


def _unreadable(path: Path, error: Exception) -> KeyFileError:
    return KeyFileError(
        f"The key in {path} cannot be read: {getattr(error, 'message', None) or error}.",
        next_step="Restore the folder from a copy.",
    )


def _read(folder: Path) -> PersonKey:
    try:
        public = read_public((folder / _PUBLIC).read_bytes())
        if (folder / _SIGNER).is_file():
            where, encrypted = HeldKey.decode((folder / _SIGNER).read_bytes()).uri, False
        else:
            where, encrypted = "file", b"ENCRYPTED" in (folder / _PEM).read_bytes()
    except (OSError, FormatError) as error:
        raise _unreadable(folder, error) from error
    return PersonKey(unquote(folder.name), public, where, encrypted, folder)


def people_here(home: Path) -> tuple[PersonKey, ...]:
    """Whose keys lie in the home folder; needs no passphrase.

    Raises:
        KeyFileError: one of them cannot be read.
    """
    return tuple(_read(path) for path in sorted((home / "people").glob("[!.]*")) if path.is_dir())


def load_person_key(home: Path, name: str, passphrase: str | None = None) -> tuple[PersonKey, SigningKey]:
    """A person's key, to sign with.

    Args:
        home: the folder of keys.
        name: the person's name.
        passphrase: of the key; ``None`` takes ``RLHF_AUDIT_PERSON_PASSPHRASE``.

    Raises:
        KeyFileError: there is none, it is encrypted and no passphrase was given (``passphrase``), or it is damaged.
    """
    folder = _folder(home, name)
    if not folder.is_dir():
        raise _no_key(home, person_name(name))
    person = _read(folder)
    if person.where != "file":
        try:
            held = HeldKey.decode((folder / _SIGNER).read_bytes())
        except (OSError, FormatError) as error:
            raise _unreadable(folder, error) from error
        return person, held
    key = key_from_file(folder / _PEM, passphrase)
    if key.spki != spki_of(person.public):
        raise _unreadable(folder, ValueError(f"{_PUBLIC} is not its public half"))
    return person, key


@dataclass(frozen=True)
class ChosenKey:
    """A key that somebody wants to sign with, before it is opened.

    Attributes:
        name: the printed name.
        home: the folder of keys.
        person: the person whose key lies there.
        file: else the PEM file that was named.
    """

    name: str
    home: Path
    person: PersonKey | None = None
    file: Path | None = None

    @property
    def encrypted(self) -> bool:
        """Whether it takes a passphrase."""
        if self.file is not None:
            return b"ENCRYPTED" in _content(self.file)
        return self.person is not None and self.person.encrypted

    def open(self, passphrase: str | None = None) -> SigningKey:
        """The key; errors as `load_person_key`."""
        if self.file is not None:
            return key_from_file(self.file, passphrase)
        return load_person_key(self.home, self.name, passphrase)[1]


def choose_person_key(home: Path, key: str | None, name: str | None) -> ChosenKey:
    """The key that is meant.

    Args:
        home: the folder of keys.
        key: a person's name or key id, or a PEM file; ``None`` takes the key of ``name``, or the only one that is here.
        name: the name to be printed; ``None`` takes the key's.

    Raises:
        KeyFileError: there is no such key, several could be meant, or the name is not that of the key.
    """
    if key is not None and Path(key).is_file():
        if name is None:
            raise KeyFileError(f"The key {key} does not say whose it is.", next_step="Say the name.", code="name")
        return ChosenKey(person_name(name), home, file=Path(key))
    wanted, known = key or name, people_here(home)
    if wanted is None and len(known) != 1:
        names = ", ".join(person.name for person in known)
        raise KeyFileError(
            f"It is not said who signs: there are keys of {names}." if known else "There is no person's key here.",
            next_step="Say the name." if known else 'Make one: rlhf-audit keys person --name "YOUR NAME".',
            code="no-key",
        )
    clean = None if wanted is None else " ".join(wanted.split())
    person = next((one for one in known if clean in (None, one.name, one.id)), None)
    if person is None:
        raise _no_key(home, str(clean))
    if name is not None and person_name(name) != person.name:
        raise KeyFileError(
            f"The key is {person.name}'s, and the name to be printed is {name}.",
            next_step="Leave the name out, or name another key.",
            code="name",
        )
    return ChosenKey(person.name, home, person=person)


def _no_key(home: Path, name: str) -> KeyFileError:
    known = ", ".join(person.name for person in people_here(home))
    return KeyFileError(
        f"There is no key of {name} here{f' (there are keys of {known})' if known else ''}.",
        next_step='Make one: rlhf-audit keys person --name "YOUR NAME".',
        code="no-key",
    )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def key_from_file(path: Path, passphrase: str | None = None) -> FileKey:
    """A private key in a PEM file (PKCS #8) that can be a person's.

    Raises:
        KeyFileError: as `load_person_key`, or it is of another kind.
    """
    data = _content(path)
    given = passphrase or os.environ.get(ENV_PERSON_PASSPHRASE)
    encrypted = b"ENCRYPTED" in data
    if encrypted and not given:
        raise KeyFileError(
            f"The key in {path} is encrypted.",
            next_step=f"Give its passphrase: set {ENV_PERSON_PASSPHRASE}, or sign on a terminal, which asks for it.",
            code="passphrase",
        )
    try:
        key = load_pem_private_key(data, given.encode() if encrypted and given else None)
    except (ValueError, TypeError) as error:
        if encrypted:
            raise KeyFileError(
                f"The passphrase does not open the key in {path}.", next_step="Try again.", code="passphrase"
            ) from error
        raise _unreadable(path, ValueError("it is no private key in PEM form")) from error
    if not isinstance(key, Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
        raise _unreadable(path, ValueError("it is of a kind that is not used here"))
    found = FileKey(key)
    _check_kind(load_public(found.spki))
    return found


def _check_kind(public: PublicKey) -> None:
    if isinstance(public, Ed25519PublicKey) or (
        isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name == "secp256r1"
    ):
        return
    raise KeyFileError(
        f"A person signs with ECDSA over P-256 or Ed25519, and this key is of the kind {kind_of(public)}.",
        next_step="Make one of these.",
        code="key-type",
    )


# -- the trail's keys are nobody's ----------------------------------------------------------------------------------


def spki_of_vkey(vkey: str) -> bytes | None:
    """The DER SubjectPublicKeyInfo of a log's verifier key; ``None`` for kinds that no person has."""
    verifier = parse_vkey(vkey)
    if verifier.algorithm == ED25519:
        return spki_of(Ed25519PublicKey.from_public_bytes(verifier.public))
    return verifier.public if verifier.algorithm == ECDSA else None


def refuse_trail_key(home: Path, spki: bytes) -> None:
    """Refuse a key that is one of a trail's keys here, in force or replaced: whoever trains holds them.

    Raises:
        KeyFileError: it is one; the message says of which trail and for what.
    """
    for origin in ring_origins(home):
        for info in list_keys(home, origin):
            if info.key and spki == (
                spki_of_vkey(info.key) if info.role in ("log", "mldsa") else base64.b64decode(info.key)
            ):
                raise KeyFileError(
                    f"This is the {info.role} key of the trail {origin}, which the training's process holds: what it "
                    "signs shows no person.",
                    next_step='Make a key of your own: rlhf-audit keys person --name "YOUR NAME".',
                    code="trail-key",
                )
