"""Where notebooks come from and records go: a file, or any path that papermill has a handler for. Floor 3.

A `Path` is a file. Text is a file too, unless it is ``-`` (standard input, standard output) or has a scheme
(``s3://``, ``gs://``, ``abs://``, ``adl://``, ``hdfs://``, ``https://``, and whatever a package adds to papermill):
then papermill's handler reads or writes it, with the packages and the credentials that papermill would use.

What is shown or recorded of an address has no query, no fragment and no user in it: they may be secrets.
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import nbformat

from rlhf_audit_nb.errors import RecordError
from rlhf_audit_nb.records.normal_form import NormalFormError, parse_json
from rlhf_audit_nb.trail.durable import write_durably

__all__ = [
    "STREAM",
    "Place",
    "base_name",
    "check_output",
    "is_file",
    "load_notebook",
    "read_place",
    "replace_file",
    "shown",
    "write_place",
]

STREAM = "-"
SUFFIX = ".ipynb"

Place = Path | str

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HTTP_SECONDS = 60
_NO_NOTEBOOK = "Name a whole .ipynb file; if this one was a notebook, restore it from a copy."
# What no later attempt can mend: asked of the store before a notebook runs.
_FATAL = frozenset({"NoSuchBucket", "NoCredentialsError", "InvalidAccessKeyId", "EndpointConnectionError"})


def is_file(place: Place) -> bool:
    """Whether a place is a file of this machine."""
    return isinstance(place, Path) or not (place == STREAM or _SCHEME.match(place))


def shown(place: Place) -> str:
    """The place as a person may be told it."""
    if is_file(place):
        return str(place)
    if place == STREAM:
        return "standard input or output"
    parts = urlsplit(str(place))
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def base_name(place: Place) -> str:
    """The last part of the place, which is what a record says of it: folders and hosts stay at home."""
    return Path(place).name if is_file(place) else shown(place).rpartition("/")[2] if place != STREAM else STREAM


def _told(error: Exception, place: Place) -> str:
    """The first line of what another package raised, without what may be secret in the address."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    query = urlsplit(str(place)).query
    text = text.replace(str(place), shown(place))
    return (text.replace(query, "…") if query else text).rstrip(".")


def _handler(place: str) -> Any:
    from papermill.iorw import LocalHandler, papermill_io

    handler = papermill_io.get_handler(place)
    if isinstance(handler, LocalHandler):
        raise RecordError(
            f"{shown(place)} is of a kind that papermill has no handler for.",
            next_step="Name a file, or a path such as s3://, gs://, abs://, adl://, hdfs:// or https://.",
            code="no-handler",
        )
    return handler


def _failed(place: Place, doing: str, error: Exception) -> RecordError:
    from papermill.exceptions import PapermillOptionalDependencyException

    text = _told(error, place)
    extra = re.search(r"papermill\[(\w+)\]", text)
    if isinstance(error, PapermillOptionalDependencyException) and extra:
        needed = re.match(r"The (\S+) optional dependency", text)
        return RecordError(
            f"{shown(place)} cannot be {doing}: {needed[1] if needed else 'what serves it'} is not installed.",
            next_step=f'Run pip install "papermill[{extra[1]}]".',
            code="missing-extra",
        )
    return RecordError(
        f"{shown(place)} cannot be {doing}: {text}.",
        next_step="Check the path, and the credentials that papermill uses for it.",
        code="no-notebook" if doing == "read" else "output",
    )


# -- reading ----------------------------------------------------------------------------------------------------------


def _read_http(place: str) -> bytes:
    import requests

    # Papermill's own would wait for ever, and take a server's error page for the notebook.
    answer = requests.get(place, headers={"Accept": "application/json"}, timeout=_HTTP_SECONDS)
    answer.raise_for_status()
    return answer.content


def read_place(place: Place) -> bytes:
    """The bytes of a notebook.

    Raises:
        RecordError: it cannot be read.
    """
    if is_file(place):
        try:
            return Path(place).read_bytes()
        except OSError as error:
            raise RecordError(
                f"The notebook {place} cannot be read: {error.strerror or error}.",
                next_step="Name an .ipynb file that exists.",
                code="no-notebook",
            ) from error
    handler = _handler(str(place))
    try:
        from papermill.iorw import HttpHandler

        data = _read_http(str(place)) if handler is HttpHandler else handler.read(str(place))
    except Exception as error:  # whatever the package that serves the scheme raises
        raise _failed(place, "read", error) from error
    return data.encode() if isinstance(data, str) else bytes(data)


def load_notebook(place: Place) -> Any:
    """The notebook, read strictly, as nbformat's node of version 4.

    Raises:
        RecordError: it cannot be read, or is no notebook.
    """
    data = read_place(place)
    try:
        value = parse_json(data)
        with warnings.catch_warnings():
            # Old notebooks have cells without ids, others have one id twice: papermill gives them some.
            warnings.simplefilter("ignore", nbformat.warnings.MissingIDFieldWarning)
            warnings.simplefilter("ignore", nbformat.warnings.DuplicateCellId)
            nbformat.validate(value)
            return nbformat.reads(data.decode(), as_version=4)
    except NormalFormError as error:
        raise RecordError(
            f"{shown(place)} is not a notebook. {error.message}", next_step=_NO_NOTEBOOK, code="not-a-notebook"
        ) from error
    except (nbformat.ValidationError, nbformat.reader.NotJSONError, AttributeError, KeyError, TypeError) as error:
        line = str(error).splitlines()[0]
        raise RecordError(
            f"{shown(place)} is not a notebook: {line}", next_step=_NO_NOTEBOOK, code="not-a-notebook"
        ) from error


# -- writing ----------------------------------------------------------------------------------------------------------


def check_output(source: Place, output: Place) -> None:
    """What can be known before anything runs of whether the record can be written.

    A file is tried. At an address nothing is written: its packages must be installed, its handler must be one that
    writes, and a store that lists its files must not answer that the bucket or the credentials are missing.

    Raises:
        RecordError: it cannot.
    """
    if output == STREAM:
        return
    path = Path(output) if is_file(output) else Path(urlsplit(str(output)).path)
    if path.suffix != SUFFIX and not str(output).startswith(("http://", "https://")):
        example = path.with_suffix(SUFFIX) if path.name else "record.ipynb"
        raise RecordError(
            f"The record {shown(output)} would not end in {SUFFIX}.",
            next_step=f"Write -o {example if is_file(output) else base_name(example)}.",
            code="output",
        )
    same = str(source) == str(output)
    if is_file(source) and is_file(output):
        same = path.exists() and path.resolve() == Path(source).resolve()
    if same:
        raise RecordError(
            f"The record would overwrite the notebook {shown(source)}.",
            next_step="Name another file with -o.",
            code="output",
        )
    if is_file(output):
        _try_file(path)
    else:
        _try_address(str(output))


def _try_file(path: Path) -> None:
    try:
        if path.exists():
            with path.open("ab"):
                pass
        else:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".rlhf-audit-"):
                pass
    except OSError as error:
        raise RecordError(
            f"The record {path} cannot be written: {error.strerror or error}.",
            next_step="Name a file in a folder that exists and that you may write to, with -o.",
            code="output",
        ) from error


def _try_address(place: str) -> None:
    from papermill.exceptions import PapermillOptionalDependencyException
    from papermill.iorw import GithubHandler, HttpHandler

    handler = _handler(place)
    if isinstance(handler, GithubHandler):
        raise RecordError(
            f"{shown(place)} cannot be written: papermill reads from GitHub and does not write there.",
            next_step="Name a file with -o.",
            code="output",
        )
    if handler is HttpHandler:
        return
    try:
        handler.listdir(place)
    except PapermillOptionalDependencyException as error:
        raise _failed(place, "written", error) from error
    except Exception as error:  # who may write need not be allowed to list: only what is fatal stops here
        answer = getattr(error, "response", None) or {}
        code = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else None
        if (code or type(error).__name__) in _FATAL:
            raise _failed(place, "written", error) from error


def replace_file(path: Path, text: str) -> None:
    """Replaces the file whole: a reader sees the old bytes or the new ones.

    Where only the file may be written and not its folder, it is overwritten as it stands.
    """
    try:
        write_durably(path, text.encode(), path.stat().st_mode & 0o777 if path.exists() else 0o644)
    except PermissionError:
        path.write_text(text, encoding="utf-8")


def _ascii(text: str) -> str:
    """The same JSON in ASCII: papermill's reader of S3 fails on a character that lies on its buffer's edge."""
    return re.sub("[^\x00-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)


def write_place(place: Place, text: str) -> None:
    """Writes a notebook, given as JSON text.

    Raises:
        OSError: a file cannot be written.
        RecordError: an address cannot be written.
    """
    if is_file(place):
        replace_file(Path(place), text)
        return
    try:
        _handler(str(place)).write(text if place == STREAM else _ascii(text), str(place))
    except Exception as error:  # whatever the package that serves the scheme raises
        raise _failed(place, "written", error) from error
