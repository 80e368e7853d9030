"""What a training step costs: audited against plain, private against plain; DPO with LoRA.

The two trainings that are compared run in one process and take turns step by step, so that whatever else the machine
does hits both alike.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from benchmarks.figures import Figure
from rlhf_audit_nb import AuditableRLHF, AuditConfig, PrivacyConfig
from rlhf_audit_nb.demo import load_preferences, train_tokenizer

__all__ = ["CONTROL", "measure"]

PAIRS = 16
PAIRS_A_UNIT = 4
WARM = 3
CONTROL = "plain / plain step (control)"

Context = Callable[[], AbstractContextManager[Any]]


class _Baton:
    """Lets two threads take turns; whoever is done no longer counts."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turn = 0
        self._done: set[int] = set()

    def take(self, me: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == me or 1 - me in self._done)

    def give(self, me: int) -> None:
        with self._changed:
            self._turn = 1 - me
            self._changed.notify_all()

    def leave(self, me: int) -> None:
        with self._changed:
            self._done.add(me)
            self._changed.notify_all()


class _Clock(TrainerCallback):
    """Times each step from its beginning to the beginning of the next, so that all between counts."""

    def __init__(self, baton: _Baton, me: int) -> None:
        self.steps: list[float] = []
        self._baton, self._me = baton, me
        self._began: float | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self._began is not None:
            self.steps.append(time.perf_counter() - self._began)
            self._baton.give(self._me)
        self._baton.take(self._me)
        self._began = time.perf_counter()


def _data() -> Any:
    """Equal units: the first votes of each of four annotators."""
    from datasets import Dataset

    votes = load_preferences().to_pandas()
    kept = votes.groupby("annotator_id").head(PAIRS_A_UNIT).head(PAIRS)
    assert kept["annotator_id"].nunique() == PAIRS // PAIRS_A_UNIT
    return Dataset.from_pandas(kept, preserve_index=False)


def _trainer(folder: Path, steps: int, clock: _Clock) -> Any:
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed
    from trl import DPOConfig, DPOTrainer

    set_seed(0)
    tokenizer = train_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    args = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=PAIRS,
        max_steps=steps,
        max_length=96,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return DPOTrainer(
        model=LlamaForCausalLM(config),
        args=args,
        train_dataset=_data(),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
        callbacks=[clock],
    )


def _side_by_side(folder: Path, steps: int, contexts: tuple[Context, Context]) -> tuple[list[float], list[float]]:
    """Seconds of each step of two trainings that take turns."""
    baton = _Baton()
    clocks = tuple(_Clock(baton, me) for me in (0, 1))
    trainers = [_trainer(folder / str(me), steps + WARM + 1, clock) for me, clock in enumerate(clocks)]
    failures: list[BaseException] = []

    def train(me: int) -> None:
        try:
            with contexts[me]():
                trainers[me].train()
        except BaseException as error:
            failures.append(error)
        finally:
            baton.leave(me)

    threads = [threading.Thread(target=train, args=(me,)) for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return clocks[0].steps[WARM:], clocks[1].steps[WARM:]


def _compare(what: str, target: float | None, folder: Path, steps: int, treated: Context, note: str = "") -> Figure:
    plain, other = _side_by_side(folder, steps, (nullcontext, treated))
    ratio = statistics.median(b / a for a, b in zip(plain, other, strict=True))
    base = f"plain {1e3 * statistics.median(plain):.0f} ms"
    how = f"DPO LoRA, {PAIRS} pairs, {steps} steps in turns, {base}; median ratio{note}"
    return Figure(what, ratio, "", target, how=how)


def measure(folder: Path, *, quick: bool) -> Iterator[Figure]:
    """Both ratios and, as a control, plain against plain; new trails under ``folder``."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    steps = 5 if quick else 100
    yield _compare(CONTROL, None, folder, steps, nullcontext)
    audited = AuditableRLHF(audit_config=AuditConfig(trail=str(folder / "audited")))
    context = lambda: audited.track_training("audited")  # noqa: E731
    yield _compare("audited without DP / plain step", 1.05, folder, steps, context)
    private = PrivacyConfig(
        epsilon=1e6, noise_multiplier=1.0, sampling_rate=1.0, max_pairs_per_unit=PAIRS_A_UNIT, unit="annotator"
    )
    auditor = AuditableRLHF(privacy_config=private, audit_config=AuditConfig(trail=str(folder / "private")))
    context = lambda: auditor.track_training("private")  # noqa: E731
    # The private step is given the same 16 pairs, but in four batches, each padded to its own longest answer and small
    # enough for the processor's caches: on a CPU that can outweigh what clipping and noise cost.
    note = "; the same pairs, each annotator's padded apart"
    yield _compare("private (annotators of 4 pairs) / plain step", 1.15, folder, steps // 2, context, note)
