"""What every test shares: its own keys' home, no hub, the real data where it lies, and no silent skip in CI."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from rlhf_audit_nb.errors import AuditError

SHARED = Path(__file__).resolve().parents[2] / "shared"
NO_SKIP = "RLHF_AUDIT_NO_SKIP"


def pytest_configure(config):
    """Before anything is imported: one thread, no network, no key of the person who runs the tests."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    for name in ("RLHF_AUDIT_TRAIL", "RLHF_AUDIT_PASSPHRASE", "RLHF_AUDIT_RECORD"):
        os.environ.pop(name, None)
    home = tempfile.TemporaryDirectory(prefix="rlhf-audit-tests-")
    os.environ["RLHF_AUDIT_HOME"] = home.name
    config.add_cleanup(home.cleanup)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where nothing may be lacking, a skip is a failure that tells its reason."""
    report = yield
    if os.environ.get(NO_SKIP) and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} would be skipped, and {NO_SKIP} is set: {report.longrepr}"
    return report


def pytest_runtest_logreport(report):
    """Say at once what failed: a run that is cut off by its machine prints no summary any more."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        why = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
        print(f"\nFAILED at once: {report.nodeid} ({report.when}): {why[:400]}", file=sys.__stderr__, flush=True)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """The same for a whole file that skips itself."""
    report = yield
    if os.environ.get(NO_SKIP) and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} would be skipped, and {NO_SKIP} is set: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def _trails_are_let_go():
    """Close the trails that a test left open, as a process's end does: a notebook keeps its few, a suite has thousands.

    Those of fixtures of a wider scope were open before and stay so.
    """
    before = set(_open_trails())
    yield
    for writer in set(_open_trails()) - before:
        # A test may have left it broken on purpose; that is told to the test, not here.
        with contextlib.suppress(AuditError):
            writer.close()


def _open_trails() -> Iterable[Any]:
    ending = sys.modules.get("rlhf_audit_nb.trail.ending")
    return list(ending._OPEN) if ending is not None else ()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds the package, its README and its templates."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def llmfao() -> Path:
    """Real human preferences with annotators (CC BY 4.0); skips where they are not beside the repository."""
    folder = SHARED / "data" / "llmfao"
    if not folder.is_dir():
        pytest.skip(f"needs the preference data in {folder}")
    return folder


@pytest.fixture(scope="session")
def ukpconvarg1() -> Path:
    """Real human judgements of arguments with annotators (CC BY 4.0); skips where they are missing."""
    folder = SHARED / "data" / "ukpconvarg1"
    if not folder.is_dir():
        pytest.skip(f"needs the preference data in {folder}")
    return folder


@pytest.fixture(scope="session")
def command() -> list[str]:
    """How the command is called in a process of its own, with the interpreter that runs the tests."""
    return [sys.executable, "-m", "rlhf_audit_nb.cli"]


@pytest.fixture(scope="session")
def demo(tmp_path_factory, command) -> Path:
    """A folder in which the demo has been shown once (``out/demo``); treat it as read-only."""
    workers = tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else None
    folder = (workers or tmp_path_factory.getbasetemp()) / "shown"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            making = tmp_path_factory.mktemp("showing")
            environment = {**os.environ, "RLHF_AUDIT_HOME": str(making / "home")}
            asked = [*command, "demo", "--steps", "6", "--json"]
            done = subprocess.run(asked, cwd=making, env=environment, capture_output=True, text=True, check=False)
            (making / "said.json").write_text(done.stdout, encoding="utf-8")
            assert done.returncode == 0, done.stderr
            making.rename(folder)
    return folder
