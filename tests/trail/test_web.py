"""One request to a named service: nobody else is asked, and neither size nor time is without bound."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from support.tsa import serve

from rlhf_audit_nb.errors import AnchorError, ConfigError
from rlhf_audit_nb.trail.web import check_url, get, post


def test_what_is_sent_and_what_comes_back_are_the_same_bytes():
    with serve(lambda body: body[::-1], "text/x.tlog.size") as served:
        answer = post(served.url, b"\0\1\xff" * 1000, "application/x", timeout=10)
    assert served.asked == [b"\0\1\xff" * 1000]
    assert (answer.status, answer.kind, answer.body) == (200, "text/x.tlog.size", b"\xff\1\0" * 1000)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_answer_and_is_not_followed(status):
    with serve(lambda _: b"") as other, serve(lambda _: (status, {"Location": other.url}, b"x")) as served:
        assert post(served.url, b"", "a/b", timeout=10).status == status
        assert other.asked == []


@pytest.mark.parametrize("status", [400, 404, 409, 422, 500, 503])
def test_a_refusal_is_an_answer(status):
    with serve(lambda _: (status, {"Content-Type": "text/plain; charset=utf-8"}, b"why")) as served:
        answer = post(served.url, b"", "a/b", timeout=10)
    assert (answer.status, answer.kind, answer.body) == (status, "text/plain", b"why")


def test_an_answer_has_a_bound():
    with serve(lambda _: b"x" * ((1 << 20) + 1)) as served, pytest.raises(AnchorError) as caught:
        post(served.url, b"", "a/b", timeout=10)
    assert caught.value.reason == "unreachable"


def listen(answer: bytes, *, drip: float = 0.0):
    """A service that says ``answer`` and hangs up, or says a byte at a time."""
    server = socket.create_server(("127.0.0.1", 0))

    def talk() -> None:
        try:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                if not drip:
                    connection.sendall(answer)
                    return
                for at in range(len(answer)):
                    connection.sendall(answer[at : at + 1])
                    time.sleep(drip)
        except OSError:
            pass

    threading.Thread(target=talk, daemon=True).start()
    return server, f"http://127.0.0.1:{server.getsockname()[1]}/"


@pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nshort"])
def test_a_service_that_does_not_speak_http_or_hangs_up_is_unreachable(answer):
    server, url = listen(answer)
    with server, pytest.raises(AnchorError) as caught:
        get(url, timeout=10)
    assert caught.value.reason == "unreachable"


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nX-Long: ", b"HTTP/1.1 ", b""])
def test_a_service_that_drips_its_headers_is_let_go(head):
    server, url = listen(head + b"x" * 60_000, drip=0.05)
    begun = time.monotonic()
    with server, pytest.raises(AnchorError) as caught:
        get(url, timeout=1.0)
    assert time.monotonic() - begun < 5
    assert "did not begin its answer in 1 s" in caught.value.message


def test_a_service_that_drips_is_let_go():
    body = b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + b"x" * 500
    server, url = listen(body, drip=0.1)
    begun = time.monotonic()
    with server, pytest.raises(AnchorError):
        get(url, timeout=1.0)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    "url", ["", "x", "ftp://a/", "file:///a", "http:///a", "http://a\nb/", "http://a:99999/", "//a/b"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError):
        check_url(url)


def test_an_address_is_kept_as_it_is():
    for url in ("http://127.0.0.1:8742", "https://tsa.example/a?b=c", "http://[::1]:80/x"):
        assert check_url(url) == url
