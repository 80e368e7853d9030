"""Opening and verifying a record, with nothing but the file and a public key. Floor 3.

The order of trust: the policy (or the user's own key for the origin) names the log key; the log key, or one that
signed entries lead to from it, signs the checkpoint; the checkpoint covers the entries; the first entry and the
``key.*`` entries name the record key of the record's time; the record key (and the ML-DSA-44 key, where the trail
names one) signs the statement; the entry ``record.sealed`` and the statement name the notebook's digest. Each link is
checked, and what does not hold is named by its place. Nothing in the file is trusted because it is in the file.
What was added to the seal later, statements of others (`additions`) and anchors (`anchors`), is checked against it.

A verdict is INVALID where anything does not hold, DIVERGED where a head of this trail that was seen on this machine, or
one that the log has signed in an anchor, contradicts the record's checkpoint, UNANCHORED where all holds and no one
else has witnessed the checkpoint or a later one, TIMESTAMPED where a trusted authority has, COSIGNED where the policy's
quorum of witnesses has. `OpenedRecord.notes` holds what is worth knowing and is no fault.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.config import DEFAULT_TRAIL, AuditConfig
from rlhf_audit_nb.errors import AuditError, EntryError, FormatError, KeyFileError, RecordError
from rlhf_audit_nb.events import RecordSealed, RecordStarted, TrailCreated
from rlhf_audit_nb.records import checks
from rlhf_audit_nb.records.additions import Addition, check_additions
from rlhf_audit_nb.records.anchors import AnchorCheck
from rlhf_audit_nb.records.checks import SEAL
from rlhf_audit_nb.records.normal_form import SEAL_KEY, NormalFormError, manifest_of, parse_json
from rlhf_audit_nb.records.related import EVALUATION_TYPES
from rlhf_audit_nb.records.reproductions import reproduction_notes
from rlhf_audit_nb.records.seal import Seal, SealError, parse_seal
from rlhf_audit_nb.records.statement import event_of, only
from rlhf_audit_nb.trail import Level, Reason, TrailReader, TrustPolicy, Verdict, check_entries
from rlhf_audit_nb.trail.checkpoint import Checkpoint, checkpoint_of
from rlhf_audit_nb.trail.heads import Heads
from rlhf_audit_nb.trail.keys import home_folder, local_policy
from rlhf_audit_nb.trail.merkle import check_consistency
from rlhf_audit_nb.trail.succession import known_limits
from rlhf_audit_nb.trail.verdict import DIVERGING, Anchor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rlhf_audit_nb.trail import Entry, RunSummary
    from rlhf_audit_nb.trail.policy import CheckedCheckpoint
    from rlhf_audit_nb.trail.succession import KeySuccession, Limit

__all__ = ["OpenedRecord", "open_record", "read_record", "verify_record"]


@dataclass(frozen=True)
class OpenedRecord:
    """A record that was read, and what verifying it found.

    Args:
        verdict: level and reasons; nothing below is evidence under INVALID or DIVERGED.
        entries: those of its entries that a trusted checkpoint covers.
        content: the notebook as plain JSON values, ``None`` where the file is no notebook.
        metadata: the seal as it stands in the file, ``None`` where it is missing.
        notes: what is worth knowing and no fault: outputs updated after their cell ran, a refreshed kernel name.
        statement: the statement as it stands in the seal, empty where it cannot be read.
        started: how the record began, ``None`` where its entry is missing or not proven.
        sealed: how it ended, likewise.
        additions: what others say of it: those whose signature, subject and place hold, whoever has signed them.
    """

    verdict: Verdict
    entries: tuple[Entry, ...] = ()
    content: dict[str, Any] | None = field(default=None, repr=False)
    metadata: dict[str, Any] | None = field(default=None, repr=False)
    notes: tuple[Reason, ...] = ()
    statement: dict[str, Any] = field(default_factory=dict)
    started: RecordStarted | None = None
    sealed: RecordSealed | None = None
    additions: tuple[Addition, ...] = ()

    @cached_property
    def notebook(self) -> Any:
        """The notebook as nbformat's node, multi-line text joined; ``None`` where the file is no notebook."""
        if self.content is None:
            return None
        # Here and not above: verifying needs no nbformat, whose import takes longer than verifying does.
        from nbformat.v4 import to_notebook

        try:
            return to_notebook(_copied(self.content))
        except (AttributeError, KeyError, TypeError):
            # Outputs or attachments of a shape that nbformat cannot hold; the verdict has named them.
            return None


def open_record(
    path: Path | str,
    *,
    policy: TrustPolicy | None = None,
    home: Path | None = None,
    tsa_roots: Sequence[bytes] | None = None,
) -> OpenedRecord:
    """Reads and verifies a record.

    Args:
        path: the executed notebook: a file, or as text an address that papermill can read.
        policy: whose signatures count; ``None`` takes the user's own key for the record's trail.
        home: the folder of keys and last-seen heads; ``None`` takes ``RLHF_AUDIT_HOME`` or the user's own.
        tsa_roots: certificates (PEM) of the timestamping authorities that are trusted; ``None`` takes the home's.

    Raises:
        RecordError: it cannot be read.
        KeyFileError: there is no policy and no key of the user's own for this trail.
    """
    if isinstance(path, str) and "://" in path:
        # Here and not above: a file needs neither papermill nor nbformat.
        from rlhf_audit_nb.records.places import read_place

        return read_record(read_place(path), policy=policy, home=home, tsa_roots=tsa_roots)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise RecordError(
            f"The record {path} cannot be read: {error.strerror or error}.",
            next_step="Name an executed notebook (.ipynb) that exists.",
            code="no-record",
        ) from error
    beside = (Path(path).parent / DEFAULT_TRAIL,)
    return read_record(data, policy=policy, home=home, trails=beside, tsa_roots=tsa_roots)


def verify_record(
    path: Path | str,
    *,
    policy: TrustPolicy | None = None,
    home: Path | None = None,
    tsa_roots: Sequence[bytes] | None = None,
) -> Verdict:
    """The verdict on a record; arguments and errors as `open_record`."""
    return open_record(path, policy=policy, home=home, tsa_roots=tsa_roots).verdict


def read_record(
    data: bytes,
    *,
    policy: TrustPolicy | None = None,
    home: Path | None = None,
    trails: tuple[Path, ...] = (),
    tsa_roots: Sequence[bytes] | None = None,
) -> OpenedRecord:
    """`open_record` for a record's bytes.

    ``trails`` are folders in which the record's trail may lie, beside the usual one. It is needed only to compare the
    record's checkpoint with a last-seen head of another size.
    """
    try:
        notebook = parse_json(data)
    except NormalFormError as error:
        return _refused(Reason(error.reason, "file", error.message))
    shape = checks.check_shape(notebook)
    if shape:
        return _refused(*shape)
    raw = notebook["metadata"].get(SEAL_KEY)
    if raw is None:
        message = "The notebook carries no seal: it was not run into a record, or the seal was taken away."
        return _refused(Reason("no-seal", SEAL, message), notebook=notebook)
    try:
        seal = parse_seal(raw)
    except SealError as error:
        return _refused(Reason(error.reason, f"{SEAL}.{error.where}".rstrip("."), error.message), notebook=notebook)
    try:
        head = checkpoint_of(seal.checkpoint)
    except FormatError as error:
        return _refused(Reason(error.reason, f"{SEAL}.checkpoint", error.message), notebook=notebook)
    places = (AuditConfig().trail_location(), *trails)
    return _Verification(notebook, raw, seal, head, home_folder(home), places, tsa_roots).opened(policy)


def _refused(*reasons: Reason, notebook: dict[str, Any] | None = None) -> OpenedRecord:
    verdict = Verdict(level=Level.INVALID, origin="", size=0, root="", signers=(), runs=(), reasons=reasons)
    return OpenedRecord(verdict, content=notebook)


def _copied(value: Any) -> Any:
    """A deep copy of a JSON value."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


class _Verification:
    """One pass over a record whose file could be read."""

    def __init__(
        self,
        notebook: dict[str, Any],
        raw: Any,
        seal: Seal,
        head: Checkpoint,
        home: Path,
        trails: tuple[Path, ...],
        tsa_roots: Sequence[bytes] | None,
    ) -> None:
        self._notebook = notebook
        self._raw = raw
        self._seal = seal
        self._head = head
        self._home = home
        self._trails = trails
        self._tsa_roots = tsa_roots
        self._entries = tuple(item.entry for item in seal.entries)
        self._statement = checks.claims(seal)
        self._reasons: list[Reason] = []
        self._notes: list[Reason] = []
        self._runs: tuple[RunSummary, ...] = ()
        self._started: RecordStarted | None = None
        self._sealed: RecordSealed | None = None
        self._keys: KeySuccession | None = None
        self._additions: tuple[Addition, ...] = ()
        self._anchors: tuple[Anchor, ...] = ()

    def opened(self, policy: TrustPolicy | None) -> OpenedRecord:
        """Everything, in the order of trust; what rests on a broken link is left out rather than guessed."""
        proven = self._check_entries()
        if proven:
            self._check_content()
        trusted, checked = self._check_trust(policy)
        level = self._level(trusted, checked) if proven and trusted and checked else Level.INVALID
        verdict = Verdict(
            level=level,
            origin=self._head.origin,
            size=self._head.size,
            root=self._head.root_base64,
            signers=checked.signers if checked else (),
            runs=self._runs,
            reasons=tuple(self._reasons),
            anchors=self._anchors,
        )
        if level not in (Level.INVALID, Level.DIVERGED):
            self._notes += reproduction_notes(self._additions, self._sealed)
        return OpenedRecord(
            verdict,
            entries=self._entries if proven and checked else (),
            content=self._notebook,
            metadata=self._raw,
            notes=tuple(self._notes),
            statement=self._statement,
            started=self._started,
            sealed=self._sealed,
            additions=self._additions if proven and checked else (),
        )

    def _check_entries(self) -> bool:
        """Whether the entries are whole and are what the checkpoint covers."""
        self._reasons += checks.check_included(self._seal, self._head, self._statement)
        known = checks.check_events(self._seal)
        if not self._reasons:
            # A changed index puts an entry out of order as well; that its proof fails names it better.
            self._reasons += checks.check_order(self._seal)
        named = {reason.where for reason in self._reasons}
        self._reasons += [reason for reason in known if reason.where not in named]
        return not self._reasons

    def _check_content(self) -> None:
        try:
            # The first leaf of the tree, and no later entry that calls itself so, says which keys act for the trail.
            first = [entry for entry in self._entries if entry.index == 0]
            _, created = only(first, TrailCreated)
            _, started = only(self._entries, RecordStarted, self._seal.record)
            sealed_at, sealed = only(self._entries, RecordSealed, self._seal.record)
        except (RecordError, EntryError) as error:
            where = "record" if self._of_another_record() else "entries"
            self._reasons.append(Reason(error.reason, f"{SEAL}.{where}", error.message))
            return
        self._started, self._sealed = started, sealed
        self._check_origin(created)
        self._reasons += checks.check_version(self._seal, sealed)
        self._reasons += checks.check_belonging(self._seal)
        self._reasons += checks.check_related(self._seal, sealed)
        self._check_trail(sealed_at.index, sealed)
        self._check_keys(sealed_at.index)
        self._check_streams()
        self._check_notebook(started, sealed)
        self._additions, reasons, notes = check_additions(self._seal, sealed.digest)
        self._reasons += reasons
        self._notes += notes

    def _check_trail(self, sealed_at: int, sealed: RecordSealed) -> None:
        """What the record leaves out, where its own trail is at hand to tell."""
        if not any(entry.type in EVALUATION_TYPES for entry in self._entries):
            return
        for location in self._trails:
            try:
                reader = TrailReader.open(location)
                whole = reader.origin == self._head.origin and reader.size >= self._head.size
                if whole and reader.root(self._head.size) == self._head.root:
                    self._reasons += checks.check_trail(self._seal, sealed, sealed_at, reader)
                    return
            except AuditError:
                # Not a readable trail: it is not what is being verified here.
                continue

    def _check_keys(self, sealed_at: int) -> None:
        keys = self._keys = checks.succession(self._entries, self._head.origin, self._limits())
        places = {f"entry {entry.index}": f"{SEAL}.entries[{i}]" for i, entry in enumerate(self._entries)}
        self._reasons += [Reason(item.code, places.get(item.where, SEAL), item.message) for item in keys.reasons]
        reasons, notes = checks.check_statement(self._seal, self._entries, keys, sealed_at)
        self._reasons += reasons
        self._notes += notes

    def _limits(self) -> Mapping[str, Limit]:
        return known_limits(self._home, self._head.origin)

    def _of_another_record(self) -> bool:
        records = {event_of(e, RecordStarted).record for e in self._entries if e.type == RecordStarted.TYPE}
        return len(records) == 1 and self._seal.record not in records

    def _check_origin(self, created: TrailCreated) -> None:
        if created.origin != self._head.origin:
            message = f"The checkpoint is of {self._head.origin!r}, and the trail is {created.origin!r}."
            self._reasons.append(Reason("origin", f"{SEAL}.checkpoint", message))

    def _check_streams(self) -> None:
        reasons, self._runs = check_entries(self._entries, whole=False)
        places = {f"entry {entry.index}": f"{SEAL}.entries[{i}]" for i, entry in enumerate(self._entries)}
        self._reasons += [
            Reason(item.code, places.get(item.where, f"{SEAL}.entries"), item.message) for item in reasons
        ]

    def _check_notebook(self, started: RecordStarted, sealed: RecordSealed) -> None:
        present = manifest_of(self._notebook)
        changed = checks.check_notebook(self._notebook, self._seal, sealed, present)
        changed += checks.check_parameters(self._notebook, started)
        reasons, notes = checks.check_kernel(self._notebook, started)
        if not changed:
            more, updated = checks.check_cells(self._notebook, self._entries, started, present)
            reasons, notes = [*reasons, *more], [*notes, *updated]
        self._reasons += [*changed, *reasons]
        self._notes += notes

    def _check_trust(self, policy: TrustPolicy | None) -> tuple[TrustPolicy | None, CheckedCheckpoint | None]:
        try:
            trusted = policy or local_policy(self._home, self._head.origin)
            keys = self._keys or checks.succession((), self._head.origin, self._limits())
            return trusted, keys.check(trusted, self._seal.checkpoint)
        except KeyFileError:
            if not self._reasons:
                raise
            # Already INVALID by what the file itself shows; whose signatures count no longer matters.
            return None, None
        except FormatError as error:
            self._reasons.insert(0, Reason(error.reason, f"{SEAL}.checkpoint", error.message))
            return None, None

    def _level(self, trusted: TrustPolicy, checked: CheckedCheckpoint) -> Level:
        sound = not self._reasons
        reached, forked = self._check_anchors(trusted)
        if not sound or {reason.code for reason in self._reasons} - DIVERGING:
            return Level.INVALID
        if forked:
            Heads(self._home).keep_evidence(self._head.origin, self._seal.checkpoint, forked[0])
            return Level.DIVERGED
        if self._diverged():
            return Level.DIVERGED
        level = Level.COSIGNED if checked.cosigned else reached
        if trusted.quorum != "none" and level is not Level.COSIGNED:
            message = f"The policy's quorum {trusted.quorum} has not cosigned the checkpoint."
            self._reasons.append(Reason("quorum", f"{SEAL}.checkpoint", message))
        return level

    def _check_anchors(self, trusted: TrustPolicy) -> tuple[Level, list[str]]:
        """How far the anchors reach, and checkpoints in them that contradict the record's."""
        check = AnchorCheck(self._head, self._entries, self._limits(), trusted, self._authorities)
        reached = check.check(self._seal.anchors)
        self._reasons += check.reasons
        self._notes += check.notes
        self._anchors = tuple(check.anchors)
        return reached, check.forked

    def _authorities(self) -> Sequence[bytes]:
        if self._tsa_roots is None:
            # Here and not above: most records carry no timestamp, and what reads one takes a while to import.
            from rlhf_audit_nb.trail.timestamp import trusted_authorities

            self._tsa_roots = trusted_authorities(self._home)
        return self._tsa_roots

    def _diverged(self) -> bool:
        """Whether a head seen on this machine contradicts the checkpoint; a new, larger one is remembered."""
        heads, origin = Heads(self._home), self._head.origin
        note = heads.note(origin)
        seen = checkpoint_of(note) if note is not None else None
        agrees = self._agrees(seen) if seen is not None else True
        if agrees:
            self._remember(heads)
            return False
        assert note is not None
        assert seen is not None
        if agrees is None:
            message = (
                f"A checkpoint of size {seen.size} was seen here; that it and the record's (size {self._head.size}) "
                "are of one history could not be checked without the trail."
            )
            self._notes.append(Reason("head-unchecked", f"{SEAL}.checkpoint", message))
            return False
        folder = heads.keep_evidence(origin, note, self._seal.checkpoint)
        message = (
            f"The checkpoint contradicts one of size {seen.size} that was seen on this machine: the trail was "
            f"rewritten or forked. Both are kept in {folder}."
        )
        self._reasons.append(Reason("fork", f"{SEAL}.checkpoint", message))
        return True

    def _remember(self, heads: Heads) -> None:
        try:
            heads.advance(self._head.origin, self._seal.checkpoint)
        except AuditError as error:
            message = f"{error.message} A later fork could go unseen."
            self._notes.append(Reason("last-seen", str(heads.path(self._head.origin)), message))

    def _agrees(self, seen: Checkpoint) -> bool | None:
        """Whether two heads are of one history; ``None`` where that takes a trail that is not here."""
        first, second = sorted((seen, self._head), key=lambda head: head.size)
        if first.size == second.size:
            return first.root == second.root
        for location in self._trails:
            try:
                reader = TrailReader.open(location)
                if reader.origin != second.origin or reader.size < second.size:
                    continue
                proof = reader.consistency_proof(first.size, second.size)
            except AuditError:
                # Not a readable trail: it is not what is being verified here.
                continue
            return check_consistency(first.size, second.size, proof, first.root, second.root)
        return None
