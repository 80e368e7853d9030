"""10,000 changes of one byte, in every part of a record: none is missed, none is named where it is not."""

from __future__ import annotations

import json
import re

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.mutations import REGIONS, finite, names, one_byte_changes, path_of_difference

from rlhf_audit_nb.records import read_record
from rlhf_audit_nb.records.additions import add_to_record
from rlhf_audit_nb.trail import Level
from rlhf_audit_nb.trail.signers import FileKey


@pytest.fixture(scope="module")
def data(made, tmp_path_factory) -> bytes:
    """A record to which two have added something."""
    path = tmp_path_factory.mktemp("mutated") / "record.ipynb"
    path.write_bytes(made.data)
    for key in (Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())):
        add_to_record(path, "urn:example:said", {"text": "it is"}, FileKey(key), policy=made.policy, home=path.parent)
    return path.read_bytes()


@pytest.mark.slow
def test_a_changed_byte_anywhere_is_caught_and_named(made, data, tmp_path):
    before = json.loads(data)
    seen = dict.fromkeys([*REGIONS, "elsewhere", "not JSON", "spelling only"], 0)
    for position, changed in one_byte_changes(data, seed=20261123, each=680, anywhere=2000):
        opened = read_record(changed, policy=made.policy, home=tmp_path)
        named = [reason.where for reason in opened.verdict.reasons]
        try:
            after = json.loads(changed.decode(), parse_float=finite)
        except (ValueError, RecursionError):
            assert (opened.verdict.level, named) == (Level.INVALID, ["file"]), position
            seen["not JSON"] += 1
            continue
        if after == before:
            assert opened.verdict.level is Level.UNANCHORED, (position, named)
            seen["spelling only"] += 1
            continue
        path = path_of_difference(before, after)
        assert opened.verdict.exit_code() in {30, 40}, path
        assert all(reason.code and reason.where and reason.message for reason in opened.verdict.reasons)
        assert any(names(where, path) for where in named), (path, named)
        seen[next((name for name, pattern in REGIONS.items() if re.match(pattern, path)), "elsewhere")] += 1
    assert sum(seen.values()) >= 9900, seen  # some draw the byte that is there
    assert min(seen[name] for name in REGIONS) >= 100, seen
    assert seen["not JSON"] >= 100, seen
