"""What an annotation or a default lets a parameter be, as a test on JSON values. Floor 3.

Read from the source text alone: nothing of the notebook is imported or evaluated. What is understood: ``bool``,
``int``, ``float``, ``str``, ``list``, ``dict``, ``None``, ``list[int]``, ``dict[str, float]``, ``tuple[int, ...]`` and
the sequences and mappings of `typing` (a parameter is JSON: what comes is a list or a dictionary), ``Optional``,
``Union``, ``|``, ``Literal``, ``Annotated``, ``Final``, and any of these as text. Anything else says nothing, and then
any value passes: the notebook itself will say.

A whole number fits where a float is wanted, never the reverse; true and false fit where a bool is wanted alone.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["Kind", "kind_of_annotation", "kind_of_default"]


@dataclass(frozen=True)
class Kind:
    """What a value may be.

    Args:
        words: for a person, such as ``list[int] or None``.
        fits: whether a value is of this kind.
        names: the plain types among the alternatives.
    """

    words: str
    fits: Callable[[Any], bool]
    names: frozenset[str]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_float(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


_PLAIN: dict[str, Callable[[Any], bool]] = {
    "bool": lambda value: isinstance(value, bool),
    "int": _is_int,
    "float": _is_float,
    "str": lambda value: isinstance(value, str),
    "list": lambda value: isinstance(value, list),
    "dict": lambda value: isinstance(value, dict),
    "None": lambda value: value is None,
}
_LISTS = frozenset({"list", "List", "Sequence", "MutableSequence", "Iterable", "Collection"})
_TUPLES = frozenset({"tuple", "Tuple"})
_DICTS = frozenset({"dict", "Dict", "Mapping", "MutableMapping"})
_WRAPPERS = frozenset({"Annotated", "Final", "ClassVar"})
_OF_DICT = 2


def _plain(name: str) -> Kind:
    return Kind(name, _PLAIN[name], frozenset({name}))


def _union(kinds: Iterable[Kind | None]) -> Kind | None:
    """Any of them; nothing is said where one of them says nothing."""
    known: list[Kind] = []
    for kind in kinds:
        if kind is None:
            return None
        known.append(kind)
    words = " or ".join(dict.fromkeys(kind.words for kind in known))
    return Kind(
        words, lambda value: any(kind.fits(value) for kind in known), frozenset().union(*(k.names for k in known))
    )


def _list_of(item: Kind | None) -> Kind:
    if item is None:
        return _plain("list")
    fits = item.fits
    return Kind(
        f"list[{item.words}]",
        lambda value: isinstance(value, list) and all(map(fits, value)),
        frozenset({"list"}),
    )


def _tuple_of(items: list[Kind | None]) -> Kind:
    words = ", ".join("anything" if kind is None else kind.words for kind in items)

    def fits(value: Any) -> bool:
        if not isinstance(value, list) or len(value) != len(items):
            return False
        return all(kind is None or kind.fits(item) for kind, item in zip(items, value, strict=True))

    return Kind(f"a list of {len(items)} ({words})", fits, frozenset({"list"}))


def _dict_of(item: Kind | None) -> Kind:
    if item is None:
        return _plain("dict")
    fits = item.fits
    return Kind(
        f"dict[str, {item.words}]",
        lambda value: isinstance(value, dict) and all(map(fits, value.values())),
        frozenset({"dict"}),
    )


def _literal(nodes: list[ast.expr]) -> Kind | None:
    try:
        values = [ast.literal_eval(node) for node in nodes]
    except ValueError:
        return None  # an enumeration's member: only the notebook knows it
    # True is not 1 here.
    allowed = {(type(value), value) for value in values}
    return Kind(
        " or ".join(map(repr, values)),
        lambda value: not isinstance(value, list | dict) and (type(value), value) in allowed,
        frozenset("None" if value is None else type(value).__name__ for value in values),
    )


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _subscript(node: ast.Subscript) -> Kind | None:
    name = _last_name(node.value)
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name == "Literal":
        return _literal(parts)
    if name in _WRAPPERS:
        return _kind(parts[0])
    kinds = [_kind(part) for part in parts]
    if name == "Optional":
        return _union([*kinds, _plain("None")])
    if name == "Union":
        return _union(kinds)
    if name in _LISTS:
        return _list_of(kinds[0])
    if name in _TUPLES:
        endless = isinstance(parts[-1], ast.Constant) and parts[-1].value is ...
        return _list_of(kinds[0]) if endless else _tuple_of(kinds)
    if name in _DICTS:
        return _dict_of(kinds[1] if len(kinds) == _OF_DICT else None)
    return None


def _kind(node: ast.expr) -> Kind | None:
    if isinstance(node, ast.Constant):
        if node.value is None:
            return _plain("None")
        return kind_of_annotation(node.value) if isinstance(node.value, str) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union((_kind(node.left), _kind(node.right)))
    if isinstance(node, ast.Subscript):
        return _subscript(node)
    name = _last_name(node)
    if name in _LISTS or name in _TUPLES:
        return _plain("list")
    if name in _DICTS:
        return _plain("dict")
    return _plain(name) if name in _PLAIN else None


def kind_of_annotation(text: str) -> Kind | None:
    """What an annotation allows; ``None`` where it says nothing that JSON values could be held against."""
    try:
        return _kind(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError):
        return None


def kind_of_default(value: Any) -> Kind | None:
    """What a parameter without annotation may be, from its default; ``None`` (``x = None``) says nothing."""
    if value is None:
        return None
    if isinstance(value, tuple):
        return _plain("list")
    name = type(value).__name__
    return _plain(name) if name in _PLAIN else None
