"""What others say of a record is signed, about this record alone, and chained; a forged or moved one is named."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import threading

import nbformat
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from records_support import FIXTURES, Made, policy_of

from rlhf_audit_nb.errors import RecordError
from rlhf_audit_nb.records import add_to_record, open_record, read_record
from rlhf_audit_nb.records.additions import ATTESTATION, REPRODUCTION
from rlhf_audit_nb.records.dsse import key_id, pae, sign_envelope
from rlhf_audit_nb.records.normal_form import canonical_json
from rlhf_audit_nb.trail import Level, TrustPolicy
from rlhf_audit_nb.trail.signers import FileKey

PLACE = "metadata.rlhf_audit.additions"
SAID = {"role": "compliance officer", "statement": "I have read the report."}
KEYS = {
    "Ed25519": Ed25519PrivateKey.generate,
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ML-DSA-44": MLDSA44PrivateKey.generate,
}


@pytest.fixture(scope="module")
def signers():
    return {name: FileKey(make()) for name, make in KEYS.items()}


@pytest.fixture(scope="module")
def added(made: Made, signers, tmp_path_factory) -> bytes:
    """The record with an addition by a key of each kind, of three types."""
    path = tmp_path_factory.mktemp("added") / "record.ipynb"
    path.write_bytes(made.data)
    for number, name in enumerate(KEYS):
        kind = (ATTESTATION, REPRODUCTION, "urn:example:other", ATTESTATION)[number]
        add_to_record(path, kind, {**SAID, "number": number}, signers[name], policy=made.policy, home=path.parent)
    return path.read_bytes()


def opened(made, data, home):
    return read_record(data if isinstance(data, bytes) else json.dumps(data).encode(), policy=made.policy, home=home)


def seal_of(nb):
    return nb["metadata"]["rlhf_audit"]


def payload_of(envelope):
    return json.loads(base64.b64decode(envelope["payload"]))


def faults(found):
    return [(reason.code, reason.where) for reason in found.verdict.reasons]


def test_additions_by_keys_of_every_kind_hold_and_are_read_in_their_order(made, added, signers, tmp_path):
    found = opened(made, added, tmp_path)
    assert (found.verdict.level, found.verdict.reasons) == (Level.UNANCHORED, ())
    assert [item.index for item in found.additions] == [0, 1, 2, 3]
    assert [item.predicate["number"] for item in found.additions] == [0, 1, 2, 3]
    assert [item.key_id for item in found.additions] == [key_id(signers[name].spki) for name in KEYS]
    assert [item.predicate_type for item in found.additions][:2] == [ATTESTATION, REPRODUCTION]
    assert all(item.time.tzinfo is not None for item in found.additions)
    codes = [(note.code, note.where) for note in found.notes]
    assert ("addition-unknown", f"{PLACE}[2].payload") in codes
    assert len([code for code, _ in codes if code.startswith("addition")]) == 1


def test_a_record_without_additions_has_none(made, tmp_path):
    assert opened(made, made.data, tmp_path).additions == ()


def test_what_is_signed_is_as_the_format_says(made, added):
    """Read with the standard library alone, and checked by openssl."""
    seal = seal_of(json.loads(added))
    statement = hashlib.sha256(base64.b64decode(seal["statement"]["payload"])).hexdigest()
    sealed = json.loads(base64.b64decode(seal["entries"][-1]["data"]))
    before = None
    for envelope in seal["additions"]:
        said = payload_of(envelope)
        assert said["_type"] == "https://in-toto.io/Statement/v1"
        assert said["subject"] == [
            {"name": "notebook", "digest": {"sha256": sealed["body"]["digest"]}},
            {"name": "statement", "digest": {"sha256": statement}},
        ]
        assert said["predicate"]["previous"] == before
        before = hashlib.sha256(json.dumps(envelope, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert seal["version"] == 2


@pytest.mark.parametrize("number", [0, 1])
def test_openssl_verifies_an_addition(added, tmp_path, number):
    envelope = seal_of(json.loads(added))["additions"][number]
    payload = base64.b64decode(envelope["payload"])
    (tmp_path / "key.pem").write_text(json.loads(payload)["predicate"]["key"])
    (tmp_path / "message").write_bytes(b"DSSEv1 28 application/vnd.in-toto+json %d %b" % (len(payload), payload))
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "key.pem", "-rawin", "-in", "message"]
    command += ["-digest", "sha256"] if number else []
    done = subprocess.run([*command, "-sigfile", "sig"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Signature Verified Successfully" in done.stdout, done.stderr
    (tmp_path / "message").write_bytes(b"DSSEv1 28 application/vnd.in-toto+json %d %b" % (len(payload), payload + b" "))
    assert subprocess.run([*command, "-sigfile", "sig"], cwd=tmp_path, capture_output=True, check=False).returncode


def test_adding_changes_nothing_else_in_the_file(made, added, signers, tmp_path):
    before, after = made.data.decode(), added.decode()
    start, stop = after.index('  "rlhf_audit": {'), before.index('  "rlhf_audit": {')
    assert after[:start] == before[:stop]
    assert after[after.rindex("\n  }") :] == before[before.rindex("\n  }") :]
    assert after == nbformat.writes(nbformat.reads(after, as_version=4)) + "\n" * after.endswith("\n")
    again = json.loads(after)
    seal = seal_of(again)
    del seal["additions"]
    seal["version"] = seal_of(made.notebook)["version"]
    assert again == made.notebook


@pytest.mark.parametrize(
    "layout", [{"indent": 4}, {"separators": (",", ":")}, {"indent": "\t", "ensure_ascii": False}, {}]
)
def test_adding_keeps_the_layout_that_an_editor_has_given_the_file(made, signers, tmp_path, layout):
    path = tmp_path / "record.ipynb"
    nb = made.notebook
    nb["metadata"]["z"] = "rlhf_audit"
    nb["metadata"] = {"rlhf_audit": nb["metadata"].pop("rlhf_audit"), **nb["metadata"]}
    del nb["metadata"]["z"]
    text = json.dumps(nb, **layout).replace("\n", "\r\n")
    path.write_bytes(text.encode())
    add_to_record(path, ATTESTATION, SAID, signers["Ed25519"], policy=made.policy, home=tmp_path)
    after = path.read_bytes().decode()
    assert after.count("\n") == after.count("\r\n")
    assert ("\n" in after) is ("\n" in text)
    assert after[: text.index('"rlhf_audit"')] == text[: text.index('"rlhf_audit"')]
    rest = text[text.rindex('"kernelspec"') :]  # not the one in the manifest
    assert after.endswith(rest)
    assert len(open_record(path, policy=made.policy, home=tmp_path).additions) == 1


def test_a_record_of_version_1_becomes_version_2_when_something_is_added(signers, tmp_path):
    source = FIXTURES / "seal-1" / "plain.ipynb"
    path = tmp_path / "plain.ipynb"
    path.write_bytes(source.read_bytes())
    policy = TrustPolicy.parse((source.parent / "trust.policy").read_bytes())
    add_to_record(path, ATTESTATION, SAID, signers["Ed25519"], policy=policy, home=tmp_path)
    found = open_record(path, policy=policy, home=tmp_path)
    assert (found.verdict.level, found.metadata["version"], len(found.additions)) == (Level.UNANCHORED, 2, 1)
    nb = json.loads(path.read_bytes())
    seal_of(nb)["version"] = 1
    found = read_record(json.dumps(nb).encode(), policy=policy, home=tmp_path)
    assert faults(found) == [("malformed-seal", PLACE)]


# -- what a forger tries ----------------------------------------------------------------------------------------


def resigned(envelope, key, **changes):
    """The addition with other words, signed again with ``key``."""
    said = payload_of(envelope)
    said["predicate"].update(changes.pop("predicate", {}))
    said.update(changes)
    payload = canonical_json(said)
    made = sign_envelope(payload, [key])
    return {
        "payloadType": made.payloadType,
        "payload": made.payload,
        "signatures": [{"keyid": item.keyid, "sig": item.sig} for item in made.signatures],
    }


def flipped(text, at=10):
    return text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]


FORGERIES = {
    "the first is taken out": (lambda a, s: a.pop(0), "addition-order", "[0].payload"),
    "one in the middle is taken out": (lambda a, s: a.pop(1), "addition-order", "[1].payload"),
    "two change places": (lambda a, s: a.__setitem__(slice(1, 3), a[2:0:-1]), "addition-order", "[1].payload"),
    "one stands twice": (lambda a, s: a.append(a[-1]), "addition-order", "[4].payload"),
    "a changed byte of the words": (
        lambda a, s: a[1].update(
            payload=base64.b64encode(base64.b64decode(a[1]["payload"]).replace(b"I have", b"I hate")).decode()
        ),
        "addition-signature",
        "[1].signatures[0].sig",
    ),
    "a changed signature": (
        lambda a, s: a[1]["signatures"][0].update(sig=flipped(a[1]["signatures"][0]["sig"])),
        "addition-signature",
        "[1].signatures[0].sig",
    ),
    "another key id": (
        lambda a, s: a[0]["signatures"][0].update(keyid="0" * 64),
        "addition-key",
        "[0].signatures[0].keyid",
    ),
    "another's signature, the named key's id": (
        lambda a, s: a[0]["signatures"][0].update(
            sig=base64.b64encode(s["P-256"].sign(pae(a[0]["payloadType"], base64.b64decode(a[0]["payload"])))).decode()
        ),
        "addition-signature",
        "[0].signatures[0].sig",
    ),
    "two signatures": (
        lambda a, s: a[0].update(signatures=a[0]["signatures"] * 2),
        "malformed-seal",
        "[0].signatures",
    ),
    "no signature": (lambda a, s: a[0].update(signatures=[]), "malformed-seal", "[0].signatures"),
    "another payload type": (lambda a, s: a[0].update(payloadType="text/plain"), "malformed-seal", "[0].payloadType"),
    "a key that the format does not have": (lambda a, s: a[0].update(comment="x"), "malformed-seal", "[0]"),
    "an addition that is text": (lambda a, s: a.__setitem__(0, "x"), "malformed-seal", "[0]"),
    "none at all": (lambda a, s: a.clear(), "malformed-seal", ""),
    "too many": (lambda a, s: a.extend([a[0]] * 1000), "malformed-seal", ""),
    "too large": (lambda a, s: a[0].update(payload="AAAA" * (1 << 18) + "AAAA"), "malformed-seal", "[0].payload"),
    "about another notebook": (
        lambda a, s: a.__setitem__(
            slice(0, 4), [resigned(a[0], s["Ed25519"], subject=[payload_of(a[0])["subject"][1]])]
        ),
        "addition-subject",
        "[0].payload",
    ),
    "of another type": (
        lambda a, s: a.__setitem__(slice(0, 4), [resigned(a[0], s["Ed25519"], _type="x")]),
        "addition",
        "[0].payload",
    ),
    "a key of the statement that is none": (
        lambda a, s: a.__setitem__(slice(0, 4), [resigned(a[0], s["Ed25519"], more=1)]),
        "addition",
        "[0].payload",
    ),
    "a time without a zone": (
        lambda a, s: a.__setitem__(
            slice(0, 4), [resigned(a[0], s["Ed25519"], predicate={"time": "2026-01-01T00:00:00"})]
        ),
        "addition",
        "[0].payload",
    ),
    "a day that is none": (
        lambda a, s: a.__setitem__(
            slice(0, 4), [resigned(a[0], s["Ed25519"], predicate={"time": "2026-02-30T00:00:00Z"})]
        ),
        "addition",
        "[0].payload",
    ),
    "a key that is none": (
        lambda a, s: a.__setitem__(slice(0, 4), [resigned(a[0], s["Ed25519"], predicate={"key": "x"})]),
        "addition",
        "[0].payload",
    ),
    "a key that is no text": (
        lambda a, s: a.__setitem__(slice(0, 4), [resigned(a[0], s["Ed25519"], predicate={"key": 1})]),
        "addition",
        "[0].payload",
    ),
    "a key with words around it": (
        lambda a, s: a.__setitem__(
            slice(0, 4),
            [resigned(a[0], s["Ed25519"], predicate={"key": "me\n" + payload_of(a[0])["predicate"]["key"]})],
        ),
        "addition",
        "[0].payload",
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_addition_makes_the_record_invalid_and_is_named(made, added, signers, tmp_path, name):
    forge, code, where = FORGERIES[name]
    nb = json.loads(added)
    forge(seal_of(nb)["additions"], signers)
    found = opened(made, nb, tmp_path)
    assert found.verdict.level is Level.INVALID
    assert (code, PLACE + where) in faults(found), faults(found)


def test_words_in_another_spelling_are_refused(made, added, signers, tmp_path):
    nb = json.loads(added)
    said = payload_of(seal_of(nb)["additions"][0])
    envelope = sign_envelope(json.dumps(said).encode(), [signers["Ed25519"]])
    plain = {"payloadType": envelope.payloadType, "payload": envelope.payload}
    plain["signatures"] = [{"keyid": item.keyid, "sig": item.sig} for item in envelope.signatures]
    seal_of(nb)["additions"] = [plain]
    assert faults(opened(made, nb, tmp_path)) == [("addition", f"{PLACE}[0].payload")]


def test_an_addition_cannot_be_moved_to_another_record_of_the_same_notebook(made, added, tmp_path, signers):
    """Also where both records show the same: the second subject is the record's own statement."""
    from rlhf_audit_nb.records.session import Outcome, RecordSession
    from rlhf_audit_nb.trail import Trail

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
        with Trail.open(tmp_path / "audit"):
            pass
        twins = []
        for name in ("one", "two"):
            nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("same", id="a")])
            session = RecordSession.begin(nb, {"name": "k", "language": "r", "display_name": "K"}, tmp_path / "audit")
            session.seal(nb, Outcome("completed"))
            session.close()
            path = tmp_path / f"{name}.ipynb"
            path.write_text(nbformat.writes(nb), encoding="utf-8")
            twins.append(path)
    policy = policy_of(tmp_path / "audit")
    add_to_record(twins[0], ATTESTATION, SAID, signers["Ed25519"], policy=policy, home=tmp_path / "v")
    one, two = (json.loads(path.read_bytes()) for path in twins)
    seal_of(two).update(additions=seal_of(one)["additions"], version=2)
    found = read_record(json.dumps(two).encode(), policy=policy, home=tmp_path / "v")
    assert faults(found) == [("addition-subject", f"{PLACE}[0].payload")]


def test_that_the_last_one_was_taken_out_is_not_seen_here(made, added, tmp_path):
    nb = json.loads(added)
    seal_of(nb)["additions"].pop()
    assert opened(made, nb, tmp_path).verdict.level is Level.UNANCHORED


# -- adding -----------------------------------------------------------------------------------------------------


def test_nothing_is_added_to_an_invalid_record_and_the_file_stays_as_it_is(made, signers, tmp_path):
    path = tmp_path / "record.ipynb"
    nb = made.notebook
    nb["cells"][0]["source"] = "other"
    path.write_text(json.dumps(nb))
    before = path.read_bytes()
    with pytest.raises(RecordError, match=r"INVALID: cells\[0\].source") as caught:
        add_to_record(path, ATTESTATION, SAID, signers["Ed25519"], policy=made.policy, home=tmp_path)
    assert (caught.value.reason, caught.value.exit_code) == ("not-valid", 40)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "predicate",
    [{"key": "x"}, {"time": 1}, {"previous": None}, {"a": float("nan")}, {"a": object()}, {"a": "x" * (1 << 20)}],
)
def test_a_predicate_that_cannot_stand_is_refused_and_the_file_stays_as_it_is(made, signers, tmp_path, predicate):
    path = tmp_path / "record.ipynb"
    path.write_bytes(made.data)
    with pytest.raises(RecordError):
        add_to_record(path, ATTESTATION, predicate, signers["Ed25519"], policy=made.policy, home=tmp_path)
    assert path.read_bytes() == made.data
    assert sorted(item.name for item in tmp_path.iterdir() if item.suffix == ".ipynb" or item.name[0] == ".") == [
        "record.ipynb"
    ]


def test_a_missing_record_is_one_clear_error(made, signers, tmp_path):
    with pytest.raises(RecordError, match="cannot be rewritten"):
        add_to_record(tmp_path / "none.ipynb", ATTESTATION, SAID, signers["Ed25519"], policy=made.policy, home=tmp_path)


def test_two_who_add_at_the_same_moment_are_both_there(made, signers, tmp_path):
    path = tmp_path / "record.ipynb"
    path.write_bytes(made.data)
    path.chmod(0o640)

    def add(name):
        add_to_record(path, ATTESTATION, {"who": name}, signers[name], policy=made.policy, home=tmp_path)

    threads = [threading.Thread(target=add, args=(name,)) for name in KEYS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = open_record(path, policy=made.policy, home=tmp_path)
    assert found.verdict.level is Level.UNANCHORED
    assert sorted(item.predicate["who"] for item in found.additions) == sorted(KEYS)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_record_behind_a_link_is_added_to_and_the_link_stays(made, signers, tmp_path):
    path = tmp_path / "record.ipynb"
    path.write_bytes(made.data)
    (tmp_path / "link.ipynb").symlink_to(path)
    add_to_record(tmp_path / "link.ipynb", ATTESTATION, SAID, signers["Ed25519"], policy=made.policy, home=tmp_path)
    assert (tmp_path / "link.ipynb").is_symlink()
    assert len(open_record(path, policy=made.policy, home=tmp_path).additions) == 1
