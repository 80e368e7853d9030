"""Comparing runs: every field that must be equal is seen to differ, and nothing else is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from report_story import Teller

from rlhf_audit_nb.events import (
    DataBound,
    EnvironmentCaptured,
    Event,
    ModelBound,
    PrivacyReserved,
    PrivacySettled,
    RunFinished,
    RunStarted,
    Step,
    TrainerAttached,
    WeightsSaved,
)
from rlhf_audit_nb.records.comparison import compare_environments, compare_runs, private_runs

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.entry import Entry

RESERVED = PrivacyReserved(
    reservation="r" * 32,
    unit="annotator",
    adjacency="zero-out",
    mechanism="m",
    engine="loop",
    generator="g",
    units=10,
    clipping_norm=1.0,
    noise_multiplier=1.5,
    sampling_rate=0.25,
    steps=2,
    steps_asked=2,
    max_pairs_per_unit=8,
    delta=1e-5,
    epsilon_budget=8.0,
    epsilon_before=1.0,
    epsilon_planned=2.0,
    accountants={"pld": 2.0},
    column="annotator_id",
)
STORY: list[Event] = [
    RunStarted(experiment="x", entry_point="cell", tool="t/1", privacy={"epsilon": 8.0}, audit={"every_steps": 1}),
    TrainerAttached(trainer="DPOTrainer", loss="sigmoid", max_steps=2, seed=42, hyperparameters={"beta": 0.1}),
    DataBound(role="train", columns=["prompt"], unit="annotator", units=10),
    ModelBound(role="base", architecture="L", parameters=9, trainable=3, weights_digest="a", config_digest="b"),
    RESERVED,
    Step(step=1, epsilon=1.5, learning_rate=1e-3, gradient_norm=0.5, update_norm=0.25, weights_digest="c"),
    Step(step=2, epsilon=2.0, learning_rate=5e-4, gradient_norm=0.75, update_norm=0.125, weights_digest="d"),
    WeightsSaved(step=2, name="model", digest="e", files=1, bytes=2),
    PrivacySettled(reservation="r" * 32, steps=2, epsilon_run=1.0, epsilon_total=2.0),
    ModelBound(role="final", architecture="L", parameters=9, trainable=3, weights_digest="f", config_digest="b"),
    RunFinished(status="completed", steps=2, trained=True),
]
NOT_COMPARED = {
    "RunStarted": {"tool", "record", "entry_point", "cell_digest", "compliance_mode"},
    "DataBound": {"provenance", "source", "digest", "rows"},
    "ModelBound": {"name"},
    "PrivacyReserved": {
        "reservation",
        "generator",
        "epsilon_budget",
        "epsilon_before",
        "epsilon_planned",
        "accountants",
        "population",
    },
    "Step": {"epsilon"},
    "PrivacySettled": {"reservation", "epsilon_run", "epsilon_total"},
    "WeightsSaved": {"step", "name", "digest", "files", "bytes", "signature_digest"},
}


def entries(story: list[Event], run: str = "a" * 32) -> list[tuple[str, list[Entry]]]:
    teller = Teller()
    for event in story:
        teller.tell(event, run)
    return private_runs(teller.entries)


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + (1 if isinstance(value, int) else 2.0**-50)
    if isinstance(value, dict):
        return {**value, "more": 1}
    if isinstance(value, list):
        return [*value, "more"]
    return f"{value}!"


CASES = [
    (place, name)
    for place, event in enumerate(STORY)
    for name in msgspec.to_builtins(event)
    if name in event.__struct_fields__
]


def test_a_run_equals_itself() -> None:
    found = compare_runs(entries(STORY), entries(STORY, "b" * 32))
    assert found.equal
    assert (found.trainings, found.steps, found.digests) == (1, 2, 3)


@pytest.mark.parametrize(("place", "name"), CASES, ids=[f"{type(STORY[p]).__name__}-{p}-{n}" for p, n in CASES])
def test_every_field_is_compared_but_those_that_cannot_be(place: int, name: str) -> None:
    event = STORY[place]
    if name == "role" or getattr(event, name) is None:
        return  # another role is another event; what is unknown has no other value
    changed = [*STORY]
    changed[place] = msgspec.structs.replace(event, **{name: other(getattr(event, name))})
    found = compare_runs(entries(STORY), entries(changed))
    assert found.equal == (name in NOT_COMPARED.get(type(event).__name__, set()))
    if not found.equal:
        assert found.first is not None
        assert found.first.what == name
        assert found.first.entry == place
        if isinstance(event, Step):
            assert found.first_step == event.step
            assert (found.first.expected, found.first.found) == (None, None)


@pytest.mark.parametrize("place", [place for place, event in enumerate(STORY) if not isinstance(event, WeightsSaved)])
def test_an_event_that_is_missing_or_too_many_differs(place: int) -> None:
    if isinstance(STORY[place], PrivacyReserved):
        assert not compare_runs(entries(STORY), []).equal
        return
    fewer = STORY[:place] + STORY[place + 1 :]
    assert not compare_runs(entries(STORY), entries(fewer)).equal
    assert not compare_runs(entries(fewer), entries(STORY)).equal


def test_nothing_compared_is_not_equal() -> None:
    assert not compare_runs([], []).equal
    assert not compare_runs(entries(STORY), []).equal
    assert not compare_runs([], entries(STORY)).equal


def test_what_differs_in_the_environment_is_said() -> None:
    then = EnvironmentCaptured(
        python="3.11.7",
        implementation="CPython",
        platform="Linux 6.1 x86_64",
        packages={"torch": "2.13.0", "rich": "1"},
        hardware={"cpu": "A", "gpus": []},
        threads=1,
    )
    assert compare_environments(then, msgspec.structs.replace(then, packages={"torch": "2.13.0", "rich": "2"})) == ()
    now = msgspec.structs.replace(then, packages={"torch": "2.14.0"}, threads=8, hardware={"cpu": "B", "gpus": [{}]})
    said = " ".join(compare_environments(then, now))
    assert "Torch differs: 2.13.0 then, 2.14.0 now." in said
    assert "threads differs: 1 then, 8 now" in said
    assert "processor" in said
    assert "GPU" in said
