"""What checking and reading a long trail costs: verifying, proving, querying; beside what others need for the same.

Each measurement of a whole trail is a process of its own, so that its peak memory is that of nothing else:
``python -m benchmarks.verifying WHAT FOLDER`` prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, quantile

__all__ = ["measure"]

GROUP = 250
"""Entries in a commit: each has its own signed checkpoint in the history, as a batched writer's have."""

RUN = 50_000
BODY = b'{"step":%d,"metrics":{"loss":0.693,"rewards/chosen":0.1,"rewards/rejected":-0.1,"note":"' + b"x" * 60 + b'"}}'
PEER_LEAVES = 20_000
COMMANDS = (
    ("trail tail", ("tail",)),
    ("trail show", ("show", "777")),
    ("trail query, one type of one experiment", ("query", "--type", "run.started", "--experiment", "exp-1")),
    ("trail query, the newest time", ("query", "--since", "1s", "--limit", "5")),
)


def _drafts(entries: int) -> Iterator[Any]:
    from rlhf_audit_nb.trail.writer import Draft

    for number in range(0, entries, RUN):
        run = f"{number // RUN:032x}"
        started = b'{"experiment":"exp-%d"}' % (number // RUN % 5)
        yield Draft(type="run.started", body=started, run=run)
        yield from (Draft(type="train.step", body=BODY % n, run=run) for n in range(min(RUN, entries - number) - 2))
        yield Draft(type="run.finished", body=b'{"status":"completed"}', run=run)


def _make(folder: Path, entries: int) -> Path:
    from rlhf_audit_nb.trail import Trail

    drafts = _drafts(entries)
    with Trail.open(folder) as trail:
        while group := list(islice(drafts, GROUP)):
            trail.append_many(group)
    return folder


def _child(what: str, folder: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.verifying", what, folder], stdout=subprocess.PIPE, check=True
    )
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def _peak_memory() -> float:
    """The most memory that this process had, in MiB; `getrusage` would count what began it as well."""
    with Path("/proc/self/status").open(encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def _verified(folder: Path) -> dict[str, float]:
    from rlhf_audit_nb.trail import verify_trail

    began, busy = time.perf_counter(), time.process_time()
    verdict = verify_trail(folder)
    assert verdict.level.name == "UNANCHORED", verdict
    peak = _peak_memory()
    wall, cpu = time.perf_counter() - began, time.process_time() - busy
    return {"wall": wall, "cpu": cpu, "peak": peak, "size": verdict.size}


def _hashed(folder: Path) -> dict[str, float]:
    """Reading the same entries and hashing them into the same root, and nothing else: no verifier goes below that."""
    from rlhf_audit_nb.trail.merkle import Frontier
    from rlhf_audit_nb.trail.store import Store, unpack_entries
    from rlhf_audit_nb.trail.verify import store_path

    began, busy = time.perf_counter(), time.process_time()
    frontier = Frontier()
    with Store(store_path(folder), write=False).reading() as transaction:
        for row in transaction.bundles(0, (1 << 63) - 1):
            frontier.extend([sha256(b"\0" + data).digest() for data in unpack_entries(row.data, row.count)])
        assert frontier.nodes == transaction.head().frontier
    return {"wall": time.perf_counter() - began, "cpu": time.process_time() - busy, "peak": 0, "size": frontier.size}


def _first_proof(folder: Path) -> dict[str, float]:
    """The first proof of a process, the opening of the store included."""
    from rlhf_audit_nb.trail import TrailReader

    began = time.perf_counter()
    reader = TrailReader.open(folder)
    opened = time.perf_counter()
    reader.inclusion_proof(reader.size // 3)
    return {"opening": 1e3 * (opened - began), "proof": 1e3 * (time.perf_counter() - opened)}


def _proving(folder: Path, repeats: int) -> Iterator[Figure]:
    from rlhf_audit_nb.trail import TrailReader
    from rlhf_audit_nb.trail.merkle import check_inclusion, leaf_hash

    first = [_child("proof", folder) for _ in range(repeats)]
    reader, chance = TrailReader.open(folder), random.Random(1)
    taken: list[float] = []
    worked: list[float] = []
    how = f"among {reader.size:,} entries"
    for _ in range(1000):
        index = chance.randrange(reader.size)
        began, busy = time.perf_counter(), time.thread_time()
        proof = reader.inclusion_proof(index)
        taken.append(1e3 * (time.perf_counter() - began))
        worked.append(1e3 * (time.thread_time() - busy))
        if len(taken) % 100 == 0:
            (entry,) = reader.entries(index, index + 1)
            assert check_inclusion(leaf_hash(entry.data), index, reader.size, proof, reader.root())
    yield Figure("one inclusion proof, p50", quantile(taken, 0.5), "ms", 5, how=how)
    cpu = f"{how}; {quantile(worked, 0.99):.2g} ms of them processor time, load {os.getloadavg()[0]:.1f}"
    yield Figure("one inclusion proof, p99", quantile(taken, 0.99), "ms", 5, how=cpu)
    median = quantile([item["proof"] for item in first], 0.5)
    yield Figure("the first proof of a process", median, "ms", 5, how=f"{how}, median of {repeats} processes")
    opening = quantile([item["opening"] for item in first], 0.5)
    yield Figure("opening the trail to read", opening, "ms", how=f"{how}, before that proof")


def _checking_a_proof() -> Iterator[Figure]:
    import metamorphic_log  # type: ignore[import-untyped]

    from rlhf_audit_nb.trail.merkle import LeafHashes, check_inclusion, leaf_hash, prove_inclusion, tree_root

    leaves = [leaf_hash(b"%d" % n) for n in range(1024)]
    hashes, size = LeafHashes(leaves), 1023
    root = tree_root(size, hashes)
    proofs = [prove_inclusion(index, size, hashes) for index in range(0, size, 5)]
    began = time.perf_counter()
    for at, proof in enumerate(proofs):
        assert check_inclusion(leaves[5 * at], 5 * at, size, proof, root)
    between = time.perf_counter()
    for at, proof in enumerate(proofs):
        metamorphic_log.verify_inclusion(5 * at, size, leaves[5 * at], proof, root)
    took = [1e6 * seconds / len(proofs) for seconds in (between - began, time.perf_counter() - between)]
    yield Figure("checking a proof", took[0], "µs", how="of 10 hashes, pure Python")
    yield Figure("checking a proof, metamorphic-log", took[1], "µs", how="the same proofs, Rust")


def _others(folder: Path, leaves: int) -> Iterator[Figure]:
    """witness-log verifies a dossier, which holds a whole log in one JSON text."""
    import witness_log

    from rlhf_audit_nb.trail import verify_trail

    log = witness_log.WitnessLog.generate()
    for number in range(leaves):
        log.append_memory(BODY % number)
    dossier = log.to_dossier_json()
    began = time.perf_counter()
    witness_log.verify_dossier_json(dossier, 0)
    theirs = 1e6 * (time.perf_counter() - began) / leaves
    _make(folder, leaves)
    began = time.perf_counter()
    verify_trail(folder)
    ours = 1e6 * (time.perf_counter() - began) / leaves
    how = f"{leaves:,} entries of the same bodies"
    yield Figure("verify, an entry", ours, "µs", how=how)
    yield Figure(
        "verify, an entry, witness-log", theirs, "µs", how=f"{how}, a dossier of {len(dossier) / leaves:.0f} bytes each"
    )


def _reading(folder: Path, size: int, repeats: int) -> Iterator[Figure]:
    script = "import sys; from rlhf_audit_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    for name, words in COMMANDS:
        taken = []
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        for _ in range(repeats):
            began = time.perf_counter()
            command = [sys.executable, "-c", script, "trail", words[0], "--trail", str(folder), *words[1:]]
            subprocess.run(command, stdout=subprocess.PIPE, check=True)
            taken.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / repeats
        load = f"{busy:.2f} s of processor time, load {os.getloadavg()[0]:.1f}"
        how = f"{size:,} entries, a process each, median of {repeats}; {load}"
        yield Figure(name, quantile(taken, 0.5), "s", 0.5, how=how)


def measure(folder: Path, *, quick: bool) -> Iterator[Figure]:
    """All of it, in new trails under ``folder``."""
    entries, repeats = (10_000, 1) if quick else (1_000_000, 5)
    short, long = _make(folder / "short", entries), _make(folder / "long", 4 * entries)
    once, four = (_child("verify", trail) for trail in (short, long))
    bare = _child("hash", short)
    how = f"{once['size']:,.0f} entries, load {os.getloadavg()[0]:.1f}"
    yield Figure("verify from the store", once["wall"], "s", 10 * entries / 1e6, how=how)
    yield Figure("verify from the store, processor time", once["cpu"], "s", 10 * entries / 1e6, how=how)
    yield Figure("verify from the store, peak memory", once["peak"], "MiB", 1024, how=how)
    yield Figure("verify / reading and hashing alone", once["cpu"] / bare["cpu"], "", how="processor time")
    growth = four["cpu"] / four["size"] / (once["cpu"] / once["size"])
    longer = f"{four['size']:,.0f} entries ({four['wall']:.1f} s) against {once['size']:,.0f}, processor time"
    yield Figure("verify, an entry of a trail four times as long", growth, "", 1.2, how=longer)
    yield Figure("its peak memory", four["peak"] / once["peak"], "", 1.2, how=longer)
    yield from _proving(short, repeats)
    yield from _checking_a_proof()
    yield from _others(folder / "beside", 2000 if quick else PEER_LEAVES)
    yield from _reading(short, entries, repeats)


if __name__ == "__main__":
    call = {"verify": _verified, "hash": _hashed, "proof": _first_proof}[sys.argv[1]]
    print(json.dumps(call(Path(sys.argv[2]))))
