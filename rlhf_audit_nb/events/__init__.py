"""The vocabulary: every event that the trail can hold, typed, and its bytes. Floor 1.

An event has a public body, which stands in the entry, and may have private fields, which stand only in the vault
(the entry holds a commitment). Which is which is part of the type: a class names its private half in ``PRIVATE``.
What is a function of private data belongs to the private half while the run is under differential privacy; the
``metrics`` of a `Step` are public without it and private with it.

Encoding is JSON with a fixed field order (that of its class) and sorted maps; an event is encoded once and never
re-encoded. Numbers that JSON cannot hold are written as the strings ``NaN``, ``Infinity`` and ``-Infinity``
(`number`). Unknown types and unknown fields are reported, never guessed. Digests are lower-case hex SHA-256.
"""

from __future__ import annotations

from rlhf_audit_nb.events.annotations import (
    Annotation,
    AnnotationRecorded,
    AnnotationsImported,
    AnnotationSource,
    AnnotatorReidentified,
    AnnotatorsKey,
    AnnotatorsTabulated,
)
from rlhf_audit_nb.events.attestations import RecordAttested
from rlhf_audit_nb.events.base import (
    Event,
    Number,
    Private,
    number,
)
from rlhf_audit_nb.events.cells import (
    CellAudited,
    CellPrivate,
    ExecutedCell,
)
from rlhf_audit_nb.events.codec import (
    EVENTS,
    decode_body,
    decode_private,
    encode_body,
    encode_private,
)
from rlhf_audit_nb.events.compute import (
    BaseComputeDeclared,
    ComputeRecorded,
    ComputeRecordedPrivate,
    ModelShape,
    Passes,
)
from rlhf_audit_nb.events.evaluation import (
    EvaluationPrivate,
    EvaluationRecorded,
    ThresholdPrivate,
    ThresholdSealed,
)
from rlhf_audit_nb.events.gate import GateDecided
from rlhf_audit_nb.events.inputs import (
    CodeBound,
    CodeFiles,
    DataBound,
    DataPrivate,
    DataRead,
    InputFile,
    InputFiles,
    ModelBound,
    TrainerAttached,
)
from rlhf_audit_nb.events.life import (
    FailurePrivate,
    Frame,
    RunFailure,
)
from rlhf_audit_nb.events.loops import (
    CheckpointRecorded,
    MetricsLogged,
)
from rlhf_audit_nb.events.privacy import (
    BudgetSet,
    LabelsReleased,
    LabelsSealed,
    LabelsWritten,
    PopulationKey,
    PopulationRoster,
    PopulationSecret,
    PrivacyAudited,
    PrivacyChecked,
    PrivacyEngine,
    PrivacyInherited,
    PrivacyPopulation,
    PrivacyReserved,
    PrivacySealed,
    PrivacySettled,
    PublicDeclared,
)
from rlhf_audit_nb.events.ranks import RankReported, RanksFormed
from rlhf_audit_nb.events.records import (
    CardCreated,
    CellExecuted,
    RecordSealed,
    RecordStarted,
    ReportCreated,
)
from rlhf_audit_nb.events.reproduction import AppliedRule, RecordReproduced
from rlhf_audit_nb.events.runs import (
    EnvironmentCaptured,
    ReplayStarted,
    RunFinished,
    RunFinishedPrivate,
    RunInterrupted,
    RunResumed,
    RunStarted,
)
from rlhf_audit_nb.events.sampling import (
    FunctionBound,
    ReferenceUsed,
    SamplesDrawn,
    SamplesPrivate,
    TrainerLogged,
)
from rlhf_audit_nb.events.sweeps import SlotsReleased, SlotsReserved, SweepFinished, SweepStarted
from rlhf_audit_nb.events.trail import (
    KeyRevoked,
    KeyRotated,
    TrailCreated,
    VaultErased,
)
from rlhf_audit_nb.events.training import (
    Step,
    StepPrivate,
    WeightsSaved,
)

__all__ = [
    "EVENTS",
    "Annotation",
    "AnnotationRecorded",
    "AnnotationSource",
    "AnnotationsImported",
    "AnnotatorReidentified",
    "AnnotatorsKey",
    "AnnotatorsTabulated",
    "AppliedRule",
    "BaseComputeDeclared",
    "BudgetSet",
    "CardCreated",
    "CellAudited",
    "CellExecuted",
    "CellPrivate",
    "CheckpointRecorded",
    "CodeBound",
    "CodeFiles",
    "ComputeRecorded",
    "ComputeRecordedPrivate",
    "DataBound",
    "DataPrivate",
    "DataRead",
    "EnvironmentCaptured",
    "EvaluationPrivate",
    "EvaluationRecorded",
    "Event",
    "ExecutedCell",
    "FailurePrivate",
    "Frame",
    "FunctionBound",
    "GateDecided",
    "InputFile",
    "InputFiles",
    "KeyRevoked",
    "KeyRotated",
    "LabelsReleased",
    "LabelsSealed",
    "LabelsWritten",
    "MetricsLogged",
    "ModelBound",
    "ModelShape",
    "Number",
    "Passes",
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
    "Private",
    "PublicDeclared",
    "RankReported",
    "RanksFormed",
    "RecordAttested",
    "RecordReproduced",
    "RecordSealed",
    "RecordStarted",
    "ReferenceUsed",
    "ReplayStarted",
    "ReportCreated",
    "RunFailure",
    "RunFinished",
    "RunFinishedPrivate",
    "RunInterrupted",
    "RunResumed",
    "RunStarted",
    "SamplesDrawn",
    "SamplesPrivate",
    "SlotsReleased",
    "SlotsReserved",
    "Step",
    "StepPrivate",
    "SweepFinished",
    "SweepStarted",
    "ThresholdPrivate",
    "ThresholdSealed",
    "TrailCreated",
    "TrainerAttached",
    "TrainerLogged",
    "VaultErased",
    "WeightsSaved",
    "decode_body",
    "decode_private",
    "encode_body",
    "encode_private",
    "number",
]
