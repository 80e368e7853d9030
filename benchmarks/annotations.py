"""What annotations cost: the 84,445 votes of UKPConvArg1 into a trail and its vault, and the same into plain SQLite.

The real votes are taken where they lie (``RLHF_AUDIT_SHARED``, or ``../shared`` beside the repository), else made-up
ones of the same number, lengths and skew; the table says which. Every repeat has a trail of its own.
"""

from __future__ import annotations

import csv
import gzip
import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, quantile
from rlhf_audit_nb import AuditableRLHF, AuditConfig
from rlhf_audit_nb.capture.annotation_rows import Prepared, prepare_values

__all__ = ["measure"]

VOTES = 84_445
SECONDS = 3.0
WORDS = {"a1": "first", "a2": "second", "equal": "tie"}

Load = Callable[[], dict[str, Any]]


def _shared() -> Path:
    given = os.environ.get("RLHF_AUDIT_SHARED")
    return Path(given) if given else Path(__file__).resolve().parents[2] / "shared"


def _columns(path: Path) -> dict[str, tuple[str, ...]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = csv.reader(file, strict=True)
        header = next(rows)
        return dict(zip(header, zip(*rows, strict=True), strict=True))


def _real(folder: Path, votes: int) -> dict[str, Any]:
    """The votes with the texts that they compare, read from both files."""
    arguments, given = _columns(folder / "arguments.csv.gz"), _columns(folder / "judgments.csv.gz")
    texts = dict(zip(arguments["arg_id"], arguments["text"], strict=True))
    asked = zip(arguments["arg_id"], arguments["debate_title"], arguments["stance"], strict=True)
    prompts = {name: f"Debate: {title}\nArgue for: {stance}" for name, title, stance in asked}
    pairs = zip(given["arg1"][:votes], given["arg2"][:votes], strict=True)
    return {
        "prompts": [prompts[name] for name in given["arg1"][:votes]],
        "responses": [(texts[one], texts[other]) for one, other in pairs],
        "choices": given["value"][:votes],
        "annotator_ids": given["annotator_id"][:votes],
        "made_at": given["submitted_at"][:votes],
        "extra": {name: given[name][:votes] for name in ("reason", "row_id")},
        "words": WORDS,
        "drawn_from": [folder / "judgments.csv.gz", folder / "arguments.csv.gz"],
    }


def _made_up(votes: int) -> dict[str, Any]:
    """As many votes of about the same lengths, by as many annotators of whom few give most."""
    draw = random.Random(0)
    texts = ["x" * draw.randint(40, 500) for _ in range(1052)]
    return {
        "prompts": ["Debate: something\nArgue for: one side of it, or the other"] * votes,
        "responses": [(draw.choice(texts), draw.choice(texts)) for _ in range(votes)],
        "choices": [draw.choice(list(WORDS)) for _ in range(votes)],
        "annotator_ids": [f"w{int(3815 * draw.random() ** 3)}" for _ in range(votes)],
        "made_at": ["2016-01-31T16:59:52Z"] * votes,
        "extra": {"reason": ["y" * draw.randint(20, 120) for _ in range(votes)], "row_id": ["z" * 80] * votes},
        "words": WORDS,
    }


def _imported(folder: Path, load: Load) -> tuple[float, float, AuditableRLHF]:
    """Seconds to read the files, and of the import until all is durable."""
    auditor = AuditableRLHF(audit_config=AuditConfig(trail=str(folder)))
    auditor.trail.flush()
    began = time.perf_counter()
    given = load()
    read = time.perf_counter()
    auditor.log_annotations(**given)
    return read - began, time.perf_counter() - read, auditor


def _plain_sqlite(path: Path, prepared: Prepared) -> float:
    """Seconds to put the same payloads beside their annotators into one table, durably, with no hash, key or cipher."""
    began = time.perf_counter()
    base = sqlite3.connect(path, isolation_level=None)
    base.execute("PRAGMA journal_mode=WAL")
    base.execute("PRAGMA synchronous=FULL")
    base.execute("CREATE TABLE annotations (id INTEGER PRIMARY KEY, annotator TEXT, payload BLOB)")
    base.execute("CREATE INDEX by_annotator ON annotations (annotator)")
    base.execute("BEGIN IMMEDIATE")
    rows = zip(prepared.owners or (), prepared.payloads, strict=True)
    base.executemany("INSERT INTO annotations (annotator, payload) VALUES (?, ?)", rows)
    base.execute("COMMIT")
    taken = time.perf_counter() - began
    base.close()
    return taken


def measure(folder: Path, *, quick: bool) -> Iterator[Figure]:
    """All of it, in new trails under ``folder``."""
    data = _shared() / "data" / "ukpconvarg1"
    real = (data / "judgments.csv.gz").is_file()
    votes, repeats = (8_000, 1) if quick else (VOTES, 3)
    load: Load = (lambda: _real(data, votes)) if real else (lambda: _made_up(votes))
    what, source = f"{votes:,} annotations", "UKPConvArg1" if real else "made up"
    reads, imports, auditor = [], [], None
    for number in range(repeats):
        read, imported, auditor = _imported(folder / f"annotations-{number}", load)
        reads.append(read)
        imports.append(imported)
    assert auditor is not None
    taken, reading = quantile(imports, 0.5), quantile(reads, 0.5)
    bound = None if quick else SECONDS  # opening files and connections weighs more on a few
    how = f"{source}, openings in the vault, durable; median of {repeats}"
    yield Figure(f"{what}, import", taken, "s", bound, how=how)
    yield Figure(f"{what}, import with reading the files", taken + reading, "s", how="both CSV files and their join")
    given = load()
    began = time.perf_counter()
    prepared = prepare_values(**given)
    checking = time.perf_counter() - began
    yield Figure(f"{what}, of that checking and encoding", checking, "s", how="before anything is written")
    plain = _plain_sqlite(folder / "plain.sqlite", prepared)
    yield Figure(f"{what}, plain SQLite", plain, "s", how="one transaction, one index, nothing hashed or sealed")
    yield Figure(f"{what}, import / plain SQLite", taken / plain, "")
    began = time.perf_counter()
    opened = sum(item.state == "open" for item in auditor.annotations())
    rate = opened / (time.perf_counter() - began)
    assert opened == votes, opened
    yield Figure("annotations opened and checked", rate, "a second", how="each against its commitment")
