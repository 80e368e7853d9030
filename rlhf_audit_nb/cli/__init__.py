"""The command ``rlhf-audit``. Floor 6: a face, thin; what a command does is done on the floors below.

What a person reads goes to stdout, progress and complaints to stderr; with ``--json`` stdout holds one JSON object and
nothing else. Exit codes: 0 done, 1 a notebook failed or a new run of it differs, 2 usage or bad input, 3 refused,
10/30/40 verdicts. A mistake of the user's gets one sentence and the next step, never a traceback.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, get_args

from rlhf_audit_nb import __version__
from rlhf_audit_nb.cli import (
    anchoring,
    annotating,
    attesting,
    budget,
    bundling,
    checking,
    comparing,
    computing,
    gating,
    health,
    keys,
    labelling,
    publishing,
    reading,
    recording,
    replaying,
    reproducing,
    saying,
    self_checking,
    sweeping,
    vault,
)
from rlhf_audit_nb.cli.shared import PROGRAM, WIDTH, Parser, Section, as_json, note
from rlhf_audit_nb.errors import AuditError, ConfigError

__all__ = ["main"]

INTERRUPTED = 130
RAISED_LINES = 10

COMMANDS = (
    *recording.COMMANDS,
    *reproducing.COMMANDS,
    *sweeping.COMMANDS,
    *annotating.COMMANDS,
    *labelling.COMMANDS,
    *checking.COMMANDS,
    *gating.COMMANDS,
    *attesting.COMMANDS,
    *health.COMMANDS,
    *self_checking.COMMANDS,
    *replaying.COMMANDS,
    *comparing.COMMANDS,
    *reading.COMMANDS,
    *saying.COMMANDS,
    *computing.COMMANDS,
    *budget.COMMANDS,
    *publishing.COMMANDS,
    *bundling.COMMANDS,
    *anchoring.COMMANDS,
    *keys.COMMANDS,
    *vault.COMMANDS,
)


def _overview() -> str:
    lines = ["RLHF training that can be proved.", ""]
    for title in get_args(Section):
        found = [command for command in COMMANDS if command.section == title]
        if found:
            lines += [f"{title}:", *(f"  {command.name:<13} {command.help}" for command in found), ""]
    lines += [
        f"{PROGRAM} COMMAND --help tells what a command takes. Exit codes: 0 done, 1 a notebook failed",
        "or a new run of it differs, 2 usage or bad input, 3 refused (budget, policy); verdicts: 10 below what was",
        "required, 30 DIVERGED, 40 INVALID.",
    ]
    return "\n".join(lines)


def _parser() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND …",
        description=_overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", help=argparse.SUPPRESS, metavar="COMMAND", parser_class=Parser)
    shared = Parser(add_help=False)
    shared.add_argument("--json", action="store_true", help="one JSON object on stdout, words on stderr")
    made = {}
    for command in COMMANDS:
        made[command.name] = commands.add_parser(
            command.name,
            prog=f"{PROGRAM} {command.name}",
            description=command.help,
            parents=[shared],
            allow_abbrev=False,
        )
        command.build(made[command.name])
    return parser, made


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser, commands = _parser()
    if not argv:
        parser.print_help()
        raise SystemExit(0)
    first = argv[0]
    if first.startswith("-") and first not in parser.options():
        raise ConfigError(
            f"{first!r} stands before the command.", next_step=f"Write {PROGRAM} COMMAND {first}.", code="usage"
        )
    if not first.startswith("-") and first not in commands:
        raise ConfigError(
            f"There is no command {first!r}.{_did_you_mean(first, commands)}",
            next_step=f"See {PROGRAM} --help.",
            code="usage",
        )
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = commands[args.command].all_options()
        if unknown[0] == "--trail" and hasattr(args, "target"):
            raise ConfigError(
                f"{PROGRAM} {args.command} takes the trail's folder without '--trail'.",
                next_step=f"Write {PROGRAM} {args.command} FOLDER.",
                code="usage",
            )
        raise ConfigError(
            f"{PROGRAM} {args.command} does not take {unknown[0]!r}.{_did_you_mean(unknown[0], known)}",
            next_step=f"See {PROGRAM} {args.command} --help.",
            code="usage",
        )
    if not hasattr(args, "do"):
        parser.error(f"name a command: {', '.join(commands)}")
    return args


def _did_you_mean(word: str, known: Sequence[str] | dict[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(given)
        do: Callable[[argparse.Namespace], int] = args.do
        return do(args)
    except AuditError as error:
        note(f"error: {error.message}")
        for line in _raised_words(getattr(error, "said", "")):
            note(line)
        if error.next_step:
            note(f"Next step: {error.next_step}")
        if "--json" in given:
            reason = {"code": error.reason, "message": error.message, "next_step": error.next_step}
            print(as_json({"error": reason}))
        return error.exit_code
    except KeyboardInterrupt:
        note("interrupted; what was recorded until now is kept")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; nothing more may be written, not even by the interpreter's exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        note(f"error: {where}{error.strerror or error}.")
        note("Next step: check the path, its permissions and the space left on the disk.")
        return 2


def _raised_words(said: str) -> list[str]:
    """The words of an error that a cell raised, indented; what is too long for a terminal stays in the record."""
    from rlhf_audit_nb.compliance.words import visible

    lines = [
        part
        for line in visible(said).splitlines()
        for part in textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="  ")
    ]
    return lines if len(lines) <= RAISED_LINES else [*lines[: RAISED_LINES - 1], "  … (the rest is in the record)"]
