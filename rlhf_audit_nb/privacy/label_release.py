"""Releasing labels: charged in one guarded append, and only then drawn into rows that anybody sees. Floor 2.

The order is what makes the ledger true. The seed is drawn, the entry ``privacy.labels`` that charges the release is
durable (with the seed in the vault, where it is kept), and only then are the noisy rows handed out. Of any number of
releases that race for the last of a budget as many are charged as fit: what a release adds is worked out on the
releases that the trail holds within the append's own transaction.

What releases together cost a label: the epsilons of all that hold it add up, exactly. Which ones hold it is told by the
row tags in the vault; a release whose tags cannot be read there counts for every label.
"""

from __future__ import annotations

import base64
import math
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from rlhf_audit_nb.errors import BudgetExceededError, PrivacyError
from rlhf_audit_nb.events import (
    LabelsReleased,
    LabelsSealed,
    LabelsWritten,
    decode_body,
    decode_private,
    encode_body,
    encode_private,
    number,
)
from rlhf_audit_nb.privacy.labels import (
    TAG_BYTES,
    LabelRows,
    check_epsilon,
    draw,
    flip_chance,
    new_key,
    row_tags,
)
from rlhf_audit_nb.privacy.randomised_response import label_epsilon
from rlhf_audit_nb.privacy.replay import refuse_release
from rlhf_audit_nb.privacy.reservation import RACES, read_ledger
from rlhf_audit_nb.privacy.sampling import SealedRandom

if TYPE_CHECKING:
    from rlhf_audit_nb.config import PrivacyConfig
    from rlhf_audit_nb.privacy.ledger import LabelSpend, Ledger
    from rlhf_audit_nb.trail import Trail, TrailReader, Vault

__all__ = [
    "ADJACENCY",
    "GENERATOR",
    "MECHANISM",
    "NOT_PROTECTED",
    "Drawn",
    "Opened",
    "check_request",
    "heaviest_label",
    "open_releases",
    "release_labels",
    "release_owner",
    "written_event",
]

MECHANISM = "randomised response on the preference bit"
ADJACENCY = "replace one label: neighbouring data sets differ in one preference bit; the roster of labels is public"
GENERATOR = "AES-256-CTR keyed by HMAC-SHA256, 53-bit uniforms, one a label"
NOT_PROTECTED = ("the texts", "who annotated, and how much", "several labels of one annotator together")
_TIE = 1 + 1e-12  # ten times 0.1 is a budget of 1
_DELTA = 1e-9
"""Where another accountant is asked for the total: so small that it must come close to the pure bound."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A release that is charged: the noisy rows as columns, its entry, and the event that stands there."""

    rows: Mapping[str, list[Any]]
    index: int
    event: LabelsReleased


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What the vault says of a release: the key of its check values, and its row tags under ``tag_key``."""

    check_key: bytes
    tag_key: bytes
    tags: tuple[bytes, ...]


def release_owner(release: str) -> str:
    """Whose the private half of a release is in the vault: erasing that one makes its flips irreversible."""
    return f"labels:{release}"


def release_labels(
    trail: Trail,
    rows: LabelRows,
    epsilon: float,
    *,
    config: PrivacyConfig | None = None,
    keep_seed: bool = True,
    original: str | None = None,
) -> Drawn:
    """Charge a release of ``rows`` to the trail, and draw it.

    Args:
        trail: the labels' trail.
        rows: the labels, with their texts.
        epsilon: what it costs each label.
        config: its ``epsilon`` is what a label may cost altogether; without it the trail's budget, else what the last
            release was made under, else ``epsilon``.
        keep_seed: whether seed and ``original`` go to the vault; without them the flips can never be undone.
        original: the digest of the source, for the vault.

    Raises:
        BudgetExceededError: it would cost a label more than the budget; nothing was drawn and nothing appended.
        PrivacyError: an epsilon that cannot be used, a trail that counts another unit, or one of a replay.
        StoreError: the append failed.
    """
    epsilon = check_request(epsilon, config)
    refuse_release(trail.reader())
    _check_alone(read_ledger(trail.reader()), epsilon, config)
    release, check_key, randomness = uuid.uuid4().hex, new_key(), SealedRandom.from_system()
    for _ in range(RACES):
        ledger, opened = open_releases(trail)
        tag_key = next((one.tag_key for one in reversed(opened) if one is not None), None) or new_key()
        own = Opened(check_key=check_key, tag_key=tag_key, tags=tuple(row_tags(rows, tag_key)))
        sealed = LabelsSealed(
            check_key=check_key.hex(),
            tag_key=tag_key.hex(),
            tags=base64.b64encode(b"".join(own.tags)).decode(),
            seed=randomness.seed.hex() if keep_seed else None,
            original=original if keep_seed else None,
        )
        cost = _cost(ledger, opened, epsilon, own)
        event = _event(release, rows, epsilon, cost, keep_seed=keep_seed)

        def body(
            reader: TrailReader, event: LabelsReleased = event, before: tuple[LabelSpend, ...] = ledger.releases
        ) -> bytes:
            now = read_ledger(reader)
            limit = _check_alone(now, epsilon, config)
            if now.releases != before:
                raise _ReleasesMovedError
            _check_total(event, limit)
            return encode_body(msgspec.structs.replace(event, epsilon_budget=limit))

        try:
            entry = trail.append_guarded(
                LabelsReleased.TYPE, body, private=encode_private(sealed), owner=release_owner(release)
            )
        except _ReleasesMovedError:
            continue
        released = decode_body(entry.type, entry.body)
        assert isinstance(released, LabelsReleased)  # for the type checker; it was just encoded
        drawn = draw(rows, epsilon, randomness, release=release, check_key=check_key)
        return Drawn(rows=drawn, index=entry.index, event=released)
    raise PrivacyError(
        f"Others released labels on this trail {RACES} times while this release was worked out; nothing was released.",
        next_step="Release again when the others are done.",
        code="reservation-race",
    )


def check_request(epsilon: object, config: PrivacyConfig | None) -> float:
    """Whether a release may be asked for at all, whatever the trail holds; gives epsilon as a number.

    Raises:
        PrivacyError: epsilon cannot be used, or ``config`` counts another unit than labels.
    """
    if config is not None and config.unit != "label":
        raise PrivacyError(
            f"This configuration counts {config.unit}s, and a release charges labels.",
            next_step='Write PrivacyConfig(epsilon=…, unit="label"), and another trail for other units.',
            code="mixed-units",
        )
    return check_epsilon(epsilon)


def written_event(release: str, *, form: str, digest: str | None, originals: str) -> LabelsWritten:
    """The event that says that the rows of a release were written."""
    return LabelsWritten(release=release, form=form, digest=digest, originals=originals)


@dataclass(frozen=True)
class _Cost:
    """What a label has cost ``before``, and costs altogether; ``everything`` is the sum over all releases."""

    before: float
    total: float
    everything: float
    pld: float


def _cost(ledger: Ledger, opened: Sequence[Opened | None], epsilon: float, own: Opened) -> _Cost:
    earlier = [spend.epsilon for spend in ledger.releases]
    worst = heaviest_label([*zip(earlier, opened, strict=True), (epsilon, own)])
    before = ledger.label_total
    # What was proved of the earlier ones when they were charged holds also where their tags were erased since.
    total = min(max(before, math.fsum(worst)), before + epsilon)
    return _Cost(before, total, math.fsum([*earlier, epsilon]), min(label_epsilon(worst, _DELTA), total))


def _event(release: str, rows: LabelRows, epsilon: float, cost: _Cost, *, keep_seed: bool) -> LabelsReleased:
    return LabelsReleased(
        release=release,
        mechanism=MECHANISM,
        generator=GENERATOR,
        adjacency=ADJACENCY,
        labels=len(rows),
        epsilon=epsilon,
        flip_probability=flip_chance(epsilon),
        epsilon_budget=epsilon,  # put in within the append
        epsilon_before=number(cost.before),
        epsilon_total=number(cost.total),
        composition="row-tags" if cost.total < cost.everything else "sum",
        accountants={"exact": number(cost.total), "pld": number(cost.pld), "pld_delta": _DELTA},
        columns=rows.columns,
        originals="kept" if keep_seed else "to be destroyed",
        not_protected=list(NOT_PROTECTED),
    )


def heaviest_label(releases: Sequence[tuple[float, Opened | None]]) -> list[float]:
    """The epsilons of the releases that hold the label which they cost most together.

    Args:
        releases: each one's epsilon, and what the vault says of it; ``None`` where that cannot be read. Those, and
            those whose tags are under another key than the last one's, count for every label.
    """
    key = releases[-1][1].tag_key if releases and releases[-1][1] is not None else None
    everywhere: list[float] = []
    holds: defaultdict[bytes, list[float]] = defaultdict(list)
    for epsilon, opened in releases:
        if opened is None or opened.tag_key != key:
            everywhere.append(epsilon)
        else:
            for tag in set(opened.tags):
                holds[tag].append(epsilon)
    return everywhere + max(holds.values(), key=sum, default=[])


def open_releases(trail: Trail) -> tuple[Ledger, tuple[Opened | None, ...]]:
    """The ledger, and what the vault says of each of its releases; ``None`` where it was erased or is missing.

    Raises:
        VaultError: the vault does not open with this trail's key.
    """
    reader = trail.reader()
    ledger = read_ledger(reader)
    with trail.reading_vault() as vault:
        return ledger, tuple(_opened(reader, vault, spend) for spend in ledger.releases)


def _opened(reader: TrailReader, vault: Vault, spend: LabelSpend) -> Opened | None:
    entry = next(iter(reader.entries(spend.index, spend.index + 1)))
    payload = vault.half(entry).payload
    if payload is None:
        return None
    half = decode_private(entry.type, payload)
    assert isinstance(half, LabelsSealed)  # for the type checker; decode_private checked it
    tags = base64.b64decode(half.tags)
    return Opened(
        check_key=bytes.fromhex(half.check_key),
        tag_key=bytes.fromhex(half.tag_key),
        tags=tuple(tags[at : at + TAG_BYTES] for at in range(0, len(tags), TAG_BYTES)),
    )


def _check_alone(ledger: Ledger, epsilon: float, config: PrivacyConfig | None) -> float:
    """The budget in force, where a release with ``epsilon`` may be made at all: known before any row is looked at.

    Raises:
        PrivacyError: the trail counts another unit.
        BudgetExceededError: the configuration asks for more than was set, or even a new label would cost too much.
    """
    ledger.check_unit("label")
    if config is not None:
        ledger.check(config)
    known = ledger.limit.epsilon if ledger.limit is not None else epsilon
    limit = config.epsilon if config is not None else known
    if epsilon > limit * _TIE:
        raise _exceeded(epsilon, ledger.label_total, max(epsilon, ledger.label_total), limit)
    return float(limit)


def _check_total(event: LabelsReleased, limit: float) -> None:
    total = float(event.epsilon_total)
    if total > limit * _TIE:
        raise _exceeded(event.epsilon, float(event.epsilon_before), total, limit)


def _exceeded(epsilon: float, before: float, total: float, limit: float) -> BudgetExceededError:
    return BudgetExceededError(
        f"Releasing these labels with epsilon {epsilon:g} would cost a label {total:g} altogether, of a budget of "
        f"{limit:g} for each label (until now {before:g}).",
        next_step="Release rows that no release holds yet, choose a smaller epsilon, train on the labels that were "
        f"released already, or have the budget raised: rlhf-audit budget set --unit label --epsilon {total:g} "
        "--reason TEXT --by NAME. Nothing was released.",
    )


class _ReleasesMovedError(Exception):
    """Another release was charged between the look at the vault and the append."""
