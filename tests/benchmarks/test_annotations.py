"""The import of annotations is measured on the real votes, or on made-up ones where they are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["UKPConvArg1", "made up"])
def test_the_import_is_measured_beside_plain_sqlite(tmp_path, source, ukpconvarg1):
    shared = ukpconvarg1.parents[1] if source == "UKPConvArg1" else tmp_path
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--only", "annotations", "--json", tmp_path / "f.json"],
        cwd=REPOSITORY,
        env={**os.environ, "RLHF_AUDIT_SHARED": str(shared)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = {figure["what"]: figure for figure in json.loads((tmp_path / "f.json").read_text())}
    assert source in figures["8,000 annotations, import"]["how"]
    assert figures["8,000 annotations, plain SQLite"]["value"] > 0
    assert all(figure["value"] > 0 for figure in figures.values())
