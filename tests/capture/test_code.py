"""Which local code is named, by what, and what is noticed of its changes."""

from __future__ import annotations

import hashlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_audit_nb.capture import code as module
from rlhf_audit_nb.capture.code import code_since, git_state, local_code, look_at_code, tool_digest


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", folder, *settings, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with two modules, of which ``aid_one`` in a package is imported."""
    folder = tmp_path / "project"
    (folder / "aids").mkdir(parents=True)
    (folder / "aids" / "__init__.py").touch()
    (folder / "aids" / "aid_one.py").write_text("VALUE = 1\n")
    (folder / "aid_two.py").write_text("VALUE = 2\n")
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    importlib.import_module("aids.aid_one")
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("aid"):
            del sys.modules[name]


def test_imported_local_modules_are_named_below_the_project_with_their_digests(project):
    seen = look_at_code(project)
    assert seen.project == "folder"
    assert seen.files == {
        "aids/__init__.py": hashlib.sha256(b"").hexdigest(),
        "aids/aid_one.py": sha256(project / "aids" / "aid_one.py"),
    }
    assert seen.changed == ()
    assert seen.left_out == 0
    assert str(project) not in repr(local_code(seen))


def test_in_a_repository_names_count_from_its_root_also_for_files_that_git_does_not_know(project):
    git(project.parent, "init", "-q")
    seen = look_at_code(project)
    assert seen.project == "git"
    assert set(seen.files) == {"project/aids/__init__.py", "project/aids/aid_one.py"}


def test_neither_what_is_installed_nor_the_tool_itself_is_listed(project):
    names = [*look_at_code(Path("/")).files]
    assert any(name.endswith("aids/aid_one.py") for name in names)
    assert not [name for name in names if "site-packages" in name or "rlhf_audit_nb/" in name or "python3" in name]


def test_what_is_imported_later_and_what_is_changed_later_is_told_apart(project):
    before = look_at_code(project)
    assert code_since(before) is None
    importlib.import_module("aid_two")
    added = code_since(before)
    assert added is not None
    assert added.code.files == {"aid_two.py": sha256(project / "aid_two.py")}
    assert added.code.changed == []
    (project / "aids" / "aid_one.py").write_text("VALUE = 100\n")
    changed = code_since(before)
    assert changed is not None
    assert changed.code.changed == ["aids/aid_one.py"]
    assert changed.code.files["aids/aid_one.py"] == sha256(project / "aids" / "aid_one.py")


def test_a_file_that_is_another_than_was_imported_is_named_from_the_start(project, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    importlib.import_module("aid_two")
    assert look_at_code(project).changed == ()
    (project / "aid_two.py").write_text("VALUE = 1000\n")
    assert look_at_code(project).changed == ("aid_two.py",)


def test_more_files_than_the_bound_are_counted_and_not_read(project, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILES", 1)
    seen = look_at_code(project)
    assert (len(seen.files), seen.left_out) == (1, 1)
    monkeypatch.setattr(module, "MAX_FILES", 10)
    monkeypatch.setattr(module, "MAX_BYTES", 5)
    assert look_at_code(project).left_out == 1


def test_a_long_list_lies_beside_the_trail_under_its_digest(project, tmp_path, monkeypatch):
    short = local_code(look_at_code(project), tmp_path)
    monkeypatch.setattr(module, "LISTED", 1)
    long = local_code(look_at_code(project), tmp_path)
    assert (long.digest, long.count, long.files) == (short.digest, 2, {})
    assert sha256(tmp_path / f"{long.digest}.json") == long.digest


def test_the_digest_of_changes_follows_the_changes_and_not_the_settings_of_git(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("one\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    assert git_state(tmp_path).diff is None
    (tmp_path / "a.py").write_text("two\n")
    first = git_state(tmp_path)
    assert first.dirty is True
    assert first.diff is not None
    git(tmp_path, "config", "diff.noprefix", "true")
    git(tmp_path, "config", "diff.context", "0")
    git(tmp_path, "config", "diff.algorithm", "patience")
    git(tmp_path, "config", "core.abbrev", "6")
    assert git_state(tmp_path).diff == first.diff
    assert git_state(tmp_path, diff=False).diff is None
    (tmp_path / "a.py").write_text("three\n")
    assert git_state(tmp_path).diff not in (None, first.diff)


def test_the_tools_own_source_has_a_digest(monkeypatch, tmp_path):
    assert tool_digest() == tool_digest()
    copy = tmp_path / "rlhf_audit_nb" / "capture" / "code.py"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(Path(module.__file__).read_bytes())
    tool_digest.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(module, "__file__", str(copy))
        one = tool_digest()
        tool_digest.cache_clear()
        copy.write_bytes(copy.read_bytes() + b"\n")
        assert tool_digest() != one
    tool_digest.cache_clear()
