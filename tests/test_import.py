"""The public face: light to import, complete, the same under both names."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

import rlhf_audit_nb
import rlhf_audit_trail

HEAVY = ("torch", "transformers", "trl", "altair", "datasets", "opacus", "papermill", "nbconvert", "pandas", "IPython")


def modules_after(statement: str) -> set[str]:
    code = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("module", ["rlhf_audit_nb", "rlhf_audit_trail", "rlhf_audit_nb.cli"])
def test_importing_the_face_brings_nothing_heavy(module):
    assert modules_after(f"import {module}").isdisjoint(HEAVY)


def test_the_check_for_heavy_modules_would_see_one():
    assert "altair" in modules_after("import altair")


def test_importing_the_face_takes_at_most_three_tenths_of_a_second():
    code = "import time; t=time.perf_counter(); import rlhf_audit_nb; print(time.perf_counter()-t)"
    taken = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        taken.append(float(done.stdout))
        if taken[-1] <= 0.3:
            break
        time.sleep(0.2)
    assert min(taken) <= 0.3


@pytest.mark.parametrize("name", rlhf_audit_nb.__all__)
def test_every_public_name_can_be_had_under_both_names(name):
    assert getattr(rlhf_audit_nb, name) is getattr(rlhf_audit_trail, name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="AuditableRLFH"):
        rlhf_audit_nb.AuditableRLFH  # noqa: B018
    with pytest.raises(ImportError):
        from rlhf_audit_trail import Nothing  # noqa: F401


def test_completion_offers_the_public_names():
    assert set(rlhf_audit_nb.__all__) <= set(dir(rlhf_audit_nb))
    assert set(rlhf_audit_nb.__all__) <= set(dir(rlhf_audit_trail))
