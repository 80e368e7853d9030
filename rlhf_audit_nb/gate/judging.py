"""The gate itself: records are found, verified and held to a policy. Floor 4.

One record of the model has to meet the whole policy, and nothing may speak against the model: another record of the
same files that tells of a training without the privacy that is asked for, of a test that was failed, or of a rejection.
Copies of one record count as one, as long as what was added to them since is the same or goes on from it.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_audit_nb.compliance.evidence import Evidence
from rlhf_audit_nb.compliance.words import level_words, plural, short
from rlhf_audit_nb.errors import AuditError, ConfigError, FormatError
from rlhf_audit_nb.events import RecordAttested, RecordSealed, RunStarted, WeightsSaved
from rlhf_audit_nb.gate.finding import Decision, Finding, Judgement, Looked
from rlhf_audit_nb.gate.model import Model, model_findings, near_tensors, open_model
from rlhf_audit_nb.gate.policy import GatePolicy, load_policy
from rlhf_audit_nb.gate.rules import SPEAKS_AGAINST, Subject, check
from rlhf_audit_nb.gate.search import find_records
from rlhf_audit_nb.records import open_record
from rlhf_audit_nb.records.kept import FOLDER as KEPT
from rlhf_audit_nb.records.signatures import REJECTED
from rlhf_audit_nb.records.statement import entries_digest
from rlhf_audit_nb.trail import Level, TrailReader
from rlhf_audit_nb.trail.home import home_folder
from rlhf_audit_nb.trail.merkle import Frontier, leaf_hash
from rlhf_audit_nb.trail.published import is_published
from rlhf_audit_nb.trail.succession import KeySuccession, known_limits

if TYPE_CHECKING:
    from rlhf_audit_nb.compliance.weights import SavedWeights
    from rlhf_audit_nb.records import OpenedRecord

__all__ = ["gate", "judge_opened", "judge_record", "trail_beside"]

_MOST_REASONS = 20


def judge_record(
    path: Path | str,
    policy: GatePolicy | Path | str,
    *,
    trail: Path | str | None = None,
    home: Path | None = None,
    tsa_roots: Sequence[bytes] | None = None,
    now: float | None = None,
) -> Decision:
    """Whether a record meets a policy.

    Args:
        path: the record: a file, or as text an address that papermill can read.
        policy: what is asked, or its file.
        trail: the record's trail (a folder, or a published one), so that what came after it counts as well.
        home: the folder of last-seen heads; ``None`` takes the user's own.
        tsa_roots: certificates (PEM) of the timestamping authorities that are trusted; ``None`` takes the home's.
        now: POSIX seconds; ``None`` takes the clock.

    Raises:
        ConfigError: the policy is none.
        AuditError: the record or the trail cannot be read.
    """
    asked = policy if isinstance(policy, GatePolicy) else load_policy(policy)
    opened = open_record(path, policy=asked.trust, home=home, tsa_roots=tsa_roots)
    return judge_opened(opened, path, asked, trail=trail, home=home, now=now)


def judge_opened(
    opened: OpenedRecord,
    path: Path | str,
    policy: GatePolicy,
    *,
    trail: Path | str | None = None,
    home: Path | None = None,
    now: float | None = None,
) -> Decision:
    """`judge_record` for a record that was opened, under the policy's own trust, from a file or a bundle."""
    judging = _Judging(policy, None, _trail_evidence(trail, policy, home), home, None, now)
    done = judging.judged(opened, str(path))
    return Decision(str(path).rsplit("/", 1)[-1], policy.digest, policy.resolved, None, (done,), (), policy.not_asked)


def gate(
    folder: Path | str,
    policy: GatePolicy | Path | str,
    *,
    records: Sequence[Path | str] = (),
    trail: Path | str | None = None,
    home: Path | None = None,
    tsa_roots: Sequence[bytes] | None = None,
    now: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Decision:
    """Whether the model in a folder may be used: its record is found, verified and held to the policy.

    Args:
        folder: the model that is to be used.
        policy: what is asked, or its file.
        records: files, and folders that are looked through with all below them.
        trail: the trail (a folder, or a published one): its copies of records are looked through, and what came after
            a record counts as well.
        home: the folder of last-seen heads; ``None`` takes the user's own.
        tsa_roots: certificates (PEM) of the timestamping authorities that are trusted; ``None`` takes the home's.
        now: POSIX seconds; ``None`` takes the clock.
        progress: told how many notebooks were looked at.

    Raises:
        ConfigError: the policy is none, the folder holds no weights, or a place does not exist.
        AuditError: the trail cannot be read.
    """
    asked = policy if isinstance(policy, GatePolicy) else load_policy(policy)
    for place in records:
        if not Path(place).exists():
            raise ConfigError(f"There are no records at {place}.", next_step="Name a folder of records, or a record.")
    known = _trail_evidence(trail, asked, home)
    model = open_model(folder)
    places = _places(model, records, trail)
    search = find_records(model.digests, places, progress)
    judging = _Judging(asked, model, known, home, tsa_roots, now)
    done, left = judging.all(search.found)
    findings = list(judging.against(done))
    near: tuple[str, ...] = ()
    if not done:
        findings.insert(0, Finding("record", False, "No record knows this model, by its files or by its signature."))
        near = tuple(_near(model, known, trail))
    looked = Looked(search.files, tuple(str(place) for place, _ in places), (*search.left, *left), near)
    return Decision(
        model.name, asked.digest, asked.resolved, model.digest, tuple(done), tuple(findings), asked.not_asked, looked
    )


def trail_beside(model: Path, policy: GatePolicy, places: Sequence[Path]) -> Path | None:
    """The first of ``places``, or of those beside the model or record, that is a trail whose log the policy trusts."""
    from rlhf_audit_nb.config import DEFAULT_TRAIL

    trusted = {log.name for log in policy.trust.logs}
    beside = [parent / DEFAULT_TRAIL for parent in list(model.resolve().parents)[:2]]
    for place in (*places, *beside):
        if (place / "trail.sqlite").is_file() and TrailReader.open(place).origin in trusted:
            return place
    return None


def _places(model: Model, records: Sequence[Path | str], trail: Path | str | None) -> list[tuple[Path, bool]]:
    places = [(Path(place), True) for place in records]
    if trail is not None and not is_published(trail) and (Path(trail) / KEPT).is_dir():
        places.append((Path(trail) / KEPT, True))
    return [*places, (model.folder.resolve().parent, False), (model.folder, False)]


def _trail_evidence(trail: Path | str | None, policy: GatePolicy, home: Path | None) -> Evidence | None:
    if trail is None:
        return None
    if is_published(trail):
        return Evidence.from_published(trail, policy=policy.trust, home=home)
    return Evidence.from_trail(Path(trail), policy=policy.trust, home=home)


def _near(model: Model, known: Evidence | None, trail: Path | str | None) -> Iterator[str]:
    if known is not None and known.trusted:
        for item, event in known.of(WeightsSaved):
            if model.digests & {event.digest, event.signature_digest}:
                yield f"Entry {item.index} of the trail saved these files; its record was not found: name its folder."
                return
    if trail is not None and (Path(trail) / "artifacts").is_dir():
        yield from near_tensors(model, Path(trail) / "artifacts")


@dataclass
class _Judging:
    """One policy, one model (or none) and one trail (or none), over any number of records."""

    policy: GatePolicy
    model: Model | None
    trail: Evidence | None
    home: Path | None
    tsa_roots: Sequence[bytes] | None
    now: float | None
    _compared: dict[str, tuple[SavedWeights | None, tuple[Finding, ...]]] = field(default_factory=dict)
    _weights: list[str | None] = field(default_factory=list)

    def all(self, paths: Sequence[Path]) -> tuple[list[Judgement], list[str]]:
        """Every record among ``paths`` that is of the model, judged, copies once; and what could not be read."""
        assert self.model is not None
        opened: list[tuple[Path, OpenedRecord]] = []
        left = []
        for path in paths:
            try:
                found = self._open(path)
            except AuditError as error:
                left.append(f"{path} cannot be read as a record: {error.message}")
                continue
            saved = [event for _, event in Evidence.from_record(found).of(WeightsSaved)]
            # Of a record that does not hold nothing is known but that the digest stands in it: it is told of.
            if self.model.knows(saved) or not level_words(found.verdict.level.name).trusted:
                opened.append((path, found))
        return [self.judged(found, str(path)) for path, found in _newest(opened)], left

    def _open(self, path: Path | str) -> OpenedRecord:
        return open_record(path, policy=self.policy.trust, home=self.home, tsa_roots=self.tsa_roots)

    def against(self, done: Sequence[Judgement]) -> Iterator[Finding]:
        """What other records of the model say against it, where one meets the policy."""
        if not any(one.met for one in done):
            return
        for one in done:
            for finding in one.speaks_against:
                name = one.source.rsplit("/", 1)[-1]
                said = f"Record {short(one.record)} ({name}) of the same files speaks against it: {finding.reason}"
                yield Finding("model.other_record", False, said, finding.entries)
        yield from self._rejected_in_trail(done)

    def _rejected_in_trail(self, done: Sequence[Judgement]) -> Iterator[Finding]:
        """Rejections of other records of the files that only the trail tells of: their records are not here, or cut."""
        if self.trail is None or self.model is None or not self.trail.trusted:
            return
        runs = {item.run for item, event in self.trail.of(WeightsSaved) if self.model.knows([event])}
        records = {event.record for item, event in self.trail.of(RunStarted) if item.run in runs}
        known = {one.record for one in done if not any(_leaves_open(finding) for finding in one.unmet)}
        people = {key: person.name for person in self.policy.people for key in person.keys}
        last: dict[tuple[str, str], tuple[int, str]] = {}
        for item, event in self.trail.of(RecordAttested):
            if event.record in records - known and event.key in people:
                last[event.record, people[event.key]] = (item.index, event.meaning)
        for (record, name), (index, meaning) in last.items():
            if meaning == REJECTED:
                said = f"The trail says that {name} has rejected record {short(record)} of the same files."
                yield Finding("model.other_record", False, said, (index,))

    def judged(self, opened: OpenedRecord, source: str) -> Judgement:
        """One record that was opened."""
        record = opened.sealed.record if opened.sealed is not None else ""
        if not level_words(opened.verdict.level.name).trusted:
            return Judgement(record, source, opened.verdict, tuple(_broken(opened)))
        evidence = Evidence.from_record(opened)
        findings = [Finding("record", True, "Every part of the record is what was sealed and signed.")]
        findings += self._quorum(opened)
        saved = None
        if self.model is not None:
            saved, told = self._model_findings(evidence)
            findings += told
        whole = evidence
        if self.trail is not None:
            told_by_trail = tuple(_with_trail(self.trail, opened, evidence, saved, self.policy, self.home))
            findings += told_by_trail
            whole = self.trail if all(one.met for one in told_by_trail) else evidence
        now = int((time.time() if self.now is None else self.now) * 1_000_000)
        subject = Subject(opened, evidence, whole, saved, self._weights_digest(), now)
        asked = check(self.policy, subject)
        findings += asked
        against = tuple(one for one in asked if not one.met and one.id in SPEAKS_AGAINST)
        return Judgement(record, source, opened.verdict, tuple(findings), against)

    def _quorum(self, opened: OpenedRecord) -> Iterator[Finding]:
        if self.policy.level is None and self.policy.trust.quorum != "none":
            met = opened.verdict.level is Level.COSIGNED
            quorum, level = self.policy.trust.quorum, opened.verdict.level.name
            said = f"The record is {level}; the trust policy asks for the quorum {quorum}."
            yield Finding("level", met, said)

    def _model_findings(self, evidence: Evidence) -> tuple[SavedWeights | None, tuple[Finding, ...]]:
        assert self.model is not None
        # Hashing a model takes long; copies of a record say the same of it.
        key = entries_digest(evidence.entries)
        if key not in self._compared:
            self._compared[key] = model_findings(self.model, evidence, self.policy.uncovered)
        return self._compared[key]

    def _weights_digest(self) -> str | None:
        if self.model is None or self.policy.weights is None:
            return None
        if not self._weights:
            self._weights.append(self.model.weights_digest())
        return self._weights[0]


def _leaves_open(finding: Finding) -> bool:
    """Whether a record of which this is found may not say all that the trail knows was said of it."""
    return finding.tampering or finding.id == "attestations.missing" or finding.id.startswith("trail")


def _broken(opened: OpenedRecord) -> Iterator[Finding]:
    """Why a record does not hold."""
    name = "trail.history" if opened.verdict.level is Level.DIVERGED else "record"
    reasons = [reason for reason in opened.verdict.reasons if not reason.advisory]
    for reason in reasons[:_MOST_REASONS]:
        yield Finding(name, False, f"{reason.message} [{reason.code}]", where=reason.where, tampering=True)
    if not reasons:
        yield Finding(name, False, f"The record is {opened.verdict.level.name}.", tampering=True)


def _newest(opened: Sequence[tuple[Path, OpenedRecord]]) -> Iterator[tuple[Path, OpenedRecord]]:
    """The records without those copies that another copy goes on from, reaching as far or further."""
    for i, (path, found) in enumerate(opened):
        if not any(_covers(other, found, later=j > i) for j, (_, other) in enumerate(opened) if j != i):
            yield path, found


def _covers(other: OpenedRecord, mine: OpenedRecord, *, later: bool) -> bool:
    if mine.sealed is None or other.sealed is None or other.verdict.level < max(mine.verdict.level, Level.UNANCHORED):
        return False
    if not level_words(mine.verdict.level.name).trusted or other.sealed != mine.sealed:
        return False
    theirs, own = _additions(other), _additions(mine)
    same = len(theirs) == len(own) and other.verdict.level == mine.verdict.level
    return theirs[: len(own)] == own and not (same and later)


def _additions(opened: OpenedRecord) -> list[object]:
    return list((opened.metadata or {}).get("additions", ()))


# --- the trail at hand -----------------------------------------------------------------------------------------------


def _with_trail(
    trail: Evidence,
    opened: OpenedRecord,
    record: Evidence,
    saved: SavedWeights | None,
    policy: GatePolicy,
    home: Path | None,
) -> Iterator[Finding]:
    """What the trail says of a record since it was sealed."""
    if not trail.trusted:
        name = "trail.history" if trail.verdict.level is Level.DIVERGED else "trail"
        why = next((f": {reason.message}" for reason in trail.verdict.reasons if not reason.advisory), "")
        yield Finding(name, False, f"The trail at hand is {trail.verdict.level.name}{why}", tampering=True)
        return
    history = _history(trail, opened, record)
    yield history
    if not history.met:
        return
    yield from _keys(trail, opened, record, saved, policy, home)
    if saved is not None and policy.privacy is not None:
        yield from _same_files(trail, record, saved)


def _history(trail: Evidence, opened: OpenedRecord, record: Evidence) -> Finding:
    head = opened.verdict
    if trail.verdict.origin != head.origin:
        said = f"The trail at hand is {trail.verdict.origin}, and the record is of {head.origin}."
        return Finding("trail", False, said)
    if trail.verdict.size < head.size:
        said = (
            f"The trail at hand ends after {trail.verdict.size:,} entries; the record's checkpoint has {head.size:,}."
        )
        return Finding("trail", False, said)
    tree = Frontier()
    tree.extend(leaf_hash(entry.data) for entry in trail.entries[: head.size])
    same = base64.b64encode(tree.root()).decode() == head.root
    if not same or any(trail.entries[entry.index].data != entry.data for entry in record.entries):
        said = "The trail at hand is not the history that the record was sealed in: it was rewritten or forked."
        return Finding("trail.history", False, said, tampering=True)
    since = trail.verdict.size - head.size
    return Finding(
        "trail", True, f"The trail goes on from the record; {plural(since, 'entry', 'entries')} came after it."
    )


def _keys(
    trail: Evidence,
    opened: OpenedRecord,
    record: Evidence,
    saved: SavedWeights | None,
    policy: GatePolicy,
    home: Path | None,
) -> Iterator[Finding]:
    """Whether a key that the record rests on was revoked since."""
    origin = trail.verdict.origin
    keys = KeySuccession(origin, known_limits(home_folder(home), origin))
    for entry in trail.entries:
        keys.add(entry)
    (sealed, _), *_ = record.of(RecordSealed)
    rests = [("record", sealed.index, "signed the record")]
    if saved is not None:
        rests.append(("model", saved.entry, "signed the model's folder"))
    for role, index, what in rests:
        span = keys.key_at(role, index)
        if span is None or not keys.counts_at(span, index):
            yield Finding(
                "trail.keys", False, f"The key that {what} was revoked since, for entry {index} as well.", (index,)
            )
    try:
        keys.check(policy.trust, str((opened.metadata or {}).get("checkpoint", "")))
    except FormatError as error:
        yield Finding("trail.keys", False, f"The record's checkpoint no longer counts: {error.message}")


def _same_files(trail: Evidence, record: Evidence, saved: SavedWeights) -> Iterator[Finding]:
    """Trainings without a bound that saved the same files, in runs that are no part of the record."""
    from rlhf_audit_nb.compliance.facts import run_facts
    from rlhf_audit_nb.privacy.descent import Descent

    own = {run.run for run in run_facts(record)}
    descent = Descent((item.index, item.run, item.event) for item in trail.items if item.event is not None)
    for training in descent.saved(saved.digest):
        unbounded = descent.exposure(training).unbounded
        if training.run not in own and unbounded:
            said = "Another training of the trail saved the same files, and no bound covers it."
            yield Finding("trail.same_files", False, said, tuple(sorted(unbounded)))
