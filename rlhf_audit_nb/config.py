"""What a user may set, validated when it is set. Floor 0.

Two frozen objects: `PrivacyConfig` (what is protected and how much) and `AuditConfig` (where and how the trail is
kept). Every refusal names the field, the value and what to write instead.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rlhf_audit_nb.errors import ConfigError

__all__ = [
    "DEFAULT_TRAIL",
    "ENV_HOME",
    "ENV_REPLAY",
    "ENV_TRAIL",
    "Adjacency",
    "AuditConfig",
    "Durability",
    "GradientEngineName",
    "PrivacyConfig",
    "Unit",
]

Unit = Literal["annotator", "pair", "label"]
Sampled = Literal["units", "pairs"]
Adjacency = Literal["zero-out"]
Durability = Literal["always", "batched"]
GradientEngineName = Literal["auto", "loop", "rows"]

DEFAULT_TRAIL = "audit"
ENV_TRAIL = "RLHF_AUDIT_TRAIL"
ENV_HOME = "RLHF_AUDIT_HOME"
ENV_REPLAY = "RLHF_AUDIT_REPLAY"
ENV_SLOT = "RLHF_AUDIT_SLOT"
ENV_PASSPHRASE = "RLHF_AUDIT_PASSPHRASE"
ENV_PERSON_PASSPHRASE = "RLHF_AUDIT_PERSON_PASSPHRASE"

MIN_DELTA = 1e-10
MIN_CANARIES = 2
MAX_CANARIES = 100_000
MAX_SAMPLED_PAIRS = 1000
"""How many separately sampled pairs of one unit can be accounted for."""


def _number(name: str, value: object, hint: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name} is {value!r}, which is not a finite number.", next_step=hint, code=name)
    return float(value)


def _positive(name: str, value: object, hint: str) -> float:
    number = _number(name, value, hint)
    if number <= 0:
        raise ConfigError(f"{name} is {value!r}; it must be greater than 0.", next_step=hint, code=name)
    return number


def _count(name: str, value: object, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1.", next_step=hint, code=name)


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """The guarantee that is asked for, and how it is reached.

    Args:
        epsilon: the population's whole budget on this trail, over all runs (> 0).
        delta: probability with which the bound may fail; in (1e-10, 1), and well below 1 / (number of units).
        unit: what neighbouring data sets differ in: ``"annotator"`` (all her pairs), ``"pair"`` (one preference) or
            ``"label"`` (only which of a pair was preferred: labels are released by `AuditableRLHF.release_labels`, and
            ``epsilon`` is what all releases of one label may cost together).
        anonymize_annotators: annotator ids are written nowhere in the open; there is no setting under which they are.
        run_epsilon: what this run alone may add to the composed total; ``None`` lets it plan with all that is left.
        clipping_norm: C, the bound on the L2 norm of one unit's gradient (> 0).
        noise_multiplier: sigma, noise standard deviation in units of C; ``None`` calibrates it to the budget.
        sampling_rate: q in (0, 1], chance of each unit per step; ``None`` takes batch size / number of units
            (with ``sampled="pairs"``: chance of each kept pair; batch size / (k * number of annotators)).
        max_pairs_per_unit: k, at most so many pairs of a sampled unit enter a step (>= 1); costs no epsilon where
            units are sampled, and much of it where pairs are.
        sampled: what is drawn and clipped as one: ``"units"`` (an annotator with all her pairs) or, with
            ``unit="annotator"`` only, ``"pairs"``: at most k pairs of each annotator are kept for the whole training,
            each is drawn with chance q and clipped alone, and what all of them together tell of her is accounted for.
        annotator_column: the data column that holds the annotator's id.
        engine: how units' gradients are computed: ``"loop"`` (one unit after the other, every trainer), ``"rows"`` (a
            batch at once; LoRA and Linear layers) or ``"auto"`` (by an estimate of cost from public numbers).
        micro_batch: how many rows of the data go through the model at once, which bounds the memory (>= 1); ``None``
            takes the trainer's per-device batch size.
        adjacency: ``"zero-out"``: the roster of units is public, what each of them answered is not.
        loss_noise: how many times the gradient's noise the live loss gets (>= 1): each step releases the clipped loss
            of its sample, which is charged with the gradient (at 10, about 0.5 % more noise for the same epsilon);
            ``None`` releases no loss.
        loss_bound: B, what a unit's loss is clipped to for that (> 0); ``None`` takes twice the loss of a model that
            has learnt nothing yet, which the trainer's settings tell.
        canaries: m, how many canaries are put into each private training (>= 2): phantom units, each in with chance
            1/2, which bring in as much as any unit can; at the end, what the released gradients show of them is a
            lower bound on epsilon that stands beside the claimed one. They cost no epsilon, but steps are divided by
            q (N + m) and m of the trained numbers are disturbed; ``None`` puts in none.
        public_prompts: you declare that no protected person wrote the prompts that a GRPOTrainer or RLOOTrainer uses;
            such a trainer then inherits the epsilon of its private reward models and charges nothing.

    Raises:
        ConfigError: naming the field, the value and what to write instead.
    """

    epsilon: float
    delta: float = 1e-5
    unit: Unit = "annotator"
    anonymize_annotators: bool = True
    run_epsilon: float | None = None
    clipping_norm: float = 1.0
    noise_multiplier: float | None = None
    sampling_rate: float | None = None
    max_pairs_per_unit: int = 8
    sampled: Sampled = "units"
    annotator_column: str = "annotator_id"
    adjacency: Adjacency = "zero-out"
    engine: GradientEngineName = "auto"
    micro_batch: int | None = None
    loss_noise: float | None = 10.0
    loss_bound: float | None = None
    public_prompts: bool = False
    canaries: int | None = None

    def __post_init__(self) -> None:
        _positive("epsilon", self.epsilon, "Write a budget such as epsilon=1.0 (strict) to 8.0 (loose).")
        delta = _number("delta", self.delta, "Write delta=1e-5, or less than 1 / number of annotators.")
        if not MIN_DELTA < delta < 1:
            raise ConfigError(
                f"delta is {self.delta!r}; it must lie between 1e-10 and 1 (both excluded).",
                next_step="Write delta=1e-5, or less than 1 / number of annotators.",
                code="delta",
            )
        self._check_choices()
        self._check_mechanism()

    def _check_choices(self) -> None:
        for name, allowed in (
            ("unit", get_args(Unit)),
            ("adjacency", get_args(Adjacency)),
            ("sampled", get_args(Sampled)),
            ("engine", get_args(GradientEngineName)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                wanted = " or ".join(f'{name}="{item}"' for item in allowed)
                raise ConfigError(f"{name} is {value!r}, which is not known.", next_step=f"Write {wanted}.", code=name)
        if self.anonymize_annotators is not True:
            raise ConfigError(
                f"anonymize_annotators is {self.anonymize_annotators!r}; annotator ids are never written in the open.",
                next_step="Leave it out, or write anonymize_annotators=True.",
                code="anonymize_annotators",
            )
        if not isinstance(self.public_prompts, bool):
            raise ConfigError(
                f"public_prompts is {self.public_prompts!r}; it is a declaration, True or False.",
                next_step="Write public_prompts=True only where no protected person wrote the prompts.",
                code="public_prompts",
            )
        if not self.annotator_column:
            raise ConfigError(
                "annotator_column is empty.",
                next_step='Write the column that holds the annotator\'s id, such as "annotator_id".',
                code="annotator_column",
            )

    def _check_mechanism(self) -> None:
        _positive("clipping_norm", self.clipping_norm, "Write clipping_norm=1.0.")
        if self.run_epsilon is not None:
            _positive("run_epsilon", self.run_epsilon, "Leave it out, or write what this run may spend.")
        if self.noise_multiplier is not None:
            _positive("noise_multiplier", self.noise_multiplier, "Leave it out to have it calibrated to epsilon.")
        if self.sampling_rate is not None:
            rate = _positive("sampling_rate", self.sampling_rate, "Leave it out, or write a rate such as 0.1.")
            if rate > 1:
                raise ConfigError(
                    f"sampling_rate is {rate!r}; it is a probability and cannot exceed 1.",
                    next_step="Leave it out, or write a rate such as 0.1.",
                    code="sampling_rate",
                )
        if self.loss_noise is not None:
            hint = "Leave it out (10), write a larger one, or loss_noise=None for no live loss."
            if _positive("loss_noise", self.loss_noise, hint) < 1:
                raise ConfigError(
                    f"loss_noise is {self.loss_noise!r}; with less noise on the loss than on the gradient most of the "
                    "budget would go into a picture.",
                    next_step=hint,
                    code="loss_noise",
                )
        if self.loss_bound is not None:
            _positive("loss_bound", self.loss_bound, "Leave it out to have it follow from the trainer.")
        _count("max_pairs_per_unit", self.max_pairs_per_unit, "Write max_pairs_per_unit=8.")
        if self.sampled == "pairs":
            self._check_pairs()
        if self.canaries is not None:
            self._check_canaries()
        if self.micro_batch is not None:
            _count("micro_batch", self.micro_batch, "Leave it out, or write how many rows fit into memory at once.")

    def _check_pairs(self) -> None:
        if self.unit != "annotator":
            raise ConfigError(
                f'sampled="pairs" samples the pairs of annotators one by one; it says nothing for unit="{self.unit}".',
                next_step='Leave it out, or write unit="annotator".',
                code="sampled",
            )
        if self.max_pairs_per_unit > MAX_SAMPLED_PAIRS:
            raise ConfigError(
                f'max_pairs_per_unit is {self.max_pairs_per_unit}; with sampled="pairs" it can be at most '
                f"{MAX_SAMPLED_PAIRS}.",
                next_step="Write max_pairs_per_unit=8: with every pair that is kept of an annotator her epsilon grows.",
                code="max_pairs_per_unit",
            )

    def _check_canaries(self) -> None:
        _count("canaries", self.canaries, "Leave it out for none, or write canaries=1000.")
        if not MIN_CANARIES <= (self.canaries or 0) <= MAX_CANARIES:
            raise ConfigError(
                f"canaries is {self.canaries}; a bound takes at least {MIN_CANARIES}, and at most {MAX_CANARIES:,} are "
                "taken.",
                next_step="Leave it out for none, or write canaries=1000.",
                code="canaries",
            )
        if self.unit == "label":
            raise ConfigError(
                'canaries are units of a training; with unit="label" the labels are released before, and a training on '
                "them adds no noise that could be audited.",
                next_step='Leave it out, or write unit="annotator" or unit="pair".',
                code="canaries",
            )

    @property
    def unit_column(self) -> str | None:
        """The data column whose values are the units; ``None`` where each row is one."""
        return self.annotator_column if self.unit == "annotator" else None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Where and how the trail is kept.

    Args:
        trail: folder (or database URL) of the trail; ``None`` takes ``RLHF_AUDIT_TRAIL``, else ``audit``.
        origin: the trail's name, a schemaless URL such as ``example.com/alignment``; ``None`` keeps the trail's own,
            or makes a random local one for a new trail.
        durability: ``"batched"`` (entries are committed in groups: at most 50 ms or 1,000 of them are not on the disk
            yet) or ``"always"`` (each is committed at once).
        asynchronous: whether recording an entry returns before it is on the disk; ``None``: where entries are batched
            it does, else it does not.
        every_steps: audit frequency: one step entry every so many optimizer steps (>= 1).
        weights_every: digest of the trainable weights every so many steps; 0 leaves it to the end of the run.
        samples_every: what a trainer samples (prompts, completions, rewards, advantages) goes into the vault for one
            draw in so many, with its figures in the open; 0 records none. The vault grows by their size.
        keep_records: whether a copy of each sealed record is kept in the trail's folder, under ``records/``.
    """

    trail: str | None = None
    origin: str | None = None
    durability: Durability = "batched"
    asynchronous: bool | None = None
    every_steps: int = 1
    weights_every: int = 0
    samples_every: int = 1
    keep_records: bool = True

    def __post_init__(self) -> None:
        if self.durability not in get_args(Durability):
            raise ConfigError(
                f"durability is {self.durability!r}, which is not known.",
                next_step='Write durability="batched" or durability="always".',
                code="durability",
            )
        if self.asynchronous not in (None, True, False):
            raise ConfigError(
                f"asynchronous is {self.asynchronous!r}, which is not known.",
                next_step="Leave it out, or write asynchronous=True or asynchronous=False.",
                code="asynchronous",
            )
        if self.keep_records not in (True, False):
            raise ConfigError(
                f"keep_records is {self.keep_records!r}, which is not known.",
                next_step="Leave it out, or write keep_records=False.",
                code="keep_records",
            )
        for name, least in (("every_steps", 1), ("weights_every", 0), ("samples_every", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"{name} is {value!r}; it must be a whole number of at least {least}.",
                    next_step=f"Write {name}={max(least, 1)}.",
                    code=name,
                )

    @property
    def waits(self) -> bool:
        """Whether recording an entry waits until it is on the disk."""
        return self.durability == "always" if self.asynchronous is None else not self.asynchronous

    def trail_location(self) -> Path:
        """The folder that holds the trail, from the setting, the environment or the default.

        In a process that repeats a run (``RLHF_AUDIT_REPLAY``) the environment goes before the setting, so that the
        trail which the code names is left alone.
        """
        named = os.environ.get(ENV_TRAIL)
        chosen = named or self.trail if os.environ.get(ENV_REPLAY) else self.trail or named
        return Path(chosen or DEFAULT_TRAIL)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)
