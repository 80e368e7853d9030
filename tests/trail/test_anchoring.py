"""Anchoring: whoever is named is asked, what comes is verified before it is kept, and a fork leaves its evidence."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import witness_log
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.tsa import Authority, serve
from support.witnesses import Log, b64, tree

from rlhf_audit_nb.errors import AnchorError, ConfigError, KeyFileError, StoreError
from rlhf_audit_nb.trail import Level, Trail, TrailReader, TrustPolicy, verify_trail
from rlhf_audit_nb.trail.anchoring import add_anchor, anchor_trail, keep_checkpoint, request_cosignature
from rlhf_audit_nb.trail.anchors import AnchorFolder
from rlhf_audit_nb.trail.cosignature import CosignerEd25519
from rlhf_audit_nb.trail.note import format_vkey, parse_note
from rlhf_audit_nb.trail.rotation import rotate_key
from rlhf_audit_nb.trail.tile_reader import PublishedTree
from rlhf_audit_nb.trail.tiles import publish_tiles
from rlhf_audit_nb.trail.witness import Reply, Witness
from rlhf_audit_nb.trail.witness_server import WitnessServer


def grow(folder, size: int, **options) -> str:
    """A trail of ``size`` entries; its log key."""
    with Trail.open(folder, origin="example.com/team", **options) as trail:
        for number in range(trail.reader().size, size):
            trail.append("a.b", b'{"n":%d}' % number)
        trail.flush()
        return trail.log_vkey


@contextmanager
def listening(witness):
    server = WitnessServer(witness)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.stop()
        thread.join(20)


def make_witness(tmp_path, name: str, *vkeys: str, mldsa: bool = False) -> Witness:
    made = Witness.create(tmp_path / name, f"witness.example/{name}", mldsa=mldsa)
    for vkey in vkeys:
        made.add_log(vkey)
    return made


def policy_of(vkey: str, *witnesses: tuple[str, str, str], quorum: str = "all") -> TrustPolicy:
    lines = [f"log {vkey}", *(f"witness {name} {key} {url}" for name, key, url in witnesses)]
    names = " ".join(name for name, _, _ in witnesses)
    lines += [f"group many {quorum} {names}", "quorum many"] if witnesses else ["quorum none"]
    return TrustPolicy.parse("\n".join(lines) + "\n")


@pytest.fixture
def alice(tmp_path, folder):
    """A trail of 5 entries, a witness that knows it and listens, and the policy that names it."""
    vkey = grow(folder, 5)
    witness = make_witness(tmp_path, "alice", vkey)
    with listening(witness) as url:
        yield witness, policy_of(vkey, ("alice", witness.vkeys[0], url)), url


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    made = Authority.make(tmp_path_factory.mktemp("tsa") / "one")
    made.certify()
    return made


def test_a_growing_trail_is_cosigned_and_verifies_as_such(folder, alice):
    witness, policy, url = alice
    for size in (5, 255, 257):
        grow(folder, size)
        assert verify_trail(folder, policy=policy).level is Level.UNANCHORED
        done = anchor_trail(folder, policy=policy)
        assert (done.level, done.quorum, done.size, done.exit_code) == (Level.COSIGNED, True, size, 0)
        assert [(item.whom, item.outcome) for item in done.asked] == [(url, "given")]
        verdict = verify_trail(folder, policy=policy)
        assert (verdict.level, verdict.size) == (Level.COSIGNED, size)
    assert witness.size("example.com/team") == 257
    assert [anchor.size for anchor in verdict.anchors] == [5, 255, 257]


def test_what_came_is_not_asked_for_again(folder, alice):
    witness, policy, _ = alice
    first = anchor_trail(folder, policy=policy)
    (witness.folder / "state.sqlite").unlink()
    again = anchor_trail(folder, policy=policy)
    assert [item.outcome for item in again.asked] == ["kept"]
    assert (again.level, again.asked[0].time) == (first.level, first.asked[0].time)


def test_a_trail_that_forgot_what_was_cosigned_learns_it_from_the_witness(folder, alice):
    _, policy, _ = alice
    anchor_trail(folder, policy=policy)
    shutil.rmtree(folder / "anchors")
    grow(folder, 9)
    assert anchor_trail(folder, policy=policy).complete


def test_a_quorum_is_reached_without_those_that_it_does_not_need(tmp_path, folder, alice):
    witness, policy, url = alice
    vkey = policy.log_keys[0]
    gone = make_witness(tmp_path, "gone")
    named = [("alice", witness.vkeys[0], url), ("gone", gone.vkeys[0], "http://127.0.0.1:9/")]
    done = anchor_trail(folder, policy=policy_of(vkey, *named, quorum="any"))
    assert (done.level, done.exit_code) == (Level.COSIGNED, 0)
    assert [item.outcome for item in done.asked] == ["given", "unreachable"]
    done = anchor_trail(folder, policy=policy_of(vkey, *named, quorum="all"))
    assert (done.level, done.quorum, done.exit_code) == (Level.UNANCHORED, False, 3)
    assert [item.outcome for item in done.asked] == ["kept", "unreachable"]


def test_a_witness_with_two_keys_at_one_address_is_asked_once(tmp_path, folder):
    vkey = grow(folder, 5)
    witness = make_witness(tmp_path, "pq", vkey, mldsa=True)
    with listening(witness) as url:
        policy = policy_of(vkey, ("one", witness.vkeys[0], url), ("two", witness.vkeys[1], url))
        done = anchor_trail(folder, policy=policy)
        assert (done.level, len(done.asked)) == (Level.COSIGNED, 1)
    assert verify_trail(folder, policy=policy).level is Level.COSIGNED


def test_only_whom_the_user_names_is_asked(tmp_path, folder, alice):
    witness, policy, url = alice
    bob = make_witness(tmp_path, "bob", policy.log_keys[0])
    with serve(lambda _: (500, {}, b"")) as silent:
        two = policy_of(
            policy.log_keys[0], ("alice", witness.vkeys[0], url), ("bob", bob.vkeys[0], silent.url), quorum="any"
        )
        assert len(anchor_trail(folder, policy=two, witnesses=["alice"]).asked) == 1
        grow(folder, 6)
        assert len(anchor_trail(folder, policy=two, witnesses=[url]).asked) == 1
        assert silent.asked == []
        assert len(anchor_trail(folder, policy=two, witnesses=["alice", "bob"]).asked) == 2
        assert len(silent.asked) == 1


def test_nobody_to_ask_is_said_and_nothing_is_made(folder, monkeypatch):
    vkey = grow(folder, 5)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("nobody was named"))
    for policy in (None, policy_of(vkey)):
        with pytest.raises(ConfigError) as caught:
            anchor_trail(folder, policy=policy)
        assert caught.value.reason == "nobody"
    assert not (folder / "anchors").exists()


@pytest.mark.parametrize(
    ("named", "reason"),
    [({"witnesses": ["bob"]}, "no-witness"), ({"witnesses": ["ftp://x/"]}, "url"), ({"authorities": ["tsa"]}, "url")],
)
def test_a_name_or_an_address_that_is_none_is_refused_before_anybody_is_asked(folder, alice, named, reason):
    _, policy, _ = alice
    with pytest.raises(ConfigError) as caught:
        anchor_trail(folder, policy=policy, **named)
    assert caught.value.reason == reason
    assert not (folder / "anchors").exists()


def test_a_witness_that_the_policy_does_not_name_cannot_be_asked(folder, alice):
    _, policy, url = alice
    with pytest.raises(ConfigError) as caught:
        anchor_trail(folder, policy=policy_of(policy.log_keys[0]), witnesses=[url])
    assert caught.value.reason == "no-witness"
    assert "VKEY" in caught.value.next_step


def test_a_cosignature_by_another_key_is_not_kept(tmp_path, folder, alice):
    _, policy, url = alice
    stranger = make_witness(tmp_path, "stranger")
    done = anchor_trail(folder, policy=policy_of(policy.log_keys[0], ("alice", stranger.vkeys[0], url)))
    assert [item.outcome for item in done.asked] == ["unknown-key"]
    assert AnchorFolder(folder).cosigned(5) is None
    assert done.exit_code == 3


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ((404, {}, b""), "unknown-log"),
        ((403, {}, b""), "unsigned"),
        ((400, {}, b""), "malformed"),
        ((500, {}, b""), "refused"),
        ((302, {"Location": "http://127.0.0.1:9/"}, b""), "refused"),
        ((409, {"Content-Type": "text/plain"}, b"3\n"), "refused"),
        ((409, {"Content-Type": "text/x.tlog.size"}, b"+3\n"), "number"),
        ((200, {}, b""), "unknown-key"),
        ((200, {}, b"nonsense\n"), "unknown-key"),
        ((200, {}, "— witness.example/alice AAAAAAAA\n".encode()), "unknown-key"),
        ((200, {}, b"x" * (2 << 20)), "unreachable"),
    ],
    ids=lambda item: str(item)[:30],
)
def test_what_a_witness_answers_instead_is_named_and_nothing_is_kept(folder, alice, answer, outcome):
    witness, policy, _ = alice
    with serve(lambda _: answer, "text/plain") as served:
        done = anchor_trail(folder, policy=policy_of(policy.log_keys[0], ("alice", witness.vkeys[0], served.url)))
    assert [item.outcome for item in done.asked] == [outcome]
    assert (done.level, done.exit_code) == (Level.UNANCHORED, 3)
    assert AnchorFolder(folder).cosigned(5) is None


def test_a_witness_that_is_always_elsewhere_is_asked_a_few_times_only(folder, alice):
    witness, policy, _ = alice
    sizes = iter([3, 4, 2, 1, 3])
    with serve(lambda _: (409, {"Content-Type": "text/x.tlog.size"}, b"%d\n" % next(sizes))) as served:
        done = anchor_trail(folder, policy=policy_of(policy.log_keys[0], ("alice", witness.vkeys[0], served.url)))
    assert [item.outcome for item in done.asked] == ["stale"]
    assert len(served.asked) == 3


def cosigner(name: str = "witness.example/alice") -> CosignerEd25519:
    return CosignerEd25519(name, Ed25519PrivateKey.generate())


def answering(*cosigners: CosignerEd25519, when: int):
    """A witness without scruples: it cosigns whatever it is sent, dated as it likes."""

    def answer(body: bytes) -> bytes:
        note = parse_note(body.split(b"\n\n", 1)[1])
        return "".join(one.cosign(note, when).format() + "\n" for one in cosigners).encode()

    return answer


def test_what_a_witness_says_for_others_is_not_kept(folder):
    vkey, own, other = grow(folder, 5), cosigner(), cosigner("witness.example/other")
    with serve(answering(other, own, when=int(time.time()))) as served:
        policy = policy_of(vkey, ("alice", format_vkey(own.verifier()), served.url))
        assert anchor_trail(folder, policy=policy).level is Level.COSIGNED
    names = [line.name for line in parse_note(AnchorFolder(folder).cosigned(5)).signatures]
    assert names == ["example.com/team", "witness.example/alice"]


def test_a_cosignature_from_the_future_is_not_kept(folder):
    vkey, own = grow(folder, 5), cosigner()
    with serve(answering(own, when=int(time.time()) + 4000)) as served:
        policy = policy_of(vkey, ("alice", format_vkey(own.verifier()), served.url))
        done = anchor_trail(folder, policy=policy)
    assert [item.outcome for item in done.asked] == ["refused"]
    assert "future" in done.asked[0].message
    assert AnchorFolder(folder).cosigned(5) is None


def test_a_witness_that_answers_a_fork_with_the_size_that_it_was_sent_is_understood(folder):
    """An earlier text of the protocol answers another root of the same size with 409 and that size."""
    vkey, own = grow(folder, 5), cosigner()
    with serve(lambda _: (409, {"Content-Type": "text/x.tlog.size"}, b"5\n")) as served:
        policy = policy_of(vkey, ("alice", format_vkey(own.verifier()), served.url))
        done = anchor_trail(folder, policy=policy)
    assert (done.level, done.exit_code) == (Level.DIVERGED, 30)
    assert "rests on its word" in done.reasons[0].message
    assert len(served.asked) == 2


def test_a_witness_that_contradicts_itself_makes_no_trail_look_forked(folder, alice):
    witness, policy, _ = alice
    anchor_trail(folder, policy=policy)
    grow(folder, 9)
    # It refuses what is right, and shows a head of this very history.
    witness.add_checkpoint = lambda _: Reply(422, "text/plain", b"", "no")
    done = anchor_trail(folder, policy=policy)
    assert [item.outcome for item in done.asked] == ["refused"]
    assert (done.level, done.exit_code) == (Level.UNANCHORED, 3)
    assert not list((home_now() / "heads").glob("*.diverged"))


def test_a_damaged_store_is_not_taken_for_a_fork_and_is_not_anchored(folder, alice):
    _, policy, _ = alice
    anchor_trail(folder, policy=policy)
    grow(folder, 9)
    with closing(sqlite3.connect(folder / "trail.sqlite")) as store, store:
        (hashes,) = store.execute("SELECT hashes FROM bundles WHERE first = 0").fetchone()
        store.execute("UPDATE bundles SET hashes = ? WHERE first = 0", (bytes([hashes[0] ^ 1]) + hashes[1:],))
    with pytest.raises(AnchorError) as caught:
        anchor_trail(folder, policy=policy)
    assert (caught.value.reason, "verify" in caught.value.next_step) == ("root", True)


def test_a_file_that_a_witness_has_cosigned_and_the_log_has_not_signed_is_refused(folder):
    vkey, own = grow(folder, 5), cosigner()
    text = parse_note(TrailReader.open(folder).checkpoint()).text
    forged = parse_note(Log("example.com/team").signed(text))
    data = forged.plus(own.cosign(forged, int(time.time()))).format().encode()
    with pytest.raises(AnchorError) as caught:
        add_anchor(folder, data, policy=policy_of(vkey, ("alice", format_vkey(own.verifier()), "")))
    assert caught.value.reason == "unsigned"
    assert not (folder / "anchors").exists()


def test_a_checkpoint_can_be_prepared_and_nobody_is_asked(folder, monkeypatch):
    grow(folder, 5)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("nobody was named"))
    path = keep_checkpoint(folder)
    assert path == folder / "anchors" / "5.checkpoint"
    assert path.read_text() == TrailReader.open(folder).checkpoint()
    shutil.copytree(folder, folder.with_name("older"))
    grow(folder, 8)
    with pytest.raises(AnchorError) as caught:
        keep_checkpoint(folder.with_name("older"))
    assert caught.value.reason == "diverged"


def test_a_trail_can_be_anchored_while_others_append_to_it(folder, alice):
    witness, policy, _ = alice
    stop = threading.Event()

    def append() -> None:
        with Trail.open(folder) as trail:
            while not stop.is_set():
                trail.append("a.b", b"{}").wait()

    appending = threading.Thread(target=append)
    appending.start()
    try:
        sizes = [anchor_trail(folder, policy=policy) for _ in range(6)]
    finally:
        stop.set()
        appending.join(30)
    assert all(done.complete for done in sizes)
    assert [done.size for done in sizes] == sorted(done.size for done in sizes)
    verdict = verify_trail(folder, policy=policy)
    assert verdict.level in (Level.UNANCHORED, Level.COSIGNED)
    assert {done.size for done in sizes} == {anchor.size for anchor in verdict.anchors}
    assert witness.size("example.com/team") == sizes[-1].size


def test_anchors_outlast_a_change_of_the_logs_key(folder, alice):
    witness, policy, _ = alice
    assert anchor_trail(folder, policy=policy).complete
    with Trail.open(folder) as trail:
        rotate_key(trail, "log")
    new = grow(folder, 9)
    assert new not in policy.log_keys
    done = anchor_trail(folder, policy=policy)
    assert ([item.outcome for item in done.asked], done.exit_code) == (["unsigned"], 3)
    assert "new key" in done.asked[0].message
    witness.add_log(new)
    assert anchor_trail(folder, policy=policy).complete
    verdict = verify_trail(folder, policy=policy)
    assert verdict.level is Level.COSIGNED
    assert [anchor.size for anchor in verdict.anchors] == [5, 9]


def test_a_checkpoint_is_anchored_with_the_logs_ml_dsa_signature(folder, alice, authority):
    _, policy, _ = alice
    with Trail.open(folder) as trail:
        rotate_key(trail, "mldsa")
        endorse = trail.keys.endorse
    with serve(authority.answer) as served:
        named = {"authorities": [served.url], "tsa_roots": [authority.pem]}
        assert anchor_trail(folder, policy=policy, endorse=endorse, **named).complete
    size = TrailReader.open(folder).size
    kept = parse_note(AnchorFolder(folder).read(f"{size}.checkpoint"))
    assert [len(line.data) for line in kept.signatures] == [64, 8 + 2420]
    verdict = verify_trail(folder, policy=policy, tsa_roots=[authority.pem])
    assert (verdict.level, verdict.reasons) == (Level.COSIGNED, ())
    assert sorted(anchor.kind for anchor in verdict.anchors) == ["cosignature", "timestamp"]


def home_now() -> Path:
    return Path(os.environ["RLHF_AUDIT_HOME"])


def rebuilt(folder, size: int) -> None:
    """The key-holder's other history: the whole trail made anew with the same keys, and nothing remembered of it."""
    shutil.rmtree(folder)
    shutil.rmtree(home_now() / "heads")
    grow(folder, size)


@pytest.mark.parametrize(("size", "code"), [(5, "fork"), (9, "fork"), (3, "rollback")])
def test_a_rebuilt_trail_is_found_out_by_the_witness_and_both_heads_are_kept(folder, alice, size, code):
    witness, policy, _ = alice
    anchor_trail(folder, policy=policy)
    first = TrailReader.open(folder).checkpoint()
    rebuilt(folder, size)
    assert verify_trail(folder, policy=policy).level is Level.UNANCHORED
    done = anchor_trail(folder, policy=policy)
    assert (done.level, done.exit_code, done.complete) == (Level.DIVERGED, 30, False), done
    assert [item.outcome for item in done.asked] == [code]
    assert [reason.code for reason in done.reasons] == [code]
    kept = home_now() / "heads" / "example.com%2Fteam.diverged"
    texts = {parse_note(path.read_bytes()).text for path in kept.iterdir()}
    assert texts == {parse_note(note).text for note in (first, TrailReader.open(folder).checkpoint())}
    assert bool(witness.evidence()) == (code == "fork")
    assert AnchorFolder(folder).cosigned(size) is None


def test_a_trail_that_is_not_the_one_seen_before_is_not_anchored(folder, alice, monkeypatch):
    _, policy, _ = alice
    shutil.copytree(folder, folder.with_name("older"))
    grow(folder, 8)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it must ask nobody"))
    done = anchor_trail(folder.with_name("older"), policy=policy)
    assert (done.level, done.exit_code, done.asked) == (Level.DIVERGED, 30, ())
    assert [reason.code for reason in done.reasons] == ["rollback"]


def test_a_timestamp_makes_a_trail_timestamped(folder, authority, home):
    grow(folder, 5)
    (home / "tsa").mkdir()
    shutil.copy(authority.ca, home / "tsa")
    with serve(authority.answer) as served:
        done = anchor_trail(folder, authorities=[served.url])
        assert (done.level, done.quorum, done.exit_code) == (Level.TIMESTAMPED, None, 0)
        assert len(served.asked) == 1
        again = anchor_trail(folder, authorities=[served.url])
        assert [item.outcome for item in again.asked] == ["kept"]
        assert len(served.asked) == 1
    verdict = verify_trail(folder)
    assert verdict.level is Level.TIMESTAMPED
    assert [anchor.by for anchor in verdict.anchors] == ["CN=Local test tsa"]
    assert verify_trail(folder, home=None, policy=None).exit_code(Level.COSIGNED) == 5


def test_an_authority_that_could_not_be_verified_is_not_asked(folder, alice):
    with serve(lambda _: pytest.fail("asked")) as served, pytest.raises(ConfigError) as caught:
        anchor_trail(folder, policy=alice[1], authorities=[served.url])
    assert caught.value.reason == "tsa-ca"


def test_an_authority_that_fails_fails_the_whole_and_the_cosignature_is_kept(folder, alice, authority):
    _, policy, _ = alice
    with serve(lambda _: (503, {}, b"")) as served:
        done = anchor_trail(folder, policy=policy, authorities=[served.url], tsa_roots=[authority.pem])
    assert (done.level, done.complete, done.exit_code) == (Level.COSIGNED, False, 3)
    assert [item.outcome for item in done.asked] == ["given", "timestamp"]


def test_a_checkpoint_can_be_endorsed_once_before_anybody_vouches_for_it(folder, alice):
    _, policy, _ = alice
    calls = []

    def endorse(note: str) -> str:
        calls.append(note)
        return note + "— example.com/team AAAAAAAA\n"

    for _ in range(2):
        done = anchor_trail(folder, policy=policy, endorse=endorse)
        assert done.level is Level.COSIGNED
    assert len(calls) == 1
    assert AnchorFolder(folder).read("5.checkpoint").decode() == calls[0] + "— example.com/team AAAAAAAA\n"


def test_a_policy_that_does_not_trust_the_log_and_a_trail_without_a_key_are_refused(tmp_path, folder):
    grow(folder, 5)
    other = Log("example.com/team").grow(1)
    with pytest.raises(AnchorError) as caught:
        anchor_trail(folder, policy=policy_of(other.vkey), authorities=["http://127.0.0.1:9/"], tsa_roots=[b""])
    assert caught.value.exit_code == 3
    with pytest.raises(KeyFileError):
        anchor_trail(folder, home=tmp_path / "empty", authorities=["http://127.0.0.1:9/"])
    with pytest.raises(StoreError):
        anchor_trail(tmp_path / "nowhere")


def test_a_request_goes_by_file_to_a_witness_and_its_answer_back(tmp_path, folder):
    vkey = grow(folder, 5)
    witness = make_witness(tmp_path, "stick", vkey)
    policy = policy_of(vkey, ("stick", witness.vkeys[0], ""))
    for size in (5, 9):
        grow(folder, size)
        request = request_cosignature(folder, witness=witness.name)
        reply = witness.add_checkpoint(request)
        assert reply.status == 200
        answer = request.split(b"\n\n", 1)[1] + reply.body
        done = add_anchor(folder, answer, policy=policy)
        assert (done.outcome, done.whom) == ("given", witness.name)
        assert verify_trail(folder, policy=policy).level is Level.COSIGNED
    assert request.startswith(b"old 5\n")
    assert request_cosignature(folder, 0).startswith(b"old 0\n\n")
    assert request_cosignature(folder, witness="another").startswith(b"old 0\n\n")


def test_an_answer_may_be_of_an_earlier_size(tmp_path, folder):
    vkey = grow(folder, 5)
    witness = make_witness(tmp_path, "stick", vkey)
    request = request_cosignature(folder)
    answer = request.split(b"\n\n", 1)[1] + witness.add_checkpoint(request).body
    grow(folder, 9)
    policy = policy_of(vkey, ("stick", witness.vkeys[0], ""))
    assert "Size 5" in add_anchor(folder, answer, policy=policy).message
    verdict = verify_trail(folder, policy=policy)
    assert verdict.level is Level.UNANCHORED
    assert [anchor.size for anchor in verdict.anchors] == [5]


def test_a_file_that_is_no_anchor_of_this_trail_is_refused_and_changes_nothing(tmp_path, folder):
    vkey = grow(folder, 5)
    witness = make_witness(tmp_path, "stick", vkey)
    policy = policy_of(vkey, ("stick", witness.vkeys[0], ""))
    plain = TrailReader.open(folder).checkpoint()
    other = Log("example.com/team").grow(5)
    for data in (b"", b"nonsense", plain.encode(), other.head().encode(), Log("x.example").grow(2).head().encode()):
        with pytest.raises(AnchorError):
            add_anchor(folder, data, policy=policy)
    assert not (folder / "anchors").exists()


def test_a_file_that_shows_another_history_is_kept_as_evidence(tmp_path, folder):
    vkey = grow(folder, 5)
    witness = make_witness(tmp_path, "stick", vkey)
    request = request_cosignature(folder)
    answer = request.split(b"\n\n", 1)[1] + witness.add_checkpoint(request).body
    rebuilt(folder, 5)
    with pytest.raises(AnchorError) as caught:
        add_anchor(folder, answer, policy=policy_of(vkey, ("stick", witness.vkeys[0], "")))
    assert caught.value.reason == "diverged"
    kept = home_now() / "heads" / "example.com%2Fteam.diverged"
    assert len(list(kept.iterdir())) == 2


def test_a_timestamp_that_came_as_a_file_finds_its_checkpoint(folder, authority):
    grow(folder, 5)
    anchors = AnchorFolder(folder)
    note = anchors.keep(TrailReader.open(folder).checkpoint())
    with pytest.raises(AnchorError):
        add_anchor(folder, authority.stamp(b"else"), tsa_roots=[authority.pem], name="a.tsr")
    with pytest.raises(AnchorError) as caught:
        add_anchor(folder, authority.stamp(note), tsa_roots=[], name="a.tsr")
    assert caught.value.reason == "tsa-unknown"
    done = add_anchor(folder, authority.stamp(note), tsa_roots=[authority.pem], name="from/my tsa.tsr")
    assert done.outcome == "given"
    assert "5.my-tsa.tsr" in anchors.names()
    assert verify_trail(folder, tsa_roots=[authority.pem]).level is Level.TIMESTAMPED


ADD = """
import sys
from pathlib import Path
from rlhf_audit_nb.trail import TrustPolicy
from rlhf_audit_nb.trail.anchoring import add_anchor
folder, answer, policy = map(Path, sys.argv[1:])
print(add_anchor(folder, answer.read_bytes(), policy=TrustPolicy.parse(policy.read_bytes())).outcome, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["signal=KILL", "error=EIO"])
def test_stopped_while_it_keeps_an_anchor_it_has_it_or_not_and_goes_on(tmp_path, folder, fault):
    strace = shutil.which("strace")
    if strace is None or subprocess.run([strace, "-o", os.devnull, "true"], capture_output=True).returncode != 0:
        pytest.skip("strace is not here or may not trace")
    vkey = grow(folder, 5)
    witness = make_witness(tmp_path, "stick", vkey)
    request = request_cosignature(folder)
    answer, policy, seen = tmp_path / "answer", tmp_path / "policy", tmp_path / "seen"
    answer.write_bytes(request.split(b"\n\n", 1)[1] + witness.add_checkpoint(request).body)
    policy.write_text(policy_of(vkey, ("stick", witness.vkeys[0], "")).format())
    trusted = TrustPolicy.parse(policy.read_bytes())
    command = [sys.executable, "-c", ADD, str(folder), str(answer), str(policy)]

    def traced(*options: str):
        shutil.rmtree(folder / "anchors", ignore_errors=True)
        words = [strace, "-f", "-qq", *options, *command]
        return subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])

    assert traced("-o", str(seen), "-e", "trace=rename,fsync").stdout == "given\n"
    lines = seen.read_text().splitlines()
    levels = set()
    for name in ("rename", "fsync"):
        count = sum(f"{name}(" in line for line in lines)
        assert count >= 2
        for when in range(1, count + 1):
            done = traced("-o", os.devnull, "-e", f"trace={name}", "-e", f"inject={name}:{fault}:when={when}")
            assert done.returncode != 0 or done.stdout == "given\n"
            assert "error" not in fault or "StoreError" in done.stderr
            verdict = verify_trail(folder, policy=trusted)
            assert {reason.code for reason in verdict.reasons} <= {"quorum"}
            levels.add(verdict.level)
            assert add_anchor(folder, answer.read_bytes(), policy=trusted).good
            assert verify_trail(folder, policy=trusted).level is Level.COSIGNED
    assert Level.UNANCHORED in levels


# Others' witness, and others' log


class TheirWitness:
    """The witness of the witness-log wheel, behind HTTP."""

    def __init__(self, vkey: str) -> None:
        self.service = witness_log.WitnessService.new("witness.example/theirs", bytes(range(32)))
        self.service.add_log(vkey.partition("+")[0], vkey)

    @property
    def vkey(self) -> str:
        found = self.service.vkey
        return found() if callable(found) else found

    def __call__(self, body: bytes):
        status, kind, said = self.service.handle_add_checkpoint_http(body.decode(), int(time.time()))
        return status, {"Content-Type": kind}, said if isinstance(said, bytes) else said.encode()


def test_a_witness_that_others_have_built_cosigns_our_trail_as_it_grows(folder):
    vkey = grow(folder, 1)
    theirs = TheirWitness(vkey)
    with serve(theirs) as served:
        policy = policy_of(vkey, ("theirs", theirs.vkey, served.url))
        for size in (1, 255, 257):
            grow(folder, size)
            done = anchor_trail(folder, policy=policy)
            assert (done.level, done.size) == (Level.COSIGNED, size), done.asked
        shutil.rmtree(folder / "anchors")
        grow(folder, 300)
        before = len(served.asked)
        assert anchor_trail(folder, policy=policy).complete
        assert len(served.asked) == before + 2  # 409 with its size, then the proof from there
        assert verify_trail(folder, policy=policy).level is Level.COSIGNED
        rebuilt(folder, 310)
        done = anchor_trail(folder, policy=policy)
        assert (done.level, [item.outcome for item in done.asked]) == (Level.DIVERGED, ["fork"])


def test_our_witness_and_theirs_answer_the_same_requests_alike(tmp_path):
    log = Log("example.com/team").grow(260)
    ours, theirs = make_witness(tmp_path, "ours", log.vkey), TheirWitness(log.vkey)
    fork, forger = log.forked(4), Log(log.origin).grow(20)
    empty = log.signed(f"{log.origin}\n0\n{b64(tree([]))}\n").encode()
    bodies = {
        "the first": log.body(0, 10),
        "the same again": log.body(10, 10),
        "stale": log.body(3, 20),
        "from nothing again": log.body(0, 20),
        "old over new": log.body(10, 20).replace(b"old 10\n", b"old 21\n"),
        "another key": forger.body(10),
        "another log": Log("example.com/unknown").grow(20).body(10),
        "no proof": b"old 10\n\n" + log.head(20).encode(),
        "a fork": fork.body(10, 20),
        "a fork of the same size": fork.body(10, 10),
        "nothing": b"",
        "no old line": b"\n" + log.head(20).encode(),
        "the next": log.body(10, 255),
        "over the tile": log.body(255, 257),
        "an empty tree later": b"old 257\n\n" + empty,
    }
    for name, body in bodies.items():
        reply = ours.add_checkpoint(body)
        status, headers, said = theirs(body)
        assert (name, reply.status) == (name, status)
        if status == 409:
            assert (reply.kind, reply.body) == (headers["Content-Type"], said)


def test_a_published_tree_gives_the_roots_and_proofs_of_its_trail(tmp_path, folder):
    grow(folder, 600)
    publish_tiles(folder, tmp_path / "www")
    published, stored = PublishedTree.open(tmp_path / "www"), TrailReader.open(folder)
    assert (published.origin, published.size) == (stored.origin, stored.size)
    for first, second in ((1, 600), (255, 257), (256, 512), (257, 599), (511, 600), (600, 600), (0, 5)):
        assert published.consistency_proof(first, second) == stored.consistency_proof(first, second)
        assert published.root(second) == stored.root(second)
    (tmp_path / "www" / "tile" / "0" / "001").unlink()
    with pytest.raises(StoreError) as caught:
        PublishedTree.open(tmp_path / "www").consistency_proof(300, 600)
    assert caught.value.reason == "missing-node"
    with pytest.raises(StoreError):
        PublishedTree.open(tmp_path)
