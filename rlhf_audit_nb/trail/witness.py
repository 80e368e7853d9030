"""A witness: it cosigns the checkpoints of other people's trails, and remembers which. Floor 0.

A witness signs that a checkpoint is, as of a time, the largest consistent one it has seen of an origin. That is worth
something because it never forgets and never takes a size back, so its folder is its honour:

====================  =============================================================================================
``witness.json``      its name
``ed25519.pem``       the key of its cosignatures (type 0x04), encrypted where a passphrase was given
``mldsa44.pem``       the second key, where it has one (type 0x06), for what is meant to last
``witness.vkey``      the public halves, a verifier key a line: what goes into a trust policy
``state.sqlite``      the logs it knows, and every head that it has cosigned
``heads/``            pairs of signed heads that contradict each other, or that no proof connected: evidence
====================  =============================================================================================

What a request gets is decided, written and made durable in one transaction, which holds the only write lock, before
anything is signed: of two requests that race one is first, and a machine that stops in between has signed nothing that
it does not remember. The rules and the status codes are those of C2SP tlog-witness v1.0.0. Never restore the folder
from an older copy, and never run two copies of it: a witness that forgets can be made to sign two histories.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from rlhf_audit_nb.config import ENV_PASSPHRASE
from rlhf_audit_nb.errors import AuditError, FormatError, KeyFileError, StoreError
from rlhf_audit_nb.trail.checkpoint import Checkpoint, parse_checkpoint
from rlhf_audit_nb.trail.cosignature import CosignerEd25519, CosignerMLDSA44
from rlhf_audit_nb.trail.durable import sync_folder, write_durably
from rlhf_audit_nb.trail.heads import Heads
from rlhf_audit_nb.trail.merkle import EMPTY_ROOT, HASH_BYTES, check_consistency
from rlhf_audit_nb.trail.note import (
    COSIGNATURE,
    Note,
    check_name,
    decode_base64,
    format_vkey,
    parse_note,
    parse_vkey,
    verify_note,
)
from rlhf_audit_nb.trail.submission import Submission, parse_submission

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.cosignature import Cosigner

__all__ = ["SIZE_KIND", "Known", "Reply", "Witness"]

SIZE_KIND = "text/x.tlog.size"
TEXT_KIND = "text/plain; charset=utf-8"
OK, BAD_REQUEST, FORBIDDEN, NOT_FOUND, CONFLICT, UNPROCESSABLE = 200, 400, 403, 404, 409, 422

_BUSY_SECONDS = 30.0
# How far the clock may stand behind the last cosignature before nothing more is signed.
_CLOCK_SLACK = 300
_TABLES = """
CREATE TABLE logs (vkey TEXT PRIMARY KEY, origin TEXT NOT NULL, added INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE heads (
    origin TEXT NOT NULL, size INTEGER NOT NULL, root BLOB NOT NULL, note TEXT NOT NULL, time INTEGER NOT NULL,
    PRIMARY KEY (origin, size)
) WITHOUT ROWID;
"""
_LATEST = "SELECT size, root, note, time FROM heads WHERE origin = ? ORDER BY size DESC LIMIT 1"
_AT_SIZE = "SELECT size, root, note, time FROM heads WHERE origin = ? AND size = ?"
_REMEMBER = """
INSERT INTO heads (origin, size, root, note, time) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (origin, size) DO UPDATE SET time = excluded.time
"""


@dataclass(frozen=True)
class Reply:
    """What a request gets: an HTTP status, a content type, a body, and one line for the witness's own log.

    ``origin`` and ``size`` are those of the checkpoint, where it could be read.
    """

    status: int
    kind: str
    body: bytes
    said: str
    origin: str = ""
    size: int | None = None


@dataclass(frozen=True)
class Known:
    """A log that a witness knows: its keys, and the last head that it has cosigned (``None``: none yet)."""

    origin: str
    vkeys: tuple[str, ...]
    size: int | None
    root: bytes | None
    time: int | None


@dataclass(frozen=True)
class _Head:
    size: int
    root: bytes
    note: str
    time: int


class _RefusedError(Exception):
    def __init__(self, status: int, said: str, body: bytes | None = None, kind: str = TEXT_KIND) -> None:
        super().__init__(said)
        self.reply = Reply(status, kind, said.encode() + b"\n" if body is None else body, said)


class Witness:
    """An opened witness. Safe for several threads and processes at once."""

    def __init__(self, folder: Path, name: str, cosigners: Sequence[Cosigner], vkeys: Sequence[str] = ()) -> None:
        self.folder = folder
        self.name = name
        self.vkeys = tuple(vkeys) or tuple(format_vkey(cosigner.verifier()) for cosigner in cosigners)
        """Its verifier keys: what goes into a trust policy's ``witness`` lines."""
        self._cosigners = tuple(cosigners)

    @classmethod
    def create(cls, folder: Path | str, name: str, *, passphrase: str | None = None, mldsa: bool = False) -> Witness:
        """Make a witness with keys and an empty memory in ``folder``, which must be new or empty.

        Args:
            folder: where it lives; nobody but the witness's operator should be able to write there.
            name: its name, a schemaless URL as a rule (``witness.example/alice``).
            passphrase: of the keys; ``None`` takes ``RLHF_AUDIT_PASSPHRASE``, else they are not encrypted.
            mldsa: whether it also cosigns with ML-DSA-44.

        Raises:
            KeyFileError: the folder cannot be written, or holds something already.
            FormatError: the name cannot stand in a signature line.
        """
        folder = Path(folder).expanduser().absolute()
        check_name(name, "witness's name")
        cosigners: list[Cosigner] = [CosignerEd25519(name, Ed25519PrivateKey.generate())]
        if mldsa:
            cosigners.append(CosignerMLDSA44(name, MLDSA44PrivateKey.generate()))
        made = cls(folder, name, cosigners)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if any(folder.iterdir()):
                raise KeyFileError(
                    f"The folder {folder} is not empty; a witness is made in a new one.",
                    next_step="Name another folder. A witness's memory is never begun anew.",
                    code="not-empty",
                )
            made._write_keys(_passphrase(passphrase))
            _make_state(folder / "state.sqlite")
            # Last: with this file the witness is there.
            write_durably(folder / "witness.json", json.dumps({"version": 1, "name": name}).encode() + b"\n")
        except (OSError, sqlite3.Error) as error:
            raise KeyFileError(
                f"A witness cannot be made in {folder}: {getattr(error, 'strerror', None) or error}.",
                next_step="Make the folder writable, free some space, or name another one.",
            ) from error
        return made

    def _write_keys(self, secret: bytes | None) -> None:
        sealing = BestAvailableEncryption(secret) if secret else NoEncryption()
        for cosigner in self._cosigners:
            assert isinstance(cosigner, CosignerEd25519 | CosignerMLDSA44)
            data = cosigner.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, sealing)
            write_durably(self.folder / _key_file(cosigner), data)
        write_durably(self.folder / "witness.vkey", "".join(f"{vkey}\n" for vkey in self.vkeys).encode())

    @classmethod
    def open(cls, folder: Path | str, *, passphrase: str | None = None, cosign: bool = True) -> Witness:
        """The witness that lives in ``folder``.

        Args:
            folder: where it lives.
            passphrase: of its keys; ``None`` takes ``RLHF_AUDIT_PASSPHRASE``.
            cosign: whether its keys are needed; without them it can only know logs and tell what it has cosigned.

        Raises:
            KeyFileError: there is none, a key is encrypted or damaged, or the passphrase is wrong.
            StoreError: its memory is gone.
        """
        folder = Path(folder).expanduser().absolute()
        try:
            fields = json.loads((folder / "witness.json").read_bytes())
            name = check_name(fields["name"], "witness's name")
        except FileNotFoundError as error:
            raise KeyFileError(
                f"There is no witness in {folder}.",
                next_step="Make one: `rlhf-audit witness init DIR --name witness.example/NAME`.",
                code="no-witness",
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AuditError) as error:
            raise _unusable(folder, error) from error
        if not (folder / "state.sqlite").is_file():
            raise StoreError(
                f"The memory of the witness in {folder} is gone (state.sqlite).",
                next_step="It must not go on under this key: make a new witness, and tell those who trust the old one.",
                code="no-memory",
            )
        if not cosign:
            return cls(folder, name, (), _vkeys(folder))
        secret = _passphrase(passphrase)
        cosigners: list[Cosigner] = []
        for file in ("ed25519.pem", "mldsa44.pem"):
            if cosigners and not (folder / file).exists():
                continue
            key = _load(folder, file, secret)
            if isinstance(key, Ed25519PrivateKey):
                cosigners.append(CosignerEd25519(name, key))
            elif isinstance(key, MLDSA44PrivateKey):
                cosigners.append(CosignerMLDSA44(name, key))
            else:
                raise _unusable(folder, ValueError(f"{file} holds another kind of key"))
        return cls(folder, name, cosigners)

    def add_log(self, vkey: str) -> bool:
        """Know a log by its verifier key, whose name is the log's origin; ``False`` where it is known already.

        A log may have several keys (after a rotation). Knowing one more changes nothing about what was cosigned.

        Raises:
            FormatError: it is no verifier key of a log.
            StoreError: the memory cannot be written.
        """
        verifier = parse_vkey(vkey)
        if verifier.algorithm == COSIGNATURE:
            raise FormatError(
                f"The key {verifier.name} is a witness's, not a log's.",
                next_step="Ask for the log's key: the `log` line of its trust policy.",
                code="key-type",
            )
        with self._transaction() as state:
            added = state.execute(
                "INSERT INTO logs (vkey, origin, added) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (format_vkey(verifier), verifier.name, int(time.time())),
            )
            return added.rowcount == 1

    def logs(self) -> tuple[Known, ...]:
        """The logs that it knows and where each stands, by origin."""
        found = []
        with self._reading() as state:
            keys: dict[str, list[str]] = {}
            for origin, vkey in state.execute("SELECT origin, vkey FROM logs ORDER BY origin, added, vkey"):
                keys.setdefault(origin, []).append(vkey)
            for origin, vkeys in keys.items():
                head = _latest(state, origin)
                found.append(
                    Known(origin, tuple(vkeys), head.size, head.root, head.time)
                    if head
                    else Known(origin, tuple(vkeys), None, None, None)
                )
        return tuple(found)

    def size(self, origin: str) -> int:
        """The size of the last checkpoint that it cosigned for ``origin``; 0 where there was none."""
        with self._reading() as state:
            head = _latest(state, origin)
        return head.size if head else 0

    def checkpoint(self, digest: str) -> str | None:
        """The last checkpoint that it cosigned, with its cosignature, of the origin with this SHA-256 (hex)."""
        with self._reading() as state:
            origins = [origin for (origin,) in state.execute("SELECT DISTINCT origin FROM logs")]
            found = [origin for origin in origins if sha256(origin.encode()).hexdigest() == digest]
            head = _latest(state, found[0]) if found else None
        if head is None or not self._cosigners:
            return None
        note = parse_note(head.note)
        return note.plus(*(cosigner.cosign(note, head.time) for cosigner in self._cosigners)).format()

    def evidence(self) -> tuple[Path, ...]:
        """The kept notes that contradict, or may contradict, what it has cosigned."""
        return tuple(sorted((self.folder / "heads").glob("*.diverged/*.checkpoint")))

    def add_checkpoint(self, body: bytes, *, clock: Callable[[], float] = time.time) -> Reply:
        """What the request ``body`` gets (C2SP tlog-witness, add-checkpoint); decided and remembered before it is said.

        Raises:
            StoreError: the memory cannot be read or written, or the clock stands before the last cosignature; nothing
                was signed.
            KeyFileError: it was opened without its keys.
        """
        if not self._cosigners:
            raise KeyFileError(f"The witness {self.name} was opened without its keys.", code="no-key")
        origin, size = "", None
        try:
            submission = _parsed(body)
            head = _head_of(submission.note)
            origin, size = head.origin, head.size
            own = self._signed_by_log(submission.note, head)
            when = self._decide(submission, head, own, clock)
        except _RefusedError as error:
            refused = error.reply
            return Reply(refused.status, refused.kind, refused.body, refused.said, origin, size)
        lines = [cosigner.cosign(submission.note, when).format() + "\n" for cosigner in self._cosigners]
        return Reply(OK, TEXT_KIND, "".join(lines).encode(), "cosigned", origin, size)

    def _signed_by_log(self, note: Note, head: Checkpoint) -> Note:
        """The note with those signatures alone that are the log's and hold."""
        with self._reading() as state:
            rows = state.execute("SELECT vkey FROM logs WHERE origin = ?", (head.origin,))
            verifiers = [parse_vkey(vkey) for (vkey,) in rows]
        if not verifiers:
            raise _RefusedError(NOT_FOUND, f"the log {head.origin} is not known here")
        try:
            good = {item.verifier for item in verify_note(note, verifiers)}
        except FormatError as error:
            raise _RefusedError(FORBIDDEN, f"not signed by a key that is known for {head.origin}") from error
        idents = {(verifier.name, verifier.key_id) for verifier in good}
        return Note(note.text, tuple(line for line in note.signatures if (line.name, line.key_id) in idents))

    def _decide(self, submission: Submission, head: Checkpoint, own: Note, clock: Callable[[], float]) -> int:
        """Check and remember, in one transaction; the time of the cosignature."""
        if submission.old > head.size:
            raise _RefusedError(BAD_REQUEST, f"the old size {submission.old} is over the checkpoint's {head.size}")
        with self._transaction() as state:
            last = _latest(state, head.origin)
            same = _at_size(state, head.origin, head.size)
            against = self._against(submission, head, last, same)
            if against is None:
                when = _time(clock, last)
                state.execute(_REMEMBER, (head.origin, head.size, head.root, own.format(), when))
                return when
        refused, seen = against
        if seen is not None:
            kept = Heads(self.folder).keep_evidence(head.origin, seen.note, own.format())
            reply = refused.reply
            refused = _RefusedError(reply.status, f"{reply.said}; kept in {kept.name}", reply.body, reply.kind)
        raise refused

    @staticmethod
    def _against(
        submission: Submission, head: Checkpoint, last: _Head | None, same: _Head | None
    ) -> tuple[_RefusedError, _Head | None] | None:
        """Why it must not be cosigned, and the head that it does not go with; ``None`` where nothing is against it."""
        forked = same if same is not None and same.root != head.root else None
        size, root = (last.size, last.root) if last else (0, EMPTY_ROOT)
        if submission.old != size:
            stale = _RefusedError(
                CONFLICT, f"the last size cosigned is {size}, not {submission.old}", b"%d\n" % size, SIZE_KIND
            )
            return stale, forked
        if head.size == size and head.root != root:
            return _RefusedError(UNPROCESSABLE, f"another root of size {size} was cosigned"), forked
        if not check_consistency(size, head.size, submission.proof, root, head.root):
            return _RefusedError(UNPROCESSABLE, f"the proof does not connect it with size {size}"), last
        return None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connection("rw") as state:
            # With a rollback journal, EXTRA also makes the journal's removal durable: once committed, it stays.
            state.execute("PRAGMA synchronous=EXTRA")
            state.execute("BEGIN IMMEDIATE")
            try:
                yield state
                state.execute("COMMIT")
            except BaseException:
                if state.in_transaction:
                    state.execute("ROLLBACK")
                raise

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        # Opened for writing, so that what a stopped process left half done can be rolled back.
        with self._connection("rw") as state:
            state.execute("BEGIN")
            yield state

    @contextmanager
    def _connection(self, mode: str) -> Iterator[sqlite3.Connection]:
        path = self.folder / "state.sqlite"
        try:
            state = sqlite3.connect(
                f"file:{quote(str(path))}?mode={mode}", uri=True, timeout=_BUSY_SECONDS, isolation_level=None
            )
            try:
                yield state
            finally:
                state.close()
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"The memory of the witness in {path} failed: {error}.",
                next_step="Nothing was signed. Free some space or repair the disk; never restore an older copy.",
                code="witness-state",
            ) from error


def _parsed(body: bytes) -> Submission:
    try:
        return parse_submission(body)
    except FormatError as error:
        raise _RefusedError(BAD_REQUEST, error.message) from error


def _head_of(note: Note) -> Checkpoint:
    try:
        return _empty_head(note.text) or parse_checkpoint(note.text)
    except FormatError as error:
        raise _RefusedError(BAD_REQUEST, error.message) from error


def _empty_head(text: str) -> Checkpoint | None:
    """A checkpoint of size 0 whose root is not the empty tree's: to be refused for its root (422), not its form."""
    lines = text.split("\n")
    try:
        root = decode_base64(lines[2], "root") if len(lines) > 3 and lines[1] == "0" else b""  # noqa: PLR2004
        origin = check_name(lines[0])
    except FormatError:
        return None
    return Checkpoint(origin, 0, root) if len(root) == HASH_BYTES and root != EMPTY_ROOT else None


def _latest(state: sqlite3.Connection, origin: str) -> _Head | None:
    return _row(state.execute(_LATEST, (origin,)))


def _at_size(state: sqlite3.Connection, origin: str, size: int) -> _Head | None:
    return _row(state.execute(_AT_SIZE, (origin, size)))


def _row(rows: Iterable[tuple[int, bytes, str, int]]) -> _Head | None:
    for row in rows:
        return _Head(*row)
    return None


def _time(clock: Callable[[], float], last: _Head | None) -> int:
    """Now, in whole seconds; never before the last cosignature, whose claim would be undone."""
    now = int(clock())
    least = last.time if last else 1
    if now < least - _CLOCK_SLACK:
        raise StoreError(
            f"This machine's clock stands {least - now} s before the last cosignature.",
            next_step="Set the clock right; nothing was signed.",
            code="clock",
        )
    return max(now, least)


def _make_state(path: Path) -> None:
    state = sqlite3.connect(path, isolation_level=None)
    try:
        state.execute("PRAGMA synchronous=EXTRA")
        state.executescript(f"BEGIN IMMEDIATE;{_TABLES}COMMIT;")
    finally:
        state.close()
    path.chmod(0o600)
    sync_folder(path.parent)


def _key_file(cosigner: Cosigner) -> str:
    return "ed25519.pem" if isinstance(cosigner, CosignerEd25519) else "mldsa44.pem"


def _passphrase(given: str | None) -> bytes | None:
    chosen = given if given is not None else os.environ.get(ENV_PASSPHRASE)
    return chosen.encode() if chosen else None


def _vkeys(folder: Path) -> list[str]:
    try:
        return [format_vkey(parse_vkey(line)) for line in (folder / "witness.vkey").read_text().split()]
    except (OSError, UnicodeDecodeError, FormatError) as error:
        raise _unusable(folder, error) from error


def _load(folder: Path, name: str, secret: bytes | None) -> object:
    try:
        data = (folder / name).read_bytes()
        encrypted = b"ENCRYPTED" in data
        if encrypted and secret is None:
            raise KeyFileError(
                f"The key of the witness in {folder} is encrypted and no passphrase was given.",
                next_step=f"Set {ENV_PASSPHRASE}.",
                code="passphrase",
            )
        key = load_pem_private_key(data, secret if encrypted else None)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and encrypted:
            raise KeyFileError(
                f"The passphrase does not open the key of the witness in {folder}.",
                next_step=f"Check {ENV_PASSPHRASE}; nothing was changed.",
                code="passphrase",
            ) from error
        raise _unusable(folder, error) from error
    return key


def _unusable(folder: Path, error: Exception) -> KeyFileError:
    return KeyFileError(
        f"The witness in {folder} cannot be used: {error}.",
        next_step="Restore witness.json and the keys from a copy, and leave state.sqlite as it is.",
    )
