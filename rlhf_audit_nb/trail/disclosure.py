"""A disclosure: one private payload, shown to one auditor, and nothing else with it. Floor 0.

One file (ending ``.opening``), a JSON object of one line in this very form (fields in this order, no space)::

    {"format":"rlhf-audit/disclosure/v1","entry":ENTRY,"proof":PROOF,"key":BASE64,"payload":BASE64,"sha256":HEX}

``entry`` holds the entry's bytes as text, ``proof`` a C2SP tlog-proof (its place in the trail under a signed
checkpoint), ``key`` and ``payload`` the opening of the entry's commitment (`vault`). ``sha256`` is over the same object
without that field: it tells a file that was damaged on its way from one that proves nothing.

It is checked with nothing but the file and a trust policy (`verify_disclosure`). The key is of this entry alone: the
file opens no other commitment, and holds neither the key of the owner nor that of the vault.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from rlhf_audit_nb.errors import AuditError, FormatError, StoreError, VaultError
from rlhf_audit_nb.trail.anchors import AnchorFolder
from rlhf_audit_nb.trail.checkpoint import checkpoint_of
from rlhf_audit_nb.trail.encoding import decode_base64
from rlhf_audit_nb.trail.entry import Entry
from rlhf_audit_nb.trail.proof import InclusionProof, format_proof, parse_proof
from rlhf_audit_nb.trail.vault import Opening, check_opening
from rlhf_audit_nb.trail.verdict import Level, Reason, Verdict
from rlhf_audit_nb.trail.verify import verify_proof

if TYPE_CHECKING:
    from rlhf_audit_nb.trail.policy import TrustPolicy
    from rlhf_audit_nb.trail.trail import Trail, TrailReader

__all__ = ["FORMAT", "SUFFIX", "Disclosure", "disclose", "is_disclosure", "parse_disclosure", "verify_disclosure"]

FORMAT = "rlhf-audit/disclosure/v1"
SUFFIX = ".opening"
MAX_BYTES = 1 << 30
_START = b'{"format":"rlhf-audit/disclosure/'


class Disclosure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a disclosure file holds, nothing of it verified.

    Attributes:
        format: the format's name and version.
        entry: the entry's bytes as text.
        proof: the tlog-proof.
        key: base64 of the opening's key.
        payload: base64 of the private payload.
    """

    format: str
    entry: str
    proof: str
    key: str
    payload: str

    def encode(self) -> bytes:
        """The file's bytes."""
        body = msgspec.json.encode(self)
        return body[:-1] + b',"sha256":"%s"}\n' % sha256(body).hexdigest().encode()


class _File(Disclosure, frozen=True, forbid_unknown_fields=True):
    sha256: str


_decoder = msgspec.json.Decoder(_File)


def disclose(trail: Trail, index: int) -> Disclosure:
    """The disclosure of the private half of one entry.

    It is proved under the newest checkpoint that witnesses have cosigned and that covers the entry; where there is
    none, under the newest one of all.

    Args:
        trail: the trail, open.
        index: the entry's place.

    Raises:
        StoreError: there is no such entry (``range``).
        VaultError: the entry has no private half (``not-private``), its content was erased (``erased``), its opening is
            missing (``opening-missing``), or the vault's key is not at hand.
    """
    reader = trail.reader()
    if not 0 <= index < reader.size:
        raise StoreError(
            f"There is no entry {index} in a trail of {reader.size}.",
            next_step="`rlhf-audit trail query` shows the entries' numbers.",
            code="range",
        )
    (entry,) = reader.entries(index, index + 1)
    if entry.envelope.sealed is None:
        raise VaultError(
            f"Entry {index} ({entry.type}) has no private half: all of it stands in the trail.",
            next_step="Name an entry with one; `rlhf-audit trail query --json` shows it as `sealed`.",
            code="not-private",
        )
    try:
        with trail.reading_vault() as vault:
            opening = vault.opening(entry.type, entry.stream, entry.seq, b64decode(entry.envelope.sealed))
    except VaultError as error:
        if error.reason != "erased":
            raise
        raise VaultError(
            f"The private half of entry {index} was erased, so nobody can disclose it any more.",
            next_step="The trail's vault.erased entries say when and why something was erased, and not whose it was.",
            code="erased",
        ) from error
    checkpoint = _checkpoint(trail.location, reader, index)
    hashes = tuple(reader.inclusion_proof(index, checkpoint_of(checkpoint).size))
    proof = format_proof(InclusionProof(index, hashes, checkpoint))
    return Disclosure(
        FORMAT, entry.data.decode(), proof, b64encode(opening.key).decode(), b64encode(opening.payload).decode()
    )


def _checkpoint(location: Path, reader: TrailReader, index: int) -> str:
    folder = AnchorFolder(location)
    cosigned = [name.removesuffix(".cosigned") for name in folder.names() if name.endswith(".cosigned")]
    for size in sorted((int(name) for name in cosigned if name.isdecimal()), reverse=True):
        if not index < size <= reader.size:
            continue
        try:
            note = folder.cosigned(size)
            if note is not None and checkpoint_of(note).root == reader.root(size):
                return note
        except FormatError:
            continue  # a damaged anchor proves nothing; the trail's own checkpoint does
    return reader.checkpoint()


def is_disclosure(path: Path | str) -> bool:
    """Whether the file looks like a disclosure: by its ending or its first bytes."""
    path = Path(path)
    if not path.is_file():
        return False
    if path.suffix == SUFFIX:
        return True
    with path.open("rb") as file:
        return file.read(len(_START)) == _START


def parse_disclosure(data: bytes) -> Disclosure:
    """The disclosure in ``data``, strictly; nothing in it is verified yet.

    Raises:
        FormatError: ``unknown-version``, ``damaged`` where its checksum does not hold, else ``disclosure``.
    """
    try:
        found = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FormatError(f"It is not a disclosure: {error}.", code="disclosure") from error
    if found.format != FORMAT:
        raise FormatError(
            f"It is of the format {found.format[:60]!r}; this version reads {FORMAT}.",
            next_step="Check it with the version that wrote it, or a later one.",
            code="unknown-version",
        )
    disclosure = Disclosure(found.format, found.entry, found.proof, found.key, found.payload)
    if sha256(msgspec.json.encode(disclosure)).hexdigest() != found.sha256:
        raise FormatError("It was damaged on its way: its checksum does not hold.", code="damaged")
    if disclosure.encode() != data:
        raise FormatError("It is not in the one form of a disclosure.", code="disclosure")
    return disclosure


def verify_disclosure(
    path: Path | str, *, policy: TrustPolicy | None = None, home: Path | None = None
) -> tuple[Verdict, bytes]:
    """Verify a disclosure file with nothing but the file and a policy.

    Args:
        path: the file.
        policy: whose signatures count; ``None`` trusts the user's own key for the trail's origin.
        home: the folder of keys and last-seen heads; ``None`` takes ``RLHF_AUDIT_HOME`` or the user's own.

    Returns:
        The verdict on the checkpoint that it rests on, with a reason for whatever does not hold, and the payload: empty
        where anything does not.

    Raises:
        StoreError: the file cannot be read.
        KeyFileError: no policy was given and the user has no key for this origin.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise StoreError(
            f"The disclosure {path} cannot be read: {error.strerror or error}.",
            next_step="Check the path.",
            code="unreadable",
        ) from error
    try:
        if len(data) > MAX_BYTES:
            raise FormatError(f"It is over {MAX_BYTES:,} bytes.", code="disclosure")
        disclosure = parse_disclosure(data)
        verdict = verify_proof(disclosure.proof, disclosure.entry.encode(), policy=policy, home=home)
    except FormatError as error:
        return _invalid(Verdict(Level.INVALID, "", 0, ""), error, Path(path).name), b""
    if verdict.level in (Level.INVALID, Level.DIVERGED):
        return verdict, b""
    index = parse_proof(disclosure.proof).index
    try:
        return verdict, _payload(disclosure, index)
    except FormatError as error:
        return _invalid(verdict, error, f"entry {index}"), b""


def _invalid(verdict: Verdict, error: AuditError, where: str) -> Verdict:
    reasons = (*verdict.reasons, Reason(error.reason, where, error.message))
    return replace(verdict, level=Level.INVALID, reasons=reasons)


def _payload(disclosure: Disclosure, index: int) -> bytes:
    entry = Entry.decode(index, disclosure.entry.encode())
    opening = Opening(decode_base64(disclosure.key, "key"), decode_base64(disclosure.payload, "payload"))
    if entry.envelope.sealed is None:
        raise FormatError("The entry has no private half, so there is nothing to open.", code="opening-wrong")
    if not check_opening(b64decode(entry.envelope.sealed), entry.type, entry.stream, entry.seq, opening):
        raise FormatError("The key and the payload do not open the entry's commitment.", code="opening-wrong")
    return opening.payload
