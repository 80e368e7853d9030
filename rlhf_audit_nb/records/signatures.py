"""What people's signatures on a record say, and whether they are those that a policy asks for. Floor 3.

Pure: attestations in, findings out; `attesting` reads them out of a record and puts them in. The rules:

- A signature counts only where the policy names its key for a person. A name in a signature proves nothing.
- The signature says a role, and the policy gives that role to this person; it says a name, and that is the person's.
- A person counts once, whatever the number of roles and keys.
- The trainer is no approver: whoever holds a key of the record's trail, or is named with the role ``trainer``,
  counts for no requirement but one that asks for that role.
- The last word of a person holds. A signature for one purpose answers earlier ones for that purpose; one without a
  purpose speaks of every use and answers all. A requirement without a purpose takes only signatures without one.
- A rejection by anybody whom the policy names stands until the same person answers it, or withdraws it. What does not
  count answers nothing.
- Times are the signers' own. One that lies in the future, before the record was sealed, or after the trail took the
  signature in, is not believed; only the trail's entry bounds it.
"""

from __future__ import annotations

import time as clock
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rlhf_audit_nb.errors import ConfigError

__all__ = [
    "APPROVED",
    "MEANINGS",
    "REJECTED",
    "SKEW_SECONDS",
    "TRAINER",
    "WITHDRAWN",
    "Attestation",
    "Finding",
    "Person",
    "Requirement",
    "Standing",
    "TrailAttestation",
    "count_attestations",
    "missing_attestations",
    "same_words",
    "seconds_of",
    "standing_of",
]

APPROVED, REJECTED, WITHDRAWN = "approved", "rejected", "withdrawn"
TRAINER = "trainer"

MEANINGS: Mapping[str, str] = {
    APPROVED: "I approve the use that is named (without a purpose: any use)",
    "reviewed": "I have read the record and its results; this is no approval",
    "responsible": "I answer for how it was made or for how it is used",
    "authored": "I made it",
    REJECTED: "I refuse it; it stands until I sign again or withdraw it",
    WITHDRAWN: "What I signed before no longer holds; this says nothing in its place",
}
"""What a signature can mean, in the spirit of 21 CFR 11.50(a)(3)."""

SKEW_SECONDS = 300
"""How far two machines' clocks may be apart before a time is not believed."""


@dataclass(frozen=True)
class TrailAttestation:
    """What the trail says of one attestation: its entry ``record.attested``.

    Attributes:
        index: the entry.
        time: when the trail took it in, UTC microseconds.
        payload: SHA-256 (hex) of the payload that was signed.
        meaning: one of `MEANINGS`.
        role: as in the signature.
        key: the id of the person's key.
    """

    index: int
    time: int
    payload: str
    meaning: str
    role: str
    key: str


@dataclass(frozen=True)
class Attestation:
    """One person's signature on a record. That it holds is proven; who the person is, a policy has to say.

    Attributes:
        index: its place among the record's additions.
        name: the name that it gives.
        role: the role that it gives.
        meaning: one of `MEANINGS`.
        statement: what it says in words.
        time: when it was signed by the signer's own clock, RFC 3339.
        key: the public key, PEM.
        key_id: SHA-256 (hex) of its DER SubjectPublicKeyInfo.
        digest: SHA-256 (hex) of the payload that was signed.
        purpose: what use it speaks of; ``None``: of any.
        replaced_by: the index of the same key's later attestation that took its place.
        entry: the trail's entry of it, where a trail was at hand.
        doubts: why its time is not believed, one clause each.
    """

    index: int
    name: str
    role: str
    meaning: str
    statement: str
    time: str
    key: str
    key_id: str
    digest: str
    purpose: str | None = None
    replaced_by: int | None = None
    entry: TrailAttestation | None = None
    doubts: tuple[str, ...] = ()

    @property
    def in_words(self) -> str:
        """Who, as what, what and when: one line."""
        purpose = f" for {self.purpose}" if self.purpose else ""
        return f"{self.meaning}{purpose} by {self.name} ({self.role}), {self.time}"


@dataclass(frozen=True)
class Person:
    """Somebody whom a policy names.

    Attributes:
        name: as it stands in signatures.
        keys: ids (SHA-256, hex, of the DER SubjectPublicKeyInfo) of this person's keys.
        roles: in which this person may sign; `TRAINER` says that this person trains.
    """

    name: str
    keys: tuple[str, ...]
    roles: tuple[str, ...]


@dataclass(frozen=True)
class Requirement:
    """So many people, in a role, with a meaning.

    Attributes:
        role: the role that they sign in; ``None``: in any that the policy gives them.
        count: how many different people.
        meanings: which of `MEANINGS` count.
        purpose: the use that is decided on; ``None``: any, which only a signature without a purpose allows.
        max_age_days: how old a signature may be, in days; ``None``: of any age.
        in_trail: whether the trail must have taken it in.
    """

    role: str | None = None
    count: int = 1
    meanings: tuple[str, ...] = (APPROVED,)
    purpose: str | None = None
    max_age_days: float | None = None
    in_trail: bool = False

    @property
    def in_words(self) -> str:
        """What is asked, in a few words."""
        role = f" as {self.role}" if self.role else ""
        purpose = f" for {self.purpose}" if self.purpose else ""
        people = "person" if self.count == 1 else "people"
        return f"{' or '.join(self.meanings)} by {self.count} {people}{role}{purpose}"


@dataclass(frozen=True)
class Standing:
    """What one signature is worth under a policy.

    Attributes:
        person: whom the policy names for its key, ``None`` where it names nobody.
        counts: whether it counts at all.
        trainer: whether that person trains, or the key is one of the trail's.
        why: one clause: why it does not count; empty where it does.
    """

    person: Person | None
    counts: bool
    trainer: bool
    why: str = ""


@dataclass(frozen=True)
class Finding:
    """Whether one thing that is asked holds.

    Attributes:
        code: ``attested``; ``rejected`` (nobody may have refused); ``attestation-missing`` (the trail knows of one that
            is not here).
        requirement: what was asked, ``None`` for the other two.
        met: whether it holds.
        by: the signatures that count for it, or that speak against it.
        why: one sentence.
    """

    code: str
    requirement: Requirement | None
    met: bool
    by: tuple[Attestation, ...]
    why: str


def seconds_of(time: str) -> int:
    """POSIX seconds of a signature's time; raises `ValueError` where it is not ``YYYY-MM-DDThh:mm:ssZ``."""
    return int(datetime.strptime(time, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp())


def same_words(one: str, other: str) -> bool:
    """Whether two names, roles or purposes are the same but for case, spaces and how their letters are composed."""
    return _plain(one) == _plain(other)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split()).casefold())


def missing_attestations(
    attestations: Iterable[Attestation], known: Iterable[TrailAttestation]
) -> tuple[TrailAttestation, ...]:
    """Those that the trail knows and that are not among a copy's attestations, in the order of the trail."""
    here = {item.digest for item in attestations}
    return tuple(item for item in known if item.payload not in here)


# -- one signature ----------------------------------------------------------------------------------------------------


def _check_people(people: Sequence[Person]) -> dict[str, Person]:
    """The people by key id."""
    found: dict[str, Person] = {}
    for i, person in enumerate(people):
        if any(same_words(person.name, other.name) for other in people[:i]):
            raise ConfigError(
                f"The policy names {person.name} twice.", next_step="Put all keys and roles under one.", code="person"
            )
        for key in person.keys:
            other = found.setdefault(key, person)
            if other is not person:
                raise ConfigError(
                    f"The policy names one key for {other.name} and for {person.name} ({key[:16]}).",
                    next_step="Each person has a key of their own: find out whose it is.",
                    code="person",
                )
    return found


def _trains(person: Person | None, trainers: Collection[str]) -> bool:
    return person is not None and (
        any(same_words(role, TRAINER) for role in person.roles) or any(key in trainers for key in person.keys)
    )


def standing_of(
    attestation: Attestation, people: Sequence[Person], trainers: Collection[str] = (), *, now: float | None = None
) -> Standing:
    """What a signature is worth: whether the policy knows its key, for this name and this role, and its time holds.

    Args:
        attestation: the signature.
        people: whom the policy names.
        trainers: ids of the keys that the training's side holds (`attesting.trail_keys`).
        now: POSIX seconds; ``None`` takes the clock.

    Raises:
        ConfigError: the policy names a person twice, or one key for two.
    """
    person = _check_people(people).get(attestation.key_id)
    trainer = attestation.key_id in trainers or _trains(person, trainers)
    why = _why_not(attestation, person, trainers, clock.time() if now is None else now)
    return Standing(person, not why, trainer, why)


def _why_not(item: Attestation, person: Person | None, trainers: Collection[str], now: float) -> str:
    if item.key_id in trainers:
        return "it is signed with a key of the trail, which the training's process holds, and not with a person's"
    if person is None:
        return "it is signed with a key that the policy does not name"
    if not same_words(person.name, item.name):
        return f"its key is {person.name}'s, and it gives the name {item.name}"
    if not any(same_words(role, item.role) for role in person.roles):
        return f"the policy does not give {person.name} the role {item.role}"
    if seconds_of(item.time) > now + SKEW_SECONDS:
        return "its time lies in the future"
    return item.doubts[0] if item.doubts else ""


# -- all of them ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Word:
    """A signature by somebody whom the policy names."""

    item: Attestation
    person: Person
    standing: Standing


def count_attestations(
    attestations: Sequence[Attestation],
    requirements: Sequence[Requirement],
    people: Sequence[Person],
    trainers: Collection[str] = (),
    *,
    missing: Sequence[TrailAttestation] = (),
    now: float | None = None,
) -> tuple[Finding, ...]:
    """Whether a record's signatures are those that a policy asks for; the rules stand at the top of this module.

    Where people could serve more than one requirement, they are dealt out so that as many places as possible are
    filled; each person fills one.

    Args:
        attestations: a record's, in their order (`attesting.attestations_of`).
        requirements: what is asked, each met by people of its own.
        people: whom the policy names.
        trainers: ids of the keys that the training's side holds (`attesting.trail_keys`).
        missing: what the trail knows of and this copy lacks (`missing_attestations`), where a trail was at hand.
        now: POSIX seconds; ``None`` takes the clock.

    Returns:
        One finding for each requirement in their order, then ``rejected``, then ``attestation-missing`` where any is.

    Raises:
        ConfigError: the policy names a person twice, one key for two, or a requirement asks for what cannot be.
    """
    moment = clock.time() if now is None else now
    for asked in requirements:
        _check_requirement(asked)
    words, strangers = [], []
    for item in sorted(attestations, key=lambda one: one.index):
        standing = standing_of(item, people, trainers, now=moment)
        if standing.person is None:
            strangers.append(item)
        else:
            words.append(_Word(item, standing.person, standing))
    places = [(at, _candidates(asked, words, moment)) for at, asked in enumerate(requirements)]
    filled = _deal([(at, found) for at, found in places for _ in range(requirements[at].count)])
    findings = [
        _finding(asked, [word for place, word in filled if place == at], found, words, strangers, moment)
        for (at, found), asked in zip(places, requirements, strict=True)
    ]
    findings.append(_rejections(words, {asked.purpose for asked in requirements} or {None}))
    if missing:
        findings.append(_missing(missing))
    return tuple(findings)


def _check_requirement(asked: Requirement) -> None:
    possible = set(MEANINGS) - {REJECTED, WITHDRAWN}
    meant = bool(asked.meanings) and possible.issuperset(asked.meanings)
    if not meant or asked.count < 1 or (asked.max_age_days is not None and not asked.max_age_days >= 0):
        raise ConfigError(
            f"A requirement asks for what cannot be met: {asked.in_words}.",
            next_step="Ask for one person or more, for approved, reviewed, responsible or authored, of an age in days.",
            code="requirement",
        )


def _speaks_of(item: Attestation, purpose: str | None) -> bool:
    """Whether a signature decides on this use."""
    return item.purpose is None or (purpose is not None and same_words(item.purpose, purpose))


def _answers(later: _Word, earlier: _Word, purpose: str | None) -> bool:
    """Whether a person's later word takes the place of an earlier one, where ``purpose`` is decided on."""
    if later.item.index <= earlier.item.index or later.person is not earlier.person:
        return False
    if not later.standing.counts and later.item.meaning != REJECTED:
        return False
    mine = earlier.item.purpose
    return _speaks_of(later.item, purpose) or (mine is not None and _speaks_of(later.item, mine))


def _last_words(words: Sequence[_Word], purpose: str | None) -> Iterator[_Word]:
    for word in words:
        if not any(_answers(other, word, purpose) for other in words):
            yield word


def _unmet(asked: Requirement, word: _Word, now: float) -> str:
    """Why somebody's last word does not fill a place; empty where it does."""
    item = word.item
    if item.meaning not in asked.meanings:
        return f"it says {item.meaning}"
    if not word.standing.counts:
        return word.standing.why
    if asked.role is not None and not same_words(asked.role, item.role):
        return f"it is signed as {item.role}"
    if word.standing.trainer and not (asked.role is not None and same_words(asked.role, TRAINER)):
        return f"{word.person.name} trains, and the trainer cannot be the approver"
    if asked.max_age_days is not None and now - seconds_of(item.time) > asked.max_age_days * 86_400:
        return f"it is older than {asked.max_age_days:g} days"
    if asked.in_trail and item.entry is None:
        return "no entry of the trail bears it out"
    return ""


def _candidates(asked: Requirement, words: Sequence[_Word], now: float) -> list[_Word]:
    spoken = [word for word in words if _speaks_of(word.item, asked.purpose)]
    return [word for word in _last_words(spoken, asked.purpose) if not _unmet(asked, word, now)]


def _deal(places: Sequence[tuple[int, list[_Word]]]) -> list[tuple[int, _Word]]:
    """As many places as possible filled, each by another person (augmenting paths)."""
    holds: dict[str, tuple[int, _Word]] = {}

    def fill(at: int, tried: set[str]) -> bool:
        for word in places[at][1]:
            name = word.person.name
            if name in tried:
                continue
            tried.add(name)
            if name not in holds or fill(holds[name][0], tried):
                holds[name] = (at, word)
                return True
        return False

    for at in range(len(places)):
        fill(at, set())
    return [(places[at][0], word) for at, word in holds.values()]


def _finding(
    asked: Requirement,
    filled: Sequence[_Word],
    found: Sequence[_Word],
    words: Sequence[_Word],
    strangers: Sequence[Attestation],
    now: float,
) -> Finding:
    by = tuple(word.item for word in sorted(filled, key=lambda word: word.item.index))
    if len(by) >= asked.count:
        return Finding("attested", asked, True, by, f"It is {'; '.join(item.in_words for item in by)}.")
    others = [f"{word.person.name} is counted for another requirement" for word in found if word not in filled]
    for word in words:
        if word in found:
            continue
        why = _unmet(asked, word, now) or (
            f"it is for {word.item.purpose} alone"
            if not _speaks_of(word.item, asked.purpose)
            else "the same person said something else later"
        )
        others.append(f"{word.person.name}'s signature does not count: {why}")
    others += [f"the signature under the name {item.name} does not count: {_STRANGE}" for item in strangers]
    told = f" ({'; '.join(dict.fromkeys(others))})" if others else ""
    return Finding(
        "attested", asked, False, by, f"Asked is {asked.in_words}; {len(by) or 'none'} of {asked.count} is here{told}."
    )


_STRANGE = "it is signed with a key that the policy does not name"


def _rejections(words: Sequence[_Word], purposes: Collection[str | None]) -> Finding:
    standing: dict[int, Attestation] = {}
    for purpose in purposes:
        # Where any use is decided on, a rejection for one use speaks of it as well.
        spoken = [word for word in words if purpose is None or _speaks_of(word.item, purpose)]
        for word in _last_words(spoken, purpose):
            if word.item.meaning == REJECTED:
                standing[word.item.index] = word.item
    by = tuple(standing[index] for index in sorted(standing))
    if not by:
        return Finding("rejected", None, True, (), "Nobody whom the policy names has rejected it and left it at that.")
    return Finding("rejected", None, False, by, f"It is {'; '.join(item.in_words for item in by)}.")


def _missing(missing: Sequence[TrailAttestation]) -> Finding:
    told = "; ".join(f"entry {item.index}: {item.meaning} as {item.role}" for item in missing)
    what = "an attestation" if len(missing) == 1 else f"{len(missing)} attestations"
    return Finding(
        "attestation-missing", None, False, (), f"The trail knows {what} that this copy of the record lacks ({told})."
    )
