"""The normal form of a notebook: what a record's digest covers. Floor 3.

A record must catch any change to a cell, an output or a parameter, and must not mind that the same notebook was
written again by nbformat, by a JSON tool or by JupyterLab. Two steps reach that.

*Freezing* (`freeze`), once, before sealing, brings the notebook to a form that editors leave alone:

- consecutive stream outputs of one name become one, and backspaces and carriage returns in them are carried out, as
  JupyterLab does when it loads a notebook (a progress bar leaves its last state);
- live widget views leave the outputs, and ``metadata.widgets`` leaves the notebook: their state is no evidence, since
  editors rewrite it at will. What stands beside a view (picture, HTML, text) stays and is covered; a view that stood
  alone is replaced by a sentence that says so;
- ``metadata.language_info`` loses ``version`` and ``codemirror_mode``, ``metadata.kernelspec`` everything but
  ``name``, ``language`` and ``display_name``: an editor refreshes them from the kernel that it happens to connect to;
- ``collapsed`` and ``jupyter.outputs_hidden`` of a cell are brought into agreement, empty ``attachments``, trust
  flags and conversion leftovers go, and lone surrogates become U+FFFD.

*The manifest* (`manifest_of`) then holds one SHA-256 digest for each part: every key of the notebook's metadata, and
of each cell its id, type, source, every output, every metadata key, its execution count and its attachments. A part
is digested as canonical JSON (below) after multi-line text in list form was joined. The digest of the notebook is
the SHA-256 of the manifest's canonical JSON. The order of cells, outputs and list items counts.

Not covered, and therefore never shown as evidence:

=============================================  =====================================================================
``metadata.rlhf_audit``                        the seal itself; every byte of it is checked on its own
``metadata.kernelspec.display_name``           a label; the sealed one stands in the trail (`record.started`), and the
                                               verifier accepts another only where an editor refreshed language_info
``metadata.language_info.version``,            absent when sealed; written by an editor that connects a kernel
``metadata.language_info.codemirror_mode``
``metadata.widgets``                           absent when sealed; written by an editor that saves widget state
``metadata.signature``, ``orig_nbformat``,     absent when sealed; written and read by editors only
``orig_nbformat_minor``, a cell's ``trusted``
papermill's two error marker cells             only in the exact words and the exact places in which papermill puts
                                               them around a failed cell; their ids are the only bytes that may vary
JSON spelling                                  whitespace, order of keys, escapes in strings, notation of numbers
=============================================  =====================================================================

Canonical JSON is RFC 8785 (keys in UTF-16 order, no whitespace, ECMAScript number notation) with one difference:
a number that is an integer is written with all its digits, so that ``1`` and ``1.0`` are one value (JavaScript knows
no difference and rewrites the one as the other) and a change in the last digit of a large integer is a change.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from rlhf_audit_nb.errors import RecordError

__all__ = [
    "FORMAT",
    "SEAL_KEY",
    "WIDGET_VIEW",
    "Difference",
    "NormalFormError",
    "canonical_json",
    "compare_manifests",
    "freeze",
    "frozen_outputs_digest",
    "manifest_digest",
    "manifest_of",
    "outputs_digest",
    "parse_json",
    "source_digest",
    "text_digest",
    "without_markers",
]

FORMAT = "rlhf-audit-notebook/1"
SEAL_KEY = "rlhf_audit"

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
VIEW_GONE = "An interactive view stood here; a record keeps none."

UNCOVERED_METADATA = frozenset({SEAL_KEY, "widgets", "signature", "orig_nbformat", "orig_nbformat_minor"})
TRANSIENT_METADATA = UNCOVERED_METADATA - {SEAL_KEY}
UNCOVERED_KERNELSPEC = frozenset({"display_name"})
KEPT_KERNELSPEC = frozenset({"display_name", "language", "name"})
UNCOVERED_LANGUAGE_INFO = frozenset({"version", "codemirror_mode"})
UNCOVERED_CELL_METADATA = frozenset({"trusted"})
INJECTED_TAG = "injected-parameters"

MARKER_TAG = "papermill-error-cell-tag"
_MARKER_STYLE = 'style="color:red; font-family:Helvetica Neue, Helvetica, Arial, sans-serif; font-size:2em;"'
_MARKER_MESSAGE = (
    f"<span {_MARKER_STYLE}>An Exception was encountered at '<a href=\"#papermill-error-cell\">In [%s]</a>'.</span>"
)
_MARKER_ANCHOR = (
    f'<span id="papermill-error-cell" {_MARKER_STYLE}>'
    "Execution using papermill encountered an exception here and stopped:</span>"
)

# ECMAScript Number.prototype.toString: decimal notation down to 1e-6, an exponent below.
_LEAST_DECIMAL_POINT = -6
_SURROGATE = re.compile("[\ud800-\udfff]")


class NormalFormError(RecordError):
    """Something in a notebook has no normal form; ``reason`` and the message say what."""

    code = "normal-form"


# -- canonical JSON ---------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise NormalFormError(f"The number {value!r} cannot stand in JSON.")
    if value.is_integer():
        return str(int(value))
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    assert isinstance(exponent, int)
    text = "".join(map(str, digits))
    point = len(text) + exponent
    if point > 0:
        body = f"{text[:point]}.{text[point:]}"
    elif point > _LEAST_DECIMAL_POINT:
        body = f"0.{'0' * -point}{text}"
    else:
        fraction = f".{text[1:]}" if len(text) > 1 else ""
        body = f"{text[0]}{fraction}e{point - 1}"
    return f"-{body}" if sign else body


def _canonical(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (int, float)):
        return _number(value)
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_canonical, value))}]"
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise NormalFormError("A JSON object may only have strings for keys.")
        # Surrogate pass: a lone surrogate is refused below, with the whole text, not here.
        items = sorted(value.items(), key=lambda item: item[0].encode("utf-16-be", "surrogatepass"))
        return "{" + ",".join(f"{json.dumps(k, ensure_ascii=False)}:{_canonical(v)}" for k, v in items) + "}"
    raise NormalFormError(f"A value of type {type(value).__name__} cannot stand in JSON.")


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value (rules in the module's docstring), as UTF-8.

    Raises:
        NormalFormError: a value is no JSON, a number is not finite, a string holds a lone surrogate.
    """
    try:
        return _canonical(value).encode()
    except UnicodeEncodeError as error:
        message = "A string holds half of a surrogate pair, which is not Unicode text."
        raise NormalFormError(message, code="surrogate") from error
    except RecursionError as error:
        raise NormalFormError("The JSON is nested too deeply.") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise NormalFormError(f"The key {twice!r} stands twice in one object.", code="duplicate-key")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise NormalFormError(f"The number {text} is too large.", code="not-json")
    return value


def _no_constant(text: str) -> Any:
    raise NormalFormError(f"{text} is not JSON.", code="not-json")


def parse_json(data: bytes) -> Any:
    """The JSON value in ``data``, read strictly: UTF-8, no duplicate keys, no NaN, no infinite number.

    Raises:
        NormalFormError: with the place (line and column) and the reason.
    """
    try:
        text = data.decode()
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_float=_finite, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise NormalFormError(f"Byte {error.start} is not UTF-8 text.", code="not-json") from error
    except json.JSONDecodeError as error:
        early = not text[error.pos :].strip() or error.msg.startswith("Unterminated string")
        cut = "it ends too early" if early else error.msg
        message = f"It is not JSON at line {error.lineno}, column {error.colno}: {cut}."
        raise NormalFormError(message, code="not-json") from error
    except (RecursionError, ValueError) as error:
        raise NormalFormError(f"It cannot be read as JSON: {error}.", code="not-json") from error


# -- freezing ---------------------------------------------------------------------------------------------------


def _carry_out(text: str) -> str:
    """Backspaces and carriage returns carried out the way JupyterLab does it when it loads a stream output."""
    if "\b" not in text and "\r" not in text:
        return text
    done: list[str] = []
    line: list[str] = []
    at = 0
    for character in text:
        if character == "\n":
            done.append("".join(line) + "\n")
            line, at = [], 0
        elif character == "\r":
            at = 0
        elif character == "\b":
            if at > 0:
                at -= 1
                del line[at]
        else:
            line[at : at + 1] = [character]
            at += 1
    return "".join(done) + "".join(line)


def _joined(text: Any) -> Any:
    if not isinstance(text, list):
        return text
    try:
        return "".join(text)
    except TypeError:
        return text


def _frozen_streams(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    merged: list[dict[str, Any]] = []
    for output in outputs:
        if output.get("output_type") != "stream":
            merged.append(output)
            continue
        text = _joined(output.get("text", ""))
        last = merged[-1] if merged else {}
        if last.get("output_type") == "stream" and last.get("name") == output.get("name"):
            last["text"] += text
        else:
            copy = type(output)(output)
            copy["text"] = text
            merged.append(copy)
    for output in merged:
        if output.get("output_type") == "stream":
            output["text"] = _carry_out(output["text"])
    return merged


def _drop_view(output: dict[str, Any]) -> None:
    data = output.get("data")
    if not isinstance(data, dict) or WIDGET_VIEW not in data:
        return
    del data[WIDGET_VIEW]
    if isinstance(output.get("metadata"), dict):
        output["metadata"].pop(WIDGET_VIEW, None)
    if not data:
        data["text/plain"] = VIEW_GONE


def _freeze_outputs(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    frozen = _frozen_streams(outputs)
    for output in frozen:
        _drop_view(output)
    return frozen


def _freeze_cell(cell: dict[str, Any]) -> None:
    metadata = cell["metadata"]
    for name in UNCOVERED_CELL_METADATA:
        metadata.pop(name, None)
    jupyter = metadata.get("jupyter")
    if metadata.get("collapsed") is not None:
        metadata["jupyter"] = {**(jupyter or {}), "outputs_hidden": metadata["collapsed"]}
    elif isinstance(jupyter, dict) and jupyter.get("outputs_hidden") is not None:
        metadata["collapsed"] = jupyter["outputs_hidden"]
    if not cell.get("attachments", True):
        del cell["attachments"]
    if cell.get("cell_type") == "code":
        cell["outputs"] = _freeze_outputs(cell.get("outputs", []))


def _mended(value: Any) -> Any:
    """The value without lone surrogates; containers are changed in place."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, dict):
        for key in list(value):
            value[key] = _mended(value[key])
    elif isinstance(value, list):
        value[:] = map(_mended, value)
    return value


def freeze(notebook: dict[str, Any]) -> None:
    """Bring a notebook, in place, to the form that editors leave alone (module docstring); a seal it had goes.

    The notebook follows nbformat 4.5 (cells have ids). Freezing twice is freezing once.
    """
    metadata = notebook["metadata"]
    for name in UNCOVERED_METADATA:
        metadata.pop(name, None)
    if isinstance(metadata.get("kernelspec"), dict):
        for name in set(metadata["kernelspec"]) - KEPT_KERNELSPEC:
            del metadata["kernelspec"][name]
    if isinstance(metadata.get("language_info"), dict):
        for name in UNCOVERED_LANGUAGE_INFO:
            metadata["language_info"].pop(name, None)
    _mended(notebook)
    for cell in notebook["cells"]:
        _freeze_cell(cell)


# -- digests ----------------------------------------------------------------------------------------------------


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def text_digest(source: Any) -> str:
    """Digest of a cell's source, given as text or as a list of lines."""
    return _digest(_joined(source))


def _is_json_mime(mime: str) -> bool:
    return mime == "application/json" or (mime.startswith("application/") and mime.endswith("+json"))


def _joined_bundle(bundle: Any) -> Any:
    if not isinstance(bundle, dict):
        return bundle
    return {mime: value if _is_json_mime(mime) else _joined(value) for mime, value in bundle.items()}


def _plain_output(output: Any) -> Any:
    if not isinstance(output, dict):
        return output
    plain = dict(output)
    if "data" in plain:
        plain["data"] = _joined_bundle(plain["data"])
    if "text" in plain:
        plain["text"] = _joined(plain["text"])
    return plain


def outputs_digest(digests: list[str]) -> str:
    """One digest for all outputs of a cell, from the digests of each (as in the manifest)."""
    return _digest(digests)


def _output_digests(outputs: Any) -> list[str]:
    return [_digest(_plain_output(output)) for output in outputs] if isinstance(outputs, list) else [_digest(outputs)]


def frozen_outputs_digest(outputs: list[dict[str, Any]]) -> str:
    """`outputs_digest` of a cell's outputs as freezing would leave them; the outputs stay as they are."""
    copy = json.loads(json.dumps(outputs))
    return outputs_digest(_output_digests(_mended(_freeze_outputs(copy))))


def _attachments(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        return {"": _digest(value)}
    return {name: _digest(_joined_bundle(bundle)) for name, bundle in value.items()}


_CELL_PARTS = frozenset({"id", "cell_type", "source", "outputs", "metadata", "attachments"})
_NOTEBOOK_PARTS = frozenset({"cells", "metadata"})


def _each(mapping: Any, left_out: frozenset[str]) -> dict[str, str]:
    if not isinstance(mapping, dict):
        return {"": _digest(mapping)}
    return {name: _digest(value) for name, value in mapping.items() if name not in left_out}


def _cell_manifest(cell: dict[str, Any]) -> dict[str, Any]:
    part: dict[str, Any] = {
        "id": cell.get("id"),
        "type": cell.get("cell_type"),
        "source": text_digest(cell.get("source")),
        "metadata": _each(cell.get("metadata"), UNCOVERED_CELL_METADATA),
        "other": _each(cell, _CELL_PARTS),
    }
    if "outputs" in cell:
        part["outputs"] = _output_digests(cell["outputs"])
    if cell.get("attachments"):
        part["attachments"] = _attachments(cell["attachments"])
    return part


def _covered_metadata(metadata: Any) -> Any:
    if not isinstance(metadata, dict):
        return metadata
    covered = dict(metadata)
    for name, left_out in (("kernelspec", UNCOVERED_KERNELSPEC), ("language_info", UNCOVERED_LANGUAGE_INFO)):
        if isinstance(covered.get(name), dict):
            covered[name] = {key: value for key, value in covered[name].items() if key not in left_out}
    return covered


def _is_marker(cell: Any, source: str) -> bool:
    return (
        isinstance(cell, dict)
        and set(cell) <= {"id", "cell_type", "metadata", "source"}
        and cell.get("cell_type") == "markdown"
        and cell.get("metadata") == {"tags": [MARKER_TAG]}
        and _joined(cell.get("source")) == source
    )


def without_markers(cells: list[Any]) -> list[tuple[int, Any]]:
    """The cells with their positions, less papermill's two error markers.

    Markers are recognised only as papermill writes them: its exact words in the first cell, naming the execution
    count of a code cell with an error output, and its exact anchor directly before that cell. Anything else that
    carries the marker's tag is a cell like any other.
    """
    numbered = list(enumerate(cells))
    anchors = [position for position, cell in numbered if _is_marker(cell, _MARKER_ANCHOR)]
    if len(anchors) != 1 or not 0 < anchors[0] < len(cells) - 1:
        return numbered
    failed = cells[anchors[0] + 1]
    outputs = failed.get("outputs") if isinstance(failed, dict) else None
    if not isinstance(outputs, list) or not any(
        isinstance(output, dict) and output.get("output_type") == "error" for output in outputs
    ):
        return numbered
    if not _is_marker(cells[0], _MARKER_MESSAGE % failed.get("execution_count")):
        return numbered
    return [(position, cell) for position, cell in numbered if position not in {0, anchors[0]}]


def manifest_of(notebook: dict[str, Any]) -> dict[str, Any]:
    """The digests of every covered part of a notebook, as plain JSON (module docstring)."""
    cells = [_cell_manifest(cell) for _, cell in without_markers(notebook["cells"])]
    return {
        "format": FORMAT,
        "metadata": _each(_covered_metadata(notebook["metadata"]), UNCOVERED_METADATA),
        "other": _each(notebook, _NOTEBOOK_PARTS),
        "cells": cells,
    }


def manifest_digest(manifest: Any) -> str:
    """The notebook's digest: SHA-256 (hex) of its manifest's canonical JSON."""
    return _digest(manifest)


def _tags(cell: dict[str, Any]) -> list[str]:
    tags = cell.get("metadata", {}).get("tags", [])
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def source_digest(notebook: dict[str, Any]) -> str:
    """Digest of what was asked to run: type, tags and source of every cell but the injected parameters.

    Two executions of one notebook have the same source digest, whatever their parameters, outputs and times.
    """
    cells = [
        {"source": _joined(cell.get("source")), "tags": _tags(cell), "type": cell.get("cell_type")}
        for _, cell in without_markers(notebook["cells"])
        if INJECTED_TAG not in _tags(cell)
    ]
    return _digest({"cells": cells, "format": FORMAT})


# -- comparing --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One part that is not as it was sealed: machine-readable code, JSON path in the file, a sentence."""

    code: str
    where: str
    message: str


def _named(position: int, cell: dict[str, Any]) -> str:
    return f"cell {position + 1} (id {cell.get('id')})"


def _compare_keys(sealed: dict[str, str], present: dict[str, str], where: str, code: str, of: str) -> list[Difference]:
    found = []
    for name in sorted(set(sealed) | set(present)):
        place = ".".join(filter(None, (where, name)))
        if name not in present:
            found.append(Difference(code, place, f"{name!r} of {of} was sealed and is gone."))
        elif name not in sealed:
            found.append(Difference(code, place, f"{name!r} of {of} was not there when it was sealed."))
        elif sealed[name] != present[name]:
            found.append(Difference(code, place, f"{name!r} of {of} is not what was sealed."))
    return found


def _compare_outputs(sealed: list[str], present: list[str], where: str, of: str) -> list[Difference]:
    found = [
        Difference("cell-output-changed", f"{where}.outputs[{i}]", f"Output {i + 1} of {of} is not what was sealed.")
        for i, (before, now) in enumerate(zip(sealed, present, strict=False))
        if before != now
    ]
    if len(sealed) != len(present):
        message = f"C{of[1:]} has {len(present)} outputs; {len(sealed)} were sealed."
        found.append(Difference("cell-output-changed", f"{where}.outputs", message))
    return found


def _compare_cell(sealed: dict[str, Any], present: dict[str, Any], position: int) -> list[Difference]:
    where, of = f"cells[{position}]", _named(position, present)
    found = []
    if sealed["type"] != present["type"]:
        message = f"The type of {of} is {present['type']!r}; {sealed['type']!r} was sealed."
        found.append(Difference("cell-type-changed", f"{where}.cell_type", message))
    if sealed["source"] != present["source"]:
        found.append(Difference("cell-source-changed", f"{where}.source", f"The source of {of} was changed."))
    if ("outputs" in sealed) != ("outputs" in present):
        found.append(Difference("cell-changed", f"{where}.outputs", f"The outputs of {of} are not what was sealed."))
    found += _compare_outputs(sealed.get("outputs", []), present.get("outputs", []), where, of)
    found += _compare_keys(sealed["metadata"], present["metadata"], f"{where}.metadata", "cell-metadata-changed", of)
    found += _compare_keys(sealed["other"], present["other"], where, "cell-changed", of)
    found += _compare_keys(
        sealed.get("attachments", {}), present.get("attachments", {}), f"{where}.attachments", "cell-changed", of
    )
    return found


def _renamed(sealed: list[dict[str, Any]], present: list[dict[str, Any]]) -> dict[int, int]:
    """Places where a cell kept its content and lost its id: present index to sealed index."""
    if len(sealed) != len(present):
        return {}
    known, now = {cell["id"] for cell in sealed}, {cell["id"] for cell in present}
    return {
        i: i
        for i, (before, after) in enumerate(zip(sealed, present, strict=True))
        if before["id"] != after["id"] and after["id"] not in known and before["id"] not in now
    }


def compare_manifests(sealed: dict[str, Any], present: dict[str, Any], positions: list[int]) -> list[Difference]:
    """Every part in which a notebook differs from what was sealed; empty where their digests are equal.

    Args:
        sealed: the manifest under the seal, as `manifest_of` makes it.
        present: the manifest of the notebook as it is.
        positions: for each cell of ``present``, its position in the file (markers are left out of manifests).
    """
    found = _compare_keys(
        sealed["metadata"], present["metadata"], "metadata", "notebook-metadata-changed", "the notebook's metadata"
    )
    found += _compare_keys(sealed["other"], present["other"], "", "notebook-changed", "the notebook")
    before, now = sealed["cells"], present["cells"]
    renamed = _renamed(before, now)
    index = {cell["id"]: i for i, cell in enumerate(before)}
    matched: list[int] = []
    for i, cell in enumerate(now):
        position = positions[i]
        partner = renamed.get(i, index.get(cell["id"]))
        if partner is None or partner in matched:
            message = f"Cell {position + 1} (id {cell['id']}) was not there when the notebook was sealed."
            found.append(Difference("cell-added", f"cells[{position}]", message))
            continue
        if i in renamed:
            message = f"The id of cell {position + 1} is {cell['id']!r}; {before[partner]['id']!r} was sealed."
            found.append(Difference("cell-id-changed", f"cells[{position}].id", message))
        if matched and partner < max(matched):
            message = f"Cell {position + 1} (id {cell['id']}) stood elsewhere when the notebook was sealed."
            found.append(Difference("cell-moved", f"cells[{position}]", message))
        matched.append(partner)
        found += _compare_cell(before[partner], cell, position)
    found += [
        Difference("cell-removed", f"cells[{i}]", f"C{_named(i, cell)[1:]} was sealed and is gone.")
        for i, cell in enumerate(before)
        if i not in matched
    ]
    return found
