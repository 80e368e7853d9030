"""Where a doctor looks: one trail, its keys' home, and what of them can be read without changing anything. Floor 4.

Whatever cannot be read is told once, by the check whose business it is (`StoreError` from the trail's); every other
check that needs it says `UnknownError`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_audit_nb.config import ENV_PASSPHRASE
from rlhf_audit_nb.errors import AuditError, KeyFileError
from rlhf_audit_nb.trail import TrailReader, TrustPolicy
from rlhf_audit_nb.trail.home import keys_folder
from rlhf_audit_nb.trail.key_files import RingFolder
from rlhf_audit_nb.trail.keys import KeyRing, local_policy, open_ring
from rlhf_audit_nb.trail.sqlite import store_errors
from rlhf_audit_nb.trail.store import Head, Store
from rlhf_audit_nb.trail.succession import KEY_TYPES, KeySuccession, known_limits

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import Trail

__all__ = ["Place", "UnknownError"]


class UnknownError(Exception):
    """What a check needs cannot be had; another check says why."""


@dataclass
class Place:
    """One trail as it is found.

    Args:
        folder: the trail's folder, absolute.
        home: the folder of keys and last-seen heads.
        now: POSIX seconds.
        policy: a trust policy's file, where one was named.
        published: a published copy, where one was named.
        full: verify every entry.
        trail: the trail as it is open in this process, if it is.
    """

    folder: Path
    home: Path
    now: float
    policy: Path | None = None
    published: str | None = None
    full: bool = False
    trail: Trail | None = None

    @property
    def path(self) -> Path:
        """The database file."""
        return self.folder / "trail.sqlite"

    @cached_property
    def store(self) -> Store:
        """The store, for reading."""
        return Store(self.path, write=False)

    @cached_property
    def head(self) -> Head:
        """The newest state; raises `UnknownError` where there is none."""
        with self._known():
            if not self.store.exists():
                raise UnknownError("there is no trail")
            with self.store.reading() as transaction:
                return transaction.head()

    @property
    def origin(self) -> str:
        """The trail's name."""
        return self.head.origin

    @cached_property
    def reader(self) -> TrailReader:
        """What reads the entries of `head`."""
        head = self.head
        with self._known():
            return TrailReader(self.store.reading, head)

    @cached_property
    def open_runs(self) -> dict[str, str]:
        """The runs that have no end, with their writers."""
        _ = self.head
        with self._known(), self.store.reading() as transaction:
            return transaction.open_runs()

    @cached_property
    def succession(self) -> KeySuccession:
        """The trail's keys over time."""
        keys = KeySuccession(self.origin, known_limits(self.home, self.origin))
        with self._known():
            found = [entry for kind in KEY_TYPES for entry in self.reader.entries(type=kind)]
        for entry in sorted(found, key=lambda entry: entry.index):
            keys.add(entry)
        return keys

    @cached_property
    def trust(self) -> TrustPolicy:
        """Whose signatures count: the named policy, else the user's own keys.

        Raises:
            UnknownError: neither can be had.
        """
        if self.policy is not None:
            try:
                return TrustPolicy.parse(self.policy.read_bytes())
            except (OSError, AuditError) as error:
                raise UnknownError("the trust policy cannot be read") from error
        try:
            return local_policy(self.home, self.origin)
        except KeyFileError as error:
            raise UnknownError("there are no keys here that say whom to trust") from error

    @property
    def ring(self) -> RingFolder:
        """The files of the trail's keys."""
        return RingFolder(keys_folder(self.home, self.origin))

    @cached_property
    def keys(self) -> KeyRing | None:
        """The keys, opened; ``None`` where a passphrase is needed and none is at hand.

        Raises:
            KeyFileError: they cannot be used.
        """
        secret = os.environ.get(ENV_PASSPHRASE)
        folder = self.ring
        try:
            encrypted = any(b"ENCRYPTED" in path.read_bytes() for path in folder.path.glob("*.pem"))
        except OSError as error:
            raise KeyFileError(f"The keys cannot be read: {error.strerror or error}.") from error
        if encrypted and not secret:
            return None
        return open_ring(folder, self.origin, secret.encode() if secret else None)

    @contextmanager
    def _known(self) -> Iterator[None]:
        try:
            with store_errors(self.path):
                yield
        except AuditError as error:
            raise UnknownError("the trail cannot be read") from error

    def plain(self, text: str) -> str:
        """``text`` without the names of folders above the trail and the keys: a notebook is passed on."""
        for path, name in ((self.folder, self.folder.name), (self.home, "the keys' folder")):
            text = text.replace(str(path), name)
        return text
