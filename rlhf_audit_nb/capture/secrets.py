"""What must never stand in the open: tokens, keys and passwords, taken out of texts before they are written. Floor 2.

Everything of a run that is text (declared names, settings of a trainer, values of environment variables, warnings)
passes `Scrubber.event` in `Run.record`, the one door to the trail. Taken out is

- what has the shape of a known credential (the table `PATTERNS`, after the rules that gitleaks and detect-secrets
  publish, cut down to shapes that nothing else has),
- a value that is *called* a secret, in ``name=value`` pairs of a text and under such names in settings, and
- the value of every environment variable whose name says secret, token, key or password, wherever it turns up (also
  in base64, or quoted as in an address). ``PROMPT_KEY=question``, ``PAD_TOKEN=<|endoftext|>`` and
  ``MAX_TOKENS=10000000`` name no secret: see `_is_ordinary`.

In its place stands what it was: ``[removed: GitHub token]``. A secret that looks like a common word under an innocent
name is not recognised by anybody. Digests and git commits are no secrets and stay: a hexadecimal number is removed only
where it is called one or is such a variable's value.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from rlhf_audit_nb.events import Event

__all__ = ["PATTERNS", "Pattern", "Scrubber", "find_secret", "scrub", "scrub_values"]

EventT = TypeVar("EventT", bound=Event)

MIN_VARIABLE = 8
"""Shorter values of environment variables are left alone: they would turn up in every other word."""
SHORT = 64
MAX_KNOWN = 2048
"""Names of metrics and settings come again and again: so many texts up to so long are looked at once."""


@dataclass(frozen=True)
class Pattern:
    """A kind of credential.

    Args:
        what: how it is called in its place.
        hints: one of these stands in every text that has it (in small letters); looked for first, since it is quick.
        rule: the shape; only a named group, where one has matched, is taken out.
        certain: whether nothing else has this shape: the others are taken out of what is recorded, but nobody is
            refused on their account.
    """

    what: str
    hints: tuple[str, ...]
    rule: re.Pattern[str]
    certain: bool = True


def _pattern(what: str, hints: tuple[str, ...], rule: str, flags: int = 0, *, certain: bool = True) -> Pattern:
    return Pattern(what, hints, re.compile(rule, flags), certain)


_NAMES = r"(?:api[_-]?key|access[_-]?key|secret|private[_-]?key|passw(?:or)?d|pwd|passphrase|credentials?)"
_BEFORE = r"(?<![A-Za-z0-9])"

PATTERNS: tuple[Pattern, ...] = (
    _pattern(
        "private key",
        ("private key",),
        r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|\Z)",
        re.DOTALL,
    ),
    _pattern("user and password of an address", ("://",), r"(?i)\bhttps?://(?P<secret>[^/\s@?#\"']+)@"),
    _pattern(
        "user and password of an address", ("://",), r"(?i)\b[a-z][a-z0-9+.-]*://(?P<secret>[^/\s:@?#]*:[^/\s@]+)@"
    ),
    _pattern("Hugging Face token", ("hf_", "api_org_"), _BEFORE + r"(?:hf_|api_org_)[A-Za-z0-9]{30,}"),
    _pattern("API key", ("sk-",), _BEFORE + r"sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}"),
    _pattern("API key", ("k_live_", "k_test_"), _BEFORE + r"[rs]k_(?:live|test)_[A-Za-z0-9]{10,}"),
    _pattern("API key", ("r8_", "gsk_"), _BEFORE + r"(?:r8_[A-Za-z0-9]{37}|gsk_[A-Za-z0-9]{40,})"),
    _pattern(
        "GitHub token",
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        _BEFORE + r"(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,})",
    ),
    _pattern("GitLab token", ("glpat-",), _BEFORE + r"glpat-[A-Za-z0-9_-]{20,}"),
    _pattern(
        "AWS key", ("akia", "asia", "abia", "acca"), _BEFORE + r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Za-z0-9])"
    ),
    _pattern("Google key", ("aiza", "ya29."), _BEFORE + r"(?:AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{20,})"),
    _pattern("Slack token", ("xox",), _BEFORE + r"xox[abeoprs]-[A-Za-z0-9-]{10,}"),
    _pattern("Slack address", ("hooks.slack.com",), r"hooks\.slack\.com/services/(?P<secret>[A-Za-z0-9/_-]{20,})"),
    _pattern("package index token", ("npm_", "pypi-"), _BEFORE + r"(?:npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_-]{50,})"),
    _pattern("SendGrid key", ("sg.",), _BEFORE + r"SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{30,}"),
    _pattern(
        "signed token (JWT)", ("eyj",), _BEFORE + r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"
    ),
    _pattern(
        "credential of a request",
        ("bearer", "basic "),
        r"(?i)\b(?:bearer|basic)\s+(?=[A-Za-z._~+/-]*\d)(?P<secret>[A-Za-z0-9._~+/-]{16,}=*)",
        certain=False,
    ),
    _pattern(
        "value that is called a secret",
        ("key", "secret", "passw", "pwd", "passphrase", "credential"),
        rf"(?i){_NAMES}s?[\"']?\s*[:=]\s*(?:\"(?P<quoted>[^\"\n]{{4,}})\"|'(?P<single>[^'\n]{{4,}})'"
        rf"|(?P<secret>(?!\[removed)[^\s\"'&,;<>(){{}}\[\]]{{4,}}))",
        certain=False,
    ),
    _pattern(
        "value that is called a token",
        ("token", "key", "auth"),
        r"(?i)(?<![a-z])(?:(?:hub|auth|access|api|hf|refresh|session|bot|bearer)[_-]?)?(?:token|key|auth)[\"']?"
        r"\s*[:=]\s*[\"']?(?P<secret>(?=[A-Z0-9+/_=.~-]*\d)(?=[A-Z0-9+/_=.~-]*[A-Z])[A-Z0-9+/_=.~-]{16,})",
        certain=False,
    ),
)
"""The shapes that are looked for, most telling first. After gitleaks' default rules and detect-secrets' plugins."""

_SECRET_NAME = re.compile(rf"(?i)(?:^|[_.-]){_NAMES}$")
_TOKEN_NAME = re.compile(
    r"(?i)^(?:(?:.*[_.-])?(?:hub|auth|access|api|hf|refresh|session|bot|bearer|write|read)[_-])?token$"
)
_VARIABLE = re.compile(
    r"(?:^|_)(?:SECRET|SECRETS|TOKEN|TOKENS|PASSWORD|PASSWD|PWD|PASSPHRASE|CREDENTIAL|CREDENTIALS|KEY|KEYS|APIKEY|PAT)"
    r"(?:$|_)"
)
_OWN_WORDS = frozenset({"adjacency", "category", "entry_point", "identified", "relation", "role", "status", "unit"})
"""Fields whose words are this package's own: whoever's password is ``completed`` gives nothing away with them."""
_NO_SECRET_VARIABLES = frozenset({"PWD", "OLDPWD"})
_ALWAYS_SECRET = re.compile(
    r"SECRET|PASS|PWD|CREDENTIAL|API|ACCESS|PRIVATE|AUTH|CRYPT|SIGN|MASTER|LICEN|ACCOUNT|SERVICE|SSH|GPG|SESSION|HF_|HUB"
)
_SPECIAL_TOKEN = re.compile(r"(?:^|_)(?:PAD|EOS|BOS|UNK|MASK|SEP|CLS|STOP|IMAGE|SPECIAL)_TOKEN$")
_SPECIAL = re.compile(r"<[^<>\s]{1,40}>|\[[A-Z]{2,20}\]")
_FEW_WORDS = re.compile(r"[a-z]{2,16}(?:[ _.,/-][a-z]{2,16}){0,3}")
_RANDOM = re.compile(r"^(?=.*\d)(?=.*[A-Za-z]).{16,}")
_REPLACED = "[removed: {}]"


def scrub(text: str) -> str:
    """``text`` without the secrets that are recognised in it."""
    return Scrubber().text(text)


def scrub_values(values: Any) -> Any:
    """Plain values (dicts, lists, texts) without the secrets that are found in them; the same object if none is."""
    return Scrubber().values(values)


def find_secret(text: str, name: str = "") -> str | None:
    """What kind of credential ``text``, the value of ``name``, certainly holds; ``None`` where it is in doubt."""
    if _is_called_secret(name) and _may_be_secret(text, name):
        return "value that is called a secret"
    found = (pattern.what for pattern in _possible(text) if pattern.certain and pattern.rule.search(text))
    return next(found, None) or Scrubber().variable_in(text)


class Scrubber:
    """Takes secrets out of texts; knows those of the process's environment as it was when it was made or refreshed."""

    def __init__(self) -> None:
        self._variables: dict[str, str] = {}
        self._clean: dict[str, str] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the environment's secrets anew."""
        found: dict[str, str] = {}
        for name, value in os.environ.items():
            if _is_secret_variable(name) and len(value.strip()) >= MIN_VARIABLE and not _is_ordinary(name, value):
                for form in _forms(value.strip()):
                    found[form] = name
        if found != self._variables:
            longest_first = sorted(found.items(), key=lambda pair: -len(pair[0]))
            self._variables, self._clean = dict(longest_first), {}

    def text(self, text: str) -> str:
        """``text`` without secrets; itself where it has none."""
        known = self._clean.get(text)
        if known is not None:
            return text if known == text else known  # the same object where nothing changed
        scrubbed = self._scrubbed(text)
        if len(text) <= SHORT and len(self._clean) < MAX_KNOWN:
            self._clean[text] = scrubbed
        return scrubbed

    def _scrubbed(self, text: str) -> str:
        for value, name in self._variables.items():
            if value in text:
                text = text.replace(value, _REPLACED.format(f"value of the variable {name}"))
        for pattern in _possible(text):
            text = pattern.rule.sub(_without(pattern.what), text)
        return text

    def variable_in(self, text: str) -> str | None:
        """Which environment variable's secret certainly stands in ``text``, in words."""
        names = (name for value, name in self._variables.items() if value in text and _RANDOM.search(value))
        return next((f"value of the variable {name}" for name in names), None)

    def values(self, values: Any, name: str = "") -> Any:
        """Plain values without secrets, ``name`` being what they are called; the same object where nothing is one."""
        if isinstance(values, str):
            return self._named(values, name)
        if isinstance(values, dict):
            return self._mapping(values)
        if isinstance(values, list | tuple):
            items = [self.values(item, name) for item in values]
            if all(item is new for item, new in zip(values, items, strict=True)):
                return values
            return items if isinstance(values, list) else tuple(items)
        if isinstance(values, msgspec.Struct):
            return self._struct(values)
        return values

    def event(self, event: EventT) -> EventT:
        """The event without secrets in its texts; the same object where it has none."""
        scrubbed: EventT = self._struct(event)
        return scrubbed

    def _struct(self, struct: Any) -> Any:
        changed = {}
        for name in struct.__struct_fields__:
            value = getattr(struct, name)
            if value is not None and name not in _OWN_WORDS and not isinstance(value, int | float):
                new = self.values(value, name)
                if new is not value:
                    changed[name] = new
        return msgspec.structs.replace(struct, **changed) if changed else struct

    def _mapping(self, values: dict[Any, Any]) -> Any:
        clean, changed = {}, False
        for key, item in values.items():
            new_key = self.text(key) if isinstance(key, str) else key
            new = item if isinstance(item, int | float) else self.values(item, str(key))
            changed |= new_key is not key or new is not item
            clean[new_key] = new
        return clean if changed else values

    def _named(self, text: str, name: str) -> str:
        if _is_called_secret(name) and _may_be_secret(text, name):
            return _REPLACED.format("value that is called a secret")
        return self.text(text)


@lru_cache(maxsize=1024)
def _is_secret_variable(name: str) -> bool:
    return name not in _NO_SECRET_VARIABLES and _VARIABLE.search(name.upper()) is not None


@lru_cache(maxsize=1024)
def _is_ordinary(name: str, value: str) -> bool:
    """A setting that only sounds like a secret: a special token, a count of tokens, a key that is a few plain words.

    What is called by a word that only secrets have (secret, password, api, access, private ...) is never one.
    """
    name, value = name.upper(), value.strip()
    if _ALWAYS_SECRET.search(name):
        return False
    if name.endswith("_TOKENS") or "_TOKENS_" in name:
        return value.isdecimal()
    if name.endswith("_TOKEN"):
        return _SPECIAL_TOKEN.search(name) is not None or _SPECIAL.fullmatch(value) is not None
    return name.endswith(("_KEY", "_KEYS")) and _FEW_WORDS.fullmatch(value) is not None


@lru_cache(maxsize=1024)
def _is_called_secret(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None or _TOKEN_NAME.match(name) is not None


def _may_be_secret(text: str, name: str) -> bool:
    """Not an empty value, nor a special token of a tokenizer such as ``<eos>``."""
    return len(text) >= (8 if _TOKEN_NAME.match(name) else 1) and not text.startswith(("<", "["))


def _forms(value: str) -> tuple[str, ...]:
    """A value as it may stand in a text: plain, quoted, in base64."""
    raw = value.encode("utf-8", "surrogateescape")
    encoded = (base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode())
    bare = (form.rstrip("=") for form in encoded)
    return tuple(dict.fromkeys((value, quote(raw, safe=""), *encoded, *bare)))


def _possible(text: str) -> list[Pattern]:
    small = text.lower()
    return [pattern for pattern in PATTERNS if any(hint in small for hint in pattern.hints)]


def _without(what: str) -> Callable[[re.Match[str]], str]:
    def replace(match: re.Match[str]) -> str:
        groups = [name for name, value in match.groupdict().items() if value is not None]
        start, end = match.span(groups[0]) if groups else match.span()
        whole = match.group()
        return whole[: start - match.start()] + _REPLACED.format(what) + whole[end - match.start() :]

    return replace
