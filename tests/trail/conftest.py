"""Trails in temporary folders, and vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

VECTORS = Path(__file__).parents[1] / "vectors" / "trail"


@pytest.fixture
def vectors():
    def load(name: str) -> Any:
        return json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))

    return load


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(folder))
    monkeypatch.delenv("RLHF_AUDIT_PASSPHRASE", raising=False)
    monkeypatch.delenv("RLHF_AUDIT_TRAIL", raising=False)
    return folder


@pytest.fixture
def folder(tmp_path, home):
    return tmp_path / "audit"
