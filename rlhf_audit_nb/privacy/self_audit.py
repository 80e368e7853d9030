"""The mechanism's audit of itself: the shipped code, run over phantom annotators and tested. Floor 2.

`check_mechanism` trains a few times over phantoms (`phantoms`), never over data, in the order of ten seconds:

*reading*: with noise so small that it can be read off who was sampled and what each brought in: the sampling rate,
independence, the bound of every contribution (smaller than C, equal, far larger, of many rows, not finite), what a
step is divided by;
*loss*: the same of the live loss, with losses far below, within and far above its bound: the size of its noise, that
this is no other noise used again, the bound of every contribution, what it is divided by;
*as configured*: with the noise multiplier and the sampling rate asked for: the noise's size, shape, precision and
independence; and an attack on canaries, half of which are in, whose lower bound on epsilon is shown beside what the
accountant claims for the very same mechanism;
*seeds*: two trainings under one `torch.manual_seed` must not share noise or samples, one sealed seed under two of them
must give the same to the last bit; and an optimizer step without noise must be refused.

Each hypothesis has a p-value (`hypotheses`), and together they raise a false alarm with a chance of at most
`FALSE_ALARM`. What it cannot show stands in `LIMITS`.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib.metadata
import math
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from rlhf_audit_nb.errors import AuditError, ConfigError, PrivacyError
from rlhf_audit_nb.events import PrivacyChecked, number
from rlhf_audit_nb.privacy.sampling import GENERATOR, SEED_BYTES, SealedRandom

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from rlhf_audit_nb.config import GradientEngineName
    from rlhf_audit_nb.privacy.hypotheses import Finding, Reading
    from rlhf_audit_nb.privacy.lower_bounds import LowerBound
    from rlhf_audit_nb.privacy.phantoms import Phantom, Stage

__all__ = ["FALSE_ALARM", "LIMITS", "TESTED", "Hypothesis", "SelfAudit", "check_mechanism"]

FALSE_ALARM = 1e-7
"""The chance, over all hypotheses together, that a right mechanism fails (for all but ``lower-bound`` it is 1e-9)."""

TESTED = {
    "trains": "The phantoms could be trained on, under the engine's own guard.",
    "finite": "Nothing but finite numbers is released.",
    "noise-level": "The noise has the deviation that the noise multiplier says.",
    "noise-everywhere": "There is noise in every step, tensor and coordinate.",
    "noise-shape": "The noise is normally distributed.",
    "noise-precision": "The noise is drawn and scaled in float64.",
    "noise-independent": "No step, tensor or coordinate has the noise of another.",
    "sampling-rate": "Units are sampled with the rate that is accounted for.",
    "sampling-each": "Every unit is sampled as often as the others.",
    "sampling-independent": "Units are sampled independently of each other and of earlier steps.",
    "contribution-bounded": "No unit brings in more than the clipping norm, however large its gradient is.",
    "contribution-exact": "A contribution is the unit's gradient, scaled as a whole.",
    "nothing-beside": "Nothing else comes in.",
    "non-finite-excluded": "A unit whose gradient is not finite brings in nothing.",
    "divisor": "Steps are divided by the expected number of units, whatever was sampled.",
    "loss-noise": "The live loss has the noise that it is charged with.",
    "loss-noise-own": "The noise of the live loss is neither the gradient's nor another step's.",
    "loss-bounded": "No unit moves the live loss by more than half of its bound, however large its loss is.",
    "loss-exact": "The live loss is the sum of clipped losses, divided by the expected number of units.",
    "fresh-noise": "Two trainings with the same torch seed have different noise.",
    "fresh-samples": "Two trainings with the same torch seed have different samples.",
    "sealed": "torch's seeds do not change what the sealed seed decides.",
    "guarded": "An optimizer step without noise is refused.",
    "lower-bound": "No attack on canaries shows more than the claimed epsilon.",
}
"""Each hypothesis by its name."""

LIMITS = (
    (
        "A check that passes is no proof: it finds faults that show in what the mechanism releases over phantoms, down "
        "to the sizes named here."
    ),
    "A lower bound says what this attack found; the true epsilon lies between it and the claimed one.",
    (
        "It does not check the accountant (that is cross-checked where plans are made), your model, your data, or that "
        "nothing else in the process publishes them."
    ),
    "It checks this installation on this machine, at this time; a changed package is another installation.",
    "It is no defence against somebody who changes the check as well.",
)

_ALARMS = {"lower-bound": FALSE_ALARM - 1e-9}
_OTHERS = 1e-9 / (len(TESTED) - len(_ALARMS))
_TEST_DELTA = 2e-10  # the least p-value that guesses can reach is of the order of canaries times delta
_READING_NOISE = 1 / 40
_LOSS_NOISE = 2.0  # times that
_LOSS_RATE = 0.25
_CONFIDENT = 3.0  # a fault this many deviations beyond the threshold is found with 99.9 %
_PACKAGES = ("rlhf-audit-trail", "torch", "transformers", "trl", "numpy", "accelerate")
_MOST_STEPS = 5000


@dataclass(frozen=True)
class _Size:
    """How much is done: units at most, steps and inclusions of the reading, canaries, silent coordinates, steps with a
    loss.
    """

    units: int
    steps: int
    inclusions: int
    canaries: int
    silent: int
    losses: int


_SIZES = {"full": _Size(400, 96, 2400, 1000, 4096, 400), "small": _Size(60, 32, 200, 60, 512, 128)}


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """One hypothesis and what became of it.

    Attributes:
        name: its name, a key of `TESTED`.
        outcome: ``passed``, ``failed`` or ``not tested``.
        p: at most the chance of what was seen if it holds; ``None`` where nothing was tested.
        wrong: what is wrong where it failed.
    """

    name: str
    outcome: str
    p: float | None = None
    wrong: str = ""


@dataclass(frozen=True, kw_only=True)
class SelfAudit:
    """What a check found; all of it can be published.

    Attributes:
        passed: whether no hypothesis failed and each was tested.
        hypotheses: one by one.
        bound: what the attack on canaries showed; ``None`` where it could not be made.
        epsilon_claimed: what the accountant says of the mechanism that was attacked.
        noise_multiplier: sigma, as configured.
        sampling_rate: q.
        steps: of the attacked training.
        delta: of both epsilons.
        engine: the gradient engine that ran.
        device: where.
        versions: of the packages that ran.
        sees: the relative size of a fault in sigma, in q and in sigma of the loss that would have been found with
            99.9 %.
    """

    passed: bool
    hypotheses: tuple[Hypothesis, ...]
    bound: LowerBound | None
    epsilon_claimed: float
    noise_multiplier: float
    sampling_rate: float
    steps: int
    delta: float
    engine: str
    device: str
    versions: dict[str, str]
    sees: dict[str, float]

    @property
    def failed(self) -> tuple[Hypothesis, ...]:
        """The hypotheses that do not hold."""
        return tuple(item for item in self.hypotheses if item.outcome == "failed")

    def event(self) -> PrivacyChecked:
        """What the trail is told of it."""
        bound = self.bound
        return PrivacyChecked(
            outcome="passed" if self.passed else "failed",
            tested={item.name: item.outcome for item in self.hypotheses},
            versions=self.versions,
            engine=self.engine,
            device=self.device,
            generator=GENERATOR,
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            steps=self.steps,
            delta=self.delta,
            false_alarm=FALSE_ALARM,
            canaries=bound.canaries if bound is not None else 0,
            epsilon_claimed=number(self.epsilon_claimed),
            epsilon_lower=number(bound.epsilon if bound is not None else 0.0),
            epsilon_gaussian=number(bound.gaussian if bound is not None else 0.0),
            confidence=bound.confidence if bound is not None else 0.0,
            ceiling=number(bound.ceiling if bound is not None else 0.0),
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        from dataclasses import asdict

        return {**asdict(self), "false_alarm": FALSE_ALARM, "limits": list(LIMITS)}

    def words(self) -> Iterator[str]:
        """All of it as lines."""
        for item in self.hypotheses:
            mark = {"passed": "ok    ", "failed": "FAILED"}.get(item.outcome, "------")
            yield f"{mark}  {item.name:<21} {item.wrong if item.outcome == 'failed' else TESTED[item.name]}"
        yield ""
        yield from self._bound_words()
        if self.sees:
            sigma, rate = (f"{100 * self.sees[name]:.2g} %" for name in ("noise_multiplier", "sampling_rate"))
            loss = f"{100 * self.sees['loss_noise']:.2g} %"
            yield (
                f"A noise multiplier off by {sigma}, a sampling rate off by {rate} or noise of the live loss off by "
                f"{loss} would have been found."
            )
        yield f"Engine: {self.engine}, on {self.device or 'no device'}."
        yield str(self)

    def _bound_words(self) -> Iterator[str]:
        if self.bound is None:
            return
        bound = self.bound
        yield (
            f"Claimed: ε {self.epsilon_claimed:.3g} at δ {self.delta:g} for {self.steps} steps at noise multiplier "
            f"{self.noise_multiplier:g}, sampling rate {self.sampling_rate:g}."
        )
        yield (
            f"Shown by an attack on {bound.canaries} canaries: ε ≥ {bound.epsilon:.3g} with {100 * bound.confidence:g} "
            f"% of confidence (≥ {bound.gaussian:.3g} if the mechanism is Gaussian; no more than {bound.ceiling:.3g} "
            "can be shown with so many). A low bound is no proof of privacy."
        )

    def __str__(self) -> str:
        if self.passed:
            return (
                f"The mechanism passes: {len(self.hypotheses)} hypotheses hold, at a false alarm chance of "
                f"{FALSE_ALARM:g}."
            )
        names = ", ".join(item.name for item in self.hypotheses if item.outcome != "passed")
        return f"The mechanism does NOT pass: {names}. Do not rely on the epsilon of trainings made here."

    __repr__ = __str__

    def _repr_html_(self) -> str:
        left = 'style="text-align:left"'
        rows = "".join(
            f"<tr><td {left}>{escape(item.outcome)}</td><th {left}>{escape(item.name)}</th>"
            f"<td {left}>{escape(item.wrong or TESTED[item.name])}</td></tr>"
            for item in self.hypotheses
        )
        said = "".join(f"<p>{escape(line)}</p>" for line in self._bound_words())
        return f"<p><b>{escape(str(self))}</b></p>{said}<table>{rows}</table><p>{escape(' '.join(LIMITS))}</p>"


def check_mechanism(
    *,
    noise_multiplier: float = 1.0,
    sampling_rate: float = 0.1,
    steps: int = 24,
    delta: float = 1e-5,
    engine: GradientEngineName = "auto",
    size: Literal["full", "small"] = "full",
    seed: bytes | None = None,
    tell: Callable[[str], None] | None = None,
) -> SelfAudit:
    """Audit the private training engine that is installed here; see the module.

    Args:
        noise_multiplier: sigma of the part that runs as configured (> 0).
        sampling_rate: q of all parts, in (0, 1].
        steps: of the part that runs as configured (2 to 5000).
        delta: of the epsilons.
        engine: the gradient engine.
        size: ``full``, or ``small`` for a rough check within a second or two.
        seed: all randomness of the check follows from it but that of the seeds' part; ``None`` draws it anew.
        tell: is told what is being done.

    Raises:
        ConfigError: a number out of range.
        PrivacyError: the phantoms could not be trained on at all (code ``self-audit``).
    """
    _check_arguments(noise_multiplier, sampling_rate, steps, delta)
    audit = _Audit(noise_multiplier, sampling_rate, steps, delta, engine, _SIZES[size], seed, tell or (lambda _: None))
    return audit.run()


class _Audit:
    """One check under way."""

    def __init__(
        self,
        noise_multiplier: float,
        sampling_rate: float,
        steps: int,
        delta: float,
        engine: GradientEngineName,
        size: _Size,
        seed: bytes | None,
        tell: Callable[[str], None],
    ) -> None:
        self.noise_multiplier = noise_multiplier
        self.sampling_rate = sampling_rate
        self.steps = steps
        self.delta = delta
        self.engine = engine
        self.size = size
        self.seed = seed
        self.tell = tell
        self.device = self.ran = ""
        self.found: dict[str, list[Finding]] = {}
        self.bound: LowerBound | None = None
        self.claimed = math.nan
        self.sees: dict[str, float] = {}

    def run(self) -> SelfAudit:
        from rlhf_audit_nb.privacy.hypotheses import Finding

        try:
            with _kept_generators():
                self._read()
                self._read_losses()
                self._attack()
            self._note(Finding("trains", 1.0, ""))
        except AuditError as error:
            self._note(Finding("trains", 0.0, f"The training over phantoms was aborted: {error.message}"))
        except Exception as error:
            raise PrivacyError(
                f"The training over phantoms failed ({type(error).__name__}: {error}); nothing was checked.",
                next_step="Install the versions in constraints.txt, or report it: the engine may not fit this TRL.",
                code="self-audit",
            ) from error
        return self._result()

    # --- the parts ---

    def _read(self) -> None:
        from rlhf_audit_nb.privacy.hypotheses import examine_noise, examine_sampling
        from rlhf_audit_nb.privacy.phantoms import Stage

        size = self.size
        count = min(size.units, max(40, int(size.inclusions / (self.sampling_rate * size.steps))))
        self.tell(f"reading what {count} phantom annotators bring in, over {size.steps} steps")
        phantoms = _mixed(count)
        with closing(Stage(phantoms, silent=size.silent, engine=self.engine)) as stage:
            reading = self._train(stage, self._random("reading"), _READING_NOISE, size.steps)
            self.ran = stage.ran
            self._note(reading.finite())
            if self.found["finite"][-1].p:
                self._note(*examine_noise(reading), *examine_sampling(reading))
                trials = size.steps * int((reading.expected > 0).sum())
                rate = math.sqrt((1 - self.sampling_rate) / (self.sampling_rate * trials))
                self.sees["sampling_rate"] = (_threshold() + _CONFIDENT) * rate
            self._seeds(stage)
            self.device = stage.device

    def _seeds(self, stage: Stage) -> None:
        from rlhf_audit_nb.privacy.hypotheses import Finding, same_noise, same_sample

        self.tell("training with the same and with other seeds")
        fresh = [self._train(stage, _seeded(7), _READING_NOISE, 3, torch_seed=7) for _ in range(2)]
        if all(reading.finite().p for reading in fresh):
            self._note(
                Finding("fresh-noise", same_noise(*fresh), "Two trainings with the same torch seed share their noise."),
                Finding("fresh-samples", same_sample(*fresh), "Two trainings with the same torch seed share samples."),
            )
        seed = self._bytes("replay")
        again = [self._train(stage, SealedRandom(seed), _READING_NOISE, 2, torch_seed=torch) for torch in (7, 11)]
        same = bool((again[0].released == again[1].released).all())
        self._note(
            Finding("sealed", float(same), "What torch's seed is changes the noise or the sample."),
            Finding(
                "guarded", float(_refused_unguarded(stage)), "An optimizer step was taken that no noise was added for."
            ),
        )

    def _read_losses(self) -> None:
        import numpy as np

        from rlhf_audit_nb.privacy.hypotheses import examine_loss
        from rlhf_audit_nb.privacy.phantoms import Stage

        steps = self.size.losses
        self.tell(f"reading what phantom annotators bring into the live loss, over {steps} steps")
        with closing(Stage(_lossy(), silent=64, engine=self.engine, seed=2)) as stage:
            randomness = self._random("losses")
            reading = self._train(
                stage, randomness, _READING_NOISE, steps, loss_noise=_LOSS_NOISE, sampling_rate=_LOSS_RATE
            )
            expected = np.array([phantom.loss_expected for phantom in stage.phantoms])
            losses = stage.losses
        self._note(reading.finite())
        if self.found["finite"][-1].p:
            self._note(*examine_loss(reading, losses, expected, _LOSS_NOISE * _READING_NOISE))
            self.sees["loss_noise"] = (_threshold() + _CONFIDENT) / math.sqrt(2 * steps)

    def _attack(self) -> None:
        import numpy as np

        from rlhf_audit_nb.privacy.accountant import Mechanism, composed_epsilon
        from rlhf_audit_nb.privacy.hypotheses import Finding, examine_noise
        from rlhf_audit_nb.privacy.lower_bounds import bound_from_scores, claim_p_value
        from rlhf_audit_nb.privacy.phantoms import Phantom, Stage

        most = 3 * self.size.inclusions / (self.sampling_rate * self.steps)
        count = int(min(self.size.canaries, max(most, 40)))
        self.tell(f"attacking {count} canaries, half of them in, over {self.steps} steps as configured")
        included = np.frombuffer(hashlib.shake_128(self._bytes("included")).digest(count), np.uint8) % 2 == 1
        phantoms = [Phantom("canary", 1.0 if inside else 0.0) for inside in included]
        with closing(Stage(phantoms, silent=self.size.silent, engine=self.engine, seed=1)) as stage:
            reading = self._train(stage, self._random("attack"), self.noise_multiplier, self.steps)
        self._note(reading.finite())
        if not self.found["finite"][-1].p:
            return
        self._note(*examine_noise(reading))
        ran = [Mechanism(self.noise_multiplier, self.sampling_rate, self.steps)]
        self.claimed = composed_epsilon(ran, self.delta)
        scores = reading.shares().sum(0)
        self.bound = bound_from_scores(scores, included, self.delta)
        self._note(
            Finding(
                "lower-bound",
                claim_p_value(scores, included, composed_epsilon(ran, _TEST_DELTA), _TEST_DELTA),
                f"An attack tells more of canaries than an epsilon of {self.claimed:.4g} allows.",
            )
        )
        self.sees["noise_multiplier"] = (_threshold() + _CONFIDENT) / math.sqrt(2 * self.steps * self.size.silent)

    # --- what they share ---

    def _train(
        self,
        stage: Stage,
        randomness: SealedRandom,
        noise: float,
        steps: int,
        *,
        torch_seed: int = 0,
        loss_noise: float | None = None,
        sampling_rate: float | None = None,
    ) -> Reading:
        import numpy as np

        from rlhf_audit_nb.privacy.hypotheses import Reading

        rate = sampling_rate or self.sampling_rate
        released = stage.run(
            randomness,
            noise_multiplier=noise,
            sampling_rate=rate,
            steps=steps,
            torch_seed=torch_seed,
            loss_noise=loss_noise,
        )
        expected: npt.NDArray[np.float64] = np.array([phantom.expected for phantom in stage.phantoms])
        return Reading(released, stage.silent, stage.directions, expected, noise, rate)

    def _bytes(self, purpose: str) -> bytes:
        if self.seed is None:
            return os.urandom(SEED_BYTES)
        return hmac.digest(self.seed, b"privacy-check\0" + purpose.encode(), "sha256")

    def _random(self, purpose: str) -> SealedRandom:
        return SealedRandom.from_system() if self.seed is None else SealedRandom(self._bytes(purpose))

    def _note(self, *findings: Finding) -> None:
        for finding in findings:
            self.found.setdefault(finding.name, []).append(finding)

    def _result(self) -> SelfAudit:
        hypotheses = tuple(self._judged(name) for name in TESTED)
        return SelfAudit(
            passed=all(item.outcome == "passed" for item in hypotheses),
            hypotheses=hypotheses,
            bound=self.bound,
            epsilon_claimed=self.claimed,
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            steps=self.steps,
            delta=self.delta,
            engine=self.ran or self.engine,
            device=self.device,
            versions=_versions(),
            sees=self.sees,
        )

    def _judged(self, name: str) -> Hypothesis:
        found = self.found.get(name)
        if not found:
            return Hypothesis(name=name, outcome="not tested")
        worst = min(found, key=lambda item: item.p)
        p = min(1.0, worst.p * len(found))
        if p > _ALARMS.get(name, _OTHERS):
            return Hypothesis(name=name, outcome="passed", p=p)
        return Hypothesis(name=name, outcome="failed", p=p, wrong=worst.wrong)


def _mixed(count: int) -> list[Phantom]:
    """Units of every kind, most of them with a gradient of norm C."""
    from rlhf_audit_nb.privacy.phantoms import Phantom

    kinds = (
        (Phantom("equal", 1.0), 9),
        (Phantom("small", 0.5), 3),
        (Phantom("large", 50.0), 4),
        (Phantom("huge", 1e12), 1),
        (Phantom("many rows", 4.0, rows=8), 1),
        (Phantom("not a number", math.nan), 1),
        (Phantom("infinite", math.inf), 1),
    )
    cycle = [phantom for phantom, times in kinds for _ in range(times)]
    return [cycle[(7 * place) % len(cycle)] for place in range(count)]


def _lossy() -> list[Phantom]:
    """Units whose losses are far below the bound, within it, and far above."""
    from rlhf_audit_nb.privacy.phantoms import Phantom

    margins = (-6.0, -1.0, 0.0, 1.0, 40.0, 1e9)
    of_each = [Phantom("loss", 1.0, margin=margin) for margin in margins for _ in range(2)]
    rows = [Phantom("many rows", 0.5, rows=4, margin=margin) for margin in (0.5, 40.0)]
    broken = [Phantom("not a number", 1.0, margin=math.nan), Phantom("infinite", 1.0, margin=math.inf)]
    return [*of_each, *rows, *broken]


def _refused_unguarded(stage: Stage) -> bool:
    """Whether an optimizer step before the mechanism ran is refused."""
    from transformers import TrainerCallback

    class StepsAlone(TrainerCallback):
        """Steps the optimizer before there is any noise."""

        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            del args, state, control
            optimizer.step()

    try:
        stage.run(SealedRandom.from_system(), noise_multiplier=1.0, sampling_rate=0.1, steps=1, callback=StepsAlone())
    except PrivacyError as error:
        return error.reason == "no-noise"
    return False


def _seeded(seed: int) -> SealedRandom:
    """A fresh sealed seed, drawn right after everything that can be seeded was."""
    from transformers import set_seed

    set_seed(seed)
    return SealedRandom.from_system()


@contextmanager
def _kept_generators() -> Iterator[None]:
    """The global generators of a notebook are afterwards as they were."""
    import random

    import numpy as np
    import torch

    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one is what is kept
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


def _threshold() -> float:
    """The score beyond which a hypothesis fails."""
    from scipy.special import ndtri

    return float(-ndtri(_OTHERS / 4))


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _check_arguments(noise_multiplier: float, sampling_rate: float, steps: int, delta: float) -> None:
    from rlhf_audit_nb.config import PrivacyConfig

    PrivacyConfig(epsilon=1.0, delta=delta, noise_multiplier=noise_multiplier, sampling_rate=sampling_rate)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 2 <= steps <= _MOST_STEPS:  # noqa: PLR2004
        raise ConfigError(
            f"steps is {steps!r}; it must be a whole number from 2 to {_MOST_STEPS}.",
            next_step="Write steps=24; a check needs no more.",
            code="steps",
        )
