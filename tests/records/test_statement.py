"""The statement says what went in and came out, and nothing but what the entries say; its version cannot be chosen."""

from __future__ import annotations

import base64
import hashlib
import json

import msgspec
import pytest
from records_support import FIXTURES, sealed_record

from rlhf_audit_nb.events import (
    CellAudited,
    CodeBound,
    CodeFiles,
    DataBound,
    DataRead,
    EnvironmentCaptured,
    FunctionBound,
    ModelBound,
    RecordSealed,
    ReferenceUsed,
    RunResumed,
    WeightsSaved,
    encode_body,
)
from rlhf_audit_nb.records import read_record
from rlhf_audit_nb.records.dsse import sign_envelope
from rlhf_audit_nb.records.statement import BUILD_TYPE, BUILD_TYPES, build_statement, encode_statement
from rlhf_audit_nb.records.statement_v1 import dependencies as first_dependencies
from rlhf_audit_nb.records.statement_v2 import dependencies, results
from rlhf_audit_nb.trail import Level, Trail, TrailReader, TrustPolicy
from rlhf_audit_nb.trail.entry import Entry
from rlhf_audit_nb.trail.keys import load_keys

DIGESTS = [f"{number:02x}" * 32 for number in range(32)]


def statement_of(name: str) -> dict:
    seal = json.loads((FIXTURES / name).read_bytes())["metadata"]["rlhf_audit"]
    return json.loads(base64.b64decode(seal["statement"]["payload"]))


def bodies_of(name: str) -> list[dict]:
    seal = json.loads((FIXTURES / name).read_bytes())["metadata"]["rlhf_audit"]
    return [json.loads(base64.b64decode(item["data"])) for item in seal["entries"]]


@pytest.mark.parametrize("name", ["seal-1/plain", "seal-2/plain", "seal-2/private", "seal-2/failed"])
def test_statements_of_both_versions_are_in_toto_and_slsa_to_in_totos_own_library(name):
    statements = pytest.importorskip("in_toto_attestation.v1.statement", reason="in-toto-attestation is not installed")
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import resource_descriptor, statement_pb2

    statement = statement_of(f"{name}.ipynb")
    statements.Statement.copy_from_pb(json_format.ParseDict(statement, statement_pb2.Statement())).validate()
    provenance = json_format.ParseDict(statement["predicate"], provenance_pb2.Provenance())
    found = [*provenance.build_definition.resolved_dependencies, *provenance.run_details.byproducts]
    assert len(found) >= 4
    for item in found:
        resource_descriptor.ResourceDescriptor.copy_from_pb(item).validate()


def test_the_second_version_names_environment_code_tokenizer_data_models_weights_and_signature():
    """Against the entries as the standard library reads them."""
    statement, bodies = statement_of("seal-2/plain.ipynb"), bodies_of("seal-2/plain.ipynb")
    body = {item["type"]: item["body"] for item in reversed(bodies)}
    build, run = statement["predicate"]["buildDefinition"], statement["predicate"]["runDetails"]
    assert build["buildType"] == "urn:rlhf-audit:notebook-record:v2"
    digests = {item["name"]: item["digest"] for item in build["resolvedDependencies"]}
    environment = body["environment.captured"]
    models = [item["body"] for item in bodies if item["type"] == "model.bound"]
    assert digests == {
        "notebook-source": {"sha256": body["record.started"]["notebook_digest"]},
        "packages": {"sha256": environment["packages_digest"]},
        "tool": {"sha256": environment["tool_digest"]},
        "code": {"gitCommit": environment["git_commit"]},
        "code:modules": {"sha256": environment["code"]["digest"]},
        "data:train": {"sha256": body["data.bound"]["digest"]},
        "model:base": {"sha256": models[0]["weights_digest"]},
        "tokenizer:base": {"sha256": models[0]["tokenizer_digest"]},
        "reference": {"sha256": body["reference.used"]["weights_digest"]},
    }
    (packages,) = [item["annotations"] for item in build["resolvedDependencies"] if item["name"] == "packages"]
    listed = json.dumps(environment["packages"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert packages["versions"] == hashlib.sha256(listed.encode()).hexdigest()
    (where,) = build["internalParameters"]["environments"]
    assert {name: where[name] for name in ("python", "hardware")} == {
        name: environment[name] for name in ("python", "hardware")
    }
    left = {item["name"]: item["digest"]["sha256"] for item in run["byproducts"]}
    cells = [base64.b64decode(item["data"]) for item in seal_entries("seal-2/plain.ipynb")]
    leaves = [hashlib.sha256(b"\0" + data).digest() for data in cells if json.loads(data)["type"] == "record.cell"]
    assert left["cells"] == hashlib.sha256(b"".join(leaves)).hexdigest()
    assert left["model:final"] == models[1]["weights_digest"]
    assert left["weights:model"] == body["weights.saved"]["digest"]
    assert left["weights-signature:model"] == body["weights.saved"]["signature_digest"]


def seal_entries(name: str) -> list[dict]:
    return json.loads((FIXTURES / name).read_bytes())["metadata"]["rlhf_audit"]["entries"]


def test_a_private_runs_data_is_named_by_the_entry_that_holds_the_commitment():
    statement = statement_of("seal-2/private.ipynb")
    (data,) = [
        item
        for item in statement["predicate"]["buildDefinition"]["resolvedDependencies"]
        if item["name"] == "data:train"
    ]
    (entry,) = [item for item in seal_entries("seal-2/private.ipynb") if item["index"] == data["annotations"]["entry"]]
    assert data["digest"]["sha256"] == hashlib.sha256(b"\0" + base64.b64decode(entry["data"])).hexdigest()
    assert data["annotations"]["committed"] is True
    assert set(data["annotations"]) == {"committed", "entry", "provenance", "run"}


EVENTS = {
    "environment without digests": (
        EnvironmentCaptured(python="3", implementation="C", platform="p", packages={"a": "1"}, hardware={}),
        ["packages"],
    ),
    "an uncommitted change": (
        EnvironmentCaptured(
            python="3", implementation="C", platform="p", packages={}, hardware={}, git_commit="a" * 40,
            git_dirty=True, git_diff=DIGESTS[1],
        ),
        ["packages", "code", "code:diff"],
    ),
    "modules imported later": (
        CodeBound(code=CodeFiles(project="git", count=1, digest=DIGESTS[2], changed=["a.py"], left_out=1)),
        ["code:modules"],
    ),
    "the cell of a run": (
        CellAudited(cell="c", execution_count=1, source_digest=DIGESTS[3], seen="first"),
        ["code:cell"],
    ),
    "what was read of a stream": (
        DataRead(role="train", batches=1, rows=2, digest=DIGESTS[4], workers=0),
        ["data-read:train"],
    ),
    "data": (DataBound(role="eval", columns=[], digest=DIGESTS[5], rows=1, revision="r"), ["data:eval"]),
    "sealed data": (DataBound(role="train", columns=[]), ["data:train"]),
    "a reward model": (
        ModelBound(
            role="reward", architecture="A", parameters=1, trainable=0, weights_digest=DIGESTS[6],
            config_digest=DIGESTS[7], tokenizer_digest=DIGESTS[8], chat_template_digest=DIGESTS[9],
        ),
        ["model:reward", "tokenizer:reward", "chat-template:reward"],
    ),
    "a final model": (
        ModelBound(
            role="final", architecture="A", parameters=1, trainable=0, weights_digest=DIGESTS[6], config_digest="",
        ),
        [],
    ),
    "a reward function": (
        FunctionBound(role="reward", position=0, name="f", kind="function", source_digest=DIGESTS[10]),
        ["function:reward"],
    ),
    "a reward model in a function's place": (
        FunctionBound(role="reward", position=0, name="m", kind="model", weights_digest=DIGESTS[11]),
        ["function:reward"],
    ),
    "a function without a source": (
        FunctionBound(role="tool", position=0, name="b", kind="built-in"),
        ["function:tool"],
    ),
    "no reference": (ReferenceUsed(role="reference", how="none"), ["reference"]),
    "a teacher": (ReferenceUsed(role="teacher", how="model", weights_digest=DIGESTS[12]), ["teacher"]),
    "a resumed training": (RunResumed(step=3, checkpoint=DIGESTS[13]), ["checkpoint"]),
    "a resumed training whose checkpoint is not known": (RunResumed(step=3), []),
}  # fmt: skip


def entries_of(*events) -> list[Entry]:
    made = []
    for index, event in enumerate(events):
        envelope = {
            "v": 1, "type": event.TYPE, "time": 1, "run": "f" * 32, "seq": index, "writer": "a" * 32,
            "body": msgspec.Raw(encode_body(event)),
        }  # fmt: skip
        made.append(Entry.decode(index, msgspec.json.encode(envelope)))
    return made


@pytest.mark.parametrize("name", EVENTS)
def test_each_input_is_named_by_its_digest_or_by_its_entry(name):
    event, names = EVENTS[name]
    (entry,) = entries_of(event)
    found = dependencies([entry])
    assert [item["name"] for item in found] == names
    own = {value for value in json.loads(entry.body).values() if isinstance(value, str)}
    own |= {json.loads(entry.body).get("code", {}).get("digest")} if isinstance(event, CodeBound) else set()
    for item in found:
        (digest,) = item["digest"].values()
        notes = item["annotations"]
        assert notes["entry"] == 0
        if notes.get("described") or notes.get("committed"):
            assert digest == hashlib.sha256(b"\0" + entry.data).hexdigest()
        elif item["name"] != "packages":
            assert digest in own


def test_saved_weights_without_a_signature_name_none():
    saved = WeightsSaved(step=1, name="m", digest=DIGESTS[1], files=1, bytes=1)
    assert [item["name"] for item in results(entries_of(saved))] == ["cells", "weights:m"]


def test_the_first_versions_statement_stays_what_it_was():
    """Of the fixtures, and of events that it does not tell of."""
    told = [item for name, (event, _) in EVENTS.items() for item in first_dependencies(entries_of(event)) if name]
    assert [item["name"] for item in told] == ["code", "data:eval", "data:train", "model:reward", "checkpoint"]
    for name in ("plain", "private", "failed", "two-signatures"):
        seal = json.loads((FIXTURES / "seal-1" / f"{name}.ipynb").read_bytes())["metadata"]["rlhf_audit"]
        entries = [Entry.decode(item["index"], base64.b64decode(item["data"])) for item in seal["entries"]]
        again = encode_statement(build_statement(seal["record"], seal["checkpoint"], entries))
        assert again == base64.b64decode(seal["statement"]["payload"])


# -- the version cannot be chosen -------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_AUDIT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with Trail.open(tmp_path / "audit", origin="example.org/records"):
        pass
    return sealed_record(tmp_path / "audit")


def faults(record, tmp_path):
    with Trail.open(tmp_path / "audit") as trail:
        policy = TrustPolicy.of(trail.log_vkey)
    found = read_record(json.dumps(record).encode(), policy=policy, home=tmp_path / "v")
    assert found.verdict.level in (Level.UNANCHORED, Level.INVALID)
    return [(reason.code, reason.where) for reason in found.verdict.reasons]


def test_a_new_record_cannot_be_told_in_the_first_version(record, tmp_path):
    """Not even by who holds the record key: the entry says which version it is."""
    assert faults(record, tmp_path) == []
    seal = record["metadata"]["rlhf_audit"]
    payload = base64.b64decode(seal["statement"]["payload"])
    assert BUILD_TYPES[-1] == BUILD_TYPE
    older = payload.replace(BUILD_TYPES[1].encode(), BUILD_TYPES[0].encode()).replace(b'"environments":[],', b"")
    assert older != payload
    envelope = sign_envelope(older, [load_keys(tmp_path / "home", "example.org/records").record])
    seal["statement"].update(
        payload=envelope.payload, signatures=[{"keyid": item.keyid, "sig": item.sig} for item in envelope.signatures]
    )
    assert faults(record, tmp_path) == [("statement-differs", "metadata.rlhf_audit.entries")]


def test_a_new_record_cannot_stand_in_a_seal_of_the_first_version(record, tmp_path):
    record["metadata"]["rlhf_audit"]["version"] = 1
    assert faults(record, tmp_path) == [("version", "metadata.rlhf_audit.version")]


def test_a_statement_of_a_version_of_the_future_is_said_to_be_one(record, tmp_path):
    seal = record["metadata"]["rlhf_audit"]
    entries = [Entry.decode(item["index"], base64.b64decode(item["data"])) for item in seal["entries"]]
    body = msgspec.json.decode(entries[-1].body, type=RecordSealed)
    later = msgspec.structs.replace(body, build_type="urn:rlhf-audit:notebook-record:v3")
    envelope = json.loads(entries[-1].data)
    envelope["body"] = msgspec.Raw(encode_body(later))
    entries[-1] = Entry.decode(entries[-1].index, msgspec.json.encode(envelope))
    with pytest.raises(Exception, match=r"notebook-record:v3, which is not known here") as caught:
        build_statement(seal["record"], TrailReader.open(tmp_path / "audit").checkpoint(), entries)
    assert caught.value.reason == "unknown-version"
