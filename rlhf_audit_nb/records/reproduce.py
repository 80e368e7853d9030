"""Reproducing a record: its notebook runs again, what should be equal is compared, the result is kept. Floor 3.

The record is verified; its private trainings, if it has any, need their sealed seeds, from the files that ``disclose``
wrote or from the vault of one's own trail. With fresh noise they would be new trainings that spend budget, so without
the seeds nothing runs. The notebook then runs once more on scratch paper (`rerun`): no trail, vault or ledger is
charged. Compared are its runs and evaluations (`reproduce_runs`) and the outputs of its cells (`normalising`).

The verdict is ``identical``, ``equal within tolerance`` or ``different``. A tolerance holds where whoever reproduces
stated it, and never for private training. `keep_reproduction` writes the result into a trail, as an entry, and into the
record, as an addition by the key of that trail. Neither says anything of private data: of a record with private
training they name the part in which it differs, and no step, output or value.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from rlhf_audit_nb.errors import ConfigError, RecordError
from rlhf_audit_nb.events import PrivacyReserved, RecordReproduced, RunStarted, decode_body
from rlhf_audit_nb.privacy.replay import ReplaySeeds
from rlhf_audit_nb.records.normal_form import freeze
from rlhf_audit_nb.records.normalising import Identity, OutputsCompared, compare_outputs, declared_rules, read_rules
from rlhf_audit_nb.records.replay import open_seeds
from rlhf_audit_nb.records.reproduce_runs import PARTS, Found, RunsCompared, Tolerance, compare_all_runs
from rlhf_audit_nb.records.reproductions import DIFFERENT, EQUAL, IDENTICAL
from rlhf_audit_nb.records.rerun import Progress, Rerun, open_sound_record, rerun_notebook, write_notebook
from rlhf_audit_nb.trail.encoding import decode_base64

if TYPE_CHECKING:
    from rlhf_audit_nb.events import AppliedRule
    from rlhf_audit_nb.records.normalising import OutputDifference, Rule
    from rlhf_audit_nb.records.record import OpenedRecord
    from rlhf_audit_nb.records.reproduce_environment import FreshEnvironment
    from rlhf_audit_nb.records.reproduce_runs import EnvironmentsCompared
    from rlhf_audit_nb.trail import Trail, TrustPolicy
    from rlhf_audit_nb.trail.entry import Entry

__all__ = [
    "Reproduction",
    "ReproductionRefusedError",
    "read_tolerance",
    "reproduce_record",
]

DISTRIBUTION = "rlhf-audit-trail"

_SOURCE = re.compile(r"^(The source file .* differs): .*$")  # no digest of somebody's own file goes into the open
_MOST_LINES = 12
_MOST_SHOWN = 8
_WIDTH = 160


class ReproductionRefusedError(RecordError):
    """The record cannot be reproduced as it is; nothing was run."""

    code: ClassVar[str] = "reproduction-refused"
    exit_code: ClassVar[int] = 3


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What a reproduction found.

    Attributes:
        record: the record's id.
        origin: the name of its trail.
        digest: of its notebook, as it was sealed.
        statement: SHA-256 of its signed statement.
        compared: what was compared, by part.
        found: what is not as it was in runs, evaluations and outcome.
        outputs: outputs of cells that are not as they were.
        tolerated_outputs: how many differ within the tolerance.
        tolerance: what was stated.
        rules: how outputs were brought into one form, and how often.
        open_rules: the same as it may be published.
        times: metrics that are measured times and were left out.
        not_compared: what could not be compared, as sentences.
        environment: where both ran.
        fresh: whether it ran in an environment that was made from the recorded packages.
        seeds: the entries whose seeds were opened.
        private: whether the record holds private training.
    """

    record: str
    origin: str
    digest: str
    statement: str
    compared: dict[str, int]
    found: tuple[Found, ...]
    outputs: tuple[OutputDifference, ...]
    tolerated_outputs: int
    tolerance: Tolerance
    rules: tuple[AppliedRule, ...]
    open_rules: tuple[AppliedRule, ...]
    times: int
    not_compared: tuple[str, ...]
    environment: EnvironmentsCompared
    fresh: bool
    seeds: tuple[int, ...]
    private: bool

    @property
    def verdict(self) -> str:
        """``identical``, ``equal within tolerance`` or ``different``."""
        if self.outputs or any(not item.tolerated for item in self.found):
            return DIFFERENT
        return EQUAL if self.found or self.tolerated_outputs else IDENTICAL

    @property
    def exit_code(self) -> int:
        """0 where it is equal, 1 where it differs."""
        return 1 if self.verdict == DIFFERENT else 0

    @property
    def first(self) -> str | None:
        """The place of the first difference beyond the tolerance: runs go before outputs, causes before effects."""
        places = [item.place for item in self.found if not item.tolerated] + [item.place for item in self.outputs]
        return places[0] if places else None

    @property
    def different(self) -> dict[str, int]:
        """How many differences there are beyond the tolerance, by part."""
        counted = Counter(item.part for item in self.found if not item.tolerated)
        counted["outputs"] += len({item.place.rpartition(".data.")[0] or item.place for item in self.outputs})
        return _in_order(counted)

    @property
    def tolerated(self) -> dict[str, int]:
        """How many there are within the tolerance, by part."""
        counted = Counter(item.part for item in self.found if item.tolerated)
        counted["outputs"] += self.tolerated_outputs
        return _in_order(counted)

    def event(self) -> RecordReproduced:
        """The result as it stands in a trail and in a record, where nothing of private data may stand."""
        different, first = self.different, self.first
        if self.private:
            first = next(iter(different), None)
            different = dict.fromkeys(different, 1)
        return RecordReproduced(
            record=self.record,
            origin=self.origin,
            digest=self.digest,
            statement=self.statement,
            verdict=self.verdict,
            compared=self.compared,
            different=different,
            tolerated=self.tolerated,
            first=first,
            tolerance=self.tolerance.to_dict(),
            normalisation=list(self.open_rules),
            times_left_out=self.times,
            not_compared=list(self.not_compared),
            environment=self.environment.word,
            environment_differs=[_SOURCE.sub(r"\1.", sentence) for sentence in self.environment.differs],
            fresh=self.fresh,
            seeds=list(self.seeds),
            tool=f"{DISTRIBUTION}/{importlib.metadata.version(DISTRIBUTION)}",
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values; of a record with private training outputs name their places alone."""
        return {
            **msgspec.to_builtins(self.event()),
            "first": self.first,
            "different": self.different,
            "differences": [asdict(item) for item in self.found],
            "outputs": [asdict(item) for item in self.outputs],
            "normalisation": [msgspec.to_builtins(rule) for rule in self.rules],
            "environment_notes": list(self.environment.notes),
        }

    def words(self) -> list[str]:
        """All of it as lines for people."""
        lines = [self._headline()]
        lines += [f"  {text}" for text in self._differences()]
        lines.append(f"  compared     {_counts(self.compared)}")
        if self.different:
            lines.append(f"  different    {_counts(self.different)}")
        if self.tolerated:
            lines.append(f"  tolerated    {_counts(self.tolerated)}")
        stated = ", ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
                           for name, value in self.tolerance.to_dict().items())  # fmt: skip
        lines.append(f"  tolerance    {stated or 'none was stated: bit for bit'}")
        lines.append(f"  normalised   {self._rules()}")
        lines.append(f"  environment  {_ENVIRONMENT[self.environment.word]}{' (made fresh)' if self.fresh else ''}")
        lines += [f"    {sentence}" for sentence in self.environment.differs]
        lines += [f"  note: {sentence}" for sentence in self.environment.notes]
        return [*lines, *(f"  not compared: {sentence}" for sentence in self.not_compared)]

    def _headline(self) -> str:
        if self.verdict == DIFFERENT:
            return f"different  the first difference is {self.first}"
        seeds = f"; private training from {len(self.seeds)} opened seed(s)" if self.seeds else ""
        return f"{self.verdict}  {sum(self.compared.values())} things compared{seeds}"

    def _differences(self) -> Iterator[str]:
        beyond = [item for item in self.found if not item.tolerated]
        yield from (_cut(str(item)) for item in beyond[:_MOST_SHOWN])
        if len(beyond) > _MOST_SHOWN:
            yield f"… and {len(beyond) - _MOST_SHOWN} more (--json has all)"
        if not self.outputs:
            return
        first = self.outputs[0]
        yield f"{first.place}: {first.what}"
        if first.expected is not None and first.found is not None:
            yield from (f"  {line}" for line in _diff(first.expected, first.found))
        if len(self.outputs) > 1:
            yield f"… and {len(self.outputs) - 1} more part(s) of outputs (--json has all)"

    def _rules(self) -> str:
        applied = [rule for rule in self.rules if rule.applied or rule.origin != "tool"]
        named = [
            f"{rule.rule} {rule.applied}{'' if rule.origin == 'tool' else f' ({rule.origin})'}" for rule in applied
        ]
        if self.times:
            named.append(f"measured times among metrics {self.times} (left out)")
        return ", ".join(named) or "nothing"

    def __str__(self) -> str:
        return "\n".join(self.words())

    __repr__ = __str__


_ENVIRONMENT = {
    "same": "the same packages, settings and kind of machine",
    "other": "another one",
    "unknown": "not recorded: the notebook holds no run",
}


def _in_order(counted: Counter[str]) -> dict[str, int]:
    return {part: counted[part] for part in PARTS if counted[part]}


def _counts(counted: dict[str, int]) -> str:
    return ", ".join(f"{part} {count}" for part, count in counted.items())


def _cut(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def _diff(then: str, now: str) -> list[str]:
    lines = difflib.unified_diff(then.splitlines(), now.splitlines(), "then", "now", n=1, lineterm="")
    cut = [_cut(line) for line in lines]
    return cut if len(cut) <= _MOST_LINES else [*cut[: _MOST_LINES - 1], "…"]


# --- what may differ -------------------------------------------------------------------------------------------------


def read_tolerance(stated: Sequence[str]) -> Tolerance:
    """A tolerance from ``metrics=1e-6``, ``outputs=1e-6`` and ``weights=any``.

    Raises:
        ConfigError: anything else, or one of them twice.
    """
    values: dict[str, Any] = {}
    for text in stated:
        name, _, value = text.partition("=")
        if name in values or name not in ("metrics", "outputs", "weights"):
            raise _no_tolerance(text)
        if name == "weights":
            if value != "any":
                raise _no_tolerance(text)
            values[name] = True
            continue
        try:
            number = float(value)
        except ValueError:
            raise _no_tolerance(text) from None
        if not 0 < number < 1:
            raise _no_tolerance(text)
        values[name] = number
    return Tolerance(**values)


def _no_tolerance(text: str) -> ConfigError:
    return ConfigError(
        f"{text!r} states no tolerance.",
        next_step="Write each once: metrics=1e-6 or outputs=1e-6 (a number between 0 and 1), or weights=any, since a "
        "digest cannot say by how much weights differ.",
        code="tolerance",
    )


# --- reproducing -----------------------------------------------------------------------------------------------------


def reproduce_record(
    path: Path | str,
    openings: Sequence[Path | str] = (),
    *,
    policy: TrustPolicy | None = None,
    home: Path | None = None,
    trail: Trail | None = None,
    files: Sequence[Path | str] = (),
    cwd: Path | str | None = None,
    output: Path | str | None = None,
    tolerance: Tolerance | None = None,
    rules: Path | str | None = None,
    threads: int | None = None,
    fresh: FreshEnvironment | None = None,
    progress: Progress | None = None,
) -> Reproduction:
    """Run a record's notebook again and compare; nothing is written into the record or a trail.

    Args:
        path: the record.
        openings: the disclosure files of the seeds of its private trainings.
        policy: whose signatures count, for record and openings; ``None`` trusts the user's own key.
        home: the folder of keys and last-seen heads; ``None`` takes the usual one.
        trail: a trail of one's own: where it is the record's, seeds that no file opens come from its vault.
        files: files and folders that the notebook reads by relative paths, copied into the scratch folder under the
            same paths (relative to the working directory; from elsewhere under their names).
        cwd: run in this folder instead of a scratch one; what the notebook writes is then written there.
        output: where the notebook that ran again is left; ``None`` leaves nothing.
        tolerance: what may differ; ``None`` is nothing.
        rules: a file of regular expressions for outputs (`normalising`).
        threads: for the arithmetic; ``None`` takes as many as there were.
        fresh: an environment that was made from the recorded packages (`reproduce_environment`).
        progress: called with a code cell's position (from 0), the number of cells and its state.

    Raises:
        RecordError: the record cannot be read.
        ReplayRefusedError, ReproductionRefusedError: the record or an opening does not hold, a seed is missing, or the
            record is of a kind that cannot be run again; nothing was run.
        ReplayFailedError: a cell raised that had not raised before.
        ConfigError: a rule is no regular expression.
        VaultError: ``trail`` has a seed no more.
    """
    opened = open_sound_record(path, policy=policy, home=home)
    _refuse_what_cannot_run(opened)
    given = tuple(read_rules(rules)) if rules is not None else ()
    declared = (*given, *declared_rules(opened.notebook))
    seeds = _seeds(opened, openings, policy, home, trail)
    python = fresh.python if fresh is not None else None
    with rerun_notebook(
        opened, seeds, files=files, cwd=cwd, progress=progress, threads=threads, python=python
    ) as rerun:
        if output is not None:
            write_notebook(rerun.notebook, Path(output))
        return _compared(opened, rerun, seeds, tolerance or Tolerance(), declared, fresh)


def _refuse_what_cannot_run(opened: OpenedRecord) -> None:
    if opened.sealed is None or opened.sealed.status == "aborted":
        raise ReproductionRefusedError(
            "The record was cut short (aborted), so what it had not come to cannot be compared.",
            next_step="Run the notebook into a new record with rlhf-audit run.",
            code="aborted",
        )
    for entry in opened.entries:
        event = decode_body(entry.type, entry.body) if entry.type == RunStarted.TYPE else None
        if isinstance(event, RunStarted) and (event.privacy or {}).get("unit") == "label":
            raise ReproductionRefusedError(
                "The record trained on labels that were released through randomised response; without the keys of that "
                "release, which stay in the vault, its rows are not known elsewhere, so it cannot be run again.",
                next_step="Compare such a training by its digests: rlhf-audit verify FOLDER of the saved weights.",
                code="label-release",
            )


def _seeds(
    opened: OpenedRecord,
    openings: Sequence[Path | str],
    policy: TrustPolicy | None,
    home: Path | None,
    trail: Trail | None,
) -> ReplaySeeds:
    origin = opened.verdict.origin
    if not openings and not any(entry.type == PrivacyReserved.TYPE for entry in opened.entries):
        return ReplaySeeds(origin, [])
    own = trail if trail is not None and trail.origin == origin else None
    return open_seeds(opened.entries, openings, origin=origin, policy=policy, home=home, missing_from=own)


def _compared(
    opened: OpenedRecord,
    rerun: Rerun,
    seeds: ReplaySeeds,
    tolerance: Tolerance,
    rules: Sequence[Rule],
    fresh: FreshEnvironment | None,
) -> Reproduction:
    assert opened.sealed is not None  # for the type checker: `_refuse_what_cannot_run`
    assert opened.metadata is not None  # likewise: it was verified
    now = list(rerun.reader.entries())
    runs = compare_all_runs(opened.entries, now, tolerance)
    _compare_outcome(opened, rerun, runs)
    outputs = _compare_outputs(opened, rerun, rules, tolerance, runs)
    differences = outputs.differences
    if runs.private:
        # With the noise being the same, two values side by side would show what the noise had covered.
        differences = tuple(replace(item, expected=None, found=None) for item in differences)
    return Reproduction(
        record=opened.sealed.record,
        origin=opened.verdict.origin,
        digest=opened.sealed.digest,
        statement=hashlib.sha256(decode_base64(opened.metadata["statement"]["payload"], "payload")).hexdigest(),
        compared=_in_order(runs.compared + Counter(outputs=outputs.compared)),
        found=tuple(runs.found),
        outputs=differences,
        tolerated_outputs=outputs.tolerated,
        tolerance=tolerance,
        rules=tuple(rule for rule, _ in outputs.rules),
        open_rules=tuple(
            msgspec.structs.replace(rule, applied=first) if runs.private else rule for rule, first in outputs.rules
        ),
        times=runs.times,
        not_compared=tuple(runs.not_compared),
        environment=replace(runs.environment, notes=(*(fresh.notes if fresh else ()), *runs.environment.notes)),
        fresh=fresh is not None,
        seeds=tuple(seeds.entries),
        private=runs.private,
    )


def _compare_outcome(opened: OpenedRecord, rerun: Rerun, runs: RunsCompared) -> None:
    assert opened.sealed is not None  # for the type checker: `_refuse_what_cannot_run`
    runs.compared["outcome"] += 1
    if opened.sealed.status == "failed" and not rerun.raised:
        place = f"record.sealed: status (cell {opened.sealed.cell})"
        expected = f"failed with {opened.sealed.reason}"
        runs.found.append(Found(part="outcome", place=place, expected=expected, found="completed"))


def _compare_outputs(
    opened: OpenedRecord, rerun: Rerun, rules: Sequence[Rule], tolerance: Tolerance, runs: RunsCompared
) -> OutputsCompared:
    then, now = (json.loads(json.dumps(notebook)) for notebook in (opened.content, rerun.notebook))
    for notebook in (then, now):
        freeze(notebook)
    identities = (
        _identity(opened.verdict.origin, opened.entries, opened.sealed.record if opened.sealed else ""),
        _identity(rerun.reader.origin, list(rerun.reader.entries()), ""),
    )
    within = None if runs.private else tolerance.outputs
    return compare_outputs(then, now, rules, identities=identities, tolerance=within)


def _identity(origin: str, entries: Sequence[Entry], record: str) -> Identity:
    runs = [entry.run for entry in entries if entry.type == RunStarted.TYPE and entry.run]
    return Identity(origin=origin, runs=tuple(runs), records=(record,) if record else ())
