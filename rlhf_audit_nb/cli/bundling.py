"""Share: ``bundle``. Floor 6."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlhf_audit_nb.cli.checking import verdict_words
from rlhf_audit_nb.cli.shared import (
    Command,
    Parser,
    add_policy,
    beside,
    finish,
    note,
    output,
    read_policy,
    skip_address_parsers,
)

__all__ = ["COMMANDS"]

ZIP = ".zip"


def _do_bundle(args: argparse.Namespace) -> int:
    skip_address_parsers()
    from rlhf_audit_nb.reports.record_bundle import RefusedRecordError, bundle_record

    path = _target(args)
    try:
        made = bundle_record(args.record, policy=read_policy(args), trail=args.trail)
    except RefusedRecordError as error:
        note(f"error: {error.message}")
        code = error.verdict.exit_code(None)
        return finish(args, error.verdict.to_dict(), verdict_words(error.verdict, ()), code)
    made.save(path)
    size = sum(map(len, made.files.values()))
    tiles = "with the log's tiles" if made.tiles else "without the log's tiles: no trail of it was at hand"
    answer = {
        "bundle": str(path),
        "record": made.record,
        "files": len(made.files),
        "bytes": size,
        "level": made.level,
        "tiles": made.tiles,
    }
    words = [f"bundle   {path}: {len(made.files):,} files, {size:,} bytes ({made.level}), {tiles}"]
    words.append("         it holds no trust.policy: give the log's key to whoever checks it by another way")
    return finish(args, answer, words)


def _target(args: argparse.Namespace) -> Path:
    """A zip's place is seen to before anything is made, like that of every other output; a folder sees to its own."""
    default = beside(args.record, ".bundle.zip")
    return output(args, default) if args.out is None or args.out.lower().endswith(ZIP) else Path(args.out)


def _add_bundle(parser: Parser) -> None:
    parser.set_defaults(do=_do_bundle)
    parser.add_argument("record", metavar="RECORD.ipynb")
    parser.add_argument("-o", "--out", metavar="DIR|FILE.zip", help="where it goes (RECORD.bundle.zip)")
    parser.add_argument(
        "--trail", metavar="TRAIL|URL", help="the record's trail, for its tiles (found beside the record by itself)"
    )
    add_policy(parser)


COMMANDS = (Command("share", "bundle", "a record as one folder or zip that anyone can check without us", _add_bundle),)
