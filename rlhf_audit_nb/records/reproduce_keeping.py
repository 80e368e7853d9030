"""Keeping a reproduction's result: an entry of a trail, and an addition to the record. Floor 3.

The entry comes first: a crash in between leaves a trail that knows of a reproduction and a record that does not tell of
it, never the reverse. The addition's predicate is the event's body, and where the entry stands (``entry``: the trail's
``origin``, the ``index`` and the entry's ``leaf`` hash). Whoever reproduces signs with the record key of their trail.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.config import AuditConfig
from rlhf_audit_nb.errors import AuditError
from rlhf_audit_nb.events import encode_body
from rlhf_audit_nb.records.additions import REPRODUCTION, add_to_record
from rlhf_audit_nb.trail import TrailReader
from rlhf_audit_nb.trail.merkle import leaf_hash

if TYPE_CHECKING:
    from rlhf_audit_nb.records.reproduce import Reproduction
    from rlhf_audit_nb.trail import Trail, TrustPolicy

__all__ = ["Kept", "keep_reproduction", "place_of_trail"]


@dataclass(frozen=True)
class Kept:
    """Where a result was kept.

    Attributes:
        origin: the trail that holds it.
        entry: the index of its entry.
        addition: its place among the record's additions; ``None`` where the record was left alone.
        key_id: of the key that signed the addition.
    """

    origin: str
    entry: int
    addition: int | None = None
    key_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {"origin": self.origin, "entry": self.entry, "addition": self.addition, "key_id": self.key_id}

    def words(self) -> str:
        """One line for people."""
        said = f"kept       entry {self.entry} of {self.origin}"
        if self.addition is None:
            return f"{said}; the record is left as it was"
        return f"{said}; addition {self.addition + 1} of the record, by key {str(self.key_id)[:16]}"


def place_of_trail(record: Path | str, named: Path | str | None, origin: str) -> Path:
    """Which trail keeps a result: the one that is named, the usual one, or the record's own beside it.

    Where none of them is there yet, it is the usual one, which whoever opens it makes.
    """
    usual = AuditConfig(trail=str(named) if named is not None else None).trail_location()
    beside = Path(record).parent / "audit"
    if named is not None or usual.is_dir() or not beside.is_dir():
        return usual
    try:
        return beside if TrailReader.open(beside).origin == origin else usual
    except AuditError:
        return usual  # what lies beside the record is no trail, and not what is asked about here


def keep_reproduction(
    result: Reproduction,
    path: Path | str,
    trail: Trail,
    *,
    add: bool = True,
    policy: TrustPolicy | None = None,
    home: Path | None = None,
) -> Kept:
    """Write a result into a trail, and into the record.

    Args:
        result: what was found.
        path: the record.
        trail: the one that gets the entry, and whose record key signs.
        add: whether the record gets the addition.
        policy: whose signatures count on the record.
        home: the folder of keys and last-seen heads.

    Raises:
        StoreError: the trail cannot be written; then neither is the record.
        RecordError: the record does not verify any more, or cannot be written; the entry stands.
        KeyFileError: the trail's key cannot sign.
    """
    event = result.event()
    index = trail.append(event.TYPE, encode_body(event)).wait()
    if not add:
        return Kept(trail.origin, index)
    (entry,) = trail.reader().entries(index, index + 1)
    where = {"origin": trail.origin, "index": index, "leaf": leaf_hash(entry.data).hex()}
    predicate = {**json.loads(encode_body(event)), "entry": where}
    addition = add_to_record(path, REPRODUCTION, predicate, trail.keys.record_signers[0], policy=policy, home=home)
    return Kept(trail.origin, index, addition.index, addition.key_id)
