"""Where a model came from: its files, their headers and tensors, its templates; and that a change in one is seen."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import causal_model, grpo_trainer, lora, reward_model, tokenizer
from support.trails import events

from rlhf_audit_nb.capture.models import file_tensors, safetensors_header, with_origin
from rlhf_audit_nb.capture.run import Run
from rlhf_audit_nb.capture.weights import describe_model, digest_tensors
from rlhf_audit_nb.events import ModelBound, encode_body
from rlhf_audit_nb.trail import Trail

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny model in two shards and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-policy"
    causal_model().save_pretrained(folder, max_shard_size="60KB")
    shown = tokenizer()
    shown.chat_template = TEMPLATE
    shown.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "somebody" / "tiny-policy")


def load(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def described(folder, artifacts=None):
    model, processing = load(folder)
    return with_origin(describe_model(model, "base", processing), model, processing, artifacts=artifacts)


def test_every_file_that_was_loaded_is_named_with_its_digest_and_no_path(folder):
    event = described(folder)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 1
    listed = {file.name: file for file in event.files.files}
    assert {*shards, "config.json", "model.safetensors.index.json", "tokenizer.json"} <= set(listed)
    for name, file in listed.items():
        content = (folder / name).read_bytes()
        assert (file.digest, file.bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert event.files.count == len(listed)
    assert event.files.bytes == sum(file.bytes for file in listed.values())
    assert "somebody" not in encode_body(event).decode()


def test_the_header_of_a_shard_is_digested_by_itself(folder):
    name = next(folder.glob("*.safetensors")).name
    content = (folder / name).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length]
    (file,) = [file for file in described(folder).files.files if file.name == name]
    assert file.header == hashlib.sha256(header).hexdigest()
    assert safetensors_header(folder / name) == header


def test_the_tensors_in_the_files_have_the_digest_of_the_weights_that_were_loaded(folder, tmp_path):
    event = described(folder, tmp_path)
    assert event.files.tensors == event.weights_digest
    listed = (tmp_path / f"{event.files.tensors}.tensors").read_bytes()
    assert hashlib.sha256(listed).hexdigest() == event.weights_digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_a_files_tensors_are_listed_as_torch_would_list_them(tmp_path, dtype):
    tensors = {"b": torch.ones(2, 3).to(dtype), "a": torch.zeros(4).to(dtype), "s": torch.tensor(1).to(dtype)}
    save_file(tensors, tmp_path / "x.safetensors")
    lines = file_tensors([tmp_path / "x.safetensors"])
    assert hashlib.sha256(lines).hexdigest() == digest_tensors(tensors)


def test_one_changed_value_changes_its_file_and_its_tensor_alone(folder, tmp_path):
    before = described(folder)
    shard = max(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    changed = min(tensors)
    old_lines = file_tensors(sorted(folder.glob("*.safetensors")))
    tensors[changed].view(-1)[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    after = described(folder)
    digests = [{file.name: file.digest for file in event.files.files} for event in (before, after)]
    assert [name for name in digests[0] if digests[0][name] != digests[1][name]] == [shard.name]
    old, new = (set(lines.split(b"\n")) for lines in (old_lines, file_tensors(sorted(folder.glob("*.safetensors")))))
    assert {line.split(b"\0")[0].decode() for line in old ^ new} == {changed}


def test_weights_that_were_changed_after_loading_are_not_the_files(folder):
    model, processing = load(folder)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    event = with_origin(describe_model(model, "base", processing), model, processing)
    assert event.files.tensors != event.weights_digest


def test_of_an_adapted_model_the_files_are_the_bases(folder):
    from peft import get_peft_model

    model, processing = load(folder)
    adapted = get_peft_model(model, lora())
    event = with_origin(describe_model(adapted, "base", processing), adapted, processing)
    assert event.adapter is not None
    assert event.files.tensors == event.weights_digest


def test_templates_and_generation_settings_have_digests_of_their_own(folder):
    first = described(folder)
    assert first.chat_template_digest == hashlib.sha256(TEMPLATE.encode()).hexdigest()
    assert described(folder).generation_digest == first.generation_digest is not None
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "do_sample": True}))
    assert described(folder).generation_digest != first.generation_digest


def test_a_model_that_was_made_in_memory_has_no_files():
    model = causal_model()
    event = with_origin(describe_model(model, "base"), model)
    assert (event.files, event.revision, event.chat_template_digest) == (None, None, None)


def test_a_folder_that_is_gone_and_a_name_that_is_not_cached_have_no_files(tmp_path):
    model = causal_model()
    for name in (str(tmp_path / "gone"), "example/nowhere-to-be-found", ""):
        model.config._name_or_path = name
        event = with_origin(describe_model(model, "base"), model)
        assert (event.files, event.revision) == (None, None)


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """The hub's cache with ``example/tiny-policy`` in it at one commit; a function adds another."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshots = tmp_path / "hub" / "models--example--tiny-policy" / "snapshots"

    def add(commit, change=0.0):
        shutil.copytree(saved, snapshots / commit)
        shard = min((snapshots / commit).glob("*.safetensors"))
        save_file({name: value + change for name, value in load_file(shard).items()}, shard)
        return commit

    return add


def test_a_model_of_the_hub_is_found_in_its_cache_with_its_commit(hub, saved):
    model, processing = load(saved)
    model.config._name_or_path = processing.name_or_path = "example/tiny-policy"
    first = hub("c0ffee" + "0" * 34)

    def seen():
        return with_origin(describe_model(model, "base", processing), model, processing)

    alone = seen()
    assert (alone.name, alone.revision) == ("example/tiny-policy", first)
    assert alone.files.tensors == alone.weights_digest
    hub("decade" + "0" * 34, change=0.5)
    assert seen().revision == first  # of two, the one that has these weights
    hub("facade" + "0" * 34)
    assert (seen().revision, seen().files) == (None, None)  # two have them: it cannot be told


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 4, b"\xff" * 64, struct.pack("<Q", 10) + b"{", b"\x02" + b"\0" * 7 + b"[]"]
)
def test_what_is_no_safetensors_file_lists_no_tensors(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    assert file_tensors([tmp_path / "x.safetensors"]) == b""


def test_a_run_records_its_reward_model_as_one(tmp_path):
    reward = reward_model(seed=5)
    with Trail.open(tmp_path / "audit") as trail:
        with Run(trail, "rewarded"):
            grpo_trainer(reward, tmp_path / "out", max_steps=1).train()
        models = events(trail, ModelBound)
    assert [model.role for model in models] == ["base", "reward", "final"]
    assert models[1].weights_digest == digest_tensors(dict(reward.state_dict()))
