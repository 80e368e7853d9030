r"""Outputs of cells in one form, so that two runs of a notebook can be compared: declared rules, each counted. Floor 3.

Two runs of the same code differ in what has nothing to do with the result: addresses in memory, how long something
took, the names of the trails that recorded them. A rule says what is brought into one form and by what; none applies in
silence, each is listed with the number of its matches. There are three kinds, by where they are from:

- ``file``: regular expressions that whoever compares names, in the form of nbval's sanitize files::

      [dates]
      regex: \d{4}-\d\d-\d\d
      replace: DATE

- ``record``: regular expressions that the notebook declares in ``metadata.reproduce.normalise``, a list of objects with
  ``name``, ``regex`` and ``replace``. They are covered by the record's seal;
- ``tool``: those of `TOOL_RULES`, in their order, after the others.

A cell tagged ``nbval-ignore-output`` is not compared, which is a rule as well. Texts are compared as they read after
all rules, JSON in its canonical spelling, everything else (pictures) byte by byte.
"""

from __future__ import annotations

import configparser
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.events import AppliedRule
from rlhf_audit_nb.records.normal_form import NormalFormError, canonical_json

__all__ = [
    "IGNORE_TAG",
    "RULES_KEY",
    "TOOL_RULES",
    "Identity",
    "OutputDifference",
    "OutputsCompared",
    "Rule",
    "compare_outputs",
    "declared_rules",
    "numbers_close",
    "read_rules",
]

RULES_KEY = "reproduce"
"""Of a notebook's metadata: ``{"normalise": [{"name": ..., "regex": ..., "replace": ...}, ...]}``."""
IGNORE_TAG = "nbval-ignore-output"
MAX_RULES = 100
MAX_PATTERN = 1000
_PANEL = "<style>.raps {"
_TIME = r"(?:\d+:)?\d+:\d\d"

TOOL_RULES: dict[str, str] = {
    "ignored cells": f"a cell tagged {IGNORE_TAG} is not compared",
    "streams": "what a cell writes to stdout is one text, and what it writes to stderr another, however they alternate",
    "tracebacks": "of an error its name and words are compared, not the frames",
    "panels": "of this tool's panel the text is compared, from which its page and its picture are drawn",
    "trail": "origins, run and record ids; in outputs that name the trail also its size, root, keys and times",
    "memory addresses": "0x and 7 to 16 hex digits",
    "widget ids": "models of widgets are numbered in the order in which they appear",
    "cell files": "the files that an IPython kernel makes of cells, as warnings name them",
    "progress bars": "times and rates in the brackets of tqdm and of a trainer's bar",
    "trainer times": "runtime and rates that a trainer prints, such as 'train_runtime': 1.2",
}
"""The rules that come with the tool, by name, in the order in which they apply."""

# Each with a text without which it cannot match: to look for that is a hundred times faster than to match in vain.
_REGULAR: dict[str, tuple[tuple[str, re.Pattern[str], str], ...]] = {
    "memory addresses": (("0x", re.compile(r"0x[0-9a-fA-F]{7,16}\b"), "0x…"),),
    "cell files": (("ipykernel_", re.compile(r"[^\s\"'<>]*ipykernel_\d+/\d+\.py"), "<cell>"),),
    "progress bars": (
        (", ", re.compile(rf"\[{_TIME}<(?:{_TIME}|\?), [^\]\n]*\]"), "[…]"),
        (", Epoch", re.compile(rf"(?<=\d) {_TIME}(?: < {_TIME}, [\d.]+ it/s)?(?=, Epoch)"), " …"),
    ),
    "trainer times": (
        (
            "': ",
            re.compile(r"('(?:\w+_)?(?:runtime|(?:samples|steps|tokens)_per_second)'): '?[-+\d.e]+'?"),
            r"\1: …",
        ),
    ),
}
_OF_TRAIL = (
    (re.compile(r"TRAIL\+[0-9a-f]{8}\+[A-Za-z0-9+/]+=*"), "TRAIL+KEY"),
    (re.compile(r"(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{43}=(?![A-Za-z0-9+/=])"), "ROOT"),
    (re.compile(r"\b[\d,]+ (?=entr(?:y|ies)\b)"), "N "),
    (re.compile(r"(?<=>entries</th><td style=\"text-align:left\">)[\d,]+"), "N"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d(?::\d\d)? UTC"), "TIME"),
)
_WIDGET = re.compile(r"(?<=IPY_MODEL_)[0-9a-f]{32}|(?<=\"model_id\":\")[0-9a-f]{32}|(?<=\"model_id\": \")[0-9a-f]{32}")
_NUMBER = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?")
_SHORT_ID = 8


@dataclass(frozen=True)
class Rule:
    """One declared regular expression and what takes the place of its matches."""

    name: str
    pattern: re.Pattern[str]
    replace: str
    origin: str


@dataclass(frozen=True)
class Identity:
    """What a trail called itself and what it recorded: these names differ between any two trails.

    Attributes:
        origin: the trail's name.
        runs: the ids of the runs, in their order.
        records: the ids of records.
    """

    origin: str = ""
    runs: tuple[str, ...] = ()
    records: tuple[str, ...] = ()

    def names(self) -> list[tuple[str, str]]:
        """Each name with what stands for it, those that hold others first."""
        found = [(run, f"RUN-{place}") for place, run in enumerate(self.runs, start=1)]
        found += [(record, "RECORD") for record in self.records]
        found += [(name[:_SHORT_ID], instead) for name, instead in found]
        found.append((self.origin, "TRAIL"))
        return [(name, instead) for name, instead in found if name]


@dataclass(frozen=True, kw_only=True)
class OutputDifference:
    """An output that is not as it was.

    Attributes:
        place: such as ``cells[3].outputs[0].data.text/plain``.
        cell: the cell's place in the notebook, from 0.
        cell_id: its id.
        what: one sentence, without a value.
        expected: the text then, after all rules; ``None`` where it is no text.
        found: the text now, likewise.
    """

    place: str
    cell: int
    cell_id: str
    what: str
    expected: str | None = None
    found: str | None = None


@dataclass(frozen=True)
class OutputsCompared:
    """All outputs of two notebooks, compared.

    Attributes:
        compared: outputs of the first one that were compared, and cells without any.
        differences: in the order of the cells.
        tolerated: outputs that differ in numbers within the tolerance.
        rules: every rule with its matches in both, and in the first one alone.
    """

    compared: int
    differences: tuple[OutputDifference, ...]
    tolerated: int
    rules: tuple[tuple[AppliedRule, int], ...]


# --- rules -----------------------------------------------------------------------------------------------------------


def _rule(name: object, regex: object, replace: object, where: str, origin: str) -> Rule:
    if not isinstance(name, str) or not isinstance(regex, str) or not isinstance(replace, str) or not regex:
        raise ConfigError(
            f"A rule of {where} has no name, regex and replace that are texts.",
            next_step="Give each rule all three.",
            code="normalise",
        )
    if len(regex) > MAX_PATTERN:
        raise ConfigError(
            f"The rule {name!r} of {where} has {len(regex)} characters; {MAX_PATTERN} are the most.",
            next_step="Write several rules.",
            code="normalise",
        )
    try:
        pattern = re.compile(regex, re.MULTILINE)
        pattern.sub(replace, "")
        re.compile(f"(?:{regex})|").sub(replace, "")  # a wrong group in the replacement shows where something matches
    except (re.error, IndexError) as error:
        raise ConfigError(
            f"The rule {name!r} of {where} is no regular expression: {error}.",
            next_step="Correct regex and replace; they are Python's.",
            code="normalise",
        ) from error
    return Rule(name, pattern, replace, origin)


def read_rules(path: Path | str) -> tuple[Rule, ...]:
    """The rules of a file (module docstring).

    Raises:
        ConfigError: it cannot be read, or a rule is none.
    """
    reader = configparser.ConfigParser(interpolation=None, strict=True)
    try:
        reader.read_string(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"The rules {path} cannot be read: {error.strerror or error}.",
            next_step="Check the path.",
            code="normalise",
        ) from error
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} holds no rules: {str(error).splitlines()[0]}",
            next_step="Write a section for each: [name], then regex: and replace:, as for nbval.",
            code="normalise",
        ) from error
    rules = [
        _rule(name, reader[name].get("regex"), reader[name].get("replace", ""), str(path), "file")
        for name in reader.sections()
    ]
    return _few(rules, str(path))


def declared_rules(notebook: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules that a notebook declares of itself.

    Raises:
        ConfigError: they are not in their form.
    """
    declared = notebook["metadata"].get(RULES_KEY, {})
    listed = declared.get("normalise", []) if isinstance(declared, Mapping) else None
    if not isinstance(listed, list) or not all(isinstance(item, Mapping) for item in listed):
        raise ConfigError(
            f"The notebook's metadata.{RULES_KEY}.normalise is no list of rules.",
            next_step='Write {"normalise": [{"name": ..., "regex": ..., "replace": ...}]}.',
            code="normalise",
        )
    where = "the notebook"
    rules = [_rule(item.get("name"), item.get("regex"), item.get("replace", ""), where, "record") for item in listed]
    return _few(rules, where)


def _few(rules: list[Rule], where: str) -> tuple[Rule, ...]:
    if len(rules) > MAX_RULES:
        raise ConfigError(
            f"There are {len(rules)} rules in {where}; {MAX_RULES} are the most.",
            next_step="Take some together.",
            code="normalise",
        )
    return tuple(rules)


# --- one form --------------------------------------------------------------------------------------------------------


@dataclass
class _Side:
    """One of the two notebooks while it is brought into form."""

    rules: Sequence[Rule]
    identity: Identity
    applied: Counter[tuple[str, str]] = field(default_factory=Counter)
    widgets: dict[str, str] = field(default_factory=dict)

    def count(self, rule: str, times: int = 1, origin: str = "tool") -> None:
        self.applied[origin, rule] += times

    def text(self, text: str, *, of_trail: bool) -> str:
        for rule in self.rules:
            text, times = rule.pattern.subn(rule.replace, text)
            self.count(rule.name, times, rule.origin)
        text = self._without_names(text, of_trail=of_trail)
        for name, patterns in _REGULAR.items():
            for needed, pattern, instead in patterns:
                if needed in text:
                    text, times = pattern.subn(instead, text)
                    self.count(name, times)
        return _WIDGET.sub(self._numbered, text) if "IPY_MODEL_" in text or '"model_id"' in text else text

    def _without_names(self, text: str, *, of_trail: bool) -> str:
        for name, instead in self.identity.names():
            if name in text:
                self.count("trail", text.count(name))
                text = text.replace(name, instead)
        if of_trail:
            for pattern, instead in _OF_TRAIL:
                text, times = pattern.subn(instead, text)
                self.count("trail", times)
        return text

    def _numbered(self, found: re.Match[str]) -> str:
        self.count("widget ids")
        return self.widgets.setdefault(found[0], f"widget-{len(self.widgets) + 1}")


def _is_json(mime: str) -> bool:
    return mime == "application/json" or mime.endswith("+json")


def _is_text(mime: str) -> bool:
    return mime.startswith("text/") or mime.endswith(("+xml", "/xml", "/javascript"))


def _joined(value: Any) -> Any:
    return "".join(value) if isinstance(value, list) and all(isinstance(part, str) for part in value) else value


def _json_text(value: Any) -> str:
    try:
        return canonical_json(value).decode()
    except NormalFormError:
        return repr(value)


def _parts(output: Mapping[str, Any], side: _Side) -> dict[str, str | bytes]:
    """An output's parts by their place in it: a text as text, everything else as bytes."""
    kind = output.get("output_type", "")
    if kind == "stream":
        return {"text": side.text(_joined(output.get("text", "")), of_trail=False)}
    if kind == "error":
        side.count("tracebacks")
        return {name: side.text(str(output.get(name, "")), of_trail=False) for name in ("ename", "evalue")}
    data = {mime: _joined(value) for mime, value in dict(output.get("data", {})).items()}
    metadata = dict(output.get("metadata", {}))
    if str(data.get("text/html", "")).startswith(_PANEL):
        side.count("panels")
        data, metadata = {"text/plain": data.get("text/plain", "")}, {}
    texts = {
        mime: value if isinstance(value, str) and not _is_json(mime) else _json_text(value)
        for mime, value in data.items()
    }
    origin = side.identity.origin
    of_trail = bool(origin) and any(origin in text for text in texts.values())
    parts: dict[str, str | bytes] = {
        f"data.{mime}": side.text(text, of_trail=of_trail) if _is_text(mime) or _is_json(mime) else text.encode()
        for mime, text in texts.items()
    }
    if metadata:
        parts["metadata"] = side.text(_json_text(metadata), of_trail=of_trail)
    return parts


def _outputs(cell: Mapping[str, Any], side: _Side) -> list[tuple[str, str, dict[str, str | bytes]]]:
    """A cell's outputs in one form, each with its place and kind; streams come first, each as a whole."""
    found, streams = [], dict[str, list[tuple[int, str]]]()
    for place, output in enumerate(cell.get("outputs", [])):
        if output.get("output_type") == "stream":
            streams.setdefault(output.get("name", ""), []).append((place, _joined(output.get("text", ""))))
        else:
            found.append((f"outputs[{place}]", output.get("output_type", ""), _parts(output, side)))
    whole = []
    for name in sorted(streams):
        pieces = streams[name]
        side.count("streams", len(pieces) - 1)
        text = "".join(text for _, text in pieces)
        parts = _parts({"output_type": "stream", "text": text}, side)
        whole.append((f"outputs[{pieces[0][0]}]", name, parts))
    return whole + found


# --- comparing -------------------------------------------------------------------------------------------------------


def numbers_close(one: float, other: float, tolerance: float) -> bool:
    """Whether two numbers are equal within a tolerance: relative to the larger one, and absolute around zero.

    Two that are not finite are equal where they are the same.
    """
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)


def _texts_close(one: str, other: str, tolerance: float) -> bool:
    """Whether two texts differ in numbers alone, each within the tolerance; whole numbers must be the same."""
    if _NUMBER.split(one) != _NUMBER.split(other):
        return False
    pairs = zip(_NUMBER.findall(one), _NUMBER.findall(other), strict=True)
    return all(
        first == second
        or (not (_is_whole(first) and _is_whole(second)) and numbers_close(float(first), float(second), tolerance))
        for first, second in pairs
    )


def _is_whole(number: str) -> bool:
    return number.lstrip("+-").isdigit()


def compare_outputs(
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    rules: Sequence[Rule] = (),
    *,
    identities: tuple[Identity, Identity] = (Identity(), Identity()),
    tolerance: float | None = None,
) -> OutputsCompared:
    """Compare the outputs of two runs of one notebook, cell by cell.

    Args:
        then: the record's notebook, frozen (`normal_form.freeze`).
        now: the other one, frozen; it has the same cells.
        rules: declared ones; those of the tool come on top.
        identities: what the trails of both called themselves.
        tolerance: for numbers with a fraction or an exponent in texts; ``None`` compares texts letter by letter.
    """
    sides = (_Side(rules, identities[0]), _Side(rules, identities[1]))
    compared = tolerated = 0
    differences: list[OutputDifference] = []
    for place, (before, after) in enumerate(zip(then["cells"], now["cells"], strict=True)):
        if before.get("cell_type") != "code":
            continue
        if IGNORE_TAG in before.get("metadata", {}).get("tags", []):
            sides[0].count("ignored cells")
            continue
        old, new = _outputs(before, sides[0]), _outputs(after, sides[1])
        compared += max(len(old), 1)
        found, close = _compare_cell(place, str(before.get("id")), old, new, tolerance)
        differences += found
        tolerated += close
    return OutputsCompared(compared, tuple(differences), tolerated, _applied(rules, sides))


def _applied(rules: Sequence[Rule], sides: tuple[_Side, _Side]) -> tuple[tuple[AppliedRule, int], ...]:
    def counted(origin: str, name: str, pattern: str = "", replace: str = "") -> tuple[AppliedRule, int]:
        first, second = (side.applied[origin, name] for side in sides)
        rule = AppliedRule(rule=name, origin=origin, applied=first + second, pattern=pattern, replace=replace)
        return rule, first

    declared = [counted(rule.origin, rule.name, rule.pattern.pattern, rule.replace) for rule in rules]
    return (*declared, *(counted("tool", name) for name in TOOL_RULES))


_Output = tuple[str, str, dict[str, str | bytes]]


def _compare_cell(
    cell: int, cell_id: str, then: list[_Output], now: list[_Output], tolerance: float | None
) -> tuple[list[OutputDifference], int]:
    def difference(where: str, what: str, *texts: str | bytes | None) -> OutputDifference:
        expected, found = (text if isinstance(text, str) else None for text in (texts or (None, None)))
        place = f"cells[{cell}].{where}"
        return OutputDifference(place=place, cell=cell, cell_id=cell_id, what=what, expected=expected, found=found)

    of = f"cell {cell + 1} (id {cell_id})"
    kinds = [[kind for _, kind, _ in outputs] for outputs in (then, now)]
    if kinds[0] != kinds[1]:
        shown = " and ".join(", ".join(side) or "nothing" for side in kinds)
        return [difference("outputs", f"C{of[1:]} left other outputs than it had: {shown}")], 0
    differences, tolerated = [], 0
    for (where, kind, before), (_, _, after) in zip(then, now, strict=True):
        close = False
        for part in _in_order({*before, *after}):
            same = _same_part(before.get(part), after.get(part), tolerance)
            if same is False:
                name = part.removeprefix("data.")
                what = f"{name if kind not in ('stdout', 'stderr') else kind} of {of} is not as it was"
                differences.append(difference(f"{where}.{part}", what, before.get(part), after.get(part)))
            close = close or same is None
        tolerated += close
    return differences, tolerated


def _in_order(parts: Iterable[str]) -> list[str]:
    """Text before pages and pictures of it: it tells most."""
    return sorted(parts, key=lambda part: (part != "data.text/plain", part))


def _same_part(one: str | bytes | None, other: str | bytes | None, tolerance: float | None) -> bool | None:
    """Whether a part is as it was; ``None`` where it is within the tolerance."""
    if one == other:
        return True
    if (
        tolerance is not None
        and isinstance(one, str)
        and isinstance(other, str)
        and _texts_close(one, other, tolerance)
    ):
        return None
    return False
