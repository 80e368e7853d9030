"""Records over the life of a trail's keys: each is signed by the key of its time, and by two where two are named."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import shutil

import nbformat
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey, MLDSA44PublicKey

from rlhf_audit_nb.records import read_record
from rlhf_audit_nb.records.dsse import DsseEnvelope, key_id, pae, sign_envelope
from rlhf_audit_nb.records.session import Outcome, RecordSession
from rlhf_audit_nb.records.statement import build_statement, encode_statement
from rlhf_audit_nb.trail import Level, Trail, TrustPolicy
from rlhf_audit_nb.trail.entry import Entry
from rlhf_audit_nb.trail.keys import encode_private, load_keys, local_policy
from rlhf_audit_nb.trail.note import MLDSA44, parse_vkey
from rlhf_audit_nb.trail.rotation import revoke_key, rotate_key
from rlhf_audit_nb.trail.signers import FileKey, HeldKey, spki_of

ORIGIN = "example.org/records"
SEAL = "metadata.rlhf_audit"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RLHF_AUDIT_PASSPHRASE", raising=False)
    return tmp_path / "home"


@pytest.fixture
def folder(home, tmp_path):
    with Trail.open(tmp_path / "audit", origin=ORIGIN):
        pass
    return tmp_path / "audit"


def made(folder, text="hello"):
    """A sealed record as JSON values."""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text, id="a")])
    session = RecordSession.begin(nb, {"name": "k", "language": "r", "display_name": "K"}, folder)
    session.seal(nb, Outcome("completed"))
    session.close()
    return json.loads(nbformat.writes(nb))


def opened(record, home, policy=None):
    return read_record(json.dumps(record).encode(), policy=policy, home=home)


def seal_of(record):
    return record["metadata"]["rlhf_audit"]


def faults(record, home, policy=None):
    return [(reason.code, reason.where) for reason in opened(record, home, policy).verdict.reasons]


def rotate(folder, *roles):
    with Trail.open(folder) as trail:
        return [rotate_key(trail, role) for role in roles]


def test_records_verify_before_and_after_each_rotation(folder, home, tmp_path):
    first = local_policy(home, ORIGIN)
    records = [made(folder, "none")]
    for role in ("record", "log", "mldsa", "model", "record", "mldsa", "log"):
        rotate(folder, role)
        records.append(made(folder, role))
    now = local_policy(home, ORIGIN)
    for number, record in enumerate(records):
        for policy in (None, now, first):
            place = home if policy is None else tmp_path / f"new{number}"
            found = opened(record, place, policy)
            assert (found.verdict.level, found.verdict.reasons) == (Level.UNANCHORED, ()), number
    assert len({seal_of(record)["statement"]["signatures"][0]["keyid"] for record in records}) == 3
    assert [len(seal_of(record)["statement"]["signatures"]) for record in records] == [1, 1, 1, 2, 2, 2, 2, 2]


def test_who_trusts_the_newest_key_alone_verifies_the_newer_records_and_not_the_older(folder, home, tmp_path):
    old = made(folder, "old")
    (rotation,) = rotate(folder, "log")
    new = made(folder, "new")
    newest = TrustPolicy.of(rotation.new)
    assert opened(new, tmp_path / "one", newest).verdict.level is Level.UNANCHORED
    # The older one says nothing of keys that came after it.
    assert faults(old, tmp_path / "two", newest) == [("unsigned", f"{SEAL}.checkpoint")]


def test_a_record_with_an_mldsa_key_carries_two_signatures_that_others_can_check(folder, home):
    (added,) = rotate(folder, "mldsa")
    record = made(folder)
    envelope = seal_of(record)["statement"]
    first, second = envelope["signatures"]
    key = MLDSA44PublicKey.from_public_bytes(parse_vkey(added.new).public)
    assert second["keyid"] == hashlib.sha256(spki_of(key)).hexdigest() != first["keyid"]
    key.verify(
        base64.b64decode(second["sig"]),
        pae(envelope["payloadType"], base64.b64decode(envelope["payload"])),
    )
    lines = seal_of(record)["checkpoint"].split("\n\n")[1].splitlines()
    assert len(lines) == 2
    assert opened(record, home).verdict.level is Level.UNANCHORED
    assert added.new in opened(record, home).verdict.signers
    alone = TrustPolicy.parse(f"log {added.new}\nquorum none\n")
    assert opened(record, home, alone).verdict.signers == (added.new,)


def test_a_second_signature_that_is_taken_away_damaged_or_anothers_makes_the_record_invalid(folder, home, tmp_path):
    rotate(folder, "mldsa")
    record = made(folder)
    assert opened(record, home).verdict.level is Level.UNANCHORED

    def changed(change):
        other = copy.deepcopy(record)
        change(seal_of(other)["statement"]["signatures"])
        return faults(other, home)

    where = f"{SEAL}.statement.signatures"
    assert changed(lambda found: found.pop(1)) == [("second-signature", where)]
    assert changed(lambda found: found.pop(0)) == [("second-signature", where)]
    assert changed(lambda found: found.reverse()) != []
    raw = bytearray(base64.b64decode(seal_of(record)["statement"]["signatures"][1]["sig"]))
    for at in (0, len(raw) // 2, len(raw) - 1):
        flipped = bytes([*raw[:at], raw[at] ^ 1, *raw[at + 1 :]])
        found = changed(lambda items, data=flipped: items[1].update(sig=base64.b64encode(data).decode()))
        assert found == [("signature", f"{where}[1].sig")]
    stranger = FileKey(MLDSA44PrivateKey.generate())
    payload = base64.b64decode(seal_of(record)["statement"]["payload"])
    forged = sign_envelope(payload, [stranger]).signatures[0]
    found = changed(lambda items: items[1].update(sig=forged.sig, keyid=forged.keyid))
    assert ("keyid", f"{where}[1].keyid") in found


def test_the_entry_that_names_the_second_key_cannot_be_left_out(folder, home):
    rotate(folder, "mldsa")
    record = made(folder)
    entries = seal_of(record)["entries"]
    kept = [item for item in entries if b"key.rotated" not in base64.b64decode(item["data"])]
    assert len(kept) == len(entries) - 1
    seal_of(record)["entries"] = kept
    seal_of(record)["statement"]["signatures"].pop(1)
    assert opened(record, home).verdict.level is Level.INVALID


def test_a_second_signature_that_the_trail_does_not_ask_for_is_refused(folder, home):
    record = made(folder)
    payload = base64.b64decode(seal_of(record)["statement"]["payload"])
    extra = sign_envelope(payload, [FileKey(MLDSA44PrivateKey.generate())]).signatures[0]
    seal_of(record)["statement"]["signatures"].append({"keyid": extra.keyid, "sig": extra.sig})
    assert faults(record, home) == [("second-signature", f"{SEAL}.statement.signatures")]


def test_a_record_by_the_key_before_is_refused(folder, home):
    """Whoever has the old record key, and the trail's entries, cannot seal by it what was sealed after its time."""
    old = load_keys(home, ORIGIN).record
    rotate(folder, "record")
    record = made(folder)
    payload = base64.b64decode(seal_of(record)["statement"]["payload"])
    forged = sign_envelope(payload, [old]).signatures[0]
    seal_of(record)["statement"]["signatures"] = [{"keyid": forged.keyid, "sig": forged.sig}]
    where = f"{SEAL}.statement.signatures[0]"
    assert faults(record, home) == [("keyid", f"{where}.keyid"), ("signature", f"{where}.sig")]


def test_a_record_whose_key_was_revoked_before_it_was_sealed_is_invalid_where_that_is_known(folder, home, tmp_path):
    early = made(folder, "early")
    with Trail.open(folder) as trail:
        size = trail.status().size
    late = made(folder, "late")
    policy = local_policy(home, ORIGIN)
    with Trail.open(folder) as trail:
        revoke_key(trail, "record", since=size, reason="copied from a shared disk")
    assert opened(late, tmp_path / "one", policy).verdict.level is Level.UNANCHORED
    shutil.copytree(home / "revoked", tmp_path / "two" / "revoked")
    assert faults(late, tmp_path / "two", policy) == [("revoked-key", f"{SEAL}.statement.signatures[0]")]
    assert opened(early, tmp_path / "two", policy).verdict.level is Level.UNANCHORED
    assert opened(made(folder, "after"), tmp_path / "three", policy).verdict.level is Level.UNANCHORED


def test_a_record_under_a_revoked_log_key_is_invalid_where_that_is_known(folder, home, tmp_path):
    policy = local_policy(home, ORIGIN)
    record = made(folder)
    with Trail.open(folder) as trail:
        revoke_key(trail, since=1)
    assert opened(record, tmp_path / "one", policy).verdict.level is Level.UNANCHORED
    assert faults(record, home, policy) == [("revoked-key", f"{SEAL}.checkpoint")]


def test_ones_own_records_from_before_a_revocation_go_on_to_verify(folder, home):
    record = made(folder)
    with Trail.open(folder) as trail:
        revoke_key(trail, reason="once it was stolen")
    assert opened(record, home).verdict.level is Level.UNANCHORED
    assert opened(made(folder, "later"), home).verdict.level is Level.UNANCHORED


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1])
def test_a_record_key_that_is_held_elsewhere_signs_records(folder, home, tmp_path, curve):
    private = ec.generate_private_key(curve())
    (tmp_path / "record.pem").write_bytes(encode_private(private, None))
    with Trail.open(folder) as trail:
        rotate_key(trail, "record", new=HeldKey(f"file2:{tmp_path}/record.pem", private.public_key()))
    record = made(folder)
    assert opened(record, home).verdict.level is Level.UNANCHORED
    assert seal_of(record)["statement"]["signatures"][0]["keyid"] == key_id(spki_of(private.public_key()))
    seal_of(record)["statement"]["signatures"][0]["sig"] = base64.b64encode(b"\x30" + bytes(70)).decode()
    assert faults(record, home) == [("signature", f"{SEAL}.statement.signatures[0].sig")]


def test_a_key_entry_that_does_not_hold_makes_the_record_invalid(folder, home):
    with Trail.open(folder) as trail:
        body = {"role": "log", "old": trail.log_vkey, "new": trail.log_vkey, "reason": "", "signature": "AAAA"}
        trail.append("key.rotated", json.dumps(body).encode()).wait()
    record = made(folder)
    assert faults(record, home) == [("key-order", f"{SEAL}.entries[1]")]


def test_both_signatures_are_accepted_by_securesystemslib_each_under_its_own_key(folder, home):
    dsse = pytest.importorskip("securesystemslib.dsse", reason="securesystemslib is not installed")
    from securesystemslib.signer import SSlibKey

    rotate(folder, "mldsa")
    envelope = seal_of(made(folder))["statement"]
    assert isinstance(DsseEnvelope(**{**envelope, "signatures": ()}), DsseEnvelope)
    ring = load_keys(home, ORIGIN)
    assert isinstance(ring.record, FileKey)
    keyid = key_id(ring.record_spki)
    key = SSlibKey.from_crypto(ring.record.key.public_key(), keyid=keyid)
    assert keyid in dsse.Envelope.from_dict(copy.deepcopy(envelope)).verify([key], 1)


def test_a_person_is_not_shown_a_whole_mldsa_key(folder, home):
    (added,) = rotate(folder, "mldsa")
    verdict = opened(made(folder), home).verdict
    assert added.new in verdict.signers
    assert len(added.new) > 1000
    assert "+".join(added.new.split("+")[:2]) in verdict.signed_by
    assert len(verdict.signed_by) < 300


def resealed(record, keys, keep):
    """The record with a choice of its entries, and a statement over them that ``keys`` have signed."""
    other = copy.deepcopy(record)
    seal = seal_of(other)
    seal["entries"] = [item for item in seal["entries"] if keep(Entry.decode(0, base64.b64decode(item["data"])))]
    entries = [Entry.decode(item["index"], base64.b64decode(item["data"])) for item in seal["entries"]]
    payload = encode_statement(build_statement(seal["record"], seal["checkpoint"], entries))
    envelope = sign_envelope(payload, keys)
    signatures = [{"keyid": item.keyid, "sig": item.sig} for item in envelope.signatures]
    seal["statement"].update(payload=envelope.payload, signatures=signatures)
    return other


def test_whoever_has_an_old_record_key_cannot_leave_out_that_it_was_replaced(folder, home, tmp_path):
    old, policy = load_keys(home, ORIGIN).record, local_policy(home, ORIGIN)
    rotate(folder, "record")
    record = made(folder)
    assert opened(record, tmp_path / "auditor", policy).verdict.level is Level.UNANCHORED
    same = resealed(record, [load_keys(home, ORIGIN).record], lambda entry: True)
    assert opened(same, tmp_path / "auditor", policy).verdict.level is Level.UNANCHORED
    forged = resealed(record, [old], lambda entry: entry.type != "key.rotated")
    assert faults(forged, tmp_path / "auditor", policy) == [("keyid", f"{SEAL}.statement.signatures")]


def test_whoever_breaks_the_first_signature_cannot_leave_out_that_there_is_a_second(folder, home, tmp_path):
    rotate(folder, "mldsa")
    policy, record = local_policy(home, ORIGIN), made(folder)
    forged = resealed(record, [load_keys(home, ORIGIN).record], lambda entry: entry.type != "key.rotated")
    alone = TrustPolicy(tuple(key for key in policy.logs if key.algorithm == MLDSA44))
    for trusted in (policy, alone):
        assert faults(forged, tmp_path / "auditor", trusted)[-1:] == [
            ("second-signature", f"{SEAL}.statement.signatures")
        ]
