"""What a trainer lets its policy write while it trains: kept by commitment, with figures in the open. Floor 2.

TRL's trainers each have methods through which a batch of samples passes; those that a trainer has are listened to:

    ``_calculate_rewards``, ``_calculate_rewards_from_functions``   prompts, completions, each function's rewards
    ``_generate_and_score_completions``                             the same batch with its advantages; or its token ids
    ``_generate_on_policy_for_slices``, ``_generate_student_completions``   texts that the trainer keeps for its log
    ``generate_on_policy_outputs``, ``_generate``                   token ids, where nothing is rewarded

Texts, rewards and advantages go into the vault under the run's own key, a commitment into the trail. A batch is cut
into parts of at most `PART_BYTES` (one sample may be longer), so that a part can be opened for somebody without the
others. Counts, lengths and what the rewards of the groups come to stand in the open. Nothing is drawn, moved or kept
on the device: the texts are those that the trainer decoded for its own rewards, else they are decoded once more.

This is for trainings whose measurements are public: without differential privacy, and where a policy inherits
(post-processing). What a private training samples is never heard.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from rlhf_audit_nb.events import Number, SamplesDrawn, SamplesPrivate, decode_body, decode_private, number

if TYPE_CHECKING:
    from rlhf_audit_nb.capture.run import Run
    from rlhf_audit_nb.trail import TrailReader, Vault

__all__ = [
    "MOST_GROUPS",
    "PART_BYTES",
    "Draw",
    "OpenedSamples",
    "SampleRecorder",
    "figures",
    "parts_of",
    "read_samples",
]

PART_BYTES = 256 * 1024
MOST_GROUPS = 512
_NO_SPREAD = 1e-8
_REWARDING = ("_calculate_rewards", "_calculate_rewards_from_functions")
_SCORING = "_generate_and_score_completions"
_BUFFERING = ("_generate_on_policy_for_slices", "_generate_student_completions")

Listener = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]


@dataclass
class Draw:
    """One batch of samples; all lists have one item for each, in the trainer's order.

    Attributes:
        prompts: texts, or conversations as lists of messages.
        completions: the same.
        rewards: each reward function's values by its name; ``nan`` where it gave none.
        weights: the weight of each of them.
        groups: which samples answer the same prompt together, as lists of places; empty where each stands alone.
        advantages: what the trainer made of the rewards.
        lengths: tokens of each completion.
        truncated: whether each was cut off at the longest length.
    """

    prompts: list[Any]
    completions: list[Any]
    rewards: dict[str, list[float]] = field(default_factory=dict)
    weights: list[float] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)
    advantages: list[float] | None = None
    lengths: list[int] | None = None
    truncated: list[bool] | None = None

    def totals(self) -> list[float]:
        """The weighted sum of each sample's rewards; ``nan`` where no function gave one."""
        columns = list(zip(self.rewards.values(), self.weights or [1.0] * len(self.rewards), strict=True))
        found = []
        for place in range(len(self.completions)):
            given = [values[place] * weight for values, weight in columns if not math.isnan(values[place])]
            found.append(math.fsum(given) if given else math.nan)
        return found


class SampleRecorder:
    """Records what one trainer samples.

    Args:
        run: the open run.
        trainer: the trainer that trains.
    """

    def __init__(self, run: Run, trainer: Any) -> None:
        self._run = run
        self._trainer = trainer
        self._every = run.audit.samples_every
        self._draws = 0
        self._pending: Draw | None = None

    def listeners(self) -> Iterator[tuple[str, Listener]]:
        """The trainer's methods to listen to, each with who listens."""
        if not self._every:
            return
        rewarded = [name for name in _REWARDING if self._has(name)]
        buffered = [name for name in _BUFFERING if self._has(name)]
        for name in rewarded:
            yield name, self._understood(functools.partial(self._saw_rewards, name))
        if self._has(_SCORING):
            yield _SCORING, self._understood(self._saw_scored)
        elif buffered:
            yield buffered[0], self._understood(self._saw_buffered)
        elif not rewarded and self._has("generate_on_policy_outputs"):
            yield "generate_on_policy_outputs", self._understood(self._saw_padded)
        elif not rewarded and self._has("_generate"):
            yield "_generate", self._understood(self._saw_ids)

    def _has(self, name: str) -> bool:
        """Whether the trainer has TRL's method of that name, or overrides it; others may use the name for anything."""
        return any(name in vars(kind) and kind.__module__.startswith("trl.") for kind in type(self._trainer).__mro__)

    def _understood(self, reads: Callable[..., Draw | None]) -> Listener:
        """A listener that records what ``reads`` makes of a call; what cannot be read is said and stops nothing."""

        def listener(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._trainer.model.training:
                return
            try:
                draw = reads(result, args, kwargs)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError, msgspec.MsgspecError) as error:
                self._run.warn(
                    f"What {type(self._trainer).__name__} sampled could not be read ({type(error).__name__}); those "
                    "samples are not in the trail."
                )
                return
            if draw is not None:
                self._finish(draw)

        return listener

    # --- what the trainer's methods tell -----------------------------------------------------------------------------

    def _saw_rewards(self, name: str, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Draw | None:
        method = inspect.getattr_static(type(self._trainer), name)
        given = inspect.signature(method).bind(self._trainer, *args, **kwargs).arguments
        draw = Draw([_plain(one) for one in given["prompts"]], [_plain(one) for one in given["completions"]])
        self._add_rewards(draw, result)
        if "completion_ids_list" in given:
            self._add_ids(draw, given["completion_ids_list"])
        draw.groups = self._groups(len(draw.completions), halves=name == _REWARDING[1])
        if not self._has(_SCORING):
            return draw
        self._pending = draw  # its advantages follow
        return None

    def _saw_scored(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Draw:
        del args, kwargs
        draw, self._pending = self._pending, None
        if draw is None:
            return self._decoded(_unpadded(result, "prompt"), _unpadded(result, "completion"))
        advantages = result.get("advantages")
        if advantages is not None and advantages.dim() == 1 and len(advantages) == len(draw.completions):
            draw.advantages = advantages.float().tolist()
        return draw

    def _saw_buffered(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Draw | None:
        del result
        places = kwargs["on_policy_indices"] if "on_policy_indices" in kwargs else args[1]
        texts = [self._trainer._buffered_text_logs[place] for place in places]  # noqa: SLF001  TRL's; no other way
        texts = [item for item in texts if item is not None]
        if not texts:
            return None
        return Draw([text for prompts, _ in texts for text in prompts], [text for _, said in texts for text in said])

    def _saw_padded(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Draw:
        del args, kwargs
        ids, mask, labels = result
        written = labels != -100  # noqa: PLR2004  what torch's losses pass over
        return self._decoded(_masked(ids, mask.bool() & ~written), _masked(ids, written))

    def _saw_ids(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Draw:
        del args, kwargs
        prompts, completions = result
        return self._decoded(prompts, completions)

    # --- a draw ------------------------------------------------------------------------------------------------------

    def _decoded(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Draw:
        decode = self._trainer.processing_class.batch_decode
        draw = Draw(
            list(decode(list(prompts), skip_special_tokens=True)),
            list(decode(list(completions), skip_special_tokens=True)),
        )
        self._add_ids(draw, completions)
        draw.groups = self._groups(len(draw.completions))
        return draw

    def _add_rewards(self, draw: Draw, result: Any) -> None:
        values = result.detach().float().cpu()
        size = len(draw.completions)
        if len(values) != size:  # gathered from all processes: these are this one's
            first = int(self._trainer.accelerator.process_index) * size
            values = values[first : first + size]
        if values.dim() == 1:  # weighted and summed already
            draw.rewards, draw.weights = {"reward": values.tolist()}, [1.0]
            return
        names = [str(name) for name in getattr(self._trainer, "reward_func_names", ())]
        if len(set(names)) != values.shape[1]:
            names = [f"{place}" for place in range(values.shape[1])]
        draw.rewards = {name: values[:, place].tolist() for place, name in enumerate(names)}
        weights = getattr(self._trainer, "reward_weights", None)
        draw.weights = weights.tolist() if weights is not None else [1.0] * len(names)

    def _add_ids(self, draw: Draw, completions: Sequence[Any]) -> None:
        draw.lengths = [len(one) for one in completions]
        tokenizer = getattr(self._trainer.processing_class, "tokenizer", self._trainer.processing_class)
        ends = {*getattr(self._trainer, "eos_token_ids", ()), tokenizer.eos_token_id, tokenizer.pad_token_id}
        draw.truncated = [not len(one) or int(one[-1]) not in ends for one in completions]

    def _groups(self, size: int, *, halves: bool = False) -> list[list[int]]:
        """Which samples answer one prompt: neighbours, or (online DPO) one of each half."""
        if halves:
            return [[place, place + size // 2] for place in range(size // 2)]
        together = int(getattr(self._trainer, "num_generations", 1) or 1)
        if together < 2 or size % together:  # noqa: PLR2004
            return []
        return [list(range(first, first + together)) for first in range(0, size, together)]

    def _finish(self, draw: Draw) -> None:
        self._draws += 1
        if (self._draws - 1) % self._every or not draw.completions:
            return
        figured, means, deviations = figures(draw)
        shared: dict[str, Any] = {"step": int(self._trainer.state.global_step) + 1, "draw": self._draws}
        parts = list(parts_of(draw))
        first = 0
        for part, half in enumerate(parts, start=1):
            more: dict[str, Any] = {}
            if part == 1:
                more["statistics"] = figured
                if len(means) <= MOST_GROUPS:
                    more |= {"group_means": means, "group_deviations": deviations}
            size = len(half.completions)
            event = SamplesDrawn(**shared, part=part, parts=len(parts), first=first, samples=size, **more)
            self._run.record(event, half)
            first += size


def figures(draw: Draw) -> tuple[dict[str, Number], list[Number | None], list[Number | None]]:
    """What may stand in the open of a draw: its figures, and each group's mean and standard deviation of rewards.

    Deviations divide by n - 1, as TRL's do; samples that no function rewarded are left out.
    """
    found: dict[str, float] = {"samples": len(draw.completions), "prompts": len({_key(one) for one in draw.prompts})}
    means: list[Number | None] = []
    deviations: list[Number | None] = []
    if draw.rewards:
        totals = draw.totals()
        found |= _spread("reward", totals)
        found["unrewarded"] = sum(map(math.isnan, totals))
        for name, values in draw.rewards.items():
            found |= _spread(f"rewards/{name}", values, extremes=False)
        if draw.groups:
            inside = [[totals[place] for place in group if not math.isnan(totals[place])] for group in draw.groups]
            spreads = [_deviation(values) for values in inside]
            means = [number(statistics.fmean(values)) if values else None for values in inside]
            deviations = [None if value is None else number(value) for value in spreads]
            known = [value for value in spreads if value is not None]
            found |= {"groups": len(draw.groups), "group_size": len(draw.groups[0])}
            if known:
                found["groups_without_spread"] = sum(value <= _NO_SPREAD for value in known) / len(known)
                found["group_deviation/mean"] = statistics.fmean(known)
    if draw.advantages is not None:
        found |= _spread("advantage", draw.advantages)
    if draw.lengths is not None:
        found |= _spread("length", draw.lengths)
    if draw.truncated is not None:
        found["truncated"] = sum(draw.truncated) / len(draw.truncated)
    return {name: number(value) for name, value in found.items()}, means, deviations


def parts_of(draw: Draw, most: int = PART_BYTES) -> Iterator[SamplesPrivate]:
    """The draw as private halves of about ``most`` bytes at the most, samples in their order, none cut in two."""
    begin, size = 0, 0
    for place in range(len(draw.completions)):
        needed = len(_key(draw.prompts[place])) + len(_key(draw.completions[place])) + 64
        if size and size + needed > most:
            yield _part(draw, begin, place)
            begin, size = place, 0
        size += needed
    yield _part(draw, begin, len(draw.completions))


def _part(draw: Draw, begin: int, end: int) -> SamplesPrivate:
    prompts: dict[bytes, int] = {}
    said: list[Any] = []
    places = []
    for prompt in draw.prompts[begin:end]:
        key = _key(prompt)
        if key not in prompts:
            prompts[key] = len(said)
            said.append(prompt)
        places.append(prompts[key])
    return SamplesPrivate(
        prompts=said,
        prompt_of=places,
        completions=draw.completions[begin:end],
        rewards={
            name: [None if math.isnan(value) else number(value) for value in values[begin:end]]
            for name, values in draw.rewards.items()
        },
        advantages=[number(value) for value in draw.advantages[begin:end]] if draw.advantages is not None else None,
        lengths=draw.lengths[begin:end] if draw.lengths is not None else None,
    )


def _spread(name: str, values: Sequence[float], *, extremes: bool = True) -> dict[str, float]:
    known = [float(value) for value in values if not math.isnan(value)]
    if not known:
        return {f"{name}/mean": math.nan}
    found = {f"{name}/mean": statistics.fmean(known)}
    if (deviation := _deviation(known)) is not None:
        found[f"{name}/deviation"] = deviation
    return found | ({f"{name}/min": min(known), f"{name}/max": max(known)} if extremes else {})


def _deviation(values: Sequence[float]) -> float | None:
    """The standard deviation, dividing by n - 1; ``None`` of fewer than two values, ``nan`` of infinite ones."""
    if len(values) < 2:  # noqa: PLR2004
        return None
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _unpadded(result: Mapping[str, Any], name: str) -> list[Any]:
    return _masked(result[f"{name}_ids"], result[f"{name}_mask"].bool())


def _masked(ids: Any, mask: Any) -> list[Any]:
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


# --- reading them again ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenedSamples:
    """One part of a draw as the vault has it.

    Attributes:
        index: the entry.
        run: the run that it is of.
        event: what stands in the open.
        state: ``open``, ``erased`` or ``missing``.
        half: the texts, rewards and advantages; ``None`` unless it is open.
    """

    index: int
    run: str | None
    event: SamplesDrawn
    state: str
    half: SamplesPrivate | None = None

    @property
    def step(self) -> int:
        """The first optimizer step that the samples were drawn for."""
        return self.event.step

    def pairs(self) -> list[tuple[Any, Any]]:
        """Each completion with its prompt; empty where they are not there any more."""
        if self.half is None:
            return []
        return [
            (self.half.prompts[at], text) for at, text in zip(self.half.prompt_of, self.half.completions, strict=True)
        ]


def read_samples(reader: TrailReader, vault: Vault, *, run: str | None = None) -> Iterator[OpenedSamples]:
    """The recorded samples in the trail's order, opened and checked against their commitments.

    Raises:
        VaultError: the vault does not open with this key, or an opening is not its commitment's.
    """
    for entry in reader.entries(type=SamplesDrawn.TYPE, run=run):
        event = decode_body(entry.type, entry.body)
        assert isinstance(event, SamplesDrawn)  # for the type checker; the type says so
        found = vault.half(entry)
        half = decode_private(entry.type, found.payload) if found.payload is not None else None
        assert half is None or isinstance(half, SamplesPrivate)
        yield OpenedSamples(entry.index, entry.run, event, found.state, half)


_encoder = msgspec.json.Encoder(order="deterministic")


def _key(value: Any) -> bytes:
    return _encoder.encode(value)


def _plain(value: Any) -> Any:
    """A prompt or a completion as plain values; a picture is named by the digest of its pixels."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tobytes"):
        return f"{type(value).__name__} sha256:{hashlib.sha256(value.tobytes()).hexdigest()}"
    return type(value).__name__
