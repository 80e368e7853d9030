"""Privacy: what was reserved and spent, inherited, declared, checked, released and budgeted. Floor 1."""

from __future__ import annotations

from typing import Any, ClassVar

from rlhf_audit_nb.events.base import Event, Number, Private

__all__ = [
    "BudgetSet",
    "LabelsReleased",
    "LabelsSealed",
    "LabelsWritten",
    "PopulationKey",
    "PopulationRoster",
    "PopulationSecret",
    "PrivacyAudited",
    "PrivacyChecked",
    "PrivacyEngine",
    "PrivacyInherited",
    "PrivacyPopulation",
    "PrivacyReserved",
    "PrivacySealed",
    "PrivacySettled",
    "PublicDeclared",
]


class PrivacySealed(Private, frozen=True, kw_only=True):
    """The secret from which sampling and noise are drawn (hex, 32 bytes)."""

    seed: str


class PrivacyReserved(Event, frozen=True, kw_only=True):
    """The whole planned spend of one training, reserved before its first step; the seed is sealed with it.

    ``epsilon_before`` is what the unit's population had spent or reserved on this trail, ``epsilon_planned`` the
    composed total at the planned end (never a sum of parts); ``accountants`` holds each accountant's own figure for
    the composed total. ``steps`` counts optimizer steps that may be taken; ``steps_asked`` those that were asked for.
    ``column`` is the data column whose values are the units (``None`` for unit ``pair``, where each row is one):
    spends by two columns bound nobody's total, so they are not added up. ``population`` names the roster that was
    trained on (`PrivacyPopulation`); ``None`` where none was recorded: then it may share units with every other.
    ``sampled`` is ``units`` or ``pairs``: in the second case at most ``max_pairs_per_unit`` pairs of a unit were kept
    for the training, each was drawn with chance ``sampling_rate`` and clipped alone, and what is composed is a mixture
    of Gaussians over all of them.
    ``noise_multiplier`` is the gradient's, in units of the clipping norm. Where each step also releases a loss,
    ``loss_bound`` is what a unit's loss is clipped to, and ``loss_noise_multiplier`` the noise in units of its half;
    what is composed is then the noise multiplier of both together, (sigma_g^-2 + sigma_m^-2)^(-1/2).
    ``canaries`` is how many phantom units take part in it beside the ``units`` (`PrivacyAudited`); gradients are
    divided by the expected number of both.
    ``slot`` is the budget held for this training before (`SlotsReserved`), whose place it takes.
    """

    TYPE: ClassVar[str] = "privacy.reserved"
    PRIVATE: ClassVar[type[Private] | None] = PrivacySealed

    reservation: str
    unit: str
    adjacency: str
    mechanism: str
    engine: str
    generator: str
    units: int
    clipping_norm: float
    noise_multiplier: float
    sampling_rate: float
    steps: int
    steps_asked: int
    max_pairs_per_unit: int
    delta: float
    epsilon_budget: float
    epsilon_before: Number
    epsilon_planned: Number
    accountants: dict[str, Number]
    column: str | None = None
    population: str | None = None
    sampled: str = "units"
    loss_noise_multiplier: float | None = None
    loss_bound: float | None = None
    canaries: int | None = None
    slot: str | None = None


class PrivacySettled(Event, frozen=True, kw_only=True):
    """What a training really spent, replacing its reservation: the steps in which the mechanism ran."""

    TYPE: ClassVar[str] = "privacy.settled"

    reservation: str
    steps: int
    epsilon_run: Number
    epsilon_total: Number
    stopped_by_budget: bool = False


class PrivacyEngine(Event, frozen=True, kw_only=True):
    """The units' gradients were not computed by the engine that the reservation names, but by this one.

    Both keep the same bound, so what is charged does not change. It is decided before the first step, from a probe of
    made-up rows; ``reason`` says why.
    """

    TYPE: ClassVar[str] = "privacy.engine"

    reservation: str
    engine: str
    reason: str


class PrivacyInherited(Event, frozen=True, kw_only=True):
    """A training charged nothing of its own: what it learnt of the protected units came through these sources.

    ``kind`` is ``released-labels`` (it trained on what label randomisation had released) or ``private-model`` (it was
    rewarded by, or began from, models that private runs left). Each of ``sources`` has ``entry`` (the index of the
    entry that shows it), ``run`` (that entry's run, or ``None``) and ``digest``; that of a model also its ``role``.
    ``epsilon`` and ``delta`` are the composed total, over ``unit``, of what the sources charged; ``prompts`` says what
    was declared of the prompts.
    """

    TYPE: ClassVar[str] = "privacy.inherited"

    kind: str
    sources: list[dict[str, Any]]
    unit: str
    epsilon: Number
    delta: float
    prompts: str | None = None
    note: str | None = None


class PublicDeclared(Event, frozen=True, kw_only=True):
    """Somebody declared that something holds nothing of protected people: a claim by a named person, not a finding.

    ``kind`` is ``reward-function`` (``digest`` is that of its source text), ``model`` (its weights digest) or ``data``
    (the digest of its rows, as ``data.bound`` has it). ``name`` says what it is called; ``reason`` and ``by`` are what
    was said of it, in the open.
    """

    TYPE: ClassVar[str] = "privacy.declared"

    kind: str
    name: str
    digest: str
    reason: str
    by: str


class PrivacyChecked(Event, frozen=True, kw_only=True):
    """The mechanism was audited with phantom annotators: the shipped code, on the machine that says so.

    ``outcome`` is ``passed`` or ``failed``; ``tested`` says of each hypothesis whether it ``passed``, ``failed`` or was
    ``not tested``. ``false_alarm`` bounds the chance that a right mechanism fails any of them. ``epsilon_lower`` is
    what an attack on ``canaries`` phantoms showed, at ``confidence``; ``epsilon_gaussian`` the same for a mechanism
    that is a Gaussian one; ``ceiling`` the most that so many can show; ``epsilon_claimed`` what the accountant says of
    the very mechanism that was run. A low bound is no proof of privacy.
    """

    TYPE: ClassVar[str] = "privacy.checked"

    outcome: str
    tested: dict[str, str]
    versions: dict[str, str]
    engine: str
    device: str
    generator: str
    noise_multiplier: float
    sampling_rate: float
    steps: int
    delta: float
    false_alarm: float
    canaries: int
    epsilon_claimed: Number
    epsilon_lower: Number
    epsilon_gaussian: Number
    confidence: float
    ceiling: Number


class PrivacyAudited(Event, frozen=True, kw_only=True):
    """What the canaries of one training show of its epsilon.

    Each of ``canaries`` phantom units was in with chance 1/2, by the sealed seed, and brought in as much as a unit can;
    from the gradients that ``steps`` steps released it was guessed of ``guesses`` of them whether they were in, and
    ``right`` guesses were right. ``epsilon_lower`` is what that rules out at ``confidence`` and ``delta`` (the best of
    several shares of guesses, which is paid for), ``epsilon_gaussian`` the same for a mechanism that is a Gaussian one;
    ``ceiling`` the most that so many canaries can show, and ``epsilon_claimed`` what the accountant says of this
    training alone. ``outcome`` is ``failed`` where the lower bound exceeds the claim, which a right mechanism does with
    a chance of 1 - ``confidence`` at most, else ``not contradicted``: that is no proof of privacy.
    """

    TYPE: ClassVar[str] = "privacy.audited"

    reservation: str
    outcome: str
    canaries: int
    steps: int
    guesses: int
    right: int
    delta: float
    epsilon_claimed: Number
    epsilon_lower: Number
    epsilon_gaussian: Number
    confidence: float
    ceiling: Number

    @property
    def contradicts(self) -> bool:
        """Whether the claim cannot be relied on."""
        return self.outcome != "not contradicted" or float(self.epsilon_lower) > float(self.epsilon_claimed)


class PopulationSecret(Private, frozen=True, kw_only=True):
    """The key under which annotators' ids become tags on this trail (hex, 32 bytes)."""

    key: str


class PopulationKey(Event, frozen=True, kw_only=True):
    """From here on rosters can be compared: their tags are made with the key in the private half.

    ``key_id`` is a name that follows from the key and does not tell it: two rosters' tags say something of each other
    only where they were made with the same key.
    """

    TYPE: ClassVar[str] = "privacy.population-key"
    PRIVATE: ClassVar[type[Private] | None] = PopulationSecret

    key_id: str


class PopulationRoster(Private, frozen=True, kw_only=True):
    """Who is on a roster, as keyed tags of the ids (hex, 16 bytes each), sorted and run together."""

    key_id: str
    tags: str


class PrivacyPopulation(Event, frozen=True, kw_only=True):
    """A roster of annotators that a private training is about to use for the first time on this trail.

    ``units`` is how many annotators are on it; ``disjoint_from`` names the earlier populations that share nobody with
    it, as the tool found by comparing the tags in the private halves. With any other earlier one it may share somebody.
    """

    TYPE: ClassVar[str] = "privacy.population"
    PRIVATE: ClassVar[type[Private] | None] = PopulationRoster

    population: str
    units: int
    key_id: str
    disjoint_from: list[str] = []


class LabelsSealed(Private, frozen=True, kw_only=True):
    """What is private about a release of labels.

    ``check_key`` (hex) keys the check value that each released row carries; ``tag_key`` (hex) and ``tags`` (base64,
    12 bytes a row) tell whether two releases hold the same pair of texts, whichever of them was preferred. ``seed``
    (hex) and ``original`` (hex SHA-256 of the source) would give the original labels away to whoever has the released
    ones; where the originals are destroyed, neither was ever written.
    """

    check_key: str
    tag_key: str
    tags: str
    seed: str | None = None
    original: str | None = None


class LabelsReleased(Event, frozen=True, kw_only=True):
    """The labels of some rows are released through randomised response, each with ``epsilon``; charged from here on.

    A label says which of a row's two responses was preferred; it is exchanged for the other one with the chance
    ``flip_probability``. ``epsilon_before`` and ``epsilon_total`` are what all releases together cost the label that
    they cost most, before and with this one; ``composition`` is ``sum`` where any label may stand in all of them, and
    ``row-tags`` where the vault's row tags showed that some hold different rows. ``accountants`` are other figures for
    the total. ``columns`` are those of the released rows. ``originals`` is ``kept`` or ``to be destroyed``.
    ``not_protected`` names what the guarantee does not cover.
    """

    TYPE: ClassVar[str] = "privacy.labels"
    PRIVATE: ClassVar[type[Private] | None] = LabelsSealed

    release: str
    mechanism: str
    generator: str
    adjacency: str
    labels: int
    epsilon: float
    flip_probability: float
    epsilon_budget: float
    epsilon_before: Number
    epsilon_total: Number
    composition: str
    accountants: dict[str, Number]
    columns: list[str]
    originals: str
    not_protected: list[str]


class LabelsWritten(Event, frozen=True, kw_only=True):
    """The rows of a release were written, once.

    ``digest`` is the SHA-256 of the file's bytes (``None`` where the rows were handed to a program), ``form`` is
    ``jsonl`` or ``dataset``. ``originals`` is ``kept``, ``destroyed`` or ``not destroyed`` (it was asked for, and
    failed).
    """

    TYPE: ClassVar[str] = "privacy.labels_written"

    release: str
    form: str
    digest: str | None
    originals: str


class BudgetSet(Event, frozen=True, kw_only=True):
    """Somebody set the population's budget on this trail: from here on no run may ask for more.

    ``unit`` is the privacy unit that the budget counts; ``epsilon`` and ``delta`` bound the composed total of all runs,
    earlier ones included. ``by`` and ``reason`` are what was said of it, in the open.
    """

    TYPE: ClassVar[str] = "privacy.budget"

    unit: str
    epsilon: float
    delta: float
    reason: str
    by: str
