"""A place where one training is watched from outside: every byte that a reader of the public side gets of it.

`LeakLab` starts one process that imports what training needs and then forks for each job, so that every job begins
from the same state of every library. A job trains inside ``%%audit_train`` in an IPython shell, in a folder of its own
name, and leaves in it all that can be seen: what was printed and logged (at level DEBUG), displays, the states of the
panel, what the trainer saved, the trail, its published form, reports, cards, and what the commands say.

What may differ between two runs for other reasons than a leak is held still: run ids, the sealed seed, the randomness
of signatures. The vault's commitments are replaced by ideal ones, which depend on nothing that they hide. Two things
are made to differ on purpose: the *clock*, which runs at another speed in the second job, since time is a function of
the data; and, with ``cut``, the canary's contribution is taken away where the mechanism adds it to the sum, and only
there. Then nothing of her is left in what passed through the mechanism, and two jobs that differ in her data alone
must agree in every byte, weights and their digests included. Nothing is normalised.

The vault (and the home with the keys) is the curator's own and no part of the public side.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

__all__ = ["CANARY", "LINE", "LeakLab", "differences"]

CANARY = 3
LINE = "--durability always --engine loop --epsilon 200 --delta 1e-3 --noise-multiplier 1 --sampling-rate 0.7"
_PRIVATE = ("vault.sqlite", "home")
_RANDOM = (".sqlite-shm", ".lock")  # SQLite's scratch memory, which holds no content, and empty files


class LeakLab:
    """The process that runs jobs; a context manager.

    Args:
        folder: where the jobs' folders come to lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        environment = {**os.environ, "RLHF_AUDIT_HOME": str(folder / "template" / "home")}
        (folder / "template").mkdir()
        self._errors = (folder / "lab.txt").open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._errors.close()

    def seen(self, rows: list[dict[str, Any]], **job: Any) -> dict[str, bytes]:
        """The public side of a job over ``rows``: contents by path.

        Args:
            rows: the data; the canary is the unit ``CANARY``.
            job: ``trainer``, ``args`` (of its configuration), ``line`` (options of the cell), ``plant`` (a leak),
                ``cut``, ``canary`` (her number, if another unit), ``speed`` (of the clock), ``full`` (with reports and
                cards), ``breaks`` (the canary's rows cannot be computed with), ``fails`` (the cell is expected to).
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"rows": rows, **job}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        work = self._folder / "work"
        if answer.strip() != "done":
            said = "".join(path.read_text(errors="replace") for path in sorted(work.glob("seen/*.txt")))
            raise AssertionError(f"the job ended with {answer!r}\n{(self._folder / 'lab.txt').read_text()}\n{said}")
        found = {
            str(path.relative_to(work)): _content(path)
            for path in sorted(work.rglob("*"))
            if path.is_file() and not any(part.startswith(_PRIVATE) for part in path.relative_to(work).parts)
            if not path.name.endswith(_RANDOM)
        }
        shutil.rmtree(work)
        return found


def _content(path: Path) -> bytes:
    """The file's bytes; of SQLite's log its pages, without the random salts and checksums in front of each."""
    content = path.read_bytes()
    if not path.name.endswith("-wal"):
        return content
    head, frame = 32, 24 + 4096
    return b"".join(content[at : at + 8] + content[at + 24 : at + frame] for at in range(head, len(content), frame))


def differences(first: dict[str, bytes], second: dict[str, bytes]) -> list[str]:
    """Where the two differ: the path, and the first bytes that do."""
    found = [f"{path}: only in one" for path in sorted(first.keys() ^ second.keys())]
    for path in sorted(first.keys() & second.keys()):
        one, two = first[path], second[path]
        if one != two:
            at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
            near = slice(max(at - 60, 0), at + 100)
            found.append(f"{path}: at byte {at} of {len(one)} and {len(two)}: {one[near]!r} and {two[near]!r}")
    return found


# --- the lab's own process ---------------------------------------------------------------------------------------


def _serve(folder: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")  # a channel of its own: libraries print
    os.dup2(2, 1)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from support import tiny
    from support.trails import without_cross_checks

    from rlhf_audit_nb.trail import Trail

    template = folder / "template"
    Trail.open(template / "audit", origin="example.com/leaks").close()
    for make in (tiny.dpo_trainer, tiny.reward_trainer, tiny.sft_trainer, tiny.kto_trainer):
        make(tiny.synthetic_pairs(3), template / "warm", max_steps=1).train()
    shutil.rmtree(template / "warm", ignore_errors=True)
    with without_cross_checks():
        for line in sys.stdin:
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    _do(folder, json.loads(line))
                    code = 0
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            print("done" if status == 0 else f"failed with {status}", file=answers, flush=True)


def _do(folder: Path, job: dict[str, Any]) -> None:
    work = folder / "work"
    shutil.copytree(folder / "template", work)
    seen = work / "seen"
    seen.mkdir()
    os.environ["RLHF_AUDIT_HOME"] = str(work / "home")
    os.chdir(work)
    _redirect(seen)
    _listen(seen)
    _hold_still(job.get("speed", 1.0))
    if job.get("cut", True):
        _cut(job.get("canary", CANARY))
    if "plant" in job:
        _plant(job["plant"], work)
    _train(job, work)
    _tell(job, work)


def _redirect(seen: Path) -> None:
    for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        file = os.open(seen / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)


def _listen(seen: Path) -> None:
    """Everything that any logger says, at the lowest level; and every Python warning."""
    import logging
    import warnings

    import datasets
    import transformers

    handler = logging.FileHandler(seen / "log.txt", delay=False)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.DEBUG)
    logging.captureWarnings(capture=True)
    transformers.logging.set_verbosity_debug()
    transformers.logging.enable_propagation()
    datasets.logging.set_verbosity_debug()
    datasets.logging.enable_propagation()
    for name in ("trl", "peft", "accelerate", "rlhf_audit_nb"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    warnings.simplefilter("always")


def _hold_still(speed: float) -> None:
    """Pin what is random for other reasons than the data, and let the clock run at a speed of its own."""
    import itertools
    import threading
    import time
    import uuid

    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    from rlhf_audit_nb.capture import folders
    from rlhf_audit_nb.capture.run import open_private_runs
    from rlhf_audit_nb.privacy import populations
    from rlhf_audit_nb.privacy.sampling import SealedRandom
    from rlhf_audit_nb.trail import commitment, writer

    ticks, lock, started = itertools.count(10), threading.Lock(), []

    def seconds() -> float:
        """Beginning with a minute; standing still until the run is open, whose opening is nobody's private data."""
        with lock:
            if not started and any(run.resolution_us > 1 for run in open_private_runs()):
                started.append(True)
            return 1_700_000_040.0 + (next(ticks) * 0.0004 * speed if started else 0.001)

    time.time = time.monotonic = time.perf_counter = seconds
    time.time_ns = time.monotonic_ns = time.perf_counter_ns = lambda: int(seconds() * 1e9)
    numbers = itertools.count(1)
    uuid.uuid4 = lambda: uuid.UUID(int=next(numbers) * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128, version=4)
    SealedRandom.from_system = classmethod(lambda cls: cls(bytes(range(32))))  # type: ignore[method-assign,assignment]
    commitment.commitment_of = writer.commitment_of = _ideal
    populations.secrets = SimpleNamespace(token_bytes=lambda count: bytes(range(count)))  # type: ignore[assignment]
    made = folders.ec.ECDSA

    class Repeatable:
        """The same signature each time: the usual one has randomness of its own in it."""

        def __new__(cls, algorithm: Any) -> Any:
            return made(algorithm, deterministic_signing=True)

    folders.ec = type("ec", (), {**vars(ec), "ECDSA": Repeatable})  # type: ignore[assignment]
    del hashes


def _ideal(kind: str, stream: str, seq: int, opening: Any) -> bytes:
    """A commitment that tells nothing of what it hides, whoever looks."""
    del opening
    return hashlib.sha256(f"{kind} {stream} {seq}".encode()).digest()


class _Hers(float):
    """A loss of the canary."""


def _cut(canary: int) -> None:
    """Take the canary's contribution away where the mechanism adds it up, and nowhere else."""
    import torch

    from rlhf_audit_nb.privacy import live_loss, unit_gradients
    from rlhf_audit_nb.privacy.sampling import SealedRandom

    hers: set[int] = set()
    now = {"seed": -1}
    torch_seed, manual_seed, clip_into = SealedRandom.torch_seed, torch.manual_seed, unit_gradients.clip_into

    def noting(self: Any, step: int, unit: int) -> int:
        seed = torch_seed(self, step, unit)
        if unit == canary:
            hers.add(seed)
        return seed

    def seeding(seed: int) -> Any:
        now["seed"] = seed
        return manual_seed(seed)

    def cutting(parameters: Any, sums: Any, bound: float) -> float:
        nowhere = [total.clone() for total in sums] if now["seed"] in hers else sums
        return clip_into(parameters, nowhere, bound)

    add = unit_gradients.Seen.add

    def adding(self: Any, pairs: int, loss: float, norm: float, bound: float) -> None:
        add(self, pairs, _Hers(loss) if now["seed"] in hers else loss, norm, bound)

    def summing(self: Any, losses: Any) -> float:
        return clipped_sum(self, [loss for loss in losses if not isinstance(loss, _Hers)])

    clipped_sum, live_loss.LiveLoss.clipped_sum = live_loss.LiveLoss.clipped_sum, summing  # type: ignore[method-assign]

    unit_gradients.Seen.add = adding  # type: ignore[method-assign]
    SealedRandom.torch_seed = noting  # type: ignore[method-assign]
    torch.manual_seed = seeding
    unit_gradients.clip_into = cutting


def _plant(name: str, work: Path) -> None:
    """A leak, by its name: what the engine tells in private is put where others can see it."""
    import logging
    import warnings

    from rlhf_audit_nb.capture import callback
    from rlhf_audit_nb.events import Step

    tell = callback.StepRecorder.on_private_step

    def leak(recorder: Any, step: int, metrics: Any) -> None:
        if name == "a loss in the log":
            recorder._trainer.state.log_history.append({"loss": metrics["loss"], "step": step})
        elif name == "a batch size in an entry":
            recorder._run.record(Step(step=step, notes=[f"{metrics['pairs']} pairs"]))
        elif name == "whether a unit was finite":
            recorder._run.record(Step(step=step, notes=["all finite"] * (metrics["non_finite_units"] == 0)))
        elif name == "a count on the progress bar":
            print(f"{metrics['pairs']} pairs", file=sys.stderr)
        elif name == "a number in a folder's name":
            (work / "out" / f"checkpoint-{metrics['pairs']}-pairs").mkdir(exist_ok=True, parents=True)
            (work / "out" / f"checkpoint-{metrics['pairs']}-pairs" / "empty").touch()
        elif name == "a debug message":
            logging.getLogger("rlhf_audit_nb.privacy").debug("norm %s", metrics["unit_norm_max"])
        elif name == "a warning":
            warnings.warn(f"loss {metrics['loss']}", stacklevel=1)
        elif name == "a series on the panel":
            recorder._run.state.add("update_norm", step, metrics["unit_norm_mean"])

    def telling(recorder: Any, step: int, epsilon: float, metrics: Any) -> None:
        leak(recorder, step, metrics)
        tell(recorder, step, epsilon, metrics)

    callback.StepRecorder.on_private_step = telling  # type: ignore[method-assign]
    if name == "exact times":
        from rlhf_audit_nb.capture import run

        run.COARSE_US = 2  # of any that is coarser than 1, the clock above takes notice


_CELL = """%%audit_train --experiment leaks {line}
trainer = make(rows, out, **args)
prepare(trainer)
trainer.train()
"""


def _train(job: dict[str, Any], work: Path) -> None:
    from IPython.core.interactiveshell import InteractiveShell
    from support import tiny

    shell = InteractiveShell.instance(colors="nocolor")
    shown: list[Any] = []
    shell.display_pub.publish = lambda data, metadata=None, **more: shown.append([data, metadata, more.get("update")])
    from rlhf_audit_nb.notebook.panels import run_panel

    run_panel.detect_mode = lambda: "static"
    shell.run_cell("%load_ext rlhf_audit_nb")
    states: list[Any] = []
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, **job.get("args", {})}
    shell.user_ns.update(
        make=getattr(tiny, f"{job['trainer']}_trainer"),
        rows=job["rows"],
        out=work / "out",
        args=args,
    )

    def prepare(trainer: Any) -> None:
        trainer.add_callback(_watching(states))
        if job.get("breaks"):  # one of her rows has a token that no model knows, which its forward cannot bear
            trainer.train_dataset = trainer.train_dataset.map(_spoilt, load_from_cache_file=False)

    shell.user_ns["prepare"] = prepare
    line = job.get("line", LINE)
    result = shell.run_cell(_CELL.format(line=line), store_history=True)
    trainer = shell.user_ns.get("trainer")
    (work / "seen" / "result.txt").write_text(
        "\n".join(
            [
                repr(result.result),
                repr(result.error_in_exec),
                repr(getattr(result.error_in_exec, "__notes__", None)),
                repr(trainer and trainer.state.log_history),
                repr(trainer and {name: dict(held) for name, held in trainer._metrics.items()}),
                repr(trainer and trainer._total_train_tokens),
                repr(trainer and trainer.state),
            ]
        )
    )
    (work / "seen" / "displays.json").write_text(json.dumps(shown, indent=1, default=repr))
    (work / "seen" / "panel.json").write_text(json.dumps(states, indent=1))
    if result.success is job.get("fails", False):
        raise SystemExit(f"the cell {'succeeded' if result.success else 'failed'}")


def _spoilt(row: dict[str, Any]) -> dict[str, Any]:
    if row["annotator_id"] != f"person-{CANARY}":
        return row
    return {name: [91234, *value] if name.endswith("ids") else value for name, value in row.items()}


def _watching(states: list[Any]) -> Any:
    """A callback that reads the panel as its thread would, once a step."""
    from transformers import TrainerCallback

    from rlhf_audit_nb.capture.run import current_run
    from rlhf_audit_nb.notebook.panels.model import PanelModel

    class Watches(TrainerCallback):
        model: PanelModel | None = None

        def on_step_end(self, *_: Any, **__: Any) -> None:
            run = current_run()
            assert run is not None
            self.model = self.model or PanelModel(run.state)
            run.trail.flush()
            states.append(self.model.observe(0.0, run.trail.status()))
            states.append(self.model.full())

    return Watches()


def _tell(job: dict[str, Any], work: Path) -> None:
    """What the commands say and write afterwards."""
    from rlhf_audit_nb.auditor import AuditableRLHF
    from rlhf_audit_nb.cli import main

    out = work / "told"
    out.mkdir()
    commands = [
        ["verify", "audit", "--json"],
        ["budget", "show", "--trail", "audit", "--json"],
        ["trail", "query", "--trail", "audit", "--jsonl"],
    ]
    if job.get("full"):
        commands += [["publish", "told/tiles", "--trail", "audit", "--json"]]
        auditor = AuditableRLHF()
        for form in ("html", "pdf", "json"):
            auditor.generate_compliance_report(format=form).save(out / f"report.{form}")
        for form in ("eu_standard", "huggingface"):
            auditor.generate_model_card(format=form).save(out / f"{form}.md")
    for command in commands:
        print("$", *command, flush=True)
        try:
            main(command)
        except SystemExit as end:
            print("exit", end.code, flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
