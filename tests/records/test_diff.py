"""Comparing records: one thing that is changed is one difference, and nothing else is."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from records_support import TRAINING, Made, policy_of, write_notebook
from report_story import Teller

from rlhf_audit_nb.events import (
    EVENTS,
    BaseComputeDeclared,
    CellExecuted,
    CheckpointRecorded,
    CodeBound,
    CodeFiles,
    ComputeRecorded,
    ComputeRecordedPrivate,
    DataBound,
    DataPrivate,
    DataRead,
    EnvironmentCaptured,
    EvaluationPrivate,
    EvaluationRecorded,
    Event,
    Frame,
    FunctionBound,
    InputFile,
    InputFiles,
    MetricsLogged,
    ModelBound,
    ModelShape,
    Passes,
    PrivacyAudited,
    PrivacyEngine,
    PrivacyInherited,
    PrivacyReserved,
    PrivacySealed,
    PrivacySettled,
    Private,
    PublicDeclared,
    RankReported,
    RanksFormed,
    RecordSealed,
    RecordStarted,
    ReferenceUsed,
    RunFailure,
    RunFinished,
    RunInterrupted,
    RunResumed,
    RunStarted,
    SamplesDrawn,
    Step,
    StepPrivate,
    ThresholdSealed,
    TrainerAttached,
    TrainerLogged,
    WeightsSaved,
)
from rlhf_audit_nb.records import open_record, run_notebook
from rlhf_audit_nb.records.additions import Addition
from rlhf_audit_nb.records.diff import (
    DIFFERENT,
    InvalidRecordError,
    RecordDiff,
    compare_records,
    diff_records,
    open_records,
    tabulate_records,
)
from rlhf_audit_nb.records.diff_facts import NOT_SHOWN, SECTIONS, SHOWN
from rlhf_audit_nb.records.record import OpenedRecord
from rlhf_audit_nb.trail import Level, TrustPolicy, Verdict
from rlhf_audit_nb.trail.verdict import Anchor

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.entry import Entry

FIXTURES = Path(__file__).parents[1] / "vectors" / "records" / "seal-1"
RUN = "a" * 32
RECORD = "b" * 32
STARTED = RecordStarted(
    record=RECORD, notebook_digest="n", parameters={"epsilon": 8.0, "name": "x"}, tool="t/1", kernel={"name": "python3"}
)
SEALED = RecordSealed(record=RECORD, digest="d", status="completed", cells=3, keys=["k"])
FILES = InputFiles(count=1, bytes=2, digest="f", files=[InputFile(name="a.csv", bytes=2, digest="g")])
OUTSIDE: list[Event] = [
    CellExecuted(record=RECORD, cell="one", position=0, source_digest="s", outputs_digest="o", status="ok"),
    ThresholdSealed(metric="accuracy", relation=">=", bound=0.5, data="d", experiment="x", reason="r", by="b"),
    EvaluationRecorded(
        metrics={"accuracy": 0.75},
        identified="live",
        weights_digest="w",
        data="d",
        data_name="test",
        seeds=[1],
        samples=8,
    ),
]
PUBLIC: list[Event] = [
    RunStarted(experiment="x", entry_point="cell", tool="t/1", audit={"every_steps": 1}, declared_model="m"),
    RanksFormed(world_size=2, rank=0, backend="gloo", strategy="replicated", loss="rank 0", launcher="torchrun"),
    EnvironmentCaptured(
        python="3.11",
        implementation="CPython",
        platform="Linux",
        packages={"torch": "2.13.0"},
        hardware={"cores": 2},
        threads=1,
        determinism={"tf32": False},
        git_commit="c",
        git_dirty=False,
        git_diff="d",
        code=CodeFiles(project="git", count=1, digest="e", files={"a.py": "f"}),
        packages_digest="p",
        tool_digest="t",
        drivers={"cuda": "12"},
        variables={"OMP_NUM_THREADS": "1"},
    ),
    CodeBound(code=CodeFiles(project="git", count=1, digest="h", files={"b.py": "i"})),
    RunResumed(step=1, checkpoint="c", from_run="r", entry=3),
    TrainerAttached(
        trainer="GRPOTrainer",
        loss="dapo",
        max_steps=2,
        seed=1,
        hyperparameters={"learning_rate": 1e-5},
        defaults={"beta": 0.0},
        generators={"python": {"seed": 1}},
    ),
    DataBound(role="train", columns=["prompt"], rows=3, digest="d", shards=["s"], shard_rows=1, features={"a": "b"},
              revision="r", source="s", files=FILES),
    DataRead(role="train", batches=2, rows=3, digest="x", workers=0),
    ModelBound(role="base", architecture="L", parameters=9, trainable=3, weights_digest="w", config_digest="c",
               name="n", tokenizer_digest="t", adapter={"r": 8}, revision="v", generation_digest="g", files=FILES),
    FunctionBound(role="reward", position=0, name="f", kind="function", source_digest="s", code_digest="c", weight=1.0),
    ReferenceUsed(role="reference", how="adapter-disabled", weights_digest="w", same_as_base=True),
    PublicDeclared(kind="data", name="d", digest="d", reason="r", by="b"),
    SamplesDrawn(step=1, draw=1, samples=4, statistics={"reward/mean": 0.5}, group_means=[0.5]),
    Step(step=1, metrics={"loss": 0.75}, learning_rate=1e-5, gradient_norm=1.0, update_norm=0.5, weights_digest="c"),
    Step(step=2, metrics={"loss": 0.5}, learning_rate=1e-6, gradient_norm=1.5, update_norm=0.25, weights_digest="e"),
    TrainerLogged(step=1, metrics={"entropy": 1.5}),
    MetricsLogged(metrics={"score": 0.5}, step=1),
    CheckpointRecorded(step=1, epoch=1, metrics={"m": 1.0}, weights_digest="w", folder_digest="f"),
    WeightsSaved(step=2, name="model", digest="f", files=2, bytes=3, signature_digest="s", listed="l"),
    ModelBound(role="final", architecture="L", parameters=9, trainable=3, weights_digest="z", config_digest="c"),
    ComputeRecorded(
        trainer="GRPOTrainer",
        shape=ModelShape(parameters=9, trainable=3, dense=8, backward=7, learning=3, layers=1, width=2),
        device="cpu",
        columns={"update": Passes(passes=1, positions=2, scores=3, low=1.0, high=2.0)},
        seconds=1.5,
        energy={"package": 2.0},
        transformers_flos=5.0,
    ),
    BaseComputeDeclared(model="m", source="s", by="b", flop=1.0),
    RankReported(rank=1, world_size=2, heard="reported", rows=3, rows_digest="r", loss={"last": 0.5}, seconds=2.0),
    RunFailure(
        kind="ValueError", category="exception", frames=[Frame(role="cell", where="In[1]", function="f", line=1)]
    ),
    RunFinished(status="failed", steps=2, trained=True, reason="ValueError", overhead={"step": 1.0}),
]  # fmt: skip
PRIVATE: list[Event] = [
    RunStarted(experiment="x", entry_point="cell", tool="t/1", privacy={"epsilon": 8.0, "unit": "annotator"}),
    DataBound(role="train", columns=["prompt"], unit="annotator", units=10),
    PrivacyReserved(
        reservation="r" * 32, unit="annotator", adjacency="zero-out", mechanism="m", engine="loop", generator="g",
        units=10, clipping_norm=1.0, noise_multiplier=1.5, sampling_rate=0.25, steps=2, steps_asked=2,
        max_pairs_per_unit=8, delta=1e-5, epsilon_budget=8.0, epsilon_before=1.0, epsilon_planned=2.0,
        accountants={"pld": 2.0}, column="annotator_id", population="p" * 32,
    ),
    PrivacyEngine(reservation="r" * 32, engine="loop", reason="because"),
    PrivacyInherited(kind="private-model", sources=[{"entry": 1}], unit="annotator", epsilon=1.0, delta=1e-5),
    Step(step=1, epsilon=1.5, learning_rate=1e-3, gradient_norm=0.5, update_norm=0.25),
    Step(step=2, epsilon=2.0, learning_rate=5e-4, gradient_norm=0.75, update_norm=0.125),
    PrivacySettled(reservation="r" * 32, steps=2, epsilon_run=1.0, epsilon_total=2.0),
    PrivacyAudited(
        reservation="r" * 32, outcome="not contradicted", canaries=100, steps=2, guesses=10, right=6, delta=1e-5,
        epsilon_claimed=2.0, epsilon_lower=0.5, epsilon_gaussian=0.75, confidence=0.95, ceiling=4.0,
    ),
    ComputeRecorded(
        trainer="DPOTrainer",
        shape=ModelShape(parameters=9, trainable=3, dense=8, backward=7, learning=3, layers=1, width=2),
        device="cpu",
    ),
    RunFinished(status="completed", steps=2, trained=True),
]  # fmt: skip
HALVES: dict[type[Event], Private] = {
    DataBound: DataPrivate(rows=1, digest="d"),
    PrivacyReserved: PrivacySealed(seed="0" * 64),
    Step: StepPrivate(metrics={"loss": 1.0}),
    ComputeRecorded: ComputeRecordedPrivate(columns={}),
}
NOTEBOOK = {
    "cells": [
        {"cell_type": kind, "id": name, "source": source, "metadata": {}, "outputs": []}
        for kind, name, source in (
            ("markdown", "title", "# Title"),
            ("code", "one", "a = 1\nb = 2\n"),
            ("code", "two", "c"),
        )
    ],
    "metadata": {},
}


def told(
    events: list[Event], outside: list[Event] | None = None, *, record: Any = None, private: bool = False
) -> list[Entry]:
    teller = Teller()
    teller.tell(record or STARTED)
    for event in events:
        half = HALVES.get(type(event)) if private else None
        if isinstance(event, RunInterrupted):
            teller.tell(event)
        else:
            teller.tell(event, RUN, half)
    for event in OUTSIDE if outside is None else outside:
        sealed = isinstance(event, EvaluationRecorded) and None in event.metrics.values()
        teller.tell(event, None, EvaluationPrivate(metrics={}) if sealed else None)
    return teller.entries


def opened(entries: list[Entry], sealed: RecordSealed = SEALED, **more: Any) -> OpenedRecord:
    teller = Teller(list(entries))
    teller.tell(sealed)
    verdict = Verdict(level=Level.UNANCHORED, origin="example.org/trail", size=99, root="r", signers=("signer",))
    settings = {"verdict": verdict, "content": copy.deepcopy(NOTEBOOK), "started": STARTED, "sealed": sealed, **more}
    return OpenedRecord(entries=tuple(teller.entries), **settings)


def compared(left: OpenedRecord, right: OpenedRecord, **more: Any) -> RecordDiff:
    return compare_records(("left.ipynb", left), ("right.ipynb", right), **more)


def found(diff: RecordDiff) -> list[tuple[str, str, str]]:
    return [(row.section, row.place, row.kind) for row in diff.differences]


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + (1 if isinstance(value, int) else 2.0**-40)
    if isinstance(value, dict):
        key, item = next(iter(value.items()))
        return {**value, key: other(item)}
    if isinstance(value, list):
        return [other(value[0]), *value[1:]]
    if isinstance(value, msgspec.Struct):
        first = next(name for name in value.__struct_fields__ if isinstance(getattr(value, name), int | float | dict))
        return msgspec.structs.replace(value, **{first: other(getattr(value, first))})
    return f"{value}!"


# -- the table --------------------------------------------------------------------------------------------------------


def test_every_kind_of_event_has_its_place_or_a_reason_for_having_none() -> None:
    assert set(SHOWN) | set(NOT_SHOWN) == set(EVENTS.values())
    assert not set(SHOWN) & set(NOT_SHOWN)
    for kind, shown in SHOWN.items():
        assert shown.section in SECTIONS
        named = shown.left_out | shown.expected | shown.flat | set(shown.moved)
        assert named <= set(kind.__struct_fields__)
        assert set(shown.moved.values()) <= set(SECTIONS)


def test_the_stories_tell_every_kind_that_has_a_place() -> None:
    kinds = {
        type(event)
        for event in (*PUBLIC, *PRIVATE, *OUTSIDE, STARTED, SEALED, RunInterrupted(run=RUN, last_sequence=1))
    }
    assert kinds == set(SHOWN)


@pytest.mark.parametrize(("events", "private"), [(PUBLIC, False), (PRIVATE, True)], ids=["public", "private"])
def test_a_record_and_itself_do_not_differ(events: list[Event], private: bool) -> None:
    one = opened(told(events, private=private))
    diff = compared(one, one, outputs=True)
    assert not diff.differs
    assert set(diff.counts()) == {"same"}
    assert len(diff.rows) > 40


CASES = [
    (story, place, name)
    for story, events in (("public", PUBLIC), ("private", PRIVATE), ("outside", OUTSIDE))
    for place, event in enumerate(events)
    for name in event.__struct_fields__
    if getattr(event, name) not in (None, [], {}, 0, False) or isinstance(getattr(event, name), float)
]
NAMING = {"role", "rank", "position", "model", "record", "metric", "relation", "data_name", "step", "experiment"}
"""Fields that say what a thing is, so that another value is another thing; each is looked at in a test of its own."""


@pytest.mark.parametrize(("story", "place", "name"), [case for case in CASES if case[2] not in NAMING], ids=str)
def test_one_field_that_is_changed_is_one_difference_and_nothing_else_is(story: str, place: int, name: str) -> None:
    events = {"public": PUBLIC, "private": PRIVATE, "outside": OUTSIDE}[story]
    event = events[place]
    changed = [*events]
    changed[place] = msgspec.structs.replace(event, **{name: other(getattr(event, name))})
    private = story == "private"
    before, after = (
        told(PUBLIC, part) if story == "outside" else told(part, private=private) for part in (events, changed)
    )
    diff = compared(opened(before), opened(after))
    shown = SHOWN[type(event)]
    kinds = {row.kind for row in diff.rows} - {"same", "sealed"}
    if isinstance(event, (PublicDeclared, WeightsSaved)) and name in ("name", "kind"):
        assert {row.kind for row in diff.differences} == {"added", "removed"}  # another name: another thing
    elif name in shown.left_out or (isinstance(event, CellExecuted) and name != "status"):
        assert kinds == set()
    elif name in shown.expected:
        assert kinds == {"expected"}
        assert not diff.differs
    elif name == "population":
        assert [row.place for row in diff.rows if row.kind == "sealed" and "population" in row.place] == ["population"]
    else:
        assert kinds == {"changed"}
        (row,) = diff.differences
        if isinstance(event, EnvironmentCaptured) and name == "code":
            assert row.place == "code.count"
        section = "weights" if isinstance(event, ModelBound) and event.role == "final" else shown.section
        parts = {"weights_digest": "weights", "batch_digest": "data"} if isinstance(event, Step) else shown.moved
        assert row.section == parts.get(name, section)
        assert row.left != row.right or isinstance(event, Step)


@pytest.mark.parametrize(
    ("story", "place"),
    [(s, p) for s, e in (("public", PUBLIC), ("private", PRIVATE)) for p in range(1, len(e))],
    ids=str,
)
def test_an_entry_that_is_missing_removes_its_facts_and_no_others(story: str, place: int) -> None:
    events = PUBLIC if story == "public" else PRIVATE
    if isinstance(events[place], RunFinished):
        return  # then the run is open, or was interrupted; the next test
    private = story == "private"
    fewer = told(events[:place] + events[place + 1 :], private=private)
    diff = compared(opened(told(events, private=private)), opened(fewer))
    if isinstance(events[place], Step):
        assert {(row.kind, bool(row.note)) for row in diff.differences} <= {("changed", True), ("removed", False)}
    else:
        assert {row.kind for row in diff.differences} == {"removed"}
    back = compared(opened(fewer), opened(told(events, private=private)))
    assert len(back.differences) == len(diff.differences)
    assert {row.kind for row in back.differences} <= {"added", "changed"}


def test_a_run_that_was_interrupted_has_no_end() -> None:
    events = [*PUBLIC[:-1], RunInterrupted(run=RUN, last_sequence=7)]
    diff = compared(opened(told(PUBLIC)), opened(told(events)))
    assert {(row.section, row.kind) for row in diff.differences} == {("outcome", "added"), ("outcome", "removed")}
    assert ("outcome", "interrupted.last_sequence", "added") in found(diff)


HAND = {
    "a parameter": (
        {"left": told([], record=STARTED)},
        {"left": told([], record=msgspec.structs.replace(STARTED, parameters={"epsilon": 4.0, "new": 1}))},
        [("parameters", "epsilon", "changed"), ("parameters", "name", "removed"), ("parameters", "new", "added")],
    ),
    "the tool": (
        {"left": told([], record=STARTED)},
        {"left": told([], record=msgspec.structs.replace(STARTED, tool="t/2"))},
        [("environment", "tool", "changed")],
    ),
    "the kernel": (
        {"left": told([], record=STARTED)},
        {"left": told([], record=msgspec.structs.replace(STARTED, kernel={"name": "ir"}))},
        [("environment", "kernel.name", "changed")],
    ),
    "the outcome": (
        {"left": told(PUBLIC)},
        {"left": told(PUBLIC), "sealed": RecordSealed(record=RECORD, digest="x", status="failed", cells=3, reason="E")},
        [("outcome", "status", "changed"), ("outcome", "reason", "added")],
    ),
    "a cell that raised": (
        {"left": told([], OUTSIDE[:1])},
        {"left": told([], [msgspec.structs.replace(OUTSIDE[0], status="error")])},
        [("outcome", "cells that did not end well", "changed")],
    ),
    "another test set": (
        {"left": told([], OUTSIDE[2:])},
        {"left": told([], [msgspec.structs.replace(OUTSIDE[2], data_name="other")])},
        [
            ("evaluations", f"evaluation on {name}.{field}", kind)
            for name, kind in (("test", "removed"), ("other", "added"))
            for field in ("metrics.accuracy", "identified", "weights_digest", "data", "seeds", "samples")
        ],
    ),
    "another package": (
        {"left": told([PUBLIC[0], PUBLIC[2]])},
        {"left": told([PUBLIC[0], msgspec.structs.replace(PUBLIC[2], packages={"torch": "2.14.0", "rich": "1"})])},
        [("environment", "packages.torch", "changed"), ("environment", "packages.rich", "added")],
    ),
    "a setting at its default that was set": (
        {"left": told([PUBLIC[0], PUBLIC[5]])},
        {
            "left": told(
                [
                    PUBLIC[0],
                    msgspec.structs.replace(
                        PUBLIC[5], hyperparameters={"learning_rate": 1e-5, "beta": 0.0}, defaults={}
                    ),
                ]
            )
        },
        [],
    ),
    "a file of the base model": (
        {"left": told([PUBLIC[0], PUBLIC[8]])},
        {
            "left": told(
                [
                    PUBLIC[0],
                    msgspec.structs.replace(
                        PUBLIC[8],
                        files=msgspec.structs.replace(FILES, files=[InputFile(name="a.csv", bytes=2, digest="other")]),
                    ),
                ]
            )
        },
        [("models", "base.files.file a.csv", "changed")],
    ),
    "whole numbers and floats that JavaScript writes alike": (
        {"left": told([], record=msgspec.structs.replace(STARTED, parameters={"epsilon": 8}))},
        {"left": told([], record=msgspec.structs.replace(STARTED, parameters={"epsilon": 8.0}))},
        [],
    ),
    "one and true": (
        {"left": told([], record=msgspec.structs.replace(STARTED, parameters={"epsilon": 1}))},
        {"left": told([], record=msgspec.structs.replace(STARTED, parameters={"epsilon": True}))},
        [("parameters", "epsilon", "changed")],
    ),
}


@pytest.mark.parametrize("name", HAND)
def test_each_change_is_found_where_it_belongs(name: str) -> None:
    before, after, expected = HAND[name]
    one, two = (opened(part["left"], part.get("sealed", SEALED)) for part in (before, after))
    assert sorted(found(compared(one, two))) == sorted(expected)
    assert not compared(two, two).differs


# -- verification -----------------------------------------------------------------------------------------------------


def test_level_trail_signers_anchors_and_what_others_said_are_compared() -> None:
    one = opened(told([]))
    anchor = Anchor(kind="cosignature", size=5, root=b"", time=7, by="witness", where="")
    addition = Addition(
        0, "urn:rlhf-audit:attestation:v1", {"role": "officer", "key": "K", "time": "T", "previous": None}, "k", b""
    )
    other_verdict = replace(
        one.verdict, level=Level.COSIGNED, signers=("another",), anchors=(anchor, replace(anchor, size=9))
    )
    two = replace(one, verdict=other_verdict, additions=(addition,))
    assert found(compared(one, two)) == [
        ("verification", "level", "changed"),
        ("verification", "log signed by", "changed"),
        ("verification", "anchored by", "changed"),
        ("verification", "addition 1 (attestation).signed by", "added"),
        ("verification", "addition 1 (attestation).role", "added"),
    ]
    again = Addition(
        0, "urn:rlhf-audit:reproduction:v1", {"verdict": "identical", "seeds": 16, "first": None}, "k", b""
    )
    assert found(compared(one, replace(one, additions=(again,)))) == [
        ("verification", "addition 1 (reproduction).signed by", "added"),
        ("verification", "addition 1 (reproduction).verdict", "added"),
    ]
    later = replace(two, verdict=replace(other_verdict, size=200, root="s", anchors=(anchor,)))
    assert not compared(two, later).differs


# -- metrics ----------------------------------------------------------------------------------------------------------


def losses(*values: Any, start: int = 1) -> list[Event]:
    steps = [Step(step=start + i, metrics={"loss": value}) for i, value in enumerate(values)]
    return [PUBLIC[0], *steps]


@pytest.mark.parametrize(
    ("left", "right", "parted", "note"),
    [
        ((3.0, 2.0, 1.0), (3.0, 2.0, 1.0), None, ""),
        ((3.0, 2.0, 1.0), (3.0, 2.5, 1.0), 2, "they part at step 2"),
        ((3.0, 2.0), (3.0, 2.0, 1.0), 3, "they part at step 3; 2 against 3 values"),
        (("NaN", 1.0), ("NaN", 1.0), None, ""),
        ((1.0, "NaN"), (1.0, "Infinity"), 2, "they part at step 2"),
        ((0.1 + 0.2,), (0.3,), 1, "they part at step 1"),
    ],
)
def test_a_series_is_told_by_its_end_and_where_it_parts(left: Any, right: Any, parted: int | None, note: str) -> None:
    diff = compared(opened(told(losses(*left))), opened(told(losses(*right))))
    (row,) = [row for row in diff.rows if row.section == "metrics"]
    assert (row.place, row.note, row.kind) == ("loss", note, "same" if parted is None else "changed")
    assert row.left["last"] == left[-1]
    assert row.right["values"] == len(right)
    (pair,) = diff.series
    assert pair.parted == parted
    assert [value for _, value in pair.right] == list(right)


def test_a_summary_says_the_range_of_the_numbers_alone() -> None:
    diff = compared(opened(told(losses(3.0, "NaN", 1.0))), opened(told(losses(3.0, "NaN", 1.0))))
    (row,) = [row for row in diff.rows if row.section == "metrics"]
    assert row.left == {"last": 1.0, "step": 3, "values": 3, "lowest": 1.0, "highest": 3.0}
    assert not any(isinstance(value, float) and math.isnan(value) for value in row.left.values())


def test_numbers_of_a_clock_are_no_difference() -> None:
    one, two = (
        opened(told([PUBLIC[0], Step(step=1, metrics={"eval_runtime": value}, notes=["evaluation"])]))
        for value in (1.0, 2.0)
    )
    diff = compared(one, two)
    assert not diff.differs
    assert [row.kind for row in diff.rows if row.section == "metrics"] == ["expected"]


# -- privacy ----------------------------------------------------------------------------------------------------------


def test_what_lies_in_the_vault_cannot_be_compared_and_is_never_said_to_be_equal() -> None:
    one, two = opened(told(PRIVATE, private=True)), opened([*told(PRIVATE, private=True)])
    assert not compared(one, two).differs
    assert "sealed" not in compared(one, two).counts()  # the very same entries, of one trail
    elsewhere = replace(two, verdict=replace(two.verdict, origin="example.org/other"))
    diff = compared(one, elsewhere)
    assert found(diff) == [("verification", "trail", "changed")]
    sealed = {row.place for row in diff.rows if row.kind == "sealed"}
    assert {"train.rows", "train.digest", "population"} <= sealed
    assert all(row.left is None and row.right is None for row in diff.rows if row.kind == "sealed")


def test_two_commitments_to_the_same_rows_are_not_told_to_be_the_same() -> None:
    apart = [*PRIVATE]
    teller = Teller()
    teller.tell(STARTED)
    for event in apart:
        half = DataPrivate(rows=2, digest="other") if isinstance(event, DataBound) else HALVES.get(type(event))
        teller.tell(event, RUN, half)
    diff = compared(opened(told(PRIVATE, private=True)), opened(teller.entries))
    assert {row.place for row in diff.rows if row.kind == "sealed" and row.section == "data"} >= {
        "train.rows",
        "train.digest",
    }


def test_beside_a_private_run_a_public_ones_measurements_are_sealed_and_no_difference() -> None:
    public = [PRIVATE[0], Step(step=1, metrics={"loss": 0.5}), PUBLIC[20]]
    diff = compared(opened(told(public, [])), opened(told([PRIVATE[0], PRIVATE[5], PRIVATE[9]], [], private=True)))
    kinds = {(row.section, row.place): row.kind for row in diff.rows}
    assert kinds["metrics", "loss"] == "sealed"
    assert kinds["compute", "columns.update.low"] == "sealed"
    assert kinds["metrics", "epsilon"] == "added"


def test_private_figures_of_an_evaluation_are_sealed() -> None:
    hidden = EvaluationRecorded(metrics={"accuracy": None}, identified="live")
    shown = EvaluationRecorded(metrics={"accuracy": 0.5}, identified="live")
    diff = compared(opened(told([], [shown])), opened(told([], [hidden])))
    kinds = {row.place: row.kind for row in diff.rows if row.section == "evaluations"}
    assert kinds["evaluation.metrics.accuracy"] == "sealed"
    assert not diff.differs


def test_what_was_drawn_with_a_seed_that_was_known_shows_no_value_of_a_step() -> None:
    replayed = [
        msgspec.structs.replace(event, generator="g; from a seed that was known beforehand")
        if isinstance(event, PrivacyReserved)
        else msgspec.structs.replace(event, gradient_norm=9.0, learning_rate=1.0)
        if isinstance(event, Step)
        else event
        for event in PRIVATE
    ]
    diff = compared(opened(told(PRIVATE, private=True)), opened(told(replayed, private=True)))
    rows = {row.place: row for row in diff.rows if row.section == "metrics"}
    assert (rows["gradient_norm"].kind, rows["gradient_norm"].left, rows["gradient_norm"].right) == (
        "changed",
        None,
        None,
    )
    assert rows["gradient_norm"].note == "they part at step 1"
    assert rows["learning_rate"].right["last"] == 1.0
    assert {pair.name for pair in diff.series} == {"learning_rate", "epsilon"}
    table = tabulate_records([("a", opened(told(PRIVATE, private=True))), ("b", opened(told(replayed, private=True)))])
    (row,) = [row for row in table.rows if row.place == "gradient_norm"]
    assert (row.kind, row.values[1]) == ("sealed", None)


# -- runs -------------------------------------------------------------------------------------------------------------


def runs(*stories: tuple[str, float]) -> OpenedRecord:
    teller = Teller()
    teller.tell(STARTED)
    for number, (experiment, loss) in enumerate(stories):
        run = f"{number:032x}"
        teller.tell(RunStarted(experiment=experiment, entry_point="cell", tool="t/1"), run)
        teller.tell(Step(step=1, metrics={"loss": loss}), run)
    return opened(teller.entries)


def test_runs_are_matched_by_name_and_then_by_their_order() -> None:
    one = runs(("sft", 1.0), ("dpo", 2.0))
    assert not compared(one, runs(("dpo", 2.0), ("sft", 1.0))).differs
    renamed = compared(one, runs(("sft", 1.0), ("ppo", 2.0)))
    assert [(row.run, row.place, row.left, row.right) for row in renamed.differences] == [
        ("dpo", "experiment", "dpo", "ppo")
    ]
    fewer = compared(one, runs(("dpo", 2.0)))
    assert [(row.section, row.run, row.kind) for row in fewer.differences] == [("runs", "sft", "removed")]
    more = compared(runs(("sft", 1.0)), runs(("sft", 1.0), ("sft", 3.0)))
    assert [(row.section, row.run, row.kind) for row in more.differences] == [("runs", "sft #2", "added")]
    second = compared(runs(("sft", 1.0), ("sft", 2.0)), runs(("sft", 1.0), ("sft", 3.0)))
    assert [(row.run, row.place) for row in second.differences] == [("sft #2", "loss")]


# -- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda cells: cells[1].update(source="a = 1\nb = 3\n"), [("code", "cell 2 (code)", "changed")]),
        (lambda cells: cells.pop(1), [("code", "cell 2 (code)", "removed")]),
        (lambda cells: cells.append({**cells[2], "id": "new", "source": "x"}), [("code", "cell 4 (code)", "added")]),
        (lambda cells: cells.insert(0, cells.pop(2)), [("code", "cell 1 (code)", "moved")]),
        (lambda cells: cells[1].update(outputs=[{"output_type": "stream", "name": "stdout", "text": "x"}]), []),
        (lambda cells: cells[1].update(execution_count=9), []),
    ],
    ids=["changed", "removed", "added", "moved", "output", "count"],
)
def test_a_change_of_one_cell_is_one_difference(change: Any, expected: Any) -> None:
    content = copy.deepcopy(NOTEBOOK)
    change(content["cells"])
    one, two = opened(told(PUBLIC)), opened(told(PUBLIC), content=content)
    assert found(compared(one, two)) == expected
    with_outputs = found(compared(one, two, outputs=True))
    assert set(with_outputs) - set(expected) <= {("outputs", "cell 2, output 1", "added")}


# -- real records -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, TrustPolicy, Path]:
    """One deterministic notebook executed twice on one trail, then once with another parameter."""
    folder = tmp_path_factory.mktemp("twice")
    source = write_notebook(
        folder / "small.ipynb",
        [
            ("steps = 2\nrun = 'a'", {"tags": ["parameters"]}),
            TRAINING,
            "training(run * 32, steps).close()\nprint('done')",
        ],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_AUDIT_HOME", str(folder / "home"))
        for name, values in (("one", {"run": "a"}), ("two", {"run": "b"})):
            run_notebook(source, folder / f"{name}.ipynb", values, trail=folder / "audit")
    return folder / "one.ipynb", folder / "two.ipynb", policy_of(folder / "audit"), folder / "home"


def test_a_notebook_that_is_executed_again_differs_in_its_parameter_alone(twice: Any) -> None:
    one, two, policy, home = twice
    diff = diff_records(one, two, policy=policy, home=home, outputs=True)
    assert found(diff) == [("parameters", "run", "changed")]
    assert {row.kind for row in diff.rows} <= {"same", "expected", "changed"}
    assert not diff_records(one, one, policy=policy, home=home, outputs=True).differs
    assert diff.left.record != diff.right.record
    assert diff.left.finished is not None
    assert diff.left.finished < diff.right.finished


def test_the_kept_records_compare_as_they_did(tmp_path: Path) -> None:
    policy = TrustPolicy.parse((FIXTURES / "trust.policy").read_bytes())
    names = ("plain", "private", "failed", "two-signatures")
    for name in names:
        path = FIXTURES / f"{name}.ipynb"
        diff = diff_records(path, path, policy=policy, home=tmp_path, outputs=True)
        assert set(diff.counts()) == {"same"}
    diff = diff_records(FIXTURES / "plain.ipynb", FIXTURES / "private.ipynb", policy=policy, home=tmp_path)
    assert ("parameters", "rows", "changed") in found(diff)
    assert ("privacy", "noise_multiplier", "added") in found(diff)
    assert [row.place for row in diff.differences if row.section == "code"] == ["cell 1 (markdown)", "cell 6 (code)"]
    assert not [row for row in diff.differences if row.section in ("environment", "models", "verification")]


def test_several_records_stand_side_by_side(tmp_path: Path) -> None:
    policy = TrustPolicy.parse((FIXTURES / "trust.policy").read_bytes())
    paths = [FIXTURES / f"{name}.ipynb" for name in ("plain", "plain", "private", "failed")]
    table = tabulate_records(open_records(paths, policy=policy, home=tmp_path))
    rows = {(row.section, row.place): row for row in table.shown()}
    assert rows["parameters", "rows"].values == (8, 8, 24, 8)
    assert rows["outcome", "status"].values == ("completed", "completed", "completed", "failed")
    assert rows["runs", "plain"].values == ("plain", "plain", "plain", None)
    assert not any(row.run for row in table.shown() if row.section != "runs")
    same = tabulate_records(open_records(paths[:2], policy=policy, home=tmp_path))
    assert not same.differs
    assert same.shown() == ()


# -- refusing ---------------------------------------------------------------------------------------------------------


def test_a_record_that_does_not_verify_is_refused_and_compared_as_a_claim_alone(
    twice: Any, made: Made, tmp_path: Path
) -> None:
    one, _, policy, home = twice
    changed = tmp_path / "changed.ipynb"
    changed.write_bytes(one.read_bytes().replace(b"print('done')", b"print('gone')"))
    with pytest.raises(InvalidRecordError, match=r"changed\.ipynb is INVALID") as refused:
        diff_records(one, changed, policy=policy, home=home)
    assert refused.value.exit_code == 40
    diff = diff_records(one, changed, policy=policy, home=home, claimed=True)
    assert (diff.left.claimed, diff.right.claimed) == (False, True)
    assert ("code", "cell 4 (code)", "changed") in found(diff)
    assert ("verification", "level", "changed") in found(diff)
    assert {row.section for row in diff.differences} == {"code", "verification"}
    bare = tmp_path / "bare.ipynb"
    bare.write_bytes(one.read_bytes().replace(b'"rlhf_audit"', b'"other"'))
    assert open_record(bare, policy=policy, home=home).verdict.level is Level.INVALID
    assert diff_records(one, bare, policy=policy, home=home, claimed=True).right.level == "INVALID"


def test_rows_are_in_the_order_of_the_sections_and_say_so_in_plain_values() -> None:
    diff = compared(opened(told(PUBLIC)), opened(told(PRIVATE, private=True)))
    order = [list(SECTIONS).index(row.section) for row in diff.rows]
    assert order == sorted(order)
    plain = diff.to_dict(everything=True)
    assert sum(len(part["rows"]) for part in plain["sections"]) == len(diff.rows)
    assert plain["differs"]
    assert sum(plain["counts"].values()) == len(diff.rows)
    assert all(row["kind"] in (*DIFFERENT, "sealed") for part in diff.to_dict()["sections"] for row in part["rows"])
