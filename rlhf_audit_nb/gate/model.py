"""The folder of a model at a gate: what it is, what no signature covers, and what comes near it. Floor 4.

`rlhf_audit_nb.compliance.weights` says whether a folder is what a run saved. A gate is stricter: nothing may lie in it
that the signature does not cover (the signing standard leaves out git's files and checkpoints below), and where the
signature is gone, the record must hold the files' names as well as their contents.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_audit_nb.capture.folders import (
    SIGNATURE_FILE,
    TENSORS_SUFFIX,
    digest_and_list,
    holds_weights,
    nested_checkpoints,
    read_manifest,
    stored_tensors,
)
from rlhf_audit_nb.compliance.weights import check_weights
from rlhf_audit_nb.compliance.words import plural, short
from rlhf_audit_nb.errors import ConfigError, FormatError, RunError
from rlhf_audit_nb.events import WeightsSaved
from rlhf_audit_nb.gate.finding import Finding
from rlhf_audit_nb.gate.policy import GIT_FILES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rlhf_audit_nb.capture.folders import Manifest
    from rlhf_audit_nb.compliance.evidence import Evidence
    from rlhf_audit_nb.compliance.weights import SavedWeights

__all__ = ["Model", "model_findings", "near_tensors", "open_model"]

_MOST_NAMES = 3
_MOST_LISTS = 500
_MOST_LIST = 64 << 20


@dataclass(frozen=True)
class Model:
    """A folder of weights, as it lies there now.

    Attributes:
        folder: where.
        digest: over its files; ``None`` where it holds a symbolic link.
        listed: over its files' names and digests, likewise.
        manifest: what its ``model.sig`` says; ``None`` where there is none that can be read.
        uncovered: files that no signature covers, by their names in the folder.
    """

    folder: Path
    digest: str | None
    listed: str | None
    manifest: Manifest | None
    uncovered: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def digests(self) -> frozenset[str]:
        """By what a record can know it: its own digest, that which its signature claims, and the signature's."""
        claimed = (self.manifest.digest, self.manifest.signature_digest) if self.manifest is not None else ()
        return frozenset(digest for digest in (self.digest, *claimed) if digest is not None)

    def tensors(self) -> dict[str, str] | None:
        """``dtype NUL shape NUL SHA-256`` of each tensor by name; ``None`` where none can be read."""
        found: dict[str, str] = {}
        try:
            for path in sorted(self.folder.glob("*.safetensors")):
                found |= stored_tensors(path)
        except FormatError:
            return None
        return found or None

    def weights_digest(self) -> str | None:
        """The weights digest of its tensors (`rlhf_audit_nb.capture.weights`); ``None`` where they cannot be read."""
        found = self.tensors()
        if found is None:
            return None
        lines = "".join(f"{name}\0{found[name]}\n" for name in sorted(found))
        return hashlib.sha256(lines.encode()).hexdigest()

    def knows(self, saved: Iterable[WeightsSaved]) -> bool:
        """Whether one of the entries is of this folder, by its files or its signature."""
        return any(self.digests & {one.digest, one.signature_digest} for one in saved)


def open_model(folder: Path | str) -> Model:
    """The model in a folder.

    Raises:
        ConfigError: there is no such folder, or it holds no weights.
        OSError: a file cannot be read.
    """
    place = Path(folder)
    if not place.is_dir() or not holds_weights(place):
        raise ConfigError(
            f"{folder} is not a folder with weights.",
            next_step="Name the folder of the model that is to be used: one with safetensors files.",
            code="no-weights",
        )
    try:
        manifest = read_manifest(place)
    except FormatError:
        manifest = None  # whoever checks the folder against a record names what is wrong with it
    digest: str | None
    listed: str | None
    try:
        digest, listed = digest_and_list(place)
    except RunError:
        digest = listed = None  # a symbolic link, which that check names as well
    return Model(place, digest, listed, manifest, tuple(_uncovered(place, manifest)))


def _uncovered(folder: Path, manifest: Manifest | None) -> Iterator[str]:
    ignored = {*GIT_FILES, *nested_checkpoints(folder), *(manifest.ignored if manifest is not None else ())}
    ignored.discard(SIGNATURE_FILE)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        left_out = any(name == one or name.startswith(f"{one}/") for one in ignored)
        special = not path.is_symlink() and not path.is_file() and not path.is_dir()
        if special or (left_out and not path.is_dir()):
            yield name


def model_findings(
    model: Model, evidence: Evidence, allowed: tuple[str, ...]
) -> tuple[SavedWeights | None, tuple[Finding, ...]]:
    """Whether the folder is, file by file, what the record says that a run saved; the entry, and findings."""
    verdict = check_weights(model.folder, evidence)
    saved, codes = verdict.saved, {reason.code for reason in verdict.reasons}
    if saved is not None and codes == {"model-signature"} and _same_files(model, evidence, saved):
        # Every file is the record's own; only who signed them last is not. Nothing that was trained was changed.
        said = f"The files are those of entry {saved.entry}; {SIGNATURE_FILE} is not: {verdict.reasons[0].message}"
        return saved, (Finding("model.signature", False, said, (saved.entry,)), *_covered(model, allowed))
    found = [
        Finding("model.files", False, f"{reason.message} [{reason.code}]", where=reason.where, tampering=True)
        for reason in verdict.reasons
    ]
    if saved is not None and not found:
        found.append(Finding("model.files", True, verdict.words, (saved.entry,)))
        found += _named(model, evidence, saved)
    return saved, (*found, *_covered(model, allowed))


def _same_files(model: Model, evidence: Evidence, saved: SavedWeights) -> bool:
    events = (event for item, event in evidence.of(WeightsSaved) if item.index == saved.entry)
    return any(event.digest == model.digest and event.listed == model.listed for event in events)


def _named(model: Model, evidence: Evidence, saved: SavedWeights) -> Iterator[Finding]:
    event = next(event for item, event in evidence.of(WeightsSaved) if item.index == saved.entry)
    if model.manifest is None and event.listed is None:
        said = f"{SIGNATURE_FILE} is gone, and its entry does not hold the files' names: they may have been exchanged."
        yield Finding("model.names", False, said, (saved.entry,))


def _covered(model: Model, allowed: tuple[str, ...]) -> Iterator[Finding]:
    left = [name for name in model.uncovered if name.split("/", 1)[0] not in allowed]
    if left:
        more = f" and {len(left) - _MOST_NAMES} more" if len(left) > _MOST_NAMES else ""
        said = f"No signature covers {', '.join(left[:_MOST_NAMES])}{more}: use the folder without."
        yield Finding("model.uncovered", False, said)
    elif model.uncovered:
        files = plural(len(model.uncovered), "file")
        said = f"{files} of git's own lie in it, which no signature covers, as the policy allows."
        yield Finding("model.uncovered", True, said)


def near_tensors(model: Model, artifacts: Path) -> Iterator[str]:
    """What comes nearest among the models of which a list of tensors lies beside the trail, in a sentence."""
    now = model.tensors()
    if not now:
        return
    best: tuple[int, int, str] | None = None
    for path in sorted(artifacts.glob(f"*{TENSORS_SUFFIX}"))[:_MOST_LISTS]:
        if path.stat().st_size > _MOST_LIST:
            continue
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        then = dict(line.split("\0", 1) for line in lines if "\0" in line)
        same = sum(then.get(name) == told for name, told in now.items())
        if same and (best is None or same > best[0]):
            best = (same, len(then), path.stem)
    if best is not None:
        same, count, digest = best
        yield (
            f"Nearest by its tensors: {same:,} of {len(now):,} are those of the model {short(digest)} that a training "
            f"left ({count:,} tensors)."
        )
