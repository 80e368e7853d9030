"""``rlhf-audit privacy-check``: without a trail, with one, and where the mechanism is broken."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rlhf_audit_nb.cli import main
from rlhf_audit_nb.events import PrivacyChecked, decode_body
from rlhf_audit_nb.privacy import self_audit
from rlhf_audit_nb.privacy.sampling import SealedRandom
from rlhf_audit_nb.trail import TrailReader


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path):
    """The same check with fewer phantoms, so that it takes a second."""
    monkeypatch.setitem(self_audit._SIZES, "full", self_audit._SIZES["small"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RLHF_AUDIT_TRAIL", raising=False)


def test_a_right_mechanism_ends_with_0_and_needs_no_trail(capsys, tmp_path):
    assert main(["privacy-check"]) == 0
    out = capsys.readouterr().out
    assert "The mechanism passes" in out
    assert "A low bound is no proof of privacy." in out
    assert "It does not check the accountant" in out
    assert not (tmp_path / "audit").exists()


def test_a_broken_one_ends_with_3_and_says_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(SealedRandom, "normals", lambda self, step, tensor, count: np.zeros(count))
    assert main(["privacy-check", "--json"]) == 3
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert not result["passed"]
    assert {item["name"]: item["outcome"] for item in result["hypotheses"]}["noise-level"] == "failed"
    assert "Do not rely on the epsilon of trainings made here." in said.err


def test_what_was_found_can_be_recorded(capsys, tmp_path):
    assert main(["privacy-check", "--record", "--trail", "here", "--noise-multiplier", "2", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)["entry"]
    (found,) = TrailReader.open(tmp_path / "here").entries(type=PrivacyChecked.TYPE)
    event = decode_body(found.type, found.body)
    assert (found.index, event.outcome, event.noise_multiplier) == (entry, "passed", 2.0)
    assert event.epsilon_lower < event.epsilon_claimed


def test_a_number_out_of_range_is_one_sentence(capsys):
    assert main(["privacy-check", "--noise-multiplier", "0"]) == 2
    assert "noise_multiplier" in capsys.readouterr().err
