"""Where a run happens: interpreter, packages, code, hardware, drivers, threads, variables, determinism. Floor 2.

What stands here goes into the open trail, so it names no host, no user and no path. Torch is asked only when it is
already imported; nothing here makes a process load it.

Of environment variables only those are recorded that change what is computed (`VARIABLES`), never one that may name a
host or a person; a value with a path in it is told as ``[path]``.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from rlhf_audit_nb.capture.code import CodeSeen, git_state, local_code, look_at_code, tool_digest
from rlhf_audit_nb.capture.packages import CORE_PACKAGES, installed_packages, list_packages
from rlhf_audit_nb.events import EnvironmentCaptured, encode_body

__all__ = ["VARIABLES", "capture_environment", "installed_packages", "keep_environment"]

MAX_ENVIRONMENT = 60_000
VARIABLES = re.compile(
    r"(?:OMP|MKL|KMP|GOMP|OPENBLAS|BLIS|NUMEXPR|VECLIB|DNNL|ONEDNN|ATEN|TORCH|TORCHINDUCTOR|TORCHDYNAMO|PYTORCH|CUDA"
    r"|CUBLAS|CUBLASLT|CUDNN|NVIDIA_TF32|NCCL|GLOO|HIP|ROCR|HSA|XLA|ACCELERATE|FSDP|DEEPSPEED)_[A-Z0-9_]+"
    r"|PYTHONHASHSEED|PYTHONOPTIMIZE|TOKENIZERS_PARALLELISM|HF_HUB_OFFLINE|HF_DATASETS_OFFLINE|TRANSFORMERS_OFFLINE"
    r"|WORLD_SIZE|RANK|LOCAL_RANK|LOCAL_WORLD_SIZE|RLHF_AUDIT_RECORD"
)
"""The names of the environment variables that are recorded."""
MAX_VALUE = 200
_SPEED = re.compile(r"\s*@.*$")
_HOSTS = re.compile(r"ADDR|HOST|URL|USER|(?:^|_)TOKEN(?:$|_)|KEY|SECRET|PASSW|ENDPOINT|IFNAME")
_DEVICE = re.compile(r"\b(?:GPU|MIG)-[0-9a-fA-F-]{8,}(?:/\d+/\d+)?")
_LIBRARIES = {
    "mkl": re.compile(r"Math Kernel Library Version ([\d.]+)"),
    "onednn": re.compile(r"(?:MKL-DNN|oneDNN) v([\w.]+)"),
    "openmp": re.compile(r"OpenMP (\d+)"),
    "blas": re.compile(r"BLAS_INFO=(\w+)"),
}


def capture_environment(
    folder: Path | None = None,
    code: CodeSeen | None = None,
    *,
    private: bool = False,
    artifacts: Path | None = None,
) -> EnvironmentCaptured:
    """The environment of this process.

    Args:
        folder: asked for its git commit and for local code; default: the working directory.
        code: the local code, where it was looked at already.
        private: whether the run is under differential privacy: then no digest of uncommitted changes is taken, which
            may hold rows.
        artifacts: where lists that are too long for an entry are kept, named by their digests.
    """
    folder = folder or Path.cwd()
    git = git_state(folder, diff=not private)
    listed = msgspec.json.encode(list_packages(), order="sorted")
    return EnvironmentCaptured(
        python=platform.python_version(),
        implementation=platform.python_implementation(),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages=installed_packages(),
        hardware=_hardware(),
        threads=_threads(),
        determinism=_determinism(),
        git_commit=git.commit,
        git_dirty=git.dirty,
        git_diff=git.diff,
        code=local_code(code or look_at_code(folder), artifacts),
        packages_digest=_keep(listed, artifacts),
        tool_digest=tool_digest(),
        drivers=_drivers(),
        variables=_variables(),
    )


def keep_environment(artifacts: Path, code: CodeSeen, *, private: bool) -> EnvironmentCaptured:
    """The environment as it fits into an entry; what is too long lies in ``artifacts``, named by its digest."""
    event = capture_environment(code.folder, code, private=private, artifacts=artifacts)
    if len(encode_body(event)) <= MAX_ENVIRONMENT:
        return event
    kept = {name: event.packages[name] for name in CORE_PACKAGES if name in event.packages}
    all_of_them = f"{len(event.packages)} packages in artifacts/{event.packages_digest}.json"
    return msgspec.structs.replace(event, packages={**kept, "*": all_of_them})


def _keep(content: bytes, artifacts: Path | None) -> str:
    digest = hashlib.sha256(content).hexdigest()
    if artifacts is not None:
        (artifacts / f"{digest}.json").write_bytes(content)
    return digest


def _variables() -> dict[str, str]:
    return {name: _open_value(value) for name, value in sorted(os.environ.items()) if _is_told(name)}


def _is_told(name: str) -> bool:
    return VARIABLES.fullmatch(name) is not None and _HOSTS.search(name) is None


def _open_value(value: str) -> str:
    """A value without paths and without the serial numbers of devices."""
    if "/" in _DEVICE.sub("", value) or "\\" in value or value.startswith("~"):
        return "[path]"
    return _DEVICE.sub("[device]", value)[:MAX_VALUE]


def _drivers() -> dict[str, Any]:
    """Versions of what computes, and what the processor lets it use; what is not there is left out."""
    return {name: value for name, value in _versions() if value is not None}


def _versions() -> Iterator[tuple[str, Any]]:
    yield "nvidia_driver", _first_line(Path("/sys/module/nvidia/version"))
    torch = sys.modules.get("torch")
    if torch is None:
        return
    yield "cuda", torch.version.cuda
    yield "hip", torch.version.hip
    yield "cpu_capability", _asked(torch.backends.cpu.get_cpu_capability)
    yield "interop_threads", _asked(torch.get_num_interop_threads)
    built = _asked(torch.__config__.show) or ""
    for name, rule in _LIBRARIES.items():
        found = rule.search(built)
        yield name, found.group(1) if found else None
    if torch.cuda.is_available():
        yield "cudnn", _asked(torch.backends.cudnn.version)
        yield "nccl", _asked(lambda: ".".join(map(str, torch.cuda.nccl.version())))


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip() or None
    except OSError:
        return None


def _asked(question: Callable[[], Any]) -> Any:
    """What torch answers; ``None`` where this build or version of it has no answer."""
    try:
        return question()
    except (AttributeError, RuntimeError, TypeError):
        return None


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
    return [
        {"name": gpu.name, "memory_bytes": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"} for gpu in found
    ]


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
        more = {name: _asked(question) for name, question in _further_flags(torch)}
        flags.update({name: value for name, value in more.items() if value is not None})
    return flags


def _further_flags(torch: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    matmul, cuda = torch.backends.cuda.matmul, torch.backends.cuda
    yield "deterministic_warn_only", torch.is_deterministic_algorithms_warn_only_enabled
    yield "fill_uninitialized_memory", lambda: bool(torch.utils.deterministic.fill_uninitialized_memory)
    yield "float32_matmul_precision", torch.get_float32_matmul_precision
    yield "tf32_cudnn", lambda: bool(torch.backends.cudnn.allow_tf32)
    yield "bf16_reduced_precision", lambda: bool(matmul.allow_bf16_reduced_precision_reduction)
    yield "fp16_reduced_precision", lambda: bool(matmul.allow_fp16_reduced_precision_reduction)
    yield "onednn_deterministic", lambda: bool(torch.backends.mkldnn.deterministic)
    for kind in ("flash", "mem_efficient", "math", "cudnn"):
        yield f"sdp_{kind}", getattr(cuda, f"{kind}_sdp_enabled", lambda: None)
