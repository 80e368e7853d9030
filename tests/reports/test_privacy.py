"""The privacy part of a report: what it says of a trail on which nothing was charged."""

from __future__ import annotations

from rlhf_audit_nb.compliance.facts import Composed
from rlhf_audit_nb.reports.privacy import composed_state, composed_words


def composed(**changes):
    nothing = dict.fromkeys(("total", "unit", "adjacency", "delta", "units", "budget"))
    counts = {"settled": True, "indices": (), "other_deltas": (), "private_runs": 0, "unbounded_runs": 0}
    return Composed(**{**nothing, **counts, **changes})


def test_a_trail_without_training_says_so():
    said = composed()
    assert composed_words(said, trusted=True) == "Nothing was trained here, so nothing was spent."
    assert composed_state(said, trusted=True) == "warn"


def test_a_trail_whose_runs_all_inherit_does_not_say_that_nothing_was_trained():
    said = composed(inherited_runs=1)
    assert composed_words(said, trusted=True).startswith("Nothing was spent here: 1 run learnt of people from models")
    assert composed_state(said, trusted=True) == "ok"


def test_one_run_without_a_bound_is_what_is_said_first():
    said = composed(inherited_runs=1, unbounded_runs=1)
    assert "on what the model may reveal" in composed_words(said, trusted=True)
    assert composed_state(said, trusted=True) == "warn"


def test_nothing_counts_in_a_trail_that_does_not_verify():
    said = composed(inherited_runs=1)
    assert "none of them can be relied on" in composed_words(said, trusted=False)
    assert composed_state(said, trusted=False) == "bad"
