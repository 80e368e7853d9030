"""Where a run happens: interpreter, packages, code version, hardware, threads, determinism. Floor 2.

What stands here goes into the open trail, so it names no host, no user and no path. Torch is asked only when it is
already imported; nothing here makes a process load it.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf_audit_nb.events import EnvironmentCaptured

__all__ = ["capture_environment", "installed_packages"]

GIT_TIMEOUT_S = 10.0
_SPEED = re.compile(r"\s*@.*$")


def capture_environment(folder: Path | None = None) -> EnvironmentCaptured:
    """The environment of this process; ``folder`` (default: the working directory) is asked for its git commit."""
    commit, dirty = _git(folder or Path.cwd())
    return EnvironmentCaptured(
        python=platform.python_version(),
        implementation=platform.python_implementation(),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages=installed_packages(),
        hardware=_hardware(),
        threads=_threads(),
        determinism=_determinism(),
        git_commit=commit,
        git_dirty=dirty,
    )


def installed_packages() -> dict[str, str]:
    """Every installed distribution with its version, by normalised name."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # a half-removed distribution has none
            # The first one on sys.path is the one that is imported.
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version or "unknown")
    return dict(sorted(found.items()))


def _git(folder: Path) -> tuple[str | None, bool | None]:
    commit = _git_output(folder, "rev-parse", "HEAD")
    if commit is None:
        return None, None
    changes = _git_output(folder, "status", "--porcelain", "--untracked-files=no")
    return commit.strip(), None if changes is None else bool(changes.strip())


def _git_output(folder: Path, *arguments: str) -> str | None:
    """What git answers, or ``None`` where there is no git, no repository or no answer in time."""
    try:
        answer = subprocess.run(
            ["git", "-C", os.fspath(folder), *arguments],
            capture_output=True,
            check=True,
            timeout=GIT_TIMEOUT_S,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.decode("utf-8", "replace")


def _hardware() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory(),
        "gpus": _gpus(),
    }


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return _SPEED.sub("", value.strip())
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _gpus() -> list[dict[str, Any]]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in found]


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else None


def _determinism() -> dict[str, Any]:
    flags: dict[str, Any] = {
        name: os.environ[name] for name in ("PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG") if name in os.environ
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        flags["deterministic_algorithms"] = bool(torch.are_deterministic_algorithms_enabled())
        flags["cudnn_deterministic"] = bool(torch.backends.cudnn.deterministic)
        flags["cudnn_benchmark"] = bool(torch.backends.cudnn.benchmark)
        flags["tf32_matmul"] = bool(torch.backends.cuda.matmul.allow_tf32)
    return flags
