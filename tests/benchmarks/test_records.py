"""The benchmark of large records works on one that is as large as it says."""

from __future__ import annotations

import pytest

from benchmarks import records


@pytest.mark.slow
def test_what_a_large_record_costs_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    figures = list(records.measure(tmp_path / "records", quick=True))
    assert [figure.target for figure in figures] == [1.0, 1.0, 2.0, 1.0]
    for figure in figures:
        assert 0 < figure.value < 20
        assert float(figure.how.split(" cells, ")[1].split(" MB")[0]) >= 20
