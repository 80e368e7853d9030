"""A record is COSIGNED or TIMESTAMPED by what others said of its trail after it was sealed, and only by that."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import nbformat
import pytest
from support.listening import listening
from support.tsa import Authority, serve

from rlhf_audit_nb import cli
from rlhf_audit_nb.errors import AuditError, RecordError
from rlhf_audit_nb.records import open_record, read_record
from rlhf_audit_nb.records.anchoring import anchor_record
from rlhf_audit_nb.records.session import Outcome, RecordSession
from rlhf_audit_nb.trail import Level, Trail, TrailReader, TrustPolicy
from rlhf_audit_nb.trail.anchoring import anchor_trail
from rlhf_audit_nb.trail.keys import load_keys
from rlhf_audit_nb.trail.note import parse_note, sign_note
from rlhf_audit_nb.trail.rotation import rotate_key
from rlhf_audit_nb.trail.witness import Witness

if TYPE_CHECKING:
    from pathlib import Path

ORIGIN = "example.org/anchored"
PLACE = "metadata.rlhf_audit.anchors"


def sealed(folder: Path, path: Path, text: str = "text") -> Path:
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text, id="a")])
    session = RecordSession.begin(nb, {"name": "k", "language": "r", "display_name": "K"}, folder)
    try:
        session.seal(nb, Outcome("completed"))
    finally:
        session.close()
    path.write_text(nbformat.writes(nb), encoding="utf-8")
    return path


def grow(folder: Path, count: int, *roles: str) -> None:
    with Trail.open(folder) as trail:
        for number in range(count):
            trail.append("a.b", b'{"n":%d}' % number)
        trail.flush()
        for role in roles:
            rotate_key(trail, role)


@dataclass
class World:
    """A trail with three records and, after each, anchors: the second's after the log's key was replaced."""

    folder: Path
    home: Path
    first: str
    policy: TrustPolicy
    roots: tuple[bytes, ...]
    records: tuple[Path, ...]

    def record(self, number: int, place: Path) -> Path:
        """A copy of a record, to be changed."""
        copy = place / f"{number}.ipynb"
        shutil.copy(self.records[number], copy)
        return copy

    def opened(self, path: Path | dict, verifier: Path, policy: TrustPolicy | None = None, roots=None):
        data = json.dumps(path).encode() if isinstance(path, dict) else path.read_bytes()
        roots = self.roots if roots is None else roots
        return read_record(data, policy=policy or self.policy, home=verifier, tsa_roots=roots)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    place = tmp_path_factory.mktemp("anchored")
    folder, home = place / "audit", place / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_AUDIT_HOME", str(home))
        for name in ("RLHF_AUDIT_TRAIL", "RLHF_AUDIT_PASSPHRASE"):
            patch.delenv(name, raising=False)
        with Trail.open(folder, origin=ORIGIN) as trail:
            first = trail.log_vkey
        witness = Witness.create(place / "alice", "witness.example/alice")
        witness.add_log(first)
        authority = Authority.make(place / "tsa")
        authority.certify()
        key = witness.vkeys[0]
        policy = TrustPolicy.parse(f"log {first}\nwitness alice {key}\nquorum alice\n")
        records = [sealed(folder, place / "zero.ipynb")]
        grow(folder, 5)
        with listening(witness) as url, serve(authority.answer) as stamping:
            asking = TrustPolicy.parse(f"log {first}\nwitness alice {key} {url}\nquorum alice\n")
            anchor_trail(folder, policy=asking, authorities=[stamping.url], tsa_roots=[authority.pem])
            records.append(sealed(folder, place / "one.ipynb"))
            grow(folder, 3, "log")
            grow(folder, 2)
            with Trail.open(folder) as trail:
                witness.add_log(trail.log_vkey)
            done = anchor_trail(folder, policy=asking, tsa_roots=[authority.pem])
            assert done.complete, done
        records.append(sealed(folder, place / "two.ipynb"))
        yield World(folder, home, first, policy, (authority.pem,), tuple(records))


@pytest.fixture
def anchored(world, tmp_path):
    """The first record with all that was said of it, as it is put into it from the trail's folder."""
    path = world.record(0, tmp_path)
    anchor_record(path, trail=world.folder, policy=world.policy, tsa_roots=world.roots, home=tmp_path / "h")
    return path


def anchors_of(nb: dict) -> list:
    return nb["metadata"]["rlhf_audit"]["anchors"]


def faults(found):
    return [(reason.code, reason.where) for reason in found.verdict.reasons]


def test_a_record_is_cosigned_by_what_came_after_it(world, anchored, tmp_path):
    before = world.opened(world.records[0], tmp_path / "v")
    assert (before.verdict.level, faults(before)[0][0], before.verdict.anchors) == (Level.UNANCHORED, "quorum", ())
    found = world.opened(anchored, tmp_path / "v")
    assert (found.verdict.level, found.verdict.reasons) == (Level.COSIGNED, ())
    assert {anchor.kind for anchor in found.verdict.anchors} == {"cosignature", "timestamp"}
    assert all(anchor.size >= found.verdict.size and anchor.time > 0 for anchor in found.verdict.anchors)
    assert found.verdict.exit_code() == 0
    assert found.metadata["version"] == 2


def test_the_file_alone_is_enough_elsewhere(world, anchored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "elsewhere"))
    found = open_record(anchored, policy=world.policy, tsa_roots=world.roots)
    assert found.verdict.level is Level.COSIGNED


def test_a_timestamp_alone_makes_it_timestamped(world, anchored, tmp_path):
    nobody = TrustPolicy.of(world.first)
    found = world.opened(anchored, tmp_path / "v", nobody)
    assert found.verdict.level is Level.TIMESTAMPED
    assert "anchor-unknown" in [note.code for note in found.notes]  # of a witness that this policy does not name
    untrusted = world.opened(anchored, tmp_path / "w", nobody, roots=())
    assert untrusted.verdict.level is Level.UNANCHORED
    assert untrusted.verdict.reasons == ()
    assert "tsa-unknown" in [note.code for note in untrusted.notes]


def test_openssl_verifies_the_timestamp_over_the_logs_own_lines(world, anchored, tmp_path):
    (anchor,) = anchors_of(json.loads(anchored.read_bytes()))
    text, _, lines = anchor["checkpoint"].rpartition("\n\n")
    own = "".join(f"{line}\n" for line in lines.splitlines() if line.startswith(f"— {ORIGIN} "))
    (tmp_path / "note").write_text(f"{text}\n\n{own}", encoding="utf-8")
    (tmp_path / "token.tsr").write_bytes(base64.b64decode(anchor["timestamps"][0]))
    (tmp_path / "ca.pem").write_bytes(world.roots[0])
    command = ["openssl", "ts", "-verify", "-data", "note", "-in", "token.tsr", "-CAfile", "ca.pem"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Verification: OK" in done.stdout, done.stderr


def test_a_later_key_counts_by_the_rotation_that_the_anchor_carries(world, tmp_path):
    """The witness saw the trail only after its log key was replaced; the policy lists the first key alone."""
    path = world.record(1, tmp_path)
    anchor_record(path, trail=world.folder, policy=world.policy, tsa_roots=world.roots, home=tmp_path / "h")
    nb = json.loads(path.read_bytes())
    (anchor,) = anchors_of(nb)
    assert [json.loads(base64.b64decode(item["data"]))["type"] for item in anchor["keys"]] == ["key.rotated"]
    assert world.opened(path, tmp_path / "v").verdict.level is Level.COSIGNED
    del anchor["keys"]
    found = world.opened(nb, tmp_path / "v")
    assert (found.verdict.level, faults(found)) == (Level.INVALID, [("unsigned", f"{PLACE}[0].checkpoint")])
    # Whoever lists the newer key needs no rotation.
    newer = next(line for line in parse_note(anchor["checkpoint"]).signatures if line.name == ORIGIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_AUDIT_HOME", str(world.home))
        with Trail.open(world.folder) as trail:
            vkey = trail.log_vkey
    assert newer.key_id.hex() in vkey
    both = TrustPolicy.parse(world.policy.format().replace("witness alice", f"log {vkey}\nwitness alice", 1))
    assert world.opened(nb, tmp_path / "w", both).verdict.level is Level.COSIGNED


def test_anchoring_again_adds_nothing_and_asks_nobody(world, anchored, tmp_path):
    before = anchored.read_bytes()
    done = anchor_record(anchored, trail=world.folder, policy=world.policy, tsa_roots=world.roots, home=tmp_path / "h")
    assert (done.added, done.asked, anchored.read_bytes()) == (0, None, before)


def test_nothing_but_the_seals_anchors_changes_in_the_file(world, anchored):
    before, after = (json.loads(path.read_bytes()) for path in (world.records[0], anchored))
    del after["metadata"]["rlhf_audit"]["anchors"]
    assert before == after


def test_where_nobody_has_said_anything_the_error_says_whom_to_ask(world, tmp_path):
    path = world.record(2, tmp_path)
    with pytest.raises(RecordError, match=r"Nobody has said anything.*--tsa URL") as caught:
        anchor_record(path, trail=world.folder, policy=world.policy, tsa_roots=world.roots, home=tmp_path / "h")
    assert caught.value.reason == "nobody"
    assert path.read_bytes() == world.records[2].read_bytes()


def test_a_record_without_its_trail_cannot_be_anchored(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecordError, match=r"is not in .*--trail"):
        anchor_record(world.record(0, tmp_path), policy=world.policy, tsa_roots=(), home=tmp_path / "h")


def test_a_trail_that_is_another_history_gives_no_anchors(world, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    with Trail.open(tmp_path / "other", origin=ORIGIN):
        pass
    grow(tmp_path / "other", 40)
    with pytest.raises(AuditError) as caught:
        anchor_record(
            world.record(0, tmp_path), trail=tmp_path / "other", policy=world.policy, tsa_roots=(), home=tmp_path / "h"
        )
    assert caught.value.reason == "diverged"


# -- what a forger tries ----------------------------------------------------------------------------------------


def flip(text: str, at: int) -> str:
    return text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]


def broken(anchor: dict, name: str) -> None:
    """Changes the signature of ``name`` on the checkpoint."""
    line = line_of(anchor["checkpoint"], name)
    anchor["checkpoint"] = anchor["checkpoint"].replace(line, flip(line, len(line) - 20))


def line_of(note: str, name: str) -> str:
    return next(line for line in note.splitlines() if line.startswith(f"— {name} "))


FORGERIES = {
    "another root": (lambda a: a.update(checkpoint=flip(a["checkpoint"], len(ORIGIN) + 6)), "signature", "checkpoint"),
    "a changed signature of the log": (lambda a: broken(a, ORIGIN), "signature", "checkpoint"),
    "a changed signature of the witness": (lambda a: broken(a, "witness.example/alice"), "signature", "checkpoint"),
    "no signature of the log": (
        lambda a: a.update(checkpoint=a["checkpoint"].replace(line_of(a["checkpoint"], ORIGIN) + "\n", "")),
        "unsigned",
        "checkpoint",
    ),
    "no checkpoint": (lambda a: a.update(checkpoint="x"), "note", "checkpoint"),
    "a hash of the proof": (
        lambda a: a["consistency"].__setitem__(0, base64.b64encode(bytes(32)).decode()),
        "anchor-consistency",
        "consistency",
    ),
    "no proof": (lambda a: a.update(consistency=[]), "anchor-consistency", "consistency"),
    "a hash of 31 bytes": (
        lambda a: a["consistency"].__setitem__(0, base64.b64encode(bytes(31)).decode()),
        "malformed-seal",
        "consistency[0]",
    ),
    "a key that the format does not have": (lambda a: a.update(comment="x"), "malformed-seal", ""),
    "a timestamp of something else": (
        lambda a: a.update(checkpoint=a["checkpoint"] + line_of(a["checkpoint"], ORIGIN) + "\n"),
        "signature",
        "checkpoint",
    ),
    "a timestamp that is none": (lambda a: a["timestamps"].append("AAAA"), "timestamp", "timestamps[1]"),
    "timestamps in great number": (lambda a: a.update(timestamps=a["timestamps"] * 17), "malformed-seal", "timestamps"),
    "an empty list of keys": (lambda a: a.update(keys=[]), "malformed-seal", "keys"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_anchor_makes_the_record_invalid_and_is_named(world, anchored, tmp_path, name):
    forge, code, where = FORGERIES[name]
    nb = json.loads(anchored.read_bytes())
    forge(anchors_of(nb)[0])
    found = world.opened(nb, tmp_path / "v")
    assert found.verdict.level is Level.INVALID
    assert (code, f"{PLACE}[0].{where}".rstrip(".")) in faults(found), faults(found)


def test_an_anchor_of_another_record_of_the_same_trail_fits_only_with_its_own_proof(world, anchored, tmp_path):
    """Anchors are of the trail: the second record's fits the first with another proof, and not with its own."""
    path = world.record(1, tmp_path)
    anchor_record(path, trail=world.folder, policy=world.policy, tsa_roots=world.roots, home=tmp_path / "h")
    nb, other = json.loads(world.records[0].read_bytes()), json.loads(path.read_bytes())
    nb["metadata"]["rlhf_audit"].update(anchors=anchors_of(other), version=2)
    assert faults(world.opened(nb, tmp_path / "v")) == [("anchor-consistency", f"{PLACE}[0].consistency")]
    nb["metadata"]["rlhf_audit"].update(anchors=anchors_of(json.loads(anchored.read_bytes())), version=2)
    newer = json.loads(path.read_bytes())
    newer["metadata"]["rlhf_audit"]["anchors"] = anchors_of(nb)
    assert faults(world.opened(newer, tmp_path / "v")) == [("anchor-size", f"{PLACE}[0].checkpoint")]


def test_an_anchor_of_another_trail_is_refused(world, anchored, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    with Trail.open(tmp_path / "other", origin="example.org/other"):
        pass
    grow(tmp_path / "other", 40)
    nb = json.loads(anchored.read_bytes())
    anchors_of(nb)[0].update(checkpoint=TrailReader.open(tmp_path / "other").checkpoint(), timestamps=[])
    assert faults(world.opened(nb, tmp_path / "v")) == [("anchor-origin", f"{PLACE}[0].checkpoint")]


def test_anchors_that_stand_twice_or_out_of_order_are_refused(world, anchored, tmp_path):
    nb = json.loads(anchored.read_bytes())
    anchors_of(nb).append(anchors_of(nb)[0])
    assert faults(world.opened(nb, tmp_path / "v")) == [("anchor-order", f"{PLACE}[1].checkpoint")]
    anchors_of(nb)[1:] = anchors_of(nb) * 101
    assert faults(world.opened(nb, tmp_path / "v")) == [("malformed-seal", PLACE)]


def test_another_root_of_the_records_own_size_signed_by_the_log_is_a_divergence(world, tmp_path):
    """Whoever has the log's key signs another history: an anchor brings it to light, and both heads are kept."""
    from rlhf_audit_nb.trail.key_files import read_retired

    assert read_retired is not None
    nb = json.loads(world.records[2].read_bytes())
    note = nb["metadata"]["rlhf_audit"]["checkpoint"]
    size = note.splitlines()[1]
    forged = f"{ORIGIN}\n{size}\n{base64.b64encode(b'x' * 32).decode()}\n"
    signed = sign_note(forged, [load_keys(world.home, ORIGIN).signer])
    nb["metadata"]["rlhf_audit"].update(
        anchors=[{"checkpoint": signed, "consistency": [], "timestamps": []}], version=2
    )
    found = world.opened(nb, tmp_path / "v")
    assert (found.verdict.level, faults(found)) == (Level.DIVERGED, [("anchor-fork", f"{PLACE}[0].checkpoint")])
    kept = {path.read_text() for path in (tmp_path / "v").rglob("*.checkpoint")}
    assert kept >= {note, signed}


def test_cosignatures_on_the_records_own_checkpoint_stand_in_an_anchor_of_its_size(world, tmp_path):
    """In the checkpoint of the seal itself they would be a change; the same note as an anchor makes it COSIGNED."""
    path = world.record(2, tmp_path)
    with listening_again(world) as asking:
        done = anchor_record(path, trail=world.folder, policy=asking, home=tmp_path / "h", tsa_roots=world.roots)
    assert done.asked.complete
    nb = json.loads(path.read_bytes())
    (anchor,) = anchors_of(nb)
    assert (anchor["consistency"], done.opened.verdict.level) == ([], Level.COSIGNED)
    del nb["metadata"]["rlhf_audit"]["anchors"]
    nb["metadata"]["rlhf_audit"]["checkpoint"] = anchor["checkpoint"]
    assert world.opened(nb, tmp_path / "v").verdict.level is Level.INVALID


@contextmanager
def listening_again(world):
    witness = Witness.open(world.folder.parent / "alice")
    with listening(witness) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_AUDIT_HOME", str(world.home))
        text = f"log {world.first}\nwitness alice {witness.vkeys[0]} {url}\nquorum alice\n"
        yield TrustPolicy.parse(text)


def test_the_command_puts_what_is_there_into_the_record(world, tmp_path, capsys):
    path = world.record(0, tmp_path)
    (tmp_path / "trust.policy").write_text(world.policy.format())
    (tmp_path / "ca.pem").write_bytes(world.roots[0])
    words = ["anchor", str(path), "--trail", str(world.folder), "--policy", str(tmp_path / "trust.policy")]
    words += ["--tsa-ca", str(tmp_path / "ca.pem")]
    assert cli.main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["level"], answer["added"], answer["asked"]) == ("COSIGNED", 1, None)
    assert {anchor["kind"] for anchor in answer["anchors"]} == {"cosignature", "timestamp"}
    assert cli.main(words) == 0
    assert "It had all of this before." in capsys.readouterr().out
    assert cli.main(["verify", str(path), *words[4:], "--require", "COSIGNED"]) == 0
    assert "timestamped by CN=Local test tsa" in capsys.readouterr().out
    assert cli.main([*words, "--prepare"]) == 2
