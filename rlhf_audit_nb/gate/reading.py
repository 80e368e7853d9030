"""Strict YAML for policies: every value knows its line, and what is wrong is told with what to write. Floor 4.

PyYAML alone takes the last of two equal keys, turns ``1e-5`` into text and ``no`` into false, and lets a short file
grow without end through aliases. Here nothing is guessed: values are read from the text as it stands, by who needs
them, and a key that is not known, stands twice or is missing is an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import yaml

from rlhf_audit_nb.errors import ConfigError

__all__ = ["Value", "is_mapping_text", "read_yaml"]

MOST = 1 << 20
MOST_DEEP = 12
_TRUST_WORDS = ("log", "witness", "group", "quorum")
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?|\.[0-9]+([eE][+-]?[0-9]+)?")
_DURATION = re.compile(r"([0-9]+) *(minute|hour|day|week)s?")
_MOST_DIGITS = 6
_SECONDS = {"minute": 60, "hour": 3600, "day": 86_400, "week": 604_800}


def is_mapping_text(text: str) -> bool:
    """Whether a policy's text is YAML and not of tlog-policy form, by its first line that says something.

    A line of tlog-policy is a word, a space and more words; a key of YAML has its colon at once.
    """
    for line in text.splitlines():
        said = line.strip()
        if said and not said.startswith(("#", "---", "%YAML")):
            first = re.split(r"[ \t]", said, maxsplit=1)[0]
            return first not in _TRUST_WORDS and re.match(r"""["']?[\w. -]+["']?\s*:|\{""", said) is not None
    return False


@dataclass(frozen=True)
class Value:
    """One value of a policy's file.

    Attributes:
        node: as PyYAML composed it, its text untouched.
        path: how it is called, such as ``privacy.epsilon``.
        file: what the file is called in errors.
    """

    node: yaml.Node
    path: str
    file: str

    def fail(self, what: str, write: str) -> NoReturn:
        """Refuses the value: ``what`` is wrong with it, ``write`` is what to write.

        Raises:
            ConfigError: always.
        """
        at = f", {self.path}" if self.path else ""
        raise ConfigError(f"{self.file}, line {self.line}{at}: {what}.", next_step=write, code="gate-policy")

    @property
    def line(self) -> int:
        """Where it begins, from 1."""
        return int(self.node.start_mark.line) + 1

    def at(self, node: yaml.Node, name: str) -> Value:
        """The value of a part."""
        return Value(
            node, f"{self.path}.{name}".lstrip(".") if not name.startswith("[") else self.path + name, self.file
        )

    def fields(self, known: Sequence[str], required: Sequence[str] = ()) -> dict[str, Value]:
        """The values of a mapping by key.

        Raises:
            ConfigError: it is none, or a key is not known, stands twice or is missing.
        """
        if not isinstance(self.node, yaml.MappingNode):
            below = f"Write keys below it, each with its value: {', '.join(known)}."
            whole = "`rlhf-audit gate --example` prints such a policy; a trust policy is named in it, after trust:."
            self.fail("it is not a mapping", below if self.path else whole)
        found: dict[str, Value] = {}
        for key, item in self.node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            place = self.at(key, name or "?")
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                guess = f'; did you mean "{close[0]}"?' if close else ""
                place.fail(f"the key {name[:70]!r} is not known{guess}", f"Write one of: {', '.join(known)}.")
            if name in found:
                place.fail(f"the key {name!r} stands twice", f"It stands in line {found[name].line} already: keep one.")
            found[name] = self.at(item, name)
        for name in required:
            if name not in found:
                self.fail(f"the key {name!r} is missing", f"Write {name}: and its value.")
        return found

    def items(self) -> list[Value]:
        """The values of a list that is not empty."""
        if not isinstance(self.node, yaml.SequenceNode) or not self.node.value:
            self.fail(
                "it is not a list with something in it", "Write a list, such as [one, two], or leave the key out."
            )
        return [self.at(item, f"[{i}]") for i, item in enumerate(self.node.value)]

    def text(self, what: str = "text") -> str:
        """Text that says something."""
        if not isinstance(self.node, yaml.ScalarNode) or not self.node.value.strip() or self._is_null:
            self.fail(f"it is not {what}", f"Write {what}, or leave the key out.")
        return str(self.node.value)

    @property
    def _is_null(self) -> bool:
        return bool(self.node.tag == "tag:yaml.org,2002:null")

    def texts(self, what: str = "text") -> tuple[str, ...]:
        """A list of different texts."""
        found: dict[str, Value] = {}
        for item in self.items():
            text = item.text(what)
            if text in found:
                item.fail(f"{text[:70]!r} stands twice", "Keep one.")
            found[text] = item
        return tuple(found)

    def choice(self, known: Sequence[str]) -> str:
        """One of the words that are known."""
        text = self.text(" or ".join(known))
        if text not in known:
            close = difflib.get_close_matches(text, known, n=1)
            guess = f'; did you mean "{close[0]}"?' if close else ""
            self.fail(f"{text[:70]!r} is not known{guess}", f"Write {' or '.join(known)}.")
        return text

    def number(self, *, above: float, most: float = float("inf")) -> float:
        """A number above ``above`` and at most ``most``."""
        text = self.text("a number").strip()
        value = float(text) if _NUMBER.fullmatch(text) else float("nan")
        if not above < value <= most or value == float("inf"):
            top = f" and at most {most:g}" if most != float("inf") else ""
            self.fail(f"{text[:70]!r} is not a number above {above:g}{top}", "Write such a number.")
        return value

    def count(self) -> int:
        """A whole number from 1."""
        text = self.text("a number").strip()
        if not re.fullmatch("[1-9][0-9]{0,5}", text):
            self.fail(f"{text[:70]!r} is not a whole number from 1", "Write such a number.")
        return int(text)

    def seconds(self) -> int:
        """A time such as ``30 days``, in seconds."""
        text = self.text("a time").strip()
        found = _DURATION.fullmatch(text)
        if found is None or len(found[1]) > _MOST_DIGITS or not int(found[1]):
            said = f"{text[:70]!r} is not a time"
            self.fail(said, "Write a number and minutes, hours, days or weeks, such as 30 days.")
        return int(found[1]) * _SECONDS[found[2]]

    def flag(self) -> bool:
        """``true`` or ``false``."""
        return self.choice(("true", "false")) == "true"


def _line(part: yaml.Event) -> int:
    return part.start_mark.line + 1 if part.start_mark is not None else 1


def read_yaml(data: bytes, file: str) -> Value:
    """The one document of a policy's file.

    Raises:
        ConfigError: it is no YAML, too large, or holds what a policy has no use for (aliases, tags, more documents).
    """
    try:
        text = data.decode("utf-8-sig")
        if len(data) > MOST:
            raise ConfigError(f"{file} is over {MOST:,} bytes.", next_step="Name a policy.", code="gate-policy")
        documents = depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_DEEP:
                raise ConfigError(
                    f"{file}, line {_line(event)}: it is nested over {MOST_DEEP} deep, which no policy is.",
                    next_step="`rlhf-audit gate --example` prints a policy to begin with.",
                    code="gate-policy",
                )
            documents += isinstance(event, yaml.DocumentStartEvent)
            alias = isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None
            if alias or getattr(event, "tag", None) is not None or documents > 1:
                what = "an alias or anchor" if alias else "a tag" if documents <= 1 else "a second document"
                raise ConfigError(
                    f"{file}, line {_line(event)}: it holds {what}, which a policy has no use for.",
                    next_step="Write the value out where it is needed.",
                    code="gate-policy",
                )
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark is not None else ""
        why = getattr(error, "problem", None) or str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{file}{at}: it is not YAML: {why}.",
            next_step="`rlhf-audit gate --example` prints a policy to begin with.",
            code="gate-policy",
        ) from error
    if node is None:
        raise ConfigError(
            f"{file} is empty: a policy that asks for nothing lets everything pass.",
            next_step="`rlhf-audit gate --example` prints a policy to begin with.",
            code="gate-policy",
        )
    return Value(node, "", file)
