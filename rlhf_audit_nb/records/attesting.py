"""Signing a record as a person, reading such signatures, and what the trail knows of them. Floor 3.

An attestation is an addition to a record (`additions`) with the predicate `ATTESTATION`::

    {"key": PEM, "time": RFC 3339, "previous": SHA-256|null,          as every addition has
     "name": the printed name, "role": in which the person signs, "meaning": one of `signatures.MEANINGS`,
     "statement": what is said, in words, "purpose": the use that it speaks of (left out: any)}

Name, time and meaning stand with the signature and under it, and it fits no other record: what 21 CFR 11.50 and 11.70
ask of one. What it is worth is counted in `signatures`.

Whoever has the file can take the last additions out of it. So where the trail's keys are at hand, ``record.attested``
is entered into the trail: a digest of what was signed, the meaning, the role, the key's id; neither name nor words.
`known_attestations` reads them, and `signatures.missing_attestations` tells what a copy lacks.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from rlhf_audit_nb.config import DEFAULT_TRAIL, AuditConfig
from rlhf_audit_nb.errors import AuditError, ConfigError, FormatError, KeyFileError, RecordError
from rlhf_audit_nb.events import RecordAttested, RecordSealed, TrailCreated, decode_body, encode_body
from rlhf_audit_nb.records.additions import ATTESTATION, Addition, add_to_record
from rlhf_audit_nb.records.dsse import key_id
from rlhf_audit_nb.records.kept import kept_record
from rlhf_audit_nb.records.record import OpenedRecord, open_record, read_record
from rlhf_audit_nb.records.rewriting import replace_seal, rewrite_record
from rlhf_audit_nb.records.seal import SEAL_VERSION
from rlhf_audit_nb.records.signatures import (
    APPROVED,
    MEANINGS,
    REJECTED,
    SKEW_SECONDS,
    Attestation,
    Person,
    TrailAttestation,
    missing_attestations,
    same_words,
    seconds_of,
    standing_of,
)
from rlhf_audit_nb.records.statement import event_of
from rlhf_audit_nb.trail import Level, Reason, TrailReader, TrustPolicy
from rlhf_audit_nb.trail.checkpoint import checkpoint_of
from rlhf_audit_nb.trail.heads import Heads
from rlhf_audit_nb.trail.home import home_folder
from rlhf_audit_nb.trail.keys import local_policy
from rlhf_audit_nb.trail.merkle import Frontier, leaf_hash
from rlhf_audit_nb.trail.people import person_name, refuse_trail_key, spki_of_vkey
from rlhf_audit_nb.trail.succession import KEY_TYPES, KeyRotatedBody, KeySuccession, known_limits

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import Entry, Trail, Verdict
    from rlhf_audit_nb.trail.signers import SigningKey

__all__ = [
    "MOST_UNASKED",
    "NAMED",
    "UNKNOWN",
    "AttestationPredicate",
    "Attested",
    "ask_trail",
    "attest_record",
    "attestation_notes",
    "attestations_of",
    "carry_to_copy",
    "enter_attestations",
    "known_attestations",
    "meaning_of",
    "signed_by",
    "trail_keys",
    "trail_of",
]

UNKNOWN = "no policy that names people was given, and whose key this is, no file proves"
NAMED = "the policy names this key and this role"

MOST_UNASKED = 200_000
"""The size up to which a trail is read whole (a second or two) without having been named."""

_MEANING = Literal["approved", "reviewed", "responsible", "authored", "rejected", "withdrawn"]
_LONGEST_LINE = 200
_LONGEST_STATEMENT = 4000
_LINE = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
_TEXT = re.compile(r"[^\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")


class AttestationPredicate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an attestation says; ``key``, ``time`` and ``previous`` are those of every addition."""

    key: str
    time: str
    previous: str | None
    name: str
    role: str
    meaning: _MEANING
    statement: str
    purpose: str | None = None


class Attested(Protocol):
    """What attestations are read from: an opened record, or what a report is drawn from."""

    @property
    def verdict(self) -> Verdict:
        """What verifying it found."""

    @property
    def additions(self) -> tuple[Addition, ...]:
        """The additions that hold."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The entries that are proven."""


# -- reading --------------------------------------------------------------------------------------------------------


def attestations_of(record: Attested, known: Sequence[TrailAttestation] = ()) -> tuple[Attestation, ...]:
    """The people's signatures on a record that hold, in their order.

    That a signature holds says that whoever has its key signed these words about this record, and no more.

    Args:
        record: an opened record. Those of one that is INVALID or DIVERGED are no evidence.
        known: what the trail says (`known_attestations`), where it is at hand.
    """
    by_payload = {item.payload: item for item in reversed(known)}
    found = []
    for addition in record.additions:
        if addition.predicate_type != ATTESTATION:
            continue
        try:
            said = _predicate(addition)
        except FormatError:
            continue  # told by `attestation_notes`
        digest = hashlib.sha256(addition.payload).hexdigest()
        found.append(
            Attestation(
                index=addition.index,
                name=said.name,
                role=said.role,
                meaning=said.meaning,
                statement=said.statement,
                time=said.time,
                key=said.key,
                key_id=addition.key_id,
                digest=digest,
                purpose=said.purpose,
                entry=by_payload.get(digest),
            )
        )
    sealed = max((entry.time for entry in record.entries if entry.type == RecordSealed.TYPE), default=None)
    return tuple(
        replace(item, replaced_by=_replacement(item, found), doubts=tuple(_doubts(item, sealed))) for item in found
    )


def _predicate(addition: Addition) -> AttestationPredicate:
    """What an addition says; raises `FormatError` where it is not in the form of an attestation."""
    try:
        said = msgspec.convert(addition.predicate, AttestationPredicate)
        _check_texts(said.name, said.role, said.statement, said.purpose)
        seconds_of(said.time)
    except (msgspec.ValidationError, ConfigError, ValueError) as error:
        raise FormatError(
            f"It is not in the form of an attestation: {getattr(error, 'message', error)}", code="attestation"
        ) from error
    return said


def _replacement(item: Attestation, others: Iterable[Attestation]) -> int | None:
    """The last word of the same key on the same use."""
    later = [
        other.index
        for other in others
        if other.index > item.index and other.key_id == item.key_id and _takes_in(other.purpose, item.purpose)
    ]
    return max(later, default=None)


def _takes_in(later: str | None, earlier: str | None) -> bool:
    return later is None or (earlier is not None and same_words(later, earlier))


def _doubts(item: Attestation, sealed: int | None) -> Iterable[str]:
    signed = seconds_of(item.time)
    if sealed is not None and signed + SKEW_SECONDS < sealed / 1_000_000:
        yield "it is dated before the record was sealed"
    if item.entry is not None and signed - SKEW_SECONDS > item.entry.time / 1_000_000:
        yield f"it is dated after the trail took it in (entry {item.entry.index})"


def attestation_notes(record: Attested, known: Sequence[TrailAttestation] = ()) -> tuple[Reason, ...]:
    """What is worth knowing of a record's signatures before any policy is asked.

    That one is rejected, that the trail knows one that this copy lacks, that one key signs under two names, that a
    time cannot be, that an addition which calls itself an attestation is in no form of one.
    """
    place = "metadata.rlhf_audit.additions"
    items = attestations_of(record, known)
    found = []
    for addition in record.additions:
        if addition.predicate_type == ATTESTATION:
            try:
                _predicate(addition)
            except FormatError as error:
                message = f"Addition {addition.index + 1}: {error.message}"
                found.append(Reason("attestation", f"{place}[{addition.index}].payload", message))
    names: dict[str, str] = {}
    for item in items:
        where = f"{place}[{item.index}]"
        if item.meaning == REJECTED and item.replaced_by is None:
            found.append(Reason("rejected", where, f"It is {item.in_words}: {item.statement}"))
        found += [Reason("attestation-time", where, f"The signature of {item.name}: {doubt}.") for doubt in item.doubts]
        before = names.setdefault(item.key_id, item.name)
        if before != item.name:
            message = f"One key has signed as {before} and as {item.name}."
            found.append(Reason("attestation-names", where, message))
    found += [
        Reason(
            "attestation-missing",
            f"entry {item.index}",
            f"The trail knows an attestation that this copy lacks: {item.meaning} as {item.role} (entry {item.index}).",
        )
        for item in missing_attestations(items, known)
    ]
    return tuple(found)


def signed_by(
    record: Attested, people: Sequence[Person] = (), known: Sequence[TrailAttestation] = ()
) -> tuple[tuple[Attestation, str], ...]:
    """A record's attestations, each with what it is worth under a policy, in words without a full stop.

    No clock is asked: the same record gives the same words. That a time lies in the future the gate tells.

    Raises:
        ConfigError: the policy names a person twice, or one key for two.
    """
    if not people:
        return tuple((item, UNKNOWN) for item in attestations_of(record, known))
    trainers, found = trail_keys(record), []
    for item in attestations_of(record, known):
        standing = standing_of(item, people, trainers, now=float("inf"))
        found.append((item, NAMED if standing.counts else f"it does not count: {standing.why}"))
    return tuple(found)


def trail_keys(record: Attested) -> frozenset[str]:
    """Ids (SHA-256, hex, of the DER SubjectPublicKeyInfo) of the keys that the training's side holds: the trail's.

    Log, record and model keys that the record's entries name, and those of the log that signed its checkpoint.
    """
    found = set()
    logs = [vkey for vkey in record.verdict.signers if vkey.startswith(f"{record.verdict.origin}+")]
    for entry in record.entries:
        if entry.type == TrailCreated.TYPE:
            created = event_of(entry, TrailCreated)
            logs.append(created.log_key)
            found |= {key_id(base64.b64decode(key)) for key in (created.record_key, created.model_key)}
        elif entry.type == "key.rotated":
            body = msgspec.json.decode(entry.body, type=KeyRotatedBody)
            if body.role == "log":
                logs.append(body.new)
            elif body.role != "mldsa":
                found.add(key_id(base64.b64decode(body.new)))
    spkis = [spki_of_vkey(vkey) for vkey in logs]
    return frozenset(found | {key_id(spki) for spki in spkis if spki is not None})


# -- signing --------------------------------------------------------------------------------------------------------


def attest_record(
    path: Path | str,
    key: SigningKey,
    *,
    name: str,
    role: str,
    statement: str,
    meaning: str = APPROVED,
    purpose: str | None = None,
    policy: TrustPolicy | None = None,
    home: Path | None = None,
) -> Attestation:
    """Sign a record as a person: the signature is put into the file, and nothing else in it changes.

    Args:
        path: the record.
        key: the person's own key; one of the trail's is refused.
        name: the printed name.
        role: in which the person signs, such as ``compliance officer``.
        statement: what is said, in words; it stands in the open.
        meaning: one of `signatures.MEANINGS`.
        purpose: the use that it speaks of, such as ``deployment``; ``None`` speaks of any.
        policy: whose signatures count on the record; ``None`` takes the user's own key for its trail.
        home: the folder of keys and last-seen heads.

    Raises:
        ConfigError: a text is empty, too long or holds control characters, or the meaning is none.
        KeyFileError: the key is one of a trail's (``trail-key``) or cannot sign, or nothing says whom to trust.
        RecordError: the record is INVALID or DIVERGED, or cannot be read or written; nothing was changed.
    """
    said = _said(name, role, statement, meaning, purpose)
    home = home_folder(home)
    refuse_trail_key(home, key.spki)
    opened = open_record(path, policy=policy, home=home)
    if key_id(key.spki) in trail_keys(opened):
        raise KeyFileError(
            "This is a key of the record's trail, which the training's process holds: what it signs shows no person.",
            next_step='Make a key of your own: rlhf-audit keys person --name "YOUR NAME".',
            code="trail-key",
        )
    others = [one for one in attestations_of(opened) if one.key_id == key_id(key.spki) and one.name != said["name"]]
    if others:
        raise ConfigError(
            f"This key has signed this record as {others[-1].name}, and now gives the name {said['name']}.",
            next_step="Sign under one name; another person signs with a key of their own.",
            code="name",
        )
    added = add_to_record(path, ATTESTATION, said, key, policy=policy, home=home)
    after = replace(opened, additions=(*opened.additions, added))
    return next(item for item in attestations_of(after) if item.index == added.index)


def meaning_of(meaning: str | None, *, reject: bool) -> str:
    """What a signature means, of two ways to say it.

    Raises:
        ConfigError: both were used and they contradict each other.
    """
    if reject and meaning not in (None, REJECTED):
        raise ConfigError(
            f"A signature cannot mean {meaning} and reject.", next_step="Say one of the two.", code="meaning"
        )
    return REJECTED if reject else meaning or APPROVED


def _said(name: str, role: str, statement: str, meaning: str, purpose: str | None) -> dict[str, Any]:
    if meaning not in MEANINGS:
        raise ConfigError(
            f"A signature cannot mean {meaning!r}.", next_step=f"Choose one of {', '.join(MEANINGS)}.", code="meaning"
        )
    texts = [" ".join(text.split()) if text is not None else None for text in (name, role, purpose)]
    said = {"name": texts[0], "role": texts[1], "meaning": meaning, "statement": statement.strip()}
    _check_texts(str(said["name"]), str(said["role"]), str(said["statement"]), texts[2])
    person_name(str(said["name"]))
    return {**said, "purpose": texts[2]} if texts[2] is not None else said


def _check_texts(name: str, role: str, statement: str, purpose: str | None) -> None:
    """Raise `ConfigError` where a text is empty, too long, or holds what a page or a terminal would obey."""
    lines = {"name": name, "role": role, **({} if purpose is None else {"purpose": purpose})}
    for what, text in lines.items():
        if not text.strip() or len(text) > _LONGEST_LINE or not _LINE.fullmatch(text):
            raise ConfigError(
                f"The {what} is not one line of 1 to {_LONGEST_LINE} characters.",
                next_step=f"Write the {what} as it is to be printed.",
                code=what,
            )
    if not statement.strip() or len(statement) > _LONGEST_STATEMENT or not _TEXT.fullmatch(statement):
        raise ConfigError(
            f"The statement is not a text of 1 to {_LONGEST_STATEMENT:,} characters.",
            next_step="Say in words what you have looked at and what you decide.",
            code="statement",
        )


# -- the trail ------------------------------------------------------------------------------------------------------


def trail_of(opened: OpenedRecord, path: Path | str, *others: Path) -> Path | None:
    """The folder of the record's trail, where it lies in one of ``others``, the usual place, or beside the record."""
    for location in (*others, AuditConfig().trail_location(), Path(path).parent / DEFAULT_TRAIL):
        try:
            if TrailReader.open(location).origin == opened.verdict.origin:
                return Path(location)
        except AuditError:
            continue  # no readable trail, so not this record's
    return None


def ask_trail(
    opened: OpenedRecord,
    path: Path | str,
    *,
    trail: Path | str | None = None,
    policy: TrustPolicy | None = None,
    home: Path | None = None,
) -> tuple[tuple[TrailAttestation, ...], tuple[Reason, ...]]:
    """What the record's trail knows of its attestations, wherever it is at hand.

    Args:
        opened: the record.
        path: its file.
        trail: the trail's folder; ``None`` looks in the usual places (`trail_of`), and a trail there that cannot be
            asked, or has over `MOST_UNASKED` entries, is a note and no error.
        policy: as `known_attestations`, whose errors it has where ``trail`` is named.
        home: likewise.

    Returns:
        What it knows, nothing where there is no trail; and notes.
    """
    location = trail or trail_of(opened, path)
    if location is None:
        return (), ()
    try:
        size = TrailReader.open(location).size
        if not trail and size > MOST_UNASKED:
            message = (
                f"The trail of {size:,} entries was not asked for signatures that this copy lacks: name it to have "
            )
            return (), (Reason("attestations-unchecked", str(location), f"{message}all of it read."),)
        return known_attestations(location, opened, policy=policy, home=home), ()
    except AuditError as error:
        if trail:
            raise
        message = f"Whether a signature was taken out of this copy could not be asked of the trail: {error.message}"
        return (), (Reason("attestations-unchecked", str(location), message),)


def known_attestations(
    location: Path | str, opened: OpenedRecord, *, policy: TrustPolicy | None = None, home: Path | None = None
) -> tuple[TrailAttestation, ...]:
    """What a trail's entries ``record.attested`` say of a record, in their order.

    All entries are read and the tree over them is built anew, so that none can be left out unseen: it must be what the
    newest checkpoint signs, and at the record's size what the record's checkpoint signs. That checkpoint's signature is
    held to the same policy. A trail that was cut back to an older state of its own is whole; where a later one was seen
    on this machine it is refused, and elsewhere only witnesses tell of that (``rlhf-audit verify TRAIL``).

    Args:
        location: the trail's folder.
        opened: the record.
        policy: whose signatures count; ``None`` takes the user's own key for the trail.
        home: the folder of keys.

    Raises:
        RecordError: it is not the record's trail, is older than the record or than one that was seen on this machine,
            or contradicts the record (``other-trail``).
        FormatError: an entry is malformed, or the checkpoint does not hold.
        KeyFileError: nothing says whom to trust.
        StoreError: there is no trail, or it cannot be read.
    """
    reader = TrailReader.open(location)
    verdict, home = opened.verdict, home_folder(home)
    if reader.origin != verdict.origin or reader.size < verdict.size or opened.sealed is None:
        what = f"is {reader.origin}" if reader.origin != verdict.origin else "ends before the record was sealed"
        raise _other_trail(location, what)
    seen = Heads(home).note(verdict.origin)
    if seen is not None and checkpoint_of(seen).size > reader.size:
        what = f"has {reader.size:,} entries, and one of {checkpoint_of(seen).size:,} was seen on this machine"
        raise _other_trail(location, what)
    keys = KeySuccession(verdict.origin, known_limits(home, verdict.origin))
    tree, found = Frontier(), []
    for entry in reader.entries():
        if entry.index == verdict.size and _root(tree) != verdict.root:
            raise _other_trail(location, "has another history than the record")
        tree.extend([leaf_hash(entry.data)])
        if entry.type in KEY_TYPES:
            keys.add(entry)
        elif entry.type == RecordAttested.TYPE:
            found += _of_record(entry, opened.sealed.record)
    if reader.size == verdict.size and _root(tree) != verdict.root:
        raise _other_trail(location, "has another history than the record")
    checked = keys.check_newest(policy or local_policy(home, verdict.origin), reader.checkpoint())
    if checked.checkpoint.root_base64 != _root(tree) or keys.reasons:
        reason = keys.reasons[0].message if keys.reasons else "its entries are not those that its checkpoint signs."
        raise FormatError(
            f"The trail in {location} does not hold: {reason}",
            next_step=f"See all that is wrong with it: rlhf-audit verify {location}.",
            code="trail",
        )
    return tuple(found)


def carry_to_copy(
    location: Path | str, opened: OpenedRecord, *, policy: TrustPolicy | None = None, home: Path | None = None
) -> Path | None:
    """Put what was added to a record into the copy that is kept beside its trail, so that who finds that finds both.

    Args:
        location: the trail's folder.
        opened: the record.
        policy: whose signatures count, as `open_record`.
        home: likewise.

    Returns:
        The copy; ``None`` where there is none, where it has additions that the record lacks, or was changed.

    Raises:
        RecordError: the copy cannot be read or written.
    """
    path = kept_record(location, opened.sealed.record) if opened.sealed is not None else None
    if path is None:
        return None
    mine, holds = (opened.metadata or {}).get("additions", []), False

    def change(data: bytes) -> bytes:
        nonlocal holds
        copy = read_record(data, policy=policy, home=home)
        theirs = (copy.metadata or {}).get("additions", [])
        same = copy.sealed == opened.sealed and copy.verdict.level is not Level.INVALID
        holds = same and mine[: len(theirs)] == theirs
        if not holds or mine == theirs or copy.metadata is None:
            return data
        return replace_seal(data, {**copy.metadata, "version": SEAL_VERSION, "additions": mine})

    rewrite_record(path, change)
    return path if holds else None


def _root(tree: Frontier) -> str:
    return base64.b64encode(tree.root()).decode()


def _other_trail(location: Path | str, what: str) -> RecordError:
    return RecordError(
        f"The trail in {location} is not the record's: it {what}.",
        next_step="Name the trail that the record was made on, in its newest state.",
        code="other-trail",
    )


def _of_record(entry: Entry, record: str) -> list[TrailAttestation]:
    event = decode_body(entry.type, entry.body)
    assert isinstance(event, RecordAttested)
    if event.record != record:
        return []
    return [TrailAttestation(entry.index, entry.time, event.payload, event.meaning, event.role, event.key)]


def enter_attestations(
    trail: Trail, opened: OpenedRecord, *, policy: TrustPolicy | None = None
) -> tuple[TrailAttestation, ...]:
    """Enter into the trail the attestations of a record that it does not know yet; durable on return.

    Raises:
        RecordError: the record is INVALID or DIVERGED, or it is not this trail's.
        StoreError: the trail could not be written.
    """
    if opened.verdict.level in (Level.INVALID, Level.DIVERGED) or opened.sealed is None:
        raise RecordError(
            f"The record is {opened.verdict.level.name}: nothing of it is entered into the trail.",
            next_step="`rlhf-audit verify` says what is wrong with it.",
            code="not-valid",
        )
    record = opened.sealed.record
    trail.flush()
    known = {item.payload for item in known_attestations(trail.location, opened, policy=policy, home=trail.home)}
    entered = []
    for item in attestations_of(opened):
        if item.digest in known:
            continue
        event = RecordAttested(
            record=record,
            digest=opened.sealed.digest,
            payload=item.digest,
            meaning=item.meaning,
            role=item.role,
            key=item.key_id,
        )
        entered.append(trail.append(event.TYPE, encode_body(event)))
    indices = [pending.wait() for pending in entered]
    reader = trail.reader()
    return tuple(
        found for index in indices for entry in reader.entries(index, index + 1) for found in _of_record(entry, record)
    )
