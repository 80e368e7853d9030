"""A real JupyterLab on loopback and a headless Chromium to look at it, as fixtures.

A test imports what it uses: ``from support.lab import browser, lab`` and takes them as arguments. ``lab`` serves an
empty folder of its own (``lab.root``) with private configuration, so that nothing of the person who runs the tests is
read or changed; kernels run this interpreter. ``lab.open(browser, notebook)`` returns a `Notebook`, which drives the
page by JupyterLab's own commands. Both skip with the reason where JupyterLab or Chromium is missing. Pictures taken
with `picture` go to the folder named by ``RLHF_AUDIT_SCREENSHOTS``, if it is set.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Lab", "Notebook", "browser", "lab", "picture", "running_lab"]

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCREENSHOTS = "RLHF_AUDIT_SCREENSHOTS"
_WIDGET = "jupyterapp.shell.currentWidget"


@dataclass
class Notebook:
    """A notebook that is open in a page."""

    page: Any

    def command(self, name: str, **arguments: Any) -> None:
        """Run one of JupyterLab's commands and wait for it."""
        self.page.evaluate("([name, args]) => jupyterapp.commands.execute(name, args)", [name, arguments])

    def start_all(self) -> None:
        """Begin to run all cells; does not wait for them."""
        self.page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells'); }")

    def wait_idle(self, seconds: float = 30) -> None:
        """Wait until each code cell has run and the kernel has nothing to do."""
        script = f"""() => {{
          const cells = [...{_WIDGET}.content.widgets].filter(c => c.model.type === 'code');
          return cells.every(c => c.model.executionCount)
            && {_WIDGET}.sessionContext.session.kernel.status === 'idle';
        }}"""
        self.page.wait_for_function(script, timeout=1000 * seconds)

    def save(self) -> None:
        """Save the notebook."""
        self.command("docmanager:save")

    def reload(self) -> None:
        """Load the page again, as a person would, and wait for the notebook."""
        self.page.reload()
        _wait_for_cells(self.page)

    def dark(self) -> None:
        """Change to JupyterLab's dark theme."""
        self.command("apputils:change-theme", theme="JupyterLab Dark")
        self.page.wait_for_selector('[data-jp-theme-light="false"]', state="attached")
        self.page.wait_for_timeout(300)  # the theme's style sheet comes after its mark

    def light(self) -> None:
        """Change to JupyterLab's light theme."""
        self.command("apputils:change-theme", theme="JupyterLab Light")
        self.page.wait_for_selector('[data-jp-theme-light="true"]', state="attached")
        self.page.wait_for_timeout(300)


@dataclass
class Lab:
    """A JupyterLab that runs: where it answers and which folder it shows."""

    url: str
    token: str
    root: Path

    def open(self, browser: Any, name: str, *, width: int = 1280, height: int = 900) -> Notebook:
        """Open the notebook ``name`` (a path below ``root``) in a new page, and wait for its cells and its kernel."""
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto(f"{self.url}/lab/tree/{name}?token={self.token}&reset")
        _wait_for_cells(page)
        return Notebook(page)


def _wait_for_cells(page: Any) -> None:
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=30_000)
    page.wait_for_selector("#jupyterlab-splash", state="detached", timeout=30_000)
    page.wait_for_function(
        f"() => {_WIDGET}?.sessionContext?.session?.kernel?.connectionStatus === 'connected'", timeout=30_000
    )
    page.evaluate("() => { if (!jupyterapp.shell.leftCollapsed) jupyterapp.shell.collapseLeft(); }")


def picture(target: Any, name: str, **settings: Any) -> None:
    """Take a picture of a page or an element, where a folder for pictures is named."""
    folder = os.environ.get(SCREENSHOTS)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        target.screenshot(path=str(Path(folder) / f"{name}.png"), **settings)


@contextmanager
def running_lab(folder: Path) -> Iterator[Lab]:
    """JupyterLab on a free port of loopback, with everything of its own below ``folder``; ends when left."""
    root = folder / "work"
    root.mkdir(parents=True)
    environment = _environment(folder)
    port, token = _free_port(), secrets.token_hex(16)
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"),
        *("--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}"),
        *("--LabApp.extension_manager=readonly", "--LabApp.news_url=", "--LabApp.expose_app_in_browser=True"),
    ]
    log = (folder / "lab.log").open("wb")
    server = subprocess.Popen(command, env=environment, cwd=root, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for_server(server, port, token, folder / "lab.log")
        yield Lab(f"http://127.0.0.1:{port}", token, root)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        log.close()


def _environment(folder: Path) -> dict[str, str]:
    config = folder / "config"
    announcements = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (config / "labconfig").mkdir(parents=True)
    (config / "labconfig" / "page_config.json").write_text(json.dumps(announcements))
    ours = {
        "JUPYTER_CONFIG_DIR": config,
        "JUPYTER_DATA_DIR": folder / "data",
        "JUPYTER_RUNTIME_DIR": folder / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": folder / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": folder / "workspaces",
        "IPYTHONDIR": folder / "ipython",
        "RLHF_AUDIT_HOME": folder / "home",
    }
    for path in ours.values():
        path.mkdir(exist_ok=True)
    return {**os.environ, **{name: str(path) for name, path in ours.items()}}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for_server(server: subprocess.Popen[bytes], port: int, token: str, log: Path, seconds: float = 60) -> None:
    address = f"http://127.0.0.1:{port}/api/status?token={token}"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    pytest.fail(f"JupyterLab did not answer within {seconds} s; its log:\n{log.read_text(errors='replace')[-3000:]}")


@contextmanager
def _chromium(playwright: Any) -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_ARGS)
        yield browser
        browser.close()


def _shared(config: pytest.Config, key: pytest.StashKey[Any], make: Callable[[], AbstractContextManager[Any]]) -> Any:
    """One of its kind in the whole session, in however many files the fixture is imported."""
    if key not in config.stash:
        stack = ExitStack()
        config.stash[key] = stack.enter_context(make())
        config.add_cleanup(stack.close)
    return config.stash[key]


_BROWSER: pytest.StashKey[Any] = pytest.StashKey()
_LAB: pytest.StashKey[Any] = pytest.StashKey()


@pytest.fixture(scope="session")
def browser(request: pytest.FixtureRequest) -> Any:
    """Headless Chromium; skips with the reason where it is missing."""
    if not CHROMIUM.exists():
        pytest.skip(f"needs Chromium at {CHROMIUM} (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    return _shared(request.config, _BROWSER, lambda: _chromium(playwright))


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """One JupyterLab for the whole session; skips with the reason where it is not installed."""
    pytest.importorskip("jupyterlab", reason="needs JupyterLab (pip install jupyterlab)")
    server: Lab = _shared(request.config, _LAB, lambda: running_lab(tmp_path_factory.mktemp("lab")))
    return server
