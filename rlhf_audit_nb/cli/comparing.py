"""Check: ``diff``. Floor 6."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_audit_nb.cli.shared import Command, Parser, add_policy, finish, note, read_policy
from rlhf_audit_nb.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlhf_audit_nb.records.record import OpenedRecord

__all__ = ["COMMANDS"]

PAIR = 2


def _do_diff(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.records.diff import open_records, refuse_unproven

    if len(args.records) < PAIR:
        raise ConfigError(
            "One record is named, and a comparison takes two.", next_step="Name another record.", code="usage"
        )
    opened = open_records(args.records, policy=read_policy(args))
    worst = max((record.verdict.exit_code(None) for _, record in opened), default=0)
    if not args.claimed:
        _tell_levels(opened)
        refuse_unproven(opened)
    code = 0 if worst < 30 else worst  # noqa: PLR2004  DIVERGED and INVALID; below that it holds
    return _many(args, opened, code) if len(opened) > PAIR else _two(args, opened, code)


def _tell_levels(opened: Sequence[tuple[str, OpenedRecord]]) -> None:
    """Each level on stderr, where one of them is the end of it; otherwise they stand in the comparison."""
    if all(record.verdict.exit_code(None) < 30 for _, record in opened):  # noqa: PLR2004
        return
    for name, record in opened:
        note(f"{name}: {record.verdict.level.name}")


def _two(args: argparse.Namespace, opened: Sequence[tuple[str, OpenedRecord]], code: int) -> int:
    from rlhf_audit_nb.records.diff import compare_records
    from rlhf_audit_nb.reports.diff import DiffView

    view = DiffView(compare_records(opened[0], opened[1], outputs=args.outputs))
    words = view.words(everything=args.all)
    if args.html is not None:
        words += ["", f"page     {view.save(Path(args.html))}"]
    return finish(args, view.to_dict(everything=args.all), words, code or _exit(args, differs=view.differs))


def _many(args: argparse.Namespace, opened: Sequence[tuple[str, OpenedRecord]], code: int) -> int:
    from rlhf_audit_nb.records.diff import tabulate_records
    from rlhf_audit_nb.reports.diff import table_words

    for option, given in (("--html", args.html), ("--outputs", args.outputs)):
        if given:
            raise ConfigError(
                f"{option} compares two records, and {len(opened)} are named.",
                next_step=f"Name two records, or leave {option} out.",
                code="usage",
            )
    table = tabulate_records(opened)
    words = table_words(table, everything=args.all)
    return finish(args, table.to_dict(everything=args.all), words, code or _exit(args, differs=table.differs))


def _exit(args: argparse.Namespace, *, differs: bool) -> int:
    return int(differs and args.exit_code)


def _add_diff(parser: Parser) -> None:
    parser.set_defaults(do=_do_diff)
    parser.add_argument("records", nargs="+", metavar="RECORD.ipynb", help="two records, or more for a table of them")
    parser.add_argument("--all", action="store_true", help="also what is equal")
    parser.add_argument("--outputs", action="store_true", help="also what the cells gave out")
    parser.add_argument("--html", metavar="FILE.html", help="write one page, to read without this tool")
    parser.add_argument("--claimed", action="store_true", help="compare also what does not verify, as what it claims")
    parser.add_argument("--exit-code", action="store_true", help="exit 1 where they differ")
    add_policy(parser)


COMMANDS = (
    Command("check", "diff", "what differs between records: parameters, code, data, privacy, metrics", _add_diff),
)
