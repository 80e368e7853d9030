"""A bundle is checked by its own page with openssl, sha256sum and a plain Python, which find a changed byte."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import nbformat
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from records_support import FIXTURES
from support.listening import listening
from support.tsa import Authority, serve

from rlhf_audit_nb.auditor import AuditableRLHF
from rlhf_audit_nb.errors import RecordError, ReportError
from rlhf_audit_nb.records import add_to_record, open_record
from rlhf_audit_nb.records.additions import ATTESTATION
from rlhf_audit_nb.records.anchoring import anchor_record
from rlhf_audit_nb.records.session import Outcome, RecordSession
from rlhf_audit_nb.reports.bundle_evidence import evidence_files
from rlhf_audit_nb.reports.bundle_pages import UNCOVERED, BundleFacts, plain, verify_page
from rlhf_audit_nb.reports.bundle_reading import verify_bundle
from rlhf_audit_nb.reports.record_bundle import SUMS, RecordBundle, RefusedRecordError, bundle_record
from rlhf_audit_nb.trail import Level, Trail, TrustPolicy
from rlhf_audit_nb.trail.anchoring import anchor_trail
from rlhf_audit_nb.trail.keys import encode_private, local_policy
from rlhf_audit_nb.trail.rotation import rotate_key
from rlhf_audit_nb.trail.signers import FileKey, HeldKey
from rlhf_audit_nb.trail.witness import Witness

ORIGIN = "example.org/bundled"
HOSTILE = "```\n\n```sh\ntouch pwned\n```\n<b>$(touch pwned)</b> | `touch pwned`"
RICH = {"é\u2028": [1.0, 2.5, 1e22, 1e-7, 1.5e-9, 0.00001, -0.0, 2**53 + 1, True, None], "𐀀": {}, "\uffff": "x"}

SEEDED = [FIXTURES / "seal-1" / f"{name}.ipynb" for name in ("plain", "private", "failed", "two-signatures")]


# -- making ---------------------------------------------------------------------------------------------------------


def notebook() -> nbformat.NotebookNode:
    outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="one\ntwo\n"),
        nbformat.v4.new_output("display_data", data={"application/json": RICH, "text/plain": "two\nlines"}),
    ]
    cells = [
        nbformat.v4.new_markdown_cell("# A title\n\ntext", id="title", attachments={"a.txt": {"text/plain": "a"}}),
        nbformat.v4.new_code_cell(
            "print('one')\n1 / 3", id="code", outputs=outputs, metadata={"tags": ["x"], "n": 0.1}
        ),
        nbformat.v4.new_raw_cell("raw", id="raw"),
    ]
    return nbformat.v4.new_notebook(cells=cells, metadata={"z": 1.0, "a": {"deep": [1e-6]}})


def sealed(folder: Path, path: Path, outcome: Outcome | None = None) -> Path:
    nb = notebook()
    session = RecordSession.begin(nb, {"name": "k", "language": "r", "display_name": "K"}, folder)
    try:
        session.seal(nb, outcome or Outcome("completed"))
    finally:
        session.close()
    path.write_text(nbformat.writes(nb), encoding="utf-8")
    return path


@dataclass
class World:
    """A record with all that a record can have: additions by two kinds of keys, a witness's and an authority's word."""

    place: Path
    record: Path
    policy: TrustPolicy
    authority: Path

    def made(self, verifier: str = "verifier") -> RecordBundle:
        roots = [self.authority.read_bytes()]
        return bundle_record(self.record, policy=self.policy, home=self.place / verifier, tsa_roots=roots)

    def bundle(self, target: Path) -> Path:
        """The record's bundle in a folder, the policy above it."""
        target.parent.mkdir(exist_ok=True)
        self.made().save(target)
        (target.parent / "trust.policy").write_text(self.policy.format())
        return target


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    place = tmp_path_factory.mktemp("world")
    folder = place / "audit"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_AUDIT_HOME", str(place / "home"))
        with Trail.open(folder, origin=ORIGIN) as trail:
            log = trail.log_vkey
            for number in range(300):
                trail.append("a.b", b'{"n":%d}' % number)
        record = sealed(folder, place / "record.ipynb")
        with Trail.open(folder) as trail:
            trail.append("a.b", b"{}").wait()
        witness = Witness.create(place / "alice", "witness.example/alice")
        witness.add_log(log)
        authority = Authority.make(place / "tsa")
        authority.certify()
        key = witness.vkeys[0]
        policy = TrustPolicy.parse(f"log {log}\nwitness alice {key}\nquorum alice\n")
        with listening(witness) as url, serve(authority.answer) as stamping:
            asking = TrustPolicy.parse(f"log {log}\nwitness alice {key} {url}\nquorum alice\n")
            anchor_trail(folder, policy=asking, authorities=[stamping.url], tsa_roots=[authority.pem])
        anchor_record(record, trail=folder, policy=policy, tsa_roots=[authority.pem], home=place / "h")
        said = {"role": "compliance officer", "statement": HOSTILE}
        add_to_record(record, ATTESTATION, said, FileKey(Ed25519PrivateKey.generate()), policy=policy, home=place / "h")
        other = FileKey(ec.generate_private_key(ec.SECP384R1()))
        add_to_record(record, "urn:example:other", {"n": 1}, other, policy=policy, home=place / "h")
    return World(place, record, policy, authority.ca)


@pytest.fixture(scope="module")
def good(world, tmp_path_factory) -> Path:
    """The bundle of that record, as a folder; treat it as read-only."""
    return world.bundle(tmp_path_factory.mktemp("good") / "bundle")


# -- following ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def plain_path(tmp_path_factory) -> str:
    """A PATH with a python3 of its own, which finds no package, before the machine's tools."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "python3").symlink_to(Path(sys._base_executable).resolve())
    path = f"{folder}:/usr/bin:/bin"
    done = run("python3 -I -S -c 'import rlhf_audit_nb'", folder, path)
    assert "No module named" in done.stderr
    return path


def run(command: str, folder: Path, path: str) -> subprocess.CompletedProcess[str]:
    words = ["env", "-i", f"PATH={path}", "sh", "-c", command]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def follow(folder: Path, path: str) -> subprocess.CompletedProcess[str]:
    """The one command of VERIFY.md that runs every block, as it is written there."""
    [command] = re.findall(
        r"^```text\n(.*?)\n```$", (folder / "VERIFY.md").read_text("utf-8", "replace"), re.MULTILINE | re.DOTALL
    )
    return run(command, folder, path)


def told(done: subprocess.CompletedProcess[str], word: str) -> list[str]:
    return [line for line in done.stdout.splitlines() if line.startswith(word)]


def assert_good(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, told(done, "BAD")) == (0, []), done.stdout + done.stderr
    assert re.fullmatch(r"RESULT: all (\d+) checks hold\. .*", told(done, "RESULT")[0])
    assert len(told(done, "GOOD")) >= int(told(done, "RESULT")[0].split()[2])
    assert [line for line in done.stderr.splitlines() if not line.startswith("Using configuration from")] == []


def resummed(folder: Path) -> None:
    """What a forger does: sums of the files as they are now."""
    lines = (folder / SUMS).read_text().splitlines()
    names = [line[66:] for line in lines]
    text = "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    (folder / SUMS).write_text(text)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_the_page_of_a_full_bundle_finds_all_of_it_good(good, plain_path):
    done = follow(good, plain_path)
    assert_good(done)
    assert told(done, "OPEN") == [
        "OPEN  the timestamp 1.1: to check it, save its authority's certificate as ../tsa.pem"
    ]


def test_the_timestamp_is_checked_where_its_authority_is_known(world, tmp_path, plain_path):
    folder = world.bundle(tmp_path / "bundle")
    shutil.copy(world.authority, tmp_path / "tsa.pem")
    done = follow(folder, plain_path)
    assert_good(done)
    assert told(done, "OPEN") == []
    flip(folder / "anchors" / "1.1.tsr", -20)
    resummed(folder)
    assert "BAD   the timestamp 1.1" in follow(folder, plain_path).stdout


def test_a_later_checkpoint_by_a_later_key_of_the_log_is_left_open(world, tmp_path, plain_path):
    folder = world.bundle(tmp_path / "bundle")
    opened = open_record(world.record, policy=world.policy, home=tmp_path)
    found = evidence_files(world.record.read_bytes(), opened)
    others = tuple(tuple(key for key in keys if key.file != "log") for keys in found.anchor_signers)
    page = verify_page(BundleFacts(opened, replace(found, anchor_signers=others), tiles=True, sizes={}))
    (folder / "VERIFY.md").write_text(page)
    resummed(folder)
    done = follow(folder, plain_path)
    assert_good(done)
    later = "OPEN  anchor 1 is signed by a later key of the log: the tool follows that, these commands do not"
    assert later in told(done, "OPEN")
    assert told(done, "RESULT")[0].endswith("What is marked OPEN was not checked.")


@pytest.mark.parametrize("record", SEEDED, ids=lambda path: path.stem)
def test_the_page_finds_a_record_of_each_kind_good(record, tmp_path, plain_path):
    policy = TrustPolicy.parse((record.parent / "trust.policy").read_bytes())
    bundle_record(record, policy=policy, home=tmp_path).save(tmp_path / "bundle")
    shutil.copy(record.parent / "trust.policy", tmp_path)
    done = follow(tmp_path / "bundle", plain_path)
    assert_good(done)
    page = (tmp_path / "bundle" / "VERIFY.md").read_text()
    assert ("papermill" in page.split("### 6")[0]) == (record.stem == "failed")
    text = (tmp_path / "bundle" / "index.html").read_text()
    assert "are not here" in text


def test_without_a_key_from_elsewhere_nothing_is_called_proven(good, tmp_path, plain_path):
    folder = tmp_path / "bundle"
    shutil.copytree(good, folder)
    for given in (None, "", "quorum none\n", (good.parent / "trust.policy").read_text().replace("+", "-", 1)):
        (tmp_path / "trust.policy").unlink(missing_ok=True)
        if given is not None:
            (tmp_path / "trust.policy").write_text(given)
        done = follow(folder, plain_path)
        assert done.returncode == 1
        assert "BAD   the log's key is one that you got elsewhere (../trust.policy)" in done.stdout
        assert "RESULT: NOT PROVEN" in done.stdout
    # Not even by a policy that came in the folder.
    shutil.copy(good.parent / "trust.policy", folder)
    assert follow(folder, plain_path).returncode == 1


def test_a_log_that_is_another_ones_is_not_proven(good, tmp_path, plain_path):
    """A whole bundle by a key of the forger's own holds together, and fails where the key is compared."""
    other = "log example.org/bundled+00000000+AQEB\nquorum none\n"
    shutil.copytree(good, tmp_path / "bundle")
    (tmp_path / "trust.policy").write_text(other)
    done = follow(tmp_path / "bundle", plain_path)
    assert len(told(done, "BAD")) == 2, done.stdout  # the log's key, and the witness's
    assert done.returncode == 1


# -- one changed byte -----------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def inside(data: bytes, text: bytes) -> int:
    assert data.count(text) >= 1, text
    return data.index(text) + len(text) - 1


def place_in(path: Path) -> int:
    """A byte of a file that says something: in its middle, and of the notebook one of a source."""
    data = path.read_bytes()
    if path.name == "record.ipynb":
        return inside(data, b"# A title")
    if path.name == "VERIFY.md":
        return inside(data, b"# Check")
    return len(data) // 2


def test_one_changed_byte_of_any_file_is_found(good, tmp_path, plain_path):
    missed = []
    for name in names(good):
        folder = tmp_path / "bundle"
        shutil.copytree(good, folder)
        shutil.copy(good.parent / "trust.policy", tmp_path)
        flip(folder / name, place_in(folder / name))
        if (done := follow(folder, plain_path)).returncode == 0:
            missed.append((name, done.stdout))
        shutil.rmtree(folder)
    assert missed == []


def test_with_new_sums_one_changed_byte_is_found_in_all_files_but_those_that_the_page_lists(good, tmp_path, plain_path):
    """What is left is what a signature does not cover, and VERIFY.md says of each that it does not."""
    missed = set()
    kinds = {re.sub("[0-9]+", "N", name): name for name in names(good)}
    for name in set(kinds.values()) - {SUMS}:  # the sums are written anew; the test above changes them alone
        folder = tmp_path / "bundle"
        shutil.copytree(good, folder)
        shutil.copy(good.parent / "trust.policy", tmp_path)
        flip(folder / name, place_in(folder / name))
        resummed(folder)
        if follow(folder, plain_path).returncode == 0:
            missed.add(name)
        shutil.rmtree(folder)
    listed = (good / "VERIFY.md").read_text().split("no evidence by themselves:")[1].split("\n\nInside")[0]
    assert set(re.findall(r"^- `([^`]+)`:", listed, re.MULTILINE)) == set(UNCOVERED)
    assert missed == set(UNCOVERED) - {SUMS}


def leaves(value, keys=()):
    """The paths of all strings, numbers and flags of a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if children is None:
        yield keys
        return
    for key, child in children:
        yield from leaves(child, (*keys, key))


def changed(value):
    """The value with one byte of it changed."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value + 1
    middle = len(value) // 2
    return f"{value[:middle]}{chr(ord(value[middle]) ^ 1)}{value[middle + 1 :]}" if value else "x"


def test_a_change_in_any_field_of_the_notebook_is_found_without_the_sums(good, tmp_path, plain_path):
    """One leaf of every kind of field, the seal's included; all but what the page says is not covered."""
    shutil.copytree(good, tmp_path / "bundle")
    record = tmp_path / "bundle" / "record.ipynb"
    whole = json.loads(record.read_bytes())
    blocks = re.findall(r"^```sh\n(.*?)^```$", (good / "VERIFY.md").read_text(), re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if "the notebook is what was sealed" in block]
    command = f'{blocks[0]}{block}[ "$good$bad" = 10 ]\n'
    assert run(command, tmp_path / "bundle", plain_path).returncode == 0
    kinds = {tuple("*" if isinstance(key, int) else key for key in keys): keys for keys in leaves(whole)}
    assert len(kinds) > 50
    missed = []
    for keys in kinds.values():
        other = json.loads(json.dumps(whole))
        holder = other
        for key in keys[:-1]:
            holder = holder[key]
        holder[keys[-1]] = changed(holder[keys[-1]])
        record.write_text(json.dumps(other))
        if run(command, tmp_path / "bundle", plain_path).returncode == 0:
            missed.append(keys)
    assert missed == [("metadata", "kernelspec", "display_name")]


def test_what_the_page_says_is_not_covered_is_not(good, tmp_path, plain_path):
    """Spelling, and what an editor rewrites: the list at the page's end is true."""
    shutil.copytree(good, tmp_path / "bundle")
    shutil.copy(good.parent / "trust.policy", tmp_path)
    record = tmp_path / "bundle" / "record.ipynb"
    content = json.loads(record.read_bytes())
    content["metadata"]["kernelspec"]["display_name"] = "Another"
    content["metadata"]["widgets"] = {"state": {}}
    content["cells"][0]["metadata"]["trusted"] = True
    record.write_text(json.dumps(content, indent=7))
    resummed(tmp_path / "bundle")
    assert_good(follow(tmp_path / "bundle", plain_path))


def test_a_file_that_is_missing_is_found(good, tmp_path, plain_path):
    kept = ["entries/", "keys/", "additions/", "anchors/", "tile/", "checkpoint", "statement"]
    some = [next(name for name in names(good) if name.startswith(prefix)) for prefix in kept]
    for name in some:
        shutil.copytree(good, tmp_path / "bundle")
        shutil.copy(good.parent / "trust.policy", tmp_path)
        (tmp_path / "bundle" / name).unlink()
        lines = (tmp_path / "bundle" / SUMS).read_text().splitlines(keepends=True)
        (tmp_path / "bundle" / SUMS).write_text("".join(line for line in lines if line[66:].strip() != name))
        assert follow(tmp_path / "bundle", plain_path).returncode != 0, name
        shutil.rmtree(tmp_path / "bundle")


def test_a_page_of_which_blocks_are_left_out_is_not_good(good, tmp_path, plain_path):
    shutil.copytree(good, tmp_path / "bundle")
    shutil.copy(good.parent / "trust.policy", tmp_path)
    page = (good / "VERIFY.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for left_out in range(len(blocks)):
        kept = blocks[:left_out] + blocks[left_out + 1 :]
        done = run("".join(kept), tmp_path / "bundle", plain_path)
        if left_out == len(blocks) - 1:
            assert "RESULT" not in done.stdout
        else:
            assert done.returncode != 0, blocks[left_out]
    assert names(tmp_path / "bundle") == names(good)  # nothing was written where the first block had not run


# -- keys of other kinds --------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def held(folder: Path, name: str, curve: ec.EllipticCurve) -> HeldKey:
    private = ec.generate_private_key(curve)
    (folder / f"{name}.pem").write_bytes(encode_private(private, None))
    return HeldKey(f"file2:{folder}/{name}.pem", private.public_key())


def checked(folder: Path, policy: TrustPolicy, plain_path: str) -> Path:
    """The bundle of a new record of the trail, which its page finds good."""
    place = folder.parent
    bundle_record(sealed(folder, place / "record.ipynb"), policy=local_policy(place / "home", ORIGIN)).save(
        place / "out" / "bundle"
    )
    (place / "out" / "trust.policy").write_text(policy.format())
    done = follow(place / "out" / "bundle", plain_path)
    assert_good(done)
    return place / "out" / "bundle"


def test_a_log_and_a_record_key_on_ecdsa_are_checked_and_so_is_a_rotation(home, tmp_path, plain_path):
    """Whoever was given the first key follows the log to its third; whoever was given the third needs no more."""
    (tmp_path / "out").mkdir()
    with Trail.open(tmp_path / "audit", origin=ORIGIN) as trail:
        first = TrustPolicy.of(trail.log_vkey)
        rotate_key(trail, "log")
        rotate_key(trail, "log", new=held(tmp_path, "log", ec.SECP256R1()))
        rotate_key(trail, "record", new=held(tmp_path, "record", ec.SECP384R1()))
        last = TrustPolicy.of(trail.log_vkey)
    folder = checked(tmp_path / "audit", last, plain_path)
    (tmp_path / "out" / "trust.policy").write_text(first.format())
    assert_good(follow(folder, plain_path))
    assert sorted(path.name for path in (folder / "keys").glob("*.vkey")) == ["log-1.vkey", "log-2.vkey", "log.vkey"]
    for name in ("keys/log-1.pem", "keys/log-2.vkey", "keys/log.vkey", "keys/record.pem"):
        flip(folder / name, 60)
        resummed(folder)
        assert follow(folder, plain_path).returncode == 1, name
        flip(folder / name, 60)


MLDSA = """#!{python}
import subprocess, sys
words = sys.argv[1:]
if words[0] == "list":
    print("  {{ 2.16.840.1.101.3.4.3.17, id-ml-dsa-44, ML-DSA-44, MLDSA44 }} @ default")
    raise SystemExit(0)
name = words[words.index("-inkey") + 1] if "-inkey" in words else ""
if "lasting" not in name:
    raise SystemExit(subprocess.call(["/usr/bin/openssl", *words]))
assert words[:3] == ["pkeyutl", "-verify", "-pubin"] and "-rawin" in words
from cryptography.hazmat.primitives.serialization import load_pem_public_key
key = load_pem_public_key(open(name, "rb").read())
read = lambda option: open(words[words.index(option) + 1], "rb").read()
key.verify(read("-sigfile"), read("-in"))
print("Signature Verified Successfully")
"""


def test_the_second_signature_is_open_for_an_old_openssl_and_checked_by_a_new_one(tmp_path, plain_path):
    """The new one is played by another implementation of ML-DSA behind openssl's own words."""
    record = FIXTURES / "seal-1" / "two-signatures.ipynb"
    policy = TrustPolicy.parse((record.parent / "trust.policy").read_bytes())
    folder = tmp_path / "bundle"
    bundle_record(record, policy=policy, home=tmp_path).save(folder)
    shutil.copy(record.parent / "trust.policy", tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "openssl").write_text('#!/bin/sh\n[ "$1" = list ] && exit 0\nexec /usr/bin/openssl "$@"\n')
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "openssl").write_text(MLDSA.format(python=sys.executable))
    for place in ("old", "new"):
        (tmp_path / place / "openssl").chmod(0o755)
    done = follow(folder, f"{tmp_path}/old:{plain_path}")
    assert_good(done)
    assert len(told(done, "OPEN")) == 2
    assert all("does not know ML-DSA" in line for line in told(done, "OPEN"))
    done = follow(folder, f"{tmp_path}/new:{plain_path}")
    assert_good(done)
    assert told(done, "OPEN") == []
    flip(folder / "statement.2.sig", 1000)
    resummed(folder)
    done = follow(folder, f"{tmp_path}/new:{plain_path}")
    assert done.returncode == 1
    assert any("ML-DSA" in line for line in told(done, "BAD"))


# -- what is in it --------------------------------------------------------------------------------------------------


def test_words_of_others_cannot_put_a_command_into_the_page(good):
    page = (good / "VERIFY.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert "touch pwned" in page  # it is shown
    assert not any("pwned" in block for block in blocks)
    assert not any(line.startswith("```") and line not in ("```", "```sh", "```text") for line in page.splitlines())
    assert len(re.findall(r"^```", page, re.MULTILINE)) == 2 * (len(blocks) + 1)
    assert "<b>" not in page
    assert plain(HOSTILE).count("`") == 0


def test_each_file_is_what_the_seal_holds(world, good):
    seal = json.loads(world.record.read_bytes())["metadata"]["rlhf_audit"]
    assert (good / "record.ipynb").read_bytes() == world.record.read_bytes()
    assert (good / "checkpoint").read_text() == seal["checkpoint"]
    assert json.loads((good / "statement.dsse.json").read_text()) == seal["statement"]
    assert [json.loads((good / f"additions/{n}.dsse.json").read_text()) for n in (1, 2)] == seal["additions"]
    found = sorted(path.name for path in (good / "entries").iterdir())
    assert found == sorted(
        f"{entry['index']:06d}.{kind}" for entry in seal["entries"] for kind in ("json", "tlog-proof")
    )


def test_no_private_half_is_in_it(world, good):
    secrets = [path.read_bytes() for path in (world.place / "home").rglob("*.pem")]
    secrets += [path.read_bytes() for path in (world.place / "home").rglob("vault.key")]
    assert len(secrets) >= 3
    bodies = [max(data.split(b"\n"), key=len) for data in secrets]
    for name in names(good):
        data = (good / name).read_bytes()
        assert b"PRIVATE KEY" not in data, name
        assert not any(body in data for body in bodies), name


def test_the_same_record_gives_the_same_bytes(world):
    one, two = world.made("one"), world.made("two")
    assert one.zipped() == two.zipped()


def test_the_zip_opens_in_one_folder_without_links_and_unzips_with_other_tools(world, tmp_path, plain_path):
    made = world.made()
    path = made.save(tmp_path / "bundle.zip")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for item in archive.infolist():
            assert item.filename.startswith(f"{made.name}/")
            assert ".." not in item.filename
            assert item.external_attr >> 16 == 0o100644
            assert item.date_time == (1980, 1, 1, 0, 0, 0)
        assert [item.filename for item in archive.infolist()] == sorted(archive.namelist())
    subprocess.run([sys.executable, "-m", "zipfile", "-e", path, tmp_path], check=True)
    (tmp_path / "trust.policy").write_text(world.policy.format())
    assert_good(follow(tmp_path / made.name, plain_path))


def test_the_auditor_writes_the_same_bundle(world, tmp_path):
    roots = world.place / "verifier" / "tsa"
    roots.mkdir(exist_ok=True)
    shutil.copy(world.authority, roots / "ca.pem")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_AUDIT_HOME", str(world.place / "verifier"))
        path = AuditableRLHF("model").bundle(world.record, tmp_path / "b.zip", policy=world.policy)
    assert path.read_bytes() == world.made().zipped()


def test_the_trail_that_is_named_must_be_the_records(world, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    with Trail.open(tmp_path / "other", origin="example.org/other"):
        pass
    with pytest.raises(RecordError, match="is not the one that the record stands in"):
        bundle_record(world.record, policy=world.policy, home=tmp_path, trail=tmp_path / "other")


# -- refusing, writing ----------------------------------------------------------------------------------------------


def test_a_record_that_does_not_hold_gets_no_bundle(world, tmp_path):
    path = tmp_path / "record.ipynb"
    path.write_bytes(world.record.read_bytes().replace(b"# A title", b"# B title"))
    with pytest.raises(RefusedRecordError, match=r"INVALID.*cells\[0\]\.source") as refused:
        bundle_record(path, policy=world.policy, home=tmp_path)
    assert refused.value.verdict.level is Level.INVALID
    assert refused.value.exit_code == 40


def test_a_folder_that_is_not_empty_is_left_as_it_is(world, tmp_path):
    made = world.made()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    with pytest.raises(ReportError, match="the folder is not empty"):
        made.save(tmp_path / "there")
    assert names(tmp_path) == ["there/mine"]
    with pytest.raises(ReportError, match="cannot be written"):
        made.save(tmp_path / "no" / "such" / "bundle.zip")
    assert names(tmp_path) == ["there/mine"]


# -- with the tool --------------------------------------------------------------------------------------------------


def verified(world: World, target: Path, home: Path):
    return verify_bundle(target, policy=world.policy, home=home, tsa_roots=[world.authority.read_bytes()])


def test_the_tool_verifies_a_folder_and_a_zip_as_it_does_the_record(world, good, tmp_path):
    path = world.made().save(tmp_path / "b.zip")
    wanted = open_record(world.record, policy=world.policy, home=tmp_path, tsa_roots=[world.authority.read_bytes()])
    for target in (good, path):
        found = verified(world, target, tmp_path)
        assert found.verdict == wanted.verdict
        assert found.verdict.level is Level.COSIGNED
        assert [note.where for note in found.notes if note.code in ("page", "stray-file")] == []


def test_the_tool_names_each_changed_missing_or_stray_file(world, good, tmp_path):
    for name in names(good):
        folder = tmp_path / "bundle"
        shutil.copytree(good, folder)
        flip(folder / name, place_in(folder / name))
        found = verified(world, folder, tmp_path / "home").verdict
        assert found.level is Level.INVALID, name
        where = {reason.where for reason in found.reasons}
        assert where & {name, "tile", "cells[0].source", *(names(good) if name == SUMS else ())}, (name, where)
        shutil.rmtree(folder)
    shutil.copytree(good, tmp_path / "bundle")
    (tmp_path / "bundle" / "entries" / "000002.json").write_text("{}")
    (tmp_path / "bundle" / "checkpoint").unlink()
    (tmp_path / "bundle" / "trust.policy").write_text("quorum none\n")
    found = verified(world, tmp_path / "bundle", tmp_path / "home").verdict
    reasons = {(reason.code, reason.where) for reason in found.reasons}
    assert {("missing-file", "checkpoint"), ("stray-file", "entries/000002.json")} <= reasons


def test_the_tool_tells_a_page_that_it_would_not_draw(world, good, tmp_path):
    shutil.copytree(good, tmp_path / "bundle")
    flip(tmp_path / "bundle" / "report.html", 5000)
    resummed(tmp_path / "bundle")
    found = verified(world, tmp_path / "bundle", tmp_path / "home")
    assert found.verdict.level is Level.COSIGNED
    assert [(note.code, note.where) for note in found.notes if note.code == "page"] == [("page", "report.html")]


def rezipped(path: Path, items: list[tuple[str, bytes, int]]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data, mode in items:
            item = zipfile.ZipInfo(name)
            item.external_attr = mode << 16
            archive.writestr(item, data)
    return path


@pytest.mark.parametrize(
    ("name", "mode"),
    [("../out", 0o100644), ("/etc/out", 0o100644), ("a/../../out", 0o100644), ("a\\b", 0o100644), ("C:/out", 0o100644),
     ("link", 0o120777)],
)  # fmt: skip
def test_a_zip_that_leads_out_of_its_folder_is_not_opened(world, good, tmp_path, name, mode):
    items = [(f"r/{path}", (good / path).read_bytes(), 0o100644) for path in names(good)]
    path = rezipped(tmp_path / "evil.zip", [*items, (name, b"/etc/passwd", mode)])
    with pytest.raises(RecordError, match="cannot be read"):
        verified(world, path, tmp_path)


def test_a_zip_whose_decoder_or_name_is_broken_is_one_clear_sentence(world, tmp_path):
    path = tmp_path / "packed.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("r/record.ipynb", bytes(range(256)) * 16)
    packed = bytearray(path.read_bytes())
    packed[60:70] = b"\xff" * 10
    path.write_bytes(packed)
    with pytest.raises(RecordError, match="not a whole zip"):
        verified(world, path, tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("r/\u00e9", b"")
    path.write_bytes(path.read_bytes().replace("\u00e9".encode(), b"\xc3("))
    with pytest.raises(RecordError, match="not a whole zip"):
        verified(world, path, tmp_path)


@pytest.mark.parametrize(
    "name", ["a\nINVALID", "a\x1b[2J", "\u202etxt.a", "\udcff"], ids=["line", "terminal", "turn", "bytes"]
)
def test_a_bundle_with_a_name_that_cannot_be_shown_is_not_opened(world, good, tmp_path, name):
    shutil.copytree(good, tmp_path / "bundle")
    (tmp_path / "bundle" / name).write_bytes(b"")
    with pytest.raises(RecordError, match="can be shown"):
        verified(world, tmp_path / "bundle", tmp_path)
    if name != "\udcff":  # which no zip can hold
        path = rezipped(tmp_path / "evil.zip", [("r/record.ipynb", b"", 0o100644), (f"r/{name}", b"", 0o100644)])
        with pytest.raises(RecordError, match="can be shown"):
            verified(world, path, tmp_path)


def test_a_zip_with_a_file_twice_is_not_opened(world, good, tmp_path):
    items = [(f"r/{path}", (good / path).read_bytes(), 0o100644) for path in names(good)]
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = rezipped(tmp_path / "twice.zip", [*items, ("r/record.ipynb", b"{}", 0o100644)])
    with pytest.raises(RecordError, match="stands twice"):
        verified(world, path, tmp_path)
    path = rezipped(tmp_path / "case.zip", [*items, ("r/RECORD.ipynb", b"{}", 0o100644)])
    with pytest.raises(RecordError, match="stands twice"):
        verified(world, path, tmp_path)


def test_a_zip_that_is_cut_or_none_is_one_clear_sentence(world, good, tmp_path):
    whole = world.made().zipped()
    for data in (b"", b"PK", whole[: len(whole) // 2], whole[:-40]):
        (tmp_path / "cut.zip").write_bytes(data)
        with pytest.raises(RecordError, match="not a whole zip"):
            verified(world, tmp_path / "cut.zip", tmp_path)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "record.ipynb").symlink_to(good / "record.ipynb")
    with pytest.raises(RecordError, match="is a link"):
        verified(world, tmp_path / "bundle", tmp_path)
