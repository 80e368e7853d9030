"""One opening to one auditor: checked with the file and a policy alone, and opening nothing else."""

from __future__ import annotations

import base64
import json
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_audit_nb.errors import FormatError, StoreError, VaultError
from rlhf_audit_nb.trail import Level, Trail, TrailReader, TrustPolicy
from rlhf_audit_nb.trail.anchors import AnchorFolder
from rlhf_audit_nb.trail.cosignature import CosignerEd25519
from rlhf_audit_nb.trail.disclosure import (
    Disclosure,
    disclose,
    is_disclosure,
    parse_disclosure,
    verify_disclosure,
)
from rlhf_audit_nb.trail.erasure import erase
from rlhf_audit_nb.trail.note import Note, parse_note, parse_vkey
from rlhf_audit_nb.trail.vault import check_opening
from rlhf_audit_nb.trail.vault_file import Wrapping

PAGE = Path(__file__).parents[2] / "docs" / "trail" / "vault.md"
OWNERS = ("ann-7f3a", "ben-19c2")


@pytest.fixture
def disclosed(folder, home, tmp_path):
    """A trail, the disclosure of its entry 3, and a policy, with the payloads of all its entries."""
    with Trail.open(folder) as trail:
        payloads = []
        for number in range(12):
            payloads.append(b'{"choice":"%d"}' % (number * 7919))
            trail.append("a.b", b"{}", run="r", private=payloads[-1], owner=OWNERS[number % 2])
        path = tmp_path / "one.opening"
        path.write_bytes(disclose(trail, 3).encode())
        policy = TrustPolicy.of(trail.log_vkey)
    (tmp_path / "trust.policy").write_text(policy.format())
    return folder, path, policy, payloads


def test_an_auditor_checks_it_with_the_file_and_the_policy_alone(disclosed, tmp_path):
    folder, path, policy, payloads = disclosed
    verdict, payload = verify_disclosure(path, policy=policy, home=tmp_path / "of the auditor")
    assert (verdict.level, verdict.reasons) == (Level.UNANCHORED, ())
    assert (verdict.size, verdict.origin) == (13, TrailReader.open(folder).origin)
    assert payload == payloads[2]


def test_its_level_is_that_of_its_checkpoint(disclosed, tmp_path):
    folder, path, policy, _ = disclosed
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    witness = CosignerEd25519("witness.example", Ed25519PrivateKey.generate())
    reader = TrailReader.open(folder)
    note = parse_note(reader.checkpoint())
    whole = Note(note.text, (*note.signatures, witness.cosign(note, 1_800_000_000))).format()
    AnchorFolder(folder).cosign(whole)
    with Trail.open(folder) as trail:
        trail.append("a.b", b"{}", run="r")
        path.write_bytes(disclose(trail, 3).encode())
    cosigned = TrustPolicy(policy.logs, {"w": witness.verifier()}, {}, "w")
    verdict, payload = verify_disclosure(path, policy=cosigned, home=tmp_path / "h")
    assert (verdict.level, verdict.size) == (Level.COSIGNED, 13)
    assert payload
    stranger = CosignerEd25519("witness.example", Ed25519PrivateKey.generate())
    asked = TrustPolicy(policy.logs, {"w": stranger.verifier()}, {}, "w")
    verdict, payload = verify_disclosure(path, policy=asked, home=tmp_path / "h")
    assert verdict.level is Level.UNANCHORED
    assert [reason.code for reason in verdict.reasons] == ["quorum"]


def test_it_opens_nothing_else(disclosed, home):
    folder, path, _, payloads = disclosed
    said = json.loads(path.read_bytes())
    assert said.keys() == {"format", "entry", "proof", "key", "payload", "sha256"}
    key, payload = base64.b64decode(said["key"]), base64.b64decode(said["payload"])
    data = path.read_bytes() + key + payload
    with Trail.open(folder) as trail:
        master = trail.keys.master.newest.master
        wrapping = Wrapping(trail.keys.master.newest)
        raw = sqlite3.connect(folder / "vault.sqlite")
        owners = [wrapping.unwrap(wrapped, tag)[0] for tag, wrapped in raw.execute("SELECT tag, wrapped FROM owners")]
        raw.close()
        assert len(owners) == 2
        for entry in trail.reader().entries(type="a.b"):
            commitment = base64.b64decode(entry.envelope.sealed)
            opening = trail.vault.opening("a.b", "r", entry.seq, commitment)
            mine = entry.index == 3
            assert (opening.key in data or base64.b64encode(opening.key) in data) is mine
            assert (opening.payload in data) is mine
            for other in (0, 1):  # its key opens no other commitment, whatever payload is tried
                tried = type(opening)(key, payloads[other])
                assert not check_opening(commitment, "a.b", "r", entry.seq, tried)
    for secret in (*map(str.encode, OWNERS), master, *owners, *map(base64.b64encode, (master, *owners))):
        assert secret not in data


def test_every_flipped_byte_is_named(disclosed, tmp_path):
    _, path, policy, payloads = disclosed
    data = path.read_bytes()
    chance = random.Random(1)
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        verdict, payload = verify_disclosure(path, policy=policy, home=tmp_path / "h")
        assert verdict.level is Level.INVALID, at
        assert verdict.reasons
        assert payload == b""
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at])
        assert verify_disclosure(path, policy=policy, home=tmp_path / "h")[0].level is Level.INVALID
    path.write_bytes(data)
    assert verify_disclosure(path, policy=policy, home=tmp_path / "h")[1] == payloads[2]


@pytest.mark.parametrize(
    ("field", "change", "code"),
    [
        ("key", lambda value: base64.b64encode(bytes(32)).decode(), "opening-wrong"),
        ("key", lambda value: value[:-4], "opening-wrong"),
        ("payload", lambda value: base64.b64encode(b"{}").decode(), "opening-wrong"),
        ("payload", lambda value: "not base64", "base64"),
        ("entry", lambda value: value.replace('"seq":2', '"seq":4'), "inclusion"),
        ("entry", lambda value: value.replace("{}", '{"a":1}'), "inclusion"),
        ("proof", lambda value: value.replace("index 3", "index 4"), "inclusion"),
        ("proof", lambda value: value.replace("\n13\n", "\n14\n"), "signature"),
        ("proof", lambda value: "c2sp.org/tlog-proof@v1\n", "proof"),
        ("format", lambda value: "rlhf-audit/disclosure/v2", "unknown-version"),
    ],
)
def test_what_somebody_changed_on_purpose_is_named(disclosed, tmp_path, field, change, code):
    _, path, policy, _ = disclosed
    fields = json.loads(path.read_bytes())
    del fields["sha256"]
    fields[field] = change(fields[field])
    path.write_bytes(Disclosure(**fields).encode())
    verdict, payload = verify_disclosure(path, policy=policy, home=tmp_path / "h")
    assert verdict.level is Level.INVALID
    assert [reason.code for reason in verdict.reasons] == [code]
    assert payload == b""


def test_the_opening_of_one_entry_does_not_pass_for_that_of_another(disclosed, tmp_path):
    folder, path, policy, _ = disclosed
    with Trail.open(folder) as trail:
        two, other = disclose(trail, 3), disclose(trail, 5)
    path.write_bytes(Disclosure(two.format, two.entry, two.proof, other.key, other.payload).encode())
    assert verify_disclosure(path, policy=policy, home=tmp_path / "h")[0].level is Level.INVALID
    path.write_bytes(other.encode())
    assert verify_disclosure(path, policy=policy, home=tmp_path / "h")[0].level is Level.UNANCHORED


def test_a_policy_that_does_not_trust_the_log_gives_no_payload(disclosed, tmp_path, vectors):
    _, path, _, _ = disclosed
    stranger = TrustPolicy.of("example.com/rlhf-audit+8a488eff+AQOhB7/zzhC+HXDdGOdLwJln5NYwm6UNXx3chmQSVTG4")
    assert parse_vkey(stranger.log_keys[0]).name == "example.com/rlhf-audit"
    verdict, payload = verify_disclosure(path, policy=stranger, home=tmp_path / "h")
    assert (verdict.level, payload) == (Level.INVALID, b"")
    assert [reason.code for reason in verdict.reasons] == ["untrusted-log"]


def test_only_the_one_form_of_the_file_is_read(disclosed):
    _, path, _, _ = disclosed
    data = path.read_bytes()
    fields = json.loads(data)
    assert parse_disclosure(data).encode() == data
    others = [
        data + b"\n",
        data[:-1],
        json.dumps(fields).encode(),
        json.dumps({**fields, "more": 1}, separators=(",", ":")).encode() + b"\n",
        data.replace(b'"sha256":"', b'"sha256":"0'),
        b"[]",
        b"",
    ]
    for other in others:
        with pytest.raises(FormatError):
            parse_disclosure(other)


def test_what_cannot_be_disclosed_is_said(disclosed):
    folder, _, _, _ = disclosed
    with Trail.open(folder) as trail:
        trail.append("a.b", b"{}", run="r").wait()
        for index, error, code in (
            (0, VaultError, "not-private"),
            (99, StoreError, "range"),
            (-1, StoreError, "range"),
        ):
            with pytest.raises(error) as caught:
                disclose(trail, index)
            assert caught.value.reason == code
        erase(trail, OWNERS[0], reason="request")
        with pytest.raises(VaultError) as caught:
            disclose(trail, 3)
        assert (caught.value.reason, "entry 3 was erased" in caught.value.message) == ("erased", True)
        assert disclose(trail, 2).key


def test_a_disclosure_that_was_handed_out_before_an_erasure_still_checks(disclosed, tmp_path):
    folder, path, policy, payloads = disclosed
    with Trail.open(folder) as trail:
        erase(trail, OWNERS[0], reason="request")
    verdict, payload = verify_disclosure(path, policy=policy, home=tmp_path / "h")
    assert (verdict.level, payload) == (Level.UNANCHORED, payloads[2])


def test_a_checkpoint_that_contradicts_one_that_was_seen_is_diverged(disclosed, tmp_path):
    folder, path, policy, _ = disclosed
    from rlhf_audit_nb.trail.heads import Heads
    from rlhf_audit_nb.trail.note import sign_note

    with Trail.open(folder) as trail:
        text = parse_note(trail.reader().checkpoint()).text.splitlines()
        text[1:3] = ["13", base64.b64encode(bytes(32)).decode()]
        forged = sign_note("\n".join(text) + "\n", [trail.keys.signer])
    home = tmp_path / "of the auditor"
    Heads(home).advance(trail.origin, forged)
    verdict, payload = verify_disclosure(path, policy=policy, home=home)
    assert (verdict.level, payload) == (Level.DIVERGED, b"")


def test_a_disclosure_is_known_by_its_ending_or_its_first_bytes(disclosed, tmp_path):
    _, path, _, _ = disclosed
    assert is_disclosure(path)
    other = tmp_path / "renamed.json"
    other.write_bytes(path.read_bytes())
    assert is_disclosure(other)
    other.write_bytes(b"{}")
    assert not is_disclosure(other)
    assert not is_disclosure(tmp_path)
    assert not is_disclosure(tmp_path / "nothing")
    with pytest.raises(StoreError):
        verify_disclosure(tmp_path / "nothing")


def test_the_lines_in_the_documentation_check_it_without_this_package(disclosed, tmp_path):
    _, path, policy, payloads = disclosed
    block = PAGE.read_text(encoding="utf-8").split("cat > check.py <<'END'\n")[1].split("\nEND\n")[0]
    assert "rlhf_audit" not in block
    script = tmp_path / "check.py"
    script.write_text(block)

    def check(file: Path, vkey: str) -> subprocess.CompletedProcess[bytes]:
        asked = [sys.executable, "-I", str(script), str(file), vkey]
        return subprocess.run(asked, capture_output=True, cwd=tmp_path, check=False)

    vkey = policy.log_keys[0]
    done = check(path, vkey)
    assert done.returncode == 0, done.stderr.decode()
    assert payloads[2] in done.stdout
    fields = json.loads(path.read_bytes())
    changes = {
        "entry": fields["entry"].replace('"seq":2', '"seq":3'),
        "proof": fields["proof"].replace("index 3", "index 2"),
        "key": base64.b64encode(bytes(32)).decode(),
        "payload": base64.b64encode(b"{}").decode(),
    }
    for name, value in changes.items():
        path.write_text(json.dumps({**fields, name: value}))
        assert check(path, vkey).returncode != 0, name
    path.write_text(json.dumps(fields))
    assert check(path, "example.com/rlhf-audit+8a488eff+AQOhB7/zzhC+HXDdGOdLwJln5NYwm6UNXx3chmQSVTG4").returncode != 0
