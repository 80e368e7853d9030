"""The same sweep on a Dask cluster: a real scheduler and real workers on loopback, one of which is killed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.events import RecordStarted, SweepStarted, decode_body
from rlhf_audit_nb.records import open_record
from rlhf_audit_nb.sweeping import cluster as module
from rlhf_audit_nb.sweeping import run_sweep
from rlhf_audit_nb.sweeping import sweep as sweep_module
from rlhf_audit_nb.trail import Level, Trail, TrailReader

PATIENCE = 120.0


@contextmanager
def process(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is ended with the test."""
    started = subprocess.Popen(
        [sys.executable, "-m", "dask", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait(PATIENCE)
        if started.stderr is not None:
            started.stderr.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[subprocess.Popen[str]]]]:
    """The scheduler's address, and three workers."""
    scratch = str(tmp_path_factory.mktemp("dask"))
    with ExitStack() as stack:
        common = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        scheduler = stack.enter_context(process("scheduler", *common))
        assert scheduler.stderr is not None
        address = ""
        for line in scheduler.stderr:
            told = re.search(r"tcp://127\.0\.0\.1:\d+", line)
            if told:
                address = told.group()
                break
        assert address
        # Else its log would fill the pipe, and it would wait for a reader.
        threading.Thread(target=scheduler.stderr.read, daemon=True).start()
        words = ("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", scratch)
        workers = [stack.enter_context(process(*words, "--host", "127.0.0.1")) for _ in range(3)]
        for worker in workers:
            assert worker.stderr is not None
            threading.Thread(target=worker.stderr.read, daemon=True).start()
        yield address, workers


def grid(folder: Path, text: str) -> Path:
    path = folder / "grid.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.slow
def test_three_workers_carry_out_a_sweep_and_what_one_had_that_is_killed_is_run_again(
    cluster: tuple[str, list[subprocess.Popen[str]]],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, workers = cluster
    waits, trail = tmp_path / "waits", tmp_path / "audit"
    runs = "".join(f"  - {{x: {x}}}\n" for x in (4, 5, 6))
    path = grid(tmp_path, f"runs:\n  - {{x: 1, wait: {waits}}}\n{runs}")
    monkeypatch.setattr(sweep_module._Sweep, "_summarised", lambda self, _pool: self.folder / "left out")
    ends = time.monotonic() + PATIENCE

    def kill_who_waits() -> None:
        """The worker whose kernel has begun the run that waits; the second attempt finds nothing to wait for."""
        while not waits.exists():
            assert time.monotonic() < ends
            time.sleep(0.05)
        kernel = int(waits.read_text())
        (owner,) = [one for one in workers if one.pid == psutil.Process(kernel).ppid()]
        owner.kill()

    killer = threading.Thread(target=kill_who_waits)
    killer.start()
    while_waiting = time.monotonic()
    client_sees_three(address, ends)
    result = run_sweep(source, path, tmp_path / "out", trail=trail, cluster=address, retries=2)
    killer.join(PATIENCE)
    assert time.monotonic() - while_waiting < PATIENCE
    assert result.outcomes == {"completed": 4}
    assert sorted(worker.poll() is None for worker in workers) == [False, True, True]
    (started,) = [decode_body(e.type, e.body) for e in TrailReader.open(trail).entries(type=SweepStarted.TYPE)]
    assert (started.where, started.workers) == ("cluster", 3)
    begun = [decode_body(e.type, e.body) for e in TrailReader.open(trail).entries(type=RecordStarted.TYPE)]
    assert len(begun) == 5, "each once, and the one that was killed once more"
    for row in result.rows:
        assert open_record(tmp_path / "out" / f"{row['point']}.ipynb").verdict.level == Level.UNANCHORED
    assert not list((tmp_path / "out" / "attempts").glob("probe*"))
    assert not list((trail / "artifacts").glob("probe*"))


def client_sees_three(address: str, ends: float) -> None:
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(3, timeout=max(ends - time.monotonic(), 1))


def test_a_worker_that_cannot_take_part_is_named_before_anything_runs(
    cluster: tuple[str, list[subprocess.Popen[str]]], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, _ = cluster
    path = grid(tmp_path, "runs:\n  - {x: 1}\n")
    monkeypatch.setattr(module, "machine", lambda: "another kernel")
    with pytest.raises(ConfigError, match=r"The worker tcp://\S+ cannot take part: it runs on another machine"):
        run_sweep(source, path, tmp_path / "out", trail=tmp_path / "audit", cluster=address)
    assert TrailReader.open(tmp_path / "audit").size == 1
    assert not list((tmp_path / "out" / "attempts").glob("probe*"))


def test_what_a_worker_cannot_reach_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trail.open(tmp_path / "audit").close()
    (tmp_path / "out" / "attempts").mkdir(parents=True)
    asked = module.Probe(tmp_path / "out", tmp_path / "audit", os.environ["RLHF_AUDIT_HOME"])
    assert "cannot read the output folder" in module.probe(asked)
    asked.write()
    assert module.probe(asked) == ""
    asked.places[1].write_text("another")
    assert "its trail's folder is another one than ours" in module.probe(asked)
    asked.write()
    asked.home = str(tmp_path / "nobody")
    assert "cannot write to the trail" in module.probe(asked)
    asked.version = "0.0"
    assert "it has version" in module.probe(asked)
    asked.clear()
    assert sorted(path.name for path in (tmp_path / "out" / "attempts").iterdir()) == []


def test_without_the_extra_or_a_scheduler_one_sentence_says_so(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = grid(tmp_path, "runs:\n  - {x: 1}\n")
    monkeypatch.setattr(module, "CONNECT_SECONDS", 1)
    with pytest.raises(ConfigError, match=r"No Dask scheduler answers at tcp://127\.0\.0\.1:1:"):
        run_sweep(source, path, tmp_path / "out", trail=tmp_path / "audit", cluster="tcp://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match="needs Dask's distributed, which is not installed") as refused:
        run_sweep(source, path, tmp_path / "out", trail=tmp_path / "audit", cluster="tcp://127.0.0.1:1")
    assert "rlhf-audit-trail[cluster]" in refused.value.next_step


def test_nothing_of_dask_is_imported_where_no_cluster_is_asked_for() -> None:
    imported = "rlhf_audit_nb.sweeping, rlhf_audit_nb.sweeping.pool, rlhf_audit_nb.sweeping.cluster"
    code = f"import sys, {imported}; print({{'dask', 'distributed'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
