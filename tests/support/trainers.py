"""A tiny trainer of every class of TRL that this machine can run, by its public path, for two steps."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.tiny import (
    causal_model,
    dpo_trainer,
    grpo_trainer,
    kto_trainer,
    reward_model,
    reward_trainer,
    rloo_trainer,
    sft_trainer,
    synthetic_pairs,
    tokenizer,
)
from support.trl_classes import config_classes, trainer_classes

__all__ = ["BUILDERS", "build", "counts_letters", "has_even_length", "saved_model", "talking_tokenizer"]

PAIRS = synthetic_pairs(4)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def counts_letters(completions: list[Any], **_: Any) -> list[float]:
    """A reward: how long the answer is."""
    return [float(len(str(text))) for text in completions]


def has_even_length(completions: list[Any], **_: Any) -> list[float]:
    """A reward of 0 or 1."""
    return [float(len(str(text)) % 2 == 0) for text in completions]


def talking_tokenizer() -> Any:
    """The tiny tokenizer with a chat template."""
    found = tokenizer()
    found.chat_template = TEMPLATE
    return found


@functools.lru_cache(maxsize=4)
def saved_model(folder: Path) -> str:
    """A tiny model in a folder, for trainers that load a second copy of it by its name."""
    target = folder / "tiny"
    causal_model().save_pretrained(target)
    talking_tokenizer().save_pretrained(target)
    return str(target)


def _loaded(out: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(saved_model(out))


def _rows(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def _prompts(**more: str) -> Any:
    return _rows([{"prompt": f"A question {number}?", **more} for number in range(8)])


def _talks(split: bool) -> Any:
    asked = [[{"role": "user", "content": f"Question {number}?"}] for number in range(8)]
    answers = [[{"role": "assistant", "content": f"answer {number}"}] for number in range(8)]
    pairs = zip(asked, answers, strict=True)
    return _rows([{"prompt": ask} if split else {"messages": ask + answer} for ask, answer in pairs])


def _trainer(path: str, config: str, out: Path, data: Any, settings: dict[str, Any], **more: Any) -> Any:
    given = {
        "output_dir": str(out / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-3,
        "seed": 42,
    }
    args = config_classes()[config](**{**given, **settings})
    return trainer_classes()[path](args=args, train_dataset=data, processing_class=talking_tokenizer(), **more)


def _experimental(name: str, trainer: str, data: Callable[[], Any], **settings: Any) -> Callable[[Path], Any]:
    """A builder; models among the settings are functions of the folder, and models and rewards are no settings."""
    home = f"trl.experimental.{name}"
    config = settings.pop("config", f"{home}.{trainer.removesuffix('Trainer')}Config")

    def build(out: Path) -> Any:
        parts = {
            key: value(out) if callable(value) and key.endswith("model") else value for key, value in settings.items()
        }
        more = {key: parts.pop(key) for key in ("model", "teacher_model", "ref_model", "reward_funcs") if key in parts}
        more.setdefault("model", causal_model())
        return _trainer(f"{home}.{trainer}", config, out, data(), parts, **more)

    return build


def _other(out: Path) -> Any:
    del out
    return causal_model(1)


def _distillation(path: str, config: str) -> Callable[[Path], Any]:
    def build(out: Path) -> Any:
        settings = {"max_completion_length": 6}
        models = {"model": causal_model(), "teacher_model": causal_model(1)}
        return _trainer(path, config, out, _talks(split=True), settings, **models)

    return build


def _old_kto(out: Path) -> Any:
    home = "trl.experimental.kto"
    models = {"model": causal_model(), "ref_model": causal_model()}
    settings = {"max_length": 64, "loss_type": "apo_zero_unpaired"}
    return _trainer(f"{home}.KTOTrainer", f"{home}.KTOConfig", out, _rows(PAIRS), settings, **models)


def _pairs() -> Any:
    return _rows(PAIRS)


BUILDERS: dict[str, Callable[[Path], Any]] = {
    "trl.DPOTrainer": lambda out: dpo_trainer(PAIRS, out, max_steps=2),
    "trl.SFTTrainer": lambda out: sft_trainer(PAIRS, out, max_steps=2),
    "trl.RewardTrainer": lambda out: reward_trainer(PAIRS, out, max_steps=2),
    "trl.KTOTrainer": lambda out: kto_trainer(PAIRS, out, max_steps=2, loss_type="kto"),
    "trl.GRPOTrainer": lambda out: grpo_trainer([counts_letters, reward_model()], out, reward_weights=[1.0, 0.5]),
    "trl.RLOOTrainer": lambda out: rloo_trainer([counts_letters], out),
    "trl.DistillationTrainer": _distillation("trl.DistillationTrainer", "trl.DistillationConfig"),
    "trl.experimental.distillation.DistillationTrainer": _distillation(
        "trl.experimental.distillation.DistillationTrainer", "trl.experimental.distillation.DistillationConfig"
    ),
    "trl.experimental.kto.KTOTrainer": _old_kto,
    "trl.experimental.a2po.A2POTrainer": _experimental(
        "a2po",
        "A2POTrainer",
        _prompts,
        reward_funcs=has_even_length,
        max_completion_length=6,
        num_value_samples=2,
        filter_all_incorrect=False,
    ),
    "trl.experimental.bema_for_ref_model.DPOTrainer": _experimental(
        "bema_for_ref_model", "DPOTrainer", _pairs, config="trl.DPOConfig", ref_model=lambda _: causal_model()
    ),
    "trl.experimental.cpo.CPOTrainer": _experimental("cpo", "CPOTrainer", _pairs, max_length=64),
    "trl.experimental.orpo.ORPOTrainer": _experimental("orpo", "ORPOTrainer", _pairs, max_length=64),
    "trl.experimental.tpo.TPOTrainer": _experimental(
        "tpo",
        "TPOTrainer",
        lambda: _rows([{**pair, "reference": pair["chosen"] + "!"} for pair in PAIRS]),
        max_length=64,
    ),
    "trl.experimental.gkd.GKDTrainer": _experimental(
        "gkd",
        "GKDTrainer",
        lambda: _talks(split=False),
        teacher_model=_other,
        max_new_tokens=6,
        max_length=64,
        lmbda=1.0,
    ),
    "trl.experimental.gold.GOLDTrainer": _experimental(
        "gold",
        "GOLDTrainer",
        lambda: _talks(split=False),
        teacher_model=_other,
        max_completion_length=6,
        max_length=64,
        lmbda=1.0,
    ),
    "trl.experimental.gmpo.GMPOTrainer": _experimental(
        "gmpo", "GMPOTrainer", _prompts, reward_funcs=counts_letters, num_generations=2, max_completion_length=6
    ),
    "trl.experimental.iw_opd.IWOPDTrainer": _experimental(
        "iw_opd",
        "IWOPDTrainer",
        lambda: _talks(split=False),
        model=_loaded,
        teacher_model=_loaded,
        max_completion_length=6,
        max_length=64,
    ),
    "trl.experimental.online_dpo.OnlineDPOTrainer": _experimental(
        "online_dpo", "OnlineDPOTrainer", _prompts, reward_funcs=counts_letters, max_new_tokens=6, max_length=64
    ),
    "trl.experimental.sdft.SDFTTrainer": _experimental(
        "sdft",
        "SDFTTrainer",
        lambda: _prompts(privileged_context="a hint"),
        model=_loaded,
        max_completion_length=6,
        num_generations=2,
    ),
    "trl.experimental.sdpo.SDPOTrainer": _experimental(
        "sdpo",
        "SDPOTrainer",
        lambda: _prompts(privileged_context="a hint"),
        model=_loaded,
        reward_funcs=counts_letters,
        max_completion_length=6,
        num_generations=2,
    ),
}
"""How each is built in a folder; a trainer of TRL that is not here needs what this machine lacks."""


def build(path: str, out: Path) -> Any:
    """The trainer of that path, ready to train for two steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return BUILDERS[path](out)
