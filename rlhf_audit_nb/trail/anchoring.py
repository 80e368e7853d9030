"""Anchoring: asking the witnesses and timestamping authorities that were named, and keeping what they say. Floor 0.

Nobody is asked whom the user has not named, with ``--witness``, ``--tsa`` or an address in the trust policy; and
nothing is kept that was not verified first: a cosignature by a key of the policy, a timestamp by an authority that is
trusted. What came before is not asked for again. A witness that has seen another history is the proof that anchoring
exists for: both signed heads are kept and the outcome is DIVERGED.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.errors import AnchorError, AuditError, ConfigError, FormatError, StoreError
from rlhf_audit_nb.trail.anchors import (
    CLOCK_SKEW,
    COSIGNATURE_ANCHOR,
    TIMESTAMP_ANCHOR,
    AnchorFolder,
    anchored_level,
    cosigned_sizes,
    quorum_reached,
    read_anchors,
    token_name,
)
from rlhf_audit_nb.trail.checkpoint import Checkpoint, checkpoint_of, parse_size
from rlhf_audit_nb.trail.heads import Heads
from rlhf_audit_nb.trail.home import home_folder
from rlhf_audit_nb.trail.keys import local_policy
from rlhf_audit_nb.trail.merkle import check_consistency
from rlhf_audit_nb.trail.note import Note, Verifier, format_vkey, parse_note, verify_note
from rlhf_audit_nb.trail.submission import format_submission, submission_of
from rlhf_audit_nb.trail.succession import KEY_TYPES, KeySuccession, known_limits
from rlhf_audit_nb.trail.timestamp import ask_authority, check_token, trusted_authorities
from rlhf_audit_nb.trail.trail import TrailReader
from rlhf_audit_nb.trail.verdict import Anchor, Level, Reason
from rlhf_audit_nb.trail.verify import compare_with_seen, store_path
from rlhf_audit_nb.trail.web import TIMEOUT, Answer, check_url, get, post

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.policy import TrustPolicy

__all__ = ["Anchoring", "Asked", "add_anchor", "anchor_trail", "keep_checkpoint", "request_cosignature"]

_AT_ONCE = 8
_TRIES = 3
_OK, _CONFLICT, _UNPROCESSABLE = 200, 409, 422
_SIZE_KIND = "text/x.tlog.size"
_FORKED = "It has cosigned another history of this trail."
_REFUSALS = {
    400: ("malformed", "It could not read the request."),
    403: ("unsigned", "It does not know the key that signed this checkpoint: give its operator the trail's new key."),
    404: ("unknown-log", "It does not know this trail: give its operator the trail's `log` line."),
}


@dataclass(frozen=True)
class Asked:
    """What one witness or authority said.

    Attributes:
        kind: ``cosignature`` or ``timestamp``.
        whom: its address, or its name where it has none.
        outcome: ``given``; ``kept`` (it was there before); else why not: ``unreachable``, ``unknown-log``,
            ``unsigned``, ``malformed``, ``stale``, ``unknown-key``, ``tsa-unknown``, ``timestamp``, ``refused``,
            ``rollback``, ``fork``.
        message: one sentence.
        time: POSIX seconds that it vouches for, where it gave something.
    """

    kind: str
    whom: str
    outcome: str
    message: str
    time: int | None = None

    @property
    def good(self) -> bool:
        """Whether its statement is there now."""
        return self.outcome in ("given", "kept")


@dataclass(frozen=True)
class Anchoring:
    """What came of anchoring a trail's newest checkpoint.

    Attributes:
        origin: the trail's name.
        size: how many entries it covers.
        root: the root over them (32 bytes).
        level: how far the anchors reach that it now has, or DIVERGED.
        quorum: whether the policy's quorum of witnesses has cosigned it; ``None`` where it asks for none.
        asked: each witness and authority that was asked, in the order named.
        reasons: why it is DIVERGED, and what is wrong with files that were there before.
    """

    origin: str
    size: int
    root: bytes
    level: Level
    quorum: bool | None
    asked: tuple[Asked, ...] = ()
    reasons: tuple[Reason, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether all that had to come came: the quorum where witnesses were asked, and every timestamp."""
        witnesses = [item for item in self.asked if item.kind == COSIGNATURE_ANCHOR]
        stamps = [item for item in self.asked if item.kind == TIMESTAMP_ANCHOR]
        cosigned = all(item.good for item in witnesses) if self.quorum is None else self.quorum or not witnesses
        return self.level is not Level.DIVERGED and cosigned and all(item.good for item in stamps)

    @property
    def exit_code(self) -> int:
        """The process status: 0 where it is complete, 30 where it is DIVERGED, else 3."""
        if self.level is Level.DIVERGED:
            return Level.DIVERGED.exit_code
        return 0 if self.complete else AnchorError.exit_code

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `anchor --json` prints them."""
        return {
            "level": self.level.name,
            "origin": self.origin,
            "size": self.size,
            "root": base64.b64encode(self.root).decode(),
            "quorum": self.quorum,
            "asked": [asdict(item) for item in self.asked],
            "reasons": [asdict(item) for item in self.reasons],
        }


class _DivergedError(Exception):
    """A witness has seen another history."""

    def __init__(self, asked: Asked, reason: Reason) -> None:
        super().__init__(asked.message)
        self.asked = asked
        self.reason = reason


@dataclass
class _Job:
    """One trail at one state, and whose statements count."""

    home: Path
    policy: TrustPolicy
    tsa_roots: Sequence[bytes]
    reader: TrailReader
    keys: KeySuccession
    head: Checkpoint
    folder: AnchorFolder
    timeout: float = TIMEOUT
    reasons: list[Reason] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        location: Path | str,
        policy: TrustPolicy | None,
        tsa_roots: Sequence[bytes] | None,
        home: Path | None,
        timeout: float = TIMEOUT,
    ) -> _Job:
        folder = store_path(location).parent
        home = home_folder(home)
        roots = trusted_authorities(home) if tsa_roots is None else tsa_roots
        # The last-seen head is read before the state that is compared with it: another process may be appending.
        seen = Heads(home).note(TrailReader.open(folder).origin)
        reader = TrailReader.open(folder)
        trusted = policy or local_policy(home, reader.origin)
        keys = KeySuccession(reader.origin, known_limits(home, reader.origin))
        entries = [entry for kind in sorted(KEY_TYPES) for entry in reader.entries(type=kind)]
        for entry in sorted(entries, key=lambda item: item.index):
            keys.add(entry)
        head = keys.check(trusted, reader.checkpoint()).checkpoint
        if reader.root() != head.root:
            raise FormatError("Its root is not that of the entries in the store.", code="root")
        job = cls(home, trusted, roots, reader, keys, head, AnchorFolder(folder), timeout)
        root = None if seen is None or checkpoint_of(seen).size > reader.size else reader.root(checkpoint_of(seen).size)
        diverged = compare_with_seen(Heads(home), seen, reader.checkpoint(), root)
        if diverged is not None:
            job.reasons.append(diverged)
        return job

    def logs(self, size: int) -> Sequence[Verifier]:
        """The log's keys for a checkpoint of this size."""
        return self.keys.log_verifiers([key for key in self.policy.logs if key.name == self.head.origin], size)

    def anchors(self, size: int) -> tuple[tuple[Anchor, ...], tuple[Reason, ...]]:
        """What is there for one size; a trail may have been anchored many thousand times."""
        names = [name for name in self.folder.names() if name.partition(".")[0] == str(size)]
        return read_anchors(self.folder.read, names, self.policy, self.head.origin, self.tsa_roots, logs=self.logs)

    def result(self, asked: Iterable[Asked] = ()) -> Anchoring:
        anchors, said = self.anchors(self.head.size)
        level = anchored_level(self.policy, anchors, self.head.size, self.head.root)
        forked = bool(self.reasons) or any(reason.code == "anchor-fork" for reason in said)
        quorum = None
        if self.policy.quorum != "none":
            quorum = quorum_reached(self.policy, anchors, self.head.size, self.head.root)
        return Anchoring(
            self.head.origin,
            self.head.size,
            self.head.root,
            Level.DIVERGED if forked else level,
            quorum,
            tuple(asked),
            (*self.reasons, *said),
        )


@dataclass(frozen=True)
class _WitnessAt:
    """A witness that can be asked: its address, and the keys that its cosignatures may be made with."""

    url: str
    verifiers: tuple[Verifier, ...]


def anchor_trail(
    location: Path | str,
    *,
    policy: TrustPolicy | None = None,
    witnesses: Sequence[str] | None = None,
    authorities: Sequence[str] = (),
    tsa_roots: Sequence[bytes] | None = None,
    home: Path | None = None,
    endorse: Callable[[str], str] | None = None,
    timeout: float = TIMEOUT,
) -> Anchoring:
    """Ask for cosignatures and timestamps of a trail's newest checkpoint, and keep them in its ``anchors/``.

    Args:
        location: the trail's folder.
        policy: whose signatures count; ``None`` trusts the user's own key, and then no witness.
        witnesses: the witnesses to ask, by the policy's names for them or by address; ``None`` asks every one that has
            an address in the policy.
        authorities: addresses of timestamping authorities.
        tsa_roots: certificates (PEM) that are trusted to name authorities; ``None`` takes those in ``HOME/tsa``.
        home: the folder of keys and last-seen heads; ``None`` takes ``RLHF_AUDIT_HOME`` or the user's own.
        endorse: adds a signature of the log's own that is meant to last to a checkpoint (`KeyRing.endorse`).
        timeout: seconds that each may take to answer.

    Raises:
        AnchorError: the newest checkpoint is not signed by whom the policy trusts.
        ConfigError: there is nobody to ask, or an address or a name is no witness's.
        StoreError: the trail cannot be read, or the anchors cannot be written.
        KeyFileError: no policy was given and the user has no key for this trail.
    """
    job = _opened(location, policy, tsa_roots, home, timeout)
    chosen = _chosen(job.policy, witnesses)
    for url in authorities:
        check_url(url)
    if not chosen and not authorities:
        raise ConfigError(
            "There is nobody to ask: no timestamping authority was named, and no witness with an address.",
            next_step="Name one: --tsa URL, or --policy FILE with `witness NAME VKEY URL` lines.",
            code="nobody",
        )
    if authorities and not job.tsa_roots:
        raise ConfigError(
            "No timestamping authority is trusted here, so its answer could not be verified.",
            next_step=f"Put its root certificate (PEM) into {job.home / 'tsa'}, or name it with --tsa-ca FILE.",
            code="tsa-ca",
        )
    if job.reasons:
        return job.result()
    return _ask_all(job, chosen, authorities, endorse)


def _opened(
    location: Path | str,
    policy: TrustPolicy | None,
    tsa_roots: Sequence[bytes] | None,
    home: Path | None,
    timeout: float = TIMEOUT,
) -> _Job:
    try:
        return _Job.open(location, policy, tsa_roots, home, timeout)
    except FormatError as error:
        raise AnchorError(
            f"The newest checkpoint cannot be anchored: {error.message}",
            next_step="Check the trail with `rlhf-audit verify`, and the policy.",
            code=error.reason,
        ) from error


def _keep(job: _Job, endorse: Callable[[str], str] | None) -> bytes:
    note = job.reader.checkpoint()
    if endorse is not None and job.folder.read(f"{job.head.size}.checkpoint") is None:
        note = endorse(note)
    return job.folder.keep(note)


def keep_checkpoint(
    location: Path | str,
    *,
    policy: TrustPolicy | None = None,
    home: Path | None = None,
    endorse: Callable[[str], str] | None = None,
) -> Path:
    """Keep the newest checkpoint as the file that an authority timestamps, and ask nobody; that file.

    Raises:
        AnchorError: it is not signed by whom the policy trusts, or is not of the history seen before (``diverged``).
        StoreError: the trail cannot be read, or the anchors cannot be written.
        KeyFileError: no policy was given and the user has no key for this trail.
    """
    job = _opened(location, policy, (), home)
    if job.reasons:
        raise AnchorError(
            f"The newest checkpoint cannot be anchored: {job.reasons[0].message}",
            next_step="Keep the trail and the evidence as they are; `rlhf-audit verify` says more.",
            code="diverged",
        )
    _keep(job, endorse)
    return job.folder.path / f"{job.head.size}.checkpoint"


def _ask_all(
    job: _Job, chosen: Sequence[_WitnessAt], authorities: Sequence[str], endorse: Callable[[str], str] | None
) -> Anchoring:
    kept = _keep(job, endorse)
    before, _ = job.anchors(job.head.size)
    asked: list[Asked] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = [pool.submit(_ask_witness, job, one, kept, before) for one in chosen]
        answers += [pool.submit(_ask_authority, job, url, kept, before) for url in authorities]
        for answer in answers:
            try:
                asked.append(answer.result())
            except _DivergedError as error:
                asked.append(error.asked)
                job.reasons.append(error.reason)
    return job.result(asked)


def _chosen(policy: TrustPolicy, witnesses: Sequence[str] | None) -> list[_WitnessAt]:
    """Whom to ask: each address once, with the keys that are the policy's for it."""
    addresses = {name: policy.urls.get(format_vkey(key)) for name, key in policy.witnesses.items()}
    if witnesses is None:
        urls = [url for url in addresses.values() if url is not None]
    else:
        urls = [_address(word, addresses) for word in witnesses]
    found = []
    for url in dict.fromkeys(urls):
        own = tuple(policy.witnesses[name] for name, address in addresses.items() if address == url)
        found.append(_WitnessAt(check_url(url), own or tuple(policy.witnesses.values())))
    if found and not policy.witnesses:
        raise ConfigError(
            "The trust policy names no witness, so nobody could tell whose cosignature it is.",
            next_step="Put a line into the policy, `witness NAME VKEY URL`, with the key that the witness's operator "
            "gave you, and name it with --policy.",
            code="no-witness",
        )
    return found


def _address(word: str, addresses: dict[str, str | None]) -> str:
    if "://" in word:
        return word
    url = addresses.get(word)
    if url is None:
        why = "has no address in the trust policy" if word in addresses else "is not in the trust policy"
        raise ConfigError(
            f"The witness {word!r} {why}.",
            next_step="Name it as the policy does, or by its address.",
            code="no-witness",
        )
    return url


def _last_size(job: _Job, verifiers: Sequence[Verifier]) -> int:
    """The last size that one of these keys has cosigned, as far as is known here."""
    vkeys = {format_vkey(verifier) for verifier in verifiers}
    for size in cosigned_sizes(job.folder, job.head.size):
        if any(anchor.by in vkeys for anchor in job.anchors(size)[0]):
            return size
    return 0


def _ask_witness(job: _Job, witness: _WitnessAt, kept: bytes, before: Sequence[Anchor]) -> Asked:
    vkeys = {format_vkey(verifier) for verifier in witness.verifiers}
    had = [anchor for anchor in before if anchor.by in vkeys]
    if len(had) == len(vkeys):
        return Asked(COSIGNATURE_ANCHOR, witness.url, "kept", "Its cosignature was there before.", had[0].time)
    asking = _Asking(job, witness, kept.decode())
    try:
        return asking.ask()
    except AuditError as error:
        return asking.refused(error.reason, error.message)


@dataclass
class _Asking:
    """One witness being asked to cosign one checkpoint."""

    job: _Job
    witness: _WitnessAt
    note: str

    def refused(self, outcome: str, message: str) -> Asked:
        return Asked(COSIGNATURE_ANCHOR, self.witness.url, outcome, message)

    def ask(self) -> Asked:
        old = _last_size(self.job, self.witness.verifiers)
        for _ in range(_TRIES):
            answer = self._post(old)
            if answer.status == _OK:
                return self._take(answer)
            if answer.status != _CONFLICT or answer.kind != _SIZE_KIND:
                return self._not_given(answer)
            last = parse_size(answer.body.decode("ascii", "replace").removesuffix("\n"), "size that it cosigned last")
            if last > self.job.head.size:
                what = f"It has cosigned {last} entries; this trail has {self.job.head.size}: entries were taken away."
                return self._contradicted("rollback", what)
            if last == old:
                return self._contradicted("fork", _FORKED)
            old = last
        return self.refused("stale", "It cosigns for somebody else at this moment; ask again.")

    def _post(self, old: int) -> Answer:
        reader, head = self.job.reader, self.job.head
        asked = submission_of(self.note, old, reader.consistency_proof)
        # A damaged store must not look like a forked history.
        if old and not check_consistency(old, head.size, asked.proof, reader.root(old), head.root):
            raise StoreError(f"The tree in the store is damaged below entry {old}.", code="damaged")
        url = self.witness.url.rstrip("/") + "/add-checkpoint"
        return post(url, format_submission(asked), "text/plain; charset=utf-8", timeout=self.job.timeout)

    def _take(self, answer: Answer) -> Asked:
        """Keep the lines of the answer that the witness's keys have made."""
        plain = parse_note(self.note)
        try:
            lines = parse_note(plain.text.encode() + b"\n" + answer.body).signatures
            good = {item.verifier: item.time for item in verify_note(Note(plain.text, lines), self.witness.verifiers)}
        except FormatError as error:
            message = f"It answered with no cosignature by a key that the policy has for it: {error.message}"
            return self.refused("unknown-key", message)
        when = max(good.values())
        if when > time.time() + CLOCK_SKEW:
            return self.refused("refused", "Its cosignature is dated in the future by this machine's clock.")
        idents = {(verifier.name, verifier.key_id) for verifier in good}
        own = [line for line in lines if (line.name, line.key_id) in idents]
        self.job.folder.cosign(plain.plus(*own).format())
        return Asked(COSIGNATURE_ANCHOR, self.witness.url, "given", f"Cosigned by {own[0].name}.", when)

    def _not_given(self, answer: Answer) -> Asked:
        if answer.status == _UNPROCESSABLE:  # to a proof that is right: of this trail's own tree
            return self._contradicted("fork", _FORKED)
        outcome, message = _REFUSALS.get(answer.status, ("refused", f"It answered with status {answer.status}."))
        return self.refused(outcome, message)

    def _contradicted(self, code: str, what: str) -> Asked:
        """The proof that a witness is for: the last head that it has cosigned, kept beside ours.

        Raises:
            _DivergedError: it shows such a head, or shows nothing, and then this rests on its word.
        """
        job, shown = self.job, self._shown()
        if shown is None:
            where = "It shows no signed head of the other history, so this rests on its word: ask its operator for one."
        else:
            theirs = checkpoint_of(shown)
            if theirs.size <= job.head.size and job.reader.root(theirs.size) == theirs.root:
                return self.refused(
                    "refused", "It refuses a proof that is right, and shows a head of this very history."
                )
            kept = Heads(job.home).keep_evidence(job.head.origin, shown, self.note)
            where = f"Both signed heads are kept in {kept}."
        raise _DivergedError(self.refused(code, what), Reason(code, self.witness.url, f"{what} {where}"))

    def _shown(self) -> str | None:
        """The last checkpoint that the witness has cosigned, where it shows one that the log has signed."""
        job = self.job
        try:
            name = sha256(job.head.origin.encode()).hexdigest()
            shown = get(f"{self.witness.url.rstrip('/')}/{name}/checkpoint", timeout=job.timeout)
            head, note = checkpoint_of(shown.body), parse_note(shown.body)
            verify_note(note, [*job.logs(head.size), *job.logs(job.head.size)])
        except AuditError:
            return None
        return note.format() if head.origin == job.head.origin else None


def _ask_authority(job: _Job, url: str, kept: bytes, before: Sequence[Anchor]) -> Asked:
    place = f"anchors/{job.head.size}.{token_name(url)}.tsr"
    had = [anchor for anchor in before if anchor.where == place]
    if had:
        return Asked(TIMESTAMP_ANCHOR, url, "kept", f"Its timestamp was there before ({had[0].by}).", had[0].time)
    try:
        token = ask_authority(url, kept, job.tsa_roots, now=time.time(), timeout=job.timeout)
        job.folder.stamp(job.head.size, url, token.response)
    except AuditError as error:
        return Asked(TIMESTAMP_ANCHOR, url, error.reason, error.message)
    return Asked(TIMESTAMP_ANCHOR, url, "given", f"Timestamped by {token.authority}.", token.time)


def request_cosignature(location: Path | str, old: int | None = None, *, witness: str | None = None) -> bytes:
    """The request to cosign a trail's newest checkpoint, to be carried to a witness that no network reaches.

    Args:
        location: the trail's folder.
        old: the size that the witness cosigned last; ``None`` takes the last that is known here, else 0.
        witness: the witness's name (in its signature lines), where ``old`` is to be found out.

    Raises:
        StoreError: the trail cannot be read.
        FormatError: ``old`` is larger than the trail.
    """
    folder = store_path(location).parent
    reader = TrailReader.open(folder)
    if old is None:
        old = _known_size(AnchorFolder(folder), witness, reader.size)
    note = reader.checkpoint()
    kept = AnchorFolder(folder).read(f"{reader.size}.checkpoint")
    if kept is not None and checkpoint_of(kept) == checkpoint_of(note):
        note = kept.decode()
    return format_submission(submission_of(note, old, reader.consistency_proof))


def _known_size(folder: AnchorFolder, witness: str | None, most: int) -> int:
    """The last size with a line of this name (of anybody but the log, where no name is given); only a hint."""
    for size in cosigned_sizes(folder, most):
        try:
            note = parse_note(folder.cosigned(size) or "")
        except FormatError:
            continue  # `verify` tells of it
        signers = {line.name for line in note.signatures} - {note.text.partition("\n")[0]}
        if witness in signers or (witness is None and signers):
            return size
    return 0


def add_anchor(
    location: Path | str,
    data: bytes,
    *,
    policy: TrustPolicy | None = None,
    tsa_roots: Sequence[bytes] | None = None,
    home: Path | None = None,
    name: str = "file",
) -> Asked:
    """Keep a statement that came as a file: a cosigned checkpoint, or an authority's answer for a kept checkpoint.

    Raises:
        AnchorError: it is not of this trail, or of nobody who is trusted; ``diverged`` where the log has signed another
            history, both signed heads being kept as evidence.
        StoreError: the trail cannot be read, or the anchors cannot be written.
    """
    job = _opened(location, policy, tsa_roots, home)
    try:
        return _add_token(job, data, name) if data[:1] == b"\x30" else _add_note(job, data)
    except FormatError as error:
        raise AnchorError(
            f"{name} cannot be kept as an anchor: {error.message}",
            next_step="Check that it is the answer of a witness that the policy names, or of an authority that is "
            "trusted here (--tsa-ca).",
            code=error.reason,
        ) from error


def _add_note(job: _Job, data: bytes) -> Asked:
    note = parse_note(data)
    head = checkpoint_of(data)
    if head.origin != job.head.origin:
        raise FormatError(f"It is of {head.origin}, not of {job.head.origin}.", code="origin")
    logs = job.logs(head.size)
    held = verify_note(note, [*logs, *job.policy.witnesses.values()])
    if not any(item.verifier in logs for item in held):
        raise FormatError("The log's key has not signed it.", code="unsigned")
    witnesses = set(job.policy.witnesses.values())
    good = {item.verifier: item.time for item in held if item.verifier in witnesses}
    if head.size > job.head.size or job.reader.root(head.size) != head.root:
        kept = Heads(job.home).keep_evidence(head.origin, note.format(), job.reader.checkpoint())
        raise AnchorError(
            f"The log's key has signed another history, of size {head.size}; both signed heads are kept in {kept}.",
            next_step="Keep the trail as it is. `rlhf-audit witness evidence --help` says how others can check this.",
            code="diverged",
        )
    if not good:
        raise FormatError("No witness that the policy names has cosigned it.", code="unknown-key")
    idents = {(item.verifier.name, item.verifier.key_id) for item in held}
    own = Note(note.text, tuple(line for line in note.signatures if (line.name, line.key_id) in idents))
    job.folder.keep(own.format())
    job.folder.cosign(own.format())
    names = ", ".join(sorted({verifier.name for verifier in good}))
    return Asked(COSIGNATURE_ANCHOR, names, "given", f"Size {head.size} cosigned by {names}.", max(good.values()))


def _add_token(job: _Job, data: bytes, name: str) -> Asked:
    error: FormatError | None = None
    for file in sorted(job.folder.names(), reverse=True):
        size, _, kind = file.partition(".")
        kept = job.folder.read(file) if kind == "checkpoint" and size.isdecimal() else None
        if kept is None:
            continue
        try:
            token = check_token(data, kept, job.tsa_roots)
        except FormatError as wrong:
            error = wrong if error is None or wrong.reason == "tsa-unknown" else error
            continue
        job.folder.stamp(int(size), Path(name).stem, data)
        message = f"Size {size} timestamped by {token.authority}."
        return Asked(TIMESTAMP_ANCHOR, token.authority, "given", message, token.time)
    raise error or FormatError("There is no checkpoint in anchors/ that it could be a timestamp of.", code="timestamp")
