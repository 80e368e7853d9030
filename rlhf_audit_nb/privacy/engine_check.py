"""The rows engine watched by the loop: compared before the first step, and once more on the first batch. Floor 2.

Before anything is sampled, both engines compute the clipped sum of a few units of made-up rows: random tokens of the
model's vocabulary from a fixed seed, the trained weights moved a little so that every gradient counts, and moved back.
Nothing of that is private. Where the two differ, the loop computes the whole training, which is said in the open.

On the first batch of two units or more they are compared again. Should they differ there, or should the rows engine
fail on a later batch, the loop takes over from that step on. This depends on private data: which engine ran is then
said in the step's private metrics and nowhere else (both keep the same bound, so the guarantee is the same). A step in
which somebody's rows cannot be computed with is the loop's as well: it leaves that unit out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from rlhf_audit_nb.errors import AuditError
from rlhf_audit_nb.privacy.engine_choice import ROWS
from rlhf_audit_nb.privacy.quiet_training import clear_metrics
from rlhf_audit_nb.privacy.row_gradients import RowsEngine
from rlhf_audit_nb.privacy.row_layers import RowsLostError, covering_layers
from rlhf_audit_nb.privacy.unit_gradients import GradientEngine, LoopEngine, Sampled, Seen, Sums

__all__ = ["CheckedRows", "FellBack", "probe_rows"]

_TOLERANCE = 1e-3
_PROBE_UNITS = ((0,), (1,), (2, 3))
_PROBE_LENGTH = 48
_PROBE_MOVE = 0.02
_FIRST = 4

FellBack = Callable[[str, str], None]


class CheckedRows:
    """The rows engine as long as it agrees with the loop; from then on the loop.

    Args:
        data: the prepared rows.
        tokens: see `LoopEngine`.
        micro_batch: rows of the data in one pass.
        fell_back: told the engine that runs and why, where the comparison before the first step failed.
    """

    def __init__(self, data: Any, tokens: int | None, micro_batch: int, fell_back: FellBack | None = None) -> None:
        self._data = data
        self._tokens = tokens
        self._micro_batch = micro_batch
        self._fell_back = fell_back
        self._loop = LoopEngine(data, tokens, micro_batch)
        self._rows: GradientEngine | None = None
        self._compared = False

    @property
    def name(self) -> str:
        """The engine that runs."""
        return self._loop.name if self._rows is None else ROWS

    def prepare(self, trainer: Any, model: torch.nn.Module, sums: Sums) -> None:
        """Compare both on made-up rows; called once, before anything is sampled."""
        try:
            distance = self._probe(trainer, model, sums)
        except RowsLostError as lost:
            self._fall_back(f"on made-up rows, {lost}")
        except Exception as error:
            self._fall_back(f"made-up rows could not be computed ({type(error).__name__}: {error})")
        else:
            if not distance <= _TOLERANCE:
                self._fall_back(f"on made-up rows its clipped sum differs from the loop's by {distance:.2g} of it")
        finally:
            clear_metrics(trainer)

    def add(self, trainer: Any, model: torch.nn.Module, sampled: Sequence[Sampled], sums: Sums, seen: Seen) -> None:
        """See `GradientEngine.add`; ``sums`` are zero."""
        if self._rows is not None and not self._compared:
            self._compare_first(trainer, model, sampled, sums, seen)
        if self._rows is not None:
            try:
                self._rows.add(trainer, model, sampled, sums, seen)
            except RowsLostError as lost:
                self._give_up(seen, str(lost))
                sums.zero()
            except (AuditError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:
                seen.reset()
                sums.zero()
            else:
                return
        self._loop.add(trainer, model, sampled, sums, seen)

    def _probe(self, trainer: Any, model: torch.nn.Module, sums: Sums) -> float:
        rows = probe_rows(self._data, trainer, model)
        layers = covering_layers(model)
        micro_batch = min(self._micro_batch, len(rows))
        loop = LoopEngine(rows, self._tokens, micro_batch)
        fast = RowsEngine(rows, self._tokens, micro_batch, layers)
        sampled = [Sampled(unit, 0) for unit in _PROBE_UNITS]
        with _moved(sums.parameters):
            distance = _distance(trainer, model, (fast, loop), sampled, sums)
        self._rows = RowsEngine(self._data, self._tokens, self._micro_batch, layers)
        return distance

    def _compare_first(
        self, trainer: Any, model: torch.nn.Module, sampled: Sequence[Sampled], sums: Sums, seen: Seen
    ) -> None:
        assert self._rows is not None
        few = [unit for unit in sampled if 0 < len(unit.rows) <= self._micro_batch // 2][:_FIRST]
        if len(few) <= 1:
            return
        self._compared = True
        try:
            distance = _distance(trainer, model, (self._rows, self._loop), few, sums)
        except RowsLostError as lost:
            self._give_up(seen, str(lost))
            return
        except (AuditError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:
            self._compared = False
            return
        finally:
            clear_metrics(trainer)
        if math.isnan(distance):  # all of their gradients are zero, or not finite: the next batch may show more
            self._compared = False
        elif not distance <= _TOLERANCE:
            self._give_up(seen, f"its clipped sum differs from the loop's by {distance:.2g} of it")

    def _give_up(self, seen: Seen, reason: str) -> None:
        seen.reset()
        seen.notes |= {"engine": self._loop.name, "engine_reason": reason}
        self._rows = None

    def _fall_back(self, reason: str) -> None:
        self._rows = None
        if self._fell_back is not None:
            self._fell_back(self._loop.name, reason)


def probe_rows(data: Any, trainer: Any, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Made-up rows with the columns of ``data``: nothing in them depends on its rows."""
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    padding = getattr(trainer.processing_class, "pad_token_id", None)
    longest = max(4, min(_PROBE_LENGTH, getattr(trainer.args, "max_length", None) or _PROBE_LENGTH))
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        drawn = torch.randint(vocabulary, (length,), generator=generator).tolist()
        return [token if token != padding else (token + 1) % vocabulary for token in drawn]

    def value(column: str, row: int) -> Any:
        half = longest // 2
        if column == "input_ids":
            return tokens(longest - row)
        if column == "labels":
            return None
        if column == "prompt_ids":
            return tokens(1 + (half - 1) // (row + 1))
        if column.endswith("_ids"):
            return tokens(half - row % 2)
        return {"label": row % 2 == 0, "margin": 0.25 * row}.get(column)

    rows = []
    for number in range(1 + max(max(unit) for unit in _PROBE_UNITS)):
        row = {column: value(column, number) for column in data.column_names}
        if "labels" in row:  # the first tokens stand for a prompt
            row["labels"] = [-100] * 2 + row["input_ids"][2:]
        rows.append({column: item for column, item in row.items() if item is not None})
    return rows


def _distance(
    trainer: Any,
    model: torch.nn.Module,
    engines: tuple[GradientEngine, GradientEngine],
    sampled: Sequence[Sampled],
    sums: Sums,
) -> float:
    """How far the engines' clipped sums, losses and norms are apart, relative to the second's; NaN: nothing to see."""
    found = []
    for engine in engines:
        own, seen = Sums(sums.parameters, sums.bound), Seen()
        engine.add(trainer, model, sampled, own, seen)
        found.append((own.tensors, [*seen.losses, *seen.norms]))
    (first, told), (second, truth) = found
    size = math.sqrt(sum(float(tensor.square().sum()) for tensor in second))
    if len(told) != len(truth):
        return math.inf
    if not 0 < size < math.inf:
        return math.nan
    apart = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(first, second, strict=True))) / size
    others = [abs(a - b) / max(abs(b), 1e-6) for a, b in zip(told, truth, strict=True)]
    return max(apart, *others)


@contextlib.contextmanager
def _moved(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """While inside, the parameters are a little elsewhere, so that none stands where a gradient is zero (LoRA's B)."""
    before = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * _PROBE_MOVE)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
