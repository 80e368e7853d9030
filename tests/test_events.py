"""Events and their bytes: what goes in comes out, and nothing is guessed."""

from __future__ import annotations

import json
import math

import pytest

from rlhf_audit_nb.errors import EntryError
from rlhf_audit_nb.events import (
    EVENTS,
    PopulationRoster,
    PrivacyInherited,
    PrivacyPopulation,
    PrivacySealed,
    RunFinished,
    RunInterrupted,
    Step,
    StepPrivate,
    decode_body,
    decode_private,
    encode_body,
    encode_private,
    number,
)


def test_every_event_has_a_type_name_of_its_own():
    assert len(EVENTS) == len({kind.TYPE for kind in EVENTS.values()})
    assert all(name == kind.TYPE and "." in name for name, kind in EVENTS.items())


def test_an_event_comes_back_as_it_went_in():
    step = Step(step=3, metrics={"loss": 0.5}, epsilon=1.25, learning_rate=1e-3)
    assert decode_body(Step.TYPE, encode_body(step)) == step


def test_what_a_training_inherited_comes_back_with_its_sources():
    source = {"entry": 7, "run": "a" * 32, "digest": "b" * 64}
    event = PrivacyInherited(
        kind="private-model", sources=[source], unit="annotator", epsilon=number(math.inf), delta=1e-5, prompts="public"
    )
    assert decode_body(PrivacyInherited.TYPE, encode_body(event)) == event
    assert event.epsilon == "Infinity"


def test_a_population_shows_its_size_and_not_its_roster():
    event = PrivacyPopulation(population="a" * 32, units=2, key_id="b" * 32, disjoint_from=["c" * 32])
    roster = PopulationRoster(key_id="b" * 32, tags="0" * 32 + "1" * 32)
    assert decode_body(PrivacyPopulation.TYPE, encode_body(event)) == event
    assert decode_private(PrivacyPopulation.TYPE, encode_private(roster)) == roster
    assert roster.tags.encode() not in encode_body(event)


def test_the_bytes_do_not_depend_on_the_order_in_which_a_map_was_filled():
    first = encode_body(Step(step=1, metrics={"a": 1.0, "b": 2.0}))
    second = encode_body(Step(step=1, metrics={"b": 2.0, "a": 1.0}))
    assert first == second
    assert first != encode_body(Step(step=1, metrics={"a": 2.0, "b": 1.0}))


@pytest.mark.parametrize(("value", "written"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_a_number_that_json_lacks_is_written_by_its_name(value, written):
    assert number(value) == written
    body = json.loads(encode_body(Step(step=1, metrics={"loss": number(value)})))
    assert body["metrics"]["loss"] == written


def test_a_finite_number_stays_itself():
    assert number(0.1) == 0.1
    assert number(7) == 7


def test_an_unknown_type_is_reported_and_not_guessed():
    with pytest.raises(EntryError, match=r"'run\.exploded' is not known") as refused:
        decode_body("run.exploded", b"{}")
    assert refused.value.reason == "unknown-type"


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b'{"status":"completed"}', b'{"status":1,"steps":1,"trained":true}', b"{", b'{"x":1}'],
)
def test_a_body_of_another_shape_is_reported(body):
    with pytest.raises(EntryError, match="malformed") as refused:
        decode_body(RunFinished.TYPE, body)
    assert refused.value.reason == "malformed-body"


def test_an_unknown_field_is_reported_and_not_dropped():
    body = json.loads(encode_body(RunFinished(status="completed", steps=1, trained=True)))
    with pytest.raises(EntryError, match="surprise"):
        decode_body(RunFinished.TYPE, json.dumps({**body, "surprise": 1}).encode())


def test_private_halves_come_back_and_belong_to_their_type():
    payload = encode_private(StepPrivate(metrics={"loss": 0.25}))
    assert decode_private(Step.TYPE, payload) == StepPrivate(metrics={"loss": 0.25})
    with pytest.raises(EntryError):
        decode_private(Step.TYPE, encode_private(PrivacySealed(seed="00")))
    with pytest.raises(EntryError, match="no private half"):
        decode_private(RunInterrupted.TYPE, payload)


def test_no_public_event_has_a_field_for_the_seed_or_for_what_only_the_private_half_holds():
    for kind in EVENTS.values():
        assert "seed" not in {*kind.__struct_fields__} - ({"seed"} if kind.TYPE == "trainer.attached" else set())
