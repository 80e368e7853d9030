"""What is recorded of the machine: enough to rebuild it, nothing that names a person or a place."""

from __future__ import annotations

import getpass
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

from rlhf_audit_nb.capture.environment import capture_environment, installed_packages
from rlhf_audit_nb.events import encode_body


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", folder, *settings, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_packages_are_listed_with_their_versions():
    packages = installed_packages()
    assert packages["transformers"] == version("transformers")
    assert packages["rlhf-audit-trail"] == version("rlhf-audit-trail")


def test_neither_host_nor_user_nor_path_is_named(tmp_path):
    body = encode_body(capture_environment(tmp_path)).decode()
    for secret in (socket.gethostname(), str(Path.home()), str(tmp_path), str(Path.cwd())):
        assert secret not in body
    assert f'"{getpass.getuser()}"' not in body


def test_hardware_is_described(tmp_path):
    hardware = capture_environment(tmp_path).hardware
    assert hardware["cores"] >= 1
    assert hardware["memory_bytes"] > 1_000_000
    assert hardware["cpu"]


def test_outside_a_repository_there_is_no_commit(tmp_path):
    found = capture_environment(tmp_path)
    assert found.git_commit is None
    assert found.git_dirty is None


def test_a_clean_and_a_changed_repository_differ(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "a.txt").write_text("one")
    git(tmp_path, "add", "a.txt")
    git(tmp_path, "commit", "-q", "-m", "first")
    clean = capture_environment(tmp_path)
    (tmp_path / "a.txt").write_text("two")
    changed = capture_environment(tmp_path)
    assert clean.git_commit == changed.git_commit == git(tmp_path, "rev-parse", "HEAD")
    assert (clean.git_dirty, changed.git_dirty) == (False, True)


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert capture_environment(Path.cwd()).git_commit is None


def test_determinism_flags_follow_torch(tmp_path):
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        assert capture_environment(tmp_path).determinism["deterministic_algorithms"] is True
        torch.use_deterministic_algorithms(False)
        assert capture_environment(tmp_path).determinism["deterministic_algorithms"] is False
    finally:
        torch.use_deterministic_algorithms(before)


def test_the_entry_is_small_enough_for_the_trail(tmp_path):
    assert len(encode_body(capture_environment(tmp_path))) < 60_000


def test_variables_that_matter_are_told_without_hosts_and_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("NCCL_TOPO_FILE", "/home/somebody/topology.xml")
    monkeypatch.setenv("NCCL_SOCKET_HOST", "machine-seven")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f1c2b3d-0000-1111-2222-333344445555,1")
    monkeypatch.setenv("TORCH_HUB_TOKEN", "planted-value-1")
    monkeypatch.setenv("EDITOR", "ed")
    variables = capture_environment(tmp_path).variables
    assert variables["OMP_NUM_THREADS"] == "3"
    assert variables["TOKENIZERS_PARALLELISM"] == "false"
    assert variables["NCCL_TOPO_FILE"] == "[path]"
    assert variables["CUDA_VISIBLE_DEVICES"] == "[device],1"
    assert not {"NCCL_SOCKET_HOST", "TORCH_HUB_TOKEN", "EDITOR"} & set(variables)


def test_what_computes_is_named_with_its_version(tmp_path):
    import torch

    found = capture_environment(tmp_path)
    assert found.drivers["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert found.drivers.get("cuda") == torch.version.cuda
    assert ("nccl" in found.drivers) == torch.cuda.is_available()
    built = torch.__config__.show()
    assert all(found.drivers[name] in built for name in ("mkl", "onednn") if name in found.drivers)


def test_more_flags_of_determinism_follow_torch(tmp_path):
    import torch

    before = torch.get_float32_matmul_precision(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.set_float32_matmul_precision("high")
        torch.utils.deterministic.fill_uninitialized_memory = False
        found = capture_environment(tmp_path).determinism
        assert (found["float32_matmul_precision"], found["fill_uninitialized_memory"]) == ("high", False)
        torch.set_float32_matmul_precision("highest")
        torch.utils.deterministic.fill_uninitialized_memory = True
        found = capture_environment(tmp_path).determinism
        assert (found["float32_matmul_precision"], found["fill_uninitialized_memory"]) == ("highest", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
    assert {"sdp_flash", "sdp_math", "deterministic_warn_only"} <= set(found)


def test_changes_are_digested_only_where_no_privacy_forbids_it(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "a.txt").write_text("one")
    git(tmp_path, "add", "a.txt")
    git(tmp_path, "commit", "-q", "-m", "first")
    (tmp_path / "a.txt").write_text("two")
    assert capture_environment(tmp_path).git_diff is not None
    private = capture_environment(tmp_path, private=True)
    assert (private.git_diff, private.git_dirty) == (None, True)
