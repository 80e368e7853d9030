"""What a user may set: every refusal names the field, the value and what to write instead."""

from __future__ import annotations

import math

import pytest

from rlhf_audit_nb.config import AuditConfig, PrivacyConfig
from rlhf_audit_nb.errors import ConfigError


@pytest.mark.parametrize("epsilon", [0, -1.0, math.nan, math.inf, -math.inf, "8", None, True])
def test_an_epsilon_that_is_no_positive_number_is_refused_by_name(epsilon):
    with pytest.raises(ConfigError, match="epsilon is ") as refused:
        PrivacyConfig(epsilon=epsilon)
    assert repr(epsilon) in refused.value.message
    assert "epsilon=" in refused.value.next_step
    assert refused.value.reason == "epsilon"


@pytest.mark.parametrize("delta", [0, 1e-10, 1, 1.5, -1e-5, math.nan, "1e-5"])
def test_a_delta_outside_1e10_to_1_is_refused_by_name(delta):
    with pytest.raises(ConfigError, match="delta is ") as refused:
        PrivacyConfig(epsilon=1.0, delta=delta)
    assert refused.value.reason == "delta"


@pytest.mark.parametrize("delta", [1.0001e-10, 1e-5, 0.999])
def test_a_delta_between_is_taken(delta):
    assert PrivacyConfig(epsilon=1.0, delta=delta).delta == delta


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("unit", "person"),
        ("adjacency", "add-remove"),
        ("anonymize_annotators", False),
        ("anonymize_annotators", None),
        ("annotator_column", ""),
        ("clipping_norm", 0),
        ("run_epsilon", -1),
        ("noise_multiplier", 0.0),
        ("sampling_rate", 0),
        ("sampling_rate", 1.01),
        ("max_pairs_per_unit", 0),
        ("max_pairs_per_unit", 2.5),
        ("max_pairs_per_unit", True),
        ("engine", "ghost"),
        ("micro_batch", 0),
        ("micro_batch", 1.5),
        ("public_prompts", "yes"),
        ("public_prompts", None),
    ],
)
def test_every_other_privacy_setting_is_checked_and_its_refusal_says_what_to_write(field, value):
    with pytest.raises(ConfigError) as refused:
        PrivacyConfig(epsilon=1.0, **{field: value})
    assert field in refused.value.message
    assert refused.value.next_step
    assert refused.value.reason == field


def test_a_privacy_configuration_cannot_be_changed_afterwards():
    with pytest.raises(AttributeError):
        PrivacyConfig(epsilon=1.0).epsilon = 8.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("durability", "never"),
        ("every_steps", 0),
        ("every_steps", 1.5),
        ("weights_every", -1),
        ("every_steps", True),
        ("samples_every", -1),
    ],
)
def test_every_audit_setting_is_checked(field, value):
    with pytest.raises(ConfigError, match=field):
        AuditConfig(**{field: value})


def test_the_trail_lies_where_the_setting_says_then_the_environment_then_in_audit(monkeypatch):
    monkeypatch.delenv("RLHF_AUDIT_TRAIL", raising=False)
    assert str(AuditConfig().trail_location()) == "audit"
    monkeypatch.setenv("RLHF_AUDIT_TRAIL", "elsewhere")
    assert str(AuditConfig().trail_location()) == "elsewhere"
    assert str(AuditConfig(trail="here").trail_location()) == "here"
