"""Last-seen heads: the memory, apart from the trail, that catches a rollback or a fork. Floor 0.

``HOME/heads/ORIGIN.checkpoint`` holds the largest signed checkpoint that this user has seen of an origin, the note
verbatim. A trail that is smaller, or that has another root at that size, has lost or rewritten entries although every
signature in it may hold. Both notes are then kept in ``HOME/heads/ORIGIN.diverged/`` as evidence. A head only grows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from rlhf_audit_nb.errors import AuditError, FormatError, StoreError
from rlhf_audit_nb.trail.checkpoint import Checkpoint, checkpoint_of
from rlhf_audit_nb.trail.durable import locked, write_durably
from rlhf_audit_nb.trail.home import folder_name

__all__ = ["MAX_EVIDENCE", "Heads"]

MAX_EVIDENCE = 100


class Heads:
    """The last-seen heads in one home folder."""

    def __init__(self, home: Path) -> None:
        self._folder = home / "heads"

    def path(self, origin: str) -> Path:
        """The file that holds the head of ``origin``."""
        return self._folder / f"{folder_name(origin)}.checkpoint"

    def note(self, origin: str) -> str | None:
        """The last-seen signed checkpoint, or ``None`` where none was seen.

        Raises:
            StoreError: the file cannot be read or is not a checkpoint of this origin.
        """
        path = self.path(origin)
        try:
            note = path.read_text(encoding="utf-8")
            if checkpoint_of(note).origin != origin:
                raise FormatError("it is of another origin.", code="origin")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, AuditError) as error:
            raise StoreError(
                f"The last-seen head in {path} cannot be read: {error}",
                next_step="If you know why it changed, move it away; the next check starts a new memory.",
                code="last-seen",
            ) from error
        return note

    def head(self, origin: str) -> Checkpoint | None:
        """What the last-seen checkpoint says."""
        note = self.note(origin)
        return None if note is None else checkpoint_of(note)

    def advance(self, origin: str, note: str) -> None:
        """Remember ``note`` where it is larger than what is remembered; its consistency was checked by the caller.

        Raises:
            StoreError: the home folder cannot be written.
        """
        size = checkpoint_of(note).size
        seen = self.head(origin)
        if seen is not None and seen.size >= size:
            return
        try:
            with self._locked(origin):
                seen = self.head(origin)
                if seen is None or seen.size < size:
                    write_durably(self.path(origin), note.encode())
        except OSError as error:
            raise StoreError(
                f"The last-seen head cannot be written to {self._folder}: {error.strerror or error}.",
                next_step="Make the folder writable, free some space, or set RLHF_AUDIT_HOME to another one.",
                code="last-seen",
            ) from error

    def keep_evidence(self, origin: str, seen: str, found: str) -> Path:
        """Keep both notes of a divergence, where they are not kept yet; the folder that holds them.

        At most `MAX_EVIDENCE` notes of one origin are kept, the first ones: two prove a divergence, and nobody should
        be able to fill a disk.
        """
        folder = self._folder / f"{folder_name(origin)}.diverged"
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            kept = {path.read_bytes() for path in folder.glob("*.checkpoint")}
            for name, note in (("seen", seen.encode()), ("found", found.encode())):
                if note not in kept and len(kept) < MAX_EVIDENCE:
                    write_durably(folder / f"{stamp}.{name}.checkpoint", note)
                    kept.add(note)
        except OSError as error:
            raise StoreError(
                f"The evidence of a divergence cannot be written to {folder}: {error.strerror or error}.",
                next_step="Keep a copy of the trail and of the home folder before anything else is done.",
                code="last-seen",
            ) from error
        return folder

    @contextmanager
    def _locked(self, origin: str) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(self._folder / f".{folder_name(origin)}.lock"):
            yield
