"""Where a model came from: hub revision, the files it was loaded from, templates and generation settings. Floor 2.

A trainer shows a model in memory, and its weights digest is what a run names it by (`weights`). Here the files that it
was loaded from are found again, by the name that transformers keeps with it: a local folder, or a snapshot in the hub's
cache, whose commit is the revision. Each is digested, and each safetensors header by itself. The tensors in the files
get a digest in the form of a weights digest: where the two are equal, the weights in memory are the files' own; else
the two lists of tensors, kept beside the trail as ``artifacts/DIGEST.tensors``, name those that differ (a tied or newly
initialised head, another precision, a quantised or merged model, a change after loading). The digests are of the files
as they lie there when training begins. No path is recorded, only names within the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from rlhf_audit_nb.capture.code import keep_list
from rlhf_audit_nb.capture.folders import TENSORS_SUFFIX, stored_tensors
from rlhf_audit_nb.capture.weights import digest_json
from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.events import InputFile, InputFiles, ModelBound

__all__ = ["file_tensors", "model_files", "safetensors_header", "with_origin"]

MAX_HEADER = 100_000_000  # the format's own bound
_LENGTH = 8
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SETTINGS = ("config.json", "generation_config.json")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


def with_origin(
    event: ModelBound, model: Any, processing_class: Any = None, *, artifacts: Path | None = None
) -> ModelBound:
    """``event`` with what is known of where the model, and with it its tokenizer, came from.

    Lists that are too long for an entry, and the list of the tensors in the files, go into ``artifacts``.
    """
    plain = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    commit = getattr(getattr(plain, "config", None), "_commit_hash", None)  # a model of one's own may have no config
    folder = _loaded_from(_name_of(plain), commit, event.weights_digest)
    kept = {**_tokenizer_files(tokenizer), **(model_files(folder) if folder is not None else {})}
    return msgspec.structs.replace(
        event,
        revision=_commit_of(folder),
        files=_described(kept, artifacts),
        generation_digest=_generation_digest(plain),
        chat_template_digest=_template_digest(processing_class),
        quantization=_quantization(plain),
    )


# --- files -----------------------------------------------------------------------------------------------------------


def model_files(folder: Path) -> dict[str, Path]:
    """The files of a model in ``folder`` that loading it reads, by their names."""
    found = _existing(folder, (*_SETTINGS, *_WEIGHTS))
    weights = [item for item in _WEIGHTS if item in found]
    # As from_pretrained chooses: one file before shards, safetensors before pickles.
    kept = {item: path for item, path in found.items() if item in _SETTINGS or item == next(iter(weights), None)}
    index = next((path for item, path in kept.items() if item.endswith(".index.json")), None)
    if index is not None:
        kept.update(_existing(folder, _shards(index)))
    return kept


def _tokenizer_files(tokenizer: Any) -> dict[str, Path]:
    folder = _loaded_from(str(getattr(tokenizer, "name_or_path", "") or ""), None, None)
    return _existing(folder, _TOKENIZER) if folder is not None else {}


def _name_of(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def _existing(folder: Path, files: Iterable[str]) -> dict[str, Path]:
    return {file: folder / file for file in files if (folder / file).is_file()}


def _loaded_from(name: str, commit: str | None, weights_digest: str | None) -> Path | None:
    """The folder that ``name`` stands for: itself, or a snapshot in the hub's cache; ``None`` where that is in doubt.

    transformers does not keep the commit that it loaded. Where several lie in the cache, it is the one whose tensors
    are those in memory, if one alone is.
    """
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    cached = _snapshots(name)
    if commit is not None:
        return next((folder for folder in cached if folder.name == commit), None)
    if len(cached) > 1:
        cached = [folder for folder in cached if weights_digest is not None and _tensors_in(folder) == weights_digest]
    return cached[0] if len(cached) == 1 else None


def _snapshots(name: str) -> list[Path]:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if _HUB_NAME.fullmatch(name) is None:  # a folder that is gone is no name on the hub
        return []
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _tensors_in(folder: Path) -> str:
    files = [path for name, path in sorted(model_files(folder).items()) if name.endswith(".safetensors")]
    return hashlib.sha256(file_tensors(files)).hexdigest()


def _commit_of(folder: Path | None) -> str | None:
    """The commit that a snapshot of the hub's cache is named by."""
    is_snapshot = folder is not None and folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if folder is not None and is_snapshot else None


def _shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return sorted(name for name in names if isinstance(name, str) and Path(name).name == name)


def _described(files: dict[str, Path], artifacts: Path | None) -> InputFiles | None:
    if not files:
        return None
    names = sorted(files)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        listed = list(pool.map(lambda name: _input_file(name, files[name]), names))
    digest, is_short = keep_list(listed, len(listed), artifacts)
    lines = file_tensors(files[name] for name in names if name.endswith(".safetensors"))
    tensors = hashlib.sha256(lines).hexdigest() if lines else None
    if tensors is not None and artifacts is not None:
        (artifacts / f"{tensors}{TENSORS_SUFFIX}").write_bytes(lines)
    return InputFiles(
        count=len(listed),
        bytes=sum(file.bytes for file in listed),
        digest=digest,
        files=listed if is_short else [],
        tensors=tensors,
    )


def _input_file(name: str, path: Path) -> InputFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    header = safetensors_header(path) if name.endswith(".safetensors") else None
    return InputFile(
        name=name,
        bytes=path.stat().st_size,
        digest=digest,
        header=hashlib.sha256(header).hexdigest() if header is not None else None,
    )


def safetensors_header(path: Path) -> bytes | None:
    """The header of a safetensors file, JSON as it stands there; ``None`` where the file has none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        if not 0 < length <= MAX_HEADER:
            return None
        header = file.read(length)
    return header if len(header) == length else None


def file_tensors(paths: Iterable[Path]) -> bytes:
    """The list of all tensors in safetensors files, in the form whose SHA-256 is a weights digest; no torch is needed.

    A file that is no safetensors file adds nothing.

    Raises:
        OSError: a file cannot be read.
    """
    lines = [(name, f"{name}\0{tensor}\n".encode()) for path in paths for name, tensor in _listed(path).items()]
    return b"".join(line for _, line in sorted(lines))


def _listed(path: Path) -> dict[str, str]:
    try:
        return stored_tensors(path)
    except FormatError:
        return {}


# --- settings --------------------------------------------------------------------------------------------------------


def _generation_digest(model: Any) -> str | None:
    settings = getattr(model, "generation_config", None)
    if settings is None or not hasattr(settings, "to_diff_dict"):
        return None
    plain = {key: value for key, value in settings.to_diff_dict().items() if key != "transformers_version"}
    return digest_json(plain)


def _template_digest(processing_class: Any) -> str | None:
    """SHA-256 over the chat template's text; of several templates, over them as JSON."""
    template = getattr(processing_class, "chat_template", None)
    if template is None:
        return None
    if isinstance(template, str):
        return hashlib.sha256(template.encode()).hexdigest()
    return digest_json(template)


def _quantization(model: Any) -> dict[str, Any] | None:
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    if settings is None:
        return None
    plain = settings if isinstance(settings, dict) else settings.to_dict()
    kept: dict[str, Any] = json.loads(json.dumps(plain, default=str, sort_keys=True))
    return kept
