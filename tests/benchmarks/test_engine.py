"""What the engine costs is measured beside papermill's own, on one notebook in one run."""

from __future__ import annotations

import pytest

from benchmarks import engine


@pytest.mark.slow
def test_the_engine_is_measured_beside_papermills_own(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    figures = list(engine._measured(tmp_path, 2, 1))
    plain, audit, clock, busy = (figure.value for figure in figures)
    assert min(plain, audit) > 0
    assert clock == pytest.approx(audit - 1.01 * plain)
    assert [figure.target for figure in figures] == [None, None, 50.0, 50.0]
    assert busy < 5_000
