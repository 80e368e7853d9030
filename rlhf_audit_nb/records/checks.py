"""What a record's verifier checks, each check apart: data in, reasons out. Floor 3.

Every function here takes values and returns the `Reason` of each thing that is wrong, with ``where`` as a path in the
notebook file (``cells[2].outputs[0]``, ``metadata.rlhf_audit.entries[5].proof``). `record` says in which order they
run and what each may rely on.
"""

from __future__ import annotations

import ast
import hashlib
import json
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PublicKey

from rlhf_audit_nb.errors import EntryError, FormatError, RecordError
from rlhf_audit_nb.events import CellExecuted, RecordSealed, RecordStarted, RunInterrupted, RunStarted, decode_body
from rlhf_audit_nb.records.dsse import check_signature, key_id
from rlhf_audit_nb.records.normal_form import (
    SEAL_KEY,
    NormalFormError,
    canonical_json,
    compare_manifests,
    manifest_digest,
    outputs_digest,
    parse_json,
    source_digest,
    without_markers,
)
from rlhf_audit_nb.records.related import related_entries, related_in
from rlhf_audit_nb.records.statement import (
    build_statement,
    encode_statement,
    entries_digest,
    event_of,
    first_difference,
    only,
    record_of,
)
from rlhf_audit_nb.trail import Reason
from rlhf_audit_nb.trail.encoding import decode_base64
from rlhf_audit_nb.trail.merkle import check_inclusion, leaf_hash
from rlhf_audit_nb.trail.note import parse_vkey
from rlhf_audit_nb.trail.signers import load_public, spki_of
from rlhf_audit_nb.trail.succession import KEY_TYPES, KeySuccession

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rlhf_audit_nb.records.seal import Seal
    from rlhf_audit_nb.trail import Entry, TrailReader
    from rlhf_audit_nb.trail.checkpoint import Checkpoint
    from rlhf_audit_nb.trail.succession import KeySpan, Limit

__all__ = [
    "SEAL",
    "check_belonging",
    "check_cells",
    "check_events",
    "check_included",
    "check_kernel",
    "check_notebook",
    "check_order",
    "check_parameters",
    "check_related",
    "check_shape",
    "check_statement",
    "check_trail",
    "check_version",
    "claims",
    "succession",
]

SEAL = f"metadata.{SEAL_KEY}"
INJECTED_TAG = "injected-parameters"
SHALLOW = 50
"""Levels of nesting that no recursion minds."""


# -- the notebook's shape ---------------------------------------------------------------------------------------


def _not(where: str, what: str) -> Reason:
    return Reason("not-a-notebook", where, f"This is not a notebook: {what}.")


def _check_cell(cell: Any, where: str) -> list[Reason]:
    if not isinstance(cell, dict):
        return [_not(where, "a cell is not an object")]
    for name, kind, word in (("cell_type", str, "text"), ("id", str, "text"), ("metadata", dict, "an object")):
        if not isinstance(cell.get(name), kind):
            return [_not(f"{where}.{name}", f"a cell's {name} is not {word}")]
    # The manifest knows no containers, only what is in them.
    if not isinstance(cell.get("outputs", []), list):
        return [_not(f"{where}.outputs", "a cell's outputs are not a list")]
    if not isinstance(cell.get("attachments", {}), dict):
        return [_not(f"{where}.attachments", "a cell's attachments are not an object")]
    return []


def _halves(value: Any, where: str) -> Iterator[str]:
    """Paths of strings that hold half a surrogate pair, and of objects with such a key."""
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        yield where
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _halves(item, f"{where}[{i}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            place = f"{where}.{key}".lstrip(".")
            yield from _halves(key, where or "file")
            yield from _halves(item, place)


def _is_plain(notebook: Any) -> bool:
    """Whether canonical JSON surely has no fault to find, told at the speed of the library's own encoder."""
    level = [notebook]
    for _ in range(SHALLOW):
        parents = (parent.values() if isinstance(parent, dict) else parent for parent in level)
        level = [child for children in parents for child in children if isinstance(child, dict | list)]
        if not level:
            break
    try:
        json.dumps(notebook, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError):
        return False
    return not level


def _check_text(notebook: Any) -> list[Reason]:
    if isinstance(notebook, dict) and _is_plain(notebook):
        return []
    try:
        canonical_json(notebook)
    except NormalFormError as error:
        where = next(_halves(notebook, ""), "file") if error.reason == "surrogate" else "file"
        return [Reason(error.reason, where, error.message)]
    return []


def check_shape(notebook: Any) -> list[Reason]:
    """What keeps a JSON value from being a notebook whose parts can be compared."""
    unreadable = _check_text(notebook)
    if unreadable:
        return unreadable
    if not isinstance(notebook, dict):
        return [_not("file", "it is not a JSON object")]
    if not isinstance(notebook.get("metadata"), dict):
        return [_not("metadata", "it has no metadata")]
    cells = notebook.get("cells")
    if not isinstance(cells, list):
        return [_not("cells", "it has no list of cells")]
    found = [reason for i, cell in enumerate(cells) for reason in _check_cell(cell, f"cells[{i}]")]
    if found:
        return found
    ids: dict[str, int] = {}
    for i, cell in enumerate(cells):
        first = ids.setdefault(cell["id"], i)
        if first != i:
            message = f"Cells {first + 1} and {i + 1} have the same id {cell['id']!r}."
            # Either of them may be the one that was changed.
            found += [Reason("duplicate-cell-id", f"cells[{place}].id", message) for place in (first, i)]
    return found


# -- entries and checkpoint -------------------------------------------------------------------------------------


def check_events(seal: Seal) -> list[Reason]:
    """Entries whose event this version does not know or whose body is not of their type."""
    found = []
    for i, item in enumerate(seal.entries):
        try:
            decode_body(item.entry.type, item.entry.body)
        except EntryError as error:
            found.append(
                Reason(error.reason, f"{SEAL}.entries[{i}].data", f"Entry {item.entry.index}: {error.message}")
            )
    return found


def claims(seal: Seal) -> dict[str, Any]:
    """The statement as it stands in the record (empty where it is not a JSON object)."""
    try:
        value = parse_json(seal.payload)
    except NormalFormError:
        return {}
    return value if isinstance(value, dict) else {}


def _byproduct(statement: dict[str, Any], name: str) -> dict[str, Any]:
    try:
        items = statement["predicate"]["runDetails"]["byproducts"]
        return next(item for item in items if item["name"] == name)
    except (KeyError, TypeError, StopIteration):
        return {}


def _claimed_digest(statement: dict[str, Any], name: str) -> Any:
    digest = _byproduct(statement, name).get("digest")
    return digest.get("sha256") if isinstance(digest, dict) else None


def check_included(seal: Seal, head: Checkpoint, statement: dict[str, Any]) -> list[Reason]:
    """Entries that the checkpoint does not cover; the checkpoint itself where it covers none of them."""
    outside = [
        i
        for i, item in enumerate(seal.entries)
        if not check_inclusion(leaf_hash(item.entry.data), item.entry.index, head.size, item.proof, head.root)
    ]
    changed = _claimed_digest(statement, "checkpoint") != hashlib.sha256(seal.checkpoint.encode()).hexdigest()
    if outside and changed and len(outside) == len(seal.entries):
        message = "No entry of the record is covered by the checkpoint: its size or root is not what was sealed."
        return [Reason("checkpoint", f"{SEAL}.checkpoint", message)]
    data_holds = _claimed_digest(statement, "entries") == entries_digest(item.entry for item in seal.entries)
    found = []
    for i in outside:
        index = seal.entries[i].entry.index
        part, what = ("", "its proof or index") if data_holds else (".data", "its content")
        message = f"Entry {index} is not covered by the checkpoint: {what} is not what was sealed."
        found.append(Reason("not-included", f"{SEAL}.entries[{i}]{part}", message))
    return found


def check_order(seal: Seal) -> list[Reason]:
    """Entries that stand twice or out of order."""
    found = []
    for i in range(1, len(seal.entries)):
        before, now = seal.entries[i - 1].entry.index, seal.entries[i].entry.index
        if now <= before:
            what = "stands twice" if now == before else f"stands after entry {before}"
            found.append(Reason("order", f"{SEAL}.entries[{i}].index", f"Entry {now} {what}."))
    return found


def check_belonging(seal: Seal) -> list[Reason]:
    """Entries that are no part of this record."""
    runs = {
        item.entry.run
        for item in seal.entries
        if item.entry.type == RunStarted.TYPE and event_of(item.entry, RunStarted).record == seal.record
    }
    related = {entry.index for entry in _related(seal)}
    found = []
    for i, item in enumerate(seal.entries):
        entry = item.entry
        event = decode_body(entry.type, entry.body)
        of_record = record_of(entry) == seal.record
        of_run = entry.run in runs or (isinstance(event, RunInterrupted) and event.run in runs)
        if entry.index == 0 or entry.type in KEY_TYPES or of_record or of_run or entry.index in related:
            continue
        message = f"Entry {entry.index} ({entry.type}) is no part of this record."
        found.append(Reason("foreign-entry", f"{SEAL}.entries[{i}]", message))
    return found


def _related(seal: Seal) -> list[Entry]:
    """The entries of other notebooks that may stand in the seal; none in a record of an earlier version."""
    entries = [item.entry for item in seal.entries]
    sealed_at, sealed = only(entries, RecordSealed, seal.record)
    if sealed.related is None:
        return []
    return [entry for entry in related_entries(entries, seal.record) if entry.index < sealed_at.index]


def check_related(seal: Seal, sealed: RecordSealed) -> list[Reason]:
    """Whether the thresholds and evaluations of other notebooks in the seal are those that its entry counts."""
    related = _related(seal)
    if sealed.related is None or (sealed.related, sealed.related_digest) == (len(related), entries_digest(related)):
        return []
    message = (
        f"The seal's entry counts {sealed.related} thresholds and evaluations of other notebooks on the record's "
        f"metrics; {len(related)} are here, or they are others."
    )
    return [Reason("related", f"{SEAL}.entries", message)]


def check_trail(seal: Seal, sealed: RecordSealed, sealed_at: int, reader: TrailReader) -> list[Reason]:
    """Whether the trail has thresholds or evaluations on the record's metrics that the record leaves out.

    ``reader`` is of the record's trail, of the record's size or larger, and continues the record's checkpoint.
    """
    if sealed.related is None:
        return []
    held = {entry.index for entry in _related(seal)}
    lacking = [entry.index for entry in related_in(reader, seal.record, sealed_at) if entry.index not in held]
    if not lacking:
        return []
    message = (
        f"The trail has {len(lacking)} thresholds or evaluations on the record's metrics that the record does not hold "
        f"(the first is entry {lacking[0]}): they were left out when it was sealed."
    )
    return [Reason("related", f"{SEAL}.entries", message)]


def check_version(seal: Seal, sealed: RecordSealed) -> list[Reason]:
    """Whether the seal's version is one that a statement of this form can stand in."""
    if sealed.build_type is None or seal.version > 1:
        return []
    message = f"The seal says version {seal.version}, and its statement is of a form that came later."
    return [Reason("version", f"{SEAL}.version", message)]


# -- the statement ----------------------------------------------------------------------------------------------

_BEHIND = {
    "predicate.runDetails.byproducts[0]": (f"{SEAL}.checkpoint", "The checkpoint is"),
    "predicate.runDetails.byproducts[1]": (f"{SEAL}.entries", "The set of entries is"),
    "predicate.buildDefinition.internalParameters.record": (f"{SEAL}.record", "The record's id is"),
}


def _statement_difference(seal: Seal, expected: bytes, *, holds: bool) -> list[Reason]:
    try:
        place = first_difference(parse_json(expected), parse_json(seal.payload)) or "its spelling"
    except NormalFormError as error:
        return [Reason("statement", f"{SEAL}.statement.payload", f"The statement is malformed. {error.message}")]
    if holds:
        # The signature covers the statement, so it is the rest of the record that was changed.
        behind = next((value for prefix, value in _BEHIND.items() if place.startswith(prefix)), None)
        where, what = behind or (f"{SEAL}.entries", f"What the entries say of {place} is")
        return [Reason("statement-differs", where, f"{what} not what the signed statement names.")]
    message = f"The statement was changed at {place}, and its signature does not hold."
    return [Reason("statement", f"{SEAL}.statement.payload", message)]


def succession(entries: Sequence[Entry], origin: str, limits: Mapping[str, Limit]) -> KeySuccession:
    """The trail's keys over time, from a record's entries, all of them proven."""
    keys = KeySuccession(origin, limits)
    for entry in entries:
        keys.add(entry)
    return keys


def check_statement(
    seal: Seal, entries: Sequence[Entry], keys: KeySuccession, sealed_at: int
) -> tuple[list[Reason], list[Reason]]:
    """Whether the statement is the one that the entries imply, signed by the keys that the trail names for its time.

    Where the trail names an ML-DSA-44 key, the statement must carry its signature as well.

    Args:
        seal: the seal.
        entries: its entries, all of them proven.
        keys: what they say of the trail's keys.
        sealed_at: the index of ``record.sealed``.

    Returns:
        Reasons, and notes.
    """
    try:
        expected = encode_statement(build_statement(seal.record, seal.checkpoint, entries))
    except (FormatError, RecordError, EntryError) as error:
        return [Reason(error.reason, f"{SEAL}.entries", error.message)], []
    spans = [span for span in (keys.key_at(role, sealed_at) for role in ("record", "mldsa")) if span is not None]
    others = _other_keys(seal, entries, spans)
    if others is not None:
        return [others], []
    if len(spans) != len(seal.signatures):
        return [_wrong_count(len(seal.signatures), spans)], []
    found: list[Reason] = []
    notes: list[Reason] = []
    holds = True
    for at, span in enumerate(spans):
        reasons, held = _check_signed(seal, at, span)
        found += reasons
        holds = holds and held
        if not keys.counts_at(span, sealed_at):
            message = f"The {span.role} key that signed the record was revoked before entry {sealed_at}."
            place = Reason("revoked-key", f"{SEAL}.statement.signatures[{at}]", message)
            (found if span.role == "record" else notes).append(place)
    if seal.payload != expected:
        found += _statement_difference(seal, expected, holds=holds)
    elif not holds:
        message = "The statement's signature does not hold under the {} key that the trail names."
        found += [
            Reason("signature", f"{SEAL}.statement.signatures[{at}].sig", message.format(span.role))
            for at, span in enumerate(spans)
            if not _check_signed(seal, at, span)[1]
        ]
    return found, notes


def _other_keys(seal: Seal, entries: Sequence[Entry], spans: Sequence[KeySpan]) -> Reason | None:
    """Why the keys that the entries name are not those that the seal's own entry names.

    A record is a choice of the trail's entries: whoever has a key that was replaced could leave out the entry that says
    so, and sign again what is left.
    """
    _, sealed = only(entries, RecordSealed, seal.record)
    if sealed.keys is None:
        return None
    try:
        named = [key_id(_spki(span)) for span in spans]
    except FormatError:
        return None  # told with the signature that it is of
    if named == sealed.keys:
        return None
    code = "keyid" if len(named) == len(sealed.keys) else "second-signature"
    message = "The entries name other keys for the record's signatures than its seal does: some were left out."
    return Reason(code, f"{SEAL}.statement.signatures", message)


def _wrong_count(found: int, spans: Sequence[KeySpan]) -> Reason:
    where = f"{SEAL}.statement.signatures"
    if found < len(spans):
        message = (
            f"The trail names an ML-DSA-44 key (entry {spans[-1].first}), and the statement lacks its second signature."
        )
        return Reason("second-signature", where, message)
    message = f"The statement has {found} signatures; the trail names {len(spans)} key for records at that time."
    return Reason("second-signature", where, message)


def _spki(span: KeySpan) -> bytes:
    """The key's DER SubjectPublicKeyInfo; raises `FormatError`."""
    if span.role == "mldsa":
        return spki_of(MLDSA44PublicKey.from_public_bytes(parse_vkey(span.key).public))
    return decode_base64(span.key, "record key")


def _check_signed(seal: Seal, at: int, span: KeySpan) -> tuple[list[Reason], bool]:
    """What is wrong with a signature's key id, and whether the signature holds."""
    try:
        spki = _spki(span)
        key = load_public(spki)
    except FormatError as error:
        return [Reason(error.reason, f"{SEAL}.entries", f"The {span.role} key: {error.message}")], False
    found = []
    if seal.envelope.signatures[at].keyid != key_id(spki):
        message = f"The key id of the statement's signature is not that of the trail's {span.role} key."
        found.append(Reason("keyid", f"{SEAL}.statement.signatures[{at}].keyid", message))
    return found, check_signature(seal.envelope, seal.signatures[at], seal.payload, key)


# -- the notebook -----------------------------------------------------------------------------------------------


def check_notebook(notebook: dict[str, Any], seal: Seal, sealed: RecordSealed, present: dict[str, Any]) -> list[Reason]:
    """Every part of the notebook, whose manifest is ``present``, that is not what was sealed."""
    found = []
    if manifest_digest(seal.manifest) != sealed.digest:
        if manifest_digest(present) == sealed.digest:
            place = first_difference(present, seal.manifest)
            message = f"The seal's table of digests was changed at {place}; the notebook is what was sealed."
            return [Reason("manifest", f"{SEAL}.manifest.{place}", message)]
        message = "The seal's table of digests is not the sealed one, so what changed in the notebook cannot be named."
        return [Reason("manifest", f"{SEAL}.manifest", message)]
    if manifest_digest(present) != sealed.digest:
        positions = [position for position, _ in without_markers(notebook["cells"])]
        found = [
            Reason(item.code, item.where, item.message) for item in compare_manifests(seal.manifest, present, positions)
        ]
    if not found and manifest_digest(present) != sealed.digest:
        found.append(Reason("digest", "file", "The notebook's digest is not the sealed one."))
    return found


def _assignments(source: str) -> dict[str, Any]:
    values = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = ast.literal_eval(node.value)
    return values


def _same(sealed: Any, found: Any) -> bool:
    try:
        return canonical_json(sealed) == canonical_json(found)
    except NormalFormError:
        return False  # a set, bytes, an infinite number: somebody wrote into the cell what no parameter can be


def _compare_parameters(sealed: dict[str, Any], found: dict[str, Any], where: str, of: str) -> list[Reason]:
    reasons = []
    for name in sorted({*sealed, *found}):
        if name not in found:
            message = f"Parameter {name!r} was {sealed[name]!r} when it ran; {of} does not have it."
        elif name not in sealed:
            message = f"Parameter {name!r} of {of} was not set when it ran."
        elif not _same(sealed[name], found[name]):
            message = f"Parameter {name!r} was {sealed[name]!r} when it ran; {of} says {found[name]!r}."
        else:
            continue
        reasons.append(Reason("parameter-changed", where.format(name), message))
    return reasons


def check_parameters(notebook: dict[str, Any], started: RecordStarted) -> list[Reason]:
    """Whether the parameters that ran are those in papermill's metadata and in the injected cell."""
    papermill = notebook["metadata"].get("papermill")
    found = papermill.get("parameters") if isinstance(papermill, dict) else {}
    if not isinstance(found, dict):
        where = "metadata.papermill.parameters"
        return [Reason("parameter-changed", where, "The notebook's parameters are not a JSON object.")]
    reasons = _compare_parameters(
        started.parameters, found, "metadata.papermill.parameters.{}", "the notebook's metadata"
    )
    if started.kernel.get("language", "").lower() == "python" and started.parameters:
        reasons += _check_injected(notebook, started)
    return reasons


def _check_injected(notebook: dict[str, Any], started: RecordStarted) -> list[Reason]:
    for i, cell in enumerate(notebook["cells"]):
        tags = cell["metadata"].get("tags")
        if not isinstance(tags, list) or INJECTED_TAG not in tags:
            continue
        source, where = cell.get("source"), f"cells[{i}].source"
        try:
            text = "".join(source) if isinstance(source, list) else str(source)
            return _compare_parameters(started.parameters, _assignments(text), where, f"cell {i + 1}")
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
            # The last two are what Python's own parser says of a text that nests too deeply.
            message = f"The injected parameters in cell {i + 1} cannot be read: {error or 'they nest too deeply'}."
            return [Reason("parameter-changed", where, message)]
    return [Reason("parameter-changed", "cells", "The cell with the injected parameters is gone.")]


def check_kernel(notebook: dict[str, Any], started: RecordStarted) -> tuple[list[Reason], list[Reason]]:
    """The kernel's display name against the trail's: reasons, and notes where an editor has refreshed it.

    An editor that connects a kernel writes ``language_info.version``, which a sealed notebook does not have.
    """
    metadata = notebook["metadata"]
    spec, language = metadata.get("kernelspec"), metadata.get("language_info")
    found = spec.get("display_name") if isinstance(spec, dict) else None
    sealed = started.kernel.get("display_name")
    if found == sealed:
        return [], []
    where = "metadata.kernelspec.display_name"
    reason = Reason("kernel-name", where, f"The kernel is called {found!r}; the notebook was sealed with {sealed!r}.")
    refreshed = isinstance(language, dict) and "version" in language
    return ([], [reason]) if refreshed else ([reason], [])


def check_cells(
    notebook: dict[str, Any], entries: Sequence[Entry], started: RecordStarted, present: dict[str, Any]
) -> tuple[list[Reason], list[Reason]]:
    """What the trail says of each executed cell against the (unchanged) notebook: reasons, and notes.

    ``present`` is the notebook's manifest. An output that changed after its cell had run (a display that was updated
    later) is a note: the sealed output is what the seal vouches for.
    """
    reasons, notes = [], []
    if source_digest(notebook) != started.notebook_digest:
        reasons.append(Reason("source", "cells", "The cells' sources are not those that the record began with."))
    manifests = {cell["id"]: cell for cell in present["cells"]}
    places = {cell["id"]: i for i, cell in enumerate(notebook["cells"])}
    ran: set[str] = set()
    for entry in entries:
        if entry.type != CellExecuted.TYPE:
            continue
        event = event_of(entry, CellExecuted)
        ran.add(event.cell)
        cell = manifests.get(event.cell)
        where = f"cells[{places.get(event.cell, event.position)}]"
        if cell is None or cell["source"] != event.source_digest:
            message = f"Entry {entry.index} says that cell {event.position + 1} ran with another source."
            reasons.append(Reason("cell-entry", f"{where}.source", message))
        elif outputs_digest(cell.get("outputs", [])) != event.outputs_digest:
            message = f"Outputs of cell {event.position + 1} were updated after it had run and before it was sealed."
            notes.append(Reason("output-updated", f"{where}.outputs", message))
    for i, cell in enumerate(notebook["cells"]):
        if cell.get("execution_count") is not None and cell["id"] not in ran:
            message = f"Cell {i + 1} has an execution count, and the trail does not know that it ran."
            reasons.append(Reason("cell-not-recorded", f"cells[{i}].execution_count", message))
    return reasons, notes
