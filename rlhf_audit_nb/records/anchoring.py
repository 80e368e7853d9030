"""Putting into a record what others have said of its trail since it was sealed. Floor 3.

What witnesses and timestamping authorities say of a trail lies in its folder ``anchors/``. `anchor_record` takes from
there what is of the record's size or larger, with the proof that leads there from the record, and puts it into the
seal; where that is not enough, and somebody is named, they are asked first as for the trail itself. Then the file
alone shows to whoever gets it that the record was there when they said so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_audit_nb.config import DEFAULT_TRAIL, AuditConfig
from rlhf_audit_nb.errors import AuditError, RecordError
from rlhf_audit_nb.records.anchors import log_lines
from rlhf_audit_nb.records.kept import FOLDER as KEPT
from rlhf_audit_nb.records.record import OpenedRecord, read_record
from rlhf_audit_nb.records.rewriting import replace_seal, rewrite_record
from rlhf_audit_nb.records.seal import MOST_ANCHORS, ProvenEntry, SealedAnchor, parse_seal, with_anchors
from rlhf_audit_nb.records.unsound import refuse_unsound
from rlhf_audit_nb.trail import Level, TrailReader
from rlhf_audit_nb.trail.anchoring import Anchoring, anchor_trail
from rlhf_audit_nb.trail.anchors import TIMESTAMP_ANCHOR, AnchorFolder, quorum_reached, read_anchors
from rlhf_audit_nb.trail.checkpoint import Checkpoint, checkpoint_of
from rlhf_audit_nb.trail.keys import home_folder, local_policy
from rlhf_audit_nb.trail.note import format_vkey, parse_note
from rlhf_audit_nb.trail.succession import KEY_REVOKED, KEY_ROTATED, KEY_TYPES, KeySuccession, known_limits
from rlhf_audit_nb.trail.timestamp import trusted_authorities
from rlhf_audit_nb.trail.verify import store_path
from rlhf_audit_nb.trail.web import TIMEOUT

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import TrustPolicy
    from rlhf_audit_nb.trail.note import Verifier
    from rlhf_audit_nb.trail.verdict import Anchor

__all__ = ["AnchoredRecord", "anchor_record"]


@dataclass(frozen=True)
class AnchoredRecord:
    """What came of anchoring a record.

    Attributes:
        opened: the record as it now is, verified.
        added: how many anchors it has more than before, or with more in them.
        asked: what came of asking; ``None`` where nobody was asked.
    """

    opened: OpenedRecord
    added: int
    asked: Anchoring | None


def _trail_of(path: Path, origin: str, given: Path | str | None) -> Path:
    """The folder of the record's trail.

    Raises:
        RecordError: it is in none of the usual places, or the one that was named is another trail.
    """
    kept = [path.parent.parent] if path.parent.name == KEPT else []
    places = (
        [Path(given)] if given is not None else [path.parent / DEFAULT_TRAIL, AuditConfig().trail_location(), *kept]
    )
    for place in places:
        try:
            if TrailReader.open(place).origin == origin:
                return store_path(place).parent
        except AuditError:
            if given is not None:
                raise
    raise RecordError(
        f"The trail of the record {path}, {origin}, is not in {' or '.join(map(str, dict.fromkeys(places)))}.",
        next_step="Name its folder with --trail: what others have said of it lies there.",
        code="no-trail",
    )


@dataclass
class _Source:
    """The anchors beside a trail, of one state of it, for one record."""

    head: Checkpoint
    reader: TrailReader
    folder: AnchorFolder
    policy: TrustPolicy
    tsa_roots: Sequence[bytes]
    home: Path

    def found(self) -> tuple[list[Anchor], list[Anchor]]:
        """The anchors from the record's size on that this trail continues: all of them, and those worth having.

        Worth having is, of each witness and authority, the first that it said, and the first that a quorum did.
        """
        said, _ = read_anchors(
            self.folder.read, self._names(), self.policy, self.head.origin, self.tsa_roots, logs=self._logs
        )
        fitting = [one for one in said if one.size <= self.reader.size and self.reader.root(one.size) == one.root]
        sizes: dict[int, list[Anchor]] = {}
        for one in fitting:
            sizes.setdefault(one.size, []).append(one)
        seen: set[tuple[str, str]] = set()
        chosen: list[Anchor] = []
        cosigned = False
        for size, group in sorted(sizes.items()):
            quorum = not cosigned and quorum_reached(self.policy, group, size, group[0].root)
            if quorum or {(one.kind, one.by) for one in group} - seen:
                chosen += group
                seen |= {(one.kind, one.by) for one in group}
                cosigned = cosigned or quorum
        return fitting, chosen

    def _names(self) -> list[str]:
        sizes = ((name, name.partition(".")[0]) for name in self.folder.names())
        return [name for name, size in sizes if size.isdecimal() and int(size) >= self.head.size]

    def _logs(self, size: int) -> Sequence[Verifier]:
        keys = KeySuccession(self.head.origin, known_limits(self.home, self.head.origin))
        entries = [entry for kind in KEY_TYPES for entry in self.reader.entries(type=kind)]
        for entry in sorted(entries, key=lambda item: item.index):
            keys.add(entry)
        return keys.log_verifiers([key for key in self.policy.logs if key.name == self.head.origin], size)

    def sealed(self, chosen: Iterable[Anchor]) -> list[SealedAnchor]:
        """What stands in the seal for these anchors, one for each size."""
        by_size: dict[int, list[Anchor]] = {}
        for one in chosen:
            by_size.setdefault(one.size, []).append(one)
        return [self._sealed(size, said) for size, said in sorted(by_size.items())]

    def _sealed(self, size: int, said: Sequence[Anchor]) -> SealedAnchor:
        plain, cosigned = self.folder.read(f"{size}.checkpoint"), self.folder.cosigned(size)
        note = parse_note(plain if plain is not None else log_lines(parse_note(cosigned or ""), self.head.origin))
        if cosigned is not None:
            others = [line for line in parse_note(cosigned).signatures if line.name != self.head.origin]
            note = note.plus(*others)
        names = [one.where.partition("/")[2] for one in said if one.kind == TIMESTAMP_ANCHOR]
        tokens = [token for token in map(self.folder.read, sorted(names)) if token is not None]
        proof = self.reader.consistency_proof(self.head.size, size)
        return SealedAnchor(
            checkpoint=note.format(), consistency=tuple(proof), timestamps=tuple(tokens), keys=self._keys(size)
        )

    def _keys(self, size: int) -> tuple[ProvenEntry, ...]:
        kinds = (KEY_ROTATED, KEY_REVOKED)
        found = [entry for kind in kinds for entry in self.reader.entries(self.head.size, size, type=kind)]
        found.sort(key=lambda entry: entry.index)
        return tuple(ProvenEntry(entry, tuple(self.reader.inclusion_proof(entry.index, size))) for entry in found)


def _joined(there: SealedAnchor, new: SealedAnchor) -> SealedAnchor:
    """Two anchors of one checkpoint, with what both have; the log's own lines are those of the trail's folder."""
    old, note = parse_note(there.checkpoint), parse_note(new.checkpoint)
    idents = {(line.name, line.key_id) for line in note.signatures}
    origin = checkpoint_of(new.checkpoint).origin
    more = [line for line in old.signatures if line.name != origin and (line.name, line.key_id) not in idents]
    tokens = dict.fromkeys((*there.timestamps, *new.timestamps))
    return SealedAnchor(
        checkpoint=note.plus(*more).format(),
        consistency=new.consistency,
        timestamps=tuple(tokens),
        keys=new.keys,
    )


def _merged(there: Sequence[SealedAnchor], new: Sequence[SealedAnchor]) -> list[SealedAnchor]:
    found = {checkpoint_of(one.checkpoint).size: one for one in there}
    for one in new:
        size = checkpoint_of(one.checkpoint).size
        found[size] = _joined(found[size], one) if size in found else one
    return [found[size] for size in sorted(found)]


def _refuse(opened: OpenedRecord, path: Path) -> None:
    refuse_unsound(
        opened.verdict,
        f"{path} is {opened.verdict.level.name} and is not anchored",
        next_step="`rlhf-audit verify` says all that is wrong with it.",
        code="not-valid",
    )


def _enough(policy: TrustPolicy, opened: OpenedRecord, said: Sequence[Anchor]) -> bool:
    """Whether what is there already is what the policy wants."""
    if opened.verdict.level is Level.COSIGNED or policy.quorum == "none":
        return bool(said) or opened.verdict.level > Level.UNANCHORED
    return any(quorum_reached(policy, said, one.size, one.root) for one in said)


def anchor_record(
    path: Path | str,
    *,
    trail: Path | str | None = None,
    policy: TrustPolicy | None = None,
    witnesses: Sequence[str] | None = None,
    authorities: Sequence[str] = (),
    tsa_roots: Sequence[bytes] | None = None,
    home: Path | None = None,
    endorse: Callable[[str], str] | None = None,
    timeout: float = TIMEOUT,
) -> AnchoredRecord:
    """Puts into a record what others have said of its trail from the record's size on.

    Where witnesses or authorities are named, they are asked first, as by `trail.anchoring.anchor_trail`; else they are
    only where what lies beside the trail is not enough and the policy has addresses of witnesses.

    Args:
        path: the record; its file is replaced whole, and nothing but the seal's anchors changes in it.
        trail: the folder of its trail; ``None`` looks beside the record and in the usual place.
        policy: whose signatures count; ``None`` trusts the user's own key, and then no witness.
        witnesses: the witnesses to ask, by the policy's names for them or by address.
        authorities: addresses of timestamping authorities.
        tsa_roots: certificates (PEM) of the authorities that are trusted; ``None`` takes those in ``HOME/tsa``.
        home: the folder of keys and last-seen heads; ``None`` takes ``RLHF_AUDIT_HOME`` or the user's own.
        endorse: adds a signature of the log's own that is meant to last to a checkpoint (`KeyRing.endorse`).
        timeout: seconds that each who is asked may take.

    Raises:
        RecordError: the record is INVALID or DIVERGED (``not-valid``), its trail is not here (``no-trail``) or is
            another history than the record's (``diverged``), or nobody has said anything of it (``nobody``).
        AnchorError, ConfigError, StoreError, KeyFileError: as `trail.anchoring.anchor_trail`.
    """
    target, folder_home = Path(path), home_folder(home)
    roots = trusted_authorities(folder_home) if tsa_roots is None else tsa_roots
    beside = (target.parent / DEFAULT_TRAIL,)
    done: list[AnchoredRecord] = []

    def change(data: bytes) -> bytes:
        opened = read_record(data, policy=policy, home=home, trails=beside, tsa_roots=roots)
        _refuse(opened, target)
        assert opened.metadata is not None
        head = checkpoint_of(opened.metadata["checkpoint"])
        trusted = policy or local_policy(folder_home, head.origin)
        location = _trail_of(target, head.origin, trail)
        source = _Source(head, _reader(location, head, target), AnchorFolder(location), trusted, roots, folder_home)
        asked = None
        said, chosen = source.found()
        addressed = any(trusted.urls.get(format_vkey(key)) for key in trusted.witnesses.values())
        if witnesses or authorities or (addressed and not _enough(trusted, opened, said)):
            asked = anchor_trail(
                location,
                policy=policy,
                witnesses=witnesses,
                authorities=authorities,
                tsa_roots=roots,
                home=home,
                endorse=endorse,
                timeout=timeout,
            )
            source.reader = TrailReader.open(location)
            said, chosen = source.found()
        if not chosen and asked is None:
            raise _nobody(target)
        there = parse_seal(opened.metadata).anchors
        merged = _merged(there, source.sealed(chosen))
        if len(merged) > MOST_ANCHORS:
            raise RecordError(f"The record would have {len(merged)} anchors; {MOST_ANCHORS} are read.", code="anchors")
        added = sum(one not in there for one in merged)
        after = replace_seal(data, with_anchors(opened.metadata, merged)) if added else data
        again = read_record(after, policy=policy, home=home, trails=beside, tsa_roots=roots)
        _refuse(again, target)
        done.append(AnchoredRecord(again, added, asked))
        return after

    rewrite_record(target, change)
    return done[0]


def _reader(location: Path, head: Checkpoint, path: Path) -> TrailReader:
    reader = TrailReader.open(location)
    if reader.size < head.size or reader.root(head.size) != head.root:
        raise RecordError(
            f"The trail in {location} is not a continuation of the one that {path} is of: entries were taken away or "
            "changed.",
            next_step="Keep both as they are; `rlhf-audit verify` says more of each.",
            code="diverged",
        )
    return reader


def _nobody(path: Path) -> RecordError:
    return RecordError(
        f"Nobody has said anything of the trail of {path} since it was sealed.",
        next_step="Name somebody to ask: --tsa URL, or --policy FILE with `witness NAME VKEY URL` lines.",
        code="nobody",
    )
