"""A notebook's parameters: what its cell takes, and whether the values that are given fit. Floor 3.

The cell tagged ``parameters`` is read, never run. Names and types are checked before anything runs, whichever way the
values come: from Python, a command line, a file, or through papermill. Only a Python cell has types that can be read;
of another language's cell the names are known, and the kernel will say the rest.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rlhf_audit_nb.errors import RecordError
from rlhf_audit_nb.records.normal_form import NormalFormError, canonical_json, parse_json
from rlhf_audit_nb.records.typing_rules import Kind, kind_of_annotation, kind_of_default

if TYPE_CHECKING:
    Notebook = Mapping[str, Any]

__all__ = [
    "INJECTED_TAG",
    "Parameter",
    "check_values",
    "parameters_of",
    "parse_parameters",
    "read_parameters_file",
    "typed_values",
]

PARAMETERS_TAG = "parameters"
INJECTED_TAG = "injected-parameters"

_LARGEST = 2**53 - 1  # of the integers that a browser writes back as it read them
_SHOWN = 80
_MAX_FILE = 16 << 20

# ``x = 1``, ``x <- 1``, ``val x: Int = 1``, ``var x = 1;``, ``$x = 1``: what the cells of other languages look like.
_FOREIGN = re.compile(
    r"^[ \t]*(?:\w+[ \t]+)*\$?(?P<name>[^\W\d][\w.]*)[ \t]*(?::[^=\n]+)?(?:<-|=(?![=~>]))[ \t]*"
    r"(?P<value>[^\n]*?)[ \t]*;?$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Parameter:
    """One assignment of a notebook's parameters cell.

    Args:
        name: the variable.
        annotation: its type as annotated, such as ``int | None``; empty where there is none.
        default: its value, or the source text of it where it is no literal (``literal`` is then false); ``None`` where
            the cell declares a type and no value.
        literal: whether ``default`` is a value.
        help: the comment beside it.
    """

    name: str
    annotation: str
    default: Any
    literal: bool
    help: str

    @property
    def kind(self) -> Kind | None:
        """What a value may be; ``None`` where the notebook does not say."""
        if self.annotation:
            return kind_of_annotation(self.annotation)
        return kind_of_default(self.default) if self.literal else None


# -- the cell ---------------------------------------------------------------------------------------------------------


def parameters_of(notebook: Notebook, language: str | None = None) -> dict[str, Parameter] | None:
    """The assignments of the first cell tagged ``parameters``, by name; ``None`` where no cell has that tag.

    Args:
        notebook: as nbformat reads it.
        language: of the kernel that will run it; ``None`` takes what the notebook says.

    Raises:
        RecordError: the cell is Python and cannot be parsed.
    """
    tagged = (
        (position, cell["source"])
        for position, cell in enumerate(notebook["cells"])
        if PARAMETERS_TAG in cell["metadata"].get("tags", [])
    )
    position, source = next(tagged, (-1, ""))
    if position < 0:
        return None
    if not _is_python(language or _language(notebook)):
        foreign = (found.group("name", "value") for found in _FOREIGN.finditer(source))
        return {name: Parameter(name, "", value, False, "") for name, value in foreign}
    try:
        return {found.name: found for found in _python_parameters(source)}
    except SyntaxError as error:
        raise RecordError(
            f"The parameters cell (cell {position + 1}) is not Python at line {error.lineno}: {error.msg}.",
            next_step="Correct that cell; a parameters cell holds assignments such as epsilon = 8.0.",
            code="parameters-cell",
        ) from error


def _language(notebook: Notebook) -> str:
    metadata = notebook["metadata"]
    for part, name in (("language_info", "name"), ("kernelspec", "language")):
        said = metadata.get(part, {}).get(name)
        if said:
            return str(said)
    return "python"


def _is_python(language: str) -> bool:
    return language.lower() in ("python", "ipython", "python3")


def _value(text: str) -> tuple[Any, bool]:
    try:
        return ast.literal_eval(text), True
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text, False


def _parsed(source: str) -> tuple[list[ast.stmt], list[str]]:
    lines = ["" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()]
    try:
        return ast.parse("\n".join(lines)).body, lines
    except SyntaxError:
        # IPython's own: ``files = !ls``, ``path = %pwd``.
        from IPython.core.inputtransformer2 import TransformerManager

        manager: Any = TransformerManager
        lines = manager().transform_cell("\n".join(lines)).splitlines()
        return ast.parse("\n".join(lines)).body, lines


def _assigned(node: ast.stmt) -> Iterator[tuple[str, ast.expr | None]]:
    if isinstance(node, ast.AnnAssign):
        if isinstance(node.target, ast.Name):
            yield node.target.id, node.value
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Name):
                yield target.id, node.value
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts, strict=False)
                yield from ((name.id, value) for name, value in pairs if isinstance(name, ast.Name))


def _python_parameters(source: str) -> Iterator[Parameter]:
    """Every assignment of the cell's own level; papermill itself overlooks ``int | None`` and more."""
    body, lines = _parsed(source)
    for node in body:
        annotation = _annotation(node.annotation) if isinstance(node, ast.AnnAssign) else ""
        beside = lines[(node.end_lineno or node.lineno) - 1].encode()[node.end_col_offset or 0 :].decode()
        comment = beside.partition("#")[2].strip()
        for name, value in _assigned(node):
            default, literal = (None, False) if value is None else _value(ast.unparse(value))
            yield Parameter(name, annotation, default, literal, comment)


def _annotation(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ast.unparse(node)


# -- checking ---------------------------------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    """A value in a sentence: cut where it is long; Python refuses to write out a very large integer at all."""
    try:
        text = repr(value)
    except ValueError:
        return f"an integer of {value.bit_length():,} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _no_cell(notebook: object, names: list[str]) -> RecordError:
    return RecordError(
        f"{notebook} has no cell tagged {PARAMETERS_TAG!r}, so {names[0]!r} cannot be set.",
        next_step=f"Tag the cell that assigns the defaults with {PARAMETERS_TAG!r}, or run without parameters.",
        code="no-parameters-cell",
    )


def _unknown(name: str, known: Mapping[str, Parameter]) -> RecordError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return RecordError(
        f"The notebook has no parameter {name!r}.",
        next_step=f"{hint}It has: {', '.join(sorted(known)) or 'none'}.",
        code="unknown-parameter",
    )


def check_values(
    notebook: object, known: Mapping[str, Parameter] | None, values: Mapping[str, Any], hint: str = ""
) -> None:
    """Checks values against a notebook's parameters.

    Args:
        notebook: what to call it.
        known: its parameters; ``None`` where it has no parameters cell.
        values: by name.
        hint: what the person can do besides, where a value is of another type.

    Raises:
        RecordError: there is no such cell, a name is not assigned in it (with the closest one that is), or a value is
            of another type than the default or its annotation, or nothing that a record can hold.
    """
    if not values:
        return
    if known is None:
        raise _no_cell(notebook, list(values))
    for name, value in values.items():
        if name not in known:
            raise _unknown(name, known)
        _check_value(known[name], value, hint)


def _check_value(parameter: Parameter, value: Any, hint: str) -> None:
    kind = parameter.kind
    if kind is not None and not kind.fits(value):
        default = f"Its default is {_shown(parameter.default)}." if parameter.literal else ""
        raise RecordError(
            f"Parameter {parameter.name!r} is {_shown(value)}; the notebook takes {kind.words} there.",
            next_step=f"{default} {hint}".strip() or f"Give {kind.words}.",
            code="parameter-type",
        )
    _check_json(parameter.name, value)


def _check_json(name: str, value: Any) -> None:
    why = _unrecordable(value)
    if not why:
        try:
            canonical_json(value)
        except NormalFormError as error:
            why = error.message
    if why:
        raise RecordError(
            f"Parameter {name!r} is {_shown(value)}, which a record cannot hold: {why}",
            next_step="Use text, finite numbers, true or false, null, lists and dictionaries of these.",
            code="parameter-type",
        )


def _unrecordable(value: Any) -> str:
    """What papermill or a browser would change on the way."""
    if isinstance(value, int) and abs(value) > _LARGEST:
        return f"an integer beyond {_LARGEST:,} is rounded by every browser that saves the notebook; give it as text."
    if isinstance(value, tuple):
        return "papermill writes a tuple into the notebook as text; give a list."
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((why for item in inner if (why := _unrecordable(item))), "")


# -- reading ----------------------------------------------------------------------------------------------------------


def _guessed(text: str) -> Any:
    for word, value in (("true", True), ("false", False), ("none", None), ("null", None)):
        if text.lower() == word:
            return value
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            number = kind(text)
            return number if math.isfinite(number) else text
    if text[:1] in "[{(":
        with contextlib.suppress(NormalFormError):
            return parse_json(text.encode())
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(text)
            return list(value) if isinstance(value, tuple) else value if isinstance(value, (list, dict)) else text
    return text


def _typed(parameter: Parameter, text: str) -> Any:
    kind, value = parameter.kind, _guessed(text)
    if kind is None:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and "float" in kind.names and "int" not in kind.names:
        with contextlib.suppress(OverflowError):
            return float(value)
    return text if not kind.fits(value) and kind.fits(text) else value


def typed_values(notebook: object, known: Mapping[str, Parameter] | None, pairs: Mapping[str, str]) -> dict[str, Any]:
    """Values typed on a command line, read as the types that the notebook's parameters have.

    ``1`` becomes text where the default is text, a float where it is a float; lists and dictionaries are JSON or
    Python literals. Where the notebook does not say, numbers, ``true``, ``false`` and ``none`` are read as such.

    Raises:
        RecordError: as `check_values`.
    """
    if pairs and known is None:
        raise _no_cell(notebook, list(pairs))
    for name in pairs:
        if name not in (known or {}):
            raise _unknown(name, known or {})
    values = {name: _typed((known or {})[name], text) for name, text in pairs.items()}
    check_values(notebook, known, values)
    return values


class _Loader(yaml.SafeLoader):
    """YAML as papermill reads it (a date stays text), with the numbers of YAML 1.2 and no key twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's own, for each class
        first: [pair for pair in pairs if pair[0] not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002  PyYAML's own
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) != len(keys):
            raise yaml.constructor.ConstructorError(None, None, "a key stands twice", node.start_mark)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


# ``1e-5`` is a number for everybody but YAML 1.1, which wants a dot in it.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+|[0-9]+\.[0-9]*|\.[0-9]+|\.(?:inf|Inf|INF|nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse_parameters(text: str, what: str) -> dict[str, Any]:
    """Parameters from YAML text, of which JSON is a part: one mapping of names to values.

    Raises:
        RecordError: it is not YAML, or no mapping of names; ``what`` says where it stood.
    """
    if text.lstrip().startswith("{"):
        with contextlib.suppress(NormalFormError):
            return dict(parse_json(text.encode()))  # YAML's own braces are read below
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark is not None else ""
        raise _no_parameters(what, f"It cannot be read as YAML{place}: {problem}.") from error
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise _no_parameters(what, "It is no mapping of names to values.")
    return value


def _no_parameters(what: str, why: str) -> RecordError:
    return RecordError(
        f"{what} holds no parameters: {why}",
        next_step="Write one line a parameter, such as epsilon: 8.0, or a JSON object.",
        code="parameters-file",
    )


def read_parameters_file(path: Path | str) -> dict[str, Any]:
    """`parse_parameters` of a YAML or JSON file.

    Raises:
        RecordError: it cannot be read, or holds no parameters.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_FILE + 1)
        if len(data) > _MAX_FILE:
            raise _no_parameters(str(path), f"It is over {_MAX_FILE:,} bytes.")
        return parse_parameters(data.decode("utf-8-sig"), str(path))
    except OSError as error:
        raise RecordError(
            f"The parameters file {path} cannot be read: {error.strerror or error}.",
            next_step="Name a YAML or JSON file that exists.",
            code="parameters-file",
        ) from error
    except UnicodeDecodeError as error:
        raise _no_parameters(str(path), f"Byte {error.start} is not UTF-8 text.") from error
