"""The golden files: every case is accepted or refused as its folder's name says, and gives what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import metamorphic_log
import pytest

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.checkpoint import parse_checkpoint
from rlhf_audit_nb.trail.merkle import leaf_hash
from rlhf_audit_nb.trail.note import parse_note, verify_note
from rlhf_audit_nb.trail.policy import TrustPolicy
from rlhf_audit_nb.trail.proof import format_proof, parse_proof
from rlhf_audit_nb.trail.statement import ed25519_message, mldsa44_message
from rlhf_audit_nb.trail.vkey import COSIGNATURE, ED25519, format_vkey, parse_vkey

VECTORS = Path(__file__).parents[1] / "vectors" / "trail"
FORMATS = ("vkey", "note", "cosignature", "checkpoint", "proof", "policy")
CASES = sorted(path for form in FORMATS for path in (VECTORS / form).iterdir())


def read_vkey(case: Path) -> dict[str, Any]:
    text = (case / "vkey").read_bytes().decode()
    key = parse_vkey(text)
    assert format_vkey(key) == text
    return {"name": key.name, "type": key.algorithm, "key_id": key.key_id.hex(), "public": key.public.hex()}


def read_note(case: Path) -> dict[str, Any]:
    data = (case / "note").read_bytes()
    note = parse_note(data)
    assert note.format().encode() == data
    keys = [parse_vkey(line) for line in (case / "vkeys").read_text().splitlines()]
    return {
        "verified": [
            {
                "name": item.verifier.name,
                "type": item.verifier.algorithm,
                "key_id": item.verifier.key_id.hex(),
                "time": item.time,
            }
            for item in verify_note(note, keys)
        ]
    }


def read_cosignature(case: Path) -> dict[str, Any]:
    says = read_note(case)
    last = says["verified"][-1]
    text = parse_note((case / "note").read_bytes()).text
    if last["type"] == COSIGNATURE:
        message = ed25519_message(text, last["time"])
    else:
        message = mldsa44_message(last["name"], parse_checkpoint(text), last["time"])
    return says | {"message": message.hex()}


def read_checkpoint(case: Path) -> dict[str, Any]:
    text = (case / "checkpoint").read_bytes().decode()
    head = parse_checkpoint(text)
    assert head.format() == text
    return {"origin": head.origin, "size": head.size, "root": head.root.hex(), "extensions": list(head.extensions)}


def read_proof(case: Path) -> dict[str, Any]:
    data = (case / "evidence.tlog-proof").read_bytes()
    proof = parse_proof(data)
    assert format_proof(proof).encode() == data
    head = TrustPolicy.parse((case / "policy").read_bytes()).check(proof.checkpoint).checkpoint
    if not proof.check(leaf_hash((case / "entry").read_bytes())):
        raise FormatError("The entry is not included.")
    return {"origin": head.origin, "size": head.size, "index": proof.index}


def read_policy(case: Path) -> dict[str, Any]:
    policy = TrustPolicy.parse((case / "policy").read_bytes())
    assert TrustPolicy.parse(policy.format()) == policy
    checked = policy.check((case / "note").read_bytes())
    return {"cosigned": checked.cosigned, "split_view_unsafe": policy.split_view_unsafe}


READERS = {
    "vkey": read_vkey,
    "note": read_note,
    "cosignature": read_cosignature,
    "checkpoint": read_checkpoint,
    "proof": read_proof,
    "policy": read_policy,
}


@pytest.mark.parametrize("case", CASES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_golden_case_is_what_its_folder_says(case):
    read = READERS[case.parent.name]
    if case.name.endswith("_fail"):
        with pytest.raises(FormatError):
            read(case)
        return
    says = json.loads((case / "case.json").read_text())
    assert says.pop("about")
    assert read(case) == says


def test_every_format_has_cases_of_both_verdicts():
    for form in FORMATS:
        failing = [path.name.endswith("_fail") for path in CASES if path.parent.name == form]
        assert sum(failing) >= 8
        assert failing.count(False) >= 4


def test_another_implementation_says_the_same_of_the_notes_that_it_can_read():
    """It reads Ed25519 alone, and it counts a line twice that stands twice, which we refuse."""
    ours_alone = {"twice_fail"}
    checked = 0
    for case in CASES:
        keys = (case / "vkeys").read_text().splitlines() if (case / "vkeys").exists() else []
        if case.parent.name != "note" or case.name in ours_alone or len(keys) != 1:
            continue
        if parse_vkey(keys[0]).algorithm != ED25519:
            continue
        try:
            text = (case / "note").read_bytes().decode()
            metamorphic_log.verify_signed_note(text, keys)
            accepted = True
        except (UnicodeDecodeError, metamorphic_log.VerifyError):
            accepted = False
        assert accepted is not case.name.endswith("_fail"), case.name
        checked += 1
    assert checked >= 10


def test_the_golden_files_are_what_their_maker_makes(tmp_path):
    """Made anew from the specifications, without this package, they come out to the byte."""
    result = subprocess.run(
        [sys.executable, "-I", str(VECTORS / "make.py"), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "rlhf_audit_nb" not in (VECTORS / "make.py").read_text()

    def tree(folder: Path) -> dict[str, bytes]:
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for form in FORMATS
            for path in (folder / form).rglob("*")
            if path.is_file()
        }

    made, kept = tree(tmp_path), tree(VECTORS)
    assert sorted(made) == sorted(kept)
    assert [name for name in made if made[name] != kept[name]] == []
