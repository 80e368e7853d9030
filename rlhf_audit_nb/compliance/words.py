"""Numbers, times, digests and verdicts in words that a reader can trust. Floor 3.

Everything here is pure and deterministic. An ε is rounded up, never down, so that no page states less than was spent.
"""

from __future__ import annotations

import json
import math
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.errors import ReportError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rlhf_audit_nb.events import PrivacyAudited

__all__ = [
    "LEVELS",
    "NO_BOUND",
    "LevelWords",
    "accountants_text",
    "adapter_text",
    "canary_words",
    "count",
    "day_text",
    "delta_text",
    "duration_text",
    "epsilon_text",
    "hardware_text",
    "level_words",
    "number_text",
    "plain_text",
    "plural",
    "short",
    "size_text",
    "time_text",
    "visible",
]

NO_BOUND = "trained without differential privacy: no bound"
"""What stands wherever an ε would stand for a run without differential privacy."""

_NAMED = {"Infinity": "∞", "-Infinity": "−∞", "NaN": "not a number"}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_TINY = 1e-9
_SCIENTIFIC_BELOW = 1e-3
_SCIENTIFIC_FROM = 1e7
_SHORT = 14
_MINUTE, _HOUR = 60, 3600
_STEP_BYTES = 1000
_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip


@dataclass(frozen=True)
class LevelWords:
    """A verdict level for readers: what it shows, what it does not show, and its state for colour and icon."""

    state: str
    shows: str
    not_shown: str
    trusted: bool


_NEVER = "It does not show that what was never recorded did not happen, or that statements made by people are true."

LEVELS: dict[str, LevelWords] = {
    "INVALID": LevelWords(
        state="bad",
        shows="Something does not hold: a signature, a hash or the order of the entries. Nothing below is evidence.",
        not_shown="It does not show who changed what, nor when. What is said below is only what the file says.",
        trusted=False,
    ),
    "DIVERGED": LevelWords(
        state="bad",
        shows="This history contradicts one that was seen before: entries were taken away or replaced. "
        "Nothing below is evidence.",
        not_shown="It does not show which of the two histories is the true one.",
        trusted=False,
    ),
    "UNANCHORED": LevelWords(
        state="warn",
        shows="Every hash and every signature holds: nothing was changed by anyone without the trail's own key.",
        not_shown="Nobody but the key-holder has vouched for it, so it does not show that the key-holder has not "
        "rewritten all of it. " + _NEVER,
        trusted=True,
    ),
    "TIMESTAMPED": LevelWords(
        state="attest",
        shows="Every hash and every signature holds, and a time-stamp authority saw this state: "
        "nothing in it was changed since.",
        not_shown="It does not show what happened before that time. " + _NEVER,
        trusted=True,
    ),
    "COSIGNED": LevelWords(
        state="ok",
        shows="Every hash and every signature holds, and the witnesses that the trust policy asks for signed the same "
        "state.",
        not_shown="It does not show that the witnesses are independent of the key-holder; that rests on whoever "
        "wrote the policy. " + _NEVER,
        trusted=True,
    ),
}
"""The verdict levels by name, from worst to best."""


def level_words(name: str) -> LevelWords:
    """The words of a verdict level.

    Raises:
        ReportError: the level is not known to this version, so nothing may be said of it.
    """
    words = LEVELS.get(name)
    if words is None:
        raise ReportError(
            f"The verdict level {name!r} is not known to this version.",
            next_step=f"Known levels: {', '.join(LEVELS)}.",
            code="unknown-level",
        )
    return words


def count(value: int) -> str:
    """``12345`` as ``12,345``."""
    return f"{value:,}"


def plural(value: int, one: str, many: str | None = None) -> str:
    """``1 run``, ``2 runs``."""
    return f"{count(value)} {one if value == 1 else many or one + 's'}"


def _power(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return power if mantissa == "1" else f"{mantissa}×{power}"


def number_text(value: Any) -> str:
    """A recorded number with at most five significant digits; its name where it is not finite."""
    if isinstance(value, bool) or value is None:
        return "not stated" if value is None else str(value).lower()
    if isinstance(value, str):
        return _NAMED.get(value, value)
    if isinstance(value, int):
        return count(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value and not _SCIENTIFIC_BELOW <= abs(value) < _SCIENTIFIC_FROM:
        return _power(value, 4)
    return f"{value:,.5g}" if abs(value) < 1e5 else f"{value:,.0f}"  # noqa: PLR2004


def epsilon_text(value: Any, digits: int = 2) -> str:
    """An ε rounded *up* to ``digits`` decimals; ``∞`` where it is not finite."""
    if isinstance(value, str):
        return "∞"
    number = float(value)
    if not math.isfinite(number):
        return "∞"
    if number == 0:
        return "0"
    scale = 10**digits
    # The tiny slack keeps a budget of 8 that is stored as 8.0000000001 from reading 8.01.
    return f"{math.ceil(number * scale - _TINY * scale * max(1.0, number)) / scale:.{digits}f}"


def delta_text(value: float) -> str:
    """``1e-05`` as ``10⁻⁵``; 0, of a pure bound, as ``0``."""
    if not value:
        return "0"
    return _power(value, 2) if value < _SCIENTIFIC_BELOW else number_text(value)


def accountants_text(figures: Mapping[str, Any]) -> str:
    """Each accountant's own ε of one total: ``PLD 6.2041 (grid 10⁻⁴), PRV 6.2118``; a reason where it gives none."""
    said: list[str] = []
    for name, value in sorted(figures.items()):
        if name.endswith("_grid"):
            continue
        stated = value if isinstance(value, str) and value not in _NAMED else epsilon_text(value, 4)
        grid = figures.get(f"{name}_grid")
        said.append(f"{name.upper()} {stated}" + ("" if grid is None else f" (grid {number_text(grid)})"))
    return ", ".join(said) or "not stated"


def canary_words(event: PrivacyAudited) -> str:
    """What the canaries of a training showed beside its claimed ε, and how little that says."""
    claimed = epsilon_text(event.epsilon_claimed)
    shown = (
        f"The {plural(event.canaries, 'canary', 'canaries')} of this training show ε ≥ "
        f"{number_text(event.epsilon_lower)} with {100 * event.confidence:g} % of confidence, of the {claimed} claimed "
        "for it alone"
    )
    if event.contradicts:
        chance = number_text(100 * (1 - event.confidence))
        return (
            f"{shown}: that contradicts the claim, and its ε cannot be relied on. (Where a claim holds, canaries show "
            f"more with a chance of {chance} % at most.)"
        )
    beyond = float(event.ceiling) <= float(event.epsilon_claimed)
    reach = ", so they could not have contradicted it" if beyond else ""
    return f"{shown}; so many can show {number_text(event.ceiling)} at most{reach}. A low bound is no proof of privacy."


def plain_text(value: Any) -> str:
    """A recorded setting as text: lists by commas, maps as ``key value``, nothing as ``none``."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain_text, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain_text(part)}" for key, part in sorted(value.items())) or "none"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def adapter_text(adapter: Mapping[str, Any]) -> str:
    """An adapter by kind, rank and the modules that it sits on; all its settings stand in its entry."""
    said = [str(adapter[key]) for key in ("peft_type", "type") if adapter.get(key)][:1]
    for key in ("r", "lora_alpha", "lora_dropout"):
        if adapter.get(key) is not None:
            said.append(f"{key} {number_text(adapter[key])}")
    modules = adapter.get("target_modules")
    if isinstance(modules, (list, tuple)):
        said.append("on " + ", ".join(sorted({str(name).rsplit(".", 1)[-1] for name in modules})))
    elif modules:
        said.append(f"on {modules}")
    return ", ".join(said) or "of a kind that is not recorded"


def hardware_text(hardware: Mapping[str, Any]) -> str:
    """Recorded hardware as ``cores: 2; memory: 25.3 GB``."""
    said: list[str] = []
    for key, value in sorted(hardware.items()):
        if key.endswith("_bytes") and isinstance(value, int):
            said.append(f"{key.removesuffix('_bytes')}: {size_text(value)}")
        else:
            said.append(f"{key}: {plain_text(value)}")
    return "; ".join(said) or "not recorded"


def time_text(microseconds: int) -> str:
    """A trail time as ``2026-11-22 14:58:03 UTC``."""
    if microseconds > _LAST:
        return "after the year 9999"
    return datetime.fromtimestamp(microseconds // 1_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def day_text(microseconds: int) -> str:
    """A trail time as ``22 November 2026``, without the locale."""
    if microseconds > _LAST:
        return "after the year 9999"
    when = datetime.fromtimestamp(microseconds // 1_000_000, UTC)
    return f"{when.day} {_MONTHS[when.month - 1]} {when.year}"


def duration_text(microseconds: int) -> str:
    """How long, in the two largest units."""
    seconds = max(0, round(microseconds / 1e6))
    if seconds < _MINUTE:
        return f"{seconds}\u00a0s"
    if seconds < _HOUR:
        return f"{seconds // 60}\u00a0min {seconds % 60}\u00a0s"
    return f"{seconds // 3600}\u00a0h {seconds % 3600 // 60}\u00a0min"


def size_text(size: int) -> str:
    """A number of bytes in decimal units."""
    value, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < _STEP_BYTES:
            break
        value, unit = value / _STEP_BYTES, larger
    return f"{size:,} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


def short(digest: str, ends: int = 6) -> str:
    """A long digest shortened in the middle."""
    return digest if len(digest) <= _SHORT else f"{digest[:ends]}…{digest[-ends:]}"


_LAST = 253_402_300_799_999_999  # microseconds: the last that a calendar has
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def visible(text: str) -> str:
    """``text`` with control and direction-changing characters written as ``[U+202E]``, so that no name can deceive."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(f"[U+{ord(c):04X}]" if c not in "\n\t" and unicodedata.category(c) in _HIDDEN else c for c in text)
