"""Check: ``replay``. Floor 6."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from rlhf_audit_nb.cli.shared import Command, Parser, add_policy, finish, note, output, read_policy
from rlhf_audit_nb.errors import ConfigError

__all__ = ["COMMANDS"]


def _do_replay(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.records.replay import replay_record
    from rlhf_audit_nb.trail import Trail

    if not args.opening and args.trail is None:
        raise ConfigError(
            "No opening is named, and without the sealed seed a training cannot be repeated.",
            next_step="Name the files that `rlhf-audit disclose` wrote: --opening FILE for each private training.",
            code="usage",
        )
    if args.cwd is not None and args.files:
        raise ConfigError(
            "--files copies into a scratch folder, and --cwd runs in one of yours.",
            next_step="Write one of the two.",
            code="usage",
        )
    with ExitStack() as stack:
        trail = stack.enter_context(Trail.open(Path(args.trail), create=False)) if args.trail is not None else None
        result = replay_record(
            args.record,
            args.opening,
            policy=read_policy(args),
            trail=trail,
            files=args.files,
            cwd=args.cwd,
            output=output(args, Path(args.out)) if args.out else None,
            progress=lambda position, cells, state: note(f"cell {position + 1} of {cells}: {state}"),
        )
    return finish(args, {"record": str(args.record), **result.to_dict()}, result.words(), result.exit_code)


def _add_replay(parser: Parser) -> None:
    parser.set_defaults(do=_do_replay)
    parser.add_argument("record", metavar="RECORD.ipynb", help="the record; its code is run")
    parser.add_argument(
        "--opening", metavar="FILE", action="append", default=[], help="a seed, as disclose wrote it; repeatable"
    )
    parser.add_argument("--trail", metavar="DIR", help="your own trail: seeds that no file opens come from its vault")
    parser.add_argument("--files", metavar="PATH", action="append", default=[], help="what it reads; repeatable")
    parser.add_argument("--cwd", metavar="DIR", help="run there, not in a scratch folder; what it writes stays there")
    parser.add_argument("-o", "--out", metavar="FILE.ipynb", help="leave the replayed notebook there")
    add_policy(parser)


COMMANDS = (
    Command("check", "replay", "run a record again from its opened seeds and compare, bit for bit", _add_replay),
)
