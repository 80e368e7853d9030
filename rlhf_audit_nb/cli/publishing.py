"""Share: ``publish``. Floor 6."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict

from rlhf_audit_nb.cli.shared import Command, Parser, add_trail, endorse, finish, note, trail_folder

__all__ = ["COMMANDS"]

_PATIENCE = 2.0


class _Telling:
    """Progress of what takes long, a line now and then."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, what: str, done: int, size: int) -> None:
        now = time.monotonic()
        if now - self._last >= _PATIENCE:
            self._last = now
            note(f"{what} {done:,} of {size:,} entries")


def _do_publish(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.tiles import publish_tiles

    trail = trail_folder(args)
    done = publish_tiles(trail, args.target, progress=_Telling(), everything=args.all, endorse=endorse)
    new = done.size - done.before
    said = "nothing was new"
    if done.written or done.removed:
        said = f"{new:,} of them new, {done.written:,} file{'' if done.written == 1 else 's'} written"
    words = [f"published   {done.target}: {done.size:,} entries; {said}"]
    return finish(args, asdict(done), words)


def _add_publish(parser: Parser) -> None:
    parser.set_defaults(do=_do_publish)
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="a folder, or an address like s3://BUCKET/FOLDER; tiles that are there already are never rewritten",
    )
    parser.add_argument(
        "--all", action="store_true", help="look at every file there, not only at what is new, and add what is missing"
    )
    add_trail(parser)


COMMANDS = (
    Command("share", "publish", "write a trail as static files (C2SP tlog-tiles) that anyone can check", _add_publish),
)
