"""Label privacy at the door: a source is read, its labels are charged and drawn, the noisy rows are written. Floor 4.

`rlhf_audit_nb.capture` reads sources and `rlhf_audit_nb.privacy` knows mechanisms; neither knows the other. This is
where they meet. The order is: everything that can be refused is refused; the release is charged; the noisy rows are on
the disk, read back and compared; the original is destroyed, where that was asked for; the trail says so.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import ConfigError, StoreError
from rlhf_audit_nb.events import AnnotationsImported, LabelsReleased, encode_body

if TYPE_CHECKING:
    from rlhf_audit_nb.privacy.label_release import Drawn
    from rlhf_audit_nb.privacy.labels import LabelRows
    from rlhf_audit_nb.trail import Trail

__all__ = ["LabelRelease", "PreparedRelease", "prepare_release"]

_SUFFIXES = (".jsonl", ".ndjson")
_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, kw_only=True)
class LabelRelease:
    """Labels that were released: the noisy rows, and what they cost.

    Attributes:
        release: its id, which each noisy row names.
        entry: the index of its entry.
        labels: how many there are.
        epsilon: what this release costs each of them.
        flip_probability: the chance with which each was flipped.
        epsilon_total: what all releases of this trail together cost the label that they cost most.
        budget: what a label may cost altogether.
        path: the noisy file; ``None`` where none was asked for.
        originals: ``kept`` or ``destroyed``.
        most_labels: how many labels the annotator with the most of them gave; ``None`` where nobody knows.
        annotator_epsilon: what this release costs that annotator, all her labels together, at ``delta``.
        delta: of that figure.
        warnings: what a person should know, as sentences.
        rows: the noisy rows, as columns.
    """

    release: str
    entry: int
    labels: int
    epsilon: float
    flip_probability: float
    epsilon_total: float
    budget: float
    path: str | None
    originals: str
    most_labels: int | None
    annotator_epsilon: float | None
    delta: float
    warnings: tuple[str, ...] = ()
    rows: Mapping[str, list[Any]] = field(repr=False, default_factory=dict)

    @property
    def dataset(self) -> Any:
        """The noisy rows as a `datasets.Dataset`, for a trainer."""
        from datasets import Dataset

        return Dataset.from_dict(dict(self.rows))

    def to_dict(self) -> dict[str, Any]:
        """All fields but the rows, as plain values."""
        return {name: value for name, value in asdict(self).items() if name != "rows"}

    def __str__(self) -> str:
        from rlhf_audit_nb.compliance.words import epsilon_text, plural

        said = (
            f"{plural(self.labels, 'label')} released with ε {epsilon_text(self.epsilon)} each (entry {self.entry}): "
            f"each was flipped with chance {self.flip_probability:.4g}. A label has cost at most "
            f"ε {epsilon_text(self.epsilon_total)} of {self.budget:g} altogether. The texts and who annotated are not "
            "protected."
        )
        if self.most_labels is not None and self.annotator_epsilon is not None:
            said += (
                f" For an annotator with {plural(self.most_labels, 'label')} this release is "
                f"ε {epsilon_text(self.annotator_epsilon)} at δ {self.delta:g}."
            )
        return said

    __repr__ = __str__


@dataclass(frozen=True, kw_only=True)
class PreparedRelease:
    """Labels that were read and can be released; no trail was touched yet."""

    rows: LabelRows
    epsilon: float
    original: str | None
    target: Path | None
    doomed: Path | None
    config: PrivacyConfig | None

    def release(self, trail: Trail) -> LabelRelease:
        """Charge the release to ``trail``, draw it, write it, and destroy the original where that was asked for.

        Raises:
            BudgetExceededError: a label would cost more than the budget; nothing was released.
            PrivacyError: the trail counts another unit; nothing was released.
            StoreError: the release is charged and the noisy file, or the original, could not be written.
        """
        from rlhf_audit_nb.privacy import label_release

        drawn = label_release.release_labels(
            trail,
            self.rows,
            self.epsilon,
            config=self.config,
            keep_seed=self.doomed is None,
            original=self.original,
        )
        event = drawn.event
        digest = _write(self.target, drawn.rows, event) if self.target is not None else None
        originals = "kept" if self.doomed is None else _destroy(self.doomed)
        written = label_release.written_event(
            event.release, form="jsonl" if self.target is not None else "dataset", digest=digest, originals=originals
        )
        trail.append(written.TYPE, encode_body(written)).wait()
        if originals == "not destroyed":
            raise StoreError(
                f"The labels are released (entry {drawn.index}), but {self.doomed} could not be destroyed.",
                next_step="Destroy it by other means; the trail says that it was not.",
                code="not-destroyed",
            )
        return self._told(trail, drawn, originals)

    def _told(self, trail: Trail, drawn: Drawn, originals: str) -> LabelRelease:
        event = drawn.event
        most, composed = _composed(self.rows, event.epsilon, self.config)
        return LabelRelease(
            release=event.release,
            entry=drawn.index,
            labels=event.labels,
            epsilon=event.epsilon,
            flip_probability=event.flip_probability,
            epsilon_total=float(event.epsilon_total),
            budget=event.epsilon_budget,
            path=str(self.target) if self.target is not None else None,
            originals=originals,
            most_labels=most,
            annotator_epsilon=composed,
            delta=_delta(self.config),
            warnings=_warnings(trail, self.rows, self.doomed),
            rows=drawn.rows,
        )


def prepare_release(
    data: Any,
    *,
    epsilon: float,
    columns: Mapping[str, str | None] | None = None,
    keep: Sequence[str] = (),
    words: Mapping[Any, str] | None = None,
    out: Path | str | None = None,
    destroy_original: bool = False,
    config: PrivacyConfig | None = None,
) -> PreparedRelease:
    """Read the labels of ``data`` and check all that can be checked; see `AuditableRLHF.release_labels`.

    Raises:
        DataError: the source cannot be read, or a row has no two texts and one choice.
        ConfigError: ``out`` exists or cannot be written, or the original cannot be destroyed.
        PrivacyError: epsilon cannot be used, or ``config`` counts another unit than labels.
    """
    from rlhf_audit_nb.capture.tables import read_table
    from rlhf_audit_nb.privacy.label_release import check_request
    from rlhf_audit_nb.privacy.labels import read_labels

    epsilon = check_request(epsilon, config)
    target = _target(out)
    doomed = _destructible(data, target) if destroy_original else None
    table = read_table(data)
    return PreparedRelease(
        rows=read_labels(table.columns, name=table.name, names=columns, keep=keep, words=words),
        epsilon=epsilon,
        original=table.sources[0].digest if table.sources else None,
        target=target,
        doomed=doomed,
        config=config,
    )


# --- files -----------------------------------------------------------------------------------------------------------


def _target(out: Path | str | None) -> Path | None:
    """Where the noisy rows go: a file that is not there yet."""
    if out is None:
        return None
    path = Path(out)
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(
            f"The noisy rows are written as JSON lines, and {path} is not called so.",
            next_step=f"Write such as {path.with_suffix('.jsonl').name}.",
            code="output",
        )
    if path.exists() or path.is_symlink():
        raise ConfigError(
            f"{path} is there already; labels are released once, and the noisy rows are not written over.",
            next_step="Train on it if it holds these labels' release, or name another file.",
            code="output-exists",
        )
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise ConfigError(
            f"{path} cannot be written: its folder is missing or read-only.",
            next_step="Name a file in a folder that can be written.",
            code="output",
        )
    return path


def _destructible(data: Any, target: Path | None) -> Path:
    """The source, where it can be destroyed once the noisy rows are safe."""
    if not isinstance(data, str | Path):
        raise ConfigError(
            f"Only a file can be destroyed, and the labels come as a {type(data).__name__}.",
            next_step="Hand in the file's path, or leave out destroy_original and destroy what holds them yourself.",
            code="destroy-original",
        )
    if target is None:
        raise ConfigError(
            "The original cannot be destroyed where the noisy rows are not written anywhere.",
            next_step='Name a file for them: out="noisy.jsonl" (-o noisy.jsonl).',
            code="destroy-original",
        )
    path = Path(data)
    if path.exists() and (path.is_symlink() or not path.is_file() or path.stat().st_nlink != 1):
        raise ConfigError(
            f"{path} is a link, or has other names that would go on holding it.",
            next_step="Name the file itself, and take its other names away first.",
            code="destroy-original",
        )
    if path.exists() and not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
        raise ConfigError(
            f"{path} or its folder is read-only, so it cannot be destroyed.",
            next_step="Make both writable, or leave out destroy_original.",
            code="destroy-original",
        )
    return path


def _write(path: Path, rows: Mapping[str, list[Any]], event: LabelsReleased) -> str:
    """Write the noisy rows, read them back, and give their digest."""
    from rlhf_audit_nb.trail.durable import write_durably

    lines = (dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True))
    data = b"".join(_encoder.encode(line) + b"\n" for line in lines)
    digest = hashlib.sha256(data).hexdigest()
    try:
        write_durably(path, data)
        there = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise _unwritten(path, event, error.strerror or str(error)) from error
    if there != digest:
        raise _unwritten(path, event, "what was read back differs")
    return digest


def _unwritten(path: Path, event: LabelsReleased, why: str) -> StoreError:
    return StoreError(
        f"The release {event.release} is charged, but {path} cannot be written: {why}.",
        next_step="The original is as it was. Make room, and release again; the budget counts both.",
        code="read-only",
    )


def _destroy(path: Path) -> str:
    from rlhf_audit_nb.trail.durable import destroy_file

    try:
        destroy_file(path)
    except OSError:
        return "not destroyed"  # the trail says so, and then the caller is told
    return "destroyed"


# --- what a person is told -------------------------------------------------------------------------------------------


def _delta(config: PrivacyConfig | None) -> float:
    return config.delta if config is not None else PrivacyConfig.delta


def _composed(rows: LabelRows, epsilon: float, config: PrivacyConfig | None) -> tuple[int | None, float | None]:
    from rlhf_audit_nb.privacy.randomised_response import composed_response

    most = rows.most_labels()
    return most, composed_response(epsilon, most, _delta(config)) if most else None


def _warnings(trail: Trail, rows: LabelRows, doomed: Path | None) -> tuple[str, ...]:
    from rlhf_audit_nb.compliance.words import plural

    said = []
    if rows.dropped:
        said.append(
            f"Left behind: {', '.join(rows.dropped)}. What stands beside a label may tell it; name a column with keep "
            "to carry it over."
        )
    if rows.kept:
        said.append(
            f"Carried over as asked: {', '.join(rows.kept)}. What these columns tell of the labels is not protected."
        )
    repeats, often = rows.repeated()
    if repeats:
        whose = "the texts and the annotator" if rows.annotators else "the texts"
        said.append(
            f"{plural(repeats, 'row')} repeat {whose} of another one, up to {often} times. Each row counts as a label "
            "of its own: a vote that stands there several times is released as often, and costs as many times ε."
        )
    if doomed is not None and next(trail.reader().entries(type=AnnotationsImported.TYPE), None) is not None:
        said.append(
            "The vault of this trail holds annotations that were imported; if these labels are among them, they are "
            "still there, until their annotators are erased."
        )
    return tuple(said)
