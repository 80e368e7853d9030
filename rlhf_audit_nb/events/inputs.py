"""What a training starts from: data, models, the trainer and its settings. Floor 1."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from rlhf_audit_nb.events.base import Event, Private

__all__ = [
    "CodeBound",
    "CodeFiles",
    "DataBound",
    "DataPrivate",
    "DataRead",
    "InputFile",
    "InputFiles",
    "ModelBound",
    "TrainerAttached",
]


class InputFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A file that something was loaded from: its name within its folder, never a path of the machine.

    ``header`` is the digest of a safetensors file's header (names, types, shapes and places of its tensors), without
    the eight bytes in front that say how long it is.
    """

    name: str
    bytes: int
    digest: str
    header: str | None = None


class InputFiles(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The files that something was loaded from, sorted by name.

    ``digest`` is SHA-256 over their list as JSON, which stands in ``files`` where it is short and else lies beside the
    trail as ``artifacts/DIGEST.json``. ``tensors`` is the digest of the tensors in all the safetensors files, in the
    form of a weights digest: equal to it where the weights in memory are the files' own.
    """

    count: int
    bytes: int
    digest: str
    files: list[InputFile] = []
    tensors: str | None = None


class DataPrivate(Private, frozen=True, kw_only=True):
    """What is private about a data set under differential privacy: counts and digests of its rows.

    ``prompts`` is the digest of the set of its prompts, whatever their order and number: it recognises them elsewhere.
    The others are as in `DataBound`.
    """

    rows: int
    digest: str
    annotators: int | None = None
    prompts: str | None = None
    shards: list[str] | None = None
    shard_rows: int | None = None
    features: dict[str, str] | None = None
    fingerprint: str | None = None
    revision: str | None = None
    files: InputFiles | None = None


class DataBound(Event, frozen=True, kw_only=True):
    """A data set entered the run.

    Without differential privacy ``rows`` and ``digest`` stand in the open; with it they are in the private half, and
    only what the adjacency makes public (columns, the number of units) stands here.

    ``shards`` are the digests of every ``shard_rows`` rows in order, where there are more than that: they tell where
    two data sets differ. ``features`` are the columns' types, ``fingerprint`` is that of the `datasets` library (of the
    transformations it went through), ``revision`` the commit on the hub, ``files`` what it was read from.
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
    shards: list[str] | None = None
    shard_rows: int | None = None
    features: dict[str, str] | None = None
    fingerprint: str | None = None
    revision: str | None = None
    files: InputFiles | None = None


class DataRead(Event, frozen=True, kw_only=True):
    """What a training read of a stream, as far as it came: recorded when it ended, however it ended.

    ``digest`` covers the batches as they entered the training steps, in order (`rlhf_audit_nb.capture.streams`);
    ``rows`` counts what lay in them. ``workers`` is the number of processes that loaded them.
    """

    TYPE: ClassVar[str] = "data.read"

    role: str
    batches: int
    rows: int
    digest: str
    workers: int


class CodeFiles(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The local source files that are imported: those below the project and not among what is installed.

    ``project`` is what the project is: ``git`` (the work tree's root) or ``folder`` (the working directory, in no
    repository). ``digest`` is SHA-256 over the list as JSON, path to digest, which stands in ``files`` where it is
    short and else lies beside the trail as ``artifacts/DIGEST.json``. ``changed`` names the files that are another now
    than when they were imported; ``left_out`` counts those above the bounds, ``elsewhere`` those that lie neither
    below the project nor among what is installed.
    """

    project: str
    count: int
    digest: str
    files: dict[str, str] = {}
    changed: list[str] = []
    left_out: int = 0
    elsewhere: int = 0


class CodeBound(Event, frozen=True, kw_only=True):
    """Local source files that were imported, or changed, while the run was open; ``code`` lists these alone.

    Not recorded under differential privacy, where which are imported may depend on the data.
    """

    TYPE: ClassVar[str] = "code.bound"

    code: CodeFiles


class ModelBound(Event, frozen=True, kw_only=True):
    """The model that a trainer showed: ``role`` is ``base``, ``reference``, ``reward`` or ``final``.

    The base's ``weights_digest`` leaves an adapter out. ``trainable_digest`` is the digest of the trainable tensors,
    an adapter's too, as they were when training began (role ``base``, where there are any): it tells a fresh adapter
    from one that had learnt before. It compares with a step's weights digest, which has the same form, and with that
    of a final adapter, which has one too; a final weights digest has the names that a save writes.

    ``revision`` is the commit on the hub that the model was loaded from, ``files`` the files (also the tokenizer's).
    ``quantization`` are the settings of a quantised model, whose digests are of the packed weights in memory.
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
    revision: str | None = None
    files: InputFiles | None = None
    generation_digest: str | None = None
    chat_template_digest: str | None = None
    quantization: dict[str, Any] | None = None


class TrainerAttached(Event, frozen=True, kw_only=True):
    """A trainer started to train inside the run: its class, loss and public hyperparameters.

    ``hyperparameters`` are those that matter most and all that are not their config class's default; ``defaults`` are
    the other settings of the method, at their defaults. ``generators`` tells of Python's, numpy's and torch's
    generators of random numbers when training begins: the digest of each one's state, and its seed where that is known;
    empty in a run under differential privacy.
    """

    TYPE: ClassVar[str] = "trainer.attached"

    trainer: str
    loss: str | None
    max_steps: int
    seed: int | None
    hyperparameters: dict[str, Any]
    defaults: dict[str, Any] = {}
    generators: dict[str, Any] = {}
