"""A writer killed, or refused by the disk, at every one of its system calls, around the 254 to 257 boundary of a tile.

Three durable appends with private halves and the closing are traced once; then they are done again for each call and
each fault. Whatever happens: what was promised is there, nothing is there twice, the trail verifies, opens and goes on.
A loss of power is played from such a trace: of what was written, only what was synced is kept, or that and any part of
the rest.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.syscalls import Call, Outcome, Warm, calls_of, strace

from rlhf_audit_nb.trail import Level, Trail, verify_trail

START = 254
COUNT = 3
TRACED = ("-e", "trace=%file,%desc")

WORK = """
def appends(trail, say):
    for number in range(254, 257):
        say(index=trail.append("a.b", b'{"n":%d}' % number, run="r", private=b"x").index)
    trail.close()

def append(case, ready, say):
    trail = Trail.open(case["folder"], home=case["home"], durability="always")
    ready()
    appends(trail, say)
WORK["append"] = append

def opening(case, ready, say):
    ready()
    Trail.open(case["folder"], home=case["home"], durability="always")
WORK["open"] = opening

def group(case, ready, say):
    trail = Trail.open(case["folder"], home=case["home"], durability="batched", asynchronous=False)
    ready()
    drafts = [Draft("a.b", b'{"n":%d}' % number, run="r", private=b"x") for number in range(254, 257)]
    for index in trail.append_many(drafts):
        say(index=index)
    trail.close()
WORK["group"] = group

# What must not be: the entry is promised before it is on the disk, or tried once more after an error.
def hasty(case, ready, say):
    trail = Trail.open(case["folder"], home=case["home"], durability="always")
    ready()
    for number in range(254, 257):
        say(index=number)
        trail.append("a.b", b'{"n":%d}' % number, run="r", private=b"x")
WORK["hasty"] = hasty

def stubborn(case, ready, say):
    trail = Trail.open(case["folder"], home=case["home"], durability="always")
    ready()
    trail.append("a.b", b'{"n":254}', run="r")
    trail.append("a.b", b'{"n":254}', run="r")
WORK["stubborn"] = stubborn

from rlhf_audit_nb.trail import Draft
"""

# Calls that may fail because the disk is full; any may fail with an error of the disk, and be the last before a kill.
TAKES_SPACE = {"openat", "write", "pwrite64", "ftruncate", "fdatasync", "fsync", "mkdir", "rename", "link"}
# Opening makes hundreds of calls, most of which only look; these are the ones that change a file or settle who may.
CHANGES = TAKES_SPACE | {"unlink", "flock", "fchown"}


@pytest.fixture(scope="module")
def tracer() -> str:
    found = strace()
    if found is None:
        pytest.skip("strace is not here or may not trace")
    return found


@pytest.fixture(scope="module")
def warm(tracer):
    with Warm(tracer, WORK) as process:
        yield process


@pytest.fixture(scope="module")
def begun():
    """A trail of 254 entries, one in the vault, and its home, to be copied for each fault; in memory if that can be."""
    memory = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(prefix="rlhf-audit-", dir=memory if memory.is_dir() else None))
    with Trail.open(place / "begun" / "audit", home=place / "begun" / "home") as trail:
        for number in range(1, START):
            trail.append("a.b", b'{"n":%d}' % number, run="r", private=b"x" if number == 1 else None)
    yield place
    shutil.rmtree(place)


def copied(begun: Path, name: str) -> Path:
    return Path(shutil.copytree(begun / "begun", begun / name))


def calls(warm: Warm, begun: Path, work: str) -> list[Call]:
    """The file system calls of an undisturbed ``work``."""
    place = copied(begun, f"undisturbed-{work}")
    log = place / "log"
    outcome = warm.run(work, place, "-y", "-o", str(log), *TRACED)
    assert outcome.ended, outcome
    found = calls_of(log.read_text(), place)
    assert judge(place, outcome, "undisturbed") == []
    return found


def faults(found: list[Call], only: set[str] | None = None) -> list[tuple[Call, str]]:
    chosen = [call for call in found if only is None or call.name in only]
    every = [(call, fault) for call in chosen for fault in ("signal=KILL", "error=EIO")]
    return every + [(call, "error=ENOSPC") for call in chosen if call.name in TAKES_SPACE]


def judge(place: Path, outcome: Outcome, what: object) -> list[str]:
    """What is wrong after a fault: nothing, if the writer keeps its word."""
    folder, home = place / "audit", place / "home"
    wrong = [] if outcome.crash is None else [f"an error that is not ours: {outcome.crash}"]
    before = verify_trail(folder, home=home)
    if before.level is not Level.UNANCHORED or before.reasons:
        wrong.append(f"before: {before.level} {before.reasons}")
    with Trail.open(folder, home=home) as trail:
        held = {entry.index: json.loads(entry.body)["n"] for entry in trail.reader().entries(type="a.b")}
        if list(held.values()) != list(range(1, 1 + len(held))):
            wrong.append(f"entries {list(held.values())[START - 2 :]}")
        wrong += [f"entry {index} was promised" for index in outcome.promised if held.get(index) != index]
        trail.append("a.b", b'{"n":%d}' % (len(held) + 1), run="r", private=b"y").wait()
    after = verify_trail(folder, home=home)
    if (after.level, after.size) != (Level.UNANCHORED, before.size + 1):
        wrong.append(f"after: {after.level} {after.reasons}")
    return [f"{what}: {text}" for text in wrong]


def tried(warm: Warm, begun: Path, work: str, chosen: list[tuple[Call, str]]) -> tuple[list[str], int]:
    """What was wrong, and how many of the cases were really disturbed."""

    def one(number: int) -> tuple[list[str], bool]:
        call, fault = chosen[number]
        place = copied(begun, f"{work}-{number}")
        inject = f"inject={call.name}:{fault}:when={call.number}"
        outcome = warm.run(work, place, "-o", "/dev/null", *TRACED, "-e", inject)
        wrong = judge(place, outcome, f"{work} {fault} at {call.name} {call.number}, {call.text[:150]}")
        shutil.rmtree(place)
        return wrong, not outcome.ended

    with ThreadPoolExecutor(3) as threads:
        done = list(threads.map(one, range(len(chosen))))
    return [text for wrong, _ in done for text in wrong], sum(disturbed for _, disturbed in done)


@pytest.mark.slow
def test_a_writer_stopped_or_refused_at_any_call_loses_nothing_that_it_promised(warm, begun):
    found = calls(warm, begun, "append")
    for name in ("pwrite64", "fdatasync", "fcntl", "unlink", "fsync", "rename"):
        assert name in {call.name for call in found}
    chosen = faults(found)
    wrong, disturbed = tried(warm, begun, "append", chosen)
    assert wrong == []
    assert disturbed > len(chosen) / 3


@pytest.mark.slow
@pytest.mark.parametrize("work", ["group", "open"])
def test_at_any_call_that_changes_something_so_do_a_bulk_and_an_opening(warm, begun, work):
    chosen = faults(calls(warm, begun, work), CHANGES)
    wrong, disturbed = tried(warm, begun, work, chosen)
    assert wrong == []
    assert disturbed > len(chosen) / 3


def test_a_writer_that_promises_too_early_is_caught(warm, begun):
    place = copied(begun, "hasty-calls")
    log = place / "log"
    warm.run("hasty", place, "-y", "-o", str(log), *TRACED)
    writes = [call for call in calls_of(log.read_text(), place) if call.name == "pwrite64"]
    wrong, _ = tried(warm, begun, "hasty", [(call, "signal=KILL") for call in writes[::6]])
    assert any("was promised" in text for text in wrong)


def test_a_writer_that_writes_twice_is_caught(warm, begun):
    place = copied(begun, "stubborn")
    outcome = warm.run("stubborn", place, "-o", "/dev/null", "-e", "trace=fsync")
    assert any("254, 254" in text for text in judge(place, outcome, "stubborn"))


# --- a loss of power ---

WRITE = re.compile(r'^\d+ +pwrite64\(\d+<([^>]+)>, "((?:\\x[0-9a-f]{2})*)", \d+, (\d+)\) += \d+$')
SYNC = re.compile(r"^\d+ +(?:fdatasync|fsync)\(\d+<([^>]+)>\) += 0$")
SAID = re.compile(r'^\d+ +sendto\(\d+<[^>]*>, "((?:\\x[0-9a-f]{2})+)"')


def unescaped(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def events(log: str) -> list[tuple[str, str, bytes, int]]:
    """Writes, syncs and promises in their order: kind, path, bytes, offset."""
    found = []
    for line in log.splitlines():
        if match := WRITE.match(line):
            found.append(("write", unescaped(match[1]).decode(), unescaped(match[2]), int(match[3])))
        elif match := SYNC.match(line):
            found.append(("sync", unescaped(match[1]).decode(), b"", 0))
        elif match := SAID.match(line):
            found.append(("say", "", unescaped(match[1]), 0))
    return found


def after_power_loss(
    happened: list[tuple[str, str, bytes, int]], place: Path, kept: float, chance: random.Random
) -> None:
    """Make the files as they may be when the power goes: what was synced, and a share ``kept`` of what was not."""
    pending: dict[str, list[tuple[bytes, int]]] = {}
    for kind, path, data, offset in happened:
        if kind == "write":
            pending.setdefault(path, []).append((data, offset))
        elif kind == "sync":
            write(place, path, pending.pop(path, []))
    for path, writes in pending.items():
        write(place, path, [item for item in writes if chance.random() < kept])
    for index in place.rglob("*-shm"):  # memory that was shared, not a file that lasts
        index.unlink()


def write(place: Path, path: str, writes: list[tuple[bytes, int]]) -> None:
    target = place / Path(path).relative_to(Path(path).parents[1])
    if writes and not path.endswith("-shm"):
        with target.open("r+b" if target.exists() else "w+b") as file:
            for data, offset in writes:
                file.seek(offset)
                file.write(data)


@pytest.mark.parametrize("work", ["append", "group", pytest.param("hasty", id="control")])
def test_when_the_power_goes_what_was_promised_is_there(warm, begun, work):
    place = copied(begun, f"power-{work}")
    log = place / "log"
    warm.run(work, place, "-y", "-xx", "-s", "70000", "-o", str(log), "-e", "trace=pwrite64,fdatasync,fsync,sendto")
    happened = events(log.read_text())
    chance = random.Random(7)
    wrong: list[str] = []
    promises = 0
    stops = [at for at, (kind, *_) in enumerate(happened) if kind == "say" and b"index" in happened[at][2]]
    for at in [*stops, *range(0, len(happened), 9)]:
        said = [json.loads(data) for kind, _, data, _ in happened[: at + 1] if kind == "say"]
        outcome = Outcome([word["index"] for word in said if "index" in word])
        promises = max(promises, len(outcome.promised))
        for kept in (0.0, 0.5):
            case = copied(begun, f"power-{work}-{at}-{kept}")
            after_power_loss(happened[: at + 1], case, kept, chance)
            wrong += judge(case, outcome, f"power lost after {at} of {len(happened)}, {kept} of the rest kept")
            shutil.rmtree(case)
    assert promises == COUNT
    assert bool(wrong) is (work == "hasty"), wrong
