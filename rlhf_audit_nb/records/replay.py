"""Replaying a record from the openings of its seeds, and saying whether it comes out the same. Floor 3.

The record is verified, each opening is verified against the commitment in the record's own ``privacy.reserved`` entry,
and the notebook runs once more on scratch paper (`rerun`). What is compared is in `comparison`. Whoever replays needs
the data, runs the notebook's code, and holds what the seed protects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_audit_nb.events import PrivacyReserved, PrivacySealed, decode_body, decode_private
from rlhf_audit_nb.privacy.replay import OpenedSeed, ReplaySeeds
from rlhf_audit_nb.records.comparison import Comparison, compare_environments, compare_runs, private_runs
from rlhf_audit_nb.records.rerun import (
    Progress,
    ReplayFailedError,
    ReplayRefusedError,
    environment_of,
    open_sound_record,
    rerun_notebook,
    scratch_trail,
    write_notebook,
)
from rlhf_audit_nb.trail import Level, Trail, TrailReader
from rlhf_audit_nb.trail.disclosure import Disclosure, disclose, parse_disclosure, verify_disclosure
from rlhf_audit_nb.trail.proof import parse_proof

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import TrustPolicy
    from rlhf_audit_nb.trail.entry import Entry

__all__ = [
    "ReplayFailedError",
    "ReplayRefusedError",
    "ReplayResult",
    "compare_with_replay",
    "open_own_seeds",
    "open_seeds",
    "replay_record",
    "scratch_trail",
]


@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """What a replay found.

    Attributes:
        comparison: what was compared, and where it differs.
        warnings: what differs in the environment, as sentences; no difference of the runs by itself.
        entries: the ``privacy.reserved`` entries whose seeds were used.
    """

    comparison: Comparison
    warnings: tuple[str, ...]
    entries: tuple[int, ...]

    @property
    def equal(self) -> bool:
        """Whether the replay came out the same, bit for bit."""
        return self.comparison.equal

    @property
    def exit_code(self) -> int:
        """0 where it is equal, 1 where it differs."""
        return 0 if self.equal else 1

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**self.comparison.to_dict(), "warnings": list(self.warnings), "reservations": list(self.entries)}

    def words(self) -> list[str]:
        """All of it as lines for people."""
        found = self.comparison
        compared = f"{found.trainings} private training(s), {found.steps} step(s), {found.digests} weights digest(s)"
        if self.equal:
            lines = [f"equal     bit for bit: {compared}"]
        else:
            lines = [f"differs   {found.first or 'there was nothing to compare'}"]
            if found.first_step is not None:
                lines.append(f"  the first step that differs is {found.first_step}")
            lines.append(f"  compared: {compared}")
        return [*lines, *(f"  note: {sentence}" for sentence in self.warnings)]

    def __str__(self) -> str:
        return "\n".join(self.words())

    __repr__ = __str__


# --- openings --------------------------------------------------------------------------------------------------------


def open_seeds(
    entries: Sequence[Entry],
    openings: Sequence[Path | str],
    *,
    origin: str,
    policy: TrustPolicy | None = None,
    home: Path | None = None,
    missing_from: Trail | None = None,
) -> ReplaySeeds:
    """The seeds of all private trainings among ``entries``, from disclosure files that are verified first.

    Args:
        entries: of the runs that are to be replayed, verified.
        openings: the files that ``rlhf-audit disclose`` wrote, in any order.
        origin: the trail that the entries are of.
        policy: whose signatures count; ``None`` trusts the user's own key.
        home: the folder of keys; ``None`` takes the usual one.
        missing_from: a trail of one's own, whose vault is asked for those that no file opens.

    Raises:
        ReplayRefusedError: there is no private training; a file does not verify, or is of another trail, run or kind of
            entry; a training has no opening.
        VaultError: ``missing_from`` has the seed no more (``erased``, ``opening-missing``).
    """
    reserved = {entry.index: entry for entry in entries if entry.type == PrivacyReserved.TYPE}
    if not reserved:
        raise ReplayRefusedError(
            "No private training is recorded there, so no seed was sealed and there is nothing to replay.",
            next_step="Replay a run that trained under differential privacy.",
        )
    found: dict[int, OpenedSeed] = {}
    for path in openings:
        opened = _verified(Path(path), reserved, origin, policy, home)
        found[opened.entry] = opened
    for index in sorted(set(reserved) - set(found)):
        if missing_from is None:
            continue
        found[index] = _opened(disclose(missing_from, index), reserved[index])
    missing = sorted(set(reserved) - set(found))
    if missing:
        raise ReplayRefusedError(
            f"The seed of {_entries(missing)} is not opened; without it the noise of that training cannot be drawn "
            "again, and with fresh noise it would be a new training, which spends budget.",
            next_step=f"Have whoever keeps the vault write it: rlhf-audit disclose {missing[0]}. A seed that was "
            "erased from the vault is gone for good, and that training can never be replayed.",
        )
    return ReplaySeeds(origin, list(found.values()))


def open_own_seeds(trail: Trail, run: str) -> ReplaySeeds:
    """The seeds of one run's trainings, from the trail's own vault.

    Raises:
        ReplayRefusedError: the run has no private training.
        VaultError: a seed was erased, or its opening is missing.
    """
    entries = list(trail.reader().entries(run=run))
    return open_seeds(entries, (), origin=trail.origin, missing_from=trail)


def _entries(indices: Sequence[int]) -> str:
    return f"{'entry' if len(indices) == 1 else 'entries'} {', '.join(map(str, indices))}"


def _verified(
    path: Path, reserved: dict[int, Entry], origin: str, policy: TrustPolicy | None, home: Path | None
) -> OpenedSeed:
    verdict, payload = verify_disclosure(path, policy=policy, home=home)
    if verdict.level in (Level.INVALID, Level.DIVERGED) or not payload:
        why = verdict.reasons[0].message if verdict.reasons else "It proves nothing."
        raise ReplayRefusedError(
            f"The opening {path.name} does not verify: {why}",
            next_step="Have it written again: rlhf-audit disclose INDEX.",
        )
    disclosure = parse_disclosure(path.read_bytes())
    index = parse_proof(disclosure.proof).index
    entry = reserved.get(index)
    if verdict.origin != origin or entry is None or entry.data != disclosure.entry.encode():
        of = f"entry {index} of {verdict.origin}"
        raise ReplayRefusedError(
            f"The opening {path.name} is of {of}, which reserves none of the trainings to be replayed; those are "
            f"reserved in {_entries(sorted(reserved))} of {origin}.",
            next_step="Name the openings of these entries.",
        )
    return _opened(disclosure, entry)


def _opened(disclosure: Disclosure, entry: Entry) -> OpenedSeed:
    from rlhf_audit_nb.trail.encoding import decode_base64

    event = decode_body(entry.type, entry.body)
    sealed = decode_private(entry.type, decode_base64(disclosure.payload, "payload"))
    assert isinstance(event, PrivacyReserved)  # for the type checker; the callers chose these entries
    assert isinstance(sealed, PrivacySealed)
    return OpenedSeed(entry.index, event, bytes.fromhex(sealed.seed))


# --- comparing -------------------------------------------------------------------------------------------------------


def compare_with_replay(entries: Sequence[Entry], replayed: TrailReader, seeds: ReplaySeeds) -> ReplayResult:
    """Compare the runs in ``entries`` with those on the replay's trail."""
    then, now = private_runs(entries), private_runs(replayed.entries())
    warnings: tuple[str, ...] = ()
    for (_, before), (_, after) in zip(then, now, strict=False):
        old, new = environment_of(before), environment_of(after)
        if old is not None and new is not None:
            warnings += tuple(item for item in compare_environments(old, new) if item not in warnings)
    return ReplayResult(comparison=compare_runs(then, now), warnings=warnings, entries=tuple(seeds.entries))


# --- a record --------------------------------------------------------------------------------------------------------


def replay_record(
    path: Path | str,
    openings: Sequence[Path | str] = (),
    *,
    policy: TrustPolicy | None = None,
    home: Path | None = None,
    trail: Trail | None = None,
    files: Sequence[Path | str] = (),
    cwd: Path | str | None = None,
    output: Path | str | None = None,
    progress: Progress | None = None,
) -> ReplayResult:
    """Run a record's notebook again with the seeds of its private trainings, and compare.

    Args:
        path: the record.
        openings: the disclosure files of its ``privacy.reserved`` entries.
        policy: whose signatures count, for record and openings; ``None`` trusts the user's own key.
        home: the folder of keys and last-seen heads; ``None`` takes the usual one.
        trail: the record's own trail, where the vault is one's own: seeds that no file opens come from it.
        files: files and folders that the notebook reads by relative paths, copied into the scratch folder under the
            same paths (relative to the working directory; from elsewhere under their names).
        cwd: run in this folder instead of a scratch one; what the notebook writes is then written there.
        output: where the replayed notebook is left; ``None`` leaves nothing.
        progress: called with a code cell's position (from 0), the number of cells and its state.

    Raises:
        RecordError: the record cannot be read.
        ReplayRefusedError: the record or an opening does not hold, or a seed is missing; nothing was run.
        ReplayFailedError: a cell raised that had not raised before.
        VaultError: ``trail`` has a seed no more.
    """
    opened = open_sound_record(path, policy=policy, home=home)
    seeds = open_seeds(
        opened.entries, openings, origin=opened.verdict.origin, policy=policy, home=home, missing_from=trail
    )
    with rerun_notebook(opened, seeds, files=files, cwd=cwd, progress=progress) as rerun:
        if output is not None:
            write_notebook(rerun.notebook, Path(output))
        return compare_with_replay(opened.entries, rerun.reader, seeds)
