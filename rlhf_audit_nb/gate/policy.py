"""The policy of a gate: what has to hold of a record before its model is used. Floor 4.

A YAML file, strict: `FIELDS` are all its keys. ``version`` and ``trust`` are required; every other key asks for one
thing more, and a key that is left out asks for nothing, which each decision says. Files that it names (whom to trust,
people's keys) are looked for beside it and read with it, so that a policy that was read is complete.
`GatePolicy.resolved` is the digest of all of it. `EXAMPLE` is a policy to begin with; docs/records/gate.md explains it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_audit_nb.compliance.framework import MODES, load_framework
from rlhf_audit_nb.errors import ConfigError, FormatError
from rlhf_audit_nb.gate.reading import Value, read_yaml
from rlhf_audit_nb.records.dsse import key_id
from rlhf_audit_nb.records.normal_form import canonical_json
from rlhf_audit_nb.records.signatures import APPROVED, MEANINGS, REJECTED, TRAINER, WITHDRAWN, Person, Requirement
from rlhf_audit_nb.trail import Level, TrustPolicy
from rlhf_audit_nb.trail.signers import load_public, read_public, spki_of
from rlhf_audit_nb.trail.vkey import ED25519, Verifier

__all__ = [
    "FIELDS",
    "OWN_TRAIL",
    "Evaluations",
    "EvidenceAsked",
    "Fresh",
    "GatePolicy",
    "Privacy",
    "ReproducedAsked",
    "load_policy",
    "parse_policy",
]

VERSION = 1
LEVELS = ("UNANCHORED", "TIMESTAMPED", "COSIGNED")
UNITS = ("annotator", "pair", "label")
OWN_TRAIL = "trail"
"""The record's own trail, where it is one whose word on a reproduction counts."""

GIT_FILES = (".git", ".gitattributes", ".github", ".gitignore")
_DAY = 86_400
_MOST_FILE = 1 << 20

FIELDS: dict[str, str] = {
    "version": "the version of this format",
    "trust": "whose signatures count",
    "level": "that somebody else has witnessed the record",
    "fresh": "how old it may be",
    "outcome": "that the notebook ran to its end",
    "failed_cells": "that no cell failed",
    "changed_outputs": "that no output was changed after its cell had run",
    "git": "that the code was committed",
    "weights": "that the tensors are those that the training left",
    "base_models": "which models it may have begun from",
    "privacy": "differential privacy",
    "evaluations": "that tests reached the thresholds that were set for them",
    "evidence": "evidence for requirements of a law or standard",
    "people": "whose personal signatures count",
    "attestations": "signatures of people",
    "reproduced": "that somebody has run it again, and it came out the same",
    "uncovered": "git's own files in the model's folder",
}
"""Every key of a policy, and what it asks."""

_SAID_NOT = ("version", "trust", "people", "uncovered")


@dataclass(frozen=True)
class Fresh:
    """How old a record may be, in seconds; ``None``: of any age.

    Attributes:
        record: since it was sealed, by the clock of the trail's own writer.
        witnessed: since a witness or a timestamping authority last vouched for a checkpoint that covers it, by theirs.
    """

    record: int | None = None
    witnessed: int | None = None


@dataclass(frozen=True)
class Privacy:
    """What a training's bound has to be: at most ``epsilon`` and ``delta``, for one of the ``units``."""

    epsilon: float
    delta: float
    units: tuple[str, ...]


@dataclass(frozen=True)
class Evaluations:
    """Metrics that a test has to have reached, and how early the threshold had to be set."""

    metrics: tuple[str, ...]
    before: str


@dataclass(frozen=True)
class EvidenceAsked:
    """Requirements of a framework for which something has to stand, by their ids."""

    framework: str
    requirements: tuple[str, ...]


@dataclass(frozen=True)
class ReproducedAsked:
    """A reproduction by one of ``by`` (people's names, or `OWN_TRAIL`).

    Attributes:
        verdict: ``identical``, or ``equal``, which an identical one meets as well.
        by: whose word counts.
        tolerance: the largest that may have been stated; weights have to be identical all the same.
    """

    verdict: str
    by: tuple[str, ...]
    tolerance: float = 0.0


@dataclass(frozen=True)
class GatePolicy:
    """A policy that was read; see the module, and `FIELDS` for what each attribute asks.

    Attributes:
        digest: SHA-256 (hex) of the file.
        asked: the keys that the file has.
    """

    digest: str
    trust: TrustPolicy
    asked: frozenset[str] = frozenset()
    level: Level | None = None
    fresh: Fresh = Fresh()
    outcome: str | None = None
    failed_cells: str | None = None
    changed_outputs: str | None = None
    git: str | None = None
    weights: str | None = None
    base_models: tuple[str, ...] = ()
    privacy: Privacy | None = None
    evaluations: Evaluations | None = None
    evidence: EvidenceAsked | None = None
    people: tuple[Person, ...] = ()
    attestations: tuple[Requirement, ...] = ()
    reproduced: ReproducedAsked | None = None
    uncovered: tuple[str, ...] = ()
    files: tuple[str, ...] = field(default=(), compare=False)

    @property
    def not_asked(self) -> tuple[str, ...]:
        """What the policy leaves open, in words."""
        return tuple(words for name, words in FIELDS.items() if name not in self.asked and name not in _SAID_NOT)

    @property
    def resolved(self) -> str:
        """SHA-256 (hex) of what is asked, with the contents of the files that the policy names, in canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_dict())).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """What is asked, as plain values."""
        return {
            "version": VERSION,
            "trust": self.trust.format(),
            "level": self.level.name if self.level is not None else None,
            "fresh": asdict(self.fresh),
            "outcome": self.outcome,
            "failed_cells": self.failed_cells,
            "changed_outputs": self.changed_outputs,
            "git": self.git,
            "weights": self.weights,
            "base_models": list(self.base_models),
            "privacy": asdict(self.privacy) if self.privacy is not None else None,
            "evaluations": asdict(self.evaluations) if self.evaluations is not None else None,
            "evidence": asdict(self.evidence) if self.evidence is not None else None,
            "people": [asdict(person) for person in self.people],
            "attestations": [asdict(asked) for asked in self.attestations],
            "reproduced": asdict(self.reproduced) if self.reproduced is not None else None,
            "uncovered": list(self.uncovered),
        }


def load_policy(path: Path | str) -> GatePolicy:
    """The policy in a file.

    Raises:
        ConfigError: it, or a file that it names, cannot be read, or it asks for what cannot be; the message names the
            line and the key.
    """
    place = Path(path)
    try:
        data = place.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"The policy {path} cannot be read: {error.strerror or error}.",
            next_step="Check the path.",
            code="gate-policy",
        ) from error
    return parse_policy(data, place.parent, place.name)


def parse_policy(data: bytes, folder: Path | str, file: str = "policy.yaml") -> GatePolicy:
    """The policy in ``data``; the files that it names are looked for in ``folder``. Errors as `load_policy`."""
    fields = read_yaml(data, file).fields(tuple(FIELDS), ("version", "trust"))
    version = fields["version"]
    if version.text("a number") != str(VERSION):
        version.fail(f"{version.text()!r} is not a version that is known here", f"Write version: {VERSION}.")
    reading = _Reading(Path(folder))
    found: dict[str, Any] = {
        name: getattr(reading, f"read_{name}")(value) for name, value in fields.items() if name != "version"
    }
    policy = GatePolicy(digest=hashlib.sha256(data).hexdigest(), asked=frozenset(fields), **found)
    _check_people(policy, fields)
    return policy


class _Reading:
    """Reads each key of a policy; the methods are called by its name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read_trust(self, value: Value) -> TrustPolicy:
        text = value.text("the name of a trust policy's file")
        name = "the trust policy written out" if "\n" in text.strip() else text.strip()
        data = text.encode() if "\n" in text.strip() else self._file(value, text.strip())
        try:
            return TrustPolicy.parse(data)
        except FormatError as error:
            value.fail(
                f"{name} is not a trust policy. {error.message.rstrip('.')}",
                "Name the file with the public keys (a log line and a quorum line) that the key-holder gave you.",
            )

    def _file(self, value: Value, name: str) -> bytes:
        try:
            with (self._folder / Path(name).expanduser()).open("rb") as file:
                return file.read(_MOST_FILE + 1)
        except (OSError, ValueError, RuntimeError) as error:  # the last where ~somebody has no home
            why = getattr(error, "strerror", None) or error
            value.fail(f"the file {name} cannot be read: {why}", "Name a file beside the policy.")

    def read_level(self, value: Value) -> Level:
        return Level[value.choice(LEVELS)]

    def read_fresh(self, value: Value) -> Fresh:
        fields = value.fields(("record", "witnessed"))
        if not fields:
            value.fail("it asks for nothing", "Write record: 90 days, or witnessed: 7 days, or both.")
        return Fresh(**{name: item.seconds() for name, item in fields.items()})

    def read_outcome(self, value: Value) -> str:
        return value.choice(("completed",))

    def read_failed_cells(self, value: Value) -> str:
        return value.choice(("refuse",))

    def read_changed_outputs(self, value: Value) -> str:
        return value.choice(("refuse",))

    def read_git(self, value: Value) -> str:
        return value.choice(("clean", "known"))

    def read_weights(self, value: Value) -> str:
        return value.choice(("final",))

    def read_base_models(self, value: Value) -> tuple[str, ...]:
        for item in value.items():
            text = item.text("a digest")
            if len(text) != 64 or set(text) - set("0123456789abcdef"):  # noqa: PLR2004 (SHA-256 in hex)
                item.fail(f"{text[:70]!r} is not a digest", "Write a model's weights digest: 64 hexadecimal digits.")
        return value.texts("a digest")

    def read_privacy(self, value: Value) -> Privacy:
        fields = value.fields(("epsilon", "delta", "units"), ("epsilon", "delta", "units"))
        for item in fields["units"].items():
            item.choice(UNITS)
        return Privacy(
            fields["epsilon"].number(above=0), fields["delta"].number(above=0, most=0.5), fields["units"].texts()
        )

    def read_evaluations(self, value: Value) -> Evaluations:
        fields = value.fields(("metrics", "thresholds"), ("metrics", "thresholds"))
        before = fields["thresholds"].choice(("before training", "before result"))
        return Evaluations(fields["metrics"].texts("a metric's name"), before)

    def read_evidence(self, value: Value) -> EvidenceAsked:
        fields = value.fields(("framework", "requirements"), ("framework", "requirements"))
        mode = fields["framework"].choice(MODES)
        known = [row.id for row in load_framework(mode).requirements if row.mode != "n-a"]
        for item in fields["requirements"].items():
            if item.text("a requirement's id") not in known:
                _unknown_requirement(item, known)
        return EvidenceAsked(mode, fields["requirements"].texts())

    def read_people(self, value: Value) -> tuple[Person, ...]:
        return tuple(self._person(item) for item in value.items())

    def _person(self, value: Value) -> Person:
        fields = value.fields(("name", "roles", "keys"), ("name", "roles", "keys"))
        keys = tuple(self._key(item) for item in fields["keys"].items())
        return Person(fields["name"].text("a name"), keys, fields["roles"].texts("a role"))

    def _key(self, value: Value) -> str:
        text = value.text("the file of a public key, or the key itself").strip()
        inline = text.startswith("-----BEGIN")
        try:
            return key_id(spki_of(read_public(text.encode() if inline else self._file(value, text))))
        except FormatError as error:
            what = "the key" if inline else f"the file {text}"
            value.fail(
                f"{what} holds no public key. {error.message.rstrip('.')}", error.next_step or "Write a PEM key."
            )

    def read_attestations(self, value: Value) -> tuple[Requirement, ...]:
        return tuple(_requirement(item) for item in value.items())

    def read_reproduced(self, value: Value) -> ReproducedAsked:
        fields = value.fields(("verdict", "by", "tolerance"), ("verdict", "by"))
        verdict = fields["verdict"].choice(("identical", "equal"))
        if (verdict == "equal") != ("tolerance" in fields):
            value.fail(
                f"verdict: {verdict} goes {'with' if verdict == 'equal' else 'without'} a tolerance",
                "Write verdict: identical, or verdict: equal and the largest tolerance that may be stated.",
            )
        tolerance = fields["tolerance"].number(above=0, most=1) if "tolerance" in fields else 0.0
        return ReproducedAsked(verdict, fields["by"].texts("a name"), tolerance)

    def read_uncovered(self, value: Value) -> tuple[str, ...]:
        for item in value.items():
            item.choice(GIT_FILES)
        return value.texts()


def _unknown_requirement(value: Value, known: list[str]) -> None:
    import difflib

    close = difflib.get_close_matches(value.text(), known, n=3, cutoff=0.5)
    value.fail(
        f"there is no requirement {value.text()!r} that can be answered"
        + (f"; close are {', '.join(close)}" if close else ""),
        "Write the ids of a report's lines, such as those of `rlhf-audit report --format json`.",
    )


def _requirement(value: Value) -> Requirement:
    known = ("role", "count", "meanings", "purpose", "max_age", "in_trail")
    fields = value.fields(known, ("role",))
    meanings = fields["meanings"].items() if "meanings" in fields else []
    for item in meanings:
        item.choice([name for name in MEANINGS if name not in (REJECTED, WITHDRAWN)])
    readers: dict[str, Callable[[Value], Any]] = {
        "role": lambda item: item.text("a role"),
        "count": Value.count,
        "meanings": Value.texts,
        "purpose": lambda item: item.text("a purpose"),
        "max_age": lambda item: item.seconds() / _DAY,
        "in_trail": Value.flag,
    }
    read = {("max_age_days" if name == "max_age" else name): readers[name](item) for name, item in fields.items()}
    return Requirement(**{"meanings": (APPROVED,), **read})


# --- people ----------------------------------------------------------------------------------------------------------


def _check_people(policy: GatePolicy, fields: dict[str, Value]) -> None:
    """One person a key, one key a person, none of them a log's; and nothing is asked that nobody could give.

    Raises:
        ConfigError: otherwise.
    """
    if "people" in fields:
        _check_keys(policy, fields["people"])
    if policy.reproduced is not None:
        known = {OWN_TRAIL, *(person.name for person in policy.people)}
        by = fields["reproduced"].fields(("verdict", "by", "tolerance"))["by"]
        for item in by.items():
            if item.text() not in known:
                item.fail(
                    f"nobody below people: is called {item.text()!r}", f"Write one of: {', '.join(sorted(known))}."
                )
    for asked, value in zip(
        policy.attestations, fields["attestations"].items() if "attestations" in fields else (), strict=True
    ):
        role = _plain(asked.role or "")
        able = [
            person
            for person in policy.people
            if role in map(_plain, person.roles) and (role == TRAINER or TRAINER not in map(_plain, person.roles))
        ]
        if len(able) < asked.count:
            value.fail(
                f"{asked.count} signing as {asked.role!r} are asked for, and the policy's people hold {len(able)} who "
                "could (whoever trains cannot approve)",
                "Add them below people: with name, roles and keys.",
            )


def _check_keys(policy: GatePolicy, people: Value) -> None:
    logs = {key_id(spki) for spki in map(_log_spki, policy.trust.logs) if spki is not None}
    names: dict[str, int] = {}
    keys: dict[str, str] = {}
    for person, value in zip(policy.people, people.items(), strict=True):
        if _plain(person.name) in names:
            value.fail(f"{person.name} stands twice", "Put all keys and roles of a person under one name.")
        names[_plain(person.name)] = value.line
        for key in person.keys:
            if key in keys:
                value.fail(
                    f"one key is named for {keys[key]} and for {person.name}",
                    "Each person has a key of their own: find out whose it is.",
                )
            if key in logs:
                value.fail(
                    f"the key of {person.name} is that of the log, which the training's process holds",
                    "Give the person a key of their own.",
                )
            keys[key] = person.name


def _log_spki(log: Verifier) -> bytes | None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if log.algorithm == ED25519:
        return spki_of(Ed25519PublicKey.from_public_bytes(log.public))
    try:
        return spki_of(load_public(log.public))
    except FormatError:
        return None  # an ML-DSA-44 key: no person signs with one


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
