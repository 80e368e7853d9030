"""What models descend from, folded from told entries and held against a naive walk."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_audit_nb import events as ev
from rlhf_audit_nb.privacy.descent import DATA, Descent, Exposure

PRIVATE, OPEN, PUBLIC, INHERITS = "private", "open", "public", "inherits"


def model(role, digest, trainable=None):
    return ev.ModelBound(
        role=role,
        architecture="Llama",
        parameters=1,
        trainable=1,
        weights_digest=digest,
        config_digest="c",
        trainable_digest=trainable,
    )


def reserved():
    return ev.PrivacyReserved(
        reservation="r",
        unit="annotator",
        adjacency="zero-out",
        mechanism="m",
        engine="e",
        generator="g",
        units=1,
        clipping_norm=1.0,
        noise_multiplier=1.0,
        sampling_rate=0.5,
        steps=1,
        steps_asked=1,
        max_pairs_per_unit=1,
        delta=1e-5,
        epsilon_budget=1.0,
        epsilon_before=0.0,
        epsilon_planned=1.0,
        accountants={},
    )


def tell(plan):
    """The entries of trainings as planned: kind, the training each began from, those that rewarded it."""
    told, first, finals = (
        [(0, None, ev.PublicDeclared(kind=DATA, name="d", digest="public", reason="r", by="b"))],
        [],
        [],
    )
    spends = {}
    for number, (kind, base, rewards) in enumerate(plan):
        run = f"run-{number}"

        def say(event, run=run):
            told.append((len(told), run, event))
            return len(told) - 1

        trainer = {PRIVATE: "RewardTrainer", INHERITS: "GRPOTrainer"}.get(kind, "SFTTrainer")
        first.append(say(ev.TrainerAttached(trainer=trainer, loss=None, max_steps=1, seed=1, hyperparameters={})))
        say(ev.DataBound(role="train", columns=["text"], digest={PUBLIC: "public", OPEN: "open"}.get(kind)))
        say(model("base", f"final-{base}" if base is not None else f"new-{number}"))
        if kind == PRIVATE:
            spends[number] = say(reserved())
        if kind == INHERITS:
            sources = [{"entry": finals[one], "run": f"run-{one}", "digest": "x", "role": "reward"} for one in rewards]
            say(ev.PrivacyInherited(kind="private-model", sources=sources, unit="annotator", epsilon=1.0, delta=1e-5))
        finals.append(say(model("final", f"final-{number}")))
    return told, first, spends


def naive(plan, number, first, spends):
    """Every training that is reached, one by one."""
    reached, waiting = set(), [number]
    while waiting:
        here = waiting.pop()
        if here in reached:
            continue
        reached.add(here)
        kind, base, rewards = plan[here]
        waiting += ([base] if base is not None else []) + (list(rewards) if kind == INHERITS else [])
    return Exposure(
        frozenset(spends[one] for one in reached if plan[one][0] == PRIVATE),
        frozenset(first[one] for one in reached if plan[one][0] == OPEN),
    )


@st.composite
def plans(draw):
    plan = []
    for number in range(draw(st.integers(1, 9))):
        earlier = st.integers(0, number - 1) if number else st.nothing()
        base = draw(st.one_of(st.none(), earlier))
        rewards = draw(st.lists(earlier, max_size=3)) if number else []
        plan.append((draw(st.sampled_from([PRIVATE, OPEN, PUBLIC, INHERITS])), base, tuple(rewards)))
    return plan


@settings(max_examples=200, deadline=None)
@given(plans())
def test_every_exposure_is_that_of_a_naive_walk(plan):
    told, first, spends = tell(plan)
    descent = Descent(told)
    assert [training.index for training in descent.trainings] == first
    for number, training in enumerate(descent.trainings):
        assert descent.exposure(training) == naive(plan, number, first, spends)


def test_an_adapter_that_goes_on_is_known_by_its_trainable_digest():
    told, first, spends = tell([(PRIVATE, None, ()), (OPEN, None, ())])
    told = [
        (
            index,
            run,
            model("final", "adapter", "t1") if run == "run-0" and getattr(event, "role", "") == "final" else event,
        )
        for index, run, event in told
    ]
    told = [
        (
            index,
            run,
            model("base", "shared", "t1") if run == "run-1" and getattr(event, "role", "") == "base" else event,
        )
        for index, run, event in told
    ]
    second = Descent(told).trainings[1]
    assert Descent(told).exposure(second) == Exposure(frozenset(spends.values()), frozenset({first[1]}))


def test_what_was_released_outside_of_a_training_is_a_spend_by_its_entry():
    inherited = ev.PrivacyInherited(
        kind="released-labels",
        sources=[{"entry": 0, "run": None, "digest": "d"}],
        unit="label",
        epsilon=1.0,
        delta=1e-5,
    )
    told = [
        (1, "run", ev.TrainerAttached(trainer="DPOTrainer", loss=None, max_steps=1, seed=1, hyperparameters={})),
        (2, "run", inherited),
        (3, "run", model("final", "f")),
    ]
    descent = Descent(told)
    assert descent.exposure(descent.left("f")[0]) == Exposure(spends=frozenset({0}))


@pytest.mark.parametrize(("trainer", "bounded"), [("SFTTrainer", True), ("GRPOTrainer", False), ("MyTrainer", False)])
def test_public_data_bounds_only_trainers_that_learn_from_nothing_else(trainer, bounded):
    told, _, _ = tell([(PUBLIC, None, ())])
    told[1] = (1, "run-0", ev.TrainerAttached(trainer=trainer, loss=None, max_steps=1, seed=1, hyperparameters={}))
    descent = Descent(told)
    assert (descent.exposure(descent.trainings[0]) == Exposure()) is bounded


def test_a_resumed_training_whose_checkpoint_nobody_knows_has_no_bound():
    told, first, spends = tell([(PRIVATE, None, ())])
    told.insert(2, (1, "run-0", ev.RunResumed(step=2)))
    descent = Descent(told)
    assert descent.exposure(descent.trainings[0]) == Exposure(frozenset(spends.values()), frozenset(first))
