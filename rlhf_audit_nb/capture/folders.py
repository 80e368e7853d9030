"""Folders of weights: their digests, their signatures, and what was changed in them since. Floor 2.

*Folder signature.* ``model.sig`` is an OpenSSF model signature v1.0: a Sigstore bundle around a DSSE envelope around
an in-toto statement that lists what was signed with its SHA-256, signed with ECDSA P-256. ``model_signing verify key
DIR --signature DIR/model.sig --public_key DIR/model.pub`` accepts it. ``model.pub`` (the key as PEM) is itself one of
the signed files; which key is to be trusted says the trail's first entry, not the folder.

What is listed is *files*, by their names, as long as none is over `SHARDED_FROM`. SHA-256 goes through one file on one
core alone, so a folder with a larger file is listed by *shards* (``name:start:end``) of `SHARD_SIZE`; both are methods
of the same standard. Which one follows from the folder, never from the machine. Shards cannot list an empty file, nor
a name with a colon: a folder with one of these is listed by files.

*Folder digest.* SHA-256 over the listed digests (raw, in the order of names and starts); the signature's subject. No
name is in it, so files that were renamed in their order have the same. *List digest*: SHA-256 over lines of name, NUL,
hex digest and line feed, in that order.

Everything is hashed side by side on all cores that this process may use, through one buffer for each: memory does not
grow with a file. Digests are lower-case hex.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from rlhf_audit_nb.errors import FormatError, RunError

__all__ = [
    "PUBLIC_KEY_FILE",
    "SHARDED_FROM",
    "SHARD_SIZE",
    "SIGNATURE_FILE",
    "TENSORS_SUFFIX",
    "Change",
    "FolderSignature",
    "Manifest",
    "changes",
    "digest_and_list",
    "digest_folder",
    "folder_state",
    "holds_weights",
    "nested_checkpoints",
    "parse_manifest",
    "read_manifest",
    "side_by_side",
    "sign_folder",
    "stored_tensors",
]

SIGNATURE_FILE = "model.sig"
PUBLIC_KEY_FILE = "model.pub"
TENSORS_SUFFIX = ".tensors"

BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"

SHARDED_FROM = 1 << 30
SHARD_SIZE = 64 << 20

_BUFFER = 1 << 20
_MOST_SIGNATURE = 256 << 20
_MOST_HEADER = 100 << 20
_GIT_PATHS = (".git", ".gitattributes", ".github", ".gitignore")
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "U16": "uint16", "U32": "uint32", "U64": "uint64", "C64": "complex64",
}  # fmt: skip

Method = Literal["files", "shards"]
_In = TypeVar("_In")
_Out = TypeVar("_Out")


def side_by_side(work: Callable[[_In], _Out], items: Iterable[_In]) -> list[_Out]:
    """``work`` on every item, on all cores that this process may use; the results in their order."""
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0)) if _HAS_AFFINITY else os.cpu_count()) as pool:
        return list(pool.map(work, items))


_HAS_AFFINITY = hasattr(os, "sched_getaffinity")


# --- signing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderSignature:
    """What was signed: the subject's digest and the list's, how many files and bytes, and ``model.sig``'s digest."""

    digest: str
    listed: str
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
    method = _method(folder, files)
    digests = _digests(folder, files, method)
    root = _root(digests)
    statement = _statement(folder.resolve().name, root, digests, ignored, method)
    bundle = _bundle(statement, key, pem)
    _write_atomically(folder / SIGNATURE_FILE, bundle)
    return FolderSignature(
        digest=root,
        listed=_list_digest(digests),
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
    return digest_and_list(folder)[0]


def digest_and_list(folder: Path) -> tuple[str, str]:
    """The folder's digest, and that of its list, of the folder as it is; errors as of `digest_folder`."""
    files = list(_files(folder, _ignored_paths(folder)))
    digests = _digests(folder, files, _method(folder, files))
    return _root(digests), _list_digest(digests)


def nested_checkpoints(folder: Path) -> list[str]:
    """The folders ``checkpoint-N`` directly below, which a signature leaves to their own."""
    return sorted(path.name for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name))


def holds_weights(folder: Path) -> bool:
    """Whether a folder looks like a saved model: it is signed as one, or holds a file of weights."""
    if (folder / SIGNATURE_FILE).is_file():
        return True
    return any(path.suffix in _WEIGHTS for path in folder.iterdir() if path.is_file())


def _ignored_paths(folder: Path) -> list[str]:
    return [SIGNATURE_FILE, *_GIT_PATHS, *nested_checkpoints(folder)]


def _files(folder: Path, ignored: Sequence[str]) -> Iterator[Path]:
    """The files to be signed, sorted by their names' code points."""
    found = []
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise RunError(
                f"The saved folder {folder.name!r} holds the symbolic link {path.name!r}, which cannot be signed.",
                next_step="Save the model into a folder of its own.",
                code="symlink",
            )
        if path.is_file() and not _is_ignored(path.relative_to(folder).as_posix(), ignored):
            found.append(path)
    yield from sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _is_ignored(name: str, ignored: Sequence[str]) -> bool:
    return any(name == path or name.startswith(path + "/") for path in ignored)


def _method(folder: Path, files: Sequence[Path]) -> Method:
    sizes = [path.stat().st_size for path in files]
    if max(sizes, default=0) <= SHARDED_FROM or 0 in sizes:
        return "files"
    return "files" if any(":" in path.relative_to(folder).as_posix() for path in files) else "shards"


def _digests(folder: Path, files: Iterable[Path], method: Method, shard: int = 0) -> dict[str, str]:
    """SHA-256 by listed name: of each file, or of each shard of each file."""
    parts: list[tuple[str, Path, int, int]] = []
    shard = shard or SHARD_SIZE
    for path in files:
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        if method == "files":
            parts.append((name, path, 0, size))
        else:
            cuts = [*range(0, size, shard), size]
            parts += [(f"{name}:{a}:{b}", path, a, b) for a, b in pairwise(cuts)]
    # The largest first, so that no core is left alone with one at the end.
    order = sorted(range(len(parts)), key=lambda at: parts[at][2] - parts[at][3])
    done = side_by_side(lambda at: _part_digest(*parts[at][1:]), order)
    found = dict(zip((parts[at][0] for at in order), done, strict=True))
    return {name: found[name] for name, *_ in parts}


def _part_digest(path: Path, start: int, end: int) -> str:
    """SHA-256 of the bytes from ``start`` to ``end``, read through one buffer that stays in the core's cache."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(max(1, min(_BUFFER, end - start))))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        left = end - start
        while left and (got := file.readinto(buffer[: min(left, len(buffer))])):
            digest.update(buffer[:got])
            left -= got
    return digest.hexdigest()


def _root(digests: dict[str, str]) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests.values())).hexdigest()


def _list_digest(digests: dict[str, str]) -> str:
    lines = "".join(f"{name}\0{digest}\n" for name, digest in digests.items())
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def _statement(name: str, root: str, digests: dict[str, str], ignored: list[str], method: Method) -> bytes:
    algorithm = "sha256" if method == "files" else f"sha256-sharded-{SHARD_SIZE}"
    resources = [{"name": file, "algorithm": algorithm, "digest": digest} for file, digest in digests.items()]
    serialization: dict[str, Any] = {"method": method, "hash_type": "sha256"}
    if method == "shards":
        serialization["shard_size"] = SHARD_SIZE
    serialization |= {"allow_symlinks": False, "ignore_paths": ignored}
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": root}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {"serialization": serialization, "resources": resources},
    }
    return json.dumps(statement, separators=(",", ":"), ensure_ascii=False).encode()


def _encoding(statement: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed."""
    return f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(statement)} ".encode() + statement


def _bundle(statement: bytes, key: ec.EllipticCurvePrivateKey, pem: bytes) -> bytes:
    signature = key.sign(_encoding(statement), ec.ECDSA(hashes.SHA256()))
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


# --- checking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    """What a ``model.sig`` says; nothing of it is believed before `signed_by` and the trail.

    Attributes:
        digest: of the folder, worked out from the listed digests.
        method: whether files or shards of them are listed.
        shard_size: in bytes; 0 where files are listed.
        ignored: paths that the signature leaves out.
        listed: SHA-256 by file name, or by ``name:start:end``.
        signature_digest: SHA-256 of ``model.sig`` itself, which the trail has.
    """

    digest: str
    method: Method
    shard_size: int
    ignored: tuple[str, ...]
    listed: dict[str, str]
    signature_digest: str
    statement: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    def signed_by(self, key: ec.EllipticCurvePublicKey) -> bool:
        """Whether ``key`` has signed it."""
        try:
            key.verify(self.signature, _encoding(self.statement), ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            return False
        return True

    def files(self) -> dict[str, tuple[str, ...]]:
        """By file, its digest, or those of its shards in their order."""
        if self.method == "files":
            return {name: (digest,) for name, digest in self.listed.items()}
        return _by_file(self.listed)


@dataclass(frozen=True)
class Change:
    """One difference between a folder and its manifest.

    Attributes:
        kind: ``changed``, ``added``, ``removed``, ``renamed`` or ``link`` (a symbolic link, which nothing covers).
        name: the file, as it is called now; of a removed one, as it was called.
        was: the name that a renamed file had.
        at: of a file that is listed by shards, the byte ranges that differ.
    """

    kind: Literal["changed", "added", "removed", "renamed", "link"]
    name: str
    was: str | None = None
    at: tuple[tuple[int, int], ...] = ()

    @property
    def words(self) -> str:
        """The change in a few words."""
        if self.kind == "renamed":
            return f"{self.was} was renamed to {self.name}"
        if self.kind == "link":
            return f"{self.name} is a symbolic link, which no signature covers"
        ranges = ", ".join(f"{start:,} to {end:,}" for start, end in self.at[:3])
        more = f" and {len(self.at) - 3} more parts" if len(self.at) > 3 else ""  # noqa: PLR2004 (a line's worth)
        return f"{self.name} was {self.kind}" + (f" (in its bytes {ranges}{more})" if ranges else "")


def read_manifest(folder: Path) -> Manifest | None:
    """What ``folder/model.sig`` says; ``None`` where there is none.

    Raises:
        FormatError: it is no model signature of the form that `sign_folder` writes.
        OSError: it cannot be read.
    """
    path = folder / SIGNATURE_FILE
    if path.is_symlink() or not path.is_file():
        return None
    with path.open("rb") as file:
        return parse_manifest(file.read(_MOST_SIGNATURE + 1))


def parse_manifest(data: bytes) -> Manifest:
    """What the bytes of a ``model.sig`` say.

    Raises:
        FormatError: they are no model signature of the form that `sign_folder` writes.
    """
    try:
        if len(data) > _MOST_SIGNATURE:
            raise ValueError("it is too large")
        envelope = json.loads(data)["dsseEnvelope"]
        statement = base64.b64decode(envelope["payload"], validate=True)
        (signed,) = envelope["signatures"]
        said = json.loads(statement)
        if said["predicateType"] != PREDICATE_TYPE or envelope["payloadType"] != PAYLOAD_TYPE:
            raise ValueError("it is of another type")
        (subject,) = said["subject"]
        listed, how = said["predicate"]["resources"], said["predicate"]["serialization"]
        size = int(how.get("shard_size", 0))
        algorithm = "sha256" if how["method"] == "files" else f"sha256-sharded-{size}"
        digests = {str(item["name"]): _checked_digest(item, algorithm) for item in listed}
        manifest = Manifest(
            digest=_root(digests),
            method=_known(how["method"], how["hash_type"]),
            shard_size=size,
            ignored=tuple(str(path) for path in how.get("ignore_paths", ())),
            listed=digests,
            signature_digest=hashlib.sha256(data).hexdigest(),
            statement=statement,
            signature=base64.b64decode(signed["sig"], validate=True),
        )
        if len(digests) != len(listed) or subject["digest"]["sha256"] != manifest.digest:
            raise ValueError("its list does not add up")
        if manifest.method == "shards":
            if manifest.shard_size <= 0:
                raise ValueError("it names no size of shards")
            manifest.files()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"{SIGNATURE_FILE} is not a model signature that this version can read: {error}.",
            next_step="Take the file that was saved with the model.",
            code="model-signature",
        ) from error
    return manifest


def _checked_digest(item: dict[str, Any], algorithm: str) -> str:
    digest = str(item["digest"])
    if item["algorithm"] != algorithm or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError("it lists something else than SHA-256")
    return digest


def _known(method: str, algorithm: str) -> Method:
    if method not in ("files", "shards") or algorithm != "sha256":
        raise ValueError(f"it is listed by {method} and {algorithm}")
    return "files" if method == "files" else "shards"


def changes(folder: Path, manifest: Manifest) -> list[Change]:
    """How ``folder`` differs from what was signed, by the names of the files; empty where it does not.

    Raises:
        OSError: a file cannot be read.
    """
    links, files = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            links.append(Change("link", name))
        elif path.is_file() and not _is_ignored(name, manifest.ignored):
            files.append(path)
    listed = _digests(folder, files, manifest.method, manifest.shard_size)
    names = [path.relative_to(folder).as_posix() for path in files]
    # By shards an empty file has no digest at all: it is there, and nothing lists it.
    now = dict.fromkeys(names, ()) | _by_file(listed) if manifest.method == "shards" else _whole(listed)
    return [*links, *_differences(manifest, now)]


def _differences(manifest: Manifest, now: dict[str, tuple[str, ...]]) -> Iterator[Change]:
    then = manifest.files()
    removed = [name for name in then if name not in now]
    for name in sorted(now):
        if name not in then:
            was = next((old for old in removed if then[old] == now[name]), None)
            if was is None:
                yield Change("added", name)
            else:
                removed.remove(was)
                yield Change("renamed", name, was)
        elif then[name] != now[name]:
            yield Change("changed", name, at=_ranges(manifest, then[name], now[name]))
    yield from (Change("removed", name) for name in removed)


def _ranges(manifest: Manifest, then: Sequence[str], now: Sequence[str]) -> tuple[tuple[int, int], ...]:
    if manifest.method == "files":
        return ()
    size = manifest.shard_size
    together = [(a, b) for a, b in zip(then, now, strict=False)]
    found = [at for at, (a, b) in enumerate(together) if a != b]
    found += range(len(together), max(len(then), len(now)))
    return tuple((at * size, (at + 1) * size) for at in found)


def _whole(listed: dict[str, str]) -> dict[str, tuple[str, ...]]:
    return {name: (digest,) for name, digest in listed.items()}


def _by_file(listed: dict[str, str]) -> dict[str, tuple[str, ...]]:
    parts: dict[str, list[tuple[int, str]]] = {}
    for name, digest in listed.items():
        file, start, _ = name.rsplit(":", 2)
        parts.setdefault(file, []).append((int(start), digest))
    return {file: tuple(digest for _, digest in sorted(found)) for file, found in parts.items()}


# --- tensors in files ------------------------------------------------------------------------------------------------


def stored_tensors(path: Path) -> dict[str, str]:
    """The tensors of a safetensors file: ``dtype NUL shape NUL SHA-256`` by name, as in a tensor list.

    Raises:
        FormatError: it is no safetensors file.
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= _MOST_HEADER:
                raise ValueError("its header has no length")
            text = file.read(length)
        if len(text) != length:
            raise ValueError("it is cut off")
        header = json.loads(text)
        found = {name: item for name, item in header.items() if name != "__metadata__"}
        begins = 8 + length
        spans = [(begins + int(item["data_offsets"][0]), begins + int(item["data_offsets"][1]))
                 for item in found.values()]  # fmt: skip
        size = path.stat().st_size
        if any(not begins <= start <= end <= size for start, end in spans):
            raise ValueError("it is cut off")
        fronts = [f"{_DTYPES.get(item['dtype'], item['dtype'])}\0{','.join(map(str, item['shape']))}"
                  for item in found.values()]  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise FormatError(f"{path.name} is not a safetensors file: {error}.", code="safetensors") from error
    digests = side_by_side(lambda span: _part_digest(path, *span), spans)
    return {name: f"{front}\0{digest}" for name, front, digest in zip(found, fronts, digests, strict=True)}
