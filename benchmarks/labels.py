"""What debiasing is worth: reward models on labels that were flipped at ε = 1, scored on labels that were not.

A small problem that can be told apart without error (the better response says "good", the other one "poor"), so that
all that stands between a model and a perfect score are the flips. Held-out log loss is that of the clean labels: it
asks for the right size of the margins, which is what flips take away, and not for their signs alone.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure
from rlhf_audit_nb.demo import train_tokenizer
from rlhf_audit_nb.privacy.label_losses import debiased
from rlhf_audit_nb.privacy.labels import draw, flip_chance, read_labels
from rlhf_audit_nb.privacy.sampling import SealedRandom

__all__ = ["held_out", "measure"]

EPSILON = 1.0
PAIRS = 400
HELD_OUT = 200
STEPS = 60
_WORDS = ["red", "blue", "green", "small", "large", "round", "flat", "old", "new", "fast"]
_KEY = bytes(32)  # of check values, which nothing here looks at


def _pairs(count: int, seed: int) -> list[dict[str, str]]:
    choose = random.Random(seed).choice
    return [
        {
            "prompt": f"{choose(_WORDS)} {choose(_WORDS)}?",
            "chosen": f" {choose(_WORDS)} good {choose(_WORDS)}",
            "rejected": f" {choose(_WORDS)} poor {choose(_WORDS)}",
        }
        for _ in range(count)
    ]


def _trainer(rows: list[dict[str, Any]], folder: Path, tokenizer: Any, model: Any, **more: Any) -> Any:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    return RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(folder),
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **more,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def _model(tokenizer: Any, seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForSequenceClassification(config)


def held_out(folder: Path, seed: int, *, debias: bool, epsilon: float = EPSILON) -> tuple[float, float]:
    """Accuracy and log loss on held-out clean labels of a reward model that trained on flipped ones."""
    import torch
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    clean, rows = _pairs(HELD_OUT, 999), _pairs(PAIRS, seed)
    tokenizer = train_tokenizer([text for row in rows for text in row.values()])
    labels = read_labels({name: [row[name] for row in rows] for name in rows[0]})
    noisy = draw(labels, epsilon, SealedRandom(bytes([seed]) * 32), release="benchmark", check_key=_KEY)
    flipped = [dict(zip(noisy, values, strict=True)) for values in zip(*noisy.values(), strict=True)]
    trainer = _trainer(flipped, folder, tokenizer, _model(tokenizer, seed), max_steps=STEPS)
    with debiased(trainer, flip_chance(epsilon)) if debias else nullcontext():
        trainer.train()
    scored = _trainer(clean, folder, tokenizer, trainer.model)
    with torch.no_grad():
        trainer.model.eval()
        rewards = trainer.model(**scored.data_collator(list(scored.train_dataset))).logits.squeeze(-1)
    margin = rewards[:HELD_OUT] - rewards[HELD_OUT:]
    return float((margin > 0).float().mean()), float(torch.nn.functional.softplus(-margin).mean())


def measure(folder: Path, *, quick: bool) -> Iterator[Figure]:
    """Held-out log loss and accuracy, debiased and not, over a few seeds."""
    seeds = range(1, 2 if quick else 6)
    how = f"ε {EPSILON:g}, {PAIRS} labels, {STEPS} steps, mean of {len(seeds)} seeds"
    found = {
        debias: [held_out(folder / f"{seed}-{debias}", seed, debias=debias) for seed in seeds]
        for debias in (True, False)
    }
    for debias, said in ((True, "debiased"), (False, "not debiased")):
        accuracy, loss = (statistics.mean(figures) for figures in zip(*found[debias], strict=True))
        yield Figure(f"held-out log loss, reward on flipped labels, {said}", loss, how=how)
        yield Figure(f"held-out accuracy, reward on flipped labels, {said}", accuracy, how=how)
