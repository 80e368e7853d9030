"""Timestamps (RFC 3161): an authority states that a checkpoint existed at a time. Floor 0.

The authority sees a SHA-256 digest and nothing else. Its answer, a DER TimeStampResp, holds its certificate; whether it
counts is decided by the certificates that the user trusts: ``HOME/tsa/*.pem``, or files that are named. Decoding and
verifying are rfc3161-client's; the certificates are judged as of the time in the token, so that a token outlives them.

A token bounds when a history was written and stops back-dating. It does not stop two histories, both of which can be
stamped, and a local authority of one's own is no qualified one (eIDAS, article 41).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256, sha384, sha512
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from rfc3161_client import (
    HashAlgorithm,
    PKIStatus,
    TimestampRequestBuilder,
    VerificationError,
    VerifierBuilder,
)
from rfc3161_client import decode_timestamp_response as decode

from rlhf_audit_nb.errors import AnchorError, ConfigError, FormatError
from rlhf_audit_nb.trail.web import TIMEOUT, Answer, post

if TYPE_CHECKING:
    from rfc3161_client.tsp import TimeStampResponse

__all__ = ["Token", "ask_authority", "check_token", "trusted_authorities"]

QUERY = "application/timestamp-query"
REPLY = "application/timestamp-reply"
FOLDER = "tsa"

_MAX_PEM = 1 << 20
_HASHES = {
    "2.16.840.1.101.3.4.2.1": sha256,
    "2.16.840.1.101.3.4.2.2": sha384,
    "2.16.840.1.101.3.4.2.3": sha512,
}


@dataclass(frozen=True)
class Token:
    """A timestamp that holds.

    Attributes:
        time: POSIX seconds, as the authority has them.
        authority: the subject of the certificate that signed.
        response: the TimeStampResp, DER.
    """

    time: int
    authority: str
    response: bytes


def trusted_authorities(home: Path, files: Iterable[Path | str] = ()) -> tuple[bytes, ...]:
    """The certificates (PEM) of the authorities that are trusted: those in ``files``, else those in ``HOME/tsa``.

    Raises:
        ConfigError: a file cannot be read or holds no certificate.
    """
    paths = [Path(name).expanduser() for name in files] or sorted((home / FOLDER).glob("*.pem"))
    found = []
    for path in paths:
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_PEM)
            x509.load_pem_x509_certificates(data)
        except (OSError, ValueError) as error:
            reason = (error.strerror or error) if isinstance(error, OSError) else "it holds no certificate in PEM form"
            raise ConfigError(
                f"The certificate of the timestamping authority in {path} cannot be used: {reason}.",
                next_step="Name the PEM file of the authority's root certificate, as its operator publishes it.",
                code="tsa-ca",
            ) from error
        found.append(data)
    return tuple(found)


def _roots(pems: Sequence[bytes]) -> list[x509.Certificate]:
    try:
        found = [item for pem in pems for item in x509.load_pem_x509_certificates(pem)]
    except ValueError as error:
        raise FormatError(f"A certificate that should be trusted is not PEM: {error}.", code="tsa-ca") from error
    return list(dict.fromkeys(found))


def check_token(response: bytes, message: bytes, roots: Sequence[bytes], *, nonce: int | None = None) -> Token:
    """The timestamp of exactly ``message`` in an authority's answer.

    Args:
        response: the TimeStampResp, DER.
        message: the bytes that were stamped.
        roots: certificates (PEM) that are trusted to name authorities.
        nonce: what the answer must repeat, where the request is one's own.

    Raises:
        FormatError: ``tsa-unknown`` where the authority is not one that the roots vouch for; ``timestamp`` where the
            answer is malformed, was not granted, is of other bytes, is not signed, or by no timestamping certificate.
    """
    decoded = _granted(response)
    said = decoded.tst_info
    if said.message_imprint.message != _digest(said.message_imprint.hash_algorithm.dotted_string, message):
        raise _refused("It is a timestamp of something else.")
    if nonce is not None and said.nonce != nonce:
        raise _refused("It does not repeat the number of the request, so it may be an older answer.")
    trusted = _roots(roots)
    if not trusted:
        raise FormatError("No timestamping authority is trusted here, so it was not counted.", code="tsa-unknown")
    try:
        VerifierBuilder(roots=trusted).build().verify_message(decoded, message)
        signer = _signer(decoded)
    except VerificationError as error:
        if "certificate verify error" in str(error):
            raise FormatError(
                f"Its authority's certificate is not vouched for by one that is trusted here ({_why(error)}), so it "
                "was not counted.",
                code="tsa-unknown",
            ) from error
        raise _refused(f"It does not hold: {_why(error)}.") from error
    except ValueError as error:
        raise _refused(f"It does not hold: {error}.") from error
    return Token(int(said.gen_time.timestamp()), signer, response)


def _granted(response: bytes) -> TimeStampResponse:
    try:
        decoded = decode(response)
        status = PKIStatus(decoded.status)
        if status is not PKIStatus.GRANTED:
            said = "; ".join(decoded.status_string)
            raise _refused(f"The authority has not granted it: {status.name.lower()}{f' ({said})' if said else ''}.")
        decoded.tst_info  # noqa: B018 (decoded when asked for)
    except ValueError as error:
        raise _refused(f"It is not a timestamping authority's answer: {error}.") from error
    return decoded


def _digest(algorithm: str, message: bytes) -> bytes:
    if algorithm not in _HASHES:
        raise _refused(f"It uses the hash algorithm {algorithm}, which is not SHA-2.")
    return _HASHES[algorithm](message).digest()


def _signer(decoded: TimeStampResponse) -> str:
    (info,) = decoded.signed_data.signer_infos
    for der in decoded.signed_data.certificates:
        certificate = x509.load_der_x509_certificate(der)
        if certificate.issuer == info.issuer and certificate.serial_number == info.serial_number:
            return certificate.subject.rfc4514_string()
    raise ValueError("it holds no certificate of its signer")


def _why(error: Exception) -> str:
    """The part of OpenSSL's stack that a person can use."""
    text = str(error)
    _, mark, rest = text.partition('data: "')
    return rest.partition('"')[0].removeprefix("Verify error: ") if mark else text.partition(": ErrorStack")[0]


def _refused(message: str) -> FormatError:
    return FormatError(message, code="timestamp")


def ask_authority(
    url: str, message: bytes, roots: Sequence[bytes], *, now: float, timeout: float = TIMEOUT, skew: float = 300
) -> Token:
    """A fresh timestamp of ``message`` from the authority at ``url``, verified.

    Raises:
        AnchorError: ``unreachable`` where it gives no answer, ``timestamp`` where it gives another one than asked for,
            ``tsa-unknown`` where it is not trusted here.
    """
    builder = TimestampRequestBuilder().data(message).hash_algorithm(HashAlgorithm.SHA256)
    request = builder.nonce(nonce=True).cert_request(cert_request=True).build()
    answer = post(url, request.as_bytes(), QUERY, timeout=timeout)
    try:
        _check_reply(answer)
        token = check_token(answer.body, message, roots, nonce=request.nonce)
        if token.time > now + skew:
            raise _refused("It is dated in the future by this machine's clock.")
    except FormatError as error:
        unknown = error.reason == "tsa-unknown"
        raise AnchorError(
            f"The timestamping authority at {url}: {error.message}",
            next_step=f"Put its root certificate into {FOLDER}/ in the keys' home, or name it with --tsa-ca FILE."
            if unknown
            else "Ask another authority, or this one's operator.",
            code=error.reason,
        ) from error
    return token


def _check_reply(answer: Answer) -> None:
    if answer.status != 200:  # noqa: PLR2004
        raise _refused(f"It answered with status {answer.status}.")
    if answer.kind != REPLY:
        raise _refused(f"It answered with {answer.kind}, not with {REPLY}.")
