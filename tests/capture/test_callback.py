"""The norm of an update: right, and never at the cost of the training."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_audit_nb.capture import callback
from rlhf_audit_nb.capture.callback import UpdateNorm


def parameters(*shapes, dtype=torch.float32):
    return [torch.nn.Parameter(torch.randn(*shape, dtype=dtype)) for shape in shapes]


def moved(watched, amount):
    with torch.no_grad():
        for parameter in watched:
            parameter.add_(amount)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_the_difference(dtype):
    watched = parameters((3, 4), (5,), dtype=dtype)
    before = [parameter.detach().clone() for parameter in watched]
    norm = UpdateNorm(watched)
    norm.before_step(1)
    with torch.no_grad():
        for parameter in watched:
            parameter.mul_(1.25)
    expected = math.sqrt(
        sum(float((a.detach() - b).double().square().sum()) for a, b in zip(watched, before, strict=True))
    )
    assert float(norm.after_step()) == pytest.approx(expected, rel=1e-3 if dtype is torch.bfloat16 else 1e-6)


def test_a_step_that_changes_nothing_has_norm_zero():
    norm = UpdateNorm(parameters((4,)))
    norm.before_step(1)
    assert float(norm.after_step()) == 0.0


def test_the_parameters_are_not_touched():
    watched = parameters((3, 3))
    before = watched[0].detach().clone()
    norm = UpdateNorm(watched)
    norm.before_step(1)
    norm.after_step()
    assert torch.equal(watched[0], before)


def test_large_models_are_measured_less_often(monkeypatch):
    monkeypatch.setattr(callback, "NORM_EVERY_STEP", 4)
    watched = parameters((10,))
    norm = UpdateNorm(watched)
    measured = []
    for step in range(1, 7):
        norm.before_step(step)
        moved(watched, 1.0)
        value = norm.after_step()
        measured.append(None if value is None else round(float(value), 4))
    assert measured == [None, None, 3.1623, None, None, 3.1623]


def test_a_model_too_large_to_copy_is_not_copied(monkeypatch):
    monkeypatch.setattr(callback, "NORM_NEVER", 4)
    norm = UpdateNorm(parameters((10,)))
    norm.before_step(1)
    assert norm.after_step() is None


def test_without_trainable_parameters_there_is_no_norm():
    norm = UpdateNorm([])
    norm.before_step(1)
    assert norm.after_step() is None
