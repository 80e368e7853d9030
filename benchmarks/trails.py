"""What the trail costs: recording a step, appending, verifying, proving, reporting."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Figure, quantile
from rlhf_audit_nb import AuditableRLHF, AuditConfig
from rlhf_audit_nb.events import Step
from rlhf_audit_nb.trail import Trail, TrailReader, verify_trail

__all__ = ["measure"]

PACE_SECONDS = 0.001
BODY = b'{"note":"' + b"x" * 180 + b'"}'


def _step(number: int) -> Step:
    """A step with eight numbers and four strings."""
    metrics: dict[str, float | int | str] = {f"metric/{n}": 0.1 * n + number for n in range(7)}
    return Step(step=number, metrics=metrics, learning_rate=1e-4, notes=["one", "two", "three", "four"])


def _recording(folder: Path, steps: int) -> Iterator[Figure]:
    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(folder / "steps")))
    taken = []
    with auditor.track_training("recording") as run:
        for number in range(1, steps + 1):
            event = _step(number)
            began = time.perf_counter()
            run.record(event)
            taken.append(1e6 * (time.perf_counter() - began))
            time.sleep(PACE_SECONDS)
    how = f"{steps:,} steps, one a millisecond, training thread"
    yield Figure("recording one step, p50", quantile(taken, 0.5), "µs", 25, how=how)
    yield Figure("recording one step, p99", quantile(taken, 0.99), "µs", 100, how=how)


def _bare_fsyncs(folder: Path, count: int) -> float:
    with (folder / "bare").open("wb", buffering=0) as file:
        began = time.perf_counter()
        for _ in range(count):
            file.write(BODY)
            os.fsync(file.fileno())
        return count / (time.perf_counter() - began)


def _appending(folder: Path, entries: int, durable: int) -> Iterator[Figure]:
    with Trail.open(folder / "batched") as trail:
        began = time.perf_counter()
        for _ in range(entries):
            trail.append("bench", BODY)
        trail.flush()
        rate = entries / (time.perf_counter() - began)
    yield Figure("append, batched", rate, "entries/s", 100_000, at_most=False, how=f"{entries:,} entries of 190 bytes")
    ratios = []
    with Trail.open(folder / "always", durability="always") as trail:
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(durable):
                trail.append("bench", BODY).wait()
            ratios.append(durable / (time.perf_counter() - began) / _bare_fsyncs(folder, durable))
    yield Figure(
        "append, durable one by one / bare fsync", quantile(ratios, 0.5), "", 0.5, at_most=False, how=f"5 × {durable}"
    )


def _verifying(folder: Path, entries: int) -> Iterator[Figure]:
    began = time.perf_counter()
    verdict = verify_trail(folder / "batched")
    taken = time.perf_counter() - began
    assert verdict.level.name == "UNANCHORED", verdict
    yield Figure("verify from the store", taken, "s", 10 * entries / 1e6, how=f"{verdict.size:,} entries")
    reader = TrailReader.open(folder / "batched")
    proofs = []
    for index in range(0, verdict.size, max(1, verdict.size // 200)):
        began = time.perf_counter()
        reader.inclusion_proof(index, verdict.size)
        proofs.append(1e3 * (time.perf_counter() - began))
    yield Figure("one inclusion proof, p50", quantile(proofs, 0.5), "ms", 5, how=f"among {verdict.size:,} entries")


def _reporting(folder: Path, entries: int) -> Iterator[Figure]:
    from rlhf_audit_nb.compliance.evidence import Evidence
    from rlhf_audit_nb.reports import build_compliance_report

    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(folder / "long")))
    with auditor.track_training("long") as run:
        for number in range(1, entries + 1):
            run.record(_step(number))
    auditor.verify()
    for suffix, bound in (("html", 5), ("pdf", 10)):
        began = time.perf_counter()
        build_compliance_report(Evidence.from_trail(folder / "long"), "eu_ai_act").save(folder / f"report.{suffix}")
        yield Figure(f"report as {suffix.upper()}", time.perf_counter() - began, "s", bound, how=f"{entries:,} steps")


def measure(folder: Path, *, quick: bool) -> Iterator[Figure]:
    """All of it, in new trails under ``folder``."""
    yield from _recording(folder, 1000 if quick else 5000)
    entries = 10_000 if quick else 100_000
    yield from _appending(folder, entries, 50 if quick else 200)
    yield from _verifying(folder, entries)
    yield from _reporting(folder, 1000 if quick else 10_000)
