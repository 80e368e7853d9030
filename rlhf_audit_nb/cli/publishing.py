"""Share: ``publish``. Floor 6."""

from __future__ import annotations

import argparse

from rlhf_audit_nb.cli.shared import Command, Parser, add_trail, finish, trail_folder

__all__ = ["COMMANDS"]


def _do_publish(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.tiles import publish_tiles

    done = publish_tiles(trail_folder(args), args.target)
    answer = {"target": str(done.folder), "size": done.size, "written": done.written}
    return finish(args, answer, [f"published   {done.folder}: {done.size} entries, {done.written} files written"])


def _add_publish(parser: Parser) -> None:
    parser.set_defaults(do=_do_publish)
    parser.add_argument("target", metavar="FOLDER", help="where the files go; what is there already is not rewritten")
    add_trail(parser)


COMMANDS = (
    Command("share", "publish", "write a trail as static files (C2SP tlog-tiles) that anyone can check", _add_publish),
)
