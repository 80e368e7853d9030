"""What recording costs: a step on the training thread, a whole step of training, memory, and what SIGKILL takes.

The peers (trackio, W&B offline, MLflow on SQLite) record the same eight numbers, paced alike, each in a process of its
own with the interpreter that ``--peers`` names (say, of a scratch environment); those that it lacks are left out, and
named. ``python -m benchmarks.capture memory N`` and ``… dying FOLDER`` are the processes that this module measures.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.figures import Figure, quantile
from rlhf_audit_nb import AuditableRLHF, AuditConfig
from rlhf_audit_nb.events import Step
from rlhf_audit_nb.trail import TrailReader

__all__ = ["ENV_PEERS", "PEERS", "measure", "record_times", "step_of"]

ENV_PEERS = "RLHF_AUDIT_BENCH_PEERS"
PACE_SECONDS, SLOW_SECONDS = 0.001, 0.020
PEERS = ("trackio", "wandb", "mlflow")
PEER_SECONDS = 120
LORA_WIDTH = 1024
"""The square root of how many weights train: about a million, as in a LoRA of a model of a billion."""
KILLS = 10
WINDOW_MS = 50.0
_SEEN = struct.Struct("<qd")


def step_of(number: int) -> Step:
    """A step with eight numbers and four strings."""
    metrics: dict[str, float | int | str] = {f"metric/{n}": 0.1 * n + number for n in range(7)}
    return Step(step=number, metrics=metrics, learning_rate=1e-4, notes=["one", "two", "three", "four"])


def record_times(record: Callable[[Step], object], events: Sequence[Step], pace: float) -> list[float]:
    """Microseconds that recording each of ``events`` took, one every ``pace`` seconds."""
    taken = []
    for event in events:
        began = time.perf_counter()
        record(event)
        taken.append(1e6 * (time.perf_counter() - began))
        if pace:
            time.sleep(pace)
    return taken


def _recording(folder: Path, steps: int) -> Iterator[Figure]:
    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(folder / "steps")))
    with auditor.track_training("recording") as run:
        record_times(run.record, [step_of(number) for number in range(1, 201)], 0.0)
        # After a longer pause the processor's caches hold something else: what that costs depends on the machine, and
        # on whatever else it does, and has no target. The peers are measured in the same way.
        for name, pace, bounds in (
            ("", 0.0, (25, 100)),
            (", paced", PACE_SECONDS, (25, 100)),
            (", after 20 ms of rest", SLOW_SECONDS, (None, None)),
        ):
            events = [step_of(number) for number in range(1, (steps if pace < SLOW_SECONDS else steps // 10) + 1)]
            taken = record_times(run.record, events, pace)
            how = f"{len(events):,} steps, one every {1e3 * pace:g} ms" if pace else f"{len(events):,} steps at once"
            yield Figure(f"recording one step{name}, p50", quantile(taken, 0.5), "µs", bounds[0], how=how)
            yield Figure(f"recording one step{name}, p99", quantile(taken, 0.99), "µs", bounds[1], how=how)


def _peers(folder: Path, steps: int) -> Iterator[Figure]:
    python = os.environ.get(ENV_PEERS, sys.executable)
    script = Path(__file__).with_name("peers.py")
    for name in PEERS:
        count = steps // 10 if name == "mlflow" else steps
        for which, pace, number in (("paced", PACE_SECONDS, count), ("after 20 ms of rest", SLOW_SECONDS, count // 10)):
            place = folder / f"peer-{name}-{number}"
            place.mkdir()
            command = [python, str(script), name, str(place), str(number), str(pace)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=PEER_SECONDS, check=False, cwd=place)
            if done.returncode:
                why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                print(f"left out: {name} ({why})", file=sys.stderr)
                break
            taken = json.loads(done.stdout.splitlines()[-1])
            how = f"{number:,} steps, one every {1e3 * pace:g} ms, {taken['version']}"
            for share in ("p50", "p99"):
                yield Figure(f"recording one step, {which}, {name}, {share}", taken[share], "µs", how=how)


SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("the defaults", {}),
    ("every_steps=10", {"every_steps": 10}),
    ("every_steps=100", {"every_steps": 100}),
    ("weights_every=1", {"weights_every": 1}),
    ("weights_every=50", {"weights_every": 50}),
    ("asynchronous=False", {"asynchronous": False}),
    ('durability="always"', {"durability": "always"}),
    ('durability="always", asynchronous=True', {"durability": "always", "asynchronous": True}),
)


def _settings(folder: Path, steps: int) -> Iterator[Figure]:
    """What each setting of the audit frequency costs the training thread, and the disk."""
    from rlhf_audit_nb.capture.callback import StepRecorder

    for number, (name, setting) in enumerate(SETTINGS):
        place = folder / f"setting-{number}"
        auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(place), **setting))
        trainer = synthetic_trainer(LORA_WIDTH)
        with auditor.track_training("setting") as run, run.overhead.training():
            recorder = StepRecorder(run, trainer, lambda _: None, 0, private=False)
            for _ in synthetic_steps(recorder, trainer, steps):
                time.sleep(PACE_SECONDS)
        found = auditor.overhead().figures
        mean = 1e6 * found["share"] * found["seconds"] / found["steps"]
        held = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        how = (
            f"mean over {steps} steps of {LORA_WIDTH**2:,} trainable weights; {held / steps:,.0f} bytes a step on disk"
        )
        yield Figure(f"recording with {name}", mean, "µs a step", how=how)


# --- memory ----------------------------------------------------------------------------------------------------------


def _memory(steps: int) -> Iterator[Figure]:
    command = [sys.executable, "-m", "benchmarks.capture", "memory", str(steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    how = f"resident, beyond a process with torch and transformers, after {steps:,} synthetic steps"
    yield Figure("memory of auditing", found["steps"], "MiB", 50, how=how)
    how = f"from step {steps // 2:,} to step {steps:,}"
    yield Figure("growth of memory over the second half", found["grown"], "MiB", 5, how=how)


def _resident() -> float:
    """MiB that this process holds."""
    gc.collect()
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("this system does not tell what a process holds")


def synthetic_trainer(width: int = 64) -> Any:
    """What a recorder needs of a trainer: a small model and what TRL measured."""
    import torch

    model = torch.nn.Linear(width, width, bias=False)
    return SimpleNamespace(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        is_deepspeed_enabled=False,
        is_fsdp_enabled=False,
        _metrics={"train": {f"rewards/{name}": [] for name in ("chosen", "rejected", "margins", "accuracies")}},
    )


def synthetic_steps(recorder: Any, trainer: Any, steps: int) -> Iterator[int]:
    """Drive a recorder through so many steps, as transformers would."""
    import torch

    state = SimpleNamespace(global_step=0, max_steps=steps, is_world_process_zero=True)
    loss, norm = torch.tensor(0.5), torch.tensor(0.1)
    recorder.on_train_begin(None, state, None)
    for step in range(1, steps + 1):
        recorder.on_step_begin(None, state, None)
        recorder.saw_loss(loss)
        recorder.saw_gradient_norm(norm)
        for values in trainer._metrics["train"].values():  # noqa: SLF001 - as TRL keeps it
            values[:] = [0.25]
        recorder.on_pre_optimizer_step(None, state, None, optimizer=trainer.optimizer)
        recorder.on_optimizer_step(None, state, None)
        state.global_step = step
        recorder.on_step_end(None, state, None)
        yield step


def _hold(steps: int) -> dict[str, float]:
    import transformers

    assert transformers.Trainer
    trainer = synthetic_trainer()
    before = _resident()
    from rlhf_audit_nb.capture.callback import StepRecorder

    with tempfile.TemporaryDirectory(prefix="rlhf-audit-memory-") as name:
        os.environ["RLHF_AUDIT_HOME"] = str(Path(name) / "home")
        auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(Path(name) / "audit")))
        with auditor.track_training("long") as run, run.overhead.training():
            recorder = StepRecorder(run, trainer, lambda _: None, 0, private=False)
            half = before
            for step in synthetic_steps(recorder, trainer, steps):
                if step == steps // 2:
                    auditor.trail.flush()
                    half = _resident()
            auditor.trail.flush()
            after = _resident()
    return {"steps": after - before, "grown": after - half}


# --- SIGKILL ---------------------------------------------------------------------------------------------------------


def _killed(folder: Path, kills: int) -> Iterator[Figure]:
    lost_ms, lost_steps = [], []
    for number in range(kills):
        place = folder / f"killed-{number}"
        place.mkdir()
        milliseconds, steps = _kill_once(place, 0.3 + 0.037 * number)
        lost_ms.append(milliseconds)
        lost_steps.append(steps)
    how = f"{kills} processes that record a step a millisecond, killed; at most {max(lost_steps)} steps"
    yield Figure("lost by SIGKILL, at most", max(lost_ms), "ms", WINDOW_MS, how=how)
    yield Figure("lost by SIGKILL, median", statistics.median(lost_ms), "ms", how=how)


def _kill_once(folder: Path, after: float) -> tuple[float, int]:
    """Milliseconds from the first step that was lost to the last that was recorded, and how many steps that is."""
    seen = folder / "seen"
    child = subprocess.Popen([sys.executable, "-m", "benchmarks.capture", "dying", str(folder)])
    try:
        deadline = time.monotonic() + 60
        while not seen.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(after)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    recorded = [_SEEN.unpack_from(seen.read_bytes(), at) for at in range(0, seen.stat().st_size, _SEEN.size)]
    times = {number: when for number, when in recorded if number}
    reader = TrailReader.open(folder / "audit")
    durable = sum(1 for _ in reader.entries(type=Step.TYPE))
    last = max(times)
    if durable >= last:
        return 0.0, 0
    return 1e3 * (times[last] - times[durable + 1]), last - durable


def _die(folder: Path) -> None:
    """Record a step a millisecond until this process is killed; a mapped file keeps what was recorded, and when."""
    os.environ["RLHF_AUDIT_HOME"] = str(folder / "home")
    steps = 20_000
    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(folder / "audit")))
    with auditor.track_training("dying") as run:
        with (folder / "making").open("w+b") as file:
            file.truncate(steps * _SEEN.size)
            seen = mmap.mmap(file.fileno(), 0)
        (folder / "making").rename(folder / "seen")
        for number in range(1, steps + 1):
            run.record(step_of(number))
            _SEEN.pack_into(seen, (number - 1) * _SEEN.size, number, time.monotonic())
            time.sleep(PACE_SECONDS)


def measure(folder: Path, *, quick: bool) -> Iterator[Figure]:
    """All of it, in new trails under ``folder``; whole steps are in `training`."""
    from benchmarks.training import audited

    folder.mkdir(parents=True, exist_ok=True)
    yield from _recording(folder, 500 if quick else 5000)
    yield from _peers(folder, 100 if quick else 2000)
    yield from _settings(folder, 100 if quick else 1000)
    yield from _killed(folder, 2 if quick else KILLS)
    yield from _memory(2_000 if quick else 100_000)
    yield from audited(folder / "audited", quick=quick)


if __name__ == "__main__":
    if sys.argv[1] == "memory":
        print(json.dumps(_hold(int(sys.argv[2]))))
    else:
        _die(Path(sys.argv[2]))
