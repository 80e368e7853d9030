"""Trainings in two real processes over gloo on the loopback device, for tests. Run as a script, never inside pytest.

    ranks.py train FOLDER SCENARIO      one process of a launcher's (torchrun), which sets RANK and WORLD_SIZE
    ranks.py all FOLDER SCENARIO...     forks two processes for each scenario, which work in FOLDER/SCENARIO

Each process leaves ``RANK.json``: what its run looked like from there. Where several scenarios are asked for, what is
slow to import is imported once, before the forks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

PATIENCE_S = 60.0
LOOPBACK = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "yes"}


def train(folder: Path, scenario: str) -> None:
    """One process's part: an audited training of a tiny model."""
    from rlhf_audit_nb.auditor import AuditableRLHF
    from rlhf_audit_nb.config import AuditConfig, PrivacyConfig
    from rlhf_audit_nb.errors import AuditError

    rank = int(os.environ["RANK"])
    said: dict[str, Any] = {"rank": rank}
    config = AuditConfig(trail=str(folder / "audit"), weights_every=1)
    if rank:  # a process that writes no trail needs no keys either
        os.environ["RLHF_AUDIT_HOME"] = str(folder / "nobody")
    try:
        AuditableRLHF(privacy_config=PrivacyConfig(epsilon=1.0), audit_config=config).track_training("private")
    except AuditError as error:
        said["private"] = [error.reason, str(error), (folder / "audit").exists()]
    auditor = AuditableRLHF(audit_config=config)
    run = auditor.track_training("ranks")
    try:
        with run:
            said["provisional"] = run.id
            trainer = make_trainer(folder, scenario, rank)
            trainer.train()
            if scenario == "healthy" and rank:
                auditor.log_annotations(
                    prompts=["?"], responses=[("a", "b")], choices=["first"], annotator_ids=["w"], guideline="v1"
                )
    finally:
        said |= {"run": run.id, "warnings": run.state.warnings, "status": run.state.status, "steps": run.steps}
        said["ended"] = time.time()
        _leave(folder / f"{rank}.json", said)


def make_trainer(folder: Path, scenario: str, rank: int, **changes: Any) -> Any:
    """The trainer of all scenarios, with what ``scenario`` plants in rank 1."""
    from support.tiny import sft_trainer, synthetic_pairs
    from transformers import TrainerCallback

    class Planted(TrainerCallback):  # type: ignore[misc]
        """What goes wrong after step 2 in the process of rank 1."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if rank != 1 or state.global_step != 2:
                return
            if scenario == "killed":
                _leave(folder / "1.json", {"rank": 1, "ended": time.time()})
                os.kill(os.getpid(), signal.SIGKILL)
            if scenario == "raises":
                raise ZeroDivisionError("planted")
            if scenario == "diverges":
                next(item for item in model.parameters() if item.requires_grad).data.add_(0.25)

    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
        "save_strategy": "steps" if scenario == "healthy" else "no",
        "save_steps": 4,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
    }
    # 18 rows in batches of 2: nine batches for two processes, so that one of them comes short.
    trainer = sft_trainer(synthetic_pairs(9), folder / "model", **{**settings, **changes})
    trainer.add_callback(Planted())
    return trainer


def launch_from_notebook(folder: Path) -> None:
    """``notebook_launcher`` inside an open run, as in an audited cell: the processes are forked from this one."""
    from accelerate import notebook_launcher

    from rlhf_audit_nb.auditor import AuditableRLHF
    from rlhf_audit_nb.config import AuditConfig

    def work() -> None:
        trainer = make_trainer(folder, "notebook", int(os.environ["RANK"]))
        trainer.train()
        trainer.save_model(str(folder / "saved"))

    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(folder / "audit")))
    run = auditor.track_training("ranks")
    with run:
        notebook_launcher(work, num_processes=2, use_port=str(_free_port()))
    _leave(folder / "launcher.json", {"run": run.id, "status": run.state.status, "steps": run.steps})


def open_too_early(folder: Path) -> None:
    """A private run that is opened before anything says that this process is one of several."""
    import torch.distributed

    from rlhf_audit_nb.auditor import AuditableRLHF
    from rlhf_audit_nb.config import AuditConfig, PrivacyConfig
    from rlhf_audit_nb.errors import AuditError

    rank, port = int(os.environ.pop("RANK")), os.environ.pop("MASTER_PORT")
    os.environ.pop("WORLD_SIZE")
    os.environ.pop("LOCAL_RANK")
    said: dict[str, Any] = {"rank": rank}
    trail = str(folder / f"audit-{rank}")
    with contextlib.suppress(AuditError):
        auditor = AuditableRLHF(privacy_config=PrivacyConfig(epsilon=1.0), audit_config=AuditConfig(trail=trail))
        with auditor.track_training("private"):
            address = f"tcp://127.0.0.1:{port}"
            torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
            trainer = make_trainer(folder, "private", rank)
            try:
                trainer.train()
            except AuditError as error:
                said["refused"] = [error.reason, str(error)]
                raise
    _leave(folder / f"{rank}.json", said)


def run_all(folder: Path, scenarios: list[str]) -> None:
    """Each scenario in turn, in forked pairs."""
    from peft import get_peft_model
    from support import tiny
    from trl import SFTConfig, SFTTrainer

    import rlhf_audit_nb.auditor
    import rlhf_audit_nb.capture.attach
    import rlhf_audit_nb.capture.callback  # noqa: F401

    # Once for all; a trainer itself would make this process one of a training.
    get_peft_model(tiny.causal_model(), tiny.lora())
    assert all((tiny.tokenizer(), SFTConfig, SFTTrainer))
    for scenario in scenarios:
        inside = folder / scenario
        inside.mkdir(parents=True)
        if scenario == "notebook":
            _wait_all([_fork(inside, scenario, {})])
        else:
            port = {"MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
            _wait_all([_fork(inside, scenario, {**port, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(2)])


def _fork(folder: Path, scenario: str, environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(environment)
        own = {"notebook": launch_from_notebook, "private": open_too_early}
        own.get(scenario, lambda it: train(it, scenario))(folder)
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait_all(pids: list[int]) -> None:
    deadline, left = time.monotonic() + PATIENCE_S, set(pids)
    while left:
        left -= {pid for pid in left if os.waitpid(pid, os.WNOHANG)[0]}
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            sys.exit(f"{len(left)} processes had not ended after {PATIENCE_S:.0f} s.")
        time.sleep(0.02)


def _leave(path: Path, said: dict[str, Any]) -> None:
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(said))
    draft.replace(path)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


if __name__ == "__main__":
    os.environ.update(LOOPBACK)
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]), sys.argv[3])
    else:
        run_all(Path(sys.argv[2]), sys.argv[3:])
