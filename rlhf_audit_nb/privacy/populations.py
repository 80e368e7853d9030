"""Populations: who was on a roster, and whether two rosters share anybody. Floor 2.

Two data sets are composed in parallel, each with the whole budget, only where their annotators are proven disjoint.
The proof stands in the trail. Once for each roster that is new, before the first training on it reserves anything, a
``privacy.population`` entry commits to the roster's *tags*: HMAC-SHA256 of each annotator's id under a secret of this
trail (``privacy.population-key``), cut to 16 bytes. The tags and the secret lie in the vault. Whoever is shown the
openings of two populations sees that no tag is in both (`compare_rosters`) and learns no id from them; whoever is
shown the secret as well can make the tags of any id again.

What is not shown is not proven: a population whose opening was erased, is missing, or cannot be read, a roster whose
tags were made with another secret, a spend that names no population. Each of these counts as sharing somebody with
every other.

Ids are compared in one form (`canonical`), which rather takes two people for one than one for two: case, spaces,
punctuation, leading zeros and the difference between a number and its text do not count. That one person has the same
id in two data sets is assumed; no tag can show that two different names are one person's.
"""

from __future__ import annotations

import hmac
import re
import secrets
import unicodedata
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.errors import EntryError, PrivacyError, VaultError
from rlhf_audit_nb.events import (
    PopulationKey,
    PopulationRoster,
    PopulationSecret,
    PrivacyPopulation,
    decode_body,
    decode_private,
    encode_body,
    encode_private,
)

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import Trail, TrailReader, TrustPolicy, Verdict
    from rlhf_audit_nb.trail.entry import Entry
    from rlhf_audit_nb.trail.vault_key import MasterKey

__all__ = [
    "NOTHING_KNOWN",
    "Population",
    "Registry",
    "Relation",
    "Roster",
    "VaultAt",
    "canonical",
    "check_relations",
    "compare_rosters",
    "disclosed_population",
    "read_registry",
    "record_population",
    "tags_of",
]

KEY_BYTES = 32
TAG_BYTES = 16
MOST_RELATIONS = 1_000
"""How many earlier populations an entry names as disjoint at most, the newest; it has no room for many more."""

_TAG_HEX = 2 * TAG_BYTES
_TRIES = 64
_WHOLE = re.compile(r"[+-]?\d+(\.0*)?")
_WITH_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?e[+-]?\d{1,2}")
_HEX = re.compile(r"[0-9a-f]*")


# --- ids and tags ----------------------------------------------------------------------------------------------------


def canonical(identity: str | float) -> str:
    """The form in which ids are compared: what may be the same person's must come out the same.

    ``1``, ``1.0``, ``"01"`` and ``"1e0"`` are one id; so are ``"W-1"``, ``"w1"`` and ``" w01 "``, and what Unicode's
    NFKC makes equal. An id of punctuation alone stays as it is.
    """
    text = str(identity)
    if isinstance(identity, float) and identity.is_integer():
        text = str(int(identity))
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).strip()
    if _WITH_EXPONENT.fullmatch(folded):  # how some programs write large numbers
        folded = format(Decimal(folded), "f")
    if _WHOLE.fullmatch(folded):
        folded = folded.partition(".")[0]
    kept = "".join(letter for letter in folded if letter.isalnum()) or folded
    return re.sub(r"(?<!\d)0+(?=\d)", "", kept)


def tags_of(key: bytes, names: Iterable[str]) -> frozenset[bytes]:
    """The tags of ids that are in their canonical form: 16 bytes each."""
    return frozenset(
        hmac.digest(key, b"rlhf-audit/population-tag/v1\0" + name.encode(errors="surrogatepass"), "sha256")[:TAG_BYTES]
        for name in names
    )


def _key_id(key: bytes) -> str:
    return hmac.digest(key, b"rlhf-audit/population-key/v1", "sha256")[:TAG_BYTES].hex()


@dataclass(frozen=True, slots=True)
class Roster:
    """The annotators of one data set, in memory only.

    Attributes:
        units: how many there are, as the accounting counts them.
        names: their ids in the canonical form; never shown.
    """

    units: int
    names: frozenset[str] = field(repr=False)

    @classmethod
    def of(cls, ids: Iterable[str | float], units: int) -> Roster:
        """The roster of a data set from the id of each row."""
        return cls(units, frozenset(map(canonical, set(ids))))


# --- what the trail and its vault show -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Population:
    """A roster that the trail has recorded.

    Attributes:
        id: its name, random.
        index: the entry that recorded it.
        units: how many annotators are on it.
        key_id: which secret its tags were made with.
        said_disjoint: the earlier populations that the entry says share nobody with it.
        tags: the tags; ``None`` where they cannot be shown.
        state: ``open``, ``erased``, ``missing``, ``wrong`` (the opening is not the entry's), or ``closed`` where the
            vault or its key is not at hand.
    """

    id: str
    index: int
    units: int
    key_id: str
    said_disjoint: frozenset[str]
    tags: frozenset[bytes] | None = field(default=None, repr=False)
    state: str = "closed"


@dataclass(frozen=True, slots=True)
class Registry:
    """All populations of a trail, as far as they can be shown.

    Attributes:
        populations: by their id, in the order of their entries.
        key: the secret of the newest key entry; ``None`` where there is none, or it does not open.
        key_entries: how many key entries there are.
    """

    populations: Mapping[str, Population] = field(default_factory=dict)
    key: bytes | None = field(default=None, repr=False)
    key_entries: int = 0

    def tags(self, roster: Roster) -> frozenset[bytes] | None:
        """The tags of a roster; ``None`` where there is no secret to make them with."""
        return None if self.key is None else tags_of(self.key, roster.names)

    def find(self, roster: Roster) -> Population | None:
        """The population that has exactly this roster."""
        tags = self.tags(roster)
        if tags is None or self.key is None:
            return None
        name = _key_id(self.key)
        return next((one for one in self.populations.values() if one.tags == tags and one.key_id == name), None)

    def sharing(self, populations: Iterable[str | None], roster: Roster | None) -> frozenset[str | None]:
        """Those of ``populations`` that may share an annotator with ``roster``; all of them where it is not known."""
        asked = frozenset(populations)
        tags = None if roster is None else self.tags(roster)
        if tags is None or self.key is None:
            return asked
        name = _key_id(self.key)
        apart = {
            one.id
            for one in self.populations.values()
            if one.tags is not None and one.key_id == name and one.tags.isdisjoint(tags)
        }
        return asked - apart

    def can_tell_apart(self, populations: Iterable[str | None]) -> bool:
        """Whether a roster could be proven to share nobody with any of these."""
        if self.key is None:
            return False
        asked = [self.populations.get(name) if name is not None else None for name in populations]
        name = _key_id(self.key)
        return all(one is not None and one.tags is not None and one.key_id == name for one in asked)

    def groups(self, populations: Iterable[str | None]) -> tuple[frozenset[str | None], ...]:
        """``populations`` in groups of which no two share anybody, in the order of their first entries.

        Whoever shares somebody with one of a group belongs to it, so a roster that meets two of them makes them one.
        """
        asked = list(dict.fromkeys(populations))
        shown = [one for name in asked if name is not None and (one := self.populations.get(name)) is not None]
        tagged = [one for one in shown if one.tags is not None]
        if len(tagged) < len(asked) or len({one.key_id for one in tagged}) > 1:
            return (frozenset(asked),) if asked else ()
        return _joined(tagged)


NOTHING_KNOWN = Registry()
"""What is known without the vault: nothing, so that every population counts as sharing somebody with every other."""


def _joined(populations: Sequence[Population]) -> tuple[frozenset[str | None], ...]:
    """Populations that share a tag, directly or over others, together."""
    parent = {one.id: one.id for one in populations}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    first: dict[bytes, str] = {}
    for one in populations:
        for tag in one.tags or ():
            other = first.setdefault(tag, one.id)
            if other != one.id:
                parent[root(one.id)] = root(other)
    found: dict[str, set[str | None]] = {}
    for one in populations:
        found.setdefault(root(one.id), set()).add(one.id)
    return tuple(map(frozenset, found.values()))


@dataclass(frozen=True, slots=True)
class VaultAt:
    """Where the vault of a trail lies, and the key that opens it: for who reads and has not opened the trail."""

    path: Path
    master: MasterKey

    @classmethod
    def of(cls, trail: Trail) -> VaultAt:
        """That of an open trail."""
        return cls(trail.vault.path, trail.keys.master)

    @classmethod
    def beside(cls, location: Path, reader: TrailReader, home: Path | None = None) -> VaultAt | None:
        """That of the trail in the folder ``location``; ``None`` where its keys are not here, or are locked."""
        from rlhf_audit_nb.errors import KeyFileError
        from rlhf_audit_nb.trail.checkpoint import checkpoint_of
        from rlhf_audit_nb.trail.keys import home_folder, load_keys

        try:
            keys = load_keys(home_folder(home), checkpoint_of(reader.checkpoint()).origin)
        except KeyFileError:
            return None
        return cls(location / "vault.sqlite", keys.master)


def read_registry(reader: TrailReader, vault: VaultAt | None = None) -> Registry:
    """The populations of a trail, with the tags of those whose openings are in its vault.

    Without ``vault`` nothing is opened, and nothing is proven.

    Raises:
        PrivacyError: two entries name one population.
        EntryError: an entry is malformed.
    """
    recorded = list(reader.entries(type=PrivacyPopulation.TYPE))
    keys = list(reader.entries(type=PopulationKey.TYPE))
    with closing(_Opener(vault)) as opener:
        found: dict[str, Population] = {}
        for entry in recorded:
            population = _population(entry, opener)
            if population.id in found:
                raise PrivacyError(f"Population {population.id} stands twice in the trail.", code="ledger")
            found[population.id] = population
        return Registry(found, _secret(keys[-1], opener) if keys else None, len(keys))


class _Opener:
    """Private halves from the vault of a trail, or none."""

    def __init__(self, vault: VaultAt | None) -> None:
        self._vault: Any = None
        if vault is not None:
            from rlhf_audit_nb.trail import Vault

            self._vault = Vault(vault.path, vault.master)

    def payload(self, entry: Entry) -> tuple[bytes | None, str]:
        """The private half of ``entry``, and ``open`` or why there is none."""
        if self._vault is None:
            return None, "closed"
        try:
            half = self._vault.half(entry)
        except VaultError as error:
            return None, "wrong" if error.reason == "opening-wrong" else "closed"
        return half.payload, half.state

    def close(self) -> None:
        if self._vault is not None:
            self._vault.close()


def _population(entry: Entry, opener: _Opener | _Shown) -> Population:
    said = decode_body(entry.type, entry.body)
    assert isinstance(said, PrivacyPopulation)  # for the type checker; decode_body checked it
    payload, state = opener.payload(entry)
    tags = None if payload is None else _tags_in(said, payload)
    return Population(
        id=said.population,
        index=entry.index,
        units=said.units,
        key_id=said.key_id,
        said_disjoint=frozenset(said.disjoint_from),
        tags=tags,
        state="wrong" if tags is None and state == "open" else state,
    )


def _tags_in(said: PrivacyPopulation, payload: bytes) -> frozenset[bytes] | None:
    """The tags of a private half; ``None`` where it is not the roster that the entry says."""
    try:
        roster = decode_private(PrivacyPopulation.TYPE, payload)
    except EntryError:
        return None
    assert isinstance(roster, PopulationRoster)  # for the type checker; decode_private checked it
    count, rest = divmod(len(roster.tags), _TAG_HEX)
    if roster.key_id != said.key_id or rest or not 0 < count <= said.units or not _HEX.fullmatch(roster.tags):
        return None
    tags = [roster.tags[at : at + _TAG_HEX] for at in range(0, len(roster.tags), _TAG_HEX)]
    return frozenset(map(bytes.fromhex, tags)) if tags == sorted(set(tags)) else None


def _secret(entry: Entry, opener: _Opener) -> bytes | None:
    said = decode_body(entry.type, entry.body)
    payload, _ = opener.payload(entry)
    if payload is None:
        return None
    try:
        secret = decode_private(entry.type, payload)
        assert isinstance(secret, PopulationSecret)  # for the type checker; decode_private checked it
        key = bytes.fromhex(secret.key)
    except (EntryError, ValueError):
        return None
    assert isinstance(said, PopulationKey)  # for the type checker; decode_body checked it
    return key if len(key) == KEY_BYTES and _key_id(key) == said.key_id else None


# --- checking --------------------------------------------------------------------------------------------------------

DISJOINT, SHARES, NOT_PROVEN = "disjoint", "shares", "not proven"


@dataclass(frozen=True, slots=True)
class Relation:
    """What is known of two populations.

    Attributes:
        one: the later population.
        other: the earlier one.
        said: whether the later one's entry says that they share nobody.
        found: ``disjoint``, ``shares``, or ``not proven`` where the tags of one cannot be shown.
    """

    one: str
    other: str
    said: bool
    found: str

    @property
    def contradicted(self) -> bool:
        """Whether the entry says that they share nobody, and the tags show that they do."""
        return self.said and self.found == SHARES


def compare_rosters(one: Population, other: Population) -> str:
    """``disjoint`` or ``shares``, as the tags show; ``not proven`` where they cannot be compared."""
    if one.tags is None or other.tags is None or one.key_id != other.key_id:
        return NOT_PROVEN
    return DISJOINT if one.tags.isdisjoint(other.tags) else SHARES


def check_relations(registry: Registry) -> tuple[Relation, ...]:
    """Every two populations of a trail, compared anew."""
    found = list(registry.populations.values())
    return tuple(
        Relation(one.id, other.id, other.id in one.said_disjoint, compare_rosters(one, other))
        for at, one in enumerate(found)
        for other in found[:at]
    )


def disclosed_population(path: Path | str, *, policy: TrustPolicy | None = None) -> tuple[Verdict, Population]:
    """The population in a disclosure file, checked with nothing but the file and a policy.

    Returns:
        The verdict on the checkpoint that it rests on, and the population: without tags where anything does not hold.

    Raises:
        PrivacyError: code ``not-a-population``: the file discloses another kind of entry.
        AuditError: the file cannot be read, or is no disclosure.
    """
    from rlhf_audit_nb.trail.disclosure import parse_disclosure, verify_disclosure
    from rlhf_audit_nb.trail.entry import Entry
    from rlhf_audit_nb.trail.proof import parse_proof

    verdict, payload = verify_disclosure(path, policy=policy)
    disclosure = parse_disclosure(Path(path).read_bytes())
    entry = Entry.decode(parse_proof(disclosure.proof).index, disclosure.entry.encode())
    if entry.type != PrivacyPopulation.TYPE:
        raise PrivacyError(
            f"{Path(path).name} discloses an entry of type {entry.type}, not a population.",
            next_step="Disclose the privacy.population entries: rlhf-audit budget check names them.",
            code="not-a-population",
        )
    return verdict, _population(entry, _Shown(payload))


class _Shown:
    """The private half that a disclosure shows, if it holds."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload

    def payload(self, entry: Entry) -> tuple[bytes | None, str]:
        del entry
        return (self._payload, "open") if self._payload else (None, "wrong")


# --- recording -------------------------------------------------------------------------------------------------------


class _MovedError(Exception):
    """Another process recorded a population or a key meanwhile."""


def record_population(trail: Trail, roster: Roster, *, resolution_us: int = 1) -> str | None:
    """The id of the population that has this roster; it is recorded where it is new.

    Returns:
        The id; ``None`` where the vault does not give back the secret that was just put into it, so that nothing could
        be proven of any roster.

    Raises:
        PrivacyError: code ``reservation-race``: others recorded theirs each time.
        StoreError: an append failed.
    """
    made_key = False
    for _ in range(_TRIES):
        registry = read_registry(trail.reader(), VaultAt.of(trail))
        known = registry.find(roster)
        if known is not None:
            return known.id
        try:
            if registry.key is None:
                if made_key:
                    return None
                _record_key(trail, registry, resolution_us)
                made_key = True
            else:
                return _record_roster(trail, registry, registry.key, roster, resolution_us)
        except _MovedError:
            continue
    raise PrivacyError(
        f"Other runs recorded their annotators on this trail {_TRIES} times while this one tried; nothing was trained.",
        next_step="Start the run again when the others have begun.",
        code="reservation-race",
    )


def _record_key(trail: Trail, registry: Registry, resolution_us: int) -> None:
    key = secrets.token_bytes(KEY_BYTES)

    def body(reader: TrailReader) -> bytes:
        if sum(1 for _ in reader.entries(type=PopulationKey.TYPE)) != registry.key_entries:
            raise _MovedError
        return encode_body(PopulationKey(key_id=_key_id(key)))

    private = encode_private(PopulationSecret(key=key.hex()))
    trail.append_guarded(PopulationKey.TYPE, body, private=private, resolution_us=resolution_us)


def _record_roster(trail: Trail, registry: Registry, key: bytes, roster: Roster, resolution_us: int) -> str:
    name, tags = uuid.uuid4().hex, tags_of(key, roster.names)
    apart = [one for one in registry.populations if one not in registry.sharing(registry.populations, roster)]

    def body(reader: TrailReader) -> bytes:
        if sum(1 for _ in reader.entries(type=PrivacyPopulation.TYPE)) != len(registry.populations):
            raise _MovedError  # what it says of the others must be of all that stand before it
        return encode_body(
            PrivacyPopulation(
                population=name, units=roster.units, key_id=_key_id(key), disjoint_from=apart[-MOST_RELATIONS:]
            )
        )

    half = PopulationRoster(key_id=_key_id(key), tags="".join(sorted(tag.hex() for tag in tags)))
    trail.append_guarded(PrivacyPopulation.TYPE, body, private=encode_private(half), resolution_us=resolution_us)
    return name
