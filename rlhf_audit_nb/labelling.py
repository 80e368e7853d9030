"""Label privacy at the door: a source is read, its labels are charged and drawn, the noisy rows are written. Floor 4.

`rlhf_audit_nb.capture` reads sources and `rlhf_audit_nb.privacy` knows mechanisms; neither knows the other. This is
where they meet. The order is: everything that can be refused is refused; the release is charged; the noisy rows are on
the disk, read back and compared; the original is destroyed, where that was asked for; the trail says so.

A run with unit ``label`` then trains on what was released (`LabelPrivatiser`): every row is shown to come out of a
release, the loss is debiased while it trains, and nothing is charged.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from rlhf_audit_nb.config import PrivacyConfig
from rlhf_audit_nb.errors import ConfigError, PrivacyError, StoreError
from rlhf_audit_nb.events import AnnotationsImported, LabelsReleased, LabelsWritten, decode_body, encode_body
from rlhf_audit_nb.privatiser import InheritedTraining, TrailPrivatiser, model_shown

if TYPE_CHECKING:
    from rlhf_audit_nb.privacy.label_binding import BoundLabels
    from rlhf_audit_nb.privacy.label_release import Drawn
    from rlhf_audit_nb.privacy.labels import LabelRows
    from rlhf_audit_nb.privacy.post_processing import Inheritance
    from rlhf_audit_nb.trail import Trail

__all__ = [
    "LabelPrivatiser",
    "LabelRelease",
    "LabelTraining",
    "PreparedRelease",
    "plan_label_training",
    "prepare_release",
]

UNPROTECTED = (
    "This bounds what is known of each single label (which response was preferred); the texts, who annotated, and "
    "several labels of one annotator together are not protected."
)

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


# --- training on what was released -----------------------------------------------------------------------------------


class LabelPrivatiser(TrailPrivatiser):
    """Lets trainers train on released labels; see `rlhf_audit_nb.capture.run.Privatiser`.

    Nothing is clipped and no noise is added: what is made of released labels is as private as they are. So all that
    such a training measures stands in the open.
    """

    def quiet(self) -> AbstractContextManager[Any]:
        """Nothing has to be kept quiet: what libraries print of released rows is public for this unit."""
        return nullcontext()

    def inherit(self, trainer: Any) -> InheritedTraining:
        """What a training on released labels inherits, or GRPO and RLOO from a reward model that was trained on them.

        Raises:
            UnsupportedTrainerError: its loss cannot be debiased, or its weights come from a training without a bound.
            PrivacyError: its rows did not come out of a release of this trail, or cost more than was asked for.
            DataError: its data is no data set of `datasets`.
        """
        from rlhf_audit_nb.privacy.post_processing import is_post_processing

        if is_post_processing(trainer):
            inherited = super().inherit(trainer)
            assert inherited is not None  # for the type checker; it is one of those
            return inherited
        return LabelTraining(*plan_label_training(trainer, self.config, self.trail))

    def plan(self, trainer: Any, *, done: int = 0) -> NoReturn:
        """Never asked for: every training on labels inherits, or is refused."""
        del trainer, done
        raise PrivacyError("A training on released labels charges nothing and has no plan.", code="label-plan")


class LabelTraining(InheritedTraining):
    """One training on released labels: what `rlhf_audit_nb.capture.run.InheritedPlan` asks for."""

    def __init__(self, inheritance: Inheritance, bound: BoundLabels, settings: dict[str, Any]) -> None:
        super().__init__(inheritance)
        self._bound = bound
        self._settings = settings

    @property
    def units(self) -> int | None:
        """How many labels it reads."""
        return self._bound.rows

    @property
    def trained_as(self) -> dict[str, Any]:
        """The debiased loss in place of the trainer's own."""
        return self._settings

    def training(self, trainer: Any) -> AbstractContextManager[None]:
        """The debiased loss, for as long as it trains."""
        from rlhf_audit_nb.privacy.label_losses import debiased

        return debiased(trainer, self._bound.flip_probability)


def plan_label_training(
    trainer: Any, config: PrivacyConfig, trail: Trail
) -> tuple[Inheritance, BoundLabels, dict[str, Any]]:
    """What a training on released labels inherits, the rows that it reads, and the settings that it runs with.

    Raises:
        UnsupportedTrainerError: its loss cannot be debiased, or its weights come from a training without a bound.
        PrivacyError: its rows did not come out of a release of this trail, or cost more than was asked for.
        DataError: its data is no data set of `datasets`.
    """
    from rlhf_audit_nb.privacy.descent import read_descent
    from rlhf_audit_nb.privacy.label_binding import bind_labels
    from rlhf_audit_nb.privacy.label_losses import check_flip_probability, check_label_trainer, trained_as
    from rlhf_audit_nb.privacy.label_release import open_releases
    from rlhf_audit_nb.privacy.post_processing import Inheritance, begun_from

    check_label_trainer(trainer)
    ledger, opened = open_releases(trail)
    ledger.check_unit("label")
    ledger.check(config)
    bound = bind_labels(trainer, ledger.releases, opened)
    check_flip_probability(trainer, bound.flip_probability)
    unwrap, reference = trainer.accelerator.unwrap_model, getattr(trainer, "ref_model", None)
    begun, exposure, note = begun_from(
        model_shown(unwrap(trainer.model), "policy"),
        None if reference is None else model_shown(unwrap(reference), "reference"),
        read_descent(trail.reader()),
    )
    used = exposure.spends | {release.index for release in bound.releases}
    # Each total covers the releases before it too.
    epsilon = max(release.total for release in ledger.releases if release.index in used)
    _check_inherited(epsilon, config)
    digests = _written_digests(trail)
    rows = [
        {"entry": one.index, "run": None, "digest": digests.get(one.release), "role": "data"} for one in bound.releases
    ]
    said = f"{UNPROTECTED} {note}" if note else UNPROTECTED
    inheritance = Inheritance("label", epsilon, 0.0, (*rows, *begun), said, kind="released-labels", prompts=None)
    return inheritance, bound, trained_as(trainer, bound.flip_probability)


def _check_inherited(epsilon: float, config: PrivacyConfig) -> None:
    if epsilon > config.epsilon * (1 + 1e-12):
        raise PrivacyError(
            f"This run asks for epsilon {config.epsilon:g} for each label, and these labels were released with "
            f"{epsilon:g} altogether: what is known of them cannot be taken back.",
            next_step=f"Write epsilon={epsilon:g} or more; training on released labels charges nothing.",
            code="inherits-too-much",
        )


def _written_digests(trail: Trail) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for entry in trail.reader().entries(type=LabelsWritten.TYPE):
        event = decode_body(entry.type, entry.body)
        if isinstance(event, LabelsWritten):
            found[event.release] = event.digest
    return found
