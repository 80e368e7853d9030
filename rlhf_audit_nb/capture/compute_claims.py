"""What a person states of the base model's training compute, checked before it is recorded. Floor 2."""

from __future__ import annotations

import math

from rlhf_audit_nb.errors import ConfigError
from rlhf_audit_nb.events import BaseComputeDeclared

__all__ = ["base_compute", "check_flop"]

_MOST_TEXT = 500


def base_compute(model: str, *, flop: float | None, systemic: bool, source: str, by: str) -> BaseComputeDeclared:
    """The entry that states it.

    Raises:
        ConfigError: the figure is no number of operations, a text is empty, or nothing is stated.
    """
    for name, text in (("model", model), ("source", source), ("by", by)):
        if not isinstance(text, str) or not text.strip() or len(text) > _MOST_TEXT or not text.isprintable():
            raise ConfigError(
                f"{name} is {text!r}; it must be a line of 1 to {_MOST_TEXT} characters.",
                next_step=f"Write {name}=… in plain words.",
                code=name,
            )
    if flop is None and not systemic:
        raise ConfigError(
            "Nothing is stated: neither flop nor systemic=True.",
            next_step="Write flop=8.4e23 with the figure that the source gives.",
            code="flop",
        )
    stated = None if flop is None else check_flop(flop)
    return BaseComputeDeclared(
        model=model.strip(), source=source.strip(), by=by.strip(), flop=stated, systemic=systemic
    )


def check_flop(flop: float) -> float:
    """``flop`` if it can be a number of operations.

    Raises:
        ConfigError: it cannot.
    """
    if isinstance(flop, bool) or not isinstance(flop, int | float) or not math.isfinite(flop) or flop <= 0:
        raise ConfigError(
            f"flop is {flop!r}; it must be a number of operations above 0.", next_step="Write flop=8.4e23.", code="flop"
        )
    return float(flop)
