"""What one of several processes collects of its part in a training, and how two of them compare. Floor 2.

A process that writes no trail records the same events as the one that does (`Evidence.saw`): what should be equal in
all of them is kept as digests, of the rest counts and a few numbers. The rows that it trained on are those that its
batch sampler drew, each batch counted when the trainer takes it (`hear_rows`), so that what was only fetched ahead
does not count.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from rlhf_audit_nb.capture.rank_exchange import Identity
from rlhf_audit_nb.events import (
    DataBound,
    EnvironmentCaptured,
    Event,
    ModelBound,
    Number,
    RanksFormed,
    Step,
    TrainerAttached,
    encode_body,
    number,
)

__all__ = ["Comparison", "Evidence", "Word", "compare", "hear_rows", "spread"]

SHARED = (TrainerAttached.TYPE, DataBound.TYPE, ModelBound.TYPE)
"""Entries that should be the same in every process."""
POINTS_ON_THE_WAY = 64
"""How many of the newest weights digests a word on the way has; the last word has all."""
MAX_POINTS = 10_000
"""How many of the newest weights digests are kept for the end, so that memory does not grow with the run."""
REPLICATED = "replicated"
MAX_DIFFERENCES = 40
_OWN = ("variables.RANK", "variables.LOCAL_RANK", "variables.CUDA_VISIBLE_DEVICES")
"""What says which process it is, and so differs by its nature."""


class Word(msgspec.Struct, kw_only=True):
    """What a process tells the one that writes: on the way, and at its end (``final``)."""

    rank: int
    identity: Identity
    final: bool = False
    status: str | None = None
    reason: str | None = None
    local_rank: int | None = None
    device: str | None = None
    hardware: dict[str, Any] = {}
    environment: dict[str, str] = {}
    steps: int = 0
    batches: int = 0
    rows: int | None = None
    rows_digest: str | None = None
    strategy: str | None = None
    points: dict[str, str] = {}
    final_weights: str | None = None
    shared: dict[str, str] = {}
    entries: dict[str, int] = {}
    loss: dict[str, Number] = {}
    peak_memory_bytes: int | None = None
    peak_device_memory_bytes: int | None = None
    seconds: float | None = None
    more: dict[str, Any] = {}


class Comparison(msgspec.Struct, frozen=True):
    """Two processes' weights and entries beside each other; see `rlhf_audit_nb.events.RankReported`."""

    weights: str
    compared: int
    diverged_at: str | None
    differs: list[str]


class Evidence:
    """What this process saw so far; `word` puts it together."""

    def __init__(self) -> None:
        self.strategy: str | None = None
        self.device: str | None = None
        self.more: dict[str, Any] = {}
        self._hardware: dict[str, Any] = {}
        self._environment: dict[str, str] = {}
        self._entries: dict[str, int] = {}
        self._shared: dict[str, Any] = {}
        self._points: dict[str, str] = {}
        self._final: str | None = None
        self._trainings = 0
        self._steps = 0
        self._losses: list[float] = []  # first, last, sum, count
        self._batches = 0
        self._rows: int | None = 0
        self._row_digest = hashlib.sha256()
        self._seconds = 0.0
        self._since: float | None = None

    # --- what it is told ---------------------------------------------------------------------------------------------

    def saw(self, event: Event) -> None:
        """The run records ``event``, or would, were this the process that writes."""
        kind = event.TYPE
        self.counted(kind)
        if kind in SHARED:
            body = encode_body(_comparable(event))
            self._shared.setdefault(kind, hashlib.sha256()).update(body + b"\n")
        if isinstance(event, Step):
            self._saw_step(event)
        elif isinstance(event, ModelBound):
            self._saw_model(event)
        elif isinstance(event, EnvironmentCaptured):
            self.runs_on(event)

    def runs_on(self, event: EnvironmentCaptured) -> None:
        """Where this process runs."""
        self._hardware, self._environment = event.hardware, _flat(event)

    def counted(self, kind: str) -> None:
        """An entry of that type was, or would have been, written."""
        if kind != RanksFormed.TYPE:
            self._entries[kind] = self._entries.get(kind, 0) + 1

    def _saw_step(self, event: Step) -> None:
        if event.weights_digest is not None:
            self._keep(f"step {event.step}", event.weights_digest)
        loss = event.metrics.get("loss")
        if loss is None or "evaluation" in event.notes:
            return
        value = float(loss)  # "NaN" and "Infinity" are what float() reads
        if not self._losses:
            self._losses = [value, value, 0.0, 0]
        self._losses[1:] = [value, self._losses[2] + value, self._losses[3] + 1]

    def _saw_model(self, event: ModelBound) -> None:
        if event.role in ("base", "final"):
            self._keep(event.role, event.trainable_digest or event.weights_digest)
        if event.role == "final":
            self._final = event.weights_digest

    def _keep(self, point: str, digest: str) -> None:
        name = point if self._trainings <= 1 else f"training {self._trainings}, {point}"
        self._points[name] = digest
        if len(self._points) > MAX_POINTS:
            del self._points[next(iter(self._points))]

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """While it lasts a trainer trains."""
        self._trainings += 1
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._seconds, self._since = self.seconds, None

    @property
    def seconds(self) -> float:
        """Seconds in training so far."""
        return self._seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def took_batch(self, indices: list[Any] | None) -> None:
        """The trainer took a batch of these rows of its data set; ``None`` where they are not known."""
        self._batches += 1
        if indices is None:
            self._rows = None
        elif self._rows is not None:
            self._rows += len(indices)
            self._row_digest.update((",".join(map(str, indices)) + "\n").encode())

    # --- what it tells -----------------------------------------------------------------------------------------------

    def word(self, rank: int, local_rank: int | None, steps: int, *, final: bool = False) -> Word:
        """All of it, for the process that writes."""
        points = dict(self._points)
        if not final:
            points = dict(list(points.items())[-POINTS_ON_THE_WAY:])
        known = self._batches and self._rows is not None
        return Word(
            rank=rank,
            identity=Identity.mine(),
            final=final,
            local_rank=local_rank,
            device=self.device,
            hardware=self._hardware,
            environment=self._environment,
            steps=steps,
            batches=self._batches,
            rows=self._rows if known else None,
            rows_digest=self._row_digest.hexdigest() if known else None,
            strategy=self.strategy,
            points=points,
            final_weights=self._final,
            shared={kind: digest.hexdigest() for kind, digest in self._shared.items()},
            entries=dict(sorted(self._entries.items())),
            loss=_loss(self._losses),
            peak_memory_bytes=_peak_memory(),
            peak_device_memory_bytes=_peak_device_memory(),
            seconds=self.seconds,
            more=self.more,
        )


def _comparable(event: Event) -> Event:
    """Without what may differ between processes that train alike: where their generators of random numbers stand."""
    return msgspec.structs.replace(event, generators={}) if isinstance(event, TrainerAttached) else event


def _loss(losses: list[float]) -> dict[str, Number]:
    if not losses:
        return {}
    first, last, total, count = losses
    return {"first": number(first), "last": number(last), "mean": number(total / count)}


def _flat(event: EnvironmentCaptured) -> dict[str, str]:
    """The environment by part: ``python``, ``packages.torch``; hardware is told apart."""
    found: dict[str, str] = {}
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if name == "hardware":
            continue
        if isinstance(value, Mapping):
            found.update({f"{name}.{key}": str(item) for key, item in value.items()})
        else:
            found[name] = str(value)
    return found


def _peak_memory() -> int | None:
    """The most resident memory that this process ever had, in bytes; ``None`` where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _peak_device_memory() -> int | None:
    """The most memory that torch's tensors had on this process's GPU, in bytes; ``None`` without one in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated())


# --- comparing -------------------------------------------------------------------------------------------------------


def compare(mine: Word, other: Word) -> Comparison:
    """How ``other`` stands beside ``mine``, the writer's.

    Weights are compared where both hold all of them: not where they are sharded. Entries that should be equal are
    compared once the other's last word is there.
    """
    replicated = {mine.strategy, other.strategy} <= {REPLICATED}
    common = [point for point in mine.points if point in other.points] if replicated else []
    diverged = next((point for point in common if mine.points[point] != other.points[point]), None)
    weights = "not compared" if not common else "equal" if diverged is None else "diverged"
    return Comparison(weights, len(common), diverged, _differences(mine, other) if other.final else [])


def _differences(mine: Word, other: Word) -> list[str]:
    kinds = [kind for kind in SHARED if mine.shared.get(kind) != other.shared.get(kind)]
    names = sorted({*mine.environment, *other.environment})
    parts = [name for name in names if name not in _OWN and mine.environment.get(name) != other.environment.get(name)]
    found = [*kinds, *parts]
    more = len(found) - MAX_DIFFERENCES
    return found if more <= 0 else [*found[:MAX_DIFFERENCES], f"and {more} more"]


# --- the trainer -----------------------------------------------------------------------------------------------------


def spread(trainer: Any) -> str:
    """How the trainer's model is spread over the processes: ``replicated``, ``fsdp``, ``deepspeed`` or ``sharded``."""
    if trainer.is_deepspeed_enabled:
        return "deepspeed"
    if trainer.is_fsdp_enabled:
        return "fsdp"
    # A distributed tensor says where its parts are; a plain one has no such attribute.
    sharded = any(hasattr(parameter, "placements") for parameter in trainer.model.parameters())
    return "sharded" if sharded else REPLICATED


@contextlib.contextmanager
def hear_rows(trainer: Any, evidence: Evidence, *, resumed: bool) -> Iterator[None]:
    """Tell ``evidence`` of every batch that ``trainer`` trains on while this lasts, and of its rows where it can.

    A resumed training skips batches that its sampler drew; which they are is not known here, so neither are the rows.
    """
    drawn: deque[list[Any]] = deque()
    heard = False

    def built(loader: Any) -> None:
        nonlocal heard
        sampler = getattr(loader, "batch_sampler", None)
        heard = sampler is not None and not resumed and _hear_sampler(sampler, drawn)

    def took() -> None:
        evidence.took_batch(drawn.popleft() if heard and drawn else None)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_told(trainer, "get_train_dataloader", after=built))
        stack.enter_context(_told(trainer, "training_step", before=took))
        yield


def _hear_sampler(sampler: Any, drawn: deque[list[Any]]) -> bool:
    """Let ``drawn`` have what the batch sampler draws from now on; whether that can be done."""
    kind = type(sampler)

    def draw(self: Any) -> Iterator[Any]:
        drawn.clear()  # what the epoch before fetched ahead was not trained on
        for batch in kind.__iter__(self):
            drawn.append(list(batch))
            yield batch

    try:
        sampler.__class__ = type(kind.__name__, (kind,), {"__iter__": draw, "__module__": kind.__module__})
    except TypeError:  # a class of fixed layout: then the rows stay unknown
        return False
    return True


@contextlib.contextmanager
def _told(
    trainer: Any, name: str, *, before: Callable[[], None] | None = None, after: Callable[[Any], None] | None = None
) -> Iterator[None]:
    """While it lasts the trainer's method tells when it is called, and what it returns."""
    original = getattr(trainer, name)
    own = vars(trainer).get(name)

    def method(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before()
        result = original(*args, **kwargs)
        if after is not None:
            after(result)
        return result

    setattr(trainer, name, method)
    try:
        yield
    finally:
        if own is None:
            vars(trainer).pop(name, None)
        else:
            setattr(trainer, name, own)
