"""One request to a service that the user has named: no redirect is followed, and size and time are bounded. Floor 0."""

from __future__ import annotations

import http.client
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from functools import partial
from typing import IO, Any, Self
from urllib.parse import urlsplit

from rlhf_audit_nb.errors import AnchorError, ConfigError

__all__ = ["TIMEOUT", "Answer", "check_url", "get", "post"]

TIMEOUT = 30.0
_MAX_ANSWER = 1 << 20
_READ = 64 << 10


@dataclass(frozen=True)
class Answer:
    """What a service said: the status, the content type without parameters, and the body."""

    status: int
    kind: str
    body: bytes


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like any other: what was not named is not asked."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """No request."""


class _Deadline:
    """Cuts the connection of a request whose answer has not begun in time.

    The timeout of a socket begins anew with each byte, so that a service that sends its headers byte by byte would be
    waited for as long as it likes.
    """

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._connections: list[http.client.HTTPConnection] = []
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def connection(self, kind: type[http.client.HTTPConnection], *args: Any, **options: Any) -> Any:
        """A connection that is cut when the time is over."""
        made = kind(*args, **options)
        self._connections.append(made)
        return made

    def _cut(self) -> None:
        self.passed = True
        for connection in self._connections:
            opened = connection.sock
            if opened is not None:
                with suppress(OSError):
                    opened.shutdown(socket.SHUT_RDWR)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(self._deadline.connection, http.client.HTTPConnection), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(self._deadline.connection, http.client.HTTPSConnection), req)


def check_url(url: str) -> str:
    """``url`` if it is one of http or https with a host.

    Raises:
        ConfigError: it is not.
    """
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        named = False
    if not named or any(char <= " " for char in url):
        raise ConfigError(
            f"{url[:100]!r} is not the address of a service.",
            next_step="Write it with http:// or https://, as its operator gave it.",
            code="url",
        )
    return url


def post(url: str, body: bytes, kind: str, *, timeout: float = TIMEOUT) -> Answer:
    """The answer to ``body`` of content type ``kind``, whatever its status.

    Raises:
        AnchorError: there is no answer in time (``unreachable``), or one that is too large.
        ConfigError: ``url`` is no address.
    """
    return _ask(url, body, {"Content-Type": kind}, timeout)


def get(url: str, *, timeout: float = TIMEOUT) -> Answer:
    """What there is at ``url``; raises like `post`."""
    return _ask(url, None, {}, timeout)


def _ask(url: str, body: bytes | None, headers: dict[str, str], timeout: float) -> Answer:
    headers = {**headers, "User-Agent": "rlhf-audit"}
    request = urllib.request.Request(check_url(url), body, headers)  # noqa: S310 (http or https: checked)
    deadline = _Deadline(timeout)
    opener = urllib.request.build_opener(_NoRedirect, _Http(deadline), _Https(deadline))
    try:
        with deadline:
            try:
                reply = opener.open(request, timeout=timeout)
            except urllib.error.HTTPError as error:
                reply = error
        with reply:
            if deadline.passed:  # headers that are cut look like headers that end
                raise TimeoutError
            return _answer(url, reply.status, reply, timeout)
    except (OSError, http.client.HTTPException) as error:
        if deadline.passed:
            raise _unreachable(url, f"did not begin its answer in {timeout:g} s") from error
        reason = getattr(error, "reason", None) or error
        raise _unreachable(url, f"gave no answer: {reason}") from error


def _answer(url: str, status: int, reply: http.client.HTTPResponse | urllib.error.HTTPError, timeout: float) -> Answer:
    until, parts, size = time.monotonic() + timeout, [], 0
    while part := reply.read1(_READ):
        parts.append(part)
        size += len(part)
        if size > _MAX_ANSWER:
            raise _unreachable(url, f"answered with more than {_MAX_ANSWER} bytes")
        if time.monotonic() > until:
            raise _unreachable(url, f"did not finish its answer in {timeout:g} s")
    length = reply.headers.get("Content-Length", str(size))
    if length != str(size):
        raise _unreachable(url, f"hung up after {size} of {length} bytes")
    return Answer(status, reply.headers.get_content_type(), b"".join(parts))


def _unreachable(url: str, what: str) -> AnchorError:
    return AnchorError(
        f"{url} {what}.",
        next_step="Check the address and the network, then run the same command again; nothing is lost.",
        code="unreachable",
    )
