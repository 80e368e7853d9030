"""The benchmark of large records seals and verifies one that is as large as it says."""

from __future__ import annotations

import pytest

from benchmarks import records


@pytest.mark.slow
def test_sealing_and_verifying_a_large_record_are_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    sealing, verifying = records.measure(tmp_path / "records", quick=True)
    assert 0 < sealing.value < 20
    assert 0 < verifying.value < 20
    assert (sealing.target, verifying.target) == (1.0, 1.0)
    assert float(sealing.how.split(" cells, ")[1].split(" MB")[0]) >= 20
