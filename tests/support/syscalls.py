"""Children that are stopped or refused at one system call: forked from a warm process, and traced once they are ready.

A warm process has everything imported. For each case it forks a child, which opens its trail and waits; then strace
attaches, so that only the calls of what follows are counted; then the child goes on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[2]

SERVER = r"""
import ctypes, json, os, signal, socket, sys
from rlhf_audit_nb.errors import AuditError
from rlhf_audit_nb.trail import Trail
from rlhf_audit_nb.trail import ending

WORK = {}
exec(sys.argv[1])

def child(case):
    ending.PATIENCE_SECONDS = 1
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: strace may attach
    line = socket.socket(socket.AF_UNIX)
    line.connect(case["address"])
    def say(**said):
        line.sendall(json.dumps(said).encode() + b"\n")
    def ready():
        say(pid=os.getpid())
        line.recv(1)
    try:
        WORK[case["work"]](case, ready, say)
        say(ended=True)
    except AuditError as error:
        say(error=error.reason, message=str(error))
    except BaseException as error:
        say(crash=f"{type(error).__name__}: {error}")

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    if os.fork() == 0:
        try:
            child(json.loads(line))
        finally:
            os._exit(0)
"""


@dataclass
class Outcome:
    """What a child said before it ended or was killed."""

    promised: list[int] = field(default_factory=list)
    ended: bool = False
    error: str | None = None
    crash: str | None = None


def strace() -> str | None:
    """Where strace is, or ``None`` where it is not here or may not trace."""
    found = shutil.which("strace")
    if found is None or subprocess.run([found, "-o", os.devnull, "true"], capture_output=True, check=False).returncode:
        return None
    return found


class Warm:
    """The warm process; ``work`` is Python that fills ``WORK`` with functions of (case, ready, say)."""

    def __init__(self, tracer: str, work: str) -> None:
        self._tracer = tracer
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, work], stdin=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
        )
        self._folder = Path(tempfile.mkdtemp(prefix="rlhf-audit-"))
        self._cases = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        shutil.rmtree(self._folder)

    def run(self, work: str, place: Path, *tracing: str) -> Outcome:
        """One child's ``work`` on the trail in ``place``, under strace with the options ``tracing``."""
        self._cases += 1
        address = str(self._folder / str(self._cases))
        case = {"work": work, "folder": str(place / "audit"), "home": str(place / "home"), "address": address}
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(address)
            server.listen(1)
            server.settimeout(60)
            self._process.stdin.write(json.dumps(case) + "\n")
            self._process.stdin.flush()
            line, _ = server.accept()
        with line, line.makefile() as said:
            line.settimeout(60)
            first = json.loads(said.readline())
            assert "pid" in first, first
            command = [self._tracer, "-f", "-p", str(first["pid"]), *tracing]
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
                assert "attached" in tracer.stderr.readline()
                line.sendall(b"g")
                outcome = _listen(said)
                tracer.communicate(timeout=60)
        return outcome


def _listen(said) -> Outcome:
    outcome = Outcome()
    try:
        for text in said:
            word = json.loads(text)
            if "index" in word:
                outcome.promised.append(word["index"])
            else:
                vars(outcome).update(word if "message" not in word else {"error": word["error"]})
    except ConnectionResetError:
        pass
    return outcome


CALL = re.compile(r"^\d+ +(\w+)\((.*)$")


@dataclass(frozen=True)
class Call:
    """One call of an undisturbed child: its name, which of that name it was, and its arguments as strace shows them."""

    name: str
    number: int
    text: str


def calls_of(log: str, place: Path) -> list[Call]:
    """The calls in a log of strace (with ``-f -y``) that touch a file under ``place``, in their order."""
    counted: Counter[str] = Counter()
    found = []
    for line in log.splitlines():
        match = CALL.match(line)
        if match:
            counted[match[1]] += 1
            if str(place) in match[2]:
                found.append(Call(match[1], counted[match[1]], match[2]))
    return found
