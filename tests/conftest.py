"""What every test shares: its own keys' home, no hub, the real data where it lies, and no silent skip in CI."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

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


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """The same for a whole file that skips itself."""
    report = yield
    if os.environ.get(NO_SKIP) and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} would be skipped, and {NO_SKIP} is set: {report.longrepr}"
    return report


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
