"""Anchors: read strictly, counted only where the log and somebody else have signed, and never lost."""

from __future__ import annotations

import os
import threading
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tsa import Authority

from rlhf_audit_nb.errors import StoreError
from rlhf_audit_nb.trail import Level, Trail, TrustPolicy
from rlhf_audit_nb.trail.anchors import AnchorFolder, anchored_level, quorum_reached, read_anchors
from rlhf_audit_nb.trail.checkpoint import checkpoint_of
from rlhf_audit_nb.trail.cosignature import CosignerMLDSA44
from rlhf_audit_nb.trail.note import (
    COSIGNATURE,
    Note,
    Signature,
    Signer,
    cosign_note,
    format_vkey,
    parse_note,
    sign_note,
)
from rlhf_audit_nb.trail.statement import mldsa44_message


def signer(name: str) -> Signer:
    return Signer(name, Ed25519PrivateKey.generate())


LOG, ALICE, BOB, MALLORY = (
    signer(name) for name in ("example.com/log", "w.example/alice", "w.example/bob", "m.example")
)
ROOT, OTHER = b"\1" * 32, b"\2" * 32
NOW = 1_700_000_000


def head(size: int, root: bytes = ROOT, by: Signer = LOG, origin: str = "example.com/log") -> str:
    import base64

    return sign_note(f"{origin}\n{size}\n{base64.b64encode(root).decode()}\n", [by])


def cosigned(note: str, *witnesses: Signer, when: int = NOW) -> str:
    parsed = parse_note(note)
    for witness in witnesses:
        parsed = cosign_note(parsed, witness, when)
    return parsed.format()


def policy(quorum: str = "both") -> TrustPolicy:
    lines = [f"log {format_vkey(LOG.verifier())}"]
    lines += [f"witness {name} {format_vkey(one.verifier(COSIGNATURE))}" for name, one in (("a", ALICE), ("b", BOB))]
    return TrustPolicy.parse("\n".join([*lines, "group both all a b", f"quorum {quorum}"]) + "\n")


def read(files: dict[str, str | bytes], roots=(), trusted: TrustPolicy | None = None, **options):
    data = {name: item.encode() if isinstance(item, str) else item for name, item in files.items()}
    options.setdefault("now", NOW + 60)
    return read_anchors(data.get, data, trusted or policy(), "example.com/log", roots, **options)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    made = Authority.make(tmp_path_factory.mktemp("tsa") / "one")
    made.certify()
    return made


@pytest.fixture(scope="module")
def stamped(authority):
    """A checkpoint of size 5 and its timestamp."""
    note = head(5)
    return note, authority.stamp(note.encode())


def test_no_files_are_no_anchors():
    assert read({}) == ((), ())
    assert read({".lock": b"", "README": b"x", "05.checkpoint": head(5), "5.cosigned.swp": b""}) == ((), ())


def test_each_cosignature_is_an_anchor_with_its_witness_time_and_place():
    found, reasons = read({"5.checkpoint": head(5), "5.cosigned": cosigned(head(5), ALICE, BOB)})
    assert reasons == ()
    assert [(a.kind, a.size, a.root, a.time, a.where) for a in found] == [
        ("cosignature", 5, ROOT, NOW, "anchors/5.cosigned")
    ] * 2
    assert [a.by for a in found] == [format_vkey(one.verifier(COSIGNATURE)) for one in (ALICE, BOB)]


def test_the_log_alone_is_no_anchor():
    assert read({"5.checkpoint": head(5), "5.cosigned": head(5)}) == ((), ())


def test_anchors_come_with_the_smallest_size_first():
    files = {f"{size}.cosigned": cosigned(head(size), ALICE, when=NOW - 100 + size) for size in (10, 9, 100)}
    assert [anchor.size for anchor in read(files)[0]] == [9, 10, 100]


@pytest.mark.parametrize(
    ("note", "word"),
    [
        (cosigned(head(5, by=signer("example.com/log")), ALICE), "No trusted key of the log"),
        (cosigned(head(6), ALICE), "checkpoint 6 of example.com/log"),
        (cosigned(head(5, origin="example.com/other", by=signer("example.com/other")), ALICE), "of example.com/other"),
        (cosigned(head(5), ALICE).replace("\n5\n", "\n6\n"), "checkpoint 6"),
        (cosigned(head(5), ALICE)[:-1], "newline"),
        ("", "empty line"),
    ],
    ids=["another key", "another size", "another origin", "changed", "cut", "empty"],
)
def test_what_the_log_has_not_signed_so_is_told_and_not_counted(note, word):
    found, reasons = read({"5.cosigned": note})
    assert found == ()
    assert [(reason.code, reason.where) for reason in reasons] == [("anchor", "anchors/5.cosigned")]
    assert word in reasons[0].message


def test_a_witness_signature_that_does_not_hold_refuses_the_whole_file():
    good = parse_note(cosigned(head(5), ALICE, BOB))
    first, alice, bob = good.signatures
    wrong = type(bob)(bob.name, bob.key_id, bob.data[:-1] + bytes([bob.data[-1] ^ 1]))
    found, reasons = read({"5.cosigned": Note(good.text, (first, alice, wrong)).format()})
    assert found == ()
    assert "w.example/bob" in reasons[0].message


def test_a_stranger_is_named_and_not_counted():
    found, reasons = read({"5.cosigned": cosigned(head(5), MALLORY, ALICE)})
    assert [anchor.by for anchor in found] == [format_vkey(ALICE.verifier(COSIGNATURE))]
    assert [(reason.code, "m.example" in reason.message) for reason in reasons] == [("anchor-unknown", True)]


def test_two_roots_of_one_size_signed_by_the_log_are_a_fork():
    found, reasons = read({"5.checkpoint": head(5), "5.cosigned": cosigned(head(5, OTHER), ALICE)})
    assert [reason.code for reason in reasons] == ["anchor-fork"]
    assert [anchor.root for anchor in found] == [OTHER]


def test_a_stranger_cannot_make_a_trail_look_forked():
    fake = cosigned(head(5, OTHER, by=signer("example.com/log")), MALLORY)
    found, reasons = read({"5.checkpoint": head(5), "5.cosigned": fake})
    assert found == ()
    assert [reason.code for reason in reasons] == ["anchor"]


def test_an_anchor_from_the_future_is_not_counted():
    files = {"5.cosigned": cosigned(head(5), ALICE, when=NOW + 400)}
    assert [reason.code for reason in read(files, now=NOW)[1]] == ["anchor-time"]
    assert read(files, now=NOW)[0] == ()
    assert len(read(files, now=NOW + 200)[0]) == 1


def test_times_that_run_back_while_the_trail_grew_are_told():
    files = {"5.cosigned": cosigned(head(5), ALICE), "6.cosigned": cosigned(head(6), ALICE, BOB, when=NOW - 9)}
    found, reasons = read(files)
    assert len(found) == 3
    assert [(reason.code, reason.where) for reason in reasons] == [("anchor-time", "anchors/6.cosigned")]


def test_keys_that_rotated_are_those_that_the_caller_says():
    new = signer("example.com/log")
    files = {"5.cosigned": cosigned(head(5), ALICE), "9.cosigned": cosigned(head(9, by=new), ALICE)}
    assert [anchor.size for anchor in read(files)[0]] == [5]

    def logs(size):
        return [LOG.verifier()] if size < 9 else [new.verifier()]

    found, reasons = read(files, logs=logs)
    assert [anchor.size for anchor in found] == [5, 9]
    assert reasons == ()


def test_a_timestamp_is_an_anchor_of_the_bytes_beside_it(stamped, authority):
    note, token = stamped
    found, reasons = read({"5.checkpoint": note, "5.local.tsr": token}, [authority.pem], now=time.time())
    assert reasons == ()
    (anchor,) = found
    assert (anchor.kind, anchor.size, anchor.root, anchor.where) == ("timestamp", 5, ROOT, "anchors/5.local.tsr")
    assert anchor.by == "CN=Local test tsa"
    assert abs(anchor.time - time.time()) < 600


def test_a_timestamp_without_its_checkpoint_or_of_another_is_not_counted(stamped, authority):
    note, token = stamped
    roots, now = [authority.pem], time.time()
    for files in (
        {"5.local.tsr": token},
        {"5.checkpoint": head(5, OTHER), "5.local.tsr": token},
        {"6.checkpoint": head(6), "6.local.tsr": token},
        {"5.checkpoint": note.replace("—", "-"), "5.local.tsr": token},
        {"5.checkpoint": note, "5.local.tsr": token[:-1]},
        {"5.checkpoint": note, "5.local.tsr": b""},
    ):
        found, reasons = read(files, roots, now=now)
        assert found == ()
        assert {reason.code for reason in reasons} == {"anchor"}


def test_an_unknown_authority_is_told_and_not_counted(stamped, tmp_path):
    note, token = stamped
    for roots in ([], [Authority.make(tmp_path / "other").pem]):
        found, reasons = read({"5.checkpoint": note, "5.local.tsr": token}, roots, now=time.time())
        assert found == ()
        assert [(reason.code, reason.where) for reason in reasons] == [("tsa-unknown", "anchors/5.local.tsr")]


def test_a_file_that_cannot_be_read_is_told():
    found, reasons = read_anchors(lambda _: None, ["5.cosigned"], policy(), "example.com/log")
    assert found == ()
    assert [reason.code for reason in reasons] == ["anchor"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_changed_in_the_files_nothing_is_counted_that_nobody_said(stamped, authority, data):
    note, token = stamped
    files = {
        "5.checkpoint": note.encode(),
        "5.cosigned": cosigned(note, ALICE, BOB).encode(),
        "6.cosigned": cosigned(head(6), ALICE).encode(),
        "5.local.tsr": token,
    }
    now = time.time()
    truth, _ = read(files, [authority.pem], now=now)
    assert len(truth) == 4
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(sorted(files)))
        how = data.draw(st.sampled_from(["flip", "cut", "swap", "double", "drop"]))
        at = data.draw(st.integers(0, max(0, len(files[name]) - 1)))
        whole = files[name]
        if how == "flip":
            files[name] = (
                whole[:at] + bytes([whole[at] ^ 1 << data.draw(st.integers(0, 7))]) + whole[at + 1 :] if whole else b""
            )
        elif how == "cut":
            files[name] = whole[:at]
        elif how == "double":
            files[name] = whole[:at] + whole
        elif how == "drop":
            files[name] = b""
        else:
            other = data.draw(st.sampled_from(sorted(files)))
            files[name], files[other] = files[other], files[name]
    found, reasons = read(files, [authority.pem], now=now)
    claims = {(anchor.kind, anchor.size, anchor.root, anchor.time, anchor.by) for anchor in truth}
    assert {(anchor.kind, anchor.size, anchor.root, anchor.time, anchor.by) for anchor in found} <= claims
    assert {reason.code for reason in reasons} <= {"anchor", "anchor-unknown", "tsa-unknown"}


def test_the_quorum_is_over_this_very_head():
    found, _ = read({"5.cosigned": cosigned(head(5), ALICE, BOB), "6.cosigned": cosigned(head(6, OTHER), ALICE)})
    assert quorum_reached(policy("both"), found, 5, ROOT)
    assert not quorum_reached(policy("both"), found, 6, OTHER)
    assert quorum_reached(policy("a"), found, 6, OTHER)
    assert not quorum_reached(policy("a"), found, 6, ROOT)
    assert not quorum_reached(policy("b"), found, 6, OTHER)
    assert not quorum_reached(policy("none"), found, 5, ROOT)


def test_a_cosignature_without_a_time_does_not_reach_the_quorum():
    """It claims consistency alone, wherever it lies: in the checkpoint itself or in a file beside it."""
    key = MLDSA44PrivateKey.from_seed_bytes(bytes(32))
    witness = CosignerMLDSA44("w.example/m", key)
    trusted = TrustPolicy.parse(
        f"log {format_vkey(LOG.verifier())}\nwitness m {format_vkey(witness.verifier())}\nquorum m\n"
    )
    plain = parse_note(head(5))
    timed = plain.plus(witness.cosign(plain, NOW)).format()
    untimed = key.sign(mldsa44_message(witness.name, checkpoint_of(head(5)), 0))
    silent = plain.plus(Signature(witness.name, witness.verifier().key_id, bytes(8) + untimed)).format()
    for note, reached in ((timed, True), (silent, False)):
        found, said = read({"5.cosigned": note}, trusted=trusted)
        assert (len(found), said) == (1, ())
        assert quorum_reached(trusted, found, 5, ROOT) is reached
        assert trusted.check(note).cosigned is reached


def test_the_level_is_that_of_the_newest_head(stamped, authority):
    note, token = stamped
    files = {"5.checkpoint": note, "5.t.tsr": token, "5.cosigned": cosigned(note, ALICE)}
    found, _ = read(files, [authority.pem], now=time.time())
    assert anchored_level(policy("a"), found, 5, ROOT) is Level.COSIGNED
    assert anchored_level(policy("both"), found, 5, ROOT) is Level.TIMESTAMPED
    assert anchored_level(policy("a"), found, 6, ROOT) is Level.UNANCHORED
    assert anchored_level(policy("a"), found, 5, OTHER) is Level.UNANCHORED


def test_the_folder_keeps_the_logs_own_lines_and_never_changes_them(tmp_path):
    folder = AnchorFolder(tmp_path)
    assert folder.names() == ()
    kept = folder.keep(cosigned(head(5), ALICE))
    assert kept == head(5).encode()
    again = sign_note(parse_note(head(5)).text, [signer("example.com/log")])
    assert folder.keep(again) == kept
    assert folder.read("5.checkpoint") == kept
    with pytest.raises(StoreError) as caught:
        folder.keep(head(5, OTHER))
    assert caught.value.reason == "diverged"
    assert folder.read("5.checkpoint") == kept


def test_cosignatures_add_up_and_a_newer_one_takes_the_older_ones_place(tmp_path):
    folder = AnchorFolder(tmp_path)
    folder.cosign(cosigned(head(5), ALICE))
    folder.cosign(cosigned(head(5), BOB))
    whole = folder.cosign(cosigned(head(5), ALICE, when=NOW + 7))
    assert folder.cosigned(5) == whole
    found, reasons = read_anchors(folder.read, folder.names(), policy(), "example.com/log", now=NOW + 60)
    assert reasons == ()
    assert sorted((anchor.by.partition("+")[0], anchor.time) for anchor in found) == [
        ("w.example/alice", NOW + 7),
        ("w.example/bob", NOW),
    ]
    with pytest.raises(StoreError, match="rewritten"):
        folder.cosign(cosigned(head(5, OTHER), ALICE))


def test_two_who_add_at_once_lose_nothing(tmp_path):
    folder = AnchorFolder(tmp_path)
    witnesses = [signer(f"w.example/{number}") for number in range(12)]
    threads = [threading.Thread(target=folder.cosign, args=(cosigned(head(5), one),)) for one in witnesses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = {line.name for line in parse_note(folder.cosigned(5)).signatures}
    assert names == {"example.com/log", *(one.name for one in witnesses)}


def test_a_link_a_folder_and_a_pipe_are_not_read(tmp_path):
    folder = AnchorFolder(tmp_path)
    folder.keep(head(5))
    (tmp_path / "elsewhere").write_text(head(6))
    (folder.path / "6.checkpoint").symlink_to(tmp_path / "elsewhere")
    (folder.path / "7.checkpoint").mkdir()
    os.mkfifo(folder.path / "8.checkpoint")
    assert [folder.read(f"{size}.checkpoint") is None for size in (5, 6, 7, 8)] == [False, True, True, False]
    assert folder.read("8.checkpoint") == b""
    assert folder.read("../elsewhere") is None


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "anchors").write_text("")
    with pytest.raises(StoreError) as caught:
        AnchorFolder(tmp_path).keep(head(5))
    assert "anchors" in caught.value.message
    assert caught.value.next_step


def test_a_real_trails_checkpoint_is_kept_as_it_is(folder):
    with Trail.open(folder) as trail:
        trail.append("a.b", b"{}").wait()
        note, vkey = trail.reader().checkpoint(), trail.log_vkey
    kept = AnchorFolder(folder).keep(note)
    assert kept == note.encode()
    assert TrustPolicy.of(vkey).check(kept).checkpoint == checkpoint_of(note)
