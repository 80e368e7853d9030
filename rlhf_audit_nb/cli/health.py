"""Check: ``doctor`` and ``overhead``. Floor 6."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rlhf_audit_nb.cli.shared import Command, Parser, add_policy, add_trail, finish, trail_folder

if TYPE_CHECKING:
    from rlhf_audit_nb.trail import Entry
    from rlhf_audit_nb.trail.vault import Half

__all__ = ["COMMANDS"]


def _do_doctor(args: argparse.Namespace) -> int:
    from rlhf_audit_nb.health import examine

    found = examine(trail_folder(args), policy=args.policy, published=args.published, full=args.full)
    if args.otel:
        found.export_metrics()
    return finish(args, found.to_dict(), found.lines(), found.exit_code)


def _do_overhead(args: argparse.Namespace) -> int:
    from contextlib import closing

    from rlhf_audit_nb.capture.overhead import read_overhead
    from rlhf_audit_nb.trail import TrailReader, Vault
    from rlhf_audit_nb.trail.home import home_folder
    from rlhf_audit_nb.trail.keys import load_keys

    folder = trail_folder(args)
    reader = TrailReader.open(folder)

    def half(entry: Entry) -> Half:
        with closing(Vault(folder / "vault.sqlite", load_keys(home_folder(), reader.origin).master)) as vault:
            return vault.half(entry)

    found = read_overhead(reader, half, args.run)
    return finish(args, found.to_dict(), str(found).splitlines())


def _add_doctor(parser: Parser) -> None:
    parser.set_defaults(do=_do_doctor)
    parser.description = (
        "Look whether keys, trail, vault, clock, disk, versions, runs, anchors and budget are as they should be. "
        "Nothing is changed. Exit code 0 where nothing fails (a warning is no failure), else 3."
    )
    add_trail(parser)
    add_policy(parser)
    parser.add_argument("--published", metavar="DIR|URL", help="a published copy, to tell how far it lags")
    parser.add_argument("--full", action="store_true", help="verify every entry, not only the newest")
    parser.add_argument("--otel", action="store_true", help="also report gauges through OpenTelemetry (extra otel)")


def _add_overhead(parser: Parser) -> None:
    parser.set_defaults(do=_do_overhead)
    add_trail(parser)
    parser.add_argument("--run", metavar="ID", help="another run than the last (its id, or the beginning of it)")


COMMANDS = (
    Command(
        "check", "doctor", "look whether all that the trail needs is as it should be; changes nothing", _add_doctor
    ),
    Command("check", "overhead", "what recording cost the last run: its share, by part", _add_overhead),
)
