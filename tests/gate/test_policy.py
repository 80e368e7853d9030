"""Policies: what is read is what stands there, and what is wrong is told with its line and what to write."""

from __future__ import annotations

import hashlib
import re
import subprocess

import pytest
from gate_support import WHOLE, write_policy

from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.gate import example_policy, load_policy, parse_policy
from rlhf_audit_nb.gate.policy import FIELDS
from rlhf_audit_nb.gate.reading import is_mapping_text
from rlhf_audit_nb.trail import Level

KEY = """-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=
-----END PUBLIC KEY-----
"""
SPKI = "302a300506032b6570032100d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"


@pytest.fixture(scope="module")
def folder(place):
    (place.folder / "officer.pub").write_text(KEY)
    return place.folder


def read(folder, *lines):
    return parse_policy("\n".join(["version: 1", "trust: trust.policy", *lines]).encode(), folder)


def test_the_example_is_a_policy_as_it_stands_and_with_every_line_that_it_leaves_out(folder):
    text = example_policy()
    assert {"level", "privacy", "git"} <= parse_policy(text.encode(), folder).asked
    # What is said begins with a sign and one space; what is left out, with the sign at once or with two spaces.
    lines = [line[1:] if re.match(r"#(\S|  )", line) else line for line in text.splitlines()]
    whole = parse_policy("\n".join(lines).encode(), folder)
    assert whole.asked == set(FIELDS)
    assert whole.not_asked == ()
    assert whole.fresh.witnessed == 7 * 86_400


def test_what_is_asked_is_what_stands_there(folder):
    policy = read(
        folder, "level: COSIGNED", "fresh: {record: 2 weeks, witnessed: 36 hours}", "git: known",
        "privacy: {epsilon: 1e0, delta: 1e-5, units: [pair, label]}", "outcome: completed",
    )  # fmt: skip
    assert policy.level is Level.COSIGNED
    assert (policy.fresh.record, policy.fresh.witnessed) == (1_209_600, 129_600)
    assert (policy.privacy.epsilon, policy.privacy.delta, policy.privacy.units) == (1.0, 1e-5, ("pair", "label"))
    assert policy.git == "known"
    assert FIELDS["evidence"] in policy.not_asked
    assert FIELDS["outcome"] not in policy.not_asked


def test_the_digest_is_that_of_the_file_and_the_other_covers_what_it_names(folder):
    path = write_policy(folder, "git: clean", name="digests.yaml")
    policy = load_policy(path)
    shown = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
    assert policy.digest == shown.split()[0] == hashlib.sha256(path.read_bytes()).hexdigest()
    trust = folder / "trust.policy"
    before = trust.read_text()
    try:
        trust.write_text(f"# the same, and one who may say more\n{before}")
        assert load_policy(path).resolved == policy.resolved
        trust.write_text(before.replace("quorum none", "log example.org/x+00000000+AAAA\nquorum none"))
        with pytest.raises(ConfigError, match=r"digests.yaml, line 2, trust: trust.policy is not a trust policy"):
            load_policy(path)
    finally:
        trust.write_text(before)
    inline = "\n  ".join(["trust: |", *before.splitlines()])
    same = parse_policy(f"version: 1\n{inline}\ngit: clean\n".encode(), folder)
    assert same.resolved == policy.resolved
    assert same.digest != policy.digest


def test_people_are_known_by_their_keys(folder):
    lines = ["people:", "  - {name: Name of the officer, roles: [compliance officer], keys: [officer.pub]}"]
    (person,) = read(folder, *lines).people
    assert person.keys == (hashlib.sha256(bytes.fromhex(SPKI)).hexdigest(),)
    inline = ["people:", "  - name: Name of the officer", "    roles: [compliance officer]", "    keys:", "      - |"]
    assert read(folder, *inline, *(f"        {line}" for line in KEY.splitlines())).people == (person,)


BAD = [
    ("levle: COSIGNED", r"line 3, levle: the key 'levle' is not known; did you mean \"level\"\?"),
    ("level: COSIGNDE", r"line 3, level: 'COSIGNDE' is not known; did you mean \"COSIGNED\"\?"),
    ("git: clean\ngit: known", r"line 4, git: the key 'git' stands twice"),
    ("git: true", "line 3, git: 'true' is not known"),
    ("git:", "line 3, git: it is not clean or known"),
    ("outcome: failed", "line 3, outcome: 'failed' is not known"),
    ("fresh: {}", "line 3, fresh: it asks for nothing"),
    ("fresh: {record: 7}", "line 3, fresh.record: '7' is not a time"),
    ("fresh: {record: 0 days}", "line 3, fresh.record: '0 days' is not a time"),
    ("fresh: 7 days", "line 3, fresh: it is not a mapping"),
    ("privacy: {epsilon: 8, delta: 1e-5}", "line 3, privacy: the key 'units' is missing"),
    ("privacy: {epsilon: 0, delta: 1e-5, units: [pair]}", "privacy.epsilon: '0' is not a number above 0"),
    ("privacy: {epsilon: .inf, delta: 1e-5, units: [pair]}", "privacy.epsilon: '.inf' is not a number"),
    ("privacy: {epsilon: 1e999, delta: 1e-5, units: [pair]}", "privacy.epsilon: '1e999' is not a number"),
    ("privacy: {epsilon: .nan, delta: 1e-5, units: [pair]}", "privacy.epsilon: '.nan' is not a number"),
    (
        "privacy: {epsilon: 8, delta: 0.6, units: [pair]}",
        "privacy.delta: '0.6' is not a number above 0 and at most 0.5",
    ),
    ("privacy: {epsilon: 8, delta: 1e-5, units: []}", "privacy.units: it is not a list with something in it"),
    ("privacy: {epsilon: 8, delta: 1e-5, units: [pairs]}", r"units\[0\]: 'pairs' is not known; did you mean \"pair\""),
    ("privacy: {epsilon: 8, delta: 1e-5, units: [pair, pair]}", r"units\[1\]: 'pair' stands twice"),
    ("evaluations: {metrics: accuracy, thresholds: before result}", "metrics: it is not a list"),
    ("evaluations: {metrics: [a], thresholds: after result}", "thresholds: 'after result' is not known"),
    ("evidence: {framework: eu_ai_act, requirements: [AIA-15-5]}", r"no requirement 'AIA-15-5' .*close are AIA-15-5"),
    ("evidence: {framework: gdpr, requirements: [x]}", "evidence.framework: 'gdpr' is not known"),
    ("base_models: [abc]", r"base_models\[0\]: 'abc' is not a digest"),
    ("uncovered: [model.bin]", r"uncovered\[0\]: 'model.bin' is not known"),
    ("attestations: [{role: officer}]", r"attestations\[0\]: 1 signing as 'officer' are asked for"),
    ("people: [{name: A, roles: [x], keys: [nobody.pub]}]", r"keys\[0\]: the file nobody.pub cannot be read"),
    ("people: [{name: A, roles: [x], keys: [trust.policy]}]", r"keys\[0\]: the file trust.policy holds no public key"),
    (
        "people: [{name: A, roles: [x], keys: [officer.pub]}, {name: B, roles: [x], keys: [officer.pub]}]",
        "one key is named for A and for B",
    ),
    (
        "people: [{name: A, roles: [x], keys: [officer.pub]}, {name: a, roles: [y], keys: [officer.pub]}]",
        "a stands twice",
    ),
    (
        "people: [{name: A, roles: [x], keys: [officer.pub]}]\nattestations: [{role: x, count: 2}]",
        "2 signing as 'x' are asked for, and the policy's people hold 1",
    ),
    (
        "people: [{name: A, roles: [x, Trainer], keys: [officer.pub]}]\nattestations: [{role: x}]",
        "1 signing as 'x' are asked for, and the policy's people hold 0",
    ),
    ("reproduced: {verdict: identical, by: [B]}", r"reproduced.by\[0\]: nobody below people: is called 'B'"),
    ("reproduced: {verdict: equal, by: [trail]}", "verdict: equal goes with a tolerance"),
    ("reproduced: {verdict: identical, tolerance: 0.1, by: [trail]}", "verdict: identical goes without a tolerance"),
    ("a: &a [b]", "line 3: it holds an alias or anchor"),
    ("git: !!str clean", "line 3: it holds a tag"),
    ("---\ngit: clean", "it holds a second document"),
    ("git: [", "line 3: it is not YAML"),
]


@pytest.mark.parametrize(("line", "said"), BAD, ids=range(len(BAD)))
def test_what_is_wrong_is_told_with_its_place(folder, line, said):
    with pytest.raises(ConfigError, match=said) as refused:
        read(folder, line)
    assert refused.value.exit_code == 2
    assert refused.value.next_step
    assert str(refused.value).count("\n") == 0


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "policy.yaml is empty"),
        (b"# nothing\n", "policy.yaml is empty"),
        (b"[]", "line 1: it is not a mapping"),
        (b"trust: trust.policy\n", "the key 'version' is missing"),
        (b"version: 1\n", "the key 'trust' is missing"),
        (b"version: 2\ntrust: trust.policy\n", "line 1, version: '2' is not a version that is known here"),
        (b"version: 1\ntrust: nowhere.policy\n", "line 2, trust: the file nowhere.policy cannot be read"),
        (b"version: 1\ntrust:\n", "line 2, trust: it is not the name of a trust policy's file"),
        (b"version: 1\ntrust: officer.pub\n", "officer.pub is not a trust policy. Line 1 of the policy"),
        (b"\xff\xfe", "it is not YAML"),
        (b"version: 1\ntrust: " + b"[" * 5000, "line 2: it is nested over 12 deep"),
        (b"#" * (1 << 21), "is over 1,048,576 bytes"),
    ],
)
def test_a_policy_that_asks_for_nothing_is_none(folder, data, said):
    with pytest.raises(ConfigError, match=said):
        parse_policy(data, folder)


def test_the_logs_own_key_is_no_persons(folder, place):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = Ed25519PublicKey.from_public_bytes(place.trust.logs[0].public)
    (folder / "log.pub").write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(ConfigError, match=r"line 3, people\[0\]: the key of A is that of the log"):
        read(folder, "people: [{name: A, roles: [x], keys: [log.pub]}]")


def test_the_two_kinds_of_policy_are_told_apart_by_what_stands_in_them(place):
    assert not is_mapping_text(place.trust.format())
    assert not is_mapping_text(f"# whom to trust: the log\n\n{place.trust.format()}")
    assert not is_mapping_text("")
    assert not is_mapping_text("nonsense without a colon")
    for text in ("version: 1\n", "# a: b\n---\ntrust: x\n", "{version: 1}", '"version": 1', "levle: X"):
        assert is_mapping_text(text), text


def test_every_key_changes_what_is_asked(folder):
    """A key that is read and then forgotten would ask for nothing."""
    lines = [f"{name}: {value}" for name, value in WHOLE.items()]
    lines += ["people: [{name: A, roles: [x], keys: [officer.pub]}]", "attestations: [{role: x}]", "uncovered: [.git]"]
    lines += ["reproduced: {verdict: identical, by: [trail]}"]
    whole = read(folder, *lines)
    for line in lines:
        if not line.startswith("people"):
            assert read(folder, *(one for one in lines if one != line)).resolved != whole.resolved, line


@pytest.mark.parametrize(
    "line",
    ["fresh: {record: " + "9" * 5_000 + " days}", "level: " + "9" * 5_000, "9" * 5_000 + ": 1"],
    ids=["a-time", "a-word", "a-key"],
)
def test_a_number_without_end_is_refused_in_a_sentence(folder, line):
    with pytest.raises(ConfigError) as refused:
        read(folder, line)
    assert refused.value.reason == "gate-policy"
    assert len(str(refused.value)) < 1_000


def test_the_home_of_nobody_is_a_file_that_cannot_be_read(folder):
    with pytest.raises(ConfigError, match="~nobody-of-this-name/x cannot be read"):
        parse_policy(b"version: 1\ntrust: ~nobody-of-this-name/x\n", folder)
