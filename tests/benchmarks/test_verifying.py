"""What checking and reading cost is measured in one command, by processes that do nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_verifying_proving_and_reading_are_measured_in_one_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--only", "verifying", "--json", tmp_path / "f.json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = {figure["what"]: figure for figure in json.loads((tmp_path / "f.json").read_text())}
    assert all(figure["value"] > 0 for figure in figures.values())
    assert figures["verify from the store, peak memory"]["met"]
    assert figures["its peak memory"]["met"]
    assert {"trail tail", "trail show", "verify, an entry, witness-log", "one inclusion proof, p99"} <= set(figures)
