"""Comparing runs: every field that must be equal is seen to differ, and nothing else is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from report_story import Teller

from rlhf_audit_nb.events import (
    EVENTS,
    CellAudited,
    CheckpointRecorded,
    CodeFiles,
    ComputeRecorded,
    DataBound,
    DataRead,
    EnvironmentCaptured,
    EvaluationRecorded,
    Event,
    ExecutedCell,
    Frame,
    FunctionBound,
    MetricsLogged,
    ModelBound,
    ModelShape,
    Passes,
    PrivacyAudited,
    PrivacyEngine,
    PrivacyInherited,
    PrivacyReserved,
    PrivacySettled,
    RankReported,
    RanksFormed,
    ReferenceUsed,
    RunFailure,
    RunFinished,
    RunResumed,
    RunStarted,
    SamplesDrawn,
    Step,
    ThresholdSealed,
    TrainerAttached,
    TrainerLogged,
    WeightsSaved,
)
from rlhf_audit_nb.records.comparison import (
    COMPARED,
    NOT_COMPARED,
    compare_environments,
    compare_runs,
    is_timing,
    private_runs,
    recorded_runs,
)

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
PUBLIC: list[Event] = [
    RunStarted(experiment="y", entry_point="cell", tool="t/1", audit={"every_steps": 1}),
    CellAudited(
        cell="c",
        execution_count=1,
        source_digest="s",
        seen="first",
        executed=[ExecutedCell(count=1, source_digest="s")],
    ),
    RanksFormed(world_size=2, rank=0, backend="gloo", strategy="replicated", loss="rank 0", launcher="torchrun"),
    RunResumed(step=1, checkpoint="c", from_run="r", entry=3),
    TrainerAttached(trainer="GRPOTrainer", loss="dapo", max_steps=2, seed=1, hyperparameters={"beta": 0.0}),
    DataBound(role="train", columns=["prompt"], rows=3, digest="d", shards=["s"], shard_rows=1, features={"a": "b"}),
    DataBound(role="eval", columns=["prompt"], rows=3, digest="e", source="p", fingerprint="f", revision="r"),
    FunctionBound(role="reward", position=0, name="f", kind="function", source_digest="s", code_digest="c", weight=1.0),
    ReferenceUsed(role="reference", how="adapter-disabled", weights_digest="w", same_as_base=True),
    SamplesDrawn(step=1, draw=1, samples=4, statistics={"reward/mean": 0.5}, group_means=[0.5]),
    Step(step=1, metrics={"loss": 0.75}, weights_digest="c", weights_moved=0.5, batch_digest="b"),
    TrainerLogged(step=1, metrics={"entropy": 1.5}),
    MetricsLogged(metrics={"score": 0.5}, step=1),
    CheckpointRecorded(step=1, epoch=1, metrics={"m": 1.0}, weights_digest="w", folder_digest="f"),
    DataRead(role="train", batches=2, rows=3, digest="x", workers=0),
    ComputeRecorded(
        trainer="GRPOTrainer",
        shape=ModelShape(parameters=9, trainable=3, dense=8, backward=7, learning=3, layers=1, width=2),
        device="cpu",
        columns={"update": Passes(passes=1, positions=2, scores=3, low=1.0, high=2.0)},
        seconds=1.5,
        energy={"package": 2.0},
        transformers_flos=5.0,
    ),
    RankReported(rank=1, world_size=2, heard="reported", rows=3, rows_digest="r", loss={"last": 0.5}, seconds=2.0),
    ThresholdSealed(metric="accuracy", relation=">=", bound=0.5, record="r"),
    EvaluationRecorded(
        metrics={"accuracy": 0.5}, identified="live", weights_digest="w", record="r", data="d", seeds=[1]
    ),
    RunFailure(
        kind="ValueError", category="exception", frames=[Frame(role="cell", where="In[1]", function="f", line=1)]
    ),
    RunFinished(status="failed", steps=1, trained=True, reason="ValueError", overhead={"step": 1.0}),
]
PRIVATE_MORE: list[Event] = [
    RESERVED,
    PrivacyEngine(reservation="r" * 32, engine="loop", reason="because"),
    PrivacyInherited(kind="private-model", sources=[{"entry": 1}], unit="annotator", epsilon=1.0, delta=1e-5),
    Step(step=1, weights_digest="w"),
    PrivacyAudited(
        reservation="r" * 32,
        outcome="not contradicted",
        canaries=100,
        steps=2,
        guesses=10,
        right=6,
        delta=1e-5,
        epsilon_claimed=2.0,
        epsilon_lower=0.5,
        epsilon_gaussian=0.75,
        confidence=0.95,
        ceiling=4.0,
    ),
]
STORIES = {"private": STORY, "public": PUBLIC, "more": PRIVATE_MORE}


def entries(story: list[Event], run: str = "a" * 32) -> list[tuple[str, list[Entry]]]:
    teller = Teller()
    for event in story:
        teller.tell(event, run)
    return recorded_runs(teller.entries)


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + (1 if isinstance(value, int) else 2.0**-50)
    if isinstance(value, dict):
        return {**value, "more": next(iter(value.values()), 1)}
    if isinstance(value, ModelShape):
        return msgspec.structs.replace(value, width=value.width + 1)
    if isinstance(value, list):
        return [*value, *(value[-1:] or ["more"])]
    return f"{value}!"


CASES = [
    (story, place, name)
    for story, events in STORIES.items()
    for place, event in enumerate(events)
    for name in event.__struct_fields__
    if name not in ("role", "rank") and getattr(event, name) is not None
]  # another role or rank is another event; what is unknown has no other value


def test_every_kind_of_event_is_compared_or_left_out_for_a_stated_reason() -> None:
    assert set(COMPARED) | set(NOT_COMPARED) == set(EVENTS.values())
    assert not set(COMPARED) & set(NOT_COMPARED)
    assert all(len(reason) > 10 for reason in NOT_COMPARED.values())
    for kind, left_out in COMPARED.items():
        assert set(left_out) <= set(kind.__struct_fields__)
        assert all(len(reason) > 10 for reason in left_out.values())


def test_the_stories_tell_every_kind_that_is_compared() -> None:
    assert {type(event) for story in STORIES.values() for event in story} - {WeightsSaved} == set(COMPARED)


@pytest.mark.parametrize("story", STORIES)
def test_a_run_equals_itself(story: str) -> None:
    found = compare_runs(entries(STORIES[story]), entries(STORIES[story], "b" * 32))
    assert found.equal
    assert found.runs == 1
    assert found.compared == sum(type(event) in COMPARED for event in STORIES[story])
    if story == "private":
        assert (found.trainings, found.steps, found.digests) == (1, 2, 3)


@pytest.mark.parametrize(
    ("story", "place", "name"), CASES, ids=[f"{s}-{type(STORIES[s][p]).__name__}-{p}-{n}" for s, p, n in CASES]
)
def test_every_field_is_compared_but_those_that_cannot_be(story: str, place: int, name: str) -> None:
    events = STORIES[story]
    event = events[place]
    changed = [*events]
    changed[place] = msgspec.structs.replace(event, **{name: other(getattr(event, name))})
    found = compare_runs(entries(events), entries(changed))
    assert found.equal == (type(event) in NOT_COMPARED or name in COMPARED[type(event)])
    if not found.equal:
        assert found.first is not None
        assert found.first.what.split(".")[0] == name
        assert found.first.entry == place
        if isinstance(event, Step):
            assert found.first_step == event.step
        if story == "public":
            assert found.first.expected != found.first.found
        if story != "public" and isinstance(event, Step | PrivacyAudited):
            assert (found.first.expected, found.first.found) == (None, None)


@pytest.mark.parametrize("kind", [kind for kind in COMPARED if kind not in (RunStarted, PrivacyReserved)])
def test_no_difference_of_what_a_private_training_left_shows_a_value(kind: type[Event]) -> None:
    before_training = {
        CellAudited, RanksFormed, TrainerAttached, RunResumed, DataBound, FunctionBound, ReferenceUsed, PrivacyEngine,
        PrivacyInherited, PrivacySettled, ThresholdSealed, RunFailure, RunFinished,
    }  # fmt: skip
    events = {type(event): event for story in STORIES.values() for event in story}
    event = ModelBound(role="final", architecture="L", parameters=9, trainable=3, weights_digest="f", config_digest="b")
    event = events[kind] if kind is not ModelBound else event
    name = next(name for name in event.__struct_fields__ if name not in {*COMPARED[kind], "role", "rank"})
    changed = msgspec.structs.replace(event, **{name: other(getattr(event, name))})
    found = compare_runs(entries([RESERVED, event]), entries([RESERVED, changed]))
    assert found.first is not None
    assert (found.first.expected is None and found.first.found is None) == (kind not in before_training)


def test_one_entry_that_is_missing_does_not_set_the_others_against_each_other() -> None:
    for story in (STORY, PUBLIC):
        for place, event in enumerate(story):
            if type(event) not in COMPARED or isinstance(event, Step | PrivacyReserved | TrainerAttached):
                continue
            found = compare_runs(entries(story), entries(story[:place] + story[place + 1 :]))
            assert [item.what for item in found.differences] == ["missing in the replay"]
            assert found.differences[0].entry == place


def test_what_an_earlier_version_did_not_record_is_named_and_no_difference() -> None:
    older = [event for event in PUBLIC if not isinstance(event, DataRead | ReferenceUsed)]
    older[4] = msgspec.structs.replace(older[4], generators={})
    newer = [msgspec.structs.replace(PUBLIC[0], tool="t/2"), *PUBLIC[1:]]
    newer[4] = msgspec.structs.replace(newer[4], generators={"torch": "g"})
    found = compare_runs(entries(older), entries(newer))
    assert found.equal
    assert found.unknown == ("data.read", "reference.used", "trainer.attached.generators")
    same_tool = compare_runs(entries(older), entries([PUBLIC[0], *newer[1:]]))
    assert {item.what for item in same_tool.differences} == {"was not there before", "generators.torch"}
    newer[4] = msgspec.structs.replace(newer[4], seed=2)
    assert not compare_runs(entries(older), entries(newer)).equal


def test_evaluations_outside_of_a_run_are_compared_too() -> None:
    teller = Teller()
    for event in PUBLIC[:2]:
        teller.tell(event, "a" * 32)
    teller.tell(EvaluationRecorded(metrics={"accuracy": 0.5}, identified="live"))
    other_teller = Teller()
    for event in PUBLIC[:2]:
        other_teller.tell(event, "a" * 32)
    other_teller.tell(EvaluationRecorded(metrics={"accuracy": 0.25}, identified="live"))
    assert [run for run, _ in recorded_runs(teller.entries)] == ["a" * 32, ""]
    assert compare_runs(recorded_runs(teller.entries), recorded_runs(teller.entries)).equal
    found = compare_runs(recorded_runs(teller.entries), recorded_runs(other_teller.entries))
    assert [(item.where, item.what, item.expected, item.found) for item in found.differences] == [
        ("evaluation.recorded", "metrics.accuracy", 0.5, 0.25)
    ]


def test_numbers_of_a_clock_are_known_by_their_names() -> None:
    clocked = ("eval_runtime", "train_samples_per_second", "step_time", "profiling/Time taken: X", "tokens_per_sec")
    assert all(map(is_timing, clocked))
    kept = (
        "loss",
        "eval_loss",
        "completions/mean_length",
        "sometimes",
        "rewards/timeliness/mean",
        "epoch",
        "runtimes_",
    )
    assert not any(map(is_timing, kept))
    slow = [PUBLIC[0], Step(step=1, metrics={"eval_loss": 1.0, "eval_runtime": 2.0})]
    fast = [PUBLIC[0], Step(step=1, metrics={"eval_loss": 1.0, "eval_runtime": 1.0})]
    assert compare_runs(entries(slow), entries(fast)).equal


@pytest.mark.parametrize("place", [place for place, event in enumerate(STORY) if not isinstance(event, WeightsSaved)])
def test_an_event_that_is_missing_or_too_many_differs(place: int) -> None:
    fewer = STORY[:place] + STORY[place + 1 :]
    assert not compare_runs(entries(STORY), entries(fewer)).equal
    assert not compare_runs(entries(fewer), entries(STORY)).equal


def test_a_private_run_is_one_that_reserved_budget() -> None:
    assert private_runs(entries(PUBLIC)[0][1]) == []
    assert len(private_runs(entries(STORY)[0][1])) == 1


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


def test_a_source_file_that_both_imported_and_that_differs_is_said() -> None:
    def environment(**files: str) -> EnvironmentCaptured:
        code = CodeFiles(
            project="git", count=1, digest="d", files={f"{name}.py": digest for name, digest in files.items()}
        )
        return EnvironmentCaptured(
            python="3", implementation="CPython", platform="x", packages={}, hardware={}, code=code
        )

    assert compare_environments(environment(a="1"), environment(a="1", b="2")) == ()
    assert compare_environments(environment(a="1"), environment(a="2")) == (
        "The source file a.py differs: 1 then, 2 now.",
    )
