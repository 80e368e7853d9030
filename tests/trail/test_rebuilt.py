"""The key-holder rebuilds the whole trail and signs it again: who finds out, and what is said where nobody can."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from support.tsa import Authority

from rlhf_audit_nb.trail import Level, Trail, TrailReader, TrustPolicy, verify_trail
from rlhf_audit_nb.trail.anchors import AnchorFolder
from rlhf_audit_nb.trail.evidence import Outcome, compare_heads, signed_head
from rlhf_audit_nb.trail.note import parse_vkey
from rlhf_audit_nb.trail.published import verify_published
from rlhf_audit_nb.trail.submission import format_submission, submission_of
from rlhf_audit_nb.trail.tiles import publish_tiles
from rlhf_audit_nb.trail.witness import Witness

ORIGIN = "example.com/team"


def grow(folder: Path, size: int, secret: bytes = b"yes") -> str:
    with Trail.open(folder, origin=ORIGIN) as trail:
        for number in range(trail.reader().size, size):
            trail.append("a.b", b'{"n":%d,"answer":"%b"}' % (number, secret))
        trail.flush()
        return trail.log_vkey


@pytest.fixture
def vkey(folder):
    return grow(folder, 300)


def rebuild(folder: Path, size: int = 300, *, anchors: bool) -> None:
    """Another history under the same key; its maker has thrown away what he remembered himself."""
    kept = folder.with_name("kept")
    if anchors:
        shutil.move(folder / "anchors", kept)
    shutil.rmtree(folder)
    shutil.rmtree(Path(os.environ["RLHF_AUDIT_HOME"]) / "heads")
    grow(folder, size, b"no!")
    if anchors:
        shutil.move(kept, folder / "anchors")


def found(folder: Path, **options) -> tuple[Level, list[str]]:
    verdict = verify_trail(folder, **options)
    codes = [reason.code for reason in verdict.reasons]
    publish_tiles(folder, folder.with_name("www"))
    published = verify_published(folder.with_name("www"), **options)
    assert (published.level, [reason.code for reason in published.reasons]) == (verdict.level, codes)
    return verdict.level, codes


def witnessed(folder: Path, tmp_path: Path, vkey: str) -> TrustPolicy:
    """The trail, cosigned by somebody else."""
    witness = Witness.create(tmp_path / "alice", "witness.example/alice")
    witness.add_log(vkey)
    note = TrailReader.open(folder).checkpoint()
    reply = witness.add_checkpoint(format_submission(submission_of(note, 0, lambda *_: [])))
    AnchorFolder(folder).cosign(note + reply.body.decode())
    return TrustPolicy.parse(f"log {vkey}\nwitness alice {witness.vkeys[0]}\nquorum alice\n")


def test_without_any_memory_elsewhere_nobody_can_tell_and_the_words_say_so(folder, vkey, command):
    rebuild(folder, anchors=False)
    assert found(folder) == (Level.UNANCHORED, [])
    done = subprocess.run([*command, "verify", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0
    words = " ".join(done.stdout.split())
    assert words.startswith("UNANCHORED")
    assert "it does not show that the key-holder has not rewritten all of it" in words
    required = subprocess.run([*command, "verify", str(folder), "--require", "TIMESTAMPED"], capture_output=True)
    assert required.returncode == 10


@pytest.mark.parametrize(("size", "code"), [(300, "fork"), (400, "fork"), (200, "rollback")])
def test_whoever_has_seen_it_before_finds_out(folder, vkey, tmp_path, size, code):
    policy, elsewhere = TrustPolicy.of(vkey), tmp_path / "auditor"
    assert verify_trail(folder, policy=policy, home=elsewhere).level is Level.UNANCHORED
    first = TrailReader.open(folder).checkpoint()
    rebuild(folder, size, anchors=False)
    verdict = verify_trail(folder, policy=policy, home=elsewhere)
    assert (verdict.level, [reason.code for reason in verdict.reasons]) == (Level.DIVERGED, [code])
    assert verdict.exit_code() == 30
    kept = [path.read_text() for path in (elsewhere / "heads").glob("*.diverged/*")]
    assert sorted(kept) == sorted([first, TrailReader.open(folder).checkpoint()])
    # The evidence speaks for itself: another person needs the two files, the log's key and, for two sizes, a trail.
    heads = [signed_head(note, lambda _: [parse_vkey(vkey)]) for note in kept]
    outcome = compare_heads(*heads, TrailReader.open(folder)).outcome
    assert outcome is (Outcome.UNDECIDED if code == "rollback" else Outcome.CONTRADICTORY)


@pytest.mark.parametrize(("size", "code"), [(300, "anchor-fork"), (400, "anchor-fork"), (200, "rollback")])
def test_a_witness_finds_out(folder, vkey, tmp_path, size, code):
    policy = witnessed(folder, tmp_path, vkey)
    assert found(folder, policy=policy) == (Level.COSIGNED, [])
    shutil.rmtree(folder.with_name("www"))
    rebuild(folder, size, anchors=True)
    verdict = verify_trail(folder, policy=policy)
    assert verdict.level is Level.DIVERGED
    assert code in [reason.code for reason in verdict.reasons]
    assert [reason.where for reason in verdict.reasons if reason.code == code] == ["anchors/300.cosigned"]
    if size >= 300:  # what is published takes along the anchors of what is published
        found(folder, policy=policy)


def test_a_timestamp_finds_out(folder, vkey, tmp_path):
    authority = Authority.make(tmp_path / "tsa")
    authority.certify()
    anchors = AnchorFolder(folder)
    note = anchors.keep(TrailReader.open(folder).checkpoint())
    anchors.stamp(300, "local", authority.stamp(note))
    assert found(folder, tsa_roots=[authority.pem]) == (Level.TIMESTAMPED, [])
    shutil.rmtree(folder.with_name("www"))
    rebuild(folder, anchors=True)
    assert found(folder, tsa_roots=[authority.pem]) == (Level.DIVERGED, ["anchor-fork"])


def test_a_rebuilt_trail_whose_anchors_were_thrown_away_lacks_what_the_policy_asks_for(folder, vkey, tmp_path):
    policy = witnessed(folder, tmp_path, vkey)
    rebuild(folder, anchors=False)
    verdict = verify_trail(folder, policy=policy)
    assert verdict.level is Level.UNANCHORED
    assert [reason.code for reason in verdict.reasons] == ["quorum"]
    assert verdict.exit_code() == 10


def test_a_rebuilt_trail_cannot_be_cosigned_and_a_later_timestamp_is_later(folder, vkey, tmp_path):
    witnessed(folder, tmp_path, vkey)
    witness = Witness.open(tmp_path / "alice")
    rebuild(folder, 320, anchors=False)
    reader = TrailReader.open(folder)
    asked = submission_of(reader.checkpoint(), witness.size(ORIGIN), reader.consistency_proof)
    assert witness.add_checkpoint(format_submission(asked)).status == 422
    assert len(witness.evidence()) == 2
    authority = Authority.make(tmp_path / "tsa")
    authority.certify()
    before = int(time.time())
    anchors = AnchorFolder(folder)
    anchors.stamp(320, "local", authority.stamp(anchors.keep(reader.checkpoint())))
    verdict = verify_trail(folder, tsa_roots=[authority.pem])
    # A timestamp stops back-dating, not forks: the second history is stamped too, and dated after it was made.
    assert verdict.level is Level.TIMESTAMPED
    assert verdict.anchors[0].time >= before


def test_evidence_is_checked_by_a_command(folder, vkey, tmp_path, command):
    (tmp_path / "first").write_text(TrailReader.open(folder).checkpoint())
    rebuild(folder, anchors=False)
    (tmp_path / "second").write_text(TrailReader.open(folder).checkpoint())
    grow(folder, 310, b"no!")
    (tmp_path / "third").write_text(TrailReader.open(folder).checkpoint())

    def judged(one: str, other: str, *options: str) -> tuple[int, str]:
        asked = [*command, "witness", "evidence", one, other, *options, "--json"]
        done = subprocess.run(asked, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, json.loads(done.stdout).get("outcome")

    assert judged("first", "second") == (30, "contradictory")
    assert judged("first", "second", "--log", vkey) == (30, "contradictory")
    assert judged("first", "third") == (10, "undecided")
    assert judged("first", "third", "--trail", str(folder)) == (30, "contradictory")
    assert judged("second", "third", "--trail", str(folder)) == (0, "consistent")
    assert judged("second", "second") == (0, "consistent")
    other = Witness.create(tmp_path / "w", "witness.example/w")
    assert judged("first", "second", "--log", other.vkeys[0])[0] == 3
    assert judged("first", "nowhere")[0] == 2
