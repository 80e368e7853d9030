"""Keys change while nobody else writes, and whenever the machine stops: before, after, never in between."""

from __future__ import annotations

import base64
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.dying import in_child

from rlhf_audit_nb.errors import FormatError, KeyFileError, StoreError
from rlhf_audit_nb.trail import Draft, Level, Trail, TrailReader, TrustPolicy, verify_trail
from rlhf_audit_nb.trail.key_files import RingFolder
from rlhf_audit_nb.trail.keys import encode_private, load_keys, local_policy
from rlhf_audit_nb.trail.note import format_vkey, parse_note
from rlhf_audit_nb.trail.published import verify_published
from rlhf_audit_nb.trail.rotation import keys_over_time, revoke_key, rotate_key
from rlhf_audit_nb.trail.signers import HeldKey
from rlhf_audit_nb.trail.succession import KEY_ROTATED, known_limits, parse_revocation
from rlhf_audit_nb.trail.tiles import publish_tiles

ROLES = ("log", "record", "model", "mldsa")


def ring_folder(home: Path) -> Path:
    return next((home / "keys").glob("[!.]*"))


def made(folder: Path, entries: int = 3, origin: str = "example.org/keys") -> str:
    """A trail of some entries; its first log key."""
    with Trail.open(folder, origin=origin) as trail:
        for number in range(entries):
            trail.append("note.taken", b'{"n":%d}' % number)
        return trail.log_vkey


def grown(folder: Path) -> None:
    with Trail.open(folder) as trail:
        trail.append("note.taken", b'{"later":true}').wait()


def level(folder: Path, *keys: str) -> Level:
    policy = TrustPolicy.parse("".join(f"log {key}\n" for key in keys) + "quorum none\n") if keys else None
    verdict = verify_trail(folder, policy=policy)
    assert verdict.level is not Level.INVALID or verdict.reasons
    return verdict.level


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


# -- what a rotation leaves -----------------------------------------------------------------------------------------


def test_after_a_rotation_the_new_key_signs_and_both_policies_verify(folder, home):
    old = made(folder)
    with Trail.open(folder) as trail:
        rotation = rotate_key(trail, "log", reason="a year has passed")
        assert (rotation.old, rotation.new, rotation.index) == (old, trail.log_vkey, 4)
        assert trail.keys.log_vkey == rotation.new
        trail.append("note.taken", b'{"n":9}').wait()
        assert [format_vkey(s.verifier()) for s in trail.signers] == [rotation.new]
    assert level(folder) is Level.UNANCHORED
    assert level(folder, old) is Level.UNANCHORED
    assert level(folder, rotation.new) is Level.UNANCHORED


def test_a_published_trail_verifies_by_any_of_its_keys(folder, home, tmp_path):
    keys = [made(folder, entries=300)]
    with Trail.open(folder) as trail:
        keys.append(rotate_key(trail, "log").new)
        trail.append_many([Draft("note.taken", b"{}")] * 300)
        keys.append(rotate_key(trail, "log").new)
    publish_tiles(folder, tmp_path / "published")
    for number, key in enumerate(keys):
        verdict = verify_published(tmp_path / "published", policy=TrustPolicy.of(key), home=tmp_path / f"new{number}")
        assert (verdict.level, verdict.reasons) == (Level.UNANCHORED, ())
    stranger = TrustPolicy.of(made(tmp_path / "other", origin="example.org/other"))
    assert verify_published(tmp_path / "published", policy=stranger, home=tmp_path / "new").level is Level.INVALID


def test_the_commit_that_names_the_new_key_is_signed_by_both(folder, home):
    old = made(folder)
    with Trail.open(folder) as trail:
        rotation = rotate_key(trail, "log")
        note = parse_note(trail.status().note)
    assert len(note.signatures) == 2
    for key in (old, rotation.new):
        assert TrustPolicy.of(key).check(note.format()).checkpoint.size == rotation.index + 1


@pytest.mark.parametrize("role", ["record", "model", "mldsa"])
def test_the_other_roles_change_in_the_ring_and_in_the_trail(folder, home, role):
    made(folder)
    with Trail.open(folder) as trail:
        before = trail.keys.public(role)
        rotation = rotate_key(trail, role)
        assert (rotation.old, rotation.new) == (before, trail.keys.public(role))
        assert rotation.new != before
    keys = load_keys(home, "example.org/keys")
    assert keys.public(role) == rotation.new
    span = keys_over_time(TrailReader.open(folder)).key_at(role, rotation.index + 1)
    assert (span.key, span.first) == (rotation.new, rotation.index)
    assert level(folder) is Level.UNANCHORED


def test_the_old_private_key_is_gone_and_its_public_half_is_kept(folder, home):
    made(folder)
    ring = ring_folder(home)
    before = (ring / "log.pem").read_bytes()
    with Trail.open(folder) as trail:
        rotation = rotate_key(trail, "log")
    secret = base64.b64decode(b"".join(before.splitlines()[1:-1]))[-32:]
    for path in ring.rglob("*"):
        if path.is_file():
            assert before not in path.read_bytes()
            assert secret not in path.read_bytes()
            assert base64.b64encode(secret)[:20] not in path.read_bytes()
    (kept,) = (ring / "retired").glob("log-*.json")
    assert json.loads(kept.read_text())["key"] == rotation.old
    assert all(path.stat().st_mode & 0o077 == 0 for path in ring.rglob("*") if path.is_file())


def test_many_rotations_of_every_role_verify_by_the_first_key_and_by_the_last(folder, home):
    first = made(folder)
    with Trail.open(folder) as trail:
        for turn in range(3):
            for role in ROLES:
                rotate_key(trail, role, reason=f"turn {turn}")
                trail.append("note.taken", b"{}")
        last = trail.log_vkey
    grown(folder)
    assert keys_over_time(TrailReader.open(folder)).reasons == []
    assert [level(folder, key) for key in (first, last)] == [Level.UNANCHORED] * 2
    assert level(folder) is Level.UNANCHORED
    assert len(local_policy(home, "example.org/keys").logs) == 7


def test_keys_do_not_change_while_somebody_else_has_the_trail_open(folder, home):
    made(folder)
    with Trail.open(folder) as other, Trail.open(folder) as trail:
        with pytest.raises(StoreError) as refused:
            rotate_key(trail, "log")
        assert refused.value.reason == "in-use"
        other.append("note.taken", b"{}").wait()
        trail.append("note.taken", b"{}").wait()
    assert not RingFolder(ring_folder(home)).is_changing
    assert list(TrailReader.open(folder).entries(type=KEY_ROTATED)) == []


def test_a_reason_of_two_lines_changes_nothing(folder, home):
    old = made(folder)
    with Trail.open(folder) as trail:
        with pytest.raises(FormatError):
            rotate_key(trail, "log", reason="one\ntwo")
        assert trail.log_vkey == old
        trail.append("note.taken", b"{}").wait()
    assert level(folder, old) is Level.UNANCHORED


def test_an_encrypted_ring_stays_encrypted(folder, home, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_PASSPHRASE", "five random words here now")
    made(folder)
    with Trail.open(folder) as trail:
        for role in ROLES:
            rotate_key(trail, role)
    for path in ring_folder(home).glob("*.pem"):
        assert b"ENCRYPTED" in path.read_bytes(), path
    assert load_keys(home, "example.org/keys").mldsa is not None
    monkeypatch.setenv("RLHF_AUDIT_PASSPHRASE", "another passphrase")
    with pytest.raises(KeyFileError) as refused:
        load_keys(home, "example.org/keys")
    assert refused.value.reason == "passphrase"


def test_a_ring_without_a_passphrase_stays_so_though_one_is_set(folder, home, monkeypatch):
    made(folder)
    monkeypatch.setenv("RLHF_AUDIT_PASSPHRASE", "of another ring")
    with Trail.open(folder) as trail:
        for role in ROLES:
            rotate_key(trail, role)
    monkeypatch.delenv("RLHF_AUDIT_PASSPHRASE")
    assert load_keys(home, "example.org/keys").mldsa is not None


# -- crashes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["log", pytest.param("mldsa", marks=pytest.mark.slow), "held"])
def test_a_rotation_that_is_killed_at_any_call_is_done_or_not_begun(folder, home, tmp_path, monkeypatch, role):
    first = made(folder)
    other = Ed25519PrivateKey.generate()
    (tmp_path / "held.pem").write_bytes(encode_private(other, None))
    held = HeldKey(f"file2:{tmp_path}/held.pem", other.public_key()) if role == "held" else None
    kind, stride = ("log", 3) if held else (role, 1)
    kept_trail, kept_home = copied(folder, tmp_path / "t0"), copied(home, tmp_path / "h0")
    outcomes = set()
    at, finished = 1 - stride, False
    while not finished:
        at += stride
        for copy, target in ((kept_trail, folder), (kept_home, home)):
            shutil.rmtree(target)
            shutil.copytree(copy, target)
        finished = in_child(lambda: _rotate_once(folder, kind, held), at)
        # Looked at before anybody opens it: the checks hold in any state.
        assert level(folder, first) is Level.UNANCHORED, at
        assert level(folder) is Level.UNANCHORED, at
        grown(folder)
        entries = list(TrailReader.open(folder).entries(type=KEY_ROTATED))
        ring = load_keys(home, "example.org/keys")
        named = json.loads(entries[0].body)["new"] if entries else None
        assert len(entries) <= 1
        if named is None:
            assert (ring.log_vkey, ring.mldsa) == (first, None), at
        else:
            assert ring.public(kind) == named, at
            assert isinstance(ring.log, HeldKey) == (held is not None), at
        assert not RingFolder(ring_folder(home)).is_changing, at
        assert list(ring_folder(home).glob("*next*")) == []
        assert level(folder, first) is Level.UNANCHORED, at
        assert level(folder) is Level.UNANCHORED, at
        outcomes.add(named is not None)
    assert outcomes == {True, False}
    assert at > 20


def _rotate_once(folder: Path, role: str, held: HeldKey | None = None) -> None:
    trail = Trail.open(folder)
    rotate_key(trail, role, new=held)
    trail.close()


CALLS = ("open", "fsync", "replace", "unlink", "mkdir", "utime")


@pytest.mark.parametrize("role", ["log", "record"])
def test_a_disk_that_is_full_at_any_call_of_a_rotation_leaves_it_done_or_not_begun(folder, home, tmp_path, role):
    """The error is said, this process goes on with keys that are the trail's, and so does the next one."""
    made(folder)
    kept_trail, kept_home = copied(folder, tmp_path / "t0"), copied(home, tmp_path / "h0")
    outcomes, at, full = set(), 0, True
    while full:
        at += 1
        for copy, target in ((kept_trail, folder), (kept_home, home)):
            shutil.rmtree(target)
            shutil.copytree(copy, target)
        trail = Trail.open(folder)
        with pytest.MonkeyPatch.context() as patch:
            left = _full_at(patch, at)
            with suppress(KeyFileError, StoreError):
                rotate_key(trail, role)
        full = left[0] <= 0
        named = [json.loads(entry.body)["new"] for entry in trail.reader().entries(type=KEY_ROTATED)]
        assert named in ([], [trail.keys.public(role)]), at
        trail.append("note.taken", b"{}").wait()
        trail.close()
        grown(folder)
        ring = load_keys(home, "example.org/keys")
        assert named in ([], [ring.public(role)]), at
        assert not RingFolder(ring_folder(home)).is_changing, at
        assert level(folder) is Level.UNANCHORED, at
        outcomes.add((bool(named), full))
    assert outcomes == {(False, True), (True, True), (True, False)}


def _full_at(patch: pytest.MonkeyPatch, at: int) -> list[int]:
    """The ``at``-th call that changes a file fails, and so does every later one; how many calls are left until then."""
    left = [at]

    def failing(real):
        def call(*args, **keywords):
            left[0] -= 1
            if left[0] <= 0:
                raise OSError(28, "No space left on device")
            return real(*args, **keywords)

        return call

    for name in CALLS:
        patch.setattr(os, name, failing(getattr(os, name)))
    return left


def test_a_rotation_whose_append_fails_leaves_the_old_key_in_force(folder, home, monkeypatch):
    old = made(folder)
    with Trail.open(folder) as trail:
        monkeypatch.setattr(Trail, "append_guarded", _refuse)
        with pytest.raises(StoreError):
            rotate_key(trail, "log")
        monkeypatch.undo()
        monkeypatch.setenv("RLHF_AUDIT_HOME", str(home))
        assert trail.log_vkey == old
        assert not RingFolder(ring_folder(home)).is_changing
        trail.append("note.taken", b"{}").wait()
        assert rotate_key(trail, "log").old == old
    assert level(folder, old) is Level.UNANCHORED


def test_a_rotation_whose_append_says_it_failed_and_did_not_goes_on_with_the_new_key(folder, home, monkeypatch):
    old = made(folder)
    real = Trail.append_guarded

    def appended_and_refused(trail, kind, body):
        real(trail, kind, body)
        raise StoreError("The commit's answer was lost.", code="commit")

    with Trail.open(folder) as trail:
        with monkeypatch.context() as patch:
            patch.setattr(Trail, "append_guarded", appended_and_refused)
            with pytest.raises(StoreError, match="answer was lost"):
                rotate_key(trail, "log")
        assert trail.log_vkey != old
        trail.append("note.taken", b"{}").wait()
    grown(folder)
    assert load_keys(home, "example.org/keys").log_vkey == trail.log_vkey
    assert level(folder, old) is Level.UNANCHORED


def test_a_role_that_there_is_not_is_refused(folder, home):
    made(folder)
    with Trail.open(folder) as trail, pytest.raises(KeyFileError, match="no cook key"):
        rotate_key(trail, "cook")


def _refuse(_trail, _kind, _body) -> None:
    raise StoreError("The disk is full.", code="disk-full")


# -- revocation -----------------------------------------------------------------------------------------------------


def test_revoking_the_key_in_force_replaces_it_and_leaves_a_statement(folder, home):
    old = made(folder)
    with Trail.open(folder) as trail:
        statement, rotation = revoke_key(trail, reason="the laptop was stolen")
        assert (statement.key, statement.successor, statement.since) == (old, trail.log_vkey, rotation.index + 1)
    assert statement.signed_by([]) == (old,)
    assert parse_revocation(statement.note.format()) == statement
    assert known_limits(home, "example.org/keys")[old].revoked
    grown(folder)
    for keys in ((), (old,), (rotation.new,)):
        assert level(folder, *keys) is Level.UNANCHORED


def _fork(folder: Path, home: Path, tmp_path: Path, monkeypatch) -> tuple[Path, str]:
    """A history that the thief of the first key goes on with, before the owner revokes that key in his own."""
    old = made(folder)
    stolen_trail, stolen_home = copied(folder, tmp_path / "stolen"), copied(home, tmp_path / "thief")
    with Trail.open(folder) as trail:
        revoke_key(trail)
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(stolen_home))
    for _ in range(4):
        grown(stolen_trail)
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(home))
    return stolen_trail, old


def test_a_thiefs_fork_is_refused_by_who_has_the_statement_alone(folder, home, tmp_path, monkeypatch):
    fork, old = _fork(folder, home, tmp_path, monkeypatch)
    policy = TrustPolicy.of(old)
    stranger = tmp_path / "stranger"
    assert verify_trail(fork, policy=policy, home=stranger).level is Level.UNANCHORED
    shutil.copytree(home / "revoked", stranger / "revoked")
    verdict = verify_trail(fork, policy=policy, home=stranger)
    assert verdict.level is Level.INVALID
    assert "revoked-key" in {reason.code for reason in verdict.reasons}
    assert verify_trail(folder, policy=policy, home=tmp_path / "another").level is Level.UNANCHORED


def test_a_thief_who_names_an_heir_of_his_own_is_refused_as_well(folder, home, tmp_path, monkeypatch):
    fork, old = _fork(folder, home, tmp_path, monkeypatch)
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "thief"))
    with Trail.open(fork) as trail:
        rotate_key(trail, "log")
    grown(fork)
    stranger = tmp_path / "stranger"
    assert verify_trail(fork, policy=TrustPolicy.of(old), home=stranger).level is Level.UNANCHORED
    shutil.copytree(home / "revoked", tmp_path / "warned" / "revoked")
    assert verify_trail(fork, policy=TrustPolicy.of(old), home=tmp_path / "warned").level is Level.INVALID


def test_a_key_that_was_replaced_before_can_be_revoked_later(folder, home):
    old = made(folder)
    with Trail.open(folder) as trail:
        first = rotate_key(trail, "log")
        statement, rotation = revoke_key(trail, key=old, since=2, reason="found in a public repository")
        assert rotation is None
        assert (statement.since, statement.successor) == (2, first.new)
        with pytest.raises(KeyFileError) as refused:
            revoke_key(trail, key=old)
        assert refused.value.reason == "revoked-key"
    # Its own private half is gone: the successor vouches for the statement.
    with pytest.raises(FormatError):
        statement.signed_by([])
    assert statement.signed_by(TrustPolicy.of(first.new).logs) == (first.new,)


def test_what_a_revoked_key_had_signed_is_no_fault_of_the_history_that_goes_on(folder, home):
    old = made(folder, entries=600)
    with Trail.open(folder) as trail:
        statement, rotation = revoke_key(trail, since=10)
    grown(folder)
    assert statement.since == 10
    for keys in ((), (old,), (rotation.new,)):
        assert level(folder, *keys) is Level.UNANCHORED


@pytest.mark.parametrize(("key", "since", "code"), [("nobody+00000000+AA==", None, "no-key"), (None, 99, "since")])
def test_a_revocation_that_makes_no_sense_changes_nothing(folder, home, key, since, code):
    old = made(folder)
    with Trail.open(folder) as trail:
        size = trail.status().size
        with pytest.raises(KeyFileError) as refused:
            revoke_key(trail, key=key, since=since)
        assert refused.value.reason == code
        assert (trail.status().size, trail.log_vkey) == (size, old)


def test_an_endorsement_is_added_once_and_only_where_the_ring_has_the_key(folder, home):
    made(folder)
    with Trail.open(folder) as trail:
        note = trail.status().note
        assert trail.keys.endorse(note) == note
        rotation = rotate_key(trail, "mldsa")
        note = trail.status().note
        endorsed = trail.keys.endorse(note, when=1_700_000_000)
        assert trail.keys.endorse(endorsed) == endorsed
        assert endorsed.startswith(note)
    policy = TrustPolicy.parse(f"log {rotation.new}\nquorum none\n")
    checked = policy.check(endorsed)
    assert [item.time for item in checked.cosignatures] in ([], [1_700_000_000])
    with pytest.raises(FormatError):
        policy.check(note)
    keys = keys_over_time(TrailReader.open(folder))
    checked = keys.check(local_policy(home, "example.org/keys"), endorsed)
    assert rotation.new in checked.signers


def test_the_key_that_a_ring_names_must_be_the_one_that_signs(folder, home):
    made(folder)
    ring = ring_folder(home)
    other = Ed25519PrivateKey.generate()
    (ring / "record.pem").write_bytes(encode_private(other, None))
    with pytest.raises(KeyFileError, match=r"record\.pub is not the public half"):
        load_keys(home, "example.org/keys")
