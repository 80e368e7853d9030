"""The trust policy: whose signatures count (C2SP tlog-policy). Floor 0.

The text is ``log VKEY [URL]``, ``witness NAME VKEY [URL]``, ``group NAME all|any|K MEMBER...``, and exactly one
``quorum NAME|none``; names are defined before they are used, and a name is a member once at most. A log's key is of
type 0x01, 0x02 or 0x06, a witness's of type 0x04 or 0x06 (`vkey`). Names, URLs and comments are bytes to the format:
those that are not UTF-8 are kept as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rlhf_audit_nb.errors import FormatError
from rlhf_audit_nb.trail.checkpoint import Checkpoint, parse_checkpoint
from rlhf_audit_nb.trail.frame import parse_note
from rlhf_audit_nb.trail.note import Verified, verify_note
from rlhf_audit_nb.trail.vkey import COSIGNATURE, ECDSA, ED25519, MLDSA44, Verifier, format_vkey, parse_vkey

__all__ = ["CheckedCheckpoint", "Group", "TrustPolicy"]

_LOG_TYPES = frozenset({ED25519, ECDSA, MLDSA44})
_WITNESS_TYPES = frozenset({COSIGNATURE, MLDSA44})
_MAX_POLICY = 1 << 20


@dataclass(frozen=True)
class Group:
    """A threshold over witnesses and groups: at least ``threshold`` of ``members`` hold."""

    name: str
    threshold: int
    members: tuple[str, ...]
    keyword: str


@dataclass(frozen=True)
class CheckedCheckpoint:
    """A checkpoint whose signatures hold under a policy.

    Attributes:
        checkpoint: what was signed.
        signers: the verifier keys, as text, of all known keys that signed.
        cosigned: whether the policy's quorum of witnesses has cosigned it.
        cosignatures: the witnesses' signatures, each with its time.
    """

    checkpoint: Checkpoint
    signers: tuple[str, ...]
    cosigned: bool
    cosignatures: tuple[Verified, ...] = ()


@dataclass(frozen=True)
class TrustPolicy:
    """Whose signatures count (C2SP tlog-policy).

    Attributes:
        logs: verifier keys of logs, each name being the origin it signs for.
        witnesses: verifier keys of witnesses by the policy's own names for them.
        groups: thresholds, each defined before it is used.
        quorum: the witness or group that must hold for a checkpoint to count as cosigned, or ``none``.
    """

    logs: tuple[Verifier, ...]
    witnesses: Mapping[str, Verifier] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)
    quorum: str = "none"
    urls: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, log_vkey: str) -> TrustPolicy:
        """Trust in one log key, without witnesses."""
        verifier = parse_vkey(log_vkey)
        if verifier.algorithm not in _LOG_TYPES:
            raise FormatError(f"The key {verifier.name} is a witness's, not a log's.", code="key-type")
        return cls((verifier,))

    @classmethod
    def parse(cls, text: str | bytes) -> TrustPolicy:
        """The policy in ``text``, strictly.

        Raises:
            FormatError: naming the line.
        """
        return _PolicyParser().parse(text)

    @property
    def log_keys(self) -> tuple[str, ...]:
        """The logs' verifier keys as text."""
        return tuple(format_vkey(verifier) for verifier in self.logs)

    def format(self) -> str:
        """The policy as text; parsing it gives an equal policy."""
        lines = [self._line("log", key) for key in self.log_keys]
        lines += [self._line(f"witness {name}", format_vkey(key)) for name, key in self.witnesses.items()]
        lines += [f"group {group.name} {group.keyword} {' '.join(group.members)}" for group in self.groups.values()]
        return "\n".join([*lines, f"quorum {self.quorum}"]) + "\n"

    def _line(self, head: str, vkey: str) -> str:
        url = self.urls.get(vkey)
        return f"{head} {vkey}" + (f" {url}" if url else "")

    def check(
        self, note: str | bytes, origin: str | None = None, *, logs: Sequence[Verifier] | None = None
    ) -> CheckedCheckpoint:
        """The checkpoint in a signed note, its signatures verified.

        A cosignature without a time claims consistency alone; it must hold and is listed, and the quorum does not
        count it.

        Args:
            note: the signed note.
            origin: the log that it must be of; ``None`` takes any that the policy knows.
            logs: the keys of its log that count instead of the policy's own (after a rotation, say).

        Raises:
            FormatError: ``untrusted-log`` where the policy has no key for its origin, ``origin`` where it is not the
                expected one, ``signature`` or ``unsigned`` where the signatures do not hold, else a format's code.
        """
        parsed = parse_note(note)
        checkpoint = parse_checkpoint(parsed.text)
        if origin is not None and checkpoint.origin != origin:
            raise FormatError(f"The checkpoint is of {checkpoint.origin}, not of {origin}.", code="origin")
        trusted = [key for key in (self.logs if logs is None else logs) if key.name == checkpoint.origin]
        if not trusted:
            raise FormatError(f"The policy trusts no key for {checkpoint.origin}.", code="untrusted-log")
        verified = verify_note(parsed, [*trusted, *self.witnesses.values()])
        if not any(item.verifier in trusted for item in verified):
            raise FormatError(f"The checkpoint is not signed by {checkpoint.origin}'s key.", code="unsigned")
        witnesses = set(self.witnesses.values())
        cosignatures = tuple(item for item in verified if item.verifier in witnesses)
        signers = tuple(format_vkey(item.verifier) for item in verified)
        return CheckedCheckpoint(checkpoint, signers, self._quorum_holds(cosignatures), cosignatures)

    def _quorum_holds(self, cosignatures: Iterable[Verified]) -> bool:
        keys = {item.verifier for item in cosignatures if item.time}
        held = {name for name, key in self.witnesses.items() if key in keys}
        for group in self.groups.values():  # members come before their groups
            if sum(member in held for member in group.members) >= group.threshold:
                held.add(group.name)
        return self.quorum in held  # "none" names nobody

    @property
    def split_view_unsafe(self) -> bool:
        """Whether the quorum can be met twice by witnesses of whom none is in both.

        Then the log can show two histories, each fully cosigned, and no witness has signed both. Among witnesses
        alone that is so where the threshold is at most half of them. ``quorum none`` asks nobody and is unsafe too.

        A group of n with threshold k is met twice where 2k <= n + s, s being the members that can themselves be met
        twice: these serve both sides, any other one side, and no witness stands in two groups.
        """
        twice: set[str] = {"none"}
        for group in self.groups.values():
            if 2 * group.threshold <= len(group.members) + sum(member in twice for member in group.members):
                twice.add(group.name)
        return self.quorum in twice


class _PolicyParser:
    """One pass over the lines of a policy."""

    def __init__(self) -> None:
        self._logs: list[Verifier] = []
        self._witnesses: dict[str, Verifier] = {}
        self._groups: dict[str, Group] = {}
        self._quorum: str | None = None
        self._urls: dict[str, str] = {}
        self._members: set[str] = set()
        self._publics: set[bytes] = set()

    def parse(self, text: str | bytes) -> TrustPolicy:
        try:
            raw = text.encode(errors="surrogateescape") if isinstance(text, str) else text
        except UnicodeEncodeError as error:
            raise FormatError(f"A trust policy is not text: {error}.", code="policy") from error
        if len(raw) > _MAX_POLICY:
            raise FormatError(f"A trust policy of {len(raw)} bytes is over {_MAX_POLICY}.", code="policy")
        if re.search(rb"[^\x09\x0a\x20-\x7e\x80-\xff]", raw):
            raise FormatError("A trust policy holds a control character.", code="policy")
        for number, line in enumerate(raw.decode(errors="surrogateescape").split("\n"), 1):
            words = re.split("[ \t]+", line.strip(" \t"))
            if words == [""] or words[0].startswith("#"):
                continue
            try:
                self._line(words)
            except FormatError as error:
                raise FormatError(f"Line {number} of the policy: {error.message}", code="policy") from error
        if self._quorum is None or not self._logs:
            raise FormatError("A trust policy needs a log line and exactly one quorum line.", code="policy")
        return TrustPolicy(tuple(self._logs), self._witnesses, self._groups, self._quorum, self._urls)

    def _line(self, words: list[str]) -> None:
        rules: Mapping[str, tuple[int, int]] = {
            "log": (2, 3),
            "witness": (3, 4),
            "group": (4, 1 << 16),
            "quorum": (2, 2),
        }
        least, most = rules.get(words[0], (0, 0))
        if not least <= len(words) <= most:
            raise FormatError(f"{' '.join(words)[:60]!r} is not a log, witness, group or quorum line.")
        {"log": self._log, "witness": self._witness, "group": self._group, "quorum": self._set_quorum}[words[0]](words)

    def _key(self, text: str, types: frozenset[int], url: Iterable[str]) -> Verifier:
        verifier = parse_vkey(text)
        if verifier.algorithm not in types:
            allowed = " or ".join(f"{kind:#04x}" for kind in sorted(types))
            raise FormatError(
                f"the key {verifier.name} is of type {verifier.algorithm:#04x}; this line takes {allowed}."
            )
        if verifier.public in self._publics:
            raise FormatError(f"the key {verifier.name} stands twice.")
        self._publics.add(verifier.public)
        self._urls.update((text, word) for word in url)
        return verifier

    def _new_name(self, name: str) -> str:
        if name == "none" or name in self._witnesses or name in self._groups:
            raise FormatError(f"the name {name!r} is taken.")
        return name

    def _log(self, words: list[str]) -> None:
        self._logs.append(self._key(words[1], _LOG_TYPES, words[2:]))

    def _witness(self, words: list[str]) -> None:
        name = self._new_name(words[1])
        self._witnesses[name] = self._key(words[2], _WITNESS_TYPES, words[3:])

    def _group(self, words: list[str]) -> None:
        name, keyword, members = self._new_name(words[1]), words[2], words[3:]
        for member in members:
            if member not in self._witnesses and member not in self._groups:
                raise FormatError(f"the member {member!r} is not defined before it is used.")
            if member in self._members:
                raise FormatError(f"{member!r} is a member twice.")
            self._members.add(member)
        self._groups[name] = Group(name, self._threshold(keyword, len(members)), tuple(members), keyword)

    @staticmethod
    def _threshold(keyword: str, count: int) -> int:
        if keyword in ("all", "any"):
            return count if keyword == "all" else 1
        if not re.fullmatch("[1-9][0-9]{0,4}", keyword) or int(keyword) > count:
            raise FormatError(f"the threshold {keyword!r} is not all, any or a number from 1 to {count}.")
        return int(keyword)

    def _set_quorum(self, words: list[str]) -> None:
        if self._quorum is not None:
            raise FormatError("a second quorum line.")
        if words[1] != "none" and words[1] not in self._witnesses and words[1] not in self._groups:
            raise FormatError(f"the quorum {words[1]!r} is not defined before it is used.")
        self._quorum = words[1]
