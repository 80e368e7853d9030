"""The anchors of a record: what witnesses and timestamping authorities said of its trail since it was sealed. Floor 3.

An anchor is a checkpoint of the record's trail, of the record's own size or larger, with what others have said of it.
It counts where every link from it back to the record holds:

1. its text is a checkpoint of the same origin;
2. a log key has signed it that the policy trusts, or that signed rotations lead to from one it trusts. A key that took
   another's place before the record was sealed is named by the record's entries; one that did so since, by the
   anchor's ``keys``: the ``key.rotated`` and ``key.revoked`` entries from the record's size on, in their order, each
   proven to be in the anchor's checkpoint and signed by the key that it replaces. Whoever trusts an older key alone
   needs these, or a policy that lists the newer one;
3. the consistency proof shows that it continues the tree of the record's checkpoint (of the same size: the same root);
4. then the cosignatures of the policy's witnesses on it count as in a trail, and so do RFC 3161 answers for the note
   with the log's own lines alone (the very bytes of ``anchors/N.checkpoint`` beside the trail).

What does not hold is no anchor, and the record is INVALID: it did not come from the trail. Who is not known here (a
stranger's cosignature, an authority that is not trusted, a log key that was revoked) is told of and not counted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.records.normal_form import SEAL_KEY
from rlhf_audit_nb.trail import Level, Reason
from rlhf_audit_nb.trail.anchors import (
    CLOCK_SKEW,
    COSIGNATURE_ANCHOR,
    TIMESTAMP_ANCHOR,
    anchored_level,
)
from rlhf_audit_nb.trail.checkpoint import Checkpoint, parse_checkpoint
from rlhf_audit_nb.trail.merkle import check_consistency, check_inclusion, leaf_hash
from rlhf_audit_nb.trail.note import Note, format_vkey, parse_note
from rlhf_audit_nb.trail.succession import KEY_REVOKED, KEY_ROTATED, KeySuccession
from rlhf_audit_nb.trail.verdict import Anchor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rlhf_audit_nb.records.seal import SealedAnchor
    from rlhf_audit_nb.trail import Entry, TrustPolicy
    from rlhf_audit_nb.trail.policy import CheckedCheckpoint
    from rlhf_audit_nb.trail.succession import Limit

__all__ = ["AnchorCheck", "log_lines"]

_PLACE = f"metadata.{SEAL_KEY}.anchors"
_NOT_COUNTED = frozenset({"revoked-key", "retired-key"})


class _WrongError(Exception):
    """What keeps an anchor from being one: a code, a path inside it, a sentence."""

    def __init__(self, code: str, where: str, message: str) -> None:
        super().__init__(message)
        self.reason = (code, where, message)


def log_lines(note: Note, origin: str) -> bytes:
    """The note with the log's own lines alone: what a timestamping authority is asked about."""
    return Note(note.text, tuple(line for line in note.signatures if line.name == origin)).format().encode()


@dataclass
class AnchorCheck:
    """One check of all anchors of a record.

    Args:
        head: the record's checkpoint, trusted by the caller.
        entries: the record's entries, all proven: what they say of the trail's keys counts.
        limits: what is known here of keys that no longer count.
        policy: whose signatures count.
        tsa_roots: gives the certificates (PEM) of the authorities that are trusted; asked where there is a timestamp.
    """

    head: Checkpoint
    entries: Sequence[Entry]
    limits: Mapping[str, Limit]
    policy: TrustPolicy
    tsa_roots: Callable[[], Sequence[bytes]]
    reasons: list[Reason] = field(default_factory=list)
    notes: list[Reason] = field(default_factory=list)
    anchors: list[Anchor] = field(default_factory=list)
    heads: list[Checkpoint] = field(default_factory=list)
    forked: list[str] = field(default_factory=list)

    def check(self, anchors: Sequence[SealedAnchor]) -> Level:
        """How far the anchors reach; what was found is in ``reasons``, ``notes``, ``anchors``, ``heads``, ``forked``.

        ``heads`` are the checkpoints that continue the record's, ``forked`` those notes that the log has signed over
        another root of the record's own size.
        """
        last = -1
        for at, anchor in enumerate(anchors):
            try:
                last = self._anchor(at, anchor, last)
            except _WrongError as error:
                code, inside, message = error.reason
                self.reasons.append(Reason(code, f"{_PLACE}[{at}].{inside}", f"Anchor {at + 1}: {message}"))
        levels = [anchored_level(self.policy, self.anchors, head.size, head.root) for head in self.heads]
        return max(levels, default=Level.UNANCHORED)

    def _anchor(self, at: int, anchor: SealedAnchor, last: int) -> int:
        try:
            note = parse_note(anchor.checkpoint)
            head = parse_checkpoint(note.text)
        except FormatError as error:
            raise _WrongError(error.reason, "checkpoint", error.message) from error
        if head.origin != self.head.origin:
            raise _WrongError("anchor-origin", "checkpoint", f"It is of the trail {head.origin}.")
        if head.size < self.head.size:
            message = f"Its checkpoint of size {head.size} is smaller than the record's, of size {self.head.size}."
            raise _WrongError("anchor-size", "checkpoint", message)
        if head.size <= last:
            raise _WrongError("anchor-order", "checkpoint", f"It is of size {head.size}, and follows one of {last}.")
        self._check_keys(anchor, head)
        checked = self._signed(at, anchor)
        if checked is None:
            return head.size
        self._check_consistent(anchor, head)
        self.heads.append(head)
        self._cosignatures(at, note, checked)
        for number, token in enumerate(anchor.timestamps):
            self._timestamp(f"{_PLACE}[{at}].timestamps[{number}]", f"timestamps[{number}]", token, note, head)
        return head.size

    def _check_keys(self, anchor: SealedAnchor, head: Checkpoint) -> None:
        last = self.head.size - 1
        for number, item in enumerate(anchor.keys):
            entry, place = item.entry, f"keys[{number}]"
            if entry.type not in (KEY_ROTATED, KEY_REVOKED):
                raise _WrongError("foreign-entry", place, f"Entry {entry.index} ({entry.type}) changes no key.")
            if entry.index <= last:
                message = f"Entry {entry.index} stands at or before entry {last}, which the record ends with or has."
                raise _WrongError("order", f"{place}.index", message)
            if not check_inclusion(leaf_hash(entry.data), entry.index, head.size, item.proof, head.root):
                raise _WrongError("not-included", place, f"Entry {entry.index} is not covered by its checkpoint.")
            last = entry.index

    def _signed(self, at: int, anchor: SealedAnchor) -> CheckedCheckpoint | None:
        """The checkpoint as the policy sees it; ``None`` where its signer does not count."""
        keys = KeySuccession(self.head.origin, self.limits)
        for entry in (*self.entries, *(item.entry for item in anchor.keys)):
            keys.add(entry)
        named = {f"entry {item.entry.index}": number for number, item in enumerate(anchor.keys)}
        for reason in keys.reasons:
            if reason.where in named:
                raise _WrongError(reason.code, f"keys[{named[reason.where]}].data", reason.message)
        try:
            return keys.check(self.policy, anchor.checkpoint)
        except FormatError as error:
            if error.reason not in _NOT_COUNTED:
                raise _WrongError(error.reason, "checkpoint", error.message) from error
            message = f"Anchor {at + 1} was not counted. {error.message}"
            self.notes.append(Reason("anchor-unknown", f"{_PLACE}[{at}].checkpoint", message))
            return None

    def _check_consistent(self, anchor: SealedAnchor, head: Checkpoint) -> None:
        if head.size == self.head.size and head.root != self.head.root:
            self.forked.append(anchor.checkpoint)
            message = "The log's key has signed another root of the record's own size: the trail was rewritten."
            raise _WrongError("anchor-fork", "checkpoint", message)
        ours = self.head
        if not check_consistency(ours.size, head.size, anchor.consistency, ours.root, head.root):
            message = "Its proof does not show that it continues the tree of the record's checkpoint."
            raise _WrongError("anchor-consistency", "consistency", message)

    def _cosignatures(self, at: int, note: Note, checked: CheckedCheckpoint) -> None:
        head, where = checked.checkpoint, f"{_PLACE}[{at}].checkpoint"
        for item in checked.cosignatures:
            self._add(COSIGNATURE_ANCHOR, head, item.time, format_vkey(item.verifier), where)
        known = {(item.verifier.name, item.verifier.key_id) for item in checked.cosignatures}
        strangers = {line.name for line in note.signatures if (line.name, line.key_id) not in known} - {head.origin}
        if strangers:
            names = ", ".join(sorted(strangers))
            message = f"It is cosigned by {names}, which the trust policy does not name; that was not counted."
            self.notes.append(Reason("anchor-unknown", where, message))

    def _timestamp(self, where: str, inside: str, token: bytes, note: Note, head: Checkpoint) -> None:
        # Here and not above: most records carry no timestamp, and what reads one takes a while to import.
        from rlhf_audit_nb.trail.timestamp import check_token

        try:
            found = check_token(token, log_lines(note, head.origin), self.tsa_roots())
        except FormatError as error:
            if error.reason != "tsa-unknown":
                raise _WrongError(error.reason, inside, error.message) from error
            self.notes.append(Reason(error.reason, where, error.message))
        else:
            self._add(TIMESTAMP_ANCHOR, head, found.time, found.authority, where)

    def _add(self, kind: str, head: Checkpoint, when: int, by: str, where: str) -> None:
        if when > time.time() + CLOCK_SKEW:
            message = "It is dated in the future by this machine's clock, so it was not counted."
            self.notes.append(Reason("anchor-time", where, message))
            return
        self.anchors.append(Anchor(kind, head.size, head.root, when, by, where))
