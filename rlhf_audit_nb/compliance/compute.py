"""The compute ledger: what every training of a trail computed, and the one-third rule over its lineage. Floor 3.

Three columns, after the Commission's guidelines for providers of general-purpose AI models (C(2025) 7719 of 19 November
2025; paragraph numbers of the adopted text; they do not bind):

*update*      passes that change parameters: what a base without systemic risk counts (paragraph 115)
*generation*  sampling of non-public data from the model, discarded samples too: counted with systemic risk (116, 117)
*excluded*    reward and other auxiliary models, reference policies, evaluation (119)

*Scoring*, passes of the trained model without a gradient (log-probabilities of an earlier or the reference policy), is
excluded too; a strict reader might count it, so the upper end of a band holds it.

Someone who modifies a model becomes the provider of a new one where the modification took more than a third of the
original's training compute (paragraphs 59 to 61); where that is not known, a third of 1e25 FLOP for a base with
systemic risk, else a third of 1e23. `one_third` says where the trail's figures stand, and never more than that.

Under differential privacy what was computed follows from the rows that were drawn. Such a training stands with a bound
from public settings: units, sampling rate, steps and the greatest length, exceeded by chance of at most 1e-9.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from rlhf_audit_nb.capture.flop import update_band
from rlhf_audit_nb.compliance.facts import run_facts, training_steps
from rlhf_audit_nb.events import BaseComputeDeclared, ComputeRecorded, TrainerAttached
from rlhf_audit_nb.privacy.descent import Descent

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rlhf_audit_nb.compliance.evidence import Evidence, Item
    from rlhf_audit_nb.compliance.facts import RunFacts, Spend
    from rlhf_audit_nb.privacy.descent import Training

__all__ = [
    "Band",
    "Ledger",
    "OneThird",
    "TrainingCompute",
    "compute_ledger",
    "flop_text",
    "most_rows",
    "one_third",
    "percent",
]

SYSTEMIC_FLOP = 1e25
GENERAL_FLOP = 1e23
MARGIN = 0.3
_CHANCE = 1e-9
_ANSWERS = 2
_SAID = ("base", "checkpoint")


@dataclass(frozen=True)
class Band:
    """From the least to the most FLOP."""

    low: float = 0.0
    high: float = 0.0

    def __add__(self, other: Band) -> Band:
        return Band(self.low + other.low, self.high + other.high)

    @property
    def words(self) -> str:
        """The band for a reader."""
        if not self.high:
            return "none"
        return f"at most {flop_text(self.high)}" if not self.low else f"{flop_text(self.low)} to {flop_text(self.high)}"


@dataclass(frozen=True)
class TrainingCompute:
    """What one training computed.

    Attributes:
        entry: the entry that says so.
        run: its run.
        experiment: the run's name.
        trainer: the trainer's class.
        basis: ``measured`` (passes were counted), ``settings`` (a bound from public settings) or ``none``.
        update, generation, scoring, excluded: FLOP by column; all of this one training.
        tokens: positions of update passes that are not padding, and ``positions`` with it; ``None`` where not measured.
        device_hours: of all devices together; ``None`` under differential privacy.
        kilowatt_hours: by the counter that was read; empty where none could be.
        notes: the assumptions behind the figures.
        entries: all entries that the figures rest on.
        before: the trainings, by the entry of their compute, that left the weights which this one began with.
        gaps: those of them that have no entry on compute, by the entry of their trainer.
        uncounted: columns of which something was computed that no figure holds.
    """

    entry: int
    run: str
    experiment: str
    trainer: str
    basis: Literal["measured", "settings", "none"]
    update: Band
    generation: Band
    scoring: Band
    excluded: Band
    tokens: int | None
    positions: int | None
    device_hours: float | None
    kilowatt_hours: dict[str, float]
    notes: tuple[str, ...]
    entries: tuple[int, ...]
    before: tuple[int, ...] = ()
    gaps: tuple[int, ...] = ()
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True)
class OneThird:
    """Where a modification stands against one threshold.

    Attributes:
        base: whose compute the threshold is a third of.
        threshold: in FLOP.
        counted: the band that is compared.
        state: ``below`` (its upper end, and 30 % more, is under the threshold), ``above`` (its lower end, and 30 %
            less, is over it), ``open`` between, or ``unknown`` where a training has no figure, or not of all.
        paragraphs: of the guidelines.
        entries: of a declared base.
    """

    base: str
    threshold: float
    counted: Band
    state: Literal["below", "above", "open", "unknown"]
    paragraphs: str
    entries: tuple[int, ...] = ()

    @property
    def ratio(self) -> float:
        """The upper end as a share of the threshold."""
        return self.counted.high / self.threshold

    @property
    def words(self) -> str:
        """The comparison in one sentence."""
        figure = f"{self.counted.words} FLOP, {percent(self.ratio)} of {flop_text(self.threshold)} ({self.base})"
        return {
            "below": f"Below one third: {figure}, with the 30 % margin too.",
            "above": f"Above one third: {figure}.",
            "open": f"Not to be told within the band and the 30 % margin: {figure}.",
            "unknown": f"Not to be told: a training was not counted, or not all of it; the rest comes to {figure}.",
        }[self.state]


@dataclass(frozen=True)
class Ledger:
    """The compute of a trail.

    Attributes:
        trainings: each with its own figures, in the order of the trail.
        verdicts: for each training, its own and those that it builds on, against the thresholds.
        missing: trainings that ended or began without an entry on compute, by the entry of their trainer.
    """

    trainings: tuple[TrainingCompute, ...]
    verdicts: dict[int, tuple[OneThird, ...]]
    missing: tuple[int, ...] = ()

    def lineage(self, entry: int) -> tuple[TrainingCompute, ...]:
        """The training at ``entry`` and those whose weights it goes back to, the earliest first."""
        by_entry = {one.entry: one for one in self.trainings}
        kept, waiting = set[int](), [entry]
        while waiting:
            here = waiting.pop()
            if here in by_entry and here not in kept:
                kept.add(here)
                waiting += by_entry[here].before
        return tuple(one for one in self.trainings if one.entry in kept)

    def leaves(self) -> tuple[TrainingCompute, ...]:
        """The trainings that no other one goes on from: what the trail has come to."""
        used = {entry for one in self.trainings for entry in one.before}
        return tuple(one for one in self.trainings if one.entry not in used)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "trainings": [asdict(one) for one in self.trainings],
            "verdicts": {
                str(entry): [{**asdict(one), "ratio": one.ratio, "words": one.words} for one in found]
                for entry, found in self.verdicts.items()
            },
            "missing": list(self.missing),
        }


def compute_ledger(evidence: Evidence, *, base_flop: float | None = None, systemic: bool = False) -> Ledger:
    """The ledger over what ``evidence`` covers.

    Args:
        evidence: verified entries.
        base_flop: the training compute of the base, where the reader states it; else what the trail declares.
        systemic: whether that base is a model with systemic risk.
    """
    descent = Descent((item.index, item.run, item.event) for item in evidence.items if item.event is not None)
    runs = {run.run: run for run in run_facts(evidence)}
    steps = training_steps(evidence)
    by_training: dict[int, TrainingCompute] = {}
    for item, event in evidence.of(ComputeRecorded):
        training = _training_of(descent, item)
        run = runs.get(item.run or "")
        if training is not None and run is not None:
            by_training[training.index] = _one(item, event, run, training, stepless=training.index not in steps)
    for training in descent.trainings:
        own = by_training.get(training.index)
        if own is not None:
            earlier = {one.index for role, _, one in descent.inputs(training) if role in _SAID}
            before = tuple(sorted(by_training[at].entry for at in earlier if at in by_training))
            gaps = tuple(sorted(at for at in earlier if at not in by_training))
            by_training[training.index] = replace(own, before=before, gaps=gaps)
    found = tuple(sorted(by_training.values(), key=lambda one: one.entry))
    missing = tuple(one.index for one in descent.trainings if one.index not in by_training)
    ledger = Ledger(found, {}, missing)
    stated = _stated(evidence, base_flop, systemic=systemic)
    verdicts = {one.entry: one_third(ledger.lineage(one.entry), *stated) for one in found}
    return replace(ledger, verdicts=verdicts)


def one_third(
    trainings: Iterable[TrainingCompute],
    base_flop: float | None = None,
    systemic: bool = False,  # noqa: FBT001, FBT002 (two values that are stated together)
    entries: tuple[int, ...] = (),
) -> tuple[OneThird, ...]:
    """Where ``trainings`` together stand: against the stated base, or against both thresholds for an unknown one."""
    together = list(trainings)
    unknown = any(one.basis == "none" or one.gaps or one.uncounted for one in together)
    update = sum((one.update for one in together), Band())
    generation = sum((one.generation for one in together), Band())
    scoring = sum((one.scoring for one in together), Band())
    general = Band(update.low, update.high + generation.high + scoring.high)
    cumulative = Band(update.low + generation.low, general.high)
    if base_flop is not None:
        counted, risk = (cumulative, ", with systemic risk") if systemic else (general, "")
        base = f"a third of the base's {flop_text(base_flop)}{risk}"
        return (_against(base, base_flop, counted, "59 to 61, 115 to 119", entries, unknown=unknown),)
    base = "a third of 1e25, for a base with systemic risk whose compute is unknown"
    rules = [_against(base, SYSTEMIC_FLOP, cumulative, "61, 116, 117, 119", entries, unknown=unknown)]
    if not systemic:
        base = "a third of 1e23, for a base without systemic risk whose compute is unknown"
        rules.insert(0, _against(base, GENERAL_FLOP, general, "61, 115, 119", entries, unknown=unknown))
    return tuple(rules)


def _against(
    base: str, flop: float, counted: Band, paragraphs: str, entries: tuple[int, ...], *, unknown: bool
) -> OneThird:
    third = flop / 3
    state: Literal["below", "above", "open", "unknown"] = "open"
    if counted.low * (1 - MARGIN) > third:
        state = "above"
    elif unknown:
        state = "unknown"
    elif counted.high * (1 + MARGIN) < third:
        state = "below"
    return OneThird(base, third, counted, state, paragraphs, entries)


def _stated(
    evidence: Evidence, base_flop: float | None, *, systemic: bool
) -> tuple[float | None, bool, tuple[int, ...]]:
    """What is stated of the base: by the reader, else by the newest declaration on the trail."""
    declared = evidence.of(BaseComputeDeclared)
    if base_flop is not None or systemic or not declared:
        return base_flop, systemic, ()
    item, event = declared[-1]
    return event.flop, event.systemic, (item.index,)


def _training_of(descent: Descent, item: Item) -> Training | None:
    """The training that an entry on compute closes: the last one of its run that began before it."""
    begun = [one for one in descent.trainings if one.run == item.run and one.index < item.index]
    return begun[-1] if begun else None


_NOTHING: tuple[Band, tuple[str, ...], tuple[int, ...]] = (Band(), (), ())


def _one(item: Item, event: ComputeRecorded, run: RunFacts, training: Training, *, stepless: bool) -> TrainingCompute:
    columns = {name: Band(one.low * event.processes, one.high * event.processes) for name, one in event.columns.items()}
    bound, why, entries = _NOTHING
    if not event.columns and item.sealed is not None:
        bound, why, entries = _from_settings(event, run, training)
    notes = [*event.notes, *why]
    if event.processes > 1:
        notes.append(f"{event.processes} processes, counted in one and taken to have worked alike")
    if event.shape.trainable < event.shape.parameters:
        notes.append("a part of the parameters learns: 6PD is the upper end, not the figure")
    update = event.columns.get("update")
    # Steps that no pass was counted for were not free: what computed them was not seen.
    counted = bool(columns) and (stepless or (update is not None and update.high > 0))
    basis: Literal["measured", "settings", "none"] = "measured" if counted else "settings" if bound.high else "none"
    nothing = Band()
    return TrainingCompute(
        entry=item.index,
        run=run.run,
        experiment=run.started.experiment,
        trainer=event.trainer,
        basis=basis,
        update=columns.get("update", bound),
        generation=columns.get("generation", nothing),
        scoring=columns.get("scoring", nothing),
        excluded=sum((columns.get(name, nothing) for name in ("reference", "reward", "evaluation")), nothing),
        tokens=update.tokens * event.processes if update is not None and update.tokens is not None else None,
        positions=update.positions * event.processes if update is not None else None,
        device_hours=event.seconds * event.devices / 3600 if event.seconds is not None else None,
        kilowatt_hours={name: joules / 3.6e6 for name, joules in event.energy.items()},
        notes=tuple(notes),
        entries=tuple(sorted({item.index, training.index, *entries})),
        uncounted=tuple(event.uncounted),
    )


def _from_settings(
    event: ComputeRecorded, run: RunFacts, training: Training
) -> tuple[Band, tuple[str, ...], tuple[int, ...]]:
    """The most that a private training may have computed, by what is public of it."""
    spends = [spend for spend in run.spends if spend.item.index in training.reserved]
    attached = next((one for item, one in run.trainers if item.index == training.index), None)
    length = _most_length(attached)
    if not spends:
        return Band(), ("no reservation says what may have been drawn",), ()
    if length is None:
        return Band(), ("the settings bound no length, so nothing bounds the compute",), spends[-1].indices
    answers = most_rows(spends[-1]) * _ANSWERS
    positions = answers * length
    _, high = update_band(event.shape, positions, None, positions * length)
    why = (
        f"under differential privacy: at most {answers:,.0f} answers of {length:,} tokens each by the public settings "
        "(units, sampling rate, steps, pairs of a unit), exceeded by chance of at most 1e-9; what was measured is "
        "sealed, and passes of the engine's own check and of a reference policy are not in it"
    )
    indices = tuple(sorted({index for spend in spends for index in spend.indices}))
    return Band(0.0, high), (why,), indices


def most_rows(spend: Spend) -> float:
    """How many rows a private training drew at the most, but for a chance of 1e-9 (Bernstein's inequality)."""
    reserved = spend.reserved
    pairs = reserved.max_pairs_per_unit if reserved.column is not None else 1
    trials = reserved.units * (pairs if reserved.sampled == "pairs" else 1) * spend.steps
    mean, slack = trials * reserved.sampling_rate, math.log(1 / _CHANCE)
    drawn = mean + slack / 3 + math.sqrt(slack * slack / 9 + 2 * mean * slack)
    return min(float(trials), drawn) * (1 if reserved.sampled == "pairs" else pairs)


def _most_length(attached: TrainerAttached | None) -> int | None:
    settings = {**attached.defaults, **attached.hyperparameters} if attached is not None else {}
    length = settings.get("max_length")
    return length if isinstance(length, int) and length > 0 else None


def flop_text(value: float) -> str:
    """A number of FLOP with two figures, such as ``3.3e22``."""
    if not value:
        return "0"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def percent(share: float) -> str:
    """A share in percent, rounded up to two figures, so that it never says less."""
    if not 0 < share < math.inf:
        return "0 %" if not share else "more than any share"
    step = 10.0 ** (math.floor(math.log10(share * 100)) - 1)
    up = math.ceil(share * 100 / step - 1e-9) * step
    return f"{up:.2g} %" if up < 100 else f"{up:,.0f} %"  # noqa: PLR2004 (whole per cents)
