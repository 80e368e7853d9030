"""The path of the weights from base to final, committed step by step. Floor 2.

Every so many steps (``AuditConfig(weights_every=n)``) a link: the digest of the trainable tensors, and how far they
have moved since the link before, as an L2 norm. The first link starts from what training began with, the last one is
what it left, so whoever keeps the checkpoints can check each stretch of the path, and nobody can slip in weights that
no step leads to without a link that says so.

The norm needs the tensors of the link before. They are kept in the machine's memory, not on the device, in their own
type: one copy of what is trained, which is an adapter's few megabytes or a whole model's gigabytes. Above `MOST_KEPT`
bytes nothing is kept and the links carry digests alone. The digest brings the tensors to the CPU anyway, so the norm
costs one more pass over them there, in pieces.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlhf_audit_nb.capture.weights import tensor_lines, trainable_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MOST_KEPT", "Link", "WeightsPath"]

MOST_KEPT = 2 << 30
_PIECE = 4 << 20


@dataclass(frozen=True)
class Link:
    """One link of the path.

    Attributes:
        digest: the weights digest of the trainable tensors.
        moved: the L2 norm of their difference from the link before; ``None`` where that is not measured.
        known: whether the digest is that of the link before (of the start, for the first).
    """

    digest: str
    moved: float | None
    known: bool


class WeightsPath:
    """The path of one training; built before its first step.

    Args:
        model: what is trained.
        measured: whether the norm is wanted at all: sharded parameters show no whole one.
    """

    def __init__(self, model: torch.nn.Module, *, measured: bool = True) -> None:
        self._model = model
        start = trainable_tensors(model)
        size = sum(tensor.numel() * tensor.element_size() for tensor in start.values())
        self._kept = _copies(start) if measured and size <= MOST_KEPT else None
        self._digest: str | None = None

    @torch.no_grad()
    def link(self) -> Link:
        """The link to where the tensors are now; they are where the next one starts."""
        now = {name: tensor.detach().cpu() for name, tensor in trainable_tensors(self._model).items()}
        digest = hashlib.sha256(tensor_lines(now)).hexdigest()
        known, self._digest = digest == self._digest, digest
        if self._kept is None:
            return Link(digest, None, known)
        moved = math.sqrt(sum(_replace(self._kept, name, tensor) for name, tensor in now.items()))
        return Link(digest, moved, known)


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _replace(kept: dict[str, torch.Tensor], name: str, now: torch.Tensor) -> float:
    """The squared distance of a tensor from its kept copy, which it replaces; one that is new counts whole."""
    before = kept.get(name)
    if before is None or before.shape != now.shape:
        before = kept[name] = torch.zeros_like(now)
    total = 0.0
    old, new = before.reshape(-1), now.reshape(-1)
    for start in range(0, new.numel(), _PIECE):
        piece = slice(start, start + _PIECE)
        total += float((new[piece].double() - old[piece].double()).square().sum())
    kept[name].copy_(now)
    return total
