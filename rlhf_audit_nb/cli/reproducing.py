"""Train and record: ``reproduce``. Floor 6."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from rlhf_audit_nb.cli.shared import Command, Parser, add_policy, finish, note, output, read_policy
from rlhf_audit_nb.errors import ConfigError

__all__ = ["COMMANDS"]


def _do_reproduce(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.records.reproduce import read_tolerance, reproduce_record

    if args.cwd is not None and args.files:
        raise ConfigError(
            "--files copies into a scratch folder, and --cwd runs in one of yours.",
            next_step="Write one of the two.",
            code="usage",
        )
    tolerance = read_tolerance(args.tolerance)
    policy = read_policy(args)
    with ExitStack() as stack:
        trail = None
        result = reproduce_record(
            args.record,
            args.opening,
            policy=policy,
            trail=trail,
            files=args.files,
            cwd=args.cwd,
            output=output(args, Path(args.out)) if args.out else None,
            tolerance=tolerance,
            rules=args.normalise,
            threads=args.threads,
            progress=lambda position, cells, state: note(f"cell {position + 1} of {cells}: {state}"),
        )
    return finish(args, {"path": str(args.record), **result.to_dict()}, result.words(), result.exit_code)


def _add_reproduce(parser: Parser) -> None:
    parser.set_defaults(do=_do_reproduce)
    parser.add_argument("record", metavar="RECORD.ipynb", help="the record; its code is run")
    parser.add_argument(
        "--opening", metavar="FILE", action="append", default=[], help="a seed, as disclose wrote it; repeatable"
    )
    parser.add_argument("--files", metavar="PATH", action="append", default=[], help="what it reads; repeatable")
    parser.add_argument("--cwd", metavar="DIR", help="run there, not in a scratch folder; what it writes stays there")
    parser.add_argument(
        "--tolerance",
        metavar="WHAT=T",
        action="append",
        default=[],
        help="what may differ: metrics=1e-6, outputs=1e-6, weights=any (nothing); repeatable",
    )
    parser.add_argument(
        "--normalise", metavar="FILE", help="regular expressions for outputs, as nbval's sanitize files"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="for the arithmetic (as many as there were)")
    parser.add_argument("-o", "--out", metavar="FILE.ipynb", help="leave the notebook that ran again there")
    add_policy(parser)


COMMANDS = (
    Command(
        "train and record", "reproduce", "run a record again, compare all of it, and keep the result", _add_reproduce
    ),
)
