"""What a trainer calls and compares with: known by digests, and what no digest covers is said."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import math
import os
import subprocess
import sys

import pytest
from support.tiny import causal_model, dpo_trainer, grpo_trainer, lora, synthetic_pairs
from support.trails import events

from rlhf_audit_nb.capture.rewards import code_digest, describe_function
from rlhf_audit_nb.capture.run import Run
from rlhf_audit_nb.events import DataBound, FunctionBound, ModelBound, ReferenceUsed
from rlhf_audit_nb.privacy.post_processing import digest_function
from rlhf_audit_nb.trail import Trail

PAIRS = synthetic_pairs(4)
HALF = 0.5


def counts(completions, **_):
    return [HALF * math.sqrt(len(text)) for text in completions]


async def counts_later(completions, **_):
    await asyncio.sleep(0)
    return [len(text) for text in completions]


class Judge:
    strictness = 1

    def score(self, completions, **_):
        return [self.strictness for _ in completions]

    def __call__(self, completions, **_):
        return self.score(completions)


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def described(function):
    return describe_function(function, "reward")


def test_a_function_is_known_by_its_text_and_its_code():
    found = described(counts)
    text = f"counts\n{inspect.getsource(counts)}".encode()
    assert found.source_digest == hashlib.sha256(text).hexdigest() == digest_function(counts)
    assert len(found.code_digest) == 64
    assert (found.kind, found.name, found.not_covered) == ("function", "counts", [])
    assert found.reaches == ["HALF", "math"]


def test_two_lambdas_of_one_line_are_told_apart():
    one, two = (lambda completions, **_: [1.0]), (lambda completions, **_: [2.0])
    first, second = described(one), described(two)
    assert first.kind == "lambda"
    assert first.source_digest == second.source_digest
    assert first.code_digest != second.code_digest


def test_each_kind_says_what_its_digests_leave_out():
    limit = 3

    def bounded(completions, **_):
        return [min(limit, len(text)) for text in completions]

    def with_default(completions, seen=[], **_):  # noqa: B006  that is what is looked for
        return seen

    shown = {
        "coroutine function": (counts_later, None),
        "function": (bounded, "the values of its closure: limit"),
        "method": (Judge().score, "the state of its object (Judge)"),
        "object": (Judge(), "the state of the object (Judge)"),
        "partial": (functools.partial(counts, 1, scale=2), "what the partial function fixes: 1 by position, scale"),
        "built-in": (len, "its code: it is not written in Python"),
    }
    for kind, (function, missing) in shown.items():
        found = described(function)
        assert found.kind == kind
        assert (missing in found.not_covered) if missing else not found.not_covered
        assert (found.source_digest is None) == (kind == "built-in") == (found.code_digest is None)
    assert "its default arguments" in described(with_default).not_covered
    wrapped = described(decorated(counts))
    assert wrapped.source_digest == described(counts).source_digest
    assert wrapped.code_digest != described(counts).code_digest
    assert any("decorator" in sentence for sentence in wrapped.not_covered)


def test_what_was_typed_in_without_a_file_is_known_by_its_code():
    space: dict = {}
    exec("def typed(completions, **_):\n    return [1.0 for _ in completions]", space)
    found = described(space["typed"])
    assert found.source_digest is None
    assert len(found.code_digest) == 64
    assert any("source text" in sentence for sentence in found.not_covered)


def test_the_code_digest_is_the_same_in_every_process_and_place():
    text = "def f(a, b=1):\n    return a in {'x', 'y', 'z'} and (lambda: b)()\n"
    script = """
import sys
from rlhf_audit_nb.capture.rewards import code_digest
space = {}
exec(compile("\\n" + sys.argv[1], "elsewhere", "exec"), space)
print(code_digest(space["f"].__code__))
"""
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        asked = [sys.executable, "-c", script, text]
        done = subprocess.run(asked, env=environment, capture_output=True, check=True, timeout=120)
        assert done.stdout.decode().strip() == code_digest(compiled(text))
    assert done.stdout.decode().strip() != code_digest(compiled(text.replace("'z'", "'w'")))


def compiled(text):
    space: dict = {}
    exec(compile(text, "here", "exec", dont_inherit=True), space)
    return space["f"].__code__


# --- references ------------------------------------------------------------------------------------------------------


@pytest.fixture
def trail(tmp_path):
    with Trail.open(tmp_path / "audit") as opened:
        yield opened


def reference(trail, trainer):
    with Run(trail, "reference") as run:
        trainer.train()
    (found,) = events(trail, ReferenceUsed, run.id)
    base = next(model for model in events(trail, ModelBound, run.id) if model.role == "base")
    return found, base


def test_log_probabilities_computed_ahead_are_those_of_the_policy_before_training(trail, tmp_path):
    from datasets import Dataset
    from support.tiny import tokenizer
    from trl import DPOConfig, DPOTrainer

    settings = {"max_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no"}
    args = DPOConfig(output_dir=str(tmp_path / "out"), precompute_ref_log_probs=True, **settings)
    rows = Dataset.from_list(PAIRS)
    trainer = DPOTrainer(model=causal_model(), args=args, train_dataset=rows, processing_class=tokenizer())
    found, base = reference(trail, trainer)
    assert (found.how, found.computed_ahead, found.same_as_base) == ("policy-before-training", True, True)
    assert found.weights_digest == base.weights_digest
    assert any("logps" in name for name in events(trail, DataBound)[0].columns)


def test_a_second_adapter_is_the_reference_of_a_policy_that_came_with_one(trail, tmp_path):
    trainer = grpo_trainer([counts], tmp_path / "policy", model=model_with_adapter(), peft=None, beta=0.1, max_steps=1)
    found, base = reference(trail, trainer)
    assert (found.how, found.same_as_base) == ("reference-adapter", True)
    assert found.weights_digest != base.weights_digest


def model_with_adapter():
    from peft import get_peft_model
    from support.tiny import perturb

    model = get_peft_model(causal_model(), lora())
    perturb(model)
    return model


def test_a_reference_that_follows_the_policy_is_said_to_move(trail, tmp_path):
    trainer = dpo_trainer(PAIRS, tmp_path / "out", peft=None, max_steps=1, sync_ref_model=True, ref_model_sync_steps=1)
    found, _ = reference(trail, trainer)
    assert (found.how, found.moves, found.same_as_base) == ("model", True, True)


def test_rewards_stand_in_their_order_with_their_weights(trail, tmp_path):
    rewards = [counts, functools.partial(counts), Judge()]
    rewards[1].__name__, rewards[2].__name__ = "part", "judge"
    with Run(trail, "rewards"):
        grpo_trainer(rewards, tmp_path / "out", max_steps=1, reward_weights=[1.0, 0.25, 0.5]).train()
    found = [item for item in events(trail, FunctionBound) if item.role == "reward"]
    assert [(item.position, item.kind, item.weight) for item in found] == [
        (0, "function", 1.0),
        (1, "partial", 0.25),
        (2, "object", 0.5),
    ]
