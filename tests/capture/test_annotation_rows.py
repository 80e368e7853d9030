"""Annotations before they are written: what a row says comes through, and what cannot stand is named by its row."""

from __future__ import annotations

import hashlib
import math
from datetime import UTC, datetime

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from rlhf_audit_nb.capture.annotation_rows import CHOICES, prepare_rows, prepare_values
from rlhf_audit_nb.errors import DataError
from rlhf_audit_nb.events import Annotation, AnnotationRecorded, decode_private

PAIR = ("one answer", "another")


def said(prepared):
    return [decode_private(AnnotationRecorded.TYPE, payload) for payload in prepared.payloads]


def values(**given):
    """Two rows that can stand, with what the test changes."""
    base = {"prompts": ["p", "q"], "responses": [PAIR, PAIR], "choices": ["first", "tie"], "annotator_ids": ["u", "v"]}
    return prepare_values(**{**base, **given})


# --- what comes through ----------------------------------------------------------------------------------------------


def test_everything_that_a_row_says_is_in_its_private_half_and_nothing_else():
    prepared = values(
        rewards=[0.5, 2],
        shown=["second", None],
        made_at=["2016-01-31T16:59:52Z", None],
        guideline=["v2", None],
        extra={"reason": ["because", None], "seconds": [12, math.inf]},
    )
    first, second = said(prepared)
    assert first == Annotation(
        prompt="p",
        responses=list(PAIR),
        choice=0,
        reward=0.5,
        shown=[1, 0],
        guideline="v2",
        made_at="2016-01-31T16:59:52Z",
        annotator="u",
        extra={"reason": "because", "seconds": 12},
    )
    assert second == Annotation(
        prompt="q",
        responses=list(PAIR),
        choice="tie",
        reward=2,
        annotator="v",
        extra={"reason": None, "seconds": "Infinity"},
    )
    assert prepared.owners == ["u", "v"]
    assert prepared.header.extra == ["reason", "seconds"]


def test_what_nobody_said_is_unknown_and_never_guessed():
    assert values().header.provenance == {
        "prompt": "recorded",
        "responses": "recorded",
        "choice": "recorded",
        "shown": "unknown",
        "guideline": "unknown",
        "made_at": "unknown",
        "annotator": "recorded",
    }
    for half in said(values()):
        assert (half.shown, half.made_at, half.guideline) == (None, None, None)


def test_what_is_said_once_for_all_rows_is_stated_and_not_recorded():
    prepared = values(shown="second", guideline="v3")
    assert prepared.header.provenance["shown"] == prepared.header.provenance["guideline"] == "stated"
    assert prepared.header.guideline == "v3"
    assert [(half.shown, half.guideline) for half in said(prepared)] == [([1, 0], "v3")] * 2


def test_a_guideline_that_differs_by_row_stands_nowhere_in_the_open():
    prepared = values(guideline=["v2", "v3"])
    assert prepared.header.guideline is None
    assert prepared.header.provenance["guideline"] == "recorded"
    assert [half.guideline for half in said(prepared)] == ["v2", "v3"]


def test_annotations_without_annotators_are_the_imports_own():
    prepared = values(annotator_ids=None)
    assert prepared.owners is None
    assert prepared.header.provenance["annotator"] == "unknown"
    assert [half.annotator for half in said(prepared)] == [None, None]


def test_of_chosen_and_rejected_the_chosen_one_stands_first():
    prepared = prepare_values(chosen=["a"], rejected=["b"], annotator_ids=["u"], shown=["second"])
    assert said(prepared) == [Annotation(responses=["a", "b"], choice=0, shown=[1, 0], annotator="u")]
    assert prepared.header.kind == "comparison"


def test_one_response_with_its_reward_is_a_rating():
    prepared = prepare_values(prompts=["p"], responses=["a"], rewards=[4], annotator_ids=["u"])
    assert said(prepared) == [Annotation(prompt="p", responses=["a"], reward=4, annotator="u")]
    assert prepared.header.kind == "rating"
    assert "shown" not in prepared.header.provenance


def test_each_response_of_a_pair_may_have_its_own_reward():
    assert said(values(choices=None, rewards=[(0.1, 0.9), [1, 2]]))[0].reward == [0.1, 0.9]


def test_the_best_of_many_is_named_by_its_place():
    (half,) = said(prepare_values(responses=[["a", "b", "c"]], choices=[2], shown=[[2, 0, 1]], annotator_ids=["u"]))
    assert (half.choice, half.shown) == (2, [2, 0, 1])


def test_one_annotation_needs_no_lists():
    prepared = prepare_values(prompts="p", responses=PAIR, choices="undecided", shown=[1, 0], annotator_ids="u")
    assert said(prepared) == [
        Annotation(prompt="p", responses=list(PAIR), choice="undecided", shown=[1, 0], annotator="u")
    ]


def test_conversations_are_texts_too():
    asked = [{"role": "user", "content": "hello"}]
    answers = ([{"role": "assistant", "content": "hi"}], [{"role": "assistant", "content": "no"}])
    (half,) = said(prepare_values(prompts=[asked], responses=[answers], choices=[1], annotator_ids=["u"]))
    assert (half.prompt, half.responses, half.choice) == (asked, list(answers), 1)
    (half,) = said(prepare_values(prompts=[asked], responses=[answers[0]], rewards=[1], annotator_ids=["u"]))
    assert half.responses == [answers[0]]


def test_arrays_serve_as_lists_and_whole_numbers_as_ids():
    prepared = values(rewards=np.array([0.25, 1.0]), choices=np.array([0, 1]), annotator_ids=np.array([7, 8]))
    assert [(half.reward, half.choice, half.annotator) for half in said(prepared)] == [(0.25, 0, "7"), (1.0, 1, "8")]


def test_a_time_is_kept_as_the_source_has_it():
    halves = said(values(made_at=[datetime(2026, 1, 2, tzinfo=UTC), "yesterday"]))
    assert [half.made_at for half in halves] == ["2026-01-02T00:00:00+00:00", "yesterday"]
    assert [half.made_at for half in said(values(made_at=[1454259592, ""]))] == ["1454259592", None]


def test_the_sources_own_words_are_translated_and_the_numbers_then_are_no_places():
    words = {"a1": "first", "a2": "second", "equal": "tie"}
    assert [half.choice for half in said(values(choices=["a2", "equal"], words=words))] == [1, "tie"]
    assert [half.shown for half in said(values(shown=["a2", "a1"], words=words))] == [[1, 0], [0, 1]]
    halves = said(values(choices=[1, 2], words={"1": "first", 2: "second"}))
    assert [half.choice for half in halves] == [0, 1]
    with pytest.raises(DataError, match="Row 1: the choice is none of the known words"):
        values(choices=[0, 2], words={"1": "first", "2": "second"})


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(
    st.lists(
        st.builds(
            Annotation,
            prompt=TEXT,
            responses=st.lists(TEXT, min_size=2, max_size=2),
            choice=st.sampled_from([0, 1, "tie", "undecided"]),
            reward=st.one_of(st.integers(-5, 5), st.floats(allow_nan=False, allow_infinity=False)),
            shown=st.sampled_from([None, [0, 1], [1, 0]]),
            guideline=st.one_of(st.none(), TEXT.filter(len)),
            made_at=st.one_of(st.none(), TEXT.filter(len)),
            annotator=TEXT.filter(str.strip),
            extra=st.fixed_dictionaries({"why": st.one_of(st.none(), TEXT, st.integers(-9, 9))}),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_whatever_can_be_said_comes_back_as_it_was_said(halves):
    columns = {name: [getattr(half, name) for half in halves] for name in Annotation.__struct_fields__}
    prepared = prepare_values(
        prompts=columns["prompt"],
        responses=columns["responses"],
        choices=columns["choice"],
        rewards=columns["reward"],
        shown=columns["shown"],
        guideline=columns["guideline"],
        made_at=columns["made_at"],
        annotator_ids=columns["annotator"],
        extra={"why": [half.extra["why"] for half in halves]},
    )
    assert said(prepared) == halves
    assert prepared.owners == columns["annotator"]


# --- sources ---------------------------------------------------------------------------------------------------------


ROWS = [
    {"question": "p", "a": "x", "b": "y", "vote": "A", "worker": "u", "at": "noon", "why": "better", "other": 1},
    {"question": "q", "a": "x", "b": "", "vote": "B", "worker": "v", "at": None, "why": "", "other": 2},
]
RENAMED = {
    "prompt": "question",
    "first": "a",
    "second": "b",
    "choice": "vote",
    "annotator_id": "worker",
    "made_at": "at",
}
WORDS = {"A": "first", "B": "second"}


def test_rows_of_a_source_are_what_the_same_lists_would_be():
    prepared = prepare_rows(ROWS, columns=RENAMED, words=WORDS, extra=["why"])
    assert said(prepared) == said(
        prepare_values(
            prompts=["p", "q"],
            responses=[("x", "y"), ("x", "")],
            choices=["first", "second"],
            annotator_ids=["u", "v"],
            made_at=["noon", None],
            extra={"why": ["better", ""]},
        )
    )
    assert prepared.header.columns == RENAMED
    assert prepared.header.rows is None  # handed in by a program: more may come


def test_a_data_set_says_how_many_rows_it_has_and_its_digest_is_private():
    prepared = prepare_rows(Dataset.from_list(ROWS), columns=RENAMED, words=WORDS)
    assert (prepared.header.form, prepared.header.rows, prepared.header.digests) == ("dataset", 2, [])
    assert prepared.private is not None
    assert len(prepared.private.digests[0]) == 64
    public = prepare_rows(Dataset.from_list(ROWS), columns=RENAMED, words=WORDS, public_digest=True)
    assert public.header.digests == prepared.private.digests


def test_a_table_of_text_gives_numbers_and_gaps(tmp_path):
    path = tmp_path / "votes.csv"
    path.write_text("first,second,choice,reward,shown,annotator_id,made_at\na,b,1,4,,7,\na,b,tie,0.5,second,8,now\n")
    first, second = said(prepare_rows(path))
    assert (first.choice, first.reward, first.shown, first.made_at, first.annotator) == (1, 4, None, None, "7")
    assert isinstance(first.reward, int)
    assert (second.choice, second.reward, second.shown, second.made_at) == ("tie", 0.5, [1, 0], "now")


def test_a_column_of_the_same_name_is_taken_unless_it_is_said_not_to_be(tmp_path):
    rows = [{"response": "a", "reward": 1, "annotator_id": "u", "prompt": "p"}]
    assert said(prepare_rows(rows))[0].prompt == "p"
    prepared = prepare_rows(rows, columns={"prompt": None, "annotator_id": None})
    assert said(prepared) == [Annotation(responses=["a"], reward=1)]
    assert prepared.header.provenance["prompt"] == prepared.header.provenance["annotator"] == "unknown"


def test_the_guidelines_own_digest_stands_in_the_open(tmp_path):
    path = tmp_path / "guideline.md"
    path.write_text("prefer the truth")
    header = values(guideline="v3", guideline_file=path).header
    assert header.guideline_digest == hashlib.sha256(b"prefer the truth").hexdigest()


def test_the_files_that_lists_were_drawn_from_are_counted_and_digested(tmp_path):
    path = tmp_path / "votes.csv"
    path.write_text("x")
    prepared = values(drawn_from=path)
    assert prepared.header.rows == 2
    assert prepared.private is not None
    assert prepared.private.names == ["votes.csv"]
    assert values(drawn_from=[path, path], public_digest=True).header.digests == prepared.private.digests * 2


# --- what cannot stand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"annotator_ids": ["u", None]}, "Row 2: the annotator id is missing"),
        ({"annotator_ids": ["u", " "]}, "Row 2: the annotator id is empty"),
        ({"annotator_ids": ["u", True]}, "Row 2: the annotator id is a bool"),
        ({"annotator_ids": ["u", 1.5]}, "Row 2: the annotator id is a float"),
        ({"annotator_ids": ["u"]}, "Row 2: there is no value in annotator_ids, which has 1, while prompts has 2"),
        ({"prompts": ["p", None]}, "Row 2: the prompt is missing"),
        ({"prompts": ["p", 3]}, "Row 2: the prompt is an int, not text"),
        ({"responses": [PAIR, ("a", None)]}, "Row 2: a response is missing, not text"),
        ({"responses": [PAIR, ()]}, "Row 2: the responses are a tuple"),
        ({"responses": [PAIR, 5]}, "Row 2: the responses are an int"),
        ({"choices": ["first", None]}, "Row 2: the choice is missing"),
        ({"choices": ["first", ""]}, "Row 2: the choice is empty"),
        ({"choices": ["first", "left"]}, "Row 2: the choice is none of the known words"),
        ({"choices": ["first", True]}, "Row 2: the choice is none of the known words"),
        ({"choices": ["first", ["x"]]}, "Row 2: the choice is none of the known words"),
        ({"choices": [0, 2]}, "Row 2: the choice is of another response than the 2"),
        ({"choices": [0, -1]}, "Row 2: the choice is of another response"),
        ({"responses": [PAIR, "alone"]}, "Row 2: there is a choice, and one response to choose from"),
        ({"rewards": [1, math.nan]}, "Row 2: the reward is not finite"),
        ({"rewards": [1, True]}, "Row 2: the reward is a bool"),
        ({"rewards": [1, "4"]}, "Row 2: the reward is a str"),
        ({"rewards": [1, None]}, "Row 2: the reward is missing"),
        ({"rewards": [1, (1, 2, 3)]}, "Row 2: there are 3 rewards for 2 responses"),
        ({"rewards": [1, (1, math.inf)]}, "Row 2: the reward is not finite"),
        ({"shown": [None, "third"]}, "Row 2: shown says no order"),
        ({"shown": [None, [0, 0]]}, "Row 2: shown says no order"),
        ({"shown": [None, [0, None]]}, "Row 2: shown says no order"),
        ({"shown": [None, ["b", "a"]]}, "Row 2: shown says no order"),
        ({"made_at": [None, ["x"]]}, "Row 2: made_at is a list"),
        ({"guideline": [None, 3]}, "Row 2: the guideline's version is an int"),
        ({"prompts": ["p", "\ud800"]}, "Row 2: a text is no valid Unicode"),
        ({"annotator_ids": ["u", "\ud800"]}, "Row 2: a text is no valid Unicode"),
        ({"extra": {"x": [1, object()]}}, "Row 2: a value cannot be written"),
        ({"extra": {"x": [1]}}, "Row 2: there is no value in extra"),
        ({"prompts": [], "responses": [], "choices": [], "annotator_ids": []}, "No annotations were given"),
        ({"prompts": "p"}, "prompts is a single value"),
        ({"prompts": "p", "responses": PAIR, "choices": "tie"}, "prompts is a single value and"),
        ({"annotator_ids": "u"}, "annotator_ids is a single value and prompts is a list"),
        ({"prompts": {"a": 1}}, "prompts is a dict, not a list"),
        ({"responses": None}, "There are no responses"),
        ({"chosen": ["a", "b"], "rejected": ["c", "d"]}, "given in 2 ways"),
        ({"responses": None, "chosen": ["a", "b"]}, "There is chosen and no rejected"),
        ({"responses": None, "chosen": ["a", "b"], "rejected": ["c", "d"]}, "say what was chosen, and choices as well"),
        ({"choices": None}, "Neither a choice nor a reward"),
        ({"words": {"A": "left"}}, "words says that 'A' means 'left'"),
        ({"guideline": " "}, "guideline is empty, not one word"),
        ({"extra": ["why"]}, "extra is a list, not a dict"),
        ({"words": "A=first"}, "words is a str, not a dict"),
        ({"shown": "left"}, "Row 1: shown says no order"),
        ({"drawn_from": "/nowhere/votes.csv"}, "cannot be read"),
    ],
)
def test_a_row_that_cannot_stand_is_named(changed, complaint):
    values()  # the same rows without the change can
    with pytest.raises(DataError) as refused:
        values(**changed)
    assert complaint in refused.value.message
    assert refused.value.next_step


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ({"columns": {**RENAMED, "annotator_id": "wrker"}}, r"no column 'wrker'.*Did you mean 'worker'"),
        ({"columns": {**RENAMED, "anotator": "worker"}}, r"renames 'anotator'.*Did you mean 'annotator_id'"),
        ({"columns": {k: v for k, v in RENAMED.items() if k != "annotator_id"}}, "no column 'annotator_id'"),
        ({"extra": ["reason"]}, "no column 'reason'"),
        ({"extra": "reason"}, "no column 'reason'"),
        ({"columns": "prompt=question"}, "columns is a str, not a dict"),
        ({"shown": ["first", "second"]}, "shown is a list, not one word for all rows"),
        ({"columns": {**RENAMED, "rejected": "b"}}, "in 2 ways"),
        ({"columns": {**RENAMED, "guideline": "other"}, "guideline": "v3"}, "guideline is said once for all rows"),
    ],
)
def test_a_source_that_does_not_fit_is_named(how, complaint):
    with pytest.raises(DataError, match=complaint):
        prepare_rows(ROWS, **{"columns": RENAMED, "words": WORDS, **how})


def test_no_complaint_quotes_what_a_row_says():
    secret = "what nobody may read"
    for changed in ({"choices": ["first", secret]}, {"shown": [None, secret]}, {"rewards": [1, secret]}):
        with pytest.raises(DataError) as refused:
            values(**changed)
        assert secret not in str(refused.value)


def test_the_words_for_a_choice_are_the_ones_that_are_documented():
    halves = said(prepare_values(responses=[PAIR] * 4, choices=list(CHOICES), annotator_ids=["u"] * 4))
    assert [half.choice for half in halves] == [0, 1, "tie", "undecided"]
