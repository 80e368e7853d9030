"""The request to a witness: one form, parsed strictly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.witnesses import Log

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.submission import Submission, format_submission, parse_submission, submission_of

LOG = Log("log.example/a").grow(40)


@pytest.mark.parametrize(("old", "size"), [(0, 0), (0, 7), (7, 7), (7, 8), (8, 40), (33, 40)])
def test_a_body_is_what_an_independent_log_would_send(old, size):
    body = LOG.body(old, size)
    asked = parse_submission(body)
    assert (asked.old, list(asked.proof)) == (old, LOG.proof(old, size))
    assert format_submission(asked) == body
    assert submission_of(LOG.head(size), old, LOG.proof) == asked


def test_a_checkpoint_cannot_continue_a_larger_one():
    with pytest.raises(FormatError, match="cannot continue"):
        submission_of(LOG.head(7), 8, LOG.proof)


@given(st.integers(0, (1 << 63) - 1), st.lists(st.binary(min_size=32, max_size=32), max_size=63))
def test_what_was_formatted_parses_to_the_same(old, proof):
    asked = Submission(old, tuple(proof), parse_submission(LOG.body(0, 3)).note)
    assert parse_submission(format_submission(asked)) == asked


@given(st.data())
def test_bytes_that_are_accepted_are_the_one_form_of_what_they_say(data):
    body = bytearray(LOG.body(8, 40))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        how = data.draw(st.sampled_from(["flip", "drop", "double"]))
        if how == "flip":
            body[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "drop":
            del body[at]
        else:
            body.insert(at, body[at])
    try:
        asked = parse_submission(bytes(body))
    except FormatError:
        return
    assert format_submission(asked) == bytes(body)
