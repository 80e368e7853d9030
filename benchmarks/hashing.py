"""What hashing saved weights costs: against the machine's own SHA-256, and beside OpenSSF's implementation.

The target is 0.9 of the machine's SHA-256 rate times its cores. That rate is measured in the same minute, with as many
threads as there are cores, on a buffer that stays in each core's cache: no file is read for it. Blocks of the three
are interleaved, so whatever else the machine does hits all of them; figures are medians. The files lie in the page
cache, as those do that a trainer has just written.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, quantile
from rlhf_audit_nb.capture import folders
from rlhf_audit_nb.capture.folders import digest_folder

__all__ = ["measure"]

TARGET = 0.9
_PIECE = 1 << 20


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _machine(size: int) -> None:
    """SHA-256 of ``size`` bytes in all, on all cores, without reading anything."""
    buffer = bytes(os.urandom(_PIECE))

    def work() -> None:
        digest = hashlib.sha256()
        for _ in range(size // _PIECE // _cores()):
            digest.update(buffer)

    threads = [threading.Thread(target=work) for _ in range(_cores())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _reference(folder: Path, *, shards: bool) -> Callable[[], object]:
    """OpenSSF's own hashing of the folder, as its command line does it, or by shards of the same size as ours."""
    from model_signing import hashing

    config: Any = hashing.Config()  # type: ignore[no-untyped-call]
    if shards:
        config = config.use_shard_serialization(shard_size=folders.SHARD_SIZE)
    return lambda: config.hash(folder)


def _rate(work: Callable[[], object], size: int) -> float:
    began = time.perf_counter()
    work()
    return size / (time.perf_counter() - began) / 1e9


def _write(path: Path, size: int) -> None:
    piece = os.urandom(_PIECE)
    with path.open("wb") as file:
        for _ in range(size // _PIECE):
            file.write(piece)


def measure(folder: Path, *, quick: bool) -> Iterator[Figure]:
    """All of it, in ``folder``, which is gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    repeats, size = (3, 256 << 20) if quick else (9, 3 << 29)
    files = 8
    several, single = folder / "several", folder / "single"
    for place in (several, single):
        place.mkdir()
    for number in range(files):
        _write(several / f"model-{number + 1:05}-of-{files:05}.safetensors", size // files)
    _write(single / "model.safetensors", size)
    try:
        for name, place in (("several files", several), ("one file", single)):
            shards = place is single and size > folders.SHARDED_FROM
            target = None if quick else TARGET  # a file this small is not cut into shards
            yield from _compared(f"{name}, {size >> 20:,} MiB", place, size, repeats, target, shards=shards)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compared(
    what: str, place: Path, size: int, repeats: int, target: float | None, *, shards: bool
) -> Iterator[Figure]:
    reference = _reference(place, shards=shards)
    found: dict[str, list[float]] = {"machine": [], "ours": [], "theirs": []}
    digest_folder(place)  # into the page cache
    for _ in range(repeats):
        found["machine"].append(_rate(lambda: _machine(size), size))
        found["ours"].append(_rate(lambda: digest_folder(place), size))
        found["theirs"].append(_rate(reference, size))
    ratios = {name: [mine / all_of_it for mine, all_of_it in zip(found[name], found["machine"], strict=True)]
              for name in ("ours", "theirs")}  # fmt: skip
    how = f"median of {repeats}, {_cores()} cores{', by shards' if shards else ''}"
    yield Figure(f"SHA-256 of the machine, all cores ({what})", quantile(found["machine"], 0.5), "GB/s", how=how)
    yield Figure(f"hashing {what}", quantile(found["ours"], 0.5), "GB/s", how=how)
    yield Figure(f"the same by model_signing ({what})", quantile(found["theirs"], 0.5), "GB/s", how=how)
    yield Figure(f"hashing {what} / machine", quantile(ratios["ours"], 0.5), "", target, at_most=False, how=how)
    yield Figure(f"the same by model_signing / machine ({what})", quantile(ratios["theirs"], 0.5), "", how=how)
