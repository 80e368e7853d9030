"""What a training step costs: audited against plain, private against plain; DPO with LoRA.

The trainings that are compared run in one process and take turns step by step, so that whatever else the machine does
hits all of them alike. A second plain training takes its turns too: what it comes out at is how far a ratio of that
very run can be trusted.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import threading
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
BLOCK = 4
"""Steps in a turn."""
WARM = BLOCK
CONTROL = "plain / plain step (control)"

Context = Callable[[], AbstractContextManager[Any]]


class _Baton:
    """Lets threads take turns, in an order that is drawn anew in each round; whoever is done no longer counts.

    With an order that stays, one of them would always come after the same other, and pay for what that one left behind.
    """

    def __init__(self, count: int = 2) -> None:
        self._changed = threading.Condition()
        self._random = random.Random(0)
        self._count = count
        self._done: set[int] = set()
        self._round: list[int] = []
        self._turn = self._next()

    def take(self, me: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == me or len(self._done) >= self._count - 1)

    def give(self, me: int) -> None:
        with self._changed:
            if self._turn == me:
                self._turn = self._next()
            self._changed.notify_all()

    def leave(self, me: int) -> None:
        with self._changed:
            self._done.add(me)
            if self._turn == me:
                self._turn = self._next()
            self._changed.notify_all()

    def _next(self) -> int:
        self._round = [item for item in self._round if item not in self._done]
        if not self._round:
            self._round = [item for item in range(self._count) if item not in self._done] or [0]
            self._random.shuffle(self._round)
        return self._round.pop()


class _Clock(TrainerCallback):
    """Times each step from its beginning to the beginning of the next, so that all between counts.

    A turn is `BLOCK` steps: what a step leaves to other threads (a commit, 20 ms later) falls into the turn of its own.
    """

    def __init__(self, baton: _Baton, me: int) -> None:
        self.steps: list[float] = []
        self.cpu: list[float] = []
        self._baton, self._me = baton, me
        self._began: tuple[float, float] | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self._began is None:
            self._baton.take(self._me)
        else:
            self.steps.append(time.perf_counter() - self._began[0])
            self.cpu.append(time.process_time() - self._began[1])
            if len(self.steps) % BLOCK == 0:
                self._baton.give(self._me)
                self._baton.take(self._me)
        self._began = (time.perf_counter(), time.process_time())


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


def _side_by_side(folder: Path, steps: int, contexts: Sequence[Context]) -> list[list[float]]:
    """Seconds of each step of trainings that take turns, then seconds of processor time of each."""
    baton = _Baton(len(contexts))
    clocks = [_Clock(baton, me) for me in range(len(contexts))]
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

    threads = [threading.Thread(target=train, args=(me,)) for me in range(len(contexts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [clock.steps[WARM:] for clock in clocks] + [clock.cpu[WARM:] for clock in clocks]


def _ratio(plain: Sequence[float], other: Sequence[float]) -> float:
    """The median, over rounds, of what a turn of one took against a turn of the other."""
    starts = range(0, len(plain), BLOCK)
    return statistics.median(sum(other[at : at + BLOCK]) / sum(plain[at : at + BLOCK]) for at in starts)


def _compare(
    what: str, target: float | None, folder: Path, steps: int, treated: Context, note: str = ""
) -> Iterator[Figure]:
    plain, control, other, *cpu = _side_by_side(folder, steps, (nullcontext, nullcontext, treated))
    base = f"plain {1e3 * statistics.median(plain):.0f} ms"
    how = f"DPO LoRA, {PAIRS} pairs, {steps} steps in turns of {BLOCK}, {base}; median ratio{note}"
    yield Figure(what, _ratio(plain, other), "", target, how=how)
    how = f"all threads of the process, in its turns; plain again / plain {_ratio(cpu[0], cpu[1]):.3f}"
    yield Figure(f"processor time of: {what}", _ratio(cpu[0], cpu[2]), "", how=how)
    load = os.getloadavg()[0]
    yield Figure(f"{CONTROL} of: {what}", _ratio(plain, control), "", how=f"the same run, load {load:.1f}")


def audited(folder: Path, *, quick: bool) -> Iterator[Figure]:
    """A step of 100 ms or more, audited at the defaults, against a plain one; and what the run itself says of it."""
    _quiet()
    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(folder / "trail")))
    context = lambda: auditor.track_training("audited")  # noqa: E731
    yield from _compare("audited without DP / plain step", 1.01, folder, BLOCK if quick else 30 * BLOCK, context)
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
    yield from _private(folder, BLOCK if quick else 10 * BLOCK)
    yield from _memory(folder)


def _private(folder: Path, steps: int) -> Iterator[Figure]:
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
        auditor = _private_auditor(folder / f"private-{name}", settings)
        context = lambda auditor=auditor: auditor.track_training("private")  # noqa: E731
        yield from _compare(what, target, folder / name, steps, context, note)
        if name == "annotators":
            yield _recording_share(auditor, steps)


def _recording_share(auditor: AuditableRLHF, steps: int) -> Figure:
    """What the ledger's entries and the panel's numbers cost a private step, by the recorder's own clock."""
    found = auditor.overhead().figures
    ours = sum(found["parts"][name]["p50"] for name in ("recorder", "panel") if name in found["parts"])
    how = f"recorder and panel, p50 of {steps} steps, by the run's own clock"
    alone = 1e3 * found["step_ms"]["p50"]  # most steps are not the first of a turn, which has waited for the others
    return Figure("private: per-step entry and panel / step", ours / alone, "", 0.01, how=how)


def _private_auditor(folder: Path, settings: dict[str, Any]) -> AuditableRLHF:
    private = PrivacyConfig(epsilon=1e6, noise_multiplier=1.0, sampling_rate=1.0, **settings)
    return AuditableRLHF(privacy_config=private, audit_config=AuditConfig(trail=str(folder)))


def _privately(folder: Path, settings: dict[str, Any]) -> Context:
    auditor = _private_auditor(folder, settings)
    return lambda: auditor.track_training("private")


def _memory(folder: Path) -> Iterator[Figure]:
    """Peak resident memory of a process that trains, plain and by the rows engine, each a process of its own."""
    peaks = {}
    for name in ("plain", "rows"):
        command = [sys.executable, "-m", "benchmarks.training", name, str(folder / f"memory-{name}")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
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
    baton = _Baton()
    baton.leave(1)
    trainer = _trainer(folder / "model", 5, _Clock(baton, 0))
    context = nullcontext if name == "plain" else _privately(folder / "trail", {"unit": "pair", "engine": "rows"})
    before = _resident()
    with context(), contextlib.redirect_stdout(sys.stderr):
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
