"""The vocabulary: every event that the trail can hold, typed, and its bytes. Floor 1.

An event has a public body, which stands in the entry, and may have private fields, which stand only in the vault
(the entry holds a commitment). Which is which is part of the type: a class names its private half in ``PRIVATE``.
What is a function of private data belongs to the private half while the run is under differential privacy; the
``metrics`` of a `Step` are public without it and private with it.

Encoding is JSON with a fixed field order (the order below) and sorted maps; an event is encoded once and never
re-encoded. Numbers that JSON cannot hold are written as the strings ``NaN``, ``Infinity`` and ``-Infinity``
(`number`). Unknown types and unknown fields are reported, never guessed. Digests are lower-case hex SHA-256.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, TypeVar

import msgspec

from rlhf_audit_nb.errors import EntryError

__all__ = [
    "EVENTS",
    "Annotation",
    "AnnotationRecorded",
    "AnnotationSource",
    "AnnotationsImported",
    "AnnotatorReidentified",
    "AnnotatorsKey",
    "AnnotatorsTabulated",
    "BudgetSet",
    "CardCreated",
    "CellExecuted",
    "DataBound",
    "DataPrivate",
    "EnvironmentCaptured",
    "Event",
    "KeyRevoked",
    "KeyRotated",
    "LabelsReleased",
    "LabelsSealed",
    "LabelsWritten",
    "ModelBound",
    "Number",
    "PopulationKey",
    "PopulationRoster",
    "PopulationSecret",
    "PrivacyChecked",
    "PrivacyEngine",
    "PrivacyInherited",
    "PrivacyPopulation",
    "PrivacyReserved",
    "PrivacySealed",
    "PrivacySettled",
    "Private",
    "PublicDeclared",
    "RecordSealed",
    "RecordStarted",
    "ReplayStarted",
    "ReportCreated",
    "RunFinished",
    "RunInterrupted",
    "RunResumed",
    "RunStarted",
    "Step",
    "StepPrivate",
    "TrailCreated",
    "TrainerAttached",
    "VaultErased",
    "WeightsSaved",
    "decode_body",
    "decode_private",
    "encode_body",
    "encode_private",
    "number",
]

Number = float | int | str


class Private(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The private half of an event: payload of a commitment, kept in the vault."""


class Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The public body of an entry."""

    TYPE: ClassVar[str] = ""
    PRIVATE: ClassVar[type[Private] | None] = None


class TrailCreated(Event, frozen=True, kw_only=True):
    """First entry of every trail: its name and the public keys that act for it.

    ``log_key`` is the C2SP vkey that signs checkpoints; ``record_key`` (Ed25519) signs records; ``model_key``
    (P-256) signs model folders. The last two are base64 of the DER SubjectPublicKeyInfo.
    """

    TYPE: ClassVar[str] = "trail.created"

    origin: str
    log_key: str
    record_key: str
    model_key: str
    tool: str


class KeyRotated(Event, frozen=True, kw_only=True):
    """A key took the place of another from the next entry on; ``old`` is ``None`` where the role had none.

    ``role`` is ``log`` or ``mldsa`` (keys are C2SP vkeys), ``record`` or ``model`` (base64 of the DER
    SubjectPublicKeyInfo). ``signature`` is by the log key that was in force, over `trail.succession.rotation_text`.
    """

    TYPE: ClassVar[str] = "key.rotated"

    role: str
    old: str | None
    new: str
    reason: str
    signature: str


class KeyRevoked(Event, frozen=True, kw_only=True):
    """What a key signed counts for the first ``since`` entries only; fields as `KeyRotated`."""

    TYPE: ClassVar[str] = "key.revoked"

    role: str
    key: str
    since: int
    reason: str
    signature: str


class VaultErased(Event, frozen=True, kw_only=True):
    """An annotator's private payloads were erased from the vault; neither who nor which entries.

    ``commitment`` (base64) is over the commitments that were erased, with a salt that only the vault has;
    ``generation`` is that of the vault's master key since then; ``reason`` is ``request``, ``retention`` or
    ``withdrawn``.
    """

    TYPE: ClassVar[str] = "vault.erased"

    erasure: str
    commitment: str
    generation: int
    reason: str


class RunStarted(Event, frozen=True, kw_only=True):
    """A training run was opened by ``%%audit_train`` or ``track_training``.

    ``privacy`` is the configuration that was asked for, ``None`` without differential privacy. ``declared_model`` is
    a declaration until a trainer shows the model. ``entry_point`` is ``cell`` or ``context``.
    """

    TYPE: ClassVar[str] = "run.started"

    experiment: str
    entry_point: str
    tool: str
    privacy: dict[str, Any] | None = None
    declared_model: str | None = None
    compliance_mode: str | None = None
    cell_digest: str | None = None
    record: str | None = None
    audit: dict[str, Any] = {}


class EnvironmentCaptured(Event, frozen=True, kw_only=True):
    """Where the run happened: interpreter, packages, code version, hardware, determinism."""

    TYPE: ClassVar[str] = "environment.captured"

    python: str
    implementation: str
    platform: str
    packages: dict[str, str]
    hardware: dict[str, Any]
    threads: int | None = None
    determinism: dict[str, Any] = {}
    git_commit: str | None = None
    git_dirty: bool | None = None


class DataPrivate(Private, frozen=True, kw_only=True):
    """What is private about a data set under differential privacy: counts and digests of its rows.

    ``prompts`` is the digest of the set of its prompts, whatever their order and number: it recognises them elsewhere.
    """

    rows: int
    digest: str
    annotators: int | None = None
    prompts: str | None = None


class DataBound(Event, frozen=True, kw_only=True):
    """A data set entered the run.

    Without differential privacy ``rows`` and ``digest`` stand in the open; with it they are in the private half, and
    only what the adjacency makes public (columns, the number of units) stands here.
    """

    TYPE: ClassVar[str] = "data.bound"
    PRIVATE: ClassVar[type[Private] | None] = DataPrivate

    role: str
    columns: list[str]
    provenance: str = "unknown"
    source: str | None = None
    unit: str | None = None
    units: int | None = None
    rows: int | None = None
    digest: str | None = None


class ModelBound(Event, frozen=True, kw_only=True):
    """The model that a trainer showed: ``role`` is ``base``, ``reference`` or ``final``.

    The base's ``weights_digest`` leaves an adapter out. ``trainable_digest`` is the digest of the trainable tensors,
    an adapter's too, as they were when training began (role ``base``, where there are any): it tells a fresh adapter
    from one that had learnt before. It compares with a step's weights digest, which has the same form, and with that
    of a final adapter, which has one too; a final weights digest has the names that a save writes.
    """

    TYPE: ClassVar[str] = "model.bound"

    role: str
    architecture: str
    parameters: int
    trainable: int
    weights_digest: str
    config_digest: str
    name: str | None = None
    tokenizer_digest: str | None = None
    adapter: dict[str, Any] | None = None
    trainable_digest: str | None = None


class TrainerAttached(Event, frozen=True, kw_only=True):
    """A trainer started to train inside the run: its class, loss and public hyperparameters."""

    TYPE: ClassVar[str] = "trainer.attached"

    trainer: str
    loss: str | None
    max_steps: int
    seed: int | None
    hyperparameters: dict[str, Any]


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


class StepPrivate(Private, frozen=True, kw_only=True):
    """A step's metrics that are functions of private data."""

    metrics: dict[str, Number]


class Step(Event, frozen=True, kw_only=True):
    """One optimizer step (or one of every n: the audit frequency).

    ``epsilon`` is the composed total after this step. ``update_norm`` is the L2 norm of the parameter update. Under
    privacy the public ``metrics`` hold the loss that was released for it (``private_loss``), if any, and nothing else.
    """

    TYPE: ClassVar[str] = "train.step"
    PRIVATE: ClassVar[type[Private] | None] = StepPrivate

    step: int
    metrics: dict[str, Number] = {}
    learning_rate: float | None = None
    epsilon: Number | None = None
    gradient_norm: Number | None = None
    update_norm: Number | None = None
    weights_digest: str | None = None
    notes: list[str] = []


class WeightsSaved(Event, frozen=True, kw_only=True):
    """A folder of weights was saved: digest over its files, and its OpenSSF model signature's digest."""

    TYPE: ClassVar[str] = "weights.saved"

    step: int | None
    name: str
    digest: str
    files: int
    bytes: int
    signature_digest: str | None = None


class RunResumed(Event, frozen=True, kw_only=True):
    """A training of this run goes on from a saved checkpoint: its steps are counted on from ``step``.

    ``checkpoint`` is the digest of the checkpoint's folder in the form of `WeightsSaved` (``None`` where the folder
    cannot be digested); ``entry`` is the ``weights.saved`` entry of this trail that has it and ``from_run`` that
    entry's run, both ``None`` where this trail does not know the checkpoint. Under differential privacy the resumed
    training has a seed and a reservation of its own: steps that it repeats are paid for again.
    """

    TYPE: ClassVar[str] = "run.resumed"

    step: int
    checkpoint: str | None = None
    from_run: str | None = None
    entry: int | None = None


class ReplayStarted(Event, frozen=True, kw_only=True):
    """This trail is scratch paper: its private trainings draw from seeds that were opened, to repeat those of another.

    ``origin`` names the trail that is replayed, ``reservations`` the entries in it whose seeds were opened. A trail
    that holds such an entry is no evidence of anything but itself: its seeds were known before its runs.
    """

    TYPE: ClassVar[str] = "replay.started"

    origin: str
    reservations: list[int]


class RunFinished(Event, frozen=True, kw_only=True):
    """The run was closed: ``status`` is ``completed``, ``failed``, ``interrupted`` or ``stopped-by-budget``."""

    TYPE: ClassVar[str] = "run.finished"

    status: str
    steps: int
    trained: bool
    reason: str | None = None


class RunInterrupted(Event, frozen=True, kw_only=True):
    """A later opening of the trail found this run open and its process gone."""

    TYPE: ClassVar[str] = "run.interrupted"

    run: str
    last_sequence: int


class RecordStarted(Event, frozen=True, kw_only=True):
    """A notebook began to be executed into a record.

    ``notebook_digest`` covers type, tags and source of every cell but the injected parameters; ``kernel`` holds the
    kernel specification's ``name``, ``language`` and ``display_name``.
    """

    TYPE: ClassVar[str] = "record.started"

    record: str
    notebook_digest: str
    parameters: dict[str, Any]
    tool: str
    kernel: dict[str, str] = {}


class CellExecuted(Event, frozen=True, kw_only=True):
    """One cell of a record was executed: digests of its source and its outputs at that moment."""

    TYPE: ClassVar[str] = "record.cell"

    record: str
    cell: str
    position: int
    source_digest: str
    outputs_digest: str
    status: str


class RecordSealed(Event, frozen=True, kw_only=True):
    """A record was sealed: the digest of its normal form and its outcome (``completed``, ``failed``, ``aborted``).

    ``cell`` is the id of the cell in which it failed or was aborted; ``keys`` are the ids of the keys that sign the
    record's statement, so that no choice of entries can name others (``None`` in records of earlier versions).
    """

    TYPE: ClassVar[str] = "record.sealed"

    record: str
    digest: str
    status: str
    cells: int
    reason: str | None = None
    cell: str | None = None
    keys: list[str] | None = None


class ReportCreated(Event, frozen=True, kw_only=True):
    """A report was written: the digest of its bytes and of what it was drawn from (trail size and root)."""

    TYPE: ClassVar[str] = "report.created"

    format: str
    digest: str
    size: int
    root: str


class CardCreated(Event, frozen=True, kw_only=True):
    """A model card was written."""

    TYPE: ClassVar[str] = "card.created"

    format: str
    digest: str
    size: int
    root: str


Text = str | list[dict[str, Any]]
"""A prompt or a response: plain text, or a conversation as a list of messages."""


class AnnotationSource(Private, frozen=True, kw_only=True):
    """What is private about an import: the names and digests of the files or rows that it was drawn from."""

    names: list[str] = []
    digests: list[str] = []


class AnnotationsImported(Event, frozen=True, kw_only=True):
    """Annotations begin to come into the trail: from where, and what is known of them.

    ``form`` is ``csv``, ``jsonl``, ``json``, ``parquet``, ``dataset`` or ``values`` (handed in by a program); ``kind``
    is ``comparison`` or ``rating``. ``rows`` is how many annotations follow under this ``import_id``, ``None`` where
    more may come at any time. ``columns`` says what our fields are called in the source. ``provenance`` says of each
    field whether it is ``recorded`` row by row, ``stated`` for all rows by whoever imported them, or ``unknown``.
    ``guideline`` and ``guideline_digest`` name the guideline where one was stated for all. ``digests`` are those of the
    source where it was said to be public; otherwise they are in the private half.
    """

    TYPE: ClassVar[str] = "annotations.imported"
    PRIVATE: ClassVar[type[Private] | None] = AnnotationSource

    import_id: str
    form: str
    kind: str
    provenance: dict[str, str]
    rows: int | None = None
    columns: dict[str, str] = {}
    extra: list[str] = []
    guideline: str | None = None
    guideline_digest: str | None = None
    digests: list[str] = []


class Annotation(Private, frozen=True, kw_only=True, omit_defaults=True):
    """What one person said of one response or of several.

    ``choice`` is the place of the preferred response in ``responses``, ``tie`` or ``undecided``; ``shown`` the places
    of the responses in the order in which they were shown. ``made_at`` is the source's own word for the time. What the
    source did not know is ``None`` and left out of the bytes.
    """

    responses: list[Text]
    prompt: Text | None = None
    choice: int | str | None = None
    reward: float | int | list[float | int] | None = None
    shown: list[int] | None = None
    guideline: str | None = None
    made_at: str | None = None
    annotator: str | None = None
    extra: dict[str, Any] = {}


class AnnotationRecorded(Event, frozen=True, kw_only=True):
    """One annotation; all that it says is in its private half, which belongs to the annotator."""

    TYPE: ClassVar[str] = "annotation.recorded"
    PRIVATE: ClassVar[type[Private] | None] = Annotation

    import_id: str


class AnnotatorsKey(Private, frozen=True, kw_only=True):
    """The secret (hex, 32 bytes) from which the tokens of one table of annotators follow."""

    secret: str


class AnnotatorsTabulated(Event, frozen=True, kw_only=True):
    """A table of annotators was made under tokens that mean something in this table alone.

    Neither the tokens nor anything that the table says stands here; only whoever holds the vault can tell whose a
    token is, and that is recorded (`AnnotatorReidentified`). ``import_id`` is the import that it was about, ``None``
    for all of them; ``size`` how many entries the trail had when it was drawn up.
    """

    TYPE: ClassVar[str] = "annotators.tabulated"
    PRIVATE: ClassVar[type[Private] | None] = AnnotatorsKey

    table: str
    size: int
    import_id: str | None = None


class AnnotatorReidentified(Event, frozen=True, kw_only=True):
    """Somebody asked whose a token is, and why; written before the answer is given. Neither token nor id stands here.

    ``table`` is the table that the token is of; ``by`` and ``reason`` are what was said of it, in the open.
    """

    TYPE: ClassVar[str] = "vault.reidentified"

    table: str
    reason: str
    by: str


def _all_events(base: type[Event]) -> dict[str, type[Event]]:
    return {kind.TYPE: kind for kind in base.__subclasses__()}


EVENTS: dict[str, type[Event]] = _all_events(Event)
"""Every known event type by its name."""

_encoder = msgspec.json.Encoder(order="deterministic")
_decoders: dict[str, msgspec.json.Decoder[Any]] = {name: msgspec.json.Decoder(kind) for name, kind in EVENTS.items()}
_private_decoders: dict[str, msgspec.json.Decoder[Any]] = {
    name: msgspec.json.Decoder(kind.PRIVATE) for name, kind in EVENTS.items() if kind.PRIVATE is not None
}

HalfT = TypeVar("HalfT", bound=Event | Private)


def number(value: float) -> Number:
    """The value as it can stand in an event: itself, or its name where JSON has no such number."""
    if isinstance(value, int) or math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def encode_body(event: Event) -> bytes:
    """The event's public body as JSON bytes."""
    return _encoder.encode(event)


def encode_private(private: Private) -> bytes:
    """The private half as the JSON bytes that a commitment covers."""
    return _encoder.encode(private)


def decode_body(kind: str, body: bytes) -> Event:
    """The event of type ``kind`` in ``body``.

    Raises:
        EntryError: the type is unknown, or the body is not of that type.
    """
    decoder: msgspec.json.Decoder[Event] | None = _decoders.get(kind)
    if decoder is None:
        raise EntryError(
            f"Entry type {kind!r} is not known to this version.",
            next_step="Read the trail with the version that wrote it, or a later one.",
            code="unknown-type",
        )
    return _decode(decoder, kind, body)


def decode_private(kind: str, payload: bytes) -> Private:
    """The private half of an event of type ``kind``.

    Raises:
        EntryError: the type has no private half, or the payload is not of that type.
    """
    decoder: msgspec.json.Decoder[Private] | None = _private_decoders.get(kind)
    if decoder is None:
        raise EntryError(f"Entry type {kind!r} has no private half.", code="unknown-type")
    return _decode(decoder, kind, payload)


def _decode(decoder: msgspec.json.Decoder[HalfT], kind: str, data: bytes) -> HalfT:
    try:
        return decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise EntryError(f"An entry of type {kind!r} is malformed: {error}.", code="malformed-body") from error
