"""What the trail costs: appending, reporting (`capture` has what recording costs, `verifying` checking).

Appending is measured beside what others need for less: a bare append and fsync, an insert and commit in plain SQLite,
witness-log's journal (a hash chain without a query, several writers or a checkpoint for each commit). They take turns,
in blocks, so that what the machine does besides hits all of them.

``python -m benchmarks.trails FOLDER ENTRIES`` appends so many entries of 300 bytes, and says how fast and in how many
bytes on the disk.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from benchmarks.capture import step_of
from benchmarks.figures import Figure, quantile
from rlhf_audit_nb import AuditableRLHF, AuditConfig
from rlhf_audit_nb.trail import Draft, Trail

__all__ = ["measure"]

WARM = 300
"""Durable entries before any is timed: until the write-ahead log has its size, each makes that file longer too."""

BODY = b'{"note":"' + b"x" * 180 + b'"}'


Append = Callable[[bytes], object]


def _bare(folder: Path, stack: ExitStack) -> Append:
    file = stack.enter_context((folder / "bare").open("wb", buffering=0))

    def append(body: bytes) -> None:
        file.write(body)
        os.fsync(file.fileno())

    return append


def _sqlite(folder: Path, stack: ExitStack) -> Append:
    connection = sqlite3.connect(folder / "plain.sqlite", isolation_level=None)
    stack.callback(connection.close)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE entries (number INTEGER PRIMARY KEY, body BLOB)")

    def append(body: bytes) -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO entries (body) VALUES (?)", (body,))
        connection.execute("COMMIT")

    return append


def _witness_log(folder: Path, _stack: ExitStack) -> Append | None:
    try:
        from witness_log import JournaledLog
    except ImportError:
        return None
    journal = JournaledLog.create(str(folder / "journal"), os.urandom(32))

    def append(body: bytes) -> None:
        journal.append_intent(body)
        journal.sync()

    return append


def _rate(append: Append, count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        append(BODY)
    return count / (time.perf_counter() - began)


def _durable(folder: Path, durable: int) -> Iterator[Figure]:
    """Entries that are on the disk before the next one is handed in."""
    folder.mkdir()
    with ExitStack() as stack:
        trail = stack.enter_context(Trail.open(folder / "always", durability="always"))
        found: dict[str, Append | None] = {
            "bare": _bare(folder, stack),
            "trail": lambda body: trail.append("bench", body),
            "sqlite": _sqlite(folder, stack),
            "witness-log": _witness_log(folder, stack),
        }
        peers = {name: append for name, append in found.items() if append is not None}
        for append in peers.values():
            _rate(append, WARM)
        blocks = [{name: _rate(append, durable) for name, append in peers.items()} for _ in range(5)]
    how = f"median of 5 × {durable}, in turns, after {WARM}"
    ratio = quantile([block["trail"] / block["bare"] for block in blocks], 0.5)
    yield Figure("append, durable one by one / bare append and fsync", ratio, "", 0.5, at_most=False, how=how)
    said = {"bare": "append and fsync, bare", "trail": "append, durable one by one"}
    said |= {"sqlite": "insert and commit, plain SQLite", "witness-log": "append and sync, witness-log"}
    for name in peers:
        rate = quantile([block[name] for block in blocks], 0.5)
        yield Figure(said[name], rate, "entries/s", how=how)


def _batched(folder: Path, entries: int) -> Iterator[Figure]:
    how = f"{entries:,} entries of 190 bytes"
    with Trail.open(folder / "batched") as trail:
        began = time.perf_counter()
        for _ in range(entries):
            trail.append("bench", BODY)
        trail.flush()
        rate = entries / (time.perf_counter() - began)
    yield Figure("append, batched", rate, "entries/s", 100_000, at_most=False, how=how)
    with Trail.open(folder / "bulk") as trail:
        began = time.perf_counter()
        trail.append_many(Draft("bench", BODY) for _ in range(entries))
        rate = entries / (time.perf_counter() - began)
    yield Figure("append, in bulk", rate, "entries/s", how=how)


def _sized(trail: Trail, run: str) -> bytes:
    """A body with which an entry of ``run`` has 300 bytes (its number in four digits)."""
    index = trail.append("bench", b"{}", run=run).wait()
    (entry,) = trail.reader().entries(index)
    return b'{"note":"' + b"x" * (300 - 3 - len(entry.data) - 9) + b'"}'


def grow(folder: Path, entries: int) -> tuple[float, float]:
    """Append ``entries`` of 300 bytes, batched: seconds, and bytes on the disk for each."""
    with Trail.open(folder) as trail:
        body = _sized(trail, "r")
        began = time.perf_counter()
        for _ in range(entries):
            trail.append("bench", body, run="r")
        trail.flush()
        taken = time.perf_counter() - began
    return taken, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / entries


def _growing(folder: Path, entries: int) -> Iterator[Figure]:
    taken, size = grow(folder / "grown", entries)
    how = f"{entries:,} entries of 300 bytes, batched"
    yield Figure("on the disk for an entry of 300 bytes", size, "bytes", 700, how=how)
    _, larger = grow(folder / "larger", 4 * entries)
    yield Figure("the same, four times as many", larger, "bytes", 700, how=f"{4 * entries:,} entries")
    yield Figure("append, batched, 300 bytes", entries / taken, "entries/s", 100_000, at_most=False, how=how)


def _reporting(folder: Path, entries: int) -> Iterator[Figure]:
    from rlhf_audit_nb.compliance.evidence import Evidence
    from rlhf_audit_nb.reports import build_compliance_report

    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(folder / "long")))
    with auditor.track_training("long") as run:
        for number in range(1, entries + 1):
            run.record(step_of(number))
    auditor.verify()
    for suffix, bound in (("html", 5), ("pdf", 10)):
        began = time.perf_counter()
        build_compliance_report(Evidence.from_trail(folder / "long"), "eu_ai_act").save(folder / f"report.{suffix}")
        yield Figure(f"report as {suffix.upper()}", time.perf_counter() - began, "s", bound, how=f"{entries:,} steps")


def measure(folder: Path, *, quick: bool) -> Iterator[Figure]:
    """All of it, in new trails under ``folder``."""
    entries = 10_000 if quick else 100_000
    yield from _durable(folder / "durable", 50 if quick else 400)
    yield from _batched(folder, entries)
    yield from _growing(folder, entries)
    yield from _reporting(folder, 1000 if quick else 10_000)


if __name__ == "__main__":
    seconds, size = grow(Path(sys.argv[1]), int(sys.argv[2]))
    print(f"{int(sys.argv[2]) / seconds:,.0f} entries/s, {size:.0f} bytes each")
