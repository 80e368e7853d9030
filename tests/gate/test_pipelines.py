"""The workflow and the hooks of docs/records/gate.md, as far as they can be run here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from gate_support import Story, make_record, write_policy


@pytest.fixture(scope="module")
def blocks(repository):
    text = (repository / "docs" / "records" / "gate.md").read_text(encoding="utf-8")
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)\n```", text, re.DOTALL)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A repository with a model, its records, the policy and whom to trust, and nothing else of whoever trained."""
    made = make_record(tmp_path_factory.mktemp("training"), Story())
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(made.model, folder / "model")
    (folder / "records").mkdir()
    shutil.copy(made.record, folder / "records" / "small.record.ipynb")
    shutil.copy(made.folder / "trust.policy", folder)
    write_policy(folder, "privacy: {epsilon: 8, delta: 1e-5, units: [annotator]}", "git: clean")
    return folder


@pytest.fixture
def sh(clone, tmp_path):
    """Runs a line in a copy of the clone, in a home that knows nothing, with the command that is installed here."""
    shutil.copytree(clone, tmp_path / "clone")
    path = tmp_path / "bin"
    path.mkdir()
    (path / "rlhf-audit").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m rlhf_audit_nb.cli "$@"\n')
    (path / "rlhf-audit").chmod(0o755)
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}", "RLHF_AUDIT_HOME": str(tmp_path / "nobody")}
    environment.pop("RLHF_AUDIT_TRAIL", None)

    def run(*argv):
        return subprocess.run(
            argv, cwd=tmp_path / "clone", env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    return run


def test_the_workflow_is_one_and_its_line_decides(blocks, sh, tmp_path):
    (workflow,) = [block for block in blocks if "jobs" in block]
    assert set(workflow[True]) == {"pull_request"}  # YAML 1.1 reads the key `on` as true; GitHub does not
    assert workflow["permissions"] == {"contents": "read"}
    steps = workflow["jobs"]["gate"]["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    lines = [step["run"] for step in steps if "run" in step]
    assert lines[0] == "pip install rlhf-audit-trail"
    done = sh("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", lines[1])  # as GitHub calls it
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "clone" / "decision.json").read_text())
    assert told["decision"] == "passed"
    (tmp_path / "clone" / "model" / "config.json").write_text("{ }")
    done = sh("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", lines[1])
    assert done.returncode == 40
    assert json.loads((tmp_path / "clone" / "decision.json").read_text())["exit_code"] == 40
    assert "config.json was changed" in done.stderr


def test_the_local_hook_decides(blocks, sh, tmp_path):
    (local,) = [block for block in blocks if "repos" in block]
    (hook,) = local["repos"][0]["hooks"]
    assert {"id", "name", "language", "entry"} <= set(hook)
    for path in ("model/config.json", "records/small.record.ipynb", "policy.yaml", "trust.policy"):
        assert re.search(hook["files"], path), path
    assert not re.search(hook["files"], "src/model/x.py")
    assert sh(*shlex.split(hook["entry"])).returncode == 0
    policy = tmp_path / "clone" / "policy.yaml"
    policy.write_text(policy.read_text().replace("epsilon: 8", "epsilon: 1"))
    done = sh(*shlex.split(hook["entry"]))
    assert done.returncode == 3
    assert "NOT MET  privacy.epsilon" in done.stdout


def test_the_repositorys_own_hooks_decide(repository, sh, tmp_path):
    hooks = {hook["id"]: hook for hook in yaml.safe_load((repository / ".pre-commit-hooks.yaml").read_text())}
    assert all({"id", "name", "entry", "language"} <= set(hook) for hook in hooks.values())
    args = ["model", "--policy", "policy.yaml", "--records", "records"]
    page = (repository / "docs" / "records" / "gate.md").read_text(encoding="utf-8")
    assert f"args: [{', '.join(args)}]" in page
    gate, verify = hooks["rlhf-audit-gate"], hooks["rlhf-audit-verify"]
    assert sh(*shlex.split(gate["entry"]), *args).returncode == 0
    record = "records/small.record.ipynb"
    assert re.search(verify["files"], record)
    assert sh(*shlex.split(verify["entry"]), record, record).returncode == 0
    path = tmp_path / "clone" / record
    path.write_text(path.read_text().replace("done", "gone"))
    assert sh(*shlex.split(verify["entry"]), record).returncode == 40
