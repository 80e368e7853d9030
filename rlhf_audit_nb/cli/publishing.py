"""Share: ``publish``. Floor 6."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict

from rlhf_audit_nb.cli.shared import Command, Parser, add_trail, finish, note, trail_folder
from rlhf_audit_nb.errors import KeyFileError

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


def _endorse(checkpoint: str) -> str:
    """The checkpoint with the log's second signature, where this user has the key for it."""
    from rlhf_audit_nb.trail.checkpoint import checkpoint_of
    from rlhf_audit_nb.trail.home import home_folder, keys_folder
    from rlhf_audit_nb.trail.keys import load_keys

    home, origin = home_folder(), checkpoint_of(checkpoint).origin
    if not (keys_folder(home, origin) / "mldsa.vkey").is_file():
        return checkpoint
    try:
        return load_keys(home, origin).endorse(checkpoint)
    except KeyFileError as error:
        note(f"the checkpoint is published without its second signature: {error.message}")
        return checkpoint


def _do_publish(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.trail.tiles import publish_tiles

    trail = trail_folder(args)
    done = publish_tiles(trail, args.target, progress=_Telling(), everything=args.all, endorse=_endorse)
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
