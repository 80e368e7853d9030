"""Bands of FLOP from a model's shape and what it passed (`capture.compute` says how); needs no torch. Floor 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_audit_nb.events import ModelShape

__all__ = ["forward_band", "update_band"]


def forward_band(shape: ModelShape, positions: float, tokens: float | None, scores: float) -> tuple[float, float]:
    """Low and high FLOP of forward passes over ``positions``, of which ``tokens`` are not padding."""
    low = 2.0 * shape.dense * (positions if tokens is None else tokens)
    return low, 2.0 * shape.parameters * positions + 4.0 * shape.width * shape.layers * scores


def update_band(shape: ModelShape, positions: float, tokens: float | None, scores: float) -> tuple[float, float]:
    """Low and high FLOP of the same passes forward and backward."""
    low, high = forward_band(shape, positions, tokens, scores)
    return low + 2.0 * (shape.backward + shape.learning) * (positions if tokens is None else tokens), 3.0 * high
