"""People's signatures at a gate: who counts, what a rejection does, and what was taken out of a copy."""

from __future__ import annotations

import json
import shutil
import time

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from gate_support import Story, make_record, write_policy

from rlhf_audit_nb.events import RecordReproduced, encode_body
from rlhf_audit_nb.gate import gate, judge_record
from rlhf_audit_nb.records import open_record
from rlhf_audit_nb.records.additions import ATTESTATION, REPRODUCTION, add_to_record
from rlhf_audit_nb.records.attesting import attest_record, enter_attestations
from rlhf_audit_nb.trail import Trail
from rlhf_audit_nb.trail.signers import FileKey

OFFICER, REVIEWER = "Name of the officer", "Name of the reviewer"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_AUDIT_HOME", str(folder / "home"))
        return make_record(folder, Story())


@pytest.fixture
def place(template, tmp_path, monkeypatch):
    shutil.copytree(template.folder, tmp_path / "place")
    # A home of its own: what one test appends is no fork of what another did.
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "place" / "home"))
    return tmp_path / "place"


@pytest.fixture(scope="module")
def keys():
    return {name: FileKey(ec.generate_private_key(ec.SECP256R1())) for name in ("officer", "reviewer", "stranger")}


def asked(place, keys, *lines, roles="[compliance officer]"):
    for name, key in keys.items():
        (place / f"{name}.pub").write_bytes(_pem(key.spki))
    return write_policy(
        place,
        "people:",
        f"  - {{name: {OFFICER}, roles: {roles}, keys: [officer.pub]}}",
        f"  - {{name: {REVIEWER}, roles: [reviewer, trainer], keys: [reviewer.pub]}}",
        *(lines or ("attestations:", "  - {role: compliance officer}")),
    )


def sign(place, key, name=OFFICER, role="compliance officer", meaning="approved", **other):
    from rlhf_audit_nb.trail import TrustPolicy

    policy = TrustPolicy.parse((place / "trust.policy").read_text())
    return attest_record(
        place / "record.ipynb", key, name=name, role=role, meaning=meaning, statement="I have read it.", policy=policy,
        **other,
    )  # fmt: skip


def unmet(decision):
    return [one.id for one in decision.unmet]


def test_who_was_asked_has_to_have_signed(place, keys):
    policy = asked(place, keys)
    decision = gate(place / "model", policy)
    assert (decision.exit_code, unmet(decision)) == (3, ["attestations[0]"])
    sign(place, keys["stranger"])
    decision = gate(place / "model", policy)
    assert unmet(decision) == ["attestations[0]"]
    assert "a key that the policy does not name" in decision.unmet[0].reason
    sign(place, keys["officer"])
    decision = gate(place / "model", policy)
    assert decision.passed
    (found,) = [one for one in decision.chosen.findings if one.id == "attestations[0]"]
    assert found.where == "metadata.rlhf_audit.additions[1]"
    assert OFFICER in found.reason


def test_whoever_trains_is_no_approver_whatever_they_sign_as(place, keys):
    policy = asked(place, keys, roles="[compliance officer]")
    sign(place, keys["reviewer"], name=REVIEWER)
    assert unmet(gate(place / "model", policy)) == ["attestations[0]"]


def test_a_key_of_the_trail_signs_for_nobody_even_where_the_policy_names_it(place, keys):
    with Trail.open(place / "audit") as trail:
        record = trail.keys.record
        (place / "record.pub").write_bytes(_pem(trail.keys.record_spki))
    policy = asked(place, keys)
    policy.write_text(policy.read_text().replace("officer.pub", "record.pub"))
    from rlhf_audit_nb.trail import TrustPolicy

    trust = TrustPolicy.parse((place / "trust.policy").read_text())
    said = {"name": OFFICER, "role": "compliance officer", "meaning": "approved", "statement": "I have read it."}
    add_to_record(place / "record.ipynb", ATTESTATION, said, record, policy=trust)
    decision = gate(place / "model", policy)
    assert unmet(decision) == ["attestations[0]"]
    assert "a key of the trail" in decision.unmet[0].reason


def _pem(spki):
    from rlhf_audit_nb.trail.signers import load_public

    return load_public(spki).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def test_a_rejection_refuses_even_where_nothing_else_was_asked_of_people(place, keys):
    policy = asked(place, keys, "git: clean")
    assert gate(place / "model", policy).passed
    sign(place, keys["officer"], meaning="rejected")
    decision = gate(place / "model", policy)
    assert unmet(decision) == ["attestations.rejected"]
    sign(place, keys["officer"])
    assert gate(place / "model", policy).passed


def test_a_rejection_in_another_copy_of_the_record_counts(place, keys):
    policy = asked(place, keys)
    shutil.copy(place / "record.ipynb", place / "bare.ipynb")
    sign(place, keys["officer"], meaning="rejected")
    (place / "record.ipynb").rename(place / "rejected.ipynb")
    shutil.copy(place / "bare.ipynb", place / "record.ipynb")
    sign(place, keys["officer"])
    decision = gate(place / "model", policy)
    assert len(decision.records) == 2  # the bare copy is one that both go on from
    assert (decision.exit_code, unmet(decision)) == (3, ["model.other_record"])
    (place / "rejected.ipynb").unlink()
    assert gate(place / "model", policy).passed


def test_a_rejection_of_another_record_of_the_files_is_known_to_the_trail_where_that_record_is_cut_or_gone(
    tmp_path, keys, monkeypatch
):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    first = make_record(tmp_path, Story())
    make_record(tmp_path, Story(run="e" * 32), name="second.ipynb")
    (tmp_path / "model" / "model.sig").unlink()  # each of the two has signed the same files
    policy, second = asked(tmp_path, keys, "git: clean"), tmp_path / "second.ipynb"
    bare = second.read_bytes()
    attest_record(second, keys["officer"], name=OFFICER, role="compliance officer", statement="No.", meaning="rejected",
                  policy=first.trust)  # fmt: skip
    with Trail.open(first.trail) as trail:
        enter_attestations(trail, open_record(second, policy=first.trust), policy=first.trust)
    second.write_bytes(bare)
    cut = gate(first.model, policy, trail=first.trail)
    second.unlink()
    gone = gate(first.model, policy, trail=first.trail)
    second.write_bytes(bare.replace(b"done", b"dome"))
    changed = gate(first.model, policy, trail=first.trail)
    for decision, code in ((cut, 3), (gone, 3), (changed, 40)):
        assert (decision.exit_code, [one.id for one in decision.findings]) == (code, ["model.other_record"])
    # What the record itself is there to answer, its own additions do.
    second.write_bytes(bare)
    for meaning in ("rejected", "approved"):
        attest_record(second, keys["officer"], name=OFFICER, role="compliance officer", statement="So.",
                      meaning=meaning, policy=first.trust)  # fmt: skip
    assert not gate(first.model, policy, trail=first.trail).passed  # the first rejection is not among them
    with Trail.open(first.trail) as trail:
        enter_attestations(trail, open_record(second, policy=first.trust), policy=first.trust)
    second.unlink()
    assert gate(first.model, policy, trail=first.trail).passed  # the trail's own last word is the approval


def test_a_rejection_that_was_taken_out_of_every_copy_is_known_to_the_trail(place, keys):
    policy = asked(place, keys)
    sign(place, keys["officer"])
    before = (place / "record.ipynb").read_bytes()
    sign(place, keys["officer"], meaning="rejected")
    with Trail.open(place / "audit") as trail:
        enter_attestations(trail, open_record(place / "record.ipynb"))
    assert unmet(gate(place / "model", policy)) == ["attestations.rejected", "attestations[0]"][::-1]
    (place / "record.ipynb").write_bytes(before)
    assert gate(place / "model", policy).passed
    decision = gate(place / "model", policy, trail=place / "audit")
    assert unmet(decision) == ["attestations.missing"]
    assert "rejected as compliance officer" in decision.unmet[0].reason


def test_a_signature_can_have_to_be_young_for_a_purpose_and_in_the_trail(place, keys):
    lines = "attestations:", "  - {role: compliance officer, purpose: deployment, max_age: 30 days, in_trail: true}"
    policy = asked(place, keys, *lines)
    sign(place, keys["officer"], purpose="deployment")
    assert unmet(gate(place / "model", policy, trail=place / "audit")) == ["attestations[0]"]
    with Trail.open(place / "audit") as trail:
        enter_attestations(trail, open_record(place / "record.ipynb"))
    assert gate(place / "model", policy, trail=place / "audit").passed
    assert unmet(gate(place / "model", policy)) == ["attestations[0]"]
    later = gate(place / "model", policy, trail=place / "audit", now=time.time() + 31 * 86_400)
    assert unmet(later) == ["attestations[0]"]
    policy.write_text(policy.read_text().replace("purpose: deployment", "purpose: research"))
    assert unmet(gate(place / "model", policy, trail=place / "audit")) == ["attestations[0]"]


def test_two_signatures_of_one_person_are_one_persons(place, keys):
    lines = "attestations:", "  - {role: compliance officer}", "  - {role: compliance officer, meanings: [reviewed]}"
    policy = asked(place, keys, *lines)
    sign(place, keys["officer"])
    sign(place, keys["officer"], meaning="reviewed", purpose="deployment")
    decision = judge_record(place / "record.ipynb", policy)
    assert len([name for name in unmet(decision) if name.startswith("attestations[")]) == 1


# --- reproductions ---------------------------------------------------------------------------------------------------


def reproduce(place, signer, verdict="identical", **other):
    """What `rlhf-audit reproduce` adds to a record, in little."""
    opened = open_record(place / "record.ipynb")
    told = {
        "record": opened.sealed.record, "origin": opened.verdict.origin, "digest": opened.sealed.digest,
        "statement": "0" * 64, "verdict": verdict, "compared": {"weights": 2, "metrics": 3}, **other,
    }  # fmt: skip
    event = RecordReproduced(**told)
    add_to_record(place / "record.ipynb", REPRODUCTION, json.loads(encode_body(event)), signer)
    return event


IDENTICAL = f"reproduced: {{verdict: identical, by: [{OFFICER}]}}"
EQUAL = f"reproduced: {{verdict: equal, tolerance: 0.01, by: [{OFFICER}]}}"


@pytest.mark.parametrize(
    ("line", "said", "met"),
    [
        (IDENTICAL, {}, True),
        (EQUAL, {}, True),
        (IDENTICAL, {"verdict": "equal within tolerance", "tolerance": {"metrics": 0.001}}, False),
        (EQUAL, {"verdict": "equal within tolerance", "tolerance": {"metrics": 0.01}}, True),
        (EQUAL, {"verdict": "equal within tolerance", "tolerance": {"metrics": 0.02}}, False),
        (EQUAL, {"verdict": "equal within tolerance", "tolerance": {"weights": "any"}}, False),
        (EQUAL, {"verdict": "equal within tolerance", "tolerated": {"weights": 1}}, False),
        (EQUAL, {"verdict": "different", "different": {"metrics": 1}, "first": "metrics"}, False),
        (IDENTICAL, {"compared": {}}, False),
        (IDENTICAL, {"different": {"metrics": 1}}, False),
        (IDENTICAL, {"verdict": "splendid"}, False),
    ],
)
def test_a_reproduction_counts_as_far_as_the_policy_lets_it(place, keys, line, said, met):
    policy = asked(place, keys, line)
    assert unmet(gate(place / "model", policy)) == ["reproduced"]
    reproduce(place, keys["officer"], **said)
    decision = gate(place / "model", policy)
    assert decision.passed is met
    assert met or set(unmet(decision)) <= {"reproduced", "reproduced.different"}


def test_only_those_count_whom_the_policy_names_and_their_last_word(place, keys):
    policy = asked(place, keys, IDENTICAL)
    reproduce(place, keys["stranger"])
    with Trail.open(place / "audit") as trail:
        reproduce(place, trail.keys.record)
    assert unmet(gate(place / "model", policy)) == ["reproduced"]
    own = asked(place, keys, "reproduced: {verdict: identical, by: [trail]}")
    assert gate(place / "model", own).passed
    reproduce(place, keys["officer"], "different", different={"weights": 1})
    assert gate(place / "model", own).passed
    policy = asked(place, keys, f"reproduced: {{verdict: identical, by: [trail, {OFFICER}]}}")
    assert unmet(gate(place / "model", policy)) == ["reproduced.different"]
    reproduce(place, keys["officer"])
    assert gate(place / "model", policy).passed


def test_a_reproduction_that_came_out_different_is_known_to_the_trail(place, keys):
    policy = asked(place, keys, IDENTICAL)
    event = reproduce(place, keys["officer"])
    assert gate(place / "model", policy, trail=place / "audit").passed
    with Trail.open(place / "audit") as trail:
        other = msgspec.structs.replace(event, verdict="different", first="weights")
        trail.append(other.TYPE, encode_body(other)).wait()
    assert unmet(gate(place / "model", policy, trail=place / "audit")) == ["reproduced.different"]


def test_a_signature_that_was_changed_makes_the_record_invalid(place, keys):
    policy = asked(place, keys)
    sign(place, keys["officer"])
    notebook = json.loads((place / "record.ipynb").read_text())
    signature = notebook["metadata"]["rlhf_audit"]["additions"][0]["signatures"][0]
    signature["sig"] = signature["sig"][:20] + ("A" if signature["sig"][20] != "A" else "B") + signature["sig"][21:]
    (place / "record.ipynb").write_text(json.dumps(notebook))
    decision = gate(place / "model", policy)
    assert decision.exit_code == 40
    assert decision.unmet[0].where.startswith("metadata.rlhf_audit.additions[0]")
