"""Training again from seeds that were opened: whose they are, how they travel, what their plan is. Floor 2.

A replay repeats the private trainings of one run, each from the seed that its reservation had sealed, on a trail that
is scratch paper. Three things keep it from training anything new with a known seed in silence: a trail takes opened
seeds only where its second entry is ``replay.started`` and names them; every reservation that draws from a given seed
says so in ``generator``; and seeds are handed out once each, in the order of the reservations.

To a kernel they travel in a file that only this user can read (mode 0600, in a folder of mode 0700 that goes with the
replay), named by ``RLHF_AUDIT_REPLAY`` and deleted when it has been read; a seed stands neither on a command line nor
in the environment. The file is one JSON object::

    {"format":"rlhf-audit/replay/v1","origin":ORIGIN,"seeds":[{"entry":INDEX,"reserved":{...},"seed":HEX},...]}
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from rlhf_audit_nb.config import ENV_REPLAY, PrivacyConfig
from rlhf_audit_nb.errors import EntryError, PrivacyError
from rlhf_audit_nb.events import PrivacyReserved, ReplayStarted, decode_body, encode_body
from rlhf_audit_nb.privacy.accountant import compose
from rlhf_audit_nb.privacy.plan import Plan, plan_training
from rlhf_audit_nb.privacy.sampling import SEED_BYTES

if TYPE_CHECKING:
    from rlhf_audit_nb.privacy.accountant import Composable
    from rlhf_audit_nb.privacy.populations import Roster
    from rlhf_audit_nb.trail import Trail, TrailReader

__all__ = [
    "FORMAT",
    "OpenedSeed",
    "ReplaySeeds",
    "check_replaying",
    "given_seeds",
    "plan_replay",
    "refuse_release",
    "start_replay",
    "write_seeds",
]

FORMAT = "rlhf-audit/replay/v1"
_AMPLE = 1e9  # a budget that cuts nothing: the steps are those of the reservation


@dataclass(frozen=True)
class OpenedSeed:
    """A seed that was opened: the reservation's entry in its own trail, what that says, and the secret."""

    entry: int
    reserved: PrivacyReserved
    seed: bytes

    def __repr__(self) -> str:
        return f"OpenedSeed(entry={self.entry}, seed=<secret>)"


class ReplaySeeds:
    """The opened seeds of one replay, handed out in the order of their reservations."""

    def __init__(self, origin: str, seeds: Sequence[OpenedSeed]) -> None:
        self.origin = origin
        self._seeds = tuple(sorted(seeds, key=lambda opened: opened.entry))
        self._next = 0

    @property
    def entries(self) -> list[int]:
        """The entries whose seeds were opened."""
        return [opened.entry for opened in self._seeds]

    @property
    def seeds(self) -> tuple[OpenedSeed, ...]:
        """All of them, in order."""
        return self._seeds

    def peek(self) -> OpenedSeed:
        """The one that the next training draws from.

        Raises:
            PrivacyError: every one of them has served.
        """
        if self._next >= len(self._seeds):
            raise PrivacyError(
                f"This replay holds {len(self._seeds)} opened seed{'s' if len(self._seeds) != 1 else ''}, and another "
                "private training begins that the replayed run did not have.",
                next_step="Replay the same code; train anything new in a run of its own.",
                code="replay-seeds",
            )
        return self._seeds[self._next]

    def take(self) -> OpenedSeed:
        """`peek`, and the next training gets the next one."""
        opened = self.peek()
        self._next += 1
        return opened


# --- the file --------------------------------------------------------------------------------------------------------


def write_seeds(path: Path, seeds: ReplaySeeds) -> None:
    """Write the seeds into a new file that only this user can read.

    Raises:
        OSError: it exists already, or cannot be written.
    """
    content = {
        "format": FORMAT,
        "origin": seeds.origin,
        "seeds": [
            {"entry": item.entry, "reserved": json.loads(encode_body(item.reserved)), "seed": item.seed.hex()}
            for item in seeds.seeds
        ],
    }
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(content, file)


def _read_seeds(path: Path) -> ReplaySeeds:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(content["format"])
        seeds = [
            OpenedSeed(int(item["entry"]), _reserved(item["reserved"]), bytes.fromhex(item["seed"]))
            for item in content["seeds"]
        ]
        if any(len(item.seed) != SEED_BYTES for item in seeds):
            raise ValueError("seed")
        return ReplaySeeds(str(content["origin"]), seeds)
    except (OSError, ValueError, KeyError, TypeError, EntryError) as error:
        raise PrivacyError(
            f"{ENV_REPLAY} is set and names no file of opened seeds, so nothing is trained.",
            next_step=f"Unset {ENV_REPLAY}; `rlhf-audit replay` sets it for the notebook that it repeats.",
            code="replay",
        ) from error


def _reserved(body: dict[str, Any]) -> PrivacyReserved:
    event = decode_body(PrivacyReserved.TYPE, msgspec.json.encode(body))
    assert isinstance(event, PrivacyReserved)  # for the type checker; decode_body checked it
    return event


_given: dict[str, ReplaySeeds] = {}
_lock = threading.Lock()


def given_seeds(trail: Trail) -> ReplaySeeds | None:
    """The seeds that ``RLHF_AUDIT_REPLAY`` hands to this process, for a private run on ``trail``; mostly ``None``.

    Raises:
        PrivacyError: it is set, and ``trail`` is not the replay's own.
    """
    named = os.environ.get(ENV_REPLAY)
    if not named:
        return None
    with _lock:
        if named not in _given:
            path = Path(named)
            _given[named] = _read_seeds(path)
            path.unlink(missing_ok=True)
        seeds = _given[named]
    check_replaying(trail.reader(), seeds)
    return seeds


# --- the trail -------------------------------------------------------------------------------------------------------


def start_replay(trail: Trail, seeds: ReplaySeeds) -> None:
    """Mark a new trail as that of a replay: its second entry.

    Raises:
        PrivacyError: the trail holds more than its first entry: nothing becomes a replay afterwards.
    """
    if trail.reader().size != 1:
        raise PrivacyError("Only a new trail can be that of a replay.", code="replay")
    marked = ReplayStarted(origin=seeds.origin, reservations=seeds.entries)
    trail.append(ReplayStarted.TYPE, encode_body(marked)).wait()


def check_replaying(reader: TrailReader, seeds: ReplaySeeds | None = None) -> None:
    """Check that a trail is that of a replay (of these seeds).

    Raises:
        PrivacyError: it is an ordinary trail, or the replay of something else.
    """
    marks = [decode_body(entry.type, entry.body) for entry in reader.entries(1, 2) if entry.type == ReplayStarted.TYPE]
    wanted = None if seeds is None else ReplayStarted(origin=seeds.origin, reservations=seeds.entries)
    if not marks or (wanted is not None and marks[0] != wanted):
        raise PrivacyError(
            f"{ENV_REPLAY} is set, and this trail is not that of the replay: nothing is trained on it with seeds that "
            "somebody knows.",
            next_step=f"Unset {ENV_REPLAY} for ordinary runs.",
            code="replay",
        )


def refuse_release(reader: TrailReader) -> None:
    """Refuse to release labels where a run is repeated: the flips would be others, and would cost anew.

    Raises:
        PrivacyError: the trail is that of a replay.
    """
    if any(entry.type == ReplayStarted.TYPE for entry in reader.entries(1, 2)):
        raise PrivacyError(
            "A run is being repeated here, and a release of labels cannot be: its flips would be others, and each "
            "label would pay for them anew.",
            next_step="Release labels outside of the notebook, and let it read the released file.",
            code="replay",
        )


# --- the plan --------------------------------------------------------------------------------------------------------


def plan_replay(
    trainer: Any,
    config: PrivacyConfig,
    prior: Sequence[Composable],
    prior_of: Callable[[Roster], Sequence[Composable]] | None,
    reserved: PrivacyReserved,
    *,
    done: int = 0,
) -> Plan:
    """The plan of a training that repeats ``reserved``.

    The sampling rate, the roster, the steps asked for and the clipping come from the trainer and ``config``, as they
    did then, so that they can differ. The noise multiplier and the number of steps come from the reservation: they
    followed from what the ledger held before it, which is not here.

    Raises:
        UnsupportedTrainerError, DataError: as `plan_training`.
    """
    noise = reserved.noise_multiplier
    ample = replace(config, epsilon=_AMPLE, run_epsilon=None, noise_multiplier=noise)
    plan = plan_training(trainer, ample, prior, prior_of, done=done)
    steps = min(plan.steps, reserved.steps)
    mechanism = plan.mechanism.with_steps(steps)
    return replace(
        plan,
        config=replace(plan.config, epsilon=config.epsilon, run_epsilon=config.run_epsilon),
        mechanism=mechanism,
        limit=config.epsilon,
        accounted=compose([*plan.prior, mechanism], config.delta),
        curve=plan.curve[: steps + 1],
        warnings=(),
    )
