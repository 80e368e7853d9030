"""Tiny models, a tokenizer trained on the spot, and real preference data, for tests that train. Nothing is downloaded.

A test asks for data with `preferences` (skips with the reason where the shared data is not there, fails instead where
``RLHF_AUDIT_NO_SKIP=1``), for a trainer with `dpo_trainer` or `reward_trainer`.
"""

from __future__ import annotations

import gzip
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

__all__ = [
    "causal_model",
    "dpo_trainer",
    "grpo_trainer",
    "kto_trainer",
    "lora",
    "perturb",
    "preferences",
    "reward_model",
    "reward_trainer",
    "rloo_trainer",
    "sft_trainer",
    "shared_folder",
    "synthetic_pairs",
    "tokenizer",
]

VOCABULARY = 384


def shared_folder() -> Path:
    """The folder of shared test data: ``RLHF_AUDIT_SHARED``, or ``../shared`` beside the repository."""
    given = os.environ.get("RLHF_AUDIT_SHARED")
    folder = Path(given) if given else Path(__file__).resolve().parents[2].parent / "shared"
    if not (folder / "data").is_dir():
        reason = f"shared test data is not at {folder}; set RLHF_AUDIT_SHARED"
        if os.environ.get("RLHF_AUDIT_NO_SKIP") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


def preferences(rows: int = 60, max_chars: int = 120) -> list[dict[str, str]]:
    """Real pairs (prompt, chosen, rejected, annotator_id) of LLMFAO's annotators, texts cut to ``max_chars``."""
    path = shared_folder() / "data" / "llmfao" / "mini.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for _, line in zip(range(rows), lines, strict=False)]
    return [
        {
            "prompt": record["prompt"][:max_chars],
            "chosen": record["chosen"][:max_chars],
            "rejected": record["rejected"][:max_chars],
            "annotator_id": record["annotator_id"],
        }
        for record in records
    ]


def synthetic_pairs(annotators: int, pairs_each: int = 2) -> list[dict[str, str]]:
    """Made-up pairs: ``annotators`` people with ``pairs_each`` pairs, every text its own."""
    return [
        {
            "prompt": f"Question {person} {number}?",
            "chosen": f" yes {'abcdefghij'[number % 10] * (3 + person % 5)} {person}",
            "rejected": f" no {'klmnopqrst'[person % 10] * (2 + number % 4)} {number}",
            "annotator_id": f"person-{person}",
        }
        for person in range(annotators)
        for number in range(pairs_each)
    ]


@lru_cache(maxsize=1)
def _trained_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE(unk_token=None))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    corpus = ["which answer is better and why", "the model was trained on preferences", "yes no maybe question answer"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(corpus, trainer)
    return inner


def tokenizer() -> Any:
    """A byte-level BPE tokenizer of at most 384 tokens, with pad and eos."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer().to_str()),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        model_max_length=1024,
    )


def _config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**settings, **changes})


def causal_model(seed: int = 0, **changes: Any) -> Any:
    """A Llama of hidden size 32 and 2 layers with random weights."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(_config(**changes))


def reward_model(seed: int = 0, **changes: Any) -> Any:
    """The same with one score instead of a language head."""
    import torch
    from transformers import LlamaForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForSequenceClassification(_config(num_labels=1, **changes))


def lora(**changes: Any) -> Any:
    """A LoRA configuration over all linear layers."""
    from peft import LoraConfig

    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0}
    return LoraConfig(**{**settings, **changes})


def perturb(model: Any, scale: float = 0.05, seed: int = 1) -> None:
    """Move the trainable weights at random, so that policy and reference differ and every gradient counts."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)


def _arguments(changes: dict[str, Any], output: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-3,
        "max_length": 96,
        "seed": 42,
    }
    return {**settings, **changes}


def dpo_trainer(rows: list[dict[str, str]], output: Path, *, model: Any = None, peft: Any = "lora", **args: Any) -> Any:
    """A DPOTrainer over ``rows`` with a tiny model and LoRA (``peft=None``: full fine-tuning with a reference)."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    adapter = lora() if peft == "lora" else peft
    reference = None if adapter is not None else causal_model()
    return DPOTrainer(
        model=model or causal_model(),
        ref_model=reference,
        args=DPOConfig(**_arguments(args, output)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=adapter,
    )


def reward_trainer(
    rows: list[dict[str, str]], output: Path, *, model: Any = None, peft: Any = None, **args: Any
) -> Any:
    """A RewardTrainer over ``rows`` with a tiny scoring model (full fine-tuning unless ``peft`` is given)."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    return RewardTrainer(
        model=model or reward_model(),
        args=RewardConfig(**_arguments({"max_length": 256, **args}, output)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=lora(task_type="SEQ_CLS") if peft == "lora" else peft,
    )


def sft_trainer(rows: list[dict[str, str]], output: Path, *, model: Any = None, peft: Any = "lora", **args: Any) -> Any:
    """An SFTTrainer on the chosen answers of ``rows``, with LoRA unless ``peft=None``."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    shown = [
        {"prompt": row["prompt"], "completion": row["chosen"], "annotator_id": row["annotator_id"]} for row in rows
    ]
    return SFTTrainer(
        model=model or causal_model(),
        args=SFTConfig(**_arguments(args, output)),
        train_dataset=Dataset.from_list(shown),
        processing_class=tokenizer(),
        peft_config=lora() if peft == "lora" else peft,
    )


def kto_trainer(rows: list[dict[str, str]], output: Path, *, model: Any = None, peft: Any = "lora", **args: Any) -> Any:
    """A KTOTrainer with the loss that has no KL term; each row's two answers become one liked and one not."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    adapter = lora() if peft == "lora" else peft
    return KTOTrainer(
        model=model or causal_model(),
        ref_model=None if adapter is not None else causal_model(),
        args=KTOConfig(**_arguments({"loss_type": "apo_zero_unpaired", **args}, output)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=adapter,
    )


def grpo_trainer(rewards: Any, output: Path, **args: Any) -> Any:
    """A GRPOTrainer with LoRA on made-up public prompts; ``rewards`` are models (tiny ones) or functions."""
    from trl import GRPOConfig, GRPOTrainer

    return _online_trainer(GRPOTrainer, GRPOConfig, rewards, output, args)


def rloo_trainer(rewards: Any, output: Path, **args: Any) -> Any:
    """The same as an RLOOTrainer."""
    from trl import RLOOConfig, RLOOTrainer

    return _online_trainer(RLOOTrainer, RLOOConfig, rewards, output, args)


def _online_trainer(kind: Any, config: Any, rewards: Any, output: Path, args: dict[str, Any]) -> Any:
    from datasets import Dataset

    own = ("model", "peft", "prompts", "eval_prompts")
    given = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6, "max_steps": 2}
    settings = _arguments({**given, **{name: value for name, value in args.items() if name not in own}}, output)
    settings.pop("max_length")
    prompts = args.get("prompts") or [{"prompt": f"A public question {number}?"} for number in range(8)]
    adapter = args.get("peft", "lora")
    return kind(
        model=args.get("model") or causal_model(),
        reward_funcs=rewards,
        args=config(**settings),
        train_dataset=Dataset.from_list(prompts),
        eval_dataset=Dataset.from_list(args["eval_prompts"]) if "eval_prompts" in args else None,
        processing_class=tokenizer(),
        reward_processing_classes=[tokenizer() for _ in rewards] if isinstance(rewards, list) else tokenizer(),
        peft_config=lora() if adapter == "lora" else adapter,
    )
