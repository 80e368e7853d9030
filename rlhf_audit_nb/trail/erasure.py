"""Erasing an annotator: the vault forgets, the trail says so. Floor 0.

`erase` does all of it; where a crash or another process stops it half-way, `finish_erasures`, which every opening of
the trail calls, brings it to its end (the order is told in `vault`). The trail gets a ``vault.erased`` entry: that
somebody was erased, and why, but neither who nor which entries. Verification tells from it what was erased from what
is missing (`vault.OpeningsCheck`).

A vault and its key that were both put back from before an erasure bring the erased annotator back. Opening the trail
finds that out from its ``vault.erased`` entries, recognises who it was by the name of the erasure, and erases them
again. An old copy of one of the two does not open at all.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from rlhf_audit_nb.errors import FormatError, VaultError
from rlhf_audit_nb.trail.vault import VAULT_ERASED, Erased, Erasure, Vault, decode_erased

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.trail import Trail, TrailReader

__all__ = ["REASONS", "ErasureDone", "erase", "finish_erasures"]

REASONS = ("request", "retention", "withdrawn")
"""Why somebody is erased: they asked, the time to keep their data is over, they withdrew their consent."""


@dataclass(frozen=True)
class ErasureDone:
    """What an erasure did.

    Attributes:
        erasure: its name in the vault and in the trail.
        entry: the index of its ``vault.erased`` entry.
        openings: how many private payloads were erased.
        generation: the generation of the vault's master key since then.
        reason: why.
        finished: it had been begun before, and was only brought to its end.
    """

    erasure: str
    entry: int
    openings: int
    generation: int
    reason: str
    finished: bool = False


def erase(trail: Trail, owner: str | None = None, *, reason: str, run: str | None = None) -> ErasureDone:
    """Erase an annotator from the vault of ``trail``, for good; the trail still verifies, and says ``erased``.

    What a run holds of its own (measurements of its private steps, digests of its data, its seed) belongs to no
    annotator; ``run=`` in the place of ``owner`` erases that.

    Where an erasure had been begun and the annotator is already gone, that one is brought to its end.

    Args:
        trail: the trail, open.
        owner: the annotator's id, as it was handed in with the payloads.
        reason: one of `REASONS`.
        run: the run whose own payloads are to go.

    Raises:
        ValueError: neither ``owner`` nor ``run`` was given, or both.
        VaultError: ``reason`` is none of them; ``unknown-owner`` where the vault holds nothing of theirs (nothing was
            changed); ``vault-busy`` where another process reads the vault (the erasure holds, and opening the trail
            later finishes it); ``vault-old`` or ``key-old`` where vault and key do not belong together.
        StoreError: vault or trail cannot be written.
        KeyFileError: the key file cannot be written.
    """
    if reason not in REASONS:
        raise VaultError(
            f"The reason {reason!r} is not known.", next_step=f"Write one of {', '.join(REASONS)}.", code="reason"
        )
    if (owner is None) == (run is None):
        raise ValueError("name either an annotator or a run")
    trail.flush()
    with trail.reading_vault() as vault:
        if not vault.exists():
            raise vault.unknown_owner()
        with trail.keys.master.exclusive():
            finished = _finish(trail, vault)
            try:
                erasure = vault.erase(owner, reason, stream=run or "")
            except VaultError as error:
                if error.reason == "unknown-owner" and finished:
                    return finished[-1]
                raise
            return _log(trail, vault, erasure)


def finish_erasures(trail: Trail) -> tuple[ErasureDone, ...]:
    """Bring to their end the erasures that were begun, and do those again that an old copy of the vault undid.

    Where another process reads the vault, its old pages are left to the next opening.

    Raises:
        VaultError: ``vault-old`` or ``key-old`` where vault and key do not belong together, ``vault-changed`` where the
            vault holds an erasure that was not made with its key.
        StoreError: vault or trail cannot be read or written.
        KeyFileError: the key file cannot be used.
    """
    with trail.reading_vault() as vault:
        if not vault.exists() or (vault.settled() and not _undone(vault, trail.reader())):
            return ()
        try:
            with trail.keys.master.exclusive():
                return tuple(_finish(trail, vault))
        except VaultError as error:
            if error.reason != "vault-busy":
                raise
            return ()


def _finish(trail: Trail, vault: Vault) -> list[ErasureDone]:
    undone = _undone(vault, trail.reader())
    if undone:
        vault.erase_again(undone)
    else:
        vault.settle()
    return [_log(trail, vault, item, finished=True) for item in vault.unlogged()]


def _undone(vault: Vault, reader: TrailReader) -> list[Erased]:
    """The erasures that the trail tells of and that are after the state of the vault."""
    generation, known = vault.generation(), {item.name for item in vault.erasures()}
    return [said for _, said in _told(reader) if said.generation > generation and said.erasure not in known]


def _told(reader: TrailReader) -> Iterator[tuple[int, Erased]]:
    for entry in reader.entries(type=VAULT_ERASED):
        try:
            yield entry.index, decode_erased(entry.body)
        except FormatError:
            continue  # verification names it; it must not keep anybody from being erased


class _ToldBeforeError(Exception):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


def _log(trail: Trail, vault: Vault, erasure: Erasure, *, finished: bool = False) -> ErasureDone:
    """The trail's entry of an erasure, once."""
    said = Erased(erasure.name, b64encode(erasure.commitment).decode(), erasure.generation, erasure.reason)

    def body(reader: TrailReader) -> bytes:
        for index, other in _told(reader):
            if other.erasure == said.erasure:
                raise _ToldBeforeError(index)
        return msgspec.json.encode(said)

    try:
        index = trail.append_guarded(VAULT_ERASED, body).index
    except _ToldBeforeError as before:
        index = before.index
    vault.mark_logged(erasure.name)
    return ErasureDone(said.erasure, index, erasure.openings, said.generation, said.reason, finished)
