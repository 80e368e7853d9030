"""What a training step costs: audited against plain, private against plain; DPO with LoRA.

The trainings that are compared take turns in one process and one thread: short trainings one after the other, in an
order that is drawn anew for each round, their first steps not counted. A second plain training takes its turns too:
what it comes out at is how far a ratio of that very run can be trusted.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from benchmarks.figures import Figure
from rlhf_audit_nb import AuditableRLHF, AuditConfig, PrivacyConfig
from rlhf_audit_nb.demo import load_preferences, train_tokenizer

__all__ = ["CONTROL", "audited", "measure"]

PAIRS = 16
PAIRS_A_UNIT = 4
WARM, COUNTED = 2, 6
"""Steps of a turn: the first ones, which are not counted, and the others."""
CONTROL = "plain / plain step (control)"

Context = Callable[[int], AbstractContextManager[Any]]
"""What stands round the training of a round, by the round's number."""


class _Clock(TrainerCallback):
    """Times each step from its beginning to the beginning of the next, so that all between counts."""

    def __init__(self) -> None:
        self._began: list[tuple[float, float]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._began = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began.append((time.perf_counter(), time.process_time()))

    def counted(self) -> tuple[float, float]:
        """Seconds of a step, and of processor time of all threads: the mean over those of a turn that count."""
        first, last = self._began[WARM], self._began[WARM + COUNTED]
        return (last[0] - first[0]) / COUNTED, (last[1] - first[1]) / COUNTED


def _data() -> Any:
    """Equal units: the first votes of each of four annotators."""
    from datasets import Dataset

    votes = load_preferences().to_pandas()
    kept = votes.groupby("annotator_id").head(PAIRS_A_UNIT).head(PAIRS)
    assert kept["annotator_id"].nunique() == PAIRS // PAIRS_A_UNIT
    return Dataset.from_pandas(kept, preserve_index=False)


def _trainer(folder: Path, clock: _Clock) -> Any:
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
        max_steps=WARM + COUNTED + 1,
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


def _in_turns(folder: Path, rounds: int, contexts: Sequence[Context]) -> list[list[tuple[float, float]]]:
    """For each context, in each round: seconds of a step, and of processor time."""
    clocks = [_Clock() for _ in contexts]
    trainers = [_trainer(folder / str(number), clock) for number, clock in enumerate(clocks)]
    taken: list[list[tuple[float, float]]] = [[] for _ in contexts]
    order, drawn = list(range(len(contexts))), random.Random(0)
    for at in range(rounds):
        drawn.shuffle(order)
        for number in order:
            gc.collect()
            with contexts[number](at):
                trainers[number].train()
            taken[number].append(clocks[number].counted())
    return taken


def _plain(_: int) -> AbstractContextManager[None]:
    return nullcontext()


def _ratio(plain: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]], which: int = 0) -> float:
    """The median, over rounds, of what one took against the other; ``which``: seconds, or processor time."""
    return statistics.median(b[which] / a[which] for a, b in zip(plain, other, strict=True))


def _compare(
    what: str, target: float | None, folder: Path, rounds: int, treated: Context, note: str = ""
) -> Iterator[Figure]:
    plain, control, other = _in_turns(folder, rounds, (_plain, _plain, treated))
    base = f"plain {1e3 * statistics.median(seconds for seconds, _ in plain):.0f} ms"
    how = f"DPO LoRA, {PAIRS} pairs, {rounds} rounds of {COUNTED} steps, {base}; median ratio{note}"
    yield Figure(what, _ratio(plain, other), "", target, how=how)
    how = f"all threads of the process, in its turns; plain again / plain {_ratio(plain, control, 1):.3f}"
    yield Figure(f"processor time of: {what}", _ratio(plain, other, 1), "", how=how)
    load = os.getloadavg()[0]
    yield Figure(f"{CONTROL} of: {what}", _ratio(plain, control), "", how=f"the same run, load {load:.1f}")


def audited(folder: Path, *, quick: bool) -> Iterator[Figure]:
    """A step of 100 ms or more, audited at the defaults, against a plain one; and what the run itself says of it."""
    _quiet()
    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(folder / "trail")))
    context = lambda _: auditor.track_training("audited")  # noqa: E731
    yield from _compare("audited without DP / plain step", 1.01, folder, 1 if quick else 40, context)
    found = auditor.overhead().figures
    how = "the run's own measurement (auditor.overhead), p50 of a step; it counts the training thread alone"
    yield Figure("recording, by its own clock", found["recording_us"]["p50"], "µs a step", how=how)


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()


def measure(folder: Path, *, quick: bool) -> Iterator[Figure]:
    """The ratios, each with its control; new trails under ``folder``."""
    _quiet()
    folder.mkdir(parents=True, exist_ok=True)
    yield from _private(folder, 1 if quick else 10)
    yield from _memory(folder)


def _private(folder: Path, rounds: int) -> Iterator[Figure]:
    """Private against plain, by kind of unit and by engine."""
    pairs: dict[str, Any] = {"unit": "pair"}
    annotators: dict[str, Any] = {"unit": "annotator", "max_pairs_per_unit": PAIRS_A_UNIT}
    # The loop is given the same 16 pairs in several batches, each padded to its own longest answer and small enough for
    # the processor's caches: on a CPU that can outweigh what clipping and noise cost.
    apart = "; the same pairs, each unit's padded apart"
    for name, what, target, settings, note in (
        ("annotators", f"private, annotators of {PAIRS_A_UNIT} pairs (loop) / plain step", 1.15, annotators, apart),
        ("rows", "private, pairs (rows) / plain step", 1.5, {**pairs, "engine": "rows"}, ""),
        ("loop", "private, pairs (loop) / plain step", None, {**pairs, "engine": "loop"}, apart),
    ):
        trails = folder / f"private-{name}"
        context = _privately(trails, settings)
        yield from _compare(what, target, folder / name, rounds, context, note)
        if name == "annotators":
            yield _recording_share(_private_auditor(trails / str(rounds - 1), settings))


def _recording_share(auditor: AuditableRLHF) -> Figure:
    """What the ledger's entries and the panel's numbers cost a private step, by the recorder's own clock."""
    found = auditor.overhead().figures
    ours = sum(found["parts"][name]["p50"] for name in ("recorder", "panel") if name in found["parts"])
    how = "recorder and panel, p50 of the last round's steps, by the run's own clock"
    step = 1e3 * found["step_ms"]["p50"]
    return Figure("private: per-step entry and panel / step", ours / step, "", 0.01, how=how)


def _private_auditor(folder: Path, settings: dict[str, Any]) -> AuditableRLHF:
    private = PrivacyConfig(epsilon=1e6, noise_multiplier=1.0, sampling_rate=1.0, **settings)
    return AuditableRLHF(privacy_config=private, audit_config=AuditConfig(trail=str(folder)))


def _privately(folder: Path, settings: dict[str, Any]) -> Context:
    """A trail for each round: what earlier rounds spent is nothing that a step pays for."""
    return lambda at: _private_auditor(folder / str(at), settings).track_training("private")


def _memory(folder: Path) -> Iterator[Figure]:
    """Peak resident memory of a process that trains, plain and by the rows engine, each a process of its own."""
    peaks = {}
    for name in ("plain", "rows"):
        command = [sys.executable, "-m", "benchmarks.training", name, str(folder / f"memory-{name}")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peaks[name] = json.loads(done.stdout.splitlines()[-1])
    plain, rows = peaks["plain"], peaks["rows"]
    how = f"ru_maxrss of one process each, plain {plain['peak'] / 1024:.0f} MiB"
    yield Figure("peak memory, private pairs (rows) / plain", rows["peak"] / plain["peak"], "", 1.3, how=how)
    grown = [(one["peak"] - one["before"]) / 1024 for one in (plain, rows)]
    how = f"the same beyond what the process held before it trained: {grown[0]:.0f} and {grown[1]:.0f} MiB"
    yield Figure("of it, by training alone", grown[1] / max(grown[0], 1e-3), "", None, how=how)


def _train_for_memory(name: str, folder: Path) -> None:
    """One short training in this process; prints its peak memory in KiB, and what it held before."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["RLHF_AUDIT_HOME"] = str(folder / "home")
    trainer = _trainer(folder / "model", _Clock())
    context = _plain if name == "plain" else _privately(folder / "trail", {"unit": "pair", "engine": "rows"})
    before = _resident()
    with context(0), contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "before": before}))


def _resident() -> int:
    """What this process holds in memory now, in KiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    _train_for_memory(sys.argv[1], Path(sys.argv[2]))
