"""Private keys that sign, wherever they are: in a file, in an HSM, in a cloud's key service. Floor 0.

`SigningKey` is what the rest of the package asks for: a public half and signatures over bytes. `FileKey` has its
private half in memory. `HeldKey` never has it: it is named by a URI that a signer of ``securesystemslib`` resolves::

    file2:PATH                          a PEM file           hsm:ID?label=TOKEN      a PKCS #11 token (ECDSA)
    gcpkms:projects/.../versions/1      Google Cloud KMS     awskms:ARN              AWS KMS
    azurekms://VAULT.vault.azure.net/…  Azure Key Vault      hv:NAME/VERSION         HashiCorp Vault

Other schemes come with ``securesystemslib.signer.SIGNER_FOR_URI_SCHEME``. The file ``ROLE.signer`` of a key ring holds
the URI and the public half (`HeldKey.encode`). What a service signs is verified before it is used: a signature that
does not hold must not reach a trail. A PIN or passphrase that a signer asks for is ``RLHF_AUDIT_SIGNER_PIN``.

`LogSigner` makes note lines (C2SP signed-note) with such a key: type 0x01 for Ed25519, 0x02 for ECDSA over P-256.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey, MLDSA44PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
    load_pem_public_key,
)

from rlhf_audit_nb.errors import FormatError, KeyFileError
from rlhf_audit_nb.trail.encoding import decode_base64
from rlhf_audit_nb.trail.note import ECDSA, ED25519, Signature, Verifier

__all__ = [
    "ENV_SIGNER_PIN",
    "FileKey",
    "HeldKey",
    "LogSigner",
    "PublicKey",
    "SigningKey",
    "check_bytes",
    "kind_of",
    "load_public",
    "public_of",
    "read_public",
    "spki_of",
]

ENV_SIGNER_PIN = "RLHF_AUDIT_SIGNER_PIN"
_VERSION = 1

PublicKey = Ed25519PublicKey | ec.EllipticCurvePublicKey | MLDSA44PublicKey
_PrivateKey = Ed25519PrivateKey | ec.EllipticCurvePrivateKey | MLDSA44PrivateKey

# The hash that goes with a curve, in securesystemslib and in every key service that it serves.
_HASHES: dict[str, type[HashAlgorithm]] = {"secp256r1": SHA256, "secp384r1": SHA384, "secp521r1": SHA512}
_KINDS = {"secp256r1": "ECDSA P-256", "secp384r1": "ECDSA P-384", "secp521r1": "ECDSA P-521"}


class SigningKey(Protocol):
    """A private key that signs bytes."""

    @property
    def spki(self) -> bytes:
        """The public half, DER SubjectPublicKeyInfo."""

    @property
    def where(self) -> str:
        """Where the private half is, for a person."""

    def sign(self, data: bytes) -> bytes:
        """The signature over ``data`` (ECDSA: DER)."""


def spki_of(public: PublicKey) -> bytes:
    """A public key's DER SubjectPublicKeyInfo."""
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def load_public(spki: bytes) -> PublicKey:
    """The key in a DER SubjectPublicKeyInfo: Ed25519, ECDSA over P-256, P-384 or P-521, or ML-DSA-44.

    Raises:
        FormatError: it is no key, or one of another kind.
    """
    try:
        key = load_der_public_key(spki)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FormatError("It is not a DER public key.", code="key-type") from error
    return _known(key)


def read_public(data: bytes) -> PublicKey:
    """The public key in a PEM file, such as a key service hands out.

    Raises:
        FormatError: it is no key, or one of another kind than `load_public` takes.
    """
    try:
        key = load_pem_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FormatError(
            "It is not a public key in PEM form.",
            next_step="Name the file that begins with -----BEGIN PUBLIC KEY-----.",
            code="key-type",
        ) from error
    return _known(key)


def _known(key: object) -> PublicKey:
    if isinstance(key, Ed25519PublicKey | MLDSA44PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _HASHES:
        return key
    raise FormatError(
        "The key is of a kind that is not used here.",
        next_step="Use Ed25519, ECDSA over P-256, P-384 or P-521, or ML-DSA-44.",
        code="key-type",
    )


def kind_of(public: PublicKey) -> str:
    """What kind of key it is, for a person."""
    if isinstance(public, ec.EllipticCurvePublicKey):
        return _KINDS[public.curve.name]
    return "Ed25519" if isinstance(public, Ed25519PublicKey) else "ML-DSA-44"


def check_bytes(public: PublicKey, signature: bytes, data: bytes) -> bool:
    """Whether ``signature`` is the key's over ``data``, by the one scheme that goes with its kind."""
    try:
        if isinstance(public, ec.EllipticCurvePublicKey):
            if encode_dss_signature(*decode_dss_signature(signature)) != signature:
                return False
            public.verify(signature, data, ec.ECDSA(_HASHES[public.curve.name]()))
        else:
            public.verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True)
class FileKey:
    """A key whose private half is here, read from a file."""

    key: _PrivateKey = field(repr=False)
    where: str = "a file"

    @property
    def spki(self) -> bytes:
        """The public half, DER SubjectPublicKeyInfo."""
        return spki_of(self.key.public_key())

    def sign(self, data: bytes) -> bytes:
        """The signature over ``data``."""
        if isinstance(self.key, ec.EllipticCurvePrivateKey):
            return self.key.sign(data, ec.ECDSA(_HASHES[self.key.curve.name]()))
        return self.key.sign(data)


class _HeldForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    uri: str
    public: str


_held = msgspec.json.Decoder(_HeldForm)


def _library() -> Any:
    # Not above: a ring with keys in files needs none of it.
    return import_module("securesystemslib.signer")


def _pin(secret: str) -> str:
    value = os.environ.get(ENV_SIGNER_PIN)
    if not value:
        raise KeyFileError(
            f"The signer asks for its {secret} and none was given.",
            next_step=f"Set {ENV_SIGNER_PIN}.",
            code="passphrase",
        )
    return value


class HeldKey:
    """A key whose private half stays where it is: an HSM, a key service, a file of somebody else's.

    Args:
        uri: where, as ``securesystemslib`` names it.
        public: the public half.

    Raises:
        FormatError: it is an ML-DSA-44 key: what holds keys of that kind signs a hash, not the text itself.
    """

    def __init__(self, uri: str, public: PublicKey) -> None:
        if isinstance(public, MLDSA44PublicKey):
            raise FormatError(
                "An ML-DSA-44 key cannot be held elsewhere.",
                next_step="Make one in the ring: `rlhf-audit keys add-mldsa`.",
                code="key-type",
            )
        self.uri = uri
        self.public = public
        self._signer: tuple[int, Any] | None = None

    @property
    def where(self) -> str:
        """Where the private half is, for a person."""
        return self.uri

    @property
    def spki(self) -> bytes:
        """The public half, DER SubjectPublicKeyInfo."""
        return spki_of(self.public)

    def encode(self) -> bytes:
        """The bytes of a ``.signer`` file; they hold nothing secret."""
        return msgspec.json.encode(_HeldForm(_VERSION, self.uri, base64.b64encode(self.spki).decode())) + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> HeldKey:
        """The key in the bytes of a ``.signer`` file.

        Raises:
            FormatError: they are none.
        """
        try:
            form = _held.decode(data)
        except msgspec.MsgspecError as error:
            raise FormatError(f"It is not a signer file: {error}.", code="signer") from error
        if form.version != _VERSION:
            raise FormatError(f"The signer file is of version {form.version}, not {_VERSION}.", code="unknown-version")
        return cls(form.uri, load_public(decode_base64(form.public, "public key")))

    def sign(self, data: bytes) -> bytes:
        """The signature over ``data``, verified.

        Raises:
            KeyFileError: the signer cannot be reached, refuses, or signs with another key.
        """
        try:
            signature = bytes.fromhex(self._connected().sign(data).signature)
            if isinstance(self.public, ec.EllipticCurvePublicKey):
                signature = encode_dss_signature(*decode_dss_signature(signature))
        except KeyFileError:
            raise
        except Exception as error:
            # The library says of its signers that they may raise anything: a network's errors, a token's, its own.
            raise self._unusable(error) from error
        if not check_bytes(self.public, signature, data):
            raise self._unusable(ValueError("its signature is not by the key that the ring names"))
        return signature

    def _connected(self) -> Any:
        # A connection belongs to the process that made it; a forked child makes its own.
        if self._signer is None or self._signer[0] != os.getpid():
            library = _library()
            public = library.SSlibKey.from_crypto(self.public)
            self._signer = (os.getpid(), library.Signer.from_priv_key_uri(self.uri, public, _pin))
        return self._signer[1]

    def _unusable(self, error: Exception) -> KeyFileError:
        return KeyFileError(
            f"The key {self.uri} cannot sign: {str(error) or type(error).__name__}.",
            next_step="Check that the token or the service can be reached and holds this key; nothing was signed.",
            code="signer",
        )


def public_of(uri: str) -> PublicKey:
    """The public half of the key that a URI names, where its holder tells it: a PEM file, a PKCS #11 token.

    Raises:
        KeyFileError: it cannot be had; then the user names it in a file.
    """
    scheme, _, rest = uri.partition(":")
    try:
        if scheme == "file2":
            path = Path(os.environ.get("CRYPTO_SIGNER_PATH_PREFIX", "")) / rest
            return _known(load_pem_private_key(path.read_bytes(), None).public_key())
        if scheme == "hsm":
            return _public_on_token(rest)
    except Exception as error:
        raise KeyFileError(
            f"The public half of {uri} cannot be read: {str(error) or type(error).__name__}.",
            next_step="Name a file with it: --public FILE (PEM).",
            code="signer",
        ) from error
    raise KeyFileError(
        f"The public half of {uri} must be told.",
        next_step="Get it from the service as a PEM file and name it: --public FILE.",
        code="signer",
    )


def _public_on_token(rest: str) -> PublicKey:
    number, _, query = rest.partition("?")
    label = dict(parse_qsl(query)).get("label")
    _, key = _library().HSMSigner.import_(int(number) if number else None, label, _pin)
    return read_public(key.keyval["public"].encode())


@dataclass(frozen=True)
class LogSigner:
    """A key that signs a log's checkpoints under the log's name: a `note.NoteSigner`.

    Raises:
        FormatError: the key is neither Ed25519 nor ECDSA over P-256, the kinds that signed notes know.
    """

    name: str
    key: SigningKey = field(repr=False)

    def __post_init__(self) -> None:
        self.verifier()

    def verifier(self) -> Verifier:
        """The public half."""
        public = load_public(self.key.spki)
        if isinstance(public, Ed25519PublicKey):
            return Verifier(self.name, ED25519, public.public_bytes_raw())
        if isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name == "secp256r1":
            return Verifier(self.name, ECDSA, self.key.spki)
        raise FormatError(
            f"An {kind_of(public)} key cannot sign checkpoints.",
            next_step="Use an Ed25519 key, or ECDSA over P-256.",
            code="key-type",
        )

    def sign_line(self, text: str) -> Signature:
        """The signature line over a note's text."""
        return Signature(self.name, self.verifier().key_id, self.key.sign(text.encode()))
