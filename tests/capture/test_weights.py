"""Digests of weights, and folder signatures that the reference implementation accepts and refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from peft import get_peft_model
from safetensors.torch import load_file
from support.tiny import causal_model, lora, perturb, tokenizer

from rlhf_audit_nb.capture.folders import folder_state, sign_folder
from rlhf_audit_nb.capture.weights import (
    base_tensors,
    describe_model,
    digest_tensors,
    final_tensors,
    trainable_digest,
)
from rlhf_audit_nb.errors import RunError


def naive_digest(tensors):
    lines = b""
    for name, tensor in sorted(tensors.items()):
        raw = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        shape = ",".join(map(str, tensor.shape))
        dtype = str(tensor.dtype).split(".")[1]
        lines += b"\0".join([name.encode(), dtype.encode(), shape.encode(), hashlib.sha256(raw).hexdigest().encode()])
        lines += b"\n"
    return hashlib.sha256(lines).hexdigest()


@pytest.fixture(scope="module")
def key():
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "model"
    causal_model().save_pretrained(target)
    (target / "nested").mkdir()
    (target / "nested" / "é.txt").write_text("deep")
    return target


def verify(folder):
    """The reference implementation's verdict."""
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder)]
    command += ["--signature", str(folder / "model.sig"), "--public_key", str(folder / "model.pub")]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_the_digest_is_what_the_documentation_says():
    tensors = {
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "a": torch.tensor(1.5),
        "c": torch.zeros(0, 4),
        "d": torch.ones(3, 2).t(),
    }
    assert digest_tensors(tensors) == naive_digest(tensors)


@pytest.mark.parametrize(
    "changed",
    [
        {"a": torch.ones(3)},
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(6, dtype=torch.float64)},
        {"b": torch.zeros(6)},
    ],
    ids=["values", "shape", "dtype", "name"],
)
def test_the_digest_follows_values_shape_type_and_name(changed):
    assert digest_tensors(changed) != digest_tensors({"a": torch.zeros(6)})


def test_an_adapter_does_not_change_the_base_digest():
    plain = causal_model()
    adapted = get_peft_model(causal_model(), lora())
    perturb(adapted)
    assert digest_tensors(base_tensors(adapted)) == digest_tensors(base_tensors(plain))
    assert digest_tensors(base_tensors(causal_model(seed=1))) != digest_tensors(base_tensors(plain))


def test_a_module_that_is_saved_whole_does_not_change_the_base_digest():
    adapted = get_peft_model(causal_model(), lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    perturb(adapted)
    assert digest_tensors(base_tensors(adapted)) == digest_tensors(base_tensors(causal_model()))


def test_the_final_digest_is_that_of_the_saved_file(tmp_path):
    adapted = get_peft_model(causal_model(), lora())
    perturb(adapted)
    adapted.save_pretrained(tmp_path)
    assert digest_tensors(load_file(tmp_path / "adapter_model.safetensors")) == digest_tensors(final_tensors(adapted))


def test_the_trainable_digest_follows_training_only():
    adapted = get_peft_model(causal_model(), lora())
    before = trainable_digest(adapted)
    perturb(adapted)
    assert trainable_digest(adapted) != before


def test_the_base_names_what_training_began_from_also_in_an_adapter():
    adapted = get_peft_model(causal_model(), lora())
    fresh = describe_model(adapted, "base")
    perturb(adapted)
    moved = describe_model(adapted, "base")
    assert moved.weights_digest == fresh.weights_digest
    assert fresh.trainable_digest is not None
    assert moved.trainable_digest == trainable_digest(adapted) != fresh.trainable_digest
    assert describe_model(adapted, "final").trainable_digest == moved.trainable_digest
    assert describe_model(causal_model(), "final").trainable_digest is None
    assert describe_model(adapted, "reward").trainable_digest is None
    assert describe_model(causal_model().requires_grad_(False), "base").trainable_digest is None


def test_a_model_is_described_without_paths(tmp_path):
    from transformers import AutoModelForCausalLM

    causal_model().save_pretrained(tmp_path / "secret-place")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "secret-place")
    event = describe_model(get_peft_model(loaded, lora()), "base", tokenizer())
    assert event.name is None
    assert "secret-place" not in repr(event)
    assert event.architecture == "LlamaForCausalLM"
    assert 0 < event.trainable < event.parameters
    assert event.adapter is not None
    assert event.adapter["r"] == 4
    json.dumps(event.adapter)


def test_the_same_weights_under_another_folder_have_the_same_digests(tmp_path):
    from transformers import AutoModelForCausalLM

    model = causal_model()
    model.save_pretrained(tmp_path / "a")
    one = describe_model(model, "base", tokenizer())
    other = describe_model(AutoModelForCausalLM.from_pretrained(tmp_path / "a"), "base", tokenizer())
    assert (one.weights_digest, one.config_digest, one.tokenizer_digest) == (
        other.weights_digest,
        other.config_digest,
        other.tokenizer_digest,
    )


def test_a_tokenizer_is_the_same_after_use_and_another_after_a_change():
    used, changed = tokenizer(), tokenizer()
    model = causal_model()
    fresh = describe_model(model, "base", tokenizer()).tokenizer_digest
    used(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    changed.add_tokens(["<new>"])
    assert describe_model(model, "base", used).tokenizer_digest == fresh
    assert describe_model(model, "base", changed).tokenizer_digest != fresh


def test_weights_without_bytes_are_refused():
    with torch.device("meta"):
        weights = {"a": torch.zeros(2)}
    with pytest.raises(RunError, match="meta device"):
        digest_tensors(weights)


def test_the_reference_implementation_accepts_the_signature(folder, key):
    signed = sign_folder(folder, key)
    answer = verify(folder)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert signed.signature_digest == hashlib.sha256((folder / "model.sig").read_bytes()).hexdigest()
    assert signed.files == sum(1 for path in folder.rglob("*") if path.is_file()) - 1


@pytest.mark.parametrize("change", ["byte", "extra", "missing"])
def test_the_reference_implementation_refuses_a_changed_folder(folder, key, change):
    sign_folder(folder, key)
    weights = folder / "model.safetensors"
    if change == "byte":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif change == "extra":
        (folder / "extra.bin").write_bytes(b"x")
    else:
        (folder / "nested" / "é.txt").unlink()
    assert verify(folder).returncode != 0


def test_a_signature_by_another_key_is_refused(folder, key):
    sign_folder(folder, key)
    mine = (folder / "model.sig").read_bytes()
    sign_folder(folder, ec.generate_private_key(ec.SECP256R1()))
    (folder / "model.sig").write_bytes(mine)
    assert verify(folder).returncode != 0


def test_checkpoints_below_are_left_to_their_own_signatures(folder, key):
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "big.bin").write_bytes(b"x")
    sign_folder(folder, key)
    payload = json.loads((folder / "model.sig").read_text())["dsseEnvelope"]["payload"]
    names = [item["name"] for item in json.loads(base64.b64decode(payload))["predicate"]["resources"]]
    assert names == sorted(names)
    assert not any("checkpoint-5" in name for name in names)
    (folder / "checkpoint-5" / "later.bin").write_bytes(b"y")
    assert verify(folder).returncode == 0


def test_a_symbolic_link_is_refused(folder, key):
    (folder / "link").symlink_to(folder / "config.json")
    with pytest.raises(RunError, match="symbolic link"):
        sign_folder(folder, key)


def test_a_folders_state_changes_with_its_files_and_not_with_its_signature(folder, key):
    sign_folder(folder, key)
    before = folder_state(folder)
    sign_folder(folder, key)
    assert [item[:2] for item in folder_state(folder)] == [item[:2] for item in before]
    (folder / "README.md").write_text("a card")
    assert folder_state(folder) != before
