"""Ed25519 (RFC 8032) and ECDSA over P-256 (FIPS 186-5) from first principles: slow, plain, and nobody else's code.

Enough to make the signatures that a library never would: with numbers out of range, with a nonce of one's choice, under
points of small order.
"""

from __future__ import annotations

import hashlib

Point = tuple[int, int]

ED25519_PRIME = 2**255 - 19
ED25519_ORDER = 2**252 + 27742317777372353535851937790883648493
_P, _L = ED25519_PRIME, ED25519_ORDER
_D = -121665 * pow(121666, -1, _P) % _P
_ROOT = pow(2, (_P - 1) // 4, _P)  # a square root of -1


def edwards_add(one: Point, two: Point) -> Point:
    """RFC 8032, section 5.1.4, in affine coordinates."""
    (x, y), (u, v) = one, two
    product = _D * x * u * y * v % _P
    return (x * v + u * y) * pow(1 + product, -1, _P) % _P, (y * v + x * u) * pow(1 - product, -1, _P) % _P


def edwards_times(number: int, point: Point) -> Point:
    result = (0, 1)
    while number:
        if number & 1:
            result = edwards_add(result, point)
        point, number = edwards_add(point, point), number >> 1
    return result


def _edwards_x(y: int, sign: int) -> int | None:
    """RFC 8032, section 5.1.3; ``None`` where no x goes with y."""
    u, v = (y * y - 1) % _P, (_D * y * y + 1) % _P
    x = u * pow(v, 3, _P) * pow(u * pow(v, 7, _P), (_P - 5) // 8, _P) % _P
    if v * x * x % _P == -u % _P:
        x = x * _ROOT % _P
    if v * x * x % _P != u:
        return None
    return x if x & 1 == sign else -x % _P


def is_on_edwards(encoded: bytes) -> bool:
    number = int.from_bytes(encoded, "little")
    return _edwards_x(number & ((1 << 255) - 1), number >> 255) is not None


def edwards_decode(encoded: bytes) -> Point:
    number = int.from_bytes(encoded, "little")
    x = _edwards_x(number & ((1 << 255) - 1), number >> 255)
    assert x is not None
    return x, (number & ((1 << 255) - 1)) % _P


def edwards_encode(point: Point) -> bytes:
    x, y = point
    return (y | (x & 1) << 255).to_bytes(32, "little")


EDWARDS_BASE = edwards_decode((4 * pow(5, -1, _P) % _P).to_bytes(32, "little"))


def edwards_secret(seed: bytes) -> tuple[int, bytes]:
    """The scalar and the prefix of a seed (RFC 8032, section 5.1.5)."""
    digest = hashlib.sha512(seed).digest()
    scalar = int.from_bytes(digest[:32], "little") & ((1 << 254) - 8) | 1 << 254
    return scalar, digest[32:]


def edwards_challenge(nonce: bytes, public: bytes, message: bytes) -> int:
    return int.from_bytes(hashlib.sha512(nonce + public + message).digest(), "little") % _L


def edwards_sign(seed: bytes, message: bytes, *, nonce_point: bytes | None = None, shift: int = 0) -> bytes:
    """A signature (RFC 8032, section 5.1.6); with another encoding of R hashed and sent, or S raised by ``shift``."""
    scalar, prefix = edwards_secret(seed)
    public = edwards_encode(edwards_times(scalar, EDWARDS_BASE))
    nonce = int.from_bytes(hashlib.sha512(prefix + message).digest(), "little") % _L
    if nonce_point is None:
        nonce_point = edwards_encode(edwards_times(nonce, EDWARDS_BASE))
    else:
        nonce = 0  # R is of small order: its multiple of the base is nothing
    answer = (nonce + edwards_challenge(nonce_point, public, message) * scalar) % _L + shift
    return nonce_point + answer.to_bytes(32, "little")


def edwards_verifies(public: bytes, message: bytes, signature: bytes) -> bool:
    """The equation [S]B = R + [k]A and S < L, points taken in any encoding: the laxest reading of the RFC."""
    nonce, answer = signature[:32], int.from_bytes(signature[32:], "little")
    if answer >= _L or not is_on_edwards(nonce) or not is_on_edwards(public):
        return False
    challenge = edwards_challenge(nonce, public, message)
    right = edwards_add(edwards_decode(nonce), edwards_times(challenge, edwards_decode(public)))
    return edwards_times(answer, EDWARDS_BASE) == right


P256_PRIME = 2**256 - 2**224 + 2**192 + 2**96 - 1
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_B256 = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
P256_BASE = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)


def p256_add(one: Point | None, two: Point | None) -> Point | None:
    """The group law; ``None`` is the point at infinity."""
    if one is None or two is None:
        return one or two
    (x, y), (u, v) = one, two
    if x == u and (y + v) % P256_PRIME == 0:
        return None
    if one == two:
        slope = (3 * x * x - 3) * pow(2 * y, -1, P256_PRIME) % P256_PRIME
    else:
        slope = (v - y) * pow(u - x, -1, P256_PRIME) % P256_PRIME
    third = (slope * slope - x - u) % P256_PRIME
    return third, (slope * (x - third) - y) % P256_PRIME


def p256_times(number: int, point: Point | None) -> Point | None:
    result: Point | None = None
    while number:
        if number & 1:
            result = p256_add(result, point)
        point, number = p256_add(point, point), number >> 1
    return result


def p256_digest(message: bytes) -> int:
    return int.from_bytes(hashlib.sha256(message).digest(), "big")


def p256_sign(secret: int, message: bytes, nonce: int) -> tuple[int, int]:
    """The numbers r and s (FIPS 186-5, section 6.4.1) with a nonce of one's choice."""
    point = p256_times(nonce, P256_BASE)
    assert point is not None
    r = point[0] % P256_ORDER
    return r, pow(nonce, -1, P256_ORDER) * (p256_digest(message) + r * secret) % P256_ORDER


def p256_verifies(public: Point, message: bytes, r: int, s: int) -> bool:
    """FIPS 186-5, section 6.4.2."""
    if not 0 < r < P256_ORDER or not 0 < s < P256_ORDER:
        return False
    inverse = pow(s, -1, P256_ORDER)
    one = p256_times(p256_digest(message) * inverse % P256_ORDER, P256_BASE)
    point = p256_add(one, p256_times(r * inverse % P256_ORDER, public))
    return point is not None and point[0] % P256_ORDER == r


def der(tag: int, content: bytes) -> bytes:
    """Tag, length and content of one DER value."""
    size = len(content)
    length = (
        bytes([size])
        if size < 128
        else bytes([0x80 | (size.bit_length() + 7) // 8]) + size.to_bytes((size.bit_length() + 7) // 8, "big")
    )
    return bytes([tag]) + length + content


def der_number(number: int) -> bytes:
    """A DER INTEGER, negative ones too."""
    size = (number + (number < 0)).bit_length() // 8 + 1
    return der(0x02, number.to_bytes(size, "big", signed=True))


def der_signature(r: int, s: int) -> bytes:
    return der(0x30, der_number(r) + der_number(s))
