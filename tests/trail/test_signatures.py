"""Signatures at the edge: each case says whether it holds, and why; none is made with our own code.

The cases follow the classes of Wycheproof and of the C2SP test vectors for Ed25519. Ed25519 and ECDSA ones are built
from the curves up (`support.curves`), and the equations there give the same verdict, or the case says why not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support import curves

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.vkey import COSIGNATURE, ECDSA, ED25519, MLDSA44, Verifier

NAME = "example.com/log"
TEXT = "example.com/log\n1\nAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\n"
MESSAGE = TEXT.encode()


class Case(NamedTuple):
    """A signature over a text under a key: whether it holds, and what the bare equations say where that differs."""

    name: str
    public: bytes
    text: str
    signature: bytes
    holds: bool
    equation: bool | None = None


def bit_flips(data: bytes, step: int = 1) -> Iterator[bytes]:
    for bit in range(0, 8 * len(data), step):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << (bit % 8)
        yield bytes(changed)


SEED = bytes(range(32))
SCALAR, PREFIX = curves.edwards_secret(SEED)
PUBLIC = curves.edwards_encode(curves.edwards_times(SCALAR, curves.EDWARDS_BASE))
GOOD = curves.edwards_sign(SEED, MESSAGE)
ORDER = curves.ED25519_ORDER
IDENTITY = (1).to_bytes(32, "little")

SMALL_ORDER = {
    "order 1": IDENTITY,
    "order 1, x = -0": bytes([*IDENTITY[:31], 0x80]),
    "order 1, y = p + 1": (curves.ED25519_PRIME + 1).to_bytes(32, "little"),
    "order 1, y = p + 1, x = -0": (curves.ED25519_PRIME + 1 | 1 << 255).to_bytes(32, "little"),
    "order 2": (curves.ED25519_PRIME - 1).to_bytes(32, "little"),
    "order 2, x = -0": (curves.ED25519_PRIME - 1 | 1 << 255).to_bytes(32, "little"),
    "order 4": bytes(32),
    "order 4, x negative": bytes(31) + b"\x80",
    "order 4, y = p": curves.ED25519_PRIME.to_bytes(32, "little"),
    "order 4, y = p, x negative": (curves.ED25519_PRIME | 1 << 255).to_bytes(32, "little"),
}


def order_eight() -> dict[str, bytes]:
    """The four points of order 8, found by taking the prime order out of points of the curve."""
    found: set[bytes] = set()
    y = 2
    while len(found) < 4:
        encoded = y.to_bytes(32, "little")
        y += 1
        if curves.is_on_edwards(encoded):
            point = curves.edwards_times(ORDER, curves.edwards_decode(encoded))
            if curves.edwards_times(4, point) != (0, 1):
                found.add(curves.edwards_encode(point))
    return {f"order 8, {number}": encoded for number, encoded in enumerate(sorted(found))}


SMALL_ORDER |= order_eight()


def raised(signature: bytes, by: int) -> bytes:
    return signature[:32] + (int.from_bytes(signature[32:], "little") + by).to_bytes(32, "little")


def ed25519_cases() -> Iterator[Case]:
    def case(name: str, signature: bytes, holds: bool, *, text: str = TEXT, equation: bool | None = None) -> Case:
        return Case(name, PUBLIC, text, signature, holds, equation)

    yield case("as RFC 8032 makes it", GOOD, True)
    yield case("as the library makes it", Ed25519PrivateKey.from_private_bytes(SEED).sign(MESSAGE), True)
    yield case("over the empty message", curves.edwards_sign(SEED, b""), True, text="")
    yield case("of the empty message, over another", curves.edwards_sign(SEED, b""), False)
    yield Case(
        "RFC 8032, test 1",
        bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"),
        "",
        bytes.fromhex(
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595b"
            "be24655141438e7a100b"
        ),
        holds=True,
    )
    yield case("S + L: the same point, another number", raised(GOOD, ORDER), False)
    yield case("S + 2L", raised(GOOD, 2 * ORDER), False)
    yield case("S with a bit over 2^253", raised(GOOD, 1 << 254), False)
    yield case("S with its top bit", raised(GOOD, 1 << 255), False)
    yield case("S = 0", GOOD[:32] + bytes(32), False)
    yield case("S = L", GOOD[:32] + ORDER.to_bytes(32, "little"), False)
    yield case("S = L - 1", GOOD[:32] + (ORDER - 1).to_bytes(32, "little"), False)
    yield case("R and S exchanged", GOOD[32:] + GOOD[:32], False)
    yield case("all zero", bytes(64), False)
    yield case("all ones", b"\xff" * 64, False)
    yield case("R with y over p and no point", b"\xfe" + b"\xff" * 30 + b"\x7f" + GOOD[32:], False)
    for name, point in SMALL_ORDER.items():
        # R = [0]B: only the key-holder can make this one, and the RFC's verification takes it.
        signature = curves.edwards_sign(SEED, MESSAGE, nonce_point=point)
        same = curves.edwards_decode(point) == (0, 1)
        yield case(f"R of {name}", signature, point == IDENTITY, equation=same)
    for name, prefix in {
        "Ed25519ctx": b"SigEd25519 no Ed25519 collisions\0\1x",
        "Ed25519ph": b"SigEd25519 no Ed25519 collisions\1\0",
        "a cosignature": b"cosignature/v1\ntime 1\n",
        "a space": b" ",
    }.items():
        yield case(f"with the prefix of {name}", curves.edwards_sign(SEED, prefix + MESSAGE), False)
    yield case("of the message's digest", curves.edwards_sign(SEED, hashlib.sha512(MESSAGE).digest()), False)
    yield case("over the message without its newline", curves.edwards_sign(SEED, MESSAGE[:-1]), False)
    yield case("by another key", curves.edwards_sign(bytes(32), MESSAGE), False)
    yield from mixed_order_cases()


def mixed_order_cases() -> Iterator[Case]:
    """Keys with a part of small order hold where the equation without a cofactor does: for one message in eight."""
    torsion = curves.edwards_decode(SMALL_ORDER["order 8, 0"])
    mixed = curves.edwards_encode(curves.edwards_add(curves.edwards_times(SCALAR, curves.EDWARDS_BASE), torsion))
    for number in range(48):
        text = f"message {number}\n"
        nonce = int.from_bytes(hashlib.sha512(PREFIX + text.encode()).digest(), "little") % ORDER
        point = curves.edwards_encode(curves.edwards_times(nonce, curves.EDWARDS_BASE))
        challenge = curves.edwards_challenge(point, mixed, text.encode())
        signature = point + ((nonce + challenge * SCALAR) % ORDER).to_bytes(32, "little")
        yield Case(f"under a key of mixed order, message {number}", mixed, text, signature, challenge % 8 == 0)


ED25519_CASES = list(ed25519_cases())


def names(cases: list[Case]) -> dict[str, Case]:
    found = {case.name: case for case in cases}
    assert len(found) == len(cases)
    return found


@pytest.mark.parametrize("name", names(ED25519_CASES))
def test_an_ed25519_signature_holds_exactly_where_its_case_says(name):
    case = names(ED25519_CASES)[name]
    verifier = Verifier(NAME, ED25519, case.public)
    assert (verifier.check(case.text, case.signature) == 0) is case.holds
    equation = case.holds if case.equation is None else case.equation
    assert curves.edwards_verifies(case.public, case.text.encode(), case.signature) is equation


def test_the_cases_of_ed25519_hold_both_verdicts_and_non_canonical_points():
    assert sum(case.name.startswith("under a key of mixed order") and case.holds for case in ED25519_CASES) >= 1
    strict = [case.name for case in ED25519_CASES if case.equation and not case.holds]
    assert len(strict) == 3  # R of order 1 in its three other encodings: the equation holds, the bytes are not its one


def test_an_ed25519_signature_of_any_other_length_is_refused():
    verifier = Verifier(NAME, ED25519, PUBLIC)
    for length in range(64):
        assert verifier.check(TEXT, GOOD[:length]) is None
    for longer in (GOOD + b"\0", b"\0" + GOOD, GOOD + GOOD):
        assert verifier.check(TEXT, longer) is None


def test_every_flipped_bit_of_an_ed25519_signature_is_noticed():
    verifier = Verifier(NAME, ED25519, PUBLIC)
    assert verifier.check(TEXT, GOOD) == 0
    assert all(verifier.check(TEXT, changed) is None for changed in bit_flips(GOOD))


@pytest.mark.parametrize("name", SMALL_ORDER)
def test_a_key_of_small_order_would_sign_for_anyone_and_is_refused(name):
    """Somebody without any secret finds a signature in a few tries; the library takes it, our keys do not."""
    public = SMALL_ORDER[name]
    assert curves.edwards_times(8, curves.edwards_decode(public)) == (0, 1)
    forged = None
    for number in range(200):
        message = b"forged %d\n" % number
        if curves.edwards_verifies(public, message, IDENTITY + bytes(32)):
            forged = message
            break
    assert forged is not None
    if public[31] & 0x7F != 0x7F and name != "order 1, x = -0":  # a canonical encoding: the library goes along
        Ed25519PublicKey.from_public_bytes(public).verify(IDENTITY + bytes(32), forged)
    for algorithm in (ED25519, COSIGNATURE):
        with pytest.raises(FormatError):
            Verifier(NAME, algorithm, public)


def test_the_list_of_small_order_encodings_is_whole():
    """Fourteen: eight points, and six more ways to write some of them."""
    assert len(set(SMALL_ORDER.values())) == len(SMALL_ORDER) == 14
    assert len({curves.edwards_decode(point) for point in SMALL_ORDER.values()}) == 8


def test_an_ed25519_cosignature_meets_the_same_edges():
    verifier = Verifier(NAME, COSIGNATURE, PUBLIC)
    when = (1_700_000_000).to_bytes(8, "big")
    message = b"cosignature/v1\ntime 1700000000\n" + MESSAGE
    good = curves.edwards_sign(SEED, message)
    assert verifier.check(TEXT, when + good) == 1_700_000_000
    refused = {
        "S + L": when + raised(good, ORDER),
        "R of order 1, not canonical": when
        + curves.edwards_sign(SEED, message, nonce_point=SMALL_ORDER["order 1, y = p + 1"]),
        "no time": good,
        "cut": (when + good)[:-1],
        "longer": when + good + b"\0",
        "another time": (1_700_000_001).to_bytes(8, "big") + good,
        "a plain signature": when + GOOD,
        "no prefix": when + curves.edwards_sign(SEED, b"time 1700000000\n" + MESSAGE),
        "another version": when + curves.edwards_sign(SEED, message.replace(b"/v1", b"/v2")),
        "time with a zero before it": when + curves.edwards_sign(SEED, message.replace(b"time 1", b"time 01")),
    }
    for name, data in refused.items():
        assert verifier.check(TEXT, data) is None, name


SECRET = 0xC0FFEE
POINT = curves.p256_times(SECRET, curves.P256_BASE)
assert POINT is not None
R, S = curves.p256_sign(SECRET, MESSAGE, 0xABCDEF0123456789)
N = curves.P256_ORDER
DIGEST = curves.p256_digest(MESSAGE)
RAW = curves.der_signature(R, S)


def spki(point: curves.Point) -> bytes:
    numbers = ec.EllipticCurvePublicNumbers(point[0], point[1], ec.SECP256R1())
    return numbers.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


SPKI = spki(POINT)


class EcdsaCase(NamedTuple):
    """The numbers of a signature under a point, and whether it holds."""

    name: str
    point: curves.Point
    text: str
    r: int
    s: int
    holds: bool


def x_over_the_order() -> tuple[curves.Point, int, int]:
    """A key, made to fit, under which r is the x of a point that lies between the order and the prime."""
    x = N
    while True:
        square = (x**3 - 3 * x + 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B) % curves.P256_PRIME
        y = pow(square, (curves.P256_PRIME + 1) // 4, curves.P256_PRIME)
        if y * y % curves.P256_PRIME == square and x != N:
            break
        x += 1
    r, s = x - N, 7
    minus = curves.p256_times((N - DIGEST) % N, curves.P256_BASE)
    point = curves.p256_times(pow(r, -1, N), curves.p256_add(curves.p256_times(s, (x, y)), minus))
    assert point is not None
    return point, r, s


def ecdsa_cases() -> Iterator[EcdsaCase]:
    def case(name: str, r: int, s: int, *, holds: bool, text: str = TEXT) -> EcdsaCase:
        assert POINT is not None
        return EcdsaCase(name, POINT, text, r, s, holds)

    yield case("as FIPS 186-5 makes it", R, S, holds=True)
    yield case("the other s: high where the first is low", R, N - S, holds=True)
    yield case("over the empty message", *curves.p256_sign(SECRET, b"", 99), holds=True, text="")
    for nonce in (1, 2, N - 1):
        yield case(f"with the nonce {nonce}", *curves.p256_sign(SECRET, MESSAGE, nonce), holds=True)
    yield case("of another message", *curves.p256_sign(SECRET, b"another\n", 99), holds=False)
    yield case("by another key", *curves.p256_sign(SECRET + 1, MESSAGE, 99), holds=False)
    for name, r, s in (
        ("r = 0", 0, S),
        ("s = 0", R, 0),
        ("r = s = 0", 0, 0),
        ("r = n", N, S),
        ("s = n", R, N),
        ("r + n", R + N, S),
        ("s + n", R, S + N),
        ("r = 1, s = 1", 1, 1),
        ("r = 0, s = 1", 0, 1),
        ("r = n, s = 1", N, 1),
        ("r negative", -R, S),
        ("s negative", R, -S),
        ("r = p", curves.P256_PRIME, S),
        ("r of 300 bits", R + (N << 44), S),
        ("s of 2000 bits", R, S + (N << 1744)),
        ("r and s exchanged", S, R),
        # [e/s]G + [r/s]Q = [(e + r d) / s]G, which is the point at infinity for this r and any s
        ("the point at infinity", -DIGEST * pow(SECRET, -1, N) % N, 5),
    ):
        yield case(name, r, s, holds=False)
    point, r, s = x_over_the_order()
    yield EcdsaCase("r is an x over the order, less the order", point, TEXT, r, s, holds=True)
    yield EcdsaCase("r is an x over the order as it is", point, TEXT, r + N, s, holds=False)


ECDSA_CASES = {case.name: case for case in ecdsa_cases()}


@pytest.mark.parametrize("name", ECDSA_CASES)
def test_an_ecdsa_signature_holds_exactly_where_its_case_says(name):
    case = ECDSA_CASES[name]
    verifier = Verifier(NAME, ECDSA, spki(case.point))
    signature = curves.der_signature(case.r, case.s)
    assert (verifier.check(case.text, signature) == 0) is case.holds
    assert curves.p256_verifies(case.point, case.text.encode(), case.r, case.s) is case.holds


def other_encodings() -> dict[str, bytes]:
    """The good numbers in other bytes than their one DER encoding."""
    r, s = curves.der_number(R), curves.der_number(S)
    inner = r + s
    low = next(
        (a, b)
        for nonce in range(1, 999)
        if (pair := curves.p256_sign(SECRET, MESSAGE, nonce))
        for a, b in [pair]
        if a >> 255 == 1
    )
    unsigned = b"\x02\x20" + low[0].to_bytes(32, "big")
    return {
        "a length in two bytes": b"\x30\x81" + bytes([len(inner)]) + inner,
        "a length in three bytes": b"\x30\x82\x00" + bytes([len(inner)]) + inner,
        "an indefinite length": b"\x30\x80" + inner + b"\0\0",
        "an integer's length in two bytes": curves.der(0x30, b"\x02\x81" + r[1:] + s),
        "a zero before r": curves.der(0x30, b"\x02" + bytes([r[1] + 1]) + b"\0" + r[2:] + s),
        "a zero before s": curves.der(0x30, r + b"\x02" + bytes([s[1] + 1]) + b"\0" + s[2:]),
        "r without its sign": curves.der(0x30, unsigned + curves.der_number(low[1])),
        "a byte after it": RAW + b"\0",
        "a byte after s, inside": curves.der(0x30, inner + b"\0"),
        "a NULL after s": curves.der(0x30, inner + b"\x05\0"),
        "a third integer": curves.der(0x30, inner + b"\x02\x01\0"),
        "no s": curves.der(0x30, r),
        "nothing inside": b"\x30\0",
        "nothing": b"",
        "a set": b"\x31" + RAW[1:],
        "octets for integers": RAW.replace(b"\x02", b"\x04", 1),
        "a bit string around it": curves.der(0x03, b"\0" + RAW),
        "r and s, 32 bytes each": R.to_bytes(32, "big") + S.to_bytes(32, "big"),
        "an integer of no bytes": curves.der(0x30, b"\x02\0" + s),
        "the other digest": ec.derive_private_key(SECRET, ec.SECP256R1()).sign(MESSAGE, ec.ECDSA(SHA512())),
    }


@pytest.mark.parametrize("name", other_encodings())
def test_an_ecdsa_signature_has_one_encoding(name):
    verifier = Verifier(NAME, ECDSA, SPKI)
    assert verifier.check(TEXT, RAW) == 0
    assert verifier.check(TEXT, other_encodings()[name]) is None


def test_every_cut_and_every_flipped_bit_of_an_ecdsa_signature_is_noticed():
    verifier = Verifier(NAME, ECDSA, SPKI)
    assert all(verifier.check(TEXT, RAW[:length]) is None for length in range(len(RAW)))
    assert all(verifier.check(TEXT, changed) is None for changed in bit_flips(RAW))


MLDSA = MLDSA44PrivateKey.from_seed_bytes(SEED)
MLDSA_WHEN = (1_700_000_000).to_bytes(8, "big")
MLDSA_MESSAGE = (
    b"subtree/v1\n\0"
    + bytes([len(NAME)])
    + NAME.encode()
    + MLDSA_WHEN
    + bytes([len(NAME)])
    + NAME.encode()
    + bytes(8)
    + (1).to_bytes(8, "big")
    + b"\1" * 32
)
MLDSA_GOOD = MLDSA.sign(MLDSA_MESSAGE)
HINTS = 80 + 4  # omega positions and k counts at the end of a signature (FIPS 204, algorithm 20)


def with_hints(change: str) -> bytes:
    """The good signature with its hints written in another way that names the same positions, or with one more."""
    head, hints = MLDSA_GOOD[:-HINTS], bytearray(MLDSA_GOOD[-HINTS:])
    counts = list(hints[80:])
    if change == "unused":
        hints[counts[-1]] = 1
    elif change == "order":
        start = next(a for a, b in zip([0, *counts], counts, strict=False) if b - a >= 2)
        hints[start], hints[start + 1] = hints[start + 1], hints[start]
    elif change == "twice":
        start = next(a for a, b in zip([0, *counts], counts, strict=False) if b - a >= 2)
        hints[start + 1] = hints[start]
    elif change == "count":
        hints[83] = 81
    else:
        hints[80], hints[81] = 80, 0
    return head + bytes(hints)


MLDSA_CASES = {
    "as FIPS 204 makes it": (MLDSA_GOOD, True),
    "another signature of the same": (MLDSA.sign(MLDSA_MESSAGE), True),
    "with an empty context, said": (MLDSA.sign(MLDSA_MESSAGE, b""), True),
    "with a context": (MLDSA.sign(MLDSA_MESSAGE, b"x"), False),
    "with the label as the context": (MLDSA.sign(MLDSA_MESSAGE[12:], MLDSA_MESSAGE[:12]), False),
    "with another label": (MLDSA.sign(MLDSA_MESSAGE.replace(b"/v1", b"/v2")), False),
    "of the note's text": (MLDSA.sign(MESSAGE), False),
    "of an Ed25519 cosigner's message": (MLDSA.sign(b"cosignature/v1\ntime 1700000000\n" + MESSAGE), False),
    "of a subtree that begins later": (
        MLDSA.sign(MLDSA_MESSAGE[:-48] + (1).to_bytes(8, "big") + MLDSA_MESSAGE[-40:]),
        False,
    ),
    "of another size": (MLDSA.sign(MLDSA_MESSAGE[:-40] + (2).to_bytes(8, "big") + MLDSA_MESSAGE[-32:]), False),
    "of another root": (MLDSA.sign(MLDSA_MESSAGE[:-1] + b"\2"), False),
    "of another cosigner's name": (MLDSA.sign(MLDSA_MESSAGE.replace(b"/log", b"/lag", 1)), False),
    "of another time": (MLDSA.sign(MLDSA_MESSAGE.replace(MLDSA_WHEN, bytes(7) + b"\1")), False),
    "by another key": (MLDSA44PrivateKey.from_seed_bytes(bytes(32)).sign(MLDSA_MESSAGE), False),
    "cut by one byte": (MLDSA_GOOD[:-1], False),
    "cut to nothing": (b"", False),
    "longer by one byte": (MLDSA_GOOD + b"\0", False),
    "of a larger parameter set's length": (MLDSA_GOOD + bytes(3309 - 2420), False),
    "all zero": (bytes(2420), False),
    "all ones": (b"\xff" * 2420, False),
    "z out of range": (MLDSA_GOOD[:32] + b"\xff" * 576 + MLDSA_GOOD[608:], False),
    "a hint in an unused place": (with_hints("unused"), False),
    "hints out of order": (with_hints("order"), False),
    "a hint twice": (with_hints("twice"), False),
    "more hints than there may be": (with_hints("count"), False),
    "counts of hints that fall": (with_hints("fall"), False),
}


@pytest.mark.parametrize("name", MLDSA_CASES)
def test_an_mldsa_cosignature_holds_exactly_where_its_case_says(name):
    signature, holds = MLDSA_CASES[name]
    verifier = Verifier(NAME, MLDSA44, MLDSA.public_key().public_bytes_raw())
    assert (verifier.check(TEXT, MLDSA_WHEN + signature) == 1_700_000_000) is holds


def test_flipped_bits_all_over_an_mldsa_cosignature_are_noticed():
    verifier = Verifier(NAME, MLDSA44, MLDSA.public_key().public_bytes_raw())
    data = MLDSA_WHEN + MLDSA_GOOD
    assert verifier.check(TEXT, data) == 1_700_000_000
    assert all(verifier.check(TEXT, changed) is None for changed in bit_flips(data, 13))
