"""The life of a run, from its opening to its end, and where it ran. Floor 1."""

from __future__ import annotations

from typing import Any, ClassVar

from rlhf_audit_nb.events.base import Event, Private
from rlhf_audit_nb.events.inputs import CodeFiles  # noqa: TC001 - the decoder reads the annotation

__all__ = [
    "EnvironmentCaptured",
    "ReplayStarted",
    "RunFinished",
    "RunFinishedPrivate",
    "RunInterrupted",
    "RunResumed",
    "RunStarted",
]


class RunStarted(Event, frozen=True, kw_only=True):
    """A training run was opened by ``%%audit_train`` or ``track_training``.

    ``privacy`` is the configuration that was asked for, ``None`` without differential privacy. ``declared_model`` is
    a declaration until a trainer shows the model. ``entry_point`` is ``cell`` or ``context``. ``parent`` is the run of
    this trail inside which it was opened, if it was.
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
    parent: str | None = None


class EnvironmentCaptured(Event, frozen=True, kw_only=True):
    """Where the run happened: interpreter, packages, code version, hardware, determinism.

    ``packages_digest`` is that of the list of packages with the digest of each one's RECORD, which lies beside the
    trail as ``artifacts/DIGEST.json``; ``tool_digest`` covers this tool's own source as it lay there. ``drivers`` are
    versions of what computes (CUDA, cuDNN, MKL and so on), ``variables`` the environment variables that matter.
    ``git_diff`` is SHA-256 over ``git diff HEAD``, ``None`` where nothing is changed, and under differential privacy,
    since the changes may hold rows. ``code`` are the local source files imported when the run was opened.
    """

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
    git_diff: str | None = None
    code: CodeFiles | None = None
    packages_digest: str | None = None
    tool_digest: str | None = None
    drivers: dict[str, Any] = {}
    variables: dict[str, str] = {}


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


class RunFinishedPrivate(Private, frozen=True, kw_only=True):
    """What a private run's times tell: the overhead of recording, as in `RunFinished`."""

    overhead: dict[str, Any]


class RunFinished(Event, frozen=True, kw_only=True):
    """The run was closed: ``status`` is ``completed``, ``failed``, ``interrupted`` or ``stopped-by-budget``.

    ``reason`` is the type of the exception that ended it, or ``SIGTERM`` or ``interpreter-exit`` where its process
    ended. ``unrecorded_steps`` are optimizer steps that were seen outside of a trainer and that no loop recorded.
    ``overhead`` is what recording cost the thread that trained, as `rlhf_audit_nb.capture.overhead` measured it;
    ``None`` where nothing was trained, and under differential privacy, where it is private.
    """

    TYPE: ClassVar[str] = "run.finished"
    PRIVATE: ClassVar[type[Private] | None] = RunFinishedPrivate

    status: str
    steps: int
    trained: bool
    reason: str | None = None
    unrecorded_steps: int = 0
    overhead: dict[str, Any] | None = None


class RunInterrupted(Event, frozen=True, kw_only=True):
    """A later opening of the trail found this run open and its process gone."""

    TYPE: ClassVar[str] = "run.interrupted"

    run: str
    last_sequence: int
