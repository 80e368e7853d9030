"""A process that has imported everything once and forks a child for each script: real processes at little cost.

The child runs the script at the top of a main module, with the folder in ``sys.argv[1]``, and comes to a real end:
`atexit` functions, signals and all. The fixture is had by importing
it into a ``conftest.py``.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Child", "Zygote", "zygote"]

SECONDS = 120
ROOT = Path(__file__).parents[2]

_SERVES = """
import json, os, signal, sys
import transformers, torch, rlhf_audit_nb.auditor, rlhf_audit_nb.capture.attach, rlhf_audit_nb.capture.loop
from transformers import Trainer
signal.signal(signal.SIGINT, signal.default_int_handler)
script = None
for line in iter(sys.stdin.readline, ""):
    asked = json.loads(line)
    if "wait" in asked:
        print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    for number, name in enumerate(("in", "out", "err")):
        opened = os.open(asked[name], os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
    sys.stdin = open(0)
    sys.argv, script = ["script", asked["folder"]], asked["script"]
    os.environ.update(asked["environment"])
    break
if script is not None:
    exec(compile(script, "<script>", "exec"))
"""


@dataclass
class Child:
    """A child that runs a script."""

    pid: int
    files: Path
    serving: Zygote

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return (self.files / "out").read_text()

    @property
    def err(self) -> str:
        """What it has complained of so far."""
        return (self.files / "err").read_text()

    def until(self, word: str) -> None:
        """Wait until it has printed ``word``."""
        deadline = time.monotonic() + SECONDS
        while word not in self.out:
            assert time.monotonic() < deadline, self.err
            time.sleep(0.02)

    def wait(self) -> int:
        """How it ended: its status, or minus the signal."""
        return self.serving.ask(wait=self.pid)


class Zygote:
    """The process that forks."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )

    def ask(self, **asked: Any) -> int:
        """One command, and the number that answers it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        self._process.stdin.flush()
        answers = select.poll()  # and not select(), which knows only the first 1,024 descriptors
        answers.register(self._process.stdout, select.POLLIN)
        assert answers.poll(1000 * SECONDS), "the zygote does not answer"
        return int(self._process.stdout.readline())

    def start(self, script: str, folder: Path, said: str = "") -> Child:
        """Run ``script`` with the text ``said`` as its input."""
        self._count += 1
        files = self._home / str(self._count)
        files.mkdir()
        for name, text in (("in", said), ("out", ""), ("err", "")):
            (files / name).write_text(text)
        named = {name: str(files / name) for name in ("in", "out", "err")}
        kept = {name: value for name, value in os.environ.items() if name.startswith("RLHF_AUDIT")}
        return Child(self.ask(script=script, folder=str(folder), environment=kept, **named), files, self)

    def close(self) -> None:
        """End it; its children are bounded by themselves."""
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """One for all tests of the session."""
    serving = Zygote(tmp_path_factory.mktemp("zygote"))
    yield serving
    serving.close()
