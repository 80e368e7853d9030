"""Several processes that train one model: that they were several, and what each of them told. Floor 1."""

from __future__ import annotations

from typing import Any, ClassVar

from rlhf_audit_nb.events.base import Event, Number

__all__ = ["RankReported", "RanksFormed"]


class RanksFormed(Event, frozen=True, kw_only=True):
    """The run is trained by ``world_size`` processes, and the one of ``rank`` writes it.

    ``backend`` is what they talk through (``gloo``, ``nccl``), ``None`` where they formed no group; ``strategy`` is how
    the model is spread: ``replicated`` (each has all of it), ``fsdp``, ``deepspeed`` or ``sharded``, ``None`` where
    nothing was trained. ``loss`` says whose the ``loss`` of the run's steps is: ``rank 0`` is that process's own, over
    its own rows (what TRL measures beside it, TRL gathers itself). ``launcher`` is ``torchrun`` where its environment
    was found. ``late``: the run was opened before its process could know that it is one of several, so others have
    opened runs of their own.
    """

    TYPE: ClassVar[str] = "run.ranks"

    world_size: int
    rank: int
    backend: str | None = None
    strategy: str | None = None
    loss: str | None = None
    launcher: str | None = None
    late: bool = False


class RankReported(Event, frozen=True, kw_only=True):
    """What one of several processes told of its part in the run, as gathered by the one that writes.

    ``heard`` is ``reported`` (its last word came), ``lost`` (its process ended without one: what stands here is what it
    had told before), ``late`` (it may live, and did not report in time) or ``never`` (nothing came at all). ``status``
    and ``reason`` are how its run ended: the outcome as in ``run.finished``, and the exception's type.

    ``batches`` and ``rows`` count what it trained on; ``rows_digest`` is SHA-256 over the indices of its rows in the
    training set, one batch a line, in the order of training (with ``rows`` ``None`` where they are not known: a stream,
    a resumed training). ``weights`` compares its digests with the writer's (whose own is the ``reference``) at the same
    points: ``equal``, ``diverged`` or ``not compared``; ``compared`` says at how many, ``diverged_at`` is the first one
    that differs. ``differs`` names what else is not as the writer's: types of entries (``data.bound``) and parts of the
    environment (``packages.torch``). ``entries`` counts by type what it would have written. ``loss`` has ``first``,
    ``last`` and ``mean`` over its own rows; ``seconds`` is its time in training. ``node`` numbers the machines from the
    writer's, 0; ``None`` where that is not known. ``more`` is what other parts of the recorder measured there.
    """

    TYPE: ClassVar[str] = "run.rank"

    rank: int
    world_size: int
    heard: str
    status: str | None = None
    reason: str | None = None
    node: int | None = None
    local_rank: int | None = None
    device: str | None = None
    hardware: dict[str, Any] = {}
    steps: int = 0
    batches: int = 0
    rows: int | None = None
    rows_digest: str | None = None
    weights: str = "not compared"
    compared: int = 0
    diverged_at: str | None = None
    final_weights: str | None = None
    differs: list[str] = []
    entries: dict[str, int] = {}
    loss: dict[str, Number] = {}
    peak_memory_bytes: int | None = None
    peak_device_memory_bytes: int | None = None
    seconds: float | None = None
    more: dict[str, Any] = {}
