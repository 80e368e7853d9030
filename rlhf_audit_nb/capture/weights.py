"""Digests of models. Floor 2.

*Weights digest.* For each tensor, in the order of their names (Unicode code points), one line

    name NUL dtype NUL shape (decimal, joined by ",") NUL hex SHA-256 of the raw little-endian bytes LF

and the digest is SHA-256 over those lines. Tensors are hashed side by side, so the time is that of the machine's
cores. Of a model with an adapter, the *base* digest leaves the adapter out and undoes its renaming, so that it equals
the plain base model's: that is how runs name their inputs. The *final* digest covers what a save of the model writes.

*Tensor list.* The lines themselves, kept beside the trail as ``artifacts/DIGEST.tensors``: the file's SHA-256 is the
weights digest, so a list proves itself against the entry that holds it, and a changed tensor can be named
(`rlhf_audit_nb.compliance.weights`). Digests are lower-case hex. Folders of files: `folders`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.capture.folders import TENSORS_SUFFIX, digest_folder, side_by_side
from rlhf_audit_nb.errors import RunError
from rlhf_audit_nb.events import ModelBound

if TYPE_CHECKING:
    import torch

__all__ = [
    "base_tensors",
    "describe_model",
    "digest_json",
    "digest_tensors",
    "final_tensors",
    "has_one_adapter",
    "loaded_from",
    "raw_bytes",
    "tensor_lines",
    "trainable_digest",
    "trainable_tensors",
]

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_VOLATILE_CONFIG = ("_name_or_path", "transformers_version")
_VOLATILE_TOKENIZER = ("padding", "truncation")


# --- digests ---------------------------------------------------------------------------------------------------------


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """The weights digest of ``tensors`` by name (see the module's first lines)."""
    return hashlib.sha256(tensor_lines(tensors)).hexdigest()


def tensor_lines(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The tensor list whose SHA-256 is the weights digest."""
    names = sorted(tensors)
    digests = side_by_side(lambda name: hashlib.sha256(raw_bytes(tensors[name])).hexdigest(), names)
    return b"".join(_line(name, tensors[name], digest) for name, digest in zip(names, digests, strict=True))


def _line(name: str, tensor: torch.Tensor, digest: str) -> bytes:
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = ",".join(str(size) for size in tensor.shape)
    return f"{name}\0{dtype}\0{shape}\0{digest}\n".encode()


def digest_json(value: Any) -> str:
    """SHA-256 over ``value`` as JSON with sorted keys; what JSON does not have stands as its text."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def base_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The weights of the model without any adapter, under the names that the plain base model gives them."""
    prefix = _adapter_prefix(model)
    if prefix is None:
        return dict(model.state_dict())
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.get_base_model().state_dict().items():
        parts = name.split(".")
        if "modules_to_save" in parts or any(part.startswith(prefix) for part in parts):
            continue
        kept = [part for part in parts if part not in ("base_layer", "original_module")]
        tensors[".".join(kept)] = tensor
    return tensors


def final_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What a save of the model writes: the adapter's weights where it has one, else all of them."""
    if _adapter_prefix(model) is None:
        return dict(model.state_dict())
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model))


def has_one_adapter(model: Any) -> bool:
    """Whether all adapters of a model hold the same weights: `final_tensors` are those of one.

    TRL keeps a second one, a copy of the first, as the reference of a policy with an adapter.
    """
    if _adapter_prefix(model) is None:
        # Adapters that transformers put in by itself stand in the model's own weights.
        return not getattr(model, "_hf_peft_config_loaded", False)
    from peft import get_peft_model_state_dict

    digests = {digest_tensors(get_peft_model_state_dict(model, adapter_name=adapter)) for adapter in model.peft_config}
    return len(digests) == 1


def loaded_from(model: Any) -> str | None:
    """The digest of the folder that a model was loaded from, where its weights are what that folder holds.

    The digest is `FolderSignature.digest` of the folder as it is now; ``None`` where there is no such folder, or where
    the weights in memory are not the ones in its safetensors files.
    """
    from safetensors.torch import load_file

    folder = Path(str(getattr(getattr(model, "config", None), "_name_or_path", "") or ""))
    files = sorted(folder.glob("*.safetensors")) if folder.name and folder.is_dir() else []
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    if not stored or digest_tensors(stored) != digest_tensors(final_tensors(model)):
        return None
    return digest_folder(folder)


def trainable_digest(model: torch.nn.Module) -> str:
    """The weights digest of the parameters that training changes."""
    return digest_tensors(trainable_tensors(model))


def trainable_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that training changes, by the names that the model gives them."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def describe_model(model: Any, role: str, processing_class: Any = None, *, artifacts: Path | None = None) -> ModelBound:
    """The event for a model that a trainer showed; ``role`` is ``base``, ``reference`` or ``final``.

    With ``artifacts``, the folder beside the trail, the list of its tensors is kept there.
    """
    lines = tensor_lines(base_tensors(model) if role == "base" else final_tensors(model))
    digest = hashlib.sha256(lines).hexdigest()
    if artifacts is not None:
        (artifacts / f"{digest}{TENSORS_SUFFIX}").write_bytes(lines)
    config = getattr(model, "config", None)
    adapter = _adapter(model)
    parameters = [(value.numel(), value.requires_grad) for value in model.parameters()]
    trains = any(wanted for _, wanted in parameters) and (role == "base" or (role == "final" and adapter is not None))
    return ModelBound(
        role=role,
        architecture=_architecture(model),
        parameters=sum(size for size, _ in parameters),
        trainable=sum(size for size, wanted in parameters if wanted),
        weights_digest=digest,
        config_digest=digest_json(_config(config)),
        name=_public_name(config),
        tokenizer_digest=_tokenizer_digest(processing_class),
        adapter=adapter,
        trainable_digest=trainable_digest(model) if trains else None,
    )


def raw_bytes(tensor: torch.Tensor) -> Any:
    """A tensor's bytes as they are hashed, little-endian and in row order; a buffer without a copy where it can be.

    Raises:
        RunError: it lies on the meta device.
    """
    import torch

    if tensor.device.type == "meta":
        raise RunError(
            "A weight of the model lies on the meta device, so it has no bytes to digest.",
            next_step="Load the weights before training (no device_map that offloads to disk).",
            code="meta-weights",
        )
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _adapter_prefix(model: Any) -> str | None:
    """The prefix of an adapter's parameter names (``lora_``), or ``None`` for a model without adapter."""
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return None
    return str(getattr(model.base_model, "prefix", "lora_"))


def _architecture(model: Any) -> str:
    return type(model.get_base_model() if _adapter_prefix(model) is not None else model).__name__


def _adapter(model: Any) -> dict[str, Any] | None:
    """The adapter's own settings, without the base model's path."""
    if _adapter_prefix(model) is None:
        return None
    name = next(iter(model.peft_config))
    settings = model.peft_config[name].to_dict()
    settings.pop("base_model_name_or_path", None)
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=_json_value, sort_keys=True))
    return {key: value for key, value in plain.items() if value not in (None, {}, [])}


def _json_value(value: Any) -> Any:
    return sorted(str(item) for item in value) if isinstance(value, set | frozenset) else str(value)


def _config(config: Any) -> dict[str, Any]:
    if config is None or not hasattr(config, "to_dict"):
        return {}
    return {key: value for key, value in config.to_dict().items() if key not in _VOLATILE_CONFIG}


def _public_name(config: Any) -> str | None:
    """The name a model was loaded by, where it is a hub name and not a path of this machine."""
    name = str(getattr(config, "_name_or_path", "") or "")
    if not name or Path(name).is_absolute() or name.startswith((".", "~")) or Path(name).exists():
        return None
    return name if _HUB_NAME.fullmatch(name) else None


def _tokenizer_digest(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        for key in _VOLATILE_TOKENIZER:  # set anew by every call, so no part of what the tokenizer is
            rules.pop(key, None)
    elif hasattr(tokenizer, "get_vocab"):
        rules = tokenizer.get_vocab()
    else:
        return None
    return digest_json(
        {
            "rules": rules,
            "special": getattr(tokenizer, "special_tokens_map", None),
            "chat_template": getattr(tokenizer, "chat_template", None),
        }
    )
