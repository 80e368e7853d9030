"""Check: ``verify``. Floor 6."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_audit_nb.cli.shared import WIDTH, Command, Parser, add_policy, finish, is_record, read_policy

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import Reason, TrustPolicy, Verdict

__all__ = ["COMMANDS", "add_target", "verdict_of", "verdict_words"]

LEVELS = ("UNANCHORED", "TIMESTAMPED", "COSIGNED")


def verdict_of(target: str, policy: TrustPolicy | None) -> tuple[Verdict, Sequence[Reason]]:
    """The verdict, and what is worth knowing beside it and is no fault."""
    if is_record(target):
        from rlhf_audit_nb.records import open_record

        opened = open_record(Path(target), policy=policy)
        return opened.verdict, opened.notes
    from rlhf_audit_nb.trail import verify_trail
    from rlhf_audit_nb.trail.published import is_published, verify_published

    verify = verify_published if is_published(target) else verify_trail
    return verify(Path(target), policy=policy), ()


def _do_verify(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail import Level

    verdict, notes = verdict_of(args.target, read_policy(args))
    require = Level[args.require] if args.require else None
    words = verdict_words(verdict, notes)
    code = verdict.exit_code(require)
    if require is not None and code and not verdict.reasons:
        words.append(f"Required was {require.name}: refused.")
    return finish(args, verdict.to_dict(), words, code)


def verdict_words(verdict: Verdict, notes: Sequence[Reason]) -> list[str]:
    """The verdict for a person."""
    from rlhf_audit_nb.compliance.words import level_words, short

    words = level_words(verdict.level.name)
    lines = textwrap.wrap(f"{verdict.level.name}  {words.shows}", WIDTH, subsequent_indent="  ")
    lines += [f"  {reason.where}: {reason.message} [{reason.code}]" for reason in verdict.reasons]
    lines += [f"  worth knowing: {note.where}: {note.message} [{note.code}]" for note in notes]
    if verdict.size:
        signers = ", ".join(verdict.signers) or "nobody that is trusted here"
        lines.append(f"  {verdict.origin}: {verdict.size} entries, root {short(verdict.root)}, signed by {signers}")
    lines += [f"  run {short(run.run)}: {run.status}, {run.entries} entries" for run in verdict.runs]
    return [*lines, *textwrap.wrap(words.not_shown, WIDTH, initial_indent="  ", subsequent_indent="  ")]


def add_target(parser: Parser) -> None:
    """What is checked or told of, and whom to trust."""
    parser.add_argument("target", metavar="RECORD.ipynb|TRAIL")
    add_policy(parser)


def _add_verify(parser: Parser) -> None:
    parser.set_defaults(do=_do_verify)
    add_target(parser)
    parser.add_argument("--require", choices=LEVELS, type=str.upper, help="a lower level is a failure")


COMMANDS = (Command("check", "verify", "check a record or a trail and say how far the check reaches", _add_verify),)
