"""A record goes through a real Jupyter server's contents API, unchanged, as an editor loads and saves it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from rlhf_audit_nb.records import open_record
from rlhf_audit_nb.trail import Level

pytestmark = pytest.mark.slow

TOKEN = "t" * 32


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Server:
    """A Jupyter server on the loopback, rooted in one folder."""

    def __init__(self, root):
        self.root, self.port = root, free_port()
        quiet = {f"JUPYTER_{name}_DIR": str(root / ".jupyter" / name) for name in ("CONFIG", "DATA", "RUNTIME")}
        command = [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
        command += [f"--port={self.port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}"]
        self.process = subprocess.Popen(
            [*command, f"--ServerApp.root_dir={root}"],
            env={**os.environ, **quiet},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def ask(self, method: str, path: str, body: dict | None = None) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"token {TOKEN}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def wait(self) -> None:
        limit = time.monotonic() + 60
        while True:
            try:
                self.ask("GET", "status")
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < limit
                assert self.process.poll() is None
                time.sleep(0.1)
            else:
                return


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    served = Server(tmp_path_factory.mktemp("served"))
    try:
        served.wait()
        yield served
    finally:
        served.process.terminate()
        served.process.wait(timeout=30)


def whole_floats_as_integers(value):
    """What a browser's JSON makes of a notebook: 1.0 and 1 are one number, written 1."""
    if isinstance(value, dict):
        return {key: whole_floats_as_integers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole_floats_as_integers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@pytest.mark.parametrize("times", [1, 3])
def test_loading_and_saving_through_the_server_is_no_change(made, server, times):
    name = f"record-{times}.ipynb"
    shutil.copy(made.path, server.root / name)
    for _ in range(times):
        model = server.ask("GET", f"contents/{name}?content=1")
        content = whole_floats_as_integers(model["content"])
        # JupyterLab, once its kernel is connected, writes what the kernel says of itself.
        content["metadata"]["kernelspec"] = {"display_name": "Some Python", "language": "python", "name": "python3"}
        content["metadata"]["language_info"].update(version="3.12.1", codemirror_mode={"name": "ipython", "version": 3})
        server.ask("PUT", f"contents/{name}", {"type": "notebook", "format": "json", "content": content})
    assert (server.root / name).read_bytes() != made.path.read_bytes()
    opened = open_record(server.root / name, policy=made.policy, home=server.root / ".home")
    assert (opened.verdict.level, opened.verdict.reasons) == (Level.UNANCHORED, ())


def test_editing_a_cell_through_the_server_is_a_change(made, server):
    shutil.copy(made.path, server.root / "edited.ipynb")
    content = server.ask("GET", "contents/edited.ipynb?content=1")["content"]
    content["cells"][0]["source"] += "!"
    server.ask("PUT", "contents/edited.ipynb", {"type": "notebook", "format": "json", "content": content})
    verdict = open_record(server.root / "edited.ipynb", policy=made.policy, home=server.root / ".home").verdict
    assert [reason.where for reason in verdict.reasons] == ["cells[0].source"]
