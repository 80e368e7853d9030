"""A record is proven by the file and a public key, and whatever is changed in it is named by its place."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from records_support import Made, policy_of, write_notebook
from support.mutations import leaves, names, spelled

from rlhf_audit_nb.errors import KeyFileError, RecordError
from rlhf_audit_nb.records import OpenedRecord, open_record, read_record, run_notebook, verify_record
from rlhf_audit_nb.records.normal_form import canonical_json
from rlhf_audit_nb.records.session import Outcome, RecordSession
from rlhf_audit_nb.trail import Level, Trail, TrustPolicy

SEAL = "metadata.rlhf_audit"


def check(made: Made, data: bytes | dict[str, Any], home: Path) -> OpenedRecord:
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    return read_record(text, policy=made.policy, home=home)


def places(opened: OpenedRecord) -> list[str]:
    return [reason.where for reason in opened.verdict.reasons]


# -- what holds -------------------------------------------------------------------------------------------------


def test_a_record_verifies_elsewhere_with_the_file_and_a_policy_alone(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moved = tmp_path / "elsewhere.ipynb"
    moved.write_bytes(made.data)
    opened = open_record(moved, policy=TrustPolicy.parse(made.policy.format()), home=tmp_path / "home")
    assert opened.verdict.level is Level.UNANCHORED
    assert opened.verdict.reasons == ()
    assert opened.verdict.exit_code() == 0
    assert opened.verdict.signers == made.policy.log_keys
    assert [run.status for run in opened.verdict.runs] == ["completed"]
    assert verify_record(moved, policy=made.policy, home=tmp_path / "home") == opened.verdict


def test_on_the_machine_that_made_it_the_own_key_serves(made):
    assert verify_record(made.path, home=made.home).level is Level.UNANCHORED


def test_what_an_opened_record_holds(made, tmp_path):
    opened = check(made, made.data, tmp_path)
    kinds = [entry.type for entry in opened.entries]
    assert kinds[0] == "trail.created"
    assert kinds[-1] == "record.sealed"
    assert kinds.count("record.cell") == 10  # nine of the notebook and the injected parameters
    assert kinds.count("train.step") == 3
    assert opened.started.parameters == {"epsilon": 2.5, "name": 'é "quoted"', "steps": 3}
    assert opened.sealed.status == "completed"
    assert opened.metadata["record"] == made.result.record
    nbformat.validate(opened.notebook)
    assert (
        opened.notebook.cells[6].source
        == "import sys\nprint('one')\nprint('50%\\r100%', file=sys.stderr)\n{'value': epsilon, 'name': name}"
    )


def test_an_output_that_was_updated_later_is_a_note_and_no_fault(made, tmp_path):
    opened = check(made, made.data, tmp_path)
    assert [note.code for note in opened.notes if note.code != "head-unchecked"] == ["output-updated"]
    cell = opened.notebook.cells[5]
    assert "done" in cell.outputs[0].data["text/html"]


def test_the_envelope_is_accepted_by_securesystemslib(made):
    dsse = pytest.importorskip("securesystemslib.dsse", reason="securesystemslib is not installed")
    from cryptography.hazmat.primitives.serialization import load_der_public_key
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import SSlibKey

    seal = made.notebook["metadata"]["rlhf_audit"]
    created = json.loads(base64.b64decode(seal["entries"][0]["data"]))["body"]
    spki = base64.b64decode(created["record_key"])
    keyid = hashlib.sha256(spki).hexdigest()
    assert seal["statement"]["signatures"][0]["keyid"] == keyid
    key = SSlibKey.from_crypto(load_der_public_key(spki), keyid=keyid)
    assert keyid in dsse.Envelope.from_dict(copy.deepcopy(seal["statement"])).verify([key], 1)
    other = copy.deepcopy(seal["statement"])
    other["payload"] = base64.b64encode(base64.b64decode(other["payload"]) + b" ").decode()
    with pytest.raises(VerificationError):
        dsse.Envelope.from_dict(other).verify([key], 1)


def test_the_statement_is_in_toto_and_slsa_to_in_totos_own_library(made, tmp_path):
    statements = pytest.importorskip("in_toto_attestation.v1.statement", reason="in-toto-attestation is not installed")
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2

    statement = check(made, made.data, tmp_path).statement
    statements.Statement.copy_from_pb(json_format.ParseDict(statement, statement_pb2.Statement())).validate()
    provenance = json_format.ParseDict(statement["predicate"], provenance_pb2.Provenance())
    assert provenance.run_details.metadata.invocation_id == made.result.record
    names = [item.name for item in provenance.build_definition.resolved_dependencies]
    assert names == ["notebook-source", "data:train", "model:base"]
    assert [item.name for item in provenance.run_details.byproducts] == [
        "checkpoint",
        "entries",
        "outcome",
        "cells",
        "weights:model",
    ]


def test_an_independent_implementation_agrees_with_the_checkpoint_and_the_proofs(made):
    metamorphic = pytest.importorskip("metamorphic_log", reason="metamorphic-log is not installed")
    seal = made.notebook["metadata"]["rlhf_audit"]
    note, keys = seal["checkpoint"], list(made.policy.log_keys)
    assert metamorphic.checkpoint_verify(note, keys).size == len(seal["entries"])
    for entry in seal["entries"]:
        leaf = hashlib.sha256(b"\0" + base64.b64decode(entry["data"])).digest()
        proof = [base64.b64decode(node) for node in entry["proof"]]
        metamorphic.checkpoint_verify_inclusion(note, keys, entry["index"], leaf, proof)


# -- unchanged re-saves -----------------------------------------------------------------------------------------


def _by_nbformat(data: bytes) -> bytes:
    return nbformat.writes(nbformat.reads(data.decode(), as_version=4)).encode()


def _reversed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _reversed(value[key]) for key in reversed(list(value))}
    return [_reversed(item) for item in value] if isinstance(value, list) else value


RESAVES = {
    "nbformat": _by_nbformat,
    "nbformat, twice": lambda data: _by_nbformat(_by_nbformat(data)),
    "four spaces, ascii": lambda data: json.dumps(json.loads(data), indent=4).encode(),
    "no spaces, keys backwards": lambda data: json.dumps(_reversed(json.loads(data)), separators=(",", ":")).encode(),
    "tabs, utf-8, windows lines": lambda data: (
        json.dumps(json.loads(data), indent="\t", ensure_ascii=False).replace("\n", "\r\n").encode()
    ),
}


@pytest.mark.parametrize("name", RESAVES)
def test_an_unchanged_resave_is_not_a_change(made, tmp_path, name):
    again = RESAVES[name](made.data)
    assert name.startswith("nbformat") or again != made.data
    opened = check(made, again, tmp_path)
    assert (opened.verdict.level, opened.verdict.reasons) == (Level.UNANCHORED, ())


def test_a_kernel_that_an_editor_connected_is_a_note_and_no_fault(made, tmp_path):
    nb = made.notebook
    nb["metadata"]["kernelspec"]["display_name"] = "Another Python"
    assert places(check(made, nb, tmp_path)) == ["metadata.kernelspec.display_name"]
    nb["metadata"]["language_info"].update(version="3.13.1", codemirror_mode={"name": "ipython", "version": 3})
    opened = check(made, nb, tmp_path)
    assert opened.verdict.level is Level.UNANCHORED
    assert "kernel-name" in [note.code for note in opened.notes]


# -- one byte ---------------------------------------------------------------------------------------------------


def test_white_space_between_values_is_no_change(made, tmp_path):
    data = made.data.replace(b'\n "cells"', b'\n\t"cells"', 1)
    assert data != made.data
    assert check(made, data, tmp_path).verdict.level is Level.UNANCHORED


def test_every_value_in_the_file_counts(made, tmp_path):
    """Each string, number and flag of the file, changed a little, is caught and named: none is carried along."""
    for path, value in list(leaves(made.notebook)):
        nb = made.notebook
        target = nb
        for part in path[:-1]:
            target = target[part]
        if isinstance(value, str):
            target[path[-1]] = value[:-1] + ("B" if value[-1:] != "B" else "C")
        elif isinstance(value, bool) or value is None:
            target[path[-1]] = 1
        else:
            target[path[-1]] = value * 2 + 1
        opened = check(made, nb, tmp_path)
        assert opened.verdict.level is Level.INVALID, path
        assert any(names(where, spelled(path)) for where in places(opened)), (path, places(opened))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.33, 0.5, 0.77, 0.95, 0.9999])
def test_a_truncated_record_is_invalid_and_says_so(made, tmp_path, share):
    opened = check(made, made.data[: int(len(made.data) * share)], tmp_path)
    assert opened.verdict.level is Level.INVALID
    (reason,) = opened.verdict.reasons
    assert (reason.code, reason.where) == ("not-json", "file")
    assert "ends too early" in reason.message


# -- larger changes ---------------------------------------------------------------------------------------------


def _edit(nb: dict[str, Any], path: str, value: Any) -> None:
    *head, last = [int(part) if part.isdigit() else part for part in re.findall(r"\w+", path)]
    target: Any = nb
    for part in head:
        target = target[part]
    if value is None:
        del target[last]
    elif callable(value):
        target[last] = value(target[last])
    else:
        target[last] = value


FORGERIES = {
    "an output in the words of the attacker": ("cells[6].outputs[0].text", ["two\n"], "cells[6].outputs[0]"),
    "a source that never ran": ("cells[4].source", "x = 1", "cells[4].source"),
    "an execution count": ("cells[4].execution_count", 99, "cells[4].execution_count"),
    "a hidden output": ("cells[6].metadata.jupyter", {"outputs_hidden": True}, "cells[6].metadata.jupyter"),
    "a parameter in the metadata": (
        "metadata.papermill.parameters.epsilon",
        1.0,
        "metadata.papermill.parameters.epsilon",
    ),
    "a seal without statement": (f"{SEAL}.statement", None, SEAL),
    "a field that the format does not have": (f"{SEAL}.comment", "trust me", SEAL),
    "a signature list that is empty": (f"{SEAL}.statement.signatures", [], f"{SEAL}.statement.signatures"),
    "two signatures": (f"{SEAL}.statement.signatures", lambda s: s * 2, f"{SEAL}.statement.signatures"),
    "base64 without padding": (
        f"{SEAL}.statement.signatures[0].sig",
        lambda s: s.rstrip("="),
        f"{SEAL}.statement.signatures[0].sig",
    ),
    "base64 with a line break": (f"{SEAL}.entries[1].data", lambda s: s[:8] + "\n" + s[8:], f"{SEAL}.entries[1].data"),
    "base64 with spare bits": (
        f"{SEAL}.statement.signatures[0].sig",
        lambda s: s[:-3] + chr(ord(s[-3]) + 1) + "==",
        f"{SEAL}.statement.signatures[0].sig",
    ),
    "an entry that is left out": (f"{SEAL}.entries[5]", None, f"{SEAL}.entries"),
    "an entry that stands twice": (f"{SEAL}.entries", lambda e: [*e[:3], e[2], *e[3:]], f"{SEAL}.entries[3].index"),
    "entries in another order": (f"{SEAL}.entries", lambda e: [e[1], e[0], *e[2:]], f"{SEAL}.entries[1].index"),
    "no entries at all": (f"{SEAL}.entries", [], f"{SEAL}.entries"),
    "the trail's beginning left out": (f"{SEAL}.entries[0]", None, f"{SEAL}.entries"),
    "half a surrogate pair": ("cells[0].source", "\ud800", "cells[0].source"),
    "half a surrogate pair in a key": ("cells[0].metadata", {"\udfff": 1}, "cells[0].metadata"),
    "an index that no machine word holds": (f"{SEAL}.entries[5].index", 10**30, f"{SEAL}.entries[5]"),
    "an index beyond the tree": (f"{SEAL}.entries[5].index", 10**9, f"{SEAL}.entries"),
    "a shorter proof": (f"{SEAL}.entries[5].proof", lambda p: p[:-1], f"{SEAL}.entries[5]"),
    "a version of the future": (f"{SEAL}.version", 3, f"{SEAL}.version"),
    "another record's id": (f"{SEAL}.record", "0" * 32, f"{SEAL}.record"),
    "no seal": (SEAL, None, SEAL),
    "a seal that is a list": (SEAL, [], SEAL),
    "a checkpoint without signature": (
        f"{SEAL}.checkpoint",
        lambda n: n.split("\n\n")[0] + "\n\n",
        f"{SEAL}.checkpoint",
    ),
    "a second, unknown signature": (
        f"{SEAL}.checkpoint",
        lambda n: n + "— someone " + base64.b64encode(bytes(68)).decode() + "\n",
        f"{SEAL}.checkpoint",
    ),
    "no cells": ("cells", None, "cells"),
    "cells that are no objects": ("cells[0]", "x", "cells[0]"),
    "a cell without id": ("cells[2].id", None, "cells[2].id"),
    "two cells of one id": ("cells[2].id", lambda _: "cell-2", "cells[3].id"),
    "outputs that are text": ("cells[6].outputs", "done", "cells[6].outputs"),
    "metadata that is a list": ("metadata", [], "metadata"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_is_invalid_and_its_place_is_named(made, tmp_path, name):
    path, value, where = FORGERIES[name]
    nb = made.notebook
    if name == "two cells of one id":
        nb["cells"][2]["id"] = nb["cells"][3]["id"]
    else:
        _edit(nb, path, value)
    opened = check(made, nb, tmp_path)
    assert opened.verdict.level is Level.INVALID
    assert any(place.startswith(where) for place in places(opened)), places(opened)


def test_both_cells_of_one_id_are_named_since_either_may_be_the_changed_one(made, tmp_path):
    nb = made.notebook
    nb["cells"][2]["id"] = nb["cells"][3]["id"]
    assert places(check(made, nb, tmp_path)) == ["cells[2].id", "cells[3].id"]


def test_cells_that_are_added_removed_or_moved_are_named(made, tmp_path):
    for change, code in (
        (
            lambda cells: cells.insert(2, {"cell_type": "markdown", "id": "n", "metadata": {}, "source": "new"}),
            "cell-added",
        ),
        (lambda cells: cells.pop(3), "cell-removed"),
        (lambda cells: cells.append(cells.pop(0)), "cell-moved"),
    ):
        nb = made.notebook
        change(nb["cells"])
        assert code in [reason.code for reason in check(made, nb, tmp_path).verdict.reasons]


def test_a_marker_in_papermills_words_cannot_be_smuggled_in(made, tmp_path):
    nb = made.notebook
    tags = {"tags": ["papermill-error-cell-tag"]}
    nb["cells"].insert(0, {"cell_type": "markdown", "id": "m", "metadata": tags, "source": "<b>All is well</b>"})
    assert places(check(made, nb, tmp_path)) == ["cells[0]"]


def test_a_live_widget_cannot_be_added(made, tmp_path):
    nb = made.notebook
    nb["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    assert check(made, nb, tmp_path).verdict.level is Level.UNANCHORED
    nb["cells"][5]["outputs"][0]["data"]["application/vnd.jupyter.widget-view+json"] = {"model_id": "m"}
    assert places(check(made, nb, tmp_path)) == ["cells[5].outputs[0]"]


def test_two_records_cannot_be_mixed(made, tmp_path, monkeypatch):
    """The seal of one run does not fit the notebook of another, nor one's statement the other's entries."""
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(made.home))
    write_notebook(tmp_path / "n.ipynb", ["1 + 1"])
    run_notebook(tmp_path / "n.ipynb", tmp_path / "o.ipynb", trail=made.path.parent / "audit")
    other = json.loads((tmp_path / "o.ipynb").read_bytes())
    nb = made.notebook
    nb["metadata"]["rlhf_audit"] = other["metadata"]["rlhf_audit"]
    assert check(made, nb, tmp_path).verdict.level is Level.INVALID
    nb = made.notebook
    nb["metadata"]["rlhf_audit"]["statement"] = other["metadata"]["rlhf_audit"]["statement"]
    assert check(made, nb, tmp_path).verdict.level is Level.INVALID
    assert check(made, other, tmp_path).verdict.level is Level.UNANCHORED


# -- keys and heads ---------------------------------------------------------------------------------------------


def test_without_a_key_the_error_names_the_policy(made, tmp_path):
    with pytest.raises(KeyFileError, match="--policy"):
        verify_record(made.path, home=tmp_path)


def test_a_policy_with_another_key_makes_the_record_invalid(made, tmp_path):
    with Trail.open(tmp_path / "audit", home=tmp_path / "home") as other:
        stranger = TrustPolicy.of(other.log_vkey)
    (reason,) = verify_record(made.path, policy=stranger, home=tmp_path).reasons
    assert (reason.code, reason.where) == ("untrusted-log", f"{SEAL}.checkpoint")


def test_a_policy_with_another_key_of_the_same_name_makes_the_record_invalid(made, tmp_path):
    origin = made.policy.logs[0].name
    with Trail.open(tmp_path / "audit", origin=origin, home=tmp_path / "home") as other:
        stranger = TrustPolicy.of(other.log_vkey)
    verdict = verify_record(made.path, policy=stranger, home=tmp_path)
    assert verdict.level is Level.INVALID
    assert verdict.reasons[0].where == f"{SEAL}.checkpoint"


def test_a_changed_record_is_invalid_even_where_no_key_is_known(made, tmp_path):
    nb = made.notebook
    nb["cells"][0]["source"] = "other"
    assert places(read_record(json.dumps(nb).encode(), home=tmp_path))[0] == "cells[0].source"


def test_a_head_of_the_same_size_and_another_root_is_a_divergence(made, tmp_path):
    """Two histories under one key: the verifier has seen one of them, and is shown the other."""

    def record(folder: Path, text: str) -> bytes:
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text, id="a")])
        session = RecordSession.begin(nb, {"name": "k", "language": "r", "display_name": "K"}, folder)
        session.seal(nb, Outcome("completed"))
        session.close()
        return nbformat.writes(nb).encode()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
        with Trail.open(tmp_path / "one"):
            pass
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        shutil.copytree(tmp_path / "home", tmp_path / "home2")
        first = record(tmp_path / "one", "one")
        patch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home2"))
        second = record(tmp_path / "two", "two")
    policy, verifier = policy_of(tmp_path / "one"), tmp_path / "verifier"
    assert read_record(first, policy=policy, home=verifier).verdict.level is Level.UNANCHORED
    opened = read_record(second, policy=policy, home=verifier)
    assert opened.verdict.level is Level.DIVERGED
    assert opened.verdict.exit_code() == 30
    assert places(opened) == [f"{SEAL}.checkpoint"]
    assert read_record(second, policy=policy, home=tmp_path / "fresh").verdict.level is Level.UNANCHORED


def test_a_larger_head_is_compared_through_the_trail_where_it_is_here(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(made.home))
    with Trail.open(made.path.parent / "audit") as trail:
        trail.append("card.created", b"{}").wait()
    assert [n.code for n in open_record(made.path).notes] == ["output-updated"]
    away = tmp_path / "away.ipynb"
    away.write_bytes(made.data)
    assert [n.code for n in open_record(away).notes] == ["output-updated", "head-unchecked"]


def test_a_container_of_another_kind_is_a_change_though_it_holds_the_same(made, tmp_path):
    nb = made.notebook
    index = next(i for i, cell in enumerate(nb["cells"]) if len(cell.get("outputs", [])) == 1)
    output = nb["cells"][index]["outputs"][0]
    joined = {name: "".join(text) for name, text in output.get("data", {}).items()}
    nb["cells"][index]["outputs"] = {**output, **({"data": joined} if joined else {"text": "".join(output["text"])})}
    opened = check(made, nb, tmp_path)
    assert (opened.verdict.level, places(opened)) == (Level.INVALID, [f"cells[{index}].outputs"])


@pytest.mark.parametrize("value", [False, 0, "", [], None])
def test_attachments_that_are_no_object_are_a_change(made, tmp_path, value):
    nb = made.notebook
    nb["cells"][0]["attachments"] = value
    opened = check(made, nb, tmp_path)
    assert (opened.verdict.level, places(opened)) == (Level.INVALID, ["cells[0].attachments"])


def test_a_missing_file_is_an_error_and_no_verdict(tmp_path):
    with pytest.raises(RecordError, match="cannot be read"):
        open_record(tmp_path / "none.ipynb")


@pytest.mark.parametrize(
    "text", [b"", b"\x00\xff", b"[]", b"null", b"{}", b'{"cells": []}', b"[" * 200_000, b"[" * 900 + b"]" * 900]
)
def test_a_file_that_is_no_notebook_is_invalid(tmp_path, text):
    opened = read_record(text, home=tmp_path)
    assert opened.verdict.level is Level.INVALID
    assert opened.notebook is None
    assert len(opened.verdict.reasons) == 1


def test_an_executed_notebook_without_a_seal_says_that_it_has_none(made, tmp_path):
    nb = made.notebook
    del nb["metadata"]["rlhf_audit"]
    (reason,) = check(made, nb, tmp_path).verdict.reasons
    assert (reason.code, reason.where) == ("no-seal", SEAL)


def test_entries_are_evidence_only_when_a_trusted_checkpoint_covers_them(made, tmp_path):
    nb = made.notebook
    nb["cells"][0]["source"] = "other"
    assert check(made, nb, tmp_path).entries
    nb["metadata"]["rlhf_audit"]["entries"][3]["proof"].reverse()
    assert check(made, nb, tmp_path).entries == ()


def test_the_signed_payload_is_in_its_one_spelling(made):
    payload = base64.b64decode(made.notebook["metadata"]["rlhf_audit"]["statement"]["payload"])
    assert canonical_json(json.loads(payload)) == payload
