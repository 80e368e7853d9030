"""The built wheel holds all that the package reads, and works where no checkout is near."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    asked = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, REPOSITORY]
    subprocess.run(asked, check=True, capture_output=True)
    [made] = folder.glob("*.whl")
    return made


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "rlhf_audit_nb"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert set(tracked.stdout.split()) <= names
    assert "rlhf_audit_trail.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_templates_and_notebooks_are_mapped_into_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("templates", "example_notebooks"):
        beside = {p.relative_to(REPOSITORY) for p in (REPOSITORY / folder).rglob("*") if p.is_file()}
        kept = {p for p in beside if not {".ipynb_checkpoints", "__pycache__"} & set(p.parts)}
        assert kept
        assert {f"rlhf_audit_nb/{path.as_posix()}" for path in kept} <= names


def test_nothing_else_is_installed(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"rlhf_audit_nb", "rlhf_audit_trail.py", "rlhf_audit_trail-0.1.0.dist-info"}


def test_an_installed_wheel_finds_its_own_templates_and_notebooks(wheel, tmp_path):
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel], check=True)
    code = """
from rlhf_audit_nb.compliance.templates import template_path
from rlhf_audit_nb.demo import load_preferences
from rlhf_audit_nb.showcase import notebook_path
print(notebook_path(), template_path("cards"), len(load_preferences()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    notebook, templates, votes = done.stdout.split()
    assert notebook.startswith(str(site))
    assert templates.startswith(str(site))
    assert votes == "472"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("from papermill.engines import papermill_engines as e; print(e.get_engine('audit').__name__)", "AuditEngine"),
        ("from nbconvert.exporters import get_exporter as g; print(g('audit-html').__name__)", "AuditHTMLExporter"),
        ("from nbconvert.exporters import get_exporter as g; print(g('audit-pdf').__name__)", "AuditPDFExporter"),
    ],
)
def test_papermill_and_nbconvert_find_what_is_theirs(code, said):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [said]


def test_the_command_is_installed():
    asked = [Path(sys.executable).with_name("rlhf-audit"), "--version"]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout == "rlhf-audit 0.1.0\n"
