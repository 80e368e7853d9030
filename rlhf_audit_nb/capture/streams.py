"""What a training read of a stream: a rolling digest of the batches that entered its steps. Floor 2.

A stream has no size and no digest before it is used up, and may never be. So what is recorded is what was really
trained on: every batch that the data loader handed to a training step, in order, whichever process loaded it. What a
loader read ahead and nobody used, what a shuffle buffer held back, and what an evaluation read is not in it.

The digest is SHA-256 over one line for each batch, the hex digest of the batch and a line feed. A batch of tensors has
the digest that weights of these names would have (`weights`: name, type, shape, bytes); one of rows (GRPO, RLOO) has
that of its rows as lines of JSON, as a data set (`data`). So the same stream under the same tokenizer, collation and
batch size gives the same digest, and another batch size another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from rlhf_audit_nb.capture.data import count_rows
from rlhf_audit_nb.capture.weights import digest_tensors
from rlhf_audit_nb.events import DataRead

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.run import Run

__all__ = ["StreamDigest", "reading_stream"]

_MISSING = object()


class StreamDigest:
    """The digest of batches so far."""

    def __init__(self) -> None:
        self.batches = 0
        self.rows = 0
        self._hasher = hashlib.sha256()

    def add(self, batch: Any) -> None:
        """The next batch: a mapping of tensors and other values, or a list of rows."""
        rows, digest = _mapping(batch) if isinstance(batch, Mapping) else _rows(batch)
        self._hasher.update(f"{digest}\n".encode())
        self.batches += 1
        self.rows += rows

    def hexdigest(self) -> str:
        """Hex SHA-256 over all batches so far."""
        return self._hasher.hexdigest()


def _mapping(batch: Mapping[str, Any]) -> tuple[int, str]:
    tensors = {str(name): value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    others = {str(name): value for name, value in batch.items() if not isinstance(value, torch.Tensor)}
    rows = next((int(value.shape[0]) for value in tensors.values() if value.dim()), 0)
    digest = digest_tensors(tensors)
    if others:
        digest = hashlib.sha256(digest.encode() + _json(others)).hexdigest()
    return rows, digest


def _rows(batch: Any) -> tuple[int, str]:
    listed = list(batch) if isinstance(batch, list | tuple) else [batch]
    return len(listed), hashlib.sha256(b"".join(_json(row) + b"\n" for row in listed)).hexdigest()


def _json(value: Any) -> bytes:
    return msgspec.json.encode(value, order="deterministic", enc_hook=_plain)


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists; of anything else that JSON does not have, what kind it is."""
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__


@contextmanager
def reading_stream(run: Run, trainer: Any) -> Iterator[None]:
    """While ``trainer`` trains on a stream, digest what its steps are given; record it at the end, however it ends."""
    if trainer.train_dataset is None or count_rows(trainer.train_dataset) is not None:
        yield
        return
    read = StreamDigest()
    with _listening(trainer, read):
        try:
            yield
        finally:
            if read.batches:
                run.record(
                    DataRead(
                        role="train",
                        batches=read.batches,
                        rows=read.rows,
                        digest=read.hexdigest(),
                        workers=int(getattr(trainer.args, "dataloader_num_workers", 0)),
                    )
                )


@contextmanager
def _listening(trainer: Any, read: StreamDigest) -> Iterator[None]:
    before = vars(trainer).get("training_step", _MISSING)
    step = trainer.training_step

    def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        read.add(inputs)
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = training_step
    try:
        yield
    finally:
        if before is _MISSING:
            vars(trainer).pop("training_step", None)
        else:
            trainer.training_step = before
