"""A publish, stopped or refused at every one of its system calls and at every file that it puts.

Whatever happens, the published files verify at what they say (the old checkpoint or the new one), and publishing again
gives, byte for byte, what an undisturbed publish gives.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from rlhf_audit_nb.errors import StoreError
from rlhf_audit_nb.trail import Level, Trail, TrustPolicy
from rlhf_audit_nb.trail.published import verify_published
from rlhf_audit_nb.trail.tiles import publish_tiles

ROOT = Path(__file__).parents[2]
OLD, NEW, LARGER = 254, 257, 600

# Runs publishes as its own forked children, each stopped at another of its system calls: strace counts within a
# process, so a child that is to be stopped at its k-th call of N first makes N - k calls that come to nothing, and one
# strace serves all of them.
DRIVER = r'''
import json, os, re, shutil, signal, subprocess, sys, ctypes, fcntl
from pathlib import Path
from rlhf_audit_nb.errors import AuditError
from rlhf_audit_nb.trail import Level, TrustPolicy
from rlhf_audit_nb.trail.published import verify_published
from rlhf_audit_nb.trail.tiles import publish_tiles

base, start, share = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
# A copy of its own: what one reader of a database does depends on whether there is another.
trail, undisturbed = base / f"trail-{start}-{share}", base / "undisturbed"
shutil.copytree(base / "trail", trail)
policy = TrustPolicy.parse((base / "policy").read_text())
MUTATE = {"open", "openat", "write", "pwrite64", "fsync", "fdatasync", "rename", "renameat", "renameat2", "mkdir",
          "mkdirat", "unlink", "unlinkat", "rmdir", "ftruncate"}
READ = {"stat", "lstat", "fstat", "newfstatat", "statx", "close", "read", "pread64", "getdents64", "access",
        "faccessat", "faccessat2", "flock", "lseek"}
VAIN = {
    "openat": lambda: os.open("x", 0, dir_fd=-1),
    "close": lambda: os.close(-1),
    "newfstatat": lambda: os.stat("x", dir_fd=-1),
    "pread64": lambda: os.pread(-1, 1, 0),
    "pwrite64": lambda: os.pwrite(-1, b"x", 0),
    "fsync": lambda: os.fsync(1000),
    "write": lambda: os.write(-1, b"x"),
    "renameat": lambda: os.rename("x", "y", src_dir_fd=-1, dst_dir_fd=-1),
    "mkdirat": lambda: os.mkdir("x", dir_fd=-1),
    "read": lambda: os.read(-1, 1),
    "unlinkat": lambda: os.unlink("x", dir_fd=-1),
    "flock": lambda: fcntl.flock(1000, fcntl.LOCK_UN),
    "ftruncate": lambda: os.ftruncate(-1, 0),
}


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def traced(options, children):
    """Run each child, a function, in a process of its own below one strace; how each ended and what it said."""
    ready, go = os.pipe()
    heard, say = os.pipe()
    leader = os.fork()
    if leader == 0:
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER, anyone
        os.read(ready, 1)
        ends = []
        for child in children:
            pid = os.fork()
            if pid == 0:
                child(say)
            ends.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os.write(say, ("ends " + json.dumps(ends) + "\n").encode())
        os._exit(0)
    os.close(say)
    command = ["strace", "-f", "-p", str(leader), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        line = strace.stderr.readline()
        if "attached" not in line:
            os.kill(leader, signal.SIGKILL)
            sys.exit(f"cannot trace: {line}")
        os.write(go, b"x")
        with os.fdopen(heard) as reader:
            said = reader.read()
        os.waitpid(leader, 0)
        strace.stderr.read()
    os.close(ready), os.close(go)
    *reasons, ends = said.splitlines()
    return json.loads(ends.removeprefix("ends ")), [json.loads(line) for line in reasons]


def publisher(target, call=None, vain=0, label=None):
    def run(say):
        for _ in range(vain):
            try:
                VAIN[call]()
            except OSError:
                pass
        code = 0
        try:
            publish_tiles(trail, target)
        except AuditError as error:
            code, said = 3, {"label": label, "reason": error.reason, "message": str(error)}
        except BaseException as error:
            code, said = 4, {"label": label, "reason": type(error).__name__, "message": repr(error)}
        if code:
            os.write(say, json.dumps(said).encode() + b"\n")
        os._exit(code)

    return run


def prepared(name):
    case = base / name
    if start == "incremental":
        shutil.copytree(base / "before", case)
    return case


def problem(case, home):
    """What is wrong after a fault, if anything is."""
    if (case / "checkpoint").exists():
        verdict = verify_published(case, policy=policy, home=home)
        if verdict.level is not Level.UNANCHORED or verdict.reasons:
            return f"after the fault: {verdict}"
        if verdict.size not in ((254, 257) if start == "incremental" else (257,)):
            return f"after the fault it has {verdict.size} entries"
    elif start == "incremental":
        return "the checkpoint is gone"
    publish_tiles(trail, case)
    verdict = verify_published(case, policy=policy, home=home)
    if verdict.level is not Level.UNANCHORED or verdict.reasons or verdict.size != 257:
        return f"after another publish: {verdict}"
    if files(case) != expected:
        return f"other files than undisturbed: {sorted(set(files(case)) ^ set(expected))}"
    return None


expected = files(undisturbed)
publish_tiles(trail, base / f"warm-{start}-{share}")  # whatever is imported late is imported now
log = base / f"log-{start}-{share}"
counted = prepared(f"counted-{start}-{share}")
traced(["-o", str(log)], [publisher(counted)])
calls = re.findall(r"^(\d+) +(\w+)\(", log.read_text(), re.MULTILINE)
leader = calls[0][0]
count = {}
for pid, call in calls:
    if pid != leader and call in MUTATE | READ:
        count[call] = count.get(call, 0) + 1
shutil.rmtree(counted)

# Stopped at a call that changes nothing, a publish leaves what it leaves at the next one that does.
faults = {call: ("KILL", "EIO", "ENOSPC") if call in MUTATE else ("EIO",) for call in count}
for call, fault in sorted((call, fault) for call in count for fault in faults[call]):
    inject = f"inject={call}:" + ("signal=KILL" if fault == "KILL" else f"error={fault}")
    numbers = range(1 + int(share), count[call] + 1, 2)
    cases = [prepared(f"{start}-{call}-{fault}-{when}") for when in numbers]
    if call in VAIN:
        runs = [publisher(case, call, count[call] - when, when) for case, when in zip(cases, numbers)]
        ends, said = traced(["-e", f"trace={call}", "-o", os.devnull, "-e", f"{inject}:when={count[call]}"], runs)
    else:
        ends, said = [], []
        for case, when in zip(cases, numbers):
            options = ["-e", f"trace={call}", "-o", os.devnull, "-e", f"{inject}:when={when}"]
            end, words = traced(options, [publisher(case, label=when)])
            ends += end
            said += words
    words = {item.pop("label"): item for item in said}
    for case, when, end in zip(cases, numbers, ends):
        home = case.with_name(case.name + "-home")
        result = {"call": call, "fault": fault, "when": when, "end": end, **words.get(when, {})}
        try:
            result["problem"] = problem(case, home)
        except Exception as error:
            result["problem"] = f"{type(error).__name__}: {error}"
        print(json.dumps(result))
        if result["problem"] is None:
            shutil.rmtree(case)
            shutil.rmtree(home, ignore_errors=True)
'''


def grow(trail: Trail, size: int) -> None:
    for number in range(trail.reader().size, size):
        trail.append("a.b", b'{"n":%d}' % number, run="r")
    trail.flush()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def strace() -> str:
    found = shutil.which("strace")
    if found is None or subprocess.run([found, "-o", os.devnull, "true"], capture_output=True).returncode != 0:
        pytest.skip("strace is not here or may not trace")
    return found


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A trail of 257 entries, its first 254 published, and what an undisturbed publish of all gives."""
    place = tmp_path_factory.mktemp("begun")
    with Trail.open(place / "trail", home=place / "home") as trail:
        (place / "policy").write_text(TrustPolicy.of(trail.log_vkey).format())
        grow(trail, OLD)
        publish_tiles(place / "trail", place / "before")
        grow(trail, NEW)
    publish_tiles(place / "trail", place / "undisturbed")
    return place


def stopped_everywhere(begun: Path, start: str) -> list[dict]:
    """Every call of one publish, in two processes; each result tells call, fault, when, end and problem."""
    (begun / "driver.py").write_text(DRIVER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RLHF_AUDIT_HOME": str(begun / "home")}
    running = [
        subprocess.Popen(
            [sys.executable, str(begun / "driver.py"), str(begun), start, share],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for share in "01"
    ]
    results = []
    for process in running:
        out, err = process.communicate(timeout=300)
        if "cannot trace" in err:
            pytest.skip(f"strace may not trace a process that runs: {err}")
        assert process.returncode == 0, err[-4000:]
        results += [json.loads(line) for line in out.splitlines()]
    return results


@pytest.mark.slow
@pytest.mark.parametrize("start", ["first", "incremental"])
def test_a_publish_stopped_at_any_system_call_verifies_and_is_completed_by_the_next_one(begun, strace, start):
    results = stopped_everywhere(begun, start)
    assert "\n".join(str(item) for item in results if item["problem"] is not None) == ""
    # Each was really stopped: by the signal, or by an error that it said in one sentence or could do without.
    killed = [item for item in results if item["fault"] == "KILL"]
    assert [item for item in killed if item["end"] != -9] == []
    assert len(killed) > 100
    assert [item for item in results if item["end"] not in (-9, 0, 3)] == []
    refused = [item for item in results if item["end"] == 3]
    assert {item["call"] for item in refused} >= {"fsync", "write"}
    for item in results:
        if item["call"] in ("fsync", "write") and item["fault"] != "KILL":
            assert item["end"] == 3, item  # never swallowed
            assert item["reason"] == ("disk-full" if item["fault"] == "ENOSPC" else "publish"), item
            assert "Traceback" not in item["message"], item


class Unreliable(MemoryFileSystem):
    """A store of objects in memory of which one put fails: before it took, or after."""

    protocol = "s3"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    kinds: ClassVar[dict] = {}
    failing: int | None = None
    persists = False
    puts = 0

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("s3://", "/").replace("sftp://", "/"))

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        if kwargs:
            assert self.kinds.setdefault(path, kwargs.pop("ContentType"))
        kind, kind.puts = Unreliable, Unreliable.puts + 1
        failed = kind.puts == kind.failing
        if not failed or kind.persists:
            super().pipe_file(path, value, mode=mode, **kwargs)
        if failed:
            raise TimeoutError("no answer")


@pytest.fixture
def store():
    """That store, as s3:// (puts are atomic) and as sftp:// (a file is put beside, then moved)."""
    for scheme in ("s3", "sftp"):
        fsspec.register_implementation(scheme, Unreliable, clobber=True)
    Unreliable.store.clear()
    Unreliable.failing, Unreliable.puts = None, 0
    yield Unreliable
    for scheme in ("s3", "sftp"):
        _registry.pop(scheme, None)
    Unreliable.store.clear()


def shelf(store) -> dict[str, bytes]:
    return {name: file.getvalue() for name, file in store.store.items()}


@pytest.mark.parametrize("scheme", ["s3", "sftp"])
@pytest.mark.parametrize("persists", [False, True], ids=["not persisted", "persisted"])
@pytest.mark.parametrize("size", [NEW, LARGER], ids=["the same size", "a larger size"])
def test_a_store_that_fails_at_any_put_holds_the_old_or_the_new_and_the_next_publish_completes(
    begun, tmp_path, store, scheme, persists, size
):
    policy = TrustPolicy.parse((begun / "policy").read_text())
    shutil.copytree(begun / "trail", tmp_path / "trail")
    shutil.copytree(begun / "home", tmp_path / "keys")
    target = f"{scheme}://bucket/trail"

    def verdict():
        found = verify_published(target, policy=policy, home=tmp_path / "home")
        assert (found.level, found.reasons) == (Level.UNANCHORED, ()), found
        return found.size

    def put_before():
        store.store.clear()
        for name, data in contents(begun / "before").items():
            MemoryFileSystem.pipe_file(fs, f"/bucket/trail/{name}", data)
        store.puts, store.failing, store.persists = 0, None, persists
        shutil.rmtree(tmp_path / "home", ignore_errors=True)

    fs = store()
    put_before()
    publish_tiles(begun / "trail", target)
    undisturbed, puts = shelf(store), store.puts
    assert puts == 7  # the mark, two bundles, three tiles, the checkpoint
    if scheme == "s3":  # told what it will serve
        kinds = {
            path.removeprefix("bucket/trail/").removeprefix("/bucket/trail/"): kind
            for path, kind in store.kinds.items()
        }
        assert kinds["checkpoint"] == "text/plain; charset=utf-8"
        assert {kind for path, kind in kinds.items() if path != "checkpoint"} == {"application/octet-stream"}
    if size == LARGER:
        with Trail.open(tmp_path / "trail", home=tmp_path / "keys") as trail:
            grow(trail, LARGER)
    for at in range(1, puts + 1):
        put_before()
        store.failing = at
        with pytest.raises(StoreError) as caught:
            publish_tiles(begun / "trail", target)
        assert caught.value.reason == "unreachable"
        assert target in caught.value.message
        assert "no answer" in caught.value.message
        at_checkpoint = at == puts
        assert verdict() == (NEW if at_checkpoint and persists and scheme == "s3" else OLD)
        if not persists:  # the same file fails once more
            store.failing, store.puts = 1, 0
            with pytest.raises(StoreError):
                publish_tiles(begun / "trail", target)
            assert verdict() == OLD
        store.failing = None
        assert publish_tiles(tmp_path / "trail", target).size == size
        assert verdict() == size
        if size == NEW:
            assert shelf(store) == undisturbed


FLUSHED = """
import sys
from rlhf_audit_nb.trail.tiles import publish_tiles
publish_tiles(sys.argv[1], sys.argv[2])
"""


def test_nothing_gets_its_name_before_it_is_durable_and_the_checkpoint_comes_last(begun, tmp_path, strace):
    """What a loss of power cannot undo: the order of the system calls, as the kernel saw them."""
    target, log = tmp_path / "deep" / "www", tmp_path / "log"
    command = [strace, "-f", "-qq", "-y", "-o", str(log), "-e", "trace=renameat,renameat2,rename,fsync,mkdirat,mkdir"]
    subprocess.run(
        [*command, sys.executable, "-c", FLUSHED, str(begun / "trail"), str(target)], check=True, cwd=ROOT, timeout=60
    )
    flushed: set[str] = set()
    unsafe: set[str] = set()  # folders with a name in them that is not durable yet
    renamed = []
    for line in log.read_text().splitlines():
        if line.rpartition("=")[2].strip() != "0":
            continue
        call, words = line.split(maxsplit=1)[1].split("(", 1)
        paths = re.findall(r'<([^>]*)>|"([^"]*)"', words)
        if call == "fsync":
            flushed.add(paths[0][0])
            unsafe.discard(paths[0][0])
        elif call == "mkdirat":
            unsafe.add(paths[0][0])
        elif call == "mkdir":
            unsafe.add(str(Path(paths[0][1]).parent))
        else:
            (source, _), (_, old), (folder, _), (_, new) = paths
            assert f"{source}/{old}" in flushed, line
            name = Path(folder, new).relative_to(target.resolve()).as_posix()
            if name == "checkpoint":
                assert {path for path in unsafe if path.startswith(str(tmp_path))} == set(), line
            renamed.append(name)
            unsafe.add(folder)
    assert renamed[-1] == "checkpoint"
    assert sorted(renamed) == sorted(contents(target))
    assert {path for path in unsafe if path.startswith(str(tmp_path))} == set()
