"""A witness behind HTTP, asked by a client that is built from the text of C2SP tlog-witness alone."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager

import pytest
from support.witnesses import Log, check_cosignature

from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.trail import witness_server
from rlhf_audit_nb.trail.web import post
from rlhf_audit_nb.trail.witness import Witness
from rlhf_audit_nb.trail.witness_server import WitnessServer


@contextmanager
def running(witness, **options):
    said = []
    server = WitnessServer(witness, say=said.append, **options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server, said
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def witness(tmp_path):
    return Witness.create(tmp_path / "witness", "witness.example/alice")


@pytest.fixture
def log(witness):
    made = Log("log.example/a").grow(300)
    witness.add_log(made.vkey)
    return made


@pytest.fixture
def served(witness, log):
    with running(witness) as (server, said):
        yield server, said


class Client:
    """tlog-witness in a few lines: one keep-alive connection."""

    def __init__(self, server: WitnessServer) -> None:
        self.server = server
        self.connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)

    def call(self, method: str, path: str, body: bytes | None = None, headers=()):
        self.connection.request(method, self.server.prefix + path, body, dict(headers))
        reply = self.connection.getresponse()
        return reply.status, reply.headers.get("Content-Type"), reply.read()

    def add(self, body: bytes):
        return self.call("POST", "/add-checkpoint", body)


def test_an_independent_client_gets_cosignatures_that_hold_over_one_connection(served, witness, log):
    client, (server, said) = Client(served[0]), served
    for old, size in ((0, 1), (1, 255), (255, 257), (257, 257)):
        status, _, body = client.add(log.body(old, size))
        assert status == 200
        (line,) = body.decode().splitlines()
        when = check_cosignature(line, log.head(size).partition("\n\n")[0] + "\n", witness.vkeys[0])
        assert abs(when - time.time()) < 60
    assert len(said) == 4
    assert said[-1].endswith(f"127.0.0.1 POST {log.origin} 257 200 cosigned")
    assert server.url == f"http://127.0.0.1:{server.server_port}"


def test_each_refusal_has_its_status_and_the_next_request_is_served(served, log):
    client = Client(served[0])
    assert client.add(log.body(0, 10))[0] == 200
    stranger, forger = Log("log.example/b").grow(5), Log(log.origin).grow(20)
    cases = {
        400: log.body(10, 20).replace(b"old 10\n", b"old 21\n"),
        403: forger.body(10),
        404: stranger.body(0),
        422: log.forked(9).body(10, 20),
    }
    for status, body in cases.items():
        assert client.add(body)[0] == status
    assert client.add(log.body(0, 20)) == (409, "text/x.tlog.size", b"10\n")
    assert client.add(log.body(10, 10).replace(log.head(10).encode(), log.forked(9).head(10).encode()))[0] == 422
    assert client.add(log.body(10, 20))[0] == 200
    assert [line.split()[-1] for line in served[1] if " 409 " in line] == ["0"]


def test_monitors_can_read_the_last_cosigned_checkpoint(served, witness, log):
    client = Client(served[0])
    path = f"/{hashlib.sha256(log.origin.encode()).hexdigest()}/checkpoint"
    assert client.call("GET", path)[0] == 404
    client = Client(served[0])
    line = client.add(log.body(0, 10))[2].decode()
    status, kind, body = client.call("GET", path)
    assert (status, kind, body.decode()) == (200, "text/plain; charset=utf-8", log.head(10) + line)
    assert Client(served[0]).call("GET", f"/{'0' * 64}/checkpoint")[0] == 404


def test_what_the_protocol_has_not_is_refused(served, log):
    for method, path in (("GET", "/"), ("POST", "/"), ("POST", "/add-checkpoint/"), ("GET", "/../witness.json")):
        assert Client(served[0]).call(method, path, b"" if method == "POST" else None)[0] == 404
    for method in ("PUT", "DELETE", "OPTIONS"):
        assert Client(served[0]).call(method, "/add-checkpoint", b"")[0] == 501


def test_a_prefix_stands_before_the_paths(witness, log):
    with running(witness, prefix="/w/alice/") as (server, _):
        assert server.url.endswith("/w/alice")
        assert Client(server).add(log.body(0, 5))[0] == 200
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        connection.request("POST", "/add-checkpoint", log.body(5, 6))
        assert connection.getresponse().status == 404


def test_it_listens_on_the_loopback_of_either_kind(witness, log):
    for host, shown in (("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("::1", "[::1]")):
        try:
            with running(witness, host=host) as (server, _):
                assert server.url == f"http://{shown}:{server.server_port}"
                assert post(server.url + "/add-checkpoint", log.body(9, 20), "text/plain").status == 409
        except ConfigError:
            assert host == "::1"  # a machine without IPv6
    with running(witness) as (server, _):
        assert server.server_address[0] == "127.0.0.1"


def raw(server, data: bytes, *, then: float = 0.0) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(data)
        time.sleep(then)
        parts = []
        try:
            while part := connection.recv(65536):
                parts.append(part)
        except (TimeoutError, ConnectionResetError):
            pass
    return b"".join(parts)


def test_a_body_without_length_too_long_or_in_chunks_is_not_read(served):
    head = b"POST /add-checkpoint HTTP/1.1\r\nHost: x\r\n"
    assert raw(served[0], head + b"\r\n").startswith(b"HTTP/1.1 411")
    assert raw(served[0], head + b"Content-Length: -1\r\n\r\n").startswith(b"HTTP/1.1 411")
    assert raw(served[0], head + b"Content-Length: 99999999999999999999\r\n\r\n").startswith(b"HTTP/1.1 411")
    assert raw(served[0], head + b"Content-Length: 300000\r\n\r\n").startswith(b"HTTP/1.1 413")
    chunked = b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    answer = raw(served[0], head + chunked)
    assert answer.startswith(b"HTTP/1.1 411")
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("data", [b"\0\1\2\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"x" * 70_000])
def test_what_is_no_request_gets_an_answer_and_one_line_without_control_characters(served, data):
    raw(served[0], data)
    assert Client(served[0]).call("GET", "/")[0] == 404
    assert all(line.isprintable() for line in served[1])


def test_a_caller_who_sends_too_slowly_is_let_go_and_others_are_served_meanwhile(witness, log, monkeypatch):
    monkeypatch.setattr(witness_server._Handler, "timeout", 0.4)
    with running(witness) as (server, _):
        answers = []
        head = b"POST /add-checkpoint HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nold"
        slow = threading.Thread(target=lambda: answers.append(raw(server, head)))
        slow.start()
        assert Client(server).add(log.body(0, 5))[0] == 200
        slow.join(15)
        assert not slow.is_alive()
    assert not answers[0] or answers[0].startswith(b"HTTP/1.1 408")


def test_a_caller_who_drips_is_let_go_in_the_end(witness, log, monkeypatch):
    monkeypatch.setattr(witness_server, "CONNECTION_SECONDS", 1.0)
    with running(witness) as (server, _):
        begun = time.monotonic()
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n")
            try:
                for _ in range(100):
                    connection.sendall(b"X: y\r\n")
                    time.sleep(0.1)
            except OSError:
                pass
        assert time.monotonic() - begun < 8


def test_only_so_many_are_served_at_once(witness, log, monkeypatch):
    monkeypatch.setattr(witness_server, "MOST_AT_ONCE", 2)
    with running(witness) as (server, said):
        idle = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(2)]
        time.sleep(0.3)
        with pytest.raises((http.client.HTTPException, OSError)):
            Client(server).add(log.body(0, 5))
        for connection in idle:
            connection.close()
        deadline = time.monotonic() + 10
        while True:
            try:
                assert Client(server).add(log.body(0, 5))[0] == 200
                break
            except (http.client.HTTPException, OSError):
                assert time.monotonic() < deadline
                time.sleep(0.05)
    assert any("too many" in line for line in said)


def test_many_at_once_are_each_answered_and_one_is_first(served, witness, log):
    statuses, barrier = [], threading.Barrier(12)

    def ask(size: int) -> None:
        client = Client(served[0])
        barrier.wait()
        statuses.append(client.add(log.body(0, size))[0])

    threads = [threading.Thread(target=ask, args=(size,)) for size in range(1, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200, *[409] * 11]


def test_a_memory_that_fails_is_said_to_its_operator_alone(served, witness, log):
    (witness.folder / "state.sqlite").unlink()
    status, _, body = Client(served[0]).add(log.body(0, 5))
    assert status == 500
    assert str(witness.folder).encode() not in body
    assert "state.sqlite" in served[1][-1]


def test_an_address_that_is_taken_is_one_sentence(witness, served):
    with pytest.raises(ConfigError) as caught:
        WitnessServer(witness, port=served[0].server_port)
    assert caught.value.reason == "port"
    with pytest.raises(ConfigError):
        WitnessServer(witness, port=70_000)
    with pytest.raises(ConfigError):
        WitnessServer(witness, host="nowhere.invalid")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_told_to_stop(command, witness, log, number):
    asked = [*command, "witness", "serve", str(witness.folder), "--port", "0", "--json"]
    serving = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = json.loads(serving.stdout.readline())["url"]
        port = int(url.rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("POST", "/add-checkpoint", log.body(0, 5))
        assert connection.getresponse().status == 200
        os.kill(serving.pid, number)
        _, said = serving.communicate(timeout=30)
    finally:
        serving.kill()
    assert serving.returncode == 0
    assert "200 cosigned" in said
    assert said.splitlines()[-1] == "stopped"
    assert "Traceback" not in said
