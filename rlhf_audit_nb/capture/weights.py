"""Digests of models and signatures of the folders that hold them. Floor 2.

*Weights digest.* For each tensor, in the order of their names (Unicode code points), one line

    name NUL dtype NUL shape (decimal, joined by ",") NUL hex SHA-256 of the raw little-endian bytes LF

and the digest is SHA-256 over those lines. Tensors are hashed side by side, so the time is that of the machine's
cores. Of a model with an adapter, the *base* digest leaves the adapter out and undoes its renaming, so that it equals
the plain base model's: that is how runs name their inputs. The *final* digest covers what a save of the model writes.

*Folder signature.* ``model.sig`` is an OpenSSF model signature v1.0: a Sigstore bundle around a DSSE envelope around
an in-toto statement that lists every file with its SHA-256, signed with ECDSA P-256. ``model_signing verify key DIR
--signature DIR/model.sig --public_key DIR/model.pub`` accepts it. ``model.pub`` (the key as PEM) is itself one of the
signed files; which key is to be trusted says the trail's first entry, not the folder. Digests are lower-case hex.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from rlhf_audit_nb.errors import RunError
from rlhf_audit_nb.events import ModelBound

if TYPE_CHECKING:
    import torch

__all__ = [
    "PUBLIC_KEY_FILE",
    "SIGNATURE_FILE",
    "FolderSignature",
    "base_tensors",
    "describe_model",
    "digest_folder",
    "digest_json",
    "digest_tensors",
    "final_tensors",
    "folder_state",
    "has_one_adapter",
    "loaded_from",
    "sign_folder",
    "trainable_digest",
]

SIGNATURE_FILE = "model.sig"
PUBLIC_KEY_FILE = "model.pub"

BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"

_GIT_PATHS = (".git", ".gitattributes", ".github", ".gitignore")
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_VOLATILE_CONFIG = ("_name_or_path", "transformers_version")
_VOLATILE_TOKENIZER = ("padding", "truncation")


# --- digests ---------------------------------------------------------------------------------------------------------


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """The weights digest of ``tensors`` by name (see the module's first lines)."""
    names = sorted(tensors)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        digests = list(pool.map(lambda name: _raw_digest(tensors[name]), names))
    lines = hashlib.sha256()
    for name, digest in zip(names, digests, strict=True):
        tensor = tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = ",".join(str(size) for size in tensor.shape)
        lines.update(f"{name}\0{dtype}\0{shape}\0{digest}\n".encode())
    return lines.hexdigest()


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
    return digest_tensors({name: value for name, value in model.named_parameters() if value.requires_grad})


def describe_model(model: Any, role: str, processing_class: Any = None) -> ModelBound:
    """The event for a model that a trainer showed; ``role`` is ``base``, ``reference`` or ``final``."""
    tensors = base_tensors(model) if role == "base" else final_tensors(model)
    config = getattr(model, "config", None)
    adapter = _adapter(model)
    parameters = [(value.numel(), value.requires_grad) for value in model.parameters()]
    trains = any(wanted for _, wanted in parameters) and (role == "base" or (role == "final" and adapter is not None))
    return ModelBound(
        role=role,
        architecture=_architecture(model),
        parameters=sum(size for size, _ in parameters),
        trainable=sum(size for size, wanted in parameters if wanted),
        weights_digest=digest_tensors(tensors),
        config_digest=digest_json(_config(config)),
        name=_public_name(config),
        tokenizer_digest=_tokenizer_digest(processing_class),
        adapter=adapter,
        trainable_digest=trainable_digest(model) if trains else None,
    )


def _raw_digest(tensor: torch.Tensor) -> str:
    import torch

    if tensor.device.type == "meta":
        raise RunError(
            "A weight of the model lies on the meta device, so it has no bytes to digest.",
            next_step="Load the weights before training (no device_map that offloads to disk).",
            code="meta-weights",
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    raw: Any = flat.numpy()  # a buffer: hashed without a copy
    return hashlib.sha256(raw).hexdigest()


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


# --- folder signatures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderSignature:
    """What was signed: the subject's digest, how many files and bytes, and the digest of ``model.sig`` itself."""

    digest: str
    files: int
    bytes: int
    signature_digest: str


def folder_state(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files that a signature of ``folder`` covers: equal when nothing changed."""
    ignored = _ignored_paths(folder)
    return tuple(
        (path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
        for path in _files(folder, ignored)
    )


def sign_folder(folder: Path, key: ec.EllipticCurvePrivateKey) -> FolderSignature:
    """Sign every file under ``folder`` and leave ``model.pub`` and ``model.sig`` in it.

    Folders named ``checkpoint-N`` directly below are left out (each is signed on its own), and so is git's.

    Raises:
        RunError: the folder holds a symbolic link, which a signature cannot cover, or nothing at all.
        OSError: the folder cannot be read or written.
    """
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / PUBLIC_KEY_FILE).write_bytes(pem)
    ignored = _ignored_paths(folder)
    files = list(_files(folder, ignored))
    root, digests = _folder_digest(files)
    names = [path.relative_to(folder).as_posix() for path in files]
    statement = _statement(folder.resolve().name, root, dict(zip(names, digests, strict=True)), ignored)
    bundle = _bundle(statement, key, pem)
    _write_atomically(folder / SIGNATURE_FILE, bundle)
    return FolderSignature(
        digest=root,
        files=len(files),
        bytes=sum(path.stat().st_size for path in files),
        signature_digest=hashlib.sha256(bundle).hexdigest(),
    )


def digest_folder(folder: Path) -> str:
    """The digest that `sign_folder` would sign, of the folder as it is.

    Raises:
        RunError: the folder holds a symbolic link.
        OSError: the folder cannot be read.
    """
    return _folder_digest(list(_files(folder, _ignored_paths(folder))))[0]


def _ignored_paths(folder: Path) -> list[str]:
    checkpoints = sorted(path.name for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name))
    return [SIGNATURE_FILE, *_GIT_PATHS, *checkpoints]


def _files(folder: Path, ignored: list[str]) -> Iterator[Path]:
    """The files to be signed, sorted by their names' code points."""
    found = []
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise RunError(
                f"The saved folder {folder.name!r} holds the symbolic link {path.name!r}, which cannot be signed.",
                next_step="Save the model into a folder of its own.",
                code="symlink",
            )
        relative = path.relative_to(folder)
        if path.is_file() and relative.parts[0] not in ignored:
            found.append(path)
    yield from sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _folder_digest(files: list[Path]) -> tuple[str, list[str]]:
    """The digest over the files' digests in their order, and these."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        digests = list(pool.map(_file_digest, files))
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests)).hexdigest(), digests


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _statement(name: str, root: str, digests: dict[str, str], ignored: list[str]) -> bytes:
    resources = [{"name": file, "algorithm": "sha256", "digest": digest} for file, digest in digests.items()]
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": root}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": ignored,
            },
            "resources": resources,
        },
    }
    return json.dumps(statement, separators=(",", ":"), ensure_ascii=False).encode()


def _bundle(statement: bytes, key: ec.EllipticCurvePrivateKey, pem: bytes) -> bytes:
    encoding = f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(statement)} ".encode() + statement
    signature = key.sign(encoding, ec.ECDSA(hashes.SHA256()))
    bundle = {
        "mediaType": BUNDLE_TYPE,
        "verificationMaterial": {"publicKey": {"hint": hashlib.sha256(pem).hexdigest()}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(statement).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return json.dumps(bundle, separators=(",", ":")).encode()


def _write_atomically(path: Path, content: bytes) -> None:
    draft = path.with_name(path.name + ".part")
    draft.write_bytes(content)
    draft.replace(path)
