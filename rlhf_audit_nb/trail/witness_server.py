"""A witness behind HTTP (C2SP tlog-witness v1.0.0), for a colleague's trail or a small team's. Floor 0.

========================================  ==========================================================
``POST PREFIX/add-checkpoint``            a submission; what it gets is `Witness.add_checkpoint`'s
``GET PREFIX/HEX/checkpoint``             the last cosigned checkpoint of the origin with that SHA-256
========================================  ==========================================================

It listens on the loopback unless told otherwise, reads no more than a submission can be, waits for no slow caller, and
serves a bounded number of them at once. Requests are authenticated by the log's signature alone, as the protocol wants.
Whoever needs TLS puts a reverse proxy before it.
"""

from __future__ import annotations

import contextlib
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.errors import AuditError, ConfigError
from rlhf_audit_nb.trail.submission import MAX_SUBMISSION
from rlhf_audit_nb.trail.witness import TEXT_KIND, Reply

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.witness import Witness

__all__ = ["IDLE_SECONDS", "MOST_AT_ONCE", "WitnessServer"]

IDLE_SECONDS = 10.0
REQUEST_SECONDS = 30.0
CONNECTION_SECONDS = 300.0
MOST_AT_ONCE = 32

_READ = 64 << 10
_DIGITS = re.compile("[0-9]{1,7}")
_MONITOR = re.compile("/([0-9a-f]{64})/checkpoint")


class WitnessServer(ThreadingHTTPServer):
    """Serves one witness until `stop`.

    Args:
        witness: who cosigns.
        host: where to listen.
        port: 0 takes a free one.
        prefix: what stands before the paths, as ``/witness``.
        say: gets one line a request.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    daemon_threads = False
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(
        self,
        witness: Witness,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        prefix: str = "",
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.witness = witness
        self.prefix = "/" + prefix.strip("/") if prefix.strip("/") else ""
        self._say = say
        self._open: set[socket.socket] = set()
        if ":" in host:
            self.address_family = socket.AF_INET6
        self._places = threading.BoundedSemaphore(MOST_AT_ONCE)
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"Nothing can listen on {host} port {port}: {getattr(error, 'strerror', None) or error}.",
                next_step="Name another --port (0 takes a free one) or --host.",
                code="port",
            ) from error

    def server_bind(self) -> None:
        """Bind without asking a name server who we are, as http.server would."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        """The submission prefix (and the monitoring prefix)."""
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}{self.prefix}"

    def run(self) -> None:
        """Serve until `stop`; a request that has been read is answered."""
        try:
            self.serve_forever(poll_interval=0.1)
        finally:
            for connection in tuple(self._open):
                _hang_up(connection, socket.SHUT_RD)
            self.server_close()

    def stop(self) -> None:
        """Take no more requests; may be called from a signal handler."""
        threading.Thread(target=self.shutdown, daemon=True).start()

    def log(self, client: str, request: str, status: int, said: str) -> None:
        """One line: when, who, what, what came of it."""
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._say(f"{stamp} {client} {request} {status} {said}")

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread a connection, as long as there is a place."""
        if not self._places.acquire(blocking=False):
            self.log(str(client_address[0]), "-", HTTPStatus.SERVICE_UNAVAILABLE, "too many callers at once")
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One connection, for a bounded time; its place is given back."""
        self._open.add(request)
        end = threading.Timer(CONNECTION_SECONDS, _hang_up, (request, socket.SHUT_RDWR))
        end.daemon = True
        end.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            end.cancel()
            self._open.discard(request)
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 (socketserver's signature)
        """A caller who went away is no fault of ours; a fault of ours is one line."""
        self.log(str(client_address[0]), "-", HTTPStatus.INTERNAL_SERVER_ERROR, repr(sys.exc_info()[1]))


def _hang_up(connection: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(how)


class _Handler(BaseHTTPRequestHandler):
    """One connection; several requests, one after the other."""

    server: WitnessServer
    protocol_version = "HTTP/1.1"
    server_version = "rlhf-audit-witness"
    sys_version = ""
    timeout = IDLE_SECONDS
    wbufsize = -1  # an answer goes out in one piece

    def do_POST(self) -> None:
        if self.path != self.server.prefix + "/add-checkpoint":
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing at this path")
            return
        body = self._body()
        if body is None:
            return
        try:
            reply = self.server.witness.add_checkpoint(body)
        except AuditError as error:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "the witness cannot cosign now", error.message)
            return
        self._answer(reply)

    def do_GET(self) -> None:
        found = _MONITOR.fullmatch(self.path.removeprefix(self.server.prefix))
        if found is None or not self.path.startswith(self.server.prefix):
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing at this path")
            return
        try:
            note = self.server.witness.checkpoint(found[1])
        except AuditError as error:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "the witness cannot read its memory", error.message)
            return
        if note is None:
            self._refuse(HTTPStatus.NOT_FOUND, "nothing was cosigned for this origin")
            return
        self._answer(Reply(HTTPStatus.OK, TEXT_KIND, note.encode(), "shown", note.partition("\n")[0]))

    def _body(self) -> bytes | None:
        """The request's body; ``None`` where it was refused."""
        length = self.headers.get("Content-Length", "")
        if not _DIGITS.fullmatch(length) or "Transfer-Encoding" in self.headers:
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "a Content-Length is needed")
            return None
        if int(length) > MAX_SUBMISSION:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {MAX_SUBMISSION} bytes are read")
            return None
        left, parts, until = int(length), [], time.monotonic() + REQUEST_SECONDS
        while left:
            part = self.rfile.read1(min(left, _READ)) if time.monotonic() < until else b""
            if not part:
                self._refuse(HTTPStatus.REQUEST_TIMEOUT, "the body did not come")
                return None
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _answer(self, reply: Reply) -> None:
        what = f"{self.command} {reply.origin or '-'}{'' if reply.size is None else f' {reply.size}'}"
        self.server.log(self.client_address[0], what, reply.status, reply.said)
        self.send_response_only(reply.status)
        self.send_header("Content-Type", reply.kind)
        self.send_header("Content-Length", str(len(reply.body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(reply.body)

    def _refuse(self, status: HTTPStatus, said: str, log: str = "") -> None:
        # What was not read of the body must not be taken for the next request.
        self.close_connection = True
        body = said.encode() + b"\n"
        self._answer(Reply(status, TEXT_KIND, body, log or said))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """What http.server itself refuses: a line that is no request, a method that is not served."""
        self.command = getattr(self, "command", None) or "-"
        said = message or HTTPStatus(code).phrase
        self._refuse(HTTPStatus(code), "".join(char if char.isprintable() else "?" for char in said)[:200])

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (http.server's own name)
        """What http.server would say of its own accord is said by `WitnessServer.log`."""
