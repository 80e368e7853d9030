"""Train and record: ``reproduce``. Floor 6."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_audit_nb.cli.shared import Command, Parser, add_policy, finish, note, output, read_policy
from rlhf_audit_nb.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_audit_nb.records.reproduce_environment import FreshEnvironment
    from rlhf_audit_nb.trail import Trail, TrustPolicy

__all__ = ["COMMANDS"]


def _do_reproduce(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.records.reproduce import read_tolerance, reproduce_record
    from rlhf_audit_nb.records.reproduce_keeping import keep_reproduction

    if args.cwd is not None and args.files:
        raise ConfigError(
            "--files copies into a scratch folder, and --cwd runs in one of yours.",
            next_step="Write one of the two.",
            code="usage",
        )
    tolerance, policy = read_tolerance(args.tolerance), read_policy(args)
    with _trail(args, policy) as trail, _environment(args, policy, trail) as fresh:
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
            fresh=fresh,
            progress=lambda position, cells, state: note(f"cell {position + 1} of {cells}: {state}"),
        )
        kept = None
        if trail is not None and not args.no_entry:
            kept = keep_reproduction(result, args.record, trail, add=not args.no_add, policy=policy)
    answer = {"path": str(args.record), **result.to_dict(), "kept": kept.to_dict() if kept else None}
    words = [*result.words(), kept.words() if kept else "kept       nowhere, as you asked"]
    return finish(args, answer, words, result.exit_code)


@contextmanager
def _trail(args: argparse.Namespace, policy: TrustPolicy | None) -> Iterator[Trail | None]:
    """The trail that keeps the result, and whose vault may hold the seeds; ``None`` where nothing is to be kept."""
    from rlhf_audit_nb.records.reproduce_keeping import place_of_trail
    from rlhf_audit_nb.records.rerun import open_sound_record
    from rlhf_audit_nb.trail import Trail

    # Refused before a trail is made.
    origin = open_sound_record(args.record, policy=policy, home=None).verdict.origin
    place = place_of_trail(args.record, args.trail, origin)
    if args.no_entry and not place.is_dir():
        yield None
        return
    with Trail.open(place, create=not args.no_entry) as trail:
        yield trail


@contextmanager
def _environment(
    args: argparse.Namespace, policy: TrustPolicy | None, trail: Trail | None
) -> Iterator[FreshEnvironment | None]:
    """The environment that was asked for; one without a folder of its own is gone afterwards."""
    from rlhf_audit_nb.records.reproduce_environment import make_environment, wanted_packages
    from rlhf_audit_nb.records.rerun import open_sound_record

    if args.fresh_environment is None:
        if args.without:
            raise ConfigError("--without goes with --fresh-environment.", next_step="Write both.", code="usage")
        yield None
        return
    opened = open_sound_record(args.record, policy=policy, home=None)
    own = trail is not None and trail.origin == opened.verdict.origin
    python, wanted = wanted_packages(opened, trail.artifacts if trail is not None and own else None)
    with tempfile.TemporaryDirectory(prefix="rlhf-audit-") as scratch:
        folder = Path(args.fresh_environment or Path(scratch) / "environment")
        yield make_environment(folder, wanted, python=python, without=args.without, tell=note)


def _add_reproduce(parser: Parser) -> None:
    parser.set_defaults(do=_do_reproduce)
    parser.add_argument("record", metavar="RECORD.ipynb", help="the record; its code is run")
    parser.add_argument(
        "--opening", metavar="FILE", action="append", default=[], help="a seed, as disclose wrote it; repeatable"
    )
    parser.add_argument("--trail", metavar="DIR", help="keeps the result, its vault may hold the seeds (your own)")
    parser.add_argument("--no-add", action="store_true", help="leave the record as it is; the result is an entry alone")
    parser.add_argument("--no-entry", action="store_true", help="keep the result nowhere")
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
    parser.add_argument(
        "--fresh-environment",
        metavar="DIR",
        nargs="?",
        const="",
        help="run it in an environment made from the recorded packages, in DIR (a scratch folder)",
    )
    parser.add_argument(
        "--without", metavar="NAME", action="append", default=[], help="a package to leave out of it; repeatable"
    )
    parser.add_argument("-o", "--out", metavar="FILE.ipynb", help="leave the notebook that ran again there")
    add_policy(parser)


COMMANDS = (
    Command(
        "train and record", "reproduce", "run a record again, compare all of it, and keep the result", _add_reproduce
    ),
)
