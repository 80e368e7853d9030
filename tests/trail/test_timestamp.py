"""Timestamps from an openssl authority: verified here and by openssl, and refused where they must be."""

from __future__ import annotations

import shutil
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rfc3161_client import HashAlgorithm, TimestampRequestBuilder, decode_timestamp_response
from support.tsa import Authority, serve

from rlhf_audit_nb.errors import AnchorError, ConfigError, FormatError
from rlhf_audit_nb.trail.timestamp import ask_authority, check_token, trusted_authorities
from rlhf_audit_nb.trail.web import get, post

DATE = "%y%m%d%H%M%SZ"
MESSAGE = b"example.com/log\n5\nAAAA\n\n\xe2\x80\x94 example.com/log AAAA\n"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    made = Authority.make(tmp_path_factory.mktemp("tsa") / "one")
    made.certify()
    return made


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another authority of the same name."""
    made = Authority.make(tmp_path_factory.mktemp("tsa") / "two")
    made.certify()
    return made


@pytest.fixture(scope="module")
def token(authority):
    return authority.stamp(MESSAGE)


def openssl_verifies(message: bytes, response: bytes, ca: Path, folder: Path, *options: str) -> bool:
    (folder / "message").write_bytes(message)
    (folder / "token.tsr").write_bytes(response)
    words = ["openssl", "ts", "-verify", "-data", "message", "-in", "token.tsr", "-CAfile", str(ca), *options]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    return done.returncode == 0 and "Verification: OK" in done.stdout + done.stderr


def refused(response: bytes, message: bytes, roots, **options) -> FormatError:
    with pytest.raises(FormatError) as caught:
        check_token(response, message, roots, **options)
    return caught.value


def test_a_timestamp_holds_here_and_for_openssl(token, authority, tmp_path):
    held = check_token(token, MESSAGE, [authority.pem])
    assert held.response == token
    assert held.authority == "CN=Local test tsa"
    assert abs(held.time - time.time()) < 300
    assert openssl_verifies(MESSAGE, token, authority.ca, tmp_path)


@pytest.mark.parametrize("algorithm", [HashAlgorithm.SHA256, HashAlgorithm.SHA512])
def test_each_hash_of_the_family_is_taken(authority, algorithm):
    request = TimestampRequestBuilder().data(MESSAGE).hash_algorithm(algorithm).build()
    assert check_token(authority.answer(request.as_bytes()), MESSAGE, [authority.pem]).time


def test_a_timestamp_of_other_bytes_is_refused_by_both(token, authority, tmp_path):
    for message in (MESSAGE + b"\n", MESSAGE[:-1], MESSAGE.replace(b"5", b"6"), b"x"):
        error = refused(token, message, [authority.pem])
        assert (error.reason, "something else" in error.message) == ("timestamp", True)
        assert not openssl_verifies(message, token, authority.ca, tmp_path)


def test_an_authority_that_is_not_trusted_is_refused_by_both(token, other, tmp_path):
    assert refused(token, MESSAGE, [other.pem]).reason == "tsa-unknown"
    assert refused(token, MESSAGE, []).reason == "tsa-unknown"
    assert not openssl_verifies(MESSAGE, token, other.ca, tmp_path)


def test_of_several_trusted_authorities_one_is_enough(token, authority, other):
    assert check_token(token, MESSAGE, [other.pem + authority.pem]).time
    assert check_token(token, MESSAGE, [other.pem, authority.pem, authority.pem]).time


def test_no_byte_can_be_changed_so_that_it_says_anything_else(token, authority):
    true = check_token(token, MESSAGE, [authority.pem])
    accepted = 0
    for at in range(len(token)):
        changed = token[:at] + bytes([token[at] ^ 1]) + token[at + 1 :]
        try:
            held = check_token(changed, MESSAGE, [authority.pem])
        except FormatError:
            continue
        accepted += 1
        assert (held.time, held.authority) == (true.time, true.authority)
    # CMS leaves a few bytes unsigned, such as version numbers; the statement is not among them.
    assert accepted < 20


def test_cut_and_padded_answers_and_noise_are_refused(token, authority):
    for response in (b"", b"0", token[:-1], token + b"\0", token[1:], b"\x30\x03\x02\x01\x00", b"nonsense" * 200):
        assert refused(response, MESSAGE, [authority.pem]).reason == "timestamp"


def test_a_certificate_without_the_timestamping_purpose_is_refused_by_both(authority, tmp_path):
    authority.certify("server", "serving")
    # The way of forging is sound: with a certificate that has the purpose, its result is a good timestamp.
    assert check_token(forge(authority, tmp_path, "tsa"), MESSAGE, [authority.pem])
    token = forge(authority, tmp_path, "server")
    error = refused(token, MESSAGE, [authority.pem])
    assert (error.reason, "unsuitable certificate purpose" in error.message) == ("tsa-unknown", True), error
    assert not openssl_verifies(MESSAGE, token, authority.ca, tmp_path)


def forge(authority: Authority, folder: Path, name: str) -> bytes:
    """A token of a certificate that openssl ts itself will not sign with: the content, signed as CMS."""
    true = authority.stamp(MESSAGE)
    (folder / "true.tsr").write_bytes(true)
    plain = ["openssl", "ts", "-reply", "-in", "true.tsr", "-token_out", "-out", "true.token"]
    subprocess.run(plain, cwd=folder, check=True, capture_output=True)
    extract = ["openssl", "cms", "-verify", "-noverify", "-inform", "DER", "-in", "true.token", "-out", "info"]
    subprocess.run(extract, cwd=folder, check=True, capture_output=True)
    keys = ["-signer", str(authority.folder / f"{name}.pem"), "-inkey", str(authority.folder / f"{name}.key")]
    sign = ["openssl", "cms", "-sign", "-nodetach", "-binary", "-cades", "-econtent_type", "1.2.840.113549.1.9.16.1.4"]
    signed = [*sign, "-outform", "DER", *keys, "-in", "info", "-out", "forged.token"]
    subprocess.run(signed, cwd=folder, check=True, capture_output=True)
    answer = ["openssl", "ts", "-reply", "-token_in", "-in", "forged.token", "-out", "forged.tsr"]
    subprocess.run(answer, cwd=folder, check=True, capture_output=True)
    return (folder / "forged.tsr").read_bytes()


def test_a_certificate_that_was_not_valid_at_the_time_is_refused_by_both(authority, tmp_path):
    past = datetime.now(UTC) - timedelta(days=9)
    authority.certify("late", start=(past - timedelta(days=1)).strftime(DATE), end=past.strftime(DATE))
    token = authority.stamp(MESSAGE, "late")
    error = refused(token, MESSAGE, [authority.pem])
    assert error.reason == "tsa-unknown"
    assert "expired" in error.message
    assert not openssl_verifies(MESSAGE, token, authority.ca, tmp_path)


def test_a_root_that_was_not_valid_at_the_time_is_refused_by_both(tmp_path):
    authority = Authority.make(tmp_path / "tsa")
    authority.certify()
    token = authority.stamp(MESSAGE)
    assert check_token(token, MESSAGE, [authority.pem])
    past = datetime.now(UTC) - timedelta(days=9)
    authority.expire(start=(past - timedelta(days=1)).strftime(DATE), end=past.strftime(DATE))
    error = refused(token, MESSAGE, [authority.pem])
    assert (error.reason, "expired" in error.message) == ("tsa-unknown", True)
    assert not openssl_verifies(MESSAGE, token, authority.ca, tmp_path)


def test_a_timestamp_outlives_the_certificate_that_made_it(tmp_path):
    authority = Authority.make(tmp_path / "tsa")
    now = datetime.now(UTC)
    end = now + timedelta(seconds=3)
    authority.certify("short", start=(now - timedelta(days=1)).strftime(DATE), end=end.strftime(DATE))
    token = authority.stamp(MESSAGE, "short")
    time.sleep(max(0.0, (end - datetime.now(UTC)).total_seconds()) + 1.1)
    held = check_token(token, MESSAGE, [authority.pem])
    assert held.time <= end.timestamp()
    # It was valid then, which is what openssl says where it is told to look back.
    assert not openssl_verifies(MESSAGE, token, authority.ca, tmp_path)
    assert openssl_verifies(MESSAGE, token, authority.ca, tmp_path, "-attime", str(held.time))


def test_an_answer_that_was_not_granted_is_refused(authority):
    rejected = authority.answer(b"\x30\x03\x02\x01\x01")
    assert decode_timestamp_response(rejected).status == 2
    error = refused(rejected, MESSAGE, [authority.pem])
    assert "not granted" in error.message


def test_an_answer_to_another_request_is_refused(authority):
    request = TimestampRequestBuilder().data(MESSAGE).hash_algorithm(HashAlgorithm.SHA256).build()
    response = authority.answer(request.as_bytes())
    assert check_token(response, MESSAGE, [authority.pem], nonce=request.nonce)
    assert "number of the request" in refused(response, MESSAGE, [authority.pem], nonce=request.nonce + 1).message
    bare = TimestampRequestBuilder().data(MESSAGE).hash_algorithm(HashAlgorithm.SHA256).nonce(nonce=False).build()
    without = authority.answer(bare.as_bytes())
    assert check_token(without, MESSAGE, [authority.pem])
    assert "number of the request" in refused(without, MESSAGE, [authority.pem], nonce=1).message


def ask(url: str, authority: Authority, **options):
    options.setdefault("now", time.time())
    return ask_authority(url, MESSAGE, [authority.pem], **options)


def why(url: str, authority: Authority, **options) -> AnchorError:
    with pytest.raises(AnchorError) as caught:
        ask(url, authority, **options)
    assert url in caught.value.message
    assert caught.value.next_step
    return caught.value


def test_an_authority_is_asked_over_http_and_sees_a_digest_alone(authority):
    with serve(authority.answer) as served:
        held = ask(served.url, authority)
    assert check_token(held.response, MESSAGE, [authority.pem]) == held
    (asked,) = served.asked
    assert MESSAGE[:15] not in asked
    assert len(asked) < 120


def test_an_authority_that_answers_something_else_gives_nothing(authority, other):
    old = authority.stamp(MESSAGE)
    answers = {
        "number of the request": lambda _: old,
        "not a timestamping authority's answer": lambda _: b"nonsense",
        "something else": lambda _: authority.stamp(b"another"),
        "status 500": lambda _: (500, {}, b""),
        "status 302": lambda _: (302, {"Location": "http://127.0.0.1:1/"}, b""),
        "text/html": lambda body: (200, {"Content-Type": "text/html"}, authority.answer(body)),
        "not vouched for": other.answer,
        "not granted": lambda _: authority.answer(b"\x30\x03\x02\x01\x01"),
    }
    for words, answer in answers.items():
        with serve(answer) as served:
            assert words in why(served.url, authority).message


def test_an_authority_whose_clock_is_ahead_gives_nothing(authority):
    with serve(authority.answer) as served:
        assert "future" in why(served.url, authority, now=time.time() - 4000).message


def test_an_authority_that_does_not_answer_is_let_go(authority):
    gone = "http://127.0.0.1:9/tsa"
    assert why(gone, authority).reason == "unreachable"

    def slowly(_):
        time.sleep(1.5)
        return b""

    with serve(slowly) as served:
        assert why(served.url, authority, timeout=0.3).reason == "unreachable"
    with serve(lambda _: b"x" * (2 << 20)) as served:
        assert "more than" in why(served.url, authority).message


@pytest.mark.parametrize(
    "url", ["ftp://a/b", "file:///etc/passwd", "tsa.example", "http://", "http://a b/", "http://a:b/"]
)
def test_what_is_no_address_is_asked_nothing(authority, url):
    for call in (lambda: ask(url, authority), lambda: get(url), lambda: post(url, b"", "a/b")):
        with pytest.raises(ConfigError) as caught:
            call()
        assert caught.value.reason == "url"


def test_trusted_authorities_are_those_in_the_home_or_those_that_are_named(tmp_path, authority, other):
    assert trusted_authorities(tmp_path) == ()
    (tmp_path / "tsa").mkdir()
    shutil.copy(authority.ca, tmp_path / "tsa" / "one.pem")
    (tmp_path / "tsa" / "README").write_text("not a certificate")
    assert trusted_authorities(tmp_path) == (authority.pem,)
    assert trusted_authorities(tmp_path, [other.ca]) == (other.pem,)


def test_a_file_that_holds_no_certificate_is_one_sentence(tmp_path):
    (tmp_path / "empty.pem").write_text("")
    for path in (tmp_path / "nowhere.pem", tmp_path / "empty.pem", tmp_path):
        with pytest.raises(ConfigError) as caught:
            trusted_authorities(tmp_path, [path])
        assert caught.value.reason == "tsa-ca"
        assert str(path) in caught.value.message
