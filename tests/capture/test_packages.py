"""What is told of an installed package, and what a changed file in it does."""

from __future__ import annotations

import base64
import hashlib
import sys
from importlib import metadata

import pytest

from rlhf_audit_nb.capture.packages import check_packages, installed_packages, list_packages


def install(folder, name, content=b"VALUE = 1\n", *, script=b"", extra=""):
    """A distribution as an installer would leave it."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{name}.py").write_bytes(content)
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{name}.py,sha256={digest},{len(content)}", f"{name}-1.0.dist-info/METADATA,,", f"{info.name}/RECORD,,"]
    if script:
        lines.append(f"../../bin/{name},sha256={hashlib.sha256(script).hexdigest()},1")
    (info / "RECORD").write_text("\n".join([*lines, extra]) + "\n")
    return info


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def test_every_package_is_listed_with_the_digest_of_its_record():
    listed = list_packages()
    assert installed_packages()["transformers"] == listed["transformers"]["version"] == metadata.version("transformers")
    assert len(listed["torch"]["record"]) == 64
    assert listed["torch"]["record"] != listed["transformers"]["record"]


def test_the_digest_is_that_of_the_wheel_and_not_of_the_installer(tmp_path, monkeypatch):
    digests = []
    for place, more in (("one", {}), ("two", {"script": b"#!/one"}), ("three", {"content": b"VALUE = 2\n"})):
        install(tmp_path / place, "made_up_package", **more)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", [str(tmp_path / place)])
            digests.append(list_packages()["made-up-package"]["record"])
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_a_package_from_a_repository_and_an_editable_one_say_so(site):
    (install(site, "made_up_vcs") / "direct_url.json").write_text(
        '{"url": "https://me:pw@example.com/x.git", "vcs_info": {"vcs": "git", "commit_id": "abc123"}}'
    )
    (install(site, "made_up_dev") / "direct_url.json").write_text(
        '{"url": "file:///home/somebody/x", "dir_info": {"editable": true}}'
    )
    listed = list_packages()
    assert listed["made-up-vcs"]["commit"] == "abc123"
    assert listed["made-up-dev"]["editable"] is True
    assert "example.com" not in repr(listed)
    assert "somebody" not in repr(listed)
    assert check_packages(["made_up_dev"])[0].state == "editable"


def test_a_changed_or_missing_file_is_named(site):
    install(site, "made_up_package")
    assert check_packages(["made_up_package"])[0].state == "intact"
    (site / "made_up_package.py").write_text("VALUE = 3\n")
    (found,) = check_packages(["Made.Up_Package"])
    assert (found.state, found.altered, found.checked) == ("altered", ("made_up_package.py",), 1)
    (site / "made_up_package.py").unlink()
    assert check_packages(["made_up_package"])[0].altered == ("made_up_package.py",)


def test_the_check_keeps_to_its_time_and_says_that_it_did_not_finish():
    (found,) = check_packages(["torch"], seconds=0)
    assert (found.state, found.checked) == ("unfinished", 0)


def test_what_is_not_installed_is_missing_and_what_has_no_list_says_so(site):
    (install(site, "made_up_bare") / "RECORD").unlink()
    assert check_packages(["no-such-package-anywhere"])[0].state == "missing"
    assert check_packages(["made-up-bare"])[0].state == "no-record"


def test_a_real_package_is_intact():
    (found,) = check_packages(["trl"])
    assert found.state == "intact"
    assert found.checked > 50
