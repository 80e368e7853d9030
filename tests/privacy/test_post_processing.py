"""Policies that inherit their reward model's epsilon: what holds, what is refused, and that nothing is ever charged."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from support.tiny import (
    causal_model,
    dpo_trainer,
    grpo_trainer,
    reward_model,
    reward_trainer,
    rloo_trainer,
    sft_trainer,
    synthetic_pairs,
    tokenizer,
)
from support.trails import events, kinds, without_cross_checks

from rlhf_audit_nb import AuditableRLHF, PrivacyConfig
from rlhf_audit_nb.errors import ConfigError, DataError, PrivacyError, UnsupportedTrainerError
from rlhf_audit_nb.events import (
    DataBound,
    ModelBound,
    PrivacyInherited,
    PrivacyReserved,
    PublicDeclared,
    Step,
    TrainerAttached,
    WeightsSaved,
)
from rlhf_audit_nb.privacy.accountant import Mechanism, composed_epsilon
from rlhf_audit_nb.privacy.post_processing import digest_function
from rlhf_audit_nb.privacy.reservation import read_ledger

PAIRS = synthetic_pairs(8)
QUESTIONS = [{"prompt": f"A public question {number}?"} for number in range(8)]


@pytest.fixture(autouse=True, scope="module")
def quick():
    with without_cross_checks(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


BOTH = (2.0**-2 + 20.0**-2) ** -0.5  # the gradient's noise, and the live loss's, ten times as wide, on one sample


def auditor(**privacy):
    config = {"epsilon": 8.0, "sampling_rate": 0.5, "noise_multiplier": 2.0, "public_prompts": True, **privacy}
    return AuditableRLHF(privacy_config=PrivacyConfig(**config))


def open_auditor():
    return AuditableRLHF()


def private_reward(held, here, name="reward", **args):
    """A reward model that a private run trained."""
    with held.track_training(name):
        trainer = reward_trainer(PAIRS, here / name, **args)
        trainer.train()
    return trainer.model


def public_length(completions, **_):
    return [float(len(text)) for text in completions]


def train(held, trainer, name="policy"):
    with held.track_training(name) as run:
        trainer.train()
    held.trail.flush()
    return run


def refused(held, trainer, *words):
    """The refusal of a training, of which nothing was touched: no weight, no budget, no step."""
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    held.trail.flush()
    ledger = read_ledger(held.trail.reader()).spends
    with pytest.raises(PrivacyError) as error:
        train(held, trainer, "refused")
    for word in words:
        assert word in str(error.value), str(error.value)
    assert error.value.next_step
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    held.trail.flush()
    assert read_ledger(held.trail.reader()).spends == ledger
    run = [entry.run for entry in held.trail.reader().entries(type="run.started")][-1]
    found = kinds(held.trail, run)
    assert "train.step" not in found
    assert "privacy.inherited" not in found
    return error.value


@pytest.mark.parametrize("online", [grpo_trainer, rloo_trainer])
def test_a_policy_rewarded_by_a_private_model_inherits_its_epsilon_and_charges_nothing(here, online):
    held = auditor()
    model = private_reward(held, here)
    budget = held.budget()
    assert budget.total > 0
    run = train(held, online([model], here / "policy"))
    assert held.budget().to_dict() == budget.to_dict()
    (inherited,) = events(held.trail, PrivacyInherited)
    assert (inherited.kind, inherited.unit, inherited.prompts) == ("private-model", "annotator", "declared public")
    assert inherited.epsilon == pytest.approx(budget.total, abs=1e-9)
    (reserved,) = events(held.trail, PrivacyReserved)
    alone = composed_epsilon([Mechanism(BOTH, 0.5, reserved.steps)], 1e-5)
    assert inherited.epsilon == pytest.approx(alone, rel=1e-6)
    (source,) = inherited.sources
    finals = list(held.trail.reader().entries(type=ModelBound.TYPE))
    assert finals[[entry.index for entry in finals].index(source["entry"])].run == source["run"] != run.id
    assert source["role"] == "reward"
    assert held.verify().level.name == "UNANCHORED"
    opened = list(held.samples(run=run.id))  # its figures are post-processing; its texts are kept by commitment
    assert opened
    assert all(part.half.completions and part.event.statistics["samples"] for part in opened)
    (attached,) = events(held.trail, TrainerAttached, run.id)
    assert attached.generators == {}  # what a private training drew from may stand in them


def test_what_such_a_training_measures_stands_in_the_open_and_its_summary_says_that_it_inherits(here):
    held = auditor()
    model = private_reward(held, here)
    run = train(held, grpo_trainer([model], here / "policy"))
    steps = events(held.trail, Step, run.id)
    assert len(steps) == 2
    assert all("reward" in step.metrics and "loss" in step.metrics for step in steps)
    assert all(step.epsilon is None for step in steps)
    (data,) = events(held.trail, DataBound, run.id)
    assert data.rows == 8
    assert data.digest is not None
    assert "inherits ε" in run.summary()
    assert "nothing was charged" in run.summary()
    assert run.state.inherited.epsilon == pytest.approx(held.budget().total)
    assert not run.state.private


def test_two_private_reward_models_are_composed_and_not_added(here):
    held = auditor(epsilon=20.0)
    first = private_reward(held, here, "first")
    second = private_reward(held, here, "second", model=reward_model(seed=5))
    train(held, grpo_trainer([first, second], here / "policy"))
    (inherited,) = events(held.trail, PrivacyInherited)
    one, two = (Mechanism(BOTH, 0.5, item.steps) for item in events(held.trail, PrivacyReserved))
    assert inherited.epsilon == pytest.approx(composed_epsilon([one, two], 1e-5), rel=1e-9)
    apart = composed_epsilon([one], 1e-5) + composed_epsilon([two], 1e-5)
    assert inherited.epsilon < 0.95 * apart
    assert inherited.epsilon > 1.05 * composed_epsilon([one], 1e-5)
    assert len(inherited.sources) == 2


@pytest.mark.slow
def test_only_the_runs_that_a_policy_descends_from_count(here):
    held = auditor(epsilon=20.0)
    private_reward(held, here, "unused")
    used = private_reward(held, here, "used", model=reward_model(seed=5))
    train(held, grpo_trainer([used], here / "policy"))
    (inherited,) = events(held.trail, PrivacyInherited)
    _, second = (Mechanism(BOTH, 0.5, item.steps) for item in events(held.trail, PrivacyReserved))
    assert inherited.epsilon == pytest.approx(composed_epsilon([second], 1e-5), rel=1e-9)
    assert inherited.epsilon < held.budget().total


def test_a_reward_model_trained_by_an_adapter_is_known_with_its_base_and_refused_on_another(here):
    from peft import PeftModel

    held = auditor()
    model = private_reward(held, here, peft="lora", model=reward_model(seed=3))
    model.save_pretrained(here / "adapter")
    train(held, grpo_trainer([PeftModel.from_pretrained(reward_model(seed=3), here / "adapter")], here / "policy"))
    assert len(events(held.trail, PrivacyInherited)) == 1
    other = PeftModel.from_pretrained(reward_model(seed=4), here / "adapter")
    refused(held, grpo_trainer([other], here / "other"), "no private run of this trail left")


@pytest.mark.slow
def test_a_reward_model_from_a_saved_folder_is_known_and_so_is_a_checkpoint_on_the_way(here):
    from transformers import AutoModelForSequenceClassification

    held = auditor()
    with held.track_training("reward"):
        trainer = reward_trainer(PAIRS, here / "reward", save_strategy="steps", save_steps=2)
        trainer.train()
        trainer.save_model(str(here / "kept"))
    for folder in ("kept", "reward/checkpoint-2"):
        loaded = AutoModelForSequenceClassification.from_pretrained(here / folder)
        train(held, grpo_trainer([loaded], here / "policy"))
    final, early = events(held.trail, PrivacyInherited)
    assert final.epsilon == early.epsilon  # the run's whole spend counts, also for a checkpoint on its way
    assert final.sources[0]["digest"] != early.sources[0]["digest"]
    with torch.no_grad():
        next(loaded.parameters())[0, 0] += 1
    refused(held, grpo_trainer([loaded], here / "changed"), "no private run of this trail left")


def test_another_model_that_a_private_run_only_saved_is_refused(here):
    """Saving a model says nothing of where it learnt."""
    from transformers import AutoModelForSequenceClassification

    held = auditor()
    elsewhere = reward_trainer(PAIRS, here / "elsewhere", model=reward_model(seed=7), max_steps=1)
    elsewhere.train()  # outside of any run
    with held.track_training("reward"):
        reward_trainer(PAIRS, here / "reward", max_steps=1).train()
        elsewhere.model.save_pretrained(here / "model")
        elsewhere.save_model(str(here / "trainer"))
    assert [event.step for event in events(held.trail, WeightsSaved)] == [None, None]
    for folder in ("model", "trainer"):
        loaded = AutoModelForSequenceClassification.from_pretrained(here / folder)
        refused(held, grpo_trainer([loaded], here / "policy"), "no private run of this trail left")


def test_a_reward_model_with_one_changed_weight_is_refused(here):
    held = auditor()
    model = private_reward(held, here)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    refused(held, grpo_trainer([model], here / "policy"), "no private run of this trail left")


def test_a_reward_model_trained_without_privacy_is_refused_until_its_data_is_declared_public(here):
    held = auditor()
    with open_auditor().track_training("open"):
        trainer = reward_trainer(PAIRS, here / "open")
        trainer.train()
    error = refused(held, grpo_trainer([trainer.model], here / "policy"), "without differential privacy")
    assert "declare_public_data" in error.next_step
    held.declare_public_data(trainer.train_dataset, reason="published by its authors", by="A. Keeper")
    train(held, grpo_trainer([trainer.model], here / "after"))
    (inherited,) = events(held.trail, PrivacyInherited)
    assert inherited.epsilon == 0


def test_a_private_reward_model_that_began_from_weights_without_a_bound_is_refused(here):
    held = auditor()
    with open_auditor().track_training("open"):
        opened = reward_trainer(PAIRS, here / "open")
        opened.train()
    model = private_reward(held, here, model=opened.model)
    refused(held, grpo_trainer([model], here / "policy"), "descends from", "without differential privacy")


def test_a_policy_that_began_from_weights_without_a_bound_is_refused_and_not_where_its_data_is_public(here):
    held = auditor()
    model = private_reward(held, here)
    with open_auditor().track_training("sft"):
        sft = sft_trainer(PAIRS, here / "sft", peft=None)
        sft.train()
    refused(held, grpo_trainer([model], here / "policy", model=sft.model), "The policy", "without differential privacy")
    bound = [entry.index for entry in held.trail.reader().entries(type=DataBound.TYPE)][-1]
    held.declare_public_data(bound, reason="written by us", by="A. Keeper")
    train(held, grpo_trainer([model], here / "again", model=sft.model))
    (inherited,) = events(held.trail, PrivacyInherited)
    assert inherited.epsilon == pytest.approx(held.budget().total)


def test_a_policy_that_began_from_a_private_model_inherits_both(here):
    held = auditor(epsilon=20.0)
    model = private_reward(held, here)
    with held.track_training("dpo"):
        dpo = dpo_trainer(PAIRS, here / "dpo", peft=None)
        dpo.train()
    train(held, grpo_trainer([model], here / "policy", model=dpo.model))
    (inherited,) = events(held.trail, PrivacyInherited)
    assert {source["role"] for source in inherited.sources} == {"reward", "base"}
    assert inherited.epsilon == pytest.approx(held.budget().total, rel=1e-9)


@pytest.mark.slow
def test_a_policy_that_goes_on_from_an_inheriting_one_inherits_through_it(here):
    held = auditor(epsilon=20.0)
    model = private_reward(held, here)
    policy = grpo_trainer([model], here / "policy", peft=None)
    train(held, policy)
    held.declare_public_reward(public_length, reason="counts characters", by="A. Keeper")
    train(held, grpo_trainer([public_length], here / "on", model=policy.model))
    first, second = events(held.trail, PrivacyInherited)
    assert second.epsilon == first.epsilon > 0
    assert sorted(source["role"] for source in second.sources) == ["base", "reward"]


@pytest.mark.parametrize("where", ["prompts", "eval_prompts"])
def test_prompts_with_the_annotators_column_are_refused(here, where):
    held = auditor()
    model = private_reward(held, here)
    rows = [{"prompt": row["prompt"], "annotator_id": row["annotator_id"]} for row in PAIRS]
    refused(held, grpo_trainer([model], here / "policy", **{where: rows}), "annotator_id", "belong to annotators")


def test_prompts_of_protected_data_are_refused_also_without_their_column(here):
    held = auditor()
    model = private_reward(held, here)
    rows = [{"prompt": row["prompt"]} for row in reversed(PAIRS)]
    refused(held, grpo_trainer([model], here / "policy", prompts=rows), "that a private run of this trail protects")
    train(held, grpo_trainer([model], here / "some", prompts=QUESTIONS))  # the control: others are taken


def test_prompts_that_nobody_declared_public_are_refused(here):
    held = auditor(public_prompts=False)
    model = private_reward(held, here)
    error = refused(held, grpo_trainer([model], here / "policy"), "were not declared public")
    assert "public_prompts=True" in error.next_step


def test_a_function_is_refused_until_somebody_declares_it_and_again_when_its_text_changes(here):
    held = auditor()
    model = private_reward(held, here)
    refused(held, grpo_trainer([model, public_length], here / "policy"), "'public_length'", "may read protected data")
    held.declare_public_reward(public_length, reason="counts characters", by="A. Keeper")
    train(held, grpo_trainer([model, public_length], here / "after"))
    (claim,) = events(held.trail, PublicDeclared)
    assert (claim.kind, claim.name, claim.by, claim.reason) == (
        "reward-function",
        "public_length",
        "A. Keeper",
        "counts characters",
    )
    assert claim.digest == digest_function(public_length)
    (inherited,) = events(held.trail, PrivacyInherited)
    assert [source["digest"] for source in inherited.sources][1] == claim.digest

    def changed():
        def public_length(completions, **_):
            return [2.0 * len(text) for text in completions]

        return public_length

    refused(held, grpo_trainer([model, changed()], here / "again"), "may read protected data")


class CountsItself:
    __name__ = "counts"

    def __call__(self, completions, **_):
        return [0.0 for _ in completions]


def test_what_carries_values_that_no_text_shows_cannot_be_declared(here):
    held = auditor()
    secret = [1.0]

    def closes_over(completions, **_):
        return secret * len(completions)

    for function in (closes_over, functools.partial(public_length), CountsItself(), CountsItself().__call__, len):
        with pytest.raises(ConfigError, match="cannot be declared public"):
            held.declare_public_reward(function, reason="r", by="b")
        assert digest_function(function) is None
    with pytest.raises(ConfigError, match="by is empty"):
        held.declare_public_reward(public_length, reason="r", by=" ")
    with pytest.raises(ConfigError, match="binds no data set"):
        held.declare_public_data(0, reason="r", by="b")
    assert events(held.trail, PublicDeclared) == []


def test_a_model_that_never_saw_protected_data_can_be_declared(here):
    held = auditor()
    model = reward_model(seed=9)
    refused(held, grpo_trainer([model], here / "policy"), "no private run of this trail left")
    held.declare_public_reward(model, reason="trained by others on public data", by="A. Keeper")
    train(held, grpo_trainer([model], here / "after"))
    (inherited,) = events(held.trail, PrivacyInherited)
    assert inherited.epsilon == 0


def test_a_run_that_would_inherit_more_than_it_asks_for_is_refused(here):
    model = private_reward(auditor(), here)
    less = auditor(epsilon=0.5)
    error = refused(less, grpo_trainer([model], here / "policy"), "would inherit more than it asks for")
    assert error.reason == "inherits-too-much"


def test_a_run_that_asks_for_another_unit_is_refused(here):
    model = private_reward(auditor(), here)
    error = refused(auditor(unit="pair"), grpo_trainer([model], here / "policy"), "protect annotators")
    assert error.reason == "mixed-units"


def test_what_may_bring_in_data_unseen_is_refused(here):
    held = auditor()
    model = private_reward(held, here)

    def patched(trainer):
        trainer._calculate_rewards = lambda *_: torch.zeros(4, 1)
        return "_calculate_rewards"

    def rollout(trainer):
        trainer.rollout_func = lambda prompts, trainer: {}
        return "rollout"

    def tool(trainer):
        trainer.tools = [public_length]
        return "tools"

    def own_class(trainer):
        kind = type("Mine", (type(model),), {"__module__": "mine"})
        model.__class__ = kind
        return "a class of your own"

    for change in (patched, rollout, tool, own_class):
        trainer = grpo_trainer([model], here / "policy")
        refused(held, trainer, change(trainer))


def test_a_reward_model_whose_training_was_resumed_inherits_from_both_parts(here):
    held = auditor(epsilon=30.0)
    with held.track_training("first"):
        reward_trainer(PAIRS, here / "reward", max_steps=2, save_strategy="steps", save_steps=2).train()
    with held.track_training("second"):
        resumed = reward_trainer(PAIRS, here / "reward", max_steps=4, model=reward_model(seed=7))
        resumed.train(resume_from_checkpoint=str(here / "reward" / "checkpoint-2"))
    train(held, grpo_trainer([resumed.model], here / "policy"))
    (inherited,) = events(held.trail, PrivacyInherited)
    parts = [Mechanism(BOTH, 0.5, 2), Mechanism(BOTH, 0.5, 2)]
    assert inherited.epsilon == pytest.approx(composed_epsilon(parts, 1e-5), rel=1e-9)
    assert inherited.epsilon > 1.1 * composed_epsilon(parts[:1], 1e-5)
    graph = held.lineage().graph
    second = next(node for node in graph.of("training") if node.detail == "second")
    (checkpoint,) = [graph.node(edge.source) for edge in graph.into(second.id) if edge.role == "checkpoint"]
    assert checkpoint.label == "checkpoint-2"
    assert {node.detail for node in graph.ancestors(second.id).of("training")} == {"first", "second"}


def test_a_reward_model_resumed_from_an_unknown_checkpoint_is_refused(here):
    reward_trainer(PAIRS, here / "reward", max_steps=2, save_strategy="steps", save_steps=2).train()  # in no run
    held = auditor()
    with held.track_training("second"):
        resumed = reward_trainer(PAIRS, here / "reward", max_steps=4)
        resumed.train(resume_from_checkpoint=str(here / "reward" / "checkpoint-2"))
    refused(held, grpo_trainer([resumed.model], here / "policy"), "without differential privacy")


def test_a_model_with_a_second_adapter_is_refused(here):
    held = auditor()
    model = private_reward(held, here, peft="lora", model=reward_model(seed=3))
    train(held, grpo_trainer([model], here / "one"))
    model.add_adapter("other", model.peft_config["default"])
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B.other" in name:
                value.add_(1.0)
    model.set_adapter("other")
    refused(held, grpo_trainer([model], here / "two"), "several adapters")


def test_prompts_that_cannot_be_looked_at_beforehand_are_refused(here):
    held = auditor()
    model = private_reward(held, here)
    streaming = grpo_trainer([model], here / "stream")
    streaming.train_dataset = streaming.train_dataset.to_iterable_dataset()
    with pytest.raises(DataError, match="a stream"):
        train(held, streaming)
    changing = grpo_trainer([model], here / "transform")
    changing.train_dataset = changing.train_dataset.with_transform(lambda rows: rows)
    with pytest.raises(DataError, match="transform of their own"):
        train(held, changing)
    assert events(held.trail, PrivacyInherited) == []


def test_a_private_training_whose_reference_was_left_open_is_warned_of_and_not_where_its_data_is_public(here):
    held = auditor(epsilon=30.0)
    with open_auditor().track_training("sft"):
        sft = sft_trainer(PAIRS, here / "sft", peft=None)
        sft.train()

    def warned(name):
        trainer = dpo_trainer(PAIRS, here / name, peft=None, max_steps=1)
        trainer.ref_model = sft.model
        return any("without differential privacy left" in said for said in train(held, trainer, name).state.warnings)

    assert warned("before")
    held.declare_public_data(sft.train_dataset, reason="written by us", by="A. Keeper")
    assert not warned("after")
    assert [item.role for item in events(held.trail, ModelBound)].count("reference") == 2


def test_a_resumed_training_does_not_inherit(here):
    held = auditor()
    model = private_reward(held, here)
    trainer = grpo_trainer([model], here / "policy", save_strategy="steps", save_steps=1)
    train(held, trainer)
    again = grpo_trainer([model], here / "policy")
    with pytest.raises(UnsupportedTrainerError, match="cannot be resumed"), held.track_training("again"):
        again.train(resume_from_checkpoint=str(here / "policy" / "checkpoint-1"))
    assert len(events(held.trail, PrivacyInherited)) == 1


def test_a_subclass_is_refused_as_before(here):
    from trl import GRPOTrainer

    held = auditor()
    model = private_reward(held, here)
    trainer = grpo_trainer([model], here / "policy")
    trainer.__class__ = type("MyGRPO", (GRPOTrainer,), {})
    with pytest.raises(UnsupportedTrainerError, match="MyGRPO"):
        train(held, trainer)


def test_reward_and_policy_of_one_run_are_told_apart(here):
    held = auditor()
    with held.track_training("both") as run:
        reward = reward_trainer(PAIRS, here / "reward")
        reward.train()
        grpo_trainer([reward.model], here / "policy").train()
    held.trail.flush()
    assert [item.trainer for item in events(held.trail, TrainerAttached)] == ["RewardTrainer", "GRPOTrainer"]
    steps = events(held.trail, Step, run.id)
    assert [list(step.metrics) == ["private_loss"] for step in steps] == [True, True, True, False, False]
    assert all(step.metrics for step in steps)
    assert [step.epsilon is None for step in steps] == [False, False, False, True, True]
    (inherited,) = events(held.trail, PrivacyInherited)
    assert inherited.epsilon == pytest.approx(held.budget().total)
    assert run.state.private


def test_the_same_trainer_without_a_privacy_configuration_is_recorded_as_it_is(here):
    run = train(open_auditor(), grpo_trainer([public_length], here / "policy"))
    assert "privacy.inherited" not in kinds(open_auditor().trail, run.id)
    assert "without differential privacy" in run.summary()


def test_the_tests_tokenizer_and_models_are_the_ones_that_digests_are_of():
    assert tokenizer().pad_token_id == 0
    assert causal_model().config.vocab_size == reward_model().config.vocab_size
