"""Whether a folder of weights is what a run saved, by the trail. Floor 3.

`check_weights` compares a folder with its ``model.sig`` and that with the trail: the signature must be one that an
entry ``weights.saved`` names, made with the key that the trail itself gives for that entry (its first entry, and the
rotations since), never with the ``model.pub`` that lies in the folder. It says which entry, run and step the folder
is, and names what was changed, added, removed or renamed; of a changed safetensors file also the tensors, where the
list of them lies beside the trail (`rlhf_audit_nb.capture.weights`).

A folder without signature is looked up by its digest alone: that shows as much of its files.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key

from rlhf_audit_nb.capture.folders import (
    SIGNATURE_FILE,
    TENSORS_SUFFIX,
    Change,
    changes,
    digest_and_list,
    holds_weights,
    nested_checkpoints,
    read_manifest,
    stored_tensors,
)
from rlhf_audit_nb.compliance.words import level_words, short
from rlhf_audit_nb.errors import ConfigError, FormatError, RunError
from rlhf_audit_nb.events import ModelBound, RunStarted, Step, TrainerAttached, WeightsSaved
from rlhf_audit_nb.trail.home import home_folder
from rlhf_audit_nb.trail.succession import KeySuccession, known_limits
from rlhf_audit_nb.trail.verdict import Level, Reason

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.folders import Manifest
    from rlhf_audit_nb.compliance.evidence import Evidence
    from rlhf_audit_nb.trail import Verdict

__all__ = ["SavedWeights", "WeightsVerdict", "check_weights", "saved_weights"]

_MOST_LIST = 256 << 20
_MOST_TENSORS = 8


@dataclass(frozen=True)
class SavedWeights:
    """The entry that says that a run saved a folder.

    Attributes:
        entry: its index.
        run: the run's id.
        experiment: the run's name.
        step: the optimizer step after which it was saved; ``None`` where no training had begun.
        name: what the folder was called.
        digest: over its files.
        time: when, UTC microseconds.
    """

    entry: int
    run: str
    experiment: str
    step: int | None
    name: str
    digest: str
    time: int

    @property
    def words(self) -> str:
        """The entry in a few words."""
        after = f" after step {self.step:,}" if self.step is not None else ""
        return f"{self.name} of {self.experiment!r} (run {short(self.run)}), saved{after}: entry {self.entry}"


@dataclass(frozen=True, repr=False)
class WeightsVerdict:
    """What a check of a folder of weights found.

    Attributes:
        folder: the folder's own name.
        level: the trail's level where the folder is what the trail says, else ``INVALID``.
        trail: the verdict on the trail.
        saved: the entry that it is, or that its signature belongs to; ``None`` where the trail knows neither.
        others: further entries of the same content.
        changes: how its files differ from what was signed.
        tensors: the tensors of changed files that differ from the run's list.
        reasons: why it is not what the trail says; empty where it is.
        notes: what is worth knowing beside it, as sentences.
    """

    folder: str
    level: Level
    trail: Verdict
    saved: SavedWeights | None
    others: tuple[SavedWeights, ...] = ()
    changes: tuple[Change, ...] = ()
    tensors: tuple[str, ...] = ()
    reasons: tuple[Reason, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def intact(self) -> bool:
        """Whether it is what the trail says, and the trail is to be believed."""
        return self.level > Level.DIVERGED and not self.reasons

    def exit_code(self, require: Level | None = None) -> int:
        """The process status: that of the trail's verdict where the folder is intact, else that of INVALID."""
        return self.trail.exit_code(require) if not self.reasons else self.level.exit_code

    @property
    def words(self) -> str:
        """The outcome in one sentence."""
        if not level_words(self.trail.level.name).trusted:
            return f"{self.folder}: the trail does not hold, so it shows nothing of these weights."
        if self.reasons and self.saved is not None:
            return f"{self.folder} is not what was saved as {self.saved.words}."
        if self.saved is None:
            return f"{self.folder} is not known to the trail {self.trail.origin}."
        return f"{self.folder} is, file by file, {self.saved.words}."

    @property
    def reason_words(self) -> tuple[str, ...]:
        """Each reason in a sentence, with the place where the sentence does not begin with it, and its code."""
        return tuple(
            f"{'' if reason.message.startswith(reason.where) else f'{reason.where}: '}{reason.message} [{reason.code}]"
            for reason in self.reasons
        )

    @property
    def not_shown(self) -> str:
        """What this outcome does not show."""
        if self.reasons and level_words(self.trail.level.name).trusted:
            return "It does not show who changed what, nor when."
        return level_words(self.level.name).not_shown

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "folder": self.folder,
            "level": self.level.name,
            "intact": self.intact,
            "saved": None if self.saved is None else asdict(self.saved),
            "others": [asdict(one) for one in self.others],
            "changes": [{**asdict(change), "words": change.words} for change in self.changes],
            "tensors": list(self.tensors),
            "reasons": [asdict(reason) for reason in self.reasons],
            "notes": list(self.notes),
            "trail": self.trail.to_dict(),
        }

    def __str__(self) -> str:
        lines = [f"{self.level.name}: {self.words}"]
        lines += [f"  {text}" for text in self.reason_words]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    __repr__ = __str__  # what a report shows of a notebook's cell

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def saved_weights(evidence: Evidence) -> tuple[SavedWeights, ...]:
    """Every folder of weights that the evidence shows to have been saved, in the order of the entries."""
    names = {item.run: event.experiment for item, event in evidence.of(RunStarted)}
    return tuple(
        SavedWeights(
            item.index, item.run or "", names.get(item.run, ""), event.step, event.name, event.digest, item.time
        )
        for item, event in evidence.of(WeightsSaved)
    )


def check_weights(folder: Path | str, evidence: Evidence, *, artifacts: Path | None = None) -> WeightsVerdict:
    """Whether ``folder`` is what an entry of ``evidence`` says that a run saved.

    Args:
        folder: a saved model or checkpoint.
        evidence: a verified trail, published trail or record.
        artifacts: the folder beside the trail that holds lists of tensors, where it is at hand.

    Raises:
        ConfigError: there is no such folder, or it holds no weights.
        OSError: a file cannot be read.
    """
    place = Path(folder)
    if not place.is_dir() or not holds_weights(place):
        raise ConfigError(
            f"{folder} is not a folder with weights.",
            next_step="Name a folder that a run saved: one with model.sig, or with safetensors files.",
            code="no-weights",
        )
    verdict = _Check(place, evidence).verdict()
    return verdict if artifacts is None else _with_tensors(verdict, place, evidence, artifacts)


class _Check:
    """One check of one folder."""

    def __init__(self, folder: Path, evidence: Evidence) -> None:
        self._folder = folder
        self._evidence = evidence
        self._saved = saved_weights(evidence)
        self._reasons: list[Reason] = []
        self._notes: list[str] = []

    def verdict(self) -> WeightsVerdict:
        name, trail = self._folder.resolve().name, self._evidence.verdict
        if not self._evidence.trusted:
            return WeightsVerdict(name, trail.level, trail, None)
        manifest = self._manifest()
        found = changes(self._folder, manifest) if manifest is not None else []
        saved = self._by_signature(manifest) if manifest is not None else self._by_digest()
        for change in found:
            self._fault(f"file-{change.kind}", change.name, f"{change.words}.")
        nested = nested_checkpoints(self._folder)
        if nested:
            these = ", ".join(nested[:3]) + (", …" if len(nested) > 3 else "")  # noqa: PLR2004 (a line's worth)
            self._notes.append(f"Not part of this: {these}. Name them to check them.")
        others = tuple(one for one in self._saved if saved is not None and one.digest == saved.digest and one != saved)
        if others:
            self._notes.append(
                f"The same files were saved in entries {', '.join(str(one.entry) for one in others)} too."
            )
        level = Level.INVALID if self._reasons else trail.level
        return WeightsVerdict(
            name, level, trail, saved, others, tuple(found), (), tuple(self._reasons), tuple(self._notes)
        )

    def _fault(self, code: str, where: str, message: str) -> None:
        self._reasons.append(Reason(code, where, message))

    def _manifest(self) -> Manifest | None:
        try:
            return read_manifest(self._folder)
        except FormatError as error:
            self._fault(error.reason, SIGNATURE_FILE, error.message)
            return None

    def _by_signature(self, manifest: Manifest) -> SavedWeights | None:
        """The entry of this very signature."""
        by_entry = {item.index: event for item, event in self._evidence.of(WeightsSaved)}
        for one in self._saved:
            event = by_entry[one.entry]
            if event.signature_digest == manifest.signature_digest:
                if event.digest != manifest.digest:
                    self._fault("model-signature", SIGNATURE_FILE, f"Entry {one.entry} gives it another content.")
                self._check_key(manifest, one.entry)
                return one
        same = [one for one in self._saved if one.digest == manifest.digest]
        keys = self._keys()
        ours = any(
            key is not None and manifest.signed_by(key) for key in (_key(span.key) for span in keys.spans("model"))
        )
        who = "made with this trail's key, but no entry of the trail knows it" if ours else "not of this trail's key"
        like = f"; what it lists is that of entry {same[-1].entry}" if same else ""
        self._fault("model-signature", SIGNATURE_FILE, f"This signature is {who}{like}.")
        return same[-1] if same else None

    def _by_digest(self) -> SavedWeights | None:
        """The entry of this content, where there is no signature to go by."""
        try:
            digest, listed = digest_and_list(self._folder)
        except RunError as error:
            self._fault("file-link", self._folder.name, error.message)
            return None
        same = [one for one in self._saved if one.digest == digest]
        if not same:
            missing = (
                "It has no signature that can be read, and" if self._reasons else f"It has no {SIGNATURE_FILE}, and"
            )
            self._fault("weights-unknown", self._folder.resolve().name, f"{missing} no entry has its digest {digest}.")
            return None
        known = {item.index: event.listed for item, event in self._evidence.of(WeightsSaved)}
        found = next((one for one in reversed(same) if known[one.entry] in (listed, None)), None)
        if found is None:
            self._fault("file-renamed", self._folder.resolve().name, "The files have other names than were saved.")
        elif known[found.entry] is None:
            self._notes.append(f"{SIGNATURE_FILE} is gone; the files are those of the entry, whatever their names are.")
        else:
            self._notes.append(f"{SIGNATURE_FILE} is gone; the files are those of the entry by their digest.")
        return found or same[-1]

    def _check_key(self, manifest: Manifest, index: int) -> None:
        """The signature must be by the model key that the trail names for that entry."""
        keys = self._keys()
        span = keys.key_at("model", index)
        key = _key(span.key) if span is not None else None
        if span is None or key is None:
            self._fault("model-key", f"entry {index}", "The trail names no key for signatures of models there.")
        elif not manifest.signed_by(key):
            self._fault("model-key", SIGNATURE_FILE, "It is not signed with the trail's key for its entry.")
        elif not keys.counts_at(span, index):
            self._fault("model-key", f"entry {index}", "The key that signed it was revoked before.")

    def _keys(self) -> KeySuccession:
        origin = self._evidence.verdict.origin
        keys = KeySuccession(origin, known_limits(home_folder(None), origin))
        for item in self._evidence.items:
            keys.add(item.entry)
        return keys


def _key(text: str) -> ec.EllipticCurvePublicKey | None:
    try:
        key = load_der_public_key(base64.b64decode(text))
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, ec.EllipticCurvePublicKey) else None


# --- tensors ---------------------------------------------------------------------------------------------------------


def _with_tensors(verdict: WeightsVerdict, folder: Path, evidence: Evidence, artifacts: Path) -> WeightsVerdict:
    """The same with the changed tensors named, where the list of the run's own lies beside the trail."""
    changed = [one.name for one in verdict.changes if one.kind == "changed" and one.name.endswith(".safetensors")]
    listed = _tensor_list(verdict.saved, evidence, artifacts) if changed and verdict.saved is not None else None
    if listed is None:
        return verdict
    found, notes = [], []
    for name in changed:
        try:
            stored = stored_tensors(folder / name)
        except FormatError as error:
            notes.append(error.message)
            continue
        differ = [tensor for tensor, told in stored.items() if listed.get(tensor) != told]
        found += differ
        shown = ", ".join(differ[:_MOST_TENSORS]) + (", …" if len(differ) > _MOST_TENSORS else "")
        told = (
            f"in the tensors {shown}" if differ else "in none of the tensors that it holds: in its header, or by a lack"
        )
        notes.append(f"{name} differs {told} ({len(differ):,} of {len(stored):,}).")
    return replace(verdict, tensors=tuple(found), notes=(*notes, *verdict.notes))


def _tensor_list(saved: SavedWeights, evidence: Evidence, artifacts: Path) -> dict[str, str] | None:
    """``dtype NUL shape NUL SHA-256`` by tensor of the model that was saved; ``None`` where no list is at hand."""
    final = _final_of(saved, evidence)
    path = artifacts / f"{final.weights_digest}{TENSORS_SUFFIX}" if final is not None else None
    if path is None or not path.is_file() or path.stat().st_size > _MOST_LIST:
        return None
    lines = path.read_bytes()
    if final is None or hashlib.sha256(lines).hexdigest() != final.weights_digest:
        return None
    parts = (line.partition("\0") for line in lines.decode(errors="replace").splitlines())
    return {name: told for name, _, told in parts}


def _final_of(saved: SavedWeights, evidence: Evidence) -> ModelBound | None:
    """The model that a training left, where the folder was saved after it or at its last step."""
    begins = [item.index for item, _ in evidence.of(TrainerAttached, saved.run)]
    start = max((index for index in begins if index < saved.entry), default=0)
    stop = min((index for index in begins if index > saved.entry), default=evidence.verdict.size)
    finals = [(item.index, event) for item, event in evidence.of(ModelBound, saved.run)
              if event.role == "final" and start < item.index < stop]  # fmt: skip
    if not finals:
        return None
    index, final = finals[0]
    steps = [event.step for item, event in evidence.of(Step, saved.run) if start < item.index < index]
    return final if index < saved.entry or (steps and max(steps) == saved.step) else None
