"""Tokens in the place of annotators: a fresh one in every table, whose meaning only the vault can tell. Floor 2.

A data scientist wants to see how each annotator works; nobody needs a name for that. `tabulate_annotators` gives one
row a person under a token of this table alone:

    token = table "-" base32(HMAC-SHA256(secret of the table, key of the opening of her first annotation))

The secret is drawn for the table and sealed in the vault by an ``annotators.tabulated`` entry; the key lies in the
vault under her own key. So the same person has another token in every table; who has the table alone, or several,
cannot link or undo them, nor try names; and with her key an erasure takes away what her tokens could be told from.

`reidentify` is the only way back. It writes ``vault.reidentified`` (who asked, why; neither token nor id) and answers
when that is durable, never before.

A table is about single persons: for whoever holds the vault. What may be passed on is `k_anonymity`'s; and where the
trail keeps a privacy budget, nothing: statistics of protected data would be outside of what the budget bounds.
"""

from __future__ import annotations

import base64
import hmac
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from rlhf_audit_nb.errors import ConfigError, PrivacyError, VaultError
from rlhf_audit_nb.events import (
    Annotation,
    AnnotationRecorded,
    AnnotatorReidentified,
    AnnotatorsKey,
    AnnotatorsTabulated,
    BudgetSet,
    LabelsReleased,
    PrivacyPopulation,
    PrivacyReserved,
    SlotsReserved,
    decode_body,
    decode_private,
    encode_body,
    encode_private,
)
from rlhf_audit_nb.privacy.k_anonymity import LEAST_K, ReleasedStatistics, check_k, release

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import Entry, Half, Trail, TrailReader

__all__ = ["AnnotatorRow", "AnnotatorTable", "reidentify", "tabulate_annotators"]

NOT_FOR_RELEASE = (
    "This trail keeps a privacy budget: figures about its annotators' data are outside of what the budget bounds."
)
_BUDGETED = (
    PrivacyReserved.TYPE,
    BudgetSet.TYPE,
    PrivacyPopulation.TYPE,
    LabelsReleased.TYPE,
    SlotsReserved.TYPE,
)
_TABLE_LETTERS = 8
_TOKEN_BYTES = 10
_LONGEST = 500
_FIGURES = ("agreement", "first_shown", "ties", "undecided", "rating")


@dataclass(frozen=True, kw_only=True)
class AnnotatorRow:
    """One person, under a token of one table; for whoever holds the vault.

    Attributes:
        token: what stands for her in this table.
        annotations: how many she gave.
        comparisons: how many of them compare responses.
        agreement: over comparisons that others made as well, the mean share of them who chose as she did.
        first_shown: of her choices whose order is known, the share that fell on the response shown first.
        ties: the share of her comparisons that are ties.
        undecided: the share of her comparisons that are undecided.
        rating: her mean rating of single responses.
    """

    token: str
    annotations: int
    comparisons: int
    agreement: float | None
    first_shown: float | None
    ties: float | None
    undecided: float | None
    rating: float | None


@dataclass(frozen=True, kw_only=True)
class AnnotatorTable:
    """The table of one call. It shows no row by itself: a notebook is passed on with all that it showed.

    Attributes:
        table: its name, with which every token begins.
        import_id: the import that it is about; ``None`` for all.
        entry: the entry of the trail that says that it was made.
        rows: one a person, sorted by token.
        erased: how many annotations are of erased annotators, and in no row.
        missing: how many cannot be opened, and are in no row.
        unknown: how many have no annotator, and are in no row.
        budgeted: whether the trail keeps a privacy budget: then nothing of it may be passed on.
    """

    table: str
    import_id: str | None
    entry: int
    rows: tuple[AnnotatorRow, ...]
    erased: int
    missing: int
    unknown: int
    budgeted: bool

    def release(self, k: int = LEAST_K) -> ReleasedStatistics:
        """What may be passed on: statistics none of which is about fewer than ``k`` annotators.

        Raises:
            ConfigError: ``k`` is no whole number of at least 2.
            PrivacyError: code ``not-for-release``: the trail keeps a privacy budget.
        """
        check_k(k)
        if self.budgeted:
            raise PrivacyError(
                f"Statistics about annotators are not released from this trail. {NOT_FOR_RELEASE}",
                next_step="Look at the rows yourself, with the vault (--open, or .rows), and pass none of it on.",
                code="not-for-release",
            )
        figures = {name: [getattr(row, name) for row in self.rows] for name in _FIGURES}
        return release([row.annotations for row in self.rows], figures, k)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, the rows too: not for release."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"<table {self.table} of annotators, entry {self.entry}; not for release but for .release(k)>"


@dataclass
class _Person:
    """What is known of one person while the table is drawn up."""

    key: bytes
    made: list[Annotation] = field(default_factory=list)


@dataclass
class _Opened:
    """The annotations of a trail by person; ``people`` by the id that only this process sees."""

    people: dict[str, _Person] = field(default_factory=dict)
    erased: int = 0
    missing: int = 0
    unknown: int = 0


def tabulate_annotators(trail: Trail, *, import_id: str | None = None) -> AnnotatorTable:
    """A table of the annotators of ``trail`` under fresh tokens; that it was made is written into the trail first.

    Args:
        trail: the trail, open.
        import_id: only annotations of this import.

    Raises:
        ConfigError: there is no such import.
        VaultError: the vault does not open with this trail's key.
        StoreError: the entry could not be appended.
    """
    trail.flush()
    reader = trail.reader()
    opened = _open_all(trail, reader, import_id, reader.size)
    if import_id is not None and not _any(reader, import_id):
        raise ConfigError(
            f"No import {import_id} is in this trail.",
            next_step="rlhf-audit annotations show lists them all.",
            code="import",
        )
    table, secret = uuid.uuid4().hex, os.urandom(32)
    event = AnnotatorsTabulated(table=table, size=reader.size, import_id=import_id)
    private = encode_private(AnnotatorsKey(secret=secret.hex()))
    entry = trail.append(event.TYPE, encode_body(event), private=private).wait()
    agreements = _agreements(opened.people)
    rows = [_row(_token(table, secret, one.key), one, agreements.get(name)) for name, one in opened.people.items()]
    return AnnotatorTable(
        table=table[:_TABLE_LETTERS],
        import_id=import_id,
        entry=entry,
        rows=tuple(sorted(rows, key=lambda row: row.token)),
        erased=opened.erased,
        missing=opened.missing,
        unknown=opened.unknown,
        budgeted=any(True for kind in _BUDGETED for _ in reader.entries(type=kind)),
    )


def reidentify(trail: Trail, token: str, *, reason: str, by: str) -> str:
    """Whose a token is. The trail says who asked and why before the answer is given; where it cannot, there is none.

    Args:
        trail: the trail, open.
        token: from a table of this trail.
        reason: why, in one line that stands in the open.
        by: who asks, as they are to be named in the open.

    Returns:
        The annotator's id.

    Raises:
        ConfigError: no reason or no name.
        VaultError: ``unknown-token``: no table of this trail has it, or she was erased; nothing was written.
            ``vault-key``: the vault does not open.
        StoreError: the entry could not be appended; nothing is told.
    """
    said = {"reason": _one_line("reason", reason), "by": _one_line("by", by)}
    trail.flush()
    reader = trail.reader()
    for entry, event in _tables(reader, token):
        found = _owner_of(trail, reader, entry, event, token)
        if found is not None:
            asked = AnnotatorReidentified(table=event.table, **said)
            trail.append(asked.TYPE, encode_body(asked)).wait()  # durable before anybody is told
            return found
    raise VaultError(
        "No annotator in the vault has this token: no table of this trail has it, or its annotator was erased.",
        next_step="Check how the token is written; nothing was told, and nothing was written.",
        code="unknown-token",
    )


def _tables(reader: TrailReader, token: str) -> Iterator[tuple[Entry, AnnotatorsTabulated]]:
    for entry in reader.entries(type=AnnotatorsTabulated.TYPE):
        event = decode_body(entry.type, entry.body)
        assert isinstance(event, AnnotatorsTabulated)  # for the type checker; decode_body checked it
        if token.partition("-")[0] == event.table[:_TABLE_LETTERS]:
            yield entry, event


def _owner_of(trail: Trail, reader: TrailReader, entry: Entry, event: AnnotatorsTabulated, token: str) -> str | None:
    with trail.reading_vault() as vault:
        payload = vault.opening(
            entry.type, entry.stream, entry.seq, base64.b64decode(entry.envelope.sealed or "")
        ).payload
    half = decode_private(entry.type, payload)
    assert isinstance(half, AnnotatorsKey)  # for the type checker; decode_private checked it
    secret = bytes.fromhex(half.secret)
    for name, person in _open_all(trail, reader, event.import_id, event.size).people.items():
        if hmac.compare_digest(_token(event.table, secret, person.key).encode(), token.encode()):
            return name
    return None


def _open_all(trail: Trail, reader: TrailReader, import_id: str | None, size: int) -> _Opened:
    """The first ``size`` entries' annotations, by who gave them."""
    opened = _Opened()
    with trail.reading_vault() as vault:
        for entry in reader.entries(0, size, type=AnnotationRecorded.TYPE):
            event = decode_body(entry.type, entry.body)
            assert isinstance(event, AnnotationRecorded)  # for the type checker; decode_body checked it
            if import_id in (None, event.import_id):
                _take(opened, vault.half(entry))
    return opened


def _take(opened: _Opened, found: Half) -> None:
    if found.opening is None:
        opened.erased += found.state == "erased"
        opened.missing += found.state == "missing"
        return
    half = decode_private(AnnotationRecorded.TYPE, found.opening.payload)
    assert isinstance(half, Annotation)  # for the type checker; decode_private checked it
    if half.annotator is None:
        opened.unknown += 1
        return
    opened.people.setdefault(half.annotator, _Person(found.opening.key)).made.append(half)


def _any(reader: TrailReader, import_id: str) -> bool:
    entries = reader.entries(type="annotations.imported")
    return any(getattr(decode_body(entry.type, entry.body), "import_id", None) == import_id for entry in entries)


def _token(table: str, secret: bytes, key: bytes) -> str:
    code = hmac.digest(secret, b"rlhf-audit/annotator-token/v1\0" + key, "sha256")[:_TOKEN_BYTES]
    return f"{table[:_TABLE_LETTERS]}-{base64.b32encode(code).decode().lower()}"


def _row(token: str, person: _Person, agreement: float | None) -> AnnotatorRow:
    made = person.made
    comparisons = [item for item in made if item.choice is not None]
    ordered = [item.choice == item.shown[0] for item in comparisons if isinstance(item.choice, int) and item.shown]
    ratings = [float(item.reward) for item in made if isinstance(item.reward, int | float) and item.choice is None]
    return AnnotatorRow(
        token=token,
        annotations=len(made),
        comparisons=len(comparisons),
        agreement=agreement,
        first_shown=_share(sum(ordered), len(ordered)),
        ties=_share(sum(item.choice == "tie" for item in comparisons), len(comparisons)),
        undecided=_share(sum(item.choice == "undecided" for item in comparisons), len(comparisons)),
        rating=sum(ratings) / len(ratings) if ratings else None,
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _agreements(people: dict[str, _Person]) -> dict[str, float]:
    """For each person, over what others compared as well, the mean share of the others who chose as she did."""
    chosen: dict[bytes, dict[str, bytes]] = {}
    for name, person in people.items():
        for item in person.made:
            if isinstance(item.choice, int):
                chosen.setdefault(_item(item), {})[name] = msgspec.json.encode(item.responses[item.choice])
    shares: dict[str, list[float]] = {}
    for votes in chosen.values():
        counts: dict[bytes, int] = {}
        for vote in votes.values():
            counts[vote] = counts.get(vote, 0) + 1
        if len(votes) > 1:
            for name, vote in votes.items():
                shares.setdefault(name, []).append((counts[vote] - 1) / (len(votes) - 1))
    return {name: sum(found) / len(found) for name, found in shares.items()}


def _item(annotation: Annotation) -> bytes:
    """What was compared, in whatever order."""
    return msgspec.json.encode(
        [annotation.prompt, sorted(msgspec.json.encode(response).decode() for response in annotation.responses)]
    )


def _one_line(name: str, text: str) -> str:
    said = text.strip() if isinstance(text, str) else ""
    if not said or len(said) > _LONGEST or not said.isprintable():
        found = "empty" if not said else "too long" if len(said) > _LONGEST else "not one line of text"
        raise ConfigError(
            f"{name} is {found}; whose a token is is told with a reason and a name, which stand in the trail.",
            next_step=f'Write {name}="...", one line of at most {_LONGEST} characters.',
            code=name,
        )
    return said
