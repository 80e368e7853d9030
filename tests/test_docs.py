"""Every command and block in the README and under docs/ is run as it is written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- run(?:: (?P<how>[^>]*?))? -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)\n```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: Path
    number: int
    kind: str
    text: str
    how: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}-{self.number}"


def blocks():
    for page in PAGES:
        for number, found in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8")), start=1):
            marked = found.group(0).startswith("<!-- run")
            yield Block(page, number, found["kind"], found["text"], (found["how"] or "") if marked else None)


BLOCKS = list(blocks())
RUN = [b for b in BLOCKS if b.how is not None]


def test_every_python_and_console_block_is_run_or_is_the_two_commands():
    left = [b for b in BLOCKS if b.kind in ("python", "console") and b.how is None]
    assert [str(b) for b in left] == ["README.md-1"]
    assert all(line.startswith("make ") for line in left[0].text.splitlines())


def test_the_two_commands_are_targets():
    for target in ("demo", "test", "bench", "help"):
        subprocess.run(["make", "-n", target], cwd=REPOSITORY, capture_output=True, check=True)
    assert subprocess.run(["make", "-n", "dmeo"], cwd=REPOSITORY, capture_output=True, check=False).returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("block", RUN, ids=str)
def test_a_block_runs_as_written(block, tmp_path, request):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if block.how == "after demo":
        demo = request.getfixturevalue("demo")
        shutil.copytree(demo / "out", tmp_path / "out")
        # A copy too: a block that appends to its trail must not be remembered as the newest state of the others'.
        environment["RLHF_AUDIT_HOME"] = str(shutil.copytree(demo / "home", tmp_path / "demo-home"))
        shutil.copy(REPOSITORY / "example_notebooks" / "01_dpo_private.ipynb", tmp_path)
    elif block.how == "setup votes":
        (tmp_path / "votes.csv").write_text("question,chosen,rejected,worker\nq,a,b,w1\nq,b,a,w2\n")
    else:
        assert block.how == ""
    asked = [sys.executable, "-"] if block.kind == "python" else ["bash", "-euo", "pipefail"]
    done = subprocess.run(
        asked, input=block.text, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_a_page_links_only_to_what_is_there(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_dependency_has_its_sentence():
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(item for extra in project["optional-dependencies"].values() for item in extra)]
    names = {re.match(r"[A-Za-z0-9_-]+", item)[0].lower() for item in asked} - {"rlhf-audit-trail"}
    page = (REPOSITORY / "docs" / "dependencies.md").read_text().lower()
    rows = {name.strip() for line in page.splitlines() if line.startswith("| ") for name in re.split(r"[,|]", line)}
    assert names <= rows, names - rows


def test_the_tested_set_holds_every_dependency_exactly():
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}
    assert all("==" in line or line.startswith("#") for line in lines)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for item in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        requirement = Requirement(item)
        if requirement.name != "rlhf-audit-trail":
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), item
    assert pinned["torch"] == "2.13.0"
