"""How the panel says numbers, times and names. Floor 6."""

from __future__ import annotations

import base64
import math
from datetime import UTC, datetime

__all__ = [
    "say_bound",
    "say_count",
    "say_delta",
    "say_left",
    "say_number",
    "say_rate",
    "say_root",
    "say_seconds",
    "say_signer",
    "say_time",
]

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def say_bound(value: float) -> str:
    """An upper bound, rounded up: two decimals, below 0.1 three digits, to a millionth."""
    if math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return "∞"
    decimals = 2
    if 0 < value < 0.1:  # noqa: PLR2004 - two decimals would leave nothing
        decimals = min(2 - math.floor(math.log10(value)), 6)
    scale = 10.0**decimals
    return f"{math.ceil(value * scale * (1 - 1e-9)) / scale:.{decimals}f}"


def say_number(value: float, *, full: bool = False) -> str:
    """A number with three digits: ``0.693``, ``5e-5``, ``12,400``; ``full`` keeps zeros at the end (``0.500``)."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size >= 1000:  # noqa: PLR2004
        return f"{value:,.0f}" if size < 1e9 else f"{value:.2e}".replace("e+0", "e").replace("e+", "e")  # noqa: PLR2004
    if size == 0 or size >= 0.001:  # noqa: PLR2004
        text = f"{value:#.3g}" if full else f"{value:.3g}"
        return text.rstrip(".").replace("-", "−") if size else "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−", 1 if value < 0 else 0)


def say_delta(delta: float) -> str:
    """δ as a power of ten: ``10⁻⁵``, ``2·10⁻⁶``; 0 where the bound is pure."""
    if not delta:
        return "0"
    mantissa, exponent = f"{delta:.2e}".split("e")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
    mantissa = mantissa.rstrip("0").rstrip(".")
    return power if mantissa == "1" else f"{mantissa}·{power}"


def say_root(root: bytes) -> str:
    """A root hash as base64 shortened in its middle: ``kYsc7GTz…otaw=``."""
    return _middle(base64.b64encode(root).decode(), 8, 6)


def say_signer(vkey: str) -> str:
    """Name and key hash of a C2SP verifier key (``name+hash+key``), shortened: ``example.…+8a488eff``."""
    return _middle("+".join(vkey.split("+")[:2]), 8, 9)


def _middle(text: str, head: int, tail: int) -> str:
    """The text without its middle, where that saves anything."""
    return f"{text[:head]}…{text[-tail:]}" if len(text) > head + tail + 2 else text


def say_seconds(seconds: float) -> str:
    """A length of time in at most two units: ``2 min 14 s``."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    large, small = ((hours, "h"), (minutes, "min")) if hours else ((minutes, "min"), (left, "s"))
    return " ".join(f"{number} {unit}" for number, unit in (large, small) if number) or "0 s"


def say_time(unix: float) -> str:
    """A moment, to the second, in UTC."""
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def say_count(number: int, one: str, many: str | None = None) -> str:
    """A number of things: ``1 step``, ``1,284 entries``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def say_rate(rate: float) -> str:
    """How fast steps come (``rate`` per second)."""
    return f"{rate:.2g} steps/s" if rate >= 1 else f"{1 / rate:.2g} s a step"


def say_left(seconds: float) -> str:
    """Time left, which is a guess: to the second below a minute, then to 5 s, then to the minute."""
    if seconds >= 60:  # noqa: PLR2004
        unit = 5 if seconds < 600 else 60  # noqa: PLR2004
        seconds = round(seconds / unit) * unit
    return f"{say_seconds(seconds)} left"
