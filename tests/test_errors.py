"""The hierarchy of errors: one sentence, a next step, a reason for machines."""

from __future__ import annotations

import inspect

import pytest

from rlhf_audit_nb import errors
from rlhf_audit_nb.errors import AuditError, BudgetExceededError, ConfigError, PrivacyError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, AuditError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_error_shows_as_its_sentence_and_next_step_in_a_notebook(kind):
    error = kind("The file x is missing.", next_step="Write one.")
    lines = error._render_traceback_()
    assert lines == [f"{kind.__name__} [{kind.code}]: The file x is missing.", "Next step: Write one."]
    assert str(error) == "The file x is missing. Write one."


def test_each_kind_has_a_reason_of_its_own():
    assert len({kind.code for kind in KINDS}) == len(KINDS)


def test_a_reason_can_be_more_exact_than_the_kind():
    assert ConfigError("x", code="delta").reason == "delta"
    assert ConfigError("x").reason == "config"


def test_a_refusal_for_privacy_ends_a_process_with_3_and_a_wrong_use_with_2():
    assert PrivacyError.exit_code == BudgetExceededError.exit_code == 3
    assert ConfigError.exit_code == 2
