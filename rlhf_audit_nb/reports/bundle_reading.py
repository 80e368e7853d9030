"""Verifying a bundle for those who have the package. Floor 4.

The record in it is verified like any record. Every other file must then be what the record gives: the evidence is
derived again and compared byte for byte, the tiles must give the checkpoint's root and the entries' proofs, and the
sums must be the files'. The pages (report, index, ``VERIFY.md``) are drawn again as well; where they differ that is a
note: another version, or another policy, draws them otherwise, and none of them is evidence.

A zip is read in memory, and only where its names stay inside one folder and nothing in it is a link.
"""

from __future__ import annotations

import lzma
import re
import stat
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from rlhf_audit_nb.config import DEFAULT_TRAIL
from rlhf_audit_nb.errors import AuditError, RecordError
from rlhf_audit_nb.records.record import read_record
from rlhf_audit_nb.reports.bundle_evidence import EvidenceFiles, evidence_files
from rlhf_audit_nb.reports.bundle_pages import UNCOVERED
from rlhf_audit_nb.reports.record_bundle import SUMS, drawn_files, sums_of
from rlhf_audit_nb.trail import Level, Reason
from rlhf_audit_nb.trail.checkpoint import checkpoint_of
from rlhf_audit_nb.trail.merkle import HASH_BYTES, leaf_hash, node_hash, prove_inclusion, tree_root
from rlhf_audit_nb.trail.tile_reader import needed_tiles
from rlhf_audit_nb.trail.tiles import TileName

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlhf_audit_nb.records import OpenedRecord
    from rlhf_audit_nb.trail import TrustPolicy

__all__ = ["verify_bundle"]

RECORD = "record.ipynb"
MOST_BYTES = 2 << 30
MOST_FILES = 1_000_000

# What a zip whose bytes are anything raises, each from another of the library's decoders.
_BROKEN = (OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError,
           ValueError)  # fmt: skip
_OURS = ("entries/", "keys/", "tile/", "additions/", "anchors/")
_WITNESS = re.compile(r"keys/witness-[0-9]+\.(vkey|pem)")
_WIDTH = 256


def verify_bundle(
    target: Path | str,
    *,
    policy: TrustPolicy | None = None,
    home: Path | None = None,
    tsa_roots: Sequence[bytes] | None = None,
) -> OpenedRecord:
    """The record in a bundle, its verdict being that of the whole bundle; arguments as `open_record`.

    Raises:
        RecordError: the bundle cannot be read, or is not safe to open.
        KeyFileError: there is no policy and no key of the user's own for this trail.
    """
    files = _read_zip(Path(target)) if Path(target).is_file() else _read_folder(Path(target))
    if RECORD not in files:
        raise _unreadable(target, f"there is no {RECORD} in it")
    beside = Path(target).parent / DEFAULT_TRAIL
    opened = read_record(files[RECORD], policy=policy, home=home, trails=(beside,), tsa_roots=tsa_roots)
    if opened.verdict.level in (Level.INVALID, Level.DIVERGED):
        return opened
    found = _Comparison(files, opened, evidence_files(files[RECORD], opened)).run()
    if found.reasons:
        verdict = replace(opened.verdict, level=Level.INVALID, reasons=(*found.reasons, *opened.verdict.reasons))
        return replace(opened, verdict=verdict, entries=(), additions=())
    return replace(opened, notes=(*opened.notes, *found.notes))


# -- reading --------------------------------------------------------------------------------------------------------


def _unreadable(target: Path | str, why: str) -> RecordError:
    return RecordError(
        f"The bundle {target} cannot be read: {why}.",
        next_step="Name a folder or a zip that `rlhf-audit bundle` made; ask whoever sent it to send it again.",
        code="no-bundle",
    )


def _read_folder(folder: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    try:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink():
                raise _unreadable(folder, f"{name} is a link")
            if not name.isprintable():
                raise _unreadable(folder, f"the name {name!r} is none that can be shown")
            if path.is_file():
                files[name] = path.read_bytes()
    except OSError as error:
        raise _unreadable(folder, f"{error.filename}: {error.strerror or error}") from error
    return files


def _read_zip(path: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            items = [item for item in archive.infolist() if not item.is_dir()]
            _check_items(path, items)
            files = {item.filename: archive.read(item) for item in items}
    except _BROKEN as error:
        raise _unreadable(path, f"it is not a whole zip ({error})") from error
    tops = {PurePosixPath(name).parts[0] for name in files}
    if f"{next(iter(tops), '')}/{RECORD}" in files and len(tops) == 1:
        files = {name.partition("/")[2]: data for name, data in files.items()}
    return files


def _check_items(path: Path, items: list[zipfile.ZipInfo]) -> None:
    """Refuse a zip that would write, or read, where it should not, or that is larger than a bundle can be."""
    names = [item.filename for item in items]
    for item in items:
        name, mode = item.filename, item.external_attr >> 16
        parts = name.split("/")
        if not name.isprintable():
            raise _unreadable(path, f"the name {name!r} is none that can be shown")
        if name.startswith("/") or "\\" in name or ":" in name or not set(parts).isdisjoint({"", ".", ".."}):
            raise _unreadable(path, f"the name {name!r} leads out of it")
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise _unreadable(path, f"{name!r} is a link or no plain file")
    # Many file systems take names for one that differ in case alone: what is unpacked last would stand there.
    if len({name.casefold() for name in names}) != len(names):
        raise _unreadable(path, "a file stands twice in it")
    if len(names) > MOST_FILES or sum(item.file_size for item in items) > MOST_BYTES:
        raise _unreadable(path, f"it holds more than {MOST_FILES:,} files or {MOST_BYTES:,} bytes")


# -- comparing ------------------------------------------------------------------------------------------------------


@dataclass
class _Found:
    reasons: list[Reason]
    notes: list[Reason]


class _Tiles:
    """The tiles of a bundle, as a reader of hashes."""

    def __init__(self, files: dict[str, bytes], size: int) -> None:
        self._files = files
        self._size = size

    def tile(self, level: int, number: int) -> bytes:
        """The hashes of one tile; raises `KeyError` or `ValueError` where it is missing or cut."""
        name = TileName(level, number, min(_WIDTH, (self._size >> 8 * level) - number * _WIDTH))
        data = self._files[name.path]
        if len(data) != name.width * HASH_BYTES:
            raise ValueError(f"{name.path} has {len(data)} bytes")
        return data

    def node(self, level: int, index: int) -> bytes:
        """The root of one complete subtree (`HashReader`)."""
        tile_level, height = divmod(level, 8)
        first = index << height
        tile = self.tile(tile_level, first // _WIDTH)
        at = first % _WIDTH
        row = [tile[32 * place : 32 * place + 32] for place in range(at, at + (1 << height))]
        while len(row) > 1:
            row = [node_hash(row[i], row[i + 1]) for i in range(0, len(row), 2)]
        return row[0]


class _Comparison:
    """A bundle's files against what its record, which holds, gives."""

    def __init__(self, files: dict[str, bytes], opened: OpenedRecord, evidence: EvidenceFiles) -> None:
        self._files = files
        self._opened = opened
        self._evidence = evidence
        self._found = _Found([], [])

    def run(self) -> _Found:
        self._check_evidence()
        self._check_strays()
        self._check_tiles()
        self._check_sums()
        if not self._found.reasons:
            self._check_pages()
        return self._found

    def _fault(self, code: str, where: str, message: str) -> None:
        self._found.reasons.append(Reason(code, where, message))

    def _check_evidence(self) -> None:
        for name, data in self._evidence.files.items():
            if _WITNESS.fullmatch(name):
                continue  # which witnesses' keys are known is the policy's
            if name not in self._files:
                self._fault("missing-file", name, "This file of the bundle is missing.")
            elif self._files[name] != data:
                self._fault("changed-file", name, "This file is not what the record in the bundle gives.")

    def _check_strays(self) -> None:
        known = {*self._evidence.files, *UNCOVERED}
        for name in sorted(set(self._files) - known):
            if name.startswith("tile/") or _WITNESS.fullmatch(name):
                continue
            message = "This file is no part of the bundle."
            if name.startswith(_OURS):
                self._fault("stray-file", name, message)
            else:
                self._found.notes.append(Reason("stray-file", name, message))

    def _check_tiles(self) -> None:
        present = {name for name in self._files if name.startswith("tile/")}
        if not present:
            return
        seal = self._evidence.seal
        head = checkpoint_of(seal.checkpoint)
        tiles = _Tiles(self._files, head.size)
        indices = [item.entry.index for item in seal.entries]
        try:
            wanted = needed_tiles(tiles, indices, head.size)
            holds = tree_root(head.size, tiles) == head.root and all(
                tuple(prove_inclusion(item.entry.index, head.size, tiles)) == item.proof
                and tiles.node(0, item.entry.index) == leaf_hash(item.entry.data)
                for item in seal.entries
            )
        except (KeyError, ValueError, IndexError) as error:
            self._fault("tiles", "tile", f"A tile is missing or cut: {error}.")
            return
        if not holds:
            self._fault("tiles", "tile", "The tiles do not give the checkpoint's root and the entries' proofs.")
        for name in sorted(present - set(wanted)):
            self._fault("stray-file", name, "This tile is no part of the bundle.")

    def _check_sums(self) -> None:
        told = self._files.get(SUMS, b"").decode("utf-8", "replace").splitlines()
        own = set(sums_of(self._files).decode().splitlines())
        for line in sorted(set(told) - own):
            name = line[66:]
            if name not in {reason.where for reason in self._found.reasons}:
                self._fault("sums", name or SUMS, f"It is not the file that {SUMS} names.")
        unlisted = {line[66:] for line in own} - {line[66:] for line in told}
        strays = {note.where for note in self._found.notes}
        for name in sorted(unlisted - strays):
            if name not in {reason.where for reason in self._found.reasons}:
                self._fault("sums", name, f"{SUMS} does not name this file.")

    def _check_pages(self) -> None:
        tiles = {name: data for name, data in self._files.items() if name.startswith("tile/")}
        try:
            drawn = drawn_files(self._opened, self._evidence, tiles)
        except AuditError as error:
            self._found.notes.append(Reason("page", "report.html", f"It could not be drawn again: {error.message}"))
            return
        for name in sorted(set(UNCOVERED) - {SUMS}):
            if name not in self._files:
                self._fault("missing-file", name, "This file of the bundle is missing.")
            elif self._files[name] != drawn[name]:
                message = (
                    "It is not what this version draws of the record under these keys: another version or policy "
                    "drew it, or it was changed. Draw the report again (`rlhf-audit report`)."
                )
                self._found.notes.append(Reason("page", name, message))
