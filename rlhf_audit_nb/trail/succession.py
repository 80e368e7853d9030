"""Which key counts when: keys that follow one another, told by the trail itself. Floor 0.

A trail names its first keys in ``trail.created``. Two kinds of entries change them; both carry a signature of their
own, by the log key that is in force, over a text that no checkpoint can be (`rotation_text`, `revocation_text`):

``key.rotated``  ``new`` takes the place of ``old`` in a role (``log``, ``record``, ``model``, ``mldsa``) from the next
                 entry on; ``old`` is null where the role had no key yet
``key.revoked``  what ``key`` signed counts only for the first ``since`` entries

`KeySuccession` is fed the entries and answers whose signature counts for a checkpoint of a given size. An old log key
counts up to the checkpoint that holds its rotation (``size <= index + 1``; one less for who lists a later key), the new
one from there on. Who trusts an old key follows the signed rotations forward. Who trusts only a newer key accepts the
older ones for strictly older checkpoints alone: these are vouched for by the entries below the newest checkpoint, which
the newer key has signed. Who lists both takes no whole trail that lacks the newer one (`KeySuccession.check_newest`).
So a key that was replaced can never sign a newest checkpoint, not even for who trusts its successor.

A fork may lack the entry that says so. `Revocation` says it apart from the trail: a signed note, kept in
``HOME/revoked/``, that any verifier who has it honours (`known_limits`).
"""

from __future__ import annotations

import base64
import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from rlhf_audit_nb.errors import AuditError, FormatError, KeyFileError
from rlhf_audit_nb.trail.checkpoint import checkpoint_of, parse_size
from rlhf_audit_nb.trail.durable import write_durably
from rlhf_audit_nb.trail.encoding import decode_base64
from rlhf_audit_nb.trail.home import retired_folder, revoked_folder
from rlhf_audit_nb.trail.key_files import read_retired
from rlhf_audit_nb.trail.note import (
    ECDSA,
    ED25519,
    MLDSA44,
    Note,
    Verifier,
    check_name,
    format_vkey,
    parse_note,
    parse_vkey,
)
from rlhf_audit_nb.trail.verdict import Reason

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.entry import Entry
    from rlhf_audit_nb.trail.policy import CheckedCheckpoint, TrustPolicy
    from rlhf_audit_nb.trail.trail import TrailReader

__all__ = [
    "KEY_REVOKED",
    "KEY_ROTATED",
    "KEY_TYPES",
    "ROLES",
    "KeyRevokedBody",
    "KeyRotatedBody",
    "KeySpan",
    "KeySuccession",
    "Limit",
    "Revocation",
    "check_reason",
    "encode_signature",
    "keep_revocation",
    "known_limits",
    "names_key",
    "parse_revocation",
    "revocation_text",
    "rotation_text",
]

TRAIL_CREATED = "trail.created"
KEY_ROTATED = "key.rotated"
KEY_REVOKED = "key.revoked"
KEY_TYPES = (TRAIL_CREATED, KEY_ROTATED, KEY_REVOKED)
"""The types of the entries that `KeySuccession` reads."""

ROLES = ("log", "record", "model", "mldsa")

_ALGORITHMS = {"log": (ED25519, ECDSA), "mldsa": (MLDSA44,)}
_ROTATION = "rlhf-audit/key-rotated/v1"
_REVOCATION = "rlhf-audit/key-revoked/v1"
_REASON = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]{0,500}")
_REVOKED_SUFFIX = ".revoked"


class KeyRotatedBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``key.rotated``: verifier keys for ``log`` and ``mldsa``, else base64 of the DER SubjectPublicKeyInfo."""

    role: str
    old: str | None
    new: str
    reason: str
    signature: str


class KeyRevokedBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``key.revoked``: what ``key`` signed counts for the first ``since`` entries only."""

    role: str
    key: str
    since: int
    reason: str
    signature: str


class _CreatedBody(msgspec.Struct, frozen=True, kw_only=True):
    origin: str
    log_key: str
    record_key: str
    model_key: str


_created = msgspec.json.Decoder(_CreatedBody)
_rotated = msgspec.json.Decoder(KeyRotatedBody)
_revoked = msgspec.json.Decoder(KeyRevokedBody)


def check_reason(reason: str) -> str:
    """``reason`` if it can stand in a key entry: one line of at most 500 characters."""
    if not _REASON.fullmatch(reason):
        raise FormatError(
            "The reason for a change of keys is one line of at most 500 characters.",
            next_step="Write a shorter one, without line breaks.",
            code="key-reason",
        )
    return reason


def _text(kind: str, origin: str, **fields: str | int | None) -> str:
    # No checkpoint can be this text: the second line of one is a number.
    lines = [kind, f"origin {origin}", *(f"{name} {'-' if value is None else value}" for name, value in fields.items())]
    return "\n".join(lines) + "\n"


def rotation_text(origin: str, role: str, index: int, old: str | None, new: str, reason: str) -> str:
    """What the log key in force signs where entry ``index`` replaces ``old`` by ``new``."""
    return _text(_ROTATION, origin, role=role, index=index, old=old, new=new, reason=check_reason(reason))


def revocation_text(origin: str, role: str, key: str, since: int, reason: str, *, successor: str | None = None) -> str:
    """What is signed where a key is revoked: in an entry, or in a note of its own, which may name its successor."""
    told = check_reason(reason)
    return _text(_REVOCATION, origin, role=role, key=key, since=since, successor=successor, reason=told)


@dataclass(frozen=True)
class Limit:
    """What is known of a key apart from the trail: it counts for ``since`` entries, then ``successor`` alone does.

    ``revoked`` is false for a key that was only replaced, as the user's own ring remembers it.
    """

    since: int
    successor: str | None = None
    revoked: bool = True


@dataclass(frozen=True)
class KeySpan:
    """One key of one role and the entries between which it was in force.

    Attributes:
        role: one of `ROLES`.
        key: as it stands in the entries.
        first: the index of the entry that named it; it is in force from the next on (from 0 for a trail's first keys).
        last: the index of the entry that replaced it, ``None`` where it is in force.
        since: after how many entries what it signs no longer counts, ``None`` where it was not revoked.
    """

    role: str
    key: str
    first: int = 0
    last: int | None = None
    since: int | None = None

    def in_force(self, index: int) -> bool:
        """Whether it was the key of its role for the entry at ``index``, revoked or not."""
        return (index > self.first or self.first == 0) and (self.last is None or index <= self.last)


class KeySuccession:
    """The keys of one trail over time, fed the trail's entries in their order.

    Args:
        origin: the trail's name.
        limits: what is known, apart from the trail, of keys that no longer count (`known_limits`).
    """

    def __init__(self, origin: str, limits: Mapping[str, Limit] | None = None) -> None:
        self.origin = origin
        self.reasons: list[Reason] = []
        self._limits = dict(limits or {})
        self._spans: dict[str, list[KeySpan]] = {role: [] for role in ROLES}
        # Thousands of checkpoints are asked about, and the answer changes at few sizes: those up to which it stays.
        self._turns: list[int] = []
        self._answers: dict[tuple[tuple[Verifier, ...], int], tuple[Verifier, ...]] = {}
        self._note_turns()

    def _note_turns(self) -> None:
        sizes = {limit.since for limit in self._limits.values()}
        for span in (*self._spans["log"], *self._spans["mldsa"]):
            sizes |= {span.first}
            sizes |= {span.since} if span.since is not None else set()
            sizes |= {span.last, span.last + 1} if span.last is not None else set()
        self._turns, self._answers = sorted(sizes), {}

    def add(self, entry: Entry) -> None:
        """Take the next entry; those of other types are passed over, those that do not hold become a reason."""
        if entry.type not in KEY_TYPES:
            return
        try:
            if entry.type == KEY_ROTATED:
                self._rotate(entry.index, _rotated.decode(entry.body))
            elif entry.type == KEY_REVOKED:
                self._revoke(_revoked.decode(entry.body))
            elif entry.index == 0:
                self._create(_created.decode(entry.body))
        except (msgspec.MsgspecError, FormatError) as error:
            code = error.reason if isinstance(error, FormatError) else "key-entry"
            message = error.message if isinstance(error, FormatError) else f"It is malformed: {error}."
            self.reasons.append(Reason(code, f"entry {entry.index}", message))
        self._note_turns()

    def spans(self, role: str) -> tuple[KeySpan, ...]:
        """The keys of a role in their order."""
        return tuple(self._spans[role])

    def record_keys(self) -> tuple[KeySpan, ...]:
        """The keys that sign records, in their order (base64 of the DER SubjectPublicKeyInfo)."""
        return self.spans("record")

    def key_at(self, role: str, index: int) -> KeySpan | None:
        """The key of a role for the entry at ``index``, revoked or not; ``None`` where the role had none."""
        return next((span for span in self._spans[role] if span.in_force(index)), None)

    def counts_at(self, span: KeySpan, index: int) -> bool:
        """Whether what a key signed at entry ``index`` counts: not where it is known to have been revoked before."""
        return span.in_force(index) and index < self._limit(span.key)[0]

    def log_verifiers(self, trusted: Sequence[Verifier], size: int) -> tuple[Verifier, ...]:
        """The keys whose signature counts for a checkpoint of ``size`` entries.

        Args:
            trusted: the keys that a policy lists for the origin. Those of the trail's own chain lead to the others;
                those that the trail does not name count as the policy says.
            size: the checkpoint's size; only entries below the newest checkpoint may have been added.
        """
        place = bisect_left(self._turns, size)
        known = self._answers.get((tuple(trusted), place))
        if known is None:
            counted = (key for key in self._accepted(trusted, size) if size <= self._limit(format_vkey(key))[0])
            known = self._answers[tuple(trusted), place] = tuple(counted)
        return known

    def check(self, policy: TrustPolicy, note: str | bytes) -> CheckedCheckpoint:
        """The checkpoint in a signed note, its signatures verified by the keys that count for its size.

        Raises:
            FormatError: as `TrustPolicy.check`; ``revoked-key`` where all of its signers were revoked before it, and
                ``retired-key`` where all of them had been replaced.
        """
        trusted = [key for key in policy.logs if key.name == self.origin]
        size = checkpoint_of(note).size
        if not trusted:
            return policy.check(note, self.origin)
        try:
            checked = replace(policy, logs=self.log_verifiers(trusted, size)).check(note, self.origin)
            self._refuse_second_alone(checked.signers, {format_vkey(key) for key in trusted})
        except FormatError as error:
            if error.reason not in ("unsigned", "untrusted-log"):
                raise
            raise self._why_not(policy, note, size) or error from error
        return checked

    def check_newest(self, policy: TrustPolicy, note: str | bytes) -> CheckedCheckpoint:
        """`check` for the newest checkpoint of a whole trail, all of whose entries were added.

        A policy that lists a key and its successor trusts the first for its own time. A whole trail that names the
        first alone ends before the second, or is a fork by whoever has the first one today: nothing tells which.

        Raises:
            FormatError: as `check`; ``retired-key`` also where the policy lists a successor that the trail lacks.
        """
        checked = self.check(policy, note)
        named = {span.key for role in ("log", "mldsa") for span in self._spans[role]}
        listed = [key for key in policy.logs if key.name == self.origin]
        signers = [key for key in self.log_verifiers(listed, checked.checkpoint.size) if _signs(checked, key)]
        if any(format_vkey(key) not in named or format_vkey(key) in self._limits for key in signers):
            return checked
        second = all(key.algorithm == MLDSA44 for key in signers)
        lacking = [key for key in listed if format_vkey(key) not in named and (second or key.algorithm != MLDSA44)]
        if lacking:
            raise FormatError(
                f"The policy lists the key {lacking[0].name}+{lacking[0].key_id.hex()}, which is not of this trail: "
                "it ends before that key, or is not the key-holder's.",
                next_step="Ask the key-holder for the trail's newest state.",
                code="retired-key",
            )
        return checked

    def _refuse_second_alone(self, signers: Sequence[str], names: set[str]) -> None:
        """Raise `FormatError` where all signers are ML-DSA keys that the trail names and the policy does not.

        Theirs are second signatures: who trusts the log key alone need not trust whoever has, or had, those too.
        """
        first = {span.key for span in self._spans["log"]} | names
        if not any(signer in first for signer in signers):
            raise FormatError("Only a second signature, which the policy does not list, is on it.", code="unsigned")

    def _why_not(self, policy: TrustPolicy, note: str | bytes, size: int) -> FormatError | None:
        """Why the signers of a note, which are known, do not count; ``None`` where none of them is known."""
        spans = [span for role in ("log", "mldsa") for span in self._spans[role]]
        known = list(policy.logs)
        if any(span.key in policy.log_keys for span in spans):
            known += [parse_vkey(span.key) for span in spans]
        try:
            checked = replace(policy, logs=tuple(dict.fromkeys(known))).check(note, self.origin)
        except FormatError:
            return None
        # Not a witness's line, which may stand before the log's.
        key = next(key for key in checked.signers if parse_vkey(key).name == self.origin)
        limit, revoked = self._limit(key)
        signed = f"The checkpoint of size {size} is signed only by {key}, which"
        step = "Ask the key-holder for the trail's newest state."
        if size > limit and revoked:
            return FormatError(f"{signed} was revoked beyond size {limit:.0f}.", next_step=step, code="revoked-key")
        if self._heir_of_a_revoked(key, policy.log_keys):
            return FormatError(f"{signed} a revoked key has named as its heir.", next_step=step, code="revoked-key")
        return FormatError(f"{signed} is not the key of that size.", next_step=step, code="retired-key")

    def _heir_of_a_revoked(self, vkey: str, trusted: Sequence[str]) -> bool:
        """Whether a key is in the chain only by a rotation that a revoked key signed for itself."""
        spans, leading = self._spans["log"], self._followed(set(trusted))
        for before, after, led, follows in zip(spans, spans[1:], leading, leading[1:], strict=False):
            known = self._limits.get(before.key)
            if after.key == vkey and not follows and led and known is not None:
                return known.revoked
        return False

    def _limit(self, vkey: str) -> tuple[float, bool]:
        """For how many entries a key counts, and whether that is because it was revoked."""
        said = [span.since for role in ROLES for span in self._spans[role] if span.key == vkey]
        found = [(float(since), True) for since in said if since is not None]
        known = self._limits.get(vkey)
        if known is not None:
            found.append((float(known.since), known.revoked))
        return min(found, key=lambda item: (item[0], not item[1]), default=(float("inf"), False))

    def _accepted(self, trusted: Sequence[Verifier], size: int) -> list[Verifier]:
        spans, post = self._spans["log"], self._spans["mldsa"]
        names = {format_vkey(key) for key in trusted}
        named = {span.key for span in (*spans, *post)}
        found = [key for key in trusted if format_vkey(key) not in named]
        leading = self._followed(names)
        for at, span in enumerate(spans):
            # The checkpoint that holds a rotation has the new key's signature as well, and were the old one's alone
            # enough for who knows the new one, whoever has an old key could end a history of his own with it.
            room = 1 if leading[at] and not any(later.key in names for later in spans[at + 1 :]) else 0
            if not leading[at] and not any(leading[at:]):
                continue
            if (size > span.first or at == 0) and (span.last is None or size <= span.last + room):
                found.append(parse_vkey(span.key))
        for span in post:
            inside = size > span.first and (span.last is None or size <= span.last)
            if inside and (span.key in names or self._named_by(span, leading)):
                found.append(parse_vkey(span.key))
        return found

    def _followed(self, names: set[str]) -> list[bool]:
        """Of each log key: whether it is trusted, or signed rotations lead to it from one that is."""
        leading: list[bool] = []
        spans = self._spans["log"]
        for at, span in enumerate(spans):
            led = at > 0 and leading[-1] and self._leads(spans[at - 1], span)
            leading.append(led or span.key in names)
        return leading

    def _leads(self, old: KeySpan, new: KeySpan) -> bool:
        known = self._limits.get(old.key)
        if known is None:
            return True
        return known.successor == new.key if known.successor is not None else new.first < known.since

    def _named_by(self, span: KeySpan, leading: list[bool]) -> bool:
        """Whether a log key that is trusted or followed has named an ML-DSA key, while it counted."""
        for log, led in zip(self._spans["log"], leading, strict=True):
            if led and (log.last is None or span.first <= log.last) and (span.first > log.first or log.first == 0):
                return span.first < self._limit(log.key)[0]
        return False

    def _create(self, body: _CreatedBody) -> None:
        if body.origin != self.origin:
            raise FormatError(f"It is of the trail {body.origin}, not {self.origin}.", code="origin")
        self._check_key("log", body.log_key)
        for role, key in (("log", body.log_key), ("record", body.record_key), ("model", body.model_key)):
            self._spans[role] = [KeySpan(role, key)]

    def _rotate(self, index: int, body: KeyRotatedBody) -> None:
        self._check_key(body.role, body.new)
        spans = self._spans[body.role]
        if not spans and body.role == "log" and body.old is not None:
            # A choice of entries without the trail's first: what the first rotation replaces leads the chain.
            self._check_key("log", body.old)
            spans.append(KeySpan("log", body.old))
        now = spans[-1].key if spans else None
        if body.old != now or any(span.key == body.new for span in spans):
            what = f"{body.new} in the place of {body.old}"
            raise FormatError(f"It names {what}, and the {body.role} key in force is {now}.", code="key-order")
        text = rotation_text(self.origin, body.role, index, body.old, body.new, body.reason)
        self._check_signed(text, body.signature)
        if spans:
            spans[-1] = replace(spans[-1], last=index)
        spans.append(KeySpan(body.role, body.new, index))

    def _revoke(self, body: KeyRevokedBody) -> None:
        if body.role not in ROLES or body.since < 0:
            raise FormatError("It names no role, or a negative size.", code="key-entry")
        spans = self._spans[body.role]
        at = next((at for at, span in enumerate(spans) if span.key == body.key), None)
        if at is None:
            raise FormatError(f"It revokes {body.key}, which never was the {body.role} key.", code="key-order")
        self._check_signed(revocation_text(self.origin, body.role, body.key, body.since, body.reason), body.signature)
        before = spans[at].since
        spans[at] = replace(spans[at], since=body.since if before is None else min(before, body.since))

    def _check_key(self, role: str, key: str) -> None:
        """Raise `FormatError` where ``key`` cannot be the key of a role."""
        if role not in ROLES:
            raise FormatError(f"There is no role {role!r}.", code="key-entry")
        if role in ("log", "mldsa"):
            verifier = parse_vkey(key)
            if verifier.name != self.origin:
                raise FormatError(f"Its key {key} has another name than the trail.", code="origin")
            if verifier.algorithm not in _ALGORITHMS[role]:
                raise FormatError(f"Its key {key} is of a type that a {role} key cannot have.", code="key-type")
        else:
            decode_base64(key, f"{role} key")

    def _check_signed(self, text: str, signature: str) -> None:
        spans = self._spans["log"]
        data = decode_base64(signature, "signature of a key entry")
        if not spans or parse_vkey(spans[-1].key).check(text, data) is None:
            raise FormatError("The log key in force has not signed it.", code="key-signature")


def _signs(checked: CheckedCheckpoint, key: Verifier) -> bool:
    return format_vkey(key) in checked.signers


@dataclass(frozen=True)
class Revocation:
    """A statement, apart from any trail, that a key no longer counts beyond a size.

    It is a signed note over `revocation_text`, signed by the revoked key itself or by one that a verifier trusts.
    """

    origin: str
    role: str
    key: str
    since: int
    successor: str | None
    reason: str
    note: Note

    def signed_by(self, trusted: Iterable[Verifier]) -> tuple[str, ...]:
        """The keys that have signed it: the revoked one itself, and those of ``trusted``.

        Raises:
            FormatError: none of them has, or a signature does not hold.
        """
        keys = [*([parse_vkey(self.key)] if self.role in ("log", "mldsa") else []), *trusted]
        known = {(key.name, key.key_id): key for key in keys if key.name == self.origin}
        found = []
        for line in self.note.signatures:
            key = known.get((line.name, line.key_id))
            if key is None:
                continue
            if key.check(self.note.text, line.data) is None:
                raise FormatError(f"The signature of {line.name} does not hold.", code="signature")
            found.append(format_vkey(key))
        if not found:
            raise FormatError(
                "The revocation is signed neither by the key that it revokes nor by a key that is trusted here.",
                next_step="Name the key-holder's policy file with --policy.",
                code="unsigned",
            )
        return tuple(found)


_FIELDS = ("origin", "role", "key", "since", "successor", "reason")


def parse_revocation(data: str | bytes) -> Revocation:
    """The revocation in a signed note; its signatures are not verified here (`Revocation.signed_by`).

    Raises:
        FormatError: it is not in its one form.
    """
    note = parse_note(data)
    lines = note.text[:-1].split("\n")
    pairs = [line.partition(" ") for line in lines[1:]]
    if lines[0] != _REVOCATION or tuple(name for name, _, _ in pairs) != _FIELDS:
        raise FormatError(f"It is not a revocation of a key ({_REVOCATION}).", code="revocation")
    origin, role, key, since, named, reason = (value for _, _, value in pairs)
    successor = None if named == "-" else named
    size = parse_size(since, "size")
    if role not in ROLES:
        raise FormatError(f"There is no role {role!r}.", code="revocation")
    if revocation_text(check_name(origin, "origin"), role, key, size, reason, successor=successor) != note.text:
        raise FormatError("The revocation is not in its one form.", code="revocation")
    if role in ("log", "mldsa") and parse_vkey(key).name != origin:
        raise FormatError(f"The revoked key {key} is not one of {origin}.", code="revocation")
    return Revocation(origin, role, key, size, successor, reason, note)


def names_key(reader: TrailReader, key: str) -> bool:
    """Whether an entry of the trail gives ``key`` the place of another."""
    return any(_rotated.decode(entry.body).new == key for entry in reader.entries(type=KEY_ROTATED))


def keep_revocation(home: Path, revocation: Revocation) -> Path:
    """Keep a revocation, whose signature the caller has verified, where every verification looks; the file.

    Raises:
        KeyFileError: the folder cannot be written.
    """
    folder = revoked_folder(home)
    text = revocation.note.format().encode()
    path = folder / (hashlib.sha256(text).hexdigest()[:32] + _REVOKED_SUFFIX)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_durably(path, text)
    except OSError as error:
        raise KeyFileError(
            f"The revocation cannot be written to {folder}: {error.strerror or error}.",
            next_step="Make the folder writable, or set RLHF_AUDIT_HOME to another one.",
        ) from error
    return path


def known_limits(home: Path, origin: str) -> dict[str, Limit]:
    """The keys of ``origin`` that are known here to be revoked, or replaced, and what is known of each.

    Raises:
        KeyFileError: a file in ``HOME/revoked`` is not a revocation: it is told, never passed over.
    """
    limits = {
        old.key: Limit(old.index + 1, old.successor, revoked=False)
        for old in read_retired(retired_folder(home, origin))
    }
    for path in sorted(revoked_folder(home).glob("*" + _REVOKED_SUFFIX)):
        try:
            found = parse_revocation(path.read_bytes())
        except (OSError, AuditError) as error:
            raise KeyFileError(
                f"{path} is not a revocation: {error}",
                next_step="Import it anew with `rlhf-audit keys import FILE`, or move it away if it is not yours.",
                code="revocation",
            ) from error
        if found.origin == origin:
            limits[found.key] = _stricter(Limit(found.since, found.successor), limits.get(found.key))
    return limits


def _stricter(one: Limit, other: Limit | None) -> Limit:
    """Both of two statements of one key: the smaller size; where they name different successors, none is followed."""
    if other is None or one == other:
        return one
    named = {limit.successor for limit in (one, other)} - {None}
    successor = None if not named else named.pop() if len(named) == 1 else ""
    return Limit(min(one.since, other.since), successor, one.revoked or other.revoked)


def encode_signature(data: bytes) -> str:
    """A signature as it stands in a key entry."""
    return base64.b64encode(data).decode()
