"""Anchors: what others have said of a trail, in files beside it. Floor 0.

A trail's own key can sign a rewritten history as well as the first one. An anchor is a statement by somebody else that
it cannot take back. Those that a trail has collected lie in its folder ``anchors/``:

==================  ==============================================================================================
``N.checkpoint``    the signed checkpoint of size ``N``, with the log's own signatures alone; written once. These
                    very bytes are what is timestamped: ``openssl ts -verify -data N.checkpoint -in N.NAME.tsr``
``N.cosigned``      the same text with the cosignatures of witnesses too (C2SP tlog-cosignature)
``N.NAME.tsr``      a timestamping authority's answer for ``N.checkpoint`` (RFC 3161 TimeStampResp, DER)
==================  ==============================================================================================

`read_anchors` verifies them and says what they claim; whether the claimed root is the history's own is for whoever
reads the history. A file in this folder can only add to what is known: one that is damaged, of a stranger, or from the
future is told of and not counted, for anybody who can write here could have put it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_audit_nb.errors import FormatError, StoreError
from rlhf_audit_nb.trail.checkpoint import Checkpoint, checkpoint_of, parse_checkpoint
from rlhf_audit_nb.trail.durable import locked, write_durably
from rlhf_audit_nb.trail.note import Note, Signature, Verified, Verifier, format_vkey, parse_note, verify_note
from rlhf_audit_nb.trail.verdict import Anchor, Level, Reason

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.policy import TrustPolicy

__all__ = [
    "COSIGNATURE_ANCHOR",
    "FOLDER",
    "TIMESTAMP_ANCHOR",
    "AnchorFolder",
    "anchored_level",
    "cosigned_sizes",
    "quorum_reached",
    "read_anchors",
]

FOLDER = "anchors"
COSIGNATURE_ANCHOR = "cosignature"
TIMESTAMP_ANCHOR = "timestamp"
CLOCK_SKEW = 300

_MAX_FILE = 1 << 20
_NAME = re.compile(r"(0|[1-9][0-9]{0,18})\.(?:(checkpoint)|(cosigned)|([A-Za-z0-9][A-Za-z0-9._-]{0,99})\.tsr)")

Read = Callable[[str], bytes | None]


@dataclass
class _Files:
    """The names of one size."""

    checkpoint: bool = False
    cosigned: bool = False
    tokens: list[str] = field(default_factory=list)


def _by_size(names: Iterable[str]) -> dict[int, _Files]:
    found: dict[int, _Files] = {}
    for name in sorted(names):
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        files = found.setdefault(int(match[1]), _Files())
        files.checkpoint |= match[2] is not None
        files.cosigned |= match[3] is not None
        if match[4] is not None:
            files.tokens.append(name)
    return dict(sorted(found.items()))


def read_anchors(
    read: Read,
    names: Iterable[str],
    policy: TrustPolicy,
    origin: str,
    tsa_roots: Sequence[bytes] = (),
    *,
    logs: Callable[[int], Sequence[Verifier]] | None = None,
    now: float | None = None,
) -> tuple[tuple[Anchor, ...], tuple[Reason, ...]]:
    """What the files of an ``anchors/`` folder prove, the smallest size first.

    An anchor is returned only where the log's own signature on the checkpoint holds, so that no stranger can make a
    trail look forked, and the witness's or the authority's statement holds as well. The caller compares each anchor's
    root with the history's at that size.

    Args:
        read: the bytes of a file of that folder, ``None`` where it cannot be had.
        names: the names of its files; those that are no anchor's are left alone.
        policy: whose signatures count, the log's and the witnesses'.
        origin: the trail's.
        tsa_roots: certificates (PEM, one or several in each) of the timestamping authorities that are trusted.
        logs: the log's keys for a checkpoint of a given size, where keys have rotated; ``None`` takes the policy's.
        now: POSIX seconds; ``None`` asks the clock.

    Returns:
        The anchors, and reasons. Their codes are ``anchor-fork`` (the log has signed two roots of one size: the history
        has DIVERGED), and these, which lower nothing: ``anchor`` (a file is damaged or its signature does not hold),
        ``anchor-unknown`` (cosigned by somebody the policy does not name), ``tsa-unknown`` (timestamped by an authority
        that is not trusted here), ``anchor-time`` (dated in the future, or before a smaller one by the same hand).
    """
    reading = _Reading(read, policy, origin, tsa_roots, logs, time.time() if now is None else now)
    for size, files in _by_size(names).items():
        reading.size(size, files)
    reading.order()
    return tuple(reading.anchors), tuple(reading.reasons)


@dataclass
class _Reading:
    """One reading of one folder."""

    read: Read
    policy: TrustPolicy
    origin: str
    tsa_roots: Sequence[bytes]
    logs: Callable[[int], Sequence[Verifier]] | None
    now: float
    anchors: list[Anchor] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)

    def say(self, code: str, where: str, message: str) -> None:
        self.reasons.append(Reason(code, f"{FOLDER}/{where}", message))

    def size(self, size: int, files: _Files) -> None:
        plain = self._note(size, f"{size}.checkpoint") if files.checkpoint else None
        cosigned = self._note(size, f"{size}.cosigned") if files.cosigned else None
        if plain and cosigned and plain.head.root != cosigned.head.root:
            message = f"The log's key has signed another root of size {size} than in {size}.checkpoint beside it."
            self.say("anchor-fork", f"{size}.cosigned", message)
        if cosigned:
            self._cosignatures(cosigned)
        for name in files.tokens:
            if plain is None:
                self.say(
                    "anchor", name, f"There is no good {size}.checkpoint beside it, so it is a timestamp of nothing."
                )
            else:
                self._token(name, plain)

    def _note(self, size: int, name: str) -> _LogSigned | None:
        data = self._bytes(name)
        if data is None:
            return None
        try:
            note = parse_note(data)
            head = parse_checkpoint(note.text)
            if head.origin != self.origin or head.size != size:
                raise FormatError(f"It is the checkpoint {head.size} of {head.origin}.", code="origin")
            keys = (
                [key for key in self.policy.logs if key.name == self.origin] if self.logs is None else self.logs(size)
            )
            verified = verify_note(note, [*keys, *self.policy.witnesses.values()])
            if not any(item.verifier in keys for item in verified):
                raise FormatError("No trusted key of the log has signed it.", code="unsigned")
        except FormatError as error:
            self.say("anchor", name, f"{error.message} It was not counted.")
            return None
        return _LogSigned(name, data, note, head, verified)

    def _bytes(self, name: str) -> bytes | None:
        data = self.read(name)
        if data is None or len(data) > _MAX_FILE:
            self.say("anchor", name, "It cannot be read, or is too large.")
            return None
        return data

    def _cosignatures(self, signed: _LogSigned) -> None:
        witnesses = set(self.policy.witnesses.values())
        for item in signed.verified:
            if item.verifier in witnesses:
                self._add(COSIGNATURE_ANCHOR, signed, signed.name, item.time, format_vkey(item.verifier))
        known = {(item.verifier.name, item.verifier.key_id) for item in signed.verified}
        strangers = {line.name for line in signed.note.signatures if (line.name, line.key_id) not in known}
        strangers.discard(self.origin)
        if strangers:
            names = ", ".join(sorted(strangers))
            message = f"It is cosigned by {names}, which the trust policy does not name; that was not counted."
            self.say("anchor-unknown", signed.name, message)

    def _token(self, name: str, signed: _LogSigned) -> None:
        from rlhf_audit_nb.trail.timestamp import check_token

        data = self._bytes(name)
        if data is None:
            return
        try:
            token = check_token(data, signed.data, self.tsa_roots)
        except FormatError as error:
            self.say("tsa-unknown" if error.reason == "tsa-unknown" else "anchor", name, error.message)
            return
        self._add(TIMESTAMP_ANCHOR, signed, name, token.time, token.authority)

    def _add(self, kind: str, signed: _LogSigned, name: str, when: int, by: str) -> None:
        if when > self.now + CLOCK_SKEW:
            message = "It is dated in the future by this machine's clock, so it was not counted."
            self.say("anchor-time", name, message)
            return
        self.anchors.append(Anchor(kind, signed.head.size, signed.head.root, when, by, f"{FOLDER}/{name}"))

    def order(self) -> None:
        """Tell of times that run back while the trail grew."""
        last: dict[str, Anchor] = {}
        for anchor in self.anchors:
            before = last.get(anchor.by)
            if before is not None and anchor.time < before.time and anchor.size > before.size:
                message = f"It is dated before the one of size {before.size} by the same hand."
                self.reasons.append(Reason("anchor-time", anchor.where, message))
            last[anchor.by] = anchor


@dataclass(frozen=True)
class _LogSigned:
    """A checkpoint that the log has signed, and whoever else that is known."""

    name: str
    data: bytes
    note: Note
    head: Checkpoint
    verified: tuple[Verified, ...]


def quorum_reached(policy: TrustPolicy, anchors: Iterable[Anchor], size: int, root: bytes) -> bool:
    """Whether the policy's quorum of witnesses has cosigned this very head; never where it asks for ``none``.

    As in `TrustPolicy.check`, a cosignature without a time does not count: it claims consistency alone.
    """
    of_head = [item for item in anchors if (item.kind, item.size, item.root) == (COSIGNATURE_ANCHOR, size, root)]
    said = {item.by for item in of_head if item.time}
    held = {name for name, key in policy.witnesses.items() if format_vkey(key) in said}

    def holds(name: str) -> bool:
        group = policy.groups.get(name)
        return name in held if group is None else sum(map(holds, group.members)) >= group.threshold

    return policy.quorum != "none" and holds(policy.quorum)


def anchored_level(policy: TrustPolicy, anchors: Sequence[Anchor], size: int, root: bytes) -> Level:
    """How far anchors reach for the head of this size and root, everything else having been found good."""
    if quorum_reached(policy, anchors, size, root):
        return Level.COSIGNED
    stamped = any((item.kind, item.size, item.root) == (TIMESTAMP_ANCHOR, size, root) for item in anchors)
    return Level.TIMESTAMPED if stamped else Level.UNANCHORED


def cosigned_sizes(folder: AnchorFolder, most: int) -> list[int]:
    """The sizes up to ``most`` that somebody has cosigned, by the files' names, the largest first."""
    found = _by_size(folder.names()).items()
    return sorted((size for size, files in found if files.cosigned and size <= most), reverse=True)


class AnchorFolder:
    """The anchors of one trail on this machine: what is there, and how more is added.

    Args:
        location: the trail's folder.
    """

    def __init__(self, location: Path) -> None:
        self.path = location / FOLDER

    def names(self) -> tuple[str, ...]:
        """The names of its files, none where the folder is not there.

        Raises:
            StoreError: it cannot be listed.
        """
        try:
            return tuple(sorted(item.name for item in self.path.iterdir()))
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise self._unusable(error) from error

    def read(self, name: str) -> bytes | None:
        """A file's bytes; ``None`` where it is missing, a link, no file, or too large."""
        if _NAME.fullmatch(name) is None:
            return None
        try:
            descriptor = os.open(self.path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            with os.fdopen(descriptor, "rb") as file:
                data = file.read(_MAX_FILE + 1)
        except OSError:
            return None
        return data if len(data) <= _MAX_FILE else None

    def keep(self, note: str) -> bytes:
        """Keep a log-signed checkpoint, its own lines alone; the bytes that stand for it from now on.

        The first that is kept of a size stays: what was timestamped once must not change. The signatures were verified
        by the caller.

        Raises:
            StoreError: the folder cannot be written, or the log has signed another root of that size (``diverged``).
        """
        parsed = parse_note(note)
        head = parse_checkpoint(parsed.text)
        own = Note(parsed.text, tuple(line for line in parsed.signatures if line.name == head.origin))
        name = f"{head.size}.checkpoint"
        with self._locked():
            there = self.read(name)
            if there is None:
                there = own.format().encode()
                self._write(name, there)
        if checkpoint_of(there).root != head.root:
            raise self._diverged(head.size)
        return there

    def cosigned(self, size: int) -> str | None:
        """The checkpoint of this size with the cosignatures so far, ``None`` where there are none."""
        data = self.read(f"{size}.cosigned")
        return None if data is None else parse_note(data).format()

    def cosign(self, note: str) -> str:
        """Add the signatures of ``note`` to those of its size, a newer one in the place of its signer's older.

        The signatures were verified by the caller.

        Raises:
            StoreError: the folder cannot be written, or holds cosignatures over another root (``diverged``).
        """
        given = parse_note(note)
        head = parse_checkpoint(given.text)
        name = f"{head.size}.cosigned"
        with self._locked():
            there = self.cosigned(head.size)
            before = parse_note(there) if there is not None else Note(given.text, ())
            if before.text != given.text:
                raise self._diverged(head.size)
            lines: dict[tuple[str, bytes], Signature] = {}
            for line in (*before.signatures, *given.signatures):
                lines[line.name, line.key_id] = line
            whole = Note(given.text, tuple(lines.values())).format()
            self._write(name, whole.encode())
        return whole

    def stamp(self, size: int, authority: str, response: bytes) -> Path:
        """Keep an authority's answer for the checkpoint of this size; it was verified by the caller.

        Raises:
            StoreError: the folder cannot be written.
        """
        path = self.path / f"{size}.{token_name(authority)}.tsr"
        with self._locked():
            self._write(path.name, response)
        return path

    def tokens(self, size: int) -> Mapping[str, bytes]:
        """The answers of authorities for this size by their file names."""
        files = _by_size(self.names()).get(size, _Files())
        return {name: data for name in files.tokens if (data := self.read(name)) is not None}

    def _write(self, name: str, data: bytes) -> None:
        try:
            write_durably(self.path / name, data)
        except OSError as error:
            raise self._unusable(error) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with ExitStack() as held:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(self.path / ".lock"))
            except OSError as error:
                raise self._unusable(error) from error
            yield

    def _diverged(self, size: int) -> StoreError:
        return StoreError(
            f"The trail's checkpoint of size {size} is not the one that {self.path} holds anchors for.",
            next_step="Keep both as they are: the history was rewritten. See `rlhf-audit witness evidence --help`.",
            code="diverged",
        )

    def _unusable(self, error: OSError) -> StoreError:
        return StoreError(
            f"The anchors in {self.path} cannot be read or written: {error.strerror or error}.",
            next_step="Make the folder writable, or free some space.",
            code="anchors",
        )


def token_name(authority: str) -> str:
    """The part of a token's file name that stands for an authority (the address of its service, as a rule)."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", re.sub("^https?://", "", authority)).strip("-._")
    return name[:100] or "tsa"
