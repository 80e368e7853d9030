"""What a trainer brings beside its data and its policy: functions, references, teachers, samples, a log. Floor 1."""

from __future__ import annotations

from typing import Any, ClassVar

from rlhf_audit_nb.events.base import Event, Number, Private

__all__ = [
    "FunctionBound",
    "ReferenceUsed",
    "SamplesDrawn",
    "SamplesPrivate",
    "TrainerLogged",
]


class FunctionBound(Event, frozen=True, kw_only=True):
    """A function, or a model in its place, that a trainer calls: its ``role`` is ``reward``, ``rollout``, ``tool``, ...

    ``kind`` is ``function``, ``lambda``, ``coroutine function``, ``method``, ``partial``, ``object``, ``built-in`` or
    ``model``. ``source_digest`` is SHA-256 over the function's qualified name, a line feed and its source text without
    common indentation; ``code_digest`` is over its compiled code, and holds for one version of Python. Either is
    ``None`` where there is none. ``reaches`` are the names from outside of it that its code uses: what they stand for
    is in neither digest. ``not_covered`` says in words what else is not. Of a model the digests are those of its
    weights (``weights_digest``; ``base_digest`` is the base's under an adapter). ``weight`` is that of a reward.
    """

    TYPE: ClassVar[str] = "function.bound"

    role: str
    position: int
    name: str
    kind: str
    source_digest: str | None = None
    code_digest: str | None = None
    reaches: list[str] = []
    not_covered: list[str] = []
    weights_digest: str | None = None
    base_digest: str | None = None
    weight: Number | None = None


class ReferenceUsed(Event, frozen=True, kw_only=True):
    """What a trainer compares its policy with (``role`` ``reference``) or learns from (``teacher``).

    ``how`` is ``model`` (one of its own), ``adapter-disabled`` (the policy without its adapter), ``reference-adapter``
    and ``teacher-adapter`` (a second adapter on the policy), ``policy-before-training``, ``policy`` (as it is at each
    moment), ``server`` (elsewhere: nothing is known of it) or ``none``. ``weights_digest`` is that of its weights when
    training began, of an adapter those of the adapter alone; ``same_as_base`` whether they are those that the policy
    began from. ``computed_ahead``: its log-probabilities were computed before training and stand in the data.
    ``moves``: it follows the policy while it trains.
    """

    TYPE: ClassVar[str] = "reference.used"

    role: str
    how: str
    weights_digest: str | None = None
    same_as_base: bool | None = None
    computed_ahead: bool = False
    moves: bool = False


class SamplesPrivate(Private, frozen=True, kw_only=True):
    """The samples of one entry: ``completions[i]`` answers ``prompts[prompt_of[i]]``.

    ``rewards`` has each reward function's values by its name (``None`` where it gave none), before its weight;
    ``advantages`` and ``lengths`` (tokens) are ``None`` where the trainer does not show them.
    """

    prompts: list[Any]
    prompt_of: list[int]
    completions: list[Any]
    rewards: dict[str, list[Number | None]] = {}
    advantages: list[Number] | None = None
    lengths: list[int] | None = None


class SamplesDrawn(Event, frozen=True, kw_only=True):
    """A trainer let its policy answer prompts, for the optimizer steps from ``step`` on.

    ``draw`` counts the draws of the training from 1. The texts are in the private halves of ``parts`` entries, of which
    this is number ``part`` with ``samples`` samples from number ``first`` (from 0) on. The first part also has the
    figures of the whole draw: ``statistics``, and of each group of answers to one prompt the mean and the standard
    deviation of the weighted rewards (``group_means``, ``group_deviations``; empty above 512 groups). Deviations
    divide by n - 1. The figures are of the process that writes, without the samples of others.
    """

    TYPE: ClassVar[str] = "train.samples"
    PRIVATE: ClassVar[type[Private] | None] = SamplesPrivate

    step: int
    draw: int
    samples: int
    part: int = 1
    parts: int = 1
    first: int = 0
    statistics: dict[str, Number] = {}
    group_means: list[Number | None] = []
    group_deviations: list[Number | None] = []


class TrainerLogged(Event, frozen=True, kw_only=True):
    """What a trainer logged of itself that its steps do not have: means since its last log, as it computes them."""

    TYPE: ClassVar[str] = "train.logged"

    step: int
    metrics: dict[str, Number]
