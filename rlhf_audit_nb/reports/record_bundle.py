"""A record as one folder or zip, for people without this package. Floor 4.

The evidence in files (`bundle_evidence`), the tiles of the trail where it is at hand, the report, and two pages
(`bundle_pages`): ``index.html`` to read, ``VERIFY.md`` to follow with openssl, sha256sum and a plain Python.
``SHA256SUMS`` names them all.

The same record, policy and trail give the same bytes with one version of this package: the zip holds its files as they
are, in one order and with one time. The vault is not opened and no private key is read.
"""

from __future__ import annotations

import hashlib
import io
import secrets
import shutil
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rlhf_audit_nb.compliance.evidence import Evidence
from rlhf_audit_nb.config import DEFAULT_TRAIL, AuditConfig
from rlhf_audit_nb.errors import AuditError, RecordError, ReportError
from rlhf_audit_nb.records.record import read_record
from rlhf_audit_nb.reports.bundle_evidence import EvidenceFiles, evidence_files
from rlhf_audit_nb.reports.bundle_pages import BundleFacts, index_page, verify_page
from rlhf_audit_nb.reports.html import render_html
from rlhf_audit_nb.reports.model import build_report
from rlhf_audit_nb.trail import Level, TrailReader
from rlhf_audit_nb.trail.checkpoint import checkpoint_of
from rlhf_audit_nb.trail.published import is_published
from rlhf_audit_nb.trail.tile_reader import PublishedTree, needed_tiles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rlhf_audit_nb.records import OpenedRecord
    from rlhf_audit_nb.trail import TrustPolicy, Verdict

__all__ = ["SUMS", "RecordBundle", "RefusedRecordError", "bundle_record", "drawn_files", "sums_of"]

SUMS = "SHA256SUMS"
ZIP_SUFFIX = ".zip"
FRAMEWORK = "eu_ai_act"

# What verifying says of this machine, and not of the record.
_LOCAL_NOTES = frozenset({"head-unchecked", "last-seen"})
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_ZIP_MODE = 0o100644 << 16


class RefusedRecordError(RecordError):
    """The record does not hold, so that a bundle of it would pass on what is no evidence; ``verdict`` says why."""

    code = "refused-record"
    exit_code: ClassVar[int] = 40

    def __init__(self, path: Path | str, verdict: Verdict) -> None:
        first = f" {verdict.reasons[0].where}: {verdict.reasons[0].message}" if verdict.reasons else ""
        super().__init__(
            f"{path} is {verdict.level.name}.{first} No bundle was made of it.",
            next_step="Run `rlhf-audit verify` on it for every reason.",
        )
        self.verdict = verdict


@dataclass(frozen=True)
class RecordBundle:
    """A bundle that was made and not yet written.

    Attributes:
        name: of the folder in a zip.
        files: contents by path, in order.
        record: the record's id.
        level: the verdict's level when it was made.
        tiles: whether the trail's tiles are in it.
    """

    name: str
    files: Mapping[str, bytes]
    record: str
    level: str
    tiles: bool

    def zipped(self) -> bytes:
        """The bundle as the bytes of a zip."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for path, data in self.files.items():
                item = zipfile.ZipInfo(f"{self.name}/{path}", _ZIP_TIME)
                item.create_system, item.external_attr = 3, _ZIP_MODE
                archive.writestr(item, data)
        return buffer.getvalue()

    def save(self, path: Path | str) -> Path:
        """Writes the bundle: a zip where the name ends in ``.zip``, else a folder, which must be new or empty.

        It is there whole or not at all.

        Raises:
            ReportError: it cannot be written, or the folder is not empty.
        """
        target = Path(path)
        making = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        try:
            if target.suffix.lower() == ZIP_SUFFIX:
                making.write_bytes(self.zipped())
            else:
                _refuse_full(target)
                self._write_folder(making)
            making.replace(target)
        except OSError as error:
            raise ReportError(
                f"The bundle cannot be written to {target}: {error.strerror or error}.",
                next_step="Name a new file or folder, in a folder that exists and can be written, with -o.",
                code="unwritable",
            ) from error
        finally:
            _remove(making)
        return target

    def _write_folder(self, folder: Path) -> None:
        for path, data in self.files.items():
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)


def _refuse_full(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise FileExistsError(17, "there is a file of that name")
    if target.is_dir() and any(target.iterdir()):
        raise FileExistsError(17, "the folder is not empty")


def _remove(making: Path) -> None:
    if making.is_dir():
        shutil.rmtree(making, ignore_errors=True)
    else:
        making.unlink(missing_ok=True)


def bundle_record(
    path: Path | str,
    *,
    policy: TrustPolicy | None = None,
    home: Path | None = None,
    trail: Path | str | None = None,
    tsa_roots: Sequence[bytes] | None = None,
) -> RecordBundle:
    """The bundle of a record, which is verified first.

    Args:
        path: the record.
        policy: whose signatures count; ``None`` takes the user's own key for the record's trail.
        home: the folder of keys and last-seen heads; ``None`` takes ``RLHF_AUDIT_HOME`` or the user's own.
        trail: the trail, or where it was published, to take the tiles from; ``None`` looks beside the record and in the
            usual place, and does without where it is in neither.
        tsa_roots: certificates (PEM) of the timestamping authorities that are trusted; ``None`` takes the home's.

    Raises:
        RefusedRecordError: the record is INVALID or DIVERGED.
        RecordError: it cannot be read, or is of an earlier version that plain tools cannot follow.
        KeyFileError: there is no policy and no key of the user's own for this trail.
        AuditError: the trail that was named cannot be read, or is another one.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise RecordError(
            f"The record {path} cannot be read: {error.strerror or error}.",
            next_step="Name an executed notebook (.ipynb) that exists.",
            code="no-record",
        ) from error
    beside = Path(path).parent / DEFAULT_TRAIL
    opened = read_record(data, policy=policy, home=home, trails=(beside,), tsa_roots=tsa_roots)
    if opened.verdict.level in (Level.INVALID, Level.DIVERGED):
        raise RefusedRecordError(path, opened.verdict)
    evidence = evidence_files(data, opened)
    tiles = _tiles(evidence, trail, (beside, AuditConfig().trail_location()))
    files = drawn_files(opened, evidence, tiles)
    record = evidence.seal.record
    return RecordBundle(f"record-{record[:8]}", files, record, opened.verdict.level.name, bool(tiles))


def drawn_files(opened: OpenedRecord, evidence: EvidenceFiles, tiles: Mapping[str, bytes]) -> dict[str, bytes]:
    """All files of a bundle, in their order: the evidence and what is drawn from it."""
    files = {**evidence.files, **tiles}
    shown = Evidence.from_record(opened)
    shown = replace(shown, notes=tuple(note for note in shown.notes if note.code not in _LOCAL_NOTES))
    files["report.html"] = render_html(build_report(shown, FRAMEWORK)).encode()
    facts = BundleFacts(opened, evidence, bool(tiles), {name: len(data) for name, data in files.items()})
    files["index.html"] = index_page(facts).encode()
    files["VERIFY.md"] = verify_page(facts).encode()
    files[SUMS] = sums_of(files)
    return dict(sorted(files.items()))


def sums_of(files: Mapping[str, bytes]) -> bytes:
    """``SHA256SUMS`` over all files but itself, as sha256sum writes it."""
    lines = (f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files) if name != SUMS)
    return "".join(lines).encode()


# -- tiles ----------------------------------------------------------------------------------------------------------


def _tiles(evidence: EvidenceFiles, named: Path | str | None, places: tuple[Path, ...]) -> dict[str, bytes]:
    """The tiles that the record's proofs run through; none where the trail is not at hand."""
    if named is not None:
        found = _tiles_of(evidence, named)
        if found is None:
            raise RecordError(
                f"The trail {named} is not the one that the record stands in.",
                next_step="Name that trail, or leave --trail out: the entries have their proofs all the same.",
                code="another-trail",
            )
        return found
    for place in places:
        try:
            found = _tiles_of(evidence, place)
        except AuditError:
            continue  # no readable trail there; the bundle says that it does without
        if found is not None:
            return found
    return {}


def _tiles_of(evidence: EvidenceFiles, place: Path | str) -> dict[str, bytes] | None:
    """The tiles from one trail; ``None`` where it is not the record's."""
    head = checkpoint_of(evidence.seal.checkpoint)
    tree = PublishedTree.open(place) if is_published(place) else TrailReader.open(place)
    if tree.origin != head.origin or tree.size < head.size or tree.root(head.size) != head.root:
        return None
    return needed_tiles(tree, [item.entry.index for item in evidence.seal.entries], head.size)
