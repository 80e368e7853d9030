"""Folders of weights: what is listed, how fast it could be, and which change is named."""

from __future__ import annotations

import base64
import hashlib
import json
import tracemalloc

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.torch import save_file
from support.folders import KINDS, change, reference
from support.tiny import causal_model

from rlhf_audit_nb.capture import folders
from rlhf_audit_nb.capture.folders import (
    Change,
    changes,
    digest_folder,
    holds_weights,
    parse_manifest,
    read_manifest,
    sign_folder,
    stored_tensors,
)
from rlhf_audit_nb.capture.weights import tensor_lines
from rlhf_audit_nb.errors import FormatError


@pytest.fixture(scope="module")
def key():
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "model"
    (place / "sub").mkdir(parents=True)
    (place / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (place / "config.json").write_text("{}")
    (place / "sub" / "vocab.txt").write_text("a\nb\n")
    return place


@pytest.fixture(params=["files", "shards"])
def method(request, monkeypatch):
    """Both ways to list a folder; the second one with shards of a size that small files have several of."""
    if request.param == "shards":
        monkeypatch.setattr(folders, "SHARDED_FROM", 1000)
        monkeypatch.setattr(folders, "SHARD_SIZE", 4096)
    return request.param


def test_an_untouched_folder_has_no_changes_and_the_reference_agrees(folder, key, method):
    signed = sign_folder(folder, key)
    manifest = read_manifest(folder)
    assert manifest.method == method
    assert manifest.digest == signed.digest == digest_folder(folder)
    assert manifest.signed_by(key.public_key())
    assert not manifest.signed_by(ec.generate_private_key(ec.SECP256R1()).public_key())
    assert changes(folder, manifest) == []
    assert reference(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_change_is_named_in_both_ways_of_listing(folder, key, method, kind):
    sign_folder(folder, key)
    manifest = read_manifest(folder)
    name, was = change(folder, kind)
    (found,) = changes(folder, manifest)
    assert (found.kind, found.name, found.was) == (KINDS[kind], name, was)
    assert name in found.words
    if method == "shards" and kind == "changed":
        assert found.at == ((4096, 8192),)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_refuses_each_kind_of_change(folder, key, kind):
    sign_folder(folder, key)
    change(folder, kind)
    assert not reference(folder)


def test_the_digests_are_those_of_the_bytes(folder, key, method):
    sign_folder(folder, key)
    content = (folder / "model.safetensors").read_bytes()
    listed = read_manifest(folder).listed
    if method == "files":
        assert listed["model.safetensors"] == hashlib.sha256(content).hexdigest()
    else:
        size = len(content)
        for start, end in ((0, 4096), (4096, 8192), (8192, size)):
            assert listed[f"model.safetensors:{start}:{end}"] == hashlib.sha256(content[start:end]).hexdigest()


@pytest.mark.parametrize("name", ["empty.txt", "a:b.txt"])
def test_what_shards_cannot_list_is_listed_by_files(folder, key, monkeypatch, name):
    monkeypatch.setattr(folders, "SHARDED_FROM", 1000)
    (folder / name).write_bytes(b"" if name == "empty.txt" else b"x")
    sign_folder(folder, key)
    assert read_manifest(folder).method == "files"
    assert reference(folder)


def test_an_empty_file_added_to_shards_is_named(folder, key, monkeypatch):
    monkeypatch.setattr(folders, "SHARDED_FROM", 1000)
    sign_folder(folder, key)
    (folder / "empty.py").write_bytes(b"")
    assert changes(folder, read_manifest(folder)) == [Change("added", "empty.py")]


def test_memory_does_not_grow_with_a_file(tmp_path):
    big = tmp_path / "model.safetensors"
    with big.open("wb") as file:
        file.truncate(64 << 20)
    digest_folder(tmp_path)
    tracemalloc.start()
    digest_folder(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 < peak < 4 << 20


@pytest.mark.parametrize(
    "damage",
    [
        lambda said: said["subject"][0]["digest"].update(sha256="00" * 32),
        lambda said: said["predicate"]["resources"].pop(),
        lambda said: said["predicate"]["resources"].append(said["predicate"]["resources"][0]),
        lambda said: said["predicate"]["resources"][0].update(algorithm="blake2b"),
        lambda said: said["predicate"]["serialization"].update(method="all"),
        lambda said: said.update(predicateType="https://example.com/another"),
        lambda said: said.pop("predicate"),
    ],
    ids=["subject", "left out", "twice", "algorithm", "method", "type", "nothing"],
)
def test_a_signature_that_does_not_add_up_is_refused(folder, key, damage):
    sign_folder(folder, key)
    bundle = json.loads((folder / "model.sig").read_text())
    said = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    damage(said)
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(said).encode()).decode()
    with pytest.raises(FormatError, match=r"model\.sig is not a model signature"):
        parse_manifest(json.dumps(bundle).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"dsseEnvelope": 3}', b"[" * 100_000])
def test_rubbish_is_no_signature(data):
    with pytest.raises(FormatError):
        parse_manifest(data)


def test_stored_tensors_are_those_of_the_list(tmp_path):
    tensors = {name: value.clone() for name, value in causal_model().state_dict().items()}
    save_file(tensors, tmp_path / "m.safetensors")
    told = stored_tensors(tmp_path / "m.safetensors")
    assert "".join(f"{name}\0{told[name]}\n" for name in sorted(told)).encode() == tensor_lines(tensors)


@pytest.mark.parametrize("data", [b"", b"\x08" + b"\0" * 7 + b"{}", b"\xff" * 40, b"\x02" + b"\0" * 7 + b"[]"])
def test_what_is_no_safetensors_file_is_said_to_be_none(tmp_path, data):
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError, match="not a safetensors file"):
        stored_tensors(path)


def test_weights_are_told_from_other_folders(tmp_path, folder):
    assert holds_weights(folder)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").write_text("x")
    assert not holds_weights(tmp_path / "else")
