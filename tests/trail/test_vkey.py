"""Verifier keys: their one written form, and the keys that are refused."""

from __future__ import annotations

import hashlib
from functools import cache

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.curves import ED25519_PRIME, is_on_edwards
from support.notes import LOG, LOG_ECDSA, LOG_MLDSA, ORIGIN, VKEY, WITNESSES

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.vkey import COSIGNATURE, ECDSA, ED25519, MLDSA44, Verifier, format_vkey, parse_vkey

KEYS = [LOG.verifier(), LOG_ECDSA.verifier(), LOG_MLDSA.verifier(), WITNESSES[0].verifier()]
SPKI = LOG_ECDSA.verifier().public


def refused(algorithm: int, public: bytes, name: str = ORIGIN) -> str:
    with pytest.raises(FormatError) as caught:
        Verifier(name, algorithm, public)
    return caught.value.reason


@pytest.mark.parametrize("verifier", KEYS, ids=lambda key: f"{key.algorithm:#04x}")
def test_a_key_of_every_type_survives_writing_and_reading(verifier):
    assert parse_vkey(format_vkey(verifier)) == verifier


def test_the_key_id_is_of_name_type_and_key_and_for_ecdsa_of_the_key_alone():
    for verifier in KEYS:
        named = b"" if verifier.algorithm == ECDSA else verifier.name.encode() + b"\n" + bytes([verifier.algorithm])
        assert verifier.key_id == hashlib.sha256(named + verifier.public).digest()[:4]
    assert Verifier(ORIGIN, COSIGNATURE, LOG.verifier().public).key_id != LOG.verifier().key_id
    assert Verifier("another.name", ECDSA, SPKI).key_id == LOG_ECDSA.verifier().key_id


@pytest.mark.parametrize(
    "text",
    [
        "",
        "example.com",
        VKEY[:-4],
        VKEY.replace("+", "-"),
        VKEY.replace(ORIGIN, "example.com/other"),
        VKEY.replace(ORIGIN, "example.com/a b"),
        VKEY.replace(ORIGIN, "example.com/\ud800"),
        VKEY.replace(ORIGIN, ""),
        VKEY.split("+")[0] + "+ZZZZZZZZ+" + VKEY.split("+", 2)[2],
        VKEY.split("+")[0] + "+" + VKEY.split("+")[1] + "+",
        VKEY.upper(),
        VKEY + "A",
        VKEY + "\n",
        " " + VKEY,
    ],
)
def test_a_broken_verifier_key_is_refused(text):
    with pytest.raises(FormatError):
        parse_vkey(text)


@pytest.mark.parametrize("verifier", KEYS[:2], ids=lambda key: f"{key.algorithm:#04x}")
def test_every_changed_character_of_a_verifier_key_is_noticed(verifier):
    """The name of an ECDSA key is not in its id: only there a change gives another key, of that other name."""
    text = format_vkey(verifier)
    for at, char in enumerate(text):
        changed = text[:at] + ("A" if char != "A" else "B") + text[at + 1 :]
        if verifier.algorithm == ECDSA and at < len(verifier.name):
            assert parse_vkey(changed).name == changed.split("+")[0] != verifier.name
            continue
        with pytest.raises(FormatError):
            parse_vkey(changed)


@pytest.mark.parametrize("algorithm", [0x00, 0x03, 0x05, 0x07, 0xFF])
def test_a_type_that_is_not_known_is_said(algorithm):
    assert refused(algorithm, LOG.verifier().public) == "key-type"


@pytest.mark.parametrize("algorithm", [ED25519, COSIGNATURE])
def test_keys_of_small_order_are_refused(algorithm):
    for text in ("01" + "00" * 31, "ec" + "ff" * 30 + "7f", "00" * 32, "ed" + "ff" * 30 + "7f", "00" * 31 + "80"):
        assert refused(algorithm, bytes.fromhex(text)) == "key-weak"


@pytest.mark.parametrize("algorithm", [ED25519, COSIGNATURE])
def test_every_encoding_with_a_coordinate_over_the_prime_is_refused(algorithm):
    """All 38: y from p to 2^255 - 1, either sign; four of them are of small order as well."""
    encodings = [y | sign for y in range(ED25519_PRIME, 1 << 255) for sign in (0, 1 << 255)]
    reasons = [refused(algorithm, number.to_bytes(32, "little")) for number in encodings]
    assert len(reasons) == 38
    assert set(reasons) == {"key-weak", "key-encoding"}
    assert reasons.count("key-weak") == 4


def test_keys_off_the_curve_are_refused_and_no_other():
    """Against a square root of someone else's making (RFC 8032), over the small coordinates and some keys."""
    taken = 0
    for y in range(2, 200):
        encoded = y.to_bytes(32, "little")
        if is_on_edwards(encoded):
            Verifier(ORIGIN, ED25519, encoded)
            taken += 1
        else:
            assert refused(ED25519, encoded) == "key-encoding"
    assert 60 < taken < 140
    for number in range(50):
        secret = Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
        Verifier(ORIGIN, ED25519, secret.public_key().public_bytes_raw())


@pytest.mark.parametrize("verifier", KEYS, ids=lambda key: f"{key.algorithm:#04x}")
def test_a_key_that_is_cut_or_longer_is_refused(verifier):
    for public in (b"", verifier.public[:-1], verifier.public + b"\0", verifier.public[1:]):
        assert refused(verifier.algorithm, public) in {"key-length", "key-encoding"}


def spki(key: object, form: PublicFormat = PublicFormat.SubjectPublicKeyInfo, code: Encoding = Encoding.DER) -> bytes:
    return key.public_bytes(code, form)  # type: ignore[attr-defined]


@cache
def other_ecdsa_keys() -> dict[str, bytes]:
    """Keys that ECDSA over P-256 cannot have in their one encoding, and why."""
    point = LOG_ECDSA.key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    compressed = LOG_ECDSA.key.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    head = SPKI[: -len(point)]
    algorithm = head[2:-3]
    short = algorithm + b"\x03" + bytes([len(compressed) + 1]) + b"\0" + compressed
    return {
        "another curve": spki(ec.derive_private_key(5, ec.SECP384R1()).public_key()),
        "Bitcoin's curve": spki(ec.derive_private_key(5, ec.SECP256K1()).public_key()),
        "an RSA key": spki(rsa.generate_private_key(65537, 2048).public_key()),
        "an Ed25519 key": spki(LOG.key.public_key()),
        "PEM": spki(LOG_ECDSA.key.public_key(), code=Encoding.PEM),
        "the bare point": point,
        "a compressed point": b"\x30" + bytes([len(short)]) + short,
        "the point at infinity": b"\x30" + bytes([len(algorithm) + 4]) + algorithm + b"\x03\x02\0\0",
        "a point off the curve": head + point[:-1] + bytes([point[-1] ^ 1]),
        "coordinates of zero": head + b"\x04" + bytes(64),
        "a length in two bytes": b"\x30\x81" + SPKI[1:],
        "an indefinite length": b"\x30\x80" + SPKI[2:] + b"\0\0",
        "bits left over": SPKI.replace(head[-3:], head[-3:-1] + b"\x01"),
    }


@pytest.mark.parametrize("name", sorted(other_ecdsa_keys()))
def test_an_ecdsa_key_is_a_point_of_p256_in_its_one_encoding(name):
    Verifier(ORIGIN, ECDSA, SPKI)
    assert refused(ECDSA, other_ecdsa_keys()[name]) in {"key-encoding", "key-type"}


def test_the_name_of_an_mldsa_key_fits_the_message_that_it_signs():
    public = LOG_MLDSA.verifier().public
    assert Verifier("x" * 255, MLDSA44, public).key_id
    assert refused(MLDSA44, public, "x" * 256) == "name"
    assert refused(MLDSA44, public, "é" * 128) == "name"
